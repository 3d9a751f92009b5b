"""What a run leaves on this machine: its folder, its lock, old runs, and a disk that refuses."""

from __future__ import annotations

import csv
import dataclasses
import getpass
import hashlib
import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import sgsync
from support import homes, kept

pytestmark = pytest.mark.usefixtures("short_pauses")

ROWS = [("1001", "2026-01-05", "LOCKED", "Ann"), ("1002", "2026-01-06", "LOCKED", "Bob")]
SPACE = (
    "Try: see that the disk has space left and that the account which runs sgsync may write to "
    "this folder"
)


@pytest.fixture
def home(sqlite_home: homes.Home) -> homes.Home:
    """A home with an extract of two rows; where nothing stops it, a run exits with 0."""
    sqlite_home.extract(ROWS)
    return sqlite_home


def child(home: homes.Home, program: str) -> subprocess.Popen[str]:
    """A process that has `sgsync`, `home` and `run`; it prints a line when it is ready."""
    start = (
        "import sys, time, pathlib, sgsync\n"
        f"home = pathlib.Path({str(home.path)!r})\n"
        "run = sgsync.Run(home / 'history', 'sync', [])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", start + program],
        cwd=homes.SCRIPT.parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


LOCKED = "with sgsync.only_run(run, 'sync'):\n    print('ready', flush=True)\n    time.sleep(60)"


# ------------------------------------------------------------------ the folder


def test_run_leaves_the_folder_that_the_design_names(home: homes.Home) -> None:
    home.configure(upload='<SQL file="open_records.csv">SELECT 1 AS "one"</SQL>')
    before = time.strftime("%Y%m%d-%H%M%S")
    assert home.main() == 0
    assert before <= home.run.name <= time.strftime("%Y%m%d-%H%M%S")
    left = {path.relative_to(home.run).as_posix(): path for path in home.run.rglob("*")}
    assert sorted(left) == [
        "COMPLETE", "diff", "diff/iep.csv", "ia", "ia/iep.csv", "ic", "ic/iep.csv",
        "manifest.json", "open_records.csv", "report.html", "sgi_log.txt", "summary.json",
    ]  # fmt: skip
    assert (home.run / "COMPLETE").read_bytes() == b""
    newest = max(path.stat().st_mtime_ns for name, path in left.items() if name != "sgi_log.txt")
    assert left["COMPLETE"].stat().st_mtime_ns == newest
    assert sorted(path.name for path in home.run.parent.iterdir()) == [home.run.name, "sync.lock"]


def test_run_leaves_nothing_to_other_accounts(home: homes.Home) -> None:
    before = os.umask(0o022)
    assert home.main() == 0
    assert os.umask(before) == 0o022  # as it was
    for path in [home.path / "history", *(home.path / "history").rglob("*")]:
        mode = path.stat().st_mode & 0o777
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_run_log_tells_each_step(home: homes.Home) -> None:
    home.configure(upload="<SQL>SELECT 1</SQL>")
    assert home.main() == 0
    lines = home.log.splitlines()
    told = []
    for line in lines:
        found = re.fullmatch(
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}[-+]\d\d:\d\d (INFO|WARNING) +(.*)", line
        )
        assert found, line
        told.append(found[2])
    where = f"127.0.0.1:{home.sshd.port}"
    login = f"{where}: logged in as {home.sshd.username}"
    about = f"account {getpass.getuser()} on {socket.gethostname()}"
    assert told[0] == (
        f"sgsync {sgsync.__version__} sync, run {home.run.name}, {about}, arguments: sync "
        f"--home {home.path}"
    )
    # the two sides are fetched at the same time
    assert sorted(told[1:5]) == sorted(
        [
            login,
            "downloaded 1 file of epoch 20260101-139029",
            "database: connected to SQLite",
            "exported iep.csv: 0 rows",
        ]
    )
    assert told[5:-1] == [
        "iep.csv: 2 rows, of them 2 to insert, 0 to update, 0 to delete",
        "iep.csv: 2 of 2 changes applied, 0 failed",
        f"statement 1 of <Upload> (config.xml:{home.line('<SQL>')}): done",
        login,
        f"pushed 7 files to {home.sftp_root.as_posix()}/upload/{home.run.name}",
    ]
    assert re.fullmatch(
        r"complete: 2 rows inserted, 0 rows updated, 0 rows deleted "
        rf"\(\d+\.\d s, folder {home.run}\)",
        told[-1],
    )


