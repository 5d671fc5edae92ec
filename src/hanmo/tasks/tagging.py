"""Tagging: a tag for each token. Named entities, parts of speech, word segmentation.

What the tags mean, the tags say: those of spans (``B-LOC``, ``I-LOC``, ``O``) are measured as whole spans, those of
segmentation (``B``, ``I``; read from BMES, too) likewise, so that a span is a word; all others by the single token.

Letters in names: N records, L types of spans, or tags.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hanmo.data.tasks.schemes import detect_scheme, has_spans, spans_of, to_bioes, to_iob2
from hanmo.data.tasks.types import Tagged
from hanmo.errors import DataError
from hanmo.language import pick
from hanmo.tasks.base import Form, System, Task
from hanmo.tasks.metric import Floats, Metric, ratio
from hanmo.tasks.spans import HEAD, span_measures, span_numbers, type_table
from hanmo.text.normalize import SURROGATE
from hanmo.text.segment import segment

Tags = tuple[str, ...]
OUTSIDE = "O"
WORD_TEMPLATES = ("zh-words", "zh-entities")  # of taggers that read Chinese words


class TagMetric(Metric[Tagged, Tags]):
    """Of tags that mark spans: precision, recall and F1 of whole spans (Tjong Kim Sang 2002), as seqeval counts in its
    default mode, and the share of tokens with the right tag. Of other tags: that share, and macro F1.

    A span is right if its first token, its last token and its type are. Ill-formed answers are read as the CoNLL
    scorer reads them: an I- that continues nothing begins a span. Macro F1 is the mean over the tags of the records.
    """

    def __init__(self, records: Sequence[Tagged]) -> None:
        tags = {tag for record in records for tag in record.tags}
        self.spans = has_spans(tags)
        self.primary = "f1" if self.spans else "accuracy"
        kinds = {kind for record in records for _, _, kind in spans_of(record.tags)} if self.spans else tags
        self.kinds = tuple(sorted(kinds))

    def statistics(self, records: Sequence[Tagged], answers: Sequence[Tags]) -> Floats:
        """Tokens and right ones; then what :func:`~hanmo.tasks.spans.span_numbers` counts of spans, or of tags.

        Raises:
            ValueError: an answer has not as many tags as its record: that is a defect of the system, not of the data.
        """
        head_N2 = np.zeros((len(records), 2))
        for row, (record, answer) in enumerate(zip(records, answers, strict=True)):
            right = sum(map(str.__eq__, record.tags, answer))
            if not len(record.tokens) == len(record.tags) == len(answer):
                raise ValueError(f"{record.where}: {len(answer)} tags for {len(record.tokens)} tokens")
            head_N2[row] = len(record.tags), right
        true = [self.marked(record.tags) for record in records]
        return np.concatenate([head_N2, span_numbers(true, list(map(self.marked, answers)), self.kinds)], axis=1)

    def marked(self, tags: Tags) -> list[tuple[int, int, str]]:
        """The spans of a sentence; of other tags each token as a span."""
        return spans_of(tags) if self.spans else [(place, place + 1, tag) for place, tag in enumerate(tags)]

    def measures(self, sums: Floats) -> dict[str, Floats]:
        """Precision, recall, F1 and accuracy; or accuracy and macro F1."""
        accuracy = ratio(sums[..., 1], sums[..., 0])
        if self.spans:
            return {**span_measures(sums[..., 2:]), "accuracy": accuracy}
        counts = sums[..., 2 + HEAD :].reshape(*sums.shape[:-1], 3, -1)
        met = counts[..., 1, :] + counts[..., 2, :]
        return {"accuracy": accuracy, "macro_f1": ratio(ratio(2 * counts[..., 0, :], met).sum(-1), (met > 0).sum(-1))}

    def signature(self) -> Mapping[str, Any]:
        """The scheme, and how many types or tags there are."""
        return {"scheme": "IOB2" if self.spans else "plain", "mode": "conll", "types": len(self.kinds)}

    def details(self, records: Sequence[Tagged], answers: Sequence[Tags]) -> dict[str, Any]:
        """Precision, recall and F1 of each type of span, or of each tag; segmented words have no type: "word"."""
        sums = self.statistics(records, answers).sum(0)
        table = type_table(sums[2 + HEAD :], self.kinds)
        return {"types": {kind or "word": row for kind, row in table.items()}}


# Ways to answer -------------------------------------------------------------------------------------------------------


class UsualTag(System[Tagged, Tags]):
    """Each word's most frequent tag, whatever stands around it; of an unknown word the most frequent of all."""

    kind, learns = "baseline", True

    def __init__(self) -> None:
        self.name = pick("each word's usual tag", "每个词的常见标签")
        self.usual, self.best = OUTSIDE, dict[str, str]()

    def fit(self, train: Sequence[Tagged], validation: Sequence[Tagged] = ()) -> None:
        """Count."""
        del validation
        counts: dict[str, Counter[str]] = {}
        for record in with_tokens(train):
            for token, tag in zip(record.tokens, record.tags, strict=True):
                counts.setdefault(token, Counter())[tag] += 1
        self.usual = Counter(tag for record in train for tag in record.tags).most_common(1)[0][0]
        self.best = {token: tags.most_common(1)[0][0] for token, tags in counts.items()}

    def answer(self, records: Sequence[Tagged]) -> list[Tags]:
        """Look them up."""
        return [tuple(self.best.get(token, self.usual) for token in record.tokens) for record in records]


