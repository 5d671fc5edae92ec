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
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hanmo.errors import ModelError, ResourceError, UsageError
from hanmo.progress import human_bytes

MANIFEST = "hanmo.json"
CHUNK = 1 << 20
CANNOT_WRITE = frozenset(  # errors of the machine or of the chosen place, not of the program
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG}
)


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
        raise ModelError(
            "the file is missing",
            where=str(path),
            fix="copy it again from where it came",
            zh="文件不存在。请从来源处重新复制",
        ) from None
    except json.JSONDecodeError as error:
        raise not_json(f"{path}:{error.lineno}", f"not valid JSON: {error.msg}", "不是有效的 JSON") from None
    except UnicodeDecodeError:
        raise not_json(str(path), "not valid UTF-8", "不是有效的 UTF-8") from None
    except (ValueError, RecursionError):  # numbers of thousands of digits, thousands of nested brackets
        raise not_json(str(path), "not JSON that any program writes", "不是任何程序会写出的 JSON") from None


def not_json(where: str, what: str, zh: str) -> ModelError:
    """The error for a file that should be JSON."""
    return ModelError(
        what, where=where, fix="copy the file again from where it came", zh=f"{zh}。请从来源处重新复制该文件"
    )


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON: sorted by the caller, UTF-8, a newline at the end; a kill leaves no half file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def fsync_path(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        ResourceError: it cannot be made there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"the folder cannot be made: {error.strerror}",
            where=str(path),
            fix="choose another place with --out",
            zh=f"无法创建文件夹（{error.strerror}）。请用 --out 换一个位置",
        ) from error


@contextlib.contextmanager
def atomic_folder(target: str | Path, manifest: dict[str, Any] | None = None) -> Iterator[Path]:
    """Write a folder completely or not at all.

    Yields a temporary folder beside ``target``. When the block ends, its files are hashed into ``hanmo.json`` together
    with the entries of ``manifest``, flushed, and renamed to ``target`` (an older folder there is replaced). When the
    block fails, the temporary folder is removed and ``target`` is as it was.

    What killed processes left behind is removed, so that an unlucky machine does not fill its disk.

    Raises:
        ResourceError: the disk is full or cannot be written; what stood at ``target`` is intact.
        UsageError: ``target`` is a file.
    """
    target = Path(target)
    target = target.resolve() if target.is_symlink() else target  # a link to a larger disk stays a link
    if target.exists() and not target.is_dir():
        raise UsageError(
            "there is a file where the folder should go",
            where=str(target),
            fix="choose another --out",
            zh="这个位置上已有一个文件；请用 --out 换一个位置",
        )
    temporary = target.parent / f".{target.name}.tmp-{os.getpid()}"
    make_folder(target.parent)
    try:
        clear_leftovers(target)
        temporary.mkdir()
        yield temporary
        seal(temporary, manifest or {})
        replace_folder(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in CANNOT_WRITE:
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


@contextlib.contextmanager
def atomic_file(path: Path, size: int = 0) -> Iterator[Path]:
    """Write a file completely or not at all: yields a temporary path, which takes the place of ``path`` at the end.

    Args:
        size: bytes that will be needed, where that is known.

    Raises:
        ResourceError: there is no room for ``size`` bytes, or the place cannot be written; an older file is intact.
    """
    make_folder(path.parent)
    if size > free_bytes(path.parent):
        raise ResourceError(
            f"the file needs {human_bytes(size)}, the disk has {human_bytes(free_bytes(path.parent))} free",
            where=str(path),
            fix="free some space, or choose another place",
            zh=f"需要 {human_bytes(size)} 磁盘空间，剩余不足。请腾出空间或换一个位置",
        )
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        fsync_path(temporary)
        temporary.replace(path)
        fsync_path(path.parent)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise ResourceError(
            f"could not write the file: {error.strerror}",
            where=str(path),
            why="what stood there before is intact",
            fix="free some space, or choose another place",
            zh=f"无法写入文件（{error.strerror}），原有内容完好。请腾出空间或换一个位置",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def os_error_of(error: Exception, path: Path) -> OSError:
    """The system's error that safetensors' writer hides in a text."""
    number = re.search(r"os error (\d+)", str(error))
    code = int(number[1]) if number else errno.EIO
    return OSError(code, os.strerror(code), str(path))


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


def clear_leftovers(target: Path) -> None:
    """Remove what earlier writers of ``target`` left when they were killed; living ones are not touched."""
    for path in target.parent.iterdir():
        match = re.fullmatch(rf"\.{re.escape(target.name)}\.(tmp|old)-(\d+)", path.name)
        if not match or (match[2] != str(os.getpid()) and is_alive(int(match[2]))):
            continue
        if match[1] == "old" and not target.exists():
            path.rename(target)  # killed between the two renames of replace_folder
        else:
            shutil.rmtree(path, ignore_errors=True)


def is_alive(process: int) -> bool:
    """Whether a process of this machine is running."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def replace_folder(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``, in one step also where a folder is already there.

    Where the system cannot exchange two folders (all but Linux, some network disks) the old one steps aside first; a
    kill at that very moment leaves it under its temporary name, and the next write puts it back.
    """
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    if not target.exists():
        source.rename(target)
    elif exchange(source, target):
        old = source
    else:
        target.rename(old)
        source.rename(target)
    fsync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step with Linux's ``renameat2(RENAME_EXCHANGE)``; False where that does not exist."""
    import ctypes  # here, because it would slow down every start of the program

    at_working_directory, rename_exchange = -100, 2
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    return bool(call(at_working_directory, names[0], at_working_directory, names[1], rename_exchange) == 0)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The entries of ``hanmo.json``; empty where the folder comes from another tool and has none."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise ModelError(
            "the manifest is not a JSON object",
            where=str(path),
            fix="copy or build the folder again",
            zh="清单不是 JSON 对象。请重新复制或重新生成文件夹",
        )
    return value


def listed_files(folder: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files that a manifest lists, as ``{name: {"size", "sha256"}}``.

    Raises:
        ModelError: the list has another shape, or a name that leads out of the folder.
    """
    files = manifest.get("files", {})
    if isinstance(files, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("sha256"), str)
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
        for name, entry in files.items()
    ):
        return files
    raise ModelError(
        "the manifest is damaged",
        where=str(folder / MANIFEST),
        fix="copy or build the folder again",
        zh="清单已损坏。请重新复制或重新生成文件夹",
    )


def verify(folder: Path, *, hashes: bool = True) -> dict[str, Any]:
    """Check every file that the manifest lists and return the manifest.

    Args:
        folder: a folder written by :func:`atomic_folder`.
        hashes: also compare SHA-256; without it only presence and size.

    Raises:
        ModelError: a file is missing, truncated or altered; nothing should be loaded from the folder.
    """
    manifest = read_manifest(folder)
    for name, expected in listed_files(folder, manifest).items():
        path = folder / name
        if not path.is_file():
            raise ModelError(
                "the file is missing, its manifest lists it",
                where=str(path),
                fix="copy or build the folder again",
                zh="清单中列出的文件不存在。请重新复制或重新生成",
            )
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
