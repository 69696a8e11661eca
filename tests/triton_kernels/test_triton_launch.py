"""Several programs a row: what they find does not depend on how many there are, nor on the order they run in."""

from __future__ import annotations

import importlib
import random
from itertools import product

import pytest
import torch
from forms import some

from specdec_kernels import (
    DraftVocabulary,
    sample,
    sample_children,
    tree_attention,
    tree_mask,
    verify_chain,
    verify_tree,
)
from specdec_kernels.ops import BACKENDS

pytestmark = pytest.mark.skipif(BACKENDS["triton"].device == "cuda", reason="the interpreter's order is set here")

VOCAB = 1500


@pytest.fixture
def launched(monkeypatch):
    """Sets programs a row, and the order in which they run."""
    from triton.runtime import interpreter

    from specdec_kernels.triton_kernels import launch

    modules = [importlib.import_module(f"{launch.__package__}.{name}") for name in ("sample", "verify")]
    builder = type(interpreter.interpreter_builder)
    in_order = builder.set_grid_idx

    def launch_as(slices: int, shuffled: bool, tiles: int = 2) -> None:
        rng = random.Random(slices)
        order: dict[int, list[int]] = {}

        def set_grid_idx(self, x, y, z):
            size = self.grid_dim[0]
            if x == 0:
                order[size] = rng.sample(range(size), size) if shuffled else list(range(size))
            in_order(self, order[size][x], y, z)

        monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
        monkeypatch.setattr(module("rows"), "VISITED", type(module("rows").VISITED)(tiles))
        for each in modules:
            monkeypatch.setattr(each, "slices_of", lambda *_: slices)
            # Blocks of two tiles, so that there are slices to take.
            monkeypatch.setattr(
                each,
                "config_for",
                lambda vocab, *_, **__: launch.LaunchConfig(tiles, launch.entries(vocab), 1),
            )

    return launch_as


def batch(kind: str, vocab: int = VOCAB) -> tuple[tuple[torch.Tensor | None, ...], dict[str, torch.Tensor]]:
    """Four requests of up to three drafts: some rejected early, one with a row that is not valid."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(4, 4, vocab, generator=generator) * 3
    draft = target[:, :3] + torch.randn(4, 3, vocab, generator=generator) * 0.5
    keys = {"seed": torch.arange(4) + 11, "position": torch.arange(4) * 7}
    vocabulary = None
    if kind == "reduced":
        vocabulary = DraftVocabulary(torch.randperm(vocab, generator=generator)[:400], vocab)
        draft = draft[..., vocabulary.draft_to_target]
    drawn = [
        sample(draft[:, i], **keys, row=i, temperature=0.8, draft_to_target=vocabulary, backend="reference")
        for i in range(3)
    ]
    tokens = torch.stack([d.tokens for d in drawn], 1)
    tokens[3, 2] = -1
    target[2, 1, 5] = torch.nan
    stats = torch.stack([d.stats for d in drawn], 1)
    given = {
        "point mass": (None, None),
        "dense": (draft, None),
        "statistics": (draft, stats),
        "reduced": (draft, None),
    }[kind]
    heat = {"draft_temperature": 0.8} if kind in ("dense", "reduced") else {}
    return (target, tokens, *given), {**keys, **heat, "draft_to_target": vocabulary}


OPTIONS = {
    "plain": {"temperature": 0.8},
    "greedy": {"temperature": torch.tensor([0.0, 0.8, 0.8, 0.0])},
    "filtered": {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
}


#: In how many slices each row is measured, and whether in any order.
LAUNCHES = some([(1, False), (6, True)], [(1, False), (3, True), (6, True)])

#: Each rule with each kind of drafts it reads, each option with one of them.
CHAINS = [
    ("token", "statistics", "plain"), ("token", "dense", "plain"), ("block", "dense", "plain"),
    ("coupled", "point mass", "plain"), ("token", "statistics", "greedy"), ("block", "dense", "filtered"),
    ("block", "reduced", "plain"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "kind", "options"), CHAINS)
def test_tokens_do_not_depend_on_the_launch(launched, rule, kind, options):
    positional, keys = batch(kind)
    arguments = {**keys, **OPTIONS[options], "rule": rule, "logprobs": True}
    expected = verify_chain(*positional, **arguments, backend="reference")
    found = []
    for slices, shuffled in LAUNCHES:
        launched(slices, shuffled)
        found.append(verify_chain(*positional, **arguments, backend="triton"))
    for each in found:
        assert torch.equal(each.tokens, expected.tokens)
        assert torch.equal(each.valid, expected.valid)
        for of_first, of_this in zip(found[0], each, strict=True):
            assert torch.equal(of_first.nan_to_num(7.0), of_this.nan_to_num(7.0)), "not the same bits"


def test_draws_do_not_depend_on_the_launch(launched):
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    keys = {"seed": torch.arange(3), "position": torch.arange(3) + 5}
    for draw in (sample, lambda *given, **named: sample_children(*given, 3, method="without_replacement", **named)):
        found = []
        for slices, shuffled in ((1, False), (4, True), (6, True)):
            launched(slices, shuffled)
            found.append(draw(logits, **keys, top_p=0.9, backend="triton"))
        for each in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], each, strict=True))


def measured_rows(kernels, monkeypatch):
    """The rows that a module's kernels measure, as they do."""
    measured, measure = [], kernels.measure

    def counting(rows, i, *rest):
        measured.append(int(i.handle.data[0]))
        return measure(rows, i, *rest)

    monkeypatch.setattr(kernels, "measure", counting)
    return measured


