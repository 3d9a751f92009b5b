"""The nightly run, end to end, against real servers."""

from __future__ import annotations

import homes

SOURCE = [
    ("1001", "2026-01-05", "LOCKED", '"Núñez, Ana"'),
    ("1002", "2026-01-06", "LOCKED", "Lee"),
    ("1003", "2026-01-07", "LOCKED", ""),
]


def test_sync_brings_the_database_in_step_and_pushes_the_run(home: homes.Home) -> None:
    home.extract(SOURCE)
    home.sis([("1002", "2026-01-06", "OPEN", "Lee"), ("1009", "2026-01-09", "LOCKED", "Gone")])
    home.configure(upload='<SQL file="open_records.csv">SELECT 1 AS "one"</SQL>')
    assert home.main() == 0, home.log
    assert home.sis_rows() == [
        ("1001", "2026-01-05", "LOCKED", "Núñez, Ana"),
        ("1002", "2026-01-06", "LOCKED", "Lee"),
        ("1003", "2026-01-07", "LOCKED", ""),
    ]
    print(home.log, home.summary, home.pushed().keys())
    assert home.main() == 0
    print(home.log, home.summary, home.pushed().keys())
