"""Linear layers with weights of eight bits, for drafters on a CPU: a draft takes as long as its weights take to read,
and no draft changes the distribution of the text."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdec_kernels.ops.backends import BACKENDS

Model = TypeVar("Model", bound=nn.Module)

#: Rows up to which reading eight bits a weight beats a product of matrices in bfloat16 (Zen 4, two cores).
FEW = 8


def eight_bits_run(device: torch.device) -> bool:
    """Whether this machine has what :class:`EightBitLinear` needs."""
    return device.type == "cpu" and not BACKENDS["cpu"].reason


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [outputs, inputs] and float32 scales [outputs]: what a weight is, to half of its row's scale."""
    scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / torch.iinfo(torch.int8).max
    return (weight / scale[:, None]).round().to(torch.int8).contiguous(), scale.contiguous()


class EightBitLinear(nn.Module):
    """A linear layer without bias: for few rows, of eight bits a weight and one scale an output.

    Equivalent to ``functional.linear(x, eight_bits * scale[:, None])`` in float32 for up to :data:`FEW` rows; products
    with more compute for longer than they read, and take the weight as it was.

    Args:
        weight: [outputs, inputs] on a CPU.

    Raises:
        ValueError: it is elsewhere, or the C++ was not built.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        if not eight_bits_run(weight.device):
            got = BACKENDS["cpu"].reason or f"got a weight on {weight.device}"
            raise ValueError(f"eight_bits needs the C++ for CPUs: {got}")
        self.weight = weight.detach()
        self.eight_bits, self.scale = rounded(self.weight.float())

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., outputs] of x [..., inputs]."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > FEW:
            return functional.linear(x.to(self.weight.dtype), self.weight).float()
        product: Tensor = torch.ops.specdec.eight_bit_product(rows.float().contiguous(), self.eight_bits, self.scale)
        return product.view(*x.shape[:-1], len(self.scale))


def with_eight_bits(model: Model) -> Model:
    """A copy in float32 whose linear layers are :class:`EightBitLinear`, of the model's own weights.

    Raises:
        ValueError: as of :class:`EightBitLinear`.
    """
    few = copy.deepcopy(model).float()
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            setattr(few, name, EightBitLinear(layer.weight))
    return few
