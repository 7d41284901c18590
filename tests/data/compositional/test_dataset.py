"""SugarCrepe's form, and its way through a datamodule and the command line."""

import json
import sys
from pathlib import Path

import lightning as L
import open_clip
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_itm import ImageTextDataModule
from lightning_itm.cli import main
from lightning_itm.data import CompositionalDataset, CompositionalFilesDataModule
from tests.helpers.pictures import cut_outs
from tests.helpers.tiny import PLAIN, SILENT, Tiny, tiny_data, tokenize

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def write_items(folder, *, num_images=4):
    """Two categories in SugarCrepe's form, one a dict and one a list. The second uses images of the first."""
    (folder / "items").mkdir()
    for number, image in enumerate(cut_outs(num_images)):
        image.save(folder / f"{number}.png")
    items = {
        name: [
            {
                "filename": f"{number}.png",
                "caption": f"a {name} on b {number}",
                "negative_caption": f"a {name} near c {number}",
            }
            for number in range(some)
        ]
        for name, some in (("swap_obj", num_images), ("add_att", num_images - 1))
    }
    (folder / "items" / "swap_obj.json").write_text(
        json.dumps({str(i): item for i, item in enumerate(items["swap_obj"])})
    )
    (folder / "items" / "add_att.json").write_text(json.dumps(items["add_att"]))
    return folder / "items"


def read(folder, **kwargs):
    return CompositionalDataset.from_json(
        folder, folder.parent, **{"transform": PLAIN, "tokenizer": tokenize, **kwargs}
    )


class TestRead:
    def test_items_of_all_files(self, tmp_path):
        items = read(write_items(tmp_path), tokenizer=None)
        assert len(items) == 7
        assert items.names == ["add_att", "swap_obj"]
        sample = items[4]  # the second of swap_obj
        assert (sample["text"], sample["negative_text"]) == ("a swap_obj on b 1", "a swap_obj near c 1")
        assert (sample["category"], sample["text_id"], sample["image_id"]) == (1, 4, 1)
        assert torch.equal(sample["image"], items[1]["image"]), "both are of one file"

    def test_one_file_and_a_list(self, tmp_path):
        folder = write_items(tmp_path)
        one = CompositionalDataset.from_json(folder / "add_att.json", tmp_path)
        some = CompositionalDataset.from_json([folder / "swap_obj.json"], tmp_path)
        assert (one.names, some.names) == (["add_att"], ["swap_obj"])


class TestErrors:
    def test_of_lists(self):
        images = cut_outs(2)
        with pytest.raises(ValueError, match=r"one entry per item in each list.*'captions': 1"):
            CompositionalDataset(images, ["a"], ["b", "c"])
        with pytest.raises(
            ValueError, match=r"negative caption of item 1 to be a text, and another one.*got 'b' beside 'b'"
        ):
            CompositionalDataset(images, ["a", "b"], ["c", "b"])

    def test_of_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"Expected .json files in .*, one per category, found none"):
            CompositionalDataset.from_json(tmp_path, tmp_path)
        path = tmp_path / "bad.json"
        path.write_text(json.dumps([{"filename": "1.png", "caption": "a"}]))
        with pytest.raises(
            ValueError, match=r"entry 1 of .*bad.json to be an object with the texts 'filename', 'caption', 'neg"
        ):
            CompositionalDataset.from_json(path, tmp_path)
        path.write_text("[]")
        with pytest.raises(ValueError, match=r"a list or a dict of objects, got "):
            CompositionalDataset.from_json(path, tmp_path)

    def test_an_image_that_does_not_open(self):
        items = CompositionalDataset([b"no image", cut_outs(1)[0]], ["a", "b"], ["c", "d"], max_unreadable=1.0)
        with pytest.raises(RuntimeError, match=r"In evaluation nothing is replaced"):
            items[0]


def expected_accuracy(model, items):
    """One by one, in loops."""
    right = {name: [] for name in items.names}
    with torch.no_grad():
        for sample in items:
            image = torch.nn.functional.normalize(model.encode_image(sample["image"][None]))[0]
            texts = model.encode_text(torch.stack([sample["text"], sample["negative_text"]]))
            scores = torch.nn.functional.normalize(texts) @ image
            right[items.names[sample["category"]]].append(100.0 * float(scores[0] > scores[1]))
    return {name: sum(values) / len(values) for name, values in right.items()}


class Items(ImageTextDataModule):
    """The items, in the place of pairs."""

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.val_dataset, 3, collate_fn=self.val_dataset.collate)


class TestValidate:
    def test_logs_each_category(self, tmp_path):
        model, items = Tiny().eval(), read(write_items(tmp_path))
        (logged,) = L.Trainer(**SILENT).validate(model, Items(val_dataset=items), verbose=False)
        expected = expected_accuracy(model, items)
        assert set(logged) == {"val/compositional_accuracy", *(f"val/compositional_{name}" for name in items.names)}
        for name, value in expected.items():
            assert logged[f"val/compositional_{name}"] == pytest.approx(value)
        both = (3 * expected["add_att"] + 4 * expected["swap_obj"]) / 7
        assert logged["val/compositional_accuracy"] == pytest.approx(both)

    def test_a_bag_of_words_scores_nothing_on_the_order_of_words(self):
        items = CompositionalDataset(
            cut_outs(6),
            [f"a cat on a dog {number}" for number in range(6)],
            [f"a dog on a cat {number}" for number in range(6)],
            transform=PLAIN,
            tokenizer=tokenize,
        )
        (logged,) = L.Trainer(**SILENT).validate(Tiny(), Items(val_dataset=items), verbose=False)
        assert logged["val/compositional_accuracy"] == 0

    def test_pairs_and_items_with_one_module(self, tmp_path):
        """One after the other, with one Trainer: each has its own metric."""
        model, trainer, items = Tiny(), L.Trainer(**SILENT), read(write_items(tmp_path))
        for data, name in ((tiny_data(), "val/rsum"), (Items(val_dataset=items), "val/compositional_accuracy")) * 2:
            (logged,) = trainer.validate(model, data, verbose=False)
            assert name in logged

    @pytest.mark.filterwarnings("ignore")
    def test_on_the_command_line(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["lightning-itm"])
        open_clip.add_model_config(EXAMPLES / "models" / "emoji-clip.json")
        folder = write_items(tmp_path)
        model = ["--model", "lightning_itm.OpenCLIPDualEncoder", "--model.model_name", "emoji-clip"]
        data = ["--data", "lightning_itm.data.CompositionalFilesDataModule", "--data.val", str(folder)]
        data += ["--data.image_root", str(tmp_path), "--data.num_workers", "0"]
        main(["validate", *model, *data, "--trainer.accelerator", "cpu", "--trainer.logger", "false"])
        assert "val/compositional_swap_obj" in capsys.readouterr().out

    def test_no_transforms(self, tmp_path):
        data = CompositionalFilesDataModule(str(write_items(tmp_path)), image_root=str(tmp_path))
        with pytest.raises(MisconfigurationException, match=r"Expected `model_name`"):
            L.Trainer(**SILENT).validate(Tiny(), data)

    def test_no_fit(self, tmp_path):
        data = CompositionalFilesDataModule(str(write_items(tmp_path)), image_root=str(tmp_path))
        with pytest.raises(MisconfigurationException, match=r"Expected `train`"):
            L.Trainer(**SILENT).fit(Tiny(), data)
