"""The torch operators: one schema in Python, its fake beside it, the reference as the fallback of every device.

Compiled backends only add implementations for a device (`backends.py`), so the dispatcher is the if/else ladder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from specdec_kernels import reference

_SAMPLING = "Tensor? sampling, float temperature, int top_k, float top_p, float min_p"
#: ``target_to_draft``: see :class:`specdec_kernels.DraftVocabulary`; the rows of logits beside it have its draft ids.
_DRAFT = (
    "Tensor? draft_logits, Tensor? draft_stats, Tensor? target_to_draft, Tensor? draft_temperatures, "
    "float draft_temperature"
)
_ROWS = "Tensor logits, Tensor? target_to_draft, Tensor seed, Tensor position, Tensor row"
_PROCESSING = "Tensor? bitmask, Tensor? edit_ids, Tensor? edit_counts, Tensor? edit_bias, Tensor? penalties"

_SCHEMAS = {
    "verify_chain": (
        f"(Tensor target_logits, Tensor draft_tokens, {_DRAFT}, Tensor seed, "
        f"Tensor position, Tensor? num_draft, Tensor? cu_rows, {_SAMPLING}, {_PROCESSING}, int rule, bool logprobs, "
        "bool independent, Tensor(a!)? workspace) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "verify_tree": (
        f"(Tensor target_logits, Tensor draft_tokens, Tensor parents, {_DRAFT}, "
        f"Tensor seed, Tensor position, {_SAMPLING}, {_PROCESSING}, int rule, bool replacement, bool logprobs) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "sample": (f"({_ROWS}, {_SAMPLING}, {_PROCESSING}, bool coupled) -> (Tensor, Tensor, Tensor)"),
    "sample_children": (f"({_ROWS}, {_SAMPLING}, {_PROCESSING}, int count, int how) -> (Tensor, Tensor, Tensor)"),
    "tree_mask": "(Tensor(a!) out, Tensor parents, Tensor? context_lens, int format) -> ()",
    "compact_kv": "(Tensor(a!)[] caches, Tensor nodes, Tensor start, Tensor? page_table) -> ()",
    "tree_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor packed, Tensor context_lens, float scale) -> Tensor"
    ),
    "noise_words": "(Tensor seed, Tensor position, int tag, int first, int counters) -> Tensor",
}


def _made(like: Tensor, *results: tuple[tuple[int, ...], torch.dtype]) -> tuple[Tensor, ...]:
    """Results of these shapes and dtypes."""
    return tuple(like.new_empty(shape, dtype=dtype) for shape, dtype in results)


def _fake_verify_chain(target_logits: Tensor, draft_tokens: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _rule, logprobs, _independent, _workspace = rest[-4:]
    batch, rows = draft_tokens.shape[0], draft_tokens.shape[1] + 1
    scores = (batch, rows) if logprobs else (0,)
    return _made(
        target_logits, ((batch, rows), torch.int64), ((batch,), torch.int32), ((batch,), torch.bool),
        ((batch, 2), torch.int32), (scores, torch.float32), (scores, torch.float32),
    )  # fmt: skip


def _fake_verify_tree(target_logits: Tensor, draft_tokens: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shape = tuple(draft_tokens.shape)
    scores = shape if rest[-1] else (0,)
    return _made(
        target_logits, (shape, torch.int64), (shape, torch.int32), (shape[:1], torch.int32), (shape[:1], torch.bool),
        (scores, torch.float32), (scores, torch.float32),
    )  # fmt: skip


def _fake_sample(logits: Tensor, *_: object) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    return _made(logits, ((rows,), torch.int64), ((rows,), torch.float32), ((rows, 3), torch.float32))


def _fake_sample_children(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    rows, count = logits.shape[0], rest[-2]
    return _made(logits, ((rows, count), torch.int64), ((rows, count), torch.float32), ((rows, 3), torch.float32))


def _fake_noise_words(seed: Tensor, position: Tensor, tag: int, first: int, counters: int) -> Tensor:
    return seed.new_empty((seed.shape[0], 4 * counters))


def _fake_tree_mask(out: Tensor, parents: Tensor, context_lens: Tensor | None, format: int) -> None:
    """Fills what it was given."""


def _fake_compact_kv(caches: list[Tensor], nodes: Tensor, start: Tensor, page_table: Tensor | None) -> None:
    """Moves what it was given."""


def _fake_tree_attention(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query)


_FAKES: dict[str, Callable[..., Any]] = {
    "verify_chain": _fake_verify_chain,
    "sample": _fake_sample,
    "sample_children": _fake_sample_children,
    "verify_tree": _fake_verify_tree,
    "tree_mask": _fake_tree_mask,
    "compact_kv": _fake_compact_kv,
    "tree_attention": _fake_tree_attention,
    "noise_words": _fake_noise_words,
}


def define(namespace: str, ops: Iterable[str]) -> torch.library.Library:
    """Operators with their fakes; they are there as long as what is returned."""
    library = torch.library.Library(namespace, "DEF")
    for op in ops:
        library.define(op + _SCHEMAS[op])
        torch.library.register_fake(f"{namespace}::{op}", _FAKES[op], lib=library)
    return library


LIBRARY = define("specdec", _SCHEMAS)
for _name in _SCHEMAS:
    LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
