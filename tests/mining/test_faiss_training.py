"""`search="faiss"` in a whole run: all ways of injection, two processes, a resumed run, and the files."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_itm import InfoNCELoss, OfflineHardNegativeMining, QuintupletLoss, mine
from lightning_itm.cli import Trainer
from lightning_itm.mining import encode_pairs, find_negatives
from tests.helpers.fit import fit
from tests.helpers.mined import SaveMined
from tests.helpers.tiny import NUM_IMAGES, SILENT, Linear, Tiny, tiny_data, tiny_pairs

pytest.importorskip("faiss")

NUM_TEXTS = 2 * NUM_IMAGES
TABLE = {"texts_per_image": 12, "images_per_text": 8}
BATCHES = {"inject": "batches", "group_size": 2, "relative_margin": None}
# As few lists as this set has keys for. Half of them are looked into.
INDEX = {"search": "faiss", "faiss_index": "IVF2,Flat nprobe=1"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The index found"),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler`"),
]


@pytest.mark.parametrize("way", [{"inject": "samples"}, {"inject": "embeddings"}, BATCHES], ids=str)
@pytest.mark.parametrize("index", [INDEX, {"search": "faiss"}], ids=["lists", "default"])
def test_a_fit(way, index):
    """The default index of a set as small as this compares all keys."""
    loss = InfoNCELoss() if way is BATCHES else QuintupletLoss()
    run = fit(Tiny(loss), tiny_data(), OfflineHardNegativeMining(**TABLE, **way, **index), seed=0)
    assert run.callback(OfflineHardNegativeMining).table.has_any
    recall = run.metrics["mining/recall"]
    assert recall == 1 if index is not INDEX else 0 < recall < 1
    assert {"mining/gap", "mining/rejected_share", "mining/changed_share"} <= run.metrics.keys()


def test_embeddings_of_the_training_steps():
    mining = OfflineHardNegativeMining(**TABLE, **BATCHES, **INDEX, encode="training")
    assert fit(Tiny(InfoNCELoss()), tiny_data(), mining).metrics["mining/recall"] > 0


def test_a_trial_run_needs_no_lists():
    mining = OfflineHardNegativeMining(**TABLE, search="faiss", faiss_index="IVF4096,Flat")
    assert fit(Tiny(warmup_steps=0), tiny_data(), mining, fast_dev_run=True).metrics["mining/recall"] == 1


def test_the_command_and_the_function_give_the_table_of_the_search():
    model = Tiny()
    mined = mine(model, tiny_pairs(), output="ours", batch_size=4, **TABLE, **INDEX)
    encoded = encode_pairs(L.Trainer(**SILENT), model, tiny_pairs(), NUM_TEXTS, batch_size=4, num_workers=0)
    expected = find_negatives(encoded, **TABLE, **INDEX)
    assert torch.equal(mined.texts, expected.texts.int())
    assert torch.equal(mined.images, expected.images.int())
    assert mined.recall == expected.recall < 1
    Trainer(**SILENT).mine(model, tiny_data(), output="theirs", **TABLE, **INDEX)  # by NegativeWriter
    for name in ("texts_of_images", "images_of_texts"):
        assert Path("ours", f"{name}.jsonl").read_bytes() == Path("theirs", f"{name}.jsonl").read_bytes()


def train(model, name, devices=1, **options):
    torch.set_num_threads(1)  # a fork after threads of FAISS
    resume_from = options.get("resume_from")
    strategy = {"devices": devices, "strategy": "ddp_fork" if devices > 1 else "auto", "limit_val_batches": 0}
    saving = ModelCheckpoint(".", "{step}", save_top_k=-1, every_n_train_steps=3)
    options = {
        "enable_checkpointing": True,
        "max_epochs": 3,
        "seed": int(resume_from is not None),
        **strategy,
        **options,
    }
    mining = OfflineHardNegativeMining(**TABLE, **BATCHES, **INDEX, batch_size=7)
    fit(model, tiny_data(batch_size=4 // devices), mining, SaveMined(name), saving, **options)
    return [torch.load(f"{name}-{rank}.pt") for rank in range(devices)]


def are_equal(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.forks
def test_two_processes_mine_the_tables_of_one():
    (expected,) = train(Linear, "one", precision="64-true")
    for got in train(Linear, "two", devices=2, precision="64-true"):
        assert all(are_equal(*tables) for tables in zip(expected["tables"], got["tables"], strict=True))


@pytest.mark.parametrize("at_step", [6, 9], ids=["end of an epoch", "in the middle"])
def test_a_resumed_run_goes_on_bit_for_bit(at_step):
    """With dropout, noise and batch statistics."""
    (whole,) = train(lambda: Tiny(InfoNCELoss()), "whole")
    (resumed,) = train(lambda: Tiny(InfoNCELoss()), "resumed", resume_from=f"step={at_step}.ckpt")
    assert are_equal(whole["weights"].values(), resumed["weights"].values())
    assert are_equal(whole["tables"][-1], resumed["tables"][-1])
