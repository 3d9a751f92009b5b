"""The database: connections, queries to CSV, values to text, statements."""

from __future__ import annotations

import csv
import datetime
import decimal
import importlib.abc
import io
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyodbc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sgsync
from support import homes, servers

pytestmark = pytest.mark.usefixtures("short_pauses", "no_sftp")

ROWS = [("1001", "2026-01-05", "LOCKED", "Ann"), ("1002", "2026-01-06", "LOCKED", "Bob")]
RETRIES = sgsync.RETRY_ATTEMPTS - 1
QUERY = "ic/iep.csv: the query (config.xml:9)"
UP = "check that the database server is running and that no firewall blocks it"
UNREACHABLE = f"Try: {UP}"


def nothing(_: int) -> None:
    pass


def opened(connection_string: str, **values: Any) -> sgsync.Database:
    known = {"connection_string": connection_string, **values}
    return sgsync.Database(sgsync.DatabaseSettings(**known))


def exported(
    database: servers.Database, sql: str, path: Path, date_format: str | None = None
) -> str:
    """The CSV file that a query makes, read by Python's own reader into lines joined by |."""
    with opened(database.connection_string) as connection:
        sgsync.write_query(connection, "subject", sql, path, nothing, date_format)
    with path.open(encoding="utf-8", newline="") as file:
        return "\n".join("|".join(row) for row in csv.reader(file))


def query(home: homes.Home, sql: str) -> None:
    """Make this the query of iep.csv, with the same columns."""
    home.configure(query=sql)


# ------------------------------------------------------------------ connections


def test_connect_refuses_a_wrong_password_at_once(
    postgres_home: homes.Home, postgres_server: servers.Postgres
) -> None:
    postgres_home.extract(ROWS)
    name = postgres_home.database.connection_string.split("Database=")[1].split(";")[0]
    wrong = postgres_server.connection_string(name, password="s3cret-and-wrong")
    postgres_home.configure(connection=wrong)
    message = postgres_home.refused(4, "--verbose")
    assert message.startswith("the database: ")
    assert message.endswith(
        'FATAL: password authentication failed for user "sgsync"\n'
        "Try: check user, password and database in connectionString"
    )
    assert "trying again" not in postgres_home.log
    assert "s3cret-and-wrong" not in postgres_home.log


def test_connect_refuses_an_unknown_database_at_once(
    postgres_home: homes.Home, postgres_server: servers.Postgres
) -> None:
    postgres_home.extract(ROWS)
    postgres_home.configure(connection=postgres_server.connection_string("nowhere"))
    assert postgres_home.refused(4).endswith(
        'FATAL: database "nowhere" does not exist\n'
        "Try: check user, password and database in connectionString"
    )
    assert "trying again" not in postgres_home.log


def test_connect_tries_again_while_the_server_is_down(
    postgres_home: homes.Home, postgres_server: servers.Postgres
) -> None:
    postgres_home.extract(ROWS)
    postgres_server.stop()
    message = postgres_home.failed(4)
    assert message.startswith("the database: connection to server at ")
    assert "Connection refused" in message
    assert message.endswith(UNREACHABLE)
    assert postgres_home.log.count("trying again") == RETRIES
    assert not list((postgres_home.sftp_root / "upload").iterdir())


@pytest.mark.parametrize(
    ("connection", "reason"),
    [
        ("Driver=No Such Driver;Server=x", "Can't open lib 'No Such Driver' : file not found"),
        ("DSN=nowhere", "Data source name not found and no default driver specified"),
    ],
)
def test_connect_names_a_missing_driver(
    sqlite_home: homes.Home, connection: str, reason: str
) -> None:
    sqlite_home.extract(ROWS)
    sqlite_home.configure(connection=connection)
    assert sqlite_home.refused(4).startswith(
        f"the database: {reason}\n"
        "Try: correct Driver= in connectionString, or install that driver; installed: "
    )


