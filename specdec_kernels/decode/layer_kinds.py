"""What the layers of a model attend to, and the masks that say it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer


class Kind(NamedTuple):
    """Which tokens the layers of a kind attend to."""

    name: str
    """transformers' own."""
    window: int | None = None
    """So many of the latest, the token itself among them; None for all."""
    chunked: bool = False
    """Whether a token attends to those of its own chunk of the history, which is cut into such windows."""
    states: int = 0
    """Where there are any, all that is left of the history, in place of keys and values."""

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool: whether tokens at some positions attend to others at positions that are not behind them."""
        assert self.window is not None, "else all is seen"
        return queries // self.window == keys // self.window if self.chunked else queries - keys < self.window


#: Layers that attend to the whole history.
WHOLE = Kind("full_attention")

_CHUNKED = "chunked_attention"


def layer_kinds(config: Any) -> list[Kind]:
    """Of each layer of a model's cache.

    Raises:
        ValueError: a layer keeps something else than keys and values, or states alone.
    """
    layers, known = DynamicCache(config=config).layers, (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer)
    if isinstance(count := getattr(config, "num_decoder_layers", None), int):  # T5's, where the encoder has others
        layers = (layers * count)[:count]
    if others := {type(layer).__name__ for layer in layers if type(layer) not in known}:
        raise ValueError(f"model must have layers of keys and values, or of states, got {sorted(others)}")
    text = config.get_text_config(decoder=True)
    chunked = None if getattr(text, "sliding_window", None) else getattr(text, "attention_chunk_size", None)
    names = getattr(text, "layer_types", None)
    kinds = []
    for index, layer in enumerate(layers):
        window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        inferred = WHOLE.name if window is None else _CHUNKED if chunked == window else "sliding_attention"
        name = names[index] if names else inferred
        states = layer.number_of_states if isinstance(layer, LinearAttentionLayer) else 0
        kinds.append(Kind(name, window, name == _CHUNKED, states))
    if len({kind.name for kind in kinds}) < len(set(kinds)):
        raise ValueError(f"model must have one window for all layers of a type, got {sorted(map(str, set(kinds)))}")
    return kinds


def masks_by_kind(masks: dict[Kind, Tensor], dtype: torch.dtype) -> Any:
    """Masks of bool as transformers takes them: of a dtype, and by name where there are several kinds of layers. One
    that is added to the scores has 0 where a row attends, and the lowest number elsewhere."""
    if dtype != torch.bool:
        lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)  # softmax may be in float32
        masks = {
            kind: torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)
            for kind, mask in masks.items()
        }
    return next(iter(masks.values())) if len(masks) == 1 else {kind.name: mask for kind, mask in masks.items()}
