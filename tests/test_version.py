import re
from pathlib import Path

import lightning_itm


def test_the_version_is_one():
    """`pyproject.toml` says it, the installed package has it, and a citation names it."""
    root = Path(__file__).parents[1]
    declared = re.search(r'^version = "(.*)"$', (root / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]
    cited = re.search(r"^version: (.*)$", (root / "CITATION.cff").read_text(), flags=re.MULTILINE)[1]
    assert lightning_itm.__version__ == declared == cited
