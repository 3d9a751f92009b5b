"""Real servers for tests, demo and benchmarks: OpenSSH's sshd, PostgreSQL, SQLite through ODBC.

Everything listens on loopback only, on a port of its own, with keys and passwords made for the
occasion, in a temporary folder that goes away with it:

    with Sshd() as sshd, Postgres() as postgres:
        sshd.root, sshd.port, sshd.keys["ed25519"], sshd.known_hosts
        pyodbc.connect(postgres.create_database("sis"))

A server ends with its `with` block or `close()`, at the latest with this process, however that
ends. No pytest in here: scripts use this module too.
"""

from __future__ import annotations

import atexit
import configparser
import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

with contextlib.suppress(ImportError):  # Windows has none, and none of these servers
    import pwd

if TYPE_CHECKING:
    import pyodbc

HOST = "127.0.0.1"
START_SECONDS = 30.0
STOP_SECONDS = 20.0


class ServerMissingError(RuntimeError):
    """A server or driver is not installed; the message says how to get it."""

    def __init__(self, what: str, package: str) -> None:
        super().__init__(
            f"{what} not found: run `make test`, it installs {package}\n"
            f"(or by hand: apt-get install --no-install-recommends {package})"
        )


class ServerStartError(RuntimeError):
    """A server did not come up; the message ends with its log."""


