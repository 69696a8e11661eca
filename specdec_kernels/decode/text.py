"""Texts in, texts out: a scheduler with a tokenizer around it."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

from specdec_kernels.checks import flags, listed, whole
from specdec_kernels.contract import SEEDS
from specdec_kernels.decode.protocols import Drafter, Target
from specdec_kernels.decode.requests import Sampling
from specdec_kernels.decode.results import Ending
from specdec_kernels.decode.scheduler import Scheduler
from specdec_kernels.decode.submission import Submission
from specdec_kernels.decode.text_stream import TextStream


@dataclass(frozen=True)
class SamplingParams(Sampling):
    """How a prompt is continued.

    Fields, beside those of :class:`Sampling`:
        n: continuations, each with a seed of its own; the target reads the prompt once. They are decoded together, so
            that there are no more of them than the scheduler's ``max_requests`` (8).
        max_new_tokens, min_new_tokens: of each continuation; before the least number no stop token can be drawn.
        stop: strings that end a continuation. None of them, and nothing behind it, is part of the text, unless
            ``include_stop`` keeps the string itself.
        stop_tokens: token ids that end it; ``None``: the model's own end tokens.
        seed: of the first continuation, the others' count on from it, all in [-2^63, 2^63); ``None`` draws them.
        prompt_logprobs: note the log-probabilities of the prompt's tokens.

    Raises:
        TypeError, ValueError: naming the parameter, what was expected and what came.
    """

    n: int = 1
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop: str | Sequence[str] = ()
    include_stop: bool = False
    stop_tokens: Collection[int] | None = None
    seed: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("n", self.n, 1)
        if self.seed is not None:
            whole("seed", self.seed, *SEEDS, expected="an int or None")
            if self.seed + self.n > SEEDS[1]:
                raise ValueError(f"seed must be at most 2^63 - n for n={self.n} continuations, got {self.seed}")
        flags(include_stop=self.include_stop, prompt_logprobs=self.prompt_logprobs)
        listed = isinstance(self.stop, (str, Sequence))
        if not listed or not all(isinstance(stop, str) and stop for stop in self.stops):
            raise TypeError(f"stop must be a string or a list of strings, none of them empty, got {self.stop!r}")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True)
class Completion:
    """One finished continuation.

    Fields:
        text: special tokens left out.
        tokens: all of them, an end token and those of a stop string too.
        logprobs: of each token; nan unless the generator was made with ``logprobs=True``.
        finished: as of :class:`~specdec_kernels.decode.Token`.
        stop: the stop string that ended it, or ``None``.
        prompt_logprobs: of each token of the prompt, nan for the first; empty unless requested.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finished: Ending
    stop: str | None
    prompt_logprobs: list[float]


class Continuation:
    """One continuation as it is made: an iterator of pieces of text, whole characters each, and an asynchronous one.
    What may be the beginning of a stop string is held back."""

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self._tokenizer, self._params = tokenizer, params
        self._stream = TextStream(tokenizer)
        self._text, self._shown, self._closed = "", 0, False
        self._pieces: deque[str] = deque()
        self.stop: str | None = None
        """The stop string that ended it, once it has."""
        self.submission: Submission
        """What it is made of."""

    def ends(self, _: int, tokens: Sequence[int]) -> bool:
        """Take in one token more; whether a stop string is complete."""
        self._add(self._stream.add(tokens[-1]))
        return self.stop is not None

    def _add(self, piece: str) -> None:
        before, self._text = len(self._text), self._text + piece
        stops = self._params.stops
        longest = max(map(len, stops), default=1)
        found = [(self._text.find(stop, max(0, before - longest + 1)), stop) for stop in stops]
        if ended := [(place, stop) for place, stop in found if place >= 0]:
            place, self.stop = min(ended, key=lambda each: each[0] + len(each[1]))
            self._text = self._text[: place + len(self.stop) * self._params.include_stop]
            safe = len(self._text)
        else:
            begun = (k for k in range(longest - 1, 0, -1) if self._text[-k:] in {stop[:k] for stop in stops})
            safe = len(self._text) - next((k for k in begun if k <= len(self._text)), 0)
        self._show(safe)

    def _show(self, end: int) -> None:
        if end > self._shown:
            self._pieces.append(self._text[self._shown : end])
            self._shown = end

    def _close(self) -> None:
        """Take in what the stream held back; once, whoever comes to the end, and however often."""
        if self.stop is None and not self._closed:
            self._add(self._stream.end())
            self._show(len(self._text))
        self._closed = True

    # No generators, which would be at their end where waiting for a piece is interrupted or cancelled.

    def __iter__(self) -> Continuation:
        return self

    def __next__(self) -> str:
        while not (self._pieces or self._closed):
            if next(self.submission, None) is None:
                self._close()
        if not self._pieces:
            raise StopIteration
        return self._pieces.popleft()

    def __aiter__(self) -> Continuation:
        return self

    async def __anext__(self) -> str:
        while not (self._pieces or self._closed):
            if await anext(self.submission, None) is None:
                self._close()
        if not self._pieces:
            raise StopAsyncIteration
        return self._pieces.popleft()

    def cancel(self) -> None:
        """End it where it is."""
        self.submission.cancel()

    def result(self) -> Completion:
        """The whole of it, once it has ended."""
        made = self.submission.result()
        self._close()
        # A stop string may be complete only with what was held back to the end.
        finished = made.finished if self.stop is None else "stop"
        return Completion(self._text, made.tokens, made.logprobs, finished, self.stop, self.submission.prompt_logprobs)


