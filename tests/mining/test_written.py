"""Training with negatives that were mined before, and written to files."""

import json
from pathlib import Path

import jsonargparse
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_itm import (
    ImageTextDataModule,
    ImageTextDataset,
    NegativeWriter,
    OfflineHardNegativeMining,
    QuintupletLoss,
)
from lightning_itm.mining.written import read_negatives
from tests.helpers import resume
from tests.helpers.fit import fit
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.tiny import NUM_IMAGES, SILENT, Tiny, tiny_data, tiny_pairs

COUNTS = {"texts_per_image": 12, "images_per_text": 8}


def mine(folder="mined", pairs=None, **options):
    L.seed_everything(0, verbose=False)
    data = ImageTextDataModule(test_dataset=tiny_pairs() if pairs is None else pairs, batch_size=8, num_workers=0)
    writer = NegativeWriter(folder, **{**COUNTS, **options})
    L.Trainer(callbacks=[writer], **SILENT).predict(Tiny(), datamodule=data, return_predictions=False)


def run(*, data=None, watch=None, epochs=2, **options):
    miner = OfflineHardNegativeMining(**{**COUNTS, **options})

    def module():
        return Tiny(QuintupletLoss())

    callbacks = [miner] if watch is None else [watch, miner]
    return fit(module, data or tiny_data(), *callbacks, seed=0, max_epochs=epochs, limit_val_batches=0)


def weights(run):
    return torch.cat([value.flatten().double() for value in run.module.state_dict().values()])


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize("inject", ["samples", "batches"])
def test_is_what_mining_once_with_that_model_gives(inject, format):
    """The model that begins the fit is the one that the files were mined with, so all draws and weights are equal."""
    mine(format=format)
    ways = {"inject": inject, "group_size": 2}
    online = run(**ways, every_n_epochs=None, relative_margin=None)
    offline = run(**ways, table="mined")
    assert torch.equal(weights(online), weights(offline))
    assert not torch.equal(weights(online), weights(run(**ways, relative_margin=None))), "another table in each epoch"


def test_nothing_is_encoded_or_searched(monkeypatch):
    mine()
    monkeypatch.setattr("lightning_itm.mining.mine.mine_into", None)
    metrics = run(table=Path("mined")).metrics
    assert metrics["mining/read_seconds"] > 0
    assert not {"mining/encode_seconds", "mining/search_seconds"} & set(metrics)


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_workers_draw_from_it(start_epoch):
    mine()
    seen = []
    for num_workers in (0, 2):
        watch = resume.Watch()
        run(table="mined", start_epoch=start_epoch, watch=watch, data=tiny_data(num_workers=num_workers))
        seen.append(watch.seen)
    assert seen[0] == seen[1]
    assert all((min(row[4]) >= 0) == (row[0] >= start_epoch) for row in seen[0])


class SaveTable(Callback):
    def on_train_end(self, trainer, pl_module):
        (miner,) = (one for one in trainer.callbacks if isinstance(one, OfflineHardNegativeMining))
        torch.save((miner.table.texts.clone(), miner.table.images.clone()), f"table-{trainer.global_rank}.pt")


def written():
    return read_negatives("mined", tiny_pairs(), COUNTS["texts_per_image"], COUNTS["images_per_text"])


@pytest.mark.slow
@pytest.mark.forks
def test_two_processes_read_the_same_files():
    mine()
    miner = OfflineHardNegativeMining(**COUNTS, table="mined")
    options = {"devices": 2, "strategy": "ddp_fork", "limit_val_batches": 0}
    fit(Tiny(QuintupletLoss()), tiny_data(), miner, SaveTable(), seed=0, **options)
    for rank in range(2):
        saved = torch.load(f"table-{rank}.pt")
        assert all(torch.equal(one, other) for one, other in zip(saved, written(), strict=True))


@pytest.mark.parametrize("inject", ["samples", "batches"])
def test_resume(inject, tmp_path):
    mine()
    options = {"mining": {"inject": inject, "group_size": 2, "table": "mined"}, "limit_val_batches": 0}
    whole, seen = resume.fit(Tiny, {}, tmp_path, save={"every_n_train_steps": 17}, **options)
    path = str(tmp_path / "step=17.ckpt")
    resumed, seen_again = resume.fit(Tiny, {}, tmp_path / "again", **options, resume_from=path)
    assert seen[17:] == seen_again
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    edit("texts_of_images", 0, lambda row: row["texts"].reverse())
    with pytest.raises(ValueError, match=r"to be those of `table`, mined, got 12 of 276 texts that differ"):
        resume.fit(Tiny, {}, tmp_path / "other", **options, resume_from=path)


def test_the_hardest_are_kept():
    mine()
    texts, images = read_negatives("mined", tiny_pairs(), 3, 2)
    wide = read_negatives("mined", tiny_pairs(), 12, 8)
    assert torch.equal(texts, wide[0][:, :3])
    assert torch.equal(images, wide[1][:, :2])


def test_all_that_there_are():
    """A set with fewer negatives than are asked for."""
    mine(texts_per_image=300, images_per_text=60)
    texts, images = read_negatives("mined", tiny_pairs(), 300, 60)
    assert ((texts >= 0).sum(dim=1) == 2 * NUM_IMAGES - 2).all()
    assert ((images >= 0).sum(dim=1) == NUM_IMAGES - 1).all()


def read(pairs, counts=(12, 8)):
    return read_negatives("mined", pairs, *counts)


