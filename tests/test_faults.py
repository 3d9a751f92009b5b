"""Kills, cuts and clocks: a sample of what `make faults` does at hundreds of points, and its tools.

What a full disk, a history that cannot be written, a lock and deadlocks do is tested where their
code is: test_history.py, test_apply.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import faults
import sgsync
from support import homes, proxy, servers
from support.worlds import RUNNER, SchoolWorld, SyncWorld, World

ROWS = [(str(n), "2026-01-05", "LOCKED", "Lee") for n in range(1001, 1006)]


# ------------------------------------------------------------------ points of a run


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
    sshd_server: servers.Sshd,
    postgres_server: servers.Postgres,
) -> Iterator[Sequence[World]]:
    sshd_server.start()
    postgres_server.start()
    folder = tmp_path_factory.mktemp("faults")
    homes_made = [
        SyncWorld(folder / f"{number}", sshd_server, postgres_server, rows=120)
        for number in range(3)
    ]
    with faults.closing(homes_made):
        yield homes_made


def run_points(made: Sequence[World], counts: dict[str, int]) -> list[faults.Outcome]:
    outcomes = faults.run_points(made, counts, 1, lambda _: None)
    assert not [problem for outcome in outcomes if (problem := faults.problem_of(outcome))]
    assert len(outcomes) == sum(counts.values())
    return outcomes


def test_run_killed_anywhere_loses_and_doubles_nothing(made: Sequence[World]) -> None:
    outcomes = run_points(made, {faults.KILL: 20})
    assert len({outcome.ended.stage for outcome in outcomes}) >= 4


def test_run_cut_off_anywhere_recovers_or_ends_in_order(made: Sequence[World]) -> None:
    outcomes = run_points(made, dict.fromkeys(faults.KINDS[1:4], 2))
    assert {outcome.ended.code for outcome in outcomes} <= {0, 3, 4}


def test_schoolinks_disturbed_anywhere_leaves_no_half_file(
    tmp_path: Path, sshd_server: servers.Sshd
) -> None:
    sshd_server.start()
    schools = [SchoolWorld(tmp_path / f"{number}", sshd_server) for number in range(2)]
    with faults.closing(schools):
        run_points(schools, {faults.SCHOOLINKS: 6})


def test_points_are_spread_over_the_whole_run(made: Sequence[World]) -> None:
    measured = made[0].measured or faults.measure(made[0])
    kills = list(faults.points(faults.KILL, 40, measured, faults.random.Random(1)))
    assert {point.how for point in kills} == {"line", "bytes", "file", "time"}
    lines = [point.number for point in kills if point.how == "line"]
    assert lines[0] == 1
    assert lines[-1] > measured.lines * 0.8
    for kind in (faults.CUT_SFTP, faults.CUT_DATABASE, faults.STALL):
        made = [point.fault for point in faults.points(kind, 8, measured, faults.random.Random(1))]
        assert {fault.lasting for fault in made if fault} == {False, True}


def test_a_world_shows_what_is_lost_and_what_is_doubled(made: Sequence[World]) -> None:
    """The harness itself: it must see what it looks for."""
    world = made[0]
    world.reset()
    assert world.lost() > 0
    assert world.run().code == 0
    assert (world.lost(), world.doubled(), world.strange()) == (0, 0, [])
    world.database.execute("INSERT INTO sp SELECT * FROM sp LIMIT 1")
    assert world.doubled() == 2  # the row, and the effect that it had
    epoch = world.root / "upload" / world.home.run.name
    (epoch / "ic/sp.csv").write_text("short")
    (epoch / "diff/sp.csv").unlink()
    assert sorted(world.halves()) == [
        f"upload/{epoch.name}/{name}: missing or short" for name in ("diff/sp.csv", "ic/sp.csv")
    ]


# ------------------------------------------------------------------ the proxy


@pytest.fixture
def echo() -> Iterator[proxy.Proxy]:
    """A proxy in front of a server that sends back what it gets."""

    def answer(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            while piece := client.recv(1000):
                client.sendall(piece)

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                client = listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=answer, args=(client,), daemon=True).start()

    with socket.create_server((proxy.HOST, 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        with proxy.Proxy(*listener.getsockname()) as made:
            yield made
        listener.shutdown(socket.SHUT_RDWR)


def said(made: proxy.Proxy, count: int) -> bytes | str:
    """What comes back of `count` bytes within a moment."""
    try:
        client = socket.create_connection((made.host, made.port), timeout=0.5)
    except ConnectionResetError:  # before connect() has returned
        return "0, then a reset"
    with client:
        received = b""
        try:
            client.sendall(b"x" * count)
            while len(received) < count:
                piece = client.recv(1000)
                if not piece:
                    return f"{len(received)}, then the end"
                received += piece
        except TimeoutError:
            return f"{len(received)}, then silence"
        except ConnectionError:
            return f"{len(received)}, then a reset"
        return received


def test_proxy_passes_everything_on(echo: proxy.Proxy) -> None:
    assert said(echo, 5000) == b"x" * 5000
    assert echo.passed == {"up": 5000, "down": 5000}
    echo.reset()
    assert echo.passed == {"up": 0, "down": 0}


@pytest.mark.parametrize("direction", proxy.DIRECTIONS)
def test_proxy_drops_after_bytes_once_or_for_good(echo: proxy.Proxy, direction: str) -> None:
    echo.fault = proxy.Fault("drop", direction, 700)
    assert said(echo, 5000) == "700, then a reset" or direction == "up"
    assert echo.struck
    assert said(echo, 50) == b"x" * 50
    echo.reset()
    echo.fault = proxy.Fault("drop", direction, 700, lasting=True)
    said(echo, 5000)
    assert said(echo, 50) == "0, then a reset"


@pytest.mark.parametrize("direction", proxy.DIRECTIONS)
def test_proxy_stalls_after_bytes_once_or_for_good(echo: proxy.Proxy, direction: str) -> None:
    echo.fault = proxy.Fault("stall", direction, 700)
    assert said(echo, 5000) == "700, then silence"
    assert said(echo, 50) == b"x" * 50
    echo.reset()
    echo.fault = proxy.Fault("stall", direction, 700, lasting=True)
    said(echo, 5000)
    assert said(echo, 50) == "0, then silence"


def test_proxy_slows(echo: proxy.Proxy) -> None:
    echo.fault = proxy.Fault("slow", "down", 0, rate=100_000, seconds=60)
    began = time.monotonic()
    assert said(echo, 20_000) == b"x" * 20_000
    assert time.monotonic() - began > 0.1


# ------------------------------------------------------------------ silent and slow networks


@pytest.fixture
def behind(postgres_home: homes.Home) -> Iterator[proxy.Proxy]:
    """A home with five rows to write, its database behind a proxy."""
    port = re.search(r"Port=(\d+)", postgres_home.values["connection"])
    assert port
    with proxy.Proxy(servers.HOST, int(port[1])) as made:
        connection = postgres_home.values["connection"].replace(port[0], f"Port={made.port}")
        postgres_home.configure(connection=connection, database='queryTimeoutSeconds="1"')
        postgres_home.extract(ROWS)
        yield made


def test_process_ends_where_the_database_falls_silent_for_good(
    behind: proxy.Proxy, postgres_home: homes.Home
) -> None:
    """The driver never returns; its thread must not keep the program from ending."""
    behind.fault = proxy.Fault("stall", "down", 900, lasting=True)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, "sync", "--home", str(postgres_home.path)],
        env={**os.environ, "PYTHONPATH": str(homes.SCRIPT.parent)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    assert "no answer from the database for 1 s" in done.stderr
    behind.reset()
    assert postgres_home.process().returncode == 0
    assert postgres_home.sis_rows() == ROWS


def test_apply_connects_again_where_the_idle_connection_is_dead(
    behind: proxy.Proxy, postgres_home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a firewall that forgot it during the download: no answer, and no error either."""
    monkeypatch.setattr(sgsync, "CONNECT_SECONDS", 1.0)
    compare = sgsync.compare

    def then_stall(*arguments: object) -> object:
        found = compare(*arguments)  # type: ignore[arg-type]
        behind.fault = proxy.Fault("stall", "up", behind.passed["up"])
        return found

    monkeypatch.setattr(sgsync, "compare", then_stall)
    assert postgres_home.main() == 0
    assert (
        "the database: no answer from the database for 1 s; connecting again" in postgres_home.log
    )
    assert postgres_home.sis_rows() == ROWS


