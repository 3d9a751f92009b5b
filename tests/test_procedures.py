"""config.xml and procedures.sql: the template for Infinite Campus on SQL Server.

The two files must agree with each other and with SQL Server 2012. Four things look at them:

* Microsoft's own T-SQL parser, ScriptDom, which the package maxdop carries. It has the grammar of
  every version since 2008, so it also refuses what came after 2012.
* sqlglot, for the structure of single statements: columns, order, tables.
* SQLite, which runs every table, view, query and procedure in translation (support/tsql.py).
* A real SQL Server, when SGSYNC_TEST_MSSQL holds an ODBC connection string. The tests make a
  database of their own on it and drop it afterwards. What SQLite runs, it runs, too.
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

from support import servers, tsql
from support.tsql import code_of, split_batches

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


SCRIPT = PROCEDURES.read_text("utf-8")
BATCHES = split_batches(SCRIPT)
NO_CUTOVER = "DECLARE @cutoverDate date = NULL;"


def script_with(cutover: str) -> str:
    """procedures.sql as a district has it after setting the cutover date."""
    assert SCRIPT.count(NO_CUTOVER) == 1
    return SCRIPT.replace(NO_CUTOVER, NO_CUTOVER.replace("NULL", f"'{cutover}'"))


def commented_batches(first_line: str) -> list[str]:
    """The batches of an example in procedures.sql, without the dashes before its lines."""
    commented = SCRIPT[SCRIPT.index(first_line) :].partition("\n-----")[0]
    return split_batches(re.sub(r"^-- ?", "", commented, flags=re.M))


STUDENT_VIEW = "-- IF OBJECT_ID(N'samegoal.Student') IS NULL"


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


def commented_elements(tag: str) -> list[etree._Element]:
    """The elements that stand in config.xml as examples, inside comments."""
    comments = "".join(comment.text for comment in read_config().iter(etree.Comment))
    found = re.findall(rf"<{tag}\b[^>]*?(?:/>|>.*?</{tag}>)", comments, re.S)
    return [etree.fromstring(element) for element in found]


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
    "first_line", [STUDENT_VIEW, "-- IF DATABASE_PRINCIPAL_ID(N'samegoal_service') IS NULL"]
)
def test_commented_examples_parse_once_the_dashes_are_gone(first_line: str) -> None:
    batches = commented_batches(first_line)
    assert batches
    assert [syntax_error(batch) for batch in batches] == [""] * len(batches)


def test_procedures_break_when_one_word_is_lost() -> None:
    """The check above would see a slip in any of the procedures."""
    for batch in BATCHES:
        if ALTERED.search(batch):
            assert syntax_error(re.sub(r"END;\s*\Z", "", batch)), batch[:80]


def test_config_statements_parse_as_sql_server_2012() -> None:
    elements = [*read_config().iter("Query", "SQL"), *commented_elements("SQL")]
    statements = [element.text for element in elements]
    assert len(statements) == len(DIFFS) + 2 + 5
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
    elements = [*read_config().iter("Query", "SQL"), *commented_elements("SQL")]
    for sql in [*BATCHES, *commented_batches(STUDENT_VIEW), *(e.text for e in elements)]:
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
    assert sum("SET NOEXEC ON" in batch for batch in BATCHES) == 3
    assert BATCHES[-1].rstrip().endswith("SET NOEXEC OFF;")


def test_procedures_begin_with_nocount_and_leave_the_transaction_alone() -> None:
    assert len(procedures()) == 2 * len(DIFFS) + 2  # upserts and deletes, sg_cleanup, fail
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


# ---------------------------------------------------------------------------------------------
# The cutover date
# ---------------------------------------------------------------------------------------------


def from_cutover_on(select: exp.Select) -> list[str]:
    """The columns that a WHERE keeps at or after the cutover date; the conditions joined by AND."""
    condition = select.args["where"].this
    terms = list(condition.flatten()) if isinstance(condition, exp.And) else [condition]
    wanted = "(SELECT cutoverDate FROM samegoal.Settings)"
    return [
        term.this.sql("tsql")
        for term in terms
        if isinstance(term, exp.GTE) and term.expression.sql("tsql") == wanted
    ]


def test_from_cutover_on_sees_only_what_holds_for_every_row() -> None:
    setting = "(SELECT cutoverDate FROM samegoal.Settings)"
    for where, expected in [
        (f"a = 1 AND b >= {setting}", ["b"]),
        (f"a = 1 OR b >= {setting}", []),
        (f"b <= {setting}", []),
        ("b >= (SELECT MIN(x) FROM y)", []),
    ]:
        select = sqlglot.parse_one(f"SELECT 1 FROM t WHERE {where}", dialect="tsql")
        assert from_cutover_on(select) == expected


@by_file
def test_query_honors_the_cutover_date(diff: Diff) -> None:
    (date,) = (column for column in diff.key if column.endswith("Date"))
    assert from_cutover_on(diff.select) == [f"d.{date}"]


def test_upload_of_open_records_honors_the_cutover_date() -> None:
    (open_records,) = read_config().findall("Upload/SQL[@file='open_records.csv']")
    select = sqlglot.parse_one(open_records.text, dialect="tsql")
    assert from_cutover_on(select) == ["r.startDate"]


@by_file
@pytest.mark.parametrize("operation", ["Insert", "Delete"])
def test_procedure_refuses_the_date_of_its_key_before_the_cutover(
    diff: Diff, operation: str
) -> None:
    """The variable that is checked is the one that the UPDATE finds the row by."""
    (date,) = (column for column in diff.key if column.endswith("Date"))
    body = procedures()[diff.procedures[operation]].body
    (variable,) = re.findall(rf"samegoal\.cutover_problem\(N'{date}', (@\w+)\)", body)
    assert f"AND {date} = {variable}" in body
    assert "WHEN @early IS NOT NULL THEN @early" in body


def test_cutover_date_is_written_in_one_place() -> None:
    """Every other date in the two files is the one that stands for "not set"."""
    assert len(re.findall(r"DECLARE @cutoverDate\b", SCRIPT)) == 1
    code = "".join(tsql.without_comments(batch) for batch in BATCHES)
    assert set(re.findall(r"'(\d{4}-\d\d-\d\d)'", code)) == {"1900-01-01"}
    assert not re.search(r"'\d{4}-\d\d-\d\d'", "".join(diff.query for diff in DIFFS))


def test_script_stops_where_a_table_is_the_districts_and_no_cutover_is_set() -> None:
    """Before the first procedure; a trial on an empty database is not stopped."""
    (place,) = (n for n, batch in enumerate(BATCHES) if "IF (SELECT cutoverDate" in batch)
    assert set(re.findall(r"OBJECT_ID\(N'samegoal\.(\w+)', N'U'\) IS NULL", BATCHES[place])) == {
        *tables()
    } - {"Student", "Settings"}
    assert not any(ALTERED.search(b) and "PROCEDURE" in b for b in BATCHES[:place])
    created = [n for n, batch in enumerate(BATCHES) if "CREATE TABLE" in code_of(batch)]
    assert len(created) == len(tables())
    assert max(created) < place


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
        ("special_ed_dates.csv", "studentNumber,eventType,statusDate"),
        ("program_flags.csv", "studentNumber,flag,startDate"),
    ]
    upload = read_config().findall("Upload/SQL")
    assert [element.get("file") for element in upload] == [
        "open_records.csv",
        "student_mapping.csv",
    ]


def test_config_has_the_vendors_columns_of_special_ed_dates() -> None:
    """Infinite Campus: "Special Ed Dates Tab (Ohio)"; the order is that of EMIS, GE110 to GE150."""
    assert DIFFS[3].columns == (
        *("studentNumber", "eventType", "statusDate", "outcome", "nonCompliance"),
        *("outcomeBeginningDate", "outcomeEndDate"),
    )


def test_config_leaves_the_cleanup_and_the_files_of_other_tables_commented_out() -> None:
    examples = {element.get("file"): element for element in commented_elements("SQL")}
    assert [*examples] == [None, "students.csv", "guardians.csv", "users.csv", "user_roles.csv"]
    assert examples[None].text == "EXEC dbo.sg_cleanup"
    assert [file for file, element in examples.items() if element.get("maxShrink")] == [
        "guardians.csv"
    ]
    assert "sg_cleanup" not in "".join(e.text or "" for e in read_config().iter("SQL"))


def test_config_shows_notify_and_pause_as_comments() -> None:
    assert [dict(e.attrib) for e in commented_elements("Notify")] == [
        {"on": "failure", "ping": "${env:SGSYNC_PING}", "url": "${env:SGSYNC_NOTIFY}"}
    ]
    assert [dict(e.attrib) for e in commented_elements("Pause")] == [
        {"from": "07-20", "to": "08-15", "why": "rollover"}
    ]


@pytest.mark.parametrize(
    ("text", "unpublished"),
    [
        (CONFIG.read_text("utf-8"), ["nightly extract", "download directory", "base tables"]),
        (SCRIPT, ["nightly extract", "base tables"]),
    ],
    ids=["config.xml", "procedures.sql"],
)
def test_files_say_what_is_an_illustration(text: str, unpublished: list[str]) -> None:
    said = re.split(r"what is an illustration", text, flags=re.I)[1][:700]
    for name in unpublished:
        assert name in " ".join(said.replace("--", " ").split())


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
# Running them: in translation, and on a real SQL Server
# ---------------------------------------------------------------------------------------------

STUDENT = "100001"
NONE = "00000000"  # how EMIS writes that an event has no such date
ROWS: dict[str, tuple[str | None, ...]] = {
    "iep.csv": (
        *(STUDENT, "2025-09-01", "2026-08-31", "2025-08-20", "RIEP", "**", "IE13"),
        *("0", "1", None, "1"),
    ),
    "services_plan.csv": (
        *(STUDENT, "2025-09-01", None, "2025-08-20", "ET05", 'St. Änn\'s, "East"', "0", "1"),
    ),
    "evaluation_team_report.csv": (
        *(STUDENT, "2025-05-02", "IETR", "2025-03-01", None, "CNGI", "ET05", "01", "1"),
    ),
    "special_ed_dates.csv": (STUDENT, "IETR", "2025-05-02", "ET05", "**", NONE, NONE),
    "program_flags.csv": (STUDENT, "Student has an IEP", "2025-09-01", None),
}
# The events of an evaluation, with the codes of SameGoal's EMIS crosswalk: outcome (****: none),
# non-compliance (**: none, 01-09), outcome beginning and end date. In the order of the file.
EVENTS = [
    (STUDENT, "CNST", "2025-03-03", "CNGI", "**", NONE, NONE),
    (STUDENT, "IETR", "2022-05-02", "ET01", "09", NONE, NONE),
    (STUDENT, "IETR", "2025-05-02", "ETNE", "01", NONE, NONE),
    (STUDENT, "RETR", "2025-05-02", "ET16", "**", NONE, NONE),
    (STUDENT, "RETR", "2026-05-02", "ETEX", "**", NONE, NONE),
    (STUDENT, "RFRL", "2025-02-10", "****", "**", NONE, NONE),
    (STUDENT, "TETR", "2025-08-20", "ET10", "**", "2025-08-20", "2028-05-01"),
]
by_row = pytest.mark.parametrize(
    ("diff", "row"), [(diff, ROWS[diff.file]) for diff in DIFFS], ids=[d.file for d in DIFFS]
)


class SqlServer:
    """A connection to a SQL Server, with the verbs of `tsql.Translated`."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def execute(self, sql: str, *values: str | None) -> list[tuple[Any, ...]]:
        """Run one statement to its end, since an error can hide behind the first result."""
        import pyodbc

        rows: list[tuple[Any, ...]] = []
        cursor = self.connection.cursor()  # not in a `with`, which would commit
        try:
            cursor.execute(sql, *values)
            while True:
                if cursor.description:
                    rows += [tuple(row) for row in cursor.fetchall()]
                if not cursor.nextset():
                    return rows
        except pyodbc.Error as error:
            raise tsql.Error(str(error)) from error
        finally:
            cursor.close()

    def call(self, procedure: str, *values: str | None) -> None:
        marks = ", ".join("?" * len(values))
        self.execute(f"EXEC {procedure} {marks}".rstrip(), *values)

    def run_script(self, script: str) -> None:
        for batch in split_batches(script):
            self.execute(batch)


