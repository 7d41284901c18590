"""What trains: LightningModules, and what they need for it."""

from lightning_itm.models.dual_encoder import DualEncoder
from lightning_itm.models.generalized_pooling import GeneralizedPooling
from lightning_itm.models.hugging_face import HFDualEncoder
from lightning_itm.models.open_clip_dual_encoder import OpenCLIPDualEncoder
from lightning_itm.models.residual_vse import RegionEncoder, ResidualVSE, WordEncoder
from lightning_itm.models.weight_interpolation import interpolate_weights

__all__ = [
    "DualEncoder",
    "GeneralizedPooling",
    "HFDualEncoder",
    "OpenCLIPDualEncoder",
    "RegionEncoder",
    "ResidualVSE",
    "WordEncoder",
    "interpolate_weights",
]
