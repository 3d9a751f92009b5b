"""SchooLinks: PowerSchool's rows to files to upload, on an embedded PowerSchool and real servers.

The same queries on a server that speaks Oracle's protocol: test_oracle.py.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import asyncssh
import filelock
import pytest
import sqlglot
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlglot import exp

import sgsync
from support import homes, schoolinks_server
from support.districts import (
    ATTENDANCE,
    CONDITIONS,
    CONFIG,
    EL,
    FILES,
    FIVE_TAGS,
    GFT,
    GPA,
    HEADERS,
    IEP,
    LI,
    SECTION_504,
    SECTIONS,
    TAGS,
    TODAY,
    District,
    Row,
    csv_rows,
    populate,
)
from support.powerschool import PowerSchool, Record


@pytest.fixture
def server(tmp_path: Path) -> Iterator[schoolinks_server.SchooLinks]:
    with schoolinks_server.SchooLinks(tmp_path / "server") as running:
        yield running


@pytest.fixture
def district(
    tmp_path: Path, server: schoolinks_server.SchooLinks, monkeypatch: pytest.MonkeyPatch
) -> District:
    return District(tmp_path / "home", server, monkeypatch)


@pytest.fixture
def quirky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a district whose server has these quirks."""
    running = []

    def make(quirks: type[schoolinks_server.Recording]) -> District:
        server = schoolinks_server.SchooLinks(tmp_path / "server", quirks)
        running.append(server.__enter__())
        return District(tmp_path / "home", server, monkeypatch)

    yield make
    for server in running:
        server.__exit__(None, None, None)


@pytest.fixture(scope="session")
def openssh_server() -> Iterator[schoolinks_server.OpenSsh]:
    if os.geteuid() or not shutil.which("useradd"):
        pytest.skip("only root can make a user with a password for OpenSSH's sshd")
    with schoolinks_server.OpenSsh() as running:
        yield running


@pytest.fixture(params=["asyncssh", "openssh"])
def anywhere(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> District:
    """A district in front of each server in turn."""
    if request.param == "asyncssh":
        server = request.getfixturevalue("server")
    else:
        server = request.getfixturevalue("openssh_server")
        for name in schoolinks_server.DIRECTORIES:
            for path in (server.files / name).iterdir():
                path.unlink()
    return District(tmp_path / "home", server, monkeypatch)


# ------------------------------------------------------------------ schoolinks_credentials

VARIABLES = [
    "POWERSCHOOL_READ_USER",
    "POWERSCHOOL_DB_PASSWORD",
    "POWERSCHOOL_PROD_DB",
    "SCHOOLINKS_SFTP_USERNAME",
    "SCHOOLINKS_SFTP_PASSWORD",
    "SCHOOLINKS_SFTP_ADDRESS",
]
REMEDY = (
    "Try: write them into sgsync.env beside config.xml, or set them for the account that runs "
    "sgsync"
)


def test_credentials_name_every_missing_variable_in_one_message(
    district: District, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name)
    assert district.refused(2) == (f"not set in the environment: {', '.join(VARIABLES)}\n{REMEDY}")
    assert not district.powerschool.queries


@pytest.mark.parametrize("name", VARIABLES)
def test_credentials_name_one_missing_or_empty_variable(
    district: District, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "")
    assert district.refused(2) == f"not set in the environment: {name}\n{REMEDY}"


def test_credentials_need_no_password_beside_a_private_key(
    district: District, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name)
    district.configure(attributes='privateKey="ssh/id_ed25519"')
    others = [name for name in VARIABLES if name != "SCHOOLINKS_SFTP_PASSWORD"]
    assert district.refused(2) == f"not set in the environment: {', '.join(others)}\n{REMEDY}"


def test_a_dry_run_needs_the_variables_of_powerschool_alone(
    district: District, monkeypatch: pytest.MonkeyPatch
) -> None:
    district.students(1001)
    for name in VARIABLES[3:]:
        monkeypatch.delenv(name)
    assert district.main("--dry-run") == 0, district.log
    assert csv_rows((district.run / GPA).read_bytes())[1:] == [["1001", "3.5", "4.25"]]
    missing = ", ".join(VARIABLES[3:])
    assert district.refused(2, "--test") == f"not set in the environment: {missing}\n{REMEDY}"
    for name in VARIABLES[:3]:
        monkeypatch.delenv(name)
    missing = ", ".join(VARIABLES[:3])
    assert district.refused(2, "--dry-run") == f"not set in the environment: {missing}\n{REMEDY}"


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("sftp.schoolinks.com", "sftp.schoolinks.com", 22),
        ("sftp.schoolinks.com:2222", "sftp.schoolinks.com", 2222),
        ("sftp://sftp.schoolinks.com/", "sftp.schoolinks.com", 22),
        ("10.1.2.3:22", "10.1.2.3", 22),
        ("[2001:db8::5]:2222", "2001:db8::5", 2222),
    ],
)
def test_credentials_take_an_address_with_and_without_port(
    district: District, monkeypatch: pytest.MonkeyPatch, address: str, host: str, port: int
) -> None:
    monkeypatch.setenv("SCHOOLINKS_SFTP_ADDRESS", address)
    settings = sgsync.load_config(district.path / "config.xml", sgsync.SchooLinksConfig).schoolinks
    login, sftp = sgsync.schoolinks_credentials(settings, district.path, upload=True)
    assert (sftp.host, sftp.port) == (host, port)
    assert (sftp.username, sftp.password) == (district.server.username, district.server.password)
    assert (login.user, login.dsn) == ("psnavigator", "ps.example.org:1521/PSPRODDB")
    assert login.password == district.database_password
    shown = repr(login) + repr(sftp)
    assert district.database_password not in shown
    assert district.server.password not in shown


