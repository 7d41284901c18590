"""Does mining help here? Fine-tune a converged model with and without negatives mined before each epoch.

From what InfoNCE reached from scratch, 8 epochs of: the hardest negative, AOQ, InfoNCE, InfoNCE with mined negatives; and
InfoNCE for as long as AOQ took. Rsum on the test set of examples/emoji_from_scratch.py, for each seed, and mean and standard
deviation. Split, epochs and learning rates were set before these runs were looked at. About
nine minutes a seed on two cores.

    python benchmarks/emoji_mining.py --seeds 0 1 2
"""

import argparse
import importlib.util
import logging
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import open_clip

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "emoji_from_scratch.py"
ROWS = ("start", "hardest", "AOQ", "AOQ, embeddings", "InfoNCE", "InfoNCE+", "InfoNCE, AOQ's time")


def load_example() -> Any:
    """Import examples/emoji_from_scratch.py."""
    sys.path.insert(0, str(EXAMPLE.parent))  # it imports emoji_data
    spec = importlib.util.spec_from_file_location("emoji_from_scratch", EXAMPLE)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["emoji_from_scratch"] = module
    spec.loader.exec_module(module)
    return module


def run_seed(example: Any, seed: int, out: Path, epochs: int) -> dict[str, tuple[float, float]]:
    """Return rsum and seconds of every row."""
    fixed = ["--epochs", "8", "--finetune-epochs", str(epochs)]
    args = example.parse_arguments(["--seed", str(seed), "--out", str(out), *fixed])
    start = example.train_row(args, "from scratch", "InfoNCE")
    rows = {"start": start}
    for name, loss, inject in (
        ("hardest", "hardest", "samples"),
        ("AOQ", "AOQ", "samples"),
        ("AOQ, embeddings", "AOQ", "embeddings"),
        ("InfoNCE", "InfoNCE", "samples"),
        ("InfoNCE+", "InfoNCE+", "embeddings"),
    ):
        rows[name] = example.train_row(args, f"fine-tuned {inject}", loss, start.checkpoint, inject)
        print(seed, name, rows[name].metrics["test/rsum"], rows[name].seconds, flush=True)
    args.finetune_epochs = round(epochs * rows["AOQ"].seconds / rows["InfoNCE"].seconds)
    rows["InfoNCE, AOQ's time"] = example.train_row(args, "fine-tuned longer", "InfoNCE", start.checkpoint)
    return {name: (row.metrics["test/rsum"], row.seconds) for name, row in rows.items()}


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-mining"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*LeafSpec.*|.*does not have many workers.*|Experiment logs directory.*exists.*")
    for name in ("lightning.pytorch", "lightning.fabric", ""):
        logging.getLogger(name).setLevel(logging.ERROR)
    example = load_example()
    open_clip.add_model_config(example.HERE / "models" / "emoji-clip.json")
    results = [run_seed(example, seed, args.out / str(seed), args.epochs) for seed in args.seeds]
    print(
        f"\n{'rsum after fine-tuning':24}"
        + "".join(f"{f'seed {seed}':>9}" for seed in args.seeds)
        + f"{'mean':>9}{'std':>7}{'time':>7}"
    )
    for name in ROWS:
        rsum = [result[name][0] for result in results]
        spread = statistics.stdev(rsum) if len(rsum) > 1 else 0.0
        time = statistics.median(result[name][1] / result["hardest"][1] for result in results)
        print(
            f"{name:24}"
            + "".join(f"{value:9.1f}" for value in rsum)
            + f"{statistics.mean(rsum):9.1f}{spread:7.1f}{time:6.2f}x"
        )
    print("time: seconds of training, over those of the hardest negative, median over the seeds")


if __name__ == "__main__":
    main()
