"""Speed of writing on a CPU: Hanmo beside its peers, same weights, same prompts, same machine, same run.

    python benchmarks/decode.py [--rounds 5] [--engines WORDS] [--quick] [TEXTS...]
    python benchmarks/decode.py --large       # a network of 0.5 B parameters instead: memory decides

Every engine lives in a process of its own, which waits for commands; one computes at a time. Rounds go over all engines
for each measurement in turn, each round with prompts of its own (pieces of the texts), and begin with another engine.
Printed are medians over the rounds, and ratios within rounds. All write greedily and past the end of the text.

    decode      128 tokens in, 128 out, one text: tokens per second after the first
    prefill     512 tokens in: 512 over the time to the first token, which is printed, too
    8 texts     of 128 tokens in, 128 out each: tokens per second of all together, once each has its first
    KL          mean divergence from the logits of transformers in float32, nats, and the share of equal best tokens,
                over 2,048 tokens in windows of 256
    GB/s        weights times decode speed, and its share of what a plain read of memory reached just before: on a
                machine that others share, that changes by the minute
    memory      a fresh process that reads 512 tokens and writes 128: peak resident memory; less what its packages took
                before the model was loaded, over weights and cache

Peers need `pip install transformers llama-cpp-python ctranslate2 onnxruntime-genai onnx-ir openvino-genai`; those that
are missing are left out. The default text is the source of Python's standard library.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from decode_engines import ENGINES, NEEDS, Engine, Prompts, quantise_llama
from worker import Answer, Worker, answer_commands, status

if TYPE_CHECKING:
    from torch import Tensor

MODEL = "smollm2-135m-instruct"
KINDS = ("Q8_0", "Q4_1", "Q4_0", "Q4_K_M")
PROMPT, ANSWER, LONG, TEXTS = 128, 128, 512, 8
WINDOW, WINDOWS = 256, 8
LARGE_ENGINES = ("Hanmo Q4_1", "Hanmo int8", "llama.cpp Q4_1", "llama.cpp Q8_0", "llama.cpp Q4_K_M")
BARS = (  # engine, peer, measurement, least ratio
    ("Hanmo int8", "llama.cpp Q8_0", "decode", 2.4),
    ("Hanmo Q4_1", "llama.cpp Q4_1", "decode", 3.8),
    ("Hanmo int8", "llama.cpp Q8_0", "prefill", 5.0),
    ("Hanmo Q4_1", "llama.cpp Q4_1", "prefill", 9.0),
    ("Hanmo int8", "llama.cpp Q8_0", "8 texts", 4.0),
    ("Hanmo Q4_1", "llama.cpp Q4_1", "8 texts", 4.0),
)
LARGE_BARS = tuple((ours, peer, "decode", 1.0) for ours, peer, what, _ in BARS if what == "decode")
FIRST_TOKEN, MEMORY = 0.25, 1.15  # seconds; times weights and cache


# The files ------------------------------------------------------------------------------------------------------------


def run(*command: str | Path) -> bool:
    """Run a program; whether it succeeded. What it said is printed if not."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{Path(command[0]).name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.returncode == 0


