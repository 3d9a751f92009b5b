"""`make bench`: speed and memory, as a table of figures and the goals that were set for them.

Programs that are compared run in turn, A B A B, each from start to exit; a figure is a median, a
ratio one of medians. Each pair's results are compared first: only equal work counts. Nothing fails
here for being slow: times belong to a machine.

    bench.py [--quick] [--only diff,large,help,calls,sftp,schoolinks]

The data is made in build/bench, the same each time.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
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
import zlib
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


# ------------------------------------------------------------------ files: make_pair

HEADER = (
    "studentNumber", "startDate", "endDate", "type", "disability", "minutes", "manager", "lre",
    "status",
)  # fmt: skip
KEY = 2  # its first columns
CHUNK = 10_000  # rows; 10 of them are inserts, 10 updates, 10 deletes
DISABILITIES = ("SLD", "OHI", "AUT", "SLI", "MD")


def line(number: int) -> str:
    day = number % 9 + 1
    ends = f"2026-0{day}-1{number % 10}" if number % 4 else ""
    return (
        f"{100000 + number // 3:08},201{number % 3}-0{day}-15,{ends},Annual Review,"
        f"{DISABILITIES[number % 5]},{number % 1000 / 4:.2f},"
        f"Case manager {number * 7919 % 977},LRE80,LOCKED\r\n"
    )


def make_pair(folder: Path, rows: int, quoted: bool = False) -> tuple[Path, Path]:
    """Two files of `rows` rows, 0.3 % of them different; kept for the next time."""
    version = f"{zlib.crc32(''.join(map(line, range(1000))).encode()):08x}"
    kind = f"{rows}-quoted-{version}" if quoted else f"{rows}-{version}"
    pair = folder / f"samegoal-{kind}.csv", folder / f"sis-{kind}.csv"
    if all(path.exists() for path in pair):
        return pair
    for old in folder.glob("*.csv"):
        if version not in old.name:
            old.unlink()
    say(f"making {rows:,} rows{', every field quoted' if quoted else ''}, twice")
    parts = [path.with_suffix(".part") for path in pair]
    dice = random.Random(rows)

    def text(lines: Sequence[str]) -> bytes:
        whole = "".join(lines)
        if quoted:
            whole = whole.replace(",", '","').replace("\r\n", '"\r\n"')
            whole = '"' + whole[:-1]
        return whole.encode("ascii")

    with parts[0].open("wb") as ours, parts[1].open("wb") as theirs:
        for file in (ours, theirs):
            file.write(text([",".join(HEADER) + "\r\n"]))
        for start in range(0, rows, CHUNK):
            a = [line(number) for number in range(start, min(start + CHUNK, rows))]
            b = a.copy()
            different = dice.sample(range(len(a)), 3 * len(a) // 1000)
            for index in different[0::3]:
                a[index] = ""
            for index in different[1::3]:
                b[index] = b[index].replace("LOCKED", "OPEN")
            for index in different[2::3]:
                b[index] = ""
            ours.write(text([row for row in a if row]))
            theirs.write(text([row for row in b if row]))
    for part, path in zip(parts, pair, strict=True):
        part.replace(path)
    return pair


# ------------------------------------------------------------------ diff: bench_diff, bench_large


def diff_commands(pair: tuple[Path, Path], folder: Path) -> dict[str, list[str | Path]]:
    """The compared programs; each writes its changes to `<name>.csv` in `folder`."""
    files = [str(path) for path in pair]
    key = ",".join(HEADER[:KEY])
    here = Path(__file__).parent / "support"
    commands: dict[str, list[str | Path]] = {
        "sgsync": [ROOT / "sgsync.py", "diff", *files, "--key", key, "--output"],
        "plain": [here / "bench_plain.py", *files],
        "duckdb": [here / "bench_duckdb.py", *files],
    }
    for name, command in commands.items():
        command.insert(0, sys.executable)
        command.append(folder / f"{name}.csv")
        if name != "sgsync":
            command.append(str(KEY))
    return commands


def check_equal(folder: Path, names: Sequence[str]) -> int:
    """All have found the same changes, whatever their order; returns how many."""
    found = {}
    for name in names:
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            found[name] = sorted(csv.reader(file))
    first = found[names[0]]
    for name in names:
        if found[name] != first:
            raise BenchError(f"{name} finds other changes than {names[0]}; see {folder}")
    return len(first) - 1


def bench_diff(quick: bool) -> Iterator[Figure]:
    rows, rounds = (50_000, 2) if quick else (1_000_000, 5)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        out = Path(name)
        commands = diff_commands(make_pair(FOLDER, rows), out)
        say(f"diff of {rows:,} rows a side, {rounds} rounds")
        runs = in_turn(commands, rounds)
        changes = check_equal(out, list(commands))
        ours, plain, duckdb = runs["sgsync"], runs["plain"], runs["duckdb"]
        size = f"{rows:,} rows a side"
        times = f"{ours.median:.2f} s, {plain.median:.2f} s"
        yield Figure(f"diff, {size}, {changes:,} changes", f"{rows / ours.median:,.0f} rows/s")
        yield at_least("  against a csv.reader merge", plain.median / ours.median, 2.5, times)
        times = f"{ours.median:.2f} s, {duckdb.median:.2f} s"
        yield at_least("  against DuckDB's full join", duckdb.median / ours.median, 1, times)
        yield memory("  peak memory", ours.peak, 64)
        yield Figure("    of the csv.reader merge", f"{plain.peak / 1e6:.1f} MB")
        yield Figure("    of DuckDB", f"{duckdb.peak / 1e6:.1f} MB")

        commands = diff_commands(make_pair(FOLDER, rows, quoted=True), out)
        say(f"the same with every field quoted, {rounds} rounds")
        runs = in_turn(commands, rounds)
        check_equal(out, list(commands))
        ours, plain, duckdb = runs["sgsync"], runs["plain"], runs["duckdb"]
        times = f"{ours.median:.2f} s, {plain.median:.2f} s"
        yield Figure(f"diff, {size}, every field quoted", f"{rows / ours.median:,.0f} rows/s")
        yield at_least("  against a csv.reader merge", plain.median / ours.median, 1, times)
        times = f"{ours.median:.2f} s, {duckdb.median:.2f} s"
        yield Figure(
            "  against DuckDB's full join", f"{duckdb.median / ours.median:.2f} x ({times})"
        )
        yield memory("  peak memory", ours.peak, 64)


def bench_large(quick: bool) -> Iterator[Figure]:
    rows = 200_000 if quick else 10_000_000
    if shutil.disk_usage(FOLDER).free < 400 * rows:
        yield Figure(f"diff, {rows:,} rows a side", f"needs {400 * rows / 1e9:.0f} GB of free disk")
        return
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        pair = make_pair(Path(name), rows)
        say(f"diff of {rows:,} rows a side, once")
        seconds, peak = measure(*diff_commands(pair, Path(name))["sgsync"])
        size = sum(path.stat().st_size for path in pair) / 2e6
        yield Figure(
            f"diff, {rows:,} rows a side",
            f"{rows / seconds:,.0f} rows/s ({seconds:.1f} s for {size:,.0f} MB a side)",
        )
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


# ------------------------------------------------------------------ procedures: bench_calls

TABLE = """
CREATE TABLE iep (
    student_number text NOT NULL, start_date date NOT NULL, end_date date, kind text,
    disability text, minutes numeric(8, 2), manager text, lre text, status text,
    PRIMARY KEY (student_number, start_date))"""
PROCEDURE = """
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
END $$"""
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
    """The calls of one procedure for the same rows, in two ways, on one database."""

    home: Path
    rows: list[list[str]]
    connection_string: str

    def __post_init__(self) -> None:
        text = CONFIG.format(connection=self.connection_string)
        (self.home / "config.xml").write_text(text, encoding="utf-8")

    def write_changes(self, rows: Sequence[Sequence[str]]) -> sgsync.Counts:
        """diff/iep.csv, as sgsync makes it of rows that the database has not."""
        import sgsync

        files = self.home / "ours.csv", self.home / "theirs.csv"
        for path, content in zip(files, (rows, []), strict=True):
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([HEADER, *content])
        spec = sgsync.load_config(self.home / "config.xml", "sync").sql_diffs[0]
        with (self.home / "changes.csv").open("wb") as changes:
            return sgsync.diff(*files, changes, spec)

    def apply(self) -> float:
        """Calls a second of sgsync's own stage, its reading of the changes included."""
        import sgsync

        config = sgsync.load_config(self.home / "config.xml", "sync")
        counts = self.write_changes(self.rows)
        with (
            sgsync.Database(config.database) as database,
            sgsync.Failures(self.home / "failures.csv", 0) as failures,
        ):
            database.connect()
            began = time.perf_counter()
            sgsync.apply(
                database, config.sql_diffs[0], self.home / "changes.csv", counts, failures,
                lambda _: None,
            )  # fmt: skip
            return len(self.rows) / (time.perf_counter() - began)

    def autocommit(self, count: int) -> float:
        """Calls a second, one by one, for the first `count` of the rows."""
        import pyodbc

        connection = pyodbc.connect(self.connection_string, autocommit=True)
        cursor = connection.cursor()
        call = f"CALL sg_iep_upsert({', '.join('?' * len(HEADER))})"
        rows = [[value or None for value in row] for row in self.rows[:count]]
        began = time.perf_counter()
        for row in rows:
            cursor.execute(call, row)
        seconds = time.perf_counter() - began
        connection.close()
        return count / seconds


