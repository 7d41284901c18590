"""Zero-shot classification, which shows what fine-tuning costs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_itm.encoder_output import vectors_of
from lightning_itm.functional.precision import products
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
    r"""Measure how often an image is closest to the name of its own class.

    Use it before and after fine-tuning: a model that gets better at retrieval on one set often gets worse on others.

    .. math:: \hat c(i) = \arg\max_c\; f(i) \cdot \bar t_c, \qquad \bar t_c \propto \sum_k g(\text{template}_k(c)) / \|\cdot\|

    Nothing is trained. The module's train and eval modes and torch's random stream are as before afterwards. For mixed
    precision, call it under ``torch.autocast``.

    Args:
        module: A :class:`~lightning_itm.DualEncoder`, or any module with ``encode_image`` and ``encode_text``, on any device.
        batches: An iterable of ``(images, labels)``, such as a DataLoader over ``torchvision.datasets.ImageFolder``. Tuples
            may be longer, and the rest is ignored.
        class_names: The name of each class in words, such as ``"tabby cat"``. Label 0 has the first name.
        templates: Sentences with ``{}`` for the name, or functions of the name, all of one kind. The embeddings of one class
            are averaged over them. Use ``open_clip.OPENAI_IMAGENET_TEMPLATES`` to compare with published numbers.
        tokenizer: A function from a list of texts to what ``encode_text`` takes. Default: the one in ``module.transforms``,
            which an :class:`~lightning_itm.OpenCLIPDualEncoder` has.

    Returns:
        Two numbers in percent: ``top1``, the accuracy over all images, and ``mean_per_class``, the mean of the accuracies of
        the classes that have images.

    Raises:
        ValueError: if there are no images, no names or no templates, if a label has no name, or if there is no tokenizer.

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
    with _as_in_evaluation(module):
        # open_clip averages unit vectors, and the `encode_text` of a DualEncoder returns any length.
        encoder = SimpleNamespace(
            encode_text=lambda text, normalize: unit_norm(vectors_of(encode.encode_text(text), "text"))
        )
        names = open_clip.build_zero_shot_classifier(encoder, tokenizer, class_names, templates, device=device)
        seen = [  # names are (dim, classes), labels and guesses (images,) per batch
            (torch.as_tensor(labels).cpu(), _nearest(encode, move_data_to_device(images, device), names))
            for images, labels, *_ in batches
        ]
    if not seen:
        raise ValueError("Expected at least one batch of images and labels, got none.")
    label, guess = (torch.cat(column) for column in zip(*seen, strict=True))
    if int(label.max()) >= len(class_names) or int(label.min()) < 0:
        raise ValueError(
            f"Expected labels from 0 to {len(class_names) - 1}, one for each of `class_names`, got {int(label.min())} to "
            f"{int(label.max())}."
        )
    size = label.bincount(minlength=len(class_names))
    # A class without images has no accuracy, and a 0 for it would lower the mean.
    right = label[label == guess].bincount(minlength=len(class_names))
    per_class = right[size > 0] / size[size > 0]
    return {"top1": 100 * float(right.sum() / size.sum()), "mean_per_class": 100 * float(per_class.mean())}


@contextmanager
def _as_in_evaluation(module: nn.Module) -> Iterator[None]:
    """Leave modes and torch's random stream as they were."""
    # Part by part: a locked tower may be in eval mode while the rest trains.
    modes = {part: part.training for part in module.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a loader draws a seed for its workers
            module.eval()
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _nearest(module: Any, images: Any, names: Tensor) -> Tensor:
    image = unit_norm(vectors_of(module.encode_image(images), "image"))
    return products(image, names.T).argmax(dim=1).cpu()  # in half precision, near names would tie
