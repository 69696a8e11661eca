"""A random tenth of the mutants, another one for every commit; all of them by ``make mutants``."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
import run

SHARE = 0.1


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    return run.Copy(tmp_path_factory.mktemp("tree"))


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [x for x in run.chosen(SHARE, run.commit()) if x.layer != run.NVCC], ids=str)
def test_a_mutant_is_killed(copy, mutant):
    assert copy.survives(mutant) == ""


def test_the_tables_are_of_this_tree(request):
    """Tests that kill them are there with these parameters, as far as any of theirs are collected."""
    mutants = run.all_mutants()
    assert {str(mutant): flaw for mutant in mutants if (flaw := mutant.flaw())} == {}
    assert [name for name, count in Counter(map(str, mutants)).items() if count > 1] == []
    assert len(mutants) >= 60
    collected = {item.nodeid for item in request.session.items}
    functions = {name.split("[")[0] for name in collected}
    named = {test for mutant in mutants if (test := mutant.test).split("[")[0] in functions}
    assert named - collected - functions == set()


def test_a_change_that_changes_nothing_survives(copy):
    """The control; and what is no test, or no code, kills nothing."""
    passes = "tests/ops/test_noise.py::test_oracle_known_answers"
    comment = run.Mutant("", "", "specdec_kernels/oracle/noise.py", "@dataclass\n", "@dataclass  # nothing\n", passes)
    assert copy.survives(comment) == f"it lives: {passes} passes"
    nowhere = run.Mutant("", "", comment.file, comment.old, comment.new, f"{passes}[no such parameter]")
    assert "does not run" in copy.survives(nowhere)
    gone = run.Mutant("", "", comment.file, "this is not there", "", passes)
    assert copy.survives(gone) == f"{comment.file} has its text 0 times"
