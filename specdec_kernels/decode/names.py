"""Names that other libraries have for what is an argument here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

_MEANT = {
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "min_length": "min_new_tokens",
    "eos_token_id": "stop_tokens",
    "stop_token_ids": "stop_tokens",
    "stop": "stop_tokens (token ids)",
    "do_sample": "temperature (0 is greedy)",
    "repetition": "repetition_penalty",
    "presence": "presence_penalty",
    "frequency": "frequency_penalty",
    "num_speculative_tokens": "num_draft",
    "num_assistant_tokens": "num_draft",
    "assistant_model": "drafter",
    "draft_model": "drafter",
    "input_ids": "prompts",
    "model": "target",
    "generator": "seed",
}


def explains_names(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """A function that says which argument is meant where it is called with one that it does not have."""
    known = inspect.signature(function).parameters

    @wraps(function)
    def checked(*positional: Parameters.args, **named: Parameters.kwargs) -> Returned:
        for name in named:
            if name not in known:
                meant = f"{_MEANT[name]} is meant" if name in _MEANT else f"its arguments are {', '.join(known)}"
                raise TypeError(f"{function.__name__} has no argument {name!r}: {meant}")
        return function(*positional, **named)

    return checked
