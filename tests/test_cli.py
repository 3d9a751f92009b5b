"""The command line, through main(argv) and as a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import sgsync
from support import homes

SOURCE = [
    ("1001", "2026-01-05", "LOCKED", "Ana"),
    ("1002", "2026-01-06", "LOCKED", "Lee"),
    ("1003", "2026-01-07", "LOCKED", ""),
]
TARGET = [("1002", "2026-01-06", "OPEN", "Lee"), ("1009", "2026-01-09", "LOCKED", "Gone")]
DRIVERS = {"paramiko", "pyodbc", "lxml", "oracledb", "rich", "tenacity", "filelock", "keyring"}
LOG_LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and terminals")


@pytest.fixture
def ready(sqlite_home: homes.Home) -> homes.Home:
    """A home for a run with one row to insert twice, to update and to delete."""
    sqlite_home.extract(SOURCE)
    sqlite_home.sis(TARGET)
    return sqlite_home


def run(
    *argv: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    script: Path = homes.SCRIPT,
) -> subprocess.CompletedProcess[str]:
    """sgsync as a process, with just these arguments."""
    return subprocess.run(
        [sys.executable, str(script), *map(str, argv)],
        capture_output=True, encoding="utf-8", errors="backslashreplace", timeout=60, check=False,
        stdin=subprocess.DEVNULL, cwd=cwd, env={**os.environ, **(env or {})},
    )  # fmt: skip


def csv_files(folder: Path) -> tuple[Path, Path]:
    a, b = folder / "a.csv", folder / "b.csv"
    a.write_bytes(b"id,name\r\n1,Ana\r\n2,Lee\r\n")
    b.write_bytes(b"id,name\r\n2,Leo\r\n3,Max\r\n")
    return a, b


CHANGES = (
    "operation,before_id,before_name,after_id,after_name\r\n"
    "insert,,,1,Ana\r\nupdate,2,Leo,2,Lee\r\ndelete,3,Max,,\r\n"
)

# ------------------------------------------------------------------ words and options


def test_main_without_a_command_runs_sync(ready: homes.Home, tmp_path: Path) -> None:
    shutil.copy(homes.SCRIPT, ready.path)
    done = run(script=ready.path / "sgsync.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert ready.summary["command"] == "sync"
    assert ready.sis_rows() == SOURCE
    pattern = (
        rf"{LOG_LINE}complete: 2 rows inserted, 1 row updated, 1 row deleted "
        rf"\(\d+\.\d s, run {ready.run.name}\)"
    )
    assert re.fullmatch(pattern, done.stderr.splitlines()[-1])
    assert not [path for path in tmp_path.iterdir() if path != ready.path]


@pytest.mark.parametrize(
    "argv",
    [
        ["--dry-run", "--home", "HOME"],
        ["--home", "HOME", "--dry-run"],
        ["--home", "HOME", "sync", "--dry-run"],
        ["sync", "--dry-run", "--home", "HOME"],
        ["--quiet", "--home=HOME", "sync", "--dry-run", "--json"],
        ["--home", "elsewhere", "sync", "--dry-run", "--home", "HOME"],
    ],
)
def test_main_takes_options_before_and_after_the_command(
    ready: homes.Home, argv: Sequence[str]
) -> None:
    assert sgsync.main([word.replace("HOME", str(ready.path)) for word in argv]) == 0
    assert ready.summary["outcome"] == "dry run"
    assert ready.sis_rows() == TARGET


def test_main_takes_a_relative_home(ready: homes.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one that is called like a command."""
    ready.path = ready.path.rename(ready.path.with_name("diff"))
    monkeypatch.chdir(ready.path.parent)
    assert sgsync.main(["--home", "diff", "--dry-run"]) == 0
    assert sgsync.main(["sync", "--home", "diff/../diff", "--dry-run"]) == 0
    assert len(ready.runs()) == 2


