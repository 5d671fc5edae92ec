"""A tagger of hand-made features: the linear-chain CRF of Lafferty et al. (2001) over the templates of crf_features.

python-crfsuite (L-BFGS; OWL-QN with L1) does the training. Its own model file is read by C++ code that trusts what it
reads, so a model from elsewhere could do anything: Hanmo takes the weights out once, right after training, and keeps
them as safetensors and JSON. Predicting needs neither python-crfsuite nor that file: emissions are sums of weights, and
the paths and marginals come from the same layer that neural taggers use (``models/crf.py``), in float64.

Letters in names: B sentences, T tokens, L labels, A features with a weight, W weights.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from hanmo.errors import DataError, ModelError, UsageError, missing_package, nearest
from hanmo.folder import atomic_folder, fsync_path, read_json, verify, write_json
from hanmo.language import pick
from hanmo.models.crf import LinearChainCRF
from hanmo.models.crf_features import TEMPLATES, choose_template
from hanmo.progress import Progress
from hanmo.text.normalize import SURROGATE

CONFIG, ATTRIBUTES, WEIGHTS = "config.json", "attributes.json", "model.safetensors"
BATCH = 64  # sentences decoded at once
CRFSUITE_HEADER = struct.Struct("<4sI4sIIIIIIIII")  # magic, size, type, version, three counts, five offsets
CRFSUITE_FEATURE = np.dtype([("kind", "<u4"), ("source", "<u4"), ("target", "<u4"), ("weight", "<f8")])


class CRFTagger:
    """A sequence tagger for words or characters; made by :meth:`train` or :meth:`load`.

    Attributes:
        labels: the tags it can give, in the order of the marginals.
        template: the name of its feature template, one of ``TEMPLATES``.
        training: the settings it was trained with, and the size of its data.

    >>> tagger = CRFTagger.train([["she", "runs"], ["he", "sleeps"]], [["PRON", "VERB"], ["PRON", "VERB"]])
    >>> tagger.predict([["he", "runs"]])
    [['PRON', 'VERB']]
    """

    def __init__(
        self,
        labels: Sequence[str],
        template: str,
        attributes: Sequence[str],
        weights: dict[str, NDArray[Any]],
        training: dict[str, Any] | None = None,
    ) -> None:
        self.labels = tuple(labels)
        self.template = template
        self.attributes = {name: row for row, name in enumerate(attributes)}
        self.weights = weights  # "begins" int64 [A + 1], "label_ids" int32 [W], "values" float64 [W], "transitions"
        self.training = training or {}
        self.crf = LinearChainCRF(len(self.labels)).double()
        self.crf.requires_grad_(False)
        self.crf.transitions.copy_(torch.from_numpy(weights["transitions"]))

    @classmethod
    def train(
        cls,
        sentences: Sequence[Sequence[str]],
        tags: Sequence[Sequence[str]],
        *,
        template: str | None = None,
        c1: float = 0.05,
        c2: float = 0.05,
        max_iterations: int = 100,
        min_count: int = 1,
        progress: bool = False,
    ) -> CRFTagger:
        """Learn weights from tagged sentences; the same data give the same weights.

        Args:
            sentences: words, or characters (a string is a sentence of its characters for ``zh-characters``).
            tags: a label for each token.
            template: the questions asked about a token, one of ``TEMPLATES``; None chooses by the tokens.
            c1: weight of the L1 norm; it makes most weights exactly zero and the model small.
            c2: weight of the squared L2 norm.
            max_iterations: of L-BFGS; it stops earlier where the loss no longer falls.
            min_count: features seen fewer times are left out.
            progress: show the iterations.

        Raises:
            DataError: no sentences, an empty one, an empty token, tags that do not fit; the message names
                the record.
            ResourceError: the package ``python-crfsuite`` is not installed.
            UsageError: an unknown template or a setting out of range.
        """
        check_settings(template, c1, c2, max_iterations, min_count)
        if len(sentences) != len(tags):
            raise DataError(
                f"{len(sentences)} sentences and {len(tags)} sequences of tags",
                zh=f"句子数（{len(sentences)}）与标签序列数（{len(tags)}）不一致",
            )
        if not len(sentences):
            raise DataError("there are no sentences to learn from", zh="没有可供训练的句子")
        template = template or choose_template(sentences)
        clean = [check_sentence(sentence, record, template) for record, sentence in enumerate(sentences, start=1)]
        for record, (sentence, labels) in enumerate(zip(clean, tags, strict=True), start=1):
            check_tags(sentence, labels, record)
        features = [TEMPLATES[template](sentence) for sentence in clean]
        counts = Counter(name for rows in features for row in rows for name in row)
        ids = {name: index for index, name in enumerate(n for n, count in counts.items() if count >= min_count)}
        labels = sorted({label for sequence in tags for label in sequence})
        settings = {"c1": c1, "c2": c2, "max_iterations": max_iterations, "min_count": min_count}
        model, dump = run_crfsuite(features, tags, ids, labels, settings, progress)
        rows, weights = read_crfsuite(model, dump, len(labels))
        names = list(ids)
        training = {**settings, "sentences": len(clean), "tokens": sum(map(len, clean))}
        return cls(labels, template, [names[row] for row in rows], weights, training)

    def predict(self, sentences: Sequence[Sequence[str]]) -> list[list[str]]:
        """The most probable tags of each sentence.

        Raises:
            DataError: an empty sentence or token; the message names the record.
        """
        answers: list[list[str]] = [[] for _ in sentences]
        for places, emissions_BTL, mask_BT in self.batches(sentences):
            for place, path in zip(places, self.crf.decode(emissions_BTL, mask_BT), strict=True):
                answers[place] = [self.labels[label] for label in path]
        return answers

    def predict_marginals(self, sentences: Sequence[Sequence[str]]) -> list[NDArray[np.float64]]:
        """For each sentence the probability of each label at each token, float64 [T, L] in the order of ``labels``.

        Raises:
            DataError: as :meth:`predict`.
        """
        answers: list[NDArray[np.float64]] = [np.zeros((0, len(self.labels)))] * len(sentences)
        for places, emissions_BTL, mask_BT in self.batches(sentences):
            marginals_BTL = self.crf.marginals(emissions_BTL, mask_BT).numpy()
            for place, marginals_TL in zip(places, marginals_BTL, strict=True):
                answers[place] = marginals_TL[: len(sentences[place])]
        return answers

    def batches(self, sentences: Sequence[Sequence[str]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Sentences of similar length together: their places, emissions [B, T, L] and mask [B, T]."""
        clean = [check_sentence(sentence, record, self.template) for record, sentence in enumerate(sentences, start=1)]
        order = sorted(range(len(clean)), key=lambda place: len(clean[place]))
        for begin in range(0, len(order), BATCH):
            places = order[begin : begin + BATCH]
            lengths = torch.tensor([len(clean[place]) for place in places])
            longest = int(lengths.max())
            emissions_BTL = np.stack([self.emissions(clean[place], longest) for place in places])
            yield places, torch.from_numpy(emissions_BTL), torch.arange(longest)[None] < lengths[:, None]

    def emissions(self, sentence: Sequence[str], length: int) -> NDArray[np.float64]:
        """The sums of the weights of each token's features, float64 [length, L]; zero past the sentence's end."""
        rows, tokens = [], []
        find = self.attributes.get
        for token, names in enumerate(TEMPLATES[self.template](sentence)):
            known = [row for row in map(find, names) if row is not None]
            rows += known
            tokens += [token] * len(known)
        begins, num_labels = self.weights["begins"], len(self.labels)
        first = begins[np.array(rows, dtype=np.int64)]
        sizes = begins[np.array(rows, dtype=np.int64) + 1] - first
        # the weights of one feature lie side by side: first, first + 1, ...
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        places = np.repeat(first, sizes) + within
        cells = np.repeat(np.array(tokens, dtype=np.int64), sizes) * num_labels + self.weights["label_ids"][places]
        sums = np.bincount(cells, self.weights["values"][places], minlength=length * num_labels).astype(np.float64)
        return sums.reshape(length, num_labels)

    def describe(self) -> dict[str, Any]:
        """Kind, labels, template, number of features and weights, and the training settings."""
        return {
            "kind": "crf",
            "labels": list(self.labels),
            "template": self.template,
            "features": len(self.attributes),
            "weights": int(self.weights["values"].size),
            "training": dict(self.training),
        }

    def save(self, folder: str | Path) -> None:
        """Write the model folder, whole or not at all.

        Raises:
            ResourceError: the disk is full or cannot be written.
        """
        with atomic_folder(folder, {"kind": "crf"}) as temporary:
            config = {"model_type": "crf", "template": self.template, "labels": list(self.labels)}
            write_json(temporary / CONFIG, {**config, "training": self.training})
            write_json(temporary / ATTRIBUTES, list(self.attributes))
            save_file(self.weights, temporary / WEIGHTS)
            fsync_path(temporary / WEIGHTS)

    @classmethod
    def load(cls, folder: str | Path) -> CRFTagger:
        """Read a model folder; the predictions are those of the model that was saved, bit for bit.

        Raises:
            ModelError: a file is missing, truncated, altered, or not what :meth:`save` writes.
        """
        folder = Path(folder)
        verify(folder)
        config = read_json(folder / CONFIG)
        attributes = read_json(folder / ATTRIBUTES)
        try:
            weights = load_file(folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise unsound(folder / WEIGHTS, str(error)) from None
        labels = config.get("labels") if isinstance(config, dict) else None
        if not is_names(labels) or not labels or config.get("model_type") != "crf":
            raise unsound(folder / CONFIG, "it does not describe a CRF with its labels")
        if config.get("template") not in TEMPLATES:
            raise unsound(folder / CONFIG, f"the template {config.get('template')!r} is not known to this version")
        if not is_names(attributes):
            raise unsound(folder / ATTRIBUTES, "it is not a list of distinct strings")
        check_weights(weights, len(attributes), len(labels), folder / WEIGHTS)
        training = config.get("training")
        return cls(labels, config["template"], attributes, weights, training if isinstance(training, dict) else {})


def run_crfsuite(
    features: Sequence[Sequence[Sequence[str]]],
    tags: Sequence[Sequence[str]],
    ids: dict[str, int],
    labels: Sequence[str],
    settings: dict[str, float],
    progress: bool,
) -> tuple[bytes, str]:
    """Train with python-crfsuite: its model file, and its text dump, in which the names are our numbers.

    Raises:
        ResourceError: the package is not installed.
    """
    try:
        import pycrfsuite
    except ImportError:
        raise missing_package(
            "python-crfsuite", "classical", pick("training a CRF tagger", "训练 CRF 标注器")
        ) from None
    limit = int(settings["max_iterations"])
    bar = Progress("crf", limit, "iterations") if progress else None

    class Trainer(pycrfsuite.BaseTrainer):  # type: ignore[misc]
        def message(self, message: str) -> None:
            if bar and (match := re.search(r"Iteration #(\d+)", message)):
                bar.update(int(match[1]))

    trainer = Trainer(verbose=False)
    trainer.set_params(
        {
            "c1": settings["c1"],
            "c2": settings["c2"],
            "max_iterations": limit,
            "feature.possible_transitions": True,  # also learn that a transition never happens
        }
    )
    numbers = {label: str(number) for number, label in enumerate(labels)}
    for rows, sequence in zip(features, tags, strict=True):
        known = [[str(ids[name]) for name in row if name in ids] for row in rows]
        trainer.append(known, [numbers[label] for label in sequence])
    with tempfile.TemporaryDirectory() as name:  # readable by this user only
        path, dumped = Path(name) / "model", Path(name) / "dump"
        trainer.train(str(path))
        if bar:
            bar.close()
        model = path.read_bytes()
        tagger = pycrfsuite.Tagger()
        with tagger.open_inmemory(model):
            tagger.dump(str(dumped))
        return model, dumped.read_text(encoding="ascii")


def read_crfsuite(model: bytes, dump: str, num_labels: int) -> tuple[list[int], dict[str, NDArray[Any]]]:
    """The feature ids that have weights, and the weights in full precision (the dump has six decimals).

    Raises:
        ModelError: python-crfsuite wrote another format than the one known here.
    """
    header = CRFSUITE_HEADER.unpack_from(model)
    begin = header[7]
    if header[:4] != (b"lCRF", len(model), b"FOMC", 100) or model[begin : begin + 4] != b"FEAT":
        raise ModelError(
            "this version of python-crfsuite writes a model format that Hanmo does not know",
            fix="pip install 'python-crfsuite>=0.9.9'",
            zh="此版本 python-crfsuite 的模型格式未知；请运行 pip install 'python-crfsuite>=0.9.9'",
        )
    count = int.from_bytes(model[begin + 8 : begin + 12], "little")
    table = np.frombuffer(model, CRFSUITE_FEATURE, count, begin + 12)
    sections = {
        name: re.findall(r"(\d+): (\d+)", body) for name, body in re.findall(r"(\w+) = \{\n(.*?)\}", dump, re.S)
    }
    label_of = np.zeros(num_labels, dtype=np.int32)  # crfsuite numbers labels in the order it meets them
    for internal, ours in sections["LABELS"]:
        label_of[int(internal)] = int(ours)
    transitions = np.zeros((num_labels, num_labels))
    between = table[table["kind"] == 1]
    transitions[label_of[between["source"]], label_of[between["target"]]] = between["weight"]
    states = table[table["kind"] == 0]
    states = states[np.argsort(states["source"], kind="stable")]
    used, sizes = np.unique(states["source"], return_counts=True)
    names = {int(internal): int(ours) for internal, ours in sections["ATTRIBUTES"]}
    weights = {
        "begins": np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        "label_ids": label_of[states["target"]],
        "values": states["weight"].astype(np.float64),
        "transitions": transitions,
    }
    return [names[internal] for internal in used.tolist()], weights


def check_weights(weights: dict[str, NDArray[Any]], num_attributes: int, num_labels: int, path: Path) -> None:
    """Refuse arrays whose shapes, types or values do not fit together.

    Raises:
        ModelError: they do not.
    """
    expected = {"begins": np.int64, "label_ids": np.int32, "values": np.float64, "transitions": np.float64}
    if {name: array.dtype for name, array in weights.items()} != expected:
        raise unsound(path, f"expected the tensors {', '.join(expected)} in their types")
    begins, label_ids, values = weights["begins"], weights["label_ids"], weights["values"]
    sound = (
        begins.shape == (num_attributes + 1,)
        and values.ndim == 1
        and label_ids.shape == values.shape
        and weights["transitions"].shape == (num_labels, num_labels)
        and begins[0] == 0
        and begins[-1] == values.size
        and bool((np.diff(begins) >= 0).all())
        and bool(((label_ids >= 0) & (label_ids < num_labels)).all())
        and bool(np.isfinite(values).all() and np.isfinite(weights["transitions"]).all())
    )
    if not sound:
        raise unsound(path, "the sizes or values of its tensors do not fit together")


def check_settings(template: str | None, c1: float, c2: float, max_iterations: int, min_count: int) -> None:
    """Refuse settings that mean nothing.

    Raises:
        UsageError: an unknown template or a number out of range.
    """
    if template is not None and template not in TEMPLATES:
        raise UsageError(
            f"unknown feature template {template!r}",
            where="template",
            fix=nearest(template, TEMPLATES),
            zh=f"未知的特征模板 {template!r}，可用：" + "、".join(TEMPLATES),
        )
    for name, value, least in (("c1", c1, 0), ("c2", c2, 0), ("max_iterations", max_iterations, 1)):
        if not least <= value < float("inf"):
            raise UsageError(
                f"{name} is {value}, it must be {least} or more", where=name, zh=f"{name} 不得小于 {least}"
            )
    if min_count < 1:
        raise UsageError(f"min_count is {min_count}, it must be 1 or more", where="min_count", zh="min_count 至少为 1")


def check_sentence(sentence: Sequence[str], record: int, template: str) -> list[str]:
    """The tokens of a sentence as a list of writable strings.

    Raises:
        DataError: no tokens, an empty token, or a string where words were expected.
    """
    if isinstance(sentence, str) and template != "zh-characters":
        raise DataError(
            "the sentence is a string, not a sequence of words",
            where=f"record {record}",
            fix="cut it first: hanmo.text.segment.segment(text)",
            zh="句子是字符串而不是词的序列；请先用 hanmo.text.segment.segment 分词",
        )
    if not len(sentence):
        raise DataError("the sentence is empty", where=f"record {record}", fix="leave it out", zh="句子为空，请删去")
    if not all(isinstance(token, str) and token for token in sentence):
        raise DataError("a token is empty or not a string", where=f"record {record}", zh="有的词为空或不是字符串")
    return [SURROGATE.sub("\ufffd", token) for token in sentence]


def check_tags(sentence: Sequence[str], tags: Sequence[str], record: int) -> None:
    """Refuse tags that do not fit the sentence.

    Raises:
        DataError: another number of tags than tokens, or a tag that is no string.
    """
    if len(tags) != len(sentence):
        raise DataError(
            f"{len(sentence)} tokens and {len(tags)} tags",
            where=f"record {record}",
            zh=f"词数（{len(sentence)}）与标签数（{len(tags)}）不一致",
        )
    if not all(isinstance(tag, str) and tag and not SURROGATE.search(tag) for tag in tags):
        raise DataError("a tag is empty or not a string", where=f"record {record}", zh="有的标签为空或不是字符串")


def is_names(value: object) -> bool:
    """Whether a value read from JSON is a list of distinct strings."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)


def unsound(path: Path, why: str) -> ModelError:
    """The error for a file that is not what was once saved."""
    return ModelError(
        "the CRF model is not sound",
        where=str(path),
        why=f"{why}; nothing was loaded",
        fix="copy or train the model again",
        zh="CRF 模型文件不完整或不一致，未加载任何内容。请重新复制或重新训练",
    )
