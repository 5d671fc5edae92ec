"""Typed settings: one dataclass per verb is the only source of its flags, recipe keys and documentation.

A verb declares its settings like this::

    @dataclass
    class CountSettings(CommonSettings):
        path: str = argument("what to count", zh="要统计的文件")
        limit: int | None = option(None, "at most so many; default: all", zh="上限；默认全部")

From it come the command line (``hanmo count PATH --limit 3``), the YAML recipe (``limit: 3``) and ``docs/cli.md``.
A field whose default is ``None`` is *computed*: the verb fills it in with :meth:`Resolution.compute`, which records the
reason, prints it and stores it in the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from hanmo.errors import UsageError, nearest
from hanmo.language import pick

T = TypeVar("T")


def wanted_threads() -> int | None:
    """The number of threads that ``HANMO_THREADS`` asks for; None where it does not.

    Raises:
        UsageError: the value is no whole number from 1 to 1024.
    """
    value = os.environ.get("HANMO_THREADS", "").strip()
    if not value:
        return None
    if not re.fullmatch("[0-9]{1,9}", value) or not 1 <= int(value) <= 1024:
        shown = repr(value) if len(value) <= 40 else repr(value[:37] + "...")
        raise UsageError(
            f"HANMO_THREADS must be a whole number from 1 to 1024, not {shown}",
            where="environment",
            fix="set it to the number of cores to use, or leave it unset for all of them",
            zh=f"HANMO_THREADS 应为 1 到 1024 的整数，不能是 {shown}。请设为要使用的核数；不设置则使用全部核",
        )
    return int(value)


def option(
    default: Any,
    help: str,
    *,
    zh: str = "",
    choices: tuple[str, ...] = (),
    aliases: Callable[[str], str] | None = None,
    metavar: str = "",
    short: str = "",
) -> Any:
    """Declare a flag: ``default`` value, English and Chinese help, and the allowed values if few; ``aliases`` gives the
    allowed value of another name, which may be none of them."""
    metadata = {"help": help, "zh": zh, "choices": choices, "metavar": metavar, "short": short, "positional": False}
    metadata["aliases"] = aliases
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def argument(
    help: str, *, zh: str = "", default: Any = MISSING, many: bool = False, metavar: str = "", flag: str = ""
) -> Any:
    """Declare a positional argument; one with a ``default`` may be left out; ``many`` takes several; ``flag`` is a name
    by which it may be given as well, ``--flag VALUE``: then it does not stand among the others."""
    metadata = {"help": help, "zh": zh, "choices": (), "metavar": metavar, "short": "", "positional": True}
    metadata |= {"many": many, "required": False, "flag": flag}
    if many:
        return field(default_factory=lambda: list(default) if default is not MISSING else [], metadata=metadata)
    metadata["required"] = default is MISSING
    return field(default="" if default is MISSING else default, metadata=metadata)


@dataclass
class CommonSettings:
    """Settings that every verb understands."""

    config: str | None = option(
        None,
        "read settings from a YAML recipe; flags override it",
        zh="从 YAML 配方读取设置；命令行优先",
        metavar="FILE",
    )
    json: bool = option(
        False, "print one JSON document on standard output and nothing else there", zh="标准输出只打印一个 JSON 文档"
    )
    offline: bool = option(False, "never use the network", zh="绝不使用网络")


@dataclass
class Choice:
    """A computed default: the name of the setting, its value, and the reason for it."""

    name: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.name} = {self.value}  ({self.reason})"


@dataclass
class Resolution:
    """The settings in force and the reasons of those that were computed."""

    choices: list[Choice] = field(default_factory=list)

    def compute(self, settings: Any, name: str, value: Any, reason: str) -> None:
        """Set ``settings.name`` to ``value`` unless the user gave one, and record the reason."""
        if getattr(settings, name) is None:
            setattr(settings, name, value)
            self.choices.append(Choice(name, value, reason))

    def describe(self) -> str:
        """One line per computed setting: name, value, reason."""
        return "\n".join(f"  {choice}" for choice in self.choices)

    def record(self, settings: Any) -> dict[str, Any]:
        """All settings and the reasons of the computed ones, as plain data for the run's folder."""
        return {
            "settings": dataclasses.asdict(settings),
            "computed": {choice.name: choice.reason for choice in self.choices},
        }