@pytest.mark.parametrize(
    "address",
    ["host:port", "host:0", "host:70000", "user:Secret77@host", "Secret77@host", "host/automated",
     "two words", "a:b:c", "sftp://"],
)  # fmt: skip
def test_credentials_refuse_what_is_no_address_and_do_not_show_it(
    district: District, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("SCHOOLINKS_SFTP_ADDRESS", address)
    assert district.refused(2) == (
        "SCHOOLINKS_SFTP_ADDRESS is not an address\nTry: set it to the host, or host:port, alone"
    )


def test_schoolinks_writes_no_password_anywhere(
    district: District, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    district.students(1001)
    sftp_password = district.server.password
    assert district.main("--verbose", "--json") == 0

    def refuse(sql: str) -> None:
        raise sgsync.DatabaseError(f"ORA-99999: odd driver: {district.database_password}")

    district.powerschool.fail = refuse
    assert district.main("--verbose") == 4
    assert "odd driver: ***" in district.log
    district.powerschool.fail = lambda _: None
    monkeypatch.setenv("SCHOOLINKS_SFTP_PASSWORD", "Wrong&Password1")
    assert district.main("--verbose", "--json") == 3
    printed = capfd.readouterr()
    files = [p for p in (district.path / "history").rglob("*") if p.is_file()]
    everything = printed.out + printed.err + "".join(p.read_text("utf-8") for p in files)
    for password in (district.database_password, sftp_password, "Wrong&Password1"):
        assert password not in everything
    assert [login.password for login in district.powerschool.logins] == [
        district.database_password
    ] * 3


# ------------------------------------------------------------------ <SchooLinks> in config.xml


def written(path: Path, text: str) -> Path:
    file = path / "config.xml"
    file.write_text(f"<Config>{text}</Config>", encoding="utf-8")
    return file


def load(path: Path, text: str) -> sgsync.SchooLinksConfig:
    return sgsync.load_config(written(path, text), sgsync.SchooLinksConfig)


def test_load_config_schoolinks_defaults(tmp_path: Path) -> None:
    found = load(tmp_path, f"<SchooLinks><Attendance/><GPA/><Tags>{FIVE_TAGS}</Tags></SchooLinks>")
    s = found.schoolinks
    assert (s.directory, s.test_directory) == ("/automated", "/other")
    assert (s.ignored_school, s.grades, s.school_year_start) == (901, (8, 9, 10, 11, 12), (7, 1))
    assert (str(s.max_shrink), s.quoting, s.private_key) == ("10%", "all", "")
    assert (s.thick_mode, s.client_directory, str(s.max_change)) == (False, None, "50%")
    assert (s.identifier, s.identifier_column) == ("student_number", "student_number")
    assert s.attendance == sgsync.AttendanceSettings(
        enabled=True, file=ATTENDANCE, scale="fraction", view="ps_adaadm_daily_ctod"
    )
    assert s.gpa == sgsync.GpaSettings(
        enabled=True, file=GPA, table="u_def_ext_students0", unweighted="simple_gpa",
        weighted="weighted_gpa",
    )  # fmt: skip
    assert (s.tags.enabled, s.tags.file) == (True, TAGS)
    assert [
        ([t.name, t.detailed_name, t.description], t.table, t.column, t.equals) for t in s.tags.tags
    ] == [(words, table, column, str(value)) for words, table, column, value in CONDITIONS]
    assert found.history.keep_runs == 365


@pytest.mark.parametrize(
    ("attributes", "identifier", "column"),
    [
        ('identifier="student_number"', "student_number", "student_number"),
        ('identifier="student_sis_id"', "student_sis_id", "id"),
        ('identifier="student_state_id"', "student_state_id", "state_studentnumber"),
        ('identifier="student_sis_id" identifierColumn="dcid"', "student_sis_id", "dcid"),
        ('identifierColumn=""', "student_number", "student_number"),
    ],
)
def test_load_config_takes_the_identifier_s_usual_column(
    tmp_path: Path, attributes: str, identifier: str, column: str
) -> None:
    s = load(tmp_path, f"<SchooLinks {attributes}><GPA/></SchooLinks>").schoolinks
    assert (s.identifier, s.identifier_column) == (identifier, column)


def test_load_config_takes_another_view_and_another_limit_of_changes(tmp_path: Path) -> None:
    text = '<SchooLinks maxChange="100"><Attendance view="ps.PS_ADAADM_DEFAULTS_ALL"/></SchooLinks>'
    s = load(tmp_path, text).schoolinks
    assert (s.attendance.view, str(s.max_change)) == ("ps.PS_ADAADM_DEFAULTS_ALL", "100")


def test_load_config_a_section_that_is_missing_or_disabled_is_off(district: District) -> None:
    district.students(1001)
    district.configure(attendance="", tags='<Tags enabled="false"/>')
    assert list(district.sections()) == [GPA]
    district.configure(attendance="<Attendance/>", gpa='<GPA enabled="false"/>')
    assert list(district.sections()) == [ATTENDANCE]
    assert district.main() == 0
    assert list(district.sent()) == [ATTENDANCE]
    assert not (district.run / GPA).exists()


VIEW = "ps_adaadm_daily_ctod"
TAG = '<Tag name="A" detailedName="B" description="C" table="t" column="c" equals="1"/>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            "<Config>: has no <SchooLinks> element\n"
            "Try: copy <SchooLinks> from the config.xml that came with sgsync",
        ),
        (
            "<SchooLinks/>",
            "<SchooLinks>: has no enabled section\n"
            "Try: add or enable <Attendance>, <GPA> or <Tags>",
        ),
        (
            '<SchooLinks><GPA table="students; DROP TABLE students"/></SchooLinks>',
            "<GPA table>: 'students; DROP TABLE students' is not a valid table name\n"
            "Try: correct the value",
        ),
        (
            '<SchooLinks><GPA unweighted="1 gpa"/></SchooLinks>',
            "<GPA unweighted>: '1 gpa' is not a valid column name\nTry: correct the value",
        ),
        (
            '<SchooLinks><GPA unweighted="" weighted=""/></SchooLinks>',
            "<GPA>: names no column\nTry: set unweighted= or weighted=",
        ),
        (
            "<SchooLinks><Tags/></SchooLinks>",
            '<Tags>: has no <Tag>\nTry: add one, or set enabled="false"',
        ),
        (
            "<SchooLinks><Tags>" + TAG.replace(' equals="1"', "") + "</Tags></SchooLinks>",
            '<Tag>: has no attribute equals\nTry: add equals="..."',
        ),
        (
            "<SchooLinks><Tags>" + TAG.replace('"c"', '"c) OR (1=1"') + "</Tags></SchooLinks>",
            "<Tag column>: 'c) OR (1=1' is not a valid column name\nTry: correct the value",
        ),
        (
            '<SchooLinks grades="8;9"><GPA/></SchooLinks>',
            "<SchooLinks grades>: '8;9' is not a list of grades such as 8,9,10,11,12\n"
            "Try: correct the value",
        ),
        (
            '<SchooLinks ignoredSchool="none"><GPA/></SchooLinks>',
            "<SchooLinks ignoredSchool>: 'none' is not a whole number from 0 to 999999999\n"
            "Try: correct the value",
        ),
        (
            '<SchooLinks schoolYearStart="02-29"><GPA/></SchooLinks>',
            "<SchooLinks schoolYearStart>: '02-29' is not a month and a day such as 07-01\n"
            "Try: correct the value",
        ),
        (
            '<SchooLinks quoting="none"><GPA/></SchooLinks>',
            "<SchooLinks quoting>: 'none' is not one of all, minimal\nTry: correct the value",
        ),
        (
            '<SchooLinks identifier="sis_id"><GPA/></SchooLinks>',
            "<SchooLinks identifier>: 'sis_id' is not one of student_number, student_sis_id, "
            "student_state_id\nTry: correct the value",
        ),
        (
            '<SchooLinks identifierColumn="id, dcid"><GPA/></SchooLinks>',
            "<SchooLinks identifierColumn>: 'id, dcid' is not a valid column name\n"
            "Try: correct the value",
        ),
        (
            '<SchooLinks maxChange="half"><GPA/></SchooLinks>',
            "<SchooLinks maxChange>: 'half' is neither a number of rows (25) nor a percentage from "
            "0% to 100%\nTry: correct the value",
        ),
        (
            '<SchooLinks><Attendance view="x y"/></SchooLinks>',
            "<Attendance view>: 'x y' is not a valid table name\nTry: correct the value",
        ),
        (
            '<SchooLinks><Attendance scale="percentage"/></SchooLinks>',
            "<Attendance scale>: 'percentage' is not one of fraction, percent\n"
            "Try: correct the value",
        ),
        (
            '<SchooLinks><Attendance view="ps_x a WHERE 1=1"/></SchooLinks>',
            "<Attendance view>: 'ps_x a WHERE 1=1' is not a valid table name\n"
            "Try: correct the value",
        ),
        (
            '<SchooLinks identifierColumn="s.id"><GPA/></SchooLinks>',
            "<SchooLinks identifierColumn>: 's.id' is not a valid column name\n"
            "Try: correct the value",
        ),
        (
            '<SchooLinks directory="automated"><GPA/></SchooLinks>',
            "<SchooLinks directory>: 'automated' is not an absolute path on the server, such as "
            "/upload\nTry: correct the value",
        ),
        (
            '<SchooLinks><Attendance file="a.csv"/><GPA file="A.csv"/></SchooLinks>',
            "<GPA file>: 'A.csv' is already in use\nTry: choose another name",
        ),
        (
            '<SchooLinks><GPA file="../gpa.csv"/></SchooLinks>',
            "<GPA file>: '../gpa.csv' is not a plain file name that ends in .csv (contains a path "
            'or one of \\ / : * ? " < > |)\nTry: correct the value',
        ),
        (
            '<SchooLinks><Gpa/></SchooLinks>',
            "<Gpa>: unknown element in <SchooLinks>\nTry: write GPA",
        ),
        (
            '<SchooLinks maxshrink="5%"><GPA/></SchooLinks>',
            "<SchooLinks maxshrink>: unknown attribute\nTry: write maxShrink",
        ),
        (
            '<SchooLinks directory="TODO(user)"><GPA/></SchooLinks>',
            "<SchooLinks directory>: still contains TODO(user)\n"
            "Try: replace it with your own value",
        ),
    ],
)  # fmt: skip
def test_load_config_refuses_schoolinks(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(sgsync.ConfigError) as caught:
        load(tmp_path, text)
    assert str(caught.value) == f"config.xml:1: {message}"


SAMEGOAL = """
  <SFTP host="TODO(user)" username="TODO(user)"/>
  <Database connectionString="Server=TODO(user);PWD=${env:SGSYNC_NO_SUCH_VARIABLE}"/>
  <Limits/>
  <Download><SQLDiff file="a.csv"><Query>SELECT TODO(user)</Query></SQLDiff></Download>
  <Upload><SQL>UPDATE TODO(user)</SQL></Upload>"""


@pytest.mark.parametrize(
    "before", [SAMEGOAL, "", "<SFTP/><Database/><Download/><Upload/>"],
    ids=["unfilled", "deleted", "emptied"],
)  # fmt: skip
def test_schoolinks_runs_where_the_samegoal_part_was_never_filled_in(
    district: District, before: str
) -> None:
    district.students(1001)
    district.configure(before=before)
    assert district.main() == 0, district.log
    assert list(district.sent()) == list(FILES)


@pytest.mark.parametrize(
    "schoolinks",
    [
        "",
        "<SchooLinks/>",
        '<SchooLinks directory="TODO(user)" passphrase="${env:SGSYNC_NO_SUCH_VARIABLE}"><GPA '
        'table="TODO(user)"/><Tags><Tag name="TODO(user)"/></Tags></SchooLinks>',
    ],
    ids=["deleted", "emptied", "unfilled"],
)
def test_load_config_for_sync_where_the_schoolinks_part_was_never_filled_in(
    tmp_path: Path, schoolinks: str
) -> None:
    samegoal = re.sub(r"TODO\(user\)|\$\{.*?\}", "x", SAMEGOAL)
    found = sgsync.load_config(written(tmp_path, samegoal + schoolinks), sgsync.SyncConfig)
    assert [diff.file for diff in found.sql_diffs] == ["a.csv"]


def test_the_config_that_comes_with_sgsync_has_the_defaults(tmp_path: Path) -> None:
    shipped = Path(sgsync.__file__).with_name("config.xml")
    found = sgsync.load_config(shipped, sgsync.SchooLinksConfig).schoolinks
    sections = f"<SchooLinks><Attendance/><GPA/><Tags>{FIVE_TAGS}</Tags></SchooLinks>"
    assert found == load(tmp_path, sections).schoolinks


# ------------------------------------------------------------------ student_query, attendance_query

CONFIGURATIONS = {
    "defaults": ("", SECTIONS),
    "attendance": ("", {"attendance": "<Attendance/>"}),
    "gpa": ('ignoredSchool=""', {"gpa": '<GPA table="ps.U_Other" weighted=""/>'}),
    "tags": ('grades="-1"', {"tags": f"<Tags>{FIVE_TAGS}</Tags>"}),
    "students": ("", {"gpa": '<GPA table="STUDENTS" unweighted="gpa" weighted="gpa2"/>'}),
}


def queries(path: Path, name: str) -> dict[str, tuple[str, dict[str, object]]]:
    attributes, sections = CONFIGURATIONS[name]
    text = f"<SchooLinks {attributes}>{''.join(sections.values())}</SchooLinks>"
    settings = load(path, text).schoolinks
    files = sgsync.StudentFiles(settings, TODAY)
    return {"students": files.student_query(), "attendance": files.attendance_query()}


# What Oracle 12.1 takes from among what sqlglot knows, as far as these queries need it.
ORACLE_12 = (
    exp.Select, exp.From, exp.Join, exp.Where, exp.Group, exp.Order, exp.Ordered, exp.Table,
    exp.TableAlias, exp.Column, exp.Identifier, exp.Alias, exp.Sum, exp.Case, exp.If, exp.Is,
    exp.Not, exp.Null, exp.And, exp.EQ, exp.NEQ, exp.GTE, exp.LTE, exp.In, exp.Placeholder,
    exp.Literal, exp.Paren, exp.Count, exp.Distinct, exp.Star, exp.Sub,
)  # fmt: skip


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_queries_are_what_oracle_12_1_accepts(tmp_path: Path, name: str) -> None:
    for sql, binds in queries(tmp_path, name).values():
        trees = sqlglot.parse(sql, dialect="oracle", error_level=sqlglot.ErrorLevel.RAISE)
        assert len(trees) == 1
        tree = trees[0]
        assert isinstance(tree, exp.Select)
        assert {type(node) for node in tree.walk()} <= set(ORACLE_12)
        for limit in ("limit", "offset", "fetch", "windows", "qualify"):
            assert not tree.args.get(limit)
        # Oracle takes no AS before the alias of a table, and reads values from binds alone.
        assert not re.search(r"(?i)\bAS\b|;|'", sql)
        marks = {node.name for node in tree.find_all(exp.Placeholder)}
        assert marks == set(binds)
        assert all(len(node.name) <= 30 for node in tree.find_all(exp.Identifier))
        literals = {node.name for node in tree.find_all(exp.Literal)}
        assert literals <= {"0", "1"}
        for node in tree.find_all(exp.Where, exp.Group):
            aliases = {alias.alias for alias in tree.expressions}
            assert not aliases & {column.name for column in node.find_all(exp.Column)}


def test_student_query_with_the_defaults(tmp_path: Path) -> None:
    sql, binds = queries(tmp_path, "defaults")["students"]
    assert sql == (
        "SELECT s.student_number, t1.simple_gpa c0, t1.weighted_gpa c1, t2.iep c2, "
        "t3.participant c3, t2.lep c4, t2.lii c5, t4.giftedtalentedprograms_yn c6\n"
        "FROM students s\n"
        "LEFT JOIN u_def_ext_students0 t1 ON t1.studentsdcid = s.dcid\n"
        "LEFT JOIN s_il_stu_x t2 ON t2.studentsdcid = s.dcid\n"
        "LEFT JOIN s_il_stu_plan504_x t3 ON t3.studentsdcid = s.dcid\n"
        "LEFT JOIN s_stu_crdc_x t4 ON t4.studentsdcid = s.dcid\n"
        "WHERE s.enroll_status = 0 AND s.grade_level IN (:grade0, :grade1, :grade2, :grade3, "
        ":grade4) AND s.schoolid <> :school\n"
        "ORDER BY s.student_number DESC"
    )
    grades = {f"grade{number}": 8 + number for number in range(5)}
    assert binds == grades | {"school": 901}


def test_student_query_joins_no_table_that_no_section_needs(tmp_path: Path) -> None:
    assert "JOIN" not in queries(tmp_path, "attendance")["students"][0]
    assert "JOIN" not in queries(tmp_path, "students")["students"][0]
    assert (
        "SELECT s.student_number, s.gpa c0, s.gpa2 c1\n"
        in (queries(tmp_path, "students")["students"][0])
    )
    sql, binds = queries(tmp_path, "gpa")["students"]
    assert "SELECT s.student_number, t1.simple_gpa c0, NULL c1\n" in sql
    assert "LEFT JOIN ps.u_other t1 ON t1.studentsdcid = s.dcid\n" in sql
    assert "schoolid" not in sql
    assert "school" not in binds


@pytest.mark.parametrize(
    ("start", "today", "first"),
    [
        ("07-01", (2026, 2, 16), (2025, 7, 1)),
        ("07-01", (2026, 6, 30), (2025, 7, 1)),
        ("07-01", (2026, 7, 1), (2026, 7, 1)),
        ("08-15", (2024, 2, 29), (2023, 8, 15)),
        ("01-01", (2026, 12, 31), (2026, 1, 1)),
    ],
)
def test_attendance_query_reads_one_school_year(
    tmp_path: Path, start: str, today: tuple[int, int, int], first: tuple[int, int, int]
) -> None:
    text = f'<SchooLinks schoolYearStart="{start}"><Attendance/></SchooLinks>'
    settings = load(tmp_path, text).schoolinks
    binds = sgsync.StudentFiles(settings, datetime.date(*today)).attendance_query().binds
    assert binds["year_start"] == datetime.datetime(*first)
    assert binds["today"] == datetime.datetime(*today)


def test_build_asks_two_queries_however_many_students(district: District) -> None:
    for number in range(1, 301):
        district.students(number)
    sections = district.sections()
    assert [len(section.rows) for section in sections.values()] == [300, 300, 300]
    assert len(district.powerschool.queries) == 2
    assert district.powerschool.round_trips == 2
    district.configure(attendance="")
    district.sections()
    assert len(district.powerschool.queries) == 3


# ------------------------------------------------------------------ the three files


def test_schoolinks_writes_the_three_files(district: District) -> None:
    district.student(1001, days=[(1.0, 1.0)] * 17 + [(0.0, 1.0)], simple_gpa=3.25, iep=1, lii=1)
    district.student(
        1004, days=[(0.5, 1.0), (1.0, 1.0)], simple_gpa=3.5, weighted_gpa=4.125, participant=1,
        giftedtalentedprograms_yn="Y", iep=0, lep=1,
    )  # fmt: skip
    district.student(1002, days=[(1, 1)], simple_gpa=4.0, weighted_gpa=4.0, iep=2)
    assert district.main() == 0
    expected = {
        ATTENDANCE: '"student_number","attendance_percentage"\r\n'
        '"1004","0.75"\r\n'
        '"1002","1.0"\r\n'
        '"1001","0.9444444444444444"\r\n',
        GPA: '"student_number","numerator_unweighted","numerator_weighted"\r\n'
        '"1004","3.5","4.125"\r\n'
        '"1002","4.0","4.0"\r\n'
        '"1001","3.25",""\r\n',
        TAGS: '"student_number","name","detailed_name","description"\r\n'
        '"1004","504","Section 504","Student with 504 Accomodation"\r\n'
        '"1004","EL","English Learner","Low English Proficiency Learner"\r\n'
        '"1004","GFT","Gifted & Talented","Student in Gifted or Talented Program"\r\n'
        '"1001","IEP","Individualized Education Plan","Student with IDEA Services"\r\n'
        '"1001","LI","Low Income","Low Income/Economically Disadvantaged Family"\r\n',
    }
    for file, text in expected.items():
        assert (district.run / file).read_bytes() == text.encode("ascii")
    assert district.sent() == {file: text.encode("ascii") for file, text in expected.items()}


def public_script(powerschool: PowerSchool, today: datetime.date) -> dict[str, str]:
    """The text that the public script writes: student by student, with its faults.

    Source: the description of the public SchooLinks script. Two queries for each student; who has
    not both GPAs, or a sum of zero, is dropped; nothing is quoted.
    """
    lines = {file: [",".join(header)] for file, header in HEADERS.items()}
    students = powerschool.execute(
        "SELECT student_number, id, dcid, fteid FROM students WHERE enroll_status = 0 "
        "AND grade_level IN (8, 9, 10, 11, 12) AND NOT schoolid = 901 ORDER BY student_number DESC"
    )
    for number, identity, dcid, fteid in students:
        sums = [
            powerschool.execute(
                f"SELECT SUM({column}) FROM ps_adaadm_daily_ctod WHERE fteid = {fteid} "
                f"AND studentid = {identity} AND calendardate <= :today", {"today": today},
            )[0][0]
            for column in ("attendancevalue", "membershipvalue")
        ]  # fmt: skip
        if all(sums):
            lines[ATTENDANCE].append(f"{number},{sums[0] / sums[1]}")
        for table, columns in {
            "u_def_ext_students0": "simple_gpa, weighted_gpa",
        }.items():
            for gpas in powerschool.execute(
                f"SELECT {columns} FROM {table} WHERE studentsdcid = {dcid}"
            ):
                if all(gpas):
                    lines[GPA].append(f"{number},{gpas[0]},{gpas[1]}")
        for words, table, column, value in CONDITIONS:
            found = powerschool.execute(f"SELECT {column} FROM {table} WHERE studentsdcid = {dcid}")
            if found and found[0][0] == value:
                lines[TAGS].append(f"{number},{','.join(words)}")
    return {file: "".join(line + "\n" for line in found) for file, found in lines.items()}


def test_schoolinks_writes_what_the_public_script_would_apart_from_its_faults(
    district: District,
) -> None:
    populate(district, 200, 7)
    expected = public_script(district.powerschool, TODAY)
    assert district.main() == 0
    for file, text in expected.items():
        assert csv_rows(district.sent()[file]) == csv_rows(text.encode())
        assert len(text.splitlines()) > 20
    district.configure(attributes='quoting="minimal"')
    assert district.main() == 0
    for file, text in expected.items():
        assert district.sent()[file].decode() == text.replace("\n", "\r\n")


def test_gpa_keeps_one_of_two_and_zero(district: District) -> None:
    district.student(1006, simple_gpa=3.5, weighted_gpa=None)
    district.student(1005, simple_gpa=None, weighted_gpa=4.5)
    district.student(1004, simple_gpa=0.0, weighted_gpa=0.0)
    district.student(1003, simple_gpa=0, weighted_gpa=None)
    district.student(1002, simple_gpa=None, weighted_gpa=None)
    district.student(1001)
    assert district.rows(GPA) == [
        ["1006", "3.5", ""],
        ["1005", "", "4.5"],
        ["1004", "0.0", "0.0"],
        ["1003", "0.0", ""],
    ]
    assert district.without(GPA) == {"no GPA": ["1002", "1001"]}
    assert public_script(district.powerschool, TODAY)[GPA].splitlines()[1:] == []


def test_gpa_of_one_kind_leaves_the_other_column_blank(district: District) -> None:
    district.student(1001, simple_gpa=3.5, weighted_gpa=4.5)
    district.configure(gpa='<GPA unweighted=""/>')
    assert district.rows(GPA) == [["1001", "", "4.5"]]
    district.configure(gpa='<GPA weighted="" file="other.csv"/>')
    assert district.rows("other.csv") == [["1001", "3.5", ""]]


def test_attendance_keeps_zero_days_present(district: District) -> None:
    district.student(1001, days=[(0.0, 1.0), (0, 1.0)])
    assert district.rows(ATTENDANCE) == [["1001", "0.0"]]
    assert public_script(district.powerschool, TODAY)[ATTENDANCE].splitlines()[1:] == []


def test_attendance_counts_a_day_with_a_null_on_neither_side(district: District) -> None:
    district.student(1001, days=[(1.0, 1.0), (None, 1.0), (1.0, None), (0.0, 1.0)])
    assert district.rows(ATTENDANCE) == [["1001", "0.5"]]
    section = district.sections()[ATTENDANCE]
    assert section.null_days == 2
    understated = public_script(district.powerschool, TODAY)[ATTENDANCE]
    assert understated.splitlines()[1:] == ["1001,0.6666666666666666"]


def test_attendance_tells_why_a_student_has_none(district: District) -> None:
    district.student(1001)
    district.student(1002, days=[(None, 1.0), (None, None)])
    district.student(1003, days=[(0.0, 0.0)])
    district.student(1004, days=[(0.0, 0.0), (None, 1.0)])
    section = district.sections()[ATTENDANCE]
    assert section.rows == []
    assert section.without == {
        "no membership days": ["1004", "1003", "1001"],
        "only NULL days": ["1002"],
    }
    assert section.null_days == 3


def test_attendance_counts_this_school_year_up_to_today_under_the_fteid(district: District) -> None:
    district.student(1001, days=[(1.0, 1.0)])
    for date in ((2025, 6, 30), (2026, 2, 17), (2027, 1, 1)):  # before and after
        district.day(1001, datetime.date(*date), 0.0)
    district.day(1001, datetime.date(2025, 7, 1), 0.0)  # the first day counts
    district.day(1001, datetime.date(2026, 1, 5), 0.0, 1.0, fteid=71)
    district.day(1002, datetime.date(2026, 1, 5), 0.0)
    assert district.rows(ATTENDANCE) == [["1001", "0.5"]]
    district.configure(attributes='schoolYearStart="06-30"')
    assert district.rows(ATTENDANCE) == [["1001", "0.3333333333333333"]]


DEFAULTS = "ps_adaadm_defaults_all"


def test_attendance_comes_from_the_view_of_the_configuration(district: District) -> None:
    district.student(1001, days=[(1.0, 1.0)])
    district.day(1001, TODAY, 0.25, view=DEFAULTS)
    assert district.rows(ATTENDANCE) == [["1001", "1.0"]]
    district.configure(attendance='<Attendance view="PS_AdaAdm_Defaults_All"/>')
    assert district.rows(ATTENDANCE) == [["1001", "0.25"]]
    assert "JOIN PS_AdaAdm_Defaults_All a ON" in district.powerschool.queries[-1]


@pytest.mark.parametrize(("view", "other"), [(VIEW, DEFAULTS), (DEFAULTS, VIEW)])
def test_a_view_with_a_day_twice_stops_everything(
    district: District, view: str, other: str
) -> None:
    district.configure(attendance=f'<Attendance view="{view}"/>')
    district.students(1001, 1002, 1003)
    yesterday = TODAY - datetime.timedelta(1)
    for number, day, present in [
        (1001, TODAY, 1.0), (1002, TODAY, 1.0), (1002, TODAY, 1.0), (1002, yesterday, None),
        (1002, yesterday, 1.0), (1003, TODAY, 1.0), (1003, TODAY, 0.5),
    ]:  # fmt: skip
        district.day(number, day, present, view=view)
    if view == VIEW:
        district.powerschool.execute("DELETE FROM ps_adaadm_daily_ctod WHERE rowid <= 3")
    assert district.refused(5) == (
        f"PowerSchool: {view} has more than one row for 3 student-days, for example for student "
        "1003\n"
        "Try: set view= on <Attendance> to a view with one row per student and day, such as "
        f"{other}"
    )
    assert len(district.powerschool.queries) == 2


def test_a_day_doubled_for_students_who_are_not_sent_stops_nothing(district: District) -> None:
    district.students(1001)
    for number, more in ((1002, {"schoolid": 901}), (1003, {"grade_level": 3})):
        district.students(number, **more)
        district.day(number, TODAY)
    district.student(None, id=7)
    district.day(7, TODAY)
    district.day(7, TODAY)
    district.day(1001, datetime.date(2025, 6, 30))  # of last year
    district.day(1001, datetime.date(2025, 6, 30))
    assert district.rows(ATTENDANCE) == [["1001", "1.0"]]


def test_a_view_of_the_wrong_mode_uploads_no_empty_file(district: District) -> None:
    district.students(1001, 1002)
    assert district.main() == 0
    district.configure(attendance=f'<Attendance view="{DEFAULTS}"/>')
    assert district.refused(6).splitlines()[0] == (
        "nothing was uploaded: attendance_percentage.csv: has no rows "
        "(ps_adaadm_defaults_all has no membership days since 2025-07-01 for 2 students; view= on "
        "<Attendance> may be for another attendance mode): 2 students would lose their attendance"
    )


@pytest.mark.parametrize(
    ("present", "member", "fraction", "percent"),
    [
        (29, 100, "0.29", "29.0"),
        (7, 100, "0.07", "7.0"),
        (1, 3, "0.3333333333333333", "33.333333333333336"),
        (180, 180, "1.0", "100.0"),
        (0, 180, "0.0", "0.0"),
        (1, 65536, "0.0000152587890625", "0.00152587890625"),
    ],
)
def test_attendance_scale(
    district: District, present: int, member: int, fraction: str, percent: str
) -> None:
    district.student(1001, days=[(float(present), float(member))])
    assert district.rows(ATTENDANCE) == [["1001", fraction]]
    district.configure(attendance='<Attendance scale="percent"/>')
    assert district.rows(ATTENDANCE) == [["1001", percent]]


def test_tags_are_quoted_and_utf_8(district: District) -> None:
    district.student(1001, iep=1)
    tag = (
        '<Tag name="IEP, &quot;A&quot;" detailedName="Educación" description="a&#10;b" '
        'table="s_il_stu_x" column="iep" equals="1"/>'
    )
    for quoting, line in {
        "all": '"1001","IEP, ""A""","Educación","a\nb"\r\n',
        "minimal": '1001,"IEP, ""A""",Educación,"a\nb"\r\n',
    }.items():
        district.configure(
            attributes=f'quoting="{quoting}"', attendance="", gpa="", tags=f"<Tags>{tag}</Tags>"
        )
        assert district.main() == 0
        text = district.sent()[TAGS].decode("utf-8")
        assert text.partition("\r\n")[2] == line
        assert csv_rows(district.sent()[TAGS])[1] == ["1001", 'IEP, "A"', "Educación", "a\nb"]


def test_tags_of_one_name_are_one_tag(district: District) -> None:
    district.student(1001, iep=1, lep=1)
    district.student(1002, lep=1)
    district.student(1003, lii=1)
    tags = "".join(
        f'<Tag name="SVC" detailedName="{column}" description="d" table="s_il_stu_x" '
        f'column="{column}" equals="1"/>'
        for column in ("iep", "lep")
    )
    district.configure(tags=f"<Tags>{tags}</Tags>")
    assert district.rows(TAGS) == [["1002", "SVC", "lep", "d"], ["1001", "SVC", "iep", "d"]]


@pytest.mark.parametrize(
    ("value", "wanted", "same"),
    [
        (1, "1", True),
        (1.0, "1", True),
        ("1", "1.0", True),
        ("01", "1", True),
        (0, "1", False),
        (None, "0", False),
        ("", "0", False),
        ("Y", "Y", True),
        ("Y  ", "Y", True),
        ("y", "Y", False),
        ("NaN", "NaN", True),
        ("sNaN", "sNaN", True),
        (True, "1", True),
    ],
)
def test_same_value(value: object, wanted: str, same: bool) -> None:
    assert sgsync.same_value(value, wanted) is same


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4, "4"),
        (4.0, "4.0"),
        (3.975, "3.975"),
        (0.1 + 0.2, "0.30000000000000004"),
        (1e-07, "0.0000001"),
        ("3.50 ", "3.50"),
        (None, ""),
    ],
)
def test_number_text(value: object, text: str) -> None:
    assert sgsync.number_text(value) == text


