"""Classifiers and CRF taggers on real data, Chinese and English, beside the majority baseline.

    python benchmarks/classical.py DATA [spam csl cold pos-en pos-zh ner-en ner-zh]

DATA is the folder with the data sets (sms-spam, csl, cold-zh, uner-en, uner-zh, ud-en-ewt, ud-zh-gsd). Classifiers are
scored by accuracy, macro-F1 and expected calibration error (15 bins, of the label given) before and after calibration,
the last beside what a perfectly calibrated classifier of the same confidences would get on as many texts (mean of 200
draws); taggers by token accuracy, or by the F1 of whole entities. Only training parts are trained on. The messages of
sms-spam have no split of their own: every fifth one, in the file's order, is kept for scoring. The training part of
ud-zh-gsd is an older release, in traditional script and with other conventions than the dev part: its accuracy is low
for that reason, whatever the tagger.
"""

from __future__ import annotations

import csv
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from hanmo.models.calibration import Calibration, expected_calibration_error
from hanmo.models.crf_tagger import CRFTagger
from hanmo.models.linear import LinearClassifier

Labelled = tuple[list[str], list[str]]
Tagged = tuple[list[list[str]], list[list[str]]]
Span = tuple[int, int, str]

CLASSIFIERS = (
    ("logistic", "words", {}),
    ("logistic", "characters", {}),
    ("logistic", "both", {}),
    ("logistic", "both", {"calibration": "isotonic"}),
    ("svm", "both", {"C": 0.3}),
    ("naive-bayes", "both", {}),
)


def spam(data: Path) -> tuple[Labelled, Labelled]:
    """English text messages, spam or not."""
    rows = [line.split("\t", 1) for line in (data / "sms-spam/sms.tsv").read_text(encoding="utf-8").splitlines()]
    pairs = [(text, label) for label, text in rows]
    train = [pair for index, pair in enumerate(pairs) if index % 5]
    return unzip(train), unzip(pairs[::5])


def csl(data: Path) -> tuple[Labelled, Labelled]:
    """Titles of Chinese papers, 13 subjects."""
    parts = []
    for name in ("train", "dev"):
        lines = (data / f"csl/cls_ctg/{name}.tsv").read_text(encoding="utf-8").splitlines()
        parts.append(unzip([line.split("\t")[1:3] for line in lines]))
    return parts[0], parts[1]


def cold(data: Path) -> tuple[Labelled, Labelled]:
    """Comments from Chinese networks, offensive or not."""
    parts = []
    for name in ("train", "dev"):
        with (data / f"cold-zh/{name}.csv").open(encoding="utf-8-sig", newline="") as stream:
            parts.append(unzip([(row["TEXT"], row["label"]) for row in csv.DictReader(stream) if row["TEXT"].strip()]))
    return parts[0], parts[1]


def unzip(pairs: Sequence[Sequence[str]]) -> Labelled:
    """Texts and labels."""
    return [text for text, _ in pairs], [label for _, label in pairs]


def macro_f1(gold: Sequence[str], found: Sequence[str]) -> float:
    """The mean over labels of F1."""
    right, expected, given = Counter(), Counter(gold), Counter(found)
    for a, b in zip(gold, found, strict=True):
        right[a] += a == b
    return float(np.mean([2 * right[label] / (expected[label] + given[label]) for label in expected]))


def accuracy(gold: Sequence[str], found: Sequence[str]) -> float:
    """The share of equal places."""
    return float(np.mean([a == b for a, b in zip(gold, found, strict=True)]))


def classify(name: str, train: Labelled, dev: Labelled) -> None:
    """Train each classifier, score it on the dev part and print a line."""
    texts, gold = dev
    majority = [Counter(train[1]).most_common(1)[0][0]] * len(gold)
    print(f"\n{name}: {len(train[0]):,} texts to learn from, {len(gold):,} to score, {len(set(gold))} labels")
    print(f"  {'':<38}accuracy macro-F1  ECE raw  calibrated  perfect  features  train s  texts/s")
    print(f"  {'majority label':<38}{accuracy(gold, majority):8.3f}{macro_f1(gold, majority):9.3f}")
    for method, features, options in CLASSIFIERS:
        start = time.perf_counter()
        model = LinearClassifier(method, features, **options).fit(*train)
        trained = time.perf_counter()
        probabilities = model.predict_proba(texts)
        seconds = time.perf_counter() - trained
        raw = Calibration("none", multi_label=False).apply(model.scores(texts))
        found = [model.labels[label] for label in probabilities.argmax(1)]
        errors = []
        for shares in (raw, probabilities):
            right = np.array([model.labels[label] for label in shares.argmax(1)]) == np.array(gold)
            errors.append(expected_calibration_error(shares.max(1), right.astype(float)))
        confidences, draw = probabilities.max(1), np.random.default_rng(0)
        draws = [(draw.random(len(gold)) < confidences).astype(float) for _ in range(200)]
        perfect = float(np.mean([expected_calibration_error(confidences, right) for right in draws]))
        title = " ".join([method, features, *(f"{key}={value}" for key, value in options.items())])
        print(
            f"  {title:<38}{accuracy(gold, found):8.3f}{macro_f1(gold, found):9.3f}"
            f"{errors[0]:9.3f}{errors[1]:12.3f}{perfect:9.3f}"
            f"{len(model.vectorizer.names):10,}{trained - start:9.1f}{len(texts) / seconds:9,.0f}",
            flush=True,
        )


