"""What tells of a run: report.html, the log as JSON, the metrics."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics import parser as openmetrics

import sgsync
from support import homes, kept

pytestmark = pytest.mark.usefixtures("short_pauses")

HOSTILE = "<script>alert(1)</script>\"'&{{7*7}}\x1b[2J\u202e"
ESCAPED = "&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&amp;{{7*7}}\\x1b[2J\\u202e"
VOID = {"meta", "path"}
OVER = (
    "iep.csv: 3 deletes of 5 rows, maxDeletes is 2; they begin with studentNumber=1003, "
    "startDate=2026-01-05"
)


class Page(html.parser.HTMLParser):
    """A page, found to be well-formed: each tag closed in turn, ids unique, headings in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        assert {a["aria-labelledby"] for _, a in self.tags if "aria-labelledby" in a} <= set(ids)
        headings = [tag for tag, _ in self.tags if re.fullmatch("h[1-6]", tag)]
        assert headings[0] == "h1"
        assert set(headings[1:]) == {"h2"}
        assert all(a["scope"] in ("col", "row", "rowgroup") for tag, a in self.tags if tag == "th")
        assert not {"script", "link", "img", "iframe", "base"} & {tag for tag, _ in self.tags}
        assert not [name for _, a in self.tags for name in a if name.startswith(("on", "src"))]
        assert not re.search(r"https?:|@import|url\(", text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip() and "style" not in self.open:
            self.texts.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def report(folder: Path, *, keys: bool = True) -> Page:
    """Write the report of a run that is kept."""
    runs = sgsync.runs(folder.parent)
    run = next(run for run in runs if run.folder == folder)
    path = sgsync.Report(run.summary, folder, runs, keys=keys).write()
    return Page(path.read_text(encoding="utf-8"))


def rich_run(history: Path, name: str = "iep.csv", text: str = "bad status") -> Path:
    """A run with everything in it that a report can tell."""
    file = sgsync.FileSummary(
        name, source_rows=1234, target_rows=5, update=sgsync.Tally(2345, applied=2342, failed=3),
        delete=sgsync.Tally(7, left_alone=7), not_converged=1,
        format_differences=[
            f"{name}: 3 of 3 updates differ only in format: column {text}, number format, as in "
            "studentNumber=1001, startDate=2026-01-05: '9.9' in the database, '9.99' from "
            'SameGoal; ignoreNumberFormat="true" on this <SQLDiff> would fix this'
        ],
    )  # fmt: skip
    folder = kept.run(
        history, "20260109-020000", files=[file], outcome="partial", exit_code=8, seconds=75.0,
        message=f"3 rows failed; {text}", over_limits=[OVER], statement_files={text: 2},
        approval=sgsync.Approval("20260108-020000", f"Pat {text}", text, "", 3),
        stages=[sgsync.Stage("download", 0.5, 30.0), sgsync.Stage("export", 0.5, 74.0)],
    )  # fmt: skip
    key = "studentNumber=1002, startDate=2026-01-05"
    kept.failures(folder, *[("update", key, "dbo.up", f"student 1002: {text}")] * 3)
    kept.table(folder / "notconverged.csv", ["file", "operation", "key", "procedure", "runs"],
               [[name, "update", key, "dbo.up", "4"]])  # fmt: skip
    return folder


# ------------------------------------------------------------------ the page


def test_report_tells_everything_of_a_run(tmp_path: Path) -> None:
    text = report(rich_run(tmp_path)).text
    for told in (
        "Finished, but not for every row run 20260109-020000",
        "What to do: Correct what the errors below say, in SameGoal or in the database",
        f"Beyond the limits {OVER} Run 20260108-020000 was approved by Pat bad status, 3 rows",
        "iep.csv 1,234 rows from SameGoal, 5 in the database, 0.0 s; 1 did not converge",
        "insert 0 0 0 0 update 2,345 2,342 3 0 delete 7 0 0 7",
        "Rows that failed The database refused 3 rows; the next run tries again.",
        "update studentNumber=1002, startDate=2026-01-05 dbo.up: student 1002: bad status",
        "update studentNumber=1002, startDate=2026-01-05 dbo.up, iep.csv 4",
        'ignoreNumberFormat="true" on this <SQLDiff> would fix this',
        "download 30.0 s export 1 min 14 s",
        "Files of <Upload> bad status (2 rows)",
    ):
        assert told in text, told


def test_report_escapes_hostile_names(tmp_path: Path) -> None:
    folder = rich_run(tmp_path, HOSTILE, HOSTILE)
    page = report(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count(ESCAPED) > 8
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    assert page.text.count("{{7*7}}") > 8


def test_report_leaves_keys_out(tmp_path: Path) -> None:
    """Also those in messages, and what errors quote of them."""
    folder = rich_run(tmp_path)
    run = sgsync.runs(tmp_path)[0]
    run.summary.message = f"nothing was written: {OVER}. Changes in all: iep.csv 3 to delete"
    run.summary.over_limits = [OVER.replace("iep", "flags")]
    for names in (["studentNumber", "startDate"], []):
        run.summary.keys["iep.csv"] = names
        path = sgsync.Report(run.summary, folder, [], keys=False).write()
        text = Page(path.read_text(encoding="utf-8")).text
        assert not re.search("100[1-3]|2026-01-05|studentNumber", text)
        assert "maxDeletes is 2; they begin with (keys are left out)" in text
        assert '(keys are left out); ignoreNumberFormat="true" on this <SQLDiff>' in text
        assert "dbo.up: student ...: bad status" in text


def test_report_of_a_held_run_has_the_command_that_approves_it(tmp_path: Path) -> None:
    folder = kept.run(tmp_path, "20260102-020000", outcome="held", exit_code=6,
                      message=f"nothing was written: {OVER}", over_limits=[OVER],
                      remedy="look at diff; approve:\nsgsync.py sync --approve 1")  # fmt: skip
    page = report(folder)
    assert "Held, nothing was written" in page.text
    assert "What to do: look at diff; approve: sgsync.py sync --approve 1" in page.text
    assert "pre" in [tag for tag, _ in page.tags]
    assert page.text.count("they begin with") == 1
    file = sgsync.FileSummary("iep.csv", insert=sgsync.Tally(1, applied=1))  # by maxShrink
    folder = kept.run(tmp_path, "20260103-020000", outcome="held", exit_code=6, files=[file])
    assert "Held, nothing was sent" in report(folder).text


def test_report_shows_the_trend(tmp_path: Path) -> None:
    for day, outcome, rows in ((1, "complete", 1000), (2, "failed", 0), (3, "held", 0),
                               (4, "dry run", 0), (5, "complete", 10)):  # fmt: skip
        kept.run(tmp_path, f"2026010{day}-020000", [kept.insert("1", "2", "3", "4")] * rows,
                 outcome=outcome, seconds=float(day))  # fmt: skip
    page = report(rich_run(tmp_path))
    assert "Rows written most 2,342, usually 10; logarithmic scale" in page.text
    assert "Rows failed most 3, usually 0; logarithmic scale" in page.text
    assert "1 failed (tall bars), 1 held (short bars), of 5 runs" in page.text
    paths = [attributes["d"] or "" for tag, attributes in page.tags if tag == "path"]
    assert [path.count("M") for path in paths] == [3, 1, 5, 2]
    assert paths[3] == "M4 60v-60h3V60zM8 60v-30h3V60z"
    latest = page.text.split("Latest runs")[1]
    assert "20260109-020000 partial 2,342 3 1 min 15 s 20260105-020000 complete 10" in latest


def test_report_leaves_many_rows_to_the_csv_file(tmp_path: Path) -> None:
    folder = rich_run(tmp_path)
    kept.failures(folder, *[("insert", f"id={n}", "p", "e") for n in range(205)])
    assert "And 5 more, see failures.csv in this run's folder." in report(folder).text


# ------------------------------------------------------------------ real runs


def page(home: homes.Home) -> Page:
    return Page((home.run / "report.html").read_text(encoding="utf-8"))


def test_every_run_of_sync_leaves_its_report(
    sqlite_home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = sqlite_home
    home.extract([("1001", "2026-01-05", "LOCKED", "Ann"), ("1002", "2026-01-05", "BAD", "Bob")])
    assert home.main("sync", "--dry-run") == 0
    assert "Dry run run" in page(home).text
    assert home.main() == 8
    told = page(home).text
    assert "insert studentNumber=1002, startDate=2026-01-05 SQL: " in told
    assert home.pushed()["report.html"] == (home.run / "report.html").read_bytes()
    assert "download" in told
    home.configure(history='<History reportKeys="false"/>', diff='maxDeletes="0"')
    home.extract([("1002", "2026-01-05", "BAD", "Bob")], epoch="20260102-139029")
    assert home.main() == 6
    assert "--approve" in page(home).text
    assert "1001" not in page(home).text
    home.configure(upload="<SQL>")
    assert home.main() == 2
    assert "Failed run" in page(home).text
    assert "not well-formed XML" in page(home).text


def test_report_that_cannot_be_made_changes_nothing_of_the_outcome(
    sqlite_home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sgsync, "REPORT", "{{ nobody }}")
    sqlite_home.extract([("1001", "2026-01-05", "LOCKED", "Ann")])
    assert sqlite_home.main() == 0
    assert "WARNING report.html: could not be written: unexpected error" in sqlite_home.log
    assert not (sqlite_home.run / "report.html").exists()
    assert (sqlite_home.run / "COMPLETE").exists()


def test_report_command_writes_and_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(*argv: str) -> str:
        assert sgsync.main(["report", "--home", str(tmp_path), *argv]) == 0
        return capsys.readouterr().out

    assert sgsync.main(["report", "--home", str(tmp_path)]) == 2
    assert "there is no run to report on\n    Try: run sync first" in capsys.readouterr().err
    older = kept.run(tmp_path / "history", "20260101-020000")
    newest = rich_run(tmp_path / "history")
    assert main() == f"{newest}/report.html\n"
    assert "studentNumber=1002" not in (newest / "report.html").read_text()  # no config.xml
    (tmp_path / "config.xml").write_text("<Config><History/></Config>")
    opened: list[str] = []
    monkeypatch.setattr(sgsync.webbrowser, "open", lambda url: not opened.append(url))
    assert main("--open") == f"{newest}/report.html\n"
    assert opened == [(newest / "report.html").as_uri()]
    assert "studentNumber=1002" in (newest / "report.html").read_text()
    (tmp_path / "config.xml").write_text('<Config><History reportKeys="false"/></Config>')
    assert json.loads(main("20260101-020000", "--json")) == {"report": f"{older}/report.html"}
    (newest / "summary.json").unlink()
    assert sgsync.main(["report", "--home", str(tmp_path)]) == 5
    assert "summary.json: is missing or cannot be read" in capsys.readouterr().err


# ------------------------------------------------------------------ in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), "")
MEASURE = """<script>addEventListener("load", () => {
  const told = [], page = document.documentElement
  for (const element of document.querySelectorAll("main *"))
    if (element.getBoundingClientRect().right > page.clientWidth + 1) told.push(element.tagName)
  parent.postMessage([innerWidth, page.scrollWidth - page.clientWidth, told.join()].join(" "), "*")
})</script>"""
FRAMES = """<body><script>addEventListener("message", event => {
  const line = document.createElement("p"); line.textContent = event.data
  document.body.append(line)
})</script>"""


@pytest.mark.skipif(not BROWSER, reason="no chromium and no google-chrome")
def test_report_does_not_scroll_sideways(tmp_path: Path) -> None:
    """Neither on a desktop nor on a phone, in frames of their widths."""
    folder = rich_run(tmp_path / "history", "a_rather_long_name_of_a_file" * 4 + ".csv", "x" * 300)
    kept.run(tmp_path / "history", "20260101-020000", seconds=123456.0)
    report(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    policy = r'<meta http-equiv="Content-Security-Policy"[^>]*>'  # else it would run no script
    measured, policies = re.subn(policy, "", text)
    assert policies == 1
    (tmp_path / "report.html").write_text(measured.replace("</body>", MEASURE + "</body>"))
    frames = [f'<iframe src="report.html" width="{width}" height="800" style="border:0"></iframe>'
              for width in (1200, 390)]  # fmt: skip
    (tmp_path / "frames.html").write_text(FRAMES + "".join(frames))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
         "--window-size=1300,900", "--dump-dom", (tmp_path / "frames.html").as_uri()],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    assert sorted(re.findall(r"<p>(.*?)</p>", done.stdout)) == ["1200 0 ", "390 0 "]


# ------------------------------------------------------------------ the log as JSON


def test_log_as_json_for_collectors(sqlite_home: homes.Home) -> None:
    home = sqlite_home
    home.extract([("1001", "2026-01-05", "BAD", "Ann")])
    done = home.process("--log-format", "json")
    assert done.returncode == 8
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all(list(line) == ["time", "level", "run", "message"] for line in lines)
    assert {line["run"] for line in lines} == {home.run.name}
    assert {line["level"] for line in lines} == {"info", "warning", "error"}
    assert all(re.fullmatch(r"[-0-9]{10} [0-9:.]{12}[-+]\d\d:\d\d", line["time"]) for line in lines)
    plain = [re.sub(r"^\S+ \S+ \w+ +", "", line) for line in home.log.splitlines()]
    assert [line["message"] for line in lines] == plain  # and the log file stays for people
    (home.path / "config.xml").unlink()
    done = home.process("--log-format", "json")
    last = json.loads(done.stderr.splitlines()[-1])
    assert last["level"] == "error"
    assert "\nTry: name the folder that holds config.xml with --home" in last["message"]


def test_log_as_json_holds_no_secret_and_no_control_character() -> None:
    sgsync.keep_secret(['pass"word'])
    record = sgsync.logging.LogRecord("x", 20, "", 0, 'a pass"word\x1b\nb', (), None)
    told = json.loads(sgsync.JsonFormatter().format(record))
    assert (told["message"], told["run"]) == ("a ***\\x1b\nb", "")


# ------------------------------------------------------------------ metrics


def samples(path: Path) -> Iterator[tuple[str, dict[str, str], float]]:
    """What a strict parser reads."""
    for family in openmetrics.text_string_to_metric_families(path.read_text(encoding="utf-8")):
        assert family.type == "gauge"
        assert family.documentation
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def value(path: Path, name: str, **labels: str) -> list[float]:
    wanted = labels.items()
    return [found for told, has, found in samples(path) if told == name and wanted <= has.items()]


def test_metrics_tell_of_the_last_run(sqlite_home: homes.Home, tmp_path: Path) -> None:
    home, path = sqlite_home, sqlite_home.path / "out/sgsync.prom"
    section = sgsync.SectionSummary("gpa.csv", "GPA", rows=7, without={}, null_days=0)
    other = home.path / "history/schoolinks"
    folder = kept.run(other, "20260102-020000", files=[], sections=[section])
    told: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(told | {"command": "schoolinks"}))
    home.configure(history='<History metrics="out/sgsync.prom"/>')
    home.extract([("1001", "2026-01-05", "LOCKED", "Ann"), ("1002", "2026-01-05", "BAD", "Bob")])
    assert home.main() == 8
    assert value(path, "sgsync_run_exit_code", command="sync") == [8]
    assert value(path, "sgsync_run_outcome", command="sync", outcome="partial") == [1]
    for result, count in (("found", 2), ("applied", 1), ("failed", 1), ("left_alone", 0)):
        labels = {"file": "iep.csv", "operation": "insert", "result": result}
        assert value(path, "sgsync_rows", home=str(home.path), **labels) == [count]
    assert value(path, "sgsync_file_rows", command="schoolinks", file="gpa.csv") == [7]
    assert value(path, "sgsync_success_timestamp_seconds", command="sync") == []
    (duration,) = value(path, "sgsync_run_duration_seconds", command="sync")
    assert duration == home.summary["seconds"]
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o644
    home.extract([("1001", "2026-01-05", "LOCKED", "Ann")], epoch="20260102-139029")
    assert home.main() == 0
    (success,) = value(path, "sgsync_success_timestamp_seconds", command="sync")
    home.configure(query="nonsense")  # a run that failed, its config read
    assert home.main() == 4
    assert value(path, "sgsync_run_exit_code", command="sync") == [4]
    assert value(path, "sgsync_success_timestamp_seconds", command="sync") == [success]
    assert value(path, "sgsync_rows", command="sync") == []
    before = path.read_bytes()
    home.configure(upload="<SQL>")  # a config that cannot be read names no file
    assert home.main() == 2
    assert path.read_bytes() == before


def test_metrics_escape_labels(tmp_path: Path) -> None:
    metrics = sgsync.Metrics(tmp_path / 'a"b\\c\nd')
    metrics.add(kept.summary([], started="2026-01-01T02:00:00+00:00", files=[
        sgsync.FileSummary('x"y\\.csv')]), None)  # fmt: skip
    path = tmp_path / "m"
    path.write_text(str(metrics), encoding="utf-8")
    found = list(samples(path))
    assert {labels["home"] for _, labels, _ in found} == {str(tmp_path / 'a"b\\c\nd')}
    assert len(value(path, "sgsync_rows", file='x"y\\.csv')) == 12


def test_metrics_that_cannot_be_written_change_nothing_of_the_outcome(
    sqlite_home: homes.Home,
) -> None:
    sqlite_home.extract([("1001", "2026-01-05", "LOCKED", "Ann")])
    sqlite_home.configure(history='<History metrics="config.xml/m.prom"/>')
    assert sqlite_home.main() == 0
    assert "config.xml/m.prom: could not be written: " in sqlite_home.log
