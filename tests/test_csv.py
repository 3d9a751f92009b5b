"""CSV files: what RFC 4180 allows is read exactly, the rest is refused with file and line.

Two oracles: `parse`, RFC 4180 character by character, and Python's own csv.reader(strict=True).
Every test that reads does so with blocks of many sizes, since a block may end anywhere.
"""

from __future__ import annotations

import codecs
import csv
import io
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sgsync

LOOSE_QUOTE = (
    "a field contains a quote but is not quoted as a whole",
    'quote the whole field and double each quote in it: "a ""b"" c"',
)
LONE_RETURN = ("a carriage return without a line feed", "end lines with CR LF or LF")
NUL = (
    "contains a NUL character: this is a binary or UTF-16 file",
    "export the file again as CSV in UTF-8",
)
WIDTH = "check whether the file was cut off or a value with a comma is not quoted"
NOT_UTF8 = "export the file as UTF-8 (that byte looks like Windows-1252 or Latin-1)"
NEVER_CLOSED = (
    "a quoted field is never closed",
    "check whether the file was cut off, and export it again",
)
BLOCK_SIZES = (1, 2, 7, 64, sgsync.BLOCK_BYTES)
# Orders differ between code points, UTF-16 units and locales on these; \xff is the byte ÿ begins
# to look like in Latin-1, and \n comes before every one of them.
CHARACTERS = 'ab ,"\n\r\t\x01\x0b0é߿\u2028\ufeff\uffff\U00010000\U0010ffff'

fields = st.text(CHARACTERS, max_size=4)
block_sizes = st.sampled_from(BLOCK_SIZES)


class MalformedError(Exception):
    """Not RFC 4180."""


def parse(text: str) -> list[tuple[int, list[str]]]:
    """Each record and the line it begins on.  RFC 4180 to the letter; LF alone may end a line."""
    records, at, line = [], 0, 1
    while at < len(text):
        begins, record = line, []
        while True:
            if text[at : at + 1] == '"':
                value, at, line = _parse_quoted(text, at + 1, line)
            else:
                start = at
                while at < len(text) and text[at] not in ',"\r\n':
                    at += 1
                value = text[start:at]
            record.append(value)
            if text[at : at + 1] != ",":
                break
            at += 1
        records.append((begins, record))
        line += 1
        if text.startswith("\r\n", at):
            at += 2
        elif text.startswith("\n", at):
            at += 1
        elif at < len(text):
            raise MalformedError
    return records


def _parse_quoted(text: str, at: int, line: int) -> tuple[str, int, int]:
    value = ""
    while at < len(text):
        if text[at] != '"':
            value, line, at = value + text[at], line + (text[at] == "\n"), at + 1
        elif text[at + 1 : at + 2] == '"':
            value, at = value + '"', at + 2
        else:
            return value, at + 1, line
    raise MalformedError


def spell(rows: Sequence[Sequence[str]], seed: int, line_end: str = "") -> str:
    """Rows as CSV, each field quoted at will, each line ended at will unless `line_end` is given.

    Every seventh seed quotes everything, every seventh nothing but what must be.
    """
    choice = random.Random(seed)
    lines = []
    for row in rows:
        spelled = []
        for field in row:
            must = any(c in field for c in ',"\r\n')
            may = {0: True, 1: False}.get(seed % 7, choice.random() < 0.5)
            spelled.append('"' + field.replace('"', '""') + '"' if must or may else field)
        lines.append(",".join(spelled) + (line_end or choice.choice(("\r\n", "\n"))))
    return "".join(lines)


def read(path: Path, **options: object) -> tuple[sgsync.Row, list[tuple[int, sgsync.Row]]]:
    """The header, and each row with the line it begins on."""
    rows = []
    with sgsync.CsvFile(path, **options) as file:
        for block in file.blocks():
            offset = 0
            for row in block.data[:-1].split(b"\n"):
                rows.append((block.line_at(offset), sgsync.decode_row(row)))
                offset += len(row) + 1
            assert offset == len(block.data)
            assert block.rows == block.data.count(b"\n")
        return file.columns, rows


