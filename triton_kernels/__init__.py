"""GPU kernels in Triton. Imports as ``specdec_kernels.triton_kernels``: the top-level name belongs to Triton."""

from specdec_kernels.triton_kernels.attention import tree_attention
from specdec_kernels.triton_kernels.kv import compact_kv
from specdec_kernels.triton_kernels.masks import tree_mask
from specdec_kernels.triton_kernels.noise import noise_words
from specdec_kernels.triton_kernels.sample import sample, sample_children
from specdec_kernels.triton_kernels.verify import verify_chain, verify_tree

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
