"""The thin decoding loop: propose, score, verify, commit."""

from specdec_kernels.decode.loop import Generation, Token, generate, stream
from specdec_kernels.decode.packed import pack_linear
from specdec_kernels.decode.protocols import Draft, Drafter, Scores, Step, Target, TreeDraft
from specdec_kernels.decode.requests import Grammar, Sampling
from specdec_kernels.decode.statistics import Statistics
from specdec_kernels.decode.targets import TransformersTarget

__all__ = [
    "Draft",
    "Drafter",
    "Generation",
    "Grammar",
    "Sampling",
    "Scores",
    "Statistics",
    "Step",
    "Target",
    "Token",
    "TransformersTarget",
    "TreeDraft",
    "generate",
    "pack_linear",
    "stream",
]