def test_connect_names_a_missing_package(
    sqlite_home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyodbc", None)
    with pytest.raises(sgsync.DatabaseError) as caught:
        opened(sqlite_home.database.connection_string).connect()
    requirements = Path(sgsync.__file__).with_name("requirements.txt")
    assert str(caught.value) == (
        "cannot load the ODBC package: import of pyodbc halted; None in sys.modules\n"
        f"Try: {sys.executable} -m pip install -r {requirements}"
    )


def test_packages_remedy_works_as_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In this Python, from any folder, however the folder of the script is called."""
    folder = tmp_path / "a folder's (name)"
    folder.mkdir()
    (folder / "requirements.txt").write_text("no-such-package @ file:///nowhere\n")
    monkeypatch.setattr(sgsync, "SCRIPT", folder / "sgsync.py")
    ended = subprocess.run(
        f"{sgsync.packages_remedy()} --no-index --disable-pip-version-check",
        shell=True, cwd="/", capture_output=True, encoding="utf-8", timeout=60, check=False,
    )  # fmt: skip
    assert f"Processing /nowhere (from -r {folder / 'requirements.txt'} (line 1))" in ended.stdout


def test_connect_names_a_missing_unixodbc(
    sqlite: servers.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the loader words it on a machine without it."""
    missing = "libodbc.so.2: cannot open shared object file: No such file or directory"

    class Loader(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "pyodbc":
                raise ImportError(missing)

    monkeypatch.delitem(sys.modules, "pyodbc")
    monkeypatch.setattr(sys, "meta_path", [Loader(), *sys.meta_path])
    with pytest.raises(sgsync.DatabaseError) as caught:
        opened(sqlite.connection_string).connect()
    assert str(caught.value) == (
        f"cannot load the ODBC package: {missing}\n"
        "Try: install unixODBC (sudo apt-get install unixodbc)"
    )


SLOW = "check the server and the network, or raise queryTimeoutSeconds on <Database>"
MSSQL = "[Microsoft][ODBC Driver 18 for SQL Server]"
RUN_PROCEDURES = (
    "run procedures.sql in the database sis, where sgsync looked for it, or correct "
    "connectionString if that is the wrong database"
)


@pytest.mark.parametrize(
    ("sqlstate", "text", "told", "remedy", "transient"),
    [
        (
            "HYT00", f"[HYT00] {MSSQL}Login timeout expired (0) (SQLDriverConnect)",
            "Login timeout expired", UP, True,
        ),
        (
            "08001", f"[08001] {MSSQL}TCP Provider: Error code 0x2749 (10057) (SQLDriverConnect)",
            "TCP Provider: Error code 0x2749", UP, True,
        ),
        (
            "28000", f"[28000] {MSSQL}[SQL Server]Login failed for user 'x'. (18456) "
            "(SQLDriverConnect)",
            "Login failed for user 'x'.",
            "check user, password and database in connectionString", False,
        ),
        (
            "08001", f"[08001] {MSSQL}SSL Provider: [error:0A000086:SSL routines::certificate "
            "verify failed:self-signed certificate] (-1) (SQLDriverConnect)",
            "SSL Provider: [error:0A000086:SSL routines::certificate verify failed:self-signed "
            "certificate]",
            "make this machine trust the issuer of the server's certificate, or add "
            "TrustServerCertificate=yes to connectionString", False,
        ),
        (
            "40001", f"[40001] {MSSQL}[SQL Server]Transaction (Process ID 52) was deadlocked on "
            "lock resources with another process and has been chosen as the deadlock victim. "
            "Rerun the transaction. (1205) (SQLExecDirectW)",
            "Transaction (Process ID 52) was deadlocked on lock resources with another process "
            "and has been chosen as the deadlock victim. Rerun the transaction.", "", True,
        ),
        (
            "08S01", f"[08S01] {MSSQL}TCP Provider: Error code 0x68 (104) (SQLExecDirectW)",
            "TCP Provider: Error code 0x68", UP, True,
        ),
        (
            "42000", f"[42000] {MSSQL}[SQL Server]Could not find stored procedure 'dbo.p'. (2812) "
            "(SQLExecDirectW)",
            "Could not find stored procedure 'dbo.p'.", RUN_PROCEDURES, False,
        ),
        (
            "HYT00", f"[HYT00] {MSSQL}Query timeout expired (0) (SQLExecDirectW)",
            "Query timeout expired", SLOW, False,
        ),
        (
            "42S02", f"[42S02] {MSSQL}[SQL Server]Invalid object name 'dbo.certificates'. (208) "
            "(SQLExecDirectW)",
            "Invalid object name 'dbo.certificates'.",
            "correct the SQL or the names in config.xml, or run procedures.sql", False,
        ),
        (
            "42000", f"[42000] {MSSQL}[SQL Server]The SELECT permission was denied on the object "
            "'IEP', database 'sis', schema 'samegoal'. (229) (SQLExecDirectW)",
            "The SELECT permission was denied on the object 'IEP', database 'sis', schema "
            "'samegoal'.", "grant SELECT on samegoal.IEP to sgsync's database user", False,
        ),
        ("", "", "the driver gave no reason", "", False),
    ],
)  # fmt: skip
def test_translated_tells_what_sql_server_says(
    sqlstate: str, text: str, told: str, remedy: str, transient: bool
) -> None:
    """As Microsoft's driver words it, where no server of theirs is at hand."""
    database = opened("x")
    database._place = "the database sis"
    error = database._translated("subject", pyodbc.Error(sqlstate, text))
    assert (error.message, error.remedy) == (f"subject: {told}", remedy)
    assert (error.sqlstate, error.transient) == (sqlstate, transient)


# ------------------------------------------------------------------ queries


BAD_QUERIES = {
    "sqlite": ("no such table: nowhere (1)", ""),
    "postgresql": (
        'ERROR: relation "nowhere" does not exist',
        "\nTry: correct the SQL or the names in config.xml, or run procedures.sql",
    ),
    "mssql": (
        "Invalid object name 'nowhere'.",
        "\nTry: correct the SQL or the names in config.xml, or run procedures.sql",
    ),
}


def test_export_tells_which_query_failed(home: homes.Home) -> None:
    home.extract(ROWS)
    query(home, "SELECT * FROM nowhere")
    reason, remedy = BAD_QUERIES[home.database.kind]
    assert home.refused(4) == f"{QUERY}: {reason}{remedy}"
    assert not list(home.run.glob("ic/*"))


def test_export_of_no_rows_is_an_error_and_changes_nothing(home: homes.Home) -> None:
    """Someone has put an UPDATE into <Query>."""
    home.extract(ROWS)
    home.sis(ROWS[:1])
    query(home, "UPDATE iep SET manager = 'changed'")
    assert home.refused(4) == (f"{QUERY}: returns no columns\nTry: write a SELECT")


def test_export_sees_an_error_behind_many_rows(postgres_home: homes.Home) -> None:
    postgres_home.extract(ROWS)
    query(postgres_home, "SELECT 1 / (5000 - i) AS n FROM generate_series(1, 6000) AS i")
    assert postgres_home.refused(4) == f"{QUERY}: ERROR: division by zero"
    assert not list(postgres_home.run.glob("ic/*"))


def test_export_takes_the_first_result_with_columns(
    postgres: servers.Database, tmp_path: Path
) -> None:
    postgres.execute("CREATE TABLE t (a integer)")
    sql = "INSERT INTO t VALUES (1); SELECT a FROM t; SELECT 2 AS b"
    assert exported(postgres, sql, tmp_path / "x.csv") == "a\n1"


def test_export_is_given_up_after_the_query_timeout(postgres_home: homes.Home) -> None:
    postgres_home.extract(ROWS)
    postgres_home.configure(database='queryTimeoutSeconds="1"')
    query(postgres_home, "SELECT pg_sleep(60)")
    assert postgres_home.refused(4) == (
        f"{QUERY}: no answer from the database for 1 s\nTry: {SLOW}"
    )
    assert not active(postgres_home, "pg_sleep")


def active(home: homes.Home, text: str) -> list[Any]:
    """Statements that the server still works on."""
    return home.database.rows(
        "SELECT query FROM pg_stat_activity WHERE state = 'active' AND query LIKE ? "
        "AND pid <> pg_backend_pid()",
        f"%{text}%",
    )


def test_execute_is_given_up_where_even_cancelling_has_no_effect(
    postgres: servers.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sgsync, "CANCEL_SECONDS", 0.1)
    monkeypatch.setattr(sgsync.Database, "_interrupt", lambda _: None)
    with opened(postgres.connection_string, query_timeout_seconds=1) as database:
        with pytest.raises(sgsync.DatabaseError) as caught:
            database.execute("subject", "SELECT pg_sleep(3)")
        assert caught.value.message == "subject: no answer from the database for 1 s"
        database.execute("subject", "SELECT 1")  # on a connection of its own


def make_once(home: homes.Home, what: str) -> None:
    """A function `once()` that does `what` the first time it is called, in any session."""
    home.database.execute("CREATE SEQUENCE calls")
    home.database.execute(
        "CREATE FUNCTION once() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN "
        f"IF nextval('calls') = 1 THEN {what}; END IF; RETURN true; END $$"
    )


KILL = "PERFORM pg_terminate_backend(pg_backend_pid())"
DEADLOCK = "RAISE EXCEPTION 'deadlock detected' USING ERRCODE = '40P01'"


@pytest.mark.parametrize("what", [KILL, DEADLOCK])
def test_export_is_tried_again(postgres_home: homes.Home, what: str) -> None:
    postgres_home.extract(ROWS[:1])
    postgres_home.sis(ROWS)
    make_once(postgres_home, what)
    query(postgres_home, postgres_home.values["query"].replace("ORDER", "WHERE once() ORDER"))
    assert postgres_home.main() == 0
    assert postgres_home.log.count("trying again") == 1
    assert postgres_home.sis_rows() == ROWS[:1]


def test_export_ends_where_the_server_is_gone_for_good(
    postgres_home: homes.Home, postgres_server: servers.Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgres_home.extract(ROWS)
    export = sgsync.export

    def crash_first(*args: Any) -> int:
        postgres_server.stop(immediate=True)
        return export(*args)

    monkeypatch.setattr(sgsync, "export", crash_first)
    assert postgres_home.failed(4).endswith(UNREACHABLE)
    postgres_server.start()
    assert postgres_home.sis_rows() == []


# ------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (True, "1"),
        (False, "0"),
        (0, "0"),
        (-12, "-12"),
        (decimal.Decimal("0E-10"), "0.0000000000"),
        (decimal.Decimal("1E+5"), "100000"),
        (decimal.Decimal("-12.50"), "-12.50"),
        (1.0, "1"),
        (0.1, "0.1"),
        (-2.5, "-2.5"),
        (1e-7, "0.0000001"),
        (1e22, "10000000000000000000000"),
        (datetime.date(2026, 1, 5), "2026-01-05"),
        (datetime.date(50, 1, 5), "0050-01-05"),
        (datetime.datetime(2026, 1, 5, 8, 30), "2026-01-05T08:30:00"),
        (datetime.datetime(2026, 1, 5, 8, 30, 0, 120000), "2026-01-05T08:30:00.120000"),
        (datetime.time(8, 30), "08:30:00"),
        (b"\x00\xff", "00ff"),
        (bytearray(b"\x01"), "01"),
        ("Núñez", "Núñez"),
    ],
)
def test_to_text_has_one_form_for_each_value(value: object, text: str) -> None:
    assert sgsync.to_text(value) == text


def test_to_text_writes_dates_as_the_other_side_does() -> None:
    assert sgsync.to_text(datetime.date(2026, 1, 5), "%m/%d/%Y") == "01/05/2026"
    assert sgsync.to_text(datetime.datetime(2026, 1, 5, 8, 30), "%m/%d/%Y %H:%M") == (
        "01/05/2026 08:30"
    )
    assert sgsync.to_text(datetime.time(8, 30), "%m/%d/%Y") == "08:30:00"


def by_csv_writer(rows: Sequence[Sequence[object]], date_format: str | None) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([[sgsync.to_text(v, date_format) for v in row] for row in rows])
    return text.getvalue().encode()


def columns_of(values: st.SearchStrategy[object]) -> st.SearchStrategy[list[list[object]]]:
    return st.integers(1, 4).flatmap(
        lambda width: st.lists(
            st.lists(values, min_size=width, max_size=width), min_size=1, max_size=5
        )
    )


PLAIN = st.text(st.characters(categories=["L", "N", "P"], exclude_characters=',"'), max_size=4)
HARD_TEXT = st.text(st.sampled_from('a,"\r\n é😀 \0'), max_size=4)
VALUES = st.one_of(
    PLAIN, HARD_TEXT, st.none(), st.booleans(), st.integers(), st.decimals(), st.dates(),
    st.datetimes(), st.times(), st.binary(max_size=3), st.floats(allow_nan=False),
)  # fmt: skip


@given(
    rows=st.one_of(map(columns_of, (PLAIN, HARD_TEXT, st.none() | PLAIN, st.dates(), VALUES))),
    date_format=st.sampled_from([None, "%m/%d/%Y"]),
)
def test_csv_lines_are_those_of_csv_writer(
    rows: list[list[object]], date_format: str | None
) -> None:
    assert sgsync.csv_lines(rows, date_format) == by_csv_writer(rows, date_format)


TYPES = {
    "sqlite": (
        "CREATE TABLE t (a integer, b varchar(9), c date, d float, e blob, f bigint, g varchar(9))",
        "INSERT INTO t VALUES (1, 'x', '2026-01-05', 1.5, x'00ff', 9007199254740993, NULL)",
        "SELECT * FROM t",
        "a|b|c|d|e|f|g\n1|x|2026-01-05|1.5|00ff|9007199254740993|",
    ),
    "postgresql": (
        "CREATE TABLE t (a integer, b text, c date, d timestamp, e numeric(20, 10), f float8, "
        "g boolean, h bytea, i time, j bigint, k text, l numeric, m char(4))",
        r"INSERT INTO t VALUES (1, 'x', '2026-01-05', '2026-01-05 08:30', 0, 1e-7, true, '\x00ff', "
        "'08:30', 9007199254740993, NULL, 12.50, 'ab')",
        "SELECT * FROM t",
        "a|b|c|d|e|f|g|h|i|j|k|l|m\n"
        "1|x|2026-01-05|2026-01-05T08:30:00|0.0000000000|0.0000001|1|00ff|08:30:00|"
        "9007199254740993||12.50|ab  ",
    ),
    "mssql": (
        "CREATE TABLE t (a int, b nvarchar(9), c date, d datetime, e decimal(20, 10), f float, "
        "g bit, h varbinary(9), i time(0), j bigint, k nvarchar(9), l numeric(9, 2), m nchar(4))",
        "INSERT INTO t VALUES (1, N'x', '20260105', '2026-01-05T08:30:00', 0, 1e-7, 1, 0x00ff, "
        "'08:30', 9007199254740993, NULL, 12.50, 'ab')",
        "SELECT * FROM t",
        "a|b|c|d|e|f|g|h|i|j|k|l|m\n"
        "1|x|2026-01-05|2026-01-05T08:30:00|0.0000000000|0.0000001|1|00ff|08:30:00|"
        "9007199254740993||12.50|ab  ",
    ),
}


def test_write_query_writes_each_type_in_one_format(
    database: servers.Database, tmp_path: Path
) -> None:
    create, insert, select, text = TYPES[database.kind]
    database.execute(create)
    database.execute(insert)
    assert exported(database, select, tmp_path / "x.csv") == text


def test_write_query_writes_dates_as_wanted(database: servers.Database, tmp_path: Path) -> None:
    database.execute("CREATE TABLE t (a date)")
    database.execute("INSERT INTO t VALUES ('2026-01-05')")
    database.execute("INSERT INTO t VALUES (NULL)")
    text = exported(database, "SELECT a FROM t ORDER BY a DESC", tmp_path / "x.csv", "%m/%d/%Y")
    assert sorted(text.split("\n")) == ["", "01/05/2026", "a"]


HARD = [
    'a "quoted" word, and a comma',
    "two\r\nlines",
    "one\nfeed",
    "Zoë Ñandú 😀 中文",
    "'; DROP TABLE iep; --",
    "x" * 200_000,
    "  blanks  ",
    "\ttab",
]


def test_write_query_keeps_every_character(database: servers.Database, tmp_path: Path) -> None:
    kind = "nvarchar(max)" if database.kind == "mssql" else "text"
    database.execute(f"CREATE TABLE t (n integer, v {kind})")
    for number, value in enumerate(HARD):
        database.execute("INSERT INTO t VALUES (?, ?)", number, value)
    path = tmp_path / "x.csv"
    exported(database, "SELECT n, v FROM t ORDER BY n", path)
    assert path.read_bytes().startswith(b'n,v\r\n0,"a ""quoted"" word, and a comma"\r\n')
    with path.open(encoding="utf-8", newline="") as file:
        assert [row[1] for row in csv.reader(file)][1:] == HARD


AT_ONCE = sgsync.FETCH_ROWS * sgsync.FETCHES


@pytest.mark.parametrize(
    "count", [0, 1, sgsync.FETCH_ROWS, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 2 * AT_ONCE]
)
def test_write_query_counts_rows(sqlite: servers.Database, tmp_path: Path, count: int) -> None:
    sqlite.execute("CREATE TABLE t (n integer)")
    if count:
        sqlite.insert("t", [(number,) for number in range(count)])
    ticks: list[int] = []
    path = tmp_path / "x.csv"
    with opened(sqlite.connection_string) as connection:
        sql = "SELECT n FROM t ORDER BY n"
        assert sgsync.write_query(connection, "s", sql, path, ticks.append, None) == count
    assert sum(ticks) == count
    assert path.read_text().split() == ["n", *map(str, range(count))]


def test_query_options_bring_two_formats_together(postgres_home: homes.Home) -> None:
    """dateFormat, nullText, trim and sort: the same rows in two formats are no change."""
    home = postgres_home
    home.extract([("9", "01/05/2026", "LOCKED ", "NULL"), ("10", "01/06/2026", "OPEN", "Bob")])
    home.sis([("10", "2026-01-06", "OPEN", "Bob"), ("9", "2026-01-05", "LOCKED", "")])
    home.configure(diff='dateFormat="%m/%d/%Y" nullText="NULL" trim="true" sort="true"')
    query(
        home,
        'SELECT studentNumber AS "studentNumber", startDate::date AS "startDate", '
        'status::char(9) AS "status", manager AS "manager" FROM iep ORDER BY manager',
    )
    assert home.main() == 0
    assert home.summary["message"] == "nothing to do: both sides are equal"


# ------------------------------------------------------------------ what SQL Server is sent


class Recorder:
    """Stands for pyodbc's connection and cursor, where no SQL Server can be had."""

    description = None

    def __init__(self, driver: str) -> None:
        self.told = {
            pyodbc.SQL_DBMS_NAME: sgsync.MSSQL,
            pyodbc.SQL_DATABASE_NAME: "sis",
            pyodbc.SQL_DRIVER_NAME: driver,
        }
        self.sent: list[tuple[str, list[object], list[object] | None]] = []
        self.sizes: list[object] | None = None

    def getinfo(self, what: int) -> str:
        return self.told[what]

    def cursor(self) -> Recorder:
        return self

    def setinputsizes(self, sizes: list[object] | None) -> None:
        self.sizes = sizes

    def execute(self, sql: str, parameters: Sequence[object]) -> None:
        self.sent.append((sql, list(parameters), self.sizes))

    def nextset(self) -> bool:
        return False

    def commit(self) -> None:
        self.sent.append(("commit", [], None))

    rollback = close = commit


SHORT = (pyodbc.SQL_WVARCHAR, 4000, 0)
NTEXT = (pyodbc.SQL_WLONGVARCHAR, 2**30 - 1, 0)
MAX = (pyodbc.SQL_WVARCHAR, 0, 0)


@pytest.mark.parametrize(
    ("driver", "long"),
    [
        ("libmsodbcsql-18.6.so.2.1", MAX),
        ("msodbcsql17.dll", MAX),
        ("SQLNCLI11.DLL", MAX),
        ("libtdsodbc.so", NTEXT),
        ("SQLSRV32.DLL", NTEXT),
    ],
)
def test_calls_give_sql_server_the_type_of_every_parameter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: str, long: tuple[int, int, int]
) -> None:
    """Of NULL, too: without, Microsoft's driver asks the server about each of them."""
    recorder = Recorder(driver)
    monkeypatch.setattr(pyodbc, "connect", lambda *_, **__: recorder)
    calls = {"insert": sgsync.Call(procedure="[my schema].p")}
    columns = ("id", "note")
    key = sgsync.Key(["id"], columns, "a.csv")
    found = sgsync.Comparison(sgsync.SqlDiff(file="a.csv", calls=calls), columns, key)
    failures = sgsync.Failures(tmp_path, 0)
    with opened("x") as database:
        tally = sgsync.Tally()
        applier = sgsync.Applier(database, found, "insert", tally, failures)
        applier.apply([("1", ""), ("2", "x" * 2000), ("3", "😀" * 2001), *[("4", "")] * 48])
        sent = recorder.sent.copy()
    assert tally.applied == 51
    call_text = "EXEC [my schema].p ?, ?"
    (sql, values, types), (rest, *_), (commit, *_) = sent
    assert sql == "\n;\n".join([call_text] * 50) + "\n;"
    assert rest == call_text + "\n;"
    assert commit == "commit"
    assert values[:6] == ["1", pyodbc.BinaryNull, "2", "x" * 2000, "3", "😀" * 2001]
    assert values[6:] == ["4", pyodbc.BinaryNull] * 47
    assert types == [*[SHORT] * 5, long, *[SHORT] * 94]


