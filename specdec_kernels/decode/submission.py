"""A request of a scheduler, as who submitted it sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from specdec_kernels.decode.loop import StopWhen
from specdec_kernels.decode.requests import Request
from specdec_kernels.decode.results import Generation, Token
from specdec_kernels.decode.statistics import Acceptance

if TYPE_CHECKING:
    from specdec_kernels.decode.scheduler import Scheduler


class Submission:
    """A request that was handed to a :class:`Scheduler`: an iterator of its tokens, as they come, and an asynchronous
    one.

    Whoever waits for a token runs steps of the scheduler meanwhile, which serve all its requests. What went wrong with
    this request alone is raised here, by an iterator once and by :meth:`result` every time; what would say something of
    its reader (``StopIteration``, ``KeyboardInterrupt``) as the cause of a ``RuntimeError``.
    """

    def __init__(self, scheduler: Scheduler, request: Request, stop_when: StopWhen | None) -> None:
        self._scheduler, self.request, self.stop_when = scheduler, request, stop_when
        self._tokens: list[Token] = []
        self._read = 0
        self._error: Exception | None = None
        self._raised = False
        self.done = False
        """Whether no more tokens will come than those not read yet: finished, cancelled or failed."""
        self.acceptance = Acceptance()
        """What became of its drafts, once it is done."""
        self.prompt_logprobs: list[float] = []
        """Of every token of the prompt, nan for the first, under the target's own distribution (temperature 1, nothing
        filtered); where they were requested, once the prompt was read."""

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        token = self._scheduler.advance_to(self)
        if token is None:
            raise StopIteration
        return token

    def __aiter__(self) -> Submission:
        return self

    async def __anext__(self) -> Token:
        while not self.ready:  # the thread takes no token, which would be lost where this is cancelled meanwhile
            await self._scheduler.stepped()
        token = self.take()
        if token is None:
            raise StopAsyncIteration
        return token

    def cancel(self) -> None:
        """End the request where it is; tokens that were made can still be read. Later than its end it does nothing.
        Within a step, of this thread or another, it takes effect when the step is done."""
        self._scheduler.cancel(self)

    def result(self) -> Generation:
        """The whole request, once it has ended; ``finished`` is empty if it was cancelled."""
        for _ in self:
            pass
        if self._error is not None:
            raise self._error
        tokens = [token for token in self._tokens if token.token >= 0]
        return Generation(
            [token.token for token in tokens],
            [token.drafted for token in tokens],
            [token.logprob for token in tokens],
            self._tokens[-1].finished if self._tokens else "",
        )

    # What follows is the scheduler's, under its lock.

    def put(self, token: Token) -> None:
        self._tokens.append(token)

    @property
    def failed(self) -> bool:
        """Whether it ends with an error."""
        return self._error is not None

    @property
    def ready(self) -> bool:
        """Whether there is something to take, or never will be."""
        return self._read < len(self._tokens) or self.done

    def take(self) -> Token | None:
        """The next token that is there; an error, once, where there is none any more."""
        if self._read < len(self._tokens):
            self._read += 1
            return self._tokens[self._read - 1]
        if self._error is not None and not self._raised:
            self._raised = True
            raise self._error
        return None

    def fail(self, error: BaseException) -> None:
        """Note what it ends with. It is done later: an asynchronous reader, who looks without the lock, has the tokens
        of this step first."""
        if not isinstance(error, Exception) or isinstance(error, (StopIteration, StopAsyncIteration)):
            cause, error = error, RuntimeError(f"the request was ended by {error!r}")
            error.__cause__ = cause
        self._error = error
