"""Speed of sentence vectors on a CPU: Hanmo beside its peers, same network, same sentences, same machine, same run.

    python benchmarks/encode.py [--rounds 3] [--sentences 1500] [--peers PYTHON] [TEXTS...]

The network is all-MiniLM-L6-v2. Every engine lives in a process of its own; one computes at a time, each round begins
with another. A round encodes all sentences, from text to vectors, tokenization included. Printed are medians over the
rounds, ratios within rounds, and how near each vector is to that of sentence-transformers in float32 (or of Hanmo in
float32, if that is missing).

    sentence-transformers   as its documentation says: encode(sentences), batches of 32
    onnxruntime fp32, int8  exported by torch; int8 by onnxruntime's own dynamic quantisation; sentences sorted by
                            length, batches of 32, tokenised by `tokenizers`

Peers may be installed elsewhere: `python -m venv PEERS && PEERS/bin/pip install torch sentence-transformers onnxruntime
onnx onnxscript`, then `--peers PEERS/bin/python`. The default texts are the docstrings of Python's standard library.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from worker import Answer, Worker, answer_commands

MODEL = "all-minilm-l6-v2"
BATCH, LONGEST = 32, 256  # sentences; tokens
REFERENCE = "sentence-transformers"
OURS = ("Hanmo fp32", "Hanmo fp16", "Hanmo int8")
PEERS = (REFERENCE, "onnxruntime fp32", "onnxruntime int8")
SPEED, RATIO, MEAN, WORST = 900, 2.0, 0.995, 0.98  # asked of int8: sentences/s, times onnxruntime int8, cosines

Floats = NDArray[np.float32]
Encode = Callable[[Sequence[str]], Floats]


# The engines: each gives its version and the function that encodes ----------------------------------------------------


def hanmo_engine(precision: str, folder: Path, threads: int) -> tuple[str, Encode]:
    """Through the public interface."""
    import torch

    import hanmo

    torch.set_num_threads(threads)
    model: Any = hanmo.load(folder, precision=precision)
    return f"hanmo {hanmo.__version__}: {model.describe()}", model.embed


def sentence_transformers_engine(folder: Path, threads: int) -> tuple[str, Encode]:
    """In float32."""
    import sentence_transformers
    import torch

    torch.set_num_threads(threads)
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    return (
        f"sentence-transformers {sentence_transformers.__version__}, torch {torch.__version__}",
        lambda texts: np.asarray(model.encode(list(texts), batch_size=BATCH, show_progress_bar=False)),
    )


def export_onnx(folder: Path, target: Path) -> None:
    """The network as an ONNX file in float32 and, beside it, in 8 bits."""
    import torch
    from onnxruntime.quantization import quantize_dynamic
    from transformers import AutoModel

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.model(input_ids, attention_mask, token_type_ids).last_hidden_state

    names = ["input_ids", "attention_mask", "token_type_ids"]
    example = tuple(torch.ones(2, 9, dtype=torch.int64) for _ in names)
    axes = {name: {0: "texts", 1: "tokens"} for name in names}
    torch.onnx.export(
        States(), example, target, input_names=names, output_names=["states"], dynamic_axes=axes, dynamo=False
    )
    quantize_dynamic(target, target.with_name("int8.onnx"))


def onnxruntime_engine(precision: str, folder: Path, threads: int) -> tuple[str, Encode]:
    """Sorted by length, padded to the longest of a batch."""
    import onnxruntime
    from tokenizers import Tokenizer

    scratch = tempfile.mkdtemp()
    export_onnx(folder, Path(scratch, "fp32.onnx"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(Path(scratch, f"{precision}.onnx"), options, ["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.no_padding()

    def encode(texts: Sequence[str]) -> Floats:
        ids = [text.ids for text in tokenizer.encode_batch_fast(list(texts))]
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        vectors = np.zeros((len(texts), 384), dtype=np.float32)
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            ids_BT = np.zeros((len(places), len(ids[places[-1]])), dtype=np.int64)
            for row, place in enumerate(places):
                ids_BT[row, : len(ids[place])] = ids[place]
            mask_BT = (ids_BT != 0).astype(np.int64)
            given = {"input_ids": ids_BT, "attention_mask": mask_BT, "token_type_ids": np.zeros_like(ids_BT)}
            states_BTD = session.run(None, given)[0]
            sums_BD = (states_BTD * mask_BT[..., None]).sum(1, dtype=np.float32)
            vectors[places] = sums_BD / np.linalg.norm(sums_BD, axis=1, keepdims=True)
        return vectors

    return f"onnxruntime {onnxruntime.__version__}", encode


def start(name: str, folder: Path, threads: int) -> tuple[str, Encode]:
    """One of the engines."""
    package, _, precision = name.partition(" ")
    if package == "Hanmo":
        return hanmo_engine(precision, folder, threads)
    if package == "onnxruntime":
        return onnxruntime_engine(precision, folder, threads)
    return sentence_transformers_engine(folder, threads)


def serve(name: str, folder: Path, threads: int) -> None:
    """Be an engine: encode the sentences of a file, keep the vectors in another."""

    def begin() -> tuple[Answer, Callable[[Answer], Answer]]:
        version, encode = start(name, folder, threads)

        def follow(given: Answer) -> Answer:
            texts = json.loads(Path(given["texts"]).read_text(encoding="utf-8"))
            began = time.perf_counter()
            vectors = encode(texts)
            seconds = time.perf_counter() - began
            np.save(given["vectors"], vectors)
            return {"seconds": seconds}

        return {"version": version}, follow

    answer_commands(begin)


# The run --------------------------------------------------------------------------------------------------------------


def read_sentences(paths: Sequence[str], count: int) -> list[str]:
    """Sentences of all the texts, evenly taken: 8 words or more, none twice."""
    from hanmo.data.readers import read_documents
    from hanmo.data.stdlib import stdlib_paths

    def docstrings(source: str) -> str:
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
        return "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))

    found: dict[str, None] = {}
    for document in read_documents(paths or stdlib_paths()):
        text = document.text if paths else docstrings(document.text)
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", " ".join(paragraph.split())):
                if len(sentence.split()) >= 8:
                    found[sentence[:2000]] = None
    sentences = list(found)
    if len(sentences) <= count:
        return sentences
    return [sentences[place * len(sentences) // count] for place in range(count)]


def describe_lengths(folder: Path, sentences: Sequence[str]) -> str:
    """How many tokens the sentences have."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lengths = sorted(len(text.ids) for text in tokenizer.encode_batch(list(sentences)))
    mean, half, most = statistics.mean(lengths), statistics.median(lengths), lengths[-1]
    return f"{len(lengths)} sentences of {mean:.0f} tokens (median {half:.0f}, at most {most})"


