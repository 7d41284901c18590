"""What is punished: losses over pairs of embeddings, one subclass of ``PairLoss`` per formula."""

from lightning_itm.losses.base import DirectionCost, PairLoss
from lightning_itm.losses.contrastive import InfoNCELoss, ScaledLoss, SigmoidLoss
from lightning_itm.losses.quintuplet import QuintupletLoss
from lightning_itm.losses.settings import loss_settings, make_loss
from lightning_itm.losses.triplet import TripletLoss

__all__ = [
    "DirectionCost",
    "InfoNCELoss",
    "PairLoss",
    "QuintupletLoss",
    "ScaledLoss",
    "SigmoidLoss",
    "TripletLoss",
    "loss_settings",
    "make_loss",
]
