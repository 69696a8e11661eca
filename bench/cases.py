"""Cases as data, with the bytes each has to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec_kernels import sample
from specdec_kernels.ops import RuleName

TEMPERATURE = 0.7
FILTERS = {"top_k": 50, "top_p": 0.9}
#: Noise of the draft's logits on the target's: two to four of eight drafts are accepted.
DRAFT_NOISE = 0.45
#: Buffers are rotated: between two uses of a byte, this much is read, three times the last-level cache of 32 MiB that
#: this was written on. (Flushing the cache instead would evict Python and the thread pool with it.)
COLD_BYTES = 96 << 20
MOST_BUFFERS = 128


@dataclass(frozen=True)
class Case:
    """One shape. ``kind``: statistics (handed over), dense, point mass, or greedy."""

    vocab: int
    num_draft: int
    batch: int
    dtype: str
    kind: str
    rule: RuleName = "token"
    filtered: bool = False

    @property
    def name(self) -> str:
        """A line of the table."""
        extras = (" block" if self.rule == "block" else "") + (" filtered" if self.filtered else "")
        return f"V={self.vocab} K={self.num_draft} B={self.batch} {self.dtype} {self.kind}{extras}"

    @property
    def plain(self) -> bool:
        """The token rule without filters, which the others are compared with."""
        return self.rule == "token" and not self.filtered

    @property
    def filters(self) -> dict[str, Any]:
        """Of target and draft."""
        return FILTERS if self.filtered else {}

    def bytes_read(self, inputs: Inputs) -> int:
        """Target rows up to the one that emits (all of them under the block rule), and draft rows where their logsumexp
        has to be found."""
        return self.vocab * inputs.target.element_size() * int(inputs.target_rows.sum() + inputs.draft_rows.sum())


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, and the rows it has to read of each request."""

    target: Tensor
    tokens: Tensor
    draft: Tensor
    stats: Tensor
    seed: Tensor
    position: Tensor
    target_rows: Tensor
    draft_rows: Tensor


def cases(quick: bool) -> Iterator[Case]:
    """The grid; point masses and greedy only where the other kinds are looked at closest."""
    for vocab in (128_256,) if quick else (32_000, 128_256, 151_936):
        for num_draft in (8,) if quick else (4, 8):
            for batch in (1, 8) if quick else (1, 8, 32):
                for dtype in ("bfloat16", "float32"):
                    close = vocab == 128_256 and num_draft == 8
                    for kind in ("statistics", "dense", "point mass", "greedy") if close else ("statistics",):
                        yield Case(vocab, num_draft, batch, dtype, kind)
    for dtype in ("bfloat16", "float32"):
        yield Case(128_256, 4, 8, dtype, "statistics", filtered=True)
        yield Case(128_256, 4, 8, dtype, "statistics", rule="block")


def inputs(
    case: Case, accepted: Callable[[Inputs], Tensor], device: str = "cpu", cold_bytes: int = COLD_BYTES,
    most_buffers: int = MOST_BUFFERS,
) -> list[Inputs]:  # fmt: skip
    """Enough buffers to be cold; ``accepted(inputs)`` says how many drafts each request of them keeps."""
    dtype = getattr(torch, case.dtype)
    made: list[Inputs] = []
    read = 0
    while read < cold_bytes and len(made) < most_buffers:
        index = len(made)
        generator = torch.Generator(device).manual_seed(index)
        on: dict[str, Any] = {"generator": generator, "device": device}
        target = torch.randn(case.batch, case.num_draft + 1, case.vocab, **on).mul_(3).to(dtype)
        noise = torch.randn(case.batch, case.num_draft, case.vocab, **on).mul_(DRAFT_NOISE)
        draft = noise.add_(target[:, : case.num_draft]).to(dtype)
        seed = torch.randint(0, 2**60, (case.batch,), **on)
        position = torch.full((case.batch,), index, device=device)
        drawn = sample(
            draft.flatten(0, 1),
            seed=seed.repeat_interleave(case.num_draft),
            position=position.repeat_interleave(case.num_draft),
            row=torch.arange(case.num_draft, device=device).repeat(case.batch),
            temperature=TEMPERATURE if case.kind == "statistics" else 1.0,
            **case.filters,
        )
        tokens = drawn.tokens.reshape(case.batch, case.num_draft)
        if case.kind == "greedy":
            agree = torch.rand(tokens.shape, **on) < 0.7
            tokens = torch.where(agree, target[:, : case.num_draft].argmax(-1), tokens)
        unread = torch.zeros_like(seed)
        stats = drawn.stats.reshape(case.batch, case.num_draft, 3)
        one = Inputs(target, tokens, draft, stats, seed, position, unread, unread)
        kept = accepted(one) if case.rule == "token" else torch.full_like(seed, case.num_draft)
        draft_rows = (kept + 1).clamp(max=case.num_draft) if case.kind == "dense" else unread
        made.append(Inputs(target, tokens, draft, stats, seed, position, kept + 1, draft_rows))
        read += case.bytes_read(made[-1])
    return made
