"""The feature drafter with weights of eight bits, for CPUs: a draft takes as long as its weights take to read and its
operators to start, so the layer is one operator in C++, and no draft changes the distribution of the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.decode.drafters.feature_model import FeatureModel
from specdec_kernels.decode.packed import pack_linear
from specdec_kernels.ops.backends import BACKENDS

#: Rows up to which reading eight bits a weight beats a product of matrices in bfloat16 (Zen 4, two cores).
FEW = 8


def eight_bits_run(device: torch.device) -> bool:
    """Whether this machine has what :class:`EightBitModel` and :class:`EightBitLinear` need."""
    return device.type == "cpu" and not BACKENDS["cpu"].reason


def _require(device: torch.device) -> None:
    if not eight_bits_run(device):
        raise ValueError(f"eight_bits needs the C++ for CPUs: {BACKENDS['cpu'].reason or f'got a model on {device}'}")


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [outputs, inputs] and float32 scales [outputs]: what a weight is, to half of its row's scale."""
    scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / torch.iinfo(torch.int8).max
    return (weight / scale[:, None]).round().to(torch.int8).contiguous(), scale.contiguous()


class EightBitLinear:
    """A linear layer without bias: for few rows, of eight bits a weight and one scale an output.

    Equivalent to ``functional.linear(x, eight_bits * scale[:, None])`` in float32 for up to :data:`FEW` rows; products
    with more compute for longer than they read, and take the weight as it was.

    Args:
        weight: [outputs, inputs] on a CPU.

    Raises:
        ValueError: it is elsewhere, or the C++ was not built.
    """

    def __init__(self, weight: Tensor) -> None:
        _require(weight.device)
        self.weight = weight.detach()
        self.eight_bits, self.scale = rounded(self.weight.float())

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [..., outputs] of x [..., inputs]."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > FEW:
            return functional.linear(x.to(self.weight.dtype), self.weight).float()
        product: Tensor = torch.ops.specdec.eight_bit_product(rows.float().contiguous(), self.eight_bits, self.scale)
        return product.view(*x.shape[:-1], len(self.scale))


class EightBitModel:
    """A :class:`FeatureModel` that reads few rows by the operator ``feature_layer`` (csrc/cpu/feature_layer.cpp).

    Equivalent to ``model(...)`` with its weights rounded, in float32.

    Args:
        model: on a CPU; it reads what is more than a few rows, packed.

    Raises:
        ValueError: it is elsewhere, or the C++ was not built.
    """

    def __init__(self, model: FeatureModel) -> None:
        _require(model.shortlist.device)
        wide = {name: weight.detach().float() for name, weight in model.named_parameters()}
        # A norm's weight goes into the matrix behind it.
        norms = {"qkv": "attention_norm.weight", "gate_up": "mlp_norm.weight", "middle": "middle_norm"}
        names = ("fuse", "qkv", "output", "gate_up", "down", "middle")[: 5 + (len(model.layers) > 1)]
        folded = [wide[f"{name}.weight"] * (wide[norms[name]].flatten() if name in norms else 1.0) for name in names]
        self._weights, self._scales = map(list, zip(*(rounded(matrix) for matrix in folded), strict=True))
        self._norm = wide["norm.weight"]
        self.model = pack_linear(model)
        half = model.head_dim // 2
        self._cos, self._sin = (table[:, :half].float().contiguous() for table in (model.cos, model.sin))

    def __call__(
        self,
        embeddings: Tensor,
        features: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        past_key_values: Any,
        use_cache: bool = True,
    ) -> Tensor:
        """float32 features [B, R, H]; arguments as of :meth:`FeatureModel.forward`."""
        batch, rows, width = embeddings.shape
        cache = past_key_values.layers[0]
        if batch * rows > FEW or not cache.is_initialized:
            features = features.to(embeddings.dtype)
            wide: Tensor = self.model(embeddings, features, attention_mask, position_ids, past_key_values)
            return wide.float()
        mask = None if attention_mask is None else attention_mask[:, 0].contiguous()
        inputs = (x.float().contiguous() for x in (embeddings, features))
        outputs, keys, values = torch.ops.specdec.feature_layer(
            *inputs, self._weights, self._scales, self._norm, self._cos, self._sin, position_ids.flatten(),
            cache.keys, cache.values, mask, self.model.config.rms_norm_eps,
        )  # fmt: skip
        shape = (batch, self.model.kv_heads, rows, self.model.head_dim)
        past_key_values.update(*(new.view(shape).to(cache.keys.dtype) for new in (keys, values)), 0)
        read: Tensor = outputs.view(batch, rows, width)
        return read
