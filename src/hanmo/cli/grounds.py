"""What questions are about: a text, the documents of a folder, or the texts of all records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.errors import DataError, UsageError
from hanmo.settings import flag, option

if TYPE_CHECKING:
    from hanmo.data.readers import Document

NEEDS_SEARCH = ("top", "vectors")
LONGEST_NAME = 1024  # characters of the name of a file


@dataclass
class GroundSettings:
    """For verbs that put tasks to models; together with the settings of data and engines."""

    context: str | None = option(
        None,
        "question answering: a text, or a file, that the questions are about",
        zh="问答：问题所依据的文本或文件",
        metavar="TEXT",
    )
    documents: list[str] = option(
        [],
        "question answering: files or a folder in which the passages are searched that tell; may be repeated",
        zh="问答：在这些文件或文件夹中检索段落后作答；可重复给出",
        metavar="PATH",
    )
    top: int | None = option(
        None,
        "question answering: how many of the passages that are found are read; default 5",
        zh="问答：阅读检索到的前几个段落；默认 5",
    )
    vectors: str | None = option(
        None,
        "question answering: an encoder whose vectors find passages, too, e.g. all-minilm-l6-v2",
        zh="问答：同时用该编码器的向量检索段落，如 all-minilm-l6-v2",
        metavar="MODEL",
    )
    threshold: float = option(
        0.0,
        "question answering: an answer must score so much higher than none; higher answers less often",
        zh="问答：答案得分须比“无答案”高出多少；越大越少作答",
    )

    def ground(self, task: Any, records: Sequence[Any] = ()) -> None:
        """Tell the task what questions are about, if anything was said about it.

        Args:
            records: whose texts are searched.

        Raises:
            UsageError: the task has no use for it, or there is nothing to search.
            DataError: a file cannot be read, or has no text.
        """
        from hanmo.tasks.base import Ground

        own: Any = self
        for name in NEEDS_SEARCH:
            if getattr(self, name) is not None and not self.documents and not records:
                raise UsageError(
                    f"{flag(name)} is for a search",
                    fix="give files or folders with --documents, or leave it out",
                    zh=f"{flag(name)} 用于检索，需与 --documents 合用",
                )
        usual = GroundSettings()
        if all(getattr(self, name) == getattr(usual, name) for name in vars(usual)) and not records:
            return
        encoder = None
        if self.vectors is not None:
            from hanmo.inference.loading import load

            encoder = load(self.vectors, device=own.device, offline=own.offline)
            if not hasattr(encoder, "embed"):
                raise UsageError(
                    f"'{self.vectors}' gives no vectors of texts",
                    fix="--vectors all-minilm-l6-v2",
                    zh=f"'{self.vectors}' 不能给出文本向量，例如可用 --vectors all-minilm-l6-v2",
                )
        context = None if self.context is None else self.text_of(self.context)
        documents = self.read_texts(self.documents) if self.documents else None
        top = 5 if self.top is None else self.top
        task.ground(Ground(context, documents, records, encoder, top, self.threshold))

    def read_texts(self, paths: Sequence[str], *, whole: bool = False) -> list[Document]:
        """The documents of files."""
        from hanmo.data.readers import Reader
        from hanmo.data.sources import find_sources

        own: Any = self
        return list(Reader(find_sources(paths).sources, own, whole=whole).documents())

    def text_of(self, given: str) -> str:
        """A text, or that of the file of this name.

        Raises:
            DataError: the text or the file is empty, or the file is not to be read.
        """
        named = len(given) <= LONGEST_NAME and "\n" not in given and "\0" not in given and Path(given).is_file()
        text = "".join(document.text for document in self.read_texts([given], whole=True)) if named else given
        if not text.strip():
            raise DataError(
                "there is no text in it",
                where=given if named else "--context",
                fix="give a text or a file with text",
                zh="其中没有文本，请给出文本或含有文本的文件",
            )
        return text
