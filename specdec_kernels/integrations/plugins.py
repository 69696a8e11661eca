"""Whether a plugin goes into a stack: it knows that release, for what it replaces is internal, and is fast here."""

from __future__ import annotations

import logging
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from specdec_kernels.ops.backends import BACKENDS
from specdec_kernels.ops.draft_vocabulary import DraftVocabulary

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


def draft_rows(rows: Tensor, vocab_size: int) -> dict[str, Any]:
    """Logits [.., Vd] of a draft model whose ids are the target's first, as :func:`specdec_kernels.verify_chain` takes
    them, without a copy: what is behind the target's is padding, and of what it has not the target's mass stays."""
    width = rows.shape[-1]
    if width >= vocab_size:
        return {"draft_logits": rows[..., :vocab_size]}
    return {"draft_logits": rows, "draft_to_target": _first_ids(width, vocab_size).to(rows.device)}


@cache
def _first_ids(count: int, vocab_size: int) -> DraftVocabulary:
    return DraftVocabulary(torch.arange(count), vocab_size)
