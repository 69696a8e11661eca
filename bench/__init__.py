"""Microbenchmarks. Imports as ``specdec_kernels.bench``."""
