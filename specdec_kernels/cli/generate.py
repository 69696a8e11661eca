"""``specdec generate``: stream an answer, compare with plain decoding, measure the built-in prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from rich.color import ColorSystem
from rich.console import Console
from rich.progress import Progress
from rich.style import Style
from rich.table import Table
from rich.text import Text

from specdec_kernels.cli.consoles import console, notes
from specdec_kernels.cli.models import (
    DRAFTING,
    WITH_SIBLINGS,
    DrafterName,
    check_device,
    check_drafter,
    load_drafter,
    load_target,
    model_path,
)
from specdec_kernels.cli.prompts import PROMPTS
from specdec_kernels.cli.text_stream import TextStream
from specdec_kernels.cli.tree_view import ACCEPTED, DRAWN, REJECTED, Watched, picture
from specdec_kernels.contract import Level, Purpose, counter_tag
from specdec_kernels.decode import Statistics, Target, Token, TransformersTarget, stream
from specdec_kernels.decode.requests import make_requests
from specdec_kernels.ops import RuleName, noise_words

#: Drafts a step at most where their number is chosen step by step, and of a tree.
MOST_DRAFTS, TREE_DRAFTS = 16, 15
#: Texts a prompt where the built-in prompts are measured at a temperature: one differs from the next by a fifth.
TEXTS = 3
#: Positions whose acceptance is shown there; few texts say anything of those behind them.
POSITIONS = 5


@dataclass(frozen=True)
class Settings:
    """The options of ``specdec generate``."""

    target: str
    draft: str | None
    drafter: DrafterName
    num_draft: int | None
    """None chooses it step by step."""
    max_new_tokens: int
    seed: int
    fixed_rows: int | None
    precision: str
    rule: RuleName = "block"
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    device: str = "cpu"

    def sampling(self, temperature: float) -> dict[str, Any]:
        """As the loop takes it."""
        return {"temperature": temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}


def check(settings: Settings, temperatures: Sequence[float]) -> None:
    """Refuse before a model is loaded what would be refused with it.

    Raises:
        TypeError, ValueError, FileNotFoundError: naming the option, what was expected and what came.
    """
    for temperature in temperatures:
        make_requests([[0]], 1, settings.seed, settings.max_new_tokens, settings.sampling(temperature))
    check_drafter(settings.drafter, model_path(settings.target), settings.draft)
    check_device(settings.device)


class Session:
    """The loaded models."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        with notes.status("loading the models"):
            self.model, self.tokenizer = load_target(
                settings.target, getattr(torch, settings.precision), settings.device
            )
            adaptive = settings.num_draft is None
            # Windows of fixed rows take chains alone.
            config = WITH_SIBLINGS if adaptive and settings.fixed_rows is None else DRAFTING
            self.drafter = load_drafter(settings.drafter, self.model, settings.draft, adaptive, config)
        self.stop_tokens = self._stop_tokens()

    def _stop_tokens(self) -> set[int]:
        configured = self.model.generation_config.eos_token_id
        stop = set(configured if isinstance(configured, list) else [configured]) | {self.tokenizer.eos_token_id}
        if "<|im_end|>" in self.tokenizer.get_vocab():
            stop.add(self.tokenizer.convert_tokens_to_ids("<|im_end|>"))
        return {token for token in stop if token is not None}

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a user's message, or of the bare text where there is no chat template."""
        if self.tokenizer.chat_template is None:
            ids: list[int] = self.tokenizer(prompt)["input_ids"]
            return ids
        message = [{"role": "user", "content": prompt}]
        templated: list[int] = self.tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=False
        )
        return templated

    def _most_drafts(self) -> int:
        if self.settings.num_draft is not None:
            return self.settings.num_draft
        return TREE_DRAFTS if self.settings.drafter in ("tree", "static-tree", "medusa") else MOST_DRAFTS

    def decode(
        self,
        prompt: str,
        temperature: float,
        drafted: bool,
        statistics: Statistics,
        seed: int | None = None,
        target: Target | None = None,
    ) -> Iterator[Token]:
        """The tokens of the answer, by the session's model unless there is another ``target``."""
        return stream(
            target or TransformersTarget(self.model, self.settings.fixed_rows),
            [self.encode(prompt)],
            drafter=self.drafter if drafted else None,
            num_draft=self._most_drafts(),
            max_new_tokens=self.settings.max_new_tokens,
            rule=self.settings.rule,
            **self.settings.sampling(temperature),
            seed=self.settings.seed if seed is None else seed,
            stop_tokens=self.stop_tokens,
            statistics=statistics,
        )


def _print_stream(session: Session, tokens: Iterator[Token], to: Console = console) -> list[int]:
    """Write tokens as they come, on a terminal coloured by who wrote them."""
    written: list[int] = []
    text = TextStream(session.tokenizer)

    def show(piece: str, style: str) -> None:
        if to.is_terminal and not to.no_color and piece:
            piece = Style.parse(style).render(piece, color_system=ColorSystem.STANDARD)
        to.file.write(piece)  # past the console's own methods, which would wrap lines and expand tabs
        to.file.flush()

    style = DRAWN
    ending = ""
    for token in tokens:
        if token.token < 0:
            ending = token.finished
            break
        written.append(token.token)
        style = ACCEPTED if token.drafted else DRAWN
        show(text.add(token.token), style)
    show(text.end(), style)
    show("\n", "none")
    if ending:
        notes.print(f"the text ends here, since the model gave no distribution of what follows ({ending})")
    return written