class Field(System[Tagged, Tags]):
    """A conditional random field over hand-made features (Lafferty et al. 2001).

    Args:
        tagger: a trained :class:`~hanmo.models.crf_tagger.CRFTagger`; without one it learns.
        settings: of :meth:`CRFTagger.train <hanmo.models.crf_tagger.CRFTagger.train>`; where no template is given,
            that of :func:`template_for`.
        ends: learn tags that tell where spans end (BIOES). None: where tokens are Chinese, for there it helps.
    """

    kind = "classical"

    def __init__(self, tagger: Any = None, *, name: str = "", ends: bool | None = None, **settings: Any) -> None:
        self.tagger, self.settings, self.learns, self.ends = tagger, settings, tagger is None, ends
        self.name = name or pick("CRF of hand-made features", "人工特征 CRF")
        self.key = "" if tagger is not None else "crf" if "template" not in settings else f"crf-{settings['template']}"

    def fit(self, train: Sequence[Tagged], validation: Sequence[Tagged] = ()) -> None:
        """Train."""
        from hanmo.models.crf_tagger import CRFTagger

        del validation
        chosen = with_tokens(train)
        settings: dict[str, Any] = {"template": template_for(chosen), **self.settings}
        tags: list[Tags] = [record.tags for record in chosen]
        ends = settings["template"].startswith("zh") if self.ends is None else self.ends
        if ends and TagMetric(chosen).spans:
            tags = list(map(to_bioes, tags))
        self.tagger = CRFTagger.train(list(map(words_of, chosen)), tags, **settings)

    def answer(self, records: Sequence[Tagged]) -> list[Tags]:
        """The likeliest sequence of tags; in IOB2 whatever the tagger was trained with."""
        places = [place for place, record in enumerate(records) if record.tokens]
        answers: list[Tags] = [()] * len(records)
        found = self.tagger.predict([words_of(records[place]) for place in places])
        for place, tags in zip(places, in_iob2(found, self.tagger.labels), strict=True):
            answers[place] = tags
        return answers

    def save(self, folder: Path) -> Path:
        """Write the tagger."""
        self.tagger.save(folder)
        return folder


class Network(System[Tagged, Tags]):
    """A network with a head for tokens.

    Args:
        encoder: a :class:`~hanmo.inference.encoder.TextEncoder` whose task that is.
    """

    def __init__(self, encoder: Any) -> None:
        from hanmo.models.recurrent import RecurrentEncoder

        self.encoder, self.name = encoder, encoder.name
        self.kind = "recurrent" if isinstance(encoder.model, RecurrentEncoder) else "encoder"

    def answer(self, records: Sequence[Tagged]) -> list[Tags]:
        """The likeliest tags; in IOB2 whatever the network was trained with."""
        found = [[tag for _, tag in self.encoder.tag(words_of(record))] for record in records]
        return in_iob2(found, self.encoder.labels)


def template_for(records: Sequence[Tagged]) -> str:
    """The features that fit the tokens; of names in Chinese words those that ask a dictionary."""
    from hanmo.models.crf_features import choose_template

    template = choose_template([record.tokens for record in records])
    named = any(kind for record in records for _, _, kind in spans_of(record.tags)) and TagMetric(records).spans
    return "zh-entities" if template == "zh-words" and named else template


def with_tokens(records: Sequence[Tagged]) -> list[Tagged]:
    """The records that have tokens.

    Raises:
        DataError: none has.
    """
    chosen = [record for record in records if record.tokens]
    if not chosen:
        raise DataError(
            "there are no sentences to learn from",
            fix="give training data with --train",
            zh="没有可供训练的句子；请用 --train 给出训练数据",
        )
    return chosen


def words_of(record: Tagged) -> list[str]:
    """The tokens as models can read them: none is empty, and none holds half a character."""
    return [SURROGATE.sub("\ufffd", token) or "\ufffd" for token in record.tokens]


