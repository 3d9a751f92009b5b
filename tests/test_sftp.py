"""Everything between sgsync and the SFTP server: keys, host keys, extracts, bad servers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncssh
import paramiko
import pytest

import sgsync
from support import homes, servers

pytestmark = pytest.mark.usefixtures("short_pauses")

ROWS = [("1001", "2026-01-05", "LOCKED", "Ann"), ("1002", "2026-01-06", "LOCKED", "Bob")]
BIG = "x" * 3_000_000  # more than one block, and enough to be read ahead
DONE = (
    "; the database changes are done, only the upload of this run is missing; the next run "
    "continues from there"
)
RETRIES = sgsync.RETRY_ATTEMPTS - 1


@pytest.fixture
def home(sqlite_home: homes.Home) -> homes.Home:
    """A home with an extract of two rows; where nothing stops it, a run exits with 0."""
    sqlite_home.extract(ROWS)
    return sqlite_home


def settings_of(home: homes.Home, **values: Any) -> sgsync.SftpSettings:
    known = {"host": home.values["host"], "port": int(home.values["port"])}
    known["username"] = home.values["username"]
    for name in ("download", "upload"):
        known[f"{name}_directory"] = f"{home.sftp_root.as_posix()}/{name}"
    return sgsync.SftpSettings(**{**known, **values})


@contextlib.contextmanager
def session(home: homes.Home, **values: Any) -> Iterator[sgsync.Sftp]:
    """A connection of sgsync's own to the home's server."""
    with sgsync.Sftp(settings_of(home, **values), home.path) as sftp:
        sftp.connect()
        yield sftp


def connection_error(home: homes.Home, **values: Any) -> sgsync.Error:
    with pytest.raises(sgsync.Error) as caught, session(home, **values):
        pass
    return caught.value


def read(sftp: sgsync.Sftp, path: str, size: int, *, ahead: bool = True) -> bytes:
    """One file, whatever its size is said to be."""
    directory, _, name = path.rpartition("/")
    entry = sgsync.RemoteEntry(name, False, True, size, 0.0)
    found = [b"".join(blocks) for _, blocks in sftp.read_files(directory, [entry], ahead=ahead)]
    assert len(found) == 1
    return found[0]


def place(home: homes.Home) -> str:
    return f"config.xml:{home.line('<SFTP')}"


def trust(home: homes.Home, *words: str) -> str:
    """The command that pins the key of the home's server."""
    command = [sys.executable, str(homes.SCRIPT), "trust", *words, "--home", str(home.path)]
    return shlex.join(command)


def where(home: homes.Home) -> str:
    return f"{home.values['host']}:{home.values['port']}"


def downloads(home: homes.Home) -> str:
    return f"{where(home)}: {home.sftp_root.as_posix()}/download"


def uploads(home: homes.Home) -> str:
    return f"{where(home)}: {home.sftp_root.as_posix()}/upload/{home.run.name}"


def tried_again(home: homes.Home) -> int:
    return home.log.count("trying again")


# ------------------------------------------------------------------ servers that OpenSSH is not


