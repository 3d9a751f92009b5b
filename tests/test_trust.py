"""`sgsync.py trust` against OpenSSH's sshd: what it shows, asks, pins, and refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sgsync
from support import homes, servers
from support.terminal import typed

pytestmark = pytest.mark.skipif(os.name == "nt", reason="these servers run on Linux only")
KINDS = ("ecdsa", "ed25519", "rsa")


class Keys:
    """The host keys of a server, by what ssh-keygen says about them."""

    def __init__(self, sshd: servers.Sshd) -> None:
        self.sshd = sshd

    def line(self, kind: str) -> str:
        """As in known_hosts."""
        lines = [line.split() for line in self.sshd.known_hosts.splitlines()]
        return next(" ".join(words[:3]) + "\n" for words in lines if kind in words[1])

    def fingerprint(self, kind: str, digest: str = "sha256") -> str:
        path = self.sshd.folder / f"host_{kind}.pub"
        command = ["ssh-keygen", "-l", "-E", digest, "-f", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[1]


@pytest.fixture
def keys(sshd_server: servers.Sshd) -> Keys:
    sshd_server.start()
    return Keys(sshd_server)


@pytest.fixture
def home(tmp_path: Path, keys: Keys) -> Path:
    """A home that has no more than its server's address."""
    path = tmp_path / "home"
    path.mkdir()
    (path / "config.xml").write_text(
        f'<Config><SFTP host="{keys.sshd.host}" port="{keys.sshd.port}" username="x"/>'
        '<Database connectionString="TODO(user)"/></Config>'
    )
    return path


def main(home: Path, *words: str) -> int:
    return sgsync.main(["trust", *words, "--home", str(home)])


def command(home: Path, *words: str) -> list[str]:
    return [sys.executable, str(homes.SCRIPT), "trust", *words, "--home", str(home)]


def pinned(home: Path) -> str:
    path = home / "ssh/known_hosts"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("digest", ["sha256", "md5"])