@pytest.mark.parametrize(
    ("sql", "on_sql_server", "on_postgresql"),
    [
        ("{CALL p}", "EXEC p", "CALL p()"),
        (" { call dbo.p ( ?, 'a)' ) } ", "EXEC dbo.p ?, 'a)'", "CALL dbo.p(?, 'a)')"),
        ("{CALL [a b].[c(d](?)}", "EXEC [a b].[c(d] ?", "CALL [a b].[c(d](?)"),
        ('{CALL "a b"(?)}', 'EXEC "a b" ?', 'CALL "a b"(?)'),
        ("SELECT '{CALL p}'", "SELECT '{CALL p}'", "SELECT '{CALL p}'"),
    ],
)
def test_spelled_writes_a_call_as_each_database_wants_it(
    sql: str, on_sql_server: str, on_postgresql: str
) -> None:
    database = opened("x")
    assert database.spelled(sql) == sql
    for database.name, wanted in (
        (sgsync.MSSQL, on_sql_server), (sgsync.POSTGRESQL, on_postgresql)
    ):  # fmt: skip
        assert database.spelled(sql) == wanted


# ------------------------------------------------------------------ waiting


def test_finished_tells_the_end_a_failure_and_the_time() -> None:
    gate = threading.Event()
    workers = sgsync.Worker("one"), sgsync.Worker("two")
    slow = workers[0].submit(gate.wait)
    assert not sgsync.finished([slow], 0.01)
    failing = workers[1].submit(lambda: 1 / 0)
    assert sgsync.finished([slow, failing])  # although the first one still works
    assert isinstance(failing.exception(), ZeroDivisionError)
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(sgsync.CancelledError):
        sgsync.finished([slow], 10, cancelled)
    gate.set()
    assert sgsync.finished([slow], 10)
    for worker in workers:
        worker.end()
        worker.join(10)
        assert not worker.is_alive()


