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
import struct
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
    where: str = ""  # the element's place, such as config.xml:12
    host_from: str = "host= in <SFTP>"
    key_advice: str = "give the public key, the file with .pub, to SameGoal"
    login_advice: str = (
        "check username= in <SFTP>, and that SameGoal has the public key of this private key (a "
        "new key takes up to 60 minutes to work)"
    )
    trust: tuple[str, ...] = ("trust",)  # the command that pins its host key


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


# ---------------------------------------------------------------------- connections: Watchdog


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


# ---------------------------------------------------------------------- SSH keys and host keys
# Given: the settings of an SFTP server, the home folder, known_hosts as ssh or PowerShell wrote it.
# Gives: the private key to log in with, the host keys pinned for a server, the key it shows.
# Raises: ConfigError for this machine's files, TransferError for a server that cannot be trusted.

logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # What it logs it raises, too.


def command_line(words: Sequence[str], program: Sequence[str] = ()) -> str:
    """A command, of sgsync where no other `program` is named, as it can be typed here."""
    import shlex
    import subprocess

    own = [sys.executable] if getattr(sys, "frozen", False) else [sys.executable, str(SCRIPT)]
    quoted = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return quoted([*(program or own), *words])


def load_private_key(settings: SftpSettings, home: Path) -> paramiko.PKey:
    """The key to log in with.  Raises ConfigError that names the file and what is wrong with it."""
    import paramiko

    path = home / settings.private_key
    try:
        text = path.read_bytes()
    except OSError as error:
        remedy = ""
        if isinstance(error, FileNotFoundError):
            remedy = _key_pair_advice(settings, path)
        if isinstance(error, PermissionError):
            remedy = "make the account that runs sgsync the owner of that file"
        reason = f"the private key cannot be read: {error.strerror}"
        raise ConfigError(f"{path}: {reason}", remedy) from None
    if text.startswith(b"PuTTY-User-Key-File"):
        raise ConfigError(
            f"{path}: the key is in PuTTY format",
            "open it in PuTTYgen and save it with Conversions > Export OpenSSH key",
        )
    if text.startswith((b"ssh-", b"ecdsa-")):
        raise ConfigError(
            f"{path}: this is a public key", "name the private key, the file without .pub"
        )
    encrypted = False
    kinds: dict[str, type[paramiko.PKey]] = {
        "RSA": paramiko.RSAKey,
        "EC": paramiko.ECDSAKey,
        "ED25519": paramiko.Ed25519Key,
    }
    if kind := kinds.get(_key_type(text)):
        for passphrase in (None, settings.passphrase or None):
            try:
                return kind.from_private_key(io.StringIO(text.decode("ascii")), passphrase)
            except paramiko.PasswordRequiredException:
                encrypted = True
            except Exception as error:  # of many kinds, by the library below paramiko
                log.debug("%s: %s", path, one_line(error))
    if encrypted and settings.passphrase:
        raise ConfigError(
            f"{path}: the passphrase is wrong", f"correct passphrase= in {settings.element}"
        )
    if encrypted:
        raise ConfigError(
            f"{path}: the private key is protected by a passphrase",
            f'add passphrase="${{env:NAME}}" to {settings.element} and set that variable',
        )
    raise ConfigError(
        f"{path}: this is not a private key in OpenSSH format",
        "use an OpenSSH key of type RSA, ECDSA or Ed25519",
    )


def _key_type(text: bytes) -> str:
    """RSA, EC or ED25519, from the outside of a private key: the wrong reader only complains."""
    import binascii

    found = re.search(rb"-----BEGIN (RSA|EC|OPENSSH) PRIVATE KEY-----([^-]*)", text)
    if not found:
        return ""
    if found[1] != b"OPENSSH":
        return found[1].decode("ascii")
    with contextlib.suppress(binascii.Error):
        # The public key comes first, before what a passphrase protects.
        named = re.search(rb"ssh-(rsa|ed25519)|(ec)dsa-sha2-", binascii.a2b_base64(found[2]))
        return (named[1] or named[2]).decode("ascii").upper() if named else ""
    return ""


def _key_pair_advice(settings: SftpSettings, path: Path) -> str:
    """How to make the missing key pair, from any directory, as the account that will own it."""
    words, folder, account = ["ssh-keygen"], path.parent, ""
    if os.name != "nt" and folder.is_dir():
        import pwd

        owner = folder.stat().st_uid
        if owner != os.getuid():
            with contextlib.suppress(KeyError):  # An account that has been deleted has no name.
                account = pwd.getpwuid(owner).pw_name
    if account:
        words = ["sudo", "-u", account, *words]
    command = command_line(["-t", "rsa", "-b", "4096", "-f", str(path)], words)
    first = "" if folder.is_dir() else f"create the folder {folder}; "
    return f"{first}make a key pair without a passphrase: {command}; then {settings.key_advice}"


