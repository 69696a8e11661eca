"""Layers with a state in place of keys and values: convolutions and recurrences (Mamba, gated delta rule, LFM2).

A state cannot be cropped to fewer tokens, so a pass keeps it after every row, until it is known how many rows of each
request stay. transformers' mixers give none but the last one's, and some forget the state before a pass over several
rows; so they are called row by row, as in plain decoding. The rest of the model (MLPs, attention) still reads all rows
at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

from specdec_kernels.decode.mixing import Mixin, mix_in
from specdec_kernels.tensors import to_device


class StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """The states of one layer, each [B, ...]."""

    has_previous_state: dict[int, bool]
    is_conv_states_initialized: dict[int, bool]
    is_recurrent_states_initialized: dict[int, bool]

    def __init__(self, states: int) -> None:
        super().__init__(states)
        self.lead = 0
        """Rows of the next pass that are sure of all requests: read at once where nothing was read before."""
        self._kept: list[list[Tensor]] = []  # after so many of its rows, less those that were read at once
        self._read_at_once = 0

    def state(self) -> list[Tensor]:
        """What it is now; nothing before the first row. No pass changes these tensors."""
        return [x for states in (self.conv_states, self.recurrent_states) for x in states.values() if x is not None]

    def put(self, state: Sequence[Tensor]) -> None:
        """Go on from a state."""
        left = iter(state)
        for states in (self.conv_states, self.recurrent_states):
            for index, before in states.items():
                if before is not None:
                    states[index] = next(left, None)
        if not state:  # that of no token
            self.has_previous_state = dict.fromkeys(self.has_previous_state, False)
            self.is_conv_states_initialized = dict.fromkeys(self.is_conv_states_initialized, False)
            self.is_recurrent_states_initialized = dict.fromkeys(self.is_recurrent_states_initialized, False)

    def pass_over(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """``forward(hidden)`` of rows [B, R, H], keeping what is needed to go on from any of them."""
        at_once = 0 if self.state() else self.lead
        outputs = [forward(hidden[:, :at_once])] if at_once else []
        self._kept, self._read_at_once = [self.state()], at_once
        for row in range(at_once, hidden.shape[1]):
            self.put([x.clone() for x in self.state()])  # kernels write in place
            outputs.append(forward(hidden[:, row : row + 1]))
            self._kept.append(self.state())
        if len(self._kept) > 1 and not self._kept[0]:
            self._kept[0] = [torch.zeros_like(x) for x in self._kept[1]]
        return torch.cat(outputs, 1)

    def keep(self, counts: Sequence[int]) -> None:
        """Go on behind the first ``counts[b]`` rows of each request in the last pass."""
        own = [count - self._read_at_once for count in counts]
        if len(set(own)) == 1:
            self.put(self._kept[own[0]])
            return
        index = to_device(own, torch.int64, self._kept[-1][0].device)
        request = torch.arange(len(own), device=index.device)
        self.put([torch.stack(after)[index, request] for after in zip(*self._kept, strict=True)])

    def was_written(self, rows: int) -> bool:
        """Whether it was, in the pass over so many rows that has just ended."""
        return len(self._kept) == 1 + rows - self._read_at_once

    def forget_rows(self) -> None:
        """None of the last pass is taken back any more."""
        self._kept = []

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these requests only."""
        self.put([x[indices] for x in self.state()])

    def join(self, other: StateLayer, requests: tuple[int, int]) -> None:
        """Put another layer's requests behind one's own, so many here and there; of one that has read nothing, 0."""
        like = self.state() or other.state()
        sides = [
            layer.state() or [x.new_zeros((count, *x.shape[1:])) for x in like]
            for layer, count in zip((self, other), requests, strict=True)
        ]
        if not self.state():
            self.__dict__.update(other.__dict__)
        self.put([torch.cat(pair) for pair in zip(*sides, strict=True)])


class _RowByRow(Mixin):
    """Mixed into a mixer's class: its forward pass, with the caches that it knows or with a :class:`StateLayer`."""

    layer_idx: int

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """As of the mixer."""
        pass_over: Callable[..., Tensor] = super().forward  # type: ignore[misc]
        given = next((x for x in (*arguments, *named.values()) if isinstance(x, Cache)), None)
        layers = getattr(given, "layers", ())
        layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        if not isinstance(layer, StateLayer):
            return pass_over(hidden_states, *arguments, **named)
        if "attention_mask" in named:  # rows that are none are not kept
            named["attention_mask"] = None
        return layer.pass_over(lambda rows: pass_over(rows, *arguments, **named), hidden_states)


def step_row_by_row(model: nn.Module, layers: Collection[int]) -> None:
    """Have the mixers of some layers of a model keep their states in a :class:`StateLayer`, in place. With every other
    cache they do what they did, and have the parameters that they had."""
    if not layers:
        return
    mixers = [module for module in model.modules() if _is_mixer(module, layers)]
    for mixer in mixers:
        inner = any(other is not mixer and other in mixers for other in mixer.modules())
        if not inner:
            mix_in(_RowByRow, mixer)


def _is_mixer(module: nn.Module, layers: Collection[int]) -> bool:
    if getattr(module, "layer_idx", None) not in layers:
        return False
    names = inspect.signature(module.forward).parameters
    return isinstance(module, _RowByRow) or not names.keys().isdisjoint(("cache_params", "past_key_values"))
