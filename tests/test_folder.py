"""Folders are whole or not there: failures, full disks and kills at any moment leave the old content or the new one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hanmo import folder as folders
from hanmo.cli.main import known_failure
from hanmo.errors import ModelError, ResourceError, UsageError
from hanmo.folder import MANIFEST, atomic_folder, free_bytes, home, read_json, verify

OLD = {"a.txt": "old a", "deep/b.txt": "old b"}
NEW = {"a.txt": "new a " * 1000, "deep/c.txt": "new c"}


def write(target: Path, files: dict[str, str]) -> None:
    with atomic_folder(target, {"kind": "test"}) as folder:
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


def content(target: Path) -> dict[str, str]:
    """The verified files of a folder."""
    manifest = verify(target)
    found = {
        path.relative_to(target).as_posix(): path.read_text()
        for path in target.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    assert set(manifest["files"]) == set(found), "the manifest lists exactly what is there"
    return found


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A folder with the old content."""
    write(tmp_path / "model", OLD)
    return tmp_path / "model"


# Writing -------------------------------------------------------------------------------------------------------------


def test_a_folder_is_written_with_its_manifest(tmp_path: Path) -> None:
    target = tmp_path / "not" / "yet" / "there"
    write(target, NEW)
    assert content(target) == NEW
    assert verify(target)["kind"] == "test"
    assert names(target.parent) == ["there"]


def test_a_folder_is_replaced_entirely(target: Path) -> None:
    write(target, NEW)
    assert content(target) == NEW
    assert names(target.parent) == ["model"]


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOENT, "x")])
def test_a_failure_inside_leaves_the_old_folder(target: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)), atomic_folder(target) as folder:
        (folder / "a.txt").write_text("half")
        raise failure
    assert content(target) == OLD
    assert names(target.parent) == ["model"]


def test_without_an_exchange_two_renames_do(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "exchange", lambda *_: False)
    write(target, NEW)
    assert content(target) == NEW
    assert names(target.parent) == ["model"]


@pytest.mark.skipif(sys.platform != "linux", reason="the exchange of two folders in one step is Linux's")
def test_the_exchange_is_one_step(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    assert folders.exchange(tmp_path / "x", tmp_path / "y")
    assert (tmp_path / "x" / "who").read_text() == "y" and (tmp_path / "y" / "who").read_text() == "x"
    assert not folders.exchange(tmp_path / "x", tmp_path / "absent")


def test_a_link_to_another_place_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path / "large-disk" / "data", OLD)
    link = tmp_path / "model"
    link.symlink_to(tmp_path / "large-disk" / "data")
    write(link, NEW)
    assert link.is_symlink() and content(link) == NEW
    assert names(tmp_path / "large-disk") == ["data"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("precious")
    with pytest.raises(UsageError, match="there is a file where the folder should go"):
        write(tmp_path / "model", NEW)
    with pytest.raises(ResourceError, match="the folder cannot be made"):
        write(tmp_path / "model" / "sub" / "deeper", NEW)
    assert (tmp_path / "model").read_text() == "precious"


# A full disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_disk_that_fails_while_flushing(target: Path, monkeypatch: pytest.MonkeyPatch, code: int, calls: int) -> None:
    real, left = os.fsync, [calls]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ResourceError) as caught:
        write(target, NEW)
    assert left[0] == 0, "the failure was reached"
    assert caught.value.exit_code == 5 and caught.value.where == str(target)
    assert "--out" in caught.value.fix and "腾出空间" in caught.value.zh
    assert content(target) == OLD
    assert names(target.parent) == ["model"]


def test_a_disk_that_fails_while_writing(target: Path) -> None:
    with pytest.raises(ResourceError), atomic_folder(target) as folder:
        (folder / "a.txt").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert content(target) == OLD


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KB; needs root."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if not mount or os.geteuid() or subprocess.run([mount, *options], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(tiny_disk: Path) -> None:
    target = tiny_disk / "model"
    write(target, OLD)
    with pytest.raises(ResourceError) as caught:
        write(target, {"a.txt": "x" * 1_000_000})
    assert caught.value.exit_code == 5
    assert content(target) == OLD
    assert names(tiny_disk) == ["model"], "the half-written folder no longer takes room"
    write(target, {"a.txt": "x" * 100_000})  # there is room again
    assert list(content(target)) == ["a.txt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_full_disk_elsewhere_is_no_defect_either(code: int) -> None:
    failure = known_failure(OSError(code, os.strerror(code), "runs/x/log.jsonl"))
    assert failure is not None and failure.exit_code == 5 and failure.where == "runs/x/log.jsonl"
    assert known_failure(OSError(errno.ENOENT, "x")) is None


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OLD))
def test_damage_is_found(target: Path, name: str) -> None:
    path = target / name
    original = path.read_text()
    damages = {
        original[:-1]: "the file has",
        original + "x": "the file has",
        "": "the file has",
        original.replace("old", "odd"): "does not match the SHA-256",
    }
    for text, message in damages.items():
        path.write_text(text)
        with pytest.raises(ModelError, match=message) as caught:
            verify(target)
        assert caught.value.where == str(path) and caught.value.exit_code == 4
    verify(target, hashes=False)  # sizes alone do not tell the last damage
    path.unlink()
    with pytest.raises(ModelError, match="missing"):
        verify(target, hashes=False)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (b'{"files": {},\n"a": }', ":2", "not valid JSON"),
        (b"", ":1", "not valid JSON"),
        (b"\xff\xfe", "", "not valid UTF-8"),
        (b"[]", "", "the manifest is not a JSON object"),
    ],
)
def test_a_damaged_manifest(target: Path, text: bytes, line: str, message: str) -> None:
    (target / MANIFEST).write_bytes(text)
    with pytest.raises(ModelError, match=message) as caught:
        verify(target)
    assert caught.value.where == str(target / MANIFEST) + line


