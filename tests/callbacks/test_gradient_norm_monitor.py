import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_itm import (
    FalseNegativeElimination,
    FalseNegativeSampler,
    GradientNormMonitor,
    InfoNCELoss,
    OfflineHardNegativeMining,
    QuintupletLoss,
    SigmoidLoss,
    TripletLoss,
)
from lightning_itm.gradient_monitor.figure import spans
from tests.helpers.latent import make_run, measure
from tests.helpers.tiny import SILENT, Tiny, tiny_data

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Grads(Callback):
    """Measure gradients the plain way, parameter by parameter, on the host."""

    def __init__(self):
        self.norms, self.switch = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.switch.append(batch["selective"].tolist())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for tower in (pl_module.image_encoder, pl_module.text_encoder):
            grads = [parameter.grad for parameter in tower.parameters() if parameter.grad is not None]
            self.norms.append(sum(float(grad.square().sum()) for grad in grads) ** 0.5)


def fit(loss=None, callbacks=(), monitor=None, model=None, data=None, **options):
    L.seed_everything(0, verbose=False)
    monitor, grads = GradientNormMonitor(**(monitor or {})), Grads()
    model = Tiny(TripletLoss() if loss is None else loss) if model is None else model
    trainer = L.Trainer(callbacks=[monitor, grads, *callbacks], **{**SILENT, "max_epochs": 2, **options})
    trainer.fit(model, datamodule=tiny_data() if data is None else data)
    return model, monitor, grads, trainer


@pytest.mark.parametrize("seed", range(5))
def test_hardest_negatives_escape_the_collapse(seed):
    """As in tests/losses/test_escape.py, where the hardest alone ends above 0.195; the monitor does the switching."""
    model, loader, held_out = make_run(seed, "hardest")
    monitor = GradientNormMonitor()
    L.Trainer(callbacks=[monitor], max_epochs=1, gradient_clip_val=2.0, **SILENT).fit(model, loader)
    hardest, spread = measure(model, held_out)
    assert hardest < 0.13
    assert spread > 0.5
    selective = monitor.curves()["selective"]
    assert 1 in selective
    assert selective[-1] == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_converges_is_left_alone(seed):
    results = []
    for callbacks in ([], [GradientNormMonitor()]):
        model, loader, held_out = make_run(seed, "hardest", 300, is_cold=False)
        L.Trainer(callbacks=callbacks, max_epochs=1, gradient_clip_val=2.0, **SILENT).fit(model, loader)
        results.append(measure(model, held_out))
    curves = callbacks[0].curves()
    assert curves["loss"][-1] < 0.02
    assert curves["selective"] == [0] * 300
    assert results[0] == results[1]


