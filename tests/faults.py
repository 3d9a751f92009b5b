"""Does to sgsync what the world does, at hundreds of points, and counts what became of it.

`make faults` runs the real program, as a process, against real sshd and PostgreSQL and

- kills it (SIGKILL) at points spread over the whole run: at a share of its time, at a line of its
  log, at a byte of its connections, before an operation on its files;
- cuts, stalls or slows its connections after a number of bytes, in either direction, once or for
  good;
- feeds it broken config.xml and CSV files (see fuzz.py);

then runs it again untouched, and looks at everything that is left: the database must equal the
source, each change must have had its effect once, no epoch on the server may hold a COMPLETE with a
file missing or short, no lock and no temporary file may be in the way. Ends with 1 unless nothing
was lost, nothing doubled, nothing hung and every run ended as it should.

    make faults ARGS="--points 60 --inputs 2000 --seed 7 --workers 2 --only kill,stall"
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fuzz
import homes
import proxy
import servers

FUZZ_CONFIG, FUZZ_CSV = "fuzz config", "fuzz csv"
KILL, CUT_SFTP, CUT_DATABASE, STALL, SLOW = "kill", "cut sftp", "cut database", "stall", "slow"
KINDS = (KILL, CUT_SFTP, CUT_DATABASE, STALL, SLOW)
SHARES = {KILL: 0.5, CUT_SFTP: 0.14, CUT_DATABASE: 0.14, STALL: 0.14, SLOW: 0.08}
HUNG_SECONDS = 90.0  # Far beyond every time-out that the runs below have.
KILLED = -9

# Time-outs as short as the rest of the configuration has them, memory small enough that sorting
# needs temporary files. With KILL_AT=n it kills itself before the nth change to its home's files.
RUNNER = """
import os, signal, sys
import sgsync
sgsync.CONNECT_SECONDS, sgsync.RETRY_SECONDS = 2.0, 0.1
sgsync.SORT_BYTES = sgsync.BLOCK_BYTES = 4096
left = int(os.environ.get("KILL_AT", "0"))
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

# ------------------------------------------------------------------ a district: World

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
    "COMPLETE", "summary.json", "sgi_log.txt", "open_records.csv", "ia/other.csv",
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


