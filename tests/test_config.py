"""config.xml: what loads, and what each mistake is told as: file, line, element, reason, remedy."""

from __future__ import annotations

import datetime
import decimal
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sgsync
from support import homes, servers

GOOD = """\
<?xml version="1.0" encoding="UTF-8"?>
<Config>
  <SFTP host="sftp.example.org" port="22"
        username="district.example.org"
        passphrase="${env:TEST_PASSPHRASE}"/>
  <Database connectionString="Driver={Some};Server=db;UID=sis;PWD=${env:TEST_PASSWORD}"
            batchSize="500"/>
  <Limits maxDeletes="10%" maxUpdates="50%" maxFailures="25"/>
  <History keepRuns="365"/>
  <Download>
    <SQLDiff file="iep.csv"
             key="studentNumber,startDate">
      <Query>SELECT 1</Query>
      <Insert procedure="dbo.sg_iep_upsert"/>
      <Update parameters="a,b">UPDATE t SET a = ? WHERE b = ?</Update>
      <Delete procedure="dbo.sg_iep_delete" parameters="studentNumber"/>
    </SQLDiff>
  </Download>
  <Upload>
    <SQL>{CALL dbo.sg_cleanup}</SQL>
    <SQL file="open_records.csv">SELECT 2</SQL>
  </Upload>
</Config>
"""
TEMPLATE = homes.SCRIPT.with_name("config.xml")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_PASSPHRASE", "open sesame")
    monkeypatch.setenv("TEST_PASSWORD", "swordfish")
    monkeypatch.delenv("TEST_UNSET", raising=False)


def written(path: Path, content: str | bytes) -> Path:
    path = path / "config.xml"
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def load(path: Path, content: str | bytes) -> sgsync.SyncConfig:
    return sgsync.load_config(written(path, content), sgsync.SyncConfig)


def error(path: Path, content: str | bytes, wanted: type[sgsync.Config] = sgsync.SyncConfig) -> str:
    with pytest.raises(sgsync.ConfigError) as caught:
        sgsync.load_config(written(path, content), wanted)
    assert caught.value.exit_code == 2
    return str(caught.value)


def changed(*pairs: str) -> str:
    """GOOD with every other text replaced by the one that follows it."""
    text = GOOD
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


# ------------------------------------------------------------------ what loads


