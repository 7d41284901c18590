"""The command line: Lightning's own, with mining and shards."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_itm.callbacks.embedding_writer import EmbeddingWriter
from lightning_itm.callbacks.negative_writer import NegativeWriter
from lightning_itm.data.datamodule import ImageTextDataModule
from lightning_itm.data.files_datamodule import ImageTextFilesDataModule, read_pairs
from lightning_itm.data.shards.dataset import warn_of_faults
from lightning_itm.data.shards.index import ShardIndex
from lightning_itm.data.shards.writer import verify_shards, write_shards
from lightning_itm.models.dual_encoder import DualEncoder
from lightning_itm.models.open_clip_dual_encoder import OpenCLIPDualEncoder

DESCRIPTION = """\
Fine-tune CLIP and other dual encoders on images and texts.

  lightning-itm shards write dataset_flickr30k.json shards/train --image_root flickr30k-images
  lightning-itm fit      --config examples/configs/clip_flickr30k.yaml --data.train shards/train
  lightning-itm validate --config examples/configs/clip_flickr30k.yaml --ckpt_path best.ckpt
  lightning-itm predict  --config examples/configs/clip_flickr30k.yaml --ckpt_path best.ckpt --output embeddings
  lightning-itm mine     --config examples/configs/clip_flickr30k.yaml --ckpt_path best.ckpt --output mined

Everything in a configuration can be said on the command line, too: --model.learning_rate 1e-5, --data.batch_size 256,
--trainer.precision bf16-mixed. The options of one class: lightning-itm fit --model.help OpenCLIPDualEncoder."""
OPTIONS = """\
What is needed most:

  --config FILE               a YAML with everything; what follows on the command line comes on top of it
  --model.model_name NAME     a model of open_clip; --model.pretrained TAG: its weights
  --model.loss CLASS          such as lightning_itm.TripletLoss; --model.loss.negatives selective: its arguments
  --data.train SOURCE         a Karpathy .json, a .csv, .tsv or .jsonl, a folder or shards; likewise --data.val, --data.test
  --data.batch_size N         pairs a batch on each process
  --trainer.max_epochs N      and whatever else Lightning's Trainer takes: accelerator, devices, strategy, precision, callbacks

  --model.help OpenCLIPDualEncoder, --data.help ImageTextFilesDataModule    their arguments; likewise of another class
  --print_config                                                  all of it as YAML, to start from"""
SHARDS_DESCRIPTION = "Write image-text pairs into tar shards, and look after these."


class HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leave the lines of a description as they are."""


class Trainer(L.Trainer):
    """Lightning's Trainer, with a ``predict`` that writes files, and ``mine``."""

    def predict(
        self,
        model: L.LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        return_predictions: bool | None = False,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        *,
        output: str = "embeddings",
        split: Literal["train", "val", "test"] = "test",
    ) -> Any:
        """Write the embeddings of all images and all texts of a set, each encoded once.

        Args:
            model: What encodes.
            dataloaders: None: only a datamodule knows what each row is.
            datamodule: The sets.
            return_predictions: Return them, too.
            ckpt_path: The weights.
            weights_only: How the checkpoint is loaded.
            output: A new folder.
            split: The set.
        """
        if dataloaders is not None:
            raise ValueError(
                "Expected `datamodule`, which knows what each row is, got `dataloaders`. Use Lightning's Trainer."
            )
        writer = EmbeddingWriter(output)
        options = {"return_predictions": return_predictions, "ckpt_path": ckpt_path, "weights_only": weights_only}
        return self._predict_with(writer, split, model, datamodule, **options)

    def mine(
        self,
        model: L.LightningModule | None = None,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        *,
        output: str = "mined",
        split: Literal["train", "val", "test"] = "train",
        format: Literal["jsonl", "parquet"] = "jsonl",
        texts_per_image: int = 300,
        images_per_text: int = 60,
        rank_min: int = 0,
        max_score: float | None = None,
        absolute_margin: float | None = None,
        relative_margin: float | None = None,
    ) -> None:
        """Write the hardest texts of every image and the hardest images of every text of a set, with their similarities.

        Args:
            model: What encodes.
            datamodule: The sets.
            ckpt_path: The weights.
            weights_only: How the checkpoint is loaded.
            output: A new folder.
            split: The set.
            format: Of the files.
            texts_per_image: Texts kept for an image.
            images_per_text: Images kept for a text.
            rank_min: Skip so many of the hardest.
            max_score: Leave out candidates that are more similar than this.
            absolute_margin: Leave out candidates that are not so much less similar than the positive.
            relative_margin: The same, as a share of the positive's similarity.
        """
        guards = {
            "rank_min": rank_min,
            "max_score": max_score,
            "absolute_margin": absolute_margin,
            "relative_margin": relative_margin,
        }
        writer = NegativeWriter(output, texts_per_image, images_per_text, format=format, **guards)
        options = {"return_predictions": False, "ckpt_path": ckpt_path, "weights_only": weights_only}
        self._predict_with(writer, split, model, datamodule, **options)

    def _predict_with(self, writer: EmbeddingWriter, split: Any, model: Any, datamodule: Any, **options: Any) -> Any:
        datamodule.predict_split = split
        self.callbacks.append(writer)  # type: ignore[attr-defined]
        try:
            return super().predict(model, datamodule=datamodule, **options)
        finally:
            self.callbacks.remove(writer)  # type: ignore[attr-defined]


