"""Which known duplicates does each posterior recognise, at each batch size? Used by false_negatives.py.

Batches and a queue are put together from embeddings that were computed once, so that a table takes about a minute.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_itm import FalseNegativeSampler
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.memory_bank import MemoryCandidates

BATCH_SIZES = (32, 128, 512, 1024, 4096)
QUEUE_SIZE, NUM_SEEN, NUM_MEASURED, MAX_ANCHORS = 8192, 4096, 1024, 512
NAMES = ("published", "histogram")


class Counts(NamedTuple):
    """How many comparisons there are, and how many of them are taken for likely matches."""

    duplicates: int = 0
    found: int = 0
    others: int = 0
    lost: int = 0

    def __str__(self) -> str:
        precision = self.found / max(1, self.found + self.lost)
        shares = self.found / max(1, self.duplicates), precision, self.lost / max(1, self.others)
        return f"{100 * shares[0]:10.1f}{100 * shares[1]:10.1f}{100 * shares[2]:10.3f}"


def take(pairs: EmbeddingPairs, rows: Tensor) -> EmbeddingPairs:
    """Return some of the pairs."""
    return EmbeddingPairs(
        pairs.image_embeddings[rows], pairs.text_embeddings[rows], pairs.image_id[rows], pairs.text_id[rows]
    )


def count_found(
    sampler: FalseNegativeSampler, memory: MemoryCandidates, pairs: EmbeddingPairs, caption: Tensor, threshold: float
) -> Counts:
    """Count duplicates and others, of both directions, with a posterior above the threshold."""
    counts = torch.zeros(4, dtype=torch.long)
    for direction in memory.directions(pairs):
        scores = direction.scores()
        same = caption[direction.anchor_id][:, None] == caption[direction.candidate_id]
        duplicate, other = scores.negative_mask & same, scores.negative_mask & ~same
        likely = sampler.posterior(scores.similarity) > threshold
        counts += torch.stack([part.count_nonzero() for part in (duplicate, duplicate & likely, other, other & likely)])
    return Counts(*counts.tolist())


def simulate(
    embedded: EmbeddingPairs, caption: Tensor, batch_size: int, sampler: FalseNegativeSampler, thresholds: list[float]
) -> list[Counts]:
    """Let the sampler see batches and their queues, then count what it recognises.

    Args:
        embedded: All pairs, whose ids are 0, 1, 2, …
        caption: `(pairs,)`, equal for known duplicates.
        batch_size: Pairs per batch.
        sampler: A new one.
        thresholds: Where P counts as likely.

    Returns:
        The counts at each threshold.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(embedded), generator=generator) for _ in range(16)])
    queue_size = min(QUEUE_SIZE, len(embedded) - batch_size)
    num_anchors = min(batch_size, MAX_ANCHORS)
    num_warm_up = max(4, NUM_SEEN // num_anchors)
    totals = [torch.zeros(4, dtype=torch.long) for _ in thresholds]
    for step in range(num_warm_up + max(1, NUM_MEASURED // num_anchors)):
        start = (queue_size + step * batch_size) % (len(order) - batch_size - queue_size)
        rows = order[start : start + queue_size + batch_size].flip(0)  # the batch first, then the queue
        batch, anchors = take(embedded, rows[:batch_size]), take(embedded, rows[:num_anchors])
        everything = take(embedded, rows)
        memory = MemoryCandidates(
            everything.image_embeddings,
            everything.text_embeddings,
            everything.image_id,
            torch.ones(len(rows), dtype=torch.bool),
            anchors,
            sampler,
        )
        memory.sampler.observe(batch)
        for direction in memory.directions(anchors):
            sampler.weights(direction.scores(), margin=None)
        if step >= num_warm_up:
            for total, threshold in zip(totals, thresholds, strict=True):
                total += torch.tensor(count_found(sampler, memory, anchors, caption, threshold))
    return [Counts(*total.tolist()) for total in totals]


def print_posteriors(embedded: EmbeddingPairs, caption: Tensor) -> None:
    """Print the table of both posteriors at each batch size that the set is large enough for."""
    print(f"{len(embedded)} pairs, queue {QUEUE_SIZE} or what the set has beside the batch; all in percent")
    print(f"{'batch':>6} {'posterior':10} {'likely':>9}{'recall':>10}{'precision':>10}{'lost':>10}")
    for batch_size in BATCH_SIZES:
        if 2 * batch_size > len(embedded):
            continue
        for name in NAMES:
            sampler = FalseNegativeSampler(posterior="histogram" if name == "histogram" else "published")
            thresholds = sorted({0.5, 0.2, 0.1, sampler.threshold}, reverse=True)
            for threshold, counts in zip(
                thresholds, simulate(embedded, caption, batch_size, sampler, thresholds), strict=True
            ):
                print(f"{batch_size:6} {name:10} {f'P > {threshold:g}':>9}{counts}", flush=True)
