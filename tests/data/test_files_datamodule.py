"""What files and folders become, read by :func:`read_pairs` and by the datamodule that takes their paths."""

import json
import os
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from lightning_itm import ImageTextDataset, ImageTextFilesDataModule, write_shards
from lightning_itm.data import read_pairs
from tests.helpers.karpathy import write_karpathy
from tests.helpers.tiny import AUGMENTED, PLAIN, SILENT, Tiny, tokenize

NUM_IMAGES, NUM_SENTENCES = 20, 5


class TinyWithTransforms(Tiny):
    def __init__(self):
        super().__init__()
        self.transforms = {"transform": AUGMENTED, "eval_transform": PLAIN, "tokenizer": tokenize}


class TestReadPairs:
    def test_karpathy_with_every_split(self, tmp_path):
        for style, counts in (
            ("coco", {"train": 12, "val": 4, "test": 4}),
            ("flickr", {"train": 12, "val": 4, "test": 4}),
        ):
            (tmp_path / style).mkdir()
            path = write_karpathy(tmp_path / style, style=style)
            seen = []
            for split, number in counts.items():
                pairs = read_pairs(path, split=split)
                assert (len(pairs.images), len(pairs)) == (number, 5 * number)
                seen += [str(image) for image in pairs.images]
                for text_id in range(0, len(pairs), 5):
                    sample = pairs[text_id + 3]
                    assert sample["text"].endswith("sentence 3.")
                    assert sample["image"].shape[0] == 3
            assert len(set(seen)) == NUM_IMAGES
        alone = ImageTextDataset.from_karpathy(tmp_path / "coco" / "dataset.json", tmp_path / "coco", ["train"])
        assert len(alone.images) == 8
        assert all("train2014" in str(image) for image in alone.images)
        with pytest.raises(ValueError, match=r"one of \['restval', 'test', 'train', 'val'\], .* got 'dev'"):
            read_pairs(tmp_path / "coco" / "dataset.json", split="dev")

    def test_how_many_files_may_be_missing(self, tmp_path):
        path = write_karpathy(tmp_path)
        for image in sorted(path.parent.glob("train2014/*.jpg"))[-2:]:
            image.unlink()
        trainer = L.Trainer(**SILENT, max_epochs=1)
        options = {"batch_size": 4, "num_workers": 0}
        with pytest.raises(FileNotFoundError, match=r"at most 5\.0% of the 12 images .*found no file for 2"):
            trainer.fit(TinyWithTransforms(), datamodule=ImageTextFilesDataModule(str(path), **options))
        data = ImageTextFilesDataModule(str(path), max_unreadable=0.5, **options)
        with pytest.warns(UserWarning, match="2 of 12 images are missing"), pytest.warns(UserWarning, match="Image"):
            trainer.fit(TinyWithTransforms(), datamodule=data)
        assert data.train_dataset.num_replaced == 10, "five texts each"

    def test_every_form_gives_the_same_pairs(self, tmp_path):
        write_karpathy(tmp_path)
        expected = read_pairs("dataset.json", split="val")
        rows = [
            (os.path.relpath(image, tmp_path), text)
            for image, texts in zip(
                expected.images, [list(expected.texts[5 * i : 5 * i + 5]) for i in range(4)], strict=True
            )
            for text in texts
        ]
        Path("pairs.csv").write_text("image,text\n" + "".join(f'{image},"{text}"\n' for image, text in rows))
        Path("pairs.tsv").write_text("filepath\ttitle\n" + "".join(f"{image}\t{text}\n" for image, text in rows))
        Path("pairs.jsonl").write_text("".join(json.dumps({"image": i, "text": t}) + "\n" for i, t in rows))
        Path("folder").mkdir()
        for number, image in enumerate(expected.images):
            Path("folder", f"{number}.jpg").write_bytes(Path(image).read_bytes())
            Path("folder", f"{number}.txt").write_text(
                "".join(f"{text}\n" for _, text in rows[5 * number : 5 * number + 5])
            )
        write_shards(expected, "shards", images_per_shard=3)
        forms = {
            "pairs.csv": {},
            "pairs.tsv": {"image_column": "filepath", "text_column": "title"},
            "pairs.jsonl": {},
            "folder": {},
            "shards": {},
            "shards/{00000..00001}.tar": {},
        }
        for source, options in forms.items():
            pairs = read_pairs(source, **options)
            assert list(pairs.texts) == list(expected.texts), source
            assert torch.equal(pairs.text_image_id, expected.text_image_id)
            assert torch.equal(pairs[7]["image"], expected[7]["image"])

    def test_a_folder_with_the_archive_that_it_came_in(self):
        Path("folder").mkdir()
        Image.new("RGB", (4, 4)).save("folder/a.png")
        Path("folder/a.txt").write_text("a square")
        Path("folder/download.tgz").write_bytes(b"anything")
        assert read_pairs("folder").texts == ["a square"]
        Path("folder/a.txt").unlink()
        with pytest.raises(ValueError, match=r"an uncompressed \.tar.*got folder/download\.tgz"):
            read_pairs("folder")

    @pytest.mark.parametrize(
        ("source", "error", "message"),
        [
            ("nothing.json", FileNotFoundError, r"Expected nothing\.json, found none"),
            ("pairs.xlsx", ValueError, r"or a folder, got pairs\.xlsx"),
            ("empty", FileNotFoundError, "Expected images"),
            ("nowhere", FileNotFoundError, "Expected nowhere, found none"),
            ("val2014", FileNotFoundError, r"\(12 of 12 images have no text\)"),
        ],
    )
    def test_what_can_not_be_read(self, source, error, message, tmp_path):
        write_karpathy(tmp_path)
        Path("empty").mkdir()
        with pytest.raises(error, match=message):
            read_pairs(source)


