"""An image in whatever form it comes, opened as RGB, and the transforms that turn it into what a model takes."""

import io
import logging
from os import PathLike
from typing import Any, Protocol, runtime_checkable

import numpy as np
import open_clip
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
"""What an image file is told by. Where a sample has several, the first of these counts."""


@runtime_checkable
class ImageFile(Protocol):
    """Read the bytes of an image file, wherever it is, such as within a tar."""

    def read_bytes(self) -> bytes:
        """Return the bytes of the file."""


ImageSource = str | PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any] | ImageFile
"""A path, the bytes of an image file, a PIL image, a uint8 array `(height, width[, channels])`, or what reads such bytes."""


class UnreadableImageError(RuntimeError):
    """Tell that an image does not open."""


def open_rgb(source: ImageSource) -> Image.Image:
    """Open an image as RGB, as a viewer shows it.

    Transparent pixels become white. A photograph is turned as its EXIF orientation says. Grey values of 16 bits or of floats
    are scaled to 8 bits.

    Raises:
        UnreadableImageError: if the file is missing, is no image, or breaks off.

    Example:
        >>> import numpy as np
        >>> from lightning_itm.data import open_rgb
        >>> open_rgb(np.zeros((2, 3, 4), dtype=np.uint8)).getpixel((0, 0))
        (255, 255, 255)
    """
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        if isinstance(source, np.ndarray):
            # PIL knows grey arrays as (height, width) only.
            return _to_rgb(Image.fromarray(source.squeeze(2) if source.ndim == 3 and source.shape[2] == 1 else source))
        data = source if isinstance(source, str | PathLike | bytes) else source.read_bytes()
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            return _to_rgb(image)
    except MemoryError:
        raise  # that says nothing about the file
    except (
        Exception
    ) as error:  # a broken file can raise anything in PIL's decoders: IndexError, struct.error, EOFError, ...
        name = source if isinstance(source, str | PathLike | ImageFile) else type(source).__name__
        raise UnreadableImageError(f"{name} does not open: {error}") from error


def to_tensor(image: Image.Image) -> Tensor:
    """Turn an RGB image into a float tensor `(3, height, width)` in [0, 1]."""
    return pil_to_tensor(image).float() / 255  # type: ignore[no-any-return]


def open_clip_transforms(
    model_name: str, pretrained: str | None = None, augmentation: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the transforms and the tokenizer of an open_clip model, without its weights.

    Args:
        model_name: A name of ``open_clip.list_models()``, such as ``"ViT-B-32"``, or ``"hf-hub:..."`` or ``"local-dir:..."``.
        pretrained: The tag of the weights, such as ``"openai"``. Give the one that you train from: some weights need another
            mean, or another way to resize.
        augmentation: Arguments of ``open_clip.AugmentationCfg``, such as ``{"scale": (0.5, 1)}``. Default: open_clip's own.

    Returns:
        ``transform``, ``eval_transform`` and ``tokenizer``, as :class:`~lightning_itm.ImageTextDataset` takes them.
    """
    known = open_clip.get_pretrained_cfg(model_name, pretrained) if pretrained and ":" not in model_name else {}
    preprocessing = {f"image_{name}": known.get(name) for name in ("mean", "std", "interpolation", "resize_mode")}
    # open_clip makes transforms only with a model. On the device "meta" it takes no memory, and its warning that the weights
    # are random is of no use here.
    logging.disable(logging.WARNING)
    try:
        _, transform, eval_transform = open_clip.create_model_and_transforms(
            model_name, device="meta", load_weights=False, aug_cfg=augmentation, **preprocessing
        )
    finally:
        logging.disable(logging.NOTSET)
    return {"transform": transform, "eval_transform": eval_transform, "tokenizer": open_clip.get_tokenizer(model_name)}


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # `exif_transpose` copies every image
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        tops = (65535.0,) if image.mode.startswith("I;16") else (1.0, 255.0, 65535.0)
        return _to_8_bits(np.asarray(image, dtype=np.float64), tops).convert("RGB")
    if image.has_transparency_data:  # also a palette's, which has no alpha channel
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray[Any, Any], tops: tuple[float, ...]) -> Image.Image:
    """Scale grey values `(height, width)` of more than 8 bits, which PIL itself would cut off at 255.

    Args:
        values: The values of the picture.
        tops: What white may be. The least that no value exceeds is taken, so that a dark picture stays dark. Where values
            exceed all, or are below 0, the picture is stretched from its least to its largest value.
    """
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if not np.isfinite([low, high]).all():
        raise ValueError(f"its values are from {low} to {high}")
    top = next((top for top in tops if high <= top), high)
    return Image.fromarray(((values - low) * (255 / (top - low))).round().astype(np.uint8))  # (height, width)