def test_load_config_reads_every_element(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert config.path == tmp_path / "config.xml"
    sftp, database = config.sftp, config.database
    assert (sftp.host, sftp.port) == ("sftp.example.org", 22)
    assert (sftp.username, sftp.passphrase) == ("district.example.org", "open sesame")
    assert (sftp.private_key, sftp.known_hosts) == ("ssh/id_rsa", "ssh/known_hosts")
    assert (sftp.download_directory, sftp.upload_directory) == ("/download", "/upload")
    assert (sftp.require_complete, sftp.max_age_hours, sftp.timeout_seconds) == (True, 36, 60)
    assert database.connection_string == "Driver={Some};Server=db;UID=sis;PWD=swordfish"
    assert (database.batch_size, database.query_timeout_seconds) == (500, 3600)
    assert str(config.limits.max_deletes) == "10%"
    assert str(config.limits.max_updates) == "50%"
    assert config.limits.max_failures == 25
    assert config.history.keep_runs == 365
    (diff,) = config.sql_diffs
    assert (diff.file, diff.key, diff.query) == (
        "iep.csv",
        ("studentNumber", "startDate"),
        "SELECT 1",
    )
    assert (diff.sort, diff.trim, diff.null_text, diff.date_format) == (False, False, None, None)
    assert (diff.max_deletes, diff.max_updates, diff.where) == (None, None, "config.xml:11")
    assert diff.calls == {
        "insert": sgsync.Call(procedure="dbo.sg_iep_upsert", parameters=None),
        "update": sgsync.Call(
            procedure=None, parameters=("a", "b"), statement="UPDATE t SET a = ? WHERE b = ?"
        ),
        "delete": sgsync.Call(procedure="dbo.sg_iep_delete", parameters=("studentNumber",)),
    }
    assert config.statements == (
        sgsync.Statement(file=None, sql="{CALL dbo.sg_cleanup}", where="config.xml:20"),
        sgsync.Statement(file="open_records.csv", sql="SELECT 2", where="config.xml:21"),
    )
    assert config.secrets == {"swordfish", "open sesame"}


def test_load_config_takes_defaults_for_elements_that_are_not_there(tmp_path: Path) -> None:
    text = re.sub(r"  <(Limits|History) .*\n|(?s:  <Upload>.*</Upload>\n)", "", GOOD)
    config = load(tmp_path, text)
    assert (str(config.limits.max_deletes), str(config.limits.max_updates)) == ("10%", "50%")
    assert (config.limits.max_failures, config.history.keep_runs) == (25, 365)
    assert config.statements == ()


@pytest.mark.parametrize(
    ("value", "name", "loaded"),
    [
        ('port="65535"', "port", 65535),
        ('downloadDirectory="/"', "download_directory", "/"),
        ('uploadDirectory="/a/b/"', "upload_directory", "/a/b"),
        ('requireComplete="false"', "require_complete", False),
        ('maxAgeHours="0"', "max_age_hours", 0),
        ('knownHosts="C:\\keys\\known hosts"', "known_hosts", "C:\\keys\\known hosts"),
    ],
)
def test_load_config_takes_values(tmp_path: Path, value: str, name: str, loaded: object) -> None:
    config = load(tmp_path, changed('port="22"', value))
    assert getattr(config.sftp, name) == loaded


TWO_NOTICES = '<Notify ping="HTTPS://ping.example/x"/><Notify on="held" url="mailto://u:p@h"/>'


@pytest.mark.parametrize(
    ("change", "read", "loaded"),
    [
        (('ignoreColumns="x"', "a, b"), lambda c: c.sql_diffs[0].ignore_columns, ("a", "b")),
        (('ignoreColumns="x"', ""), lambda c: c.sql_diffs[0].ignore_columns, ()),
        (('newColumns="x"', "report"), lambda c: c.sql_diffs[0].new_columns, "report"),
        (
            ('tolerance="x"', "gpa:0.005, days absent : 10"),
            lambda c: c.sql_diffs[0].tolerance,
            (("gpa", decimal.Decimal("0.005")), ("days absent", decimal.Decimal(10))),
        ),
        (('ignoreLineBreaks="x"', "true"), lambda c: c.sql_diffs[0].ignore_line_breaks, True),
        (('ignoreNumberFormat="x"', "true"), lambda c: c.sql_diffs[0].ignore_number_format, True),
        (('<SQLDiff maxInserts="x"', "5"), lambda c: str(c.sql_diffs[0].max_inserts), "5"),
        (('<Limits maxInserts="x"', "50%"), lambda c: str(c.limits.max_inserts), "50%"),
        (('minRows="x"', "0"), lambda c: c.limits.min_rows, 0),
        (('usual="x"', "2.5"), lambda c: c.limits.usual, 2.5),
        (('maxShrink="x"', "10%"), lambda c: str(c.statements[1].max_shrink), "10%"),
        (('reportKeys="x"', "false"), lambda c: c.history.report_keys, False),
        (('metrics="x"', "m/sgsync.prom"), lambda c: c.history.metrics, "m/sgsync.prom"),
    ],
)
def test_load_config_takes_attributes_that_are_seldom_given(
    tmp_path: Path,
    change: tuple[str, str],
    read: Callable[[sgsync.SyncConfig], object],
    loaded: object,
) -> None:
    assert read(load(tmp_path, seldom(*change))) == loaded


SELDOM = {
    "SQLDiff": 'key="studentNumber,startDate"',
    "Limits": 'maxFailures="25"',
    "History": 'keepRuns="365"',
    "SQL": 'file="open_records.csv"',
}
OWNERS = {"minRows": "Limits", "usual": "Limits", "maxShrink": "SQL", "reportKeys": "History",
          "metrics": "History"}  # fmt: skip


def seldom(name: str, value: str) -> str:
    """GOOD with one more attribute; `name` is `name="x"`, or `<Element name="x"`."""
    tag, _, attribute = name.rpartition(" ")
    attribute = attribute.removesuffix('="x"')
    given = SELDOM[tag.removeprefix("<") or OWNERS.get(attribute, "SQLDiff")]
    return changed(given, f'{given} {attribute}="{value}"')


@pytest.mark.parametrize(
    ("change", "told", "remedy"),
    [
        (
            ('ignoreColumns="x"', "a,b,a"),
            "12: <SQLDiff ignoreColumns>: 'a,b,a' names the column 'a' twice",
            "correct the value",
        ),
        (
            ('ignoreColumns="x"', "a,,b"),
            "12: <SQLDiff ignoreColumns>: 'a,,b' has an empty name between its commas",
            "correct the value",
        ),
        (
            ('ignoreColumns="x"', "a,startDate"),
            "12: <SQLDiff ignoreColumns>: names the key column 'startDate'",
            "remove that column here or from key=",
        ),
        (
            ('newColumns="x"', "ignore"),
            "12: <SQLDiff newColumns>: 'ignore' is not one of error, report",
            "correct the value",
        ),
        *(
            (
                ('tolerance="x"', value),
                f"12: <SQLDiff tolerance>: '{value}' is not a list of columns and amounts such as "
                "gpa:0.005,hours:0.1",
                "correct the value",
            )
            for value in ("gpa", "gpa:", ":1", "gpa:-1", "gpa:1e3", "gpa:0.0", "gpa:٣", "gpa:1:x")
        ),
        (
            ('tolerance="x"', "gpa:1,gpa:2"),
            "12: <SQLDiff tolerance>: 'gpa:1,gpa:2' names the column 'gpa' twice",
            "correct the value",
        ),
        (
            ('tolerance="x"', "studentNumber:1"),
            "12: <SQLDiff tolerance>: names the key column 'studentNumber'",
            "remove that column here or from key=",
        ),
        (
            ('ignoreLineBreaks="x"', "1"),
            "12: <SQLDiff ignoreLineBreaks>: '1' is neither true nor false",
            "correct the value",
        ),
        (
            ('ignoreNumberForm="x"', "true"),
            "12: <SQLDiff ignoreNumberForm>: unknown attribute",
            "write ignoreNumberFormat",
        ),
        *(
            (
                (f'<{tag} maxInserts="x"', "50%+100"),
                f"{line}: <{tag} maxInserts>: '50%+100' is neither a number of rows (25) nor a "
                "percentage from 0% to 100%",
                "correct the value",
            )
            for tag, line in (("SQLDiff", 12), ("Limits", 8))
        ),
        (
            ('minRows="x"', "10%"),
            "8: <Limits minRows>: '10%' is not a whole number from 0 to 1000000000",
            "correct the value",
        ),
        *(
            (
                ('usual="x"', value),
                f"8: <Limits usual>: '{value}' is not a factor from 1 to 1000 such as 5 or 2.5",
                "correct the value",
            )
            for value in ("0.5", "1001", "5x", "-5", "1,5", "nan")
        ),
        (
            ('maxShrink="x"', "200%"),
            "21: <SQL maxShrink>: '200%' is neither a number of rows (25) nor a percentage from 0% "
            "to 100%",
            "correct the value",
        ),
        (
            ('reportKeys="x"', "no"),
            "9: <History reportKeys>: 'no' is neither true nor false",
            "correct the value",
        ),
        (('metrics="x"', ""), "9: <History metrics>: is empty", "correct the value"),
    ],
)
def test_load_config_refuses_attributes_that_are_seldom_given(
    tmp_path: Path, change: tuple[str, str], told: str, remedy: str
) -> None:
    assert error(tmp_path, seldom(*change)) == f"config.xml:{told}\nTry: {remedy}"


def test_load_config_refuses_a_shrink_limit_without_a_file(tmp_path: Path) -> None:
    assert error(tmp_path, changed("<SQL>", '<SQL maxShrink="5%">')) == (
        "config.xml:20: <SQL maxShrink>: has no effect without file=\n"
        "Try: add file=, or delete maxShrink="
    )


@pytest.mark.parametrize("wanted", [sgsync.SyncConfig, sgsync.SchooLinksConfig, sgsync.Config])
def test_load_config_reads_pauses_and_notices_for_every_command(
    tmp_path: Path, wanted: type[sgsync.Config]
) -> None:
    pauses = (
        '<Pause from="2027-07-20" to="2027-08-15" why="rollover"/><Pause from="12-24" to="01-02"/>'
    )
    text = changed("<Download>", f"{pauses}{TWO_NOTICES}<Download>")
    text = text.replace("</Config>", "<SchooLinks><GPA/></SchooLinks></Config>")
    config = sgsync.load_config(written(tmp_path, text), wanted)
    assert config.pauses == (
        sgsync.Pause(from_="2027-07-20", to="2027-08-15", why="rollover"),
        sgsync.Pause(from_="12-24", to="01-02"),
    )
    assert config.notices == (
        sgsync.Notice(ping="HTTPS://ping.example/x"),
        sgsync.Notice(on="held", url="mailto://u:p@h"),
    )
    assert config.history.keep_runs == 365
    assert config.secrets >= {"HTTPS://ping.example/x", "mailto://u:p@h"}
    assert "ping.example" not in repr(config)
    assert "mailto" not in repr(config)


@pytest.mark.parametrize(
    ("begin", "end", "day", "covered"),
    [
        ("2027-07-20", "2027-08-15", "2027-07-19", False),
        ("2027-07-20", "2027-08-15", "2027-07-20", True),
        ("2027-07-20", "2027-08-15", "2027-08-15", True),
        ("2027-07-20", "2027-08-15", "2027-08-16", False),
        ("2027-07-20", "2027-08-15", "2028-08-01", False),
        ("2027-12-20", "2028-01-05", "2028-01-01", True),
        ("2027-07-20", "2027-07-20", "2027-07-20", True),
        ("07-20", "08-15", "2031-08-01", True),
        ("07-20", "08-15", "2031-08-16", False),
        ("07-20", "08-15", "2031-07-19", False),
        ("12-24", "01-02", "2030-12-24", True),
        ("12-24", "01-02", "2031-01-02", True),
        ("12-24", "01-02", "2031-01-03", False),
        ("12-24", "01-02", "2030-12-23", False),
        ("02-20", "02-29", "2031-02-28", True),
        ("02-20", "02-29", "2031-03-01", False),
        ("02-20", "02-29", "2032-02-29", True),
    ],
)
def test_pause_covers_both_of_its_ends(
    tmp_path: Path, begin: str, end: str, day: str, covered: bool
) -> None:
    text = changed("<Download>", f'<Pause from="{begin}" to="{end}"/><Download>')
    (pause,) = load(tmp_path, text).pauses
    date = datetime.date.fromisoformat(day)
    assert pause.covers(date) == covered
    assert pause.covers(datetime.datetime.combine(date, datetime.time(13))) == covered


DAY = "is not a date such as 2027-07-20, or 07-20 for every year"


@pytest.mark.parametrize(
    ("element", "told", "remedy"),
    [
        ('<Pause from="07-20"/>', "<Pause>: has no attribute to", 'add to="..."'),
        ('<Pause from="2027-02-29" to="2027-03-01"/>', f"<Pause from>: '2027-02-29' {DAY}", "c"),
        ('<Pause from="07-20" to="8-15"/>', f"<Pause to>: '8-15' {DAY}", "c"),
        ('<Pause from="07-20" to="20270815"/>', f"<Pause to>: '20270815' {DAY}", "c"),
        (
            '<Pause from="2027-07-20" to="08-15"/>',
            "<Pause to>: '08-15' does not match from=\"2027-07-20\"",
            "write both as 2027-07-20, or both as 07-20 for every year",
        ),
        (
            '<Pause from="2027-07-20" to="2027-07-19"/>',
            "<Pause to>: '2027-07-19' is before from=\"2027-07-20\"",
            "c",
        ),
        ("<Notify/>", "<Notify>: has neither ping nor url", 'add ping="https://..." or url="..."'),
        ('<Notify on="success" url="json://h"/>',
         "<Notify on>: 'success' is not one of failure, held, always", "c"),
        ('<Notify ping="ftp://ping.example/s3cret"/>',
         "<Notify ping>: is not an http:// or https:// address", "c"),
        ('<Notify ping="https:///s3cret"/>',
         "<Notify ping>: is not an http:// or https:// address", "c"),
        ('<Notify ping="https://h/s3cret x"/>',
         "<Notify ping>: is not an http:// or https:// address", "c"),
        ('<Notify url="s3cret@example.org"/>',
         "<Notify url>: is not an address that starts with mailto://, https:// or such", "c"),
        ('<Notify ping="${env:TEST_UNSET}"/>',
         "<Notify ping>: the environment variable TEST_UNSET is not set",
         "set it for the account that runs sgsync, then start sgsync again"),
    ],
)  # fmt: skip
def test_load_config_refuses_pauses_and_notices(
    tmp_path: Path, element: str, told: str, remedy: str
) -> None:
    remedy = "correct the value" if remedy == "c" else remedy
    text = changed("<Download>", f"{element}<Download>")
    assert error(tmp_path, text) == f"config.xml:10: {told}\nTry: {remedy}"


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE t SET a = ? WHERE b = ? AND c = 'is it? it''s ?'",
        'UPDATE t SET "a?" = ? WHERE b = ?',
        "UPDATE t SET [a?] = ? WHERE b = ?",
        "UPDATE t SET a = ? -- or ?\nWHERE b = ?",
        "/* ? and\n? */ UPDATE t SET a = ? WHERE b = ? /* ? */",
        "UPDATE t SET a = '--' || ? WHERE b = ?",
        "UPDATE t SET a = ?<!-- why ? --> WHERE b = ?",
    ],
)
def test_load_config_counts_the_marks_of_a_statement_as_the_database_does(
    tmp_path: Path, sql: str
) -> None:
    load(tmp_path, changed("UPDATE t SET a = ? WHERE b = ?", sql))


