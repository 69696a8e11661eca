"""The command line.

Texts and tables go to the standard output; what is said about them, and errors, to the standard error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from specdec_kernels.cli.consoles import console, notes, print_line
from specdec_kernels.cli.models import SMOLLM2, DrafterName
from specdec_kernels.ops import RuleName
from specdec_kernels.version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

Precision = Literal["bfloat16", "float32"]
Subject = Literal[
    "kernels", "trees", "text", "adaptive", "methods", "batching", "integrations", "llama-cpp", "host"
]  # fmt: skip
Device = Literal["cpu", "cuda"]
#: What subjects of ``bench`` have options of, and what these are where they are not given.
_SEEDS, _REQUESTS, _SECONDS = 3, 200, 900.0
_BENCH_OPTIONS: dict[str, dict[str, Any]] = {
    "kernels": {"quick": False}, "text": {"seeds": _SEEDS}, "adaptive": {"seeds": _SEEDS}, "methods": {"seeds": _SEEDS},
    "batching": {"requests": _REQUESTS, "seconds": _SECONDS},
}  # fmt: skip


@contextmanager
def _errors_in_a_line() -> Iterator[None]:
    """What a caller can do wrong, or what is missing here, as one line and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError) as error:
        line = " ".join(str(error).split()) or type(error).__name__  # Python's own MemoryError says nothing
        print_line(notes, f"error: {line}", style="red")
        raise typer.Exit(2) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"specdec-kernels {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Verification of speculative decoding: text, measurements, checks."""


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to answer. Without one, the built-in prompts are measured.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="smollm2, or the path of a transformers checkpoint or of a GGUF file.")
    ] = SMOLLM2,
    draft: Annotated[
        str | None,
        typer.Option(
            help="Path of a drafting model; its tokenizer may be another.",
            show_default="for smollm2 the one trained here",
        ),
    ] = None,
    drafter: Annotated[
        DrafterName,
        typer.Option(
            help="auto: lookup where the text repeats itself, else the model. tree: the model, drafting trees that "
            "follow what is drafted; static-tree: the same tree every step. medusa: heads, drafting a static tree. "
            "eagle3: an EAGLE-3 drafter, for smollm2 alone, as the heads are. "
            "merged: lookup and the model in one tree."
        ),
    ] = "auto",
    temperature: Annotated[
        float | None,
        typer.Option(help="0 is greedy.", show_default="0; where the built-in prompts are measured, 0 and 0.8"),
    ] = None,
    num_draft: Annotated[
        int | None,
        typer.Option(min=0, help="Drafts a step at most.", show_default="chosen step by step; of a tree, 15"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer at most, in tokens.")] = 128,
    seed: Annotated[
        int,
        typer.Option(help="The text is a function of it and of what is drafted; with --rule coupled of it alone."),
    ] = 0,
    rule: Annotated[
        RuleName, typer.Option(help="How drafts are verified. None changes the distribution of the text.")
    ] = "block",
    top_k: Annotated[int, typer.Option(help="Sample from the so many likeliest tokens; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens with this mass; 1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Sample from tokens this likely next to the best; 0 is off.")] = 0.0,
    fixed_rows: Annotated[
        int | None,
        typer.Option(
            min=1, help="Score in windows of so many rows: the text depends on no drafter.", show_default="no windows"
        ),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Of the models that transformers runs.")] = "bfloat16",
    device: Annotated[Device, typer.Option(help="Where the models are.")] = "cpu",
    compare: Annotated[
        bool, typer.Option("--compare", help="Decode with and without drafts, in turns; print both rates.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=1, help="Of comparing, at most: what does not fit is left out, and told.")
    ] = 120.0,
    history: Annotated[
        Path | None,
        typer.Option(
            help="File of earlier texts, which lookups look at too; the prompt and the answer are added to it. At a "
            "temperature those of the same seed are left out, unless --rule is coupled.",
            show_default="none",
        ),
    ] = None,
    show_tree: Annotated[
        bool, typer.Option("--show-tree", help="After the answer, picture its most accepted tree of drafts.")
    ] = False,
) -> None:
    """Stream text from a language model, decoded speculatively."""
    from specdec_kernels.cli import compare as comparison
    from specdec_kernels.cli import generate as commands

    settings = commands.Settings(
        target, draft, drafter, num_draft, max_new_tokens, seed, fixed_rows, precision, rule, top_k, top_p, min_p,
        device, history,
    )  # fmt: skip
    temperatures = (temperature,) if temperature is not None else (0.0,) if prompt else (0.0, 0.8)
    with _errors_in_a_line():
        if prompt == "":
            raise ValueError("prompt must not be empty: leave it out to measure the built-in prompts")
        if show_tree and (compare or prompt is None or drafter == "none"):
            raise ValueError("show_tree needs a prompt, a drafter, and no --compare")
        if history is not None and (compare or prompt is None):
            raise ValueError("history needs a prompt, and no --compare")
        if drafter == "none" and (compare or prompt is None):
            raise ValueError("drafter must be one that drafts where it is compared with plain decoding, got 'none'")
        commands.check(settings, temperatures)
        session = commands.Session(settings)
        if prompt is None:
            comparison.measure(session, temperatures, seconds)
        elif compare:
            comparison.compare(session, prompt, temperatures[0], seconds)
        else:
            commands.write(session, prompt, temperatures[0], show_tree)


@app.command()
def bench(
    subject: Annotated[
        Subject,
        typer.Argument(
            help="kernels: verification of chains, beside PyTorch, transformers and reading the same rows. "
            "trees: their kernels, and text. text: decoding, by rule. "
            "adaptive: the choice of the number of drafts, on equal texts. "
            "methods: plain and speculative decoding, heads, batches and a drafter alone, side by side. "
            "batching: requests that come at random times, one at a time, in batches, and as they come. "
            "integrations: text inside transformers, beside its own. llama-cpp: text of llama.cpp, beside its own. "
            "host: what a call on a GPU takes the host, without one."
        ),
    ] = "kernels",
    out: Annotated[
        Path | None, typer.Option(help="Directory for JSON and plots.", show_default="nothing is written")
    ] = None,
    device: Annotated[Device, typer.Option(help="cuda: time kernels or text on the GPU.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Kernels: one vocabulary.")] = False,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Text, adaptive, methods: texts a prompt at a temperature.", show_default=f"{_SEEDS}"),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, max=200, help="Batching: how many come.", show_default=f"{_REQUESTS}")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Batching: at most; what is not served by then is cut off, and told.",
            show_default=f"{_SECONDS:g}",
        ),
    ] = None,
) -> None:
    """Time this library beside what it replaces, in one run."""
    given = {"quick": quick or None, "seeds": seeds, "requests": requests, "seconds": seconds}
    with _errors_in_a_line():
        for option, value in given.items():
            having = [name for name, defaults in _BENCH_OPTIONS.items() if option in defaults]
            if value is not None and subject not in having:
                raise ValueError(
                    f"{option} must be left out for {subject!r}: it is for {', '.join(having)}, got {value}"
                )
        if device == "cuda" and subject not in ("kernels", "text"):
            raise ValueError(f"device must be cpu for {subject!r}: it is timed there, got 'cuda'")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        name = {"kernels": "run" if device == "cpu" else "gpu"}.get(subject, subject.replace("-", "_"))
        defaults = _BENCH_OPTIONS.get(subject, {})
        arguments = [default if given[option] is None else given[option] for option, default in defaults.items()]
        options = {"device": device} if subject == "text" else {}
        measure = import_module(f"specdec_kernels.bench.{name}").main
        measure(out, *arguments, console, **options)
        if out is not None:
            print_line(notes, f"wrote to {out}")


@app.command()
def selftest(
    device: Annotated[Device, typer.Option(help="Where the backends are tested.")] = "cpu",
    backend: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Random batches of chains; of trees half as many.")] = 120,
) -> None:
    """Hold backends against the float64 oracle, decision by decision; on a GPU also graphs, waits and launches."""
    from specdec_kernels.cli.selftest import report

    with _errors_in_a_line():
        healthy = report(console, device, backend or (), count)
    if not healthy:
        raise typer.Exit(1)


@app.command()
def gpu_report(
    out: Annotated[Path, typer.Option(help="Directory for the report: Markdown, JSON, and what went wrong.")],
    dry: Annotated[
        bool, typer.Option("--dry", help="Tiny and on a CPU: shows that the report runs, and no more.")
    ] = False,
) -> None:
    """Versions, self-tests, a quick benchmark and text on one GPU, in under five minutes, whatever fails."""
    with _errors_in_a_line():
        from specdec_kernels.bench.report import run

        healthy = run(out, dry, lambda line: print_line(console, line))
    if not healthy:
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Say what runs here, which backend runs what and why the others do not."""
    from specdec_kernels.cli.doctor import report

    if not report(console):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