def refusal(path: Path) -> str:
    with pytest.raises(sgsync.DataError) as caught:
        read(path)
    assert caught.value.exit_code == 5
    return str(caught.value)


def message(path: Path, line: int, what: str, remedy: str) -> str:
    return f"{path.name}:{line}: {what}\nTry: {remedy}"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all examples of a property."""
    return tmp_path_factory.mktemp("csv") / "iep.csv"


def in_blocks(size: int) -> mock._patch:
    return mock.patch.object(sgsync, "BLOCK_BYTES", size)


# ------------------------------------------------------------------ what is allowed


@settings(max_examples=300)
@given(
    rows=st.integers(1, 4).flatmap(
        lambda width: st.lists(st.lists(fields, min_size=width, max_size=width), max_size=8)
    ),
    seed=st.integers(0, 10**6),
    bom=st.booleans(),
    cut_last_line_end=st.booleans(),
    size=block_sizes,
)
def test_csv_file_reads_every_spelling(
    path: Path,
    rows: list[list[str]],
    seed: int,
    bom: bool,
    cut_last_line_end: bool,
    size: int,
) -> None:
    width = len(rows[0]) if rows else 2
    header = [f"c{number}\n,\"'"[: 2 + seed % 5] for number in range(width)]
    text = spell([header, *rows], seed)
    if cut_last_line_end and not (rows and width == 1 and rows[-1] == [""]):
        text = text.removesuffix("\n").removesuffix("\r")
    path.write_bytes(codecs.BOM_UTF8 * bom + text.encode())
    with in_blocks(size):
        columns, found = read(path)
    assert list(columns) == header
    assert [list(row) for _, row in found] == rows
    assert found == [(line, tuple(record)) for line, record in parse(text)[1:]]
    by_csv = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    assert [row or [""] for row in by_csv[1:]] == rows  # a blank line is one empty field


TOKENS = ("a", "b", ",", '"', '""', '"a"', "\n", "\r\n", "\r", " ", "é", '",', ',"', '"\n', "x,y\n")


@settings(max_examples=800)
@given(
    tokens=st.lists(st.sampled_from(TOKENS), max_size=14),
    header=st.sampled_from(["", "x\n", "x,y\n", '"x","y"\r\n', 'x,"y"\r\n', "x,y\r\n"]),
    size=block_sizes,
)
@example(tokens=["a", ",", "a", "\r", "b", "\n"], header="x,y\r\n", size=64)
@example(tokens=['"a"', ",", "a", "\r", "b", "\n"], header='"x",y\r\n', size=64)
@example(tokens=["a", ",", '"a"', "\r", "b", "\n"], header='x,"y"\r\n', size=64)
@example(tokens=["a", ",", "a", "\r"], header="x,y\r\n", size=64)
@example(tokens=['"a', '""', "\n", '""', 'b"', ",", "\n"], header="x,y\n", size=64)
@example(tokens=["a", '""', ",", '""', "b", "\n"], header='"x","y"\n', size=64)
def test_csv_file_takes_what_rfc_4180_allows_and_nothing_else(
    path: Path, tokens: list[str], header: str, size: int
) -> None:
    text = header + "".join(tokens)
    path.write_bytes(text.encode())
    try:
        records = parse(text)
        names = records[0][1] if records else []
        widths = {len(record) for _, record in records}
        if len(widths) > 1 or not all(names) or len(set(names)) < len(names):
            raise MalformedError
    except MalformedError:
        with in_blocks(size), pytest.raises(sgsync.DataError, match=r"\Aiep\.csv:[1-9]\d*: .+\n"):
            read(path)
    else:
        with in_blocks(size):
            columns, rows = read(path)
        assert list(columns) == names
        assert rows == [(line, tuple(record)) for line, record in records[1:]]


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_csv_file_cut_anywhere_gives_whole_records_or_an_error(tmp_path: Path, size: int) -> None:
    text = 'n,"na""me"\r\n1,"Núñez, A"\r\n2,"two\r\nlines ""𐀀"""\r\n3,é\r\n"4","x"\n'
    data = text.encode()
    path = tmp_path / "cut.csv"
    outcomes = set()
    for length in range(1, len(data)):
        path.write_bytes(data[:length])
        with in_blocks(size):
            try:
                records = parse(data[:length].decode())
                if len({len(record) for _, record in records}) > 1 or "" in records[0][1]:
                    raise MalformedError
            except (MalformedError, UnicodeDecodeError):
                outcomes.add(refusal(path).split(": ")[1])
            else:
                _, rows = read(path)
                assert rows == [(line, tuple(record)) for line, record in records[1:]]
                outcomes.add("")
    assert {"", NEVER_CLOSED[0] + "\nTry", LONE_RETURN[0] + "\nTry", "is not UTF-8"} < outcomes


