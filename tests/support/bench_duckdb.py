"""What `sgsync.py diff` is measured against: DuckDB's full join of the same files.

python bench_duckdb.py A.csv B.csv OUT.csv KEY_COLUMNS; the key is the first columns. Every column
is text. The rows written are those of sgsync, in any order; sortedness is not checked.
"""

import sys

import duckdb


def main(a, b, out, width):
    database = duckdb.connect()
    for name, path in (("a", a), ("b", b)):
        database.execute(
            f"CREATE VIEW {name} AS FROM read_csv('{path}', header = true, all_varchar = true, "
            "delim = ',', quote = '\"', escape = '\"', nullstr = '', auto_detect = true)"
        )
    columns = [row[0] for row in database.execute("DESCRIBE a").fetchall()]
    key, rest = columns[:width], columns[width:]
    before = ", ".join(f'b."{c}" AS "before_{c}"' for c in columns)
    after = ", ".join(f'a."{c}" AS "after_{c}"' for c in columns)
    database.execute(f"""
        COPY (
            SELECT CASE WHEN b."{key[0]}" IS NULL THEN 'insert'
                        WHEN a."{key[0]}" IS NULL THEN 'delete' ELSE 'update' END AS operation,
                {before}, {after}
            FROM a FULL JOIN b ON {" AND ".join(f'a."{c}" = b."{c}"' for c in key)}
            WHERE a."{key[0]}" IS NULL OR b."{key[0]}" IS NULL
                OR {" OR ".join(f'a."{c}" IS DISTINCT FROM b."{c}"' for c in rest)}
        ) TO '{out}' (HEADER, DELIMITER ',')""")


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
