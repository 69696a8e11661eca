"""The PyTorch reference: every op in plain tensor code, on any device PyTorch has, in float64.

It is what runs where no compiled backend does, and what a reader should read first. The operators' schemas are the
signatures of these functions, which have no defaults: PyTorch would not pass them on.
"""

from specdec_kernels.reference.attention import tree_attention
from specdec_kernels.reference.kv import compact_kv
from specdec_kernels.reference.noise import noise_words
from specdec_kernels.reference.tree_rules import sample_children, verify_tree
from specdec_kernels.reference.trees import tree_mask
from specdec_kernels.reference.verify import sample, verify_chain

__all__ = [
    "compact_kv",
    "noise_words",
    "sample",
    "sample_children",
    "tree_attention",
    "tree_mask",
    "verify_chain",
    "verify_tree",
]