def installed(python: str, name: str) -> bool:
    """Whether an interpreter has an engine's package."""
    package = {"Hanmo": "hanmo", "onnxruntime": "onnxruntime, onnx, transformers"}.get(name.split()[0], name)
    command = [python, "-c", f"import {package.replace('-', '_')}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def measure(workers: dict[str, Worker], texts: Path, rounds: int, count: int) -> dict[str, list[float]]:
    """Sentences per second by engine, one number a round (the first is not counted); vectors lie beside ``texts``."""
    speeds: dict[str, list[float]] = {name: [] for name in workers}
    names = list(workers)
    for number in range(-1, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            time.sleep(0.3)  # until the threads of the one before sleep
            answer = workers[name].ask("encode", texts=str(texts), vectors=str(texts.with_name(f"{name}.npy")))
            if number >= 0:
                speeds[name].append(count / answer["seconds"])
    return speeds


def report(workers: dict[str, Worker], speeds: dict[str, list[float]], folder: Path) -> None:
    """The table, and what was asked for."""
    reference = np.load(folder / f"{REFERENCE if REFERENCE in workers else OURS[0]}.npy")
    print(f"\n{'':24}{'sentences/s':>12}{'mean cosine':>13}{'worst':>9}")
    nearness = {}
    for name, worker in workers.items():
        cosines = (np.load(folder / f"{name}.npy") * reference).sum(1)
        nearness[name] = float(cosines.mean()), float(cosines.min())
        numbers = f"{statistics.median(speeds[name]):12,.0f}{nearness[name][0]:13.5f}{nearness[name][1]:9.5f}"
        print(f"{name:24}{numbers}  {worker.about['version']}")
    print()
    ours, peer = "Hanmo int8", "onnxruntime int8"
    asked = [("sentences/s", statistics.median(speeds[ours]), SPEED)]
    if peer in speeds:
        ratios = [a / b for a, b in zip(speeds[ours], speeds[peer], strict=True)]
        asked.append((f"over {peer}", statistics.median(ratios), RATIO))
    asked += [("mean cosine", nearness[ours][0], MEAN), ("worst cosine", nearness[ours][1], WORST)]
    for what, value, least in asked:
        print(f"{ours}, {what}: {value:,.4g}; asked {least}: {'reached' if value >= least else 'MISSED'}")


def main() -> None:
    """Measure and print; with --serve, be one of the engines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help="files or folders; default: docstrings of Python's standard library")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=1500)
    parser.add_argument("--peers", default=sys.executable, help="a Python that has the peers")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(given.serve, given.folder, given.threads)

    from hanmo.cli.doctor import processor
    from hanmo.inference.loading import find

    folder, sentences = find(MODEL), read_sentences(given.texts, given.sentences)
    print(f"{processor()}; {given.threads} threads; Python {platform.python_version()}; {MODEL}")
    print(f"{describe_lengths(folder, sentences)}; {given.rounds} rounds", flush=True)
    workers = {}
    for name in (*OURS, *PEERS):
        python = sys.executable if name in OURS else given.peers
        if not installed(python, name):
            print(f"not installed: {name}")
            continue
        command = [python, __file__, "--serve", name, "--folder", folder, "--threads", str(given.threads)]
        workers[name] = Worker(command, given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        texts = Path(scratch, "texts.json")
        texts.write_text(json.dumps(sentences), encoding="utf-8")
        speeds = measure(workers, texts, given.rounds, len(sentences))
        report(workers, speeds, Path(scratch))
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    main()
