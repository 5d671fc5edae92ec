"""What a fine-tuning learns: from the records of a task to token examples and their objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hanmo.cli.contexts import Fits, choose_context, choose_text_row, choose_window, record_lengths
from hanmo.cli.finetune import FinetuneSettings
from hanmo.errors import DataError, ModelError
from hanmo.language import pick
from hanmo.settings import Resolution, notice

if TYPE_CHECKING:
    from pathlib import Path

    from hanmo.data.corpus import Corpus
    from hanmo.models.heads import HeadConfig
    from hanmo.models.transformer import Transformer
    from hanmo.text.tokenizer import Tokenizer
    from hanmo.training.objectives import Objective

HEADS = {
    "classification": "sequence-classification",
    "tagging": "token-classification",
    "semantic-roles": "token-classification",
    "question-answering": "span-extraction",
}
MICRO_TOKENS = 8192  # that pass the network at once


@dataclass
class Goal:
    """A task, ready to be trained.

    Args:
        examples: units that a batch counts, in one pass over the data.
        tokens: that one pass reads.
        length: tokens of the longest unit, padded or packed.
        build: makes the objective once batch and micro-batch are settled.
        stop_ids: tokens that end an answer, at which generation must stop.
    """

    examples: int
    tokens: int
    length: int
    build: Callable[[], Objective[Any, Any]]
    stop_ids: frozenset[int] = frozenset()


def make_head(settings: FinetuneSettings, model: Transformer, train: Sequence[Any]) -> HeadConfig | None:
    """The head that the task needs; None where it needs none."""
    from hanmo.data.tasks import label_names
    from hanmo.models.architectures import default_head

    task = HEADS.get(settings.task)
    if task is None:
        return None
    labels = ("start", "end") if settings.task == "question-answering" else label_names(train)
    if settings.task == "classification" and len(labels) < 2:
        raise DataError(
            f"all records have the label '{labels[0] if labels else ''}'",
            fix="a classifier needs two labels at least",
            zh=f"所有记录的标签都是 '{labels[0] if labels else ''}'，分类至少需要两个标签",
        )
    choices: dict[str, Any] = {"multi_label": True} if settings.multi_label else {}
    choices |= {"crf": True} if settings.crf else {}
    try:
        return default_head(model.config, task, tuple(labels), **choices)
    except KeyError:
        raise ModelError(
            f"{model.config.model_type} has no form for {task}",
            fix="choose another base model: an encoder such as BERT, or a decoder for classification",
            zh=f"{model.config.model_type} 不支持 {task}，请换用编码器等其他基础模型",
        ) from None


def settle_micro_batch(settings: FinetuneSettings, resolution: Resolution, length: int, units: int = 1) -> None:
    """Examples that pass the network at once, so that memory stays moderate; the trainer halves it where it does not.

    Args:
        length: tokens of one text.
        units: texts of one example.
    """
    assert settings.batch_size is not None
    micro = max(1, min(settings.batch_size, MICRO_TOKENS // max(1, length * units)))
    resolution.compute(
        settings,
        "micro_batch",
        micro,
        pick(f"about {MICRO_TOKENS:,} tokens at a time", f"每次约 {MICRO_TOKENS:,} 个词元"),
    )


def sizes(settings: FinetuneSettings) -> dict[str, Any]:
    """Batch, micro-batch and seed of an objective, once they are settled."""
    assert settings.batch_size is not None and settings.micro_batch is not None
    return {"batch_size": settings.batch_size, "micro_batch": settings.micro_batch, "seed": settings.seed}


def supervised_goal(
    settings: FinetuneSettings,
    resolution: Resolution,
    model: Transformer,
    tokenizer: Tokenizer,
    train: Sequence[Any],
    validation: Sequence[Any],
    fits: Fits,
) -> Goal:
    """Classification, tagging (of roles, too), or the extraction of answers."""
    from hanmo.training.objectives.extraction import SpanExtraction
    from hanmo.training.objectives.rows import RowMaker
    from hanmo.training.objectives.supervised import Classification, Tagging

    head = model.config.head
    assert head is not None
    rows = RowMaker.of(model, tokenizer, truncate=settings.truncate)
    if settings.task == "question-answering":
        choose_window(settings, resolution, rows.context)
    else:
        overhead = rows.wrapping.overhead(pair=any(getattr(record, "pair", None) for record in train))
        choose_context(settings, resolution, record_lengths(train, tokenizer, overhead), rows.context, fits)
    rows = RowMaker.of(model, tokenizer, max_length=settings.context, truncate=settings.truncate)
    kind: Any = {
        "classification": Classification,
        "tagging": Tagging,
        "semantic-roles": Tagging,
        "question-answering": SpanExtraction,
    }[settings.task]
    prepared = [kind.prepare(split, rows, head) for split in (train, validation)]
    lengths = [len(example.ids) for example in prepared[0]]

    def build() -> Objective[Any, Any]:
        if settings.task == "classification":
            return Classification(prepared[0], prepared[1], head, balanced=settings.balanced, **sizes(settings))
        return kind(*prepared, **sizes(settings))  # type: ignore[no-any-return]

    return Goal(len(lengths), sum(lengths), max(lengths, default=1), build)


def pair_goal(
    settings: FinetuneSettings,
    resolution: Resolution,
    model: Transformer,
    tokenizer: Tokenizer,
    generation: dict[str, Any],
    train: Sequence[Any],
    validation: Sequence[Any],
    fits: Fits,
) -> Goal:
    """A text from another one, with an encoder-decoder."""
    from hanmo.training.objectives.seq2seq import SequenceToSequence, SourceRowMaker

    rows = SourceRowMaker.of(model, tokenizer, generation, truncate=settings.truncate)
    overhead = len(rows.prefix) + len(rows.suffix) + len(rows.start_ids) + 1
    limit = max(rows.source_context, rows.context)
    context = choose_context(settings, resolution, record_lengths(train, tokenizer, overhead), limit, fits)
    rows = SourceRowMaker.of(
        model,
        tokenizer,
        generation,
        max_source=context,
        max_target=context,
        truncate=settings.truncate,
        skip=settings.skip_long,
    )
    prepared = [SequenceToSequence.prepare(split, rows) for split in (train, validation)]
    lengths = [len(row.source) + len(row.inputs) for row in prepared[0]]
    return Goal(
        len(lengths),
        sum(lengths),
        max(lengths, default=1),
        lambda: SequenceToSequence(prepared[0], prepared[1], smoothing=settings.smoothing or 0.0, **sizes(settings)),
    )


def chat_form(tokenizer: Tokenizer, *, last_only: bool) -> Any:
    """How conversations are written: the model's template, or for a model without one its plain tokenizer."""
    from hanmo.text.chat_targets import ChatTargets

    return ChatTargets(tokenizer, last_only=last_only) if tokenizer.chat_template else tokenizer


