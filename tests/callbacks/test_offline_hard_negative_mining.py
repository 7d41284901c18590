import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_itm import (
    HardNegativeDataset,
    ImageTextDataModule,
    ImageTextDataset,
    InfoNCELoss,
    OfflineHardNegativeMining,
    QuintupletLoss,
    SigmoidLoss,
    TripletLoss,
)
from lightning_itm.data import collate_pairs
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.tiny import AUGMENTED, NUM_IMAGES, PLAIN, SILENT, Linear, Tiny, tiny_data, tiny_pairs, tokenize

EPOCHS = 3
NUM_TEXTS, STEPS_PER_EPOCH = 2 * NUM_IMAGES, 12
TABLE = {"texts_per_image": 12, "images_per_text": 8}
BATCHES = {"inject": "batches", "group_size": 2, "relative_margin": None}


class Watch(Callback):
    """Keep each epoch's table, the embeddings it was mined from, and what reaches the steps."""

    def __init__(self):
        self.tables, self.embeddings, self.steps = {}, {}, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        miner = next(callback for callback in trainer.callbacks if isinstance(callback, OfflineHardNegativeMining))
        epoch = trainer.current_epoch
        if epoch not in self.tables:
            self.tables[epoch] = miner.table.texts.clone(), miner.table.images.clone()
            if batch_idx == 0:
                self.embeddings[epoch] = embed_all(pl_module, miner.pairs)
        ids = [batch["image_id"], batch["text_id"]]
        if isinstance(batch.get("hard"), dict):
            ids += [batch["hard"]["image_id_of_text"], batch["hard"]["image_id"]]
        self.steps.append((epoch, *(part.tolist() for part in ids)))


@torch.no_grad()
def embed_all(model, pairs):
    flags = model.training
    model.eval()
    loader = DataLoader(pairs.evaluation(), len(pairs), collate_fn=collate_pairs)
    pairs = model.embed(next(iter(loader)))
    model.train(flags)
    return pairs


def fit(mining=None, loader=None, loss=None, callbacks=(), **options):
    L.seed_everything(0, verbose=False)
    watch, miner = Watch(), OfflineHardNegativeMining(**{**TABLE, **(mining or {})})
    model = Tiny(QuintupletLoss() if loss is None else loss)
    trainer = L.Trainer(callbacks=[miner, watch, *callbacks], **{**SILENT, "max_epochs": EPOCHS, **options})
    trainer.fit(model, datamodule=tiny_data(**(loader or {})))
    return model, watch, miner, trainer


def test_each_epochs_table_is_of_the_model_as_it_stands():
    _, watch, miner, _ = fit()
    owner = miner.pairs.text_image_id
    for epoch in range(EPOCHS):
        pairs, (texts, images) = watch.embeddings[epoch], watch.tables[epoch]
        first_text = torch.arange(0, NUM_TEXTS, 2)
        scores = pairs.image_embeddings[first_text] @ pairs.text_embeddings.T
        scores[owner[None, :] == torch.arange(NUM_IMAGES)[:, None]] = -2
        expected = scores.topk(TABLE["texts_per_image"])
        torch.testing.assert_close(scores.gather(1, texts.long()), expected.values, atol=1e-6, rtol=0)
        assert (owner[texts.long()] != torch.arange(NUM_IMAGES)[:, None]).all()
        assert (images >= 0).all()
        assert (images != owner[:, None]).all()
    assert not torch.equal(watch.tables[0][0], watch.tables[2][0])


def test_what_reaches_a_step_is_of_its_epochs_table():
    _, watch, miner, _ = fit()
    owner = miner.pairs.text_image_id
    for epoch, image_id, text_id, image_id_of_text, mined_image_id in watch.steps:
        texts, images = watch.tables[epoch]
        for row in range(len(image_id)):
            assert image_id_of_text[row] in owner[texts[image_id[row]].long()].tolist()
            assert mined_image_id[row] in images[text_id[row]].tolist()


