import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lightning_itm import DualEncoder, ImageTextDataModule, InfoNCELoss, SigmoidLoss, TripletLoss
from lightning_itm.data import collate_pairs
from tests.helpers.tiny import NUM_IMAGES, SILENT, Tiny, tiny_data, tiny_pairs

KEYS = {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)} | {"rsum"}
RANKS = {f"{way}_{kind}_rank" for way in ("i2t", "t2i") for kind in ("median", "mean")}
NUM_PAIRS = 2 * NUM_IMAGES  # each picture has two captions
NUM_STEPS = -(-NUM_PAIRS // 4)  # per epoch, in batches of four


def tiny_batch(num_pairs=6):
    pairs = tiny_pairs()
    return collate_pairs([pairs[i] for i in range(num_pairs)])


def trainer(**options):
    return L.Trainer(**{**SILENT, "max_epochs": 2, **options})


def test_trains_beside_checkpoints_early_stopping_and_ema(tmp_path):
    """Ten lines of a user's, and what users attach to a Trainer."""

    class Mine(DualEncoder):
        def __init__(self, **kwargs):
            super().__init__(TripletLoss(negatives="selective"), **kwargs)
            self.image_encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, 16))
            self.text_encoder = nn.EmbeddingBag(256, 16)

        def encode_image(self, image):
            return self.image_encoder(image)

        def encode_text(self, text):
            return self.text_encoder(text)

    model, data = Mine(learning_rate=1e-2), tiny_data()
    callbacks = [
        ModelCheckpoint(tmp_path / "checkpoints", monitor="val/rsum", mode="max"),
        EarlyStopping("val/rsum", mode="max"),
        EMAWeightAveraging(decay=0.9),
        LearningRateMonitor(),
    ]
    fitter = trainer(
        callbacks=callbacks, enable_checkpointing=True, logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=2
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitter.fit(model, datamodule=data)
    assert fitter.current_epoch == 2
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {f"val/{key}" for key in KEYS | RANKS} <= fitter.callback_metrics.keys()
    assert {"train/loss", "train/averaged_fraction", "train/active_fraction"} <= fitter.callback_metrics.keys()
    best = Mine.load_from_checkpoint(callbacks[0].best_model_path, weights_only=True)
    assert best.learning_rate == 1e-2
    metrics = trainer().test(best, datamodule=data, verbose=False)[0]
    assert metrics["test/rsum"] == pytest.approx(callbacks[0].best_model_score.item())


@pytest.mark.parametrize(
    "make_loss",
    [
        TripletLoss,
        lambda: TripletLoss(negatives="selective"),
        lambda: TripletLoss(negatives="mean"),
        InfoNCELoss,
        SigmoidLoss,
    ],
)
def test_training_lowers_every_loss(make_loss):
    torch.manual_seed(0)
    model, batch = Tiny(make_loss()).eval(), tiny_batch(12)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = model.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_training_step_needs_no_trainer_and_passes_the_switch_on():
    batch = tiny_batch()
    model = Tiny(TripletLoss(negatives="hardest")).eval()
    plain = model.training_step(batch, 0)
    switched = model.training_step({**batch, "selective": torch.ones(6, dtype=torch.bool)}, 0)
    pairs = model.embed(batch)
    assert plain == TripletLoss(negatives="hardest")(pairs)["loss"]
    assert switched == TripletLoss(negatives="selective")(pairs)["loss"]


def test_no_decay_on_norms_biases_and_scales():
    model = Tiny(warmup_steps=0)
    fitter = trainer(max_epochs=1, limit_train_batches=1)
    fitter.fit(model, datamodule=tiny_data())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay, plain = ({names[id(p)] for p in group["params"]} for group in fitter.optimizers[0].param_groups)
    assert decay == {"image_encoder.1.weight", "text_encoder.weight"}
    assert plain == {"image_encoder.1.bias", "image_encoder.2.weight", "image_encoder.2.bias", "loss.logit_scale"}
    assert [group["weight_decay"] for group in fitter.optimizers[0].param_groups] == [0.1, 0.0]


def test_learning_rate_rises_and_falls_to_nothing():
    rates = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer(callbacks=[Watch()]).fit(Tiny(learning_rate=1.0, warmup_steps=4), datamodule=tiny_data())
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert len(rates) == 2 * NUM_STEPS


def test_precision_of_the_embeddings_and_the_loss():
    """The towers run in bfloat16; what the loss sees, and the loss, are float32."""
    seen = {}

    class Watched(Tiny):
        def encode_text(self, text):
            return super().encode_text(text)

        def encode_image(self, image):
            features = super().encode_image(image)
            seen["tower"] = self.image_encoder[1](image.flatten(1)).dtype
            return features

        def embed(self, batch):
            seen["pairs"] = super().embed(batch)
            return seen["pairs"]

        def training_step(self, batch, batch_idx):
            seen["loss"] = super().training_step(batch, batch_idx)
            return seen["loss"]

    model = Watched(TripletLoss(), warmup_steps=0)
    trainer(precision="bf16-mixed", max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(
        model, datamodule=tiny_data()
    )
    assert seen["tower"] == torch.bfloat16
    assert (
        seen["pairs"].image_embeddings.dtype
        == seen["pairs"].text_embeddings.dtype
        == seen["loss"].dtype
        == torch.float32
    )
    torch.testing.assert_close(seen["pairs"].image_embeddings.norm(dim=1), torch.ones(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(seen["loss"], model.loss(seen["pairs"])["loss"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("make_loss", [lambda: TripletLoss(negatives="selective"), InfoNCELoss, SigmoidLoss])
def test_the_host_waits_for_nothing_between_steps(make_loss):
    """Lightning's own reads are at logging steps only; ours would show here at every step."""
    recorder = profile(activities=[ProfilerActivity.CPU])

    class Record(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2:
                recorder.__enter__()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                recorder.__exit__(None, None, None)

    class Plain(Tiny):
        def configure_optimizers(self):  # AdamW reads its own count of steps, which is on the CPU
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Plain(make_loss())
    trainer(callbacks=[Record()], max_epochs=1, limit_val_batches=0).fit(
        model,
        datamodule=tiny_data(num_workers=1),  # which reads the epoch's number, in a process of its own
    )
    assert "aten::mm" in {event.key for event in recorder.key_averages()}
    reads = [
        event.key
        for event in recorder.key_averages()
        if event.key in {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
    ]
    assert reads == []


def test_predict_returns_embeddings():
    loader = DataLoader(tiny_pairs().evaluation(), 20, collate_fn=collate_pairs)
    batches = trainer().predict(Tiny(), loader)
    assert [len(pairs) for pairs in batches] == [20, 20, 6]


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_trains_without_validation_data():
    data = ImageTextDataModule(tiny_pairs(), batch_size=8, num_workers=0)
    fitter = trainer(max_epochs=1)
    fitter.fit(Tiny(), datamodule=data)
    assert fitter.global_step == NUM_PAIRS // 8


def test_state_dict_has_weights_and_nothing_else():
    model = Tiny()
    trainer().validate(model, datamodule=tiny_data(), verbose=False)
    assert {name.split(".")[0] for name in model.state_dict()} == {"image_encoder", "text_encoder", "loss"}


class TestBadInput:
    @pytest.mark.parametrize("key", ["image", "text", "image_id", "text_id"])
    def test_missing_key(self, key):
        batch = {name: value for name, value in tiny_batch().items() if name != key}
        with pytest.raises(ValueError, match=rf"\['{key}'\] missing, got \["):
            Tiny().training_step(batch, 0)

    def test_a_batch_that_is_no_dict(self):
        with pytest.raises(TypeError, match=r"to be a dict with the keys .* got list"):
            Tiny().training_step([torch.ones(2), torch.ones(2)], 0)

    def test_towers_of_two_widths(self):
        model = Tiny()
        model.text_encoder = nn.EmbeddingBag(256, 8)
        with pytest.raises(ValueError, match=r"got 16 \(image\) and 8 \(text\). Project both"):
            model.training_step(tiny_batch(), 0)

    def test_a_tower_that_returns_a_sequence(self):
        model = Tiny()
        model.text_encoder = nn.Embedding(256, 16)
        with pytest.raises(
            ValueError, match=r"`encode_text` to return one vector per pair, .* the shape \(6, \d+, 16\)"
        ):
            model.training_step(tiny_batch(), 0)

    @pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "warmup_steps"])
    def test_negative_settings(self, name):
        with pytest.raises(ValueError, match=f"Expected `{name}` not to be negative, got -1"):
            Tiny(**{name: -1})

    def test_a_loss_that_is_no_module(self):
        with pytest.raises(TypeError, match=r"`loss` to be a torch.nn.Module, got function"):
            Tiny(lambda pairs: 0)

    def test_string_ids(self):
        batch = {**tiny_batch(2), "image_id": ["COCO_1.jpg", "COCO_2.jpg"]}
        with pytest.raises(
            TypeError, match=r"`image_id` to be an int64 tensor of shape \(pairs,\), got list. Number them"
        ):
            Tiny().training_step(batch, 0)

    def test_a_loss_that_returns_a_tensor(self):
        class Plain(nn.Module):
            def forward(self, pairs, candidates):
                return (1 - pairs.image_embeddings @ candidates.text_embeddings.T).mean()

        with pytest.raises(TypeError, match="the loss to return a dict with 'loss', got Tensor"):
            Tiny(Plain()).training_step(tiny_batch(), 0)

    def test_everything_is_frozen(self):
        with pytest.raises(ValueError, match="a parameter that is trained, got none"):
            trainer().fit(Tiny(TripletLoss()).requires_grad_(False), datamodule=tiny_data())

    def test_a_run_shorter_than_its_warm_up(self):
        with pytest.warns(
            UserWarning, match=f"{NUM_STEPS} optimizer steps and `warmup_steps={NUM_STEPS}`: the learning rate never"
        ):
            trainer(max_epochs=1).fit(Tiny(warmup_steps=NUM_STEPS), datamodule=tiny_data())

    def test_weights_of_another_loss(self, tmp_path):
        class Own(TripletLoss):  # a loss of ours is made again
            pass

        fitter = trainer(max_epochs=1)
        fitter.fit(Tiny(Own()), datamodule=tiny_data())
        fitter.save_checkpoint(tmp_path / "a.ckpt")
        with pytest.raises(RuntimeError, match=r"of InfoNCELoss, \['loss.logit_scale'\], got \[\]: .*path, loss=..."):
            Tiny.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
        Tiny.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, loss=Own())

    def test_encoders_that_are_not_there(self):
        with pytest.raises(NotImplementedError, match="Override `encode_image` in DualEncoder"):
            DualEncoder().training_step(tiny_batch(), 0)

    def test_batch_size(self):
        with pytest.raises(ValueError, match="`batch_size` to be a positive integer, got 0"):
            ImageTextDataModule(tiny_pairs(), batch_size=0)

    def test_a_set_smaller_than_a_batch(self):
        data = ImageTextDataModule(tiny_pairs(), batch_size=64, num_workers=0)
        with pytest.raises(
            Exception, match=rf"at least one batch of 64 pairs .*, got {NUM_PAIRS} pairs. Lower `batch_size`"
        ):
            trainer().fit(Tiny(), datamodule=data)

    def test_a_set_that_was_not_given(self):
        data = ImageTextDataModule(tiny_pairs(), num_workers=0)
        with pytest.raises(Exception, match="Expected `test_dataset` to be given to ImageTextDataModule, got None"):
            trainer().test(Tiny(), datamodule=data)

    @pytest.mark.filterwarnings("ignore:.*there are no negatives")
    def test_batches_of_one_pair_train(self):
        data = tiny_data(batch_size=1)
        model = Tiny(TripletLoss(negatives="selective"))
        model.image_encoder[2] = nn.Identity()  # batch statistics of one pair are none
        trainer(max_epochs=1).fit(model, datamodule=data)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
