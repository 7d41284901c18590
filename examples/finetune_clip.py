r"""Fine-tune a pretrained open_clip model with any combination of callbacks, and see what it costs.

    python examples/finetune_clip.py --train dataset_flickr30k.json --images flickr30k-images   # the three Karpathy splits
    python examples/finetune_clip.py --train train.csv --val val.csv --test test.csv --images pictures \
        --loss quintuplet --mining --memory --monitor --layer-decay 0.8 --ema --classes imagenet/val

Training ends with a mixture of the weights before and after (WiSE-FT, arXiv 2109.01903): of the shares 0 (zero-shot), 0.25,
0.5, 0.75 and 1 (fine-tuned), the one with the best rsum on the validation set is saved, as ``weights.pt``, which open_clip
reads (``pretrained="weights.pt"``). With ``--classes``, a folder of images for each class, the table also says what each share
costs in zero-shot accuracy: fine-tuning forgets what its set does not show.
"""

import argparse
import copy
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import open_clip
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from lightning_itm import (
    FalseNegativeElimination,
    FalseNegativeSampler,
    GradientNormMonitor,
    ImageTextDataModule,
    InfoNCELoss,
    OfflineHardNegativeMining,
    OpenCLIPDualEncoder,
    QuintupletLoss,
    SigmoidLoss,
    TripletLoss,
    interpolate_weights,
    zero_shot_accuracy,
)
from lightning_itm.data import open_rgb, read_pairs

LOSSES = ("infonce", "sigmoid", "hardest", "selective", "quintuplet")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
COLUMNS = [f"{stage}/{key}" for stage in ("val", "test") for key in ("rsum", "i2t_r1", "t2i_r1")]
Row = dict[str, float]


def make_loss(name: str, margin: float) -> nn.Module:
    """Return a loss by its name on the command line."""
    if name in ("infonce", "sigmoid"):
        return InfoNCELoss() if name == "infonce" else SigmoidLoss()
    if name == "quintuplet":
        return QuintupletLoss(TripletLoss(margin, "hardest"))
    return TripletLoss(margin, "selective" if name == "selective" else "hardest")


def make_callbacks(args: argparse.Namespace) -> list[L.Callback]:
    """Return what was asked for; each works with each."""
    callbacks = progress_bar()
    if args.mining:
        callbacks.append(
            OfflineHardNegativeMining(
                texts_per_image=30, images_per_text=6, relative_margin=0.05, inject=args.mining, seed=args.seed
            )
        )
    if args.memory:
        sampler = FalseNegativeSampler(seed=args.seed)
        memory = FalseNegativeElimination(args.memory, sampler=sampler)
        callbacks.append(memory)
    if args.monitor:
        callbacks.append(GradientNormMonitor())
    if args.ema:
        callbacks.append(EMAWeightAveraging(decay=args.ema))
    return callbacks


def make_data(args: argparse.Namespace, transforms: dict[str, Any]) -> ImageTextDataModule:
    """Read the three sets."""
    paths = {"train": args.train, "val": args.val or args.train, "test": args.test or args.train}
    sets = [read_pairs(path, args.images, split=split, **transforms) for split, path in paths.items()]
    return ImageTextDataModule(*sets, batch_size=args.batch_size, num_workers=args.num_workers, seed=args.seed)


class Evaluation:
    """Measure a model on the validation set, the test set and the classes."""

    def __init__(self, args: argparse.Namespace, data: ImageTextDataModule, eval_transform: Any) -> None:
        # Another Trainer than the one of training: its callbacks would put averaged weights in the place of those measured.
        self.trainer = L.Trainer(**trainer_options(args), logger=False, callbacks=progress_bar())
        self.data, self.templates = data, args.template or open_clip.SIMPLE_IMAGENET_TEMPLATES
        self.folder = ImageFolder(args.classes, eval_transform, loader=open_rgb) if args.classes else None
        self.batch_size, self.num_workers = args.batch_size, args.num_workers

    def measure(self, model: OpenCLIPDualEncoder) -> Row:
        """Return retrieval, and zero-shot accuracy where there are classes."""
        row: Row = dict(self.trainer.validate(model, datamodule=self.data, verbose=False)[0])
        row |= self.trainer.test(model, datamodule=self.data, verbose=False)[0]
        if self.folder is not None:
            names = [name.replace("_", " ") for name in self.folder.classes]
            loader = DataLoader(self.folder, self.batch_size, num_workers=self.num_workers or 0)
            model.to(self.trainer.strategy.root_device)
            with self.trainer.precision_plugin.forward_context():
                accuracy = zero_shot_accuracy(model, loader, names, templates=self.templates)
            row["zero_shot"] = accuracy["top1"]
            model.cpu()
        return row


def print_table(rows: dict[float, Row], chosen: float) -> None:
    """Print a line a share, and which was saved."""
    print(f"\n{'share of':22}{'validation':^24}{'test':^24}")
    heads = "".join(f"{'rsum':>8}{'i2t R@1':>8}{'t2i R@1':>8}" for _ in ("val", "test"))
    has_classes = "zero_shot" in rows[chosen]
    print(f"{'fine-tuned weights':22}{heads}" + f"{'zero-shot top-1':>17}" * has_classes)
    for share, row in rows.items():
        name = {0.0: " zero-shot", 1.0: " fine-tuned"}.get(share, "") + " *" * (share == chosen)
        cells = "".join(f"{row[column]:8.1f}" for column in COLUMNS)
        print(f"{f'{share:.2f}{name}':22}{cells}" + (f"{row['zero_shot']:17.1f}" if has_classes else ""))