def test_together_waits_for_the_one_that_it_cancels() -> None:
    stop, events = threading.Event(), list[str]()

    def work() -> None:
        stop.wait(10)
        time.sleep(0.02)
        events.append("ended")

    def fail() -> int:
        raise sgsync.DataError("first")

    with pytest.raises(sgsync.DataError, match="first"):
        sgsync.together(fail, work, lambda: (events.append("cancelled"), stop.set()))
    assert events == ["cancelled", "ended"]
    assert sgsync.together(lambda: 7, lambda: events.append("both"), stop.set) == 7
    assert events[2:] == ["both"]


# ------------------------------------------------------------------ statements


def test_statements_run_in_order_with_and_without_a_file(home: homes.Home) -> None:
    home.extract(ROWS)
    home.configure(
        upload="""
        <SQL>UPDATE iep SET manager = 'Eve' WHERE studentNumber = '1001'</SQL>
        <SQL file="open_records.csv"><![CDATA[
          SELECT studentNumber AS "studentNumber", manager AS "manager" FROM iep
          WHERE manager <> '<x>' ORDER BY studentNumber]]></SQL>
        <SQL>DELETE FROM iep</SQL>
        <SQL file="none.csv">SELECT manager AS "manager" FROM iep</SQL>"""
    )
    assert home.main() == 0
    assert home.sis_rows() == []
    text = "studentNumber,manager\r\n1001,Eve\r\n1002,Bob\r\n"
    assert (home.run / "open_records.csv").read_bytes().decode() == text
    assert (home.run / "none.csv").read_bytes() == b"manager\r\n"
    assert home.pushed()["open_records.csv"].decode() == text
    assert home.summary["statement_files"] == {"open_records.csv": 2, "none.csv": 0}
    first, second = home.line("<SQL>"), home.line("<SQL file")
    assert f"statement 1 of <Upload> (config.xml:{first}): done" in home.log
    assert f"statement 2 of <Upload> (config.xml:{second}), open_records.csv: done" in home.log