class ItmCLI(LightningCLI):
    """LightningCLI over any :class:`~lightning_itm.DualEncoder`, open_clip's by default, and files."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            DualEncoder,
            ImageTextDataModule,
            trainer_class=Trainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},  # or a second command without a versioned logger would not run
            auto_configure_optimizers=False,  # the module's own, or the decay of layers would be lost without a word
            parser_kwargs={"prog": "lightning-itm", "description": DESCRIPTION, "formatter_class": HelpFormatter}
            | {name: _subcommand_options(name) for name in self.subcommands()},
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let who names no class have open_clip's models, and files."""
        parser.set_defaults(
            {
                "model": {"class_path": f"{OpenCLIPDualEncoder.__module__}.{OpenCLIPDualEncoder.__name__}"},
                "data": {"class_path": f"{ImageTextFilesDataModule.__module__}.{ImageTextFilesDataModule.__name__}"},
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Take the model from the configuration alone: Lightning would put the checkpoint's arguments over it."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's, and ``mine``."""
        return {**LightningCLI.subcommands(), "mine": {"model", "datamodule"}}


def _subcommand_options(name: str) -> dict[str, Any]:
    says = (getattr(Trainer, name).__doc__ or "").strip().split("\n\n")[0]
    description = f"{' '.join(says.split())}\n\n{OPTIONS}"
    usage = f"lightning-itm {name} [--config FILE] [--model.… …] [--data.… …] [--trainer.… …]"
    more = {"fit": " [--ckpt_path FILE]", "predict": " [--ckpt_path FILE] [--output FOLDER] [--split SPLIT]"}
    more["mine"] = more["predict"] + " [--format FORMAT] …"
    return {"usage": usage + more.get(name, more["fit"]), "description": description, "formatter_class": HelpFormatter}


def write(
    source: str,
    output: str,
    *,
    image_root: str | None = None,
    split: str = "train",
    image_column: str = "image",
    text_column: str = "text",
    images_per_shard: int = 1000,
) -> None:
    """Write image-text pairs into tar shards, with a manifest, and what is where beside them.

    Args:
        source: A Karpathy .json, a .csv, .tsv or .jsonl, a folder of images with .txt files, or other shards.
        output: A new folder.
        image_root: The folder that image paths start from; default: where the file is.
        split: Of a Karpathy JSON; "train" takes "restval" in.
        image_column: Of a table.
        text_column: Of a table.
        images_per_shard: Images a shard.
    """
    pairs = read_pairs(source, image_root, split=split, image_column=image_column, text_column=text_column)
    manifest = write_shards(pairs, output, images_per_shard=images_per_shard)
    ShardIndex.open(output)
    print(f"{manifest['images']} images and {manifest['pairs']} texts in {len(manifest['shards'])} shards: {output}")


def index(shards: str, output: str | None = None) -> None:
    """Find out what is where in shards, such as img2dataset's, and say what can't be used.

    Args:
        shards: A folder, or a pattern such as "shards/{00000..00031}.tar" or "https://host/{00000..00031}.tar".
        output: The file to write; default: beside the first shard. Remote shards need one.
    """
    found = ShardIndex.open(shards, output)
    warn_of_faults(found)
    print(f"{len(found.key)} images and {len(found.text)} texts in {len(found.shards)} shards.")


def verify(folder: str) -> None:
    """Compare shards with their manifest.

    Args:
        folder: What `write` wrote.
    """
    verify_shards(folder)
    print(f"{folder}: every shard is as it was written.")


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    if os.getcwd() not in sys.path:  # or a class of the user's own, in a file beside the data, would not be found
        sys.path.append(os.getcwd())
    given = sys.argv[1:] if args is None else args
    if given[:1] == ["shards"]:
        jsonargparse.auto_cli(
            [write, index, verify], args=given[1:], prog="lightning-itm shards", description=SHARDS_DESCRIPTION
        )
    else:
        ItmCLI(args=args)


if __name__ == "__main__":
    main()
