"""A cache that a transformers model is called with, of whatever kind it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from specdec_kernels.decode import model_facts
from specdec_kernels.decode.cache import RaggedCache
from specdec_kernels.decode.layer_kinds import Kind
from specdec_kernels.decode.sources import sources_of


class ModelCache(RaggedCache):
    """A cache with what the model's encoder, if it has one, has read of each prompt's source.

    Args:
        model: of transformers.
        layers: what :func:`model_facts.check_model` says of it.
        prompts: which were checked.
    """

    def __init__(self, model: Any, layers: Sequence[Kind], prompts: Sequence[Sequence[int]]) -> None:
        self._sources = sources_of(model, prompts)
        encoded = self._sources is not None
        super().__init__(
            layers,
            len(prompts),
            model.device,
            self._sources or model,
            mask=model_facts.mask_dtype(model),
            argument=model_facts.cache_argument(model),
            positions=encoded or model_facts.takes(model, "position_ids"),
            column_positions=encoded,
        )

    def select(self, slots: Sequence[int]) -> None:
        """Go on with the requests in these slots only."""
        super().select(slots)
        if self._sources is not None:
            self._sources.select(slots)

    def join(self, other: Self) -> None:
        """Go on with the requests of another cache of the same model too, behind one's own.

        Raises:
            ValueError: their sources cannot be had together, before anything changes.
        """
        if self._sources is not None and other._sources is not None:
            self._sources.join(other._sources)
        super().join(other)
