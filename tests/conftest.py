"""Fixtures: real servers for the whole session, fresh folders and databases for each test.

| fixture | gives |
|---|---|
| `sshd_server` | `servers.Sshd`, one for the session |
| `sftp_root` | a fresh folder on it, with `download/` and `upload/` inside |
| `postgres_server` | `servers.Postgres`, one for the session, without fsync |
| `postgres`, `sqlite`, `mssql` | `servers.Database`, fresh and empty |
| `database` | each of these three in turn |

A server that is not installed is an error, not a skip. Only SQL Server is optional, since nobody
can install it with apt-get: `mssql` needs SGSYNC_TEST_MSSQL, an ODBC connection string whose login
may create databases. A test may stop a server: the fixtures start it again for the next one.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import sgsync
from support import homes, servers

settings.register_profile("sgsync", deadline=None, print_blob=True)
settings.load_profile("sgsync")

# sgsync's processes start as a user's do: unbuffered streams hide what a last flush comes to
os.environ.pop("PYTHONUNBUFFERED", None)


def pytest_configure() -> None:
    # ended from outside (a CI's time limit), the run still closes its fixtures; started in the
    # background, where a shell ignores SIGINT, it must not have its processes ignore it, too
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)


# ------------------------------------------------------------------ servers


def skip_on_windows() -> None:
    if os.name == "nt":
        pytest.skip("these servers run on Linux only")


@pytest.fixture(scope="session")
def sshd_server() -> Iterator[servers.Sshd]:
    skip_on_windows()
    with servers.Sshd() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[servers.Postgres]:
    skip_on_windows()
    with servers.Postgres(fsync=False) as server:
        yield server


@pytest.fixture
def sftp_root(sshd_server: servers.Sshd) -> Iterator[Path]:
    sshd_server.start()
    folder = sshd_server.root / servers.fresh_name()
    for name in ("download", "upload"):
        (folder / name).mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


# ------------------------------------------------------------------ databases


@pytest.fixture
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> servers.Database:
    skip_on_windows()
    path = tmp_path_factory.mktemp("sqlite") / "database.sqlite"
    return servers.Database("sqlite", servers.sqlite_connection_string(path))


@pytest.fixture(scope="session")
def postgres_database(postgres_server: servers.Postgres) -> str:
    """The connection string of the one database that all tests use: making one takes a while."""
    return postgres_server.create_database(servers.fresh_name())


EMPTY = """DO $$ DECLARE name text; BEGIN
    PERFORM pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid();
    FOR name IN SELECT nspname FROM pg_namespace
        WHERE nspname <> 'information_schema' AND nspname !~ '^pg_'
        LOOP EXECUTE format('DROP SCHEMA %I CASCADE', name); END LOOP;
    CREATE SCHEMA public;
    GRANT USAGE ON SCHEMA public TO PUBLIC;
END $$"""


@pytest.fixture
def postgres(postgres_server: servers.Postgres, postgres_database: str) -> servers.Database:
    postgres_server.start()
    database = servers.Database("postgresql", postgres_database)
    database.execute(EMPTY)
    return database


@pytest.fixture
def mssql() -> Iterator[servers.Database]:
    server = os.environ.get("SGSYNC_TEST_MSSQL")
    if not server:
        pytest.skip("SGSYNC_TEST_MSSQL (a connection string) is not set")
    with servers.mssql_database(server) as database:
        yield database


@pytest.fixture(params=["sqlite", "postgres", "mssql"])
def database(request: pytest.FixtureRequest) -> servers.Database:
    return request.getfixturevalue(request.param)


# ------------------------------------------------------------------ homes


@pytest.fixture(autouse=True)
def own_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test keeps secret, another may say."""
    monkeypatch.setattr(sgsync, "_SECRETS", set())


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again at once."""
    monkeypatch.setattr(sgsync, "RETRY_SECONDS", 0.01)


@pytest.fixture
def no_sftp(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the database: files are copied, since SFTP takes most of the time of a run."""

    def download(_: object, settings: sgsync.SftpSettings, folder: Path, *__: object) -> Any:
        newest = max(Path(settings.download_directory).iterdir())
        shutil.copytree(newest, folder, ignore=shutil.ignore_patterns("COMPLETE"))
        return sgsync.Extract(newest.name, newest.stat().st_mtime, ())

    def push(_: object, upload_directory: str, folder: Path, *__: object) -> None:
        target = Path(upload_directory) / folder.name
        shutil.copytree(folder, target)
        (target / "COMPLETE").touch()

    monkeypatch.setattr(sgsync, "download", download)
    monkeypatch.setattr(sgsync, "push", push)


@pytest.fixture
def home(
    tmp_path: Path, sshd_server: servers.Sshd, sftp_root: Path, database: servers.Database
) -> homes.Home:
    """A home in front of each database in turn."""
    return homes.Home(tmp_path / "home", sshd_server, sftp_root, database)


@pytest.fixture
def sqlite_home(
    tmp_path: Path, sshd_server: servers.Sshd, sftp_root: Path, sqlite: servers.Database
) -> homes.Home:
    return homes.Home(tmp_path / "home", sshd_server, sftp_root, sqlite)


@pytest.fixture
def postgres_home(
    tmp_path: Path, sshd_server: servers.Sshd, sftp_root: Path, postgres: servers.Database
) -> homes.Home:
    return homes.Home(tmp_path / "home", sshd_server, sftp_root, postgres)