def test_workers_use_the_same_table_at_the_same_step():
    loaders = [{"num_workers": 0}, {"num_workers": 2, "persistent_workers": False}, {"num_workers": 2}]
    results = [fit(loader=loader) for loader in loaders]
    assert results[0][1].steps == results[1][1].steps == results[2][1].steps
    assert len(results[0][1].steps) == STEPS_PER_EPOCH * EPOCHS
    weights = [result[0].state_dict() for result in results]
    assert all(torch.equal(value, other[name]) for other in weights[1:] for name, value in weights[0].items())


@pytest.mark.parametrize(
    ("mining", "mined"),
    [
        ({"every_n_epochs": None}, [0]),
        ({"every_n_epochs": 2}, [0, 2]),
        ({"start_epoch": 1}, [1, 2]),
        ({"start_epoch": 1, "every_n_epochs": None}, [1]),
        ({"inject": "embeddings", "start_epoch": 1}, [1, 2]),
    ],
)
def test_schedule(mining, mined):
    _, watch, miner, _ = fit(mining)
    tables = [torch.full_like(watch.tables[0][0], -1), *(watch.tables[epoch][0] for epoch in range(EPOCHS))]
    new = [epoch for epoch in range(EPOCHS) if not torch.equal(tables[epoch], tables[epoch + 1])]
    assert new == mined
    for epoch, *_, image_id_of_text, mined_image_id in [] if miner.inject == "embeddings" else watch.steps:
        assert all((value >= 0) == (epoch >= mined[0]) for value in (*image_id_of_text, *mined_image_id))


