"""A part of `make demo`: two nights of `sgsync.py schoolinks`.

SchooLinks is an SFTP server on this machine. PowerSchool is embedded: Oracle cannot be brought
along, so a SQLite database with PowerSchool's tables answers the same queries in its place.
Everything else is the program as it is: `demo_schoolinks.py FILE ...` runs sgsync.py with the
arguments that follow, in front of the database FILE, with the environment in FILE.json.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import sgsync  # noqa: E402
from support import powerschool, schoolinks_server  # noqa: E402

STUDENTS = 600
ATTENDANCE, GPA, TAGS = FILES = ("attendance_percentage.csv", "gpa.csv", "student_tags.csv")
TABLES = {
    "IEP": ("s_il_stu_x", "iep", 1),
    "504": ("s_il_stu_plan504_x", "participant", 1),
    "EL": ("s_il_stu_x", "lep", 1),
    "LI": ("s_il_stu_x", "lii", 1),
    "GFT": ("s_stu_crdc_x", "giftedtalentedprograms_yn", "Y"),
}

Sight = tuple[Path, str]  # where to look, and what is there
Row = tuple[str, ...]


class SchooLinksError(Exception):
    """Something is not as the demo says it is."""


@dataclass(frozen=True)
class Tools:
    """What the demo lends its parts."""

    say: Callable[[str], None]
    shown: Callable[[Path], str]  # a path, as short as can be
    run: Callable[[Sequence[str], int], None]  # a command line that must end with an exit code
    servers: contextlib.ExitStack  # closes what runs until the demo ends


def school_days(count: int) -> list[datetime.date]:
    """The last weekdays of this school year; on its first day there is just that one."""
    today = datetime.date.today()
    start = datetime.date(today.year if today.month >= 7 else today.year - 1, 7, 1)
    back = [today - datetime.timedelta(days) for days in range(2 * count)]
    return [day for day in back if day >= start and day.weekday() < 5][:count] or [today]


def populate(database: powerschool.PowerSchool) -> dict[str, list[Row]]:
    """Students with all they may have; returns the rows that must arrive at SchooLinks."""
    dice = random.Random(118)
    days = school_days(60)
    tables: dict[str, list[dict[str, object]]] = {table: [] for table in powerschool.TABLES}
    expected: dict[str, list[Row]] = {file: [] for file in FILES}
    for number in range(30_000 + STUDENTS, 30_000, -1):
        key, grade, school = number + 7, dice.randint(-1, 12), dice.choice([11, 12, 13, 901])
        sent = grade >= 8 and school != 901
        student = {"student_number": number, "id": key, "dcid": key}
        tables["students"].append(
            powerschool.STUDENT | student | {"grade_level": grade, "schoolid": school}
        )
        present = [dice.choice([0.0, 0.5, *[1.0] * 18]) for _ in days]
        for day, value in zip(days, present, strict=True):
            tables["ps_adaadm_daily_ctod"].append(
                powerschool.DAY | {"studentid": key, "calendardate": day, "attendancevalue": value}
            )
        gpa = dice.choice([None, 0.0, *(round(dice.uniform(1, 4), 2) for _ in range(20))])
        weighted = gpa and gpa + 0.25
        if gpa is not None:
            tables["u_def_ext_students0"].append(
                {"studentsdcid": key, "simple_gpa": gpa, "weighted_gpa": weighted}
            )
        has = [name for name in TABLES if dice.random() < 0.15]
        extensions: dict[str, dict[str, object]] = {}
        for name in has:
            table, column, value = TABLES[name]
            extensions.setdefault(table, {"studentsdcid": key})[column] = value
        for table, record in extensions.items():
            tables[table].append(record)
        if sent:
            share = sum(present) / len(days)
            expected[ATTENDANCE].append((str(number), str(share)))
            if gpa is not None:
                expected[GPA].append((str(number), str(gpa), str(weighted)))
            expected[TAGS] += [(str(number), name) for name in has]
    for table, records in tables.items():
        database.insert(table, records)
    return expected


class District:
    """An installation that sends to SchooLinks: its home folder, its PowerSchool, its server."""

    def __init__(self, folder: Path, server: schoolinks_server.SchooLinks, tools: Tools) -> None:
        self.home, self.database = folder / "home", folder / "powerschool.sqlite"
        self.server, self.tools = server, tools
        self.home.mkdir(parents=True)
        (self.home / "known_hosts").write_text(server.known_hosts, encoding="ascii")
        text = (ROOT / "config.xml").read_text(encoding="utf-8")  # with TODOs for sync, as it comes
        config = self.home / "config.xml"
        config.write_text(text, encoding="utf-8")
        config.chmod(0o600)
        environment = environment_of(self.database)
        environment.touch(mode=0o600)
        variables = {
            "POWERSCHOOL_READ_USER": "psnavigator",
            "POWERSCHOOL_DB_PASSWORD": "embedded-no-password",
            "POWERSCHOOL_PROD_DB": "embedded:0/PSPRODDB",
            "SCHOOLINKS_SFTP_USERNAME": server.username,
            "SCHOOLINKS_SFTP_PASSWORD": server.password,
            "SCHOOLINKS_SFTP_ADDRESS": f"{server.host}:{server.port}",
        }
        environment.write_text(json.dumps(variables), encoding="utf-8")

    def command(self, *words: str) -> list[str]:
        """The command line that runs sgsync.py in front of this PowerSchool."""
        program = [sys.executable, __file__, str(self.database)]
        return [*program, "schoolinks", *words, "--home", str(self.home)]

    def night(self, code: int) -> Path:
        """Run the command as a scheduler would; returns the run's folder."""
        self.tools.say(f"$ python sgsync.py schoolinks --home {self.tools.shown(self.home)}")
        self.tools.run(self.command(), code)
        return max((self.home / "history/schoolinks").glob("*-*"), default=self.home)

    def arrived(self) -> dict[str, bytes]:
        folder = self.server.files / "automated"
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def environment_of(database: Path) -> Path:
    return database.with_name(database.name + ".json")


