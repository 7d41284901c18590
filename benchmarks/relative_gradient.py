"""The statistic of GradientNormMonitor in networks of four sizes: spread embeddings, and embeddings that run into one point.

An MLP, the CLIP of examples/emoji_from_scratch.py, ViT-B/32 and ViT-L/14 of open_clip, all with random weights, on emoji and
their names; the hardest-negative loss with margin 0.2. A random network is nearly collapsed or not by accident, so its
outputs are centred and scaled to length one ("spread"), and then pulled into one point: times η, plus one common vector.
Printed: the loss, how far the images spread around their mean, and κ of each tower, healthy in the first line of a model and
collapsed in its last.

    python benchmarks/relative_gradient.py                        # a few minutes, most of them ViT-L/14
    python benchmarks/relative_gradient.py --models mlp emoji-clip
"""

import argparse
import logging
import warnings

import open_clip
import torch
from emoji_example import load_example
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_itm import DualEncoder, ImageTextDataset, OpenCLIPDualEncoder, TripletLoss
from lightning_itm.data import collate_pairs
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.gradient_monitor import measure_gradient

STATES = {"spread": 0.0, "η = 0.3": 0.3, "η = 0.1": 0.1, "η = 0.01": 0.01}
BATCH = {"mlp": 64, "emoji-clip": 64, "ViT-B-32": 16, "ViT-L-14": 6}


class Mlp(DualEncoder):
    """Two layers a tower, over pixels and over bags of bytes."""

    def __init__(self) -> None:
        super().__init__(TripletLoss())
        self.image_encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 128), nn.ReLU(), nn.Linear(128, 64))
        self.text_encoder = nn.Sequential(nn.EmbeddingBag(256, 128), nn.ReLU(), nn.Linear(128, 64))
        shrink = nn.AdaptiveAvgPool2d(8)
        self.transforms = {
            "transform": lambda image: shrink(_pixels(image)),
            "tokenizer": lambda texts: torch.tensor([list(text.encode().ljust(24)[:24]) for text in texts]),
        }

    def encode_image(self, image: Tensor) -> Tensor:
        """Encode images `(n, 3, 8, 8)`."""
        return self.image_encoder(image)  # type: ignore[no-any-return]

    def encode_text(self, text: Tensor) -> Tensor:
        """Encode bytes `(n, 24)`."""
        return self.text_encoder(text)  # type: ignore[no-any-return]


def _pixels(image: object) -> Tensor:
    from lightning_itm.data import to_tensor

    return to_tensor(image)  # type: ignore[arg-type]


def centred(x: Tensor) -> Tensor:
    """Subtract the mean, and scale to a mean length of one."""
    x = x - x.mean(0).detach()
    scaled: Tensor = x / x.norm(dim=1).mean().detach()
    return scaled


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(BATCH), choices=list(BATCH))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    example = load_example()
    open_clip.add_model_config(example.HERE / "models" / "emoji-clip.json")
    items = example.split()[0]
    print(f"{'model':12}{'parameters':>12}  {'state':10}{'loss':>8}{'spread':>9}{'κ image':>10}{'κ text':>10}")
    for name in args.models:
        torch.manual_seed(0)
        model = Mlp() if name == "mlp" else OpenCLIPDualEncoder(name, loss=TripletLoss())
        number = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        some = items[: BATCH[name]]
        pairs = ImageTextDataset([item.image for item in some], [item.name for item in some], **model.transforms)
        batch = collate_pairs([pairs[i] for i in range(len(some))])
        ids, common = batch["image_id"], None
        for state, eta in STATES.items():
            model.zero_grad()
            image, text = centred(model.encode_image(batch["image"])), centred(model.encode_text(batch["text"]))
            if eta:
                common = normalize(torch.randn(image.shape[1]), dim=0) if common is None else common
                image, text = eta * image + common, eta * text + common
            embedded = EmbeddingPairs(normalize(image, dim=1), normalize(text, dim=1), ids, ids)
            loss = model.loss(embedded)["loss"]
            loss.backward()
            spread = 1 - (normalize(embedded.image_embeddings.mean(0), dim=0) @ embedded.image_embeddings.T).mean()
            kappa = [float(measure_gradient([*tower.parameters()])[1] / loss) for tower in model.towers().values()]
            print(
                f"{name:12}{number:10.2f} M  {state:10}{loss:8.3f}{spread:9.4f}" + "".join(f"{k:10.3f}" for k in kappa),
                flush=True,
            )


if __name__ == "__main__":
    main()
