"""How often each token occurs in the text of each request, kept from one step to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec_kernels.checks import ids_of, listed, whole
from specdec_kernels.tensors import padded, to_device


def insert_ids(ids: Tensor, counts: Tensor, added: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """``ids [B, M]``, ascending, with those of ``added [B, N]`` among them, and their ``counts [B, M, 2]``; ``vocab``
    stands for none, and behind the last.

    Only the N are sorted. What is returned has M + N columns; an id that was not there has a count of 0.
    """
    added = added.sort(1).values
    known = torch.searchsorted(ids, added) < torch.searchsorted(ids, added, right=True)
    known[:, 1:] |= added[:, 1:] == added[:, :-1]
    new = added.masked_fill(known, vocab).sort(1).values
    # Merge two sorted rows: each id's slot is its index plus the number of smaller ids in the other row. Both may have
    # `vocab`, in the new row behind the old one's.
    (batch, old_size), new_size = ids.shape, new.shape[1]
    old_slots = torch.arange(old_size, device=ids.device) + torch.searchsorted(new, ids)
    new_slots = torch.arange(new_size, device=ids.device) + torch.searchsorted(ids, new, right=True)
    merged = ids.new_empty((batch, old_size + new_size)).scatter_(1, old_slots, ids).scatter_(1, new_slots, new)
    merged_counts = counts.new_zeros((*merged.shape, 2))
    return merged, merged_counts.scatter_(1, old_slots[..., None].expand_as(counts), counts)


def count_tokens(ids: Tensor, counts: Tensor, column: int, tokens: Tensor, vocab: int) -> None:
    """Count ``tokens [B, N]``, all of them among ``ids [B, M]``, in a column of ``counts [B, M, 2]``, in place."""
    counts[..., column].scatter_add_(1, torch.searchsorted(ids, tokens), (tokens < vocab).int())


class TokenCounts:
    """How often each token occurs in the prompts and outputs of a batch: what :class:`Penalties` needs of the texts.

    The prompts are counted once; after that a step costs what it adds and one copy of the counts, however long the
    texts are. Tokens come from the host and are moved without waiting for the device.

    Args:
        prompts: of each request its token ids, in [0, vocab_size); any may be empty.
        vocab_size: columns of the logits that are penalised.
        device: of those logits.

    Equivalent to::

        counts = torch.stack([torch.bincount(torch.tensor(x), minlength=vocab_size) for x in (prompt, output)], -1)

    Example: a loop makes it once and tells it what happens to the batch.
        >>> from specdec_kernels import Penalties, TokenCounts, sample
        >>> counts = TokenCounts([[1, 2, 2], [0]], vocab_size=4, device="cpu")
        >>> counts.extend([[3], [0, 0]])  # what each request generated in this step
        >>> counts.select([1])  # the first request has ended
        >>> counts.ids.tolist(), counts.counts.tolist()
        ([[0]], [[[1, 2]]])
        >>> penalties = Penalties(counts=counts, frequency_penalty=3.0)
        >>> logits = torch.tensor([[5.0, 1.0, 0.0, 0.0]])
        >>> sample(logits, seed=1, position=3, temperature=0.0, penalties=penalties).tokens.tolist()
        [1]
    """

    ids: Tensor
    """int32 [B, M]: the ids that occur in each request, ascending, ``vocab_size`` behind the last."""
    counts: Tensor
    """int32 [B, M, 2]: how often each occurs in the prompt and in the output."""

    def __init__(self, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device | str) -> None:
        whole("vocab_size", vocab_size, 1, 1 << 31)
        prompts, self.vocab_size = listed("prompts", prompts, "texts"), vocab_size
        # The host knows how many ids occur, so that the device need not be asked.
        self._occurring: list[set[int]] = [set() for _ in prompts]
        self.ids = torch.empty((len(prompts), 0), dtype=torch.int32, device=device)
        self.counts = self.ids.new_empty((len(prompts), 0, 2))
        self._count("prompts", prompts, 0)

    def __len__(self) -> int:
        """Number of requests."""
        return len(self._occurring)

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        """Count what each request generated, in order of the requests; any may have generated nothing.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came; nothing is counted then.
        """
        self._count("tokens", listed("tokens", tokens, "texts"), 1)

    def select(self, slots: Sequence[int]) -> None:
        """Go on with the requests ``slots``, in that order.

        Raises:
            TypeError, ValueError: they are no numbers; there is no such request.
        """
        slots = ids_of("slots", slots, len(self), "slots")
        self._occurring = [set(self._occurring[slot]) for slot in slots]
        rows = to_device(slots, torch.int64, self.ids.device)
        self.ids, self.counts = self.ids[rows], self.counts[rows]
        self._trim()

    def _count(self, name: str, texts: Sequence[Sequence[int]], column: int) -> None:
        texts = [ids_of(f"{name}[{request}]", text, self.vocab_size) for request, text in enumerate(texts)]
        if len(texts) != len(self):
            raise ValueError(f"{name} must have one entry for each of the {len(self)} requests, got {len(texts)}")
        for occurring, text in zip(self._occurring, texts, strict=True):
            occurring.update(text)
        tokens = padded(texts, self.vocab_size, torch.int32, self.ids.device)
        self.ids, self.counts = insert_ids(self.ids, self.counts, tokens, self.vocab_size)
        count_tokens(self.ids, self.counts, column, tokens, self.vocab_size)
        self._trim()

    def _trim(self) -> None:
        size = max(map(len, self._occurring), default=0)
        self.ids, self.counts = self.ids[:, :size].contiguous(), self.counts[:, :size].contiguous()
