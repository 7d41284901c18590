"""A data set in Karpathy's format, of twenty real photographs that come inside scikit-image."""

import json

from PIL import Image
from skimage import data

SUBJECTS = {
    "astronaut": data.astronaut,
    "cat": data.chelsea,
    "cup of coffee": data.coffee,
    "rocket": data.rocket,
}
SPLITS = ["train", "train", "restval", "val", "test"]


def write_karpathy(folder, *, style="coco"):
    """Write ``dataset.json`` and the pictures: four photographs in five crops each, five sentences an image.

    COCO's has ``filepath``, ``cocoid`` and ``restval``; Flickr's has none of them, and all files in one folder.
    """
    images, sentence_id = [], 0
    for number in range(20):
        subject = list(SUBJECTS)[number % 4]
        split = SPLITS[number // 4]
        if style == "flickr" and split == "restval":
            split = "train"
        entry = {"imgid": number, "split": split, "filename": f"{number:012d}.jpg"}
        if style == "coco":
            entry["filepath"] = "val2014" if split != "train" else "train2014"
            entry["cocoid"] = 1000 + number
        crop = Image.fromarray(SUBJECTS[subject]()[: 200 + 20 * (number // 4), 10 * (number // 4) : 260])
        path = folder / entry.get("filepath", "") / entry["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        crop.save(path)
        raws = [f"A {subject}, crop {number // 4}, sentence {k}." for k in range(5)]
        entry["sentids"] = list(range(sentence_id, sentence_id + 5))
        entry["sentences"] = [
            {"tokens": raw.lower().strip(".").split(), "raw": raw, "imgid": number, "sentid": sentence_id + k}
            for k, raw in enumerate(raws)
        ]
        sentence_id += 5
        images.append(entry)
    (folder / "dataset.json").write_text(json.dumps({"images": images, "dataset": style}))
    return folder / "dataset.json"