class World:
    """One district behind proxies: a home, a part of the SFTP server, a database."""

    def __init__(
        self, folder: Path, sshd: servers.Sshd, postgres: servers.Postgres, rows: int = ROWS
    ) -> None:
        self.rows = rows
        self.root = sshd.root / servers.fresh_name()
        for name in ("download", "upload"):
            (self.root / name).mkdir(parents=True)
        self.database = servers.Database(
            "postgresql", postgres.create_database(servers.fresh_name())
        )
        self.home = homes.Home(folder, sshd, self.root, self.database)
        self.sftp_proxy = proxy.Proxy(sshd.host, sshd.port)
        self.database_proxy = proxy.Proxy(postgres.host, postgres.port)
        self.proxies = (self.sftp_proxy, self.database_proxy)
        port = str(self.sftp_proxy.port)
        self.home.known_hosts(sshd.known_hosts.replace(f"]:{sshd.port}", f"]:{port}"))
        self.home.configure(
            port=port,
            connection=self.home.values["connection"].replace(
                f"Port={postgres.port}", f"Port={self.database_proxy.port}"
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

    def close(self) -> None:
        for each in self.proxies:
            each.close()

    def reset(self) -> None:
        """As before any run."""
        for each in self.proxies:
            each.reset()
        self.database.execute(RESET)
        shutil.rmtree(self.home.path / "history", ignore_errors=True)
        for epoch in (self.root / "upload").iterdir():
            shutil.rmtree(epoch)

    def run(
        self,
        on_line: Callable[[int, subprocess.Popen[str]], None] | None = None,
        kill_after: float = 0,
        kill_at: int = 0,
    ) -> Ended:
        """One run of the program; `on_line` is told of each line of its log."""
        process = subprocess.Popen(
            [sys.executable, "-c", RUNNER, "--verbose", "--home", str(self.home.path)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, encoding="utf-8", errors="replace",
            env={**os.environ, "PYTHONPATH": str(homes.SCRIPT.parent), "KILL_AT": str(kill_at)},
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

    # -------------------------------------------------------------- what is left

    def lost(self) -> int:
        """Rows of the source that the database lacks, and files that an epoch on the server lacks
        although its COMPLETE says that all are there."""
        rows = sum(int(row[0]) for row in self.database.rows(LOST))
        return rows + len(self.short_epochs())

    def doubled(self) -> int:
        """Rows that are there too often or too much, and effects that came more than once."""
        return sum(int(row[0]) for row in self.database.rows(DOUBLED))

    def short_epochs(self) -> list[str]:
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
        """What a run that ended with 0 must not leave; it left the newest folder."""
        run = self.home.run
        found = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
        wanted = LEFT_BY_A_RUN | (LEFT_AFTER_CHANGES & found)
        problems = [f"history/{run.name}/{name}" for name in sorted(found ^ wanted)]
        pushed = self.home.pushed().keys()
        problems += [f"upload/{run.name}/{name}" for name in sorted(pushed ^ wanted)]
        cleaned = self.database.rows("SELECT times FROM cleaned")
        return problems + ([] if cleaned == [("once",)] else ["the statements of <Upload>"])


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
            ("apply", r"sp\.csv: applied"),
            ("verify and statements", r"open_records\.csv: done"),
            ("push", r"pushed \d+ files"),
        )
        for stage, pattern in passed:
            if not re.search(pattern, text):
                return stage
        return "end"


# ------------------------------------------------------------------ points


@dataclasses.dataclass(frozen=True)
class Measure:
    """What a run that nothing disturbs looks like."""

    seconds: float
    lines: int
    operations: int
    marks: dict[tuple[int, str], list[int]]  # proxy, direction -> bytes at each line of the log


@dataclasses.dataclass(frozen=True)
class Point:
    """One thing that is done to one run."""

    kind: str
    how: str  # kill: time, line, bytes, file
    share: float = 0.0
    number: int = 0
    side: int = 0  # 0 sftp, 1 database
    direction: str = proxy.UP
    fault: proxy.Fault | None = None

    def __str__(self) -> str:
        side = ("sftp", "database")[self.side]
        if self.fault:
            f = self.fault
            more = ", for good" if f.lasting else ""
            return f"{f.kind} {side} {f.direction} after {f.after} bytes{more}"
        if self.how == "time":
            return f"kill after {self.share:.0%} of the time"
        if self.how == "line":
            return f"kill at line {self.number} of the log"
        if self.how == "file":
            return f"kill before operation {self.number} on files"
        return f"kill after {self.number} bytes {side} {self.direction}"

    def earlier(self) -> Point:
        fault = self.fault and dataclasses.replace(self.fault, after=self.fault.after * 9 // 10)
        number = max(1, self.number * 9 // 10)
        return dataclasses.replace(self, share=self.share * 0.9, number=number, fault=fault)

    @property
    def right_code(self) -> int:
        return KILLED if self.kind == KILL else (3, 4)[self.side]


@dataclasses.dataclass
class Outcome:
    """What became of a run to which a point was done."""

    point: Point
    ended: Ended
    recovered: bool = False
    right: bool = False
    converged: bool | None = None
    lost: int = 0
    doubled: int = 0
    hung: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        code, seconds, stage = self.ended.code, self.ended.seconds, self.ended.stage
        last = next((line for line in reversed(self.ended.lines) if "Try: " not in line), "")
        return f"{self.point}: {code} after {seconds:.1f} s in {stage}: {last[:150]}"


def measure(world: World) -> Measure:
    world.reset()
    marks: dict[tuple[int, str], list[int]] = {}

    def mark(_number: int, _process: object) -> None:
        for side, each in enumerate(world.proxies):
            for direction in proxy.DIRECTIONS:
                marks.setdefault((side, direction), [0]).append(each.passed[direction])

    ended = world.run(on_line=mark)
    if ended.code or world.lost() or world.doubled() or world.strange():
        raise SystemExit(f"an undisturbed run fails: {ended.code} {ended.lines} {world.strange()}")
    operations = int(ended.lines[-1].split()[-1])
    return Measure(ended.seconds, len(ended.lines) - 1, operations, marks)


def points(kind: str, count: int, measured: Measure, chance: random.Random) -> Iterator[Point]:
    """`count` points of a kind, spread over the whole run."""
    for number in range(count):
        share = (number + chance.random()) / count
        if kind == KILL:
            yield _kill(("line", "bytes", "file", "time")[number % 4], share, measured, chance)
            continue
        side = {CUT_SFTP: 0, CUT_DATABASE: 1}.get(kind, number % 2)
        direction = chance.choice(proxy.DIRECTIONS)
        fault = proxy.Fault(
            {STALL: "stall", SLOW: "slow"}.get(kind, "drop"),
            direction,
            _byte(share, side, direction, measured, chance),
            lasting=kind != SLOW and number // 2 % 2 == 1,
            rate=chance.choice((2_000, 20_000)),
        )
        yield Point(kind, "", share, side=side, fault=fault)


def _kill(how: str, share: float, measured: Measure, chance: random.Random) -> Point:
    side = chance.randrange(2)
    direction = chance.choice(proxy.DIRECTIONS)
    number = {
        "line": 1 + int(share * measured.lines),
        "file": 1 + int(share * measured.operations),
        "bytes": _byte(chance.random(), side, direction, measured, chance),
        "time": 0,
    }[how]
    return Point(KILL, how, share, number, side, direction)


def _byte(share: float, side: int, direction: str, measured: Measure, chance: random.Random) -> int:
    """A byte of a run: each stretch between two lines of the log has the same share of them."""
    marks = sorted(set(measured.marks[side, direction]))
    position = share * (len(marks) - 1)
    low, high = marks[int(position)], marks[min(int(position) + 1, len(marks) - 1)]
    return low + int((high - low) * chance.random())


def tried(world: World, point: Point, measured: Measure) -> Outcome:
    """Do it, then run again untouched, and look."""
    while True:
        world.reset()
        outcome = Outcome(point, _disturbed(world, point, measured))
        if outcome.ended.code or any(each.struck for each in world.proxies):
            break
        point = point.earlier()  # no two runs take the same time or send the same bytes
    outcome.hung = outcome.ended.hung
    for each in world.proxies:
        each.reset()
    code = outcome.ended.code
    outcome.notes += world.short_epochs()
    outcome.lost += len(outcome.notes)
    if code == 0:
        outcome.recovered = True
        outcome.notes += world.strange()
    else:
        outcome.right = code == point.right_code and not outcome.hung
        if not outcome.right:
            outcome.notes += [f"ended with {code}", *outcome.ended.lines[-3:]]
        again = world.run()
        outcome.converged = again.code == 0
        outcome.hung = outcome.hung or again.hung
        outcome.notes += again.lines[-3:] if again.code else world.strange()
    outcome.lost += world.lost()
    outcome.doubled = world.doubled()
    return outcome


def _disturbed(world: World, point: Point, measured: Measure) -> Ended:
    if point.fault:
        world.proxies[point.side].fault = point.fault
        return world.run()
    if point.how == "time":
        return world.run(kill_after=(0.2 + 0.8 * point.share) * measured.seconds)
    if point.how == "file":
        return world.run(kill_at=point.number)
    if point.how == "bytes":
        watched = world.proxies[point.side]

        def kill(direction: str) -> None:
            if direction == point.direction and watched.passed[direction] >= point.number:
                world.process.kill()

        watched.on_bytes = kill
        return world.run()

    def kill_at_line(number: int, process: subprocess.Popen[str]) -> None:
        if number == point.number:
            time.sleep(0.02 * (point.share * 1000 % 1))
            process.kill()

    return world.run(on_line=kill_at_line)


# ------------------------------------------------------------------ all of them: run_points


def spread(count: int, only: Sequence[str] = KINDS) -> dict[str, int]:
    """How many points each kind gets of `count`."""
    return {kind: max(1, round(count * SHARES[kind])) for kind in KINDS if kind in only}


@contextlib.contextmanager
def worlds(
    number: int, folder: Path, sshd: servers.Sshd, postgres: servers.Postgres, rows: int = ROWS
) -> Iterator[list[World]]:
    made = [World(folder / f"home{i}", sshd, postgres, rows) for i in range(number)]
    try:
        yield made
    finally:
        for world in made:
            world.close()


def run_points(
    made: Sequence[World], counts: dict[str, int], seed: int, told: Callable[[Outcome], None]
) -> list[Outcome]:
    """All points, each world taking the next one; raises what one of them raised."""
    chance = random.Random(seed)
    measured = measure(made[0])
    todo: queue.SimpleQueue[Point] = queue.SimpleQueue()
    chosen = [p for kind, count in counts.items() for p in points(kind, count, measured, chance)]
    for point in sorted(chosen, key=lambda _: chance.random()):
        todo.put(point)
    outcomes: list[Outcome] = []
    errors: list[BaseException] = []

    def work(world: World) -> None:
        try:
            while not errors:
                outcome = tried(world, todo.get_nowait(), measured)
                outcomes.append(outcome)
                told(outcome)
        except queue.Empty:
            pass
        except BaseException as error:  # the harness's own: told at the end
            errors.append(error)

    threads = [threading.Thread(target=work, args=(world,), daemon=True) for world in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return outcomes


def problem_of(outcome: Outcome) -> str:
    """What is wrong with an outcome, or ''."""
    wrong = []
    if not (outcome.recovered or outcome.right):
        wrong.append("ended wrongly")
    if outcome.converged is False:
        wrong.append("did not converge")
    wrong += [f"{n} {what}" for n, what in
              ((outcome.lost, "lost"), (outcome.doubled, "doubled")) if n]  # fmt: skip
    if outcome.hung:
        wrong.append("hung")
    if not wrong and not outcome.notes:
        return ""
    return f"{outcome.point}: {', '.join(wrong)}\n    " + "\n    ".join(outcome.notes)


HEADINGS = (
    "kind", "points", "recovered", "right code", "converged", "lost", "doubled", "hung",
)  # fmt: skip


def line_of(kind: str, outcomes: Sequence[Outcome]) -> tuple[object, ...]:
    return (
        kind,
        len(outcomes),
        sum(o.recovered for o in outcomes),
        sum(o.right for o in outcomes),
        sum(o.converged is True for o in outcomes),
        sum(o.lost for o in outcomes),
        sum(o.doubled for o in outcomes),
        sum(o.hung for o in outcomes),
    )


def table(lines: Sequence[Sequence[object]]) -> str:
    cells = [[str(cell) for cell in line] for line in (HEADINGS, *lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Faults, as a table.")
    parser.add_argument("--points", type=int, default=440, help="kills and cuts")
    parser.add_argument("--inputs", type=int, default=20_000, help="broken files")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default=",".join((*KINDS, FUZZ_CONFIG, FUZZ_CSV)))
    parser.add_argument("--verbose", action="store_true", help="a line for each point")
    options = parser.parse_args()
    only = options.only.split(",")
    began = time.monotonic()
    problems: list[str] = []

    def tell(problem: str) -> None:
        problems.append(problem)
        print(problem, file=sys.stderr, flush=True)

    def told(outcome: Outcome) -> None:
        if options.verbose:
            print(outcome, file=sys.stderr, flush=True)
        if problem := problem_of(outcome):
            tell(problem)

    broken: list[tuple[object, ...]] = []
    for kind, share in ((FUZZ_CONFIG, 0.4), (FUZZ_CSV, 0.6)):  # first: they fork, without threads
        if kind in only:
            word = kind.removeprefix("fuzz ")
            count = round(options.inputs * share)
            tally = fuzz.fuzz_many(word, count, options.seed, options.workers, tell)
            answers = (tally.answers, tally.errors, "-", tally.wrong, 0, tally.hung)
            broken.append((kind, tally.inputs, *answers))
    outcomes: list[Outcome] = []
    if counts := spread(options.points, only):
        with (
            tempfile.TemporaryDirectory(prefix="sgsync-faults-") as folder,
            servers.Sshd() as sshd,
            servers.Postgres(fsync=False) as postgres,
            worlds(options.workers, Path(folder), sshd, postgres) as made,
        ):
            outcomes = run_points(made, counts, options.seed, told)
    lines = [line_of(kind, [o for o in outcomes if o.point.kind == kind]) for kind in counts]
    print(table([*lines, *broken]))
    stages = Counter(o.ended.stage for o in outcomes if o.point.kind == KILL)
    if stages:
        print("killed in:", ", ".join(f"{stage} {n}" for stage, n in stages.most_common()))
    verdict = f"{plural(len(problems))} wrong" if problems else "nothing lost, doubled or hung"
    print(f"{verdict}; {time.monotonic() - began:.0f} s, seed {options.seed}")
    return 1 if problems else 0


def plural(count: int) -> str:
    return f"{count} point{'s' if count > 1 else ''}"


if __name__ == "__main__":
    sys.exit(main())