def test_apply_stops_where_another_session_holds_a_lock(postgres_home: homes.Home) -> None:
    """No row is to blame, so none is counted as failed, and none behind it waits as long again."""
    home = postgres_home
    home.configure(database='queryTimeoutSeconds="1"')
    home.extract(ROWS)
    home.sis([(*row[:3], "Old") for row in ROWS])
    with home.database.connect(autocommit=False) as other:
        other.execute("UPDATE iep SET manager = 'Other' WHERE studentNumber = '1003'")
        assert home.failed(4).startswith(
            "iep.csv: update of studentNumber=1003, startDate=2026-01-05: sg_iep_upsert: no answer "
            "from the database for 1 s\n"
        )
        other.rollback()
    assert not (home.run / "failures.csv").exists()
    assert home.main() == 0
    assert home.sis_rows() == ROWS


def test_apply_does_not_blame_rows_for_a_server_side_time_out(postgres_home: homes.Home) -> None:
    home = postgres_home
    name = re.search(r"Database=(\w+)", home.database.connection_string)
    assert name
    home.database.execute(f'ALTER DATABASE "{name[1]}" SET statement_timeout = 300')
    home.database.execute(
        "CREATE OR REPLACE PROCEDURE sg_iep_upsert(n text, d text, s text, m text) "
        "LANGUAGE sql AS $$ SELECT pg_sleep(5) $$"
    )
    home.extract(ROWS)
    assert "canceling statement due to statement timeout" in home.failed(4)
    assert not (home.run / "failures.csv").exists()