def test_run_summary_tells_the_outcome(home: homes.Home) -> None:
    home.sis([("1001", "2026-01-05", "OPEN", "Ann"), ("1009", "2026-01-05", "OPEN", "Zed")])
    home.configure(upload='<SQL file="open_records.csv">SELECT 1 AS "one"</SQL>')
    assert home.main() == 0
    summary = home.summary
    line = summary["files"][0]
    for times in (summary, line):
        assert times.pop("seconds") > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[-+]\d\d:\d\d", summary.pop("started"))
    expected = {
        "command": "sync",
        "version": sgsync.__version__,
        "epoch": home.run.name,
        "outcome": "complete",
        "exit_code": 0,
        "message": "1 row inserted, 1 row updated, 1 row deleted",
        "source_epoch": "20260101-139029",
        "statement_files": {"open_records.csv": 1},
        "account": getpass.getuser(),
        "computer": socket.gethostname(),
        "arguments": ["sync", "--home", str(home.path)],
        "forced": False,
        "approval": None,
        "over_limits": [],
    }
    assert {name: summary[name] for name in expected} == expected
    expected = {"file": "iep.csv", "source_rows": 2, "target_rows": 2}
    assert {name: line[name] for name in expected} == expected
    assert home.counts("found") == home.counts("applied") == (1, 1, 1)
    assert home.counts("failed") == (0, 0, 0)
    (run,) = sgsync.runs(home.path / "history")
    assert dataclasses.asdict(run.summary) == home.summary


def test_run_that_fails_leaves_its_reason(home: homes.Home) -> None:
    (home.path / "config.xml").unlink()
    message = home.failed(2)
    assert message == (
        f"{home.path}/config.xml: cannot be read: No such file or directory\n"
        "Try: name the folder that holds config.xml with --home, or the file with --config"
    )
    assert sorted(path.name for path in home.run.iterdir()) == [
        "manifest.json", "report.html", "sgi_log.txt", "summary.json",
    ]  # fmt: skip
    assert home.summary["outcome"] == "failed"


