"""Runs procedures.sql without a SQL Server: its statements, translated to SQLite by sqlglot.

Not a T-SQL interpreter: it knows the few forms in which procedures.sql is written (DECLARE, SET,
one-line IF, TRY and CATCH around an UPDATE and an INSERT) and fails on any other. What it cannot
show, because SQLite has nothing like it: locks, XACT_ABORT, conversions between types, collations
other than "binary" and "ignores case", permissions.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cache

import sqlglot
from sqlglot import exp

LEXEME = r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'"


class Error(Exception):
    """What the database says against a statement."""


def code_of(script: str) -> str:
    """Blank out comments and the insides of strings; every other character keeps its place."""

    def blank(match: re.Match[str]) -> str:
        text = match[0]
        edge = "'" if text[0] == "'" else " "
        return edge + re.sub(r"[^\n]", " ", text[1:-1]) + edge

    return re.sub(LEXEME, blank, script, flags=re.DOTALL)


def without_comments(script: str) -> str:
    return re.sub(LEXEME, lambda m: m[0] if m[0][0] == "'" else " ", script, flags=re.DOTALL)


def split_batches(script: str) -> list[str]:
    """Split at GO, alone on its line and outside comments and strings. A count is left unused."""
    batches, start = [], 0
    for go in re.finditer(r"^[ \t]*GO(?:[ \t]+\d+)?[ \t]*$", code_of(script), re.I | re.M):
        batches.append(script[start : go.start()])
        start = go.end()
    return [batch for batch in [*batches, script[start:]] if code_of(batch).strip()]


def split_at(separator: str, text: str) -> Iterator[str]:
    """The parts of `text` between separators outside parentheses and strings, stripped."""
    depth, start = 0, 0
    for place, character in enumerate(code_of(text)):
        depth += (character == "(") - (character == ")")
        if character == separator and not depth:
            yield text[start:place].strip()
            start = place + 1
    if text[start:].strip():
        yield text[start:].strip()


# ------------------------------------------------------------------ one statement, for SQLite


@cache
def to_sqlite(sql: str) -> str:
    """One T-SQL statement or `SELECT <expression>`; schema and name become one quoted name."""
    tree = sqlglot.parse_one(sql, dialect="tsql")
    for node in reversed(list(tree.bfs())):  # from the inside out: what holds a node is seen later
        if (translated := _translated(node)) is not node:
            node.replace(translated)
    return tree.sql("sqlite")


def _translated(node: exp.Expression) -> exp.Expression:
    if isinstance(node, exp.Update) and node.args.get("from_"):
        _name_target(node)
    if isinstance(node, exp.Table):
        return _flat(node)
    if isinstance(node, exp.National):
        return exp.Literal.string(node.this)
    if isinstance(node, exp.Like):
        return exp.Glob(this=node.this, expression=node.expression)
    if isinstance(node, exp.Concat):
        return exp.Anonymous(this="concat_", expressions=node.expressions)
    if isinstance(node, exp.Add):
        return exp.DPipe(this=node.this, expression=node.expression)
    if isinstance(node, exp.CurrentTimestamp):
        return exp.Anonymous(this="now_", expressions=[])
    if isinstance(node, exp.Convert) and node.args.get("safe"):
        kind = node.this.sql("tsql").lower()
        return exp.Anonymous(this=f"try_{kind}_", expressions=[node.expression])
    if isinstance(node, exp.Left):
        return exp.func("SUBSTR", node.this, exp.Literal.number(1), node.expression)
    return node


def _flat(table: exp.Table) -> exp.Table:
    if isinstance(table.this, exp.Parameter):
        name = f"@{table.this.name}"
    elif table.db:
        name = f"{table.db}.{table.name}"
    else:
        return table
    return exp.Table(this=exp.to_identifier(name, quoted=True), alias=table.args.get("alias"))


def _name_target(update: exp.Update) -> None:
    """UPDATE f ... FROM t AS f becomes UPDATE t AS f ..."""
    source = update.args["from_"].this
    assert source.alias == update.this.name
    update.set("this", source)
    update.set("from_", None)


def _try_date(text: str | None) -> str | None:
    try:
        return None if text is None else date.fromisoformat(text).isoformat()
    except ValueError:
        return None


# ------------------------------------------------------------------ the script and its routines


@dataclass(frozen=True)
class Routine:
    """A procedure or function: its parameters with their defaults, and its statements."""

    parameters: dict[str, str | None]
    statements: tuple[str, ...]


def read_routine(batch: str) -> tuple[str, Routine] | None:
    """The procedure or function that `batch` alters, by name; None if it alters none."""
    found = re.search(
        r"^ALTER (?:PROCEDURE|FUNCTION) ([\w.]+)(.*?)^AS\nBEGIN\n(.*)^END;\s*$", batch, re.M | re.S
    )
    if not found:
        return None
    parameters = re.findall(r"@(\w+) [\w]+(?:\(\d+\))?(?: = N'([^']*)')?", found[2])
    statements = split_at(";", without_comments(found[3]))
    return found[1], Routine({name: value or None for name, value in parameters}, tuple(statements))


def read_table(batch: str) -> tuple[str, str] | None:
    """Name and SQLite's DDL of the table that `batch` creates; None if it creates none."""
    found = re.search(r"CREATE TABLE ([\w.]+) \((.*)\);", without_comments(batch), re.S)
    if not found:
        return None
    lines = []
    for line in split_at(",", found[2]):
        column = re.match(r"(\w+) (\w+)(?:\(\d+\))?", line)
        if key := re.search(r"UNIQUE CLUSTERED (\(.*\))", line):
            lines.append(f"UNIQUE {key[1]}")
        elif check := re.match(r"(CONSTRAINT \w+ CHECK \(.*\))", line):
            lines.append(check[1])
        elif "IDENTITY" in line:
            lines.append(f"{column[1]} INTEGER PRIMARY KEY")
        else:
            kind = "INTEGER" if column[2] in {"int", "bit"} else "TEXT"
            exact = kind == "INTEGER" or "Latin1_General_BIN2" in line
            lines.append(
                f"{column[1]} {kind}"
                + ("" if exact else " COLLATE NOCASE")
                + (" NOT NULL" if "NOT NULL" in line else "")
                + (" UNIQUE" if " UNIQUE" in line else "")
            )
    return found[1], f'CREATE TABLE "{found[1]}" ({", ".join(lines)})'