def flag(name: str) -> str:
    """``max_steps`` -> ``--max-steps``."""
    return "--" + name.replace("_", "-")


def base_type(annotation: Any) -> tuple[Any, bool]:
    """Strip ``| None`` and ``list[...]``: return the element type and whether the field is a list."""
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        return base_type(inner[0])
    if origin is list:
        return typing.get_args(annotation)[0], True
    return annotation, False


EXPECTED = {
    bool: ("true or false", " true 或 false"),
    int: ("a whole number", "整数"),
    float: ("a number", "数字"),
    str: ("a text (in quotes where it looks like something else)", "文本（看似其他类型时请加引号）"),
}


def convert(
    value: Any,
    annotation: Any,
    name: str,
    source: str,
    choices: tuple[str, ...] = (),
    aliases: Callable[[str], str] | None = None,
) -> Any:
    """Turn a flag's text or a recipe's value into the field's type.

    Raises:
        UsageError: the value does not fit; the message names the setting and what it expects.
    """
    kind, is_list = base_type(annotation)
    if value is None:
        return None
    if is_list:
        items = value if isinstance(value, list) else [value]
        return [convert(item, kind, name, source, choices, aliases) for item in items]
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            raise ValueError
        if isinstance(value, (bool, list, dict)):  # in YAML a bare yes or no is a truth value, not a text
            raise ValueError
        if kind is int:
            if isinstance(value, float) and not value.is_integer():
                raise ValueError
            return int(str(value).replace("_", "")) if isinstance(value, str) else int(value)
        if kind is float:
            if not math.isfinite(float(value)):
                raise ValueError
            return float(value)
        text = str(value)
    except (ValueError, TypeError, OverflowError):
        en, zh = EXPECTED.get(kind, EXPECTED[str])
        raise UsageError(
            f"{name} expects {en}, not {value!r}", where=source, zh=f"{name} 的值应为{zh}，而不是 {value!r}"
        ) from None
    if aliases is not None and text not in choices:
        text = aliases(text)
    if choices and text not in choices:
        fix = nearest(text, choices)
        raise UsageError(f"{name} cannot be {text!r}", where=source, fix=fix, zh=f"{name} 不能是 {text!r}，{fix}")
    return text


def allowed(item: dataclasses.Field[Any]) -> tuple[tuple[str, ...], Callable[[str], str] | None]:
    """The values that a field may have, and what gives the value of another name."""
    return item.metadata.get("choices", ()), item.metadata.get("aliases")


def type_hints(cls: type) -> dict[str, Any]:
    """The resolved annotations of a settings dataclass."""
    return typing.get_type_hints(cls)


class Parser(argparse.ArgumentParser):
    """An argument parser whose help speaks the user's language and whose errors are :class:`UsageError`."""

    def error(self, message: str) -> typing.NoReturn:
        without_value = re.fullmatch(r"argument (\S+?)(?:/\S+)?: expected one argument", message)
        raise UsageError(
            message,
            where=self.prog,
            fix=f"{self.prog} --help",
            zh=f"{without_value[1]} 后面缺少值" if without_value else f"命令行有误：{message}",
        )

    def format_help(self) -> str:
        text = super().format_help()
        return text.replace("usage: ", pick("usage: ", "用法："), 1)