def test_run_of_an_unexpected_error_leaves_its_traceback(
    home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("what\nnobody foresaw")

    monkeypatch.setattr(sgsync, "compare", broken)
    assert home.refused(1) == (
        "unexpected error: ZeroDivisionError: what nobody foresaw\n"
        "Try: send sgi_log.txt from this run's folder to whoever maintains sgsync"
    )
    assert "    Traceback (most recent call last):\n" in home.log


def test_run_tells_of_a_last_run_that_was_killed(home: homes.Home) -> None:
    assert home.main() == 0
    assert "did not finish" not in home.log
    process = child(home, LOCKED)
    process.kill()
    process.communicate()
    killed = home.run
    assert home.summary["outcome"] == "running"
    assert home.main() == 0
    assert f"WARNING the last run, {killed.name}, did not finish: it was killed" in home.log


def test_summary_of_another_version_or_of_none_can_be_read(tmp_path: Path) -> None:
    """Names that this version lacks are passed over, and nothing readable is None."""
    texts = {
        "20260101-000001": '{"command": "sync", "new": [1], "files": [{"file": "a.csv", "x": 1}]}',
        "20260101-000002": "{",
        "20260101-000003": '{"files": 3}',
        "20260101-000004": "[]",
    }
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(text, encoding="utf-8")
    (tmp_path / "20260101-000005").mkdir()
    (tmp_path / "README").touch()
    found = {run.epoch: run.summary for run in sgsync.runs(tmp_path)}
    assert list(found) == [f"20260101-00000{n}" for n in (5, 4, 3, 2, 1)]
    summary = found.pop("20260101-000001")
    assert summary is not None
    assert (summary.command, summary.files) == ("sync", [sgsync.FileSummary("a.csv")])
    assert not any(found.values())


def test_two_runs_in_one_second_have_two_folders(tmp_path: Path) -> None:
    names = [sgsync.Run(tmp_path / "history", "sync", []).folder.name for _ in range(2)]
    assert names[0] < names[1]
    assert all(sgsync.EPOCH.fullmatch(name) for name in names)


@pytest.mark.parametrize(
    ("name", "is_epoch"),
    [
        ("20260101-139029", True),
        ("20260101-13902", False),
        ("20260101-1390290", False),
        ("20260101-139029\n", False),
        ("20260101_139029", False),
        ("٢٠٢٦٠١٠١-١٣٩٠٢٩", False),
    ],
)
def test_epoch_is_a_form_and_not_a_time(name: str, is_epoch: bool) -> None:
    assert bool(sgsync.EPOCH.fullmatch(name)) is is_epoch


# ------------------------------------------------------------------ one at a time


def test_second_run_says_who_has_the_lock(home: homes.Home) -> None:
    process = child(home, LOCKED)
    holder = json.loads((home.path / "history/sync.lock.json").read_text())
    try:
        message = home.refused(7)
    finally:
        process.kill()
        process.communicate()
    assert message == (
        f"another sync run is active in this home: process {process.pid}, since "
        f"{holder['since']} (run {home.runs()[0].name}); nothing was done\n"
        "Try: wait for it to end; if it hangs, end that process: this also frees its lock"
    )
    assert home.summary["outcome"] == "busy"
    assert not (home.run / "ia").exists()
    # a process that dies leaves its lock free, whatever it left on the disk
    assert (home.path / "history/sync.lock.json").exists()
    assert home.main() == 0
    assert not (home.path / "history/sync.lock.json").exists()


def test_second_run_does_not_need_to_know_who_has_the_lock(home: homes.Home) -> None:
    process = child(home, LOCKED)
    (home.path / "history/sync.lock.json").write_text("{")
    try:
        assert home.refused(7).startswith(
            "another sync run is active in this home: a process that is just starting; "
        )
    finally:
        process.kill()
        process.communicate()


def test_lock_is_free_after_a_failure(home: homes.Home) -> None:
    home.configure(query="nonsense")
    assert home.main() == 4
    home.configure(query=homes.QUERY.format(order="1"))
    assert home.main() == 0


# ------------------------------------------------------------------ old runs


def make_runs(history: Path, *names: str) -> None:
    for name in names:
        (history / name / "ia").mkdir(parents=True)
        (history / name / "ia/iep.csv").write_text("x")


def test_prune_keeps_the_newest_runs(home: homes.Home) -> None:
    history = home.path / "history"
    make_runs(history, *(f"2020010{day}-000000" for day in range(1, 6)))
    home.configure(history='<History keepRuns="3"/>')
    assert home.main() == 0
    assert [path.name for path in home.runs()] == [
        "20200104-000000", "20200105-000000", home.run.name,
    ]  # fmt: skip
    assert "deleted 3 runs older than the newest 3" in home.log


def test_prune_comes_only_after_success(home: homes.Home) -> None:
    make_runs(home.path / "history", "20200101-000000")
    home.configure(history='<History keepRuns="1"/>', query="nonsense")
    home.failed(4)
    assert [path.name for path in home.runs()] == ["20200101-000000", home.run.name]


def test_prune_takes_epochs_and_nothing_else(tmp_path: Path) -> None:
    history, elsewhere = tmp_path / "history", tmp_path / "elsewhere"
    make_runs(history, "20200101-000000", "20200102-000000", "20200103-000000")
    make_runs(tmp_path, "elsewhere")
    others = ["20190101-000000.old", "2019", "notes", "schoolinks", "20190101-00000x"]
    make_runs(history, *others)
    (history / "20190102-000000").write_text("a file")
    (history / "20190103-000000").symlink_to(elsewhere)
    (history / "20200101-000000/link").symlink_to(elsewhere)
    assert sgsync.prune(history, 1, history / "20200103-000000") == 2
    assert sorted(path.name for path in history.iterdir()) == sorted(
        [*others, "20190102-000000", "20190103-000000", "20200103-000000"]
    )
    assert (elsewhere / "ia/iep.csv").read_text() == "x"


def test_prune_never_takes_the_current_run(tmp_path: Path) -> None:
    """The clock was set back, and the runs of before seem to be newer."""
    make_runs(tmp_path, "20200101-000000", "20990101-000000", "20990102-000000")
    assert sgsync.prune(tmp_path, 1, tmp_path / "20200101-000000") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["20200101-000000"]


def test_prune_goes_on_where_a_run_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_runs(tmp_path, "20200101-000000", "20200102-000000", "20200103-000000")
    rmtree = sgsync.shutil.rmtree

    def refuse(path: Path, *args: Any) -> None:
        if path.name == "20200102-000000":
            raise PermissionError(13, "Permission denied")
        rmtree(path, *args)

    monkeypatch.setattr(sgsync.shutil, "rmtree", refuse)
    assert sgsync.prune(tmp_path, 1, tmp_path / "20200103-000000") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "20200102-000000", "20200103-000000",
    ]  # fmt: skip
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.getMessage() for record in warnings] == [
        f"{tmp_path}/20200102-000000: this old run cannot be deleted: Permission denied"
    ]


