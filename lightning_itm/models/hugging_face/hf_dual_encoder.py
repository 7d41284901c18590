"""Any dual encoder of transformers as a DualEncoder."""

from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from lightning_itm.encoder_output import vectors_of
from lightning_itm.export.exportable import whole_folder
from lightning_itm.models.hugging_face.architecture import (
    build_model,
    compute_activations_twice,
    plain,
    read_config,
    towers_of,
)
from lightning_itm.models.hugging_face.transforms import (
    from_files,
    make_transforms,
    read_image_processor,
    read_tokenizer,
    to_files,
)
from lightning_itm.models.optimization import check_layer_decay
from lightning_itm.models.pretrained.pretrained_dual_encoder import PretrainedDualEncoder
from lightning_itm.models.pretrained.scale import freeze_scale

FILES = "hugging_face_files"  # the key of a checkpoint that holds tokenizer and image processor


class HFDualEncoder(PretrainedDualEncoder):
    """Fine-tune CLIP, SigLIP or SigLIP 2 of Hugging Face ``transformers``.

    In plain terms: name the model, pass ``**model.transforms`` to the dataset, and train it like any :class:`DualEncoder`.
    :meth:`save_pretrained` writes a folder that ``transformers.AutoModel`` reads, with the trained temperature in it. Install
    it with ``pip install "lightning_itm[hf]"``.

    Other models of ``transformers`` work if they have ``get_image_features`` and ``get_text_features``.

    The loss owns ``logit_scale`` and ``logit_bias``. With pretrained weights, the model's values are copied into the loss
    unless the loss was given its own. A loss that is set later gets them, too. The model's own parameters of these names
    are frozen.

    Texts are padded to the context length of the model, and longer ones are cut, with a warning at the first. SigLIP and
    SigLIP 2 get no attention mask, because they were trained without one.

    A checkpoint holds the configuration of the model, and its tokenizer and image processor once ``transforms`` was used. So
    ``load_from_checkpoint(path)`` reads nothing from the hub.

    Args:
        model_name: The model, such as ``"openai/clip-vit-base-patch32"`` or ``"google/siglip2-base-patch16-224"``: a name of
            the Hugging Face hub, or a folder.
        loss: The loss of a batch, a module. Default: :class:`InfoNCELoss`, the loss of CLIP. For SigLIP, give
            :class:`SigmoidLoss`.
        config: The architecture: a configuration of ``transformers``, a dict with ``model_type``, or the path of a JSON file.
            Without ``model_name``, the weights are random. Default: the configuration of ``model_name``.
        pretrained: Whether to read the weights of ``model_name``. Set it to False to begin with random weights.
        image_processor: An image processor of ``transformers``, a name of the hub, or a folder. Default: that of
            ``model_name``. Without one, the usual one of the family, for images of the size that ``config`` says.
        tokenizer: A tokenizer of ``transformers``, a name of the hub, or a folder. Default: that of ``model_name``. Without
            one, ``transforms`` has no tokenizer.
        lock_image: Whether to freeze the image tower, with its projection and its batch statistics (LiT).
        lock_text: Whether to freeze the text tower. Use it to keep the text embeddings of an existing index.
        gradient_checkpointing: Whether to save memory by computing activations twice. A step takes about a third longer.
        layer_decay: The factor of the learning rate per layer on the way down a tower, in (0, 1], often 0.65 to 0.9. See
            :func:`~lightning_itm.models.optimization.layer_depths`. Default: the same rate for all layers.
        compile: Whether to compile the towers with ``torch.compile``, which happens at the first batch.
        augmentation: Options of ``torchvision.transforms.RandomResizedCrop`` for the training transform, such as
            ``{"scale": (0.5, 1)}``. Default: images are prepared as in evaluation.
        lora: Train adapters of low rank only, and the loss. Give a rank, such as 8, or one for each tower, such as
            ``{"image": 8, "text": 8}``. A tower that is not named is frozen. For more options, see
            :class:`~lightning_itm.models.pretrained.lora_options.LoraOptions`. Needs ``pip install "lightning_itm[lora]"``.
            By default, all linear layers in the blocks of both towers are adapted, which are those of attention and MLP.
            Default: all weights are trained.
        save_adapters_only: Whether checkpoints leave out the frozen weights. They are small then, and loading one reads
            ``model_name`` again.
        **kwargs: Further options of :class:`DualEncoder`, such as ``learning_rate`` and ``chunk_size``.

    Attributes:
        model: The model of ``transformers``.

    Raises:
        ImportError: if ``transformers`` is not installed.
        ValueError: if there is neither ``model_name`` nor ``config``, if the model has no two towers, or if ``layer_decay`` is
            outside (0, 1].

    Example:
        >>> import torch
        >>> from lightning_itm import HFDualEncoder
        >>> tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> config = {"model_type": "siglip", "vision_config": {**tower, "image_size": 32, "patch_size": 16}}
        >>> model = HFDualEncoder(config={**config, "text_config": {**tower, "vocab_size": 9, "eos_token_id": 1}})
        >>> model.encode_image(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 8])

    References:
        Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*, 2021. Zhai et al., *Sigmoid
        Loss for Language Image Pre-Training*, ICCV 2023. Tschannen et al., *SigLIP 2*, arXiv 2502.14786.
    """

    library_name = "transformers"

    def __init__(
        self,
        model_name: str | PathLike[str] | None = None,
        loss: nn.Module | None = None,
        *,
        config: Any = None,
        pretrained: bool = True,
        image_processor: Any = None,
        tokenizer: Any = None,
        lock_image: bool = False,
        lock_text: bool = False,
        gradient_checkpointing: bool = False,
        layer_decay: float | None = None,
        compile: bool = False,
        augmentation: dict[str, Any] | None = None,
        lora: Any = None,
        save_adapters_only: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss, **kwargs)
        check_layer_decay(layer_decay)
        self.layer_decay = layer_decay
        model_name = None if model_name is None else fspath(model_name)
        self.config = read_config(model_name, config)
        architecture = plain(self.config)  # now, because building the model changes the configuration
        reads_weights = pretrained and model_name is not None
        self.check_lora(lora, saves_adapters_only=save_adapters_only, has_weights=reads_weights, is_compiled=compile)
        self.model = build_model(model_name if reads_weights else None, self.config)
        given_parts = {"image_processor": image_processor, "tokenizer": tokenizer}
        # What `load_from_checkpoint` makes the model of: the architecture, and no weights, which the checkpoint has.
        self.save_settings(
            {"model_name": model_name, "config": architecture, "pretrained": save_adapters_only}
            | {"lock_image": lock_image, "lock_text": lock_text, "gradient_checkpointing": gradient_checkpointing}
            | {"layer_decay": layer_decay, "compile": compile, "augmentation": augmentation}
            | {"lora": lora, "save_adapters_only": save_adapters_only}
            # Objects are not kept here. A checkpoint has their files.
            | {name: fspath(given) for name, given in given_parts.items() if isinstance(given, str | PathLike)}
        )
        # An empty tokenizer is false, too.
        self._sources: tuple[Any, ...] = tuple(
            model_name if given is None else given for given in (image_processor, tokenizer)
        )
        self._transforms: dict[str, Any] | None = None
        if reads_weights:
            self.take_scale()
        self._prepare(gradient_checkpointing, compile)
        self.train(self.training)  # `from_pretrained` returns models in eval mode

    @property
    def transforms(self) -> dict[str, Any]:
        """What the dataset takes, as ``ImageTextDataset(..., **model.transforms)``.

        A dict of ``transform``, ``eval_transform`` and, where there is one, ``tokenizer``. They are read when they are asked
        for.
        """
        if self._transforms is None:
            processor, tokenizer = self._sources
            parts = read_image_processor(processor, self.config), read_tokenizer(tokenizer)
            self._transforms = make_transforms(self.config, *parts, self.hparams["augmentation"])
        return self._transforms

    def encode_image(self, image: Any) -> Tensor:
        """Encode images as the model's ``transforms`` give them: `(pairs, 3, height, width)`, or a dict for SigLIP 2."""
        inputs = image if isinstance(image, Mapping) else {"pixel_values": image}
        return vectors_of(self.model.get_image_features(**inputs), "image")

    def encode_text(self, text: Any) -> Tensor:
        """Encode texts as the model's ``transforms`` give them: a dict with ``input_ids``, or the token ids alone.

        Raises:
            TypeError: if they are strings.
        """
        if not isinstance(text, Mapping | Tensor):
            raise TypeError(
                f"Expected token ids (pairs, context_length), or a dict with `input_ids`, got {type(text).__name__}. Give "
                "HFDualEncoder a `tokenizer`, and the dataset `**model.transforms`."
            )
        inputs = text if isinstance(text, Mapping) else {"input_ids": text}
        return vectors_of(self.model.get_text_features(**inputs), "text")

    def towers(self) -> dict[str, nn.Module]:
        """Return the image tower, and the text tower, each with its projection."""
        return towers_of(self.model)

    @rank_zero_only
    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the model in the format of Hugging Face, with the trained temperature and bias, tokenizer and processor.

        Adapters of ``lora`` are merged. ``transformers.AutoModel.from_pretrained(folder)`` reads it, and so does
        ``HFDualEncoder(folder)``.

        Args:
            folder: A folder that is new or empty. In a run on several devices, one process writes.

        Raises:
            FileExistsError: if there is anything in the folder.
        """
        merged: Any = self.merged()
        with whole_folder(folder) as part:
            merged.save_pretrained(part)
            for processor in self._processors():
                if processor is not None:
                    processor.save_pretrained(part)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the tokenizer and the image processor, too, once they were used."""
        super().on_save_checkpoint(checkpoint)
        if self._transforms is not None:
            checkpoint[FILES] = to_files(*self._processors())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the tokenizer and the image processor of the checkpoint, unless others were given or used already."""
        super().on_load_checkpoint(checkpoint)
        if self._transforms is None and FILES in checkpoint:
            restored = from_files(checkpoint[FILES])
            # An object is not among what a checkpoint gives the constructor, so the user has given it now.
            self._sources = tuple(
                theirs if own is None or isinstance(own, str | PathLike) else own
                for own, theirs in zip(self._sources, restored, strict=True)
            )

    def _prepare(self, gradient_checkpointing: bool, compiles: bool) -> None:
        freeze_scale(self.model)
        for kind, tower in self.towers().items():
            if self.hparams[f"lock_{kind}"]:
                tower.requires_grad_(False)
        self.adapt()
        if gradient_checkpointing:
            compute_activations_twice(self.model)
        if compiles:
            # In place: `torch.compile(module)` would put `_orig_mod` into the names of the weights.
            for part in self.model.children():
                if not isinstance(part, nn.Linear):  # a projection
                    part.compile()

    def _processors(self) -> tuple[Any, Any]:
        found = self.transforms
        return found["eval_transform"].processor, found["tokenizer"].tokenizer if "tokenizer" in found else None
