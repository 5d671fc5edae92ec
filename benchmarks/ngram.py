"""Time and memory of the 5-gram model: training, scoring, saving, loading, and its ARPA file beside KenLM.

Method: the text is the source of Python's standard library, which every machine has. Case "words": its first million
words and punctuation marks, one document per line, the 50,000 commonest kept. Case "bpe": all of it, one document per
file, through a byte-level BPE of 8,192 ids trained here on a quarter of the files. One document in ten is held out and
scored. Each case runs in a process of its own that reads nothing but the ids; peak memory is that process's largest
resident set, Python and numpy included. Case "words" also writes an ARPA file, reads it, and scores the held-out text
with KenLM's Python module where that is installed (that module does not train, so there is no training time of KenLM
beside ours). Run: python benchmarks/ngram.py [words|bpe]
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from hanmo.models.arpa import read_arpa, write_arpa
from hanmo.models.ngram import NGramModel

ORDER = 5
WORDS = 1_000_000
WORD_TYPES = 50_000
BPE_SIZE = 8192
BARS = {"words": (20.0, 1.0), "bpe": (60.0, 2.5)}  # seconds of training, GB at the peak


def library_texts() -> list[str]:
    """The sources of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def word_documents(texts: list[str]) -> list[np.ndarray]:
    """Lines of words as ids: 0 ends a line, 1 stands for words that are not among the commonest."""
    lines: list[list[str]] = []
    total = 0
    for line in (line for text in texts for line in text.splitlines() if line.strip()):
        lines.append(re.findall(r"\w+|[^\w\s]", line))
        total += len(lines[-1])
        if total >= WORDS:
            break
    common = Counter(word for words in lines for word in words).most_common(WORD_TYPES - 2)
    ids = {word: index for index, (word, _) in enumerate(common, start=2)}
    return [np.array([*(ids.get(word, 1) for word in words), 0], dtype=np.uint16) for words in lines]


def bpe_documents(texts: list[str]) -> list[np.ndarray]:
    """Files through a byte-level BPE; 0 ends a file."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_SIZE, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts[::4], trainer)
    return [np.array([*item.ids, 0], dtype=np.uint16) for item in tokenizer.encode_batch(texts)]


def peak_gigabytes() -> float:
    """The largest resident set of this process; getrusage alone would count the parent's memory at the fork."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def measure(folder: Path, vocab_size: int) -> dict[str, float]:
    """Train and score; runs in a process of its own."""
    ids, spans = np.load(folder / "ids.npy"), np.load(folder / "spans.npy")
    documents = [ids[begin:end] for begin, end in itertools.pairwise(spans)]
    held_out = np.concatenate(documents[::10])
    train = [document for index, document in enumerate(documents) if index % 10]
    start = time.perf_counter()
    model = NGramModel.train(train, ORDER, vocab_size, bos_id=0, eos_id=0)
    trained = time.perf_counter()
    nats = -model.logprobs(held_out)
    scored = time.perf_counter()
    for document in train[:200]:
        model.next_logprobs(document[:20])
    stepped = time.perf_counter()
    peak = peak_gigabytes()
    model.save(folder / "model.safetensors")
    saved = time.perf_counter()
    NGramModel.load(folder / "model.safetensors")
    loaded = time.perf_counter()
    arpa = measure_arpa(folder, model, held_out) if vocab_size == WORD_TYPES else {}
    return {
        "tokens": model.trained_on["tokens"],
        "documents": model.trained_on["documents"],
        "ngrams": sum(model.describe()["ngrams"]),
        "train_s": trained - start,
        "peak_gb": peak,
        "tables_gb": model.nbytes / 1e9,
        "scored_tokens": held_out.size,
        "score_mtokens_per_min": held_out.size / (scored - trained) * 60 / 1e6,
        "next_logprobs_ms": (stepped - scored) * 1000 / min(200, len(train)),
        "save_s": saved - stepped,
        "load_s": loaded - saved,
        "held_out_perplexity": float(np.exp(nats.mean())),
        **arpa,
    }


