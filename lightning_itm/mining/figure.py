"""Look at what was mined."""

import textwrap
from typing import Any

import torch

from lightning_itm.data.image import UnreadableImageError, open_rgb
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.mining.embedded_negatives import EmbeddedNegatives
from lightning_itm.mining.mine import Mining
from lightning_itm.mining.negative_table import NegativeTable


class ShowsMined:
    """Give a callback what it mined last, to be looked at."""

    _mining: Mining | None

    @property
    def pairs(self) -> ImageTextDataset | None:
        """The set that is mined. None before a fit."""
        return None if self._mining is None else self._mining.pairs

    @property
    def table(self) -> NegativeTable | None:
        """What was mined last. None before a fit."""
        return None if self._mining is None else self._mining.table

    @property
    def mined_embeddings(self) -> EmbeddedNegatives | None:
        """What is drawn from with ``inject="embeddings"``. None in other modes, and before anything was mined."""
        return None if self._mining is None else getattr(self._mining.injection, "mined", None)

    def plot(self, n: int = 8, *, num_negatives: int = 4, seed: int = 0) -> Any:
        """Draw some pairs with the hardest texts and images that were mined for them, as a matplotlib figure.

        Args:
            n: Number of pairs that are drawn, taken at random.
            num_negatives: Number of texts and images shown per pair, the hardest first.
            seed: Another seed shows other pairs.
        """
        mining = self._attached()
        return contact_sheet(mining.pairs, mining.table, n, num_negatives=num_negatives, seed=seed)

    def _attached(self) -> Mining:
        if self._mining is None:
            raise RuntimeError("Expected to be attached to a Trainer that fits. Nothing was mined yet.")
        return self._mining


def contact_sheet(
    pairs: ImageTextDataset, table: NegativeTable, n: int = 8, *, num_negatives: int = 4, seed: int = 0
) -> Any:
    """Draw one pair per row: the image and its text, its hardest texts in red, and the hardest images of the text.

    Args:
        pairs: The set that was mined.
        table: What was mined for it.
        n: Number of pairs that are drawn, taken at random from those for which something was mined.
        num_negatives: Number of texts and images shown per pair, the hardest first.
        seed: Another seed shows other pairs.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: if nothing was mined.
    """
    from matplotlib.figure import Figure  # has no window, so nothing has to be closed

    text_image_id = pairs.text_image_id
    # Rows are filled from the front: column 0 tells whether a row has any.
    mined = ((table.texts[:, 0] >= 0)[text_image_id] | (table.images[:, 0] >= 0)).nonzero().squeeze(1)
    if len(mined) == 0:
        raise ValueError("Expected mined negatives to draw, found none. Mine first, or loosen the guards.")
    chosen = mined[torch.randperm(len(mined), generator=torch.Generator().manual_seed(seed))[:n]].tolist()
    widths = [1.0, 3.9, *[1.0] * num_negatives]  # inches: in the column of a page, the letters can still be read
    figure = Figure(figsize=(sum(widths), 1.1 * len(chosen) + 0.4), layout="constrained")
    axes = figure.subplots(len(chosen), len(widths), width_ratios=widths, squeeze=False)
    titles = "image", "its text, and the hardest texts of the image", "the hardest images of the text"
    for ax, title in zip(axes[0], titles, strict=False):
        ax.set_title(title, fontsize=9, loc="left", pad=9)
    for row, text_id in zip(axes, chosen, strict=True):
        image_id = int(text_image_id[text_id])
        for ax in row:
            ax.set_axis_off()
        texts = [pairs.texts[other] for other in table.texts[image_id, :num_negatives].tolist() if other >= 0]
        _write(row[1], pairs.texts[text_id], texts)
        images = image_id, *table.images[text_id, :num_negatives].tolist()
        # Fewer images than columns, where fewer were mined than are shown.
        for ax, other in zip((row[0], *row[2:]), images, strict=False):
            if other >= 0:
                _show(ax, pairs, other)
    return figure


def _write(ax: Any, text: str, hardest_texts: list[str]) -> None:
    # As many letters as fit. Captions of neighbours often differ at the end only.
    text = textwrap.shorten(text, 50, placeholder="…")
    hardest_texts = [textwrap.shorten(line, 64, placeholder="…") for line in hardest_texts]
    # A caption may hold "$", which matplotlib would read as mathematics.
    style = {"va": "top", "parse_math": False, "transform": ax.transAxes}
    ax.text(0, 1, text, fontweight="bold", fontsize=9, **style)
    ax.text(0, 0.76, "\n".join(hardest_texts), color="tab:red", fontsize=8, linespacing=1.4, **style)


def _show(ax: Any, pairs: ImageTextDataset, image_id: int) -> None:
    if isinstance(pairs.images, range):  # features, by number: there is nothing to see
        ax.text(0.5, 0.5, f"image {image_id}", ha="center", va="center", fontsize=8, transform=ax.transAxes)
        return
    ax.set_anchor("N")  # at the height of the texts, whatever its shape
    try:
        ax.imshow(open_rgb(pairs.images[image_id]))
    except UnreadableImageError:
        ax.text(0.5, 0.5, "unreadable", ha="center", va="center", fontsize=8, transform=ax.transAxes)
