"""Preparing a corpus: read, clean, deduplicate, split, and write it so that a stale copy can never be used."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hanmo.data.corpus import FORMAT, KIND, Corpus
from hanmo.data.encodings import PROBE
from hanmo.data.problems import Problems
from hanmo.data.readers import Reader
from hanmo.data.report import duplicate_summary, make_report
from hanmo.data.settings import DataSettings
from hanmo.data.sources import Listing, Source, file_digest, find_sources
from hanmo.data.splits import (
    SPLITS,
    Shares,
    choose_shares,
    first_copies,
    hash_sides,
    require_enough,
    tail_boundaries,
)
from hanmo.data.spool import Spool, Table, copy_ranges, cut_at
from hanmo.errors import DataError, HanmoError
from hanmo.folder import MANIFEST, atomic_folder, write_json
from hanmo.language import pick
from hanmo.progress import Progress
from hanmo.settings import notice

OUR_FILES = frozenset(
    {MANIFEST, "report.json", *(f"{split}.{end}" for split in SPLITS for end in ("text", "offsets.npy", "origins.npy"))}
)


def prepare(paths: Sequence[str | Path], out: str | Path, settings: DataSettings | None = None) -> Corpus:
    """Prepare the texts under ``paths`` in the folder ``out``, or reuse what is there if nothing has changed.

    The folder is reused only if the same files (by size and time, else by content) were prepared with the same settings
    by the same version; otherwise it is written anew, completely or not at all.

    Raises:
        DataError: a path is missing, a record cannot be read, or there is too little text.
        UsageError: a setting cannot work.
        ResourceError: the disk is full, or a package is missing.

    Example::

        corpus = prepare(["my-texts/"], "runs/my-texts/data", DataSettings(skip_bad=True))
        print(describe(corpus.report))
    """
    settings = settings or DataSettings()
    settings.check()
    out = Path(out)
    listing = find_sources(paths)
    refuse_foreign(out)
    existing = reusable(out, listing.sources, settings)
    if existing:
        return existing
    notice_again(out)
    manifest: dict[str, Any] = {}
    with atomic_folder(out, manifest) as folder:
        write_corpus(listing, settings, folder, manifest)
    return Corpus.open(out)


def reuse(paths: Sequence[str | Path], out: str | Path, settings: DataSettings) -> Corpus | None:
    """The corpus in ``out`` if it was made from these very inputs and settings; else None. Nothing is written."""
    settings.check()
    return reusable(Path(out), find_sources(paths).sources, settings)


def notice_again(out: Path) -> None:
    """Tell that a corpus that stands there is replaced; the reason was told before."""
    if out.exists() and any(out.iterdir()):
        notice(pick("preparing it again", "重新准备"))


def refuse_foreign(out: Path) -> None:
    """Raise DataError if ``out`` is a folder with anything that preparing a corpus would destroy."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(
            "there is a file where the prepared corpus should go", where=str(out), fix="choose another --out"
        )
    foreign = [
        e.name for e in out.iterdir() if e.name not in OUR_FILES and not e.name.startswith(("tokens-", ".tokens-"))
    ]
    is_corpus = (out / "train.text").exists() or not any(out.iterdir())
    if foreign or not is_corpus:
        raise DataError(
            "this folder holds other files; they would be lost",
            where=str(out),
            why=f"for example {sorted(foreign or [MANIFEST])[0]}",
            fix="choose an empty or new folder with --out",
            zh="这个文件夹里有其他文件，写入会覆盖它们。请用 --out 另选一个空文件夹",
        )


def reusable(out: Path, sources: list[Source], settings: DataSettings) -> Corpus | None:
    """The corpus in ``out`` if it is whole and was made from these very inputs; else None, and the user is told why."""
    if not (out / MANIFEST).exists():
        if out.exists() and any(out.iterdir()):
            notice(pick(f"{out}: it has no manifest", f"{out}：缺少清单"))
        return None
    try:
        corpus = Corpus.open(out, hashes=True)
    except HanmoError as error:
        notice(str(error))
        return None
    reason = difference(corpus.manifest, sources, settings)
    if reason:
        notice(pick(f"{out}: {reason}", f"{out}：{reason}"))
        return None
    return corpus


def difference(manifest: dict[str, Any], sources: list[Source], settings: DataSettings) -> str:
    """What has changed since the corpus was prepared, or ``""``."""
    if manifest["settings"] != settings.data_record():
        names = [name for name, value in settings.data_record().items() if manifest["settings"].get(name) != value]
        return pick(f"the settings changed ({', '.join(names)})", f"设置有变（{', '.join(names)}）")
    if manifest["tools"] != tools(settings):
        return pick("the Unicode tables or opencc changed", "Unicode 数据或 opencc 版本有变")
    before, now = ([entry["name"] for entry in manifest["inputs"]], [source.name for source in sources])
    if before != now:
        changed = sorted(set(before) ^ set(now)) or [pick("their order", "顺序")]
        return pick(
            f"the list of files changed ({', '.join(changed[:3])})", f"文件列表有变（{', '.join(changed[:3])}）"
        )
    for source, entry in zip(sources, manifest["inputs"], strict=True):
        same_time = entry["mtime_ns"] == source.mtime_ns and entry["path"] == str(source.path.absolute())
        if entry["size"] == source.size and (
            same_time or file_digest(source.path, PROBE if entry["skipped"] else None) == entry["digest"]
        ):
            continue
        return pick(f"{source.name} changed", f"{source.name} 有变")
    return ""


