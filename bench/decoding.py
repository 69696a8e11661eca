"""Decoding SmolLM2 with any number of drafts, for what times it."""

from __future__ import annotations

from dataclasses import replace

from specdec_kernels.cli.generate import Session, Settings
from specdec_kernels.cli.models import SMOLLM2, DrafterName, check_device, load_drafter
from specdec_kernels.decode import Statistics, Target
from specdec_kernels.ops import RuleName

TOKENS = 96
KIND: DrafterName = "auto"


class Decoder:
    """One model for all ways to decode it."""

    def __init__(self, device: str = "cpu") -> None:
        check_device(device)
        self._session = Session(Settings(SMOLLM2, None, KIND, None, TOKENS, 0, None, "bfloat16", device=device))
        self.model = self._session.model
        self._adaptive, self._fixed = self._session.drafter, load_drafter(KIND, self.model)

    def decode(
        self,
        prompt: str,
        temperature: float,
        rule: RuleName,
        num_draft: int | None,
        seed: int,
        statistics: Statistics,
        target: Target | None = None,
    ) -> list[int]:
        """The text, with at most ``num_draft`` drafts a step; 0 is plain decoding, None chooses step by step."""
        session = self._session
        session.settings = replace(session.settings, rule=rule, num_draft=num_draft)
        session.drafter = self._adaptive if num_draft is None else self._fixed
        tokens = session.decode(prompt, temperature, num_draft != 0, statistics, seed, target)
        return [token.token for token in tokens]


def name_of(num_draft: int | None) -> str:
    """What such a number of drafts is called."""
    return "adaptive" if num_draft is None else f"K={num_draft}" if num_draft else "plain"
