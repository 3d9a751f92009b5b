"""A home folder for tests: config.xml, keys, extracts on the server, runs and what they leave.

A table `iep` stands for the SIS. Its rows are what the query exports; on PostgreSQL and SQL Server
procedures change it, on SQLite statements do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sgsync
from support import servers

SCRIPT = Path(sgsync.__file__).resolve()
HEADER = "studentNumber,startDate,status,manager"
Row = tuple[str, ...]

TABLE = (
    "CREATE TABLE iep (studentNumber varchar(20) NOT NULL, startDate varchar(10) NOT NULL, "
    "status varchar(20), manager varchar(200), PRIMARY KEY (studentNumber, startDate))"
)
ORDER = {
    "sqlite": "studentNumber, startDate",
    "postgresql": 'studentNumber COLLATE "C", startDate COLLATE "C"',
    "mssql": "studentNumber COLLATE Latin1_General_BIN2, startDate COLLATE Latin1_General_BIN2",
}
QUERY = (
    'SELECT studentNumber AS "studentNumber", startDate AS "startDate", status AS "status", '
    'manager AS "manager" FROM iep ORDER BY {order}'
)
PROCEDURES = {
    "postgresql": [
        """CREATE PROCEDURE sg_iep_upsert(n text, d text, s text, m text) LANGUAGE plpgsql AS $$
        BEGIN
            IF s = 'BAD' THEN RAISE EXCEPTION 'student %: bad status', n; END IF;
            UPDATE iep SET status = s, manager = m WHERE studentNumber = n AND startDate = d;
            IF NOT FOUND THEN INSERT INTO iep VALUES (n, d, s, m); END IF;
        END $$""",
        """CREATE PROCEDURE sg_iep_delete(n text, d text) LANGUAGE sql AS $$
        DELETE FROM iep WHERE studentNumber = n AND startDate = d $$""",
    ],
    "mssql": [
        """CREATE PROCEDURE sg_iep_upsert @n nvarchar(20), @d nvarchar(10), @s nvarchar(20),
            @m nvarchar(200) AS
        SET NOCOUNT ON;
        IF @s = 'BAD' BEGIN RAISERROR('student %s: bad status', 16, 1, @n); RETURN; END;
        UPDATE iep SET status = @s, manager = @m WHERE studentNumber = @n AND startDate = @d;
        IF @@ROWCOUNT = 0 INSERT INTO iep VALUES (@n, @d, @s, @m);""",
        """CREATE PROCEDURE sg_iep_delete @n nvarchar(20), @d nvarchar(10) AS
        SET NOCOUNT ON; DELETE FROM iep WHERE studentNumber = @n AND startDate = @d;""",
    ],
    "sqlite": [
        "CREATE TRIGGER bad BEFORE INSERT ON iep WHEN NEW.status = 'BAD' "
        "BEGIN SELECT RAISE(ABORT, 'bad status'); END",
    ],
}
CALLS = """
      <Insert procedure="sg_iep_upsert"/>
      <Update procedure="sg_iep_upsert"/>
      <Delete procedure="sg_iep_delete"/>"""
STATEMENTS = """
      <Insert parameters="studentNumber,startDate,status,manager">
        INSERT OR REPLACE INTO iep VALUES (?, ?, ?, ?)</Insert>
      <Update parameters="status,manager,studentNumber,startDate">
        UPDATE iep SET status = ?, manager = ? WHERE studentNumber = ? AND startDate = ?</Update>
      <Delete parameters="studentNumber,startDate">
        DELETE FROM iep WHERE studentNumber = ? AND startDate = ?</Delete>"""
CONFIG = """<?xml version="1.0" encoding="UTF-8"?>
<Config>
  <SFTP host="{host}" port="{port}" username="{username}" privateKey="ssh/id_rsa"
        downloadDirectory="{root}/download" uploadDirectory="{root}/upload" {sftp}/>
  <Database connectionString="{connection}" {database}/>
  <Limits maxDeletes="100%" maxUpdates="100%" {limits}/>
  {history}
  <Download>
    <SQLDiff file="iep.csv" key="studentNumber,startDate" {diff}>
      <Query><![CDATA[{query}]]></Query>{calls}
    </SQLDiff>
    {more}
  </Download>
  <Upload>{upload}</Upload>