def instruction_goal(
    settings: FinetuneSettings,
    resolution: Resolution,
    model: Transformer,
    tokenizer: Tokenizer,
    train: Sequence[Any],
    validation: Sequence[Any],
    fits: Fits,
) -> Goal:
    """The answers of conversations."""
    from hanmo.training.objectives.instructions import InstructionTuning, prepare_rows, trained_rows
    from hanmo.training.packing import pack

    chat = chat_form(tokenizer, last_only=settings.last_turn)
    whole = [len(row.ids) - 1 for record in train for row in trained_rows(record, chat)]
    limit, packed = model.config.max_position_embeddings, not settings.unpacked
    context = choose_context(settings, resolution, whole, limit, fits, packed=packed)
    prepared = [prepare_rows(split, chat, context=context, truncate=settings.truncate) for split in (train, validation)]
    lengths = [len(row.inputs) for row in prepared[0]]
    rows = len(lengths)
    if packed:
        packing = pack(lengths, context, settings.seed)
        notice(packing.describe())
        rows = len(packing.rows)
    return Goal(
        rows,
        sum(lengths),
        context if packed else max(lengths, default=1),
        lambda: InstructionTuning(prepared[0], prepared[1], context=context, packed=packed, **sizes(settings)),
        frozenset(getattr(chat, "stop_ids", ())),
    )


