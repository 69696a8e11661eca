"""Moving keys and values of accepted nodes: dense and paged, overlapping, token by token."""

from __future__ import annotations

import random

import pytest
import torch

from specdec_kernels import compact_kv, ops


@pytest.fixture
def compact(backend, device):
    def call(caches, nodes, start, page_table=None):
        moved = [cache.to(device) for cache in caches]
        table = None if page_table is None else page_table.to(device)
        start = start if isinstance(start, int) else start.to(device)
        compact_kv(moved, nodes.to(device), start, page_table=table, backend=backend)
        for cache, result in zip(caches, moved, strict=True):
            cache.copy_(result)

    return call


def paths(batch, nodes, rng):
    """Random paths from the root, padded."""
    rows = []
    for _ in range(batch):
        path = [0, *sorted(rng.sample(range(1, nodes), rng.randrange(nodes)))]
        rows.append(path + [-1] * (nodes - len(path)))
    return torch.tensor(rows)


def expected(cache, nodes, start):
    """[B, H, S, D], moved by way of a copy."""
    result = cache.clone()
    for b, path in enumerate(nodes.tolist()):
        for i, node in enumerate(node for node in path if node >= 0):
            result[b, :, start[b] + i] = cache[b, :, start[b] + node]
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("nodes", [1, 7, 33])
def test_dense(compact, nodes, dtype):
    rng, generator = random.Random(nodes), torch.Generator().manual_seed(nodes)
    path, start = paths(3, nodes, rng), torch.tensor([0, 4, 9])
    caches = [torch.randint(0, 255, (3, 2, 50, 6), generator=generator).to(dtype) for _ in range(4)]
    want = [expected(cache, path, start.tolist()) for cache in caches]
    compact(caches, path, start)
    assert all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))


def test_more_caches_than_one_launch_takes(compact):
    """Triton takes 64 of them at once."""
    path, start = torch.tensor([[0, 2, -1]]), torch.tensor([1])
    caches = [torch.arange(5.0).reshape(1, 1, 5, 1) + 10 * index for index in range(130)]
    want = [expected(cache, path, [1]) for cache in caches]
    compact(caches, path, start)
    assert all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))


@pytest.mark.parametrize("nodes", [torch.tensor([[0, 3, 5, -1, -1, -1]]), torch.tensor([[0, 1, 2, 3, 4, 5]])])
def test_pages_of_64_and_a_path_over_their_edge(compact, nodes):
    """Case 31: page 64, accept [0, 3, 5], overlapping source and destination."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(1, 2, 192, 8, generator=generator)
    table = torch.tensor([[4, 0, 2]])
    for start in (10, 61, 63, 64, 126):
        pages = torch.zeros(5, 64, 2, 8)
        pages[table[0]] = dense[0].transpose(0, 1).reshape(3, 64, 2, 8)
        other = pages.clone() + 1
        want = expected(dense, nodes, [start])
        compact([pages, other], nodes, start, table)
        assert torch.equal(pages[table[0]].reshape(192, 2, 8).transpose(0, 1), want[0])
        assert torch.equal(other, pages + 1)
        assert not pages[[1, 3]].any()  # nobody's


def test_strided_caches(compact):
    """Views of a larger buffer, as engines keep them."""
    buffer = torch.randn(2, 40, 3, 2, 5, generator=torch.Generator().manual_seed(1))
    caches = [buffer[:, :, layer].transpose(1, 2) for layer in range(3)]
    path, start = torch.tensor([[0, 2, 4], [0, 1, -1]]), torch.tensor([3, 30])
    want = [expected(cache, path, start.tolist()) for cache in caches]
    compact(caches, path, start)
    assert all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))


CACHE, PATH = torch.zeros(2, 1, 8, 4), torch.tensor([[0, 1], [0, 2]])
BAD = [
    (([], PATH, 0), {}, TypeError, "caches must be a list of at least one tensor"),
    (([CACHE[0]], PATH, 0), {}, ValueError, r"caches\[0\] must have shape \[B, H, S, D\]"),
    (([CACHE, CACHE.half()], PATH, 0), {}, TypeError, r"caches\[1\] must be float32 \[B, H, S, D\], got float16"),
    (
        ([CACHE, torch.zeros(2, 2, 8, 4)[:, :1]], PATH, 0),
        {},
        ValueError,
        r"caches\[1\] .* with the strides of caches\[0\]",
    ),
    (([CACHE, CACHE[:1]], PATH, 0), {}, ValueError, r"caches\[1\] must have shape \[B, H, S, D\] = \[2, 1, 8, 4\]"),
    (([CACHE.transpose(2, 3)], PATH, 0), {}, ValueError, "contiguous along D"),
    (([CACHE[:1].expand(2, -1, -1, -1)], PATH, 0), {}, ValueError, r"not expanded, .* got \(0, 32, 4, 1\)"),
    (([CACHE], PATH[:1], 0), {}, ValueError, r"nodes must have shape \[B, N\] = \[2, \*\]"),
    (([CACHE], PATH.float(), 0), {}, TypeError, "nodes must be int64 or int32"),
    (([CACHE], PATH.flip(1), 0), {}, ValueError, "nodes must ascend from 0"),
    (([CACHE], torch.tensor([[0, -1, 2], [0, 1, 2]]), 0), {}, ValueError, "nodes must ascend from 0"),
    (([CACHE], PATH, 6), {}, ValueError, r"start must leave room for the nodes in 8 rows, got \[6, 6\]"),
    (([CACHE], PATH, -1), {}, ValueError, "start must leave room"),
    (([CACHE], PATH, 2**63 - 1), {}, ValueError, "start must leave room"),
    (
        ([CACHE.transpose(1, 2)], PATH, 0),
        {"page_table": torch.tensor([[0], [2]])},
        ValueError,
        r"page_table must be in \[0, 2\)",
    ),
]


@pytest.mark.parametrize(("positional", "named", "error", "message"), BAD)
def test_bad_input(positional, named, error, message):
    with pytest.raises(error, match=message):
        compact_kv(*positional, **named)


def test_opcheck():
    given = ([torch.randn(2, 1, 8, 4), torch.randn(2, 1, 8, 4)], PATH, torch.tensor([0, 3]), None)
    torch.library.opcheck(torch.ops.specdec.compact_kv.default, given)


def test_nothing_to_do():
    empty = torch.zeros(0, 1, 8, 4)
    ops.kv.compact_kv([empty], torch.zeros(0, 3, dtype=torch.int64), 0)
    ops.kv.compact_kv([CACHE], torch.zeros(2, 0, dtype=torch.int64), 0)