def compare_calls(
    calls: Calls, database: servers.Database, singles: int, rounds: int
) -> tuple[float, float]:
    """The median rates of sgsync and of autocommit; the table must hold the same after each."""
    rates: tuple[list[float], list[float]] = [], []
    for _ in range(rounds):
        found = []
        for way, rate in ((calls.apply, rates[0]), (lambda: calls.autocommit(singles), rates[1])):
            database.execute("TRUNCATE iep")
            rate.append(way())
            found.append(database.rows("SELECT * FROM iep ORDER BY 1, 2"))
        if len(found[0]) != len(calls.rows) or found[0][:singles] != found[1]:
            raise BenchError("sgsync and autocommit leave different rows")
    return statistics.median(rates[0]), statistics.median(rates[1])


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
    from support import servers

    count, singles, rounds = (2_000, 200, 1) if quick else (20_000, 1_000, 3)
    rows = [line(number).strip().split(",") for number in range(count)]
    with servers.Postgres() as postgres, tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        direct = postgres.create_database("bench")
        database = servers.Database("postgresql", direct)
        database.execute(TABLE)
        database.execute(PROCEDURE)
        say(f"procedure calls: {count:,} by sgsync, {singles:,} by autocommit, {rounds} rounds")
        ours, theirs = compare_calls(Calls(Path(folder), rows, direct), database, singles, rounds)
        disk = f"one fsync {sync_milliseconds(postgres.folder):.2f} ms"
        yield Figure("procedure calls, PostgreSQL", f"{ours:,.0f}/s")
        yield at_least("  against autocommit", ours / theirs, 15, f"{theirs:,.0f}/s, {disk}")

        say("the same with 1 ms more per round trip")
        with Proxy(postgres.port, 0.001) as port:
            slow = direct.replace(f"Port={postgres.port};", f"Port={port};")
            calls = Calls(Path(folder), rows, slow)
            ours, theirs = compare_calls(calls, database, singles, rounds)
        yield Figure("  with 1 ms per round trip", f"{ours:,.0f}/s")
        yield at_least("    against autocommit", ours / theirs, 15, f"{theirs:,.0f}/s")


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

        settings = sgsync._defaults(
            sgsync.SftpSettings,
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
    "diff": bench_diff,
    "large": bench_large,
    "help": bench_help,
    "calls": bench_calls,
    "sftp": bench_sftp,
    "schoolinks": bench_schoolinks,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed and memory of sgsync.py, as a table.")
    parser.add_argument(
        "--quick", action="store_true", help="small data, a few seconds, no verdict"
    )
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="PARTS",
                        help="parts to run (default: %(default)s)")  # fmt: skip
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"--only: there is no part {', '.join(sorted(unknown))}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    began = time.monotonic()
    try:
        for name, section in SECTIONS.items():
            if name in options.only.split(","):
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