class HostKeys:
    """The pinned host keys: a file known_hosts as ssh writes it, or PowerShell's `>` in UTF-16.

    A file that does not exist holds none.  Lines marked @cert-authority are left alone, and
    wildcards match nothing: a server has to be named.  Raises ConfigError where the file cannot be
    read.  Source of the format: sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT".
    """

    def __init__(self, path: Path) -> None:
        self.path, raw = path, b""
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read: {error.strerror}",
                "let the account that runs sgsync read that file",
            ) from None
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            text = raw.decode("utf-16", "replace")
        else:
            text = raw.decode("utf-8-sig", "surrogateescape")
        self._lines = re.split("\r\n|\r|\n", text)

    @staticmethod
    def name(host: str, port: int) -> str:
        """A server as known_hosts names it."""
        return host.lower() if port == 22 else f"[{host.lower()}]:{port}"

    def of(self, host: str, port: int) -> list[paramiko.PKey]:
        """The keys pinned for a server, less those marked @revoked."""
        wanted = self.name(host, port)
        found: dict[str, list[paramiko.PKey]] = {"": [], "@revoked": []}
        for marker, names, key in filter(None, map(self._parsed, self._lines)):
            if marker in found and any(self._matches(name, wanted) for name in names):
                found[marker].append(key)
        return [key for key in found[""] if key not in found["@revoked"]]

    def hosts(self) -> list[str]:
        """The servers that have a key, in the file's order; the hashed ones are only counted."""
        parsed = filter(None, map(self._parsed, self._lines))
        names = [name for marker, names, _ in parsed if not marker for name in names]
        hashed = sum(name.startswith("|") for name in names)
        plain = dict.fromkeys(name for name in names if not name.startswith("|"))
        return [*map(printable, plain), *([plural(hashed, "hashed name")] if hashed else [])]

    def require(self, host: str, port: int, setting: str, trust: str) -> list[paramiko.PKey]:
        """The keys of a server, at least one; `setting` names it, the command `trust` pins it."""
        found = self.of(host, port)
        if found:
            return found
        pin = f"pin the server's key: {trust}"
        if not self.path.exists():
            raise ConfigError(f"{self.path}: cannot be read: the file does not exist", pin)
        hosts = self.hosts()
        if not hosts:
            raise TransferError(f"{self.path}: has no host key", pin)
        more = f" and {len(hosts) - 10} more" if len(hosts) > 10 else ""
        raise TransferError(
            f"{self.path}: has no host key for {self.name(host, port)}, only for "
            f"{', '.join(hosts[:10])}{more}",
            f"check {setting}; if it is right, {pin}",
        )

    def check(self, host: str, port: int, key: paramiko.PKey, remedy: str) -> None:
        """Raise TransferError, with that remedy, unless `key` is one of those pinned."""
        pinned = self.of(host, port)
        if key not in pinned:
            known = ", ".join(f"{each.get_name()} {each.fingerprint}" for each in pinned)
            raise TransferError(
                f"{host}:{port}: the host key is {key.get_name()} {key.fingerprint}, but "
                f"{self.path} has {known or 'none'}; nothing was sent",
                remedy,
            )

    def pin(self, host: str, port: int, key: paramiko.PKey) -> None:
        """Add a server's key, unless it is there; raises Error where the file cannot be written."""
        if key not in self.of(host, port):
            line = f"{self.name(host, port)} {key.get_name()} {key.get_base64()}"
            self._write([*self._lines, line])

    def replace(self, host: str, port: int, key: paramiko.PKey) -> None:
        """Make `key` the only one of a server.  Other servers' lines and marked lines stay."""
        wanted = self.name(host, port)
        kept = []
        for line in self._lines:
            parsed = self._parsed(line)
            if parsed and not parsed[0]:
                others = [name for name in parsed[1] if not self._matches(name, wanted)]
                if not others:
                    continue
                if len(others) < len(parsed[1]):
                    kept.append(f"{','.join(others)} {line.split(None, 1)[1]}")
                    continue
            kept.append(line)
        self._write([*kept, f"{wanted} {key.get_name()} {key.get_base64()}"])

    @staticmethod
    def _parsed(line: str) -> tuple[str, list[str], paramiko.PKey] | None:
        """Marker, names and key of a line; None for comments and lines that are no use."""
        from paramiko.hostkeys import HostKeyEntry

        fields = line.split()
        marker = fields.pop(0) if line.lstrip().startswith("@") else ""
        if line.lstrip().startswith("#"):
            return None
        with contextlib.suppress(Exception):  # of many kinds, for bad base64 and bad keys
            if entry := HostKeyEntry.from_line(" ".join(fields[:3])):
                return marker, list(entry.hostnames), entry.key
        return None

    @staticmethod
    def _matches(name: str, wanted: str) -> bool:
        if not name.startswith("|1|"):
            return name.lower() == wanted
        import paramiko

        with contextlib.suppress(Exception):  # a salt that is no base64
            return paramiko.HostKeys.hash_host(wanted, name) == name
        return False

    def _write(self, lines: Sequence[str]) -> None:
        """The whole file at once: readable by its owner alone if new, else as it was.

        Root may do this in a folder of another account's: the new file follows no link, and is
        that account's.
        """
        import stat
        import tempfile

        lines = [line for line in lines if line.strip()]
        folder = self.path.parent
        with local_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            there = self.path.exists()
            like = (self.path if there else folder).stat()
            number, name = tempfile.mkstemp(suffix=PART, dir=folder)  # 0600
            try:
                with open(number, "wb") as file:  # noqa: PTH123 - a descriptor
                    if os.name != "nt":
                        if like.st_uid != os.geteuid():
                            os.fchown(number, like.st_uid, like.st_gid)
                        if there:
                            os.fchmod(number, stat.S_IMODE(like.st_mode))
                    text = "".join(f"{line}\n" for line in lines)
                    file.write(text.encode("utf-8", "surrogateescape"))
                Path(name).replace(self.path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        self._lines = lines


def fetch_host_key(host: str, port: int, kind: str = "") -> paramiko.PKey:
    """The key a server shows, of type `kind` (such as ssh-rsa) if given; nobody logs in.

    Nothing proves that it is the right server: a person has to compare the fingerprint.  Takes
    `CONNECT_SECONDS` at most; raises TransferError.
    """
    import queue

    found: queue.SimpleQueue[paramiko.PKey | Exception] = queue.SimpleQueue()
    subject = f"{host}:{port}: cannot connect"

    def fetch() -> None:
        try:
            transport = ssh_transport(host, port, [kind])
            try:
                transport.start_client(timeout=CONNECT_SECONDS)
                found.put(transport.get_remote_server_key())
            finally:
                transport.close()
        except Exception as error:  # handed to the caller
            found.put(error)

    # In a thread, since nothing else bounds the look-up of a name.
    threading.Thread(target=fetch, daemon=True, name="host key").start()
    try:
        key = found.get(timeout=CONNECT_SECONDS)
    except queue.Empty:
        key = TimeoutError()
    if isinstance(key, Exception):
        raise ssh_error(subject, key, CONNECT_SECONDS, "the host name") from key
    if kind and key.get_name() != kind:
        raise TransferError(f"{host}:{port}: the server has no host key of type {kind}")
    return key


def ssh_transport(host: str, port: int, kinds: Collection[str]) -> paramiko.Transport:
    """A connection whose key exchange has not begun and will ask for host keys of `kinds` first."""
    import socket

    import paramiko

    def wanted(name: str) -> bool:
        return name in kinds or (name.startswith("rsa-sha2-") and "ssh-rsa" in kinds)

    sock = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    try:
        # Else each small packet of the log-in waits 40 ms for the other side.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport = paramiko.Transport(sock)
    except BaseException:
        sock.close()
        raise
    transport.banner_timeout = transport.handshake_timeout = CONNECT_SECONDS
    transport.auth_timeout = transport.channel_timeout = CONNECT_SECONDS
    options = transport.get_security_options()
    options.key_types = sorted(options.key_types, key=lambda name: not wanted(name))
    # Measured: a third faster than paramiko's first choice, CTR with a MAC of its own.
    options.ciphers = sorted(options.ciphers, key=lambda name: "gcm" not in name)
    return transport


def ssh_error(subject: str, error: Exception, seconds: float, name: str) -> TransferError:
    """What a connection that broke or never came about means; `name` is what to check."""
    import socket

    reason = one_line(error) or type(error).__name__
    if isinstance(error, EOFError):
        reason = "the server closed the connection"
    if reason.startswith("Error reading SSH protocol banner"):
        reason = "no SSH server answers there"
    if isinstance(error, TimeoutError) or reason == "No existing session":
        reason = f"no answer for {seconds:g} s"
    remedy = "check that the server is running and that no firewall blocks it"
    if isinstance(error, socket.gaierror):
        remedy = f"check {name}, and that this machine can resolve names"
    return TransferError(f"{subject}: {reason}", remedy, transient=True)


# ---------------------------------------------------------------------- SFTP requests: SftpRequests
# Given: the channel of an SFTP session, and what is to be read or written.
# Gives: files in both directions, with many requests in flight at once.
# Raises: what paramiko raises: OSError, EOFError, SFTPError.

SFTP_REQUESTS = 64  # In flight at once, as OpenSSH's client has: more makes some servers hang.
SFTP_FILES = 16  # Open at once.
READ_BYTES = 1 << 15  # Asked for at once; every server must be able to answer as much.
WRITE_BYTES = 32_000  # Sent at once: with its header it fits into one SSH packet.
SFTP_PACKET_BYTES = 1 << 18  # OpenSSH sends no larger one.


class SftpRequests:
    """Requests of which several are in flight at once, on the channel of an idle SFTPClient.

    Answers may come in any order; each is handed, as its type and content, to the function that
    was given with the request.  `moved` is called for each packet sent and each whole answer: bytes
    alone may drip.  After an exception answers may be outstanding: hang up.
    Source: draft-ietf-secsh-filexfer-02.
    """

    OPEN, CLOSE, READ, WRITE, STAT = 3, 4, 5, 6, 17
    STATUS, HANDLE, DATA, ATTRIBUTES = 101, 102, 103, 105

    def __init__(
        self, channel: paramiko.Channel, most: int, moved: Callable[[], None] = lambda: None
    ) -> None:
        self.most = most
        self._channel, self._moved = channel, moved
        self._waiting: dict[int, Callable[[int, bytes], None]] = {}
        self._numbers = itertools.count(1 << 31)  # The SFTPClient counts from 1.
        self._outgoing: list[bytes] = []
        self._outgoing_bytes = 0
        self._incoming = bytearray()

    @property
    def pending(self) -> int:
        """How many answers are outstanding."""
        return len(self._waiting)

    @property
    def free(self) -> bool:
        return len(self._waiting) < self.most

    def hang_up(self) -> None:
        """Close this connection, which may not be the newest one any more."""
        self._channel.get_transport().close()

    def ask(self, kind: int, fields: Sequence[bytes], then: Callable[[int, bytes], None]) -> None:
        number = next(self._numbers) & 0xFFFFFFFF
        self._waiting[number] = then
        size = 5 + sum(map(len, fields))
        self._outgoing += (struct.pack(">IBI", size, kind, number), *fields)
        self._outgoing_bytes += 4 + size
        if self._outgoing_bytes > READ_BYTES:  # else small requests share a packet
            self._send()

    def exchange(self) -> None:
        """Send what was asked; wait for an answer, and hand on all that have come."""
        import paramiko

        self._send()
        received = self._channel.recv(1 << 21)
        if not received:
            raise EOFError
        self._incoming += received
        try:
            self._hand_on()
        except struct.error:
            raise paramiko.SFTPError("the server's answer is garbled") from None

    def _send(self) -> None:
        outgoing, begin = b"".join(self._outgoing), 0
        self._outgoing.clear()
        self._outgoing_bytes = 0
        while begin < len(outgoing):
            sent = self._channel.send(outgoing[begin : begin + READ_BYTES])
            if not sent:
                raise EOFError
            begin += sent
            self._moved()

    def _hand_on(self) -> None:
        import paramiko

        begin, buffer = 0, self._incoming
        while len(buffer) - begin >= 9:
            size, kind, number = struct.unpack_from(">IBI", buffer, begin)
            if not 5 <= size <= SFTP_PACKET_BYTES:
                raise paramiko.SFTPError("the server's answer is garbled")
            end = begin + 4 + size
            if len(buffer) < end:
                break
            then = self._waiting.pop(number, None)
            if then is None:
                raise paramiko.SFTPError("the server answered what nobody asked")
            self._moved()
            then(kind, bytes(memoryview(buffer)[begin + 9 : end]))
            begin = end
        del buffer[:begin]

    @staticmethod
    def path(text: str) -> bytes:
        """A string as requests hold it."""
        encoded = text.encode("utf-8")
        return struct.pack(">I", len(encoded)) + encoded

    @staticmethod
    def check(kind: int, content: bytes, wanted: int) -> None:
        """Raise what an answer other than the `wanted` one means, as paramiko does."""
        import errno

        import paramiko

        if kind == wanted != SftpRequests.STATUS:
            return
        code = struct.unpack_from(">I", content)[0] if kind == SftpRequests.STATUS else 0
        if code == 0:
            if kind == wanted:
                return
            raise paramiko.SFTPError("the server's answer is garbled")
        text = content[8 : 8 + int.from_bytes(content[4:8], "big")].decode("utf-8", "replace")
        numbers = {2: errno.ENOENT, 3: errno.EACCES}
        raise OSError(numbers[code], text) if code in numbers else OSError(text or f"code {code}")


class SftpReads:
    """Reads files in order, while requests about the files that follow are in flight.

    What has been asked for and not been taken is never more than `SFTP_REQUESTS` blocks.
    """

    class File:
        """One of the files; `changed` says how its size differs from the listed one."""

        def __init__(self, path: str, size: int) -> None:
            self.path, self.size, self.asked = path, size, 0
            self.handle, self.changed = b"", ""
            self.error: Exception | None = None
            self.blocks: collections.deque[SftpReads.Block] = collections.deque()

        def opened(self, kind: int, content: bytes) -> None:
            try:
                SftpRequests.check(kind, content, SftpRequests.HANDLE)
                self.handle = content  # a string, as every request about the file needs it
            except OSError as error:
                self.error = error  # raised when it is the file's turn

    @dataclasses.dataclass
    class Block:
        """Bytes that were asked for; `missing` of them, from `offset` on, have not come."""

        offset: int
        missing: int
        data: bytes = b""
        ended: bool = False

    def __init__(self, requests: SftpRequests, files: Sequence[SftpReads.File]) -> None:
        self.requests, self.files = requests, files
        self._opened = self._reading = self._taken = 0  # files
        self._held = 0  # blocks

    def next_block(self, file: SftpReads.File) -> bytes:
        """The bytes that follow; none at the end, when `file.changed` tells whether all came."""
        while True:
            self._ask()
            if file.error:
                raise file.error
            if file.blocks and not file.blocks[0].missing:
                break
            self.requests.exchange()
        block = file.blocks.popleft()
        self._held -= 1
        probe = not file.blocks and file.asked > file.size
        if block.ended != probe:
            file.changed = "longer" if probe else "shorter"
        if not file.changed and not probe:
            return block.data
        self._taken += 1
        self.requests.ask(SftpRequests.CLOSE, [file.handle], lambda *_: None)
        return b""

    def _ask(self) -> None:
        most = SFTP_FILES if self.requests.most > 1 else 1
        while self._opened < min(len(self.files), self._taken + most) and self.requests.free:
            file = self.files[self._opened]
            fields = SftpRequests.path(file.path) + struct.pack(">II", 1, 0)
            self.requests.ask(SftpRequests.OPEN, [fields], file.opened)
            self._opened += 1
        while self._reading < self._opened and self._held < self.requests.most:
            file = self.files[self._reading]
            if not file.handle or not self.requests.free:
                break
            # After the last block, one byte more: a file that goes on is an error.
            block = self.Block(file.asked, min(READ_BYTES, file.size - file.asked) or 1)
            file.asked += block.missing
            file.blocks.append(block)
            self._held += 1
            self._ask_block(file, block)
            if file.asked > file.size:
                self._reading += 1

    def _ask_block(self, file: SftpReads.File, block: SftpReads.Block) -> None:
        fields = [file.handle, struct.pack(">QI", block.offset, block.missing)]
        then = functools.partial(self._arrived, file, block)
        self.requests.ask(SftpRequests.READ, fields, then)

    def _arrived(
        self, file: SftpReads.File, block: SftpReads.Block, kind: int, content: bytes
    ) -> None:
        import paramiko

        if kind == SftpRequests.STATUS and content.startswith(b"\0\0\0\1"):  # end of file
            block.ended, block.missing = True, 0
            return
        try:
            SftpRequests.check(kind, content, SftpRequests.DATA)
        except OSError as error:
            file.error = file.error or error
            return
        data = content[4:]
        if int.from_bytes(content[:4], "big") != len(data) or not 0 < len(data) <= block.missing:
            raise paramiko.SFTPError("the server's answer is garbled")
        block.data = block.data + data if block.data else data
        block.offset += len(data)
        block.missing -= len(data)
        if block.missing:  # A server may answer with less than was asked for.
            self._ask_block(file, block)


class SftpWrites:
    """Writes files in order, several of them open at once, and asks for the size of each."""

    class File:
        """One of the files; `confirmed` is its size on the server after it was closed."""

        def __init__(self, path: str, blocks: Iterator[bytes]) -> None:
            self.path, self.blocks = path, blocks
            self.handle = b""
            self.sent = self.unanswered = 0
            self.ended = False
            self.confirmed: int | None = None
            self.error: Exception | None = None

    def __init__(
        self, requests: SftpRequests, files: Iterable[tuple[str, Iterator[bytes]]]
    ) -> None:
        self.requests = requests
        self._files = itertools.starmap(self.File, files)
        self._unfinished: collections.deque[SftpWrites.File] = collections.deque()
        self._unsent: collections.deque[SftpWrites.File] = collections.deque()

    def oldest(self) -> SftpWrites.File | None:
        """The first file that is not finished; None when all are."""
        if not self._unfinished:
            self._ask()
        return self._unfinished[0] if self._unfinished else None

    def finish(self, file: SftpWrites.File) -> None:
        while file.confirmed is None:
            if file.error:
                raise file.error
            self._ask()
            self.requests.exchange()
        self._unfinished.popleft()

    def _ask(self) -> None:
        most = SFTP_FILES if self.requests.most > 1 else 1
        while self.requests.free:
            file = self._unsent[0] if self._unsent else None
            if file and file.handle:
                self._send(file)
            elif len(self._unfinished) < most and (opened := next(self._files, None)):
                self._unfinished.append(opened)
                self._unsent.append(opened)
                # for writing, made if missing, emptied if there
                fields = SftpRequests.path(opened.path) + struct.pack(">II", 0x1A, 0)
                self._request(opened, SftpRequests.OPEN, [fields], SftpRequests.HANDLE)
            else:
                break

    def _send(self, file: SftpWrites.File) -> None:
        block = b"" if file.error else next(file.blocks, b"")
        if block:
            fields = [file.handle, struct.pack(">QI", file.sent, len(block)), block]
            file.sent += len(block)
            file.unanswered += 1
            self._request(file, SftpRequests.WRITE, fields)
        else:
            self._unsent.popleft()
            file.ended = True
            self._close(file)

    def _close(self, file: SftpWrites.File) -> None:
        if file.ended and not file.unanswered:
            self._request(file, SftpRequests.CLOSE, [file.handle])

    def _request(
        self, file: SftpWrites.File, kind: int, fields: Sequence[bytes], wanted: int = 101
    ) -> None:
        def then(answer: int, content: bytes) -> None:
            try:
                SftpRequests.check(answer, content, wanted)
            except OSError as error:
                file.error = file.error or error  # raised when it is the file's turn
                return
            if kind == SftpRequests.OPEN:
                file.handle = content
            elif kind == SftpRequests.WRITE:
                file.unanswered -= 1
                self._close(file)
            elif kind == SftpRequests.CLOSE:
                path = SftpRequests.path(file.path)
                self._request(file, SftpRequests.STAT, [path], SftpRequests.ATTRIBUTES)
            else:
                flags, size = struct.unpack_from(">IQ", content)
                file.confirmed = size if flags & 1 else -1

        self.requests.ask(kind, fields, then)


# ---------------------------------------------------------------------- SFTP: Sftp
# Given: the settings of a server and the home folder.
# Gives: listings, files in both directions, directories; every exchange is bounded in time.
# Raises: TransferError for the server's and the network's faults, ConfigError for the key files.


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
        import paramiko

        settings = self.settings
        host_keys = HostKeys(self.home / settings.known_hosts)
        pinned = host_keys.require(
            settings.host, settings.port, settings.host_from + self._place(), self._trust()
        )
        private_key = None if settings.password else load_private_key(settings, self.home)
        kinds = {key.get_name() for key in pinned}
        self._watchdog = Watchdog(settings.timeout_seconds, self._hang_up)
        with self._operation(f"{self.where}: cannot connect"):
            self._transport = transport = ssh_transport(settings.host, settings.port, kinds)
            transport.start_client(timeout=2 * CONNECT_SECONDS)  # greeting and key exchange
            key = transport.get_remote_server_key()
            host_keys.check(
                settings.host,
                settings.port,
                key,
                "ask the server's operator whether the host key was changed; only if it was, "
                f"replace the pinned key: {self._trust()}",
            )
            transport.set_keepalive(15)
            if private_key:
                transport.auth_publickey(settings.username, private_key)
            else:
                transport.auth_password(settings.username, settings.password)
            self._client = paramiko.SFTPClient.from_transport(transport)
            if self._client is None:
                raise TransferError(f"{self.where}: the server offers no SFTP", transient=True)
            self._channel().settimeout(settings.timeout_seconds)
        log.info("%s: logged in as %s", self.where, settings.username)

    def _trust(self) -> str:
        """The command that fetches, shows and pins this server's key."""
        home = [] if self.home == default_home() else ["--home", str(self.home)]
        return command_line([*self.settings.trust, *home])

    def _place(self) -> str:
        return f" ({self.settings.where})" if self.settings.where else ""

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
                        f"clean up that directory, or {self._correct_directory()}",
                    )
        return sorted(entries, key=lambda entry: entry.name)

    def _listed(self, subject: str, directory: str) -> Iterator[paramiko.SFTPAttributes]:
        try:
            yield from self._session().listdir_iter(directory, read_aheads=1)
        except UnicodeDecodeError:
            raise TransferError(
                f"{subject}: it contains a name that is not UTF-8",
                "ask the server's operator; an extract must not contain such a name",
            ) from None

    def read_files(
        self, directory: str, entries: Sequence[RemoteEntry], *, ahead: bool
    ) -> Iterator[tuple[RemoteEntry, Iterator[bytes]]]:
        """Files of a directory as they were listed, each with its blocks.

        A file whose size is not the listed one is an error.  Many requests are in flight `ahead`
        of the block that is taken, in bounded memory: fast, but some servers choke on it.
        """
        requests = SftpRequests(self._channel(), SFTP_REQUESTS if ahead else 1)
        files = [SftpReads.File(f"{directory}/{entry.name}", entry.size) for entry in entries]
        reads = SftpReads(requests, files)
        try:
            for entry, file in zip(entries, files, strict=True):
                blocks = self._blocks(reads, file)
                yield entry, blocks
                collections.deque(blocks, maxlen=0)  # what the caller left
        except BaseException:  # The next exchange would meet the answers to this one.
            requests.hang_up()
            raise
        with contextlib.suppress(Error), self._operation(f"{self.where}: {directory}"):
            while requests.pending:  # All files are whole: only their closing is outstanding.
                requests.exchange()

    def _blocks(self, reads: SftpReads, file: SftpReads.File) -> Iterator[bytes]:
        subject = f"{self.where}: {file.path}: cannot be downloaded"
        block = b"any"
        try:
            while block:
                with self._operation(subject):
                    block = reads.next_block(file)
                if block:
                    yield block
            if file.changed:
                raise TransferError(
                    f"{self.where}: {file.path}: the file is {file.changed} than its listed size, "
                    f"{plural(file.size, 'byte')}",
                    "check whether the file is still being written; the next run downloads it "
                    "again",
                    transient=True,
                )
        except BaseException:  # at once: `read_files` may learn of it late
            reads.requests.hang_up()
            raise

    def make_directory(self, path: str) -> None:
        """Make a directory, unless it is there."""
        self._make(path, f"{self.where}: {path}: cannot be created")

    def _make(self, path: str, subject: str) -> None:
        with self._operation(subject):
            try:
                self._session().mkdir(path)
            except OSError:
                with contextlib.suppress(FileNotFoundError):
                    self._session().stat(path)
                    return
                raise

    def check_writable(self, directory: str, name: str) -> None:
        """Make a directory of that name in it and remove it; a leftover is only a warning."""
        path = f"{directory}/{name}"
        self._make(path, f"{self.where}: {directory}: cannot be written to")
        with self._operation(f"{self.where}: {path}: cannot be removed"):
            try:
                self._session().rmdir(path)
            except TimeoutError:
                raise
            except OSError as error:
                log.warning(
                    "%s: %s: cannot be removed: %s; ask the server's operator to remove it",
                    self.where,
                    path,
                    one_line(error),
                )

    def exists(self, path: str) -> bool:
        with self._operation(f"{self.where}: {path}: cannot be checked"):
            try:
                self._session().stat(path)
            except FileNotFoundError:
                return False
            return True

    def write_files(
        self, files: Iterable[tuple[str, Iterator[bytes]]], *, ahead: bool = True
    ) -> int:
        """Upload files, given as path and blocks of `WRITE_BYTES` at most.

        Returns the bytes sent; the server has confirmed the size of each file.
        """
        requests = SftpRequests(self._channel(), SFTP_REQUESTS if ahead else 1, self._feed)
        writes = SftpWrites(requests, files)
        total = 0
        try:
            while file := writes.oldest():
                with self._operation(f"{self.where}: {file.path}: cannot be uploaded"):
                    writes.finish(file)
                if file.confirmed != file.sent:
                    raise TransferError(
                        f"{self.where}: {file.path}: the server has {file.confirmed:,} of "
                        f"{plural(file.sent, 'byte')}",
                        "check whether the server's disk is full",
                        transient=True,
                    )
                total += file.sent
        finally:
            if requests.pending:
                requests.hang_up()
        return total

    def write(self, path: str, file: BinaryIO) -> int:
        """Upload an open file; returns its size, which the server has confirmed."""
        return self.write_files([(path, iter(lambda: file.read(WRITE_BYTES), b""))])

    def write_whole(self, path: str, file: BinaryIO) -> int:
        """Upload under a temporary name and rename; directly where the server refuses either."""
        try:
            size = self.write(path + PART, file)
        except TransferError as error:
            if error.transient:
                raise
            self.connect()
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
        with self._operation(f"{self.where}: {path}: cannot be created"):
            self._session().open(path, "wb").close()

    def _session(self) -> paramiko.SFTPClient:
        if self._client is None:
            raise TransferError(f"{self.where}: the connection was closed", transient=True)
        return self._client

    def _channel(self) -> paramiko.Channel:
        return cast("paramiko.Channel", self._session().get_channel())

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

        import paramiko

        settings, reason = self.settings, one_line(error)
        seconds = float(settings.timeout_seconds)
        if self._watchdog and self._watchdog.expired:
            error = TimeoutError()
        elif not self._client:
            seconds = min(seconds, CONNECT_SECONDS)
        cut_off = re.search("(?i)shut down|timeout", reason)  # so paramiko calls it, too
        if isinstance(error, paramiko.AuthenticationException) and not cut_off:
            key = "" if settings.password else f" with the key {settings.private_key}"
            return TransferError(
                f"{self.where}: log-in as {settings.username}{key} refused: {reason}",
                settings.login_advice,
            )
        code = error.errno if isinstance(error, OSError) else None
        if isinstance(error, paramiko.SFTPError) and "No such file" in reason:
            code = errno.ENOENT
        if code in (errno.ENOENT, errno.EACCES, errno.EPERM):
            words = "it does not exist" if code == errno.ENOENT else "permission denied"
            remedy = f"{self._correct_directory()}, or ask for access to it"
            return TransferError(f"{subject}: {words}", remedy)
        refused = (
            isinstance(error, OSError) and code is None and not isinstance(error, TimeoutError)
        )
        if refused and self._transport and self._transport.is_active():
            remedy = "check the disk space and the permissions on the server"
            return TransferError(f"{subject}: {reason}", remedy, transient=True)
        return ssh_error(subject, error, seconds, settings.host_from + self._place())

    def _correct_directory(self) -> str:
        return f"correct the directory in {self.settings.element}{self._place()}"


