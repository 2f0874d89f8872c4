"""Bearer tokens: who comes in, rotation while it runs, and files that are refused."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from toolchain.serving.auth import Auth, InvalidTokens
from toolchain.serving.base import PermissionDenied, Unauthenticated


def tokens(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def auth(tmp_path: Path) -> Auth:
    hashed = hashlib.sha256(b"only-in-a-digest").hexdigest()
    return Auth(
        tokens(
            tmp_path / "tokens",
            f"# a comment\n\nfor-everything  # all\nfor-one-model resnet50\nsha256:{hashed} bert gpt\n"
            "for-one-model lenet\n",
        )
    )


def test_no_file_lets_everybody_in() -> None:
    Auth(None).check("m", None)
    assert not Auth(None).wanted


@pytest.mark.parametrize(
    ("token", "model"),
    [
        ("for-everything", "anything"), ("for-everything", None), ("for-one-model", "resnet50"),
        ("for-one-model", "lenet"), ("for-one-model", None), ("only-in-a-digest", "bert"),
    ],
)  # fmt: skip
def test_a_token_opens_what_it_is_for(auth: Auth, token: str, model: str | None) -> None:
    auth.check(model, f"Bearer {token}")
    auth.check(model, f"bearer {token}")


@pytest.mark.parametrize(
    "header",
    [
        None, "", "Bearer", "Bearer ", "Bearer wrong-token", "Basic for-everything", "for-everything",
        "Bearer for-everythin", "Bearer for-everything2", "Bearer \udcff", "Bearer é",
        "Bearer sha256:" + hashlib.sha256(b"only-in-a-digest").hexdigest(),
    ],
)  # fmt: skip
def test_what_is_no_token_is_refused(auth: Auth, header: str | None) -> None:
    with pytest.raises(Unauthenticated):
        auth.check("resnet50", header)


@pytest.mark.parametrize(("token", "model"), [("for-one-model", "bert"), ("only-in-a-digest", "resnet50")])
def test_a_token_for_another_model_is_refused_as_such(auth: Auth, token: str, model: str) -> None:
    with pytest.raises(PermissionDenied, match=model):
        auth.check(model, f"Bearer {token}")


def test_a_new_file_counts_and_a_broken_one_does_not(tmp_path: Path) -> None:
    path = tokens(tmp_path / "tokens", "the-old-token\n")
    auth = Auth(path)
    assert not auth.refresh()
    new = tokens(tmp_path / "new", "the-new-token\n")
    os.replace(new, path)
    auth.check(None, "Bearer the-old-token")  # until it is looked at
    assert auth.refresh()
    auth.check(None, "Bearer the-new-token")
    with pytest.raises(Unauthenticated):
        auth.check(None, "Bearer the-old-token")
    tokens(path, "x")
    with pytest.raises(InvalidTokens, match="line 1"):
        auth.refresh()
    assert not auth.refresh(), "told once"
    auth.check(None, "Bearer the-new-token")
    path.unlink()
    with pytest.raises(InvalidTokens):
        auth.refresh()
    auth.check(None, "Bearer the-new-token")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no token"), ("# nothing\n", "no token"), ("short\n", "line 1"), ("sha256:12\n", "64 digits"),
        ("good-enough ../etc\n", "name of a model"), ("\ngood-enough\n!!!!!!!!!!\n", "line 3"),
    ],
)  # fmt: skip
def test_files_that_are_refused(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(InvalidTokens) as told:
        Auth(tokens(tmp_path / "tokens", text))
    assert why in str(told.value)
    assert "good-enough" not in str(told.value)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620, 0o660])
def test_a_file_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(InvalidTokens, match="chmod 600"):
        Auth(tokens(tmp_path / "tokens", "good-enough\n", mode))


def test_a_file_that_only_a_group_reads_is_taken(tmp_path: Path) -> None:
    """As mounted secrets are."""
    Auth(tokens(tmp_path / "tokens", "good-enough\n", 0o640))


def test_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidTokens, match="cannot be read"):
        Auth(tmp_path / "none")
