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

The file has six parts in one direction: nothing uses what is below its part.  Each section opens
with a banner that names its entry point and tells what it is given, gives and raises.  Inside a
section, callees stand above callers.  Start reading at `Sync` or at `run_schoolinks`.

    BASE           Errors, text, secrets, waiting, files: what everything else uses.
                   Error, redact, retried, new_file
    CONFIGURATION  config.xml as typed objects.
                   Parse, SqlDiff, XmlSource, load_config, load_environment
    FORMATS        The files that runs read, compare and leave behind.
                   to_text, Block, CsvFile, Key, OrderedRows, Comparison,
                   RunSummary, Manifest, Run, KeySearch
    CONNECTIONS    Servers and databases; every operation is bounded in time.
                   HostKeys, SftpRequests, Sftp, DriverMessage, Database,
                   write_query, SqlScript, Catalog, Oracle,
                   schoolinks_credentials
    STAGES         The steps of a run, each given connections and its part of the configuration.
                   download, export, FormatDifferences, diff, over_limits, apply,
                   run_statements, push, StudentFiles, UploadGuard, REPORT,
                   write_report, send_notices, write_metrics
    COMMANDS       One section a command: its arguments and its run; only they connect stages.
                   Options, open_run, sync, schoolinks, diff, trust, procedures,
                   secret, JobChecks, SyncChecks, SchooLinksChecks, check,
                   Schedule, WindowsTask, SystemdTimer, schedule, history,
                   report, main
"""

from __future__ import annotations

import sys

# Python 3.8 and 3.9 can compile this whole file, so they get here; older ones stop at the :=.
if (running := sys.version_info) < (3, 10):  # sgsync needs Python 3.10 or newer
    sys.stderr.write(
        "sgsync needs Python 3.10 or newer; this is Python {}.{}.{} ({})\n"
        "Try: start it with a newer Python, such as python3.12 {}, or install one from "
        "https://www.python.org/downloads/\n".format(*running[:3], sys.executable, __file__)
    )
    sys.exit(2)

import argparse
import bisect
import collections
import contextlib
import csv
import dataclasses
import datetime
import decimal
import difflib
import errno
import functools
import getpass
import glob
import hashlib
import importlib
import io
import itertools
import json
import logging
import math
import operator
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import threading
import time
import typing
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from pathlib import Path
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Literal,
    NamedTuple,
    NoReturn,
    TextIO,
    TypeVar,
    cast,
)

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
ENVIRONMENT_NAME = "sgsync.env"
REPORT_NAME = "report.html"
MANIFEST_NAME = "manifest.json"
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

STORE_SERVICE = "sgsync"  # under which the system's password store keeps the secrets

SCRIPT = Path(__file__).resolve()
FROZEN = bool(getattr(sys, "frozen", False))
PROGRAM = (sys.executable,) if FROZEN else (sys.executable, str(SCRIPT))  # starts sgsync

log = logging.getLogger("sgsync")

Row = tuple[str, ...]
Tick = Callable[[int], None]  # Tells the display how much more is done.
T = TypeVar("T")


# ==================================== BASE
# Errors, text, secrets, waiting, files: what everything else uses.


# ------------------------------------ errors: Error
# Given: what failed, where and why.
# Gives: an exception with its exit code, outcome and remedy.
# Raises: nothing.


class Error(Exception):
    """A failure that a person can act on.

    `message` says what failed, where and why; `remedy` follows `Try:`.  A `transient` failure may
    pass by itself, so the same work is tried again.
    """

    exit_code = 1
    outcome = "failed"  # as summary.json has it

    def __init__(self, message: str, remedy: str = "", *, transient: bool = False) -> None:
        super().__init__(message)
        self.message, self.remedy, self.transient = message, remedy, transient

    def __str__(self) -> str:
        return f"{self.message}\nTry: {self.remedy}" if self.remedy else self.message

    @staticmethod
    def of(exception: BaseException) -> Error:
        """Any exception as an Error."""
        if isinstance(exception, Error):
            return exception
        if isinstance(exception, KeyboardInterrupt):
            return InterruptError("nothing was done")
        if isinstance(exception, ImportError):
            return ConfigError(
                f"this Python, {sys.executable}, cannot load a package: {one_line(exception)}",
                f"use the Python in .venv beside {SCRIPT.name}, or install the packages:\n"
                f"{packages_remedy()}",
            )
        return Error(
            f"unexpected error: {type(exception).__name__}: {one_line(exception)}",
            f"send {LOG_NAME} from this run's folder to whoever maintains sgsync",
        )


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
    outcome = "held"


class BusyError(Error):
    """Another run is active in the same home."""

    exit_code = 7
    outcome = "busy"


class InterruptError(Error):
    """Ctrl-C, or a request to end."""

    exit_code = 130
    outcome = "interrupted"


class CancelledError(Error):
    """The work that this belonged to has failed elsewhere; never shown."""


ROWS_FAILED = 8  # the exit code of a run that finished, but not for every row


# ------------------------------------ text and secrets: redact
# Given: text from files, servers, drivers and the configuration.
# Gives: text that can be shown: printable, on one line, without secrets.
# Raises: nothing.


def printable(text: str) -> str:
    """Every character that is not seen, or steers how others are seen, as an escape."""

    def shown(character: str) -> str:
        if character.isprintable():
            return character
        code = ord(character)
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return text if text.isprintable() else "".join(map(shown, text))


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


def command_line(words: Sequence[str]) -> str:
    """A command as it can be typed on this machine."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def own_command(*words: str) -> str:
    """A command of sgsync as a person can type it; as whom, where that matters.

    The job's account may have no shell, so on POSIX it is used through sudo.
    """
    account = ["sudo", "-u", getpass.getuser()] if os.name == "posix" and os.geteuid() else []
    return command_line([*account, *PROGRAM, *words])


def packages_remedy() -> str:
    """The command that installs the packages for this Python, whichever else there are."""
    requirements = str(SCRIPT.with_name("requirements.txt"))
    return command_line([sys.executable, "-m", "pip", "install", "-r", requirements])


_SECRETS: set[str] = set()


def keep_secret(values: Iterable[str]) -> None:
    """Let nothing that is logged or reported from now on contain these values.

    Texts of one or two characters are part of every text: to replace them would hide everything.
    """
    for value in values:
        forms = {value, repr(value)[1:-1], json.dumps(value)[1:-1], one_line(value)}
        forms.add(" ".join(value.split()))  # as a message has it on one line
        _SECRETS.update(form for form in forms if len(form) > 2)


def redact(text: str) -> str:
    """`text` with every secret replaced by `***`."""
    for secret in sorted(_SECRETS, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


class LogFormatter(logging.Formatter):
    """Each line of a message in printable characters, without secrets; further lines indented.

    Times have milliseconds and the zone's offset: the hour when clocks change has two 01:30.
    """

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002, N802
        return local_time(record.created).isoformat(" ", "milliseconds")

    def format(self, record: logging.LogRecord) -> str:
        lines = redact(super().format(record)).split("\n")
        return "\n    ".join(map(printable, lines))


class JsonFormatter(LogFormatter):
    """One JSON object a line, for a collector of logs; `run` is the epoch, where there is one."""

    run = ""

    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).split("\n    ")
        told = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "run": JsonFormatter.run,
            "message": "\n".join(lines),
        }
        return json.dumps(told)


def local_time(seconds: float) -> datetime.datetime:
    """A time by this machine's clock, with the zone's offset."""
    return datetime.datetime.fromtimestamp(seconds).astimezone()


def default_home() -> Path:
    """The folder of the script or of the frozen executable, never the working directory."""
    return Path(sys.executable).resolve().parent if FROZEN else SCRIPT.parent


# ------------------------------------ waiting: retried
# Given: work that may block or fail for a while.
# Gives: its result, after another try where that may help, within a time.
# Raises: what the work raises; CancelledError.


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


class Worker(threading.Thread):
    """Does blocking work, one piece after the other, so that whoever waits for it can give up."""

    def __init__(self, name: str) -> None:
        super().__init__(daemon=True, name=name)
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]
        self._jobs = queue.SimpleQueue()
        self.start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put((work, future))
        return future

    def end(self) -> None:
        """End the thread when all that was submitted is done."""
        self._jobs.put(None)

    def run(self) -> None:
        while job := self._jobs.get():
            work, future = job
            try:
                future.set_result(work())
            except BaseException as error:  # handed to whoever waits
                future.set_exception(error)
            del job, work, future  # or what they hold would live until the next job


def finished(
    futures: Iterable[Future[Any]],
    seconds: float = math.inf,
    cancelled: threading.Event | None = None,
) -> bool:
    """Wait until all are done or one has failed; False if that takes more than `seconds`.

    Raises CancelledError once `cancelled` is set.  Waits in short steps, because on Windows
    Ctrl-C does not end a longer wait.
    """
    futures, end = list(futures), time.monotonic() + seconds
    while True:
        step = max(0.0, min(0.2, end - time.monotonic()))
        done, waiting = wait(futures, step, FIRST_EXCEPTION)
        if not waiting or any(future.exception() for future in done):
            return True
        if cancelled and cancelled.is_set():
            raise CancelledError("cancelled")
        if time.monotonic() >= end:
            return False


def together(first: Callable[[], T], second: Callable[[], object], cancel: Callable[[], None]) -> T:
    """Do both at the same time; if one fails, `cancel` makes the other one stop.

    Returns what `first` returns, when both have ended.  Raises what failed first.
    """
    futures: list[Future[Any]] = []
    for work in (first, second):
        worker = Worker("together")
        futures.append(worker.submit(work))
        worker.end()
    try:
        finished(futures)
        failed = [future for future in futures if future.done() and future.exception()]
        if failed:
            cancel()
    except BaseException:
        cancel()
        raise
    finally:
        for future in futures:
            finished([future])
    return cast("T", (failed or futures)[0].result())


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


# ------------------------------------ local files: new_file
# Given: paths on this machine.
# Gives: files that appear under their names only when they are whole.
# Raises: Error that names the file.


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


# ==================================== CONFIGURATION
# config.xml as typed objects.


# ------------------------------------ values of attributes: Parse

# Given: the text of an attribute.
# Gives: its value, and `attribute`, with which the elements say what attributes they have.
# Raises: ValueError with the reason.

REQUIRED = object()  # The default of an attribute that has none.
Problem = tuple[str, str, str]  # The attribute that is wrong or '', the reason, the remedy.


@dataclasses.dataclass(frozen=True)
class Limit:
    """`N` rows, or `N%` of the database's rows."""

    number: float
    percent: bool

    def allows(self, changes: int, database_rows: int) -> bool:
        return changes <= (self.number * database_rows / 100 if self.percent else self.number)

    def __str__(self) -> str:
        return f"{self.number:g}{'%' if self.percent else ''}"


class Parse:
    """What the text of an attribute means, one function for each kind of value.

    Each raises ValueError with a reason that completes a sentence about the text: `'x'` +
    `is not a whole number from 1 to 9`.
    """

    @staticmethod
    def anything(value: str) -> str:
        return value

    @staticmethod
    def text(value: str) -> str:
        if not value.strip():
            raise ValueError("is empty")
        return value

    @staticmethod
    def optional(parse: Callable[[str], object], empty: object = None) -> Callable[[str], object]:
        """As `parse`; an empty text gives `empty`."""
        return lambda value: parse(value) if value else empty

    @staticmethod
    def matching(pattern: str, reason: str) -> Callable[[str], str]:
        def parse(value: str) -> str:
            if not re.fullmatch(pattern, value):
                raise ValueError(reason)
            return value

        return parse

    @staticmethod
    def choice(*words: str) -> Callable[[str], str]:
        return Parse.matching("|".join(words), f"is not one of {', '.join(words)}")

    _NAME = r"[A-Za-z][A-Za-z0-9_$#]{0,127}"
    IDENTIFIER = r'(?:[A-Za-z_][\w$#@]*|\[[^\[\]]+\]|"[^"]+")'
    column = matching(_NAME, "is not a valid column name")
    table = matching(rf"(?:{_NAME}\.)?{_NAME}", "is not a valid table name")
    procedure = matching(
        rf"{IDENTIFIER}(?:\.{IDENTIFIER}){{0,3}}",
        "is not a valid procedure name such as dbo.sg_iep_upsert",
    )
    web_address = matching(r"(?i:https?)://[^\s/?#]\S*", "is not an http:// or https:// address")
    address = matching(
        r"[A-Za-z][A-Za-z0-9+.-]*://.*\S.*", "is not an address that starts with mailto://, "
        "https:// or such",
    )  # fmt: skip

    @staticmethod
    def integer(low: int, high: int) -> Callable[[str], int]:
        def parse(value: str) -> int:
            if not re.fullmatch(r"[0-9]{1,10}", value) or not low <= int(value) <= high:
                raise ValueError(f"is not a whole number from {low} to {high}")
            return int(value)

        return parse

    @staticmethod
    def factor(value: str) -> float:
        if not re.fullmatch(r"[0-9]{1,4}(?:\.[0-9]{1,6})?", value) or not 1 <= float(value) <= 1000:
            raise ValueError("is not a factor from 1 to 1000 such as 5 or 2.5")
        return float(value)

    @staticmethod
    def boolean(value: str) -> bool:
        if value not in ("true", "false"):
            raise ValueError("is neither true nor false")
        return value == "true"

    @staticmethod
    def limit(value: str) -> Limit:
        match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(%?)", value)
        if not match or (not match[2] and "." in match[1]) or (match[2] and float(match[1]) > 100):
            raise ValueError("is neither a number of rows (25) nor a percentage from 0% to 100%")
        return Limit(float(match[1]), bool(match[2]))

    @staticmethod
    def remote_directory(value: str) -> str:
        if not value.startswith("/") or ".." in value.split("/"):
            raise ValueError("is not an absolute path on the server, such as /upload")
        return value.rstrip("/") or "/"

    @staticmethod
    def csv_name(value: str) -> str:
        problem = unsafe_name(value)
        if problem or not value.lower().endswith(".csv"):
            raise ValueError(f"is not a plain file name that ends in .csv ({problem or 'no .csv'})")
        return value

    @staticmethod
    def names(value: str) -> Row:
        names = tuple(name.strip() for name in value.split(","))
        if not all(names):
            raise ValueError("has an empty name between its commas" if "," in value else "is empty")
        return names

    @staticmethod
    def columns(value: str) -> Row:
        """Names, no two of them the same."""
        names = Parse.names(value)
        counts = collections.Counter(names)
        if repeated := next((name for name, count in counts.items() if count > 1), None):
            raise ValueError(f"names the column '{shortened(repeated)}' twice")
        return names

    @staticmethod
    def key(value: str) -> Row:
        """The columns of a key, each perhaps with `:int` behind it."""
        names = Parse.names(value)
        plain = [name.removesuffix(":int") for name in names]
        if not all(plain):
            raise ValueError("has ':int' without a column name")
        Parse.columns(",".join(plain))
        return names

    @staticmethod
    def tolerance(value: str) -> tuple[tuple[str, decimal.Decimal], ...]:
        amount = r"(.*\S)\s*:\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)"
        found = [re.fullmatch(amount, pair) for pair in Parse.names(value)]
        pairs = tuple((match[1], decimal.Decimal(match[2])) for match in found if match)
        if len(pairs) < len(found) or not all(number for _, number in pairs):
            raise ValueError("is not a list of columns and amounts such as gpa:0.005,hours:0.1")
        Parse.columns(",".join(name for name, _ in pairs))
        return pairs

    @staticmethod
    def grades(value: str) -> tuple[int, ...]:
        grades = Parse.names(value)
        if not all(re.fullmatch(r"-?[0-9]{1,2}", grade) for grade in grades):
            raise ValueError("is not a list of grades such as 8,9,10,11,12")
        return tuple(int(grade) for grade in grades)

    @staticmethod
    def month_day(value: str) -> tuple[int, int]:
        with contextlib.suppress(ValueError):  # 2001: the day must exist in every year
            if re.fullmatch(r"[0-9]{2}-[0-9]{2}", value):
                day = datetime.date.fromisoformat(f"2001-{value}")
                return day.month, day.day
        raise ValueError("is not a month and a day such as 07-01")

    @staticmethod
    def day(value: str) -> str:
        """A date, or a day of every year, as it is written: texts sort like the days."""
        with contextlib.suppress(ValueError):
            if re.fullmatch(r"(?:[0-9]{4}-)?[0-9]{2}-[0-9]{2}", value):
                datetime.date.fromisoformat(value if len(value) == 10 else f"2000-{value}")
                return value
        raise ValueError("is not a date such as 2027-07-20, or 07-20 for every year")

    @staticmethod
    def date_format(value: str) -> str:
        with contextlib.suppress(ValueError):  # Windows refuses what it does not know
            if re.search(r"%[dj]", value) and datetime.date(2001, 2, 3).strftime(value):
                return value
        raise ValueError("is not a date format such as %m/%d/%Y")


def unsafe_name(name: str) -> str:
    """Why `name` cannot be the name of a file on Windows and Linux alike, or ''.

    Source: Microsoft, "Naming Files, Paths, and Namespaces".
    """
    if not name or len(name.encode("utf-8", "replace")) > 200:
        return "empty or longer than 200 bytes"
    if name in (".", "..") or re.search(r'[/\\:*?"<>|]', name):
        return 'contains a path or one of \\ / : * ? " < > |'
    if not name.isprintable():
        return "contains an unprintable character"
    if name != name.strip() or name.endswith("."):
        return "starts or ends with a space, or ends with a period"
    if re.fullmatch(r"(?i)(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", name):
        return "is a device name on Windows"
    return ""


def attribute(
    parse: Callable[[str], object],
    default: object = REQUIRED,
    *,
    secret: bool = False,
    connection_string: bool = False,
) -> Any:
    """A field of an `Element` that is read from the attribute of the same name.

    `default` is written as in config.xml, or None where absence has a meaning of its own.  The
    value of a `secret` attribute, and the passwords in a `connection_string`, are never shown.
    """
    about = {"parse": parse, "default": default, "secret": secret}
    about["connection_string"] = connection_string
    made: dict[str, Any] = {"metadata": about, "repr": not (secret or connection_string)}
    if default is not REQUIRED:
        made["default"] = None if default is None else parse(str(default))
    return dataclasses.field(**made)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Element:
    """What an element of config.xml says; a field that is not given has the default."""

    @classmethod
    def attributes(cls) -> dict[str, dataclasses.Field[Any]]:
        """The attributes as config.xml spells them."""
        return {
            re.sub("_(.)", lambda match: match[1].upper(), field.name.rstrip("_")): field
            for field in dataclasses.fields(cls)
            if "parse" in field.metadata
        }

    def problems(self) -> Iterator[Problem]:
        """What is wrong although each attribute is right by itself."""
        yield from ()


# ------------------------------------ elements: SqlDiff

# Given: the values of attributes.
# Gives: a dataclass for each element of config.xml that has attributes.
# Raises: nothing; `problems` tells what does not fit together.


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftpSettings(Element):
    """<SFTP>; paths are relative to the home folder."""

    host: str = attribute(Parse.text)
    port: int = attribute(Parse.integer(1, 65535), "22")
    username: str = attribute(Parse.text)
    private_key: str = attribute(Parse.text, "ssh/id_rsa")
    passphrase: str = attribute(Parse.anything, "", secret=True)
    known_hosts: str = attribute(Parse.text, "ssh/known_hosts")
    download_directory: str = attribute(Parse.remote_directory, "/download")
    upload_directory: str = attribute(Parse.remote_directory, "/upload")
    require_complete: bool = attribute(Parse.boolean, "true")
    max_age_hours: int = attribute(Parse.integer(0, 100_000), "36")
    timeout_seconds: int = attribute(Parse.integer(1, 3600), "60")
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

    @property
    def place(self) -> str:
        return f" ({self.where})" if self.where else ""

    @property
    def correct_directory(self) -> str:
        return f"correct the directory in {self.element}{self.place}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatabaseSettings(Element):
    """<Database>."""

    connection_string: str = attribute(Parse.text, connection_string=True)
    batch_size: int = attribute(Parse.integer(1, 10_000), "500")
    query_timeout_seconds: int = attribute(Parse.integer(1, 86_400), "3600")
    verify: bool = attribute(Parse.boolean, "false")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits(Element):
    """<Limits>: what one run may change in each file.

    A first load inserts every row, so a percentage in `max_inserts`, here or on an <SQLDiff>,
    applies only where the database has at least `min_rows` rows; a number of rows always applies.
    """

    max_deletes: Limit = attribute(Parse.limit, "10%")
    max_updates: Limit = attribute(Parse.limit, "50%")
    max_inserts: Limit | None = attribute(Parse.limit, None)
    min_rows: int = attribute(Parse.integer(0, 1_000_000_000), "200")
    usual: float | None = attribute(Parse.factor, None)  # How many times the usual changes.
    max_failures: int = attribute(Parse.integer(0, 1_000_000), "25")


