"""Broken input by the thousand: config.xml, and pairs of CSV files.

For every input there is a right answer or a clear error (a `sgsync.Error` with its exit code, in
printable lines), never a traceback, never a hang. Whether the answer to a pair is right is told by
a model of its own: csv.reader, a dict, and the diff applied to it.

`check_config` and `check_pair` return ANSWER or ERROR and raise WrongError; `fuzz_many` does what
`make faults` shows, in processes of its own. No pytest in here: scripts use this module too.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import logging
import os
import random
import re
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import sgsync

ANSWER, ERROR = "answer", "error"
HUNG_SECONDS = 10.0
CHUNK = 250

Row = tuple[str, ...]


class WrongError(Exception):
    """What sgsync made of an input is neither right nor a clear error."""


class HungError(BaseException):
    """It makes nothing of it at all."""


def one_of(chance: random.Random, values: Sequence[bytes]) -> bytes:
    return values[chance.randrange(len(values))]


def mutated(raw: bytes, tokens: Sequence[bytes], chance: random.Random) -> bytes:
    """`raw` with a few things done to it that no well-meaning program does."""
    data = bytearray(raw)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        begin = chance.randrange(len(data) + 1)
        end = min(len(data), begin + chance.choice((1, 2, 5, 20, 100)))
        kind = chance.randrange(8)
        if kind == 0:
            data[begin:end] = b""
        elif kind == 1:
            data[begin:begin] = data[begin:end] * chance.choice((1, 2, 50))
        elif kind == 2:
            del data[begin:]
        elif kind == 3 and begin < len(data):
            data[begin] = chance.randrange(256)
        elif kind == 4:
            there = chance.randrange(len(data) + 1)
            data[there:there] = data[begin:end]
        else:
            data[begin : begin if kind < 7 else end] = one_of(chance, tokens)
    return bytes(data)


def check_error(error: sgsync.Error, code: int) -> None:
    text = str(error)
    if error.exit_code != code:
        raise WrongError(f"exit code {error.exit_code}: {text!r}")
    if not all(line.isprintable() for line in text.split("\n")) or len(text) > 100_000:
        raise WrongError(f"not a clear message: {text[:2000]!r}")


# ------------------------------------------------------------------ config.xml

SECRET = "the secret}{ of it all"
CONFIG = """<?xml version="1.0" encoding="UTF-8"?>
<Config>
  <!-- a comment -->
  <SFTP host="sftp.example.org" port="22" username="district.org" privateKey="ssh/id_rsa"
        passphrase="${env:SGSYNC_FUZZ}" knownHosts="ssh/known_hosts" downloadDirectory="/download"
        uploadDirectory="/upload" requireComplete="true" maxAgeHours="36" timeoutSeconds="60"/>
  <Database connectionString="Driver={ODBC Driver 18 for SQL Server};UID=u;PWD=${env:SGSYNC_FUZZ}"
            batchSize="500" queryTimeoutSeconds="3600" verify="true"/>
  <Limits maxDeletes="10%" maxUpdates="50%" maxFailures="25" maxInserts="50%"
          minRows="9" usual="5"/>
  <History keepRuns="365" reportKeys="false" metrics="m.prom"/>
  <Pause from="2027-07-20" to="2027-08-15" why="rollover"/>
  <Pause from="12-24" to="01-02"/>
  <Notify on="held" ping="https://example.org/x" url="json://example.org"/>
  <Download>
    <SQLDiff file="iep.csv" key="studentNumber,startDate:int" sort="true" trim="true" maxDeletes="5"
             nullText="NULL" dateFormat="%m/%d/%Y" ignoreColumns="x" newColumns="report"
             tolerance="gpa:0.005" ignoreLineBreaks="true">
      <Query><![CDATA[SELECT a, b FROM t WHERE a <> 'x' ORDER BY a]]></Query>
      <Insert procedure="dbo.sg_iep_upsert"/>
      <Update parameters="a,b">UPDATE t SET a = ? WHERE b = ?</Update>
      <Delete procedure="dbo.[sg iep delete]" parameters="a"/>
    </SQLDiff>
    <SQLDiff file="etr.csv"><Query>SELECT 1 &lt; 2</Query></SQLDiff>
  </Download>
  <Upload>
    <SQL>{CALL dbo.sg_cleanup}</SQL>
    <SQL file="open_records.csv" maxShrink="5%">SELECT 1</SQL>
  </Upload>
  <SchooLinks directory="/automated" testDirectory="/other" ignoredSchool="901" grades="8,9,10"
              maxShrink="10%" maxChange="5" quoting="all" identifier="student_sis_id">
    <Attendance enabled="true" file="attendance_percentage.csv" scale="fraction"/>
    <GPA enabled="true" file="gpa.csv" table="u_def_ext_students0" unweighted="simple_gpa"/>
    <Tags enabled="true" file="student_tags.csv">
      <Tag name="IEP" detailedName="Plan" description="d" table="s_il_x" column="iep" equals="1"/>
    </Tags>
  </SchooLinks>