def measure_arpa(folder: Path, model: NGramModel, held_out: np.ndarray) -> dict[str, float]:
    """Write and read an ARPA file whose words are the ids, and compare with KenLM on the held-out lines."""
    path = folder / "model.arpa"
    start = time.perf_counter()
    write_arpa(model, path, ["</s>", "<unk>", *map(str, range(2, model.vocab_size))])
    written = time.perf_counter()
    again, _ = read_arpa(path)
    read = time.perf_counter()
    ours = model.logprobs(held_out) / np.log(10)
    result = {
        "arpa_write_s": written - start,
        "arpa_read_s": read - written,
        "arpa_mb": path.stat().st_size / 1e6,
        "arpa_peak_gb": peak_gigabytes(),
        "arpa_largest_log10_difference": float(np.abs(again.logprobs(held_out) / np.log(10) - ours).max()),
    }
    try:
        import kenlm
    except ImportError:
        return result
    lines = [" ".join("<unk>" if i == 1 else str(i) for i in line[:-1]) for line in split_lines(held_out)]
    start = time.perf_counter()
    theirs: Any = kenlm.Model(str(path))
    loaded = time.perf_counter()
    scores = np.array([score[0] for line in lines for score in theirs.full_scores(line)])
    return result | {
        "kenlm_load_arpa_s": loaded - start,
        "kenlm_score_mtokens_per_min": held_out.size / (time.perf_counter() - loaded) * 60 / 1e6,
        "kenlm_perplexity": float(10 ** -scores.mean()),
        "kenlm_largest_log10_difference": float(np.abs(scores - ours).max()),
    }


def split_lines(ids: np.ndarray) -> list[np.ndarray]:
    """The documents of a stream, each with its end."""
    return np.split(ids, np.flatnonzero(ids == 0)[:-1] + 1)


def run(case: str, texts: list[str]) -> None:
    """Prepare the ids of a case, measure it in a new process and print the result against its bar."""
    documents = word_documents(texts) if case == "words" else bpe_documents(texts)
    vocab_size = WORD_TYPES if case == "words" else BPE_SIZE
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "ids.npy", np.concatenate(documents))
        np.save(folder / "spans.npy", np.cumsum([0, *map(len, documents)]))
        command = [sys.executable, __file__, "--measure", name, str(vocab_size)]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    seconds, gigabytes = BARS[case]
    print(f"\n{case}: {ORDER}-gram, vocabulary {vocab_size:,}")
    for key, value in result.items():
        shown = (
            f"{value:.1e}"
            if key.endswith("difference")
            else f"{value:,.3f}"
            if isinstance(value, float)
            else f"{value:,}"
        )
        print(f"  {key:<30} {shown}")
    met = result["train_s"] < seconds and result["peak_gb"] < gigabytes
    print(f"  bar: under {seconds:.0f} s and {gigabytes} GB: {'met' if met else 'MISSED'}")


def processor() -> str:
    """The processor's name where the system tells."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def main(arguments: list[str]) -> None:
    """Measure the cases named, all without names."""
    if arguments[:1] == ["--measure"]:
        print(json.dumps(measure(Path(arguments[1]), int(arguments[2]))))
        return
    print(
        f"{processor()}, {os.cpu_count()} cores; load {os.getloadavg()[0]:.1f} before the start; {time.strftime('%F')}"
    )
    try:
        kenlm = metadata.version("kenlm")
    except metadata.PackageNotFoundError:
        kenlm = "not installed"
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, kenlm {kenlm}"
    print(f"{versions}, {platform.system()} {platform.machine()}")
    texts = library_texts()
    for case in arguments or list(BARS):
        run(case, texts)


if __name__ == "__main__":
    main(sys.argv[1:])
