"""The writing: procedures and statements, batches, bad rows, deadlocks, lost connections."""

from __future__ import annotations

import contextlib
import csv
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sgsync
from support import homes, servers

pytestmark = pytest.mark.usefixtures("short_pauses", "no_sftp")

RETRIES = sgsync.RETRY_ATTEMPTS - 1
NAMES = ["Ann", "Bob", "Cid", "Dee", "Eve", "Fay", "Gus"]
ROWS = [(f"100{n}", "2026-01-05", "LOCKED", name) for n, name in enumerate(NAMES)]
CALLS = homes.CALLS


def bad(row: homes.Row) -> homes.Row:
    """The same row as the database refuses it."""
    return (*row[:2], "BAD", row[3])


def key(row: homes.Row) -> str:
    return f"studentNumber={row[0]}, startDate={row[1]}"


def failures(home: homes.Home) -> list[list[str]]:
    with (home.run / "failures.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def tried_again(home: homes.Home) -> int:
    return home.log.count("trying again")


def undone_batches(home: homes.Home) -> int:
    return home.log.count("its rows are tried one by one")


def procedure(home: homes.Home, body: str, declare: str = "") -> None:
    """Replace PostgreSQL's sg_iep_upsert(n, d, s, m); {upsert} in `body` does what it did."""
    upsert = (
        "INSERT INTO iep VALUES (n, d, s, m) ON CONFLICT (studentNumber, startDate) "
        "DO UPDATE SET status = s, manager = m;"
    )
    home.database.execute(
        "CREATE OR REPLACE PROCEDURE sg_iep_upsert(n text, d text, s text, m text) "
        f"LANGUAGE plpgsql AS $$ {declare} BEGIN {body.format(upsert=upsert)} END $$"
    )


# ------------------------------------------------------------------ what is called


def test_apply_brings_the_database_in_step(home: homes.Home) -> None:
    home.sis([*ROWS[2:4], ("1006", "2026-01-05", "LOCKED", "Gus"), ("1009", "x", "y", "z")])
    source = [*ROWS[:3], (*ROWS[3][:3], "Changed"), ("1006", "2026-01-05", "OPEN", "")]
    home.extract(source)
    assert home.main() == 0
    assert home.sis_rows() == source
    line = home.summary["files"][0]
    assert (line["file"], line["source_rows"], line["target_rows"]) == ("iep.csv", 5, 4)
    assert home.counts("found") == home.counts("applied") == (2, 2, 1)
    assert home.counts("failed") == (0, 0, 0)
    assert home.summary["message"] == "2 rows inserted, 2 rows updated, 1 row deleted"
    assert home.database.rows("SELECT count(*) FROM iep WHERE manager IS NULL") == [(1,)]
    assert not (home.run / "failures.csv").exists()


RAISING = {
    "sqlite": [
        f"CREATE TRIGGER no_{what} BEFORE {what} ON iep BEGIN SELECT RAISE(ABORT, 'called'); END"
        for what in ("INSERT", "UPDATE", "DELETE")
    ],
    "postgresql": [
        "CREATE OR REPLACE PROCEDURE sg_iep_upsert(n text, d text, s text, m text) "
        "LANGUAGE plpgsql AS $$ BEGIN RAISE 'called'; END $$",
        "CREATE OR REPLACE PROCEDURE sg_iep_delete(n text, d text) "
        "LANGUAGE plpgsql AS $$ BEGIN RAISE 'called'; END $$",
    ],
    "mssql": [
        "ALTER PROCEDURE sg_iep_upsert @n nvarchar(20), @d nvarchar(10), @s nvarchar(20), "
        "@m nvarchar(200) AS RAISERROR('called', 16, 1)",
        "ALTER PROCEDURE sg_iep_delete @n nvarchar(20), @d nvarchar(10) AS "
        "RAISERROR('called', 16, 1)",
    ],
}


def test_apply_calls_nothing_on_a_quiet_night(home: homes.Home) -> None:
    home.extract(ROWS)
    home.sis(ROWS)
    for statement in RAISING[home.database.kind]:
        home.database.execute(statement)
    assert home.main() == 0
    assert home.summary["message"] == "nothing to do: both sides are equal"
    assert "applied" not in home.log


@pytest.mark.parametrize("without", ["Insert", "Update", "Delete"])
def test_apply_leaves_alone_what_has_no_element(home: homes.Home, without: str) -> None:
    lines = [line for line in CALLS.splitlines() if f"<{without}" not in line]
    if home.database.kind == "sqlite":
        left = homes.STATEMENTS.split(f"<{without}")
        lines = [left[0], left[1].split(f"</{without}>")[1]]
    home.configure(calls="\n".join(lines))
    home.sis([(*ROWS[1][:3], "Old"), ROWS[2]])
    home.extract(ROWS[:2])
    assert home.main() == 0
    expected = {
        "Insert": ROWS[1:2],
        "Update": [ROWS[0], (*ROWS[1][:3], "Old")],
        "Delete": ROWS[:3],
    }
    assert home.sis_rows() == expected[without]
    assert f"iep.csv: 1 {without.lower()} left alone: config.xml has no <{without}> " in home.log
    assert home.summary["message"].endswith(", 1 row left alone")
    changes = (home.run / "diff/iep.csv").read_text()
    assert f"\n{without.lower()}," in changes


def second_table(home: homes.Home) -> str:
    """A second file, of a table `sp`, and procedures that write down that they were called."""
    home.database.execute("CREATE TABLE sp (id text, name text)")
    home.database.execute("CREATE TABLE called (n serial, what text)")
    home.database.execute(
        "CREATE PROCEDURE sp_put(i text, x text) LANGUAGE sql AS "
        "'INSERT INTO sp VALUES (i, x); INSERT INTO called (what) VALUES (''sp '' || i)'"
    )
    home.database.execute(
        "CREATE OR REPLACE PROCEDURE sg_iep_delete(n text, d text) LANGUAGE sql AS "
        "'DELETE FROM iep WHERE studentNumber = n; "
        "INSERT INTO called (what) VALUES (''delete '' || n)'"
    )
    procedure(home, "{upsert} INSERT INTO called (what) VALUES ('upsert ' || n);")
    return (
        '<SQLDiff file="sp.csv" key="id"><Query>SELECT id AS "id", name AS "name" FROM sp '
        'ORDER BY id COLLATE "C"</Query><Insert procedure="sp_put"/></SQLDiff>'
    )


def test_apply_keeps_the_order_of_files_and_operations(postgres_home: homes.Home) -> None:
    home = postgres_home
    home.configure(more=second_table(home), database='batchSize="2"')
    home.sis([(*ROWS[1][:3], "Old"), ROWS[2], ROWS[3]])
    home.extract(files={"iep.csv": homes.csv_text(ROWS[:2]), "sp.csv": "id,name\r\n1,a\r\n2,b\r\n"})
    assert home.main() == 0
    called = [what for (what,) in home.database.rows("SELECT what FROM called ORDER BY n")]
    assert called == ["delete 1002", "delete 1003", "upsert 1001", "upsert 1000", "sp 1", "sp 2"]
    assert [line["file"] for line in home.summary["files"]] == ["iep.csv", "sp.csv"]


def test_apply_passes_the_parameters_that_are_named(postgres_home: homes.Home) -> None:
    home = postgres_home
    home.database.execute(
        "CREATE PROCEDURE put(m text, n text) LANGUAGE sql "
        "AS 'INSERT INTO iep VALUES (n, ''d'', ''s'', m)'"
    )
    home.configure(calls='<Insert procedure="put" parameters="manager, studentNumber"/>')
    home.extract(ROWS[:2])
    assert home.main() == 0
    assert home.sis_rows() == [(n, "d", "s", m) for n, _, _, m in ROWS[:2]]


def test_apply_refuses_a_parameter_that_is_no_column(home: homes.Home) -> None:
    home.configure(calls='<Insert procedure="put" parameters="manager,grade"/>')
    home.extract(ROWS)
    assert home.refused(2) == (
        f"config.xml:{home.line('<SQLDiff')}: <Insert> of iep.csv: parameters= names 'grade', "
        "which is no column of the file\n"
        "Try: the columns are studentNumber, startDate, status, manager"
    )


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO iep VALUES (?, ?, 'it''s ?', 'x -- ?') -- why?",
        "INSERT INTO iep VALUES (?, ?, 'it''s ?', 'x -- ?') ; ",
        "{{CALL sg_iep_upsert(?, ?, 'it''s ?', 'x -- ?')}}",
    ],
)
def test_apply_runs_a_statement_for_many_rows_at_once(
    postgres_home: homes.Home, statement: str
) -> None:
    home = postgres_home
    text = statement.replace("{{", "{").replace("}}", "}")
    home.configure(calls=f'<Insert parameters="studentNumber,startDate">{text}</Insert>')
    home.extract([(*row[:2], "it's ?", "x -- ?") for row in ROWS])
    assert home.main() == 0
    assert home.sis_rows() == [(*row[:2], "it's ?", "x -- ?") for row in ROWS]
    assert undone_batches(home) == 0


