"""Hold and approve, the proof of convergence, differences in format alone."""

from __future__ import annotations

import datetime
import os
import time

import pytest

from support import homes


def rows(*numbers: int, status: str = "LOCKED") -> list[homes.Row]:
    return [(f"{n}", "2026-01-05", status, "Lee") for n in numbers]


def held(home: homes.Home) -> str:
    assert home.main() == 6
    assert not (home.run / "COMPLETE").exists()
    assert not (home.sftp_root / "upload" / home.run.name).exists()
    assert home.summary["outcome"] == "held"
    return (home.run / "HELD").read_text(encoding="utf-8")


def test_sync_over_a_limit_is_held_and_approve_does_what_it_showed(sqlite_home: homes.Home) -> None:
    home = sqlite_home
    home.configure(diff='maxDeletes="2"')
    home.extract(rows(1001, 1002))
    home.sis(rows(1001, 1002, 1003, 1004, 1005))
    before = home.sis_rows()
    message = held(home)
    assert home.sis_rows() == before
    epoch = home.run.name
    assert message == (
        "nothing was written: iep.csv: 3 deletes of 5 rows, maxDeletes is 2; they begin with "
        "studentNumber=1003, startDate=2026-01-05; studentNumber=1004, startDate=2026-01-05; "
        "studentNumber=1005, startDate=2026-01-05. Changes in all: iep.csv 3 to delete\n"
        f"Try: look at {home.run / 'diff'}; if the changes are right, approve just these:\n"
        f"{home.approval(epoch)}\n"
    )
    assert home.main("sync", "--approve", epoch, "--by", "Pat", "--why", "closed school") == 0
    assert home.sis_rows() == rows(1001, 1002)
    approval = home.summary["approval"]
    assert approval.pop("at") >= home.summary["started"]
    assert approval == {"run": epoch, "by": "Pat", "why": "closed school", "rows": 3}
    told = f"run {epoch} was approved by Pat (closed school): 3 rows beyond the limits"
    assert told in home.log
    assert "approved: iep.csv: 3 deletes of 5 rows, maxDeletes is 2" in home.log
    assert len(home.summary["over_limits"]) == 1


def test_sync_forced_past_a_limit_says_so(sqlite_home: homes.Home) -> None:
    home = sqlite_home
    home.configure(diff='maxDeletes="0"')
    home.extract(rows(1001))
    home.sis(rows(1001, 1002))
    assert home.main("sync", "--force") == 0
    assert home.summary["forced"]
    assert home.summary["over_limits"][0].startswith("iep.csv: 1 delete of 2 rows, maxDeletes is 0")
    assert f"the limits are skipped (--force, by {home.summary['account']})" in home.log


def test_sync_approve_holds_what_the_held_run_did_not_show(sqlite_home: homes.Home) -> None:
    home = sqlite_home
    home.configure(diff='maxDeletes="1"')
    home.extract(rows(1001, 1002, 1003, 1004))
    home.sis(rows(1001, 1002, 1003, 1004, 1005, 1006))
    held(home)
    epoch = home.run.name
    home.extract(rows(1001))
    assert home.main("sync", "--approve", epoch) == 6
    assert len(home.sis_rows()) == 6
    assert "5 deletes (3 of them not approved) of 6 rows, maxDeletes is 1" in home.log
    home.extract(rows(1001, 1002, 1003))  # within the limit, beside what was approved
    assert home.main("sync", "--approve", epoch) == 0
    assert home.sis_rows() == rows(1001, 1002, 1003)


def test_sync_approve_takes_only_a_held_run(sqlite_home: homes.Home) -> None:
    sqlite_home.extract(rows(1001))
    assert sqlite_home.main() == 0
    epoch = sqlite_home.run.name
    for name in (epoch, "20200101-000000", "../x"):
        assert sqlite_home.main("sync", "--approve", name) == 2
        assert f"--approve {name}: there is no held run of that name" in sqlite_home.log


@pytest.mark.parametrize("content", ["", homes.HEADER + "\r\n"])
def test_sync_an_empty_source_is_held_whatever_the_limits(
    sqlite_home: homes.Home, content: str
) -> None:
    home = sqlite_home
    home.extract(files={"iep.csv": content})
    home.sis(rows(1001, 1002))
    message = held(home)
    assert "2 deletes of 2 rows, SameGoal's file is empty, so the limit is 0" in message
    assert len(home.sis_rows()) == 2
    assert home.main("sync", "--approve", home.run.name) == 0
    assert home.sis_rows() == []


