"""Attackers and broken peers: what servers, files and people send must not steer what sgsync does.

Host keys, names, links, sizes and broken transfers are tested in test_sftp.py, CSV in test_csv.py,
XML in test_config.py, passwords and personal data in test_secrets.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import shlex
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncssh
import asyncssh.sftp
import pytest

import sgsync
from support import homes, servers
from test_sftp import OtherServer, session

pytestmark = pytest.mark.usefixtures("short_pauses")

ROWS = [("1001", "2026-01-05", "LOCKED", "Ann"), ("1002", "2026-01-06", "LOCKED", "Bob")]


@pytest.fixture
def home(sqlite_home: homes.Home) -> homes.Home:
    """A home with an extract of two rows; where nothing stops it, a run exits with 0."""
    sqlite_home.extract(ROWS)
    return sqlite_home


@pytest.fixture
def serve(home: homes.Home) -> Iterator[Callable[[type[asyncssh.SFTPServer]], OtherServer]]:
    """Puts a server of that class in front of the same files, and the home in front of it."""
    with contextlib.ExitStack() as stack:

        def start(handler: type[asyncssh.SFTPServer]) -> OtherServer:
            return stack.enter_context(contextlib.closing(OtherServer(home, sftp_factory=handler)))

        yield start


# ------------------------------------------------------------------ forged lines, terminal escapes

# A line break and a line as the log has them; then clear the screen, set the title, write from
# right to left, and the same in the one-byte codes that some terminals obey.
FORGED = "\r\n2026-01-01 00:00:00,000 all is well\x1b[2J\x1b]0;owned\x07\u202e\x9b31m\u2028\x85"
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}[-+]\d\d:\d\d (?!all is well)|    ")


def told(home: homes.Home, capfd: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    """A run that ends with this code; everything that it says is in order.  Returns its log."""
    assert home.main(*argv, "--verbose", "--json") == code
    out, err = capfd.readouterr()
    texts = {"stdout": out, "stderr": err, "log": home.log}
    for name in ("HELD", "failures.csv", "notconverged.csv", "summary.json"):
        if (home.run / name).is_file():
            texts[name] = (home.run / name).read_bytes().decode().replace("\r\n", "\n")
    for name, text in texts.items():
        odd = {character for character in text if not character.isprintable()} - {"\n"}
        assert not odd, (name, odd)
    for line in f"{err}{home.log}".splitlines():
        assert LOG_LINE.match(line), line
    assert json.loads(out)["exit_code"] == code
    assert "\\x1b[2J" in home.log, home.log  # it was told, but harmlessly
    return home.log


def procedure(home: homes.Home, body: str) -> None:
    home.database.execute(
        "CREATE OR REPLACE PROCEDURE sg_iep_upsert(n text, d text, s text, m text) "
        f"LANGUAGE plpgsql AS $$ BEGIN {body} END $$"
    )


def test_keys_of_failed_rows_forge_nothing(
    postgres_home: homes.Home, capfd: pytest.CaptureFixture[str]
) -> None:
    postgres_home.extract([(f'"1001{FORGED}"', "2026-01-05", "BAD", "Ann")])
    told(postgres_home, capfd, 8)


def test_messages_of_procedures_forge_nothing(
    postgres_home: homes.Home, capfd: pytest.CaptureFixture[str]
) -> None:
    quoted = FORGED.replace("'", "''")
    procedure(postgres_home, f"RAISE WARNING '{quoted}'; RAISE EXCEPTION '{quoted}';")
    postgres_home.extract(ROWS)
    told(postgres_home, capfd, 8)


def test_errors_of_queries_forge_nothing(
    postgres_home: homes.Home, capfd: pytest.CaptureFixture[str]
) -> None:
    postgres_home.database.execute(
        "CREATE FUNCTION angry() RETURNS text LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{FORGED}'; END $$"
    )
    postgres_home.configure(query="SELECT angry()")
    postgres_home.extract(ROWS)
    told(postgres_home, capfd, 4)


@pytest.mark.parametrize("side", ["source", "query"])
def test_names_of_columns_forge_nothing(
    postgres_home: homes.Home, capfd: pytest.CaptureFixture[str], side: str
) -> None:
    home = postgres_home
    name = "status\x1b[2J\n2026-01-01 00:00:00,000 all is well"
    if side == "query":
        home.database.execute(
            'CREATE VIEW odd AS SELECT studentNumber AS "studentNumber", startDate AS '
            f'"startDate", status AS "{name}", manager AS manager FROM iep'
        )
        home.configure(query="SELECT * FROM odd")
        home.extract(ROWS)
    else:
        home.extract(files={"iep.csv": f'studentNumber,startDate,"{name}",manager\r\n'})
        home.sis(ROWS)
    told(home, capfd, 5)


@pytest.mark.parametrize("rows", [[1, 1], [2, 1]], ids=["twice", "unsorted"])
def test_keys_of_bad_files_forge_nothing(
    home: homes.Home, capfd: pytest.CaptureFixture[str], rows: list[int]
) -> None:
    home.extract([(f'"{n}{FORGED}"', "2026-01-05", "LOCKED", "Ann") for n in rows])
    told(home, capfd, 5)


def test_keys_of_held_changes_forge_nothing(
    home: homes.Home, capfd: pytest.CaptureFixture[str]
) -> None:
    home.configure(diff='maxDeletes="0"')
    home.sis([*ROWS, (f"1003{FORGED}", "2026-01-05", "LOCKED", "Ann")])
    told(home, capfd, 6)


def test_names_of_files_forge_nothing(home: homes.Home, capfd: pytest.CaptureFixture[str]) -> None:
    name = FORGED.replace("/", "")
    (home.sftp_root / "download/20260101-139029" / f"{name}.csv").touch()
    told(home, capfd, 3)


def test_names_on_the_command_line_forge_nothing(
    home: homes.Home, capfd: pytest.CaptureFixture[str]
) -> None:
    told(home, capfd, 2, "sync", "--approve", f"2026{FORGED}")


def test_errors_of_the_sftp_server_forge_nothing(
    home: homes.Home, capfd: pytest.CaptureFixture[str], serve: Callable[..., OtherServer]
) -> None:
    class Angry(asyncssh.SFTPServer):
        def open(self, *_: Any) -> object:
            raise asyncssh.SFTPFailure(FORGED)

    serve(Angry)
    told(home, capfd, 3)


@pytest.mark.parametrize(
    "greeting",
    [
        f"SSH-1.5-{FORGED}",
        f"SSH-2.0-{FORGED}",
        f"{FORGED}\r\n" * 3 + "SSH-9.9-\x1b[2J\r\n",
    ],
)
def test_greetings_of_the_server_forge_nothing(
    home: homes.Home, capfd: pytest.CaptureFixture[str], greeting: str
) -> None:
    def answer(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = listener.accept()[0]
                client.sendall(greeting.encode("utf-8") + b"\r\n" + b"\0\0\0\x0c\x06\x02" * 9)
                client.close()

    with socket.create_server((servers.HOST, 0)) as listener:
        port = listener.getsockname()[1]
        home.known_hosts(home.sshd.known_hosts.replace(str(home.sshd.port), str(port)))
        home.configure(port=str(port))
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        assert home.main("--verbose") == 3
        listener.shutdown(socket.SHUT_RDWR)
    text = capfd.readouterr().err + home.log
    assert not {c for c in text if not c.isprintable()} - {"\n"}
    assert not [line for line in text.splitlines() if not LOG_LINE.match(line)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Zoë 中文 😀 'x'", "plain, Zoë 中文 😀 'x'"),
        ("a\r\nb\tc", "a  b\\x09c"),
        ("\x1b[31m\x9b\x7f", "\\x1b[31m\\x9b\\x7f"),
        ("\u202eabc\u2066\u2028\ufeff\u200b", "\\u202eabc\\u2066\\u2028\\ufeff\\u200b"),
        ("\ud800", "\\ud800"),
        (" x ", "x"),
    ],
)
def test_one_line_shows_what_is_not_seen(text: str, shown: str) -> None:
    assert sgsync.one_line(text) == shown


# ------------------------------------------------------------------ servers that never end


def test_listing_of_an_endless_directory_ends(
    home: homes.Home, serve: Callable[..., OtherServer]
) -> None:
    class Endless(asyncssh.SFTPServer):
        async def scandir(self, _path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
            for number in itertools.count():
                yield asyncssh.SFTPName(b"%d" % number)

    serve(Endless)
    with session(home) as sftp, pytest.raises(sgsync.TransferError) as caught:
        sftp.listing("/anything")
    assert caught.value.message.endswith("/anything: has more than 10,000 entries")


@pytest.mark.parametrize("names", [[], [asyncssh.SFTPName(b".")]], ids=["nothing", "dots"])
def test_listing_without_progress_ends(
    home: homes.Home,
    serve: Callable[..., OtherServer],
    monkeypatch: pytest.MonkeyPatch,
    names: list[asyncssh.SFTPName],
) -> None:
    """Each answer comes at once, but none brings a name, and none says that it is the last."""

    async def answer(*_: object) -> tuple[list[asyncssh.SFTPName], bool]:
        return names, False

    handlers = asyncssh.sftp.SFTPServerHandler._packet_handlers
    monkeypatch.setitem(handlers, asyncssh.sftp.FXP_READDIR, answer)
    serve(asyncssh.SFTPServer)
    with session(home, timeout_seconds=0.5) as sftp, pytest.raises(sgsync.TransferError) as caught:
        sftp.listing("/")
    assert caught.value.message.endswith("/: cannot be listed: no answer for 0.5 s")


def test_listing_that_drips_ends(home: homes.Home, serve: Callable[..., OtherServer]) -> None:
    """A name now and then is no reason to wait for ever."""

    class Slow(asyncssh.SFTPServer):
        async def scandir(self, _path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
            for number in itertools.count():
                await asyncio.sleep(0.1)
                yield asyncssh.SFTPName(b"%d" % number)

    monkey = pytest.MonkeyPatch()
    monkey.setattr(asyncssh.sftp, "_MAX_READDIR_NAMES", 1)
    try:
        serve(Slow)
        with session(home, timeout_seconds=0.5) as sftp, pytest.raises(sgsync.TransferError):
            sftp.listing("/")
    finally:
        monkey.undo()


def test_read_keeps_no_absurd_size_in_memory(
    home: homes.Home, serve: Callable[..., OtherServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A size that this disk could hold: reading ahead would keep millions of requests."""

    class Boastful(asyncssh.SFTPServer):
        async def scandir(self, path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
            async for entry in super().scandir(path):
                if entry.filename == b"iep.csv":
                    entry.attrs.size = 1 << 45
                yield entry

    def disk_usage(_: object) -> object:
        return type("Usage", (), {"free": 1 << 60})

    monkeypatch.setattr(sgsync.shutil, "disk_usage", disk_usage)
    serve(Boastful)
    assert "the file is shorter than its listed size, 35,184,372,088,832 bytes" in home.refused(3)


# ------------------------------------------------------------------ config.xml of a stranger


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<Config>" + "<a>" * 100_000, "not well-formed XML"),
        ("<Config>" + "<a>" * 200 + "</a>" * 200 + "</Config>", "<a>: unknown element in"),
        (f'<Config><SFTP host="{"h" * 9_000_000}"/></Config>', "<SFTP>: has no attribute"),
        (f'<Config><SFTP {"h" * 9_000_000}="1"/></Config>', "config.xml:1: "),
        (f"<Config><{'h' * 40_000}/></Config>", "unknown element in <Config>"),
        ("<Config>" + "<SQLDiff/>" * 300_000 + "</Config>", "unknown element in <Config>"),
        ("<Config>" + "<!-- x -->" * 300_000 + "</Config>", "has no <SFTP> element"),
        ("<Config " + " ".join(f'a{n}="1"' for n in range(20_000)) + "/>", "unknown attribute"),
    ],
    ids=["open", "deep", "value", "name", "element", "many", "comments", "attributes"],
)
def test_load_config_of_any_shape_ends_soon(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "config.xml"
    path.write_text(text)
    with pytest.raises(sgsync.ConfigError) as caught:
        sgsync.load_config(path, sgsync.SyncConfig)
    assert reason in str(caught.value)
    assert str(caught.value).count("\nTry: ") <= sgsync.CONFIG_ERRORS
    assert len(str(caught.value)) < 100_000


# ------------------------------------------------------------------ SQL in data

BOBBY = [
    "1'); DROP TABLE iep; --",
    '2"); DROP TABLE iep; --',
    "3\\'); DROP--",
    "4$$; DROP TABLE x;",
    "5{CALL sg_cleanup()}",
    "6? :x $1 %s {0} @n",
    "7\x00"[:1] + "/* -- */",
]


@pytest.mark.parametrize("operation", ["insert", "update", "delete"])
def test_sql_in_keys_and_values_is_data(home: homes.Home, operation: str) -> None:
    _sql_is_data(home, operation)


@pytest.mark.parametrize("operation", ["insert", "update", "delete"])
def test_sql_in_keys_and_values_is_data_for_procedures(
    postgres_home: homes.Home, operation: str
) -> None:
    _sql_is_data(postgres_home, operation)


def _sql_is_data(home: homes.Home, operation: str) -> None:
    home.database.execute("CREATE TABLE witness (id varchar(9))")
    home.configure(upload='<SQL file="open.csv">SELECT COUNT(*) AS "n" FROM witness</SQL>')
    rows = sorted((key[:20], "2026-01-05", key[:20], f"{key} x") for key in BOBBY)
    if operation != "insert":
        home.sis([(*row[:2], "old", "old") for row in rows])
    if operation == "delete":
        home.sis([*rows, *ROWS])
        rows = ROWS
    home.extract([tuple('"' + value.replace('"', '""') + '"' for value in row) for row in rows])
    assert home.main() == 0, home.log
    assert home.sis_rows() == sorted(rows)
    assert home.counts("failed") == (0, 0, 0)


# ------------------------------------------------------------------ files that others can read


@pytest.mark.parametrize("name", ["config.xml", "ssh/id_rsa", "ssh/phrase"])
def test_sync_warns_of_secrets_that_others_can_read(home: homes.Home, name: str) -> None:
    home.configure(sftp='passphrase="${file:ssh/phrase}"')
    (home.path / "ssh/phrase").write_text("not needed", encoding="utf-8")
    for path in (home.path / "config.xml", home.path / "ssh/id_rsa", home.path / "ssh/phrase"):
        path.chmod(0o600)
    assert home.main() == 0
    assert "can read this file" not in home.log
    path = home.path / name
    path.chmod(0o604)
    assert home.main() == 0
    told = f"{path}: everyone on this machine can read this file\n    Try: let only this account"
    assert told in home.log
    for command in re.findall(r"(?m)^    (ch(?:own|mod) .*)$", home.log):
        subprocess.run(shlex.split(command), check=True)
    assert path.stat().st_mode & 0o777 == 0o600
    assert home.main() == 0
    assert "can read this file" not in home.log
