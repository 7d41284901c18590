"""Image-text pairs with random access: one or more texts per image, and images in whatever form they come."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

from PIL import Image
from torch.utils.data import Dataset

from lightning_itm.captions import number_captions, warn_of_equal_captions
from lightning_itm.checks import check_choice, check_tokens
from lightning_itm.data.composed.joins import Joinable
from lightning_itm.data.image import ImageSource, UnreadableImageError, open_rgb, to_tensor
from lightning_itm.data.inputs.cut_captions import CutCaptions
from lightning_itm.data.inputs.hard_captions import HardCaptionLists
from lightning_itm.data.inputs.sources import by_number, check_files, check_sources
from lightning_itm.data.readers import flatten_texts
from lightning_itm.data.readers.from_files import FromFiles
from lightning_itm.identity import image_identity, set_identity
from lightning_itm.unreadable import UnreadablePairError as UnreadablePairError
from lightning_itm.unreadable import UnreadablePairs, load_or_other


class ImageTextDataset(FromFiles, Joinable, Dataset[dict[str, Any]]):
    """Read image-text pairs with random access. One item is one *text* with its image.

    In training, another pair, drawn at random, stands in for one that can't be read, because its image does not open or its
    text is empty. Such pairs are counted in ``num_replaced``, each once.

    Args:
        images: One entry for each image: a path, the bytes of an image file, a PIL image, or a uint8 array `(height, width)`
            or `(height, width, channels)`. Transparent pixels become white, as a browser shows them. A sequence that decodes
            its items when they are asked for, such as a column of a Hugging Face data set, stays as it is.
        texts: One text per image, or one list of texts per image. With ``text_image_id``, a flat list of all texts.
        text_image_id: The image that each text belongs to, such as ``[0, 0, 1]``. Give it where ``texts`` is a flat list.
        transform: Turns a PIL image into what the image tower takes, in training. Default: a float tensor
            `(3, height, width)` in [0, 1].
        eval_transform: Turns a PIL image into what the image tower takes, in validation, test and mining. Give it where
            ``transform`` augments. Default: ``transform``.
        tokenizer: Turns a list of one text into a tensor `(1, length)`, as open_clip's do, or into a dict of such tensors, as
            those of ``transformers`` do. Default: texts stay strings.
        equal_captions: What a caption is to another image that has the same one, up to case, white space and Unicode form.
            ``"exclude"``: it is no negative of that image. Each pair then has a ``caption_id``, and a warning counts such
            pairs. Mining compares all captions of an image, a batch and the memory bank those of the two pairs. ``"keep"``: it
            is a negative like any other, as in the papers. Use it to count false negatives.
        max_unreadable: The fraction of pairs that may be unreadable in training. Above it, reading ends with an error. Raise
            it for a set from the web of which more is lost.
        hard_captions: Wrong captions, such as rewritten ones: one list per text, or one per image, which may be empty. In
            training some are drawn for each pair, and the loss takes them as further negatives of the pair's image. One that
            equals a caption of the image is left out with a warning. Default: none.
        num_hard_captions: How many are drawn per pair and epoch. Each is one more text to encode.

    Raises:
        ValueError: if there are no images, if an image has no text, if texts and images do not match in number, if the ids
            are not dense, or if a path comes twice.
        TypeError: if an image is of a kind that can't be read, or if a text is no string.
        FileNotFoundError: if more images than ``max_unreadable`` are missing. A warning counts fewer.

    Example:
        >>> from PIL import Image
        >>> from lightning_itm import ImageTextDataset
        >>> red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
        >>> pairs = ImageTextDataset([red, blue], [["red", "a red square"], ["blue"]])
        >>> len(pairs), pairs[1]["text"], pairs[1]["image_id"], pairs[2]["image_id"]
        (3, 'a red square', 0, 1)
    """

    def __init__(
        self,
        images: Sequence[ImageSource],
        texts: Sequence[str] | Sequence[Sequence[str]],
        *,
        text_image_id: Sequence[int] | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
        eval_transform: Callable[[Image.Image], Any] | None = None,
        tokenizer: Callable[[list[str]], Any] | None = None,
        equal_captions: Literal["exclude", "keep"] = "exclude",
        max_unreadable: float = 0.05,
        hard_captions: Sequence[Sequence[str]] | None = None,
        num_hard_captions: int = 1,
    ) -> None:
        self.images: Sequence[Any] = by_number(images)
        self.texts: Sequence[str]
        self.texts, self.text_image_id = flatten_texts(texts, text_image_id, len(self.images))
        self._set_up(transform, eval_transform, tokenizer, equal_captions, max_unreadable)
        check_sources(self.images)
        check_files(self.images, max_unreadable)
        if hard_captions is not None:
            parts = self.texts, self.text_image_id, len(self.images)
            self.hard_captions = HardCaptionLists(hard_captions, *parts, num_hard_captions)

    _identity: dict[str, Any] | None = None  # computed when it is asked for
    hard_captions: HardCaptionLists | None = None

    # Apart from the constructor, for subclasses whose images and texts come from elsewhere.
    def _set_up(
        self,
        transform: Callable[[Image.Image], Any] | None,
        eval_transform: Callable[[Image.Image], Any] | None,
        tokenizer: Callable[[list[str]], Any] | None,
        equal_captions: str = "exclude",
        max_unreadable: float = 0.05,
    ) -> None:
        check_choice("equal_captions", equal_captions, ("exclude", "keep"))
        self.transform = transform or to_tensor
        self.eval_transform = eval_transform or self.transform
        self.tokenizer = tokenizer
        self.is_evaluation, self.equal_captions = False, equal_captions
        # Now, and not at the first pair: every worker would number all captions once more.
        excludes = equal_captions == "exclude"
        self.caption_id = number_captions(self.texts, self.text_image_id) if excludes else None  # (texts,)
        if self.caption_id is not None:
            warn_of_equal_captions(self.caption_id, self.text_image_id, stacklevel=3)
        self.unreadable, self.cut = UnreadablePairs(len(self.texts), max_unreadable), CutCaptions(len(self.texts))

    @property
    def num_replaced(self) -> int:
        """Number of pairs that could not be read so far, in all workers, and that others stood in for."""
        return len(self.unreadable)

    @property
    def num_cut(self) -> int:
        """Number of captions so far, in all workers, whose end was cut off. Not known of tokenizers of your own."""
        return len(self.cut)

    def evaluation(self) -> "ImageTextDataset":
        """Return a view of the same pairs with ``eval_transform``. What can't be read is an error there."""
        view = copy.copy(self)  # shallow: images and texts are shared
        view.is_evaluation = True
        return view

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Expected an index below {len(self)}, the number of pairs, got {index}.")
        if self.is_evaluation:
            return self._load_or_raise(index % len(self))  # nothing stands in: it would be the result of another set
        sample, _ = load_or_other(self._load, index, len(self), what="pairs", report=self.report)
        return sample

    def identity(self) -> dict[str, Any]:
        """Return what tells this set from another, wherever its folder is: :func:`~lightning_itm.identity.set_identity`."""
        if self._identity is None:
            parts = self.texts, self.text_image_id, len(self.images)
            self._identity = set_identity(*parts, **image_identity(self.images))
            if self.hard_captions is not None:
                self._identity["hard captions"] = self.hard_captions.digest()
        return self._identity

    def load_image(self, image_id: int) -> Any:
        """Return one image, transformed as for training, or for evaluation in a view of :meth:`evaluation`.

        Raises:
            UnreadablePairError: if it does not open.
        """
        try:
            source = self.images[image_id]
        except UnreadableImageError as error:  # of a sequence that decodes on access
            raise UnreadablePairError(str(error)) from error
        return self._open(image_id, source)

    def _open(self, image_id: int, source: ImageSource) -> Any:
        try:
            image = open_rgb(source)
        except UnreadableImageError as error:
            raise UnreadablePairError(f"Image {image_id}: {error}") from error
        return (self.eval_transform if self.is_evaluation else self.transform)(image)

    def load_text(self, text_id: int) -> Any:
        """Return one text, tokenised.

        Raises:
            UnreadablePairError: if it is empty.
        """
        text = self.texts[text_id]
        if not text.strip():
            raise UnreadablePairError(f"Text {text_id}, of image {int(self.text_image_id[text_id])}, is empty")
        encoded = self._encode_text(text)
        self.cut.look(self.tokenizer, text, encoded, text_id)
        return encoded

    def _encode_text(self, text: str) -> Any:
        if self.tokenizer is None:
            return text
        # Texts from the web hold halves of UTF-16 pairs, which some tokenizers refuse.
        return check_tokens(self.tokenizer([text.encode("utf-8", "replace").decode()]))  # (length,), or a dict of such

    def _load(self, text_id: int) -> dict[str, Any]:
        # The text first: where it is empty, its image need not be read.
        text, ids = self.load_text(text_id), self.ids(text_id)
        drawn = self.draw_hard_captions(text_id, text)
        return {"image": self.load_image(ids["image_id"]), "text": text, **ids, **drawn}

    def draw_hard_captions(self, text_id: int, text: Any) -> dict[str, Any]:
        """Return what a pair has of wrong captions in a batch of training. ``text`` is its encoded text."""
        if self.hard_captions is None or self.is_evaluation:
            return {}
        image_id = int(self.text_image_id[text_id])
        return {"hard_captions": self.hard_captions.draw(text_id, image_id, text, self._encode_text)}

    def ids(self, text_id: int) -> dict[str, int]:
        """Return the ids that a pair has in a batch. ``caption_id`` is one of them where images share captions."""
        ids = {"image_id": int(self.text_image_id[text_id]), "text_id": text_id}
        return ids if self.caption_id is None else {**ids, "caption_id": int(self.caption_id[text_id])}

    def _load_or_raise(self, text_id: int) -> dict[str, Any]:
        try:
            return self._load(text_id)
        except UnreadablePairError as error:
            raise RuntimeError(
                f"{error}. In evaluation nothing is replaced, because the result would be of another set. Repair the pair, "
                "or leave the image and its texts out."
            ) from error

    def report(self, error: Exception, text_id: int) -> None:
        """Count a pair that can't be used, warn at the first, and raise a RuntimeError above ``max_unreadable``."""
        self.unreadable.report(error, text_id)
