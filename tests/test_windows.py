"""What is different on Windows: windows that close, no console, locks, files in use, paths."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import sgsync
from support import homes

windows = pytest.mark.skipif(sys.platform != "win32", reason="needs Windows")
DETACHED = 0x8  # subprocess has this name on Windows only

# ------------------------------------------------------------------ a double click


@pytest.mark.skipif(sys.platform == "win32", reason="elsewhere than on Windows")
def test_wait_if_double_clicked_never_waits_elsewhere() -> None:
    sgsync.wait_if_double_clicked()


# ------------------------------------------------------------------ no console, odd ones


@windows
@pytest.mark.parametrize("program", ["python.exe", "pythonw.exe"])
def test_script_runs_without_a_console(tmp_path: Path, program: str) -> None:
    """As a task does whose user is not logged on; its evidence is in history all the same."""
    interpreter = Path(sys.executable).with_name(program)

    def run(*argv: str) -> int:
        command = [str(interpreter), str(homes.SCRIPT), *argv]
        return subprocess.run(
            command, creationflags=DETACHED, timeout=60, check=False, cwd=os.environ["SYSTEMROOT"]
        ).returncode

    assert run("--home", str(tmp_path), "--json") == 2
    (log,) = tmp_path.glob("history/*/sgi_log.txt")
    assert "config.xml: cannot be read: " in log.read_text(encoding="utf-8")
    assert run("--home", str(tmp_path / "none")) == 2
    assert run("--help") == 0
    assert run("--frobnicate") == 2


@windows
def test_script_writes_to_a_pipe_in_the_code_page_of_windows(tmp_path: Path) -> None:
    home = tmp_path / "Škola 漢字"
    done = subprocess.run(
        [sys.executable, str(homes.SCRIPT), "--home", str(home)],
        capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
    )  # fmt: skip
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"ola \\u6f22\\u5b57: is not a folder\r\n    Try: " in done.stderr


@windows
def test_diff_takes_paths_of_windows(tmp_path: Path) -> None:
    folder = tmp_path / "with blanks & (x86)"
    folder.mkdir()
    (folder / "a.csv").write_bytes(b"id,name\r\n1,Ana\r\n2,Lee\r\n")
    (folder / "b.csv").write_bytes(b"id,name\n2,Leo\n")
    drive = str(folder.absolute())
    assert re.match("[A-Za-z]:\\\\", drive)
    changes = (
        b"operation,before_id,before_name,after_id,after_name\r\n"
        b"insert,,,1,Ana\r\nupdate,2,Leo,2,Lee\r\n"
    )
    for a, b in (
        (f"{drive}\\a.csv", f"{drive}\\b.csv"),
        (f"{drive}/a.csv".replace("\\", "/"), f"{drive}\\..\\{folder.name}\\B.CSV"),
        ("a.csv", ".\\b.csv"),
    ):
        done = subprocess.run(
            [sys.executable, str(homes.SCRIPT), "diff", a, b, "--key", "id"],
            capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False, cwd=folder,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, changes)
        assert done.stderr == b"2 rows, 1 row: 1 to insert, 1 to update, 0 to delete\r\n"


# ------------------------------------------------------------------ signals, locks, files in use


@windows
def test_main_ends_with_130_when_its_window_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows asks by SIGBREAK."""
    monkeypatch.setattr(
        sgsync, "load_config", lambda *_: signal.raise_signal(signal.Signals["SIGBREAK"])
    )
    assert sgsync.main(["--home", str(tmp_path)]) == 130
    (run,) = (path for path in (tmp_path / "history").iterdir() if path.is_dir())
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert (summary["outcome"], summary["exit_code"]) == ("interrupted", 130)
    assert "interrupted: nothing was written" in (run / "sgi_log.txt").read_text()


HOLD = """
import sys, pathlib
sys.path.insert(0, {folder!r})
import sgsync
home = pathlib.Path({home!r})
options = sgsync.SyncOptions(command="sync", home=home, config=home / "config.xml")
with sgsync.open_run(options) as run, sgsync.only_run(run, "sync"):
    print(run.folder.name, flush=True)
    run.conclude("complete", 0, "held the lock")
    sys.stdin.read()
"""


def test_main_refuses_a_second_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which gets an epoch of its own, be it in the same second."""
    program = HOLD.format(folder=str(homes.SCRIPT.parent), home=str(tmp_path))
    values = dict.fromkeys(
        ("sftp", "database", "limits", "history", "diff", "more", "upload", "root"), ""
    )
    config = homes.CONFIG.format(
        host="h", port=22, username="u", connection="x", query="x", calls="", **values
    )
    (tmp_path / "config.xml").write_text(config, encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        epoch = holder.stdout.readline().strip()
        assert sgsync.main(["--home", str(tmp_path)]) == 7
        told = capsys.readouterr().err
        assert re.search(
            rf"another sync run is active in this home: process {holder.pid}, since "
            rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d[-+]\d\d:\d\d \(run {epoch}\); "
            r"nothing was done \(.*\)\n    Try: wait",
            told,
        )
        holder.communicate("")
    assert holder.returncode == 0
    (tmp_path / "config.xml").unlink()
    assert sgsync.main(["--home", str(tmp_path)]) == 2  # The lock is free.
    runs = [path for path in (tmp_path / "history").iterdir() if path.is_dir()]
    assert len(runs) == 3
    assert all(sgsync.EPOCH.fullmatch(path.name) for path in runs)


@windows
def test_new_file_waits_for_a_virus_scanner(tmp_path: Path) -> None:
    """A file that somebody has open cannot be replaced; most let go of it soon."""
    path = tmp_path / "iep.csv"
    path.write_bytes(b"old")
    held = path.open("rb")
    threading.Thread(target=lambda: (time.sleep(0.2), held.close())).start()
    with sgsync.new_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


@windows
def test_new_file_tells_of_a_file_that_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "iep.csv"
    path.write_bytes(b"old")
    with path.open("rb"), pytest.raises(sgsync.Error) as caught, sgsync.new_file(path) as file:
        file.write(b"new")
    assert str(caught.value).startswith(f"{path}: ")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["iep.csv"]


@windows
def test_prune_does_not_follow_junctions(tmp_path: Path) -> None:
    import _winapi

    target, history = tmp_path / "precious", tmp_path / "history"
    (target / "data").mkdir(parents=True)
    for name in ("20260101-000000", "20260103-000000"):
        (history / name).mkdir(parents=True)
    junction = history / "20260102-000000"
    try:
        _winapi.CreateJunction(str(target), str(junction))  # type: ignore[attr-defined]
    except OSError as error:
        pytest.skip(f"no junctions here: {error}")
    assert not sgsync._is_real_directory(junction)
    assert sgsync.prune(history, 1, history / "20260103-000000") == 1
    assert sorted(path.name for path in history.iterdir()) == [
        "20260102-000000",
        "20260103-000000",
    ]
    assert (target / "data").is_dir()
