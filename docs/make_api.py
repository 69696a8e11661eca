"""Writes docs/api.md and docs/modules.md from signatures and docstrings: ``python docs/make_api.py``."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
#: Modules whose ``__all__`` is public, or all that they define where there is none.
MODULES = (
    "specdec_kernels",
    "specdec_kernels.decode",
    "specdec_kernels.decode.drafters",
    "specdec_kernels.integrations.transformers",
    "specdec_kernels.integrations.vllm",
    "specdec_kernels.integrations.flashinfer",
    "specdec_kernels.integrations.sglang",
    "specdec_kernels.lossy",
)
#: Folders of Python, in the order of the layers; see docs/development.md.
FOLDERS = ("specdec_kernels", "triton_kernels", "bench")


def first_paragraph(text: str | None) -> str:
    """The first paragraph of a docstring, as Markdown in one line."""
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split())
    paragraph = re.sub(r":\w+:`~?([\w.]+)`", lambda found: f"`{found[1].rsplit('.', 1)[-1]}`", paragraph)
    return paragraph.replace("``", "`").replace("|", "\\|")


def first_sentence(text: str | None) -> str:
    """Its first sentence."""
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", first_paragraph(text))[0]


def arguments(value: Any) -> str:
    """The names and defaults of what a function or a class is called with; empty where that says nothing."""
    if not callable(value) or getattr(value, "_is_protocol", False):
        return ""
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return ""
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    text = str(inspect.Signature(bare))[1:-1].replace("<factory>", "...")
    text = re.sub(r"=(\w+)\([^()]*\)", r"=\1()", text)  # a default that is a dataclass, without its own defaults
    return f"`{text}`" if text else ""


def public(module: ModuleType) -> list[str]:
    """The names that a module offers."""
    names: list[str] = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return sorted((name for name in names if not name.startswith("__")), key=str.lower)


def api() -> str:
    """docs/api.md."""
    lines = ["# Public functions and classes", "", *written_by(), "Shapes, dtypes, errors, sources: `help(name)`."]
    for name in MODULES:
        module = importlib.import_module(name)
        lines += ["", f"## {name}", first_paragraph(module.__doc__), "", "| name | called with | |", "|---|---|---|"]
        for item in public(module):
            value = getattr(module, item)
            documented = inspect.isclass(value) or inspect.isfunction(value)
            said = first_sentence(value.__doc__) if documented else "A type: " + described(value)
            lines.append(f"| `{item}` | {arguments(value) if documented else ''} | {said} |")
    return "\n".join(lines) + "\n"


def described(value: Any) -> str:
    """A type alias as it is written."""
    text = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", str(value)).replace("|", "\\|")
    return f"`{text}`"


def modules() -> str:
    """docs/modules.md."""
    lines = ["# Modules", "", *written_by(), "The layers and the C++: [development.md](development.md)."]
    for folder in FOLDERS:
        lines += ["", f"## {folder}", "| | |", "|---|---|"]
        for path in sorted((ROOT / folder).rglob("*.py")):
            said = first_sentence(ast.get_docstring(ast.parse(path.read_text())))
            where = path.relative_to(ROOT)
            lines.append(f"| [{where.relative_to(folder)}](../{where}) | {said} |")
    return "\n".join(lines) + "\n"


def written_by() -> list[str]:
    """What stands at the head of both."""
    return ["Written by `python docs/make_api.py` from signatures and docstrings; a test keeps it current.", ""]


PAGES = {"api.md": api, "modules.md": modules}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (ROOT / "docs" / page).write_text(make())
