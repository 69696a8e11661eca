"""Decoding with and without drafts, in turns: one prompt, or the built-in ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import median

import torch
from rich.text import Text

from specdec_kernels.cli.consoles import Lines, console, notes, print_line
from specdec_kernels.cli.generate import Session, print_stream, summary
from specdec_kernels.cli.models import is_gguf
from specdec_kernels.cli.prompts import PROMPTS
from specdec_kernels.cli.tree_view import ACCEPTED, DRAWN
from specdec_kernels.contract import Level, Purpose, counter_tag
from specdec_kernels.decode import Statistics, Token
from specdec_kernels.ops import noise_words
from specdec_kernels.reference.noise import exponential_of

#: Pairs of texts of a prompt, where they differ or are all there is to time. One text differs from the next by a fifth.
PAIRS = 3
#: Tokens that are decoded before anything is timed.
WARM_UP = 8
#: Positions whose acceptance is shown; few texts say anything of those behind them.
POSITIONS = 5
#: A text that was cut off tells a rate if it has so many steps.
LEAST_STEPS = 4
#: What the rates of plain decoding, which does the same work all the time, may differ by in a quiet machine.
SCATTER = 0.2


@dataclass
class Comparison:
    """Pairs of texts that were decoded one right after the other, with drafts and without."""

    pairs: list[tuple[Statistics, Statistics]] = field(default_factory=list)
    empty: int = 0
    """Pairs that are left out, since a text of them has no token."""
    cut: int = 0
    """Pairs that are, since one was cut off too early."""

    @property
    def speed_up(self) -> float:
        """The median of the pairs' ratios. A slow minute of the machine falls on both texts of a pair."""
        return median(drafted.tokens_per_second / plain.tokens_per_second for drafted, plain in self.pairs)

    def rates(self, drafted: bool) -> list[float]:
        """Tokens a second of the texts with drafts, or of those without."""
        return [pair[not drafted].tokens_per_second for pair in self.pairs]

    @property
    def scatters(self) -> bool:
        """Whether something else had its part in the rates."""
        plain = self.rates(drafted=False)
        return max(plain) - min(plain) > SCATTER * median(plain)

    def warning(self) -> str:
        """What is to be said then."""
        plain = self.rates(drafted=False)
        return (
            f"Plain decoding made {min(plain):.3g} to {max(plain):.3g} tokens/s, which scatters by more than a fifth: "
            "something else runs on this machine, and its speed-up may be another one when it is quiet."
        )

    def acceptance(self) -> str:
        """The share of drafts that were accepted, by position."""
        proposed, accepted = [0] * POSITIONS, [0] * POSITIONS
        for drafted, _ in self.pairs:
            for index in range(min(POSITIONS, len(drafted.proposed_at))):
                proposed[index] += drafted.proposed_at[index]
                accepted[index] += drafted.accepted_at[index]
        return " ".join(f"{a / p:.2f}" for p, a in zip(proposed, accepted, strict=True) if p) or "-"

    def cells(self) -> tuple[str, ...]:
        """As they stand in a line of the table."""
        steps = sum(drafted.request_steps for drafted, _ in self.pairs)
        emitted = sum(drafted.emitted for drafted, _ in self.pairs)
        return (
            f"{median(self.rates(drafted=False)):.1f}", f"{median(self.rates(drafted=True)):.1f}",
            f"{emitted / max(1, steps):.2f}", self.acceptance(), f"{self.speed_up:.2f}x",
        )  # fmt: skip


def in_words(speed_up: float) -> str:
    """A ratio to plain decoding, as one says it."""
    return f"{speed_up:.2g} times as fast" if speed_up >= 1 else f"at {speed_up:.0%} of its speed"


class Until:
    """The tokens of a text that come before a moment."""

    def __init__(self, end: float, tokens: Iterable[Token]) -> None:
        self._end, self._tokens = end, tokens
        self.complete = False
        """Whether the text ended by itself."""

    def __iter__(self) -> Iterator[Token]:
        for token in self._tokens:
            self.complete = bool(token.finished)
            yield token
            if time.perf_counter() >= self._end:
                return


#: Decodes a text, with or without drafts, until a moment; whether it ended by itself.
Decode = Callable[[bool, Statistics, float], bool]


