"""A smaller causal language model as the drafter, whose drafts have shapes that depend on no data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.decode import model_facts
from specdec_kernels.decode.drafters.autoregressive import DraftConfig
from specdec_kernels.decode.drafters.model import ModelDrafter, ModelSession
from specdec_kernels.decode.drafts import Draft, Step
from specdec_kernels.decode.static_cache import GRANULARITY, CachePool, StaticCache, bucket
from specdec_kernels.ops import BackendName, sample
from specdec_kernels.tensors import padded, to_device


class StaticDrafter(ModelDrafter):
    """A :class:`ModelDrafter` whose K drafts are one CUDA graph on a GPU: what was committed since the last drafts is
    read, K passes are made and K tokens drawn, and nothing waits for the host.

    It drafts what a :class:`ModelDrafter` drafts, in caches of fixed lengths that grow as they fill, and are taken over
    by later streams of as many requests.

    Args:
        model: as of :class:`ModelDrafter`, with an attention that takes masks of four dimensions (``"eager"``,
            ``"sdpa"``) and, on a GPU, experts whose shapes depend on no data (``"batched_mm"``, ``"grouped_mm"``).
        vocab_size, config: as of :class:`ModelDrafter`. What is decided on the host is not to be had: no stopping where
            the model is unsure, no siblings.

    Raises:
        TypeError, ValueError: as of :class:`ModelDrafter`; a ``config`` that needs the host.
    """

    def __init__(self, model: Any, vocab_size: int | None = None, config: DraftConfig = DraftConfig()) -> None:
        super().__init__(model, vocab_size, config)
        if config.min_confidence > 0 or config.siblings > 0:
            raise ValueError(
                "config must have min_confidence 0 and siblings 0 for drafts of static shapes, got "
                f"{config.min_confidence} and {config.siblings}: use ModelDrafter"
            )
        model_facts.check_decoder_alone(model, "for drafts of static shapes", "use ModelDrafter")
        model_facts.check_no_states(self.layers, "for drafts of static shapes", "use ModelDrafter")
        model_facts.check_masks(model, "for drafts of static shapes", "use ModelDrafter")
        self.caches = CachePool()

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> StaticDraftSession:
        return StaticDraftSession(self, prompts)


class StaticDraftSession(ModelSession):
    """One stream of a :class:`StaticDrafter`."""

    _cache: StaticCache  # type: ignore[assignment]
    #: Graphs are captured and replayed by one thread, into results that are the same tensors every time.
    trial = None  # type: ignore[assignment]

    def __init__(self, drafter: StaticDrafter, prompts: Sequence[Sequence[int]]) -> None:
        columns = max(map(len, prompts)) + 4 * GRANULARITY
        cache = drafter.caches.lend(self, drafter.model, drafter.layers, len(prompts), columns)
        self._vocab = drafter.vocab_size
        super().__init__(drafter, prompts, cache)  # type: ignore[arg-type]

    def _advance(self, tokens: Tensor, features: Tensor | None, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        raise TypeError("drafter must draft with caches that grow by any rows, got a StaticDrafter: use ModelDrafter")

    def _read_ahead(self) -> None:
        ahead = [pending[:-1] for pending in self._pending]
        with torch.inference_mode():
            self._cache.read([[token if token < self._own_vocab else 0 for token in tokens] for tokens in ahead])
        self._pending = [pending[len(tokens) :] for pending, tokens in zip(self._pending, ahead, strict=True)]

    @torch.inference_mode()
    def propose(self, step: Step) -> Draft:
        wanted = step.lengths(self.wanted(step))
        longest = max(wanted)
        if longest == 0:
            return Draft.nothing(len(wanted))
        step, counts = step.to(self.device), [len(pending) for pending in self._pending]
        rows = bucket(max(longest + 1, *counts))
        self._cache.make_room(rows + longest)
        tokens = padded([[*pending, *[0] * (rows - len(pending))] for pending in self._pending], 0, device=self.device)
        read, most = to_device([counts, wanted], torch.int64, self.device).unbind()
        drafts, logits, stats = self._cache.replay(
            drafted,
            tokens=tokens,
            lengths=self._cache.lengths_there,
            counts=read,
            wanted=most,
            seed=step.seed,
            position=step.position,
            temperature=self.config.draft_temperature(step.temperature),
            top_k=step.top_k,
            top_p=step.top_p,
            min_p=step.min_p,
            drafts=longest,
            own_vocab=self._own_vocab,
            vocab=self._vocab,
            coupled=step.coupled,
            backend=self.config.backend,
        )
        self._cache.commit(counts)
        self._pending = [[] for _ in self._pending]
        return Draft(drafts, logits, stats, counts=[longest] * len(wanted)).first(wanted)


def drafted(
    cache: StaticCache,
    tokens: Tensor,
    lengths: Tensor,
    counts: Tensor,
    wanted: Tensor,
    drafts: int,
    own_vocab: int,
    vocab: int,
    coupled: bool,
    backend: BackendName | None,
    **sampling: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read rows [B, R] behind so many tokens each, of which the first ``counts [B]`` are real, and draw K drafts behind
    them, of which the first ``wanted [B]`` are: tokens [B, K], their logits [B, K, V], the scalars of what they were
    drawn from [B, K, 3]. Shapes are fixed and nothing waits for the host."""
    chosen: list[Tensor] = []
    rows: list[Tensor] = []
    stats: list[Tensor] = []
    outputs = cache.pass_over(tokens.where(tokens < own_vocab, 0), lengths, counts)
    last = (counts - 1).clamp(min=0)[:, None, None].expand(-1, 1, outputs.logits.shape[2])
    logits = outputs.logits.gather(1, last)[:, 0]
    for row in range(drafts):
        rows.append(functional.pad(logits, (0, vocab - own_vocab), value=-torch.inf))
        # Coupled noise is keyed on token ids of the target's vocabulary.
        drawn = sample(rows[-1] if coupled else logits, row=row, coupled=coupled, backend=backend, **sampling)
        chosen.append(drawn.tokens)
        stats.append(drawn.stats)
        if row + 1 < drafts:
            goes_on = (wanted > row + 1).long()
            known = drawn.tokens.where(drawn.tokens < own_vocab, 0).clamp(min=0)
            # A request that wants no more has no position behind its last.
            behind = lengths + counts + (wanted - 1).clamp(min=0, max=row)
            logits = cache.pass_over(known[:, None], behind, goes_on).logits[:, 0]
    return torch.stack(chosen, 1), torch.stack(rows, 1), torch.stack(stats, 1)