def test_load_config_reads_sql_around_comments_and_sections(tmp_path: Path) -> None:
    sql = "SELECT <!-- one --> a<![CDATA[ , '<b>' ]]><?x y?> &lt; &#233;\nFROM t"
    config = load(tmp_path, changed("SELECT 1", sql))
    assert config.sql_diffs[0].query == "SELECT  a , '<b>'  < é\nFROM t"


ENCODED = changed('procedure="dbo.sg_iep_upsert"', 'procedure="dbo.[Schüler]"', "SELECT 1", "'é'")


@pytest.mark.parametrize(
    ("declared", "encoding"),
    [
        ("UTF-8", "utf-8"),
        ("UTF-8", "utf-8-sig"),
        ("UTF-16", "utf-16"),
        ("ISO-8859-1", "latin-1"),
        ("windows-1252", "cp1252"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_load_config_reads_encodings(
    tmp_path: Path, declared: str, encoding: str, newline: str
) -> None:
    text = ENCODED.replace("UTF-8", declared).replace("\n", newline)
    config = load(tmp_path, text.encode(encoding))
    assert config.sql_diffs[0].calls["insert"].procedure == "dbo.[Schüler]"
    assert (config.sql_diffs[0].query, config.sql_diffs[0].where) == ("'é'", "config.xml:11")
    assert error(tmp_path, text.replace("sg_iep_delete", "sg iep").encode(encoding)) == (
        "config.xml:16: <Delete procedure>: 'dbo.sg iep' is not a valid procedure name such as "
        "dbo.sg_iep_upsert\nTry: correct the value"
    )


# ------------------------------------------------------------------ mistakes in elements

NUMBER = "is not a whole number from"
LIMIT = "is neither a number of rows (25) nor a percentage from 0% to 100%"
CORRECT = "correct the value"
NOT_BOTH = "needs a procedure or one SQL statement, but not both"
WRITE_ONE = 'write procedure="dbo.name", or parameters="a,b" and SQL with a ? for each'
NAME_EACH = 'name one column for each ?, in order: parameters="a,b"'

MISTAKES = {
    # unknown names
    "unknown element": (
        ("<History keepRuns", "<Histroy keepRuns"),
        "9: <Histroy>: unknown element in <Config>",
        "write History",
    ),
    "unknown element, far from all": (
        ("<Query>SELECT 1</Query>", "<Query>SELECT 1</Query><Zebra/>"),
        "13: <Zebra>: unknown element in <SQLDiff>",
        "use one of Query, Insert, Update, Delete",
    ),
    "element in other case": (
        ("<History keepRuns", "<history keepRuns"),
        "9: <history>: unknown element in <Config>",
        "write History",
    ),
    "element where none may be": (
        ('<History keepRuns="365"/>', '<History keepRuns="365"><Query/></History>'),
        "9: <Query>: unknown element in <History>",
        "delete it",
    ),
    "element in SQL": (
        ("SELECT 1", "SELECT 1 <b/>"),
        "13: <b>: unknown element in <Query>",
        "delete it",
    ),
    "unknown attribute": (
        ('batchSize="500"', 'batchsize="500"'),
        "7: <Database batchsize>: unknown attribute",
        "write batchSize",
    ),
    "unknown attribute, misspelled": (
        ('username="district.example.org"', 'username="x" pasphrase="p"'),
        "4: <SFTP pasphrase>: unknown attribute",
        "write passphrase",
    ),
    "unknown attribute, far from all": (
        ('keepRuns="365"', 'keepRuns="365" zz="1"'),
        "9: <History zz>: unknown attribute",
        "use one of keepRuns, reportKeys, metrics",
    ),
    "attribute where none may be": (
        ("<Download>", '<Download file="x.csv">'),
        "10: <Download file>: unknown attribute",
        "delete it",
    ),
    "attribute of the outermost element": (
        ("<Config>", '<Config version="1">'),
        "2: <Config version>: unknown attribute",
        "delete it",
    ),
    "attribute of a namespace": (
        ("<Download>", '<Download xml:lang="en">'),
        "10: <Download {http://www.w3.org/XML/1998/namespace}lang>: unknown attribute",
        "delete it",
    ),
    # repeated, stray, missing
    "repeated element": (
        ("<Download>", '<History keepRuns="365"/>\n<Download>'),
        "10: <History>: appears more than once",
        "keep one of them",
    ),
    "repeated element in SQLDiff": (
        ("<Query>SELECT 1</Query>", "<Query>SELECT 1</Query>\n<Query>SELECT 1</Query>"),
        "14: <Query>: appears more than once",
        "keep one of them",
    ),
    "stray text": (
        ("  <Download>", "\n  keepRuns\n  <Download>"),
        "11: <Config>: contains stray text",
        "delete it",
    ),
    "stray text in an empty element": (
        ('<History keepRuns="365"/>', '<History keepRuns="365">\n\n 365</History>'),
        "11: <History>: contains stray text",
        "delete it",
    ),
    "missing element": (
        ("<SFTP host", "<!-- <SFTP host", '${env:TEST_PASSPHRASE}"/>', '"/> -->'),
        "2: <Config>: has no <SFTP> element",
        "copy <SFTP> from the config.xml that came with sgsync",
    ),
    "missing attribute": (
        ('username="district.example.org"', ""),
        "3: <SFTP>: has no attribute username",
        'add username="..."',
    ),
    "no SQLDiff": (
        (GOOD[GOOD.index("    <SQLDiff") : GOOD.index("  </Download")], ""),
        "10: <Download>: has no <SQLDiff> element",
        "copy one from the config.xml that came with sgsync",
    ),
    "no Query": (
        ("<Query>SELECT 1</Query>", ""),
        "11: <SQLDiff>: has no <Query> with SQL in it",
        "add the query to export",
    ),
    "empty Query": (
        ("SELECT 1", " <!-- SELECT 1 --> "),
        "11: <SQLDiff>: has no <Query> with SQL in it",
        "add the query to export",
    ),
    "empty SQL": (
        ("SELECT 2", " "),
        "21: <SQL>: contains no SQL",
        "write the statement, or delete <SQL>",
    ),
    # values
    "number in words": (
        ('port="22"', 'port="ssh"'),
        f"3: <SFTP port>: 'ssh' {NUMBER} 1 to 65535",
        CORRECT,
    ),
    "number too large": (
        ('port="22"', 'port="65536"'),
        f"3: <SFTP port>: '65536' {NUMBER} 1 to 65535",
        CORRECT,
    ),
    "number with a fraction, on a later line": (
        ('batchSize="500"', 'batchSize="1.5"'),
        f"7: <Database batchSize>: '1.5' {NUMBER} 1 to 10000",
        CORRECT,
    ),
    "number of another script": (
        ('keepRuns="365"', 'keepRuns="٣٦٥"'),
        f"9: <History keepRuns>: '٣٦٥' {NUMBER} 1 to 100000",
        CORRECT,
    ),
    "number with a blank": (
        ('keepRuns="365"', 'keepRuns="365 "'),
        f"9: <History keepRuns>: '365 ' {NUMBER} 1 to 100000",
        CORRECT,
    ),
    "number that is empty": (
        ('keepRuns="365"', 'keepRuns=""'),
        f"9: <History keepRuns>: {NUMBER} 1 to 100000",
        CORRECT,
    ),
    "negative limit": (
        ('maxDeletes="10%"', 'maxDeletes="-1"'),
        f"8: <Limits maxDeletes>: '-1' {LIMIT}",
        CORRECT,
    ),
    "limit over 100%": (
        ('maxDeletes="10%"', 'maxDeletes="100.5%"'),
        f"8: <Limits maxDeletes>: '100.5%' {LIMIT}",
        CORRECT,
    ),
    "half a row": (
        ('maxUpdates="50%"', 'maxUpdates="2.5"'),
        f"8: <Limits maxUpdates>: '2.5' {LIMIT}",
        CORRECT,
    ),
    "yes for true": (
        ('port="22"', 'requireComplete="yes"'),
        "3: <SFTP requireComplete>: 'yes' is neither true nor false",
        CORRECT,
    ),
    "empty text": (
        ('host="sftp.example.org"', 'host=" "'),
        "3: <SFTP host>: is empty",
        CORRECT,
    ),
    "relative directory on the server": (
        ('port="22"', 'uploadDirectory="upload"'),
        "3: <SFTP uploadDirectory>: 'upload' is not an absolute path on the server, such as "
        "/upload",
        CORRECT,
    ),
    "directory upwards": (
        ('port="22"', 'downloadDirectory="/a/../b"'),
        "3: <SFTP downloadDirectory>: '/a/../b' is not an absolute path on the server, such as "
        "/upload",
        CORRECT,
    ),
    "key column twice": (
        ('key="studentNumber,startDate"', 'key="studentNumber,startDate, studentNumber:int"'),
        "12: <SQLDiff key>: 'studentNumber,startDate, studentNumber:int' names the column "
        "'studentNumber' twice",
        CORRECT,
    ),
    "key with an empty name": (
        ('key="studentNumber,startDate"', 'key="studentNumber,"'),
        "12: <SQLDiff key>: 'studentNumber,' has an empty name between its commas",
        CORRECT,
    ),
    "key that is empty": (
        ('key="studentNumber,startDate"', 'key=""'),
        "12: <SQLDiff key>: is empty",
        CORRECT,
    ),
    "key that is no column": (
        ('key="studentNumber,startDate"', 'key=":int"'),
        "12: <SQLDiff key>: ':int' has ':int' without a column name",
        CORRECT,
    ),
    "date format": (
        ('key="studentNumber,startDate"', 'dateFormat="MM/DD/YYYY"'),
        "12: <SQLDiff dateFormat>: 'MM/DD/YYYY' is not a date format such as %m/%d/%Y",
        CORRECT,
    ),
    "key of very many columns, one of them twice": (
        ('key="studentNumber,startDate"', f'key="{",".join(map(str, range(200_000)))},7"'),
        f"12: <SQLDiff key>: '{','.join(map(str, range(99)))[:60]}...' names the column '7' twice",
        CORRECT,
    ),
    "name of a procedure with SQL in it": (
        ('procedure="dbo.sg_iep_upsert"', 'procedure="dbo.p; DROP TABLE t"'),
        "14: <Insert procedure>: 'dbo.p; DROP TABLE t' is not a valid procedure name such as "
        "dbo.sg_iep_upsert",
        CORRECT,
    ),
    "huge value": (
        ('port="22"', f'port="{"9" * 100_000}"'),
        f"3: <SFTP port>: '{'9' * 60}...' {NUMBER} 1 to 65535",
        CORRECT,
    ),
    # calls
    "neither procedure nor SQL": (
        ('<Insert procedure="dbo.sg_iep_upsert"/>', "<Insert/>"),
        f"14: <Insert>: {NOT_BOTH}",
        WRITE_ONE,
    ),
    "both procedure and SQL": (
        ('<Update parameters="a,b">', '<Update procedure="p" parameters="a,b">'),
        f"15: <Update>: {NOT_BOTH}",
        WRITE_ONE,
    ),
    "too few parameters": (
        ('parameters="a,b"', 'parameters="a"'),
        "15: <Update parameters>: names 1 column for 2 ? marks",
        NAME_EACH,
    ),
    "no parameters": (
        (' parameters="a,b"', ""),
        "15: <Update parameters>: names 0 columns for 2 ? marks",
        NAME_EACH,
    ),
    "mark in a string only": (
        ("WHERE b = ?", "WHERE b = '?'"),
        "15: <Update parameters>: names 2 columns for 1 ? mark",
        NAME_EACH,
    ),
    # TODO, variables, placeholders
    "TODO in an attribute": (
        ('username="district.example.org"', 'username="TODO(user)"'),
        "4: <SFTP username>: still contains TODO(user)",
        "replace it with your own value",
    ),
    "TODO in SQL": (
        ("SELECT 2", "SELECT TODO(user)"),
        "21: <SQL>: still contains TODO(user)",
        "replace it with your own value",
    ),
    "unset variable": (
        ("${env:TEST_PASSPHRASE}", "${env:TEST_UNSET}"),
        "5: <SFTP passphrase>: the environment variable TEST_UNSET is not set",
        "set it for the account that runs sgsync, then start sgsync again",
    ),
    "placeholder without its kind": (
        ("${env:TEST_PASSPHRASE}", "${TEST_PASSPHRASE}"),
        "5: <SFTP passphrase>: '${TEST_PASSPHRASE}' is not a valid placeholder",
        "write ${env:NAME}, ${keyring:NAME} or ${file:PATH}",
    ),
    "placeholder of another kind": (
        ("${env:TEST_PASSPHRASE}", "${vault:TEST_PASSPHRASE}"),
        "5: <SFTP passphrase>: '${vault:TEST_PASSPHRASE}' is not a valid placeholder",
        "write ${env:NAME}, ${keyring:NAME} or ${file:PATH}",
    ),
    "placeholder without a name": (
        ("${env:TEST_PASSPHRASE}", "${env:}"),
        "5: <SFTP passphrase>: '${env:}' is not a valid placeholder",
        "write ${env:NAME}, ${keyring:NAME} or ${file:PATH}",
    ),
    "placeholder without its end": (
        ("${env:TEST_PASSPHRASE}", "${env:TEST_PASSPHRASE"),
        "5: <SFTP passphrase>: '${env:TEST_PASSPHRASE' is not a valid placeholder",
        "write ${env:NAME}, ${keyring:NAME} or ${file:PATH}",
    ),
    "variable with a wrong value": (
        ('port="22"', 'port="${env:TEST_PASSWORD}"'),
        f"3: <SFTP port>: '${{env:TEST_PASSWORD}}' {NUMBER} 1 to 65535",
        CORRECT,
    ),
    # files
    "file taken": (
        ("    <SQL>", '    <SQL file="OPEN_records.csv">SELECT 3</SQL>\n    <SQL>'),
        "22: <SQL file>: 'open_records.csv' is already in use",
        "choose another name",
    ),
    "file of the failures": (
        ('"open_records.csv"', '"Failures.csv"'),
        "21: <SQL file>: 'Failures.csv' is already in use",
        "choose another name",
    ),
}


@pytest.mark.parametrize(("change", "told", "remedy"), MISTAKES.values(), ids=MISTAKES)
def test_load_config_tells_of(
    tmp_path: Path, change: tuple[str, ...], told: str, remedy: str
) -> None:
    assert error(tmp_path, changed(*change)) == f"config.xml:{told}\nTry: {remedy}"


def test_load_config_refuses_two_diffs_of_one_file(tmp_path: Path) -> None:
    begin, end = GOOD.index("    <SQLDiff"), GOOD.index("  </Download")
    text = GOOD[:end] + GOOD[begin:end].replace("iep.csv", "IEP.csv") + GOOD[end:]
    assert error(tmp_path, text) == (
        "config.xml:18: <SQLDiff file>: 'IEP.csv' is already in use\nTry: choose another name"
    )


PATH = 'contains a path or one of \\ / : * ? " < > |'


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "empty or longer than 200 bytes"),
        ("é" * 99 + ".csv", "empty or longer than 200 bytes"),
        ("..", PATH),
        ("../iep.csv", PATH),
        ("/etc/iep.csv", PATH),
        ("C:\\iep.csv", PATH),
        ("iep.csv:stream", PATH),
        ("iep?.csv", PATH),
        ("i\u200bep.csv", "contains an unprintable character"),
        ("iep.csv&#10;", "contains an unprintable character"),
        (" iep.csv", "starts or ends with a space, or ends with a period"),
        ("iep.csv.", "starts or ends with a space, or ends with a period"),
        ("CON.csv", "is a device name on Windows"),
        ("lpt1.x.csv", "is a device name on Windows"),
        ("iep.txt", "no .csv"),
    ],
)
def test_load_config_refuses_unsafe_file_names(tmp_path: Path, name: str, reason: str) -> None:
    told = error(tmp_path, changed('file="iep.csv"', f'file="{name}"'))
    assert told.startswith("config.xml:11: <SQLDiff file>: ")
    assert f"is not a plain file name that ends in .csv ({reason})\nTry: correct" in told
    assert len(told.splitlines()) == 2