class TestNorms:
    def test_equal_those_taken_one_by_one(self):
        _, monitor, grads, _ = fit()
        curves = monitor.curves()
        assert len(curves["step"]) == 24
        got = [norm for pair in zip(curves["image_norm"], curves["text_norm"], strict=True) for norm in pair]
        assert got == pytest.approx(grads.norms, rel=1e-5)
        assert min(got) > 0

    def test_with_accumulation_once_a_step_and_of_the_mean(self):
        """Windows of five batches and a last one of two, which Lightning divides by five, too."""
        _, monitor, grads, _ = fit(accumulate_grad_batches=5)
        curves = monitor.curves()
        assert curves["step"] == [1, 2, 3, 4, 5, 6]
        expected = [norm * (2.5 if step % 3 == 2 else 1) for step, norm in enumerate(grads.norms[::2])]
        assert curves["image_norm"] == pytest.approx(expected, rel=1e-5)
        assert min(curves["loss"]) > 0.1

    def test_a_tower_that_is_frozen_in_mid_run(self):
        class Freeze(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                pl_module.image_encoder.requires_grad_(trainer.current_epoch != 1)
                pl_module.zero_grad()

        _, monitor, *_ = fit(callbacks=[Freeze()], max_epochs=3)
        curves = monitor.curves()
        assert curves["image_norm"][12:24] == [0] * 12
        assert min(curves["image_norm"][24:]) > 0
        assert min(curves["level"]) > 0.01
        assert max(curves["level"]) < float("inf")

    def test_before_clipping(self):
        _, monitor, *_ = fit(gradient_clip_val=1e-3)
        assert min(monitor.curves()["image_norm"]) > 1e-2

    def test_frozen_towers(self):
        model = Tiny(TripletLoss())
        model.image_encoder.requires_grad_(False)
        _, monitor, *_ = fit(model=model)
        curves = monitor.curves()
        assert curves["image_norm"] == [0] * 24
        assert min(curves["text_norm"]) > 0
        assert max(curves["level"]) < float("inf")

    @pytest.mark.parametrize("fused", [False, True])
    def test_under_fp16_with_a_scaler(self, fused):
        """An actual GradScaler; a fused optimizer unscales for itself, after the hook. All hinges are active."""

        class Half(Tiny):
            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=fused)

        curves = []
        for plugins in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]):
            L.seed_everything(0, verbose=False)
            _, monitor, *_ = fit(model=Half(TripletLoss(0.9)), plugins=plugins, data=tiny_data(drop_last=True))
            curves.append(monitor.curves())
        assert curves[1]["image_norm"] == pytest.approx(curves[0]["image_norm"], rel=0.02)
        assert curves[1]["text_norm"] == pytest.approx(curves[0]["text_norm"], rel=0.02)

    @pytest.mark.gpu
    @pytest.mark.parametrize("fused", [False, True])
    def test_under_fp16_on_cuda(self, fused):
        """Without dropout: CUDA drops other units in half precision than in float32. With a scale that overflows nowhere."""

        class Half(Tiny):
            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=fused)

        curves = []
        for plugins in ([], [MixedPrecision("16-mixed", "cuda", torch.amp.GradScaler("cuda", init_scale=1024.0))]):
            L.seed_everything(0, verbose=False)
            model = Half(TripletLoss(0.9))
            model.image_encoder[3].p = 0.0
            _, monitor, *_ = fit(
                model=model, plugins=plugins, accelerator="gpu", devices=1, data=tiny_data(drop_last=True)
            )
            curves.append(monitor.curves())
        assert curves[1]["image_norm"] == pytest.approx(curves[0]["image_norm"], rel=0.02)
        assert curves[1]["text_norm"] == pytest.approx(curves[0]["text_norm"], rel=0.02)

    def test_a_step_that_overflows_is_skipped_and_counted(self):
        class Overflows(Tiny):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 3 else 1)

        scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        model, monitor, *_ = fit(model=Overflows(TripletLoss()), plugins=[scaler], limit_val_batches=0)
        assert monitor.switch.num_skipped == 2
        assert monitor.switch.relative().isfinite().all()
        assert all(parameter.isfinite().all() for parameter in model.parameters())


