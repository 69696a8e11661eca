"""FlashInfer's signature and SGLang's trees, held to this library's own operators and to the distribution."""

from __future__ import annotations

import doctest
import json
import pkgutil
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from distributions import g_test, limit
from llama_cpp_stand_in import LlamaCpp
from tiny import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from specdec_kernels import tree_links, verify_chain, verify_tree
from specdec_kernels.integrations import sglang
from specdec_kernels.integrations.flashinfer import chain_speculative_sampling

ROOT = Path(__file__).parent.parent.parent
B, K, V = 48, 4, 300
STATS = torch.tensor([1.0, -torch.inf, 0.0])  # of probabilities' logarithms: normalised already


def chains(seed=0):
    torch.manual_seed(seed)
    target = (torch.randn(B, K + 1, V) * 2).softmax(-1)
    draft = (target[:, :K].log() + torch.randn(B, K, V) * 0.7).softmax(-1)
    return draft, torch.multinomial(draft.reshape(-1, V), 1).reshape(B, K), target


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_flashinfer_accepts_as_verify_chain_does(dtype):
    """The same uniforms decide; only the draw of the last token has other rows to race over."""
    draft, ids, target = chains()
    ids[3, 2:], ids[4] = -1, -1
    seed = torch.arange(B)
    want = verify_chain(
        target.log(),
        ids,
        draft.log(),
        STATS.expand(B, K, 3).contiguous(),
        seed=seed,
        position=5,
        count_independent=True,
    )
    tokens, independent, emitted = chain_speculative_sampling(draft, ids.to(dtype), target, seed=seed, offset=5)
    assert tokens.dtype == independent.dtype == emitted.dtype == torch.int32
    assert emitted.tolist() == want.num_accepted.tolist()
    assert 0 < emitted.sum() < B * K
    rows = torch.arange(K + 1)
    kept = rows < emitted[:, None]
    assert torch.equal(tokens[kept], want.tokens[kept].int())
    assert ((tokens >= 0) == (rows <= emitted[:, None])).all()
    ended = ids < 0
    assert independent[~ended.any(1)].tolist() == want.num_independent[~ended.any(1)].tolist()
    assert independent[4] == 0
    # Case 21: those kept are among those that would be accepted by themselves, and no more than were proposed.
    assert (emitted <= independent).all()
    assert (independent <= K).all()


@pytest.mark.parametrize("vocab", [V, 384])
@pytest.mark.parametrize("drafts", [K, 0])
def test_flashinfer_draws_as_the_operators_do(vocab, drafts):
    """The last token is what an operator draws from the row that is left, whose logarithm is not needed for it."""
    torch.manual_seed(2)
    target = (torch.randn(B, drafts + 1, vocab) * 2).softmax(-1)
    draft = (target[:, :drafts].log() + torch.randn(B, drafts, vocab) * 0.7).softmax(-1)
    ids = draft.argmax(-1)
    seed, every = torch.arange(B), torch.arange(B)
    with NoLogarithms(B * vocab):
        tokens, _, emitted = chain_speculative_sampling(draft, ids, target, seed=seed, offset=5)
    row = target[every, emitted]
    if drafts:
        left = (row - draft[every, emitted.clamp(max=drafts - 1)]).clamp(min=0)
        row = left.where((emitted < drafts)[:, None], row)
        assert {0, drafts} <= set(emitted.tolist())
    want = verify_chain(row.log()[:, None], ids[:, :0], seed=seed, position=5)
    assert tokens[every, emitted].tolist() == want.tokens[:, 0].tolist()


