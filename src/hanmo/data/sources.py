"""From paths to files: folders, globs, names that do not exist, and what is left out."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from hanmo.errors import DataError, nearest
from hanmo.folder import MANIFEST

IGNORED_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages"})
HASH_BLOCK = 1 << 20


@dataclass
class Source:
    """One file of the input, and what was learnt about it while it was read.

    Attributes:
        path: where it is.
        name: how it is called in reports and errors.
        named: whether the user named this very file (then an unusable one is an error, not skipped).
        format: ``text``, ``source``, ``jsonl``, ``json``, ``csv``, ``tsv``, ``parquet``.
        encoding: Python codec that was used; ``""`` for parquet and skipped files.
        field: the text field of a file with records, and why it was taken.
        digest: hash of the content (of a skipped file: of the beginning that decided so).
        skipped: why the file was not used, else ``""``.
    """

    path: Path
    name: str
    size: int
    mtime_ns: int
    named: bool = False
    format: str = ""
    encoding: str = ""
    field: str = ""
    digest: str = ""
    skipped: str = ""

    def record(self) -> dict[str, Any]:
        """The entry of the cache manifest: enough to tell later whether the file is still the same."""
        return {
            "name": self.name,
            "path": str(self.path.absolute()),
            "size": self.size,
            "mtime_ns": self.mtime_ns,
            "digest": self.digest,
            "skipped": self.skipped,
        }


@dataclass
class Listing:
    """The files found, and how many hidden ones were passed over."""

    sources: list[Source] = field(default_factory=list)
    hidden: int = 0


def find_sources(paths: Iterable[str | Path]) -> Listing:
    """List the files under ``paths`` (files, folders, globs): in the order given, sorted inside a folder, each once.

    Hidden files, ``__pycache__`` and the like, and folders that Hanmo wrote are passed over.

    Raises:
        DataError: a path does not exist (the nearest existing name is told), or no file was found.
    """
    listing = Listing()
    seen: set[str] = set()
    given = [str(path) for path in paths]
    if not given:
        raise DataError(
            "no path was given", fix="name files, folders or globs", zh="没有给出路径，请指定文件、文件夹或通配符"
        )
    for text in given:
        path = Path(text).expanduser()
        if path.is_dir():
            # within a single folder names are relative to it, so that a folder that moves keeps its fingerprint
            alone = len(given) == 1
            found = [
                (file, (file.relative_to(path) if alone else file).as_posix(), False) for file in walk(path, listing)
            ]
        elif path.exists():
            found = [(path, text, True)]
        else:
            found = [(file, str(file), False) for file in expand(text, listing)]
        for file, name, named in found:
            real = os.path.realpath(file)
            if real not in seen and file.is_file():
                seen.add(real)
                status = file.stat()
                listing.sources.append(Source(file, name, status.st_size, status.st_mtime_ns, named))
    if not listing.sources:
        where = ", ".join(given)
        hidden = f" ({listing.hidden} hidden ones were passed over)" if listing.hidden else ""
        raise DataError(
            f"no file was found{hidden}",
            where=where,
            fix="put .txt, .md, .jsonl, .csv, .parquet or source files there, or name another path",
            zh=f"{where} 中没有可读的文件，请放入 .txt、.md、.jsonl、.csv、.parquet 或源代码文件，或换一个路径",
        )
    return listing


def walk(folder: Path, listing: Listing) -> list[Path]:
    """The files below a folder, sorted by path.

    Raises:
        DataError: the folder itself was written by Hanmo and holds no text of the user.
    """
    if (folder / MANIFEST).exists():
        raise DataError(
            "this folder was written by Hanmo; it is not a folder of texts",
            where=str(folder),
            fix="name the folder with your own files",
            zh="这是 Hanmo 生成的文件夹，不是文本文件夹，请指定存放原始文本的文件夹",
        )
    files = []
    for current, folders, names in os.walk(folder):
        listing.hidden += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name not in IGNORED_FOLDERS and not Path(current, name, MANIFEST).exists()
        )
        files += [Path(current, name) for name in names if not name.startswith(".")]
    return sorted(files)


def expand(text: str, listing: Listing) -> list[Path]:
    """The files that a glob matches; folders it matches are walked.

    Raises:
        DataError: nothing matches, or the text is a plain path that does not exist.
    """
    if not glob.has_magic(text):
        parent = Path(text).parent
        while not parent.is_dir():
            parent = parent.parent
        missing = Path(text).relative_to(parent).parts[0]
        known = [entry.name for entry in parent.iterdir()]
        hint = nearest(missing, known) if known and len(known) < 1000 else f"look in {parent}"
        if len(hint) > 300:
            hint = hint[:300] + "..."
        raise DataError(
            f"there is no '{missing}' in {parent.absolute()}",
            where=text,
            fix=hint,
            zh=f"找不到这个路径：{parent.absolute()} 中没有 '{missing}'。{hint}",
        )
    matches = sorted(glob.glob(text, recursive=True))  # noqa: PTH207 (absolute and ** patterns alike)
    if not matches:
        raise DataError("no file matches this pattern", where=text, fix="try  ls " + text, zh="没有文件符合这个通配符")
    files: list[Path] = []
    for match in map(Path, matches):
        files += walk(match, listing) if match.is_dir() else [match]
    return files


class HashingFile(io.RawIOBase):
    """A file that hashes its bytes and tells how many passed while it is read from start to end."""

    def __init__(self, path: Path, on_read: Callable[[int], None] | None = None) -> None:
        super().__init__()
        self.file = path.open("rb", buffering=0)
        self.hash = blake2b(digest_size=16)
        self.on_read = on_read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.file.readinto(buffer) or 0
        self.hash.update(memoryview(buffer)[:count])
        if self.on_read:
            self.on_read(count)
        return count

    def finish(self) -> str:
        """Read what is left and return the hex hash of the whole file."""
        buffer = bytearray(HASH_BLOCK)
        while self.readinto(buffer):
            pass
        return self.hash.hexdigest()

    def close(self) -> None:
        self.file.close()
        super().close()


def file_digest(path: Path, first: int | None = None) -> str:
    """Hex hash of a file as :class:`HashingFile` computes it, or of its ``first`` bytes."""
    if first is not None:
        with path.open("rb") as stream:
            return blake2b(stream.read(first), digest_size=16).hexdigest()
    with HashingFile(path) as stream:
        return stream.finish()
