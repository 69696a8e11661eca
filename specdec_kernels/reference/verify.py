"""``sample`` and ``verify_chain`` in PyTorch. Shapes, dtypes and semantics: :mod:`specdec_kernels.ops`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.contract import MIN_TEMPERATURE, TILE, Level, Purpose
from specdec_kernels.reference.noise import coins, exponentials


def _scales(temperatures: Tensor | None, temperature: float, rows: Tensor) -> Tensor:
    """1 / temperature, float32 as in every backend, one a row; inf is greedy."""
    if temperatures is None:
        temperatures = torch.full((rows.shape[0],), temperature, dtype=torch.float32, device=rows.device)
    return torch.where(temperatures < MIN_TEMPERATURE, torch.inf, 1.0 / temperatures)


def _rows_valid(logits: Tensor) -> Tensor:
    """No nan, no +inf, at least one finite logit: bool, one a row."""
    return ~logits.isnan().any(-1) & ~logits.isposinf().any(-1) & logits.isfinite().any(-1)


def _largest_finite(logits: Tensor) -> Tensor:
    return logits.masked_fill(~logits.isfinite(), -torch.inf).argmax(-1)


def _point_mass(tokens: Tensor, vocab: int) -> Tensor:
    return functional.one_hot(tokens, vocab).double()


def _distributions(logits: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of rows ``[..., V]`` (nan where a row is not valid), and their logsumexps."""
    greedy = scales.isinf()
    scaled = logits * torch.where(greedy, 1.0, scales.double())[..., None]
    logsumexp = scaled.logsumexp(-1)
    probs = (scaled - logsumexp[..., None]).exp()
    probs = torch.where(greedy[..., None], _point_mass(logits.argmax(-1), logits.shape[-1]), probs)
    return probs.masked_fill(~_rows_valid(logits)[..., None], torch.nan), logsumexp


def _race(weights: Tensor, noise: Tensor) -> Tensor:
    """argmin of noise / weight over the positive weights, lowest index on ties."""
    return torch.where(weights > 0, noise / weights, torch.inf).argmin(-1)


def _two_level_race(weights: Tensor, seed: Tensor, position: Tensor, purpose: int, row: Tensor) -> Tensor:
    """Draw from weights ``[R, V]``: a tile of ids first, then an id inside it."""
    tiles = functional.pad(weights, (0, -weights.shape[-1] % TILE)).unflatten(-1, (-1, TILE))
    tile_noise = exponentials(seed, position, purpose, Level.TILE, row, tiles.shape[1])
    tile = _race(tiles.sum(-1), tile_noise)
    inside = tiles[torch.arange(len(tile), device=tile.device), tile]
    token_noise = exponentials(seed, position, purpose, Level.TOKEN, row, TILE)
    return tile * TILE + _race(inside, token_noise)


