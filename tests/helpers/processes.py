"""Python in another process."""

from __future__ import annotations

import os
import subprocess
import sys


def run_python(*arguments, **environment):
    """A fresh interpreter, since backends are chosen at import."""
    variables = {**os.environ, **environment}
    return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=600)
