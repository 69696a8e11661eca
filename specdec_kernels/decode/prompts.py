"""Prompts of encoder-decoders, and how long prompts may be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex, TypeGuard, overload

from torch import Tensor

from specdec_kernels.checks import flags, ids_of


class SourcePrompt(tuple[int, ...]):
    """The prompt of an encoder-decoder: the tokens that its text begins with, and the source for its encoder.

    It is a sequence of those tokens, so that whatever takes prompts takes it; a slice of it has the same source.

    Args:
        source: token ids; or a floating tensor of any dtype, as the encoder takes it without the dimension of the
            batch (Whisper: the features [mel, frames]).
        tokens: what the text begins with, at least the token that the decoder starts with.
        shares_ids: whether ids of the source are of the vocabulary that the text is written in, so that a drafter may
            look drafts up there. A target that knows better tells its drafters.

    Raises:
        TypeError, ValueError: ``source`` is neither, or empty; ``shares_ids`` is no bool.
    """

    source: list[int] | Tensor
    shares_ids: bool

    def __new__(cls, source: Sequence[int] | Tensor, tokens: Iterable[int], shares_ids: bool = True) -> SourcePrompt:
        flags(shares_ids=shares_ids)
        made = super().__new__(cls, tokens)
        made.shares_ids = shares_ids
        made.source = source if _is_floating(source) else ids_of("source", source)
        if not len(made.source):
            raise ValueError("source must not be empty")
        return made

    @overload
    def __getitem__(self, place: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> SourcePrompt: ...
    def __getitem__(self, place: SupportsIndex | slice) -> int | SourcePrompt:
        found = super().__getitem__(place)
        return SourcePrompt(self.source, found, self.shares_ids) if isinstance(found, tuple) else found

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.source, tuple(self), self.shares_ids


def _is_floating(source: Any) -> TypeGuard[Tensor]:
    return isinstance(source, Tensor) and source.is_floating_point()


def refuse_sources(prompts: Sequence[Sequence[int]], name: str) -> None:
    """Check that prompts are all that is to be read.

    Raises:
        ValueError: one has a source.
    """
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, SourcePrompt):
            raise ValueError(
                f"prompts[{index}] must have no source for {name}, which has no encoder, got a SourcePrompt"
            )


def read_lengths(
    prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], limit: int | None, name: str
) -> list[int]:
    """How many tokens of each history are read: all but the last.

    Raises:
        ValueError: more than the ``limit`` of positions that a model has; None is no limit.
    """
    lengths = [len(prompt) + count - 1 for prompt, count in zip(prompts, max_new_tokens, strict=True)]
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        if limit is not None and length > limit:
            raise ValueError(
                f"max_new_tokens must leave prompt and new tokens within the {limit} positions of {name}, the last "
                f"token not counted, got {length} for prompt {index} of {len(prompt)} tokens"
            )
    return lengths
