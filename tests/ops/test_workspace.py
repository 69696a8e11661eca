"""Scratch that is handed in: large enough as told, shared by calls of different sizes, left as it was found."""

from __future__ import annotations

import pytest
import torch
from forms import some

from specdec_kernels import sample, verify_chain, verify_chain_workspace


def call(vocab, batch, longest, rule, device, backend, workspace, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(batch, longest + 1, vocab, generator=generator) * 2
    draft = target[:, :longest] + torch.randn(batch, longest, vocab, generator=generator)
    keys = {"seed": torch.arange(batch) + seed, "position": torch.arange(batch)}
    drawn = [sample(draft[:, i], row=i, **keys).tokens for i in range(longest)]
    tokens = torch.stack(drawn, 1) if drawn else torch.empty((batch, 0), dtype=torch.int64)
    named = {name: x.to(device) for name, x in keys.items()}
    return verify_chain(
        target.to(device), tokens.to(device), draft.to(device), draft_temperature=1.0, **named, rule=rule,
        logprobs=True, workspace=workspace, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_calls_of_different_sizes_share_one(backend, device, rule):
    """Of exactly the requested size."""
    most = (300, 3, 3) if backend == "triton" else (1025, 5, 3)
    sizes = [most, (most[0], 2, 3), (129, most[1], 1), (1, 1, 0), most, *some([], [(300, 3, 2), most])]
    workspace = torch.zeros(verify_chain_workspace(most[1], 3, most[0]), dtype=torch.uint8, device=device)
    for index, (vocab, batch, longest) in enumerate(sizes):
        got = call(vocab, batch, longest, rule, device, backend, workspace, seed=index)
        want = call(vocab, batch, longest, rule, device, backend, None, seed=index)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        exact = torch.zeros(verify_chain_workspace(batch, longest, vocab), dtype=torch.uint8, device=device)
        assert torch.equal(call(vocab, batch, longest, rule, device, backend, exact, seed=index).tokens, want.tokens)
    assert not workspace[: 4 * most[1] * (4 + 2)].any(), "counters at rest"


def test_it_is_where_the_scratch_is(backend, device):
    """On a GPU and in what stands for one; the CPU has its own."""
    workspace = torch.zeros(verify_chain_workspace(3, 2, 300), dtype=torch.uint8, device=device)
    call(300, 3, 2, "token", device, backend, workspace)
    assert bool(workspace.any()) == (backend in ("cuda", "triton"))


@pytest.mark.parametrize(
    ("workspace", "error", "message"),
    [
        (7, TypeError, r"workspace must be uint8 \[bytes\], got 7"),
        (torch.zeros(1 << 20), TypeError, "workspace must be uint8"),
        (torch.zeros(2, 1 << 20, dtype=torch.uint8), ValueError, r"workspace must have shape \[bytes\]"),
        (torch.zeros(100, dtype=torch.uint8), ValueError, r"workspace must have at least \d+ bytes, got uint8 \[100\]"),
        (
            torch.zeros(1 << 20, dtype=torch.uint8)[8:],
            ValueError,
            "workspace must be contiguous from a multiple of 256",
        ),
        (torch.zeros(1 << 20, dtype=torch.uint8)[::2], ValueError, "workspace must be contiguous from a multiple"),
        (torch.zeros(1 << 20, dtype=torch.uint8, device="meta"), ValueError, "workspace must be on cpu like"),
    ],
)
def test_bad_input(workspace, error, message):
    with pytest.raises(error, match=message):
        verify_chain(
            torch.zeros(2, 2, 5), torch.zeros(2, 1).long(), seed=1, position=1, workspace=workspace, backend="reference"
        )


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((-1, 2, 3), ValueError, "batch must be at least 0, got -1"),
        ((1, -2, 3), ValueError, "num_draft must be at least 0, got -2"),
        ((1, 2, 0), ValueError, "vocab must be at least 1, got 0"),
        ((1.0, 2, 3), TypeError, "batch must be an int, got 1.0"),
    ],
)
def test_bad_sizes(given, error, message):
    with pytest.raises(error, match=message):
        verify_chain_workspace(*given)


def test_compiled():
    workspace = torch.zeros(verify_chain_workspace(2, 1, 5), dtype=torch.uint8)
    target = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[1], [2]])

    def step(target, tokens, workspace):
        return verify_chain(target, tokens, seed=1, position=1, workspace=workspace).tokens

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(target, tokens, workspace), step(target, tokens, None))