@dataclasses.dataclass(frozen=True, kw_only=True)
class History(Element):
    """<History>."""

    keep_runs: int = attribute(Parse.integer(1, 100_000), "365")
    report_keys: bool = attribute(Parse.boolean, "true")  # Whether report.html shows keys of rows.
    metrics: str | None = attribute(Parse.text, None)  # A file, relative to the home folder.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pause(Element):
    """<Pause>: the days, the first and the last included, on which nothing runs.

    Either two dates (2027-07-20) or two days of every year (07-20), then also across New Year.
    """

    from_: str = attribute(Parse.day)
    to: str = attribute(Parse.day)
    why: str = attribute(Parse.anything, "")

    def covers(self, day: datetime.date) -> bool:
        text = f"{day:%Y-%m-%d}"[-len(self.to) :]
        if self.from_ <= self.to:
            return self.from_ <= text <= self.to
        return text >= self.from_ or text <= self.to

    def problems(self) -> Iterator[Problem]:
        if len(self.from_) != len(self.to):
            remedy = "write both as 2027-07-20, or both as 07-20 for every year"
            yield "to", f"'{self.to}' does not match from=\"{self.from_}\"", remedy
        elif len(self.to) == 10 and self.to < self.from_:
            yield "to", f"'{self.to}' is before from=\"{self.from_}\"", "correct the value"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notice(Element):
    """<Notify>: whom to tell of which outcomes."""

    on: str = attribute(Parse.choice("failure", "held", "always"), "failure")
    ping: str | None = attribute(Parse.web_address, None, secret=True)  # A dead man's switch.
    url: str | None = attribute(Parse.address, None, secret=True)  # Where to send the message.

    def problems(self) -> Iterator[Problem]:
        if not (self.ping or self.url):
            yield "", "has neither ping nor url", 'add ping="https://..." or url="..."'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call(Element):
    """<Insert>, <Update> or <Delete>: a procedure, or one SQL statement with `?` marks."""

    procedure: str | None = attribute(Parse.procedure, None)
    parameters: Row | None = attribute(Parse.names, None)
    statement: str = ""

    def problems(self) -> Iterator[Problem]:
        if bool(self.procedure) == bool(self.statement):
            yield (
                "",
                "needs a procedure or one SQL statement, but not both",
                'write procedure="dbo.name", or parameters="a,b" and SQL with a ? for each',
            )
        elif self.statement:
            pattern = r"'(?:[^']|'')*'|\"[^\"]*\"|\[[^\]]*\]|--[^\n]*|/\*.*?\*/|(\?)"
            marks = sum(1 for found in re.finditer(pattern, self.statement, re.S) if found[1])
            names = len(self.parameters or ())
            if marks != names:
                yield (
                    "parameters",
                    f"names {plural(names, 'column')} for {plural(marks, '? mark')}",
                    'name one column for each ?, in order: parameters="a,b"',
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SqlDiff(Element):
    """<SQLDiff>: one file of SameGoal and the query that gives the same rows."""

    file: str = attribute(Parse.csv_name)
    key: Row | None = attribute(Parse.key, None)
    sort: bool = attribute(Parse.boolean, "false")
    trim: bool = attribute(Parse.boolean, "false")
    null_text: str | None = attribute(Parse.text, None)
    date_format: str | None = attribute(Parse.date_format, None)
    ignore_case: bool = attribute(Parse.boolean, "false")
    ignore_number_format: bool = attribute(Parse.boolean, "false")
    ignore_line_breaks: bool = attribute(Parse.boolean, "false")
    ignore_columns: Row = attribute(Parse.optional(Parse.columns, ()), "")
    # How far two numbers in a column may be apart and count as equal.
    tolerance: tuple[tuple[str, decimal.Decimal], ...] = attribute(
        Parse.optional(Parse.tolerance, ()), ""
    )
    # What a column means that only SameGoal's file has.
    new_columns: str = attribute(Parse.choice("error", "report"), "error")
    max_deletes: Limit | None = attribute(Parse.limit, None)  # None: as <Limits> says
    max_updates: Limit | None = attribute(Parse.limit, None)
    max_inserts: Limit | None = attribute(Parse.limit, None)
    query: str = ""
    calls: dict[str, Call] = dataclasses.field(default_factory=dict)  # operation -> Call
    where: str = ""  # file and line

    def problems(self) -> Iterator[Problem]:
        key = {name.removesuffix(":int") for name in self.key or ()}
        with_tolerance = [column for column, _ in self.tolerance]
        for name, columns in ("ignoreColumns", self.ignore_columns), ("tolerance", with_tolerance):
            if found := next((column for column in columns if column in key), None):
                reason = f"names the key column '{shortened(found)}'"
                yield name, reason, "remove that column here or from key="


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statement(Element):
    """<SQL> in <Upload>: run for its effect, or for the rows of `file`."""

    file: str | None = attribute(Parse.csv_name, None)
    max_shrink: Limit | None = attribute(Parse.limit, None)  # Rows fewer than in the last run.
    sql: str = ""
    where: str = ""  # file and line

    def problems(self) -> Iterator[Problem]:
        if self.max_shrink and not self.file:
            yield "maxShrink", "has no effect without file=", "add file=, or delete maxShrink="


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttendanceSettings(Element):
    """<Attendance> in <SchooLinks>."""

    enabled: bool = attribute(Parse.boolean, "true")
    file: str = attribute(Parse.csv_name, "attendance_percentage.csv")
    view: str = attribute(Parse.table, "ps_adaadm_daily_ctod")
    scale: str = attribute(Parse.choice("fraction", "percent"), "fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpaSettings(Element):
    """<GPA> in <SchooLinks>; a column that is '' stays blank in the file."""

    enabled: bool = attribute(Parse.boolean, "true")
    file: str = attribute(Parse.csv_name, "gpa.csv")
    table: str = attribute(Parse.table, "u_def_ext_students0")
    unweighted: str = attribute(Parse.optional(Parse.column, ""), "simple_gpa")
    weighted: str = attribute(Parse.optional(Parse.column, ""), "weighted_gpa")

    def problems(self) -> Iterator[Problem]:
        if self.enabled and not (self.unweighted or self.weighted):
            yield "", "names no column", "set unweighted= or weighted="


@dataclasses.dataclass(frozen=True, kw_only=True)
class TagSettings(Element):
    """<Tag>: students whose `column` equals `equals` get a row."""

    name: str = attribute(Parse.text)
    detailed_name: str = attribute(Parse.text)
    description: str = attribute(Parse.text)
    table: str = attribute(Parse.table)
    column: str = attribute(Parse.column)
    equals: str = attribute(Parse.text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TagsSettings(Element):
    """<Tags> in <SchooLinks>."""

    enabled: bool = attribute(Parse.boolean, "true")
    file: str = attribute(Parse.csv_name, "student_tags.csv")
    tags: tuple[TagSettings, ...] = ()

    def problems(self) -> Iterator[Problem]:
        if self.enabled and not self.tags:
            yield "", "has no <Tag>", 'add one, or set enabled="false"'


# SchooLinks' identifiers -> the columns of PowerSchool's table students that hold them
IDENTIFIER_COLUMNS = {
    "student_number": "student_number",
    "student_sis_id": "id",
    "student_state_id": "state_studentnumber",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchooLinksSettings(Element):
    """<SchooLinks>; a section that is not there is disabled."""

    # How SchooLinks tells students apart, and the column of the table students that says it.
    identifier: str = attribute(Parse.choice(*IDENTIFIER_COLUMNS), "student_number")
    identifier_column: str = attribute(Parse.optional(Parse.column, ""), "")
    directory: str = attribute(Parse.remote_directory, "/automated")
    test_directory: str = attribute(Parse.remote_directory, "/other")
    ignored_school: int | None = attribute(Parse.optional(Parse.integer(0, 999_999_999)), "901")
    grades: tuple[int, ...] = attribute(Parse.grades, "8,9,10,11,12")
    school_year_start: tuple[int, int] = attribute(Parse.month_day, "07-01")
    max_shrink: Limit = attribute(Parse.limit, "10%")
    max_change: Limit = attribute(Parse.limit, "50%")  # Rows that differ from the last upload.
    quoting: str = attribute(Parse.choice("all", "minimal"), "all")
    private_key: str = attribute(Parse.anything, "")
    passphrase: str = attribute(Parse.anything, "", secret=True)
    thick_mode: bool = attribute(Parse.boolean, "false")
    client_directory: str | None = attribute(Parse.text, None)
    query_timeout_seconds: int = attribute(Parse.integer(1, 86_400), "600")
    timeout_seconds: int = attribute(Parse.integer(1, 3600), "60")
    attendance: AttendanceSettings = AttendanceSettings(enabled=False)
    gpa: GpaSettings = GpaSettings(enabled=False)
    tags: TagsSettings = TagsSettings(enabled=False)

    def __post_init__(self) -> None:
        column = self.identifier_column or IDENTIFIER_COLUMNS[self.identifier]
        object.__setattr__(self, "identifier_column", column)

    def problems(self) -> Iterator[Problem]:
        if not (self.attendance.enabled or self.gpa.enabled or self.tags.enabled):
            yield "", "has no enabled section", "add or enable <Attendance>, <GPA> or <Tags>"


# ------------------------------------ source and placeholders: XmlSource

# Given: the path of config.xml, and values with placeholders in them.
# Gives: the elements and their lines; the values with the placeholders replaced.
# Raises: ConfigError.


class XmlSource:
    """config.xml as text and as elements, and the lines of elements, attributes and text.

    lxml knows only the line on which a start tag ends, so the text is searched backwards from
    there.  Raises ConfigError where the file cannot be read or is not a <Config> in XML.
    """

    # What may precede a DOCTYPE: white space, byte order marks, declarations, comments.
    DOCTYPE = re.compile(
        rb"(?:[\s\xef\xbb\xbf\xfe\xff]|<\?(?:(?!\?>).)*\?>|<!--(?:(?!-->).)*-->)*<!DOCTYPE", re.S
    )
    ATTRIBUTE = re.compile(r"""\s([^\s=<>"'/]+)\s*=\s*(?:"[^"]*"|'[^']*')""")

    def __init__(self, path: Path) -> None:
        self.path = path
        raw = self._raw()
        doctype = self.DOCTYPE.match(raw.replace(b"\0", b""))  # without them UTF-16 reads as ASCII
        if doctype:
            line = doctype[0].count(b"\n") + 1
            raise ConfigError(
                f"{path.name}:{line}: contains a DOCTYPE, which is not allowed (it could read "
                "other files)",
                "delete the <!DOCTYPE ...>",
            )
        self.root = self._parse(raw)
        encoding = self.root.getroottree().docinfo.encoding or "UTF-8"
        try:
            self.text = raw.decode(encoding, "replace") + "\n"
        except LookupError:  # known to libxml2 alone
            self.text = raw.decode("latin-1") + "\n"
        self.line_ends = [match.start() for match in re.finditer("\n", self.text)]
        if self.root.tag != "Config":
            raise ConfigError(
                f"{self.where(self.root)}: the root element is "
                f"<{shortened(one_line(self.root.tag))}>, not <Config>",
                "start from the config.xml that came with sgsync",
            )

    def where(self, element: etree._Element) -> str:
        """`config.xml:12`."""
        return f"{self.path.name}:{self.line_of(element)}"

    def line_of(self, element: etree._Element, name: str = "") -> int:
        """The line of an attribute, or of its start tag."""
        end = self._end_of_tag(element)
        begin = self.text.rfind(f"<{element.tag}", 0, end)
        if begin < 0:  # such as {namespace}Tag
            return self._line_at(end)
        for match in self.ATTRIBUTE.finditer(self.text, begin, end) if name else ():
            if match[1] == name:
                begin = match.start(1)
                break
        return self._line_at(begin)

    def line_of_text(self, before: etree._Element, word: str) -> int:
        """The line of text that begins with `word` behind a tag of `before`."""
        begin = self.text.rfind("\n", 0, self._end_of_tag(before)) + 1
        found = re.compile(rf">\s*(?={re.escape(word)})").search(self.text, begin)
        return self._line_at(found.end() if found else begin)

    def _raw(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                raw = file.read(CONFIG_BYTES + 1)
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be read: {error.strerror}",
                "name the folder that holds config.xml with --home, or the file with --config",
            ) from None
        if len(raw) > CONFIG_BYTES:
            raise ConfigError(
                f"{self.path}: is larger than {CONFIG_BYTES:,} bytes, too large for a "
                "configuration file",
                "name the right file with --config",
            )
        return raw

    def _parse(self, raw: bytes) -> etree._Element:
        from lxml import etree

        parser = etree.XMLParser(
            resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False
        )
        try:
            return etree.fromstring(raw, parser)
        except etree.XMLSyntaxError as error:
            # What it names may be the part of a password after its & or its quote.
            reason = re.sub(
                r"Entity '.*?' not defined", "a & that does not start an entity", error.msg
            )
            reason = re.sub(
                r"((?:for|^)\s*attribute|QName|prefix) .*?(?=, line| redefined| is not defined|$)",
                r"\1 ...", reason, flags=re.I,
            )  # fmt: skip
            reason = re.sub(r", line \d+, column (\d+)$", r" (column \1)", reason)
            raise ConfigError(
                f"{self.path.name}:{error.lineno or 1}: not well-formed XML: {one_line(reason)}",
                "check that line and the one above it for a missing quote, bracket or end tag; "
                "write & as &amp; and < as &lt; in attributes, and SQL inside <![CDATA[ ... ]]>",
            ) from None

    def _end_of_tag(self, element: etree._Element) -> int:
        """The offset of the end of the line on which a start tag ends."""
        line = cast("int", element.sourceline or 1)
        return self.line_ends[min(line, len(self.line_ends)) - 1]

    def _line_at(self, offset: int) -> int:
        return bisect.bisect_left(self.line_ends, offset) + 1


class Placeholders:
    """`${env:NAME}`, `${keyring:NAME}` and `${file:PATH}` in the values of attributes.

    `secrets` and `files` collect what must not be shown and the files that were read.
    """

    PATTERN = re.compile(r"\$\{(?:(env|keyring|file):([^${}]+)\})?")
    PASSWORD = re.compile(r"(?i)(?:^|;)\s*(?:pwd|password)\s*=\s*(\{(?:[^}]|\}\})*\}|[^;]*)")
    FILE_BYTES = 65_536  # A file with a secret may not be larger.

    def __init__(self, home: Path) -> None:
        self.home = home
        self.secrets: set[str] = set()
        self.files: list[Path] = []

    def expand(self, raw: str, *, connection_string: bool) -> tuple[str, list[ConfigError]]:
        """The value with every placeholder replaced, and what is wrong with some of them."""
        errors: list[ConfigError] = []

        def value(match: re.Match[str]) -> str:
            try:
                found = self._value(match)
            except ConfigError as error:
                errors.append(error)
                return ""
            return self._quoted(found, raw[: match.start()]) if connection_string else found

        return self.PATTERN.sub(value, raw), errors

    @classmethod
    def passwords(cls, connection_string: str) -> Iterator[str]:
        """The passwords in an ODBC connection string, as written and as meant."""
        for match in cls.PASSWORD.finditer(connection_string):
            yield match[1]
            if match[1].startswith("{"):
                yield match[1][1:-1].replace("}}", "}")

    def _value(self, match: re.Match[str]) -> str:
        source, name = match[1], match[2]
        if not name:
            # What is not an attempt at a name may be part of a password.
            named = re.match(r"\$\{(?:\w+:\w*\}?|\w+\})", match.string[match.start() :])
            raise ConfigError(
                f"'{named[0]}' is not a valid placeholder"
                if named
                else "contains an invalid ${...} placeholder",
                "write ${env:NAME}, ${keyring:NAME} or ${file:PATH}",
            )
        if source == "env":
            found = self._variable(name)
        else:
            found = self._entry(name) if source == "keyring" else self._first_line(name)
        if source != "env" or re.search(r"(?i)pass|pwd|secret|token", name):
            self.secrets.add(found)
        return found

    def _variable(self, name: str) -> str:
        found, shown = os.environ.get(name), shortened(name)
        if not found:
            raise ConfigError(
                f"the environment variable {shown} is {'not set' if found is None else 'empty'}",
                "set it for the account that runs sgsync, then start sgsync again",
            )
        return found

    def _entry(self, name: str) -> str:
        """An entry of the system's password store."""
        entry = f"the keyring entry {shortened(name)}"
        other = "use ${env:NAME} or ${file:PATH} instead"
        try:
            import keyring
            import keyring.errors
        except ImportError:
            raise ConfigError(
                f"{entry} cannot be read: the keyring package is not installed",
                f"pip install keyring, or {other}",
            ) from None
        try:
            found = keyring.get_password(STORE_SERVICE, name)
        except keyring.errors.KeyringError as error:
            raise ConfigError(
                f"{entry} cannot be read: {one_line(error)}",
                f"make the system's password store available to this account, or {other}",
            ) from None
        if not found:
            raise ConfigError(
                f"{entry} is {'not set' if found is None else 'empty'}",
                f"store it: {command_line([*PROGRAM, 'secret', 'set', name])}",
            )
        return found

    def _first_line(self, name: str) -> str:
        """The first line of a file, without the spaces around it: `echo x > file` adds some."""
        path = self.home / name
        shown = shortened(str(path), 300)
        again = "save it as UTF-8 text with the secret on the first line"
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a pipe might never end
                raise ConfigError(f"{shown} is not a file", "name a file that holds the secret")
            with path.open("rb") as file:
                raw = file.read(self.FILE_BYTES + 1)
        except FileNotFoundError:
            raise ConfigError(f"the file {shown} does not exist", f"create it: {again}") from None
        except OSError as error:
            raise ConfigError(
                f"the file {shown} cannot be read: {error.strerror}",
                "let the account that runs sgsync read it",
            ) from None
        if len(raw) > self.FILE_BYTES:
            raise ConfigError(f"the file {shown} is larger than {self.FILE_BYTES:,} bytes", again)
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = "\0"
        if re.search(r"[\0-\x08\x0e-\x1f\x7f]", text):  # as in UTF-16 without a byte order mark
            raise ConfigError(f"the file {shown} is not UTF-8 text", again)
        found = re.split(r"[\r\n]", text, maxsplit=1)[0].strip()
        if not found:
            which = "the first line of the file" if text.strip() else "the file"
            raise ConfigError(f"{which} {shown} is empty", again)
        self.files.append(path)
        return found

    @staticmethod
    def _quoted(value: str, before: str) -> str:
        """A value for a connection string whose text up to it is `before`.

        In ODBC a value with a special character is put in braces, closing braces doubled.
        (Outside of braces psqlODBC reads + and % as in a URL.)
        """
        if re.search(r"=\s*\{[^}]*$", before):
            return value.replace("}", "}}")
        special = re.search(r"[\[\]{}(),;?*=!@+%]|^\s|\s$", value)
        whole = re.search(r"=\s*$", before)
        return "{" + value.replace("}", "}}") + "}" if whole and special else value


# ------------------------------------ reader: load_config

# Given: the path of config.xml, and which of the Config classes a command wants.
# Gives: an instance of that class, checked.
# Raises: ConfigError that tells every mistake at once.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What every command can use of config.xml.

    A field with `element` in its metadata holds what that child of <Config> says; the command
    needs the element unless the field has a default.
    """

    path: Path
    history: History = dataclasses.field(default_factory=History, metadata={"element": "History"})
    pauses: tuple[Pause, ...] = dataclasses.field(default=(), metadata={"element": "Pause"})
    notices: tuple[Notice, ...] = dataclasses.field(default=(), metadata={"element": "Notify"})
    secrets: frozenset[str] = dataclasses.field(repr=False)
    secret_files: tuple[Path, ...]  # The files that `${file:PATH}` names.

    @classmethod
    def elements(cls) -> dict[str, dataclasses.Field[Any]]:
        """The children of <Config> that the command uses."""
        return {
            field.metadata["element"]: field
            for field in dataclasses.fields(cls)
            if "element" in field.metadata
        }


C = TypeVar("C", bound=Config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyncConfig(Config):
    """What `sync` uses of config.xml."""

    sftp: SftpSettings = dataclasses.field(metadata={"element": "SFTP"})
    database: DatabaseSettings = dataclasses.field(metadata={"element": "Database"})
    limits: Limits = dataclasses.field(default_factory=Limits, metadata={"element": "Limits"})
    sql_diffs: tuple[SqlDiff, ...] = dataclasses.field(metadata={"element": "Download"})
    statements: tuple[Statement, ...] = dataclasses.field(
        default=(), metadata={"element": "Upload"}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchooLinksConfig(Config):
    """What `schoolinks` uses of config.xml."""

    schoolinks: SchooLinksSettings = dataclasses.field(metadata={"element": "SchooLinks"})


# element -> (its dataclass, the elements that it may contain)
ELEMENTS: dict[str, tuple[type[Element] | None, tuple[str, ...]]] = {
    "Config": (
        None,
        (
            "SFTP",
            "Database",
            "Limits",
            "History",
            "Pause",
            "Notify",
            "Download",
            "Upload",
            "SchooLinks",
        ),
    ),
    "SFTP": (SftpSettings, ()),
    "Database": (DatabaseSettings, ()),
    "Limits": (Limits, ()),
    "History": (History, ()),
    "Pause": (Pause, ()),
    "Notify": (Notice, ()),
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
REPEATABLE = {"Pause", "Notify", "SQLDiff", "SQL", "Tag"}
TEXT_ELEMENTS = {"Query", "Insert", "Update", "Delete", "SQL"}


class ConfigReader:
    """The walk through config.xml; collects the errors instead of stopping at the first."""

    def __init__(self, path: Path) -> None:
        self.source = XmlSource(path)
        self.placeholders = Placeholders(path.parent)
        self.errors: list[tuple[int, str]] = []  # line, text
        self.faulty: set[etree._Element] = set()  # With an error in them, however deep.
        self.used = True  # Whether the element being read matters to the command.

    def read(self, wanted: type[C]) -> C:
        root, fields = self.source.root, wanted.elements()
        self._attributes(root)
        made: dict[str, list[Any]] = collections.defaultdict(list)
        for element in self._children(root):
            self.used = element.tag in fields
            made[element.tag].append(self._section(element))
        for tag, field in fields.items():
            needed = field.default is field.default_factory is dataclasses.MISSING
            if needed and tag not in made:
                remedy = f"copy <{tag}> from the config.xml that came with sgsync"
                self._fail(root, "", f"has no <{tag}> element", remedy)
        if self.errors:
            raise self._error()
        secrets = frozenset(secret for secret in self.placeholders.secrets if len(secret) > 2)
        files = tuple(dict.fromkeys(self.placeholders.files))
        found: dict[str, Any] = {
            fields[tag].name: tuple(several) if tag in REPEATABLE else several[0]
            for tag, several in made.items()
            if tag in fields
        }
        return wanted(path=self.source.path, secrets=secrets, secret_files=files, **found)

    def _fail(
        self, element: etree._Element, name: str, reason: str, remedy: str, line: int = 0
    ) -> None:
        self.faulty.update((element, *element.iterancestors()))
        line = line or self.source.line_of(element, name)
        tag, name = one_line(element.tag)[:80], one_line(name)[:80]
        place = f"<{tag} {name}>" if name else f"<{tag}>"
        text = f"{self.source.path.name}:{line}: {place}: {one_line(reason)}"
        self.errors.append((line, f"{text}\nTry: {one_line(remedy)}"))
        if len(self.errors) == CONFIG_ERRORS:
            raise self._error()

    def _error(self) -> ConfigError:
        self.errors.sort(key=operator.itemgetter(0))
        keep_secret(self.placeholders.secrets)
        return ConfigError("\n".join(text for _, text in self.errors))

    def _children(self, element: etree._Element) -> Iterator[etree._Element]:
        """The known elements inside `element`; unknown, repeated or stray content is an error."""
        allowed = ELEMENTS[element.tag][1]
        seen: set[str] = set()
        for child in element:
            if not isinstance(child.tag, str):  # a comment or a processing instruction
                continue
            if child.tag not in allowed:
                self._unknown(child, "", f"unknown element in <{element.tag}>", allowed)
            elif child.tag in seen and child.tag not in REPEATABLE:
                self._fail(child, "", "appears more than once", "keep one of them")
            else:
                seen.add(child.tag)
                yield child
        if element.tag in TEXT_ELEMENTS:
            return
        for before, text in ((element, element.text), *((child, child.tail) for child in element)):
            if words := (text or "").split():
                line = self.source.line_of_text(before, words[0])
                self._fail(element, "", "contains stray text", "delete it", line)

    def _unknown(
        self, element: etree._Element, name: str, reason: str, known: Iterable[str]
    ) -> None:
        spelled = {word.lower(): word for word in known}
        found = (name or str(element.tag))[:80].lower()
        close = difflib.get_close_matches(found, spelled, 1, 0.5)
        known_words = ", ".join(spelled.values())
        remedy = f"write {spelled[close[0]]}" if close else f"use one of {known_words}"
        self._fail(element, name, reason, remedy if spelled else "delete it")

    def _section(self, element: etree._Element) -> object:
        """A child of <Config>."""
        if element.tag in ("Download", "Upload"):
            self._attributes(element)
            read = self._sql_diff if element.tag == "Download" else self._statement
            made = [read(child) for child in self._children(element)]
            if element.tag == "Download" and not made and self.used:
                remedy = "copy one from the config.xml that came with sgsync"
                self._fail(element, "", "has no <SQLDiff> element", remedy)
            self._unique_files(element)
            return tuple(made)
        if element.tag == "SchooLinks":
            return self._schoolinks(element)
        return self._leaf(element)

    def _leaf(self, element: etree._Element) -> Any:
        """An element that contains no other."""
        list(self._children(element))  # for its errors
        return self._instance(element)

    def _instance(self, element: etree._Element, **more: object) -> Any:
        """The element's dataclass, or None where it is faulty or of no use to the command."""
        cls, values = ELEMENTS[element.tag][0], self._attributes(element)
        if cls is None or not self.used or element in self.faulty:
            return None
        if any(field.name == "where" for field in dataclasses.fields(cls)):
            more["where"] = self.source.where(element)
        made = cls(**values, **more)
        for problem in made.problems():
            self._fail(element, *problem)
        return made

    def _attributes(self, element: etree._Element) -> dict[str, object]:
        """The values of the attributes that are right, by field."""
        cls = ELEMENTS[element.tag][0]
        known = cls.attributes() if cls else {}
        for name in element.attrib:
            if name not in known:
                self._unknown(element, str(name), "unknown attribute", known)
        values: dict[str, object] = {}
        for name, field in known.items():
            raw = element.get(name)
            if raw is not None:
                values |= self._value(element, name, field, str(raw))
            elif field.default is not dataclasses.MISSING:
                values[field.name] = field.default
            elif self.used:
                self._fail(element, "", f"has no attribute {name}", f'add {name}="..."')
        return values

    def _value(
        self, element: etree._Element, name: str, field: dataclasses.Field[Any], raw: str
    ) -> dict[str, object]:
        """The value by its field; {} where it is wrong, or of no use to the command."""
        unfilled, about = "TODO(user)" in raw, field.metadata
        if not self.used and (unfilled or "${" in raw):
            return {}
        if unfilled:
            reason = "still contains TODO(user)"
            self._fail(element, name, reason, "replace it with your own value")
        connection_string = about["connection_string"]
        text, errors = self.placeholders.expand(raw, connection_string=connection_string)
        for error in errors:
            self._fail(element, name, error.message, error.remedy)
        if errors or unfilled:
            return {}
        if connection_string:
            self.placeholders.secrets.update(self.placeholders.passwords(text))
        elif about["secret"] and text:
            self.placeholders.secrets.add(text)
        try:
            return {field.name: about["parse"](text)}
        except ValueError as error:
            plain = field.repr and raw.strip() and not self.placeholders.PASSWORD.search(raw)
            shown = f"'{shortened(raw)}' " if plain else ""
            self._fail(element, name, f"{shown}{error}", "correct the value")
            return {}

    def _text(self, element: etree._Element) -> str:
        """The SQL text of an element; children in it are errors."""
        list(self._children(element))
        text = "".join([element.text or "", *(child.tail or "" for child in element)]).strip()
        if "TODO(user)" in text and self.used:
            remedy = "replace it with your own value"
            self._fail(element, "", "still contains TODO(user)", remedy)
        return text

    def _sql_diff(self, element: etree._Element) -> SqlDiff | None:
        query, calls = "", {}
        for child in self._children(element):
            text = self._text(child)
            if child.tag == "Query":
                self._attributes(child)
                query = text
            else:
                calls[child.tag.lower()] = self._instance(child, statement=text)
        if not query and self.used:
            self._fail(element, "", "has no <Query> with SQL in it", "add the query to export")
        made: SqlDiff | None = self._instance(element, query=query, calls=calls)
        return made

    def _statement(self, element: etree._Element) -> Statement | None:
        sql = self._text(element)
        if not sql and self.used:
            self._fail(element, "", "contains no SQL", "write the statement, or delete <SQL>")
        made: Statement | None = self._instance(element, sql=sql)
        return made

    def _schoolinks(self, element: etree._Element) -> SchooLinksSettings | None:
        sections: dict[str, Any] = {}
        for child in self._children(element):
            tags = tuple([self._leaf(tag) for tag in self._children(child)])
            more = {"tags": tags} if child.tag == "Tags" else {}
            sections[child.tag.lower()] = self._instance(child, **more)
        self._unique_files(element)
        made: SchooLinksSettings | None = self._instance(element, **sections)
        return made

    def _unique_files(self, parent: etree._Element) -> None:
        seen = {FAILURES_NAME, NOT_CONVERGED_NAME}
        for element in parent.iterchildren("SQLDiff", "SQL", "Attendance", "GPA", "Tags"):
            name = element.get("file")
            if name and name.lower() in seen:
                self._fail(
                    element, "file", f"'{shortened(name)}' is already in use", "choose another name"
                )
            seen.add(str(name).lower())


def load_config(path: Path, wanted: type[C]) -> C:
    """Read and check the configuration of one command: `load_config(path, SyncConfig)`.

    Elements that the command does not use are checked for what nobody can have meant, such as an
    unknown attribute, and may be unfilled or missing.  `${file:PATH}` is relative to the folder of
    `path`.  Raises ConfigError with every error of the file at once, each with file, line,
    element, reason and remedy.
    """
    return ConfigReader(path).read(wanted)


# ------------------------------------ home folder: load_environment
# Given: the folder of config.xml.
# Gives: the configuration that counts there, and variables for it.
# Raises: ConfigError.


def load_environment(home: Path) -> None:
    """Set the variables in the home's file sgsync.env that the environment lacks.

    So a command typed by hand has what the scheduled job has.  Lines are NAME=VALUE, the value may
    be in quotes, # begins a comment (systemd, "EnvironmentFile").  Raises ConfigError.
    """
    path = home / ENVIRONMENT_NAME
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise ConfigError(
            f"{path}: cannot be read: {reason}",
            "let the account that runs sgsync read this file, saved as UTF-8",
        ) from None
    for number, line in enumerate(map(str.strip, lines), 1):
        match = re.fullmatch(r"([A-Za-z_]\w*)\s*=\s*(.*)", line)
        if match:
            value = match[2]
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            os.environ.setdefault(match[1], value[1:-1] if quoted else value)
        elif line and line[0] not in "#;":
            raise ConfigError(f"{path}:{number}: is not NAME=VALUE", "correct or delete that line")


def required_variables(*names: str) -> list[str]:
    """Their values; raises ConfigError that names every variable that is not set."""
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"not set in the environment: {', '.join(missing)}",
            f"write them into {ENVIRONMENT_NAME} beside config.xml, or set them for the account "
            "that runs sgsync",
        )
    return [os.environ[name] for name in names]


def config_path(home: Path) -> Path:
    """The configuration of a home: the district's own copy, else the template.

    `config.local.xml` survives an upgrade, which replaces config.xml.
    """
    local = home / "config.local.xml"
    # Even a link to nowhere: the template must not run in place of what somebody chose.
    return local if os.path.lexists(local) else home / "config.xml"


# ==================================== FORMATS
# The files that runs read, compare and leave behind.


# ------------------------------------ values: to_text
# Given: a value of a database.
# Gives: its text, always written in one way.
# Raises: nothing.


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
    if isinstance(value, decimal.Decimal):
        return f"{value:f}"
    if isinstance(value, float):
        return f"{decimal.Decimal(repr(value)):f}".removesuffix(".0")
    if isinstance(value, (bytes, bytearray)):
        return value.hex()
    return str(value)


# ------------------------------------ canonical rows: Block
#
# Given a path; gives the header and the rows in blocks; raises DataError with file and line.
#
# A file is read in blocks of whole records.  Each block is checked and brought into one canonical
# format, bytes in which \0 stands between fields, \n after rows, and \xff for a line break inside a
# field (that byte occurs in no UTF-8, and \0 is refused).  Equal rows are then equal bytes, however
# they were quoted, and the order of bytes is the order of the tuples of fields.

CSV_LIMIT = 2**31 - 1
csv.field_size_limit(CSV_LIMIT)

LINE_BREAK = b"\xff"
_QUOTE = ord('"')  # `number in bytes` is ten times as fast as `bytes in bytes`.
_FROM_CANONICAL = bytes.maketrans(b"\0" + LINE_BREAK, b",\n")


@dataclasses.dataclass(frozen=True)
class Block:
    """`rows` records in canonical format; the first begins on line `line` of its file.

    Where columns were left out, `whole` has the rows with them: line breaks in them count.
    """

    data: bytes
    line: int
    rows: int
    whole: bytes = b""

    def line_at(self, offset: int) -> int:
        """The line on which the row at `offset` begins."""
        data = self.data
        if self.whole:
            before = self.whole.split(b"\n", data.count(b"\n", 0, offset))[:-1]
            data, offset = self.whole, sum(len(row) + 1 for row in before)
        breaks = data.count(b"\n", 0, offset) + data.count(LINE_BREAK, 0, offset)
        return self.line + breaks


def decode_row(row: bytes) -> Row:
    r"""The fields of one canonical row: `b"1\0Lee"` is `("1", "Lee")`."""
    return tuple(row.replace(LINE_BREAK, b"\n").decode("utf-8").split("\0"))


def encode_rows(rows: Sequence[bytes]) -> bytes:
    r"""Canonical rows as csv.writer would write them: `b"1\0Lee, A"` is `b'1,"Lee, A"\r\n'`."""
    text = b"".join(rows)
    # Quotes come first: a field that begins with one from then on needs no more.
    for mark in (_QUOTE, *b",\r", *LINE_BREAK):
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


# ------------------------------------ CSV: CsvFile
# Given: the path of a CSV file.
# Gives: its header, and its rows in blocks of canonical rows; a file written as RFC 4180 has it.
# Raises: DataError with file and line.

_TO_CANONICAL = bytes.maketrans(b",", b"\0")
_REGULAR = re.compile(rb'(?:"")?(?:,(?:"")?)*\r?\n')
_BLANKS_AT_END = re.compile(rb"(?<! ) +(?=[\0\n])")
_BOM = b"\xef\xbb\xbf"
_LONE_RETURN = re.compile(rb"\r(?!\n)")
# Begins with the quote itself: so the search leaps from quote to quote.
_LOOSE_QUOTE = re.compile(rb'"(?:(?<=[^,\r\n"]")|(?=([^,\r\n"])))')
_NOT_CANONICAL = bytes(set(range(256)) - set(b"\0\n"))
_NOT_STRUCTURE = bytes(set(range(256)) - set(b',"\r\n'))


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
        text = (null_text or "").encode("utf-8", "surrogatepass").replace(b"\n", LINE_BREAK)
        self._null = (
            re.compile(rb"(?<![^\0\n])" + re.escape(text) + rb"(?=[\0\n])") if text else None
        )
        self._regular_line = b""  # The structure of a row that has been found regular.
        self._width = 0  # fields of a row, 0 for the header itself
        self._kept: tuple[int, ...] | None = None  # the fields that `leave_out` left
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
        file = CsvFile(self.path, self.shown, trim=self._trim, null_text=self._null_text)
        if self._kept is not None:
            file.leave_out(name for name in file.columns if name not in self.columns)
        return file

    def leave_out(self, names: Iterable[str]) -> None:
        """Give the rows without these columns from now on."""
        without = set(names)
        if without:
            self._kept = tuple(i for i, name in enumerate(self.columns) if name not in without)
            self.columns = tuple(self.columns[index] for index in self._kept)

    @property
    def leaves_out(self) -> bool:
        return self._kept is not None

    def blocks(self) -> Iterator[Block]:
        """The rows in canonical format, block by block."""
        for raw in self.raw_blocks():
            block = self.canonical(raw, self.line)
            has_breaks = LINE_BREAK in (block.whole or block.data)
            self.line += raw.count(b"\n") if has_breaks else block.rows
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
        if self._kept is not None:
            split = (row.split(b"\0") for row in data[:-1].split(b"\n"))
            rows = (b"\0".join([fields[index] for index in self._kept]) for fields in split)
            return Block(b"".join([row + b"\n" for row in rows]), line, block.rows, data)
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
        self.columns, self._width = columns, len(columns)
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
        width = self._width
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
        inside = b'"'.join(inside).replace(b"\n", LINE_BREAK).split(b'"') if inside else []
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


# ------------------------------------ keys: Key
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
        has_breaks = LINE_BREAK in data
        if self._is_piece:
            return [key.replace(LINE_BREAK, b"\n") for key in found] if has_breaks else found
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
                column = [field.replace(LINE_BREAK, b"\n") for field in column]
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


# ------------------------------------ order: OrderedRows
# Given: the blocks of a CSV file, and its key.
# Gives: its rows in windows whose order was checked, sorted on request in bounded memory.
# Raises: DataError with both lines and both keys.


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
            lines = len(keys) + block.data.count(LINE_BREAK)
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
        has_breaks = LINE_BREAK in self._piece.data
        if len(rows) == len(keys):
            self.position += len(self._bytes)
        else:
            lines_left = len(rows) - len(keys)
            if has_breaks and self.is_raw:
                lines_left += sum(row.count(LINE_BREAK) for row in rows[len(keys) :])
            del rows[len(keys) :]
            self.position += len(self._bytes[:-1].rsplit(b"\n", lines_left)[0]) + 1
        self.rows += len(rows)
        self._line += len(rows) + (sum(row.count(LINE_BREAK) for row in rows) if has_breaks else 0)
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
            itertools.accumulate((1 + row.count(LINE_BREAK) for row in rows), initial=block.line)
        )
        if self.rows:
            keys, rows = [self._last_key, *keys], [self._last_row, *rows]
            lines = [block.line - 1 - self._last_row.count(LINE_BREAK), *lines]
        index = next(i for i in range(1, len(keys)) if not keys[i - 1] < keys[i])
        found = lines[index - 1 : index + 1]
        if self._sorted and keys[index - 1] != keys[index]:  # Columns were left out.
            found = [self._lines_of(each)[0] for each in keys[index - 1 : index + 1]]
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
        return data.replace(b"\x0b", b"\x0b\x02").replace(LINE_BREAK, b"\x0b\x01").decode("latin-1")

    def _form(self, part: bytes | int) -> str:
        """Text that sorts as `part`: a number begins with its sign and how many digits it has."""
        if isinstance(part, bytes):
            return self._escaped(part.replace(b"\n", LINE_BREAK))
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
            data = data.replace(b"\x0b\x01", LINE_BREAK).replace(b"\x0b\x02", b"\x0b")
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


# ------------------------------------ diff file: Comparison
# Given: the changes of one file, or the diff file that holds them.
# Gives: one line for each change (`operation`, every column before, every column after), and
#     what later stages need of it.  Raises: DataError, Error.


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
    new_columns: Row = ()  # only the source has them; left out
    changes: Path = Path("-")  # standard output, unless `compare` made it
    source: Path = Path("-")  # likewise
    _lines: Iterator[tuple[int, Row]] = dataclasses.field(default=iter(()), repr=False)

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

    def line_of(self, row: Row) -> int:
        """The line of the source on which `row` begins, 0 where it is not there.

        Quick if rows are asked for in the order of the file.
        """
        for _ in range(2):  # from the last row that was found; then from the first
            for line, found in self._lines:
                if found == row:
                    return line
            self._lines = self._numbered_rows()
        return 0

    def _numbered_rows(self) -> Iterator[tuple[int, Row]]:
        trim, null_text = self.sql_diff.trim, self.sql_diff.null_text
        with CsvFile(self.source, trim=trim, null_text=null_text) as file:
            file.leave_out(name for name in file.columns if name not in self.columns)
            for block in file.blocks():
                line = block.line
                whole = (block.whole or block.data).split(b"\n")
                for row, full in zip(block.data[:-1].split(b"\n"), whole, strict=False):
                    yield line, decode_row(row)
                    line += 1 + full.count(LINE_BREAK)

    def summary(self) -> FileSummary:
        """What summary.json tells of it, before anything is applied."""
        summary = FileSummary(
            file=self.sql_diff.file,
            source_rows=self.source_rows,
            target_rows=self.target_rows,
            format_differences=self.format_differences,
        )
        for operation in OPERATIONS:
            tally, count = summary.tally(operation), self.count(operation)
            tally.found = count
            tally.left_alone = 0 if operation in self.sql_diff.calls else count
        return summary

    def __str__(self) -> str:
        return f"{self.insert:,} to insert, {self.update:,} to update, {self.delete:,} to delete"


# ------------------------------------ summaries: RunSummary
# Given: the folders of runs.
# Gives: what summary.json tells of each, as objects; the newest are kept.
# Raises: ConfigError for a run that is not there, Error where the disk fails.


@dataclasses.dataclass
class Tally:
    """The rows of one operation: how many differ, and what became of them."""

    found: int = 0
    applied: int = 0
    failed: int = 0
    left_alone: int = 0  # where config.xml has no element for the operation


@dataclasses.dataclass
class FileSummary:
    """What a run found and did for one file; counts are rows, times seconds."""

    file: str
    source_rows: int = 0
    target_rows: int = 0
    insert: Tally = dataclasses.field(default_factory=Tally)
    update: Tally = dataclasses.field(default_factory=Tally)
    delete: Tally = dataclasses.field(default_factory=Tally)
    not_converged: int = 0
    format_differences: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def rows_left(self) -> int:
        """How many rows the run left in the database, at least."""
        changed = self.insert.applied - self.delete.applied - self.not_converged
        return max(0, self.target_rows + changed)

    def tally(self, operation: str) -> Tally:
        return cast("Tally", getattr(self, operation))

    def total(self, what: str) -> int:
        """The sum of `found`, `applied`, `failed` or `left_alone` over the operations."""
        return sum(getattr(self.tally(operation), what) for operation in OPERATIONS)


@dataclasses.dataclass
class SectionSummary:
    """One of SchooLinks' files."""

    file: str
    section: str
    rows: int
    without: dict[str, int]  # reason -> students without a row
    null_days: int
    uploaded: Literal["", "test", "live"] = ""


@dataclasses.dataclass
class Approval:
    """Who let the changes of a held run pass, when, why, and how many rows beyond the limits."""

    run: str
    by: str
    why: str
    at: str
    rows: int = 0


@dataclasses.dataclass
class Stage:
    """A part of a run's work: seconds after the run's start, and how many it took."""

    name: str
    began: float
    seconds: float


@dataclasses.dataclass
class RunSummary:
    """What summary.json tells of a run; times are this machine's, with the zone's offset."""

    command: str
    version: str = __version__
    epoch: str = ""
    started: str = ""
    account: str = ""
    computer: str = ""
    arguments: list[str] = dataclasses.field(default_factory=list)
    outcome: str = "running"
    exit_code: int | None = None
    message: str = ""
    remedy: str = ""
    seconds: float = 0.0
    source_epoch: str = ""
    stale_epoch: str = ""  # the extract, where it was too old
    over_limits: list[str] = dataclasses.field(default_factory=list)
    forced: bool = False  # written although something was over a limit or too old (--force)
    approval: Approval | None = None
    files: list[FileSummary] = dataclasses.field(default_factory=list)
    sections: list[SectionSummary] = dataclasses.field(default_factory=list)  # SchooLinks' files
    statement_files: dict[str, int] = dataclasses.field(default_factory=dict)  # -> rows
    keys: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # file -> key columns
    stages: list[Stage] = dataclasses.field(default_factory=list)

    def conclude(self, outcome: str, exit_code: int, message: str, remedy: str = "") -> None:
        self.outcome, self.exit_code = outcome, exit_code
        self.message, self.remedy = redact(message), redact(remedy)

    @property
    def only_planned(self) -> bool:
        """True if the run showed changes and, by its nature, wrote none of them.

        A run that maxShrink held has written its changes, and only sent nothing.
        """
        return self.outcome == "dry run" or (self.outcome == "held" and not self.total("applied"))

    def total(self, what: str) -> int:
        """The sum of `found`, `applied`, `failed` or `left_alone` over all files."""
        return sum(file.total(what) for file in self.files)

    def changes(self, *, planned: bool = False) -> str:
        """`3 rows inserted, 1 row updated, ...`: what was applied or, if `planned`, would be."""
        if not self.total("found"):
            return "nothing to do: both sides are equal"
        parts = []
        for operation, word in ((INSERT, "inserted"), (UPDATE, "updated"), (DELETE, "deleted")):
            tallies = [file.tally(operation) for file in self.files]
            count = sum(t.found - t.left_alone if planned else t.applied for t in tallies)
            parts.append(f"{plural(count, 'row')} {'would be ' if planned else ''}{word}")
        left = self.total("left_alone")
        return ", ".join(parts + ([f"{plural(left, 'row')} left alone"] if left else []))


type_hints = functools.cache(typing.get_type_hints)  # It takes longer than all the rest.


def from_json(kind: Any, data: Any) -> Any:
    """A value of type `kind` from what `dataclasses.asdict` and JSON made of it.

    Names that a dataclass lacks are passed over: another version wrote them.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = type_hints(kind)
        known = {name: value for name, value in data.items() if name in hints}
        return kind(**{name: from_json(hints[name], value) for name, value in known.items()})
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return [from_json(arguments[0], item) for item in data]
    if typing.get_origin(kind) is dict:
        return {name: from_json(arguments[1], item) for name, item in data.items()}
    if type(None) in arguments and data is not None:
        return from_json(arguments[0], data)
    return data


class KeptRun:
    """A run that history keeps."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.epoch = folder, folder.name

    @functools.cached_property
    def summary(self) -> RunSummary | None:
        """What the run told of itself, or None where nothing readable is left of that."""
        try:
            text = (self.folder / SUMMARY_NAME).read_text(encoding="utf-8")
            return cast("RunSummary", from_json(RunSummary, json.loads(text)))
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    @functools.cached_property
    def manifest(self) -> Manifest | None:
        """What the folder held when the run's outcome was settled, or None if nobody can say."""
        try:
            text = (self.folder / MANIFEST_NAME).read_text(encoding="utf-8")
            manifest = cast("Manifest", from_json(Manifest, json.loads(text)))
            numbers = [manifest.sealed, *(file.size for file in manifest.files.values())]
            before = manifest.previous.run if manifest.previous else ""
            typed = isinstance(before, str) and all(type(number) is int for number in numbers)
            return manifest if typed and manifest.run == self.epoch else None
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    @property
    def settled(self) -> bool:
        """True if the run is over: one that is being pushed says so already in its summary."""
        outcome = self.summary.outcome if self.summary else "running"
        return self.complete or outcome not in ("running", "complete", "partial")

    @property
    def complete(self) -> bool:
        return (self.folder / COMPLETE).is_file()

    @property
    def held(self) -> bool:
        return (self.folder / HELD).is_file()


def runs(history: Path) -> list[KeptRun]:
    """The runs that `history` keeps, newest first; a link or a junction to a run is none."""

    def is_run(path: Path) -> bool:
        found = path.lstat()
        reparse = getattr(found, "st_file_attributes", 0) & 0x400  # FILE_ATTRIBUTE_REPARSE_POINT
        return bool(EPOCH.fullmatch(path.name)) and stat.S_ISDIR(found.st_mode) and not reparse

    with local_errors(history):
        found = history.iterdir() if os.path.lexists(history) else ()
        folders = sorted(filter(is_run, found), reverse=True)
    return [KeptRun(folder) for folder in folders]


def held_run(history: Path, epoch: str) -> KeptRun:
    """The held run that `--approve` names; raises ConfigError where there is none."""
    held = {run.epoch: run for run in runs(history) if run.held}
    if epoch not in held:
        raise ConfigError(
            f"--approve {one_line(epoch)}: there is no held run of that name in {history}",
            f"use one of the held runs: {', '.join(held)}" if held else "",
        )
    return held[epoch]


def prune(history: Path, keep: int, current: Path) -> int:
    """Delete all but the newest `keep` runs, never `current`; returns how many."""
    # The current run comes first even where the clock was set back.
    kept = sorted(runs(history), key=lambda run: run.folder != current)
    pruned = 0
    for run in kept[keep:]:
        try:
            shutil.rmtree(run.folder)
            pruned += 1
        except OSError as error:
            log.warning("%s: this old run cannot be deleted: %s", run.folder, error.strerror)
    if pruned:
        log.info("deleted %s older than the newest %d", plural(pruned, "run"), keep)
    return pruned


def kept_run(history: Path, epoch: str) -> KeptRun:
    """The run that a person names; raises ConfigError where there is none."""
    for run in runs(history):
        if run.epoch == epoch:
            return run
    raise ConfigError(
        f"{one_line(epoch)}: there is no such run in {history}",
        f"{SCRIPT.name} history lists the runs",
    )


# ------------------------------------ manifests: Manifest
#
# Given the folders of runs; gives a manifest for each run, which names the manifest of the run
# before, and later what was altered since.  Raises Error where a disk fails.


@dataclasses.dataclass
class Sealed:
    """A file as it was; of the log, which grows on, its first `size` bytes."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path, size: int | None = None) -> Sealed:
        """The file as it is, or its first `size` bytes."""
        digest, count = hashlib.sha256(), 0
        with local_errors(path), path.open("rb") as file:
            while block := file.read(
                BLOCK_BYTES if size is None else min(BLOCK_BYTES, size - count)
            ):
                digest.update(block)
                count += len(block)
        return cls(count, digest.hexdigest())


@dataclasses.dataclass
class Link:
    """The run sealed before, by the SHA-256 of its manifest."""

    run: str
    sha256: str


@dataclasses.dataclass
class Manifest:
    """Every file of a run's folder when its outcome was settled; `sealed` is ns since 1970, UTC.

    The report is not in it, for it is made of the other files and can be made again.
    """

    run: str
    sealed: int
    previous: Link | None
    files: dict[str, Sealed] = dataclasses.field(default_factory=dict)

    @staticmethod
    def paths(folder: Path) -> dict[str, Path]:
        """The files of a run that a manifest holds: name in the folder -> path."""
        others = (MANIFEST_NAME, REPORT_NAME, COMPLETE)
        found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
        return {
            name: path
            for name, path in found.items()
            if name not in others and path.suffix != PART and (path.is_symlink() or path.is_file())
        }

    @classmethod
    def write(cls, folder: Path, earlier: Sequence[KeptRun]) -> None:
        """Seal the folder of a run; `earlier` are the other runs."""
        last = max(
            (run for run in earlier if run.settled and run.manifest),
            key=lambda run: cast("Manifest", run.manifest).sealed,
            default=None,
        )
        link = Link(last.epoch, Sealed.of(last.folder / MANIFEST_NAME).sha256) if last else None
        files = {name: Sealed.of(path) for name, path in cls.paths(folder).items()}
        manifest = cls(folder.name, time.time_ns(), link, files)
        with new_file(folder / MANIFEST_NAME) as file:
            text = json.dumps(dataclasses.asdict(manifest), indent=1)
            file.write(text.encode("ascii") + b"\n")

    def altered(self, folder: Path) -> Iterator[str]:
        """What differs from the manifest, in words."""
        there = self.paths(folder)
        for name, sealed in self.files.items():
            path = there.pop(name, None)
            if path is None:
                yield f"{one_line(name)} is missing"
            elif path.is_symlink():
                yield f"{one_line(name)} was replaced with a link"
            elif Sealed.of(path, sealed.size if name == LOG_NAME else None) != sealed:
                yield f"{one_line(name)} was altered"
        for name in there:
            yield f"{one_line(name)} was added"


def verify(kept: Sequence[KeptRun]) -> Iterator[tuple[str, str]]:
    """Epoch and description of all that was altered in the runs kept.

    Pruning takes the runs with the lowest names, so one that is named by another and missing was
    pruned if its name is lower than all that are left, and else deleted.
    """
    sealed = [(run.manifest.sealed, run.epoch, run.manifest, run) for run in kept if run.manifest]
    sealed.sort(key=lambda entry: entry[:2])
    by_epoch = {run.epoch: run for run in kept}
    oldest = min(by_epoch, default="")
    first = min((epoch for _, epoch, _, _ in sealed), default="")
    told = set()
    for run in kept:
        outcome = run.summary.outcome if run.summary else "unknown"
        # A run that was killed, or that another one kept from starting, has no manifest.
        expected = run.complete or outcome not in ("running", BusyError.outcome)
        if expected and not run.manifest and run.epoch > first > "":
            told.add(run.epoch)
            yield run.epoch, f"{MANIFEST_NAME} is missing or cannot be read"
    follows = False  # True if a settled run was sealed before
    for _, epoch, manifest, run in sealed:
        before = manifest.previous
        if before is None:
            if follows:
                yield epoch, f"{MANIFEST_NAME} does not name the run before"
        elif before.run not in by_epoch:
            if before.run > oldest:
                yield before.run, f"the run was deleted; run {epoch} was made after it"
        elif before.run not in told:
            path = by_epoch[before.run].folder / MANIFEST_NAME
            if not path.is_file() or Sealed.of(path).sha256 != before.sha256:
                yield before.run, f"{MANIFEST_NAME} is not the one that run {epoch} saw"
        for what in manifest.altered(run.folder):
            yield epoch, what
        follows = follows or run.settled


# ------------------------------------ run under way: Run
# Given: the folder history.
# Gives: the folder and the summary of the run under way, and the lock of the home.
# Raises: BusyError, Error where the disk fails.


class Run:
    """The run under way: its folder and its summary.

    `settings` is <History>, once config.xml could be read.  `report` makes report.html.
    """

    def __init__(self, history: Path, command: str, arguments: Sequence[str]) -> None:
        self.history, self.folder = history, self._new_folder(history)
        self.settings: History | None = None
        self.notices: Sequence[Notice] = ()
        self.report: Callable[[Run, Sequence[KeptRun]], None] | None = None
        self._began = time.monotonic()
        self.summary = RunSummary(
            command=command,
            epoch=self.folder.name,
            started=local_time(time.time()).isoformat(timespec="seconds"),
            account=account_name(),
            computer=socket.gethostname(),
            arguments=list(arguments),
        )
        self.save()

    @staticmethod
    def _new_folder(history: Path) -> Path:
        """A second run in the same second waits for the next one."""
        with local_errors(history):
            history.mkdir(mode=OWNER_ONLY, parents=True, exist_ok=True)
            while True:
                folder = history / time.strftime("%Y%m%d-%H%M%S")
                try:
                    folder.mkdir(mode=OWNER_ONLY)
                    return folder
                except FileExistsError:
                    time.sleep(0.1)

    def save(self) -> None:
        """Write summary.json; a run that is killed leaves the outcome `running` in it."""
        self.summary.seconds = round(time.monotonic() - self._began, 3)
        with new_file(self.folder / SUMMARY_NAME) as file:
            text = json.dumps(dataclasses.asdict(self.summary), indent=1)
            file.write(text.encode("ascii") + b"\n")

    def conclude(self, outcome: str, exit_code: int, message: str, remedy: str = "") -> None:
        """Settle the outcome, write the report and seal the folder."""
        self.summary.conclude(outcome, exit_code, message, remedy)
        self.save()
        report, earlier = self.report, functools.cache(self.earlier)
        if report:
            self.attempt(REPORT_NAME, lambda: report(self, earlier()))
        if outcome != BusyError.outcome:  # Another run is under way, and will be the next link.
            self.attempt(MANIFEST_NAME, lambda: Manifest.write(self.folder, earlier()))

    def attempt(self, name: str, write: Callable[[], None]) -> None:
        """Write what tells of the run; if that fails, the run's outcome stands."""
        try:
            write()
        except Exception as exception:
            log.warning("%s: could not be written: %s", name, Error.of(exception).message)
            log.debug("", exc_info=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note in the summary how long the work inside takes, also if it fails.

        What comes after the outcome, the push, is not in it: the summary is part of what is pushed.
        """
        began = time.monotonic()
        try:
            yield
        finally:
            now = time.monotonic()
            if self.summary.outcome == "running":
                stage = Stage(name, round(began - self._began, 3), round(now - began, 3))
                self.summary.stages.append(stage)

    def complete(self) -> None:
        """Mark the run's folder as whole."""
        with local_errors(self.folder / COMPLETE):
            (self.folder / COMPLETE).touch()

    def earlier(self) -> list[KeptRun]:
        """The other runs, newest first."""
        return [run for run in runs(self.history) if run.folder != self.folder]

    def failed(self, exception: BaseException) -> Error:
        """Settle the outcome of a run that ends with `exception`; returns it as an Error."""
        error = Error.of(exception)
        if isinstance(exception, KeyboardInterrupt):
            applied = self.summary.total("applied")
            done = "nothing was written"
            if applied:
                done = f"{plural(applied, 'row')} written so far stay; the next run continues"
                done += " from there"
            error = InterruptError(done)
        if isinstance(error, HeldError):
            with contextlib.suppress(Error), new_file(self.folder / HELD) as file:
                file.write(redact(str(error)).encode("utf-8") + b"\n")
        with contextlib.suppress(Error):  # a full disk
            self.conclude(error.outcome, error.exit_code, error.message, error.remedy)
        return error


def account_name() -> str:
    """Who runs this, by the operating system's names."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError, ImportError):  # an id without a name
        return "unknown"
    if os.name == "nt" and os.environ.get("USERDOMAIN"):
        return f"{os.environ['USERDOMAIN']}\\{name}"
    by = os.environ.get("SUDO_USER")
    return f"{name} (sudo by {by})" if by and by != name else name


@contextlib.contextmanager
def only_run(run: Run, name: str) -> Iterator[None]:
    """Hold the lock of this home; raises BusyError, naming the process that has it.

    The operating system frees the lock of a process that dies.
    """
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
            "wait for it to end; if it hangs, end that process: this also frees its lock",
        ) from None
    except OSError as error:
        with local_errors(run.history / f"{name}.lock"):
            raise error from None
    try:
        about = {"pid": os.getpid(), "since": run.summary.started, "epoch": run.summary.epoch}
        with new_file(holder) as file:
            file.write(json.dumps(about).encode("ascii"))
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        lock.release()


# ------------------------------------ history of a row: KeySearch
#
# Given the folders of the runs kept, and a value; gives what happened to the rows that have it in a
# key column.  Raises Error where a disk fails.


@dataclasses.dataclass
class Event:
    """One change to one row, and what became of it; `values` is column -> (before, after)."""

    epoch: str
    started: str
    file: str
    operation: str
    key: str
    values: dict[str, tuple[str, str]]
    outcome: str  # written, failed, not written or unknown
    reason: str = ""
    approved_by: str = ""
    why: str = ""

    VERBS: typing.ClassVar[Mapping[str, tuple[str, str, str]]] = {  # as it is after each of these
        INSERT: ("inserted", "did not insert", "may have inserted"),
        UPDATE: ("updated", "did not update", "may have updated"),
        DELETE: ("deleted", "did not delete", "may have deleted"),
    }

    def __str__(self) -> str:
        when = {"written": 0, "unknown": 2}.get(self.outcome, 1)
        told = []
        for column, (before, after) in self.values.items():
            if self.operation == UPDATE:
                told.append(f"{column} from '{before}' to '{after}'")
            elif before or after:
                told.append(f"{column} '{before or after}'")
        end = f": {self.reason}" if self.reason else ""
        if self.approved_by:
            end += f"; approved by {self.approved_by}" + (f" ({self.why})" if self.why else "")
        return one_line(
            f"{self.started[:19].replace('T', ' ')} run {self.epoch} "
            f"{self.VERBS[self.operation][when]} {self.file} {self.key}"
            f"{' (' * bool(told)}{', '.join(told)}{')' * bool(told)}{end}"
        )

    def records(self) -> list[dict[str, str]]:
        """A record for each column, for CSV."""
        own = {name: value for name, value in vars(self).items() if name != "values"}
        return [
            {**own, "column": column, "before": before, "after": after}
            for column, (before, after) in (self.values or {"": ("", "")}).items()
        ]


class KeySearch:
    """Finds the changes to all rows that have one value in a key column, over all runs kept.

    A diff file is searched as bytes, and only records that contain the value are parsed: most
    files do not contain it.  `--key` means the columns of `key=` as the run knew them.
    """

    def __init__(self, history: Path, value: str, file: str) -> None:
        self._runs, self._value, self._file = runs(history), value, file
        self._bytes = value.replace('"', '""').encode("utf-8", "surrogateescape")

    def events(self) -> Iterator[Event]:
        """Oldest first; within a run in the order of its files."""
        keys: dict[str, list[str]] = {}  # A run of an older version does not name its keys.
        for run in self._runs:
            keys = {**(run.summary.keys if run.summary else {}), **keys}
        for run in reversed(self._runs):
            known = {**keys, **(run.summary.keys if run.summary else {})}
            folder = run.folder / "diff"
            for path in sorted(folder.glob("*.csv")) if folder.is_dir() else ():
                if self._file in ("", path.name):
                    yield from self._changes(run, path, known.get(path.name, []))

    def _changes(self, run: KeptRun, path: Path, key: Sequence[str]) -> Iterator[Event]:
        """The changes of one diff file; without `key` every column is part of it."""
        with local_errors(path):
            data = path.read_bytes()
        if self._bytes not in data:
            return
        header = next(csv.reader(io.StringIO(data[:RECORD_BYTES].decode("utf-8", "replace"))))
        columns = [name.removeprefix("before_") for name in header[1 : 1 + len(header) // 2]]
        indexes = [columns.index(name) for name in key if name in columns] or range(len(columns))
        for record in self._records(data):
            if record[0] not in OPERATIONS or len(record) != len(header):
                continue
            before, after = record[1 : 1 + len(columns)], record[1 + len(columns) :]
            row = before if record[0] == DELETE else after
            if self._value in [row[index] for index in indexes]:
                shown = ", ".join(
                    f"{one_line(columns[i])}={one_line(shortened(row[i], 100))}" for i in indexes
                )
                values = {
                    column: (before[i], after[i])
                    for i, column in enumerate(columns)
                    if before[i] != after[i] and (record[0] == UPDATE or i not in indexes)
                }
                yield self._event(run, path, record, shown, values)

    def _records(self, data: bytes) -> Iterator[list[str]]:
        """The records that contain the value.

        A line break ends a record if the number of quotes since the record's begin is even.
        """
        start = 0  # of a record
        while (hit := data.find(self._bytes, start)) >= 0:
            begin = data.rfind(b"\r\n", start, hit)
            quotes = data.count(b'"', start, max(begin, start))
            while begin >= 0 and quotes & 1:
                earlier = data.rfind(b"\r\n", start, begin)
                quotes -= data.count(b'"', max(earlier, start), begin)
                begin = earlier
            begin = start if begin < 0 else begin + 2
            end, quotes, found = begin, 1, 0
            while quotes & 1 and found >= 0:
                found = data.find(b"\r\n", max(hit, end))
                end = len(data) if found < 0 else found + 2
                quotes = data.count(b'"', begin, end)
            text = data[begin:end].decode("utf-8", "replace")
            yield from csv.reader(io.StringIO(text, newline=""))
            start = end

    def _event(
        self, run: KeptRun, path: Path, record: Sequence[str], key: str,
        values: dict[str, tuple[str, str]],
    ) -> Event:  # fmt: skip
        summary, operation = run.summary, record[0]
        event = Event(run.epoch, "", path.name, operation, key, values, "unknown")
        if summary is None:
            event.reason = "the run left no summary"
            return event
        event.started = summary.started
        if summary.outcome == "running":
            event.reason = "the run was killed, or is not finished"
        elif summary.only_planned:
            event.outcome = "not written"
            event.reason = "the run was held" if summary.outcome == "held" else "a dry run"
        else:
            self._tell(event, run, path, record)
        if summary.approval:
            event.approved_by, event.why = summary.approval.by, summary.approval.why
        elif summary.forced:
            event.approved_by = f"{summary.account} with --force"
        return event

    def _tell(self, event: Event, run: KeptRun, path: Path, record: Sequence[str]) -> None:
        """What became of a change in a run that went on to write."""
        summary, operation = cast("RunSummary", run.summary), event.operation
        files = [file for file in summary.files if file.file == path.name]
        tally = files[0].tally(operation) if files else Tally()
        refused = {
            row["error"]
            for row in self._rows(run.folder / FAILURES_NAME)
            if tally.failed and (row["operation"], row["key"]) == (operation, event.key)
        }
        tried = tally.applied + tally.failed
        event.outcome = "not written"
        if tally.left_alone:
            event.reason = f"left alone, config.xml had no <{operation.title()}> for this file"
        elif refused:
            event.outcome, event.reason = "failed", " / ".join(refused)
        elif not files or (tried < tally.found and self._position(path, record) >= tried):
            event.reason = "the run stopped before this row"
        else:
            event.outcome = "written"
            if files[0].not_converged and any(
                (row["file"], row["operation"], row["key"]) == (path.name, operation, event.key)
                for row in self._rows(run.folder / NOT_CONVERGED_NAME)
            ):
                event.reason = "did not converge, the row still differs after the call"

    @staticmethod
    def _position(path: Path, record: Sequence[str]) -> int:
        """How many changes of the same operation stand before this one: they were tried first."""
        for position, (before, after) in enumerate(read_changes(path, record[0])):
            if (*before, *after) == tuple(record[1:]):
                return position
        return 0

    @staticmethod
    def _rows(path: Path) -> list[dict[str, str]]:
        if not path.is_file():
            return []
        with local_errors(path), path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))


# ==================================== CONNECTIONS
# Servers and databases; every operation is bounded in time.


# ------------------------------------ SSH keys: HostKeys
# Given: the settings of an SFTP server, the home folder, known_hosts as ssh or PowerShell wrote it.
# Gives: the private key to log in with, the host keys pinned for a server, the key it shows.
# Raises: ConfigError for this machine's files, TransferError for a server that cannot be trusted.

logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # What it logs it raises, too.


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
    command = command_line([*words, "-t", "rsa", "-b", "4096", "-N", "", "-f", str(path)])
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


# ------------------------------------ SFTP requests: SftpRequests
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


@dataclasses.dataclass(frozen=True)
class RemoteEntry:
    """One entry of a directory on the server; `modified` is seconds since 1970, by its clock."""

    name: str
    is_directory: bool
    is_file: bool
    size: int
    modified: float


# ------------------------------------ SFTP: Sftp
# Given: the settings of a server and the home folder.
# Gives: listings, files in both directions, directories; every exchange is bounded in time.
# Raises: TransferError for the server's and the network's faults, ConfigError for the key files.


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
            settings.host, settings.port, settings.host_from + settings.place, self._trust()
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
        return own_command(*self.settings.trust, *home)

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
                        f"clean up that directory, or {self.settings.correct_directory}",
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
            remedy = f"{self.settings.correct_directory}, or ask for access to it"
            return TransferError(f"{subject}: {words}", remedy)
        refused = (
            isinstance(error, OSError) and code is None and not isinstance(error, TimeoutError)
        )
        if refused and self._transport and self._transport.is_active():
            remedy = "check the disk space and the permissions on the server"
            return TransferError(f"{subject}: {reason}", remedy, transient=True)
        return ssh_error(subject, error, seconds, settings.host_from + settings.place)


# ------------------------------------ messages of ODBC: DriverMessage
# Given: SQLSTATE and text of an error, as an ODBC driver raises it.
# Gives: the text in one line, without the rows it quotes; what it means, and what to do about it.
# Raises: nothing.


class DriverMessage:
    """What an ODBC driver said: `sqlstate` (ISO/IEC 9075, and each product's own) and `text`.

    The text is one line without the driver's prefixes, and without the row that it may quote.
    """

    DEADLOCK = frozenset(("40001", "40P01", "55P03"))
    LOST = frozenset(
        ("08001", "08003", "08006", "08007", "08S01", "08S02", "57P01", "57P02", "57P03", "HYT01")
    )
    SLOW = "check the server and the network, or raise queryTimeoutSeconds on <Database>"
    NO_PROCEDURE = frozenset(("42883", "42809"))
    _LOST_TEXT = re.compile(
        r"(?i)server closed the connection|connection (?:was |has been )?(?:lost|closed|reset"
        r"|broken)|communication link failure|could not (?:send|receive)|login timeout"
        r"|no connection to the server|terminating connection|server has gone away"
    )
    _REFUSED_TEXT = re.compile(  # PostgreSQL's driver has no SQLSTATE of its own for these.
        r"(?i)authentication failed|login failed|no pg_hba.conf entry"
        r"|FATAL: .*(?:does not exist|not permitted|permission denied)"
    )
    _CERTIFICATE_TEXT = re.compile(r"(?i)\b(?:SSL|TLS)\b.*\bcertificate|root certificate")
    _QUOTED_VALUE = re.compile(  # as PostgreSQL and SQL Server quote what they could not convert
        r"""(?sx) ( invalid\ input\ (?:syntax|value)\ for\ [^:"]*(?:"[^"]*")?:\ "
                  | field\ value\ out\ of\ range:\ "
                  | (?<!\w)value\ ["'](?=.*["']\ (?:is\ out\ of\ range|overflowed
                                                   |to\ data\ type|for))
                  | Truncated\ value:\ ' | duplicate\ key\ value\ is\ \( )
            .* ( " | ' | \) )"""
    )
    _DENIED = re.compile(
        r"The (?P<right>[A-Z ]+) permission was denied on the object '(?P<object>[^']*)', "
        r"database '[^']*', schema '(?P<schema>[^']*)'"
        r"|permission denied for (?P<kind>[a-z ]+) (?P<name>\S+)"
    )

    def __init__(self, sqlstate: str, text: str) -> None:
        text = re.sub(r"^\[[0-9A-Z]{5}\]\s*", "", text)
        text = re.sub(r"^(?:\[[^\]]*\]\s*)+", "", text)
        text = re.split(r";?\s*\n?\s*(?:DETAIL|CONTEXT|HINT|QUERY|STATEMENT):", text)[0]
        text = re.sub(r";?\s*Error while (?:executing|preparing) .*", "", text, flags=re.S)
        text = re.sub(r"\s*\(-?\d+\)\s*\((?:SQL\w+)\)\s*$", "", text)
        text = self._QUOTED_VALUE.sub(r"\1...\2", text)
        self.sqlstate = sqlstate
        self.text = one_line(re.sub(r"\s+", " ", text)) or "the driver gave no reason"

    @property
    def deadlock(self) -> bool:
        return self.sqlstate in self.DEADLOCK or "deadlock" in self.text.lower()

    @property
    def lost(self) -> bool:
        """The connection is gone, or could not be made for now."""
        if self._REFUSED_TEXT.search(self.text) or self._CERTIFICATE_TEXT.search(self.text):
            return False
        worded = self._LOST_TEXT.search(self.text) is not None
        return self.sqlstate in self.LOST or (self.sqlstate in ("HY000", "HYT00") and worded)

    @property
    def concerns_every_row(self) -> bool:
        """The next call would fail in the same way: no such procedure, no right, no answer."""
        states = self.NO_PROCEDURE | {"42501", "HYT00", "HY008", "57014"}
        pattern = r"(?i)could not find stored procedure|permission was denied"
        return self.sqlstate in states or re.search(pattern, self.text) is not None

    def remedy(self, database: str, procedure: str | None) -> str:
        """What a technician can do.

        `database` is where it happened; `procedure` was called, "" for a statement, None for a
        query.
        """
        state, text = self.sqlstate, self.text
        denied = self._DENIED.search(text)
        if self._CERTIFICATE_TEXT.search(text):
            return (
                "make this machine trust the issuer of the server's certificate, or add "
                "TrustServerCertificate=yes to connectionString"
            )
        if state in ("28000", "28P01") or self._REFUSED_TEXT.search(text):
            return "check user, password and database in connectionString"
        if state == "IM002" or "Can't open lib" in text or "file not found" in text:
            import pyodbc

            installed = ", ".join(pyodbc.drivers()) or "none"
            correct = "correct Driver= in connectionString, or install that driver"
            return f"{correct}; installed: {installed}"
        if state == "HYT00" and not self.lost:
            return self.SLOW
        if self.lost:
            return "check that the database server is running and that no firewall blocks it"
        if denied:
            return self._grant(denied, procedure)
        if state in self.NO_PROCEDURE or "could not find stored procedure" in text.lower():
            return (
                f"run procedures.sql in {database}, where sgsync looked for it, or correct "
                "connectionString if that is the wrong database"
            )
        if state in ("42S02", "42S22", "42P01", "42703", "42601", "42000"):
            return "correct the SQL or the names in config.xml, or run procedures.sql"
        return ""

    @staticmethod
    def _grant(denied: re.Match[str], procedure: str | None) -> str:
        """Which right is missing on what, and how a procedure can do without it."""
        if denied["right"]:  # SQL Server looks no further where both have one owner.
            right, name = denied["right"], f"{denied['schema']}.{denied['object']}"
            instead = f"give {name} the same owner as {procedure}"
        else:
            right, name = "SELECT, INSERT, UPDATE and DELETE", denied["name"]
            if procedure is None:
                right = "SELECT"
            if denied["kind"] in ("schema", "sequence"):
                right = "USAGE"
            if denied["kind"] in ("procedure", "function"):
                right = "EXECUTE"
            instead = f"make {procedure} SECURITY DEFINER, owned by a user who has these rights"
        grant = f"grant {right} on {name} to sgsync's database user"
        return f"{grant}, or {instead}" if procedure and right != "EXECUTE" else grant


# ------------------------------------ ODBC: Database
# Given: a connection string, SQL, values as text.
# Gives: rows in blocks, calls in transactions; each bounded in time, whatever the driver does.
# Raises: DatabaseError, with the driver's words and a remedy.

MSSQL, POSTGRESQL = "Microsoft SQL Server", "PostgreSQL"

# Calls sent as one statement, if the database takes several: measured on both, nothing is faster
# within one transaction but SQL Server's parameter arrays, whose errors cannot be trusted to name
# or to undo the right rows.  With PostgreSQL each statement less is a round trip less.
CALLS_PER_STATEMENT = {MSSQL: 50, POSTGRESQL: 500}
MSSQL_PARAMETERS = 2000  # in one statement; SQL Server allows 2,100
FETCHES = 5  # A change of threads costs as much as many rows.


class Database:
    """The district's database through ODBC.  Raises DatabaseError.

    Every call runs in a thread of its own and is given up after `query_timeout_seconds` and a
    margin, because no ODBC driver bounds all of its waits.
    """

    def __init__(self, settings: DatabaseSettings) -> None:
        self.settings = settings
        self.name = ""  # the product, such as "PostgreSQL"
        self._place = "this database"  # with its name, once that is known
        self._driver = ""  # its file
        self._connection: pyodbc.Connection | None = None
        self._cursor: pyodbc.Cursor | None = None
        self._worker: Worker | None = None
        self._cancelled = threading.Event()
        self._cancelling: list[Future[None]] = []
        self._lock = threading.Lock()  # between `cancel` and what lets go of the connection

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def connect(self) -> None:
        """Connect, unless that has been done."""
        if self._connection:
            return
        try:
            import pyodbc
        except ImportError as error:
            remedy = packages_remedy()
            if "libodbc" in str(error):
                remedy = "install unixODBC (sudo apt-get install unixodbc)"
            raise DatabaseError(
                f"cannot load the ODBC package: {one_line(error)}", remedy
            ) from None
        pyodbc.pooling = False

        def connect() -> tuple[pyodbc.Connection, pyodbc.Cursor]:
            connection = pyodbc.connect(
                self.settings.connection_string, timeout=int(CONNECT_SECONDS), autocommit=False
            )
            with contextlib.suppress(pyodbc.Error):  # the SQLite driver has no query time-out
                connection.timeout = self.settings.query_timeout_seconds
            self.name = str(connection.getinfo(pyodbc.SQL_DBMS_NAME))
            with contextlib.suppress(pyodbc.Error):
                name = one_line(connection.getinfo(pyodbc.SQL_DATABASE_NAME))
                self._place = f"the database {name}" if name else self._place
            self._driver = str(connection.getinfo(pyodbc.SQL_DRIVER_NAME))
            return connection, connection.cursor()

        self._worker = Worker("database")
        try:
            connected = self._run("the database", connect, CONNECT_SECONDS + 10)
        except BaseException:
            self._release()
            raise
        self._connection, self._cursor = connected
        log.info("database: connected to %s", one_line(self.name))

    def close(self) -> None:
        """Roll back what is open, and close."""
        finished(self._release(), 5)

    def _release(self) -> list[Future[None]]:
        """Let go of the connection; its own thread closes it when it is done with its call.

        Only there, and the cursor first: if one thread frees a cursor while another one closes
        its connection, pyodbc leaves an exception behind that strikes unrelated code.
        """
        with self._lock:
            connection, cursor, worker = self._connection, self._cursor, self._worker
            cancelling, self._cancelling = self._cancelling, []
            self._connection = self._cursor = self._worker = None
        if not worker:
            return []

        def release() -> None:
            finished(cancelling, 5)
            if connection and cursor:
                for step in (connection.rollback, cursor.close, connection.close):
                    with contextlib.suppress(Exception):
                        step()

        released = worker.submit(release)
        worker.end()
        return [released]

    def cancel(self) -> None:
        """From another thread: give up the call under way."""
        self._cancelled.set()
        self._interrupt()

    def query(
        self, subject: str, sql: str, each: Callable[[Sequence[Sequence[object]]], T]
    ) -> tuple[Row, Iterator[T]]:
        """Run a query; returns the names of its columns, and what `each` makes of its rows.

        `each` takes up to FETCH_ROWS rows and runs in the thread that fetches them: two threads
        that both work on Python objects only get in each other's way.
        """
        cursor = self._open_cursor()

        def execute() -> Row:
            cursor.execute(sql)
            while cursor.description is None:  # an answer without rows, such as a row count
                if not cursor.nextset():
                    raise DatabaseError(f"{subject}: returns no columns", "write a SELECT")
            return tuple(str(column[0]) for column in cursor.description)

        columns: Row = self._run(subject, execute)
        return columns, self._blocks(subject, cursor, each)

    def _blocks(
        self, subject: str, cursor: pyodbc.Cursor, each: Callable[[Sequence[Sequence[object]]], T]
    ) -> Iterator[T]:
        blocks: Iterator[Any] = iter(lambda: cursor.fetchmany(FETCH_ROWS), [])

        def fetch() -> list[T]:
            return [each(rows) for rows in itertools.islice(blocks, FETCHES)]

        # One more than it works on, so that the thread need not wait for its next order.
        ahead = collections.deque([self._submit(fetch), self._submit(fetch)])
        while made := self._result(subject, ahead.popleft()):
            ahead.append(self._submit(fetch))
            yield from made

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
        self,
        subject: str,
        statements: Sequence[tuple[str, Sequence[str | None]]],
        procedure: str = "",
    ) -> None:
        """Run statements with their parameters one after another, each to its end.

        `procedure` is the one that they call, if they do.
        """
        cursor = self._open_cursor()

        def execute() -> None:
            for sql, parameters in statements:
                types, values = self._typed(parameters)
                cursor.setinputsizes(types)
                cursor.execute(sql, values)
                while cursor.nextset():
                    pass

        self._run(subject, execute, procedure=procedure)

    def _typed(
        self, parameters: Sequence[str | None]
    ) -> tuple[list[tuple[int, int, int]] | None, list[object]]:
        """The types and values for pyodbc.

        On SQL Server every parameter gets a type: so the text that the server compiles is the same
        whatever the lengths, it is compiled once, and Microsoft's driver need not ask the server
        about each NULL (pyodbc does for None, even with a type; not for BinaryNull).  FreeTDS cuts
        an SQL_WVARCHAR off at 4,000 UTF-16 units, up to two a character, and knows no length 0;
        Microsoft's driver makes ntext of SQL_WLONGVARCHAR, which cannot be compared.
        """
        if self.name != MSSQL:
            return None, list(parameters)
        import pyodbc

        short, long = (pyodbc.SQL_WVARCHAR, 4000, 0), (pyodbc.SQL_WLONGVARCHAR, 2**30 - 1, 0)
        if re.search("(?i)msodbcsql|sqlncli", self._driver):
            long = (pyodbc.SQL_WVARCHAR, 0, 0)  # nvarchar(max)
        types = [long if value and len(value) > 2000 else short for value in parameters]
        return types, [pyodbc.BinaryNull if value is None else value for value in parameters]

    def revive(self) -> None:
        """Connect again if the connection was lost while it was idle."""
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
        """Undo what is open.  If that fails, the connection is dropped: that undoes it too."""
        if not self._connection:
            return
        try:
            self._run("rollback", self._connection.rollback)
        except DatabaseError as error:
            log.debug("%s", error.message)
            self.close()

    def spelled(self, sql: str) -> str:
        """`{CALL p}` or `{CALL p(...)}` as a whole statement, as this database wants it."""
        name = r'(?:\[[^\]]*\]|"[^"]*"|[^\s(\["])+'
        call = re.fullmatch(rf"(?is)\{{\s*call\s+({name})\s*(?:\((.*)\))?\s*\}}", sql.strip())
        if not call or self.name not in (MSSQL, POSTGRESQL):
            return sql
        procedure, arguments = call[1], (call[2] or "").strip()
        if self.name == MSSQL:
            return f"EXEC {procedure} {arguments}".rstrip()
        return f"CALL {procedure}({arguments})"

    def calls_per_statement(self, parameters: int) -> int:
        calls = CALLS_PER_STATEMENT.get(self.name, 1)
        if self.name == MSSQL:
            calls = min(calls, MSSQL_PARAMETERS // max(1, parameters))
        return max(1, calls)

    def _open_connection(self) -> pyodbc.Connection:
        self.connect()
        return cast("pyodbc.Connection", self._connection)

    def _open_cursor(self) -> pyodbc.Cursor:
        self.connect()
        return cast("pyodbc.Cursor", self._cursor)

    def _run(
        self,
        subject: str,
        work: Callable[[], T],
        seconds: float = 0,
        procedure: str | None = None,
    ) -> T:
        return self._result(subject, self._submit(work), seconds, procedure)

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        if self._worker is None:
            raise DatabaseError("the database connection was closed", transient=True)
        return self._worker.submit(work)

    def _result(
        self, subject: str, future: Future[T], seconds: float = 0, procedure: str | None = None
    ) -> T:
        """What the call returns.

        After `seconds` the server is asked to cancel it; if even that has no effect, the call is
        left to its thread, and the connection with it.
        """
        seconds, late = seconds or self.settings.query_timeout_seconds, False
        try:
            if not finished([future], seconds, self._cancelled):
                late, more = True, min(CANCEL_SECONDS, seconds)
                self._interrupt()
                if not (
                    finished([future], more, self._cancelled)
                    and finished(self._cancelling, more, self._cancelled)  # or it hits the next one
                ):
                    self._abandon()
        except CancelledError:
            self._abandon()
            raise
        except BaseException:  # Ctrl-C: what follows is to find a connection that listens
            self._interrupt()
            raise
        if late and (not future.done() or future.exception()):
            raise DatabaseError(
                f"{subject}: no answer from the database for {seconds:.0f} s",
                DriverMessage.SLOW,
                sqlstate="HYT00",
            )
        error = future.exception()
        if error is not None and not isinstance(error, Error):
            # Without the driver's own exception, which may quote a row.
            raise self._translated(subject, error, procedure) from None
        return future.result()

    def _interrupt(self) -> None:
        """Ask the server to give up the call under way, from a thread: this may block, too."""
        with self._lock:
            cursor = self._cursor
            if cursor and self.name != "SQLite":  # whose driver frees what another thread reads

                def cancel() -> None:
                    with contextlib.suppress(Exception):
                        cursor.cancel()

                worker = Worker("cancel")
                self._cancelling.append(worker.submit(cancel))
                worker.end()

    def _abandon(self) -> None:
        """Leave a call that does not return to its thread, and its connection with it."""
        self._interrupt()
        self._release()

    def _translated(
        self, subject: str, error: BaseException, procedure: str | None = None
    ) -> DatabaseError:
        import pyodbc

        if not isinstance(error, pyodbc.Error):
            return DatabaseError(f"{subject}: {type(error).__name__}: {one_line(error)}")
        sqlstate, text = (str(error.args[0]), str(error.args[-1])) if error.args else ("", "")
        said = DriverMessage(sqlstate, text)
        if said.lost:
            self._release()
        return DatabaseError(
            f"{subject}: {said.text}",
            said.remedy(self._place, procedure),
            sqlstate=sqlstate,
            transient=said.lost or said.deadlock,
        )


# ------------------------------------ query to CSV: write_query
# Given: an open database and a query.
# Gives: its rows in a CSV file.
# Raises: DatabaseError, Error where the disk fails.

_SPELLINGS: dict[type | None, Callable[[Any], str]] = {  # quick ones, for the most common types
    str: str,
    int: str,
    decimal.Decimal: str,
    bool: ("0", "1").__getitem__,
    datetime.date: functools.lru_cache(10_000)(datetime.date.isoformat),  # A table has few days.
}


def write_query(
    database: Database, subject: str, sql: str, path: Path, tick: Tick, date_format: str | None
) -> int:
    """Write the rows of a query as CSV, header first; returns how many."""
    columns, blocks = database.query(
        subject, sql, lambda rows: (len(rows), csv_lines(rows, date_format))
    )
    count = 0
    with new_file(path) as file:
        file.write(csv_lines([columns]))
        for rows, lines in blocks:
            file.write(lines)
            count += rows
            tick(rows)
        database.drain(subject)
    return count


def csv_lines(rows: Sequence[Sequence[object]], date_format: str | None = None) -> bytes:
    """Rows of database values, each as `to_text` spells it, as RFC 4180 and UTF-8.

    The same as csv.writer makes of them, in a third of the time: a column is converted at once,
    and looked at once for whether anything in it needs quotes.
    """
    columns: list[Sequence[str]] = []
    for values in zip(*rows, strict=True):
        try:
            texts: Sequence[str] = values
            joined = "".join(values)
        except TypeError:  # not all of them are texts
            texts = _column_texts(values, date_format)
            joined = "".join(texts)
        if any(character in joined for character in ',"\r\n'):
            quoted = re.compile('[,"\r\n]').search
            texts = ['"' + t.replace('"', '""') + '"' if quoted(t) else t for t in texts]
        columns.append(texts)
    if len(columns) == 1:  # An empty field alone in its row would be an empty line.
        columns = [[text or '""' for text in columns[0]]]
    lines = map(",".join, zip(*columns, strict=True))
    return ("\r\n".join(lines) + "\r\n").encode()


def _column_texts(values: Sequence[object], date_format: str | None) -> Sequence[str]:
    """The values of a column, which mostly has one type and NULL, as `to_text` spells them."""
    kinds = set(map(type, values)) - {type(None)}
    kind = kinds.pop() if len(kinds) == 1 else None
    spell = None if date_format and kind is datetime.date else _SPELLINGS.get(kind)
    spell = spell or functools.partial(to_text, date_format=date_format)
    texts = ["" if value is None else spell(value) for value in values]
    if kind is decimal.Decimal and "E" in "".join(texts):  # an exponent
        texts = list(map(to_text, values))
    return texts


# ------------------------------------ SQL scripts: SqlScript
#
# Given: the text of a script, and the product that it is for.
# Gives: its batches, and the procedures that it defines.
# Raises: ConfigError where the file cannot be read.


@dataclasses.dataclass(frozen=True)
class Batch:
    """A part of a script that is sent at once, `times` times; its first line is `line`."""

    text: str
    line: int
    times: int


@dataclasses.dataclass(frozen=True)
class Definition:
    """A procedure or function as a script or a database has it.

    SQL Server keeps the whole statement, PostgreSQL the body; None where that cannot be told.
    """

    name: str
    line: int
    text: SqlScript | None


class SqlScript:
    r"""A script with `GO` between its batches, as sqlcmd and Management Studio read it.

        SqlScript("SELECT 1\nGO 2\nSELECT 'a\nGO\nb'", MSSQL).batches()
            == [Batch("SELECT 1\n", 1, 2), Batch("SELECT 'a\nGO\nb'", 3, 1)]

    GO stands alone on its line, perhaps with how many times the batch is to run, and outside
    comments, strings and quoted names.  Source: Microsoft, "SQL Server utilities statements - GO".
    """

    GO = re.compile(r"(?im)^[ \t]*GO(?:[ \t]+([0-9]{1,4}))?[ \t\r]*$")
    NAME = rf"{Parse.IDENTIFIER}(?:\s*\.\s*{Parse.IDENTIFIER})*"
    DEFINES = re.compile(
        r"(?i)(?<!\w)(?:CREATE(?:\s+OR\s+(?:ALTER|REPLACE))?|ALTER)\s+"
        rf"(?:PROC(?:EDURE)?|FUNCTION)\s+({NAME})"
    )
    # An open one reaches to the end.
    STRING = r"'(?:[^']|'')*(?:'|\Z)"
    QUOTED_NAME = r'"(?:[^"]|"")*(?:"|\Z)'
    LEXEMES: typing.ClassVar = {
        MSSQL: rf"(?P<string>{STRING})|(?P<name>{QUOTED_NAME}|\[(?:[^\]]|\]\])*(?:\]|\Z))",
        POSTGRESQL: r"(?P<string>(?P<tag>\$(?:[^\W\d]\w*)?\$)(?s:.*?)(?:(?P=tag)|\Z)"
        rf"|(?<!\w)[eE]'(?:[^'\\]|\\.|'')*(?:'|\Z)|{STRING})|(?P<name>{QUOTED_NAME})",
    }
    LEXEMES[""] = rf"(?P<string>{STRING})|(?P<name>{QUOTED_NAME}|`[^`]*(?:`|\Z))"

    def __init__(self, text: str, product: str) -> None:
        self.text, self.product = text, product
        self.strings: list[tuple[int, int]] = []
        # Of the same length: comments are blank, no line of a string or a quoted name is GO.
        self.code = self._code()

    @classmethod
    def read(cls, path: Path, product: str) -> SqlScript:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read: {error.strerror}",
                f"copy {path.name}, which came with sgsync, into that folder",
            ) from None
        utf_16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
        try:
            return cls(raw.decode("utf-16" if utf_16 else "utf-8-sig"), product)
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise ConfigError(
                f"{path}:{line}: neither UTF-8 nor UTF-16", "save the file as UTF-8"
            ) from None

    def batches(self) -> list[Batch]:
        """Those that contain code, in order."""
        found, start = [], 0
        ends = [(go.start(), go.end(), int(go[1] or 1)) for go in self.GO.finditer(self.code)]
        for end, following, times in [*ends, (len(self.text), len(self.text), 1)]:
            code = self.code[start:end]
            if code.strip():
                start += len(code) - len(code.lstrip("\r\n"))
                line = self.text.count("\n", 0, start) + 1
                found.append(Batch(self.text[start:end], line, times))
            start = following
        return found

    def definitions(self) -> list[Definition]:
        """The procedures and functions that the script defines; of several, the last one counts."""
        found: dict[str, Definition] = {}
        for batch in self.batches():
            script = SqlScript(batch.text, self.product)
            for match in self.DEFINES.finditer(script.code):
                line = batch.line + script.text.count("\n", 0, match.start())
                text = script.defined(match)
                if self.product == POSTGRESQL or not script.code[: match.start()].strip():
                    found[match[1]] = Definition(match[1], line, text)
        return list(found.values())

    def defined(self, match: re.Match[str]) -> SqlScript | None:
        """What the database keeps of the definition whose head is `match`."""
        if self.product != POSTGRESQL:
            return SqlScript(self.text[match.start() :], self.product)
        following = self.DEFINES.search(self.code, match.end())
        end = following.start() if following else len(self.code)
        for start, stop in self.strings:
            head = self.code[match.end() : start].split()
            if match.end() <= start < end and head and head[-1].upper() == "AS":
                text = self.text[start:stop]
                tag = re.match(r"\$\w*\$", text)
                body = text.strip("eE'").replace("''", "'") if tag is None else ""
                if tag:
                    body = text[tag.end() :].removesuffix(tag[0])
                return SqlScript(body, self.product)
        return None

    def comparable(self) -> str:
        """The script without what changes nothing: comments, white space, CREATE or ALTER."""
        words = [self.text[m.start() : m.end()] for m in re.finditer(r"\S+", self.code)]
        head = r"(?i)^(?:CREATE(?: OR ALTER)?|ALTER) PROC(?:EDURE)?(?= )"
        return re.sub(head, "CREATE PROCEDURE", " ".join(words)).replace("\r\n", "\n").rstrip("; ")

    def _code(self) -> str:
        lexemes = self.LEXEMES.get(self.product, self.LEXEMES[""])
        pattern = re.compile(rf"{lexemes}|(?P<comment>--[^\n]*|/\*)")
        pieces, position = [], 0
        while match := pattern.search(self.text, position):
            pieces.append(self.text[position : match.start()])
            end = match.end()
            if match[0] == "/*":
                end = self._end_of_comment(end)
            whole = self.text[match.start() : end]
            if match["comment"]:
                pieces.append(re.sub(r"[^\n]", " ", whole))
            elif match["name"]:
                pieces.append(re.sub(r"\s", "_", whole))
            else:
                self.strings.append((match.start(), end))
                pieces.append("'" + "x" * (len(whole) - 2) + "'" * (len(whole) > 1))
            position = end
        return "".join([*pieces, self.text[position:]])

    def _end_of_comment(self, position: int) -> int:
        """Comments nest, on SQL Server and on PostgreSQL."""
        depth = 1
        for mark in re.compile(r"/\*|\*/").finditer(self.text, position):
            depth += 1 if mark[0] == "/*" else -1
            if not depth:
                return mark.end()
        return len(self.text)


# ------------------------------------ catalog: Catalog
#
# Given: an open database.
# Gives: its procedures, and what is wrong with the call of one; the first rows of a query.
# Raises: DatabaseError.


@dataclasses.dataclass(frozen=True)
class Routine:
    """A procedure (or what is mistaken for one) in a database."""

    schema: str
    name: str
    kind: str  # 'f' is a function
    parameters: int
    optional: int  # of them, at the end
    variadic: bool
    in_path: bool  # found without its schema
    executable: bool
    text: str | None  # None where the database does not show it

    def takes(self, count: int) -> bool:
        """Whether it can be called with so many values."""
        fewest = self.parameters - self.optional - self.variadic
        return count >= fewest and (self.variadic or count <= self.parameters)


class Catalog:
    """The procedures of a database."""

    # Every query gives the fields of Routine.
    QUERIES: typing.ClassVar = {
        MSSQL: """SELECT s.name, o.name, RTRIM(o.type),
    (SELECT COUNT(*) FROM {0}sys.parameters AS p
     WHERE p.object_id = o.object_id AND p.parameter_id > 0),
    0, CASE o.type WHEN 'SN' THEN 1 ELSE 0 END,
    CASE WHEN s.name IN (SCHEMA_NAME(), 'dbo') THEN 1 ELSE 0 END,
    COALESCE(HAS_PERMS_BY_NAME({1}QUOTENAME(s.name) + '.' + QUOTENAME(o.name), 'OBJECT',
        'EXECUTE'), 1),
    m.definition
FROM {0}sys.objects AS o
    INNER JOIN {0}sys.schemas AS s ON s.schema_id = o.schema_id
    LEFT JOIN {0}sys.sql_modules AS m ON m.object_id = o.object_id
WHERE o.type IN ('P', 'PC', 'X', 'SN')""",
        POSTGRESQL: """SELECT n.nspname, p.proname, CAST(p.prokind AS text),
    COALESCE(CARDINALITY(p.proallargtypes), p.pronargs), p.pronargdefaults,
    CAST(p.provariadic <> 0 AS integer), CAST(pg_function_is_visible(p.oid) AS integer),
    CAST(has_function_privilege(p.oid, 'EXECUTE')
        AND has_schema_privilege(n.oid, 'USAGE') AS integer),
    p.prosrc
FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
WHERE p.prokind IN ('p', 'f') AND n.nspname NOT IN ('pg_catalog', 'information_schema')""",
        "": """SELECT routine_schema, routine_name, 'p',
    (SELECT COUNT(*) FROM information_schema.parameters AS p
     WHERE p.specific_schema = r.routine_schema AND p.specific_name = r.specific_name
        AND p.ordinal_position > 0),
    0, 0, CASE WHEN routine_schema = DATABASE() THEN 1 ELSE 0 END, 1, routine_definition
FROM information_schema.routines AS r WHERE routine_type = 'PROCEDURE'""",
    }

    def __init__(self, database: Database) -> None:
        self.database = database
        self._known: dict[str, list[Routine]] = {}

    def find(self, name: str) -> list[Routine]:
        """What a call of `name` may reach; several where PostgreSQL has several of that name."""
        parts = [self._plain(part) for part in re.findall(Parse.IDENTIFIER, name)]
        routines = self._routines(parts[:-2])
        schema = parts[-2] if len(parts) > 1 else ""
        return [
            routine
            for routine in routines
            if self._folded(routine.name) == parts[-1]
            and (self._folded(routine.schema) == schema if schema else routine.in_path)
        ]

    def fault(self, name: str, passes: int | None) -> str:
        """Why a call of `name` with so many values (None: any number) must fail, or ''."""
        found = self.find(name)
        procedures = [routine for routine in found if routine.kind != "f"]
        if not found:
            hidden = ", or this login may not execute it" if self.database.name == MSSQL else ""
            return f"it does not exist{hidden}"
        if not procedures:
            return "it is a function, not a procedure"
        if not any(routine.executable for routine in procedures):
            return "this login may not execute it"
        if passes is not None and not any(routine.takes(passes) for routine in procedures):
            takes = " or ".join(sorted({str(routine.parameters) for routine in procedures}))
            noun = "parameter" if takes == "1" else "parameters"
            return f"it takes {takes} {noun}, but config.xml passes {passes}"
        return ""

    def first_rows(self, subject: str, sql: str, count: int) -> tuple[Row, list[Sequence[object]]]:
        """The columns of a query, and its first rows, `count` at most."""
        columns, blocks = self.database.query(subject, sql, list)
        rows: list[Sequence[object]] = []
        for block in blocks:
            rows += block
            if len(rows) >= count:
                break
        return columns, rows[:count]

    def _routines(self, place: Sequence[str]) -> list[Routine]:
        """All of this database, or of the one that the first parts of a name tell."""
        prefix = "".join(f"[{part.replace(']', ']]')}]." for part in place)
        if prefix not in self._known:
            sql = self.QUERIES.get(self.database.name, self.QUERIES[""])
            if self.database.name == MSSQL:
                quoted = prefix.replace("'", "''")
                sql = sql.format(prefix, f"N'{quoted}' + " if prefix else "")
            _, rows = self.first_rows("the list of procedures", sql, 1_000_000)
            self.database.rollback()
            self._known[prefix] = [self._routine(row) for row in rows]
        return self._known[prefix]

    def _routine(self, row: Sequence[Any]) -> Routine:
        schema, name, kind, parameters, optional, variadic, in_path, executable, text = row
        if self.database.name == MSSQL:
            optional = self._optional(text, parameters)
        return Routine(
            str(schema), str(name), str(kind), int(parameters), int(optional), bool(variadic),
            bool(in_path), bool(executable), text if text is None else str(text),
        )  # fmt: skip

    @staticmethod
    def _optional(text: str | None, parameters: int) -> int:
        """How many parameters have a default: SQL Server tells only by the text of the procedure.

        Where that leaves it open, all may have one.
        """
        script = SqlScript(text or "", MSSQL)
        head = SqlScript.DEFINES.search(script.code)
        body = re.compile(r"(?im)^\s*AS\b").search(script.code, head.end()) if head else None
        return script.code.count("=", head.end(), body.start()) if head and body else parameters

    def _plain(self, part: str) -> str:
        """A part of a name, compared as the database compares it."""
        if part[0] in '["':
            part = part[1:-1]
            return part if self.database.name == POSTGRESQL else part.lower()
        return part.lower()

    def _folded(self, name: str) -> str:
        return name if self.database.name == POSTGRESQL else name.lower()


# ------------------------------------ Oracle: Oracle
# Given: who logs in where, a query with its binds.
# Gives: all rows of the query; the log-in and each query bounded in time.
# Raises: DatabaseError, with Oracle's words and a remedy.

_THICK = 'install Oracle Instant Client and set thickMode="true" on <SchooLinks>'
_DSN = "write POWERSCHOOL_PROD_DB as host:port/service"
ORACLE_ADVICE = {
    "DPY-3010": f"this server is older than Oracle 12.1, which needs thick mode: {_THICK}",
    "DPY-3015": "this account's password is stored in the old 10G format: ask the database "
    f"administrator to set the password again, or {_THICK}",
    "DPY-4011": "run it again; if every connection ends this way, the server may require native "
    f"network encryption, which needs thick mode: {_THICK}",
    "DPY-4000": _DSN,  # not in tnsnames.ora
    "DPY-4026": _DSN,  # no tnsnames.ora
    "DPY-4027": _DSN,  # nor a folder for it
    "DPY-4024": "run it when the database is less busy, or raise queryTimeoutSeconds on "
    "<SchooLinks>",
    "DPI-1047": "install Oracle Instant Client in the version that matches Python (64-bit), and "
    "name its folder in clientDirectory= on <SchooLinks>",
    "ORA-01017": "check POWERSCHOOL_READ_USER and POWERSCHOOL_DB_PASSWORD (the password is "
    "case-sensitive)",
    "ORA-28000": "ask the database administrator to unlock the account POWERSCHOOL_READ_USER",
    "ORA-28001": "the account's password has expired: ask the database administrator for a new "
    "one, and set POWERSCHOOL_DB_PASSWORD to it",
    "ORA-12541": "check host and port in POWERSCHOOL_PROD_DB, that the database is running, and "
    "that no firewall blocks it",
    "ORA-12514": "correct the service name in POWERSCHOOL_PROD_DB (the part after the /), or wait "
    "until the database is open",
    "ORA-00942": "grant SELECT on the table to POWERSCHOOL_READ_USER, or correct its name in "
    "<SchooLinks>",
    "ORA-00904": "correct the column's name in <SchooLinks>, or the table's: it must have a column "
    "studentsdcid",
}
ORACLE_ADVICE["DPY-6005"] = ORACLE_ADVICE["ORA-12541"]  # as thin mode calls it
_PASSING = {"DPY-4011", "DPY-6005", "ORA-12541", "ORA-03113", "ORA-03114", "ORA-01033"}


@dataclasses.dataclass(frozen=True)
class OracleLogin:
    """Who logs in to PowerSchool's database; `dsn` is host:port/service."""

    user: str
    password: str = dataclasses.field(repr=False)
    dsn: str


def oracle_error(subject: str, error: Exception) -> DatabaseError:
    """A driver's error in one line, with the advice for the last code that has one."""
    if isinstance(error, OSError):  # an unknown host name
        remedy = ORACLE_ADVICE["ORA-12541"]
        return DatabaseError(f"{subject}: {one_line(error)}", remedy, transient=True)
    lines = [line for line in str(error).split("\n") if not line.startswith("Help: ")]
    text = re.sub(r" \(CONNECTION_ID=[^)]*\)", "", one_line("\n".join(lines)))
    codes = re.findall(r"\b(?:DPY|DPI|ORA)-\d{4,5}\b", text)
    code = next((code for code in reversed(codes) if code in ORACLE_ADVICE), (codes or [""])[0])
    if "socket timed out" in text:  # DPY-4024 on a connection that went silent
        code = "DPY-4024"
    return DatabaseError(
        f"{subject}: {text}", ORACLE_ADVICE.get(code, ""), transient=code in _PASSING
    )


class Oracle:
    """PowerSchool's database through python-oracledb.  Raises DatabaseError with plain advice.

    Every call runs in a thread of its own and is given up after its time: the driver bounds
    neither the log-in nor a connection that has gone silent.
    """

    def __init__(self, settings: SchooLinksSettings, login: OracleLogin) -> None:
        self.settings, self.login = settings, login
        self._connection: oracledb.Connection | None = None
        self._worker: Worker | None = None

    def __enter__(self) -> Oracle:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._worker:
            if connection := self._connection:
                finished([self._worker.submit(connection.close)], 5)
            self._worker.end()
        self._connection = self._worker = None

    def connect(self) -> None:
        """Connect; with Oracle's own client if `thickMode` or `clientDirectory` says so."""
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

        self._worker = Worker("oracle")
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
        """What `work` returns, within `seconds`."""
        import oracledb

        future = cast("Worker", self._worker).submit(work)
        if not finished([future], seconds):
            remedy = ORACLE_ADVICE["DPY-4024" if self._connection else "ORA-12541"]
            self._connection = self._worker = None  # left to its thread
            raise DatabaseError(f"{subject}: no answer for {seconds:.0f} s", remedy)
        error = future.exception()
        if isinstance(error, (oracledb.Error, OSError)):
            raise oracle_error(subject, error) from error
        return future.result()


# ------------------------------------ log-ins of SchooLinks: schoolinks_credentials
# Given: <SchooLinks>, and variables of the environment.
# Gives: who logs in to PowerSchool and to SchooLinks' server.
# Raises: ConfigError that names every missing variable.


def schoolinks_address() -> tuple[str, int]:
    """Host and port of SchooLinks' server, from the environment.  Raises ConfigError."""
    address = required_variables("SCHOOLINKS_SFTP_ADDRESS")[0].removeprefix("sftp://").rstrip("/")
    match = re.fullmatch(r"(?:\[([^\]\s]+)\]|([^:/@\s]+))(?::(\d{1,5}))?", address, re.ASCII)
    if not match or not 0 < int(match[3] or 22) < 65536:
        raise ConfigError(  # without the value: it may hold a password
            "SCHOOLINKS_SFTP_ADDRESS is not an address", "set it to the host, or host:port, alone"
        )
    return match[1] or match[2], int(match[3] or 22)


def schoolinks_credentials(
    settings: SchooLinksSettings, home: Path, *, upload: bool
) -> tuple[OracleLogin, SftpSettings | None]:
    """The log-ins from the environment, that of SchooLinks only for an upload.

    Raises ConfigError that names every missing variable.
    """
    names = ["POWERSCHOOL_READ_USER", "POWERSCHOOL_DB_PASSWORD", "POWERSCHOOL_PROD_DB"]
    if upload:
        names.append("SCHOOLINKS_SFTP_USERNAME")
        if not settings.private_key:
            names.append("SCHOOLINKS_SFTP_PASSWORD")
        names.append("SCHOOLINKS_SFTP_ADDRESS")
    login = OracleLogin(*required_variables(*names)[:3])
    if not upload:
        return login, None
    host, port = schoolinks_address()
    beside = home / "known_hosts"
    login_advice = "check SCHOOLINKS_SFTP_USERNAME and SCHOOLINKS_SFTP_PASSWORD"
    if settings.private_key:
        login_advice = (
            "check SCHOOLINKS_SFTP_USERNAME, and that SchooLinks has the public key of this "
            "private key"
        )
    server = SftpSettings(
        host=host,
        port=port,
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
    return login, server


# ==================================== STAGES
# The steps of a run, each given connections and its part of the configuration.


# ------------------------------------ stage: download
# Given: a connection to SameGoal.
# Gives: the files of the newest complete extract.
# Raises: TransferError, Error where the disk fails.


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


# ------------------------------------ stage: export
# Given: a database and a SQLDiff.
# Gives: the rows of its query as a CSV file.
# Raises: DatabaseError, Error where the disk fails.


def export(database: Database, diff: SqlDiff, path: Path, tick: Tick) -> int:
    """Stream the rows of a SQLDiff's query into a CSV file; returns how many."""
    subject = f"{path.parent.name}/{path.name}: the query ({diff.where})"
    try:
        return write_query(database, subject, diff.query, path, tick, diff.date_format)
    finally:
        database.rollback()  # Nothing was to be changed; let go of what reading may have locked.


# ------------------------------------ differences of format: FormatDifferences
# Given: the changes of a comparison.
# Gives: those that no attribute such as `ignoreCase` ignores, and sentences about values that are
#     equal but written differently.  Raises: nothing.


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
        "number": ("number format", 'ignoreNumberFormat="true"'),
        "date": ("date format", ""),
    }

    def __init__(self, sql_diff: SqlDiff, key: Key, columns: Row) -> None:
        self._file, self._key, self._columns = sql_diff.file, key, columns
        ignored = {
            "case": sql_diff.ignore_case,
            "number": sql_diff.ignore_number_format,
            "breaks": sql_diff.ignore_line_breaks,
        }
        self._ignored = {kind for kind, is_set in ignored.items() if is_set}
        self._ignored_columns = {
            index for index, name in enumerate(columns) if name in sql_diff.ignore_columns
        }
        tolerance = dict(sql_diff.tolerance)
        self._tolerance = {
            index: tolerance[name] for index, name in enumerate(columns) if name in tolerance
        }
        self._updates = self._formal = 0
        # (column, kind): how many, and for the first of them its row's key and both values
        self._found: dict[tuple[int, str], tuple[Any, ...]] = {}
        self._dates: dict[int, set[tuple[str, str]]] = {}  # column: formats of both sides

    def not_ignored(self, changes: list[bytes]) -> list[bytes]:
        """The changes without the updates of which the SQLDiff ignores every difference."""
        if not (self._ignored or self._ignored_columns or self._tolerance):
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
        """The columns in which an update's two rows differ, and the kind of each difference.

        Without the columns that are ignored, and the numbers that differ no more than tolerated.
        """
        fields = change.split(b"\0")
        end = 1 + len(self._columns)
        return {
            index: self.kind(*decode_row(b"\0".join(pair)))
            for index, pair in enumerate(zip(fields[1:end], fields[end:], strict=True))
            if pair[0] != pair[1]
            and index not in self._ignored_columns
            and not (index in self._tolerance and self._tolerated(index, *pair))
        }

    def _tolerated(self, index: int, before: bytes, after: bytes) -> bool:
        numbers = [self._number(decode_row(field)[0]) for field in (before, after)]
        if not all(isinstance(number, decimal.Decimal) for number in numbers):
            return False
        one, other = cast("list[decimal.Decimal]", numbers)
        return abs(one - other) <= self._tolerance[index]

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


# ------------------------------------ stage: diff
#
# Given two sorted CSV files; gives the diff file and its counts; raises DataError where the files
# cannot be compared, before anything but the diff file is written.


def compare(source: Path, target: Path, changes: Path, sql_diff: SqlDiff) -> Comparison:
    """`diff` into the file `changes`, where a source of 0 bytes is one without rows."""
    with new_file(changes) as out:
        comparison = diff(source, target, out, sql_diff, may_be_empty=True)
    comparison.changes, comparison.source = changes, source
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
        new_columns: Row = ()
        if files[0].columns or not files[1].columns or not may_be_empty:
            new_columns = leave_out_columns(sql_diff, *files)
            check_columns(*files)
        columns = files[1].columns
        key = Key(sql_diff.key, columns, shown[1])
        sides = []
        for file in files:
            in_order: Iterator[Block] | None = None
            if sql_diff.sort:
                in_order = stack.enter_context(contextlib.closing(Sorter(file, key).blocks()))
            elif any(each.leaves_out for each in files):  # Raw rows are equal no more.
                in_order = file.blocks()
            sides.append(OrderedRows(file, key, in_order))
        comparison = Comparison(sql_diff, columns, key, new_columns=new_columns)
        formats = FormatDifferences(sql_diff, key, columns)
        names = (f"{side}_{name}" for side in ("before", "after") for name in columns)
        header = "\0".join(["operation", *names]).encode("utf-8").replace(b"\n", LINE_BREAK)
        changes.write(encode_rows([header]))
        for found in merge(sides[0], sides[1], len(columns)):
            left = formats.not_ignored(found)
            formats.look_at(left)
            comparison.add(left)
            changes.write(encode_rows(left))
    comparison.format_differences = formats.sentences()
    comparison.source_rows, comparison.target_rows = sides[0].rows, sides[1].rows
    return comparison


def leave_out_columns(sql_diff: SqlDiff, source: CsvFile, target: CsvFile) -> Row:
    """Leave out what only one side has and config.xml names; returns the new columns among it."""
    ours, theirs, ignored = source.columns, target.columns, sql_diff.ignore_columns
    target.leave_out(name for name in theirs if name in ignored and name not in ours)
    extra = [name for name in ours if name not in theirs]
    new = [name for name in extra if name not in ignored]
    if sql_diff.new_columns != "report" or not set(ours) & set(theirs):
        new = []
    source.leave_out(name for name in extra if name in ignored or name in new)
    return tuple(new)


def new_columns_warning(found: Comparison) -> str:
    """What takes in the columns that only SameGoal's file has, in SQL Server's words."""
    sql_diff, names = found.sql_diff, [one_line(name) for name in found.new_columns]
    calls = [sql_diff.calls[name] for name in (INSERT, UPDATE) if name in sql_diff.calls]
    procedures = list(dict.fromkeys(call.procedure or "its SQL" for call in calls))
    lines = [
        f"{sql_diff.file}: SameGoal's file has new columns, which are neither compared nor "
        f"passed: {', '.join(names)}",
        f"Try: to take them in, add these lines (the types are a guess), and order the query's "
        f"columns as in ia/{sql_diff.file}:",
    ]
    for name in names:
        lines += [
            f"query ({sql_diff.where}): d.{name},",
            f"procedure {' and '.join(procedures) or 'to be written'}: @{name} nvarchar(4000),",
            f"table: ALTER TABLE ... ADD {name} nvarchar(4000) NULL",
        ]
    return "\n".join(lines)


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


# ------------------------------------ stage: over_limits
# Given: what was compared, the limits, what earlier runs found.
# Gives: what goes beyond a limit, in words.
# Raises: Error where the disk fails.


@dataclasses.dataclass(frozen=True)
class Excess:
    """Changes of one file and operation that go beyond their limit; counts are rows."""

    sentence: str
    changes: int
    approved: bool  # by a person who saw them in a held run


USUAL_RUNS = 30  # complete runs that show what is usual
USUAL_ROWS = 20  # changes that are never unusual


def past_files(earlier: Iterable[KeptRun]) -> dict[str, list[FileSummary]]:
    """File -> what the last complete runs found for it, newest first."""
    past: dict[str, list[FileSummary]] = {}
    complete = (run.summary for run in earlier if run.complete and run.summary)
    for summary in itertools.islice(complete, USUAL_RUNS):
        for file in summary.files:
            past.setdefault(file.file, []).append(file)
    return past


def over_limits(
    comparisons: Sequence[Comparison],
    limits: Limits,
    past: Mapping[str, Sequence[FileSummary]],
    approved: Path | None,
) -> list[Excess]:
    """What goes beyond the limits: of config.xml, and of what is usual.

    Changes that the diff files in the folder `approved` show count as approved.  A source without
    rows is over every limit while the database has rows, and so is an empty export of the database
    if the last complete run left rows there.
    """
    excesses = []
    for found in comparisons:
        sql_diff, total = found.sql_diff, found.target_rows
        bounds = _bounds(found, limits, past.get(sql_diff.file, ()))
        for operation in OPERATIONS:
            changes = found.count(operation)
            beyond = [(limit, name) for limit, name in bounds[operation]
                      if not limit.allows(changes, total)]  # fmt: skip
            if not beyond:
                continue
            limit, name = beyond[0]
            shown = approved / sql_diff.file if approved else None
            left = _unapproved(found.changes, shown, operation)
            unseen = f" ({left:,} of them not approved)" if 0 < left < changes else ""
            first = "; ".join(map(found.key.show, itertools.islice(found.rows(operation), 3)))
            sentence = (
                f"{sql_diff.file}: {plural(changes, operation)}{unseen} of "
                f"{plural(total, 'row')}, {name} is {limit}; they begin with {first}"
            )
            allowed = all(limit.allows(left, total) for limit, _ in beyond)
            excesses.append(Excess(sentence, changes, allowed))
    return excesses


def _bounds(
    found: Comparison, limits: Limits, past: Sequence[FileSummary]
) -> dict[str, list[tuple[Limit, str]]]:
    """Operation -> its limits, each with the name that a message gives it."""
    own, nothing = found.sql_diff, Limit(0, percent=False)
    bounds: dict[str, list[tuple[Limit, str]]] = {
        DELETE: [(own.max_deletes or limits.max_deletes, "maxDeletes")],
        UPDATE: [(own.max_updates or limits.max_updates, "maxUpdates")],
        INSERT: [],
    }
    if not found.source_rows and found.target_rows:
        bounds[DELETE] = [(nothing, "SameGoal's file is empty, so the limit")]
    inserts = own.max_inserts or limits.max_inserts
    if inserts and not (inserts.percent and found.target_rows < limits.min_rows):
        bounds[INSERT].append((inserts, "maxInserts"))
    before = past[0].rows_left if past else 0
    if before and not found.target_rows:
        name = (
            f"the query returned no rows, after {before:,} in the last complete run, so the limit"
        )
        bounds[INSERT].insert(0, (nothing, name))
    if limits.usual and past:
        for operation in OPERATIONS:
            counts = [file.tally(operation).found for file in past]
            most = max(USUAL_ROWS, int(max(counts) * limits.usual))
            name = f"usual are {min(counts):,} to {max(counts):,} in a run, the limit"
            bounds[operation].append((Limit(most, percent=False), name))
    return bounds


def _unapproved(changes: Path, approved: Path | None, operation: str) -> int:
    """How many changes of `operation` do not stand in the approved diff file, to the letter."""

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


# ------------------------------------ stage: apply
# Given: a database, and a comparison with its diff file.
# Gives: calls for the rows that differ; the rows that were refused, in failures.csv.
# Raises: DatabaseError where no row is to blame, or too many are; ConfigError.


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
    """The rows that the database refused: failures.csv, and failures/FILE to correct them in.

    The second has them as the source has them, so that they can be imported again; a row that was
    to be deleted is in failures.csv only.  The files are made with the first row in them.
    """

    HEADER = ("operation", "key", "line", "procedure", "error")

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.rows: set[tuple[str, str, str]] = set()  # file, operation, key

    def add(self, found: Comparison, operation: str, row: Row, error: DatabaseError) -> None:
        """Keep a row that failed; raises DatabaseError for one more than `limit`."""
        file, key = found.sql_diff.file, found.key.show(row)
        procedure = found.sql_diff.calls[operation].procedure or "SQL"
        line = str(found.line_of(row) or "") if operation != DELETE else ""
        told = (operation, key, line, procedure, redact(error.message))
        self._append(self.folder / FAILURES_NAME, self.HEADER, told)
        if operation != DELETE:
            self._append(self.folder / "failures" / file, found.columns, row)
        self.rows.add((file, operation, key))
        named = error.message.startswith(procedure)
        reason = error.message if named else f"{procedure}: {error.message}"
        log.error("%s of %s failed: %s", operation, key, reason)
        if len(self.rows) > self.limit:
            raise DatabaseError(
                f"stopped: more than maxFailures={self.limit} rows failed; the last one: "
                f"{operation} of {key}: {reason}",
                f"look at {self.folder / FAILURES_NAME}; the rows already written stay, and the "
                "next run continues from there",
            )

    @staticmethod
    def _append(path: Path, header: Sequence[str], row: Sequence[str]) -> None:
        """At once, whatever happens to the run afterwards."""
        with local_errors(path):
            path.parent.mkdir(exist_ok=True)
            new = not path.exists()
            with path.open("a", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([header, row] if new else [row])


class Applier:
    """Calls one procedure (or statement) for the rows of one operation, batch by batch."""

    def __init__(
        self,
        database: Database,
        found: Comparison,
        operation: str,
        tally: Tally,
        failures: Failures,
    ) -> None:
        self.database, self.operation, self.failures = database, operation, failures
        self.found, self.tally = found, tally
        self.file, self.key = found.sql_diff.file, found.key
        self.call = found.sql_diff.calls[operation]
        passed = [n for n in found.columns if n not in found.sql_diff.ignore_columns]
        default = found.key.names if operation == DELETE else passed
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
            self.tally.applied += len(rows)
            return
        for row in rows:
            self._single(row)

    def _single(self, row: Row) -> None:
        try:
            retried(lambda: self._batch([row]))
        except DatabaseError as error:
            masked = self._masked(error, [row])
            said = DriverMessage(error.sqlstate, error.message)
            if error.transient or said.concerns_every_row:
                raise DatabaseError(
                    f"{self.file}: {self.operation} of {self.key.show(row)}: {masked.message}",
                    masked.remedy,
                    sqlstate=error.sqlstate,
                ) from None
            self.tally.failed += 1
            self.failures.add(self.found, self.operation, row, masked)
        else:
            self.tally.applied += 1

    def _batch(self, rows: Sequence[Row]) -> None:
        """All rows in one transaction; it is rolled back whole at the first error."""
        database = self.database
        database.connect()
        procedure, width = self.call.procedure or "", len(self._indexes)
        subject = procedure or f"the statement of <{self.operation.title()}>"
        marks = ", ".join("?" * width)
        text = f"{{CALL {procedure}({marks})}}" if procedure else self.call.statement
        call = database.spelled(text.rstrip("; \n\t"))
        end = "\n;" if database.name == MSSQL else ""  # MERGE demands it.
        statements = [
            (
                "\n;\n".join([call] * len(part)) + end,  # The statement may end in a comment.
                [row[index] or None for row in part for index in self._indexes],
            )
            for part in batched(rows, database.calls_per_statement(width))
        ]
        try:
            database.execute_all(subject, statements, procedure)
            database.commit()
        except BaseException:
            database.rollback()
            raise

    def _masked(self, error: DatabaseError, rows: Sequence[Row]) -> DatabaseError:
        """The error without what it quotes of the rows: only the key may be shown."""
        keys = {one_line(row[index]) for row in rows for index in self.key.indexes}
        values = {one_line(value) for row in rows for value in row} - keys
        message = masked(error.message, keys, values)
        return DatabaseError(message, error.remedy, sqlstate=error.sqlstate)


def masked(text: str, keys: Iterable[str], values: Iterable[str]) -> str:
    """The text with `...` for every whole word, or words, that is one of `values`.

    A key in the text stays whole, even where a part of it equals a value: `2026-01-05` where
    another column holds `05`.  A value that reaches beyond the key is masked.
    """

    def spans(words: Iterable[str]) -> list[tuple[int, int]]:
        found = []
        for word in words:
            if len(word) > 1 and word in text:  # a single character tells nothing
                whole = re.compile(rf"(?<!\w)(?={re.escape(word)}(?!\w))")
                found += [(m.start(), m.start() + len(word)) for m in whole.finditer(text)]
        return sorted(found)

    kept, parts, end = spans(keys), [], 0
    for first, last in spans(values):
        if last <= end or any(a <= first and last <= b for a, b in kept):
            continue
        if first >= end:  # else it only makes the last mask longer
            parts += [text[end:first], "..."]
        end = last
    return "".join(parts) + text[end:]


def apply(
    database: Database, found: Comparison, summary: FileSummary, failures: Failures, tick: Tick
) -> None:
    """Call the procedures of a SQLDiff for the rows of its diff file: deletes, updates, inserts.

    The diff file is the evidence, and just what it holds is applied.  `summary` is kept true after
    every transaction.
    """
    calls = found.sql_diff.calls
    for operation in OPERATIONS:
        count = found.count(operation)
        if count and operation not in calls:
            log.info(
                "%s: %s left alone: config.xml has no <%s> for this file",
                summary.file, plural(count, operation), operation.title(),
            )  # fmt: skip
        elif count:
            applier = Applier(database, found, operation, summary.tally(operation), failures)
            for batch in batched(found.rows(operation), database.settings.batch_size):
                applier.apply(batch)
                tick(len(batch))


# ------------------------------------ stage: run_statements
# Given: a database and the statements of <Upload>.
# Gives: their effect, and the CSV files of those with file=.
# Raises: DatabaseError.


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


# ------------------------------------ stage: push
# Given: a connection to SameGoal and the folder of a run.
# Gives: the folder on the server, COMPLETE last.
# Raises: TransferError.


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


# ------------------------------------ stage: StudentFiles
# Given: PowerSchool's database.
# Gives: the rows of SchooLinks' files: attendance, GPA and tags.
# Raises: DatabaseError where a query fails, DataError where a query has more than one row for a
#     student, or for a student's day.


def plain_text(value: object) -> str:
    """A value without the blanks around it; NULL is empty."""
    return str(value) if value.__class__ is int else to_text(value).strip()


def number_text(value: object) -> str:
    """A number as Python prints it, but without an exponent; text stays text, NULL is empty."""
    if isinstance(value, float) and "e" not in (text := repr(value)):
        return text
    return plain_text(value)


def same_value(value: object, wanted: str) -> bool:
    """True if a column holds the value that the configuration names: 1, 1.0 and '1' are equal."""
    text = plain_text(value)
    try:
        return text == wanted or decimal.Decimal(text) == decimal.Decimal(wanted)
    except decimal.InvalidOperation:
        return False


@dataclasses.dataclass
class Section:
    """One file for SchooLinks: its rows, and the students without a row, by reason.

    Its first `key_width` columns identify a row.  `null_days` counts the days that attendance
    leaves out because a value is NULL.
    """

    name: str  # what a student loses who is missing from the file
    file: str
    header: Row
    key_width: int = 1
    rows: list[Row] = dataclasses.field(default_factory=list)
    without: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    null_days: int = 0
    why_empty: str = ""  # the likely cause, where the file has no rows
    # By how much one more day changes a student's value at most; else any difference is a change.
    daily_change: dict[str, float] = dataclasses.field(default_factory=dict)

    def skip(self, student: str, reason: str) -> None:
        self.without.setdefault(reason, []).append(student)

    def summary(self) -> SectionSummary:
        without = {reason: len(students) for reason, students in self.without.items()}
        return SectionSummary(self.file, self.name, len(self.rows), without, self.null_days)

    def write(self, folder: Path, quoting: str) -> None:
        """Write the file, and log what is in it: counts and identifiers, nothing else."""
        style: Literal[0, 1] = csv.QUOTE_ALL if quoting == "all" else csv.QUOTE_MINIMAL
        with csv_writer(folder / self.file, style) as write:
            write([self.header])
            write(self.rows)
        log.info("%s: %s", self.file, plural(len(self.rows), "row"))
        if self.null_days:
            log.info("%s: %s not counted: the attendance or membership value is NULL",
                     self.file, plural(self.null_days, "day"))  # fmt: skip
        for reason, students in self.without.items():
            shown = ", ".join(map(one_line, students[:20])) + (", ..." if students[20:] else "")
            log.info("%s: %s left out (%s)%s", self.file, plural(len(students), "student"), reason,
                     f": {shown}" if students[0] else "")  # fmt: skip


class Query(NamedTuple):
    """A SELECT with the values of its binds; only fixed text and checked names are in the SQL."""

    sql: str
    binds: dict[str, object]

    def run(self, powerschool: Oracle) -> list[Sequence[Any]]:
        # Oracle itself may not name the table that it does not find.
        tables = ", ".join(re.findall(r"(?:FROM|JOIN) (\S+)", self.sql))
        return powerschool.query(f"PowerSchool: the query of {tables}", self.sql, self.binds)


class StudentFiles:
    """SchooLinks' files of all active students, as PowerSchool has them on one day.

    Two queries, however many students there are; Oracle 12.1 or newer.
    """

    def __init__(self, settings: SchooLinksSettings, today: datetime.date) -> None:
        self.settings, self.today = settings, today
        self.column = settings.identifier_column
        month, day = settings.school_year_start
        past = (today.month, today.day) >= (month, day)
        self.year_start = datetime.date(today.year if past else today.year - 1, month, day)

    def student_query(self) -> Query:
        """One row per student: identifier, the two GPAs, one column for each tag.

        The highest identifier comes first.
        """
        gpa, tags = self.settings.gpa, self.settings.tags
        wanted: list[tuple[str, str]] = []  # table and column
        if gpa.enabled:
            wanted += [(gpa.table, gpa.unweighted), (gpa.table, gpa.weighted)]
        if tags.enabled:
            wanted += [(tag.table, tag.column) for tag in tags.tags]
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
        where, binds = self._active_students()
        lines = [
            f"SELECT {', '.join([f's.{self.column}', *columns])}",
            "FROM students s",
            *joins,
            f"WHERE {where}",
            f"ORDER BY s.{self.column} DESC",
        ]
        return Query("\n".join(lines), binds)

    def attendance_query(self) -> Query:
        """One row per student with days in this school year, up to today.

        Identifier, days present, days of membership, days counted, days with a NULL, rows beyond
        one per day.  A NULL attendance value has no conversion: such a day counts on neither side.
        """
        midnight = datetime.time()
        where, binds = self._active_students()
        binds["year_start"] = datetime.datetime.combine(self.year_start, midnight)
        binds["today"] = datetime.datetime.combine(self.today, midnight)
        both = "a.attendancevalue IS NOT NULL AND a.membershipvalue IS NOT NULL"
        sql = f"""SELECT s.{self.column},
    SUM(CASE WHEN {both} THEN a.attendancevalue END) days_present,
    SUM(CASE WHEN {both} THEN a.membershipvalue END) days_member,
    SUM(CASE WHEN {both} THEN 1 ELSE 0 END) days_counted,
    SUM(CASE WHEN {both} THEN 0 ELSE 1 END) days_null,
    COUNT(*) - COUNT(DISTINCT a.calendardate) days_doubled
FROM students s
JOIN {self.settings.attendance.view} a ON a.studentid = s.id AND a.fteid = s.fteid
WHERE {where}
    AND a.calendardate >= :year_start AND a.calendardate <= :today
GROUP BY s.{self.column}"""  # noqa: S608
        return Query(sql, binds)

    def _active_students(self) -> tuple[str, dict[str, object]]:
        grades, school = self.settings.grades, self.settings.ignored_school
        binds: dict[str, object] = {f"grade{i}": grade for i, grade in enumerate(grades)}
        marks = ", ".join(f":{name}" for name in binds)
        where = f"s.enroll_status = 0 AND s.grade_level IN ({marks})"
        if school is not None:
            where += " AND s.schoolid <> :school"
            binds["school"] = school
        return where, binds

    def build(self, powerschool: Oracle) -> list[Section]:
        """Query PowerSchool, and make the rows of every file that is switched on."""
        settings = self.settings
        students: dict[str, Sequence[Any]] = {}  # identifier -> the values behind it
        unidentified = 0
        for identifier, *values in self.student_query().run(powerschool):
            student = plain_text(identifier)
            if not student:
                unidentified += 1
            elif student in students:
                raise DataError(
                    f"PowerSchool: student {one_line(student)} appears more than once: a table of "
                    "<GPA> or <Tag> has several rows for one student, or two students have the "
                    f"same {settings.identifier}",
                    "name a table with one row per student (its key is studentsdcid), or correct "
                    f"the {settings.identifier} in PowerSchool",
                )
            else:
                students[student] = values
        log.info("PowerSchool: %s", plural(len(students), "student"))
        if unidentified:
            count = plural(unidentified, "student")
            log.warning("PowerSchool: %s left out: no %s (students.%s is empty)",
                        count, settings.identifier, self.column)  # fmt: skip
        sections = []
        if settings.attendance.enabled:
            sections.append(self._attendance(students, self.attendance_query().run(powerschool)))
        if settings.gpa.enabled:
            sections.append(self._gpa(students))
        if settings.tags.enabled:
            sections.append(self._tags(students))
        for section in sections:
            for _ in range(unidentified):
                section.skip("", f"no {settings.identifier}")
        return sections

    def _attendance(self, students: Collection[str], found: Iterable[Sequence[Any]]) -> Section:
        """Days present over days of membership, as a fraction or a percentage; zero stays."""
        settings = self.settings.attendance
        header = (self.settings.identifier, "attendance_percentage")
        section = Section("attendance", settings.file, header)
        scale = 100 if settings.scale == "percent" else 1
        days = {plain_text(row[0]): row[1:] for row in found}
        doubled, example = 0, ""
        for student in students:
            present, member, counted, missing, more = days.get(student, (None, None, 0, 0, 0))
            section.null_days += int(missing)
            if more:
                doubled, example = doubled + int(more), example or student
            if member:
                share = float(present) * scale / float(member)
                section.rows.append((student, number_text(share)))
                section.daily_change[student] = scale / float(member)
            else:
                only_null = missing and not counted
                section.skip(student, "only NULL days" if only_null else "no membership days")
        view, every_mode = settings.view, "ps_adaadm_defaults_all"
        if doubled:
            other = "ps_adaadm_daily_ctod" if view.lower().endswith(every_mode) else every_mode
            raise DataError(
                f"PowerSchool: {view} has more than one row for {plural(doubled, 'student-day')}, "
                f"for example for student {one_line(example)}",
                "set view= on <Attendance> to a view with one row per student and day, such as "
                f"{other}",
            )
        if students and not section.rows:
            section.why_empty = (
                f"{view} has no membership days since {self.year_start} for "
                f"{plural(len(students), 'student')}; view= on <Attendance> may be for another "
                "attendance mode"
            )
        return section

    def _gpa(self, students: Mapping[str, Sequence[Any]]) -> Section:
        """The two GPAs; where a student has only one, the other stays blank."""
        header = (self.settings.identifier, "numerator_unweighted", "numerator_weighted")
        section = Section("GPA", self.settings.gpa.file, header)
        for student, (unweighted, weighted, *_) in students.items():
            row = (student, number_text(unweighted), number_text(weighted))
            if row[1] or row[2]:
                section.rows.append(row)
            else:
                section.skip(student, "no GPA")
        return section

    def _tags(self, students: Mapping[str, Sequence[Any]]) -> Section:
        """One row for each tag of a student; of tags with the same name, the first that applies."""
        header = (self.settings.identifier, "name", "detailed_name", "description")
        section = Section("tags", self.settings.tags.file, header, key_width=2)
        tags = self.settings.tags.tags
        for student, values in students.items():
            rows: dict[str, Row] = {}
            for tag, value in zip(tags, values[len(values) - len(tags) :], strict=True):
                if value is not None and same_value(value, tag.equals):
                    rows.setdefault(
                        tag.name, (student, tag.name, tag.detailed_name, tag.description)
                    )
            section.rows += rows.values()
        return section


# ------------------------------------ stage: UploadGuard
# Given: tonight's files, and the history.
# Gives: whether they may be uploaded; the uploaded files.
# Raises: HeldError where SchooLinks would lose what it should keep, TransferError.


SMALL_GROUP = 10  # A value that fewer students share could tell who they are.


def close_value(before: str, after: str, may_differ: float) -> bool:
    """True if two texts are the same number, or numbers that differ by no more than that."""
    try:
        difference = abs(float(before) - float(after))
    except ValueError:
        return False
    return difference <= may_differ * (1 + 1e-9)


@dataclasses.dataclass(frozen=True)
class LastUpload:
    """A section's file as SchooLinks has it."""

    epoch: str
    header: Row
    rows: list[Row]
    days: int  # since then, counting both ends


class UploadGuard:
    """Compares tonight's files with the last live uploads.

    SchooLinks deletes (tags) or archives (GPA) what a file lacks, and takes any value: after an
    import into PowerSchool that failed, an upload would do harm.
    """

    def __init__(
        self, settings: SchooLinksSettings, earlier: Sequence[KeptRun], today: datetime.date
    ) -> None:
        self.settings, self.earlier, self.today = settings, earlier, today

    def check(self, sections: Sequence[Section], *, force: bool) -> None:
        """Raises HeldError with every reason not to upload the files, unless forced."""
        reasons: list[str] = []
        for section in sections:
            last = self._last_upload(section.name)
            if not last:
                log.info("%s: no earlier upload in history to compare with", section.file)
            reasons += self._reasons(section, last)
        if reasons and not force:
            raise HeldError(
                f"nothing was uploaded: {'; '.join(reasons)}",
                "check the files in this run's folder, and PowerSchool; if they are right, run "
                "again with --force",
            )
        for reason in reasons:
            log.warning("%s; ignored (--force)", reason)

    def _last_upload(self, name: str) -> LastUpload | None:
        """The newest live upload of a section, where history still has it.

        A run that was damaged is skipped: the one before it is a comparison, too.
        """
        for run in self.earlier:
            for section in run.summary.sections if run.summary else ():
                if section.section == name and section.uploaded == "live":
                    with contextlib.suppress(OSError, ValueError, TypeError, csv.Error):
                        return self._read(run, section)
        return None

    def _read(self, run: KeptRun, section: SectionSummary) -> LastUpload:
        """Raises OSError, ValueError or csv.Error where the file is gone or damaged."""
        with (run.folder / section.file).open(encoding="utf-8", newline="") as file:
            header, *rows = map(tuple, csv.reader(file))
        if any(len(row) != len(header) for row in rows):
            raise ValueError(f"{section.file}: its rows differ in length")
        began = datetime.date.fromisoformat(cast("RunSummary", run.summary).started[:10])
        days = max(0, (self.today - began).days) + 1
        return LastUpload(run.epoch, header, rows, days)

    def _reasons(self, section: Section, last: LastUpload | None) -> Iterator[str]:
        """Why a file must not be uploaded, in words."""
        rows = len(section.rows)
        if not rows:
            why = f" ({section.why_empty})" if section.why_empty else ""
            lost = f": {self._losses(section, last)}" if last else ""
            yield f"{section.file}: has no rows{why}{lost}"
        elif last and last.header != section.header:
            pairs = itertools.zip_longest(section.header, last.header, fillvalue="nothing")
            new, old = next((new, old) for new, old in pairs if new != old)
            yield (
                f"{section.file}: its header has {new} where the upload of {last.epoch} has "
                f"{shortened(one_line(old))}: all {plural(len(last.rows), 'row')} would be replaced"
            )
        elif last:
            if not self.settings.max_shrink.allows(len(last.rows) - rows, len(last.rows)):
                yield (
                    f"{section.file}: {plural(rows, 'row')} instead of {len(last.rows):,} in the "
                    f"upload of {last.epoch}, maxShrink is {self.settings.max_shrink}: "
                    f"{self._losses(section, last)}"
                )
            yield from self._changes(section, last)

    @staticmethod
    def _losses(section: Section, last: LastUpload) -> str:
        """Who would lose what."""
        lost = {row[: section.key_width] for row in last.rows}
        lost -= {row[: section.key_width] for row in section.rows}
        what = [f"the tag {key[1]}" if key[1:] else f"their {section.name}" for key in lost]
        words = [
            f"{plural(count, 'student')} would lose {name}"
            for name, count in collections.Counter(what).items()
        ]
        return ", ".join(sorted(words)) or "nobody would lose anything"

    def _changes(self, section: Section, last: LastUpload) -> Iterator[str]:
        """The reason where too many rows have another value than in the last upload."""
        width = section.key_width
        before = {row[:width]: row for row in last.rows}
        kept = changed = 0
        columns: dict[str, list[str]] = {}  # column -> the values that it changed to
        for row in section.rows:
            old = before.get(row[:width])
            if old is None:
                continue
            kept += 1
            if old == row:
                continue
            may_differ = section.daily_change.get(row[0], 0.0) * last.days
            different = [
                (name, new)
                for name, value, new in zip(section.header, old, row, strict=True)
                if value != new and not close_value(value, new, may_differ)
            ]
            changed += bool(different)
            for name, new in different:
                columns.setdefault(name, []).append(new)
        if self.settings.max_change.allows(changed, kept):
            return
        name, values = max(columns.items(), key=lambda item: len(item[1]))
        most = plural(len(values), "row")
        if len(set(values)) == 1 and len(values) >= SMALL_GROUP:
            most += f", all became {one_line(values[0]) or 'blank'}"
        yield (
            f"{section.file}: {changed:,} of the {plural(kept, 'row')} it shares with the upload "
            f"of {last.epoch} have changed, maxChange is {self.settings.max_change}: mostly {name} "
            f"({most})"
        )


def upload_files(
    sftp: Sftp,
    directory: str,
    folder: Path,
    files: Sequence[SectionSummary],
    kind: Literal["test", "live"],
) -> None:
    """Upload the run's files, and note in their summaries that they have arrived."""
    waiting = list(files)

    def attempt() -> None:
        sftp.connect()
        while waiting:
            path = folder / waiting[0].file
            with local_errors(path):
                file = path.open("rb")
            with file:
                size = sftp.write_whole(f"{directory.rstrip('/')}/{path.name}", file)
            log.info("%s: uploaded to %s, %s", path.name, directory, plural(size, "byte"))
            waiting.pop(0).uploaded = kind

    retried(attempt)


# ------------------------------------ stage: REPORT
# Given: what `write_report` has made of a run.
# Gives: the page as a template: it loads nothing from elsewhere, has no script, prints, and is read
#     in light and dark, on a phone, and by a screen reader.  Raises: nothing.


REPORT = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>sgsync {{ s.epoch }}: {{ word }}</title>
<style>
:root { --page: #f4f6f9; --card: #fff; --text: #1b2130; --soft: #555f70; --line: #d9dee6;
  --code: #eef1f6; --bar: #2f66b8; --good: #17683a; --warn: #875200; --bad: #b02318; }
@media (prefers-color-scheme: dark) { :root { --page: #101319; --card: #191e27; --text: #e7eaf0;
  --soft: #a4adbc; --line: #343c4a; --code: #242b37; --bar: #79aaf7; --good: #6fd08c;
  --warn: #f0b35a; --bad: #ff8d83; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 2rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: 1rem 1.25rem; margin: 0 0 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
p { margin: .5rem 0; }
.top { border-left: .4rem solid var(--tone); }
.top h1 { color: var(--tone); }
.top h1 small { color: var(--soft); font-size: 1rem; font-weight: 400; white-space: nowrap; }
.good { --tone: var(--good); } .warn { --tone: var(--warn); } .bad { --tone: var(--bad); }
.soft, dt, figcaption { color: var(--soft); }
pre { background: var(--code); border-radius: .4rem; padding: .6rem .75rem; margin: .5rem 0;
  white-space: pre-wrap; font: .875rem/1.45 ui-monospace, Consolas, Menlo, monospace; }
ul { margin: .5rem 0; padding-left: 1.25rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dd { margin: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  overflow-wrap: break-word; }
.words td, th.file { overflow-wrap: anywhere; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { padding: .35rem .5rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
th { font-weight: 600; }
thead th { color: var(--soft); font-size: .875rem; vertical-align: bottom; }
th:first-child, .words th, .words td, th.file { text-align: left; }
th.file { padding-top: .9rem; } th.file span { font-weight: 400; color: var(--soft); }
tbody th { font-weight: 400; } tbody th.file, [aria-current] > * { font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
.zero { color: var(--soft); }
.note { color: var(--bad); font-weight: 600; }
.stages, .counts { table-layout: fixed; } .stages th:first-child { width: 8rem; }
.words th:first-child { width: 40%; }
.stages th:nth-child(3) { width: 6rem; }
.stages td:nth-child(2) { vertical-align: middle; } .stages th:nth-child(2) { text-align: left; }
.track { background: var(--code); border-radius: .25rem; height: .8rem; }
.track div { background: var(--bar); border-radius: .25rem; height: 100%; min-width: 2px; }
figure { margin: 0 0 .9rem; } figcaption b { color: var(--text); font-weight: 600; }
svg { display: block; width: 100%; height: 4rem; border-bottom: 1px solid var(--line); }
svg .runs { fill: var(--bar); } svg .bad { fill: var(--bad); }
.span { display: flex; justify-content: space-between; font-size: .875rem; color: var(--soft); }
@media (max-width: 40rem) { main { padding: .75rem .5rem 1rem; } section { padding: .75rem; }
  table { font-size: .875rem; } th, td { padding: .3rem .25rem; } thead th { font-size: .75rem; }
  .counts th:first-child { width: 24%; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .4rem; } .stages th:first-child { width: 6rem; } }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --text: #000;
  --soft: #444; --line: #bbb; --code: #f2f2f2; --bar: #2f66b8; --good: #17683a; --warn: #875200;
  --bad: #b02318; } body { font-size: 11pt; } main { max-width: none; padding: 0; }
  section { border: 0; padding: 0; } .top { padding-left: .75rem; border-left: .3rem solid; }
  tr, figure, pre { break-inside: avoid; } h2 { break-after: avoid; }
  .track div { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
</style>
</head>
<body>
<main>

<section class="top {{ tone }}" aria-labelledby="outcome">
<h1 id="outcome"><span aria-hidden="true">{{ mark }}</span> {{ word }}
<small>run {{ s.epoch }}</small></h1>
{%- for line in message %}
<p>{{ line }}</p>
{%- endfor %}
{%- if remedy %}
<p><b>What to do:</b> {{ remedy[0] }}</p>
{%- for line in remedy[1:] %}
<pre>{{ line }}</pre>
{%- endfor %}
{%- endif %}
</section>

{%- if over_limits %}

<section aria-labelledby="limits">
<h2 id="limits">Beyond the limits</h2>
<ul>
{%- for sentence in over_limits %}
<li>{{ sentence }}</li>
{%- endfor %}
</ul>
{%- if allowed %}
<p>{{ allowed }}</p>
{%- endif %}
</section>
{%- endif %}

{%- if s.files %}

<section aria-labelledby="changes">
<h2 id="changes">Changes</h2>
<table class="counts">
<caption>Rows by file and operation{{ "; this run wrote nothing" if s.only_planned }}</caption>
<thead><tr><th scope="col">Operation</th><th scope="col">Found</th><th scope="col">Applied</th>
<th scope="col">Failed</th><th scope="col">Left alone</th></tr></thead>
{%- for file in s.files %}
<tbody>
<tr><th class="file" scope="rowgroup" colspan="5">{{ file.file }}
<span>{{ file.source_rows|number }} rows from SameGoal,
{{ file.target_rows|number }} in the database, {{ file.seconds|time }}
{%- if file.not_converged %}; <span class="note">{{ file.not_converged|number }} did not
converge</span>{% endif %}</span></th></tr>
{%- for operation in operations %}
{%- set tally = file.tally(operation) %}
<tr><th scope="row">{{ operation }}</th>
{%- for count in (tally.found, tally.applied, tally.failed, tally.left_alone) %}
<td class="{{ 'zero' if not count else 'note' if loop.index0 == 2 }}">{{ count|number }}</td>
{%- endfor %}</tr>
{%- endfor %}
</tbody>
{%- endfor %}
</table>
</section>
{%- endif %}

{%- for title, told, table, more, file in lists if table %}

<section aria-labelledby="{{ file }}">
<h2 id="{{ file }}">{{ title }}</h2>
<table class="words">
<caption>{{ told }}</caption>
<thead><tr>{% for name in table[0] %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for row in table %}
<tr>{% for cell in row.values() %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody>
</table>
{%- if more %}
<p>And {{ more|number }} more, see {{ file }} in this run's folder.</p>
{%- endif %}
</section>
{%- endfor %}

{%- if differences %}

<section aria-labelledby="formats">
<h2 id="formats">Differences of format</h2>
<p class="soft">These updates change how a value is written, not the value, and come back every
night until the setting at the end of the sentence is made.</p>
<ul>
{%- for sentence in differences %}
<li>{{ sentence }}</li>
{%- endfor %}
</ul>
</section>
{%- endif %}

{%- if stages %}

<section aria-labelledby="stages">
<h2 id="stages">Time</h2>
<table class="stages">
<caption>When each stage ran, within {{ s.seconds|time }}</caption>
<thead><tr><th scope="col">Stage</th><th scope="col">From start to end</th>
<th scope="col">Duration</th></tr></thead>
<tbody>
{%- for stage in stages %}
<tr><th scope="row">{{ stage.name }}</th><td><div class="track"><div style="margin-left:
{{- stage.left }}%;width:{{ stage.width }}%"></div></div></td><td>{{ stage.seconds|time }}</td></tr>
{%- endfor %}
</tbody>
</table>
</section>
{%- endif %}

{%- if charts %}

<section aria-labelledby="trend">
<h2 id="trend">Trend</h2>
{%- for chart in charts %}
<figure>
<figcaption><b>{{ chart.name }}</b> {{ chart.told }}</figcaption>
<svg viewBox="0 0 {{ chart.width }} {{ chart.height }}" preserveAspectRatio="none" role="img"
aria-label="{{ chart.name }}: {{ chart.told }}"><path class="{{ chart.tone }}"
d="{{ chart.path }}"/></svg>
</figure>
{%- endfor %}
<div class="span"><span>{{ trend_from }}</span><span>{{ trend_to }}</span></div>
</section>

<section aria-labelledby="recent">
<h2 id="recent">Latest runs</h2>
<table>
<thead><tr><th scope="col">Run</th><th scope="col">Outcome</th><th scope="col">Written</th>
<th scope="col">Failed</th><th scope="col">Time</th></tr></thead>
<tbody>
{%- for run in recent %}
<tr{% if run.epoch == s.epoch %} aria-current="true"{% endif %}>
<th scope="row">{{ run.epoch }}</th><td>{{ run.outcome }}</td>
<td>{{ run.total("applied")|number }}</td><td>{{ run.total("failed")|number }}</td>
<td>{{ run.seconds|time }}</td></tr>
{%- endfor %}
</tbody>
</table>
</section>
{%- endif %}

<section aria-labelledby="about">
<h2 id="about">About this run</h2>
<dl>
{%- for name, value in about if value %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{%- endfor %}
</dl>
</section>

</main>
</body>
</html>
"""


# ------------------------------------ stage: write_report
#
# Given a run's summary, its folder, and the runs kept; gives report.html in that folder.  Raises
# Error where the disk fails, ImportError without Jinja2.

REPORT_ROWS = 200  # More rows of one kind are left to the CSV file.
RECENT_RUNS = 14
BAR_HEIGHT = 60


class Report:
    """The page that tells of one run; where keys are not shown, no part of a key is."""

    OUTCOMES: Mapping[str, tuple[str, str, str]] = {  # outcome -> mark, tone, word
        "complete": ("\u2713", "good", "Complete"),
        "partial": ("!", "warn", "Finished, but not for every row"),
        "dry run": ("\u2713", "good", "Dry run"),
        "held": ("!", "warn", "Held, nothing was written"),
        "busy": ("!", "warn", "Not started, another run was active"),
        "paused": ("\u2713", "good", "Paused"),
        "interrupted": ("\u2715", "bad", "Interrupted"),
        "running": ("!", "warn", "Not finished"),
    }

    def __init__(
        self, summary: RunSummary, folder: Path, kept: Sequence[KeptRun], *, keys: bool
    ) -> None:
        self.summary, self.folder, self.keys = summary, folder, keys
        trend = [run.summary for run in reversed(kept) if run.summary and run.folder != folder]
        trend = [*trend, summary]
        trend.sort(key=lambda told: told.epoch)
        others = ("dry run", "busy", "paused", "running")
        self.trend = [told for told in trend if told.outcome not in others]

    def write(self) -> Path:
        """Write report.html; returns its path."""
        path = self.folder / REPORT_NAME
        with new_file(path) as file:
            file.write(self.html().encode("utf-8"))
        return path

    def html(self) -> str:
        import jinja2

        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, finalize=self._shown
        )
        environment.filters |= {"number": "{:,}".format, "time": self._time}
        summary = self.summary
        mark, tone, word = self.OUTCOMES.get(summary.outcome, ("\u2715", "bad", "Failed"))
        if summary.outcome == "dry run" and summary.exit_code:
            mark, tone, word = "!", "warn", "Dry run; a real run would be held"
        if summary.outcome == "held" and summary.total("applied"):
            word = "Held, nothing was sent"
        recent = self.trend[-1 : -RECENT_RUNS - 1 : -1]
        return environment.from_string(REPORT).render(
            s=summary, mark=mark, tone=tone, word=word, operations=(INSERT, UPDATE, DELETE),
            message=self._without_keys(summary.message).split("\n"),
            remedy=self._remedy(),
            over_limits=[self._without_keys(sentence) for sentence in summary.over_limits
                         if sentence not in summary.message],
            allowed=self._allowed(), lists=[self._failures(), self._not_converged()],
            differences=[difference for file in summary.files
                         for difference in map(self._without_keys, file.format_differences)],
            stages=list(self._stages()), about=self._about(), recent=recent,
            charts=list(self._charts()) if len(self.trend) > 1 else [],
            trend_from=self.trend[0].epoch if self.trend else "",
            trend_to=self.trend[-1].epoch if self.trend else "",
        )  # fmt: skip

    def _remedy(self) -> list[str]:
        """What to do, and the commands for it."""
        summary = self.summary
        if summary.remedy:
            return summary.remedy.split("\n")
        advice = []
        if summary.total("failed"):
            advice.append(
                "Correct what the errors below say, in SameGoal or in the database; the next run "
                "tries these rows again."
            )
        if any(file.not_converged for file in summary.files):
            advice.append(
                "A procedure does not write what the query reads: correct one of the two."
            )
        return [" ".join(advice)] if advice else []

    @staticmethod
    def _shown(value: object) -> object:
        """Text in printable characters and without secrets; what is HTML already stays."""
        return redact(printable(value)) if type(value) is str else value

    @staticmethod
    def _time(seconds: float) -> str:
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        if seconds < 60:
            return f"{seconds:.1f} s"
        return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"

    def _without_keys(self, text: str) -> str:
        """The text up to the first key in it, unless keys are to be shown.

        What a key holds cannot be told from what follows it, except for the advice at the end of
        a difference of format.
        """
        names = {one_line(name) for names in self.summary.keys.values() for name in names}
        any_column = r"[^\s=,;]+" if not all(self.summary.keys.values()) else ""
        pattern = "|".join(filter(None, [*map(re.escape, sorted(names)), any_column]))
        found = re.search(rf"(?<!\w)(?:{pattern})=", text) if pattern else None
        if self.keys or not found:
            return text
        advice = re.search(r"; ([\w ]+=\"[^\"]*\" .*)$", text)
        return f"{text[: found.start()]}(keys are left out){f'; {advice[1]}' if advice else ''}"

    def _allowed(self) -> str:
        """Why changes beyond the limits were written all the same."""
        approval = self.summary.approval
        if approval:
            why = f": {approval.why}" if approval.why else ""
            rows = plural(approval.rows, "row")
            return (
                f"Run {approval.run} was approved by {approval.by}, {rows} beyond the limits{why}."
            )
        return "The limits were skipped (--force)." if self.summary.forced else ""

    def _rows(self, name: str) -> list[dict[str, str]]:
        path = self.folder / name
        if not path.is_file():
            return []
        with local_errors(path), path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def _failures(self) -> tuple[str, str, list[dict[str, str]], int, str]:
        """Title, caption, rows (heading -> text), how many more, and the file that has all."""
        found = self._rows(FAILURES_NAME)
        rows = []
        for row in found[:REPORT_ROWS]:
            error = f"{row['procedure']}: {row['error']}"
            if self.keys:
                rows.append({"Row": f"{row['operation']} {row['key']}", "Procedure: error": error})
                continue
            for part in sorted(set(re.split(r"[=,\s]+", row["key"])), key=len, reverse=True):
                if part:
                    error = re.sub(rf"(?<!\w){re.escape(part)}(?!\w)", "...", error)
            rows.append({"Row": row["operation"], "Procedure: error": error})
        told = f"The database refused {plural(len(found), 'row')}; the next run tries again."
        return "Rows that failed", told, rows, max(len(found) - REPORT_ROWS, 0), FAILURES_NAME

    def _not_converged(self) -> tuple[str, str, list[dict[str, str]], int, str]:
        found = self._rows(NOT_CONVERGED_NAME)
        rows = [
            {
                "Row": f"{row['operation']} {row['key'] if self.keys else ''}",
                "Procedure": f"{row['procedure']}, {row['file']}",
                "Runs in a row": row["runs"],
            }
            for row in found[:REPORT_ROWS]
        ]
        told = "The call succeeded, but the row still differs: the procedure had no effect."
        more = max(len(found) - REPORT_ROWS, 0)
        return "Rows that did not converge", told, rows, more, NOT_CONVERGED_NAME

    def _stages(self) -> Iterator[dict[str, Any]]:
        """The stages as bars: where they begin and how long they are, in percent of the run."""
        whole = max(self.summary.seconds, 0.001)
        for stage in sorted(self.summary.stages, key=lambda stage: stage.began):
            left = min(100 * stage.began / whole, 100)
            width = min(100 * stage.seconds / whole, 100 - left)
            yield vars(stage) | {"left": f"{left:.2f}", "width": f"{width:.2f}"}

    def _charts(self) -> Iterator[dict[str, Any]]:
        """A bar for each run, oldest first."""
        runs = plural(len(self.trend), "run")
        for name, counts, tone in (
            ("Rows written", [run.total("applied") for run in self.trend], "runs"),
            ("Rows failed", [run.total("failed") for run in self.trend], "bad"),
        ):
            most, middle = max(counts), sorted(counts)[len(counts) // 2]
            told = (
                f"most {most:,}, usually {middle:,}; logarithmic scale"
                if most
                else f"none in {runs}"
            )
            yield self._chart(name, told, [math.log1p(count) for count in counts], tone)
        seconds = [run.seconds for run in self.trend]
        usual = self._time(sorted(seconds)[len(seconds) // 2])
        told = f"longest {self._time(max(seconds))}, usually {usual}; logarithmic scale"
        yield self._chart("Duration", told, [math.log1p(value) for value in seconds], "runs")
        bad = [0 if run.outcome in ("complete", "partial") else 1 if run.outcome == "held" else 2
               for run in self.trend]  # fmt: skip
        told = f"{bad.count(2)} failed (tall bars), {bad.count(1)} held (short bars), of {runs}"
        yield self._chart("Runs that wrote nothing or not everything", told, bad, "bad")

    @staticmethod
    def _chart(name: str, told: str, values: Sequence[float], tone: str) -> dict[str, Any]:
        most = max(values) or 1
        path = "".join(
            f"M{4 * place} {BAR_HEIGHT}v-{max(BAR_HEIGHT * value / most, 1):.0f}h3V{BAR_HEIGHT}z"
            for place, value in enumerate(values)
            if value > 0
        )
        size = {"width": 4 * max(len(values), 30), "height": BAR_HEIGHT}
        return {"name": name, "told": told, "path": path, "tone": tone, **size}

    def _about(self) -> list[tuple[str, str]]:
        summary = self.summary
        code = "" if summary.exit_code is None else str(summary.exit_code)
        made = ", ".join(
            f"{name} ({plural(rows, 'row')})" for name, rows in summary.statement_files.items()
        )
        stale = " (too old)" if summary.stale_epoch else ""
        return [
            ("Started", summary.started.replace("T", " ")),
            ("Exit code", code),
            ("SameGoal's extract", f"{summary.source_epoch}{stale}"),
            ("Files of <Upload>", made),
            ("Account", f"{summary.account} on {summary.computer}"),
            ("Arguments", command_line(summary.arguments)),
            ("Folder", str(self.folder)),
            ("Version", f"sgsync {summary.version}"),
        ]


def write_report(run: Run, earlier: Sequence[KeptRun]) -> None:
    """Report on the run under way; keys are shown only once config.xml has said so."""
    keys = run.settings is not None and run.settings.report_keys
    Report(run.summary, run.folder, earlier, keys=keys).write()


# ------------------------------------ stage: send_notices
# Given: what a run tells of itself, and the <Notify> elements.
# Gives: a ping for a dead man's switch, and a message for people, without keys or values of rows.
# Raises: nothing; what cannot be sent is logged.

NOTICE_SECONDS = 30.0  # for all notices of a run
EXIT_WORDS = {
    0: "success",
    1: "unexpected error, or this computer's disk",
    ConfigError.exit_code: "configuration or usage",
    TransferError.exit_code: "SFTP transfer",
    DatabaseError.exit_code: "database",
    DataError.exit_code: "data: a CSV file that cannot be compared",
    HeldError.exit_code: "held by a limit",
    BusyError.exit_code: "another run is active",
    ROWS_FAILED: "finished, but some rows failed or did not converge",
    InterruptError.exit_code: "interrupted",
}


def ping_start(notices: Iterable[Notice]) -> None:
    """Tell the dead man's switches that a run begins (healthchecks.io, "Signaling failures")."""
    pings = [f"{notice.ping.rstrip('/')}/start" for notice in notices if notice.ping]
    _within_time([functools.partial(_ping, ping, "") for ping in pings])


def send_notices(notices: Iterable[Notice], summary: RunSummary, folder: Path) -> None:
    """Ping the dead man's switches whatever the outcome; send the messages that are wanted."""
    code = summary.exit_code or 0
    wanted = {"always", *(["failure"] if code else []), summary.outcome}
    body = notice_text(summary, folder)
    title = f"sgsync {summary.command}: {summary.outcome} on {summary.computer}"
    work: list[Callable[[], None]] = []
    for notice in notices:
        if notice.ping:
            work.append(functools.partial(_ping, f"{notice.ping.rstrip('/')}/{code}", body))
        if notice.url and notice.on in wanted:
            work.append(functools.partial(_send_message, notice.url, title, body))
    _within_time(work)


def notice_text(summary: RunSummary, folder: Path) -> str:
    """The message: outcome, counts, reason and remedy.

    The reason of an error that may quote a row is left in the log.
    """
    code = summary.exit_code or 0
    lines = [f"{summary.outcome} (exit code {code}: {EXIT_WORDS.get(code, 'unknown')})"]
    if summary.over_limits:
        lines += [sentence.partition("; they begin with ")[0] for sentence in summary.over_limits]
    elif code in (ConfigError.exit_code, TransferError.exit_code, BusyError.exit_code):
        lines.append(summary.message)
    elif code:
        lines.append(f"The reason is at the end of {folder / LOG_NAME}.")
    for file in summary.files:
        tallies = ((operation, file.tally(operation)) for operation in OPERATIONS)
        counts = [
            f"{operation} {tally.applied:,} of {tally.found:,}, {tally.failed:,} failed"
            for operation, tally in tallies
            if tally.found
        ]
        lines.append(f"{file.file}: {'; '.join(counts) or 'no changes'}")
    lines += [f"{section.file}: {plural(section.rows, 'row')}" for section in summary.sections]
    if summary.remedy and code != DataError.exit_code:
        lines.append(f"Try: {summary.remedy}")
    lines.append(f"{summary.computer}: {folder}")
    return redact("\n".join(lines))


def _within_time(work: Sequence[Callable[[], None]]) -> None:
    if not work:
        return
    worker = Worker("notices")
    futures = [worker.submit(each) for each in work]
    worker.end()
    wait(futures, NOTICE_SECONDS)
    for future in futures:
        if not future.done():
            log.warning("a notice could not be sent within %.0f s", NOTICE_SECONDS)
        elif error := future.exception():
            log.warning("a notice could not be sent: %s", one_line(error))


def _ping(url: str, body: str) -> None:
    request = urllib.request.Request(url, body.encode("utf-8"))  # noqa: S310
    try:
        urllib.request.urlopen(request, timeout=10).close()  # noqa: S310
    except urllib.error.HTTPError as error:  # whose text may have the URL
        raise TransferError(f"the ping was refused: {error.code} {error.reason}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise TransferError(f"the ping failed: {one_line(reason)}") from None


def _send_message(url: str, title: str, body: str) -> None:
    try:
        import apprise
    except ImportError:
        words = [sys.executable, "-m", "pip", "install", "apprise"]
        raise ConfigError(
            f"url= in <Notify> needs the package apprise; install it: {command_line(words)}"
        ) from None
    logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)  # It logs addresses.
    sender = apprise.Apprise()
    if not sender.add(url):
        raise ConfigError("url= in <Notify> is not an address that apprise knows")
    if not sender.notify(title=title, body=body, body_format=apprise.NotifyFormat.TEXT):
        raise TransferError("the server did not take the message")


# ------------------------------------ stage: write_metrics
#
# Given a run that is over, and the newest one of the other job; gives a file in the OpenMetrics
# text format, for the textfile collector of node_exporter.  Raises Error where the disk fails.


class Metrics:
    """Lines of gauges: the one type that OpenMetrics and older readers of Prometheus share."""

    HELP: Mapping[str, str] = {
        "sgsync_run_start_timestamp_seconds": "Start of the last run, in seconds since 1970",
        "sgsync_run_duration_seconds": "How long the last run took",
        "sgsync_run_exit_code": "Exit code of the last run, 0 for success",
        "sgsync_run_outcome": "1 for the outcome of the last run",
        "sgsync_success_timestamp_seconds": "Start of the last run that was complete",
        "sgsync_rows": "Rows of the last run by file, operation and what became of them",
        "sgsync_not_converged_rows": "Rows that still differ after their call",
        "sgsync_file_rows": "Rows of the last run's files for SchooLinks",
        "sgsync_stage_duration_seconds": "How long the stages of the last run took",
    }

    def __init__(self, home: Path) -> None:
        self._home = str(home)
        self._samples: dict[str, dict[str, float]] = {name: {} for name in self.HELP}

    def add(self, summary: RunSummary, success: RunSummary | None) -> None:
        """The last run of a job, and the last one that succeeded."""
        set_to = functools.partial(self._set, summary.command)
        for name, value in (
            ("run_start_timestamp", self._seconds(summary.started)),
            ("run_duration", summary.seconds),
        ):
            set_to(f"sgsync_{name}_seconds", value)
        set_to("sgsync_run_exit_code", -1 if summary.exit_code is None else summary.exit_code)
        set_to("sgsync_run_outcome", 1, outcome=summary.outcome)
        if success:
            set_to("sgsync_success_timestamp_seconds", self._seconds(success.started))
        for file in summary.files:
            for operation in OPERATIONS:
                for result, count in vars(file.tally(operation)).items():
                    set_to("sgsync_rows", count, file=file.file, operation=operation, result=result)
            set_to("sgsync_not_converged_rows", file.not_converged, file=file.file)
        for section in summary.sections:
            set_to("sgsync_file_rows", section.rows, file=section.file)
        for stage in summary.stages:
            set_to("sgsync_stage_duration_seconds", stage.seconds, stage=stage.name)

    @staticmethod
    def _seconds(started: str) -> float:
        return datetime.datetime.fromisoformat(started).timestamp()

    def _set(self, command: str, name: str, value: float, **labels: str) -> None:
        escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
        labels = {"home": self._home, "command": command, **labels}
        told = ",".join(f'{label}="{text.translate(escapes)}"' for label, text in labels.items())
        self._samples[name][f"{name}{{{told}}}"] = value

    def __str__(self) -> str:
        lines = []
        for name, samples in self._samples.items():
            if samples:
                lines += [f"# TYPE {name} gauge", f"# HELP {name} {self.HELP[name]}"]
                lines += [f"{sample} {value:.15g}" for sample, value in samples.items()]
        return "\n".join([*lines, "# EOF", ""])


def write_metrics(path: Path, home: Path, run: Run) -> None:
    """Write the metrics of a run and of the other job's last one; everyone may read them."""
    metrics = Metrics(home)
    folders = {"sync": home / "history", "schoolinks": home / "history" / "schoolinks"}
    for command, folder in folders.items():
        kept = (found.summary for found in runs(folder))
        over = (told for told in kept if told and told.outcome not in ("running", "busy"))
        last = run.summary if command == run.summary.command else next(over, None)
        if last:
            told_so_far = itertools.chain([last], over)
            success = (told for told in told_so_far if told.outcome == "complete")
            metrics.add(last, next(success, None))
    with new_file(path) as file:
        if hasattr(os, "fchmod"):
            os.fchmod(file.fileno(), 0o644)  # The collector has an account of its own.
        file.write(str(metrics).encode("utf-8"))


# ==================================== COMMANDS
# One section a command: its arguments and its run; only they connect stages.


# ------------------------------------ command line: Options
# Given: the words of the command line.
# Gives: what every command gets of them.
# Raises: SystemExit with exit code 2.


@dataclasses.dataclass(kw_only=True)
class Options:
    """The command line, as far as every command has it."""

    command: str
    home: Path
    config: Path
    verbose: bool = False
    quiet: int = 0
    json: bool = False
    log_format: str = "text"
    arguments: Sequence[str] = ()  # as they were typed

    @property
    def terminal(self) -> bool:
        """Whether a person watches."""
        plain = self.log_format == "text" and not (self.quiet or self.verbose)
        return plain and sys.stderr.isatty()

    def typed(self, *words: str) -> str:
        """A command for this home, as a person can type it."""
        if self.home != default_home():
            words += ("--home", str(self.home))
        if self.config != config_path(self.home):
            words += ("--config", str(self.config))
        return own_command(*words)


class Parser(argparse.ArgumentParser):
    """Takes no shortened options: `--for` must not mean `--force`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **settings)

    def error(self, message: str) -> NoReturn:
        remedy = f"{self.prog} --help"
        if unknown := re.match(r"argument COMMAND: invalid choice: '(.*?)' \(choose", message):
            word = one_line(unknown[1])
            message = f"unknown command '{word}'"
            if close := difflib.get_close_matches(word.lower(), COMMANDS, 1):
                remedy = f"{self.prog} {close[0]}"
        self.exit(ConfigError.exit_code, f"{self.prog}: {message}\nTry: {remedy}\n")


def say(text: str) -> None:
    """A line for the person at the terminal; standard output is for results."""
    print(printable(text), file=sys.stderr, flush=True)


def agree(question: str, remedy: str) -> bool:
    """Ask a person, yes or no; raises ConfigError with that remedy where nobody is there."""
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError(
            "nobody can be asked: this is not a terminal; nothing was changed", remedy
        )
    while True:
        print(f"{question} (yes/no) ", end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline()
        if answer.strip().lower() in ("yes", "y"):
            return True
        if answer.strip().lower() in ("no", "n") or not answer:
            return False


# ------------------------------------ runs and display: open_run
# Given: the options of a command that makes a run.
# Gives: its folder, log and progress; at its end the outcome, whatever it is.
# Raises: ConfigError where no run can be made.


class Display:
    """One line a phase on a terminal; nothing elsewhere: there the log lines tell."""

    def __init__(self, terminal: bool, run: Run) -> None:
        self._terminal, self._run = terminal, run
        self._progress: rich.progress.Progress | None = None

    def __enter__(self) -> Display:
        if self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                TextColumn("{task.description:<10}", markup=False),
                BarColumn(bar_width=16),
                TimeElapsedColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                console=Console(stderr=True),
            )
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress:
            self._progress.stop()

    @contextlib.contextmanager
    def phase(self, title: str, files: int = 1) -> Iterator[Phase]:
        """One phase of a run, over as many files."""
        progress = self._progress
        phase = Phase(progress, progress.add_task(title, total=files, detail="") if progress else 0)
        with self._run.stage(title):
            yield phase
        phase.end(files)


class Phase:
    """Tells the display which file is being worked on, and how far that is."""

    def __init__(self, progress: rich.progress.Progress | None, task: Any) -> None:
        self._progress, self._task, self._begun = progress, task, 0

    def file(self, name: str, unit: str = "row") -> Tick:
        """The next file begins; the function that this returns is told how much more is done."""
        progress, task, done = self._progress, self._task, 0
        if progress is None:
            return lambda _: None
        progress.update(task, completed=self._begun, detail=name)
        self._begun += 1

        def tick(count: int) -> None:
            nonlocal done
            done += count
            progress.update(task, detail=f"{name}{', ' * bool(name)}{plural(done, unit)}")

        return tick

    def end(self, files: int) -> None:
        if self._progress:
            detail = plural(files, "file") if files > 1 else ""
            self._progress.update(self._task, total=files, completed=files, detail=detail)


@contextlib.contextmanager
def open_run(options: Options) -> Iterator[Run]:
    """Make the run's folder and log before anything else.

    However the run ends, its log, its summary and the console tell of it: an exception ends here.
    """
    if not options.home.is_dir():
        raise ConfigError(
            f"{options.home}: is not a folder", "give the folder of config.xml: --home DIR"
        )
    history = options.home / "history"
    history = history if options.command == "sync" else history / options.command
    check_owner(history, options.arguments)
    run = Run(history, options.command, options.arguments)
    JsonFormatter.run = run.summary.epoch
    if options.command == "sync":
        run.report = write_report
    with local_errors(run.folder / LOG_NAME):
        handler = logging.FileHandler(run.folder / LOG_NAME, encoding="utf-8")
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)-7s %(message)s"))
    handler.setLevel(logging.DEBUG if log.isEnabledFor(logging.DEBUG) else logging.INFO)
    log.addHandler(handler)
    trace = None
    try:
        summary = run.summary
        arguments = one_line(command_line(summary.arguments)) or "none"
        log.info(
            "sgsync %s %s, run %s, account %s on %s, arguments: %s",
            __version__, options.command, summary.epoch, summary.account, summary.computer,
            arguments,
        )  # fmt: skip
        yield run
    except (Exception, KeyboardInterrupt) as exception:
        run.failed(exception)
        if not isinstance(exception, (Error, KeyboardInterrupt)):
            trace = exception
    finally:
        if run.settings and run.settings.metrics:
            path = options.home / run.settings.metrics
            run.attempt(str(path), lambda: write_metrics(path, options.home, run))
        send_notices(run.notices, run.summary, run.folder)
        show_outcome(run, options, trace)
        log.removeHandler(handler)
        JsonFormatter.run = ""
        with contextlib.suppress(OSError):  # of a disk that is full
            handler.close()


def check_owner(history: Path, arguments: Sequence[str]) -> None:
    """Refuse to let root make what the job's account could neither write nor delete."""
    if os.name != "posix" or os.geteuid() or not history.is_dir() or not history.stat().st_uid:
        return
    words = ["sudo", "-u", history.owner(), sys.executable, str(SCRIPT), *arguments]
    raise ConfigError(
        f"{history}: belongs to the account {history.owner()}, and you are root: the nightly job "
        "could not delete what you make there; nothing was done",
        f"run it as that account:\n{command_line(words)}",
    )


def show_outcome(run: Run, options: Options, trace: BaseException | None) -> None:
    """Tell how a run ended: in its log and on the console, there for a person at more length."""
    summary = run.summary
    levels = {0: logging.INFO, ROWS_FAILED: logging.WARNING}
    level = levels.get(cast("int", summary.exit_code), logging.ERROR)
    if options.quiet == 1:  # the outcome, and nothing else, also of a success
        level = max(level, logging.WARNING)
    told = f"{summary.outcome}: {summary.message} ({summary.seconds:.1f} s, folder {run.folder})"
    told += f"\nTry: {summary.remedy}" if summary.remedy else ""
    for handler in log.handlers:
        in_file = isinstance(handler, logging.FileHandler)
        cause = trace if in_file or options.verbose else None
        record = logging.LogRecord(
            log.name, level, "", 0, "%s", (told,),
            (type(cause), cause, cause.__traceback__) if cause else None,
        )  # fmt: skip
        if level >= handler.level and (in_file or not options.terminal):
            handler.handle(record)
    if options.terminal:
        print_outcome(run)
    if options.json:
        print_json(dataclasses.asdict(summary))


def print_json(data: object) -> None:
    """One line on standard output, if there is one and somebody reads it."""
    if sys.stdout is not None:
        try:
            print(json.dumps(data), flush=True)
        except BrokenPipeError:
            pass
        except OSError as error:
            log.warning("standard output: could not write the summary: %s", error.strerror or error)


def print_outcome(run: Run) -> None:
    """For a person: a table, the outcome wrapped at spaces, the folder and the remedy."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, summary = Console(stderr=True, highlight=False), run.summary
    rows = [file_cells(file, planned=summary.only_planned) for file in summary.files]
    rows += [section_cells(section) for section in summary.sections]
    if rows:
        table = Table(*rows[0])
        table.columns[0].overflow = "fold"
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*map(Text, row.values()))
        console.print(table)
    colors = {"complete": "green", "dry run": "green", "held": "yellow", "partial": "yellow"}
    color = colors.get(summary.outcome, "red")
    lines = [printable(line) for line in summary.message.split("\n")]
    told = "\n".join(lines) + f" ({summary.seconds:.1f} s)"
    console.print(Text.assemble((summary.outcome, f"bold {color}"), ": ", told))
    console.print(Text(str(run.folder)), soft_wrap=True)
    if summary.remedy:
        sentence, *commands = summary.remedy.split("\n")
        console.print(Text(f"Try: {printable(sentence)}"))
        for command in commands:  # to be copied: no line break in it
            console.print(Text(printable(command)), soft_wrap=True)


def file_cells(file: FileSummary, *, planned: bool) -> dict[str, str]:
    """One file as a row of the table: heading -> text."""
    cells = {"file": file.file, "rows": f"{file.source_rows:,}"}
    for operation, word in ((INSERT, "inserted"), (UPDATE, "updated"), (DELETE, "deleted")):
        tally = file.tally(operation)
        wanted = tally.found - tally.left_alone
        done = f"{tally.applied:,} of {wanted:,}" if tally.applied < wanted else f"{wanted:,}"
        cells[f"would {operation}" if planned else word] = f"{wanted:,}" if planned else done
    if not planned:
        cells["failed"] = f"{file.total('failed'):,}"
    return cells | {"time": f"{file.seconds:.1f} s"}


def section_cells(section: SectionSummary) -> dict[str, str]:
    """One of SchooLinks' files as a row of the table: heading -> text."""
    without = ", ".join(f"{count:,} {reason}" for reason, count in section.without.items())
    return {
        "file": section.file,
        "rows": f"{section.rows:,}",
        "students without": without or "0",
    }


def warn_of_readable(config: Config, *paths: Path) -> None:
    """Warn of files with secrets that everyone on this machine can read."""
    environment = config.path.with_name(ENVIRONMENT_NAME)
    for path in (config.path, environment, *config.secret_files, *paths):
        with contextlib.suppress(OSError):
            if os.name == "posix" and path.stat().st_mode & 0o004:
                sudo = ["sudo"] if os.geteuid() else []
                chown = command_line([*sudo, "chown", getpass.getuser(), str(path)])
                chmod = command_line([*sudo, "chmod", "600", str(path)])
                log.warning(
                    "%s: everyone on this machine can read this file\n"
                    "Try: let only this account read it:\n%s\n%s",
                    path, chown, chmod,
                )  # fmt: skip


def use_config(run: Run, config: Config, options: SyncOptions | SchooLinksOptions) -> None:
    """Let the run tell of itself as config.xml wants it; a dry run is told to nobody else."""
    keep_secret(config.secrets)
    run.settings = config.history
    run.notices = () if options.dry_run else config.notices


def started(run: Run, config: Config, options: SyncOptions | SchooLinksOptions) -> bool:
    """Whether the run has anything to do: not in a <Pause>; told is a last run that was killed."""
    last = next(iter(run.earlier()), None)
    if last and last.summary and last.summary.outcome == "running":
        log.warning(
            "the last run, %s, did not finish: it was killed, or the computer went down; this run "
            "continues from there", last.epoch,
        )  # fmt: skip
        killed = dataclasses.replace(last.summary, outcome="killed", exit_code=1)
        send_notices(run.notices, killed, last.folder)
    today = datetime.date.today()
    pause = next((pause for pause in config.pauses if pause.covers(today)), None)
    if pause and not (options.dry_run or options.force):
        why = f" ({one_line(pause.why)})" if pause.why else ""
        run.conclude(
            "paused", 0,
            f"nothing was done: config.xml has a <Pause> from {pause.from_} to {pause.to}{why}",
            "to run all the same, use --dry-run, or --force, which skips the limits, too",
        )  # fmt: skip
        return False
    ping_start(run.notices)
    return True


# ------------------------------------ command: sync
# Given: config.xml and connections made from it.
# Gives: the database in step with SameGoal, and the evidence.
# Raises: nothing; the run's outcome tells.


@dataclasses.dataclass(kw_only=True)
class SyncOptions(Options):
    dry_run: bool = False
    force: bool = False
    approve: str = ""
    by: str = ""
    why: str = ""


def sync_arguments() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument("--dry-run", action="store_true", help="stop after the diff, write nothing")
    over = parser.add_mutually_exclusive_group()
    over.add_argument("--approve", metavar="EPOCH", help="do what a held run showed, and only that")
    over.add_argument(
        "--force", action="store_true",
        help="skip every limit: writes whatever differs, even if half of SameGoal's file is "
        "missing; prefer --approve",
    )  # fmt: skip
    parser.add_argument("--by", metavar="NAME", help="with --approve: who approves it, for the log")
    parser.add_argument("--why", metavar="TEXT", help="with --approve: the reason, for the log")
    parser.set_defaults(run=run_sync, kind=SyncOptions)
    return parser


def run_sync(options: SyncOptions) -> int:
    """The nightly integration; the steps are those of the README."""
    with open_run(options) as run:
        config = load_config(options.config, SyncConfig)
        use_config(run, config, options)
        with only_run(run, "sync"):
            if started(run, config, options):
                sync(options, run, config)
    return cast("int", run.summary.exit_code)


def sync(options: SyncOptions, run: Run, config: SyncConfig) -> None:
    warn_of_readable(config, options.home / config.sftp.private_key)
    with Display(options.terminal, run) as display, Sftp(config.sftp, options.home) as sftp, \
            Database(config.database) as database:  # fmt: skip
        Sync(options, run, config, display).work(sftp, database)


class Sync:
    """One nightly integration: connects the stages, and keeps the run's summary true."""

    def __init__(
        self, options: SyncOptions, run: Run, config: SyncConfig, display: Display
    ) -> None:
        self.options, self.run, self.config, self.display = options, run, config, display
        self.folder, self.summary = run.folder, run.summary
        self.approved: KeptRun | None = None
        if options.approve:
            self.approved = held_run(run.history, options.approve)
        for sql_diff in config.sql_diffs:
            names = [name.removesuffix(":int") for name in sql_diff.key or ()]
            self.summary.keys[sql_diff.file] = names

    def work(self, sftp: Sftp, database: Database) -> None:
        extract = self.fetch_both_sides(sftp, database)
        comparisons = self.compare_files()
        reasons = self.reasons_to_hold(extract, comparisons)
        if self.options.dry_run:
            message = self.summary.changes(planned=True)
            if reasons:
                message += f"; a real run would be held: {'; '.join(reasons)}"
            self.run.conclude("dry run", HeldError.exit_code if reasons else 0, message)
            return
        if reasons and not self.options.force:
            raise self.held(reasons)
        self.run.save()  # So that a run that is killed leaves what it was about to write.
        failures = self.apply_changes(database, comparisons)
        if self.config.database.verify:
            self.verify(database, failures)
        with self.display.phase("statements", len(self.config.statements)) as phase:
            made = run_statements(database, self.config.statements, self.folder, phase.file(""))
        self.summary.statement_files = made
        self.check_statement_files(made)
        self.conclude()
        with self.display.phase("push") as phase:
            push(sftp, self.config.sftp.upload_directory, self.folder, phase.file("", "byte"))
        self.run.complete()
        prune(self.run.history, self.config.history.keep_runs, self.folder)

    def fetch_both_sides(self, sftp: Sftp, database: Database) -> Extract:
        """Download SameGoal's extract and export the database's tables, both at the same time."""
        cancelled = threading.Event()
        sql_diffs = self.config.sql_diffs

        def cancel() -> None:
            cancelled.set()
            sftp.close()
            database.cancel()

        def download_extract() -> Extract:
            with self.display.phase("download") as phase:
                tick = phase.file("", "byte")
                return download(sftp, self.config.sftp, self.folder / "ia", tick, cancelled)

        def export_tables() -> None:
            retried(database.connect, cancelled)
            with self.display.phase("export", len(sql_diffs)) as phase:
                for sql_diff in sql_diffs:
                    path, tick = self.folder / "ic" / sql_diff.file, phase.file(sql_diff.file)
                    work = functools.partial(export, database, sql_diff, path, tick)
                    rows = retried(work, cancelled)
                    log.info("exported %s: %s", sql_diff.file, plural(rows, "row"))

        extract = together(download_extract, export_tables, cancel)
        self.summary.source_epoch = extract.epoch
        return extract

    def compare_files(self) -> list[Comparison]:
        """Compare every file before the first write."""
        comparisons = []
        with self.display.phase("compare", len(self.config.sql_diffs)) as phase:
            for sql_diff in self.config.sql_diffs:
                began = time.monotonic()
                phase.file(sql_diff.file)
                found = self.compare_file(sql_diff)
                check_parameters(found)
                log.info(
                    "%s: %s, of them %s", sql_diff.file, plural(found.source_rows, "row"), found
                )
                for difference in found.format_differences:
                    log.warning("%s", difference)
                if found.new_columns:
                    log.warning("%s", new_columns_warning(found))
                summary = found.summary()
                summary.seconds = round(time.monotonic() - began, 3)
                self.summary.files.append(summary)
                comparisons.append(found)
        return comparisons

    def compare_file(self, sql_diff: SqlDiff) -> Comparison:
        source, target = (self.folder / side / sql_diff.file for side in ("ia", "ic"))
        if not source.is_file():
            there = ", ".join(sorted(p.name for p in source.parent.iterdir())) or "none"
            raise DataError(
                f"ia/{sql_diff.file}: SameGoal's extract {self.summary.source_epoch} has no such "
                f"file ({sql_diff.where}); it has: {there}",
                "correct file= of that <SQLDiff>, or ask SameGoal to export the file",
            )
        return compare(source, target, self.folder / "diff" / sql_diff.file, sql_diff)

    def reasons_to_hold(self, extract: Extract, comparisons: Sequence[Comparison]) -> list[str]:
        """Why the changes must not be written yet; what was approved or forced is logged."""
        approved, summary = self.approved, self.summary
        held_diff = approved.folder / "diff" if approved else None
        past = past_files(self.run.earlier())
        excesses = over_limits(comparisons, self.config.limits, past, held_diff)
        reasons = [excess.sentence for excess in excesses if not excess.approved]
        allowed = [excess for excess in excesses if excess.approved]
        stale = too_old(extract, self.config.sftp.max_age_hours)
        if stale:
            summary.stale_epoch = extract.epoch
            before = approved.summary if approved else None
            if before is None or before.stale_epoch != extract.epoch:
                reasons.append(stale)
        summary.over_limits = [excess.sentence for excess in excesses] + ([stale] if stale else [])
        for reason in reasons:
            log.warning("over a limit: %s", reason)
        if approved:
            rows = sum(excess.changes for excess in allowed)
            summary.approval = Approval(
                approved.epoch, self.options.by or summary.account, self.options.why,
                local_time(time.time()).isoformat(timespec="seconds"), rows,
            )  # fmt: skip
            why = f" ({self.options.why})" if self.options.why else ""
            log.warning("run %s was approved by %s%s: %s beyond the limits",
                        approved.epoch, summary.approval.by, why, plural(rows, "row"))  # fmt: skip
        for excess in allowed:
            log.warning("approved: %s", excess.sentence)
        if self.options.force:
            summary.forced = bool(reasons)
            log.warning("the limits are skipped (--force, by %s)", summary.account)
        return reasons

    def held(self, reasons: Sequence[str]) -> HeldError:
        """What a held run tells: the reasons, all changes, and the command that approves them."""
        totals = "; ".join(
            f"{file.file} "
            + ", ".join(
                f"{file.tally(operation).found:,} to {operation}"
                for operation in OPERATIONS
                if file.tally(operation).found
            )
            for file in self.summary.files
            if file.total("found")
        )
        stale = "ask SameGoal for a newer extract, or " if self.summary.stale_epoch else ""
        return HeldError(
            f"nothing was written: {'; '.join(reasons)}. Changes in all: {totals or 'none'}",
            f"{stale}look at {self.folder / 'diff'}; if the changes are right, approve just "
            f"these:\n{self.options.typed('sync', '--approve', self.summary.epoch)}",
        )

    def apply_changes(self, database: Database, comparisons: Sequence[Comparison]) -> Failures:
        """Apply the changes of every file in the order of the SQLDiff elements."""
        failures = Failures(self.folder, self.config.limits.max_failures)
        with self.display.phase("apply", len(comparisons)) as phase:
            for found, summary in zip(comparisons, self.summary.files, strict=True):
                began = time.monotonic()
                wanted = summary.total("found") - summary.total("left_alone")
                if wanted:  # The connection lay idle during the download and the comparison.
                    retried(database.revive)
                try:
                    apply(database, found, summary, failures, phase.file(summary.file))
                finally:
                    summary.seconds = round(summary.seconds + time.monotonic() - began, 3)
                if wanted:
                    log.info(
                        "%s: %s of %s applied, %s failed", summary.file,
                        f"{summary.total('applied'):,}", plural(wanted, "change"),
                        f"{summary.total('failed'):,}",
                    )  # fmt: skip
        return failures

    def verify(self, database: Database, failures: Failures) -> None:
        """Export and compare the changed files again; what still differs: notconverged.csv.

        Rows that failed are not told again, nor those that no procedure is there for.
        """
        before = self.not_converged_before()
        left: list[Row] = []
        changed = [f for f in self.summary.files if f.total("found") > f.total("left_alone")]
        sql_diffs = {sql_diff.file: sql_diff for sql_diff in self.config.sql_diffs}
        with self.display.phase("verify", len(changed)) as phase:
            for summary in changed:
                file, sql_diff = summary.file, sql_diffs[summary.file]
                table, changes = (self.folder / "verify" / kind / file for kind in ("ic", "diff"))
                export(database, sql_diff, table, phase.file(file))
                again = compare(self.folder / "ia" / file, table, changes, sql_diff)
                for operation, call in sql_diff.calls.items():
                    for key in map(again.key.show, again.rows(operation)):
                        if (file, operation, key) not in failures.rows:
                            nights = before.get((file, operation, key), 0) + 1
                            procedure = call.procedure or "SQL"
                            left.append((file, operation, key, procedure, str(nights)))
                            summary.not_converged += 1
        if left:
            with csv_writer(self.folder / NOT_CONVERGED_NAME) as write:
                write([("file", "operation", "key", "procedure", "runs")])
                write(left)
        for name, operation, key, procedure, times in left:
            repeated = f", {times} runs in a row: the procedure has no effect"
            log.error("%s: %s of %s by %s did not converge%s", name, operation, key, procedure,
                      repeated if int(times) > 2 else "")  # fmt: skip

    def not_converged_before(self) -> dict[tuple[str, str, str], int]:
        """file, operation and key -> runs, of the last run that applied its changes."""
        last = next((run for run in self.run.earlier() if run.complete), None)
        path = last.folder / NOT_CONVERGED_NAME if last else None
        if not path or not path.is_file():
            return {}
        with local_errors(path), path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return {(row["file"], row["operation"], row["key"]): int(row["runs"]) for row in rows}

    def check_statement_files(self, made: Mapping[str, int]) -> None:
        """Raise HeldError for a file with far fewer rows than in the last complete run.

        What such a file lacks is deleted at SameGoal.
        """
        runs = [run.summary for run in self.run.earlier() if run.complete and run.summary]
        held = self.approved.summary if self.approved else None
        reasons = []
        for statement in self.config.statements:
            file, limit = statement.file, statement.max_shrink
            before = next((run.statement_files[file] for run in runs
                           if file in run.statement_files), 0) if file else 0  # fmt: skip
            if not (file and limit) or limit.allows(before - made[file], before):
                continue
            reason = (
                f"{file}: {plural(made[file], 'row')} instead of {before:,} in the last complete "
                f"run, maxShrink is {limit}"
            )
            self.summary.over_limits.append(reason)
            approved = held.statement_files.get(file, before) if held else before
            if not self.options.force and made[file] < approved:
                reasons.append(reason)
        if reasons:
            raise HeldError(
                f"nothing was uploaded: {'; '.join(reasons)}. The database is up to date: "
                f"{self.summary.changes()}",
                f"look at {self.folder}; if the file is right, approve it:\n"
                f"{self.options.typed('sync', '--approve', self.summary.epoch)}",
            )

    def conclude(self) -> None:
        """The outcome of a run that has applied everything, as it is pushed."""
        problems = []
        if failed := self.summary.total("failed"):
            problems.append(f"{plural(failed, 'row')} failed, see {FAILURES_NAME}")
        if left := sum(file.not_converged for file in self.summary.files):
            problems.append(f"{plural(left, 'row')} did not converge, see {NOT_CONVERGED_NAME}")
        message = "; ".join([*problems, self.summary.changes()])
        if problems:
            self.run.conclude("partial", ROWS_FAILED, message)
        else:
            self.run.conclude("complete", 0, message)


# ------------------------------------ command: schoolinks
# Given: config.xml and the log-ins of SchooLinks.
# Gives: SchooLinks' files, uploaded.
# Raises: nothing; the run's outcome tells.


@dataclasses.dataclass(kw_only=True)
class SchooLinksOptions(Options):
    dry_run: bool = False
    test: bool = False
    force: bool = False


def schoolinks_arguments() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument("--dry-run", action="store_true", help="build the files only")
    parser.add_argument("--test", action="store_true", help="upload to the test directory")
    parser.add_argument(
        "--force", action="store_true",
        help="skip the guard against shrinking: SchooLinks deletes or archives what a file lacks",
    )  # fmt: skip
    parser.set_defaults(run=run_schoolinks, kind=SchooLinksOptions)
    return parser


def run_schoolinks(options: SchooLinksOptions) -> int:
    """The nightly files for SchooLinks: query, build, check all of them, then upload."""
    with open_run(options) as run:
        config = load_config(options.config, SchooLinksConfig)
        use_config(run, config, options)
        with only_run(run, "schoolinks"):
            if started(run, config, options):
                schoolinks(options, run, config)
    return cast("int", run.summary.exit_code)


def schoolinks(options: SchooLinksOptions, run: Run, config: SchooLinksConfig) -> None:
    """Query, build, check all files, then upload them."""
    settings, today = config.schoolinks, datetime.date.today()
    login, server = schoolinks_credentials(settings, options.home, upload=not options.dry_run)
    warn_of_readable(config)
    passwords = {login.password} | ({server.password, server.passphrase} if server else set())
    keep_secret(passwords)

    def query() -> list[Section]:
        with Oracle(settings, login) as powerschool:
            powerschool.connect()
            if server:  # Loading it takes 0.1 s, so it is done while PowerSchool works.
                threading.Thread(target=importlib.import_module, args=["paramiko"]).start()
            return StudentFiles(settings, today).build(powerschool)

    with Display(options.terminal, run) as display:
        with display.phase("PowerSchool"):
            sections = retried(query)
        for section in sections:
            section.write(run.folder, settings.quoting)
        files = [section.summary() for section in sections]
        run.summary.sections = files
        UploadGuard(settings, run.earlier(), today).check(sections, force=options.force)
        message = ", ".join(f"{file.file}: {plural(file.rows, 'row')}" for file in files)
        if server is None:
            run.conclude("dry run", 0, f"{message}; nothing was uploaded")
            return
        directory = settings.test_directory if options.test else settings.directory
        with display.phase("upload"), Sftp(server, options.home) as sftp:
            kind: Literal["test", "live"] = "test" if options.test else "live"
            upload_files(sftp, directory, run.folder, files, kind)
        run.conclude("complete", 0, f"{message}; uploaded to {directory}")
        run.complete()
    if not options.test:  # else keepRuns="1" would delete what the next night is compared with
        prune(run.history, config.history.keep_runs, run.folder)


# ------------------------------------ command: diff
# Given: two CSV files.
# Gives: the changes that make the second one equal to the first.
# Raises: ConfigError for the files, DataError for what is in them.


@dataclasses.dataclass(kw_only=True)
class DiffOptions(Options):
    source: Path
    target: Path
    key: str | None = None
    output: Path | None = None
    sort: bool = False
    trim: bool = False
    null_text: str | None = None


def diff_arguments() -> Parser:
    parser = Parser(add_help=False)
    add = parser.add_argument
    add("source", type=Path, metavar="A.csv", help="the file that is right")
    add("target", type=Path, metavar="B.csv", help="the file to be changed")
    add("--key", metavar="COLS",
        help="columns that identify a row, in sort order: id,start or id:int "
        "(default: the whole row)")  # fmt: skip
    add("--output", type=Path, metavar="FILE", help="default: standard output")
    add("--sort", action="store_true", help="sort both files first")
    add("--trim", action="store_true", help="drop blanks at the end of fields")
    add("--null-text", metavar="TEXT", help="a field of TEXT counts as empty")
    parser.set_defaults(run=run_diff, kind=DiffOptions)
    return parser


def run_diff(options: DiffOptions) -> int:
    """`sgsync.py diff`: the diff alone, on two files."""
    try:
        key = None if options.key is None else Parse.key(options.key)
    except ValueError as error:
        raise ConfigError(f"--key '{one_line(options.key)}': {error}", "--key id,start") from None
    sql_diff = SqlDiff(
        file=options.source.name, key=key, sort=options.sort, trim=options.trim,
        null_text=options.null_text,
    )  # fmt: skip
    files = (options.source, options.target)
    for path in files:
        _check_readable(path)
    if options.json and options.output is None:
        raise ConfigError("--json: standard output holds the changes", "name a file with --output")
    with _diff_output(options.output, files) as changes:
        found = diff(*files, changes, sql_diff, [str(path) for path in files])
    log.info("%s, %s: %s",
             plural(found.source_rows, "row"), plural(found.target_rows, "row"), found)  # fmt: skip
    if options.json:
        summary = RunSummary("diff", files=[found.summary()])
        summary.conclude("complete", 0, str(found))
        print_json(dataclasses.asdict(summary))
    return 0


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
            try:
                yield sys.stdout.buffer
                sys.stdout.buffer.flush()
            except OSError as error:
                with contextlib.suppress(OSError):  # Or Python tries once more, and complains.
                    sys.stdout.close()
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


# ------------------------------------ command: trust
#
# Given: the address of a server, and on request the fingerprint that its key must have.
# Gives: the key in known_hosts, after a person or the fingerprint has confirmed it.
# Raises: ConfigError without anybody to ask; TransferError for a key that does not fit.


@dataclasses.dataclass(kw_only=True)
class TrustOptions(Options):
    job: str = "sync"
    host: str = ""
    port: int | None = None
    fingerprint: str = ""
    replace: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig(Config):
    """What `trust` uses of config.xml: it must work before the rest is filled in."""

    sftp: SftpSettings = dataclasses.field(metadata={"element": "SFTP"})


def trust_arguments() -> Parser:
    parser = Parser(add_help=False)
    add = parser.add_argument
    add("--job", choices=("sync", "schoolinks"),
        help="whose server: that of <SFTP> (sync, the default) or SCHOOLINKS_SFTP_ADDRESS",
    )  # fmt: skip
    add("--host", metavar="HOST", help="another server")
    add("--port", type=int, metavar="N", help="its port (default with --host: 22)")
    add("--fingerprint", metavar="FINGERPRINT",
        help="pin the key that has this fingerprint without asking: SHA256:..., MD5:aa:bb:..., or "
        "aa:bb:...")  # fmt: skip
    add(
        "--replace",
        action="store_true",
        help="replace the pinned key of a server that has a new one",
    )
    parser.set_defaults(run=run_trust, kind=TrustOptions)
    return parser


def run_trust(options: TrustOptions) -> int:
    """Fetch a server's host key, have it confirmed, and pin it."""
    return Trust(options).work()


class Trust:
    """One server's host key: what it shows, what is pinned, and whether that may change."""

    KINDS = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521",
             "ssh-rsa")  # fmt: skip

    def __init__(self, options: TrustOptions) -> None:
        self.options = options
        self.fingerprint = self._fingerprint(options.fingerprint)
        self.host, self.port, known_hosts = self._server()
        self.where = f"{self.host}:{self.port}"
        self.host_keys = HostKeys(options.home / known_hosts)
        self.pinned = self.host_keys.of(self.host, self.port)

    def work(self) -> int:
        kinds = {key.get_name() for key in self.pinned}
        valid = [key for key in self._shown(*sorted(kinds)) if key in self.pinned]
        if self.fingerprint:
            key = self._fitting()
        else:
            key = valid[0] if valid else fetch_host_key(self.host, self.port)
        if key in self.pinned:
            self._tell(key, "already pinned")
            return 0
        changed = bool(self.pinned) and not valid
        if changed and not self.options.replace:
            raise TransferError(
                f"{self.where}: the server shows a different host key; nothing was changed\n"
                f"shown:  {self._described(key)}\n"
                + "\n".join(f"pinned: {self._described(each)}" for each in self.pinned),
                "ask the server's operator, through a different channel, whether the host key was "
                "changed; only if it was, replace the pinned one:\n"
                + self.options.typed(*self._words(), "--replace"),
            )
        if not self.fingerprint:
            self._confirm(key)
        if changed:
            self.host_keys.replace(self.host, self.port, key)
        else:
            self.host_keys.pin(self.host, self.port, key)
        self._tell(key, "pinned")
        return 0

    def _server(self) -> tuple[str, int, str]:
        """Host, port, and the file for its key, relative to the home."""
        options = self.options
        if options.port is not None and not 0 < options.port < 65536:
            raise ConfigError(f"--port {options.port}: is not a port", "--port 22")
        if options.port and not options.host:
            raise ConfigError("--port has no effect without --host", "--host HOST --port N")
        if options.job == "schoolinks":
            host, port = (options.host, 22) if options.host else schoolinks_address()
            beside = (options.home / "known_hosts").is_file()
            return host, options.port or port, "known_hosts" if beside else "ssh/known_hosts"
        try:
            settings = load_config(options.config, ServerConfig).sftp
        except ConfigError:
            if not options.host:
                raise
            return (
                options.host,
                options.port or 22,
                SftpSettings(host="-", username="-").known_hosts,
            )
        if options.host:
            return options.host, options.port or 22, settings.known_hosts
        return settings.host, settings.port, settings.known_hosts

    @staticmethod
    def _fingerprint(text: str) -> str:
        """As `_fingerprints` spells it; raises ConfigError for what is none."""
        if not text:
            return ""
        sha = re.fullmatch(r"(?i:sha256:)?([A-Za-z0-9+/]{43})=?", text.strip())
        md5 = re.fullmatch(r"(?i:md5:)?((?:[0-9A-Fa-f]{2}:?){15}[0-9A-Fa-f]{2})", text.strip())
        if sha:
            return f"SHA256:{sha[1]}"
        if md5:
            digits = md5[1].replace(":", "").lower()
            return "MD5:" + ":".join(map("".join, batched(digits, 2)))
        raise ConfigError(
            f"--fingerprint '{shortened(one_line(text))}': is not a fingerprint",
            "write it as SHA256:... (43 characters) or MD5:aa:bb:... (16 pairs)",
        )

    @staticmethod
    def _fingerprints(key: paramiko.PKey) -> tuple[str, str]:
        """SHA256, and MD5 as older agents show it; each as ssh-keygen -l prints it."""
        # No protection rests on MD5 where SHA256 is given: the person chooses what to compare.
        digest = hashlib.md5(key.asbytes(), usedforsecurity=False).hexdigest()
        return str(key.fingerprint), "MD5:" + ":".join(map("".join, batched(digest, 2)))

    def _described(self, key: paramiko.PKey) -> str:
        return f"{key.get_name()} {' '.join(self._fingerprints(key))}"

    def _shown(self, *kinds: str) -> Iterator[paramiko.PKey]:
        """The keys of these types that the server has."""
        for kind in kinds:
            try:
                yield fetch_host_key(self.host, self.port, kind)
            except TransferError as error:
                if error.transient:  # else it has none of that type
                    raise

    def _fitting(self) -> paramiko.PKey:
        """The server's key that has the fingerprint, of whatever type."""
        seen = []
        for key in self._shown(*self.KINDS):
            if self.fingerprint in self._fingerprints(key):
                return key
            seen.append(key)
        raise TransferError(
            f"{self.where}: no host key has the fingerprint {self.fingerprint}; nothing was "
            "changed\n" + "\n".join(f"shown: {self._described(key)}" for key in seen),
            "check the fingerprint with the server's operator; if it is right, this is not their "
            "server",
        )

    def _confirm(self, key: paramiko.PKey) -> None:
        """Have a person compare the fingerprint; raises unless the answer is yes."""
        sha256, md5 = self._fingerprints(key)
        old = [f"pinned: {self._described(each)}" for each in self.pinned]
        for line in (f"{self.where} shows this host key:", f"  {key.get_name()}", f"  {sha256}",
                     f"  {md5}", *old):  # fmt: skip
            say(line)
        say(
            "Compare it with the fingerprint that the server's operator gave you through a "
            "different channel, such as the phone."
        )
        agreed = agree(
            "Is it the same?",
            "pin it without a question if it has the fingerprint that the operator gave you:\n"
            + self.options.typed(*self._words(), "--fingerprint", "SHA256:..."),
        )
        if not agreed:
            raise TransferError(
                f"{self.where}: the host key was not confirmed; nothing was changed",
                "if the operator's fingerprint belongs to a key of another type, name it:\n"
                + self.options.typed(*self._words(), "--fingerprint", "SHA256:..."),
            )

    def _words(self) -> list[str]:
        """This command as it was typed, as far as it names the server."""
        options, words = self.options, ["trust"]
        words += ["--job", options.job] if options.job != "sync" else []
        words += ["--host", options.host] if options.host else []
        words += ["--port", str(options.port)] if options.port else []
        return words + (["--replace"] if options.replace else [])

    def _tell(self, key: paramiko.PKey, result: str) -> None:
        sha256, md5 = self._fingerprints(key)
        if self.options.json:
            print_json({
                "host": self.host, "port": self.port, "type": key.get_name(), "sha256": sha256,
                "md5": md5, "file": str(self.host_keys.path), "result": result,
            })  # fmt: skip
        else:
            print(
                f"{self.where} {key.get_name()} {sha256} {md5}: {result} in {self.host_keys.path}"
            )


# ------------------------------------ command: procedures
#
# Given: config.xml, the database, and a script that defines procedures.
# Gives: a table of the procedures; on request the script is run, or compared with the database.
# Raises: DatabaseError for a missing procedure, a refused batch.


@dataclasses.dataclass(kw_only=True)
class ProceduresOptions(Options):
    install: bool = False
    diff: bool = False
    yes: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProceduresConfig(Config):
    """What `procedures` uses of config.xml."""

    database: DatabaseSettings = dataclasses.field(metadata={"element": "Database"})
    sql_diffs: tuple[SqlDiff, ...] = dataclasses.field(metadata={"element": "Download"})
    statements: tuple[Statement, ...] = dataclasses.field(
        default=(), metadata={"element": "Upload"}
    )


def procedures_arguments() -> Parser:
    parser = Parser(add_help=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--install", action="store_true",
        help="run procedures.local.sql, or procedures.sql where there is none: all of it or, after "
        "an error, nothing",
    )  # fmt: skip
    what.add_argument(
        "--diff", action="store_true",
        help="list the definitions in that file that the database has in another form; with "
        "--verbose, show what differs",
    )  # fmt: skip
    parser.add_argument("--yes", action="store_true", help="with --install: do not ask")
    parser.set_defaults(run=run_procedures, kind=ProceduresOptions)
    return parser


def run_procedures(options: ProceduresOptions) -> int:
    """List, install, or compare the procedures."""
    config = load_config(options.config, ProceduresConfig)
    keep_secret(config.secrets)
    with Database(config.database) as database:
        database.connect()
        command = Procedures(options, config, database)
        if options.diff:
            return command.compare()
        if options.install:
            command.install()
        return command.show()


@dataclasses.dataclass
class NamedProcedure:
    """A procedure that config.xml names; `passes` is how many values each call has."""

    name: str
    passes: list[int | None] = dataclasses.field(default_factory=list)
    used_by: list[str] = dataclasses.field(default_factory=list)


def named_procedures(
    sql_diff: SqlDiff, columns: Row | None
) -> Iterator[tuple[str, str, int | None]]:
    """Operation, procedure, and how many values its calls have, None if only `columns` tells."""
    for operation, call in sql_diff.calls.items():
        if call.procedure:
            passed: Sequence[str] | None = call.parameters or columns
            if operation == DELETE and not call.parameters:
                passed = sql_diff.key or columns
            yield operation, call.procedure, None if passed is None else len(passed)


class Procedures:
    """The procedures of one district."""

    ERRORS = 20  # Nobody reads on.

    def __init__(
        self, options: ProceduresOptions, config: ProceduresConfig, database: Database
    ) -> None:
        self.options, self.config, self.database = options, config, database
        self.catalog = Catalog(database)
        local = options.home / "procedures.local.sql"
        self.path = local if os.path.lexists(local) else options.home / "procedures.sql"

    def show(self) -> int:
        """Print what config.xml names and what the database has; 4 where a call must fail."""
        lines, faulty = [], []
        for named in self._named():
            takes = sorted({found.parameters for found in self.catalog.find(named.name)})
            faults = dict.fromkeys(
                self.catalog.fault(named.name, count) for count in named.passes or [None]
            )
            fault = "; ".join(filter(None, faults))
            lines.append({
                "procedure": named.name,
                "state": "found" if takes else "missing",
                "takes": " or ".join(map(str, takes)),
                "passed": " or ".join(map(str, dict.fromkeys(named.passes))),
                "used_by": ", ".join(named.used_by),
                "fault": fault,
            })  # fmt: skip
            if fault:
                faulty.append(f"{named.name}: {fault}")
        self._print(lines)
        if not faulty:
            return 0
        error = DatabaseError(
            f"{plural(len(faulty), 'procedure')} cannot be called:\n" + "\n".join(faulty),
            f"install them:\n{self.options.typed('procedures', '--install')}\n"
            "or grant EXECUTE on them to the user of sgsync, or correct config.xml",
        )
        log.error("%s", error)
        return error.exit_code

    def install(self) -> None:
        """Run the script in one transaction."""
        script = SqlScript.read(self.path, self.database.name)
        batches = script.batches()
        if not batches:
            raise ConfigError(f"{self.path}: contains no SQL", "restore the file")
        if not self.options.yes:
            say(f"{self.path}: {plural(len(batches), 'batch').replace('batchs', 'batches')} for "
                f"{self._place()}")  # fmt: skip
            agreed = agree("Run it?", self.options.typed("procedures", "--install", "--yes"))
            if not agreed:
                raise ConfigError("nothing was changed", "")
        errors = self._run(batches)
        if errors:
            self.database.close()
            raise DatabaseError(
                f"{self.path}: {plural(len(errors), 'error')}, all was rolled back:\n"
                + "\n".join(errors),
                "correct the file; if it says that a permission is missing, have the database's "
                "administrator run the file",
            )
        self.database.commit()
        log.info("%s: installed in %s", self.path, self._place())

    def compare(self) -> int:
        """Print which definitions of the script the database has otherwise, or not at all."""
        script = SqlScript.read(self.path, self.database.name)
        lines = []
        for wanted in script.definitions():
            found = self.catalog.find(wanted.name)
            texts = [routine.text for routine in found]
            state, kept = "missing" if not found else "differs", None
            if found and (wanted.text is None or not all(texts)):
                state = "cannot be compared"
            elif wanted.text:
                scripts = [self._kept(text) for text in texts if text]
                kept = next(iter(scripts), None)
                if any(wanted.text.comparable() == each.comparable() for each in scripts):
                    state = "same"
            line = {
                "procedure": wanted.name,
                "state": state,
                "line": f"{self.path.name}:{wanted.line}",
            }
            if state == "differs" and self.options.verbose and kept and wanted.text:
                line["diff"] = "\n".join(
                    difflib.unified_diff(
                        [text.rstrip() for text in kept.text.strip().splitlines()],
                        [text.rstrip() for text in wanted.text.text.strip().splitlines()],
                        "database", line["line"], lineterm="",
                    )
                )  # fmt: skip
            lines.append(line)
        self._print(lines)
        return 0

    def _named(self) -> list[NamedProcedure]:
        """Those of the SQLDiffs, then those of <Upload>."""
        found: dict[str, NamedProcedure] = {}
        for sql_diff in self.config.sql_diffs:
            columns = None
            if any(count is None for _, _, count in named_procedures(sql_diff, None)):
                subject = f"{sql_diff.file}: the query ({sql_diff.where})"
                columns, _ = self.catalog.first_rows(subject, sql_diff.query, 0)
                self.database.rollback()
            for operation, name, count in named_procedures(sql_diff, columns):
                named = found.setdefault(name, NamedProcedure(name))
                named.passes.append(count)
                named.used_by.append(f"{sql_diff.file} {operation}")
        for statement in self.config.statements:
            call = re.match(rf"(?i)\{{\s*call\s+({SqlScript.NAME})", statement.sql)
            if call:
                named = found.setdefault(call[1], NamedProcedure(call[1]))
                named.used_by.append(f"<SQL> {statement.where}")
        return list(found.values())

    def _place(self) -> str:
        sql = {MSSQL: "SELECT DB_NAME()", POSTGRESQL: "SELECT current_database()"}
        name = self.database.name
        if name not in sql:
            return one_line(name)
        _, rows = self.catalog.first_rows("the database", sql[name], 1)
        self.database.rollback()
        return f"the database {one_line(rows[0][0])} ({name})"

    def _run(self, batches: Sequence[Batch]) -> list[str]:
        """Run them in a transaction, left open; returns the errors, each with its place.

        After an error all is undone and the other batches are run again, to find their errors, too:
        no driver is to be trusted with a savepoint.
        """
        failed: dict[int, str] = {}
        while len(failed) < self.ERRORS:
            index = 0
            try:
                for index, batch in enumerate(batches):
                    for _ in range(0 if index in failed else batch.times):
                        self.database.execute("a batch", batch.text)
                return list(failed.values())
            except DatabaseError as error:
                self.database.close()  # Undoes it, even where the script has turned execution off.
                batch, message = batches[index], error.message.removeprefix("a batch: ")
                failed[index] = f"{self.path.name}:{self._line(batch, message)}: {message}"
                if error.transient or "NOEXEC" in batch.text.upper():  # else it guards the rest
                    break
            self.database.connect()
        return list(failed.values())

    @staticmethod
    def _line(batch: Batch, message: str) -> str:
        """The line that has what the message quotes, if only one has; else those of the batch.

        No driver tells the line.
        """
        lines = batch.text.rstrip().split("\n")
        for quoted in re.findall(r"['\"]([^'\"]+)['\"]", message):
            word = re.compile(rf"(?<!\w){re.escape(quoted)}(?!\w)")
            having = [number for number, line in enumerate(lines) if word.search(line)]
            if len(having) == 1:
                return str(batch.line + having[0])
        return f"{batch.line}-{batch.line + len(lines) - 1}" if lines[1:] else str(batch.line)

    def _kept(self, text: str) -> SqlScript:
        """A definition as the database has it, from its head on."""
        script = SqlScript(text, self.database.name)
        head = SqlScript.DEFINES.search(script.code)
        if self.database.name == POSTGRESQL or not head:
            return script
        return SqlScript(text[head.start() :], self.database.name)

    def _print(self, lines: Sequence[Mapping[str, str]]) -> None:
        if self.options.json:
            print_json(lines)
            return
        shown = [name for name in ("procedure", "state", "takes", "passed", "used_by", "line")
                 if any(name in line for line in lines)]  # fmt: skip
        heads = {"takes": "parameters", "passed": "passed", "used_by": "used by"}
        rows = [[heads.get(name, name) for name in shown]]
        rows += [[printable(line[name]) for name in shown] for line in lines]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row, line in zip(rows, [{}, *lines], strict=True):
            print("  ".join(map(str.ljust, row, widths)).rstrip())
            for text in line.get("diff", "").splitlines():
                print(f"    {printable(text)}")


# ------------------------------------ command: secret
#
# Given: a name, and a secret from a person or from standard input.
# Gives: the secret in the system's password store, for ${keyring:NAME} in config.xml.
# Raises: ConfigError.


@dataclasses.dataclass(kw_only=True)
class SecretOptions(Options):
    action: str
    name: str
    stdin: bool = False


def secret_arguments() -> Parser:
    parser = Parser(add_help=False)
    add = parser.add_argument
    add("action", choices=("set", "delete"), metavar="set|delete", help="store it or delete it")
    add("name", metavar="NAME", help="as in ${keyring:NAME}")
    add("--stdin", action="store_true", help="with set: read one line instead of asking twice")
    parser.set_defaults(run=run_secret, kind=SecretOptions)
    return parser


def run_secret(options: SecretOptions) -> int:
    """Store or delete a secret of the account that runs this."""
    if not re.fullmatch(r"[^${}\s](?:[^${}]{0,198}[^${}\s])?", options.name):
        raise ConfigError(
            f"'{shortened(one_line(options.name))}' cannot be the name of a secret",
            "use letters and digits, such as sis_password",
        )
    try:
        import keyring
        import keyring.errors
    except ImportError:
        install = command_line([sys.executable, "-m", "pip", "install", "keyring"])
        raise ConfigError(
            "the password store cannot be used: the keyring package is not installed",
            f"install it:\n{install}",
        ) from None
    store = f"{keyring.get_keyring().name} of the account {account_name()}"
    try:
        if options.action == "delete":
            if keyring.get_password(STORE_SERVICE, options.name) is None:
                raise ConfigError(f"{options.name}: there is no such secret in {store}")
            keyring.delete_password(STORE_SERVICE, options.name)
            log.info("%s: deleted from %s", options.name, store)
            return 0
        keyring.set_password(STORE_SERVICE, options.name, _new_secret(options))
    except keyring.errors.KeyringError as error:
        raise ConfigError(
            f"{options.name}: the password store refused: {one_line(error)}",
            "use a password store that this account can open without a desktop session, or "
            "${file:PATH} or ${env:NAME} instead",
        ) from None
    log.info("%s: stored in %s; write ${keyring:%s} in config.xml",
             options.name, store, options.name)  # fmt: skip
    return 0


def _new_secret(options: SecretOptions) -> str:
    """From standard input, or from a person, twice; never shown."""
    if options.stdin:
        line = sys.stdin.readline() if sys.stdin else ""
        first = second = line.rstrip("\r\n")
    elif sys.stdin and sys.stdin.isatty() and sys.stderr.isatty():
        first = getpass.getpass(f"{options.name}: ", sys.stderr)
        second = getpass.getpass("again: ", sys.stderr)
    else:
        raise ConfigError(
            "nobody can be asked: this is not a terminal; nothing was stored",
            "pass the secret on standard input: --stdin",
        )
    keep_secret([first])
    if not first:
        raise ConfigError(f"{options.name}: the secret is empty; nothing was stored")
    if first != second:
        raise ConfigError(
            f"{options.name}: the two entries differ; nothing was stored", "enter it again"
        )
    return first


# ------------------------------------ checks: JobChecks
#
# Given: the options of `check`.
# Gives: findings, one after another, of what every job needs.
# Raises: nothing; an Error is a finding.


@dataclasses.dataclass(frozen=True)
class Finding:
    """What came of one check: `state` is ok, warning, failed or skipped."""

    job: str
    check: str
    state: str
    message: str
    remedy: str = ""
    exit_code: int = 0

    def __str__(self) -> str:
        first, *more = self.message.split("\n")
        lines = [f"{self.state:<8} {self.job} {self.check}: {first}", *more]
        if self.remedy:
            lines += f"Try: {self.remedy}".split("\n")
        return ("\n" + 9 * " ").join(map(printable, lines))


class LogCollector(logging.Handler):
    """Keeps the warnings that the stages log: here they are findings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def take(self) -> list[str]:
        taken, self.messages = self.messages, []
        return taken


Findings = Iterator[Finding]


class JobChecks:
    """The checks of one job, in order; those that need one that failed are skipped.

    A check is a method that yields findings; an Error that it raises is one more, and it has then
    failed.
    """

    job = ""
    packages: tuple[str, ...] = ()
    history = "history"

    def __init__(self, options: CheckOptions) -> None:
        self.options, self.home = options, options.home
        self.stack = contextlib.ExitStack()
        self.warnings = LogCollector()

    def __enter__(self) -> JobChecks:
        self.stack.__enter__()
        log.addHandler(self.warnings)
        self.stack.callback(log.removeHandler, self.warnings)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def checks(self) -> list[tuple[str, Callable[[], Findings], tuple[str, ...]]]:
        """Name, method, and the names of the checks that it needs."""
        return [
            ("Python", self.python, ()),
            ("configuration", self.configuration, ()),
            ("permissions", self.permissions, ("configuration",)),
            ("disk", self.disk, ()),
        ]

    def run(self) -> Findings:
        passed: set[str] = set()
        for name, method, needs in self.checks():
            missing = [need for need in needs if need not in passed]
            if missing:
                yield Finding(self.job, name, "skipped", f"needs: {', '.join(missing)}")
                continue
            findings = list(self.tried(name, method))
            yield from findings
            if not any(finding.state == "failed" for finding in findings):
                passed.add(name)

    def tried(self, name: str, work: Callable[[], Findings]) -> Findings:
        """What `work` yields under that name; then what it logged as a warning, and its failure."""
        self.warnings.take()
        error = None
        try:
            for finding in work():
                yield dataclasses.replace(finding, check=finding.check or name)
        except Exception as exception:
            log.debug("", exc_info=True)
            error = Error.of(exception)
        for text in self.warnings.take():
            message, _, remedy = text.partition("\nTry: ")
            yield Finding(self.job, name, "warning", redact(message), redact(remedy))
        if error:
            message, remedy = redact(error.message), redact(error.remedy)
            yield Finding(self.job, name, "failed", message, remedy, error.exit_code)

    def ok(self, message: str) -> Finding:
        return Finding(self.job, "", "ok", message)

    def warning(self, message: str, remedy: str) -> Finding:
        return Finding(self.job, "", "warning", message, remedy)

    # ------------------------------------------------------------ what both jobs need

    def python(self) -> Findings:
        """This Python, and the packages against the ranges that were tested."""
        import importlib.metadata

        yield self.ok(f"{sys.version.split()[0]}, {sys.executable}")
        if FROZEN:
            return
        path = SCRIPT.with_name("requirements.txt")
        with local_errors(path):
            lines = path.read_text(encoding="utf-8").splitlines()
        found = []
        for name, low, high in re.findall(r"(?m)^(\w+)>=([\d.]+),<([\d.]+)", "\n".join(lines)):
            if name not in self.packages:
                continue
            try:
                version = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                raise ConfigError(
                    f"the package {name} is not installed", packages_remedy()
                ) from None
            found.append(f"{name} {version}")
            numbers = [[int(n) for n in re.findall(r"\d+", text)] for text in (low, version, high)]
            if not numbers[0] <= numbers[1] < numbers[2]:
                yield self.warning(
                    f"{name} {version} was not tested, only {low} and newer, below {high}",
                    packages_remedy(),
                )
        yield self.ok(", ".join(found))

    def configuration(self) -> Findings:
        raise NotImplementedError

    def secret_paths(self) -> tuple[Path, ...]:
        """Files beside the configuration that only the job's account may read."""
        return ()

    def loaded(self) -> Config:
        raise NotImplementedError

    def permissions(self) -> Findings:
        """Who may read the secrets, and whether a run can be kept."""
        import tempfile

        history = self.home / self.history
        check_owner(history, self.options.arguments)
        warn_of_readable(self.loaded(), *self.secret_paths())
        place = next(path for path in (history, *history.parents) if path.exists())
        with local_errors(place), tempfile.TemporaryFile(dir=place):
            pass
        yield self.ok(f"{account_name()} can write to {place}")

    def notices(self) -> Findings:
        """Whether anybody is told of a failure, and whether a run would pause today."""
        config = self.loaded()
        for pause in config.pauses:
            if pause.covers(datetime.date.today()):
                yield self.warning(
                    f"today is in a <Pause>: nothing runs from {pause.from_} to {pause.to}",
                    "delete the <Pause> if it is over",
                )
        if config.notices:
            yield self.ok(", ".join(f"<Notify> on {notice.on}" for notice in config.notices))
        else:
            yield self.warning("nobody is told when a run fails", "add <Notify> to config.xml")

    def disk(self) -> Findings:
        """The free space against the largest of the last runs."""
        history = self.home / self.history
        last = runs(history)[:10] if history.is_dir() else []
        size = 0
        for run in last:
            with contextlib.suppress(OSError):
                files = [path for path in run.folder.rglob("*") if path.is_file()]
                size = max(size, sum(path.stat().st_size for path in files))
        place = next(path for path in (history, *history.parents) if path.exists())
        with local_errors(place):
            free = shutil.disk_usage(place).free
        text = f"{free >> 20:,} MB free"
        if size:
            text += f", the largest of the last {plural(len(last), 'run')} has {size >> 20:,} MB"
        if free < max(3 * size, 100 << 20):  # a run writes before the oldest one is deleted
            yield self.warning(text, "free some disk space, or lower keepRuns= in <History>")
        else:
            yield self.ok(text)

    # ------------------------------------------------------------ SFTP servers

    def host_key(self, server: SftpSettings) -> Findings:
        """Whether the server still shows the key that is pinned."""
        host_keys = HostKeys(self.home / server.known_hosts)
        trust = self.options.typed(*server.trust)
        pinned = host_keys.of(server.host, server.port)
        if not pinned:
            raise TransferError(
                f"{host_keys.path}: has no host key for {HostKeys.name(server.host, server.port)}",
                f"pin it:\n{trust}",
            )
        key = fetch_host_key(server.host, server.port, pinned[0].get_name())
        host_keys.check(
            server.host, server.port, key,
            "ask the server's operator whether the host key was changed; only if it was, replace "
            f"the pinned key:\n{trust}",
        )  # fmt: skip
        yield self.ok(f"{server.host}:{server.port} {key.get_name()} {key.fingerprint}")

    def clock(self, seconds: float, whose: str) -> Finding:
        """A difference between this machine's clock and another one."""
        text = f"{abs(seconds):,.0f} s {'ahead of' if seconds > 0 else 'behind'} {whose}"
        if abs(seconds) < 300:  # A file server may keep whole or even seconds.
            text = f"agrees with {whose}" if abs(seconds) < 3 else text
            return Finding(self.job, "clock", "ok", text)
        remedy = "set the clock: the age of an extract and the names of runs depend on it"
        return Finding(self.job, "clock", "warning", text, remedy)


# ------------------------------------ checks of sync: SyncChecks
#
# Given: what `sync` is given.
# Gives: findings, from the ODBC driver to the parameters of the procedures.
# Raises: nothing; an Error is a finding.


class SyncChecks(JobChecks):
    """What `sync` needs."""

    job = "sync"
    packages = ("paramiko", "pyodbc", "lxml", "rich", "filelock", "tenacity")
    ROWS = 1000  # looked at on each side
    CLOCKS: typing.ClassVar = {
        MSSQL: "SELECT DATEDIFF(second, '19700101', SYSUTCDATETIME())",
        POSTGRESQL: "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS bigint)",
    }

    config: SyncConfig
    sftp: Sftp
    database: Database
    extract: Extract | None = None

    def checks(self) -> list[tuple[str, Callable[[], Findings], tuple[str, ...]]]:
        config, sftp, database = "configuration", "SFTP log-in", "database log-in"
        return [
            *super().checks(),
            ("notices", self.notices, (config,)),
            ("ODBC driver", self.driver, (config,)),
            ("host key", lambda: self.host_key(self.config.sftp), (config,)),
            (sftp, self.log_in, ("host key",)),
            ("download directory", self.download_directory, (sftp,)),
            ("upload directory", self.upload_directory, (sftp,)),
            (database, self.database_log_in, (config, "ODBC driver")),
            ("queries", self.queries, (database,)),
            ("procedures", self.procedures, (database,)),
        ]

    def configuration(self) -> Findings:
        self.config = load_config(self.options.config, SyncConfig)
        keep_secret(self.config.secrets)
        count = len(self.config.sql_diffs)
        yield self.ok(f"{self.options.config}: {plural(count, 'SQLDiff')}")

    def loaded(self) -> Config:
        return self.config

    def secret_paths(self) -> tuple[Path, ...]:
        return (self.home / self.config.sftp.private_key,)

    def driver(self) -> Findings:
        """Whether the ODBC driver of the connection string is installed."""
        import pyodbc

        text = self.config.database.connection_string
        found = re.search(r"(?i)(?:^|;)\s*driver\s*=\s*(?:\{([^}]*)\}|([^;]*))", text)
        name = ((found[1] or found[2]) if found else "").strip()
        if not name:
            yield self.ok("named by the data source (DSN)")
        elif name in pyodbc.drivers() or Path(name).is_file():
            yield self.ok(name)
        else:
            raise DatabaseError(
                f"the driver {one_line(name)} is not installed; these are: "
                f"{', '.join(pyodbc.drivers()) or 'none'}",
                "install that driver, or correct Driver= in connectionString",
            )

    def log_in(self) -> Findings:
        self.sftp = self.stack.enter_context(Sftp(self.config.sftp, self.home))
        self.sftp.connect()
        yield self.ok(f"{self.sftp.where} as {self.config.sftp.username}")

    def download_directory(self) -> Findings:
        """The newest extract, its age, and the files that config.xml wants of it."""
        settings = self.config.sftp
        extract = newest_extract(self.sftp, settings)
        yield self.ok(
            f"{settings.download_directory}/{extract.epoch}: "
            f"{plural(len(extract.files), 'CSV file')}, "
            f"{plural(sum(file.size for file in extract.files), 'byte')}"
        )
        if stale := too_old(extract, settings.max_age_hours):
            yield self.warning(stale, "ask SameGoal whether the nightly export is scheduled")
        names = {file.name for file in extract.files}
        missing = [each.file for each in self.config.sql_diffs if each.file not in names]
        if missing:
            raise DataError(
                f"the extract {extract.epoch} does not contain {', '.join(missing)}; it has "
                f"{', '.join(map(one_line, sorted(names))) or 'no CSV file'}",
                "correct file= of that <SQLDiff>, or ask SameGoal to export the file",
            )
        self.extract = extract

    def upload_directory(self) -> Findings:
        """Make a directory in it and remove it; its time is the server's clock."""
        import secrets

        directory, probe = (
            self.config.sftp.upload_directory,
            f".sgsync-probe-{secrets.token_hex(4)}",
        )
        if not self.sftp.exists(directory):
            raise TransferError(
                f"{self.sftp.where}: {directory}: upload directory does not exist",
                "correct uploadDirectory on <SFTP>",
            )
        before = time.time()
        self.sftp.make_directory(f"{directory}/{probe}")
        now = (before + time.time()) / 2
        times = []
        with contextlib.suppress(TransferError):  # It may be write-only.
            entries = self.sftp.listing(directory)
            times = [entry.modified for entry in entries if entry.name == probe]
        self.sftp.check_writable(directory, probe)
        yield self.ok(f"{directory} can be written to")
        for modified in times:
            yield self.clock(now - modified, "the clock of the SFTP server")

    def database_log_in(self) -> Findings:
        self.database = self.stack.enter_context(Database(self.config.database))
        self.database.connect()
        yield self.ok(one_line(self.database.name))
        if sql := self.CLOCKS.get(self.database.name):
            before = time.time()
            _, rows = Catalog(self.database).first_rows("the clock", sql, 1)
            now = (before + time.time()) / 2
            self.database.rollback()
            seconds = now - int(cast("int", rows[0][0]))
            yield self.clock(seconds, "the clock of the database server")

    def queries(self) -> Findings:
        """Each query against the newest extract: columns, order, duplicate keys of the first rows.

        It is compared as in a run, in a folder that only this account can read, and then deleted.
        """
        import tempfile

        with tempfile.TemporaryDirectory(prefix="sgsync-") as folder:
            for sql_diff in self.config.sql_diffs:
                work = functools.partial(self.query, sql_diff, Path(folder))
                yield from self.tried(f"query {sql_diff.file}", work)

    def query(self, sql_diff: SqlDiff, folder: Path) -> Findings:
        source, target = (folder / side / sql_diff.file for side in ("ia", "ic"))
        subject = f"ic/{sql_diff.file}: the query ({sql_diff.where})"
        columns, rows = Catalog(self.database).first_rows(subject, sql_diff.query, self.ROWS)
        self.database.rollback()
        with new_file(target) as file:
            file.write(csv_lines([columns]))
            if rows:
                file.write(csv_lines(rows, sql_diff.date_format))
        sides = f"the first {plural(len(rows), 'row')} of the database"
        entry = next(
            (e for e in (self.extract.files if self.extract else ()) if e.name == sql_diff.file),
            None,
        )
        if entry:
            with new_file(source) as file:
                file.write(self.head(entry))
            sides += " and those of SameGoal's file"
        else:
            source = target
        names = (f"ia/{sql_diff.file}", f"ic/{sql_diff.file}")
        found = diff(source, target, io.BytesIO(), sql_diff, names, may_be_empty=True)
        check_parameters(found)
        yield self.ok(f"{plural(len(columns), 'column')}; {sides} can be compared")

    def head(self, entry: RemoteEntry) -> bytes:
        """A file of the extract, or the whole records at its beginning, `ROWS` at least."""
        extract = cast("Extract", self.extract)
        directory = f"{self.config.sftp.download_directory}/{extract.epoch}"
        data = b""
        self.sftp.connect()
        for _, blocks in self.sftp.read_files(directory, [entry], ahead=False):
            for block in blocks:
                data += block
                if data.count(b"\n") > self.ROWS or len(data) > RECORD_BYTES:
                    break
            if len(data) < entry.size:
                break
        else:
            return data
        self.sftp.close()  # In the middle of an answer.
        end = data.rfind(b"\n") + 1
        while end and data.count(b'"', 0, end) % 2:  # That line break is in a quoted field.
            end = data.rfind(b"\n", 0, end - 1) + 1
        return data[:end] or data

    def procedures(self) -> Findings:
        """Each procedure: whether it is there, may be called, and takes what is passed."""
        catalog = Catalog(self.database)
        for sql_diff in self.config.sql_diffs:
            columns = None
            if any(count is None for _, _, count in named_procedures(sql_diff, None)):
                with contextlib.suppress(DatabaseError):  # told by the check of the query
                    columns, _ = catalog.first_rows("the query", sql_diff.query, 0)
                self.database.rollback()
            for operation, name, count in named_procedures(sql_diff, columns):

                def called(name: str = name, count: int | None = count) -> Findings:
                    if fault := catalog.fault(name, count):
                        raise DatabaseError(
                            f"{name}: {fault}",
                            f"install it:\n{self.options.typed('procedures', '--install')}",
                        )
                    passed = "" if count is None else f", {plural(count, 'value')}"
                    yield self.ok(f"{name}{passed}")

                yield from self.tried(f"{sql_diff.file} {operation}", called)


# ------------------------------------ checks of schoolinks: SchooLinksChecks
#
# Given: what `schoolinks` is given.
# Gives: findings, from the environment to SchooLinks' directories.
# Raises: nothing; an Error is a finding.


class SchooLinksChecks(JobChecks):
    """What `schoolinks` needs."""

    job = "schoolinks"
    packages = ("paramiko", "oracledb", "lxml", "rich", "filelock", "tenacity")
    history = "history/schoolinks"
    DAYS = 30  # of attendance that are counted

    config: SchooLinksConfig
    login: OracleLogin
    server: SftpSettings
    oracle: Oracle
    sftp: Sftp

    def checks(self) -> list[tuple[str, Callable[[], Findings], tuple[str, ...]]]:
        config, variables, log_in = "configuration", "environment", "PowerSchool log-in"
        return [
            *super().checks(),
            ("notices", self.notices, (config,)),
            (variables, self.variables, (config,)),
            (log_in, self.powerschool, (variables,)),
            ("PowerSchool tables", self.tables, (log_in,)),
            ("host key", lambda: self.host_key(self.server), (variables,)),
            ("SFTP log-in", self.log_in, ("host key",)),
            ("directories", self.directories, ("SFTP log-in",)),
        ]

    def configuration(self) -> Findings:
        self.config = load_config(self.options.config, SchooLinksConfig)
        keep_secret(self.config.secrets)
        settings = self.config.schoolinks
        sections = [s.file for s in (settings.attendance, settings.gpa, settings.tags) if s.enabled]
        yield self.ok(f"{self.options.config}: {', '.join(sections)}")

    def loaded(self) -> Config:
        return self.config

    def secret_paths(self) -> tuple[Path, ...]:
        key = self.config.schoolinks.private_key
        return (self.home / key,) if key else ()

    def variables(self) -> Findings:
        """The log-ins of both servers."""
        settings = self.config.schoolinks
        self.login, server = schoolinks_credentials(settings, self.home, upload=True)
        self.server = cast("SftpSettings", server)
        keep_secret({self.login.password, self.server.password, self.server.passphrase})
        yield self.ok(f"{self.login.user} at PowerSchool, {self.server.username} at SchooLinks")

    def powerschool(self) -> Findings:
        self.oracle = self.stack.enter_context(Oracle(self.config.schoolinks, self.login))
        self.oracle.connect()
        yield self.ok(f"{self.login.dsn} as {self.login.user}")

    def tables(self) -> Findings:
        """Each table and view: its columns, and how many rows have a value in each."""
        for table, columns in self.wanted().items():
            yield from self.tried(table, functools.partial(self.table, table, columns))

    def wanted(self) -> dict[str, list[str]]:
        """Table -> the columns that the queries read."""
        settings = self.config.schoolinks
        found: dict[str, list[str]] = {
            "students": [settings.identifier_column, "id", "dcid", "fteid", "enroll_status",
                         "grade_level", "schoolid"],
        }  # fmt: skip
        columns = []
        if settings.gpa.enabled:
            gpa = settings.gpa
            columns += [(gpa.table, name) for name in (gpa.unweighted, gpa.weighted) if name]
        if settings.tags.enabled:
            columns += [(tag.table, tag.column) for tag in settings.tags.tags]
        for table, column in columns:
            start = [] if table.lower() == "students" else ["studentsdcid"]
            found.setdefault(table.lower(), start).append(column.lower())
        if settings.attendance.enabled:
            found[settings.attendance.view] = [
                "studentid", "fteid", "calendardate", "attendancevalue", "membershipvalue",
            ]  # fmt: skip
        return {table: list(dict.fromkeys(names)) for table, names in found.items()}

    def table(self, table: str, columns: Sequence[str]) -> Findings:
        binds: dict[str, object] = {}
        counts = ", ".join(f"COUNT({column})" for column in columns)
        sql, rows = f"SELECT COUNT(*), {counts} FROM {table}", "row"  # noqa: S608
        if "calendardate" in columns:  # A view of all years would take long to count.
            today = datetime.datetime.combine(datetime.date.today(), datetime.time())
            sql += " WHERE calendardate >= :since AND calendardate <= :today"
            binds = {"since": today - datetime.timedelta(days=self.DAYS), "today": today}
        ((total, *filled),) = self.oracle.query(f"PowerSchool: {table}", sql, binds)
        span = f" in the last {self.DAYS} days" if binds else ""
        text = f"{plural(int(total), rows)}{span}"
        shown = ", ".join(f"{n} {int(count):,}" for n, count in zip(columns, filled, strict=True))
        if not total:
            yield self.warning(
                f"{text}",
                "ask the administrator of PowerSchool whether this account may see the rows, or "
                "correct the name in <SchooLinks>",
            )
            return
        yield self.ok(f"{text}; filled: {shown}")
        for column, count in zip(columns, filled, strict=True):
            if not count:
                yield self.warning(
                    f"the column {column} is empty in every row{span}",
                    "check in PowerSchool whether the district uses that column",
                )

    def log_in(self) -> Findings:
        self.sftp = self.stack.enter_context(Sftp(self.server, self.home))
        self.sftp.connect()
        yield self.ok(f"{self.sftp.where} as {self.server.username}")

    def directories(self) -> Findings:
        """Only looked at: SchooLinks reads whatever arrives there."""
        settings = self.config.schoolinks
        for directory in (settings.test_directory, settings.directory):
            if self.sftp.exists(directory):
                yield self.ok(f"{directory} is there")
            elif directory == settings.directory:
                raise TransferError(
                    f"{self.sftp.where}: {directory}: it does not exist",
                    "correct directory= on <SchooLinks>, or ask SchooLinks",
                )
            else:
                yield self.warning(
                    f"{directory} does not exist", "correct testDirectory= on <SchooLinks>"
                )


# ------------------------------------ command: check
#
# Given: what a run is given.
# Gives: a line for each thing that a run needs, with the remedy where it is missing.
# Raises: nothing once it is under way; the exit code is that of the first failure.


@dataclasses.dataclass(kw_only=True)
class CheckOptions(Options):
    job: str = ""


def check_arguments() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument(
        "--job", choices=("sync", "schoolinks", "all"),
        help="what to check (default: the jobs that the configuration is filled in for)",
    )  # fmt: skip
    parser.set_defaults(run=run_check, kind=CheckOptions)
    return parser


def run_check(options: CheckOptions) -> int:
    """Try everything that a run needs, without changing anything."""
    wanted = [options.job] if options.job else filled_jobs(options.config)
    kinds: dict[str, type[JobChecks]] = {"sync": SyncChecks, "schoolinks": SchooLinksChecks}
    findings: list[Finding] = []
    for job, kind in kinds.items():
        if options.job == "all" or job in wanted:
            with kind(options) as checks:
                for finding in checks.run():
                    findings.append(finding)
                    if not options.json:
                        print(finding, flush=True)
    if options.json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    return next((each.exit_code for each in findings if each.exit_code), 0)


def filled_jobs(config: Path) -> list[str]:
    """The jobs whose elements are in the configuration and have no TODO(user) left.

    The template fills in <SchooLinks>, so that job also needs one of its environment variables.
    """
    source = XmlSource(config)
    elements = {"sync": ("SFTP", "Database", "Download"), "schoolinks": ("SchooLinks",)}
    jobs = []
    for job, tags in elements.items():
        found = [source.root.find(tag) for tag in tags]
        texts = [
            text
            for element in found
            if element is not None
            for each in element.iter(*ELEMENTS)
            for text in (*each.attrib.values(), each.text or "")
        ]
        if None not in found and not any("TODO(user)" in str(text) for text in texts):
            jobs.append(job)
    used = any(name.startswith(("SCHOOLINKS_", "POWERSCHOOL_")) for name in os.environ)
    if "schoolinks" in jobs and not used:
        jobs.remove("schoolinks")
    if not jobs:
        raise ConfigError(
            f"{config}: no job is filled in yet",
            "replace each TODO(user) for sync, or set SchooLinks' environment variables for "
            "schoolinks; name the job with --job to see what it lacks",
        )
    return jobs


# ------------------------------------ scheduling: Schedule
#
# Given: the options of `schedule`, and a job.
# Gives: the command to be run, and what all schedulers have in common.
# Raises: ConfigError for what cannot be scheduled; Error where the scheduler refuses.

HOURS = 12  # A run that takes longer is stopped.
PROGRAM_SECONDS = 60  # A program of the system may take as long.


@dataclasses.dataclass(frozen=True)
class ScheduleState:
    """What the system says of a schedule; times as it writes them."""

    name: str
    job: str
    next_run: str
    last_run: str
    result: int | None
    meaning: str

    def __str__(self) -> str:
        text = f"{self.name}: {self.job}, next run {self.next_run or 'unknown'}"
        if self.result is None:
            return f"{text}, last result: {self.meaning}"
        last = f", last run {self.last_run}" if self.last_run else ""
        return f"{text}{last}, last result {self.result}: {self.meaning}"


EXIT_MEANINGS = {
    0: "success",
    1: "unexpected error",
    2: "configuration or usage",
    3: "SFTP transfer",
    4: "database",
    5: "data",
    6: "held by a limit, nothing was written",
    7: "another run was active",
    8: "finished, but some rows failed",
    130: "interrupted",
    # Task Scheduler's own. Source: Microsoft, "Task Scheduler Error and Success Constants".
    0x00041300: "ready, has not run yet",
    0x00041301: "running now",
    0x00041303: "has not run yet",
    0x00041306: "ended by a user",
    0x80070002: "the program was not found: make the task again",
    0x8007052E: "the account's password is wrong: make the task again",
    0x80070569: 'the account lacks the right "Log on as a batch job"',
    0x800710E0: "refused: the account may not log on, or a run was active",
    0xC000013A: "closed or interrupted",
}


class Schedule:
    """A daily run of one job, by one of the system's schedulers."""

    def __init__(self, options: ScheduleOptions, job: str) -> None:
        self.options, self.job, self.home = options, job, options.home
        self.name = "sgsync" if job == "sync" else f"sgsync-{job}"
        if self.home != default_home():  # Districts that share an installation differ in that.
            digest = hashlib.sha256(os.fsencode(self.home)).hexdigest()[:6]
            self.name += f"-{re.sub('[^A-Za-z0-9_]+', '-', self.home.name)}-{digest}"
        self.shown = self.name
        self.description = f"sgsync {job}, home {self.home}"

    def words(self) -> list[str]:
        """The command, which needs nothing of its environment and of the folder it starts in."""
        options, words = self.options, [*PROGRAM]
        words += [self.job] if self.job != "sync" else []
        words += ["--home", str(self.home)] if self.home != default_home() else []
        words += (
            ["--config", str(options.config)] if options.config != config_path(self.home) else []
        )
        return [*words, "--quiet"]

    def check(self) -> None:
        """Raise ConfigError for what cannot be scheduled."""
        if not re.fullmatch(r"(?:[01][0-9]|2[0-3]):[0-5][0-9]", self.options.at):
            raise ConfigError(
                f"--at '{one_line(self.options.at)}': is not a time of day", "--at 04:30"
            )
        if any(not word.isprintable() for word in (*self.words(), self.user())):
            raise ConfigError("a path or the account contains an unprintable character")

    def user(self) -> str:
        raise NotImplementedError

    def text(self) -> str:
        """What `install` makes."""
        raise NotImplementedError

    def when(self) -> str:
        return f"every day at {self.options.at} as {self.user()}"

    def exists(self) -> bool:
        raise NotImplementedError

    def install(self) -> None:
        raise NotImplementedError

    def remove(self) -> None:
        raise NotImplementedError

    def state(self) -> ScheduleState:
        raise NotImplementedError

    def called(self, program: str, *words: str, show: bool = False) -> str | None:
        """What a program of the system prints, None if it fails; with `show`, on the terminal."""
        import tempfile

        path = shutil.which(program)
        if not path:
            raise ConfigError(f"{program} was not found", "use --cron" if os.name != "nt" else "")
        log.debug("%s", command_line([path, *words]))
        # Into a file: what the program starts may keep a pipe open for ever.
        with tempfile.TemporaryFile() as file:
            out = None if show else file
            process = subprocess.Popen([path, *words], stdout=out, stderr=out)  # noqa: S603
            try:
                code = process.wait(None if show else PROGRAM_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                self.said = f"no answer for {PROGRAM_SECONDS} s"
                return None
            file.seek(0)
            said = file.read().decode("oem" if os.name == "nt" else "utf-8", "replace")
        self.said = one_line(said) or f"exit code {code}"
        return None if code else said

    said = ""  # by the last program

    def must(self, program: str, *words: str, show: bool = False) -> str:
        """`called`; raises Error where it fails."""
        out = self.called(program, *words, show=show)
        if out is None:
            remedy = 'run this in a Command Prompt started with "Run as administrator"'
            if os.name != "nt":
                remedy = (
                    f"run it as root:\nsudo {command_line([*PROGRAM, *self.options.arguments])}"
                )
            raise Error(f"{self.shown}: {program} {words[0]} failed: {self.said}", remedy)
        return out


# ------------------------------------ scheduling on Windows: WindowsTask
#
# Given: a Schedule.
# Gives: a task of Task Scheduler, by way of schtasks.
# Raises: as Schedule does.


class WindowsTask(Schedule):
    """A task of Windows' Task Scheduler.

    Source of its XML: Microsoft, "Task Scheduler Schema"; in a trigger, order matters.
    """

    NAMESPACE = "http://schemas.microsoft.com/windows/2004/02/mit/task"

    def check(self) -> None:
        super().check()
        options = self.options
        if options.cron:
            raise ConfigError("--cron has no effect on Windows")
        if options.gmsa and not re.fullmatch(r"[^\\@]+\\[^\\@]+\$", options.gmsa):
            raise ConfigError(
                f"--gmsa '{one_line(options.gmsa)}': is not the name of a managed service account",
                "write DOMAIN\\name$",
            )

    def user(self) -> str:
        return self.options.gmsa or self.options.user or account_name()

    def text(self) -> str:
        return self.xml().decode("utf-16").replace("\r\n", "\n")

    def xml(self) -> bytes:
        """The task, as schtasks wants it: UTF-16 with a byte order mark."""
        from lxml import etree

        spaces = cast("dict[str, str]", {None: self.NAMESPACE})
        task = etree.Element(f"{{{self.NAMESPACE}}}Task", {"version": "1.2"}, spaces)

        def add(path: str, text: str, **attributes: str) -> None:
            """An element, and the elements around it where they are not there."""
            element = task
            for name in path.split("/"):
                tag = f"{{{self.NAMESPACE}}}{name}"
                inner = element.find(tag)
                element = etree.SubElement(element, tag) if inner is None else inner
            element.text = text or None
            for name, value in attributes.items():
                element.set(name, value)

        program, *arguments = self.words()
        add("RegistrationInfo/Description", self.description)
        add("Triggers/CalendarTrigger/StartBoundary", self.first())
        add("Triggers/CalendarTrigger/ScheduleByDay/DaysInterval", "1")
        add("Principals/Principal", "", id="Author")
        add("Principals/Principal/UserId", self.user())
        add("Principals/Principal/LogonType", "Password")  # for a gMSA, too: Windows knows its own
        add("Principals/Principal/RunLevel", "LeastPrivilege")
        add("Settings/MultipleInstancesPolicy", "IgnoreNew")
        add("Settings/DisallowStartIfOnBatteries", "false")
        add("Settings/StopIfGoingOnBatteries", "false")
        add("Settings/StartWhenAvailable", "true")
        add("Settings/ExecutionTimeLimit", f"PT{HOURS}H")
        add("Actions", "", Context="Author")
        add("Actions/Exec/Command", program)
        add("Actions/Exec/Arguments", subprocess.list2cmdline(arguments))
        add("Actions/Exec/WorkingDirectory", str(self.home))
        text = etree.tostring(task, encoding="UTF-16", xml_declaration=True, pretty_print=True)
        return cast("bytes", text)

    def first(self) -> str:
        """The next time that it is that late; else today's start would count as missed."""
        now = datetime.datetime.now()
        hour, minute = map(int, self.options.at.split(":"))
        start = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
        return (start if start > now else start + datetime.timedelta(days=1)).isoformat()

    def exists(self) -> bool:
        return self.called("schtasks", "/Query", "/TN", self.name) is not None

    def install(self) -> None:
        import tempfile

        if not self.options.gmsa and not (sys.stdin and sys.stdin.isatty()):
            raise ConfigError(
                "Windows asks for the password of the account, but this is not a terminal",
                "run this in a Command Prompt, or use --gmsa",
            )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "task.xml")
            path.write_bytes(self.xml())
            password = "" if self.options.gmsa else "*"
            self.must(
                "schtasks", "/Create", "/TN", self.name, "/XML", str(path), "/F",
                "/RU", self.user(), "/RP", password, show=not self.options.gmsa,
            )  # fmt: skip

    def remove(self) -> None:
        self.must("schtasks", "/Delete", "/TN", self.name, "/F")

    def state(self) -> ScheduleState:
        # Without headings: Windows translates them, the order stays.
        out = self.must("schtasks", "/Query", "/TN", self.name, "/V", "/FO", "CSV", "/NH")
        rows = [row for row in csv.reader(out.splitlines()) if len(row) > 6]
        if not rows:
            return ScheduleState(self.shown, self.job, "", "", None, "unknown")
        row, number = rows[0], re.fullmatch(r"\s*(-?[0-9]+)\s*", rows[0][6])
        result = int(number[1]) & 0xFFFFFFFF if number else None
        never = result in (0x41300, 0x41303)
        return self.state_of(row[2], "" if never else row[5], result)

    def state_of(self, next_run: str, last_run: str, result: int | None) -> ScheduleState:
        meaning = "unknown" if result is None else EXIT_MEANINGS.get(result, "unknown")
        return ScheduleState(self.shown, self.job, next_run, last_run, result, meaning)


# ------------------------------------ scheduling on Linux: SystemdTimer
#
# Given: a Schedule.
# Gives: a systemd timer and its service, or a file for cron.
# Raises: as Schedule does.

SYSTEMD_DIRECTORY = Path("/etc/systemd/system")
CRON_DIRECTORY = Path("/etc/cron.d")


class LinuxSchedule(Schedule):
    """What the schedulers of Linux have in common: files of root that name a user."""

    def paths(self) -> list[Path]:
        """The files that make it."""
        raise NotImplementedError

    def check(self) -> None:
        super().check()
        if self.options.gmsa:
            raise ConfigError("--gmsa: only Windows has such accounts", "--user NAME")
        import pwd

        try:
            pwd.getpwnam(self.user())
        except KeyError:
            raise ConfigError(
                f"there is no user {one_line(self.user())} on this machine",
                f"create it: sudo useradd --system --shell /usr/sbin/nologin {self.user()}"
                if re.fullmatch(r"[a-z_][a-z0-9_-]*", self.user())
                else "--user NAME",
            ) from None

    def user(self) -> str:
        """The owner of what the runs write."""
        history = self.home / "history"
        if self.options.user or not history.is_dir():
            return self.options.user or getpass.getuser()
        try:
            return history.owner()
        except KeyError:  # an account that has been deleted
            return getpass.getuser()

    def exists(self) -> bool:
        return any(path.exists() for path in self.paths())

    def write(self, path: Path, text: str) -> None:
        if not os.access(path.parent, os.W_OK):
            raise ConfigError(
                f"{path.parent}: may not be written to",
                f"run it as root:\nsudo {command_line([*PROGRAM, *self.options.arguments])}",
            )
        with new_file(path) as file:
            file.write(text.encode("utf-8", "surrogateescape"))
        path.chmod(0o644)

    def delete(self) -> None:
        for path in self.paths():
            with local_errors(path):
                path.unlink(missing_ok=True)


class SystemdTimer(LinuxSchedule):
    """A timer and its service.  Source: systemd.timer(5), systemd.service(5)."""

    def __init__(self, options: ScheduleOptions, job: str) -> None:
        super().__init__(options, job)
        self.shown = f"{self.name}.timer"

    def paths(self) -> list[Path]:
        return [SYSTEMD_DIRECTORY / f"{self.name}.{kind}" for kind in ("timer", "service")]

    def text(self) -> str:
        return "\n".join(
            f"# {path}\n{text}" for path, text in zip(self.paths(), self.units(), strict=True)
        )

    def units(self) -> tuple[str, str]:
        """The timer and the service."""
        described = self.description.replace("%", "%%")
        timer = (
            f"[Unit]\nDescription={described}\n\n"
            f"[Timer]\nOnCalendar=*-*-* {self.options.at}:00\nPersistent=true\n\n"
            "[Install]\nWantedBy=timers.target\n"
        )
        folder = str(self.home).replace("%", "%%")
        service = (
            f"[Unit]\nDescription={described}\n"
            "Wants=network-online.target\nAfter=network-online.target\n\n"
            f"[Service]\nType=oneshot\nUser={self.user()}\nWorkingDirectory={folder}\n"
            f"ExecStart={' '.join(map(self.quoted, self.words()))}\n"
            f"TimeoutStartSec={HOURS}h\nUMask=0077\nNoNewPrivileges=true\n"
        )
        return timer, service

    @staticmethod
    def quoted(word: str) -> str:
        """A word of ExecStart.  Source: systemd.service(5), "COMMAND LINES"."""
        word = word.replace("%", "%%").replace("$", "$$")
        if re.fullmatch(r"[\w%$@+=:,./-]+", word):
            return word
        return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'

    def install(self) -> None:
        for path, text in zip(self.paths(), self.units(), strict=True):
            self.write(path, text)
        self.must("systemctl", "daemon-reload")
        self.must("systemctl", "enable", "--now", f"{self.name}.timer")
        self.must("systemctl", "restart", f"{self.name}.timer")  # with another time

    def remove(self) -> None:
        self.must("systemctl", "disable", "--now", f"{self.name}.timer")
        self.delete()
        self.must("systemctl", "daemon-reload")

    def state(self) -> ScheduleState:
        timer = self.properties("timer", "NextElapseUSecRealtime", "LastTriggerUSec")
        service = self.properties("service", "ExecMainStatus", "ActiveState", "Result")
        last = timer.get("LastTriggerUSec", "")
        next_run = timer.get("NextElapseUSecRealtime", "")
        if service.get("ActiveState") in ("activating", "active"):
            meaning, result = "running now", None
        elif not last or last == "n/a":
            meaning, result, last = "has not run yet", None, ""
        else:
            result = int(service.get("ExecMainStatus") or 0)
            meaning = EXIT_MEANINGS.get(result, "unknown")
            if service.get("Result") not in ("success", "exit-code"):
                meaning = f"ended by systemd ({service.get('Result', 'unknown')})"
        return ScheduleState(self.shown, self.job, next_run, last, result, meaning)

    def properties(self, kind: str, *names: str) -> dict[str, str]:
        wanted = f"--property={','.join(names)}"
        out = self.must("systemctl", "show", f"{self.name}.{kind}", wanted)
        pairs = (line.split("=", 1) for line in out.splitlines() if "=" in line)
        return {name: one_line(value) for name, value in pairs}


class CronLine(LinuxSchedule):
    """A file in /etc/cron.d.  Source: crontab(5)."""

    def __init__(self, options: ScheduleOptions, job: str) -> None:
        super().__init__(options, job)
        self.shown = str(self.paths()[0])

    def paths(self) -> list[Path]:
        return [CRON_DIRECTORY / self.name]

    def text(self) -> str:
        hour, minute = map(int, self.options.at.split(":"))
        log_file = self.home / "history" / "cron.log"
        command = f"{shlex.join(self.words())} >>{shlex.quote(str(log_file))} 2>&1"
        escaped = command.replace("%", "\\%")  # which cron would make a line end
        return f"# {self.description}\n{minute} {hour} * * * {self.user()} {escaped}\n"

    def install(self) -> None:
        self.write(self.paths()[0], self.text())

    def remove(self) -> None:
        self.delete()

    def state(self) -> ScheduleState:
        """When cron runs it next; how the last run ended is in history."""
        path = self.paths()[0]
        with local_errors(path):
            text = path.read_text(encoding="utf-8", errors="replace")
        line = re.search(r"(?m)^([0-9]{1,2}) ([0-9]{1,2}) \* \* \* ", text)
        at = f"{int(line[2]):02}:{int(line[1]):02}" if line else ""
        history = self.home / "history" / ("" if self.job == "sync" else self.job)
        last = next(iter(runs(history)), None) if history.is_dir() else None
        if not last:
            return ScheduleState(self.shown, self.job, at, "", None, "has not run yet")
        result = last.summary.exit_code if last.summary else None
        meaning = "unknown" if result is None else EXIT_MEANINGS.get(result, "unknown")
        return ScheduleState(self.shown, self.job, at, last.epoch, result, meaning)


# ------------------------------------ command: schedule
#
# Given: a time of day, a job, an account.
# Gives: a scheduled task (Windows), a systemd timer, or a cron line; what is scheduled already.
# Raises: ConfigError; Error where the system's scheduler refuses.


@dataclasses.dataclass(kw_only=True)
class ScheduleOptions(Options):
    at: str = ""
    job: str = ""
    user: str = ""
    gmsa: str = ""
    cron: bool = False
    install: bool = False
    remove: bool = False


def schedule_arguments() -> Parser:
    parser = Parser(add_help=False)
    add = parser.add_argument
    add("--at", metavar="HH:MM", help="when, every day, by this machine's clock")
    add("--job", choices=("sync", "schoolinks"), help="which job (default: sync)")
    account = parser.add_mutually_exclusive_group()
    account.add_argument(
        "--user", metavar="NAME",
        help="the account that runs it: DOMAIN\\name on Windows (default: you), on Linux a user "
        "(default: the owner of history, else you)",
    )  # fmt: skip
    account.add_argument(
        "--gmsa", metavar="NAME",
        help="on Windows, a group managed service account, DOMAIN\\name$: it needs no password",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--install", action="store_true", help="make it, instead of printing it")
    what.add_argument("--remove", action="store_true", help="remove it")
    add("--cron", action="store_true", help="on Linux, a line for cron instead of a systemd timer")
    parser.set_defaults(run=run_schedule, kind=ScheduleOptions)
    return parser


def run_schedule(options: ScheduleOptions) -> int:
    """Print, make, or remove the schedule of a job; without --at, tell what there is."""
    kinds: list[type[Schedule]] = [WindowsTask] if os.name == "nt" else [SystemdTimer, CronLine]
    if options.at:
        kind = kinds[-1] if options.cron else kinds[0]
        schedule = kind(options, options.job or "sync")
        schedule.check()
        if options.install:
            schedule.install()
            log.info("%s: made; %s", schedule.shown, schedule.when())
        else:
            print(schedule.text(), end="")
        return 0
    if options.install:
        raise ConfigError("--install needs the time of day", "--at 04:30")
    jobs = [options.job] if options.job else ["sync", "schoolinks"]
    if options.remove:
        there = [s for s in (kind(options, options.job or "sync") for kind in kinds) if s.exists()]
        for schedule in there:
            schedule.remove()
            log.info("%s: removed", schedule.shown)
        if not there:
            log.info("nothing is scheduled for %s", options.job or "sync")
        return 0
    found = [s.state() for job in jobs for s in (k(options, job) for k in kinds) if s.exists()]
    if options.json:
        print_json([dataclasses.asdict(state) for state in found])
    else:
        for state in found:
            print(printable(str(state)))
        if not found:
            print(f"nothing is scheduled for {' or '.join(jobs)}")
    return 0


# ------------------------------------ command: history
#
# Given the folders of the runs that are kept; gives a table of them, one of them, what happened to
# one student, or whether any of them was altered, on standard output; changes nothing.  Raises
# ConfigError for a run that is not there.


@dataclasses.dataclass(kw_only=True)
class HistoryOptions(Options):
    epoch: str = ""
    key: str | None = None
    file: str = ""
    job: str = "sync"
    homes: Sequence[str] = ()
    csv: bool = False
    verify: bool = False

    def history(self, home: Path) -> Path:
        """Where a home keeps the runs of the job that is asked for."""
        return home / "history" if self.job == "sync" else home / "history" / self.job


def history_arguments() -> Parser:
    parser = Parser(add_help=False)
    add = parser.add_argument
    add("epoch", nargs="?", metavar="EPOCH", help="show this run")
    add("--key", metavar="VALUE", help="show everything that happened to the rows with this value "
        "in a key column, such as a student number")  # fmt: skip
    add("--file", metavar="NAME", help="with --key: only in this file, such as iep.csv")
    add("--job", choices=("sync", "schoolinks"), help="whose runs (default: sync)")
    add("--homes", nargs="+", metavar="DIR", help="one table over the runs of many homes")
    add("--verify", action="store_true",
        help="check that no file of a run was changed, removed or added since")  # fmt: skip
    add("--csv", action="store_true", help="print CSV")
    parser.set_defaults(run=run_history, kind=HistoryOptions)
    return parser


HISTORY_HELP = """Show the runs kept, newest first, one of them, or everything that happened to one
student.  Changes nothing.

  sgsync.py history                          the runs, newest first
  sgsync.py history 20261121-210237          one run
  sgsync.py history --key 100119             one student, over all runs
  sgsync.py history --homes '/srv/sgsync/*'  the runs of many homes
  sgsync.py history --verify                 was a run altered?  Exit code 5 if so
"""


def run_history(options: HistoryOptions) -> int:
    """The runs, one run, one student, or what was altered; only one of them at a time."""
    asked = [bool(options.epoch), options.key is not None, options.verify, bool(options.homes)]
    if sum(asked) > 1:
        raise ConfigError("give only one of EPOCH, --key, --verify and --homes")
    if options.json and options.csv:
        raise ConfigError("give only one of --json and --csv")
    history = options.history(options.home)
    if options.epoch:
        return show_run(kept_run(history, options.epoch), options)
    if options.key is not None:
        if not options.key:
            raise ConfigError("--key: is empty", "give a student number")
        if options.job != "sync":
            raise ConfigError("--key: only runs of sync record changes of rows", "leave out --job")
        return show_events(list(KeySearch(history, options.key, options.file).events()), options)
    if options.verify:
        return show_verified(runs(history), options)
    homes = [options.home]
    if options.homes:
        named = itertools.chain.from_iterable(map(glob.glob, options.homes))
        homes = sorted(set(map(Path, named)))
        homes = [home for home in homes if (home / "history").is_dir()]
    found = [(home, run) for home in homes for run in runs(options.history(home))]
    found.sort(key=lambda pair: pair[1].epoch, reverse=True)
    records = []
    for home, run in found:
        record = run_record(run)
        records.append({"home": str(home), **record} if options.homes else record)
    show_records(records, options, [short_cells(record) for record in records], "no runs")
    return 0


def run_record(run: KeptRun) -> dict[str, Any]:
    """One run as JSON and CSV tell of it; counts are rows, of every file together."""
    summary = run.summary or RunSummary("", outcome="unknown")
    counts = {f"{word}_found": sum(file.tally(word).found for file in summary.files)
              for word in (INSERT, UPDATE, DELETE)}  # fmt: skip
    counts |= {f"{word}_applied": sum(file.tally(word).applied for file in summary.files)
               for word in (INSERT, UPDATE, DELETE)}  # fmt: skip
    return {
        "epoch": run.epoch,
        "started": summary.started,
        "outcome": summary.outcome,
        "exit_code": summary.exit_code,
        **counts,
        "failed": summary.total("failed"),
        "left_alone": summary.total("left_alone"),
        "not_converged": sum(file.not_converged for file in summary.files),
        "rows": sum(section.rows for section in summary.sections),
        "seconds": summary.seconds,
        "message": summary.message,
    }


def short_cells(record: Mapping[str, Any]) -> dict[str, str]:
    """A run as a row of the table: heading -> text."""
    cells = {"home": one_line(record["home"])} if "home" in record else {}
    cells |= {"run": record["epoch"], "outcome": one_line(record["outcome"])}
    for word in (INSERT, UPDATE, DELETE):
        found, applied = record[f"{word}_found"], record[f"{word}_applied"]
        cells[word] = f"{applied:,}" if applied == found else f"{applied:,} of {found:,}"
    if record["rows"]:
        cells["rows"] = f"{record['rows']:,}"
    return cells | {"failed": f"{record['failed']:,}", "time": f"{record['seconds']:.1f} s"}


def show_records(
    records: Sequence[Mapping[str, Any]],
    options: HistoryOptions,
    cells: Sequence[Mapping[str, str]],
    nothing: str,
) -> None:
    """Print records as JSON or CSV, or else their cells as a table, on standard output."""
    if options.json:
        print_json(records)
    elif options.csv and sys.stdout is not None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows([list(records[0])] if records else [])
        csv.writer(text).writerows(record.values() for record in records)
        sys.stdout.buffer.write(text.getvalue().encode("utf-8"))
        sys.stdout.buffer.flush()
    elif not options.csv:
        print(text_table(cells) or nothing)


def text_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Aligned columns under their headings; those that begin with digits stand to the right."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [all(row.get(name, "0")[:1].isdigit() for row in rows) for name in names]
    return "\n".join(
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
        if names
    )


def show_run(run: KeptRun, options: HistoryOptions) -> int:
    """One run: how it ended, for each file what it did, and where to look further."""
    summary = run.summary
    if options.json:
        print_json(dataclasses.asdict(summary) if summary else None)
        return 0
    if options.csv or summary is None:
        show_records([run_record(run)], options, [short_cells(run_record(run))], "")
        return 0
    code = "" if summary.exit_code is None else f" (exit code {summary.exit_code})"
    approval = summary.approval
    about = {
        "run": f"{run.epoch}, {summary.seconds:.1f} s, {run.folder}",
        "outcome": f"{summary.outcome}{code}: {summary.message}",
        "try": summary.remedy,
        "started": f"{summary.started} by {summary.account} on {summary.computer}",
        "arguments": command_line(summary.arguments),
        "extract": summary.source_epoch,
        "approved": f"run {approval.run} by {approval.by} {approval.at} {approval.why}"
        if approval
        else "",
        "limits": "skipped with --force" if summary.forced else "",
        "over limits": "\n".join(summary.over_limits),
    }
    for name, text in about.items():
        lines = [printable(line) for line in text.strip().split("\n")]
        if lines != [""]:
            print(f"{name + ':':<13}" + "\n             ".join(lines))
    cells = [file_cells(file, planned=summary.only_planned) for file in summary.files]
    cells += [section_cells(section) for section in summary.sections]
    cells = [{name: printable(text) for name, text in row.items()} for row in cells]
    stages = [{"stage": stage.name, "time": f"{stage.seconds:.1f} s"} for stage in summary.stages]
    for table in filter(None, (text_table(cells), text_table(stages))):
        print(f"\n{table}")
    return 0


def show_verified(kept: Sequence[KeptRun], options: HistoryOptions) -> int:
    """What was altered, the first run first; exits with 5 if anything was."""
    records = [{"run": epoch, "what": what} for epoch, what in sorted(verify(kept))]
    sealed = [run for run in kept if run.manifest]
    told = f"{plural(len(sealed), 'run')} verified, nothing was altered"
    if without := len(kept) - len(sealed):
        told += f"; {plural(without, 'run')} without {MANIFEST_NAME}"
    show_records(records, options, records, told)
    if not records:
        return 0
    first = records[0]
    log.error(
        "the first run altered is %s: %s\nTry: restore that run's folder from a backup, and find "
        "out who changed it", first["run"], first["what"],
    )  # fmt: skip
    return DataError.exit_code


def show_events(events: Sequence[Event], options: HistoryOptions) -> int:
    """Print what happened to one student, oldest first."""
    if options.json:
        print_json([dataclasses.asdict(event) for event in events])
    elif options.csv:
        records = [record for event in events for record in event.records()]
        show_records(records, options, [], "")
    else:
        kept = plural(len(runs(options.history(options.home))), "run")
        nothing = f"no change to a row with the key {one_line(options.key)} in {kept}"
        print("\n".join(map(str, events)) or nothing)
    return 0


# ------------------------------------ command: report
# Given: a run that is kept.
# Gives: its report, written anew, and the report's path on standard output.
# Raises: ConfigError for a run that is not there.


@dataclasses.dataclass(kw_only=True)
class ReportOptions(Options):
    epoch: str = ""
    open: bool = False


def report_arguments() -> Parser:
    parser = Parser(add_help=False)
    add = parser.add_argument
    add("epoch", nargs="?", metavar="EPOCH", help="the run (default: the newest)")
    add("--open", action="store_true", help="open the report in the web browser")
    parser.set_defaults(run=run_report, kind=ReportOptions)
    return parser


REPORT_HELP = """Write report.html of a run of sync, with the trend over the runs kept, into the
run's folder and print its path.  Changes nothing else.

  sgsync.py report --open             the newest run
  sgsync.py report 20261121-210237    that run
"""


def run_report(options: ReportOptions) -> int:
    """Write a report again, now that the run is over."""
    history = options.home / "history"
    kept = runs(history)
    if not kept:
        raise ConfigError(f"{history}: there is no run to report on", "run sync first")
    run = kept_run(history, options.epoch) if options.epoch else kept[0]
    if run.summary is None:
        raise DataError(f"{run.folder / SUMMARY_NAME}: is missing or cannot be read")
    keys = False
    try:
        keys = load_config(options.config, Config).history.report_keys
    except ConfigError as error:
        log.warning("keys are left out of the report: %s", error.message)
    path = Report(run.summary, run.folder, kept, keys=keys).write()
    if options.json:
        print_json({"report": str(path)})
    else:
        print(path)
    if options.open and not webbrowser.open(path.as_uri()):
        log.warning("%s: no web browser was found", path)
    return 0


# ------------------------------------ main: main
# Given: the command line.
# Gives: the exit code.
# Raises: nothing.


COMMANDS: dict[str, tuple[Callable[[], Parser], str, str]] = {
    "sync": (sync_arguments, "the nightly integration", ""),
    "schoolinks": (schoolinks_arguments, "build and upload the files for SchooLinks", ""),
    "diff": (
        diff_arguments,
        "compare two CSV files",
        "What would have to be inserted, updated and deleted in B to make it A.",
    ),
    "procedures": (
        procedures_arguments,
        "list, install, or compare the stored procedures",
        """List the procedures that config.xml names, and whether the database has them.

Changes nothing without --install, which runs the script in the database.  For example:
  sgsync.py procedures
  sgsync.py procedures --install
  sgsync.py procedures --diff --verbose""",
    ),
    "secret": (
        secret_arguments,
        "store a password in the system's password store",
        """Store a secret for ${keyring:NAME} in config.xml, or delete it.

Run it as the account that runs the job: each account has a store of its own.  Changes only that
store.  For example:
  sgsync.py secret set sis_password
  sgsync.py secret delete sis_password""",
    ),
    "check": (
        check_arguments,
        "try everything that a run needs",
        """Try everything that a run needs: one line each, ok, warning, failed, or skipped.

Changes nothing.  Exits with the code of the first failure.  For example:
  sgsync.py check
  sgsync.py check --job schoolinks --json""",
    ),
    "schedule": (
        schedule_arguments,
        "run a job every night",
        """Print the scheduled task, the systemd timer, or the cron line that runs a job every day.

Changes nothing without --install or --remove.  Without --at, tells what is scheduled, when it
runs next, and how it ended last.  For example:
  sgsync.py schedule
  sgsync.py schedule --at 04:30
  sgsync.py schedule --at 04:30 --user DISTRICT\\sgsync --install""",
    ),
    "trust": (
        trust_arguments,
        "pin the host key of an SFTP server",
        """Fetch the host key of the SFTP server, show its fingerprint, ask, and pin it.

Changes only the file known_hosts (knownHosts= in <SFTP>).  For example:
  sgsync.py trust
  sgsync.py trust --job schoolinks --fingerprint SHA256:u0Zr...""",
    ),
    "history": (history_arguments, "the runs kept, or what happened to one student", HISTORY_HELP),
    "report": (report_arguments, "write the report of a run, as HTML", REPORT_HELP),
}


def build_parser() -> Parser:
    common = Parser(add_help=False)
    add = common.add_argument
    add("--home", type=Path, metavar="DIR", help="folder of config.xml (default: the script's)")
    add("--config", type=Path, metavar="FILE",
        help="default: config.local.xml in the home folder, else config.xml")  # fmt: skip
    add("--verbose", action="store_true", help="log every step")
    add("--quiet", action="count", help="print warnings, errors and the outcome only; given twice, "
        "not the outcome of a success")  # fmt: skip
    add("--json", action="store_true", help="print the run's summary on standard output")
    add("--log-format", choices=("text", "json"),
        help="json: messages on standard error as one JSON object a line")  # fmt: skip
    add("--version", action="version", version=f"sgsync {__version__}")
    parser = Parser(
        prog="sgsync.py",
        parents=[common, sync_arguments()],
        description="Keep a student information system in step with SameGoal.",
        epilog="Without a command: sync. Exit codes: 0 success, 1 unexpected error, "
        "2 configuration or usage, 3 SFTP transfer, 4 database, 5 data, 6 held by a limit, "
        "7 another run is active, 8 finished but some rows failed, 130 interrupted.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    parser.set_defaults(command="sync")
    for name, (arguments, title, description) in COMMANDS.items():
        commands.add_parser(
            name, parents=[common, arguments()], help=title, description=description or title,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
    return parser


def parse_arguments(argv: Sequence[str]) -> tuple[Callable[[Any], int], Options]:
    """The function that runs the command, and what it gets."""
    parser = build_parser()
    values = vars(parser.parse_args(argv))
    run, kind = values.pop("run"), values.pop("kind")
    home = values["home"] = values.get("home", default_home()).absolute()
    values.setdefault("config", config_path(home))
    known = {field.name for field in dataclasses.fields(kind)}
    for name in values.keys() - known:
        parser.error(f"--{name.replace('_', '-')} is not an option of {values['command']}")
    return run, kind(arguments=argv, **values)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.  Never raises, never waits for a key."""
    for number in range(3):  # Where one is closed, the next file opened would get its number,
        try:  # and with it whatever a library prints.
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:  # under pythonw
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # A console may be unable to show every character.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        run, options = parse_arguments(sys.argv[1:] if argv is None else argv)
    except SystemExit as error:  # argparse has said why
        return int(error.code or 0)
    with console_log(options), signals_interrupt(), owner_only():
        try:
            load_environment(options.home)
            return run(options)
        except BrokenPipeError:  # Whoever read our output has enough.
            return 1
        except (Exception, KeyboardInterrupt) as exception:
            return report_error(Error.of(exception), options)


def close_streams() -> None:
    """Flush and close standard output and standard error; what they cannot take is lost.

    Python itself tries at its very end, and exits with 120 where that fails.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.close()


def report_error(error: Error, options: Options) -> int:
    """Tell of an error that no run has told; returns its exit code."""
    log.error("%s", error)
    log.debug("", exc_info=True)
    if options.json:
        summary = RunSummary(options.command)
        summary.conclude(error.outcome, error.exit_code, error.message, error.remedy)
        print_json(dataclasses.asdict(summary))
    return error.exit_code


@contextlib.contextmanager
def console_log(options: Options) -> Iterator[None]:
    """Log to standard error."""
    level = logging.DEBUG if options.verbose else logging.INFO
    log.setLevel(level)
    log.propagate = False
    logging.raiseExceptions = False  # A full disk must not end the run by way of its log.
    handler = ConsoleHandler()
    nightly = options.command in ("sync", "schoolinks")
    plain = options.terminal or not nightly
    text = LogFormatter("%(message)s" if plain else "%(asctime)s %(message)s")
    handler.setFormatter(JsonFormatter() if options.log_format == "json" else text)
    quiet = options.quiet or (options.terminal and nightly)
    handler.setLevel(logging.WARNING if quiet else level)
    if options.command == "check" and not options.verbose:  # Its findings say all that is logged.
        handler.setLevel(logging.ERROR)
    log.addHandler(handler)

    def log_thread_exception(args: threading.ExceptHookArgs) -> None:
        """A driver's own thread failed: the call that needs it fails, too, and is told."""
        log.debug("%s: %r", args.thread and args.thread.name, args.exc_value)

    hook, threading.excepthook = threading.excepthook, log_thread_exception
    try:
        yield
    finally:
        threading.excepthook = hook
        log.removeHandler(handler)


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler  # Python 3.10 cannot subscript it.


class ConsoleHandler(_StreamHandler):
    """Writes to what sys.stderr is at the time: a progress display replaces it while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """A request to end (kill, a closed console, a shutdown) ends the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    present = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP", "SIGBREAK")]
    # nohup ignores SIGHUP: leave it so.
    wanted = [n for n in present if n is not None and signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def owner_only() -> Iterator[None]:
    """What a run makes is for its owner alone."""
    mask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(mask)


def wait_if_double_clicked() -> None:
    """Keep the window of a double click on Windows open until a key is pressed, at most a minute.

    Such a console holds only this program and its launchers (py.exe, the python.exe of a virtual
    environment), and no command prompt has set PROMPT.  A wrong guess costs a minute.
    """
    if sys.platform != "win32" or not (sys.stdin and sys.stdin.isatty()) or "PROMPT" in os.environ:
        return
    import ctypes
    import msvcrt

    attached = (ctypes.c_uint32 * 4)()
    if ctypes.windll.kernel32.GetConsoleProcessList(attached, 4) > 3:
        return
    while msvcrt.kbhit():  # typed during the run
        msvcrt.getwch()
    print("\nPress any key to close this window.", file=sys.stderr, flush=True)
    for _ in range(600):
        if msvcrt.kbhit():
            break
        time.sleep(0.1)


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(Exception):  # The exit code stands, whatever the console is.
        wait_if_double_clicked()
    close_streams()
    sys.exit(code)
