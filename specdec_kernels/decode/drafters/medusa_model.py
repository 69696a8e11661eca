"""Heads that each guess one token further ahead (Medusa, arXiv:2401.10774), and the tree of guesses worth scoring.

Head j reads the target's hidden state at token t and the embedding of token t + 1, which the last step drew, and
guesses token t + 2 + j. Medusa's heads read the hidden state alone; knowing the drawn token is what Hydra
(arXiv:2402.05109) adds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional


class MedusaModel(nn.Module):
    """Residual blocks over (hidden state, embedding), to be followed by the target's head on a short list of ids.

    Args:
        width: hidden size of the target.
        shortlist: int64 [S], the ids that can be drafted, ascending.
        paths: int64 [M, heads], the nodes of the tree in falling order of how often they are right: the rank of the
            guess to take from every head on the way, -1 behind the last. Every prefix of the list is a tree.
    """

    shortlist: Tensor
    paths: Tensor

    def __init__(self, width: int, shortlist: Tensor, paths: Tensor) -> None:
        super().__init__()
        self.blocks = nn.Linear(2 * width, paths.shape[1] * width)
        self.register_buffer("shortlist", shortlist)
        self.register_buffer("paths", paths)

    @property
    def heads(self) -> int:
        """Tokens ahead that are guessed."""
        return self.paths.shape[1]

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """What the target's head reads for every guess: [..., heads, H]."""
        blocks = functional.silu(self.blocks(torch.cat([hidden, embedding], -1))).unflatten(-1, (self.heads, -1))
        guesses: Tensor = hidden[..., None, :] + blocks
        return guesses

    def save(self, path: Path) -> None:
        """Write the weights in bfloat16, the lists in int32."""
        state = {name: tensor.to(torch.bfloat16) for name, tensor in self.named_parameters()}
        lists = {"shortlist": self.shortlist.to(torch.int32), "paths": self.paths.to(torch.int32)}
        save_file({**state, **lists}, path)

    @classmethod
    def load(cls, path: Path, config: Any, dtype: torch.dtype) -> MedusaModel:
        """Read what :meth:`save` wrote."""
        state = load_file(path)
        lists = {name: state.pop(name).long() for name in ("shortlist", "paths")}
        model = cls(config.hidden_size, **lists)
        model.load_state_dict({**state, **lists})
        return model.to(dtype).eval()


def best_paths(ranks: Tensor, count: int, guesses: int) -> Tensor:
    """The nodes of the tree that gains most, by greedy marginal gain.

    A node adds the chance that the text goes all the way along its path, so the best tree of any size is made of the
    most frequent paths; a path is never more frequent than the one it continues, so every prefix of them is a tree.

    Args:
        ranks: int64 [T, heads], at T places of a text: the rank of the true token among the guesses of each head.
        count: nodes wanted, the root not among them.
        guesses: of a head that can be taken; a larger rank is no guess.

    Returns:
        int64 [M, heads], M <= count, as :class:`MedusaModel` takes them.
    """
    heads = ranks.shape[1]
    found: list[tuple[int, int, list[int]]] = []
    for depth in range(1, heads + 1):
        there = ranks[(ranks[:, :depth] < guesses).all(1), :depth]
        paths, counts = there.unique(dim=0, return_counts=True)
        most = counts.argsort(descending=True)[:count]
        padding = [-1] * (heads - depth)
        found += [(-int(counts[i]), depth, [*paths[i].tolist(), *padding]) for i in most]
    return torch.tensor([path for _, _, path in sorted(found)[:count]])