Sis = tsql.Translated | SqlServer


@pytest.fixture(scope="module")
def installed() -> Iterator[servers.Database]:
    """A new database on the SQL Server with procedures.sql in it and one student."""
    import pyodbc

    if not MSSQL:
        pytest.skip("SGSYNC_TEST_MSSQL holds no connection string to a SQL Server")
    with servers.mssql_database(MSSQL) as database:
        connection = pyodbc.connect(database.connection_string, autocommit=True)
        SqlServer(connection).run_script(SCRIPT)
        SqlServer(connection).execute(ADD_STUDENT)
        connection.close()
        yield database


ADD_STUDENT = f"INSERT INTO samegoal.Student (studentNumber) VALUES ('{STUDENT}')"


@pytest.fixture
def server(installed: servers.Database) -> Iterator[SqlServer]:
    """A connection to that database whose changes are taken back after the test."""
    import pyodbc

    connection = pyodbc.connect(installed.connection_string)
    yield SqlServer(connection)
    connection.rollback()
    connection.close()


@pytest.fixture(params=["translated", "mssql"])
def sis(request: pytest.FixtureRequest) -> Sis:
    """procedures.sql in a database with one student: each in turn."""
    if request.param == "mssql":
        return request.getfixturevalue("server")
    translated = tsql.Translated(SCRIPT)
    translated.execute(ADD_STUDENT)
    return translated


