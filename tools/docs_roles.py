"""Turn the reStructuredText in docstrings into what MkDocs renders: cross-references, equations as MathML, and doctest blocks.

MkDocs takes it as an extension of griffe (``mkdocs.yml``).
"""

import re
from collections.abc import Iterator
from typing import Any

import griffe
from latex2mathml.converter import convert

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc|obj):`(~?)([^`<]+?)`")
INLINE_MATH = re.compile(r":math:`([^`]+)`")
BLOCK_MATH = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +\S.*|[ ]*(?=\n\1 +\S)))*)", re.MULTILINE)


def to_markdown(text: str, names: set[str]) -> str:
    """Return a docstring in Markdown.

    Args:
        text: The docstring in reStructuredText.
        names: The full names of what has a place on an API page. Others are shown without a link.
    """

    def reference(match: re.Match[str]) -> str:
        short, name = match[1] == "~", match[2]
        shown = name.rpartition(".")[2] if short else name
        return f"[`{shown}`][{name}]" if name in names else f"`{shown}`"

    def block(match: re.Match[str]) -> str:
        equation = " ".join(match[2].split())
        return f"{match[1]}{convert(equation, display='block')}"

    text = text.replace("Example:\n", "Examples:\n")  # the section that griffe reads as code
    text = BLOCK_MATH.sub(block, text)
    text = INLINE_MATH.sub(lambda match: convert(match[1]), text)
    return ROLE.sub(reference, text).replace("``", "`")


class Roles(griffe.Extension):
    """Convert each docstring once it was read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Convert all docstrings of the package, when all names are known."""
        names = set(_public_names(pkg))
        for one in _objects(pkg):
            if one.docstring is not None:
                one.docstring.value = to_markdown(one.docstring.value, names)


def _objects(parent: griffe.Object) -> Iterator[griffe.Object]:
    yield parent
    for member in parent.members.values():
        if isinstance(member, griffe.Object):  # an alias is seen where it is defined
            yield from _objects(member)


def _public_names(pkg: griffe.Module) -> Iterator[str]:
    """Yield the names under which the rooms export things."""
    for room in [pkg, *(member for member in pkg.members.values() if isinstance(member, griffe.Module))]:
        yield from (f"{room.path}.{name}" for name in room.exports or ())
