"""A school district in front of SchooLinks: a home folder, a PowerSchool, the way to both servers.

District's PowerSchool is the embedded one, unless a test puts sgsync.Oracle back in its place.
"""

from __future__ import annotations

import csv
import datetime
import io
import random
from pathlib import Path
from typing import Any

import pytest

import sgsync
from support import homes, schoolinks_server
from support.powerschool import DAY, STUDENT, PowerSchool

TODAY = datetime.date(2026, 2, 16)
ATTENDANCE, GPA, TAGS = "attendance_percentage.csv", "gpa.csv", "student_tags.csv"
FILES = (ATTENDANCE, GPA, TAGS)
HEADERS = {
    ATTENDANCE: ["student_number", "attendance_percentage"],
    GPA: ["student_number", "numerator_unweighted", "numerator_weighted"],
    TAGS: ["student_number", "name", "detailed_name", "description"],
}
IEP = ["IEP", "Individualized Education Plan", "Student with IDEA Services"]
SECTION_504 = ["504", "Section 504", "Student with 504 Accomodation"]
EL = ["EL", "English Learner", "Low English Proficiency Learner"]
LI = ["LI", "Low Income", "Low Income/Economically Disadvantaged Family"]
GFT = ["GFT", "Gifted & Talented", "Student in Gifted or Talented Program"]
CONDITIONS = [
    (IEP, "s_il_stu_x", "iep", 1),
    (SECTION_504, "s_il_stu_plan504_x", "participant", 1),
    (EL, "s_il_stu_x", "lep", 1),
    (LI, "s_il_stu_x", "lii", 1),
    (GFT, "s_stu_crdc_x", "giftedtalentedprograms_yn", "Y"),
]
FIVE_TAGS = "".join(
    f'<Tag name="{name}" detailedName="{detailed}" description="{description}" '
    f'table="{table}" column="{column}" equals="{value}"/>\n'.replace(" & ", " &amp; ")
    for (name, detailed, description), table, column, value in CONDITIONS
)
SECTIONS = {
    "attendance": "<Attendance/>",
    "gpa": "<GPA/>",
    "tags": f"<Tags>{FIVE_TAGS}</Tags>",
}
CONFIG = """<?xml version="1.0" encoding="UTF-8"?>
<Config>
  {before}
  <SchooLinks directory="{path}/automated" testDirectory="{path}/other" {attributes}>
    {attendance}
    {gpa}
    {tags}
  </SchooLinks>
  {history}
</Config>
"""

Row = list[str]


# ------------------------------------------------------------------ a district


