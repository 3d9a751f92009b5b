"""`make demo`: nights between SameGoal and a SIS, for real, on servers of its own: a first load, a
night of changes, a quiet one, one that is held and approved; then two of PowerSchool to SchooLinks
(demo_schoolinks.py).

SameGoal is an SFTP server on this machine (asyncssh), the SIS an embedded database (SQLite through
its ODBC driver). `sgsync.py sync` runs as a process of its own, as a scheduler would start it.
After each night the tables of the SIS are compared with SameGoal's extract, and the run's changes
with those that were made; any difference ends the demo with exit 1.

`make demo ARGS=--keep` then keeps the servers up, for one's own tries, until Ctrl-C.
Everything lies in build/demo, which is made anew each time. Nothing leaves this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import json
import os
import random
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import quoteattr

import asyncssh

from support import servers

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "demo"
STUDENTS = 3000
COLUMNS_SHOWN = 80
DISTRICT = "demo.example.org"

Row = tuple[str, ...]


class DemoError(Exception):
    """Something is not as the demo says it is."""


def say(text: str = "") -> None:
    """Print lines, folded at 80 columns; commands, which begin with `$`, as they are."""
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        whole = line.lstrip().startswith("$ ")
        print(line if whole else textwrap.fill(
            line, COLUMNS_SHOWN, subsequent_indent=indent, break_long_words=False,
            break_on_hyphens=False,
        ), flush=True)  # fmt: skip


def shown(path: Path | str) -> str:
    """A path as a user in this directory would type it."""
    return min(os.path.relpath(path), str(path), key=len)


def nearby(text: str) -> str:
    """Paths below this directory, in a message, as a user in it would type them."""
    return text.replace(f"{Path.cwd()}{os.sep}", "")


def run_sgsync(command: Sequence[str], code: int) -> None:
    """Run a command line of sgsync, which must end with this exit code.

    Prints its last message; the rest is in the log of the run.
    """
    done = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8"
    )
    if done.returncode != code:
        print(done.stderr, file=sys.stderr)
        raise DemoError(f"{shlex.join(command)} ended with {done.returncode} instead of {code}")
    last = re.split(r"(?m)^\d{4}-\d\d-\d\d \S+ ", done.stderr)[-1].rstrip()
    say(re.sub(r"(?m)^ *", "  ", nearby(last)))


# ------------------------------------------------------------------ SameGoal: SftpServer


class SftpServer:
    """A loopback SFTP server whose root is `root`, in a thread of its own.

    It accepts one key and no password; `make_keys` writes what a client needs.
    """

    host = "127.0.0.1"

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, 0
        self._host_key = asyncssh.generate_private_key("ssh-ed25519")
        self._client_key = asyncssh.generate_private_key("ssh-ed25519", comment=DISTRICT)
        self._connections: list[asyncssh.SSHServerConnection] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> SftpServer:
        self._thread.start()
        listening = asyncio.run_coroutine_threadsafe(self._listen(), self._loop)
        self._acceptor = listening.result(30)
        self.port = self._acceptor.get_port()
        return self

    def __exit__(self, *exception: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def make_keys(self, folder: Path) -> None:
        """The private key, its public half, and the host key as known_hosts wants it."""
        folder.mkdir(parents=True)
        key = folder / "id_ed25519"
        self._client_key.write_private_key(key)
        key.chmod(0o600)
        self._client_key.write_public_key(folder / "id_ed25519.pub")
        public = self._host_key.export_public_key().decode("ascii")
        (folder / "known_hosts").write_text(f"[{self.host}]:{self.port} {public}", encoding="ascii")

    async def _end(self) -> None:
        self._acceptor.close()
        for connection in self._connections:
            connection.abort()
            await connection.wait_closed()

    async def _listen(self) -> asyncssh.SSHAcceptor:
        root, connections = os.fsencode(self.root), self._connections

        class Login(asyncssh.SSHServer):
            def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
                connections.append(conn)

        return await asyncssh.listen(
            self.host,
            0,
            server_factory=Login,
            server_host_keys=[self._host_key],
            authorized_client_keys=asyncssh.import_authorized_keys(
                self._client_key.export_public_key().decode("ascii")
            ),
            sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=root),
        )


@dataclass(frozen=True)
class Stage:
    """What the parts of the demo share."""

    folder: Path
    server: SftpServer
    servers: contextlib.ExitStack  # closes what runs until the demo ends


# ------------------------------------------------------------------ the records: make_records

# file -> its columns; those of the key come first
KEYS = {
    "iep.csv": ("studentNumber", "startDate"),
    "services_plan.csv": ("studentNumber", "startDate"),
    "evaluation_team_report.csv": ("studentNumber", "meetingDate"),
    "special_ed_dates.csv": ("studentNumber", "eventType", "eventDate"),
    "program_flags.csv": ("studentNumber", "flag", "startDate"),
}
COLUMNS = {
    "iep.csv": (*KEYS["iep.csv"], "endDate", "disability", "placement", "caseManager", "locked"),
    "services_plan.csv": (*KEYS["services_plan.csv"], "endDate", "servingSchool", "locked"),
    "evaluation_team_report.csv": (
        *KEYS["evaluation_team_report.csv"], "evaluationType", "disability", "locked"
    ),
    "special_ed_dates.csv": (*KEYS["special_ed_dates.csv"], "outcome"),
    "program_flags.csv": (*KEYS["program_flags.csv"], "endDate"),
}  # fmt: skip

FIRST_NAMES = "Ana Ben Chloé Dana Elif Femi Grace Hugo Ines Jonas Kira Liam Mía Noor Oskar Priya"
LAST_NAMES = "Abbott Brandt Castillo Dvořák Eze Fischer Gray Hansen Ito Jensen Kaya Lopez Núñez Roy"
DISABILITIES = ("Specific Learning Disability", "Autism", "Speech or Language", "Deafness")
PLACEMENTS = ("Regular class, 80% or more", "Regular class, 40% to 79%", 'School, "home-based"')

Records = dict[str, dict[Row, Row]]  # file -> key -> row


def make_records(dice: random.Random) -> Records:
    """SameGoal's documents: most students have an IEP, some a services plan, all have a report."""
    records: Records = {file: {} for file in COLUMNS}

    def add(file: str, *row: str) -> None:
        records[file][row[: len(KEYS[file])]] = row

    for number in range(STUDENTS):
        student = str(100001 + 7 * number)
        met = f"2025-{dice.randint(1, 9):02}-{dice.randint(1, 28):02}"
        begins, ends = f"{met[:8]}28", f"2026{met[4:8]}27"
        disability = dice.choice(DISABILITIES)
        manager = f"{dice.choice(LAST_NAMES.split())}, {dice.choice(FIRST_NAMES.split())}"
        add("evaluation_team_report.csv", student, met, "Initial", disability, "1")
        add("special_ed_dates.csv", student, "ETR meeting", met, "Eligible")
        if number % 8:
            placement = dice.choice(PLACEMENTS)
            add("iep.csv", student, begins, ends, disability, placement, manager, "1")
            add("special_ed_dates.csv", student, "IEP meeting", begins, "")
            add("program_flags.csv", student, "Student has an IEP", begins, "")
        else:
            add("services_plan.csv", student, begins, ends, "St. Example's School", "1")
    return records


