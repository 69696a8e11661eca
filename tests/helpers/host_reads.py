"""Counts on a CPU what would wait for a GPU.

Where the host reads a tensor of a device, it waits for all that was launched before. On a CPU a read is free, and
tensors that would lie on the device are not to be told from those that would not: so what descends from the
parameters of a model, and what is moved to a model's device, is marked, and says of itself that it is not on the CPU,
so that the code takes the ways that it takes on a device. Reads of marked tensors are counted.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from specdec_kernels import tensors as tensors_module

ATEN = torch.ops.aten
#: What the size of the result is read for.
READING_OPS = {ATEN.nonzero, ATEN.masked_select, ATEN._unique2, ATEN.unique_dim, ATEN.equal}
IS_CPU = torch.Tensor.is_cpu.__get__
_T = torch.Tensor
READING_METHODS = {_T.tolist, _T.cpu, _T.numpy, _T.item, _T.__bool__, _T.__int__, _T.__float__, _T.__index__}


def tensors(*values):
    return [x for x in tree_flatten(values)[0] if isinstance(x, torch.Tensor)]


def on_device(*values):
    return any(isinstance(x, torch.nn.Parameter) or getattr(x, "descends", False) for x in tensors(*values))


TO_DEVICE = tensors_module.to_device


def _to_device(values, dtype, device):
    """Marked, unless it is meant for the CPU whatever the model's device is."""
    made = TO_DEVICE(values, dtype, device)
    made.descends = device is not tensors_module.CPU
    return made


class HostReads:
    """Reads within a ``with`` block; ``found`` says where each was made."""

    def __enter__(self):
        self.found = []
        self._users = [
            module
            for module in list(sys.modules.values())
            if getattr(module, "to_device", None) is tensors_module.to_device
        ]
        for module in self._users:
            module.to_device = _to_device
        self._modes = (_Reads(self.found), _Descent(self.found))
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        for module in self._users:
            module.to_device = TO_DEVICE


def _place():
    """The innermost line of this project's or transformers' that is being run."""
    for frame in reversed(traceback.extract_stack()):
        if "specdec_kernels" in frame.filename or "transformers" in frame.filename:
            return f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"
    return "elsewhere"


class _Reads(TorchFunctionMode):
    def __init__(self, found):
        self._found = found

    def __torch_function__(self, function, kinds, arguments=(), named=None):
        if function == IS_CPU and on_device(arguments[0]):
            return False
        if function in READING_METHODS and on_device(arguments[0]):
            self._found.append(_place())
        return function(*arguments, **(named or {}))


class _Descent(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, function, kinds, arguments=(), named=None):
        named = named or {}
        descends = on_device(arguments, named)
        if descends:
            by_mask = function.overloadpacket is ATEN.index and any(
                index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1]
            )
            if by_mask or function.overloadpacket in READING_OPS:
                self._found.append(_place())
        results = function(*arguments, **named)
        if descends:
            for result in tensors(results):
                result.descends = True
        return results