def test_load_config_tells_all_mistakes_in_the_order_of_lines(tmp_path: Path) -> None:
    text = changed(
        'port="22"', 'port="x"', 'username="district.example.org"', 'user="TODO(user)"',
        "${env:TEST_PASSPHRASE}", "${env:TEST_UNSET}",
        "PWD=${env:TEST_PASSWORD}", "PWD=${env:TEST_UNSET};UID=${x}",
        'batchSize="500"', 'batch="1"',
        'keepRuns="365"', "", 'key="studentNumber,startDate"', 'key="a,a"',
        "<Query>SELECT 1</Query>", "<Qery>SELECT 1</Qery>", "SELECT 2", "TODO(user)",
    )  # fmt: skip
    told = [line for line in error(tmp_path, text).split("\n") if not line.startswith("Try: ")]
    assert told == [
        "config.xml:3: <SFTP port>: 'x' is not a whole number from 1 to 65535",
        "config.xml:3: <SFTP>: has no attribute username",
        "config.xml:4: <SFTP user>: unknown attribute",
        "config.xml:5: <SFTP passphrase>: the environment variable TEST_UNSET is not set",
        "config.xml:6: <Database connectionString>: the environment variable TEST_UNSET is not set",
        "config.xml:6: <Database connectionString>: '${x}' is not a valid placeholder",
        "config.xml:7: <Database batch>: unknown attribute",
        "config.xml:11: <SQLDiff>: has no <Query> with SQL in it",
        "config.xml:12: <SQLDiff key>: 'a,a' names the column 'a' twice",
        "config.xml:13: <Qery>: unknown element in <SQLDiff>",
        "config.xml:21: <SQL>: still contains TODO(user)",
    ]


