"""sgsync.Oracle: python-oracledb's real driver, its errors in plain words, its round trips.

SGSYNC_TEST_ORACLE, user/password@host:port/service, leads to a database in which that user may
make tables: the tests make PowerSchool's there, and drop them. Without it they are skipped, and
only what needs no server is tested.
"""

from __future__ import annotations

import datetime
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracledb
import pytest

import sgsync
from support import powerschool, schoolinks_server, servers
from support.districts import FILES, GPA, TODAY, District, csv_rows, populate

REAL = sgsync.Oracle
LOGIN = sgsync.OracleLogin("psnavigator", "Tiger&7", "ps.example.org:1521/PSPRODDB")
FIREWALL = (
    "Try: check host and port in POWERSCHOOL_PROD_DB, that the database is running, and that no "
    "firewall blocks it"
)
DSN = "Try: write POWERSCHOOL_PROD_DB as host:port/service"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[schoolinks_server.SchooLinks]:
    with schoolinks_server.SchooLinks(tmp_path / "server") as running:
        yield running


@pytest.fixture
def district(
    tmp_path: Path, server: schoolinks_server.SchooLinks, monkeypatch: pytest.MonkeyPatch
) -> District:
    """Asks the real driver."""
    made = District(tmp_path / "home", server, monkeypatch)
    monkeypatch.setattr(sgsync, "Oracle", REAL)
    return made


def settings(**more: Any) -> sgsync.SchooLinksSettings:
    parts = (sgsync.AttendanceSettings, sgsync.GpaSettings, sgsync.TagsSettings)
    attendance, gpa, tags = (part() for part in parts)
    return sgsync.SchooLinksSettings(attendance=attendance, gpa=gpa, tags=tags, **more)


def refused(dsn: str = LOGIN.dsn, **more: Any) -> sgsync.DatabaseError:
    """What a connection ends with."""
    login = sgsync.OracleLogin(LOGIN.user, LOGIN.password, dsn)
    with pytest.raises(sgsync.DatabaseError) as caught, REAL(settings(**more), login) as oracle:
        oracle.connect()
    return caught.value


# ------------------------------------------------------------------ oracle_error

THICK = 'install Oracle Instant Client and set thickMode="true" on <SchooLinks>'
ADVICE = [
    (
        "DPY-3010: connections to this database server version are not supported by "
        "python-oracledb in thin mode",
        f"this server is older than Oracle 12.1, which needs thick mode: {THICK}",
        False,
    ),
    (
        "DPY-3015: password verifier type 0x939 is not supported by python-oracledb in thin mode",
        "this account's password is stored in the old 10G format: ask the database administrator "
        f"to set the password again, or {THICK}",
        False,
    ),
    (
        "DPY-4011: the database or network closed the connection",
        "run it again; if every connection ends this way, the server may require native network "
        f"encryption, which needs thick mode: {THICK}",
        True,
    ),
    (
        "ORA-01017: invalid username/password; logon denied",
        "check POWERSCHOOL_READ_USER and POWERSCHOOL_DB_PASSWORD (the password is case-sensitive)",
        False,
    ),
    ("ORA-12541: TNS:no listener", FIREWALL.removeprefix("Try: "), True),
    (
        "ORA-12514: TNS:listener does not currently know of service requested in connect "
        "descriptor",
        "correct the service name in POWERSCHOOL_PROD_DB (the part after the /), or wait until the "
        "database is open",
        False,
    ),
    (
        "ORA-28000: The account is locked.",
        "ask the database administrator to unlock the account POWERSCHOOL_READ_USER",
        False,
    ),
    (
        "ORA-28001: The password has expired.",
        "the account's password has expired: ask the database administrator for a new one, and set "
        "POWERSCHOOL_DB_PASSWORD to it",
        False,
    ),
    (
        'DPY-4000: unable to find "PSPROD" in /etc/tnsnames.ora',
        "write POWERSCHOOL_PROD_DB as host:port/service",
        False,
    ),
    (
        "DPY-4011: the database or network closed the connection\n"
        "socket timed out while recovering from previous socket timeout",
        "run it when the database is less busy, or raise queryTimeoutSeconds on <SchooLinks>",
        False,
    ),
    ("ORA-00600: internal error code", "", False),
]


@pytest.mark.parametrize(("text", "remedy", "transient"), ADVICE, ids=[a[0][:9] for a in ADVICE])
def test_connect_advises_in_plain_words(
    monkeypatch: pytest.MonkeyPatch, text: str, remedy: str, transient: bool
) -> None:
    def connect(**_: object) -> None:
        raise oracledb.DatabaseError(f"{text}\nHelp: https://docs.oracle.com/error-help/db/")

    monkeypatch.setattr(oracledb, "connect", connect)
    error = refused()
    assert error.message == f"PowerSchool: cannot connect: {text}".replace("\n", " ")
    assert (error.remedy, error.transient, error.exit_code) == (remedy, transient, 4)


