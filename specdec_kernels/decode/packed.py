"""Linear layers of a model on a CPU with their weights as oneDNN multiplies by them.

PyTorch hands oneDNN a weight as it lies and has it reordered in every call, which for the few rows of a decoding step
takes longer than the product. Reordered once, a pass takes three quarters of the time and less, and a row more costs
next to nothing: the LM head of SmolLM2 over five rows 1.0 ms where it took 3.0, over one row 0.8 where it took 1.9.

A weight that changes is reordered again by the next call. Every call looks at the weight's version, a counter that
PyTorch raises with every change in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

_is_compiling = torch.compiler.is_dynamo_compiling


class _VersionedParameter(nn.Parameter):
    """A parameter whose version also tells of what is done to it through ``.data``."""

    @property
    def data(self) -> Tensor:
        """The same memory without gradients, and with the same version, which ``Parameter.data`` has not."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        torch.autograd.graph.increment_version(self)


class _Packed(NamedTuple):
    """A packed weight, and what it was made of."""

    product: Tensor
    weight: Tensor
    version: int
    address: int


class PackedLinear(nn.Linear):
    """A linear layer that multiplies by its packed weight; see :func:`pack_linear`, which makes them."""

    _packed: _Packed | None = None

    def pack(self) -> Tensor | None:
        """The weight as it is now, packed; None where it no longer can be."""
        weight = self.weight
        if cannot_pack(weight):
            self._packed = None
            return None
        weight.__class__ = _VersionedParameter
        # An operator that torch.compile itself freezes linear layers to.
        product: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self._packed = _Packed(product, weight, weight._version, weight.data_ptr())
        return product

    def forward(self, x: Tensor) -> Tensor:
        """As :class:`torch.nn.Linear`."""
        weight, bias, packed = self.weight, self.bias, self._packed
        if _is_compiling() or (
            torch.is_grad_enabled()
            and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
        ):
            return super().forward(x)
        if (
            packed is not None
            and packed.weight is weight
            and packed.version == weight._version
            and packed.address == weight.data_ptr()
        ):
            product: Tensor | None = packed.product
        else:
            product = self.pack()
        if product is None:
            return super().forward(x)
        try:
            result: Tensor = torch.ops.mkldnn._linear_pointwise(x, product, bias, "none", [], "")
        except (RuntimeError, IndexError):  # what oneDNN does not multiply: PyTorch does, or says what is wrong
            return super().forward(x)
        return result

    def __getstate__(self) -> dict[str, Any]:
        """Without the packed weight, which can be neither copied nor written and is made again when it is needed."""
        return {name: value for name, value in vars(self).items() if name != "_packed"}


def cannot_pack(weight: Tensor) -> str:
    """Why such a weight is not packed; empty where it is."""
    if type(weight) not in (nn.Parameter, _VersionedParameter):
        return f"it is a {type(weight).__name__}, not a Parameter"
    if weight.device.type != "cpu":
        return f"it is on {weight.device}"
    if weight.dtype != torch.bfloat16:
        return f"its dtype is {weight.dtype}, not torch.bfloat16"
    if weight.is_inference():
        return "it was made under torch.inference_mode, where changes leave no trace"
    if weight.is_shared():
        return "it is shared with other processes, whose changes leave no trace"
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 here"
    return ""


def pack_linear(model: Any) -> Any:
    """Pack the weights of all linear layers of a model that can be, in place.

    The layers stay what they were in all else: they have the same parameters, and share them with the same others. A
    weight that is changed, moved, cast or replaced is packed again by the next call, or used as it is where it cannot
    be. So is every weight where gradients are wanted: nothing is faster then. A copy of a layer packs its own weight.

    Only what leaves the weight's version alone is not seen: writing to its memory by NumPy, DLPack or its storage, or
    by another tensor that it was assigned from (``weight.data = tensor``).

    Args:
        model: a :class:`torch.nn.Module`. Layers stay as they are where their weight is not a bfloat16
            :class:`torch.nn.Parameter` on a CPU, was made under ``torch.inference_mode``, or has its memory in common
            with another parameter that is not the same object.

    Returns:
        The model.
    """
    # Two parameters over the same memory do not share their version.
    at: dict[int, Tensor] = {}
    ambiguous = {
        parameter.data_ptr()
        for parameter in model.parameters()
        if at.setdefault(parameter.data_ptr(), parameter) is not parameter
    }
    for layer in model.modules():
        if type(layer) is nn.Linear and not cannot_pack(layer.weight) and layer.weight.data_ptr() not in ambiguous:
            layer.__class__ = PackedLinear
            cast(PackedLinear, layer).pack()
    return model