def test_rows_behind_a_rejection_are_not_read(launched, monkeypatch):
    measured = measured_rows(module("verify"), monkeypatch)
    target = torch.zeros(2, 5, VOCAB)
    target[:, :, 7] = 30.0
    tokens = torch.full((2, 4), 7)
    tokens[0, 1] = 9
    launched(3, False)
    verified = verify_chain(target, tokens, seed=torch.arange(2), position=torch.arange(2), backend="triton")
    assert verified.num_accepted.tolist() == [1, 4]
    assert sorted(measured) == sorted([0, 1] * 3 + [0, 1, 2, 3, 4] * 3)
    measured.clear()
    verify_chain(
        target, tokens, seed=torch.arange(2), position=torch.arange(2), backend="triton", count_independent=True
    )
    assert len(measured) == 30, "the counters of independent acceptance need every row"


def module(name: str):
    return importlib.import_module(f"specdec_kernels.triton_kernels.{name}")


def test_nodes_that_the_path_passes_by_are_not_read(launched, monkeypatch):
    measured = measured_rows(module("verify"), monkeypatch)
    target = torch.zeros(1, 7, VOCAB)
    target[:, :, 7] = 30.0
    parents, tokens = torch.tensor([[-1, 0, 0, 1, 1, 2, 3]]), torch.tensor([[0, 9, 7, 7, 7, 7, 7]])
    launched(3, False)
    verified = verify_tree(target, tokens, parents, seed=torch.arange(1), position=torch.arange(1), backend="triton")
    assert verified.nodes.tolist() == [[0, 2, 5, -1, -1, -1, -1]]
    # Node 1 may have been on the path until node 0 was judged, as it was before any program of node 1 began.
    assert measured == [0] * 3 + [2] * 3 + [5] * 3


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("kind", ["point mass", "dense", "statistics"])
def test_a_residual_is_drawn_from_a_few_tiles(launched, monkeypatch, rule, kind):
    """What its row's own tiles bound; with a look at all of them, the same tokens."""
    residual = module("residual")
    visits = []
    real = residual.residuals

    def counting(*given):
        visits.append(given[6].shape)  # ids
        return real(*given)

    launched(1, False)
    positional, keys = batch(kind)
    keys["seed"] += 40 if kind == "statistics" else 0
    given = {**keys, "temperature": 0.5, "rule": rule, "backend": "triton"}
    monkeypatch.setattr(residual, "residuals", counting)
    few = verify_chain(*positional, **given)
    drawn = visits.count((128,))
    assert drawn
    if rule == "token":
        assert len(visits) - drawn < 4 * 3  # of 6 pairs of tiles a request
    launched(1, False, tiles=16)
    visits.clear()
    all_tiles = verify_chain(*positional, **given)
    assert (16, 128) in visits
    for one, other in zip(few, all_tiles, strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


FILTERS = {
    "top_k": {"top_k": 4},
    "top_k of all tiles": {"top_k": 400},
    "top_k and top_p": {"top_k": 4, "top_p": 0.6},
    "top_p": {"top_p": 0.3},
    "min_p": {"min_p": 0.2},
}


@pytest.mark.parametrize("filters", FILTERS)
def test_filters_look_at_tiles_that_have_what_they_keep(launched, monkeypatch, filters):
    """One tile of three has large logits: those are all that is looked at twice, unless more is kept."""
    filters_module = module("filters")
    looked: set[int] = set()
    real = filters_module.load_logits

    def counting(rows, i, ids):
        first = ids.handle.data[:, 0]
        looked.update((first[first < VOCAB] // 128).tolist())  # a group without tiles has none of the ids
        return real(rows, i, ids)

    monkeypatch.setattr(filters_module, "load_logits", counting)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2)).half().float()  # some are equal
    large = (torch.arange(VOCAB) // 128) % 3 == 1
    logits[:, large] += 3.5
    named = {"seed": torch.tensor([5]), "position": torch.tensor([9]), "temperature": 0.5, **FILTERS[filters]}
    expected = sample(logits, **named, backend="reference")
    launched(1, False)
    found = sample(logits, **named, backend="triton")
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.stats[:, 1], expected.stats[:, 1]), "the cutoff is one of the logits"
    torch.testing.assert_close(found.stats, expected.stats)
    assert looked
    if filters != "top_k of all tiles":
        assert looked <= {1, 4, 7, 10}


def test_counters_are_zeroed_again(launched, monkeypatch):
    counters = torch.zeros(64, dtype=torch.int32)
    scratch = module("launch").scratch
    monkeypatch.setattr(module("verify"), "scratch", lambda *sizes: (counters, *scratch(*sizes)[1:]))
    positional, keys = batch("dense")
    launched(3, True)
    for rule in ("token", "block", "token", "coupled"):
        expected = verify_chain(*positional, **keys, rule=rule, backend="reference")
        assert torch.equal(verify_chain(*positional, **keys, rule=rule, backend="triton").tokens, expected.tokens)
        assert not counters.any()
    target, tokens, draft, _ = positional
    tree = torch.cat([tokens[:, :1], tokens.clamp(min=0)], 1), torch.tensor([[-1, 0, 0, 1]] * 4)
    drafted = {"draft_logits": torch.cat([draft, draft[:, :1]], 1), "siblings": "iid"}
    for rule in ("traversal", "walk", "recursive"):
        given = {**keys, "rule": rule, **({"draft_temperature": None} if rule == "walk" else drafted)}
        expected = verify_tree(target, *tree, **given, backend="reference")
        assert torch.equal(verify_tree(target, *tree, **given, backend="triton").tokens, expected.tokens)
        assert not counters.any()


#: Filters are found by the same functions as those of chains.
TREES = [
    ("walk", "plain"), ("recursive", "plain"), ("traversal", "plain"), ("coupled", "plain"), ("recursive", "greedy"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "options"), TREES)
def test_trees_do_not_depend_on_the_launch(launched, rule, options):
    """Masses are summed by programs that wait for others, and begin behind those in any order."""
    (target, tokens, draft, _), keys = batch("dense")
    tokens = torch.cat([torch.zeros(4, 1, dtype=torch.int64), tokens], 1)
    parents = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2], [-1, 0, 0, -1], [-1, -1, -1, -1]])
    drafts = torch.cat([draft, draft[:, :1]], 1)
    drafted = {} if rule in ("walk", "coupled") else {"draft_logits": drafts, "siblings": "without_replacement"}
    arguments = {**keys, **drafted, **OPTIONS[options], "rule": rule, "logprobs": True}
    expected = verify_tree(target, tokens, parents, **arguments, backend="reference")
    found = []
    for slices, shuffled in LAUNCHES:
        launched(slices, shuffled)
        found.append(verify_tree(target, tokens, parents, **arguments, backend="triton"))
    for each in found:
        assert torch.equal(each.tokens, expected.tokens)
        assert torch.equal(each.nodes, expected.nodes)
        for of_first, of_this in zip(found[0], each, strict=True):
            assert torch.equal(of_first.nan_to_num(7.0), of_this.nan_to_num(7.0)), "not the same bits"


