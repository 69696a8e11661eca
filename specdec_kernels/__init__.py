"""Fused kernels for the verification step of speculative decoding, with exactly the target's distribution."""

from specdec_kernels.ops import LogitBias, Penalties, Sample, Verified, noise_words, sample, verify_chain
from specdec_kernels.version import __version__

__all__ = [
    "LogitBias",
    "Penalties",
    "Sample",
    "Verified",
    "__version__",
    "noise_words",
    "sample",
    "verify_chain",
]
