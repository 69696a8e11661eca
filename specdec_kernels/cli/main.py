"""The command line."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
console = Console()


class DrafterKind(StrEnum):
    """What proposes tokens."""

    auto = "auto"
    model = "model"
    lookup = "lookup"
    tree = "tree"
    static_tree = "static-tree"
    medusa = "medusa"
    none = "none"


class Precision(StrEnum):
    """Number format of the models."""

    bfloat16 = "bfloat16"
    float32 = "float32"


class RuleKind(StrEnum):
    """How drafts are verified."""

    token = "token"
    block = "block"
    coupled = "coupled"


class Subject(StrEnum):
    """What is timed."""

    kernels = "kernels"
    trees = "trees"
    text = "text"
    adaptive = "adaptive"


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer. Without one, the built-in prompts are measured.")] = "",
    target: Annotated[str, typer.Option(help="smollm2, or the path of a transformers checkpoint.")] = "smollm2",
    draft: Annotated[str | None, typer.Option(help="Path of a drafting model; default: the one trained here.")] = None,
    drafter: Annotated[
        DrafterKind,
        typer.Option(
            help="auto: lookup where the text repeats itself, else the model. tree: the model, drafting trees that "
            "follow what is drafted; static-tree: the same tree every step. medusa: heads, drafting a static tree."
        ),
    ] = DrafterKind.auto,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy. [default: 0; measured: 0, 0.8]")
    ] = None,
    num_draft: Annotated[
        int | None,
        typer.Option(min=0, help="Drafts a step at most. [default: chosen step by step; of a tree, 15]"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 128,
    seed: Annotated[
        int,
        typer.Option(help="The text is a function of it and of what is drafted; with --rule coupled of it alone."),
    ] = 0,
    rule: Annotated[RuleKind, typer.Option(help="How drafts are verified. None changes the law of the text.")] = (
        RuleKind.block
    ),
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the so many likeliest tokens; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens with this mass; 1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Sample from tokens this likely next to the best; 0 is off.")] = 0.0,
    fixed_rows: Annotated[
        int | None, typer.Option(min=1, help="Score in windows of so many rows: the text depends on no drafter.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Of the models.")] = Precision.bfloat16,
    compare: Annotated[bool, typer.Option("--compare", help="Run with and without drafts, print both rates.")] = False,
    show_tree: Annotated[
        bool, typer.Option("--show-tree", help="After the answer, picture its most accepted tree of drafts.")
    ] = False,
) -> None:
    """Stream text from a language model, decoded speculatively."""
    from specdec_kernels.cli import generate as commands

    settings = commands.Settings(
        target, draft, drafter, num_draft, max_new_tokens, seed, fixed_rows, precision, rule.value, top_k, top_p, min_p
    )
    try:
        session = commands.Session(settings, console)
        if show_tree and (compare or not prompt):
            raise ValueError("show_tree needs a prompt, and no --compare")
        if prompt and compare:
            commands.compare(session, prompt, temperature or 0.0)
        elif prompt:
            commands.write(session, prompt, temperature or 0.0, show_tree)
        else:
            commands.measure(session, (0.0, 0.8) if temperature is None else (temperature,))
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(2) from None


class Device(StrEnum):
    """Where tensors are."""

    cpu = "cpu"
    cuda = "cuda"


@app.command()
def bench(
    subject: Annotated[
        Subject,
        typer.Argument(
            help="kernels: verification of chains, beside PyTorch, transformers and reading the same rows. "
            "trees: their kernels, and text. text: decoding, by rule. "
            "adaptive: the choice of the number of drafts, on equal texts."
        ),
    ] = Subject.kernels,
    out: Annotated[Path, typer.Option(help="Directory for the JSON and the plot.")] = Path("bench/results"),
    device: Annotated[Device, typer.Option(help="cuda: time the kernels on the GPU.")] = Device.cpu,
    quick: Annotated[bool, typer.Option("--quick", help="Kernels: one vocabulary; on the CPU no files.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Text, adaptive: texts a prompt at a temperature.")] = 3,
) -> None:
    """Time this library beside what it replaces, in one run."""
    if device == Device.cuda:
        from specdec_kernels.bench.gpu import main as on_gpu

        try:
            if subject != Subject.kernels:
                raise ValueError(f"device must be cpu for {subject.value!r}: it is timed there, got 'cuda'")
            on_gpu(out, quick, console)
        except (ValueError, RuntimeError) as error:
            console.print(f"[red]error:[/red] {error}", highlight=False)
            raise typer.Exit(2) from None
    elif subject == Subject.text:
        from specdec_kernels.bench.text import main as decode

        decode(out, seeds, console)
    elif subject == Subject.adaptive:
        from specdec_kernels.bench.adaptive import main as adapt

        adapt(out, seeds, console)
    elif subject == Subject.trees:
        from specdec_kernels.bench.trees import main as grow

        grow(out, console)
    else:
        from specdec_kernels.bench.run import main

        main(out, quick, console)


@app.command()
def selftest(
    device: Annotated[Device, typer.Option(help="Where the backends are tested.")] = Device.cpu,
    backend: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Random batches of chains; of trees half as many.")] = 120,
) -> None:
    """Hold backends against the float64 oracle, decision by decision; on a GPU also graphs, waits and launches."""
    from specdec_kernels.cli.selftest import report

    try:
        healthy = report(console, device.value, backend or (), count)
    except (ValueError, RuntimeError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(2) from None
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
