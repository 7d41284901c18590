import io
import sys

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_itm import ImageTextDataModule, ImageTextDataset, OfflineHardNegativeMining
from lightning_itm.data import collate_pairs, read_pairs
from tests.helpers.fit import fit
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.tiny import AUGMENTED, NUM_IMAGES, PLAIN, Tiny, tiny_data, tiny_pairs, tokenize

OPTIONS = {"transform": AUGMENTED, "eval_transform": PLAIN, "tokenizer": tokenize}
datasets.disable_progress_bars()


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def paths(folder, number=NUM_IMAGES):
    for index, image in enumerate(cut_outs(number)):
        image.save(folder / f"{index}.png")
    return [str(folder / f"{index}.png") for index in range(number)]


def column(form, folder):
    """The same pictures in each form that a column can have."""
    if form == "pictures":
        return cut_outs(NUM_IMAGES)
    return paths(folder) if "paths" in form else [png(image) for image in cut_outs(NUM_IMAGES)]


def of_form(form, folder, sentences=None):
    values, sentences = column(form, folder), captions(NUM_IMAGES) if sentences is None else sentences
    if form == "struct":
        values = [{"bytes": value, "path": None} for value in values]
    dataset = datasets.Dataset.from_dict({"image": values, "sentences": sentences})
    return dataset.cast_column("image", datasets.Image()) if form in ("image paths", "image bytes") else dataset


@pytest.mark.parametrize("form", ["pictures", "bytes", "struct", "paths", "image paths", "image bytes"])
def test_forms_of_images(form, tmp_path):
    pairs = ImageTextDataset.from_huggingface(of_form(form, tmp_path), **OPTIONS).evaluation()
    expected = tiny_pairs().evaluation()
    assert len(pairs) == len(expected)
    for index in range(len(pairs)):
        assert torch.equal(pairs[index]["image"], expected[index]["image"])
        assert {key: value for key, value in pairs[index].items() if key.endswith("_id")} == expected.ids(index)
        assert torch.equal(pairs[index]["text"], expected[index]["text"])


@pytest.mark.parametrize(
    ("wrap", "key"),
    [
        (lambda text: {"raw": text, "tokens": text.split()}, None),
        (lambda text: {"id": 7, "caption": text}, None),
        (lambda text: {"caption": "not this", "text": "nor this", "de": text}, "de"),
    ],
)
def test_captions_in_dicts(wrap, key):
    sentences = [[wrap(text) for text in texts] for texts in captions(5)]
    dataset = datasets.Dataset.from_dict({"image": cut_outs(5), "sentences": sentences})
    pairs = ImageTextDataset.from_huggingface(dataset, caption_key=key)
    assert pairs.texts == [text for texts in captions(5) for text in texts]


@pytest.mark.parametrize("value", [lambda texts: {"raw": texts}, lambda texts: texts[0]], ids=["dict of lists", "text"])
def test_one_value_per_row(value):
    sentences = [value(texts) for texts in captions(5)]
    dataset = datasets.Dataset.from_dict({"photo": cut_outs(5), "text": sentences})
    pairs = ImageTextDataset.from_huggingface(dataset, "photo", "text")
    assert pairs.texts in ([text for texts in captions(5) for text in texts], [texts[0] for texts in captions(5)])


def test_rows_with_the_same_image_share_it(tmp_path):
    images = paths(tmp_path, 2)
    table = {"path": [*images, images[0]], "number": [7, 9, 7], "text": ["a", "b", "c"]}
    table["image"] = [png(image) for image in (*cut_outs(2), cut_outs(2)[0])]
    dataset = datasets.Dataset.from_dict(table)
    for options in ({"image": "path"}, {"image": "image", "image_id": "number"}):
        pairs = ImageTextDataset.from_huggingface(dataset, captions="text", **options)
        assert (pairs.texts, pairs.text_image_id.tolist()) == (["a", "c", "b"], [0, 0, 1])
        assert (np.asarray(pairs[2]["image"]) == np.asarray(tiny_images()[1])).all()


def tiny_images():
    return [pair["image"] for pair in ImageTextDataset(cut_outs(2), ["0", "1"])]


