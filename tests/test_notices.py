"""<Notify>: pings and messages, sent to real servers on this machine."""

from __future__ import annotations

import base64
import http.server
import json
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from email import message_from_bytes
from typing import Any

import pytest
from aiosmtpd.controller import Controller

import sgsync
from support import homes

PASSWORD = "p@:/%# x"


class Server(http.server.ThreadingHTTPServer):
    """Keeps what was asked of it: path, body, and the user's password."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str]] = []
        self.logins: list[str | None] = []
        self.status = 200
        self.silent = threading.Event()

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.asked.append((self.path, body))
        self.server.logins.append(self.headers["Authorization"])
        if self.server.silent.is_set():
            return
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


ROWS = [(f"{n}", "2026-01-05", "LOCKED", "Ann Private") for n in range(1001, 1004)]


def notify(home: homes.Home, *elements: str, **values: str) -> None:
    home.configure(history="".join(f"<Notify {element}/>" for element in elements), **values)


def test_ping_tells_start_and_exit_code(sqlite_home: homes.Home, server: Server) -> None:
    home = sqlite_home
    notify(home, f'ping="http://{server.url}/uuid/"')
    home.extract(ROWS)
    assert home.main() == 0
    (start, _), (end, body) = server.asked
    assert (start, end) == ("/uuid/start", "/uuid/0")
    assert body.splitlines() == [
        "complete (exit code 0: success)",
        "iep.csv: insert 3 of 3, 0 failed",
        f"{home.summary['computer']}: {home.run}",
    ]
    home.configure(query="nonsense")
    assert home.main() == 4
    assert server.asked[-1][0] == "/uuid/4"
    assert home.main("--dry-run") == 4
    assert len(server.asked) == 4  # a dry run is told to nobody


def messages(server: Server) -> list[tuple[str, str]]:
    return [(found["title"], found["message"]) for found in
            (json.loads(body) for _, body in server.asked)]  # fmt: skip


def test_message_tells_a_failure_without_keys_or_values(
    sqlite_home: homes.Home, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = sqlite_home
    monkeypatch.setenv(
        "NOTIFY_URL", f"json://me:{urllib.parse.quote(PASSWORD, safe='')}@{server.url}/x"
    )
    notify(home, 'url="${env:NOTIFY_URL}"', diff='maxDeletes="0"')
    home.extract(ROWS[:2])
    home.sis(ROWS)
    assert home.main() == 6
    ((title, body),) = messages(server)
    assert title == f"sgsync sync: held on {home.summary['computer']}"
    assert body.splitlines() == [
        "held (exit code 6: held by a limit)",
        "iep.csv: 1 delete of 3 rows, maxDeletes is 0",
        "iep.csv: delete 0 of 1, 0 failed",
        f"Try: look at {home.run / 'diff'}; if the changes are right, approve just these:",
        home.approval(home.run.name),
        f"{home.summary['computer']}: {home.run}",
    ]
    assert "1003" not in body.replace(home.run.name, "")
    login = base64.b64decode(str(server.logins[0]).removeprefix("Basic ")).decode()
    assert login == f"me:{PASSWORD}"
    assert PASSWORD not in home.log
    assert server.url not in home.log
    assert home.main("sync", "--approve", home.run.name) == 0
    assert len(server.asked) == 1  # on="failure" says nothing of a success


@pytest.mark.parametrize(
    ("on", "told"), [("failure", [4, 6]), ("held", [6]), ("always", [0, 4, 6])]
)
def test_message_is_sent_for_the_outcomes_that_are_wanted(
    server: Server, tmp_path: Any, on: str, told: list[int]
) -> None:
    notice = sgsync.Notice(on=on, url=f"json://{server.url}")
    for outcome, code in (("complete", 0), ("failed", 4), ("held", 6)):
        summary = sgsync.RunSummary("sync", outcome=outcome, exit_code=code)
        sgsync.send_notices([notice], summary, tmp_path)
    assert [body.split("exit code ")[1][0] for _, body in messages(server)] == list(map(str, told))


def test_notice_that_cannot_be_sent_changes_nothing(
    sqlite_home: homes.Home, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = sqlite_home
    monkeypatch.setattr(sgsync, "NOTICE_SECONDS", 0.5)
    home.extract(ROWS)
    server.status = 500
    notify(home, f'ping="http://{server.url}/s3cret" url="json://{server.url}/s3cret" on="always"')
    assert home.main() == 0
    assert "WARNING a notice could not be sent: the ping was refused: 500" in home.log
    assert "WARNING a notice could not be sent: the server did not take the message" in home.log
    notify(home, 'ping="http://127.0.0.1:9/s3cret"')
    assert home.main() == 0
    assert "WARNING a notice could not be sent: the ping failed: " in home.log
    assert "s3cret" not in home.log
    notify(home, 'url="nonsense://s3cret" on="always"')
    assert home.main() == 0
    assert "is not an address that apprise knows" in home.log


def test_run_that_was_killed_is_told_by_the_next(sqlite_home: homes.Home, server: Server) -> None:
    home = sqlite_home
    notify(home, f'url="json://{server.url}"')
    killed = sgsync.Run(home.path / "history", "sync", [])
    home.extract(ROWS)
    assert home.main() == 0
    ((title, body),) = messages(server)
    assert title.startswith("sgsync sync: killed on ")
    assert body.splitlines()[0] == "killed (exit code 1: unexpected error, or this computer's disk)"
    assert str(killed.folder) in body


def test_second_run_is_told(sqlite_home: homes.Home, server: Server) -> None:
    home = sqlite_home
    notify(home, f'ping="http://{server.url}"')
    run = sgsync.Run(home.path / "history", "sync", [])
    with sgsync.only_run(run, "sync"):
        assert home.main() == 7
    assert [path for path, _ in server.asked] == ["/7"]


def test_message_arrives_as_mail(tmp_path: Any) -> None:
    mails: list[bytes] = []

    class Box:
        async def handle_DATA(self, _: object, __: object, envelope: Any) -> str:  # noqa: N802
            mails.append(envelope.content)
            return "250 OK"

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    controller = Controller(Box(), hostname="127.0.0.1", port=port)
    controller.start()
    try:
        url = f"mailto://127.0.0.1:{port}?mode=insecure&from=job@district.example&to=it@d.example"
        summary = sgsync.RunSummary("sync", outcome="failed", exit_code=3, message="no answer")
        sgsync.send_notices([sgsync.Notice(url=url)], summary, tmp_path)
    finally:
        controller.stop()
    (mail,) = map(message_from_bytes, mails)
    assert "failed on" in str(mail["Subject"])
    payload = next(part for part in mail.walk() if part.get_content_type() == "text/plain")
    text = payload.get_payload(decode=True)
    assert isinstance(text, bytes)
    assert b"no answer" in text