@pytest.mark.parametrize(
    "text",
    [
        "a,b\r\n1,2\r\n",
        "a,b\n1,2\n",
        "a,b\n1,2",
        '"a","b"\r\n"1","2"\r\n',
        'a,"b"\r\n1,"2"\r\n',
        '"a",b\n"1",2\n',
        "\ufeffa,b\r\n1,2\r\n",
        '\ufeff"a","b"\n1,"2"',
        'a,b\n"1",2\n',
    ],
)
def test_csv_file_reads_all_spellings_alike(tmp_path: Path, text: str) -> None:
    path = tmp_path / "iep.csv"
    path.write_bytes(text.encode())
    with sgsync.CsvFile(path) as file:
        assert file.columns == ("a", "b")
        assert list(file.blocks()) == [sgsync.Block(b"1\x002\n", 2, 1)]


@pytest.mark.parametrize("size", [7, sgsync.BLOCK_BYTES])
def test_csv_file_of_a_header_alone_has_no_rows(tmp_path: Path, size: int) -> None:
    path = tmp_path / "iep.csv"
    for text in ("a,b", "a,b\n", "a,b\r\n", '"a","b"'):
        path.write_text(text, newline="")
        with in_blocks(size):
            assert read(path) == (("a", "b"), [])


def test_csv_file_of_no_bytes_has_no_columns(tmp_path: Path) -> None:
    path = tmp_path / "iep.csv"
    path.touch()
    assert read(path) == ((), [])


def test_csv_file_of_one_column_takes_a_blank_line_as_an_empty_field(tmp_path: Path) -> None:
    path = tmp_path / "iep.csv"
    path.write_text('a\n\n""\nx\n', newline="")
    assert read(path) == (("a",), [(2, ("",)), (3, ("",)), (4, ("x",))])


@pytest.mark.parametrize("size", [1 << 10, sgsync.BLOCK_BYTES])
@pytest.mark.parametrize(
    "field", ["x" * 3_000_000, '"\n' * 400_000, "\n" * 2_000_000, "é,\r\n" * 300_000]
)
def test_csv_file_reads_megabytes_in_one_field(tmp_path: Path, field: str, size: int) -> None:
    path = tmp_path / "iep.csv"
    rows = [("1", field, ""), ("2", "", field)]
    path.write_bytes(spell([("a", "b", "c"), *rows], seed=1).encode())
    with in_blocks(max(size, 1 << 16)):
        _, found = read(path)
    lines = field.count("\n")
    assert found == [(2, rows[0]), (3 + lines, rows[1])]


# ------------------------------------------------------------------ what is refused

