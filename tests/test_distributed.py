"""Two gloo processes on one global batch give the gradients of one process."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from lightning_itm import DualEncoder, InfoNCELoss, QuintupletLoss, SigmoidLoss, TripletLoss
from lightning_itm.data import collate_pairs
from lightning_itm.distributed import gather, gather_with_gradient
from tests.helpers.tiny import SILENT

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),  # what is tested here
]

# Groups of an image that fall on one rank (0), on both (1, 4) and that are a single pair (others).
IMAGE_ID = [0, 0, 0, 1, 2, 4, 4, 1, 3, 4, 5, 6]
CAPTION_ID = [0, 1, 2, 0, 3, 4, 5, -1, 3, 6, 0, 7]
LOSSES = {
    "hardest": lambda: TripletLoss(0.5, "hardest"),
    "mean": lambda: TripletLoss(0.5, "mean"),
    "selective": lambda: TripletLoss(0.5, "selective", epsilon=0.3),
    "info_nce": InfoNCELoss,
    "sigmoid": SigmoidLoss,
    "hardness": lambda: InfoNCELoss(hardness=5.0, relative_margin=0.1),
    "sum": lambda: TripletLoss(0.5, "selective", epsilon=0.3, reduction="sum"),
}


class Linear(DualEncoder):
    def __init__(self, loss, **kwargs):
        super().__init__(loss, warmup_steps=0, **kwargs)
        self.image_encoder, self.text_encoder = nn.Linear(6, 4), nn.Linear(5, 4)

    def encode_image(self, image):
        return self.image_encoder(image)

    def encode_text(self, text):
        return self.text_encoder(text)


class KeepGradients(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_rank == 0:
            torch.save({name: p.grad for name, p in pl_module.named_parameters()}, "gradients.pt")


def samples():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(7, 6, generator=generator)
    return [
        {
            "image": images[image_id],
            "text": torch.randn(5, generator=generator),
            "image_id": image_id,
            "text_id": text_id,
        }
        for text_id, image_id in enumerate(IMAGE_ID)
    ]


def captioned_samples():
    """Some captions are on two images, of one rank and of both; one is not known."""
    return [{**sample, "caption_id": number} for sample, number in zip(samples(), CAPTION_ID, strict=True)]


def mined_samples():
    """With negatives as a HardNegativeDataset would add them, one pair without any."""
    data, mined = samples(), samples()[::-1]
    for index, (sample, negative) in enumerate(zip(data, mined, strict=True)):
        sample["hard"] = {
            "text": negative["text"],
            "image_of_text": negative["image"],
            "image_id_of_text": 20 + index,
            "image": mined[index - 1]["image"],
            "text_of_image": mined[index - 1]["text"],
            "image_id": 40 + index,
        }
    data[3]["hard"]["image_id_of_text"] = -1
    return data


def one_step(make_loss, devices, data, **kwargs):
    L.seed_everything(1, verbose=False)
    model = Linear(make_loss(), **kwargs)
    trainer = L.Trainer(
        max_steps=1,
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        callbacks=[KeepGradients()],
        precision="64-true",
        **SILENT,
    )
    trainer.fit(model, DataLoader(data, len(data) // devices, collate_fn=collate_pairs))
    return torch.load("gradients.pt")


@pytest.mark.forks
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_two_processes_equal_those_of_one(name):
    check_equal(LOSSES[name], samples())


@pytest.mark.forks
@pytest.mark.parametrize("name", ["mean", "info_nce"])
def test_gradients_with_equal_captions(name):
    check_equal(LOSSES[name], captioned_samples())
    captioned, plain = one_step(LOSSES[name], 1, captioned_samples()), one_step(LOSSES[name], 1, samples())
    assert not torch.equal(captioned["image_encoder.weight"], plain["image_encoder.weight"])


@pytest.mark.forks
@pytest.mark.parametrize("name", [*LOSSES, "quintuplet"])
def test_gradients_with_mined_negatives(name):
    check_equal(
        {**LOSSES, "quintuplet": lambda: QuintupletLoss(TripletLoss(0.5), offline_margin=0.3)}[name], mined_samples()
    )


@pytest.mark.forks
@pytest.mark.parametrize("make_loss", [InfoNCELoss, LOSSES["selective"]])
def test_gradients_in_chunks(make_loss):
    """Six pairs a process, and as many mined ones, in chunks of three; one process has the whole batch at once."""
    check_equal(make_loss, mined_samples(), chunk_size=4)


def check_equal(make_loss, data, **kwargs):
    expected, got = one_step(make_loss, 1, data), one_step(make_loss, 2, data, **kwargs)
    assert expected.keys() == got.keys()
    for parameter, gradient in expected.items():
        assert gradient.abs().max() > 0, parameter
        torch.testing.assert_close(got[parameter], gradient, atol=1e-9, rtol=0)


@pytest.mark.forks
def test_metric_of_two_processes_equals_that_of_one():
    """Eleven pairs on two ranks: one pair comes twice, and counts once."""

    class Evaluate(Linear):
        def on_test_epoch_end(self):
            super().on_test_epoch_end()
            if self.trainer.is_global_zero:
                torch.save(dict(self.trainer.callback_metrics), "metrics.pt")

    results = []
    for devices in (1, 2):
        L.seed_everything(1, verbose=False)
        model = Evaluate(InfoNCELoss())
        data = samples()[:11]
        trainer = L.Trainer(devices=devices, strategy="ddp_fork" if devices > 1 else "auto", **SILENT)
        trainer.test(model, DataLoader(data, 2, collate_fn=collate_pairs), verbose=False)
        results.append(torch.load("metrics.pt"))
    assert results[0].keys() == results[1].keys()
    assert results[0]["test/rsum"] > 0
    assert results[0] == results[1]


def _gather_in_process(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x = torch.full((2, 3), float(rank + 1), requires_grad=True)
    gathered = gather_with_gradient(x)
    assert torch.equal(gathered, torch.tensor([1.0, 1.0, 2.0, 2.0])[:, None].expand(4, 3))
    assert not gather(x).requires_grad
    # Rank r weighs row i with (r + 1) * (i + 1): what comes back is the sum over ranks, of the rank's own rows.
    (gathered * (rank + 1) * torch.arange(1.0, 5)[:, None]).sum().backward()
    own = torch.arange(1.0, 5)[2 * rank : 2 * rank + 2]
    assert torch.equal(x.grad, 3 * own[:, None].expand(2, 3))
    torch.distributed.destroy_process_group()


@pytest.mark.forks
def test_gather_sums_the_gradients_of_the_ranks(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=_gather_in_process, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


def test_gather_of_one_process_is_the_tensor_itself():
    x = torch.ones(2, requires_grad=True)
    assert gather_with_gradient(x) is x
    assert not gather(x).requires_grad
