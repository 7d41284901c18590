import json

import pytest
import torch

from lightning_itm import ImageTextDataset, ShardDataset, write_shards
from lightning_itm.callbacks import _rows
from lightning_itm.data.inputs.sources import LazyImages
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.tiny import tiny_pairs


def test_an_image_in_memory_has_no_name():
    assert _rows.describe_image(tiny_pairs(), 3) == {"image_id": 3, "image": None}


def test_an_image_that_is_decoded_on_access_is_not_decoded():
    class Column(list):
        def __init__(self):
            self.asked = []

        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise AssertionError

    pairs = tiny_pairs()
    pairs.images = LazyImages(Column())
    assert _rows.describe_image(pairs, 2) == {"image_id": 2, "image": None}


def test_an_image_in_a_file_or_a_shard_has_its_name(tmp_path):
    for number, image in enumerate(cut_outs(2)):
        image.save(tmp_path / f"{number}.png")
    paths = [tmp_path / "0.png", str(tmp_path / "1.png")]
    pairs = ImageTextDataset(paths, captions(2))
    assert [_rows.describe_image(pairs, i)["image"] for i in range(2)] == [str(path) for path in paths]
    write_shards(pairs, tmp_path / "shards")
    image = _rows.describe_image(ShardDataset(tmp_path / "shards"), 1)
    assert image["image_id"] == 1
    assert image["image"].startswith(str(tmp_path / "shards"))
    assert ".tar/" in image["image"]


def test_jsonl_keeps_every_letter(tmp_path):
    rows = [{"text_id": 0, "text": 'naïve "ñandú"\n'}, {"text_id": 1, "text": "二"}]
    _rows.write_jsonl(tmp_path / "rows.jsonl", iter(rows))
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert "二" in lines[1]


HALF = "a \ud83d dog"  # half of a surrogate pair, as texts from the web have


def test_half_a_surrogate_pair_costs_no_file(tmp_path):
    rows = [{"text_id": 0, "image_id": 0, "text": HALF}]
    _rows.write_jsonl(tmp_path / "rows.jsonl", iter(rows))
    assert json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8")) == rows[0]
    parquet = pytest.importorskip("pyarrow.parquet")
    of_images = [{"image_id": 0, "image": "x\udcff.png", "texts": [{**rows[0], "score": 0.5}]}]
    _rows.write_parquet(tmp_path / "rows.parquet", iter(of_images))
    (row,) = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert (row["image"], row["texts"][0]["text"]) == ("x?.png", "a ? dog")


class TestWholeFiles:
    def test_stand_in_their_place_at_the_end(self, tmp_path):
        with _rows.whole_files(tmp_path, ["a", "b"]) as part:
            for name in ("a", "b"):
                (part / name).write_text(name)
            assert not {"a", "b"} & {path.name for path in tmp_path.iterdir()}
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "a", "b": "b"}

    def test_nothing_is_left_of_what_breaks_off(self, tmp_path):
        with pytest.raises(FileNotFoundError), _rows.whole_files(tmp_path, ["a", "b"]) as part:
            (part / "b").write_bytes((part / "a").read_bytes())  # never written
        assert list(tmp_path.iterdir()) == []


def test_parquet_in_several_parts(tmp_path, monkeypatch):
    """A first row without a name and without negatives must not decide the types of the columns."""
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(_rows, "ROWS_AT_ONCE", 2)
    mined = [{"text_id": 4, "image_id": 2, "text": "a", "score": 0.5}]
    rows = [
        {"image_id": i, "image": None if i == 0 else f"{i}.png", "texts": [] if i == 0 else mined} for i in range(5)
    ]
    _rows.write_parquet(tmp_path / "rows.parquet", iter(rows))
    assert parquet.read_table(tmp_path / "rows.parquet").to_pylist() == rows


def test_text():
    pairs = tiny_pairs()
    assert torch.equal(pairs.text_image_id[:4], torch.tensor([0, 0, 1, 1]))
    assert _rows.describe_text(pairs, 3) == {"text_id": 3, "image_id": 1, "text": pairs.texts[3]}
