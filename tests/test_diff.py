"""The diff: applied to B it gives A, whatever the files look like; or the files are refused.

The oracle is `expected_changes`: csv.reader and dicts.  The golden cases in data/diff/ run through
the command line: `a.csv b.csv` and the words of `args`, compared with `expected.csv` (standard
output), `expected.err` (standard error) and `code`, all to the byte.
"""

from __future__ import annotations

import csv
import decimal
import io
import itertools
import os
import random
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sgsync
from test_csv import CHARACTERS, spell

SCRIPT = Path(sgsync.__file__).resolve()
CASES = Path(__file__).parent / "data" / "diff"
Rows = list[list[str]]
KeyOf = Callable[[Sequence[str]], tuple[object, ...]]

BLOCK_SIZES = (1, 7, 64, 300, sgsync.BLOCK_BYTES)
SORT_SIZES = (1, 50, sgsync.SORT_BYTES)
NUMBERS = ("0", "1", "01", "-1", "-01", "2", "10", "9", "-10", "007", "7", "-0", "100000000000000")
block_sizes = st.sampled_from(BLOCK_SIZES)
# How both sides are written (see `spell`): at will, or alike, all quoted or only what must be.
line_ends = st.sampled_from(["", "\r\n", "\n"])
seeds_of_both = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)) | st.sampled_from(
    [(0, 7), (1, 8), (1, 0)]
)
fields = st.text(CHARACTERS, max_size=3) | st.sampled_from(["", "a", "b", "1"])


# ------------------------------------------------------------------ the oracle


def key_of(columns: Sequence[str], key: str | None) -> KeyOf:
    """A row's key as the issue defines it: texts by code point, `:int` by number."""
    names = key.split(",") if key else list(columns)
    parts = [
        (columns.index(name.removesuffix(":int")), int if name.endswith(":int") else str)
        for name in names
    ]
    return lambda row: tuple(kind(row[index]) for index, kind in parts)


def expected_changes(source: bytes, database: bytes, key: str | None) -> Rows:
    """The diff by csv.reader and dicts."""
    sides = []
    for data in (source, database):
        text = io.StringIO(data.decode("utf-8-sig"), newline="")
        header, *rows = [row or [""] for row in csv.reader(text, strict=True)]
        sides.append({key_of(header, key)(row): row for row in rows})
    ours, theirs = sides
    nothing = [""] * len(header)
    changes = [["operation", *(f"before_{n}" for n in header), *(f"after_{n}" for n in header)]]
    for each in sorted(ours.keys() | theirs.keys()):
        before, after = theirs.get(each, nothing), ours.get(each, nothing)
        if each not in theirs:
            changes.append(["insert", *before, *after])
        elif each not in ours:
            changes.append(["delete", *before, *after])
        elif before != after:
            changes.append(["update", *before, *after])
    return changes


def apply_changes(changes: Rows, rows: Rows) -> Rows:
    """What the procedures would make of `rows`; every `before` must be there."""
    width, left = len(changes[0]) // 2, [tuple(row) for row in rows]
    for operation, *values in changes[1:]:
        before, after = tuple(values[:width]), tuple(values[width:])
        if operation != "insert":
            left.remove(before)
        if operation != "delete":
            assert after not in left
            left.append(after)
    return [list(row) for row in left]


def compare(
    source: Path, database: Path, key: str | None = None, **options: object
) -> tuple[Rows, sgsync.Comparison]:
    """sgsync's diff of two files."""
    names = tuple(key.split(",")) if key else None
    spec = sgsync.SqlDiff(file="iep.csv", key=names, **options)
    with io.BytesIO() as changes:
        counts = sgsync.diff(source, database, changes, spec)
        data = changes.getvalue()
    rows = list(csv.reader(io.StringIO(data.decode(), newline=""), strict=True))
    found = [row[0] for row in rows[1:]]
    assert [found.count(o) for o in ("insert", "update", "delete")] == [
        counts.insert,
        counts.update,
        counts.delete,
    ]
    return rows, counts