class TestOneRun:
    def test_the_switch_travels_in_the_batch(self):
        _, monitor, grads, trainer = fit(monitor={"low": 0.98, "high": 0.99, "min_steps": 2, "smoothing": 0.0})
        assert [all(batch) for batch in grads.switch] == [bool(value) for value in monitor.curves()["selective"]]
        assert any(any(batch) for batch in grads.switch)
        assert "train/averaged_fraction" in trainer.callback_metrics

    @pytest.mark.parametrize("mining", [None, "samples", "embeddings"])
    @pytest.mark.parametrize("has_memory", [False, True])
    @pytest.mark.parametrize(
        "loss",
        [TripletLoss, lambda: TripletLoss(negatives="selective"), QuintupletLoss],
        ids=["hardest", "selective", "aoq"],
    )
    def test_beside_the_other_callbacks(self, loss, has_memory, mining):
        callbacks = [
            FalseNegativeElimination(16, start_epoch=0, sampler=FalseNegativeSampler(min_count=4))
        ] * has_memory
        if mining:
            callbacks.append(OfflineHardNegativeMining(texts_per_image=12, images_per_text=8, inject=mining))
        model, monitor, _, trainer = fit(loss(), callbacks)
        assert len(monitor.curves()["step"]) == 24
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert "train/averaged_fraction" in trainer.callback_metrics

    def test_adds_nothing_to_the_module(self):
        assert set(fit()[0].state_dict()) == set(Tiny(TripletLoss()).state_dict())

    def test_logs(self, tmp_path):
        _, _, _, trainer = fit(logger=CSVLogger(tmp_path), log_every_n_steps=1)
        header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
        names = ("image_norm", "text_norm", "image_relative", "text_relative", "level", "selective", "num_skipped")
        assert {f"gradient/{name}" for name in names} <= set(header)
        assert trainer.callback_metrics["gradient/num_skipped"] == 0

    def test_plot_shades_where_it_was_on(self):
        _, monitor, *_ = fit(monitor={"low": 0.98, "high": 0.99, "min_steps": 2, "smoothing": 0.0})
        curves = monitor.curves()
        figure = monitor.plot()
        assert len(figure.axes[0].patches) == len(spans(curves["step"], curves["selective"])) > 0
        assert len(figure.axes[1].lines) == 2

    def test_a_long_run_keeps_few_tensors(self):
        _, monitor, *_ = fit(max_epochs=25, limit_val_batches=0)
        assert len(monitor._history) < 257
        assert monitor.curves()["step"] == list(range(1, 301))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("stop", [{"every_n_train_steps": 5}, {"every_n_epochs": 1}])
def test_resumes_with_switch_averages_and_curves(stop, tmp_path):
    options = {"low": 0.9, "high": 0.95, "min_steps": 2, "smoothing": 0.5}
    checkpoint = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **stop)
    model, monitor, *_ = fit(callbacks=[checkpoint], monitor=options, enable_checkpointing=True)
    assert set(monitor.curves()["selective"]) == {0, 1}
    path = sorted(tmp_path.iterdir(), key=lambda path: int(path.stem.split("=")[1]))[-2]
    resumed, again = Tiny(TripletLoss()), GradientNormMonitor(**options)
    callbacks = [again, ModelCheckpoint(tmp_path, "again-{step}", **stop)]
    trainer = L.Trainer(callbacks=callbacks, max_epochs=2, **{**SILENT, "enable_checkpointing": True})
    trainer.fit(resumed, datamodule=tiny_data(), ckpt_path=path, weights_only=True)
    assert again.curves() == monitor.curves()
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in model.state_dict().items())


class Keep(Callback):
    def on_train_end(self, trainer, pl_module):
        curves = trainer.callbacks[0].curves()
        torch.save((curves, pl_module.state_dict()), f"end-{trainer.world_size}-{trainer.global_rank}.pt")


