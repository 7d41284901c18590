"""What the models of open_clip and of transformers have in common: locked towers, adapters, and checkpoints of them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_itm.export.scale import return_scale, take_scale, trained_scale
from lightning_itm.models.dual_encoder import DualEncoder
from lightning_itm.models.optimization import split_towers_by_depth
from lightning_itm.models.pretrained.locked import keep_batch_statistics
from lightning_itm.models.pretrained.lora import add_adapters, merge_adapters
from lightning_itm.models.pretrained.lora_options import lora_options

if TYPE_CHECKING:
    from typing_extensions import Self


class PretrainedDualEncoder(DualEncoder):
    """Train a model that others have pretrained. Base of :class:`OpenCLIPDualEncoder` and :class:`HFDualEncoder`.

    A subclass has the model as ``self.model``, saves its options with ``save_settings``, and then calls :meth:`adapt`. A loss
    that is set later, ``model.loss = InfoNCELoss()``, begins with the temperature of the model, as one that is passed does.
    """

    model: Any  # a module, whose own methods the subclasses call
    layer_decay: float | None = None
    has_trained_scale = False
    """Whether the temperature of ``model`` was learned, and is no random start."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Let a new loss go on with the temperature of the one before, or of the model, unless it was given its own."""
        goes_on = name == "loss" and self.has_trained_scale
        if goes_on and not getattr(self.loss, "takes_pretrained_scale", True):
            return_scale(self.loss, self.model)  # what was learned so far
        super().__setattr__(name, value)
        if goes_on:
            take_scale(value, self.model)

    def take_scale(self) -> None:
        """Let the loss, and each that is set later, begin with the temperature of the model, whose weights were read."""
        self.has_trained_scale = True
        take_scale(self.loss, self.model)

    def check_lora(self, lora: Any, *, saves_adapters_only: bool, has_weights: bool, is_compiled: bool) -> None:
        """Raise a ValueError if the options of adapters do not fit the others.

        Args:
            lora: The option ``lora``.
            saves_adapters_only: The option ``save_adapters_only``.
            has_weights: Whether the model begins with weights that can be read again.
            is_compiled: The option ``compile``.
        """
        options = lora_options(lora)
        if saves_adapters_only and not options:
            raise ValueError("Expected `lora` with `save_adapters_only=True`, got None. Give `lora`, such as `lora=8`.")
        if saves_adapters_only and not has_weights:
            raise ValueError(
                "Expected pretrained weights with `save_adapters_only=True`, got random ones, which can't be read again. "
                "Save everything."
            )
        if options and is_compiled:
            raise ValueError(
                "Expected `compile=False` with `lora`, got True. Adapters are not compiled. Leave one out."
            )

    def adapt(self) -> None:
        """Put in the adapters of ``self.hparams.lora``, where there are any. All other weights of the model are frozen then.

        Raises:
            ValueError: if a tower with adapters is locked, or has no layer that can be adapted.
        """
        options = lora_options(self.hparams["lora"])
        for kind in options:
            if self.hparams[f"lock_{kind}"]:
                raise ValueError(
                    f"Expected `lock_{kind}=False` with adapters in the {kind} tower, got True. Its weights are frozen with "
                    "`lora` in any case. Leave one of the two out."
                )
        if options:
            add_adapters(self.model, self.towers(), options)

    def merged(self) -> nn.Module:
        """Return a copy of the model for use without this package: adapters merged, with the trained temperature and bias."""
        merged = merge_adapters(self.model, self)
        return_scale(self.loss, merged)
        return merged

    def train(self, mode: bool = True) -> "Self":
        """Set the mode of all parts except the batch norms of a locked tower, whose statistics stay as they are."""
        super().train(mode)
        for kind, tower in self.towers().items():
            if self.hparams[f"lock_{kind}"] or self.hparams["lora"] is not None:
                keep_batch_statistics(tower)
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups of :class:`DualEncoder`, split by depth where ``layer_decay`` is given."""
        return split_towers_by_depth(super().parameter_groups(), self.towers(), self.learning_rate, self.layer_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen weights out of a checkpoint with ``save_adapters_only``."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["has_trained_scale"] = self.has_trained_scale or bool(trained_scale(self.loss))
        if self.hparams["save_adapters_only"]:
            frozen = self._frozen_names()
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: value for name, value in weights.items() if name not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember whether the temperature that follows was learned."""
        super().on_load_checkpoint(checkpoint)
        self.has_trained_scale = checkpoint.get("has_trained_scale", True)  # older checkpoints do not say

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights. With ``save_adapters_only``, frozen ones that are not among them stay as they are."""
        if self.hparams["save_adapters_only"]:
            frozen = self._frozen_names()
            state_dict = {name: value for name, value in self.state_dict().items() if name in frozen} | dict(state_dict)
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        loss: Any = self.loss
        if "loss.logit_scale" in state_dict:
            loss.takes_pretrained_scale = False  # it has been trained
        elif self.has_trained_scale:
            take_scale(loss, self.model)
        return result

    def _frozen_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