def _summary(statistics: Statistics) -> str:
    acceptance = " ".join(
        f"{accepted / proposed:.2f}"
        for accepted, proposed in zip(statistics.accepted_at, statistics.proposed_at, strict=True)
        if proposed
    )
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in statistics.seconds.items())
    return (
        f"{statistics.emitted} tokens, {statistics.tokens_per_second:.1f} tokens/s, "
        f"{statistics.tokens_per_step:.2f} tokens a step; accepted by position: {acceptance or '-'}; {seconds}"
    )


def write(session: Session, prompt: str, temperature: float, show_tree: bool = False) -> None:
    """Stream one answer; picture its most accepted tree of drafts."""
    statistics = Statistics()
    watched = None
    if show_tree and session.drafter is not None:
        watched = Watched(session.drafter)
        session.drafter = watched
    _print_stream(session, session.decode(prompt, temperature, True, statistics))
    notes.print(_summary(statistics), style="dim", highlight=False, soft_wrap=True)
    if watched is not None and watched.best is not None:
        draft, emitted = watched.best
        key = Text.assemble(
            ("accepted", ACCEPTED), ", ", ("drawn by the verification", DRAWN), ", ", ("rejected", REJECTED)
        )
        notes.print(key)
        notes.print(picture(draft, emitted, lambda token: str(session.tokenizer.decode([token]))))


def compare(session: Session, prompt: str, temperature: float) -> None:
    """Stream one answer, then decode it plainly; print both rates."""
    statistics, plain = Statistics(), Statistics()
    list(session.decode(prompt, temperature, True, Statistics()))  # warm up
    notes.print(Text.assemble(("drafted", ACCEPTED), " and ", ("drawn by the verification", DRAWN)))
    text = _print_stream(session, session.decode(prompt, temperature, True, statistics))
    alone = [token.token for token in session.decode(prompt, temperature, False, plain)]
    notes.print(f"with drafts:    {_summary(statistics)}", highlight=False, soft_wrap=True)
    notes.print(f"without drafts: {_summary(plain)}", highlight=False, soft_wrap=True)
    notes.print(f"speed-up {statistics.tokens_per_second / plain.tokens_per_second:.2f}x", style="bold")
    if text != alone and (temperature == 0 or session.settings.rule == "coupled"):
        _report_divergence(session, prompt, text, alone, temperature)


def _race(logits: torch.Tensor, temperature: float, seed: int, position: int) -> torch.Tensor:
    """What the coupled rule takes the largest of: docs/noise.md, the flat race."""
    streams = torch.tensor([seed]), torch.tensor([position])
    words = noise_words(*streams, counter_tag(Purpose.COUPLED, Level.TOKEN), counters=-(-len(logits) // 4))
    exponentials = -torch.log1p(-(words[0, : len(logits)].double() + 0.5) * 2.0**-32)
    return logits.double() / temperature - exponentials.log()


def _report_divergence(session: Session, prompt: str, text: list[int], alone: list[int], temperature: float) -> None:
    """Where two texts part that should be equal, and how close the two tokens were there."""
    first = next(i for i, (a, b) in enumerate(zip(text, alone, strict=False)) if a != b)
    with torch.inference_mode():
        ids = torch.tensor([session.encode(prompt) + text[:first]], device=session.model.device)
        scores = session.model(ids, logits_to_keep=1).logits[0, -1].float().cpu()
    if temperature > 0:
        scores = _race(scores, temperature, session.settings.seed, ids.shape[1])
    margin = abs(float(scores[text[first]] - scores[alone[first]]))
    notes.print(
        f"the texts part at token {first}, where what decides (logits, with their noise at a temperature) is "
        f"{margin:.3g} apart: passes over different numbers of rows round differently; --fixed-rows makes them equal",
        style="dim",
        highlight=False,
    )


def measure(session: Session, temperatures: tuple[float, ...]) -> None:
    """With and without drafts over the built-in prompts, in one run, alternating."""
    first_prompt = next(iter(PROMPTS.values()))[0]
    notes.print(Text.assemble(first_prompt + "\n", ("drafted", ACCEPTED), ", ", ("drawn", DRAWN), ":"))
    _print_stream(session, session.decode(first_prompt, temperatures[0], True, Statistics()), notes)
    table = Table(
        "temperature", "prompts", "plain tokens/s", "tokens/s", "tokens a step", "accepted by position", "speed-up"
    )
    with Progress(console=notes, transient=True) as progress:
        texts = {temperature: TEXTS if temperature > 0 else 1 for temperature in temperatures}
        task = progress.add_task("measuring", total=2 * sum(texts.values()) * sum(map(len, PROMPTS.values())))
        for temperature in temperatures:
            ratios = []
            for kind, prompts in PROMPTS.items():
                runs = {True: Statistics(), False: Statistics()}
                for seed, prompt in enumerate(texts[temperature] * prompts):
                    for drafted, statistics in runs.items():
                        for _ in session.decode(prompt, temperature, drafted, statistics, session.settings.seed + seed):
                            pass
                        progress.advance(task)
                with_drafts, plain = runs[True], runs[False]
                ratios.append(with_drafts.tokens_per_second / plain.tokens_per_second)
                positions = list(zip(with_drafts.accepted_at, with_drafts.proposed_at, strict=True))[:POSITIONS]
                table.add_row(
                    f"{temperature:g}", kind, f"{plain.tokens_per_second:.1f}", f"{with_drafts.tokens_per_second:.1f}",
                    f"{with_drafts.tokens_per_step:.2f}", " ".join(f"{a / max(1, p):.2f}" for a, p in positions),
                    f"{ratios[-1]:.2f}x",
                )  # fmt: skip
            table.add_row(
                f"{temperature:g}", "mean", "", "", "", "", f"[bold]{mean(ratios):.2f}x[/bold]", end_section=True
            )
    console.print(table)