@pytest.mark.parametrize("grade", [-2, -1, 0, 7, 13, 99])
def test_students_of_other_grades_are_left_out_unless_named(district: District, grade: int) -> None:
    district.students(1001, grade_level=grade)
    district.students(1002)
    district.students(1003, grade_level=None)
    assert [row[0] for row in district.rows(GPA)] == ["1002"]
    district.configure(attributes=f'grades=" {grade}, 9"')
    assert [row[0] for row in district.rows(GPA)] == ["1002", "1001"]


def test_students_who_are_not_active_or_of_the_ignored_school_are_left_out(
    district: District,
) -> None:
    district.students(1001, schoolid=901)
    district.students(1002, schoolid=902)
    district.students(1003, enroll_status=-1)
    district.students(1004, enroll_status=2)

    def found() -> list[list[str]]:
        return [[row[0] for row in s.rows] for s in district.sections().values()]

    assert found() == [["1002"]] * 3
    district.configure(attributes='ignoredSchool=""')
    assert found() == [["1002", "1001"]] * 3
    district.configure(attributes='ignoredSchool="902"')
    assert found() == [["1001"]] * 3


def test_gpa_from_another_table(district: District) -> None:
    district.powerschool.execute("CREATE TABLE u_gpa (studentsdcid, cum VARCHAR2(9))")
    district.powerschool.execute("INSERT INTO u_gpa VALUES (11001, '3.90 '), (11002, '  ')")
    district.student(1001)
    district.student(1002)
    district.configure(gpa='<GPA table="U_GPA" unweighted="CUM" weighted=""/>')
    assert district.rows(GPA) == [["1001", "3.90", ""]]
    assert district.without(GPA) == {"no GPA": ["1002"]}


