"""`make bench`: speed and memory, as a table of figures and the goals that were set for them.

Programs that are compared run in turn, A B A B, each from start to exit; a figure is a median, a
ratio one of medians. Each pair's results are compared first: only equal work counts. Nothing fails
here for being slow: times belong to a machine.

    bench.py [--quick] [--only diff,large,help,calls,sftp,schoolinks | --only "diff/5 percent"]

The data is made in build/bench, the same each time. The parts export and calls also measure SQL
Server where SGSYNC_TEST_MSSQL, an ODBC connection string, leads to one.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import hashlib
import itertools
import os
import queue
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "bench"
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import sgsync
    from support import servers


class BenchError(Exception):
    """The programs do not do the same work, or one failed."""


# ------------------------------------------------------------------ the table: Figure


@dataclass
class Figure:
    """A line of the table; `met` is None where no goal was set."""

    what: str
    value: str
    goal: str = ""
    met: bool | None = None


def at_least(what: str, ratio: float, goal: float, detail: str) -> Figure:
    return Figure(what, f"{ratio:.2f} x ({detail})", f">= {goal:g} x", ratio >= goal)


def at_most(what: str, ratio: float, goal: float, detail: str) -> Figure:
    return Figure(what, f"{ratio:.2f} x ({detail})", f"<= {goal:g} x", ratio <= goal)


def memory(what: str, peak: int, goal: int) -> Figure:
    """Peak memory, both in MB of a million bytes; nothing where the system does not tell."""
    if not peak:
        return Figure(what, "not known on this system")
    return Figure(what, f"{peak / 1e6:.1f} MB", f"<= {goal} MB", peak <= goal * 1e6)


def print_table(figures: Sequence[Figure], judge: bool) -> None:
    words = {None: "", True: "met", False: "MISSED"}
    lines = [("figure", "measured", "goal", "")]
    lines += [(f.what, f.value, f.goal, words[f.met] if judge else "") for f in figures]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    for texts in lines:
        padded = (text.ljust(width) for text, width in zip(texts, widths, strict=True))
        print("  ".join(padded).rstrip())


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------ processes: measure

# The kernel counts the memory of the process that starts another one to the started one's peak. So
# the stop-watch is a process of its own that has imported next to nothing.
_WATCH = """
import os, sys, time
began = time.perf_counter()
if hasattr(os, "wait4"):
    child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
    _, status, usage = os.wait4(child, 0)
    seconds, code = time.perf_counter() - began, os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
else:
    import ctypes, subprocess
    began = time.perf_counter()
    child = subprocess.Popen(sys.argv[1:])
    code, seconds = child.wait(), time.perf_counter() - began
    class Counters(ctypes.Structure):
        _fields_ = [("size", ctypes.c_uint32), ("faults", ctypes.c_uint32)]
        _fields_ += [(name, ctypes.c_size_t) for name in ("peak", *"abcdefg")]
    counters = Counters(ctypes.sizeof(Counters))
    ctypes.windll.psapi.GetProcessMemoryInfo(
        ctypes.c_void_p(int(child._handle)), ctypes.byref(counters), counters.size)
    peak = counters.peak
print(seconds, peak, code, file=sys.stderr)
"""


def measure(*command: str | Path) -> tuple[float, int]:
    """Seconds from start to exit, and the peak of its memory in bytes, as the system counts it."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _WATCH, *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    *before, last = done.stderr.splitlines() or [""]
    if done.returncode or last.split()[-1:] != ["0"]:
        raise BenchError(f"{' '.join(map(str, command))} failed: {done.stderr[-2000:]}")
    seconds, peak, _ = last.split()
    del before  # what the program said
    return float(seconds), int(peak)