CLEAN_UP = {
    "postgresql": [
        "CREATE PROCEDURE clean_up() LANGUAGE sql AS 'DELETE FROM iep'",
        "CREATE PROCEDURE clean_one(n text) LANGUAGE sql "
        "AS 'DELETE FROM iep WHERE studentNumber = n'",
    ],
    "mssql": [
        "CREATE PROCEDURE clean_up AS DELETE FROM iep",
        "CREATE PROCEDURE clean_one @n nvarchar(9) AS DELETE FROM iep WHERE studentNumber = @n",
    ],
}


@pytest.fixture(params=["postgres", "mssql"])
def procedures_home(request: pytest.FixtureRequest, tmp_path: Path) -> homes.Home:
    """A home in front of each database that has procedures."""
    database = request.getfixturevalue(request.param)
    sshd, sftp_root = map(request.getfixturevalue, ("sshd_server", "sftp_root"))
    return homes.Home(tmp_path / "home", sshd, sftp_root, database)


@pytest.mark.parametrize(
    ("call", "left"),
    [
        ("{CALL clean_up}", []),
        ("{call clean_up()}", []),
        (" { CALL clean_one('1001') } ", ROWS[1:]),
    ],
)
def test_statements_take_odbc_calls(procedures_home: homes.Home, call: str, left: Any) -> None:
    home = procedures_home
    home.extract(ROWS)
    for statement in CLEAN_UP[home.database.kind]:
        home.database.execute(statement)
    home.configure(upload=f"<SQL>{call}</SQL>")
    assert home.main() == 0
    assert home.sis_rows() == left