def test_apply_takes_the_whole_row_as_key_where_there_is_none(home: homes.Home) -> None:
    """A change is then a delete and an insert; the delete comes first and frees the key."""
    call = CALLS.replace('"sg_iep_delete"', '"sg_iep_delete" parameters="studentNumber,startDate"')
    home.configure(calls=homes.STATEMENTS if home.database.kind == "sqlite" else call)
    path = home.path / "config.xml"
    text = path.read_text().replace(' key="studentNumber,startDate"', "")
    path.write_text(text)
    home.sis(ROWS[:2])
    home.extract([ROWS[0], (*ROWS[1][:3], "New")])
    assert home.main() == 0
    assert home.sis_rows() == [ROWS[0], (*ROWS[1][:3], "New")]
    assert home.summary["message"] == "1 row inserted, 0 rows updated, 1 row deleted"


NOTE = {
    "sqlite": ("text", "<Insert parameters='id,body'>INSERT INTO note VALUES (?, ?)</Insert>"),
    "postgresql": ("text", "<Insert procedure='put_note'/>"),
    "mssql": ("nvarchar(max)", "<Insert procedure='put_note'/>"),
}
HARD = [
    'a "quoted" word, and a comma',
    "two\r\nlines",
    "one\nfeed",
    "Zoë Ñandú 😀 中文",
    "'; DROP TABLE iep; --",
    "?, ?",
    "{braces} %s $1 :x",
    "\\backslash\\n",
    "  blanks  ",
    "\ttab",
    "x" * 200_000,
    "é" * 5_000,
    *("x" * count for count in (2000, 2001, 4000, 4001, 8001, 10_000)),
    *("😀" * count for count in (1999, 2000, 2001, 4000, 10_000)),  # two UTF-16 units each
    "NULL",
    "0",
    "",
]