BAD_RECORDS = {  # record of a file of two columns: (line within it, what, remedy)
    b'1,a"b': (0, *LOOSE_QUOTE),
    b'1,"a"b': (0, *LOOSE_QUOTE),
    b'1,a"b"': (0, *LOOSE_QUOTE),
    b'1, "a"': (0, *LOOSE_QUOTE),
    b'1,"a" ': (0, *LOOSE_QUOTE),
    b'1,"a""b" "c"': (0, *LOOSE_QUOTE),
    b'1,"a\nb"c': (1, *LOOSE_QUOTE),
    b'"1\n\n","a\r\nb"c': (3, *LOOSE_QUOTE),
    b"1,a\rb": (0, *LONE_RETURN),
    b"1\r,a": (0, *LONE_RETURN),
    b"\r1,a": (0, *LONE_RETURN),
    b"1,a\r\r": (0, *LONE_RETURN),
    b'"1",a\rb': (0, *LONE_RETURN),
    b'1,"a\n"\rb': (1, *LONE_RETURN),
    b"1": (0, "has 1 field where the header has 2", WIDTH),
    b"": (0, "has 1 field where the header has 2", WIDTH),
    b'"1\n"': (0, "has 1 field where the header has 2", WIDTH),
    b"1,2,": (0, "has 3 fields where the header has 2", WIDTH),
    b"1,2,3": (0, "has 3 fields where the header has 2", WIDTH),
    b"1,\0": (0, *NUL),
    b'1,"a\r\n\0"': (1, *NUL),
    b"1,N\xfa\xf1ez": (0, "is not UTF-8: byte 0xfa", NOT_UTF8),
    b'1,"a\nb\n\x93c\x94"': (2, "is not UTF-8: byte 0x93", NOT_UTF8),
    b"1,\xff": (0, "is not UTF-8: byte 0xff", NOT_UTF8),
    b"1,\xc0\x80": (0, "is not UTF-8: byte 0xc0", NOT_UTF8),  # an overlong NUL
    b"1,\xed\xa0\x80": (0, "is not UTF-8: byte 0xed", NOT_UTF8),  # a surrogate
    b"1,\xf4\x90\x80\x80": (0, "is not UTF-8: byte 0xf4", NOT_UTF8),  # beyond U+10FFFF
}


@pytest.mark.parametrize("bad", BAD_RECORDS)
@settings(max_examples=25)
@given(
    before=st.lists(st.lists(fields, min_size=2, max_size=2), max_size=5),
    after=st.lists(st.lists(fields, min_size=2, max_size=2), max_size=3),
    seed=st.integers(0, 10**6),
    line_end=st.sampled_from(["\r\n", "\n", ""]),
    size=block_sizes,
)
def test_csv_file_names_the_line_of_what_it_refuses(
    path: Path,
    bad: bytes,
    before: list[list[str]],
    after: list[list[str]],
    seed: int,
    line_end: str,
    size: int,
) -> None:
    good = spell([["n", "name"], *before], seed, line_end).encode()
    rest = spell(after, seed + 1, line_end).encode()
    end = b"\r\n" if bad.endswith(b"\r") else line_end.encode() or b"\n"
    path.write_bytes(good + bad + end + rest)
    line, what, remedy = BAD_RECORDS[bad]
    with in_blocks(size):
        assert refusal(path) == message(path, good.count(b"\n") + 1 + line, what, remedy)


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_csv_file_refuses_a_quote_that_is_never_closed(tmp_path: Path, size: int) -> None:
    path = tmp_path / "iep.csv"
    for data, line in ((b'\xef\xbb\xbf"a,b', 1), (b'a,b\n1,"x\ny"\n2,"x\n3,y\n', 4)):
        path.write_bytes(data)
        with in_blocks(size):
            assert refusal(path) == message(path, line, *NEVER_CLOSED)


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_csv_file_names_a_lone_quote_rather_than_the_end_it_hides(
    tmp_path: Path, size: int
) -> None:
    path = tmp_path / "iep.csv"
    path.write_bytes(b'a,b\n1,"x\ny"\n2,5" pipe\n' + b"3,more\n" * 1000)
    with in_blocks(size):
        assert refusal(path) == message(path, 4, *LOOSE_QUOTE)
    path.write_bytes('a,"b\n1,2\n'.encode("utf-16-le"))
    with in_blocks(size):
        assert refusal(path) == message(path, 1, *NUL)


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_csv_file_refuses_a_file_cut_between_carriage_return_and_line_feed(
    tmp_path: Path, size: int
) -> None:
    path = tmp_path / "iep.csv"
    for data, line in ((b"a,b\r", 1), (b'a,b\r\n1,"\n"\r', 3), (b'a,b\r\n1,2\r\n2,"\n"\r', 4)):
        path.write_bytes(data)
        what = (LONE_RETURN[0], NEVER_CLOSED[1])
        with in_blocks(size):
            assert refusal(path) == message(path, line, *what)


