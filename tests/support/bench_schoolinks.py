"""A part of `make bench`: SchooLinks' queries against two queries for each student.

`lines` yields what the table of bench.py shows: what, value, goal, whether the goal was met. The
rows lie on the server of SGSYNC_TEST_ORACLE, where it is set, and else in the embedded PowerSchool,
whose round trips are counted as Oracle's driver would make them. Whatever is added to a round trip
is added between client and server. On that server a whole run is measured, too: a process of its
own from start to exit, upload included, against the queries of the other way alone.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sgsync
from support import powerschool, schoolinks_server

DAYS = 180
TODAY = datetime.date.today()
FIRST_DAY = datetime.datetime.combine(TODAY, datetime.time()) - datetime.timedelta(DAYS - 1)
YEAR_START = (FIRST_DAY.month, 1)
CONFIG = """<Config>
  <SchooLinks schoolYearStart="{start[0]:02}-{start[1]:02}">
    <Attendance/>
    <GPA/>
  </SchooLinks>
</Config>
"""

Line = tuple[str, str, str, "bool | None"]
Ask = Callable[[str, Mapping[str, object]], Sequence[Sequence[Any]]]


class DifferentResultError(Exception):
    """The two ways do not give the same rows."""


# Every row is made on the server, from the numbers 0 to 179. Each 50th student has no day at all,
# each 7th day is half a day, each 11th has no value.
FILL = [
    "INSERT INTO students SELECT 100000 + a.n * 100 + b.n, a.n * 100 + b.n, a.n * 100 + b.n, 70, "
    "0, 9, 100, NULL, NULL FROM bench_numbers a CROSS JOIN bench_numbers b "
    "WHERE b.n < 100 AND a.n < :hundreds",
    "INSERT INTO ps_adaadm_daily_ctod SELECT s.id, s.fteid, d.bench_day, "
    "CASE WHEN MOD(s.id + d.n, 11) = 0 THEN NULL WHEN MOD(s.id + d.n, 7) = 0 THEN 0.5 ELSE 1 END, "
    "1 FROM students s CROSS JOIN bench_numbers d WHERE MOD(s.id, 50) > 0",
    "CREATE INDEX bench_student ON ps_adaadm_daily_ctod (studentid)",
    "INSERT INTO u_def_ext_students0 SELECT dcid, 2.5, 3.25 FROM students WHERE MOD(id, 3) > 0",
]
NUMBERS = [{"n": n, "bench_day": FIRST_DAY + datetime.timedelta(n)} for n in range(DAYS)]


def settings() -> sgsync.SchooLinksSettings:
    parts = (sgsync.AttendanceSettings, sgsync.GpaSettings)
    attendance, gpa = (part() for part in parts)
    tags = sgsync.TagsSettings(enabled=False)
    return sgsync.SchooLinksSettings(
        attendance=attendance, gpa=gpa, tags=tags, school_year_start=YEAR_START
    )


def student_by_student(ask: Ask) -> list[list[tuple[str, ...]]]:
    """The rows of both files, asked as the public script asks: twice for each student."""
    students = ask(
        "SELECT s.student_number, s.id, s.fteid, g.simple_gpa, g.weighted_gpa FROM students s "
        "LEFT JOIN u_def_ext_students0 g ON g.studentsdcid = s.dcid WHERE s.enroll_status = 0 "
        "AND s.grade_level IN (8, 9, 10, 11, 12) AND s.schoolid <> :school "
        "ORDER BY s.student_number DESC", {"school": 901},
    )  # fmt: skip
    attendance, gpas = [], []
    for number, identity, fteid, *gpa in students:
        binds = {"student": identity, "fte": fteid, "today": TODAY}
        sums = [
            ask(
                f"SELECT SUM({column}) FROM ps_adaadm_daily_ctod WHERE studentid = :student AND "
                "fteid = :fte AND calendardate <= :today AND attendancevalue IS NOT NULL AND "
                "membershipvalue IS NOT NULL", binds,
            )[0][0]
            for column in ("attendancevalue", "membershipvalue")
        ]  # fmt: skip
        if sums[1]:
            attendance.append((str(number), str(float(sums[0]) / float(sums[1]))))
        if gpa != [None, None]:
            gpas.append((str(number), str(gpa[0]), str(gpa[1])))
    return [attendance, gpas]


# ------------------------------------------------------------------ the two places


class Embedded:
    name = "embedded database, round trips simulated"

    def __init__(self, students: int) -> None:
        self.powerschool = powerschool.PowerSchool()
        execute = self.powerschool.execute
        execute("CREATE TABLE bench_numbers (n INTEGER, bench_day DATE)")
        for number in NUMBERS:
            execute("INSERT INTO bench_numbers VALUES (:n, :bench_day)", number)
        for statement in FILL:
            execute(statement, {"hundreds": students // 100})

    def close(self) -> None:
        self.powerschool.database.close()

    @contextlib.contextmanager
    def counted(self, seconds: float) -> Iterator[Callable[[], int]]:
        self.powerschool.seconds, before = seconds, self.powerschool.round_trips
        yield lambda: self.powerschool.round_trips - before

    def sets(self) -> list[sgsync.Section]:
        with self.powerschool.connection(settings(), sgsync.OracleLogin("", "", "")) as connection:
            connection.connect()
            return sgsync.StudentFiles(settings(), TODAY).build(connection)

    def one_by_one(self) -> list[list[tuple[str, ...]]]:
        self.powerschool.travel(5)

        def ask(sql: str, binds: Mapping[str, object]) -> Sequence[Sequence[Any]]:
            rows = self.powerschool.execute(sql, binds)
            self.powerschool.travel(1 + len(rows) // 100)  # the driver fetches 100 rows at a time
            return rows

        return student_by_student(ask)


class Oracle:
    name = "real driver, server of SGSYNC_TEST_ORACLE"

    def __init__(self, students: int) -> None:
        import oracledb

        match = re.fullmatch(r"(.+?)/(.+)@(.+)", os.environ["SGSYNC_TEST_ORACLE"])
        if match is None:
            raise ValueError("SGSYNC_TEST_ORACLE is not user/password@host:port/service")
        self.user, self.password, self.dsn = match.groups()
        self.made: list[str] = []
        self.admin = oracledb.connect(user=self.user, password=self.password, dsn=self.dsn)
        try:
            with self.admin.cursor() as cursor:
                tables = powerschool.TABLES | {"bench_numbers": "n NUMBER(10), bench_day DATE"}
                for table, columns in tables.items():
                    cursor.execute(f"CREATE TABLE {table} ({columns})")
                    self.made.append(table)
                cursor.executemany("INSERT INTO bench_numbers VALUES (:n, :bench_day)", NUMBERS)
                for statement in FILL:
                    binds = {"hundreds": students // 100} if ":hundreds" in statement else {}
                    cursor.execute(statement, binds)
            self.admin.commit()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with self.admin.cursor() as cursor:
            for table in self.made:
                cursor.execute(f"DROP TABLE {table}")
        self.admin.close()

    @contextlib.contextmanager
    def counted(self, seconds: float) -> Iterator[Callable[[], int]]:
        with powerschool.Wire(self.dsn) as wire:
            wire.seconds = seconds
            self._login = sgsync.OracleLogin(self.user, self.password, wire.dsn)
            yield lambda: wire.round_trips

    def sets(self) -> list[sgsync.Section]:
        with sgsync.Oracle(settings(), self._login) as connection:
            connection.connect()
            return sgsync.StudentFiles(settings(), TODAY).build(connection)

    def one_by_one(self) -> list[list[tuple[str, ...]]]:
        import oracledb

        login = self._login
        with (
            oracledb.connect(user=login.user, password=login.password, dsn=login.dsn) as connection,
            connection.cursor() as cursor,
        ):

            def ask(sql: str, binds: Mapping[str, object]) -> Sequence[Sequence[Any]]:
                return cursor.execute(sql, dict(binds)).fetchall()

            return student_by_student(ask)

    def process(self) -> tuple[list[list[tuple[str, ...]]], float]:
        """A whole run as a scheduler starts it; returns the rows it sent and its seconds."""
        with (
            tempfile.TemporaryDirectory() as folder,
            schoolinks_server.SchooLinks(Path(folder, "server")) as server,
        ):
            home = Path(folder, "home")
            home.mkdir()
            (home / "known_hosts").write_text(server.known_hosts, encoding="ascii")
            (home / "config.xml").write_text(CONFIG.format(start=YEAR_START), encoding="ascii")
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, sgsync.__file__, "schoolinks", "--home", str(home)],
                check=True, capture_output=True, stdin=subprocess.DEVNULL,
                env=os.environ
                | {
                    "POWERSCHOOL_READ_USER": self.user,
                    "POWERSCHOOL_DB_PASSWORD": self.password,
                    "POWERSCHOOL_PROD_DB": self._login.dsn,
                    "SCHOOLINKS_SFTP_USERNAME": server.username,
                    "SCHOOLINKS_SFTP_PASSWORD": server.password,
                    "SCHOOLINKS_SFTP_ADDRESS": f"{server.host}:{server.port}",
                },
            )  # fmt: skip
            seconds, files = time.perf_counter() - began, []
            for path in sorted((server.files / "automated").iterdir()):
                with path.open(encoding="utf-8", newline="") as file:
                    files.append([tuple(row) for row in csv.reader(file)][1:])
            return files, seconds


# ------------------------------------------------------------------ the table


def lines(quick: bool) -> Iterator[Line]:
    """What the table shows; raises DifferentResultError where the ways do not agree."""
    students = 500 if quick else 5000
    place = (Oracle if os.environ.get("SGSYNC_TEST_ORACLE") else Embedded)(students)
    what = f"SchooLinks, {students:,} students x {DAYS} days"
    try:
        yield f"{what}: where", place.name, "", None
        for milliseconds in (0, 1):
            measured = []
            for work in (place.sets, place.one_by_one):
                with place.counted(milliseconds / 1000) as trips:
                    began = time.perf_counter()
                    found = work()
                    seconds = time.perf_counter() - began
                    measured.append((found, seconds, trips()))
            (sections, ours, our_trips), (rows, theirs, their_trips) = measured
            expected = [[*map(_numbers, part)] for part in rows]
            if [[*map(_numbers, section.rows)] for section in sections] != expected:
                raise DifferentResultError("the queries do not give what each student's own give")
            if not milliseconds:
                yield (
                    f"{what}: round trips",
                    f"{our_trips:,} ({their_trips:,} with two queries a student)",
                    "<= 10",
                    our_trips <= 10,
                )
            yield (
                f"{what}: + {milliseconds} ms a round trip",
                f"{ours:.2f} s ({theirs:.1f} s with two queries a student, {theirs / ours:,.0f} x)",
                ">= 50 x" if milliseconds and not quick else "",
                theirs >= 50 * ours if milliseconds and not quick else None,
            )
        if isinstance(place, Oracle):
            with place.counted(milliseconds / 1000):
                runs = [place.process() for _ in range(3)]
            for files, _ in runs:
                if [[*map(_numbers, part)] for part in files] != expected:
                    raise DifferentResultError("a run does not send what each student's own give")
            whole = sorted(seconds for _, seconds in runs)[1]
            yield (
                f"{what}: + {milliseconds} ms a round trip, a whole run",
                f"{whole:.2f} s ({theirs / whole:,.0f} x)",
                "",
                None,
            )
    finally:
        place.close()


def _numbers(row: Sequence[str]) -> list[float]:
    return [float(value) for value in row]


if __name__ == "__main__":
    for line in lines("--quick" in sys.argv):
        print(*line, sep=" | ", flush=True)
