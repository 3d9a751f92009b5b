#!/usr/bin/env python3
"""sgsync: keep a student information system in step with SameGoal, every night, unattended.

    SameGoal --SFTP--> ia/*.csv --+
                                  +--> diff/*.csv --> procedures --> statements --SFTP--> SameGoal
    database --ODBC--> ic/*.csv --+

`sgsync.py sync` downloads the newest complete extract of SameGoal, exports the same tables from
the database, compares the sorted files, calls a stored procedure for each row that differs, runs
the final SQL statements and pushes the run's folder back.  `sgsync.py diff` compares two files.

    PowerSchool --Oracle--> attendance, GPA, tags --SFTP--> SchooLinks

`sgsync.py schoolinks` makes SchooLinks' files of the students in PowerSchool and uploads them.

Everything that a run sees, decides and does is kept in `history/<epoch>/`.  Nothing is written to
the database before both sides are complete, checked and compared.

Exit codes: 0 success, 1 unexpected error, 2 configuration or usage, 3 SFTP transfer, 4 database,
5 data, 6 held by a limit, 7 another run is active, 8 finished but some rows failed,
130 interrupted.

The file reads in the order in which data flows, callees above callers; each section opens with a
banner that names its entry point.  Start reading at `run_sync` or `run_schoolinks`.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import contextlib
import csv
import dataclasses
import datetime
import functools
import io
import itertools
import logging
import operator
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Literal, NoReturn, TextIO, TypeVar, cast

if TYPE_CHECKING:  # Drivers are imported where they are first needed: `--help` must not load them.
    import oracledb
    import paramiko
    import pyodbc
    import rich.progress
    import tenacity
    from lxml import etree

__version__ = "1.0.0"

EPOCH = re.compile(r"[0-9]{8}-[0-9]{6}")  # SameGoal's own example is no valid time: never parse it.
COMPLETE = "COMPLETE"
HELD = "HELD"
LOG_NAME = "sgi_log.txt"
SUMMARY_NAME = "summary.json"
FAILURES_NAME = "failures.csv"
NOT_CONVERGED_NAME = "notconverged.csv"
# Newer Pythons make of 0700 a Windows ACL that locks a service account out: there, see the README.
OWNER_ONLY = 0o777 if os.name == "nt" else 0o700
PART = ".part"  # A file under this suffix is not finished, whatever it holds.

BLOCK_BYTES = 1 << 18  # Read at a time; measured: larger blocks fall out of the processor's cache.
CONFIG_BYTES = 10_000_000  # config.xml may not be larger.
CONFIG_ERRORS = 100  # Nobody reads on; a file with more is no configuration.
RECORD_BYTES = 1 << 24  # One CSV record may not be longer: memory stays bounded on any input.
NEAR_BYTES = 1 << 10  # Looked at by row where differences are far apart.
SORT_BYTES = 1 << 24  # Sorted in memory at a time by sort="true".
FETCH_ROWS = 1000
ORACLE_ROWS = 5000  # A round trip brings as many.
LISTING_ENTRIES = 10_000  # A directory with more is a broken or hostile server.
CONNECT_SECONDS = 30.0
CANCEL_SECONDS = 30.0  # A database may take this long to give up a call.
RETRY_ATTEMPTS = 4
RETRY_SECONDS = 2.0  # The first pause; each further one is twice as long.

log = logging.getLogger("sgsync")

Row = tuple[str, ...]
Tick = Callable[[int], None]  # Tells the display how much more is done.
T = TypeVar("T")


# ---------------------------------------------------------------------- errors: class Error


class Error(Exception):
    """A failure that a person can act on.

    `message` says what failed, where and why; `remedy` follows `Try:`.  A `transient` failure may
    pass by itself, so the same work is tried again.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "", *, transient: bool = False) -> None:
        super().__init__(message)
        self.message, self.remedy, self.transient = message, remedy, transient

    def __str__(self) -> str:
        return f"{self.message}\nTry: {self.remedy}" if self.remedy else self.message


class ConfigError(Error):
    """config.xml, a file it names, or the command line is wrong."""

    exit_code = 2


class TransferError(Error):
    """The SFTP server could not be reached, trusted or understood, or a file did not arrive."""

    exit_code = 3


class DatabaseError(Error):
    """The database refused a connection, a query, a call or a statement."""

    exit_code = 4

    def __init__(
        self, message: str, remedy: str = "", *, sqlstate: str = "", transient: bool = False
    ) -> None:
        super().__init__(message, remedy, transient=transient)
        self.sqlstate = sqlstate


class DataError(Error):
    """A CSV file cannot be compared: malformed, unsorted, duplicate keys, wrong columns."""

    exit_code = 5


class HeldError(Error):
    """A limit would be exceeded; nothing was written."""

    exit_code = 6


class BusyError(Error):
    """Another run is active in the same home."""

    exit_code = 7


class CancelledError(Error):
    """The work that this belonged to has failed elsewhere; never shown."""


ROWS_FAILED = 8
INTERRUPTED = 130


def printable(text: str) -> str:
    """Every character that is not seen, or steers how others are seen, as an escape."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def one_line(text: object) -> str:
    """Text from outside (a server, a driver, a file) as one printable line.

    Control characters are shown, not obeyed, so that no value can forge a line of the log or
    steer a terminal.
    """
    return printable(str(text).replace("\r", " ").replace("\n", " ").strip())


def shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[:length] + "..."


def batched(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` (itertools.batched is not in Python 3.10)."""
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def plural(count: int, noun: str) -> str:
    """`1 row`, `2 rows`, `12,345 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def retried(work: Callable[[], T], cancelled: threading.Event | None = None) -> T:
    """Do `work`; after a transient `Error` do it again, `RETRY_ATTEMPTS` times in all."""
    import tenacity

    def announce(state: tenacity.RetryCallState) -> None:
        if cancelled and cancelled.is_set():
            return  # The error is of our own making.
        pause = state.next_action.sleep if state.next_action else 0
        error = state.outcome.exception() if state.outcome else None
        log.warning("%s; trying again in %.0f s", getattr(error, "message", error), pause)

    def attempt() -> T:
        if cancelled and cancelled.is_set():
            raise CancelledError("cancelled")
        return work()

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, Error) and e.transient),
        stop=tenacity.stop_after_attempt(RETRY_ATTEMPTS),
        wait=tenacity.wait_exponential(RETRY_SECONDS, max=60),
        sleep=tenacity.sleep_using_event(cancelled) if cancelled else time.sleep,
        before_sleep=announce,
        reraise=True,
    )(attempt)


# ---------------------------------------------------------------------- configuration: load_config

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Limit:
    """`N` rows, or `N%` of the database's rows."""

    number: float
    percent: bool

    def allows(self, changes: int, database_rows: int) -> bool:
        return changes <= (self.number * database_rows / 100 if self.percent else self.number)

    def __str__(self) -> str:
        return f"{self.number:g}{'%' if self.percent else ''}"


_IDENTIFIER = r"[A-Za-z][A-Za-z0-9_$#]{0,127}"

# Parsers of attribute values.  Each raises ValueError with the reason in words.


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty")
    return value


def _optional_text(value: str) -> str:
    return value


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not re.fullmatch(r"\d{1,10}", value, re.ASCII) or not low <= int(value) <= high:
            raise ValueError(f"is not a whole number from {low} to {high}")
        return int(value)

    return parse


def _boolean(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError("is neither true nor false")
    return value == "true"


def _limit(value: str) -> Limit:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)(%?)", value, re.ASCII)
    if not match or (not match[2] and "." in match[1]) or (match[2] and float(match[1]) > 100):
        raise ValueError("is neither a number of rows (25) nor a percentage from 0% to 100%")
    return Limit(float(match[1]), bool(match[2]))


def _remote_directory(value: str) -> str:
    if not value.startswith("/") or ".." in value.split("/"):
        raise ValueError("is not an absolute path on the server, such as /upload")
    return value.rstrip("/") or "/"


def _csv_name(value: str) -> str:
    problem = unsafe_name(value)
    if problem or not value.lower().endswith(".csv"):
        raise ValueError(f"is not a plain file name that ends in .csv ({problem or 'no .csv'})")
    return value


def _names(value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(","))
    if not all(names):
        raise ValueError("has an empty name between its commas" if "," in value else "is empty")
    return names


def _key(value: str) -> tuple[str, ...]:
    names = [name.removesuffix(":int") for name in _names(value)]
    if not all(names):
        raise ValueError("has ':int' without the name of a column")
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"names the column '{shortened(repeated)}' twice")
    return _names(value)