class TestImageTextFilesDataModule:
    def test_a_set_without_splits_that_comes_twice(self):
        with pytest.warns(UserWarning, match="`train` and `val` are the same, folder, which has no splits"):
            ImageTextFilesDataModule("folder", "folder")

    def test_equal_captions(self, tmp_path):
        for number in range(3):
            Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / "train.csv").write_text("image,text\n0.png,a mug\n1.png,A mug\n2.png,a cup\n")

        def captions(**options):
            data = ImageTextFilesDataModule(str(tmp_path / "train.csv"), batch_size=3, num_workers=0, **options)
            data.trainer = L.Trainer(**SILENT)
            data.trainer.strategy.connect(TinyWithTransforms())
            data.setup("fit")
            return data.train_dataset.caption_id

        with pytest.warns(UserWarning, match="2 of 3 pairs share their caption"):
            assert captions().tolist() == [0, 0, 1]
        assert captions(equal_captions="keep") is None

    def test_a_json_without_splits_that_comes_twice(self, tmp_path):
        """Only what it holds tells that it is not Karpathy's."""
        write_karpathy(tmp_path)
        rows = [{"image": str(image), "caption": f"a {image.stem}"} for image in Path("val2014").iterdir()]
        Path("list.json").write_text(json.dumps(rows))
        trainer, model = L.Trainer(max_steps=1, **SILENT), TinyWithTransforms()
        options = {"num_workers": 0, "batch_size": 4}
        with pytest.warns(UserWarning, match=r"`train` and `val` are the same, list\.json, which has no splits"):
            trainer.fit(model, datamodule=ImageTextFilesDataModule("list.json", "list.json", **options))

    def test_options_of_a_table(self, tmp_path):
        write_karpathy(tmp_path)
        image = next(Path("val2014").iterdir())
        Path("a.csv").write_bytes(f"file:title\n{image}:a café\n".encode("cp1252"))
        names = {"image_column": "file", "text_column": "title"}
        data = ImageTextFilesDataModule(val="a.csv", delimiter=":", encoding="cp1252", num_workers=0, **names)
        L.Trainer(**SILENT).validate(TinyWithTransforms(), datamodule=data, verbose=False)
        assert data.val_dataset.texts == ["a café"]

    def test_what_can_not_be_set_up(self, tmp_path):
        write_karpathy(tmp_path)
        trainer, model = L.Trainer(max_epochs=1, **SILENT), TinyWithTransforms()
        with pytest.raises(MisconfigurationException, match="shards with `stream=True`"):
            trainer.fit(model, datamodule=ImageTextFilesDataModule("dataset.json", stream=True))
        with pytest.raises(MisconfigurationException, match="Expected `test`, a file"):
            trainer.predict(model, datamodule=ImageTextFilesDataModule("dataset.json"))
        model.transforms = None
        with pytest.raises(MisconfigurationException, match="Expected `model_name`"):
            trainer.fit(model, datamodule=ImageTextFilesDataModule("dataset.json"))

    def test_a_set_is_read_again_only_for_other_transforms(self, tmp_path):
        write_karpathy(tmp_path)
        data = ImageTextFilesDataModule("dataset.json", "dataset.json", num_workers=0, batch_size=4)
        model = TinyWithTransforms()
        read = []
        for module in (model, model, TinyWithTransforms()):
            L.Trainer(**SILENT).validate(module, datamodule=data, verbose=False)
            read.append(data.val_dataset)
        assert read[0] is read[1]
        assert read[2] is not read[1]
        assert read[2].eval_transform is PLAIN
