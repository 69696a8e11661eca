"""Weights in eight bits, for drafters on a CPU: a draft takes as long as its weights take to read, and nothing that is
drafted can change the law of the text."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

Model = TypeVar("Model", bound=nn.Module)


class EightBitLinear(nn.Module):
    """A linear layer without bias whose products with few rows read eight bits a weight, one scale an output.

    Products with more rows compute for longer than they read; they take the weight as it was.

    Equivalent to ``functional.linear(x, layer.eight_bits * layer.scale[:, None])`` for few rows, by PyTorch's own
    kernel for weights of int8, ``torch._weight_int8pack_mm``.

    Args:
        weight: bfloat16 [outputs, inputs] on a CPU, both multiples of :data:`BLOCK`.

    Raises:
        ValueError: it is another.
    """

    #: What PyTorch's kernel reads at a time; it does not look whether it may.
    BLOCK = 32
    #: Rows up to which the kernel was the faster one (8,192 x 576 and 3,072 x 576 on two Zen 4 cores).
    FEW = 6

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        if not self.takes(weight):
            raise ValueError(
                f"weight must be bfloat16 on the CPU with sizes that are multiples of {self.BLOCK}, "
                f"got {weight.dtype} {list(weight.shape)} on {weight.device}"
            )
        self.weight = weight.detach()
        wide = self.weight.float()
        scale = wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / torch.iinfo(torch.int8).max
        self.scale = scale.to(torch.bfloat16)
        self.eight_bits = (wide / self.scale[:, None]).round().clamp(-128, 127).to(torch.int8)

    @classmethod
    def takes(cls, weight: Tensor) -> bool:
        """Whether it is a weight that the kernel can read."""
        whole = not any(size % cls.BLOCK for size in weight.shape)
        return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and whole

    def forward(self, x: Tensor) -> Tensor:
        """[..., outputs] of bfloat16 [..., inputs]."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > self.FEW:
            return functional.linear(x, self.weight)
        product: Tensor = torch._weight_int8pack_mm(rows, self.eight_bits, self.scale)
        return product.view(*x.shape[:-1], len(self.weight))


def in_eight_bits(model: Model) -> Model:
    """A copy of a model whose linear layers are :class:`EightBitLinear`."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, EightBitLinear(layer.weight))
    return model