def write_extract(folder: Path, records: Records) -> None:
    """One nightly extract, COMPLETE last."""
    folder.mkdir(parents=True)
    for file, rows in records.items():
        with (folder / file).open("w", encoding="utf-8", newline="") as target:
            writer = csv.writer(target)
            writer.writerow(COLUMNS[file])
            writer.writerows(rows[key] for key in sorted(rows))
    (folder / "COMPLETE").touch()


# ------------------------------------------------------------------ the SIS: make_sis


@contextlib.contextmanager
def sis(path: Path) -> Iterator[sqlite3.Connection]:
    """The database past ODBC and sgsync: to make it, to change it, to check it."""
    connection = sqlite3.connect(path)
    try:
        with connection:
            yield connection
    finally:
        connection.close()


def table_of(file: str) -> str:
    return file.removesuffix(".csv")


def make_sis(path: Path, records: Records, dice: random.Random) -> None:
    """Students and empty tables for their documents."""
    students = sorted({key[0] for rows in records.values() for key in rows})
    with sis(path) as database:
        database.execute(
            "CREATE TABLE student (studentNumber TEXT PRIMARY KEY, personID INTEGER, name TEXT, "
            "exitDate TEXT)"
        )
        for person, student in enumerate(students, 5001):
            name = f"{dice.choice(FIRST_NAMES.split())} {dice.choice(LAST_NAMES.split())}"
            database.execute("INSERT INTO student VALUES (?, ?, ?, NULL)", (student, person, name))
        for file, columns in COLUMNS.items():
            own = [f"{name} TEXT" for name in columns]
            if file == "program_flags.csv":
                own.append("endedByExit INTEGER NOT NULL DEFAULT 0")
            key = ", ".join(KEYS[file])
            database.execute(
                f"CREATE TABLE {table_of(file)} ({', '.join(own)}, PRIMARY KEY ({key}))"
            )