</Config>
"""


def csv_text(rows: Sequence[Row], header: str = HEADER) -> str:
    return "".join(",".join(row) + "\r\n" for row in [tuple(header.split(",")), *rows])


class Runs:
    """The runs that a home keeps, and what the newest of them tells."""

    path: Path
    kept = "history"

    def runs(self) -> list[Path]:
        """The folders of all runs, oldest first."""
        history = self.path / self.kept
        found = history.iterdir() if history.is_dir() else ()
        return sorted(path for path in found if sgsync.EPOCH.fullmatch(path.name))

    @property
    def run(self) -> Path:
        return self.runs()[-1]

    @property
    def log(self) -> str:
        return (self.run / "sgi_log.txt").read_text(encoding="utf-8")

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.run / "summary.json").read_text(encoding="utf-8"))

    def message(self, code: int) -> str:
        """Message and remedy of a run that failed with this exit code; its log must have both."""
        summary = self.summary
        assert summary["exit_code"] == code
        shown = f"{summary['outcome']}: {summary['message']}".replace("\n", "\n    ")
        assert f" ERROR   {shown} ({summary['seconds']:.1f} s, folder {self.run})" in self.log
        if not summary["remedy"]:
            return str(summary["message"])
        assert "    Try: " + summary["remedy"].replace("\n", "\n    ") in self.log
        return f"{summary['message']}\nTry: {summary['remedy']}"

    def counts(self, what: str = "found") -> tuple[int, ...]:
        """Rows to insert, update, delete, of the first file: found, applied or failed."""
        line = self.summary["files"][0]
        return tuple(line[operation][what] for operation in ("insert", "update", "delete"))


class Home(Runs):
    """One district: its folder, its part of the SFTP server, its database."""

    def __init__(
        self, path: Path, sshd: servers.Sshd, sftp_root: Path, database: servers.Database
    ) -> None:
        self.path, self.sshd, self.sftp_root, self.database = path, sshd, sftp_root, database
        (path / "ssh").mkdir(parents=True)
        self.known_hosts(sshd.known_hosts)
        self.private_key("ed25519")  # the quickest
        with database.connect() as connection:
            for statement in [TABLE, *PROCEDURES[database.kind]]:
                connection.execute(statement)
        self.values: dict[str, str] = {
            "host": sshd.host,
            "port": str(sshd.port),
            "username": sshd.username,
            "root": sftp_root.as_posix(),
            "connection": database.connection_string.replace("&", "&amp;").replace('"', "&quot;"),
            "query": QUERY.format(order=ORDER[database.kind]),
            "calls": STATEMENTS if database.kind == "sqlite" else CALLS,
        }
        for name in ("sftp", "database", "limits", "history", "diff", "more", "upload"):
            self.values[name] = ""
        self.configure()

    def configure(self, **values: str) -> None:
        """Write config.xml anew, with these parts of CONFIG changed for good."""
        self.values |= values
        text = CONFIG.format(**self.values)
        path = self.path / "config.xml"
        path.write_text(text, encoding="utf-8")
        path.chmod(0o600)

    def line(self, text: str) -> int:
        """The line of config.xml that first contains `text`."""
        lines = (self.path / "config.xml").read_text(encoding="utf-8").splitlines()
        return next(number for number, line in enumerate(lines, 1) if text in line)

    def known_hosts(self, text: str) -> None:
        (self.path / "ssh/known_hosts").write_text(text, encoding="ascii")

    def private_key(self, name: str) -> None:
        target = self.path / "ssh/id_rsa"
        target.write_bytes(self.sshd.keys[name].read_bytes())
        target.chmod(0o600)

    def extract(
        self,
        rows: Sequence[Row] = (),
        *,
        epoch: str = "20260101-139029",
        files: Mapping[str, str | bytes] | None = None,
        complete: bool = True,
    ) -> Path:
        """Put an extract on the server: `rows` as iep.csv, or `files` as they are."""
        folder = self.sftp_root / "download" / epoch
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (files if files is not None else {"iep.csv": csv_text(rows)}).items():
            data = content.encode("utf-8") if isinstance(content, str) else content
            (folder / name).write_bytes(data)
        if complete:
            (folder / "COMPLETE").touch()
        return folder

    def sis(self, rows: Sequence[Row]) -> None:
        """Make these the rows of the SIS."""
        self.database.execute("DELETE FROM iep")
        if rows:
            self.database.insert("iep", [tuple(value or None for value in row) for row in rows])

    def sis_rows(self) -> list[Row]:
        found = self.database.rows("SELECT studentNumber, startDate, status, manager FROM iep")
        return sorted(tuple("" if value is None else value for value in row) for row in found)

    def main(self, *argv: str) -> int:
        """Run sgsync in this process."""
        return sgsync.main([*(argv or ("sync",)), "--home", str(self.path)])

    def process(
        self, *argv: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run sgsync as a process of its own."""
        return subprocess.run(
            [sys.executable, str(SCRIPT), *(argv or ("sync",)), "--home", str(self.path)],
            capture_output=True, encoding="utf-8", timeout=110, check=False,
            stdin=subprocess.DEVNULL, cwd=cwd, env={**os.environ, **(env or {})},
        )  # fmt: skip

    def approval(self, epoch: str) -> str:
        """The command that a held run names; root needs no sudo."""
        words = [sys.executable, str(SCRIPT), "sync", "--approve", epoch, "--home", str(self.path)]
        return sgsync.command_line(words)

    def failed(self, code: int, *argv: str) -> str:
        """A run that must end with this exit code; returns its message.

        Whatever the reason: log and summary tell it, no COMPLETE stands anywhere, and no file is
        left half-written.
        """
        assert self.main(*argv) == code, self.log
        message = self.message(code)
        assert not [*self.path.rglob("COMPLETE"), *(self.sftp_root / "upload").rglob("COMPLETE")]
        assert not list(self.path.rglob("*.part"))
        return message

    def refused(self, code: int, *argv: str) -> str:
        """The same for a run that must write nothing: the database is as it was, nothing pushed."""
        before = self.sis_rows()
        message = self.failed(code, *argv)
        assert self.sis_rows() == before
        assert not list((self.sftp_root / "upload").iterdir())
        return message

    def pushed(self) -> dict[str, bytes]:
        """What the newest run left on the server: relative path -> content."""
        folder = self.sftp_root / "upload" / self.run.name
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