def in_turns(texts: Sequence[Decode], end: float) -> Comparison:
    """Decode each text with and without drafts, the other way first each time, while another pair fits before the end.
    A first pair that does not is cut off, each of its texts after half of the time. Pairs that tell no rate are left
    out: one text has no token, or was cut off too early."""
    comparison, slowest = Comparison(), 0.0
    for index, decode in enumerate(texts):
        started = time.perf_counter()
        if index and started + slowest > end:
            break
        pair, complete = {True: Statistics(), False: Statistics()}, {}
        for turn, drafted in enumerate((False, True) if index % 2 else (True, False)):
            now = time.perf_counter()
            complete[drafted] = decode(drafted, pair[drafted], end if turn else now + (end - now) / 2)
        slowest = max(slowest, time.perf_counter() - started)
        if not all(each.emitted for each in pair.values()):
            comparison.empty += 1
        elif all(complete[drafted] or each.request_steps >= LEAST_STEPS for drafted, each in pair.items()):
            comparison.pairs.append((pair[True], pair[False]))
        else:
            comparison.cut += 1
    return comparison


def _no_pair(comparison: Comparison, seconds: float) -> RuntimeError:
    """Why there is none to tell a rate."""
    without = "texts ended without a token, since the model gave no distribution of the next"
    if comparison.empty and not comparison.cut:
        return RuntimeError(f"there is nothing to compare: {without}")
    said = f"no two texts of {LEAST_STEPS} steps could be decoded in {seconds:g} s: allow more --seconds"
    return RuntimeError(f"{said}; others were left out: {without}" if comparison.empty else said)


# --- one prompt -------------------------------------------------------------------------------------------------------


def compare(session: Session, prompt: str, temperature: float, seconds: float) -> None:
    """Stream one answer and decode it plainly, in turns; print both rates, and what follows from them."""
    texts: dict[bool, list[int]] = {}

    def decode(drafted: bool, statistics: Statistics, end: float) -> bool:
        text = Until(end, session.decode(prompt, temperature, drafted, statistics))
        if drafted and drafted not in texts:
            notes.print(Text.assemble(("drafted", ACCEPTED), " and ", ("drawn by the verification", DRAWN)))
            texts[drafted] = print_stream(session, text)
        else:
            # As it is printed: an end without a token has the id -1.
            texts.setdefault(drafted, [token.token for token in text if token.token >= 0])
        return text.complete

    for drafted in (True, False):  # warm up
        list(islice(session.decode(prompt, temperature, drafted, Statistics()), WARM_UP))
    comparison = in_turns([decode] * PAIRS, time.perf_counter() + seconds)
    if not comparison.pairs:
        raise _no_pair(comparison, seconds)
    with_drafts, plain = comparison.pairs[0]
    print_line(notes, f"with drafts:    {summary(with_drafts)}")
    print_line(notes, f"without drafts: {summary(plain)}")
    if comparison.scatters:
        notes.print(comparison.warning(), style="yellow", highlight=False)
    told, pairs = in_words(comparison.speed_up), len(comparison.pairs)
    said = f"Compared with plain decoding, this text came {told}: the median of {pairs} pairs."
    notes.print(said, style="bold", highlight=False)
    both = list(zip(texts[True], texts[False], strict=False))
    if any(a != b for a, b in both) and (temperature == 0 or session.settings.rule == "coupled"):
        _report_divergence(session, prompt, texts[True], texts[False], temperature)