def test_trust_pins_the_key_that_has_the_fingerprint(
    home: Path, keys: Keys, kind: str, digest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(home, "--fingerprint", keys.fingerprint(kind, digest)) == 0
    assert pinned(home) == keys.line(kind)
    out, err = capsys.readouterr()
    sha, md5 = keys.fingerprint(kind), keys.fingerprint(kind, "md5")
    server = f"{keys.sshd.host}:{keys.sshd.port}"
    name = keys.line(kind).split()[1]
    assert out == f"{server} {name} {sha} {md5}: pinned in {home}/ssh/known_hosts\n"
    assert err == ""
    found = sgsync.HostKeys(home / "ssh/known_hosts").of(keys.sshd.host, keys.sshd.port)
    assert [key.fingerprint for key in found] == [sha]


@pytest.mark.parametrize("change", [str.upper, lambda text: text.replace(":", ""), str.strip])
def test_trust_takes_a_bare_md5_fingerprint(home: Path, keys: Keys, change: object) -> None:
    """As the configuration of an older agent has it."""
    md5 = keys.fingerprint("rsa", "md5").removeprefix("MD5:")
    assert main(home, "--fingerprint", change(md5)) == 0  # type: ignore[operator]
    assert pinned(home) == keys.line("rsa")


def test_trust_refuses_another_fingerprint(
    home: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = "SHA256:" + "A" * 43
    assert main(home, "--fingerprint", wrong) == 3
    assert pinned(home) == ""
    out, err = capsys.readouterr()
    assert out == ""
    assert f"no host key has the fingerprint {wrong}; nothing was changed\n" in err
    for kind in KINDS:
        assert f"{keys.fingerprint(kind)} {keys.fingerprint(kind, 'md5')}" in err


@pytest.mark.parametrize("text", ["SHA256:abc", "aa:bb", "x", "MD5:" + "zz:" * 15 + "zz"])
def test_trust_refuses_what_is_no_fingerprint(
    home: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(home, "--fingerprint", text) == 2
    assert f"--fingerprint '{text}': is not a fingerprint" in capsys.readouterr().err


def test_trust_asks_a_person(home: Path, keys: Keys) -> None:
    code, out, shown = typed(command(home), [("same? (yes/no) ", "maybe"), ("(yes/no) ", "yes")])
    kind = next(kind for kind in KINDS if keys.line(kind) == pinned(home))
    assert (code, out.count("\n")) == (0, 1)
    assert out.endswith(f": pinned in {home}/ssh/known_hosts\n")
    assert f"  {keys.fingerprint(kind)}\n  {keys.fingerprint(kind, 'md5')}\n" in shown
    if os.name == "posix":
        assert (home / "ssh/known_hosts").stat().st_mode & 0o777 == 0o600


def test_trust_pins_nothing_after_a_no(home: Path) -> None:
    code, out, shown = typed(command(home), [("(yes/no) ", "no")])
    assert (code, out, pinned(home)) == (3, "", "")
    assert "the host key was not confirmed; nothing was changed\n" in shown


def test_trust_without_a_terminal_names_the_option(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(home) == 2
    told = capsys.readouterr().err
    assert "nobody can be asked: this is not a terminal; nothing was changed\n" in told
    again = sgsync.command_line([*command(home)[:3], "--fingerprint", "SHA256:..."])
    assert f"{again} --home {home}\n" in told
    assert pinned(home) == ""


def test_trust_says_that_a_key_is_already_pinned(
    home: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever of the server's keys it is, and without a question."""
    (home / "ssh").mkdir()
    (home / "ssh/known_hosts").write_text(keys.line("rsa"))
    for words in ([], ["--replace"], ["--fingerprint", keys.fingerprint("rsa", "md5")]):
        assert main(home, *words) == 0
        assert capsys.readouterr().out.endswith(f": already pinned in {home}/ssh/known_hosts\n")
    assert pinned(home) == keys.line("rsa")
    assert main(home, "--fingerprint", keys.fingerprint("ed25519")) == 0
    assert pinned(home) == keys.line("rsa") + keys.line("ed25519")


def test_trust_replaces_a_changed_key_only_when_asked_to(
    home: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "ssh").mkdir()
    known = home / "ssh/known_hosts"
    known.write_text("other.example ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGZha2U\n"
                     + keys.sshd.other_known_hosts)  # fmt: skip
    before = known.read_text()
    fingerprint = keys.fingerprint("ed25519")
    (old,) = sgsync.HostKeys(known).of(keys.sshd.host, keys.sshd.port)
    for words in ([], ["--fingerprint", fingerprint]):
        assert main(home, *words) == 3
        told = capsys.readouterr().err
        assert "the server shows a different host key; nothing was changed\n" in told
        assert re.search(
            rf"shown:  ssh-ed25519 {re.escape(fingerprint)} MD5:[0-9a-f:]{{47}}\n", told
        )
        assert re.search(rf"pinned: ssh-ed25519 {re.escape(old.fingerprint)} MD5:", told)
        assert "trust --replace" in told
        assert known.read_text() == before
    assert main(home, "--replace", "--fingerprint", fingerprint) == 0
    assert known.read_text().splitlines(True)[1:] == [keys.line("ed25519")]
    assert known.read_text().startswith("other.example ")


def test_trust_takes_another_server_before_config_xml_is_filled_in(
    home: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "config.xml").write_text('<Config><SFTP host="TODO(user)" username="x"/></Config>')
    assert main(home) == 2
    assert "still contains TODO(user)" in capsys.readouterr().err
    server = ["--host", keys.sshd.host, "--port", str(keys.sshd.port)]
    assert main(home, *server, "--fingerprint", keys.fingerprint("rsa")) == 0
    assert pinned(home) == keys.line("rsa")
    assert main(home, "--port", "22") == 2
    assert main(home, "--host", "x", "--port", "0") == 2


def test_trust_pins_the_key_of_schoolinks(
    home: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the file beside the script where there is one; no other variable is needed."""
    words = ["--job", "schoolinks", "--json", "--fingerprint", keys.fingerprint("ed25519")]
    monkeypatch.delenv("SCHOOLINKS_SFTP_ADDRESS", raising=False)
    assert main(home, *words) == 2
    assert "not set in the environment: SCHOOLINKS_SFTP_ADDRESS" in capsys.readouterr().err
    monkeypatch.setenv("SCHOOLINKS_SFTP_ADDRESS", f"{keys.sshd.host}:{keys.sshd.port}")
    assert main(home, *words) == 0
    assert pinned(home) == keys.line("ed25519")
    (home / "known_hosts").write_text("")
    assert main(home, *words) == 0
    assert (home / "known_hosts").read_text() == keys.line("ed25519")
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {
        "host": keys.sshd.host, "port": keys.sshd.port, "type": "ssh-ed25519",
        "sha256": keys.fingerprint("ed25519"), "md5": keys.fingerprint("ed25519", "md5"),
        "file": str(home / "known_hosts"), "result": "pinned",
    }  # fmt: skip


def test_trust_tells_of_a_server_that_does_not_answer(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ["--host", servers.HOST, "--port", str(servers.free_port())]
    assert main(home, *server, "--fingerprint", "SHA256:" + "A" * 43) == 3
    assert ": cannot connect: " in capsys.readouterr().err
