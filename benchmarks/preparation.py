"""Data preparation as a whole (read, clean, de-duplicate, split, tokenise to shards) against `encode_batch` alone.

    python benchmarks/preparation.py

Method: the sources of the standard library (about 30 MB) and, where ../shared/data is present, Chinese and English
books are prepared with a trained tokenizer of 8,192 ids; in turn with it, the `tokenizers` library encodes the same
documents with `encode_batch` and writes nothing. Medians of three. The bar: 0.7 of twice `encode_batch`.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import tokenizers

from hanmo.cli.doctor import processor
from hanmo.data.prepare import prepare
from hanmo.data.settings import DataSettings
from hanmo.data.stdlib import stdlib_paths
from hanmo.text.training import train_bpe

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REPETITIONS = 3
BAR = 2 * 0.7


def main() -> None:
    """Measure each corpus and print the table."""
    os.environ["HANMO_QUIET"] = "1"
    print(f"{processor()}, {os.cpu_count()} cores; load {os.getloadavg()[0]:.1f} before the start")
    print(f"Python {platform.python_version()}, tokenizers {tokenizers.__version__}")
    corpora = {"code": stdlib_paths(), "en": [str(SHARED / "gutenberg-nltk")], "zh": [str(SHARED / "zh-novels")]}
    for name, paths in corpora.items():
        if name != "code" and not SHARED.is_dir():
            continue
        measure(name, paths)


def measure(name: str, paths: list[str]) -> None:
    """One corpus: medians, alternating."""
    settings = DataSettings(skip_bad=True)
    with tempfile.TemporaryDirectory() as folder:
        corpus = prepare(paths, Path(folder) / "first", settings)
        texts = [text for split in ("train", "validation", "test") for text in corpus.documents(split)]
        size = sum(len(text.encode()) for text in texts) / 1e6
        tokenizer = train_bpe(texts, 8192)
        reference = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        tokenizer.encode_documents(texts[:2])
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            prepare(paths, Path(folder) / "data", settings).tokenize(tokenizer)
            ours.append(time.perf_counter() - start)
            shutil.rmtree(Path(folder) / "data")
            start = time.perf_counter()
            reference.encode_batch(texts, add_special_tokens=False)
            theirs.append(time.perf_counter() - start)
    fast, slow = size / statistics.median(ours), size / statistics.median(theirs)
    print(
        f"{name:<5} {size:6.1f} MB  preparation {fast:5.1f} MB/s  encode_batch {slow:5.1f} MB/s  "
        f"ratio {fast / slow:4.1f}  bar {BAR:.1f}: {'met' if fast / slow >= BAR else 'missed'}"
    )


if __name__ == "__main__":
    main()