class NoLogarithms(TorchDispatchMode):
    """Fails where PyTorch takes the logarithm of so many numbers."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "log" not in func.name() or args[0].numel() < self.size, func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wrong", [False, True])
def test_flashinfer_distribution(wrong):
    """Two tokens, whose second, where it was not reached, is drawn from its row. The control: drafts that were drawn
    from something else than is said."""
    torch.manual_seed(1)
    count, target = 40_000, torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6], [0.2, 0.2, 0.6]])
    draft = torch.tensor([[0.2, 0.2, 0.6], [0.6, 0.2, 0.2]])
    drawn_from = draft.flip(1) if wrong else draft
    ids = torch.stack([torch.multinomial(row, count, replacement=True) for row in drawn_from], 1)
    tokens, _, emitted = chain_speculative_sampling(
        draft.expand(count, 2, 3), ids, target.expand(count, 3, 3), generator=torch.Generator().manual_seed(2)
    )
    assert {0, 1, 2} == set(emitted.tolist())
    rest = torch.multinomial(target[1], count, replacement=True)
    second = torch.where(emitted > 0, tokens[:, 1], rest)
    seen = torch.bincount(tokens[:, 0].long() * 3 + second, minlength=9).double().numpy()
    statistic, freedom = g_test(seen, torch.outer(target[0], target[1]).flatten().double().numpy())
    assert (statistic < limit(freedom)) != wrong


def test_flashinfer_seeds_are_of_each_request():
    draft, ids, target = (x[:1].expand(B, *x.shape[1:]) for x in chains())

    def run(**options):
        return chain_speculative_sampling(draft, ids, target, **options)[0].tolist()

    one = run(seed=7, offset=100)
    assert len(set(map(tuple, one))) > 5  # a seed that a batch shares would make its rows equal
    assert one == run(seed=7, offset=100) != run(seed=8, offset=100)
    assert run(seed=7, offset=101)[:-1] == one[1:]
    each = torch.full((B,), 7)
    assert run(seed=each, offset=torch.arange(B) + 100) == one
    assert len(set(map(tuple, run(seed=each, offset=3)))) == 1
    first = run(generator=torch.Generator().manual_seed(1))
    assert first == run(generator=torch.Generator().manual_seed(1)) != run(generator=torch.Generator().manual_seed(2))


def test_flashinfer_seeds_and_offsets_of_one_element():
    """Those of a whole batch, whose rows have noise of their own, and of either dtype that FlashInfer has."""
    draft, ids, target = (x[:1].expand(B, *x.shape[1:]) for x in chains())

    def run(seed, offset):
        return chain_speculative_sampling(draft, ids, target, seed=seed, offset=offset)[0].tolist()

    one = run(7, 100)
    for dtype in (torch.int64, torch.uint64):
        seed, offset = torch.tensor([7], dtype=dtype), torch.tensor([100], dtype=dtype)
        assert run(seed, offset) == run(7, offset) == run(seed, offset.expand(B)) == one
    each = torch.arange(B)
    assert run(each.view(torch.uint64), torch.tensor([5])) == run(each, 5) != run(each, 6)
    top = torch.tensor([2**64 - 1], dtype=torch.uint64)
    assert run(top, 5) == run(-1, 5)
    with pytest.raises(ValueError, match=r"seed must have shape \[B\] = \[48\], got int64 \[2\]"):
        run(each[:2], 5)
    with pytest.raises(ValueError, match=r"offset must have shape \[B\] = \[48\], got int64 \[\]"):
        run(each, torch.tensor(5))


def test_flashinfer_counters_are_added_to():
    draft, ids, target = chains()
    _, independent, emitted = chain_speculative_sampling(draft, ids, target, seed=1)
    before = torch.full((B,), 10, dtype=torch.int32), torch.full((B,), 20, dtype=torch.int32)
    # What is behind a -1 is no draft.
    even = torch.full((1, 4, 10), 0.1)
    assert chain_speculative_sampling(even[:, 1:], torch.tensor([[3, -1, 5]]), even, seed=1)[1:] == (1, 1)
    _, *after = chain_speculative_sampling(draft, ids, target, *before, seed=1)
    assert after[0] is before[0]
    assert after[1] is before[1]
    assert before[0].tolist() == (independent + 10).tolist()
    assert before[1].tolist() == (emitted + 20).tolist()


def test_flashinfer_rows_that_are_no_distribution():
    draft, target = torch.tensor([[[0.5, 0.5]]] * 3), torch.tensor([[[0.25, 0.25]] * 2] * 3)
    target[1] = float("nan")
    target[2] = 0.0
    tokens = chain_speculative_sampling(draft, torch.zeros(3, 1, dtype=torch.int64), target, seed=1)[0]
    assert tokens[1:].tolist() == [[-1, -1]] * 2
    halves = draft[:1].expand(64, 1, 2), torch.zeros(64, 1, dtype=torch.int64), target[:1].expand(64, 2, 2)
    tokens, _, emitted = chain_speculative_sampling(*halves, seed=1)  # nothing is left of the residual
    assert 0 < emitted.sum() < 64
    assert (tokens[:, 0] >= 0).all()
    infinite = halves[2].clone()
    infinite[:, 1, 0] = torch.inf  # in the row behind an accepted draft
    tokens, _, emitted = chain_speculative_sampling(*halves[:2], infinite, seed=1)
    assert emitted.any()
    assert (tokens[emitted > 0] == torch.tensor([0, -1])).all()


def test_flashinfer_bad_input():
    draft, ids, target = chains()
    with pytest.raises(TypeError, match=r"draft_probs must be float32 \[B, K, V\]"):
        chain_speculative_sampling(draft.half(), ids, target)
    with pytest.raises(ValueError, match=r"draft_token_ids must be in \[-1, .* got 999 at \[0, 0\]"):
        chain_speculative_sampling(draft, torch.full_like(ids, 999), target)
    with pytest.raises(ValueError, match="target_probs must have shape"):
        chain_speculative_sampling(draft, ids, target[:, :K])
    with pytest.raises(TypeError, match="maybe_output_accepted_token_num must be int32"):
        chain_speculative_sampling(draft, ids, target, torch.zeros(B))


# --- SGLang -----------------------------------------------------------------------------------------------------------

PARENTS = torch.tensor([[-1, 0, 0, 1, 1, 1, 2, 6], [-1, 0, 1, 2, 3, 0, 5, 5], [-1, 0, 0, 0, -1, -1, -1, -1]])


def test_sglang_docstrings():
    assert doctest.testmod(sglang).attempted >= 4
    assert doctest.testmod(sglang).failed == 0


def test_sglang_links():
    tree = sglang.from_parents(PARENTS)
    assert all(x.dtype == torch.int64 for x in tree)
    assert tree.retrive_index.flatten().tolist() == list(range(PARENTS.numel()))
    links = tree_links(PARENTS)
    assert torch.equal(tree.retrive_next_token, links.first_child.long())
    assert torch.equal(sglang.to_parents(tree.retrive_next_token, tree.retrive_next_sibling), PARENTS)
    generator = torch.Generator().manual_seed(0)
    for nodes in (1, 2, 3, 16, 33):
        up = [torch.randint(node, (20, 1), generator=generator) for node in range(1, nodes)]
        parents = torch.cat([torch.full((20, 1), -1), *up], 1)
        _, child, sibling = sglang.from_parents(parents)
        assert torch.equal(sglang.to_parents(child.int(), sibling.int()), parents)


def test_sglang_nodes_that_hang_nowhere():
    """They end the tree, which can be verified, on a CPU too."""
    index, child, sibling = sglang.from_parents(PARENTS)
    child, sibling = child[:2].clone(), sibling[:2].clone()
    sibling[0, 1] = -1  # where node 2 hangs, with 6 and 7 below it
    child[1, 1] = -1  # where node 2 hangs, with 3 and 4 below it
    parents = sglang.to_parents(child, sibling)
    assert parents.tolist() == [[-1, 0] + [-1] * 6] * 2
    tokens = torch.arange(8).expand(2, 8)
    verified = verify_tree(torch.zeros(2, 8, 9), tokens, parents, rule="walk", seed=1, position=0, temperature=0.0)
    assert sglang.results(verified, index[:2], 4).accept_token_num.tolist() == [0, 0]


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_sglang_results_have_as_many_columns_as_the_longest_path(depth):
    parents, tokens = torch.tensor([[-1, 0, 0]]), torch.tensor([[0, 5, 6]])
    logits = torch.zeros(1, 3, 30).index_fill(2, torch.tensor([6]), 9.0)
    verified = verify_tree(logits, tokens, parents, rule="walk", seed=1, position=9, temperature=0.0)
    predict, accepted, _ = sglang.results(verified, torch.arange(3)[None], depth)
    assert accepted.dtype == torch.int32
    assert accepted.tolist() == [[0, 2, -1, -1, -1, -1][:depth]]
    assert predict.tolist() == [6, 0, 6]
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        sglang.results(verified, torch.arange(3)[None], 0)


def test_sglang_results():
    """As SGLang's loop over the links gives them."""
    torch.manual_seed(3)
    trees, nodes = PARENTS.shape
    tokens = torch.stack([torch.randperm(12)[:nodes] for _ in range(trees)])
    logits = torch.randn(trees, nodes, 12)
    for tree, row, node in ((0, 0, 1), (0, 1, 4), (1, 0, 5)):
        logits[tree, row, tokens[tree, node]] = 9.0
    verified = verify_tree(logits, tokens, PARENTS, rule="walk", seed=1, position=0, temperature=0.0)
    index, child, sibling = sglang.from_parents(PARENTS)
    predict, accepted, count = sglang.results(verified, index, 4)
    best = logits.argmax(-1)
    for tree in range(trees):
        path, node = [0], 0
        while True:
            following = child[tree, node]
            while following >= 0 and tokens[tree, following] != best[tree, node]:
                following = sibling[tree, following]
            if following < 0:
                break
            node = int(following)
            path.append(node)
        rows = index[tree, path].tolist()
        assert accepted[tree].tolist() == rows + [-1] * (4 - len(rows))
        assert count[tree] == len(path) - 1
        assert predict[rows].tolist() == best[tree, path].tolist()
    assert count.tolist() == [2, 1, 0]
    assert (predict != 0).sum() <= 6


