"""What nvcc makes of the CUDA programs, executed on a CPU (tests/ptx): the same tokens as the reference's and the
oracle's, and all that threads hand each other is ordered. Without a GPU nothing else runs it."""

from __future__ import annotations

import ptx
import pytest
import versions
from forms import EVERYTHING

#: Programs that share rows, that race, and that wait for each other.
CALLS = ["sample", "verify_chain coupled", "verify_tree recursive"]


@pytest.mark.slow
def test_as_the_reference():
    versions.compiling(ptx.__file__, "cuda", "calls", *([] if EVERYTHING else [*CALLS, "--times=3"]))


@pytest.mark.slow
@pytest.mark.brief(kept=lambda parameters: False)
@pytest.mark.parametrize("arguments", [("chains", 300, 600, 2500, 20_000), ("trees", 240, 300, 2500, 20_000)])
def test_against_the_oracle(arguments):
    ptx.hold_against_the_oracle("cuda", *arguments)


@pytest.mark.slow
@pytest.mark.brief(kept=lambda parameters: False)
def test_operators():
    """The tests of all backends, but for what asks another stand-in, or has ten thousand requests of trees."""
    which = "cuda and not host_side and not dense-without and not statistics-without"
    command = "-m", "pytest", "-p", "no:cacheprovider", "tests/ops", "-k", which
    assert " passed" in versions.compiling(*command, SPECDEC_TEST_PTX="cuda", SPECDEC_TEST_EVERYTHING="")
