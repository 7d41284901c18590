"""Wrong captions in files: who gets them, and what is none."""

import csv
import json

import pytest
import torch

from lightning_itm import ImageTextDataset, ImageTextFilesDataModule
from lightning_itm.data import read_pairs
from lightning_itm.data.readers.hard_captions import hard_captions_of_cell
from tests.helpers.fit import fit
from tests.helpers.tiny import AUGMENTED, PLAIN, Tiny, tokenize

ROWS = [
    ("0.png", "a dog", ["a cat", "a cow, or two"]),
    ("1.png", "a car", []),
    ("0.png", "a dog that runs", ["a dog that sleeps"]),
    ("2.png", "a tree", ["a “tree” in 'Rome'"]),
]
EXPECTED = {"a dog": ["a cat", "a cow, or two"], "a dog that runs": ["a dog that sleeps"], "a car": []}
EXPECTED["a tree"] = ["a “tree” in 'Rome'"]


def write(folder, name, rows=ROWS, column="hard_captions"):
    """Write rows of an image, a text and wrong captions in the form that the ending says."""
    path = folder / "val2014" / name
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            cells = [(*row, wrong if isinstance(wrong, str) else json.dumps(wrong)) for *row, wrong in rows]
            writer.writerows([("image", "text", column), *cells])
    else:
        objects = [dict(zip(("image", "text", column), row, strict=True)) for row in rows]
        path.write_text(json.dumps(objects) if path.suffix == ".json" else "\n".join(map(json.dumps, objects)))
    return path


def found(pairs):
    owners = enumerate(pairs.text_image_id.tolist())
    return {pairs.texts[text_id]: pairs.hard_captions.of(text_id, image_id) for text_id, image_id in owners}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json"])
def test_each_caption_has_those_of_its_row(folder, name):
    assert found(read_pairs(write(folder, name), hard_captions="hard_captions")) == EXPECTED
    pairs = read_pairs(write(folder, name, column="wrong"), hard_captions="wrong", num_hard_captions=2)
    assert found(pairs) == EXPECTED
    sample = pairs[pairs.texts.index("a dog")]
    assert sorted(sample["hard_captions"]["text"]) == ["a cat", "a cow, or two"]
    assert read_pairs(write(folder, name)).hard_captions is None


def test_class_methods(folder):
    for read, name in ((ImageTextDataset.from_csv, "a.csv"), (ImageTextDataset.from_jsonl, "a.jsonl")):
        path = write(folder, name)
        assert found(read(path, path.parent, hard_captions="hard_captions")) == EXPECTED


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("", []),
        (" \n", []),
        ("[]", []),
        ("a cat", ["a cat"]),
        ("a cat [1]", ["a cat [1]"]),
        (' ["a cat"]', ["a cat"]),
        ('"a cat" is here', ['"a cat" is here']),
        ("null", ["null"]),  # as in the column of texts
    ],
)
def test_cells(folder, cell, expected):
    rows = [("0.png", "a dog", cell), ("1.png", "a car", "a bus")]
    assert found(read_pairs(write(folder, "a.csv", rows), hard_captions="hard_captions"))["a dog"] == expected
    assert hard_captions_of_cell(cell, "line 2") == expected


@pytest.mark.parametrize("value", [None, "", []])
def test_no_caption_in_json(folder, value):
    rows = [("0.png", "a dog", value), ("1.png", "a car", "a bus")]
    for name in ("a.jsonl", "a.json"):
        pairs = read_pairs(write(folder, name, rows), hard_captions="hard_captions")
        assert found(pairs) == {"a dog": [], "a car": ["a bus"]}


def test_several_captions_in_a_row_share_them(folder):
    rows = [("0.png", ["a dog", "a pet"], "a cat"), ("1.png", "a car", None), ("./0.png", "a puppy", ["a kitten"])]
    pairs = read_pairs(write(folder, "a.jsonl", rows), hard_captions="hard_captions")
    assert found(pairs) == {"a dog": ["a cat"], "a pet": ["a cat"], "a puppy": ["a kitten"], "a car": []}


