"""Read the forms in which people have images and texts into two lists: the paths, and the texts of each."""

from lightning_itm.data.readers.captions import ImagesAndTexts
from lightning_itm.data.readers.flatten import flatten_texts
from lightning_itm.data.readers.folders import read_folder
from lightning_itm.data.readers.huggingface import read_huggingface
from lightning_itm.data.readers.json_files import read_json, read_karpathy
from lightning_itm.data.readers.tables import read_jsonl, read_table

__all__ = [
    "ImagesAndTexts",
    "flatten_texts",
    "read_folder",
    "read_huggingface",
    "read_json",
    "read_jsonl",
    "read_karpathy",
    "read_table",
]
