"""The public functional API: documentation, validation, and the choice of a backend."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from specdec_kernels.contract import MAX_ROWS
from specdec_kernels.ops import validate
from specdec_kernels.ops.backends import BACKENDS, Backend, function

__all__ = ["BACKENDS", "Backend", "Sample", "Verified", "noise_words", "sample", "verify_chain"]

BackendName = Literal["reference", "cpu", "triton"]


class Sample(NamedTuple):
    """What :func:`sample` returns."""

    tokens: Tensor
    """int64 [R], always in [0, V)."""
    logprobs: Tensor
    """float32 [R], natural logarithm of the token's probability under the law it was drawn from; nan for a row that
    is not valid."""
    stats: Tensor
    """float32 [R, 3], ``(scale, cutoff, logsumexp)``; hand it to :func:`verify_chain` as ``draft_stats``."""


class Verified(NamedTuple):
    """What :func:`verify_chain` returns."""

    tokens: Tensor
    """int64 [B, K+1]: the accepted drafts, the emitted token, then -1."""
    num_accepted: Tensor
    """int32 [B]: drafts accepted; ``num_accepted + 1`` tokens are emitted."""
    valid: Tensor
    """bool [B]: False where a row that had to be read was not usable (nan, +inf, nothing finite)."""


def sample(
    logits: Tensor,
    *,
    seed: Tensor | int,
    position: Tensor | int,
    row: Tensor | int = 0,
    temperature: Tensor | float = 1.0,
    backend: BackendName | None = None,
) -> Sample:
    """Draw one token from each row of logits, and hand over the scalars that verification needs.

    The draw is an exponential race (Gumbel-max) in two levels, tiles of 128 ids and ids inside the tile, so that it
    costs one exponential per 128 tokens; it is exact, and the same in every backend, batch slot and launch shape.

    Args:
        logits: float32, bfloat16 or float16 [R, V]; any row stride; not changed.
        seed: int64 [R] or int. One per request.
        position: int64 [R] or int. Tokens of the request before this step, in tokens.
        row: int64 [R] or int, in [0, 65536). Index of the drafted token in its step.
        temperature: float32 [R] or float, at least 0. 0 (and below 1e-5) is greedy: the largest logit, lowest id on
            ties.
        backend: ``None`` follows the device; a name forces that backend.

    Returns:
        :class:`Sample`. A row with a nan, a +inf or no finite logit gives its largest finite logit (0 if there is
        none), logprob nan and stats nan.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: the backend that was asked for cannot run, with the reason.

    Equivalent to::

        probs = torch.softmax(logits.float() / temperature, -1)
        tokens = torch.multinomial(probs, 1)[:, 0]          # in law; the noise is docs/noise.md's
        logprobs = probs.gather(-1, tokens[:, None])[:, 0].log()

    Example:
        >>> import torch
        >>> drawn = sample(torch.tensor([[0.0, 9.0, 0.0]]), seed=1, position=7, temperature=0.0)
        >>> drawn.tokens.tolist()
        [1]

    Source: two-level race, docs/noise.md; races and Gumbel-max, Maddison et al., arXiv:1411.0030.
    """
    logits = validate.logits("logits", logits, "R, V", (None, None))
    rows = logits.shape[0]
    if isinstance(row, int) and not 0 <= row < MAX_ROWS:
        raise ValueError(f"row must be in [0, {MAX_ROWS}), got {row}")
    seed = validate.integers("seed", seed, rows, "R", logits.device)
    position = validate.integers("position", position, rows, "R", logits.device)
    row = validate.integers("row", row, rows, "R", logits.device)
    temperatures, scalar = validate.temperature(temperature, rows, "R")
    validate.same_device("logits", logits, seed=seed, position=position, row=row, temperature=temperatures)
    return Sample(*function("sample", backend, logits.device)(logits, seed, position, row, temperatures, scalar))


def verify_chain(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None = None,
    draft_stats: Tensor | None = None,
    *,
    seed: Tensor | int,
    position: Tensor | int,
    num_draft: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    rule: Literal["token"] = "token",
    backend: BackendName | None = None,
) -> Verified:
    """Decide how many drafts to keep and draw the next token: the text has exactly the target's distribution.

    Draft ``x`` of row i is accepted iff ``coin * draft(x) < target(x)``. At the first rejection a token is drawn from
    the residual ``(target - draft)+``; after K acceptances from target row K (the bonus). Rows after the first
    rejection are not read, and with ``draft_stats`` no draft row is but the rejected one.

    Args:
        target_logits: float32, bfloat16 or float16 [B, K+1, V]; row i is the target's after i drafts.
        draft_tokens: int64 or int32 [B, K]. -1 ends a request's draft.
        draft_logits: logits [B, K, V] the drafts were drawn from, at temperature 1 unless ``draft_stats`` is given.
            ``None``: each draft is a point mass (n-gram, argmax).
        draft_stats: float32 [B, K, 3], as :func:`sample` gave them: the drafts were drawn with those scalars.
        seed: int64 [B] or int. One per request.
        position: int64 [B] or int. Tokens of the request before this step; it must grow with every step.
        num_draft: int64 or int32 [B], or None for K. Drafts beyond it are not looked at.
        temperature: float32 [B] or float, at least 0, of the target. 0 (and below 1e-5) is greedy.
        rule: ``"token"``, the only one so far.
        backend: ``None`` follows the device; a name forces that backend.

    Returns:
        :class:`Verified`. A target row that has a nan, a +inf or no finite logit stops its request there: nothing more
        is accepted, the largest finite logit is emitted (0 if there is none), ``valid`` is False. A draft row that is
        not usable stops it as well, with a draw from the target's row. Other requests are bitwise unchanged.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Ids are checked on the CPU; on
            other devices, where looking would synchronise, an id out of range ends the draft.
        RuntimeError: the backend that was asked for cannot run, with the reason.

    Equivalent to, for one request::

        target, draft = torch.softmax(target_logits / temperature, -1), torch.softmax(draft_logits, -1)
        for i, x in enumerate(draft_tokens):
            if not torch.rand(()) * draft[i, x] < target[i, x]:
                return [*draft_tokens[:i], torch.multinomial((target[i] - draft[i]).clamp(min=0), 1)]
        return [*draft_tokens, torch.multinomial(target[-1], 1)]

    Example:
        >>> import torch
        >>> target = torch.eye(4)[[1, 2, 3]][None] * 50
        >>> verify_chain(target, torch.tensor([[1, 0]]), seed=1, position=7).tokens.tolist()
        [[1, 2, -1]]

    Source: Leviathan et al., arXiv:2211.17192, algorithm 1; Chen et al., arXiv:2302.01318, algorithm 2.
    """
    if rule != "token":
        raise ValueError(f"rule must be 'token', got {rule!r}")
    target_logits = validate.logits("target_logits", target_logits, "B, K+1, V", (None, None, None))
    batch, rows, vocab = target_logits.shape
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"target_logits must have K+1 rows, 1 to {MAX_ROWS}, got {validate.describe(target_logits)}")
    longest = rows - 1
    draft_tokens = validate.tensor("draft_tokens", draft_tokens, validate.ID_DTYPES, "B, K", (batch, longest))
    if draft_logits is not None:
        draft_logits = validate.logits("draft_logits", draft_logits, "B, K, V", (batch, longest, vocab))
    if draft_stats is not None:
        if draft_logits is None:
            raise ValueError("draft_stats needs the draft_logits that it describes, got draft_logits=None")
        draft_stats = validate.tensor("draft_stats", draft_stats, (torch.float32,), "B, K, 3", (batch, longest, 3))
        draft_stats = draft_stats.contiguous()
    if num_draft is not None:
        num_draft = validate.tensor("num_draft", num_draft, validate.ID_DTYPES, "B", (batch,)).contiguous()
    seed = validate.integers("seed", seed, batch, "B", target_logits.device)
    position = validate.integers("position", position, batch, "B", target_logits.device)
    temperatures, scalar = validate.temperature(temperature, batch, "B")
    validate.same_device(
        "target_logits",
        target_logits,
        draft_tokens=draft_tokens,
        draft_logits=draft_logits,
        draft_stats=draft_stats,
        seed=seed,
        position=position,
        num_draft=num_draft,
        temperature=temperatures,
    )
    verify = function("verify_chain", backend, target_logits.device)
    arguments = (
        target_logits,
        draft_tokens,
        draft_logits,
        draft_stats,
        seed,
        position,
        num_draft,
        temperatures,
        scalar,
    )
    if target_logits.device.type != "cpu":
        return Verified(*verify(*arguments))
    try:
        return Verified(*verify(*arguments))
    except RuntimeError as error:  # C++ cannot raise a ValueError across the stable ABI
        if "draft_tokens must be" in str(error):
            raise ValueError(next(line for line in str(error).splitlines() if "draft_tokens must be" in line)) from None
        raise


def noise_words(
    seed: Tensor, position: Tensor, tag: int, *, first: int = 0, counters: int = 1, backend: BackendName | None = None
) -> Tensor:
    """The raw words of the noise contract (docs/noise.md), to hold an integration against its known-answer vectors.

    Args:
        seed, position: int64 [R].
        tag: last word of the Philox counter, ``purpose | level << 8 | row << 16``, in [0, 2^32).
        first: index of the first counter, in [0, 2^32).
        counters: how many counters.
        backend: as everywhere.

    Returns:
        int64 [R, 4 * counters], each in [0, 2^32).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Philox4x32-10, Salmon et al., SC 2011.
    """
    seed = validate.tensor("seed", seed, (torch.int64,), "R", (None,)).contiguous()
    position = validate.integers("position", position, seed.shape[0], "R", seed.device)
    validate.same_device("seed", seed, position=position)
    for name, value in (("tag", tag), ("first", first)):
        if not 0 <= value < 1 << 32:
            raise ValueError(f"{name} must be in [0, 2^32), got {value}")
    if counters < 0:
        raise ValueError(f"counters must not be negative, got {counters}")
    words: Tensor = function("noise_words", backend, seed.device)(seed, position, tag, first, counters)
    return words
