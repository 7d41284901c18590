"""What ``lightning-itm shards`` does. ``--help`` shows these docstrings."""

from typing import Any

from lightning_itm.data.files_datamodule import read_pairs
from lightning_itm.data.shards.dataset import warn_of_faults
from lightning_itm.data.shards.index import ShardIndex
from lightning_itm.data.shards.writer import verify_shards, write_shards


def write(
    source: str,
    output: str,
    *,
    image_root: str | None = None,
    split: str = "train",
    image_column: str = "image",
    text_column: str = "text",
    delimiter: str | None = None,
    encoding: str | None = None,
    hard_captions: str | None = None,
    images_per_shard: int = 1000,
) -> None:
    """Write image-text pairs into tar shards, with a manifest and an index beside them.

    Args:
        source: A .json (Karpathy's, COCO's captions, or a list), a .jsonl, .csv or .tsv, a folder of images with .txt files,
            or other shards.
        output: The folder for the shards. It is made, and must not hold shards already.
        image_root: The folder that image paths start from. By default, the folder of the file.
        split: The split of a Karpathy JSON that is written. "train" includes "restval", as published results on COCO do.
        image_column: The column of a table that holds the paths of the images.
        text_column: The column of a table that holds the texts.
        delimiter: The sign between two columns. By default it is told by the header.
        encoding: The encoding of text files, such as cp1252. By default they are UTF-8.
        hard_captions: The column of captions that are wrong for the image of their row. They are written, too.
        images_per_shard: How many images go into one shard. Make shards of 100 MB to 1 GB.
    """
    columns: dict[str, Any] = {"image_column": image_column, "text_column": text_column, "delimiter": delimiter}
    columns["hard_captions"] = hard_captions
    # Nothing is too much here, because the writer counts what it leaves out.
    pairs = read_pairs(source, image_root, split=split, encoding=encoding, max_unreadable=1.0, **columns)
    manifest = write_shards(pairs, output, images_per_shard=images_per_shard)
    ShardIndex.open(output)  # builds the index now, so that the first run need not
    print(f"{manifest['images']} images and {manifest['pairs']} texts in {len(manifest['shards'])} shards: {output}")


def index(shards: str, output: str | None = None) -> None:
    """Build the index of shards, such as those of img2dataset, and name the samples that can't be used.

    Args:
        shards: A folder, or a pattern such as "shards/{00000..00031}.tar" or "https://host/{00000..00031}.tar".
        output: The file of the index. By default it lies beside the first shard. Remote shards need one.
    """
    found = ShardIndex.open(shards, output)
    warn_of_faults(found)
    print(f"{len(found.key)} images and {len(found.text)} texts in {len(found.shards)} shards.")


def verify(folder: str) -> None:
    """Compare every shard with its SHA-256 in the manifest.

    Args:
        folder: A folder that `lightning-itm shards write` wrote.
    """
    verify_shards(folder)
    print(f"{folder}: every shard is as it was written.")