def test_main_takes_another_config(ready: homes.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named from the working directory; what it names is looked up in the home all the same."""
    other = ready.path.parent / "other.xml"
    (ready.path / "config.xml").rename(other)
    monkeypatch.chdir(other.parent)
    assert ready.main("--config", "other.xml", "--dry-run") == 0
    assert ready.main("sync", "--dry-run") == 2
    assert ready.summary["message"] == (
        f"{ready.path / 'config.xml'}: cannot be read: No such file or directory\n"
        "Try: give the folder that holds config.xml with --home, or the file with --config"
    )
    other.write_text("<Config/", encoding="utf-8")
    assert ready.main("--config", str(other)) == 2
    assert ready.summary["message"].startswith("other.xml:1: not well-formed XML: ")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (
            ["--frobnicate"],
            "sgsync.py: unrecognized arguments: --frobnicate\nTry: sgsync.py --help\n",
        ),
        (["sync", "x"], "sgsync.py: unrecognized arguments: x\nTry: sgsync.py --help\n"),
        (["--dry"], "sgsync.py: unrecognized arguments: --dry\nTry: sgsync.py --help\n"),
        (
            ["--home"],
            "sgsync.py sync: argument --home: expected one argument\nTry: sgsync.py sync --help\n",
        ),
        (
            ["diff", "a.csv"],
            "sgsync.py diff: the following arguments are required: B.csv\n"
            "Try: sgsync.py diff --help\n",
        ),
    ],
)
def test_main_refuses_wrong_usage(
    argv: Sequence[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sgsync.main(argv) == 2
    assert capsys.readouterr() == ("", told)


def test_main_refuses_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert sgsync.main(["synk"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("sgsync.py: argument COMMAND: invalid choice: 'synk' (choose from ")
    assert told.endswith(")\nTry: sgsync.py --help\n")


def test_main_refuses_a_home_that_is_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sgsync.main(["--home", str(tmp_path / "none")]) == 2
    pattern = (
        rf"{LOG_LINE}{re.escape(str(tmp_path / 'none'))}: is no folder\n"
        r"    Try: name the one of config.xml: --home DIR\n"
    )
    assert re.fullmatch(pattern, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [["--version"], ["sync", "--version"], ["diff", "--version"]])
def test_main_tells_its_version(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sgsync.main(argv) == 0
    assert capsys.readouterr() == (f"sgsync {sgsync.__version__}\n", "")


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["sync", "--help"], ["diff", "-h"]])
def test_main_helps(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sgsync.main(argv) == 0
    told, errors = capsys.readouterr()
    assert told.startswith("usage: sgsync.py")
    assert errors == ""


def test_main_help_names_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    sgsync.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for command in sgsync.COMMANDS:
        assert f" {command} " in told
    for code in (0, 1, 2, 3, 4, 5, 6, 7, 8, 130):
        assert re.search(rf"[:,] {code} [a-z]", told, re.I), code


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["diff", "a.csv", "b.csv"]])
def test_main_loads_no_driver_where_it_needs_none(tmp_path: Path, argv: Sequence[str]) -> None:
    csv_files(tmp_path)
    program = (
        "import sys; before = set(sys.modules); import sgsync; "
        f"code = sgsync.main({argv!r}); loaded = {{n.partition('.')[0] for n in sys.modules}}; "
        f"sys.stderr.write(repr((code, sorted(loaded & {DRIVERS!r}))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(homes.SCRIPT.parent)},
    )  # fmt: skip
    assert done.stderr.endswith("(0, [])")


# ------------------------------------------------------------------ what it says


def test_main_logs_plain_lines_without_a_terminal(ready: homes.Home) -> None:
    done = ready.process()
    assert done.returncode == 0
    assert done.stdout == ""
    assert "\x1b" not in done.stderr
    assert all(re.match(LOG_LINE, line) for line in done.stderr.splitlines())


def test_main_verbose_logs_more(ready: homes.Home) -> None:
    done = ready.process("sync", "--dry-run", "--verbose")
    assert done.returncode == 0
    assert "dry run: 2 rows would be inserted" in done.stderr


def test_main_quiet_prints_problems_only(ready: homes.Home) -> None:
    done = ready.process("sync", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "iep.csv: 3 rows, of them 2 to insert, 1 to update, 1 to delete" in ready.log
    (ready.path / "config.xml").unlink()
    done = ready.process("sync", "--quiet")
    assert done.returncode == 2
    assert [re.sub(LOG_LINE, "", line) for line in done.stderr.splitlines()] == [
        f"{ready.path / 'config.xml'}: cannot be read: No such file or directory",
        "    Try: give the folder that holds config.xml with --home, or the file with --config",
    ]


def test_main_json_prints_the_summary_of_a_run(ready: homes.Home) -> None:
    done = ready.process("sync", "--json")
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    summary = json.loads(done.stdout)
    assert summary == ready.summary
    assert (summary["outcome"], summary["exit_code"]) == ("complete", 0)
    assert summary["message"] == "2 rows inserted, 1 row updated, 1 row deleted"
    (file,) = summary["files"]
    counts = {name: file[name] for name in ("rows", "insert", "update", "delete", "failed")}
    assert (file["file"], counts) == (
        "iep.csv",
        {"rows": 3, "insert": 2, "update": 1, "delete": 1, "failed": 0},
    )


def test_main_json_prints_the_summary_of_a_failed_run(
    ready: homes.Home, capsys: pytest.CaptureFixture[str]
) -> None:
    (ready.path / "ssh/known_hosts").write_text("", encoding="ascii")
    assert ready.main("sync", "--json") == 3
    summary = json.loads(capsys.readouterr().out)
    assert summary == ready.summary
    assert (summary["outcome"], summary["exit_code"]) == ("failed", 3)


def test_main_json_prints_an_object_even_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "none"
    assert sgsync.main(["--json", "--home", str(home)]) == 2
    assert json.loads(capsys.readouterr().out) == {
        "command": "sync",
        "version": sgsync.__version__,
        "outcome": "failed",
        "exit_code": 2,
        "message": f"{home}: is no folder\nTry: name the one of config.xml: --home DIR",
    }


def test_main_json_keeps_the_exit_code_when_nobody_reads_on(ready: homes.Home) -> None:
    argv = ["--home", str(ready.path), "--json"]
    with subprocess.Popen(
        [sys.executable, str(homes.SCRIPT), *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()
        assert process.wait(60) == 0
    assert ready.summary["outcome"] == "complete"


def test_main_json_prints_the_summary_of_a_diff(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = csv_files(tmp_path)
    out = tmp_path / "out.csv"
    argv = ["diff", str(a), str(b), "--key", "id", "--json"]
    assert sgsync.main([*argv, "--output", str(out)]) == 0
    summary = json.loads(capsys.readouterr().out)
    (file,) = summary.pop("files")
    assert summary == {
        "command": "diff",
        "version": sgsync.__version__,
        "outcome": "complete",
        "exit_code": 0,
        "message": "1 to insert, 1 to update, 1 to delete",
    }
    counts = {"rows": 2, "database_rows": 2, "insert": 1, "update": 1, "delete": 1}
    assert file == file | {"file": "a.csv"} | counts
    assert out.read_bytes().decode() == CHANGES
    assert sgsync.main(argv) == 2
    told, errors = capsys.readouterr()
    message = "--json: standard output holds the changes\nTry: name a file with --output"
    assert json.loads(told)["message"] == message
    assert errors == message.replace("\n", "\n    ") + "\n"


def test_main_diff_prints_changes_and_a_summary(tmp_path: Path) -> None:
    a, b = csv_files(tmp_path)
    done = run("diff", a.name, b.name, "--key", "id", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == "2 rows, 2 rows: 1 to insert, 1 to update, 1 to delete\n"
    assert done.stdout == CHANGES.replace("\r\n", "\n")
    done = run("diff", a, b, "--key", "id", "--quiet", "--output", tmp_path / "out.csv")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out.csv").read_bytes().decode() == CHANGES


@posix
def test_main_diff_ends_when_nobody_reads_on(tmp_path: Path) -> None:
    a, b = csv_files(tmp_path)
    rows = "".join(f"{number:06},x\n" for number in range(100_000))
    a.write_text("id,name\n" + rows, encoding="utf-8")
    b.write_text("id,name\n", encoding="utf-8")
    command = [sys.executable, str(homes.SCRIPT), "diff", str(a), str(b), "--key", "id"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == CHANGES.partition("\n")[0].encode() + b"\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


# ------------------------------------------------------------------ odd consoles


def test_main_runs_without_stdout_and_stderr(
    ready: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under pythonw."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert ready.main("sync", "--json") == 0
    assert "complete" in ready.summary["outcome"]
    (ready.path / "config.xml").unlink()
    assert ready.main() == 2
    assert "cannot be read" in ready.log
    assert sgsync.main(["--frobnicate"]) == 2
    assert sgsync.main(["--help"]) == 0
    a, b = csv_files(ready.path)
    assert sgsync.main(["diff", str(a), str(b), "--key", "id"]) == 2
    out = ready.path / "out.csv"
    assert sgsync.main(["diff", str(a), str(b), "--key", "id", "--output", str(out)]) == 0
    assert out.read_bytes().decode() == CHANGES


def test_main_shows_characters_that_the_console_lacks(tmp_path: Path) -> None:
    home = tmp_path / "Škola 漢字"
    done = run("--home", home, env={"PYTHONIOENCODING": "cp1252:strict", "PYTHONUTF8": "0"})
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "\\x8akola \\u6f22\\u5b57: is no folder" in done.stderr
    stderr = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", errors="strict")
    with contextlib.redirect_stderr(stderr):
        assert sgsync.main(["--home", str(home)]) == 2
    stderr.flush()
    assert f"Škola \\u6f22\\u5b57: is no folder{os.linesep}".encode("cp1252") in (
        stderr.buffer.getvalue()  # type: ignore[attr-defined]
    )


@contextlib.contextmanager
def terminal(
    *argv: str | Path, columns: int = 100
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """sgsync in front of a terminal; yields the process and the terminal's other end."""
    import fcntl
    import struct
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE"):
        env.pop(name, None)
    try:
        with subprocess.Popen(
            [sys.executable, str(homes.SCRIPT), *map(str, argv)],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=env,
        ) as process:  # fmt: skip
            os.close(theirs)
            yield process, ours
    finally:
        os.close(ours)


def screen(reader: int) -> str:
    """Everything written to the terminal, without its colours and movements."""
    data = b""
    with contextlib.suppress(OSError):  # Linux says so once the last writer is gone.
        while block := os.read(reader, 65536):
            data += block
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode()).replace("\r", "")


