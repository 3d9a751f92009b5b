"""A terminal for tests: runs a command in one, types answers, gives what the screen shows."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence


def typed(
    command: Sequence[str], answers: Sequence[tuple[str, str]], env: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Exit code, standard output, and what the terminal shows.

    Standard input and error are a terminal.  Each answer is a text to wait for, and what is typed
    when it is there.
    """
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, start_new_session=True,
        encoding="utf-8", env={**os.environ, **(env or {}), "COLUMNS": "200"},
    )  # fmt: skip
    os.close(theirs)
    shown, seen, left = "", 0, list(answers)
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # as Linux says that nobody has it open any more
            break
        if not data:
            break
        shown += data.decode("utf-8", "replace")
        while left and left[0][0] in shown[seen:]:
            seen = shown.index(left[0][0], seen) + len(left[0][0])
            os.write(ours, (left.pop(0)[1] + "\n").encode())
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out, shown.replace("\r\n", "\n")
