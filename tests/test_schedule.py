"""`sgsync.py schedule`: tasks by the published schema, units by systemd's own check, cron lines in
an empty environment, and what is called to make, tell, and remove them."""

from __future__ import annotations

import datetime
import getpass
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from lxml import etree

import sgsync
from support import homes

posix = pytest.mark.skipif(os.name == "nt", reason="systemd and cron")

# The rules of Microsoft's "Task Scheduler Schema" for the elements in use: RegistrationInfo,
# Settings, Principal and Task take their children in any order; triggers and actions do not.
SCHEMA = """<xs:schema xmlns:xs="http://www.w3.org/2001/XMLSchema" elementFormDefault="qualified"
    targetNamespace="{space}" xmlns="{space}">
  <xs:simpleType name="text"><xs:restriction base="xs:string"><xs:minLength value="1"/>
  </xs:restriction></xs:simpleType>
  <xs:element name="Task"><xs:complexType><xs:all>
    <xs:element name="RegistrationInfo" minOccurs="0"><xs:complexType><xs:all>
      <xs:element name="Author" type="xs:string" minOccurs="0"/>
      <xs:element name="Description" type="xs:string" minOccurs="0"/>
    </xs:all></xs:complexType></xs:element>
    <xs:element name="Triggers" minOccurs="0"><xs:complexType><xs:sequence>
      <xs:element name="CalendarTrigger"><xs:complexType><xs:sequence>
        <xs:element name="Enabled" type="xs:boolean" minOccurs="0"/>
        <xs:element name="StartBoundary" type="xs:dateTime" minOccurs="0"/>
        <xs:element name="EndBoundary" type="xs:dateTime" minOccurs="0"/>
        <xs:element name="ExecutionTimeLimit" type="xs:duration" minOccurs="0"/>
        <xs:element name="RandomDelay" type="xs:duration" minOccurs="0"/>
        <xs:element name="ScheduleByDay"><xs:complexType><xs:sequence>
          <xs:element name="DaysInterval" type="xs:unsignedByte"/>
        </xs:sequence></xs:complexType></xs:element>
      </xs:sequence></xs:complexType></xs:element>
    </xs:sequence></xs:complexType></xs:element>
    <xs:element name="Settings" minOccurs="0"><xs:complexType><xs:all>
      <xs:element name="MultipleInstancesPolicy" minOccurs="0"><xs:simpleType>
        <xs:restriction base="xs:string"><xs:enumeration value="Parallel"/>
        <xs:enumeration value="Queue"/><xs:enumeration value="IgnoreNew"/>
        <xs:enumeration value="StopExisting"/></xs:restriction></xs:simpleType></xs:element>
      <xs:element name="DisallowStartIfOnBatteries" type="xs:boolean" minOccurs="0"/>
      <xs:element name="StopIfGoingOnBatteries" type="xs:boolean" minOccurs="0"/>
      <xs:element name="StartWhenAvailable" type="xs:boolean" minOccurs="0"/>
      <xs:element name="ExecutionTimeLimit" type="xs:duration" minOccurs="0"/>
    </xs:all></xs:complexType></xs:element>
    <xs:element name="Principals" minOccurs="0"><xs:complexType><xs:sequence>
      <xs:element name="Principal"><xs:complexType><xs:all>
        <xs:element name="UserId" type="text" minOccurs="0"/>
        <xs:element name="LogonType" minOccurs="0"><xs:simpleType>
          <xs:restriction base="xs:string"><xs:enumeration value="S4U"/>
          <xs:enumeration value="Password"/><xs:enumeration value="InteractiveToken"/>
          </xs:restriction></xs:simpleType></xs:element>
        <xs:element name="RunLevel" minOccurs="0"><xs:simpleType>
          <xs:restriction base="xs:string"><xs:enumeration value="LeastPrivilege"/>
          <xs:enumeration value="HighestAvailable"/></xs:restriction></xs:simpleType></xs:element>
      </xs:all><xs:attribute name="id" type="xs:ID"/></xs:complexType></xs:element>
    </xs:sequence></xs:complexType></xs:element>
    <xs:element name="Actions"><xs:complexType><xs:sequence>
      <xs:element name="Exec"><xs:complexType><xs:all>
        <xs:element name="Command" type="text"/>
        <xs:element name="Arguments" type="xs:string" minOccurs="0"/>
        <xs:element name="WorkingDirectory" type="xs:string" minOccurs="0"/>
      </xs:all></xs:complexType></xs:element>
    </xs:sequence><xs:attribute name="Context" type="xs:IDREF"/></xs:complexType></xs:element>
  </xs:all><xs:attribute name="version" type="xs:string"/></xs:complexType></xs:element>
</xs:schema>""".replace("{space}", sgsync.WindowsTask.NAMESPACE)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """With what a shell, a unit, and cron each read otherwise than they should."""
    path = tmp_path / 'a "district" 100% $HOME'
    path.mkdir()
    return path


