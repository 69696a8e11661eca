"""Fused kernels for the verification step of speculative decoding, with exactly the target's distribution."""

from types import FunctionType

from specdec_kernels.ops import (
    DraftVocabulary,
    LogitBias,
    Penalties,
    TokenCounts,
    noise_words,
    sample,
    verify_chain,
)
from specdec_kernels.ops.attention import tree_attention
from specdec_kernels.ops.kv import compact_kv
from specdec_kernels.ops.results import DrawnChildren, Sample, Verified, VerifiedTree
from specdec_kernels.ops.tree_rules import sample_children, verify_tree
from specdec_kernels.ops.trees import TreeLinks, tree_links, tree_mask, tree_mask_mod, tree_paths, tree_positions
from specdec_kernels.version import __version__
from specdec_kernels.workspace import verify_chain_workspace

__all__ = [
    "DraftVocabulary",
    "DrawnChildren",
    "LogitBias",
    "Penalties",
    "Sample",
    "TokenCounts",
    "TreeLinks",
    "Verified",
    "VerifiedTree",
    "__version__",
    "compact_kv",
    "noise_words",
    "sample",
    "sample_children",
    "tree_attention",
    "tree_links",
    "tree_mask",
    "tree_mask_mod",
    "tree_paths",
    "tree_positions",
    "verify_chain",
    "verify_chain_workspace",
    "verify_tree",
]

# Said of every function, and of the classes that check what they are made of, so written once.
_functions = [value for name in __all__ if isinstance(value := globals()[name], FunctionType)]
for _public in (*_functions, DraftVocabulary, TokenCounts):
    _public.__doc__ = f"""{_public.__doc__ or ""}
    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came, before anything is done.
"""
    if "backend" in _public.__annotations__:
        _public.__doc__ += "        RuntimeError: the requested backend cannot run, with the reason.\n"
