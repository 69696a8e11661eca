"""Where figures come from."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from specdec_kernels.extras import brought_by
from specdec_kernels.ops import BACKENDS
from specdec_kernels.ops.backends import NATIVE_LIBRARY
from specdec_kernels.version import __version__


def machine() -> dict[str, Any]:
    """Processor, threads, versions and backend."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
        "specdec_kernels": __version__,
        "backend": BACKENDS["cpu"].detail,
    }


def require_plots() -> None:
    """Whether plots can be drawn, asked before anything is timed.

    Raises:
        ModuleNotFoundError: naming what brings matplotlib.
    """
    with brought_by("plots"):
        import matplotlib

    matplotlib.use("Agg")


def require_floor() -> None:
    """Load what the floor is timed with.

    Raises:
        RuntimeError: it is not there, since this is no checkout.
    """
    library = NATIVE_LIBRARY.with_name("libspecdec_bench.so")
    if not library.is_file():
        raise RuntimeError(f"the floor is timed with {library.name}, which needs a checkout: pip install -e .")
    torch.ops.load_library(str(library))


def save(out: Path | None, name: str, where: dict[str, Any], **results: Any) -> None:
    """Write ``out/name.json``, the machine first; nothing where nobody named a directory."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({"machine": where, **results}, indent=1) + "\n")