def test_load_config_finds_the_line_of_an_attribute(tmp_path: Path) -> None:
    head = (
        "<!-- <SFTP\n port='x'/> -->\n<SFTP\n\n  host = 'a&#10;\n port=b'\n"
        "\thost2='port=\"1\"\n port=1'\r\n\n\tport\n =\n 'x' username='u'\n\n/>\n"
    )
    sftp = GOOD[GOOD.index("<SFTP") : GOOD.index("<Database")]
    told = error(tmp_path, changed(sftp, head))
    assert re.findall(r"config.xml:(\d+): <(.*?)>", told) == [
        ("9", "SFTP host2"),
        ("12", "SFTP port"),
    ]


def test_load_config_forgives_what_the_command_does_not_use(tmp_path: Path) -> None:
    schoolinks = '  <SchooLinks directory="TODO(user)" grades="${env:TEST_UNSET}"/>\n</Config>'
    assert load(tmp_path, changed("</Config>", schoolinks)).sftp.host == "sftp.example.org"
    text = changed("</Config>", schoolinks, 'host="sftp.example.org"', 'host="TODO(user)"')
    told = error(tmp_path, text, sgsync.SchooLinksConfig)
    assert "<SFTP" not in told
    for place, reason in (
        ("directory", "still contains TODO(user)"),
        ("grades", "the environment variable TEST_UNSET is not set"),
    ):
        assert f"config.xml:23: <SchooLinks {place}>: {reason}\nTry: " in told


