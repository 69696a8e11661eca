"""Tests that take ``backend`` run once for each implementation but for what their module names in ``WITHOUT``; where
there is no GPU, Triton in its interpreter and the CUDA programs on the CPU; with SPECDEC_TEST_PTX=triton or =cuda what
is compiled for a GPU of that one, executed by tests/helpers/ptx.py.

Markers say what is not run, or not every time:

- ``backends("cpu", ...)``: by these alone.
- ``brief(kept=...)``: with those parameters alone of which ``kept`` says so; with the others in ``make test-all``.
- ``interpreted(kept=...)``: likewise where Triton is interpreted, which takes it seconds for what the others do in
  milliseconds. ``interpreted(None)``: never.
- ``slow``: before all others, so that no worker is left with it in the end.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable

import torch

if not torch.cuda.is_available():
    # Before anything imports the kernels.
    os.environ["SPECDEC_EMULATE_CUDA"] = "1"
    if os.environ.get("SPECDEC_TEST_PTX") != "triton":
        os.environ["TRITON_INTERPRET"] = "1"

import pytest
from backends import on_device
from forms import EVERYTHING
from interpreter import skip_repeated_work

from specdec_kernels import ops

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a worker a core: threads that wait for each other would take turns

if "SPECDEC_TEST_PTX" in os.environ:
    import ptx

    ptx.on_cpu(os.environ["SPECDEC_TEST_PTX"], ptx.Machine(random.Random(0)))
elif not torch.cuda.is_available():
    skip_repeated_work()


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def is_interpreted(backend: object) -> bool:
    """By Triton's interpreter, or by the machine for PTX."""
    return backend in ("triton", os.environ.get("SPECDEC_TEST_PTX", "")) and ops.BACKENDS[str(backend)].device == "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    by = metafunc.definition.get_closest_marker("backends")
    names = by.args if by else [name for name in ops.BACKENDS if name not in getattr(metafunc.module, "WITHOUT", ())]
    in_interpreter = metafunc.definition.get_closest_marker("interpreted")
    if in_interpreter and in_interpreter.args == (None,):
        names = [name for name in names if not is_interpreted(name)]
    metafunc.parametrize("backend", names, indirect=True)


def runs(item: pytest.Item) -> bool:
    """Whether ``make test`` has it."""
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    names = ("brief", "interpreted") if is_interpreted(parameters.get("backend")) else ("brief",)
    markers = filter(None, map(item.get_closest_marker, names))
    return all(marker.kwargs["kept"](parameters) for marker in markers)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not EVERYTHING:
        config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
        items[:] = [item for item in items if runs(item)]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: the garbage collector need not go through it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = ops.BACKENDS[name].reason
    assert not reason, f"backend {name} must run in tests: {reason}"
    return name


@pytest.fixture
def few(backend: str) -> Callable[[int], int]:
    """How many requests of so many there are: an eighth where Triton is interpreted."""
    return lambda count: max(1, count // 8) if is_interpreted(backend) and not EVERYTHING else count


@pytest.fixture
def device(backend: str) -> str:
    return "cuda" if ops.BACKENDS[backend].device == "cuda" else "cpu"


@pytest.fixture
def verify_chain(backend: str) -> Callable[..., ops.Verified]:
    return on_device(ops.verify_chain, backend)


@pytest.fixture
def sample(backend: str) -> Callable[..., ops.Sample]:
    return on_device(ops.sample, backend)
