"""SchooLinks' SFTP server for tests and demo: log-in with a password, `automated` and `other`.

`SchooLinks` runs on asyncssh in this process, for whoever runs it; its subclasses of SFTPServer
below have the quirks of real servers. `OpenSsh` is OpenSSH's sshd with a user of its own, which
only root can make. Both have host, port, username, password, known_hosts, key (the private half
that the server accepts, too), `files` (a folder of this machine) and `path` (it for a client).
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import subprocess
import threading
from pathlib import Path
from types import TracebackType

import asyncssh

from support import servers

DIRECTORIES = ("automated", "other")


class SchooLinks:
    """A loopback SFTP server in a thread of its own; a context manager.

    quirks: the SFTPServer to run, one of those below
    events: what clients did to files, in order: ("open", name), ("rename", name, to) ...
    """

    host = "127.0.0.1"
    path = ""

    def __init__(self, files: Path, quirks: type[Recording] | None = None) -> None:
        self.files, self.port = files, 0
        self.username, self.password = "district", secrets.token_urlsafe(16)
        self.events: list[tuple[str, ...]] = []
        self.logins: list[str] = []
        self.connections: list[asyncssh.SSHServerConnection] = []
        self.quirks = quirks or Recording
        for name in DIRECTORIES:
            (files / name).mkdir(parents=True)
        self._host_key = asyncssh.generate_private_key("ssh-ed25519")
        self._client_key = asyncssh.generate_private_key("ssh-ed25519")
        self.key = self._client_key.export_private_key().decode("ascii")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def known_hosts(self) -> str:
        public = self._host_key.export_public_key().decode("ascii")
        return f"[{self.host}]:{self.port} {public}"

    def __enter__(self) -> SchooLinks:
        self._thread.start()
        self._acceptor = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(30)
        self.port = self._acceptor.get_port()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _end(self) -> None:
        self._acceptor.close()
        for connection in self.connections:
            connection.abort()
            await connection.wait_closed()

    async def _listen(self) -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            self.host,
            0,
            server_host_keys=[self._host_key],
            server_factory=lambda: _Login(self),
            authorized_client_keys=asyncssh.import_authorized_keys(
                self._client_key.export_public_key().decode("ascii")
            ),
            sftp_factory=lambda channel: self.quirks(channel, self),
        )


class _Login(asyncssh.SSHServer):
    def __init__(self, server: SchooLinks) -> None:
        self._server = server

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._server.connections.append(conn)

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        self._server.logins.append(username)
        known = self._server.username, self._server.password
        return secrets.compare_digest(repr((username, password)), repr(known))


# ------------------------------------------------------------------ quirks of servers


class Recording(asyncssh.SFTPServer):
    """No quirk: a server that renames over an existing file."""

    def __init__(self, channel: asyncssh.SSHServerChannel, server: SchooLinks) -> None:
        super().__init__(channel, chroot=os.fsencode(server.files))
        self.server = server

    def note(self, *event: str | bytes) -> None:
        words = (word.decode() if isinstance(word, bytes) else word for word in event)
        self.server.events.append(tuple(words))

    def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> object:
        self.note("open", path)
        return super().open(path, pflags, attrs)

    def remove(self, path: bytes) -> None:
        self.note("remove", path)
        super().remove(path)

    def rename(self, oldpath: bytes, newpath: bytes) -> None:
        self.note("rename", oldpath, newpath)
        super().rename(oldpath, newpath)

    def posix_rename(self, oldpath: bytes, newpath: bytes) -> None:
        self.note("posix-rename", oldpath, newpath)
        super().posix_rename(oldpath, newpath)


class OldRename(Recording):
    """Knows only the old rename, which refuses to replace a file."""

    def posix_rename(self, *_: bytes) -> None:
        raise asyncssh.SFTPOpUnsupported("unsupported")


class NoRename(OldRename):
    """Nothing may be renamed."""

    def rename(self, *_: bytes) -> None:
        raise asyncssh.SFTPPermissionDenied("no renaming here")


class OnlyCsv(Recording):
    """Files must be called .csv."""

    def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> object:
        if not path.endswith(b".csv"):
            raise asyncssh.SFTPPermissionDenied("only .csv")
        return super().open(path, pflags, attrs)


class Lossy(Recording):
    """Loses the end of every file, as a full disk may."""

    def write(self, file_obj: object, offset: int, data: bytes) -> int:
        super().write(file_obj, offset, data[:-1])
        return len(data)


class CutOnce(Recording):
    """Cuts the first connection in the middle of the second file."""

    def write(self, file_obj: object, offset: int, data: bytes) -> int:
        opened = [event for event in self.server.events if event[0] == "open"]
        if len(opened) == 2 and ("cut",) not in self.server.events:
            self.note("cut")
            super().write(file_obj, offset, data[: len(data) // 2])
            self.channel.get_connection().abort()
        return super().write(file_obj, offset, data)


# ------------------------------------------------------------------ OpenSSH: OpenSsh


class OpenSsh(servers.Sshd):
    """OpenSSH's sshd for a user of its own, with a password of its own; needs root."""

    def __init__(self) -> None:
        super().__init__()
        self.username, self.password = f"sgsync{secrets.token_hex(4)}", secrets.token_urlsafe(16)
        self.key = self.keys["ed25519"].read_text()
        self.files, self.path = self.root, self.root.as_posix()
        subprocess.run(
            ["useradd", "--no-create-home", "--no-user-group", "--shell", "/bin/sh", self.username],
            check=True,
        )
        login = f"{self.username}:{self.password}"
        subprocess.run(["chpasswd"], input=login, text=True, check=True)
        for folder in (self.root.parent, self.root):
            folder.chmod(0o755)
        for name in DIRECTORIES:
            (self.root / name).mkdir()
            shutil.chown(self.root / name, self.username)
        text = self._config.read_text()
        for option, value in {
            "AuthenticationMethods": "password publickey",
            "PasswordAuthentication": "yes",
            "UsePAM": "no",
        }.items():
            text = re.sub(rf"(?m)^{option} .*$", f"{option} {value}", text)
        self._config.write_text(text)

    def close(self) -> None:
        super().close()
        subprocess.run(["userdel", self.username], check=False, capture_output=True)
