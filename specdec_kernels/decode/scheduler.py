"""Requests that come and go while others are decoded (continuous batching)."""

from __future__ import annotations

import asyncio
import heapq
import queue
import threading
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdec_kernels.checks import flags, ids_of, listed, whole
from specdec_kernels.decode.loop import Generation, Loop, Options, StopWhen, Token, check_parties, check_stop_when
from specdec_kernels.decode.proposals import check_proposal
from specdec_kernels.decode.protocols import (
    Draft,
    Drafter,
    DrafterSession,
    Step,
    Target,
    TargetSession,
    TreeDraft,
    joinable,
    shares_ids,
    spread,
)
from specdec_kernels.decode.requests import Grammar, Request, Sampling, allowed, make_requests
from specdec_kernels.decode.statistics import Acceptance, Statistics
from specdec_kernels.ops import BackendName, RuleName
from specdec_kernels.tensors import CPU, to_device


class Submission:
    """A request that was handed to a :class:`Scheduler`: an iterator of its tokens, as they come, and an asynchronous
    one.

    Whoever waits for a token runs steps of the scheduler meanwhile, which serve all its requests. What went wrong with
    this request alone is raised here, by an iterator once and by :meth:`result` every time; what would say something of
    its reader (``StopIteration``, ``KeyboardInterrupt``) as the cause of a ``RuntimeError``.
    """

    def __init__(self, scheduler: Scheduler, request: Request, stop_when: StopWhen | None) -> None:
        self._scheduler, self.request, self.stop_when = scheduler, request, stop_when
        self._tokens: list[Token] = []
        self._read = 0
        self._error: Exception | None = None
        self._raised = False
        self.done = False
        """Whether no more tokens will come than those not read yet: finished, cancelled or failed."""
        self.acceptance = Acceptance()
        """What became of its drafts, once it is done."""
        self.prompt_logprobs: list[float] = []
        """Of every token of the prompt, nan for the first, under the target's own distribution (temperature 1, nothing
        filtered); where they were requested, once the prompt was read."""

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        token = self._scheduler.advance_to(self)
        if token is None:
            raise StopIteration
        return token

    def __aiter__(self) -> Submission:
        return self

    async def __anext__(self) -> Token:
        while not self.ready:  # the thread takes no token, which would be lost where this is cancelled meanwhile
            await self._scheduler.stepped()
        token = self.take()
        if token is None:
            raise StopAsyncIteration
        return token

    def cancel(self) -> None:
        """End the request where it is; tokens that were made can still be read. Later than its end it does nothing.
        Within a step, of this thread or another, it takes effect when the step is done."""
        self._scheduler.cancel(self)

    def result(self) -> Generation:
        """The whole request, once it has ended; ``finished`` is empty if it was cancelled."""
        for _ in self:
            pass
        if self._error is not None:
            raise self._error
        tokens = [token for token in self._tokens if token.token >= 0]
        return Generation(
            [token.token for token in tokens],
            [token.drafted for token in tokens],
            [token.logprob for token in tokens],
            self._tokens[-1].finished if self._tokens else "",
        )

    # What follows is the scheduler's, under its lock.

    def put(self, token: Token) -> None:
        self._tokens.append(token)

    @property
    def failed(self) -> bool:
        """Whether it ends with an error."""
        return self._error is not None

    @property
    def ready(self) -> bool:
        """Whether there is something to take, or never will be."""
        return self._read < len(self._tokens) or self.done

    def take(self) -> Token | None:
        """The next token that is there; an error, once, where there is none any more."""
        if self._read < len(self._tokens):
            self._read += 1
            return self._tokens[self._read - 1]
        if self._error is not None and not self._raised:
            self._raised = True
            raise self._error
        return None

    def fail(self, error: BaseException) -> None:
        """Note what it ends with. It is done later: an asynchronous reader, who looks without the lock, has the tokens
        of this step first."""
        if not isinstance(error, Exception) or isinstance(error, (StopIteration, StopAsyncIteration)):
            cause, error = error, RuntimeError(f"the request was ended by {error!r}")
            error.__cause__ = cause
        self._error = error