@pytest.mark.parametrize(
    ("loss", "inject"),
    [
        (loss, inject)
        for loss in (QuintupletLoss, TripletLoss, InfoNCELoss, SigmoidLoss)
        for inject in ("samples", "embeddings", "batches")
        if (loss, inject) != (SigmoidLoss, "batches")
    ],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_loss_in_every_mode(loss, inject, precision):
    model, *_ = fit({"inject": inject}, loss=loss(), max_epochs=2, precision=precision)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_embeddings_are_those_of_the_table_and_the_pair():
    drawn = []

    class Check(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            hard, embeddings, epoch = batch["hard"], miner.mined_embeddings, trainer.current_epoch
            texts, images = miner.table.texts[batch["image_id"]], miner.table.images[batch["text_id"]]
            drawn.append((epoch, batch["text_id"].tolist(), hard.image_id.tolist()))
            of_texts = miner.pairs.text_image_id[texts.long()]
            assert (of_texts == hard.image_id_of_text[:, None]).any(dim=1).all()
            assert (images == hard.image_id[:, None]).any(dim=1).all()
            assert torch.equal(hard.image_embeddings, embeddings.image_embeddings[hard.image_id])
            assert torch.equal(hard.image_of_text_embeddings, embeddings.image_embeddings[hard.image_id_of_text])
            assert not hard.text_embeddings.requires_grad

    miner = OfflineHardNegativeMining(**TABLE, inject="embeddings")
    L.Trainer(callbacks=[miner, Check()], max_epochs=2, **SILENT).fit(Tiny(QuintupletLoss()), datamodule=tiny_data())
    first, second = (
        {t: i for e, ts, ids in drawn if e == epoch for t, i in zip(ts, ids, strict=True)} for epoch in (0, 1)
    )
    assert first != second, "another draw in each epoch"


def test_mining_leaves_the_run_as_it_was():
    """Flags, random streams, batch statistics: a run whose loss ignores the negatives is the run without mining."""

    class Deaf(TripletLoss):
        def forward(self, pairs, candidates=None, *, hard=None, selective=None):
            return super().forward(pairs, candidates)

    class Half(Tiny):
        def __init__(self, loss):
            super().__init__(loss)
            self.text_encoder.eval()

    ends = []
    for miners in ([], [OfflineHardNegativeMining(inject="embeddings")]):
        L.seed_everything(0, verbose=False)
        model = Half(Deaf())
        flags = [part.training for part in model.modules()]
        trainer = L.Trainer(callbacks=miners, max_epochs=2, limit_val_batches=0, **SILENT)
        with pytest.warns(UserWarning, match=r"eval mode"):
            trainer.fit(model, datamodule=tiny_data())
        assert [part.training for part in model.modules()] == flags
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_logs(tmp_path):
    _, _, _, trainer = fit({"relative_margin": 0.2}, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    logged = trainer.callback_metrics
    assert {"mining/encode_seconds", "mining/search_seconds", "mining/gap"} <= logged.keys()
    assert 0 < logged["mining/rejected_share"] < 1
    assert 0 < logged["mining/changed_share"] <= 1


def test_a_loader_of_the_users_own():
    pairs = HardNegativeDataset(tiny_pairs())
    miner, watch = OfflineHardNegativeMining(pairs, texts_per_image=5, images_per_text=4), Watch()
    trainer = L.Trainer(callbacks=[miner, watch], max_epochs=1, limit_val_batches=0, **SILENT)
    with pytest.warns(UserWarning, match="no `val_dataloader`"):
        trainer.fit(Tiny(QuintupletLoss()), DataLoader(pairs, 4, shuffle=True, collate_fn=collate_pairs))
    assert all(value >= 0 for step in watch.steps for value in step[3])


def test_a_datamodule_serves_one_mode_after_the_other():
    data = tiny_data()
    for inject in ("samples", "samples", "embeddings", "samples"):
        miner, watch = OfflineHardNegativeMining(texts_per_image=5, images_per_text=4, inject=inject), Watch()
        trainer = L.Trainer(callbacks=[miner, watch], max_epochs=1, **SILENT)
        trainer.fit(Tiny(QuintupletLoss()), datamodule=data)
        assert len(watch.steps[0]) == (5 if inject == "samples" else 3), "the batch has mined samples, or has not"


def test_guards_leave_places_empty_and_training_goes_on():
    _, watch, _, _ = fit({"max_score": -2.0}, max_epochs=1)
    assert (watch.tables[0][0] == -1).all()
    assert all(value == -1 for step in watch.steps for value in (*step[3], *step[4]))


def test_more_places_than_negatives():
    _, watch, _, _ = fit({"texts_per_image": 300, "images_per_text": 60}, max_epochs=1)
    texts, images = watch.tables[0]
    assert ((texts >= 0).sum(dim=1) == NUM_TEXTS - 2).all()
    assert ((images >= 0).sum(dim=1) == NUM_IMAGES - 1).all()


def test_a_broken_image_is_never_mined():
    images = cut_outs(NUM_IMAGES)
    images[0] = images[5] = b"no image"
    transforms = {"transform": AUGMENTED, "eval_transform": PLAIN, "tokenizer": tokenize}
    pairs = ImageTextDataset(images, captions(NUM_IMAGES), **transforms, max_unreadable=0.1)
    miner = OfflineHardNegativeMining(texts_per_image=NUM_TEXTS - 2, images_per_text=NUM_IMAGES - 1)
    data = ImageTextDataModule(pairs, batch_size=4, num_workers=0)
    data.val_dataloader = lambda: DataLoader(tiny_pairs().evaluation(), NUM_IMAGES, collate_fn=collate_pairs)
    with pytest.warns(UserWarning, match=r"Image [05]: bytes does not open"):
        L.Trainer(callbacks=[miner], max_epochs=1, **SILENT).fit(Tiny(QuintupletLoss()), datamodule=data)
    assert not ((miner.table.images == 5) | (miner.table.images == 0)).any()
    assert not torch.isin(miner.table.texts, torch.tensor([0, 1, 10, 11])).any(), "nor is a text without its image"
    assert (miner.table.images >= 0).any()


def test_a_fit_without_the_callback_has_no_mined_negatives():
    data, watch = tiny_data(), Watch()
    L.Trainer(callbacks=[OfflineHardNegativeMining()], max_epochs=1, **SILENT).fit(Tiny(), datamodule=data)
    assert isinstance(data.train_dataset, ImageTextDataset)

    class Check(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            watch.steps.append("hard" in batch)

    L.Trainer(callbacks=[Check()], max_epochs=1, **SILENT).fit(Tiny(), datamodule=data)
    assert watch.steps == [False] * STEPS_PER_EPOCH


def test_mining_goes_on_where_min_epochs_outlasts_a_stop():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    _, watch, _, _ = fit(callbacks=[Stop()], min_epochs=3, max_epochs=4)
    assert not torch.equal(watch.tables[1][0], watch.tables[2][0])


def test_samples_that_go_on_as_embeddings(tmp_path):
    *_, trainer = fit({"every_n_epochs": None}, max_epochs=4, limit_train_batches=3, callbacks=[])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    miner = OfflineHardNegativeMining(**TABLE, every_n_epochs=None, inject="embeddings")
    again = L.Trainer(callbacks=[miner], max_epochs=5, limit_train_batches=3, **SILENT)
    again.fit(Tiny(QuintupletLoss()), datamodule=tiny_data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert miner.mined_embeddings is not None


def test_plot_shows_what_was_mined():
    _, _, miner, _ = fit(max_epochs=1)
    assert len(miner.plot(5, num_negatives=3).axes) == 5 * 5
    with pytest.raises(RuntimeError, match="Nothing was mined yet"):
        OfflineHardNegativeMining().plot()


class TestHardBatches:
    @pytest.mark.parametrize("encode", ["pass", "training"])
    def test_pairs_that_are_hard_for_each_other_share_a_batch(self, encode):
        _, watch, miner, _ = fit({**BATCHES, "encode": encode})
        owner, first_mined = miner.pairs.text_image_id, {"pass": 0, "training": 1}[encode]
        for epoch in range(EPOCHS):
            texts, images = watch.tables[epoch]
            steps = [step for step in watch.steps if step[0] == epoch]
            assert sorted(pair for step in steps for pair in step[2]) == list(range(NUM_TEXTS)), "each pair once"
            hard = 0
            for _, _, pairs in steps:
                for one, other in zip(pairs[::2], pairs[1::2], strict=True):
                    hard += other in texts[owner[one]].tolist() or owner[other] in images[one].tolist()
            if epoch < first_mined:
                assert (texts == -1).all()
            else:
                assert hard / (NUM_TEXTS / 2) > 0.7, "the last pairs of an epoch find no unused neighbours"

    def test_workers_see_the_order_of_each_epoch(self):
        loaders = [{"num_workers": 0}, {"num_workers": 2, "persistent_workers": False}, {"num_workers": 2}]
        results = [fit(BATCHES, loader=loader)[1].steps for loader in loaders]
        assert results[0] == results[1] == results[2]

    def test_epochs_before_the_first_table_are_those_of_a_run_without(self):
        _, watch, *_ = fit({**BATCHES, "start_epoch": 1})
        plain = Watch()
        miner = OfflineHardNegativeMining(**TABLE, start_epoch=99)
        L.seed_everything(0, verbose=False)
        L.Trainer(callbacks=[miner, plain], max_epochs=2, **SILENT).fit(Tiny(QuintupletLoss()), datamodule=tiny_data())
        orders = [[step[1:3] for step in run.steps if step[0] == 0] for run in (watch, plain)]
        assert orders[0] == orders[1]
        orders = [[step[1:3] for step in run.steps if step[0] == 1] for run in (watch, plain)]
        assert orders[0] != orders[1]

    def test_an_epoch_between_two_minings_has_an_order_of_its_own(self):
        _, watch, *_ = fit({**BATCHES, "every_n_epochs": None})
        assert torch.equal(watch.tables[0][0], watch.tables[2][0])
        orders = [[step[2] for step in watch.steps if step[0] == epoch] for epoch in range(EPOCHS)]
        assert orders[0] != orders[1]

    def test_logs(self, tmp_path):
        *_, trainer = fit(BATCHES, logger=CSVLogger(tmp_path), log_every_n_steps=1)
        assert trainer.callback_metrics["mining/grouped_share"] > 0.7
        assert trainer.callback_metrics["mining/compose_seconds"] > 0

    def test_where_a_guard_leaves_nothing_the_order_is_random_with_a_warning(self):
        with pytest.warns(UserWarning, match=r"Nothing was mined for epoch 0: all negatives are above a guard"):
            _, watch, *_ = fit({**BATCHES, "max_score": -2.0}, max_epochs=1)
        assert sorted(pair for step in watch.steps for pair in step[2]) == list(range(NUM_TEXTS))

    def test_a_guard_is_on_by_default(self):
        assert OfflineHardNegativeMining(inject="batches")._options["relative_margin"] == 0.05
        assert OfflineHardNegativeMining()._options["relative_margin"] is None

    def test_after_a_fit_that_failed_the_datamodule_draws_its_order(self):
        class Fails(Callback):
            def on_train_batch_end(self, *_):
                raise RuntimeError("on purpose")

        data = tiny_data()
        trainer = L.Trainer(callbacks=[OfflineHardNegativeMining(**BATCHES), Fails()], max_epochs=1, **SILENT)
        with pytest.raises(RuntimeError, match="on purpose"):
            trainer.fit(Tiny(), datamodule=data)
        assert data.train_order is None
        L.Trainer(max_epochs=1, **SILENT).fit(Tiny(), datamodule=data)

    def test_a_loss_that_needs_random_batches(self):
        with pytest.raises(Exception, match=r"got SigmoidLoss, which learns how rare a match is in a random batch"):
            fit(BATCHES, loss=SigmoidLoss())

    @pytest.mark.parametrize("now", ["batches", "samples"])
    def test_the_rest_of_an_epoch_has_no_other_order(self, now, tmp_path):
        """Pairs would be left out, and others would come twice."""
        then = "samples" if now == "batches" else "batches"
        *_, trainer = fit({**BATCHES, "inject": then}, max_steps=5)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        miner = OfflineHardNegativeMining(**TABLE, **{**BATCHES, "inject": now})
        again = L.Trainer(callbacks=[miner], max_epochs=2, **SILENT)
        with pytest.raises(Exception, match=r"as when the run stopped after batch 5 of epoch 0.*come twice"):
            again.fit(Tiny(QuintupletLoss()), datamodule=tiny_data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


class TestNothingIsMined:
    def test_without_training(self):
        _, _, miner, _ = fit(limit_train_batches=0)
        assert (miner.table.texts == -1).all()

    def test_in_validation_and_test(self):
        miner = OfflineHardNegativeMining()
        trainer = L.Trainer(callbacks=[miner], **SILENT)
        trainer.validate(Tiny(), datamodule=tiny_data(), verbose=False)
        assert miner.table is None


class TestBadInput:
    def test_pairs_that_no_loader_reads(self):
        miner = OfflineHardNegativeMining(tiny_pairs())
        with pytest.raises(Exception, match="No negative would reach a batch"):
            L.Trainer(callbacks=[miner], max_epochs=1, **SILENT).fit(Tiny(), datamodule=tiny_data())

    def test_embeddings_that_are_not_finite_keep_the_old_table(self):
        class Breaks(Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                if trainer.current_epoch == 1 and trainer.is_last_batch:
                    nn.init.constant_(pl_module.image_encoder[1].weight, torch.nan)

        kept = {}

        class Keep(Callback):
            def on_exception(self, trainer, pl_module, exception):
                miner = trainer.callbacks[0]
                kept["table"], kept["is_pending"] = miner.table.texts.clone(), miner.table.is_pending

        with pytest.raises(ValueError, match=r"finite image embeddings when mining on rank 0, epoch 2, got NaN"):
            fit(callbacks=[Breaks(), Keep()], limit_val_batches=0)
        assert (kept["table"] >= 0).all()
        assert not kept["is_pending"]

    def test_a_checkpoint_of_another_set(self, tmp_path):
        *_, trainer = fit(max_epochs=1)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        pairs = tiny_pairs(NUM_IMAGES + 1)
        again = L.Trainer(callbacks=[OfflineHardNegativeMining(**TABLE)], max_epochs=2, **SILENT)
        data = ImageTextDataModule(pairs, batch_size=4, num_workers=0)
        with pytest.raises(ValueError, match=r"negatives to be of this training set, got those of another"):
            again.fit(Tiny(QuintupletLoss()), datamodule=data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"texts_per_image": 0}, "`texts_per_image` to be at least 1, got 0"),
            ({"every_n_epochs": 0}, "`every_n_epochs` to be at least 1, got 0"),
            ({"start_epoch": -1}, "`start_epoch` to be at least 0, got -1"),
            ({"inject": "images"}, "`inject` to be one of 'samples', 'embeddings', 'batches', got 'images'"),
            ({"encode": "once"}, "`encode` to be one of 'pass', 'training', got 'once'"),
            (
                {"inject": "embeddings", "encode": "training"},
                "`encode='pass'` with `inject='embeddings'`, got 'training'",
            ),
            ({"group_size": 0}, "`group_size` to be at least 1, got 0"),
        ],
    )
    def test_wrong_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            OfflineHardNegativeMining(**arguments)


class SaveTables(Callback):
    def on_train_start(self, trainer, pl_module):
        miner = trainer.callbacks[0]
        torch.save(
            (miner.table.texts.clone(), miner.table.images.clone()),
            f"table-{trainer.world_size}-{trainer.global_rank}.pt",
        )


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler`", "ignore:46 of 46 pairs share their caption")
@pytest.mark.parametrize("has_equal_captions", [False, True])
def test_two_processes_mine_the_table_of_one(has_equal_captions):
    texts = [[f"kind {i % 3}", f"sort {i % 5}"] for i in range(NUM_IMAGES)]
    for devices in (1, 2):
        L.seed_everything(0, verbose=False)
        miner = OfflineHardNegativeMining(**TABLE, batch_size=7)
        trainer = L.Trainer(
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            callbacks=[miner, SaveTables()],
            max_epochs=1,
            **SILENT,
        )
        data = tiny_data()
        if has_equal_captions:
            options = {"transform": AUGMENTED, "eval_transform": PLAIN, "tokenizer": tokenize}
            data.train_dataset = ImageTextDataset(cut_outs(NUM_IMAGES), texts, **options)
        trainer.fit(Tiny(QuintupletLoss(), warmup_steps=0), datamodule=data)
    expected = torch.load("table-1-0.pt")
    for rank in range(2):
        assert all(torch.equal(a, b) for a, b in zip(torch.load(f"table-2-{rank}.pt"), expected, strict=True))


class SaveOrders(Callback):
    def __init__(self):
        self.orders = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.orders.append(trainer.datamodule.train_order.pairs.clone())

    def on_train_end(self, trainer, pl_module):
        weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
        torch.save((self.orders, weights), f"orders-{trainer.world_size}-{trainer.global_rank}.pt")


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler`")
@pytest.mark.parametrize("encode", ["pass", "training"])
def test_two_processes_compose_the_epochs_of_one(encode):
    for devices in (1, 2):
        L.seed_everything(0, verbose=False)
        miner = OfflineHardNegativeMining(**TABLE, **BATCHES, encode=encode, batch_size=7)
        trainer = L.Trainer(
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            callbacks=[miner, SaveOrders()],
            max_epochs=2,
            precision="64-true",  # a bit in the last place would change which pair is the hardest
            **SILENT,
        )
        trainer.fit(Linear(), datamodule=tiny_data(batch_size=4 // devices))
    orders, weights = torch.load("orders-1-0.pt")
    assert not torch.equal(*orders)
    for rank in range(2):
        own_orders, own_weights = torch.load(f"orders-2-{rank}.pt")
        assert all(torch.equal(one, other) for one, other in zip(own_orders, orders, strict=True))
        for name, value in weights.items():
            torch.testing.assert_close(own_weights[name], value, atol=1e-6, rtol=1e-5)
