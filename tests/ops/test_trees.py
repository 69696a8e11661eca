"""Trees of drafts: links, positions, paths, and masks in every format, for every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_trees import trees
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from specdec_kernels import tree_links, tree_mask, tree_mask_mod, tree_paths, tree_positions
from specdec_kernels.ops.trees import _FORMATS, live_nodes

#: Where words of 8, 16, 32 and 64 bits begin and end (case 30), and more nodes than any of them holds.
SIZES = (1, 31, 32, 33, 64, 65, 257)


def naive(parents):
    """bool [N, N] of one tree: walk up from every node."""
    nodes = len(parents)
    mask = np.eye(nodes, dtype=bool)
    for i in range(nodes):
        at = i
        while parents[at] >= 0:
            at = parents[at]
            mask[i, at] = True
    return mask


def naive_rows(parents, context):
    """bool [N, L + N]."""
    mask = naive(parents)
    return np.concatenate([np.ones((len(mask), context), bool), mask], 1)


def words(bits, width):
    """Bits of rows as words of ``width``."""
    padded = np.pad(bits, ((0, 0), (0, -bits.shape[1] % width)))
    return np.packbits(padded, axis=1, bitorder="little").view(f"<u{width // 8}")


CONTEXT = [0, 5, 17, 3]


def expected(parents, format):
    """The mask as NumPy writes it."""
    rows = parents.tolist()
    plain = np.stack([naive(row) for row in rows])
    with_context = [naive_rows(row, length) for row, length in zip(rows, CONTEXT, strict=True)]
    if format in ("dense", "additive"):
        width = max(CONTEXT) + len(rows[0])
        return np.stack([np.pad(mask, ((0, 0), (0, width - mask.shape[1]))) for mask in with_context])
    if format == "packed":
        return np.stack([words(mask, 32) for mask in plain]).view(np.int32)
    if format == "flashinfer":
        return np.concatenate([np.packbits(mask.ravel(), bitorder="little") for mask in with_context])
    if format == "sglang_full":
        return np.concatenate([mask.ravel() for mask in with_context])
    if format == "sglang_qlen_only":
        return plain.ravel()
    width = next(w for w in (8, 16, 32) if len(rows[0]) <= w)
    return np.concatenate([words(mask, width)[:, 0] for mask in plain])


#: SGLang packs 32 nodes at most.
MASKS = [
    (nodes, format)
    for nodes in (*SIZES, 8, 9, 16)
    for format in _FORMATS
    if nodes <= 32 or format != "sglang_qlen_only_packed"
]


@pytest.mark.interpreted(kept=lambda parameters: parameters["nodes"] in (1, 9, 16, 31, 33))
@pytest.mark.parametrize(("nodes", "format"), MASKS)
def test_masks(backend, nodes, format):
    parents = trees(nodes)
    named = {"backend": backend}
    if format in ("dense", "additive", "flashinfer", "sglang_full"):
        named["context_lens"] = torch.tensor(CONTEXT)
    mask = tree_mask(parents, format, **named)
    want = expected(parents, format)
    if format == "additive":
        assert mask.dtype == torch.float32
        mask, want = mask.numpy(), np.where(want, 0.0, -np.inf)
        assert np.array_equal(mask, want)
        half = tree_mask(parents, format, dtype=torch.bfloat16, **named)
        assert np.array_equal(half.float().numpy(), want)
        return
    got = mask.numpy()
    if format in ("flashinfer", "sglang_full"):  # sized for the longest context, the rest is 0
        assert not got[len(want) :].any()
        got = got[: len(want)]
    assert np.array_equal(got.view(want.dtype) if got.dtype != want.dtype else got, want)


@pytest.mark.interpreted(kept=lambda parameters: parameters["nodes"] in (1, 33, 65))
@pytest.mark.parametrize("nodes", SIZES)
def test_masks_without_context(backend, nodes):
    parents = trees(nodes)
    want = np.stack([naive(row) for row in parents.tolist()])
    assert np.array_equal(tree_mask(parents, backend=backend).numpy(), want)
    assert np.array_equal(tree_mask(parents.int(), "additive", backend=backend).numpy(), np.where(want, 0, -np.inf))


def test_a_large_batch_then_a_small_one(backend):
    """Case 30: nothing of the first is left in the second; and a wider stride of the input."""
    wide = torch.full((40, 70), -1)
    wide[:, :33] = trees(33, 40)
    large = tree_mask(wide[:, :33], "packed", backend=backend)
    small = tree_mask(trees(9), "packed", backend=backend)
    assert np.array_equal(small.numpy(), expected(trees(9), "packed"))
    assert torch.equal(large[3:4], tree_mask(trees(33, 40)[3:4], "packed", backend=backend))
    assert tree_mask(torch.empty((0, 5), dtype=torch.int64), backend=backend).shape == (0, 5, 5)


@pytest.mark.parametrize("nodes", [*SIZES, 34])
def test_positions_links_and_paths(nodes):
    """Case 29: positions are depths, not indices; a star has 33 siblings."""
    for row, tree in zip(trees(nodes).tolist(), trees(nodes), strict=True):
        depths, paths = [], []
        for i, parent in enumerate(row):
            live = i == 0 or parent >= 0
            paths.append([*(paths[parent] if i else []), i] if live else [])
            depths.append(len(paths[-1]) - 1)
        deepest = max(depths)
        assert tree_positions(tree[None])[0].tolist() == depths
        got = tree_paths(tree[None], deepest)[0].tolist()
        assert got == [path + [-1] * (deepest + 1 - len(path)) for path in paths]
        cut = tree_paths(tree[None], max(0, deepest - 1))[0].tolist()
        assert cut == [line[:deepest] if deepest else line for line in got]
        first, following = (x[0].tolist() for x in tree_links(tree[None]))
        for node in range(nodes):
            children, child = [], first[node]
            while child != -1:
                children.append(child)
                child = following[child]
            assert children == [i for i, parent in enumerate(row) if parent == node]


def test_the_mask_mod_is_the_mask():
    """FlexAttention with the packed words, with and without a context, against a dense mask in SDPA."""
    generator = torch.Generator().manual_seed(0)
    nodes, context = 20, torch.tensor(CONTEXT)
    parents = trees(nodes)
    longest = max(CONTEXT)
    packed = tree_mask(parents, "packed")
    for lens in (None, context):
        keys = nodes + (0 if lens is None else longest)
        query = torch.randn(4, 2, nodes, 16, generator=generator)
        key, value = (torch.randn(4, 2, keys, 16, generator=generator) for _ in range(2))
        block_mask = create_block_mask(
            tree_mask_mod(packed, lens), 4, None, nodes, keys, device="cpu", BLOCK_SIZE=(32, 32)
        )
        got = flex_attention(query, key, value, block_mask=block_mask)
        dense = tree_mask(parents, context_lens=lens)[:, None]
        want = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_rows_that_are_none_attend_to_something(backend):
    """A softmax over nothing would be nan."""
    parents = torch.tensor([[-1, 0, -1, -1]])
    mask = tree_mask(parents, "additive", context_lens=torch.tensor([0]), backend=backend)
    assert mask.softmax(-1).isfinite().all()
    assert live_nodes(parents).tolist() == [[True, True, False, False]]


TREE = torch.tensor([[-1, 0, 0, 1]])


@pytest.mark.parametrize(
    ("parents", "value", "node"),
    [
        ([-1, 0, 3, 1], 3, 2),  # forward
        ([-1, 0, 2, 1], 2, 2),  # a cycle of one
        ([-1, 2, 1, 0], 2, 1),  # a cycle of two
        ([-1, 0, -1, 1], 1, 3),  # a missing parent in the middle
        ([0, 0, 0, 1], 0, 0),  # a root with a parent
        ([-1, 0, -2, -1], -2, 2),
        ([-1, 0, -1, -2], -2, 3),
        ([-1, 0, 9, -1], 9, 2),
    ],
)
@pytest.mark.parametrize("function", [tree_positions, tree_links, tree_mask, lambda p: tree_paths(p, 2)])
def test_what_is_no_tree_is_an_error(function, parents, value, node):
    """Case 29: never an endless walk."""
    with pytest.raises(ValueError, match=rf"parents must be -1 for the root.*got {value} at \[1, {node}\]"):
        function(torch.tensor([[-1, 0, 0, 1], parents]))


@pytest.mark.parametrize("parents", [[-1, 0, 3, 1], [-1, 2, 1, 0], [0, 0, 0, 1], [-1, 0, 9, -1]])
def test_where_looking_would_synchronise_it_ends_the_tree(backend, parents):
    """What the kernels do with such a tree: the nodes from there on are none."""
    tree = torch.tensor([parents])
    live = live_nodes(tree)[0].tolist()
    kept = [parent if alive else -1 for parent, alive in zip(parents, live, strict=True)]
    out = torch.empty((1, 4, 4), dtype=torch.bool)
    from specdec_kernels.contract import MaskFormat
    from specdec_kernels.ops.backends import function

    function("tree_mask", backend, tree.device)(out, tree, None, int(MaskFormat.DENSE))
    assert np.array_equal(out[0].numpy(), naive(kept))


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"parents": TREE.float()}, TypeError, r"parents must be int64 or int32 \[B, N\], got float32 \[1, 4\]"),
        ({"parents": TREE[0]}, ValueError, r"parents must have shape \[B, N\]"),
        ({"parents": TREE[:, :0]}, ValueError, "parents must have at least the root, got int64"),
        ({"format": "bits"}, ValueError, "format must be one of .* got 'bits'"),
        ({"dtype": torch.float32}, ValueError, "dtype goes with format='additive' alone, got dtype=torch.float32"),
        ({"format": "additive", "dtype": torch.int8}, TypeError, "dtype must be float32, bfloat16 or float16"),
        ({"format": "flashinfer"}, ValueError, "context_lens must be given with format='flashinfer', got None"),
        ({"format": "packed", "context_lens": torch.tensor([1])}, ValueError, "context_lens must be None with format"),
        ({"context_lens": torch.tensor([1, 2])}, ValueError, r"context_lens must have shape \[B\] = \[1\]"),
        ({"context_lens": torch.tensor([-1])}, ValueError, r"context_lens must be in \[0, .*\], got -1 at \[0\]"),
        (
            {"context_lens": torch.tensor([9]), "max_context": 8},
            ValueError,
            r"context_lens must be in \[0, 8\], got 9 at \[0\]",
        ),
        ({"max_context": 8}, ValueError, "max_context goes with context_lens, got 8 without"),
        ({"format": "sglang_qlen_only_packed", "parents": trees(33)}, ValueError, "at most 32 nodes .* got 33"),
        ({"backend": "cuda9"}, ValueError, "backend must be None or one of"),
    ],
)
def test_bad_input(named, error, message):
    with pytest.raises(error, match=message):
        tree_mask(**{"parents": TREE, **named})


def test_bad_depth():
    with pytest.raises(ValueError, match="depth must be at least 0, got -1"):
        tree_paths(TREE, -1)
    with pytest.raises(TypeError, match=r"packed must be int32 \[B, N, ceil\(N/32\)\], got int64"):
        tree_mask_mod(TREE)


@pytest.mark.parametrize("context", [None, torch.tensor([2])])
def test_opcheck(context):
    out = torch.zeros((1, 4, 4 if context is None else 6), dtype=torch.bool)
    torch.library.opcheck(torch.ops.specdec.tree_mask.default, (out, TREE, context, 1))


def test_compiled_without_a_break():
    def masks(parents):
        return tree_mask(parents), tree_mask(parents, "packed"), tree_positions(parents), *tree_links(parents)

    compiled = torch.compile(masks, fullgraph=True, backend="aot_eager")
    for nodes in (5, 33):
        for got, want in zip(compiled(trees(nodes)), masks(trees(nodes)), strict=True):
            assert torch.equal(got, want)
