"""PowerSchool for tests, demo and benchmark: its tables, an embedded database, a counting wire.

`PowerSchool` holds the tables that `sgsync.py schoolinks` reads in an embedded database (SQLite).
It answers behind the interface of `sgsync.Oracle`, which is what it stands in for:

    powerschool = PowerSchool()
    powerschool.insert("students", [STUDENT | {"student_number": 1001, "id": 1, "dcid": 1}])
    sgsync.Oracle = powerschool.connection

No pytest in here: scripts use this module too.
"""

from __future__ import annotations

import contextlib
import datetime
import select
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sgsync

# Types that Oracle and SQLite both take, and that give the same Python types on both.
TABLES = {
    "students": "student_number NUMBER(10), id NUMBER(10), dcid NUMBER(10), fteid NUMBER(10), "
    "enroll_status NUMBER(5), grade_level NUMBER(5), schoolid NUMBER(10), "
    "lastfirst VARCHAR2(60), state_studentnumber VARCHAR2(32)",
    "u_def_ext_students0": "studentsdcid NUMBER(10), simple_gpa FLOAT, weighted_gpa FLOAT",
    "s_il_stu_x": "studentsdcid NUMBER(10), iep NUMBER(1), lep NUMBER(1), lii NUMBER(1)",
    "s_il_stu_plan504_x": "studentsdcid NUMBER(10), participant NUMBER(1)",
    "s_stu_crdc_x": "studentsdcid NUMBER(10), giftedtalentedprograms_yn VARCHAR2(1)",
    "ps_adaadm_daily_ctod": "studentid NUMBER(10), fteid NUMBER(10), calendardate DATE, "
    "attendancevalue FLOAT, membershipvalue FLOAT",
}
TABLES["ps_adaadm_defaults_all"] = TABLES["ps_adaadm_daily_ctod"]
COLUMNS = {
    table: tuple(column.split()[0] for column in columns.split(", "))
    for table, columns in TABLES.items()
}
STUDENT = {"fteid": 70, "enroll_status": 0, "grade_level": 9, "schoolid": 100}
DAY = {"fteid": 70, "attendancevalue": 1.0, "membershipvalue": 1.0}

Record = Mapping[str, object]


def as_rows(table: str, records: Iterable[Record]) -> list[tuple[object, ...]]:
    """Records in the order of the table's columns; what they do not have is NULL."""
    return [tuple(record.get(column) for column in COLUMNS[table]) for record in records]


class PowerSchool:
    """The embedded database; `round_trips` counts as Oracle's driver would make them.

    seconds: added to each round trip
    logins: with whom the connections were opened
    queries: the SQL that was asked, in order
    fail: called before each query, to raise what a test wants
    """

    def __init__(self, path: Path | str = ":memory:") -> None:
        self.database = sqlite3.connect(path, check_same_thread=False)
        for table, columns in TABLES.items():
            self.database.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns})")
        self.round_trips, self.seconds = 0, 0.0
        self.logins: list[sgsync.OracleLogin] = []
        self.queries: list[str] = []
        self.fail: Callable[[str], None] = lambda _: None

    def insert(self, table: str, records: Iterable[Record]) -> None:
        marks = ", ".join("?" * len(COLUMNS[table]))
        rows = (tuple(_plain(value) for value in row) for row in as_rows(table, records))
        with self.database:
            self.database.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)

    def execute(self, sql: str, binds: Mapping[str, object] | None = None) -> list[Sequence[Any]]:
        """A statement of the test's own, without a round trip."""
        values = {name: _plain(value) for name, value in (binds or {}).items()}
        with self.database:
            return self.database.execute(sql, values).fetchall()

    def travel(self, count: int = 1) -> None:
        self.round_trips += count
        time.sleep(count * self.seconds)

    def connection(self, _: sgsync.SchooLinksSettings, login: sgsync.OracleLogin) -> Connection:
        """What stands in for `sgsync.Oracle(settings, login)`."""
        self.logins.append(login)
        return Connection(self)


class Connection:
    """Behind the interface of sgsync.Oracle."""

    def __init__(self, powerschool: PowerSchool) -> None:
        self._powerschool = powerschool

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def connect(self) -> None:
        self._powerschool.travel(5)

    def query(self, subject: str, sql: str, binds: Mapping[str, object]) -> list[Sequence[Any]]:
        self._powerschool.queries.append(sql)
        self._powerschool.fail(sql)
        try:
            rows = self._powerschool.execute(sql, binds)
        except sqlite3.Error as error:
            raise sgsync.DatabaseError(f"{subject}: {error}") from error
        self._powerschool.travel(1 + max(0, len(rows) - 1) // sgsync.ORACLE_ROWS)
        return rows


def _plain(value: object) -> object:
    """SQLite has no dates: text, which compares alike."""
    if isinstance(value, datetime.date):
        return datetime.datetime(*value.timetuple()[:6]).isoformat(" ")
    return value


class Wire:
    """A TCP proxy on loopback in front of one server; a context manager.

    dsn: where to connect instead of `host:port/service`
    round_trips: how often the server answered a client, counted by the changes of direction
    seconds: added to each round trip
    silent: True: nothing is passed on any more
    cut_after: cut a connection at this round trip of it, once
    """

    def __init__(self, dsn: str) -> None:
        address, _, self._service = dsn.partition("/")
        host, _, port = address.partition(":")
        self._server = host, int(port or 1521)
        self.round_trips, self.seconds, self.silent = 0, 0.0, False
        self.cut_after: int | None = None
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.dsn = f"127.0.0.1:{self._listener.getsockname()[1]}/{self._service}"
        self._ends: list[socket.socket] = []

    def __enter__(self) -> Wire:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for end in [self._listener, *self._ends]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(self._server)
                self.connections += 1
                self._ends += client, server
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pump, args=(client, server), daemon=True).start()

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        asked, trips = False, 0
        with client, server, contextlib.suppress(OSError, ValueError):
            while True:
                for end in select.select([client, server], [], [])[0]:
                    data = end.recv(1 << 16)
                    if not data:
                        return
                    if end is client and not asked:
                        time.sleep(self.seconds)
                        if self.cut_after and trips + 1 >= self.cut_after:
                            self.cut_after = None
                            return
                    elif end is server and asked:
                        trips += 1
                        self.round_trips += 1
                    asked = end is client
                    if not self.silent:
                        (server if asked else client).sendall(data)
