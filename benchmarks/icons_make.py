"""Make ``icons.npz``, the set of icons that negatives.py and false_negatives.py train on, from 28 open-source icon sets.

    npm install $(python benchmarks/icons_make.py --packages)    # into node_modules, 76 MB
    pip install resvg-py
    python benchmarks/icons_make.py --out ICONS

Each set gives one icon per name, dark on white, 32 × 32 pixels. Words for a style or a size at the end of a name are cut off.
With the versions of November 2026 there are 58,241 icons, pixel by pixel those that our tables are of. The sets have licences
of their own: MIT, Apache-2.0, CC-BY and the like.
"""

import argparse
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

# fmt: off
SETS = (
    "basil", "bi", "bx", "carbon", "eva", "fa-solid", "fa6-solid", "fluent", "game-icons", "healthicons", "heroicons",
    "hugeicons", "ic", "iconamoon", "iconoir", "ion", "line-md", "lucide", "material-symbols", "mdi", "mingcute",
    "octicon", "ph", "ri", "solar", "streamline", "tabler", "uil",
)
STYLES = {
    "outline", "outlined", "filled", "fill", "line", "linear", "bold", "duotone", "thin", "light", "broken",
    "rounded", "round", "sharp", "regular", "solid", "twotone", "lg", "xs",
}
# fmt: on
MAX_CUT = 3  # words at the end of a name
SIDE = 32  # pixels
MIN_CONTRAST = 4.0  # the standard deviation of the pixels: squares of one grey are no icons


class Icon(NamedTuple):
    """A picture `(32, 32)`, its name and its set."""

    picture: np.ndarray[Any, np.dtype[np.uint8]]
    name: str
    set: str


def name_of(key: str) -> str:
    """Return the name as words, without style and size: ``"arrow-up-24-filled"`` is ``"arrow up"``."""
    words = key.split("-")
    for _ in range(MAX_CUT):
        if len(words) > 1 and (words[-1] in STYLES or words[-1].isdigit()):
            words.pop()
    return " ".join(words)


def draw(body: str, left: float, top: float, width: float, height: float) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Draw what is inside an SVG, in grey, `(32, 32)`."""
    import resvg_py

    view, body = f"{left} {top} {width} {height}", body.replace("currentColor", "#000")
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}" width="{SIDE}" height="{SIDE}">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, background="white", skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("L"))


def icons_of(name: str, path: Path) -> Iterator[Icon]:
    """Draw the first icon of each name of a set."""
    content = json.loads(path.read_text())
    seen = set()
    for key, icon in content["icons"].items():
        words = name_of(key)
        if icon.get("hidden") or words in seen or not re.search("[a-z]{2}", words):
            continue
        box = {"left": 0, "top": 0, "width": 16, "height": 16}
        box = {side: icon.get(side, content.get(side, default)) for side, default in box.items()}
        picture = draw(icon["body"], **box)
        if picture.std() >= MIN_CONTRAST:
            seen.add(words)
            yield Icon(picture, words, name)


def main() -> None:
    """Write the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", action="store_true", help="print the names of the packages, and do nothing else")
    parser.add_argument("--node-modules", type=Path, default=Path("node_modules"), help="where npm put them")
    parser.add_argument("--out", type=Path, help="the folder of icons.npz")
    args = parser.parse_args()
    if args.packages:
        print(*(f"@iconify-json/{name}" for name in SETS))
        return
    if args.out is None:
        raise SystemExit("Expected `--out`, the folder of icons.npz, got none.")
    files = {name: args.node_modules / "@iconify-json" / name / "icons.json" for name in SETS}
    if missing := [name for name, path in files.items() if not path.exists()]:
        raise SystemExit(
            f"Expected the icons of {missing} in {args.node_modules}, found none. The first command of `--help` gets them."
        )
    icons = [icon for name, path in files.items() for icon in icons_of(name, path)]
    args.out.mkdir(parents=True, exist_ok=True)
    names, sets = (np.array([icon[place] for icon in icons]) for place in (1, 2))
    np.savez_compressed(args.out / "icons.npz", x=np.stack([icon.picture for icon in icons]), t=names, p=sets)
    print(
        f"{len(icons)} icons of {len(SETS)} sets, {len(set(names.tolist()))} different names: {args.out / 'icons.npz'}"
    )


if __name__ == "__main__":
    main()