def test_connect_advises_by_the_innermost_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(**_: object) -> None:
        raise oracledb.OperationalError(
            "DPY-6005: cannot connect to database (CONNECTION_ID=9m7+x/A==).\n"
            'DPY-6001: Service "PSPROD" is not registered with the listener at host "ps" port '
            "1521. (Similar to ORA-12514)"
        )

    monkeypatch.setattr(oracledb, "connect", connect)
    error = refused()
    assert error.message == (
        "PowerSchool: cannot connect: DPY-6005: cannot connect to database. DPY-6001: Service "
        '"PSPROD" is not registered with the listener at host "ps" port 1521. (Similar to '
        "ORA-12514)"
    )
    assert error.remedy == sgsync.ORACLE_ADVICE["ORA-12514"]
    assert not error.transient


def test_connect_where_nothing_listens() -> None:
    error = refused(f"127.0.0.1:{servers.free_port()}/PSPRODDB")
    assert re.fullmatch(
        r"PowerSchool: cannot connect: DPY-6005: cannot connect to database\. "
        r"\[Errno \d+\] Connection refused\n" + re.escape(FIREWALL),
        str(error),
    )
    assert error.transient


def test_connect_to_a_host_that_nobody_knows() -> None:
    error = refused("ps.example.invalid:1521/PSPRODDB")
    assert error.message.startswith("PowerSchool: cannot connect: ")
    assert f"Try: {error.remedy}" == FIREWALL
    assert error.transient


@pytest.mark.parametrize("dsn", ["PSPROD", "ps.example.org:PSPROD", "//", "two words"])
def test_connect_to_what_is_no_address(dsn: str) -> None:
    assert str(refused(dsn)).splitlines()[-1] == DSN


def test_connect_gives_up_on_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sgsync, "CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = refused(f"127.0.0.1:{silent.getsockname()[1]}/PSPRODDB")
    assert str(error) == f"PowerSchool: cannot connect: no answer for 1 s\n{FIREWALL}"


def test_connect_to_a_server_older_than_12_1() -> None:
    def answer(listener: socket.socket) -> None:
        client = listener.accept()[0]
        with client:
            client.recv(8192)
            body = struct.pack(">HH", 312, 0) + bytes(28)  # accepted, by Oracle 10's protocol
            client.sendall(struct.pack(">HHBBH", 8 + len(body), 0, 2, 0, 0) + body)
            client.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as old:
        threading.Thread(target=answer, args=(old,), daemon=True).start()
        error = refused(f"127.0.0.1:{old.getsockname()[1]}/PSPRODDB")
    assert "DPY-3010: connections to this database server version are not supp" in error.message
    assert error.remedy == sgsync.ORACLE_ADVICE["DPY-3010"]


def test_connect_passes_its_time_outs_to_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Connection:
        version, call_timeout = "19.0", 0

        def close(self) -> None:
            pass

    given: dict[str, Any] = {}
    connection = Connection()
    monkeypatch.setattr(oracledb, "connect", lambda **more: given.update(more) or connection)
    with REAL(settings(query_timeout_seconds=77), LOGIN) as oracle:
        oracle.connect()
    assert given == {
        "user": "psnavigator",
        "password": "Tiger&7",
        "dsn": "ps.example.org:1521/PSPRODDB",
        "tcp_connect_timeout": 30.0,
    }
    assert connection.call_timeout == 77_000


@pytest.mark.parametrize(
    ("more", "directory"),
    [({"thick_mode": True}, None), ({"client_directory": "C:/instantclient"}, "C:/instantclient")],
)
def test_connect_starts_thick_mode_first(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], directory: str | None
) -> None:
    done: list[object] = []

    def connect(**_: object) -> None:
        done.append("connect")
        raise oracledb.DatabaseError("ORA-01017: denied")

    monkeypatch.setattr(oracledb, "init_oracle_client", lambda lib_dir: done.append(lib_dir))  # noqa: PLW0108
    monkeypatch.setattr(oracledb, "connect", connect)
    refused(**more)
    assert done == [directory, "connect"]


