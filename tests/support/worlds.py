"""Homes that a test may do its worst to, with the servers that they need.

A world is put back to a known state, the real program runs in it as a process, and the world tells
what was lost, what came twice and what was left behind. See faults.py for what is done to them. No
pytest in here: scripts use this module too.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from support import homes, proxy, servers
from support.powerschool import DAY, STUDENT, PowerSchool

HUNG_SECONDS = 90.0  # Far beyond every time-out that the runs have.

# Time-outs as short as the rest of the configuration has them, memory small enough that sorting
# needs temporary files. With KILL_AT=n it kills itself before the nth change to its home's files.
RUNNER = """
import os, signal, sys
import sgsync
sgsync.CONNECT_SECONDS, sgsync.RETRY_SECONDS = 2.0, 0.1
sgsync.SORT_BYTES = sgsync.BLOCK_BYTES = 4096
left = int(os.environ.get("KILL_AT", "0"))
if "POWERSCHOOL_FILE" in os.environ:
    from support import powerschool
    sgsync.Oracle = powerschool.PowerSchool(os.environ["POWERSCHOOL_FILE"]).connection
home = sys.argv[sys.argv.index("--home") + 1]

def count(event, arguments):
    global left
    if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        return
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return
    if str(arguments[0]).startswith(home):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
