"""What a loss over a memory bank costs: ours, a loop as the published step is described, and the bare matrix products.

256 anchors a direction, 512 dimensions, queues of 8,192 and 65,536. Each figure is the median over the runs of the ratio to
the floor *of the same run*: two matrix products, anchors against all candidates, with the gradient of the anchors.

    python benchmarks/memory_bank.py
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_itm import FalseNegativeSampler, InfoNCELoss, TripletLoss
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.memory_bank import MemoryBank, MemoryCandidates

MARGIN, PRIOR, SHARPNESS, THRESHOLD = 0.2, 1e-4, 0.5, 1e-3


class Moments:
    """A running mean and variance, updated value by value on the host."""

    def __init__(self) -> None:
        self.count, self.mean, self.deviation = 0, 0.0, 0.0

    def update(self, value: float) -> None:
        """Take in one value (Welford)."""
        self.count += 1
        shift = value - self.mean
        self.mean += shift / self.count
        self.deviation += shift * (value - self.mean)

    def density(self, x: Tensor) -> Tensor:
        """Evaluate the fitted normal density."""
        std = math.sqrt(self.deviation / (self.count - 1))
        return torch.exp(-0.5 * ((x - self.mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


def loop_step(
    pairs: EmbeddingPairs, memory: tuple[Tensor, ...], slow: EmbeddingPairs, moments: tuple[Moments, Moments]
) -> Tensor:
    """Do the step as the paper describes it: per pair statistics, whole matrices, per row fallback."""
    image, text, image_id, _ = memory
    similarity = (pairs.image_embeddings @ pairs.text_embeddings.T).detach()
    best_text, best_image = similarity.argmax(dim=1), similarity.argmax(dim=0)
    off_diagonal = similarity.clone().fill_diagonal_(0)
    for i in range(len(similarity)):
        if best_text[i].item() == i and best_image[i].item() == i:
            moments[0].update(similarity[i, i].item())
            moments[1].update(off_diagonal[i].max().item())
            moments[1].update(off_diagonal[:, i].max().item())
    loss = pairs.image_embeddings.new_zeros(())
    for anchor, own, candidates in (
        (pairs.image_embeddings, slow.text_embeddings, text),
        (pairs.text_embeddings, slow.image_embeddings, image),
    ):
        scores = anchor @ candidates.T
        positive = (anchor * own).sum(dim=1, keepdim=True)
        cost = (MARGIN - positive + scores).clamp(min=0)
        with torch.no_grad():
            weights = torch.exp(-SHARPNESS * (scores - positive) ** 2)
            match = moments[0].density(scores)
            posterior = match / (match + (1 / PRIOR - 1) * moments[1].density(scores))
            weights = torch.where(posterior > THRESHOLD, torch.exp(-SHARPNESS * posterior), weights)
            weights[pairs.image_id[:, None] == image_id[None, :]] = 0
            weights[scores <= moments[0].mean - MARGIN] = 0
            for i in range(len(weights)):
                if weights[i].sum() == 0:
                    weights[i, cost[i].masked_fill(pairs.image_id[i] == image_id, -1).argmax()] = 1
            drawn = torch.multinomial(weights, 1)
        loss = loss + cost.gather(1, drawn).sum()
    return loss / len(pairs)


def make_pairs(number: int, dim: int, generator: torch.Generator, first_id: int = 0) -> EmbeddingPairs:
    """Make pairs around 256 subjects, so that there are hard negatives and likely matches, as in a trained model."""
    subjects = normalize(torch.randn(256, dim, generator=torch.Generator().manual_seed(7)), dim=1)
    of_pair = subjects[torch.randint(256, (number,), generator=generator)]
    noise = normalize(torch.randn(3, number, dim, generator=generator), dim=2)
    thing = normalize(1.8 * of_pair + noise[0], dim=1)
    image, text = (normalize(thing + 0.6 * noise[place], dim=1) for place in (1, 2))
    ids = torch.arange(number) + first_id
    return EmbeddingPairs(image, text, ids, ids)


def measure(queue_size: int, batch_size: int, dim: int, runs: int) -> None:
    """Print the table of one queue size."""
    generator = torch.Generator().manual_seed(0)
    pairs = make_pairs(batch_size, dim, generator)
    slow = EmbeddingPairs(pairs.image_embeddings.clone(), pairs.text_embeddings.clone(), pairs.image_id, pairs.text_id)
    bank = MemoryBank(queue_size, dim)
    bank.enqueue(make_pairs(queue_size, dim, generator, first_id=batch_size))
    inputs = pairs.image_embeddings.requires_grad_(), pairs.text_embeddings.requires_grad_()
    sampler, moments = FalseNegativeSampler(), (Moments(), Moments())
    candidates = bank.with_batch(slow)
    gradients = [torch.rand(batch_size, len(bank) + batch_size, generator=generator) for _ in range(2)]

    def floor() -> None:
        products = inputs[0] @ candidates[1].T, inputs[1] @ candidates[0].T
        torch.autograd.grad(products, inputs, gradients)

    def ours(loss: torch.nn.Module) -> Callable[[], None]:
        def step() -> None:
            value = loss(pairs, memory=MemoryCandidates(*candidates, slow, sampler))["loss"]
            torch.autograd.grad(value, inputs)

        return step

    def plain_info_nce() -> None:
        logits = [10 * anchor @ keys.T for anchor, keys in zip(inputs, (candidates[1], candidates[0]), strict=True)]
        costs = [row.logsumexp(dim=1).mean() - row[:, :batch_size].diagonal().mean() for row in logits]
        torch.autograd.grad(costs[0] + costs[1], inputs)

    ways: dict[str, Callable[[], object]] = {
        "two products, with backward": floor,
        "TripletLoss with memory": ours(TripletLoss(MARGIN)),
        "  and putting batch and queue together": lambda: (bank.with_batch(slow), ours(TripletLoss(MARGIN))()),
        "InfoNCELoss with memory": ours(InfoNCELoss()),
        "InfoNCE over the same, plainly": plain_info_nce,
        "loop, as published": lambda: torch.autograd.grad(loop_step(pairs, candidates, slow, moments), inputs),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 2):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if run >= 2:  # the first ones count the positives that posteriors wait for
                seconds[name].append(time.perf_counter() - start)
    _, watched = sampler.draw(MemoryCandidates(*candidates, slow, sampler).directions(pairs)[0], margin=MARGIN)
    shares = {name: float(values.float().mean()) for name, values in watched.items()}
    print(f"\nqueue {queue_size}, batch {batch_size}, dim {dim}; {shares}")
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["two products, with backward"], strict=True)]
        print(f"{name:42}{statistics.median(times):8.3f} s{statistics.median(ratios):8.2f} x the floor")


def main() -> None:
    """Measure both queues."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queue-sizes", type=int, nargs="+", default=[8192, 65_536])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads, median of {args.runs} runs")
    for queue_size in args.queue_sizes:
        measure(queue_size, args.batch_size, args.dim, args.runs)


if __name__ == "__main__":
    main()
