"""A prepared corpus on disk: UTF-8 documents end to end, their offsets, their origins and the report."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hanmo.data.sections import safe_cut
from hanmo.data.splits import SPLITS
from hanmo.errors import DataError, ModelError, UsageError, nearest
from hanmo.folder import MANIFEST, read_json, read_manifest, verify

if TYPE_CHECKING:
    from hanmo.data.tokens import TokenCorpus
    from hanmo.text.tokenizer import Tokenizer

KIND = "corpus"
FORMAT = 1
READ_BLOCK = 1 << 22


class Corpus:
    """Documents of a prepared folder, by split (``train``, ``validation``, ``test``).

    Attributes:
        folder: where it lies.
        report: the data report, plain data.
        fingerprint: hash of inputs and settings.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.report: dict[str, Any] = read_json(folder / "report.json")

    @classmethod
    def open(cls, folder: str | Path, *, hashes: bool = False) -> Corpus:
        """Open a prepared folder.

        Args:
            folder: what :func:`hanmo.data.prepare.prepare` wrote.
            hashes: read everything and compare it with the manifest, not only presence and size.

        Raises:
            DataError: not a prepared folder, of another version, or damaged.
        """
        folder = Path(folder)
        fix = "prepare it again: hanmo data <your texts> --out " + str(folder)
        if not (folder / MANIFEST).is_file():
            raise DataError(
                "this is not a prepared corpus",
                where=str(folder),
                fix=fix,
                zh=f"这不是已准备好的语料，请先运行 hanmo data <文本> --out {folder}",
            )
        try:
            manifest = read_manifest(folder)
            if manifest.get("kind") != KIND:
                raise DataError("this folder holds something else than a corpus", where=str(folder), fix=fix)
            if manifest.get("format") != FORMAT:
                raise DataError("the corpus was prepared by another version of Hanmo", where=str(folder), fix=fix)
            verify(folder, hashes=hashes)
            return cls(folder, manifest)
        except ModelError as error:
            raise DataError(
                f"the prepared corpus is damaged: {error.what}",
                where=error.where or str(folder),
                why=error.why,
                fix=fix,
                zh=f"已准备的语料损坏，请重新运行 hanmo data <文本> --out {folder}",
            ) from error

    def offsets(self, split: str) -> np.ndarray:
        """Byte offsets of the documents, int64 ``[n+1]``, memory-mapped.

        Raises:
            UsageError: there is no such split.
        """
        if split not in SPLITS:
            raise UsageError(f"there is no split '{split}'", fix=nearest(split, SPLITS))
        path = self.folder / f"{split}.offsets.npy"
        offsets: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        return offsets

    def num_documents(self, split: str) -> int:
        """Number of documents."""
        return len(self.offsets(split)) - 1

    def num_bytes(self, split: str) -> int:
        """UTF-8 bytes of the documents."""
        return int(self.offsets(split)[-1])

    def document(self, split: str, index: int) -> str:
        """One document."""
        start, end = self.offsets(split)[index : index + 2].tolist()
        with (self.folder / f"{split}.text").open("rb") as stream:
            stream.seek(start)
            return stream.read(end - start).decode("utf-8")

    def origin(self, split: str, index: int) -> str:
        """Where a document is from, as ``file:line``."""
        origins = np.load(self.folder / f"{split}.origins.npy", mmap_mode="r", allow_pickle=False)
        file, line = origins[index].tolist()
        return f"{self.manifest['inputs'][file]['name']}:{line}"

    def documents(self, split: str) -> Iterator[str]:
        """The documents in order; only a few megabytes (or one document, if larger) are held."""
        for data, bounds in self.blocks(split):
            for start, end in pairwise(bounds):
                yield data[start:end].decode("utf-8")

    def blocks(self, split: str) -> Iterator[tuple[bytes, list[int]]]:
        """Runs of whole documents of about 4 MB: their bytes, and where each begins (and the last ends) in them."""
        offsets = self.offsets(split)
        first, count = 0, len(offsets) - 1
        with (self.folder / f"{split}.text").open("rb") as stream:
            while first < count:
                begin = int(offsets[first])
                last = int(np.searchsorted(offsets, begin + READ_BLOCK, side="right")) - 1
                last = max(first + 1, min(last, count))
                bounds = (offsets[first : last + 1] - begin).tolist()
                yield stream.read(bounds[-1]), bounds
                first = last

    def pieces(self, split: str, size: int = READ_BLOCK) -> Iterator[tuple[str, bool]]:
        """The documents, long ones in pieces of about ``size`` bytes: each text, and whether it ends its document.

        Pieces of a document begin with a line that is not blank where there is one, so that tokenising them one by one
        gives the tokens of the whole: no usual pre-tokeniser joins a line end with the letter after it.
        """
        offsets = self.offsets(split)
        with (self.folder / f"{split}.text").open("rb") as stream:
            if not len(offsets) or int(np.diff(offsets).max(initial=0)) <= size:
                for text in self.documents(split):
                    yield text, True
                return
            for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                stream.seek(start)
                left = end - start
                carry = b""
                while left > 0:
                    block = carry + stream.read(min(size, left))
                    left -= min(size, left)
                    cut = piece_end(block) if left else len(block)
                    yield block[:cut].decode("utf-8"), not left
                    carry = block[cut:]

    def tokenize(self, tokenizer: Tokenizer) -> TokenCorpus:
        """Token shards of this corpus for a tokenizer: those in the folder if they fit, else written now.

        Raises:
            ModelError: the tokenizer has no end-of-text token.
            ResourceError: the disk is full.
        """
        from hanmo.data.tokens import tokenize

        return tokenize(self, tokenizer)


def piece_end(block: bytes) -> int:
    """Where to end a piece of a long document: before a line that begins with a visible character, if there is one."""
    end = len(block)
    for _ in range(1000):
        end = block.rfind(b"\n", 0, end)
        if end <= 0:
            break
        following = block[end + 1 : end + 4]
        if len(following) == 3 and not following[:1].isspace() and following != b"\xe3\x80\x80":
            return end + 1
    text = block.decode("utf-8", "ignore")  # the last character may be cut
    return len(text[: safe_cut(text, len(text) - 1)].encode("utf-8"))