class TextGenerator:
    """Continues texts: a :class:`~specdec_kernels.decode.Scheduler` with a tokenizer around it.

    Args:
        target, drafter: of the scheduler.
        tokenizer: of transformers.
        options: of the scheduler.

    Example::

        generator = TextGenerator(TransformersTarget(model), tokenizer, NGramDrafter())
        params = SamplingParams(temperature=0.7, max_new_tokens=50, stop=["\\n\\n"], n=2)
        for completion in generator.generate(["Once upon a time"], params)[0]:
            print(completion.text)
        for piece in generator.submit("Once more", params)[0]:
            print(piece, end="", flush=True)
    """

    def __init__(self, target: Target, tokenizer: Any, drafter: Drafter | None = None, **options: Any) -> None:
        self.tokenizer, self.scheduler = tokenizer, Scheduler(target, drafter, **options)

    def submit(
        self, prompt: str | Sequence[int], params: SamplingParams = SamplingParams(), *, priority: float = 0
    ) -> list[Continuation]:
        """Queue a prompt.

        Args:
            prompt: a text, or token ids.
            params: how to continue it.
            priority: as of :meth:`Scheduler.submit`.

        Returns:
            ``params.n`` continuations.

        Raises:
            TypeError, ValueError, queue.Full: as of :meth:`Scheduler.submit`; more continuations than the scheduler
                decodes together; stop strings where the tokenizer says nothing of a text before its end.
        """
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params must be SamplingParams, got {type(params).__name__}")
        if params.n > self.scheduler.max_requests:
            raise ValueError(f"n must be at most max_requests={self.scheduler.max_requests}, got {params.n}")
        if params.stops and getattr(self.tokenizer, "backend_tokenizer", None) is None:
            raise ValueError(f"stop needs a tokenizer of the tokenizers library, got {type(self.tokenizer).__name__}")
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        made = [Continuation(self.tokenizer, params) for _ in range(params.n)]
        seeds = [None if params.seed is None else params.seed + index for index in range(params.n)]
        submissions = self.scheduler.submit_samples(
            tokens,
            seeds,
            sampling=Sampling(**{field.name: getattr(params, field.name) for field in fields(Sampling)}),
            max_new_tokens=params.max_new_tokens,
            min_new_tokens=params.min_new_tokens,
            stop_tokens=params.stop_tokens,
            stop_when=[continuation.ends for continuation in made],
            priority=priority,
            prompt_logprobs=params.prompt_logprobs,
        )
        for continuation, submission in zip(made, submissions, strict=True):
            continuation.submission = submission
        return made

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    ) -> list[list[Completion]]:
        """Continue prompts to the end; ``params`` are for all of them, or a list with one each.

        Where the queue is full, those before are decoded first. After an error nothing of it goes on.

        Raises:
            TypeError, ValueError: as of :meth:`submit`; ``prompts`` or ``params`` are no lists, or not of one length.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts must be a list of texts or of token ids, [prompt] for one, got {prompts!r}")
        every = listed("prompts", prompts, "texts or of token ids")
        single = isinstance(params, SamplingParams)
        each = [params] * len(every) if single else listed("params", params, "SamplingParams")
        if len(each) != len(every):
            raise ValueError(f"params must have one entry for each of the {len(every)} prompts, got {len(each)}")
        made: list[list[Continuation]] = []
        try:
            for prompt, own in zip(every, each, strict=True):
                made.append(self._submit_with_room(prompt, own))
            return [[continuation.result() for continuation in continuations] for continuations in made]
        except BaseException:
            for continuation in chain.from_iterable(made):
                continuation.cancel()
            raise

    def _submit_with_room(self, prompt: str | Sequence[int], params: SamplingParams) -> list[Continuation]:
        """Queue a prompt, once there is room in the queue."""
        while True:
            try:
                return self.submit(prompt, params)
            except queue.Full:
                waiting = self.scheduler.waiting
                while self.scheduler.step() and self.scheduler.waiting >= waiting:
                    pass
