"""Operators on the device of a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from specdec_kernels import ops


def on_device(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """The op with its tensors moved to where the backend runs, and its results moved back."""
    device = "cuda" if ops.BACKENDS[backend].device == "cuda" else "cpu"

    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, (torch.Tensor, ops.DraftVocabulary)) else x

    def call(*positional: Any, **named: Any) -> Any:
        result = function(
            *(moved(x) for x in positional), **{key: moved(x) for key, x in named.items()}, backend=backend
        )
        return type(result)(*(x.cpu() for x in result))

    return call