code = sgsync.main(sys.argv[1:])
print("operations", -left, file=sys.stderr)
sys.exit(code)
"""


@dataclasses.dataclass
class Ended:
    """How a run ended."""

    code: int = 0
    seconds: float = 0.0
    hung: bool = False
    lines: list[str] = dataclasses.field(default_factory=list)

    @property
    def stage(self) -> str:
        """The stage in which the log breaks off."""
        text = "\n".join(self.lines)
        passed = (
            ("start", "logged in as|connected to"),
            ("download and export", r"sp\.csv: \d+ rows, of them"),
            ("apply", r"sp\.csv: \d+ of \d+ changes applied"),
            ("verify and statements", r"open_records\.csv: done"),
            ("push", r"pushed \d+ files"),
        )
        for stage, pattern in passed:
            if not re.search(pattern, text):
                return stage
        return "end"


class World:
    """One home behind proxies, run by the real program, and what must be there afterwards.

    path: the home folder
    proxies: in front of the servers that it uses; the first one is SFTP's
    environment: for the program, beside what this process has
    """

    command = ""
    learns = False  # whether only an undisturbed run tells what is right
    measured: Any = None  # what such a run looked like, once there was one

    def __init__(self, path: Path, *proxies: proxy.Proxy) -> None:
        self.path, self.proxies = path, proxies
        folders = homes.SCRIPT.parent, Path(__file__).parents[1]
        self.environment = {"PYTHONPATH": os.pathsep.join(map(str, folders))}

    def close(self) -> None:
        for each in self.proxies:
            each.close()

    def reset(self) -> None:
        """As before any run."""
        for each in self.proxies:
            each.reset()
        shutil.rmtree(self.path / "history", ignore_errors=True)

    def run(
        self,
        on_line: Callable[[int, subprocess.Popen[str]], None] | None = None,
        kill_after: float = 0,
        kill_at: int = 0,
    ) -> Ended:
        """One run of the program; `on_line` is told of each line of its log."""
        process = subprocess.Popen(
            [sys.executable, "-c", RUNNER, self.command, "--verbose", "--home", str(self.path)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, encoding="utf-8", errors="replace",
            env={**os.environ, **self.environment, "KILL_AT": str(kill_at)},
        )  # fmt: skip
        self.process = process
        ended = Ended()

        def hang_up() -> None:
            ended.hung = True
            process.kill()

        timers = [threading.Timer(HUNG_SECONDS, hang_up)]
        if kill_after:
            timers.append(threading.Timer(kill_after, process.kill))
        began = time.monotonic()
        for timer in timers:
            timer.daemon = True
            timer.start()
        assert process.stderr is not None
        for line in process.stderr:
            ended.lines.append(line.rstrip("\n"))
            if on_line:
                on_line(len(ended.lines), process)
        ended.code = process.wait()
        ended.seconds = time.monotonic() - began
        for timer in timers:
            timer.cancel()
        return ended

    def learn(self) -> None:
        """What an undisturbed run has left is right."""

    def halves(self) -> list[str]:
        """What a disturbed run may not leave at the other end, not even until the next one."""
        raise NotImplementedError

    def lost(self) -> int:
        """How much is missing after a run that ended with 0."""
        raise NotImplementedError

    def doubled(self) -> int:
        """How much is there too often or too much."""
        raise NotImplementedError

    def strange(self) -> list[str]:
        """What a run that ended with 0 must not leave; it left the newest folder."""
        raise NotImplementedError


# ------------------------------------------------------------------ sync

ROWS = 600  # of each table: as many to insert, to update and to delete as there are to stay
TABLES = ("iep", "etr", "sp")
SETUP = """
CREATE TABLE etr (id text PRIMARY KEY, done text, score text);
CREATE TABLE sp (student text, plan text);
CREATE TABLE effects (place text, operation text, key text);
CREATE TABLE cleaned (times text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'UPDATE' OR OLD IS DISTINCT FROM NEW THEN
        INSERT INTO effects SELECT TG_TABLE_NAME, TG_OP,
            (CASE WHEN TG_OP = 'DELETE' THEN to_jsonb(OLD) ELSE to_jsonb(NEW) END) ->> TG_ARGV[0];
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON iep
    FOR EACH ROW EXECUTE FUNCTION note('studentnumber');
CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON etr
    FOR EACH ROW EXECUTE FUNCTION note('id');
CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON sp
    FOR EACH ROW EXECUTE FUNCTION note('student');
CREATE PROCEDURE sg_sp_upsert(s text, p text) LANGUAGE plpgsql AS $$
BEGIN
    UPDATE sp SET plan = p WHERE student = s;
    IF NOT FOUND THEN INSERT INTO sp VALUES (s, p); END IF;
END $$;
CREATE PROCEDURE sg_sp_delete(s text) LANGUAGE sql AS $$ DELETE FROM sp WHERE student = s $$;
CREATE PROCEDURE sg_cleanup() LANGUAGE sql AS $$
    DELETE FROM cleaned; INSERT INTO cleaned VALUES ('once') $$;
"""
MORE = """
    <SQLDiff file="etr.csv" key="id:int" sort="true">
      <Query>SELECT id, done, score FROM etr</Query>
      <Insert parameters="id,done,score">INSERT INTO etr VALUES (?, ?, ?)
        ON CONFLICT (id) DO UPDATE SET done = excluded.done, score = excluded.score</Insert>
      <Update parameters="done,score,id">UPDATE etr SET done = ?, score = ? WHERE id = ?</Update>
      <Delete parameters="id">DELETE FROM etr WHERE id = ?</Delete>
    </SQLDiff>
    <SQLDiff file="sp.csv" key="student">
      <Query>SELECT student, plan FROM sp ORDER BY student COLLATE "C"</Query>
      <Insert procedure="sg_sp_upsert"/>
      <Update procedure="sg_sp_upsert"/>
      <Delete procedure="sg_sp_delete"/>
    </SQLDiff>"""
UPLOAD = """
    <SQL>{CALL sg_cleanup}</SQL>
    <SQL file="open_records.csv">SELECT student FROM sp ORDER BY student</SQL>"""
RESET = """
SET session_replication_role = replica;
TRUNCATE iep, etr, sp, effects, cleaned;
INSERT INTO iep SELECT * FROM iep_start;
INSERT INTO etr SELECT * FROM etr_start;
INSERT INTO sp SELECT * FROM sp_start;
SET session_replication_role = origin;
"""
LOST = " UNION ALL ".join(
    f"SELECT count(*) FROM (SELECT * FROM {table}_goal EXCEPT ALL SELECT * FROM {table}) x"
    for table in TABLES
)
DOUBLED = " UNION ALL ".join(
    [
        f"SELECT count(*) FROM (SELECT * FROM {table} EXCEPT ALL SELECT * FROM {table}_goal) x"
        for table in TABLES
    ]
    + ["SELECT count(*) FROM (SELECT * FROM effects EXCEPT ALL SELECT * FROM effects_goal) x"]
)
LEFT_BY_A_RUN = {
    "COMPLETE", "summary.json", "sgi_log.txt", "manifest.json", "report.html",
    "open_records.csv", "ia/other.csv",
    *(f"{side}/{table}.csv" for side in ("ia", "ic", "diff") for table in TABLES),
}  # fmt: skip
LEFT_AFTER_CHANGES = {f"verify/{side}/{table}.csv" for side in ("ic", "diff") for table in TABLES}


def rows_of(table: str, count: int) -> tuple[list[homes.Row], list[homes.Row]]:
    """What the database holds at the start, and what SameGoal says."""

    def row(number: int, word: str) -> homes.Row:
        key = str(1000 + number * 7)
        return {
            "iep": (key, "2026-01-05", word, f"Manager, {number}"),
            "etr": (key, "2026-02-03", f"{number}.50 {word}"),
            "sp": (key, f'the "{word}" plan'),
        }[table]

    numbers = range(count)
    start = [row(n, "OPEN" if n % 4 == 0 else "LOCKED") for n in numbers if n % 4 != 1]
    goal = [row(n, "LOCKED") for n in numbers if n % 4 != 2]
    return start, goal


def quoted(rows: Iterable[homes.Row]) -> list[homes.Row]:
    return [tuple('"' + value.replace('"', '""') + '"' for value in row) for row in rows]


class SyncWorld(World):
    """`sync`: a part of the SFTP server and a PostgreSQL database of its own."""

    command = "sync"

    def __init__(
        self, path: Path, sshd: servers.Sshd, postgres: servers.Postgres, rows: int = ROWS
    ) -> None:
        super().__init__(
            path, proxy.Proxy(sshd.host, sshd.port), proxy.Proxy(postgres.host, postgres.port)
        )
        self.rows = rows
        self.root = sshd.root / servers.fresh_name()
        for name in ("download", "upload"):
            (self.root / name).mkdir(parents=True)
        self.database = servers.Database(
            "postgresql", postgres.create_database(servers.fresh_name())
        )
        self.home = homes.Home(path, sshd, self.root, self.database)
        port = str(self.proxies[0].port)
        self.home.known_hosts(sshd.known_hosts.replace(f"]:{sshd.port}", f"]:{port}"))
        self.home.configure(
            port=port,
            connection=self.home.values["connection"].replace(
                f"Port={postgres.port}", f"Port={self.proxies[1].port}"
            ),
            sftp='timeoutSeconds="2"',
            database='queryTimeoutSeconds="2" batchSize="10" verify="true"',
            more=MORE,
            upload=UPLOAD,
        )
        self._fill()

    def _fill(self) -> None:
        self.database.execute(SETUP)
        headers = {"iep": homes.HEADER, "etr": "id,done,score", "sp": "student,plan"}
        large = "text\r\n" + ("y" * 1022 + "\r\n") * 1100  # enough to be read ahead
        files: dict[str, str | bytes] = {"other.csv": large}
        expected: list[homes.Row] = []
        for table in TABLES:
            start, goal = rows_of(table, self.rows)
            for name, rows in (("start", start), ("goal", goal)):
                self.database.execute(f"CREATE TABLE {table}_{name} AS SELECT * FROM {table}")
                self.database.insert(f"{table}_{name}", rows)
            files[f"{table}.csv"] = homes.csv_text(quoted(goal), headers[table])
            before, after = ({row[0]: row for row in rows} for rows in (start, goal))
            expected += [(table, "DELETE", key) for key in before.keys() - after.keys()]
            expected += [(table, "INSERT", key) for key in after.keys() - before.keys()]
            both = before.keys() & after.keys()
            expected += [(table, "UPDATE", key) for key in both if before[key] != after[key]]
        self.database.execute("CREATE TABLE effects_goal AS SELECT * FROM effects")
        self.database.insert("effects_goal", expected)
        self.home.extract(files=files)

    def reset(self) -> None:
        super().reset()
        self.database.execute(RESET)
        for epoch in (self.root / "upload").iterdir():
            shutil.rmtree(epoch)

    def lost(self) -> int:
        """Rows of the source that the database lacks."""
        return sum(int(row[0]) for row in self.database.rows(LOST))

    def doubled(self) -> int:
        """Rows that the source lacks or has less often, and effects that came more than once."""
        return sum(int(row[0]) for row in self.database.rows(DOUBLED))

    def halves(self) -> list[str]:
        """Files that an epoch lacks although its COMPLETE says that all are there."""
        problems = []
        for epoch in (self.root / "upload").iterdir():
            if not (epoch / "COMPLETE").is_file():
                continue
            local = self.home.path / "history" / epoch.name
            for path in local.rglob("*"):
                name = path.relative_to(local).as_posix()
                if path.is_dir() or name == "COMPLETE" or path.suffix == ".part":
                    continue
                sent = (epoch / name).read_bytes() if (epoch / name).is_file() else None
                # the log goes on while and after it is sent
                log = name == "sgi_log.txt" and sent and path.read_bytes().startswith(sent)
                if not log and sent != path.read_bytes():
                    problems.append(f"upload/{epoch.name}/{name}: missing or short")
            problems += [f"{part}: pushed" for part in epoch.rglob("*.part")]
        return problems

    def strange(self) -> list[str]:
        run = self.home.run
        found = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
        wanted = LEFT_BY_A_RUN | (LEFT_AFTER_CHANGES & found)
        problems = [f"history/{run.name}/{name}" for name in sorted(found ^ wanted)]
        pushed = self.home.pushed().keys()
        problems += [f"upload/{run.name}/{name}" for name in sorted(pushed ^ wanted)]
        cleaned = self.database.rows("SELECT times FROM cleaned")
        return problems + ([] if cleaned == [("once",)] else ["the statements of <Upload>"])


# ------------------------------------------------------------------ schoolinks

STUDENTS = 300
SCHOOL_CONFIG = """<Config>
  <SchooLinks directory="{root}" privateKey="ssh/id_rsa" timeoutSeconds="2">
    <Attendance/>
    <GPA/>
    <Tags><Tag name="IEP" detailedName="Plan" description="{text}" table="s_il_stu_x" column="iep"
               equals="1"/></Tags>
  </SchooLinks>
</Config>
"""
SCHOOL_FILES = ("attendance_percentage.csv", "gpa.csv", "student_tags.csv")
YESTERDAY = b"the file of yesterday\r\n"


class SchoolWorld(World):
    """`schoolinks`: an embedded PowerSchool and a directory with the files of yesterday."""

    command = "schoolinks"
    learns = True

    def __init__(self, path: Path, sshd: servers.Sshd) -> None:
        super().__init__(path, proxy.Proxy(sshd.host, sshd.port))
        self.root = sshd.root / servers.fresh_name()
        self.root.mkdir()
        (path / "ssh").mkdir(parents=True)
        (path / "ssh/id_rsa").write_bytes(sshd.keys["rsa"].read_bytes())
        port = self.proxies[0].port
        known = sshd.known_hosts.replace(f"]:{sshd.port}", f"]:{port}")
        (path / "ssh/known_hosts").write_text(known, encoding="ascii")
        config = SCHOOL_CONFIG.format(root=self.root.as_posix(), text="long " * 60)
        (path / "config.xml").write_text(config, encoding="utf-8")
        self.environment |= {
            "POWERSCHOOL_FILE": str(path / "powerschool.sqlite"),
            "POWERSCHOOL_READ_USER": "reader",
            "POWERSCHOOL_DB_PASSWORD": "tiger99",
            "POWERSCHOOL_PROD_DB": "nowhere:1521/PS",
            "SCHOOLINKS_SFTP_USERNAME": sshd.username,
            "SCHOOLINKS_SFTP_ADDRESS": f"{proxy.HOST}:{port}",
        }
        self._enroll()
        self.goal = dict.fromkeys(SCHOOL_FILES, b"")  # the files of today

    def _enroll(self) -> None:
        powerschool = PowerSchool(self.environment["POWERSCHOOL_FILE"])
        numbers = range(1001, 1001 + STUDENTS)
        students = [STUDENT | {"student_number": n, "id": n, "dcid": n} for n in numbers]
        powerschool.insert("students", students)
        today = datetime.date.today()
        days = [DAY | {"studentid": n, "calendardate": today} for n in numbers]
        powerschool.insert("ps_adaadm_daily_ctod", days)
        gpas = [{"studentsdcid": n, "simple_gpa": 3.25, "weighted_gpa": 4.5} for n in numbers]
        powerschool.insert("u_def_ext_students0", gpas)
        powerschool.insert("s_il_stu_x", [{"studentsdcid": n, "iep": 1} for n in numbers])
        powerschool.database.close()

    def reset(self) -> None:
        super().reset()
        for path in self.root.iterdir():
            path.unlink()
        for name in SCHOOL_FILES:
            (self.root / name).write_bytes(YESTERDAY)

    def learn(self) -> None:
        self.goal = {name: (self.root / name).read_bytes() for name in SCHOOL_FILES}

    def halves(self) -> list[str]:
        """Files under their final names that are neither those of yesterday nor of today."""
        found = {name: (self.root / name).read_bytes() for name in SCHOOL_FILES}
        return [
            f"{name}: {len(content)} bytes of {len(self.goal[name])}"
            for name, content in found.items()
            if content not in (YESTERDAY, self.goal[name])
        ]

    def lost(self) -> int:
        return sum((self.root / name).read_bytes() != self.goal[name] for name in SCHOOL_FILES)

    def doubled(self) -> int:
        return len({path.name for path in self.root.iterdir()} - set(SCHOOL_FILES))

    def strange(self) -> list[str]:
        run = max((self.path / "history/schoolinks").glob("2*"))
        wanted = {"COMPLETE", "summary.json", "sgi_log.txt", "manifest.json", *SCHOOL_FILES}
        found = {path.name for path in run.iterdir()}
        return [f"history/schoolinks/{run.name}/{name}" for name in sorted(found ^ wanted)]