@posix
def test_main_ends_with_a_table_and_a_sentence_on_a_terminal(ready: homes.Home) -> None:
    with terminal("--home", ready.path) as (process, reader):
        told = screen(reader)
        assert process.wait(60) == 0
    *_, head, _, row, _, sentence = told.rstrip("\n").split("\n")
    cells = [cell.strip() for cell in re.split("[│┃]", head)[1:-1]]
    assert cells == ["file", "rows", "inserted", "updated", "deleted", "failed", "time"]
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells[:-1] == ["iep.csv", "3", "2", "1", "1", "0"]
    assert re.fullmatch(r"\d+\.\d s", cells[-1])
    assert re.fullmatch(
        rf"complete: 2 rows inserted, 1 row updated, 1 row deleted "
        rf"\(\d+\.\d s, run {ready.run.name}\)",
        sentence,
    )
    for stage in ("download", "export iep.csv", "diff iep.csv", "apply iep.csv", "push"):
        assert re.search(rf"{stage} +━+ 100%", told), stage
    assert re.search(LOG_LINE, told) is None


@posix
def test_main_tells_of_a_failure_on_a_terminal(ready: homes.Home) -> None:
    (ready.path / "ssh/known_hosts").write_text("", encoding="ascii")
    with terminal("--home", ready.path) as (process, reader):
        told = screen(reader)
        assert process.wait(60) == 3
    assert "Traceback" not in told
    assert re.search(r"^.*known_hosts: has no host key\n    Try: pin", told, re.M)


