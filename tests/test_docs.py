"""README.md and docs/ name every command, option, element, attribute and exit code, and no other;
what they link to, quote and promise exists."""

from __future__ import annotations

import argparse
import errno
import os
import re
from pathlib import Path

import pytest

import sgsync
from support import homes

ROOT = homes.SCRIPT.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README, TROUBLESHOOTING = PAGES["README.md"], PAGES["docs/troubleshooting.md"]
ALL = "\n".join(PAGES.values())


def prose(page: str) -> str:
    """A page without its blocks of code and its comments."""
    return re.sub(r"(?ms)^ *```.*?^ *```$|<!--.*?-->", "", page)


def sections(page: str) -> list[tuple[str, str]]:
    """Each heading, and what stands below it down to the next heading of any level."""
    parts = re.split(r"(?m)^#{1,6} +(.+)$", prose(page))
    return list(zip(parts[1::2], parts[2::2], strict=True))


def anchors(page: str) -> set[str]:
    """What a link can lead to, as GitHub derives it from headings; and anchors set by hand."""
    found = set(re.findall(r'<a id="([^"]+)"></a>', page))
    for heading, _ in sections(page):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        assert anchor not in found, f"two headings with the anchor #{anchor}"
        found.add(anchor)
    return found


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


def attributes(tag: str) -> dict[str, list[str]]:
    """The documented attributes of an element -> cells."""
    found = [text for heading, text in sections(PAGES["docs/config.md"]) if f"`<{tag}>`" in heading]
    assert len(found) == 1, f"docs/config.md needs one heading with `<{tag}>`"
    return table(found[0], "attribute")


# ------------------------------------------------------------------ the command line


def test_docs_name_every_command() -> None:
    documented = {words.split()[0] for words in table(prose(README), "command")}
    assert documented == set(sgsync.COMMANDS) == set(parsers()) - {""}


@pytest.mark.parametrize("command", sorted(parsers()))
def test_docs_name_every_option(command: str) -> None:
    documented = {words.split()[0]: cells for words, cells in table(README, "option").items()}
    options = [option for action in parsers()[command]._actions for option in action.option_strings]
    missing = [option for option in options if option != "-h" and option not in documented]
    assert not missing, f"no row in the table of options: {missing}"
    ours = {option for parser in parsers().values() for option in parser._option_string_actions}
    assert not set(documented) - ours, "options that do not exist"


def test_docs_name_every_exit_code() -> None:
    errors = [sgsync.Error, *sgsync.Error.__subclasses__()]
    codes = {error.exit_code for error in errors} | {0, sgsync.ROWS_FAILED}
    assert set(table(README, "code")) == {str(code) for code in codes}


# ------------------------------------------------------------------ config.xml


def test_docs_name_every_element() -> None:
    assert not [tag for tag in sgsync.ELEMENTS if f"`<{tag}>`" not in PAGES["docs/config.md"]]
    headings = "".join(heading for heading, _ in sections(PAGES["docs/config.md"]))
    assert set(re.findall(r"`<(\w+)>`", headings)) == set(ELEMENTS)


@pytest.mark.parametrize("tag", ELEMENTS)
def test_docs_name_every_attribute(tag: str) -> None:
    documented = attributes(tag)
    missing = [name for name in ELEMENTS[tag] if name not in documented]
    assert not missing, f"no row in the table of <{tag}>: {missing}"
    unknown = sorted(set(documented) - set(ELEMENTS[tag]))
    assert not unknown, f"attributes of <{tag}> that do not exist: {unknown}"


@pytest.mark.parametrize("tag", ELEMENTS)
def test_docs_name_every_default(tag: str) -> None:
    documented = attributes(tag)
    for name, field in ELEMENTS[tag].items():
        told, default = documented[name][1], field.metadata["default"]
        if default is sgsync.REQUIRED:
            assert told == "required", name
        elif default:
            assert told == f"`{default}`", name
        else:
            assert told != "required", name


# ------------------------------------------------------------------ what the pages refer to


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("name", PAGES)
def test_docs_link_to_what_exists(name: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)", prose(PAGES[name]))
    broken = []
    for link in links:
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        page = PAGES.get(Path(os.path.relpath(path, ROOT)).as_posix(), "")
        if not path.is_file() or (anchor and anchor not in anchors(page)):
            broken.append(link)
    assert not broken


def test_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/[\w.]+)[)#]", README))
    assert linked == set(PAGES) - {"README.md"}


def test_docs_name_make_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?m)^([a-z]+):.*##", makefile))
    named = set(re.findall(r"`make ([a-z]+)", ALL)) | set(re.findall(r"(?m)^make ([a-z]+)$", ALL))
    assert named == targets - {"help"}


def test_promises_name_tests_that_exist() -> None:
    tests = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    known = {name for source in tests for name in re.findall(r"(?m)^def (test_\w+)", source)}
    promises = dict(sections(PAGES["docs/development.md"]))["Promises and their tests"]
    named = [re.findall(r"`(test_\w+)`", row) for row in promises.splitlines() if "`" in row]
    assert len(named) >= 10
    assert all(named), "a promise without a test"
    assert {name for names in named for name in names} <= known


def test_every_promise_is_linked_once() -> None:
    made = re.findall(r'<a id="(promise-\d+)">', PAGES["docs/development.md"])
    linked = re.findall(r"docs/development\.md#(promise-\d+)", README)
    assert made == linked == [f"promise-{number}" for number in range(1, 11)]


def test_docs_quote_messages_that_exist() -> None:
    """Troubleshooting names each message by its words: here, in a test, or from the system."""
    sources = [homes.SCRIPT, *Path(__file__).parent.glob("test_*.py")]
    text = "".join(p.read_text(encoding="utf-8") for p in sources if p != Path(__file__))
    text = re.sub(r'"\s*\n\s*f?"', "", text)  # one text, written on two lines
    text += os.strerror(errno.ENOSPC) + os.strerror(errno.EACCES)
    headings = re.findall(r"(?m)^\*\*\d+, (.+?)\*\*", TROUBLESHOOTING)
    quoted = [words for heading in headings for words in re.findall(r"`([^`]+)`", heading)]
    assert len(quoted) > 20
    pieces = [piece for words in quoted for piece in re.split(r" ?\.\.\.,? ?| N ", words)]
    elsewhere = ("nothing was written: ", "nothing was uploaded: ", "a real run would be held",
                 "differ only in format", "nothing to do", "not sorted", "no GPA",
                 "no membership days", "only NULL days")  # fmt: skip
    assert not [piece for piece in elsewhere if piece not in ALL]
    assert not [piece for piece in (*pieces, *elsewhere) if piece not in text]