@pytest.mark.parametrize("processors", [1, 6, 1000])
def test_attention_of_a_context_that_is_shared(monkeypatch, processors):
    """No splits, some, and as many as there may be; a context that fills them, and trees that lie over an end."""
    attention = module("attention")
    given = []
    real = attention.context_splits
    monkeypatch.setattr(attention.launch, "processors_of", lambda *_: processors)
    monkeypatch.setattr(attention, "context_splits", lambda *x: given.append(real(*x)) or given[-1])
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 5, 24, generator=generator)
    key, value = torch.randn(2, 3, 2, 837, 24, generator=generator)
    packed = tree_mask(torch.tensor([[-1, 0, 0, 1, 3], [-1, 0, -1, -1, -1], [-1, 0, 1, 2, 3]]), "packed")
    arguments = query, key, value, packed, torch.tensor([832, 319, 447])
    expected = tree_attention(*arguments, backend="reference")
    torch.testing.assert_close(tree_attention(*arguments, backend="triton"), expected, rtol=0, atol=1e-5)
    assert given[0][0] == {1: 1, 6: 2, 1000: 3}[processors]


@pytest.mark.parametrize("length", [36, 1 << 40])
def test_attention_reads_nothing_behind_the_cache(length):
    """Lengths are not looked at on a GPU, where a wrong one has to cost no more than its own rows."""
    memory = torch.full((1, 1, 200, 16), torch.nan)
    memory[:, :, :40] = 0.5
    cache, query = memory[:, :, :40], torch.ones(1, 1, 5, 16)
    packed = tree_mask(torch.tensor([[-1, 0, 1, 2, 3]]), "packed")
    attend = BACKENDS["triton"].functions["tree_attention"]
    assert torch.equal(attend(query, cache, cache, packed, torch.tensor([length]), 0.1), query * 0.5)


