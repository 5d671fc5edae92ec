"""Encoding speed: Hanmo against the `tokenizers` library, on the same text, in the same run, with identical ids.

    python benchmarks/tokenization.py [--json]

Method: two byte-level BPEs of 8,192 ids are trained on part of the text: Hanmo's own, and one with the pre-tokenizer
of GPT-2, as most imported models have. The documents (files cut at 8,000 characters) are encoded by both libraries in
turn, so that a change in the machine's load meets both alike, and the medians of the repetitions are compared.
`tokenizers` runs `encode_batch` with its own thread pool, Hanmo `encode_documents` with as many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sysconfig
import time
from pathlib import Path

import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hanmo.text.tokenizer import Tokenizer
from hanmo.text.training import train_bpe

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
DOCUMENT = 8_000  # characters
THREADS = os.cpu_count() or 1
os.environ.setdefault("RAYON_NUM_THREADS", str(THREADS))  # read when `tokenizers` first encodes
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def read(paths: list[Path], limit: int) -> list[str]:
    """Documents from files, up to `limit` characters in all."""
    documents: list[str] = []
    size = 0
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="ignore")
        for at in range(0, len(text), DOCUMENT):
            documents.append(text[at : at + DOCUMENT])
            size += len(documents[-1])
            if size >= limit:
                return documents
    return documents


def corpora() -> dict[str, list[str]]:
    """Source code of the standard library, and the shared Chinese and English books where they are present."""
    found = {"code": read(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")), 6_000_000)}
    for name, folder in (("en", "gutenberg-nltk"), ("zh", "zh-novels")):
        paths = sorted((SHARED / folder).glob("*.txt"))
        if paths:
            found[name] = read(paths, 6_000_000 if name == "en" else 3_000_000)
    return found


def gpt2_style(texts: list[str], vocab_size: int) -> Tokenizer:
    """A tokenizer as other projects train them, read by Hanmo."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    return Tokenizer.from_json(learner.to_str())


def compare(tokenizer: Tokenizer, documents: list[str], repetitions: int) -> dict[str, float | bool]:
    """Median MB/s of both, alternating, and whether the ids are equal."""
    reference = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    theirs: list[float] = []
    ours: list[float] = []
    identical = True
    for _ in range(repetitions):
        start = time.perf_counter()
        expected = reference.encode_batch(documents, add_special_tokens=False)
        theirs.append(time.perf_counter() - start)
        start = time.perf_counter()
        found = tokenizer.encode_documents(documents, threads=THREADS)
        ours.append(time.perf_counter() - start)
        identical &= all(a.ids == b.tolist() for a, b in zip(expected, found, strict=True))
        del expected, found
    slow, fast = statistics.median(theirs), statistics.median(ours)
    return {
        "megabytes": round(megabytes, 2),
        "tokenizers_mb_per_s": round(megabytes / slow, 2),
        "hanmo_mb_per_s": round(megabytes / fast, 2),
        "ratio": round(slow / fast, 2),
        "identical_ids": identical,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    texts = corpora()
    sample = [text for documents in texts.values() for text in documents[::4]]
    kinds = {"own": train_bpe(sample, options.vocab_size), "gpt2": gpt2_style(sample, options.vocab_size)}
    for name, tokenizer in kinds.items():
        tokenizer.encode("warm")
        assert not tokenizer.fast_reason, (name, tokenizer.fast_reason)
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    result = {
        "machine": f"{processor}, {THREADS} threads, {platform.system()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "versions": {
            "python": platform.python_version(),
            "tokenizers": tokenizers.__version__,
            "tiktoken": tiktoken.__version__,
        },
        "vocab_size": options.vocab_size,
        "repetitions": options.repetitions,
        "results": {
            f"{kind} {name}": compare(tokenizer, documents, options.repetitions)
            for kind, tokenizer in kinds.items()
            for name, documents in texts.items()
        },
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print("\n".join(f"{key}: {value}" for key, value in result.items() if key != "results"))
    for name, row in result["results"].items():
        print(f"{name:<10}" + "  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
