"""Errors: exit codes that never change, and messages in both languages."""

from __future__ import annotations

import pytest

from hanmo import errors
from hanmo.cli.docs import EXIT_CODES
from hanmo.errors import HanmoError, UsageError, missing_package, nearest

SUBCLASSES = HanmoError.__subclasses__()
CODES = {
    "UsageError": 2,
    "DataError": 3,
    "ModelError": 4,
    "ResourceError": 5,
    "NetworkError": 6,
    "Interrupted": 130,
}


def test_the_exit_codes_are_the_promised_ones() -> None:
    assert {cls.__name__: cls.exit_code for cls in SUBCLASSES} == CODES
    assert HanmoError.exit_code == 1


def test_every_exit_code_is_documented() -> None:
    documented = {code for code, _, _ in EXIT_CODES}
    assert documented == {0, 1, *CODES.values()}
    assert errors.__doc__ is not None
    for code in documented:
        assert any(line.split()[:1] == [str(code)] for line in errors.__doc__.splitlines()), code


@pytest.mark.parametrize("cls", [HanmoError, *SUBCLASSES])
def test_a_message_says_where_what_why_and_fix(cls: type[HanmoError], monkeypatch: pytest.MonkeyPatch) -> None:
    error = cls("it broke", where="a.txt:3", why="because", fix="do this", zh="坏了")
    monkeypatch.setenv("HANMO_LANG", "en")
    assert str(error) == "a.txt:3: it broke\n  why: because\n  fix: do this"
    monkeypatch.setenv("HANMO_LANG", "zh")
    assert str(error) == "a.txt:3: 坏了"
    assert error.args == ("it broke",)


def test_parts_that_are_missing_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(UsageError("it broke")) == "it broke"
    monkeypatch.setenv("HANMO_LANG", "zh")
    assert str(UsageError("it broke", fix="do this")) == "it broke\n  fix: do this"
    assert str(UsageError("it broke", zh="坏了")) == "坏了"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HANMO_LANG": "zh"}, "zh"),
        ({"HANMO_LANG": "en", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LC_MESSAGES": "zh_TW.UTF-8", "LANG": "en_US.UTF-8"}, "zh"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({}, "en"),
    ],
)
def test_the_language_follows_the_environment(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HANMO_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    from hanmo.language import language

    assert language() == expected


def test_nearest_names_the_closest_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nearest("evalute", ["evaluate", "generate"]) == "did you mean 'evaluate'?"
    assert nearest("zzz", ["size", "seed"]) == "known: seed, size"
    monkeypatch.setenv("HANMO_LANG", "zh")
    assert nearest("sede", ["size", "seed"]) == "是否想写 'seed'？"
    assert nearest("zzz", ["size", "seed"]) == "可用：seed, size"


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    error = missing_package("pyarrow", "parquet", "reading parquet")
    assert error.exit_code == 5
    assert "pip install 'hanmo[parquet]'" in str(error)
    monkeypatch.setenv("HANMO_LANG", "zh")
    assert "pip install 'hanmo[parquet]'" in str(error) and "缺少软件包" in str(error)
