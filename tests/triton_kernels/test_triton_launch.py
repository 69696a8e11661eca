"""Several programs a row: what they find does not depend on how many there are, nor on the order they run in."""

from __future__ import annotations

import importlib
import random

import pytest
import torch

from specdec_kernels import sample, sample_children, verify_chain, verify_tree
from specdec_kernels.ops import BACKENDS

pytestmark = pytest.mark.skipif(BACKENDS["triton"].device == "cuda", reason="the interpreter's order is set here")

VOCAB = 1500


@pytest.fixture
def launched(monkeypatch):
    """Sets programs a row, and the order in which they run."""
    from triton.runtime import interpreter

    from specdec_kernels.triton_kernels import launch

    modules = [
        importlib.import_module(f"{launch.__package__}.{name}")
        for name in ("sample", "children", "verify", "tree_rules")
    ]
    builder = type(interpreter.interpreter_builder)
    in_order = builder.set_grid_idx

    def launch_as(slices: int, shuffled: bool) -> None:
        rng = random.Random(slices)
        order: dict[int, list[int]] = {}

        def set_grid_idx(self, x, y, z):
            size = self.grid_dim[0]
            if x == 0:
                order[size] = rng.sample(range(size), size) if shuffled else list(range(size))
            in_order(self, order[size][x], y, z)

        def small_blocks(logits, *_, **__):
            return launch.LaunchConfig(2, launch.entries(logits.shape[-1]), 1)

        monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
        for module in modules:
            monkeypatch.setattr(module, "slices_of", lambda *_: slices)
            # Blocks of two tiles, so that there are slices to take.
            monkeypatch.setattr(
                module,
                "config_for",
                lambda logits, *_, **__: launch.LaunchConfig(2, launch.entries(logits.shape[-1]), 1),
            )

    return launch_as


