"""`split_embeddings=True` of the callback and of `mine`: encoding, training on two processes, and what it refuses."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_itm import ImageTextDataset, InfoNCELoss, OfflineHardNegativeMining, ShardDataset, mine
from lightning_itm.mining import NegativeTable, encode_pairs, find_negatives
from lightning_itm.mining.encode import encode_split_pairs
from lightning_itm.mining.encoded import Division, OwnRows
from lightning_itm.mining.mine import FAST_DEV_RUN_PAIRS, mine_into
from tests.helpers.fit import fit
from tests.helpers.mined import SaveMined
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.shards import TRANSFORMS, img2dataset_sample, write_tar
from tests.helpers.tiny import AUGMENTED, NUM_IMAGES, PLAIN, SILENT, Linear, Tiny, tiny_data, tiny_pairs, tokenize

NUM_TEXTS = 2 * NUM_IMAGES
TABLE = {"texts_per_image": 12, "images_per_text": 8}
BATCHES = {"inject": "batches", "group_size": 2, "relative_margin": None}
LOADING = {"batch_size": 7, "num_workers": 0}


def rounded(encoded):
    """What EncodedPairs would hold if it were split."""
    encoded.image_embeddings = encoded.image_embeddings.half().float()
    encoded.text_embeddings = encoded.text_embeddings.half().float()
    return encoded


class TestEncoding:
    def test_is_that_of_the_whole_set_in_half_precision(self):
        images, texts = cut_outs(4), captions(4)
        images[1], texts[3] = b"no image", ["", "a square"]
        pairs = ImageTextDataset(images, texts, transform=AUGMENTED, eval_transform=PLAIN, tokenizer=tokenize)
        arguments = L.Trainer(**SILENT), Tiny(), pairs, 8
        split, expected = encode_split_pairs(*arguments, **LOADING), encode_pairs(*arguments, **LOADING)
        assert torch.equal(split.images.own, expected.image_embeddings.half())
        assert torch.equal(split.texts.own, expected.text_embeddings.half())
        assert torch.equal(split.image_is_valid, expected.image_is_valid)
        assert torch.equal(split.text_is_valid, expected.text_is_valid)

    def test_embeddings_that_are_not_finite_keep_the_table(self):
        table, model = NegativeTable(NUM_IMAGES, NUM_TEXTS, **TABLE), Tiny()
        table.texts.fill_(7)
        nn.init.constant_(model.text_encoder.weight, torch.nan)
        with pytest.raises(ValueError, match=r"finite text embeddings when mining on rank 0, epoch 0, got NaN"):
            mine_into(table, tiny_pairs(), L.Trainer(**SILENT), model, split_embeddings=True, **LOADING)
        assert (table.texts == 7).all()

    def test_a_fast_dev_run_mines_the_first_pairs(self):
        num_images = FAST_DEV_RUN_PAIRS // 2 + 10
        table = NegativeTable(num_images, 2 * num_images, **TABLE)
        arguments = tiny_pairs(num_images), L.Trainer(**SILENT, fast_dev_run=True), Tiny()
        mine_into(table, *arguments, split_embeddings=True, batch_size=64, num_workers=0)
        assert (table.texts[: FAST_DEV_RUN_PAIRS // 2] >= 0).all()
        assert (table.texts[FAST_DEV_RUN_PAIRS // 2 :] == -1).all()
        assert (table.images[FAST_DEV_RUN_PAIRS:] == -1).all()


def test_mine_gives_the_table_of_the_rounded_embeddings():
    model, guards = Tiny(), {"rank_min": 1, "max_score": 0.9}
    mined = mine(model, tiny_pairs(), split_embeddings=True, **TABLE, **guards)
    encoded = rounded(encode_pairs(L.Trainer(**SILENT), model, tiny_pairs(), NUM_TEXTS, batch_size=256, num_workers=0))
    expected = find_negatives(encoded, **TABLE, **guards)
    assert torch.equal(mined.texts, expected.texts.int())
    assert torch.equal(mined.images, expected.images.int())
    assert torch.equal(mined.text_scores, expected.text_scores)
    assert (mined.gap, mined.rejected_fraction) == (expected.gap, expected.rejected_fraction)


def test_the_callback_logs_what_the_whole_search_does():
    names = "gap", "rejected_share", "changed_share"
    runs = [
        fit(
            Tiny(InfoNCELoss()), tiny_data(), OfflineHardNegativeMining(split_embeddings=split, **BATCHES), max_epochs=1
        )
        for split in (True, False)
        for _ in [L.seed_everything(0, verbose=False)]
    ]
    logged, expected = ([run.metrics[f"mining/{name}"] for name in names] for run in runs)
    assert logged == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inject": "embeddings"}, "with `inject='embeddings'`, got True.* Use `inject='batches'` or `'samples'`"),
        ({"encode": "training"}, "with `encode='training'`, got True.* Use `encode='pass'`"),
        ({"table": "mined"}, "Expected no `split_embeddings` with `table`"),
    ],
)
def test_what_needs_all_embeddings_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        OfflineHardNegativeMining(split_embeddings=True, **arguments)


def test_remote_shards_are_refused(tmp_path):
    write_tar(tmp_path / "0.tar", [member for number in range(4) for member in img2dataset_sample(number)])
    shards = ShardDataset([f"pipe:cat {tmp_path}/0.tar"], index=tmp_path / "index", **TRANSFORMS)
    with pytest.raises(ValueError, match=r"Expected local shards with `split_embeddings=True`.*Copy the shards"):
        mine(Tiny(), shards, split_embeddings=True, **TABLE)


class Noisy(Tiny):
    """With batch statistics, which are each rank's own until the next step, and with dropout."""

    def __init__(self):
        super().__init__(InfoNCELoss())
        self.image_encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.BatchNorm1d(16), nn.Dropout(0.3))


