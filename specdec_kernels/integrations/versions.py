"""Which releases of a stack a plugin was written against: the seams are internal to the stack and move."""

from __future__ import annotations

import logging
from importlib import metadata

_logger = logging.getLogger(__name__)


def known(package: str, versions: tuple[str, ...]) -> bool:
    """Whether the installed release of ``package`` is one of ``versions``; a warning where it is not.

    A local part (``0.33.0+cu129``) says how a release was built and is not compared.
    """
    installed = metadata.version(package)
    if installed.partition("+")[0] in versions:
        return True
    _logger.warning(
        "specdec-kernels changes nothing in %s %s: its plugin knows %s", package, installed, " and ".join(versions)
    )
    return False