@dataclass
class Runs:
    """What one of several compared programs took."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def in_turn(commands: dict[str, list[str | Path]], rounds: int) -> dict[str, Runs]:
    """A B C A B C ...; each once before, unmeasured, for the file cache."""
    runs = {name: Runs() for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            seconds, peak = measure(*command)
            if number:
                runs[name].seconds.append(seconds)
                runs[name].peak = max(runs[name].peak, peak)
    return runs


# ------------------------------------------------------------------ files: Shape

HEADER = (
    "studentNumber", "startDate", "endDate", "type", "disability", "minutes", "manager", "lre",
    "status",
)  # fmt: skip
KEY = HEADER[:2]
DISABILITIES = ("SLD", "OHI", "AUT", "SLI", "MD")
MADE_BY = 2  # Another number here makes all files again.


def line(number: int) -> str:
    day = number % 9 + 1
    ends = f"2026-0{day}-1{number % 10}" if number % 4 else ""
    return (
        f"{100000 + number // 3:08},201{number % 3}-0{day}-15,{ends},Annual Review,"
        f"{DISABILITIES[number % 5]},{number % 1000 / 4:.2f},"
        f"Case manager {number * 7919 % 977},LRE80,LOCKED"
    )


def wide_line(number: int) -> str:
    return ",".join([line(number), *(f"{number * n % 9973}" for n in range(1, 52))])


def numbered_line(number: int) -> str:
    """The first column is a number of up to seven digits, not padded."""
    return f"{number // 6},201{number // 6 % 3}-01-15,{number % 6},{line(number)[20:]}"


def named_line(number: int) -> str:
    """A name with a comma, so that each row has a field in quotes."""
    return line(number).replace("Case manager ", '"Lee, Ann ').replace(",LRE80", '",LRE80')


def quoted(row: str) -> str:
    return '"' + row.replace(",", '","') + '"'


@dataclass(frozen=True)
class Shape:
    """How two files differ: SameGoal's side A, the database's side B.

    Of the rows, `differ` thousandths are different: a third of them inserts, updates and deletes,
    or, above a half, all of them updates.  The function `after` changes the finished sides.
    """

    name: str
    differ: int = 3
    line: Callable[[int], str] = line
    columns: tuple[str, ...] = HEADER
    key: tuple[str, ...] = KEY
    after: Callable[[list[str], list[str], random.Random], None] | None = None
    in_order: bool = True
    goals: dict[str, float] = field(default_factory=lambda: {"duckdb": 1.0})


CHUNK = 10_000  # rows


def _quote_one_side(a: list[str], b: list[str], dice: random.Random) -> None:
    b[:] = map(quoted, b)


def _quote_both(a: list[str], b: list[str], dice: random.Random) -> None:
    a[:], b[:] = map(quoted, a), map(quoted, b)


def _quote_some(a: list[str], b: list[str], dice: random.Random) -> None:
    for side in (a, b):
        side[:] = [quoted(row) if dice.random() < 0.05 else row for row in side]


def _empty_a(a: list[str], b: list[str], dice: random.Random) -> None:
    a.clear()


def _empty_b(a: list[str], b: list[str], dice: random.Random) -> None:
    b.clear()


def _shuffle(a: list[str], b: list[str], dice: random.Random) -> None:
    dice.shuffle(a)


# The programs are named in the goals: sgsync takes at most 1 / goal of the time of each.
SHAPES = (
    Shape("identical", 0, goals={"duckdb": 2, "comm": 0.5}),
    Shape("few", 3, goals={"duckdb": 2, "comm": 0.5, "plain": 2.5}),
    Shape("5 percent", 50),
    Shape("30 percent", 300),
    Shape("every row", 1000),
    Shape("every row with a quoted name", 1000, named_line),
    Shape("A empty", after=_empty_a),
    Shape("B empty", after=_empty_b),
    Shape("one side quoted", after=_quote_one_side),
    Shape("both sides quoted", after=_quote_both, goals={"duckdb": 1, "plain": 1}),
    Shape("5 percent of rows quoted", after=_quote_some),
    Shape("60 columns", line=wide_line, columns=(*HEADER, *(f"c{n}" for n in range(51)))),
    Shape("key of three columns", line=numbered_line,
          columns=("number", "start", "part", *HEADER[2:]), key=("number:int", "start", "part")),
    Shape("one side shuffled", after=_shuffle, in_order=False, goals={"duckdb": 1, "sort": 1 / 3}),
)  # fmt: skip


def make_pair(folder: Path, rows: int, shape: Shape) -> tuple[Path, Path]:
    """Two files of `rows` rows in a shape; kept for the next time."""
    kind = f"{shape.name.replace(' ', '-')}-{rows}-{MADE_BY}.csv"
    pair = folder / f"samegoal-{kind}", folder / f"sis-{kind}"
    if all(path.exists() for path in pair):
        return pair
    for old in folder.glob("*.csv"):
        if not old.stem.endswith(f"-{MADE_BY}"):
            old.unlink()
    say(f"making {rows:,} rows, {shape.name}, twice")
    parts = [path.with_suffix(".part") for path in pair]
    dice = random.Random(rows)
    chunk = CHUNK if shape.in_order else rows
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(p.open("w", encoding="ascii", newline="")) for p in parts]
        for file in files:
            file.write(",".join(shape.columns) + "\r\n")
        for start in range(0, rows, chunk):
            a = [shape.line(number) for number in range(start, min(start + chunk, rows))]
            b = a.copy()
            different = dice.sample(range(len(a)), shape.differ * len(a) // 1000)
            of_a = set(different[0::3] if shape.differ < 500 else ())
            of_b = set(different[2::3] if shape.differ < 500 else ())
            for index in different[1::3] if shape.differ < 500 else different:
                b[index] = b[index].replace("LOCKED", "OPEN")
            a = [row for index, row in enumerate(a) if index not in of_a]
            b = [row for index, row in enumerate(b) if index not in of_b]
            if shape.after:
                shape.after(a, b, dice)
            for file, side in zip(files, (a, b), strict=True):
                file.write("".join(f"{row}\r\n" for row in side))
    for part, path in zip(parts, pair, strict=True):
        part.replace(path)
    return pair


# ------------------------------------------------------------------ diff: bench_diff, bench_large


def diff_commands(pair: tuple[Path, Path], folder: Path, shape: Shape) -> dict[str, list[str]]:
    """The programs that the shape has goals for; each writes to `<name>.csv` in `folder`."""
    files = [str(path) for path in pair]
    here = Path(__file__).parent / "support"
    width = str(len(shape.key))
    out = {name: str(folder / f"{name}.csv") for name in ("sgsync", *shape.goals)}
    sort = [] if shape.in_order else ["--sort"]
    commands = {
        "sgsync": [sys.executable, str(ROOT / "sgsync.py"), "diff", *files,
                   "--key", ",".join(shape.key), *sort, "--output"],
        "plain": [sys.executable, str(here / "bench_plain.py"), *files],
        "duckdb": [sys.executable, str(here / "bench_duckdb.py"), *files],
        "comm": ["/bin/sh", "-c", 'LC_ALL=C exec comm -3 "$0" "$1" > "$2"', *files],
        "sort": ["/bin/sh", "-c", 'LC_ALL=C exec sort "$0" > "$1"', files[0]],
    }  # fmt: skip
    tail = {"plain": [width], "duckdb": [width]}
    found = {name: [*commands[name], path, *tail.get(name, ())] for name, path in out.items()}
    return {name: command for name, command in found.items() if shutil.which(command[0])}


def check_equal(folder: Path, names: Sequence[str]) -> int:
    """All have found the same changes, whatever their order; returns how many."""
    found = {}
    for name in names:
        count = total = 0
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.reader(file):
                digest = hashlib.blake2b("\0".join(row).encode(), digest_size=8).digest()
                count, total = count + 1, total + int.from_bytes(digest, "big")
        found[name] = count, total
    for name in names:
        if found[name] != found[names[0]]:
            raise BenchError(f"{name} finds other changes than {names[0]}; see {folder}")
    return found[names[0]][0] - 1


PROGRAMS = {
    "plain": "a csv.reader merge",
    "duckdb": "DuckDB's full join",
    "comm": "comm -3",
    "sort": "sort of one side",
}


def bench_shape(shape: Shape, quick: bool) -> Iterator[Figure]:
    rows, rounds = (50_000, 1) if quick else (1_000_000, 5)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        out = Path(name)
        commands = diff_commands(make_pair(FOLDER, rows, shape), out, shape)
        say(f"diff, {shape.name}: {rows:,} rows a side, {rounds} rounds")
        runs = in_turn(commands, rounds)
        changes = check_equal(out, [name for name in commands if name not in ("comm", "sort")])
        ours = runs["sgsync"]
        speed = f"{rows / ours.median:,.0f} rows/s"
        yield Figure(f"diff, {rows:,} rows a side, {shape.name}, {changes:,} changes", speed)
        for program in commands:
            if program == "sgsync":
                continue
            theirs = runs[program].median
            times = f"{ours.median:.2f} s, {theirs:.2f} s"
            ratio, goal = theirs / ours.median, shape.goals[program]
            yield at_least(f"  against {PROGRAMS[program]}", ratio, goal, times)
        yield memory("  peak memory", ours.peak, 64)
        for program in ("plain", "duckdb"):
            if program in commands:
                yield Figure(f"    of {PROGRAMS[program]}", f"{runs[program].peak / 1e6:.1f} MB")


LARGE = (
    Shape("few", 3, goals={}),
    Shape("every row", 1000, goals={}),
    Shape("one side shuffled", after=_shuffle, in_order=False, goals={"sort": 1 / 3}),
)


def bench_large(shape: Shape, quick: bool) -> Iterator[Figure]:
    rows = 200_000 if quick else 10_000_000
    if shutil.disk_usage(FOLDER).free < 800 * rows:
        yield Figure(f"diff, {rows:,} rows a side", f"needs {800 * rows / 1e9:.0f} GB of free disk")
        return
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        pair = make_pair(Path(name), rows, shape)
        say(f"diff, {shape.name}: {rows:,} rows a side, once")
        commands = diff_commands(pair, Path(name), shape)
        seconds, peak = measure(*commands["sgsync"])
        size = sum(path.stat().st_size for path in pair) / 2e6
        yield Figure(
            f"diff, {rows:,} rows a side, {shape.name}",
            f"{rows / seconds:,.0f} rows/s ({seconds:.1f} s for {size:,.0f} MB a side)",
        )
        if "sort" in commands:
            theirs, _ = measure(*commands["sort"])
            times = f"{seconds:.1f} s, {theirs:.1f} s"
            yield at_least("  against sort of one side", theirs / seconds, 1 / 3, times)
        yield memory("  peak memory", peak, 64)


# ------------------------------------------------------------------ start-up: bench_help

IMPORTS = "import argparse, csv, dataclasses, logging, pathlib, re"


def bench_help(quick: bool) -> Iterator[Figure]:
    rounds = 5 if quick else 15
    say(f"start-up, {rounds} rounds")
    runs = in_turn(
        {
            "help": [sys.executable, ROOT / "sgsync.py", "--help"],
            "imports": [sys.executable, "-c", IMPORTS],
        },
        rounds,
    )
    ours, theirs = runs["help"].median, runs["imports"].median
    detail = f"{ours * 1e3:.0f} ms, {theirs * 1e3:.0f} ms"
    yield at_most("sgsync.py --help, against six imports", ours / theirs, 1.5, detail)


# ------------------------------------------------------------------ databases

TABLES = {
    "postgresql": """