@pytest.mark.parametrize(
    ("data", "line", "what", "remedy"),
    [
        (codecs.BOM_UTF16_LE + "a,b\n1,2\n".encode("utf-16-le"), 1, "is UTF-16",
         "save or export it as UTF-8"),
        (codecs.BOM_UTF16_BE + "a,b\n1,2\n".encode("utf-16-be"), 1, "is UTF-16",
         "save or export it as UTF-8"),
        ("a,b\n1,2\n".encode("utf-16-le"), 1, *NUL),
        ("a,b\n1,2\n".encode("utf-32-be"), 1, *NUL),
        (b"a,b\n1,2\n\0\0\0", 3, *NUL),
        (b"PK\x03\x04\x14\0\x06\0,\n", 1, *NUL),  # an Excel workbook
        (b"\x89PNG\r\n\x1a\n\0", 1, "is not UTF-8: byte 0x89", NOT_UTF8),
        (b"\x1f\x8b\x08\x08,\n", 1, "is not UTF-8: byte 0x8b", NOT_UTF8),
        (b"a,b\n1,\xc3", 2, "is not UTF-8: byte 0xc3", NOT_UTF8),
        (b"a,b\n1,2\n3,N\xc3\xba\xf1ez\n", 3, "is not UTF-8: byte 0xf1", NOT_UTF8),
    ],
)  # fmt: skip
def test_csv_file_refuses_other_encodings_and_binary_files(
    tmp_path: Path, data: bytes, line: int, what: str, remedy: str
) -> None:
    path = tmp_path / "iep.csv"
    path.write_bytes(data)
    for size in BLOCK_SIZES:
        with in_blocks(size):
            assert refusal(path) == message(path, line, what, remedy)


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ("a,b,a", "the column 'a' appears more than once"),
        ('a,"a"', "the column 'a' appears more than once"),
        ("a,,b", "column 2 has no name"),
        ("a,b,", "column 3 has no name"),
        ('""', "column 1 has no name"),
        ("", "column 1 has no name"),
        ("\ufeff", "column 1 has no name"),
    ],
)
def test_csv_file_refuses_a_header_without_clear_names(
    tmp_path: Path, header: str, what: str
) -> None:
    path = tmp_path / "iep.csv"
    path.write_text(f"{header}\n1,2,3\n", encoding="utf-8")
    assert refusal(path) == message(
        path, 1, f"the header is wrong: {what}", "give each column its own name"
    )


@pytest.mark.parametrize("start", ["", "a,b\n1,2\n"])
def test_csv_file_refuses_a_record_without_end_in_bounded_memory(
    tmp_path: Path, start: str
) -> None:
    path = tmp_path / "iep.csv"
    with path.open("w") as file:
        file.write(start + '3,"')
        for _ in range(25):
            file.write("never closed\n" * 80_000)
    tracemalloc.start()
    found = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == message(
        path,
        1 + start.count("\n"),
        "a record is longer than 16 MB",
        "look for a quote that is never closed; the file may not be CSV at all",
    )
    assert peak < 4 * sgsync.RECORD_BYTES < 3 * path.stat().st_size


def test_csv_file_shows_no_control_character_of_a_bad_header(tmp_path: Path) -> None:
    path = tmp_path / "iep.csv"
    path.write_text("\x1b[2J,\x1b[2J\n")
    assert "the column '\\x1b[2J' appears more than once" in refusal(path)