def build_parser(cls: type, prog: str, description: str) -> Parser:
    """The command line of a settings dataclass. Every default is absent, so that a given flag can be told apart."""
    parser = Parser(
        prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False
    )
    hints = type_hints(cls)
    arguments = parser.add_argument_group(pick("arguments", "参数"))
    options = parser.add_argument_group(pick("options", "选项"))
    options.add_argument("-h", "--help", action="store_true", help=pick("show this text", "显示本说明"))
    for item in dataclasses.fields(cls):
        meta = item.metadata
        if "help" not in meta:
            continue
        text = help_text(item).replace("%", "%%")
        if meta["positional"]:
            nargs: Any = "*" if meta.get("many") else (None if meta["required"] else "?")
            arguments.add_argument(item.name, nargs=nargs, help=text, metavar=metavar(item))
            if meta["flag"]:
                options.add_argument(
                    flag(meta["flag"]),
                    dest=item.name,
                    action="append" if meta.get("many") else "store",
                    metavar=metavar(item),
                    help=pick(f"the same as the argument {metavar(item)}", f"同参数 {metavar(item)}"),
                )
            continue
        kind, is_list = base_type(hints[item.name])
        if kind is bool:
            action = "store_false" if item.default is True else "store_true"
            options.add_argument(flag_of(item), dest=item.name, action=action, help=text)
            continue
        names = [flag_of(item)] + ([meta["short"]] if meta["short"] else [])
        options.add_argument(
            *names, dest=item.name, help=text, metavar=metavar(item), action="append" if is_list else "store"
        )
    return parser


def flag_of(item: dataclasses.Field[Any]) -> str:
    """The flag of a field; one that is on by default has a flag that turns it off."""
    return flag("no_" + item.name) if item.default is True else flag(item.name)


def metavar(item: dataclasses.Field[Any]) -> str:
    """What stands for the value in the help: ``{cpu,cuda}``, ``FILE`` or the name in capitals."""
    choices: tuple[str, ...] = item.metadata["choices"]
    return item.metadata["metavar"] or ("{" + ",".join(choices) + "}" if choices else item.name.upper())


def shown_default(item: dataclasses.Field[Any]) -> str:
    """The default as a text; empty where there is none, where it is computed, and for switches."""
    default = item.default
    if default is MISSING or default is None or isinstance(default, bool) or default == "":
        return ""
    return str(default)


def help_text(item: dataclasses.Field[Any]) -> str:
    """The help of a field in the user's language, with its default."""
    text = pick(item.metadata["help"], item.metadata["zh"])
    default = shown_default(item)
    return text + pick(f" (default: {default})", f"（默认：{default}）") if default else text


def read_recipe(path: str, cls: type) -> dict[str, Any]:
    """Read a YAML recipe for a verb; unknown keys are refused with the nearest known one.

    Raises:
        UsageError: the file is missing, is not a mapping, or has a key or value the verb does not know.
    """
    import yaml

    hints = type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        loaded = loader.construct_document(root) if root else {}
    except FileNotFoundError:
        raise UsageError("there is no such recipe", where=path, zh="找不到这个配方文件") from None
    except OSError as error:
        zh = f"无法读取配方文件：{error.strerror}"
        raise UsageError(f"the recipe cannot be read: {error.strerror}", where=path, zh=zh) from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        problem = getattr(error, "problem", None) or error
        raise UsageError(
            f"the recipe is not valid YAML: {problem}", where=where, zh=f"配方不是有效的 YAML：{problem}"
        ) from None
    if not isinstance(loaded, dict):
        raise UsageError(
            "a recipe is a list of 'key: value' lines",
            where=path,
            fix="for example  seed: 1",
            zh="配方应由 '键: 值' 的行组成，例如  seed: 1",
        )
    lines = {key.value: key.start_mark.line + 1 for key, _ in root.value} if root else {}
    values: dict[str, Any] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        where = f"{path}:{lines[str(key)]}" if str(key) in lines else path
        if name not in fields or name == "config":
            fix = nearest(name, [known for known in fields if known != "config"])
            raise UsageError(f"unknown setting '{key}'", where=where, fix=fix, zh=f"未知设置 '{key}'，{fix}")
        if value is not None:  # "key:" with nothing after it leaves the default
            values[name] = convert(value, hints[name], name, where, *allowed(fields[name]))
    return values