def test_a_part_of_a_set_in_another_order():
    dataset = of_form("bytes", None).select([5, 3, 8])
    pairs = ImageTextDataset.from_huggingface(dataset, **OPTIONS).evaluation()
    expected = tiny_pairs().evaluation()
    assert pairs.texts == [text for index in (5, 3, 8) for text in captions(NUM_IMAGES)[index]]
    assert torch.equal(pairs.load_image(1), expected.load_image(3))


def test_rows_without_captions_are_left_out_with_a_warning():
    sentences = captions(NUM_IMAGES)
    sentences[2], sentences[4] = [], ["", "a square"]
    with pytest.warns(
        UserWarning, match=r"'sentences', what is no text .* 2 times, first in row 2: \[\]. So 1 of 23"
    ) as seen:
        pairs = ImageTextDataset.from_huggingface(of_form("bytes", None, sentences), **OPTIONS)
    assert seen[0].filename == __file__
    assert len(pairs.images) == NUM_IMAGES - 1
    assert torch.equal(pairs.evaluation().load_image(2), tiny_pairs().evaluation().load_image(3))


def test_no_caption_at_all():
    with pytest.raises(
        ValueError, match=r"a caption in the column 'sentences', found none; .* 23 times, first in row 0: 0"
    ):
        ImageTextDataset.from_huggingface(of_form("bytes", None, list(range(NUM_IMAGES))))


@pytest.mark.parametrize("form", ["pictures", "bytes", "paths"])
def test_a_row_without_an_image(form, tmp_path):
    values = column(form, tmp_path)
    values[3] = None
    dataset = datasets.Dataset.from_dict({"image": values, "sentences": captions(NUM_IMAGES)})
    with pytest.raises(ValueError, match=r"row 3 to have an image in the column 'image', got .*None.*dataset.filter"):
        ImageTextDataset.from_huggingface(dataset)
    filtered = dataset.filter(lambda value: value is not None, input_columns="image")
    assert len(ImageTextDataset.from_huggingface(filtered).images) == NUM_IMAGES - 1


def test_broken_images_count_as_unreadable():
    values = [png(image) for image in cut_outs(NUM_IMAGES)]
    values[3] = b"no image"
    dataset = datasets.Dataset.from_dict({"image": values, "sentences": captions(NUM_IMAGES)})
    pairs = ImageTextDataset.from_huggingface(dataset.cast_column("image", datasets.Image()), max_unreadable=0.1)
    with pytest.warns(UserWarning, match="Another pair takes its place"):
        assert pairs[6]["image_id"] != 3
    assert pairs.num_replaced in (1, 2), "the pair drawn in its place may be the other one of the image"
    with pytest.raises(RuntimeError, match="In evaluation nothing is replaced"):
        pairs.evaluation()[6]


