"""How often each token occurs in the text of each request, kept from one step to the next."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from operator import index

import numpy as np
import torch
from torch import Tensor


def unique_ids(ids: Tensor, vocab: int) -> Tensor:
    """The ids of each row ``[B, N]``, ascending, each once; ``vocab`` stands for none, and behind the last."""
    ids = ids.sort(1).values
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    return ids.masked_fill(again, vocab).sort(1).values


def insert_ids(ids: Tensor, counts: Tensor, added: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """``ids [B, M]`` of :func:`unique_ids` with those of ``added [B, N]`` among them, and their ``counts [B, M, 2]``.

    Only the N are sorted. What is returned has M + N columns; an id that was not there has a count of 0.
    """
    first, behind = (torch.searchsorted(ids, added, right=right) for right in (False, True))
    new = unique_ids(added.masked_fill(first < behind, vocab), vocab)
    # An id goes as many places to the right as the other row has smaller ones, its own `vocab` behind the other's.
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

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Equivalent to::

        counts = torch.stack([torch.bincount(torch.tensor(x), minlength=vocab_size) for x in (prompt, output)], -1)

    Example: a loop makes it once and tells it what happens to the batch.
        >>> import torch
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
        self.vocab_size = vocab_size
        counted = [np.unique(text, return_counts=True) for text in self._checked("prompts", prompts)]
        # The host knows how many ids occur, so that the device need not be asked.
        self._occurring = [set(ids.tolist()) for ids, _ in counted]
        size = max(map(len, self._occurring), default=0)
        ids = np.full((len(counted), size), vocab_size, np.int32)
        counts = np.zeros((len(counted), size, 2), np.int32)
        for slot, (own, often) in enumerate(counted):
            ids[slot, : len(own)], counts[slot, : len(own), 0] = own, often
        self.ids, self.counts = _moved(ids, torch.device(device)), _moved(counts, torch.device(device))

    def __len__(self) -> int:
        """Number of requests."""
        return len(self._occurring)

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        """Count what each request generated, in order of the requests; any may have generated nothing.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came; nothing is counted then.
        """
        texts = self._checked("tokens", tokens)
        if len(texts) != len(self):
            raise ValueError(f"tokens must have one entry for each of the {len(self)} requests, got {len(texts)}")
        padded = np.full((len(self), max(map(len, texts), default=0)), self.vocab_size, np.int32)
        for slot, text in enumerate(texts):
            padded[slot, : len(text)] = text
            self._occurring[slot].update(text.tolist())
        generated = _moved(padded, self.ids.device)
        self.ids, self.counts = insert_ids(self.ids, self.counts, generated, self.vocab_size)
        count_tokens(self.ids, self.counts, 1, generated, self.vocab_size)
        self._trim()

    def select(self, slots: Sequence[int]) -> None:
        """Go on with the requests ``slots``, in that order.

        Raises:
            ValueError: there is no such request.
        """
        slots = [index(slot) for slot in slots]
        if not all(0 <= slot < len(self) for slot in slots):
            raise ValueError(f"slots must be in [0, {len(self)}), got {slots}")
        self._occurring = [set(self._occurring[slot]) for slot in slots]
        rows = _moved(np.array(slots, np.int64), self.ids.device)
        self.ids, self.counts = self.ids[rows], self.counts[rows]
        self._trim()

    def _trim(self) -> None:
        size = max(map(len, self._occurring), default=0)
        self.ids, self.counts = self.ids[:, :size].contiguous(), self.counts[:, :size].contiguous()

    def _checked(self, name: str, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        checked = []
        for request, text in enumerate(texts):
            try:
                ids = np.asarray(text)
            except ValueError:  # sequences of several lengths
                ids = np.empty((0, 0))
            if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise TypeError(f"{name}[{request}] must be a sequence of int, got {reprlib.repr(text)}")
            if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
                wrong = next(token for token in ids.tolist() if not 0 <= token < self.vocab_size)
                raise ValueError(f"{name}[{request}] must hold ids in [0, {self.vocab_size}), got {wrong}")
            checked.append(ids.astype(np.int32))
        return checked


def _moved(array: np.ndarray, device: torch.device) -> Tensor:
    """On the device, without waiting for what it does; pinned memory is not reused before the copy is done."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
