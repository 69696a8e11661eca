"""The torch operators: the reference is their schema and the fallback of every device, their fakes stand here.

Compiled backends only add implementations for a device (`ops/backends.py`), so the dispatcher is the if/else ladder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from specdec_kernels import reference

#: Operators whose kernels on a GPU keep scratch from call to call.
_WITH_SCRATCH = ("verify_chain", "verify_tree", "sample", "sample_children")
#: What operators write to.
_WRITTEN = {"verify_chain": ("workspace",), "tree_mask": ("out",), "compact_kv": ("caches",)}


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


def _fake_draw(logits: Tensor, *count: int) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    return _made(logits, ((rows, *count), torch.int64), ((rows, *count), torch.float32), ((rows, 3), torch.float32))


_FAKES: dict[str, Callable[..., Any]] = {
    "verify_chain": _fake_verify_chain,
    "verify_tree": _fake_verify_tree,
    "sample": lambda logits, *_: _fake_draw(logits),
    "sample_children": lambda logits, *rest: _fake_draw(logits, rest[-2]),
    "tree_mask": lambda *_: None,
    "compact_kv": lambda *_: None,
    "tree_attention": lambda query, *_: torch.empty_like(query if query.stride(-1) == 1 else query.contiguous()),
    "noise_words": lambda seed, *rest: seed.new_empty((len(seed), 4 * rest[-1])),
}


def define(namespace: str, ops: Iterable[str]) -> torch.library.Library:
    """Operators with their fakes; they are there as long as what is returned."""
    library = torch.library.Library(namespace, "DEF")
    for op in ops:
        schema = torch.library.infer_schema(getattr(reference, op), mutates_args=_WRITTEN.get(op, ()))
        schema = schema.replace("SymInt", "int")  # numbers that are constants of a compiled graph
        # The graphs that torch.compile makes allow no memory that stays in their pools, where a first call gets it.
        library.define(op + schema, tags=(torch.Tag.cudagraph_unsafe,) if op in _WITH_SCRATCH else ())
        torch.library.register_fake(f"{namespace}::{op}", _FAKES[op], lib=library)
    return library


LIBRARY = define("specdec", _FAKES)
for _name in _FAKES:
    LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
