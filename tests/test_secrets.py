"""Passwords stand nowhere; personal data stands in the data files alone.

A password is looked for in everything that a run prints and leaves, whichever way it ends, and in
every spelling that a driver, an XML file or a traceback could give it. SchooLinks' and Oracle's
passwords are looked for by test_schoolinks.py.
"""

from __future__ import annotations

import html
import itertools
import json
import random
import subprocess
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sgsync
from support import fuzz, homes, servers

PASSWORD = "Tïger;}{ 'x\\5&<ÿ>%41+ \" end"
PASSPHRASE = "mellon & <friend>  of 'all' \\n \"two\" €"
ROWS = [("1001", "2026-01-05", "LOCKED", "Ann"), ("1002", "2026-01-06", "LOCKED", "Bob")]
VERBOSITIES = ([], ["--quiet"], ["--json", "--verbose"])


@pytest.fixture(autouse=True)
def no_waiting(short_pauses: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several runs in one second wait for each other no longer."""
    numbers = itertools.count()

    def new_epoch(history: Path) -> Path:
        folder = history / f"20260101-{next(numbers):06}"
        folder.mkdir(mode=0o700, parents=True)
        return folder

    monkeypatch.setattr(sgsync.Run, "_new_folder", staticmethod(new_epoch))


def spellings(secret: str) -> set[str]:
    return {
        secret,
        secret.replace("}", "}}"),
        html.escape(secret),
        html.escape(secret, quote=False),
        repr(secret)[1:-1],
        repr(secret.replace("}", "}}"))[1:-1],
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        urllib.parse.quote(secret),
        " ".join(secret.split()),
        sgsync.one_line(secret),
        secret.encode("unicode_escape").decode(),
    }


# ------------------------------------------------------------------ a home with passwords


@pytest.fixture
def home(
    postgres_home: homes.Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[homes.Home]:
    """A home whose database and whose key have passwords of the difficult kind."""
    home = postgres_home
    role = servers.fresh_name()
    literal = PASSWORD.replace("'", "''")
    home.database.execute(f"CREATE ROLE {role} SUPERUSER LOGIN PASSWORD '{literal}'")
    key = home.path / "ssh/id_rsa"
    home.private_key("encrypted")
    subprocess.run(
        ["ssh-keygen", "-q", "-p", "-P", home.sshd.passphrase, "-N", PASSPHRASE, "-f", key],
        check=True, capture_output=True,
    )  # fmt: skip
    monkeypatch.setenv("SIS_DB_PASSWORD", PASSWORD)
    monkeypatch.setenv("SFTP_PASSPHRASE", PASSPHRASE)
    given = home.values["connection"]
    plain = given[given.index("PWD=") : given.index(";", given.index("PWD="))]
    home.configure(
        connection=given.replace(plain, "PWD=${env:SIS_DB_PASSWORD}").replace(
            "UID=sgsync", f"UID={role}"
        ),
        sftp='passphrase="${env:SFTP_PASSPHRASE}"',
    )
    home.extract(ROWS)
    yield home
    home.database.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.fixture
def leaves_no_secret(
    home: homes.Home, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Runs at every verbosity that must end with a code; returns what the last one logged."""

    def check(code: int, *secrets: str) -> str:
        for verbosity in VERBOSITIES:
            monkeypatch.setattr(sgsync, "_SECRETS", set())  # each run has to learn them by itself
            assert home.main("sync", *verbosity) == code, home.log
        printed = capfd.readouterr()
        texts = {"stdout": printed.out, "stderr": printed.err}
        for folder in (home.path / "history", home.sftp_root / "upload"):
            for path in folder.rglob("*"):
                texts[str(path)] = path.read_text("utf-8") if path.is_file() else path.name
        wanted = set(itertools.chain(*map(spellings, (PASSWORD, PASSPHRASE, *secrets))))
        for name, text in texts.items():
            assert not [secret for secret in wanted if secret in text], name
        return home.log

    return check


Check = Callable[..., str]


def function(home: homes.Home, body: str) -> None:
    literal = body.replace("'", "''")
    home.database.execute(
        "CREATE FUNCTION angry() RETURNS text LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '%', '{literal}'; END $$"
    )


def test_secrets_are_nowhere(home: homes.Home, leaves_no_secret: Check) -> None:
    leaves_no_secret(0)
    assert home.sis_rows() == ROWS


@pytest.mark.parametrize("wrong", ["Wrong;{pass}word&1", "plainwrong"])
def test_a_wrong_database_password_is_not_shown(
    leaves_no_secret: Check, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setenv("SIS_DB_PASSWORD", wrong)
    assert "check user, password and database in connectionString" in leaves_no_secret(4, wrong)


def test_a_wrong_passphrase_is_not_shown(
    leaves_no_secret: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTP_PASSPHRASE", "Wrong & <wrong>")
    assert "the passphrase is wrong" in leaves_no_secret(2, "Wrong & <wrong>")


def test_a_refused_key_shows_no_password(home: homes.Home, leaves_no_secret: Check) -> None:
    home.private_key("stranger")
    assert "log-in as" in leaves_no_secret(3)


def test_a_key_of_another_form_shows_no_password(home: homes.Home, leaves_no_secret: Check) -> None:
    (home.path / "ssh/id_rsa").write_text(f"no key\n{PASSPHRASE}\n", encoding="utf-8")
    leaves_no_secret(2)


def test_a_query_error_that_quotes_passwords_shows_none(
    home: homes.Home, leaves_no_secret: Check
) -> None:
    """As a linked server's driver may quote the connection string that it was given."""
    function(
        home, f"cannot connect: PWD={{{PASSWORD.replace('}', '}}')}}}; {PASSPHRASE}; {PASSWORD}"
    )
    home.configure(query="SELECT angry()")
    assert "cannot connect: PWD=***; ***; ***" in leaves_no_secret(4)


def test_a_row_whose_error_quotes_passwords_shows_none(
    home: homes.Home, leaves_no_secret: Check
) -> None:
    function(home, f"{PASSWORD}, {PASSPHRASE}")
    home.database.execute(
        "CREATE OR REPLACE PROCEDURE sg_iep_upsert(n text, d text, s text, m text) "
        "LANGUAGE plpgsql AS $$ BEGIN PERFORM angry(); END $$"
    )
    assert "***, ***" in leaves_no_secret(8)
    assert "***, ***" in (home.run / "failures.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (lambda config: RuntimeError(config.database.connection_string), 1),
        (lambda config: KeyError(config.database.connection_string), 1),
        (lambda config: ValueError(config, config.sftp.passphrase), 1),
        (lambda config: OSError(5, config.database.connection_string, config.sftp.passphrase), 1),
        (lambda config: UnicodeEncodeError("ascii", config.sftp.passphrase, 0, 1, "odd"), 1),
        (lambda config: sgsync.DataError(config.sftp.passphrase, config.sftp.passphrase), 5),
    ],
    ids=["plain", "repr", "several", "os", "unicode", "own"],
)
def test_a_traceback_shows_no_password(
    leaves_no_secret: Check,
    monkeypatch: pytest.MonkeyPatch,
    raised: Callable[[sgsync.SyncConfig], Exception],
    code: int,
) -> None:
    def fail(sync: sgsync.Sync) -> None:
        config = sync.config
        try:
            raise RuntimeError(config.sftp.passphrase + config.database.connection_string)
        except RuntimeError as error:
            raise raised(config) from error

    monkeypatch.setattr(sgsync.Sync, "compare_files", fail)
    assert ("Traceback" in leaves_no_secret(code)) == (code == 1)


@pytest.mark.parametrize(
    "values",
    [
        {"port": "${env:SIS_DB_PASSWORD}"},
        {"username": "${env:SFTP_PASSPHRASE}"},
        {"host": "${env:SFTP_PASSPHRASE}"},
        {"sftp": 'passphrase="${env:SFTP_PASSPHRASE}" timeoutSeconds="${env:SFTP_PASSPHRASE}"'},
        {"sftp": 'passphrase="${env:SFTP_PASSPHRASE}" password="${env:SFTP_PASSPHRASE}"'},
        {"sftp": 'passphrase="${env:SFTP_PASSPHRASE}" maxAgeHours="PWD=secret99;"'},
        {"sftp": 'passphrase="secret99" passphrase="secret99"'},
        {"sftp": 'passphrase="secret99 & co"'},
        {"sftp": 'passphrase="secret99 < co"'},
        {"sftp": 'passphrase="co" secret99"'},
        {"sftp": 'passphrase="co${secret99"'},
        {"sftp": 'password="secret99"'},
        {"connection": "Driver=x;UID=y;PWD=co${secret99;"},
        {"connection": "Driver=x;UID=y;PWD=co&secret99;"},
        {"database": 'batchSize="Driver=x;PWD=secret99"'},
        {"database": 'connectionSting="Driver=x;PWD=secret99"'},
        {"more": "<Password>secret99</Password>"},
        {"more": '<Notify ping="https:// secret99"/>'},
        {"more": '<Notify url="secret99"/>'},
        {"more": '<Notify on="secret" url="json://h/secret99"/>'},
        {"more": "secret99"},
    ],
    ids=str,
)
def test_a_password_in_the_wrong_place_of_the_configuration_is_not_shown(
    home: homes.Home, leaves_no_secret: Check, values: dict[str, str]
) -> None:
    home.configure(**values)
    code = 3 if {"username", "host"} & values.keys() else 2
    leaves_no_secret(code, "secret99")


def test_a_keyring_shows_no_password(
    home: homes.Home, leaves_no_secret: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keyring
    import keyring.errors

    entries = {"database": PASSWORD, "key": PASSPHRASE}
    monkeypatch.setattr(keyring, "get_password", lambda _, name: entries.get(name))
    home.configure(
        connection=home.values["connection"]
        .replace("${env:SIS_DB_", "${keyring:")
        .replace("PASSWORD}", "database}"),
        sftp='passphrase="${keyring:key}"',
    )
    leaves_no_secret(0)
    entries["database"] = "another one & wrong"
    leaves_no_secret(4, "another one & wrong")
    del entries["database"]
    assert "the keyring entry database is not set" in leaves_no_secret(2)

    def locked(*_: object) -> None:
        raise keyring.errors.KeyringLocked("locked")

    monkeypatch.setattr(keyring, "get_password", locked)
    leaves_no_secret(2)


def test_files_with_passwords_show_none(home: homes.Home, leaves_no_secret: Check) -> None:
    home.configure(
        connection=home.values["connection"].replace("${env:SIS_DB_PASSWORD}", "${file:ssh/db}"),
        sftp='passphrase="${file:ssh/key}"',
    )
    for name, secret in (("db", PASSWORD), ("key", PASSPHRASE)):
        (home.path / "ssh" / name).write_text(f"{secret}\n", encoding="utf-8")
    leaves_no_secret(0)
    (home.path / "ssh/db").write_text("another one & wrong", encoding="utf-8")
    leaves_no_secret(4, "another one & wrong")
    (home.path / "ssh/db").write_text("\n  another one & wrong", encoding="utf-8")
    assert "the first line of the file" in leaves_no_secret(2, "another one & wrong")


def test_passwords_with_any_character_break_no_xml_that_would_show_them(tmp_path: Path) -> None:
    """A password written into config.xml as it is, although XML wants it escaped."""
    chance = random.Random(7)
    parts = ["Aq7xK", "Zt9wM", "Vb3nR"]
    signs = ["&", "<", ">", '"', "'", '" ', '="', "&x;", "&#1;", "${", "}", ";", "%", "\\", "/>"]
    signs += ["-->", " = ", "<!--", "<![CDATA[", "?>", "\x01", "é", "  ", "\n"]
    path = tmp_path / "config.xml"
    for _ in range(400):
        written = "".join(part + chance.choice(signs) for part in parts)
        place = chance.choice(('passphrase="', "UID=u;PWD="))
        text = fuzz.CONFIG.replace(f"{place}${{env:SGSYNC_FUZZ}}", place + written)
        path.write_text(text.replace("${env:SGSYNC_FUZZ}", "x"), encoding="utf-8")
        message = _message(path)
        assert not [part for part in parts if part in message], (written, message)


def _message(path: Path) -> str:
    try:
        sgsync.load_config(path, sgsync.SyncConfig)
    except sgsync.ConfigError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------ personal data

MARK = "Zyx"  # in every value that is neither a key nor a status


def private(number: int) -> str:
    return f'"{MARK}{number}, O\'{MARK} ""{MARK}"""'


def people(*numbers: int, status: str = "LOCKED") -> list[homes.Row]:
    return [(str(n), "2026-01-05", status, private(n)) for n in numbers]


def stored(rows: list[homes.Row]) -> list[homes.Row]:
    return [(*row[:3], row[3][1:-1].replace('""', '"')) for row in rows]


@pytest.fixture
def tells_nobody(
    postgres_home: homes.Home, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs at every verbosity that must end with a code and tell no marked value."""
    home = postgres_home
    home.database.execute(
        f"""CREATE OR REPLACE PROCEDURE sg_iep_upsert(n text, d text, s text, m text)
        LANGUAGE plpgsql AS $$
        BEGIN
            IF s = 'RAISE' THEN RAISE EXCEPTION 'student % (%) is odd', n, m
                USING DETAIL = m, HINT = m; END IF;
            IF s = 'CAST' THEN PERFORM m::integer; END IF;
            IF s = 'DATE' THEN PERFORM m::date; END IF;
            IF s = 'SAME' THEN m := '{MARK}same'; END IF;
            UPDATE iep SET status = s, manager = m WHERE studentNumber = n AND startDate = d;
            IF NOT FOUND THEN INSERT INTO iep VALUES (n, d, s, m); END IF;
        END $$"""
    )

    def check(code: int, *argv: str) -> str:
        for verbosity in VERBOSITIES:
            assert home.main(*(argv or ("sync",)), *verbosity) == code, home.log
        printed = capfd.readouterr()
        texts = {"stdout": printed.out, "stderr": printed.err}
        for run in home.runs():
            for path in run.iterdir():
                if path.is_file():
                    texts[path.name] = path.read_text("utf-8")
        for name, text in texts.items():
            assert MARK.lower() not in text.lower(), (name, text)
        return home.log

    return check


def test_success_tells_no_personal_data(postgres_home: homes.Home, tells_nobody: Check) -> None:
    home = postgres_home
    home.configure(database='verify="true"', upload='<SQL file="n.csv">SELECT 1 AS "n"</SQL>')
    home.sis(stored([*people(1002, status="OPEN"), *people(1009)]))
    home.extract(people(1001, 1002, 1003))
    tells_nobody(0)


def test_failed_rows_tell_no_personal_data(postgres_home: homes.Home, tells_nobody: Check) -> None:
    home = postgres_home
    home.database.execute("CREATE UNIQUE INDEX odd ON iep (manager)")
    home.database.execute("ALTER TABLE iep ADD CHECK (status <> 'CHECK')")
    home.extract([
        row
        for number, status in enumerate(("RAISE", "CAST", "DATE", "SAME", "SAME", "CHECK"), 1001)
        for row in people(number, status=status)
    ])  # fmt: skip
    log = tells_nobody(8)
    for number in (1001, 1002, 1003, 1005, 1006):
        assert f"insert of studentNumber={number}, startDate=2026-01-05 failed: " in log
    assert "student 1001 (...) is odd" in log
    assert 'violates unique constraint "odd"' in log


def test_held_and_dry_runs_tell_no_personal_data(
    postgres_home: homes.Home, tells_nobody: Check
) -> None:
    home = postgres_home
    home.configure(diff='maxDeletes="0" maxUpdates="0"')
    home.sis(stored([*people(1001, status="OPEN"), *people(1002)]))
    home.extract(people(1001))
    tells_nobody(6)
    tells_nobody(6, "sync", "--dry-run")


def test_rows_that_do_not_converge_tell_no_personal_data(
    postgres_home: homes.Home, tells_nobody: Check
) -> None:
    home = postgres_home
    home.configure(database='verify="true"')
    home.database.execute(
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$; "
        "CREATE TRIGGER keep BEFORE INSERT ON iep FOR EACH ROW EXECUTE FUNCTION keep()"
    )
    home.extract(people(1001))
    assert "did not converge" in tells_nobody(8)


def test_differences_of_format_tell_no_personal_data(
    postgres_home: homes.Home, tells_nobody: Check
) -> None:
    home = postgres_home
    numbers = range(1001, 1010)
    home.sis([(str(n), "2026-01-05", "LOCKED", f"{MARK} {n} ") for n in numbers])
    home.extract([(str(n), "2026-01-05", "LOCKED", f"{MARK} {n}") for n in numbers])
    home.database.execute(
        "CREATE OR REPLACE PROCEDURE sg_iep_upsert(n text, d text, s text, m text) "
        "LANGUAGE sql AS 'SELECT 1'"
    )
    assert "trailing blanks, as in studentNumber=1001" in tells_nobody(0)


HEADER = f"{homes.HEADER}\r\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"1001,2026-01-05,LOCKED,{MARK}\r\n", "its header may be missing"),
        (f"{HEADER}1001,2026-01-05,LOCKED,{MARK},{MARK}\r\n", "has 5 fields"),
        (f'{HEADER}1001,2026-01-05,LOCKED,{MARK}"{MARK}\r\n', "a field contains a quote"),
        (f'{HEADER}1001,2026-01-05,LOCKED,"{MARK}\r\n', "is never closed"),
        (f"{HEADER}1001,2026-01-05,LOCKED,{MARK}\r{MARK}\r\n", "a carriage return"),
        (f"{HEADER}1001,2026-01-05,LOCKED,{MARK}\0\r\n", "NUL"),
        (f"{HEADER}1002,2026-01-05,LOCKED,{MARK}\r\n1001,2026-01-05,x,{MARK}\r\n", "not sorted"),
        (f"{HEADER}1001,2026-01-05,LOCKED,{MARK}\r\n1001,2026-01-05,x,{MARK}\r\n", "the same key"),
    ],
)
def test_bad_files_tell_no_personal_data(
    postgres_home: homes.Home, tells_nobody: Check, content: str, message: str
) -> None:
    postgres_home.extract(files={"iep.csv": content})
    assert message in tells_nobody(5)


@pytest.mark.parametrize(
    "column",
    [
        f"CAST('{MARK} Ann' AS integer)",
        f"CAST('{MARK} Ann' AS date)",
        f"to_date('{MARK}', 'YYYY')",
        "CAST(manager AS integer)",
        "CAST(manager AS json)",
    ],
)
def test_query_errors_tell_no_personal_data(
    postgres_home: homes.Home, tells_nobody: Check, column: str
) -> None:
    """A value that a query cannot convert is quoted by the database: it belongs to somebody."""
    home = postgres_home
    home.sis(stored(people(1001)))
    home.extract(people(1001))
    home.configure(query=f"SELECT studentNumber, {column} FROM iep")
    assert "ic/iep.csv: the query" in tells_nobody(4)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "Conversion failed when converting the nvarchar value 'Ann O'Neil' to data type int.",
            "Conversion failed when converting the nvarchar value '...' to data type int.",
        ),
        (
            "The conversion of the varchar value '4711' overflowed an int column.",
            "The conversion of the varchar value '...' overflowed an int column.",
        ),
        (
            "String or binary data would be truncated in table 'd.dbo.t', column 'c'. Truncated "
            "value: 'Ann O'.",
            "String or binary data would be truncated in table 'd.dbo.t', column 'c'. Truncated "
            "value: '...'.",
        ),
        (
            "Violation of UNIQUE KEY constraint 'U'. Cannot insert duplicate key in object 'dbo.t'."
            " The duplicate key value is (Ann, 1).",
            "Violation of UNIQUE KEY constraint 'U'. Cannot insert duplicate key in object 'dbo.t'."
            " The duplicate key value is (...).",
        ),
        (
            'ERROR: value "99999999999" is out of range for type integer',
            'ERROR: value "..." is out of range for type integer',
        ),
        ('ERROR: column "value" does not exist', 'ERROR: column "value" does not exist'),
    ],
)
def test_driver_message_leaves_out_what_a_database_could_not_convert(text: str, told: str) -> None:
    said = sgsync.DriverMessage("22018", f"[22018] [Some][Driver]{text} (245) (SQLExecDirectW)")
    assert said.text == told