def free_port() -> int:
    """A loopback TCP port that nothing listens on.

    Below Linux's range for outgoing connections, so that no client takes the port while its
    server is down; not from `random`, which hypothesis seeds alike in every process.
    """
    for _ in range(100):
        port = 15000 + secrets.randbelow(15000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise RuntimeError("no free port between 15000 and 30000")


# ------------------------------------------------------------------ processes: Server

AnyServer = TypeVar("AnyServer", bound="Server")

# The kernel kills a server when the *thread* that started it ends: so one thread starts them all.
_starter = ThreadPoolExecutor(1, "server-starter")


def _spawn(
    command: Sequence[str | Path], log: Path, user: str | None = None
) -> subprocess.Popen[bytes]:
    """Starts a server that dies with this process, out of reach of the terminal's Ctrl-C."""
    tie = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    with log.open("ab") as output:
        return _starter.submit(
            subprocess.Popen,
            [*tie, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd="/",
            user=user,
            group=pwd.getpwnam(user).pw_gid if user else None,
            extra_groups=[] if user else None,
        ).result()


def _output(*command: str) -> str:
    """What a command prints, errors included; nothing where there is no such command."""
    try:
        return subprocess.run(
            command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ).stdout
    except OSError:
        return ""


class Server:
    """A child process in a temporary folder: what `Sshd` and `Postgres` have in common."""

    name = "server"
    host = HOST

    def __init__(self) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix=f"sgsync-{self.name}-"))
        self.log = self.folder / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the server on its port and waits until it answers; nothing if it runs."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stops it and cuts its connections; folder and port stay for the next `start()`."""
        raise NotImplementedError

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        """Stops the server for good and removes its folder."""
        atexit.unregister(self.close)
        try:
            self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _await(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if not self.running or time.monotonic() > deadline:
                self.stop()
                raise ServerStartError(f"{self.name} did not start:\n{self.log_text()[-4000:]}")
            time.sleep(0.02)

    def __enter__(self: AnyServer) -> AnyServer:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _descendants(pid: int) -> list[int]:
    """The living processes below `pid`, whichever session or group they moved to."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    children.setdefault(int(parent), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _kill_descendants(pid: int) -> None:
    """Kills all processes below `pid`, which stands still meanwhile, so that none is born."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        while below := _descendants(pid):
            for child in below:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        os.kill(pid, signal.SIGCONT)


# ------------------------------------------------------------------ SFTP: Sshd


class Sshd(Server):
    """OpenSSH's sshd with SFTP, public-key login only, for the user who runs this process.

    host, port, username: where and as whom to log in
    root: the folder for files; SFTP paths are absolute, such as f"{sshd.root}/download"
    keys: private key files: "rsa", "ecdsa", "ed25519", "rsa_pem" (the old PEM format),
        "encrypted" (opened by `passphrase`), "stranger" (a good key that sshd does not accept)
    known_hosts: text for a known_hosts file, its three host keys as "[host]:port type key"
    other_known_hosts: the same lines with another server's keys: what a changed host looks like
    log: sshd's log, to look at when a test fails
    """

    name = "sshd"
    _KEYS: dict[str, list[str]] = {  # noqa: RUF012
        "rsa": ["-t", "rsa", "-b", "2048"],
        "ecdsa": ["-t", "ecdsa"],
        "ed25519": ["-t", "ed25519"],
        "rsa_pem": ["-t", "rsa", "-b", "2048", "-m", "PEM"],
        "encrypted": ["-t", "ed25519"],
        "stranger": ["-t", "ed25519"],
        "host_rsa": ["-t", "rsa", "-b", "2048"],
        "host_ecdsa": ["-t", "ecdsa"],
        "host_ed25519": ["-t", "ed25519"],
        "other_host": ["-t", "ed25519"],
    }

    def __init__(self) -> None:
        self._program = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if self._program is None or shutil.which("ssh-keygen") is None:
            raise ServerMissingError("OpenSSH's sshd", "openssh-server")
        super().__init__()
        self.username = pwd.getpwuid(os.geteuid()).pw_name
        self.root = self.folder / "root"
        self.root.mkdir()
        self.passphrase = secrets.token_urlsafe(12)
        self.keys = self._make_keys()
        accepted = [key for name, key in self.keys.items() if name != "stranger"]
        self._authorized_keys = self.folder / "authorized_keys"
        self._authorized_keys.write_text("".join(_public(key) + "\n" for key in accepted))
        self._config = self.folder / "sshd_config"
        self._write_config()

    def start(self) -> None:
        if self.running:
            return
        command = [str(self._program), "-D", "-e", "-f", str(self._config)]
        self._process = _spawn(command, self.log)
        self._await(self._answers)

    def stop(self) -> None:
        """Kills sshd and every session under it: clients see their connection cut."""
        if self._process is not None:
            _kill_descendants(self._process.pid)
            self._process.kill()
            self._process.wait(STOP_SECONDS)
            self._process = None

    def cut(self) -> None:
        """Cuts every live session; new connections are welcome at once."""
        if self._process is not None:
            _kill_descendants(self._process.pid)

    @property
    def known_hosts(self) -> str:
        keys = [_public(self.folder / f"host_{kind}") for kind in ("rsa", "ecdsa", "ed25519")]
        return "".join(f"[{self.host}]:{self.port} {key}\n" for key in keys)

    @property
    def other_known_hosts(self) -> str:
        return f"[{self.host}]:{self.port} {_public(self.folder / 'other_host')}\n"

    def _make_keys(self) -> dict[str, Path]:
        making = []
        for name, options in self._KEYS.items():
            phrase = self.passphrase if name == "encrypted" else ""
            command = ["ssh-keygen", "-q", *options, "-N", phrase, "-C", name]
            making.append(subprocess.Popen([*command, "-f", self.folder / name]))
        for process in making:
            if process.wait(START_SECONDS):
                raise ServerStartError(f"ssh-keygen failed with status {process.returncode}")
        return {name: self.folder / name for name in self._KEYS if "host" not in name}

    def _write_config(self) -> None:
        as_root = os.geteuid() == 0
        if as_root:
            Path("/run/sshd").mkdir(mode=0o755, parents=True, exist_ok=True)
        lines = [
            f"ListenAddress {self.host}:{self.port}",
            *(f"HostKey {self.folder}/host_{kind}" for kind in ("rsa", "ecdsa", "ed25519")),
            f"AuthorizedKeysFile {self._authorized_keys}",
            "StrictModes no",
            # without PAM, sshd refuses accounts whose password is locked, even with a key
            f"UsePAM {'yes' if as_root and _password_locked(self.username) else 'no'}",
            "PermitRootLogin prohibit-password",
            "AuthenticationMethods publickey",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "MaxAuthTries 20",
            "MaxStartups 200",
            "UseDNS no",
            "PidFile none",
            "LogLevel VERBOSE",
            "Subsystem sftp internal-sftp",
        ]
        # OpenSSH 9.8 and later shut a client out for a while after refused logins; older ones
        # do not know the option
        quirk = "PerSourcePenalties no"
        self._config.write_text("\n".join([*lines, quirk]) + "\n")
        if "PerSourcePenalties" in _output(str(self._program), "-t", "-f", str(self._config)):
            self._config.write_text("\n".join(lines) + "\n")

    def _answers(self) -> bool:
        try:
            with socket.create_connection((self.host, self.port), timeout=2) as probe:
                return probe.recv(4) == b"SSH-"
        except OSError:
            return False


def _public(key: Path) -> str:
    return key.with_name(key.name + ".pub").read_text().strip()


def _password_locked(user: str) -> bool:
    for line in Path("/etc/shadow").read_text().splitlines():
        name, password = line.split(":")[:2]
        if name == user:
            return password.startswith("!")
    return False


# ------------------------------------------------------------------ databases: Database, Postgres


class Database:
    """One database that a test may do with as it likes.

    kind: "sqlite", "postgresql" or "mssql"
    connection_string: for pyodbc and config.xml
    Each call below connects, commits and disconnects by itself, so that a test holds no lock.
    """

    def __init__(self, kind: str, connection_string: str) -> None:
        self.kind = kind
        self.connection_string = connection_string

    def execute(self, sql: str, *values: object) -> None:
        """Runs one statement (on SQL Server: one batch) to the end of its last result."""
        with self.connect() as connection:
            cursor = connection.execute(sql, *values)
            while cursor.nextset():
                pass

    def rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        with self.connect() as connection:
            return [tuple(row) for row in connection.execute(sql, *values).fetchall()]

    def insert(self, table: str, rows: Sequence[Sequence[object]]) -> None:
        """Inserts rows, each with a value for every column of the table, in one transaction."""
        if rows:
            marks = ", ".join("?" * len(rows[0]))
            with self.connect(autocommit=False) as connection:
                connection.cursor().executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
                connection.commit()

    @contextlib.contextmanager
    def connect(self, *, autocommit: bool = True) -> Iterator[pyodbc.Connection]:
        import pyodbc

        pyodbc.pooling = False  # or newer unixODBC hands out connections that are long dead
        connection = pyodbc.connect(self.connection_string, autocommit=autocommit, timeout=20)
        try:
            yield connection
        finally:
            connection.close()


def odbc_driver(library: str, package: str) -> str:
    """The path of an ODBC driver's library, from its Debian package, disk or odbcinst.ini."""
    listed = _output("dpkg", "-L", package).split()
    candidates = [path for path in listed if path.endswith("/" + library)]
    for pattern in ("lib/*/odbc", "lib/odbc", "lib64", "lib/*", "local/lib", "lib"):
        candidates += sorted(str(path) for path in Path("/usr").glob(f"{pattern}/{library}"))
    candidates += [path for path in _registered_drivers() if path.endswith(library)]
    for path in candidates:
        if "/" not in path or Path(path).exists():
            return path
    raise ServerMissingError(f"the ODBC driver {library}", package)


def _registered_drivers() -> list[str]:
    inifile = configparser.ConfigParser(strict=False, interpolation=None)
    with contextlib.suppress(configparser.Error, OSError):
        inifile.read("/etc/odbcinst.ini")
    return [inifile[name]["Driver"] for name in inifile.sections() if "Driver" in inifile[name]]


def sqlite_connection_string(path: Path) -> str:
    """For a SQLite file, which is made by the first statement that needs it."""
    driver = odbc_driver("libsqlite3odbc.so", "libsqliteodbc")
    return f"Driver={driver};Database={path};"


@contextlib.contextmanager
def mssql_database(server: str) -> Iterator[Database]:
    """A database of its own on the SQL Server that `server`, a connection string, leads to.

    Its login must be allowed to create databases.
    """
    admin, name = Database("mssql", server), fresh_name()
    admin.execute(f"CREATE DATABASE [{name}]")
    elsewhere = re.sub(
        r"(?i)(?:^|(?<=;))\s*(?:database|initial catalog)\s*=[^;]*(?:;|$)", "", server
    )
    try:
        yield Database("mssql", f"{elsewhere.rstrip('; ')};Database={name};")
    finally:
        admin.execute(f"ALTER DATABASE [{name}] SET SINGLE_USER WITH ROLLBACK IMMEDIATE")
        admin.execute(f"DROP DATABASE [{name}]")


def fresh_name() -> str:
    """A name for a database that no other has."""
    return f"sgsync_{secrets.token_hex(6)}"


class Postgres(Server):
    """A throw-away PostgreSQL cluster with password authentication.

    fsync: durable writes as PostgreSQL has them by default; False for tests, which need none
    username, password: its superuser
    log: PostgreSQL's log, to look at when a test fails
    """

    name = "postgres"
    username = "sgsync"

    def __init__(self, *, fsync: bool = True) -> None:
        self._programs = _postgres_programs()
        super().__init__()
        self.password = secrets.token_urlsafe(16)
        self._data = self.folder / "data"
        # PostgreSQL refuses to run as root
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(self.folder, self._user)
        self._initialise(fsync)

    def start(self) -> None:
        if self.running:
            return
        self._process = _spawn(
            [self._programs / "postgres", "-D", self._data], self.log, self._user
        )
        self._await(self._ready)

    def stop(self, *, immediate: bool = False) -> None:
        """Rolls back and disconnects everybody; `immediate`: as a crash would, recovery follows."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT if immediate else signal.SIGINT)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def connection_string(self, database: str = "postgres", password: str | None = None) -> str:
        """For pyodbc and config.xml; another `password` is refused."""
        driver = odbc_driver("psqlodbcw.so", "odbc-postgresql")
        return (
            f"Driver={driver};Server={self.host};Port={self.port};Database={database};"
            f"UID={self.username};PWD={self.password if password is None else password};"
            "SSLmode=disable;"
        )

    def create_database(self, name: str) -> str:
        """Makes an empty database and returns its connection string."""
        Database("postgresql", self.connection_string()).execute(f'CREATE DATABASE "{name}"')
        return self.connection_string(name)

    def drop_database(self, name: str) -> None:
        """Drops it, whoever is connected."""
        admin = Database("postgresql", self.connection_string())
        admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def _initialise(self, fsync: bool) -> None:
        password_file = self.folder / "password"
        password_file.write_text(self.password)
        if self._user:
            shutil.chown(password_file, self._user)
        command: list[str | Path] = [self._programs / "initdb", "--pgdata", self._data]
        command += ["--username", self.username, "--pwfile", password_file]
        command += ["--auth", "scram-sha-256", "--encoding", "UTF8", "--no-locale", "--no-sync"]
        made = _spawn(command, self.log, self._user)
        if made.wait(START_SECONDS * 2):
            raise ServerStartError(f"initdb failed:\n{self.log_text()}")
        password_file.unlink()
        with (self._data / "postgresql.conf").open("a") as config:
            config.write(
                f"listen_addresses = '{self.host}'\nport = {self.port}\n"
                f"unix_socket_directories = ''\nfsync = {'on' if fsync else 'off'}\n"
                "max_connections = 50\n"
            )

    def _ready(self) -> bool:
        with contextlib.suppress(OSError, IndexError):  # no file, or nothing in it yet
            lines = (self._data / "postmaster.pid").read_text().split()
            return (
                self._process is not None
                and lines[0] == str(self._process.pid)
                and lines[-1] == "ready"
            )
        return False


def _postgres_programs() -> Path:
    """The folder with initdb and postgres, which Debian keeps out of PATH; the newest one."""
    folders = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: -float(folder.parent.name)
    )
    if config := shutil.which("pg_config"):
        folders.append(Path(_output(config, "--bindir").strip()))
    if initdb := shutil.which("initdb"):
        folders.append(Path(initdb).resolve().parent)
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise ServerMissingError("PostgreSQL's server", "postgresql")
