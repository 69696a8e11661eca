"""The command line: ``specdec generate``, ``specdec bench``, ``specdec doctor``."""

import sys

from specdec_kernels.extras import brought_by


def run() -> None:
    """Run it; where a package is missing, say in a line which extra brings it."""
    try:
        with brought_by("cli"):
            from specdec_kernels.cli.main import app
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")
    app()
