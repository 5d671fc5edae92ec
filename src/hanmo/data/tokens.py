"""Token shards: a tokenised corpus as memory-mapped arrays of uint16 or uint32.

Each document is followed by the end-of-text token. A shard holds at most 64 Mi tokens; a document may run on from one
shard into the next, and :class:`TokenArray` hides the seams.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hanmo.data.corpus import FORMAT, Corpus
from hanmo.data.splits import SPLITS
from hanmo.errors import DataError, HanmoError, ModelError
from hanmo.folder import MANIFEST, atomic_folder, read_manifest, verify
from hanmo.language import pick
from hanmo.progress import Progress
from hanmo.settings import notice

if TYPE_CHECKING:
    from hanmo.text.tokenizer import Tokenizer

KIND = "tokens"
SHARD_TOKENS = 1 << 26
BATCH_BYTES = 1 << 22


class TokenArray:
    """All tokens of a split as one read-only array across shards: ``len(tokens)``, ``tokens[start:stop]``."""

    def __init__(self, shards: Sequence[np.ndarray], dtype: np.dtype[Any]) -> None:
        self.shards = list(shards)
        self.dtype = dtype
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)]).tolist()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: slice) -> np.ndarray:
        """The tokens ``[start:stop]``: a view of the mapped file within a shard, a copy across shards."""
        if not isinstance(key, slice):
            raise TypeError("a TokenArray is read in slices: tokens[start:stop]")
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise ValueError("a TokenArray is read in slices of step 1")
        if stop <= start:
            return np.empty(0, dtype=self.dtype)
        parts = []
        for number in range(bisect_right(self.starts, start) - 1, len(self.shards)):
            begin = self.starts[number]
            if begin >= stop:
                break
            parts.append(self.shards[number][max(0, start - begin) : stop - begin])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class TokenCorpus:
    """The token shards of a corpus for one tokenizer.

    Attributes:
        vocab_size, eos_id: of the tokenizer; every document ends with ``eos_id``.
        report: tokens per split, characters and bytes per token.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.vocab_size: int = manifest["vocab_size"]
        self.eos_id: int = manifest["eos_id"]
        self.report: dict[str, Any] = manifest["report"]
        self.dtype = np.dtype(manifest["dtype"])

    @classmethod
    def open(cls, folder: str | Path) -> TokenCorpus:
        """Open a folder of token shards.

        Raises:
            DataError: it is missing, damaged or of another version.
        """
        folder = Path(folder)
        try:
            manifest = read_manifest(folder)
            if manifest.get("kind") != KIND or manifest.get("format") != FORMAT:
                raise ModelError("no token shards of this version", where=str(folder))
            verify(folder, hashes=False)
        except ModelError as error:
            raise DataError(
                f"the token shards cannot be used: {error.what}",
                where=error.where,
                why=error.why,
                fix=f"delete {folder}; they are written again when needed",
                zh=f"分词数据不可用，请删除 {folder}，需要时会重新生成",
            ) from error
        return cls(folder, manifest)

    def num_tokens(self, split: str) -> int:
        """Number of tokens, end-of-text tokens included."""
        return int(self.manifest["tokens"][split])

    def num_bytes(self, split: str) -> int:
        """UTF-8 bytes of the documents (the end-of-text token has none)."""
        return int(self.manifest["bytes"][split])

    def tokens(self, split: str) -> TokenArray:
        """The tokens of a split, memory-mapped."""
        shards = [np.memmap(path, dtype=self.dtype, mode="r") for path in sorted(self.folder.glob(f"{split}-*.bin"))]
        return TokenArray(shards, self.dtype)

    def document_spans(self, split: str) -> np.ndarray:
        """Where each document begins and the last one ends, int64 ``[n+1]``; each includes its final ``eos_id``."""
        spans: np.ndarray = np.load(self.folder / f"{split}.offsets.npy", allow_pickle=False)
        return spans