def parse(cls: type[T], arguments: list[str], prog: str, description: str = "") -> T:
    """Parse the command line of a verb: defaults, then the recipe, then the flags.

    Arguments may stand before, between and after the flags; after ``--`` everything is an argument.

    Raises:
        UsageError: unknown flag, key or value, or a missing argument.
        SystemExit: ``--help`` was asked for and printed.
    """
    hints = type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    parser = build_parser(cls, prog, description or (cls.__doc__ or "").strip())
    flags, rest = split_arguments(parser, arguments)
    if flags.pop("help", False):
        parser.print_help()
        raise SystemExit(0)
    flags.update(assign_arguments(tuple(item for item in fields if item.name not in flags), rest, prog))
    values: dict[str, Any] = read_recipe(flags["config"], cls) if "config" in flags else {}
    for item in fields:
        if item.name in flags:
            name = metavar(item) if item.metadata["positional"] else flag_of(item)
            values[item.name] = convert(flags[item.name], hints[item.name], name, prog, *allowed(item))
        if item.metadata.get("required") and values.get(item.name) is None:
            name = metavar(item)
            text = help_text(item)
            raise UsageError(
                f"{name} is missing: {text}", where=prog, fix=f"{prog} --help", zh=f"缺少参数 {name}：{text}"
            )
    return cls(**values)


def split_arguments(parser: Parser, given: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The flags with their values, and the arguments that are left.

    argparse alone cannot take ``MODEL --seed 1 PROMPT``, so it reads the flags only.

    Raises:
        UsageError: a flag that is not known, or one without its value.
    """
    end = given.index("--") if "--" in given else len(given)
    flags_only = Parser(prog=parser.prog, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    known = []
    for action in parser._actions:
        if action.option_strings:
            flags_only._add_action(action)
            known += [name for name in action.option_strings if name.startswith("--")]
    found, rest = flags_only.parse_known_args(given[:end])
    for text in [] if "help" in found else rest:  # who asks for help gets it, whatever else is wrong
        if text.startswith("-") and text != "-" and " " not in text and not re.match(r"-[\d.]", text):
            name = text.split("=")[0]
            fix = nearest(name, known) if name.startswith("--") else f"{parser.prog} --help"
            raise UsageError(f"unknown argument {text}", where=parser.prog, fix=fix, zh=f"未知参数 {text}，{fix}")
    return vars(found), rest + given[end + 1 :]


def assign_arguments(fields: tuple[dataclasses.Field[Any], ...], given: list[str], prog: str) -> dict[str, Any]:
    """Give the arguments to the positional fields in order; a field that takes several takes all that are left.

    Raises:
        UsageError: there are more arguments than fields.
    """
    values: dict[str, Any] = {}
    left = list(given)
    for item in fields:
        if item.metadata.get("positional") and left:
            values[item.name], left = (left, []) if item.metadata.get("many") else (left[0], left[1:])
    if left:
        fix = f"{prog} --help"
        raise UsageError(f"unknown argument {left[0]}", where=prog, fix=fix, zh=f"未知参数 {left[0]}，{fix}")
    return values


UNITS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds", "秒", "秒钟"), 1),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes", "分", "分钟"), 60),
    **dict.fromkeys(("h", "hour", "hours", "时", "小时"), 3600),
}


def parse_duration(text: str) -> float:
    """Seconds in a budget such as ``90s``, ``3min``, ``1.5h`` or plain ``180``.

    >>> parse_duration("3min"), parse_duration("1h30m"), parse_duration("45")
    (180.0, 5400.0, 45.0)
    """
    number = r"(\d+(?:\.\d+)?)"
    unit = "|".join(sorted(UNITS, key=len, reverse=True))
    lowered = text.strip().lower()
    if re.fullmatch(number, lowered):
        seconds = float(lowered)
    elif re.fullmatch(rf"(?:{number}\s*({unit})\s*)+", lowered):
        seconds = sum(float(amount) * UNITS[name] for amount, name in re.findall(rf"{number}\s*({unit})", lowered))
    else:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise UsageError(
            f"'{text}' is not a duration", fix="write 90s, 3min or 1h", zh=f"'{text}' 不是时长，请写 90s、3min 或 1h"
        )
    return seconds


def notice(message: str) -> None:
    """Tell the user something on standard error; standard output belongs to results.

    Of several processes that train together, only the first one talks.
    """
    if os.environ.get("HANMO_FOLLOWER"):
        return
    print(message, file=sys.stderr, flush=True)


__all__ = [
    "Choice",
    "CommonSettings",
    "Literal",
    "Resolution",
    "argument",
    "notice",
    "option",
    "parse",
    "parse_duration",
]