</Config>
"""
XML_TOKENS = [
    *(text.encode() for text in (
        "<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]>", "&b;", "&#0;", "&#x1b;", "&lt;",
        "<![CDATA[", "]]>", "<!--", "-->", "<?pi x?>", "<", ">", "/>", '"', "'", "=", "\0",
        "\x1b[H", "${env:HOME}", "${env:NOT_SET}", "${keyring:x}", "${file:x}", "${", "}", "{",
        ";PWD=x;",
        "TODO(user)", "<SQLDiff/>", "<Config>", "</Config>", "<Upload/>", "<x:y xmlns:x='u'/>",
        "xmlns='u'", "file=", "../", "con.csv", "\u202e", "\u2028", "?", "%", "%%", "-1", "1e9",
        "true", "\n", "9" * 400, "A" * 100_000, "<Tag>" * 300, "ä", "\U0001f600", "|", ",,", ":int",
        "\\",
    )),
    b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\xc3", b"\x85", b"\x80", b" " * 70_000,
]  # fmt: skip
XML_VALUES = (
    "", " ", "0", "1", "25", "5%", "100%", "true", "false", "a.csv", "iep.csv", "a,b", "a:int", "/",
    "/x", "dbo.p", "${env:HOME}", "%d.%m.%Y", "id", "8,9", "percent", "minimal", "all", "ä ö",
    "01-01", "2027-01-01", "https://h/x", "a:0.5", "2.5", "${file:/}",
)  # fmt: skip
ENCODINGS = ("utf-8", "utf-16", "latin-1", "utf-8-sig", "utf-16-be", "cp037")


def broken_config(chance: random.Random) -> bytes:
    text, kind = CONFIG, chance.randrange(10)
    if kind == 0:
        text = text.replace('encoding="UTF-8"', f'encoding="{chance.choice(ENCODINGS)}"')
    raw = text.encode(chance.choice(ENCODINGS) if kind == 1 else "utf-8")
    if kind == 2:
        lines = raw.splitlines(keepends=True)
        chance.shuffle(lines)
        raw = b"".join(lines)
    if kind > 6:  # well-formed, and now and then even right
        parts = re.split(r'="[^"]*"', text)
        values = re.findall(r'="[^"]*"', text)
        values[chance.randrange(2, len(values))] = f'="{chance.choice(XML_VALUES)}"'
        return "".join(itertools.chain(*zip(parts, [*values, ""], strict=True))).encode()
    return mutated(raw, XML_TOKENS, chance)


def check_config(raw: bytes, folder: Path) -> str:
    """Load a config.xml for both commands."""
    path = folder / "config.xml"
    path.write_bytes(raw)
    results = []
    for wanted in (sgsync.SyncConfig, sgsync.SchooLinksConfig):
        try:
            sgsync.load_config(path, wanted)
            results.append(ANSWER)
        except sgsync.Error as error:
            check_error(error, 2)
            if SECRET in str(error):
                raise WrongError("a secret is in the message") from None
            results.append(ERROR)
    return ANSWER if ANSWER in results else ERROR


# ------------------------------------------------------------------ pairs of CSV files


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two files and how they are to be compared; `clean` where nobody has broken them."""

    source: bytes
    database: bytes
    key: tuple[str, ...] | None
    sort: bool = False
    trim: bool = False
    null_text: str | None = None
    clean: bool = False
    block_bytes: int = sgsync.BLOCK_BYTES


COLUMNS = ("id", "start", "näme", "note")
VALUES = (
    "", " ", "a", "a ", "NULL", "Lee, Ann", 'the "old" plan', '"', ",", "\n", "two\r\nlines",
    "\r\n", "é", "\u2028", "\U0001f600", "0", "00", "1.50", "-1", "x" * 300, "\x1b[31m",
    "\xff", "=1", "\t",
)  # fmt: skip
CSV_TOKENS = [
    b'"', b'""', b'"""', b",", b"\r", b"\n", b"\r\n", b"\r\r\n", b"\n\n", b"\0", b"\xef\xbb\xbf",
    b"\xff", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b" ", b'","', b'"\r\n"', b"\x1b[2J", b"x" * 999,
    b'"' * 999, b"," * 999, b"9" * 60, b"-", b"+1", b"\x1a", b"\x85", b"\\", b"'", b";",
]  # fmt: skip