class Translated:
    """A database in memory with procedures.sql in it."""

    def __init__(self, script: str) -> None:
        self.database = sqlite3.connect(":memory:", isolation_level=None)
        self.routines: dict[str, Routine] = {}
        self.database.create_function("concat_", -1, lambda *v: "".join(str(x or "") for x in v))
        self.database.create_function("now_", 0, lambda: datetime.now().isoformat(" "))
        self.database.create_function("try_date_", 1, _try_date, deterministic=True)
        self.database.create_function("try_bit_", 1, {"0": 0, "1": 1}.get, deterministic=True)
        self.database.create_collation("Latin1_General_BIN2", lambda a, b: (a > b) - (a < b))
        self.run_script(script)

    def run_script(self, script: str) -> None:
        """Tables (those that are missing), views, routines and the cutover date; nothing else."""
        for batch in split_batches(script):
            if (table := read_table(batch)) and not self._has(table[0]):
                self.database.execute(table[1])
            elif routine := read_routine(batch):
                self.routines[routine[0]] = routine[1]
            elif code_of(batch).lstrip().startswith("DECLARE"):
                variables: dict[str, object] = {}
                for statement in split_at(";", without_comments(batch)):
                    self._step(statement, variables, 0)
            elif view := re.search(r"^ALTER VIEW ([\w.]+)\nAS\n(.*);\s*$", batch, re.M | re.S):
                self.database.execute(f'DROP VIEW IF EXISTS "{view[1]}"')
                self.database.execute(f'CREATE VIEW "{view[1]}" AS {to_sqlite(view[2])}')

    def _has(self, name: str) -> bool:
        found = self.database.execute("SELECT 1 FROM sqlite_master WHERE name = ?", [name])
        return found.fetchone() is not None

    def execute(self, sql: str, *values: str | None) -> list[tuple[object, ...]]:
        """One statement of a test, with ? for its values."""
        try:
            return self.database.execute(to_sqlite(sql), values).fetchall()
        except sqlite3.Error as error:
            raise Error(str(error)) from error

    def call(self, procedure: str, *values: str | None) -> None:
        self._run(procedure, values)

    # -------------------------------------------------------------- running a routine

    def _run(self, name: str, values: Sequence[object]) -> object:
        """Run a routine; what a function returns, or None."""
        routine = self.routines[name]
        assert len(values) <= len(routine.parameters), f"{name} takes fewer parameters"
        variables = {**routine.parameters, **dict(zip(routine.parameters, values, strict=False))}
        changed, guarded = 0, False
        for number, statement in enumerate(routine.statements):
            guarded = guarded or statement.startswith("BEGIN TRY")
            if statement.startswith("END TRY"):
                break
            if found := re.fullmatch(r"RETURN (.*)", statement, re.S):
                return self._value(found[1], variables)
            try:
                changed = self._step(statement.removeprefix("BEGIN TRY"), variables, changed)
            except sqlite3.Error as error:
                if not guarded:
                    raise
                variables["problem"] = str(error)
                fail = next(s for s in routine.statements[number:] if s.startswith("EXEC"))
                self._step(fail, variables, 0)
        return None

    def _step(self, statement: str, variables: dict[str, object], changed: int) -> int:
        """Run one statement; the number of rows that the last UPDATE or INSERT changed."""
        text = re.sub(r"\s+", " ", statement).strip()
        if re.match(r"SET [A-Z_]+ (?:ON|OFF)$", text):
            return changed
        if found := re.match(r"IF (.*?) (EXEC|INSERT) ", text):
            condition = found[1].replace("@@ROWCOUNT", str(changed))
            if self._value(f"CASE WHEN {condition} THEN 1 END", variables):
                return self._step(statement[statement.index(found[2]) :], variables, changed)
        elif found := re.match(r"DECLARE @(\w+) TABLE \((.*)\)$", text):
            self.database.execute(f'DROP TABLE IF EXISTS temp."@{found[1]}"')
            self.database.execute(f'CREATE TEMP TABLE "@{found[1]}" ({found[2]})')
        elif found := re.match(r"DECLARE @(\w+) (\w+)(?:\(\d+\))? = (.*)$", text):
            value = self._value(found[3], variables)
            variables[found[1]] = value[:10] if value and found[2] == "date" else value
        elif found := re.match(r"DECLARE @(\w+) \w+$", text):
            variables[found[1]] = None
        elif found := re.match(r"(?:SET|SELECT) @(\w+) = (.*)$", text):
            variables[found[1]] = self._value(found[2], variables)
        elif found := re.match(r"EXEC ([\w.]+) (.*)$", text):
            self._run(found[1], [self._value(v, variables) for v in split_at(",", found[2])])
        elif found := re.match(r"THROW 50001, @(\w+), 1$", text):
            raise Error(str(variables[found[1]]).replace("%%", "%"))
        else:
            assert text.startswith(("UPDATE ", "INSERT ")), text
            return self.database.execute(to_sqlite(statement), variables).rowcount
        return changed

    def _value(self, expression: str, variables: dict[str, object]) -> object:
        if found := re.fullmatch(r"(samegoal\.\w+)\((.*)\)", expression):
            values = [self._value(v, variables) for v in split_at(",", found[2])]
            return self._run(found[1], values)
        return self.database.execute(to_sqlite(f"SELECT {expression}"), variables).fetchone()[0]