def test_sync_a_stale_extract_is_held_and_can_be_approved(sqlite_home: homes.Home) -> None:
    home = sqlite_home
    folder = home.extract(rows(1001))
    old = time.time() - 40 * 3600
    for path in folder.iterdir():
        os.utime(path, (old, old))
    message = held(home)
    assert "20260101-139029, is 40 hours old, maxAgeHours is 36" in message
    assert "Changes in all: iep.csv 1 to insert\nTry: ask SameGoal for a newer extract" in message
    assert home.main("sync", "--approve", home.run.name) == 0
    assert home.sis_rows() == rows(1001)


def test_sync_holds_too_many_inserts(sqlite_home: homes.Home) -> None:
    home = sqlite_home
    home.configure(limits='maxInserts="50%" minRows="2"')
    home.extract(rows(1001, 1002))
    assert home.main() == 0  # a first load: the database has fewer rows than minRows
    home.extract(rows(1001, 1002, 1003, 1004), epoch="20260102-000000")
    assert "iep.csv: 2 inserts of 2 rows, maxInserts is 50%; they begin with" in held(home)
    assert home.main("sync", "--approve", home.run.name) == 0
    home.configure(limits="", diff='maxInserts="0"')
    home.extract(rows(1001, 1002, 1003, 1004, 1005), epoch="20260103-000000")
    assert "1 insert of 4 rows, maxInserts is 0" in held(home)


def test_sync_holds_an_empty_export_of_the_database(sqlite_home: homes.Home) -> None:
    """As when a view was changed: everything would be inserted again."""
    home = sqlite_home
    home.extract(rows(1001, 1002))
    assert home.main() == 0
    home.sis([])
    told = "2 inserts of 0 rows, the query returned no rows, after 2 in the last complete run, so "
    assert told in held(home)
    assert home.main("sync", "--approve", home.run.name) == 0
    assert home.sis_rows() == rows(1001, 1002)


def test_sync_holds_what_is_unusual(sqlite_home: homes.Home) -> None:
    home = sqlite_home
    home.configure(limits='usual="2"')
    home.extract(rows(*range(1000, 1012)))
    assert home.main() == 0  # nothing is known to be usual
    home.extract(rows(*range(1000, 1024)), epoch="20260102-000000")
    assert home.main() == 0  # up to 24
    home.extract(rows(*range(1000, 1049)), epoch="20260103-000000")
    told = "25 inserts of 24 rows, usual are 12 to 12 in a run, the limit is 24; they begin with"
    assert told in held(home)
    assert home.main("sync", "--approve", home.run.name) == 0


@pytest.mark.parametrize(("pause", "runs"), [("from", False), ("to", False), ("over", True)])
def test_sync_does_nothing_in_a_pause(sqlite_home: homes.Home, pause: str, runs: bool) -> None:
    home = sqlite_home
    today, day = datetime.date.today(), datetime.timedelta(1)
    first, last = {
        "from": (today, today + day),
        "to": (today - 9 * day, today),
        "over": (today - 9 * day, today - day),
    }[pause]
    home.configure(history=f'<Pause from="{first}" to="{last}" why="rollover"/>')
    home.extract(rows(1001))
    assert home.main() == 0
    assert bool(home.sis_rows()) is runs
    if not runs:
        assert home.summary["outcome"] == "paused"
        told = f"nothing was done: config.xml has a <Pause> from {first} to {last} (rollover)"
        assert home.summary["message"] == told
        assert not (home.run / "ia").exists()
        assert home.main("sync", "--dry-run") == 0
        assert home.summary["outcome"] == "dry run"
        assert home.main("sync", "--force") == 0
        assert home.sis_rows() == rows(1001)


def test_sync_holds_a_file_of_a_statement_that_shrank(sqlite_home: homes.Home) -> None:
    home = sqlite_home
    home.configure(
        upload='<SQL file="guardians.csv" maxShrink="10%">SELECT studentNumber FROM iep</SQL>',
    )
    home.extract(rows(*range(1000, 1010)))
    assert home.main() == 0
    home.extract(rows(*range(1000, 1008)), epoch="20260102-000000")
    message = held(home)
    assert message.startswith(
        "nothing was uploaded: guardians.csv: 8 rows instead of 10 in the last complete run, "
        "maxShrink is 10%. The database is up to date: 0 rows inserted, 0 rows updated, "
        "2 rows deleted\nTry: "
    )
    epoch = home.run.name
    assert home.main() == 6  # and again the next night
    assert home.main("sync", "--approve", epoch) == 0
    assert home.main() == 0  # it is the last complete run now


