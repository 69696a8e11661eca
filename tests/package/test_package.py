"""What is built and installed, as far as it takes no compiler; the rest is `make package`."""

from __future__ import annotations

import platform
import sys
import tomllib

import package
import pytest
from processes import run_python

from specdec_kernels import extras
from specdec_kernels.cli import models


@pytest.fixture
def build_backend(monkeypatch):
    monkeypatch.syspath_prepend(str(package.ROOT))
    import build_backend

    return build_backend


def test_an_sdist_has_what_a_wheel_is_made_of(tmp_path):
    assert package.missing_from_sdist(package.build_sdist(tmp_path)) == []


def environment(tmp_path, monkeypatch, build_backend, version):
    """Where a build looks: in its own packages, and in those of the environment that it is for."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "of the build")])
    monkeypatch.setattr(build_backend.sysconfig, "get_path", lambda name: str(tmp_path / "environment"))
    torch = tmp_path / "environment" / "torch"
    torch.mkdir(parents=True)
    (torch / "version.py").write_text(f"__all__ = []\n__version__ = '{version}'\ndebug = False\n")
    return torch


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0a0"])
def test_a_torch_that_is_there_is_built_with(tmp_path, monkeypatch, build_backend, version):
    torch = environment(tmp_path, monkeypatch, build_backend, version)
    assert build_backend.torch_folder() == torch
    assert build_backend._torch_where_there_is_none() == []


def test_else_one_is_asked_for(tmp_path, monkeypatch, build_backend):
    torch = environment(tmp_path, monkeypatch, build_backend, "2.9.1+cu128")
    assert build_backend._torch_where_there_is_none() == ["torch>=2.10"], "it is too old"
    (torch / "version.py").unlink()
    assert build_backend._torch_where_there_is_none() == ["torch>=2.10"]


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "ppc64le")])
def test_other_platforms_are_refused(monkeypatch, build_backend, system, machine):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(RuntimeError, match=f"needs Linux on x86_64 or .* aarch64, got {system} {machine}"):
        build_backend.get_requires_for_build_wheel()


def without(*packages):
    """Code that runs where these are not installed."""
    return f"import sys\nfor name in {packages}: sys.modules[name] = None\n"


@pytest.mark.parametrize(
    ("code", "missing", "extra"),
    [
        ("import specdec_kernels.decode", "transformers", "decode"),
        ("import specdec_kernels.integrations.transformers", "transformers", "decode"),
        ("from specdec_kernels.cli import run; run()", "typer", "cli"),
        ("from specdec_kernels.bench.machine import require_plots; require_plots()", "matplotlib", "plots"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(code, missing, extra):
    result = run_python("-c", without(missing) + code)
    assert result.stderr.splitlines()[-1].endswith(
        f"{missing} is not installed: pip install 'specdec-kernels[{extra}]' brings it"
    )
    project = tomllib.loads((package.ROOT / "pyproject.toml").read_text())["project"]
    assert any(line.startswith(missing) for line in project["optional-dependencies"][extra])


def test_other_errors_of_an_import_stay_what_they_are():
    with pytest.raises(ModuleNotFoundError, match="No module named 'specdec_kernels"), extras.brought_by("cli"):
        import specdec_kernels.nothing  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name"), extras.brought_by("cli"):
        from specdec_kernels.version import nothing  # noqa: F401


def test_weights_that_are_not_installed_are_named_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    target = models.target_path(models.SMOLLM2)
    for kind in ("auto", "model", "tree", "medusa", "eagle3"):
        with pytest.raises(FileNotFoundError, match=r"specdec-demo-weights, .*: pip install ./demo_weights"):
            models.check_drafter(kind, target, None)
    for kind in ("lookup", "none"):
        models.check_drafter(kind, target, None)


def test_without_the_native_module():
    """It is made for one Python; the libraries serve all of them."""
    code = """
import torch
from specdec_kernels import selftest
from specdec_kernels.cli.doctor import _build_facts
from specdec_kernels.decode.drafters import NGramDrafter
from specdec_kernels.ops import BACKENDS
assert BACKENDS["cpu"].reason == "", BACKENDS["cpu"].reason
report = selftest.run("cpu", "cpu", count=12)
assert report.requests and not report.wrong, report
session = NGramDrafter().begin([[1, 2, 3, 1, 2]], None)
session.commit([[3]], None)
print(session._histories.indices[0].continuation(4), *_build_facts())
"""
    result = run_python("-c", without("specdec_kernels._native") + code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[1, 2, 3, 1] not built:\n"