@pytest.mark.parametrize("group", ["vllm.general_plugins", "sglang.srt.plugins"])
def test_plugins_can_be_loaded_without_their_stacks(group):
    """The entry points name functions; importing their modules imports no stack."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]
    assert [callable(pkgutil.resolve_name(target)) for target in points.values()] == [True]


def test_the_documentation_runs(monkeypatch, tmp_path):
    """Each block by itself; a file of llama.cpp is all that one of them needs."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "integrations.md").read_text(), re.DOTALL)
    monkeypatch.setitem(sys.modules, "llama_cpp", LlamaCpp(tiny(3, vocab=300)))
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").touch()
    torch.manual_seed(0)
    scopes: list[dict[str, Any]] = [{} for _ in blocks]
    for block, scope in zip(blocks, scopes, strict=True):
        exec(block, scope)
    inside, llama, flashinfer, trees, load = scopes
    assert inside["texts"].shape[0] == flashinfer["tokens"].shape[0] == 2
    assert [len(result.tokens) for result in llama["results"]] == [64, 64]
    assert trees["accept_token_num"].shape == (1,)
    for record in (inside["statistics"].record(), load["statistics"].record()):
        assert json.loads(json.dumps(record)) == record
    assert 1 < record["mean_acceptance_length"] < 4