def test_sync_dry_run_tells_what_would_be_held(sqlite_home: homes.Home) -> None:
    home = sqlite_home
    home.configure(diff='maxDeletes="0"')
    home.extract(rows(1001))
    home.sis(rows(1001, 1002))
    assert home.main("sync", "--dry-run") == 6
    assert home.summary["outcome"] == "dry run"
    assert "a real run would be held: iep.csv: 1 delete of 2 rows" in home.summary["message"]
    assert len(home.sis_rows()) == 2


def test_sync_verify_finds_a_procedure_without_effect(postgres_home: homes.Home) -> None:
    home = postgres_home
    home.configure(database='verify="true"')
    home.extract(rows(1001, 1002))
    home.database.execute(
        "CREATE OR REPLACE PROCEDURE sg_iep_upsert(n text, d text, s text, m text) "
        "LANGUAGE sql AS $$ INSERT INTO iep SELECT n, d, s, m WHERE n <> '1002' $$"
    )
    for times in (1, 2, 3):
        assert home.main() == 8
        assert (home.run / "COMPLETE").exists()
        assert (home.run / "notconverged.csv").read_text(encoding="utf-8").splitlines() == [
            "file,operation,key,procedure,runs",
            f'iep.csv,insert,"studentNumber=1002, startDate=2026-01-05",sg_iep_upsert,{times}',
        ]
        named = "3 runs in a row: the procedure has no effect" in home.log
        assert named == (times == 3)
    assert home.summary["message"].startswith("1 row did not converge, see notconverged.csv")


def test_sync_verify_is_silent_when_all_converged(home: homes.Home) -> None:
    home.configure(database='verify="true"')
    home.extract(rows(1001, 1002))
    home.sis(rows(1001, 1003, status="OPEN"))
    assert home.main() == 0
    assert not (home.run / "notconverged.csv").exists()
    assert (home.run / "verify/diff/iep.csv").read_text(encoding="utf-8").count("\n") == 1


FIX = " on this <SQLDiff> would fix this"
DATE = "change the query so that manager is written as "


@pytest.mark.parametrize(
    ("source", "sis", "what", "remedy"),
    [
        ("Lee", "Lee ", "trailing blanks", 'trim="true"' + FIX),
        ("Lee", "LEE", "letter case", 'ignoreCase="true"' + FIX),
        ("8765.5", "8765.50", "number format", 'ignoreNumberFormat="true"' + FIX),
        ('"a\nb"', "a\r\nb", "line breaks", 'ignoreLineBreaks="true"' + FIX),
        ("NULL", "", "a word for an empty field", 'nullText="NULL"' + FIX),
        ("01/31/2026", "2026-01-31", "date format",
         DATE + "MM/DD/YYYY instead of YYYY-MM-DD (if the query returns a date type, "
         'dateFormat="%m/%d/%Y" does this)'),
        ("4/9/2026", "2026-04-09", "date format", DATE + "M/D/YYYY instead of YYYY-MM-DD"),
    ],
)  # fmt: skip
def test_diff_names_differences_of_format(
    sqlite_home: homes.Home, source: str, sis: str, what: str, remedy: str
) -> None:
    home = sqlite_home
    home.extract([(f"{n}", "2026-01-05", "LOCKED", source) for n in (1001, 1002, 1003)])
    home.sis([(f"{n}", "2026-01-05", "LOCKED", sis) for n in (1001, 1002, 1003)])
    assert home.main() == 0
    assert (
        f"iep.csv: 3 of 3 updates differ only in format: column manager, {what}, as in "
        "studentNumber=1001, startDate=2026-01-05: "
    ) in home.log
    assert f"{remedy}\n" in home.log
    assert source not in home.log.replace(remedy, "") or source.isupper()


@pytest.mark.parametrize(
    ("attribute", "source", "sis"),
    [
        ('ignoreCase="true"', "Lee", "LEE"),
        ('ignoreNumberFormat="true"', "1.5", "01.50"),
        ('ignoreLineBreaks="true"', '"a\nb"', "a\r\nb"),
    ],
)
def test_diff_ignores_formats_that_it_is_told_to(
    sqlite_home: homes.Home, attribute: str, source: str, sis: str
) -> None:
    home = sqlite_home
    home.configure(diff=attribute)
    home.extract([("1001", "2026-01-05", "LOCKED", source), ("1002", "2026-01-05", "A", "B")])
    home.sis([("1001", "2026-01-05", "LOCKED", sis), ("1002", "2026-01-05", "OPEN", "B")])
    assert home.main() == 0
    assert home.counts("found") == (0, 1, 0)