ERROR_BEHIND = "INSERT INTO iep VALUES ('x', 'y', 'z', ''); SELECT 1 AS a; SELECT 1 / 0 AS b"


@pytest.mark.parametrize(("file", "named"), [("", ""), (' file="a.csv"', ", a.csv")])
def test_statements_see_an_error_behind_the_first_result(
    postgres_home: homes.Home, file: str, named: str
) -> None:
    home = postgres_home
    home.extract(ROWS)
    home.configure(upload=f"<SQL>SELECT 1</SQL><SQL{file}>{ERROR_BEHIND}</SQL>")
    assert home.failed(4) == (
        f"statement 2 of <Upload> (config.xml:{home.line('<Upload>')}){named}: "
        "ERROR: division by zero"
    )
    assert home.sis_rows() == ROWS  # what was applied before stays; the statement is undone
    assert not (home.run / "a.csv").exists()
    assert not list((home.sftp_root / "upload").iterdir())


def test_statements_read_several_results(postgres_home: homes.Home) -> None:
    postgres_home.extract(ROWS)
    many = "SELECT 1 AS a; SELECT 2 AS b; DELETE FROM iep; SELECT 3 AS c"
    postgres_home.configure(upload=f'<SQL>{many}</SQL><SQL file="a.csv">{many}</SQL>')
    assert postgres_home.main() == 0
    assert (postgres_home.run / "a.csv").read_bytes() == b"a\r\n1\r\n"
    assert postgres_home.sis_rows() == []


