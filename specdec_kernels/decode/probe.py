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
from specdec_kernels.decode.prompts import SourcePrompt
from specdec_kernels.decode.sources import encoder_inputs

Use = Literal["chains", "batches", "trees"]

#: Difference of rows of logits, relative to their spread, that rounding explains. Seen on a CPU, of right models:
#: 1e-6 to 1e-5 in float32 (SmolLM2-135M 3e-5; TF32 gets to 1e-3), up to 0.07 in bfloat16 and 0.03 in float16
#: (SmolLM2-135M; 12 layers of random weights of Llama, GPT-2, Gemma and OPT: 0.05 and 0.006). Of MPT, whose batches and
#: trees are wrong: 0.25 to 0.7 in float32.
ROUNDING = {torch.float32: 0.005, torch.bfloat16: 0.2, torch.float16: 0.06}

_WHAT_TO_DO: dict[Use, str] = {
    "chains": "it cannot be decoded here",
    "batches": "decode its prompts one at a time",
    "trees": "draft chains",
}

#: Uses of a model that were found right, with what they depend on.
_passed: WeakKeyDictionary[Any, set[tuple[Any, ...]]] = WeakKeyDictionary()

#: Starts a stream with prompts.
Begin = Callable[[Sequence[Sequence[int]]], Any]

#: Of a history alone: the request that it is, its ids, and the logits [R, V] of its last rows.
Rows = tuple[int, Sequence[int], Tensor]


@torch.inference_mode()
def probe(model: Any, use: Use, kind: str, begin: Begin, otherwise: str = "", source: Tensor | None = None) -> None:
    """Compare rows of a session with plain passes, unless that was done before.

    Args:
        model: a transformers model.
        use: how it is going to be used.
        kind: of session that ``begin`` makes.
        begin: makes a session for prompts, without this check.
        otherwise: what else can be done where they differ.
        source: of an encoder-decoder, if its encoder reads no ids: something that it does read.

    Raises:
        ValueError: they differ by more than rounding, or the model fails; with what to do about it.
    """
    done = _passed.setdefault(model, set())
    key = (use, kind, model_facts.attention(model), model.dtype, model.device)
    longest = min([LONGEST, *model_facts.unchanging_lengths(model)])
    if key in done or longest < _SHORTEST:
        return
    advice = _WHAT_TO_DO[use] + otherwise
    allowed = ROUNDING.get(model.dtype, max(ROUNDING.values()))
    try:
        tries = [_tried(model, use, begin, longest, seed, source) for seed in (0, 1)]
        if max(tries) > allowed:  # else the middle one of three would not be either
            tries.append(_tried(model, use, begin, longest, 2, source))
    except Exception as error:
        raise ValueError(f"model {type(model).__name__} cannot score {use}: {error}; {advice}") from error
    if (difference := sorted(tries)[1]) > allowed:
        raise ValueError(
            f"model {type(model).__name__} must score rows of {use} as a plain pass over the same ids does, but they "
            f"differ by {difference:.2g} of the logits' spread (rounding explains {allowed:g}): {advice}"
        )
    done.add(key)


#: Ids that are tried, all different; tokens of the longest history that is made of them where the model has so many
#: positions, and the fewest that tell anything. A row that looks at its column in place of its position is the further
#: off the more holes lie between them.
_IDS, LONGEST, _SHORTEST = 9, 40, 12


def _ids(model: Any, seed: int = 0) -> list[int]:
    """Ids that mean nothing special, all of them different where there are enough."""
    special = model_facts.special_tokens(model)
    size = model_facts.vocab_size(model)
    own = random.Random(seed)
    usable = [token for token in own.sample(range(size), min(size, _IDS + len(special))) if token not in special]
    return (usable * _IDS or [0] * _IDS)[:_IDS]


def _tried(model: Any, use: Use, begin: Begin, longest: int, seed: int, source: Tensor | None) -> float:
    """How far the rows of a trial are from plain passes at most."""
    ids = _ids(model, seed)
    sources = _sources(model, ids, source)

    def begin_with_sources(prompts: Sequence[Sequence[int]]) -> Any:
        return begin([_sourced(sources[slot], prompt) for slot, prompt in enumerate(prompts)])

    trial = _TRIALS[use](begin_with_sources, model, ids, longest)
    return max(_difference(model, _sourced(sources[slot], history), logits) for slot, history, logits in trial)