def test_a_student_number_of_a_float_column_is_a_whole_number(district: District) -> None:
    district.powerschool.execute("DROP TABLE students")
    columns = (
        "id, dcid, fteid, enroll_status, grade_level, schoolid, lastfirst, state_studentnumber"
    )
    district.powerschool.execute(f"CREATE TABLE students (student_number FLOAT, {columns})")
    district.students(1001, 1002)
    assert district.rows(ATTENDANCE) == [["1002", "1.0"], ["1001", "1.0"]]
    assert district.rows(GPA)[0][0] == district.rows(TAGS)[0][0] == "1002"


def test_a_student_who_appears_twice_stops_everything(district: District) -> None:
    district.students(1001, 1002, 1003)
    district.powerschool.insert("s_il_stu_x", [{"studentsdcid": 11002, "iep": 0}])
    assert district.refused(5) == (
        "PowerSchool: student 1002 appears more than once: a table of <GPA> or <Tag> has several "
        "rows for one student, or two students have the same student_number\n"
        "Try: name a table with one row per student (its key is studentsdcid), or correct the "
        "student_number in PowerSchool"
    )


def test_a_student_without_a_number_is_left_out_and_told(district: District) -> None:
    district.students(1001)
    district.student(None, simple_gpa=2.5, weighted_gpa=2.5)
    district.student(None, dcid=5, id=6)
    assert district.main() == 0
    assert [row[0] for row in csv_rows(district.sent()[GPA])[1:]] == ["1001"]
    assert (
        " WARNING PowerSchool: 2 students left out: no student_number (students.student_number is "
        "empty)\n" in district.log
    )
    assert "gpa.csv: 2 students left out (no student_number)\n" in district.log
    for line in district.summary["files"]:
        assert line["without"]["no student_number"] == 2


