"""The fixtures are what they say: OpenSSH, PostgreSQL and SQLite, as sgsync reaches them."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import paramiko
import pyodbc
import pytest

from support import servers


@contextmanager
def sftp_client(server: servers.Sshd, key: str, hosts: str = "") -> Iterator[paramiko.SFTPClient]:
    client = paramiko.SSHClient()
    known = server.folder / f"known_hosts-{servers.fresh_name()}"
    known.write_text(hosts or server.known_hosts)
    client.load_host_keys(str(known))
    client.connect(
        server.host,
        server.port,
        server.username,
        key_filename=str(server.keys[key]),
        passphrase=server.passphrase if key == "encrypted" else None,
        allow_agent=False,
        look_for_keys=False,
        timeout=20,
    )
    try:
        yield client.open_sftp()
    finally:
        client.close()


@pytest.mark.parametrize("key", ["rsa", "ecdsa", "ed25519", "rsa_pem", "encrypted"])
def test_sshd_puts_and_gets(sshd_server: servers.Sshd, sftp_root: Path, key: str) -> None:
    with sftp_client(sshd_server, key) as sftp:
        sftp.putfo(io.BytesIO(b"a,b\r\n1,2\r\n"), f"{sftp_root}/upload/x.csv")
        assert sorted(sftp.listdir(str(sftp_root))) == ["download", "upload"]
        assert sftp.open(f"{sftp_root}/upload/x.csv").read() == b"a,b\r\n1,2\r\n"
    assert (sftp_root / "upload/x.csv").read_bytes() == b"a,b\r\n1,2\r\n"


def test_sshd_refuses_a_stranger(sshd_server: servers.Sshd, sftp_root: Path) -> None:
    for _ in range(3):
        with (
            pytest.raises(paramiko.AuthenticationException),
            sftp_client(sshd_server, "stranger"),
        ):
            pass


def test_sshd_is_not_the_other_host(sshd_server: servers.Sshd, sftp_root: Path) -> None:
    with (
        pytest.raises(paramiko.BadHostKeyException),
        sftp_client(sshd_server, "rsa", sshd_server.other_known_hosts),
    ):
        pass


@pytest.mark.parametrize("action", ["stop", "cut"])
def test_sshd_leaves_in_the_middle(sshd_server: servers.Sshd, sftp_root: Path, action: str) -> None:
    with sftp_client(sshd_server, "ed25519") as sftp:
        assert sftp.listdir(str(sftp_root))
        getattr(sshd_server, action)()
        with pytest.raises((OSError, EOFError, paramiko.SSHException)):
            sftp.listdir(str(sftp_root))
    sshd_server.start()
    with sftp_client(sshd_server, "ed25519") as sftp:
        assert sftp.listdir(str(sftp_root))


def test_database_takes_and_gives(database: servers.Database) -> None:
    database.execute("CREATE TABLE t (id integer, name varchar(20))")
    database.insert("t", [(1, "Zoë"), (2, None)])
    database.execute("UPDATE t SET name = ? WHERE id = ?", "", 2)
    assert database.rows("SELECT id, name FROM t ORDER BY id") == [(1, "Zoë"), (2, "")]


def test_postgres_calls_a_procedure(postgres: servers.Database) -> None:
    postgres.execute("CREATE TABLE t (id integer PRIMARY KEY, name text)")
    postgres.execute(
        "CREATE PROCEDURE put(a text, b text) LANGUAGE sql "
        "AS 'INSERT INTO t VALUES (a::integer, b) ON CONFLICT (id) DO UPDATE SET name = b'"
    )
    for name in ("one", "uno"):
        postgres.execute("CALL put(?, ?)", "1", name)
    assert postgres.rows("SELECT * FROM t") == [(1, "uno")]


def test_postgres_refuses_a_wrong_password(postgres_server: servers.Postgres) -> None:
    with pytest.raises(pyodbc.Error, match="password authentication failed"):
        pyodbc.connect(postgres_server.connection_string(password="wrong"))


@pytest.mark.parametrize("immediate", [False, True])
def test_postgres_comes_back_with_its_data(
    postgres_server: servers.Postgres, postgres: servers.Database, immediate: bool
) -> None:
    postgres.execute("CREATE TABLE t (id integer)")
    with postgres.connect() as connection:
        postgres_server.stop(immediate=immediate)
        with pytest.raises(pyodbc.Error):
            connection.execute("SELECT 1")
    with pytest.raises(pyodbc.Error, match="refused"):
        postgres.rows("SELECT 1")
    postgres_server.start()
    assert postgres.rows("SELECT * FROM t") == []


def test_a_missing_server_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers.shutil, "which", lambda *_args, **_options: None)
    with pytest.raises(servers.ServerMissingError, match=r"make test.* installs openssh-server"):
        servers.Sshd()
    with pytest.raises(servers.ServerMissingError, match="installs no-such-package"):
        servers.odbc_driver("libnosuchdriver.so", "no-such-package")


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_servers_end_with_their_process(ending: signal.Signals, tmp_path: Path) -> None:
    """However it ends; a thread that started one may end before."""
    script = (
        "import threading; from support import servers; server = servers.Sshd();"
        "starter = threading.Thread(target=server.start); starter.start(); starter.join();"
        "print(server.port, flush=True); threading.Event().wait()"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    owner = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=here,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    port = int(owner.stdout.readline())
    with socket.create_connection((servers.HOST, port)):
        pass
    os.kill(owner.pid, ending)
    owner.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            socket.create_connection((servers.HOST, port)).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.05)
    pytest.fail("sshd outlived its owner")
