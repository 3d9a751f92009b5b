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
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import fuzz, proxy, servers
from support.worlds import Ended, SchoolWorld, SyncWorld, World

FUZZ_CONFIG, FUZZ_CSV = "fuzz config", "fuzz csv"
KILL, CUT_SFTP, CUT_DATABASE, STALL, SLOW = "kill", "cut sftp", "cut database", "stall", "slow"
SCHOOLINKS = "schoolinks"
SHARES = {KILL: 46, CUT_SFTP: 13, CUT_DATABASE: 13, STALL: 12, SLOW: 6, SCHOOLINKS: 10}
KINDS = tuple(SHARES)
KILLED = -9

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
        return (3, 4)[self.side] if self.fault else KILLED


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
    """Run `world` undisturbed."""
    world.reset()
    marks: dict[tuple[int, str], list[int]] = {}

    def mark(_number: int, _process: object) -> None:
        for side, each in enumerate(world.proxies):
            for direction in proxy.DIRECTIONS:
                marks.setdefault((side, direction), [0]).append(each.passed[direction])

    ended = world.run(on_line=mark)
    if ended.code == 0:
        world.learn()
    if ended.code or world.lost() or world.doubled() or world.strange():
        raise SystemExit(f"an undisturbed run fails: {ended.code} {ended.lines} {world.strange()}")
    operations = int(ended.lines[-1].split()[-1])
    return Measure(ended.seconds, len(ended.lines) - 1, operations, marks)


def points(kind: str, count: int, measured: Measure, chance: random.Random) -> Iterator[Point]:
    """`count` points of a kind, spread over the whole run."""
    for number in range(count):
        share = (number + chance.random()) / count
        if kind == KILL or (kind == SCHOOLINKS and number % 2):
            how = ("line", "bytes", "file", "time")[number // (1 + (kind == SCHOOLINKS)) % 4]
            yield dataclasses.replace(_kill(how, share, measured, chance), kind=kind)
            continue
        side = {CUT_SFTP: 0, CUT_DATABASE: 1, SCHOOLINKS: 0}.get(kind, number % 2)
        direction = chance.choice(proxy.DIRECTIONS)
        does = {STALL: "stall", SLOW: "slow"}.get(kind, "drop")
        does = chance.choice(proxy.KINDS) if kind == SCHOOLINKS else does
        fault = proxy.Fault(
            does,
            direction,
            _byte(share, side, direction, measured, chance),
            lasting=does != "slow" and number // 2 % 2 == 1,
            rate=chance.choice((2_000, 20_000)),
        )
        yield Point(kind, "", share, side=side, fault=fault)


def _kill(how: str, share: float, measured: Measure, chance: random.Random) -> Point:
    side = chance.randrange(1 + max(side for side, _ in measured.marks))
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
    outcome.notes += world.halves()
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
    return {kind: max(1, round(count * SHARES[kind] / 100)) for kind in KINDS if kind in only}


@contextlib.contextmanager
def closing(made: Sequence[World]) -> Iterator[Sequence[World]]:
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
    for world in made:
        if world is made[0] or world.learns:
            world.measured = world.measured or measure(world)
    measured = made[0].measured
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


def all_points(
    counts: dict[str, int], workers: int, seed: int, told: Callable[[Outcome], None]
) -> list[Outcome]:
    """All points of all kinds, on servers of their own."""
    sync = {kind: count for kind, count in counts.items() if kind != SCHOOLINKS}
    schoolinks = {kind: count for kind, count in counts.items() if kind == SCHOOLINKS}
    outcomes: list[Outcome] = []
    with (
        tempfile.TemporaryDirectory(prefix="sgsync-faults-") as name,
        servers.Sshd() as sshd,
        servers.Postgres(fsync=False) as postgres,
    ):
        folder, numbers = Path(name), range(workers)
        if sync:
            with closing([SyncWorld(folder / f"{n}", sshd, postgres) for n in numbers]) as made:
                outcomes += run_points(made, sync, seed, told)
        if schoolinks:
            with closing([SchoolWorld(folder / f"school{n}", sshd) for n in numbers]) as made:
                outcomes += run_points(made, schoolinks, seed, told)
    return outcomes


def all_inputs(
    count: int, workers: int, seed: int, only: Sequence[str], tell: Callable[[str], None]
) -> list[tuple[object, ...]]:
    """All broken files, a line of the table for each kind."""
    lines: list[tuple[object, ...]] = []
    for kind, share in ((FUZZ_CONFIG, 0.4), (FUZZ_CSV, 0.6)):
        if kind in only:
            word = kind.removeprefix("fuzz ")
            tally = fuzz.fuzz_many(word, round(count * share), seed, workers, tell)
            answers = (tally.answers, tally.errors, "-", tally.wrong, 0, tally.hung)
            lines.append((kind, tally.inputs, *answers))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Faults, as a table.")
    parser.add_argument("--points", type=int, default=480, help="kills and cuts")
    parser.add_argument("--inputs", type=int, default=20_000, help="broken files")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default=",".join((*KINDS, FUZZ_CONFIG, FUZZ_CSV)))
    parser.add_argument("--verbose", action="store_true", help="a line for each point")
    options = parser.parse_args()
    only, began = options.only.split(","), time.monotonic()
    problems: list[str] = []

    def tell(problem: str) -> None:
        problems.append(problem)
        print(problem, file=sys.stderr, flush=True)

    def told(outcome: Outcome) -> None:
        if options.verbose:
            print(outcome, file=sys.stderr, flush=True)
        if problem := problem_of(outcome):
            tell(problem)

    # first, because they fork, and there are no threads yet
    broken = all_inputs(options.inputs, options.workers, options.seed, only, tell)
    counts = spread(options.points, only)
    outcomes = all_points(counts, options.workers, options.seed, told) if counts else []
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