def query_of(file: str) -> str:
    """The rows of a file as the SIS has them.

    A flag that the clean-up ended is shown as SameGoal knows it: open.
    """
    columns = ", ".join(COLUMNS[file])
    if file == "program_flags.csv":
        ended = "CASE WHEN endedByExit = 0 THEN endDate END AS endDate"
        columns = ", ".join((*COLUMNS[file][:-1], ended))
    return f"SELECT {columns} FROM {table_of(file)} ORDER BY {', '.join(KEYS[file])}"


CLEAN_UP = """
      UPDATE program_flags SET endedByExit = 1, endDate = (
          SELECT exitDate FROM student AS s WHERE s.studentNumber = program_flags.studentNumber)
      WHERE endDate IS NULL AND studentNumber IN (
          SELECT studentNumber FROM student WHERE exitDate IS NOT NULL)"""
OPEN_RECORDS = """
      SELECT studentNumber, 'IEP' AS recordType, startDate FROM iep
      UNION ALL SELECT studentNumber, 'SP', startDate FROM services_plan
      ORDER BY 1, 2, 3"""
STUDENT_MAPPING = "SELECT studentNumber, personID FROM student ORDER BY studentNumber"


def config_text(server: SftpServer, connection: str) -> str:
    """config.xml; SQLite has no stored procedures, so each element holds its statement."""
    diffs = []
    for file, columns in COLUMNS.items():
        names, marks = ", ".join(columns), ", ".join("?" * len(columns))
        upsert = f"INSERT OR REPLACE INTO {table_of(file)} ({names}) VALUES ({marks})"
        where = " AND ".join(f"{name} = ?" for name in KEYS[file])
        delete = f"DELETE FROM {table_of(file)} WHERE {where}"
        diffs.append(f"""
    <SQLDiff file="{file}" key="{",".join(KEYS[file])}">
      <Query>{query_of(file)}</Query>
      <Insert parameters="{",".join(columns)}">{upsert}</Insert>
      <Update parameters="{",".join(columns)}">{upsert}</Update>
      <Delete parameters="{",".join(KEYS[file])}">{delete}</Delete>
    </SQLDiff>""")
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<Config>
  <SFTP host="{server.host}" port="{server.port}" username="{DISTRICT}"
        privateKey="ssh/id_ed25519" knownHosts="ssh/known_hosts"
        downloadDirectory="/download" uploadDirectory="/upload"/>
  <Database connectionString={quoteattr(connection)}/>
  <Limits maxDeletes="10%" maxUpdates="50%"/>
  <Download>{"".join(diffs)}
  </Download>
  <Upload>
    <SQL>{CLEAN_UP}</SQL>
    <SQL file="open_records.csv">{OPEN_RECORDS}</SQL>
    <SQL file="student_mapping.csv">{STUDENT_MAPPING}</SQL>
  </Upload>