def exported(sis: Sis, diff: Diff) -> list[tuple[str | None, ...]]:
    """The rows of the query as the CSV file would hold them."""
    return [
        tuple(str(int(v)) if isinstance(v, int) else v for v in row)
        for row in sis.execute(diff.query)
    ]


def table_of(diff: Diff) -> str:
    return f"samegoal.{diff.select.find(exp.From).this.name}"


def untouched(sis: Sis, diff: Diff) -> bool:
    """Whether no row was written since `modifiedDate` was last set back to 2000."""
    rows = sis.execute(f"SELECT modifiedDate FROM {table_of(diff)}")
    return bool(rows) and all(str(modified).startswith("2000-01-01") for (modified,) in rows)


def set_back(sis: Sis, diff: Diff) -> None:
    sis.execute(f"UPDATE {table_of(diff)} SET modifiedDate = '2000-01-01'")


def test_install_twice_keeps_rows_and_grants(server: SqlServer) -> None:
    server.execute("CREATE USER sgsync_tester WITHOUT LOGIN")
    server.execute("GRANT EXECUTE ON dbo.sg_iep_upsert TO sgsync_tester")
    server.call("dbo.sg_iep_upsert", *ROWS["iep.csv"])
    objects = "SELECT name, object_id FROM sys.objects WHERE is_ms_shipped = 0 ORDER BY name"
    before = server.execute(objects)
    server.run_script(SCRIPT)
    assert server.execute(objects) == before
    assert exported(server, DIFFS[0]) == [ROWS["iep.csv"]]
    grants = "SELECT COUNT(*) FROM sys.database_permissions WHERE class = 1 AND type = 'EX'"
    assert server.execute(grants) == [(1,)]