# ---------------------------------------------------------------------- connections: Database


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
# A file is read in blocks of whole records.  Each block is checked and brought into one canonical
# form, bytes in which \0 stands between fields, \n after rows, and \xff for a line break inside a
# field (that byte occurs in no UTF-8, and \0 is refused).  Equal rows are then equal bytes, however
# they were quoted, and the order of bytes is the order of the tuples of fields.

CSV_LIMIT = 2**31 - 1
csv.field_size_limit(CSV_LIMIT)

_STRUCTURE = b',"\r\n'
_NOT_STRUCTURE = bytes(set(range(256)) - set(_STRUCTURE))
_NOT_CANONICAL = bytes(set(range(256)) - set(b"\0\n"))
_TO_CANONICAL = bytes.maketrans(b",", b"\0")
_REGULAR = re.compile(rb'(?:"")?(?:,(?:"")?)*\r?\n')
_LOOSE_QUOTE = re.compile(rb'[^,\r\n"]"|"[^,\r\n"]')
_LONE_RETURN = re.compile(rb"\r(?!\n)")
_BLANKS_AT_END = re.compile(rb"(?<! ) +(?=[\0\n])")
_BREAK = b"\xff"
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Block:
    """`rows` records in canonical form; the first begins on line `line` of its file."""

    data: bytes
    line: int
    rows: int

    def line_at(self, offset: int) -> int:
        """The line on which the row at `offset` begins."""
        return self.line + self.data.count(b"\n", 0, offset) + self.data.count(_BREAK, 0, offset)


