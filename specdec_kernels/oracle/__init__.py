"""The float64 NumPy oracle: slow, obvious, one request at a time. Tests and the self-test import it, nothing else does.

Every decision comes with its *margin*: the smallest relative error, common in size to all probabilities involved, that
could have made it fall the other way. A backend whose probabilities are good to a relative ``epsilon`` must agree with
the oracle wherever the margin exceeds it.
"""

from specdec_kernels.oracle.distributions import (
    Distribution,
    Processing,
    Sampling,
    distribution,
    filter_cutoff,
    flat_race,
    race,
    two_level_race,
)
from specdec_kernels.oracle.exact import (
    block_distribution,
    chain_distribution,
    target_distribution,
    total_variation,
    typical_distribution,
)
from specdec_kernels.oracle.exact_trees import tree_distribution
from specdec_kernels.oracle.noise import Noise, noise_words, philox
from specdec_kernels.oracle.step import Verified
from specdec_kernels.oracle.trees import Drawn, sample_children, verify_tree
from specdec_kernels.oracle.verify import Sampled, sample, verify_chain

__all__ = [
    "Distribution",
    "Drawn",
    "Noise",
    "Processing",
    "Sampled",
    "Sampling",
    "Verified",
    "block_distribution",
    "chain_distribution",
    "distribution",
    "filter_cutoff",
    "flat_race",
    "noise_words",
    "philox",
    "race",
    "sample",
    "sample_children",
    "target_distribution",
    "total_variation",
    "tree_distribution",
    "two_level_race",
    "typical_distribution",
    "verify_chain",
    "verify_tree",
]
