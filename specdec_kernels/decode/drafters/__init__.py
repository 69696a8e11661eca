"""Drafters. Each proposes tokens and says from which distribution; none can change the distribution of the text."""

from specdec_kernels.decode.drafters.adaptive import AdaptiveDrafter
from specdec_kernels.decode.drafters.ahead import AsyncDrafter
from specdec_kernels.decode.drafters.autoregressive import DraftConfig
from specdec_kernels.decode.drafters.callable import CallableDrafter
from specdec_kernels.decode.drafters.costs import Costs, RowCosts
from specdec_kernels.decode.drafters.dynamic_tree import Growth, TreeDrafter
from specdec_kernels.decode.drafters.eagle3 import Eagle3Drafter
from specdec_kernels.decode.drafters.fallback import FallbackDrafter
from specdec_kernels.decode.drafters.feature import FeatureDrafter
from specdec_kernels.decode.drafters.feature_model import FeatureModel
from specdec_kernels.decode.drafters.medusa import MedusaDrafter
from specdec_kernels.decode.drafters.medusa_model import MedusaModel
from specdec_kernels.decode.drafters.merged import MergedDrafter
from specdec_kernels.decode.drafters.model import ModelDrafter
from specdec_kernels.decode.drafters.ngram import NGramDrafter
from specdec_kernels.decode.drafters.shared_history import SharedHistory
from specdec_kernels.decode.drafters.static import StaticDrafter
from specdec_kernels.decode.drafters.translated import IntersectionDrafter, TranslatedDrafter
from specdec_kernels.decode.drafters.translation import Translation

__all__ = [
    "AdaptiveDrafter",
    "AsyncDrafter",
    "CallableDrafter",
    "Costs",
    "DraftConfig",
    "Eagle3Drafter",
    "FallbackDrafter",
    "FeatureDrafter",
    "FeatureModel",
    "Growth",
    "IntersectionDrafter",
    "MedusaDrafter",
    "MedusaModel",
    "MergedDrafter",
    "ModelDrafter",
    "NGramDrafter",
    "RowCosts",
    "SharedHistory",
    "StaticDrafter",
    "TranslatedDrafter",
    "Translation",
    "TreeDrafter",
]
