"""Speed beside others: the same work, on the same machine, in the same run, as a ratio.

Each part runs our way and its peer's in turn, several times. The ratio is the median of the ratios of neighbouring runs, in
seconds of one processor, so that other work on the machine counts little. Below 1 we are faster.

    python benchmarks/peers.py                  # all parts
    python benchmarks/peers.py --parts loss     # some
"""

import argparse
import statistics
import time
from collections.abc import Callable

import open_clip
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_itm import ImageTextRetrieval, InfoNCELoss
from lightning_itm.embeddings import EmbeddingPairs

Way = Callable[[], object]
DIM = 512


def compare(title: str, peer: tuple[str, Way], ours: dict[str, Way], runs: int) -> None:
    """Run all ways in turn, and print the ratio of each of ours to the peer's."""
    ways = {peer[0]: peer[1], **ours}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # once, so that nothing is set up below
    for _ in range(runs):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    print(f"\n{title}, median of {runs} runs")
    print(f"  {peer[0]:48}{1000 * statistics.median(seconds[peer[0]]):10.1f} ms")
    for name in ours:
        ratios = [own / other for own, other in zip(seconds[name], seconds[peer[0]], strict=True)]
        middle = statistics.median(ratios)
        print(f"  {name:48}{1000 * statistics.median(seconds[name]):10.1f} ms{middle:8.2f} x", end="")
        print(f"   ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def unit(rows: int) -> Tensor:
    """Return random embeddings."""
    return normalize(torch.randn(rows, DIM), dim=1)


def loss(runs: int) -> None:
    """Forward and backward of CLIP's loss."""
    loss_of_batch(512, runs)
    loss_of_batch(4096, max(3, runs // 3))


def loss_of_batch(batch_size: int, runs: int) -> None:
    """Forward and backward of CLIP's loss, for one size of a batch."""
    image, text, ids = unit(batch_size).requires_grad_(), unit(batch_size).requires_grad_(), torch.arange(batch_size)
    scale, pairs = torch.tensor(2.66, requires_grad=True), EmbeddingPairs(image, text, ids, ids)
    theirs, plain, hard = open_clip.ClipLoss(), InfoNCELoss(), InfoNCELoss(hardness=9)
    ways: dict[str, Way] = {
        "InfoNCELoss": lambda: plain(pairs)["loss"].backward(),
        "InfoNCELoss(hardness=9)": lambda: hard(pairs)["loss"].backward(),
    }
    peer = ("open_clip.ClipLoss", lambda: theirs(image, text, scale.exp()).backward())
    compare(f"Loss, forward and backward, {batch_size} pairs", peer, ways, runs)


def metric(runs: int) -> None:
    """Recall of a model that has learned something, on 5,000 images with five texts each (COCO's test set)."""
    images = 5000
    owner, centre = torch.arange(images).repeat_interleave(5), unit(images)
    noise = 0.15  # R@1 near 8, as of a model that begins to learn
    image = normalize(centre + noise * torch.randn_like(centre), dim=1)
    text = normalize(centre[owner] + noise * torch.randn(len(owner), DIM), dim=1)

    def ours() -> object:
        metric = ImageTextRetrieval()
        metric.update(image[owner], text, owner, torch.arange(len(owner)))
        return metric.compute()

    peer = ("one float32 product", lambda: image @ text.T)
    compare("Recall in both directions, 5,000 x 25,000", peer, {"ImageTextRetrieval": ours}, runs)


PARTS = {"loss": loss, "metric": metric}


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in args.parts:
        PARTS[name](args.runs)


if __name__ == "__main__":
    main()