CREATE TABLE iep (
    student_number text NOT NULL, start_date date NOT NULL, end_date date, kind text,
    disability text, minutes numeric(8, 2), manager text, lre text, status text,
    PRIMARY KEY (student_number, start_date))""",
    "mssql": """
CREATE TABLE iep (
    student_number nvarchar(20) NOT NULL, start_date date NOT NULL, end_date date,
    kind nvarchar(20), disability nvarchar(20), minutes numeric(8, 2), manager nvarchar(50),
    lre nvarchar(20), status nvarchar(20), PRIMARY KEY (student_number, start_date))""",
}
PROCEDURES = {
    "postgresql": """
CREATE PROCEDURE sg_iep_upsert(
    a_number text, a_start date, a_end date, a_kind text, a_disability text, a_minutes numeric,
    a_manager text, a_lre text, a_status text) LANGUAGE plpgsql AS $$
BEGIN
    UPDATE iep SET end_date = a_end, kind = a_kind, disability = a_disability,
        minutes = a_minutes, manager = a_manager, lre = a_lre, status = a_status
    WHERE student_number = a_number AND start_date = a_start;
    IF NOT FOUND THEN
        INSERT INTO iep VALUES (a_number, a_start, a_end, a_kind, a_disability, a_minutes,
            a_manager, a_lre, a_status);
    END IF;