@posix
def test_main_shows_odd_file_names_on_a_terminal(ready: homes.Home) -> None:
    """Which are no markup to rich."""
    name = "[red]x[bold].csv"
    ready.configure(diff="", upload="")
    config = ready.path / "config.xml"
    config.write_text(config.read_text(encoding="utf-8").replace("iep.csv", name), encoding="utf-8")
    ready.extract(files={name: homes.csv_text(SOURCE)})
    with terminal("--home", ready.path, "--dry-run") as (process, reader):
        told = screen(reader)
        assert process.wait(60) == 0
    assert f"│ {name} │" in told
    assert f"diff {name} " in told


# ------------------------------------------------------------------ interruptions


SLEEP = (
    "SELECT pg_sleep(60)::text AS \"studentNumber\", '' AS \"startDate\", '' AS status, "
    "'' AS manager"
)


@contextlib.contextmanager
def sleeping(home: homes.Home) -> Iterator[subprocess.Popen[str]]:
    """A run whose export takes a minute; it has begun."""
    home.extract(SOURCE)
    home.configure(query=SLEEP)
    command = [sys.executable, str(homes.SCRIPT), "--home", str(home.path), "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        stdin=subprocess.DEVNULL,
        # a shell that starts the tests in the background has SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            busy = (
                "SELECT 1 FROM pg_stat_activity "
                "WHERE query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()"
            )
            while not home.database.rows(busy):
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


