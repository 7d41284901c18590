"""Which negatives pay, and for whom? InfoNCE, tuned first, against everything else: on emoji, icons and photographs.

Each run adds one line to a file. So runs may be spread over processes and evenings, and a stopped table goes on where it was.

    python benchmarks/negatives.py --setting icons --folder ICONS --tune                    # InfoNCE alone, judged on val
    python benchmarks/negatives.py --setting icons --folder ICONS --methods InfoNCE "batches of 4" --seeds 0 1 2
    python benchmarks/negatives.py --setting icons --table                                  # of what was run so far

The table has means over the seeds: rsum on the validation set, by which settings are chosen, and on the test set, both at the
end of the run; the gain on the test set beside InfoNCE after as many steps, with the 95 % interval of the paired differences;
the same after as much time; the same where each run stops after the epoch that is best on the validation set; R@1; the gain
with the whole set as candidates, for InfoNCE rsum itself; the time of a step (without what callbacks do before it) and of the
whole run beside InfoNCE's, in seconds of one processor, so that other work on the machine does not count (with --device cuda,
seconds of the clock). Equal time: "InfoNCE, 1.5 x" is InfoNCE for one and a half times as many epochs, and between such rows
rsum is interpolated.
"""

import argparse
import json
import logging
import statistics
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from negatives_evaluation import Evaluate, gallery_rsum, seconds
from negatives_methods import METHODS, methods_of
from negatives_settings import SETTINGS, Setting
from negatives_table import print_table, print_tuning, read

from lightning_itm import InfoNCELoss

RESULTS = Path(__file__).parent / "negatives.jsonl"
Knobs = dict[str, Any]


def make_model(setting: Setting, name: str, seed: int, folder: Path | None, knobs: Knobs) -> Any:
    """Make the model with its loss, and its start if the setting has one."""
    start = setting.start(folder, seed)
    L.seed_everything(seed, verbose=False)
    loss = methods_of(name).loss()
    model = setting.model(loss, folder, **{key: knobs[key] for key in knobs if key not in ("epochs", "temperature")})
    if start is not None:
        has_scale = "loss.logit_scale" in start and "loss.logit_scale" in model.state_dict() and name != "sigmoid"
        kept = {key: value for key, value in start.items() if not key.startswith("loss.")}
        model.load_state_dict(
            kept | ({"loss.logit_scale": start["loss.logit_scale"]} if has_scale else {}), strict=False
        )
    if knobs["temperature"] is not None and isinstance(loss, InfoNCELoss):
        with torch.no_grad():
            loss.logit_scale.copy_(torch.tensor(1 / knobs["temperature"]).log())
    return model


def run(setting: Setting, folder: Path | None, key: dict[str, Any]) -> dict[str, Any]:
    """Train with one method from one seed, and return what is to be kept, with ``key`` before it."""
    name, seed, knobs, is_tuning = (key[word] for word in ("method", "seed", "knobs", "is_tuning"))
    device = torch.device(key["device"])
    called = seconds(device)
    method, data = methods_of(name), setting.data(folder, seed)
    model = make_model(setting, name, seed, folder, knobs)
    watch, epochs = Evaluate(is_tuning=is_tuning), round(knobs["epochs"] * method.epochs)
    began = seconds(device)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator=key["device"],
        devices=1,
        gradient_clip_val=setting.clip,
        limit_train_batches=setting.fraction,
        callbacks=[*method.callbacks(seed), watch],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    training = seconds(device) - began - watch.evaluation  # of training and mining
    val = [value["rsum"] for value in watch.val]
    best = max(range(epochs), key=lambda epoch: val[epoch])
    row = key | {"val": round(val[-1], 2), "best_val": round(val[best], 2), "best_epoch": best + 1}
    if not is_tuning:
        last = watch.test[-1]
        sets = [data.train_dataset, data.val_dataset, data.test_dataset]
        gallery = gallery_rsum(model, sets)
        row |= {"rsum": last["rsum"], "r1": (last["i2t_r1"] + last["t2i_r1"]) / 2, "gallery": gallery}
        row |= {"best": watch.test[best]["rsum"]}
    row |= {"step": statistics.median(watch.steps), "seconds": training, "total": seconds(device) - called}
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}


def plan_of(setting: Setting, args: argparse.Namespace) -> list[tuple[str, Knobs]]:
    """Return what is to be run from each seed: methods, or a method with one knob changed at a time."""
    if args.tune is None:
        return [(name, setting.knobs_of(name)) for name in args.methods or setting.methods]
    plan: list[tuple[str, Knobs]] = []
    for name in args.methods or ["InfoNCE"]:
        for knob in args.tune or setting.search:
            plan += [(name, setting.knobs_of(name) | {knob: value}) for value in setting.search[knob]]
    return [one for number, one in enumerate(plan) if one not in plan[:number]]


def main() -> None:
    """Run what was asked for and is not in the file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, required=True)
    parser.add_argument("--methods", nargs="+", default=None, help=f"of {list(METHODS)}, or 'InfoNCE, 1.5 x'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="where the set is: icons.npz, or the photographs and their JSON")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of results")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    parser.add_argument(
        "--tune", nargs="*", metavar="KNOB", help="try the values of these knobs, or of all, and judge on val"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric", ""):
        logging.getLogger(logger).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    setting = SETTINGS[args.setting]
    is_tuning, plan = args.tune is not None, plan_of(setting, args)
    for seed in [] if args.table else args.seeds:
        for name, knobs in plan:
            key = {"setting": setting.name, "method": name, "seed": seed, "is_tuning": is_tuning, "knobs": knobs}
            key["device"] = args.device
            if any(key.items() <= row.items() for row in read(args.results)):
                continue
            row = run(setting, args.folder, key)
            with open(args.results, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    rows = read(args.results, setting=setting.name, is_tuning=is_tuning, device=args.device)
    if is_tuning:
        print_tuning(rows)
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