def test_install_leaves_a_name_of_the_district_alone(server: SqlServer) -> None:
    """Also a table without the defaults and constraints of the one that is made."""
    diff = DIFFS[3]
    server.execute("SELECT * INTO dbo.DistrictDates FROM samegoal.SpecialEdDate")
    server.execute("DROP TABLE samegoal.SpecialEdDate")
    server.execute("CREATE SYNONYM samegoal.SpecialEdDate FOR dbo.DistrictDates")
    server.run_script(script_with("2024-07-01"))
    server.call(diff.procedures["Insert"], *ROWS[diff.file])
    assert exported(server, diff) == [ROWS[diff.file]]
    assert server.execute("SELECT COUNT(*) FROM dbo.DistrictDates") == [(1,)]


def test_install_refuses_a_system_database(server: SqlServer) -> None:
    server.execute("USE tempdb")
    with pytest.raises(tsql.Error, match="system database"):
        server.run_script(SCRIPT)
    server.execute("SET NOEXEC OFF")


def test_install_asks_for_the_cutover_date_where_a_table_is_the_districts(
    server: SqlServer,
) -> None:
    server.execute("SELECT * INTO dbo.DistrictDates FROM samegoal.SpecialEdDate")
    server.execute("DROP TABLE samegoal.SpecialEdDate")
    server.execute("CREATE SYNONYM samegoal.SpecialEdDate FOR dbo.DistrictDates")
    with pytest.raises(tsql.Error, match="set the cutover date there, then run this again"):
        server.run_script(SCRIPT)
    server.execute("SET NOEXEC OFF")


@by_row
def test_upsert_gives_the_row_that_was_sent(diff: Diff, row: tuple[str, ...], sis: Sis) -> None:
    sis.call(diff.procedures["Insert"], *row)
    assert exported(sis, diff) == [row]


@by_row
def test_upsert_again_changes_nothing(diff: Diff, row: tuple[str, ...], sis: Sis) -> None:
    sis.call(diff.procedures["Insert"], *row)
    set_back(sis, diff)
    sis.call(diff.procedures["Update"], *row)
    assert untouched(sis, diff)
    assert exported(sis, diff) == [row]


@by_row
def test_upsert_writes_each_change(diff: Diff, row: tuple[str, ...], sis: Sis) -> None:
    """Each column by itself, from a value to none and back, and a change of case alone."""
    for index, column in enumerate(diff.columns):
        if column in diff.key or column == "locked":
            continue
        kind = tables()[table_of(diff).removeprefix("samegoal.")][column]
        values = {"nvarchar": ["ab", "AB"], "bit": ["0", "1"], "date": ["2026-01-05"]}[kind]
        for value in [*values, None, row[index]]:
            changed = (*row[:index], value, *row[index + 1 :])
            sis.call(diff.procedures["Update"], *changed)
            if value is None and column in {"outcomeBeginningDate", "outcomeEndDate"}:
                changed = (*row[:index], NONE, *row[index + 1 :])
            assert exported(sis, diff) == [changed], column


@pytest.mark.parametrize("diff", DIFFS[:3], ids=lambda diff: diff.file)
def test_upsert_locks_again_what_staff_unlocked(diff: Diff, sis: Sis) -> None:
    row = ROWS[diff.file]
    sis.call(diff.procedures["Insert"], *row)
    sis.execute(f"UPDATE {table_of(diff)} SET locked = 0")
    assert exported(sis, diff) == [(*row[:-1], "0")]
    sis.call(diff.procedures["Update"], *row)
    assert exported(sis, diff) == [row]


@by_row
def test_delete_retires_and_upsert_brings_back(diff: Diff, row: tuple[str, ...], sis: Sis) -> None:
    key = row[: len(diff.key)]
    sis.call(diff.procedures["Delete"], *key)  # nothing there: nothing to do
    sis.call(diff.procedures["Insert"], *row)
    sis.call(diff.procedures["Delete"], *key)
    assert exported(sis, diff) == []
    set_back(sis, diff)
    sis.call(diff.procedures["Delete"], *key)
    assert untouched(sis, diff)
    sis.call(diff.procedures["Insert"], *row)
    assert exported(sis, diff) == [row]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        ("2025-09-01", None, "today"),
        ("2025-09-01", "2025-12-01", "2025-12-01"),
        ("2025-09-01", "2999-01-01", "today"),
        ("2998-09-01", None, "2998-09-01"),
    ],
)
def test_delete_ends_a_flag(start: str, end: str | None, expected: str, sis: Sis) -> None:
    sis.call("dbo.sg_program_flag_upsert", STUDENT, "Student has an IEP", start, end)
    sis.call("dbo.sg_program_flag_delete", STUDENT, "Student has an IEP", start)
    dates = "SELECT endDate, retiredDate, CAST(SYSDATETIME() AS date) FROM samegoal.ProgramFlag"
    ((ended, retired, today),) = sis.execute(dates)
    assert str(ended) == (str(today) if expected == "today" else expected)
    assert str(retired) == str(today)


