"""`sgsync.py check` on real servers: what it finds, what it skips, and that it changes nothing."""

from __future__ import annotations

import datetime
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sgsync
from support import homes, schoolinks_server, servers
from support.districts import District

pytestmark = pytest.mark.skipif(os.name == "nt", reason="these servers run on Linux only")
ROWS = [("1001", "2026-01-05", "LOCKED", "Ana"), ("1002", "2026-01-06", "LOCKED", "Lee")]
NOTIFY = '<Notify on="failure" ping="https://hc.example/x"/>'


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SCHOOLINKS_", "POWERSCHOOL_")):
            monkeypatch.delenv(name)


class Checked:
    """The findings of one `check`."""

    def __init__(self, code: int, out: str) -> None:
        self.code = code
        self.found = [sgsync.Finding(**line) for line in json.loads(out)]

    def states(self, state: str) -> list[str]:
        return [finding.check for finding in self.found if finding.state == state]

    def of(self, check: str, state: str = "") -> sgsync.Finding:
        """The last one of that check."""
        return [f for f in self.found if f.check == check and state in ("", f.state)][-1]


Check = Callable[..., Checked]


@pytest.fixture
def checked(capsys: pytest.CaptureFixture[str]) -> Check:
    def run(path: Path, *words: str) -> Checked:
        capsys.readouterr()
        code = sgsync.main(["check", "--json", *words, "--home", str(path)])
        out, err = capsys.readouterr()
        assert err == ""
        return Checked(code, out)

    return run


@pytest.fixture
def home(postgres_home: homes.Home) -> homes.Home:
    postgres_home.configure(history=NOTIFY)
    postgres_home.extract(ROWS)
    postgres_home.sis(ROWS[:1])
    (postgres_home.path / "history").mkdir()
    return postgres_home


def tree(*folders: Path) -> dict[Path, bytes]:
    """Every file and folder below, and what is in them."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: path.read_bytes() if path.is_file() else b"" for path in paths}


# ------------------------------------------------------------------ sync


def test_check_passes_and_changes_nothing(
    home: homes.Home, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(home.path, home.sftp_root)
    rows = home.sis_rows()
    assert home.main("check") == 0
    out, err = capsys.readouterr()
    assert tree(home.path, home.sftp_root) == before
    assert (home.sis_rows(), home.runs(), err) == (rows, [], "")
    assert re.sub(r"(?m)^(ok +sync [^:]+): .*", r"\1", out).splitlines() == [
        f"ok       sync {name}"
        for name in (
            "Python", "Python", "configuration", "permissions", "disk", "notices", "ODBC driver",
            "host key", "SFTP log-in", "download directory", "upload directory", "clock",
            "database log-in", "clock", "query iep.csv", "iep.csv insert", "iep.csv update",
            "iep.csv delete",
        )
    ]  # fmt: skip
    assert "ok       sync query iep.csv: 4 columns; the first 1 row of the database and those of " \
        "SameGoal's file can be compared\n" in out  # fmt: skip
    assert "ok       sync iep.csv insert: sg_iep_upsert, 4 values\n" in out
    assert "agrees with the clock of the SFTP server\n" in out
    assert home.database.connection_string.split("PWD=")[1].split(";")[0] not in out


def test_check_goes_on_after_a_failure_and_skips_what_depends_on_it(
    home: homes.Home, checked: Check
) -> None:
    home.known_hosts(home.sshd.other_known_hosts)
    found = checked(home.path)
    assert found.code == 3
    assert found.states("failed") == ["host key"]
    assert found.states("skipped") == ["SFTP log-in", "download directory", "upload directory"]
    assert found.of("host key").message.endswith("; nothing was sent")
    assert found.of("SFTP log-in").message == "needs: host key"
    assert "can be compared" in found.of("query iep.csv").message


def test_check_tells_every_mistake_of_the_configuration(home: homes.Home, checked: Check) -> None:
    home.configure(sftp='maxAgeHours="x" requireComplete="y"')
    found = checked(home.path)
    assert (found.code, found.states("failed")) == (2, ["configuration"])
    assert found.of("configuration").message.count("\n") == 3
    assert set(found.states("ok")) == {"Python", "disk"}


@pytest.mark.parametrize(
    ("change", "check", "code", "told"),
    [
        (lambda h: h.private_key("stranger"), "SFTP log-in", 3, "refused"),
        (lambda h: (h.path / "ssh/id_rsa").unlink(), "SFTP log-in", 2, "cannot be read"),
        (lambda h: (h.path / "ssh/known_hosts").unlink(), "host key", 3, "has no host key for"),
        (lambda h: (h.sftp_root / "upload").rmdir(), "upload directory", 3,
         "upload directory does not exist"),
        (lambda h: h.extract(files={"other.csv": "a\n1\n"}, epoch="20270101-000000"),
         "download directory", 5, "does not contain iep.csv; it has other.csv"),
        (lambda h: h.extract(files={"iep.csv": "a,b\n"}, epoch="20270101-000000"),
         "query iep.csv", 5, "ia/iep.csv"),
        (lambda h: h.extract([ROWS[1], ROWS[0]], epoch="20270101-000000"),
         "query iep.csv", 5, "ia/iep.csv:3: not sorted"),
        (lambda h: h.extract([ROWS[0], ROWS[0]], epoch="20270101-000000"),
         "query iep.csv", 5, "have the same key"),
        (lambda h: h.database.execute("DROP TABLE iep"), "query iep.csv", 4, "does not exist"),
        (lambda h: h.database.execute("DROP PROCEDURE sg_iep_upsert"), "iep.csv insert", 4,
         "sg_iep_upsert: it does not exist"),
        (lambda h: h.configure(connection=h.values["connection"].replace("PWD=", "PWD=x")),
         "database log-in", 4, "authentication failed"),
        (lambda h: h.configure(connection="Driver={No Driver};Server=x"), "ODBC driver", 4,
         "the driver No Driver is not installed"),
    ],
)  # fmt: skip
def test_check_finds(
    home: homes.Home,
    checked: Check,
    change: Callable[[homes.Home], object],
    check: str,
    code: int,
    told: str,
) -> None:
    change(home)
    found = checked(home.path)
    finding = found.of(check, "failed")
    assert (found.code, finding.exit_code) == (code, code)
    assert told in finding.message
    assert not list((home.sftp_root).glob("upload/*"))
    if check != "query iep.csv":
        assert finding.remedy


def test_check_warns(home: homes.Home, checked: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what does not stop a run: exit code 0."""
    today = datetime.date.today()
    pause = f'<Pause from="{today}" to="{today}" why="test"/>'
    home.configure(history=pause)
    (home.path / "config.xml").chmod(0o644)
    old = time.time() - 50 * 3600
    for path in (home.sftp_root / "download").rglob("*"):
        os.utime(path, (old, old))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 1000)
    found = checked(home.path)
    assert found.code == 0
    assert set(found.states("warning")) == {
        "permissions", "notices", "download directory", "clock",
    }  # fmt: skip
    assert (
        "everyone on this machine can read this file" in found.of("permissions", "warning").message
    )
    assert "chmod 600" in found.of("permissions", "warning").remedy
    messages = [f.message for f in found.found if f.state == "warning"]
    assert f"today is in a <Pause>: nothing runs from {today} to {today}" in messages
    assert "nobody is told when a run fails" in messages
    assert any("hours old" in message for message in messages)
    clocks = [m for m in messages if re.fullmatch(r"(999|1,00\d) s ahead of the clock of .*", m)]
    assert len(clocks) == 2