def broken_pair(chance: random.Random) -> Pair:
    """A pair of files, clean one time in three."""
    width = chance.choice((1, 2, 3, 4))
    key = chance.choice((None, ("id",), ("id:int",), ("id", "start")[:width], ("start", "id")))
    key = ("id",) if key and width == 1 and len(key) > 1 else key
    numbers = range(10, 10 + chance.choice((0, 1, 3, 30)))
    rows = {n: [str(n), *(chance.choice(VALUES) for _ in range(width - 1))] for n in numbers}
    if width > 1 and key and "start" in key:
        for number, row in rows.items():
            row[1] = str(100 + number)
    other = {n: list(row) for n, row in rows.items() if chance.random() < 0.9}
    for row in other.values():
        if chance.random() < 0.2:
            row[-1] = row[-1] + chance.choice(("0", " ", "x"))
    for number in range(10, 40):
        if chance.random() < 0.05:
            other[number] = [str(number), *["9"] * (width - 1)]
    sides = []
    for side in (rows, other):
        listed = [side[number] for number in sorted(side)]
        if chance.random() < 0.1:
            chance.shuffle(listed)
        sides.append(written([COLUMNS[:width], *map(tuple, listed)], chance))
    clean = chance.random() < 0.33
    if not clean:
        number = chance.randrange(2)
        sides[number] = mutated(sides[number], CSV_TOKENS, chance)
    return Pair(
        *sides,
        key=key,
        sort=chance.random() < 0.3,
        trim=chance.random() < 0.3,
        null_text=chance.choice((None, None, "NULL", "0", "x\ny")),
        clean=clean,
        block_bytes=chance.choice((sgsync.BLOCK_BYTES, 16, 64, 300)),
    )


