"""The example end to end, on small real pictures, with a small open_clip model whose weights somebody else has trained."""

import csv
import importlib.util
import json
import re
import sys
from pathlib import Path

import open_clip
import pytest
import torch

from lightning_itm import ImageTextRetrieval, OpenCLIPDualEncoder, zero_shot_accuracy
from tests.helpers.open_clip_models import CONFIGS, register
from tests.helpers.pictures import cut_outs

pytestmark = [
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]
SIZES = {"train": 24, "val": 8, "test": 8}
ALL_AT_ONCE = [
    "--mining", "samples", "--memory", "64", "--monitor", "--ema", "0.5",
    "--layer-decay", "0.7", "--gradient-checkpointing", "--clip", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "finetune_clip.py"
    spec = importlib.util.spec_from_file_location("finetune_clip", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["finetune_clip"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    """Pictures, a set in four layouts, three classes, a model and its weights."""
    images = cut_outs(40, 40)
    rows = [
        {"image": f"{i}.png", "text": f"the {i}th square, {'abc'[i % 3]} in {part}"}
        for i in range(40)
        for part in ("front", "the middle")
    ]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
        of_class = tmp_path / "classes" / f"square_{'abc'[number % 3]}"
        of_class.mkdir(parents=True, exist_ok=True)
        image.save(of_class / f"{number}.png")
    start, entries = 0, []
    for split, size in SIZES.items():
        own = rows[2 * start : 2 * (start + size)]
        for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
            with open(tmp_path / f"{split}.{suffix}", "w", newline="") as file:
                writer = csv.DictWriter(file, ["image", "text"], delimiter=delimiter)
                writer.writeheader()
                writer.writerows(own)
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, own)))
        for number in range(start, start + size):
            sentences = [{"raw": row["text"]} for row in own if row["image"] == f"{number}.png"]
            entries.append({"filename": f"{number}.png", "split": split, "sentences": sentences})
        start += size
    (tmp_path / "set.json").write_text(json.dumps({"images": entries}))
    register({"tiny-vit": CONFIGS["tiny-vit"]}, tmp_path)
    torch.manual_seed(3)
    torch.save(open_clip.create_model("tiny-vit").state_dict(), tmp_path / "pretrained.pt")
    return tmp_path


def arguments(folder, *more, suffix="csv"):
    sets = (
        [f"--{split}={folder / split}.{suffix}" for split in SIZES]
        if suffix != "json"
        else ["--train", folder / "set.json"]
    )
    model = [
        "--model",
        "tiny-vit",
        "--model-config",
        folder / "tiny-vit.json",
        "--pretrained",
        folder / "pretrained.pt",
    ]
    fit = ["--batch-size", 16, "--epochs", 2, "--num-workers", 0, "--learning-rate", 1e-3, "--warmup-steps", 1]
    where = ["--images", folder, "--accelerator", "cpu", "--out", folder / "out"]
    return list(map(str, [*sets, *model, *fit, *where, *more]))


def measured_by_hand(example, args, weights):
    """Return test recall and zero-shot accuracy of weights in a file."""
    model = OpenCLIPDualEncoder("tiny-vit", weights).eval()
    metric = ImageTextRetrieval()
    with torch.no_grad():
        for batch in example.make_data(args, model.transforms).test_dataloader():
            metric.update(model.embed(batch))
    evaluation = example.Evaluation(args, None, model.transforms["eval_transform"])
    batches = torch.utils.data.DataLoader(evaluation.folder, 7)
    names = ["square a", "square b", "square c"]
    accuracy = zero_shot_accuracy(model, batches, names, templates=open_clip.SIMPLE_IMAGENET_TEMPLATES)
    return {**{f"test/{name}": float(value) for name, value in metric.compute().items()}, "zero_shot": accuracy["top1"]}


def test_everything_at_once(example, folder, capsys):
    line = arguments(folder, "--loss", "quintuplet", "--classes", folder / "classes", *ALL_AT_ONCE)
    rows, chosen = example.main(line)
    assert list(rows) == [0, 0.25, 0.5, 0.75, 1]
    assert rows[chosen]["val/rsum"] == max(row["val/rsum"] for row in rows.values())
    args = example.parse_arguments(line)
    for share, weights in ((0.0, folder / "pretrained.pt"), (chosen, folder / "out" / "weights.pt")):
        expected = measured_by_hand(example, args, weights)
        assert {name: rows[share][name] for name in expected} == pytest.approx(expected)
    logged = (folder / "out" / "metrics.csv").read_text().splitlines()[0]
    assert {"train/loss", "memory/fill", "mining/gap", "gradient/level", "val/rsum"} <= set(logged.split(","))
    printed = capsys.readouterr().out.strip().splitlines()
    assert len(printed) == 2 + 5 + 2, "the table, and nothing else"
    assert next(line for line in printed if "*" in line).startswith(f"{chosen:.2f}")
    assert all(f"{row['zero_shot']:.1f}" in printed[2 + place] for place, row in enumerate(rows.values()))


def test_plain_on_a_karpathy_split(example, folder, capsys):
    rows, chosen = example.main(arguments(folder, "--lock-image", "--share", 0.3, suffix="json"))
    assert chosen == 0.3
    assert list(rows) == [0, 0.25, 0.3, 0.5, 0.75, 1]
    assert "zero-shot top-1" not in capsys.readouterr().out
    before, after = (torch.load(folder / name, weights_only=True) for name in ("pretrained.pt", "out/weights.pt"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("visual.")} <= same, "a locked tower, mixed with itself"
    assert "text_projection" not in same


@pytest.mark.parametrize(
    ("loss", "lock"),
    [
        ("infonce", "--lock-text"),
        ("sigmoid", "--lock-image"),
        ("hardest", "--lock-image"),
        ("selective", "--lock-text"),
    ],
)
def test_any_loss_with_all_that_it_can_be_combined_with(example, folder, loss, lock):
    hinge = ["--monitor"] if loss in ("hardest", "selective") else []
    more = ["--mining", "--memory", "64", "--ema", "0.5", "--layer-decay", "0.9", lock, *hinge]
    rows, _ = example.main(arguments(folder, "--loss", loss, *more, "--epochs", 1))
    assert all(0 <= row["test/rsum"] <= 600 for row in rows.values())
    weights = torch.load(folder / "out" / "weights.pt", weights_only=True)
    assert all(value.isfinite().all() for value in weights.values())


def test_reads_each_layout_alike(example, folder):
    transforms = OpenCLIPDualEncoder("tiny-vit").transforms
    texts = []
    for suffix in ("csv", "tsv", "jsonl", "json"):
        data = example.make_data(example.parse_arguments(arguments(folder, suffix=suffix)), transforms)
        texts.append([part.texts for part in (data.train_dataset, data.val_dataset, data.test_dataset)])
        assert [len(part) for part in texts[-1]] == [2 * size for size in SIZES.values()]
    assert texts[0] == texts[1] == texts[2] == texts[3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--train", "a.csv"], "--val and --test are needed"),
        (["--train", "a.json", "--share", "2"], r"--share must be in \[0, 1\], got 2"),
        (["--train", "a.json", "--loss", "hinge"], "invalid choice: 'hinge'"),
    ],
)
def test_wrong_arguments(example, given, message, capsys):
    with pytest.raises(SystemExit):
        example.parse_arguments(given)
    assert re.search(message, capsys.readouterr().err)
