"""GPU kernels in Triton. Imports as ``specdec_kernels.triton_kernels``: the top-level name belongs to Triton."""

from specdec_kernels.triton_kernels.noise import noise_words
from specdec_kernels.triton_kernels.sample import sample
from specdec_kernels.triton_kernels.trees import tree_mask
from specdec_kernels.triton_kernels.verify import verify_chain

__all__ = ["noise_words", "sample", "tree_mask", "verify_chain"]
