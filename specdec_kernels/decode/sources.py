"""What an encoder has read, and passes of the decoder over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from specdec_kernels.decode import model_facts
from specdec_kernels.decode.positions import Positions, listen_for_positions, told
from specdec_kernels.decode.prompts import SourcePrompt
from specdec_kernels.tensors import padded, to_device


def sources_of(model: Any, prompts: Sequence[Sequence[int]]) -> EncodedSources | None:
    """What an encoder-decoder reads of a batch, or ``None`` for a decoder alone."""
    if not model_facts.is_encoder_decoder(model):
        return None
    sourced = [prompt for prompt in prompts if isinstance(prompt, SourcePrompt)]
    assert len(sourced) == len(prompts), "that was checked before"
    return EncodedSources(model, sourced)


def encoder_inputs(model: Any, sources: Sequence[Sequence[int] | Tensor]) -> dict[str, Tensor]:
    """Sources of one kind, which were checked, as a model's encoder takes them: ids padded behind; what it hears or
    sees in the model's dtype, as no processor of transformers makes it."""
    features = [source for source in sources if isinstance(source, Tensor)]
    ids = [source for source in sources if not isinstance(source, Tensor)]
    read = torch.stack(features).to(model.device, model.dtype) if features else padded(ids, 0, device=model.device)
    return {model.get_encoder().main_input_name: read}


class EncodedSources:
    """The sources of a batch, read once by an encoder-decoder. Calling it is a pass of the decoder, which keeps the
    keys and values of its cross-attention.

    Sources of different lengths are padded behind and masked.

    Args:
        model: an encoder-decoder of transformers.
        prompts: with their sources, which were checked.

    Raises:
        ValueError: the encoder makes more or fewer states than there are ids.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, prompts: Sequence[SourcePrompt]) -> None:
        self._model, self._takes_positions = model, model_facts.takes(model, "decoder_position_ids")
        listen_for_positions(model.get_decoder())
        sources = [prompt.source for prompt in prompts]
        self._lengths = [len(source) for source in sources if not isinstance(source, Tensor)]
        """Of each request; empty where all states are always attended to."""
        self._mask = self._mask_of(max(self._lengths, default=0), model.device)
        masked = {"attention_mask": self._mask} if self._lengths else {}
        read = model.get_encoder()(**encoder_inputs(model, sources), **masked)
        self._states: Tensor = read.last_hidden_state
        if self._lengths and self._states.shape[1] != max(self._lengths):
            raise ValueError(
                f"model must have an encoder with a state for each of {max(self._lengths)} ids, got "
                f"{self._states.shape[1]} of {type(model).__name__}"
            )
        self._cross = DynamicCache()

    def __call__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Any,
        position_ids: Tensor,
        column_positions: Tensor,
        past_key_values: Cache,
        **named: Any,
    ) -> Any:
        """As of a causal model, with the positions of all columns of the cache, [B, S], beside those of the rows."""
        if self._mask is not None:
            named["attention_mask"] = self._mask
        if self._takes_positions:
            named["decoder_position_ids"] = position_ids
        with told(Positions(position_ids, column_positions)):
            return self._model(
                encoder_outputs=BaseModelOutput(last_hidden_state=self._states),
                decoder_input_ids=input_ids,
                decoder_attention_mask=attention_mask,
                past_key_values=EncoderDecoderCache(past_key_values, self._cross),
                **named,
            )

    def select(self, slots: Sequence[int]) -> None:
        """Go on with the requests in these slots only, and no more columns than the longest of their sources has."""
        index = to_device(slots, torch.int64, self._states.device)
        self._lengths = [self._lengths[slot] for slot in slots if self._lengths]
        width = max(self._lengths, default=self._states.shape[1])
        self._states = self._states[index, :width]
        for layer in self._cross.layers:
            layer.keys, layer.values = layer.keys[index, :, :width], layer.values[index, :, :width]
        self._mask = self._mask_of(width, self._states.device)

    def join(self, other: EncodedSources) -> None:
        """Go on with the sources of another batch of the same model too, behind one's own.

        Raises:
            ValueError: what is no text is not of one length, and it is not known what of it would be padding.
        """
        if not self._lengths and self._states.shape[1:] != other._states.shape[1:]:
            raise ValueError(
                "sources of a batch must have one shape, got states of "
                f"{sorted({tuple(each._states.shape[1:]) for each in (self, other)})}"
            )
        width = max(self._states.shape[1], other._states.shape[1])
        self._project()
        other._project()
        joined = [
            (_joined(layer.keys, more.keys, width), _joined(layer.values, more.values, width))
            for layer, more in zip(self._cross.layers, other._cross.layers, strict=True)
        ]
        self._states = _joined(self._states, other._states, width)  # nothing fails from here on
        for layer, (keys, values) in zip(self._cross.layers, joined, strict=True):
            layer.keys, layer.values = keys, values
        self._lengths = self._lengths + other._lengths
        self._mask = self._mask_of(width, self._states.device)

    def _project(self) -> None:
        """Have the keys and values of the cross-attention, which the first pass makes: by one whose row is not kept."""
        if not self._cross.layers:
            batch = len(self._states)
            start = torch.zeros((batch, 1), dtype=torch.int64, device=self._states.device)
            nothing = DynamicCache()
            self(
                input_ids=start,
                attention_mask=None,
                position_ids=start,
                column_positions=start,
                past_key_values=nothing,
                use_cache=True,
            )

    def _mask_of(self, width: int, device: torch.device) -> Tensor | None:
        """int64 [B, S]: what is no padding; None where nothing is."""
        if all(length == width for length in self._lengths):
            return None
        columns = torch.arange(width, device=device)
        return (columns < to_device(self._lengths, torch.int64, device)[:, None]).long()


def _joined(x: Tensor, y: Tensor, width: int) -> Tensor:
    """Two tensors [B, ..., S, D] one behind the other, with columns of 0 up to the same width."""
    return torch.cat([functional.pad(each, (0, 0, 0, width - each.shape[-2])) for each in (x, y)])