@by_row
def test_unknown_student_number_is_named(diff: Diff, row: tuple[str, ...], sis: Sis) -> None:
    for operation, values in [("Insert", row), ("Delete", row[: len(diff.key)])]:
        with pytest.raises(tsql.Error) as raised:
            sis.call(diff.procedures[operation], "9999%d", *values[1:])
        message = str(raised.value)
        assert "of student 9999%d, " in message
        assert all(value in message for value in row[1 : len(diff.key)])
        assert message.count("no student, or more than one, has this number") == 1


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("startDate", "09/01/2025", "startDate is not a date"),
        ("startDate", None, "startDate is not a date"),
        ("endDate", "2025-02-30", "endDate is not a date"),
        ("endDate", "2025-08-31", "endDate is before startDate"),
        ("meetingDate", "20250820", "meetingDate is not a date"),
        ("meetingType", "x" * 21, "meetingType is longer than 20 characters"),
        ("primaryDisability", "x" * 5000, "primaryDisability is longer than 50 characters"),
        ("extendedSchoolYear", "yes", "extendedSchoolYear is not 0 or 1"),
        ("locked", "0", "a completed document is locked"),
        ("locked", None, "a completed document is locked"),
    ],
)
def test_bad_value_is_named(column: str, value: str | None, problem: str, sis: Sis) -> None:
    row = list(ROWS["iep.csv"])
    row[DIFFS[0].columns.index(column)] = value
    with pytest.raises(tsql.Error) as raised:
        sis.call("dbo.sg_iep_upsert", *row)
    assert f"IEP of student {STUDENT}, " in str(raised.value)
    assert problem in str(raised.value)
    assert exported(sis, DIFFS[0]) == []


@pytest.mark.parametrize("xact_abort", ["ON", "OFF"])
def test_bad_row_leaves_the_callers_transaction_as_it_is(
    xact_abort: str, server: SqlServer
) -> None:
    server.execute(f"SET XACT_ABORT {xact_abort}")
    good = ROWS["program_flags.csv"]
    server.call("dbo.sg_program_flag_upsert", *good)
    with pytest.raises(tsql.Error, match="9999"):
        server.call("dbo.sg_program_flag_upsert", "9999", *good[1:])
    assert server.execute("SELECT @@TRANCOUNT, XACT_STATE()") == [(1, 1)]
    assert exported(server, DIFFS[4]) == [good]


def test_error_of_the_table_names_the_row(sis: Sis) -> None:
    if isinstance(sis, SqlServer):
        sis.execute(
            "ALTER TABLE samegoal.ProgramFlag ADD CONSTRAINT CK_test CHECK (flag <> 'forbidden')"
        )
    else:
        sis.database.execute(
            'CREATE TRIGGER t BEFORE INSERT ON "samegoal.ProgramFlag" '
            "WHEN NEW.flag = 'forbidden' BEGIN SELECT RAISE(ABORT, 'CK_test'); END"
        )
    with pytest.raises(tsql.Error) as raised:
        sis.call("dbo.sg_program_flag_upsert", STUDENT, "forbidden", "2025-09-01", None)
    assert f"program flag of student {STUDENT}, forbidden 2025-09-01: " in str(raised.value)
    assert "CK_test" in str(raised.value)


def test_cleanup_ends_flags_of_students_who_left_and_reopens_them(sis: Sis) -> None:
    flags = DIFFS[4]
    row = ROWS[flags.file]
    sis.call("dbo.sg_program_flag_upsert", *row)
    for exit_date, expected in [
        (None, "None"),
        ("2999-01-01", "None"),
        ("2026-01-15", "2026-01-15"),
        ("2026-01-16", "2026-01-16"),
        ("2025-08-01", "2025-09-01"),
        (None, "None"),
    ]:
        sis.execute("UPDATE samegoal.Student SET exitDate = ?", exit_date)
        sis.call("dbo.sg_cleanup")
        ((end,),) = sis.execute("SELECT endDate FROM samegoal.ProgramFlag")
        assert str(end) == expected
        set_back(sis, flags)
        sis.call("dbo.sg_cleanup")
        sis.call("dbo.sg_program_flag_upsert", *row)
        assert untouched(sis, flags)
        assert exported(sis, flags) == [row]


def test_cleanup_leaves_flags_that_samegoal_ended(sis: Sis) -> None:
    row = (STUDENT, "Student has an IEP", "2025-09-01", "2025-10-01")
    sis.call("dbo.sg_program_flag_upsert", *row)
    sis.execute("UPDATE samegoal.Student SET exitDate = '2026-01-15'")
    sis.call("dbo.sg_cleanup")
    assert exported(sis, DIFFS[4]) == [row]


