"""The inference half: guides for any model."""

from guides import families
from guides.amortized import Amortized
from guides.deep_set import DeepSet
from guides.dlgm import Ladder
from guides.ensemble import Ensemble
from guides.exact import Exact
from guides.fitting import Choices, for_model
from guides.local import Local

__all__ = [
    "Amortized",
    "Choices",
    "DeepSet",
    "Ensemble",
    "Exact",
    "Ladder",
    "Local",
    "families",
    "for_model",
]
