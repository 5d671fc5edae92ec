"""Word vectors: training time and quality of every method on a million words of English and of Chinese.

    python benchmarks/vectors.py [en|zh|texts]

Method: English is the articles of gensim's Wikipedia excerpt and enough of Gutenberg's books to make a million words,
Chinese a million words of four classical novels; both are cut into words once, which is timed apart. Every method
trains with its defaults (100 dimensions, words that occur five times or more) and is scored by analogies (accuracy
among questions whose words are all known; their number) and similarity judgements (Spearman with a 95 % bootstrap
interval, pairs covered). The corpora are small and old-fashioned: the scores compare the methods, they say little about
the world. Case "texts" finds the paragraph that a question was asked about among all paragraphs (SQuAD and DRCD,
vectors trained on those paragraphs): it compares a plain mean of word vectors with the frequency-weighted one, which is
what `text_vector` uses.
"""

from __future__ import annotations

import bz2
import json
import os
import platform
import sys
import time
from pathlib import Path

import gensim
import numpy as np
import scipy
from gensim.corpora.wikicorpus import extract_pages, filter_wiki

from hanmo.cli.doctor import processor
from hanmo.evaluation.vectors import evaluate_analogies, evaluate_similarity
from hanmo.models.embeddings import METHODS, WordVectors, words_of

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WIKI = SHARED / "gensim-testdata" / "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
WORDS = 1_000_000
GLOVE_BAR = 60.0  # seconds for a million words
QUESTIONS = 1500
SETS = {
    "en": (
        [SHARED / "google-analogy" / "questions-words.txt"],
        [SHARED / "gensim-testdata" / "wordsim353.tsv", SHARED / "gensim-testdata" / "simlex999.txt"],
    ),
    "zh": (
        [SHARED / "cwe-zh-wordsim" / "analogy.txt"],
        [SHARED / "cwe-zh-wordsim" / "240.txt", SHARED / "cwe-zh-wordsim" / "297.txt"],
    ),
}


def texts(language: str) -> list[str]:
    """The documents of a language, in the order in which they are taken."""
    books = sorted((SHARED / ("gutenberg-nltk" if language == "en" else "zh-novels")).glob("*.txt"))
    found = [path.read_text(encoding="utf-8", errors="ignore") for path in books]
    if language == "zh":
        return found
    with bz2.open(WIKI) as stream:
        articles = [filter_wiki(text) for _, text, _ in extract_pages(stream, ("0",))]
    return [text for text in articles if len(text) > 500] + found  # shorter ones are redirects


def a_million_words(language: str) -> list[list[str]]:
    """Documents as words, a million in all."""
    documents: list[list[str]] = []
    left = WORDS
    for text in texts(language):
        words = words_of(text)[:left]
        documents.append(words)
        left -= len(words)
        if not left:
            break
    return documents


def compare_methods(language: str) -> None:
    """Train and score every method."""
    start = time.perf_counter()
    documents = a_million_words(language)
    total = sum(map(len, documents))
    how = f"{total:,} words in {len(documents)} documents"
    print(f"\n{language}: {how}, read and cut in {time.perf_counter() - start:.1f} s")
    for method in METHODS:
        load = os.getloadavg()[0]
        start = time.perf_counter()
        vectors = WordVectors.train(documents, method, seed=1)
        seconds = time.perf_counter() - start
        epochs = vectors.training["epochs"]
        speed = f"{total / seconds:,.0f} words/s, {total * epochs / seconds:,.0f} counting every epoch"
        print(f"{method}: {len(vectors):,} words, {epochs} epochs, {seconds:.1f} s ({speed}); load {load:.1f} before")
        if method == "glove":
            print(f"    {vectors.training['cooccurrences']:,} entries; mean loss from ", end="")
            verdict = "met" if seconds < GLOVE_BAR else "MISSED"
            print(f"{vectors.training['first_loss']:.4f} to {vectors.training['last_loss']:.4f}; ", end="")
            print(f"bar {GLOVE_BAR:.0f} s: {verdict} ({seconds / GLOVE_BAR:.2f} of it)")
        show_scores(vectors, language)


