"""What requests wrote, kept for later ones: for agents and corrections that repeat each other."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple, Self

import numpy as np

from specdec_kernels.checks import ids_of, whole

#: Runs of so many tokens are looked for, longer ones first. Two tokens are found everywhere in many texts.
RUNS = (8, 4)
#: Tokens that are forgotten together.
BLOCK = 64


@dataclass(eq=False)
class _Block:
    """Successive tokens of one text."""

    text: SharedText
    tokens: list[int] = field(default_factory=list)
    keys: list[tuple[int, ...]] = field(default_factory=list)
    """Runs that are followed by tokens of the block."""
    following: _Block | None = None
    closed: bool = False


class _Place(NamedTuple):
    block: _Block
    offset: int


class SharedHistory:
    """The latest texts of requests, prompts among them, and what followed runs of tokens in them.

    Shared by all requests of the drafters that have it, from any thread, and from one run of a program to the next by
    way of a file. What a request writes can be drafted for others at once.

    A text is never drafted for a request of the same seed at a temperature, unless the rule is "coupled": both have the
    same noise at the same positions, so that such drafts would depend on the uniforms that they are verified with
    (docs/algorithms.md, 10).

    Args:
        max_tokens: kept at most, in blocks of 64: the oldest are forgotten first. Each takes about 360 bytes.
        tokenizer: what the ids are of, any name; a file of another one is refused.

    Raises:
        TypeError, ValueError: ``max_tokens`` is no int, or below 64.
    """

    def __init__(self, max_tokens: int = 200_000, tokenizer: str = "") -> None:
        whole("max_tokens", max_tokens, BLOCK)
        self.max_tokens, self.tokenizer = max_tokens, tokenizer
        self._lock = threading.Lock()
        self._blocks: deque[_Block] = deque()
        self._places: dict[tuple[int, ...], _Place] = {}
        self._tokens = 0

    def __len__(self) -> int:
        """Tokens that are kept."""
        return self._tokens

    def begin(self, prompt: Sequence[int], seed: int | None = None) -> SharedText:
        """The text of a new request; its seed may be known later."""
        text = SharedText(self, seed)
        text.extend(prompt)
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy has the texts, as a file has them: neither the lock nor requests that still write.
        texts = [(tokens, text.seed) for text, tokens in self._texts().items()]
        return _history_of, (type(self), self.max_tokens, self.tokenizer, texts)

    def _texts(self) -> dict[SharedText, list[int]]:
        """All that is kept, by the text that it is of."""
        with self._lock:
            texts: dict[SharedText, list[int]] = {}
            for block in self._blocks:
                texts.setdefault(block.text, []).extend(block.tokens)
            return texts

    def save(self, path: Path | str) -> None:
        """Write all texts to a file, as a whole or not at all."""
        texts, path = self._texts(), Path(path)
        arrays: dict[str, Any] = {
            "tokens": np.array([token for tokens in texts.values() for token in tokens], np.int64),
            "lengths": np.array([len(tokens) for tokens in texts.values()], np.int64),
            "seeds": np.array([text.seed or 0 for text in texts], np.int64),
            "seeded": np.array([text.seed is not None for text in texts], np.bool_),
            "tokenizer": np.array(self.tokenizer),
        }
        with NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            try:
                np.savez_compressed(file, **arrays)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    @classmethod
    def load(cls, path: Path | str, max_tokens: int = 200_000, tokenizer: str = "") -> Self:
        """What was written to a file; the latest texts of it, if it has more than are to be kept.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no such file, or of another tokenizer.
        """
        history = cls(max_tokens, tokenizer)
        with Path(path).open("rb") as opened:
            try:
                file = np.load(opened, allow_pickle=False)
                if not isinstance(file, np.lib.npyio.NpzFile):
                    raise ValueError("an array alone")
                arrays = {name: file[name] for name in ("tokens", "lengths", "seeds", "seeded", "tokenizer")}
            except Exception as error:  # of a damaged file NumPy, zipfile and zlib raise errors of many kinds
                raise ValueError(
                    f"path must be of a file that SharedHistory.save wrote, got {path} ({error})"
                ) from None
        if str(arrays["tokenizer"]) != tokenizer:
            raise ValueError(f"{path} must be of the tokenizer {tokenizer!r}, got {str(arrays['tokenizer'])!r}")
        tokens = ids_of(f"tokens of {path}", arrays["tokens"].tolist())
        lengths, seeds, seeded = (arrays[name].tolist() for name in ("lengths", "seeds", "seeded"))
        if sum(lengths) != len(tokens):
            raise ValueError(f"{path} must have {sum(lengths)} tokens, got {len(tokens)}")
        left = iter(tokens)
        for length, seed, known in zip(lengths, seeds, seeded, strict=True):
            history.begin(list(islice(left, length)), seed if known else None)
        return history

    # What follows is of texts.

    def write(self, text: SharedText, tokens: Sequence[int]) -> None:
        with self._lock:
            for token in tokens:
                if text.block is None or text.block.closed or len(text.block.tokens) == BLOCK:
                    before, text.block = text.block, _Block(text)
                    if before is not None:
                        before.following = text.block
                    self._blocks.append(text.block)
                block = text.block
                for length in RUNS:
                    if len(text.latest) >= length:
                        block.keys.append(tuple(text.latest[-length:]))
                        self._places[block.keys[-1]] = _Place(block, len(block.tokens))
                block.tokens.append(token)
                text.follow(token)
                self._tokens += 1
                while self._tokens > self.max_tokens:
                    self._forget(self._blocks.popleft())

    def _forget(self, block: _Block) -> None:
        block.closed = True
        self._tokens -= len(block.tokens)
        for key in block.keys:
            if (place := self._places.get(key)) is not None and place.block is block:
                del self._places[key]

    def find(self, text: SharedText, count: int, any_seed: bool) -> tuple[int, list[int]]:
        with self._lock:
            for length in RUNS:
                place = self._places.get(tuple(text.latest[-length:])) if len(text.latest) >= length else None
                if place is None or (other := place.block.text) is text.origin:
                    continue
                if any_seed or (None not in (other.seed, text.seed) and other.seed != text.seed):
                    return length, _tokens_from(place, count)
        return 0, []


def _history_of(
    kind: type[SharedHistory], max_tokens: int, tokenizer: str, texts: list[tuple[list[int], int | None]]
) -> SharedHistory:
    history = kind(max_tokens, tokenizer)
    for tokens, seed in texts:
        history.begin(tokens, seed)
    return history


def _tokens_from(place: _Place, count: int) -> list[int]:
    tokens: list[int] = []
    block, offset = place
    while len(tokens) < count:
        tokens += block.tokens[offset : offset + count - len(tokens)]
        if block.following is None:
            break
        block, offset = block.following, 0
    return tokens


class SharedText:
    """The text of one request in a :class:`SharedHistory`."""

    def __init__(self, history: SharedHistory, seed: int | None, origin: SharedText | None = None) -> None:
        self.seed = seed
        """Of its noise; None as long as it is not known."""
        self.origin = origin or self
        """The text that is written, where this one only follows it."""
        self.latest: list[int] = []
        """Its last tokens."""
        self.block: _Block | None = None
        self._history = history

    def extend(self, tokens: Sequence[int]) -> None:
        """Go on with these tokens."""
        if self.origin is self:
            self._history.write(self, tokens)
        else:
            for token in tokens:
                self.follow(token)

    def follow(self, token: int) -> None:
        """Note one token as the last."""
        self.latest = [*self.latest[1 - RUNS[0] :], token]

    def find(self, count: int, any_seed: bool) -> tuple[int, list[int]]:
        """(length, tokens): the longest run at the end of this text that occurs in another one, of another seed unless
        that does not matter, and up to so many tokens that followed it there the last time."""
        return self._history.find(self, count, any_seed)

    def fork(self) -> SharedText:
        """The same text, which goes on without being written."""
        other = SharedText(self._history, self.seed, self.origin)
        other.latest = self.latest
        return other