</Config>
"""


# ------------------------------------------------------------------ a night: District.night

Change = tuple[str, str, Row, Row]  # file, operation, before, after


class District:
    """One district's installation: its home folder, its SIS, its place on the SFTP server."""

    def __init__(self, stage: Stage) -> None:
        dice = random.Random(2026)
        self.stage = stage
        self.home, self.database = stage.folder / "home", stage.folder / "sis.sqlite"
        self.records = make_records(dice)
        make_sis(self.database, self.records, dice)
        stage.server.make_keys(self.home / "ssh")
        connection = servers.sqlite_connection_string(self.database)
        text = config_text(stage.server, connection)
        config = self.home / "config.xml"
        config.write_text(text, encoding="utf-8")
        config.chmod(0o600)
        (stage.server.root / "upload").mkdir()

    def night(self, epoch: str, expected: Sequence[Change] | None) -> Path:
        """Let SameGoal export, run sync as a scheduler would, check all that it left.

        `expected` are the changes that the run must have made, None for a first load. Returns the
        run's folder.
        """
        self.export(epoch)
        say(f"$ python sgsync.py sync --home {shown(self.home)}")
        return self.checked(self.command("sync"), expected)

    def export(self, epoch: str) -> None:
        write_extract(self.stage.server.root / "download" / epoch, self.records)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, str(ROOT / "sgsync.py"), *words, "--home", str(self.home)]

    def newest_run(self) -> Path:
        return max((self.home / "history").glob("*-*"), default=self.home)

    def checked(self, command: Sequence[str], expected: Sequence[Change] | None) -> Path:
        run_sgsync(command, 0)
        run = self.newest_run()
        self._check_sis()
        pushed = self._check_pushed(run)
        changes = list(read_changes(run / "diff"))
        if expected is None:
            expected = [
                (file, "insert", ("",) * len(row), row)
                for file, rows in self.records.items()
                for row in rows.values()
            ]
        if sorted(changes) != sorted(expected):
            raise DemoError(f"{shown(run / 'diff')} does not hold just the changes that were made")
        rows = sum(map(len, self.records.values()))
        say(f"Checked: the SIS holds the {rows:,} rows of the extract, and")
        say(f"  {shown(pushed)} has arrived whole.")
        return run

    def held_night(self, epoch: str) -> tuple[Path, str]:
        """The same where the run must be held: nothing is written or sent.

        Returns its folder and the command that approves it, as the run has printed it.
        """
        self.export(epoch)
        before, sent = (
            self.database.read_bytes(),
            set((self.stage.server.root / "upload").iterdir()),
        )
        say(f"$ python sgsync.py sync --home {shown(self.home)}")
        run_sgsync(self.command("sync"), 6)
        run = self.newest_run()
        if self.database.read_bytes() != before:
            raise DemoError("a held run has changed the SIS")
        if set((self.stage.server.root / "upload").iterdir()) != sent:
            raise DemoError("a held run has sent something")
        why = (run / "HELD").read_text(encoding="utf-8")
        found = re.search(rf"(?m)[\"']?{re.escape(sys.executable)}.* --approve .*$", why)
        if not found:
            raise DemoError(f"{shown(run / 'HELD')} names no command that approves the run")
        return run, found[0]

    def _check_sis(self) -> None:
        with sis(self.database) as database:
            for file, rows in self.records.items():
                found = [
                    tuple("" if value is None else str(value) for value in row)
                    for row in database.execute(query_of(file))
                ]
                if found != [rows[key] for key in sorted(rows)]:
                    raise DemoError(f"the table {table_of(file)} differs from SameGoal's {file}")

    def _check_pushed(self, run: Path) -> Path:
        outcome = json.loads((run / "summary.json").read_text(encoding="utf-8"))["outcome"]
        pushed = self.stage.server.root / "upload" / run.name
        for folder in (run, pushed):
            if outcome != "complete" or not (folder / "COMPLETE").is_file():
                raise DemoError(f"{shown(folder)} is not complete ({outcome})")
        for path in run.rglob("*.csv"):
            copy = pushed / path.relative_to(run)
            if not copy.is_file() or copy.read_bytes() != path.read_bytes():
                raise DemoError(f"{shown(copy)} is not what {shown(path)} is")
        return pushed


def read_changes(folder: Path) -> Iterator[Change]:
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            width = len(next(rows)) // 2
            for row in rows:
                yield path.name, row[0], tuple(row[1 : 1 + width]), tuple(row[1 + width :])


