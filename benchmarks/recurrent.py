"""Word perplexity of the 5-gram Kneser-Ney model and of the small LSTM on a corpus in Penn Treebank format.

    python benchmarks/recurrent.py --corpus path/to/ptb      # reads ptb.train.txt, ptb.valid.txt, ptb.test.txt
    python benchmarks/recurrent.py --books ../shared/data/gutenberg-nltk

Runs ``hanmo pretrain --tokenizer words`` as a user would, without a single setting, and prints hardware, versions,
settings, time and the perplexities. Published on the Penn Treebank (test): 141.2 for the 5-gram Kneser-Ney model
(Mikolov et al. 2011), 114.5 for the small LSTM without dropout (Zaremba et al. 2014).

Where the Penn Treebank is not at hand, ``--books`` makes a corpus of its shape and size from plain texts: lower-cased
words without punctuation, N for numbers, 100 sentences of every 1,300 for validation and 100 for test, thinned to
930,000, 74,000 and 82,000 tokens; the 10,000 most frequent words are kept. Its perplexities are not those of the Penn
Treebank, but the distance between the models can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from hanmo.cli.doctor import processor
from hanmo.training.plan import measure_matrix_rate

BLOCK = 100  # sentences that stay together, so that a text remains a text
SIZES = {"train": 930_000, "valid": 74_000, "test": 82_000}  # tokens, as in the Penn Treebank
WORDS = 9_998  # and <unk> and <eos>: 10,000 entries

Sentences = list[list[str]]


def book_sentences(folder: Path) -> Sentences:
    """The sentences of all texts in a folder."""
    sentences = []
    for path in sorted(folder.glob("*.txt")):
        for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="replace").lower()):
            text = " ".join(paragraph.replace("_", " ").split())
            for sentence in re.split(r"(?<=[.!?;])[\"')]*\s+", text):
                words = re.findall(r"\d[\d,.]*|[^\W\d_]+(?:'[a-z]+)?", sentence)
                if len(words) > 1:
                    sentences.append(["N" if word[0].isdigit() else word for word in words])
    return sentences


def thinned(sentences: Sentences, tokens: int) -> Sentences:
    """Blocks spread evenly over the sentences, about ``tokens`` in all."""
    share = min(1.0, tokens / sum(len(sentence) + 1 for sentence in sentences))
    starts = range(0, len(sentences), BLOCK)
    kept = [start for n, start in enumerate(starts) if int((n + 1) * share) > int(n * share)]
    return [sentence for start in kept for sentence in sentences[start : start + BLOCK]]


def make_corpus(books: Path, folder: Path) -> None:
    """Write ``made.train.txt``, ``made.valid.txt`` and ``made.test.txt``."""
    sentences = book_sentences(books)
    parts: dict[str, Sentences] = {"train": [], "valid": [], "test": []}
    for number, start in enumerate(range(0, len(sentences), BLOCK)):
        name = {5: "valid", 11: "test"}.get(number % 13, "train")
        parts[name] += sentences[start : start + BLOCK]
    parts = {name: thinned(part, SIZES[name]) for name, part in parts.items()}
    counts = Counter(word for sentence in parts["train"] for word in sentence)
    known = {word for word, _ in counts.most_common(WORDS)}
    for name, part in parts.items():
        lines = (" ".join(word if word in known else "<unk>" for word in sentence) for sentence in part)
        (folder / f"made.{name}.txt").write_text("".join(f" {line} \n" for line in lines), encoding="utf-8")


def find_files(corpus: Path) -> dict[str, Path]:
    """The three files of a corpus, by the part of their names that the Penn Treebank files have."""
    files = {}
    for name in SIZES:
        found = sorted(corpus.glob(f"*{name}*.txt"))
        if len(found) != 1:
            raise SystemExit(f"{corpus}: one file *{name}*.txt expected, {len(found)} found")
        files[name] = found[0]
    return files


def measure(files: dict[str, Path], architecture: str, extra: list[str], folder: Path) -> None:
    """Train one model and print how it went."""
    command = [sys.executable, "-m", "hanmo", "pretrain", str(files["train"]), "--tokenizer", "words"]
    command += ["--validation", str(files["valid"]), "--test", str(files["test"]), "--architecture", architecture]
    command += ["--out", str(folder / architecture), "--json", *extra]
    start = time.perf_counter()
    result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    seconds = time.perf_counter() - start
    print(f"\n{architecture} {' '.join(extra)}".rstrip())
    settings = json.loads((folder / architecture / "settings.json").read_text(encoding="utf-8"))
    print("  settings: " + ", ".join(f"{name} {settings['settings'][name]}" for name in settings["computed"]))
    for row in result["words"]:
        low, high = row["interval"]
        print(f"  {row['split']:<11} word perplexity {row['perplexity']:7.2f}  (95% CI {low:.2f} - {high:.2f})")
    if "tokens_per_second" in result:
        print(f"  {result['tokens_per_second']:,.0f} tokens/s, {result['steps']:,} steps, {result['seconds']:.0f} s")
    print(f"  {seconds:.1f} s from the command line to the result", flush=True)


def main() -> None:
    """Make the corpus where needed, and measure both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--corpus", help="folder with *train*.txt, *valid*.txt and *test*.txt")
    texts.add_argument("--books", help="make a corpus from the texts in this folder")
    parser.add_argument("extra", nargs="*", help="further flags for the LSTM, after --")
    given = parser.parse_args()
    rate = measure_matrix_rate(torch.device("cpu")) / 1e9
    print(f"{processor()}; {torch.get_num_threads()} threads; {rate:.0f} GFLOP/s in float32 products; "
          f"load {os.getloadavg()[0]:.1f} before the start; {time.strftime('%F')}")  # fmt: skip
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.books:
            make_corpus(Path(given.books), folder)
        files = find_files(folder if given.books else Path(given.corpus))
        print("corpus: " + (f"made from {Path(given.books).name}" if given.books else Path(given.corpus).name))
        for split, path in files.items():
            lines = path.read_text(encoding="utf-8").splitlines()
            print(f"  {split:<6} {len(lines):>7,} lines, {sum(len(line.split()) + 1 for line in lines):>9,} tokens")
        measure(files, "ngram", [], folder)
        measure(files, "lstm", given.extra, folder)


if __name__ == "__main__":
    main()
