"""The parts of peers.py that read: a stream of shards, and large photographs."""

import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from peers_compare import Way, compare, print_versions
from PIL import Image
from skimage import data as pictures
from torch.utils.data import DataLoader

from lightning_itm import ImageTextDataset, ShardDataset, ShardStream, write_shards
from lightning_itm.data import open_clip_transforms, open_rgb, to_tensor
from lightning_itm.data.shards import StreamedBatches, StreamLoader

BATCH_SIZE, BUFFER = 64, 1000
LARGE = (2000, 1500)
NUM_LARGE = 8


def photographs() -> list[Image.Image]:
    """Return the photographs that come inside scikit-image."""
    names = ("astronaut", "chelsea", "coffee", "rocket")
    return [Image.fromarray(getattr(pictures, name)()) for name in names]


def cut_outs(number: int, size: int) -> Iterator[Image.Image]:
    """Yield squares of the photographs, each from another place."""
    generator, sources = np.random.default_rng(0), photographs()
    for i in range(number):
        source = sources[i % len(sources)]
        edge = int(generator.integers(150, min(source.size)))
        left, top = (int(generator.integers(0, side - edge)) for side in source.size)
        yield source.crop((left, top, left + edge, top + edge)).resize((size, size), Image.Resampling.BICUBIC)


def as_jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """Return the bytes of a JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def stream(runs: int) -> None:
    """An epoch of pairs from shards, decoded, transformed and in batches, in one process."""
    print_versions("webdataset", "pillow", "torchvision")
    of_clip = open_clip_transforms("ViT-B-32")
    stream_of(512, 256, "open_clip's training transform", of_clip["transform"], of_clip["tokenizer"], runs)
    stream_of(2048, 64, "no transform", to_tensor, lambda _: torch.zeros(1, 4), runs)


def stream_of(
    number: int, size: int, title: str, transform: Callable[..., Any], tokenizer: Callable[..., Any], runs: int
) -> None:
    """Compare both on one set of shards."""

    def of_facts(facts: dict[str, Any]) -> Any:
        return tokenizer([facts["texts"][0]])[0]

    with tempfile.TemporaryDirectory() as folder:
        texts = [[f"cut-out number {i} of a photograph"] for i in range(number)]
        write_shards(ImageTextDataset(list(map(as_jpeg, cut_outs(number, size))), texts), folder, images_per_shard=256)
        pairs = ShardDataset(folder, transform=transform, tokenizer=tokenizer)
        plan = ShardStream(pairs, shuffle_buffer=BUFFER)
        batches = StreamedBatches(plan, BATCH_SIZE, drop_last=False, rank=0, world_size=1, seed=0)
        shards = sorted(map(str, Path(folder).glob("*.tar")))

        def ours() -> None:
            count(StreamLoader(batches, lambda: (0, 0)), lambda batch: batch["image"], number)

        def theirs() -> None:
            rows = webdataset.WebDataset(shards, shardshuffle=100, seed=0, empty_check=False).shuffle(BUFFER)
            rows = rows.decode("pil").to_tuple("jpg", "json").map_tuple(transform, of_facts).batched(BATCH_SIZE)
            count(DataLoader(rows, batch_size=None), lambda batch: batch[0], number)

        peer, what = ("webdataset", theirs), f"Stream, {number:,} pairs of {size} x {size}, {title}"
        compare(what, peer, {"ShardStream": ours}, runs, per_run=number)


def count(loader: Any, image: Callable[[Any], Any], number: int) -> None:
    """Read all batches, and raise if pairs are missing."""
    found = sum(len(image(batch)) for batch in loader)
    if found != number:
        raise RuntimeError(f"Expected {number} pairs in an epoch, got {found}.")


def loader(runs: int) -> None:
    """Large JPEGs to the input of a model: decoded whole, or at a lower resolution, which changes the pixels a little."""
    try:
        import simplejpeg
    except ImportError as error:
        raise SystemExit("The part `loader` needs its peer: pip install simplejpeg") from error
    print_versions("pillow", "simplejpeg", "torchvision")
    transform = open_clip_transforms("ViT-B-32")["eval_transform"]
    sources = [as_jpeg(photographs()[i % 4].resize(LARGE, Image.Resampling.BICUBIC)) for i in range(NUM_LARGE)]
    pairs = ImageTextDataset(sources, [[f"photograph {i}"] for i in range(NUM_LARGE)], transform=transform)

    def draft(data: bytes, size: int) -> Any:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (size, size))  # the smallest of 1/1, 1/2, 1/4 and 1/8 that is no smaller than `size`
        return transform(open_rgb(image))

    def simple(data: bytes, size: int) -> Any:
        options = {"min_height": size, "min_width": size, "min_factor": 1} if size else {}
        return transform(Image.fromarray(simplejpeg.decode_jpeg(data, **options)))

    ways: dict[str, Callable[[bytes], Any]] = {
        "Pillow, draft to twice the size": lambda data: draft(data, 448),
        "Pillow, draft to the size": lambda data: draft(data, 224),
        "simplejpeg, whole": lambda data: simple(data, 0),
        "simplejpeg, to twice the size": lambda data: simple(data, 448),
        "simplejpeg, to the size": lambda data: simple(data, 224),
    }
    others: dict[str, Way] = {name: lambda way=way: list(map(way, sources)) for name, way in ways.items()}  # type: ignore[misc]
    peer = ("load_image: Pillow, whole", lambda: [pairs.load_image(i) for i in range(NUM_LARGE)])
    compare(f"Images of {LARGE[0]} x {LARGE[1]} for a model of 224 x 224", peer, others, runs, per_run=NUM_LARGE)
    print("  mean difference of a pixel to the whole image, in levels of 255:")
    for name, way in ways.items():
        differences = [(way(data) - pairs.load_image(i)).abs().mean() for i, data in enumerate(sources)]
        print(f"  {name:48}{float(torch.stack(differences).mean()) * 0.269 * 255:10.2f}")  # 0.269: the mean std of CLIP