def in_words(change: Change) -> str:
    """`iep.csv: update of 100050, 2025-03-28: locked '0' -> '1'`."""
    file, operation, before, after = change
    row = after if operation == "insert" else before
    text = f"{file}: {operation} of {', '.join(row[: len(KEYS[file])])}"
    if operation == "update":
        pairs = zip(COLUMNS[file], before, after, strict=True)
        text += ": " + ", ".join(f"{name} '{b}' -> '{a}'" for name, b, a in pairs if b != a)
    return text


# ------------------------------------------------------------------ the changes of a day: a_day


def a_day(district: District, later: int = 0) -> list[Change]:
    """What people do between two nights, on both sides; returns what sync must make of it.

    `later`: by how many other students it happens to.
    """
    records, changes = district.records, []

    def nth(file: str, number: int) -> Row:
        return records[file][sorted(records[file])[number + later]]

    def nothing(row: Row) -> Row:
        return ("",) * len(row)

    before = nth("iep.csv", 400)
    after = (*before[:4], PLACEMENTS[PLACEMENTS.index(before[4]) - 1], *before[5:])
    records["iep.csv"][before[:2]] = after
    say(f"  In SameGoal, the placement in the IEP of student {before[0]} is changed,")
    changes.append(("iep.csv", "update", before, after))

    row = nth("services_plan.csv", 100)
    del records["services_plan.csv"][row[:2]]
    say(f"  the services plan of student {row[0]} is deleted,")
    changes.append(("services_plan.csv", "delete", row, nothing(row)))

    student = nth("evaluation_team_report.csv", 250)[0]
    row = (student, "2025-12-02", "Reevaluation", "Autism", "1")
    records["evaluation_team_report.csv"][row[:2]] = row
    say(f"  and a new evaluation team report of student {student} is completed.")
    changes.append(("evaluation_team_report.csv", "insert", nothing(row), row))

    with sis(district.database) as database:
        row = nth("iep.csv", 900)
        database.execute(
            "UPDATE iep SET locked = '0' WHERE studentNumber = ? AND startDate = ?", row[:2]
        )
        say(f"  In the SIS, somebody unlocks the IEP of student {row[0]} by viewing it,")
        changes.append(("iep.csv", "update", (*row[:-1], "0"), row))

        row = nth("special_ed_dates.csv", 3000)
        database.execute(
            "DELETE FROM special_ed_dates WHERE studentNumber = ? AND eventType = ?", row[:2]
        )
        say(f"  deletes a special-education date of student {row[0]} by mistake,")
        changes.append(("special_ed_dates.csv", "insert", nothing(row), row))

        leaver = nth("program_flags.csv", 1500)[0]
        database.execute(
            "UPDATE student SET exitDate = '2025-12-02' WHERE studentNumber = ?", (leaver,)
        )
        say(f"  and student {leaver} leaves the district.")
    return changes


# ------------------------------------------------------------------ the parts: main


Sight = tuple[Path, str]  # where to look, and what is there