def decode_row(row: bytes) -> Row:
    """The fields of one canonical row (without its \\n)."""
    return tuple(row.replace(_BREAK, b"\n").decode("utf-8").split("\0"))


class CsvFile:
    """A CSV file: RFC 4180, UTF-8 with or without BOM, a header first, memory bounded.

    `columns` is the header, () for a file of 0 bytes; `blocks()` gives the rows.  Raises DataError
    with file and line for everything that RFC 4180 does not allow, and for rows that have more or
    fewer fields than the header.
    """

    def __init__(self, path: Path, shown: str = "") -> None:
        self.path, self.shown = path, shown or path.name
        self.columns: Row = ()
        self._line = 1  # of what `_records` gives next
        self._regular_line = b""  # The structure of a row that has been found regular.
        with local_errors(path):
            self._file: BinaryIO = path.open("rb")
        try:
            self._records = self._raw_blocks()
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

    def blocks(self, trim: bool = False, null_text: str | None = None) -> Iterator[Block]:
        """The rows; `trim` drops blanks at the end of fields, `null_text` stands for empty."""
        text = (null_text or "").encode("utf-8", "surrogatepass").replace(b"\n", _BREAK)
        null = re.compile(rb"(?<![^\0\n])" + re.escape(text) + rb"(?=[\0\n])")
        for raw in itertools.chain([self._rest] if self._rest else (), self._records):
            block = self._canonical(raw, self._line)
            self._line += raw.count(b"\n") if _BREAK in block.data else block.rows
            data = block.data
            if trim:
                data = _BLANKS_AT_END.sub(b"", data)
            if null_text:
                data = null.sub(b"", data)
            yield block if data is block.data else dataclasses.replace(block, data=data)

    def fail(self, line: int, what: str, remedy: str) -> NoReturn:
        raise DataError(f"{self.shown}:{line}: {what}", remedy)

    def _read_header(self) -> bytes:
        """Settle the names of the columns; returns what follows them in the first block, raw."""
        first = next(self._records, b"")
        if first.startswith((b"\xff\xfe", b"\xfe\xff")):
            self.fail(1, "is UTF-16", "save or export it as UTF-8")
        first = first.removeprefix(_BOM)
        if not first:
            return b""
        end = _record_end(first)
        header = first[:end]
        columns = decode_row(self._canonical(header, 1).data[:-1])
        seen: set[str] = set()
        for number, name in enumerate(columns, 1):
            if not name or name in seen:
                what = f"the column '{one_line(name)}' stands there twice"
                what = what if name else f"column {number} has no name"
                self.fail(1, f"the header is wrong: {what}", "give each column a name of its own")
            seen.add(name)
        self.columns = columns
        self._line += header.count(b"\n")
        return first[end:]

    def _raw_blocks(self) -> Iterator[bytes]:
        """The file in blocks that end where a record ends; the last one gets its line end."""
        rest = b""
        while True:
            with local_errors(self.path):
                read = self._file.read(BLOCK_BYTES)
            raw = rest + read
            end = _last_record_end(raw, len(rest))
            if not read:
                break
            if end == 0 and len(raw) > RECORD_BYTES:
                self._fail_endless(
                    raw,
                    f"a record is longer than {RECORD_BYTES >> 20} MB",
                    "look for a quote that is never closed, or a file that is no CSV",
                )
            if end:
                yield raw[:end]
            rest = raw[end:]
        if rest.count(b'"') % 2:
            self._fail_endless(
                rest,
                "a quoted field is never closed",
                "see whether the file was cut off; export again",
            )
        if rest.endswith(b"\r"):
            self.fail(
                self._line + rest.count(b"\n"),
                "a carriage return without a line feed",
                "see whether the file was cut off; export again",
            )
        if rest:
            yield rest + b"\n"

    def _fail_endless(self, raw: bytes, what: str, remedy: str) -> NoReturn:
        """`raw` is one record without end; what stands in it may be the reason."""
        self._check_nul(raw, self._line)
        begin = raw[: 1 << 20].removeprefix(_BOM)
        self._canonical_irregular(begin + b'"' * (begin.count(b'"') % 2), self._line)
        self.fail(self._line, what, remedy)

    def _canonical(self, raw: bytes, line: int) -> Block:
        """One block in canonical form.

        Nearly every block of a real file is regular: all its rows quote the same columns and no
        field holds a comma, a quote or a line break.  One translation that leaves only those
        characters shows it, and a second one makes the canonical form.
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
                "holds a NUL character: a binary or UTF-16 file",
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
        if first != self._regular_line:
            if not _REGULAR.fullmatch(first) or (width and first.count(b",") != width - 1):
                return False
            self._regular_line = first
        if b'"' not in first:
            return not _has_lone_return(raw, first)
        # Two quotes a field: the one must open it and the other close it.
        quoted = first.count(b'"') // 2 * rows
        opened = raw.count(b',"') + raw.count(b'\n"') + raw.startswith(b'"')
        closed = raw.count(b'",') + raw.count(b'"\r\n' if first.endswith(b"\r\n") else b'"\n')
        if not opened == closed == quoted:
            return False
        return first.endswith((b'"\r\n', b'"\n')) or not _has_lone_return(raw, first)

    def _canonical_irregular(self, raw: bytes, line: int) -> bytes:
        """The same for any block: split at the quotes, every other piece stands inside them."""
        pieces = raw.split(b'"')
        outside, inside = pieces[0::2], pieces[1::2]
        skeleton = b'"'.join(outside)  # Each " now stands for a quoted piece.
        wrong = _LOOSE_QUOTE.search(skeleton) or _LONE_RETURN.search(skeleton)
        if wrong:
            before = skeleton[: wrong.start() + 1]
            hidden = inside[: before.count(b'"')]
            lines = before.count(b"\n") + sum(piece.count(b"\n") for piece in hidden)
            if b'"' in wrong[0]:
                what = "a quote stands inside a field that is not wholly quoted"
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
                    "see whether the file was cut off, or a value with a comma is not quoted",
                )
            offset += len(row) + 1


def _has_lone_return(raw: bytes, first: bytes) -> bool:
    """Whether the last, unquoted field of a row holds the row's \\r, not its end.

    Costs half of raw.count(b"\\r\\n").
    """
    if not first.endswith(b"\r\n"):
        return False
    decoder = io.IncrementalNewlineDecoder(None, translate=False)
    decoder.decode(raw.decode("latin-1"))
    return decoder.newlines != "\r\n"


def _record_end(raw: bytes) -> int:
    """The offset behind the first record of `raw`, which holds at least one."""
    end = quotes = 0
    while True:
        start, end = end, raw.index(b"\n", end) + 1
        quotes += raw.count(b'"', start, end)
        if quotes % 2 == 0:
            return end


def _last_record_end(raw: bytes, begin: int) -> int:
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


class Key:
    """The columns that identify a row, in sort order; those of `:int` sort as numbers."""

    def __init__(self, spec: Sequence[str] | None, columns: Row, shown: str) -> None:
        numeric = [name.endswith(":int") for name in spec or ()]
        self.names = tuple(name.removesuffix(":int") for name in spec) if spec else columns
        missing = [name for name in self.names if name not in columns]
        if missing:
            raise DataError(
                f"{shown}: the key column '{missing[0]}' is not in the header "
                f"({', '.join(map(one_line, columns))})",
                "correct the key, or the name of the column in the query",
            )
        self.indexes = tuple(columns.index(name) for name in self.names)
        self._numeric = numeric or [False] * len(columns)
        self._whole_row = self.indexes == tuple(range(len(columns)))
        # Where the key is the first columns as text, the keys of a block can be taken at once.
        prefix = self.indexes == tuple(range(len(self.indexes))) and not any(self._numeric)
        self._first_columns = len(self.indexes) if prefix else 0
        pattern = rb"(" + rb"[^\0]*\0" * len(self.indexes) + rb").*\n"
        self._pattern = re.compile(pattern) if prefix and not self._whole_row else None
        self._whole_row = self._whole_row and prefix

    def of(self, row: bytes) -> tuple[bytes | int, ...]:
        """What a row is compared by; raises ValueError where a number is none."""
        if self._first_columns and _BREAK not in row:
            return tuple(row.split(b"\0", self._first_columns)[: self._first_columns])
        fields = row.split(b"\0")
        return tuple(
            _whole_number(fields[index]) if numeric else fields[index].replace(_BREAK, b"\n")
            for index, numeric in zip(self.indexes, self._numeric, strict=True)
        )

    def of_block(self, data: bytes) -> Sequence[Any]:
        """The keys of a block's rows, comparable with each other."""
        rows = data[:-1].split(b"\n") if self._pattern is None or _BREAK in data else []
        if _BREAK not in data:
            if self._pattern:
                return self._pattern.findall(data)
            if self._whole_row:
                return rows
        return [self.of(row) for row in rows]

    def sort_forms(self, data: bytes) -> list[bytes]:
        """The keys of a block's rows as bytes that sort as they do, \\0 after each column."""
        if self._pattern and _BREAK not in data and b"\x0b" not in data:
            return self._pattern.findall(data)
        forms = []
        for row in data[:-1].split(b"\n"):
            fields = row.split(b"\0")
            parts = [
                _number_sort_form(fields[index]) if numeric else _text_sort_form(fields[index])
                for index, numeric in zip(self.indexes, self._numeric, strict=True)
            ]
            forms.append(b"\0".join(parts) + b"\0")
        return forms

    def show(self, row: bytes) -> str:
        """A row's key for a message: `studentNumber=1001, startDate=2026-01-15`."""
        values = [decode_row(row)[index] for index in self.indexes]
        return show_key(self.names, [v if len(v) <= 100 else f"{v[:100]}..." for v in values])