# ------------------------------------------------------------------ trim, null_text

WORDS = (
    "", " ", "  ", "NULL", "NULL ", " NULL", "NULLS", "nNULL", "a ", "a b  ", " a", "a \n", " \n ",
    "NULL\n", "\nNULL", "NULL\nNULL", "NULL,", "null", "\t", "\xa0",
)  # fmt: skip


@settings(max_examples=200)
@given(
    rows=st.lists(
        st.lists(
            st.sampled_from(WORDS),
            min_size=3,
            max_size=3,
        ),
        max_size=6,
    ),
    trim=st.booleans(),
    null_text=st.sampled_from([None, "", "NULL", "a", "a b", " ", ".", "NULL\nNULL", "NULL,", "é"]),
    seed=st.integers(0, 10**6),
    size=block_sizes,
)
def test_blocks_trim_and_null_text_change_whole_fields_alone(
    path: Path,
    rows: list[list[str]],
    trim: bool,
    null_text: str | None,
    seed: int,
    size: int,
) -> None:
    path.write_bytes(spell([["a", "b", "c"], *rows], seed).encode())
    with in_blocks(size):
        _, found = read(path, trim=trim, null_text=null_text)
    trimmed = [[field.rstrip(" ") if trim else field for field in row] for row in rows]
    assert [row for _, row in found] == [
        tuple("" if field == null_text else field for field in row) for row in trimmed
    ]


def test_blocks_trim_a_field_of_blanks_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "iep.csv"  # A quadratic search would take hours.
    path.write_text("a,b\nx," + " " * 3_000_000 + "x" + " " * 3_000_000 + "\n")
    ((_, row),) = read(path, trim=True)[1]
    assert row == ("x", " " * 3_000_000 + "x")


# ------------------------------------------------------------------ keys


@settings(max_examples=300)
@given(
    rows=st.lists(st.lists(fields, min_size=3, max_size=3), min_size=1, max_size=6),
    key=st.sampled_from([None, "a", "a,b", "b", "b,a", "c", "a,b,c", "c,b,a", "a,c"]),
)
def test_key_orders_rows_as_tuples_of_text(rows: list[list[str]], key: str | None) -> None:
    names = key.split(",") if key else ["a", "b", "c"]
    expected = [tuple(row["abc".index(name)] for name in names) for row in rows]
    canonical = ["\0".join(row).encode().replace(b"\n", b"\xff") + b"\n" for row in rows]
    found = sgsync.Key(key and names, ("a", "b", "c"), "ic/iep.csv")
    assert found.names == tuple(names)
    in_block = found.of_rows(b"".join(canonical))
    alone = [found.of(row[:-1]) for row in canonical]
    for i, one in enumerate(expected):
        for j, other in enumerate(expected):
            order = (one < other, one == other)
            assert (in_block[i] < in_block[j], in_block[i] == in_block[j]) == order
            assert (alone[i] < alone[j], alone[i] == alone[j]) == order


def test_key_compares_int_columns_as_numbers() -> None:
    key = sgsync.Key(["b:int", "a"], ("a", "b"), "ic/iep.csv")
    rows = [b"x\x00-12", b"x\x00-3", b"a\x000", b"b\x00-0", b"x\x0007", b"x\x0010", b"x\x001"]
    assert key.names == ("b", "a")
    assert [key.of(row) for row in rows] == [
        (-12, b"x"), (-3, b"x"), (0, b"a"), (0, b"b"), (7, b"x"), (10, b"x"), (1, b"x"),
    ]  # fmt: skip
    assert key.of(b"x\x00" + b"9" * 40) == (10**40 - 1, b"x")


@pytest.mark.parametrize(
    "text", ["", " 1", "1 ", "+1", "1.0", "1e3", "0x1", "--1", "-", "١", "1_0", "9" * 41, "\n1"]
)
def test_key_refuses_int_columns_that_hold_no_whole_number(text: str) -> None:
    key = sgsync.Key(["a:int"], ("a", "b"), "ic/iep.csv")
    with pytest.raises(ValueError):
        key.of(text.encode().replace(b"\n", b"\xff") + b"\0")