def test_cleanup_leaves_flags_from_before_the_cutover_alone(sis: Sis) -> None:
    sis.call("dbo.sg_program_flag_upsert", STUDENT, "old", "2024-06-30", None)
    sis.call("dbo.sg_program_flag_upsert", STUDENT, "new", "2024-07-01", None)
    sis.run_script(script_with("2024-07-01"))
    sis.execute("UPDATE samegoal.Student SET exitDate = '2026-01-15'")
    sis.call("dbo.sg_cleanup")
    rows = sis.execute("SELECT flag, endDate FROM samegoal.ProgramFlag ORDER BY flag")
    assert [(flag, str(end)) for flag, end in rows] == [("new", "2026-01-15"), ("old", "None")]


def test_special_ed_dates_have_the_codes_of_the_crosswalk(sis: Sis) -> None:
    diff = DIFFS[3]
    for row in reversed(EVENTS):
        sis.call(diff.procedures["Insert"], *row)
    assert exported(sis, diff) == EVENTS
    stored = "SELECT outcomeBeginningDate, outcomeEndDate FROM samegoal.SpecialEdDate"
    assert sis.execute(f"{stored} WHERE eventType = 'IETR'") == [(None, None)] * 2
    set_back(sis, diff)
    for row in EVENTS:
        sis.call(diff.procedures["Update"], *row)
        sis.call(diff.procedures["Update"], *(None if value == NONE else value for value in row))
    assert untouched(sis, diff)


@by_row
def test_nothing_before_the_cutover_date_is_shown_or_changed(
    diff: Diff, row: tuple[str, ...], sis: Sis
) -> None:
    place = next(n for n, column in enumerate(diff.key) if column.endswith("Date"))
    date, key = row[place], row[: len(diff.key)]
    sis.call(diff.procedures["Insert"], *row)
    sis.run_script(script_with(date))  # the first day of SameGoal
    sis.call(diff.procedures["Update"], *row)
    assert exported(sis, diff) == [row]
    sis.run_script(script_with("2026-01-01"))
    assert exported(sis, diff) == []
    set_back(sis, diff)
    for operation, values in [("Insert", row), ("Update", row), ("Delete", key)]:
        with pytest.raises(tsql.Error) as raised:
            sis.call(diff.procedures[operation], *values)
        assert f"of student {STUDENT}, " in str(raised.value)
        assert (
            f"{diff.key[place]} is before the cutover date 2026-01-01. Try: have SameGoal leave "
            "older records out of the extract, or correct the cutover date in section 2 of "
            "procedures.sql"
        ) in str(raised.value)
    assert untouched(sis, diff)
    sis.run_script(script_with("1900-01-01"))
    assert exported(sis, diff) == [row]


def test_script_of_a_new_version_keeps_the_cutover_date(sis: Sis) -> None:
    setting = "SELECT cutoverDate FROM samegoal.Settings"
    assert str(sis.execute(setting)[0][0]) == "1900-01-01"
    for script, expected in [
        (script_with("2024-07-01"), "2024-07-01"),
        (SCRIPT, "2024-07-01"),
        (script_with("2023-07-01"), "2023-07-01"),
    ]:
        sis.run_script(script)
        ((cutover,),) = sis.execute(setting)
        assert str(cutover) == expected


def test_procedures_refuse_every_row_without_a_cutover_date(sis: Sis) -> None:
    sis.execute("DELETE FROM samegoal.Settings")
    with pytest.raises(tsql.Error, match=r"has no cutover date\. Try: run procedures\.sql again"):
        sis.call("dbo.sg_iep_upsert", *ROWS["iep.csv"])


FLAG = "Student has an IEP"


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        (("2024-09-01", None), ("2025-09-01", None), True),
        (("2024-09-01", None), ("2025-09-01", "2999-01-01"), True),
        (("2024-09-01", "2999-01-01"), ("2025-09-01", None), True),
        (("2025-09-01", None), ("2024-09-01", None), True),
        (("2024-09-01", "2025-08-31"), ("2025-09-01", None), False),
        (("2024-09-01", None), ("2023-09-01", "2024-08-31"), False),
    ],
)
def test_second_active_flag_is_refused(
    first: tuple[str, str | None], second: tuple[str, str | None], refused: bool, sis: Sis
) -> None:
    sis.call("dbo.sg_program_flag_upsert", STUDENT, FLAG, *first)
    sis.call("dbo.sg_program_flag_upsert", STUDENT, "Another flag", *second)
    if refused:
        with pytest.raises(tsql.Error) as raised:
            sis.call("dbo.sg_program_flag_upsert", STUDENT, FLAG, *second)
        assert (
            f"program flag of student {STUDENT}, {FLAG} {second[0]}: the student already has this "
            f"flag, active since {first[0]}. Try: end the older flag in the SIS, or correct its "
            "dates in SameGoal"
        ) in str(raised.value)
    else:
        sis.call("dbo.sg_program_flag_upsert", STUDENT, FLAG, *second)
    count = f"SELECT COUNT(*) FROM samegoal.ProgramFlag WHERE flag = '{FLAG}'"
    assert sis.execute(count) == [(1 if refused else 2,)]