def test_connect_without_oracles_client_where_thick_mode_asks_for_it(
    district: District,
) -> None:
    district.configure(attributes=f'clientDirectory="{district.path}"')
    script = Path(sgsync.__file__).resolve()
    ended = subprocess.run(
        [sys.executable, str(script), "schoolinks", "--home", str(district.path)],
        capture_output=True, encoding="utf-8", timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 4, ended.stderr
    message = district.summary["message"]
    assert message.startswith("PowerSchool: cannot connect: DPI-1047: Cannot locate a 64-bit ")
    assert district.summary["remedy"] == (
        "install Oracle Instant Client in the version that matches Python (64-bit), and name its "
        "folder in clientDirectory= on <SchooLinks>"
    )


# ------------------------------------------------------------------ a real server


class Server:
    """The server of SGSYNC_TEST_ORACLE, with PowerSchool's tables, empty."""

    def __init__(self, address: str) -> None:
        self.user, self.password, self.dsn = re.fullmatch(r"(.+?)/(.+)@(.+)", address).groups()
        self.connection = oracledb.connect(user=self.user, password=self.password, dsn=self.dsn)
        self.made: list[str] = []

    def create(self) -> None:
        for table, columns in powerschool.TABLES.items():
            self.execute(f"CREATE TABLE {table} ({columns})")
            self.made.append(table)

    def drop(self) -> None:
        for table in self.made:
            self.execute(f"DROP TABLE {table}")
        self.connection.close()

    def execute(self, sql: str) -> None:
        with self.connection.cursor() as cursor:
            cursor.execute(sql)
        self.connection.commit()

    def copy(self, source: powerschool.PowerSchool) -> None:
        """Insert every row of the embedded database."""
        for table, columns in powerschool.COLUMNS.items():
            rows = source.execute(f"SELECT * FROM {table}")
            if "calendardate" in columns:
                at = columns.index("calendardate")
                rows = [
                    (*row[:at], datetime.datetime.fromisoformat(row[at]), *row[at + 1 :])
                    for row in rows
                ]
            marks = ", ".join(f":{number}" for number in range(1, len(columns) + 1))
            if rows:
                with self.connection.cursor() as cursor:
                    cursor.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
        self.connection.commit()

    def environment(self, dsn: str = "") -> dict[str, str]:
        return {
            "POWERSCHOOL_READ_USER": self.user,
            "POWERSCHOOL_DB_PASSWORD": self.password,
            "POWERSCHOOL_PROD_DB": dsn or self.dsn,
        }


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    address = os.environ.get("SGSYNC_TEST_ORACLE")
    if not address:
        pytest.skip("SGSYNC_TEST_ORACLE (user/password@host:port/service) is not set")
    server = Server(address)
    try:
        server.create()
        yield server
    finally:
        server.drop()


@pytest.fixture
def ready(district: District, oracle: Server, monkeypatch: pytest.MonkeyPatch) -> District:
    """A district whose PowerSchool is on that server; `oracle.copy` brings its rows there."""
    for name, value in oracle.environment().items():
        monkeypatch.setenv(name, value)
    return district


@pytest.fixture
def wire(
    ready: District, oracle: Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[powerschool.Wire]:
    with powerschool.Wire(oracle.dsn) as between:
        monkeypatch.setenv("POWERSCHOOL_PROD_DB", between.dsn)
        yield between


def test_schoolinks_writes_the_same_from_oracle_as_from_the_embedded_database(
    ready: District, oracle: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    populate(ready, 120, 11)
    ready.student(5, days=[(None, 1.0), (0.5, 1.0), (0.0, 1.0)], weighted_gpa=0.0)
    ready.student(4, days=[(None, 1.0)], simple_gpa=3.123456)
    ready.student(3, days=[(0.0, 1.0)])
    oracle.copy(ready.powerschool)
    assert ready.main() == 0, ready.log
    assert "PowerSchool: connected to Oracle " in ready.log
    found, told = ready.sent(), ready.summary["sections"]
    monkeypatch.setattr(sgsync, "Oracle", ready.powerschool.connection)
    assert ready.main() == 0
    expected = ready.sent()
    assert told == ready.summary["sections"]
    assert all(len(data) > 300 for data in found.values())
    gpas, others = (
        [[float(value or -1) for value in row] for row in csv_rows(files.pop(GPA))[1:]]
        for files in (found, expected)
    )  # whether 4 is an integer there is the column's affair
    assert gpas == others
    assert found == expected


def test_schoolinks_asks_oracle_as_often_for_many_students_as_for_few(
    ready: District, oracle: Server, wire: powerschool.Wire
) -> None:
    trips = []
    for numbers in (range(1, 4), range(4, 200)):
        ready.powerschool = powerschool.PowerSchool()
        for number in numbers:
            ready.students(number)
        oracle.copy(ready.powerschool)
        before = wire.round_trips
        assert ready.main() == 0, ready.log
        trips.append(wire.round_trips - before)
    assert "PowerSchool: 199 students" in ready.log
    assert trips[0] == trips[1]
    assert wire.connections == 2


def test_query_makes_one_more_round_trip_for_each_array_of_rows(
    ready: District, oracle: Server, wire: powerschool.Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sgsync, "ORACLE_ROWS", 100)
    for number in range(1, 306):
        ready.students(number)
    oracle.copy(ready.powerschool)
    config = sgsync.load_config(ready.path / "config.xml", sgsync.SchooLinksConfig).schoolinks
    login = sgsync.OracleLogin(oracle.user, oracle.password, wire.dsn)
    with REAL(config, login) as connection:
        connection.connect()
        files = sgsync.StudentFiles(config, TODAY)
        for query in (files.student_query(), files.attendance_query()):
            before = wire.round_trips
            assert len(query.run(connection)) == 305
            assert wire.round_trips - before == 4  # 101, 100, 100 and 4 rows


def test_schoolinks_wrong_oracle_password(ready: District, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERSCHOOL_DB_PASSWORD", "Wrong-Password-5")
    message = ready.refused(4)
    assert message.startswith("PowerSchool: cannot connect: ORA-01017: ")
    assert message.splitlines()[1] == f"Try: {sgsync.ORACLE_ADVICE['ORA-01017']}"
    assert "Wrong-Password-5" not in ready.log


def test_schoolinks_unknown_oracle_service(
    ready: District, oracle: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = oracle.dsn.partition("/")[0]
    monkeypatch.setenv("POWERSCHOOL_PROD_DB", f"{host}/NO_SUCH_SERVICE")
    message = ready.refused(4)
    assert '"NO_SUCH_SERVICE" is not registered' in message
    assert message.splitlines()[1] == f"Try: {sgsync.ORACLE_ADVICE['ORA-12514']}"


def test_schoolinks_missing_table_and_column(ready: District) -> None:
    ready.configure(gpa='<GPA table="u_no_such_table"/>')
    message, remedy = ready.refused(4).splitlines()
    assert message.startswith(
        "PowerSchool: the query of students, u_no_such_table, s_il_stu_x, s_il_stu_plan504_x, "
        "s_stu_crdc_x: ORA-00942: "
    )
    assert remedy == f"Try: {sgsync.ORACLE_ADVICE['ORA-00942']}"
    ready.configure(gpa='<GPA unweighted="no_such_gpa"/>')
    message, remedy = ready.refused(4).splitlines()
    assert re.search(r"ORA-00904: .*NO_SUCH_GPA.*: invalid identifier", message)
    assert remedy == f"Try: {sgsync.ORACLE_ADVICE['ORA-00904']}"


def test_schoolinks_recovers_from_a_connection_that_is_cut(
    ready: District, oracle: Server, wire: powerschool.Wire
) -> None:
    ready.students(*range(1, 50))
    oracle.copy(ready.powerschool)
    with REAL(settings(), sgsync.OracleLogin(oracle.user, oracle.password, wire.dsn)) as other:
        other.connect()
        wire.cut_after = wire.round_trips + 2  # at the second query
        assert ready.main() == 0, ready.log
    assert wire.cut_after is None
    assert re.search(r"ps_adaadm_daily_ctod: DPY-4011: .*; trying again in 0 s", ready.log)
    assert wire.connections == 3
    assert list(ready.sent()) == list(FILES)


def test_query_gives_up_on_a_server_that_goes_silent(
    ready: District, oracle: Server, wire: powerschool.Wire
) -> None:
    ready.configure(attributes='queryTimeoutSeconds="1"')
    config = sgsync.load_config(ready.path / "config.xml", sgsync.SchooLinksConfig).schoolinks
    login = sgsync.OracleLogin(oracle.user, oracle.password, wire.dsn)
    with REAL(config, login) as connection:
        connection.connect()
        wire.silent = True
        with pytest.raises(sgsync.DatabaseError) as caught:
            sgsync.StudentFiles(config, TODAY).student_query().run(connection)
    message, remedy = str(caught.value).splitlines()
    assert re.search(r"timeout|socket timed out|no answer for 2 s", message)
    assert remedy == f"Try: {sgsync.ORACLE_ADVICE['DPY-4024']}"
    assert not caught.value.transient


def test_schoolinks_as_a_process_of_its_own(ready: District, oracle: Server) -> None:
    today = datetime.date.today()
    ready.students(1001, 1002, days=[])
    for number in (1001, 1002):
        ready.day(number, today, 0.5)
    oracle.copy(ready.powerschool)
    start = min(today, today.replace(day=min(today.day, 28)))
    ready.configure(attributes=f'schoolYearStart="{start:%m-%d}"')
    script = Path(sgsync.__file__).resolve()
    ended = subprocess.run(
        [sys.executable, str(script), "schoolinks", "--home", str(ready.path), "--json"],
        capture_output=True, encoding="utf-8", timeout=60, check=False, cwd="/",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ready.sent()["attendance_percentage.csv"] == (
        b'"student_number","attendance_percentage"\r\n"1002","0.5"\r\n"1001","0.5"\r\n'
    )
    assert ready.sent()[GPA] == (ready.run / GPA).read_bytes()
    for password in (oracle.password, ready.server.password):
        assert password not in ended.stdout + ended.stderr + ready.log