def written(rows: Sequence[Row], chance: random.Random) -> bytes:
    """Rows in one of the spellings that RFC 4180 has."""
    text = io.StringIO(newline="")
    end = chance.choice(("\r\n", "\r\n", "\n"))
    quoting = chance.choice((csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    csv.writer(text, lineterminator=end, quoting=quoting).writerows(rows)
    value = text.getvalue()
    if chance.random() < 0.1 and len(rows[0]) > 1:
        value = value.removesuffix(end)
    raw = value.encode()
    return b"\xef\xbb\xbf" + raw if chance.random() < 0.1 else raw


class UnreadableError(Exception):
    """The model cannot read a file, or the file breaks a rule."""


@dataclasses.dataclass
class Model:
    """A CSV file as Python's own reader has it: key -> row, in the order of the file."""

    columns: Row
    rows: dict[tuple[str | int, ...], Row]


def model(raw: bytes, pair: Pair) -> Model:
    try:
        text = raw.decode("utf-8-sig")
        records = [
            tuple(r) or ("",) for r in csv.reader(io.StringIO(text, newline=""), strict=True)
        ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UnreadableError(str(error)) from None
    if not records or "\0" in text:
        raise UnreadableError("is empty or holds a NUL")
    columns, *rows = records
    if len(set(columns)) < len(columns) or "" in columns:
        raise UnreadableError("the header is wrong")
    if {len(record) for record in records} - {len(columns)}:
        raise UnreadableError("a row is too long or too short")
    if pair.trim:
        rows = [tuple(value.rstrip(" ") for value in row) for row in rows]
    if pair.null_text:
        rows = [tuple("" if value == pair.null_text else value for value in row) for row in rows]
    keys = [key_of(row, columns, pair) for row in rows]
    if pair.sort:
        order = sorted(range(len(keys)), key=keys.__getitem__)
        keys, rows = [keys[i] for i in order], [rows[i] for i in order]
    if any(not a < b for a, b in itertools.pairwise(keys)):
        raise UnreadableError("not sorted, or a key twice")
    return Model(columns, dict(zip(keys, rows, strict=True)))


def key_of(row: Row, columns: Row, pair: Pair) -> tuple[str | int, ...]:
    key: list[str | int] = []
    for name in pair.key or columns:
        plain = name.removesuffix(":int")
        if plain not in columns:
            raise UnreadableError("a column of the key is missing")
        value = row[columns.index(plain)]
        if name != plain and not re.fullmatch("-?[0-9]{1,40}", value):
            raise UnreadableError("no number")
        key.append(value if name == plain else int(value))
    return tuple(key)


def check_pair(pair: Pair, folder: Path) -> str:
    """Compare two files; the diff applied to the one gives the other, or there is an error."""
    paths = [folder / "a.csv", folder / "b.csv"]
    for path, content in zip(paths, (pair.source, pair.database), strict=True):
        path.write_bytes(content)
    spec = sgsync.SqlDiff(file="a.csv", key=pair.key, sort=pair.sort, trim=pair.trim,
        null_text=pair.null_text,
    )  # fmt: skip
    changes = io.BytesIO()
    before = sgsync.BLOCK_BYTES, sgsync.SORT_BYTES
    sgsync.BLOCK_BYTES = sgsync.SORT_BYTES = pair.block_bytes
    try:
        counts = sgsync.diff(paths[0], paths[1], changes, spec)
    except sgsync.Error as error:
        check_error(error, 5)
        if pair.clean:
            _expect_error(pair, error)
        return ERROR
    finally:
        sgsync.BLOCK_BYTES, sgsync.SORT_BYTES = before
    try:
        ours, theirs = model(pair.source, pair), model(pair.database, pair)
    except UnreadableError as error:
        raise WrongError(f"an answer to what cannot be read: {error}") from None
    if ours.columns != theirs.columns:
        raise WrongError("an answer although the columns differ")
    applied = apply_changes(changes.getvalue(), theirs, pair)
    if applied.rows != ours.rows:
        raise WrongError("the diff applied to B does not give A")
    if (counts.source_rows, counts.target_rows) != (len(ours.rows), len(theirs.rows)):
        raise WrongError(f"counted {counts.source_rows} and {counts.target_rows} rows")
    return ANSWER


def _expect_error(pair: Pair, error: sgsync.Error) -> None:
    with contextlib.suppress(UnreadableError):
        if model(pair.source, pair).columns == model(pair.database, pair).columns:
            raise WrongError(f"an error where there is none: {error}")


def apply_changes(changes: bytes, database: Model, pair: Pair) -> Model:
    """What a diff file makes of `database`, each of its lines looked at."""
    records = csv.reader(io.StringIO(changes.decode(), newline=""), strict=True)
    columns = database.columns
    wanted = ["operation", *(f"{s}_{c}" for s in ("before", "after") for c in columns)]
    if next(records) != wanted:
        raise WrongError("the header of the diff is wrong")
    rows = dict(database.rows)
    width = len(columns)
    nothing = ("",) * width
    for record in records:
        operation, before = record[0], tuple(record[1 : 1 + width])
        after = tuple(record[1 + width :])
        if nothing != {"insert": before, "delete": after}.get(operation, nothing):
            raise WrongError(f"{operation} with a side too much")
        old = key_of(before, columns, pair) if operation != "insert" else ()
        new = key_of(after, columns, pair) if operation != "delete" else ()
        if operation != "insert" and rows.pop(old, None) != before:
            raise WrongError(f"{operation} of a row that is not there")
        if operation == "update" and (before == after or old != new):
            raise WrongError("an update that changes nothing, or a key")
        if operation != "delete":
            if new in rows:
                raise WrongError("an insert of a key that is there")
            rows[new] = after
    return Model(columns, dict(sorted(rows.items())))


# ------------------------------------------------------------------ thousands: fuzz_many


@dataclasses.dataclass
class Tally:
    """What became of many inputs."""

    inputs: int = 0
    answers: int = 0
    errors: int = 0
    wrong: int = 0
    hung: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Tally) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def check_seed(kind: str, seed: int, folder: Path) -> str:
    """One input of `config` or `csv`, made from its seed."""
    chance = random.Random(seed)
    if kind == "config":
        return check_config(broken_config(chance), folder)
    return check_pair(broken_pair(chance), folder)


def fuzz(kind: str, seeds: Sequence[int]) -> Tally:
    """Inputs one after another, in this process; each may take `HUNG_SECONDS`."""
    os.environ["SGSYNC_FUZZ"] = SECRET
    os.environ["PYTHON_KEYRING_BACKEND"] = "keyring.backends.null.Keyring"
    logging.getLogger("sgsync").propagate = False
    logging.getLogger("sgsync").addHandler(logging.NullHandler())
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="sgsync-fuzz-") as name:
        for seed in seeds:
            tally.inputs += 1
            try:
                with _bounded():
                    result = check_seed(kind, seed, Path(name))
                tally.answers += result == ANSWER
                tally.errors += result == ERROR
            except HungError:
                tally.hung += 1
                tally.problems.append(f"fuzz {kind}, seed {seed}: hung")
            except Exception:
                tally.wrong += 1
                where = traceback.format_exc(chain=False).splitlines()[-8:]
                tally.problems.append(f"fuzz {kind}, seed {seed}:\n    " + "\n    ".join(where))
    return tally


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    def hang_up(*_: object) -> None:
        raise HungError

    before = signal.signal(signal.SIGALRM, hang_up)
    signal.setitimer(signal.ITIMER_REAL, HUNG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz_many(kind: str, count: int, seed: int, workers: int, told: Callable[[str], None]) -> Tally:
    """`count` inputs in several processes."""
    first = seed * 1_000_000
    chunks = [
        range(begin, min(begin + CHUNK, first + count))
        for begin in range(first, first + count, CHUNK)
    ]
    total = Tally()
    with ProcessPoolExecutor(workers) as pool:
        for tally in pool.map(fuzz, itertools.repeat(kind), chunks):
            for problem in tally.problems[: max(0, 5 - len(total.problems))]:
                told(problem)
            total.add(tally)
    return total
