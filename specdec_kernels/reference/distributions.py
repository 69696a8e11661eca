"""Rows of logits to distributions: processing, temperature, filters, softmax; and draws from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.contract import MIN_TEMPERATURE, STEEP, TILE, Level, Purpose
from specdec_kernels.reference.noise import exponentials


def scale_of(temperature: Tensor) -> Tensor:
    """1 / temperature; inf is greedy."""
    return torch.where(temperature < MIN_TEMPERATURE, torch.inf, 1.0 / temperature)


def draft_temperatures_of(each: Tensor | None, all_of_them: float, rows: Tensor) -> Tensor:
    """float32 ``[B, R]``, of drafts that came without stats: a request is a row of ``rows [B, R]``."""
    if each is None:
        return torch.full(rows.shape, all_of_them, dtype=torch.float32, device=rows.device)
    return each[:, None].expand(rows.shape)


class Sampling(NamedTuple):
    """Temperature and filters, float32, one of each a request: ``sampling [B, 4]``, or four scalars for all."""

    scale: Tensor
    """1 / temperature; inf is greedy."""
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @staticmethod
    def of(sampling: Tensor | None, scalars: tuple[float, int, float, float], rows: Tensor) -> Sampling:
        """From the arguments of an operator; ``rows`` has a request a row."""
        if sampling is None:
            sampling = torch.tensor([scalars], dtype=torch.float32, device=rows.device).expand(rows.shape[0], 4)
        temperature, top_k, top_p, min_p = sampling.unbind(-1)
        return Sampling(scale_of(temperature), top_k.long(), top_p, min_p)

    @staticmethod
    def plain(scale: Tensor) -> Sampling:
        """Without filters."""
        one = torch.ones_like(scale)
        return Sampling(scale, torch.zeros_like(scale, dtype=torch.int64), one, torch.zeros_like(scale))

    def repeated(self, rows: int) -> Sampling:
        """The same for every row of a request."""
        return Sampling(*(x[:, None].expand(-1, rows) for x in self))


class Distributions(NamedTuple):
    """Distributions of rows ``[..., V]``."""

    probs: Tensor
    """float64, nan where the row is not valid."""
    scale: Tensor
    cutoff: Tensor
    logsumexp: Tensor

    @property
    def valid(self) -> Tensor:
        """bool, one a row."""
        return ~self.probs.isnan().any(-1)

    @property
    def stats(self) -> Tensor:
        """float32 ``[..., 3]``, as it is handed over; nan where the row is not valid."""
        stats = torch.stack([self.scale, self.cutoff, self.logsumexp], -1)
        return stats.masked_fill(~self.valid[..., None], torch.nan).float()


class Adjustments(NamedTuple):
    """Bias and penalties of the ids they touch: see :mod:`specdec_kernels.ops.processing`."""

    ids: Tensor
    counts: Tensor
    bias: Tensor
    penalties: Tensor

    @staticmethod
    def of(
        ids: Tensor | None, counts: Tensor | None, bias: Tensor | None, penalties: Tensor | None
    ) -> Adjustments | None:
        """From the arguments of an operator."""
        if ids is None or counts is None or bias is None or penalties is None:
            return None
        return Adjustments(ids, counts, bias, penalties)


def processed(
    logits: Tensor, drafted: Tensor, before: Tensor, adjustments: Adjustments | None, bitmask: Tensor | None
) -> Tensor:
    """Logits ``[B, R, V]`` after bias, penalties and mask; row r counts the drafts ``[B, K]`` that ``before``
    ``[B, R, K]`` says come before it."""
    if adjustments is None and bitmask is None:
        return logits.double()
    x = logits.float()
    vocab = x.shape[-1]
    if adjustments is not None:
        ids = adjustments.ids.long()
        here = ids < vocab
        drawn = (drafted[:, :, None] == ids[:, None, :]).double()
        output = (before.double() @ drawn).long() + adjustments.counts[:, None, :, 1]
        seen = (output > 0) | (adjustments.counts[:, None, :, 0] > 0)
        index = ids.clamp(max=vocab - 1)[:, None, :].expand(*x.shape[:2], -1)
        repetition, presence, frequency = (p[:, None, None] for p in adjustments.penalties.unbind(-1))
        value = x.gather(-1, index) + adjustments.bias[:, None, :]
        value = torch.where(seen, torch.where(value > 0, value / repetition, value * repetition), value)
        value = torch.where(output > 0, value - (frequency * output + presence), value)
        # One column more takes the padding.
        padded = functional.pad(x, (0, 1))
        x = padded.scatter(-1, torch.where(here[:, None, :], index, vocab), value)[..., :vocab]
    if bitmask is not None:
        bits = bitmask[..., None] >> torch.arange(32, device=x.device) & 1
        x = x.masked_fill(bits.flatten(-2)[..., :vocab] == 0, -torch.inf)
    return x.double()


def processed_rows(logits: Tensor, adjustments: Adjustments | None, bitmask: Tensor | None) -> Tensor:
    """The same for rows ``[R, V]`` of requests of their own, with no drafts before them."""
    none = torch.empty((logits.shape[0], 0), dtype=torch.int64, device=logits.device)
    mask = None if bitmask is None else bitmask[:, None]
    return processed(logits[:, None], none, none[:, None], adjustments, mask)[:, 0]


def rows_of_target(logits: Tensor, target_to_draft: Tensor | None) -> Tensor:
    """Rows ``[..., Vd]`` of a drafter's vocabulary as rows ``[..., V]`` of its target's, -inf where it lacks the id."""
    if target_to_draft is None:
        return logits
    return logits[..., target_to_draft.clamp(min=0).long()].masked_fill(target_to_draft < 0, -torch.inf)


def rows_valid(logits: Tensor) -> Tensor:
    """No nan, no +inf, at least one finite logit: bool, one a row."""
    return ~logits.isnan().any(-1) & ~logits.isposinf().any(-1) & logits.isfinite().any(-1)


def largest_finite(logits: Tensor) -> Tensor:
    return logits.masked_fill(~logits.isfinite(), -torch.inf).argmax(-1)


def point_mass(tokens: Tensor, vocab: int) -> Tensor:
    return functional.one_hot(tokens, vocab).double()


def _cutoffs(logits: Tensor, scale: Tensor, sampling: Sampling) -> Tensor:
    """The smallest logit that top-k, then top-p, then min-p keep; -inf where there is no filter."""
    vocab = logits.shape[-1]
    few = (sampling.top_k > 0) & (sampling.top_k < vocab)
    filtered = few | (sampling.top_p < 1) | (sampling.min_p > 0)
    if not filtered.any():
        return torch.full_like(filtered, -torch.inf, dtype=torch.float64)
    ordered = logits.sort(-1, descending=True).values
    ratio = (scale[..., None] * (ordered - ordered[..., :1])).exp()
    count = torch.where(few, sampling.top_k, vocab)
    keep = ordered >= ordered.gather(-1, count[..., None] - 1)
    mass = ratio.masked_fill(~keep, 0.0)
    above = mass.cumsum(-1) - mass
    goal = sampling.top_p.double()[..., None] * mass.sum(-1, keepdim=True)
    keep &= (above < goal) | (sampling.top_p >= 1)[..., None]
    keep &= ratio >= sampling.min_p.double()[..., None]
    last = keep.sum(-1, keepdim=True).clamp(min=1) - 1
    return torch.where(filtered, ordered.gather(-1, last)[..., 0], -torch.inf)


def distributions(logits: Tensor, sampling: Sampling) -> Distributions:
    """Softmax of rows ``[..., V]`` after temperature and filters; the point mass on the largest logit when greedy."""
    greedy = sampling.scale.isinf()
    scale = torch.where(greedy, 1.0, sampling.scale.double())
    top = logits.amax(-1)
    steep = (scale * top).abs() >= STEEP
    cutoff = torch.where(greedy | steep, top, _cutoffs(logits, scale, sampling))
    scale = torch.where(steep, 0.0, scale)
    scaled = (scale[..., None] * logits).masked_fill(logits < cutoff[..., None], -torch.inf)
    logsumexp = scaled.logsumexp(-1)
    probs = (scaled - logsumexp[..., None]).exp()
    probs = torch.where(greedy[..., None], point_mass(logits.argmax(-1), logits.shape[-1]), probs)
    probs = probs.masked_fill(~rows_valid(logits)[..., None], torch.nan)
    return Distributions(probs, torch.where(greedy, torch.inf, scale), cutoff, logsumexp.masked_fill(greedy, 0.0))


def plain(logits: Tensor) -> Distributions:
    """Softmax of rows ``[..., V]`` as they are."""
    one = torch.ones(logits.shape[:-1], device=logits.device)
    return distributions(logits.double(), Sampling.plain(one))


def draft_distributions(logits: Tensor, stats: Tensor | None, temperature: Tensor, tokens: Tensor) -> Tensor:
    """The distributions ``[..., V]`` that ``tokens [...]`` were drawn from: softmax of the rows at a temperature
    ``[...]``, or by their scalars; greedily the point mass on the token; not finite there where they are not usable."""
    if stats is None:
        scale = scale_of(temperature)
        probs = distributions(logits.double(), Sampling.plain(scale)).probs
        return torch.where(scale[..., None].isinf(), point_mass(tokens, logits.shape[-1]), probs)
    scale, cutoff, logsumexp = (s[..., None] for s in stats.double().unbind(-1))
    probs = (scale * logits.double() - logsumexp).exp().masked_fill(logits < cutoff, 0.0)
    return torch.where(scale.isinf(), point_mass(tokens, logits.shape[-1]), probs)


def token_logprobs(probs: Tensor, tokens: Tensor) -> Tensor:
    """Of one token a row of ``[..., V]``, float32; nan where it is negative: where there is none."""
    chosen = probs.gather(-1, tokens.clamp(min=0)[..., None])[..., 0].log()
    return chosen.masked_fill(tokens < 0, torch.nan).float()


def _race(weights: Tensor, noise: Tensor) -> Tensor:
    """argmin of noise / weight over the positive weights, lowest index on ties."""
    return torch.where(weights > 0, noise / weights, torch.inf).argmin(-1)


def two_level_race(weights: Tensor, seed: Tensor, position: Tensor, purpose: int, row: Tensor) -> Tensor:
    """Draw from weights ``[R, V]``: a tile of ids first, then an id inside it."""
    tiles = functional.pad(weights, (0, -weights.shape[-1] % TILE)).unflatten(-1, (-1, TILE))
    tile_noise = exponentials(seed, position, purpose, Level.TILE, row, tiles.shape[1])
    tile = _race(tiles.sum(-1), tile_noise)
    inside = tiles[torch.arange(len(tile), device=tile.device), tile]
    token_noise = exponentials(seed, position, purpose, Level.TOKEN, row, TILE)
    return tile * TILE + _race(inside, token_noise)


def flat_race(weights: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """All ids ``[R, V]`` in one race, its noise keyed on the absolute position: the draw of the coupled rule."""
    noise = exponentials(seed, position, Purpose.COUPLED, Level.TOKEN, torch.zeros_like(seed), weights.shape[-1])
    return _race(weights, noise)
