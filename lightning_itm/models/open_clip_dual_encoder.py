"""Any open_clip model as a DualEncoder."""

from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import open_clip
from torch import Tensor, nn

from lightning_itm.models.dual_encoder import DualEncoder
from lightning_itm.models.optimization import check_layer_decay, split_towers_by_depth
from lightning_itm.models.pretrained.locked import keep_batch_statistics
from lightning_itm.models.pretrained.scale import hand_over_scale

if TYPE_CHECKING:
    from typing_extensions import Self


class OpenCLIPDualEncoder(DualEncoder):
    """Fine-tune any model of open_clip: CLIP, SigLIP, CoCa, and what the Hugging Face Hub has in its format.

    In plain terms: name the model and the pretrained weights, pass ``**model.transforms`` to the dataset, and train it like
    any :class:`DualEncoder`.

    Which options to use:

    - *Little data* (a few thousand pairs): ``lock_image=True``, or ``layer_decay=0.8``, keep more of what was pretrained.
    - *Little memory*: first ``gradient_checkpointing=True``, then ``chunk_size``, which allows batches of any size.
    - *Speed*: ``compile=True``, if the run is long enough to pay for some minutes of compilation.

    The loss owns ``logit_scale`` and ``logit_bias``. With pretrained weights, the model's values are copied into the loss
    unless the loss was given its own. The model's own parameters of these names are frozen, and so is the captioner of CoCa,
    because DDP stops at parameters that are trained and not used.

    ``load_from_checkpoint(path, loss=...)`` needs the loss again. It also reads ``pretrained`` again unless it is called with
    ``pretrained=None``.

    Args:
        model_name: The name of the model, such as ``"ViT-B-32"``: one of ``open_clip.list_models()``, ``hf-hub:...`` or
            ``local-dir:...``.
        pretrained: The weights to begin with: a tag such as ``"laion2b_s34b_b79k"``, one of
            ``open_clip.list_pretrained_tags_by_model(model_name)``, or the path of a checkpoint. Default: random weights.
        loss: The loss of a batch, a module. Default: :class:`InfoNCELoss`, the loss of CLIP.
        lock_image: Whether to freeze the image tower and its batch statistics (LiT). Of a timm model only the trunk is frozen.
            Its batch norms then stay in eval mode, which Lightning mentions at the start of training.
        lock_text: Whether to freeze the text tower. Use it to keep the text embeddings of an existing index.
        gradient_checkpointing: Whether to save memory by computing activations twice. A step takes about a third longer.
        layer_decay: The factor of the learning rate per layer on the way down a tower, in (0, 1], often 0.65 to 0.9. Lower
            layers then change less. Projections, final norms and the loss keep the full rate. See
            :func:`~lightning_itm.models.optimization.layer_depths`. Default: the same rate for all layers.
        compile: Whether to compile the towers with ``torch.compile``, which happens at the first batch. Weights keep their
            names. Copies of the module, such as the one of :class:`~lightning_itm.FalseNegativeElimination`, are not compiled.
        augmentation: Options of ``open_clip.AugmentationCfg`` for the training transform. Use ``{"scale": (0.5, 1)}`` for
            stronger crops than open_clip's default of 0.9 to 1.
        **kwargs: Further options of :class:`DualEncoder`, such as ``learning_rate`` and ``chunk_size``.

    Attributes:
        model: The open_clip model.
        transforms: A dict of ``transform``, ``eval_transform`` and ``tokenizer``, to pass on as
            ``ImageTextDataset(..., **model.transforms)``.

    Raises:
        ValueError: if open_clip has no model or no weights of that name, or if ``layer_decay`` is outside (0, 1].

    References:
        Layer-wise decay: Bao et al., *BEiT*, ICLR 2022, arXiv 2106.08254. For CLIP: Dong et al., *CLIP Itself is a Strong
        Fine-tuner*, arXiv 2212.06138. There one tower is trained. Here each tower counts its own layers.
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
        self.save_settings(
            {"model_name": model_name, "pretrained": pretrained, "lock_image": lock_image, "lock_text": lock_text}
            | {"gradient_checkpointing": gradient_checkpointing, "layer_decay": layer_decay, "compile": compile}
            | {"augmentation": augmentation}
        )
        check_layer_decay(layer_decay)
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
            hand_over_scale(self.model, self.loss)
        self._freeze(lock_image, lock_text)
        if gradient_checkpointing:
            self.model.set_grad_checkpointing()
        if compile:
            self._compile_towers()
        self.train(self.training)  # open_clip's towers come in either mode

    def train(self, mode: bool = True) -> "Self":
        """Set the mode of all parts except the batch norms of a locked tower, whose statistics stay as they are."""
        super().train(mode)
        if self.hparams["lock_image"]:
            visual = self.model.visual
            keep_batch_statistics(getattr(visual, "trunk", visual))
        return self

    def encode_image(self, image: Tensor) -> Tensor:
        """Encode images `(pairs, 3, height, width)` as the model's ``transforms`` give them."""
        return self.model.encode_image(image)  # type: ignore[no-any-return]

    def encode_text(self, text: Tensor) -> Tensor:
        """Encode token ids `(pairs, context_length)`."""
        return self.model.encode_text(text)  # type: ignore[no-any-return]

    def towers(self) -> dict[str, nn.Module]:
        """Return the image tower, and all the rest of the model, which is the text tower."""
        # CLIP spreads its text tower over the model: gather the parts in a module that holds the same parameters.
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
        return split_towers_by_depth(super().parameter_groups(), self.towers(), self.learning_rate, self.layer_decay)

    def _freeze(self, lock_image: bool, lock_text: bool) -> None:
        if lock_image:
            self.model.visual.lock()  # its `freeze_bn_stats` drops timm's activations and misses norms: see `train`
        if lock_text:  # a tower of its own, or spread over the model
            self.model.text.lock() if hasattr(self.model, "text") else self.model.lock_text_tower()
        for name, parameter in self.model.named_parameters():
            if name.split(".")[0] in {"logit_scale", "logit_bias", "text_decoder"}:  # the last is CoCa's captioner
                parameter.requires_grad_(False)

    def _compile_towers(self) -> None:
        # In place: `torch.compile(module)` would put `_orig_mod` into the names of the weights.
        for name in ("visual", "text", "transformer"):  # the last: of a text tower that is spread over the model
            if hasattr(self.model, name):
                getattr(self.model, name).compile()