def train(model, name, devices, ckpt_path=None, batch_size=4, split=True, **options):
    L.seed_everything(0 if ckpt_path is None else 1, verbose=False)
    miner = OfflineHardNegativeMining(**TABLE, **BATCHES, split_embeddings=split, batch_size=7)
    saving = ModelCheckpoint(".", "{step}", save_top_k=-1, every_n_train_steps=3)
    strategy = {"devices": devices, "strategy": "ddp_fork" if devices > 1 else "auto", "limit_val_batches": 0}
    options = {**SILENT, "enable_checkpointing": True, "max_epochs": 3, **strategy, **options}
    data = tiny_data(batch_size=batch_size)
    L.Trainer(callbacks=[miner, SaveMined(name), saving], **options).fit(
        model, datamodule=data, ckpt_path=ckpt_path, weights_only=True
    )
    return [torch.load(f"{name}-{rank}.pt") for rank in range(devices)]


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler`")
def test_two_processes_mine_the_tables_of_one():
    (expected,) = train(Linear(), "one", 1, precision="64-true")
    for got in train(Linear(), "two", 2, batch_size=2, precision="64-true"):
        for tables, own in zip(expected["tables"], got["tables"], strict=True):
            assert all(torch.equal(one, other) for one, other in zip(tables, own, strict=True))


@pytest.mark.forks
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler`")
@pytest.mark.parametrize("at_step", [6, 9], ids=["end of an epoch", "in the middle"])
@pytest.mark.parametrize("split", [True, False])
def test_two_processes_go_on_where_they_stopped(at_step, split):
    """Dropout, noise and batch statistics of both ranks: all weights bit for bit."""
    whole = train(Noisy(), "whole", 2, split=split)
    resumed = train(Noisy(), "resumed", 2, ckpt_path=f"step={at_step}.ckpt", split=split)
    for one, other in zip(whole, resumed, strict=True):
        assert one["weights"].keys() == other["weights"].keys()
        assert all(torch.equal(one["weights"][name], value) for name, value in other["weights"].items())
        assert all(torch.equal(a, b) for a, b in zip(one["tables"][-1], other["tables"][-1], strict=True))


def _encode_in_process(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Noisy()
    statistics = model.image_encoder[2]
    statistics.running_mean.fill_(rank)
    statistics.num_batches_tracked.fill_(5 + rank)
    mined = mine(model, tiny_pairs(), **TABLE, batch_size=7)
    assert (statistics.running_mean == rank).all()
    assert statistics.num_batches_tracked == 5 + rank
    torch.save((mined.texts, mined.text_scores), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.forks
def test_all_ranks_encode_with_the_statistics_of_the_first(tmp_path):
    run_in_processes(_encode_in_process, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.manual_seed(0)
    alone = Noisy()
    alone.image_encoder[2].running_mean.fill_(0)
    expected = mine(alone, tiny_pairs(), **TABLE, batch_size=7)
    for texts, scores in (first, second):
        assert torch.equal(texts, expected.texts)
        torch.testing.assert_close(scores, expected.text_scores)


def _rows_in_process(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    few, many = (OwnRows("text", Division(num, rank, 2), torch.device("cpu")) for num in (5, 40))
    own = Division(5, rank, 2).own
    if own.stop > own.start:  # one rank has all of a set that is so small
        ids = torch.arange(5)
        few.add({"text": torch.ones(5, 3), "text_id": ids, "text_is_valid": ids != 2})
    rows, is_valid = few.in_order(way_out="None.")
    assert rows.own.shape == (own.stop - own.start, 3)
    assert torch.equal(rows.of_all_ranks(torch.tensor([1, 4])), torch.ones(2, 3).half())
    assert is_valid.tolist() == [True, True, False, True, True]
    ids = torch.arange(40)[Division(40, rank, 2).own]
    values = torch.ones(len(ids), 3).masked_fill(ids[:, None] == 39, torch.inf)  # on one rank only
    many.add({"text": values, "text_id": ids, "text_is_valid": ids >= 0})
    with pytest.raises(ValueError, match=r"Expected finite text embeddings, got NaN or infinity\. Train less\."):
        many.in_order(way_out="Train less.")
    torch.distributed.destroy_process_group()


def run_in_processes(function, folder):
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=function, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.forks
def test_ranks_without_rows_and_an_error_of_one_rank(tmp_path):
    run_in_processes(_rows_in_process, tmp_path)