def make_files(folder: Path) -> None:
    """The default model in every form that an engine reads; what is there already stays."""
    from hanmo.inference.loading import find

    folder.mkdir(parents=True, exist_ok=True)
    path, stored = find(MODEL), folder / "stored.gguf"
    if path.suffix == ".gguf" and not stored.exists():
        stored.symlink_to(path)
    export = (sys.executable, "-m", "hanmo.cli.main", "export", MODEL)
    if not (folder / "f16.gguf").exists():
        run(*export, folder / "f16.gguf", "--type", "F16")
    if not (folder / "transformers").exists():
        run(*export, folder / "transformers")
    make_types(folder)
    converter = Path(sys.executable).with_name("ct2-transformers-converter")
    options: tuple[str | Path, ...] = ("--quantization", "int8", "--copy_files", "tokenizer.json", "--output_dir")
    convert = {"ctranslate2": (converter, "--model", folder / "transformers", *options)}
    for bits in ("int4", "int8"):
        builder = (sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", folder / "transformers", "-e", "cpu")
        options = ("--extra_options", "int4_accuracy_level=4") if bits == "int4" else ()
        convert[f"onnxruntime-{bits}"] = (*builder, "-c", folder / "builder", "-p", bits, *options, "-o")
    for name, command in convert.items():
        package = "ctranslate2" if name == "ctranslate2" else "onnxruntime_genai"
        if importlib.util.find_spec(package) and not (folder / name).exists() and not run(*command, folder / name):
            shutil.rmtree(folder / name, ignore_errors=True)
    if importlib.util.find_spec("openvino_genai"):
        for kind in ("Q8_0", "Q4_1"):
            target = folder / f"openvino-{kind}"
            if not (target / "openvino_model.xml").exists():
                target.mkdir(exist_ok=True)
                (target / "model.gguf").unlink(missing_ok=True)
                (target / "model.gguf").symlink_to(folder / f"{kind}.gguf")
                code = "import sys, openvino_genai as o; o.LLMPipeline(sys.argv[1], 'CPU', enable_save_ov_model=True)"
                run(sys.executable, "-c", code, target / "model.gguf")


def make_types(folder: Path) -> None:
    """llama.cpp's types of a file in half precision."""
    for kind in KINDS if importlib.util.find_spec("llama_cpp") else ():
        if not (folder / f"{kind}.gguf").exists():
            quantise_llama(folder / "f16.gguf", folder / f"{kind}.gguf", kind)


def make_large(folder: Path) -> None:
    """A random network of the shape of Qwen2-0.5B."""
    import torch

    from hanmo.inference.loading import load_tokenizer
    from hanmo.models.checkpoints.gguf_writer import save_gguf
    from hanmo.models.transformer import Transformer, TransformerConfig

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "f16.gguf").exists():
        config = TransformerConfig(
            vocab_size=151_936,
            hidden_size=896,
            num_layers=24,
            num_heads=14,
            num_kv_heads=2,
            head_dim=64,
            intermediate_size=4864,
            max_position_embeddings=2048,
            attention_bias=True,
            rope_theta=1e6,
            model_type="qwen2",
        )
        model = Transformer(config)
        with torch.no_grad():
            model.initialize(0)
        save_gguf(folder / "f16.gguf", config, model.state_dict(), load_tokenizer(MODEL), type="F16")
    make_types(folder)


# One engine, in a process of its own ----------------------------------------------------------------------------------


def write(engine: Engine, prompts: Prompts, count: int) -> dict[str, float]:
    """Seconds until every text has its first token, and tokens per second of all together from then on."""
    missing, after, first = set(range(len(prompts))), 0, 0.0
    start = last = time.perf_counter()

    def seen(texts: Sequence[int]) -> None:
        nonlocal after, first, last
        last = time.perf_counter()
        if missing:
            missing.difference_update(texts)
            first = last
        else:
            after += len(texts)

    engine.write(prompts, count, seen)
    return {"first": first - start, "speed": after / (last - first) if after else 0.0}


def divergence(engine: Engine, windows: Prompts, reference: Path) -> dict[str, float]:
    """Mean divergence from the log-probabilities in a file and share of equal best tokens; makes the file if there is
    none."""
    import numpy as np
    import torch

    total, same, count = 0.0, 0, 0
    logprobs = [torch.from_numpy(engine.logits(ids)).log_softmax(-1) for ids in windows]
    if not reference.exists():
        np.save(reference, torch.stack(logprobs).numpy())
    for ours_TV, theirs in zip(logprobs, np.load(reference, mmap_mode="r"), strict=True):
        theirs_TV = torch.from_numpy(np.array(theirs))[:, : ours_TV.size(1)]
        total += float((theirs_TV.exp() * (theirs_TV - ours_TV)).double().sum())
        same += int((theirs_TV.argmax(-1) == ours_TV.argmax(-1)).sum())
        count += len(ours_TV)
    return {"kl": total / count, "same": same / count}


def serve(name: str, files: Path, threads: int) -> None:
    """Be an engine."""

    def begin() -> tuple[Answer, Callable[[Answer], Answer]]:
        import torch

        torch.set_num_threads(threads)
        importlib.import_module(NEEDS.get(name.split()[0], "hanmo.inference.language_model"))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before, start = status("VmRSS"), time.perf_counter()
        engine = ENGINES[name](files, threads)
        about = {"version": engine.version, "weights": engine.weight_bytes, "cache": engine.cache_bytes}

        def follow(given: Answer) -> Answer:
            match given["do"]:
                case "write":
                    return write(engine, given["prompts"], given["count"])
                case "divergence":
                    return divergence(engine, given["windows"], Path(given["reference"]))
                case _:
                    return {"peak": status("VmHWM"), "before": before}

        return {**about, "seconds": time.perf_counter() - start}, follow

    answer_commands(begin)


