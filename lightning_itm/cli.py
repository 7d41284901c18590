"""The command line: Lightning's, with ``mine``, ``shards``, ``export`` and a ``predict`` into files.

``--help`` shows these docstrings.
"""

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
from lightning_itm.data.files_datamodule import ImageTextFilesDataModule
from lightning_itm.data.shards.commands import index, verify, write
from lightning_itm.export.commands import export
from lightning_itm.models.dual_encoder import DualEncoder
from lightning_itm.models.open_clip_dual_encoder import OpenCLIPDualEncoder

DESCRIPTION = """\
Fine-tune CLIP and other dual encoders on images and texts.

  lightning-itm shards write dataset_flickr30k.json shards/train --image_root flickr30k-images
  lightning-itm fit      --config examples/configs/clip_flickr30k.yaml --data.train shards/train
  lightning-itm validate --config examples/configs/clip_flickr30k.yaml --ckpt_path best.ckpt
  lightning-itm predict  --config examples/configs/clip_flickr30k.yaml --ckpt_path best.ckpt --output embeddings
  lightning-itm mine     --config examples/configs/clip_flickr30k.yaml --ckpt_path best.ckpt --output mined
  lightning-itm export   --ckpt_path best.ckpt --output clip-flickr30k

Every value of a configuration can also be given on the command line: --model.learning_rate 1e-5, --data.batch_size 256,
--trainer.precision bf16-mixed. To see the options of one class: lightning-itm fit --model.help OpenCLIPDualEncoder."""
OPTIONS = """\
The options that most runs need:

  --config FILE               a YAML with all options (those that follow on the command line replace its values)
  --model.model_name NAME     a model of open_clip (--model.pretrained TAG chooses its weights)
  --model.loss CLASS          such as lightning_itm.TripletLoss (--model.loss.negatives selective sets an argument of it)
  --data.train SOURCE         a .json, .jsonl, .csv or .tsv, a folder or shards (also --data.val and --data.test)
  --data.batch_size N         pairs per batch on each process
  --trainer.max_epochs N      and all that Lightning's Trainer takes: accelerator, devices, strategy, precision, callbacks

  --model.help OpenCLIPDualEncoder, --data.help ImageTextFilesDataModule    show the arguments of a class
  --print_config                                                  prints all options as YAML, to start from"""
SHARDS_DESCRIPTION = "Write image-text pairs into tar shards, index shards, and check them."


class HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the lines of a description as they are. By default they would be wrapped anew."""


class Trainer(L.Trainer):
    """Lightning's Trainer with two additions: ``predict`` writes files, and ``mine`` is new."""

    def predict(  # Lightning's arguments by their own order, and two more by name
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
        """Write the embeddings of all images and all texts of a set. Each image and each text is encoded once.

        Args:
            model: The module that encodes, usually a :class:`~lightning_itm.DualEncoder`.
            dataloaders: Must be None, because only a datamodule knows which image or text each row is.
            datamodule: An :class:`~lightning_itm.ImageTextDataModule`, which has the set.
            return_predictions: Also return the embeddings. By default they are only in the files.
            ckpt_path: The checkpoint whose weights are loaded. By default, the module keeps the weights that it has.
            weights_only: Load tensors and plain numbers only, for a file that you do not trust. Default: Lightning decides.
            output: The folder for the files. It is made, and must not hold results already.
            split: The set that is encoded: "train", "val" or "test".

        Raises:
            ValueError: if ``dataloaders`` are given.
            FileExistsError: if ``output`` holds results already.
        """
        if dataloaders is not None:
            raise ValueError(
                "Expected `datamodule`, which knows what each row is, got `dataloaders`. Use Lightning's Trainer for these."
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
        search: Literal["exact", "faiss"] = "exact",
        faiss_index: str | None = None,
    ) -> None:
        """Write the hardest texts of every image and the hardest images of every text of a set, with their similarities.

        Args:
            model: The module that encodes, usually a :class:`~lightning_itm.DualEncoder`.
            datamodule: An :class:`~lightning_itm.ImageTextDataModule`, which has the set.
            ckpt_path: The checkpoint whose weights are loaded. By default, the module keeps the weights that it has.
            weights_only: Load tensors and plain numbers only, for a file that you do not trust. Default: Lightning decides.
            output: The folder for the files. It is made, and must not hold results already.
            split: The set that is mined: "train", "val" or "test".
            format: "jsonl", which any program reads, or "parquet", which is smaller and needs pyarrow.
            texts_per_image: How many of the hardest texts are kept per image. Keep fewer to make the files smaller.
            images_per_text: How many of the hardest images are kept per text. Keep fewer to make the files smaller.
            rank_min: Skip this many of the hardest, where they are likely false negatives. Typical: 0 to 10.
            max_score: Drop negatives whose cosine similarity is higher than this, such as 0.9. Default: keep all.
            absolute_margin: Drop negatives more similar than the positive minus this, such as 0.05. Default: keep all.
            relative_margin: Drop negatives more similar than positive - this * abs(positive), such as 0.05. Default: keep all.
            search: "exact", or "faiss" for sets where that takes too long: candidates come from an index of FAISS.
            faiss_index: A factory string of FAISS, then a space and what it sets for the search: "IVF4096,PQ64x4fs nprobe=64".
        """
        # These four drop what is probably a false negative. They are not in the paper.
        guards: dict[str, Any] = {"rank_min": rank_min, "max_score": max_score}
        guards |= {"absolute_margin": absolute_margin, "relative_margin": relative_margin}
        searching: dict[str, Any] = {"search": search, "faiss_index": faiss_index}
        writer = NegativeWriter(output, texts_per_image, images_per_text, format=format, **searching, **guards)
        options = {"return_predictions": False, "ckpt_path": ckpt_path, "weights_only": weights_only}
        self._predict_with(writer, split, model, datamodule, **options)

    def _predict_with(self, writer: EmbeddingWriter, split: Any, model: Any, datamodule: Any, **options: Any) -> Any:
        datamodule.predict_split = split
        # The writer takes part in this one pass only: a later `fit` of the same Trainer must not write.
        self.callbacks.append(writer)  # type: ignore[attr-defined]
        try:
            return super().predict(model, datamodule=datamodule, **options)
        finally:
            self.callbacks.remove(writer)  # type: ignore[attr-defined]


class ItmCLI(LightningCLI):
    """Run any :class:`~lightning_itm.DualEncoder` from a YAML. By default, a model of open_clip on files."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            DualEncoder,
            ImageTextDataModule,
            trainer_class=Trainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},  # else a second command without a versioned logger does not run
            auto_configure_optimizers=False,  # else the module's own is replaced, and its layer decay lost silently
            parser_kwargs={"prog": "lightning-itm", "description": DESCRIPTION, "formatter_class": HelpFormatter}
            | {name: _subcommand_options(name) for name in self.subcommands()},
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the classes that are used where a command names none: a model of open_clip, and files."""
        defaults = {"model": OpenCLIPDualEncoder, "data": ImageTextFilesDataModule}
        parser.set_defaults(
            {key: {"class_path": f"{default.__module__}.{default.__name__}"} for key, default in defaults.items()}
        )

    def _parse_ckpt_path(self) -> None:
        """Take the model from the configuration alone. Lightning would replace it by the checkpoint's arguments."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands of Lightning and ``mine``."""
        return {**LightningCLI.subcommands(), "mine": {"model", "datamodule"}}  # what Lightning passes, so no options


def _subcommand_options(name: str) -> dict[str, Any]:
    first_paragraph = (getattr(Trainer, name).__doc__ or "").strip().split("\n\n")[0]
    description = f"{' '.join(first_paragraph.split())}\n\n{OPTIONS}"
    usage = f"lightning-itm {name} [--config FILE] [--model.… …] [--data.… …] [--trainer.… …] [--ckpt_path FILE]"
    usage += " [--output FOLDER] [--split SPLIT]" * (name in ("predict", "mine")) + " [--format FORMAT] …" * (
        name == "mine"
    )
    return {"usage": usage, "description": description, "formatter_class": HelpFormatter}


def main(args: list[str] | None = None) -> None:
    """Run one command, given as a list of strings. By default, what the program was called with."""
    if os.getcwd() not in sys.path:  # else a class of the user's own, in a file beside the data, is not found
        sys.path.append(os.getcwd())
    given = sys.argv[1:] if args is None else args
    if given[:1] == ["shards"]:  # no model, no Trainer: not a command of Lightning's
        options: dict[str, Any] = {"prog": "lightning-itm shards", "description": SHARDS_DESCRIPTION}
        jsonargparse.auto_cli([write, index, verify], args=given[1:], **options)
    elif given[:1] == ["export"]:
        jsonargparse.auto_cli(export, args=given[1:], prog="lightning-itm export", as_positional=False)
    else:
        ItmCLI(args=args)


if __name__ == "__main__":
    main()