def edit(name, number, change):
    path = Path(f"mined/{name}.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[number])
    path.write_text("\n".join(map(json.dumps, rows)))


class TestAnotherSet:
    def test_size(self):
        mine()
        with pytest.raises(
            ValueError, match=r"rows of 44 texts, those of this training set, got 46 in .*images_of_texts"
        ):
            read(tiny_pairs(NUM_IMAGES - 1))

    def test_texts(self):
        mine()
        texts = captions(NUM_IMAGES)
        texts[3][1] = "another"
        with pytest.raises(
            ValueError, match=r"got text 7 of image 3: 'the 3th square'. Here it is of image 3: 'another'"
        ):
            read(ImageTextDataset(cut_outs(NUM_IMAGES), texts))

    def test_owners(self):
        mine()
        flat, owner = (
            [text for texts in captions(NUM_IMAGES) for text in texts],
            [i // 2 for i in range(2 * NUM_IMAGES)],
        )
        owner[5] = 3
        with pytest.raises(ValueError, match=r"got text 5 of image 2: .* Here it is of image 3"):
            read(ImageTextDataset(cut_outs(NUM_IMAGES), flat, text_image_id=owner))

    def test_names_of_images(self, tmp_path):
        folders = []
        for name in ("here", "there"):
            (tmp_path / name).mkdir()
            folders.append([tmp_path / name / f"{number:02}.png" for number in range(NUM_IMAGES)])
        for path, other, image in zip(*folders, cut_outs(NUM_IMAGES), strict=True):
            image.save(path)
            image.save(other)
        pairs = [ImageTextDataset(paths, captions(NUM_IMAGES)) for paths in folders]
        options = {name: getattr(tiny_pairs(), name) for name in ("transform", "eval_transform", "tokenizer")}
        mine(pairs=ImageTextDataset(folders[0], captions(NUM_IMAGES), **options))
        read(pairs[1])  # a copy in another folder
        other = ImageTextDataset([*folders[1][1:], folders[1][0]], captions(NUM_IMAGES))
        with pytest.raises(ValueError, match=r"got 00.png as image 0, which is 01.png here"):
            read(other)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((13, 8), r"13 negatives per row .*, as `texts_per_image` says, got at most 12. Give `texts_per_image=12`"),
        ((12, 9), r"9 negatives per row .*, as `images_per_text` says, got at most 8. Give `images_per_text=8`"),
    ],
)
def test_too_few(counts, message):
    mine()
    with pytest.raises(ValueError, match=message):
        read(tiny_pairs(), counts)


def test_nothing_was_mined():
    mine(max_score=-2.0)
    with pytest.raises(ValueError, match=r"got at most 0. Nothing was mined: loosen the guards"):
        read(tiny_pairs())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("texts_of_images", lambda row: row["texts"][1].update(text_id=4), r"row 3 of .*got text 4, which matches"),
        ("images_of_texts", lambda row: row["images"][0].update(image_id=1), r"row 3 of .*got image 1, which matches"),
        ("images_of_texts", lambda row: row["images"][0].update(image_id=23), r"ids below 23 in .*, got 23"),
        ("texts_of_images", lambda row: row.update(image_id=5), r"row 3 of .* to have the id 2, got 5"),
        ("texts_of_images", lambda row: row.pop("texts"), r"line 3 of .* to be a row that `lightning-itm mine` wrote"),
    ],
)
def test_broken_files(name, change, message):
    mine()
    edit(name, 2, change)
    with pytest.raises(ValueError, match=message):
        read(tiny_pairs())


@pytest.mark.filterwarnings("ignore:.* pairs share their caption")
def test_equal_captions():
    """Mined as negatives like any other, and trained on by a set in which they are none."""
    texts = [[f"kind {i % 2}", f"picture {i}"] for i in range(NUM_IMAGES)]
    options = {name: getattr(tiny_pairs(), name) for name in ("transform", "eval_transform", "tokenizer")}

    def make(way):
        return ImageTextDataset(cut_outs(NUM_IMAGES), texts, **options, equal_captions=way)

    for way in ("keep", "exclude"):
        mine(f"mined/{way}", make(way), texts_per_image=44)
    read_negatives("mined/keep", make("keep"), 44, 8)
    with pytest.raises(ValueError, match=r"or has an equal caption \(`equal_captions`\)"):
        read_negatives("mined/keep", make("exclude"), 44, 8)
    read_negatives("mined/exclude", make("exclude"), 20, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inject": "embeddings"}, "'samples'` or `'batches'` with `table`, got 'embeddings'"),
        ({"encode": "training"}, "no `encode` with `table`, .*got 'training'"),
        ({"every_n_epochs": 2}, "no `every_n_epochs` with `table`, .* got 2"),
        ({"max_score": 0.9}, "no `max_score` with `table`, got 0.9"),
        ({"rank_min": 3}, "no `rank_min` with `table`, got 3"),
        ({"relative_margin": 0.05}, "no `relative_margin` with `table`, got 0.05"),
    ],
)
def test_options_of_mining(options, message):
    with pytest.raises(ValueError, match=message):
        OfflineHardNegativeMining(table="mined", **options)


def test_no_files():
    with pytest.raises(
        FileNotFoundError, match=r"the folder nowhere, found neither pair. Write them with `lightning-itm"
    ):
        run(table="nowhere")


def test_from_a_configuration():
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(OfflineHardNegativeMining, "miner")
    settings = {"class_path": "lightning_itm.OfflineHardNegativeMining", "init_args": {"table": "mined/"}}
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
    miner = instantiate(parser.parse_object({"miner": settings})).miner
    assert miner.folder == "mined/"
