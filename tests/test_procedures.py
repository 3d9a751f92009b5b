"""config.xml and procedures.sql: the template for Infinite Campus on SQL Server.

The two files must agree with each other and with SQL Server 2012. Three things look at them:

* Microsoft's own T-SQL parser, ScriptDom, which the package maxdop carries. It has the grammar of
  every version since 2008, so it also refuses what came after 2012.
* sqlglot, for the structure of single statements: columns, order, tables.
* A real SQL Server, when SGSYNC_TEST_MSSQL holds an ODBC connection string. The tests make a
  database of their own on it and drop it afterwards.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sqlglot
from lxml import etree
from sqlglot import exp
from sqlglot.optimizer.qualify import qualify

from support import servers

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config.xml"
PROCEDURES = ROOT / "procedures.sql"

MSSQL = os.environ.get("SGSYNC_TEST_MSSQL", "")
needs_mssql = pytest.mark.skipif(
    not MSSQL, reason="SGSYNC_TEST_MSSQL holds no connection string to a SQL Server"
)

CREATED_HERE = re.compile(
    r"IF OBJECT_ID\(N'(?P<name>[\w.]+)', N'(?P<kind>P|FN)'\) IS NULL\s+EXEC \("
)
ALTERED = re.compile(r"^ALTER (?P<kind>PROCEDURE|FUNCTION) (?P<name>[\w.]+)", re.MULTILINE)
COLUMN = re.compile(r"^ {8}(\w+) (n?varchar|int|date|datetime2|bit)\b", re.MULTILINE)
VARIABLE = re.compile(r"(?<!@)@\w+")

# What SQL Server 2012 does not have although its grammar takes it, and MERGE, which it should not
# use: MERGE has faults under concurrency.
TOO_NEW = re.compile(
    r"\b(?:MERGE|STRING_AGG|STRING_SPLIT|STRING_ESCAPE|CONCAT_WS|TRIM|TRANSLATE|DATEDIFF_BIG"
    r"|GREATEST|LEAST|GENERATE_SERIES|DATETRUNC|DATE_BUCKET|APPROX_COUNT_DISTINCT|COMPRESS"
    r"|JSON_\w+|ISJSON|OPENJSON|SESSION_CONTEXT)\b|\bCREATE\s+OR\s+ALTER\b|\bIF\s+EXISTS\s+\w+\."
    r"|\bDROP\s+\w+\s+IF\s+EXISTS\b",
    re.IGNORECASE,
)


# ---------------------------------------------------------------------------------------------
# The two files, read into pieces
# ---------------------------------------------------------------------------------------------


def code_of(script: str) -> str:
    """Blank out comments and the insides of strings; every other character keeps its place."""
    pattern = r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'"

    def blank(match: re.Match[str]) -> str:
        text = match[0]
        edge = "'" if text[0] == "'" else " "
        return edge + re.sub(r"[^\n]", " ", text[1:-1]) + edge

    return re.sub(pattern, blank, script, flags=re.DOTALL)


def split_batches(script: str) -> list[str]:
    """Split at GO, alone on its line and outside comments and strings. A count is left unused."""
    batches, start = [], 0
    for go in re.finditer(r"^[ \t]*GO(?:[ \t]+\d+)?[ \t]*$", code_of(script), re.I | re.M):
        batches.append(script[start : go.start()])
        start = go.end()
    return [batch for batch in [*batches, script[start:]] if code_of(batch).strip()]


BATCHES = split_batches(PROCEDURES.read_text("utf-8"))


@dataclass(frozen=True)
class Procedure:
    """One ALTER PROCEDURE of procedures.sql."""

    name: str
    parameters: tuple[str, ...]
    optional: frozenset[str]
    body: str


@cache
def procedures() -> dict[str, Procedure]:
    """Every procedure by name."""
    found = {}
    for batch in BATCHES:
        match = re.search(r"^ALTER PROCEDURE ([\w.]+)(.*?)^AS$(.*)", batch, re.M | re.S)
        if match:
            declared = re.findall(r"@(\w+) nvarchar\(\d+\)( =)?", match[2])
            found[match[1]] = Procedure(
                name=match[1],
                parameters=tuple(name for name, _ in declared),
                optional=frozenset(name for name, default in declared if default),
                body=match[3],
            )
    return found


@cache
def tables() -> dict[str, dict[str, str]]:
    """Columns and types of every table that procedures.sql makes, by its name in samegoal."""
    return {
        match[1]: dict(COLUMN.findall(batch))
        for batch in BATCHES
        if (match := re.search(r"CREATE TABLE samegoal\.(\w+)", batch))
    }


@dataclass(frozen=True)
class Diff:
    """One SQLDiff of config.xml."""

    file: str
    key: tuple[str, ...]
    trim: bool
    query: str
    procedures: dict[str, str]

    @property
    def select(self) -> exp.Select:
        parsed = sqlglot.parse_one(self.query, dialect="tsql")
        assert isinstance(parsed, exp.Select)
        return parsed

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(column.alias_or_name for column in self.select.selects)


def qualified_by_tables(query: str) -> exp.Select:
    """`query` with the table of every column resolved; an unknown column is an error."""
    dialect = "tsql, normalization_strategy=case_sensitive"
    parsed = sqlglot.parse_one(query, dialect=dialect)
    resolved = qualify(parsed, schema={"samegoal": tables()}, dialect=dialect)
    assert isinstance(resolved, exp.Select)
    return resolved


def read_config() -> etree._Element:
    return etree.parse(str(CONFIG)).getroot()


def read_diffs() -> list[Diff]:
    return [
        Diff(
            file=element.get("file", ""),
            key=tuple(element.get("key", "").split(",")),
            trim=element.get("trim") == "true",
            query=element.findtext("Query", ""),
            procedures={
                operation: element.find(operation).get("procedure")
                for operation in ("Insert", "Update", "Delete")
            },
        )
        for element in read_config().iter("SQLDiff")
    ]


DIFFS = read_diffs()
UPSERTS = [diff.procedures["Insert"] for diff in DIFFS]
by_file = pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: diff.file)


def syntax_error(sql: str) -> str:
    """What the T-SQL grammar of SQL Server 2012 says against `sql`; empty if nothing."""
    beside_python = shutil.which("maxdop", path=str(Path(sys.executable).parent))
    program = beside_python or shutil.which("maxdop")
    assert program, "maxdop is not installed: pip install -r tests/requirements.txt"
    run = subprocess.run(
        [program, "--parser-version", "2012"],
        input=sql,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert run.returncode in (0, 1), run.stderr
    return run.stderr if run.returncode else ""


# ---------------------------------------------------------------------------------------------
# Syntax
# ---------------------------------------------------------------------------------------------


def test_split_batches_splits_at_go_alone_on_its_line() -> None:
    script = (
        "SELECT 1\nGO\nSELECT 2 AS go\n  go 3 \r\nSELECT 'a\nGO\nb'\n/*\nGO\n*/\n-- x\n-- GO\nGO"
    )
    assert split_batches(script.replace("\r", "")) == [
        "SELECT 1\n",
        "\nSELECT 2 AS go\n",
        "\nSELECT 'a\nGO\nb'\n/*\nGO\n*/\n-- x\n-- GO\n",
    ]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT FROM WHERE",
        "CREATE PROCEDURE dbo.p AS BEGIN SET NOCOUNT ON; SELECT 1;",
        "ALTER PROCEDURE dbo.p @a nvarchar(10) AS BEGIN IF @a = BEGIN SELECT 1; END; END;",
        "ALTER PROCEDURE dbo.p AS BEGIN TRY SELECT 1; END TRY",
        "UPDATE samegoal.IEP WITH (UPDLOCK SET locked = 1;",
        "CREATE OR ALTER PROCEDURE dbo.p AS SELECT 1;",
        "DROP PROCEDURE IF EXISTS dbo.p;",
        "SELECT 1 WHERE 1 IS NOT DISTINCT FROM 2;",
        "SELECT STRING_AGG(a, ',') WITHIN GROUP (ORDER BY a) FROM b;",
    ],
)
def test_syntax_error_is_found_in_what_sql_server_2012_would_refuse(sql: str) -> None:
    assert "ncorrect syntax" in syntax_error(sql) or "nexpected end of file" in syntax_error(sql)


def test_procedures_parse_as_sql_server_2012() -> None:
    assert len(BATCHES) > 30
    wrong = {batch.strip()[:60]: error for batch in BATCHES if (error := syntax_error(batch))}
    assert wrong == {}


@pytest.mark.parametrize(
    "first_line",
    [
        "-- IF OBJECT_ID(N'samegoal.Student') IS NULL",
        "-- IF DATABASE_PRINCIPAL_ID(N'samegoal_service') IS NULL",
    ],
)
def test_commented_examples_parse_once_the_dashes_are_gone(first_line: str) -> None:
    script = PROCEDURES.read_text("utf-8")
    commented = script[script.index(first_line) :].partition("\n-----")[0]
    batches = split_batches(re.sub(r"^-- ?", "", commented, flags=re.M))
    assert batches
    assert [syntax_error(batch) for batch in batches] == [""] * len(batches)


def test_procedures_break_when_one_word_is_lost() -> None:
    """The check above would see a slip in any of the procedures."""
    for batch in BATCHES:
        if ALTERED.search(batch):
            assert syntax_error(re.sub(r"END;\s*\Z", "", batch)), batch[:80]


def test_config_statements_parse_as_sql_server_2012() -> None:
    statements = [element.text for element in read_config().iter("Query", "SQL")]
    assert len(statements) == len(DIFFS) + 3
    assert [syntax_error(statement) for statement in statements] == [""] * len(statements)


@pytest.mark.parametrize(
    "sql",
    [
        "MERGE INTO t USING s ON 1 = 1",
        "CREATE  OR ALTER VIEW v",
        "DROP TABLE IF EXISTS t",
        "SELECT TRIM(a)",
        "SELECT string_agg(a, ',')",
        "SELECT value FROM STRING_SPLIT('a', ',')",
    ],
)
def test_too_new_finds_what_2012_lacks(sql: str) -> None:
    assert TOO_NEW.search(code_of(sql))


def test_procedures_and_queries_use_nothing_newer_than_2012() -> None:
    for sql in [*BATCHES, *(element.text for element in read_config().iter("Query", "SQL"))]:
        assert not TOO_NEW.search(code_of(sql)), sql


def test_procedures_file_is_plain_ascii() -> None:
    """sqlcmd reads a file without a byte order mark in the code page of the machine."""
    assert PROCEDURES.read_bytes().isascii()


# ---------------------------------------------------------------------------------------------
# procedures.sql: safe to run again, safe in the caller's transaction
# ---------------------------------------------------------------------------------------------


def test_procedures_are_made_only_where_missing_and_then_altered() -> None:
    guarded = [match["name"] for batch in BATCHES for match in CREATED_HERE.finditer(batch)]
    altered = [match["name"] for batch in BATCHES for match in ALTERED.finditer(batch)]
    assert guarded == altered
    assert len(set(altered)) == len(altered)


def test_procedures_drop_nothing_and_delete_nothing() -> None:
    for batch in BATCHES:
        assert not re.search(r"\b(?:DROP|TRUNCATE|DELETE)\b", code_of(batch), re.I), batch


def test_procedures_create_tables_and_the_schema_only_where_missing() -> None:
    for batch in BATCHES:
        code = code_of(batch)
        if created := re.search(r"CREATE TABLE (samegoal\.\w+)", code):
            assert f"IF OBJECT_ID(N'{created[1]}') IS NULL\n    CREATE TABLE" in batch
        else:
            assert not re.search(r"\bCREATE\b", code, re.I), batch
    assert any("IF SCHEMA_ID(N'samegoal') IS NULL" in batch for batch in BATCHES)


def test_procedures_file_sets_its_options_first() -> None:
    options = code_of(BATCHES[0]).split(";")
    assert [option.strip() for option in options][:2] == [
        "SET ANSI_NULLS ON",
        "SET QUOTED_IDENTIFIER ON",
    ]


def test_procedures_that_stop_in_a_system_database_end_with_noexec_off() -> None:
    assert sum("SET NOEXEC ON" in batch for batch in BATCHES) == 2
    assert BATCHES[-1].rstrip().endswith("SET NOEXEC OFF;")


def test_procedures_begin_with_nocount_and_leave_the_transaction_alone() -> None:
    assert len(procedures()) >= 12
    for procedure in procedures().values():
        code = code_of(procedure.body)
        first = ["BEGIN", "SET", "NOCOUNT", "ON;", "SET", "XACT_ABORT", "OFF;"]
        assert code.split()[: len(first)] == first, procedure.name
        assert not re.search(r"\b(?:BEGIN|SAVE)\s+TRAN|\bCOMMIT\b|\bROLLBACK\b", code, re.I)


def test_procedures_use_only_variables_that_they_declare() -> None:
    for batch in BATCHES:
        if ALTERED.search(batch):
            code = code_of(batch)
            head, _, body = code.partition("\nAS\n")
            declared = set(VARIABLE.findall(head)) | set(re.findall(r"DECLARE (@\w+)", body))
            used = set(VARIABLE.findall(body))
            assert used <= declared, batch[:80]
            assert declared <= used, f"unused in {batch[:80]}"


def test_procedures_write_only_columns_that_their_tables_have() -> None:
    """Every INSERT and UPDATE, read by sqlglot: its table exists and has all the columns named."""
    checked = 0
    for procedure in procedures().values():
        for sql in re.findall(r"(?:UPDATE|INSERT INTO) samegoal\..*?;", procedure.body, re.S):
            statement = sqlglot.parse_one(sql, dialect="tsql")
            table = tables()[statement.find(exp.Table).name]
            named = {column.name for column in statement.find_all(exp.Column)}
            if isinstance(statement, exp.Insert):
                named |= {column.name for column in statement.this.expressions}
            assert named <= set(table), (procedure.name, named - set(table))
            assert named
            checked += 1
    assert checked == 3 * len(DIFFS)


@by_file
def test_upsert_writes_and_compares_every_column(diff: Diff) -> None:
    """A column left out of the comparison would never be brought into agreement."""
    body = procedures()[diff.procedures["Insert"]].body
    update, insert = (
        sqlglot.parse_one(re.search(rf"{verb} samegoal\..*?;", body, re.S)[0], dialect="tsql")
        for verb in ("UPDATE", "INSERT INTO")
    )
    written = {term.this.name: value_of(term.expression) for term in update.expressions}
    except_ = update.find(exp.Except)
    before = except_.this.selects
    names = [
        name
        for column in before
        for name in sorted({found.name for found in column.find_all(exp.Column)} - {"endedByExit"})
    ]
    compared = dict(zip(names, map(value_of, except_.expression.selects), strict=True))
    columns = [column.name for column in insert.this.expressions]
    inserted = dict(zip(columns, map(value_of, insert.expression.selects), strict=True))

    assert written.pop("retiredDate") == "NULL"
    now = sqlglot.parse_one("SYSDATETIME()", dialect="tsql").sql("tsql")
    assert written.pop("modifiedDate") == inserted.pop("modifiedDate") == now
    if diff.file == "program_flags.csv":  # compared as the query shows it: open if cleanup ended it
        assert written.pop("endedByExit") == inserted.pop("endedByExit") == "0"
        assert before[0].sql("tsql") == "CASE WHEN endedByExit = 0 THEN endDate END"
    assert list(inserted) == ["personID", *diff.columns[1:]]
    assert list(written) == list(compared) == [c for c in diff.columns if c not in diff.key]
    assert written == compared
    assert written.items() <= inserted.items()
    for name, column in zip(names, before, strict=True):
        if tables()[update.this.name][name] == "nvarchar":
            assert "Latin1_General_BIN2" in column.sql("tsql"), f"{name} is not compared exactly"


def value_of(expression: exp.Expression) -> str:
    """The expression as text; CAST(1 AS bit) counts as 1."""
    return (expression.this if isinstance(expression, exp.Cast) else expression).sql("tsql")


@by_file
def test_retired_rows_are_left_out_and_brought_back(diff: Diff) -> None:
    upsert, delete = (
        " ".join(code_of(procedures()[diff.procedures[operation]].body).split())
        for operation in ("Insert", "Delete")
    )
    assert "AND ( retiredDate IS NOT NULL OR EXISTS (" in upsert
    assert "retiredDate = @today" in delete
    assert "AND retiredDate IS NULL;" in delete
    assert "WHERE d.retiredDate IS NULL" in diff.query


@by_file
def test_upsert_refuses_text_longer_than_its_column(diff: Diff) -> None:
    body = procedures()[diff.procedures["Insert"]].body
    table = diff.select.find(exp.From).this.name
    ddl = next(batch for batch in BATCHES if f"CREATE TABLE samegoal.{table}" in batch)
    for column in diff.columns:
        if size := re.search(rf"^ {{8}}{column} nvarchar\((\d+)\)", ddl, re.M):
            assert f"LEN(@{column}) > {size[1]}" in body
            assert f"{column} is longer than {size[1]} characters" in body


# ---------------------------------------------------------------------------------------------
# config.xml agrees with procedures.sql
# ---------------------------------------------------------------------------------------------


def test_config_names_the_files_of_the_template() -> None:
    assert [(diff.file, ",".join(diff.key)) for diff in DIFFS] == [
        ("iep.csv", "studentNumber,startDate"),
        ("services_plan.csv", "studentNumber,startDate"),
        ("evaluation_team_report.csv", "studentNumber,meetingDate"),
        ("special_ed_dates.csv", "studentNumber,eventType,eventDate"),
        ("program_flags.csv", "studentNumber,flag,startDate"),
    ]
    upload = read_config().findall("Upload/SQL")
    assert [element.get("file") for element in upload] == [
        None,
        "open_records.csv",
        "student_mapping.csv",
    ]
    assert upload[0].text == "EXEC dbo.sg_cleanup"


def test_config_has_todos_exactly_where_a_person_must_fill_in() -> None:
    found = [
        (element.tag, name, value.count("TODO(user)"))
        for element in read_config().iter(etree.Element)
        for name, value in element.attrib.items()
        if "TODO" in value
    ]
    assert found == [
        ("SFTP", "host", 1),
        ("SFTP", "username", 1),
        ("Database", "connectionString", 2),
    ]
    assert not any("TODO" in (element.text or "") for element in read_config().iter(etree.Element))


@by_file
def test_config_calls_procedures_with_the_columns_they_expect(diff: Diff) -> None:
    """`procedure=` passes every column in the order of the file; Delete passes the key."""
    for operation, name in diff.procedures.items():
        expected = diff.key if operation == "Delete" else diff.columns
        assert procedures()[name].parameters == expected, name
    assert diff.procedures["Insert"] == diff.procedures["Update"]
    assert procedures()[diff.procedures["Insert"]].optional <= {"locked"}


def test_config_calls_every_procedure_and_grants_name_it() -> None:
    called = {name for diff in DIFFS for name in diff.procedures.values()} | {"dbo.sg_cleanup"}
    assert called == {name for name in procedures() if name.startswith("dbo.")}
    script = PROCEDURES.read_text("utf-8")
    assert called == set(re.findall(r"^-- GRANT EXECUTE ON (\S+) TO ", script, re.M))


@by_file
def test_query_is_sorted_by_its_key_as_code_points(diff: Diff) -> None:
    order = diff.select.args["order"].expressions
    assert tuple(term.find(exp.Column).name for term in order) == diff.key
    for term in order:
        column = term.find(exp.Column)
        assert column.table, "a bare name could mean the text in the SELECT list"
        assert not term.args.get("desc")
        collated = term.sql("tsql").endswith(" COLLATE Latin1_General_BIN2")
        assert collated == (column.name in {"studentNumber", "eventType", "flag"})


@by_file
def test_query_selects_columns_that_exist_and_dates_as_text(diff: Diff) -> None:
    qualified = qualified_by_tables(diff.query)
    sources = {source.alias: source.name for source in qualified.find_all(exp.Table)}
    for selected in qualified.selects:
        column = selected.find(exp.Column)
        kind = tables()[sources[column.table]][column.name]
        as_text = "CONVERT(CHAR(10)," in selected.sql("tsql").upper()
        assert as_text == (selected.alias_or_name.endswith("Date")), selected.sql("tsql")
        assert kind in {"nvarchar", "bit", "date"}
    assert diff.trim, "SQL Server does not see trailing blanks, so both sides must leave them out"


def test_upload_statements_select_columns_that_exist() -> None:
    columns = {}
    for element in read_config().findall("Upload/SQL[@file]"):
        selects = qualified_by_tables(element.text).selects
        columns[element.get("file")] = [column.alias_or_name for column in selects]
    assert columns == {
        "open_records.csv": ["studentNumber", "recordType", "recordID", "name", "startDate"],
        "student_mapping.csv": ["studentNumber", "personID", "stateID"],
    }


def test_a_column_that_does_not_exist_is_found() -> None:
    with pytest.raises(sqlglot.errors.OptimizeError):
        qualified_by_tables("SELECT d.noSuchColumn FROM samegoal.IEP AS d")


# ---------------------------------------------------------------------------------------------
# A real SQL Server
# ---------------------------------------------------------------------------------------------

STUDENT = "100001"
ROWS: dict[str, tuple[str | None, ...]] = {
    "iep.csv": (
        *(STUDENT, "2025-09-01", "2026-08-31", "2025-08-20", "RIEP", "Hören 09", "IE13"),
        *("0", "1", None, "1"),
    ),
    "services_plan.csv": (
        *(STUDENT, "2025-09-01", None, "2025-08-20", "05", 'St. Ann\'s, "East"', "0", "1"),
    ),
    "evaluation_team_report.csv": (
        *(STUDENT, "2025-05-02", "IETR", "2025-03-01", None, "CNGI", "05", None, "1"),
    ),
    "special_ed_dates.csv": (STUDENT, "IETR", "2025-05-02", "ET05", "2025-05-02", None, "**"),
    "program_flags.csv": (STUDENT, "Student has an IEP", "2025-09-01", None),
}
by_row = pytest.mark.parametrize(
    ("diff", "row"), [(diff, ROWS[diff.file]) for diff in DIFFS], ids=[d.file for d in DIFFS]
)


def install(connection: Any) -> None:
    for batch in BATCHES:
        execute(connection, batch)


def execute(connection: Any, sql: str, *values: str | None) -> list[tuple[Any, ...]]:
    """Run one statement to its end, since an error can hide behind the first result."""
    cursor = connection.cursor()
    cursor.execute(sql, *values)
    rows: list[tuple[Any, ...]] = []
    while True:
        if cursor.description:
            rows += [tuple(row) for row in cursor.fetchall()]
        if not cursor.nextset():
            cursor.close()
            return rows


def call(connection: Any, procedure: str, *values: str | None) -> None:
    marks = ", ".join("?" * len(values))
    execute(connection, f"EXEC {procedure} {marks}".rstrip(), *values)


def exported(connection: Any, diff: Diff) -> list[tuple[str | None, ...]]:
    """The rows of the query as the CSV file would hold them."""
    return [
        tuple(None if v is None else str(int(v)) if isinstance(v, bool) else v for v in row)
        for row in execute(connection, diff.query)
    ]


def table_of(diff: Diff) -> str:
    return f"samegoal.{diff.select.find(exp.From).this.name}"


def untouched(connection: Any, diff: Diff) -> bool:
    """Whether no row was written since `modifiedDate` was last set back to 2000."""
    rows = execute(connection, f"SELECT modifiedDate FROM {table_of(diff)}")
    return bool(rows) and all(str(modified).startswith("2000-01-01") for (modified,) in rows)


def set_back(connection: Any, diff: Diff) -> None:
    execute(connection, f"UPDATE {table_of(diff)} SET modifiedDate = '2000-01-01'")


@pytest.fixture(scope="module")
def installed() -> Iterator[servers.Database]:
    """A new database with procedures.sql in it and one student."""
    import pyodbc

    with servers.mssql_database(MSSQL) as database:
        connection = pyodbc.connect(database.connection_string, autocommit=True)
        install(connection)
        execute(connection, f"INSERT INTO samegoal.Student (studentNumber) VALUES ('{STUDENT}')")
        connection.close()
        yield database


@pytest.fixture
def connection(installed: servers.Database) -> Iterator[Any]:
    """A connection to that database whose changes are taken back after the test."""
    import pyodbc

    connection = pyodbc.connect(installed.connection_string)
    yield connection
    connection.rollback()
    connection.close()


@needs_mssql
def test_install_twice_keeps_rows_and_grants(connection: Any) -> None:
    execute(connection, "CREATE USER sgsync_tester WITHOUT LOGIN")
    execute(connection, "GRANT EXECUTE ON dbo.sg_iep_upsert TO sgsync_tester")
    call(connection, "dbo.sg_iep_upsert", *ROWS["iep.csv"])
    objects = "SELECT name, object_id FROM sys.objects WHERE is_ms_shipped = 0 ORDER BY name"
    before = execute(connection, objects)
    install(connection)
    assert execute(connection, objects) == before
    assert exported(connection, DIFFS[0]) == [ROWS["iep.csv"]]
    grants = "SELECT COUNT(*) FROM sys.database_permissions WHERE class = 1 AND type = 'EX'"
    assert execute(connection, grants) == [(1,)]


@needs_mssql
def test_install_leaves_a_name_of_the_district_alone(connection: Any) -> None:
    """Also a table without the defaults and constraints of the one that is made."""
    diff = DIFFS[3]
    execute(connection, "SELECT * INTO dbo.DistrictDates FROM samegoal.SpecialEdDate")
    execute(connection, "DROP TABLE samegoal.SpecialEdDate")
    execute(connection, "CREATE SYNONYM samegoal.SpecialEdDate FOR dbo.DistrictDates")
    install(connection)
    call(connection, diff.procedures["Insert"], *ROWS[diff.file])
    assert exported(connection, diff) == [ROWS[diff.file]]
    assert execute(connection, "SELECT COUNT(*) FROM dbo.DistrictDates") == [(1,)]


@needs_mssql
def test_install_refuses_a_system_database(connection: Any) -> None:
    import pyodbc

    execute(connection, "USE tempdb")
    with pytest.raises(pyodbc.Error, match="system database"):
        install(connection)
    execute(connection, "SET NOEXEC OFF")


@needs_mssql
@by_row
def test_upsert_gives_the_row_that_was_sent(
    diff: Diff, row: tuple[str, ...], connection: Any
) -> None:
    call(connection, diff.procedures["Insert"], *row)
    assert exported(connection, diff) == [row]


@needs_mssql
@by_row
def test_upsert_again_changes_nothing(diff: Diff, row: tuple[str, ...], connection: Any) -> None:
    call(connection, diff.procedures["Insert"], *row)
    set_back(connection, diff)
    call(connection, diff.procedures["Update"], *row)
    assert untouched(connection, diff)
    assert exported(connection, diff) == [row]


@needs_mssql
@by_row
def test_upsert_writes_each_change(diff: Diff, row: tuple[str, ...], connection: Any) -> None:
    """Each column by itself, from a value to none and back, and a change of case alone."""
    for index, column in enumerate(diff.columns):
        if column in diff.key or column == "locked":
            continue
        kind = tables()[table_of(diff).removeprefix("samegoal.")][column]
        values = {"nvarchar": ["ab", "AB"], "bit": ["0", "1"], "date": ["2026-01-05"]}[kind]
        for value in [*values, None, row[index]]:
            changed = (*row[:index], value, *row[index + 1 :])
            call(connection, diff.procedures["Update"], *changed)
            assert exported(connection, diff) == [changed], column


@needs_mssql
@pytest.mark.parametrize("diff", DIFFS[:3], ids=lambda diff: diff.file)
def test_upsert_locks_again_what_staff_unlocked(diff: Diff, connection: Any) -> None:
    row = ROWS[diff.file]
    call(connection, diff.procedures["Insert"], *row)
    execute(connection, f"UPDATE {table_of(diff)} SET locked = 0")
    assert exported(connection, diff) == [(*row[:-1], "0")]
    call(connection, diff.procedures["Update"], *row)
    assert exported(connection, diff) == [row]


@needs_mssql
@by_row
def test_delete_retires_and_upsert_brings_back(
    diff: Diff, row: tuple[str, ...], connection: Any
) -> None:
    key = row[: len(diff.key)]
    call(connection, diff.procedures["Delete"], *key)  # nothing there: nothing to do
    call(connection, diff.procedures["Insert"], *row)
    call(connection, diff.procedures["Delete"], *key)
    assert exported(connection, diff) == []
    set_back(connection, diff)
    call(connection, diff.procedures["Delete"], *key)
    assert untouched(connection, diff)
    call(connection, diff.procedures["Insert"], *row)
    assert exported(connection, diff) == [row]


@needs_mssql
@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        ("2025-09-01", None, "today"),
        ("2025-09-01", "2025-12-01", "2025-12-01"),
        ("2025-09-01", "2999-01-01", "today"),
        ("2998-09-01", None, "2998-09-01"),
    ],
)
def test_delete_ends_a_flag(start: str, end: str | None, expected: str, connection: Any) -> None:
    call(connection, "dbo.sg_program_flag_upsert", STUDENT, "Student has an IEP", start, end)
    call(connection, "dbo.sg_program_flag_delete", STUDENT, "Student has an IEP", start)
    dates = "SELECT endDate, retiredDate, CAST(SYSDATETIME() AS date) FROM samegoal.ProgramFlag"
    ((ended, retired, today),) = execute(connection, dates)
    assert str(ended) == (str(today) if expected == "today" else expected)
    assert str(retired) == str(today)


@needs_mssql
@by_row
def test_unknown_student_number_is_named(diff: Diff, row: tuple[str, ...], connection: Any) -> None:
    import pyodbc

    for operation, values in [("Insert", row), ("Delete", row[: len(diff.key)])]:
        with pytest.raises(pyodbc.Error) as raised:
            call(connection, diff.procedures[operation], "9999%d", *values[1:])
        message = str(raised.value)
        assert "of student 9999%d, " in message
        assert all(value in message for value in row[1 : len(diff.key)])
        assert message.count("no student, or more than one, has this number") == 1


@needs_mssql
@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("startDate", "09/01/2025", "startDate is not a date"),
        ("startDate", None, "startDate is not a date"),
        ("endDate", "2025-02-30", "endDate is not a date"),
        ("endDate", "2025-08-31", "endDate lies before startDate"),
        ("meetingDate", "20250820", "meetingDate is not a date"),
        ("meetingType", "x" * 21, "meetingType is longer than 20 characters"),
        ("primaryDisability", "x" * 5000, "primaryDisability is longer than 50 characters"),
        ("extendedSchoolYear", "yes", "extendedSchoolYear is not 0 or 1"),
        ("locked", "0", "a completed document is locked"),
        ("locked", None, "a completed document is locked"),
    ],
)
def test_bad_value_is_named(column: str, value: str | None, problem: str, connection: Any) -> None:
    import pyodbc

    row = list(ROWS["iep.csv"])
    row[DIFFS[0].columns.index(column)] = value
    with pytest.raises(pyodbc.Error) as raised:
        call(connection, "dbo.sg_iep_upsert", *row)
    assert f"IEP of student {STUDENT}, " in str(raised.value)
    assert problem in str(raised.value)
    assert exported(connection, DIFFS[0]) == []


@needs_mssql
@pytest.mark.parametrize("xact_abort", ["ON", "OFF"])
def test_bad_row_leaves_the_callers_transaction_as_it_is(xact_abort: str, connection: Any) -> None:
    import pyodbc

    execute(connection, f"SET XACT_ABORT {xact_abort}")
    good = ROWS["program_flags.csv"]
    call(connection, "dbo.sg_program_flag_upsert", *good)
    with pytest.raises(pyodbc.Error, match="9999"):
        call(connection, "dbo.sg_program_flag_upsert", "9999", *good[1:])
    assert execute(connection, "SELECT @@TRANCOUNT, XACT_STATE()") == [(1, 1)]
    assert exported(connection, DIFFS[4]) == [good]


@needs_mssql
def test_error_of_the_table_names_the_row(connection: Any) -> None:
    import pyodbc

    execute(
        connection,
        "ALTER TABLE samegoal.ProgramFlag ADD CONSTRAINT CK_test CHECK (flag <> 'forbidden')",
    )
    with pytest.raises(pyodbc.Error) as raised:
        call(connection, "dbo.sg_program_flag_upsert", STUDENT, "forbidden", "2025-09-01", None)
    assert f"program flag of student {STUDENT}, forbidden 2025-09-01: " in str(raised.value)
    assert "CK_test" in str(raised.value)


@needs_mssql
def test_cleanup_ends_flags_of_students_who_left_and_reopens_them(connection: Any) -> None:
    flags = DIFFS[4]
    row = ROWS[flags.file]
    call(connection, "dbo.sg_program_flag_upsert", *row)
    for exit_date, expected in [
        (None, "None"),
        ("2999-01-01", "None"),
        ("2026-01-15", "2026-01-15"),
        ("2026-01-16", "2026-01-16"),
        ("2025-08-01", "2025-09-01"),
        (None, "None"),
    ]:
        execute(connection, "UPDATE samegoal.Student SET exitDate = ?", exit_date)
        call(connection, "dbo.sg_cleanup")
        ((end,),) = execute(connection, "SELECT endDate FROM samegoal.ProgramFlag")
        assert str(end) == expected
        set_back(connection, flags)
        call(connection, "dbo.sg_cleanup")
        call(connection, "dbo.sg_program_flag_upsert", *row)
        assert untouched(connection, flags)
        assert exported(connection, flags) == [row]


@needs_mssql
def test_cleanup_leaves_flags_that_samegoal_ended(connection: Any) -> None:
    row = (STUDENT, "Student has an IEP", "2025-09-01", "2025-10-01")
    call(connection, "dbo.sg_program_flag_upsert", *row)
    execute(connection, "UPDATE samegoal.Student SET exitDate = '2026-01-15'")
    call(connection, "dbo.sg_cleanup")
    assert exported(connection, DIFFS[4]) == [row]


@needs_mssql
def test_upload_statements_run(connection: Any) -> None:
    for diff in DIFFS:
        call(connection, diff.procedures["Insert"], *ROWS[diff.file])
    results = [execute(connection, e.text) for e in read_config().findall("Upload/SQL")]
    assert results[0] == []
    assert {row[1] for row in results[1]} >= {"FLAG", "SP"}
    assert all(row[0] == STUDENT for row in results[1])
    assert [row[0] for row in results[2]] == [STUDENT]