def show_key(names: Sequence[str], values: Sequence[str]) -> str:
    return ", ".join(f"{one_line(n)}={one_line(v)}" for n, v in zip(names, values, strict=True))


def _whole_number(field: bytes) -> int:
    if not re.fullmatch(rb"-?[0-9]{1,40}", field):
        raise ValueError
    return int(field)


def _number_sort_form(field: bytes) -> bytes:
    number = _whole_number(field)
    return b"1%040d" % number if number >= 0 else b"0%040d" % (number + 10**40)


def _text_sort_form(field: bytes) -> bytes:
    """A line break sorts between \\t and \\x0b."""
    return field.replace(b"\x0b", b"\x0b\x02").replace(_BREAK, b"\x0b\x01")


class SortedRows:
    """The rows of a CSV file one after another, in a window of bytes, their order checked.

    With `check_blocks` the order is checked as a block is read; else as rows are taken.
    """

    def __init__(
        self, csv_file: CsvFile, blocks: Iterator[Block], key: Key, *, check_blocks: bool
    ) -> None:
        self.csv_file, self.key = csv_file, key
        self.data, self.position = b"", 0
        self.rows = 0  # read so far
        self._blocks, self._check_blocks = blocks, check_blocks
        self._block = self._last_block = Block(b"", 0, 0)
        self._last: bytes | None = None  # The row before `position`, in `_last_block` at `_start`.
        self._start = 0

    def fill(self) -> bool:
        """Make sure that a row stands at `position`; False at the end of the file."""
        if self.position < len(self.data):
            return True
        block = next(self._blocks, None)
        if block is None:
            return False
        self._remember_last()
        self._block, self.data, self.position = block, block.data, 0
        self.rows += block.rows
        if self._check_blocks:
            self._check_block()
        return True

    def peek(self) -> bytes:
        return self.data[self.position : self.data.index(b"\n", self.position)]

    def take(self, row: bytes) -> None:
        """Go behind the row that `peek` gave."""
        if not self._check_blocks:
            self._check_next(row)
        self.position += len(row) + 1

    def skip(self, end: int) -> None:
        """Go to `end`, behind whole rows that equal those of the other file.

        Their order needs no check: they ascend as the source's do, and the row before them equalled
        a row of the source that comes before theirs, or was found to be less than one that does.
        """
        self.position = end

    def key_of(self, row: bytes) -> tuple[bytes | int, ...]:
        """The key of the row that `peek` gave."""
        try:
            return self.key.of(row)
        except ValueError:
            line = self._block.line_at(self.position)
            raise not_a_number(self.csv_file, self.key, row, line) from None

    def _remember_last(self) -> None:
        if self.position:
            self._last_block = self._block
            self._start = self.data.rfind(b"\n", 0, self.position - 1) + 1
            self._last = self.data[self._start : self.position - 1]

    def _check_next(self, row: bytes) -> None:
        """The row at `position` against the one before it."""
        self._remember_last()
        key = self.key_of(row)
        if self._last is not None and not self.key.of(self._last) < key:
            line = self._last_block.line_at(self._start)
            self._refuse(self._last, line, row, self._block.line_at(self.position))

    def _check_block(self) -> None:
        self._check_next(self.peek())
        try:
            keys = self.key.of_block(self.data)
        except ValueError:
            refuse_number(self.csv_file, self.key, self._block)
        if all(map(operator.lt, keys, itertools.islice(keys, 1, None))):
            return
        rows = self.data[:-1].split(b"\n")
        index = next(i for i in range(1, len(rows)) if not keys[i - 1] < keys[i])
        before, row = rows[index - 1 : index + 1]
        offset = sum(len(row) + 1 for row in rows[: index - 1])
        line = self._block.line_at(offset)
        self._refuse(before, line, row, self._block.line_at(offset + len(before) + 1))

    def _refuse(self, before: bytes, line_before: int, row: bytes, line: int) -> NoReturn:
        if self.key.of(before) == self.key.of(row):
            raise duplicate_key(self.csv_file, self.key, row, line_before, line)
        raise DataError(
            f"{self.csv_file.shown}:{line}: not sorted: line {line_before} has the key "
            f"{self.key.show(before)}, line {line} has {self.key.show(row)}",
            "sort by the key, compared as code points (on SQL Server: ORDER BY ... COLLATE "
            'Latin1_General_BIN2), or set sort="true" (for diff: --sort)',
        )


def sorted_blocks(csv_file: CsvFile, blocks: Iterator[Block], key: Key) -> Iterator[Block]:
    """The same rows in the order of their keys, in bounded memory; a key twice is an error.

    Sorted runs go to temporary files and are merged.  A line of a run is a row behind its key, in
    a form whose bytes sort as the key does, and its line in the file.
    """
    import heapq

    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(_sorted_run(csv_file.path, lines))
            for lines in _sortable_lines(csv_file, blocks, key)
        ]
        data, rows = bytearray(), 0
        key_before: list[bytes] = []
        line_before = b""
        for sortable in heapq.merge(*runs):
            *key_now, line, row = sortable.split(b"\0", len(key.indexes) + 1)
            if key_now == key_before:
                raise duplicate_key(csv_file, key, row[:-1], int(line_before), int(line))
            key_before, line_before = key_now, line
            data += row
            rows += 1
            if len(data) >= BLOCK_BYTES:
                yield Block(bytes(data), 0, rows)
                data, rows = bytearray(), 0
        if data:
            yield Block(bytes(data), 0, rows)


def _sortable_lines(csv_file: CsvFile, blocks: Iterator[Block], key: Key) -> Iterator[list[bytes]]:
    """Lines for a run, as many as may be sorted in memory at a time."""
    lines: list[bytes] = []
    size = 0
    for block in blocks:
        try:
            forms = key.sort_forms(block.data)
        except ValueError:
            refuse_number(csv_file, key, block)
        number = block.line
        for form, row in zip(forms, block.data[:-1].split(b"\n"), strict=True):
            lines.append(b"%b%012d\0%b\n" % (form, number, row))
            size += len(lines[-1]) + 48  # what Python adds to a line in a list
            number += 1 + row.count(_BREAK)
        if size >= SORT_BYTES:
            yield lines
            lines, size = [], 0
    if lines:
        yield lines


