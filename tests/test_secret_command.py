"""`sgsync.py secret`: into a real file-based store of keyring, and where there is none."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sgsync
from support import homes
from support.terminal import typed

keyring = pytest.importorskip("keyring")

# a store as keyring's plug-ins are: one file a secret, in the folder of the environment
BACKEND = """
import os
from pathlib import Path
from keyring.backend import KeyringBackend

class Keyring(KeyringBackend):
    name, priority = "a folder", 1

    def _path(self, service, username):
        return Path(os.environ["STORE"], f"{service}-{username}")

    def set_password(self, service, username, password):
        self._path(service, username).write_text(password, "utf-8")

    def get_password(self, service, username):
        path = self._path(service, username)
        return path.read_text("utf-8") if path.exists() else None

    def delete_password(self, service, username):
        self._path(service, username).unlink()
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "sgsync_test_store.py").write_text(BACKEND)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "sgsync_test_store.Keyring")
    monkeypatch.setenv("STORE", str(tmp_path))
    before = keyring.get_keyring()
    import sgsync_test_store

    keyring.set_keyring(sgsync_test_store.Keyring())
    yield tmp_path
    keyring.set_keyring(before)
    sys.modules.pop("sgsync_test_store", None)


def test_secret_is_what_the_placeholder_gives(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("pass wörd \r\nsecond line\n"))
    assert sgsync.main(["secret", "set", "sis", "--stdin", "--verbose"]) == 0
    out, err = capsys.readouterr()
    account = sgsync.account_name()
    assert out == ""
    assert err.splitlines()[-1] == (
        f"sis: stored in a folder of the account {account}; write ${{keyring:sis}} in config.xml"
    )
    assert "wörd" not in err
    assert (store / "sgsync-sis").read_text("utf-8") == "pass wörd "
    placeholders = sgsync.Placeholders(store)
    assert placeholders.expand("${keyring:sis}", connection_string=False) == ("pass wörd ", [])
    assert sgsync.main(["secret", "delete", "sis"]) == 0
    assert sgsync.main(["secret", "delete", "sis"]) == 2
    assert "sis: there is no such secret in a folder" in capsys.readouterr().err
    assert not (store / "sgsync-sis").exists()


@pytest.mark.skipif(os.name == "nt", reason="terminals of POSIX")
def test_secret_asks_twice_and_shows_nothing(store: Path) -> None:
    command = [sys.executable, str(homes.SCRIPT), "secret", "set", "sis"]
    code, out, shown = typed(command, [("sis: ", "mellon"), ("again: ", "melon")])
    assert (code, out) == (2, "")
    assert "the two entries differ; nothing was stored" in shown
    assert not (store / "sgsync-sis").exists()
    code, out, shown = typed(command, [("sis: ", "mellon"), ("again: ", "mellon")])
    assert (code, out) == (0, "")
    assert "mellon" not in shown
    assert (store / "sgsync-sis").read_text() == "mellon"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["set", "sis"], "this is not a terminal; nothing was stored\n    Try: pass the secret on "
                         "standard input: --stdin"),
        (["set", "sis", "--stdin"], "sis: the secret is empty; nothing was stored"),
        (["set", "a}b", "--stdin"], "'a}b' cannot be the name of a secret"),
        (["set", "", "--stdin"], "'' cannot be the name of a secret"),
    ],
)  # fmt: skip
def test_secret_refuses(
    store: Path, words: list[str], told: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert sgsync.main(["secret", *words]) == 2
    assert told in capsys.readouterr().err
    assert not list(store.glob("sgsync-*"))


def test_secret_names_the_line_that_installs_keyring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "keyring", None)
    assert sgsync.main(["secret", "set", "sis", "--stdin"]) == 2
    install = sgsync.command_line([sys.executable, "-m", "pip", "install", "keyring"])
    assert f"Try: install it:\n    {install}\n" in capsys.readouterr().err


def test_secret_tells_of_a_store_that_refuses(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a Linux server, which has no store."""
    from keyring.backends.fail import Keyring

    keyring.set_keyring(Keyring())
    monkeypatch.setattr(sys, "stdin", io.StringIO("mellon\n"))
    assert sgsync.main(["secret", "set", "sis", "--stdin"]) == 2
    told = capsys.readouterr().err
    assert "sis: the password store refused: No recommended backend was available" in told
    assert "${file:PATH} or ${env:NAME} instead" in told
    assert "mellon" not in told