def test_a_folder_of_another_tool_has_no_manifest(tmp_path: Path) -> None:
    assert verify(tmp_path) == {}
    with pytest.raises(ModelError, match="missing"):
        read_json(tmp_path / "config.json")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    folders.write_json(path, {"名": 1})
    assert path.read_text(encoding="utf-8") == '{\n  "名": 1\n}\n'
    with pytest.raises(UnicodeEncodeError):
        folders.write_json(path, {"x": "\ud800"})
    assert read_json(path) == {"名": 1} and names(tmp_path) == ["settings.json"]


# Kills ---------------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from hanmo import folder as folders

target, point, files = Path(sys.argv[1]), sys.argv[2], __import__("json").loads(sys.argv[3])
if point.endswith("-without-exchange"):
    folders.exchange = lambda *_: False
    point = point.removesuffix("-without-exchange")

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def at(module, name, call):
    real, left = getattr(module, name), [call]
    def wrapped(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            die()
        return real(*arguments, **options)
    setattr(module, name, wrapped)

name, _, call = point.partition(":")
module = {"fsync_path": folders, "write_json": folders, "exchange": folders, "rename": Path, "rmtree": folders.shutil}
if name in module:
    at(module[name], name, int(call))
with folders.atomic_folder(target) as folder:
    for index, (file, text) in enumerate(files.items()):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)
        if point == f"file:{index}":
            die()
print("finished")
"""


def killed_at(target: Path, point: str) -> None:
    """Write the new content in a process that kills itself at a point."""
    command = [sys.executable, "-c", KILLED, str(target), point, json.dumps(NEW)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, f"{point} was not reached: {done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ("file:0", OLD),
        ("file:1", OLD),
        ("fsync_path:2", OLD),
        ("write_json:1", OLD),
        ("fsync_path:4", OLD),
        ("exchange:1", OLD),
        ("rename:1-without-exchange", OLD),
        ("fsync_path:5", NEW),
        ("rmtree:1", NEW),
        ("rmtree:1-without-exchange", NEW),
    ],
)
def test_a_kill_leaves_the_old_or_the_new(target: Path, point: str, expected: dict[str, str]) -> None:
    killed_at(target, point)
    assert content(target) == expected
    write(target, NEW)
    assert content(target) == NEW
    assert names(target.parent) == ["model"], "the next writer clears what the killed one left"


def test_a_kill_between_two_renames_is_repaired_by_the_next_write(target: Path) -> None:
    killed_at(target, "rename:2-without-exchange")
    assert not target.exists()
    with pytest.raises(ValueError), atomic_folder(target):
        raise ValueError
    assert content(target) == OLD


def test_leftovers_are_harmless_and_those_of_the_living_stay(target: Path) -> None:
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
        parent = target.parent
        stays = [f".model.tmp-{alive.pid}", f".other.tmp-{dead.stdout.strip()}", ".model.tmp-x", "model-2"]
        goes = [f".model.tmp-{dead.stdout.strip()}", f".model.old-{dead.stdout.strip()}", f".model.tmp-{os.getpid()}"]
        for name in stays + goes:
            (parent / name).mkdir()
            (parent / name / "half").write_text("x")
        assert content(target) == OLD
        write(target, NEW)
        assert content(target) == NEW
        assert names(parent) == sorted([*stays, "model"])
    finally:
        alive.communicate(b"\n")


# Places --------------------------------------------------------------------------------------------------------------


def test_home_and_free_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANMO_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.setenv("HANMO_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".cache" / "hanmo"
    assert free_bytes(tmp_path / "not" / "there") > 0
