"""Runs as a sync leaves them, written by hand: for tests of what reads them."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sgsync

COLUMNS = ("studentNumber", "startDate", "status", "manager")
Row = tuple[str, ...]
Change = tuple[str, Row, Row]  # operation, before, after
NOTHING = ("",) * len(COLUMNS)


def insert(*row: str) -> Change:
    return "insert", NOTHING, row


def update(before: Row, after: Row) -> Change:
    return "update", before, after


def delete(*row: str) -> Change:
    return "delete", row, NOTHING


def summary(changes: Sequence[Change], **values: Any) -> sgsync.RunSummary:
    """A run that found these changes, and applied all unless `files` says otherwise."""
    file = sgsync.FileSummary("iep.csv", source_rows=4000, target_rows=4001)
    for operation, _, _ in changes:
        file.tally(operation).found += 1
        file.tally(operation).applied += values.get("outcome") not in ("held", "dry run")
    told: dict[str, Any] = {
        "account": "svc", "computer": "app01", "outcome": "complete", "exit_code": 0,
        "files": [file], "keys": {"iep.csv": ["studentNumber", "startDate"]},
    }  # fmt: skip
    return sgsync.RunSummary("sync", **{**told, **values})


def run(
    history: Path, epoch: str, changes: Sequence[Change] = (), *, seal: bool = False, **values: Any
) -> Path:
    """Write a run's folder; `values` are fields of its summary."""
    folder = history / epoch
    (folder / "diff").mkdir(parents=True)
    told = summary(changes, **values)
    told.epoch = epoch
    told.started = f"{epoch[:4]}-{epoch[4:6]}-{epoch[6:8]}T02:00:00-05:00"
    header = ["operation", *(f"{side}_{name}" for side in ("before", "after") for name in COLUMNS)]
    table(folder / "diff/iep.csv", header, [[op, *a, *b] for op, a, b in changes])
    with sgsync.new_file(folder / "summary.json") as file:
        file.write(sgsync.json.dumps(dataclasses.asdict(told)).encode("ascii"))
    (folder / "sgi_log.txt").write_text("begun\n", encoding="utf-8")
    if seal:
        others = [kept for kept in sgsync.runs(history) if kept.epoch != epoch]
        sgsync.Manifest.write(folder, others)
        (folder / "COMPLETE").touch()
    return folder


def table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def failures(folder: Path, *rows: tuple[str, str, str, str]) -> None:
    table(folder / "failures.csv", ["operation", "key", "procedure", "error"], rows)
