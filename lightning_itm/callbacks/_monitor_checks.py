"""What the gradient monitor needs of the Trainer, the module and its loss."""

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_itm.callbacks._strategies import check_reachable_weights


def check_can_be_watched(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Check, before a fit, that the gradients can be measured and that the loss has a rule to switch.

    Raises:
        MisconfigurationException: if one of these is not so.
    """
    check_reachable_weights(trainer, "the norms are of the whole gradient")
    if not hasattr(pl_module, "towers"):
        raise MisconfigurationException(
            f"Expected a `DualEncoder`, got {type(pl_module).__name__}. "
            "A module of another class needs a method `towers()`, which says what is watched."
        )
    loss = getattr(pl_module, "loss", None)
    if not getattr(loss, "has_selective_rule", False):
        raise MisconfigurationException(
            f"Expected a loss with a selective rule to switch, got {type(loss).__name__}. "
            "Use `TripletLoss(negatives='hardest')` or 'selective', or `QuintupletLoss` around one."
        )
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"Expected automatic optimization, got a {type(pl_module).__name__} that steps its optimizers itself: no step "
            "would say which gradients belong to it. Leave `automatic_optimization` True."
        )
