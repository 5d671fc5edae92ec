"""``hanmo doctor``: what this machine has, what is missing, and what to type."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hanmo import __version__
from hanmo.cli.outcome import Outcome
from hanmo.folder import free_bytes, home
from hanmo.language import pick
from hanmo.progress import human_bytes
from hanmo.settings import CommonSettings

HELP = "what this machine has, what is missing, and what to type"
HELP_ZH = "检查本机：有什么、缺什么、该输入什么"

CORE = ("torch", "numpy", "tokenizers", "tiktoken", "safetensors", "gguf", "jinja2", "PyYAML")
OPTIONAL = {
    "fastapi": ("serve", "hanmo serve", "网页与接口服务"),
    "uvicorn": ("serve", "hanmo serve", "网页与接口服务"),
    "pyarrow": ("parquet", "reading parquet files", "读取 parquet 文件"),
    "opencc": ("chinese", "--simplify (traditional to simplified)", "--simplify（繁体转简体）"),
    "gensim": ("classical", "hanmo vectors train (Word2Vec, FastText)", "hanmo vectors train（Word2Vec、FastText）"),
    "jieba": ("classical", "words of Chinese texts", "中文分词"),
    "python-crfsuite": ("classical", "CRF taggers", "CRF 标注"),
    "scikit-learn": ("classical", "linear classifiers", "线性分类器"),
    "httpx": ("remote", "models behind an OpenAI-compatible address", "OpenAI 兼容接口的远程模型"),
    "optuna": ("search", "--search (learning rate and other settings)", "--search（搜索学习率等设置）"),
    "tensorboard": ("track", "--track tensorboard", "--track tensorboard"),
    "huggingface_hub": ("hub", "models from the hub by name", "按名称从模型库下载"),
}


@dataclass
class DoctorSettings(CommonSettings):
    """Settings of ``hanmo doctor``: the common ones."""


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    import importlib.metadata  # here: it would double the time of `hanmo --help`

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The name of the processor and the instructions that matter here."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", fields.get("Features", "")).split()
    known = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "amx_tile", "neon", "asimd") if flag in flags]
    return f"{fields.get('model name', platform.machine())} ({' '.join(known)})"


def inspect_torch() -> dict[str, Any]:
    """What torch offers here: devices, threads and the measured matrix rate."""
    import torch

    from hanmo.inference.native import library
    from hanmo.models.device import available_memory
    from hanmo.models.kernels import native
    from hanmo.training.plan import measure_matrix_rate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "devices": [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"],
        "threads": torch.get_num_threads(),
        "matrix_gflops": round(measure_matrix_rate(device) / 1e9),
        "memory_available": available_memory(),
        "native_kernels": native.load()[1] if native.library() is not None else None,
        "native_missing": "" if native.library() is not None else native.load()[1],
        "native_engine": library.load()[1] if library.load()[0] is not None else None,
        "engine_missing": "" if library.load()[0] is not None else library.load()[1],
    }


def examine() -> dict[str, Any]:
    """Everything the verb reports, as plain data."""
    packages = {name: installed(name) for name in (*CORE, *OPTIONAL)}
    report: dict[str, Any] = {
        "hanmo": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "disk_free": free_bytes(Path.cwd()),
        "home": str(home()),
        "packages": packages,
        "compiler": shutil.which("g++") or shutil.which("clang++"),
        "problems": [],
    }
    problems: list[dict[str, str]] = report["problems"]
    missing = [name for name in CORE if packages[name] is None]
    if missing:
        problems.append({"what": f"missing: {', '.join(missing)}", "fix": f"{sys.executable} -m pip install hanmo"})
    if packages["torch"] is not None:
        report.update(inspect_torch())
        fix = pick("install a C++ compiler, then install Hanmo again", "请安装 C++ 编译器，然后重新安装 Hanmo")
        if report["native_missing"]:
            what = pick(
                f"no native kernels ({report['native_missing']}): training on the CPU takes two to four times as long",
                f"没有本地内核（{report['native_missing']}）：CPU 上的训练时间会是两到四倍",
            )
            problems.append({"what": what, "fix": fix})
        if report["engine_missing"]:
            what = pick(
                f"no native engine ({report['engine_missing']}): torch writes on the CPU, in float32 and far slower",
                f"没有本地推理引擎（{report['engine_missing']}）：CPU 上只能由 torch 以 float32 生成，速度慢得多",
            )
            problems.append({"what": what, "fix": fix})
    if report["disk_free"] < 2e9:
        problems.append({"what": f"only {human_bytes(report['disk_free'])} of disk are free", "fix": "free some space"})
    for name, (extra, purpose, _) in OPTIONAL.items():
        if packages[name] is None:
            problems.append({"what": f"{name} is not installed ({purpose})", "fix": f"pip install 'hanmo[{extra}]'"})
    return report


def describe(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = [
        (pick("Hanmo", "翰墨"), f"{report['hanmo']}, Python {report['python']}"),
        (pick("system", "系统"), report["system"]),
        (pick("processor", "处理器"), f"{report['processor']}, {report['cores']} " + pick("cores", "核")),
    ]
    if "devices" in report:
        speed = pick("GFLOP/s in float32 products", "GFLOP/s（float32 矩阵乘）")
        rows += [
            (pick("devices", "设备"), f"{', '.join(report['devices'])}; {report['matrix_gflops']} {speed}"),
            (pick("kernels", "内核"), report["native_kernels"] or pick("none", "无")),
            (pick("engine", "推理引擎"), report["native_engine"] or "torch"),
            (pick("memory", "内存"), f"{human_bytes(report['memory_available'])} " + pick("available", "可用")),
        ]
    rows += [
        (pick("disk", "磁盘"), f"{human_bytes(report['disk_free'])} " + pick("free", "可用")),
        (pick("downloads", "下载目录"), report["home"]),
    ]
    rows += [(name, version) for name, version in report["packages"].items() if version]
    lines = [f"{label:<16} {value}" for label, value in rows]
    lines.append("")
    if not report["problems"]:
        lines.append(pick("Nothing is missing.", "一切就绪。") + "  hanmo build")
    lines += [f"- {problem['what']}\n    {problem['fix']}" for problem in report["problems"]]
    return "\n".join(lines)


def run(settings: DoctorSettings) -> Outcome:  # noqa: ARG001 - every verb takes its settings
    """Examine the machine."""
    report = examine()
    return Outcome(report, describe(report))
