"""Import examples/emoji_from_scratch.py, whose emoji and small CLIP several of these scripts use."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "emoji_from_scratch.py"


def load_example() -> Any:
    """Import it by its path: the folder of examples is no package."""
    sys.path.insert(0, str(EXAMPLE.parent))  # it imports emoji_data
    spec = importlib.util.spec_from_file_location("emoji_from_scratch", EXAMPLE)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["emoji_from_scratch"] = module
    spec.loader.exec_module(module)
    return module
