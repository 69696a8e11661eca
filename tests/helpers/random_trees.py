"""Trees of many shapes."""

from __future__ import annotations

import random

import torch


def trees(nodes, batch=4):
    """A chain, a star, and random trees; some end early."""
    rng = random.Random(nodes)
    rows = [list(range(-1, nodes - 1)), [-1] + [0] * (nodes - 1)]
    rows += [[-1] + [rng.randrange(max(0, i - 6), i) for i in range(1, nodes)] for _ in range(batch - 2)]
    for row, end in ((rows[-1], nodes - nodes // 3), (rows[1], max(1, nodes - 1))):
        row[end:] = [-1] * (nodes - end)
    return torch.tensor(rows)