def show_scores(vectors: WordVectors, language: str) -> None:
    """Analogies and similarity of one model."""
    analogies, similarities = SETS[language]
    for path in analogies:
        report = evaluate_analogies(vectors, path)
        total = report.total
        print(f"    {path.name}: {total.right} of {total.known} known analogies = {total.accuracy or 0:.1%}", end="")
        print(f" ({total.questions} questions, coverage {total.coverage:.1%}, of all {total.accuracy_of_all:.1%})")
    for path in similarities:
        found = evaluate_similarity(vectors, path)
        print(f"    {path.name}: Spearman {found.spearman or 0:.3f} [{found.interval}], ", end="")
        print(f"{found.covered} of {found.pairs} pairs = {found.coverage:.1%}, {found.unseen} by n-grams alone")


def questions(language: str) -> tuple[list[str], list[int], list[str]]:
    """Questions, the number of each one's paragraph, and the paragraphs."""
    numbers: dict[str, int] = {}
    asked = []
    if language == "en":
        lines = (SHARED / "squad-cs224n-val" / "squad_val.jsonl").read_text(encoding="utf-8").splitlines()
        pairs = [(record["question"], record["context"]) for record in map(json.loads, lines)]
    else:
        articles = json.loads((SHARED / "drcd" / "DRCD_dev.json").read_text(encoding="utf-8"))["data"]
        parts = [part for article in articles for part in article["paragraphs"]]
        pairs = [(item["question"], part["context"]) for part in parts for item in part["qas"]]
    for question, context in pairs:
        numbers.setdefault(context, len(numbers))
        asked.append((question, numbers[context]))
    first = asked[:QUESTIONS]
    return [question for question, _ in first], [number for _, number in first], list(numbers)


def retrieval(queries_QD: np.ndarray, texts_BD: np.ndarray, gold: list[int]) -> tuple[float, float]:
    """Share of queries whose text comes first, and the mean reciprocal rank."""
    units = [part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-9) for part in (queries_QD, texts_BD)]
    scores = units[0] @ units[1].T
    ranks = 1 + (scores > scores[np.arange(len(gold)), gold][:, None]).sum(axis=1)
    return float((ranks == 1).mean()), float((1 / ranks).mean())


def compare_text_vectors() -> None:
    """A plain mean against weights from frequencies, and the latter without its first principal component."""
    print("\ntexts: the paragraph of a question, share found first and mean reciprocal rank")
    for language, name in (("en", "SQuAD"), ("zh", "DRCD")):
        asked, gold, paragraphs = questions(language)
        cut, asked_cut = ([words_of(text) for text in part] for part in (paragraphs, asked))
        vectors = WordVectors.train(cut, "skipgram", epochs=20, min_count=2, seed=1)
        weighted = vectors.text_vectors(asked_cut), vectors.text_vectors(cut)
        component = np.linalg.svd(weighted[1], full_matrices=False)[2][0]
        removed = [part - np.outer(part @ component, component) for part in weighted]
        vectors.counts = None
        plain = vectors.text_vectors(asked_cut), vectors.text_vectors(cut)
        print(f"{name}: {len(asked)} questions, {len(paragraphs)} paragraphs")
        cases = {"plain mean": plain, "a/(a+p) weights": weighted, "weights, first component removed": removed}
        for label, (queries, targets) in cases.items():
            found, reciprocal = retrieval(queries, targets, gold)
            print(f"    {label}: {found:.1%}, {reciprocal:.3f}")


def main(arguments: list[str]) -> None:
    """Run the cases."""
    os.environ["HANMO_QUIET"] = "1"
    print(
        f"{processor()}, {os.cpu_count()} cores; load {os.getloadavg()[0]:.1f} before the start; {time.strftime('%F')}"
    )
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}"
    print(f"{versions}, gensim {gensim.__version__}, {platform.system()} {platform.machine()}")
    for case in arguments or ["en", "zh", "texts"]:
        if case == "texts":
            compare_text_vectors()
        else:
            compare_methods(case)


if __name__ == "__main__":
    main(sys.argv[1:])