class OtherServer:
    """An SFTP server whose answers a test writes itself, as a class over asyncssh's."""

    def __init__(self, home: homes.Home, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._connections = connections = []

        class Login(options.pop("server_factory", asyncssh.SSHServer)):
            def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
                connections.append(conn)
                super().connection_made(conn)

        key = asyncssh.generate_private_key("ssh-ed25519")
        public = Path(f"{home.sshd.keys['ed25519']}.pub").read_text()
        listening = asyncssh.listen(
            servers.HOST,
            0,
            server_factory=Login,
            server_host_keys=[key],
            authorized_client_keys=asyncssh.import_authorized_keys(public),
            **options,
        )
        self._listener = self._wait(listening)
        port = self._listener.get_port()
        home.known_hosts(f"[{servers.HOST}]:{port} {key.export_public_key().decode()}")
        home.configure(port=str(port))

    def close(self) -> None:
        async def cancel() -> None:
            self._listener.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for connection in self._connections:  # or the garbage collector complains of its socket
                connection.abort()
                await connection.wait_closed()

        self._wait(cancel())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _wait(self, work: Any) -> Any:
        async def awaited() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(awaited(), self._loop).result(20)


@pytest.fixture
def serve(home: homes.Home) -> Iterator[Callable[[type[asyncssh.SFTPServer]], OtherServer]]:
    """Puts a server of that class in front of the same files, and the home in front of it."""
    started = []

    def start(handler: type[asyncssh.SFTPServer]) -> OtherServer:
        started.append(OtherServer(home, sftp_factory=handler))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port that accepts connections; what it says is up to the test."""
    with socket.socket() as server:
        server.bind((servers.HOST, 0))
        server.listen(16)
        yield server
        server.shutdown(socket.SHUT_RDWR)  # ends `accept` in `answers`


def answers(listener: socket.socket, what: bytes) -> None:
    """Every client is sent `what` and hung up on."""

    def work() -> None:
        with contextlib.suppress(OSError):
            while True:
                client = listener.accept()[0]
                client.sendall(what)
                client.close()

    threading.Thread(target=work, daemon=True).start()


# ------------------------------------------------------------------ log-in


@pytest.mark.parametrize("key", ["rsa", "ecdsa", "ed25519", "rsa_pem"])
def test_connect_takes_every_kind_of_key(home: homes.Home, key: str) -> None:
    home.private_key(key)
    with session(home) as sftp:
        names = [entry.name for entry in sftp.listing(home.sftp_root.as_posix())]
    assert names == ["download", "upload"]


def test_connect_opens_a_key_with_its_passphrase(
    home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGSYNC_TEST_PHRASE", home.sshd.passphrase)
    home.private_key("encrypted")
    home.configure(sftp='passphrase="${env:SGSYNC_TEST_PHRASE}"')
    assert home.main("--verbose") == 0
    left = [path for path in home.path.rglob("*") if path.is_file()]
    assert not [path for path in left if home.sshd.passphrase.encode() in path.read_bytes()]


def test_connect_asks_for_a_missing_passphrase(home: homes.Home) -> None:
    home.private_key("encrypted")
    assert home.refused(2) == (
        f"{home.path}/ssh/id_rsa: the private key is protected by a passphrase\n"
        'Try: add passphrase="${env:NAME}" to <SFTP> and set that variable'
    )


def test_connect_refuses_a_wrong_passphrase(home: homes.Home) -> None:
    home.private_key("encrypted")
    home.configure(sftp='passphrase="not-the-phrase"')
    message = home.refused(2)
    assert message == (
        f"{home.path}/ssh/id_rsa: the passphrase is wrong\nTry: correct passphrase= in <SFTP>"
    )
    assert "not-the-phrase" not in home.log


@pytest.mark.parametrize(
    ("content", "reason", "remedy"),
    [
        pytest.param(
            b"PuTTY-User-Key-File-3: ssh-rsa\r\n",
            "the key is in PuTTY format",
            "open it in PuTTYgen and save it with Conversions > Export OpenSSH key",
            id="putty",
        ),
        pytest.param(
            b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI me@here\n",
            "this is a public key",
            "name the private key, the file without .pub",
            id="public",
        ),
        pytest.param(
            b"\x00\xff\x80 no key",
            "this is not a private key in OpenSSH format",
            "use an OpenSSH key of type RSA, ECDSA or Ed25519",
            id="garbage",
        ),
        pytest.param(
            b"",
            "this is not a private key in OpenSSH format",
            "use an OpenSSH key of type RSA, ECDSA or Ed25519",
            id="empty",
        ),
        pytest.param(
            b"-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk=\n"
            b"-----END OPENSSH PRIVATE KEY-----\n",
            "this is not a private key in OpenSSH format",
            "use an OpenSSH key of type RSA, ECDSA or Ed25519",
            id="truncated",
        ),
    ],
)
def test_connect_refuses_what_is_no_openssh_key(
    home: homes.Home, content: bytes, reason: str, remedy: str
) -> None:
    (home.path / "ssh/id_rsa").write_bytes(content)
    error = connection_error(home)
    assert isinstance(error, sgsync.ConfigError)
    assert str(error) == f"{home.path}/ssh/id_rsa: {reason}\nTry: {remedy}"


def test_connect_names_a_missing_key(home: homes.Home) -> None:
    (home.path / "ssh/id_rsa").unlink()
    assert home.refused(2) == (
        f"{home.path}/ssh/id_rsa: the private key cannot be read: No such file or directory\n"
        "Try: make a key pair without a passphrase: ssh-keygen -t rsa -b 4096 -N '' -f "
        f"{home.path}/ssh/id_rsa; then give the public key, the file with .pub, to SameGoal"
    )


def test_connect_does_not_insist_where_the_key_is_refused(home: homes.Home) -> None:
    home.private_key("stranger")
    assert home.refused(3) == (
        f"{where(home)}: log-in as {home.values['username']} with the key ssh/id_rsa refused: "
        "Authentication failed.\n"
        "Try: check username= in <SFTP>, and that SameGoal has the public key of this private key "
        "(a new key takes up to 60 minutes to work)"
    )
    assert tried_again(home) == 0


def test_connect_tries_again_where_the_log_in_is_cut_off(
    home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    auth = paramiko.Transport.auth_publickey
    calls = []

    def cut_first(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            home.sshd.cut()
        return auth(*args)

    monkeypatch.setattr(paramiko.Transport, "auth_publickey", cut_first)
    assert home.main() == 0
    assert tried_again(home) == 1


# ------------------------------------------------------------------ host keys


def test_connect_refuses_a_changed_host_key(home: homes.Home) -> None:
    home.known_hosts(home.sshd.other_known_hosts)
    message = home.refused(3)
    key = r"SHA256:[\w+/]{43}"
    assert re.fullmatch(
        rf"{where(home)}: the host key is ssh-ed25519 {key}, but {home.path}/ssh/known_hosts has "
        rf"ssh-ed25519 {key}; nothing was sent\n"
        "Try: ask the server's operator whether the host key was changed; only if it was, replace "
        f"the pinned key: {re.escape(trust(home))}",
        message,
    )
    assert tried_again(home) == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# a comment\n\nnonsense\n[127.0.0.1]:1 ssh-ed25519 !!!\n[127.0.0.1]:1 ssh-ed25519 AAAA\n",
    ],
)
def test_connect_refuses_an_unknown_host(home: homes.Home, text: str) -> None:
    key = home.sshd.known_hosts.splitlines()[0].split(" ", 1)[1]
    home.known_hosts(f"{text}127.0.0.1 {key}\n[127.0.0.1]:1 {key}\n")
    assert home.refused(3) == (
        f"{home.path}/ssh/known_hosts: has no host key for [127.0.0.1]:{home.sshd.port}, only for "
        "127.0.0.1, [127.0.0.1]:1\n"
        f"Try: check host= in <SFTP> ({place(home)}); if it is right, pin the server's key: "
        f"{trust(home)}"
    )


def test_connect_names_a_missing_known_hosts(home: homes.Home) -> None:
    (home.path / "ssh/known_hosts").unlink()
    assert home.refused(2) == (
        f"{home.path}/ssh/known_hosts: cannot be read: the file does not exist\n"
        f"Try: pin the server's key: {trust(home)}"
    )


@pytest.mark.parametrize("kind", ["ssh-rsa", "ecdsa-sha2-nistp256", "ssh-ed25519"])
def test_connect_asks_for_the_kind_of_host_key_that_is_pinned(home: homes.Home, kind: str) -> None:
    lines = home.sshd.known_hosts.splitlines(keepends=True)
    home.known_hosts("".join(line for line in lines if kind in line))
    with session(home) as sftp:
        assert sftp.listing(home.sftp_root.as_posix())


def hashed(home: homes.Home, text: str) -> str:
    path = home.path / "to_hash"
    path.write_text(text)
    servers._output("ssh-keygen", "-H", "-f", str(path))
    assert "|1|" in path.read_text()
    return path.read_text()


@pytest.mark.parametrize(
    "rewritten",
    [
        pytest.param(hashed, id="hashed"),
        pytest.param(lambda _, text: f"# old\n\n{text}".replace("\n", "\r\n"), id="windows"),
        pytest.param(lambda _, text: "other.host," + text.splitlines()[0], id="two-names"),
        pytest.param(lambda home, text: home.sshd.other_known_hosts + text, id="two-keys"),
    ],
)
def test_connect_reads_known_hosts_in_the_formats_it_has(
    home: homes.Home, rewritten: Callable[[homes.Home, str], str]
) -> None:
    home.known_hosts(rewritten(home, home.sshd.known_hosts))
    with session(home) as sftp:
        assert sftp.listing(home.sftp_root.as_posix())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_connect_reads_known_hosts_as_powershell_writes_it(home: homes.Home, encoding: str) -> None:
    (home.path / "ssh/known_hosts").write_text(home.sshd.known_hosts, encoding=encoding)
    with session(home) as sftp:
        assert sftp.listing(home.sftp_root.as_posix())


# ------------------------------------------------------------------ servers that cannot be reached


def test_connect_tells_that_nothing_listens(home: homes.Home) -> None:
    home.sshd.stop()
    assert home.refused(3) == (
        f"{where(home)}: cannot connect: [Errno 111] Connection refused\n"
        "Try: check that the server is running and that no firewall blocks it"
    )
    assert tried_again(home) == RETRIES


def test_connect_tells_that_no_such_host_is_known(
    home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = connection_error(home)
    assert str(error) == (
        f"{where(home)}: cannot connect: [Errno -2] Name or service not known\n"
        "Try: check host= in <SFTP>, and that this machine can resolve names"
    )
    assert error.transient


def test_connect_gives_up_on_a_server_that_says_nothing(
    home: homes.Home, listener: socket.socket
) -> None:
    port = listener.getsockname()[1]
    home.known_hosts(home.sshd.known_hosts.replace(str(home.sshd.port), str(port)))
    error = connection_error(home, port=port, timeout_seconds=0.2)
    assert error.message == f"127.0.0.1:{port}: cannot connect: no answer for 0.2 s"
    assert error.transient


def test_connect_gives_up_on_a_server_that_never_greets(
    home: homes.Home, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other bound, where timeoutSeconds is longer."""
    monkeypatch.setattr(sgsync, "CONNECT_SECONDS", 0.2)
    port = listener.getsockname()[1]
    home.known_hosts(home.sshd.known_hosts.replace(str(home.sshd.port), str(port)))
    error = connection_error(home, port=port)
    assert error.message == f"127.0.0.1:{port}: cannot connect: no SSH server answers there"
    assert error.transient


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b"", "no SSH server answers there"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no SSH server answers there"),
        (b"SSH-1.5-old\r\n", "Incompatible version (1.5 instead of 2.0)"),
        (b"SSH-2.0-broken\r\n" + b"\0" * 100, "the server closed the connection"),
    ],
)
def test_connect_says_one_thing_about_a_server_of_another_kind(
    home: homes.Home, listener: socket.socket, greeting: bytes, reason: str
) -> None:
    port = listener.getsockname()[1]
    answers(listener, greeting)
    home.known_hosts(home.sshd.known_hosts.replace(str(home.sshd.port), str(port)))
    home.configure(port=str(port))
    assert home.refused(3) == (
        f"127.0.0.1:{port}: cannot connect: {reason}\n"
        "Try: check that the server is running and that no firewall blocks it"
    )