def preference_goal(
    settings: FinetuneSettings,
    resolution: Resolution,
    model: Transformer,
    tokenizer: Tokenizer,
    run: Path,
    train: Sequence[Any],
    validation: Sequence[Any],
    fits: Fits,
) -> Goal:
    """Which of two answers is better."""
    from hanmo.training.objectives.preferences import (
        PreferenceLoss,
        PreferenceTuning,
        answer_of,
        prepare_pairs,
        with_reference,
    )

    chat = chat_form(tokenizer, last_only=True)
    whole = [
        max(len(answer_of(record, text, chat).ids) - 1 for text in (record.chosen, record.rejected))
        for record in train
        if record.chosen.strip() and record.rejected.strip()
    ]
    context = choose_context(settings, resolution, whole, model.config.max_position_embeddings, fits)
    kind = PreferenceLoss(settings.preference_loss, settings.beta)
    prepared: list[Any] = [
        prepare_pairs(split, chat, context=context, truncate=settings.truncate) for split in (train, validation)
    ]
    lengths = [max(len(row.chosen.inputs), len(row.rejected.inputs)) for row in prepared[0]]

    def build() -> Objective[Any, Any]:
        splits = prepared
        if kind.needs_reference:
            assert settings.micro_batch is not None
            splits = [
                with_reference(
                    model, split, micro_batch=settings.micro_batch, cache=run / f"reference-{name}.safetensors"
                )
                for name, split in zip(("train", "validation"), prepared, strict=True)
            ]
        return PreferenceTuning(splits[0], splits[1], kind, **sizes(settings))

    stops = frozenset(getattr(chat, "stop_ids", ()))
    return Goal(len(lengths), 2 * sum(lengths), max(lengths, default=1), build, stop_ids=stops)


def embedding_goal(
    settings: FinetuneSettings,
    resolution: Resolution,
    model: Transformer,
    tokenizer: Tokenizer,
    folder: Path,
    train: Sequence[Any],
    validation: Sequence[Any],
    fits: Fits,
) -> Goal:
    """Vectors that are near each other for texts that belong together."""
    from hanmo.inference.pooling import Pooling, read_pooling
    from hanmo.training.objectives.contrastive import Contrastive
    from hanmo.training.objectives.rows import RowMaker

    pooling = read_pooling(folder) or Pooling()
    rows = RowMaker.of(model, tokenizer, max_length=pooling.max_length, truncate=settings.truncate)
    whole = record_lengths(train, tokenizer, rows.wrapping.overhead())
    rows = replace(rows, context=choose_context(settings, resolution, whole, rows.context, fits))
    prepared = [
        Contrastive.prepare(split, rows, pooling, min_score=settings.min_score) for split in (train, validation)
    ]
    lengths = [row.length for row in prepared[0]]
    group = max(2, min(settings.group, len(lengths)))
    return Goal(
        max(1, len(lengths) // group),
        sum(lengths),
        group * max(lengths, default=1),
        lambda: Contrastive(
            prepared[0], prepared[1], pooling=pooling, group=group, temperature=settings.temperature, **sizes(settings)
        ),
    )


def text_goal(
    settings: FinetuneSettings,
    resolution: Resolution,
    model: Transformer,
    tokenizer: Tokenizer,
    corpus: Corpus,
    fits: Fits,
) -> Goal:
    """The next token of plain texts, which stand in the rows one after the other and do not see each other."""
    import numpy as np

    from hanmo.training.objectives import CausalLanguageModeling
    from hanmo.training.preflight import check_separator

    tokens = corpus.tokenize(tokenizer)
    train, validation = tokens.tokens("train"), tokens.tokens("validation")
    check_separator(train, tokens.eos_id, tokenizer)
    documents = np.diff(tokens.document_spans("train")).tolist()
    limit = model.config.max_position_embeddings
    context = choose_text_row(settings, resolution, documents, min(len(train), len(validation)) - 1, limit, fits)
    return Goal(
        max(1, len(train) // context),
        len(train),
        context,
        lambda: CausalLanguageModeling(train, validation, context=context, separator=tokens.eos_id, **sizes(settings)),
        frozenset({tokens.eos_id}),
    )