INTERRUPTED = "interrupted; what was written so far stays, the next run goes on from it"


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_main_interrupted_ends_with_130(postgres_home: homes.Home, name: str) -> None:
    home = postgres_home
    with sleeping(home) as process:
        process.send_signal(getattr(signal, name))
        out, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert re.fullmatch(LOG_LINE + INTERRUPTED, errors.splitlines()[-1])
    assert "Traceback" not in errors
    assert json.loads(out) == home.summary
    summary = home.summary
    assert (summary["outcome"], summary["exit_code"]) == ("interrupted", 130)
    assert summary["message"] == INTERRUPTED
    assert re.search(rf" ERROR +{INTERRUPTED}\n", home.log)
    assert not (home.run / "COMPLETE").exists()
    assert not list((home.sftp_root / "upload").iterdir())
    home.configure(query=homes.QUERY.format(order=homes.ORDER["postgresql"]))
    assert home.main() == 0  # The lock is free.


def test_main_leaves_signals_and_log_as_they_were(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    handlers = list(sgsync.log.handlers)
    a, b = csv_files(tmp_path)
    sgsync.main(["diff", str(a), str(b), "--key", "id", "--output", str(tmp_path / "out.csv")])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert sgsync.log.handlers == handlers


def broken(*_: object) -> None:
    raise ZeroDivisionError("division of swordfish by zero\n\x1b[31mred")


def test_main_tells_of_an_unexpected_error_in_one_line(
    ready: homes.Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sgsync, "run_statements", broken)
    monkeypatch.setattr(sgsync, "_SECRETS", {"swordfish"})
    assert ready.main("sync", "--quiet") == 1
    message = (
        "unexpected error: ZeroDivisionError: division of *** by zero \\x1b[31mred\n"
        "Try: send sgi_log.txt of this run to whoever maintains sgsync"
    )
    told = capsys.readouterr()
    assert told.out == ""
    assert re.sub(LOG_LINE, "", told.err) == message.replace("\n", "\n    ") + "\n"
    assert ready.summary["message"] == message
    assert (ready.summary["outcome"], ready.summary["exit_code"]) == ("failed", 1)
    log = ready.log
    assert message.replace("\n", "\n    ") in log
    assert "    Traceback (most recent call last):\n" in log
    assert ", in broken\n" in log
    assert "swordfish" not in log.replace('"division of swordfish', "")


def test_main_verbose_shows_the_traceback(
    ready: homes.Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sgsync, "run_statements", broken)
    assert ready.main("sync", "--verbose") == 1
    assert "    Traceback (most recent call last):\n" in capsys.readouterr().err