@pytest.mark.parametrize(
    ("attributes", "column", "identifiers"),
    [
        ('identifier="student_number"', "student_number", ["1002", "1001"]),
        ('identifier="student_sis_id"', "id", ["8", "7"]),
        ('identifier="student_state_id"', "state_studentnumber", ["IL-2", "09"]),
        ('identifier="student_sis_id" identifierColumn="DCID"', "DCID", ["52", "51"]),
    ],
)
def test_identifier_heads_and_orders_all_three_files(
    district: District, attributes: str, column: str, identifiers: list[str]
) -> None:
    district.students(1001, id=7, dcid=51, state_studentnumber=" 09 ", days=[])
    district.students(1002, id=8, dcid=52, state_studentnumber="IL-2", days=[])
    for table in ("u_def_ext_students0", "s_il_stu_x"):
        for number, dcid in ((1001, 51), (1002, 52)):
            district.powerschool.execute(
                f"UPDATE {table} SET studentsdcid = {dcid} WHERE studentsdcid = {10_000 + number}"
            )
    for identity in (7, 8):
        district.day(identity, TODAY)
    district.configure(attributes=attributes)
    name = attributes.split('"')[1]
    assert district.main() == 0, district.log
    for file, data in district.sent().items():
        header, *rows = csv_rows(data)
        assert header == [name, *HEADERS[file][1:]]
        assert [row[0] for row in rows] == identifiers
        assert len(rows[0]) == len(header)
    assert all(f"SELECT s.{column}" in sql for sql in district.powerschool.queries)


def test_a_student_without_the_identifier_is_counted_in_each_file_and_warned_of(
    district: District,
) -> None:
    district.configure(attributes='identifier="student_state_id"')
    district.students(1001, state_studentnumber="A1")
    district.students(1002, state_studentnumber=None)
    district.students(1003, state_studentnumber="  ")
    assert district.main() == 0
    for file, data in district.sent().items():
        assert [row[0] for row in csv_rows(data)[1:]] == ["A1"], file
    assert (
        " WARNING PowerSchool: 2 students left out: no student_state_id "
        "(students.state_studentnumber is empty)\n" in district.log
    )
    assert [line["without"] for line in district.summary["sections"]] == [
        {"no student_state_id": 2}
    ] * 3


def test_two_students_with_the_same_identifier_stop_everything(district: District) -> None:
    district.configure(attributes='identifier="student_state_id"')
    district.students(1001, state_studentnumber="A1\n2026 forged")
    district.students(1002, state_studentnumber=" A1\n2026 forged")
    message = district.refused(5)
    assert message.startswith("PowerSchool: student A1 2026 forged appears more than once: ")
    assert message.endswith("or correct the student_state_id in PowerSchool")


def test_a_missing_identifier_column_is_named(district: District) -> None:
    district.configure(attributes='identifier="student_state_id" identifierColumn="no_such"')
    district.students(1001)
    assert district.refused(4).startswith("PowerSchool: the query of students, ")


# ------------------------------------------------------------------ sets against one by one

VALUES = st.sampled_from([None, 0, 0.25, 0.5, 1, 1.0, 2])
FLAG = st.sampled_from([None, 0, 1])
DAYS = st.dates(datetime.date(2025, 6, 20), datetime.date(2026, 2, 20))
SOME_STUDENT = st.fixed_dictionaries(
    {
        "fteid": st.sampled_from([None, 70, 71]),
        "enroll_status": st.sampled_from([0, 0, 0, 0, -1, 2, None]),
        "grade_level": st.sampled_from([-1, 7, 8, 9, 12, 13, None]),
        "schoolid": st.sampled_from([100, 200, 901, None]),
        "gpa": st.none()
        | st.fixed_dictionaries({"simple_gpa": VALUES, "weighted_gpa": VALUES}),
        "il": st.none() | st.fixed_dictionaries({"iep": FLAG, "lep": FLAG, "lii": FLAG}),
        "plan": st.none() | st.sampled_from([0, 1]),
        "gifted": st.none() | st.sampled_from(["Y", "N"]),
        "days": st.lists(
            st.fixed_dictionaries(
                {
                    "calendardate": DAYS,
                    "fteid": st.sampled_from([70, 70, 71]),
                    "attendancevalue": VALUES,
                    "membershipvalue": VALUES,
                }
            ),
            max_size=6,
            unique_by=lambda day: (day["calendardate"], day["fteid"]),
        ),
    }
)  # fmt: skip


def one_by_one(students: Mapping[int, Mapping[str, Any]]) -> dict[str, list[Row]]:
    """What must be in the files, computed student by student from the records themselves."""
    files: dict[str, list[Row]] = {file: [] for file in FILES}
    for number in sorted(students, reverse=True):
        s = students[number]
        if s["enroll_status"] != 0 or s["grade_level"] not in range(8, 13):
            continue
        if s["schoolid"] in (901, None):
            continue
        present = member = 0.0
        for day in s["days"]:
            in_year = datetime.date(2025, 7, 1) <= day["calendardate"] <= TODAY
            values = day["attendancevalue"], day["membershipvalue"]
            if in_year and day["fteid"] == s["fteid"] and None not in values:
                present, member = present + values[0], member + values[1]
        if member:
            files[ATTENDANCE].append([str(number), repr(present / member)])
        gpas = [(s["gpa"] or {}).get(name) for name in ("simple_gpa", "weighted_gpa")]
        if gpas != [None, None]:
            files[GPA].append([str(number), *("" if g is None else repr(float(g)) for g in gpas)])
        il = s["il"] or {}
        for words, holds in (
            (IEP, il.get("iep") == 1),
            (SECTION_504, s["plan"] == 1),
            (EL, il.get("lep") == 1),
            (LI, il.get("lii") == 1),
            (GFT, s["gifted"] == "Y"),
        ):
            if holds:
                files[TAGS].append([str(number), *words])
    return files


def fill(powerschool: PowerSchool, students: Mapping[int, Mapping[str, Any]]) -> None:
    tables: dict[str, list[Record]] = {}
    for number, s in students.items():
        person = {"student_number": number, "id": number + 1, "dcid": number + 2}
        own = {"studentsdcid": number + 2}
        names = ("fteid", "enroll_status", "grade_level", "schoolid")
        tables.setdefault("students", []).append(person | {name: s[name] for name in names})
        for table, more in {
            "u_def_ext_students0": s["gpa"],
            "s_il_stu_x": s["il"],
            "s_il_stu_plan504_x": None if s["plan"] is None else {"participant": s["plan"]},
            "s_stu_crdc_x": s["gifted"] and {"giftedtalentedprograms_yn": s["gifted"]},
        }.items():
            if more is not None:
                tables.setdefault(table, []).append(own | more)
        days = [{"studentid": number + 1} | day for day in s["days"]]
        tables.setdefault("ps_adaadm_daily_ctod", []).extend(days)
    for table, records in tables.items():
        powerschool.insert(table, records)


