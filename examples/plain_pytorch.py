"""Losses, memory bank and mining in a plain PyTorch loop, without a Trainer: about thirty lines of training, half a minute.

    pip install "lightning_itm[demo]"  # from a clone: pip install -e ".[demo]"
    python examples/plain_pytorch.py

A small model learns emoji and their names (``emoji_data.py``). Each epoch mines the whole training set with the model as it
stands, and each step compares a batch with itself, with its mined negatives, and with a bank of earlier pairs.
"""

import argparse

import torch
from emoji_data import VOCABULARY, small_pictures
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_itm import (
    DualEncoder,
    FalseNegativeSampler,
    HardNegativeDataset,
    ImageTextDataset,
    ImageTextRetrieval,
    InfoNCELoss,
    mine,
)
from lightning_itm.data import collate_pairs
from lightning_itm.memory_bank import Agreement, MemoryBank, MemoryCandidates, MomentumEncoder

DIM, BATCH, QUEUE = 128, 128, 1024


class Small(DualEncoder):
    """A small CNN and a bag of words. A ``DualEncoder`` is a module like any other: nothing here asks for a Trainer."""

    def __init__(self) -> None:
        super().__init__(InfoNCELoss())
        cnn = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten()]
        self.image_encoder = nn.Sequential(*cnn, nn.Linear(64 * 6 * 6, DIM))
        self.text_encoder = nn.EmbeddingBag(VOCABULARY, DIM, padding_idx=0)

    def encode_image(self, image: Tensor) -> Tensor:
        """Encode pictures, `(pairs, 3, 24, 24)`."""
        vectors: Tensor = self.image_encoder(image)
        return vectors

    def encode_text(self, text: Tensor) -> Tensor:
        """Encode numbered words, `(pairs, 48)`."""
        vectors: Tensor = self.text_encoder(text)
        return vectors


def train(model: Small, pairs: ImageTextDataset, epochs: int) -> list[float]:
    """Train, and return the mean loss of each epoch."""
    hard_pairs = HardNegativeDataset(pairs)
    loader = DataLoader(hard_pairs, BATCH, shuffle=True, drop_last=True, collate_fn=collate_pairs)
    slow, bank = MomentumEncoder(model, momentum=0.9), MemoryBank(QUEUE, DIM)
    sampler, agreement = FalseNegativeSampler(), Agreement()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for epoch in range(epochs):
        mined, total = mine(model, pairs, relative_margin=0.05), 0.0
        hard_pairs.table.publish(mined.texts, mined.images)
        for step, batch in enumerate(loader):
            sampler.start_step(epoch, step)
            live, stored, hard = model.embed(batch), slow(batch), model.embed_hard_negatives(batch["hard"])
            # The bank enters the loss when its embeddings agree with those of the model.
            parts = *bank.with_batch(stored), stored, sampler, agreement, agreement.is_met.clone()
            memory = MemoryCandidates(*parts, caption_id=bank.captions_with_batch(stored))
            loss = model.loss(live, memory=memory, hard=hard)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            slow.update(model)
            bank.enqueue(stored)
            total += loss.item()
        losses.append(total / len(loader))
        in_loss = "in the loss" if bool(agreement.is_met) else "waits"
        print(
            f"epoch {epoch}: loss {losses[-1]:.3f}, gap {mined.gap:.3f}, bank {float(bank.fill()):.0%} full, {in_loss}"
        )
    hard_pairs.table.remove()
    return losses


@torch.no_grad()
def evaluate(model: Small, pairs: ImageTextDataset) -> dict[str, Tensor]:
    """Measure retrieval over a whole set."""
    metric = ImageTextRetrieval()
    model.eval()
    for batch in DataLoader(pairs.evaluation(), BATCH, collate_fn=collate_pairs):
        metric.update(model.embed(batch))
    model.train()
    return metric.compute()


def main(arguments: list[str] | None = None) -> tuple[list[float], float, float]:
    """Train and test. Return the losses, and rsum before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    epochs: int = parser.parse_args(arguments).epochs
    torch.manual_seed(0)
    train_pairs, _, test_pairs = small_pictures()
    model = Small()
    before = float(evaluate(model, test_pairs)["rsum"])
    losses = train(model, train_pairs, epochs)
    values = evaluate(model, test_pairs)
    print(
        ", ".join(f"{name} {float(values[name]):.1f}" for name in ("i2t_r1", "t2i_r1", "rsum")),
        f"(before: {before:.1f})",
    )
    return losses, before, float(values["rsum"])


if __name__ == "__main__":
    main()
