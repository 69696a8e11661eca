"""Requests that come and go while others are decoded (continuous batching)."""

from __future__ import annotations

import asyncio
import heapq
import queue
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
from torch import Tensor

from specdec_kernels.checks import flags, ids_of, listed, whole
from specdec_kernels.decode.fair_lock import FairLock
from specdec_kernels.decode.generation import check_parties
from specdec_kernels.decode.guarded import GuardedSession
from specdec_kernels.decode.loop import Loop, Options, StopWhen, check_stop_when
from specdec_kernels.decode.prompt_reading import PromptReading
from specdec_kernels.decode.protocols import Drafter, DrafterSession, Target, shares_ids
from specdec_kernels.decode.requests import Grammar, Sampling, allowed, make_requests
from specdec_kernels.decode.results import Token
from specdec_kernels.decode.statistics import Acceptance, Statistics
from specdec_kernels.decode.submission import Submission
from specdec_kernels.ops import BackendName, RuleName
from specdec_kernels.tensors import CPU


@dataclass(order=True)
class _Waiting:
    """A request in the queue: the highest priority first, and of one priority the first that came."""

    order: tuple[float, int]
    prompt: PromptReading = field(compare=False)


class Scheduler:
    """Decodes requests that come at any time, as many together as there are slots.

    A request is read as soon as a slot is free, in chunks between the steps of those that run, and then decoded with
    them; its tokens are those it would have alone, as far as the target's logits are the same in any batch. What the
    target cannot score together with those that run (``join`` of its session says so) waits for their end, and all
    others behind it; a RuntimeWarning says so once. Nothing runs by itself: whoever iterates over a submission, or
    calls :meth:`run` or :meth:`step`, does the work, from any number of threads or tasks, one at a time.

    Args:
        target, drafter, num_draft, rule, logprobs, statistics, backend: as of
            :func:`~specdec_kernels.decode.stream`. To have fewer drafts the more requests there are, down to none, let
            the drafter be an :class:`~specdec_kernels.decode.drafters.AdaptiveDrafter`. A drafter that raises an error
            costs its drafts: that is warned of, and the requests that it drafted for then go on without (of an error in
            ``begin`` those of one prompt); all others, and those that come later, have theirs. So it is if it proposes
            what cannot be verified; where that is wrong for some requests (ids that the target has not), for those.
        max_requests: slots: requests that are decoded together at most.
        max_waiting: requests in the queue at most, or samples of one prompt; ``None`` for any number.
        max_rows: rows of the target's pass at most, of all requests together, as long as each has one; ``None`` for any
            number.
        chunk: tokens of prompts that are read between two steps at most; but a prompt that cannot be read in pieces, or
            is to be scored with ``fixed_rows``, at once.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example::

        scheduler = Scheduler(TransformersTarget(model), NGramDrafter(), max_requests=8)
        first = scheduler.submit(prompt, max_new_tokens=100)
        second = scheduler.submit(other, sampling=Sampling(temperature=0.8), priority=1)
        for token in first:  # decodes both
            print(token.token)
        print(second.result().tokens)
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        *,
        num_draft: int = 4,
        max_requests: int = 8,
        max_waiting: int | None = None,
        max_rows: int | None = None,
        chunk: int = 512,
        rule: RuleName = "token",
        logprobs: bool = False,
        statistics: Statistics | None = None,
        backend: BackendName | None = None,
    ) -> None:
        check_parties(target, drafter)
        for name, value in (
            ("max_requests", max_requests), ("max_waiting", max_waiting), ("max_rows", max_rows), ("chunk", chunk),
        ):  # fmt: skip
            if value is not None or name not in ("max_waiting", "max_rows"):
                whole(name, value, 1)
        self._target, self._drafter = target, drafter
        self._options = Options(num_draft, rule, logprobs, backend, self._stops, max_rows)
        self.statistics = Statistics() if statistics is None else statistics
        self.max_requests = max_requests
        """Slots."""
        self._max_waiting, self._chunk = max_waiting, chunk
        self._lock = FairLock()
        self._in_step = False
        self._awaited: asyncio.Future[bool] | None = None  # the step that tasks wait for
        self._cancelled: list[Submission] = []  # of which the lists below do not know yet
        self._told = False  # that requests wait for each other
        self._queue: list[_Waiting] = []
        self._reading: PromptReading | None = None
        self._running: dict[int, Submission] = {}  # by the index of the request
        self._loop = self._idle()
        self._submitted = 0

    def submit(
        self,
        prompt: Sequence[int],
        *,
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 128,
        min_new_tokens: int = 0,
        seed: int | None = None,
        stop_tokens: Collection[int] | None = None,
        stop_when: StopWhen | None = None,
        priority: float = 0,
        prompt_logprobs: bool = False,
    ) -> Submission:
        """Queue a request.

        Args:
            prompt: token ids, at least one.
            sampling, max_new_tokens, min_new_tokens, seed, stop_tokens, stop_when: as of
                :func:`~specdec_kernels.decode.stream`.
            priority: those of the highest are read first; of one priority, those that came first.
            prompt_logprobs: note the log-probabilities of the prompt's tokens.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
            queue.Full: with it, more than ``max_waiting`` requests would wait, where any wait already.
        """
        named = {key: value for key, value in locals().items() if key not in ("self", "prompt", "seed", "stop_when")}
        return self.submit_samples(prompt, [seed], stop_when=[stop_when], **named)[0]

    def submit_samples(
        self,
        prompt: Sequence[int],
        seeds: Sequence[int | None],
        *,
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 128,
        min_new_tokens: int = 0,
        stop_tokens: Collection[int] | None = None,
        stop_when: Sequence[StopWhen | None] | None = None,
        priority: float = 0,
        prompt_logprobs: bool = False,
    ) -> list[Submission]:
        """Queue several continuations of one prompt, one for each seed; the target reads the prompt once.

        Arguments and errors as of :meth:`submit`, but for a list of ``stop_when``, one for each seed. They start
        together, so there must be slots for all.
        """
        if not isinstance(sampling, Sampling):
            raise TypeError(f"sampling must be a Sampling, got {type(sampling).__name__}")
        if isinstance(priority, bool) or not isinstance(priority, (int, float)) or priority != priority:
            raise TypeError(f"priority must be a number, got {priority!r}")
        flags(prompt_logprobs=prompt_logprobs)
        seeds = listed("seeds", seeds, "seeds")
        if not 0 < len(seeds) <= self.max_requests:
            raise ValueError(
                f"seeds must be at least one, and no more than max_requests={self.max_requests}, got {len(seeds)}"
            )
        count = len(seeds)
        endings = (
            [None] * count if stop_when is None else listed("stop_when", stop_when, "functions, one for each seed")
        )
        if len(endings) != count:
            raise ValueError(f"stop_when must have one entry for each of the {count} seeds, got {len(endings)}")
        for ends in endings:
            check_stop_when(ends)
        each = {item.name: [getattr(sampling, item.name)] * count for item in fields(sampling)}
        stops = self._target.stop_tokens if stop_tokens is None else frozenset(ids_of("stop_tokens", stop_tokens))
        vocab, known = self._target.vocab_size, shares_ids(self._target)
        requests = make_requests([prompt] * count, vocab, seeds, max_new_tokens, each, stops, min_new_tokens, known)
        with self._lock:
            queued = sum(len(waiting.prompt.submissions) for waiting in self._queue)
            # Samples of one prompt are submitted at once, so an empty queue takes any number of them.
            if self._max_waiting is not None and queued and queued + count > self._max_waiting:
                raise queue.Full(f"max_waiting={self._max_waiting} requests at most, got {count} where {queued} wait")
            order = -priority, self._submitted
            submissions = []
            for request, ends in zip(requests, endings, strict=True):
                request.index = self._submitted
                self._submitted += 1
                submission = Submission(self, request, ends)
                if sampling.grammar is not None:
                    request.sampling = replace(sampling, grammar=partial(self._allowed, submission, sampling.grammar))
                submissions.append(submission)
            reading = PromptReading(submissions, self._target, self._drafter, prompt_logprobs)
            heapq.heappush(self._queue, _Waiting(order, reading))
            return submissions

    @property
    def waiting(self) -> int:
        """Requests that are not decoded yet."""
        return sum(len(prompt.submissions) for prompt in self._unread())

    @property
    def running(self) -> int:
        """Requests that are decoded."""
        return len(self._running)

    def step(self) -> bool:
        """Read a chunk of what waits, where there is a slot, and decode one step of what runs. Whether any is left.

        An error of the target ends the requests that ran, each of which raises it when it is read. So does what
        interrupts a step (``KeyboardInterrupt``), which is raised here too.

        Raises:
            RuntimeError: within a step, called by a ``stop_when``, a grammar or a drafter.
        """
        with self._lock:
            if self._in_step:
                raise RuntimeError(
                    "a step of the scheduler cannot be made within a step: stop_when, grammars and drafters may submit "
                    "and cancel requests, but not wait for them"
                )
            try:
                self._in_step = True
                self._admit()
                if self._running:
                    self._decode()
            except BaseException as error:  # half a step must not be gone on from
                self._fail_running(error)
                self._fail_reading(error)
                raise
            finally:
                self._in_step = False
                self._end_cancelled()
            reading = self._reading
            if reading is not None and reading.refused is not None and not self._told:  # an error may come of it, too
                self._told = True
                warnings.warn(
                    f"requests are not decoded together, but wait: {reading.refused}", RuntimeWarning, stacklevel=2
                )
            return bool(self._running or self._queue or self._reading)

    def run(self) -> None:
        """Decode all there is."""
        while self.step():
            pass

    def advance_to(self, submission: Submission) -> Token | None:
        """The next token of a submission, by as many steps as it takes; ``None`` behind its last."""
        while True:
            with self._lock:
                if submission.ready:
                    return submission.take()
                self.step()

    async def stepped(self) -> None:
        """Wait for a step, which all tasks of an event loop have in common: any number of them takes one thread, and
        those that are cancelled leave one step behind."""
        step, loop = self._awaited, asyncio.get_running_loop()
        if step is None or step.done() or step.get_loop() is not loop:
            step = self._awaited = loop.run_in_executor(None, self.step)
        await asyncio.shield(step)

    def cancel(self, submission: Submission) -> None:
        """See :meth:`Submission.cancel`."""
        self._cancelled.append(submission)
        # The requests of a step stay the same while it runs, and those that were cancelled end with it. Do not wait for
        # it: it may itself wait for the thread that cancels, which may be a drafter's.
        if not self._in_step:
            with self._lock:
                self._end_cancelled()

    def _end_cancelled(self) -> None:
        while self._cancelled:
            submission = self._cancelled.pop()
            if submission.request.index in self._running:
                self._drop([submission])
            elif not submission.done:
                self._leave([submission])

    def _idle(self) -> Loop:
        """A loop without requests."""
        return Loop(self._target, self._drafter, self._options, self.statistics)

    def _decode(self) -> None:
        try:
            gained = self._loop.step()
        except Exception as error:
            self._fail_running(error)
            return
        for token in gained:
            self._running[token.request].put(token)
        for request in {token.request for token in gained if token.finished}:
            self._end(request)
        self._drop([submission for submission in self._running.values() if submission.failed])

    def _fail_running(self, error: BaseException) -> None:
        for request, submission in list(self._running.items()):
            submission.fail(error)
            self._end(request)
        self._loop = self._idle()  # wherever the other one was, its caches go with it

    def _fail_reading(self, error: BaseException) -> None:
        if self._reading is not None:
            for submission in self._reading.submissions:
                submission.fail(error)
            self._leave(self._reading.submissions)

    def _leave(self, submissions: list[Submission]) -> None:
        """Read the prompt of these no more, but for others."""
        for submission in submissions:
            submission.done = True
        for prompt in self._unread():
            prompt.submissions = [own for own in prompt.submissions if not own.done]
        self._queue = [waiting for waiting in self._queue if waiting.prompt.submissions]
        heapq.heapify(self._queue)
        if self._reading is not None and not self._reading.submissions:
            self._reading = None

    def _drop(self, submissions: list[Submission]) -> None:
        """Decode these no more."""
        requests = [submission.request.index for submission in submissions]
        for request in requests:
            self._end(request)
        try:
            if requests:
                self._loop.select([slot for slot, own in enumerate(self._loop.requests) if own.index not in requests])
        except BaseException as error:  # half of it may be done
            self._fail_running(error)
            if not isinstance(error, Exception):
                raise

    def _end(self, request: int) -> None:
        """Of a request that runs, once its tokens were put; what is known of it is its own from here on."""
        submission = self._running[request]
        submission.acceptance = self.statistics.requests.pop(request, Acceptance())
        submission.done = True
        del self._running[request]  # last: what interrupts before loses no request

    # An error in what a request brought with it ends that request, and no other.

    def _stops(self, index: int, tokens: Sequence[int]) -> bool:
        submission = self._running[index]
        try:
            return submission.stop_when is not None and bool(submission.stop_when(index, tokens))
        except Exception as error:
            submission.fail(error)
            return True

    def _allowed(self, submission: Submission, grammar: Grammar, history: Sequence[int]) -> Tensor:
        try:
            return allowed(grammar, history, self._target.vocab_size)
        except Exception as error:
            submission.fail(error)
            return torch.zeros(-(-self._target.vocab_size // 32), dtype=torch.int32, device=CPU)

    def _unread(self) -> list[PromptReading]:
        """Prompts that are not decoded from yet."""
        return [waiting.prompt for waiting in self._queue] + ([self._reading] if self._reading else [])

    def _admit(self) -> None:
        """Read what waits, up to a chunk, and have what was read decoded."""
        left = self._chunk
        while left > 0 and (self._reading or self._queue):
            prompt = self._reading or self._queue[0].prompt
            full = len(self._running) + len(prompt.submissions) > self.max_requests
            if full or (self._running and prompt.refused is not None):
                return
            if self._reading is None:
                self._reading = prompt  # before it leaves the queue: what interrupts in between loses no request
                heapq.heappop(self._queue)
            try:
                while left > 0 and not prompt.done:
                    left -= max(1, self._read(prompt, left))
                if not prompt.done:
                    return
                prompt.refused = self._start(prompt)
            except Exception as error:
                self._fail_reading(error)
            if prompt.refused is None:
                self._reading = None

    def _read(self, prompt: PromptReading, most: int) -> int:
        with torch.inference_mode(), self.statistics.timed("prompt"):
            return prompt.read(most)

    def _start(self, prompt: PromptReading) -> str | None:
        """Have it decoded; or why it cannot be, together with those that run."""
        requests = [submission.request for submission in prompt.submissions]
        if len(requests) != prompt.slots:  # one at first; more, where samples were cancelled while they waited
            with torch.inference_mode():
                prompt.session.select([0] * len(requests))
            prompt.slots = len(requests)
        drafting = self._guarded(prompt)
        if self._running:
            try:
                self._loop.join(requests, prompt.session, drafting)
            except ValueError as error:  # before anything changed
                return str(error)
            except Exception as error:  # half of them may have joined
                self._fail_running(error)
                raise
        else:
            self._loop.admit(requests, prompt.session, drafting)
        for submission in prompt.submissions:
            submission.prompt_logprobs = prompt.logprobs
            self._running[submission.request.index] = submission
        return None

    def _guarded(self, prompt: PromptReading) -> DrafterSession | None:
        if self._drafter is None:
            return None
        with torch.inference_mode(), self.statistics.timed("prompt"):
            return GuardedSession(self._drafter, prompt, self._target.vocab_size)