def sample(
    logits: Tensor, seed: Tensor, position: Tensor, row: Tensor, temperatures: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    scales = _scales(temperatures, temperature, logits)
    logits = logits.double()
    valid = _rows_valid(logits)
    probs, logsumexp = _distributions(logits, scales)
    tokens = _two_level_race(probs.nan_to_num(0.0), seed, position, Purpose.DRAFT, row)
    tokens = torch.where(valid, tokens, _largest_finite(logits))
    logprobs = probs.gather(-1, tokens[:, None])[:, 0].log()
    greedy = scales.isinf()
    cutoff = torch.where(greedy, logits.amax(-1), -torch.inf)
    stats = torch.stack([scales.double(), cutoff, torch.where(greedy, 0.0, logsumexp)], -1)
    return tokens, logprobs.float(), stats.masked_fill(~valid[:, None], torch.nan).float()


def _draft_probs(
    target: Tensor, drafted: Tensor, logits: Tensor | None, stats: Tensor | None, greedy: Tensor
) -> tuple[Tensor, Tensor]:
    """The laws ``[B, K, V]`` the drafts were drawn from, and whether each is usable."""
    point_mass = _point_mass(drafted, target.shape[-1])
    if logits is None:
        return point_mass, torch.ones_like(drafted, dtype=torch.bool)
    if stats is None:
        probs, _ = _distributions(logits.double(), torch.ones(drafted.shape, device=logits.device))
        valid = ~probs.isnan().any(-1)
    else:
        scale, cutoff, logsumexp = (s[..., None] for s in stats.double().unbind(-1))
        probs = (scale * logits.double() - logsumexp).exp().masked_fill(logits < cutoff, 0.0)
        probs = torch.where(scale.isinf(), point_mass, probs)
        valid = probs.gather(-1, drafted[..., None])[..., 0].isfinite()
    # A greedy target accepts its argmax and emits its argmax, whatever the draft's law.
    greedy = greedy[:, None].expand_as(valid)
    return torch.where(greedy[..., None], point_mass, probs), valid | greedy


def _draft_lengths(draft_tokens: Tensor, num_draft: Tensor | None) -> Tensor:
    """Drafts before the first -1, at most ``num_draft``."""
    lengths = (draft_tokens >= 0).long().cumprod(1).sum(1)
    return lengths if num_draft is None else torch.minimum(lengths, num_draft.long().clamp(min=0))


def _check_ids(draft_tokens: Tensor, num_draft: Tensor | None, vocab: int) -> None:
    """On the CPU, where looking is free, an id outside [-1, V) is an error; elsewhere it ends the draft."""
    live = (draft_tokens == -1).cumsum(1) == 0
    if num_draft is not None:
        live &= torch.arange(draft_tokens.shape[1]) < num_draft[:, None]
    bad = (live & ((draft_tokens < -1) | (draft_tokens >= vocab))).nonzero()
    if len(bad):
        b, i = bad[0].tolist()
        raise ValueError(f"draft_tokens must be -1 or in [0, {vocab}), got {int(draft_tokens[b, i])} at [{b}, {i}]")


def verify_chain(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    draft_stats: Tensor | None,
    seed: Tensor,
    position: Tensor,
    num_draft: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows, vocab = target_logits.shape
    device = target_logits.device
    scales = _scales(temperatures, temperature, target_logits)
    if draft_tokens.device.type == "cpu":
        _check_ids(draft_tokens, num_draft, vocab)
    drafted_tokens = draft_tokens.long().masked_fill(draft_tokens >= vocab, -1)
    lengths = _draft_lengths(drafted_tokens, num_draft)
    drafted = drafted_tokens.clamp(min=0)

    target, _ = _distributions(target_logits.double(), scales[:, None].expand(batch, rows))
    draft, draft_valid = _draft_probs(target_logits, drafted, draft_logits, draft_stats, scales.isinf())
    target_valid = ~target.isnan().any(-1)

    steps = torch.arange(rows - 1, device=device).expand(batch, rows - 1)
    u = torch.stack([coins(seed, position, steps[:, i]) for i in range(rows - 1)], 1) if rows > 1 else steps.double()
    target_prob = target[:, :-1].gather(-1, drafted[..., None])[..., 0]
    draft_prob = draft.gather(-1, drafted[..., None])[..., 0]
    accept = target_valid[:, :-1] & draft_valid & (u * draft_prob < target_prob) & (steps < lengths[:, None])
    accepted = accept.long().cumprod(1).sum(1)

    # The one row that emits: the residual where a draft was rejected, the target everywhere else.
    requests = torch.arange(batch, device=device)
    emitting = target[requests, accepted]
    row_valid = target_valid[requests, accepted]
    weights = emitting
    rejected = accepted < lengths
    if rows > 1:
        at = accepted.clamp(max=rows - 2)
        rejected_draft = draft[requests, at]
        usable = draft_valid[requests, at]
        residual = (emitting - rejected_draft).nan_to_num(0.0).clamp(min=0.0)
        use_residual = rejected & usable & (residual.sum(-1) > 0) & ~scales.isinf()
        weights = torch.where(use_residual[:, None], residual, emitting)
        valid = row_valid & (usable | ~rejected)
    else:
        valid = row_valid
    emitted = _two_level_race(weights.nan_to_num(0.0), seed, position, Purpose.TARGET, accepted)
    emitted = torch.where(row_valid, emitted, _largest_finite(target_logits[requests, accepted]))

    index = torch.arange(rows, device=device).expand(batch, rows)
    tokens = functional.pad(drafted_tokens, (0, 1), value=-1)
    tokens = torch.where(index < accepted[:, None], tokens, -1)
    tokens = torch.where(index == accepted[:, None], emitted[:, None], tokens)
    return tokens, accepted.int(), valid