class ShardWriter:
    """Writes tokens to numbered shards of at most ``shard_tokens``."""

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.count = 0

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens."""
        while len(tokens):
            number, used = divmod(self.count, self.shard_tokens)
            part = tokens[: self.shard_tokens - used]
            with (self.folder / f"{self.split}-{number:05d}.bin").open("ab") as stream:
                stream.write(part.tobytes())
            self.count += len(part)
            tokens = tokens[len(part) :]


def tokenize(corpus: Corpus, tokenizer: Tokenizer, *, shard_tokens: int = SHARD_TOKENS) -> TokenCorpus:
    """Write (or reuse) ``tokens-<fingerprint>/`` in the corpus folder. See :meth:`Corpus.tokenize`."""
    eos = tokenizer.eos_id
    if eos is None:
        raise ModelError(
            "the tokenizer has no end-of-text token",
            why="it divides the documents; without it a model never learns to stop",
            fix="train one with  hanmo tokenizer, or choose another model",
        )
    target = corpus.folder / f"tokens-{tokenizer.fingerprint[:12]}"
    identity = {"tokenizer": tokenizer.fingerprint, "corpus": corpus.fingerprint}
    if (target / MANIFEST).exists():
        try:
            existing = TokenCorpus.open(target)
            if all(existing.manifest.get(key) == value for key, value in identity.items()):
                return existing
            notice(f"{target}: made from other text or another tokenizer; writing it again")
        except HanmoError as error:
            notice(f"{error}\n{target}: writing it again")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    manifest: dict[str, Any] = {
        "kind": KIND,
        "format": FORMAT,
        **identity,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": eos,
        "dtype": dtype.str,
        "tokens": {},
        "bytes": {split: corpus.num_bytes(split) for split in SPLITS},
    }
    with (
        atomic_folder(target, manifest) as folder,
        Progress(pick("tokenizing", "分词"), sum(manifest["bytes"].values()), "bytes") as progress,
    ):
        for split in SPLITS:
            writer = ShardWriter(folder, split, shard_tokens)
            lengths = [np.zeros(1, dtype=np.int64)]
            for tokens, document_lengths, size in encoded_batches(corpus, tokenizer, split, eos, dtype):
                writer.write(tokens)
                lengths.append(document_lengths)
                progress.update(progress.done + size)
            np.save(folder / f"{split}.offsets.npy", np.cumsum(np.concatenate(lengths)))
            manifest["tokens"][split] = writer.count
        manifest["report"] = token_report(corpus, manifest)
    return TokenCorpus(target, read_manifest(target))


def token_report(corpus: Corpus, manifest: dict[str, Any]) -> dict[str, Any]:
    """Tokens per split, and how much text a token stands for."""
    characters = sum(entry["characters"] for entry in corpus.report["splits"].values())
    tokens = sum(manifest["tokens"].values())
    text_tokens = max(1, tokens - sum(entry["documents"] for entry in corpus.report["splits"].values()))
    return {
        "vocab_size": manifest["vocab_size"],
        "tokens": dict(manifest["tokens"]),
        "characters_per_token": characters / text_tokens,
        "bytes_per_token": sum(manifest["bytes"].values()) / text_tokens,
    }


Batch = tuple[list[str], list[bool], int]


def text_batches(corpus: Corpus, split: str) -> Iterator[Batch]:
    """Texts of about 4 MB together, whether each ends its document, and their bytes."""
    texts: list[str] = []
    ends: list[bool] = []
    size = 0
    for text, is_end in corpus.pieces(split, BATCH_BYTES):
        texts.append(text)
        ends.append(is_end)
        size += len(text) if text.isascii() else len(text.encode("utf-8"))
        if size >= BATCH_BYTES:
            yield texts, ends, size
            texts, ends, size = [], [], 0
    if texts:
        yield texts, ends, size


def encoded_batches(
    corpus: Corpus, tokenizer: Tokenizer, split: str, eos_id: int, dtype: np.dtype[Any]
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """For each batch its tokens, the lengths of the documents that end in it (int64) and its bytes.

    The next batch is encoded (in native code, which leaves Python free) while this one is assembled and written.
    """
    begun = 0  # tokens of a long document whose end is in a later batch
    separator = np.array([eos_id], dtype=np.uint32)
    waiting: tuple[list[bool], int, Future[Any]] | None = None
    with ThreadPoolExecutor(max_workers=1) as executor:
        for batch in chain(text_batches(corpus, split), [None]):
            ready, waiting = waiting, None
            if batch:
                texts, ends, size = batch
                waiting = ends, size, executor.submit(tokenizer.encode_documents, texts)
            if ready:
                ends, size, future = ready
                parts, lengths = [], []
                for ids, is_end in zip(future.result(), ends, strict=True):
                    parts.append(ids)
                    begun += len(ids)
                    if is_end:
                        parts.append(separator)
                        lengths.append(begun + 1)
                        begun = 0
                tokens = in_vocabulary(np.concatenate(parts), tokenizer.vocab_size).astype(dtype)
                yield tokens, np.array(lengths, dtype=np.int64), size


def in_vocabulary(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids, after a look that a model with ``vocab_size`` rows has them all.

    Raises:
        ModelError: it has not, so the tokenizer and its ``vocab_size`` disagree.
    """
    largest = int(ids.max(initial=0))
    if largest >= vocab_size:
        raise ModelError(
            f"the tokenizer gave the id {largest}, but its vocabulary has {vocab_size} entries",
            why="a model of that size has no such row",
            fix="use the tokenizer that belongs to the model",
        )
    return ids
