"""Networks that read texts: vectors, labels of texts and words, answers in a context, hidden words.

On a CPU the native engine computes the hidden states, of unpadded texts: vectors and classes are the same bits in any
company. Elsewhere, and for networks that it cannot compute, torch does, in batches of rows of similar length, padded
and masked, so that no result depends on the other texts of a call beyond rounding. Heads are torch's. Long inputs are
cut (``embed`` and ``classify``, which say so) or read in overlapping windows (all others), so that memory is bounded by
a batch and not by what is given.

Letters in names: B rows, T tokens of a row, M tokens of all rows, D hidden size, L labels, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hanmo.errors import DataError, ModelError, UsageError
from hanmo.inference.masking import Candidate, fill_masks, mask_each
from hanmo.inference.pooling import Pooling, pool_flat, read_pooling
from hanmo.inference.reading import (
    BATCH_ROWS,
    Floats,
    Pair,
    Read,
    RowReader,
    check_texts,
    check_words,
)
from hanmo.inference.spans import Answer, best_span, stitch, word_windows
from hanmo.language import pick
from hanmo.models.architectures import task_of
from hanmo.models.recurrent import RecurrentEncoder
from hanmo.models.transformer import Transformer
from hanmo.settings import notice
from hanmo.text.rows import OVERLAP, UNBOUNDED, shorten, spaced_words, windows, word_pieces
from hanmo.text.segment import segment
from hanmo.text.wrapping import wrapping_of

if TYPE_CHECKING:
    from hanmo.models.checkpoints.weights import LoadedModel
    from hanmo.text.tokenizer import Tokenizer

BLOCK = 4096  # texts that are encoded and sorted by length together
LONGEST_ANSWER = 30  # tokens

# What each kind of network answers: the methods, and the class of transformers whose folders do that.
ABILITIES = {
    "sequence-classification": (
        ("classify", "predict_proba"),
        "ForSequenceClassification",
        "classifies texts",
        "文本分类",
    ),
    "token-classification": (("tag", "tag_probabilities"), "ForTokenClassification", "labels words", "标注词语"),
    "span-extraction": (("answer",), "ForQuestionAnswering", "finds answers in a context", "从上下文中找答案"),
    "masked-lm": (("fill", "pseudo_logprobs"), "ForMaskedLM", "fills in hidden words", "填空"),
}


class TextEncoder:
    """A network that reads texts, with its tokenizer.

    Args:
        model: a transformer without a writing output, or a bidirectional recurrent network.
        tokenizer: the tokenizer it was trained with.
        name: what the user calls the model.
        pooling: how :meth:`embed` makes one vector of a text; default the mean of the hidden states.
        max_length: tokens of one row, control tokens included; default what the network can see.
        engine: "torch"; "native" (C++ for CPUs), which takes the weights of ``model`` over, so that it must not be used
            elsewhere; or "auto": native where it can compute the network on this machine.
        precision: of the native engine's weights: "fp32", "fp16" or "int8" (which rounds activations as well).

    Attributes:
        task: "sequence-classification", "token-classification", "span-extraction", "masked-lm" or "embedding".
        truncated: how many texts the latest call of ``embed`` or ``classify`` had to cut.

    >>> encoder.embed(["床前明月光", "The bright moon before my bed"]) @ vector       # doctest: +SKIP
    >>> encoder.classify(["这家饭馆很好吃"])[0]                                        # doctest: +SKIP
    {'positive': 0.98, 'negative': 0.02}
    """

    def __init__(
        self,
        model: Transformer | RecurrentEncoder,
        tokenizer: Tokenizer,
        *,
        name: str = "model",
        pooling: Pooling | None = None,
        max_length: int | None = None,
        engine: str = "torch",
        precision: str = "fp32",
    ) -> None:
        if isinstance(model, Transformer):
            config, causal = model.config, model.config.causal
            if model.encoder is not None or task_of(config) == "causal-lm":
                raise ModelError(
                    "this network writes texts",
                    where=name,
                    fix="hanmo.load gives it as a LanguageModel: generate, stream, logprobs",
                    zh="该网络用于生成文本。请用 hanmo.load 得到的 LanguageModel",
                )
            limit, self.task = config.max_position_embeddings, task_of(config)
        else:
            limit, causal, self.task = UNBOUNDED, False, model.head.config.task
        self.model = model.eval()
        self.reader = RowReader(self.model, tokenizer, name, engine=engine, precision=precision)
        self.tokenizer, self.name = tokenizer, name
        self.pooling = pooling or Pooling()
        self.max_length = min(limit, max_length or limit)
        self.wrapping = wrapping_of(tokenizer, causal=causal)
        self.truncated, self.said = 0, False
        if self.max_length <= self.wrapping.overhead(pair=True):
            raise ModelError(
                f"rows of {self.max_length} tokens leave no room for a text",
                where=name,
                zh=f"最大长度 {self.max_length} 容不下任何文本",
            )

    @classmethod
    def from_loaded(
        cls,
        loaded: LoadedModel,
        model: Transformer,
        folder: Path | None = None,
        *,
        name: str = "",
        engine: str = "auto",
        precision: str = "fp32",
    ) -> TextEncoder:
        """An encoder from what an importer read, whose network no one else uses; ``folder`` is where the files of
        sentence-transformers may lie.

        Raises:
            ModelError: they are damaged, or name a step that is not known.
            UsageError: an engine or precision that is none, or that cannot be had here.
        """
        pooling = None if folder is None else read_pooling(Path(folder))
        name = name or loaded.source
        return cls(model, loaded.tokenizer, name=name, pooling=pooling, engine=engine, precision=precision)

    def describe(self) -> str:
        """What computes, for people."""
        return self.reader.describe()

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the answers, in the order of :meth:`predict_proba`; empty without a head."""
        return self.model.head.config.labels if self.model.head is not None else ()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.reader.device

    # Whole texts -----------------------------------------------------------------------------------------------------

    def embed(self, texts: str | Sequence[str], *, normalize: bool = True, batch_size: int = BATCH_ROWS) -> Floats:
        """One vector per text, ``[B, D]``; their products are cosines unless ``normalize`` is False.

        Raises:
            UsageError: something that is no text.
            DataError: a text with a lone surrogate.
        """
        given = check_texts(texts)
        limit = min(self.max_length, self.pooling.max_length or self.max_length)
        if self.pooling.lowercase:
            given = [text.lower() if isinstance(text, str) else text for text in given]

        def read(states_MD: Tensor, lengths_B: Tensor, _: list[int]) -> Tensor:
            vectors_BD = self.pooling.flat(states_MD.float(), lengths_B)
            return F.normalize(vectors_BD) if normalize else vectors_BD

        return self._read_all(given, limit, read, self.reader.hidden_size * len(self.pooling.modes), batch_size)

    def predict_proba(self, texts: str | Pair | Sequence[str | Pair], *, batch_size: int = BATCH_ROWS) -> Floats:
        """The probability of every label, ``[B, L]``; a tuple of two texts is a pair (premise and hypothesis).

        They add up to one, unless the head lets any number of labels hold at once, or has but one.

        Raises:
            UsageError: the network does not classify texts, or something that is no text.
            DataError: a text with a lone surrogate.
        """
        self._require("sequence-classification", "classify")
        assert self.model.head is not None
        head = self.model.head
        independent = head.config.multi_label or len(self.labels) == 1

        def read(states_MD: Tensor, lengths_B: Tensor, _: list[int]) -> Tensor:
            pooled_BD = pool_flat(head.config.pooling, states_MD, lengths_B)
            if self.reader.exact:  # row by row: a product of several rows rounds as their number has it
                scores_BL: Tensor = torch.cat([head(row_D.clone().view(1, 1, -1)) for row_D in pooled_BD])
            else:
                scores_BL = head(pooled_BD.unsqueeze(1))
            scores_BL = scores_BL.float()
            return scores_BL.sigmoid() if independent else scores_BL.softmax(-1)

        given = check_texts(texts, pairs=True)
        return self._read_all(given, self.max_length, read, len(self.labels), batch_size)

    def classify(
        self, texts: str | Pair | Sequence[str | Pair], *, batch_size: int = BATCH_ROWS
    ) -> list[dict[str, float]]:
        """:meth:`predict_proba` as a dictionary for each text, the likeliest label first."""
        rows = self.predict_proba(texts, batch_size=batch_size).tolist()
        return [dict(sorted(zip(self.labels, row, strict=True), key=lambda item: -item[1])) for row in rows]

    def _read_all(self, texts: Sequence[str | Pair], limit: int, read: Read, width: int, batch_size: int) -> Floats:
        """``read`` for every text, a block at a time."""
        if type(batch_size) is not int or batch_size < 1:
            raise UsageError(
                f"batch_size must be a positive whole number, not {batch_size!r}", zh="batch_size 应为正整数"
            )
        result, cut = np.zeros((len(texts), width), dtype=np.float32), 0
        for start in range(0, len(texts), BLOCK):
            rows = []
            for parts in self._encoded(texts[start : start + BLOCK], start):
                kept = shorten([len(part) for part in parts], limit - self.wrapping.overhead(pair=len(parts) > 1))
                cut += kept != [len(part) for part in parts]
                rows.append(self.wrapping.wrap(*(part[:size] for part, size in zip(parts, kept, strict=True))))
            for index, vector in enumerate(self.reader.run(rows, read, batch_size), start=start):
                result[index] = vector.numpy()
        self.truncated = cut
        if cut and not self.said:
            self.said = True
            notice(
                pick(
                    f"{self.name}: {cut} of {len(texts)} texts are longer than {limit} tokens; the rest was not read "
                    "(said once)",
                    f"{self.name}：{len(texts)} 段文本中有 {cut} 段超过 {limit} 个词元，超出部分未读（仅提示一次）",
                )
            )
        return result

    def _encoded(self, texts: Sequence[str | Pair], first: int) -> list[list[list[int]]]:
        """The ids of each text, or of both texts of a pair; ``first`` is the number of the first text in errors."""
        parts = [[text] if isinstance(text, str) else list(text) for text in texts]
        try:
            ids = iter(self.tokenizer.encode_batch([part for both in parts for part in both]))
        except DataError:
            for index, both in enumerate(parts, start=first):
                for part in both:
                    try:
                        self.tokenizer.encode(part)
                    except DataError as error:
                        error.where = f"text {index}"
                        raise
            raise
        return [[next(ids) for _ in both] for both in parts]

    # Words -----------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def tag(self, sentence: str | Sequence[str]) -> list[tuple[str, str]]:
        """The label of each word: the best path where the head has a CRF, else each word's likeliest.

        Args:
            sentence: a list of words, or a text, of which every Han character, word and mark is one.

        Raises:
            UsageError: the network does not label words, or something that is no text.
            DataError: a lone surrogate.
        """
        words, scores_WL = self._word_scores(sentence)
        assert self.model.head is not None
        if not words:
            return []
        crf = self.model.head.crf
        if crf is None:
            best = scores_WL.argmax(-1).tolist()
        else:
            best = crf.decode(scores_WL.unsqueeze(0).to(self.device))[0]
        return [(word, self.labels[label]) for word, label in zip(words, best, strict=True)]

    @torch.inference_mode()
    def tag_probabilities(self, sentence: str | Sequence[str]) -> list[tuple[str, dict[str, float]]]:
        """Each word with the probability of every label (marginals where the head has a CRF); see :meth:`tag`."""
        words, scores_WL = self._word_scores(sentence)
        assert self.model.head is not None
        if not words:
            return []
        crf = self.model.head.crf
        if crf is None:
            probabilities_WL = scores_WL.softmax(-1)
        else:
            probabilities_WL = crf.marginals(scores_WL.unsqueeze(0).to(self.device))[0]
        return [
            (word, dict(zip(self.labels, row, strict=True)))
            for word, row in zip(words, probabilities_WL.tolist(), strict=True)
        ]

    def _word_scores(self, sentence: str | Sequence[str]) -> tuple[list[str], Tensor]:
        """The words and the scores of their labels, ``[W, L]``: those of the first token of each word."""
        self._require("token-classification", "tag")
        assert self.model.head is not None
        head = self.model.head
        words, pieces = self._pieces(sentence)
        room = self.max_length - self.wrapping.overhead()
        pieces = [piece[:room] for piece in pieces]
        spans = word_windows([len(piece) for piece in pieces], room, min(OVERLAP, room // 2))
        rows, places = [], []
        for start, end in spans:
            row = self.wrapping.wrap([id for piece in pieces[start:end] for id in piece])
            sizes = torch.tensor([0, *(len(piece) for piece in pieces[start:end])])
            rows.append(row)
            places.append((sizes.cumsum(0)[:-1] + row.starts[0]).to(self.device))

        def read(states_MD: Tensor, lengths_B: Tensor, indices: list[int]) -> list[Tensor]:
            scores_ML = head(states_MD).float()
            pieces = scores_ML.split(lengths_B.tolist())
            return [scores_TL[places[index]] for scores_TL, index in zip(pieces, indices, strict=True)]

        return words, stitch(spans, self.reader.run(rows, read), len(words))

    def _pieces(self, sentence: str | Sequence[str]) -> tuple[list[str], list[list[int]]]:
        """The words of a sentence and the ids of each, every word encoded by itself.

        A tokenizer that joins spaces to words gets the space before a word: the text's own, or in a list of words one
        before each but the first and those that begin with a Han character.
        """
        if isinstance(sentence, str):
            words, spaced, place = segment(sentence, "en"), [], 0
            for word in words:
                start = sentence.index(word, place)
                spaced.append(start > place)
                place = start + len(word)
        else:
            words = check_words(sentence)
            spaced = spaced_words(words)
        return words, word_pieces(self.tokenizer, words, spaced)

    # Answers ---------------------------------------------------------------------------------------------------------

    def answer(self, question: str, context: str, *, max_answer_tokens: int = LONGEST_ANSWER) -> Answer:
        """The best span of a context; a long one is read in overlapping windows, each beside the question.

        Raises:
            UsageError: the network does not find answers, or the question leaves no room for the context.
            DataError: a lone surrogate.
        """
        self._require("span-extraction", "answer")
        assert self.model.head is not None
        head = self.model.head
        question, context = check_words([question, context])
        if max_answer_tokens < 1:
            raise UsageError(
                f"max_answer_tokens must be at least 1, not {max_answer_tokens}", zh="max_answer_tokens 应至少为 1"
            )
        asked = self.tokenizer.encode(question)
        ids, offsets = self.tokenizer.encode_with_offsets(context)
        room = self.max_length - self.wrapping.overhead(pair=True)
        if len(asked) > room // 2:
            raise UsageError(
                f"the question has {len(asked)} tokens; at most {room // 2} leave room for the context",
                where=self.name,
                fix="shorten the question",
                zh=f"问题有 {len(asked)} 个词元，最多 {room // 2} 个才能为上下文留出空间。请缩短问题",
            )
        if not ids:
            return Answer("", 0, 0, float("-inf"), 0.0, 0.0)
        room -= len(asked)
        spans = windows(len(ids), room, min(OVERLAP, room // 2))
        rows = [self.wrapping.wrap(asked, ids[start:end]) for start, end in spans]
        scores = self.reader.run(
            rows, lambda states_MD, lengths_B, _: head(states_MD).float().split(lengths_B.tolist())
        )
        found = [
            best_span(scores_T2, row.starts[1], end - start, max_answer_tokens)
            for row, scores_T2, (start, end) in zip(rows, scores, spans, strict=True)
        ]
        index = max(range(len(found)), key=lambda place: found[place].score)
        best, begin = found[index], spans[index][0]
        start, end = offsets[begin + best.first][0], offsets[begin + best.last][1]
        text = context[start:end]
        start += len(text) - len(text.lstrip())  # tokens that carry the space before their word
        text = text.strip()
        lowest = min(span.no_answer_score for span in found)
        return Answer(text, start, start + len(text), best.score, lowest, best.probability)

    # Hidden words ----------------------------------------------------------------------------------------------------

    def fill(self, text: str, n: int = 5) -> list[list[Candidate]]:
        """The likeliest tokens for each mask in a text, for every mask by itself.

        Args:
            text: with the model's own mask token, ``[MASK]`` or ``<mask>``, once or more.
            n: how many candidates; control tokens are none.

        Raises:
            UsageError: the network does not fill in words, or the text has no mask.
            DataError: a lone surrogate.
        """
        self._require("masked-lm", "fill")
        return fill_masks(self, text, n)

    def pseudo_logprobs(self, text: str) -> Floats:
        """Log-probability of each token given all others, in nats, ``[T]``: each is masked in turn.

        Their sum is the pseudo-log-likelihood of Salazar et al. (2020). Takes one pass of the network per token.

        Raises:
            UsageError: the network does not fill in words, or something that is no text.
            DataError: a lone surrogate.
        """
        self._require("masked-lm", "pseudo_logprobs")
        return mask_each(self, text)

    # The network -----------------------------------------------------------------------------------------------------

    def _require(self, task: str, method: str) -> None:
        """Refuse what the network has no head for."""
        if self.task == task:
            return
        methods, ending, _, _ = ABILITIES[task]
        own, _, does, does_zh = ABILITIES.get(self.task, ((), "", "gives vectors only", "只给出向量"))
        able = ", ".join(("embed", *own))
        raise UsageError(
            f"this model cannot {method}: it {does}",
            where=self.name,
            why=f"{', '.join(methods)} need another head on the network",
            fix=f"use what it can ({able}), or load a model whose config.json names a class ...{ending}",
            zh=f"该模型不能 {method}：它的用途是{does_zh}，可用的方法：{able}。"
            f"如需 {method}，请换用 config.json 中结构为 ...{ending} 的模型",
        )
