"""Drafters. Each proposes tokens and says from which law; none can change the law of the text."""

from specdec_kernels.decode.drafters.adaptive import AdaptiveDrafter, Costs
from specdec_kernels.decode.drafters.autoregressive import Drafting
from specdec_kernels.decode.drafters.dynamic_tree import Growth, TreeDrafter
from specdec_kernels.decode.drafters.feature import FeatureDrafter
from specdec_kernels.decode.drafters.feature_model import FeatureModel
from specdec_kernels.decode.drafters.first_of import FirstOf
from specdec_kernels.decode.drafters.lookup import LookupDrafter
from specdec_kernels.decode.drafters.medusa import MedusaDrafter
from specdec_kernels.decode.drafters.medusa_model import MedusaModel
from specdec_kernels.decode.drafters.model import ModelDrafter
from specdec_kernels.decode.drafters.rule import RuleDrafter

__all__ = [
    "AdaptiveDrafter",
    "Costs",
    "Drafting",
    "FeatureDrafter",
    "FeatureModel",
    "FirstOf",
    "Growth",
    "LookupDrafter",
    "MedusaDrafter",
    "MedusaModel",
    "ModelDrafter",
    "RuleDrafter",
    "TreeDrafter",
]
