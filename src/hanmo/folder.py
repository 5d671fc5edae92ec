"""Folders on disk that are either whole or not there: the model folder and everything written like it.

A folder is written under a temporary name beside its place, every file is flushed to the disk, a manifest with the size
and SHA-256 of each file is added, and only then does one ``rename`` put it in place. A reader checks the manifest, so a
truncated or altered file is found before anything is loaded. No pickle is ever written or read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hanmo.errors import ModelError, ResourceError

MANIFEST = "hanmo.json"
CHUNK = 1 << 20


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ModelError: the file is missing or is not JSON; the message gives file and line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError("the file is missing", where=str(path)) from None
    except json.JSONDecodeError as error:
        raise ModelError(f"not valid JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
    except UnicodeDecodeError:
        raise ModelError("not valid UTF-8", where=str(path)) from None


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON: sorted by the caller, UTF-8, a newline at the end."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def fsync_path(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(target: Path, manifest: dict[str, Any] | None = None) -> Iterator[Path]:
    """Write a folder completely or not at all.

    Yields a temporary folder beside ``target``. When the block ends, its files are hashed into ``hanmo.json`` together
    with the entries of ``manifest``, flushed, and renamed to ``target`` (an older folder there is replaced). When the
    block fails, the temporary folder is removed and ``target`` is as it was.

    Raises:
        ResourceError: the disk is full or cannot be written; what stood at ``target`` is intact.
    """
    temporary = target.parent / f".{target.name}.tmp-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        seal(temporary, manifest or {})
        replace_folder(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES):
            raise ResourceError(
                f"could not write the folder: {error.strerror}",
                where=str(target),
                why="what stood there before is intact",
                fix="free some space, or choose another place with --out",
                zh=f"无法写入文件夹（{error.strerror}），原有内容完好。请腾出空间或用 --out 换一个位置",
            ) from error
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write ``hanmo.json`` with the size and hash of every file in ``folder`` and flush everything."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            fsync_path(path)
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(folder / MANIFEST, {**manifest, "files": files})
    fsync_path(folder / MANIFEST)
    fsync_path(folder)


def replace_folder(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; a folder already there steps aside first and is removed last."""
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    fsync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The entries of ``hanmo.json``; empty where the folder comes from another tool and has none."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise ModelError("the manifest is not a JSON object", where=str(path))
    return value


def verify(folder: Path, *, hashes: bool = True) -> dict[str, Any]:
    """Check every file that the manifest lists and return the manifest.

    Args:
        folder: a folder written by :func:`atomic_folder`.
        hashes: also compare SHA-256; without it only presence and size.

    Raises:
        ModelError: a file is missing, truncated or altered; nothing should be loaded from the folder.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            raise ModelError("the file is missing", where=str(path), fix="copy or build the folder again")
        size = path.stat().st_size
        if size != expected["size"]:
            raise ModelError(
                f"the file has {size} bytes, its manifest says {expected['size']}",
                where=str(path),
                why="it was truncated or altered after it was written; nothing was loaded",
                fix="copy or build the folder again",
                zh="文件大小与清单不符（被截断或改动），未加载任何内容。请重新复制或重新生成",
            )
        if hashes and sha256_file(path) != expected["sha256"]:
            raise ModelError(
                "the content does not match the SHA-256 in its manifest",
                where=str(path),
                why="it was altered after it was written; nothing was loaded",
                fix="copy or build the folder again",
                zh="文件内容与清单中的 SHA-256 不符，未加载任何内容。请重新复制或重新生成",
            )
    return manifest


def home() -> Path:
    """The folder for downloads and caches: ``HANMO_HOME``, else ``~/.cache/hanmo``."""
    return Path(os.environ.get("HANMO_HOME") or Path.home() / ".cache" / "hanmo")


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that holds ``path`` (or will hold it)."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