def progress_bar() -> list[L.Callback]:
    """Return a bar that goes when it is full; none where the output is a file."""
    return [TQDMProgressBar(leave=False)] if sys.stdout.isatty() else []


def trainer_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what both Trainers have in common: one device, and no noise."""
    quiet = {"enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    quiet["enable_progress_bar"] = sys.stdout.isatty()
    return {"accelerator": args.accelerator, "devices": 1, "precision": args.precision, **quiet}


def run(args: argparse.Namespace) -> tuple[dict[float, Row], float]:
    """Fine-tune, measure every share, save one."""
    L.seed_everything(args.seed, verbose=False)
    if args.model_config:
        open_clip.add_model_config(args.model_config)
    model = OpenCLIPDualEncoder(
        args.model,
        args.pretrained or None,
        make_loss(args.loss, args.margin),
        lock_image=args.lock_image,
        lock_text=args.lock_text,
        gradient_checkpointing=args.gradient_checkpointing,
        layer_decay=args.layer_decay,
        compile=args.compile,
        chunk_size=args.chunk_size,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        warmup_steps=args.warmup_steps,
    )
    data = make_data(args, model.transforms)
    before = copy.deepcopy(model.state_dict())
    trainer = L.Trainer(
        **trainer_options(args),
        max_epochs=args.epochs,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=args.clip,
        logger=CSVLogger(args.out, "", version=""),
        log_every_n_steps=1 if args.epochs * len(data.train_dataloader()) < 50 else 50,
        callbacks=make_callbacks(args),
    )
    trainer.fit(model, datamodule=data)
    after = copy.deepcopy(model.state_dict())  # with --ema the averaged weights
    evaluation = Evaluation(args, data, model.transforms["eval_transform"])
    rows: dict[float, Row] = {}
    for share in sorted({*SHARES} | ({args.share} if args.share is not None else set())):
        model.load_state_dict(interpolate_weights(before, after, share))
        rows[share] = evaluation.measure(model)
    best = max(rows, key=lambda share: rows[share]["val/rsum"])  # never by the test set
    chosen = best if args.share is None else args.share
    model.load_state_dict(interpolate_weights(before, after, chosen))
    torch.save(model.model.state_dict(), args.out / "weights.pt")
    return rows, chosen


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--train",
        required=True,
        help="Karpathy's .json; .csv, .tsv, .jsonl with `image` and `text`; a folder; .tar shards",
    )
    add("--val", help="the same; for Karpathy's .json, not needed")
    add("--test", help="the same")
    add("--images", type=Path, help="the folder that image paths start from (where the file is)")
    add("--classes", type=Path, help="a folder of images for each class, named as the class: zero-shot accuracy")
    add("--template", action="append", help="a prompt with {} for the class; may come again (CLIP's seven simple ones)")
    add("--model", default="ViT-B-32", help="a model of open_clip (ViT-B-32)")
    add("--pretrained", default="laion2b_s34b_b79k", help="its weights, a tag or a file")
    add("--model-config", type=Path, help="a .json of open_clip that describes --model")
    add("--loss", choices=LOSSES, default="infonce")
    add("--margin", type=float, default=0.2, help="of the hinges (0.2)")
    add("--mining", nargs="?", const="embeddings", choices=["embeddings", "samples"], help="AOQ, before each epoch")
    add("--memory", nargs="?", const=2048, type=int, metavar="PAIRS", help="FNE, with a queue of so many pairs (2048)")
    add("--monitor", action="store_true", help="switch selective negatives on where the gradient vanishes; for hinges")
    add(
        "--ema",
        nargs="?",
        const=0.999,
        type=float,
        metavar="DECAY",
        help="average the weights over about 1 / (1 - DECAY) steps (0.999)",
    )
    add("--layer-decay", type=float, help="of the learning rate, layer by layer down a tower, such as 0.8")
    add("--lock-image", action="store_true", help="freeze the image tower")
    add("--lock-text", action="store_true", help="freeze the text tower")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--chunk-size", type=int, help="encode so many pairs at a time: large batches on a small GPU")
    add("--compile", action="store_true", help="torch.compile the towers: minutes at first, then faster steps")
    add("--share", type=float, help="save this share of the fine-tuned weights, not the best in validation")
    add("--epochs", type=int, default=5)
    add("--batch-size", type=int, default=128)
    add(
        "--accumulate",
        type=int,
        default=1,
        metavar="BATCHES",
        help="batches an optimizer step; negatives stay a batch's",
    )
    add("--learning-rate", type=float, default=1e-5)
    add("--weight-decay", type=float, default=0.1)
    add("--warmup-steps", type=int, default=100)
    add("--clip", type=float, help="the largest norm of a gradient")
    add("--num-workers", type=int)
    add("--accelerator", default="auto")
    add("--precision", default="32-true", help="bf16-mixed on a GPU")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/finetune-clip"), help="where weights.pt and metrics.csv go")
    args = parser.parse_args(arguments)
    if not args.train.endswith(".json") and not (args.val and args.test):
        parser.error("--val and --test are needed, because only a Karpathy .json has all three sets")
    if args.share is not None and not 0 <= args.share <= 1:
        parser.error(f"--share must be in [0, 1], got {args.share}")
    return args


def main(arguments: list[str] | None = None) -> tuple[dict[float, Row], float]:
    """Fine-tune, and print the table."""
    args = parse_arguments(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*LeafSpec.*|.*does not have many workers.*|Experiment logs directory.*exists.*"
        )
        rows, chosen = run(args)
    print_table(rows, chosen)
    print(f"\n* saved as {args.out / 'weights.pt'}" + (", the best in validation" if args.share is None else ""))
    return rows, chosen


if __name__ == "__main__":
    main()
