"""Icons of many open-source sets and their names: small pictures, and a set that is large beside a batch.

A folder with ``icons.npz``: ``x`` uint8 `(icons, 32, 32)`, ``t`` the name of each as words, ``p`` its set. An icon of the same
name in another set is a known false negative. icons_make.py makes it. Used by negatives.py and false_negatives.py.
"""

import random
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_itm import DualEncoder, ImageTextDataset
from lightning_itm.embeddings import EmbeddingPairs

WIDTH, DIM, LENGTH, VOCABULARY = 32, 128, 48, 16_384
NUM_TEST, NUM_VAL, MIN_OCCURRENCES = 3000, 1241, 6


class IconPairs(ImageTextDataset):
    """One icon with its name, as pieces of words. All is in memory, so that loading a pair costs next to nothing."""

    def __init__(self, images: Tensor, names: list[str]) -> None:
        self.images: Any = images
        self.texts, self.text_image_id = names, torch.arange(len(names))
        self.pieces = torch.tensor([pieces(name) for name in names])  # (icons, length)
        self._set_up(None, None, None, "keep")  # names of several icons are the false negatives that are counted

    def load_image(self, image_id: int) -> Tensor:
        """Return one icon, `(1, 32, 32)`."""
        return self.images[image_id][None].float() / 127.5 - 1  # type: ignore[no-any-return]

    def load_text(self, text_id: int) -> Tensor:
        """Return the pieces of one name, `(length,)`."""
        return self.pieces[text_id]


class IconEncoder(DualEncoder):
    """A small CNN, and a bag of words and character pieces."""

    def __init__(self, loss: nn.Module | None = None, **options: Any) -> None:
        super().__init__(loss, **options)
        layers: list[nn.Module] = []
        for inner, outer, stride in ((1, 1, 2), (1, 2, 2), (2, 4, 2), (4, 4, 1)):
            channels = 1 if not layers else inner * WIDTH
            layers += [nn.Conv2d(channels, outer * WIDTH, 3, stride, 1, bias=False)]
            layers += [nn.BatchNorm2d(outer * WIDTH), nn.ReLU()]
        self.image_encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * WIDTH * 16, DIM))
        bag = nn.EmbeddingBag(VOCABULARY, DIM, mode="mean", padding_idx=0)
        self.text_encoder = nn.Sequential(bag, nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM))

    def encode_image(self, image: Tensor) -> Tensor:
        """Encode icons, `(pairs, dim)`."""
        return self.image_encoder(image)  # type: ignore[no-any-return]

    def encode_text(self, text: Tensor) -> Tensor:
        """Encode names, `(pairs, dim)`: the bag, and what two layers make of it."""
        bag, *layers = self.text_encoder
        bagged = bag(text)
        return bagged + nn.Sequential(*layers)(bagged)  # type: ignore[no-any-return]


class Icons(NamedTuple):
    """Pairs to train on, to choose by and to test with. Names that occur once are in the last two."""

    train: IconPairs
    val: IconPairs
    test: IconPairs
    caption: Tensor
    """`(icons,)`, the number of each training icon's name."""


def pieces(name: str) -> list[int]:
    """Return the hashes of words and of their pieces of three characters, filled up with zeros."""
    marked = [f"<{word}>" for word in name.split()]
    parts = marked + [word[i : i + 3] for word in marked for i in range(len(word) - 2)]
    hashes = [1 + zlib.crc32(part.encode()) % (VOCABULARY - 1) for part in parts][:LENGTH]
    return hashes + [0] * (LENGTH - len(hashes))


def load_icons(folder: Path) -> Icons:
    """Read ``icons.npz``, and hold out names that occur once and whose words occur at least six times."""
    with np.load(folder / "icons.npz", allow_pickle=True) as arrays:
        images, names = torch.from_numpy(arrays["x"]), [str(name) for name in arrays["t"]]
    count, words = Counter(names), Counter(word for name in names for word in name.split())
    is_apart = [count[name] == 1 and all(words[word] >= MIN_OCCURRENCES for word in name.split()) for name in names]
    apart = [index for index, is_one in enumerate(is_apart) if is_one]
    random.Random(0).shuffle(apart)
    held_out = set(apart[: NUM_TEST + NUM_VAL])
    rows = [i for i in range(len(names)) if i not in held_out], apart[NUM_TEST : NUM_TEST + NUM_VAL], apart[:NUM_TEST]
    parts = [IconPairs(images[some], [names[i] for i in some]) for some in rows]
    number = {name: place for place, name in enumerate(sorted(count))}
    return Icons(parts[0], parts[1], parts[2], torch.tensor([number[name] for name in parts[0].texts]))


@torch.no_grad()
def embed_all(model: DualEncoder, pairs: Dataset[Any], batch_size: int = 500) -> EmbeddingPairs:
    """Embed a whole set in eval mode."""
    model.eval()
    loader = torch.utils.data.DataLoader(pairs, batch_size)
    batches = [model.embed(batch) for batch in loader]
    return EmbeddingPairs(
        *(
            torch.cat([getattr(batch, name) for batch in batches])
            for name in ("image_embeddings", "text_embeddings", "image_id", "text_id")
        )
    )
