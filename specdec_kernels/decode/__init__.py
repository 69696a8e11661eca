"""The thin decoding loop: propose, score, verify, commit."""

from specdec_kernels.extras import brought_by

with brought_by("decode"):
    from specdec_kernels.decode.drafts import Draft, Step, TreeDraft
    from specdec_kernels.decode.generation import generate, stream
    from specdec_kernels.decode.llama_cpp import LlamaCppTarget
    from specdec_kernels.decode.packed import pack_linear
    from specdec_kernels.decode.prompts import SourcePrompt
    from specdec_kernels.decode.protocols import Drafter, DrafterSession, JoinableSession, Scores, Target, TargetSession
    from specdec_kernels.decode.requests import Grammar, Sampling
    from specdec_kernels.decode.results import Ending, Generation, Token
    from specdec_kernels.decode.scheduler import Scheduler
    from specdec_kernels.decode.static import StaticTarget
    from specdec_kernels.decode.statistics import Statistics
    from specdec_kernels.decode.submission import Submission
    from specdec_kernels.decode.targets import TransformersTarget
    from specdec_kernels.decode.text import Completion, Continuation, SamplingParams, TextGenerator

__all__ = [
    "Completion",
    "Continuation",
    "Draft",
    "Drafter",
    "DrafterSession",
    "Ending",
    "Generation",
    "Grammar",
    "JoinableSession",
    "LlamaCppTarget",
    "Sampling",
    "SamplingParams",
    "Scheduler",
    "Scores",
    "SourcePrompt",
    "StaticTarget",
    "Statistics",
    "Step",
    "Submission",
    "Target",
    "TargetSession",
    "TextGenerator",
    "Token",
    "TransformersTarget",
    "TreeDraft",
    "generate",
    "pack_linear",
    "stream",
]