# ------------------------------------------------------------------ a disk that refuses


def limited(home: homes.Home, size: int) -> subprocess.CompletedProcess[str]:
    """A run that cannot write a file of more than `size` bytes, as on a disk that is full."""
    return subprocess.run(
        [sys.executable, str(homes.SCRIPT), "--home", str(home.path)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


LONG = [(f"{n:05}", "2026-01-05", "LOCKED", "x" * 90) for n in range(500)]
OTHER = [(*row[:3], "y" * 90) for row in LONG]


@pytest.mark.parametrize(
    ("source", "database", "place"),
    [
        pytest.param(LONG, ROWS, "ia/iep.csv", id="download"),
        pytest.param(ROWS, LONG, "ic/iep.csv", id="export"),
        pytest.param(LONG[:200], OTHER[:200], "diff/iep.csv", id="diff"),
    ],
)
def test_run_on_a_full_disk_writes_nothing(
    home: homes.Home, source: list[homes.Row], database: list[homes.Row], place: str
) -> None:
    home.extract(source)
    home.sis(database)
    before = home.sis_rows()
    done = limited(home, 32_768)
    message = f"{home.run}/{place}: File too large"
    assert done.returncode == 1
    told = rf"failed: {re.escape(message)} \(.* s, folder .*\)\n    {SPACE}\n"
    assert re.search(told, done.stderr)
    assert re.search(told, home.log)
    assert home.summary["message"] == message
    assert home.sis_rows() == before
    assert not [*home.path.rglob("*.part"), *home.path.rglob("COMPLETE")]
    assert not list((home.sftp_root / "upload").iterdir())


def test_run_on_a_disk_that_takes_nothing_at_all_still_ends_in_order(home: homes.Home) -> None:
    """Not even its log can be written; the console is told."""
    done = limited(home, 0)
    assert done.returncode == 1
    assert re.search(rf"{home.path}/history/\S+: File too large\n    {SPACE}\n$", done.stderr)
    assert home.sis_rows() == []


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="there is no /sys")
def test_run_needs_a_history_to_write_to(home: homes.Home) -> None:
    """/sys takes no new folder, not even from root."""
    (home.path / "history").symlink_to("/sys/kernel")
    done = home.process()
    assert done.returncode == 1
    found = re.search(rf"{home.path}/history: (.*)\n    {SPACE}\n", done.stderr)
    assert found
    assert found[1] in ("Operation not permitted", "Permission denied", "Read-only file system")
    assert home.sis_rows() == []


def test_run_needs_a_history_that_is_a_folder(home: homes.Home) -> None:
    (home.path / "history").write_text("a file")
    done = home.process()
    assert done.returncode == 1
    assert f"{home.path}/history: File exists\n    {SPACE}\n" in done.stderr


# ------------------------------------------------------------------ a run that is killed


def test_run_that_is_killed_leaves_a_home_that_works(postgres_home: homes.Home) -> None:
    """In the middle of its calls, as by a power cut; the next run goes on from what is there."""
    home = postgres_home
    home.configure(database='batchSize="1"')
    home.database.execute("CREATE SEQUENCE calls")
    home.database.execute(
        "CREATE OR REPLACE PROCEDURE sg_iep_upsert(n text, d text, s text, m text) "
        "LANGUAGE plpgsql AS $$ BEGIN INSERT INTO iep VALUES (n, d, s, m) ON CONFLICT DO NOTHING; "
        "IF nextval('calls') = 2 THEN PERFORM pg_sleep(60); END IF; END $$"
    )
    home.extract(ROWS)
    process = subprocess.Popen(
        [sys.executable, str(homes.SCRIPT), "--quiet", "--home", str(home.path)]
    )
    sleeping = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep' "
        "AND pid <> pg_backend_pid()"
    )
    while not home.database.rows(sleeping.replace("pg_terminate_backend(pid)", "pid")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    home.database.rows(sleeping)
    assert home.sis_rows() == ROWS[:1]
    assert not (home.run / "COMPLETE").exists()
    assert home.main() == 0
    assert home.sis_rows() == ROWS
    assert len(home.runs()) == 2


# ------------------------------------------------------------------ the command


def history(
    capsys: pytest.CaptureFixture[str], home: Path, *argv: str, code: int = 0
) -> tuple[str, str]:
    """What `history` prints: standard output, standard error."""
    assert sgsync.main(["history", "--home", str(home), *argv]) == code
    printed = capsys.readouterr()
    return printed.out, printed.err


ANN, BOB = ("0100119", "2026-01-05", "OPEN", "Ann"), ("100119", "2026-01-06", "OPEN", "Bob")


def test_history_lists_runs_newest_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept.run(tmp_path / "history", "20260101-020000", [kept.insert(*ANN)] * 1200, seconds=61.26)
    kept.run(tmp_path / "history", "20260102-020000", [kept.delete(*ANN)], outcome="held",
             files=[sgsync.FileSummary("iep.csv", delete=sgsync.Tally(1))])  # fmt: skip
    (tmp_path / "history/20260103-020000").mkdir()
    out, _ = history(capsys, tmp_path)
    assert out.splitlines() == [
        "            run  outcome   insert  update  delete  failed    time",
        "20260103-020000  unknown        0       0       0       0   0.0 s",
        "20260102-020000  held           0       0  0 of 1       0   0.0 s",
        "20260101-020000  complete   1,200       0       0       0  61.3 s",
    ]
    out, _ = history(capsys, tmp_path, "--json")
    assert [run["epoch"] for run in json.loads(out)] == [
        "20260103-020000", "20260102-020000", "20260101-020000",
    ]  # fmt: skip
    out, _ = history(capsys, tmp_path, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["insert_applied"] for row in rows] == ["0", "0", "1200"]


def test_history_of_schoolinks_and_of_many_homes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = sgsync.SectionSummary("gpa.csv", "GPA", rows=7, without={}, null_days=0)
    for name in ("east", "west"):
        kept.run(tmp_path / name / "history", f"20260101-02000{len(name) - 4}")
        kept.run(tmp_path / name / "history/schoolinks", "20260102-020000", files=[],
                 sections=[section])  # fmt: skip
    (tmp_path / "no home").mkdir()
    out, _ = history(capsys, tmp_path / "east", "--job", "schoolinks")
    assert [line.split()[:6] for line in out.splitlines()] == [
        ["run", "outcome", "insert", "update", "delete", "rows"],
        ["20260102-020000", "complete", "0", "0", "0", "7"],
    ]
    out, _ = history(capsys, tmp_path / "east", "--homes", str(tmp_path / "*"), "--json")
    assert [Path(run["home"]).name for run in json.loads(out)] == ["east", "west"]


def test_history_shows_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = kept.run(
        tmp_path / "history", "20260101-020000", [kept.insert(*ANN)], message="1 row\x1b[2J",
        approval=sgsync.Approval("20251231-020000", "Pat", "closed school", "2026-01-01", 3),
        stages=[sgsync.Stage("download", 0.5, 2.25)],
    )  # fmt: skip
    out, _ = history(capsys, tmp_path, "20260101-020000")
    assert f"run:         20260101-020000, 0.0 s, {folder}\n" in out
    assert "outcome:     complete (exit code 0): 1 row\\x1b[2J\n" in out
    assert "approved:    run 20251231-020000 by Pat 2026-01-01 closed school\n" in out
    assert re.search(r"\niep\.csv +4,000 +1 +0 +0 +0 ", out)
    assert "\ndownload  2.2 s\n" in out
    out, _ = history(capsys, tmp_path, "20260101-020000", "--json")
    assert json.loads(out)["epoch"] == "20260101-020000"
    _, err = history(capsys, tmp_path, "2026", code=2)
    assert f"2026: there is no such run in {tmp_path}/history\n" in err
    assert "    Try: sgsync.py history lists the runs" in err


def test_history_refuses_what_contradicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, message in (
        (["--verify", "--key", "1"], "give only one of EPOCH, --key, --verify and --homes"),
        (["--json", "--csv"], "give only one of --json and --csv"),
        (["--key", ""], "--key: is empty"),
        (["--key", "1", "--job", "schoolinks"], "--key: only runs of sync record changes of rows"),
    ):
        assert message in history(capsys, tmp_path, *argv, code=2)[1]
    assert history(capsys, tmp_path)[0] == "no runs\n"


def events(home: Path, value: str, file: str = "") -> list[str]:
    return list(map(str, sgsync.KeySearch(home / "history", value, file).events()))


def test_history_of_a_student_tells_all_changes_oldest_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home, locked = tmp_path / "history", (*BOB[:2], "LOCKED", 'Bob "B" Lee')
    kept.run(home, "20260101-020000", [kept.insert(*ANN), kept.insert(*BOB)])
    kept.run(home, "20260102-020000", [kept.update(BOB, locked)], outcome="held")
    kept.run(home, "20260103-020000", [kept.update(BOB, locked)],
             approval=sgsync.Approval("20260102-020000", "Pat", "as agreed", "", 1))  # fmt: skip
    kept.run(home, "20260104-020000", [kept.update(locked, BOB)], outcome="dry run")
    kept.run(home, "20260105-020000", [kept.delete(*locked)], forced=True)
    file = sgsync.FileSummary("iep.csv", insert=sgsync.Tally(1, applied=1))
    kept.run(home, "20260106-020000", [kept.insert(*BOB)], outcome="held", files=[file])
    out, err = history(capsys, tmp_path, "--key", "100119")
    key = "iep.csv studentNumber=100119, startDate=2026-01-06"
    change = "status from 'OPEN' to 'LOCKED', manager from 'Bob' to 'Bob \"B\" Lee'"
    assert out.splitlines() == [
        f"2026-01-01 02:00:00 run 20260101-020000 inserted {key} (status 'OPEN', manager 'Bob')",
        f"2026-01-02 02:00:00 run 20260102-020000 did not update {key} ({change}): the run was "
        "held",
        f"2026-01-03 02:00:00 run 20260103-020000 updated {key} ({change}); approved by Pat (as "
        "agreed)",
        f"2026-01-04 02:00:00 run 20260104-020000 did not update {key} (status from 'LOCKED' to "
        "'OPEN', manager from 'Bob \"B\" Lee' to 'Bob'): a dry run",
        f"2026-01-05 02:00:00 run 20260105-020000 deleted {key} (status 'LOCKED', manager "
        "'Bob \"B\" Lee'); approved by svc with --force",
        f"2026-01-06 02:00:00 run 20260106-020000 inserted {key} (status 'OPEN', manager 'Bob')",
    ]
    assert "Bob" not in err
    # the number of another student, and what is no key column, are no match
    assert len(events(tmp_path, "0100119")) == 1
    assert events(tmp_path, "Ann") == events(tmp_path, "10011") == []
    assert len(events(tmp_path, "2026-01-05")) == 1
    assert events(tmp_path, "100119", "other.csv") == []
    out, _ = history(capsys, tmp_path, "--key", "100119", "--json")
    assert json.loads(out)[1]["values"]["status"] == ["OPEN", "LOCKED"]
    out, _ = history(capsys, tmp_path, "--key", "100119", "--csv")
    rows = list(csv.DictReader(io.StringIO(out, newline="")))
    assert len(rows) == 12
    assert (rows[3]["column"], rows[3]["after"]) == ("manager", 'Bob "B" Lee')
    out, _ = history(capsys, tmp_path, "--key", "7")
    assert out == "no change to a row with the key 7 in 6 runs\n"


def test_history_of_a_student_tells_what_was_not_written(tmp_path: Path) -> None:
    home, rows = tmp_path / "history", [(f"{n}", "2026-01-05", "OPEN", "x") for n in range(6)]
    inserts = [kept.insert(*row) for row in rows]
    stopped = sgsync.FileSummary("iep.csv", insert=sgsync.Tally(6, applied=3, failed=1))
    folder = kept.run(home, "20260101-020000", inserts, outcome="failed", files=[stopped])
    key = "studentNumber=2, startDate=2026-01-05"
    kept.failures(folder, ("insert", key, "dbo.up", "bad\nstatus"))
    assert [events(tmp_path, f"{n}")[0].split("'x')")[1] for n in range(6)] == [
        "", "", ": bad status", "", ": the run stopped before this row",
        ": the run stopped before this row",
    ]  # fmt: skip
    assert [" inserted " in events(tmp_path, f"{n}")[0] for n in range(6)] == [
        True, True, False, True, False, False,
    ]  # fmt: skip
    alone = sgsync.FileSummary("iep.csv", delete=sgsync.Tally(1, left_alone=1))
    kept.run(home, "20260102-020000", [kept.delete(*rows[0])], files=[alone])
    kept.run(home, "20260103-020000", inserts, outcome="running")
    left = sgsync.FileSummary("iep.csv", insert=sgsync.Tally(6, applied=6), not_converged=1)
    folder = kept.run(home, "20260104-020000", inserts, outcome="partial", files=[left])
    kept.table(folder / "notconverged.csv", ["file", "operation", "key", "procedure", "runs"],
               [["iep.csv", "insert", key.replace("=2,", "=0,"), "dbo.up", "1"]])  # fmt: skip
    folder = kept.run(home, "20260105-020000", inserts)
    (folder / "summary.json").unlink()
    told = events(tmp_path, "0")[1:]
    assert [event.split(" ", 4)[4].split(" iep")[0] for event in told[:3]] == [
        "did not delete", "may have inserted", "inserted",
    ]  # fmt: skip
    assert [event.split("'x'): ")[1] for event in told] == [
        "left alone, config.xml had no <Delete> for this file",
        "the run was killed, or is not finished",
        "did not converge, the row still differs after the call",
        "the run left no summary",
    ]


@pytest.mark.parametrize(
    "value", ["7", "a,b", 'q"u"o', "line\r\nbreak", "\r\n", '"', "é", "x\n", ",", '"\r\n"']
)
def test_history_of_a_student_finds_the_record_whatever_is_in_it(
    tmp_path: Path, value: str
) -> None:
    odd = ["7", "a,b", 'q"u"o', "line\r\nbreak", "\r\n", '"', "é", "x\n", ",", '"\r\n"', "77"]
    rows = [(key, "1", other, value) for key in odd for other in odd]
    kept.run(tmp_path / "history", "20260101-020000", [kept.insert(*row) for row in rows])
    found = list(sgsync.KeySearch(tmp_path / "history", value, "").events())
    assert [event.values["status"][1] for event in found] == odd


def test_history_of_a_student_without_known_keys_looks_at_every_column(tmp_path: Path) -> None:
    kept.run(tmp_path / "history", "20260101-020000", [kept.insert(*ANN)], keys={})
    assert len(events(tmp_path, "Ann")) == 1
    kept.run(tmp_path / "history", "20260102-020000")  # names the keys, also for the run before
    assert events(tmp_path, "Ann") == []


def test_history_of_a_student_after_real_runs(home: homes.Home) -> None:
    home.configure(database='batchSize="1"')
    home.extract([ROWS[0], ("1002", "2026-01-06", "BAD", "Bob")])
    assert home.main() == 8
    home.extract([(*ROWS[0][:3], "Eve")], epoch="20260102-139029")
    assert home.main() == 0
    key = "iep.csv studentNumber=1001, startDate=2026-01-05"
    assert [event.split(" ", 4)[4] for event in events(home.path, "1001")] == [
        f"inserted {key} (status 'LOCKED', manager 'Ann')",
        f"updated {key} (manager from 'Ann' to 'Eve')",
    ]
    (refused,) = events(home.path, "1002")
    assert " did not insert iep.csv studentNumber=1002" in refused
    assert "bad status" in refused
    stages = [stage["name"] for stage in home.summary["stages"]]
    assert sorted(stages[:2]) == ["download", "export"]
    assert stages[2:] == ["compare", "apply", "statements"]


# ------------------------------------------------------------------ what was altered


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A home with four sealed runs."""
    for day in range(1, 5):
        kept.run(tmp_path / "history", f"2026010{day}-020000", [kept.insert(*ANN)], seal=True)
    return tmp_path


def altered(home: Path) -> list[str]:
    return [f"{run}: {what}" for run, what in sgsync.verify(sgsync.runs(home / "history"))]


def test_verify_passes_what_is_as_it_was(sealed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (sealed / "history/20260102-020000/sgi_log.txt").open("a", encoding="utf-8") as log:
        log.write("ended\n")  # after the sealing
    (sealed / "history/20260102-020000/report.html").write_text("made again")
    kept.run(sealed / "history", "20260105-020000", outcome="running")  # killed
    kept.run(sealed / "history", "20260106-020000", outcome="busy")
    out, _ = history(capsys, sealed, "--verify")
    assert out == "4 runs verified, nothing was altered; 2 runs without manifest.json\n"
    # pruned, the older ones first
    for day in (1, 2):
        sgsync.shutil.rmtree(sealed / f"history/2026010{day}-020000")
    assert altered(sealed) == []


def alter(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"Ann", b"Eve").replace(b"begun", b"began"))


ALTERATIONS = {
    "file altered": (lambda run: alter(run / "diff/iep.csv"), "diff/iep.csv was altered"),
    "log altered": (lambda run: alter(run / "sgi_log.txt"), "sgi_log.txt was altered"),
    "log cut": (lambda run: (run / "sgi_log.txt").write_text("beg"), "sgi_log.txt was altered"),
    "missing": (lambda run: (run / "summary.json").unlink(), "summary.json is missing"),
    "added": (lambda run: (run / "ia.csv").touch(), "ia.csv was added"),
    "link": (
        lambda run: [
            (run / "diff/iep.csv").rename(run.parent / "x"),
            (run / "diff/iep.csv").symlink_to(run.parent / "x"),
        ],
        "diff/iep.csv was replaced with a link",
    ),
    "no manifest": (
        lambda run: (run / "manifest.json").unlink(),
        "manifest.json is missing or cannot be read",
    ),
    "broken manifest": (
        lambda run: (run / "manifest.json").write_text('{"run": 3}'),
        "manifest.json is missing or cannot be read",
    ),
    "other manifest": (
        lambda run: [
            alter(run / "diff/iep.csv"),
            sgsync.Manifest.write(run, sgsync.runs(run.parent)[-1:]),
        ],
        "manifest.json is not the one that run 20260103-020000 saw",
    ),
    "deleted": (
        sgsync.shutil.rmtree,
        "the run was deleted; run 20260103-020000 was made after it",
    ),
}


@pytest.mark.parametrize(("change", "what"), ALTERATIONS.values(), ids=ALTERATIONS)
def test_verify_names_the_first_run_altered(
    sealed: Path, capsys: pytest.CaptureFixture[str], change: Any, what: str
) -> None:
    change(sealed / "history/20260102-020000")
    alter(sealed / "history/20260104-020000/diff/iep.csv")
    out, err = history(capsys, sealed, "--verify", code=5)
    assert out.splitlines()[1].split(None, 1) == ["20260102-020000", what]
    assert out.splitlines()[-1].split(None, 1) == ["20260104-020000", "diff/iep.csv was altered"]
    assert f"the first run altered is 20260102-020000: {what}\n" in err
    out, _ = history(capsys, sealed, "--verify", "--json", code=5)
    assert json.loads(out)[0] == {"run": "20260102-020000", "what": what}


def test_verify_finds_the_first_run_deleted_while_older_ones_are_kept(sealed: Path) -> None:
    kept.run(sealed / "history", "20251231-020000", outcome="failed")  # of an older version
    sgsync.shutil.rmtree(sealed / "history/20260101-020000")
    assert altered(sealed) == [
        "20260101-020000: the run was deleted; run 20260102-020000 was made after it"
    ]


def test_verify_passes_real_runs_of_every_kind(home: homes.Home) -> None:
    assert home.main() == 0
    manifest = json.loads((home.run / "manifest.json").read_text())
    assert sorted(manifest["files"]) == [
        "diff/iep.csv", "ia/iep.csv", "ic/iep.csv", "sgi_log.txt", "summary.json",
    ]  # fmt: skip
    pushed = home.pushed()["manifest.json"]
    assert pushed == (home.run / "manifest.json").read_bytes()
    first = hashlib.sha256(pushed).hexdigest()
    assert home.main("sync", "--dry-run") == 0
    previous = json.loads((home.run / "manifest.json").read_text())["previous"]
    assert previous == {"run": home.runs()[0].name, "sha256": first}
    home.extract([], epoch="20260102-139029")
    assert home.main() == 6
    assert "HELD" in json.loads((home.run / "manifest.json").read_text())["files"]
    upload = home.sftp_root / "upload"
    upload.rename(upload.with_name("gone"))
    assert home.main() == 3  # after that of the outcome, the manifest of the failure
    upload.with_name("gone").rename(upload)
    assert home.main("sync", "--force") == 0
    assert altered(home.path) == []
    assert len([run for run in sgsync.runs(home.path / "history") if run.manifest]) == 5
    alter(home.runs()[0] / "ia/iep.csv")
    assert altered(home.path) == [f"{home.runs()[0].name}: ia/iep.csv was altered"]
