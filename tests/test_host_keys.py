"""Private keys, known_hosts, and the key a server shows."""

from __future__ import annotations

import base64
import getpass
import hashlib
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import paramiko
import pytest

import sgsync
from support import homes, servers
from test_sftp import answers, connection_error, listener, session, settings_of

__all__ = ["listener"]

KINDS = ["ssh-rsa", "ecdsa-sha2-nistp256", "ssh-ed25519"]
posix = pytest.mark.skipif(os.name == "nt", reason="owners and modes")
as_root = pytest.mark.skipif(
    os.name == "nt" or os.geteuid() != 0, reason="only root can give files away"
)


@pytest.fixture
def home(sqlite_home: homes.Home) -> homes.Home:
    return sqlite_home


@pytest.fixture
def known(tmp_path: Path) -> Path:
    return tmp_path / "known_hosts"


def key_line(sshd: servers.Sshd, kind: str) -> str:
    """What known_hosts has behind the name: type and key."""
    lines = [" ".join(line.split()[1:3]) for line in sshd.known_hosts.splitlines()]
    return next(line for line in lines if line.startswith(kind))


@pytest.fixture(scope="session")
def keys() -> list[paramiko.PKey]:
    return [paramiko.ECDSAKey.generate() for _ in range(3)]


def line(name: str, key: paramiko.PKey) -> str:
    return f"{name} {key.get_name()} {key.get_base64()}\n"


# ------------------------------------------------------------------ the key a server shows


@pytest.mark.parametrize("kind", ["", *KINDS])
def test_fetch_host_key_takes_the_kind_that_is_asked_for(
    sshd_server: servers.Sshd, kind: str
) -> None:
    sshd_server.start()
    before = len(sshd_server.log_text())
    key = sgsync.fetch_host_key(sshd_server.host, sshd_server.port, kind)
    shown = f"{key.get_name()} {key.get_base64()}"
    assert shown == key_line(sshd_server, kind or "ssh-ed25519")
    assert "Accepted" not in sshd_server.log_text()[before:]
    assert key.fingerprint == "SHA256:" + base64.b64encode(
        hashlib.sha256(base64.b64decode(shown.split()[1])).digest()
    ).decode().rstrip("=")


def test_fetch_host_key_tells_that_a_kind_is_missing(sshd_server: servers.Sshd) -> None:
    sshd_server.start()
    with pytest.raises(sgsync.TransferError) as caught:
        sgsync.fetch_host_key(sshd_server.host, sshd_server.port, "ecdsa-sha2-nistp521")
    assert str(caught.value) == (
        f"127.0.0.1:{sshd_server.port}: the server has no host key of type ecdsa-sha2-nistp521"
    )


def test_fetch_host_key_is_bounded(
    listener: servers.socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sgsync, "CONNECT_SECONDS", 0.3)
    port = listener.getsockname()[1]
    with pytest.raises(sgsync.TransferError) as caught:
        sgsync.fetch_host_key("127.0.0.1", port)
    assert caught.value.message in (  # whichever bound is the first
        f"127.0.0.1:{port}: cannot connect: no answer for 0.3 s",
        f"127.0.0.1:{port}: cannot connect: no SSH server answers there",
    )


