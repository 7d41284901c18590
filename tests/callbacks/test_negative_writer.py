import json
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.nn.functional import normalize

from lightning_itm import ImageTextDataModule, ImageTextDataset, NegativeWriter
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.tiny import AUGMENTED, NUM_IMAGES, PLAIN, SILENT, Tiny, tiny_data, tokenize

TABLE = {"texts_per_image": 5, "images_per_text": 4}


def mine(folder, data=None, model=None, *, devices=1, **options):
    strategy = "ddp_fork" if devices > 1 else "auto"
    writer = NegativeWriter(folder, **{**TABLE, **options})
    trainer = L.Trainer(callbacks=[writer], devices=devices, strategy=strategy, **SILENT)
    trainer.predict(model or Tiny(), datamodule=data or tiny_data(), return_predictions=False)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_rows_are_the_hardest_with_their_similarity():
    model, data = Tiny(), tiny_data()
    mine("mined", data, model)
    view = data.predict_pairs()
    owner = view.text_image_id
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([view.load_image(i) for i in range(NUM_IMAGES)]))
        texts = model.encode_text(torch.stack([view.load_text(i) for i in range(len(view))]))
    scores = normalize(images) @ normalize(texts).T
    scores[torch.arange(NUM_IMAGES)[:, None] == owner] = -2
    for name, kind, own_scores, k in (
        ("texts_of_images", "text", scores, TABLE["texts_per_image"]),
        ("images_of_texts", "image", scores.T, TABLE["images_per_text"]),
    ):
        best = own_scores.topk(k).values
        rows = read_lines(f"mined/{name}.jsonl")
        # Some captions have the same letters and so the same embedding: their order is not fixed, their scores are.
        index = torch.tensor([[entry[f"{kind}_id"] for entry in row[f"{kind}s"]] for row in rows])
        torch.testing.assert_close(own_scores.gather(1, index), best, atol=1e-6, rtol=0)
        found = torch.tensor([[entry["score"] for entry in row[f"{kind}s"]] for row in rows])
        torch.testing.assert_close(found, best, atol=2e-6, rtol=0)  # six digits are written


def test_guards_are_those_of_the_search():
    mine("mined", max_score=-2.0)
    assert all(row["texts"] == [] for row in read_lines("mined/texts_of_images.jsonl"))


def test_what_can_not_be_read_is_left_out():
    images = cut_outs(6)
    images[2] = b"no image"
    pairs = ImageTextDataset(images, captions(6), transform=AUGMENTED, eval_transform=PLAIN, tokenizer=tokenize)
    data = ImageTextDataModule(test_dataset=pairs, batch_size=3, num_workers=0)
    with pytest.warns(UserWarning, match=r"1 of 6 images can't be read, .* left out as negatives"):
        mine("mined", data, texts_per_image=12, images_per_text=6)
    rows = read_lines("mined/texts_of_images.jsonl")
    assert [len(row["texts"]) for row in rows] == [8, 8, 0, 8, 8, 8]
    assert all(entry["image_id"] != 2 for row in rows for entry in row["texts"])


@pytest.mark.forks
def test_two_processes_write_what_one_writes():
    model = Tiny()
    for devices in (1, 2):
        mine(f"mined-{devices}", model=model, devices=devices)
    for name, mined, key in (("texts_of_images", "texts", "text_id"), ("images_of_texts", "images", "image_id")):
        one, two = (read_lines(f"mined-{devices}/{name}.jsonl") for devices in (1, 2))
        assert [[entry[key] for entry in row[mined]] for row in one] == [
            [entry[key] for entry in row[mined]] for row in two
        ]


def test_another_format():
    with pytest.raises(ValueError, match="`format` to be one of 'jsonl', 'parquet', got 'csv'"):
        NegativeWriter("mined", format="csv")


def test_parquet_without_pyarrow(monkeypatch):
    """The error comes when the callback is made, before hours of encoding."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match="Expected pyarrow, to write Parquet"):
        NegativeWriter("mined", format="parquet")


@pytest.mark.filterwarnings("ignore:12 of 12 pairs share their caption")
@pytest.mark.parametrize("option", ["exclude", "keep"])
def test_equal_captions(option):
    """Six images of two captions, each with one of two others."""
    texts = [[f"kind {i % 2}", f"Kind  {2 + i % 3}"] for i in range(6)]
    options = {"transform": AUGMENTED, "eval_transform": PLAIN, "tokenizer": tokenize, "equal_captions": option}
    data = ImageTextDataModule(
        test_dataset=ImageTextDataset(cut_outs(6), texts, **options), batch_size=3, num_workers=0
    )
    mine("mined", data, texts_per_image=12)
    for row in read_lines("mined/texts_of_images.jsonl"):
        own = {text.lower() for text in texts[row["image_id"]]}
        equal = [entry["text"] for entry in row["texts"] if entry["text"].lower() in own]
        assert len(row["texts"]) == (7 if option == "exclude" else 10)
        assert (equal == []) == (option == "exclude")
