"""The nightly run, end to end, against real servers: nights, dry runs, limits, bad input."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import sgsync
from support import homes

pytestmark = pytest.mark.usefixtures("short_pauses")

SOURCE = [
    ("1001", "2026-01-05", "LOCKED", '"Núñez, Ana"'),
    ("1002", "2026-01-06", "LOCKED", "Lee"),
    ("1003", "2026-01-07", "LOCKED", ""),
]
STORED = [(*SOURCE[0][:3], "Núñez, Ana"), *SOURCE[1:]]
SIS = [("1002", "2026-01-06", "OPEN", "Lee"), ("1009", "2026-01-09", "LOCKED", "Gone")]


@pytest.fixture
def differing(sqlite_home: homes.Home) -> homes.Home:
    """A home with an extract and a SIS that differ in one row each way."""
    sqlite_home.extract(SOURCE)
    sqlite_home.sis(SIS)
    return sqlite_home


# ------------------------------------------------------------------ nights


def test_sync_first_load_changes_on_both_sides_and_a_quiet_night(home: homes.Home) -> None:
    home.extract(SOURCE)
    home.configure(upload='<SQL file="open_records.csv">SELECT 1 AS "one"</SQL>')
    assert home.main() == 0
    assert home.sis_rows() == STORED
    assert home.summary["message"] == "3 rows inserted, 0 rows updated, 0 rows deleted"

    home.database.execute("UPDATE iep SET status = 'OPEN' WHERE studentNumber = '1001'")
    edited = [SOURCE[0], (*SOURCE[1][:3], "Kim"), ("1004", "2026-01-08", "LOCKED", "New")]
    home.extract(edited, epoch="20260102-020000")
    assert home.main() == 0
    assert home.sis_rows() == [STORED[0], *edited[1:]]
    assert home.summary["message"] == "1 row inserted, 2 rows updated, 1 row deleted"
    changes = (home.run / "diff/iep.csv").read_text(encoding="utf-8").splitlines()
    assert changes == [
        "operation,before_studentNumber,before_startDate,before_status,before_manager,"
        "after_studentNumber,after_startDate,after_status,after_manager",
        'update,1001,2026-01-05,OPEN,"Núñez, Ana",1001,2026-01-05,LOCKED,"Núñez, Ana"',
        "update,1002,2026-01-06,LOCKED,Lee,1002,2026-01-06,LOCKED,Kim",
        "delete,1003,2026-01-07,LOCKED,,,,,",
        "insert,,,,,1004,2026-01-08,LOCKED,New",
    ]

    assert home.main() == 0
    assert home.summary["message"] == "nothing to do: both sides are equal"
    assert len(list((home.sftp_root / "upload").iterdir())) == 3


def test_sync_pushes_what_it_keeps(home: homes.Home) -> None:
    home.extract(SOURCE)
    home.configure(upload='<SQL file="open_records.csv">SELECT 1 AS "one"</SQL>')
    assert home.main() == 0
    pushed = home.pushed()
    assert sorted(pushed) == [
        "COMPLETE", "diff/iep.csv", "ia/iep.csv", "ic/iep.csv", "manifest.json",
        "open_records.csv", "report.html", "sgi_log.txt", "summary.json",
    ]  # fmt: skip
    log = pushed.pop("sgi_log.txt")  # the log goes on while it is pushed
    assert (home.run / "sgi_log.txt").read_bytes().startswith(log)
    assert log.count(b"\n") >= 7
    for name, content in pushed.items():
        assert content == (home.run / name).read_bytes(), name
    assert pushed["ia/iep.csv"] == homes.csv_text(SOURCE).encode()
    assert json.loads(pushed["summary.json"])["outcome"] == "complete"


def test_sync_as_a_process_prints_its_summary(differing: homes.Home, tmp_path: Path) -> None:
    done = differing.process("--json", cwd=tmp_path)  # from any working directory
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == differing.summary
    assert "complete: 2 rows inserted, 1 row updated, 1 row deleted" in done.stderr


def test_sync_dry_run_writes_nothing(home: homes.Home) -> None:
    home.extract(SOURCE)
    home.sis(SIS)
    before = home.sis_rows()
    home.configure(upload="<SQL>DELETE FROM iep</SQL>", history='<History keepRuns="1"/>')
    (home.path / "history/20200101-000000").mkdir(parents=True)
    assert home.main("sync", "--dry-run") == 0
    assert home.sis_rows() == before
    assert not list((home.sftp_root / "upload").iterdir())
    left = sorted(path.relative_to(home.run).as_posix() for path in home.run.rglob("*"))
    assert left == [
        "diff", "diff/iep.csv", "ia", "ia/iep.csv", "ic", "ic/iep.csv", "manifest.json",
        "report.html", "sgi_log.txt", "summary.json",
    ]  # fmt: skip
    assert home.summary["outcome"] == "dry run"
    assert home.summary["message"] == (
        "2 rows would be inserted, 1 row would be updated, 1 row would be deleted"
    )
    assert len(home.runs()) == 2
    dry = (home.run / "diff/iep.csv").read_bytes()
    assert home.main() == 0
    assert (home.run / "diff/iep.csv").read_bytes() == dry


def test_sync_gives_up_one_side_where_the_other_has_failed(postgres_home: homes.Home) -> None:
    """Where the download fails, an export that would take minutes is cancelled."""
    home = postgres_home
    home.configure(query="SELECT pg_sleep(300)")
    message = home.refused(3)
    assert "contains no epoch directory" in message
    assert home.log.count("ERROR") == 1
    sleeping = (
        "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND pid <> pg_backend_pid()"
    )
    for _ in range(500):
        if not home.database.rows(sleeping):
            break
        time.sleep(0.02)
    assert not home.database.rows(sleeping)


def test_sync_gives_up_the_download_where_the_export_has_failed(home: homes.Home) -> None:
    home.extract(files={"iep.csv": GOOD, "big.csv": "x" * 20_000_000})
    home.configure(query="nonsense")
    assert home.refused(4).startswith(f"ic/iep.csv: the query (config.xml:{home.line('<SQLDiff')})")
    assert "trying again" not in home.log


# ------------------------------------------------------------------ limits


def rows(count: int, status: str = "LOCKED") -> list[homes.Row]:
    return [(f"{number:04}", "2026-01-05", status, "Lee") for number in range(count)]


@pytest.mark.parametrize(
    ("limits", "deletes", "updates", "reason"),
    [
        ('maxDeletes="2"', 2, 0, ""),
        ('maxDeletes="2"', 3, 0, "3 deletes of 20 rows, maxDeletes is 2"),
        ('maxDeletes="0"', 1, 0, "1 delete of 20 rows, maxDeletes is 0"),
        ('maxDeletes="10%"', 2, 0, ""),
        ('maxDeletes="10%"', 3, 0, "3 deletes of 20 rows, maxDeletes is 10%"),
        ('maxDeletes="0%"', 1, 0, "1 delete of 20 rows, maxDeletes is 0%"),
        ('maxDeletes="12.5%"', 3, 0, "3 deletes of 20 rows, maxDeletes is 12.5%"),
        ('maxUpdates="5"', 0, 5, ""),
        ('maxUpdates="5"', 0, 6, "6 updates of 20 rows, maxUpdates is 5"),
        ('maxUpdates="25%"', 0, 5, ""),
        ('maxUpdates="25%"', 0, 6, "6 updates of 20 rows, maxUpdates is 25%"),
        ('maxUpdates="100%"', 0, 20, ""),
    ],
)
def test_over_limits_counts_rows_or_percent(
    tmp_path: Path, limits: str, deletes: int, updates: int, reason: str
) -> None:
    name, value = limits.rstrip('"').split('="')
    field = {"maxDeletes": "max_deletes", "maxUpdates": "max_updates"}[name]
    allowed = sgsync.Limits(max_deletes=sgsync.Parse.limit("100%"))
    allowed = sgsync.dataclasses.replace(allowed, **{field: sgsync.Parse.limit(value)})
    spec = sgsync.SqlDiff(file="iep.csv", key=("studentNumber",))
    source = rows(20)[deletes:]
    source[:updates] = [(*row[:3], "Kim") for row in source[:updates]]
    paths = [tmp_path / side / "iep.csv" for side in ("ia", "ic")]
    for path, content in zip(paths, (source, rows(20)), strict=True):
        path.parent.mkdir()
        path.write_text(homes.csv_text(content))
    comparison = sgsync.compare(*paths, tmp_path / "iep.csv", spec)
    found = sgsync.over_limits([comparison], allowed, {}, None)
    begin = "; they begin with studentNumber=0000"
    told = [excess.sentence.split(begin)[0] for excess in found]
    assert told == ([f"iep.csv: {reason}"] if reason else [])


def two_files(home: homes.Home) -> None:
    """iep.csv has changes within the limits; notes.csv, behind it, has not."""
    home.database.execute("CREATE TABLE notes (id text, body text)")
    home.database.insert("notes", [(str(number), "x") for number in range(1, 5)])
    more = (
        '<SQLDiff file="notes.csv" key="id" {limit}><Query>SELECT id AS "id", body AS "body" '
        'FROM notes ORDER BY id</Query><Delete parameters="id">DELETE FROM notes WHERE id = ?'
        "</Delete></SQLDiff>"
    )
    home.configure(more=more.format(limit='maxDeletes="1"'))
    home.extract(files={"iep.csv": homes.csv_text(SOURCE), "notes.csv": "id,body\r\n1,x\r\n2,x"})


def test_sync_is_held_before_the_first_write_of_any_file(sqlite_home: homes.Home) -> None:
    home = sqlite_home
    two_files(home)
    message = home.refused(6)
    assert message.startswith(
        "nothing was written: notes.csv: 2 deletes of 4 rows, maxDeletes is 1; they begin "
        "with id=3; id=4. Changes in all: iep.csv 3 to insert; notes.csv 2 to delete\nTry: "
    )
    assert (home.run / "HELD").read_text(encoding="utf-8") == f"{message}\n"
    assert len(home.database.rows("SELECT * FROM notes")) == 4


def test_sync_force_skips_the_limits(sqlite_home: homes.Home) -> None:
    home = sqlite_home
    two_files(home)
    assert home.main("sync", "--force") == 0
    assert home.sis_rows() == STORED
    assert home.database.rows("SELECT id FROM notes") == [("1",), ("2",)]
    assert "WARNING the limits are skipped (--force, by " in home.log
    assert not (home.run / "HELD").exists()


def test_sync_limit_of_a_file_goes_before_that_of_all(sqlite_home: homes.Home) -> None:
    home = sqlite_home
    two_files(home)
    home.configure(more=home.values["more"].replace('maxDeletes="1"', 'maxDeletes="2"'))
    path = home.path / "config.xml"
    path.write_text(path.read_text().replace('<Limits maxDeletes="100%"', '<Limits maxDeletes="0"'))
    assert home.main() == 0


# ------------------------------------------------------------------ bad input

GOOD = homes.csv_text(SOURCE)
COLUMNS = "ia/iep.csv:1: the columns differ from those of ic/iep.csv: "
BAD_SOURCES: dict[str, tuple[str | bytes, str]] = {
    "renamed": (
        GOOD.replace("startDate", "beginDate"),
        COLUMNS + "missing startDate; unexpected beginDate",
    ),
    "missing": (
        "studentNumber,startDate,status\r\n1001,2026-01-05,LOCKED\r\n",
        COLUMNS + "missing manager",
    ),
    "moved": (
        "studentNumber,startDate,manager,status\r\n",
        COLUMNS + "another order: column 3 is manager, not status",
    ),
    "no header": (
        GOOD.split("\r\n", 1)[1],
        COLUMNS + "none of studentNumber, startDate, status, manager; its header may be missing",
    ),
    "truncated": (
        GOOD[: GOOD.index("Ana")],
        "ia/iep.csv:2: a quoted field is never closed",
    ),
    "cut between fields": (
        GOOD[: GOOD.rindex(",LOCKED")],
        "ia/iep.csv:4: has 2 fields where the header has 4",
    ),
    "unquoted comma": (
        GOOD.replace('"', ""),
        "ia/iep.csv:2: has 5 fields where the header has 4",
    ),
    "unsorted": (
        homes.csv_text([SOURCE[1], SOURCE[0]]),
        "ia/iep.csv:3: not sorted: line 2 has the key studentNumber=1002, startDate=2026-01-06, "
        "line 3 has studentNumber=1001, startDate=2026-01-05",
    ),
    "duplicate": (
        homes.csv_text([SOURCE[0], SOURCE[1], (*SOURCE[1][:3], "Kim")]),
        "ia/iep.csv:4: lines 3 and 4 have the same key studentNumber=1002, startDate=2026-01-06",
    ),
    "binary": (
        b"\x7fELF\x02\x01\x01\x00\x00\x00\x00",
        "ia/iep.csv:1: contains a NUL character: this is a binary or UTF-16 file",
    ),
    "UTF-16": (
        GOOD.encode("utf-16-le"),
        "ia/iep.csv:1: contains a NUL character: this is a binary or UTF-16 file",
    ),
    "mixed encodings": (
        GOOD.encode().replace(b"Lee", b"L\xe9e"),
        "ia/iep.csv:3: is not UTF-8: byte 0xe9",
    ),
    "two columns of one name": (
        GOOD.replace("manager", "status"),
        "ia/iep.csv:1: the header is wrong: the column 'status' appears more than once",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_sync_refuses_a_bad_source(
    sqlite_home: homes.Home, content: str | bytes, message: str
) -> None:
    sqlite_home.extract(files={"iep.csv": content})
    sqlite_home.sis(SIS)
    told, remedy = sqlite_home.refused(5).split("\nTry: ")
    assert told == message
    assert remedy
    assert not list((sqlite_home.run / "diff").iterdir())


@pytest.mark.parametrize("content", ["", homes.HEADER, homes.HEADER + "\r\n"])
def test_sync_holds_an_empty_source(sqlite_home: homes.Home, content: str) -> None:
    sqlite_home.extract(files={"iep.csv": content})
    sqlite_home.sis(SIS)
    assert sqlite_home.refused(6).startswith(
        "nothing was written: iep.csv: 2 deletes of 2 rows, SameGoal's file is empty, so "
        "the limit is 0; "
    )


def test_sync_takes_an_empty_source_for_an_empty_database(sqlite_home: homes.Home) -> None:
    sqlite_home.extract([])
    assert sqlite_home.main() == 0
    assert sqlite_home.summary["message"] == "nothing to do: both sides are equal"


BAD_QUERIES = {
    "unsorted": (
        homes.QUERY.format(order="studentNumber DESC"),
        "ic/iep.csv:3: not sorted: line 2 has the key studentNumber=1009, startDate=2026-01-09, "
        "line 3 has studentNumber=1002, startDate=2026-01-06\n",
    ),
    "duplicate": (
        homes.QUERY.format(order="1").replace(
            "ORDER", "CROSS JOIN (SELECT 1 UNION SELECT 2) ORDER"
        ),
        "ic/iep.csv:3: lines 2 and 3 have the same key studentNumber=1002, startDate=2026-01-06\n",
    ),
    "column missing": (
        homes.QUERY.format(order="1").replace(', manager AS "manager"', ""),
        "ia/iep.csv:1: the columns differ from those of ic/iep.csv: unexpected manager\n",
    ),
    "column twice": (
        homes.QUERY.format(order="1").replace('"manager"', '"status"'),
        "ic/iep.csv:1: the header is wrong: the column 'status' appears more than once\n",
    ),
    "key not selected": (
        homes.QUERY.format(order="1").replace('"startDate"', '"begin"'),
        "ia/iep.csv:1: the columns differ from those of ic/iep.csv: missing begin; unexpected "
        "startDate\n",
    ),
}


@pytest.mark.parametrize(("query", "message"), BAD_QUERIES.values(), ids=BAD_QUERIES)
def test_sync_refuses_a_bad_query(differing: homes.Home, query: str, message: str) -> None:
    differing.configure(query=query)
    assert differing.refused(5).startswith(message)


def test_sync_refuses_a_key_that_is_no_column(differing: homes.Home) -> None:
    path = differing.path / "config.xml"
    path.write_text(path.read_text().replace('key="studentNumber,startDate"', 'key="personID"'))
    assert differing.refused(5) == (
        "ic/iep.csv: the key column 'personID' is not in the header (studentNumber, startDate, "
        "status, manager)\n"
        "Try: correct the key, or the name of the column in the query"
    )


def test_sync_sorts_where_it_is_told_to(differing: homes.Home) -> None:
    differing.extract([SOURCE[2], SOURCE[0], SOURCE[1]])
    differing.configure(query=homes.QUERY.format(order="manager DESC"), diff='sort="true"')
    assert differing.main() == 0
    assert differing.sis_rows() == STORED


def test_sync_refuses_the_second_file_before_it_writes_the_first(sqlite_home: homes.Home) -> None:
    two_files(sqlite_home)
    sqlite_home.extract(
        files={"iep.csv": GOOD, "notes.csv": "id,body\r\n2,x\r\n1,x\r\n"}, epoch="20260102-000000"
    )
    assert sqlite_home.refused(5).startswith("ia/notes.csv:3: not sorted: ")


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "TODO": ({"username": "TODO(user)"}, "<SFTP username>: still contains TODO(user)"),
    "unset": (
        {"connection": "Driver=x;PWD=${env:SGSYNC_TEST_UNSET}"},
        "<Database connectionString>: the environment variable SGSYNC_TEST_UNSET is not set",
    ),
    "unknown attribute": ({"sftp": 'hots="x"'}, "<SFTP hots>: unknown attribute"),
    "not XML": ({"upload": "<SQL>"}, "not well-formed XML"),
    "no call": ({"calls": "<Insert/>"}, "<Insert>: needs a procedure or one SQL statement"),
}


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_sync_refuses_a_bad_config_before_it_connects(
    differing: homes.Home, change: dict[str, Any], message: str
) -> None:
    differing.configure(**change)
    told = differing.refused(2)
    assert told.startswith("config.xml:")
    assert message in told
    assert "\nTry: " in told
    assert sorted(path.name for path in differing.run.iterdir()) == [
        "manifest.json", "report.html", "sgi_log.txt", "summary.json",
    ]  # fmt: skip