def tools(settings: DataSettings) -> dict[str, str]:
    """Versions of what decides the characters of the result."""
    versions = {"unicode": unicodedata.unidata_version}
    if settings.simplify:
        from importlib.metadata import PackageNotFoundError, version

        try:
            versions["opencc"] = version("opencc")
        except PackageNotFoundError:
            versions["opencc"] = "absent"
    return versions


def fingerprint(sources: list[Source], settings: DataSettings) -> str:
    """Hash of all that decides the corpus: contents and names of the files (not where they lie), and settings."""
    identity = {
        "format": FORMAT,
        "tools": tools(settings),
        "settings": settings.data_record(),
        "inputs": [[source.name, source.size, source.digest, source.skipped] for source in sources],
    }
    return hashlib.sha256(json.dumps(identity, ensure_ascii=False, sort_keys=True).encode("utf-8")).hexdigest()


def write_corpus(listing: Listing, settings: DataSettings, folder: Path, manifest: dict[str, Any]) -> None:
    """Write the files of a prepared corpus into ``folder`` and fill its ``manifest``."""
    spool_path = folder / "spool"
    reader, spool = read_all(listing, settings, spool_path)
    table = spool.finish()
    if not len(table):
        raise nothing_usable(listing, reader.problems, spool.empty)
    first = first_copies(table.digests)
    duplicates = duplicate_summary(table, listing.sources, first, settings.dedup)
    if settings.dedup:
        table = table.take(first == np.arange(len(table)))
    table, sides, shares = assign(table, spool_path, settings, duplicates["documents"] if settings.dedup else 0)
    report = make_report(listing, reader, table, sides, shares, duplicates, spool.empty)
    for side, split in enumerate(SPLITS):
        write_split(folder, split, spool_path, table, np.flatnonzero(sides == side))
    spool_path.unlink()
    write_json(folder / "report.json", report)
    manifest.update(
        kind=KIND,
        format=FORMAT,
        fingerprint=fingerprint(listing.sources, settings),
        settings=settings.data_record(),
        tools=tools(settings),
        inputs=[source.record() for source in listing.sources],
    )


def read_all(listing: Listing, settings: DataSettings, path: Path) -> tuple[Reader, Spool]:
    """Read every file into the spool."""
    total = sum(source.size for source in listing.sources)
    with Progress(pick("reading", "读取"), total, "bytes") as progress:
        reader = Reader(
            listing.sources,
            settings,
            whole=settings.split == "tail",
            on_read=lambda count: progress.update(progress.done + count),
        )
        spool = Spool(path)
        for number, source in enumerate(listing.sources):
            for document in reader.read(source):
                spool.add(document, number)
    return reader, spool


def nothing_usable(listing: Listing, problems: Problems, empty: int) -> DataError:
    """The error for files that gave no document at all."""
    skipped = [f"{source.name} ({source.skipped})" for source in listing.sources if source.skipped]
    reasons = [
        f"{len(skipped)} files were skipped: {', '.join(skipped[:3])}" if skipped else "",
        f"{problems.count} records were bad, the first at {problems.first[0]['where']}" if problems.count else "",
        f"{empty} documents were blank" if empty else "",
    ]
    return DataError(
        "no text was found in these files",
        where=", ".join(source.name for source in listing.sources[:3]),
        why="; ".join(filter(None, reasons)),
        fix="name files with text: txt, md, source code, jsonl, json, csv, tsv or parquet",
        zh="这些文件里没有可用的文本。请提供 txt、md、源代码、jsonl、json、csv、tsv 或 parquet 文件",
    )


def assign(table: Table, spool: Path, settings: DataSettings, removed: int) -> tuple[Table, np.ndarray, Shares]:
    """Decide the split of every document.

    Args:
        table: the documents that stay.
        spool: their text, in which the boundary of ``tail`` is found.
        settings: method, seed and shares.
        removed: number of copies that were taken out, for the error.

    Returns:
        The table (a text that the boundary of ``tail`` divides is two documents now), the side of each document as an
        index into SPLITS, and the shares.

    Raises:
        DataError: there is too little text.
    """
    total_bytes = int((table.ends - table.starts).sum())
    if settings.split == "hash":
        documents = int((first_copies(table.digests) == np.arange(len(table))).sum())
        shares = choose_shares(settings, total_bytes, documents)
        require_enough(total_bytes, documents, removed, shares)
        return table, hash_sides(table.digests, shares, settings.seed), shares
    shares = choose_shares(settings, total_bytes, len(table))
    require_enough(total_bytes, len(SPLITS), removed)
    validation, test = tail_boundaries(int(table.characters.sum()), shares)
    validation_row = cut_at(table, spool, validation)
    test_row = cut_at(table, spool, test)
    # a record is never cut, so a boundary inside the last records would leave a split empty
    if shares.test:
        test_row = min(test_row, len(table) - 1)
    if shares.validation:
        validation_row = min(validation_row, test_row - 1)
    if min(validation_row, test_row) < 1:
        require_enough(total_bytes, len(table), removed, shares)
    sides = np.zeros(len(table), dtype=np.uint8)
    sides[validation_row:] = 1
    sides[test_row:] = 2
    return table, sides, shares


def write_split(folder: Path, split: str, spool: Path, table: Table, rows: np.ndarray) -> None:
    """Write ``.text``, ``.offsets.npy`` (int64 ``[n+1]``) and ``.origins.npy`` (int64 ``[n, 2]``: file, line)."""
    starts, ends = table.starts[rows], table.ends[rows]
    with spool.open("rb") as source, (folder / f"{split}.text").open("wb") as target:
        copy_ranges(source, target, starts, ends)
    np.save(folder / f"{split}.offsets.npy", np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int64))
    np.save(folder / f"{split}.origins.npy", np.stack([table.files[rows], table.lines[rows]], axis=1).astype(np.int64))