def in_iob2(found: Sequence[Sequence[str]], labels: Sequence[str]) -> list[Tags]:
    """Answers in IOB2, where a model gives tags of another scheme that marks ends (BIOES, BMES).

    >>> in_iob2([["S", "B", "E"]], ["B", "M", "E", "S"])
    [('B', 'B', 'I')]
    """
    scheme = detect_scheme([[label] for label in labels]).name
    closed = scheme in ("BIOES", "BMES", "BILOU")
    return [to_iob2(tags, scheme) if closed else tuple(tags) for tags in found]


class Tagging(Task[Tagged, Tags]):
    """Tags of tokens.

    Attributes:
        words: whether :meth:`record` cuts Chinese into words rather than characters; :meth:`system` sets it where a
            model tells what it was trained with.
    """

    name, kind, training = "tagging", "tagged", "tagging"
    aliases = ("ner", "pos", "segmentation")
    help = "a tag for each token: named entities, parts of speech, word segmentation"
    help_zh = "序列标注：命名实体、词性、中文分词"

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.words = False

    def metric(self, records: Sequence[Tagged]) -> TagMetric:
        """Spans or single tokens, as the tags of the records have it."""
        return TagMetric(records)

    def baselines(self, records: Sequence[Tagged]) -> list[System[Tagged, Tags]]:
        """Each word's usual tag; a conditional random field."""
        del records
        return [UsualTag(), Field()]

    def candidates(self, records: Sequence[Tagged]) -> list[System[Tagged, Tags]]:
        """The field with other features that fit Chinese words as well; a small recurrent network."""
        from hanmo.tasks.recurrent import RecurrentTagger

        systems: list[System[Tagged, Tags]] = []
        if other := {"zh-entities": "zh-words", "zh-words": "zh-characters"}.get(template_for(records)):
            systems = [Field(name=pick(f"CRF ({other} features)", f"CRF（{other} 特征）"), template=other)]
        return [*systems, RecurrentTagger()]

    def system(self, model: Any, train: Sequence[Tagged] = (), form: Form | None = None) -> System[Tagged, Tags]:
        """A tagger, a network with a head for tokens, or a language model that lists the entities."""
        from hanmo.inference.encoder import TextEncoder
        from hanmo.models.crf_tagger import CRFTagger
        from hanmo.tasks.prompted_spans import PromptedSpans

        if isinstance(model, CRFTagger):
            self.words = model.template in WORD_TEMPLATES
            return Field(model)
        if isinstance(model, TextEncoder):
            if model.task != "token-classification":
                raise self.cannot(model)
            return Network(model)
        if hasattr(model, "generate"):
            return PromptedSpans(model, train, form or Form())
        raise self.cannot(model)

    def record(self, text: str) -> Tagged:
        """A sentence, cut into words; Chinese into characters, or into words where :attr:`words` says so."""
        clean = SURROGATE.sub("\ufffd", text)
        tokens = segment(clean, None if self.words else "en")
        spaces, at = [], 0
        for token in tokens:
            at = clean.index(token, at) + len(token)
            spaces.append(clean[at : at + 1].isspace())
        return Tagged(tuple(tokens), (), tuple(spaces))

    def as_data(self, answer: Tags) -> dict[str, Any]:
        """The tags, and the spans they mark (first token, end, type)."""
        data: dict[str, Any] = {"tags": list(answer)}
        if has_spans(answer) or set(answer) <= {OUTSIDE}:
            data["spans"] = [{"start": start, "end": end, "type": kind} for start, end, kind in spans_of(answer)]
        return data

    def describe(self, record: Tagged, answer: Tags) -> str:
        """The spans with their types, one a line; segmented words with blanks between them; or each token's tag."""
        if not has_spans(answer):
            if set(answer) <= {OUTSIDE}:
                return pick("no spans", "没有片段")
            return " ".join(f"{token}/{tag}" for token, tag in zip(record.tokens, answer, strict=True))
        spans = spans_of(answer)
        if not any(kind for _, _, kind in spans):
            return " ".join(span_text(record, start, end) for start, end, _ in spans)
        return "\n".join(f"{kind}: {span_text(record, start, end)}" for start, end, kind in spans)

    def chance(self, records: Sequence[Tagged]) -> dict[str, float]:
        """Each tag equally often, where tags do not mark spans."""
        tags = {tag for record in records for tag in record.tags}
        return {"accuracy": 1 / len(tags)} if tags and not has_spans(tags) else {}


def span_text(record: Tagged, start: int, end: int) -> str:
    """The text of some tokens.

    >>> span_text(Tagged(("in", "New", "York", "."), (), (True, True, False, False)), 1, 3)
    'New York'
    """
    spaces = None if record.spaces is None else record.spaces[start:end]
    return replace(record, tokens=record.tokens[start:end], tags=(), spaces=spaces).text