def _race(logits: torch.Tensor, temperature: float, seed: int, position: int) -> torch.Tensor:
    """What the coupled rule takes the largest of: docs/noise.md, the flat race."""
    streams = torch.tensor([seed]), torch.tensor([position])
    words = noise_words(*streams, counter_tag(Purpose.COUPLED, Level.TOKEN), counters=-(-len(logits) // 4))
    return logits.double() / temperature - exponential_of(words[0, : len(logits)]).log()


def _report_divergence(session: Session, prompt: str, text: list[int], alone: list[int], temperature: float) -> None:
    """Where two texts part that should be equal, and how close the two tokens were there."""
    first = next(i for i, (a, b) in enumerate(zip(text, alone, strict=False)) if a != b)
    with torch.inference_mode():
        history = session.encode(prompt) + text[:first]
        last = torch.tensor([history[-1:]], device=session.target.device)
        scores = session.target.begin([history], [1]).score(last, [1]).logits[0, 0].float().cpu()
    if temperature > 0:
        scores = _race(scores, temperature, session.settings.seed, len(history))
    margin = abs(float(scores[text[first]] - scores[alone[first]]))
    cure = "" if is_gguf(session.settings.target) else "; --fixed-rows makes them equal"
    notes.print(
        f"the texts part at token {first}, where what decides (logits, with their noise at a temperature) is "
        f"{margin:.3g} apart: passes over different numbers of rows round differently{cure}",
        style="dim",
        highlight=False,
    )


# --- the built-in prompts ---------------------------------------------------------------------------------------------


def measure(session: Session, temperatures: Sequence[float], seconds: float) -> None:
    """The built-in prompts at each temperature. A line is printed when its pairs are done; the whole ends in time."""
    end = time.perf_counter() + seconds
    cells = [(temperature, kind) for temperature in temperatures for kind in PROMPTS]
    first_prompt = next(iter(PROMPTS.values()))[0]
    notes.print(Text.assemble(first_prompt + "\n", ("drafted", ACCEPTED), ", ", ("drawn", DRAWN), ":"))
    tokens = session.decode(first_prompt, temperatures[0], True, Statistics())
    print_stream(session, Until(time.perf_counter() + seconds / len(cells), tokens), notes)
    list(islice(session.decode(first_prompt, temperatures[0], False, Statistics()), WARM_UP))
    lines = Lines(
        console, {"T": ">3", "prompts": "<7", "plain/s": ">7", "drafted/s": ">9", "a step": ">6",
                  "accepted, by position": "<24", "speed-up": ">8"},
    )  # fmt: skip
    found: dict[float, Comparison] = {temperature: Comparison() for temperature in temperatures}
    planned = 0
    for index, (temperature, kind) in enumerate(cells):
        texts = [
            _decoder(session, prompt, temperature, seed)
            for seed, prompt in enumerate(PROMPTS[kind] * (PAIRS if temperature > 0 else 1))
        ]
        planned += len(texts)
        now = time.perf_counter()
        with notes.status(f"temperature {temperature:g}, {kind}: with and without drafts, in turns"):
            comparison = in_turns(texts, now + (end - now) / (len(cells) - index))
        none = "no two texts in its share of the time" if comparison.cut else "texts without a token"
        lines.print(f"{temperature:g}", kind, *(comparison.cells() if comparison.pairs else (none,)))
        found[temperature].pairs += comparison.pairs
        found[temperature].empty += comparison.empty
        found[temperature].cut += comparison.cut
        if kind == list(PROMPTS)[-1] and found[temperature].pairs:
            lines.print(f"{temperature:g}", "all", *found[temperature].cells(), style="bold")
    _conclude(found, planned, seconds)


def _decoder(session: Session, prompt: str, temperature: float, seed: int) -> Decode:
    def decode(drafted: bool, statistics: Statistics, end: float) -> bool:
        tokens = session.decode(prompt, temperature, drafted, statistics, session.settings.seed + seed)
        text = Until(end, tokens)
        for _ in text:
            pass
        return text.complete

    return decode


def _conclude(found: dict[float, Comparison], planned: int, seconds: float) -> None:
    """What the table says, in words."""
    empty = sum(comparison.empty for comparison in found.values())
    measured = {temperature: comparison for temperature, comparison in found.items() if comparison.pairs}
    if not measured:
        cut = sum(comparison.cut for comparison in found.values())
        raise _no_pair(Comparison(empty=empty, cut=cut), seconds)
    everything = Comparison([pair for comparison in measured.values() for pair in comparison.pairs])
    if everything.scatters:
        console.print(everything.warning(), style="yellow", highlight=False)
    told = " and ".join(
        f"{in_words(comparison.speed_up)} at temperature {temperature:g}"
        for temperature, comparison in measured.items()
    )
    pairs = len(everything.pairs)
    counted = f"{pairs} pairs"
    if empty:
        counted += f", without {empty} where a text has no token"
    if pairs + empty < planned:
        counted += f"; {planned} would take more than {seconds:g} s"
    said = f"Compared with plain decoding, text came {told}: medians of {counted}."
    console.print(said, style="bold", highlight=False)