def test_check_looks_at_the_beginning_of_long_files(home: homes.Home, checked: Check) -> None:
    """Whole records only, however they are quoted; what comes later is not read."""
    rows = [(f"{n:07}", "2026-01-05", "LOCKED", '"a\nb"') for n in range(20_000)]
    home.extract([*rows, rows[0]], epoch="20270101-000000")
    found = checked(home.path)
    assert found.code == 0, found.found
    home.sis([(number, date, status, "x") for number, date, status, _ in rows[:1500]])
    assert "the first 1,000 rows of the database" in checked(home.path).of("query iep.csv").message


def test_check_warns_of_packages_that_were_not_tested(
    home: homes.Home, checked: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "requirements.txt").write_text("paramiko>=1.0,<2\nlxml>=1,<99\nnothere>=1,<2\n")
    monkeypatch.setattr(sgsync, "SCRIPT", tmp_path / "sgsync.py")
    finding = checked(home.path).of("Python", "warning")
    assert re.fullmatch(
        r"paramiko [\d.]+ was not tested, only 1.0 and newer, below 2", finding.message
    )
    monkeypatch.setattr(sgsync.SyncChecks, "packages", ("nothere",))
    found = checked(home.path)
    assert (found.code, found.of("Python").message) == (2, "the package nothere is not installed")


def test_check_tells_of_a_login_without_rights(
    home: homes.Home, checked: Check, postgres_server: servers.Postgres
) -> None:
    user = servers.fresh_name()
    home.database.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'Mellon-9'")
    home.database.execute("REVOKE EXECUTE ON PROCEDURE sg_iep_delete FROM PUBLIC")
    text = home.values["connection"].replace(f"UID={postgres_server.username};", f"UID={user};")
    home.configure(connection=text.replace(f"PWD={postgres_server.password};", "PWD=Mellon-9;"))
    try:
        found = checked(home.path)
        assert found.code == 4
        assert found.states("failed") == ["query iep.csv", "iep.csv delete"]
        assert "permission denied" in found.of("query iep.csv").message
        assert found.of("iep.csv delete").message == "sg_iep_delete: this login may not execute it"
    finally:
        home.database.execute(f"DROP ROLE {user}")