def test_a_row_without_a_caption(folder):
    rows = [("0.png", "a dog", "a cat"), ("1.png", "", ["a bus", "a van"]), ("0.png", "", "a cow")]
    with pytest.warns(UserWarning, match=r"no caption and are left out, too\. So are 3 hard captions of such rows\."):
        pairs = read_pairs(write(folder, "a.csv", rows), hard_captions="hard_captions")
    assert found(pairs) == {"a dog": ["a cat"]}


@pytest.mark.parametrize(
    ("cell", "got"),
    [
        ("['a cat', 'a cow']", r"""got "\['a cat', 'a cow'\]" .*`json.dumps` writes one"""),
        ("[sic] a cat", r"got '\[sic\] a cat' "),
        ('["a cat", 3]', "got 3"),
        ('["a cat", null]', "got None"),
        ('[["a cat"]]', r"got \['a cat'\]"),
        (r'["half \ud83d"]', r"got 'half \\ud83d'"),
    ],
)
def test_what_is_no_text_in_a_table(folder, cell, got):
    rows = [("0.png", "a dog", "a cat"), ("1.png", "a car", cell)]
    with pytest.raises(ValueError, match=rf"the hard captions in line 3 of .*a\.csv.* {got}"):
        read_pairs(write(folder, "a.csv", rows), hard_captions="hard_captions")


@pytest.mark.parametrize("value", [3, {"en": "a cat"}, ["a cat", None], [[]], [float("nan")], "half \ud83d", True])
def test_what_is_no_text_in_json(folder, value):
    rows = [("0.png", "a dog", "a cat"), ("1.png", "a car", value)]
    for name, where in (("a.jsonl", "line"), ("a.json", "entry")):
        with pytest.raises(ValueError, match=rf"hard captions in {where} 2 of .*{name} to be a text or a list .* got "):
            read_pairs(write(folder, name, rows), hard_captions="hard_captions")


def test_the_column_is_missing(folder):
    columns = r"got the columns \['image', 'text', 'hard'\]\. Name yours"
    for name, where in (("a.csv", "the header"), ("a.jsonl", "line 1"), ("a.json", "entry 1")):
        with pytest.raises(ValueError, match=rf"{where} of .*{name} to have the hard captions 'wrong'.*, {columns}"):
            read_pairs(write(folder, name, column="hard"), hard_captions="wrong")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_captions_instead_of_a_column(folder, name):
    with pytest.raises(TypeError, match=r"the name of a column, such as 'hard_captions', got \[\['a cat'\]\]"):
        read_pairs(write(folder, name), hard_captions=[["a cat"]])


def test_forms_without_them(folder):
    (folder / "val2014" / "a.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(ValueError, match=r"a\.json to be a list of objects with 'wrong', got another form"):
        read_pairs(folder / "val2014" / "a.json", hard_captions="wrong")
    with pytest.raises(ValueError, match="a table or a list of objects with 'wrong', got the folder"):
        read_pairs(folder / "val2014", hard_captions="wrong")


class TinyWithTransforms(Tiny):
    def __init__(self):
        super().__init__(warmup_steps=0)
        self.transforms = {"transform": AUGMENTED, "eval_transform": PLAIN, "tokenizer": tokenize}


def test_a_run_from_paths(folder):
    """Only the training set has the column, and it changes the run."""
    rows = [(f"{number}.png", f"square {number}", [f"no square {number}", "none"]) for number in range(8)]
    train, val = write(folder, "train.csv", rows), folder / "val2014" / "val.csv"
    val.write_text("image,text\n8.png,one\n9.png,two\n")
    losses = []
    for options in ({}, {"hard_captions": "hard_captions", "num_hard_captions": 2}):
        data = ImageTextFilesDataModule(str(train), str(val), batch_size=4, num_workers=0, **options)
        run = fit(TinyWithTransforms, data, seed=0, max_steps=2)
        assert run.trainer.global_step == 2
        losses.append(run.metrics["train/loss"])
    assert losses[0] != losses[1]
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["hard_captions"]["mask"], torch.ones(4, 2, dtype=torch.bool))
