"""Count what makes the prose of the package hard to read, and fail where a count is above its aim.

    python tools/prose.py [--list] [folder or file ...]

It reads docstrings and comments. Six counts have an aim: semicolons in docstrings, "a" in the sense of "per", argument docs
of three words or fewer, argument docs that are no sentence, examples that import nothing, and comments in the code.
``--list`` names each place.
"""

import argparse
import ast
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NODES_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
LAYOUT_TOKENS = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}
DIRECTIVES = ("# type:", "# noqa", "# pragma", "#!")
SHORTEST_ARGUMENT_DOC = 4
FRAGMENT_STARTS = ("Of ", "See ", "As for ", "As in ", "Likewise", "The same", "A guard")
# "one text an image": something counted, then "a" or "an", then what it is counted by.
COUNTED = (
    r"(?:one|two|three|four|five|ten|several|many|few|once|twice|most|\d[\d,]*|"
    r"(?:anchor|byte|candidate|caption|cost|embedding|file|image|key|layer|length|negative|number|pair|place|processe|row|score|"
    r"similaritie|step|string|text|token|value|vector|weight)s?|similarity)"
)
COUNTED_BY = (
    r"(?:anchor|batch|callback|caption|class|direction|entry|epoch|file|group|image|key|layer|line|loader|pair|pixel|place|process|"
    r"query|rank|row|run|sample|second|sentence|set|shard|side|step|text|time|tower|vector|worker)"
)
A_FOR_PER = re.compile(rf"\b{COUNTED}\s+an?\s+{COUNTED_BY}\b", re.IGNORECASE)


@dataclass
class Counts:
    """What was counted, and where each thing stands that should not be there."""

    words: int = 0
    argument_docs: int = 0
    code_lines: int = 0
    comments: int = 0
    semicolons: list[str] = field(default_factory=list)
    a_for_per: list[str] = field(default_factory=list)
    short_docs: list[str] = field(default_factory=list)
    fragments: list[str] = field(default_factory=list)
    bare_examples: list[str] = field(default_factory=list)

    def read(self, path: Path) -> None:
        """Add what one file has."""
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, NODES_WITH_DOCSTRING) and (text := ast.get_docstring(node)):
                self._read_docstring(f"{path}:{getattr(node, 'lineno', 1)}", text)
        self._read_comments(path)

    def _read_docstring(self, where: str, text: str) -> None:
        text = text.replace(r"\;", " ")  # a space in an equation
        self.words += len(re.findall(r"[^\W\d_]+", text))
        self.semicolons += [
            f"{where}: semicolon: {line.strip()}" for line in text.splitlines() for _ in range(line.count(";"))
        ]
        self.a_for_per += [
            f"{where}: 'a' for 'per': {' '.join(found[0].split())}" for found in A_FOR_PER.finditer(text)
        ]
        for name, doc in argument_docs(text):
            self.argument_docs += 1
            place = f"{where}: {name}: {doc}"
            if doc.startswith(FRAGMENT_STARTS):
                self.fragments.append(place)
            if len(doc.split()) < SHORTEST_ARGUMENT_DOC:
                self.short_docs.append(place)
        if ">>>" in text and not re.search(r"^\s*>>> (?:from|import)\s", text, re.MULTILINE):
            self.bare_examples.append(f"{where}: example that imports nothing")

    def _read_comments(self, path: Path) -> None:
        lines: set[int] = set()
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type == tokenize.COMMENT:
                    # A directive speaks to a tool, unless a reason follows it.
                    self.comments += not token.string.startswith(DIRECTIVES) or "#" in token.string[1:]
                elif token.type not in LAYOUT_TOKENS:
                    lines.update(range(token.start[0], token.end[0] + 1))
        self.code_lines += len(lines)

    def verdicts(self) -> Iterator[tuple[str, float, str, bool, list[str]]]:
        """Yield the name of each count, its value, its aim, whether it is met, and the places."""
        semicolons = 1000 * len(self.semicolons) / max(1, self.words)
        short = 100 * len(self.short_docs) / max(1, self.argument_docs)
        comments = 100 * self.comments / max(1, self.code_lines)
        yield "semicolons per 1,000 words of docstrings", semicolons, "at most 2", semicolons <= 2, self.semicolons
        for name, places in (
            ("'a' for 'per'", self.a_for_per),
            ("argument docs that begin as a fragment", self.fragments),
            ("examples that import nothing", self.bare_examples),
        ):
            yield name, len(places), "0", not places, places
        yield "percent of argument docs of three words or fewer", short, "below 5", short < 5, self.short_docs
        yield "comments per 100 lines of code", comments, "at least 4", not self.code_lines or comments >= 4, []


def argument_docs(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the doc of each argument of a docstring in Google's form."""
    section = re.search(r"^Args:\n((?:[ \t]+.*(?:\n|$)|\n)*)", docstring, re.MULTILINE)
    name, doc = "", list[str]()
    for line in section[1].splitlines() if section else ():
        entry = re.match(r" {4}(\*{0,2}\w+)(?: \([^)]*\))?:(.*)", line)
        if entry and name:
            yield name, " ".join(doc)
        if entry:
            name, doc = entry[1], []
        doc += (entry[2] if entry else line).split()
    if name:
        yield name, " ".join(doc)


def python_files(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the files, and those in the folders, in order."""
    for path in paths:
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts. Return 1 if one is above its aim, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, default=[Path("lightning_itm")], metavar="folder or file")
    parser.add_argument("--list", action="store_true", help="name each place")
    options = parser.parse_args(arguments)
    counts = Counts()
    for path in python_files(options.paths):
        counts.read(path)
    all_met = True
    for name, value, aim, is_met, places in counts.verdicts():
        print(f"{'ok  ' if is_met else 'FAIL'} {name}: {value:.3g} (aim: {aim})")
        if options.list:
            print(*(f"     {place}" for place in places), sep="\n" if places else "", end="\n" if places else "")
        all_met &= is_met
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
