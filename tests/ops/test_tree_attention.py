"""Attention of a tree over a cache: every backend against PyTorch's own with a mask."""

from __future__ import annotations

import pytest
import torch
from random_trees import trees
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from specdec_kernels import tree_attention, tree_mask, tree_mask_mod

#: See conftest.py.
WITHOUT = ("cpu", "cuda")


def example(nodes, heads, kv_heads, width, dtype, contexts, spare=0):
    generator = torch.Generator().manual_seed(nodes)
    batch, tokens = len(contexts), max(contexts) + nodes + spare
    query = torch.randn(batch, heads, nodes, width, generator=generator).to(dtype)
    key, value = torch.randn(2, batch, kv_heads, tokens, width, generator=generator).to(dtype)
    return query, key, value, trees(nodes, batch), torch.tensor(contexts)


def expected(query, key, value, parents, contexts, scale=None):
    tokens = key.shape[2]
    mask = tree_mask(parents, "dense", context_lens=contexts, max_context=tokens - query.shape[2])
    return scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask[:, None], enable_gqa=True, scale=scale
    )


@pytest.mark.interpreted(kept=lambda parameters: (parameters["nodes"] == 33) == (parameters["dtype"] == torch.float32))
@pytest.mark.parametrize("nodes", [1, 31, 33, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_a_mask(backend, device, nodes, dtype):
    query, key, value, parents, contexts = example(nodes, 6, 2, 24, dtype, [0, 5, 700, 64], spare=3)
    packed = tree_mask(parents, "packed")
    given = [x.to(device) for x in (query, key, value, packed, contexts)]
    got = tree_attention(*given, backend=backend).cpu()
    assert got.dtype == dtype
    want = expected(query, key, value, parents, contexts)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(("scale", "dim"), [(0.3, 1), (-0.3, 1), (0.0, 1), (0.3, 3)])
def test_views_of_a_cache_and_a_scale(backend, device, scale, dim):
    """Nodes lie before heads, or elements of a head apart, of the query and so of what is returned too."""
    query, key, value, parents, contexts = example(9, 4, 4, 16, torch.float32, [3, 40, 10, 20])
    transposed = [x.transpose(dim, 2).contiguous().transpose(dim, 2) for x in (query, key, value)]
    given = [x.to(device) for x in (*transposed, tree_mask(parents, "packed"), contexts)]
    got = tree_attention(*given, scale=scale, backend=backend).cpu().double()
    torch.testing.assert_close(got, expected(query, key, value, parents, contexts, scale), rtol=0, atol=2e-5)


def test_what_is_behind_the_tree_is_not_read(backend, device):
    query, key, value, parents, contexts = example(5, 2, 1, 16, torch.float32, [7, 2], spare=10)
    packed = tree_mask(parents, "packed")
    results = []
    for filler in (0.0, 1e9, float("nan"), float("inf")):
        for b, length in enumerate(contexts.tolist()):
            key[b, :, length + 5 :], value[b, :, length + 5 :] = filler, filler
        given = [x.to(device) for x in (query, key, value, packed, contexts)]
        results.append(tree_attention(*given, backend=backend))
    assert all(torch.equal(results[0], result) for result in results)


def test_autocast_changes_nothing(backend, device):
    query, key, value, parents, contexts = example(5, 2, 1, 16, torch.float32, [7, 2])
    given = [x.to(device) for x in (query, key, value, tree_mask(parents, "packed"), contexts)]
    with torch.autocast(device, torch.bfloat16):
        got = tree_attention(*given, backend=backend)
    assert torch.equal(got, tree_attention(*given, backend=backend))


def test_heads_without_width():
    query, key, value, parents, contexts = example(3, 2, 1, 0, torch.float32, [7, 2])
    assert tree_attention(query, key, value, tree_mask(parents, "packed"), contexts).shape == (2, 2, 3, 0)


def test_a_wrong_bit_is_seen(backend, device):
    """The comparison can fail."""
    query, key, value, parents, contexts = example(33, 2, 1, 16, torch.float32, [7, 2])
    packed = tree_mask(parents, "packed")
    packed[0, 32, 0] ^= 1 << 7
    got = tree_attention(*(x.to(device) for x in (query, key, value, packed, contexts)), backend=backend).cpu().double()
    want = expected(query, key, value, parents, contexts)
    assert (got - want)[0, :, 32].abs().max() > 1e-3
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=2e-5)


def test_flex_attention_agrees(backend, device):
    """What an engine that has FlexAttention may take in its place: the same words as a mask_mod."""
    query, key, value, parents, contexts = example(33, 4, 2, 16, torch.float32, [3, 40, 10, 20])
    packed = tree_mask(parents, "packed")
    given = [x.to(device) for x in (query, key, value, packed, contexts)]
    blocks = create_block_mask(
        tree_mask_mod(packed, contexts), 4, None, 33, key.shape[2], device="cpu", BLOCK_SIZE=(64, 64)
    )
    want = flex_attention(query, key, value, block_mask=blocks, enable_gqa=True)
    torch.testing.assert_close(tree_attention(*given, backend=backend).cpu(), want, rtol=0, atol=2e-5)


def test_the_cpu_backend_says_that_it_has_none():
    query, key, value, parents, contexts = example(3, 2, 1, 16, torch.float32, [7, 2])
    with pytest.raises(RuntimeError, match="backend='cpu' has no tree_attention: backend=None takes"):
        tree_attention(query, key, value, tree_mask(parents, "packed"), contexts, backend="cpu")


X, PACKED, LENS = torch.zeros(2, 4, 3, 8), torch.zeros(2, 3, 1, dtype=torch.int32), torch.tensor([0, 1])
CACHE = torch.zeros(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((X.double(), CACHE, CACHE, PACKED, LENS), TypeError, "query must be float32 or bfloat16 or float16"),
        ((X, CACHE.half(), CACHE, PACKED, LENS), TypeError, r"key must be float32 \[B, Hk, S, D\]"),
        ((X, CACHE[:, :, :, :4], CACHE, PACKED, LENS), ValueError, r"key must have shape .* = \[2, \*, \*, 8\]"),
        ((X, CACHE, CACHE[:, :1], PACKED, LENS), ValueError, r"value must have shape .* = \[2, 2, 5, 8\]"),
        (
            (X[:, :3], CACHE, CACHE, PACKED, LENS),
            ValueError,
            "key must have a number of heads that divides .* 3, got 2",
        ),
        ((X, CACHE, CACHE, PACKED[:, :2], LENS), ValueError, r"packed must have shape .* = \[2, 3, 1\]"),
        (
            (X, CACHE, CACHE, PACKED, LENS + 2),
            ValueError,
            r"context_lens must be in \[0, S - N\] = \[0, 2\], got 3 at \[1\]",
        ),
    ],
)
def test_bad_input(given, error, message):
    with pytest.raises(error, match=message):
        tree_attention(*given)
    with pytest.raises(ValueError, match="scale must be None or finite"):
        tree_attention(X, CACHE, CACHE, PACKED, LENS, scale=float("nan"))


def test_opcheck():
    given = (X, CACHE, CACHE, PACKED + 7, LENS, 0.5)
    torch.library.opcheck(torch.ops.specdec.tree_attention.default, given)
