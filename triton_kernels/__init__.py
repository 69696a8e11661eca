"""GPU kernels in Triton. Imports as ``specdec_kernels.triton_kernels``: the top-level name belongs to Triton."""

from specdec_kernels.triton_kernels.noise import noise_words
from specdec_kernels.triton_kernels.sample import sample
from specdec_kernels.triton_kernels.verify import verify_chain

__all__ = ["noise_words", "sample", "verify_chain"]