@dataclass(order=True)
class _Waiting:
    """A request in the queue: the highest priority first, and of one priority the first that came."""

    order: tuple[float, int]
    prompt: _Prompt = field(compare=False)


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
        self._lock = _FairLock()
        self._in_step = False
        self._awaited: asyncio.Future[bool] | None = None  # the step that tasks wait for
        self._cancelled: list[Submission] = []  # of which the lists below do not know yet
        self._told = False  # that requests wait for each other
        self._queue: list[_Waiting] = []
        self._reading: _Prompt | None = None
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
            reading = _Prompt(submissions, self._target, self._drafter, prompt_logprobs)
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

    def _unread(self) -> list[_Prompt]:
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

    def _read(self, prompt: _Prompt, most: int) -> int:
        with torch.inference_mode(), self.statistics.timed("prompt"):
            return prompt.read(most)

    def _start(self, prompt: _Prompt) -> str | None:
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

    def _guarded(self, prompt: _Prompt) -> DrafterSession | None:
        if self._drafter is None:
            return None
        with torch.inference_mode(), self.statistics.timed("prompt"):
            return _GuardedSession(self._drafter, prompt, self._target.vocab_size)


class _Prompt:
    """A prompt that is read in pieces, and the requests that go on from it."""

    def __init__(
        self, submissions: list[Submission], target: Target, drafter: Drafter | None, with_logprobs: bool
    ) -> None:
        self.submissions, self._target, self._with_logprobs = submissions, target, with_logprobs
        self.request = submissions[0].request  # but for their seeds they are alike
        self.logprobs: list[float] = [float("nan")] if with_logprobs else []
        self._layers = () if drafter is None else drafter.feature_layers
        self._features: list[Tensor] = []
        self._read = 0
        self._session: TargetSession | None = None
        self.slots = 1
        """Of the target's session."""
        self.refused: str | None = None
        """Why it cannot be decoded together with those that ran when it was read."""

    @property
    def session(self) -> TargetSession:
        """Of the target."""
        assert self._session is not None, "it was read"
        return self._session

    @property
    def done(self) -> bool:
        """Whether all but the last token was read."""
        return self._session is not None and self._read == len(self.request.prompt) - 1

    @property
    def features(self) -> Tensor | None:
        """As of a session of the target."""
        return torch.cat(self._features, 1) if self._features else None

    def read(self, most: int) -> int:
        """Read up to so many tokens more, in one pass, or a prompt that cannot be read in pieces. How many it was."""
        prompt = self.request.prompt
        count = min(most, len(prompt) - 1 - self._read)
        features = None
        if self._session is None:
            if self._with_logprobs:  # what a session reads as it begins, it gives no scores of
                count = 0
            elif getattr(self._target, "fixed_rows", None) is not None:  # rounds with the pieces that it begins with
                count = len(prompt) - 1
            try:
                self._session = self._begin(count)
            except ValueError:  # nothing was read; what is wrong with it is said of the whole prompt
                count = len(prompt) - 1
                self._session = self._begin(count)
                if self._with_logprobs:
                    raise ValueError(
                        f"prompt_logprobs needs a prompt that can be read in pieces, got one of {len(prompt)} tokens"
                    ) from None
            joinable(self._session)
            features = self._session.features
        elif count:
            count = min(count, self._session.max_rows())
            rows = to_device([prompt[self._read : self._read + count + 1]], torch.int64, self._target.device)
            logits, features = self._session.score(rows[:, :-1], [count])
            self._session.commit([count])
            if self._with_logprobs:
                scores = logits.float().log_softmax(-1).gather(2, rows[:, 1:, None])
                self.logprobs += scores.flatten().tolist()
        if features is not None:
            self._features.append(features)
        self._read += count
        return count

    def _begin(self, count: int) -> TargetSession:
        """Read so many tokens, of which the target knows how many follow."""
        prompt, rest = self.request.prompt, len(self.request.prompt) - 1 - count
        return self._target.begin([prompt[: count + 1]], [self.request.max_new_tokens + rest], self._layers)