class Still(Tiny):
    """Without dropout, batch statistics and noise, which are not those of one process."""

    def __init__(self):
        super().__init__(TripletLoss(0.3), warmup_steps=0)
        self.image_encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, 16))

    def encode_image(self, image):
        return self.image_encoder(image)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler`")
def test_two_processes_switch_like_one():
    for devices in (1, 2):
        L.seed_everything(0, verbose=False)
        trainer = L.Trainer(
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            callbacks=[GradientNormMonitor(0.9, 0.95, min_steps=2, smoothing=0.5), Keep()],
            max_epochs=2,
            precision="64-true",
            limit_val_batches=0,
            **SILENT,
        )
        trainer.fit(Still(), datamodule=tiny_data(batch_size=4 // devices, drop_last=True))
    (one, weights), *two = (torch.load(f"end-{world}-{rank}.pt") for world, rank in ((1, 0), (2, 0), (2, 1)))
    assert set(one["selective"]) == {0, 1}
    for curves, other in two:
        assert curves["selective"] == one["selective"]
        for name, values in one.items():
            assert curves[name] == pytest.approx(values, rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(other[name], value, atol=1e-9, rtol=0)


def test_the_host_waits_for_nothing_between_steps():
    recorder = profile(activities=[ProfilerActivity.CPU])

    class Record(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2:
                recorder.__enter__()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                recorder.__exit__(None, None, None)

    class Plain(Tiny):
        def configure_optimizers(self):  # AdamW reads its own count of steps, which is on the CPU
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = L.Trainer(callbacks=[Record(), GradientNormMonitor()], max_epochs=1, limit_val_batches=0, **SILENT)
    trainer.fit(Plain(TripletLoss()), datamodule=tiny_data(num_workers=1))
    keys = [event.key for event in recorder.key_averages()]
    assert "aten::linalg_vector_norm" in keys or "aten::_foreach_norm" in keys
    assert [key for key in keys if key in {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}] == []


class TestBadInput:
    @pytest.mark.parametrize("loss", [InfoNCELoss, SigmoidLoss, lambda: TripletLoss(negatives="mean")])
    def test_a_loss_without_a_switch(self, loss):
        with pytest.raises(
            Exception, match=r"a loss with a selective rule to switch, got .*Use `TripletLoss\(negatives='hardest'\)`"
        ):
            fit(loss())

    def test_everything_is_frozen(self):
        class Frozen(Tiny):
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters())

        with pytest.raises(
            ValueError, match=r"trained in one of the towers \['image', 'text'\], got none: all are frozen"
        ):
            fit(model=Frozen(TripletLoss()).requires_grad_(False))

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match=r"got low=0\.9 and high=0\.5"):
            GradientNormMonitor(0.9, 0.5)

    def test_a_module_that_is_no_dual_encoder(self):
        trainer = L.Trainer(**SILENT)
        with pytest.raises(Exception, match="Expected a `DualEncoder`, got LightningModule"):
            GradientNormMonitor().setup(trainer, L.LightningModule(), "fit")

    def test_manual_optimization(self):
        class Manual(Tiny):
            automatic_optimization = False

        with pytest.raises(
            Exception, match="Expected automatic optimization, got a Manual that steps its optimizers itself"
        ):
            fit(model=Manual(TripletLoss()))

    def test_sharded_weights(self):
        trainer = L.Trainer(**SILENT)
        trainer._accelerator_connector.strategy = FSDPStrategy()  # by itself it starts on CUDA alone
        with pytest.raises(Exception, match="whose ranks hold all weights, or FSDP2, got FSDPStrategy"):
            GradientNormMonitor().setup(trainer, Tiny(TripletLoss()), "fit")

    def test_a_checkpoint_with_other_towers(self, tmp_path):
        class One(Tiny):
            def towers(self):
                return {"model": self}

        fit()[3].save_checkpoint(tmp_path / "a.ckpt")
        trainer = L.Trainer(callbacks=[GradientNormMonitor()], max_epochs=3, **SILENT)
        with pytest.raises(ValueError, match=r"to have the towers \['model'\], got \['image', 'text'\]"):
            trainer.fit(One(TripletLoss()), datamodule=tiny_data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)

    def test_a_checkpoint_of_a_newer_version(self, tmp_path):
        fit(max_epochs=1)[3].save_checkpoint(tmp_path / "a.ckpt")
        checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
        checkpoint["callbacks"]["GradientNormMonitor"]["version"] = 99
        torch.save(checkpoint, tmp_path / "a.ckpt")
        trainer = L.Trainer(callbacks=[GradientNormMonitor()], max_epochs=2, **SILENT)
        with pytest.raises(ValueError, match="to be of version 2 or older, got 99"):
            trainer.fit(Tiny(TripletLoss()), datamodule=tiny_data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)

    def test_plot_before_a_fit(self):
        with pytest.raises(RuntimeError, match="Expected steps to draw"):
            GradientNormMonitor().plot()