def test_apply_brings_every_character_to_the_database(home: homes.Home) -> None:
    kind, call = NOTE[home.database.kind]
    home.database.execute(f"CREATE TABLE note (id varchar(9), body {kind})")
    if home.database.kind == "postgresql":
        home.database.execute(
            "CREATE PROCEDURE put_note(i text, b text) LANGUAGE sql "
            "AS 'INSERT INTO note VALUES (i, b)'"
        )
    if home.database.kind == "mssql":
        home.database.execute(
            "CREATE PROCEDURE put_note @i nvarchar(9), @b nvarchar(max) AS "
            "INSERT INTO note VALUES (@i, @b)"
        )
    home.configure(
        more='<SQLDiff file="note.csv" key="id"><Query>SELECT id AS "id", body AS "body" '
        f"FROM note ORDER BY id</Query>{call}</SQLDiff>"
    )
    rows = [(f"{number:02}", value) for number, value in enumerate(HARD)]
    text = "".join(f'{n},"{v.replace(chr(34), chr(34) * 2)}"\r\n' for n, v in rows)
    home.extract(files={"iep.csv": homes.csv_text([]), "note.csv": "id,body\r\n" + text})
    assert home.main() == 0
    assert undone_batches(home) == 0
    found = home.database.rows("SELECT id, body FROM note ORDER BY id")
    assert found == [(n, v or None) for n, v in rows]
    assert home.main() == 0  # and what comes back from there is the same
    assert home.summary["message"] == "nothing to do: both sides are equal"


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_apply_takes_batches_of_any_size(home: homes.Home, size: int) -> None:
    rows = [(f"{n:05}", "2026-01-05", "LOCKED", f"m{n}") for n in range(40)]
    home.configure(database=f'batchSize="{size}"')
    home.extract(rows)
    assert home.main() == 0
    assert home.sis_rows() == rows


# ------------------------------------------------------------------ bad rows


REASON = {
    "sqlite": "the statement of <Insert>: bad status",
    "postgresql": "sg_iep_upsert: ERROR: student {}: bad status",
    "mssql": "sg_iep_upsert: student {}: bad status",
}


