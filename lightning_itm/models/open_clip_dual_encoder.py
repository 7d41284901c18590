"""Any open_clip model as a DualEncoder."""

from collections.abc import Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import open_clip
from torch import Tensor, nn

from lightning_itm.export.open_clip_folder import create_described_model
from lightning_itm.export.open_clip_module import ExportsToOpenCLIP, shapes_of
from lightning_itm.export.scale import return_scale
from lightning_itm.models.optimization import check_layer_decay
from lightning_itm.models.pretrained.open_clip_config import (
    describe_forced_model,
    read_model_config,
    resolve_model_name,
)
from lightning_itm.models.pretrained.open_clip_locks import check_unlocked_groups, lock_towers
from lightning_itm.models.pretrained.pretrained_dual_encoder import PretrainedDualEncoder

if TYPE_CHECKING:
    from typing_extensions import Self


class OpenCLIPDualEncoder(ExportsToOpenCLIP, PretrainedDualEncoder):
    """Fine-tune any model of open_clip: CLIP, SigLIP, CoCa, and what the Hugging Face Hub has in its format.

    In plain terms: name the model and the pretrained weights, pass ``**model.transforms`` to the dataset, and train it like
    any :class:`DualEncoder`.

    Which options to use:

    - *Little data* (a few thousand pairs): ``lock_image=True``, or ``layer_decay=0.8``, keep more of what was pretrained.
    - *Little memory*: first ``gradient_checkpointing=True``, then ``chunk_size``, which allows batches of any size.
    - *Speed*: ``compile=True``, if the run is long enough to pay for some minutes of compilation.

    The loss owns ``logit_scale`` and ``logit_bias``. With pretrained weights, the model's values are copied into the loss
    unless the loss was given its own. A loss that is set later, ``model.loss = InfoNCELoss()``, gets them, too. The model's
    own parameters of these names are frozen. They get the trained values of the loss when the mode is set (``eval()``) and in
    ``state_dict()``. The captioner of CoCa is frozen, too, because DDP stops at parameters that are trained and not used.

    ``load_from_checkpoint(path)`` reads neither ``pretrained`` nor the hub: a checkpoint says how the model is built. The
    exceptions are models with a text tower or a tokenizer of Hugging Face, which are looked up where they came from, and
    ``save_adapters_only``.

    ``save_pretrained(folder)`` and ``push_to_hub("owner/name")`` write the trained model for open_clip, with adapters merged.

    Args:
        model_name: The name of the model, such as ``"ViT-B-32"``: one of ``open_clip.list_models()``, ``hf-hub:...`` or
            ``local-dir:...``. Or the path of a JSON file, as open_clip's ``model_configs`` has them.
        pretrained: The weights to begin with: a tag such as ``"laion2b_s34b_b79k"``, one of
            ``open_clip.list_pretrained_tags_by_model(model_name)``, or the path of a checkpoint. Default: random weights.
        loss: The loss of a batch, a module. Default: :class:`InfoNCELoss`, the loss of CLIP.
        lock_image: Whether to freeze the image tower and its batch statistics (LiT). Of a timm model only the trunk is frozen.
            Its batch norms then stay in eval mode, which Lightning mentions at the start of training.
        lock_text: Whether to freeze the text tower. Use it to keep the text embeddings of an existing index.
        unlocked_groups: The number of the last layer groups of a locked tower that stay trainable, such as 2. In a vision
            transformer of open_clip, the last group is the projection, and the one before it the last block and its norm.
        gradient_checkpointing: Whether to save memory by computing activations twice. A step takes about a third longer.
        layer_decay: The factor of the learning rate per layer on the way down a tower, in (0, 1], often 0.65 to 0.9. Lower
            layers then change less. Projections, final norms and the loss keep the full rate. See
            :func:`~lightning_itm.models.optimization.layer_depths`. Default: the same rate for all layers.
        compile: Whether to compile the towers with ``torch.compile``, which happens at the first batch. Weights keep their
            names. Copies of the module, such as the one of :class:`~lightning_itm.FalseNegativeElimination`, are not compiled.
        augmentation: Options of ``open_clip.AugmentationCfg`` for the training transform. Use ``{"scale": (0.5, 1)}`` for
            stronger crops than open_clip's default of 0.9 to 1.
        lora: Train adapters of low rank only, and the loss. Give a rank, such as 8, or one for each tower, such as
            ``{"image": 8, "text": 8}``. A tower that is not named is frozen. For more options, see
            :class:`~lightning_itm.models.pretrained.lora_options.LoraOptions`. Needs ``pip install "lightning_itm[lora]"``.
            By default, all attention and linear layers in the blocks of both towers are adapted. ResNets have none. Default:
            all weights are trained.
        save_adapters_only: Whether checkpoints leave out the frozen weights. They are small then, and loading one reads
            ``pretrained`` again.
        force_image_size: The height and width of images, if they are not those of the model, such as 336. Position embeddings
            of pretrained weights are interpolated.
        force_context_length: The largest number of tokens of a text, if it is not that of the model. Position embeddings of
            pretrained weights are interpolated.
        force_quick_gelu: Whether to use QuickGELU, which OpenAI's weights were trained with.
        image_mean: The mean of each colour, three numbers, if it is not the one of the pretrained weights.
        image_std: The standard deviation of each colour, likewise.
        cache_dir: The folder that weights are downloaded into. Default: the one of the Hugging Face hub.
        config: How a checkpoint describes the model. ``load_from_checkpoint`` gives it, so leave it out. With it,
            ``pretrained`` is not read, because the weights of the checkpoint follow. It is with ``save_adapters_only``.
        **kwargs: Further options of :class:`DualEncoder`, such as ``learning_rate`` and ``chunk_size``.

    Attributes:
        model: The open_clip model.
        transforms: A dict of ``transform``, ``eval_transform`` and ``tokenizer``, to pass on as
            ``ImageTextDataset(..., **model.transforms)``.

    Raises:
        FileNotFoundError: if ``model_name`` is a path, and there is no such file.
        ValueError: if open_clip has no model or no weights of that name, if a file is no configuration, if ``layer_decay`` is
            outside (0, 1], or if groups are unlocked that can't be.

    References:
        Layer-wise decay: Bao et al., *BEiT*, ICLR 2022, arXiv 2106.08254. For CLIP: Dong et al., *CLIP Itself is a Strong
        Fine-tuner*, arXiv 2212.06138. There one tower is trained. Here each tower counts its own layers.
        LiT: Zhai et al., *Zero-Shot Transfer with Locked-image text Tuning*, CVPR 2022.
    """

    def __init__(
        self,
        model_name: str | PathLike[str],
        pretrained: str | PathLike[str] | None = None,
        loss: nn.Module | None = None,
        *,
        lock_image: bool = False,
        lock_text: bool = False,
        unlocked_groups: int = 0,
        gradient_checkpointing: bool = False,
        layer_decay: float | None = None,
        compile: bool = False,
        augmentation: dict[str, Any] | None = None,
        lora: Any = None,
        save_adapters_only: bool = False,
        force_image_size: int | Sequence[int] | None = None,
        force_context_length: int | None = None,
        force_quick_gelu: bool = False,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        cache_dir: str | PathLike[str] | None = None,
        config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss, **kwargs)
        model_name, cache_dir = fspath(model_name), None if cache_dir is None else fspath(cache_dir)
        pretrained = None if pretrained is None else fspath(pretrained)
        check_layer_decay(layer_decay)
        check_unlocked_groups(unlocked_groups, lock_image=lock_image, lock_text=lock_text)
        has_weights = pretrained is not None or ":" in model_name
        self.check_lora(lora, saves_adapters_only=save_adapters_only, has_weights=has_weights, is_compiled=compile)
        self.layer_decay = layer_decay
        forced: dict[str, Any] = {"force_image_size": force_image_size, "force_context_length": force_context_length}
        forced |= {"force_quick_gelu": force_quick_gelu, "image_mean": image_mean, "image_std": image_std}
        if config is not None and config["model_name"] != model_name:
            config = None  # another model was asked for, by its name
        if config is None or save_adapters_only:  # with the latter, the checkpoint lacks the frozen weights
            name = resolve_model_name(model_name, read_model_config(model_name, config))
            self.model, *transforms = open_clip.create_model_and_transforms(
                name, pretrained=pretrained, aug_cfg=augmentation, cache_dir=cache_dir, **forced
            )
            transforms.append(open_clip.get_tokenizer(name, context_length=force_context_length, cache_dir=cache_dir))
            config = describe_forced_model(name, self.model, forced, cache_dir) | {"model_name": model_name}
            if has_weights:
                self.take_scale()
        else:
            self.model, *transforms = create_described_model(config, augmentation)
        self.transforms = dict(zip(("transform", "eval_transform", "tokenizer"), transforms, strict=True))
        self.save_settings(
            {"model_name": model_name, "pretrained": pretrained, "lock_image": lock_image, "lock_text": lock_text}
            | {"gradient_checkpointing": gradient_checkpointing, "layer_decay": layer_decay, "compile": compile}
            | {"augmentation": augmentation, "unlocked_groups": unlocked_groups, "lora": lora, "config": config}
            | {"save_adapters_only": save_adapters_only, "cache_dir": cache_dir, **forced}
        )
        lock_towers(self.model, lock_image=lock_image, lock_text=lock_text, unlocked_groups=unlocked_groups)
        self._prepare(gradient_checkpointing, compile)

    def train(self, mode: bool = True) -> "Self":
        """Set the mode of all parts except the batch norms of a locked tower, whose statistics stay as they are."""
        super().train(mode)
        self._return_scale()
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

    def _prepare(self, gradient_checkpointing: bool, compiles: bool) -> None:
        self.exported_shapes = shapes_of(self.model.state_dict())
        self.model.register_state_dict_pre_hook(self._return_scale)  # a method: a deep copy has one of its own
        self.adapt()
        if gradient_checkpointing:
            self.model.set_grad_checkpointing()
        if compiles:
            self._compile_towers()
        self.train(self.training)  # open_clip's towers come in either mode

    def _compile_towers(self) -> None:
        # In place: `torch.compile(module)` would put `_orig_mod` into the names of the weights.
        for name in ("visual", "text", "transformer"):  # the last: of a text tower that is spread over the model
            if hasattr(self.model, name):
                getattr(self.model, name).compile()

    def _return_scale(self, *_: Any) -> None:
        return_scale(self.loss, self.model)