@settings(max_examples=150)
@given(st.dictionaries(st.integers(1, 10**9), SOME_STUDENT, max_size=8))
def test_build_equals_a_computation_student_by_student(
    students: dict[int, dict[str, Any]],
) -> None:
    powerschool = PowerSchool()
    fill(powerschool, students)
    config = sgsync.SchooLinksSettings(attendance=sgsync.AttendanceSettings(),
        gpa=sgsync.GpaSettings(),
        tags=sgsync.TagsSettings(tags=tuple(
                sgsync.TagSettings(
                    name=words[0], detailed_name=words[1], description=words[2], table=table,
                    column=column, equals=str(value),
                )
                for words, table, column, value in CONDITIONS
            ),
        ),
    )  # fmt: skip
    with powerschool.connection(config, sgsync.OracleLogin("", "", "")) as connection:
        files = sgsync.StudentFiles(config, TODAY)
        sections = files.build(connection)
    found = {section.file: [list(row) for row in section.rows] for section in sections}
    assert found == one_by_one(students)
    active = len(files.student_query().run(connection))
    for section in sections[:2]:  # nobody is lost without a word
        told = [number for numbers in section.without.values() for number in numbers]
        assert len({row[0] for row in section.rows} | set(told)) == active
        assert not {row[0] for row in section.rows} & set(told)


# ------------------------------------------------------------------ log and summary


def test_log_and_summary_tell_each_file_and_nothing_personal(
    district: District, capfd: pytest.CaptureFixture[str]
) -> None:
    district.student(1001, days=[(1.0, 1.0), (None, 1.0)], simple_gpa=3.987, iep=1, lii=1)
    district.student(1002, days=[(None, 1.0)])
    for number in range(2001, 2026):
        district.student(number, simple_gpa=2.123)
    assert district.main("--json") == 0
    lines = [line.partition(" INFO    ")[2] for line in district.log.splitlines()]
    sizes = {file: len(data) for file, data in district.sent().items()}
    first_20 = ", ".join(str(number) for number in range(2025, 2005, -1))
    run = district.run.name
    assert lines == [
        f"sgsync {sgsync.__version__} schoolinks, run {run}, account {district.summary['account']} "
        f"on {district.summary['computer']}, arguments: schoolinks --json --home {district.path}",
        "PowerSchool: 27 students",
        "attendance_percentage.csv: 1 row",
        "attendance_percentage.csv: 2 days not counted: the attendance or membership value is NULL",
        f"{ATTENDANCE}: 25 students left out (no membership days): {first_20}, ...",
        "attendance_percentage.csv: 1 student left out (only NULL days): 1002",
        "gpa.csv: 26 rows",
        "gpa.csv: 1 student left out (no GPA): 1002",
        "student_tags.csv: 2 rows",
        *(f"{file}: no earlier upload in history to compare with" for file in FILES),
        f"127.0.0.1:{district.server.port}: logged in as district",
        *(f"{file}: uploaded to /automated, {sizes[file]:,} bytes" for file in FILES),
        lines[-1],
    ]
    assert lines[-1].startswith(f"complete: {district.summary['message']} (")
    assert district.summary["sections"] == [
        {"file": ATTENDANCE, "section": "attendance", "rows": 1, "null_days": 2,
         "without": {"no membership days": 25, "only NULL days": 1}, "uploaded": "live"},
        {"file": GPA, "section": "GPA", "rows": 26, "null_days": 0, "without": {"no GPA": 1},
         "uploaded": "live"},
        {"file": TAGS, "section": "tags", "rows": 2, "null_days": 0, "without": {},
         "uploaded": "live"},
    ]  # fmt: skip
    assert district.summary["message"] == (
        "attendance_percentage.csv: 1 row, gpa.csv: 26 rows, student_tags.csv: 2 rows; uploaded to "
        "/automated"
    )
    printed = capfd.readouterr()
    assert json.loads(printed.out) == district.summary
    assert lines[-1] in printed.err
    told = district.log + (district.run / "summary.json").read_text("utf-8") + printed.err
    for personal in ("Doe", "Jane", "3.987", "2.123", "Individualized", "Low Income"):
        assert personal not in told


# ------------------------------------------------------------------ UploadGuard


def test_a_file_without_rows_stops_everything(district: District) -> None:
    district.students(1001)
    district.forget(11001, table="s_il_stu_x", column="studentsdcid")
    assert district.refused(6) == (
        "nothing was uploaded: student_tags.csv: has no rows\n"
        "Try: check the files in this run's folder, and PowerSchool; if they are right, run again "
        "with --force"
    )
    assert (district.run / "HELD").exists()
    assert csv_rows((district.run / TAGS).read_bytes()) == [HEADERS[TAGS]]  # kept, to look at
    assert len(csv_rows((district.run / GPA).read_bytes())) == 2
    assert district.refused(6, "--test")
    assert district.refused(6, "--dry-run")
    assert district.main("--force") == 0
    assert csv_rows(district.sent()[TAGS]) == [HEADERS[TAGS]]
    assert "WARNING student_tags.csv: has no rows; ignored (--force)\n" in district.log


def test_no_students_at_all_stops_everything(district: District) -> None:
    message = district.refused(6)
    for file in FILES:
        assert f"{file}: has no rows" in message


def test_a_file_that_shrank_names_who_would_lose_what(district: District) -> None:
    district.students(*range(1001, 1021), lii=1)
    assert district.main() == 0
    epoch = f"20240101-{0:06}"
    district.forget(1001, 1002, 1003)
    district.forget(11004, table="s_il_stu_x", column="studentsdcid")
    district.powerschool.execute("UPDATE s_il_stu_x SET lii = 0 WHERE studentsdcid = 11005")
    assert district.refused(6) == (
        "nothing was uploaded: attendance_percentage.csv: 17 rows instead of 20 in the "
        f"upload of {epoch}, maxShrink is 10%: 3 students would lose their attendance; "
        f"gpa.csv: 17 rows instead of 20 in the upload of {epoch}, maxShrink is 10%: 3 students "
        "would lose their GPA; "
        f"student_tags.csv: 31 rows instead of 40 in the upload of {epoch}, maxShrink is 10%: "
        "4 students would lose the tag IEP, 5 students would lose the tag LI\n"
        "Try: check the files in this run's folder, and PowerSchool; if they are right, run again "
        "with --force"
    )
    assert district.main("--force") == 0
    assert len(csv_rows(district.sent()[TAGS])) == 32
    assert district.main() == 0  # now this is the last upload


def test_a_file_that_became_empty_names_who_would_lose_what(district: District) -> None:
    district.configure(attributes='maxShrink="100%"')
    district.students(1001, 1002)
    assert district.main() == 0
    district.powerschool.execute("DELETE FROM u_def_ext_students0")
    assert district.refused(6).splitlines()[0] == (
        "nothing was uploaded: gpa.csv: has no rows: 2 students would lose their GPA"
    )


@pytest.mark.parametrize(
    ("limit", "lost", "code"),
    [("10%", 2, 0), ("10%", 3, 6), ("3", 3, 0), ("3", 4, 6), ("0", 1, 6), ("100%", 19, 0)],
)
def test_max_shrink(district: District, limit: str, lost: int, code: int) -> None:
    district.configure(attributes=f'maxShrink="{limit}"')
    district.students(*range(1001, 1021))
    assert district.main() == 0
    district.forget(*range(1001, 1001 + lost))
    assert district.main() == code


def test_shrinking_is_measured_against_the_last_upload_for_good(
    district: District, monkeypatch: pytest.MonkeyPatch
) -> None:
    district.students(*range(1001, 1021))
    assert district.main() == 0
    district.forget(*range(1001, 1011))
    assert district.main("--test", "--force") == 0
    assert district.main("--dry-run", "--force") == 0
    with monkeypatch.context() as broken:
        broken.setenv("SCHOOLINKS_SFTP_PASSWORD", "wrong-password")
        assert district.main("--force") == 3
    message = district.refused(6)
    assert "gpa.csv: 10 rows instead of 20 in the upload of 20240101-000000," in message


def test_shrinking_is_measured_across_a_change_of_file_names(district: District) -> None:
    district.students(*range(1001, 1021))
    assert district.main() == 0
    district.configure(gpa='<GPA file="gpa2.csv"/>')
    district.forget(*range(1001, 1011))
    assert "gpa2.csv: 10 rows instead of 20" in district.refused(6)


def test_shrinking_ignores_runs_that_were_damaged(district: District) -> None:
    district.students(*range(1001, 1021))
    assert district.main() == 0
    whole = district.summary
    lines = [line | {"file": 1} for line in whole["sections"]]
    for number, summary in enumerate(
        [None, "{", [], {"sections": [{}]}, {"sections": 1}, whole | {"started": 1},
         whole | {"started": "yesterday"}, whole | {"sections": lines}, {"command": "schoolinks"}]
    ):  # fmt: skip
        folder = district.path / f"history/schoolinks/20240202-{number:06}"
        shutil.copytree(district.run, folder)
        text = summary if isinstance(summary, str) else json.dumps(summary)
        (folder / "summary.json").write_text(text)
    district.forget(*range(1001, 1011))
    assert "gpa.csv: 10 rows instead of 20" in district.refused(6)


def test_test_runs_delete_no_upload_that_the_next_night_is_measured_against(
    district: District,
) -> None:
    district.configure(history='<History keepRuns="1"/>')
    district.students(*range(1001, 1021))
    assert district.main() == 0
    assert district.main("--test") == 0
    district.forget(*range(1001, 1011))
    assert "gpa.csv: 10 rows instead of 20" in district.refused(6)


def test_a_changed_identifier_is_held_since_all_rows_would_be_lost(district: District) -> None:
    district.students(1001, 1002)
    assert district.main() == 0
    epoch = f"20240101-{0:06}"
    district.configure(attributes='identifier="student_sis_id" maxChange="100%" maxShrink="100%"')
    reasons = [
        f"{file}: its header has student_sis_id where the upload of {epoch} has student_number: "
        "all 2 rows would be replaced"
        for file in FILES
    ]
    message, remedy = district.refused(6).splitlines()
    assert message == "nothing was uploaded: " + "; ".join(reasons)
    assert remedy.endswith("run again with --force")
    assert district.main("--force") == 0
    assert f"WARNING {reasons[0]}; ignored (--force)\n" in district.log
    assert district.main() == 0