def test_fetch_host_key_tells_what_it_met(listener: servers.socket.socket) -> None:
    port = listener.getsockname()[1]
    answers(listener, b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(sgsync.TransferError) as caught:
        sgsync.fetch_host_key("127.0.0.1", port)
    assert str(caught.value) == (
        f"127.0.0.1:{port}: cannot connect: no SSH server answers there\n"
        "Try: check that the server is running and that no firewall blocks it"
    )
    nobody = servers.free_port()
    with pytest.raises(sgsync.TransferError, match="Connection refused"):
        sgsync.fetch_host_key("127.0.0.1", nobody)


# ------------------------------------------------------------------ pin, replace


def test_pin_and_replace_are_what_a_connection_asks_for(home: homes.Home) -> None:
    path = home.path / "ssh/known_hosts"
    path.unlink()
    where = (home.sshd.host, home.sshd.port)
    sgsync.HostKeys(path).pin(*where, sgsync.fetch_host_key(*where, "ssh-rsa"))
    with session(home) as sftp:
        assert sftp.exists(home.sftp_root.as_posix())
    home.known_hosts(home.sshd.other_known_hosts)
    assert "nothing was sent" in connection_error(home).message
    sgsync.HostKeys(path).replace(*where, sgsync.fetch_host_key(*where))
    with session(home) as sftp:
        assert sftp.exists(home.sftp_root.as_posix())
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize(("port", "name"), [(22, "sftp.x.org"), (2222, "[sftp.x.org]:2222")])
def test_pin_makes_a_file_that_only_its_owner_reads(
    known: Path, keys: list[paramiko.PKey], port: int, name: str
) -> None:
    host_keys = sgsync.HostKeys(known)
    assert host_keys.of("sftp.x.org", port) == host_keys.hosts() == []
    host_keys.pin("SFTP.X.org", port, keys[0])
    assert known.read_bytes().decode() == line(name, keys[0])
    assert list(known.parent.iterdir()) == [known]
    if os.name != "nt":
        assert stat.S_IMODE(known.stat().st_mode) == 0o600
    host_keys.pin("sftp.x.org", port, keys[0])  # is there
    host_keys.pin("sftp.x.org", port, keys[1])
    for each in (host_keys, sgsync.HostKeys(known)):
        assert each.of("sftp.x.org", port) == keys[:2]
        assert each.of("sftp.x.org", 23) == each.of("x.org", port) == []
        assert each.hosts() == [name]


@posix
def test_pin_keeps_the_mode_and_every_other_line(known: Path, keys: list[paramiko.PKey]) -> None:
    before = "# by hand \udce9\n" + line("other.org", keys[1]) + "nonsense\n"
    known.write_bytes(before.encode("utf-8", "surrogateescape"))
    known.chmod(0o644)
    sgsync.HostKeys(known).pin("sftp.x.org", 22, keys[0])
    after = before + line("sftp.x.org", keys[0])
    assert known.read_bytes() == after.encode("utf-8", "surrogateescape")
    assert stat.S_IMODE(known.stat().st_mode) == 0o644


@as_root
def test_pin_leaves_the_file_to_the_account_that_reads_it(
    known: Path, keys: list[paramiko.PKey]
) -> None:
    os.chown(known.parent, 12345, 12345)
    sgsync.HostKeys(known).pin("sftp.x.org", 22, keys[0])
    assert (known.stat().st_uid, known.stat().st_gid) == (12345, 12345)
    os.chown(known, 23456, 23456)
    sgsync.HostKeys(known).pin("sftp.x.org", 22, keys[1])
    assert (known.stat().st_uid, known.stat().st_gid) == (23456, 23456)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_pin_adds_to_what_powershell_wrote(
    known: Path, keys: list[paramiko.PKey], encoding: str
) -> None:
    known.write_bytes(line("other.org", keys[1]).replace("\n", "\r\n").encode(encoding))
    sgsync.HostKeys(known).pin("sftp.x.org", 22, keys[0])
    text = line("other.org", keys[1]) + line("sftp.x.org", keys[0])
    assert known.read_bytes() == text.encode("ascii")


def test_replace_touches_no_other_server(known: Path, keys: list[paramiko.PKey]) -> None:
    old, new, other = keys
    hashed = paramiko.HostKeys.hash_host("sftp.x.org")
    kept = [
        line("[sftp.x.org]:2222", old),
        "@cert-authority " + line("sftp.x.org", other),
        "# sftp.x.org\n",
        line(paramiko.HostKeys.hash_host("other.org"), old),
    ]
    gone = [line("sftp.x.org", old), line(hashed, old), line("SFTP.x.org", other)]
    shared = line("sftp.x.org,10.0.0.1", old)
    known.write_text("".join([*kept, *gone, shared]))
    sgsync.HostKeys(known).replace("sftp.x.org", 22, new)
    text = "".join([*kept, line("10.0.0.1", old), line("sftp.x.org", new)])
    assert known.read_text() == text
    host_keys = sgsync.HostKeys(known)
    assert host_keys.of("sftp.x.org", 22) == [new]
    assert host_keys.hosts() == ["[sftp.x.org]:2222", "10.0.0.1", "sftp.x.org", "1 hashed name"]


def test_of_takes_no_revoked_key(known: Path, keys: list[paramiko.PKey]) -> None:
    known.write_text(
        line("sftp.x.org", keys[0])
        + line("sftp.x.org", keys[1])
        + "@revoked " + line("sftp.x.org", keys[0])
        + "# " + line("sftp.x.org", keys[2])
        + line("*.x.org", keys[2])
    )  # fmt: skip
    assert sgsync.HostKeys(known).of("sftp.x.org", 22) == [keys[1]]


def test_a_failed_write_leaves_the_file_as_it_was(known: Path, keys: list[paramiko.PKey]) -> None:
    """A disk that is full."""
    resource = pytest.importorskip("resource")
    before = line("sftp.x.org", keys[1]) * 100
    known.write_text(before)
    program = (
        "import pathlib, resource, signal, sys, paramiko, sgsync\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "key = paramiko.ECDSAKey.generate()\n"
        "sgsync.HostKeys(pathlib.Path(sys.argv[1])).pin('x', 22, key)\n"
    )
    assert resource
    done = subprocess.run(
        [sys.executable, "-c", program, str(known)], cwd=homes.SCRIPT.parent, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert f"{known}: File too large" in done.stderr
    assert known.read_text() == before
    assert list(known.parent.iterdir()) == [known]


@posix
def test_host_keys_that_cannot_be_read(known: Path) -> None:
    known.mkdir()
    with pytest.raises(sgsync.ConfigError) as caught:
        sgsync.HostKeys(known)
    assert str(caught.value) == (
        f"{known}: cannot be read: Is a directory\nTry: let the account that runs sgsync read that "
        "file"
    )


def test_connect_names_the_hosts_that_are_pinned(
    home: homes.Home, keys: list[paramiko.PKey]
) -> None:
    """What a misspelled host= looks like; where= tells the line."""
    names = [f"sftp{number}.samegoal.com" for number in range(12)]
    home.known_hosts("".join(line(name, keys[0]) for name in names))
    error = connection_error(home, host="sftp.samegaol.com", port=22, where="config.xml:3")
    shown = ", ".join(names[:10])
    pin = sgsync.own_command("trust", "--home", str(home.path))
    assert str(error) == (
        f"{home.path}/ssh/known_hosts: has no host key for sftp.samegaol.com, only for {shown} "
        "and 2 more\n"
        f"Try: check host= in <SFTP> (config.xml:3); if it is right, pin the server's key: {pin}"
    )
    assert "keyscan" not in str(error)


def test_connect_takes_a_host_in_capitals(home: homes.Home) -> None:
    home.known_hosts(home.sshd.known_hosts.replace("[127.0.0.1]", "[localhost]"))
    with session(home, host="LOCALHOST") as sftp:
        assert sftp.exists("/")


def test_trust_needs_no_home_where_it_is_the_scripts(
    home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sgsync, "default_home", lambda: home.path)
    (home.path / "ssh/known_hosts").unlink()
    assert connection_error(home).remedy == (f"pin the server's key: {sgsync.own_command('trust')}")


def test_command_line_survives_a_shell(tmp_path: Path) -> None:
    words = ["-c", "import sys; print(sys.argv[1:])", "it's", 'say "hi"', "two words", "$HOME"]
    command = sgsync.command_line([sys.executable, *words])
    done = subprocess.run(
        command, shell=os.name != "nt", capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{words[2:]}\n"
    own = sgsync.own_command("trust", "--home", "/a b")
    if os.name != "nt":
        trust = [sys.executable, str(homes.SCRIPT), "trust", "--home", "/a b"]
        account = ["sudo", "-u", getpass.getuser()] if os.geteuid() else []
        assert shlex.split(own) == [*account, *trust]


# ------------------------------------------------------------------ private keys


@pytest.mark.parametrize("name", ["rsa", "ecdsa", "ed25519", "rsa_pem", "encrypted"])
def test_connect_tries_no_wrong_kind_of_key(
    home: homes.Home, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGSYNC_TEST_PHRASE", home.sshd.passphrase)
    home.private_key(name)
    home.extract([("1001", "2026-01-05", "LOCKED", "Ann")])
    home.configure(sftp='passphrase="${env:SGSYNC_TEST_PHRASE}"')
    assert home.main("--verbose") == 0
    about_keys = [text for text in home.log.splitlines() if "id_rsa" in text]
    assert about_keys == []
    assert "codec" not in home.log


def test_connect_takes_an_encrypted_pem_key(home: homes.Home) -> None:
    path = home.path / "ssh/id_rsa"
    key = paramiko.RSAKey.from_private_key_file(str(home.sshd.keys["rsa"]))
    key.write_private_key_file(str(path), "secret")
    assert "passphrase" in connection_error(home).message
    with session(home, passphrase="secret") as sftp:
        assert sftp.exists("/")


@posix
def test_the_remedy_for_a_missing_key_works_from_anywhere(home: homes.Home, tmp_path: Path) -> None:
    folder = home.path / "ssh of ours"
    settings = settings_of(home, private_key="ssh of ours/id_rsa")

    def command() -> str:
        with pytest.raises(sgsync.ConfigError) as caught:
            sgsync.load_private_key(settings, home.path)
        assert caught.value.message == (
            f"{folder}/id_rsa: the private key cannot be read: No such file or directory"
        )
        return caught.value.remedy

    made = (
        "make a key pair without a passphrase: ssh-keygen -t rsa -b 4096 -N '' -f "
        f"'{folder}/id_rsa'; then give the public key, the file with .pub, to SameGoal"
    )
    assert command() == f"create the folder {folder}; {made}"
    folder.mkdir()
    assert command() == made
    printed = made.partition(": ")[2].partition("; ")[0]
    subprocess.run(
        f"{printed} -q -N ''", shell=True, check=True, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    assert sgsync.load_private_key(settings, home.path).get_bits() == 4096


@as_root
def test_the_remedy_for_a_missing_key_names_the_account(home: homes.Home) -> None:
    import pwd

    other = pwd.getpwnam("nobody")
    (home.path / "ssh/id_rsa").unlink()
    os.chown(home.path / "ssh", other.pw_uid, other.pw_gid)
    with pytest.raises(sgsync.ConfigError) as caught:
        sgsync.load_private_key(settings_of(home), home.path)
    assert f": sudo -u nobody ssh-keygen -t rsa -b 4096 -N '' -f {home.path}/ssh/id_rsa; " in (
        caught.value.remedy
    )


def test_no_remedy_names_keyscan() -> None:
    assert "ssh-keyscan" not in homes.SCRIPT.read_text(encoding="utf-8")
