"""Wrong captions in shards: written, read by number and as a stream, and never of another text."""

import json
import warnings

import pytest
import torch

from lightning_itm import (
    ImageTextDataset,
    ImageTextFilesDataModule,
    ShardDataset,
    ShardStream,
    write_shards,
)
from lightning_itm.data import read_pairs
from lightning_itm.data.shards.commands import write
from tests.helpers import resume
from tests.helpers.fit import fit
from tests.helpers.shards import TRANSFORMS, picture, png, write_tar
from tests.helpers.tiny import NUM_IMAGES, Tiny, tiny_data, tiny_pairs

LISTS = [[f"wrong {i} of {j}" for j in range(i % 4)] for i in range(2 * NUM_IMAGES)]


@pytest.fixture
def folder(tmp_path):
    write_shards(tiny_pairs(hard_captions=LISTS), tmp_path / "shards", images_per_shard=5)
    return tmp_path / "shards"


def lists_of(pairs):
    return [pairs.hard_captions.of(text, image) for text, image in enumerate(pairs.text_image_id.tolist())]


def test_each_text_keeps_its_own(folder):
    pairs = ShardDataset(folder, hard_captions=True, num_hard_captions=2, **TRANSFORMS)
    assert lists_of(pairs) == LISTS
    assert pairs[3]["hard_captions"]["mask"].tolist() == [True, True]
    assert "hard_captions" not in pairs.evaluation()[3]
    assert ShardDataset(folder).hard_captions is None
    assert pairs.identity() != ShardDataset(folder).identity()


def test_ids_in_another_order_than_the_images(tmp_path):
    images, texts = [picture(number) for number in range(3)], [f"number {number}" for number in range(6)]
    wrong = [[f"not {text}"] for text in texts]
    before = ImageTextDataset(images, texts, text_image_id=[2, 0, 1, 0, 2, 1], hard_captions=wrong)
    write_shards(before, tmp_path / "shards", images_per_shard=2)
    pairs = ShardDataset(tmp_path / "shards", hard_captions=True)
    assert list(pairs.texts) == texts
    assert lists_of(pairs) == wrong


def test_an_index_from_before(folder):
    """It is read as it is, unless they are asked for."""
    index = ShardDataset(folder).contents.file
    values = torch.load(index, weights_only=True)
    del values["hard_captions"]
    torch.save(values, index)
    assert ShardDataset(folder).hard_captions is None
    assert "hard_captions" not in torch.load(index, weights_only=True)
    assert lists_of(ShardDataset(folder, hard_captions=True)) == LISTS
    assert "hard_captions" in torch.load(index, weights_only=True)


def test_shards_without_them(tmp_path):
    write_shards(tiny_pairs(), tmp_path / "shards")
    with pytest.raises(ValueError, match="`hard_captions` to have at least one caption, got none"):
        ShardDataset(tmp_path / "shards", hard_captions=True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a cat", ["a cat"]),
        (["a cat", "a cow"], ["a cat", "a cow"]),
        ([["a cat"]], ["a cat"]),
        ([], []),
        (None, []),
        ([["a cat"], ["a cow"]], None),
        ([[3]], None),
        (3, None),
    ],
)
def test_shards_of_others(tmp_path, value, expected):
    samples = [
        ("a", {"caption": "a dog", "hard_captions": value}),
        ("b", {"caption": "a car", "hard_captions": "a bus"}),
    ]
    members = [(f"{key}.png", png(1)) for key, _ in samples], [(f"{key}.json", json.dumps(f)) for key, f in samples]
    ordered = [(name, data) for pair in zip(*members, strict=True) for name, data in pair]
    write_tar(
        tmp_path / "0.tar", [(name, data if isinstance(data, bytes) else data.encode()) for name, data in ordered]
    )
    if expected is None:
        with pytest.warns(UserWarning, match=r"1 with hard captions that are not one list of texts per caption .*'a'"):
            pairs = ShardDataset(tmp_path / "0.tar", hard_captions=True)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pairs = ShardDataset(tmp_path / "0.tar", hard_captions=True)
    assert lists_of(pairs) == [expected or [], ["a bus"]]


def test_from_a_table_into_shards(tmp_path):
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
    rows = [json.dumps({"image": f"{i}.png", "text": f"number {i}", "wrong": LISTS[i]}) + "\n" for i in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    write(str(tmp_path / "a.jsonl"), str(tmp_path / "shards"), hard_captions="wrong")
    assert lists_of(read_pairs(tmp_path / "shards", hard_captions="hard_captions")) == LISTS[:4]
    with pytest.raises(ValueError, match="Expected 'hard_captions', their name in shards, got 'wrong'"):
        read_pairs(tmp_path / "shards", hard_captions="wrong")


@pytest.mark.parametrize("stream", [True, False])
def test_paths_of_shards_with_an_index_from_before(folder, stream):
    index = ShardDataset(folder).contents.file
    values = torch.load(index, weights_only=True)
    del values["hard_captions"]
    torch.save(values, index)
    data = ImageTextFilesDataModule(
        str(folder), hard_captions="hard_captions", stream=stream, batch_size=4, num_workers=0
    )
    data.prepare_data()
    assert "hard_captions" in torch.load(index, weights_only=True)
    model = Tiny(warmup_steps=0)
    model.transforms = TRANSFORMS
    run = fit(model, data, max_steps=2)
    assert run.trainer.global_step == 2
    assert "hard_captions" in next(iter(data.train_dataloader()))


def stream_data(folder, **kwargs):
    data = tiny_data(**kwargs)
    data.train_dataset = ShardStream(
        ShardDataset(folder, hard_captions=True, num_hard_captions=2, **TRANSFORMS), shuffle_buffer=9
    )
    return data


def test_a_stream_has_them(folder):
    data = stream_data(folder)
    pairs = 0
    for batch in data.train_dataloader():
        for text_id, mask in zip(batch["text_id"].tolist(), batch["hard_captions"]["mask"], strict=True):
            assert int(mask.sum()) == min(2, len(LISTS[text_id]))
            pairs += 1
    assert pairs == 2 * NUM_IMAGES


def test_a_run(folder):
    run = fit(lambda: Tiny(warmup_steps=0), stream_data(folder), seed=0, max_steps=2, limit_val_batches=0)
    assert run.trainer.global_step == 2


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}])
def test_resume(folder, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "tiny_data", lambda **kwargs: stream_data(folder, **kwargs))
    whole, _ = resume.fit(Tiny, workers, tmp_path, save={"every_n_train_steps": 17}, limit_val_batches=0)
    path = str(tmp_path / "step=17.ckpt")
    resumed, _ = resume.fit(Tiny, workers, tmp_path / "again", limit_val_batches=0, resume_from=path)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
