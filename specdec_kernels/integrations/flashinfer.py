"""FlashInfer's signature, for callers that have probabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.contract import TILE, Level, Purpose, counter_tag
from specdec_kernels.ops import noise_words, validate
from specdec_kernels.ops.backends import BackendName
from specdec_kernels.reference.noise import exponential_of, uniform_of


def chain_speculative_sampling(
    draft_probs: Tensor,
    draft_token_ids: Tensor,
    target_probs: Tensor,
    maybe_output_accepted_token_num: Tensor | None = None,
    maybe_output_emitted_draft_token_num: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    *,
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``flashinfer.sampling.chain_speculative_sampling`` on any device, without a seed shared by a batch.

    The operators take logits, and whoever has them should call :func:`specdec_kernels.verify_chain`, which reads no
    row that it need not. Here the drafts are judged by their probabilities alone, 2 K numbers a request; then the
    residual ``(target - draft)+`` of one row is written, [B, V] and not [B, K, V], and the one token drawn from its
    weights as they are, without a logarithm.

    Args:
        draft_probs: float32 [B, K, V].
        draft_token_ids: int32 or int64 [B, K]. -1 ends a request's draft.
        target_probs: float32 [B, K+1, V].
        maybe_output_accepted_token_num: int32 [B]; drafts that would be accepted each by itself are added to it.
        maybe_output_emitted_draft_token_num: int32 [B]; drafts that were kept are added to it.
        deterministic: as it is anyway.
        generator: what seeds are drawn from where there is no ``seed``; None is PyTorch's own of the device.
        seed: int, or int64 or uint64 [1] or [B]. Where it is one for all, request b is drawn at ``offset + b``, so the
            next call's offset must be larger by B at least. Equal entries of [B] share their noise, unless their
            offsets differ: here a request's slot is no part of it.
        offset: int, or int64 or uint64 [1] or [B]; None is 0.
        backend: as everywhere.

    Returns:
        tokens int32 [B, K+1], the accepted drafts, one more, then -1; and the two counters, those that were passed or
        new ones. A row that is no distribution (nan, nothing above 0) gives -1 for the one more.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Equivalent to, for one request::

        for i, x in enumerate(draft_token_ids):
            if not torch.rand(()) * draft_probs[i, x] < target_probs[i, x]:
                return [*draft_token_ids[:i], torch.multinomial((target_probs[i] - draft_probs[i]).clamp(min=0), 1)]
        return [*draft_token_ids, torch.multinomial(target_probs[-1], 1)]

    Source: Leviathan et al., arXiv:2211.17192, algorithm 1; signature and counters, FlashInfer 0.7.
    """
    check = validate.ArgumentChecker("target_probs", target_probs)
    ids = check.ids("draft_token_ids", draft_token_ids, "B, K").long()
    batch, count = ids.shape
    check.sizes["K+1"] = count + 1
    draft = check.tensor("draft_probs", draft_probs, (torch.float32,), "B, K, V")
    target = check.tensor("target_probs", target_probs, (torch.float32,), "B, K+1, V")
    vocab = target.shape[2]
    validate.within("draft_token_ids", ids, -1, vocab - 1, f"in [-1, {vocab})")
    counters = [
        torch.zeros(batch, dtype=torch.int32, device=target.device)
        if given is None
        else check.tensor(name, given, (torch.int32,), "B")
        for name, given in (
            ("maybe_output_accepted_token_num", maybe_output_accepted_token_num),
            ("maybe_output_emitted_draft_token_num", maybe_output_emitted_draft_token_num),
        )
    ]
    if seed is None:
        seed = torch.randint(2**63 - 1, (batch,), generator=generator, device=target.device)
    seeds, position = (
        check.integers(name, _of_each(value, batch))
        for name, value in (("seed", seed), ("offset", 0 if offset is None else offset))
    )
    if not isinstance(seed, Tensor) or len(seed) == 1:
        position = position + torch.arange(batch, device=target.device)

    live = ((ids >= 0) & (ids < vocab)).long().cumprod(1).bool()  # -1 ends a draft
    at = ids.clamp(0, vocab - 1)[..., None]
    mine, theirs = (probs[:, :count].gather(2, at)[..., 0].double() for probs in (draft, target))
    uniforms = [_uniform(seeds, position, row, backend) for row in range(count)]
    accept = live & (torch.stack(uniforms, 1) * mine < theirs) if count else live
    accepted = accept.long().cumprod(1).sum(1)

    every = torch.arange(batch, device=target.device)
    row = target[every, accepted]
    tiles, sums = _tiles(row)
    if count:
        left, left_sums = _tiles((row - draft[every, accepted.clamp(max=count - 1)]).clamp_(min=0))
        # Where rounding left nothing, draft and target are the same.
        rejected = ((accepted < live.sum(1)) & (left_sums.sum(1) != 0))[:, None]
        sums = left_sums.where(rejected, sums)
    tile = _race(sums, Level.TILE, seeds, position, backend)
    weights = tiles[every, tile]
    if count:
        weights = left[every, tile].where(rejected, weights)
    drawn = tile * TILE + _race(weights.double(), Level.TOKEN, seeds, position, backend)
    total = sums.sum(1)
    usable = total.isfinite() & (total > 0)

    tokens = torch.nn.functional.pad(ids, (0, 1), value=-1)
    index = torch.arange(count + 1, device=target.device)
    tokens = tokens.masked_fill(index >= accepted[:, None], -1)
    tokens[every, accepted] = drawn.where(usable, -1)
    counters[0] += accept.sum(1)
    counters[1] += accepted
    return tokens.int(), counters[0], counters[1]


def _of_each(value: int | Tensor, batch: int) -> int | Tensor:
    """FlashInfer's seed or offset, uint64 or int64, one for all or one each, as this library's: int or int64 [B]."""
    if not isinstance(value, Tensor):
        return value
    signed = value.view(torch.int64) if value.dtype == torch.uint64 else value
    return signed.expand(batch) if signed.shape == (1,) else signed


def _tiles(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[B, V]`` in tiles ``[B, T, TILE]``, and the sum of each tile, float64."""
    missing = -weights.shape[1] % TILE
    tiles = (functional.pad(weights, (0, missing)) if missing else weights).unflatten(1, (-1, TILE))
    return tiles, tiles.sum(2, dtype=torch.float64)


def _race(weights: Tensor, level: Level, seed: Tensor, position: Tensor, backend: BackendName | None) -> Tensor:
    """One level of the two-level race of the token that follows the drafts (docs/noise.md): indices [B]."""
    count = weights.shape[1]
    tag = counter_tag(Purpose.TARGET, level)
    words = noise_words(seed, position, tag, counters=-(-count // 4), backend=backend)[:, :count]
    arrivals = exponential_of(words) / weights
    return arrivals.where(weights > 0, torch.inf).argmin(1)


def _uniform(seed: Tensor, position: Tensor, row: int, backend: BackendName | None) -> Tensor:
    """What decides on a draft (docs/noise.md): float64 [B] in [0, 1), as of :func:`specdec_kernels.verify_chain`."""
    return uniform_of(noise_words(seed, position, Purpose.ACCEPT | row << 16, backend=backend))
