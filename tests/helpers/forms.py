"""What ``make test`` runs of what ``make test-all`` does: the same cases in fewer forms, so that it takes minutes."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")

EVERYTHING = bool(os.environ.get("SPECDEC_TEST_EVERYTHING"))


def some(few: T, everything: T) -> T:
    """The number that ``make test`` takes, or that of ``make test-all``."""
    return everything if EVERYTHING else few
