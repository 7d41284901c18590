"""Zero-shot classification: what fine-tuning costs."""

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from lightning_itm.functional.similarity import unit_norm

TEMPLATES = ("a photo of a {}.",)


def zero_shot_accuracy(
    module: nn.Module,
    batches: Iterable[Sequence[Any]],
    class_names: Sequence[str],
    *,
    templates: Sequence[str | Callable[[str], str]] = TEMPLATES,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
) -> dict[str, float]:
    r"""Measure how often the nearest class name is an image's own.

    .. math:: \hat c(i) = \arg\max_c\; f(i) \cdot \bar t_c, \qquad \bar t_c \propto \sum_k g(\text{template}_k(c)) / \|\cdot\|

    Nothing is trained, no random number is drawn from torch's stream, and each part of the module is in train or eval mode
    as it was. For mixed precision, call it under ``torch.autocast``.

    Args:
        module: A :class:`~lightning_itm.DualEncoder`, or any module with ``encode_image`` and ``encode_text``, on any device.
        batches: Yields ``(images, labels)``, as a DataLoader over ``torchvision.datasets.ImageFolder`` does, or longer tuples.
        class_names: The name of each label, from 0.
        templates: Sentences with ``{}`` for the name, or functions of it, all of one kind, such as
            ``open_clip.OPENAI_IMAGENET_TEMPLATES``; the embeddings of their texts are averaged.
        tokenizer: Turns a list of texts into what ``encode_text`` takes. Default: that of ``module.transforms``.

    Returns:
        ``top1``, over all images, and ``mean_per_class``, over the classes that have images; in percent.

    Raises:
        ValueError: No images, no names, no templates; a label without a name; no tokenizer.

    References:
        Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*, ICML 2021, section 3.1.4.
    """
    if not class_names or not templates:
        raise ValueError(
            f"Expected `class_names` and `templates`, got {len(class_names)} of the first and {len(templates)} of the second."
        )
    tokenizer = tokenizer or getattr(module, "transforms", {}).get("tokenizer")
    if tokenizer is None:
        raise ValueError(
            f"Expected `tokenizer`, because {type(module).__name__} has no `transforms` with one, got None."
        )
    encode: Any = module
    device = getattr(module, "device", None) or next(module.parameters()).device
    modes = {part: part.training for part in module.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a loader draws a seed for its workers
            module.eval()
            encoder = SimpleNamespace(encode_text=lambda text, normalize: unit_norm(encode.encode_text(text)))
            names = open_clip.build_zero_shot_classifier(encoder, tokenizer, class_names, templates, device=device)
            seen = [
                (torch.as_tensor(labels).cpu(), _nearest(encode, images.to(device), names))
                for images, labels, *_ in batches
            ]
    finally:
        for part, mode in modes.items():
            part.training = mode
    if not seen:
        raise ValueError("Expected at least one batch of images and labels, got none.")
    label, guess = (torch.cat(column) for column in zip(*seen, strict=True))
    if int(label.max()) >= len(class_names) or int(label.min()) < 0:
        raise ValueError(
            f"Expected labels from 0 to {len(class_names) - 1}, one for each of `class_names`, got {int(label.min())} to "
            f"{int(label.max())}."
        )
    size = label.bincount(minlength=len(class_names))
    right = label[label == guess].bincount(minlength=len(class_names))
    per_class = right[size > 0] / size[size > 0]
    return {"top1": 100 * float(right.sum() / size.sum()), "mean_per_class": 100 * float(per_class.mean())}


def _nearest(module: Any, images: Any, names: Tensor) -> Tensor:
    image = unit_norm(module.encode_image(images))
    with torch.autocast(image.device.type, enabled=False):  # near names would tie in half precision
        return (image @ names).argmax(dim=1).cpu()
