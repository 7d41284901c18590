"""Do rewritten captions teach a model to read every word, and what do they cost in retrieval?

Emoji and their names, with one word of the name replaced by a word of other names. A small model is trained with InfoNCE from
the same start, without and with the rewritten names as ``hard_captions``. On the test pictures, the script prints retrieval
(rsum) and how often the right name is more similar to its picture than a rewritten one.

    python benchmarks/hard_captions.py --epochs 10 --seeds 3
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from emoji_data import small_pictures, tokenize
from train_on_emoji import BATCH_SIZE, Small

from lightning_itm import ImageTextDataModule, ImageTextDataset, InfoNCELoss

NUM_REWRITTEN = 4


def rewrite(names: list[str], words: list[str], seed: int) -> list[list[str]]:
    """Return each name with one word replaced, several times. A name of one word becomes another word."""
    draw = random.Random(seed)
    rewritten = []
    for name in names:
        parts = name.split()
        variants = []
        for _ in range(NUM_REWRITTEN):
            place = draw.randrange(len(parts))
            word = draw.choice([word for word in draw.choices(words, k=9) if word != parts[place]] or ["nothing"])
            variants.append(" ".join([*parts[:place], word, *parts[place + 1 :]]))
        rewritten.append(variants)
    return rewritten


@torch.no_grad()
def accuracy(model: Small, pairs: ImageTextDataset, rewritten: list[list[str]]) -> float:
    """Return how often the right name is more similar to its picture than a rewritten one, in percent."""
    model.eval()
    images = model.encode_image(torch.stack([pairs.load_image(number) for number in range(len(pairs))]))
    images = torch.nn.functional.normalize(images)
    all_rewritten = [name for names in rewritten for name in names]
    texts = [
        torch.nn.functional.normalize(model.encode_text(tokenize(list(part)))) for part in (pairs.texts, all_rewritten)
    ]
    right = (images * texts[0]).sum(dim=1, keepdim=True)
    wrong = (images[:, None] * texts[1].view(len(pairs), NUM_REWRITTEN, -1)).sum(dim=2)
    return float((right > wrong).float().mean()) * 100


def run(seed: int, epochs: int, is_rewritten: bool) -> tuple[float, float]:
    """Train once. Return rsum, of 600, and the accuracy."""
    train, _, test = small_pictures()
    words = [word for name in train.texts for word in name.split()]
    lists = rewrite(list(train.texts), words, seed=0)
    if is_rewritten:
        train = ImageTextDataset(train.images, list(train.texts), tokenizer=tokenize, hard_captions=lists)
    L.seed_everything(seed, verbose=False)
    model = Small(InfoNCELoss())
    data = ImageTextDataModule(train, None, test.evaluation(), batch_size=BATCH_SIZE, num_workers=0, seed=seed)
    quiet: Any = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", **quiet)
    trainer.fit(model, datamodule=data)
    rsum = float(trainer.test(model, datamodule=data, verbose=False)[0]["test/rsum"])
    return rsum, accuracy(model, test.evaluation(), rewrite(list(test.texts), words, seed=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for seed in range(options.seeds):
        for is_rewritten in (False, True):
            rsum, right = run(seed, options.epochs, is_rewritten)
            print(
                f"seed {seed}, {'with' if is_rewritten else 'without'}: rsum {rsum:.1f}, right name {right:.1f} %",
                flush=True,
            )


if __name__ == "__main__":
    main()
