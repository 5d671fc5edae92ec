"""From files to the first token, and what stays in memory: Hanmo beside llama.cpp and transformers.

    python benchmarks/loading.py [MODEL] [--files FOLDER]

MODEL is a name or GGUF file that Hanmo loads (default: SmolLM2-135M-Instruct of the catalog). It is loaded as the file
it arrives in, from quantised folders of 4 and 8 bits, and from a folder in float32. Every run is a fresh process whose
imports are done before the clock starts. It loads the model with its tokenizer, writes a token after a prompt of three
("first": load included), reads a prompt of 512 tokens and writes 128 more. The first run of a row warms the disk cache
and is thrown away; medians of three more are shown.

Memory is resident (Linux, /proc/self): `private` belongs to this process alone, `mapped` are pages of files, which
processes share; `peak` is the most there ever was. All three without what the process had after its imports, which
stands in the column `imports`. The ratio is private + mapped by weights + cache: the bytes of the weights in the form
in which the engine computes, and those of keys and values of the 640 tokens.

Needs `pip install llama-cpp-python transformers`; rows of what is not there are left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decode_engines import Engine, Hanmo, LlamaCpp, Transformers, quantise_llama

PROMPT, WRITTEN, RUNS = 512, 128, 3
IMPORTS = {  # what an engine imports when it is first used
    "hanmo": ("hanmo.inference.loading", "hanmo.inference.native.opening", "hanmo.inference.native.network", "jinja2"),
    "llama_cpp": ("llama_cpp",),
    "transformers": ("torch", "transformers", "transformers.models.llama.modeling_llama"),
}


@dataclass
class Row:
    """A line of the table: its name, the package that computes, and the file or folder that it loads."""

    name: str
    package: str
    path: Path


# A process that is measured -------------------------------------------------------------------------------------------


def memory() -> dict[str, int]:
    """Resident memory of this process in bytes: private, mapped, and its peak."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"private": "RssAnon", "mapped": "RssFile", "peak": "VmHWM"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in names.items()}


def opened(package: str, path: Path, threads: int) -> Engine:
    """The engine, its tokenizer loaded as well."""
    if package == "llama_cpp":
        return LlamaCpp(path, threads)
    if package == "transformers":
        transformers: Any = importlib.import_module("transformers")
        engine: Any = Transformers(path)
        engine.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        return engine
    return Hanmo(path)


def measure_here(package: str, path: Path, threads: int) -> dict[str, float]:
    """Load and write in this process."""
    for name in IMPORTS[package]:
        importlib.import_module(name)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = memory(), time.perf_counter()
    engine = opened(package, path, threads)
    loaded = time.perf_counter() - start
    engine.write([[1, 504, 253]], 1, lambda _: None)
    first = time.perf_counter() - start
    engine.write([[1 + i * 7919 % 40_000 for i in range(PROMPT)]], WRITTEN, lambda _: None)
    after = memory()
    cache = engine.cache_bytes * (PROMPT + WRITTEN)
    return {
        **{name: after[name] - before[name] for name in ("private", "mapped")},
        "peak": after["peak"] - before["private"] - before["mapped"],
        "imports": before["private"] + before["mapped"],
        "load": loaded,
        "first": first,
        "weights": engine.weight_bytes,
        "cache": cache,
    }


# The comparison -------------------------------------------------------------------------------------------------------


def measure(row: Row, threads: int) -> dict[str, float]:
    """Medians of fresh processes, after one that warms the disk cache."""
    command = [sys.executable, __file__, str(row.path), "--measure", row.package, "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    runs = []
    for _ in range(1 + RUNS):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{row.name}: {done.stderr[-2000:]}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {name: statistics.median(run[name] for run in runs[1:]) for name in runs[0]}


def make_files(folder: Path, model: str) -> list[Row]:
    """All forms of the model, by Hanmo's own commands and llama.cpp's quantiser; what is there already stays."""
    from hanmo.inference.loading import find

    folder.mkdir(parents=True, exist_ok=True)
    stored, floats, half = find(model), folder / "floats", folder / "f16.gguf"

    def hanmo(target: Path, *words: str | Path) -> None:
        if not target.exists():
            command = [sys.executable, "-m", "hanmo.cli.main", *map(str, words)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    hanmo(floats, "export", stored, floats)
    hanmo(half, "export", stored, half, "--type", "F16")
    hanmo(folder / "int4", "quantize", stored, folder / "int4", "--precision", "stored")
    hanmo(folder / "int8", "quantize", floats, folder / "int8", "--precision", "int8")
    rows = [
        Row(f"Hanmo, {stored.name[-9:]}", "hanmo", stored),
        Row(f"llama.cpp, {stored.name[-9:]}", "llama_cpp", stored),
        Row("Hanmo, folder of int4", "hanmo", folder / "int4"),
        Row("Hanmo, folder of int8", "hanmo", folder / "int8"),
        Row("llama.cpp, Q8_0.gguf", "llama_cpp", folder / "Q8_0.gguf"),
        Row("Hanmo, safetensors fp32", "hanmo", floats),
        Row("transformers, the same", "transformers", floats),
    ]
    rows = [row for row in rows if importlib.util.find_spec(row.package)]
    if importlib.util.find_spec("llama_cpp") and not (folder / "Q8_0.gguf").exists():
        quantise_llama(half, folder / "Q8_0.gguf", "Q8_0")
    return rows


def processor() -> str:
    """Its name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Make the files, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--files", metavar="FOLDER", help="where the forms are kept for the next time")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--measure", choices=IMPORTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure_here(given.measure, Path(given.model), given.threads)))
        return
    packages = ("hanmo", "torch", "llama-cpp-python", "transformers")
    found = {name for name in packages if importlib.util.find_spec(name.replace("llama-cpp-python", "llama_cpp"))}
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages if name in found]
    print(f"{given.model}; {', '.join(versions)}; Python {platform.python_version()}")
    print(f"{processor()}, {os.cpu_count()} processors, {given.threads} threads, Linux {platform.release()}")
    print(f"a prompt of {PROMPT} tokens read and {WRITTEN} written; memory in MB beyond the imports")
    names = ("load s", "first s", "weights", "cache", "private", "mapped", "peak", "ratio", "imports")
    print(f"{'':26}" + "".join(f"{name:>9}" for name in names), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for row in make_files(Path(given.files or scratch), given.model):
            found = measure(row, given.threads)
            ratio = (found["private"] + found["mapped"]) / (found["weights"] + found["cache"])
            sizes = {name: f"{value / 1e6:.1f}" for name, value in found.items()}
            print(
                f"{row.name:26}{found['load']:9.2f}{found['first']:9.2f}"
                + "".join(f"{sizes[name]:>9}" for name in names[2:7])
                + f"{ratio:8.2f}x{sizes['imports']:>9}",
                flush=True,
            )


if __name__ == "__main__":
    main()