# ------------------------------------------------------------------ procedures of their own mind


def test_apply_tells_of_a_procedure_that_commits_by_itself(postgres_home: homes.Home) -> None:
    """PostgreSQL allows that only outside of a transaction: all rows fail, nothing is half done."""
    home = postgres_home
    home.configure(limits='maxFailures="3"')
    home.database.execute(
        "CREATE OR REPLACE PROCEDURE sg_iep_upsert(n text, d text, s text, m text) "
        "LANGUAGE plpgsql AS $$ BEGIN INSERT INTO iep VALUES (n, d, s, m); COMMIT; END $$"
    )
    home.extract(ROWS)
    assert "sg_iep_upsert: ERROR: invalid transaction termination" in home.failed(4)
    assert home.sis_rows() == []


# ------------------------------------------------------------------ a clock that was set back


def set_clock(monkeypatch: pytest.MonkeyPatch, *epochs: str) -> None:
    """What strftime says, the last one from then on."""
    left = list(epochs)
    strftime = time.strftime

    def fake(pattern: str, *when: object) -> str:
        if pattern != "%Y%m%d-%H%M%S" or when:
            return strftime(pattern, *when)  # type: ignore[arg-type]
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(time, "strftime", fake)


def test_sync_waits_where_its_epoch_is_there(
    sqlite_home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock set back by an hour comes to a second that has a run already."""
    home = sqlite_home
    home.extract(ROWS)
    set_clock(monkeypatch, "20260105-020000")
    assert home.main() == 0
    before = (home.run / "sgi_log.txt").read_bytes()
    set_clock(monkeypatch, "20260105-020000", "20260105-020000", "20260105-020001")
    assert home.main() == 0
    assert [run.name for run in home.runs()] == ["20260105-020000", "20260105-020001"]
    assert (home.runs()[0] / "sgi_log.txt").read_bytes() == before


def test_sync_keeps_its_own_run_where_newer_ones_are_there(
    sqlite_home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = sqlite_home
    home.configure(history='<History keepRuns="2"/>')
    home.extract(ROWS)
    for epoch in ("20260105-020000", "20260106-020000", "20250101-000000"):
        set_clock(monkeypatch, epoch)
        assert home.main() == 0
    assert [run.name for run in home.runs()] == ["20250101-000000", "20260106-020000"]
    assert home.sis_rows() == ROWS


def test_sync_says_that_its_epoch_is_on_the_server_already(
    sqlite_home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another installation, or this one before its history was deleted."""
    home = sqlite_home
    home.extract(ROWS)
    there = home.sftp_root / "upload" / "20260105-020000"
    there.mkdir()
    (there / "other.csv").write_text("other")
    set_clock(monkeypatch, "20260105-020000")
    assert home.main() == 3
    assert "20260105-020000: already exists, perhaps from another installation" in home.log
    assert [path.name for path in there.iterdir()] == ["other.csv"]
    set_clock(monkeypatch, "20260105-020001")
    assert home.main() == 0


# ------------------------------------------------------------------ processes that died


def test_sync_takes_over_from_a_process_that_died(sqlite_home: homes.Home) -> None:
    """Its lock went with it; the note of who held it, and half-written files, mean nothing."""
    home = sqlite_home
    home.extract(ROWS)
    dead = home.path / "history" / "20260105-020000"
    (dead / "ia").mkdir(parents=True)
    (dead / "ia/iep.csv").write_text("half a fi")
    (dead / "ia/iep.csv.part").write_text("half a fi")
    history = dead.parent
    (history / "sync.lock").touch()
    (history / "sync.lock.json").write_text('{"pid": 1, "since": "long ago", "epoch": "x"}')
    assert home.main() == 0
    assert home.sis_rows() == ROWS
    assert not (history / "sync.lock.json").exists()
    assert [path.name for path in (home.sftp_root / "upload").iterdir()] == [home.run.name]
    assert not [name for name in home.pushed() if name.endswith(".part")]
    assert sorted(p.name for p in Path(dead / "ia").iterdir()) == ["iep.csv", "iep.csv.part"]
