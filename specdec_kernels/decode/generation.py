"""A batch of prompts, decoded to the end: token by token, or all at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ParamSpec

from specdec_kernels.checks import ids_of
from specdec_kernels.contract import MIN_P_OFF, TOP_K_OFF, TOP_P_OFF
from specdec_kernels.decode.loop import Loop, Options, StopWhen
from specdec_kernels.decode.names import explains_names
from specdec_kernels.decode.protocols import Drafter, Target, shares_ids, traits_of
from specdec_kernels.decode.requests import Grammar, make_requests
from specdec_kernels.decode.results import Ending, Generation, Token
from specdec_kernels.decode.statistics import Statistics
from specdec_kernels.ops import BackendName, RuleName

P = ParamSpec("P")


@explains_names
def stream(
    target: Target,
    prompts: Sequence[Sequence[int]],
    *,
    drafter: Drafter | None = None,
    num_draft: int = 4,
    max_new_tokens: int | Sequence[int] = 128,
    min_new_tokens: int | Sequence[int] = 0,
    seed: int | Sequence[int | None] | None = None,
    stop_tokens: Collection[int] | None = None,
    stop_when: StopWhen | None = None,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = TOP_K_OFF,
    top_p: float | Sequence[float] = TOP_P_OFF,
    min_p: float | Sequence[float] = MIN_P_OFF,
    repetition_penalty: float | Sequence[float] = 1.0,
    presence_penalty: float | Sequence[float] = 0.0,
    frequency_penalty: float | Sequence[float] = 0.0,
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float]] = {},
    grammar: Grammar | Sequence[Grammar | None] | None = None,
    rule: RuleName = "token",
    logprobs: bool = False,
    statistics: Statistics | None = None,
    backend: BackendName | None = None,
) -> Iterator[Token]:
    """Decode a batch, yielding each token as soon as it is verified.

    The tokens have exactly the target's distribution, whatever the drafter. With the same seed a request gives the same
    tokens alone and in any batch, as far as the target's logits are the same there and the drafter drafts the same;
    under the rule ``"coupled"`` whatever is drafted. Arguments are checked, and the prompts read, when it is called.

    Args:
        target: see :mod:`specdec_kernels.decode.targets`.
        prompts: token ids, at least one each.
        drafter: see :mod:`specdec_kernels.decode.drafters`; ``None`` decodes plainly, one token a step.
        num_draft: drafts a step at most; of a tree, its nodes beside the root.
        max_new_tokens: one for all requests, or a list with one each.
        min_new_tokens: likewise; before so many no stop token can be drawn.
        seed: in [-2^63, 2^63), likewise; ``None`` draws one.
        stop_tokens: ids that end a request; the id itself is the last token yielded. ``None``: the model's own end
            tokens; ``()``: none.
        stop_when: asked after every token but a stop token, with the index of its prompt and the tokens generated so
            far; where it answers True the request ends, as with a stop token.
        temperature, top_k, top_p, min_p: see :func:`specdec_kernels.sample`; one for all, or a list with one each.
        repetition_penalty, presence_penalty, frequency_penalty: see :class:`specdec_kernels.Penalties`; likewise.
        logit_bias: by token id, what is added to the logits; likewise.
        grammar: see :class:`~specdec_kernels.decode.Sampling`; likewise.
        rule: of :func:`specdec_kernels.verify_chain`. For trees of drawn drafts "token" is "recursive" and "block" is
            "traversal"; trees of point masses are walked.
        logprobs: yield the log-probability of every token.
        statistics: filled in as decoding goes.
        backend: of :func:`specdec_kernels.verify_chain`.

    Yields:
        :class:`Token`, in the order of every request's tokens.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_parties(target, drafter)
    stops = target.stop_tokens if stop_tokens is None else frozenset(ids_of("stop_tokens", stop_tokens))
    options = Options(num_draft, rule, logprobs, backend, stop_when)
    sampling = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "logit_bias": logit_bias, "grammar": grammar,
    }  # fmt: skip
    requests = make_requests(
        prompts, target.vocab_size, seed, max_new_tokens, sampling, stops, min_new_tokens, shares_ids(target)
    )
    if not requests:
        return iter(())
    loop = Loop(target, drafter, options, Statistics() if statistics is None else statistics)
    loop.begin(requests)
    return iter(loop)


def _collecting(stream: Callable[P, Iterator[Token]]) -> Callable[P, list[Generation]]:
    """The same of whole requests."""

    def generate(*arguments: P.args, **named: P.kwargs) -> list[Generation]:
        """Decode a batch to the end; arguments as of :func:`stream`.

        Returns:
            One :class:`Generation` for each prompt, in their order.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        try:
            signature.bind(*arguments, **named)
        except TypeError as error:  # else it would name `stream`
            raise TypeError(f"generate() {error}") from None
        endings: dict[int, Ending] = {}
        results: dict[int, Generation] = {}  # one for each prompt: all yield something, if only that they ended
        for token in stream(*arguments, **named):
            endings[token.request] = token.finished
            result = results.setdefault(token.request, Generation())
            if token.token >= 0:
                result.tokens.append(token.token)
                result.drafted.append(token.drafted)
                result.logprobs.append(token.logprob)
        return [replace(results[request], finished=endings[request]) for request in sorted(results)]

    signature = inspect.signature(stream).replace(return_annotation="list[Generation]")
    generate.__signature__, generate.__qualname__ = signature, "generate"  # type: ignore[attr-defined]
    return generate


generate = explains_names(_collecting(stream))


def check_parties(target: Any, drafter: Any) -> None:
    """Check that these are a target, and a drafter or none.

    Raises:
        TypeError: they are not.
        ValueError: the drafter draws from another vocabulary than the target's.
    """
    examples = {"target": "TransformersTarget(model)", "drafter": "ModelDrafter(model)"}
    for (name, example), value in zip(examples.items(), (target, drafter), strict=True):
        if not (hasattr(value, "begin") or (name == "drafter" and value is None)):
            raise TypeError(f"{name} must be a {name.capitalize()}, such as {example}, got {type(value).__name__}")
    own = traits_of(drafter).vocab_size
    if own not in (None, target.vocab_size):
        raise ValueError(
            f"drafter must draft from the target's vocabulary, ModelDrafter(model, vocab_size={target.vocab_size}) if "
            f"its own is smaller, got vocab_size={own}"
        )
