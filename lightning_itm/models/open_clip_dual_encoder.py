"""Any open_clip model as a DualEncoder."""

from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_itm.models.dual_encoder import DualEncoder
from lightning_itm.models.optimization import layer_depths, split_by_depth

if TYPE_CHECKING:
    from typing_extensions import Self


class OpenCLIPDualEncoder(DualEncoder):
    """Fine-tune an open_clip model.

    The loss owns ``logit_scale`` (and ``logit_bias``); the model's own are copied into it if pretrained weights are loaded
    and the loss was not told otherwise, and are frozen, as is CoCa's captioner, because an unused parameter stops DDP.

    ``load_from_checkpoint(path, loss=...)`` needs the loss again, and reads ``pretrained`` again unless told
    ``pretrained=None``.

    Args:
        model_name: A name of ``open_clip.list_models()``, ``hf-hub:...`` or ``local-dir:...``.
        pretrained: A tag of ``open_clip.list_pretrained_tags_by_model(model_name)``, the path of a checkpoint, or ``None``.
        loss: As in :class:`DualEncoder`.
        lock_image: Freeze the image tower (LiT), batch statistics included; of a timm model the trunk alone. Its batch norms
            are then in eval mode throughout, which Lightning mentions at the start of training.
        lock_text: Freeze the text tower.
        gradient_checkpointing: Compute activations twice to keep fewer of them.
        layer_decay: What the learning rate is multiplied by at each layer on the way down a tower, in (0, 1], such as 0.8;
            see :func:`~lightning_itm.models.optimization.layer_depths`. Projections, final norms and the loss keep the full
            one. ``None``, as 1, means one learning rate for all.
        compile: Compile the towers with ``torch.compile``, at the first batch. Weights keep their names; copies of the
            module, such as the one of :class:`~lightning_itm.FalseNegativeElimination`, are not compiled.
        augmentation: Arguments of ``open_clip.AugmentationCfg`` for the training transform, such as ``{"scale": (0.5, 1)}``.
        **kwargs: As in :class:`DualEncoder`.

    Attributes:
        model: The open_clip model.
        transforms: ``transform``, ``eval_transform`` and ``tokenizer``, by these names, for
            ``ImageTextDataset(..., **model.transforms)``.

    Raises:
        ValueError: open_clip has no model, or no weights, of that name; ``layer_decay`` is outside (0, 1].

    References:
        Layer-wise decay: Bao et al., *BEiT*, ICLR 2022, arXiv 2106.08254; of CLIP: Dong et al., *CLIP Itself is a Strong
        Fine-tuner*, arXiv 2212.06138. There one tower is trained; here either one counts its own layers.
        LiT: Zhai et al., *Zero-Shot Transfer with Locked-image text Tuning*, CVPR 2022.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: str | PathLike[str] | None = None,
        loss: nn.Module | None = None,
        *,
        lock_image: bool = False,
        lock_text: bool = False,
        gradient_checkpointing: bool = False,
        layer_decay: float | None = None,
        compile: bool = False,
        augmentation: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss, **kwargs)
        pretrained = None if pretrained is None else fspath(pretrained)
        self.save_hyperparameters(
            {"model_name": model_name, "pretrained": pretrained, "lock_image": lock_image, "lock_text": lock_text}
            | {"gradient_checkpointing": gradient_checkpointing, "layer_decay": layer_decay, "compile": compile}
            | {"augmentation": augmentation}
        )
        if layer_decay is not None and not 0 < layer_decay <= 1:
            raise ValueError(
                f"Expected `layer_decay` to be in (0, 1], got {layer_decay}. It multiplies the learning rate at each layer "
                "on the way down; freeze a tower with `lock_image` or `lock_text`."
            )
        self.layer_decay = layer_decay
        if ":" not in model_name and model_name not in open_clip.list_models():
            raise ValueError(
                f"Expected `model_name` to be one of open_clip.list_models() or to start with 'hf-hub:' or 'local-dir:', "
                f"got {model_name!r}."
            )
        self.model, transform, eval_transform = open_clip.create_model_and_transforms(
            model_name, pretrained=pretrained, aug_cfg=augmentation
        )
        tokenizer = open_clip.get_tokenizer(model_name)
        self.transforms = {"transform": transform, "eval_transform": eval_transform, "tokenizer": tokenizer}
        if pretrained is not None or ":" in model_name:
            self._hand_over_scale()
        if lock_image:
            self.model.visual.lock()  # its `freeze_bn_stats` drops timm's activations and misses norms: see `train`
        if lock_text:  # a tower of its own, or spread over the model
            self.model.text.lock() if hasattr(self.model, "text") else self.model.lock_text_tower()
        if gradient_checkpointing:
            self.model.set_grad_checkpointing()
        for name, parameter in self.model.named_parameters():
            if name.split(".")[0] in {"logit_scale", "logit_bias", "text_decoder"}:  # the last is CoCa's captioner
                parameter.requires_grad_(False)
        if compile:
            for name in ("visual", "text", "transformer"):  # the last: of a text tower that is spread over the model
                if hasattr(self.model, name):
                    getattr(self.model, name).compile()
        self.train(self.training)  # open_clip's towers come in either mode

    def train(self, mode: bool = True) -> "Self":
        """Set the mode of all parts but the batch norms of a locked tower, whose statistics stay as they are."""
        super().train(mode)
        if self.hparams["lock_image"]:
            visual = self.model.visual
            for part in getattr(visual, "trunk", visual).modules():
                if isinstance(part, _BatchNorm):
                    part.eval()
        return self

    def encode_image(self, image: Tensor) -> Tensor:
        """Encode images `(pairs, 3, height, width)` as the model's ``transforms`` give them."""
        return self.model.encode_image(image)  # type: ignore[no-any-return]

    def encode_text(self, text: Tensor) -> Tensor:
        """Encode token ids `(pairs, context_length)`."""
        return self.model.encode_text(text)  # type: ignore[no-any-return]

    def towers(self) -> dict[str, nn.Module]:
        """Return the image tower, and all the rest of the model, which is the text tower."""
        text = nn.Module()
        for name, module in self.model.named_children():
            if name != "visual":
                text.add_module(name, module)
        for name, parameter in self.model.named_parameters(recurse=False):
            if not name.startswith("logit_"):
                text.register_parameter(name, parameter)
        return {"image": self.model.visual, "text": text}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups of :class:`DualEncoder`, split by depth where ``layer_decay`` is given."""
        groups = super().parameter_groups()
        if self.layer_decay in (None, 1):
            return groups
        depths: dict[nn.Parameter, int] = {}
        for tower in self.towers().values():
            of_name = dict(tower.named_parameters())
            depths |= {of_name[name]: depth for name, depth in layer_depths(tower).items()}
        return split_by_depth(groups, depths, self.learning_rate, self.layer_decay)

    def _hand_over_scale(self) -> None:
        if not getattr(self.loss, "takes_pretrained_scale", False):
            return
        names = [name for name in ("logit_scale", "logit_bias") if hasattr(self.loss, name)]
        theirs = [parameter for name in names if (parameter := getattr(self.model, name, None)) is not None]
        if len(theirs) == len(names):  # a scale without its bias would be of another loss
            with torch.no_grad():
                for name, parameter in zip(names, theirs, strict=True):
                    getattr(self.loss, name).copy_(parameter.reshape(()))