def _sources(model: Any, ids: Sequence[int], source: Tensor | None) -> Sequence[Any]:
    """What two requests are about, of different lengths where there are ids; nothing where there is no encoder."""
    if not model_facts.is_encoder_decoder(model):
        return None, None
    if source is not None:
        return source, source.flip(-1)
    limit = model_facts.source_length(model) or _IDS
    return ids[: min(limit, _IDS // 2)], list(reversed(ids))[:limit]


def _sourced(source: Any, ids: Sequence[int]) -> Sequence[int]:
    return ids if source is None else SourcePrompt(source, ids)


def _difference(model: Any, ids: Sequence[int], logits: Tensor) -> float:
    """How far the logits [R, V] of the last rows are from a plain pass, relative to their spread.

    Of the row in the middle: rounding can send a token to another expert, which is a row or two, while a wrong history
    is wrong for all rows behind it."""
    if isinstance(ids, SourcePrompt):
        inputs = encoder_inputs(model, [ids.source])
        outputs = model(**inputs, decoder_input_ids=_rows(model, [ids]), use_cache=False)
    else:
        outputs = model(input_ids=_rows(model, [ids]), use_cache=False)
    plain = outputs.logits[0, -len(logits) :].float()
    spread = (plain - plain.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((logits.float() - plain).norm(dim=-1) / spread).median())


def _chains(begin: Begin, model: Any, ids: Sequence[int], longest: int) -> Iterator[Rows]:
    """Rows that are taken back, and what comes in their place."""
    start = longest // 2 - 4
    stream = begin([_taken(ids, 0, start + 1)])
    wrong = _taken(ids, start, 1) + _taken(ids, start + 3, longest - start - 1)
    yield 0, _taken(ids, 0, start) + wrong, stream.score(_rows(model, [wrong]), [len(wrong)]).logits[0]
    stream.commit([1])
    yield 0, _taken(ids, 0, start + 4), stream.score(_rows(model, [_taken(ids, start + 1, 3)]), [3]).logits[0]


def _batches(begin: Begin, model: Any, ids: Sequence[int], longest: int) -> Iterator[Rows]:
    """Histories of different lengths that keep different numbers of rows, one of which goes on alone."""
    first, short = (6, 0), longest // 3  # a hole that a row sees its own history behind
    stream = begin([_taken(ids, 6, short), _taken(ids, 0, longest - 6)])
    for kept in ([1, 3], [2, 1]):
        starts = list(stream.lengths)
        rows = [_taken(ids, own + start, 3) for own, start in zip(first, starts, strict=True)]
        scores = stream.score(_rows(model, rows), [3, 3]).logits
        for slot, (own, start) in enumerate(zip(first, starts, strict=True)):
            yield slot, _taken(ids, own, start + 3), scores[slot]
        stream.commit(kept)
    stream.select([0])
    start = stream.lengths[0]
    yield 0, _taken(ids, 6, start + 3), stream.score(_rows(model, [_taken(ids, 6 + start, 3)]), [3]).logits[0]


def _taken(ids: Sequence[int], start: int, count: int) -> list[int]:
    """So many ids from a place on, from the first again behind the last."""
    return [ids[index % len(ids)] for index in range(start, start + count)]


def _trees(begin: Begin, model: Any, ids: Sequence[int], longest: int) -> Iterator[Rows]:
    """A node with many children, the last of which is followed, and what comes behind it."""
    stream = begin([ids[:3]])
    children = longest - 6
    nodes = [ids[2], *_taken(ids, 3, children), ids[5], ids[6]]
    parents = [-1, *[0] * children, 1, children]
    tree = torch.tensor([parents], dtype=torch.int64, device=model.device)
    scores = stream.score_tree(_rows(model, [nodes]), tree).logits[0]
    for path in ([0, 1, children + 1], [0, children, children + 2]):
        yield 0, [*ids[:2], *(nodes[node] for node in path)], scores[path]
    stream.commit_path([path])
    history = [*ids[:2], *(nodes[node] for node in path)]
    yield 0, [*history, *ids[7:9]], stream.score(_rows(model, [ids[7:9]]), [2]).logits[0]


_TRIALS: dict[Use, Callable[..., Iterator[Rows]]] = {"chains": _chains, "batches": _batches, "trees": _trees}


def _rows(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([list(row) for row in rows], dtype=torch.int64, device=model.device)
