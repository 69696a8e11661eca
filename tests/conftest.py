"""Tests that take ``backend`` run once for each implementation but for what their module names in ``WITHOUT``; where
there is no GPU, Triton in its interpreter and the CUDA programs on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

if not torch.cuda.is_available():
    # Before anything imports the kernels.
    os.environ["TRITON_INTERPRET"] = os.environ["SPECDEC_EMULATE_CUDA"] = "1"

import pytest
from backends import on_device
from interpreter import skip_repeated_patching

from specdec_kernels import ops

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a worker a core: threads that wait for each other would take turns

if not torch.cuda.is_available():
    skip_repeated_patching()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        without = getattr(metafunc.module, "WITHOUT", ())
        metafunc.parametrize("backend", [name for name in ops.BACKENDS if name not in without], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = ops.BACKENDS[name].reason
    assert not reason, f"backend {name} must run in tests: {reason}"
    return name


@pytest.fixture
def device(backend: str) -> str:
    return "cuda" if ops.BACKENDS[backend].device == "cuda" else "cpu"


@pytest.fixture
def verify_chain(backend: str) -> Callable[..., ops.Verified]:
    return on_device(ops.verify_chain, backend)


@pytest.fixture
def sample(backend: str) -> Callable[..., ops.Sample]:
    return on_device(ops.sample, backend)