def test_missing_files(tmp_path):
    dataset = of_form("image paths", tmp_path)
    for index in range(5):
        (tmp_path / f"{index}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"found no file for 5, the first: .*0\.png"):
        ImageTextDataset.from_huggingface(dataset)


def test_an_image_within_an_archive(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for index, image in enumerate(cut_outs(2)):
            archive.writestr(f"{index}.png", png(image))
    values = [f"zip://{index}.png::{tmp_path / 'images.zip'}" for index in range(2)]
    pairs = ImageTextDataset.from_huggingface(
        datasets.Dataset.from_dict({"image": values, "sentences": ["a", "b"]}), **OPTIONS
    )
    assert torch.equal(pairs.evaluation().load_image(1), PLAIN(cut_outs(2)[1]))


REFUSED = {
    "streamed": (
        lambda dataset: dataset.to_iterable_dataset(),
        TypeError,
        "got IterableDataset. .*without `streaming=True`",
    ),
    "splits": (
        lambda dataset: datasets.DatasetDict(train=dataset),
        TypeError,
        r"got DatasetDict. .*`dataset\['train'\]`",
    ),
    "a list": (list, TypeError, r"got list. Load one with `datasets.load_dataset\(..., split='train'\)`"),
    "no column": (
        lambda dataset: dataset.rename_column("image", "photo"),
        ValueError,
        r"the column 'image', got the columns \['photo', 'sentences'\]",
    ),
    "a function": (
        lambda dataset: dataset.with_transform(lambda rows: rows),
        ValueError,
        r"`set_transform`, .*with_format\(None\)",
    ),
    "numbers": (
        lambda dataset: dataset.rename_columns({"image": "photo"}).add_column("image", list(range(len(dataset)))),
        TypeError,
        "one image per row .* got Value.*int64",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        ImageTextDataset.from_huggingface(make(of_form("bytes", None)))


@pytest.mark.parametrize(("key", "expected"), [("en", "the key 'en'"), (None, "one of the keys .*'raw'")])
def test_dicts_without_the_key(key, expected):
    dataset = of_form("bytes", None, [[{"de": text} for text in texts] for texts in captions(NUM_IMAGES)])
    with pytest.raises(ValueError, match=rf"row 0 of the column 'sentences' .* {expected}.* got the keys \['de'\]"):
        ImageTextDataset.from_huggingface(dataset, caption_key=key)


def test_an_id_that_is_missing():
    dataset = of_form("bytes", None).add_column("number", [*range(NUM_IMAGES - 1), None])
    with pytest.raises(ValueError, match="in the column 'number', got None in row 22"):
        ImageTextDataset.from_huggingface(dataset, image_id="number")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning_itm\[datasets\]"'):
        ImageTextDataset.from_huggingface([])


@pytest.mark.parametrize(
    "method", [pytest.param("fork", marks=pytest.mark.forks), pytest.param("spawn", marks=pytest.mark.slow)]
)
def test_workers(method, tmp_path):
    of_form("image bytes", None).save_to_disk(tmp_path / "set")
    pairs = read_pairs(tmp_path / "set", text_column="sentences", tokenizer=tokenize).evaluation()
    loader = DataLoader(pairs, 8, collate_fn=collate_pairs, num_workers=1, multiprocessing_context=method)
    images = torch.cat([batch["image"] for batch in loader])
    expected = tiny_pairs(transform=None, eval_transform=None).evaluation()
    assert torch.equal(images, torch.stack([expected[index]["image"] for index in range(len(expected))]))


def test_training_is_that_on_a_list_of_images():
    """Order, augmentation, mining and identity: bit for bit."""
    runs = []
    for pairs in (tiny_pairs(), ImageTextDataset.from_huggingface(of_form("image bytes", None), **OPTIONS)):
        data = tiny_data()
        data.train_dataset = pairs
        miner = OfflineHardNegativeMining(texts_per_image=12, images_per_text=8)
        runs.append(fit(Tiny, data, miner, seed=0, limit_val_batches=0))
    one, two = (run.module.state_dict() for run in runs)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    identities = [run.data.train_dataset.identity() for run in runs]
    assert {**identities[0], **identities[1]} == identities[0]


def test_saved_splits(tmp_path):
    dataset = of_form("image bytes", None)
    datasets.DatasetDict(train=dataset, validation=dataset.select(range(4))).save_to_disk(str(tmp_path))
    assert [len(read_pairs(tmp_path, text_column="sentences", split=split).images) for split in ("train", "val")] == [
        23,
        4,
    ]
    with pytest.raises(ValueError, match=r"one of \['train', 'validation'\], the splits of .*, got 'test'"):
        read_pairs(tmp_path, text_column="sentences", split="test")
    assert isinstance(ImageTextDataModule(read_pairs(tmp_path, text_column="sentences")), ImageTextDataModule)


def test_hard_captions():
    """Lists, also empty ones; rows of one image; an image that is left out because it has no caption."""
    table = {"image": [png(image) for image in cut_outs(4)], "number": [7, 8, 9, 7], "text": ["a", "", "b", "c"]}
    table["wrong"] = [["x"], ["left out"], None, ["y", "z"]]
    with pytest.warns(UserWarning, match="So 1 of 3 images have no caption"):
        pairs = ImageTextDataset.from_huggingface(
            datasets.Dataset.from_dict(table), captions="text", image_id="number", hard_captions="wrong"
        )
    assert pairs.texts == ["a", "c", "b"]
    assert [pairs.hard_captions.of(0, image) for image in range(2)] == [["x", "y", "z"], []]


def test_what_is_no_hard_caption():
    dataset = of_form("bytes", None).add_column("wrong", list(range(NUM_IMAGES)))
    with pytest.raises(
        TypeError, match=r"row 0 of the column 'wrong' to have wrong captions, .* got 0\. Put an empty list"
    ):
        ImageTextDataset.from_huggingface(dataset, hard_captions="wrong")