def sizes(block: int, sort: int = sgsync.SORT_BYTES) -> mock._patch:
    near = min(sgsync.NEAR_BYTES, block)
    return mock.patch.multiple(sgsync, BLOCK_BYTES=block, NEAR_BYTES=near, SORT_BYTES=sort)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files for all examples of a property: SameGoal's and the database's."""
    folder = tmp_path_factory.mktemp("diff")
    for side in ("ia", "ic"):
        (folder / side).mkdir()
    return folder / "ia" / "iep.csv", folder / "ic" / "iep.csv"


# ------------------------------------------------------------------ properties

KEYS = {  # columns -> keys worth trying
    1: (None, "a", "a:int"),
    2: (None, "a", "b", "b,a", "a:int", "b:int", "a,b:int"),
    3: (None, "a", "a,b", "b", "c,a", "a,b,c", "c,b,a", "b:int,c", "a,c:int", "a:int,b:int,c:int"),
}


@st.composite
def tables(draw: st.DrawFn) -> tuple[str | None, Rows, Rows]:
    """A key and the rows of both sides, ascending, with many equal stretches."""
    width = draw(st.integers(1, 3))
    key = draw(st.sampled_from(KEYS[width]))
    numeric = [f"{name}:int" in (key or "").split(",") for name in "abc"[:width]]
    row = st.tuples(*(st.sampled_from(NUMBERS) if number else fields for number in numeric))
    of = key_of("abc", key or ",".join("abc"[:width]))
    pool = draw(
        st.lists(
            st.tuples(row, row, st.sampled_from(("equal",) * 5 + ("ours", "theirs", "differ"))),
            max_size=14,
            unique_by=lambda drawn: of(drawn[0]),
        )
    )
    sides: tuple[Rows, Rows] = [], []
    keyed = {name.removesuffix(":int") for name in (key or "a,b,c").split(",")}
    for first, second, where in sorted(pool, key=lambda drawn: of(drawn[0])):
        other = [
            one if name in keyed and not (number and int(one) == int(two)) else two
            for name, number, one, two in zip("abc", numeric, first, second, strict=False)
        ]
        if where != "theirs":
            sides[0].append(list(first))
        if where != "ours":
            sides[1].append(other if where == "differ" else list(first))
    return key, *sides


@settings(max_examples=600)
@given(
    table=tables(),
    seeds=seeds_of_both,
    line_end=line_ends,
    block=block_sizes,
    shuffle=st.none() | st.tuples(st.integers(0, 10**6), st.sampled_from(SORT_SIZES)),
)
def test_diff_applied_to_b_gives_a(
    files: tuple[Path, Path],
    table: tuple[str | None, Rows, Rows],
    seeds: tuple[int, int],
    line_end: str,
    block: int,
    shuffle: tuple[int, int] | None,
) -> None:
    key, ours, theirs = table
    width = len((ours or theirs or [["", ""]])[0])
    header = list("abc"[:width])
    if key and not {name[0] for name in key.split(",")} <= set(header):
        key = None
    if shuffle:
        for rows in (ours, theirs):
            random.Random(shuffle[0]).shuffle(rows)
    data = [
        ("\ufeff" * (seed % 3 == 0) + spell([header, *rows], seed, line_end)).encode()
        for seed, rows in zip(seeds, (ours, theirs), strict=True)
    ]
    for path, content in zip(files, data, strict=True):
        path.write_bytes(content)
    with sizes(block, shuffle[1] if shuffle else sgsync.SORT_BYTES):
        changes, counts = compare(*files, key, sort=bool(shuffle))
    assert changes == expected_changes(*data, key)
    assert (counts.source_rows, counts.target_rows) == (len(ours), len(theirs))
    assert sorted(apply_changes(changes, theirs)) == sorted(ours)


def violation(path: Path, rows: Rows, columns: str, key: str | None) -> str | None:
    """The message on the first two rows of a file that do not ascend."""
    of, line = key_of(columns, key), 2
    names = [name.removesuffix(":int") for name in (key or ",".join(columns)).split(",")]

    def show(row: Sequence[str]) -> str:
        return ", ".join(f"{n}={sgsync.one_line(row[columns.index(n)])}" for n in names)

    shown = f"{path.parent.name}/{path.name}"
    for before, row in itertools.pairwise(rows):
        next_line = line + 1 + sum(field.count("\n") for field in before)
        if of(before) == of(row):
            return (
                f"{shown}:{next_line}: lines {line} and {next_line} have the same key {show(row)}\n"
                "Try: add the column that tells them apart to the key, or return only one row per "
                "key"
            )
        if not of(before) < of(row):
            return (
                f"{shown}:{next_line}: not sorted: line {line} has the key {show(before)}, "
                f"line {next_line} has {show(row)}\n"
                "Try: sort by the key, compared as code points (on SQL Server: ORDER BY ... "
                'COLLATE Latin1_General_BIN2), or set sort="true" (for diff: --sort)'
            )
        line = next_line
    return None


@st.composite
def disorders(draw: st.DrawFn) -> tuple[str | None, Rows, Rows]:
    """A key and two sides of which one or both may not ascend, long equal stretches included."""
    key = draw(st.sampled_from([None, "a", "b", "a,b", "b,a", "a:int", "b:int,a"]))
    number = st.sampled_from(NUMBERS)
    text = st.sampled_from(["a", "b", "ab", "a\nb", "\n", "\uffff", "\U00010000", "\x01", ""])
    columns = [number if f"{name}:int" in (key or "") else text for name in "ab"]
    rows = draw(st.lists(st.tuples(*columns, st.sampled_from(["", "x", "y\n"])), max_size=10))
    ours = [list(row) for row in rows]
    if draw(st.booleans()):
        ours = list({key_of("abc", key)(row): row for row in ours}.values())
        ours.sort(key=key_of("abc", key))
    theirs = list(ours)
    for _ in range(draw(st.integers(0, 3))):
        index = draw(st.integers(0, max(len(theirs) - 1, 0)))
        what = draw(st.sampled_from(["drop", "swap", "twice", "far", "new"]))
        if what == "new" or not theirs:
            theirs.insert(index, [draw(column) for column in columns] + [""])
        elif what == "drop":
            del theirs[index]
        elif what == "swap":
            theirs[index : index + 2] = theirs[index : index + 2][::-1]
        elif what == "twice":
            theirs.insert(index, theirs[index])
        else:
            theirs.append(theirs.pop(index))
    return (key, ours, theirs) if draw(st.booleans()) else (key, theirs, ours)


@settings(max_examples=600)
@given(
    disorder=disorders(),
    seeds=seeds_of_both,
    line_end=line_ends,
    block=block_sizes,
)
def test_diff_refuses_what_does_not_ascend_on_either_side(
    files: tuple[Path, Path],
    disorder: tuple[str | None, Rows, Rows],
    seeds: tuple[int, int],
    line_end: str,
    block: int,
) -> None:
    key, *sides = disorder
    data = [
        spell([list("abc"), *rows], seed, line_end).encode()
        for rows, seed in zip(sides, seeds, strict=True)
    ]
    for path, content in zip(files, data, strict=True):
        path.write_bytes(content)
    problems = {violation(path, rows, "abc", key) for path, rows in zip(files, sides, strict=True)}
    with sizes(block):
        if problems == {None}:
            assert compare(*files, key)[0] == expected_changes(*data, key)
        else:
            with pytest.raises(sgsync.DataError) as caught:
                compare(*files, key)
            assert str(caught.value) in problems


def pass_all(rows: sgsync.OrderedRows, size: int) -> None:
    while rows.fill():
        rows.take(rows.ahead(size))


@settings(max_examples=150)
@given(
    rows=st.lists(st.tuples(fields, fields, st.sampled_from(NUMBERS)), min_size=1, max_size=12),
    key=st.sampled_from([None, "a", "b", "b,a", "c:int", "c:int,a"]),
    seed=st.integers(0, 10**6),
    block=block_sizes,
    run=st.sampled_from(SORT_SIZES),
)
def test_sorted_blocks_are_what_python_sorts(
    files: tuple[Path, Path],
    rows: list[tuple[str, str, str]],
    key: str | None,
    seed: int,
    block: int,
    run: int,
) -> None:
    path, of = files[0], key_of("abc", key)
    text = spell([list("abc"), *rows], seed)
    path.write_bytes(text.encode())
    with sizes(block, run), sgsync.CsvFile(path) as file:
        found = sgsync.Key(key.split(",") if key else None, file.columns, "ic/iep.csv")
        blocks = list(sgsync.Sorter(file, found).blocks())
        joined = b"".join(block.data for block in blocks)
        in_order = [sgsync.decode_row(row) for row in joined[:-1].split(b"\n")]
        assert sorted(in_order) == sorted(rows)
        assert list(map(of, in_order)) == sorted(map(of, rows))
        lines: dict[object, int] = {}
        line, twice = 2, set()
        for row in rows:
            if of(row) in lines:
                twice.add((of(row), lines[of(row)], line))
            lines.setdefault(of(row), line)
            line += 1 + sum(field.count("\n") for field in row)
        if twice:
            ordered = sgsync.OrderedRows(file, found, iter(blocks))
            with pytest.raises(sgsync.DataError) as caught:
                pass_all(ordered, block)
            _, line_before, line = min(twice)
            start = f"iep.csv:{line}: lines {line_before} and {line} have the same key "
            assert str(caught.value).startswith(start)
    assert sorted(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("block", [1, 64])
def test_sorted_blocks_order_a_line_break_among_control_characters(
    files: tuple[Path, Path], block: int
) -> None:
    ascending = ["a", "a\t", "a\t\n", "a\n", "a\n\x0b", "a\x0b", "a\x0b\x01", "a\x0b\x02", "a\x0c"]
    assert ascending == sorted(ascending)
    rows = [[text, text] for text in ascending]
    for path, end in zip(files, ("\r\n", "\n"), strict=True):
        path.write_text(spell([["a", "b"], *rows[::-1]], 1, end), newline="")
    for key in ("a", "b,a", None):
        with sizes(block, sort=1), sgsync.CsvFile(files[0]) as file:
            found = sgsync.Key(key.split(",") if key else None, ("a", "b"), "")
            blocks = sgsync.Sorter(file, found).blocks()
            data = b"".join(block.data for block in blocks)
            found = [list(sgsync.decode_row(row)) for row in data[:-1].split(b"\n")]
            assert found == rows
            assert len(compare(*files, key, sort=True)[0]) == 1


@settings(max_examples=150)
@given(
    table=tables(),
    blanks=st.lists(st.sampled_from(["", " ", "   "]), min_size=1),
    nulls=st.lists(st.booleans(), min_size=1),
    block=block_sizes,
)
def test_diff_sees_no_difference_in_blanks_and_null_texts(
    files: tuple[Path, Path],
    table: tuple[str | None, Rows, Rows],
    blanks: list[str],
    nulls: list[bool],
    block: int,
) -> None:
    _, rows, _ = table
    rows = sorted({tuple(field.rstrip(" ") for field in row) for row in rows if "NULL" not in row})
    header = list("abc"[: len(rows[0]) if rows else 2])
    count = 0

    def disguised(field: str) -> str:
        nonlocal count
        count += 1
        null = "NULL" if not field and nulls[count % len(nulls)] else field
        return null + blanks[count % len(blanks)]

    files[0].write_text(spell([header, *rows], 1), encoding="utf-8", newline="")
    worn = [[disguised(field) for field in row] for row in rows]
    files[1].write_text(spell([header, *worn], 2), encoding="utf-8", newline="")
    with sizes(block):
        changes, counts = compare(*files, trim=True, null_text="NULL")
    assert (len(changes), counts.source_rows, counts.target_rows) == (1, len(rows), len(rows))


# ------------------------------------------------------------------ order and keys, to the line


def write(path: Path, *rows: str, end: str = "\r\n") -> None:
    path.write_text("".join(row + end for row in rows), encoding="utf-8", newline="")


@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("at", range(5))
def test_diff_names_both_lines_of_a_disorder_inside_and_around_equal_stretches(
    files: tuple[Path, Path], side: int, at: int, block: int
) -> None:
    good = ["1,x", '2,"a\nb"', "3,y", '4,""', "5,z"]
    bad = [*good[:at], '0,"\n"', *good[at:]]
    for index, path in enumerate(files):
        write(path, "id,name", *(bad if index == side else good))
    with sizes(block):
        if at == 0:
            assert len(compare(*files, "id")[0]) == 2
            return
        with pytest.raises(sgsync.DataError) as caught:
            compare(*files, "id")
    before = [2, 3, 5, 6, 7][at - 1]
    line = [3, 5, 6, 7, 8][at - 1]
    shown = f"{('ia', 'ic')[side]}/iep.csv"
    assert caught.value.message == (
        f"{shown}:{line}: not sorted: line {before} has the key id={at}, line {line} has id=0"
    )


@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("at", range(1, 6))
@pytest.mark.parametrize("sort", [False, True])
def test_diff_names_both_lines_of_a_key_that_stands_there_twice(
    files: tuple[Path, Path], side: int, at: int, sort: bool, block: int
) -> None:
    good = ["1,x", '2,"a\nb"', "3,y", '4,""', "5,z"]
    twice = [*good[:at], f"{at},again", *good[at:]]
    for index, path in enumerate(files):
        write(path, "id,name", *(twice if index == side else good))
    with sizes(block, sort=64), pytest.raises(sgsync.DataError) as caught:
        compare(*files, "id", sort=sort)
    before = [2, 3, 5, 6, 7][at - 1]
    line = [3, 5, 6, 7, 8][at - 1]
    shown = f"{('ia', 'ic')[side]}/iep.csv"
    assert caught.value.message == (
        f"{shown}:{line}: lines {before} and {line} have the same key id={at}"
    )


@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("other", [["1,0,x"], ["1,0,x", '2,"\n",y', "3,1,z"], []])
def test_diff_names_the_line_of_a_key_that_is_no_number(
    files: tuple[Path, Path], side: int, sort: bool, other: list[str], block: int
) -> None:
    # the bytes of the third row stand inside those of the first, too
    rows = ["10,0,x", '11,"\n",y', ",0,x", "12,0,z"]
    write(files[side], "id,n,name", *rows)
    write(files[1 - side], "id,n,name", *other)
    with sizes(block), pytest.raises(sgsync.DataError) as caught:
        compare(*files, "id:int", sort=sort)
    shown = f"{('ia', 'ic')[side]}/iep.csv"
    assert str(caught.value) == (
        f"{shown}:5: the key id= is not a whole number (:int)\n"
        "Try: correct the value, or drop :int from the key"
    )


def test_diff_refuses_a_single_row_whose_key_is_no_number(files: tuple[Path, Path]) -> None:
    write(files[0], "id,name")
    write(files[1], "id,name", "x,y")
    with pytest.raises(
        sgsync.DataError, match=r"ic/iep\.csv:2: the key id=x is not a whole number"
    ):
        compare(*files, "id:int")


def test_diff_orders_by_code_points_and_by_no_other_order(files: tuple[Path, Path]) -> None:
    """UTF-16 puts U+10000 before U+FFFF, locales put a before B, cp1252 and é are no order here."""
    ascending = ["\t", " ", "-1", "0", "10", "9", "B", "Z", "_", "a", "aB", "aa", "b", "~"]
    ascending += ["\x80", "é", "ǆ", "\u2028", "\ufeff", "\uffff", "\U00010000", "\U0010ffff"]
    assert ascending == sorted(ascending)
    write(files[0], "id,name", *(f"{text},x" for text in ascending))
    write(files[1], "id,name", *(f"{text},y" for text in ascending))
    assert compare(*files, "id")[1].update == len(ascending)
    for i in range(len(ascending) - 1):
        swapped = [*ascending[:i], ascending[i + 1], ascending[i], *ascending[i + 2 :]]
        write(files[1], "id,name", *(f"{text},y" for text in swapped))
        with pytest.raises(sgsync.DataError, match=f"ic/iep.csv:{i + 3}: not sorted: "):
            compare(*files, "id")


def test_diff_orders_a_line_break_before_every_printable_character(
    files: tuple[Path, Path],
) -> None:
    ascending = ["a", "a\t", "a\n", "a\nb", "a\r", "a\r\n", "a ", "ab", "a\xff"]
    assert ascending == sorted(ascending)
    rows = [[text, "x"] for text in ascending]
    files[0].write_text(spell([["id", "n"], *rows], 1), encoding="utf-8", newline="")
    for key in ("id", "id,n", None):
        for dropped in range(len(rows)):
            left = rows[:dropped] + rows[dropped + 1 :]
            files[1].write_text(spell([["id", "n"], *left], 0), encoding="utf-8", newline="")
            assert compare(*files, key)[0][1:] == [["insert", "", "", *rows[dropped]]]


@pytest.mark.parametrize(
    ("ours", "theirs", "what"),
    [
        ("id,name", "id,status", "missing status; unexpected name"),
        ("id", "id,name,status", "missing name, status"),
        ("id,name,x\ny", "id,name", "unexpected x y"),
        ("name,id", "id,name", "another order: column 1 is name, not id"),
        ("id,b,a", "id,a,b", "another order: column 2 is b, not a"),
        ("id,Name", "id,name", "missing name; unexpected Name"),
        ("id,name ", "id,name", "missing name; unexpected name"),
    ],
)
def test_diff_names_the_columns_that_differ(
    files: tuple[Path, Path], ours: str, theirs: str, what: str
) -> None:
    for path, names in zip(files, (ours, theirs), strict=True):
        path.write_text(spell([names.split(",")], 0), newline="")
    with pytest.raises(sgsync.DataError) as caught:
        compare(*files, "id")
    assert str(caught.value) == (
        f"ia/iep.csv:1: the columns differ from those of ic/iep.csv: {what}\n"
        "Try: make the query return the columns of SameGoal's file in the same order, or ask "
        "SameGoal whether the file has changed"
    )


@pytest.mark.parametrize("empty", [0, 1])
def test_diff_refuses_a_file_of_no_bytes(files: tuple[Path, Path], empty: int) -> None:
    write(files[1 - empty], "id,name", "1,x")
    files[empty].write_bytes(b"")
    with pytest.raises(sgsync.DataError) as caught:
        compare(*files, "id")
    shown = ("ia/iep.csv", "ic/iep.csv")[empty]
    assert str(caught.value) == (f"{shown}: is empty: it has no header line\nTry: export it again")


@pytest.mark.parametrize(
    ("text", "separator"),
    [
        ("id;name\n1;Lee\n", "semicolons"),
        ('"id";"name"\n"1";"Lee"\n', "semicolons"),
        ("id\tname\n1\tLee\n", "tabs"),
        ('"id"|"name"\n"1"|"Lee"\n', "vertical bars"),
    ],
)
@pytest.mark.parametrize("side", [0, 1])
def test_diff_names_another_separator_than_commas(
    files: tuple[Path, Path], text: str, separator: str, side: int
) -> None:
    write(files[1 - side], "id,name", "1,Lee")
    files[side].write_text(text, newline="")
    with pytest.raises(sgsync.DataError) as caught:
        compare(*files, "id")
    assert str(caught.value) == (
        f"{('ia', 'ic')[side]}/iep.csv:1: the file is separated by {separator}, not commas: was it "
        "saved by Excel?\nTry: export it again with commas (Excel uses the list separator of the "
        "Windows regional settings)"
    )


def test_diff_takes_a_separator_in_the_name_of_a_single_column(files: tuple[Path, Path]) -> None:
    for path in files:
        write(path, "id;name", "1;Lee")
    assert len(compare(*files)[0]) == 1


# ------------------------------------------------------------------ differences of format


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ("a\r\nb", "a\nb", "breaks"),
        ("a\r\n", "a\n", "breaks"),
        ("a\rb", "a\nb", "breaks"),
        ("a\n", "a", ""),
        ("a ", "a", "blanks"),
        ("", "  ", "blanks"),
        ("a\t", "a", ""),
        ("STRASSE", "straße", "case"),
        ("NULL", "", "null"),
        ("", "\\N", "null"),
        ("NULL", "a", ""),
        ("1.50", "1.5", "number"),
        ("+1", "01", "number"),
        ("-0", "0", "number"),
        (".5", "0.50", "number"),
        ("1e3", "1000", ""),
        ("1", "2", ""),
        ("2026-04-09", "4/9/2026", "date"),
        ("2026-04-09", "04/09/26", "date"),
        ("20260409", "2026/04/09", "date"),
        ("09.04.2026", "2026-04-09T00:00:00", "date"),
        ("2026-04-09 00:00:00.000", "2026-04-09", "date"),
        ("2026-04-09 10:30", "2026-04-09T10:30:00", "date"),
        ("2026-04-09 10:30", "2026-04-09", ""),
        ("04/09/1968", "04/09/68", ""),
        ("04/09/1969", "04/09/69", "date"),
        ("2026-02-30", "02/30/2026", ""),
        ("2026-04-09", "09/04/2026", ""),
        ("2026-04-09", "2026-04-10", ""),
        ("12026-04-09", "2026-04-09", ""),
        ("--------", "2026-04-09", ""),
    ],
)
def test_format_differences_tell_kinds_apart(before: str, after: str, kind: str) -> None:
    assert sgsync.FormatDifferences.kind(before, after) == kind
    assert sgsync.FormatDifferences.kind(after, before) == kind


def test_format_differences_never_advise_a_format_that_strftime_cannot_write(
    files: tuple[Path, Path],
) -> None:
    """10/11/2026 looks padded; 4/9/2026 in the same column shows that it is not."""

    def advice(*dates: tuple[str, str]) -> str:
        write(files[0], "id,start", *(f"{n},{after}" for n, (_, after) in enumerate(dates)))
        write(files[1], "id,start", *(f"{n},{before}" for n, (before, _) in enumerate(dates)))
        (sentence,) = compare(*files, "id")[1].format_differences
        return sentence.split("; ")[1]

    start = "change the query so that start is written as "
    date_type = ' (if the query returns a date type, dateFormat="%m/%d/%Y" does this)'
    padded, unpadded = ("2026-10-11", "10/11/2026"), ("2026-04-09", "4/9/2026")
    assert advice(padded) == f"{start}MM/DD/YYYY instead of YYYY-MM-DD{date_type}"
    for dates in ((padded, unpadded), (unpadded, padded)):
        assert advice(*dates) == f"{start}M/D/YYYY instead of YYYY-MM-DD"
    assert advice(("04/09/2026", "2026-04-09 00:00:00.000")) == (
        f"{start}YYYY-MM-DD hh:mm:ss.000 instead of MM/DD/YYYY"
    )
    assert advice(("04/09/2026", "2026-04-09 00:00:00")) == (
        f"{start}YYYY-MM-DD hh:mm:ss instead of MM/DD/YYYY (if the query returns a date type, "
        'dateFormat="%Y-%m-%d %H:%M:%S" does this)'
    )
    assert advice(("04/9/2026", "4/09/2026")) == f"{start}SameGoal writes it"


def test_format_differences_are_told_of_the_first_updates(files: tuple[Path, Path]) -> None:
    count = sgsync.FormatDifferences.LOOKED_AT
    rows = range(10_000, 10_000 + 2 * count)
    write(files[0], "id,n", *(f"{row},1.50" for row in rows))
    write(files[1], "id,n", *(f"{row},{1.5 if row < 10_000 + count else 2}" for row in rows))
    assert compare(*files, "id")[1].format_differences == [
        f"iep.csv: {count:,} of the first {count:,} updates differ only in format: column n, "
        "number format, as in id=10000: '9.9' in the database, '9.99' from SameGoal; "
        'ignoreNumberFormat="true" on this <SQLDiff> would fix this'
    ]


def test_diff_ignores_formats_in_every_update_and_in_nothing_else(
    files: tuple[Path, Path],
) -> None:
    write(files[0], "id,n,m", *(f"{n},A,1.0" for n in range(1000, 9000)), "9000,A,2", "9001,,")
    write(files[1], "id,n,m", *(f"{n},a,1.00" for n in range(1000, 9000)), "9000,a,3", "9002,,")
    changes, counts = compare(*files, "id", ignore_case=True, ignore_number_format=True)
    assert changes[1:] == [
        ["update", "9000", "a", "3", "9000", "A", "2"],
        ["insert", "", "", "", "9001", "", ""],
        ["delete", "9002", "", "", "", "", ""],
    ]
    assert counts.format_differences == []
    assert compare(*files, "id", ignore_case=True)[1].update == 8001


# ------------------------------------------------------------------ memory


def peak_of_diff(folder: Path, rows: int, tail: str, **options: object) -> tuple[int, int]:
    """The diff of two files of so many rows, a few of which differ: peak memory, smaller file."""
    files = folder / "a.csv", folder / "b.csv"
    for path in files:
        change = "!" if path == files[1] else ""
        with path.open("w", newline="") as file:
            file.write("id,a,b,c,d\r\n")
            for number in range(rows):
                file.write(f"{number:08d},{tail}{change * (number % 333 == 0)}\r\n")
    spec = sgsync.SqlDiff(file="a.csv", key=("id",), **options)
    with (folder / "changes.csv").open("wb") as changes:
        tracemalloc.start()
        try:
            counts = sgsync.diff(*files, changes, spec)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert (counts.source_rows, counts.target_rows) == (rows, rows)
    assert (counts.insert, counts.update, counts.delete) == (0, (rows + 332) // 333, 0)
    return peak, min(path.stat().st_size for path in files)


def test_diff_memory_is_bounded(tmp_path: Path) -> None:
    tail = "2026-01-15,Annual Review,Case manager 790 of the district,LOCKED"
    peak, size = peak_of_diff(tmp_path, 200_000, tail)
    assert peak < 5_000_000 < size / 3


def test_diff_memory_is_bounded_when_it_sorts(tmp_path: Path) -> None:
    with sizes(1 << 16, sort=1 << 19):
        peak, size = peak_of_diff(tmp_path, 12_000, "x," * 3 + "Lorem ipsum " * 90, sort=True)
    assert peak < 2_500_000 < size / 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv", "changes.csv"]


# ------------------------------------------------------------------ the command line


def words(folder: Path) -> list[str]:
    return ["diff", "a.csv", "b.csv", *(folder / "args").read_text(encoding="utf-8").split()]


@pytest.mark.parametrize("name", sorted(path.name for path in CASES.iterdir() if path.is_dir()))
def test_diff_command_golden(
    name: str, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = CASES / name
    monkeypatch.chdir(folder)
    code = sgsync.main(words(folder))
    out, err = capsysbinary.readouterr()
    assert err.decode("utf-8") == (folder / "expected.err").read_text(encoding="utf-8")
    assert out == (folder / "expected.csv").read_bytes()
    assert code == int((folder / "code").read_text())


@pytest.mark.parametrize("name", ["changes", "unsorted-database", "unicode"])
def test_diff_command_golden_as_a_process(name: str) -> None:
    folder = CASES / name
    done = subprocess.run(
        [sys.executable, SCRIPT, *words(folder)],
        capture_output=True, cwd=folder, check=False, timeout=60, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.stderr.decode("ascii").replace(os.linesep, "\n") == (
        (folder / "expected.err").read_text(encoding="utf-8")
    )
    assert done.stdout == (folder / "expected.csv").read_bytes()
    assert done.returncode == int((folder / "code").read_text())


def diff_main(*argv: object) -> int:
    return sgsync.main(["diff", *map(str, argv)])


def test_diff_command_writes_output_whole_or_not_at_all(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    a, b, out = tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "new" / "changes.csv"
    write(a, "id,name", "1,x")
    write(b, "id,name", "1,y")
    assert diff_main(a, b, "--key", "id", "--output", out) == 0
    expected = b"operation,before_id,before_name,after_id,after_name\r\nupdate,1,y,1,x\r\n"
    assert out.read_bytes() == expected
    write(a, "id,name", *(f"{number},x" for number in range(1, 9)), "10,x")
    assert diff_main(a, b, "--key", "id", "--output", out) == 5
    assert out.read_bytes() == expected
    assert list(out.parent.iterdir()) == [out]
    assert diff_main(a, b, "--key", "id", "--output", tmp_path / "other" / "none.csv") == 5
    assert list((tmp_path / "other").iterdir()) == []
    assert capsysbinary.readouterr().out == b""


def test_diff_command_leaves_standard_output_open(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    a, b = tmp_path / "a.csv", tmp_path / "b.csv"
    write(a, "id", "2", "1")
    write(b, "id")
    assert diff_main(a, b) == 5
    write(a, "id", "1")
    capsysbinary.readouterr()
    assert diff_main(a, b) == 0
    out, err = capsysbinary.readouterr()
    assert out == b"operation,before_id,after_id\r\ninsert,,1\r\n"
    assert err == b"1 row, 0 rows: 1 to insert, 0 to update, 0 to delete\n"


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["none.csv", "b.csv"], 2,
         "none.csv: No such file or directory\n    Try: correct the name of the file\n"),
        (["a.csv", "folder"], 2, "folder: is a folder\n    Try: name a CSV file in it\n"),
        (["a.csv", "empty.csv"], 5,
         "empty.csv: is empty: it has no header line\n    Try: export it again\n"),
        (["empty.csv", "b.csv"], 5,
         "empty.csv: is empty: it has no header line\n    Try: export it again\n"),
        (["a.csv", "b.csv", "--key", "id,,name"], 2,
         "--key 'id,,name': has an empty name between its commas\n    Try: --key id,start\n"),
        (["a.csv", "b.csv", "--key", ""], 2, "--key '': is empty\n    Try: --key id,start\n"),
        (["a.csv", "b.csv", "--key", "id,id:int"], 2,
         "--key 'id,id:int': names the column 'id' twice\n    Try: --key id,start\n"),
        (["a.csv", "b.csv", "--output", "folder"], 2,
         "--output folder: is a folder\n    Try: name a file in it\n"),
        (["a.csv", "b.csv", "--output", "b.csv"], 2,
         "--output b.csv: is one of the files compared\n    Try: name another file\n"),
        (["a.csv", "b.csv", "--output", "folder/../a.csv"], 2,
         f"--output {Path('folder/../a.csv')}: is one of the files compared\n"
         "    Try: name another file\n"),
    ],
)  # fmt: skip
def test_diff_command_refuses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
    argv: list[str],
    code: int,
    message: str,
) -> None:
    write(tmp_path / "a.csv", "id,name", "1,x")
    write(tmp_path / "b.csv", "id,name", "1,y")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "folder").mkdir()
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    assert diff_main(*argv) == code
    assert capsysbinary.readouterr() == (b"", message.encode())
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()} == before


def test_diff_command_refuses_a_file_that_it_may_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    write(tmp_path / "a.csv", "id", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.R_OK)  # root may read all
    assert diff_main("a.csv", "a.csv") == 2
    assert capsysbinary.readouterr() == (
        b"", b"a.csv: may not be read\n    Try: let your account read the file\n"
    )  # fmt: skip


def test_diff_command_sorts_files_of_a_folder_that_it_may_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.csv", "id", "2", "1")
    places = []

    def temporary_file(**options: object) -> object:
        places.append(options["dir"])
        return real(**options)

    real = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", temporary_file)
    for mode, place in ((os.R_OK | os.W_OK, tmp_path), (os.R_OK, None)):
        monkeypatch.setattr(os, "access", lambda _, wanted, mode=mode: wanted & mode)
        argv = (tmp_path / "a.csv", tmp_path / "a.csv", "--sort", "--output", tmp_path / "out.csv")
        with sizes(sgsync.BLOCK_BYTES, sort=1):
            assert diff_main(*argv) == 0
        assert places == [place, place]
        places.clear()


def test_diff_command_quiet_prints_no_summary(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    write(tmp_path / "a.csv", "id")
    assert diff_main(tmp_path / "a.csv", tmp_path / "a.csv", "--quiet") == 0
    assert capsysbinary.readouterr() == (b"operation,before_id,after_id\r\n", b"")


def test_diff_command_without_standard_output_wants_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.csv", "id", "1")
    monkeypatch.setattr(sys, "stdout", None)  # as under pythonw
    out = tmp_path / "changes.csv"
    assert diff_main(tmp_path / "a.csv", tmp_path / "a.csv") == 2
    assert diff_main(tmp_path / "a.csv", tmp_path / "a.csv", "--output", out) == 0
    monkeypatch.undo()
    assert capsys.readouterr().err == (
        "there is no standard output\n    Try: name a file with --output\n"
        "1 row, 1 row: 0 to insert, 0 to update, 0 to delete\n"
    )
    assert out.read_bytes() == b"operation,before_id,after_id\r\n"


@pytest.fixture
def many_changes(tmp_path: Path) -> list[str]:
    """The command that lists more changes than a pipe holds."""
    write(tmp_path / "a.csv", "id,name", *(f"{number:06d},x" for number in range(20_000)))
    write(tmp_path / "b.csv", "id,name")
    paths = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
    return [sys.executable, str(SCRIPT), "diff", *paths, "--key", "id"]


def test_diff_command_ends_quietly_when_its_reader_has_enough(many_changes: list[str]) -> None:
    with subprocess.Popen(many_changes, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == (
            b"operation,before_id,before_name,after_id,after_name\r\n"
        )
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_diff_command_says_that_standard_output_is_full(many_changes: list[str]) -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = subprocess.run(
            many_changes, stdout=full, stderr=subprocess.PIPE, check=False, timeout=60
        )
    assert done.stderr.decode() == (
        "standard output: No space left on device\n    Try: see that the disk has space left and "
        "that the account which runs sgsync may write to this folder\n"
    )
    assert done.returncode == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_diff_command_reads_and_writes_named_pipes(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    a, b, out = (tmp_path / name for name in ("a", "b.csv", "out"))
    write(b, "id", "1")
    os.mkfifo(a)
    os.mkfifo(out)
    read: list[bytes] = []
    for content, code, changes in (
        ("id\n1\n2\n", 0, b"operation,before_id,after_id\r\ninsert,,2\r\n"),
        ("", 5, b""),
    ):
        writer = threading.Thread(target=a.write_text, args=(content,), daemon=True)
        reader = threading.Thread(target=lambda: read.append(out.read_bytes()), daemon=True)
        writer.start()
        reader.start()
        assert diff_main(a, b, "--output", out) == code
        writer.join()
        reader.join()
        assert read.pop() == changes
        assert out.is_fifo()
    assert f"{a}: is empty: it has no header line".encode() in capsysbinary.readouterr().err


# ------------------------------------------------------------------ columns and tolerance


def test_diff_ignores_columns_but_keeps_them_in_the_evidence(files: tuple[Path, Path]) -> None:
    write(files[0], "id,a,note,extra", "1,x,new,e", "2,y,same,e", "3,z,n,e")
    write(files[1], "id,old,a,note", "1,o,x,old", "2,o,changed,same")
    rows, found = compare(*files, "id", ignore_columns=("note", "extra", "old"))
    assert rows == [
        ["operation", "before_id", "before_a", "before_note", "after_id", "after_a", "after_note"],
        ["update", "2", "changed", "same", "2", "y", "same"],
        ["insert", "", "", "", "3", "z", "n"],
    ]
    assert (found.columns, found.new_columns) == (("id", "a", "note"), ())


def test_diff_reports_new_columns_and_goes_on(files: tuple[Path, Path]) -> None:
    write(files[0], "id,new one,a", "1,n,x", '2,"n,",y')
    write(files[1], "id,a", "1,x", "2,z")
    with pytest.raises(sgsync.DataError, match="unexpected new one"):
        compare(*files, "id")
    rows, found = compare(*files, "id", new_columns="report")
    assert rows[1:] == [["update", "2", "z", "2", "y"]]
    assert found.new_columns == ("new one",)
    found.sql_diff.calls["update"] = sgsync.Call(procedure="dbo.p")
    told = sgsync.new_columns_warning(found)
    assert told.startswith("iep.csv: SameGoal's file has new columns, which are neither compared")
    assert "d.new one,\nprocedure dbo.p: @new one nvarchar(4000),\ntable: ALTER TABLE" in told
    write(files[0], "x,y", "1,n")
    with pytest.raises(sgsync.DataError, match="its header may be missing"):
        compare(*files, "id", new_columns="report")


def test_diff_names_the_line_behind_a_column_that_is_left_out(files: tuple[Path, Path]) -> None:
    write(files[0], "id,new,a", '1,"n\nn",x', "3,n,x", "2,n,y")
    write(files[1], "id,a", "1,x")
    with pytest.raises(sgsync.DataError, match=r"iep\.csv:5: not sorted: line 4 .* line 5 "):
        compare(*files, "id", new_columns="report")


@pytest.mark.parametrize(
    ("before", "after", "differs"),
    [
        ("3.5", "3.505", False),
        ("3.5", "3.495", False),
        ("3.5", "3.506", True),
        ("-0.001", "0.001", False),
        ("3.5", "", True),
        ("3.5", "A", True),
        ("1e3", "1000", True),
    ],
)
def test_diff_tolerates_numbers_that_are_close(
    files: tuple[Path, Path], before: str, after: str, differs: bool
) -> None:
    write(files[0], "id,gpa,name", f"1,{after},x", "2,3.5,y")
    write(files[1], "id,gpa,name", f"1,{before},x", "2,3.5,z")
    rows, _ = compare(*files, "id", tolerance=(("gpa", decimal.Decimal("0.005")),))
    assert [row[1] for row in rows[1:]] == (["1", "2"] if differs else ["2"])