def test_key_names_a_column_that_is_missing() -> None:
    with pytest.raises(sgsync.DataError) as caught:
        sgsync.Key(["a", "c:int"], ("a", "b"), "ic/iep.csv")
    assert str(caught.value) == (
        "ic/iep.csv: the key column 'c' is not in the header (a, b)\n"
        "Try: correct the key, or the name of the column in the query"
    )


def test_key_show_cuts_what_is_too_long_for_a_message() -> None:
    key = sgsync.Key(["a"], ("a", "b"), "ic/iep.csv")
    assert key.show(("x" * 1_000_000, "")) == "a=" + "x" * 100 + "..."
    assert key.show(("a\nb\x1b", "")) == "a=a b\\x1b"


# ------------------------------------------------------------------ common_prefix, csv_writer


@settings(max_examples=300)
@given(
    length=st.sampled_from([0, 1, 5, 255, 256, 257, 1279, 1280, 1281, 70_000, 200_000]),
    difference=st.integers(0, 200_000),
    byte=st.sampled_from([b"\x01", b"\x80", b"\x7f", b"\xff"]),
    tails=st.tuples(st.binary(max_size=3), st.binary(max_size=3)),
    offsets=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_common_prefix_finds_the_first_difference(
    length: int,
    difference: int,
    byte: bytes,
    tails: tuple[bytes, bytes],
    offsets: tuple[int, int],
) -> None:
    same = bytes(length)
    a, b = same + tails[0], same + tails[1]
    if difference < length:
        b = b[:difference] + byte + b[difference + 1 :]
    (i, j) = offsets
    a, b = b"\xfe" * i + a, b"\xfd" * j + b
    expected = 0
    while expected < min(len(a) - i, len(b) - j) and a[i + expected] == b[j + expected]:
        expected += 1
    assert sgsync.common_prefix(a, i, b, j) == expected


@settings(max_examples=200)
@given(rows=st.lists(st.lists(fields, min_size=2, max_size=2), max_size=5))
def test_csv_writer_writes_rfc_4180_that_reads_back(path: Path, rows: list[list[str]]) -> None:
    with sgsync.csv_writer(path) as write:
        write([["a", "b"]])
        write(rows)
    data = path.read_bytes()
    assert parse(data.decode()) == list(zip(lines_of(rows), [["a", "b"], *rows], strict=True))
    assert data.endswith(b"\r\n")
    assert [list(row) for _, row in read(path)[1]] == rows


@settings(max_examples=300)
@given(
    rows=st.integers(2, 4).flatmap(
        lambda width: st.lists(st.lists(fields, min_size=width, max_size=width), max_size=5)
    )
)
def test_encode_rows_writes_what_csv_writer_writes(rows: list[list[str]]) -> None:
    canonical = ["\0".join(row).encode().replace(b"\n", b"\xff") for row in rows]
    expected = io.StringIO(newline="")
    csv.writer(expected).writerows(rows)
    assert sgsync.encode_rows(canonical) == expected.getvalue().encode()


def lines_of(rows: list[list[str]]) -> list[int]:
    """The line on which the header and each row begins."""
    lines = [1, 2]
    for row in rows:
        lines.append(lines[-1] + 1 + sum(field.count("\n") for field in row))
    return lines[:-1]


def test_csv_writer_leaves_nothing_of_a_file_that_failed(tmp_path: Path) -> None:
    path = tmp_path / "iep.csv"
    path.write_text("before")

    def fail_in_the_middle() -> None:
        with sgsync.csv_writer(path) as write:
            write([["a"]] * 100_000)
            raise sgsync.DatabaseError("connection lost")

    with pytest.raises(sgsync.DatabaseError):
        fail_in_the_middle()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