# ------------------------------------------------------------------ which jobs


def test_check_takes_the_jobs_that_are_filled_in(
    home: homes.Home,
    checked: Check,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def jobs(*words: str) -> set[str]:
        return {finding.job for finding in checked(home.path, *words).found}

    config = home.path / "config.xml"
    both = config.read_text().replace("</Config>", "<SchooLinks><GPA/></SchooLinks></Config>")
    config.write_text(both)
    config.chmod(0o600)
    assert jobs() == {"sync"}
    assert jobs("--job", "all") == {"sync", "schoolinks"}
    monkeypatch.setenv("SCHOOLINKS_SFTP_ADDRESS", "localhost")
    assert jobs() == {"sync", "schoolinks"}
    config.write_text(both.replace(f'host="{home.sshd.host}"', 'host="TODO(user)"'))
    assert jobs() == {"schoolinks"}
    monkeypatch.delenv("SCHOOLINKS_SFTP_ADDRESS")
    capsys.readouterr()
    assert home.main("check") == 2
    assert "no job is filled in yet" in capsys.readouterr().err
    assert home.main("check", "--job", "sync") == 2
    assert "failed   sync configuration: config.xml:" in capsys.readouterr().out


# ------------------------------------------------------------------ schoolinks


@pytest.fixture
def district(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[District]:
    with schoolinks_server.SchooLinks(tmp_path / "server") as server:
        made = District(tmp_path / "home", server, monkeypatch)
        made.students(1001, 1002)
        made.powerschool.insert(
            "ps_adaadm_daily_ctod",
            [{"studentid": 1001, "fteid": 70, "calendardate": datetime.date.today(),
              "attendancevalue": 1.0, "membershipvalue": 1.0}],
        )  # fmt: skip
        (made.path / "history").mkdir()
        yield made


def test_check_of_schoolinks(district: District, checked: Check) -> None:
    before = tree(district.path, district.server.files)
    found = checked(district.path)
    assert tree(district.path, district.server.files) == before
    assert found.code == 0
    assert not found.states("failed")
    assert {finding.job for finding in found.found} == {"schoolinks"}
    assert found.of("students").message == (
        "2 rows; filled: student_number 2, id 2, dcid 2, fteid 2, enroll_status 2, grade_level 2, "
        "schoolid 2"
    )
    assert found.of("ps_adaadm_daily_ctod").message.startswith(
        "1 row in the last 30 days; filled: "
    )
    assert [f.message for f in found.found if f.check == "s_il_stu_x"] == [
        "2 rows; filled: studentsdcid 2, iep 2, lep 0, lii 0",
        "the column lep is empty in every row", "the column lii is empty in every row",
    ]  # fmt: skip
    assert found.states("warning").count("s_il_stu_plan504_x") == 1  # no rows
    assert [f.message for f in found.found if f.check == "directories"] == [
        "/other is there", "/automated is there",
    ]  # fmt: skip


def test_check_of_schoolinks_finds_what_is_missing(
    district: District, checked: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    district.powerschool.execute("ALTER TABLE u_def_ext_students0 DROP COLUMN simple_gpa")
    (district.server.files / "automated").rmdir()
    (district.server.files / "other").rmdir()
    found = checked(district.path)
    assert (found.code, found.states("failed")) == (4, ["u_def_ext_students0", "directories"])
    assert "no such column: simple_gpa" in found.of("u_def_ext_students0").message
    assert found.of("directories", "warning").message == "/other does not exist"
    monkeypatch.setenv("SCHOOLINKS_SFTP_PASSWORD", "wrong")
    found = checked(district.path)
    assert found.states("failed") == ["u_def_ext_students0", "SFTP log-in"]
    assert found.states("skipped") == ["directories"]
    monkeypatch.delenv("POWERSCHOOL_DB_PASSWORD")
    found = checked(district.path)
    assert (found.code, found.states("failed")) == (2, ["environment"])
    assert found.states("skipped") == ["PowerSchool log-in", "PowerSchool tables", "host key",
                                       "SFTP log-in", "directories"]  # fmt: skip


def test_check_keeps_what_it_compares_from_others(
    home: homes.Home, checked: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beginning of an extract lies in a folder of this account, and is then deleted."""
    folders = []
    real = sgsync.diff

    def look(source: Path, target: Path, *rest: object, **more: object) -> object:
        folders.append((target.parent.parent, stat.S_IMODE(target.parent.parent.stat().st_mode)))
        return real(source, target, *rest, **more)

    monkeypatch.setattr(sgsync, "diff", look)
    assert checked(home.path).code == 0
    ((folder, mode),) = folders
    assert mode == 0o700
    assert not folder.exists()