def check_rows(expected: dict[str, list[Row]], run: Path, arrived: dict[str, bytes]) -> None:
    """Every row is the student's own, computed here one by one, and every file has arrived."""
    for file in FILES:
        data = (run / file).read_bytes()
        rows = [tuple(row) for row in csv.reader(data.decode("utf-8").splitlines())][1:]
        found = [row[:2] for row in rows] if file == TAGS else rows
        if found != expected[file]:
            raise SchooLinksError(f"{run / file} does not hold the rows of PowerSchool")
        if arrived.get(file) != data:
            raise SchooLinksError(f"{file} has not arrived as it was built")


def two_nights(folder: Path, tools: Tools) -> tuple[list[Sight], list[str]]:
    """A good night, and one on which PowerSchool's GPAs have not been refreshed in time.

    Returns where to look, and the command line that sends what the second night held.
    """
    say = tools.say
    server = tools.servers.enter_context(schoolinks_server.SchooLinks(folder / "sftp"))
    district = District(folder, server, tools)
    database = powerschool.PowerSchool(district.database)
    expected = populate(database)
    say(f"SchooLinks is an SFTP server on {server.host}:{server.port}: log-in by password, host")
    say("key pinned. PowerSchool is embedded: a SQLite database with PowerSchool's tables")
    say(f"answers sgsync's queries in Oracle's place: {STUDENTS:,} students of all grades.")

    say("\nNight 1.")
    first = district.night(0)
    arrived = district.arrived()
    check_rows(expected, first, arrived)
    say("Checked: the rows are those computed student by student, and all have arrived.")

    say("\nNight 2: the import of GPAs into PowerSchool broke off half way.")
    database.execute("DELETE FROM u_def_ext_students0 WHERE studentsdcid > 30250")
    second = district.night(6)
    if district.arrived() != arrived or (second / "COMPLETE").exists():
        raise SchooLinksError("a held run has changed something at SchooLinks")
    say("Checked: the files at SchooLinks are those of night 1.")
    database.database.close()
    return [
        (first, "the files for SchooLinks as they were sent, log, summary"),
        (server.files / "automated", "what SchooLinks received"),
        (second / "HELD", "why the second night sent nothing"),
    ], district.command("--force")


def main(arguments: Sequence[str]) -> int:
    """sgsync.py in front of an embedded PowerSchool."""
    database, *argv = arguments
    os.environ.update(json.loads(environment_of(Path(database)).read_text(encoding="utf-8")))
    sgsync.Oracle = powerschool.PowerSchool(Path(database)).connection  # type: ignore[misc]
    return sgsync.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
