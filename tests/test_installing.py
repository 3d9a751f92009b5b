"""`sgsync.py procedures`: scripts split at GO, the list, --install and --diff on real databases."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import sgsync
from sgsync import MSSQL, POSTGRESQL, SqlScript
from support import homes, servers
from support.terminal import typed

SHIPPED = homes.SCRIPT.with_name("procedures.sql")

# ------------------------------------------------------------------ SqlScript


@pytest.mark.parametrize(
    ("product", "text", "expected"),
    [
        (MSSQL, "", []),
        (MSSQL, "-- nothing\n/* here */\nGO\n", []),
        (MSSQL, "SELECT 1", [("SELECT 1", 1, 1)]),
        (MSSQL, "SELECT 1\nGO\nSELECT 2\n", [("SELECT 1\n", 1, 1), ("\nSELECT 2\n", 3, 1)]),
        (MSSQL, "a\r\n\tgo \r\n\r\nb\r\nGo 3\r\n", [("a\r\n", 1, 1), ("\r\nb\r\n", 4, 3)]),
        (MSSQL, "a\nGO\nGO\n\n\nb", [("a\n", 1, 1), ("b", 6, 1)]),
        (MSSQL, "a\nGO -- next\nb", [("a\n", 1, 1), ("\nb", 3, 1)]),
        (MSSQL, "SELECT 1 AS\nGOLD\nGO1\nGO x\nGOTO y", None),
        (MSSQL, "'it''s\nGO\n' a", None),
        (MSSQL, '"a""\nGO\n" a', None),
        (MSSQL, "[a]]\nGO\n] a", None),
        (MSSQL, "x /* /* \nGO\n*/ \nGO\n*/ y", None),
        (MSSQL, "x -- don't\nGO\ny", [("x -- don't\n", 1, 1), ("\ny", 3, 1)]),
        (MSSQL, "x /* don't */\nGO\ny", [("x /* don't */\n", 1, 1), ("\ny", 3, 1)]),
        (MSSQL, "SELECT '-- /*'\nGO\ny", [("SELECT '-- /*'\n", 1, 1), ("\ny", 3, 1)]),
        (MSSQL, "SELECT [it's]\nGO\ny", [("SELECT [it's]\n", 1, 1), ("\ny", 3, 1)]),
        (MSSQL, "'open\nGO\n", None),
        (MSSQL, "x /* open\nGO\n", None),
        (POSTGRESQL, "$$ '\nGO\n$$ a", None),
        (POSTGRESQL, "$a1$ $$ \nGO\n$a1$ a", None),
        (POSTGRESQL, r"E'it\'s" + "\nGO\n' a", None),
        (POSTGRESQL, "x[1]['a']\nGO\ny", [("x[1]['a']\n", 1, 1), ("\ny", 3, 1)]),
        (POSTGRESQL, "x[\nGO\ny", [("x[\n", 1, 1), ("\ny", 3, 1)]),
        (POSTGRESQL, "a$1$b\nGO\nc", [("a$1$b\n", 1, 1), ("\nc", 3, 1)]),
        ("SQLite", "`a\nGO\n` a", None),
    ],
)
def test_script_splits_at_go(
    product: str, text: str, expected: Sequence[tuple[str, int, int]] | None
) -> None:
    """None: GO in it separates nothing."""
    found = [(b.text.strip("\r\n"), b.line, b.times) for b in SqlScript(text, product).batches()]
    if expected is None:
        expected = [(text, 1, 1)]
    assert found == [(part.strip("\r\n"), line, times) for part, line, times in expected]


def test_script_finds_every_batch_of_the_shipped_file() -> None:
    from support.tsql import split_batches

    script = SqlScript.read(SHIPPED, MSSQL)
    assert [b.text.strip() for b in script.batches()] == [
        batch.strip() for batch in split_batches(script.text)
    ]
    lines = script.text.split("\n")
    for batch in script.batches():
        assert lines[batch.line - 1] == batch.text.lstrip("\r\n").split("\n")[0]
    names = [definition.name for definition in script.definitions()]
    assert "dbo.sg_iep_upsert" in names
    assert len(names) == len(set(names)) == script.text.count("\nALTER ")
    for definition in script.definitions():
        assert lines[definition.line - 1].startswith("ALTER ")


def test_script_compares_without_comments_and_white_space() -> None:
    def text(sql: str) -> str:
        (found,) = SqlScript(sql, MSSQL).definitions()
        assert found.text
        return found.text.comparable()

    one = text("/* x */ CREATE PROCEDURE dbo.p @a int AS\nSELECT 'a  b', @a;\nGO\n")
    assert one == text("ALTER  PROC dbo.p\r\n  @a int\r\nAS -- why\r\nSELECT 'a  b', @a")
    assert one == text("create or alter procedure dbo.p @a int AS SELECT 'a  b', @a")
    assert one != text("CREATE PROCEDURE dbo.p @a int AS SELECT 'a b', @a")
    assert one != text("CREATE PROCEDURE dbo.p @a int AS SELECT 'A  B', @a")


def test_script_refuses_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "procedures.sql"
    path.write_bytes(b"SELECT 1\nGO\nSELECT '\xe9'")
    with pytest.raises(sgsync.ConfigError, match=r"sql:3: neither UTF-8 nor UTF-16"):
        SqlScript.read(path, MSSQL)
    path.write_bytes("SELECT 'é'".encode("utf-16"))
    assert SqlScript.read(path, MSSQL).text == "SELECT 'é'"
    path.unlink()
    with pytest.raises(sgsync.ConfigError, match="cannot be read"):
        SqlScript.read(path, MSSQL)


# ------------------------------------------------------------------ the list

POSTGRES_SCRIPT = """-- The procedures of a district.
CREATE OR REPLACE PROCEDURE sg_iep_upsert(n text, d text, s text, m text) LANGUAGE plpgsql AS $$
BEGIN
    /* It's not this one:
GO
    */
    UPDATE iep SET status = s, manager = m WHERE studentNumber = n AND startDate = d;
    IF NOT FOUND THEN INSERT INTO iep VALUES (n, d, s, m); END IF;
