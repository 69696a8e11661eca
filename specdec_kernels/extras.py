"""Packages that only some parts need: where one is missing, the error names the extra that brings it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

#: As in pyproject.toml.
Extra = Literal["gpu", "decode", "cli", "llama", "plots"]


@contextmanager
def brought_by(extra: Extra) -> Iterator[None]:
    """Around imports.

    Raises:
        ModuleNotFoundError: naming the package that is missing and how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if not error.name or error.name.split(".")[0] == "specdec_kernels" or "pip install" in str(error):
            raise
        missing = error.name.split(".")[0]
        raise ModuleNotFoundError(
            f"{missing} is not installed: pip install 'specdec-kernels[{extra}]' brings it", name=error.name
        ) from error
