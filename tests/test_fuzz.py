"""A few hundred of the thousands of broken files that `make faults` makes; see fuzz.py."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sgsync
from support import fuzz

few = settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


@pytest.mark.parametrize("kind", ["config", "csv"])
def test_broken_files_get_a_right_answer_or_a_clear_error(kind: str) -> None:
    tally = fuzz.fuzz(kind, range(400))
    assert tally.problems == []
    assert tally.answers > 20
    assert tally.errors > 100


@few
@given(st.binary(max_size=2000) | st.text(max_size=2000).map(str.encode))
def test_load_config_of_anything_is_an_error(tmp_path: Path, raw: bytes) -> None:
    assert fuzz.check_config(raw, tmp_path) == fuzz.ERROR


ALPHABET = st.text(alphabet='ab1 ,"\r\nNULL\u00e9\ufeff\x1b', max_size=6)
FILES = st.lists(st.lists(ALPHABET, min_size=2, max_size=2), max_size=6)


@few
@given(FILES, FILES, st.integers(0, 2**32), st.booleans(), st.booleans())
def test_diff_of_any_rows_is_right_or_an_error(
    tmp_path: Path,
    ours: list[list[str]],
    theirs: list[list[str]],
    seed: int,
    sort: bool,
    trim: bool,
) -> None:
    chance = random.Random(seed)
    sides = []
    for rows in (ours, theirs):
        ascending = {row[0]: tuple(row) for row in sorted(rows)}.values()
        side = ascending if chance.random() < 0.7 else map(tuple, rows)
        sides.append(fuzz.written([("id", "note"), *side], chance))
    pair = fuzz.Pair(*sides, key=("id",), sort=sort, trim=trim, clean=True, block_bytes=16)
    fuzz.check_pair(pair, tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("update,2,x,2,b\r\n", ""), ""),
        (("delete,4,d,,\r\n", "delete,5,d,,\r\n"), "delete of a row that is not there"),
        (("insert,,,3,c\r\n", "insert,,,2,c\r\n"), "an insert of a key that is there"),
        (("2,x,2,b", "2,x,2,x"), "an update that changes nothing, or a key"),
    ],
)
def test_the_model_sees_a_wrong_diff(change: tuple[str, str], reason: str) -> None:
    """The fuzzer itself: it must see what it looks for."""
    ours, theirs = "id,v\r\n1,a\r\n2,b\r\n3,c\r\n", "id,v\r\n1,a\r\n2,x\r\n4,d\r\n"
    pair = fuzz.Pair(ours.encode(), theirs.encode(), ("id",))
    right = (
        "operation,before_id,before_v,after_id,after_v\r\n"
        "update,2,x,2,b\r\ninsert,,,3,c\r\ndelete,4,d,,\r\n"
    )
    source, database = fuzz.model(pair.source, pair), fuzz.model(pair.database, pair)
    assert fuzz.apply_changes(right.encode(), database, pair).rows == source.rows
    wrong = right.replace(*change).encode()
    if reason:
        with pytest.raises(fuzz.WrongError, match=f"^{reason}$"):
            fuzz.apply_changes(wrong, database, pair)
    else:
        assert fuzz.apply_changes(wrong, database, pair).rows != source.rows


def test_fuzz_tells_of_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_config(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(sgsync, "load_config", load_config)
    tally = fuzz.fuzz("config", range(3))
    assert tally.wrong == 3
    assert "KeyError: 'x'" in tally.problems[0]