def four_nights(stage: Stage) -> tuple[list[Sight], District]:
    """The nightly sync: a first load, a night of changes, a quiet one, a held one."""
    district = District(stage)
    server = stage.server
    rows = sum(map(len, district.records.values()))
    where = f"{server.host}:{server.port}"
    say(f"SameGoal is an SFTP server on {where}: log-in by key, host key pinned.")
    say(f"The SIS is a SQLite database behind ODBC: {STUDENTS:,} students, no records yet.")

    say(f"\nNight 1, the first load: {len(district.records)} files, {rows:,} rows.")
    district.night("20251202-020000", None)

    say("\nA day passes.")
    changes = a_day(district)
    say("\nNight 2: only what differs is written.")
    second = district.night("20251203-020000", changes)
    for change in read_changes(second / "diff"):
        say(f"  {in_words(change)}")
    with sis(district.database) as database:
        ended = database.execute("SELECT * FROM program_flags WHERE endedByExit = 1").fetchall()
    if len(ended) != 1:
        raise DemoError("the clean-up statement did not end the flag of the student who left")
    say(f"  clean-up: '{ended[0][1]}' of {ended[0][0]} ended on {ended[0][3]}")

    say("\nNight 3, a quiet one: nobody has changed anything.")
    district.night("20251204-020000", [])

    say("\nNight 4: half of the IEPs are missing from SameGoal's file. A run that would")
    say("delete or change that much is held, and says how to approve it.")
    ieps = district.records["iep.csv"]
    gone = [ieps.pop(key) for key in sorted(ieps)[1::2]]
    third, approval = district.held_night("20251205-020000")
    say("Checked: nothing was written, and nothing was sent.")

    say("\nA person looks at diff/ in the run's folder, finds that the deletes are right,")
    say("and enters the printed command. It makes the changes shown, and no others.")
    say(f"$ {nearby(approval)}")
    deletes = [("iep.csv", "delete", row, ("",) * len(row)) for row in gone]
    district.checked(shlex.split(approval), deletes)

    return [
        (district.home / "config.xml", "the configuration"),
        (second / "diff", "the changes of night 2, before and after"),
        (second / "sgi_log.txt", "its log"),
        (server.root / "upload" / second.name, "what SameGoal received, COMPLETE last"),
        (third / "HELD", "why night 4 was held"),
        (district.database, "the SIS"),
    ], district


def schoolinks(stage: Stage) -> tuple[list[Sight], list[str]]:
    """PowerSchool's rows to SchooLinks; returns where to look, and the command line to try."""
    from support import demo_schoolinks

    say("\n\nFrom PowerSchool to SchooLinks\n")
    tools = demo_schoolinks.Tools(say, shown, run_sgsync, stage.servers)
    try:
        return demo_schoolinks.two_nights(stage.folder / "schoolinks", tools)
    except demo_schoolinks.SchooLinksError as error:
        raise DemoError(str(error)) from error


# ------------------------------------------------------------------ --keep: keep


def keep(district: District, schoolinks_command: list[str]) -> None:
    """Prepares another night, prints what to try, and waits for Ctrl-C."""
    say("\nThe servers keep running. Another day passes.")
    a_day(district, later=20)
    district.export("20251206-020000")
    program = [shown(sys.executable), shown(ROOT / "sgsync.py")]
    home = ["--home", shown(district.home)]
    offered = subprocess.run([*program, "--help"], check=True, capture_output=True, text=True)
    say("\nTry, in another terminal, in this folder:")
    for words, what in (
        ("sync --dry-run", "shows what the next night would change, in diff/"),
        ("sync", "changes it"),
        ("check", "tries everything, changes nothing"),
        ("history", "lists the runs"),
        ("report", "writes a page about the newest run"),
    ):
        if re.search(rf"(?m)^ +{words.split()[0]}\b", offered.stdout):
            say(f"  {what}:")
            say(f"    $ {shlex.join([*program, *words.split(), *home])}")
    say("  sends to SchooLinks what night 2 held (Oracle is embedded, hence the name):")
    say(
        f"    $ {shlex.join([shown(word) if '/' in word else word for word in schoolinks_command])}"
    )
    say(f"SameGoal's extracts: {shown(district.stage.server.root / 'download')}")
    say("\nCtrl-C ends the servers.")
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


# ------------------------------------------------------------------ main


def main() -> int:
    parser = argparse.ArgumentParser(description="Nights of sgsync on servers of their own.")
    parser.add_argument("--keep", action="store_true", help="keep the servers up until Ctrl-C")
    options = parser.parse_args()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
    began = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    root = FOLDER / "sftp"
    root.mkdir(parents=True)
    try:
        with SftpServer(root) as server, contextlib.ExitStack() as stack:
            stage = Stage(FOLDER, server, stack)
            sights, district = four_nights(stage)
            more, command = schoolinks(stage)
            say(f"\nAll as it should be, in {time.monotonic() - began:.0f} s. Where to look:")
            for path, what in sights + more:
                say(f"  {what}:\n    {shown(path)}")
            if options.keep:
                keep(district, command)
    except (DemoError, servers.ServerMissingError, OSError) as error:
        say(f"\nThe demo failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("\nInterrupted.")
        return 130
    if options.keep:
        say("\nThe servers have ended.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
