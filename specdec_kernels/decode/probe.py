"""Whether a model scores rows as the loop scores them: some rows, compared with plain passes over the same ids.

A model may look at the column where the position is meant, forget what was taken back, or take a mask for something
else, and its text is wrong without a sign of it. So each kind of use is tried once a model: chains (rows taken back), a
batch (histories of different lengths, with holes between their rows) and trees (rows that do not see their neighbours).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from specdec_kernels.decode import model_facts

Use = Literal["chains", "batches", "trees"]

#: Difference of two rows of logits, relative to their spread, that rounding explains; measured on models of random
#: weights: float32 1e-6 to 1e-4 (TF32 1e-3), bfloat16 up to 0.05, float16 up to 0.01. A row that attends to a wrong
#: token differs by 0.1 to 1.4.
ROUNDING = {torch.float32: 0.005, torch.bfloat16: 0.15, torch.float16: 0.04}

_WHAT_TO_DO: dict[Use, str] = {
    "chains": "it cannot be decoded here",
    "batches": "decode its prompts one at a time",
    "trees": "draft chains",
}

#: Uses of a model that were found right, with what they depend on.
_passed: WeakKeyDictionary[Any, set[tuple[Any, ...]]] = WeakKeyDictionary()

#: Starts a stream with prompts.
Begin = Callable[[Sequence[Sequence[int]]], Any]

#: Of a history alone: its ids, and the logits [R, V] of its last rows.
Rows = tuple[Sequence[int], Tensor]


@torch.inference_mode()
def probe(model: Any, use: Use, begin: Begin) -> None:
    """Compare rows of a session with plain passes, unless that was done before.

    Args:
        model: a transformers model.
        use: how it is going to be used.
        begin: makes a session for prompts, without this check.

    Raises:
        ValueError: they differ by more than rounding, or the model fails; with what to do about it.
    """
    done = _passed.setdefault(model, set())
    key = (use, getattr(model.config, "_attn_implementation", None), model.dtype, model.device)
    limit = model_facts.context_length(model)
    if key in done or (limit is not None and limit < _LONGEST):
        return
    advice = f"{_WHAT_TO_DO[use]}, or switch this check off with TransformersTarget(model, check=False)"
    difference, computed = 0.0, model.dtype
    try:
        for ids, logits in _TRIALS[use](begin, model, _ids(model)):
            difference, computed = max(difference, _difference(model, ids, logits)), logits.dtype
    except Exception as error:
        raise ValueError(f"model {type(model).__name__} cannot score {use}: {error}; {advice}") from error
    allowed = max(ROUNDING.get(dtype, max(ROUNDING.values())) for dtype in (model.dtype, computed))
    if difference > allowed:
        raise ValueError(
            f"model {type(model).__name__} must score rows of {use} as a plain pass over the same ids does, but they "
            f"differ by {difference:.2g} of the logits' spread (rounding explains {allowed:g}): {advice}"
        )
    done.add(key)


#: Ids that are tried, and tokens of the longest history that is made of them.
_IDS, _LONGEST = 9, 10


def _ids(model: Any) -> list[int]:
    """Ids that mean nothing special, all of them different where there are enough."""
    special = model_facts.special_tokens(model)
    size = model_facts.vocab_size(model)
    own = random.Random(0)
    usable = [token for token in own.sample(range(size), min(size, _IDS + len(special))) if token not in special]
    return (usable * _IDS or [0] * _IDS)[:_IDS]


def _difference(model: Any, ids: Sequence[int], logits: Tensor) -> float:
    """How far the logits [R, V] of the last rows are from a plain pass, relative to their spread; of the worst row."""
    tokens = torch.tensor([list(ids)], dtype=torch.int64, device=model.device)
    plain = model(input_ids=tokens, use_cache=False).logits[0, -len(logits) :].float()
    spread = (plain - plain.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((logits.float() - plain).norm(dim=-1) / spread).max())


def _chains(begin: Begin, model: Any, ids: Sequence[int]) -> Iterator[Rows]:
    """Rows that are taken back, and what comes in their place."""
    stream = begin([ids[:3]])
    wrong = [ids[2], ids[7], ids[8]]
    yield [*ids[:2], *wrong], stream.score(_rows(model, [wrong]), [3]).logits[0]
    stream.commit([1])
    yield ids[:6], stream.score(_rows(model, [ids[3:6]]), [3]).logits[0]


def _batches(begin: Begin, model: Any, ids: Sequence[int]) -> Iterator[Rows]:
    """Histories of different lengths that keep different numbers of rows, one of which goes on alone."""
    short, long = ids[6:], ids
    stream = begin([short[:1], long[:5]])
    for kept in ([1, 3], [2, 1]):
        starts = [stream.lengths[0], stream.lengths[1]]
        rows = [_continued(history, start, 3) for history, start in zip((short, long), starts, strict=True)]
        scores = stream.score(_rows(model, rows), [3, 3]).logits
        for slot, (history, start) in enumerate(zip((short, long), starts, strict=True)):
            yield [*history[:start], *rows[slot]], scores[slot]
        stream.commit(kept)
    stream.select([0])
    start = stream.lengths[0]
    row = _continued(short, start, 1)
    yield [*short[:start], *row], stream.score(_rows(model, [row]), [1]).logits[0]


def _continued(history: Sequence[int], start: int, count: int) -> list[int]:
    """Ids of a history from a place on, from its beginning again behind its end."""
    return [history[index % len(history)] for index in range(start, start + count)]


def _trees(begin: Begin, model: Any, ids: Sequence[int]) -> Iterator[Rows]:
    """A node with two children, the second of which is followed, and what comes behind it."""
    stream = begin([ids[:3]])
    nodes, parents = [ids[2], ids[3], ids[4], ids[5], ids[6]], [-1, 0, 0, 2, 1]
    tree = torch.tensor([parents], dtype=torch.int64, device=model.device)
    scores = stream.score_tree(_rows(model, [nodes]), tree).logits[0]
    for path in ([0, 2, 3], [0, 1, 4]):
        yield [*ids[:2], *(nodes[node] for node in path)], scores[path]
    stream.commit_path([[0, 2, 3]])
    history = [*ids[:3], ids[4], ids[5]]
    yield [*history, *ids[7:9]], stream.score(_rows(model, [ids[7:9]]), [2]).logits[0]


_TRIALS: dict[Use, Callable[..., Iterator[Rows]]] = {"chains": _chains, "batches": _batches, "trees": _trees}


def _rows(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([list(row) for row in rows], dtype=torch.int64, device=model.device)
