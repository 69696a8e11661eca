"""Fused kernels for the verification step of speculative decoding, with exactly the target's distribution."""

from specdec_kernels.ops import Sample, Verified, noise_words, sample, verify_chain

__version__ = "0.1.0"

__all__ = ["Sample", "Verified", "__version__", "noise_words", "sample", "verify_chain"]
