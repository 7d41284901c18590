"""Write the API pages of the site: one page per room, with what it exports.

    python tools/docs_api.py

A test compares the pages with the rooms, so that no name is missing.
"""

import importlib
from pathlib import Path

ROOMS = {
    "models": ("Models", "What trains: LightningModules for two towers."),
    "losses": ("Losses", "What is punished. A loss is called as `loss(pairs, candidates)`."),
    "callbacks": ("Callbacks", "Attach them to a Trainer."),
    "data": ("Data", "What a batch is, and how it is read."),
    "data.shards": ("Shards", "Tar shards: written, read by number, and streamed."),
    "metrics": ("Metrics", "What is measured."),
    "mining": ("Mining", "The parts of `OfflineHardNegativeMining`."),
    "memory_bank": ("Memory bank", "The parts of `FalseNegativeElimination`."),
    "export": ("Export", "A way out: open_clip's and Hugging Face's folders, and ONNX."),
    "standalone": ("Without a Trainer", "Mining for Fabric, plain PyTorch and sentence-transformers."),
    "data.compositional": ("Compositional tests", "An image, its caption and a wrong one, in SugarCrepe's form."),
    "functional": ("Functions", "Mathematics: tensors in, tensors out."),
}


def page(room: str) -> str:
    """Return the page of a room in Markdown."""
    title, words = ROOMS[room]
    module = importlib.import_module(f"lightning_itm.{room}")
    if room == "data":  # shards have a page of their own
        names = sorted(set(module.__all__) - set(importlib.import_module("lightning_itm.data.shards").__all__))
    else:
        names = sorted(module.__all__)
    entries = "".join(f"\n::: lightning_itm.{room}.{name}\n" for name in names)
    return f"# {title}\n\n{words}\n{entries}"


def main() -> None:
    """Write all pages."""
    for room in ROOMS:
        Path("docs/api", room.rpartition(".")[2] + ".md").write_text(page(room), encoding="utf-8")


if __name__ == "__main__":
    main()