def test_second_active_flag_is_refused_where_the_first_is_from_before_the_cutover(sis: Sis) -> None:
    sis.call("dbo.sg_program_flag_upsert", STUDENT, FLAG, "2023-09-01", None)
    sis.run_script(script_with("2024-07-01"))
    with pytest.raises(tsql.Error, match=r"already has this flag, active since 2023-09-01\. Try:"):
        sis.call("dbo.sg_program_flag_upsert", STUDENT, FLAG, "2024-09-01", None)
    assert exported(sis, DIFFS[4]) == []


def test_flag_that_begins_anew_after_the_old_one_was_ended_or_deleted(sis: Sis) -> None:
    """In the order of a run: deletes, updates, inserts."""
    for begin, end in [("2022-09-01", None), ("2022-09-01", "2023-08-31"), ("2023-09-01", None)]:
        sis.call("dbo.sg_program_flag_upsert", STUDENT, FLAG, begin, end)
    sis.call("dbo.sg_program_flag_delete", STUDENT, FLAG, "2023-09-01")
    sis.call("dbo.sg_program_flag_upsert", STUDENT, FLAG, "2024-09-01", None)
    assert exported(sis, DIFFS[4]) == [
        (STUDENT, FLAG, "2022-09-01", "2023-08-31"),
        (STUDENT, FLAG, "2024-09-01", None),
    ]


def test_flag_that_the_sis_has_twice_is_refused(sis: Sis) -> None:
    """A table of the district's own, without the unique index."""
    unique = "CONSTRAINT UQ_samegoal_ProgramFlag UNIQUE CLUSTERED (personID, flag, startDate),"
    if isinstance(sis, SqlServer):
        sis.execute("ALTER TABLE samegoal.ProgramFlag DROP CONSTRAINT UQ_samegoal_ProgramFlag")
    else:
        assert unique in SCRIPT
        sis = tsql.Translated(SCRIPT.replace(unique, ""))
        sis.execute(ADD_STUDENT)
    person = sis.execute("SELECT personID FROM samegoal.Student")[0][0]
    for _ in range(2):
        sis.execute(
            "INSERT INTO samegoal.ProgramFlag (personID, flag, startDate, endedByExit, "
            f"modifiedDate) VALUES ({person}, '{FLAG}', '2025-09-01', 0, '2000-01-01')"
        )
    with pytest.raises(tsql.Error) as raised:
        sis.call("dbo.sg_program_flag_upsert", STUDENT, FLAG, "2025-09-01", "2025-10-01")
    assert (
        f"program flag of student {STUDENT}, {FLAG} 2025-09-01: the SIS has this flag more than "
        "once. Try: delete all but one of them in the SIS"
    ) in str(raised.value)
    assert untouched(sis, DIFFS[4])


def test_upload_statements_run(sis: Sis) -> None:
    for diff in DIFFS:
        sis.call(diff.procedures["Insert"], *ROWS[diff.file])
    open_records, mapping = (sis.execute(e.text) for e in read_config().findall("Upload/SQL"))
    assert {row[1] for row in open_records} >= {"FLAG", "SP"}
    assert all(row[0] == STUDENT for row in open_records)
    assert [row[0] for row in mapping] == [STUDENT]
    sis.run_script(script_with("2026-01-01"))
    assert sis.execute(read_config().find("Upload/SQL[@file='open_records.csv']").text) == []


# ---------------------------------------------------------------------------------------------
# Students of Infinite Campus: no-shows and next year's enrollments
# ---------------------------------------------------------------------------------------------

# student number -> enrollments: endYear, begin, end, noShow, stateExclude
ENROLLMENTS: dict[str | None, list[tuple[int, str, str | None, int | None, int | None]]] = {
    "enrolled": [(2020, "2019-08-15", "2020-06-05", 0, 0), (2021, "2020-08-15", None, 0, 0)],
    "unmarked": [(2021, "2020-08-15", None, None, None)],
    "no-show": [(2021, "2020-08-15", None, 1, 0)],
    "next-year": [(2022, "2021-08-15", None, 0, 0)],
    "excluded": [(2021, "2020-08-15", None, 0, 1)],
    "left": [(2021, "2020-08-15", "2021-01-15", 0, 0)],
    "left-no-show": [(2020, "2019-08-15", "2020-06-05", 0, 0), (2021, "2020-08-15", None, 1, 0)],
    "left-next": [(2021, "2020-08-15", "2021-05-29", 0, 0), (2022, "2021-08-15", None, 0, 0)],
    "back": [(2020, "2019-08-15", "2019-10-01", 0, 0), (2021, "2020-08-15", None, 0, 0)],
    "two-schools": [(2021, "2020-08-15", None, 0, 0), (2021, "2020-11-03", None, 0, 0)],
    "none": [],
    None: [(2021, "2020-08-15", None, 0, 0)],
}
CAMPUS = [
    "CREATE TABLE dbo.SchoolYear (endYear int, active bit)",
    "CREATE TABLE dbo.Person (personID int, studentNumber nvarchar(15), stateID nvarchar(15), "
    "currentIdentityID int)",
    "CREATE TABLE dbo.[Identity] (identityID int, lastName nvarchar(50), middleName nvarchar(50), "
    "firstName nvarchar(50), birthdate date, gender char(1))",
    "CREATE TABLE dbo.Enrollment (enrollmentID int, personID int, calendarID int, endYear int, "
    "startDate date, endDate date, noShow bit, stateExclude bit, serviceType char(1), "
    "grade nvarchar(4))",
    "CREATE TABLE dbo.Calendar (calendarID int, schoolID int)",
    "CREATE TABLE dbo.School (schoolID int, name nvarchar(40), number nvarchar(7))",
    "INSERT INTO dbo.SchoolYear (endYear, active) VALUES (2020, 0), (2021, 1), (2022, 0)",
    "INSERT INTO dbo.Calendar (calendarID, schoolID) VALUES (7, 3)",
    "INSERT INTO dbo.School (schoolID, name, number) VALUES (3, 'North', '012345')",
]


