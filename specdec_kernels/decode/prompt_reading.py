"""How a scheduler reads a prompt: in pieces, between the steps of those that are decoded."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.decode.protocols import Drafter, Target, TargetSession, joinable
from specdec_kernels.decode.submission import Submission
from specdec_kernels.tensors import to_device


class PromptReading:
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