@contextlib.contextmanager
def _sorted_run(path: Path, lines: list[bytes]) -> Iterator[IO[bytes]]:
    """Sort `lines` into a temporary file beside `path`, or where such files belong."""
    import tempfile

    lines.sort()
    place = path.parent if os.access(path.parent, os.W_OK) else None
    with contextlib.ExitStack() as stack:
        with local_errors(path):
            run = stack.enter_context(tempfile.TemporaryFile(dir=place))
            run.writelines(lines)
            run.seek(0)
        lines.clear()
        yield run


def refuse_number(csv_file: CsvFile, key: Key, block: Block) -> NoReturn:
    """Name the first row of a block whose key is no number."""
    offset = 0
    for row in block.data[:-1].split(b"\n"):
        try:
            key.of(row)
        except ValueError:
            line = block.line_at(offset)
            raise not_a_number(csv_file, key, row, line) from None
        offset += len(row) + 1
    raise AssertionError("every key is a number")


def not_a_number(csv_file: CsvFile, key: Key, row: bytes, line: int) -> DataError:
    return DataError(
        f"{csv_file.shown}:{line}: the key {key.show(row)} is no whole number where :int asks "
        "for one",
        "correct the value, or drop :int from the key",
    )


def duplicate_key(
    csv_file: CsvFile, key: Key, row: bytes, line_before: int, line: int
) -> DataError:
    return DataError(
        f"{csv_file.shown}:{line}: lines {line_before} and {line} have the same key "
        f"{key.show(row)}",
        "add the column that tells them apart to the key, or let the source give each key one row",
    )


@contextlib.contextmanager
def csv_writer(
    path: Path, quoting: Literal[0, 1] = csv.QUOTE_MINIMAL
) -> Iterator[Callable[[Iterable[Sequence[object]]], None]]:
    """Write a CSV file as RFC 4180 wants it; yields a function that takes rows."""
    with new_file(path) as binary:
        text = csv_text(binary)
        yield csv.writer(text, quoting=quoting).writerows
        text.flush()
        text.detach()


