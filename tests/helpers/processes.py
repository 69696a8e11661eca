"""Python in another process."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

#: A process that has imported what takes seconds and is no part of the tree: it is forked wherever a test needs a
#: Python of its own.
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "hypothesis", "pytest"])
#: Seconds that a program may take.
LIMIT = 600


def run_python(*arguments, **environment):
    """What ``python ARGUMENTS`` does with more variables in its environment, since backends are chosen at import."""
    with TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = FORKS.Process(target=_main, args=(arguments, {**os.environ, **environment}, outputs))
        process.start()
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, LIMIT)
        return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in outputs))


def _main(arguments, environment, outputs):
    for stream, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(arguments)
    if arguments[0] == "-c":
        exec(arguments[1], {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")