def test_connect_keeps_the_drivers_tracebacks_from_the_console(
    home: homes.Home, listener: socket.socket
) -> None:
    answers(listener, b"HTTP/1.1 400 Bad Request\r\n\r\n")
    port = listener.getsockname()[1]
    home.known_hosts(home.sshd.known_hosts.replace(str(home.sshd.port), str(port)))
    home.configure(port=str(port))
    program = (
        f"import sys, sgsync; sgsync.RETRY_SECONDS = 0.01; "
        f"sys.exit(sgsync.main(['--quiet', '--home', {str(home.path)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=homes.SCRIPT.parent, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr.count("no SSH server answers there") == sgsync.RETRY_ATTEMPTS
    assert len(done.stderr.splitlines()) == sgsync.RETRY_ATTEMPTS + 1  # the remedy


def test_listing_gives_up_on_a_server_that_falls_silent(
    home: homes.Home, serve: Callable[..., OtherServer]
) -> None:
    class Silent(asyncssh.SFTPServer):
        async def scandir(self, _path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
            await asyncio.sleep(3600)
            yield asyncssh.SFTPName(b"never")

    serve(Silent)
    with session(home, timeout_seconds=0.3) as sftp, pytest.raises(sgsync.TransferError) as caught:
        sftp.listing("/anything")
    assert caught.value.message == (
        f"{where(home)}: /anything: cannot be listed: no answer for 0.3 s"
    )
    assert caught.value.transient


@pytest.mark.parametrize("ahead", [True, False])
def test_read_gives_up_on_a_server_that_falls_silent(
    home: homes.Home, serve: Callable[..., OtherServer], ahead: bool
) -> None:
    class Silent(asyncssh.SFTPServer):
        async def read(self, _file: object, offset: int, size: int) -> bytes:
            if offset > 1_000_000:
                await asyncio.sleep(3600)
            return b"x" * size

    folder = home.extract(files={"big.csv": BIG})
    serve(Silent)
    with session(home, timeout_seconds=0.3) as sftp, pytest.raises(sgsync.TransferError) as caught:
        read(sftp, f"{folder}/big.csv", len(BIG), ahead=ahead)
    assert caught.value.message == (
        f"{where(home)}: {folder}/big.csv: cannot be downloaded: no answer for 0.3 s"
    )
    assert caught.value.transient


def test_write_gives_up_on_a_server_that_falls_silent(
    home: homes.Home, serve: Callable[..., OtherServer]
) -> None:
    class Silent(asyncssh.SFTPServer):
        async def write(self, *_: object) -> int:
            await asyncio.sleep(3600)
            return 0

    path = home.path / "big.csv"
    path.write_text(BIG)
    serve(Silent)
    target = f"{home.sftp_root.as_posix()}/upload/big.csv"
    with (
        session(home, timeout_seconds=0.3) as sftp,
        path.open("rb") as file,
        pytest.raises(sgsync.TransferError) as caught,
    ):
        sftp.write(target, file)
    assert caught.value.message == (
        f"{where(home)}: {target}: cannot be uploaded: no answer for 0.3 s"
    )
    assert caught.value.transient


# ------------------------------------------------------------------ which extract


def test_download_takes_the_newest_complete_epoch(home: homes.Home) -> None:
    home.extract([], epoch="20251231-235959")
    newest = [("1003", "2026-01-07", "LOCKED", "Cid")]
    home.extract(newest, epoch="20260102-990000")  # no valid time, as SameGoal's own example
    home.extract([], epoch="20260103-000000", complete=False)
    top = home.sftp_root / "download"
    (top / "99999999").mkdir()
    (top / "20990101-000000.old").mkdir()
    (top / "20990101-000000").write_text("a file")
    (top / "20990102-000000").symlink_to(top / "20251231-235959")
    (top / "٢٠٩٩٠١٠١-٠٠٠٠٠٠").mkdir()
    assert home.main() == 0
    assert home.sis_rows() == newest
    assert home.summary["source_epoch"] == "20260102-990000"
    skipped = f"{downloads(home)}/20260103-000000: skipped: it has no COMPLETE file"
    assert f" WARNING {skipped}" in home.log
    assert home.log.count("skipped") == 1


def test_download_does_not_take_complete_in_another_spelling(home: homes.Home) -> None:
    folder = home.sftp_root / "download/20260101-139029"
    (folder / "COMPLETE").rename(folder / "complete")
    (folder / "x").mkdir()
    (folder / "x/COMPLETE").touch()
    assert home.refused(3) == (
        f"{downloads(home)}: none of 1 epoch has a COMPLETE file\n"
        'Try: wait until the export is finished, or ask SameGoal; requireComplete="false" on '
        "<SFTP> accepts an epoch without it"
    )


def test_download_takes_an_incomplete_epoch_where_that_is_wanted(home: homes.Home) -> None:
    home.extract(ROWS[:1], epoch="20260103-000000", complete=False)
    home.configure(sftp='requireComplete="false"')
    assert home.main() == 0
    assert home.sis_rows() == ROWS[:1]


def test_download_wants_an_epoch(home: homes.Home) -> None:
    shutil.rmtree(home.sftp_root / "download/20260101-139029")
    assert home.refused(3) == (
        f"{downloads(home)}: contains no epoch directory (YYYYMMDD-HHMMSS)\n"
        "Try: correct downloadDirectory on <SFTP>, or ask SameGoal whether the export is scheduled"
    )


def test_download_wants_its_directory(home: homes.Home) -> None:
    shutil.rmtree(home.sftp_root / "download")
    assert home.refused(3) == (
        f"{downloads(home)}: cannot be listed: it does not exist\n"
        f"Try: correct the directory in <SFTP> ({place(home)}), or ask for access to it"
    )
    assert tried_again(home) == 0


def age(home: homes.Home, hours: float) -> None:
    folder = home.sftp_root / "download/20260101-139029"
    for path in folder.iterdir():
        then = path.stat().st_mtime - hours * 3600
        os.utime(path, (then, then))


def test_download_of_a_stale_extract_is_held(home: homes.Home) -> None:
    age(home, 37.2)
    assert home.refused(6).startswith(
        "nothing was written: the newest complete extract, 20260101-139029, is 37 hours old, "
        "maxAgeHours is 36. Changes in all: iep.csv 2 to insert\nTry: ask SameGoal"
    )
    assert home.summary["outcome"] == "held"


@pytest.mark.parametrize(("hours", "limit"), [(37, 0), (37, 38), (35, 36), (-100, 36)])
def test_too_old_goes_by_the_newest_file(home: homes.Home, hours: float, limit: int) -> None:
    age(home, hours)
    with session(home) as sftp:
        assert sgsync.too_old(sgsync.newest_extract(sftp, sftp.settings), limit) == ""


def test_download_takes_the_csv_files_and_no_others(home: homes.Home) -> None:
    files: dict[str, str | bytes] = {"iep.csv": homes.csv_text(ROWS), "More 2.CSV": "a\r\n1\r\n"}
    folder = home.extract(files={**files, "readme.txt": "x", "x.csv.part": "x"})
    (folder / "directory.csv").mkdir()
    assert home.main() == 0
    found = {path.name: path.read_bytes().decode() for path in (home.run / "ia").iterdir()}
    assert found == files


def test_download_leaves_a_missing_file_to_be_named(home: homes.Home) -> None:
    shutil.rmtree(home.sftp_root / "download/20260101-139029")
    home.extract(files={"IEP.csv": homes.csv_text(ROWS), "sp.csv": "a\r\n"})
    home.sis(ROWS[:1])
    assert home.refused(5) == (
        "ia/iep.csv: SameGoal's extract 20260101-139029 has no such file (config.xml:9); "
        "it has: IEP.csv, sp.csv\n"
        "Try: correct file= of that <SQLDiff>, or ask SameGoal to export the file"
    )


def test_download_of_an_empty_epoch_says_what_is_missing(home: homes.Home) -> None:
    home.extract(files={}, epoch="20260109-000000", complete=False)
    home.configure(sftp='requireComplete="false"')
    assert home.refused(5).startswith(
        "ia/iep.csv: SameGoal's extract 20260109-000000 has no such file (config.xml:9); "
        "it has: none\n"
    )


# ------------------------------------------------------------------ names


def bad_names() -> list[tuple[bytes, str, str]]:
    path = 'contains a path or one of \\ / : * ? " < > |'
    unprintable = "contains an unprintable character"
    blank = "starts or ends with a space, or ends with a period"
    device = "is a device name on Windows"
    return [
        (b"../iep.csv", "../iep.csv", path),
        (b"/etc/iep.csv", "/etc/iep.csv", path),
        (b"sub/iep.csv", "sub/iep.csv", path),
        (b"..\\iep.csv", "..\\iep.csv", path),
        (b"C:iep.csv", "C:iep.csv", path),
        (b"a\nb.csv", "a b.csv", unprintable),
        (b"\x1b[2J.csv", "\\x1b[2J.csv", unprintable),
        ("\u202evsc.csv".encode(), "\\u202evsc.csv", unprintable),
        (b"con.csv", "con.csv", device),
        (b"LPT1", "LPT1", device),
        (b" iep.csv", "iep.csv", blank),
        (b"iep.csv.", "iep.csv.", blank),
        (b"", "", "empty or longer than 200 bytes"),
        (b"x" * 201, "x" * 200, "empty or longer than 200 bytes"),
        (b"Iep.csv", "iep.csv", "differs from another name only in case"),
    ]


def test_download_refuses_names_that_are_no_file_names(
    home: homes.Home, serve: Callable[..., OtherServer]
) -> None:
    names: list[bytes] = []

    class Hostile(asyncssh.SFTPServer):
        async def scandir(self, path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
            async for entry in super().scandir(path):
                yield entry
            if path.endswith(b"20260101-139029"):
                for name in names:
                    yield asyncssh.SFTPName(name, attrs=asyncssh.SFTPAttrs(permissions=0o100644))

    serve(Hostile)
    with session(home) as sftp:
        for name, shown, reason in bad_names():
            names[:] = [name]
            with pytest.raises(sgsync.TransferError) as caught:
                sgsync.newest_extract(sftp, sftp.settings)
            assert caught.value.message == (
                f"{downloads(home)}/20260101-139029: the server lists the name '{shown}', "
                f"which {reason}; nothing was downloaded"
            )
    names[:] = [b"../../../evil.csv"]
    assert "'../../../evil.csv'" in home.refused(3)
    assert not list((home.run / "ia").iterdir())
    assert not list(home.path.rglob("evil.csv"))


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/etc/passwd"), os.mkfifo])
def test_download_refuses_what_is_no_file(home: homes.Home, make: Callable[[Path], None]) -> None:
    make(home.sftp_root / "download/20260101-139029/x.csv")
    assert home.refused(3) == (
        f"{downloads(home)}/20260101-139029: the server lists the name 'x.csv', which is neither a "
        "file nor a directory (a link, perhaps); nothing was downloaded\n"
        "Try: ask the server's operator; an extract must not contain such a name"
    )


def test_download_refuses_a_name_that_is_no_utf8(home: homes.Home) -> None:
    (home.sftp_root / "download/20260101-139029" / os.fsdecode(b"\xff.csv")).touch()
    assert home.refused(3) == (
        f"{downloads(home)}/20260101-139029: cannot be listed: it contains a name that is not "
        "UTF-8\n"
        "Try: ask the server's operator; an extract must not contain such a name"
    )


def test_listing_has_a_bound(home: homes.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sgsync, "LISTING_ENTRIES", 3)
    for number in range(4):
        (home.sftp_root / "download" / str(number)).mkdir()
    assert home.refused(3) == (
        f"{downloads(home)}: has more than 3 entries\n"
        f"Try: clean up that directory, or correct the directory in <SFTP> ({place(home)})"
    )


# ------------------------------------------------------------------ transfers that break


@pytest.fixture
def after_block(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None], int], None]:
    """Does something when the first block of z.csv is in, `times` times at most."""

    def arrange(what: Callable[[], None], times: int) -> None:
        taken, left = sgsync.Sftp._blocks, [times]

        def patched(sftp: sgsync.Sftp, reads: Any, file: Any) -> Iterator[bytes]:
            for number, block in enumerate(taken(sftp, reads, file)):
                yield block
                if number == 0 and left[0] and file.path.endswith("z.csv"):
                    left[0] -= 1
                    what()

        monkeypatch.setattr(sgsync.Sftp, "_blocks", patched)

    return arrange


@pytest.mark.parametrize("size", [4_000_000, 12_000_000])  # more than is asked for at once
def test_download_recovers_from_a_server_gone_in_the_middle(
    home: homes.Home, after_block: Callable[..., None], size: int
) -> None:
    files: dict[str, str | bytes] = {"iep.csv": homes.csv_text(ROWS), "z.csv": "x" * size}
    home.extract(files=files)
    after_block(home.sshd.cut, 2)
    assert home.main() == 0
    assert (home.run / "ia/z.csv").read_text() == files["z.csv"]
    assert home.sis_rows() == ROWS
    assert tried_again(home) == 2


def test_download_ends_where_the_server_is_gone_for_good(
    home: homes.Home, after_block: Callable[..., None]
) -> None:
    home.extract(files={"z.csv": "x" * 12_000_000})
    after_block(home.sshd.stop, 1)
    message = home.refused(3)
    assert message == (
        f"{where(home)}: cannot connect: [Errno 111] Connection refused\n"
        "Try: check that the server is running and that no firewall blocks it"
    )
    assert tried_again(home) == RETRIES


def test_download_takes_a_file_again_that_grows_meanwhile(
    home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home.extract(files={"z.csv": "x" * 600_000}) / "z.csv"
    newest, calls = sgsync.newest_extract, []

    def grow_once(*args: Any) -> sgsync.Extract:
        extract = newest(*args)
        calls.append(1)
        if len(calls) == 1:
            with path.open("ab") as file:
                file.write(b"y" * 100_000)
        return extract

    monkeypatch.setattr(sgsync, "newest_extract", grow_once)
    assert home.main() == 0
    assert tried_again(home) == 1
    assert f"{path}: the file is longer than its listed size, 600,000 bytes" in home.log
    assert (home.run / "ia/z.csv").read_bytes() == path.read_bytes()


def test_download_never_mixes_two_epochs(home: homes.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer extract is finished between two attempts; its files happen to be as long."""
    other = [(*row[:3], "Eve") for row in ROWS]
    home.extract(files={"a_only.csv": "a\r\n", "iep.csv": homes.csv_text(ROWS), "z.csv": "z\r\n1"})
    mark_attempt = sgsync._download_file

    def cut_at_z(blocks: Iterator[bytes], folder: Path, entry: Any, tick: Any) -> None:
        if entry.name == "z.csv" and entry.size == 4:
            home.extract(
                files={"iep.csv": homes.csv_text(other), "z.csv": "z\r\n22"},
                epoch="20260102-000000",
            )
            raise sgsync.TransferError("cut off", transient=True)
        mark_attempt(blocks, folder, entry, tick)

    monkeypatch.setattr(sgsync, "_download_file", cut_at_z)
    assert home.main() == 0
    assert home.summary["source_epoch"] == "20260102-000000"
    assert home.sis_rows() == other
    assert sorted(path.name for path in (home.run / "ia").iterdir()) == ["iep.csv", "z.csv"]


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("size", [0, 1, 32768, 100_000])
def test_read_wants_the_listed_size(home: homes.Home, size: int, ahead: bool) -> None:
    path = home.sftp_root / "download/x.csv"
    path.write_bytes(os.urandom(size))
    with session(home) as sftp:
        assert read(sftp, path.as_posix(), size, ahead=ahead) == path.read_bytes()
        for listed, what in ((size - 1, "longer"), (size + 1, "shorter")):
            if listed >= 0:
                sftp.connect()  # what broke off has hung up
                with pytest.raises(sgsync.TransferError) as caught:
                    read(sftp, path.as_posix(), listed, ahead=ahead)
                assert caught.value.message == (
                    f"{where(home)}: {path.as_posix()}: the file is {what} than its listed size, "
                    f"{listed:,} byte{'s' * (listed != 1)}"
                )
                assert caught.value.transient


def test_download_ends_a_file_that_never_ends(
    home: homes.Home, serve: Callable[..., OtherServer]
) -> None:
    class Endless(asyncssh.SFTPServer):
        async def read(self, _file: object, _offset: int, size: int) -> bytes:
            return b"x" * size

    size = (home.sftp_root / "download/20260101-139029/iep.csv").stat().st_size
    serve(Endless)
    assert home.refused(3) == (
        f"{downloads(home)}/20260101-139029/iep.csv: the file is longer than its listed size, "
        f"{size} bytes\n"
        "Try: check whether the file is still being written; the next run downloads it again"
    )
    assert not list((home.run / "ia").iterdir())


def test_download_refuses_a_size_that_the_disk_cannot_hold(
    home: homes.Home, serve: Callable[..., OtherServer]
) -> None:
    class Absurd(asyncssh.SFTPServer):
        async def scandir(self, path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
            async for entry in super().scandir(path):
                if entry.filename == b"iep.csv":
                    entry.attrs.size = 1 << 60
                yield entry

    serve(Absurd)
    message = home.refused(1)
    assert re.fullmatch(
        rf"{home.run}/ia/iep.csv: the server lists 1,152,921,504,606,846,976 bytes, but only "
        r"[\d,]+ are free on this disk\n"
        "Try: free some disk space; if that size is absurd, ask the server's operator",
        message,
    )


def test_read_ahead_that_fails_is_not_told_twice(
    home: homes.Home, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A thread of the driver's own meets the lost connection, too; the console shows one error."""
    newest = sgsync.newest_extract
    hook = threading.excepthook

    def fail() -> None:
        raise EOFError

    def with_thread(*args: Any) -> sgsync.Extract:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        return newest(*args)

    monkeypatch.setattr(sgsync, "newest_extract", with_thread)
    assert home.main() == 0
    assert "EOFError" not in capfd.readouterr().err
    assert threading.excepthook is hook


# ------------------------------------------------------------------ many requests in flight

SIZES = (0, 1, 20_000, 32_767, 32_768, 32_769, 100_000)


def many(home: homes.Home, count: int = 40) -> dict[str, bytes]:
    """An extract of that many files of all sizes."""
    files = {f"{number:03}.csv": os.urandom(SIZES[number % len(SIZES)]) for number in range(count)}
    return only(home, files)


def only(home: homes.Home, files: dict[str, bytes]) -> dict[str, bytes]:
    """Makes these the files of the extract."""
    shutil.rmtree(home.sftp_root / "download/20260101-139029")
    home.extract(files=dict(files))
    return files


def read_all(home: homes.Home, sftp: sgsync.Sftp, *, ahead: bool) -> dict[str, bytes]:
    extract = sgsync.newest_extract(sftp, sftp.settings)
    directory = f"{sftp.settings.download_directory}/{extract.epoch}"
    found = sftp.read_files(directory, extract.files, ahead=ahead)
    return {entry.name: b"".join(blocks) for entry, blocks in found}


def blocks_of(data: bytes) -> Iterator[bytes]:
    for begin in range(0, len(data), sgsync.WRITE_BYTES):
        yield data[begin : begin + sgsync.WRITE_BYTES]


def write_all(home: homes.Home, sftp: sgsync.Sftp, files: dict[str, bytes], *, ahead: bool) -> int:
    uploads = (
        (f"{sftp.settings.upload_directory}/{name}", blocks_of(data))
        for name, data in files.items()
    )
    return sftp.write_files(uploads, ahead=ahead)


def written(home: homes.Home) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((home.sftp_root / "upload").iterdir())}


class RawSession(asyncssh.SSHServerSession):
    """SFTP below asyncssh's own: one packet after another, as type, request number and content."""

    received = b""

    def connection_made(self, channel: asyncssh.SSHServerChannel[bytes]) -> None:
        self.channel = channel

    def subsystem_requested(self, subsystem: str) -> bool:
        return subsystem == "sftp"

    def data_received(self, data: bytes, _datatype: object) -> None:
        self.received += data
        while len(self.received) >= 9:
            size, kind, number = struct.unpack_from(">IBI", self.received)
            if len(self.received) < 4 + size:
                break
            content, self.received = self.received[9 : 4 + size], self.received[4 + size :]
            if kind == 1:
                self.channel.write(struct.pack(">IBI", 5, 2, 3))
            else:
                self.asked(kind, number, content)

    def asked(self, kind: int, number: int, content: bytes) -> None:
        raise NotImplementedError


class Reversing(RawSession):
    """Files in memory; answers what has come within a few milliseconds, the last request first."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = {f"/x/{name}": bytearray(data) for name, data in files.items()}
        self.open: dict[bytes, bytearray] = {}
        self.names: list[str] = []
        self.most_open = self.most_flying = 0
        self.flying: list[tuple[int, int, bytes]] = []

    def asked(self, kind: int, number: int, content: bytes) -> None:
        if not self.flying:
            asyncio.get_running_loop().call_later(0.002, self.answer)
        self.flying.append((kind, number, content))
        self.most_flying = max(self.most_flying, len(self.flying))

    def answer(self) -> None:
        requests, self.flying = reversed(self.flying), []
        for request, number, content in requests:
            kind, body = self.done(request, content)
            self.channel.write(struct.pack(">IBI", 5 + len(body), kind, number) + body)

    def done(self, kind: int, content: bytes) -> tuple[int, bytes]:
        size = int.from_bytes(content[:4], "big")
        text, rest = content[4 : 4 + size], content[4 + size :]
        if kind == 3:  # OPEN
            name = text.decode()
            self.names.append(name.removeprefix("/x/"))
            if rest[3] & 2:
                self.files[name] = bytearray()
            handle = b"handle of " + text
            self.open[handle] = self.files[name]
            self.most_open = max(self.most_open, len(self.open))
            return 102, struct.pack(">I", len(handle)) + handle
        if kind == 4:  # CLOSE
            del self.open[text]
        elif kind == 5:  # READ
            offset, length = struct.unpack(">QI", rest)
            if data := bytes(self.open[text][offset : offset + length]):
                return 103, struct.pack(">I", len(data)) + data
            return 101, struct.pack(">I", 1)
        elif kind == 6:  # WRITE
            (offset,) = struct.unpack_from(">Q", rest)
            file = self.open[text]
            file.extend(bytes(max(0, offset - len(file))))
            file[offset : offset + len(rest) - 12] = rest[12:]
        elif kind == 17:  # STAT
            return 105, struct.pack(">IQ", 1, len(self.files[text.decode()]))
        return 101, struct.pack(">III", 0, 0, 0)


@contextlib.contextmanager
def raw_server(home: homes.Home, handler: Callable[[], RawSession]) -> Iterator[None]:
    class Server(asyncssh.SSHServer):
        def session_requested(self) -> RawSession:
            return handler()

    server = OtherServer(home, server_factory=Server, encoding=None)
    try:
        yield
    finally:
        server.close()


@pytest.mark.parametrize("ahead", [True, False])
def test_transfers_of_many_files_keep_order_and_bounds(home: homes.Home, ahead: bool) -> None:
    files = many(home, 100 if ahead else 20) | {"big.csv": os.urandom(3_000_000)}
    entries = [sgsync.RemoteEntry(name, False, True, len(data), 0) for name, data in files.items()]
    server = Reversing(files)

    def check(opened: int) -> None:
        # within an answer's time a file may be opened and another one closed
        assert server.most_open <= (2 * sgsync.SFTP_FILES if ahead else 1)
        assert server.most_flying <= (sgsync.SFTP_REQUESTS + sgsync.SFTP_FILES if ahead else 1)
        assert (server.most_flying > 4) is ahead
        assert not server.open
        assert sorted(server.names[opened:]) == sorted(files)
        server.most_open = server.most_flying = 0

    with raw_server(home, lambda: server), session(home) as sftp:
        found = [
            (entry.name, b"".join(blocks))
            for entry, blocks in sftp.read_files("/x", entries, ahead=ahead)
        ]
        assert found == list(files.items())
        check(0)
        server.files.clear()
        uploads = ((f"/x/{name}", blocks_of(data)) for name, data in files.items())
        assert sftp.write_files(uploads, ahead=ahead) == sum(map(len, files.values()))
        check(len(files))
        assert {name.removeprefix("/x/"): data for name, data in server.files.items()} == files


class Counting(asyncssh.SFTPServer):
    """Remembers what was read."""

    reads = 0
    downloaded: list[str]

    def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> object:
        if b"/download/" in path:
            self.downloaded.append(path.decode().rpartition("/")[2])
        return super().open(path, pflags, attrs)

    def read(self, file_obj: object, offset: int, size: int) -> bytes:
        type(self).reads += 1
        return super().read(file_obj, offset, size)


def test_read_asks_for_no_more_than_fits_into_memory(
    home: homes.Home, serve: Callable[..., OtherServer]
) -> None:
    """Whoever takes the blocks may be slow: what comes meanwhile is bounded."""
    folder = home.extract(files={"big.csv": b"x" * 20_000_000})

    class Server(Counting):
        downloaded: list[str] = []  # noqa: RUF012

    serve(Server)
    entry = sgsync.RemoteEntry("big.csv", False, True, 20_000_000, 0.0)
    with session(home) as sftp:
        for _, blocks in sftp.read_files(str(folder), [entry], ahead=True):
            for number, block in enumerate(blocks, 1):
                assert (
                    len(block) == min(sgsync.READ_BYTES, 20_000_000 % sgsync.READ_BYTES or 1)
                    or number <= 20_000_000 // sgsync.READ_BYTES
                )
                assert Server.reads <= number + sgsync.SFTP_REQUESTS


def test_transfers_of_many_files_on_openssh(home: homes.Home) -> None:
    files = many(home)
    with session(home) as sftp:
        for ahead in (True, False):
            assert read_all(home, sftp, ahead=ahead) == files
            assert write_all(home, sftp, files, ahead=ahead) == sum(map(len, files.values()))
            assert written(home) == files
        assert sftp.exists(home.sftp_root.as_posix())  # the session goes on


@pytest.mark.parametrize("ahead", [True, False])
def test_read_asks_again_where_an_answer_is_short(
    home: homes.Home, serve: Callable[..., OtherServer], ahead: bool
) -> None:
    class Short(asyncssh.SFTPServer):
        def read(self, file_obj: object, offset: int, size: int) -> bytes:
            return super().read(file_obj, offset, min(size, 9_000))

    files = many(home)
    serve(Short)
    with session(home) as sftp:
        assert read_all(home, sftp, ahead=ahead) == files


def test_download_fails_at_the_file_that_the_server_refuses(
    home: homes.Home, serve: Callable[..., OtherServer]
) -> None:
    class Refusing(asyncssh.SFTPServer):
        def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> object:
            if path.endswith(b"020.csv"):
                raise asyncssh.SFTPPermissionDenied("no")
            return super().open(path, pflags, attrs)

    files = many(home)
    serve(Refusing)
    assert home.refused(3) == (
        f"{downloads(home)}/20260101-139029/020.csv: cannot be downloaded: permission denied\n"
        f"Try: correct the directory in <SFTP> ({place(home)}), or ask for access to it"
    )
    assert tried_again(home) == 0
    found = {path.name: path.read_bytes() for path in (home.run / "ia").iterdir()}
    assert found == {name: files[name] for name in sorted(files)[:20]}


def test_download_keeps_what_is_whole_for_the_next_attempt(
    home: homes.Home, serve: Callable[..., OtherServer]
) -> None:
    """Many requests at once, then one at a time, each for what is missing."""

    class Server(Counting):
        downloaded: list[str] = []  # noqa: RUF012
        failures = 0

        def read(self, file_obj: Any, offset: int, size: int) -> bytes:
            if file_obj.name.endswith(b"020.csv") and Server.failures < 2:
                Server.failures += 1
                raise asyncssh.SFTPFailure("try later")
            return super().read(file_obj, offset, size)

    files = only(home, many(home) | {"iep.csv": homes.csv_text(ROWS).encode()})
    serve(Server)
    assert home.main() == 0
    assert tried_again(home) == 1
    whole = [name for name in Server.downloaded if name <= "019.csv"]
    assert whole == sorted(files)[:20]
    found = {path.name: path.read_bytes() for path in (home.run / "ia").iterdir()}
    assert found == files


def test_push_fails_at_the_file_that_the_server_refuses(
    home: homes.Home, serve: Callable[..., OtherServer]
) -> None:
    class Refusing(asyncssh.SFTPServer):
        def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> object:
            if path.endswith(b"020.csv"):
                raise asyncssh.SFTPPermissionDenied("no")
            return super().open(path, pflags, attrs)

    files = many(home)
    serve(Refusing)
    with session(home) as sftp, pytest.raises(sgsync.TransferError) as caught:
        write_all(home, sftp, files, ahead=True)
    path = f"{home.sftp_root.as_posix()}/upload/020.csv"
    assert caught.value.message == f"{where(home)}: {path}: cannot be uploaded: permission denied"
    assert not caught.value.transient
    whole = sorted(files)[:20]
    assert {name: written(home)[name] for name in whole} == {name: files[name] for name in whole}


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(lambda _: bytes(20), "the server's answer is garbled", id="empty"),
        pytest.param(lambda _: b"\xff" * 40, "the server's answer is garbled", id="huge"),
        pytest.param(
            lambda number: struct.pack(">IBIII", 13, 101, number ^ 0x1000, 0, 0),
            "the server answered what nobody asked",
            id="stranger",
        ),
        pytest.param(
            lambda number: struct.pack(">IBI", 5, 101, number),
            "the server's answer is garbled",
            id="no-code",
        ),
        pytest.param(
            lambda number: struct.pack(">IBI", 5, 105, number),
            "the server's answer is garbled",
            id="another-kind",
        ),
        pytest.param(
            lambda number: struct.pack(">IBI", 5, 102, number)[:7], "no answer for 0.5 s", id="cut"
        ),
    ],
)
def test_transfers_refuse_answers_that_make_no_sense(
    home: homes.Home, answer: Callable[[int], bytes], reason: str, ahead: bool
) -> None:
    """Every request after the greeting is answered with that."""

    class Nonsense(RawSession):
        def asked(self, _kind: int, number: int, _content: bytes) -> None:
            self.channel.write(answer(number))

    entries = [sgsync.RemoteEntry(name, False, True, 100, 0.0) for name in ("a.csv", "b.csv")]
    with raw_server(home, Nonsense), session(home, timeout_seconds=0.5) as sftp:
        with pytest.raises(sgsync.TransferError) as caught:
            list(sftp.read_files("/x", entries, ahead=ahead))
        failure = f"{where(home)}: /x/a.csv: cannot be downloaded: {reason}"
        assert caught.value.message == failure
        assert caught.value.transient
        sftp.connect()
        with pytest.raises(sgsync.TransferError) as caught:
            sftp.write_files([("/x/a.csv", iter([b"data"]))], ahead=ahead)
        assert caught.value.message == failure.replace("downloaded", "uploaded")
        assert caught.value.transient


def test_read_refuses_more_than_it_asked_for(
    home: homes.Home, serve: Callable[..., OtherServer]
) -> None:
    class Generous(asyncssh.SFTPServer):
        def read(self, _file: object, _offset: int, size: int) -> bytes:
            return b"x" * (size + 1)

    folder = home.extract(files={"a.csv": "x" * 100})
    serve(Generous)
    with session(home) as sftp, pytest.raises(sgsync.TransferError) as caught:
        read(sftp, f"{folder}/a.csv", 100)
    assert caught.value.message == (
        f"{where(home)}: {folder}/a.csv: cannot be downloaded: the server's answer is garbled"
    )


def test_read_gives_up_on_a_server_that_drips(home: homes.Home) -> None:
    """Each answer is one byte, in time; the block they make up is not."""

    class Dripping(RawSession):
        def asked(self, kind: int, number: int, _content: bytes) -> None:
            answer = struct.pack(">IBII", 10, 103, number, 1) + b"x"
            if kind == 3:
                answer = struct.pack(">IBII", 10, 102, number, 1) + b"h"
            asyncio.get_running_loop().call_later(0.1, self.channel.write, answer)

    with (
        raw_server(home, Dripping),
        session(home, timeout_seconds=0.5) as sftp,
        pytest.raises(sgsync.TransferError, match=r"cannot be downloaded: no answer for 0\.5 s"),
    ):
        read(sftp, "/x/a.csv", 1000)


@pytest.mark.parametrize("at", [1, 20, 150])
def test_write_many_converts_a_cut_wherever_it_comes(
    home: homes.Home, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    send, calls = sgsync.SftpWrites._send, []

    def cut_once(writes: sgsync.SftpWrites, file: sgsync.SftpWrites.File) -> None:
        send(writes, file)
        calls.append(1)
        if len(calls) == at:
            home.sshd.cut()

    monkeypatch.setattr(sgsync.SftpWrites, "_send", cut_once)
    with session(home) as sftp, pytest.raises(sgsync.TransferError) as caught:
        write_all(home, sftp, many(home, 200), ahead=True)
    assert caught.value.transient
    assert "cannot be uploaded: " in caught.value.message


def test_transfers_survive_new_keys_in_the_middle(
    home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSH changes its keys every so many bytes."""
    monkeypatch.setattr(paramiko.packet.Packetizer, "REKEY_BYTES", 1 << 20)
    files = only(home, {f"{number}.csv": os.urandom(4_000_000) for number in range(3)})
    with session(home) as sftp:
        assert read_all(home, sftp, ahead=True) == files
        write_all(home, sftp, files, ahead=True)
    assert written(home) == files


def test_connect_asks_for_the_fastest_cipher(home: homes.Home) -> None:
    with session(home) as sftp:
        assert sftp._transport is not None
        assert sftp._transport.remote_cipher == "aes128-gcm@openssh.com"


# ------------------------------------------------------------------ push


def test_push_marks_complete_last(home: homes.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.configure(upload='<SQL file="open_records.csv">SELECT 1 AS "one"</SQL>')
    mark, seen = sgsync.Sftp.mark, []

    def look(sftp: sgsync.Sftp, path: str) -> None:
        assert path == f"{home.sftp_root.as_posix()}/upload/{home.run.name}/COMPLETE"
        assert not (home.run / "COMPLETE").exists()
        seen.append(home.pushed())
        mark(sftp, path)

    monkeypatch.setattr(sgsync.Sftp, "mark", look)
    assert home.main() == 0
    local = {
        path.relative_to(home.run).as_posix(): path.read_bytes()
        for path in home.run.rglob("*")
        if path.is_file()
    }
    log = "sgi_log.txt"
    assert local.pop("COMPLETE") == b""
    assert local.pop(log).startswith(seen[0].pop(log))
    assert [local] == seen
    assert sorted(local) == [
        "diff/iep.csv", "ia/iep.csv", "ic/iep.csv", "manifest.json", "open_records.csv",
        "report.html", "summary.json",
    ]  # fmt: skip
    assert home.pushed().keys() == local.keys() | {"COMPLETE", log}


@pytest.fixture
def before_write(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None], str], None]:
    """Does something before a file of that name is uploaded, the first time."""

    def arrange(what: Callable[[], None], name: str) -> None:
        opened, done = sgsync.SftpWrites.File, []

        def patched(path: str, blocks: Iterator[bytes]) -> sgsync.SftpWrites.File:
            if path.endswith(name) and not done:
                done.append(1)
                what()
            return opened(path, blocks)

        monkeypatch.setattr(sgsync.SftpWrites, "File", staticmethod(patched))

    return arrange


@pytest.mark.parametrize("name", ["diff/iep.csv", "ic/iep.csv", "sgi_log.txt"])
def test_push_recovers_from_a_server_gone_in_the_middle(
    home: homes.Home, before_write: Callable[..., None], name: str
) -> None:
    before_write(home.sshd.cut, name)
    assert home.main() == 0
    assert tried_again(home) == 1
    assert home.pushed()["ia/iep.csv"] == (home.run / "ia/iep.csv").read_bytes()
    assert home.pushed()["COMPLETE"] == b""


def test_push_recovers_from_a_server_gone_in_the_middle_of_a_file(
    home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, calls = sgsync.SftpWrites._send, []

    def cut_once(writes: sgsync.SftpWrites, file: sgsync.SftpWrites.File) -> None:
        send(writes, file)
        calls.append(file.path.endswith("big.csv"))
        if sum(calls) == 80:  # of 132 writes
            home.sshd.cut()

    monkeypatch.setattr(sgsync.SftpWrites, "_send", cut_once)
    home.configure(upload='<SQL file="big.csv">SELECT hex(zeroblob(2100000)) AS "big"</SQL>')
    assert home.main() == 0
    assert tried_again(home) == 1
    assert home.pushed()["big.csv"] == (home.run / "big.csv").read_bytes()
    assert len(home.pushed()["big.csv"]) > 4_000_000


@pytest.mark.parametrize("before", [True, False])
def test_push_marks_complete_once_whatever_breaks(
    home: homes.Home, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    mark, calls = sgsync.Sftp.mark, []

    def cut_once(sftp: sgsync.Sftp, path: str) -> None:
        calls.append(path)
        if len(calls) == 1 and before:
            home.sshd.cut()
        mark(sftp, path)
        if len(calls) == 1:
            home.sshd.cut()
            sftp.listing("/")

    monkeypatch.setattr(sgsync.Sftp, "mark", cut_once)
    assert home.main() == 0
    assert len(calls) == (2 if before else 1)
    assert home.pushed()["COMPLETE"] == b""
    assert (home.run / "COMPLETE").exists()


def test_push_does_not_send_again_what_samegoal_has_taken(
    home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks after COMPLETE, and the epoch is moved away before the next attempt."""
    mark = sgsync.Sftp.mark

    def take(sftp: sgsync.Sftp, path: str) -> None:
        mark(sftp, path)
        Path(path).parent.rename(home.sftp_root / "upload-processed")
        home.sshd.cut()
        sftp.listing("/")

    monkeypatch.setattr(sgsync.Sftp, "mark", take)
    assert home.main() == 0
    assert not list((home.sftp_root / "upload").iterdir())
    assert (home.run / "COMPLETE").exists()


def test_push_leaves_no_complete_where_the_server_is_gone(
    home: homes.Home, before_write: Callable[..., None]
) -> None:
    before_write(home.sshd.stop, "ic/iep.csv")
    assert home.failed(3) == (
        f"{where(home)}: cannot connect: [Errno 111] Connection refused{DONE}\n"
        "Try: check that the server is running and that no firewall blocks it"
    )
    assert home.summary["outcome"] == "failed"
    assert home.sis_rows() == ROWS  # the writing was done; the next run finds nothing to do


def test_push_wants_its_directory_before_anything_is_written(home: homes.Home) -> None:
    (home.sftp_root / "upload").rmdir()
    assert home.failed(3) == (
        f"{where(home)}: {home.sftp_root.as_posix()}/upload: upload directory does not exist\n"
        "Try: correct uploadDirectory on <SFTP>"
    )
    assert home.sis_rows() == []


def test_push_tells_that_its_directory_is_gone(
    home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    statements = sgsync.run_statements

    def remove_first(*args: Any) -> dict[str, int]:
        (home.sftp_root / "upload").rmdir()
        return statements(*args)

    monkeypatch.setattr(sgsync, "run_statements", remove_first)
    assert home.failed(3) == (
        f"{uploads(home)}: cannot be created: it does not exist{DONE}\n"
        f"Try: correct the directory in <SFTP> ({place(home)}), or ask for access to it"
    )
    assert tried_again(home) == 0


def test_push_tells_that_it_may_not_write(
    home: homes.Home, serve: Callable[..., OtherServer]
) -> None:
    class OwnNamesOnly(asyncssh.SFTPServer):
        def mkdir(self, path: bytes, attrs: asyncssh.SFTPAttrs) -> None:
            if b"probe" not in path:
                raise asyncssh.SFTPPermissionDenied("no")
            super().mkdir(path, attrs)

    serve(OwnNamesOnly)
    assert home.failed(3) == (
        f"{uploads(home)}: cannot be created: permission denied{DONE}\n"
        f"Try: correct the directory in <SFTP> ({place(home)}), or ask for access to it"
    )
    assert tried_again(home) == 0
    assert home.sis_rows() == ROWS


def test_push_learns_before_anything_is_written_that_it_may_not_write(
    home: homes.Home, serve: Callable[..., OtherServer]
) -> None:
    class ReadOnly(asyncssh.SFTPServer):
        def mkdir(self, *_: object) -> None:
            raise asyncssh.SFTPPermissionDenied("no")

    serve(ReadOnly)
    assert home.refused(3) == (
        f"{where(home)}: {home.sftp_root.as_posix()}/upload: cannot be written to: permission "
        "denied\n"
        f"Try: correct the directory in <SFTP> ({place(home)}), or ask for access to it"
    )
    assert tried_again(home) == 0


def test_push_can_do_where_directories_cannot_be_removed(
    home: homes.Home, serve: Callable[..., OtherServer]
) -> None:
    class Append(asyncssh.SFTPServer):
        def rmdir(self, _path: bytes) -> None:
            raise asyncssh.SFTPFailure("never")

    serve(Append)
    assert home.main() == 0
    (left,) = (home.sftp_root / "upload").glob(".sgsync-probe-*")
    assert (
        f" WARNING {where(home)}: {left}: cannot be removed: never; ask the server's operator to "
        "remove it" in home.log
    )
    assert tried_again(home) == 0


def test_push_never_touches_an_epoch_that_is_there(
    home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    statements = sgsync.run_statements

    def another_arrives(*args: Any) -> dict[str, int]:
        (home.sftp_root / "upload" / home.run.name).mkdir()
        return statements(*args)

    monkeypatch.setattr(sgsync, "run_statements", another_arrives)
    assert home.failed(3) == (
        f"{uploads(home)}: already exists, perhaps from another installation{DONE}\n"
        "Try: run again: each run has its own epoch; start two homes at least a minute apart"
    )
    assert home.pushed() == {}


def test_push_verifies_sizes(home: homes.Home, serve: Callable[..., OtherServer]) -> None:
    class Lossy(asyncssh.SFTPServer):
        def write(self, file_obj: object, offset: int, data: bytes) -> int:
            return super().write(file_obj, offset, data[:-1]) + 1

    serve(Lossy)
    message = home.failed(3)
    assert re.fullmatch(
        rf"{uploads(home)}/diff/iep.csv: the server has \d+ of \d+ bytes{DONE}\n"
        "Try: check whether the server's disk is full",
        message,
    )
    assert tried_again(home) == RETRIES


def test_push_names_the_file_that_the_server_cannot_take(
    home: homes.Home, serve: Callable[..., OtherServer]
) -> None:
    class Full(asyncssh.SFTPServer):
        def write(self, *_: object) -> int:
            raise asyncssh.SFTPFailure("No space left on device")

    serve(Full)
    assert home.failed(3) == (
        f"{uploads(home)}/diff/iep.csv: cannot be uploaded: No space left on device{DONE}\n"
        "Try: check the disk space and the permissions on the server"
    )
    assert tried_again(home) == RETRIES
