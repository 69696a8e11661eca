"""Whether a plugin goes into a stack: it knows that release, for what it replaces is internal, and is fast here."""

from __future__ import annotations

import logging
from importlib import metadata

import torch

from specdec_kernels.ops.backends import BACKENDS

_logger = logging.getLogger(__name__)


def fits(package: str, versions: tuple[str, ...]) -> bool:
    """Whether the installed release of ``package`` is one of ``versions`` and compiled operators run on this machine's
    device; a warning where that is not so.

    A local part (``0.33.0+cu129``) says how a release was built and is not compared.
    """
    installed = metadata.version(package)
    reason = ""
    if installed.partition("+")[0] not in versions:
        reason = f"its plugin knows {' and '.join(versions)}"
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        reasons = {name: backend.reason for name, backend in BACKENDS.items() if backend.device == device}
        if all(reasons.values()):
            reason = "; ".join(f"backend {name}: {why}" for name, why in reasons.items())
    if reason:
        _logger.warning("specdec-kernels changes nothing in %s %s: %s", package, installed, reason)
    return not reason
