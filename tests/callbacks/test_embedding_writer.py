import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from lightning_itm import EmbeddingWriter, ImageTextDataModule, ImageTextDataset
from tests.helpers.no_room import files_below
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.tiny import AUGMENTED, NUM_IMAGES, PLAIN, SILENT, Tiny, tiny_data, tokenize

NUM_TEXTS = 2 * NUM_IMAGES


def write(folder, data=None, model=None, **options):
    writer = EmbeddingWriter(folder)
    trainer = L.Trainer(callbacks=[writer], **SILENT, **options)
    return trainer.predict(model or Tiny(), datamodule=data or tiny_data(), return_predictions=False)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_rows_are_in_the_order_of_the_ids():
    model, data = Tiny(), tiny_data(batch_size=5)
    write("out", data, model)
    view = data.predict_pairs()
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([view.load_image(i) for i in range(NUM_IMAGES)]))
        texts = model.encode_text(torch.stack([view.load_text(i) for i in range(NUM_TEXTS)]))
    for name, expected in (("image", images), ("text", texts)):
        found = np.load(f"out/{name}.npy")
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, normalize(expected), atol=1e-6)
    assert read_lines("out/images.jsonl") == [{"image_id": i, "image": None} for i in range(NUM_IMAGES)]
    assert [(row["text_id"], row["image_id"], row["text"]) for row in read_lines("out/texts.jsonl")] == [
        (i, i // 2, view.texts[i]) for i in range(NUM_TEXTS)
    ]


def test_what_can_not_be_read_is_nan_and_named():
    images = cut_outs(4)
    images[2] = b"no image"
    pairs = ImageTextDataset(images, captions(4), transform=AUGMENTED, eval_transform=PLAIN, tokenizer=tokenize)
    data = ImageTextDataModule(test_dataset=pairs, batch_size=3, num_workers=0)
    with pytest.warns(UserWarning, match=r"1 of 4 images can't be read, the first: .*'image_id': 2.* rows are NaN"):
        write("out", data)
    assert np.isnan(np.load("out/image.npy")).all(axis=1).tolist() == [False, False, True, False]
    assert np.isfinite(np.load("out/text.npy")).all()


@pytest.mark.forks
def test_two_processes_write_what_one_writes():
    """23 images: one rank has a row more than the other."""
    assert NUM_IMAGES % 2 == 1
    model = Tiny()
    for devices in (1, 2):
        options = {"devices": devices, "strategy": "ddp_fork" if devices > 1 else "auto"}
        write(f"out-{devices}", model=model, **options)
    for name in ("image", "text"):
        np.testing.assert_allclose(np.load(f"out-1/{name}.npy"), np.load(f"out-2/{name}.npy"), atol=1e-6)
    for name in ("images", "texts"):
        assert read_lines(f"out-1/{name}.jsonl") == read_lines(f"out-2/{name}.jsonl")


def test_what_breaks_off_leaves_no_results():
    """A disk that is full within the second file: here one too large."""
    with pytest.raises(OSError, match="too large"), files_below(2000):  # images.jsonl is smaller, image.npy is not
        write("out", model=Tiny())
    assert list(Path("out").iterdir()) == []
    write("out")  # and nothing is in the way of the next try
    assert len(list(Path("out").iterdir())) == 4


class TestBadInput:
    def test_a_folder_with_results(self):
        write("out")
        with pytest.raises(FileExistsError, match=r"folder without results, got out with image\.npy, text\.npy"):
            write("out")

    def test_another_loader(self):
        trainer = L.Trainer(callbacks=[EmbeddingWriter("out")], **SILENT)
        with pytest.raises(MisconfigurationException, match=r"ImageTextDataModule, .* got NoneType"):
            trainer.predict(Tiny(), [DataLoader([0])])

    @pytest.mark.parametrize(
        "options", [{"limit_predict_batches": 1}, {"limit_predict_batches": 0.5}, {"fast_dev_run": True}]
    )
    def test_a_part_of_the_set(self, options):
        with pytest.raises(MisconfigurationException, match="Expected to encode the whole set"):
            write("out", **options)

    def test_embeddings_that_are_not_finite(self):
        model = Tiny()
        nn.init.constant_(model.text_encoder.weight, torch.nan)
        with pytest.raises(ValueError, match=r"finite text embeddings, got NaN or infinity\. Is the checkpoint"):
            write("out", model=model)
        assert not Path("out").exists()