END $$""",
    "mssql": """
CREATE PROCEDURE sg_iep_upsert
    @number nvarchar(20), @start date, @end date, @kind nvarchar(20), @disability nvarchar(20),
    @minutes numeric(8, 2), @manager nvarchar(50), @lre nvarchar(20), @status nvarchar(20) AS
SET NOCOUNT ON;
UPDATE iep SET end_date = @end, kind = @kind, disability = @disability, minutes = @minutes,
    manager = @manager, lre = @lre, status = @status
WHERE student_number = @number AND start_date = @start;
IF @@ROWCOUNT = 0
    INSERT INTO iep VALUES (@number, @start, @end, @kind, @disability, @minutes, @manager, @lre,
        @status);""",
}
FILLED = {  # iep with that many rows, like `line`
    "postgresql": """
INSERT INTO iep SELECT lpad((100000 + n / 3)::text, 8, '0'), make_date(2010 + n % 3, n % 9 + 1, 15),
    CASE WHEN n % 4 > 0 THEN make_date(2026, n % 9 + 1, 10 + n % 10) END, 'Annual Review',
    (ARRAY['SLD', 'OHI', 'AUT', 'SLI', 'MD'])[n % 5 + 1], n % 1000 / 4.0,
    'Case manager ' || n::bigint * 7919 % 977, 'LRE80', 'LOCKED'
FROM generate_series(0, {rows} - 1) AS n""",
    "mssql": """
INSERT INTO iep SELECT RIGHT(CONCAT('00', 100000 + n / 3), 8),
    DATEFROMPARTS(2010 + n % 3, n % 9 + 1, 15),
    CASE WHEN n % 4 > 0 THEN DATEFROMPARTS(2026, n % 9 + 1, 10 + n % 10) END, 'Annual Review',
    SUBSTRING('SLDOHIAUTSLIMDX', n % 5 * 3 + 1, 3), n % 1000 / 4.0,
    CONCAT('Case manager ', CAST(n AS bigint) * 7919 % 977), 'LRE80', 'LOCKED'