def options(home: Path, **more: object) -> sgsync.ScheduleOptions:
    config = sgsync.config_path(home)
    return sgsync.ScheduleOptions(command="schedule", home=home, config=config, **more)  # type: ignore[arg-type]


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> Path:
    """A program of the system on PATH; returns the file to which it writes its arguments."""
    called = folder / f"{name}.log"
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    text = f'#!/bin/sh\nfor word; do printf "%s|" "$word"; done >>"{called}"; echo >>"{called}"\n'
    path.write_text(text + script)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    return called


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--at", "24:00"], "--at '24:00': is not a time of day\n    Try: --at 04:30"),
        (["--at", "4:30"], "--at '4:30': is not a time of day"),
        (["--at", "x"], "--at 'x': is not a time of day"),
        (["--install"], "--install needs the time of day\n    Try: --at 04:30"),
    ],
)
def test_schedule_refuses(
    home: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sgsync.main(["schedule", *words, "--home", str(home)]) == 2
    assert told in capsys.readouterr().err


@posix
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--user", "nobody-of-that-name"], "there is no user nobody-of-that-name"),
        (["--gmsa", "D\\x$"], "--gmsa: only Windows has such accounts"),
    ],
)
def test_schedule_refuses_an_account(
    home: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sgsync.main(["schedule", "--at", "04:30", *words, "--home", str(home)]) == 2
    assert told in capsys.readouterr().err


# ------------------------------------------------------------------ Windows


@pytest.mark.parametrize("account", [{"user": "DISTRICT\\sgsync"}, {"gmsa": "DISTRICT\\sgsync$"}])
def test_task_follows_the_published_schema(home: Path, account: Mapping[str, str]) -> None:
    given = options(home, at="04:30", **account)
    schedule = sgsync.WindowsTask(given, "schoolinks")
    schedule.check()
    raw = schedule.xml()
    assert raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    task = etree.fromstring(raw)
    etree.XMLSchema(etree.fromstring(SCHEMA)).assertValid(task)
    found = {
        etree.QName(element).localname: (element.text or "").strip() for element in task.iter()
    }
    program, *arguments = schedule.words()
    assert found["UserId"] == next(iter(account.values()))
    assert (found["LogonType"], found["RunLevel"]) == ("Password", "LeastPrivilege")
    assert (found["MultipleInstancesPolicy"], found["StartWhenAvailable"]) == ("IgnoreNew", "true")
    assert found["DisallowStartIfOnBatteries"] == found["StopIfGoingOnBatteries"] == "false"
    assert (found["ExecutionTimeLimit"], found["DaysInterval"]) == ("PT12H", "1")
    assert (found["Command"], found["WorkingDirectory"]) == (program, str(home))
    assert found["Command"] == sys.executable
    assert found["Arguments"] == subprocess.list2cmdline(arguments)
    assert arguments == [str(homes.SCRIPT), "schoolinks", "--home", str(home), "--quiet"]
    start = datetime.datetime.fromisoformat(found["StartBoundary"])
    assert datetime.timedelta(0) < start - datetime.datetime.now() <= datetime.timedelta(days=1)
    assert (start.hour, start.minute, start.second) == (4, 30, 0)
    assert schedule.text().startswith("<?xml version='1.0' encoding='UTF-16'?>\n<Task ")


@pytest.mark.parametrize("name", ["sgsync$", "DISTRICT\\sgsync", "D\\x$y", "\\x$"])
def test_task_refuses_what_is_no_managed_account(home: Path, name: str) -> None:
    with pytest.raises(sgsync.ConfigError, match="is not the name of a managed service account"):
        sgsync.WindowsTask(options(home, at="04:30", gmsa=name), "sync").check()


@posix
def test_task_is_made_told_and_removed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "task.xml"
    called = fake(tmp_path, monkeypatch, "schtasks", f"""
        [ "$1" = /Create ] && cp "$5" "{kept}"
        [ "$1" = /Query ] && cat "{tmp_path}/answer" 2>/dev/null
        [ "$1" != /Query ] || [ -e "{tmp_path}/answer" ]""")  # fmt: skip
    given = options(home, at="04:30", gmsa="D\\sgsync$")
    schedule = sgsync.WindowsTask(given, "sync")
    assert not schedule.exists()
    schedule.install()
    words = called.read_text().splitlines()[-1].split("|")
    path = words[4]
    assert words == ["/Create", "/TN", schedule.name, "/XML", path, "/F", "/RU", "D\\sgsync$",
                     "/RP", "", ""]  # fmt: skip
    assert kept.read_bytes() == schedule.xml()
    assert not Path(path).exists()
    for result, meaning in (
        ("0", "0: success"), ("6", "6: held by a limit, nothing was written"),
        ("267009", "267009: running now"), ("-2147023570", "the account's password is wrong"),
        ("2147942402", "the program was not found"), ("77", "77: unknown"),
    ):  # fmt: skip
        (tmp_path / "answer").write_text(
            f'"PC","\\{schedule.name}","1/2/2027 4:30:00 AM","Ready","x","1/1/2027 4:30:00 AM",'
            f'"{result}","me","more"\n'
        )
        assert schedule.exists()
        text = str(schedule.state())
        assert f"{schedule.name}: sync, next run 1/2/2027 4:30:00 AM, last run 1/1" in text
        assert text.endswith(meaning) or meaning in text
    (tmp_path / "answer").write_text('"PC","x","N/A","Ready","x","11/30/1999","267011","me"\n')
    assert "last run" not in str(schedule.state())
    assert "has not run yet" in str(schedule.state())
    schedule.remove()
    assert called.read_text().splitlines()[-1] == f"/Delete|/TN|{schedule.name}|/F|"


@posix
def test_task_tells_why_it_could_not_be_made(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, monkeypatch, "schtasks", "echo 'ERROR: Access is denied.' >&2; exit 1")
    schedule = sgsync.WindowsTask(options(home, at="04:30", gmsa="D\\x$"), "sync")
    with pytest.raises(sgsync.Error, match=r"schtasks /Create failed: ERROR: Access is denied\."):
        schedule.install()
    schedule = sgsync.WindowsTask(options(home, at="04:30", user="D\\x"), "sync")
    with pytest.raises(sgsync.ConfigError, match="asks for the password of the account"):
        schedule.install()


# ------------------------------------------------------------------ systemd


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "systemd"
    folder.mkdir()
    monkeypatch.setattr(sgsync, "SYSTEMD_DIRECTORY", folder)
    monkeypatch.setattr(sgsync, "CRON_DIRECTORY", tmp_path / "cron")
    (tmp_path / "cron").mkdir()
    return folder


SYSTEMCTL = """
case "$1 $2" in
    "show "*.timer) echo "NextElapseUSecRealtime=Sat 2027-01-02 04:30:00 UTC"
                    echo "LastTriggerUSec=$LAST";;
    "show "*.service) echo "ExecMainStatus=$STATUS"; echo ActiveState=$ACTIVE
                      echo Result=$RESULT;;
esac
"""


@posix
def test_timer_is_made_told_and_removed(
    home: Path, systemd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    called = fake(tmp_path, monkeypatch, "systemctl", SYSTEMCTL)
    (home / "history").mkdir()

    def main(*words: str) -> str:
        called.write_text("")
        assert sgsync.main(["schedule", *words, "--home", str(home)]) == 0
        out, err = capsys.readouterr()
        return out + err

    assert main() == "nothing is scheduled for sync or schoolinks\n"
    printed = main("--at", "04:30")
    assert not list(systemd.iterdir())
    assert called.read_text() == ""
    user = getpass.getuser()
    name = sgsync.SystemdTimer(options(home), "sync").name
    assert main("--at", "04:30", "--install") == (
        f"{name}.timer: made; every day at 04:30 as {user}\n"
    )
    timer, service = (systemd / f"{name}.{kind}" for kind in ("timer", "service"))
    assert called.read_text().splitlines() == [
        "daemon-reload|", f"enable|--now|{name}.timer|", f"restart|{name}.timer|",
    ]  # fmt: skip
    assert printed == (f"# {timer}\n{timer.read_text()}\n# {service}\n{service.read_text()}")
    assert timer.stat().st_mode & 0o777 == service.stat().st_mode & 0o777 == 0o644
    for last, status, active, result, told in (
        ("", "0", "inactive", "success", "last result: has not run yet"),
        ("Fri", "0", "inactive", "success", "last run Fri, last result 0: success"),
        ("Fri", "8", "failed", "exit-code",
         "last run Fri, last result 8: finished, but some rows failed"),
        ("Fri", "15", "failed", "timeout", "last result 15: ended by systemd (timeout)"),
        ("Fri", "0", "activating", "success", "last result: running now"),
    ):  # fmt: skip
        for variable, value in {
            "LAST": last, "STATUS": status, "ACTIVE": active, "RESULT": result,
        }.items():  # fmt: skip
            monkeypatch.setenv(variable, value)
        assert main().startswith(f"{name}.timer: sync, next run Sat 2027-01-02 04:30:00 UTC, ")
        assert told in main()
    state = json.loads(main("--json"))
    assert (state[0]["name"], state[0]["meaning"]) == (f"{name}.timer", "running now")
    assert main("--remove") == f"{name}.timer: removed\n"
    assert called.read_text().splitlines() == [
        f"disable|--now|{name}.timer|", "daemon-reload|",
    ]  # fmt: skip
    assert not list(systemd.iterdir())
    assert main("--remove") == "nothing is scheduled for sync\n"


@posix
def test_units_pass_the_check_of_systemd(home: Path, systemd: Path, tmp_path: Path) -> None:
    schedule = sgsync.SystemdTimer(options(home, at="04:30"), "schoolinks")
    for path, text in zip(schedule.paths(), schedule.units(), strict=True):
        path.write_text(text)
    assert shutil.which("systemd-analyze"), "systemd is not installed: run `make test`"
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, schedule.paths())],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    ours = [line for line in (done.stdout + done.stderr).splitlines() if schedule.name in line]
    assert (done.returncode, ours) == (0, [])
    service = schedule.units()[1]
    folder = str(home).replace("%", "%%")
    assert f"WorkingDirectory={folder}\n" in service
    quoted = str(home).replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    assert f'schoolinks --home "{quoted}" --quiet\n' in service


