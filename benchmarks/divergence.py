"""What fewer bits cost: how far predictions move from those of the same weights in float32, Hanmo beside llama.cpp.

    python benchmarks/divergence.py --texts EN.txt ZH.txt [--calibration FILE]... [--tokens 20480] [--files FOLDER]

Two sections: the default model as it is, whose weights lie on the grid of Q4_1 already, the form in which it arrives;
and the same network in other numbers, whose weights lie on no grid: channels permuted and rescaled by random factors
between 0.82 and 1.22, each of which the matrix next to it undoes, so that float32 computes the same. The second is what
quantising from floats is to be judged by.

All forms are made from one GGUF file in half precision, which float32 computes exactly, by `hanmo quantize` and by
llama.cpp's own quantiser, except "Q4_1 as stored" of the first section: the file of the catalog. The statistics are
those of `hanmo evaluate --against`, over all tokens of windows, each read from its beginning; those of llama.cpp's
logits are computed by the same code. Both keep keys and values in half precision unless said otherwise. int4 is
calibrated with text that the model writes, and with the files of --calibration: give books that are not the texts.

Needs `pip install llama-cpp-python`; without it only Hanmo's rows are printed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from decode_engines import LlamaCpp, quantise_llama
from torch import Tensor

from hanmo.evaluation.divergence import Divergence, compared, summary
from hanmo.inference.loading import find
from hanmo.inference.native.decoder import NativeDecoder
from hanmo.inference.native.network import NativeNetwork
from hanmo.inference.native.opening import open_native
from hanmo.inference.networks import Piece
from hanmo.models.checkpoints.gguf import load_gguf
from hanmo.models.checkpoints.gguf_writer import save_gguf
from hanmo.models.checkpoints.weights import LoadedModel
from hanmo.models.transformer import TransformerConfig
from hanmo.text.tokenizer import Tokenizer

MODEL = "smollm2-135m-instruct"
SECTIONS = ("original", "other")
KINDS = ("Q8_0", "Q4_K_M", "Q4_1", "Q4_0")
SPREAD = 0.2  # of the logarithms of the factors, to either side


# The files ------------------------------------------------------------------------------------------------------------


def in_other_numbers(config: TransformerConfig, state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Weights of a network of the Llama family that computes the same: see the head of this file."""
    generator = torch.Generator().manual_seed(seed)
    result = {name: weight.clone() for name, weight in state.items()}
    D, F, K, N = config.hidden_size, config.intermediate_size, config.num_kv_heads, config.head_dim

    def order(count: int) -> Tensor:
        return torch.randperm(count, generator=generator)

    def factors(count: int) -> Tensor:
        return torch.exp((2 * torch.rand(count, generator=generator) - 1) * SPREAD)

    hidden = order(D)
    for name, weight in result.items():
        writes = name.endswith(("o_proj.weight", "down_proj.weight")) or weight.dim() == 1
        result[name] = (weight[hidden] if writes else weight[:, hidden]).contiguous()
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        q, k, v, o = (result[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkvo")
        gate, up, down = (result[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        for norm, readers in (("input_layernorm", (q, k, v)), ("post_attention_layernorm", (gate, up))):
            scale = factors(D)
            result[f"{prefix}{norm}.weight"] *= scale
            for reader in readers:
                reader /= scale
        inner, scale = order(F), factors(F)
        gate.copy_(gate[inner])
        up.copy_(up[inner] * scale[:, None])
        down.copy_(down[:, inner] / scale)
        v_KND, o_DKGN = v.view(K, N, D), o.view(D, K, -1, N)
        for head in range(K):
            inner, scale = order(N), factors(N)
            v_KND[head] = v_KND[head][inner] * scale[:, None]
            o_DKGN[:, head] = o_DKGN[:, head][:, :, inner] / scale
    return result


def make_files(folder: Path, loaded: LoadedModel, calibration: Sequence[str]) -> None:
    """All forms of some weights; what is there already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "f16.gguf"
    if not source.exists():
        save_gguf(source, loaded.config, loaded.state, loaded.tokenizer, type="F16", generation=loaded.generation)
    for kind in KINDS if importlib.util.find_spec("llama_cpp") else ():
        if not (folder / f"{kind}.gguf").exists():
            quantise_llama(source, folder / f"{kind}.gguf", kind)
    files = [word for file in calibration for word in ("--calibration", file)]
    forms = {"int4-plain": ["--no-calibration"], "int4-own": [], "int4-files": files}
    for name, options in forms.items():
        if not (folder / name).exists() and (name != "int4-files" or files):
            command = [sys.executable, "-m", "hanmo.cli.main", "quantize", str(source), str(folder / name)]
            subprocess.run([*command, "--precision", "int4", *options], check=True, stdout=subprocess.DEVNULL)


# The forms ------------------------------------------------------------------------------------------------------------


@dataclass
class Form:
    """One form of the weights: what it is called, its size in bytes, and what predicts with it."""

    name: str
    size: int
    logits: Callable[[Sequence[int]], Tensor]


def hanmo_form(name: str, path: Path, precision: str | None = None, cache: str | None = None) -> Form:
    """In the native engine."""
    loaded = open_native(path, precision)
    if isinstance(loaded, str):
        raise SystemExit(f"the native engine is needed: {loaded}")
    network = NativeNetwork(NativeDecoder(loaded.config, loaded.parts, cache=cache))

    def logits(ids: Sequence[int]) -> Tensor:
        text, _ = network.open(ids, 1, None)
        try:
            return network.read([Piece(text, ids, len(ids))])
        finally:
            text.release()

    return Form(f"Hanmo {name}", loaded.weight_bytes, logits)


def llama_form(name: str, path: Path) -> Form:
    """In llama.cpp."""
    engine = LlamaCpp(path, torch.get_num_threads())
    return Form(f"llama.cpp {name}", path.stat().st_size, lambda ids: torch.from_numpy(engine.logits(ids)))


def forms(folder: Path, stored: Path | None) -> Iterator[Form]:
    """What is compared; ``stored``: the Q4_1 file that both read, if it is not llama.cpp's own."""
    theirs = importlib.util.find_spec("llama_cpp") is not None
    yield hanmo_form("int8", folder / "f16.gguf", "int8")
    yield hanmo_form("int8, cache int8", folder / "f16.gguf", "int8", "int8")
    if theirs:
        yield llama_form("Q8_0", folder / "Q8_0.gguf")
    if stored:
        yield hanmo_form("Q4_1 as stored", stored)
        yield hanmo_form("Q4_1 as stored, cache int8", stored, None, "int8")
        if theirs:
            yield llama_form("Q4_1 as stored", stored)
    for name, path in (("own text", "int4-own"), ("files", "int4-files")):
        if (folder / path).exists():
            yield hanmo_form(f"int4, calibrated with {name}", folder / path)
    yield hanmo_form("int4, not calibrated", folder / "int4-plain")
    if theirs:
        yield hanmo_form("llama.cpp's Q4_1", folder / "Q4_1.gguf")
        for kind in ("Q4_K_M", "Q4_1", "Q4_0"):
            yield llama_form(kind, folder / f"{kind}.gguf")


# The comparison -------------------------------------------------------------------------------------------------------


def measure(reference: Form, compete: Sequence[Form], ids: Sequence[int], window: int) -> dict[str, Divergence]:
    """All forms on the same windows; the logits of one window are held at a time."""
    columns: dict[str, list[np.ndarray]] = {form.name: [] for form in compete}
    for start in range(0, len(ids) - window + 1, window):
        part = ids[start : start + window]
        expected = reference.logits(part)
        for form in compete:
            columns[form.name].append(np.concatenate(list(compared(expected, form.logits(part), part)), axis=1))
        if sys.stderr.isatty():
            print(f"\r{start + window:,} of {len(ids):,} tokens", end="", file=sys.stderr, flush=True)
    return {name: summary(found) for name, found in columns.items()}


def read_ids(path: str, tokenizer: Tokenizer, count: int) -> list[int]:
    """Tokens of a book, its first pages left out."""
    text = Path(path).read_text(encoding="utf-8")
    skipped = min(50_000, len(text) // 10)
    return tokenizer.encode(text[skipped : skipped + 8 * count])[:count]


def report(folder: Path, texts: dict[str, list[int]], window: int, stored: Path | None) -> None:
    """The tables of one section."""
    reference, compete = hanmo_form("fp32", folder / "f16.gguf", "fp32"), list(forms(folder, stored))
    for name, ids in texts.items():
        results = measure(reference, compete, ids, window)
        any_result = next(iter(results.values()))
        print(f"\n{name}: {any_result.tokens:,} tokens, perplexity in float32 {any_result.reference_perplexity:.3f}")
        print(
            f"{'':38}{'MB':>7}{'ratio':>9}{'KL':>9} {'95 %':^18}{'median':>8}{'99 %':>8}{'RMS dp':>8}{'same top':>10}"
        )
        for form in compete:
            found = results[form.name]
            low, high = found.kl_interval or (float("nan"), float("nan"))
            print(
                f"{form.name:38}{form.size / 1e6:7.1f}{found.ratio:9.4f}{found.kl:9.5f} [{low:.5f}, {high:.5f}]"
                f"{found.kl_median:8.4f}{found.kl_99:8.3f}{found.probability_rms:8.2%}{found.same_top:10.2%}",
                flush=True,
            )


def machine() -> str:
    """The processor and how much of it is used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads"
    )


def main() -> None:
    """Make the files, print both sections."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--texts", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--calibration", action="append", default=[], metavar="FILE")
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--section", choices=SECTIONS, action="append", help="default: both")
    parser.add_argument("--files", metavar="FOLDER", help="where the forms are kept for the next time")
    given = parser.parse_args()
    path = find(MODEL)
    loaded = load_gguf(path)
    loaded.state = {name: weight.float() for name, weight in loaded.state.items()}
    texts = {Path(file).name: read_ids(file, loaded.tokenizer, given.tokens) for file in given.texts}
    versions = [f"hanmo {importlib.metadata.version('hanmo')}", f"torch {torch.__version__}"]
    if importlib.util.find_spec("llama_cpp"):
        versions.append(f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}")
    print(f"{MODEL}; {', '.join(versions)}; Python {platform.python_version()}\n{machine()}")
    print(
        f"windows of {given.window}; calibration files: {', '.join(Path(f).name for f in given.calibration) or 'none'}"
    )
    print("MB: weights in memory (llama.cpp: the file); ratio: of perplexities; KL in nats, mean with 95 % interval")
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        files = Path(given.files or temporary)
        if "original" in (given.section or SECTIONS):
            make_files(files / "original", loaded, given.calibration)
            print("\nThe weights as they are (they lie on the grid of Q4_1: it rounds nothing, int4 finds much of it)")
            report(files / "original", texts, given.window, path)
        if "other" in (given.section or SECTIONS):
            loaded.state = in_other_numbers(loaded.config, loaded.state)
            make_files(files / "other", loaded, given.calibration)
            print("\nThe same network in other numbers (its weights lie on no grid)")
            report(files / "other", texts, given.window, None)


if __name__ == "__main__":
    main()
