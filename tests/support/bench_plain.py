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
        yield next(reader), None
        last = None
        for row in reader:
            key = row[:width]
            if last is not None and not last < key:
                raise SystemExit(f"{path}:{reader.line_num}: not sorted, or twice: {key}")
            last = key
            yield row, key


def merge(ours, theirs, write):
    columns, _ = next(ours)[0], next(theirs)
    write(["operation", *(f"before_{c}" for c in columns), *(f"after_{c}" for c in columns)])
    nothing = [""] * len(columns)
    end = (None, None)
    (a, our_key), (b, their_key) = next(ours, end), next(theirs, end)
    while a or b:
        if not b or (a and our_key < their_key):
            write(["insert", *nothing, *a])
            a, our_key = next(ours, end)
        elif not a or their_key < our_key:
            write(["delete", *b, *nothing])
            b, their_key = next(theirs, end)
        else:
            if a != b:
                write(["update", *b, *a])
            a, our_key = next(ours, end)
            b, their_key = next(theirs, end)


def main(a, b, out, width):
    with Path(out).open("w", encoding="utf-8", newline="") as file:
        merge(rows(a, width), rows(b, width), csv.writer(file).writerow)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
