"""What the code of README and site finds: small sets in the forms that it reads, and a small model for a pretrained one."""

import json
from pathlib import Path

import lightning as L

from lightning_itm import ImageTextDataset, ImageTextFilesDataModule, OpenCLIPDualEncoder
from tests.helpers.open_clip_models import CONFIGS, register
from tests.helpers.pictures import cut_outs

PRETRAINED = '"ViT-B-32", pretrained="laion2b_s34b_b79k"'
SMALL = ["--model.model_name", "tiny-vit", "--model.pretrained", "null", "--data.num_workers", "0"]
SMALL += ["--data.batch_size", "16", "--trainer.max_epochs", "1", "--trainer.precision", "32-true"]
SMALL += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


def small_model(code):
    return code.replace(PRETRAINED, '"tiny-vit"')


def write_checkpoint(folder):
    """Write the checkpoint of a small model, as a run leaves it."""
    model = OpenCLIPDualEncoder("tiny-vit")
    trainer = L.Trainer(accelerator="cpu", max_epochs=0, logger=False, enable_progress_bar=False)
    train = ImageTextFilesDataModule(train=str(folder / "photos"), val=str(folder / "photos-val"), num_workers=0)
    trainer.fit(model, datamodule=train)
    trainer.save_checkpoint(folder / "runs" / "last.ckpt")


def write_flickr30k(folder):
    """Write a set in the layout of Flickr30K, of cut-outs."""
    (folder / "flickr30k-images").mkdir()
    entries = []
    for number, image in enumerate(cut_outs(44, 40)):
        image.save(folder / "flickr30k-images" / f"{number}.png")
        sentences = [{"raw": f"square {number} for the {place}th time"} for place in range(5)]
        split = "val" if number < 8 else "train" if number < 40 else "test"
        entries.append({"filename": f"{number}.png", "split": split, "sentences": sentences})
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": entries}))


def small_sets(folder: Path):
    """Write all that the pages read, and return the names that they begin with."""
    register({"tiny-vit": CONFIGS["tiny-vit"]}, folder)
    write_flickr30k(folder)
    parts = {"photos": range(8, 40), "photos-val": range(8)}
    for name, numbers in parts.items():
        (folder / name).mkdir()
        rows = []
        for number in numbers:
            texts = [f"square {number} for the {place}th time" for place in range(5)]
            image = (folder / "flickr30k-images" / f"{number}.png").read_bytes()
            (folder / name / f"{number}.png").write_bytes(image)
            (folder / name / f"{number}.txt").write_text("\n".join(texts))
            rows += [f"{name}/{number}.png,{text}" for text in texts]
        table = "val.csv" if name.endswith("val") else "train.csv"
        (folder / table).write_text("\n".join(["image,text", *rows]))
    (folder / "sugarcrepe" / "data").mkdir(parents=True)
    (folder / "val2017").symlink_to("flickr30k-images")
    rows = [{"filename": f"{n}.png", "caption": f"square {n}", "negative_caption": f"circle {n}"} for n in range(8)]
    (folder / "sugarcrepe" / "data" / "swap_att.json").write_text(json.dumps(rows))
    model = OpenCLIPDualEncoder("tiny-vit")
    train, val = (
        ImageTextDataset.from_karpathy("dataset_flickr30k.json", "flickr30k-images", split, **model.transforms)
        for split in ("train", "val")
    )
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False)
    return {"model": model, "train": train, "val": val, "trainer": trainer}
