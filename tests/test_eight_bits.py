"""Drafters with weights in eight bits."""

import pytest
import torch
from torch import nn

from specdec_kernels.decode.drafters.eight_bits import EightBitLinear, in_eight_bits


@pytest.mark.parametrize("lead", [(1,), (3,), (EightBitLinear.FEW,), (EightBitLinear.FEW + 1,), (2, 2), (1, 1), (2, 5)])
def test_a_product_is_the_one_of_the_rounded_weights(lead):
    torch.manual_seed(len(lead) + lead[0])
    weight, x = torch.randn(64, 96).bfloat16(), torch.randn(*lead, 96).bfloat16()
    weight[7] = 0
    weight[8] *= 1e-4
    layer = EightBitLinear(weight)
    few = x[..., 0].numel() <= layer.FEW
    read = layer.eight_bits.double() * layer.scale.double()[:, None] if few else weight.double()
    exact = x.double() @ read.T
    size = x.double().abs() @ read.abs().T  # what rounding is relative to
    assert layer(x).shape == (*lead, 64)
    assert layer(x).dtype == torch.bfloat16
    assert ((layer(x).double() - exact).abs() <= 2**-8 * exact.abs() + 2**-18 * size).all()
    half_a_step = layer.scale.double()[:, None] * 0.5
    assert ((layer.eight_bits * layer.scale.double()[:, None] - weight.double()).abs() <= 1.01 * half_a_step).all()
    assert not layer(x)[..., 7].any()


@pytest.mark.parametrize(
    ("weight", "got"),
    [
        (torch.zeros(64, 60, dtype=torch.bfloat16), r"torch.bfloat16 \[64, 60\] on cpu"),
        (torch.zeros(33, 64, dtype=torch.bfloat16), r"\[33, 64\]"),
        (torch.zeros(64, 64), r"torch.float32"),
        (torch.zeros(64, 64, dtype=torch.bfloat16, device="meta"), r"on meta"),
    ],
)
def test_what_the_kernel_could_not_read_is_refused(weight, got):
    with pytest.raises(ValueError, match=r"weight must be bfloat16 on the CPU .* multiples of 32, got .*" + got):
        EightBitLinear(weight)


def test_every_linear_layer_of_a_copy():
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ModuleList([nn.Linear(32, 64, bias=False)])).bfloat16()
    copied = in_eight_bits(model)
    assert sum(isinstance(layer, EightBitLinear) for layer in copied.modules()) == 2
    assert not any(isinstance(layer, nn.Linear) for layer in copied.modules())
    assert sum(isinstance(layer, nn.Linear) for layer in model.modules()) == 2
