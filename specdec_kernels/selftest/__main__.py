"""``python -m specdec_kernels.selftest [backend ...]``."""

from __future__ import annotations

import sys

import torch

from specdec_kernels.ops import BACKENDS
from specdec_kernels.selftest import run


def main(backends: list[str]) -> None:
    """Print a line for each backend; fail if one is wrong."""
    failed = False
    for name in backends or [name for name, backend in BACKENDS.items() if not backend.reason]:
        BACKENDS[name].require(torch.device("cpu"))
        report = run(name)  # type: ignore[arg-type]
        print(f"{name} ({BACKENDS[name].detail}): {report.requests} compared, {report.too_close} too close to call, "
              f"{len(report.wrong)} wrong")  # fmt: skip
        failed |= bool(report.wrong)
        for line in report.wrong[:10]:
            print("  " + line)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
