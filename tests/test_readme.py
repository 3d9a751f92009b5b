"""README.md documents every command, option, element, attribute and exit code, and no other."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

import sgsync
from support import homes

README = homes.SCRIPT.with_name("README.md").read_text(encoding="utf-8")
MAKEFILE = homes.SCRIPT.with_name("Makefile").read_text(encoding="utf-8")


def sections() -> dict[str, str]:
    """Heading -> what stands below it, down to the next heading of any level."""
    prose = re.sub(r"(?ms)^```.*?^```$", lambda m: m[0].replace("\n#", "\n #"), README)
    parts = re.split(r"(?m)^#{1,6} +(.+)$", prose)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def table(text: str, heading: str) -> dict[str, list[str]]:
    """The rows of the tables that begin with `heading`: each word in its first cell -> cells."""
    rows: dict[str, list[str]] = {}
    for found in re.findall(rf"(?m)^\| {heading} \|.*\n\|[-| ]+\n((?:\|.*\n)+)", text + "\n"):
        for line in found.splitlines():
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
            for word in re.findall(r"`([^`]+)`", cells[0]) or [cells[0]]:
                rows[word] = cells
    return rows


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Command -> its parser; '' is the one of all."""
    parser = sgsync.build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {"": parser, **commands.choices}


ELEMENTS = {tag: cls.attributes() for tag, (cls, _) in sgsync.ELEMENTS.items() if cls is not None}


def section_of(tag: str) -> str:
    found = [text for heading, text in sections().items() if f"`<{tag}>`" in heading]
    assert found, f"README.md has no section about <{tag}>: a heading with `<{tag}>`"
    return found[0]


def test_readme_names_every_command() -> None:
    documented = {words.split()[0] for words in table(README, "command")}
    assert documented == set(sgsync.COMMANDS) == set(parsers()) - {""}


@pytest.mark.parametrize("command", sorted(parsers()))
def test_readme_names_every_option(command: str) -> None:
    documented = {words.split()[0]: cells for words, cells in table(README, "option").items()}
    options = [option for action in parsers()[command]._actions for option in action.option_strings]
    missing = [option for option in options if option != "-h" and option not in documented]
    assert not missing, f"no row in the table of options: {missing}"
    ours = {option for parser in parsers().values() for option in parser._option_string_actions}
    assert not set(documented) - ours, "options that do not exist"


def test_readme_names_every_element() -> None:
    missing = [tag for tag in sgsync.ELEMENTS if f"`<{tag}>`" not in README]
    assert not missing


@pytest.mark.parametrize("tag", ELEMENTS)
def test_readme_names_every_attribute(tag: str) -> None:
    documented = table(section_of(tag), "attribute")
    missing = [name for name in ELEMENTS[tag] if name not in documented]
    assert not missing, f"no row in the table of <{tag}>: {missing}"
    assert not set(documented) - set(ELEMENTS[tag]), "attributes that do not exist"


@pytest.mark.parametrize("tag", ELEMENTS)
def test_readme_names_every_default(tag: str) -> None:
    documented = table(section_of(tag), "attribute")
    for name, field in ELEMENTS[tag].items():
        told, default = documented[name][1], field.metadata["default"]
        if default is sgsync.REQUIRED:
            assert told == "required", name
        elif default:
            assert told == f"`{default}`", name
        else:
            assert told != "required", name


def test_readme_names_every_exit_code() -> None:
    errors = [sgsync.Error, *sgsync.Error.__subclasses__()]
    codes = {error.exit_code for error in errors} | {0, sgsync.ROWS_FAILED, sgsync.INTERRUPTED}
    assert set(table(README, "code")) >= {str(code) for code in codes}
    assert set(table(sections()["Exit codes"], "code")) == {str(code) for code in codes}


def test_readme_links_to_sections_that_exist() -> None:
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in sections()}
    missing = [link for link in re.findall(r"\]\(#([^)]+)\)", README) if link not in anchors]
    assert not missing


def test_readme_names_targets_that_exist() -> None:
    targets = set(re.findall(r"(?m)^([a-z]+):", MAKEFILE))
    named = set(re.findall(r"`make ([a-z]+)", README)) | set(
        re.findall(r"(?m)^(?:\$ )?make ([a-z]+)$", README)
    )
    assert {"demo"} <= named <= targets


def test_readme_names_tests_that_exist() -> None:
    """The promises name the tests that keep them."""
    sources = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    known = {name for source in sources for name in re.findall(r"(?m)^def (test_\w+)", source)}
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 10
    assert named <= known
