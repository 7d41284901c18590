import csv

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_itm import (
    FalseNegativeElimination,
    FalseNegativeSampler,
    ImageTextDataset,
    InfoNCELoss,
    OfflineHardNegativeMining,
    QuintupletLoss,
    SigmoidLoss,
    TripletLoss,
)
from lightning_itm.memory_bank import agreement
from lightning_itm.memory_bank.agreement import MIN_STEPS
from tests.helpers.pictures import cut_outs
from tests.helpers.tiny import AUGMENTED, NUM_IMAGES, PLAIN, SILENT, Tiny, tiny_data, tokenize

NUM_PAIRS, BATCH_SIZE, QUEUE_SIZE, EPOCHS = 2 * NUM_IMAGES, 4, 16, 3
STEPS = -(-NUM_PAIRS // BATCH_SIZE)  # per epoch, the last batch of two pairs
LOSSES = {
    "hardest": TripletLoss,
    "selective": lambda: TripletLoss(negatives="selective"),
    "quintuplet": QuintupletLoss,
    "info_nce": InfoNCELoss,
    "sigmoid": SigmoidLoss,
}


class Watch(Callback):
    """Keep what reaches each step, and the weights around it. Stands after the callback it watches."""

    def __init__(self):
        self.memory, self.live, self.slow, self.queued, self.losses, self.is_in_loss = [], [], [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        memory = batch.get("memory")
        ids = None if memory is None else torch.where(memory.valid, memory.image_id, -1).tolist()
        self.memory.append((trainer.current_epoch, batch["image_id"].tolist(), ids))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        fne = next(callback for callback in trainer.callbacks if isinstance(callback, FalseNegativeElimination))
        self.live.append(pl_module.text_encoder.weight.detach().clone())
        self.slow.append(fne.encoder.module.text_encoder.weight.clone())
        self.queued.append([] if fne.bank is None else fne.bank.image_id[fne.bank.valid].tolist())
        self.losses.append(outputs["loss"].item())
        self.is_in_loss.append("memory" in batch and batch["memory"].is_in_loss)


def fit(fne=None, loss=None, callbacks=(), model=None, **options):
    """As published, unless asked: the bank is in the loss from epoch 1 on, and the queue starts there."""
    L.seed_everything(0, verbose=False)
    published = {
        "queue_size": QUEUE_SIZE,
        "start_epoch": 1,
        "fill_during_warmup": False,
        "sampler": FalseNegativeSampler(posterior="published", min_count=4),
    }
    watch, fne = Watch(), FalseNegativeElimination(**{**published, **(fne or {})})
    model = Tiny(loss) if model is None else model
    trainer = L.Trainer(callbacks=[fne, watch, *callbacks], **{**SILENT, "max_epochs": EPOCHS, **options})
    trainer.fit(model, datamodule=tiny_data())
    return model, watch, fne, trainer


class TestOneRun:
    def test_candidates_are_the_batch_and_then_the_queue(self):
        _, watch, _, _ = fit(loss=TripletLoss())
        queue = []
        for epoch, ids, candidates in watch.memory:
            assert (candidates is None) == (epoch == 0)
            if epoch > 0:
                assert candidates[: len(ids)] == ids
                assert sorted(candidates[len(ids) :]) == sorted([-1] * (QUEUE_SIZE - len(queue)) + queue)
                queue = (queue + ids)[-QUEUE_SIZE:]

    def test_the_queue_may_fill_before(self):
        _, watch, _, _ = fit({"fill_during_warmup": True}, TripletLoss())
        first = next(candidates for epoch, _, candidates in watch.memory if epoch == 1)
        assert all(image_id >= 0 for image_id in first)
        assert [watch.queued[step] for step in range(2)] == [
            watch.memory[0][1],
            watch.memory[0][1] + watch.memory[1][1],
        ]

    def test_from_the_first_epoch_on(self):
        _, watch, _, _ = fit({"start_epoch": 0}, TripletLoss())
        assert watch.memory[0][2] == watch.memory[0][1] + [-1] * QUEUE_SIZE

    def test_slow_weights_follow_each_step_also_before_the_start(self):
        model, watch, _, _ = fit({"momentum": 0.8}, TripletLoss())
        L.seed_everything(0, verbose=False)
        slow = Tiny(TripletLoss()).text_encoder.weight.detach()
        for live, got in zip(watch.live, watch.slow, strict=True):
            slow = 0.8 * slow + 0.2 * live
            torch.testing.assert_close(got, slow)
        assert not torch.equal(model.text_encoder.weight, slow)

    def test_once_an_optimizer_step_where_gradients_accumulate(self):
        """Windows of five batches, and one of the last two of each epoch."""
        _, watch, _, trainer = fit({"momentum": 0.8}, TripletLoss(), accumulate_grad_batches=5)
        assert trainer.global_step == 9
        changed = [
            number for number in range(1, EPOCHS * STEPS) if not torch.equal(watch.slow[number], watch.slow[number - 1])
        ]
        assert changed == [epoch * STEPS + last for epoch in range(EPOCHS) for last in (4, 9, 11)]

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("mining", [None, "samples", "embeddings"])
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_with_every_loss_and_mined_negatives(self, loss, mining, precision):
        miners = (
            [] if mining is None else [OfflineHardNegativeMining(texts_per_image=12, images_per_text=8, inject=mining)]
        )
        options = {"sampler": FalseNegativeSampler(min_count=4, weighting="drop")}
        model, _, fne, trainer = fit(options, LOSSES[loss](), miners, max_epochs=2, precision=precision)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert fne.bank.valid.all()
        assert fne.bank.image.dtype == torch.float32
        assert "train/mean_posterior" in trainer.callback_metrics

    def test_adds_nothing_to_the_module(self, tmp_path):
        keys = set(Tiny(TripletLoss()).state_dict())
        model, _, _, trainer = fit(loss=TripletLoss())
        assert set(model.state_dict()) == keys
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        assert set(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]) == keys
        Tiny.load_from_checkpoint(tmp_path / "a.ckpt", loss=TripletLoss(), weights_only=True)

    def test_leaves_the_run_before_its_start_as_it_was(self):
        """With dropout, batch statistics and noise from the random streams; the slow copy embeds every batch."""
        first = {}

        class Stop(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                first.update({name: value.clone() for name, value in pl_module.state_dict().items()})
                trainer.should_stop = True

        _, _, fne, _ = fit({"fill_during_warmup": True}, TripletLoss(), callbacks=[Stop()], max_epochs=2)
        L.seed_everything(0, verbose=False)
        plain = Tiny(TripletLoss())
        stop = L.Trainer(callbacks=[Stop()], max_epochs=2, **SILENT)
        with_fne = dict(first)
        stop.fit(plain, datamodule=tiny_data())
        assert fne.bank.valid.all()
        assert with_fne.keys() == first.keys()
        assert all(torch.equal(value, first[name]) for name, value in with_fne.items())

    def test_a_second_fit_starts_anew(self):
        model, _, fne, _ = fit(loss=TripletLoss())
        again = Watch()
        L.Trainer(callbacks=[fne, again], max_epochs=2, **SILENT).fit(model, datamodule=tiny_data())
        first = next(candidates for epoch, _, candidates in again.memory if epoch == 1)
        assert first[4:] == [-1] * QUEUE_SIZE

    def test_logs(self, tmp_path):
        _, _, _, trainer = fit(loss=TripletLoss(), logger=CSVLogger(tmp_path), log_every_n_steps=1)
        header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
        names = ("fill", "positive_mean", "positive_std", "negative_mean", "negative_std", "num_positives")
        assert {f"memory/{name}" for name in names} <= set(header)
        assert {f"train/{name}" for name in ("mean_posterior", "false_negative_rate", "fallback_fraction")} <= set(
            header
        )
        assert trainer.callback_metrics["memory/fill"] == 1

    def test_a_fast_dev_run_goes_through_it(self):
        _, watch, _, _ = fit(loss=TripletLoss(), fast_dev_run=5)
        assert all(candidates is not None for *_, candidates in watch.memory)

    def test_a_checkpoint_of_a_run_without_it(self, tmp_path):
        plain = L.Trainer(max_epochs=1, **SILENT)
        plain.fit(Tiny(TripletLoss()), datamodule=tiny_data())
        plain.save_checkpoint(tmp_path / "a.ckpt")
        watch = Watch()
        trainer = L.Trainer(callbacks=[FalseNegativeElimination(QUEUE_SIZE), watch], max_epochs=2, **SILENT)
        trainer.fit(Tiny(TripletLoss()), datamodule=tiny_data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
        assert watch.memory[0][2] == watch.memory[0][1] + [-1] * QUEUE_SIZE

    @pytest.mark.parametrize("stage", ["validate", "test"])
    def test_evaluation_of_a_checkpoint(self, stage, tmp_path):
        *_, fne, trainer = fit(loss=TripletLoss())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        before = fne.bank.image.clone()
        evaluate = getattr(L.Trainer(callbacks=[fne], **SILENT), stage)
        evaluate(
            Tiny(TripletLoss()), datamodule=tiny_data(), ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True
        )
        assert torch.equal(fne.bank.image, before)

    def test_a_module_may_ask_for_the_epoch(self):
        class Asks(Tiny):
            def encode_image(self, image):
                asked.append((self.training, self.trainer.current_epoch))
                return super().encode_image(image)

        asked = []
        fit(model=Asks(TripletLoss()), max_epochs=2, limit_val_batches=0)
        assert asked[-2:] == [(False, 1), (True, 1)]  # the slow copy, in eval mode, and the module

    def test_a_schedule_of_ones_own(self):
        class Later(FalseNegativeElimination):
            def is_active(self, epoch):
                return epoch == 2

        watch = Watch()
        trainer = L.Trainer(callbacks=[Later(QUEUE_SIZE), watch], max_epochs=4, **SILENT)
        trainer.fit(Tiny(TripletLoss()), datamodule=tiny_data())
        assert {epoch for epoch, _, candidates in watch.memory if candidates is not None} == {2}


ON_AGREEMENT = {"start_epoch": None, "fill_during_warmup": True, "momentum": 0.5}  # a slow copy that soon agrees


class Spoil(Callback):
    """At one step, give the slow copy weights that know nothing, and keep it there."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            fne = trainer.callbacks[0]
            fne.encoder.momentum = 1.0
            for parameter in fne.encoder.module.parameters():
                nn.init.zeros_(parameter)


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the resumed run saves none
class TestAgreement:
    """``start_epoch=None``: the bank enters the loss once its embeddings agree with those of the live model."""

    @pytest.fixture(autouse=True)
    def _join_at_chance(self, monkeypatch):
        """Among four pairs, this untrained model finds as many matches as chance, which is not enough elsewhere."""
        monkeypatch.setattr(agreement, "CHANCES", 0)

    @pytest.mark.parametrize("loss", LOSSES)
    def test_until_it_is_met_the_run_is_that_without_a_bank(self, loss):
        _, watch, fne, _ = fit(ON_AGREEMENT, LOSSES[loss]())
        joined = [bool(value) for value in watch.is_in_loss].index(True)
        assert joined == MIN_STEPS  # counted from zero: it is met by the first twenty steps, and in at the next
        L.seed_everything(0, verbose=False)
        plain = L.Trainer(callbacks=[kept := Losses()], max_epochs=EPOCHS, **SILENT)
        plain.fit(Tiny(LOSSES[loss]()), datamodule=tiny_data())
        assert watch.losses[:joined] == kept.losses[:joined]
        assert watch.losses[joined] > kept.losses[joined]  # a term more
        assert fne.agreement.num_steps == EPOCHS * STEPS

    def test_the_bank_fills_from_the_first_step(self):
        _, watch, _, _ = fit(ON_AGREEMENT, TripletLoss())
        queue = []
        for (_, ids, candidates), queued in zip(watch.memory, watch.queued, strict=True):
            assert sorted(candidates[len(ids) :]) == sorted([-1] * (QUEUE_SIZE - len(queue)) + queue)
            queue = (queue + ids)[-QUEUE_SIZE:]
            assert sorted(queued) == sorted(queue)

    def test_a_slow_copy_that_knows_nothing_never_takes_part(self):
        _, watch, fne, _ = fit(ON_AGREEMENT, TripletLoss(), callbacks=[Spoil(0)])
        assert not any(watch.is_in_loss)
        assert not fne.agreement.was_lost

    def test_what_a_step_observes_decides_about_the_next(self):
        """The flag in the batch is a copy: the loss computes both directions with the same one."""
        _, watch, fne, trainer = fit(ON_AGREEMENT, TripletLoss(), max_steps=MIN_STEPS)
        assert fne.agreement.is_met
        assert not watch.is_in_loss[-1]
        assert trainer.callback_metrics["memory/in_loss"] == 1  # the state after the step

    def test_with_a_start_epoch_it_is_followed_and_decides_nothing(self):
        _, watch, fne, trainer = fit({"momentum": 0.5}, TripletLoss())
        assert watch.is_in_loss == [False] * STEPS + [None] * (EPOCHS - 1) * STEPS
        assert fne.agreement.num_steps == (EPOCHS - 1) * STEPS
        assert trainer.callback_metrics["memory/in_loss"] == 1

    def test_logs(self, tmp_path):
        fit(ON_AGREEMENT, TripletLoss(), logger=CSVLogger(tmp_path), log_every_n_steps=1)
        with open(next(tmp_path.rglob("metrics.csv")), newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["memory/in_loss"]]
        assert [float(row["memory/in_loss"]) for row in rows] == [0] * (MIN_STEPS - 1) + [1] * (
            len(rows) - MIN_STEPS + 1
        )
        for name in ("memory/live_in_stored", "memory/stored_in_stored"):
            assert all(0.5 < float(row[name]) < 2.5 for row in rows), name
        assert all(0.5 < float(row["memory/cosine"]) < 1 for row in rows)
        assert all(float(row["train/memory_cost"]) > 0 for row in rows)

    def test_warns_once_where_it_was_lost(self):
        spoiled = MIN_STEPS + 2
        with pytest.warns(UserWarning, match="The memory bank has left the loss") as found:
            _, watch, fne, _ = fit(ON_AGREEMENT, TripletLoss(), callbacks=[Spoil(spoiled)], max_epochs=5)
        assert sum("has left the loss" in str(warning.message) for warning in found) == 1
        assert watch.is_in_loss[spoiled]
        assert not watch.is_in_loss[-1]
        assert fne.agreement.was_lost

    def test_is_quiet_where_it_was_not_lost(self, recwarn):
        fit(ON_AGREEMENT, TripletLoss())
        assert not [warning for warning in recwarn if "memory bank" in str(warning.message)]

    @pytest.mark.parametrize("step", [MIN_STEPS - 3, MIN_STEPS + 3])
    def test_a_resumed_run_keeps_it_bit_for_bit(self, step, tmp_path):
        """In the middle of an epoch, before the bank joins and after."""
        assert step % STEPS > 0
        model, watch, fne, _ = fit(ON_AGREEMENT, TripletLoss(), callbacks=[SaveAt(step, tmp_path / "a.ckpt")])
        found, again, resumed = resume(tmp_path / "a.ckpt")
        assert again.losses == watch.losses[step:]
        assert again.is_in_loss == watch.is_in_loss[step:]
        for one, other in ((fne.agreement, resumed.agreement), (fne.bank, resumed.bank), (model, found)):
            expected = other.state_dict()
            assert all(torch.equal(x, expected[name]) for name, x in one.state_dict().items() if torch.is_tensor(x))

    def test_an_older_checkpoint_follows_it_anew(self, tmp_path):
        step = MIN_STEPS + 3
        fit(ON_AGREEMENT, TripletLoss(), callbacks=[SaveAt(step, tmp_path / "a.ckpt")])
        checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
        assert checkpoint["false_negative_elimination"].pop("agreement")["is_met"]
        torch.save(checkpoint, tmp_path / "older.ckpt")
        _, watch, resumed = resume(tmp_path / "older.ckpt")
        assert not any(watch.is_in_loss)
        assert resumed.agreement.num_steps == EPOCHS * STEPS - step
        assert resumed.bank.valid.all()

    def test_a_second_fit_follows_it_anew(self):
        _, _, fne, _ = fit(ON_AGREEMENT, TripletLoss())
        assert fne.agreement.is_met
        L.Trainer(callbacks=[fne, watch := Watch()], max_epochs=1, **SILENT).fit(Tiny(TripletLoss()), tiny_data())
        assert not any(watch.is_in_loss)
        assert fne.agreement.num_steps == STEPS


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def resume(path):
    """Go on with a run of ``ON_AGREEMENT`` from a checkpoint, to its end."""
    sampler = FalseNegativeSampler(posterior="published", min_count=4)  # that of `fit`
    fne = FalseNegativeElimination(QUEUE_SIZE, **ON_AGREEMENT, sampler=sampler)
    model, watch = Tiny(TripletLoss()), Watch()
    trainer = L.Trainer(callbacks=[fne, watch], max_epochs=EPOCHS, **SILENT)
    trainer.fit(model, datamodule=tiny_data(), ckpt_path=path, weights_only=True)
    return model, watch, fne


@pytest.mark.gpu
@pytest.mark.parametrize("loss", LOSSES)
def test_no_step_waits_for_the_device(loss):
    class Forbid(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 2:
                torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 4:
                torch.cuda.set_sync_debug_mode("default")

    options = {**SILENT, "accelerator": "gpu", "devices": 1, "precision": "bf16-mixed", "max_epochs": 2}
    callbacks = [
        Forbid(),
        FalseNegativeElimination(QUEUE_SIZE, start_epoch=1, sampler=FalseNegativeSampler(min_count=4)),
    ]
    try:
        trainer = L.Trainer(callbacks=callbacks, limit_val_batches=0, **options)
        trainer.fit(Tiny(LOSSES[loss]()), datamodule=tiny_data())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("loss", LOSSES)
def test_the_host_waits_for_nothing_between_steps(loss):
    recorder = profile(activities=[ProfilerActivity.CPU])

    class Record(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 2:
                recorder.__enter__()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 4:
                recorder.__exit__(None, None, None)

    class Plain(Tiny):
        def configure_optimizers(self):  # AdamW reads its own count of steps, which is on the CPU
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callbacks = [
        Record(),
        FalseNegativeElimination(QUEUE_SIZE, start_epoch=1, sampler=FalseNegativeSampler(min_count=4)),
    ]
    if loss == "quintuplet":
        callbacks.append(OfflineHardNegativeMining(texts_per_image=12, images_per_text=8, inject="embeddings"))
    trainer = L.Trainer(callbacks=callbacks, max_epochs=2, limit_val_batches=0, **SILENT)
    trainer.fit(Plain(LOSSES[loss]()), datamodule=tiny_data(num_workers=1))
    keys = [event.key for event in recorder.key_averages()]
    assert ("aten::searchsorted" in keys) == (loss not in ("info_nce", "sigmoid"))
    assert [key for key in keys if key in {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}] == []


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the resumed run saves none
def test_beside_weight_averaging_and_checkpoints(tmp_path):
    """Neither corrupts the queue: the run is that without them, and a resumed one goes on with queue and slow copy."""
    alone, watch, fne, _ = fit(loss=TripletLoss())
    beside = [EMAWeightAveraging(decay=0.5), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)]
    _, watch_beside, fne_beside, _ = fit(loss=TripletLoss(), callbacks=beside, enable_checkpointing=True)
    assert watch_beside.memory == watch.memory
    assert all(torch.equal(a, b) for a, b in zip(watch_beside.live, watch.live, strict=True))
    assert torch.equal(fne_beside.bank.image, fne.bank.image)
    keys = set(torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"])
    assert keys == set(alone.state_dict())
    sampler = FalseNegativeSampler(posterior="published", min_count=4)
    resumed = FalseNegativeElimination(QUEUE_SIZE, start_epoch=1, fill_during_warmup=False, sampler=sampler)
    trainer = L.Trainer(callbacks=[resumed, EMAWeightAveraging(decay=0.5)], max_epochs=EPOCHS, **SILENT)
    trainer.fit(Tiny(TripletLoss()), datamodule=tiny_data(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert torch.equal(resumed.bank.image, fne.bank.image)
    slow, expected = (callback.encoder.module.state_dict() for callback in (resumed, fne))
    assert all(torch.equal(value, expected[name]) for name, value in slow.items())


class Keep(Callback):
    """Save what each rank holds at the end."""

    def on_train_end(self, trainer, pl_module):
        fne = trainer.callbacks[0]
        content = {"bank": fne.bank.state_dict(), "sampler": fne.sampler.state_dict(), "model": pl_module.state_dict()}
        torch.save(content, f"end-{trainer.world_size}-{trainer.global_rank}.pt")


class Still(Tiny):
    """Without dropout, batch statistics and noise, which are not those of one process."""

    def __init__(self, loss):
        super().__init__(loss, warmup_steps=0, learning_rate=0.05)
        self.image_encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, 16))

    def encode_image(self, image):
        return self.image_encoder(image)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler`")
@pytest.mark.parametrize("start_epoch", [0, None])
@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_draw_like_one(loss, start_epoch):
    """Queue, statistics, draws and so weights, after two epochs of the same global batches."""
    _check_two_processes(loss, start_epoch)


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler`", "ignore:46 of 46 pairs share their caption")
@pytest.mark.parametrize("loss", ["hardest", "info_nce"])
def test_two_processes_draw_like_one_with_equal_captions(loss):
    """The captions of the pairs of both ranks are in the queue, in the order of one process."""
    texts = [[f"kind {i % 5}", f"sort {i % 7}"] for i in range(NUM_IMAGES)]
    bank = _check_two_processes(loss, 0, texts=texts)
    assert (bank["caption_id"] >= 0).all()
    assert len(bank["caption_id"].unique()) > 5


@pytest.mark.slow
@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler`")
@pytest.mark.parametrize("inject", ["samples", "embeddings"])
@pytest.mark.parametrize("loss", ["hardest", "quintuplet", "info_nce"])
def test_two_processes_draw_like_one_beside_mined_negatives(loss, inject):
    """Each rank mines a part, and draws for its own pairs."""
    _check_two_processes(loss, 0, inject)


def _check_two_processes(loss, start_epoch, inject=None, texts=None):
    """Return the state of the bank of one process."""
    for devices in (1, 2):
        L.seed_everything(0, verbose=False)
        fne = FalseNegativeElimination(
            QUEUE_SIZE, start_epoch=start_epoch, sampler=FalseNegativeSampler(min_count=4, prior=0.05)
        )
        mining = (
            [] if inject is None else [OfflineHardNegativeMining(texts_per_image=12, images_per_text=8, inject=inject)]
        )
        trainer = L.Trainer(
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            callbacks=[fne, *mining, Keep()],
            max_epochs=2,
            precision="64-true",
            limit_val_batches=0,
            **SILENT,
        )
        data = tiny_data(batch_size=4 // devices, drop_last=True)
        if texts is not None:
            options = {"transform": AUGMENTED, "eval_transform": PLAIN, "tokenizer": tokenize}
            data.train_dataset = ImageTextDataset(cut_outs(NUM_IMAGES), texts, **options)
        trainer.fit(Still(LOSSES[loss]()), datamodule=data)
    one, *two = (torch.load(f"end-{world}-{rank}.pt") for world, rank in ((1, 0), (2, 0), (2, 1)))
    for rank in two:
        for part in ("bank", "sampler", "model"):
            for name, value in one[part].items():
                if isinstance(value, dict):
                    assert rank[part][name] == value
                else:
                    torch.testing.assert_close(rank[part][name], value, atol=1e-9, rtol=0)
    assert all(torch.equal(value, two[1]["bank"][name]) for name, value in two[0]["bank"].items() if name[0] != "_")
    return one["bank"]


class TestBadInput:
    def test_a_queue_smaller_than_a_batch(self):
        with pytest.raises(
            ValueError, match=r"a queue of at least one batch of all processes, 4 pairs, got a size of 3"
        ):
            fit({"queue_size": 3, "start_epoch": 0}, TripletLoss())

    def test_embeddings_that_are_not_finite_keep_the_queue(self):
        kept = {}

        class Breaks(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if trainer.current_epoch == 1 and batch_idx == 10:
                    nn.init.constant_(trainer.callbacks[0].encoder.module.text_encoder.weight, torch.nan)

            def on_exception(self, trainer, pl_module, exception):
                bank = trainer.callbacks[0].bank
                kept.update(valid=int(bank.valid.sum()), is_finite=bool(bank.text.isfinite().all()))

        with pytest.raises(ValueError, match=r"Expected finite embeddings, got 2 pairs .* epoch 1, step 24"):
            fit(loss=TripletLoss(), callbacks=[Breaks()], limit_val_batches=0)
        assert kept == {"valid": 14, "is_finite": True}

    def test_a_step_that_does_not_use_it(self):
        class Forgets(Tiny):
            def training_step(self, batch, batch_idx):
                return self.loss(self.embed(batch))["loss"]

        with pytest.warns(UserWarning, match=r"nothing asked its sampler in `Forgets.training_step`. Pass `memory="):
            fit(model=Forgets(TripletLoss()), max_epochs=2)

    def test_wrong_batches_are_found_at_the_first(self):
        """And not after the epochs before the start."""

        class Seen(Callback):
            steps = 0

            def on_train_batch_end(self, *_):
                Seen.steps += 1

        with pytest.raises(ValueError, match="a queue of at least one batch"):
            fit({"queue_size": 3}, TripletLoss(), callbacks=[Seen()])
        assert Seen.steps == 0

    def test_plot_before_a_fit(self):
        with pytest.raises(RuntimeError, match="Expected a queue to draw"):
            FalseNegativeElimination().plot()
