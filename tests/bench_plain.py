"""What `sgsync.py diff` is measured against: the merge that one writes first, with csv.reader.

python bench_plain.py A.csv B.csv OUT.csv KEY_COLUMNS; the key is the first columns. It checks what
sgsync checks of the order (strictly ascending, so no key twice) and writes the same rows.
"""

import csv
import sys
from pathlib import Path


def rows(path, width):
    with Path(path).open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        yield next(reader)
        last = None
        for row in reader:
            key = row[:width]
            if last is not None and not last < key:
                raise SystemExit(f"{path}:{reader.line_num}: not sorted, or twice: {key}")
            last = key
            yield row


def merge(ours, theirs, width, write):
    columns, _ = next(ours), next(theirs)
    write(["operation", *(f"before_{c}" for c in columns), *(f"after_{c}" for c in columns)])
    nothing = [""] * len(columns)
    a, b = next(ours, None), next(theirs, None)
    while a is not None or b is not None:
        if b is None or (a is not None and a[:width] < b[:width]):
            write(["insert", *nothing, *a])
            a = next(ours, None)
        elif a is None or b[:width] < a[:width]:
            write(["delete", *b, *nothing])
            b = next(theirs, None)
        else:
            if a != b:
                write(["update", *b, *a])
            a, b = next(ours, None), next(theirs, None)


def main(a, b, out, width):
    with Path(out).open("w", encoding="utf-8", newline="") as file:
        merge(rows(a, width), rows(b, width), width, csv.writer(file).writerow)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
