"""What decoding gives: tokens as they come, and requests that have ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Ending = Literal["", "stop", "length", "invalid", "dead_end"]


class Token(NamedTuple):
    """One token of one request, as it is streamed.

    Fields:
        request: index of its prompt.
        token: its id; -1 where a request ends without one, ``finished`` being "invalid" or "dead_end".
        drafted: whether it was a draft that was accepted; False for a bonus or recovered token.
        finished: why the request ends here: "stop" (a stop token), "length" (``max_new_tokens``), "invalid" (logits of
            the target that are no distribution: nan, +inf, nothing finite), "dead_end" (a grammar that allows nothing);
            empty if it goes on.
        logprob: natural logarithm of its probability under the target's distribution, after all processing; nan unless
            requested.
    """

    request: int
    token: int
    drafted: bool
    finished: Ending = ""
    logprob: float = float("nan")


@dataclass(frozen=True)
class Generation:
    """One finished request.

    Fields:
        tokens: what the prompt was continued with.
        drafted: of each token, whether it was a draft that was accepted.
        logprobs: of each token; nan unless requested.
        finished: as of :class:`Token`.
    """

    tokens: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: Ending = ""