def batch(kind: str) -> tuple[tuple[torch.Tensor | None, ...], dict[str, torch.Tensor]]:
    """Four requests of up to three drafts: some rejected early, one with a row that is not valid."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(4, 4, VOCAB, generator=generator) * 3
    draft = target[:, :3] + torch.randn(4, 3, VOCAB, generator=generator) * 0.5
    keys = {"seed": torch.arange(4) + 11, "position": torch.arange(4) * 7}
    drawn = [
        sample(draft[:, i], **keys, row=i, temperature=0.8, backend="reference") for i in range(3)
    ]  # fmt: skip
    tokens = torch.stack([d.tokens for d in drawn], 1)
    tokens[3, 2] = -1
    target[2, 1, 5] = torch.nan
    stats = torch.stack([d.stats for d in drawn], 1)
    given = {"point mass": (None, None), "dense": (draft, None), "statistics": (draft, stats)}[kind]
    return (target, tokens, *given), keys | ({"draft_temperature": 0.8} if kind == "dense" else {})


OPTIONS = {
    "plain": {"temperature": 0.8},
    "greedy": {"temperature": torch.tensor([0.0, 0.8, 0.8, 0.0])},
    "filtered": {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
}


@pytest.mark.parametrize(("rule", "kind"), [("token", "statistics"), ("token", "dense"), ("block", "dense"),
                                        ("coupled", "point mass")])  # fmt: skip
@pytest.mark.parametrize("options", OPTIONS)
def test_tokens_do_not_depend_on_the_launch(launched, rule, kind, options):
    positional, keys = batch(kind)
    arguments = {**keys, **OPTIONS[options], "rule": rule, "logprobs": True}
    expected = verify_chain(*positional, **arguments, backend="reference")
    found = []
    for slices, shuffled in ((1, False), (3, False), (3, True), (6, True)):
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


def test_rows_behind_a_rejection_are_not_read(launched, monkeypatch):
    verify = importlib.import_module("specdec_kernels.triton_kernels.verify")
    measured = []
    measure = verify.measure

    def counting(rows, i, *rest):
        measured.append(int(i.handle.data[0]))
        return measure(rows, i, *rest)

    monkeypatch.setattr(verify, "measure", counting)
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


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("kind", ["point mass", "dense", "statistics"])
def test_a_residual_is_drawn_from_a_few_tiles(launched, monkeypatch, rule, kind):
    """What its row's own tiles bound, without a pass over the row; with one, the same tokens."""
    import triton.language as tl

    modules = [importlib.import_module(f"specdec_kernels.triton_kernels.{name}") for name in ("residuals", "rules")]
    looked = []
    real = modules[0].residuals

    def counting(*given):
        looked.append(given[6].shape)  # ids
        return real(*given)

    launched(1, False)
    positional, keys = batch(kind)
    keys["seed"] += 40 if kind == "statistics" else 0
    given = {**keys, "temperature": 0.5, "rule": rule, "backend": "triton"}
    monkeypatch.setattr(modules[0], "residuals", counting)
    few = verify_chain(*positional, **given)
    tiles = [shape for shape in looked if len(shape) == 1]
    assert tiles
    if rule == "token":
        assert len(tiles) == len(looked), "no pass"
        assert len(tiles) < 4 * 5  # of 12 tiles a request, and the winner again
    monkeypatch.setattr(modules[0], "MOST_LOOKS", tl.constexpr(0))
    looked.clear()
    passed = verify_chain(*positional, **given)
    assert any(len(shape) == 2 for shape in looked)
    for one, other in zip(few, passed, strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def test_counters_are_left_at_rest(launched, monkeypatch):
    verify = importlib.import_module("specdec_kernels.triton_kernels.verify")
    counters = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(verify, "counters_at_rest", lambda *_: counters)
    positional, keys = batch("dense")
    launched(3, True)
    for rule in ("token", "block", "token"):
        expected = verify_chain(*positional, **keys, rule=rule, backend="reference")
        assert torch.equal(verify_chain(*positional, **keys, rule=rule, backend="triton").tokens, expected.tokens)
        assert not counters.any()


@pytest.mark.parametrize("rule", ["walk", "recursive", "traversal", "coupled"])
@pytest.mark.parametrize("options", OPTIONS)
def test_trees_do_not_depend_on_the_launch(launched, monkeypatch, rule, options):
    """One program a request, or several that measure rows ahead, in any order."""
    if options == "filtered" and rule != "traversal":
        pytest.skip("the interpreter takes its time, and filters are found by the same functions")
    tree_rules = importlib.import_module("specdec_kernels.triton_kernels.tree_rules")
    (target, tokens, draft, _), keys = batch("dense")
    tokens = torch.cat([torch.zeros(4, 1, dtype=torch.int64), tokens], 1)
    parents = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2], [-1, 0, 0, -1], [-1, -1, -1, -1]])
    drafts = torch.cat([draft, draft[:, :1]], 1)
    drafted = {} if rule in ("walk", "coupled") else {"draft_logits": drafts, "siblings": "without_replacement"}
    arguments = {**keys, **drafted, **OPTIONS[options], "rule": rule, "logprobs": True}
    expected = verify_tree(target, tokens, parents, **arguments, backend="reference")
    found = []
    for ahead, slices, shuffled in ((False, 1, True), (True, 1, False), (True, 3, True), (True, 6, True)):
        launched(slices, shuffled)
        monkeypatch.setattr(tree_rules, "measures_ahead", lambda *_, ahead=ahead: ahead)
        found.append(verify_tree(target, tokens, parents, **arguments, backend="triton"))
    for each in found:
        assert torch.equal(each.tokens, expected.tokens)
        assert torch.equal(each.nodes, expected.nodes)
        for of_first, of_this in zip(found[0], each, strict=True):
            assert torch.equal(of_first.nan_to_num(7.0), of_this.nan_to_num(7.0)), "not the same bits"


def test_launches_are_chosen_by_pure_functions():
    from specdec_kernels.triton_kernels.launch import LaunchConfig, launch_config, pays_ahead, slices

    assert launch_config(128_256, "cuda", large=True) == LaunchConfig(16, 1024, 8, 255)
    assert launch_config(100, "cuda", large=False) == LaunchConfig(1, 1, 8, 128)
    assert launch_config(128_256, "hip", large=True).options == {"num_warps": 8}
    assert launch_config(128_256, "interpreter", large=False).tiles == 1024
    # All nodes come to?, requests, nodes, multiprocessors.
    assert pays_ahead(True, 100, 64, 132)
    assert not pays_ahead(True, 600, 64, 132)
    assert pays_ahead(False, 8, 16, 132)
    assert not pays_ahead(False, 64, 16, 132)
    # Rows, blocks of a row, multiprocessors.
    assert slices(5, 64, 132) == 64  # one request: as many as there are blocks
    assert slices(320, 64, 132) == 2
    assert slices(4352, 64, 132) == 1
