"""Which models are here: those of the catalogue, the runs, the cache, and what lies in folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hanmo import catalog
from hanmo import folder as folders
from hanmo.errors import HanmoError, ModelError, nearest
from hanmo.inference.inspection import Listed, inspect, manifest_problem, read_small_json

RUNS = Path("runs")
SUFFIXES = (".gguf", ".arpa", ".arpa.gz")
MAX_DEPTH = 4  # folders below the one that is searched
MAX_FOLDERS = 20_000
NOT_WALKED = frozenset({"checkpoints", "__pycache__", "node_modules"})


def local_models() -> list[Listed]:
    """Every model of the catalogue (fetched or not), under ``runs/``, and in the cache."""
    found = [catalog_model(entry, gguf_header=False) for entry in catalog.ENTRIES]
    known = {entry.name for entry in catalog.ENTRIES}
    if RUNS.is_dir():
        found += [each for run in sorted(RUNS.iterdir()) if run.is_dir() for each in models_in_run(run)]
    cache = folders.home() / "models"
    if cache.is_dir():
        others = [path for path in sorted(cache.iterdir()) if path.name not in known and not path.name.startswith(".")]
        found += [inspect(path) for other in others for path in search(other)]
    unique: dict[str, Listed] = {}
    for each in found:
        unique.setdefault(os.path.realpath(each.path) if each.path else each.name, each)
    return list(unique.values())


def find_model(name: str) -> list[Listed]:
    """What one name or path stands for: usually one model, several where it is a folder of models.

    Raises:
        ModelError: nothing of that name; the message gives the nearest known one.
    """
    path = Path(name).expanduser()
    if path.exists():
        return models_at(path)
    if (RUNS / name).is_dir():
        found = models_in_run(RUNS / name)
        if found:
            return found
    entry = catalog.entry(name)
    if entry is not None:
        return [catalog_model(entry)]
    runs = [path.name for path in RUNS.iterdir()] if RUNS.is_dir() else []
    hint = nearest(name, [*(entry.name for entry in catalog.ENTRIES), *runs])
    raise ModelError(
        f"there is no model '{name}': not a path, not a run in {RUNS}/, not a name of the catalog",
        fix=hint,
        zh=f"找不到模型 '{name}'（不是路径，不是 {RUNS}/ 中的运行，也不在目录中）。{hint}",
    )


def models_at(path: Path) -> list[Listed]:
    """The models at or below a path that somebody named.

    Raises:
        ModelError: it does not exist, or holds no model.
    """
    path = path.expanduser()
    if not path.exists():
        raise ModelError("there is no such file or folder", where=str(path), zh="没有这个文件或文件夹")
    found = [path] if path.is_file() else list(search(path))
    if not found and (path / "config.json").is_file():
        found = [path]  # damaged: what was named is described, and what is wrong with it
    if not found:
        raise ModelError(
            "no model was found here",
            where=str(path),
            why=f"down to {MAX_DEPTH} levels there is no folder with a model's config.json, nor a .gguf or .arpa file",
            fix="give a folder that holds models",
            zh=f"在 {MAX_DEPTH} 层子文件夹之内没有模型文件夹（含 config.json），也没有 .gguf 或 .arpa 文件",
        )
    return [inspect(each) for each in found]


def models_in_run(run: Path) -> list[Listed]:
    """The models of a run: the one that the run's name loads, and any others in it."""
    found = []
    for path in search(run):
        name = run.name if path in (run, run / "model") else str(path)
        found.append(inspect(path, name=name, place="run"))
    return found


def catalog_model(entry: catalog.Entry, *, gguf_header: bool = True) -> Listed:
    """A model of the catalogue; what lies in the cache is looked at, the catalogue knows the rest.

    Args:
        gguf_header: read also the header of a GGUF file, which takes seconds (it needs torch) and tells a list nothing.
    """
    listed = Listed(entry.name, "catalog")
    if catalog.is_cached(entry.name):
        path = catalog.loadable(catalog.cache_folder(entry.name))
        if path.is_file() and not gguf_header:
            listed = Listed(entry.name, "catalog", str(path), "transformer", format="gguf", size=path.stat().st_size)
        else:
            listed = inspect(path, name=entry.name, place="catalog")
        listed.problem = listed.problem or manifest_problem(catalog.cache_folder(entry.name))
    else:
        listed.kind, listed.size = "transformer", download_size(entry)
    listed.architecture = listed.architecture or entry.architecture
    listed.parameters = listed.parameters or entry.parameters
    listed.licence, listed.languages, listed.tasks = entry.licence, entry.languages, entry.tasks
    listed.details |= {"description": entry.description, "description_zh": entry.zh}
    return listed


def download_size(entry: catalog.Entry) -> int:
    """Bytes to download from the source that is there without further packages."""
    source = entry.sources[-1]
    return source.wheel_size if isinstance(source, catalog.PackageSource) else source.size


def search(top: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """Model folders and model files at or below a folder, by name; links to folders are not followed."""
    level, seen = [top], 0
    for _ in range(depth + 1):
        below: list[Path] = []
        for folder in level[: MAX_FOLDERS - seen]:
            seen += 1
            try:
                if is_model_folder(folder):
                    yield folder
                    continue
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError:  # not ours to read, or just removed
                continue
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if not entry.name.startswith(".") and entry.name not in NOT_WALKED:
                        below.append(Path(entry.path))
                elif entry.name.lower().endswith(SUFFIXES):
                    yield Path(entry.path)
        level = below


def is_model_folder(folder: Path) -> bool:
    """Whether a folder has the configuration of a model, be it a damaged one, and not that of something else."""
    if not (folder / "config.json").is_file():
        return False
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return True
    try:
        return isinstance(read_small_json(folder / "config.json").get("model_type"), str)
    except HanmoError:
        return False