# ------------------------------------------------------------------ mistakes in the file

LOOK = (
    "Try: check that line and the one above it for a missing quote, bracket or end tag; "
    "write & as &amp; and < as &lt; in attributes, and SQL inside <![CDATA[ ... ]]>"
)
DOCTYPE = (
    "contains a DOCTYPE, which is not allowed (it could read other files)\n"
    "Try: delete the <!DOCTYPE ...>"
)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", 1),
        (" \n", 2),
        ("no XML", 1),
        ("PK\x03\x04", 1),
        (changed("</Config>", ""), 24),
        (changed("</SQLDiff>", ""), 18),
        (changed('port="22"', "port=22"), 3),
        (changed('port="22"', 'port="22'), 4),
        (changed('port="22"', 'port="22" port="23"'), 5),
        (changed("SELECT 1", "SELECT 1 WHERE a < 2"), 13),
        (changed("SELECT 1", "SELECT &nbsp;"), 13),
        (changed("SELECT 1", "SELECT \x01"), 13),
        (GOOD + "<Config/>", 24),
        (GOOD.replace("UTF-8", "KLINGON"), 1),
        (changed("<Query>", "<a>" * 300 + "<Query>"), 13),
    ],
)
def test_load_config_refuses_what_is_no_xml(tmp_path: Path, content: str, line: int) -> None:
    told = error(tmp_path, content)
    assert told.startswith(f"config.xml:{line}: not well-formed XML: ")
    assert told.endswith("\n" + LOOK)
    assert len(told.splitlines()) == 2


def test_load_config_refuses_bytes_that_are_not_in_the_declared_encoding(tmp_path: Path) -> None:
    told = error(tmp_path, ENCODED.encode("latin-1"))
    assert told.startswith("config.xml:13: not well-formed XML: ")


def test_load_config_does_not_quote_a_password_that_breaks_the_xml(tmp_path: Path) -> None:
    told = error(tmp_path, changed("${env:TEST_PASSWORD}", "r&sesame;7"))
    assert told.startswith(
        "config.xml:6: not well-formed XML: a & that does not start an entity (column "
    )
    assert "sesame" not in told


BOMB = "".join(f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(9))


@pytest.mark.parametrize(
    "doctype",
    [
        "<!DOCTYPE Config>",
        '<!DOCTYPE Config SYSTEM "file:///etc/passwd">',
        '<!DOCTYPE Config [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE Config [<!ENTITY % x SYSTEM "http://127.0.0.1:9/x"> %x;]>',
        '<!DOCTYPE Config [<!ENTITY x "22">]>',
        f'<!DOCTYPE Config [<!ENTITY a0 "lol">{BOMB}]>',
        "<!DOCTYPE [ not even one",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_load_config_refuses_a_doctype(tmp_path: Path, doctype: str, encoding: str) -> None:
    text = changed("<Config>", f"<!-- ->\n --><?x?>\n{doctype}\n<Config>", "SELECT 1", "&x;&a9;")
    text = text.replace("UTF-8", encoding.removesuffix("-sig"))
    assert error(tmp_path, text.encode(encoding)) == f"config.xml:4: {DOCTYPE}"


def test_load_config_reads_the_word_doctype_elsewhere(tmp_path: Path) -> None:
    text = changed("<Config>", "<!-- <!DOCTYPE -->\n<Config>", "SELECT 1", "'&lt;!DOCTYPE'")
    assert load(tmp_path, text).sql_diffs[0].query == "'<!DOCTYPE'"


@pytest.mark.parametrize("root", ["config", "Config2", "html"])
def test_load_config_refuses_another_outermost_element(tmp_path: Path, root: str) -> None:
    assert error(tmp_path, f"<!-- -->\n<{root}\n/>") == (
        f"config.xml:2: the root element is <{root}>, not <Config>\n"
        "Try: start from the config.xml that came with sgsync"
    )


WHICH = "Try: name the folder that holds config.xml with --home, or the file with --config"


def test_load_config_tells_of_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path / "none.xml", "No such file or directory"),
        (tmp_path, "Permission denied" if os.name == "nt" else "Is a directory"),
        (tmp_path / "file/config.xml", "No such file or directory|Not a directory"),
    ):
        with pytest.raises(sgsync.ConfigError) as caught:
            sgsync.load_config(path, sgsync.SyncConfig)
        pattern = rf"{re.escape(str(path))}: cannot be read: ({reason})\n{re.escape(WHICH)}"
        assert re.fullmatch(pattern, str(caught.value))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no file modes")
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root reads everything")
def test_load_config_tells_of_a_file_that_it_may_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.xml"
    path.touch(mode=0)
    with pytest.raises(sgsync.ConfigError) as caught:
        sgsync.load_config(path, sgsync.SyncConfig)
    assert str(caught.value) == f"{path}: cannot be read: Permission denied\n{WHICH}"


def test_load_config_refuses_a_file_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sgsync, "CONFIG_BYTES", 1000)
    path = tmp_path / "config.xml"
    assert error(tmp_path, GOOD.ljust(2000)) == (
        f"{path}: is larger than 1,000 bytes, too large for a configuration file\n"
        "Try: name the right file with --config"
    )


# ------------------------------------------------------------------ secrets

PASSWORDS = [
    "plain",
    "semi;colon",
    "br}ace",
    "{whole}",
    "{open",
    "close}",
    "};PWD=x;{",
    "a}}b",
    "equals=",
    " blanks ",
    "in side",
    "plus+and%41",
    "'quotes\"",
    "list,of(all)[these]?*!@",
    "ünïcode",
    "back\\slash",
]


@pytest.mark.parametrize("written", ["${env:TEST_PASSWORD}", "{${env:TEST_PASSWORD}}"])
def test_load_config_quotes_passwords_for_odbc(
    tmp_path: Path,
    postgres_server: servers.Postgres,
    monkeypatch: pytest.MonkeyPatch,
    written: str,
) -> None:
    """Every password logs in to a real server through a real driver."""
    import pyodbc

    postgres_server.start()
    admin = servers.Database("postgresql", postgres_server.connection_string())
    given = postgres_server.connection_string(password=written)
    given = given.replace("UID=sgsync", "UID=sg_quoted")
    text = changed("Driver={Some};Server=db;UID=sis;PWD=${env:TEST_PASSWORD}", given)
    admin.execute("CREATE ROLE sg_quoted LOGIN")
    try:
        for password in PASSWORDS:
            literal = password.replace("'", "''")
            admin.execute(f"ALTER ROLE sg_quoted PASSWORD '{literal}'")
            monkeypatch.setenv("TEST_PASSWORD", password)
            config = load(tmp_path, text)
            pyodbc.connect(config.database.connection_string).close()
            assert password in config.secrets
    finally:
        admin.execute("DROP ROLE sg_quoted")