def test_launches_are_chosen_by_pure_functions():
    from specdec_kernels.triton_kernels.attention import AttentionConfig, attention_config, context_splits
    from specdec_kernels.triton_kernels.launch import LaunchConfig, Multiprocessor, launch_config, slices

    assert launch_config(128_256, "cuda", 64, large=True) == LaunchConfig(64, 1024, 8, 255)
    assert launch_config(100, "cuda", 64, large=False) == LaunchConfig(16, 16, 8, 128)
    assert launch_config(128_256, "hip", 16, large=True).named == {"ENTRIES": 1024, "TILES": 16, "num_warps": 8}
    assert launch_config(128_256, "interpreter", 64, large=False).tiles == 1024
    # Rows, blocks of a row, multiprocessors.
    assert slices(5, 64, 132) == 64  # one request: as many as there are blocks
    assert slices(320, 64, 132) == 2
    assert slices(4352, 64, 132) == 1
    # 64 nodes of 4 heads a key head: rows in all, elements of a head, their bytes.
    h200, l40, mi300 = (Multiprocessor(*x) for x in ((232_448, True), (101_376, False), (65_536, False)))
    assert attention_config(256, 128, 2, h200) == AttentionConfig(ROWS=128, KEYS=128, STAGES=2, num_warps=8)
    assert attention_config(64, 128, 2, h200) == AttentionConfig(ROWS=64, KEYS=64, STAGES=3, num_warps=4)
    assert attention_config(256, 256, 2, h200) == AttentionConfig(ROWS=64, KEYS=32, STAGES=3, num_warps=8)
    assert attention_config(256, 128, 2, l40) == AttentionConfig(ROWS=64, KEYS=64, STAGES=2, num_warps=8)
    assert attention_config(256, 512, 2, l40) == AttentionConfig(ROWS=32, KEYS=32, STAGES=1, num_warps=4)
    assert attention_config(256, 512, 4, l40) == AttentionConfig(ROWS=16, KEYS=32, STAGES=1, num_warps=4)
    assert attention_config(5, 128, 4, mi300) == AttentionConfig(ROWS=16, KEYS=32, STAGES=1, num_warps=4)
    for rows, wide, element, gpu in product((5, 64, 65, 256), (16, 64, 128, 256), (2, 4), (h200, l40)):
        config = attention_config(rows, wide, element, gpu)
        assert (config.ROWS + 2 * config.KEYS * config.STAGES) * wide * element <= gpu.shared
    # Tokens, keys at a time, programs without splits, multiprocessors.
    assert context_splits(4096, 128, 16 * 8 * 2, 132) == (1, 4096)
    assert context_splits(2048, 64, 8, 132) == (8, 256)
    assert context_splits(0, 64, 8, 132) == (1, 0)