def csv_text(binary: BinaryIO) -> io.TextIOWrapper:
    """The text layer under a csv.writer, which itself writes the CR LF of RFC 4180."""
    return io.TextIOWrapper(binary, encoding="utf-8", newline="")


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
    import secrets

    attempts = itertools.count()
    begun = ""  # the epoch of the attempt before
    probe = f".sgsync-probe-{secrets.token_hex(4)}"  # no epoch: SameGoal ignores it

    def track(size: int) -> None:
        if cancelled.is_set():
            raise CancelledError("download")
        tick(size)

    def attempt() -> Extract:
        nonlocal begun
        sftp.connect()
        if not sftp.exists(settings.upload_directory):  # Better told now than after the writing.
            raise TransferError(
                f"{sftp.where}: {settings.upload_directory}: upload directory does not exist",
                "correct uploadDirectory on <SFTP>",
            )
        sftp.check_writable(settings.upload_directory, probe)
        extract = newest_extract(sftp, settings)
        if extract.epoch != begun:  # A newer one was finished meanwhile: mix no files of two.
            with local_errors(folder):
                shutil.rmtree(folder)
                folder.mkdir()
            begun = extract.epoch
        ahead = next(attempts) % 2 == 0  # Servers that choke on it get every other attempt.
        directory = f"{settings.download_directory}/{extract.epoch}"
        # An earlier attempt of this run may have brought some.
        whole = {path.name: path.stat().st_size for path in folder.iterdir()}
        missing = [entry for entry in extract.files if whole.get(entry.name) != entry.size]
        for entry, blocks in sftp.read_files(directory, missing, ahead=ahead):
            _download_file(blocks, folder, entry, track)
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
            f"{where}: contains no epoch directory (YYYYMMDD-HHMMSS)",
            "correct downloadDirectory on <SFTP>, or ask SameGoal whether the export is scheduled",
        )
    for epoch in reversed(epochs):
        files = sftp.listing(f"{top}/{epoch}")
        complete = any(e.name == COMPLETE and e.is_file for e in files)
        if complete or not settings.require_complete:
            break
        log.warning("%s/%s: skipped: it has no %s file", where, epoch, COMPLETE)
    else:
        raise TransferError(
            f"{where}: none of {plural(len(epochs), 'epoch')} has a {COMPLETE} file",
            'wait until the export is finished, or ask SameGoal; requireComplete="false" on '
            "<SFTP> accepts an epoch without it",
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
            problem = "differs from another name only in case"
        if problem:
            raise TransferError(
                f"{where}: the server lists the name '{one_line(entry.name)[:200]}', which "
                f"{problem}; nothing was downloaded",
                "ask the server's operator; an extract must not contain such a name",
            )
        seen.add(entry.name.lower())


def _download_file(blocks: Iterator[bytes], folder: Path, entry: RemoteEntry, tick: Tick) -> None:
    target = folder / entry.name
    free = shutil.disk_usage(folder).free
    if entry.size > free:
        raise Error(
            f"{target}: the server lists {plural(entry.size, 'byte')}, but only {free:,} are free "
            "on this disk",
            "free some disk space; if that size is absurd, ask the server's operator",
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


# ---------------------------------------------------------------------- stage: diff


INSERT, UPDATE, DELETE = "insert", "update", "delete"
OPERATIONS = (DELETE, UPDATE, INSERT)  # In this order they are applied: a key may be freed first.

Change = tuple[str, bytes, bytes]  # operation, canonical row before, canonical row after


@dataclasses.dataclass
class Counts:
    """What one comparison found."""

    rows: int = 0  # of the source
    database_rows: int = 0
    insert: int = 0
    update: int = 0
    delete: int = 0
    forms: list[str] = dataclasses.field(default_factory=list)  # updates that differ in form alone

    def of(self, operation: str) -> int:
        return int(getattr(self, operation))

    def __str__(self) -> str:
        return f"{self.insert:,} to insert, {self.update:,} to update, {self.delete:,} to delete"


def diff(
    source: Path,
    database: Path,
    changes: BinaryIO,
    spec: SqlDiff,
    shown: Sequence[str] = (),
    *,
    may_be_empty: bool = False,
) -> Counts:
    """Compare two sorted CSV files; write what makes `database` equal to `source`.

    `changes` gets one line a change: `operation`, then every column before (`before_name`), then
    every column after (`after_name`).  Memory is bounded whatever the size.  Raises DataError,
    whose message calls the files `shown`, else `ia/iep.csv` and `ic/iep.csv`.  With
    `may_be_empty` a source of 0 bytes is one without rows.
    """
    shown = shown or [f"{path.parent.name}/{path.name}" for path in (source, database)]
    with CsvFile(source, shown[0]) as ours, CsvFile(database, shown[1]) as theirs:
        if theirs.columns and not ours.columns and may_be_empty:
            columns = theirs.columns
        else:
            check_columns(ours, theirs)
            columns = ours.columns
        key = Key(spec.key, columns, shown[1])
        sides = []
        for file in (ours, theirs):
            blocks = file.blocks(spec.trim, spec.null_text)
            if spec.sort:
                blocks = sorted_blocks(file, blocks, key)
            sides.append(SortedRows(file, blocks, key, check_blocks=file is ours))
        counts, forms = Counts(), FormDifferences(spec, key)
        text = csv_text(changes)
        try:
            write = csv.writer(text).writerow
            names = (f"{side}_{name}" for side in ("before", "after") for name in columns)
            write(["operation", *names])
            nothing = ("",) * len(columns)
            for operation, before, after in merge(*sides):
                row_before = decode_row(before) if before else nothing
                row_after = decode_row(after) if after else nothing
                if operation == UPDATE and forms.ignored(row_before, row_after):
                    continue
                setattr(counts, operation, counts.of(operation) + 1)
                write([operation, *row_before, *row_after])
        finally:
            text.detach()  # else it would close `changes`, which may be standard output
        counts.forms = forms.sentences(columns)
        counts.rows, counts.database_rows = sides[0].rows, sides[1].rows
    return counts


class FormDifferences:
    """Updates in which no value differs, only how it is written: `1.50` and `1.5`.

    A procedure that is called for them changes nothing, so they come again every night.  Values
    are told as their shape alone: they may be personal.
    """

    LOOKED_AT = 10_000  # as many updates tell enough

    def __init__(self, spec: SqlDiff, key: Key) -> None:
        self.spec, self.key = spec, key
        self.ignore = {"case"} if spec.ignore_case else set()
        self.ignore |= {"number"} if spec.ignore_number_form else set()
        self.updates = self.formal = 0
        self.found: dict[tuple[int, str], tuple[int, str]] = {}  # column, kind -> count, example

    def ignored(self, before: Row, after: Row) -> bool:
        """Whether the row counts as equal; else it is counted as one update."""
        if not self.ignore and self.updates >= self.LOOKED_AT:
            return False
        kinds = {
            index: form_difference(*values)
            for index, values in enumerate(zip(before, after, strict=True))
            if values[0] != values[1]
        }
        if self.ignore.issuperset(kinds.values()):
            return True
        self.updates += 1
        if all(kinds.values()):
            self.formal += 1
            for index, kind in kinds.items():
                count, example = self.found.get((index, kind), (0, ""))
                example = example or self._example(index, kind, before, after)
                self.found[index, kind] = count + 1, example
        return False

    def sentences(self, columns: Row) -> list[str]:
        """What to tell where most updates differ in form alone."""
        if self.formal * 2 <= self.updates:
            return []
        return [
            f"{self.spec.file}: {count:,} of {plural(self.updates, 'update')} differ only in form: "
            f"column {one_line(columns[index])}, {FORMS[kind]}, {example}"
            for (index, kind), (count, example) in self.found.items()
        ]

    def _example(self, index: int, kind: str, before: Row, after: Row) -> str:
        key = show_key(self.key.names, [after[i] for i in self.key.indexes])
        shapes = f"'{shape(before[index])}' in the database, '{shape(after[index])}' from SameGoal"
        return f"as in {key}: {shapes}; {_settled_by(kind, before[index], after[index])}"


FORMS = {
    "blanks": "blanks at the end",
    "case": "letter case",
    "number": "the form of a number",
    "date": "the form of a date",
    "null": "a word for an empty field",
}
DATE_FORMS = (
    "%Y-%m-%d", "%m/%d/%Y", "%m/%d/%y", "%Y%m%d", "%d.%m.%Y", "%m-%d-%Y", "%Y/%m/%d",
    "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%m/%d/%Y %H:%M:%S",
)  # fmt: skip


def form_difference(before: str, after: str) -> str:
    """The kind of FORMS in which two texts for one value differ; '' where the values differ."""
    if before.rstrip() == after.rstrip():
        return "blanks"
    if before.casefold() == after.casefold():
        return "case"
    if {before, after} & {"NULL", "null", "None", "\\N"} and "" in (before, after):
        return "null"
    if _plain_number(before) == _plain_number(after) is not None:
        return "number"
    dates = [_date(text) for text in (before, after)]
    return "date" if dates[0] and dates[1] and dates[0][0] == dates[1][0] else ""


def _plain_number(text: str) -> object:
    """The number that a text is, in a form that compares by value, or None."""
    import decimal

    plain = re.fullmatch(r"\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*", text, re.ASCII) and len(text) < 40
    return decimal.Decimal(text.strip()) if plain else None


def _date(text: str) -> tuple[datetime.datetime, str] | None:
    """A date and the form it is written in."""
    for form in DATE_FORMS if 6 <= len(text) <= 23 and text[:1].isdigit() else ():
        with contextlib.suppress(ValueError):
            return datetime.datetime.strptime(text.removesuffix(".000"), form), form
    return None


def shape(text: str) -> str:
    """A value without what it says: `Ann 12.50` is `Xxx 99.99`."""
    marked = "".join(
        "X" if c.isupper() else "x" if c.isalpha() else "9" if c.isdigit() else c for c in text[:40]
    )
    return one_line(f"[{marked}]")[1:-1]


def _settled_by(kind: str, before: str, after: str) -> str:
    found = _date(after)
    attribute_text = {
        "blanks": 'trim="true"',
        "case": 'ignoreCase="true"',
        "number": 'ignoreNumberForm="true"',
        "null": f'nullText="{before or after}"',
        "date": f'dateFormat="{found[1] if found else ""}"',
    }[kind]
    return f"{attribute_text} on this <SQLDiff> would settle it"


def check_columns(source: CsvFile, database: CsvFile) -> None:
    """Both sides must have the same columns in the same order."""
    for file in (source, database):
        if not file.columns:
            raise DataError(f"{file.shown}: is empty, it has not even a header", "export it again")
    ours, theirs = source.columns, database.columns
    if ours == theirs:
        return
    missing = [name for name in theirs if name not in ours]
    extra = [name for name in ours if name not in theirs]
    if not set(ours) & set(theirs):  # Then the names may be a row of data.
        what = f"has none of {', '.join(map(one_line, theirs))}; perhaps its header is missing"
    elif missing or extra:
        what = "; ".join(
            f"{words} {', '.join(map(one_line, names))}"
            for words, names in (("lacks", missing), ("has besides", extra))
            if names
        )
    else:
        moved = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        what = (
            f"has them in another order: column {moved + 1} is {one_line(ours[moved])}, not "
            f"{one_line(theirs[moved])}"
        )
    raise DataError(
        f"{source.shown}:1: the columns differ from those of {database.shown}: it {what}",
        "let the SELECT give the columns that SameGoal's file has, in its order, or ask SameGoal "
        "whether the form was changed",
    )


def merge(source: SortedRows, database: SortedRows) -> Iterator[Change]:
    """The changes that make `database` equal to `source`, in the order of their keys.

        source     database     change
        1,a        1,a          -
        2,b        2,x          update  2,x  2,b
        3,c                     insert       3,c
                   4,d          delete  4,d

    Stretches of equal rows are equal bytes: they are found by comparing memory and passed over
    without looking at a single row.  So the order of the database's rows needs checking only where
    they differ from the source's, whose order is checked block by block.
    """
    while source.fill() and database.fill():
        same = common_prefix(source.data, source.position, database.data, database.position)
        end = source.data.rfind(b"\n", source.position, source.position + same) + 1
        if end:
            length = end - source.position
            source.skip(end)
            database.skip(database.position + length)
            continue
        ours, theirs = source.peek(), database.peek()
        our_key, their_key = source.key_of(ours), database.key_of(theirs)
        if our_key < their_key:
            source.take(ours)
            yield INSERT, b"", ours
        elif our_key > their_key:
            database.take(theirs)
            yield DELETE, theirs, b""
        else:
            source.take(ours)
            database.take(theirs)
            yield UPDATE, theirs, ours
    while source.fill():
        source.take(ours := source.peek())
        yield INSERT, b"", ours
    while database.fill():
        database.take(theirs := database.peek())
        yield DELETE, theirs, b""


def common_prefix(a: bytes, i: int, b: bytes, j: int) -> int:
    """How many bytes of `a` from `i` on equal those of `b` from `j` on."""
    limit = min(len(a) - i, len(b) - j)
    same, step = 0, 256
    while same < limit:
        left, right = a[i + same : i + same + step], b[j + same : j + same + step]
        if len(left) != len(right):
            left, right = left[: limit - same], right[: limit - same]
        if left == right:
            same += len(left)
            step = min(4 * step, 1 << 16)
        elif step > 256:
            step //= 8
        else:
            difference = int.from_bytes(left, "big") ^ int.from_bytes(right, "big")
            return same + len(left) - (difference.bit_length() + 7) // 8
    return same


def key_columns(spec: SqlDiff, columns: Row) -> Row:
    """The names of the columns that identify a row."""
    return tuple(name.removesuffix(":int") for name in spec.key or columns)


def key_teller(spec: SqlDiff, columns: Row) -> Callable[[Row], str]:
    """A function that gives a row's key for a message."""
    names = key_columns(spec, columns)
    indexes = [columns.index(name) for name in names]
    return lambda row: show_key(names, [row[index] for index in indexes])


def change_columns(changes: Path) -> Row:
    """The columns of the rows in a diff file."""
    with local_errors(changes), changes.open(encoding="utf-8", newline="") as file:
        header = next(csv.reader(file))
    return tuple(name.removeprefix("before_") for name in header[1 : 1 + len(header) // 2])


def read_changes(changes: Path, operation: str) -> Iterator[tuple[Row, Row]]:
    """The rows before and after of each change of `operation` in a diff file."""
    with local_errors(changes), changes.open(encoding="utf-8", newline="") as file:
        records = csv.reader(file)
        end = 1 + len(next(records)) // 2
        for record in records:
            if record[0] == operation:
                yield tuple(record[1:end]), tuple(record[end:])


def changed_rows(changes: Path, operation: str) -> Iterator[Row]:
    """The row that each change of `operation` is about: SameGoal's, of a delete the database's."""
    for before, after in read_changes(changes, operation):
        yield before if operation == DELETE else after


# ---------------------------------------------------------------------- stage: limits


def over_limits(
    found: Sequence[tuple[SqlDiff, Counts]], limits: Limits, folder: Path, approved: Path | None
) -> list[str]:
    """What goes beyond the limits, one sentence a file and operation; [] where nothing does.

    `folder` holds the diff files.  Changes that the diff files of the held run `approved` show do
    not count.  A source without rows is over every limit while the database has rows.
    """
    reasons = []
    for spec, counts in found:
        emptied = not counts.rows and counts.database_rows > 0
        deletes = (DELETE, spec.max_deletes or limits.max_deletes, "maxDeletes")
        if emptied:
            deletes = DELETE, Limit(0, percent=False), "SameGoal's file is empty, so the limit"
        updates = (UPDATE, spec.max_updates or limits.max_updates, "maxUpdates")
        for operation, limit, name in (deletes, updates):
            changes = counts.of(operation)
            if limit.allows(changes, counts.database_rows):
                continue
            path, shown = folder / spec.file, approved / spec.file if approved else None
            left = _unapproved(path, shown, operation)
            if not limit.allows(left, counts.database_rows):
                beyond = f" ({left:,} of them not approved)" if left < changes else ""
                reasons.append(
                    f"{spec.file}: {plural(changes, operation)}{beyond} of "
                    f"{plural(counts.database_rows, 'row')}, {name} is {limit}; "
                    f"they begin with {_first_keys(path, spec, operation)}"
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


def _first_keys(changes: Path, spec: SqlDiff, operation: str) -> str:
    tell = key_teller(spec, change_columns(changes))
    pairs = itertools.islice(read_changes(changes, operation), 3)
    return "; ".join(tell(before) for before, _ in pairs)


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


def check_parameters(spec: SqlDiff, columns: Row) -> None:
    """Raise ConfigError for a `parameters=` that names no column of the file."""
    for operation, call in spec.calls.items():
        for name in call.parameters or ():
            if name not in columns:
                raise ConfigError(
                    f"{spec.where}: <{operation.title()}> of {spec.file}: parameters= "
                    f"names '{name}', which is no column of the file",
                    f"the columns are {', '.join(map(one_line, columns))}",
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

    def __init__(self, database: Database, spec: SqlDiff, operation: str, failures: Failures):
        self.database, self.operation, self.failures = database, operation, failures
        self.spec, self.call = spec, spec.calls[operation]

    def bind(self, columns: Row) -> None:
        """Settle which columns are passed."""
        key = key_columns(self.spec, columns)
        names = self.call.parameters or (key if self.operation == DELETE else columns)
        self._tell, self._key = key_teller(self.spec, columns), [columns.index(n) for n in key]
        self._indexes = [columns.index(name) for name in names]

    def apply(self, rows: Sequence[Row]) -> None:
        """One batch in one transaction; where that fails, each row in one of its own."""
        try:
            retried(lambda: self._batch(rows))
        except DatabaseError as error:
            if len(rows) > 1:
                log.info("%s: a batch of %d was undone, its rows are tried one by one: %s",
                         self.spec.file, len(rows), self._masked(error, rows).message)  # fmt: skip
        else:
            return
        for row in rows:
            self._single(row)

    def _single(self, row: Row) -> None:
        try:
            retried(lambda: self._batch([row]))
        except DatabaseError as error:
            masked = self._masked(error, [row])
            key = self._tell(row)
            if error.transient or is_not_about_the_row(error):
                raise DatabaseError(
                    f"{self.spec.file}: {self.operation} of {key}: {masked.message}",
                    masked.remedy,
                    sqlstate=error.sqlstate,
                ) from None
            name = self.call.procedure or "SQL"
            self.failures.add(self.spec.file, self.operation, key, name, masked)

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
        key = {row[i] for row in rows for i in self._key}
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


def apply(
    database: Database, spec: SqlDiff, changes: Path, counts: Counts, failures: Failures, tick: Tick
) -> None:
    """Call the procedures of a SQLDiff for the rows of its diff file: deletes, updates, inserts.

    The diff file is the evidence, and just what it holds is applied.
    """
    for operation in OPERATIONS:
        if not counts.of(operation):
            continue
        if operation not in spec.calls:
            log.info(
                "%s: %s left alone: there is no <%s>",
                spec.file, plural(counts.of(operation), operation), operation.title(),
            )  # fmt: skip
            continue
        applier = Applier(database, spec, operation, failures)
        applier.bind(change_columns(changes))
        rows = changed_rows(changes, operation)
        for batch in batched(rows, database.settings.batch_size):
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
    attempts = itertools.count()

    def attempt() -> None:
        sftp.connect()
        if not state["made"] and sftp.exists(target):
            raise TransferError(
                f"{sftp.where}: {target}: already exists, perhaps from another installation",
                "run again: each run has its own epoch; start two homes at least a minute apart",
            )
        state["made"] = True
        if not state["sent"]:
            ahead = next(attempts) % 2 == 0  # as in `download`
            _push_files(sftp, target, folder, files, tick, ahead=ahead)
            state["sent"] = True
        # A connection that broke after the marker was asked for leaves open whether it was made.
        taken = state["marked"] and not sftp.exists(target)
        if not taken and not (state["marked"] and sftp.exists(f"{target}/{COMPLETE}")):
            state["marked"] = True
            sftp.mark(f"{target}/{COMPLETE}")

    try:
        retried(attempt)
    except Error as error:
        error.message += (
            "; the database changes are done, only the upload of this run is missing; the next "
            "run continues from there"
        )
        raise
    log.info("pushed %s to %s", plural(len(files), "file"), target)


def _push_files(
    sftp: Sftp, target: str, folder: Path, files: Sequence[Path], tick: Tick, *, ahead: bool
) -> None:
    sftp.make_directory(target)
    names = {path: path.relative_to(folder) for path in files}
    directories = {parent for name in names.values() for parent in name.parents}
    for directory in sorted(directories - {Path()}):
        sftp.make_directory(f"{target}/{directory.as_posix()}")

    def blocks(path: Path) -> Iterator[bytes]:
        with local_errors(path), path.open("rb") as file:
            while block := file.read(WRITE_BYTES):
                tick(len(block))
                yield block

    uploads = ((f"{target}/{name.as_posix()}", blocks(path)) for path, name in names.items())
    sftp.write_files(uploads, ahead=ahead)


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
    login_advice = "check SCHOOLINKS_SFTP_USERNAME and SCHOOLINKS_SFTP_PASSWORD"
    if settings.private_key:
        login_advice = (
            "check SCHOOLINKS_SFTP_USERNAME, and that SchooLinks has the public key of this "
            "private key"
        )
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
        key_advice="give the public key, the file with .pub, to SchooLinks",
        login_advice=login_advice,
        trust=("trust", "--job", "schoolinks"),
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
            found = diff_files(config, run, display)
            if not may_go_on(config, extract, found, run, options, approved):
                return run
            failures = apply_changes(config, database, found, run, display)
            if config.database.verify:
                verify_changes(database, found, failures, run, display)
            with display.stage("statements") as tick:
                made = run_statements(database, config.statements, run.folder, tick)
            run.summary["statement_files"] = made
            conclude_applied(found, run)
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


def diff_files(config: Config, run: Run, display: Display) -> list[tuple[SqlDiff, Counts]]:
    """Compare every file before the first write; one line of the summary each."""
    found = []
    for spec in config.sql_diffs:
        began = time.monotonic()
        source, database = (run.folder / side / spec.file for side in ("ia", "ic"))
        if not source.is_file():
            there = ", ".join(sorted(p.name for p in (run.folder / "ia").iterdir())) or "none"
            raise DataError(
                f"ia/{spec.file}: SameGoal's extract {run.summary['source_epoch']} has no such "
                f"file ({spec.where}); it has: {there}",
                "correct file= of that <SQLDiff>, or ask SameGoal to export the file",
            )
        changes = run.folder / "diff" / spec.file
        with display.stage(f"diff {spec.file}"), new_file(changes) as out:
            counts = diff(source, database, out, spec, may_be_empty=True)
        check_parameters(spec, change_columns(changes))
        log.info("%s: %s, of them %s", spec.file, plural(counts.rows, "row"), counts)
        for difference in counts.forms:
            log.warning("%s", difference)
        run.summary["files"].append(
            {"file": spec.file}
            | dataclasses.asdict(counts)
            | {"failed": 0, "seconds": round(time.monotonic() - began, 3)}
        )
        found.append((spec, counts))
    return found


def may_go_on(
    config: Config,
    extract: Extract,
    found: Sequence[tuple[SqlDiff, Counts]],
    run: Run,
    options: argparse.Namespace,
    approved: HeldRun | None,
) -> bool:
    """Whether the changes are to be written; False ends a dry run.

    Raises HeldError where the limits or the age of the extract forbid it and neither `--force` nor
    `--approve` allows it.
    """
    held_diff = approved.folder / "diff" if approved else None
    reasons = over_limits(found, config.limits, run.folder / "diff", held_diff)
    stale = too_old(extract, config.sftp.max_age_hours)
    if stale:
        run.summary["stale_epoch"] = extract.epoch
        if not approved or approved.stale_epoch != extract.epoch:
            reasons.append(stale)
    for reason in reasons:
        log.warning("%s", reason)
    if options.dry_run:
        would = f"; it would be held: {'; '.join(reasons)}" if reasons else ""
        run.conclude("dry run", 0, sentence(found, "would be ") + would)
        return False
    if not reasons:
        return True
    if options.force:
        log.warning("the limits are skipped (--force)")
        return True
    counts = ", ".join(f"{spec.file}: {counts}" for spec, counts in found)
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
    found: Sequence[tuple[SqlDiff, Counts]],
    run: Run,
    display: Display,
) -> Failures:
    """Apply the changes of every file in the order of the SQLDiff elements."""
    with Failures(run.folder / FAILURES_NAME, config.limits.max_failures) as failures:
        for (spec, counts), line in zip(found, run.summary["files"], strict=True):
            began, before = time.monotonic(), failures.count
            total = sum(counts.of(operation) for operation in spec.calls)
            changes = run.folder / "diff" / spec.file
            if total:  # It lay idle as long as the download and the diff took.
                retried(database.revive)
            with display.stage(f"apply {spec.file}", total) as tick:
                apply(database, spec, changes, counts, failures, tick)
            if total:
                log.info("%s: applied", spec.file)
            run.failed = failures.count
            line["failed"] = failures.count - before
            line["seconds"] = round(line["seconds"] + time.monotonic() - began, 3)
    return failures


def verify_changes(
    database: Database,
    found: Sequence[tuple[SqlDiff, Counts]],
    failures: Failures,
    run: Run,
    display: Display,
) -> None:
    """Export and compare the changed files again; what still differs goes to notconverged.csv.

    Rows that failed are not told again, nor those that no procedure is there for.
    """
    before = _not_converged_before(run)
    left: list[Row] = []
    for spec, counts in found:
        if not any(counts.of(operation) for operation in spec.calls):
            continue
        table, changes = (run.folder / "verify" / kind / spec.file for kind in ("ic", "diff"))
        with display.stage(f"verify {spec.file}") as tick:
            export(database, spec, table, tick)
            with new_file(changes) as out:
                diff(run.folder / "ia" / spec.file, table, out, spec, may_be_empty=True)
        tell = key_teller(spec, change_columns(changes))
        for operation, call in spec.calls.items():
            for key in map(tell, changed_rows(changes, operation)):
                if (spec.file, operation, key) not in failures.rows:
                    runs = before.get((spec.file, operation, key), 0) + 1
                    left.append((spec.file, operation, key, call.procedure or "SQL", str(runs)))
    run.not_converged = len(left)
    if left:
        with csv_writer(run.folder / NOT_CONVERGED_NAME) as write:
            write([("file", "operation", "key", "procedure", "runs")])
            write(left)
    for file, operation, key, procedure, times in left:
        again = f", {times} runs in a row: the procedure has no effect" if int(times) > 2 else ""
        log.error("%s: %s of %s by %s did not converge%s", file, operation, key, procedure, again)


def _not_converged_before(run: Run) -> dict[tuple[str, str, str], int]:
    """file, operation and key -> runs, of the last run that applied its changes."""
    earlier = sorted(p for p in run.history.iterdir() if (p / COMPLETE).is_file())
    path = earlier[-1] / NOT_CONVERGED_NAME if earlier else None
    if not path or not path.is_file():
        return {}
    with local_errors(path), path.open(encoding="utf-8", newline="") as file:
        return {(r["file"], r["operation"], r["key"]): int(r["runs"]) for r in csv.DictReader(file)}


def conclude_applied(found: Sequence[tuple[SqlDiff, Counts]], run: Run) -> None:
    """The outcome of a run that has applied everything, as it is pushed."""
    problems = []
    if run.failed:
        problems.append(f"{plural(run.failed, 'row')} failed, see {FAILURES_NAME}")
    if run.not_converged:
        problems.append(f"{plural(run.not_converged, 'row')} did not converge, see "
                        f"{NOT_CONVERGED_NAME}")  # fmt: skip
    if problems:
        run.conclude("partial", ROWS_FAILED, f"{'; '.join(problems)}; of {sentence(found)}")
    else:
        run.conclude("complete", 0, sentence(found))


def sentence(found: Sequence[tuple[SqlDiff, Counts]], would: str = "") -> str:
    """The outcome in words: `3 rows inserted, 1 row updated, ...`, or that nothing differed."""
    totals, left = dict.fromkeys(OPERATIONS, 0), 0
    for spec, counts in found:
        for operation in OPERATIONS:
            if operation in spec.calls:
                totals[operation] += counts.of(operation)
            else:
                left += counts.of(operation)
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
        counts = diff(*files, changes, spec, [str(path) for path in files])
    log.info("%s, %s: %s", plural(counts.rows, "row"), plural(counts.database_rows, "row"), counts)
    options.summary |= {"outcome": "complete", "exit_code": 0, "message": str(counts)}
    options.summary["files"] = [{"file": spec.file} | dataclasses.asdict(counts)]


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
