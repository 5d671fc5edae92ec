"""The data of a fine-tuning: records of its task, or plain texts, divided into those to learn from and the others."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.finetune import FinetuneSettings
from hanmo.cli.learners import is_learner
from hanmo.errors import DataError
from hanmo.language import pick
from hanmo.settings import notice

if TYPE_CHECKING:
    from hanmo.data.corpus import Corpus

KINDS = {  # the records of each task
    "classification": "labelled",
    "tagging": "tagged",
    "semantic-roles": "roles",
    "question-answering": "question_answer",
    "seq2seq": "pair",
    "instructions": "dialogue",
    "preferences": "preference",
    "embeddings": "similar",
}
VALIDATION_SHARE = 0.1
SHOWN = 3  # records that repeat others, which are all counted


@dataclass
class Splits:
    """The records to train and to validate on, or a corpus of texts; and the hash of all of them."""

    train: list[Any]
    validation: list[Any]
    digest: str
    corpus: Corpus | None = None


def read_splits(run: Path, settings: FinetuneSettings, *, follower: bool) -> Splits:
    """The data to train on, and those to validate on: of a file of their own, or a share that has no text in common.

    Args:
        run: the folder of the run, where texts are prepared.
        follower: another process has prepared them.

    Raises:
        DataError: nothing can be learned from the files; the message names file and line.
    """
    from hanmo.cli.road import prepare_corpus
    from hanmo.data.tasks import Shares, check_labels, split_records

    if settings.task == "text":
        corpus = prepare_corpus(settings.paths, settings, run / "data", unchanged=settings.resume or follower)
        return Splits([], [], corpus.fingerprint, corpus)

    kind = KINDS[settings.task]
    apart = [] if settings.validation is None else [[settings.validation]]
    records, *others = [
        similar_enough(found, settings.min_score) for found in settings.read(kind, settings.paths, *apart)
    ]
    if others:
        train, validation = records, others[0]
    else:
        share = VALIDATION_SHARE if settings.validation_share is None else settings.validation_share
        split = split_records(records, Shares(validation=share, test=0.0), settings.seed)
        del split.report.counts["test"]  # it is empty
        del split.report.examples[SHOWN:]
        notice(split.report.describe())
        train, validation = list(split.train), list(split.validation)
    if settings.task == "semantic-roles" and not is_learner(settings):
        train, validation = marked(train, validation)
        check_labels(train, validation)
    if settings.both_ways:
        from hanmo.cli.fresh import both_ways

        train, validation = both_ways(train), both_ways(validation)
    if settings.task in ("classification", "tagging"):
        check_labels(train, validation)
    digest = hashlib.sha256()
    for record in (*train, *validation):
        content = {name: value for name, value in vars(record).items() if name not in ("file", "line")}
        digest.update(repr(sorted(content.items())).encode("utf-8", "surrogatepass"))
    return Splits(train, validation, digest.hexdigest()[:16])


def marked(train: list[Any], validation: list[Any]) -> tuple[list[Any], list[Any]]:
    """Predicates with their roles as sentences with a marked predicate and tags; roles that training never shows are
    left out of validation, and counted.
    """
    from hanmo.tasks.semantic_roles import tags_of, to_tagged

    known = tags_of(train)
    unseen = sum(any(tag not in known for tag in to_tagged(record).tags) for record in validation)
    if unseen:
        notice(
            pick(
                f"{unseen:,} of {len(validation):,} validation records have a role that training never shows; "
                "it is left out there",
                f"{len(validation):,} 条验证记录中有 {unseen:,} 条含训练集没有的角色，这些角色不参与验证",
            )
        )
    return [to_tagged(record) for record in train], [to_tagged(record, known) for record in validation]


def similar_enough(records: list[Any], least: float | None) -> list[Any]:
    """Those records whose texts belong together, where they say how similar these are; the others are counted.

    Raises:
        DataError: none is left.
    """
    if least is None:
        return records
    kept = [record for record in records if record.score is None or record.score >= least]
    if not kept:
        best = max(record.score for record in records)
        raise DataError(
            f"no record has a score of {least:g} or more; the highest is {best:g}",
            where=records[0].file,
            fix="give a lower --min-score",
            zh=f"没有相似度达到 {least:g} 的记录（最高 {best:g}）；请调低 --min-score",
        )
    if left_out := len(records) - len(kept):
        notice(
            pick(
                f"{left_out:,} records with a score below {least:g} are left out",
                f"{left_out:,} 条记录的相似度低于 {least:g}，未采用",
            )
        )
    return kept