FROM (SELECT TOP ({rows}) CAST(ROW_NUMBER() OVER (ORDER BY a.object_id) AS int) - 1 AS n
    FROM sys.all_objects AS a CROSS JOIN sys.all_objects AS b) AS numbers""",
}
NAMES = {"postgresql": "PostgreSQL", "mssql": "SQL Server"}


@contextlib.contextmanager
def iep_databases() -> Iterator[list[servers.Database]]:
    """A PostgreSQL, and a SQL Server if there is one, each with an empty table iep."""
    from support import servers

    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(servers.Postgres())
        made = [servers.Database("postgresql", postgres.create_database("bench"))]
        if mssql := os.environ.get("SGSYNC_TEST_MSSQL"):
            made.append(stack.enter_context(servers.mssql_database(mssql)))
        for database in made:
            database.execute(TABLES[database.kind])
            database.execute(PROCEDURES[database.kind])
        yield made


def median_times(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of what each way returns; they take turns, A B C A B C."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
    return {name: statistics.median(values) for name, values in found.items()}


# ------------------------------------------------------------------ queries: bench_export


def export_ways(connection_string: str, folder: Path) -> dict[str, Callable[[], float]]:
    """Seconds for all rows of iep: by sgsync, and by a loop that throws them away."""
    import pyodbc

    import sgsync

    sql = "SELECT * FROM iep"
    settings = sgsync.DatabaseSettings(connection_string=connection_string)

    def ours() -> float:
        with sgsync.Database(settings) as database:
            database.connect()
            began = time.perf_counter()
            sgsync.write_query(database, "export", sql, folder / "iep.csv", lambda _: None, None)
            return time.perf_counter() - began

    def bare() -> float:
        connection = pyodbc.connect(connection_string)
        try:
            began = time.perf_counter()
            cursor = connection.execute(sql)
            while cursor.fetchmany(sgsync.FETCH_ROWS):
                pass
            return time.perf_counter() - began
        finally:
            connection.close()

    return {"sgsync": ours, "bare": bare}


def bench_export(quick: bool) -> Iterator[Figure]:
    rows, rounds = (20_000, 1) if quick else (1_000_000, 5)
    with iep_databases() as databases, tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        for database in databases:
            database.execute(FILLED[database.kind].format(rows=rows))
            say(f"export of {rows:,} rows from {NAMES[database.kind]}, {rounds} rounds")
            ways = export_ways(database.connection_string, Path(folder))
            ways["bare"]()  # for the server's cache
            times = median_times(ways, rounds)
            with (Path(folder) / "iep.csv").open("rb") as file:
                if sum(1 for _ in file) != rows + 1:
                    raise BenchError("the export has other rows than the table")
            name = f"export, {rows:,} rows x {len(HEADER)}, {NAMES[database.kind]}"
            yield Figure(name, f"{rows / times['sgsync']:,.0f} rows/s")
            detail = f"{times['sgsync']:.2f} s, {times['bare']:.2f} s"
            ratio = times["bare"] / times["sgsync"]
            yield at_least("  against fetchmany alone", ratio, 0.85, detail)


# ------------------------------------------------------------------ procedures: bench_calls

CONFIG = """<Config>
  <SFTP host="none" username="none"/>
  <Database connectionString="{connection}"/>
  <Download>
    <SQLDiff file="iep.csv" key="studentNumber,startDate">
      <Query>SELECT 1</Query>
      <Insert procedure="sg_iep_upsert"/>
    </SQLDiff>
  </Download>
