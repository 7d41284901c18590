"""Small shards whose pictures say their number, as their texts do, and one pass over a stream of shards."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from lightning_itm.data.shards import StreamedBatches, StreamLoader
from tests.helpers.tiny import AUGMENTED, PLAIN, tokenize

TRANSFORMS = {"transform": AUGMENTED, "eval_transform": PLAIN, "tokenizer": tokenize}


def picture(number):
    """Return a picture that says its number."""
    return Image.fromarray(np.full((4, 4, 3), number, dtype=np.uint8))


def png(number):
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members, *, mode="w"):
    """Write members in the order given, as img2dataset does: one after the other, no folder."""
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def img2dataset_sample(number, caption=None, image=None):
    caption = f"number {number}" if caption is None else caption
    facts = {"caption": caption, "url": f"https://example.com/{number}", "key": f"{number:09d}", "status": "success"}
    image = png(number) if image is None else image
    return [
        (f"{number:09d}.jpg", image),
        (f"{number:09d}.json", json.dumps(facts).encode()),
        (f"{number:09d}.txt", caption.encode()),
    ]


def write_img2dataset(folder, shards=2, per_shard=4):
    for shard in range(shards):
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        write_tar(folder / f"{shard:05d}.tar", [member for number in numbers for member in img2dataset_sample(number)])


def check_pairing(pairs):
    """Every picture says the number that its text says."""
    view = pairs.evaluation()
    for text_id in range(len(pairs)):
        sample = view[text_id]
        number = round(255 * float(sample["image"][0, 0, 0]))
        assert sample["text"] == f"number {number}"
        assert sample["text_id"] == text_id
        assert sample["image_id"] == int(pairs.text_image_id[text_id])


def streamed(stream, *, num_workers, rank=0, world_size=1, batch_size=4, drop_last=False, epoch=0, done=0):
    batches = StreamedBatches(stream, batch_size, drop_last=drop_last, rank=rank, world_size=world_size, seed=3)
    loader = StreamLoader(batches, lambda: (epoch, done), num_workers=num_workers)
    read = list(loader)
    assert len(read) == len(loader) - done
    return read


def ids(batches):
    return [number for batch in batches for number in batch["text_id"].tolist()]
