"""The image processor and the tokenizer of a model, as :class:`~lightning_itm.ImageTextDataset` takes them."""

import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from lightning_itm.models.hugging_face.architecture import import_transformers

WITHOUT_MASK = ("siglip", "siglip2")
"""The families that were trained on padded texts without an attention mask, where padding is a part of the text."""


class ProcessorTransform:
    """Call an image processor of ``transformers`` with one image.

    Args:
        processor: The image processor.
        crop: What is done with the image before, in training.
    """

    def __init__(self, processor: Any, crop: Any = None) -> None:
        self.processor, self.crop = processor, crop

    def __call__(self, image: Image.Image) -> Tensor | dict[str, Tensor]:
        """Return the pixels `(3, height, width)`. Of a model that takes more, such as masks, a dict of tensors."""
        inputs = self.processor(images=image if self.crop is None else self.crop(image), return_tensors="pt")
        rows = {name: value[0] for name, value in inputs.items()}
        return rows["pixel_values"] if list(rows) == ["pixel_values"] else rows


class ContextTokenizer:
    """Call a tokenizer of ``transformers`` so that all texts have the context length of a model.

    Args:
        tokenizer: The tokenizer.
        context_length: The number of tokens of each text. Shorter ones are padded, and of longer ones the end is cut off.
        has_mask: Whether texts come with an attention mask. SigLIP and SigLIP 2 were trained without one.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> from lightning_itm.models.hugging_face.transforms import ContextTokenizer
        >>> words = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "dog": 2}, unk_token="[PAD]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = ContextTokenizer(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]"), 4)
        >>> tokenizer(["a dog"])["input_ids"]
        tensor([[1, 2, 0, 0]])
    """

    def __init__(self, tokenizer: Any, context_length: int, *, has_mask: bool = True) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length
        mask = {} if has_mask else {"return_attention_mask": False}  # else as the tokenizer's own settings say
        self.options = {"padding": "max_length", "truncation": True, "max_length": context_length, **mask}

    def __call__(self, texts: list[str]) -> Any:
        """Return ``input_ids`` `(texts, context_length)`, and perhaps ``attention_mask``, as a mapping."""
        return self.tokenizer(texts, return_tensors="pt", **self.options)

    def is_cut(self, text: str, token_ids: Tensor) -> bool:
        """Return whether the end of a text was cut off.

        Args:
            text: The whole text.
            token_ids: What it became, `(context_length,)`.
        """
        # Two signs of padding, at either end, say that all fits: the end sign itself may be one. So few texts are encoded
        # a second time.
        pad = self.tokenizer.pad_token_id
        if [pad, pad] in (token_ids[:2].tolist(), token_ids[-2:].tolist()):
            return False
        return len(self.tokenizer(text, verbose=False)["input_ids"]) > self.context_length


def make_transforms(
    config: Any, image_processor: Any, tokenizer: Any, augmentation: dict[str, Any] | None
) -> dict[str, Any]:
    """Return what :class:`~lightning_itm.ImageTextDataset` takes: ``transform``, ``eval_transform``, and ``tokenizer``.

    Args:
        config: The configuration of the model, which has the context length.
        image_processor: An image processor of ``transformers``.
        tokenizer: A tokenizer of ``transformers``, or ``None``, without which there is no ``tokenizer``.
        augmentation: Options of a random crop in training.

    Raises:
        ValueError: if images are cropped at random and the processor has no fixed size.
    """
    crop = None
    if augmentation is not None:
        size = getattr(image_processor, "crop_size", None) or getattr(image_processor, "size", None) or {}
        if not {"height", "width"} <= set(dict(size)):
            raise ValueError(
                f"Expected an image processor with a fixed height and width for `augmentation`, got "
                f"{type(image_processor).__name__} with the size {size}. Leave `augmentation` out, and give "
                "`ImageTextDataset` a `transform` of your own."
            )
        options = {"interpolation": transforms.InterpolationMode.BICUBIC, **augmentation}
        crop = transforms.RandomResizedCrop((size["height"], size["width"]), **options)
    made: dict[str, Any] = {
        "transform": ProcessorTransform(image_processor, crop),
        "eval_transform": ProcessorTransform(image_processor),
    }
    if tokenizer is not None:
        text_config = getattr(config, "text_config", config)
        context_length = getattr(text_config, "max_position_embeddings", None) or tokenizer.model_max_length
        has_mask = config.model_type not in WITHOUT_MASK
        made["tokenizer"] = ContextTokenizer(tokenizer, context_length, has_mask=has_mask)
    return made


def read_image_processor(source: Any, config: Any) -> Any:
    """Return an image processor.

    Args:
        source: An image processor, a name of the hub, or a folder. ``None``: the one of the family, with the image size of
            the model.
        config: The configuration of the model.

    Raises:
        ValueError: if there is no source, and the family is not known.
    """
    library = import_transformers()
    if source is not None:
        return library.AutoImageProcessor.from_pretrained(source) if isinstance(source, str | PathLike) else source
    vision: Any = getattr(config, "vision_config", None)
    if config.model_type == "siglip2":
        return library.Siglip2ImageProcessor(patch_size=vision.patch_size, max_num_patches=vision.num_patches)
    if config.model_type not in ("clip", "siglip"):
        raise ValueError(
            f"Expected `image_processor` for a model of the type {config.model_type!r} that is made of a `config`, got None. "
            "Give one of transformers, a name of the hub or a folder."
        )
    square = {"height": vision.image_size, "width": vision.image_size}
    if config.model_type == "siglip":
        return library.SiglipImageProcessor(size=square)
    return library.CLIPImageProcessor(size={"shortest_edge": vision.image_size}, crop_size=square)


def read_tokenizer(source: Any) -> Any:
    """Return a tokenizer.

    Args:
        source: A tokenizer, a name of the hub, a folder, or ``None``.
    """
    return import_transformers().AutoTokenizer.from_pretrained(source) if isinstance(source, str | PathLike) else source


def to_files(*parts: Any) -> dict[str, Tensor]:
    """Return what tokenizers and processors save of themselves, by the names of the files, as bytes in tensors.

    A checkpoint holds them in this form, which PyTorch reads with ``weights_only=True``.
    """
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            if part is not None:
                part.save_pretrained(folder)
        return {
            path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            for path in sorted(Path(folder).iterdir())
            if path.is_file() and path.stat().st_size  # an empty file has nothing to keep, and no tensor
        }


def from_files(files: dict[str, Tensor]) -> tuple[Any, Any]:
    """Return the image processor and the tokenizer, or ``None`` for the latter, of what :func:`to_files` returned."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, Path(name).name).write_bytes(content.numpy().tobytes())
        has_tokenizer = "tokenizer_config.json" in files
        library = import_transformers()
        tokenizer = library.AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
        return library.AutoImageProcessor.from_pretrained(folder), tokenizer
