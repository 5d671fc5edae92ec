"""The tokens that Hanmo writes in float32 beside those of `transformers`: 1,000 Chinese and English prompts.

    python benchmarks/parity.py ../shared/data [--model smollm2-135m-instruct] [--engines native torch] [--prompts 1000]

The prompts are instructions, questions, dialogues, titles and pieces of novels, 1 to 700 tokens long, page borders of
the cache among the lengths. transformers continues each greedily by 24 tokens, in batches of equal length (so without
padding), and keeps what it found in a file; Hanmo does the same in every way it can come to a token:

    no cache      the whole text is read at once; the most probable token after each position
    cache         one prompt after the other
    prefix hit    a part of the prompt is still in the cache
    pieces        the prompt is read 37 tokens at a time
    2 at once, 8 at once
                  prompts of different lengths share the steps
    guesses       tokens that followed the same tokens before are guessed (speculation)

A difference is allowed only where the two most probable tokens lie within 1e-4 for transformers; it is listed all the
same, and a text is not compared any further behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COUNT = 24  # tokens written after each prompt
CLOSE = 1e-4  # logits; nearer than this, rounding may decide
PIECE = 37
BATCH_TOKENS = 4096  # of transformers at once
LENGTHS = (1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 80, 96, 100, 127, 128, 129, 160, 200, 255, 256)
LENGTHS += (257, 320, 384, 448, 500, 511, 512, 513, 600, 700)
LONGEST_SHARE = 0.2  # of the prompts that go to the lengths from 320 on


@dataclass
class Reference:
    """What transformers wrote: ids ``[P, COUNT]``, and how far the best two logits lay apart at each."""

    ids_PN: NDArray[np.int64]
    gaps_PN: NDArray[np.float32]


# Prompts --------------------------------------------------------------------------------------------------------------


def texts_of(shared: Path) -> dict[str, list[str]]:
    """Texts by source, those that are there."""

    def lines(path: Path) -> list[Any]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

    def instructions() -> list[str]:
        records = json.loads((shared / "rasbt-instruct" / "instruction-data.json").read_text())
        return ["\n".join(filter(None, (record["instruction"], record["input"]))) for record in records]

    def squad() -> list[str]:
        records = lines(shared / "squad-cs224n-val" / "squad_val.jsonl")
        return [f"{record['context']}\n{record['question']}" for record in records[::8]]

    def drcd() -> list[str]:
        articles = json.loads((shared / "drcd" / "DRCD_dev.json").read_text())["data"]
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        return [f"{item['context']}\n{item['qas'][0]['question']}" for item in paragraphs]

    def dialogues() -> list[str]:
        found = json.loads((shared / "kdconv" / "film.dev.json").read_text())
        return ["\n".join(turn["message"] for turn in dialogue["messages"]) for dialogue in found]

    def novels(folder: str) -> list[str]:
        pieces = []
        for path in sorted((shared / folder).glob("*.txt")):
            if not path.name.startswith(("_", "SOURCE")):
                text = path.read_text(encoding="utf-8", errors="replace")
                pieces += [text[start : start + 4000] for start in range(0, len(text) - 4000, len(text) // 40 + 1)]
        return pieces

    sources: dict[str, Callable[[], list[str]]] = {
        "instructions": instructions,
        "questions": squad,
        "questions, zh": drcd,
        "dialogues, zh": dialogues,
        "novels": lambda: novels("gutenberg-nltk"),
        "novels, zh": lambda: novels("zh-novels"),
    }
    found = {}
    for name, read in sources.items():
        with contextlib.suppress(FileNotFoundError):
            found[name] = read()
    return {name: texts for name, texts in found.items() if texts}


def choose_prompts(
    sources: dict[str, list[str]], encode: Callable[[str], list[int]], count: int, longest: int, seed: int = 0
) -> list[list[int]]:
    """Beginnings of the texts with the lengths above, as many from each source; none twice."""
    generator, prompts = random.Random(seed), dict[tuple[int, ...], None]()
    pools = [generator.sample(texts, len(texts)) for texts in sources.values()]
    short = [length for length in LENGTHS if length < 320]
    long = [length for length in LENGTHS if length >= 320]
    turn = 0
    while len(prompts) < count:
        pool = pools[turn % len(pools)]
        ids = encode(pool[turn // len(pools) % len(pool)])
        length = min(generator.choice(long if generator.random() < LONGEST_SHARE else short), longest)
        start = generator.randrange(max(1, len(ids) - length + 1))  # the same text may come again, cut elsewhere
        fitting = max((known for known in LENGTHS if known <= len(ids) - start), default=0)
        if piece := ids[start : start + min(length, fitting)]:
            prompts[tuple(piece)] = None
        turn += 1
        if turn > 50 * count:
            raise SystemExit(f"the texts give only {len(prompts)} prompts")
    return [list(ids) for ids in prompts]


# transformers ---------------------------------------------------------------------------------------------------------


def continue_with_transformers(model: Any, prompts: Sequence[Sequence[int]], count: int = COUNT) -> Reference:
    """Greedy continuations, prompts of one length together."""
    import torch

    ids_PN = np.zeros((len(prompts), count), np.int64)
    gaps_PN = np.zeros((len(prompts), count), np.float32)
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(number)
    done, start = 0, time.perf_counter()
    for length, numbers in sorted(by_length.items()):
        size = max(1, min(16, BATCH_TOKENS // length))
        for begin in range(0, len(numbers), size):
            batch, cache = numbers[begin : begin + size], None
            ids_BT = torch.tensor([prompts[number] for number in batch])
            for step in range(count):
                with torch.inference_mode():
                    out = model(ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
                best = out.logits[:, -1].float().topk(2)
                cache, ids_BT = out.past_key_values, best.indices[:, :1]
                ids_PN[batch, step] = ids_BT[:, 0].numpy()
                gaps_PN[batch, step] = (best.values[:, 0] - best.values[:, 1]).numpy()
            done += len(batch)
            seconds = time.perf_counter() - start
            print(f"\rtransformers: {done} of {len(prompts)}, {seconds:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return Reference(ids_PN, gaps_PN)


def reference_of(folder: Path, prompts: list[list[int]], kept: Path) -> Reference:
    """What transformers writes; computed once for the same model and prompts."""
    import torch
    import transformers

    weights = folder / "model.safetensors"
    key = json.dumps([str(folder.resolve()), weights.stat().st_mtime, prompts, COUNT, transformers.__version__])
    file = kept / f"parity-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if not file.exists():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        reference = continue_with_transformers(model, prompts)
        np.savez(file, ids=reference.ids_PN, gaps=reference.gaps_PN)
    stored = np.load(file)
    return Reference(stored["ids"], stored["gaps"])


# Hanmo ----------------------------------------------------------------------------------------------------------------


def forget(model: Any) -> None:
    """Leave no finished text in the cache."""
    for kept in [*model.engine.kept]:
        model.engine.forget(kept)


def write(model: Any, prompts: Sequence[Sequence[int]], count: int = COUNT) -> list[list[int]]:
    """The tokens that follow some prompts, which run at the same time."""
    options = {"max_new_tokens": count, "temperature": 0.0, "ignore_eos": True}
    return [completion.ids for completion in model.generate([list(ids) for ids in prompts], **options)]


def without_cache(model: Any, prompts: Sequence[Sequence[int]], reference: Reference) -> Iterator[list[int]]:
    """The best token after each position of the text that transformers wrote, read at once.

    As long as the tokens are equal they are those of a greedy search that reads the whole text anew for each.
    """
    import torch

    from hanmo.inference.networks import Piece

    size = model.engine.vocabulary.size
    for prompt, ids_N in zip(prompts, reference.ids_PN.tolist(), strict=True):
        whole = [*prompt, *ids_N[:-1]]
        text, _ = model.network.open(whole, 1, None)
        with model.engine.alone(), torch.inference_mode():
            logits_NV = model.network.read([Piece(text, whole, wanted=len(ids_N))])[:, :size]
        text.release()
        yield logits_NV.argmax(-1).tolist()


def each(model: Any, prompts: Sequence[Sequence[int]], together: int = 1) -> Iterator[list[int]]:
    """So many prompts at a time, none of which finds anything in the cache."""
    for start in range(0, len(prompts), together):
        forget(model)
        yield from write(model, prompts[start : start + together])


def after_prefix(model: Any, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Each prompt after another text that begins with a part of it, cut anywhere."""
    generator = random.Random(0)
    for prompt in prompts:
        forget(model)
        if len(prompt) > 20:
            cut = generator.randrange(17, len(prompt))
            write(model, [prompt[:cut]], 2)
        yield from write(model, [prompt])


