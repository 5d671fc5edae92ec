"""The command ``hanmo``: finds the verb, reads its settings, runs it, and turns errors into messages and exit codes."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import traceback
from types import ModuleType
from typing import Any

from hanmo import __version__
from hanmo.errors import HanmoError, Interrupted, ResourceError, UsageError, nearest
from hanmo.folder import CANNOT_WRITE
from hanmo.language import pick
from hanmo.settings import parse
from hanmo.tasks.registry import ALIASES, MODULES, find_task

VERBS = (
    "build",
    "data",
    "tokenizer",
    "pretrain",
    "finetune",
    "evaluate",
    "predict",
    "compare",
    "vectors",
    "generate",
    "chat",
    "serve",
    "models",
    "export",
    "quantize",
    "doctor",
)


def load_verb(name: str) -> ModuleType:
    """The module of a verb. Every such module imports in milliseconds: heavy packages are imported when it runs."""
    return importlib.import_module(f"hanmo.cli.{name}")


def settings_class(verb: ModuleType) -> type[Any]:
    """The dataclass that declares a verb's settings."""
    declared: list[type[Any]] = [
        item
        for name, item in vars(verb).items()
        if name.endswith("Settings") and getattr(item, "__module__", "") == verb.__name__
    ]
    assert len(declared) == 1, f"{verb.__name__} must declare one settings class"
    return declared[0]


def usage() -> str:
    """The text of ``hanmo --help``."""
    lines = [
        pick(
            f"hanmo {__version__}: from a folder of text to a language model you can measure and talk to.",
            f"翰墨 hanmo {__version__}：从一个文件夹的文本，到可以度量、可以对话的语言模型。",
        ),
        "",
        pick("usage: hanmo VERB [options]     hanmo VERB --help", "用法：hanmo 动词 [选项]     hanmo 动词 --help"),
        "",
    ]
    for name in VERBS:
        verb = load_verb(name)
        lines.append(f"  {name:<10}  {pick(verb.HELP, verb.HELP_ZH)}")
    lines += ["", pick("tasks: ", "任务：") + ", ".join(MODULES)]
    lines += [
        "",
        pick("for example:", "例如："),
        "  hanmo build my-texts/ --budget 3min",
        "  hanmo chat runs/my-texts",
        "  hanmo serve runs/my-texts",
    ]
    return "\n".join(lines)


def about_task(name: str) -> str:
    """What ``hanmo TASK --help`` says of the task: what it is, an example, how to teach it."""
    task = find_task(name)
    teach = f"hanmo finetune --task {task.training} --data FILE --base BASE"
    return pick(
        f'{task.help}. For example:  hanmo {name} --model MODEL "text".  To teach it:  {teach}.  '
        f"How good is it:  hanmo evaluate --task {name} --data FILE --model MODEL",
        f'{task.help_zh}。例如：hanmo {name} --model 模型 "文本"；训练：{teach}；'
        f"评测：hanmo evaluate --task {name} --data 文件 --model 模型",
    )


def run_verb(arguments: list[str]) -> int:
    """Run one command line and return its exit code.

    Raises:
        HanmoError: anything the user can do something about.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"hanmo {__version__}")
        return 0
    given = name = arguments[0]
    if name in MODULES or name in ALIASES:  # hanmo TASK ... is hanmo predict --task TASK ...
        name, arguments = "predict", ["predict", "--task", name, *arguments[1:]]
    if name not in VERBS:
        raise UsageError(
            f"unknown verb '{name}'",
            where="hanmo",
            fix=nearest(name, (*VERBS, *MODULES)),
            zh=f"未知动词 '{name}'，{nearest(name, (*VERBS, *MODULES))}",
        )
    verb = load_verb(name)
    help_wanted = given != name and not {"-h", "--help"}.isdisjoint(arguments)
    about = about_task(given) if help_wanted else pick(verb.HELP, verb.HELP_ZH)
    settings = parse(settings_class(verb), arguments[1:], f"hanmo {given}", about)
    if settings.offline:
        os.environ["HANMO_OFFLINE"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"
    outcome = verb.run(settings)
    if outcome is not None and not os.environ.get("HANMO_FOLLOWER"):
        print(as_json(outcome.data) if settings.json else outcome.text)
    return 0


def as_json(value: Any) -> str:
    """One JSON document; non-ASCII characters are escaped where standard output cannot hold them."""
    utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("_", "-") in ("utf-8", "utf8")
    return json.dumps(value, ensure_ascii=not utf8)


def known_failure(error: Exception) -> HanmoError | None:
    """What the user can do about an exception that is no defect: a full disk, a read-only place, too little memory."""
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        return ResourceError(
            f"{error.strerror}",
            where=str(error.filename or ""),
            fix="free some space, or choose another place with --out",
            zh=f"{error.strerror}。请腾出空间或用 --out 换一个位置",
        )
    # torch raises OutOfMemoryError on an accelerator and a plain RuntimeError on the CPU
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in str(error):
        return ResourceError(
            "the memory is not enough",
            why=str(error).partition("\n")[0],
            fix="lower --micro-batch or --context, or choose a smaller --size",
            zh="内存不足。请调小 --micro-batch 或 --context，或选更小的 --size",
        )
    return None


def report_error(error: HanmoError, json_wanted: bool) -> None:
    """Show an error to a person on standard error, and to a program on standard output if it asked for JSON."""
    label = pick("stopped", "已停止") if isinstance(error, Interrupted) else pick("error", "错误")
    print(f"{label}: {error}", file=sys.stderr, flush=True)
    if json_wanted:
        fields = {"what": error.what, "where": error.where, "why": error.why, "fix": error.fix}
        print(as_json({"error": {**fields, "exit_code": error.exit_code}}))


def main(arguments: list[str] | None = None) -> int:
    """The entry point; see :mod:`hanmo.errors` for the exit codes."""
    given = sys.argv[1:] if arguments is None else arguments
    json_wanted = "--json" in given
    from hanmo.training.launch import told_once

    if isinstance(sys.stdout, io.TextIOWrapper):  # a model may write what a terminal's encoding does not have
        sys.stdout.reconfigure(errors="replace")
    try:
        with told_once():
            code = run_verb(given)
        sys.stdout.flush()  # here, so that a reader that went away is noticed below
        return code
    except HanmoError as error:
        report_error(error, json_wanted)
        return error.exit_code
    except KeyboardInterrupt:
        report_error(Interrupted(pick("by Ctrl-C", "由 Ctrl-C")), json_wanted)
        return Interrupted.exit_code
    except BrokenPipeError:  # the reader of our output went away, as in `hanmo ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as leaving:  # argparse prints --help and leaves
        return int(leaving.code or 0)
    except Exception as error:
        failure = known_failure(error)
        if failure is None:
            traceback.print_exc()
            failure = HanmoError(
                f"a defect in Hanmo ({type(error).__name__}: {error})",
                fix="please report it with the lines above",
                zh="这是 Hanmo 自身的缺陷：请附上以上内容报告给我们",
            )
        report_error(failure, json_wanted)
        return failure.exit_code


if __name__ == "__main__":
    sys.exit(main())