def test_an_import_of_zeros_is_held(district: District) -> None:
    district.students(*range(1001, 1021))
    assert district.main() == 0
    district.powerschool.execute("UPDATE u_def_ext_students0 SET weighted_gpa = 0")
    district.powerschool.execute(
        "UPDATE u_def_ext_students0 SET simple_gpa = 0 WHERE studentsdcid < 11005"
    )
    district.students(1021)  # who was in no upload
    reason = (
        f"gpa.csv: 20 of the 20 rows it shares with the upload of 20240101-{0:06} have changed, "
        "maxChange is 50%: mostly numerator_weighted (20 rows, all became 0.0)"
    )
    assert district.refused(6).splitlines()[0] == f"nothing was uploaded: {reason}"
    assert district.refused(6, "--dry-run")
    assert district.main("--force") == 0
    assert f"WARNING {reason}; ignored (--force)\n" in district.log
    assert district.main() == 0


def test_values_that_vanished_are_held_and_a_value_of_few_students_is_not_shown(
    district: District,
) -> None:
    district.students(*range(1001, 1013))
    assert district.main() == 0
    district.powerschool.execute("UPDATE u_def_ext_students0 SET simple_gpa = NULL")
    assert " (12 rows, all became blank)\n" in district.refused(6)
    district.powerschool.execute("UPDATE u_def_ext_students0 SET simple_gpa = 3.5")
    district.configure(attributes='maxChange="8"')
    district.powerschool.execute(
        "UPDATE u_def_ext_students0 SET weighted_gpa = 1.875 WHERE studentsdcid < 11010"
    )
    message = district.refused(6)
    assert "9 of the 12 rows it shares" in message
    assert "maxChange is 8: mostly numerator_weighted (9 rows)\n" in message
    assert "1.875" not in district.log


@pytest.mark.parametrize(
    ("limit", "changed", "code"),
    [("50%", 10, 0), ("50%", 11, 6), ("3", 3, 0), ("3", 4, 6), ("0", 1, 6), ("100%", 20, 0)],
)
def test_max_change(district: District, limit: str, changed: int, code: int) -> None:
    district.configure(attributes=f'maxChange="{limit}"')
    district.students(*range(1001, 1021))
    assert district.main() == 0
    district.powerschool.execute(
        f"UPDATE u_def_ext_students0 SET simple_gpa = 1.5 WHERE studentsdcid < {11001 + changed}"
    )
    assert district.main() == code, district.log


def test_a_changed_description_of_a_tag_is_a_change_and_another_spelling_of_a_number_is_none(
    district: District,
) -> None:
    district.students(*range(1001, 1021))
    assert district.main() == 0
    path = district.runs()[-1] / GPA
    path.write_text(path.read_text().replace('"3.5"', '"3.50"').replace('"4.25"', '"04.250"'))
    assert district.main() == 0, district.log
    district.configure(tags=f"<Tags>{FIVE_TAGS.replace(IEP[2], 'other words')}</Tags>")
    message = district.refused(6)
    assert "student_tags.csv: 20 of the 20 rows it shares with the upload of " in message
    assert "mostly description (20 rows, all became other words)\n" in message
    assert "gpa.csv" not in message


def older(district: District, days: int) -> None:
    """Make the newest run as old as that."""
    path = district.run / "summary.json"
    summary = json.loads(path.read_text())
    began = datetime.datetime.fromisoformat(summary["started"]) - datetime.timedelta(days)
    path.write_text(json.dumps(summary | {"started": began.isoformat()}))


@pytest.mark.parametrize("scale", ["fraction", "percent"])
def test_attendance_may_change_as_far_as_the_days_since_then_explain(
    district: District, scale: str
) -> None:
    district.configure(attendance=f'<Attendance scale="{scale}"/>')
    district.students(*range(1001, 1021), days=[(0.0, 0.0)] + [(1.0, 1.0)] * 19)
    assert district.main() == 0
    older(district, 1)
    district.powerschool.execute(  # everyone missed today
        f"UPDATE ps_adaadm_daily_ctod SET membershipvalue = 1 WHERE calendardate >= '{TODAY}'"
    )
    assert district.main() == 0, district.log
    older(district, 1)
    district.powerschool.execute("UPDATE ps_adaadm_daily_ctod SET attendancevalue = 0")
    assert (
        district.refused(6)
        .splitlines()[0]
        .endswith("maxChange is 50%: mostly attendance_percentage (20 rows, all became 0.0)")
    )


def test_attendance_of_a_new_school_year_is_no_change(district: District) -> None:
    district.students(*range(1001, 1021), days=[(0.0, 1.0)] * 40)
    assert district.main() == 0
    older(district, 60)
    district.powerschool.execute("UPDATE ps_adaadm_daily_ctod SET attendancevalue = 1")
    assert district.main() == 0, district.log


def test_attendance_in_another_scale_is_held(district: District) -> None:
    district.students(*range(1001, 1021), days=[(1.0, 1.0)] * 9 + [(0.0, 1.0)])
    assert district.main() == 0
    older(district, 1)
    district.configure(attendance='<Attendance scale="percent"/>')
    assert "attendance_percentage.csv: 20 of the 20 rows it shares" in district.refused(6)


def test_an_upload_whose_file_was_damaged_is_not_compared_with(district: District) -> None:
    district.students(*range(1001, 1021))
    assert district.main() == 0
    for damaged in (b"", b'"a","b"\r\n"1"\r\n', b"\xff"):
        assert district.main() == 0
        (district.run / GPA).write_bytes(damaged)
    district.forget(*range(1001, 1011))
    assert f"gpa.csv: 10 rows instead of 20 in the upload of 20240101-{0:06}, " in (
        district.refused(6)
    )


def test_summaries_are_read_as_they_were_written(district: District) -> None:
    district.student(1001, days=[(1.0, 1.0), (None, 1.0)], simple_gpa=3.5, iep=1)
    district.student(1002)
    assert district.main("--test") == 0
    kept = sgsync.runs(district.path / "history/schoolinks")[0].summary
    assert kept.sections[0] == sgsync.SectionSummary(
        file=ATTENDANCE, section="attendance", rows=1, without={"no membership days": 1},
        null_days=1, uploaded="test",
    )  # fmt: skip
    assert list(map(dataclasses.asdict, kept.sections)) == district.summary["sections"]


# ------------------------------------------------------------------ errors of queries


@pytest.mark.parametrize("table", ["u_def_ext_students0", "ps_adaadm_daily_ctod"])
def test_a_query_error_uploads_nothing(district: District, table: str) -> None:
    district.students(1001)
    district.powerschool.execute(f"DROP TABLE {table}")
    message = district.refused(4)
    assert message.startswith("PowerSchool: the query of students, ")
    assert message.endswith(f": no such table: {table}")
    assert sorted(path.name for path in district.run.iterdir()) == [
        "manifest.json", "sgi_log.txt", "summary.json",
    ]  # fmt: skip


def test_a_connection_that_breaks_is_tried_again_from_the_start(district: District) -> None:
    district.students(1001)
    broken = []

    def fail(sql: str) -> None:
        if "GROUP BY" in sql and len(broken) < 2:
            broken.append(sql)
            raise sgsync.DatabaseError("PowerSchool: DPY-4011: gone", transient=True)

    district.powerschool.fail = fail
    assert district.main() == 0
    assert len(district.powerschool.logins) == 3
    assert district.log.count("PowerSchool: DPY-4011: gone; trying again in 0 s") == 2


# ------------------------------------------------------------------ upload


def test_schoolinks_uploads_to_real_servers_with_a_password(anywhere: District) -> None:
    anywhere.students(1001, 1002)
    assert anywhere.main() == 0, anywhere.log
    expected = {file: (anywhere.run / file).read_bytes() for file in FILES}
    assert anywhere.sent() == expected
    assert anywhere.sent("other") == {}
    assert sorted(path.name for path in anywhere.run.iterdir()) == sorted(
        [*FILES, "COMPLETE", "manifest.json", "sgi_log.txt", "summary.json"]
    )
    assert (anywhere.run / "COMPLETE").read_bytes() == b""
    anywhere.students(1003)
    assert anywhere.main() == 0, anywhere.log  # over what is there
    assert anywhere.sent() == {file: (anywhere.run / file).read_bytes() for file in FILES}
    assert anywhere.sent() != expected


def test_schoolinks_uploads_with_a_private_key(
    anywhere: District, monkeypatch: pytest.MonkeyPatch
) -> None:
    anywhere.students(1001)
    key = anywhere.path / "ssh/schoolinks_key"
    key.write_text(anywhere.server.key)
    key.chmod(0o600)
    anywhere.configure(attributes='privateKey="ssh/schoolinks_key"')
    monkeypatch.delenv("SCHOOLINKS_SFTP_PASSWORD")
    assert anywhere.main() == 0, anywhere.log
    assert list(anywhere.sent()) == list(FILES)
    stranger = asyncssh.generate_private_key("ssh-ed25519")
    key.write_bytes(stranger.export_private_key())
    assert anywhere.failed(3).splitlines()[1] == (
        "Try: check SCHOOLINKS_SFTP_USERNAME, and that SchooLinks has the public key of this "
        "private key"
    )


def test_schoolinks_refused_log_in(anywhere: District, monkeypatch: pytest.MonkeyPatch) -> None:
    anywhere.students(1001)
    monkeypatch.setenv("SCHOOLINKS_SFTP_PASSWORD", "not-the-password")
    server = anywhere.server
    assert anywhere.failed(3) == (
        f"{server.host}:{server.port}: log-in as {server.username} refused: "
        "Authentication failed.\n"
        "Try: check SCHOOLINKS_SFTP_USERNAME and SCHOOLINKS_SFTP_PASSWORD"
    )
    assert anywhere.sent() == {}