@contextlib.contextmanager
def changed(thing: Any, **values: Any) -> Iterator[None]:
    """Set attributes for a while."""
    before = {name: getattr(thing, name) for name in values}
    for name, value in values.items():
        setattr(thing, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)


def ways(model: Any, prompts: Sequence[Sequence[int]], reference: Reference) -> Iterator[tuple[str, list[list[int]]]]:
    """What Hanmo writes, in every way."""
    from hanmo.inference.speculation import PromptLookup

    engine, network = model.engine, model.network
    with changed(engine, new_guesser=None):
        yield "no cache", [*without_cache(model, prompts, reference)]
        yield "cache", [*each(model, prompts)]
        yield "prefix hit", [*after_prefix(model, prompts)]
        with changed(network, piece=PIECE):
            yield "pieces", [*each(model, prompts)]
        yield "2 at once", [*each(model, prompts, 2)]
        yield "8 at once", [*each(model, prompts, 8)]
    with changed(engine, new_guesser=PromptLookup):
        yield "guesses", [*each(model, prompts)]


@dataclass
class Difference:
    """Where a text of Hanmo's leaves that of transformers."""

    prompt: int
    step: int
    gap: float
    ours: int
    theirs: int

    @property
    def allowed(self) -> bool:
        return self.gap <= CLOSE


