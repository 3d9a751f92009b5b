"""The remedies that are commands, executed as printed, in the layout that docs/install.md makes.

The job runs as an account of its own, which owns config.xml, the folders history and ssh, and
nothing else.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lxml
import pytest

import sgsync
from support import homes, servers

ACCOUNT = "nobody"
pytestmark = pytest.mark.skipif(
    os.name == "nt" or os.geteuid() != 0 or not shutil.which("sudo"),
    reason="needs root, and sudo to become another account",
)


@pytest.fixture
def installed(sshd_server: servers.Sshd, sftp_root: Path) -> Iterator[homes.Home]:
    """An installation that ACCOUNT can run; its database has three rows, the extract one."""
    folder = Path(tempfile.mkdtemp(prefix="sgsync-install-"))
    folder.chmod(0o755)
    path = folder / "sgsync"
    database = servers.Database("sqlite", servers.sqlite_connection_string(folder / "sis/sis.db"))
    (folder / "sis").mkdir()
    home = homes.Home(path, sshd_server, sftp_root, database)
    for name in ("sgsync.py", "requirements.txt"):
        shutil.copy(homes.SCRIPT.with_name(name), path)
    (path / "history").mkdir(0o700)
    home.extract([("1001", "2026-01-05", "LOCKED", "Ann")])
    home.sis([(f"{number}", "2026-01-05", "LOCKED", "Ann") for number in (1001, 1002, 1003)])
    mine = [path / name for name in ("history", "ssh", "config.xml")]
    for owned in [*mine, *(path / "ssh").iterdir(), folder / "sis", folder / "sis/sis.db"]:
        shutil.chown(owned, ACCOUNT)
    try:
        yield home
    finally:
        shutil.rmtree(folder)


def interpreter(home: Path) -> str:
    """A Python that ACCOUNT can run, too: root's own may be in a closed folder."""
    packages = Path(lxml.__file__).parents[1]
    python = home / ".venv/bin/python"
    system = f"/usr/bin/python3.{sys.version_info.minor}"
    if Path(system).exists():
        subprocess.run([system, "-m", "venv", "--without-pip", home / ".venv"], check=True)
        (site,) = (home / ".venv/lib").glob("python3*/site-packages")
        (site / "packages.pth").write_text(f"{packages}\n", encoding="utf-8")
    for found in (sys.executable, str(python)):
        if execute(shlex.join(["sudo", "-u", ACCOUNT, found, "-c", "import lxml"])).returncode == 0:
            return found
    pytest.skip(f"{ACCOUNT} can run no Python that has the packages")


def night(home: homes.Home, *argv: str) -> subprocess.CompletedProcess[str]:
    """A run as the scheduler starts it: as ACCOUNT, anywhere, with an empty environment."""
    python = interpreter(home.path)
    command = ["sudo", "-u", ACCOUNT, "env", "-i", python, str(home.path / "sgsync.py")]
    return execute(shlex.join([*command, *argv]))


def execute(command: str) -> subprocess.CompletedProcess[str]:
    """What an administrator types, anywhere."""
    return subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=100, check=False, cwd="/"
    )


def commands(text: str) -> list[str]:
    """The lines of remedies that are commands on their own."""
    return re.findall(r"(?m)^    ((?:sudo|chmod|chown|/)\S* .*)$", text)


def test_held_run_names_a_command_that_approves_it(installed: homes.Home) -> None:
    installed.configure(limits="", diff='maxDeletes="1"')
    shutil.chown(installed.path / "config.xml", ACCOUNT)
    done = night(installed)
    assert done.returncode == 6, done.stderr
    (command,) = commands(done.stderr)
    assert execute(command).returncode == 0
    assert installed.sis_rows() == [("1001", "2026-01-05", "LOCKED", "Ann")]
    approval = installed.summary["approval"]
    assert (approval["by"], approval["rows"]) == (f"{ACCOUNT} (sudo by root)", 2)
    owners = {path.owner() for path in (installed.path / "history").rglob("*")}
    assert owners == {ACCOUNT}


def test_root_is_told_how_to_run_as_the_account(installed: homes.Home) -> None:
    """What root makes in history, the job could not delete."""
    python = interpreter(installed.path)
    command = shlex.join([python, str(installed.path / "sgsync.py"), "sync", "--dry-run"])
    done = execute(command)
    assert done.returncode == 2
    assert f"belongs to the account {ACCOUNT}, and you are root" in done.stderr
    assert not installed.runs()
    (command,) = commands(done.stderr)
    assert execute(command).returncode == 0
    assert installed.summary["outcome"] == "dry run"


def test_readable_secrets_name_commands_that_close_them(installed: homes.Home) -> None:
    path = installed.path / "config.xml"
    path.chmod(0o644)
    shutil.chown(path, "root")
    done = night(installed, "sync", "--dry-run")
    assert done.returncode == 0, done.stderr
    told = commands(done.stderr)
    assert len(told) == 2
    assert [execute(command).returncode for command in told] == [0, 0]
    assert (path.stat().st_mode & 0o777, path.owner()) == (0o600, ACCOUNT)
    done = night(installed, "sync", "--dry-run")
    assert (done.returncode, commands(done.stderr)) == (0, [])


def test_missing_key_names_a_command_that_makes_one(installed: homes.Home) -> None:
    key = installed.path / "ssh/id_rsa"
    key.unlink()
    shutil.chown(installed.path / "ssh", ACCOUNT)
    done = night(installed)
    assert done.returncode == 2
    found = re.search(r"make a key pair without a passphrase: (.*?); then", done.stderr)
    assert found, done.stderr
    account = "" if found[1].startswith("sudo") else f"sudo -u {ACCOUNT} "
    made = execute(account + found[1])
    assert made.returncode == 0, made.stderr
    assert (key.stat().st_mode & 0o777, key.owner()) == (0o600, ACCOUNT)
    assert night(installed).returncode == 3  # a good key, which nobody knows yet


def test_missing_package_names_a_command_that_installs_it(installed: homes.Home) -> None:
    """For this Python, in the folder of this installation; pip itself is not run again here."""
    error = sgsync.Error.of(ImportError("No module named 'lxml'"))
    command = shlex.split(error.remedy.split("\n")[1])
    requirements = str(homes.SCRIPT.with_name("requirements.txt"))
    assert command == [sys.executable, "-m", "pip", "install", "-r", requirements]
    done = execute(shlex.join([*command, "--dry-run", "--no-deps", "--no-index"]))
    assert done.returncode == 0, done.stderr  # everything is here already
