"""sgsync.py is one file in six parts and one direction; what holds it together is checked here."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator

import pytest

from support import homes

TEXT = homes.SCRIPT.read_text(encoding="utf-8")
LINES = TEXT.splitlines()
PARTS = ("BASE", "CONFIGURATION", "FORMATS", "CONNECTIONS", "STAGES", "COMMANDS")
LONGEST = 350  # lines of a section


class Section:
    """A banner, and the lines from it to the next."""

    def __init__(self, part: str, title: str, first: int, last: int) -> None:
        self.part, self.title, self.first, self.last = part, title, first, last
        self.names: set[str] = set()
        self.used: set[str] = set()

    def __repr__(self) -> str:
        return f"{self.part}/{self.title}"

    @property
    def kind(self) -> str:
        """What stands before the colon of the title: `stage`, `command`."""
        return self.title.partition(":")[0]


def names_bound(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))
    elif isinstance(node, (ast.If, ast.Try)):
        for inner in [*node.body, *node.orelse]:
            yield from names_bound(inner)


def names_used(node: ast.stmt) -> set[str]:
    """The names that are looked up at the top of the file, without those bound inside `node`."""
    inside = list(ast.walk(node))
    names = [each for each in inside if isinstance(each, ast.Name)]
    bound = {name.id for name in names if not isinstance(name.ctx, ast.Load)}
    bound.update(each.arg for each in inside if isinstance(each, ast.arg))
    return {name.id for name in names} - bound


def sections() -> list[Section]:
    found: list[Section] = []
    part = "HEAD"
    marks = [
        (number, match)
        for number, line in enumerate(LINES, 1)
        if (match := re.fullmatch(r"# (=|-){36} (.+)", line))
    ]
    for (number, match), (following, _) in zip(
        marks, [*marks[1:], (len(LINES) + 1, None)], strict=True
    ):
        if match[1] == "=":
            part = match[2].partition(":")[0]
        else:
            found.append(Section(part, match[2], number, following - 1))
    for node in ast.parse(TEXT).body:
        place = next((s for s in found if s.first <= node.lineno <= s.last), None)
        if place:
            place.names.update(names_bound(node))
            place.used.update(names_used(node))
    return found


SECTIONS = sections()


def test_parts_are_six_in_one_order() -> None:
    parts = list(dict.fromkeys(section.part for section in SECTIONS))
    assert parts == list(PARTS)


def test_docstring_lists_the_parts_and_sections() -> None:
    docstring = ast.get_docstring(ast.parse(TEXT)) or ""
    for section in SECTIONS:
        assert section.part in docstring
        assert section.title.split(": ")[-1] in docstring.replace("\n", " "), section


@pytest.mark.parametrize("section", SECTIONS, ids=repr)
def test_section_is_short_and_its_banner_names_what_is_there(section: Section) -> None:
    assert section.last - section.first < LONGEST
    name = section.title.split(": ")[-1]
    if re.fullmatch(r"\w+", name) and section.kind != name:
        told = {each.lower() for each in section.names}
        assert name.lower() in told or f"run_{name}" in told, f"nothing there is called {name}"
    below = "\n".join(LINES[section.first : section.first + 12])
    for word in ("Given", "Gives", "Raises"):
        assert re.search(rf"(?im)^# .*\b{word}\b", below), f"the banner does not tell: {word}"


def test_no_name_is_used_above_its_part() -> None:
    order = {part: number for number, part in enumerate(PARTS)}
    owner = {name: section for section in SECTIONS for name in section.names}
    wrong = sorted(
        f"{section} uses {name} of {owner[name]}"
        for section in SECTIONS
        for name in section.used
        if name in owner
        and order[owner[name].part] > order[section.part]
        and not hasattr(builtins, name)
    )
    assert not wrong


def test_no_private_name_crosses_a_section() -> None:
    owner = {name: section for section in SECTIONS for name in section.names}
    wrong = sorted(
        f"{section} uses {name} of {owner[name]}"
        for section in SECTIONS
        for name in section.used
        if name.startswith("_") and name in owner and owner[name] is not section
    )
    assert not wrong


@pytest.mark.parametrize("kind", ["stage", "command"])
def test_only_commands_connect_stages(kind: str) -> None:
    """No stage uses another stage, no command another command."""
    owner = {name: section for section in SECTIONS for name in section.names}
    wrong = sorted(
        f"{section} uses {name} of {owner[name]}"
        for section in SECTIONS
        for name in section.used
        if section.kind == kind and name in owner
        and owner[name].kind == kind and owner[name] is not section
        and not (name.isupper() or name.istitle())
    )  # fmt: skip
    assert not wrong