@pytest.mark.parametrize("which", [(0,), (1, 2), (3, 5, 6)])
def test_apply_fails_the_bad_rows_alone(home: homes.Home, which: Sequence[int]) -> None:
    home.configure(database='batchSize="3"')
    home.extract([bad(row) if n in which else row for n, row in enumerate(ROWS)])
    assert home.main() == 8
    assert home.sis_rows() == [row for n, row in enumerate(ROWS) if n not in which]
    kind = home.database.kind
    found = failures(home)
    assert found[0] == ["operation", "key", "line", "procedure", "error"]
    name = "SQL" if kind == "sqlite" else "sg_iep_upsert"
    told = [["insert", key(ROWS[n]), str(n + 2), name] for n in which]
    assert [row[:4] for row in found[1:]] == told
    for row, n in zip(found[1:], which, strict=True):
        assert row[4].startswith(REASON[kind].format(ROWS[n][0]))
    assert undone_batches(home) == len({n // 3 for n in which if n != 6})  # 6 stands alone
    assert home.counts("found") == (len(ROWS), 0, 0)
    assert home.counts("failed") == (len(which), 0, 0)
    assert home.counts("applied") == (len(ROWS) - len(which), 0, 0)
    assert home.summary["outcome"] == "partial"
    assert home.summary["message"].startswith(
        f"{sgsync.plural(len(which), 'row')} failed, see failures.csv; "
        f"{sgsync.plural(len(ROWS) - len(which), 'row')} inserted, 0 rows updated, "
    )
    for n in which:
        assert NAMES[n] not in home.log
        assert f" ERROR   insert of {key(ROWS[n])} failed: {name}" in home.log
    assert home.pushed()["failures.csv"] == (home.run / "failures.csv").read_bytes()
    assert home.pushed()["COMPLETE"] == b""  # all was tried, and the reasons are told


def test_apply_tells_bad_rows_of_every_operation(postgres_home: homes.Home) -> None:
    home = postgres_home
    home.database.execute(
        "CREATE OR REPLACE PROCEDURE sg_iep_delete(n text, d text) LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE 'document of % is locked', n; END $$"
    )
    home.sis([ROWS[1], (*ROWS[2][:3], "Old")])
    home.extract([bad(ROWS[0]), bad(ROWS[2]), ROWS[3]])
    assert home.main() == 8
    assert [row[:2] for row in failures(home)[1:]] == [
        ["delete", key(ROWS[1])],
        ["update", key(ROWS[2])],
        ["insert", key(ROWS[0])],
    ]
    assert failures(home)[1][4] == "sg_iep_delete: ERROR: document of 1001 is locked"
    assert home.sis_rows() == [ROWS[1], (*ROWS[2][:3], "Old"), ROWS[3]]


def test_apply_stops_beyond_max_failures(home: homes.Home) -> None:
    home.configure(limits='maxFailures="1"', database='batchSize="2"')
    home.extract([ROWS[0], bad(ROWS[1]), ROWS[2], bad(ROWS[3]), ROWS[4]])
    message = home.failed(4)
    name = "SQL" if home.database.kind == "sqlite" else "sg_iep_upsert"
    reason = REASON[home.database.kind].format("1003")
    assert message.startswith(
        f"stopped: more than maxFailures=1 rows failed; the last one: insert of {key(ROWS[3])}: "
        f"{'SQL: ' if name == 'SQL' else ''}{reason}"
    )
    assert message.endswith(
        f"\nTry: look at {home.run / 'failures.csv'}; the rows already written stay, and the next "
        "run continues from there"
    )
    assert home.counts("applied") == (2, 0, 0)
    assert len(failures(home)) == 3
    assert home.sis_rows() == [ROWS[0], ROWS[2]]
    assert not list((home.sftp_root / "upload").iterdir())


def test_apply_stops_at_the_first_failure_where_none_is_allowed(home: homes.Home) -> None:
    home.configure(limits='maxFailures="0"')
    home.extract([bad(ROWS[0]), ROWS[1]])
    assert home.failed(4).startswith("stopped: more than maxFailures=0 rows failed; ")
    assert home.sis_rows() == []


def test_apply_tells_no_personal_data(postgres_home: homes.Home) -> None:
    """PostgreSQL's DETAIL and its messages quote values; only the key may be told."""
    home = postgres_home
    home.database.execute("CREATE UNIQUE INDEX ON iep (manager)")
    home.database.execute("ALTER TABLE iep ADD CHECK (status <> 'odd status')")
    procedure(home, "IF s = 'cast' THEN PERFORM m::integer; END IF; {upsert}")
    home.sis([("0001", "2026-01-05", "LOCKED", "Secret Person")])
    lines = [
        homes.HEADER,
        "0001,2026-01-05,LOCKED,Secret Person",
        "1000,2026-01-05,LOCKED,Secret Person",
        '1001,2026-01-05,cast,"Hidden, (Name)"',
        "1002,2026-01-05,odd status,Covert",
    ]
    home.extract(files={"iep.csv": "\r\n".join(lines)})
    assert home.main("--verbose") == 8
    assert [[row[1], *row[3:]] for row in failures(home)[1:]] == [
        [
            f"studentNumber={number}, startDate=2026-01-05",
            "sg_iep_upsert",
            f"sg_iep_upsert: ERROR: {reason}",
        ]
        for number, reason in (
            ("1000", 'duplicate key value violates unique constraint "iep_manager_idx"'),
            ("1001", 'invalid input syntax for type integer: "..."'),
            ("1002", 'new row for relation "iep" violates check constraint "iep_status_check"'),
        )
    ]
    told = home.log + (home.run / "summary.json").read_text()
    for value in ("Secret", "Hidden", "odd status", "Covert", "DETAIL"):
        assert value not in told


WORDS = st.text(st.sampled_from("0125-ab "), min_size=1, max_size=6).map(str.strip).filter(bool)


def whole(word: str, text: str) -> list[int]:
    """Where a word, or several, stands by itself."""
    found = re.finditer(rf"(?<!\w)(?={re.escape(word)}(?!\w))", text)
    return [match.start() for match in found]


@given(
    keys=st.sets(WORDS, max_size=3),
    values=st.sets(WORDS, max_size=4),
    more=st.lists(st.sampled_from(["error", "at", "2026-05", "(", ")", "05"]), max_size=4),
    data=st.data(),
)
def test_masked_keeps_keys_and_no_value(
    keys: set[str], values: set[str], more: list[str], data: st.DataObject
) -> None:
    values -= keys
    pieces = data.draw(st.lists(st.sampled_from([*keys, *values, *more, "x"]), max_size=8))
    text = data.draw(st.sampled_from([" ", ": ", "/"])).join(pieces)
    told = sgsync.masked(text, keys, values)
    spans = [(at, at + len(key)) for key in keys for at in whole(key, text)]
    masks = [
        (at, at + len(value))
        for value in values
        if len(value) > 1
        for at in whole(value, text)
        if not any(a <= at and at + len(value) <= b and b - a > 1 for a, b in spans)
    ]
    hidden = {n for a, b in masks for n in range(a, b)}
    shown = [char if n not in hidden else None for n, char in enumerate(text)]
    # what is left is just what no mask covers, in order, and each gap is told by one mask
    expected = re.sub("\0+", "...", "".join("\0" if char is None else char for char in shown))
    assert told.replace("......", "...") == expected
    for a, b in spans:
        if not hidden & set(range(a, b)):
            assert text[a:b] in told


def test_apply_tells_the_whole_key_where_a_part_of_it_equals_a_value(
    postgres_home: homes.Home,
) -> None:
    """As `2026-01-...` where the manager is called `05`."""
    home = postgres_home
    procedure(home, "RAISE '% of % is locked by %', d, n, m;")
    home.extract([("1001", "2026-01-05", "01", "05"), ("1002", "2026-01-05", "x", "1002 Lee")])
    assert home.main() == 8
    assert [row[4] for row in failures(home)[1:]] == [
        "sg_iep_upsert: ERROR: 2026-01-05 of 1001 is locked by ...",
        "sg_iep_upsert: ERROR: 2026-01-05 of 1002 is locked by ...",
    ]


# ------------------------------------------------------------------ what no row is to blame for


def test_apply_stops_where_the_procedure_does_not_exist(postgres_home: homes.Home) -> None:
    home = postgres_home
    home.configure(calls=CALLS.replace("sg_iep_upsert", "sg_iep_upset"))
    home.extract(ROWS)
    ((name,),) = home.database.rows("SELECT current_database()")
    assert home.refused(4) == (
        f"iep.csv: insert of {key(ROWS[0])}: sg_iep_upset: ERROR: procedure "
        "sg_iep_upset(unknown, unknown, unknown, unknown) does not exist\n"
        f"Try: run procedures.sql in the database {name}, where sgsync looked for it, or correct "
        "connectionString if that is the wrong database"
    )
    assert not (home.run / "failures.csv").exists()


DENIED = {
    "EXECUTE on the procedure": (
        ["GRANT ALL ON iep TO {role}", "REVOKE EXECUTE ON PROCEDURE sg_iep_upsert FROM PUBLIC"],
        "sg_iep_upsert: ERROR: permission denied for procedure sg_iep_upsert",
        "grant EXECUTE on sg_iep_upsert to sgsync's database user",
    ),
    "a right inside the procedure": (
        ["GRANT SELECT ON iep TO {role}"],
        "sg_iep_upsert: ERROR: permission denied for table iep",
        "grant SELECT, INSERT, UPDATE and DELETE on iep to sgsync's database user, or make "
        "sg_iep_upsert SECURITY DEFINER, owned by a user who has these rights",
    ),
    "a schema inside the procedure": (
        [
            "GRANT SELECT ON iep TO {role}",
            "CREATE SCHEMA more", "CREATE TABLE more.t (a int)",
            "CREATE OR REPLACE PROCEDURE sg_iep_upsert(n text, d text, s text, m text) "
            "LANGUAGE plpgsql AS $$ BEGIN UPDATE more.t SET a = 1; END $$",
        ],
        "sg_iep_upsert: ERROR: permission denied for schema more",
        "grant USAGE on more to sgsync's database user, or make sg_iep_upsert SECURITY DEFINER, "
        "owned by a user who has these rights",
    ),
}  # fmt: skip


@contextlib.contextmanager
def limited(home: homes.Home, server: servers.Postgres) -> Iterator[str]:
    """A role without rights, as which the home logs in."""
    role = servers.fresh_name()
    home.database.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
    user = f"UID={servers.Postgres.username};PWD={server.password}"
    connection = home.database.connection_string.replace(user, f"UID={role};PWD=x")
    assert connection != home.database.connection_string
    home.configure(connection=connection)
    try:
        yield role
    finally:
        home.database.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.parametrize(("statements", "reason", "remedy"), DENIED.values(), ids=DENIED.keys())
def test_apply_stops_where_permission_is_denied(
    postgres_home: homes.Home,
    postgres_server: servers.Postgres,
    statements: Sequence[str],
    reason: str,
    remedy: str,
) -> None:
    """And tells the right that is missing: SELECT, which a query needs, is granted."""
    home = postgres_home
    home.extract(ROWS)
    with limited(home, postgres_server) as role:
        for statement in statements:
            home.database.execute(statement.format(role=role))
        message = home.refused(4)
    assert message == f"iep.csv: insert of {key(ROWS[0])}: {reason}\nTry: {remedy}"
    assert not (home.run / "failures.csv").exists()


def test_export_tells_that_select_is_missing(
    postgres_home: homes.Home, postgres_server: servers.Postgres
) -> None:
    postgres_home.extract(ROWS)
    with limited(postgres_home, postgres_server):
        message = postgres_home.refused(4)
    assert message.endswith(
        "ERROR: permission denied for table iep\nTry: grant SELECT on iep to sgsync's database user"
    )


def test_apply_tells_the_right_that_a_statement_lacks(
    postgres_home: homes.Home, postgres_server: servers.Postgres
) -> None:
    home = postgres_home
    home.configure(
        calls="<Insert parameters='studentNumber,startDate,status,manager'>"
        "INSERT INTO iep VALUES (?, ?, ?, ?)</Insert>"
    )
    home.extract(ROWS)
    with limited(home, postgres_server) as role:
        home.database.execute(f"GRANT SELECT ON iep TO {role}")
        message = home.refused(4)
    assert message == (
        f"iep.csv: insert of {key(ROWS[0])}: the statement of <Insert>: ERROR: permission denied "
        "for table iep\n"
        "Try: grant SELECT, INSERT, UPDATE and DELETE on iep to sgsync's database user"
    )


@pytest.mark.parametrize(
    ("right", "thing", "remedy"),
    [
        ("EXECUTE", ("sg_iep_upsert", "dbo"), "grant EXECUTE on dbo.sg_iep_upsert to sgsync's "
         "database user"),
        ("INSERT", ("IEP", "samegoal"), "grant INSERT on samegoal.IEP to sgsync's database user, "
         "or give samegoal.IEP the same owner as dbo.sg_iep_upsert"),
    ],
)  # fmt: skip
def test_remedy_tells_the_right_that_is_missing_on_sql_server(
    right: str, thing: tuple[str, str], remedy: str
) -> None:
    text = (
        f"[42000] [Microsoft][ODBC Driver 18 for SQL Server][SQL Server]The {right} permission was "
        f"denied on the object '{thing[0]}', database 'sis', schema '{thing[1]}'. (229) "
        "(SQLExecDirectW)"
    )
    said = sgsync.DriverMessage("42000", text)
    assert said.remedy("the database sis", "dbo.sg_iep_upsert") == remedy
    assert said.concerns_every_row


def test_apply_stops_where_the_database_does_not_answer(postgres_home: homes.Home) -> None:
    """One call hangs; the rows behind it are not made to wait as long each."""
    home = postgres_home
    home.configure(database='queryTimeoutSeconds="1"')
    procedure(home, "IF n = '1001' THEN PERFORM pg_sleep(60); END IF; {upsert}")
    home.extract(ROWS)
    assert home.failed(4) == (
        f"iep.csv: insert of {key(ROWS[1])}: sg_iep_upsert: no answer from the database for 1 s\n"
        "Try: check the server and the network, or raise queryTimeoutSeconds on <Database>"
    )
    assert home.sis_rows() == ROWS[:1]


def test_apply_undoes_the_loser_of_a_deadlock_and_tries_again(postgres_home: homes.Home) -> None:
    """sgsync changes 1000 and then 1001, another session 1001 and then 1000."""
    home = postgres_home
    home.sis([(*row[:3], "Old") for row in ROWS[:3]])
    home.database.execute("CREATE SEQUENCE calls")
    procedure(
        home,
        "SET LOCAL deadlock_timeout = '10ms'; "
        "IF nextval('calls') = 2 THEN FOR i IN 1..1000 LOOP "
        "EXIT WHEN EXISTS (SELECT FROM pg_locks WHERE NOT granted); PERFORM pg_sleep(0.01); "
        "END LOOP; END IF; {upsert}",
    )
    home.extract(ROWS[:3])
    with home.database.connect(autocommit=False) as other:
        other.execute("SET LOCAL deadlock_timeout = '60s'")  # so that sgsync is the one that loses
        other.execute("UPDATE iep SET status = 'other' WHERE studentNumber = '1001'")

        def collide() -> None:
            free = "SELECT 1 FROM iep WHERE studentNumber = '1000' FOR UPDATE SKIP LOCKED"
            while home.database.rows(free):
                time.sleep(0.01)
            other.execute("UPDATE iep SET status = 'other' WHERE studentNumber = '1000'")
            other.commit()

        collision = threading.Thread(target=collide)
        collision.start()
        assert home.main() == 0
        collision.join()
    assert tried_again(home) == 1
    assert "sg_iep_upsert: ERROR: deadlock detected; trying again" in home.log
    assert undone_batches(home) == 0
    assert home.sis_rows() == ROWS[:3]


def test_apply_gives_up_on_endless_deadlocks(postgres_home: homes.Home) -> None:
    home = postgres_home
    procedure(home, "RAISE EXCEPTION 'deadlock detected' USING ERRCODE = '40P01';")
    home.extract(ROWS)
    assert home.refused(4).startswith(
        f"iep.csv: insert of {key(ROWS[0])}: sg_iep_upsert: ERROR: deadlock detected"
    )
    assert tried_again(home) == 2 * RETRIES  # the batch, and its first row


def test_apply_connects_again_after_a_lost_connection(postgres_home: homes.Home) -> None:
    home = postgres_home
    home.configure(database='batchSize="3"')
    home.database.execute("CREATE SEQUENCE calls")
    procedure(
        home,
        "IF nextval('calls') = 5 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF; "
        "{upsert}",
    )
    home.extract(ROWS)
    assert home.main() == 0
    assert tried_again(home) == 1
    assert home.sis_rows() == ROWS
    assert undone_batches(home) == 0


@pytest.mark.parametrize("before", [True, False])
def test_apply_survives_a_restart_of_the_server_around_a_commit(
    postgres_home: homes.Home,
    postgres_server: servers.Postgres,
    monkeypatch: pytest.MonkeyPatch,
    before: bool,
) -> None:
    """Whether the first commit arrived or not, the batch is done again: procedures allow it."""
    home = postgres_home
    commit, done = sgsync.Database.commit, []

    def restart_first(database: sgsync.Database) -> None:
        if not before:
            commit(database)
        if not done:
            done.append(1)
            postgres_server.restart()
        commit(database)
        database.execute("subject", "SELECT 1")

    monkeypatch.setattr(sgsync.Database, "commit", restart_first)
    home.extract(ROWS)
    assert home.main() == 0
    assert tried_again(home) == 1
    assert home.sis_rows() == ROWS


def test_apply_leaves_the_rest_to_the_next_run_where_the_server_is_gone(
    postgres_home: homes.Home, postgres_server: servers.Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = postgres_home
    home.configure(database='batchSize="2"')
    home.extract(ROWS)
    commits: list[int] = []
    commit = sgsync.Database.commit

    def stop_after_two(database: sgsync.Database) -> None:
        commit(database)
        commits.append(1)
        if len(commits) == 2:
            postgres_server.stop(immediate=True)

    monkeypatch.setattr(sgsync.Database, "commit", stop_after_two)
    message = home.failed(4)
    assert message.startswith(f"iep.csv: insert of {key(ROWS[4])}: ")
    assert "server" in message
    monkeypatch.setattr(sgsync.Database, "commit", commit)
    postgres_server.start()
    assert home.sis_rows() == ROWS[:4]
    assert home.main() == 0
    assert home.sis_rows() == ROWS
    assert home.summary["message"] == "3 rows inserted, 0 rows updated, 0 rows deleted"


def test_apply_ends_at_once_when_it_is_interrupted(postgres_home: homes.Home) -> None:
    """Ctrl-C while a procedure works for a minute: it is cancelled and its batch undone."""
    home = postgres_home
    home.configure(database='batchSize="2"')
    procedure(home, "IF n = '1003' THEN PERFORM pg_sleep(60); END IF; {upsert}")
    home.extract(ROWS)
    command = [sys.executable, str(homes.SCRIPT), "--home", str(home.path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    sleeping = (
        "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND pid <> pg_backend_pid()"
    )
    while not home.database.rows(sleeping):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, console = process.communicate(timeout=50)
    assert process.returncode == 130
    words = "interrupted: 2 rows written so far stay; the next run continues from there"
    assert words in console
    assert home.summary["outcome"] == "interrupted"
    assert words in home.log
    assert not home.database.rows(sleeping)
    assert home.sis_rows() == ROWS[:2]
    assert not (home.run / "COMPLETE").exists()


def test_failures_are_in_the_file_at_once(tmp_path: Path) -> None:
    """Whatever happens to the run afterwards; with the line and, to be corrected, the row."""
    source = 'id,name\r\n1,"A\nb"\r\n2,"say ""x"""\r\n3,Cid\r\n'
    (tmp_path / "ia.csv").write_bytes(source.encode())
    (tmp_path / "ic.csv").write_bytes(b"id,name\r\n0,Zed\r\n")
    calls = {name: sgsync.Call(procedure="p") for name in ("insert", "delete")}
    sql_diff = sgsync.SqlDiff(file="iep.csv", key=("id",), calls=calls)
    paths = [tmp_path / name for name in ("ia.csv", "ic.csv", "diff.csv")]
    found = sgsync.compare(*paths, sql_diff)
    failures = sgsync.Failures(tmp_path, 5)
    assert not (tmp_path / "failures.csv").exists()
    error: Any = sgsync.DatabaseError('p: a "bad" value,\nreally')
    failures.add(found, "insert", ("2", 'say "x"'), error)
    told = 'operation,key,line,procedure,error\r\ninsert,id=2,4,p,"p: a ""bad"" value,\nreally"\r\n'
    assert (tmp_path / "failures.csv").read_bytes().decode() == told
    rejected = tmp_path / "failures" / "iep.csv"
    assert rejected.read_bytes() == b'id,name\r\n2,"say ""x"""\r\n'
    failures.add(found, "insert", ("1", "A\nb"), error)  # again from the first row on
    failures.add(found, "delete", ("0", "Zed"), error)
    rows = list(csv.reader((tmp_path / "failures.csv").open(encoding="utf-8", newline="")))
    assert [row[:3] for row in rows[2:]] == [["insert", "id=1", "2"], ["delete", "id=0", ""]]
    assert rejected.read_bytes() == b'id,name\r\n2,"say ""x"""\r\n1,"A\nb"\r\n'
    assert found.line_of(("9", "x")) == 0
