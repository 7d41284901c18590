"""The settings of the three papers, ready to run on Flickr30K or COCO.

    python examples/papers.py rvse  --data data/f30k_precomp                    # RVSE++ (arXiv 2303.00181), regions and BiGRU
    python examples/papers.py aoq   --data data/f30k_precomp                    # AOQ (arXiv 2003.03669) on the same model
    python examples/papers.py fne   --data dataset_flickr30k.json --images flickr30k-images    # FNE (arXiv 2308.04380)

``rvse`` and ``aoq`` read the published region features in SCAN's layout: ``train_ims.npy``, ``train_caps.txt``, and the same
for ``dev`` and ``test``, five captions an image; COCO's come in the same layout. ``fne`` reads a Karpathy JSON and the images,
and fine-tunes an open_clip model. What is a paper's own and what is ours stands beside each number.
"""

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from lightning_itm import (
    FalseNegativeElimination,
    FalseNegativeSampler,
    GradientNormMonitor,
    ImageTextDataModule,
    ImageTextDataset,
    OfflineHardNegativeMining,
    OpenCLIPDualEncoder,
    QuintupletLoss,
    RegionFeatureDataset,
    ResidualVSE,
    TripletLoss,
)

AS_PUBLISHED: dict[str, Any] = {"equal_captions": "keep"}  # of all papers: by default they are no negatives here


class StepDecayedVSE(ResidualVSE):
    """RVSE++ with the published optimizer: AdamW as it comes, a tenth of the learning rate from half of the epochs on."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and its schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        half = max(1, (self.trainer.max_epochs or 30) // 2)  # 15 of 30
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [half], 0.1)}


Recipe = tuple[L.LightningModule, ImageTextDataModule, list[Any], dict[str, Any]]


def region_data(args: argparse.Namespace) -> tuple[ImageTextDataModule, int, int]:
    """Return the data, the size of the vocabulary (words that occur four times), and the width of the features."""
    # A fifth of regions dropped, a fifth of words changed: the paper's.
    train = RegionFeatureDataset.from_scan(args.data, "train", **AS_PUBLISHED)
    val, test = (
        RegionFeatureDataset.from_scan(args.data, split, vocabulary=train.vocabulary, **AS_PUBLISHED)
        for split in ("dev", "test")
    )
    data = ImageTextDataModule(
        train, val, test, batch_size=args.batch_size or 128, num_workers=args.num_workers
    )  # 128: RVSE++'s
    return data, len(train.vocabulary), train.features.shape[2]


def rvse(args: argparse.Namespace) -> Recipe:
    """Set up RVSE++. Ours: pairs of one image are never negatives of each other; the monitor, with ``--monitor``."""
    data, words, width = region_data(args)
    loss = TripletLoss(0.2, "hardest" if args.monitor else "selective", epsilon=0.01)  # the paper's
    model = StepDecayedVSE(words, width, args.embed_dim, 300, loss, learning_rate=5e-4)  # the paper's; embed_dim 1024
    return (
        model,
        data,
        [GradientNormMonitor()] * args.monitor,
        {"max_epochs": 30, "gradient_clip_val": 2.0},
    )  # the paper's


def aoq(args: argparse.Namespace) -> Recipe:
    """Set up AOQ. Ours: the model is RVSE++'s, not one of the paper's; mined before each epoch, not once beforehand."""
    data, words, width = region_data(args)
    loss = QuintupletLoss(TripletLoss(0.2), offline_margin=0.0, alpha=0.3, beta=1.5)  # the paper's
    model = StepDecayedVSE(words, width, args.embed_dim, 300, loss, learning_rate=5e-4)  # RVSE++'s
    mining = OfflineHardNegativeMining(texts_per_image=300, images_per_text=60, coupled_ranks=True)  # the paper's
    return model, data, [mining], {"max_epochs": 30, "gradient_clip_val": 2.0}  # RVSE++'s


def fne(args: argparse.Namespace) -> Recipe:
    """Set up FNE. Ours: the towers (the paper's are a ViT and BERT), batch, learning rate, epochs and the filled queue."""
    loss = TripletLoss(0.2)  # the margin of the paper's code
    model = OpenCLIPDualEncoder(args.model, args.pretrained or None, loss, learning_rate=1e-5)  # ours
    sets = [
        ImageTextDataset.from_karpathy(args.data, args.images, split, **model.transforms, **AS_PUBLISHED)
        for split in ("train", "val", "test")
    ]
    data = ImageTextDataModule(*sets, batch_size=args.batch_size or 128, num_workers=args.num_workers)  # ours
    memory = FalseNegativeElimination(
        queue_size=8224, momentum=0.995, start_epoch=1,  # the paper's
        sampler=FalseNegativeSampler(posterior="published", prior=1e-4, sharpness=0.5, min_count=200),  # the paper's
        fill_during_warmup=True,  # not in the paper
    )  # fmt: skip
    return model, data, [memory], {"max_epochs": 10}  # ours


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper", choices=["rvse", "aoq", "fne"])
    parser.add_argument("--data", type=Path, required=True, help="a folder of features, or for fne a Karpathy JSON")
    parser.add_argument("--images", type=Path, default=Path(), help="for fne: the folder of images")
    parser.add_argument("--model", default="ViT-B-16", help="for fne: a model of open_clip (ViT-B-16)")
    parser.add_argument("--pretrained", default="laion2b_s34b_b88k", help="for fne: its weights, a tag or a file")
    parser.add_argument("--monitor", action="store_true", help="for rvse: hardest negatives, and the monitor switches")
    parser.add_argument("--embed-dim", type=int, default=1024, help="for rvse and aoq (1024)")
    parser.add_argument("--batch-size", type=int, default=None, help="128, if not given")
    parser.add_argument("--epochs", type=int, default=None, help="those of the recipe, if not given")
    parser.add_argument("--num-workers", type=int, default=None)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true", help="bf16-mixed on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/papers"))
    args = parser.parse_args(arguments)
    if args.monitor and args.paper != "rvse":
        parser.error("--monitor is for rvse")
    return args


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, and test the epoch that was best in validation."""
    args = parse_arguments(arguments)
    L.seed_everything(args.seed, verbose=False)
    model, data, callbacks, options = {"rvse": rvse, "aoq": aoq, "fne": fne}[args.paper](args)
    if args.epochs:
        options["max_epochs"] = args.epochs
    best = ModelCheckpoint(args.out / args.paper, monitor="val/rsum", mode="max")
    trainer = L.Trainer(
        accelerator=args.accelerator,
        precision=args.precision,
        callbacks=[*callbacks, best],
        default_root_dir=args.out,
        **options,
    )
    trainer.fit(model, datamodule=data)
    return dict(trainer.test(model, datamodule=data, ckpt_path=best.best_model_path, weights_only=True)[0])


if __name__ == "__main__":
    main()