@posix
def test_timer_tells_of_systemctl_that_is_missing_or_refuses(
    home: Path, systemd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["schedule", "--at", "04:30", "--install", "--home", str(home)]
    fake(tmp_path, monkeypatch, "systemctl", "echo 'no bus' >&2; exit 1")
    assert sgsync.main(words) == 1
    err = capsys.readouterr().err
    assert ".timer: systemctl daemon-reload failed: no bus\n" in err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sgsync.main(words) == 2
    assert "systemctl was not found\n    Try: use --cron" in capsys.readouterr().err


# ------------------------------------------------------------------ cron


@posix
def test_cron_line_works_in_an_empty_environment(
    home: Path, systemd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As cron runs it: by sh, from elsewhere, with nothing set, each \\% as %."""
    (home / "history").mkdir()
    words = ["schedule", "--cron", "--home", str(home)]
    assert sgsync.main([*words, "--at", "04:05"]) == 0
    printed = capsys.readouterr().out
    assert sgsync.main([*words, "--at", "04:05", "--install"]) == 0
    (path,) = (tmp_path / "cron").iterdir()
    assert path.read_text() == printed
    assert "." not in path.name  # or cron ignores it
    comment, line = printed.splitlines()
    assert comment == f"# sgsync sync, home {home}"
    fields = line.split(" ", 6)
    assert fields[:6] == ["5", "4", "*", "*", "*", getpass.getuser()]
    assert "%" not in fields[6].replace("\\%", "")
    capsys.readouterr()
    assert sgsync.main(words[:1] + words[2:]) == 0
    assert capsys.readouterr().out == (
        f"{path}: sync, next run 04:05, last result: has not run yet\n"
    )
    done = subprocess.run(
        ["/bin/sh", "-c", fields[6].replace("\\%", "%")],
        env={}, cwd="/", capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    assert "config.xml: cannot be read" in (home / "history/cron.log").read_text()
    assert sgsync.main(words[:1] + words[2:]) == 0
    assert "last result 2: configuration or usage\n" in capsys.readouterr().out
    assert sgsync.main([*words, "--remove"]) == 0
    assert not path.exists()


# ------------------------------------------------------------------ names


def test_schedule_names_differ_between_homes_and_jobs(tmp_path: Path) -> None:
    """One installation may serve several districts; those in folders of one name, too."""
    default = sgsync.default_home()
    folders = [default, tmp_path / "a" / "x", tmp_path / "b" / "x"]
    names = {
        sgsync.Schedule(options(folder), job).name
        for folder in folders
        for job in ("sync", "schoolinks")
    }
    assert len(names) == 6
    assert {"sgsync", "sgsync-schoolinks"} < names
    assert sgsync.Schedule(options(default), "sync").words() == [*sgsync.PROGRAM, "--quiet"]


def test_exit_codes_are_all_named() -> None:
    errors = [sgsync.Error, *sgsync.Error.__subclasses__()]
    assert {error.exit_code for error in errors} | {0, sgsync.ROWS_FAILED} <= set(
        sgsync.EXIT_MEANINGS
    )