@pytest.mark.parametrize(
    ("written", "value", "meant"),
    [
        ("${env:TEST_VALUE}", "DSN=sis;PWD=s{x;y}", "DSN=sis;PWD=s{x;y}"),
        ("DSN=sis;UID=SCHOOL\\${env:TEST_VALUE}", "o;k", "DSN=sis;UID=SCHOOL\\o;k"),
        ("DSN=sis;UID={SCHOOL\\${env:TEST_VALUE}}", "o}k", "DSN=sis;UID={SCHOOL\\o}}k}"),
        ("DSN=sis;Server=${env:TEST_VALUE};", "db\\sis:1433", "DSN=sis;Server=db\\sis:1433;"),
        ("DSN=sis;PWD= ${env:TEST_VALUE} ;", "a;b", "DSN=sis;PWD= {a;b} ;"),
    ],
)
def test_load_config_fits_variables_into_connection_strings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, value: str, meant: str
) -> None:
    monkeypatch.setenv("TEST_VALUE", value)
    given = "Driver={Some};Server=db;UID=sis;PWD=${env:TEST_PASSWORD}"
    assert load(tmp_path, changed(given, written)).database.connection_string == meant


def test_load_config_shows_no_secret(tmp_path: Path) -> None:
    text = changed("PWD=${env:TEST_PASSWORD}", "Password = {in;file}")
    config = load(tmp_path, text)
    assert config.secrets == {"in;file", "{in;file}", "open sesame"}
    assert not re.search("swordfish|sesame|in;file", repr(config))
    told = error(tmp_path, text.replace('batchSize="500"', 'batchSize="x" pwd="swordfish"'))
    assert not re.search("swordfish|sesame|in;file", told)
    told = error(tmp_path, text.replace("Password = {in;file}", "PWD=swordfish;UID=${UID}"))
    assert not re.search("swordfish|sesame", told)


def keyring(monkeypatch: pytest.MonkeyPatch, entries: dict[str, str] | None) -> None:
    """A password store with these entries, or one that is locked."""

    class KeyringError(Exception):
        pass

    def get_password(service: str, name: str) -> str | None:
        assert service == "sgsync"
        if entries is None:
            raise KeyringError("the store is locked")
        return entries.get(name)

    module = types.ModuleType("keyring")
    errors = types.ModuleType("keyring.errors")
    module.get_password, module.errors = get_password, errors  # type: ignore[attr-defined]
    errors.KeyringError = KeyringError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "keyring", module)
    monkeypatch.setitem(sys.modules, "keyring.errors", errors)


KEYRING = changed("${env:TEST_PASSPHRASE}", "${keyring:sftp_key}")


def test_load_config_takes_secrets_from_the_keyring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyring(monkeypatch, {"sftp_key": "mellon"})
    config = load(tmp_path, KEYRING)
    assert config.sftp.passphrase == "mellon"
    assert config.secrets == {"mellon", "swordfish"}


def test_load_config_tells_of_a_keyring_without_the_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "config.xml:5: <SFTP passphrase>: the keyring entry sftp_key is"
    store = sgsync.command_line([*sgsync.PROGRAM, "secret", "set", "sftp_key"])
    keyring(monkeypatch, {})
    assert error(tmp_path, KEYRING) == (f"{place} not set\nTry: store it: {store}")
    keyring(monkeypatch, {"sftp_key": ""})
    assert error(tmp_path, KEYRING) == f"{place} empty\nTry: store it: {store}"
    keyring(monkeypatch, None)
    assert error(tmp_path, KEYRING) == (
        "config.xml:5: <SFTP passphrase>: the keyring entry sftp_key cannot be read: the store is "
        "locked\nTry: make the system's password store available to this account, or use "
        "${env:NAME} or ${file:PATH} instead"
    )
    monkeypatch.setitem(sys.modules, "keyring", None)
    assert error(tmp_path, KEYRING) == (
        "config.xml:5: <SFTP passphrase>: the keyring entry sftp_key cannot be read: the keyring "
        "package is not installed\nTry: pip install keyring, or use ${env:NAME} or ${file:PATH} "
        "instead"
    )


def test_load_config_tells_of_an_empty_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_PASSPHRASE", "")
    assert error(tmp_path, GOOD) == (
        "config.xml:5: <SFTP passphrase>: the environment variable TEST_PASSPHRASE is empty\n"
        "Try: set it for the account that runs sgsync, then start sgsync again"
    )


FILE = "config.xml:5: <SFTP passphrase>: "
SAVE = "save it as UTF-8 text with the secret on the first line"


@pytest.mark.parametrize(
    "content",
    [
        b"m\xc3\xabllon",
        b"m\xc3\xabllon\n",
        b"  m\xc3\xabllon \r\n",
        b"\xef\xbb\xbfm\xc3\xabllon\r\nowner: IT\r\n",
        b"m\xc3\xabllon\rx",
    ],
)
@pytest.mark.parametrize("absolute", [True, False])
def test_load_config_takes_secrets_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, absolute: bool
) -> None:
    monkeypatch.chdir("/")
    path = tmp_path / "ssh/pass phrase.txt"
    path.parent.mkdir()
    path.write_bytes(content)
    shown = str(path) if absolute else "ssh/pass phrase.txt"
    config = load(tmp_path, changed("${env:TEST_PASSPHRASE}", f"${{file:{shown}}}"))
    assert config.sftp.passphrase == "mëllon"
    assert config.secrets == {"mëllon", "swordfish"}
    assert config.secret_files == (path,)


def test_load_config_counts_what_comes_from_a_file_as_a_secret_and_quotes_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "pw").write_text("p;w}d", encoding="utf-8")
    (tmp_path / "user").write_text("some user", encoding="utf-8")
    text = changed("UID=sis;PWD=${env:TEST_PASSWORD}", "UID=${file:user};PWD=${file:pw}")
    config = load(tmp_path, text)
    assert config.database.connection_string.endswith(";UID=some user;PWD={p;w}}d}")
    assert config.secrets == {"some user", "p;w}d", "{p;w}}d}", "open sesame"}


@pytest.mark.parametrize(
    ("content", "told", "remedy"),
    [
        (None, "the file {} does not exist", f"create it: {SAVE}"),
        (b"", "the file {} is empty", SAVE),
        (b"\xef\xbb\xbf \r\n\n", "the file {} is empty", SAVE),
        (b"\n s3cret\n", "the first line of the file {} is empty", SAVE),
        ("s3cret".encode("utf-16"), "the file {} is not UTF-8 text", SAVE),
        ("s3cret".encode("utf-16-le"), "the file {} is not UTF-8 text", SAVE),
        ("s3crët".encode("latin-1"), "the file {} is not UTF-8 text", SAVE),
        (b"s3cret\n\x1b", "the file {} is not UTF-8 text", SAVE),
        (b"s3cret\n".ljust(65_537), "the file {} is larger than 65,536 bytes", SAVE),
        ("folder", "{} is not a file", "name a file that holds the secret"),
        pytest.param(
            "pipe", "{} is not a file", "name a file that holds the secret",
            marks=pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes"),
        ),
    ],
)  # fmt: skip
def test_load_config_tells_of_a_file_without_a_secret(
    tmp_path: Path, content: bytes | str | None, told: str, remedy: str
) -> None:
    path = tmp_path / "pass.txt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    text = changed("${env:TEST_PASSPHRASE}", "${file:pass.txt}")
    assert error(tmp_path, text) == f"{FILE}{told.format(path)}\nTry: {remedy}"


