"""The main job with several seeds: mean and standard deviation of every row.

Split, epochs and learning rates are those of examples/emoji_from_scratch.py and were set before these runs were looked at. The
seed is that of the weights and of the order. About five minutes per seed on two cores. Options that are not listed go to the
example, such as its numbers of epochs.

    python benchmarks/emoji_seeds.py --seeds 0 1 2 --epochs 10 --finetune-epochs 4
"""

import argparse
import csv
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "emoji_from_scratch.py"


def main() -> None:
    """Run the example once a seed, and print what the runs have in common."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-seeds"))
    args, for_the_example = parser.parse_known_args()
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in args.seeds:
        out = args.out / str(seed)
        subprocess.run([sys.executable, EXAMPLE, "--seed", str(seed), "--out", out, *for_the_example], check=True)
        with open(out / "table.csv", newline="") as file:
            for row in csv.DictReader(file):
                for column in ("i2t_r1", "t2i_r1", "rsum", "training_loss"):
                    values[row["stage"], row["loss"]][column].append(float(row[column]))
    print(f"\nMean and standard deviation over the seeds {args.seeds}")
    print(f"{'stage':13}{'loss':10}{'i2t R@1':>15}{'t2i R@1':>15}{'rsum':>17}{'training loss':>17}")
    for (stage, loss), columns in values.items():
        cells = [(statistics.mean(column), statistics.stdev(column)) for column in columns.values()]
        i2t, t2i, rsum, training_loss = cells
        print(
            f"{stage:13}{loss:10}{i2t[0]:9.1f} ± {i2t[1]:3.1f}{t2i[0]:9.1f} ± {t2i[1]:3.1f}"
            f"{rsum[0]:10.1f} ± {rsum[1]:4.1f}{training_loss[0]:9.3f} ± {training_loss[1]:.3f}"
        )


if __name__ == "__main__":
    main()