def read_columns(path: Path, column: int) -> Tagged:
    """The words and one column of a CoNLL-U or IOB2 file."""
    sentences, tags = [], []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        rows = [line.split("\t") for line in block.splitlines() if re.match(r"\d+\t", line)]
        if rows:
            sentences.append([row[1] for row in rows])
            tags.append(["O" if row[column].endswith("OTH") else row[column] for row in rows])
    return sentences, tags


def entities(tags: Sequence[str]) -> set[Span]:
    """The spans of an IOB2 sequence: begin, end, kind; an I that continues nothing begins a span."""
    spans: set[Span] = set()
    begin, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        if kind and tag != f"I-{kind}":
            spans.add((begin, place, kind))
            kind = ""
        if tag != "O" and not kind:
            begin, kind = place, tag[2:]
    return spans


def entity_f1(gold: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> float:
    """F1 of entities whose begin, end and kind are all right."""
    pairs = [(entities(a), entities(b)) for a, b in zip(gold, found, strict=True)]
    right = sum(len(a & b) for a, b in pairs)
    return 2 * right / sum(len(a) + len(b) for a, b in pairs)


def tag(name: str, train: Tagged, dev: Tagged, *, spans: bool) -> None:
    """Train a CRF, score it on the dev part and print a line."""
    start = time.perf_counter()
    model = CRFTagger.train(*train)
    trained = time.perf_counter()
    found = model.predict(dev[0])
    seconds = time.perf_counter() - trained
    flat_gold, flat_found = [[tag for sequence in tags for tag in sequence] for tags in (dev[1], found)]
    by_word: dict[str, Counter[str]] = {}
    for word, tag_ in zip((w for s in train[0] for w in s), (t for s in train[1] for t in s), strict=True):
        by_word.setdefault(word, Counter())[tag_] += 1
    common = Counter(t for s in train[1] for t in s).most_common(1)[0][0]
    baseline = [[by_word[w].most_common(1)[0][0] if w in by_word else common for w in s] for s in dev[0]]
    flat_baseline = [tag for sequence in baseline for tag in sequence]
    print(f"\n{name}: {len(train[0]):,} sentences to learn from, {len(dev[0]):,} to score, template {model.template}")
    print(f"  token accuracy      {accuracy(flat_gold, flat_found):.4f}")
    print(f"    each word's commonest tag: {accuracy(flat_gold, flat_baseline):.4f}")
    if spans:
        print(f"  entity F1           {entity_f1(dev[1], found):.4f}")
        print(f"    each word's commonest tag: {entity_f1(dev[1], baseline):.4f}")
    print(f"  features {len(model.attributes):,}, weights {model.weights['values'].size:,}")
    print(f"  trained in {trained - start:.1f} s, {len(flat_gold) / seconds:,.0f} tokens/s", flush=True)


def processor() -> str:
    """The processor's name where the system tells."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def main(arguments: list[str]) -> None:
    """Run the cases named, all without names."""
    data, cases = Path(arguments[0]), arguments[1:]
    packages = ("scikit-learn", "scipy", "numpy", "python-crfsuite", "jieba", "torch")
    print(
        f"{processor()}, {os.cpu_count()} cores; load {os.getloadavg()[0]:.1f} before the start; {time.strftime('%F')}"
    )
    print(f"Python {platform.python_version()}, " + ", ".join(f"{package} {version(package)}" for package in packages))
    for name, load in (("spam", spam), ("csl", csl), ("cold", cold)):
        if not cases or name in cases:
            classify(name, *load(data))
    for name, column, train, dev in (
        ("pos-en", 3, "ud-en-ewt/en_ewt-ud-train.assembled.conllu", "ud-en-ewt/en_ewt-ud-dev.conllu"),
        ("pos-zh", 3, "ud-zh-gsd/zh-ud-train.history-4f2c5f41.conllu", "ud-zh-gsd/zh_gsdsimp-ud-dev.conllu"),
        ("ner-en", 2, "uner-en/en_ewt-ud-train.history-236914d9.iob2", "uner-en/en_ewt-ud-dev.iob2"),
        ("ner-zh", 2, "uner-zh/zh_gsdsimp-ud-train.iob2", "uner-zh/zh_gsdsimp-ud-dev.iob2"),
    ):
        if not cases or name in cases:
            tag(name, read_columns(data / train, column), read_columns(data / dev, column), spans=column == 2)


if __name__ == "__main__":
    main(sys.argv[1:])