def differences(written: Sequence[Sequence[int]], reference: Reference) -> list[Difference]:
    """The first difference of every prompt that has one."""
    found = []
    for number, (ours, theirs) in enumerate(zip(written, reference.ids_PN.tolist(), strict=True)):
        step = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if step is None and len(ours) < len(theirs):
            step = len(ours)
        if step is not None:
            mine = ours[step] if step < len(ours) else -1
            found.append(Difference(number, step, float(reference.gaps_PN[number, step]), mine, theirs[step]))
    return found


def main() -> None:
    """Write with both, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path, help="the folder of test data")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name of the catalog, a file or a folder")
    parser.add_argument("--engines", nargs="*", default=["native", "torch"])
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hanmo-parity")
    given = parser.parse_args()
    import torch
    import transformers

    import hanmo
    from hanmo.cli.doctor import processor

    folder = given.folder / Path(given.model).name
    given.folder.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "hanmo.cli.main", "export", given.model, str(folder)], check=True)
    first = hanmo.load(folder, engine="torch", device="cpu")
    longest = min(LENGTHS[-1], first.context_length - COUNT)
    sources = texts_of(given.shared)
    prompts = choose_prompts(sources, first.tokenizer.encode, given.prompts, longest)
    del first
    lengths = sorted(map(len, prompts))
    print(f"{processor()}; Python {platform.python_version()}, torch {torch.__version__}")
    print(f"transformers {transformers.__version__}; {given.model}, float32, {COUNT} tokens each")
    print(
        f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, {sum(lengths):,} in all; {'; '.join(sources)}"
    )
    reference = reference_of(folder, prompts, given.folder)
    close = int((reference.gaps_PN <= CLOSE).sum())
    print(f"best two logits within {CLOSE:g}: at {close} of {reference.gaps_PN.size:,} tokens", flush=True)
    wrong = 0
    for engine in given.engines:
        model = hanmo.load(folder, engine=engine, device="cpu", precision="fp32" if engine == "native" else None)
        print(f"\n{model.describe()}\n{'':12}{'equal':>8}{'allowed':>9}{'wrong':>7}{'seconds':>9}")
        start = time.perf_counter()
        for way, written in ways(model, prompts, reference):
            found = differences(written, reference)
            counted = Counter(difference.allowed for difference in found)
            seconds = time.perf_counter() - start
            equal = len(prompts) - len(found)
            print(f"{way:12}{equal:8}{counted[True]:9}{counted[False]:7}{seconds:9.0f}", flush=True)
            for item in found:
                kind = "allowed" if item.allowed else "WRONG"
                where = f"prompt {item.prompt} ({len(prompts[item.prompt])} tokens), token {item.step}"
                print(f"    {kind}: {where}: {item.ours}, transformers {item.theirs}, {item.gap:.1e} apart")
            wrong += counted[False]
            start = time.perf_counter()
        guessed = model.engine
        print(f"guesses: {guessed.right_tokens:,} of {guessed.guessed_tokens:,} tokens right")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