</Config>
"""


class Proxy:
    """Passes the bytes of TCP connections on; those to the server `delay` seconds late.

    In a process of its own, so that it does not wait for this one's interpreter.
    """

    def __init__(self, port: int, delay: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--proxy", str(port), str(delay)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> int:
        """The port to connect to."""
        return int(self._process.stdout.readline())

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.communicate()


def run_proxy(port: int, delay: float) -> None:
    def pump(source: socket.socket, target: socket.socket, delay: float) -> None:
        late: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

        def send() -> None:
            data = b"first"
            with contextlib.suppress(OSError):
                while data:
                    due, data = late.get()
                    time.sleep(max(0.0, due - time.perf_counter()))
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)

        threading.Thread(target=send, daemon=True).start()
        data = b"first"
        while data:
            try:
                data = source.recv(1 << 16)
            except OSError:
                data = b""
            late.put((time.perf_counter() + delay, data))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", port))
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for ends in ((client, server, delay), (server, client, 0.0)):
                threading.Thread(target=pump, args=ends, daemon=True).start()


@dataclass
class Calls:
    """The calls of one procedure for the same rows, in several ways, on one database.

    Each way returns calls a second. `connection_string` may lead through a proxy.
    """

    folder: Path
    rows: list[list[str]]
    database: servers.Database
    connection_string: str

    def __post_init__(self) -> None:
        text = CONFIG.format(connection=self.connection_string.replace("&", "&amp;"))
        (self.folder / "config.xml").write_text(text, encoding="utf-8")

    def write_changes(self) -> sgsync.Comparison:
        """diff/iep.csv, as sgsync makes it of rows that the database has not."""
        import sgsync

        files = self.folder / "ours.csv", self.folder / "theirs.csv"
        for path, content in zip(files, (self.rows, []), strict=True):
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([HEADER, *content])
        spec = sgsync.load_config(self.folder / "config.xml", sgsync.SyncConfig).sql_diffs[0]
        return sgsync.compare(*files, self.folder / "changes.csv", spec)

    def apply(self) -> float:
        """By sgsync's own stage, its reading of the changes included."""
        import sgsync

        config = sgsync.load_config(self.folder / "config.xml", sgsync.SyncConfig)
        found = self.write_changes()
        failures = sgsync.Failures(self.folder, 0)
        with sgsync.Database(config.database) as database:
            database.connect()
            began = time.perf_counter()
            sgsync.apply(database, found, found.summary(), failures, lambda _: None)
            return len(self.rows) / (time.perf_counter() - began)

    def autocommit(self, count: int) -> float:
        """One by one, for the first `count` of the rows."""
        import pyodbc

        connection = pyodbc.connect(self.connection_string, autocommit=True)
        cursor = connection.cursor()
        marks = ", ".join("?" * len(HEADER))
        mssql = self.database.kind == "mssql"
        call = f"EXEC sg_iep_upsert {marks}" if mssql else f"CALL sg_iep_upsert({marks})"
        rows = [[value or None for value in row] for row in self.rows[:count]]
        began = time.perf_counter()
        for row in rows:
            cursor.execute(call, row)
        seconds = time.perf_counter() - began
        connection.close()
        return count / seconds

    def psql(self) -> float:
        """By PostgreSQL's own client, from a file of CALL statements in one transaction."""
        given = dict(part.split("=", 1) for part in self.connection_string.split(";") if part)
        values = [
            ", ".join(f"'{value}'" if value else "NULL" for value in row) for row in self.rows
        ]
        calls = "".join(f"CALL sg_iep_upsert({row});\n" for row in values)
        path = self.folder / "calls.sql"
        path.write_text(f"BEGIN;\n{calls}COMMIT;\n", encoding="utf-8")
        began = time.perf_counter()
        subprocess.run(
            ["psql", "-qX", "-v", "ON_ERROR_STOP=1", "-h", given["Server"], "-p", given["Port"],
             "-U", given["UID"], "-d", given["Database"], "-f", path],
            env={**os.environ, "PGPASSWORD": given["PWD"]}, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return len(self.rows) / (time.perf_counter() - began)

    def compare(self, names: Sequence[str], singles: int, rounds: int) -> dict[str, float]:
        """The median rate of each way; each must leave the same rows in the empty table."""
        wanted: list[object] = []

        def checked(name: str) -> float:
            self.database.execute("TRUNCATE TABLE iep")
            way = getattr(self, name)
            rate: float = way(singles) if name == "autocommit" else way()
            found = self.database.rows("SELECT * FROM iep ORDER BY 1, 2")
            wanted[:] = wanted or found
            if found != (wanted[:singles] if name == "autocommit" else wanted):
                raise BenchError(f"{name} leaves other rows than {names[0]}")
            return rate

        ways = {name: functools.partial(checked, name) for name in names}
        rates = median_times(ways, rounds)
        if len(wanted) != len(self.rows):
            raise BenchError(f"{names[0]} leaves {len(wanted)} rows of {len(self.rows)}")
        return rates


def with_empty_fields(rows: Sequence[Sequence[str]], share: float) -> list[list[str]]:
    """The same rows with that share of the fields behind the key empty."""
    dice = random.Random(1)
    return [
        [*row[: len(KEY)], *("" if dice.random() < share else v for v in row[len(KEY) :])]
        for row in rows
    ]


def sync_milliseconds(folder: Path) -> float:
    """What it takes to bring a small write to this disk: a commit waits for one."""
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(50):
            file.write(bytes(8192))
            file.flush()
            began = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def bench_calls(quick: bool) -> Iterator[Figure]:
    count, singles, rounds = (2_000, 200, 1) if quick else (20_000, 1_000, 5)
    rows = [line(number).strip().split(",") for number in range(count)]
    size = f"{count:,} by sgsync, {singles:,} by autocommit, {rounds} rounds"
    with iep_databases() as databases, tempfile.TemporaryDirectory(dir=FOLDER) as name:
        folder = Path(name)
        for database in databases:
            product, direct = NAMES[database.kind], database.connection_string
            postgres = database.kind == "postgresql"
            ways = ["apply", "autocommit", *(["psql"] if postgres else [])]
            say(f"procedure calls, {product}: {size}")
            full = Calls(folder, rows, database, direct).compare(ways, singles, rounds)
            yield Figure(f"procedure calls, {product}", f"{full['apply']:,.0f}/s")
            ratio, detail = full["apply"] / full["autocommit"], f"{full['autocommit']:,.0f}/s"
            yield at_least(
                "  against autocommit", ratio, 15 if postgres else 1,
                f"{detail}, one fsync {sync_milliseconds(folder):.2f} ms" if postgres else detail,
            )  # fmt: skip
            if postgres:
                ratio = full["apply"] / full["psql"]
                yield at_least("  against psql -f", ratio, 1, f"{full['psql']:,.0f}/s")

            say("the same with 30 % of the fields empty")
            sparse = with_empty_fields(rows, 0.3)
            rates = Calls(folder, sparse, database, direct).compare(
                ["apply", "autocommit"], singles, rounds
            )
            yield Figure("  with 30 % empty fields", f"{rates['apply']:,.0f}/s")
            ratio = rates["apply"] / rates["autocommit"]
            detail = f"{rates['autocommit']:,.0f}/s"
            yield at_least("    against autocommit", ratio, 15 if postgres else 1, detail)
            ratio = rates["apply"] / full["apply"]
            yield at_least("    against no empty field", ratio, 0.8, f"{full['apply']:,.0f}/s")

        database = databases[0]
        direct = database.connection_string
        port = next(part for part in direct.split(";") if part.startswith("Port="))
        say("PostgreSQL with 1 ms more per round trip")
        with Proxy(int(port.removeprefix("Port=")), 0.001) as late:
            calls = Calls(folder, rows, database, direct.replace(port, f"Port={late}"))
            rates = calls.compare(["apply", "autocommit"], singles, rounds)
        yield Figure("procedure calls, 1 ms per round trip", f"{rates['apply']:,.0f}/s")
        ratio, detail = rates["apply"] / rates["autocommit"], f"{rates['autocommit']:,.0f}/s"
        yield at_least("  against autocommit", ratio, 30, detail)


# ------------------------------------------------------------------ transfers: bench_sftp


@dataclass
class Transfers:
    """The same files through sgsync's own stages and through OpenSSH's sftp, both ways.

    `port` is the server's, or that of a `Proxy` before it.
    """

    sshd: servers.Sshd
    port: int
    epoch: Path  # on the server
    folder: Path  # of this machine

    def __post_init__(self) -> None:
        known = self.sshd.known_hosts.replace(f"]:{self.sshd.port}", f"]:{self.port}")
        self.known_hosts = self.folder / "known_hosts"
        self.known_hosts.write_text(known, encoding="ascii")
        self.upload = self.epoch.parent.parent / "upload"
        self.local = self.folder / "local"
        self.empty()

    def empty(self) -> None:
        for path in (self.upload, self.local):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()

    def check(self, found: Path) -> None:
        for file in self.epoch.glob("*.csv"):
            if (found / file.name).read_bytes() != file.read_bytes():
                raise BenchError(f"{found / file.name} has not arrived whole")

    @contextlib.contextmanager
    def session(self) -> Iterator[sgsync.Sftp]:
        import sgsync

        settings = sgsync.SftpSettings(
            host=self.sshd.host,
            port=self.port,
            username=self.sshd.username,
            private_key=str(self.sshd.keys["ed25519"]),
            known_hosts="known_hosts",
            download_directory=str(self.epoch.parent),
            upload_directory=str(self.upload),
        )
        with sgsync.Sftp(settings, self.folder) as sftp:
            yield sftp

    def get(self, alone: bool) -> float:
        """Seconds of the stage; `alone` without connection, log-in and listings."""
        import sgsync

        with self.session() as sftp:
            if alone:
                sftp.connect()
                extract = sgsync.newest_extract(sftp, sftp.settings)
                began = time.perf_counter()
                for entry, blocks in sftp.read_files(str(self.epoch), extract.files, ahead=True):
                    sgsync._download_file(blocks, self.local, entry, lambda _: None)
            else:
                began = time.perf_counter()
                sgsync.download(
                    sftp, sftp.settings, self.local, lambda _: None, threading.Event()
                )  # fmt: skip
            return time.perf_counter() - began

    def put(self, alone: bool) -> float:
        import sgsync

        with self.session() as sftp:
            if alone:
                sftp.connect()
            began = time.perf_counter()
            sgsync.push(sftp, str(self.upload), self.epoch, lambda _: None)
            return time.perf_counter() - began

    def openssh(self, command: str, alone: bool) -> float:
        """Seconds of the whole process, or of this command alone."""
        began = time.perf_counter()
        with subprocess.Popen(
            ["sftp", "-q", "-b", "-", "-P", str(self.port), "-i", self.sshd.keys["ed25519"],
             "-o", f"UserKnownHostsFile={self.known_hosts}", "-o", "IdentitiesOnly=yes",
             f"{self.sshd.username}@{self.sshd.host}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        ) as client:  # fmt: skip

            def run(line: str) -> None:
                """Run a command to its end: what the next one prints tells it."""
                client.stdin.write(f"{line}\n!echo done\n")
                while (told := client.stdout.readline()) != "done\n":
                    if not told:
                        raise BenchError("sftp ended early")

            if alone:
                run("pwd")
                began = time.perf_counter()
                run(command)
                return time.perf_counter() - began
            client.stdin.write(f"{command}\n")
            client.stdin.close()
            if client.wait():
                raise BenchError("sftp failed")
        return time.perf_counter() - began

    def compare(self, rounds: int, alone: bool) -> Iterator[tuple[str, float, float]]:
        """For each direction, the medians of sgsync and of OpenSSH; one round more, unmeasured."""
        up = self.upload / self.epoch.name
        for direction, ours, command, found in (
            ("get", self.get, f"lcd {self.local}\nget {self.epoch}/*.csv", self.local),
            ("put", self.put, f"mkdir {up}\ncd {up}\nlcd {self.epoch}\nput *", up),
        ):
            ways = (Runs(), ours), (Runs(), functools.partial(self.openssh, command))
            for _ in range(rounds + 1):
                for runs, way in ways:
                    self.empty()
                    runs.seconds.append(way(alone))
                    self.check(found)
            yield direction, *(statistics.median(runs.seconds[1:]) for runs, _ in ways)


def bench_sftp(quick: bool) -> Iterator[Figure]:
    from support import servers

    many, large, rounds = (20, 5_000_000, 1) if quick else (200, 100_000_000, 5)
    data = random.Random(1).randbytes(1 << 20)

    def transfers(kind: str, count: int, size: int, port: int) -> Transfers:
        epoch = sshd.root / kind / "download/20260101-020000"
        if not epoch.exists():
            epoch.mkdir(parents=True)
            for number in range(count):
                content = itertools.islice(itertools.repeat(data), size // len(data) + 1)
                (epoch / f"{number}.csv").write_bytes(b"".join(content)[:size])
            (epoch / "COMPLETE").touch()
        return Transfers(sshd, port, epoch, Path(name))

    with servers.Sshd() as sshd, tempfile.TemporaryDirectory(dir=FOLDER) as name:
        say(f"SFTP, {large:,} bytes, the transfer alone, {rounds} rounds")
        one = transfers("large", 1, large, sshd.port)
        for direction, ours, theirs in one.compare(rounds, alone=True):
            detail = f"{large / ours / 1e6:,.0f} MB/s, OpenSSH {large / theirs / 1e6:,.0f} MB/s"
            what = f"SFTP {direction} of {large / 1e6:g} MB, speed against OpenSSH"
            yield at_least(what, theirs / ours, 0.85, detail)
        for delay in (0.0, 0.02):
            say(f"SFTP, {many} x 20,000 bytes, {delay * 1e3:g} ms per round trip, {rounds} rounds")
            with Proxy(sshd.port, delay) if delay else contextlib.nullcontext(sshd.port) as port:
                files = transfers("small", many, 20_000, port)
                for direction, ours, theirs in files.compare(rounds, alone=False):
                    what = f"SFTP {direction} of {many} x 20 KB, {delay * 1e3:g} ms, time against "
                    detail = f"{ours:.2f} s, {theirs:.2f} s"
                    yield at_most(f"{what}OpenSSH", ours / theirs, 1, detail)


# ------------------------------------------------------------------ SchooLinks


def bench_schoolinks(quick: bool) -> Iterator[Figure]:
    from support import bench_schoolinks

    say("SchooLinks' queries, against two for each student")
    try:
        for line in bench_schoolinks.lines(quick):
            yield Figure(*line)
    except bench_schoolinks.DifferentResultError as error:
        raise BenchError(str(error)) from error


# ------------------------------------------------------------------ main

SECTIONS: dict[str, Callable[[bool], Iterator[Figure]]] = {
    **{f"diff/{s.name}": functools.partial(bench_shape, s) for s in SHAPES},
    **{f"large/{s.name}": functools.partial(bench_large, s) for s in LARGE},
    "help": bench_help,
    "export": bench_export,
    "calls": bench_calls,
    "sftp": bench_sftp,
    "schoolinks": bench_schoolinks,
}


def _is_part(name: str, part: str) -> bool:
    """Whether `part` names a section, as `diff/few`, or all that begin so, as `diff`."""
    return name == part or name.startswith(f"{part}/")


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed and memory of sgsync.py, as a table.")
    parser.add_argument(
        "--quick", action="store_true", help="small data, a few seconds, no verdict"
    )
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="PARTS",
                        help="parts to run (default: %(default)s)")  # fmt: skip
    options = parser.parse_args()
    only = options.only.split(",")
    unknown = [part for part in only if not any(_is_part(name, part) for name in SECTIONS)]
    if unknown:
        parser.error(f"--only: there is no part {', '.join(unknown)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    began = time.monotonic()
    try:
        for name, section in SECTIONS.items():
            if any(_is_part(name, part) for part in only):
                try:
                    figures += section(options.quick)
                except (ImportError, RuntimeError) as error:  # a server that is not there
                    figures.append(Figure(name, f"left out: {error}".splitlines()[0]))
    except BenchError as error:
        say(f"stopped: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    say(f"{time.monotonic() - began:.0f} s in all, {os.cpu_count()} processors\n")
    print_table(figures, judge=not options.quick)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--proxy"]:
        run_proxy(int(sys.argv[2]), float(sys.argv[3]))
    sys.exit(main())
