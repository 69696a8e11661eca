"""Packed linear layers multiply as the others do."""

from __future__ import annotations

import pytest
import torch
from test_decode import tiny
from torch import nn

from specdec_kernels.decode import TransformersTarget, generate, pack_linear
from specdec_kernels.decode.packed import PackedLinear, cannot_pack

packs = pytest.mark.skipif(
    bool(reason := cannot_pack(torch.empty(1, dtype=torch.bfloat16))), reason=f"bfloat16 is not packed: {reason}"
)


@packs
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(0, 40), (1, 40), (2, 3, 40), (37, 40)])
def test_products_are_those_of_the_layer(shape, bias):
    torch.manual_seed(1)
    linear = nn.Linear(40, 24, bias=bias, dtype=torch.bfloat16)
    packed = PackedLinear(linear)
    x = torch.randn(shape, dtype=torch.bfloat16)
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    got = packed(x)
    assert got.dtype == torch.bfloat16
    assert got.shape == exact.shape
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=2**-8)
    assert packed.weight is linear.weight
    assert not got.requires_grad


@packs
def test_a_packed_model_goes_on_as_it_did():
    model = tiny(1, layers=2).bfloat16()
    tied = model.get_input_embeddings().weight
    model.lm_head.weight = tied
    prompt = torch.arange(1, 9)[None]
    with torch.inference_mode():
        before = model(prompt).logits
        assert pack_linear(model) is model
        assert isinstance(model.get_output_embeddings(), PackedLinear)
        assert model.get_output_embeddings().weight is tied
        torch.testing.assert_close(model(prompt).logits, before, rtol=0.02, atol=0.1)
    assert len(generate(TransformersTarget(model), [[1, 2, 3]], max_new_tokens=8, seed=1)[0].tokens) == 8


def test_what_cannot_be_packed_stays_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta", dtype=torch.bfloat16))
    before = list(model)
    assert list(pack_linear(model)) == before
    with pytest.raises(ValueError, match=r"linear cannot be packed: its dtype is torch.float32, not torch.bfloat16"):
        PackedLinear(model[0])
    with pytest.raises(ValueError, match="it is on meta"):
        PackedLinear(model[1])