@pytest.fixture
def campus(sis: Sis) -> Sis:
    """Infinite Campus' own tables with ENROLLMENTS, and procedures.sql with its student view."""
    for statement in CAMPUS:
        sis.execute(statement)
    enrollment = 0
    for person, (number, enrollments) in enumerate(ENROLLMENTS.items(), 1):
        sis.execute("INSERT INTO dbo.Person VALUES (?, ?, ?, ?)", person, number, "S1", person)
        sis.execute(
            "INSERT INTO dbo.[Identity] VALUES (?, 'Last', NULL, 'First', '2015-02-28', 'F')",
            person,
        )
        for values in enrollments:
            enrollment += 1
            sis.execute(
                "INSERT INTO dbo.Enrollment VALUES (?, ?, 7, ?, ?, ?, ?, ?, 'P', '05')",
                *(enrollment, person, *values),
            )
    sis.execute("DROP TABLE samegoal.Student")
    for batch in commented_batches(STUDENT_VIEW):
        sis.run_script(batch) if isinstance(sis, tsql.Translated) else sis.execute(batch)
    return sis


def test_student_view_leaves_out_no_shows_and_next_years_enrollments(campus: Sis) -> None:
    rows = campus.execute("SELECT studentNumber, exitDate FROM samegoal.Student")
    assert sorted((number, str(left)) for number, left in rows) == [
        ("back", "None"),
        ("enrolled", "None"),
        ("left", "2021-01-15"),
        ("left-next", "2021-05-29"),
        ("left-no-show", "2020-06-05"),
        ("two-schools", "None"),
        ("unmarked", "None"),
    ]


@by_row
def test_export_and_procedures_know_only_the_students_of_the_view(
    diff: Diff, row: tuple[str, ...], campus: Sis
) -> None:
    for number in ["left", "enrolled"]:
        campus.call(diff.procedures["Insert"], number, *row[1:])
    for number in ["no-show", "next-year", "excluded", "none"]:
        with pytest.raises(tsql.Error, match="no student, or more than one, has this number"):
            campus.call(diff.procedures["Insert"], number, *row[1:])
    assert exported(campus, diff) == [("enrolled", *row[1:]), ("left", *row[1:])]
    campus.execute("UPDATE dbo.Enrollment SET noShow = 1 WHERE personID = 1")
    assert exported(campus, diff) == [("left", *row[1:])]


def test_cleanup_ends_the_flags_of_students_who_left_in_the_view(campus: Sis) -> None:
    for number in ["enrolled", "left", "left-next"]:
        campus.call("dbo.sg_program_flag_upsert", number, FLAG, "2020-09-01", None)
    campus.call("dbo.sg_cleanup")
    rows = campus.execute(
        "SELECT s.studentNumber, f.endDate FROM samegoal.ProgramFlag AS f "
        "INNER JOIN samegoal.Student AS s ON s.personID = f.personID"
    )
    assert sorted((number, str(end)) for number, end in rows) == [
        ("enrolled", "None"),
        ("left", "2021-01-15"),
        ("left-next", "2021-05-29"),
    ]


def test_example_of_students_csv_gives_one_row_a_student_of_today(campus: Sis) -> None:
    (example,) = (e for e in commented_elements("SQL") if e.get("file") == "students.csv")
    columns = [s.alias_or_name for s in sqlglot.parse_one(example.text, dialect="tsql").selects]
    assert columns == [
        *("Student Id", "Last Name", "Middle Name", "First Name", "Date of Birth", "Gender"),
        *("District Enrollment", "Grade", "Student Reporting Id"),
        *("Building", "Building Reporting Id", "SIS Internal ID"),
    ]
    rows = campus.execute(example.text)
    assert [row[0] for row in rows] == ["back", "enrolled", "two-schools", "unmarked"]
    assert rows[1][1:] == (
        *("Last", None, "First", "2015-02-28", "F", "ENROLLED", "05", "S1", "North", "012345", 1),
    )