def start_worker(name: str, files: Path, threads: int) -> Worker:
    """An engine in a process of its own."""
    return Worker([sys.executable, __file__, "--serve", name, "--folder", files, "--threads", str(threads)], threads)


# The run --------------------------------------------------------------------------------------------------------------


@functools.cache
def zeros(count: int) -> Tensor:
    """Numbers, made once."""
    import torch

    return torch.zeros(count)


def bandwidth(threads: int) -> float:
    """Bytes per second of a plain read of memory that no cache holds; best of three."""
    import torch

    torch.set_num_threads(threads)
    numbers, times = zeros(1 << 27), []
    for _ in range(3):
        start = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - start)
    return numbers.numel() * numbers.element_size() / min(times)


def read_ids(paths: list[str], folder: Path) -> list[int]:
    """Tokens of the texts, enough for all prompts."""
    from hanmo.data.readers import read_documents
    from hanmo.data.stdlib import stdlib_paths
    from hanmo.inference.loading import load_tokenizer

    ids: list[int] = []
    tokenizer = load_tokenizer(folder / "f16.gguf")
    for document in read_documents(paths or stdlib_paths()):
        ids += tokenizer.encode(document.text[:200_000])
        if len(ids) > 200_000:
            break
    return ids


class Pieces:
    """Prompts that were not used before."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.place = ids, 0

    def take(self, count: int, length: int) -> list[list[int]]:
        pieces = []
        for _ in range(count):
            if self.place + length > len(self.ids):
                self.place = self.place % 97 + 1  # from the beginning again, cut elsewhere
            pieces.append(self.ids[self.place : self.place + length])
            self.place += length
        return pieces


def measure_memory(names: list[str], files: Path, threads: int, pieces: Pieces, count: int) -> None:
    """The table of memory; an engine that does not start is taken from the names."""
    print(f"\n{'memory, MB':22}{'weights':>9}{'cache':>7}{'peak':>8}{'before':>8}{'ratio':>7}{'load':>9}")
    prompt = pieces.take(1, LONG)
    for name in [*names]:
        try:
            worker = start_worker(name, files, threads)
            worker.ask("write", prompts=prompt, count=count)
            memory, about = worker.ask("memory"), worker.about
            worker.close()
        except RuntimeError as error:
            names.remove(name)
            print(f"{name:22} is left out: {error}")
            continue
        cache = about["cache"] * (LONG + count)
        ratio = (memory["peak"] - memory["before"]) / (about["weights"] + cache)
        mark = f"  > {MEMORY}" if name.startswith("Hanmo") and ratio > MEMORY else ""
        sizes = (about["weights"], cache, memory["peak"], memory["before"])
        numbers = "".join(f"{size / 1e6:{width}.0f}" for size, width in zip(sizes, (9, 7, 8, 8), strict=True))
        print(f"{name:22}{numbers}{ratio:7.2f}{about['seconds']:7.2f} s{mark}  {about['version']}", flush=True)


def measure_quality(workers: dict[str, Worker], windows: Prompts) -> dict[str, dict[str, float]]:
    """Divergence from transformers in float32, by engine."""
    if "transformers" not in workers:
        return {}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        reference = str(Path(folder) / "reference.npy")
        for name in sorted(workers, key=lambda name: name != "transformers"):
            results[name] = workers[name].ask("divergence", windows=windows, reference=reference)
    return results


def measure_speed(
    workers: dict[str, Worker], rounds: int, pieces: Pieces, count: int, threads: int
) -> dict[str, dict[str, list[float]]]:
    """Tokens per second by measurement and engine, one number a round; and bytes per second of plain reads just before
    the decoding."""
    forms = {"decode": (1, PROMPT, count), "prefill": (1, LONG, 1), "8 texts": (TEXTS, PROMPT, count)}
    speeds: dict[str, dict[str, list[float]]] = {what: {name: [] for name in workers} for what in (*forms, "reads")}
    names = list(workers)
    for number in range(-1, rounds):  # the first is not counted
        for what, (texts, length, written) in forms.items():
            prompts = pieces.take(texts, length)
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                time.sleep(0.3)  # until the threads of the one before sleep
                rate = bandwidth(threads) if what == "decode" else 0.0
                result = workers[name].ask("write", prompts=prompts, count=written)
                if number >= 0:
                    speeds[what][name].append(length / result["first"] if what == "prefill" else result["speed"])
                    if what == "decode":
                        speeds["reads"][name].append(rate)
    return speeds


def print_table(
    workers: dict[str, Worker],
    speeds: dict[str, dict[str, list[float]]],
    quality: dict[str, dict[str, float]],
) -> None:
    """Medians by engine."""
    head = f"{'decode':>8}{'prefill':>9}{'first':>9}{'8 texts':>9}{'GB/s':>7}{'share':>7}"
    print(f"\n{'tok/s':22}{head}{'KL':>9}{'same':>8}")
    for name, worker in workers.items():
        decode, prefill, eight = (statistics.median(speeds[what][name]) for what in ("decode", "prefill", "8 texts"))
        weights, pairs = worker.about["weights"], zip(speeds["decode"][name], speeds["reads"][name], strict=True)
        share = statistics.median(speed * weights / rate for speed, rate in pairs)
        line = f"{name:22}{decode:8.1f}{prefill:9,.0f}{LONG / prefill:7.3f} s{eight:9.1f}"
        line += f"{decode * weights / 1e9:7.1f}{share:7.0%}"
        if name in quality:
            line += f"{quality[name]['kl']:9.4f}{quality[name]['same']:8.1%}"
        print(line)


def print_bars(
    bars: Sequence[tuple[str, str, str, float]], speeds: dict[str, dict[str, list[float]]], large: bool
) -> None:
    """What was asked for, and what was reached: medians of the ratios within rounds."""
    print()
    for ours, peer, what, least in bars:
        if ours in speeds[what] and peer in speeds[what]:
            ratios = [a / b for a, b in zip(speeds[what][ours], speeds[what][peer], strict=True)]
            ratio = statistics.median(ratios)
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            verdict = "reached" if ratio >= least else "MISSED"
            print(f"{what:8} {ours} over {peer}: {ratio:.2f} ({spread}); asked {least}: {verdict}")
    for name in speeds["prefill"]:
        if name in ("Hanmo int8", "Hanmo Q4_1") and not large:
            first = LONG / statistics.median(speeds["prefill"][name])
            verdict = "reached" if first <= FIRST_TOKEN else "MISSED"
            print(f"first token of {LONG}, {name}: {first:.3f} s; asked {FIRST_TOKEN}: {verdict}")


def main() -> None:
    """Make the files, measure, print; with --serve, be one of the engines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help="files or folders; default: Python's standard library")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="*", default=[], help="those whose names contain one of these")
    parser.add_argument("--quick", action="store_true", help="one round with short answers: only whether all runs")
    parser.add_argument("--large", action="store_true", help="a random network of 0.5 B parameters")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hanmo-decode")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(given.serve, given.folder, given.threads)
    import torch

    from hanmo.cli.doctor import processor

    files = (given.folder / ("large" if given.large else MODEL)).absolute()
    (make_large if given.large else make_files)(files)
    missing = {word for word, package in NEEDS.items() if importlib.util.find_spec(package) is None}
    names = [name for name in (LARGE_ENGINES if given.large else ENGINES) if name.split()[0] not in missing]
    if given.engines:
        names = [name for name in names if any(word in name for word in given.engines)]
    rounds, count = (1, 24) if given.quick else (given.rounds, ANSWER)
    print(f"{processor()}; {given.threads} threads; plain reads {bandwidth(given.threads) / 1e9:.1f} GB/s")
    print(f"Python {platform.python_version()}, torch {torch.__version__}; {'random 0.5 B' if given.large else MODEL}")
    print(f"{PROMPT} tokens in, {count} out; prefill {LONG}; {TEXTS} texts; {rounds} rounds", flush=True)
    if missing:
        print(f"not installed: {', '.join(sorted(missing))}")
    pieces = Pieces(read_ids(given.texts, files))
    windows = pieces.take(1 if given.quick else WINDOWS, WINDOW)
    measure_memory(names, files, given.threads, pieces, count)
    workers = {name: start_worker(name, files, given.threads) for name in names}
    quality = measure_quality(workers, windows)
    speeds = measure_speed(workers, rounds, pieces, count, given.threads)
    print_table(workers, speeds, quality)
    reads = sorted(rate / 1e9 for rates in speeds["reads"].values() for rate in rates)
    print(f"plain reads during the run: {reads[0]:.1f} to {reads[-1]:.1f} GB/s, median {statistics.median(reads):.1f}")
    print_bars(LARGE_BARS if given.large else BARS, speeds, given.large)
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    main()
