"""Turn the notebooks of ``docs/tutorials`` into pages of the site, with their outputs and pictures.

MkDocs takes it as a hook (``mkdocs.yml``). Nothing is executed. The pages are Markdown, so links are checked, the search finds
their words, and nothing is loaded from elsewhere.
"""

import base64
import json
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, and its pictures. The notebook stays beside it, to be downloaded."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            notebook = json.loads(Path(str(file.abs_src_path)).read_text(encoding="utf-8"))
            page, pictures = to_markdown(notebook, PurePosixPath(file.src_uri).stem)
            files.append(File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=page))
            folder = str(PurePosixPath(file.src_uri).parent)
            for name, content in pictures.items():
                files.append(File.generated(config, f"{folder}/{name}", content=content))
    return files


def to_markdown(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook in Markdown, and its pictures by file name.

    Args:
        notebook: What is in the file.
        stem: The name of the file without its ending, with which the names of the pictures begin.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace(".ipynb)", ".md)"))  # in a folder of notebooks they link to each other
            continue
        parts.append(f"```python\n{source}\n```")
        texts = [text for output in cell["outputs"] if (text := _text(output))]
        if texts:
            parts.append(f'```{{ .text .no-copy title="Output" }}\n{chr(10).join(texts)}\n```')
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                name = f"{stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(output["data"]["image/png"]))
                parts.append(f"![{cell['metadata']['alt']}]({name})")
    title, *others = parts
    download = f"[Download this notebook]({stem}.ipynb), or read on."
    heading, _, text = title.partition("\n")
    return "\n\n".join([heading, download, text.strip(), *others]) + "\n", pictures


def _text(output: dict[str, Any]) -> str:
    """Return what a cell has printed, or its last value. Of a picture, nothing."""
    return "".join(output.get("text") or output["data"].get("text/plain", "")).rstrip()
