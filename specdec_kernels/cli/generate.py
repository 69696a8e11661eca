"""``specdec generate``: stream an answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from rich.text import Text

from specdec_kernels.cli.consoles import console, notes, print_line
from specdec_kernels.cli.models import (
    DRAFTING,
    TREES,
    WITH_SIBLINGS,
    DrafterName,
    check_device,
    check_drafter,
    check_history,
    gguf_path,
    is_gguf,
    load_drafter,
    load_gguf,
    load_history,
    load_target,
    model_path,
    target_path,
)
from specdec_kernels.cli.tree_view import ACCEPTED, DRAWN, REJECTED, Watched, picture
from specdec_kernels.decode import Statistics, Target, Token, TransformersTarget, stream
from specdec_kernels.decode.requests import make_requests
from specdec_kernels.decode.text_stream import TextStream
from specdec_kernels.ops import RuleName

#: Drafts a step at most where their number is chosen step by step, of a tree, and of lookup and a model in one.
MOST_DRAFTS, TREE_DRAFTS, MERGED_DRAFTS = 16, 15, 6


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
    history: Path | None = None

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
    if not is_gguf(settings.target):
        model_path(settings.target)
    elif settings.fixed_rows is not None:
        raise ValueError(f"fixed_rows must be left out for a GGUF target, got {settings.fixed_rows}")
    else:
        gguf_path(settings.target)
    if settings.fixed_rows is not None and settings.drafter in TREES:
        raise ValueError(
            f"fixed_rows must be left out with drafter={settings.drafter!r}, which drafts trees, got "
            f"{settings.fixed_rows}"
        )
    check_drafter(settings.drafter, target_path(settings.target), settings.draft)
    check_device(settings.device)
    if settings.history is not None:
        check_history(settings.drafter, settings.history)


class Session:
    """The loaded models."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        dtype = getattr(torch, settings.precision)
        with notes.status("loading the models"):
            self.target: Target
            if is_gguf(settings.target):
                self.target, self.tokenizer = load_gguf(gguf_path(settings.target), settings.device)
                self.model: Any = self.target
            else:
                self.model, self.tokenizer = load_target(settings.target, dtype, settings.device)
                self.target = TransformersTarget(self.model, settings.fixed_rows)
            adaptive = settings.num_draft is None
            # Windows of fixed rows, and llama.cpp, take chains alone.
            chains = settings.fixed_rows is not None or is_gguf(settings.target)
            config = WITH_SIBLINGS if adaptive and not chains else DRAFTING
            self.shared = None if settings.history is None else load_history(settings.history, self.tokenizer)
            drafting = settings.drafter, self.model, settings.draft, adaptive, config, dtype
            self.drafter = load_drafter(*drafting, self.tokenizer, self.shared)
        self.stop_tokens = self._stop_tokens()

    def _stop_tokens(self) -> set[int]:
        stop = self.target.stop_tokens | {self.tokenizer.eos_token_id}
        if "<|im_end|>" in self.tokenizer.get_vocab():
            stop |= {self.tokenizer.convert_tokens_to_ids("<|im_end|>")}
        return {token for token in stop if token is not None}

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a user's message, or of the bare text where there is no chat template.

        Raises:
            ValueError: the template refuses such a message, or is none.
        """
        if self.tokenizer.chat_template is None:
            ids: list[int] = self.tokenizer(prompt)["input_ids"]
            return ids
        message = [{"role": "user", "content": prompt}]
        try:
            templated: list[int] = self.tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=False
            )
        except ImportError:
            raise
        except Exception as error:  # the template is a program, which raises what it likes
            raise ValueError(
                f"the chat template of {self.settings.target} must take one message, of the user, got "
                f"{type(error).__name__}: {error}"
            ) from error
        return templated

    def _most_drafts(self) -> int:
        if self.settings.num_draft is not None:
            return self.settings.num_draft
        if self.settings.drafter == "merged":
            return MERGED_DRAFTS
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
            target or self.target,
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


def print_stream(session: Session, tokens: Iterable[Token], to: Console = console) -> list[int]:
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


def summary(statistics: Statistics) -> str:
    """Rates, acceptance and times, in a line."""
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
    text = print_stream(session, session.decode(prompt, temperature, True, statistics))
    if session.shared is not None and session.settings.history is not None:
        session.shared.save(session.settings.history)
    print_line(notes, summary(statistics), style="dim")
    if watched is not None and (best := watched.best(text)) is not None:
        key = Text.assemble(
            ("accepted", ACCEPTED), ", ", ("drawn by the verification", DRAWN), ", ", ("rejected", REJECTED)
        )
        notes.print(key)
        notes.print(picture(best, lambda token: str(session.tokenizer.decode([token]))))