def test_schoolinks_missing_private_key(district: District) -> None:
    district.students(1001)
    district.configure(attributes='privateKey="ssh/schoolinks_key"')
    path = district.path / "ssh/schoolinks_key"
    assert district.refused(2) == (
        f"{path}: the private key cannot be read: No such file or directory\n"
        f"Try: make a key pair without a passphrase: ssh-keygen -t rsa -b 4096 -N '' "
        f"-f {path}; then give the public key, the file with .pub, to SchooLinks"
    )


def test_schoolinks_test_uploads_to_the_test_directory(district: District) -> None:
    district.students(1001)
    assert district.main("--test") == 0
    assert district.sent() == {}
    assert list(district.sent("other")) == list(FILES)
    assert {line["uploaded"] for line in district.summary["sections"]} == {"test"}
    assert district.summary["message"].endswith("; uploaded to /other")


def test_schoolinks_dry_run_builds_the_files_and_connects_to_nobody(district: District) -> None:
    district.students(1001)
    logins = district.server.logins
    assert district.main("--dry-run") == 0
    assert logins == []
    assert district.summary["outcome"] == "dry run"
    assert district.summary["message"] == (
        "attendance_percentage.csv: 1 row, gpa.csv: 1 row, student_tags.csv: 1 row; nothing was "
        "uploaded"
    )
    assert {line["uploaded"] for line in district.summary["sections"]} == {""}
    assert sorted(path.name for path in district.run.iterdir()) == sorted(
        [*FILES, "manifest.json", "sgi_log.txt", "summary.json"]
    )


def test_schoolinks_directories_of_the_configuration(district: District) -> None:
    district.students(1001)
    text = CONFIG.replace('directory="{path}/automated"', 'directory="/nightly/"')
    (district.path / "config.xml").write_text(text.format(**district.values))
    assert district.failed(3) == (
        f"127.0.0.1:{district.server.port}: /nightly/attendance_percentage.csv: cannot be "
        "uploaded: it does not exist\n"
        "Try: correct the directory in <SchooLinks>, or ask for access to it"
    )
    (district.server.files / "nightly").mkdir()
    assert district.main() == 0
    assert list(district.sent("nightly")) == list(FILES)


def test_schoolinks_to_the_root_of_the_server(district: District) -> None:
    district.students(1001)
    text = CONFIG.replace('directory="{path}/automated"', 'directory="/"')
    (district.path / "config.xml").write_text(text.format(**district.values))
    assert district.main() == 0
    assert (district.server.files / GPA).exists()
    assert ("posix-rename", "/gpa.csv.part", "/gpa.csv") in district.server.events


def trust(district: District) -> str:
    """The command that the remedies name."""
    words = [sys.executable, str(homes.SCRIPT), "trust", "--job", "schoolinks"]
    return sgsync.command_line([*words, "--home", str(district.path)])


HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ7Jv0bYFY3mEq4cTg9RUTnUyBZcA1kJ3ULIdF1Wjz0Y"


def test_schoolinks_takes_the_host_key_from_beside_the_script_or_from_ssh(
    district: District,
) -> None:
    district.students(1001)
    beside, in_ssh = district.path / "known_hosts", district.path / "ssh/known_hosts"
    beside.rename(in_ssh)
    assert district.main() == 0
    in_ssh.rename(beside)
    in_ssh.write_text(f"[127.0.0.1]:{district.server.port} {HOST_KEY}\n")
    assert district.main() == 0  # the one beside the script goes first
    beside.write_text(in_ssh.read_text())
    message = district.refused(3)
    assert re.fullmatch(
        r"127\.0\.0\.1:\d+: the host key is ssh-ed25519 SHA256:\S+, but "
        rf"{re.escape(str(beside))} has ssh-ed25519 SHA256:\S+; nothing was sent\n"
        r"Try: ask the server's operator whether the host key was changed; only if it was, replace "
        rf"the pinned key: {re.escape(trust(district))}",
        message,
    )


def test_schoolinks_without_a_host_key(district: District) -> None:
    district.students(1001)
    (district.path / "known_hosts").unlink()
    port, path = district.server.port, district.path / "ssh/known_hosts"
    pin = f"pin the server's key: {trust(district)}"
    assert district.refused(2) == f"{path}: cannot be read: the file does not exist\nTry: {pin}"
    path.write_text("")
    assert district.refused(3) == f"{path}: has no host key\nTry: {pin}"
    path.write_text(f"sftp.schoolinks.com {HOST_KEY}\n")
    assert district.refused(3) == (
        f"{path}: has no host key for [127.0.0.1]:{port}, only for sftp.schoolinks.com\n"
        f"Try: check SCHOOLINKS_SFTP_ADDRESS; if it is right, {pin}"
    )


def test_schoolinks_unknown_host(district: District, monkeypatch: pytest.MonkeyPatch) -> None:
    district.students(1001)
    monkeypatch.setenv("SCHOOLINKS_SFTP_ADDRESS", "sftp.schoolinks.invalid")
    (district.path / "known_hosts").write_text(f"sftp.schoolinks.invalid {HOST_KEY}\n")
    assert district.refused(3).splitlines()[1] == (
        "Try: check SCHOOLINKS_SFTP_ADDRESS, and that this machine can resolve names"
    )


def test_upload_takes_a_temporary_name_until_the_size_is_confirmed(district: District) -> None:
    district.students(1001)
    assert district.main() == 0
    assert district.server.events == [
        event
        for file in FILES
        for event in (
            ("open", f"/automated/{file}.part"),
            ("posix-rename", f"/automated/{file}.part", f"/automated/{file}"),
        )
    ]


@pytest.mark.parametrize(
    ("quirks", "events"),
    [
        (
            schoolinks_server.OldRename,
            [("open", ".part"), ("remove", ""), ("rename", ".part", "")],
        ),
        (
            schoolinks_server.NoRename,
            [("open", ".part"), ("remove", ""), ("remove", ".part"), ("open", "")],
        ),
        (schoolinks_server.OnlyCsv, [("open", "")]),
    ],
)
def test_upload_to_servers_that_rename_in_the_old_way_or_not_at_all(
    quirky: Any, quirks: type[schoolinks_server.Recording], events: Sequence[tuple[str, ...]]
) -> None:
    district = quirky(quirks)
    district.students(1001)
    for number in (1002, 1003):
        assert district.main() == 0, district.log
        assert district.sent() == {file: (district.run / file).read_bytes() for file in FILES}
        district.students(number)
        done = [
            (what, *(end.removeprefix(f"/automated/{GPA}") for end in ends))
            for what, *ends in district.server.events
            if ends[0].startswith(f"/automated/{GPA}")
        ]
        assert done == list(events)
        district.server.events.clear()


def test_upload_that_arrives_short_is_not_put_in_place(quirky: Any) -> None:
    district = quirky(schoolinks_server.Lossy)
    district.students(1001)
    size = len('"student_number","attendance_percentage"\r\n"1001","1.0"\r\n')
    assert district.failed(3) == (
        f"127.0.0.1:{district.server.port}: /automated/attendance_percentage.csv.part: the server "
        f"has {size - 1} of {size} bytes\nTry: check whether the server's disk is full"
    )
    assert ATTENDANCE not in district.sent()
    assert {line["uploaded"] for line in district.summary["sections"]} == {""}


def test_upload_that_is_cut_goes_on_where_it_was(quirky: Any) -> None:
    district = quirky(schoolinks_server.CutOnce)
    district.students(*range(1, 200))
    assert district.main() == 0, district.log
    assert district.sent() == {file: (district.run / file).read_bytes() for file in FILES}
    opened = [event[1] for event in district.server.events if event[0] == "open"]
    assert opened == [f"/automated/{file}.part" for file in (ATTENDANCE, GPA, GPA, TAGS)]
    assert "; trying again in 0 s" in district.log


def test_upload_that_fails_half_way_counts_the_files_that_arrived(
    district: District, monkeypatch: pytest.MonkeyPatch
) -> None:
    district.students(*range(1001, 1021))
    whole = sgsync.Sftp.write_whole

    def fail(sftp: sgsync.Sftp, path: str, file: Any) -> int:
        if path.endswith(GPA):
            raise sgsync.TransferError("the server is tired")
        return whole(sftp, path, file)

    monkeypatch.setattr(sgsync.Sftp, "write_whole", fail)
    assert district.failed(3) == "the server is tired"
    assert list(district.sent()) == [ATTENDANCE]
    assert [line["uploaded"] for line in district.summary["sections"]] == ["live", "", ""]
    district.forget(*range(1001, 1011))
    message = district.refused(6)
    assert "attendance_percentage.csv: 10 rows instead of 20" in message
    assert "gpa.csv" not in message


# ------------------------------------------------------------------ history


def test_history_keeps_the_newest_runs(district: District) -> None:
    district.configure(history='<History keepRuns="2"/>')
    district.students(1001)
    other = district.path / "history/20240101-000000"
    other.mkdir(parents=True)
    for _ in range(4):
        assert district.main() == 0
    assert len(district.runs()) == 2
    assert other.is_dir()  # of sync
    assert "deleted 1 run older than the newest 2" in district.log


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_history_is_for_its_owner_alone(district: District) -> None:
    district.students(1001)
    assert district.main() == 0
    for path in (district.run, *district.run.iterdir()):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077


def test_schoolinks_runs_once_at_a_time_beside_sync(district: District) -> None:
    district.students(1001)
    history = district.path / "history"
    (history / "schoolinks").mkdir(parents=True)
    with filelock.FileLock(history / "schoolinks/schoolinks.lock"):
        assert district.refused(7).startswith("another schoolinks run is active in this home: ")
    with filelock.FileLock(history / "sync.lock"):
        assert district.main() == 0