END $$;
go

CREATE OR REPLACE PROCEDURE sg_iep_delete(n text, d text) LANGUAGE sql AS '
    DELETE FROM iep WHERE studentNumber = n AND startDate = d';
GO
INSERT INTO calls VALUES ('it''s
GO
');
GO 3
"""


@pytest.fixture
def home(postgres_home: homes.Home) -> homes.Home:
    postgres_home.database.execute(
        "DROP PROCEDURE sg_iep_upsert; DROP PROCEDURE sg_iep_delete; CREATE TABLE calls (x text)"
    )
    (postgres_home.path / "procedures.sql").write_text(POSTGRES_SCRIPT)
    return postgres_home


def outcome(
    home: homes.Home, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, list[list[str]], str]:
    """Exit code, the cells of standard output, standard error."""
    code = home.main("procedures", *words)
    out, err = capsys.readouterr()
    return code, [line.split("  ") for line in out.splitlines()], err


def test_procedures_lists_what_is_there_and_what_is_missing(
    home: homes.Home, capsys: pytest.CaptureFixture[str]
) -> None:
    home.configure(upload="<SQL>{CALL sg_cleanup}</SQL>")
    home.database.execute("CREATE PROCEDURE sg_iep_delete(n text) LANGUAGE sql AS 'SELECT 1'")
    code = home.main("procedures")
    out, err = capsys.readouterr()
    line = home.line("{CALL sg_cleanup}")
    assert code == 4
    assert out == (
        "procedure      state    parameters  passed  used by\n"
        "sg_iep_upsert  missing              4       iep.csv insert, iep.csv update\n"
        "sg_iep_delete  found    1           2       iep.csv delete\n"
        f"sg_cleanup     missing                      <SQL> config.xml:{line}\n"
    )
    assert "3 procedures cannot be called:\n" in err
    assert "sg_iep_upsert: it does not exist\n" in err
    assert "sg_iep_delete: it takes 1 parameter, but config.xml passes 2\n" in err
    assert "procedures --install --home" in err
    assert home.runs() == []
    assert home.main("procedures", "--json") == 4
    found = json.loads(capsys.readouterr().out)
    assert found[1] == {
        "procedure": "sg_iep_delete", "state": "found", "takes": "1", "passed": "2",
        "used_by": "iep.csv delete",
        "fault": "it takes 1 parameter, but config.xml passes 2",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sql", "fault"),
    [
        ("p", "CREATE PROCEDURE P(a text, b text) LANGUAGE sql AS 'SELECT 1'", ""),
        ('"P"', "CREATE PROCEDURE p(a text, b text) LANGUAGE sql AS 'SELECT 1'", "not exist"),
        ('x."P q"', "CREATE SCHEMA x; CREATE PROCEDURE x.\"P q\"(a text, b text) LANGUAGE sql "
                    "AS 'SELECT 1'", ""),
        ("q", "CREATE SCHEMA x; CREATE PROCEDURE x.q(a text, b text) LANGUAGE sql AS 'SELECT 1'",
         "not exist"),
        ("f", "CREATE FUNCTION f(a text, b text) RETURNS int LANGUAGE sql AS 'SELECT 1'",
         "it is a function, not a procedure"),
        ("p", "CREATE PROCEDURE p(a text, b text, c text = '') LANGUAGE sql AS 'SELECT 1'", ""),
        ("p", "CREATE PROCEDURE p(a text, VARIADIC b text[]) LANGUAGE sql AS 'SELECT 1'", ""),
        ("p", "CREATE PROCEDURE p(a text) LANGUAGE sql AS 'SELECT 1'; "
              "CREATE PROCEDURE p(a text, b text) LANGUAGE sql AS 'SELECT 1'", ""),
        ("p", "CREATE PROCEDURE p(a text, b text, c text) LANGUAGE sql AS 'SELECT 1'",
         "it takes 3 parameters, but config.xml passes 2"),
    ],
)  # fmt: skip
def test_catalog_finds_faults(postgres: servers.Database, name: str, sql: str, fault: str) -> None:
    postgres.execute(sql)
    with sgsync.Database(
        sgsync.DatabaseSettings(connection_string=postgres.connection_string)
    ) as database:
        database.connect()
        found = sgsync.Catalog(database).fault(name, 2)
    assert (fault in found) if fault else (found == "")


def test_catalog_finds_a_missing_right(
    postgres: servers.Database, postgres_server: servers.Postgres
) -> None:
    user = servers.fresh_name()
    postgres.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'Mellon-9'")
    postgres.execute(
        "CREATE PROCEDURE p(a text) LANGUAGE sql AS 'SELECT 1';"
        "REVOKE EXECUTE ON PROCEDURE p FROM PUBLIC"
    )
    text = postgres.connection_string.replace(f"UID={postgres_server.username};", f"UID={user};")
    text = text.replace(f"PWD={postgres_server.password};", "PWD=Mellon-9;")
    try:
        with sgsync.Database(sgsync.DatabaseSettings(connection_string=text)) as database:
            database.connect()
            assert sgsync.Catalog(database).fault("p", 1) == "this login may not execute it"
    finally:
        postgres.execute(f"DROP ROLE {user}")


# ------------------------------------------------------------------ --install


def test_procedures_install_runs_every_batch(
    home: homes.Home, capsys: pytest.CaptureFixture[str]
) -> None:
    code, table, err = outcome(home, capsys, "--install", "--yes")
    assert (code, [row[0].split()[0] for row in table[1:]]) == (
        0, ["sg_iep_upsert", "sg_iep_delete"],
    )  # fmt: skip
    assert f"{home.path}/procedures.sql: installed in the database " in err
    assert home.database.rows("SELECT x FROM calls") == [("it's\nGO\n",)] * 3
    home.extract([("1001", "2026-01-05", "LOCKED", "Ana")])
    assert home.main() == 0
    assert home.sis_rows() == [("1001", "2026-01-05", "LOCKED", "Ana")]
    assert outcome(home, capsys, "--install", "--yes")[0] == 0


def test_procedures_install_prefers_the_local_file(
    home: homes.Home, capsys: pytest.CaptureFixture[str]
) -> None:
    (home.path / "procedures.local.sql").write_text("INSERT INTO calls VALUES ('local')")
    assert outcome(home, capsys, "--install", "--yes")[0] == 4  # it defines none
    assert home.database.rows("SELECT x FROM calls") == [("local",)]


def test_procedures_install_tells_every_error_and_changes_nothing(
    home: homes.Home, capsys: pytest.CaptureFixture[str]
) -> None:
    script = POSTGRES_SCRIPT + "\n-- wrong\nSELECT 1;\nSELECT nocolumn FROM iep;\nGO\nSELCT 1\nGO\n"
    script += "INSERT INTO iep VALUES (1)\nGO\nSELECT\n  1/0\n"
    (home.path / "procedures.sql").write_text(script)
    code, table, err = outcome(home, capsys, "--install", "--yes")
    lines = script.split("\n")
    assert (code, table) == (4, [])
    assert f"{home.path}/procedures.sql: 4 errors, all was rolled back:\n" in err

    def place(text: str) -> str:
        return f"procedures.sql:{lines.index(text) + 1}: "

    assert f'{place("SELECT nocolumn FROM iep;")}ERROR: column "nocolumn" does not exist\n' in err
    assert f'{place("SELCT 1")}ERROR: syntax error at or near "SELCT"\n' in err
    first = lines.index("SELECT") + 1
    assert f"procedures.sql:{first}-{first + 1}: ERROR: division by zero\n" in err
    assert home.database.rows("SELECT x FROM calls") == []
    assert home.database.rows("SELECT 1 FROM pg_proc WHERE proname = 'sg_iep_upsert'") == []


def test_procedures_install_asks_first(home: homes.Home) -> None:
    command = [sys.executable, str(homes.SCRIPT), "procedures", "--install"]
    command += ["--home", str(home.path)]
    code, out, shown = typed(command, [("Run it? (yes/no) ", "no")])
    assert (code, out, home.database.rows("SELECT x FROM calls")) == (2, "", [])
    assert f"{home.path}/procedures.sql: 3 batches for the database " in shown
    assert "nothing was changed\n" in shown
    code, _, shown = typed(command, [("Run it? (yes/no) ", "yes")])
    assert (code, len(home.database.rows("SELECT x FROM calls"))) == (0, 3), shown


def test_procedures_install_without_a_terminal_needs_yes(
    home: homes.Home, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = outcome(home, capsys, "--install")
    assert (code, home.database.rows("SELECT x FROM calls")) == (2, [])
    assert "procedures --install --yes --home" in err


# ------------------------------------------------------------------ --diff


def test_procedures_diff_shows_what_differs(
    home: homes.Home, capsys: pytest.CaptureFixture[str]
) -> None:
    def states(*words: str) -> dict[str, str]:
        assert home.main("procedures", "--diff", "--json", *words) == 0
        return {line["procedure"]: line["state"] for line in json.loads(capsys.readouterr().out)}

    assert states() == {"sg_iep_upsert": "missing", "sg_iep_delete": "missing"}
    home.main("procedures", "--install", "--yes")
    capsys.readouterr()
    assert states() == {"sg_iep_upsert": "same", "sg_iep_delete": "same"}
    script = POSTGRES_SCRIPT.replace("BEGIN\n", "BEGIN -- it begins\n\n")
    (home.path / "procedures.sql").write_text(script)
    assert states()["sg_iep_upsert"] == "same"
    script = script.replace("manager = m WHERE", "manager = upper(m) WHERE")
    (home.path / "procedures.sql").write_text(script)
    assert states() == {"sg_iep_upsert": "differs", "sg_iep_delete": "same"}
    assert home.main("procedures", "--diff", "--verbose") == 0
    out = capsys.readouterr().out
    assert "sg_iep_upsert  differs  procedures.sql:2\n" in out
    assert "    -    UPDATE iep SET status = s, manager = m WHERE" in out
    assert "    +    UPDATE iep SET status = s, manager = upper(m) WHERE" in out
    assert home.database.rows("SELECT count(*) FROM calls") == [(3,)]


# ------------------------------------------------------------------ SQL Server


def test_procedures_on_sql_server(
    tmp_path: Path, sshd_server: servers.Sshd, sftp_root: Path, mssql: servers.Database,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The shipped file, installed twice; what it defines is then the same."""
    home = homes.Home(tmp_path / "home", sshd_server, sftp_root, mssql)
    (home.path / "procedures.sql").write_bytes(SHIPPED.read_bytes())
    for _ in range(2):
        assert home.main("procedures", "--install", "--yes") == 0
    capsys.readouterr()
    assert home.main("procedures", "--diff", "--json") == 0
    lines = json.loads(capsys.readouterr().out)
    assert {line["state"] for line in lines} == {"same"}
    script = SHIPPED.read_text("utf-8").replace(
        "SET NOCOUNT ON;", "SET NOCOUNT ON; SELECT nocolumn;"
    )
    (home.path / "procedures.sql").write_text(script, encoding="utf-8")
    assert home.main("procedures", "--install", "--yes") == 4
    assert "all was rolled back" in capsys.readouterr().err
    mssql.execute("DROP PROCEDURE sg_iep_delete")
    assert home.main("procedures") == 4
    assert "sg_iep_delete: it does not exist" in capsys.readouterr().err
