"""Speed beside others: the same work, on the same machine, in the same run, as a ratio.

Each part runs our way and its peer's in turn, several times. The ratio is the median of the ratios of neighbouring runs, in
seconds of one processor, so that other work on the machine counts little. Below 1 we are faster.

    python benchmarks/peers.py                       # all parts
    python benchmarks/peers.py --parts loss bank     # some

The peers are no dependencies of the package. A part that lacks its peer says how to install it:

    pip install faiss-cpu pytorch-metric-learning "sentence-transformers[train]" simplejpeg
"""

import argparse

import torch
from peers_data import loader, stream
from peers_losses import bank, loss, metric
from peers_search import search

PARTS = {"loss": loss, "metric": metric, "search": search, "bank": bank, "stream": stream, "loader": loader}


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