def _choice(*words: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in words:
            raise ValueError(f"is not one of {', '.join(words)}")
        return value

    return parse


def _table(value: str) -> str:
    if not re.fullmatch(rf"(?:{_IDENTIFIER}\.)?{_IDENTIFIER}", value):
        raise ValueError("is not the name of a table")
    return value


def _column(value: str) -> str:
    if not re.fullmatch(_IDENTIFIER, value):
        raise ValueError("is not the name of a column")
    return value


def _optional_column(value: str) -> str:
    return _column(value) if value else ""


def _grades(value: str) -> tuple[int, ...]:
    grades = _names(value)
    if not all(re.fullmatch(r"-?\d{1,2}", grade, re.ASCII) for grade in grades):
        raise ValueError("is not a list of grades such as 8,9,10,11,12")
    return tuple(int(grade) for grade in grades)


def _optional_integer(value: str) -> int | None:
    return _integer(0, 999_999_999)(value) if value else None


def _month_day(value: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d\d)-(\d\d)", value, re.ASCII)
    try:
        day = datetime.date(2001, int(match[1]), int(match[2])) if match else None
    except ValueError:
        day = None
    if day is None:
        raise ValueError("is not a month and a day such as 07-01")
    return day.month, day.day


def _date_format(value: str) -> str:
    with contextlib.suppress(ValueError):  # Windows refuses what it does not know
        if re.search(r"%[dj]", value) and datetime.date(2001, 2, 3).strftime(value):
            return value
    raise ValueError("is not a date form such as %m/%d/%Y")


def _procedure(value: str) -> str:
    part = r'(?:[A-Za-z_][\w$#@]*|\[[^\[\]]+\]|"[^"]+")'
    if not re.fullmatch(rf"{part}(?:\.{part}){{0,3}}", value):
        raise ValueError("is not the name of a procedure, such as dbo.sg_iep_upsert")
    return value


_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?")


def unsafe_name(name: str) -> str:
    """Why `name` cannot be the name of a file on Windows and Linux alike, or ''.

    Source: Microsoft, "Naming Files, Paths, and Namespaces".
    """
    if not name or len(name.encode("utf-8", "replace")) > 200:
        return "empty or longer than 200 bytes"
    if name in (".", "..") or re.search(r'[/\\:*?"<>|]', name):
        return 'contains a path or one of \\ / : * ? " < > |'
    if not name.isprintable():
        return "contains a character that cannot be printed"
    if name != name.strip() or name.endswith("."):
        return "begins with a blank or ends with a blank or a dot"
    if _RESERVED.fullmatch(name):
        return "is the name of a device on Windows"
    return ""


def attribute(parse: Callable[[str], object], default: object = REQUIRED, **options: Any) -> Any:
    """A dataclass field that `_ConfigReader` fills from the attribute of the same name.

    `default` is written as in config.xml, or None where absence has a meaning of its own.
    """
    return dataclasses.field(metadata={"parse": parse, "default": default}, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftpSettings:
    """<SFTP>; paths are relative to the home folder."""

    host: str = attribute(_text)
    port: int = attribute(_integer(1, 65535), "22")
    username: str = attribute(_text)
    private_key: str = attribute(_text, "ssh/id_rsa")
    passphrase: str = attribute(_optional_text, "", repr=False)
    known_hosts: str = attribute(_text, "ssh/known_hosts")
    download_directory: str = attribute(_remote_directory, "/download")
    upload_directory: str = attribute(_remote_directory, "/upload")
    require_complete: bool = attribute(_boolean, "true")
    max_age_hours: int = attribute(_integer(0, 100_000), "36")
    timeout_seconds: int = attribute(_integer(1, 3600), "60")
    # What SchooLinks' server has instead of the element: a password, other places to correct it.
    password: str = dataclasses.field(default="", repr=False)
    element: str = "<SFTP>"
    host_from: str = "<SFTP>"
    operator: str = "SameGoal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatabaseSettings:
    """<Database>."""

    connection_string: str = attribute(_text, repr=False)
    batch_size: int = attribute(_integer(1, 10_000), "500")
    query_timeout_seconds: int = attribute(_integer(1, 86_400), "3600")
    verify: bool = attribute(_boolean, "false")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """<Limits>."""

    max_deletes: Limit = attribute(_limit, "10%")
    max_updates: Limit = attribute(_limit, "50%")
    max_failures: int = attribute(_integer(0, 1_000_000), "25")


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """<History>."""

    keep_runs: int = attribute(_integer(1, 100_000), "365")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """<Insert>, <Update> or <Delete>: a procedure, or one SQL statement with `?` marks."""

    procedure: str | None = attribute(_procedure, None)
    parameters: tuple[str, ...] | None = attribute(_names, None)
    statement: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SqlDiff:
    """<SQLDiff>: one file of SameGoal and the query that gives the same rows."""

    file: str = attribute(_csv_name)
    key: tuple[str, ...] | None = attribute(_key, None)
    sort: bool = attribute(_boolean, "false")
    trim: bool = attribute(_boolean, "false")
    null_text: str | None = attribute(_text, None)
    date_format: str | None = attribute(_date_format, None)
    ignore_case: bool = attribute(_boolean, "false")
    ignore_number_form: bool = attribute(_boolean, "false")
    ignore_line_breaks: bool = attribute(_boolean, "false")
    max_deletes: Limit | None = attribute(_limit, None)
    max_updates: Limit | None = attribute(_limit, None)
    query: str = ""
    calls: dict[str, Call] = dataclasses.field(default_factory=dict)  # operation -> Call
    where: str = ""  # file and line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statement:
    """<SQL> in <Upload>: run for its effect, or for the rows of `file`."""

    file: str | None = attribute(_csv_name, None)
    sql: str = ""
    where: str = ""  # file and line


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttendanceSettings:
    """<Attendance> in <SchooLinks>."""

    enabled: bool = attribute(_boolean, "true")
    file: str = attribute(_csv_name, "attendance_percentage.csv")
    scale: str = attribute(_choice("fraction", "percent"), "fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpaSettings:
    """<GPA> in <SchooLinks>; a column that is '' stays blank in the file."""

    enabled: bool = attribute(_boolean, "true")
    file: str = attribute(_csv_name, "gpa.csv")
    table: str = attribute(_table, "u_def_ext_students0")
    unweighted: str = attribute(_optional_column, "simple_gpa")
    weighted: str = attribute(_optional_column, "weighted_gpa")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TagSettings:
    """<Tag>: students whose `column` equals `equals` get a row."""

    name: str = attribute(_text)
    detailed_name: str = attribute(_text)
    description: str = attribute(_text)
    table: str = attribute(_table)
    column: str = attribute(_column)
    equals: str = attribute(_text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TagsSettings:
    """<Tags> in <SchooLinks>."""

    enabled: bool = attribute(_boolean, "true")
    file: str = attribute(_csv_name, "student_tags.csv")
    tags: tuple[TagSettings, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchooLinksSettings:
    """<SchooLinks>; a section that is not there is switched off."""

    directory: str = attribute(_remote_directory, "/automated")
    test_directory: str = attribute(_remote_directory, "/other")
    ignored_school: int | None = attribute(_optional_integer, "901")
    grades: tuple[int, ...] = attribute(_grades, "8,9,10,11,12")
    school_year_start: tuple[int, int] = attribute(_month_day, "07-01")
    max_shrink: Limit = attribute(_limit, "10%")
    quoting: str = attribute(_choice("all", "minimal"), "all")
    private_key: str = attribute(_optional_text, "")
    passphrase: str = attribute(_optional_text, "", repr=False)
    thick_mode: bool = attribute(_boolean, "false")
    client_directory: str | None = attribute(_text, None)
    query_timeout_seconds: int = attribute(_integer(1, 86_400), "600")
    timeout_seconds: int = attribute(_integer(1, 3600), "60")
    attendance: AttendanceSettings
    gpa: GpaSettings
    tags: TagsSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """config.xml, checked whole.  Elements that the command does not use may be None."""

    path: Path
    sftp: SftpSettings
    database: DatabaseSettings
    limits: Limits
    history: History
    sql_diffs: tuple[SqlDiff, ...]
    statements: tuple[Statement, ...]
    schoolinks: SchooLinksSettings
    secrets: frozenset[str] = dataclasses.field(repr=False)


# element -> (its dataclass, elements that may stand in it)
ELEMENTS: dict[str, tuple[type | None, tuple[str, ...]]] = {
    "Config": (
        None,
        ("SFTP", "Database", "Limits", "History", "Download", "Upload", "SchooLinks"),
    ),
    "SFTP": (SftpSettings, ()),
    "Database": (DatabaseSettings, ()),
    "Limits": (Limits, ()),
    "History": (History, ()),
    "Download": (None, ("SQLDiff",)),
    "SQLDiff": (SqlDiff, ("Query", "Insert", "Update", "Delete")),
    "Query": (None, ()),
    "Insert": (Call, ()),
    "Update": (Call, ()),
    "Delete": (Call, ()),
    "Upload": (None, ("SQL",)),
    "SQL": (Statement, ()),
    "SchooLinks": (SchooLinksSettings, ("Attendance", "GPA", "Tags")),
    "Attendance": (AttendanceSettings, ()),
    "GPA": (GpaSettings, ()),
    "Tags": (TagsSettings, ("Tag",)),
    "Tag": (TagSettings, ()),
}
REPEATABLE = {"SQLDiff", "SQL", "Tag"}
TEXT_ELEMENTS = {"Query", "Insert", "Update", "Delete", "SQL"}
USED_BY = {
    "sync": {"SFTP", "Database", "Limits", "History", "Download", "Upload"},
    "schoolinks": {"SchooLinks", "History"},
}
NEEDED_BY = {"sync": ("SFTP", "Database", "Download"), "schoolinks": ("SchooLinks",)}

_DOCTYPE = re.compile(
    rb"(?:[\s\xef\xbb\xbf\xfe\xff]|<\?(?:(?!\?>).)*\?>|<!--(?:(?!-->).)*-->)*<!DOCTYPE", re.S
)
_XML_ATTRIBUTE = re.compile(r"""\s([^\s=<>"'/]+)\s*=\s*(?:"[^"]*"|'[^']*')""")
_PLACEHOLDER = re.compile(r"\$\{(?:(env|keyring):([^${}]+)\})?")
_PASSWORD = re.compile(r"(?i)(?:^|;)\s*(?:pwd|password)\s*=\s*(\{(?:[^}]|\}\})*\}|[^;]*)")
_SQL_TOKEN = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|\[[^\]]*\]|--[^\n]*|/\*.*?\*/|(\?)", re.S)


def attributes_of(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The attributes of an element as config.xml spells them."""
    return {
        re.sub(r"_(.)", lambda match: match[1].upper(), field.name): field
        for field in dataclasses.fields(cls)
        if "parse" in field.metadata
    }


def load_config(path: Path, command: str) -> Config:
    """Read and check config.xml for `command` (`sync` or `schoolinks`).

    Raises ConfigError with every error of the file at once, each with file, line, element,
    reason and remedy.
    """
    return _ConfigReader(path, command).read()


class _ConfigReader:
    """One reading of config.xml; collects the errors instead of stopping at the first."""

    def __init__(self, path: Path, command: str) -> None:
        self.path, self.command = path, command
        self.text = ""  # The file, to look up lines in.
        self.line_ends: list[int] = []  # Offsets in `text`.
        self.errors: list[tuple[int, str]] = []
        self.secrets: set[str] = set()
        self.used = True  # Whether the element being read matters to the command.

    def read(self) -> Config:
        root = self._parse()
        self._attributes(root)
        sections: dict[str, Any] = {}
        for element in self._children(root):
            self.used = element.tag in USED_BY[self.command]
            sections[element.tag] = self._read_section(element)
        for tag in NEEDED_BY[self.command]:
            if tag not in sections:
                self._fail(root, "", f"has no <{tag}> element", f"take <{tag}> from the template")
        if self.errors:
            raise self._error()
        return Config(
            path=self.path,
            sftp=sections.get("SFTP", cast("SftpSettings", None)),
            database=sections.get("Database", cast("DatabaseSettings", None)),
            limits=sections.get("Limits") or _defaults(Limits),
            history=sections.get("History") or _defaults(History),
            sql_diffs=sections.get("Download", ()),
            statements=sections.get("Upload", ()),
            schoolinks=sections.get("SchooLinks", cast("SchooLinksSettings", None)),
            secrets=frozenset(secret for secret in self.secrets if len(secret) > 2),
        )

    def _parse(self) -> etree._Element:
        from lxml import etree

        raw = self._raw()
        doctype = _DOCTYPE.match(raw.replace(b"\0", b""))  # without them UTF-16 reads as ASCII
        if doctype:
            line = doctype[0].count(b"\n") + 1
            raise ConfigError(
                f"{self.path.name}:{line}: has a DOCTYPE, which is refused (it can read other "
                "files)",
                "delete it: <!DOCTYPE ...>",
            )
        parser = etree.XMLParser(
            resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False
        )
        try:
            root = etree.fromstring(raw, parser)
        except etree.XMLSyntaxError as error:
            # What it names may be the part of a password after its & or its quote.
            reason = re.sub(r"Entity '.*?' not defined", "a & that begins no entity", error.msg)
            reason = re.sub(
                r"((?:for|^)\s*attribute|QName|prefix) .*?(?=, line| redefined| is not defined|$)",
                r"\1 ...", reason, flags=re.I,
            )  # fmt: skip
            reason = re.sub(r", line \d+, column (\d+)$", r" (column \1)", reason)
            raise ConfigError(
                f"{self.path.name}:{error.lineno or 1}: not well-formed XML: {one_line(reason)}",
                "look at that line and the one above for a missing quote, bracket or end tag; "
                "write & as &amp; and < as &lt; in attributes, and SQL inside <![CDATA[ ... ]]>",
            ) from None
        encoding = root.getroottree().docinfo.encoding or "UTF-8"
        try:
            self.text = raw.decode(encoding, "replace") + "\n"
        except LookupError:  # known to libxml2 alone
            self.text = raw.decode("latin-1") + "\n"
        self.line_ends = [match.start() for match in re.finditer("\n", self.text)]
        if root.tag != "Config":
            raise ConfigError(
                f"{self.path.name}:{self._line_of(root, '')}: the outermost element is "
                f"<{shortened(one_line(root.tag))}>, not <Config>",
                "start from the config.xml that came with sgsync",
            )
        return root

    def _raw(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                raw = file.read(CONFIG_BYTES + 1)
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be read: {error.strerror}",
                "give the folder that holds config.xml with --home, or the file with --config",
            ) from None
        if len(raw) > CONFIG_BYTES:
            raise ConfigError(
                f"{self.path}: is larger than {CONFIG_BYTES:,} bytes, so it is no configuration",
                "give the right file with --config",
            )
        return raw

    def _fail(
        self, element: etree._Element, name: str, reason: str, remedy: str, line: int = 0
    ) -> None:
        line = line or self._line_of(element, name)
        tag, name = one_line(element.tag)[:80], one_line(name)[:80]
        place = f"<{tag} {name}>" if name else f"<{tag}>"
        text = f"{self.path.name}:{line}: {place}: {one_line(reason)}"
        self.errors.append((line, f"{text}\nTry: {remedy}"))
        if len(self.errors) == CONFIG_ERRORS:
            raise self._error()

    def _error(self) -> ConfigError:
        self.errors.sort(key=operator.itemgetter(0))
        keep_secret(self.secrets)
        return ConfigError("\n".join(text for _, text in self.errors))

    def _line_of(self, element: etree._Element, name: str) -> int:
        """The line of an attribute, or of its start tag; lxml knows only where that tag ends."""
        end = self._end_of_tag(element)
        begin = self.text.rfind(f"<{element.tag}", 0, end)
        if begin < 0:  # such as {namespace}Tag
            return self._line_at(end)
        for match in _XML_ATTRIBUTE.finditer(self.text, begin, end) if name else ():
            if match[1] == name:
                begin = match.start(1)
                break
        return self._line_at(begin)

    def _where(self, element: etree._Element) -> str:
        return f"{self.path.name}:{self._line_of(element, '')}"

    def _end_of_tag(self, element: etree._Element) -> int:
        """The offset of the end of the line on which a start tag ends."""
        line = cast("int", element.sourceline or 1)
        return self.line_ends[min(line, len(self.line_ends)) - 1]

    def _line_at(self, offset: int) -> int:
        import bisect

        return bisect.bisect_left(self.line_ends, offset) + 1

    def _children(self, element: etree._Element) -> Iterator[etree._Element]:
        """The known elements inside `element`; unknown, repeated or stray content is an error."""
        allowed = ELEMENTS[element.tag][1]
        seen: set[str] = set()
        for child in element:
            if not isinstance(child.tag, str):  # a comment or a processing instruction
                continue
            if child.tag not in allowed:
                self._unknown(child, "", f"is not known inside <{element.tag}>", child.tag, allowed)
            elif child.tag in seen and child.tag not in REPEATABLE:
                self._fail(child, "", "stands there twice", "keep one of them")
            else:
                seen.add(child.tag)
                yield child
        if element.tag in TEXT_ELEMENTS:
            return
        for before, text in ((element, element.text), *((child, child.tail) for child in element)):
            if words := (text or "").split():
                begin = self.text.rfind("\n", 0, self._end_of_tag(before)) + 1
                found = re.compile(rf">\s*(?={re.escape(words[0])})").search(self.text, begin)
                line = self._line_at(found.end() if found else begin)
                self._fail(element, "", "contains stray text", "delete it", line)

    def _unknown(
        self, element: etree._Element, name: str, reason: str, found: str, known: Iterable[str]
    ) -> None:
        import difflib

        spelled = {word.lower(): word for word in known}
        close = difflib.get_close_matches(found[:80].lower(), spelled, 1, 0.5)
        remedy = f"write {spelled[close[0]]}" if close else f"known are {', '.join(known)}"
        self._fail(element, name, reason, remedy if known else "delete it")

    def _read_section(self, element: etree._Element) -> object:
        if element.tag == "Download":
            self._attributes(element)
            return self._sql_diffs(element)
        if element.tag == "Upload":
            self._attributes(element)
            return self._statements(element)
        if element.tag == "SchooLinks":
            return self._schoolinks(element)
        list(self._children(element))
        return self._instance(element)

    def _instance(self, element: etree._Element, **more: object) -> Any:
        """The element's dataclass, or None where one of its attributes is wrong or unfilled."""
        values = self._attributes(element)
        cls = ELEMENTS[element.tag][0]
        return cls(**values, **more) if cls and len(values) == len(attributes_of(cls)) else None

    def _attributes(self, element: etree._Element) -> dict[str, object]:
        cls = ELEMENTS[element.tag][0]
        known = attributes_of(cls) if cls else {}
        for name in element.attrib:
            if name not in known:
                self._unknown(element, str(name), "is not known", str(name), known)
        values: dict[str, object] = {}
        for name, field in known.items():
            default = field.metadata["default"]
            raw = element.get(name, default)
            if raw is REQUIRED:
                if self.used:
                    self._fail(element, "", f"lacks the attribute {name}", f'add {name}="..."')
            elif raw is None:
                values[field.name] = None
            else:
                self._value(element, name, field, str(raw), values)
        return values

    def _value(
        self,
        element: etree._Element,
        name: str,
        field: dataclasses.Field[Any],
        raw: str,
        values: dict[str, object],
    ) -> None:
        if not self.used and ("TODO(user)" in raw or "${" in raw):
            return
        if "TODO(user)" in raw:
            self._fail(element, name, "still holds TODO(user)", "replace it by your own value")
            self._expand(element, name, raw)  # for its errors
            return
        before = len(self.errors)
        text = self._expand(element, name, raw)
        if name == "passphrase" and text:
            self.secrets.add(text)
        if name == "connectionString":
            self.secrets.update(_passwords(text))
        try:
            if len(self.errors) == before:
                values[field.name] = field.metadata["parse"](text)
        except ValueError as error:
            plain = field.repr and raw.strip() and not _PASSWORD.search(raw)
            shown = f"'{shortened(raw)}' " if plain else ""
            self._fail(element, name, f"{shown}{error}", "correct the value")

    def _expand(self, element: etree._Element, name: str, raw: str) -> str:
        """`${env:NAME}` and `${keyring:NAME}` replaced; in a connection string, quoted for it."""

        def value(match: re.Match[str]) -> str:
            source, variable = match[1], match[2]
            if not variable:
                # What is no attempt at a name may be part of a password.
                named = re.match(r"\$\{(?:\w+:\w*\}?|\w+\})", raw[match.start() :])
                reason = f"'{named[0]}' is no" if named else "has a ${ that begins no"
                remedy = "write ${env:NAME} or ${keyring:NAME}"
                self._fail(element, name, f"{reason} placeholder", remedy)
                return ""
            if source == "env":
                found, kind = os.environ.get(variable), "environment variable"
                remedy = "set it for the account that runs sgsync, and start sgsync anew"
            else:
                kind = "keyring entry"
                found, remedy = _from_keyring(variable)
            if not found:
                state = "not set" if found is None else "empty"
                self._fail(element, name, f"the {kind} {variable} is {state}", remedy)
                return ""
            if source == "keyring" or re.search(r"(?i)pass|pwd|secret|token", variable):
                self.secrets.add(found)
            if name != "connectionString":
                return found
            if re.search(r"=\s*\{[^}]*$", raw[: match.start()]):
                return found.replace("}", "}}")
            # ODBC: a value with a special character stands in braces, a brace doubled.  (psqlODBC
            # reads + and % as in a URL, unless they stand in braces.)
            whole = re.search(r"=\s*$", raw[: match.start()])
            special = re.search(r"[\[\]{}(),;?*=!@+%]|^\s|\s$", found)
            return "{" + found.replace("}", "}}") + "}" if whole and special else found

        return _PLACEHOLDER.sub(value, raw)

    def _text_of(self, element: etree._Element) -> str:
        """The SQL text of an element; children in it are errors."""
        list(self._children(element))
        text = "".join([element.text or "", *(child.tail or "" for child in element)]).strip()
        if "TODO(user)" in text and self.used:
            self._fail(element, "", "still holds TODO(user)", "replace it by your own value")
        return text

    def _sql_diffs(self, download: etree._Element) -> tuple[SqlDiff, ...]:
        diffs = [self._sql_diff(element) for element in self._children(download)]
        if not diffs and self.used:
            self._fail(download, "", "has no <SQLDiff> element", "take one from the template")
        self._unique_files(download)
        return tuple(diff for diff in diffs if diff)

    def _sql_diff(self, element: etree._Element) -> SqlDiff | None:
        query, calls = "", {}
        for child in self._children(element):
            if child.tag == "Query":
                self._attributes(child)
                query = self._text_of(child)
            else:
                calls[child.tag.lower()] = self._call(child)
        if not query:
            self._fail(element, "", "has no <Query> with SQL in it", "add the query to export")
        made = self._instance(element, query=query, calls=calls, where=self._where(element))
        return cast("SqlDiff | None", made)

    def _call(self, element: etree._Element) -> Call | None:
        text = self._text_of(element)
        call = cast("Call | None", self._instance(element, statement=text))
        if not call:
            return None
        if bool(call.procedure) == bool(text):
            self._fail(
                element, "", "needs a procedure or one SQL statement, and not both",
                'write procedure="dbo.name", or parameters="a,b" and SQL with a ? for each',
            )  # fmt: skip
        elif text:
            marks = sum(1 for match in _SQL_TOKEN.finditer(text) if match[1])
            if marks != len(call.parameters or ()):
                self._fail(
                    element, "parameters",
                    f"names {plural(len(call.parameters or ()), 'column')} "
                    f"for {plural(marks, '? mark')}",
                    "name one column for each ? in order, parameters=\"a,b\"",
                )  # fmt: skip
        return call

    def _statements(self, upload: etree._Element) -> tuple[Statement, ...]:
        statements = []
        for element in self._children(upload):
            sql = self._text_of(element)
            if not sql:
                self._fail(element, "", "holds no SQL", "write the statement, or delete <SQL>")
            statements.append(self._instance(element, sql=sql, where=self._where(element)))
        self._unique_files(upload)
        return tuple(statement for statement in statements if statement)

    def _schoolinks(self, element: etree._Element) -> object:
        made: dict[str, Any] = {}
        before = len(self.errors)
        for child in self._children(element):
            tags = [self._tag(tag) for tag in self._children(child)]
            more = {"tags": tuple(tag for tag in tags if tag)} if child.tag == "Tags" else {}
            made[child.tag] = self._instance(child, **more)
        self._unique_files(element)
        attendance = made.get("Attendance", _defaults(AttendanceSettings, enabled=False))
        gpa = made.get("GPA", _defaults(GpaSettings, enabled=False))
        tags = made.get("Tags", _defaults(TagsSettings, enabled=False))
        if len(self.errors) == before and attendance and gpa and tags:
            self._check_sections(element, attendance, gpa, tags)
        return self._instance(element, attendance=attendance, gpa=gpa, tags=tags)

    def _tag(self, element: etree._Element) -> TagSettings | None:
        list(self._children(element))
        return cast("TagSettings | None", self._instance(element))

    def _check_sections(
        self,
        element: etree._Element,
        attendance: AttendanceSettings,
        gpa: GpaSettings,
        tags: TagsSettings,
    ) -> None:
        if not (attendance.enabled or gpa.enabled or tags.enabled) and self.used:
            remedy = "add <Attendance>, <GPA> or <Tags>, enabled"
            self._fail(element, "", "has no section that is switched on", remedy)
        if gpa.enabled and not (gpa.unweighted or gpa.weighted):
            self._fail(element, "", "<GPA> names no column", "name unweighted= or weighted=")
        if tags.enabled and not tags.tags:
            self._fail(element, "", "<Tags> has no <Tag>", 'add one, or set enabled="false"')

    def _unique_files(self, parent: etree._Element) -> None:
        seen: set[str] = set()
        for element in parent.iterchildren("SQLDiff", "SQL", "Attendance", "GPA", "Tags"):
            name = element.get("file")
            taken = {*seen, FAILURES_NAME, NOT_CONVERGED_NAME}
            if name and name.lower() in taken:
                self._fail(element, "file", f"'{name}' is taken already", "choose another name")
            seen.add(str(name).lower())


def _defaults(cls: type[T], **given: object) -> T:
    """An element that stands nowhere in config.xml."""
    values = dict(given)
    for field in attributes_of(cls).values():
        default = field.metadata["default"]
        parsed = None if default in (None, REQUIRED) else field.metadata["parse"](default)
        values.setdefault(field.name, parsed)
    return cls(**values)


def _passwords(connection_string: str) -> Iterator[str]:
    """The passwords in an ODBC connection string, as written and as meant."""
    for match in _PASSWORD.finditer(connection_string):
        yield match[1]
        if match[1].startswith("{"):
            yield match[1][1:-1].replace("}}", "}")


def _from_keyring(name: str) -> tuple[str | None, str]:
    """An entry of the system's password store, and what to do where there is none."""
    try:
        import keyring
        import keyring.errors
    except ImportError:
        return None, "pip install keyring, or write ${env:NAME}"
    try:
        return keyring.get_password("sgsync", name), f"store it: keyring set sgsync {name}"
    except keyring.errors.KeyringError as error:
        return (
            None,
            f"make the password store available ({one_line(error)}), or write ${{env:NAME}}",
        )


# ---------------------------------------------------------------------- connections: Sftp, Database


class Watchdog:
    """Closes a connection on which nothing has moved for `seconds`.

    Drivers' own time-outs do not cover every place where a dead network can block them.
    """

    def __init__(self, seconds: float, close: Callable[[], None]) -> None:
        self.seconds, self.expired = seconds, False
        self._close, self._deadline = close, float("inf")
        self._stop = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def feed(self) -> None:
        """Something moved, or an operation begins."""
        self._deadline = time.monotonic() + self.seconds

    def rest(self) -> None:
        """No operation is under way."""
        self._deadline = float("inf")

    def stop(self) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(min(0.5, self.seconds / 4)):
            if time.monotonic() > self._deadline:
                self.expired = True
                self._close()
                return


@dataclasses.dataclass(frozen=True)
class RemoteEntry:
    """One entry of a directory on the server; `modified` is seconds since 1970, by its clock."""

    name: str
    is_directory: bool
    is_file: bool
    size: int
    modified: float


class Sftp:
    """An SFTP session: host key pinned, log-in by key or password, every operation bounded in time.

    Raises TransferError for the server's and the network's faults, ConfigError for the key files.
    """

    def __init__(self, settings: SftpSettings, home: Path) -> None:
        self.settings, self.home = settings, home
        self.where = f"{settings.host}:{settings.port}"
        self._transport: paramiko.Transport | None = None
        self._client: paramiko.SFTPClient | None = None
        self._watchdog: Watchdog | None = None

    def __enter__(self) -> Sftp:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def connect(self) -> None:
        """Connect and log in, where that has not been done or the connection is gone."""
        if self._transport and self._transport.is_active() and self._client:
            return
        self.close()
        import socket

        import paramiko

        logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # What it logs it raises, too.
        private_key = None if self.settings.password else self._private_key()
        host_keys = self._host_keys()
        self._watchdog = Watchdog(self.settings.timeout_seconds, self._hang_up)
        with self._operation(f"{self.where}: cannot connect"):
            address = (self.settings.host, self.settings.port)
            sock = socket.create_connection(address, timeout=CONNECT_SECONDS)
            try:
                # Else each small packet of the log-in waits 40 ms for the other side.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._transport = transport = paramiko.Transport(sock)
            except BaseException:
                sock.close()
                raise
            transport.banner_timeout = transport.handshake_timeout = CONNECT_SECONDS
            transport.auth_timeout = transport.channel_timeout = CONNECT_SECONDS
            self._prefer_known_keys(transport, host_keys)
            transport.start_client(timeout=2 * CONNECT_SECONDS)  # greeting and key exchange
            self._check_host_key(transport.get_remote_server_key(), host_keys)
            transport.set_keepalive(15)
            if private_key:
                transport.auth_publickey(self.settings.username, private_key)
            else:
                transport.auth_password(self.settings.username, self.settings.password)
            self._client = paramiko.SFTPClient.from_transport(transport)
            if self._client is None:
                raise TransferError(f"{self.where}: the server offers no SFTP", transient=True)
            channel = self._client.get_channel()
            if channel is not None:
                channel.settimeout(self.settings.timeout_seconds)
        log.info("%s: logged in as %s", self.where, self.settings.username)

    def close(self) -> None:
        """Close the connection; work that waits on it fails at once."""
        if self._watchdog:
            self._watchdog.stop()
        self._hang_up()
        self._transport = self._client = None

    def _hang_up(self) -> None:
        if transport := self._transport:
            transport.close()

    def listing(self, directory: str) -> list[RemoteEntry]:
        """The entries of a directory, sorted by name; all within `timeout_seconds`."""
        import stat

        entries: list[RemoteEntry] = []
        subject = f"{self.where}: {directory}: cannot be listed"
        with self._operation(subject):
            for found in self._listed(subject, directory):
                mode = found.st_mode or 0
                entries.append(
                    RemoteEntry(
                        found.filename,
                        stat.S_ISDIR(mode),
                        stat.S_ISREG(mode),
                        found.st_size or 0,
                        float(found.st_mtime or 0),
                    )
                )
                if len(entries) > LISTING_ENTRIES:
                    raise TransferError(
                        f"{self.where}: {directory}: has more than {LISTING_ENTRIES:,} entries",
                        "clear out that directory, or correct the directory in "
                        f"{self.settings.element}",
                    )
        return sorted(entries, key=lambda entry: entry.name)

    def _listed(self, subject: str, directory: str) -> Iterator[paramiko.SFTPAttributes]:
        try:
            yield from self._session().listdir_iter(directory, read_aheads=1)
        except UnicodeDecodeError:
            raise TransferError(
                f"{subject}: a name in it is not UTF-8",
                "ask the server's operator; no name of that kind belongs into an extract",
            ) from None

    def read(self, path: str, size: int, *, ahead: bool) -> Iterator[bytes]:
        """The blocks of a file of `size` bytes; a file that goes on after them is an error.

        `ahead` asks for all of it at once: fast, but some servers choke on it.
        """
        subject = f"{self.where}: {path}: cannot be downloaded"
        with self._operation(subject):
            file = self._session().open(path, "rb")
            if ahead and 1 << 20 < size <= 1 << 32:  # Each request is kept in memory.
                file.prefetch(size)
        received = 0
        try:
            while True:
                with self._operation(subject):
                    block = file.read(1 << 18)
                if not block:
                    break
                received += len(block)
                if received > size:
                    break
                yield block
        finally:
            with contextlib.suppress(Error), self._operation(subject):
                file.close()
        if received != size:
            what = "goes on behind" if received > size else "ended before"
            raise TransferError(
                f"{self.where}: {path}: the file {what} the {size:,} bytes that were announced",
                "see whether the file is still being written; the next run takes it again",
                transient=True,
            )

    def make_directory(self, path: str) -> None:
        """Make a directory, unless it is there."""
        with self._operation(f"{self.where}: {path}: cannot be made"):
            try:
                self._session().mkdir(path)
            except OSError:
                with contextlib.suppress(FileNotFoundError):
                    self._session().stat(path)
                    return
                raise

    def exists(self, path: str) -> bool:
        with self._operation(f"{self.where}: {path}: cannot be looked up"):
            try:
                self._session().stat(path)
            except FileNotFoundError:
                return False
            return True

    def write(self, path: str, file: BinaryIO) -> int:
        """Upload an open file; returns its size, which the server has confirmed."""
        sent = 0
        with self._operation(f"{self.where}: {path}: cannot be uploaded"):
            with self._session().open(path, "wb") as remote:
                remote.set_pipelined(True)
                while block := file.read(1 << 15):
                    remote.write(block)
                    self._feed()
                    sent += len(block)
            size = self._session().stat(path).st_size
        if size != sent:
            raise TransferError(
                f"{self.where}: {path}: {size} bytes arrived of {sent}",
                "see whether the server's disk is full",
                transient=True,
            )
        return sent

    def write_whole(self, path: str, file: BinaryIO) -> int:
        """Upload under a temporary name and rename; directly where the server refuses either."""
        try:
            size = self.write(path + PART, file)
        except TransferError as error:
            if error.transient:
                raise
        else:
            if self._renamed(path + PART, path):
                return size
        file.seek(0)
        return self.write(path, file)

    def _renamed(self, path: str, to: str) -> bool:
        """Rename over what is there; where the server refuses, `path` is deleted."""
        with self._operation(f"{self.where}: {to}: cannot be renamed to"):
            session = self._session()
            try:
                session.posix_rename(path, to)
                return True
            except TimeoutError:
                raise  # It may have been done: `to` must not be removed.
            except OSError:
                pass  # An old server has no such extension.
            with contextlib.suppress(OSError):
                with contextlib.suppress(FileNotFoundError):
                    session.remove(to)
                session.rename(path, to)
                return True
            with contextlib.suppress(OSError):
                session.remove(path)
        return False

    def mark(self, path: str) -> None:
        """Make an empty file.  It is not looked at again: the server may take it at once."""
        with self._operation(f"{self.where}: {path}: cannot be made"):
            self._session().open(path, "wb").close()

    def _session(self) -> paramiko.SFTPClient:
        if self._client is None:
            raise TransferError(f"{self.where}: the connection was closed", transient=True)
        return self._client

    def _feed(self) -> None:
        if self._watchdog:
            self._watchdog.feed()

    @contextlib.contextmanager
    def _operation(self, subject: str) -> Iterator[None]:
        """Bounds one exchange with the server in time, and converts the driver's exceptions."""
        import paramiko

        self._feed()
        try:
            yield
        except (paramiko.SSHException, paramiko.SFTPError, EOFError, OSError) as error:
            translated = self._translated(subject, error)
            if translated.transient:  # What did not answer once must not be asked again.
                self._hang_up()
            raise translated from error
        finally:
            if self._watchdog:
                self._watchdog.rest()

    def _translated(self, subject: str, error: Exception) -> TransferError:
        import errno
        import socket

        import paramiko

        reason = one_line(error) or type(error).__name__
        if isinstance(error, EOFError):
            reason = "the server closed the connection"
        if reason.startswith("Error reading SSH protocol banner"):
            reason = "no SSH server answers there"
        cut_off = re.search("(?i)shut down|timeout", reason)  # so paramiko calls it, too
        expired = self._watchdog and self._watchdog.expired
        if isinstance(error, TimeoutError) or expired or reason == "No existing session":
            seconds = float(self.settings.timeout_seconds)
            if not (expired or self._client):
                seconds = min(seconds, CONNECT_SECONDS)
            reason = f"no answer for {seconds:g} s"
        if isinstance(error, paramiko.AuthenticationException) and not cut_off:
            remedy = f"see that the public half of {self.settings.private_key} is stored for "
            remedy += "this user at the server"
            if self.settings.operator == "SameGoal":
                remedy += " (SameGoal takes up to 60 minutes for a new key)"
            if self.settings.password:
                remedy = "see that SCHOOLINKS_SFTP_USERNAME and SCHOOLINKS_SFTP_PASSWORD are right"
            return TransferError(
                f"{self.where}: log-in as {self.settings.username} refused: {reason}", remedy
            )
        if isinstance(error, socket.gaierror):
            remedy = f"see whether the host in {self.settings.host_from} is right and the name "
            remedy += "server answers"
            return TransferError(f"{subject}: {reason}", remedy, transient=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM):
            words = "it does not exist" if error.errno == errno.ENOENT else "permission denied"
            remedy = f"correct the directory in {self.settings.element}, or ask for access to it"
            return TransferError(f"{subject}: {words}", remedy)
        if isinstance(error, paramiko.SFTPError) and "No such file" in reason:
            remedy = f"correct the directory in {self.settings.element}"
            return TransferError(f"{subject}: it does not exist", remedy)
        remedy = "see whether the server is up and a firewall lets this machine reach it"
        return TransferError(f"{subject}: {reason}", remedy, transient=True)

    def _private_key(self) -> paramiko.PKey:
        import paramiko

        path = self.home / self.settings.private_key
        try:
            head = path.read_bytes()[:64]
        except OSError as error:
            remedy = "make a key pair: ssh-keygen -t rsa -b 4096 -f ssh/id_rsa, and store the "
            remedy += f"public half at {self.settings.operator}"
            if isinstance(error, PermissionError):
                remedy = "let the account that runs sgsync own and read that file"
            reason = f"the private key cannot be read: {error.strerror}"
            raise ConfigError(f"{path}: {reason}", remedy) from None
        if head.startswith(b"PuTTY-User-Key-File"):
            raise ConfigError(
                f"{path}: is a key in PuTTY's form",
                "open it in PuTTYgen and save it by Conversions > Export OpenSSH key",
            )
        if head.startswith((b"ssh-", b"ecdsa-")):
            raise ConfigError(
                f"{path}: is the public half of a key",
                "name the private half, the file without .pub",
            )
        encrypted = False
        for passphrase in (None, self.settings.passphrase or None):
            for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
                try:
                    return kind.from_private_key_file(str(path), passphrase)
                except paramiko.PasswordRequiredException:
                    encrypted = True
                except Exception as error:  # of many kinds, by the library below paramiko
                    log.debug("%s: %s", path, one_line(error))
        if encrypted and self.settings.passphrase:
            raise ConfigError(
                f"{path}: cannot be opened: the passphrase is wrong",
                f"correct passphrase= in {self.settings.element}",
            )
        if encrypted:
            raise ConfigError(
                f"{path}: the private key is protected by a passphrase",
                f'add passphrase="${{env:NAME}}" to {self.settings.element} and set that variable',
            )
        raise ConfigError(
            f"{path}: is no private key in OpenSSH's form",
            "use an OpenSSH key of the type RSA, ECDSA or Ed25519",
        )

    def _host_name(self) -> str:
        """As known_hosts spells it."""
        host, port = self.settings.host, self.settings.port
        return host if port == 22 else f"[{host}]:{port}"

    def _host_keys(self) -> list[paramiko.PKey]:
        """The pinned keys of this server, at least one."""
        import paramiko
        from paramiko.hostkeys import HostKeyEntry

        path = self.home / self.settings.known_hosts
        scan = f"ssh-keyscan -p {self.settings.port} {self.settings.host}"
        remedy = f"pin the server's key: {scan} >> {path}, after comparing its fingerprint"
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}", remedy) from None
        # PowerShell's > writes UTF-16.
        utf_16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
        keys = []
        for line in raw.decode("utf-16" if utf_16 else "utf-8-sig", "replace").splitlines():
            known = paramiko.HostKeys()  # for one line: for all, it would hide a second key
            with contextlib.suppress(Exception):  # comments and lines of no use
                if entry := HostKeyEntry.from_line(" ".join(line.split())):
                    for name in entry.hostnames:
                        known.add(name, entry.key.get_name(), entry.key)
                    if known.lookup(self._host_name()):
                        keys.append(entry.key)
        if not keys:
            raise TransferError(f"{path}: holds no host key of {self._host_name()}", remedy)
        return keys

    @staticmethod
    def _prefer_known_keys(transport: paramiko.Transport, host_keys: list[paramiko.PKey]) -> None:
        """Ask for a host key of a type that is pinned; a server may have several."""
        options = transport.get_security_options()
        kinds = {key.get_name() for key in host_keys}

        def pinned(name: str) -> bool:
            return name in kinds or (name.startswith("rsa-sha2-") and "ssh-rsa" in kinds)

        options.key_types = sorted(options.key_types, key=lambda name: not pinned(name))

    def _check_host_key(self, key: paramiko.PKey, host_keys: list[paramiko.PKey]) -> None:
        if any(pinned.asbytes() == key.asbytes() for pinned in host_keys):
            return
        known = ", ".join(f"{pinned.get_name()} {fingerprint(pinned)}" for pinned in host_keys)
        raise TransferError(
            f"{self.where}: the host key is {key.get_name()} {fingerprint(key)}, "
            f"but {self.settings.known_hosts} has {known}; nothing was sent",
            "ask the server's operator whether the key was changed; only then replace the line of "
            f"{self._host_name()} in {self.settings.known_hosts}",
        )


def fingerprint(key: paramiko.PKey) -> str:
    """A host key's fingerprint as ssh-keygen -l prints it."""
    import base64
    import hashlib

    digest = hashlib.sha256(key.asbytes()).digest()
    return "SHA256:" + base64.b64encode(digest).decode("ascii").rstrip("=")


class _Worker(threading.Thread):
    """Runs a driver's blocking calls one after another, so that the caller can stop waiting."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="database")
        import queue

        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Pending] | None]
        self._jobs = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while job := self._jobs.get():
            work, future = job
            try:
                future.value = work()
            except BaseException as error:  # handed to the caller
                future.error = error
            future.done.set()

    def submit(self, work: Callable[[], Any]) -> Pending:
        future = Pending()
        self._jobs.put((work, future))
        return future

    def end(self) -> None:
        self._jobs.put(None)


class Pending:
    """What a `_Worker` will have done."""

    def __init__(self) -> None:
        self.done, self.value = threading.Event(), cast("Any", None)
        self.error: BaseException | None = None


MSSQL, POSTGRESQL = "Microsoft SQL Server", "PostgreSQL"

# Calls sent as one statement, where the database takes several: measured on both, nothing is
# faster within one transaction but SQL Server's parameter arrays, whose errors cannot be trusted
# to name or to undo the right rows.
CALLS_PER_STATEMENT = {MSSQL: 50, POSTGRESQL: 100}
PARAMETERS_PER_STATEMENT = 2000  # SQL Server allows 2,100.

_DEADLOCK = {"40001", "40P01", "55P03"}
_LOST = {"08001", "08003", "08006", "08007", "08S01", "08S02", "57P01", "57P02", "57P03", "HYT01"}
_NO_PROCEDURE = {"42883", "42809", "42501"}


class Database:
    """The district's database through ODBC.  Raises DatabaseError.

    Every call runs in a thread of its own and is given up after `query_timeout_seconds` and a
    margin, because no ODBC driver bounds all of its waits.
    """

    def __init__(self, settings: DatabaseSettings) -> None:
        self.settings = settings
        self.name = ""  # the product, such as "PostgreSQL"
        self._connection: pyodbc.Connection | None = None
        self._cursor: pyodbc.Cursor | None = None
        self._worker: _Worker | None = None
        self._cancelled = threading.Event()
        self._cancelling: list[threading.Thread] = []
        self._lock = threading.Lock()  # between `cancel` and what lets go of the connection

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def connect(self) -> None:
        """Connect, where that has not been done."""
        if self._connection:
            return
        try:
            import pyodbc
        except ImportError as error:
            raise DatabaseError(
                f"the ODBC package cannot be loaded: {one_line(error)}",
                "pip install -r requirements.txt; on Linux also install unixODBC "
                "(apt-get install unixodbc)",
            ) from None
        pyodbc.pooling = False

        def connect() -> tuple[pyodbc.Connection, pyodbc.Cursor, str]:
            connection = pyodbc.connect(
                self.settings.connection_string, timeout=int(CONNECT_SECONDS), autocommit=False
            )
            with contextlib.suppress(pyodbc.Error):  # the SQLite driver has no query time-out
                connection.timeout = self.settings.query_timeout_seconds
            name = connection.getinfo(pyodbc.SQL_DBMS_NAME)
            return connection, connection.cursor(), str(name)

        self._worker = _Worker()
        try:
            connected = self._run("the database", connect, CONNECT_SECONDS + 10)
        except BaseException:
            self._release()
            raise
        self._connection, self._cursor, self.name = connected
        log.info("database: connected to %s", one_line(self.name))

    def close(self) -> None:
        """Roll back what is open, and close."""
        self._release().wait(5)

    def _release(self) -> threading.Event:
        """Let go of the connection; its own thread closes it when it is done with its call.

        Only there, and the cursor first: where one thread frees a cursor while another one closes
        its connection, pyodbc leaves an exception behind that strikes code of no concern to it.
        """
        with self._lock:
            connection, cursor, worker = self._connection, self._cursor, self._worker
            cancelling, self._cancelling = self._cancelling, []
            self._connection = self._cursor = self._worker = None
        if not worker:
            done = threading.Event()
            done.set()
            return done

        def release() -> None:
            for thread in cancelling:
                thread.join(5)
            if connection and cursor:
                for step in (connection.rollback, cursor.close, connection.close):
                    with contextlib.suppress(Exception):
                        step()

        done = worker.submit(release).done
        worker.end()
        return done

    def cancel(self) -> None:
        """From another thread: let the call under way be given up."""
        self._cancelled.set()
        self._interrupt()

    def query(self, subject: str, sql: str) -> tuple[Row, Iterator[list[Sequence[object]]]]:
        """Run a query; returns the names of its columns and its rows in blocks.

        The next block is fetched while the caller works on the last one.
        """
        cursor = self._open_cursor()

        def execute() -> Row:
            cursor.execute(sql)
            while cursor.description is None:  # an answer without rows, such as a row count
                if not cursor.nextset():
                    raise DatabaseError(f"{subject}: gives no columns", "write a SELECT")
            return tuple(str(column[0]) for column in cursor.description)

        columns: Row = self._run(subject, execute)
        return columns, self._blocks(subject, cursor)

    def _blocks(self, subject: str, cursor: pyodbc.Cursor) -> Iterator[list[Sequence[object]]]:
        pending = self._submit(lambda: cursor.fetchmany(FETCH_ROWS))
        while rows := self._result(subject, pending):
            pending = self._submit(lambda: cursor.fetchmany(FETCH_ROWS))
            yield rows

    def drain(self, subject: str) -> None:
        """Read on to the end: an error after the first result shows only there."""
        cursor = self._open_cursor()

        def drain() -> None:
            while cursor.nextset():
                if cursor.description is not None and cursor.fetchone() is not None:
                    log.debug("%s: further rows are not kept", subject)

        self._run(subject, drain)

    def execute(self, subject: str, sql: str, parameters: Sequence[str | None] = ()) -> None:
        """Run one statement to its end; every result set is read."""
        self.execute_all(subject, [(sql, parameters)])

    def execute_all(
        self, subject: str, statements: Sequence[tuple[str, Sequence[str | None]]]
    ) -> None:
        """Run statements with their parameters one after another, each to its end."""
        cursor = self._open_cursor()

        def execute() -> None:
            for sql, parameters in statements:
                cursor.execute(sql, list(parameters))
                while cursor.nextset():
                    pass

        self._run(subject, execute)

    def revive(self) -> None:
        """Connect again where the connection was lost while it lay idle."""
        cursor = self._open_cursor()
        try:
            self._run(
                "the database", lambda: cursor.execute("SELECT 1").fetchall(), CONNECT_SECONDS
            )
            self.rollback()
        except DatabaseError as error:
            log.info("%s; connecting again", error.message)
            self.close()
        self.connect()

    def commit(self) -> None:
        connection = self._open_connection()
        self._run("commit", connection.commit)

    def rollback(self) -> None:
        """Undo what is open.  Where that fails, the connection is dropped: that undoes it too."""
        if not self._connection:
            return
        try:
            self._run("rollback", self._connection.rollback)
        except DatabaseError as error:
            log.debug("%s", error.message)
            self.close()

    def call_text(self, procedure: str, count: int) -> str:
        """The call of a procedure with `count` parameters, as this database wants it."""
        marks = ", ".join("?" * count)
        if self.name == MSSQL:
            return f"EXEC {procedure} {marks}".rstrip()
        if self.name == POSTGRESQL:
            return f"CALL {procedure}({marks})"
        return f"{{CALL {procedure}({marks})}}"

    def spelled(self, sql: str) -> str:
        """`{CALL p}` or `{CALL p(...)}` as a whole statement, as this database wants it."""
        call = re.fullmatch(r"(?is)\{\s*call\s+([^\s(]+)\s*(?:\((.*)\))?\s*\}", sql.strip())
        if not call or self.name not in (MSSQL, POSTGRESQL):
            return sql
        name, arguments = call[1], (call[2] or "").strip()
        if self.name == MSSQL:
            return f"EXEC {name} {arguments}".rstrip()
        return f"CALL {name}({arguments})"

    def calls_per_statement(self, parameters: int) -> int:
        limit = CALLS_PER_STATEMENT.get(self.name, 1)
        return max(1, min(limit, PARAMETERS_PER_STATEMENT // max(1, parameters)))

    def _open_connection(self) -> pyodbc.Connection:
        self.connect()
        return cast("pyodbc.Connection", self._connection)

    def _open_cursor(self) -> pyodbc.Cursor:
        self.connect()
        return cast("pyodbc.Cursor", self._cursor)

    def _run(self, subject: str, work: Callable[[], Any], seconds: float = 0) -> Any:
        return self._result(subject, self._submit(work), seconds)

    def _submit(self, work: Callable[[], Any]) -> Pending:
        if self._worker is None:
            raise DatabaseError("the database connection was closed", transient=True)
        return self._worker.submit(work)

    def _result(self, subject: str, future: Pending, seconds: float = 0) -> Any:
        """Wait, in short steps: on Windows a longer wait would not notice Ctrl-C.

        After `seconds` the server is asked to cancel; where even that has no effect, the call is
        left to its thread, and the connection with it.
        """
        seconds = seconds or self.settings.query_timeout_seconds
        end, late = time.monotonic() + seconds, False
        try:
            while not future.done.wait(0.2):
                if self._cancelled.is_set():
                    raise CancelledError(subject)
                if time.monotonic() > end and late:
                    self._abandon()
                    break
                if time.monotonic() > end:
                    late, end = True, end + min(CANCEL_SECONDS, seconds)
                    self._interrupt()
        except CancelledError:
            self._abandon()
            raise
        except BaseException:  # Ctrl-C: what follows is to find a connection that listens
            self._interrupt()
            raise
        error = future.error
        if not future.done.is_set() or (late and error):
            raise DatabaseError(
                f"{subject}: no answer from the database for {seconds:.0f} s",
                "see whether the server and the network to it are up, or raise "
                "queryTimeoutSeconds on <Database>",
                sqlstate="HYT00",
            )
        if isinstance(error, Error):
            raise error
        if error is not None:
            # Without the driver's own exception, which may quote a row.
            raise self._translated(subject, error) from None
        return future.value

    def _interrupt(self) -> None:
        """Ask the server to give up the call under way, from a thread: this may block, too."""
        with self._lock:
            cursor = self._cursor
            if cursor and self.name != "SQLite":  # whose driver frees what another thread reads

                def cancel() -> None:
                    with contextlib.suppress(Exception):
                        cursor.cancel()

                thread = threading.Thread(target=cancel, daemon=True, name="cancel")
                self._cancelling.append(thread)
                thread.start()

    def _abandon(self) -> None:
        """Leave a call that does not return to its thread; the connection is of no use any more."""
        self._interrupt()
        self._release()

    def _translated(self, subject: str, error: BaseException) -> DatabaseError:
        import pyodbc

        if not isinstance(error, pyodbc.Error):
            return DatabaseError(f"{subject}: {type(error).__name__}: {one_line(error)}")
        sqlstate = str(error.args[0]) if error.args else ""
        text = driver_message(str(error.args[-1]) if error.args else "")
        lost = sqlstate in _LOST or (sqlstate == "HY000" and _LOST_TEXT.search(text) is not None)
        lost = lost or "login timeout" in text.lower()  # so SQL Server's driver, with HYT00
        lost = lost and not _REFUSED_TEXT.search(text)
        if lost:
            self._release()
        remedy = _database_remedy(sqlstate, text)
        return DatabaseError(
            f"{subject}: {text}",
            remedy,
            sqlstate=sqlstate,
            transient=lost or sqlstate in _DEADLOCK or "deadlock" in text.lower(),
        )


_LOST_TEXT = re.compile(
    r"(?i)server closed the connection|connection (?:was |has been )?(?:lost|closed|reset|broken)"
    r"|communication link failure|could not (?:send|receive)|no connection to the server"
    r"|terminating connection|server has gone away"
)
_REFUSED_TEXT = re.compile(  # PostgreSQL's driver has no SQLSTATE of its own for these.
    r"(?i)authentication failed|login failed|no pg_hba.conf entry|certificate"
    r"|FATAL: .*(?:does not exist|not permitted|permission denied)"
)


_QUOTED_VALUE = re.compile(  # as PostgreSQL and SQL Server quote what they could not convert
    r"""(?sx) ( invalid\ input\ (?:syntax|value)\ for\ [^:"]*(?:"[^"]*")?:\ "
              | field\ value\ out\ of\ range:\ "
              | (?<!\w)value\ ["'](?=.*["']\ (?:is\ out\ of\ range|overflowed|to\ data\ type|for))
              | Truncated\ value:\ ' | duplicate\ key\ value\ is\ \( )
        .* ( " | ' | \) )"""
)


def driver_message(text: str) -> str:
    """A driver's message without its prefixes and without the row that it may quote."""
    text = re.sub(r"^\[[0-9A-Z]{5}\]\s*", "", text)
    text = re.sub(r"^(?:\[[^\]]*\]\s*)+", "", text)
    text = re.split(r";?\s*\n?\s*(?:DETAIL|CONTEXT|HINT|QUERY|STATEMENT):", text)[0]
    text = re.sub(r";?\s*Error while (?:executing|preparing) .*", "", text, flags=re.S)
    text = re.sub(r"\s*\(-?\d+\)\s*\((?:SQL\w+)\)\s*$", "", text)
    text = _QUOTED_VALUE.sub(r"\1...\2", text)
    return one_line(re.sub(r"\s+", " ", text)) or "the driver gave no reason"


def _database_remedy(sqlstate: str, text: str) -> str:
    """What a technician can do, by SQLSTATE (ISO/IEC 9075, and each product's own)."""
    import pyodbc

    if "certificate" in text.lower():
        return (
            "let this machine trust the authority that signed the server's certificate, or add "
            "TrustServerCertificate=yes to connectionString"
        )
    if sqlstate in ("28000", "28P01") or _REFUSED_TEXT.search(text):
        return "see that user, password and database in connectionString are right"
    if sqlstate == "IM002" or "Can't open lib" in text or "file not found" in text:
        installed = ", ".join(pyodbc.drivers()) or "none"
        return f"correct Driver= in connectionString or install that driver; here are: {installed}"
    if sqlstate in ("08001", "HYT00") or sqlstate in _LOST:
        return "see whether the database server is up and a firewall lets this machine reach it"
    if re.search(
        r"(?i)permission denied for (?:table|view|schema|relation)|SELECT permission", text
    ):
        return "grant SELECT on it to the user of sgsync"
    if sqlstate in _NO_PROCEDURE or "could not find stored procedure" in text.lower():
        return "run procedures.sql in this database, and grant EXECUTE to the user of sgsync"
    if sqlstate in ("42S02", "42S22", "42P01", "42703", "42601", "42000"):
        return "correct the SQL or the names in config.xml, or run procedures.sql"
    return ""


# ---------------------------------------------------------------------- local files: new_file


@contextlib.contextmanager
def local_errors(path: Path) -> Iterator[None]:
    """Turns a failure of this machine's disk into an Error that names the file."""
    try:
        yield
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise Error(
            f"{path}: {error.strerror or error}",
            "see that the disk has space left and that the account which runs sgsync may write "
            "to this folder",
        ) from error


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under its name only when it is whole."""
    part = path.with_name(path.name + PART)
    try:
        with local_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                yield file
            _replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _replace(part: Path, path: Path) -> None:
    """os.replace; on Windows a virus scanner may hold a new file for a moment."""
    for pause in (0.1, 0.3, 1.0):
        try:
            part.replace(path)
            return
        except PermissionError:
            if os.name != "nt":
                raise
            time.sleep(pause)
    part.replace(path)


# ---------------------------------------------------------------------- CSV: CsvFile, csv_writer
#
# Given a path; gives the header and the rows in blocks; raises DataError with file and line.
#
# A file is read in blocks of whole records.  Each block is checked and brought into one canonical
# format, bytes in which \0 stands between fields, \n after rows, and \xff for a line break inside a
# field (that byte occurs in no UTF-8, and \0 is refused).  Equal rows are then equal bytes, however
# they were quoted, and the order of bytes is the order of the tuples of fields.

CSV_LIMIT = 2**31 - 1
csv.field_size_limit(CSV_LIMIT)

_BREAK = b"\xff"
_QUOTE = ord('"')  # `number in bytes` is ten times as fast as `bytes in bytes`.
_BOM = b"\xef\xbb\xbf"
_NOT_STRUCTURE = bytes(set(range(256)) - set(b',"\r\n'))
_NOT_CANONICAL = bytes(set(range(256)) - set(b"\0\n"))
_TO_CANONICAL = bytes.maketrans(b",", b"\0")
_FROM_CANONICAL = bytes.maketrans(b"\0" + _BREAK, b",\n")
_REGULAR = re.compile(rb'(?:"")?(?:,(?:"")?)*\r?\n')
# Begins with the quote itself: so the search leaps from quote to quote.
_LOOSE_QUOTE = re.compile(rb'"(?:(?<=[^,\r\n"]")|(?=([^,\r\n"])))')
_LONE_RETURN = re.compile(rb"\r(?!\n)")
_BLANKS_AT_END = re.compile(rb"(?<! ) +(?=[\0\n])")


@dataclasses.dataclass(frozen=True)
class Block:
    """`rows` records in canonical format; the first begins on line `line` of its file."""

    data: bytes
    line: int
    rows: int

    def line_at(self, offset: int) -> int:
        """The line on which the row at `offset` begins."""
        return self.line + self.data.count(b"\n", 0, offset) + self.data.count(_BREAK, 0, offset)


def decode_row(row: bytes) -> Row:
    r"""The fields of one canonical row: `b"1\0Lee"` is `("1", "Lee")`."""
    return tuple(row.replace(_BREAK, b"\n").decode("utf-8").split("\0"))


def encode_rows(rows: Sequence[bytes]) -> bytes:
    r"""Canonical rows as csv.writer would write them: `b"1\0Lee, A"` is `b'1,"Lee, A"\r\n'`."""
    text = b"".join(rows)
    # Quotes come first: a field that begins with one from then on needs no more.
    for mark in (_QUOTE, *b",\r", *_BREAK):
        if mark in text:
            holders = [row for row in rows if mark in row]
            fields = b"\0\n\0".join(holders).split(b"\0")
            if mark == _QUOTE:
                fields = [b'"%b"' % f.replace(b'"', b'""') if mark in f else f for f in fields]
            else:
                fields = [b'"%b"' % f if mark in f and f[:1] != b'"' else f for f in fields]
            quoted = iter(b"\0".join(fields).split(b"\0\n\0"))
            rows = [next(quoted) if mark in row else row for row in rows]
    return b"\r\n".join([*rows, b""]).translate(_FROM_CANONICAL)


class CsvFile:
    """A CSV file: RFC 4180, UTF-8 with or without BOM, a header first, memory bounded.

    `columns` is the header, () for a file of 0 bytes; `blocks()` gives the rows, once, or
    `raw_blocks()` does, of which `canonical` takes any whole records.  `trim` drops blanks at the
    end of fields, then a field of `null_text` becomes empty.  Raises DataError with file and line
    for everything that RFC 4180 does not allow, and for rows that have more or fewer fields than
    the header.
    """

    def __init__(
        self, path: Path, shown: str = "", *, trim: bool = False, null_text: str | None = None
    ) -> None:
        self.path, self.shown = path, shown or path.name
        self.columns: Row = ()
        self.line = 1  # of what is read next; whoever takes raw blocks keeps it
        self._trim, self._null_text = trim, null_text
        text = (null_text or "").encode("utf-8", "surrogatepass").replace(b"\n", _BREAK)
        self._null = (
            re.compile(rb"(?<![^\0\n])" + re.escape(text) + rb"(?=[\0\n])") if text else None
        )
        self._regular_line = b""  # The structure of a row that has been found regular.
        with local_errors(path):
            self._file: BinaryIO = path.open("rb")
        try:
            self._records = self._read_records()
            self._rest = self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CsvFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def again(self) -> CsvFile:
        """The same file from its beginning."""
        return CsvFile(self.path, self.shown, trim=self._trim, null_text=self._null_text)

    def blocks(self) -> Iterator[Block]:
        """The rows in canonical format, block by block."""
        for raw in self.raw_blocks():
            block = self.canonical(raw, self.line)
            self.line += raw.count(b"\n") if _BREAK in block.data else block.rows
            yield block

    def raw_blocks(self) -> Iterator[bytes]:
        """The rows as they stand in the file, whole records, not yet checked."""
        return itertools.chain([self._rest] if self._rest else (), self._records)

    def canonical(self, raw: bytes, line: int) -> Block:
        """Whole records that begin on `line`, checked and in canonical format."""
        block = self._canonical(raw, line)
        data = block.data
        if self._trim:
            data = _BLANKS_AT_END.sub(b"", data)
        if self._null:
            data = self._null.sub(b"", data)
        return block if data is block.data else Block(data, line, block.rows)

    @staticmethod
    def record_end(raw: bytes, begin: int = 0) -> int:
        """The offset behind the last whole record of `raw`, 0 where there is none.

        `raw` starts outside quotes, so a line break behind an even number of quotes ends a record;
        none does so before `begin`.
        """
        end = raw.rfind(b"\n", begin) + 1
        odd = raw.count(b'"', 0, end) % 2 if b'"' in raw else 0  # `in` takes a tenth of `count`.
        while odd:  # Inside a quoted field, which starts at the last quote or before.
            quote = raw.rfind(b'"', begin, end)
            before = raw.rfind(b"\n", begin, quote) + 1 if quote >= 0 else 0
            if not before:
                return 0
            odd ^= raw.count(b'"', before, end) % 2
            end = before
        return end

    def fail(self, line: int, what: str, remedy: str) -> NoReturn:
        raise DataError(f"{self.shown}:{line}: {what}", remedy)

    def refuse_separator(self, header: str) -> None:
        """Raise DataError if something else than commas separates the names of a header."""
        separators = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
        found = "".join(mark for mark in separators if mark in header)
        if found and "," not in header:
            self.fail(
                1,
                f"the file is separated by {separators[found[0]]}, not commas: was it saved by "
                "Excel?",
                "export it again with commas (Excel uses the list separator of the Windows "
                "regional settings)",
            )

    def _read_header(self) -> bytes:
        """Settle the names of the columns; returns what follows them in the first block, raw."""
        first = next(self._records, b"")
        if first.startswith((b"\xff\xfe", b"\xfe\xff")):
            self.fail(1, "is UTF-16", "save or export it as UTF-8")
        first = first.removeprefix(_BOM)
        if not first:
            return b""
        end = quotes = 0
        while end == 0 or quotes % 2:  # The first record ends behind an even number of quotes.
            start, end = end, first.index(b"\n", end) + 1
            quotes += first.count(b'"', start, end)
        header = first[:end]
        if re.search(rb'"[;\t|]"', header):  # No field may go on behind a quote.
            self.refuse_separator(header.decode("utf-8", "replace"))
        columns = decode_row(self._canonical(header, 1).data[:-1])
        seen: set[str] = set()
        for number, name in enumerate(columns, 1):
            if not name or name in seen:
                what = f"the column '{one_line(name)}' appears more than once"
                what = what if name else f"column {number} has no name"
                self.fail(1, f"the header is wrong: {what}", "give each column its own name")
            seen.add(name)
        self.columns = columns
        self.line += header.count(b"\n")
        return first[end:]

    def _read_records(self) -> Iterator[bytes]:
        """The file in blocks that end where a record ends; the last one gets its line end."""
        rest = b""
        while True:
            with local_errors(self.path):
                read = self._file.read(BLOCK_BYTES)
            raw = rest + read
            end = self.record_end(raw, len(rest))
            if not read:
                break
            if end == 0 and len(raw) > RECORD_BYTES:
                self._fail_endless(
                    raw,
                    f"a record is longer than {RECORD_BYTES >> 20} MB",
                    "look for a quote that is never closed; the file may not be CSV at all",
                )
            if end:
                yield raw[:end]
            rest = raw[end:]
        cut_off = "check whether the file was cut off, and export it again"
        if rest.count(b'"') % 2:
            self._fail_endless(rest, "a quoted field is never closed", cut_off)
        if rest.endswith(b"\r"):
            line = self.line + rest.count(b"\n")
            self.fail(line, "a carriage return without a line feed", cut_off)
        if rest:
            yield rest + b"\n"

    def _fail_endless(self, raw: bytes, what: str, remedy: str) -> NoReturn:
        """`raw` is one record without end; something in it may be the reason."""
        self._check_nul(raw, self.line)
        begin = raw[: 1 << 20].removeprefix(_BOM)
        self._canonical_irregular(begin + b'"' * (begin.count(b'"') % 2), self.line)
        self.fail(self.line, what, remedy)

    def _canonical(self, raw: bytes, line: int) -> Block:
        """One block in canonical format.

        Nearly every block of a real file is regular: all its rows quote the same columns and no
        field holds a comma, a quote or a line break.  One translation that leaves only those
        characters shows it, and a second one makes the canonical format.
        """
        width = len(self.columns)  # 0 for the header itself
        self._check_text(raw, line)
        structure = raw.translate(None, _NOT_STRUCTURE)
        first = structure[: structure.find(b"\n") + 1]
        rows = len(structure) // len(first)
        if first * rows == structure and self._is_regular(first, width, rows, raw):
            return Block(raw.translate(_TO_CANONICAL, b'"\r'), line, rows)
        data = self._canonical_irregular(raw, line)
        block = Block(data, line, data.count(b"\n"))
        if width:
            self._check_width(block, width)
        return block

    def _check_nul(self, raw: bytes, line: int) -> None:
        if b"\0" in raw:
            self.fail(
                line + raw.count(b"\n", 0, raw.index(b"\0")),
                "contains a NUL character: this is a binary or UTF-16 file",
                "export the file again as CSV in UTF-8",
            )

    def _check_text(self, raw: bytes, line: int) -> None:
        self._check_nul(raw, line)
        if not raw.isascii():
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                self.fail(
                    line + raw.count(b"\n", 0, error.start),
                    f"is not UTF-8: byte 0x{raw[error.start]:02x}",
                    "export the file as UTF-8 (that byte looks like Windows-1252 or Latin-1)",
                )

    def _is_regular(self, first: bytes, width: int, rows: int, raw: bytes) -> bool:
        """Whether `rows` rows of the structure `first` are well-formed, in all of `raw`."""
        if first != self._regular_line:
            if not _REGULAR.fullmatch(first) or (width and first.count(b",") != width - 1):
                return False
            self._regular_line = first
        # The row's carriage return may stand in the middle of its last field if that has no quotes.
        in_field = b"\r" in first and not first.endswith(b'"\r\n')
        if in_field and _LONE_RETURN.search(raw):
            return False
        if b'"' not in first:
            return True
        # Two quotes a field: the one must open it and the other close it.
        quoted = first.count(b'"') // 2 * rows
        opened = raw.count(b',"') + raw.count(b'\n"') + raw.startswith(b'"')
        closed = raw.count(b'",') + raw.count(b'"\r\n' if first.endswith(b"\r\n") else b'"\n')
        return opened == closed == quoted

    def _canonical_irregular(self, raw: bytes, line: int) -> bytes:
        """The same for any block: split at the quotes, every other piece stands inside them."""
        pieces = raw.split(b'"')
        outside, inside = pieces[0::2], pieces[1::2]
        skeleton = b'"'.join(outside)  # Each " now stands for a quoted piece.
        wrong = _LOOSE_QUOTE.search(skeleton) or _LONE_RETURN.search(skeleton)
        if wrong:
            before = skeleton[: wrong.start() + bool(wrong.re is _LOOSE_QUOTE and wrong[1])]
            hidden = inside[: before.count(b'"')]
            lines = before.count(b"\n") + sum(piece.count(b"\n") for piece in hidden)
            if wrong.re is _LOOSE_QUOTE:
                what = "a field contains a quote but is not quoted as a whole"
                remedy = 'quote the whole field and double each quote in it: "a ""b"" c"'
            else:
                what, remedy = "a carriage return without a line feed", "end lines with CR LF or LF"
            self.fail(line + lines, what, remedy)
        outside = skeleton.translate(_TO_CANONICAL, b"\r").split(b'"')
        inside = b'"'.join(inside).replace(b"\n", _BREAK).split(b'"') if inside else []
        pieces[0::2], pieces[1::2] = outside, inside
        # A doubled quote leaves an empty piece outside, between two inside.
        pieces[2:-1:2] = [piece or b'"' for piece in outside[1:-1]]
        return b"".join(pieces)

    def _check_width(self, block: Block, width: int) -> None:
        structure = block.data.translate(None, _NOT_CANONICAL)
        if structure == (b"\0" * (width - 1) + b"\n") * block.rows:
            return
        offset = 0
        for row in block.data[:-1].split(b"\n"):
            fields = row.count(b"\0") + 1
            if fields != width:
                self.fail(
                    block.line_at(offset),
                    f"has {plural(fields, 'field')} where the header has {width}",
                    "check whether the file was cut off or a value with a comma is not quoted",
                )
            offset += len(row) + 1


@contextlib.contextmanager
def csv_writer(
    path: Path, quoting: Literal[0, 1] = csv.QUOTE_MINIMAL
) -> Iterator[Callable[[Iterable[Sequence[object]]], None]]:
    """Write a CSV file as RFC 4180 wants it; yields a function that takes rows."""
    with new_file(path) as binary:
        text = io.TextIOWrapper(binary, encoding="utf-8", newline="")
        yield csv.writer(text, quoting=quoting).writerows
        text.flush()
        text.detach()


# ---------------------------------------------------------------------- keys and order: Key
#
# Given the blocks of a CSV file and the columns of its key; gives the rows, sorted on request, in
# windows whose order has been checked; raises DataError for two rows out of order, or of one key,
# with both lines and both keys.


class Key:
    r"""The columns that identify a row, in sort order; those of `:int` sort as numbers.

        key = Key(["id:int", "start"], ("id", "name", "start"), "b.csv")
        key.of_rows(b"9\0Lee\0A\n10\0Ann\0B\n") == [(9, b"A"), (10, b"B")]

    Keys compare as the tuples of their fields do: text by code point.  Raises DataError for a
    column that the file, called `shown`, does not have.
    """

    def __init__(self, spec: Sequence[str] | None, columns: Row, shown: str) -> None:
        self.names = tuple(name.removesuffix(":int") for name in spec) if spec else columns
        missing = [name for name in self.names if name not in columns]
        if missing:
            raise DataError(
                f"{shown}: the key column '{missing[0]}' is not in the header "
                f"({', '.join(map(one_line, columns))})",
                "correct the key, or the name of the column in the query",
            )
        self.indexes = tuple(columns.index(name) for name in self.names)
        self._numeric = [name.endswith(":int") for name in spec or [""] * len(columns)]
        # Text in columns side by side is one piece of the row, and compares as such.
        first, last = self.indexes[0], max(self.indexes)
        neighbors = tuple(range(first, first + len(self.indexes)))
        self._is_piece = self.indexes == neighbors and not any(self._numeric)
        self.begins_row = self._is_piece and first == 0
        numbers = {i for i, numeric in zip(self.indexes, self._numeric, strict=True) if numeric}
        fields = [
            rb"-?[0-9]{1,40}" if i in numbers else rb"[^\0]*" if i < len(columns) - 1 else rb".*"
            for i in range(last + 1)
        ]
        if self._is_piece:
            fields[first:] = [rb"(" + rb"\0".join(fields[first:]) + rb")"]
        else:
            fields = [rb"(%b)" % f if i in self.indexes else f for i, f in enumerate(fields)]
        rest = rb"\n" if last == len(columns) - 1 else rb"\0.*\n"
        self._row = re.compile(rb"^" + rb"\0".join(fields) + rest, re.MULTILINE)

    def of_rows(self, data: bytes) -> list[Any]:
        """The keys of canonical rows; ValueError where one is not a number.

        A key is bytes, a number, or a tuple of both: whatever is fastest for these columns.
        """
        found: list[Any] = self._row.findall(data)
        has_breaks = _BREAK in data
        if self._is_piece:
            return [key.replace(_BREAK, b"\n") for key in found] if has_breaks else found
        if len(found) < data.count(b"\n"):
            raise ValueError("a key is not a whole number")
        in_file = sorted(self.indexes)
        columns: list[Any] = list(zip(*found, strict=True)) if len(in_file) > 1 else [found]
        parts: list[Iterable[Any]] = []
        for index, numeric in zip(self.indexes, self._numeric, strict=True):
            column = columns[in_file.index(index)] if found else ()
            if numeric:
                column = map(int, column)
            elif has_breaks:
                column = [field.replace(_BREAK, b"\n") for field in column]
            parts.append(column)
        return list(zip(*parts, strict=True)) if len(parts) > 1 else list(parts[0])

    def of(self, row: bytes) -> Any:
        """The key of one canonical row."""
        return self.of_rows(row + b"\n")[0]

    def of_block(self, block: Block, file: CsvFile) -> list[Any]:
        """`of_rows`; raises DataError with the line of a row whose key is not a number."""
        with contextlib.suppress(ValueError):
            return self.of_rows(block.data)
        offset = 0
        for row in block.data[:-1].split(b"\n"):
            try:
                self.of(row)
            except ValueError:
                file.fail(
                    block.line_at(offset),
                    f"the key {self.show(decode_row(row))} is not a whole number (:int)",
                    "correct the value, or drop :int from the key",
                )
            offset += len(row) + 1
        raise AssertionError("every key is a number")

    def show(self, row: Row) -> str:
        """A row's key for a message: `studentNumber=1001, startDate=2026-01-15`."""
        return ", ".join(
            f"{one_line(name)}={one_line(shortened(row[index], 100))}"
            for name, index in zip(self.names, self.indexes, strict=True)
        )


class OrderedRows:
    """The rows of one side in a window of bytes, found to ascend strictly as they are passed.

    The window holds the file's own bytes, so that two files which are written alike need not be
    brought into canonical format where they are equal; or, after `make_canonical`, canonical rows.
    """

    def __init__(
        self, csv_file: CsvFile, key: Key, in_order: Iterator[Block] | None = None
    ) -> None:
        self.csv_file, self.key = csv_file, key
        self.data, self.position = b"", 0
        self.rows = 0  # passed so far
        self.is_raw = in_order is None
        self._sorted = in_order  # blocks whose lines are forgotten
        self._blocks = csv_file.raw_blocks()
        self._line = csv_file.line  # of `position`
        self._last_row, self._last_key = b"", cast("Any", None)  # of what was passed
        self._bytes, self._piece = b"", Block(b"", 0, 0)  # what `ahead` looked at

    def fill(self) -> bool:
        """Make sure that a row begins at `position`; False at the end of the file."""
        if self.position < len(self.data):
            return True
        self.position = 0
        if self._sorted:
            block = next(self._sorted, None)
            self.data = block.data if block else b""
        else:
            self.csv_file.line = self._line
            self.data = next(self._blocks, b"")
            if self.data and not self.is_raw:
                self.data = self.csv_file.canonical(self.data, self._line).data
        return bool(self.data)

    def make_canonical(self) -> None:
        """From here on the window holds canonical rows, equal for equal rows."""
        if self.is_raw:
            rest = self.data[self.position :]
            self.data = self.csv_file.canonical(rest, self._line).data if rest else b""
            self.position, self.is_raw = 0, False

    def pass_equal(self, size: int, other: OrderedRows) -> int:
        """Pass the rows, whole ones, in the next `size` bytes, which `other` has just the same.

        Checks their order; that of the other's rows needs no check: they ascend as these do, and
        the row before them was found to be less than these.  Returns how many bytes that was.
        """
        equal = self.data[self.position : self.position + size]
        end = self.csv_file.record_end(equal) if self.is_raw else equal.rfind(b"\n") + 1
        if end:
            block, keys = self._checked(equal[:end])
            last = block.data[block.data.rfind(b"\n", 0, -1) + 1 : -1]
            lines = len(keys) + block.data.count(_BREAK)
            for side in (self, other):
                side.position += end
                side.rows += len(keys)
                side._line += lines
                side._last_row, side._last_key = last, keys[-1]
        return end

    def ahead(self, size: int) -> list[Any]:
        """The keys, checked, of the rows that begin within the next `size` bytes."""
        end = min(self.position + size, len(self.data)) - 1
        odd = True
        while odd:
            end = self.data.index(b"\n", end) + 1
            odd = self.is_raw and self.data.count(b'"', self.position, end) % 2 == 1
        self._bytes = self.data[self.position : end]
        self._piece, keys = self._checked(self._bytes)
        return keys

    def take(self, keys: Sequence[Any]) -> list[bytes]:
        """Pass the first rows that `ahead` looked at, one for each of `keys`; returns them."""
        if not keys:
            return []
        rows = self._piece.data.split(b"\n")
        del rows[-1]
        has_breaks = _BREAK in self._piece.data
        if len(rows) == len(keys):
            self.position += len(self._bytes)
        else:
            lines_left = len(rows) - len(keys)
            if has_breaks and self.is_raw:
                lines_left += sum(row.count(_BREAK) for row in rows[len(keys) :])
            del rows[len(keys) :]
            self.position += len(self._bytes[:-1].rsplit(b"\n", lines_left)[0]) + 1
        self.rows += len(rows)
        self._line += len(rows) + (sum(row.count(_BREAK) for row in rows) if has_breaks else 0)
        self._last_row, self._last_key = rows[-1], keys[-1]
        return rows

    def _checked(self, data: bytes) -> tuple[Block, list[Any]]:
        """Rows from `position` on in canonical format, and their keys, found to ascend."""
        if self.is_raw:
            block = self.csv_file.canonical(data, self._line)
        else:
            block = Block(data, self._line, 0)
        keys = self.key.of_block(block, self.csv_file)
        in_order = self.rows == 0 or self._last_key < keys[0]
        if not in_order or not all(map(operator.lt, keys, itertools.islice(keys, 1, None))):
            self._refuse(block, keys)
        return block, keys

    def _refuse(self, block: Block, keys: Sequence[Any]) -> NoReturn:
        """Name the first two rows that do not ascend."""
        rows = block.data.split(b"\n")
        lines = list(
            itertools.accumulate((1 + row.count(_BREAK) for row in rows), initial=block.line)
        )
        if self.rows:
            keys, rows = [self._last_key, *keys], [self._last_row, *rows]
            lines = [block.line - 1 - self._last_row.count(_BREAK), *lines]
        index = next(i for i in range(1, len(keys)) if not keys[i - 1] < keys[i])
        found = lines[index - 1 : index + 1]
        before, row = (self.key.show(decode_row(row)) for row in rows[index - 1 : index + 1])
        if keys[index - 1] == keys[index]:
            if self._sorted:
                found = self._lines_of(keys[index])
            place, which = "", "two rows"
            if found:
                place, which = f":{found[1]}", f"lines {found[0]} and {found[1]}"
            raise DataError(
                f"{self.csv_file.shown}{place}: {which} have the same key {row}",
                "add the column that tells them apart to the key, or return only one row per key",
            )
        self.csv_file.fail(
            found[1],
            f"not sorted: line {found[0]} has the key {before}, line {found[1]} has {row}",
            "sort by the key, compared as code points (on SQL Server: ORDER BY ... COLLATE "
            'Latin1_General_BIN2), or set sort="true" (for diff: --sort)',
        )

    def _lines_of(self, key: object) -> list[int]:
        """The lines of the first two rows that have `key`; [] if the file cannot be read again."""
        if not self.csv_file.path.is_file():
            return []
        lines = []
        with self.csv_file.again() as file:
            for block in file.blocks():
                keys = self.key.of_rows(block.data)
                rows = block.data.split(b"\n") if key in keys else []
                offset = 0
                for found, row in zip(keys, rows, strict=False):
                    if found == key:
                        lines.append(block.line_at(offset))
                    offset += len(row) + 1
        return lines[:2]


class Sorter:
    r"""Sorts the rows of a CSV file by key, in memory that is bounded whatever their number.

    As many rows as fit into SORT_BYTES are sorted at a time; such runs wait in one temporary file
    and are merged piece by piece.  What is sorted are lines of Latin-1 text, which Python compares
    fastest: the row itself where its bytes sort as its key does, else behind its key.  A line break
    in a field is \x0b\x01 there, so that it sorts between \t and \x0b (which is \x0b\x02).
    """

    def __init__(self, csv_file: CsvFile, key: Key) -> None:
        self._csv_file, self._key = csv_file, key
        self._runs: list[list[int]] = []  # offset and end of what is left of each, in the file

    def blocks(self) -> Generator[Block, None, None]:
        """The rows in the order of their keys; equal keys stand side by side; lines are 0."""
        with contextlib.ExitStack() as stack:
            run: list[str] = []
            size = 0
            file: IO[bytes] | None = None
            for block in self._csv_file.blocks():
                run += self._lines(block)
                size += len(block.data) + 58 * block.rows  # what Python adds to a text in a list
                if size >= SORT_BYTES:
                    file = file or stack.enter_context(self._temporary_file())
                    self._store(run, file)
                    run, size = [], 0
            if file:
                self._store(run, file)
                run = []
            run.sort()
            for lines in self._merged(file) if file else batched(run, FETCH_ROWS):
                yield self._block(lines)

    def _lines(self, block: Block) -> list[str]:
        lines = self._escaped(block.data).split("\n")
        del lines[-1]
        if self._key.begins_row:
            return lines
        keys = self._key.of_block(block, self._csv_file)
        single = len(self._key.indexes) == 1 or isinstance(keys[0], bytes)
        forms = map(self._form, keys) if single else ("\0".join(map(self._form, k)) for k in keys)
        return list(map("%s\0%s".__mod__, zip(forms, lines, strict=True)))

    @staticmethod
    def _escaped(data: bytes) -> str:
        return data.replace(b"\x0b", b"\x0b\x02").replace(_BREAK, b"\x0b\x01").decode("latin-1")

    def _form(self, part: bytes | int) -> str:
        """Text that sorts as `part`: a number begins with its sign and how many digits it has."""
        if isinstance(part, bytes):
            return self._escaped(part.replace(b"\n", _BREAK))
        digits = len(str(abs(part)))
        if part >= 0:
            return f"{chr(64 + digits)}{part}"
        return f"{chr(64 - digits)}{10**digits + part:0{digits}}"

    def _block(self, lines: Sequence[str]) -> Block:
        columns = 0 if self._key.begins_row else len(self._key.indexes)
        if columns:
            lines = [line.split("\0", columns)[columns] for line in lines]
        data = "\n".join([*lines, ""]).encode("latin-1")
        if b"\x0b" in data:
            data = data.replace(b"\x0b\x01", _BREAK).replace(b"\x0b\x02", b"\x0b")
        return Block(data, 0, len(lines))

    def _temporary_file(self) -> IO[bytes]:
        """A nameless file beside the CSV file, or where such files belong."""
        import tempfile

        folder = self._csv_file.path.parent
        with local_errors(folder):
            return tempfile.TemporaryFile(dir=folder if os.access(folder, os.W_OK) else None)

    def _store(self, run: list[str], file: IO[bytes]) -> None:
        run.sort()
        with local_errors(self._csv_file.path):
            begin = file.tell()
            for lines in batched(run, FETCH_ROWS):
                file.write("\n".join([*lines, ""]).encode("latin-1"))
            self._runs.append([begin, file.tell()])

    def _merged(self, file: IO[bytes]) -> Iterator[list[str]]:
        """The lines of all runs in order: in each round those up to where one piece ends."""
        size = min(SORT_BYTES // (4 * len(self._runs)), BLOCK_BYTES)
        pieces: list[list[str]] = [[] for _ in self._runs]
        while True:
            for index, run in enumerate(self._runs):
                if not pieces[index] and run[0] < run[1]:
                    pieces[index] = self._piece(run, file, size)
            pieces_left = [piece for piece in pieces if piece]
            if not pieces_left:
                return
            horizon = min(piece[-1] for piece in pieces_left)
            lines: list[str] = []
            for piece in pieces_left:
                if piece[0] <= horizon:
                    count = bisect.bisect_right(piece, horizon)
                    lines += piece[:count]
                    del piece[:count]
            lines.sort()  # It finds the stretches that ascend already, and merges them.
            yield lines

    def _piece(self, run: list[int], file: IO[bytes], size: int) -> list[str]:
        """The next whole lines of a run, about `size` bytes; the run then begins behind them."""
        while True:
            size = min(max(size, 1), run[1] - run[0])
            with local_errors(self._csv_file.path):
                file.seek(run[0])
                data = file.read(size)
            end = data.rfind(b"\n") + 1
            if end:
                run[0] += end
                return data[: end - 1].decode("latin-1").split("\n")
            size *= 2


# ---------------------------------------------------------------------- stage: download


@dataclasses.dataclass(frozen=True)
class Extract:
    """One epoch on the server; `modified` is the time of its newest file, seconds since 1970."""

    epoch: str
    modified: float
    files: tuple[RemoteEntry, ...]


def download(
    sftp: Sftp, settings: SftpSettings, folder: Path, tick: Tick, cancelled: threading.Event
) -> Extract:
    """Fetch the newest complete extract into `folder`.  Raises TransferError."""
    attempts = itertools.count()
    begun = ""  # the epoch of the attempt before

    def track(size: int) -> None:
        if cancelled.is_set():
            raise CancelledError("download")
        tick(size)

    def attempt() -> Extract:
        nonlocal begun
        sftp.connect()
        if not sftp.exists(settings.upload_directory):  # Better told now than after the writing.
            raise TransferError(
                f"{sftp.where}: {settings.upload_directory}: does not exist, nowhere to push to",
                "correct uploadDirectory on <SFTP>",
            )
        extract = newest_extract(sftp, settings)
        if extract.epoch != begun:  # A newer one was finished meanwhile: mix no files of two.
            with local_errors(folder):
                shutil.rmtree(folder)
                folder.mkdir()
            begun = extract.epoch
        ahead = next(attempts) % 2 == 0  # Servers that choke on it get every other attempt.
        for entry in extract.files:
            path = f"{settings.download_directory}/{extract.epoch}/{entry.name}"
            _download_file(sftp.read(path, entry.size, ahead=ahead), folder, entry, track)
        log.info("downloaded %s of epoch %s", plural(len(extract.files), "file"), extract.epoch)
        return extract

    folder.mkdir(parents=True, exist_ok=True)
    try:
        return retried(attempt, cancelled)
    finally:
        sftp.close()  # The database may work for hours before the connection is needed again.


def newest_extract(sftp: Sftp, settings: SftpSettings) -> Extract:
    """The newest epoch that is complete, the names of its files checked."""
    top = settings.download_directory
    where = f"{sftp.where}: {top}"
    entries = sftp.listing(top)
    epochs = [e.name for e in entries if e.is_directory and EPOCH.fullmatch(e.name)]
    if not epochs:
        raise TransferError(
            f"{where}: holds no epoch directory (YYYYMMDD-HHMMSS)",
            "correct downloadDirectory on <SFTP>, or ask SameGoal whether the export is scheduled",
        )
    for epoch in reversed(epochs):
        files = sftp.listing(f"{top}/{epoch}")
        complete = any(e.name == COMPLETE and e.is_file for e in files)
        if complete or not settings.require_complete:
            break
        log.warning("%s/%s: passed over: it has no %s file", where, epoch, COMPLETE)
    else:
        raise TransferError(
            f"{where}: none of {plural(len(epochs), 'epoch')} has a {COMPLETE} file",
            'wait until the export is finished, or ask SameGoal; requireComplete="false" on '
            "<SFTP> takes an epoch without it",
        )
    _check_names(f"{where}/{epoch}", files)
    modified = max((entry.modified for entry in files if entry.is_file), default=0.0)
    csv_files = [e for e in files if e.is_file and e.name.lower().endswith(".csv")]
    return Extract(epoch, modified, tuple(csv_files))


def _check_names(where: str, entries: list[RemoteEntry]) -> None:
    """Refuse what only a broken or hostile server lists: a name is about to become a local file."""
    seen: set[str] = set()
    for entry in entries:
        problem = unsafe_name(entry.name)
        if not problem and not entry.is_file and not entry.is_directory:
            problem = "is neither a file nor a directory (a link, perhaps)"
        if not problem and entry.name.lower() in seen:
            problem = "differs from another one only in capitals"
        if problem:
            raise TransferError(
                f"{where}: the server lists the name '{one_line(entry.name)[:200]}', which "
                f"{problem}; nothing was downloaded",
                "ask the server's operator; no name of that kind belongs into an extract",
            )
        seen.add(entry.name.lower())


def _download_file(blocks: Iterator[bytes], folder: Path, entry: RemoteEntry, tick: Tick) -> None:
    target = folder / entry.name
    if target.is_file() and target.stat().st_size == entry.size:
        return  # An earlier attempt of this run has brought it.
    free = shutil.disk_usage(folder).free
    if entry.size > free:
        raise Error(
            f"{target}: {entry.size:,} bytes are announced, {free:,} are free on this disk",
            "free some space; if the size is absurd, ask the server's operator",
        )
    with new_file(target) as file:
        for block in blocks:
            file.write(block)
            tick(len(block))


# ---------------------------------------------------------------------- stage: export


def export(database: Database, diff: SqlDiff, path: Path, tick: Tick) -> int:
    """Stream the rows of a SQLDiff's query into a CSV file; returns how many."""
    subject = f"{path.parent.name}/{path.name}: the query ({diff.where})"
    try:
        return write_query(database, subject, diff.query, path, tick, diff.date_format)
    finally:
        database.rollback()  # Nothing was to be changed; let go of what reading may have locked.


def write_query(
    database: Database, subject: str, sql: str, path: Path, tick: Tick, date_format: str | None
) -> int:
    """Write the rows of a query as CSV, header first; returns how many."""
    columns, blocks = database.query(subject, sql)
    count = 0
    with csv_writer(path) as write:
        write([columns])
        for rows in blocks:
            write([_texts(row, date_format) for row in rows])
            count += len(rows)
            tick(len(rows))
        database.drain(subject)
    return count


def _texts(row: Sequence[object], date_format: str | None) -> list[object]:
    """The values of a row as csv.writer will spell them; it knows str, int and None itself."""
    return [v if v.__class__ in _PLAIN else to_text(v, date_format) for v in row]


_PLAIN = (str, int, type(None))


def to_text(value: object, date_format: str | None = None) -> str:
    """A database value as text, always in one way.

    Dates are ISO 8601 or `date_format`, decimals plain without exponent, bits 0 or 1, NULL is
    empty, binary is hexadecimal.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, datetime.date):  # a datetime, too
        return value.strftime(date_format) if date_format else value.isoformat()
    import decimal

    if isinstance(value, decimal.Decimal):
        return f"{value:f}"
    if isinstance(value, float):
        return f"{decimal.Decimal(repr(value)):f}".removesuffix(".0")
    if isinstance(value, (bytes, bytearray)):
        return value.hex()
    return str(value)


# ---------------------------------------------------------------------- diff file: read_changes
#
# The diff file has one line for each change: `operation`, every column before, every column after.

INSERT, UPDATE, DELETE = "insert", "update", "delete"
OPERATIONS = (DELETE, UPDATE, INSERT)  # In this order they are applied: a key may be freed first.


def read_changes(changes: Path, operation: str) -> Iterator[tuple[Row, Row]]:
    """The rows before and after of each change of `operation` in a diff file."""
    with local_errors(changes), changes.open(encoding="utf-8", newline="") as file:
        records = csv.reader(file)
        end = 1 + len(next(records)) // 2
        for record in records:
            if record[0] == operation:
                yield tuple(record[1:end]), tuple(record[end:])


@dataclasses.dataclass
class Comparison:
    """What the comparison of one file's two sides found.

    `changes` is the diff file: the evidence, and all that later stages work from.
    """

    sql_diff: SqlDiff
    columns: Row
    key: Key
    source_rows: int = 0
    target_rows: int = 0
    insert: int = 0
    update: int = 0
    delete: int = 0
    format_differences: list[str] = dataclasses.field(default_factory=list)
    changes: Path = Path("-")  # standard output, unless `compare` made it

    def add(self, changes: Iterable[bytes]) -> None:
        """Count changes, canonical rows of the diff file."""
        count = collections.Counter(map(operator.itemgetter(0), changes))
        self.insert += count[ord("i")]
        self.update += count[ord("u")]
        self.delete += count[ord("d")]

    def count(self, operation: str) -> int:
        return int(getattr(self, operation))

    def rows(self, operation: str) -> Iterator[Row]:
        """The row that each change of `operation` is about: for a delete the target's."""
        for before, after in read_changes(self.changes, operation):
            yield before if operation == DELETE else after

    def leaves_all_alone(self) -> bool:
        """Whether nothing differs that an element of the SQLDiff is there for."""
        return not any(map(self.count, self.sql_diff.calls))

    def __str__(self) -> str:
        return f"{self.insert:,} to insert, {self.update:,} to update, {self.delete:,} to delete"


# ---------------------------------------------------------------------- stage: diff
#
# Given two sorted CSV files; gives the diff file and its counts; raises DataError where the files
# cannot be compared, before anything but the diff file is written.


def compare(source: Path, target: Path, changes: Path, sql_diff: SqlDiff) -> Comparison:
    """`diff` into the file `changes`, where a source of 0 bytes is one without rows."""
    with new_file(changes) as out:
        comparison = diff(source, target, out, sql_diff, may_be_empty=True)
    comparison.changes = changes
    return comparison


def diff(
    source: Path,
    target: Path,
    changes: BinaryIO,
    sql_diff: SqlDiff,
    shown: Sequence[str] = (),
    *,
    may_be_empty: bool = False,
) -> Comparison:
    """Compare two sorted CSV files; write what makes `target` equal to `source`.

    `changes` gets one line a change: `operation`, then every column before (`before_name`), then
    every column after (`after_name`).  Memory is bounded whatever the size.  Raises DataError,
    whose message calls the files `shown`, else `ia/iep.csv` and `ic/iep.csv`.  With
    `may_be_empty` a source of 0 bytes is one without rows.
    """
    shown = shown or [f"{path.parent.name}/{path.name}" for path in (source, target)]
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(
                CsvFile(path, name, trim=sql_diff.trim, null_text=sql_diff.null_text)
            )
            for path, name in zip((source, target), shown, strict=True)
        ]
        columns = files[1].columns
        if files[0].columns or not columns or not may_be_empty:
            check_columns(*files)
        key = Key(sql_diff.key, columns, shown[1])
        sides = []
        for file in files:
            in_order = None
            if sql_diff.sort:
                in_order = stack.enter_context(contextlib.closing(Sorter(file, key).blocks()))
            sides.append(OrderedRows(file, key, in_order))
        comparison = Comparison(sql_diff, columns, key)
        formats = FormatDifferences(sql_diff, key, columns)
        names = (f"{side}_{name}" for side in ("before", "after") for name in columns)
        header = "\0".join(["operation", *names]).encode("utf-8").replace(b"\n", _BREAK)
        changes.write(encode_rows([header]))
        for found in merge(sides[0], sides[1], len(columns)):
            left = formats.not_ignored(found)
            formats.look_at(left)
            comparison.add(left)
            changes.write(encode_rows(left))
    comparison.format_differences = formats.sentences()
    comparison.source_rows, comparison.target_rows = sides[0].rows, sides[1].rows
    return comparison


def check_columns(source: CsvFile, target: CsvFile) -> None:
    """Both sides must have the same columns in the same order."""
    for file in (source, target):
        if not file.columns:
            raise DataError(f"{file.shown}: is empty: it has no header line", "export it again")
    ours, theirs = source.columns, target.columns
    if ours == theirs:
        return
    for file in (source, target):
        if len(file.columns) == 1:
            file.refuse_separator(file.columns[0])
    missing = [name for name in theirs if name not in ours]
    extra = [name for name in ours if name not in theirs]
    if not set(ours) & set(theirs):  # Then the names may be a row of data.
        what = f"none of {', '.join(map(one_line, theirs))}; its header may be missing"
    elif missing or extra:
        what = "; ".join(
            f"{word} {', '.join(map(one_line, names))}"
            for word, names in (("missing", missing), ("unexpected", extra))
            if names
        )
    else:
        moved = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        what = (
            f"another order: column {moved + 1} is {one_line(ours[moved])}, not "
            f"{one_line(theirs[moved])}"
        )
    source.fail(
        1,
        f"the columns differ from those of {target.shown}: {what}",
        "make the query return the columns of SameGoal's file in the same order, or ask SameGoal "
        "whether the file has changed",
    )


def merge(source: OrderedRows, target: OrderedRows, width: int) -> Iterator[list[bytes]]:
    r"""The changes that make `target` equal to `source`, in the order of their keys, in lists.

    A change is a canonical row of the diff file; `width` is the number of columns of the sides.

        source     target     change
        1,a        1,a
        2,b        2,x        update\0  2\0x\0  2\0b
        3,c                   insert\0  \0\0   3\0c
                   4,d        delete\0  4\0d\0  \0

    Stretches of equal rows are equal bytes: they are found by comparing memory and passed without
    looking at a single row.  Where stretches are short, rows are compared by the block; where they
    are long, a few at a time.
    """
    size = NEAR_BYTES
    passed = 0  # bytes since the last difference
    while source.fill() and target.fill():
        same = common_prefix(source.data, source.position, target.data, target.position)
        if same and (end := source.pass_equal(same, target)):
            passed += end
            continue
        size = min(4 * size, BLOCK_BYTES) if passed < 4 * NEAR_BYTES else NEAR_BYTES
        passed = 0
        our_keys, their_keys = source.ahead(size), target.ahead(size)
        # What comes behind the last key of one side may have its other half there.
        if our_keys[-1] < their_keys[-1]:
            del their_keys[bisect.bisect_right(their_keys, our_keys[-1]) :]
        else:
            del our_keys[bisect.bisect_right(our_keys, their_keys[-1]) :]
        ours, theirs = source.take(our_keys), target.take(their_keys)
        if ours[:1] == theirs[:1]:  # The files are written differently: compare what they mean.
            source.make_canonical()
            target.make_canonical()
        yield _changes(our_keys, ours, their_keys, theirs, width)
    while source.fill():
        keys = source.ahead(BLOCK_BYTES)
        yield _changes(keys, source.take(keys), [], [], width)
    while target.fill():
        keys = target.ahead(BLOCK_BYTES)
        yield _changes([], [], keys, target.take(keys), width)


def _changes(
    our_keys: list[Any], ours: list[bytes], their_keys: list[Any], theirs: list[bytes], width: int
) -> list[bytes]:
    """The changes between rows of which each side has all that lie between the same two keys."""
    nothing = b"\0" * (width - 1)
    insert, delete, tail = b"insert\0%b\0" % nothing, b"delete\0", b"\0" + nothing
    if not their_keys:
        return [insert + after for after in ours]
    if not our_keys:
        return [delete + before + tail for before in theirs]
    if our_keys == their_keys:
        changes = zip(itertools.repeat(b"update"), theirs, ours)
        return list(map(b"\0".join, itertools.compress(changes, map(operator.ne, theirs, ours))))
    rest = dict(zip(their_keys, theirs, strict=True))
    befores = list(map(rest.pop, our_keys, itertools.repeat(None)))
    differ = list(map(operator.ne, befores, ours))
    found = [
        insert + after if before is None else b"update\0%b\0%b" % (before, after)
        for before, after in itertools.compress(zip(befores, ours, strict=True), differ)
    ]
    if rest:  # the rows that only the target has
        found += [delete + before + tail for before in rest.values()]
        keys = [*itertools.compress(our_keys, differ), *rest]
        in_order = sorted(zip(keys, found, strict=True), key=operator.itemgetter(0))
        found = [change for _, change in in_order]
    return found


def common_prefix(a: bytes, i: int, b: bytes, j: int) -> int:
    """How many bytes of `a` from `i` on equal those of `b` from `j` on."""
    limit = min(len(a) - i, len(b) - j)
    same, step, growth = 0, 256, 4
    while same < limit:
        piece = a[i + same : i + min(same + step, limit)]
        if b.startswith(piece, j + same):
            same += len(piece)
            step = min(growth * step, 1 << 16)
        elif step > 256:
            step, growth = max(step // 4, 256), 1  # The end is near: from here on ever closer.
        else:
            other = b[j + same : j + same + len(piece)]
            difference = int.from_bytes(piece, "big") ^ int.from_bytes(other, "big")
            return same + len(piece) - (difference.bit_length() + 7) // 8
    return same


# ---------------------------------------------------------------------- differences of format
#
# Given the changes of a comparison; gives those that no attribute such as `ignoreCase` ignores, and
# sentences about values that are equal but written differently.


class FormatDifferences:
    """Updates in which no value differs, only how it is written: `1.50` and `1.5`.

    A procedure that is called for them changes nothing, so they come again every night.  Values
    are told as their shape alone: they may be personal.
    """

    LOOKED_AT = 1000  # The first updates tell enough.
    KINDS: Mapping[str, tuple[str, str]] = {  # kind: what is told of it, what would fix it
        "breaks": ("line breaks", 'ignoreLineBreaks="true"'),
        "blanks": ("trailing blanks", 'trim="true"'),
        "case": ("letter case", 'ignoreCase="true"'),
        "null": ("a word for an empty field", 'nullText="{word}"'),
        "number": ("number format", 'ignoreNumberForm="true"'),
        "date": ("date format", ""),
    }

    def __init__(self, sql_diff: SqlDiff, key: Key, columns: Row) -> None:
        self._file, self._key, self._columns = sql_diff.file, key, columns
        ignored = {
            "case": sql_diff.ignore_case,
            "number": sql_diff.ignore_number_form,
            "breaks": sql_diff.ignore_line_breaks,
        }
        self._ignored = {kind for kind, is_set in ignored.items() if is_set}
        self._updates = self._formal = 0
        # (column, kind): how many, and for the first of them its row's key and both values
        self._found: dict[tuple[int, str], tuple[Any, ...]] = {}
        self._dates: dict[int, set[tuple[str, str]]] = {}  # column: formats of both sides

    def not_ignored(self, changes: list[bytes]) -> list[bytes]:
        """The changes without the updates of which the SQLDiff ignores every difference."""
        if not self._ignored:
            return changes
        ignored = self._ignored.issuperset
        return [
            change
            for change in changes
            if not change.startswith(b"update") or not ignored(self._kinds(change).values())
        ]

    def look_at(self, changes: Iterable[bytes]) -> None:
        """Count what the updates among `changes` differ in, until LOOKED_AT have been seen."""
        for change in changes if self._updates < self.LOOKED_AT else ():
            if change.startswith(b"update") and self._updates < self.LOOKED_AT:
                self._updates += 1
                kinds = self._kinds(change)
                if all(kinds.values()):
                    self._formal += 1
                    row = decode_row(change)
                    end = 1 + len(self._columns)
                    self._count(kinds, row[1:end], row[end:])

    def sentences(self) -> list[str]:
        """What to tell where most updates differ only in format."""
        if self._formal * 2 <= self._updates:
            return []
        sentences = []
        for (index, kind), (count, key, before, after) in self._found.items():
            updates = plural(self._updates, "update")
            if self._updates == self.LOOKED_AT:
                updates = f"the first {updates}"
            sentences.append(
                f"{self._file}: {count:,} of {updates} differ only in format: column "
                f"{one_line(self._columns[index])}, {self.KINDS[kind][0]}, as in {key}: "
                f"'{self.shape(before)}' in the database, '{self.shape(after)}' from SameGoal; "
                f"{self._advice(index, kind, before or after)}"
            )
        return sentences

    def _count(self, kinds: Mapping[int, str], before: Row, after: Row) -> None:
        for index, kind in kinds.items():
            first = (0, self._key.show(after), before[index], after[index])
            count, *example = self._found.get((index, kind), first)
            self._found[index, kind] = (count + 1, *example)
            dates = self._date(before[index]), self._date(after[index])
            if kind == "date" and dates[0] and dates[1]:
                self._dates.setdefault(index, set()).add((dates[0][1], dates[1][1]))

    def _kinds(self, change: bytes) -> dict[int, str]:
        """The columns in which an update's two rows differ, and the kind of each difference."""
        fields = change.split(b"\0")
        end = 1 + len(self._columns)
        return {
            index: self.kind(*decode_row(b"\0".join(pair)))
            for index, pair in enumerate(zip(fields[1:end], fields[end:], strict=True))
            if pair[0] != pair[1]
        }

    def _advice(self, index: int, kind: str, word: str) -> str:
        if kind != "date":
            return f"{self.KINDS[kind][1].format(word=word)} on this <SQLDiff> would fix this"
        # That leading zeros are left out shows only in days and months of one digit.
        before, after = (
            min(sorted(words), key=lambda each: "MM" in each)
            for words in zip(*self._dates[index], strict=True)
        )
        name = one_line(self._columns[index])
        if before == after:
            return f"change the query so that {name} is written as SameGoal writes it"
        advice = f"change the query so that {name} is written as {after} instead of {before}"
        if code := self._strftime_code(after):
            advice += f' (if the query returns a date type, dateFormat="{code}" does this)'
        return advice

    @classmethod
    def kind(cls, before: str, after: str) -> str:
        """The kind of KINDS in which two texts for one value differ; '' where the values differ.

        `1.50` and `1.5` give `number`, `1/5/2026` and `2026-01-05` give `date`.
        """
        lines = [text.replace("\r\n", "\n").replace("\r", "\n") for text in (before, after)]
        if lines[0] == lines[1]:
            return "breaks"
        if before.rstrip(" ") == after.rstrip(" "):
            return "blanks"
        if before.casefold() == after.casefold():
            return "case"
        if {before, after} & {"NULL", "null", "None", "\\N"} and "" in (before, after):
            return "null"
        if cls._number(before) == cls._number(after) is not None:
            return "number"
        dates = [cls._date(text) for text in (before, after)]
        return "date" if dates[0] and dates[1] and dates[0][0] == dates[1][0] else ""

    @staticmethod
    def shape(text: str) -> str:
        """A value without what it says: `Ann 12.50` is `Xxx 99.99`."""
        marked = "".join(
            "X" if c.isupper() else "x" if c.isalpha() else "9" if c.isdigit() else c
            for c in text[:40]
        )
        return one_line(f"[{marked}]")[1:-1]

    @staticmethod
    def _number(text: str) -> object:
        """The number that a text is, in a format that compares by value, or None."""
        import decimal

        plain = re.fullmatch(r"\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*", text, re.ASCII) and len(text) < 40
        return decimal.Decimal(text.strip()) if plain else None

    @classmethod
    def _date(cls, text: str) -> tuple[datetime.datetime, str] | None:
        """A date and the words for its format: `1/5/2026` is January 5, 2026, and `M/D/YYYY`."""
        found = re.fullmatch(
            r"(\d[\d./-]{5,9})(?:([T ])(\d\d):(\d\d)(?::(\d\d)(\.0+)?)?)?", text, re.ASCII
        )
        if not found:
            return None
        day, space, hour, minute, second, fraction = found.groups("")
        mark = next((mark for mark in "-/." if mark in day), "")
        parts = day.split(mark) if mark else [day[:4], day[4:6], day[6:]]
        order = "YMD" if len(parts[0]) == 4 else "DMY" if mark == "." else "MDY"
        if len(parts) != 3 or not all(parts):
            return None
        number = dict(zip(order, map(int, parts), strict=True))
        padded = {len(part) for part, letter in zip(parts, order, strict=True) if letter != "Y"}
        year = parts[order.index("Y")]
        letters = {"Y": "Y" * len(year), "M": "M", "D": "D"}
        if padded == {2}:
            letters |= {"M": "MM", "D": "DD"}
        words = mark.join(letters[letter] for letter in order)
        if space:
            words += f"{space}hh:mm" + (":ss" if second else "") + fraction
        century = {2: 2000 if number["Y"] < 69 else 1900, 4: 0}.get(len(year))
        if century is None:
            return None
        with contextlib.suppress(ValueError):
            date = datetime.datetime(
                century + number["Y"], number["M"], number["D"],
                int(hour or 0), int(minute or 0), int(second or 0),
            )  # fmt: skip
            return date, words
        return None

    @staticmethod
    def _strftime_code(words: str) -> str:
        """The dateFormat for `MM/DD/YYYY`, or '' where none can write it: `M/D/YYYY`."""
        if "MM" not in words or words.endswith("0"):  # a fraction of a second
            return ""
        codes = {"YYYY": "%Y", "YY": "%y", "MM": "%m", "DD": "%d"}
        codes |= {"hh": "%H", "mm": "%M", "ss": "%S"}
        return re.sub("YYYY|YY|MM|DD|hh|mm|ss", lambda token: codes[token[0]], words)


# ---------------------------------------------------------------------- stage: limits


def over_limits(
    comparisons: Sequence[Comparison], limits: Limits, approved: Path | None
) -> list[str]:
    """What goes beyond the limits, one sentence a file and operation; [] where nothing does.

    Changes that the diff files in the folder `approved` show do not count.  A source without rows
    is over every limit while the database has rows.
    """
    reasons = []
    for found in comparisons:
        sql_diff = found.sql_diff
        emptied = not found.source_rows and found.target_rows > 0
        deletes = (DELETE, sql_diff.max_deletes or limits.max_deletes, "maxDeletes")
        if emptied:
            deletes = DELETE, Limit(0, percent=False), "SameGoal's file is empty, so the limit"
        updates = (UPDATE, sql_diff.max_updates or limits.max_updates, "maxUpdates")
        for operation, limit, name in (deletes, updates):
            changes = found.count(operation)
            if limit.allows(changes, found.target_rows):
                continue
            shown = approved / sql_diff.file if approved else None
            left = _unapproved(found.changes, shown, operation)
            if not limit.allows(left, found.target_rows):
                beyond = f" ({left:,} of them not approved)" if left < changes else ""
                first = "; ".join(map(found.key.show, itertools.islice(found.rows(operation), 3)))
                reasons.append(
                    f"{sql_diff.file}: {plural(changes, operation)}{beyond} of "
                    f"{plural(found.target_rows, 'row')}, {name} is {limit}; "
                    f"they begin with {first}"
                )
    return reasons


def _unapproved(changes: Path, approved: Path | None, operation: str) -> int:
    """How many changes of `operation` do not stand in the approved diff file, to the letter."""
    import hashlib

    def digests(path: Path) -> Iterator[bytes]:
        for change in read_changes(path, operation):
            yield hashlib.blake2b(
                "\0".join(map("\0".join, change)).encode(), digest_size=16
            ).digest()

    seen = set(digests(approved)) if approved and approved.is_file() else set()
    return sum(digest not in seen for digest in digests(changes))


def too_old(extract: Extract, max_age_hours: int) -> str:
    """Why an extract is stale, or ''."""
    hours = (time.time() - extract.modified) / 3600
    if not max_age_hours or hours <= max_age_hours:
        return ""
    return (
        f"the newest complete extract, {extract.epoch}, is {hours:,.0f} hours old, maxAgeHours is "
        f"{max_age_hours}"
    )


# ---------------------------------------------------------------------- stage: apply


def check_parameters(found: Comparison) -> None:
    """Raise ConfigError for a `parameters=` that names no column of the file."""
    sql_diff = found.sql_diff
    for operation, call in sql_diff.calls.items():
        for name in call.parameters or ():
            if name not in found.columns:
                raise ConfigError(
                    f"{sql_diff.where}: <{operation.title()}> of {sql_diff.file}: parameters= "
                    f"names '{name}', which is no column of the file",
                    f"the columns are {', '.join(map(one_line, found.columns))}",
                )


class Failures:
    """failures.csv: the rows that the database refused, made with the first of them."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit, self.count = path, limit, 0
        self.rows: set[tuple[str, str, str]] = set()  # file, operation, key
        self._file: TextIO | None = None

    def __enter__(self) -> Failures:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file:
            self._file.close()

    def add(
        self, file: str, operation: str, key: str, procedure: str, error: DatabaseError
    ) -> None:
        with local_errors(self.path):
            if self._file is None:
                self._file = self.path.open("w", encoding="utf-8", newline="")
                csv.writer(self._file).writerow(["operation", "key", "procedure", "error"])
            csv.writer(self._file).writerow([operation, key, procedure, redact(error.message)])
            self._file.flush()
        self.count += 1
        self.rows.add((file, operation, key))
        log.error("%s of %s failed: %s: %s", operation, key, procedure, error.message)
        if self.count > self.limit:
            raise DatabaseError(
                f"stopped: more than maxFailures={self.limit} rows failed; the last one: "
                f"{operation} of {key}: {procedure}: {error.message}",
                f"look at {self.path.name}; what was written stays, and a next run goes on from it",
            )


class Applier:
    """Calls one procedure (or statement) for the rows of one operation, batch by batch."""

    def __init__(
        self, database: Database, found: Comparison, operation: str, failures: Failures
    ) -> None:
        self.database, self.operation, self.failures = database, operation, failures
        self.file, self.key = found.sql_diff.file, found.key
        self.call = found.sql_diff.calls[operation]
        default = found.key.names if operation == DELETE else found.columns
        self._indexes = [found.columns.index(n) for n in self.call.parameters or default]

    def apply(self, rows: Sequence[Row]) -> None:
        """One batch in one transaction; where that fails, each row in one of its own."""
        try:
            retried(lambda: self._batch(rows))
        except DatabaseError as error:
            if len(rows) > 1:
                log.info("%s: a batch of %d was undone, its rows are tried one by one: %s",
                         self.file, len(rows), self._masked(error, rows).message)  # fmt: skip
        else:
            return
        for row in rows:
            self._single(row)

    def _single(self, row: Row) -> None:
        try:
            retried(lambda: self._batch([row]))
        except DatabaseError as error:
            masked = self._masked(error, [row])
            key = self.key.show(row)
            if error.transient or is_not_about_the_row(error):
                raise DatabaseError(
                    f"{self.file}: {self.operation} of {key}: {masked.message}",
                    masked.remedy,
                    sqlstate=error.sqlstate,
                ) from None
            name = self.call.procedure or "SQL"
            self.failures.add(self.file, self.operation, key, name, masked)

    def _batch(self, rows: Sequence[Row]) -> None:
        """All rows in one transaction; it is rolled back whole at the first error."""
        database = self.database
        database.connect()
        name = self.call.procedure or f"the statement of <{self.operation.title()}>"
        call = database.spelled(self.call.statement.rstrip("; \n\t"))
        end = "\n;" if call and database.name == MSSQL else ""  # MERGE demands it.
        call = call or database.call_text(str(self.call.procedure), len(self._indexes))
        size = database.calls_per_statement(len(self._indexes))
        statements = [
            (
                "\n;\n".join([call] * len(part)) + end,  # The statement may end in a comment.
                [row[index] or None for row in part for index in self._indexes],
            )
            for part in batched(rows, size)
        ]
        try:
            database.execute_all(name, statements)
            database.commit()
        except BaseException:
            database.rollback()
            raise

    def _masked(self, error: DatabaseError, rows: Sequence[Row]) -> DatabaseError:
        """The error without what it quotes of the rows: only the key may be told."""
        key = {row[i] for row in rows for i in self.key.indexes}
        told = {one_line(value) for row in rows for value in row} - key
        message = error.message
        for value in sorted(told, key=len, reverse=True):
            if len(value) > 1 and value in message:
                message = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "...", message)
        return DatabaseError(message, error.remedy, sqlstate=error.sqlstate)


def is_not_about_the_row(error: DatabaseError) -> bool:
    """Whether the next row would fail in the same way: no such procedure, no right, no answer."""
    return error.sqlstate in (_NO_PROCEDURE | {"HYT00", "HY008", "57014"}) or bool(
        re.search(r"(?i)could not find stored procedure|permission was denied", error.message)
    )


def apply(database: Database, found: Comparison, failures: Failures, tick: Tick) -> None:
    """Call the procedures of a SQLDiff for the rows of its diff file: deletes, updates, inserts.

    The diff file is the evidence, and just what it holds is applied.
    """
    calls = found.sql_diff.calls
    for operation in OPERATIONS:
        if not found.count(operation):
            continue
        if operation not in calls:
            log.info(
                "%s: %s left alone: there is no <%s>",
                found.sql_diff.file, plural(found.count(operation), operation), operation.title(),
            )  # fmt: skip
            continue
        applier = Applier(database, found, operation, failures)
        for batch in batched(found.rows(operation), database.settings.batch_size):
            applier.apply(batch)
            tick(len(batch))


# ---------------------------------------------------------------------- stage: statements


def run_statements(
    database: Database, statements: Sequence[Statement], folder: Path, tick: Tick
) -> dict[str, int]:
    """Run the Upload element's statements in order; returns the rows of each file they made.

    Each is a transaction of its own, read to its last result set; after a deadlock or a lost
    connection it is tried again.
    """
    made: dict[str, int] = {}
    retried(database.revive)
    for number, statement in enumerate(statements, 1):
        subject = f"statement {number} of <Upload> ({statement.where})"
        if statement.file:
            subject = f"{subject}, {statement.file}"
        work = functools.partial(_run_statement, database, statement, subject, folder, tick)
        rows = retried(work)
        if statement.file:
            made[statement.file] = rows
        log.info("%s: done", subject)
    return made


def _run_statement(
    database: Database, statement: Statement, subject: str, folder: Path, tick: Tick
) -> int:
    rows = 0
    database.connect()
    sql = database.spelled(statement.sql)
    try:
        if statement.file:
            rows = write_query(database, subject, sql, folder / statement.file, tick, None)
        else:
            database.execute(subject, sql)
        database.commit()
    except BaseException:
        database.rollback()
        raise
    return rows


# ---------------------------------------------------------------------- stage: push


def push(sftp: Sftp, upload_directory: str, folder: Path, tick: Tick) -> None:
    """Upload a run's folder; the empty COMPLETE, last, tells SameGoal that it is whole.

    Without it an epoch is not processed; with it, SameGoal may move the epoch away at once.
    """
    target = f"{upload_directory}/{folder.name}"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != PART)
    files.sort(key=lambda path: path.name in (SUMMARY_NAME, LOG_NAME))  # They grow to the last.
    state = {"made": False, "sent": False, "marked": False}

    def attempt() -> None:
        sftp.connect()
        if not state["made"] and sftp.exists(target):
            raise TransferError(
                f"{sftp.where}: {target}: is there already, perhaps by another installation",
                "run again: each run has an epoch of its own; let two homes start a minute apart",
            )
        state["made"] = True
        if not state["sent"]:
            _push_files(sftp, target, folder, files, tick)
            state["sent"] = True
        # A connection that broke after the marker was asked for leaves open whether it was made.
        taken = state["marked"] and not sftp.exists(target)
        if not taken and not (state["marked"] and sftp.exists(f"{target}/{COMPLETE}")):
            state["marked"] = True
            sftp.mark(f"{target}/{COMPLETE}")

    retried(attempt)
    log.info("pushed %s to %s", plural(len(files), "file"), target)


def _push_files(sftp: Sftp, target: str, folder: Path, files: Sequence[Path], tick: Tick) -> None:
    sftp.make_directory(target)
    directories = {parent for path in files for parent in path.relative_to(folder).parents}
    for directory in sorted(directories - {Path()}):
        sftp.make_directory(f"{target}/{directory.as_posix()}")
    for path in files:
        with local_errors(path):
            file = path.open("rb")
        with file:
            tick(sftp.write(f"{target}/{path.relative_to(folder).as_posix()}", file))


# ---------------------------------------------------------------------- stage: prune


def prune(history: Path, keep: int, current: Path) -> int:
    """Delete all but the newest `keep` runs, never `current`; returns how many.

    Takes only directories whose name is an epoch, and follows no link.
    """
    runs = sorted(
        (p for p in history.iterdir() if EPOCH.fullmatch(p.name) and _is_real_directory(p)),
        key=lambda path: (path == current, path.name),  # The clock may have been set back.
        reverse=True,
    )
    pruned = 0
    for path in runs[keep:]:
        try:
            shutil.rmtree(path)
            pruned += 1
        except OSError as error:
            log.warning("%s: an old run cannot be deleted: %s", path, error.strerror)
    if pruned:
        log.info("deleted %s older than the newest %d", plural(pruned, "run"), keep)
    return pruned


def _is_real_directory(path: Path) -> bool:
    """A directory itself, not a link or a Windows junction to one."""
    import stat

    found = path.lstat()
    reparse = getattr(found, "st_file_attributes", 0) & 0x400  # FILE_ATTRIBUTE_REPARSE_POINT
    return stat.S_ISDIR(found.st_mode) and not reparse


# ---------------------------------------------------------------------- SchooLinks: build_files


@dataclasses.dataclass(frozen=True)
class OracleLogin:
    """Who logs in to PowerSchool's database; `dsn` is host:port/service."""

    user: str
    password: str = dataclasses.field(repr=False)
    dsn: str


def schoolinks_credentials(
    settings: SchooLinksSettings, home: Path
) -> tuple[OracleLogin, SftpSettings]:
    """The log-ins from the environment; raises ConfigError that names every missing variable."""
    names = [
        "POWERSCHOOL_READ_USER",
        "POWERSCHOOL_DB_PASSWORD",
        "POWERSCHOOL_PROD_DB",
        "SCHOOLINKS_SFTP_USERNAME",
        "SCHOOLINKS_SFTP_ADDRESS",
    ]
    if not settings.private_key:
        names.insert(4, "SCHOOLINKS_SFTP_PASSWORD")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"not set in the environment: {', '.join(missing)}",
            "set them for the account that runs sgsync, and start sgsync anew",
        )
    user, password, dsn = (os.environ[name] for name in names[:3])
    address = os.environ["SCHOOLINKS_SFTP_ADDRESS"].removeprefix("sftp://").rstrip("/")
    match = re.fullmatch(r"(?:\[([^\]\s]+)\]|([^:/@\s]+))(?::(\d{1,5}))?", address, re.ASCII)
    if not match or not 0 < int(match[3] or 22) < 65536:
        raise ConfigError(  # without the value: it may hold a password
            "SCHOOLINKS_SFTP_ADDRESS is no address", "write the host, or host:port, alone"
        )
    beside = home / "known_hosts"
    server = _defaults(
        SftpSettings,
        host=match[1] or match[2],
        port=int(match[3] or 22),
        username=os.environ["SCHOOLINKS_SFTP_USERNAME"],
        password="" if settings.private_key else os.environ["SCHOOLINKS_SFTP_PASSWORD"],
        private_key=settings.private_key,
        passphrase=settings.passphrase,
        known_hosts="known_hosts" if beside.is_file() else "ssh/known_hosts",
        timeout_seconds=settings.timeout_seconds,
        element="<SchooLinks>",
        host_from="SCHOOLINKS_SFTP_ADDRESS",
        operator="SchooLinks",
    )
    return OracleLogin(user, password, dsn), server


class Oracle:
    """PowerSchool's database through python-oracledb.  Raises DatabaseError with plain advice.

    Every call runs in a thread of its own and is given up after its time: the driver bounds
    neither the log-in nor a connection that has gone silent.
    """

    def __init__(self, settings: SchooLinksSettings, login: OracleLogin) -> None:
        self.settings, self.login = settings, login
        self._connection: oracledb.Connection | None = None
        self._worker: _Worker | None = None

    def __enter__(self) -> Oracle:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._worker:
            if connection := self._connection:
                self._worker.submit(connection.close).done.wait(5)
            self._worker.end()
        self._connection = self._worker = None

    def connect(self) -> None:
        """Connect, by way of Oracle's own client where `thickMode` or `clientDirectory` asks."""
        import oracledb

        def connect() -> oracledb.Connection:
            if self.settings.thick_mode or self.settings.client_directory:
                oracledb.init_oracle_client(lib_dir=self.settings.client_directory)
            oracledb.defaults.fetch_lobs = False  # A CLOB would take a round trip a student.
            connection = oracledb.connect(
                user=self.login.user,
                password=self.login.password,
                dsn=self.login.dsn,
                tcp_connect_timeout=CONNECT_SECONDS,
            )
            connection.call_timeout = 1000 * self.settings.query_timeout_seconds
            return connection

        self._worker = _Worker()
        subject = "PowerSchool: cannot connect"
        self._connection = self._bounded(subject, connect, 2 * CONNECT_SECONDS)
        log.info("PowerSchool: connected to Oracle %s", self._connection.version)

    def query(self, subject: str, sql: str, binds: Mapping[str, object]) -> list[Sequence[Any]]:
        """All rows of a query; the round trips are one and one for each `ORACLE_ROWS` rows."""
        connection = self._connection
        if connection is None:
            raise DatabaseError(f"{subject}: the connection was closed")

        def fetch() -> list[Sequence[Any]]:
            with connection.cursor() as cursor:
                cursor.arraysize = ORACLE_ROWS
                cursor.prefetchrows = ORACLE_ROWS + 1  # One more spares the trip that finds no row.
                cursor.execute(sql, dict(binds))
                return list(cursor.fetchall())

        log.debug("%s:\n%s", subject, sql)
        return self._bounded(subject, fetch, 2 * self.settings.query_timeout_seconds)

    def _bounded(self, subject: str, work: Callable[[], T], seconds: float) -> T:
        """What `work` returns; waits in short steps, or Windows would not notice Ctrl-C."""
        import oracledb

        worker = cast("_Worker", self._worker)
        pending, end = worker.submit(work), time.monotonic() + seconds
        while not pending.done.wait(0.2):
            if time.monotonic() > end:
                remedy = ORACLE_ADVICE["DPY-4024" if self._connection else "ORA-12541"]
                self._connection = self._worker = None  # Left to its thread.
                raise DatabaseError(f"{subject}: no answer for {seconds:.0f} s", remedy)
        if isinstance(pending.error, (oracledb.Error, OSError)):
            raise oracle_error(subject, pending.error) from pending.error
        if pending.error is not None:
            raise pending.error
        return cast("T", pending.value)


_THICK = 'install Oracle Instant Client and set thickMode="true" on <SchooLinks>'
_DSN = "write POWERSCHOOL_PROD_DB as host:port/service"
ORACLE_ADVICE = {
    "DPY-3010": f"this server is older than Oracle 12.1, which thin mode cannot speak to: {_THICK}",
    "DPY-3015": "this account's password is stored in the old 10G form: ask the database "
    f"administrator to set the password anew, or {_THICK}",
    "DPY-4011": "run it again; where every connection ends like this at once, the server may "
    f"demand native network encryption, which thin mode lacks: {_THICK}",
    "DPY-4000": _DSN,  # not in tnsnames.ora
    "DPY-4026": _DSN,  # no tnsnames.ora
    "DPY-4027": _DSN,  # nor a folder for it
    "DPY-4024": "run it when the database is idle, or raise queryTimeoutSeconds on <SchooLinks>",
    "DPI-1047": "install Oracle Instant Client of the same kind (64 bit) as Python, and name its "
    "folder in clientDirectory= on <SchooLinks>",
    "ORA-01017": "see that POWERSCHOOL_READ_USER and POWERSCHOOL_DB_PASSWORD are right (capitals "
    "count in the password)",
    "ORA-28000": "ask the database administrator to unlock the account POWERSCHOOL_READ_USER",
    "ORA-28001": "the account's password has expired: ask the database administrator to set it "
    "anew, and change POWERSCHOOL_DB_PASSWORD",
    "ORA-12541": "nothing answers there: see whether host and port in POWERSCHOOL_PROD_DB are "
    "right, the database is up, and a firewall lets this machine reach it",
    "ORA-12514": "the listener does not know this service: correct the part behind the / in "
    "POWERSCHOOL_PROD_DB, or wait until the database is open",
    "ORA-00942": "grant SELECT on the table to POWERSCHOOL_READ_USER, or correct its name in "
    "<SchooLinks>",
    "ORA-00904": "correct the name of the column in <SchooLinks>, or of a table that extends no "
    "students: it must have the column studentsdcid",
}
ORACLE_ADVICE["DPY-6005"] = ORACLE_ADVICE["ORA-12541"]  # as thin mode calls it
_PASSING = {"DPY-4011", "DPY-6005", "ORA-12541", "ORA-03113", "ORA-03114", "ORA-01033"}


def oracle_error(subject: str, error: Exception) -> DatabaseError:
    """A driver's error in one line, with advice for the last code in it that has some."""
    if isinstance(error, OSError):  # a host whose name nobody knows
        remedy = ORACLE_ADVICE["ORA-12541"]
        return DatabaseError(f"{subject}: {one_line(error)}", remedy, transient=True)
    lines = [line for line in str(error).split("\n") if not line.startswith("Help: ")]
    text = re.sub(r" \(CONNECTION_ID=[^)]*\)", "", one_line("\n".join(lines)))
    codes = re.findall(r"\b(?:DPY|DPI|ORA)-\d{4,5}\b", text)
    code = next((code for code in reversed(codes) if code in ORACLE_ADVICE), (codes or [""])[0])
    if "socket timed out" in text:  # DPY-4024 on a connection that has gone silent
        code = "DPY-4024"
    return DatabaseError(
        f"{subject}: {text}", ORACLE_ADVICE.get(code, ""), transient=code in _PASSING
    )


@dataclasses.dataclass
class Section:
    """One file for SchooLinks: its rows, and the students who are not in it, by reason.

    Its rows are told apart by their first `key` columns.
    """

    name: str  # what a student who is missing in it loses
    file: str
    header: Row
    key: int = 1
    rows: list[Row] = dataclasses.field(default_factory=list)
    without: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    null_days: int = 0

    def skip(self, student: str, reason: str) -> None:
        self.without.setdefault(reason, []).append(student)

    def counts(self) -> dict[str, object]:
        """What summary.json tells of the file."""
        without = {reason: len(students) for reason, students in self.without.items()}
        return {
            "file": self.file,
            "section": self.name,
            "rows": len(self.rows),
            "without": without,
            "null_days": self.null_days,
            "uploaded": "",
        }


def student_query(settings: SchooLinksSettings) -> tuple[str, dict[str, object]]:
    """SQL and binds for all students: number, the two GPAs, one column for each tag.

    One row a student, the highest number first.  Oracle 12.1 and later.
    """
    wanted = (
        [(tag.table, tag.column) for tag in settings.tags.tags] if settings.tags.enabled else []
    )
    if settings.gpa.enabled:
        gpa = settings.gpa
        wanted = [(gpa.table, gpa.unweighted), (gpa.table, gpa.weighted), *wanted]
    aliases = {"students": "s"}
    for table, _ in wanted:
        aliases.setdefault(table.lower(), f"t{len(aliases)}")
    columns = [
        f"{aliases[table.lower()]}.{name} c{i}" if name else f"NULL c{i}"
        for i, (table, name) in enumerate(wanted)
    ]
    joins = [
        f"LEFT JOIN {table} {alias} ON {alias}.studentsdcid = s.dcid"
        for table, alias in aliases.items()
        if alias != "s"
    ]
    where, binds = _active_students(settings)
    sql = "\n".join(
        (
            f"SELECT {', '.join(['s.student_number', *columns])}",
            "FROM students s",
            *joins,
            f"WHERE {where}",
            "ORDER BY s.student_number DESC",
        )
    )
    return sql, binds


def attendance_query(
    settings: SchooLinksSettings, today: datetime.date
) -> tuple[str, dict[str, object]]:
    """SQL and binds for the attendance of all students in this school year.

    One row a student: number, days present, days of membership, days counted, days with a NULL.  A
    NULL attendance value has no conversion: such a day counts on neither side.
    """
    where, binds = _active_students(settings)
    both = "a.attendancevalue IS NOT NULL AND a.membershipvalue IS NOT NULL"
    # Only fixed text is put together here; the values are bound.
    sql = f"""SELECT s.student_number,
    SUM(CASE WHEN {both} THEN a.attendancevalue END) days_present,
    SUM(CASE WHEN {both} THEN a.membershipvalue END) days_member,
    SUM(CASE WHEN {both} THEN 1 ELSE 0 END) days_counted,
    SUM(CASE WHEN {both} THEN 0 ELSE 1 END) days_null
FROM students s
JOIN ps_adaadm_daily_ctod a ON a.studentid = s.id AND a.fteid = s.fteid
WHERE {where}
    AND a.calendardate >= :year_start AND a.calendardate <= :today
GROUP BY s.student_number"""  # noqa: S608
    month, day = settings.school_year_start
    start = datetime.date(today.year, month, day)
    if start > today:
        start = start.replace(year=today.year - 1)
    midnight = datetime.time()
    return sql, binds | {
        "year_start": datetime.datetime.combine(start, midnight),
        "today": datetime.datetime.combine(today, midnight),
    }


def _active_students(settings: SchooLinksSettings) -> tuple[str, dict[str, object]]:
    binds: dict[str, object] = {f"grade{i}": grade for i, grade in enumerate(settings.grades)}
    where = f"s.enroll_status = 0 AND s.grade_level IN ({', '.join(':' + name for name in binds)})"
    if settings.ignored_school is not None:
        where += " AND s.schoolid <> :school"
        binds["school"] = settings.ignored_school
    return where, binds


def query_subject(sql: str) -> str:
    """What an error in this query begins with; Oracle itself may not name the table it misses."""
    return "PowerSchool: the query of " + ", ".join(re.findall(r"(?:FROM|JOIN) (\S+)", sql))


def query_powerschool(settings: SchooLinksSettings, login: OracleLogin) -> list[Section]:
    """Connect, and build the sections of today."""
    with Oracle(settings, login) as powerschool:
        powerschool.connect()
        return build_sections(powerschool, settings, datetime.date.today())


def build_sections(
    powerschool: Oracle, settings: SchooLinksSettings, today: datetime.date
) -> list[Section]:
    """Query PowerSchool and make the rows of every file that is switched on.

    Two queries, however many students there are.  Raises DataError for a student who comes twice.
    """
    sql, binds = student_query(settings)
    found = powerschool.query(query_subject(sql), sql, binds)
    students = [row for row in found if row[0] is not None]
    if len(students) < len(found):
        log.warning("PowerSchool: %s without a student_number, left out",
                    plural(len(found) - len(students), "student"))  # fmt: skip
    numbers = [to_text(row[0]).strip() for row in students]
    for number, following in itertools.pairwise(numbers):
        if number == following:
            raise DataError(
                f"PowerSchool: the student {number} comes twice: a table of <GPA> or <Tag> has "
                "more than one row for a student, or two students share the number",
                "name a table that extends students one to one (studentsdcid is its key), or give "
                "one of the students a number of their own",
            )
    log.info("PowerSchool: %s", plural(len(numbers), "student"))
    sections = []
    if settings.attendance.enabled:
        sql, binds = attendance_query(settings, today)
        days = powerschool.query(query_subject(sql), sql, binds)
        sections.append(attendance_section(settings.attendance, numbers, days))
    width = 2 if settings.gpa.enabled else 0
    if settings.gpa.enabled:
        gpas = [(number, row[1], row[2]) for number, row in zip(numbers, students, strict=True)]
        sections.append(gpa_section(settings.gpa, gpas))
    if settings.tags.enabled:
        values = [row[1 + width :] for row in students]
        sections.append(tags_section(settings.tags, zip(numbers, values, strict=True)))
    return sections


def attendance_section(
    settings: AttendanceSettings, numbers: Sequence[str], days: Iterable[Sequence[Any]]
) -> Section:
    """Days present over days of membership, as a fraction or a percentage; zero days stay."""
    section = Section("attendance", settings.file, ("student_number", "attendance_percentage"))
    scale = 100 if settings.scale == "percent" else 1
    found = {to_text(row[0]).strip(): row[1:] for row in days}
    for number in numbers:
        present, member, counted, missing = found.get(number, (None, None, 0, 0))
        section.null_days += int(missing)
        if member:
            share = float(present) * scale / float(member)
            section.rows.append((number, number_text(share)))
        elif missing and not counted:
            section.skip(number, "only NULL days")
        else:
            section.skip(number, "no membership days")
    return section


def gpa_section(settings: GpaSettings, gpas: Iterable[tuple[str, Any, Any]]) -> Section:
    """The two GPAs; a student with one of them keeps it, the other stays blank."""
    header = ("student_number", "numerator_unweighted", "numerator_weighted")
    section = Section("GPA", settings.file, header)
    for number, unweighted, weighted in gpas:
        row = (number, number_text(unweighted), number_text(weighted))
        if any(row[1:]):
            section.rows.append(row)
        else:
            section.skip(number, "no GPA")
    return section


def tags_section(
    settings: TagsSettings, students: Iterable[tuple[str, Sequence[object]]]
) -> Section:
    """One row for each tag of a student; of tags with one name, the first that applies."""
    header = ("student_number", "name", "detailed_name", "description")
    section = Section("tags", settings.file, header, key=2)
    for number, values in students:
        rows: dict[str, Row] = {}
        for tag, value in zip(settings.tags, values, strict=True):
            if same_value(value, tag.equals):
                rows.setdefault(tag.name, (number, tag.name, tag.detailed_name, tag.description))
        section.rows += rows.values()
    return section


def number_text(value: object) -> str:
    """A number as Python prints it, but without exponent; NULL is empty; text stays text."""
    if isinstance(value, float) and "e" not in repr(value):
        return repr(value)
    return to_text(value).strip()


def same_value(value: object, wanted: str) -> bool:
    """Whether a column holds the value that the configuration names: 1, 1.0 and '1' are equal."""
    import decimal

    text = to_text(value).strip()
    try:
        return text == wanted or decimal.Decimal(text) == decimal.Decimal(wanted)
    except decimal.InvalidOperation:
        return False


def write_sections(sections: Sequence[Section], folder: Path, quoting: str) -> None:
    """Write the files, and log what is in them: counts and student numbers, nothing else."""
    style: Literal[0, 1] = csv.QUOTE_ALL if quoting == "all" else csv.QUOTE_MINIMAL
    for section in sections:
        with csv_writer(folder / section.file, style) as write:
            write([section.header])
            write(section.rows)
        log.info("%s: %s", section.file, plural(len(section.rows), "row"))
        if section.null_days:
            log.info("%s: %s counted on neither side: a value was NULL",
                     section.file, plural(section.null_days, "day"))  # fmt: skip
        for reason, students in section.without.items():
            shown = ", ".join(students[:20]) + (", ..." if len(students) > 20 else "")
            log.info("%s: %s without a row, %s: %s",
                     section.file, plural(len(students), "student"), reason, shown)  # fmt: skip


LIVE = "live"  # how summary.json marks a file that was uploaded, and not for a test


def last_upload(history: Path, section: str) -> tuple[str, Path] | None:
    """Epoch and path of a section's file as it was last uploaded for good, if history has it."""
    import json

    for folder in sorted(history.iterdir(), reverse=True):
        if not EPOCH.fullmatch(folder.name):
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            summary = json.loads((folder / SUMMARY_NAME).read_text(encoding="utf-8"))
            for line in summary["files"]:
                path = folder / line["file"]
                if (line["section"], line["uploaded"]) == (section, LIVE) and path.is_file():
                    return folder.name, path
    return None


def losses(section: Section, before: Path) -> tuple[int, str]:
    """The rows of the file as it was last uploaded, and who would lose what, in words."""
    with local_errors(before), before.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    lost = {tuple(row[: section.key]) for row in rows}
    lost -= {row[: section.key] for row in section.rows}
    what = [f"the tag {key[1]}" if key[1:] else f"their {section.name}" for key in lost]
    words = [
        f"{plural(count, 'student')} would lose {name}"
        for name, count in collections.Counter(what).items()
    ]
    return len(rows), ", ".join(sorted(words)) or "nobody would lose anything"


def check_shrink(
    sections: Sequence[Section], history: Path, max_shrink: Limit, *, force: bool
) -> None:
    """Raise HeldError for a file without rows, or with far fewer than the last one uploaded.

    What a file lacks is deleted or archived at SchooLinks.
    """
    reasons = []
    for section in sections:
        rows, last = len(section.rows), last_upload(history, section.name)
        old_rows, lost = losses(section, last[1]) if last else (0, "")
        if not last:
            log.info("%s: no earlier upload in history to compare with", section.file)
        if not rows:
            reasons.append(f"{section.file}: has no rows" + (f": {lost}" if lost else ""))
        elif last and not max_shrink.allows(old_rows - rows, old_rows):
            reasons.append(
                f"{section.file}: {plural(rows, 'row')} instead of {old_rows:,} in the upload of "
                f"{last[0]}, maxShrink is {max_shrink}: {lost}"
            )
    if reasons and not force:
        raise HeldError(
            "held, nothing was uploaded: " + "; ".join(reasons),
            "look at the files in this run's folder and at PowerSchool; if they are right, run "
            "again with --force",
        )
    for reason in reasons:
        log.warning("%s; --force lets it pass", reason)


def upload_sections(
    sftp: Sftp, directory: str, folder: Path, lines: Sequence[dict[str, Any]], state: str
) -> None:
    """Upload the files of the summary's `lines`, and note in them that they have arrived."""
    waiting = list(lines)

    def attempt() -> None:
        sftp.connect()
        while waiting:
            path = folder / waiting[0]["file"]
            with local_errors(path):
                file = path.open("rb")
            with file:
                size = sftp.write_whole(f"{directory.rstrip('/')}/{path.name}", file)
            log.info("%s: uploaded to %s, %s", path.name, directory, plural(size, "byte"))
            waiting.pop(0)["uploaded"] = state

    retried(attempt)


# ---------------------------------------------------------------------- runs: run_sync


class Display:
    """A progress line a stage on a terminal; nothing elsewhere: there the log lines tell."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal
        self._progress: rich.progress.Progress | None = None

    def __enter__(self) -> Display:
        if self._terminal:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeElapsedColumn,
            )

            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress:
            self._progress.stop()

    @contextlib.contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Tick]:
        """One stage; the function it yields is told how much more of `total` is done."""
        progress = self._progress
        if progress is None:
            yield lambda _: None
            return
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
        done = progress.tasks[task].completed or 1
        progress.update(task, total=done, completed=done)


class Run:
    """One invocation: its folder, its log, its summary."""

    def __init__(self, history: Path, command: str) -> None:
        self.history, self.folder = history, _new_epoch(history)
        self.epoch = self.folder.name
        self._began = time.monotonic()
        self.failed = self.not_converged = 0
        self.summary: dict[str, Any] = {
            "command": command,
            "version": __version__,
            "epoch": self.epoch,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "outcome": "running",
            "exit_code": None,
            "message": "",
            "seconds": 0.0,
            "files": [],
        }

    def conclude(self, outcome: str, exit_code: int, message: str) -> None:
        """Settle the outcome and write summary.json."""
        import json

        self.summary |= {
            "outcome": outcome,
            "exit_code": exit_code,
            "message": redact(message),
            "seconds": round(time.monotonic() - self._began, 3),
        }
        with new_file(self.folder / SUMMARY_NAME) as file:
            file.write(json.dumps(self.summary, indent=1).encode("ascii") + b"\n")

    def complete(self) -> None:
        """Mark the run's folder as whole."""
        path = self.folder / COMPLETE
        with local_errors(path):
            path.touch()

    def told(self) -> str:
        """The outcome in one sentence."""
        outcome, message = self.summary["outcome"], self.summary["message"]
        return f"{outcome}: {message} ({self.summary['seconds']:.1f} s, run {self.epoch})"


def _new_epoch(history: Path) -> Path:
    """Make the folder of this run; a second run in the same second waits for the next one."""
    with local_errors(history):
        history.mkdir(mode=OWNER_ONLY, parents=True, exist_ok=True)
        while True:
            folder = history / time.strftime("%Y%m%d-%H%M%S")
            try:
                folder.mkdir(mode=OWNER_ONLY)
                return folder
            except FileExistsError:
                time.sleep(0.1)


@contextlib.contextmanager
def open_run(options: argparse.Namespace) -> Iterator[Run]:
    """Make the run's folder and log before anything else; however it ends, both tell of it."""
    if not options.home.is_dir():
        raise ConfigError(f"{options.home}: is no folder", "name the one of config.xml: --home DIR")
    history = options.home / "history"
    run = Run(history if options.command == "sync" else history / options.command, options.command)
    with local_errors(run.folder / LOG_NAME):
        handler = logging.FileHandler(run.folder / LOG_NAME, encoding="utf-8")
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)-7s %(message)s"))
    handler.setLevel(logging.DEBUG if log.isEnabledFor(logging.DEBUG) else logging.INFO)
    log.addHandler(handler)
    options.summary = run.summary
    try:
        log.info("sgsync %s %s, run %s", __version__, options.command, run.epoch)
        yield run
        log.info("%s", run.told())
    except BaseException as error:
        code, outcome = exit_code_of(error), outcome_of(error)
        record = logging.LogRecord(
            log.name, logging.ERROR, "", 0, "%s", (describe(error),),
            None if isinstance(error, (Error, KeyboardInterrupt)) else sys.exc_info(),
        )  # fmt: skip
        handler.handle(record)  # The console is told by main.
        with contextlib.suppress(Error):
            if isinstance(error, HeldError):
                with new_file(run.folder / HELD) as file:
                    file.write(redact(describe(error)).encode("utf-8") + b"\n")
            run.conclude(outcome, code, describe(error))
        raise
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):  # of a disk that is full
            handler.close()


@contextlib.contextmanager
def only_run(run: Run, name: str) -> Iterator[None]:
    """Hold the lock of this home; raises BusyError, naming the process that has it.

    The operating system frees the lock of a process that dies.
    """
    import json

    import filelock

    holder = run.history / f"{name}.lock.json"
    lock = filelock.FileLock(run.history / f"{name}.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:  # which is an OSError, too
        who = "a process that is just starting"
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = json.loads(holder.read_text(encoding="utf-8"))
            who = f"process {found['pid']}, since {found['since']} (run {found['epoch']})"
        raise BusyError(
            f"another {name} run is active in this home: {who}; nothing was done",
            "wait for it to end; if it hangs, end that process: its lock goes with it",
        ) from None
    except OSError as error:
        with local_errors(run.history / f"{name}.lock"):
            raise error from None
    try:
        about = {"pid": os.getpid(), "since": run.summary["started"], "epoch": run.epoch}
        with new_file(holder) as file:
            file.write(json.dumps(about).encode("ascii"))
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        lock.release()


def together(first: Callable[[], T], second: Callable[[], object], cancel: Callable[[], None]) -> T:
    """Do both at the same time; where one fails, `cancel` makes the other one stop.

    Raises what failed first.
    """
    from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

    with ThreadPoolExecutor(2) as pool:
        futures: list[Future[Any]] = [pool.submit(first), pool.submit(second)]
        try:
            pending = True
            while pending:  # in short steps: on Windows a longer wait would not notice Ctrl-C
                done, waiting = wait(futures, 0.2, FIRST_EXCEPTION)
                failed = [future for future in done if future.exception()]
                pending = bool(waiting) and not failed
        except BaseException:
            cancel()
            raise
        if failed:
            cancel()
            raise cast("BaseException", failed[0].exception())
    return cast("T", futures[0].result())


def run_sync(options: argparse.Namespace) -> Run:
    """The nightly integration; the steps are those of the README."""
    with open_run(options) as run, only_run(run, "sync"):
        config = load_config(options.config, "sync")
        keep_secret(config.secrets)
        warn_of_readable(config.path, options.home / config.sftp.private_key)
        approved = held_run(run.history, options.approve) if options.approve else None
        with (
            Display(options.terminal) as display,
            Sftp(config.sftp, options.home) as sftp,
            Database(config.database) as database,
        ):
            extract = fetch_both_sides(config, sftp, database, run, display)
            comparisons = diff_files(config, run, display)
            if not may_go_on(config, extract, comparisons, run, options, approved):
                return run
            failures = apply_changes(config, database, comparisons, run, display)
            if config.database.verify:
                verify_changes(database, comparisons, failures, run, display)
            with display.stage("statements") as tick:
                made = run_statements(database, config.statements, run.folder, tick)
            run.summary["statement_files"] = made
            conclude_applied(comparisons, run)
            with display.stage("push") as tick:
                push(sftp, config.sftp.upload_directory, run.folder, tick)
            run.complete()
        prune(run.history, config.history.keep_runs, run.folder)
    return run


def run_schoolinks(options: argparse.Namespace) -> Run:
    """The nightly files for SchooLinks: query, build, check all of them, then upload."""
    with open_run(options) as run, only_run(run, "schoolinks"):
        config = load_config(options.config, "schoolinks")
        settings = config.schoolinks
        login, server = schoolinks_credentials(settings, options.home)
        warn_of_readable(config.path)
        keep_secret(config.secrets | {login.password, server.password, server.passphrase})
        with Display(options.terminal) as display:
            with display.stage("PowerSchool"):
                sections = retried(functools.partial(query_powerschool, settings, login))
            write_sections(sections, run.folder, settings.quoting)
            run.summary["files"] = [section.counts() for section in sections]
            check_shrink(sections, run.history, settings.max_shrink, force=options.force)
            message = ", ".join(f"{s.file}: {plural(len(s.rows), 'row')}" for s in sections)
            if options.dry_run:
                run.conclude("dry run", 0, f"{message}; nothing was uploaded")
                return run
            directory = settings.test_directory if options.test else settings.directory
            with display.stage("upload"), Sftp(server, options.home) as sftp:
                state = "test" if options.test else LIVE
                upload_sections(sftp, directory, run.folder, run.summary["files"], state)
            run.conclude("complete", 0, f"{message}; uploaded to {directory}")
            run.complete()
        if not options.test:  # else keepRuns="1" would delete what the next night is compared with
            prune(run.history, config.history.keep_runs, run.folder)
    return run


def fetch_both_sides(
    config: Config, sftp: Sftp, database: Database, run: Run, display: Display
) -> Extract:
    """Download SameGoal's extract and export the database's tables, both at the same time."""
    cancelled = threading.Event()

    def cancel() -> None:
        cancelled.set()
        sftp.close()
        database.cancel()

    def download_extract() -> Extract:
        with display.stage("download") as tick:
            return download(sftp, config.sftp, run.folder / "ia", tick, cancelled)

    def export_tables() -> None:
        retried(database.connect, cancelled)
        for spec in config.sql_diffs:
            with display.stage(f"export {spec.file}") as tick:
                path = run.folder / "ic" / spec.file
                work = functools.partial(export, database, spec, path, tick)
                rows = retried(work, cancelled)
            log.info("exported %s: %s", spec.file, plural(rows, "row"))

    extract = together(download_extract, export_tables, cancel)
    run.summary["source_epoch"] = extract.epoch
    return extract


def diff_files(config: Config, run: Run, display: Display) -> list[Comparison]:
    """Compare every file before the first write; one line of the summary each."""
    comparisons = []
    for sql_diff in config.sql_diffs:
        began = time.monotonic()
        source, target = (run.folder / side / sql_diff.file for side in ("ia", "ic"))
        if not source.is_file():
            there = ", ".join(sorted(p.name for p in (run.folder / "ia").iterdir())) or "none"
            raise DataError(
                f"ia/{sql_diff.file}: SameGoal's extract {run.summary['source_epoch']} has no such "
                f"file ({sql_diff.where}); it has: {there}",
                "correct file= of that <SQLDiff>, or ask SameGoal to export the file",
            )
        with display.stage(f"diff {sql_diff.file}"):
            found = compare(source, target, run.folder / "diff" / sql_diff.file, sql_diff)
        check_parameters(found)
        log.info("%s: %s, of them %s", sql_diff.file, plural(found.source_rows, "row"), found)
        for difference in found.format_differences:
            log.warning("%s", difference)
        run.summary["files"].append(
            file_summary(found) | {"failed": 0, "seconds": round(time.monotonic() - began, 3)}
        )
        comparisons.append(found)
    return comparisons


def file_summary(found: Comparison) -> dict[str, object]:
    """What summary.json tells of one comparison."""
    return {
        "file": found.sql_diff.file,
        "rows": found.source_rows,
        "database_rows": found.target_rows,
        **{operation: found.count(operation) for operation in (INSERT, UPDATE, DELETE)},
        "forms": found.format_differences,
    }


def may_go_on(
    config: Config,
    extract: Extract,
    comparisons: Sequence[Comparison],
    run: Run,
    options: argparse.Namespace,
    approved: HeldRun | None,
) -> bool:
    """Whether the changes are to be written; False ends a dry run.

    Raises HeldError where the limits or the age of the extract forbid it and neither `--force` nor
    `--approve` allows it.
    """
    held_diff = approved.folder / "diff" if approved else None
    reasons = over_limits(comparisons, config.limits, held_diff)
    stale = too_old(extract, config.sftp.max_age_hours)
    if stale:
        run.summary["stale_epoch"] = extract.epoch
        if not approved or approved.stale_epoch != extract.epoch:
            reasons.append(stale)
    for reason in reasons:
        log.warning("%s", reason)
    if options.dry_run:
        would = f"; it would be held: {'; '.join(reasons)}" if reasons else ""
        run.conclude("dry run", 0, sentence(comparisons, "would be ") + would)
        return False
    if not reasons:
        return True
    if options.force:
        log.warning("the limits are skipped (--force)")
        return True
    counts = ", ".join(f"{found.sql_diff.file}: {found}" for found in comparisons)
    raise HeldError(
        f"held, nothing was written: {'; '.join(reasons)}. In all: {counts}",
        f"{'ask SameGoal for a newer extract; ' if stale in reasons else ''}look at diff/ in this "
        "run's folder; if the changes are right, approve just these: "
        f"{approval(run.epoch, options)}",
    )


@dataclasses.dataclass(frozen=True)
class HeldRun:
    """A run that a limit stopped; naming it with `--approve` allows what it showed."""

    folder: Path
    stale_epoch: str


def held_run(history: Path, epoch: str) -> HeldRun:
    import json

    folder = history / epoch
    if not EPOCH.fullmatch(epoch) or not (folder / HELD).is_file():
        kept = [p.name for p in history.iterdir() if (p / HELD).is_file()]
        raise ConfigError(
            f"--approve {one_line(epoch)}: there is no held run of that name",
            f"held runs are: {', '.join(sorted(kept)) or 'none'}",
        )
    try:
        summary = json.loads((folder / SUMMARY_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = {}
    return HeldRun(folder, str(summary.get("stale_epoch", "")))


def approval(epoch: str, options: argparse.Namespace) -> str:
    """The command that approves a held run, as it can be typed on this machine."""
    import subprocess

    words = [sys.executable] if getattr(sys, "frozen", False) else [sys.executable, str(SCRIPT)]
    words += ["sync", "--approve", epoch]
    if options.home != default_home():
        words += ["--home", str(options.home)]
    if options.config != options.home / "config.xml":
        words += ["--config", str(options.config)]
    return subprocess.list2cmdline(words)


def apply_changes(
    config: Config,
    database: Database,
    comparisons: Sequence[Comparison],
    run: Run,
    display: Display,
) -> Failures:
    """Apply the changes of every file in the order of the SQLDiff elements."""
    with Failures(run.folder / FAILURES_NAME, config.limits.max_failures) as failures:
        for found, line in zip(comparisons, run.summary["files"], strict=True):
            file = found.sql_diff.file
            began, before = time.monotonic(), failures.count
            total = sum(found.count(operation) for operation in found.sql_diff.calls)
            if total:  # It lay idle as long as the download and the diff took.
                retried(database.revive)
            with display.stage(f"apply {file}", total) as tick:
                apply(database, found, failures, tick)
            if total:
                log.info("%s: applied", file)
            run.failed = failures.count
            line["failed"] = failures.count - before
            line["seconds"] = round(line["seconds"] + time.monotonic() - began, 3)
    return failures


def verify_changes(
    database: Database,
    comparisons: Sequence[Comparison],
    failures: Failures,
    run: Run,
    display: Display,
) -> None:
    """Export and compare the changed files again; what still differs goes to notconverged.csv.

    Rows that failed are not told again, nor those that no procedure is there for.
    """
    before = _not_converged_before(run)
    left: list[Row] = []
    for sql_diff in [found.sql_diff for found in comparisons if not found.leaves_all_alone()]:
        file = sql_diff.file
        table, changes = (run.folder / "verify" / kind / file for kind in ("ic", "diff"))
        with display.stage(f"verify {file}") as tick:
            export(database, sql_diff, table, tick)
            again = compare(run.folder / "ia" / file, table, changes, sql_diff)
        for operation, call in sql_diff.calls.items():
            for key in map(again.key.show, again.rows(operation)):
                if (file, operation, key) not in failures.rows:
                    runs = before.get((file, operation, key), 0) + 1
                    left.append((file, operation, key, call.procedure or "SQL", str(runs)))
    run.not_converged = len(left)
    if left:
        with csv_writer(run.folder / NOT_CONVERGED_NAME) as write:
            write([("file", "operation", "key", "procedure", "runs")])
            write(left)
    for file, operation, key, procedure, times in left:
        row = f"{file}: {operation} of {key} by {procedure}"
        suffix = f", {times} runs in a row: the procedure has no effect" if int(times) > 2 else ""
        log.error("%s did not converge%s", row, suffix)


def _not_converged_before(run: Run) -> dict[tuple[str, str, str], int]:
    """file, operation and key -> runs, of the last run that applied its changes."""
    earlier = sorted(p for p in run.history.iterdir() if (p / COMPLETE).is_file())
    path = earlier[-1] / NOT_CONVERGED_NAME if earlier else None
    if not path or not path.is_file():
        return {}
    with local_errors(path), path.open(encoding="utf-8", newline="") as file:
        return {(r["file"], r["operation"], r["key"]): int(r["runs"]) for r in csv.DictReader(file)}


def conclude_applied(comparisons: Sequence[Comparison], run: Run) -> None:
    """The outcome of a run that has applied everything, as it is pushed."""
    problems = []
    if run.failed:
        problems.append(f"{plural(run.failed, 'row')} failed, see {FAILURES_NAME}")
    if run.not_converged:
        problems.append(f"{plural(run.not_converged, 'row')} did not converge, see "
                        f"{NOT_CONVERGED_NAME}")  # fmt: skip
    if problems:
        run.conclude("partial", ROWS_FAILED, f"{'; '.join(problems)}; of {sentence(comparisons)}")
    else:
        run.conclude("complete", 0, sentence(comparisons))


def sentence(comparisons: Sequence[Comparison], would: str = "") -> str:
    """The outcome in words: `3 rows inserted, 1 row updated, ...`, or that nothing differed."""
    totals, left = dict.fromkeys(OPERATIONS, 0), 0
    for found in comparisons:
        for operation in OPERATIONS:
            if operation in found.sql_diff.calls:
                totals[operation] += found.count(operation)
            else:
                left += found.count(operation)
    if not left and not any(totals.values()):
        return "nothing to do: both sides are equal"
    words = ((INSERT, "inserted"), (UPDATE, "updated"), (DELETE, "deleted"))
    parts = [f"{plural(totals[operation], 'row')} {would}{word}" for operation, word in words]
    return ", ".join(parts + ([f"{plural(left, 'row')} left alone"] if left else []))


def warn_of_readable(*paths: Path) -> None:
    """Warn of files that everyone on this machine can read."""
    for path in paths:
        with contextlib.suppress(OSError):
            if os.name == "posix" and path.stat().st_mode & 0o004:
                mend = f"chmod 600 {path} (it has to belong to the account that runs sgsync)"
                log.warning("%s can be read by everyone on this machine\nTry: %s", path, mend)


# ---------------------------------------------------------------------- command line: main

_SECRETS: set[str] = set()


def keep_secret(values: Iterable[str]) -> None:
    """Let nothing that is logged or reported from now on contain these values.

    One or two characters stand in every text: to replace them would hide everything else.
    """
    import json

    for value in values:
        forms = {value, repr(value)[1:-1], json.dumps(value)[1:-1], one_line(value)}
        forms.add(" ".join(value.split()))  # As a message has it in one line.
        _SECRETS.update(form for form in forms if len(form) > 2)


def redact(text: str) -> str:
    for secret in sorted(_SECRETS, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


class LogFormatter(logging.Formatter):
    """Every line of a message in printable characters, without secrets; the rest is indented."""

    def format(self, record: logging.LogRecord) -> str:
        lines = redact(super().format(record)).split("\n")
        return "\n    ".join(map(printable, lines))


def exit_code_of(error: BaseException) -> int:
    if isinstance(error, Error):
        return error.exit_code
    if isinstance(error, ImportError):
        return ConfigError.exit_code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def outcome_of(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return {HeldError.exit_code: "held", BusyError.exit_code: "busy"}.get(
        exit_code_of(error), "failed"
    )


def describe(error: BaseException) -> str:
    if isinstance(error, Error):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was written so far stays, the next run goes on from it"
    if isinstance(error, ImportError):
        return (
            f"this Python, {sys.executable}, cannot load a package: {one_line(error)}\n"
            "Try: the Python of the virtual environment, or pip install -r requirements.txt"
        )
    return (
        f"unexpected error: {type(error).__name__}: {one_line(error)}\n"
        f"Try: send {LOG_NAME} of this run to whoever maintains sgsync"
    )


SCRIPT = Path(__file__).resolve()


def default_home() -> Path:
    """The folder of the script or of the frozen executable, never the working directory."""
    return Path(sys.executable).resolve().parent if getattr(sys, "frozen", False) else SCRIPT.parent


class Parser(argparse.ArgumentParser):
    """Takes no shortened options: `--for` must not mean `--force`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nTry: {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    add = common.add_argument
    add("--home", type=Path, metavar="DIR", help="folder of config.xml (default: the script's)")
    add("--config", type=Path, metavar="FILE", help="default: config.xml in the home folder")
    add("--verbose", action="store_true", help="log every step")
    add("--quiet", action="store_true", help="print warnings and errors only")
    add("--json", action="store_true", help="print the run's summary on standard output")
    add("--version", action="version", version=f"sgsync {__version__}")
    parser = Parser(
        prog="sgsync.py",
        parents=[common],
        description="Keep a student information system in step with SameGoal.",
        epilog="Without a command: sync. Exit codes: 0 success, 1 unexpected error, "
        "2 configuration or usage, 3 SFTP transfer, 4 database, 5 data, 6 held by a limit, "
        "7 another run is active, 8 finished but some rows failed, 130 interrupted.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    sync = commands.add_parser("sync", parents=[common], help="the nightly integration")
    sync.add_argument("--dry-run", action="store_true", help="stop after the diff, write nothing")
    over = sync.add_mutually_exclusive_group()
    over.add_argument("--force", action="store_true", help="skip the limits")
    over.add_argument("--approve", metavar="EPOCH", help="do what a held run showed, and only that")
    schoolinks = commands.add_parser(
        "schoolinks", parents=[common], help="build and upload the files for SchooLinks"
    )
    schoolinks.add_argument("--dry-run", action="store_true", help="build the files only")
    schoolinks.add_argument("--test", action="store_true", help="upload to the test directory")
    schoolinks.add_argument("--force", action="store_true", help="skip the guard against shrinking")
    compare = commands.add_parser(
        "diff", parents=[common], help="compare two CSV files",
        description="What would have to be inserted, updated and deleted in B to make it A.",
    )  # fmt: skip
    compare.add_argument("source", type=Path, metavar="A.csv", help="the file that is right")
    compare.add_argument("target", type=Path, metavar="B.csv", help="the file to be changed")
    compare.add_argument("--key", metavar="COLS",
                         help="columns that identify a row, in sort order: id,start or id:int "
                         "(default: the whole row)")  # fmt: skip
    compare.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    compare.add_argument("--sort", action="store_true", help="sort both files first")
    compare.add_argument("--trim", action="store_true", help="drop blanks at the end of fields")
    compare.add_argument("--null-text", metavar="TEXT", help="a field of TEXT counts as empty")
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, with `sync` where no command is given."""
    words = list(argv)
    if not _names_command(words):
        words.insert(0, "sync")
    defaults = {"home": default_home(), "config": None, "verbose": False, "quiet": False,
                "json": False}  # fmt: skip
    options = argparse.Namespace(**(defaults | vars(build_parser().parse_args(words))))
    options.home = options.home.absolute()
    options.config = options.config or options.home / "config.xml"
    options.terminal = sys.stderr.isatty() and not (options.quiet or options.verbose)
    options.summary = {"command": options.command, "version": __version__}
    return options


def _names_command(words: Sequence[str]) -> bool:
    """Whether a word stands there that is neither an option nor its value, or --help or such."""
    remaining = iter(words)
    for word in remaining:
        if word in ("--home", "--config", "--approve"):
            next(remaining, None)
        elif word in ("-h", "--help", "--version") or not word.startswith("-"):
            return True
    return False


def _check_readable(path: Path) -> None:
    try:
        path.stat()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "correct the name of the file") from None
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder", "name a CSV file in it")
    if not os.access(path, os.R_OK):
        raise ConfigError(f"{path}: may not be read", "let your account read the file")


@contextlib.contextmanager
def _diff_output(path: Path | None, inputs: Iterable[Path]) -> Iterator[BinaryIO]:
    """Where `diff` writes: standard output, a new file, or a device or pipe as it is."""
    if path is None:
        if sys.stdout is None:
            raise ConfigError("there is no standard output", "name a file with --output")
        with local_errors(Path("standard output")):
            import errno

            try:
                yield sys.stdout.buffer
            except OSError as error:
                if os.name == "nt" and error.errno == errno.EINVAL:  # what Windows calls it
                    raise BrokenPipeError from error
                raise
    elif path.is_dir():
        raise ConfigError(f"--output {path}: is a folder", "name a file in it")
    elif any(path.exists() and path.samefile(file) for file in inputs):
        raise ConfigError(f"--output {path}: is one of the files compared", "name another file")
    elif path.exists() and not path.is_file():  # Nothing may replace /dev/null.
        with local_errors(path), path.open("wb") as device:
            yield device
    else:
        with new_file(path.resolve() if path.is_symlink() else path) as file:
            yield file


def run_diff(options: argparse.Namespace) -> None:
    """`sgsync.py diff`: the diff alone, on two files."""
    try:
        key = None if options.key is None else _key(options.key)
    except ValueError as error:
        raise ConfigError(f"--key '{one_line(options.key)}': {error}", "--key id,start") from None
    spec = _defaults(
        SqlDiff, file=options.source.name, key=key, sort=options.sort, trim=options.trim,
        null_text=options.null_text,
    )  # fmt: skip
    files = (options.source, options.target)
    for path in files:
        _check_readable(path)
    if options.json and options.output is None:
        raise ConfigError("--json: standard output holds the changes", "name a file with --output")
    with _diff_output(options.output, files) as changes:
        found = diff(*files, changes, spec, [str(path) for path in files])
    log.info("%s, %s: %s",
             plural(found.source_rows, "row"), plural(found.target_rows, "row"), found)  # fmt: skip
    options.summary |= {"outcome": "complete", "exit_code": 0, "message": str(found)}
    options.summary["files"] = [file_summary(found)]


SYNC_COLUMNS = {  # heading -> name in the summary
    "file": "file",
    "rows": "rows",
    "inserted": "insert",
    "updated": "update",
    "deleted": "delete",
    "failed": "failed",
    "time": "seconds",
}
SCHOOLINKS_COLUMNS = {"file": "file", "rows": "rows", "students without": "without"}


def report(run: Run, options: argparse.Namespace, columns: Mapping[str, str]) -> None:
    """What a terminal is told at the end of a run: one table and one sentence."""
    if options.terminal:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(*columns)
        for column in table.columns[1:]:
            column.justify = "right"
        for line in run.summary["files"]:
            table.add_row(*(escape(_cell(line[name])) for name in columns.values()))
        Console(stderr=True).print(table)
        print(run.told(), file=sys.stderr)


def _cell(value: object) -> str:
    if isinstance(value, dict):  # reasons -> how many
        return ", ".join(f"{count:,} {reason}" for reason, count in value.items()) or "0"
    if isinstance(value, float):
        return f"{value:.1f} s"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.  Never raises, never waits for a key."""
    if sys.stderr is None:  # under pythonw
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # A console may be unable to show every character.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        options = parse_arguments(sys.argv[1:] if argv is None else argv)
    except SystemExit as error:  # argparse has said why
        return int(error.code or 0)
    with _console_log(options), _signals():
        code = 1
        try:
            code = _run_command(options)
            if options.json and sys.stdout is not None:
                import json

                print(json.dumps(options.summary), flush=True)
        except BrokenPipeError:  # whoever read our output has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code


def _run_command(options: argparse.Namespace) -> int:
    try:
        return COMMANDS[options.command](options)
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        log.error("%s", describe(error))
        log.debug("", exc_info=True)
        code = exit_code_of(error)
        failed = {
            "outcome": outcome_of(error),
            "exit_code": code,
            "message": redact(describe(error)),
        }
        options.summary = failed | options.summary  # A run has told more of itself already.
        return code


def sync_command(options: argparse.Namespace) -> int:
    run = run_sync(options)
    report(run, options, SYNC_COLUMNS)
    return int(run.summary["exit_code"])


def schoolinks_command(options: argparse.Namespace) -> int:
    run = run_schoolinks(options)
    report(run, options, SCHOOLINKS_COLUMNS)
    return int(run.summary["exit_code"])


def diff_command(options: argparse.Namespace) -> int:
    run_diff(options)
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "sync": sync_command,
    "schoolinks": schoolinks_command,
    "diff": diff_command,
}


@contextlib.contextmanager
def _console_log(options: argparse.Namespace) -> Iterator[None]:
    """Log to standard error."""
    level = logging.DEBUG if options.verbose else logging.INFO
    log.setLevel(level)
    log.propagate = False
    logging.raiseExceptions = False  # A full disk must not end the run by way of its log.
    handler = _ConsoleHandler()
    plain = options.command == "diff" or options.terminal
    handler.setFormatter(LogFormatter("%(message)s" if plain else "%(asctime)s %(message)s"))
    quiet = options.quiet or (options.terminal and options.command != "diff")
    handler.setLevel(logging.WARNING if quiet else level)
    log.addHandler(handler)
    hook = threading.excepthook
    threading.excepthook = _log_thread_exception
    try:
        yield
    finally:
        threading.excepthook = hook
        log.removeHandler(handler)


def _log_thread_exception(args: threading.ExceptHookArgs) -> None:
    """A driver's own thread has failed: the call that needs it fails, too, and is told."""
    log.debug("%s: %r", args.thread and args.thread.name, args.exc_value)


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler  # Python 3.10 cannot subscript it.


class _ConsoleHandler(_StreamHandler):
    """Writes to what sys.stderr is at the time: a progress display replaces it while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """A request to end (kill, a closed console, a shutdown) ends the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    import signal

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    present = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP", "SIGBREAK")]
    # nohup ignores SIGHUP: leave it so.
    wanted = [n for n in present if n is not None and signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in wanted}
    mask = os.umask(0o077)  # What a run leaves is for its owner alone.
    try:
        yield
    finally:
        os.umask(mask)
        for number, handler in before.items():
            signal.signal(number, handler)


def opened_by_double_click(
    process: int, attached: set[int], processes: Mapping[int, tuple[int, str]]
) -> bool:
    """Whether a console was opened by a double click on this program.

    `attached` are the processes in the console, `processes` all: id -> (parent's id, name).  So it
    is where the console holds nobody but the program and its launchers (py.exe, the python.exe of a
    virtual environment) and the Explorer started them.  The Task Scheduler is somebody else.
    """
    ours = {process}
    parent, name = processes.get(process, (-1, ""))
    while parent in attached - ours and processes[parent][1].startswith(("py", name)):
        ours.add(parent)
        parent = processes[parent][0]
    opener = processes.get(parent, (0, ""))[1]
    return ours == attached and (opener == "explorer.exe" or parent == 0)  # 0: as under Wine


def _windows_processes() -> dict[int, tuple[int, str]]:
    """Process id -> (parent's id, name in small letters).

    Source: Microsoft, "Taking a Snapshot and Viewing Processes" (Tool Help library).
    """
    import ctypes
    from ctypes.wintypes import DWORD, HANDLE, WCHAR

    class ProcessEntry(ctypes.Structure):  # PROCESSENTRY32W
        _fields_ = (
            ("size", DWORD), ("usage", DWORD), ("process", DWORD), ("heap", ctypes.c_size_t),
            ("module_threads", DWORD * 2), ("parent", DWORD), ("priority_flags", DWORD * 2),
            ("name", WCHAR * 260),
        )  # fmt: skip

    kernel = cast("Any", ctypes).windll.kernel32
    kernel.CreateToolhelp32Snapshot.restype = HANDLE
    snapshot = HANDLE(kernel.CreateToolhelp32Snapshot(2, 0))
    entry = ProcessEntry(size=ctypes.sizeof(ProcessEntry))
    found: dict[int, tuple[int, str]] = {}
    more = kernel.Process32FirstW(snapshot, ctypes.byref(entry))
    while more:
        found[entry.process] = entry.parent, entry.name.lower()
        more = kernel.Process32NextW(snapshot, ctypes.byref(entry))
    kernel.CloseHandle(snapshot)
    return found


def wait_if_double_clicked() -> None:
    """Keep the window of a double click on Windows open until a key is pressed."""
    if sys.platform != "win32" or not (sys.stdin and sys.stdin.isatty()):
        return
    import ctypes
    import msvcrt

    attached = (ctypes.c_uint32 * 16)()
    count = ctypes.windll.kernel32.GetConsoleProcessList(attached, len(attached))
    if opened_by_double_click(os.getpid(), set(attached[:count]), _windows_processes()):
        while msvcrt.kbhit():  # typed during the run
            msvcrt.getwch()
        print("\nPress any key to close this window.", file=sys.stderr, flush=True)
        msvcrt.getwch()


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(Exception):  # The exit code stands, whatever the console is.
        wait_if_double_clicked()
    sys.exit(code)