class District(homes.Runs):
    """A home folder, an embedded PowerSchool, and the environment that leads to both servers."""

    kept = "history/schoolinks"

    def __init__(
        self,
        path: Path,
        server: schoolinks_server.SchooLinks | schoolinks_server.OpenSsh,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.path, self.server, self.powerschool = path, server, PowerSchool()
        self.aged = 0  # how many runs have been made older
        self.database_password = "Tiger&<Lily>7"
        (path / "ssh").mkdir(parents=True)
        (path / "known_hosts").write_text(server.known_hosts, encoding="ascii")
        self.values = dict.fromkeys(("before", "attributes", "history"), "")
        self.values |= SECTIONS | {"path": server.path}
        self.configure()
        for name, value in {
            "POWERSCHOOL_READ_USER": "psnavigator",
            "POWERSCHOOL_DB_PASSWORD": self.database_password,
            "POWERSCHOOL_PROD_DB": "ps.example.org:1521/PSPRODDB",
            "SCHOOLINKS_SFTP_USERNAME": server.username,
            "SCHOOLINKS_SFTP_PASSWORD": server.password,
            "SCHOOLINKS_SFTP_ADDRESS": f"{server.host}:{server.port}",
        }.items():
            monkeypatch.setenv(name, value)
        files = sgsync.StudentFiles
        monkeypatch.setattr(sgsync, "Oracle", self.powerschool.connection)
        monkeypatch.setattr(sgsync, "RETRY_SECONDS", 0.01)
        monkeypatch.setattr(sgsync, "StudentFiles", lambda config, _: files(config, TODAY))

    def configure(self, **values: str) -> None:
        """Write config.xml anew, with these parts of CONFIG changed for good."""
        self.values |= values
        config = self.path / "config.xml"
        config.write_text(CONFIG.format(**self.values), encoding="utf-8")
        config.chmod(0o600)

    def student(self, number: int | None, **more: Any) -> None:
        """A student: columns of `students` and of the tables that extend it, `days=(x of y)`."""
        identity = {"student_number": number, "id": number or 1, "dcid": 10_000 + (number or 1)}
        days = more.pop("days", ())
        extensions = {
            "u_def_ext_students0": ("simple_gpa", "weighted_gpa"),
            "s_il_stu_x": ("iep", "lep", "lii"),
            "s_il_stu_plan504_x": ("participant",),
            "s_stu_crdc_x": ("giftedtalentedprograms_yn",),
        }
        for table, columns in extensions.items():
            found = {column: more.pop(column) for column in columns if column in more}
            if found:
                self.powerschool.insert(table, [{"studentsdcid": identity["dcid"], **found}])
        student = STUDENT | identity | {"lastfirst": f"Doe, Jane {number}"} | more
        self.powerschool.insert("students", [student])
        for back, (present, member) in enumerate(days):
            self.day(number, TODAY - datetime.timedelta(back), present, member, student["fteid"])

    def day(
        self, number: int | None, date: datetime.date, present: Any = 1.0, member: Any = 1.0,
        fteid: Any = DAY["fteid"], view: str = "ps_adaadm_daily_ctod",
    ) -> None:  # fmt: skip
        day = {"studentid": number or 1, "calendardate": date, "fteid": fteid}
        day |= {"attendancevalue": present, "membershipvalue": member}
        self.powerschool.insert(view, [day])

    def students(self, *numbers: int, **more: Any) -> None:
        """Students who are in every file."""
        for number in numbers:
            have = {"days": [(1.0, 1.0)], "simple_gpa": 3.5, "weighted_gpa": 4.25, "iep": 1}
            self.student(number, **have | more)

    def forget(
        self, *numbers: int, table: str = "students", column: str = "student_number"
    ) -> None:
        for number in numbers:
            self.powerschool.execute(f"DELETE FROM {table} WHERE {column} = {number}")

    def main(self, *argv: str) -> int:
        """Run sgsync in this process; earlier runs become older, or this one had to wait."""
        for run in self.runs():
            if run.name > "2025":
                run.rename(run.with_name(f"20240101-{self.aged:06}"))
                self.aged += 1
        return sgsync.main(["schoolinks", *argv, "--home", str(self.path)])

    def sections(self) -> dict[str, sgsync.Section]:
        """The sections by file, without a run."""
        config = sgsync.load_config(self.path / "config.xml", sgsync.SchooLinksConfig).schoolinks
        login = sgsync.OracleLogin("", "", "")
        with self.powerschool.connection(config, login) as connection:
            found = sgsync.StudentFiles(config, TODAY).build(connection)
        return {section.file: section for section in found}

    def rows(self, file: str) -> list[Row]:
        return [list(row) for row in self.sections()[file].rows]

    def without(self, file: str) -> dict[str, list[str]]:
        return self.sections()[file].without

    def sent(self, directory: str = "automated") -> dict[str, bytes]:
        folder = self.server.files / directory
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    def failed(self, code: int, *argv: str) -> str:
        """A run that must end with this exit code and leave no COMPLETE; returns its message."""
        assert self.main(*argv) == code, self.log
        message = self.message(code)
        assert not (self.run / "COMPLETE").exists()
        return message

    def refused(self, code: int, *argv: str) -> str:
        """The same for a run that must not even have logged in at SchooLinks."""
        before = self.sent(), self.sent("other")
        assert isinstance(self.server, schoolinks_server.SchooLinks)
        logins = len(self.server.logins)
        message = self.failed(code, *argv)
        assert (self.sent(), self.sent("other")) == before
        assert len(self.server.logins) == logins
        return message


def csv_rows(data: bytes) -> list[Row]:
    return list(csv.reader(io.StringIO(data.decode("utf-8"), newline="")))


def populate(district: District, count: int, seed: int) -> None:
    """Students of all kinds, but none that the public script loses."""
    chance = random.Random(seed)
    for number in range(1, count + 1):
        gpa = chance.choice([1, 2.0, 3.25, 3.875, 4])
        district.student(
            100_000 + number * 7 % 1009,
            grade_level=chance.choice([-1, 0, 7, 8, 9, 10, 11, 12, 99]),
            enroll_status=chance.choice([0, 0, 0, -1, 2, 3]),
            schoolid=chance.choice([100, 101, 901, 999999]),
            fteid=chance.choice([70, 71]),
            simple_gpa=gpa,
            weighted_gpa=gpa + 0.5,
            iep=chance.choice([None, 0, 1]),
            lep=chance.choice([None, 0, 1, 2]),
            lii=chance.choice([None, 1]),
            participant=chance.choice([0, 1]),
            giftedtalentedprograms_yn=chance.choice(["Y", "N", None]),
            days=[(chance.choice([0.5, 1.0, 1.0]), 1.0) for _ in range(chance.randint(1, 9))],
        )