class _GuardedSession:
    """A drafter's session whose errors cost its requests their drafts, and nothing else: without drafts the text is the
    same in distribution."""

    def __init__(self, drafter: Drafter, prompt: _Prompt, vocab_size: int) -> None:
        self._drafted = [True] * len(prompt.submissions)  # of each request, whether it is in the drafter's session
        self._vocab_size = vocab_size
        self._wrong: list[int] = []  # slots of those whose drafts were wrong in this step
        self._session: DrafterSession | None = None
        self._session = self._attempt("begin", lambda: self._begin(drafter, prompt))
        if self._session is not None:
            joinable(self._session)  # else nothing is joined by halves

    def _begin(self, drafter: Drafter, prompt: _Prompt) -> DrafterSession:
        count = len(prompt.submissions)
        features = None if prompt.features is None else prompt.features.expand(count, -1, -1)
        return drafter.begin([prompt.request.prompt] * count, features)

    def _attempt(self, what: str, call: Any) -> Any:
        try:
            return call()
        except Exception as error:
            self._session, self._drafted = None, [False] * len(self._drafted)
            _warn(what, error)
            return None

    @property
    def _slots(self) -> list[int]:
        """Of the requests with drafts, in the order that the drafter's session has them in."""
        return [slot for slot, drafted in enumerate(self._drafted) if drafted]

    def propose(self, step: Step) -> Draft | TreeDraft:
        session = self._session
        draft = None if session is None else self._attempt("propose", lambda: self._proposed(session, step))
        return Draft.nothing(len(step.num_draft)) if draft is None else draft

    def _proposed(self, session: DrafterSession, step: Step) -> Draft | TreeDraft | None:
        """What is proposed, but for the drafts that are wrong: their requests leave the session after this step."""
        slots, batch = self._slots, len(self._drafted)
        own = step if len(slots) == batch else replace(step.select(slots), batch=batch)
        draft = session.propose(own)
        wrong = check_proposal(draft, own, self._vocab_size)
        for reason in dict.fromkeys(wrong.values()):
            _warn("propose", ValueError(reason))
        self._wrong = [slots[row] for row in wrong]
        rows = {slot: row for row, slot in enumerate(slots) if row not in wrong}
        return draft if len(rows) == batch else spread(draft, rows, batch) if rows else None

    def commit(self, tokens: Sequence[Sequence[int]], features: Tensor | None) -> None:
        if (session := self._session) is not None:
            if not all(self._drafted):
                tokens = [tokens[slot] for slot in self._slots]
                features = None if features is None else features[self._slots]
            self._attempt("commit", lambda: session.commit(tokens, features))
        if self._wrong:
            kept = [row for row, slot in enumerate(self._slots) if slot not in self._wrong]
            self._select([drafted and slot not in self._wrong for slot, drafted in enumerate(self._drafted)], kept)
            self._wrong = []

    def select(self, slots: Sequence[int]) -> None:
        rows = {slot: row for row, slot in enumerate(self._slots)}
        self._select([slot in rows for slot in slots], [rows[slot] for slot in slots if slot in rows])

    def _select(self, drafted: list[bool], rows: list[int]) -> None:
        """Go on with requests of which these have drafts, which are these of the session."""
        self._drafted = drafted
        if not rows:
            self._session = None
        if (session := self._session) is not None:
            self._attempt("select", lambda: session.select(rows))

    def join(self, other: _GuardedSession) -> None:
        """Those of either that are without drafts stay without."""
        self._drafted = self._drafted + other._drafted
        if (session := self._session) is None:
            self._session = other._session
        elif other._session is not None:
            self._attempt("join", lambda: joinable(session).join(other._session))


def _warn(what: str, error: Exception) -> None:
    with suppress(Exception):  # warnings that are errors (-W error) would end what goes on without drafts
        warnings.warn(
            f"the drafter failed in {what}, and requests go on without drafts: {type(error).__name__}: {error}",
            RuntimeWarning, stacklevel=3,
        )  # fmt: skip


class _FairLock:
    """A reentrant lock that is fair: a thread that releases it queues behind those already waiting. With
    ``threading.RLock`` a thread that makes step after step would starve the others."""

    def __init__(self) -> None:
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        own = threading.get_ident()
        if self._owner != own:
            with self._turn:  # which who waits for the lock keeps from all others
                self._lock.acquire()
            self._owner = own
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
            self._lock.release()