def test_load_config_tells_of_a_file_with_a_secret_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "pass.txt").touch()
    long = "x" * 5000
    for name, reason in ((f"{long}/x", "File name too long"), ("pass.txt/x", "Not a directory")):
        told = error(tmp_path, changed("${env:TEST_PASSPHRASE}", f"${{file:{name}}}"))
        shown = sgsync.shortened(str(tmp_path / name), 300)
        assert told.startswith(f"{FILE}the file {shown} ")
        assert os.name == "nt" or told == (
            f"{FILE}the file {shown} cannot be read: {reason}\n"
            "Try: let the account that runs sgsync read it"
        )


# ------------------------------------------------------------------ config_path


def test_config_path_prefers_the_district_s_own_copy(tmp_path: Path) -> None:
    assert sgsync.config_path(tmp_path) == tmp_path / "config.xml"
    own = tmp_path / "config.local.xml"
    own.write_text("<Config/>", encoding="utf-8")
    assert sgsync.config_path(tmp_path) == own
    with pytest.raises(sgsync.ConfigError) as caught:
        sgsync.load_config(sgsync.config_path(tmp_path), sgsync.SyncConfig)
    lines = str(caught.value).splitlines()[::2]
    assert [line.split(" ")[0] for line in lines] == ["config.local.xml:1:"] * 3


@pytest.mark.skipif(os.name == "nt", reason="needs a privilege on Windows")
def test_config_path_does_not_fall_back_where_a_link_is_broken(tmp_path: Path) -> None:
    own = tmp_path / "config.local.xml"
    own.symlink_to(tmp_path / "gone.xml")
    assert sgsync.config_path(tmp_path) == own


# ------------------------------------------------------------------ the template


def filled(text: str) -> str:
    for value in ("sftp.example.org", "district.example.org", "sis-db", "Campus"):
        text = text.replace('"TODO(user)"', f'"{value}"', 1) if '"TODO(user)"' in text else (
            text.replace("=TODO(user);", f"={value};", 1)
        )  # fmt: skip
    return text


def test_load_config_reads_the_template_once_it_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIS_DB_USER", "SCHOOL\\sgsync")
    monkeypatch.setenv("SIS_DB_PASSWORD", "p;w")
    config = load(tmp_path, filled(TEMPLATE.read_text(encoding="utf-8")))
    assert config.database.connection_string == (
        "Driver={ODBC Driver 18 for SQL Server};Server=sis-db;Database=Campus;"
        "UID=SCHOOL\\sgsync;PWD={p;w}"
    )
    assert [diff.file for diff in config.sql_diffs] == [
        "iep.csv",
        "services_plan.csv",
        "evaluation_team_report.csv",
        "special_ed_dates.csv",
        "program_flags.csv",
    ]
    assert [s.file for s in config.statements] == ["open_records.csv", "student_mapping.csv"]


def test_load_config_tells_what_is_to_be_filled_in_the_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIS_DB_USER", "sgsync")
    monkeypatch.delenv("SIS_DB_PASSWORD", raising=False)
    unset = (
        r"config.xml:\d+: <Database connectionString>: the environment variable SIS_DB_PASSWORD is "
        r"not set\nTry: set it for the account that runs sgsync, then start sgsync again"
    )
    assert len(re.findall(unset, error(tmp_path, TEMPLATE.read_bytes()))) == 1
    monkeypatch.setenv("SIS_DB_PASSWORD", "swordfish")
    told = error(tmp_path, TEMPLATE.read_bytes())
    lines = TEMPLATE.read_text(encoding="utf-8").splitlines()
    places = re.findall(
        r"config.xml:(\d+): <(\w+) (\w+)>: still contains TODO\(user\)\n"
        r"Try: replace it with your own value(?:\n|$)",
        told,
    )
    assert [(tag, name) for _, tag, name in places] == [
        ("SFTP", "host"),
        ("SFTP", "username"),
        ("Database", "connectionString"),
    ]
    assert len(told.splitlines()) == 2 * len(places)
    assert all(name in lines[int(line) - 1] for line, _, name in places)


# ------------------------------------------------------------------ anything at all

PIECES = st.one_of(
    st.sampled_from(
        [
            *"<>&\"'=/;{}$:,.%?\n",
            "TODO(user)",
            "${env:",
            "<!--",
            "-->",
            "<![CDATA[",
            "]]>",
            "<SFTP",
            "</SFTP>",
            "<SQLDiff",
            "<SQL>",
            "<?x",
            "<!DOCTYPE x>",
            "&#0;",
            "&x;",
            ' a="1"',
            'xmlns="x"',
            "UTF-16",
            "\0",
            "\ufeff",
            "\x85",
            "\u2028",
            "é",
            "\U0001f600",
        ]
    ),
    st.text(max_size=5),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """GOOD with a few pieces cut out, moved or put in, perhaps in another encoding."""
    text = GOOD
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(text)))
        end = draw(st.integers(begin, min(len(text), begin + draw(st.integers(0, 200)))))
        source = draw(st.integers(0, len(text)))
        piece = draw(st.one_of(PIECES, st.just(text[source : source + 40])))
        text = text[:begin] + piece + text[end:]
    return text.encode(draw(st.sampled_from(["utf-8", "utf-16", "latin-1"])), "replace")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=damaged(), wanted=st.sampled_from([sgsync.SyncConfig, sgsync.SchooLinksConfig]))
def test_load_config_loads_or_raises_configerror(
    tmp_path: Path, content: bytes, wanted: type[sgsync.Config]
) -> None:
    try:
        config = sgsync.load_config(written(tmp_path, content), wanted)
    except sgsync.ConfigError as caught:
        lines = str(caught).split("\n")
        assert all(re.match(r"config\.xml:\d+: ", line) for line in lines[::2]), lines
        assert all(line.startswith("Try: ") for line in lines[1::2]), lines
        numbers = [int(line.split(":")[1]) for line in lines[::2]]
        assert numbers == sorted(numbers)
        assert max(numbers) <= content.count(b"\n") + 2
    else:
        assert isinstance(config, wanted)


def test_load_environment_sets_what_is_not_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SGSYNC_A", "SGSYNC_B", "SGSYNC_C"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setenv("SGSYNC_D", "set")
    text = "\ufeff# secrets\n\nSGSYNC_A='p\"= #'\r\n SGSYNC_B = x y \nSGSYNC_C=\nSGSYNC_D=file\n"
    sgsync.load_environment(tmp_path)
    (tmp_path / "sgsync.env").write_bytes(text.encode())
    sgsync.load_environment(tmp_path)
    found = [os.environ[f"SGSYNC_{letter}"] for letter in "ABCD"]
    assert found == ['p"= #', "x y", "", "set"]
    (tmp_path / "sgsync.env").write_text("; fine\nexport PASSWORD", encoding="utf-8")
    with pytest.raises(sgsync.ConfigError) as caught:
        sgsync.load_environment(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'sgsync.env'}:2: is not NAME=VALUE\nTry: correct or delete that line"
    )
