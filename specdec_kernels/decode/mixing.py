"""Modules of a model that do something more in this project's passes, and with everybody else what they did."""

from __future__ import annotations

from functools import cache
from typing import Any


class Mixin:
    """What is mixed into a module's class in place: the module keeps its parameters, and copies and files of it are of
    the same kind."""

    parts: tuple[Any, Any]
    """This class and the module's own."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _without_anything, self.parts, self.__dict__


@cache
def _mixed(mixin: Any, kind: Any) -> Any:
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__, "parts": (mixin, kind)})


def mix_in(mixin: Any, module: Any) -> None:
    """Mix a class into a module's, under the same name, unless it is there already."""
    if not isinstance(module, mixin):
        kind: Any = type(module)
        module.__class__ = _mixed(mixin, kind)


def _without_anything(mixin: Any, kind: Any) -> Any:
    made = kind.__new__(kind)
    made.__class__ = _mixed(mixin, kind)
    return made