@pytest.mark.parametrize(("what", "file"), [(KILL, ' file="a.csv"'), (DEADLOCK, "")])
def test_statements_are_tried_again(postgres_home: homes.Home, what: str, file: str) -> None:
    postgres_home.extract(ROWS)
    make_once(postgres_home, what)
    postgres_home.configure(upload=f"<SQL{file}>SELECT once() AS o</SQL>")
    assert postgres_home.main() == 0
    assert postgres_home.log.count("trying again") == 1


def test_statements_with_a_file_must_select(home: homes.Home) -> None:
    home.extract(ROWS)
    home.configure(upload='<SQL file="a.csv">DELETE FROM iep</SQL>')
    assert home.failed(4) == (
        f"statement 1 of <Upload> (config.xml:{home.line('<SQL ')}), a.csv: returns no columns\n"
        "Try: write a SELECT"
    )
    assert home.sis_rows() == ROWS


def test_statements_find_a_connection_that_was_lost_meanwhile(
    postgres_home: homes.Home, postgres_server: servers.Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgres_home.extract(ROWS)
    postgres_home.configure(upload="<SQL>DELETE FROM iep</SQL>")
    statements = sgsync.run_statements

    def restart_first(*args: Any) -> dict[str, int]:
        postgres_server.restart()
        return statements(*args)

    monkeypatch.setattr(sgsync, "run_statements", restart_first)
    assert postgres_home.main() == 0
    assert postgres_home.sis_rows() == []
