"""Memory of training beside what is told before it.

    python benchmarks/memory.py [--only WORDS] [--texts FILES] [--encoder FOLDER] [--decoder FOLDER]

Each row is a process of its own that trains some steps with the real trainer (evaluation, checkpoint and the choice of
the best weights included) and then reads its peak of resident memory (VmHWM of /proc/self/status: what `top` shows as
RES at its highest, Python, torch and the pages of mapped files included). Beside it stands the estimate that the same
run prints before it starts. The last rows run whole commands, in which the preparation of the data counts too; those of
fine-tuning need folders of models, as `hanmo models pull` leaves them.

A ratio outside 0.85 to 1.15 is marked.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 8192
STEPS = 4
NEAR = 0.15
UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@dataclass
class Case:
    """What a process trains: the work as the estimate knows it, and how."""

    work: Any
    objective: Any
    model: Any
    optimizer: Any
    average: float = 0.0


def peak() -> int:
    """The most resident memory that this process ever had, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def network(layers: int, width: int, context: int, layout: str, **more: Any) -> Any:
    """A decoder in Hanmo's own layout or in GPT-2's, an encoder in BERT's, or an encoder-decoder in BART's."""
    from hanmo.models.transformer import TransformerConfig

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": width // 64,
        "num_kv_heads": width // 64,
        "head_dim": 64,
        "max_position_embeddings": context,
    }
    if layout == "qwen3":
        return TransformerConfig(**common, intermediate_size=8 * width // 3, model_type="qwen3", qk_norm=True, **more)
    common |= {
        "intermediate_size": 4 * width,
        "norm": "layer",
        "norm_bias": True,
        "positions": "learned",
        "gated": False,
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    }
    if layout == "gpt2":
        return TransformerConfig(**common, model_type="gpt2", activation="gelu_tanh", **more)
    common |= {"activation": "gelu", "norm_placement": "post", "final_norm": False, "embedding_norm": True}
    if layout == "bert":
        return TransformerConfig(**common, model_type="bert", causal=False, token_types=2, lm=False, **more)
    encoder = TransformerConfig(**common, model_type="bart", causal=False, shared_embedding=True)
    return TransformerConfig(**common, model_type="bart", encoder=encoder, **more)


def pretraining(
    layers: int,
    width: int,
    context: int,
    batch: int,
    micro: int,
    *,
    layout: str = "qwen3",
    optimizer: str = "muon",
    precision: str = "fp32",
    recomputed: bool = False,
    average: float = 0.0,
    lora: bool = False,
    **more: Any,
) -> Case:
    """Next tokens of a random text."""
    import numpy as np

    from hanmo.models.adapters import LoraConfig, add_adapter
    from hanmo.models.kernels.products import set_precision
    from hanmo.models.transformer import Transformer
    from hanmo.training.acceleration import checkpoint_blocks
    from hanmo.training.estimates import Work
    from hanmo.training.objectives import CausalLanguageModeling
    from hanmo.training.optimizer import OptimizerSettings

    config = network(layers, width, context, layout, **more)
    model = Transformer(config)
    model.initialize(0)
    count = add_adapter(model, "default", LoraConfig(rank=16)) if lora else 0
    set_precision(model, precision)
    if recomputed:
        checkpoint_blocks(model)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 40 * context).astype(np.uint16)
    split = 30 * context
    work = Work(
        config,
        micro,
        context,
        trained=count or None,
        adapters=count,
        muon=optimizer == "muon" and not lora,
        average=average > 0,
        checkpointed=recomputed,
        accumulated=micro < batch,
    )
    sizes = {"context": context, "batch_size": batch, "micro_batch": micro, "seed": 0}
    objective = CausalLanguageModeling(tokens[:split], tokens[split:], **sizes)
    return Case(work, objective, model, OptimizerSettings(muon=work.muon), average)


def sequence_to_sequence(layers: int, width: int, source: int, target: int, batch: int) -> Case:
    """Random answers to random sources."""
    import numpy as np

    from hanmo.models.transformer import Transformer
    from hanmo.training.estimates import Work
    from hanmo.training.objectives.seq2seq import SequenceToSequence, SourceRow
    from hanmo.training.optimizer import OptimizerSettings

    config = network(layers, width, max(source, target), "bart", dropout=0.1)
    model = Transformer(config)
    model.initialize(0)
    draw = np.random.default_rng(0)
    rows = [
        SourceRow(*(draw.integers(4, VOCABULARY, size).astype(np.int32) for size in (source, target, target)))
        for _ in range(4 * batch)
    ]
    objective = SequenceToSequence(rows[batch:], rows[:batch], batch_size=batch, micro_batch=batch, seed=0)
    work = Work(config, batch, source + target, accumulated=False)
    return Case(work, objective, model, OptimizerSettings(muon=False))


CASES: dict[str, Callable[[], Case]] = {
    "14M, 16 x 256": lambda: pretraining(6, 384, 256, 16, 16),
    "14M, 16 x 256, without native kernels": lambda: pretraining(6, 384, 256, 16, 16),
    "14M, 16 x 256, int8": lambda: pretraining(6, 384, 256, 16, 16, precision="int8"),
    "14M, 16 x 256, AdamW": lambda: pretraining(6, 384, 256, 16, 16, optimizer="adamw"),
    "14M, 16 x 256, average": lambda: pretraining(6, 384, 256, 16, 16, average=0.99),
    "14M, 16 x 256, recomputed": lambda: pretraining(6, 384, 256, 16, 16, recomputed=True),
    "14M, 4 of 16 x 256": lambda: pretraining(6, 384, 256, 16, 4),
    "14M, GPT-2 with dropout": lambda: pretraining(6, 384, 256, 16, 16, layout="gpt2", optimizer="adamw", dropout=0.1),
    "14M, LoRA": lambda: pretraining(6, 384, 256, 16, 16, optimizer="adamw", lora=True),
    "30M, 16 x 256": lambda: pretraining(8, 512, 256, 16, 16),
    "30M, 8 x 1,024": lambda: pretraining(8, 512, 1024, 8, 8),
    "30M, 4 of 8 x 1,024": lambda: pretraining(8, 512, 1024, 8, 4),
    "30M, 2 of 8 x 1,024 (what the dial takes)": lambda: pretraining(8, 512, 1024, 8, 2),
    "30M, 8 x 1,024, recomputed": lambda: pretraining(8, 512, 1024, 8, 8, recomputed=True),
    "110M, 1 of 2 x 256": lambda: pretraining(12, 768, 256, 2, 1),
    "encoder-decoder, 8 x (256 + 128)": lambda: sequence_to_sequence(4, 384, 256, 128, 8),
}


def measure(name: str) -> dict[str, Any]:
    """Train one case in this process."""
    import torch

    from hanmo.models.device import set_threads
    from hanmo.training.estimates import memory_of
    from hanmo.training.fit import FitSettings, Trainer

    set_threads()
    case = CASES[name]()
    estimate = memory_of(case.work)
    with tempfile.TemporaryDirectory() as folder:
        settings = FitSettings(case.optimizer, max_steps=STEPS, evaluations=2, average=case.average)
        Trainer(case.model, case.objective, settings, Path(folder), device=torch.device("cpu")).fit()
    return {"estimate": estimate.total, "peak": peak(), "parts": estimate.rows()}


def commands(texts: list[str], encoder: str | None, decoder: str | None, folder: Path) -> dict[str, list[str]]:
    """Whole commands by name; records of fine-tuning are made of the texts."""
    steps = ["--max-steps", str(STEPS)]
    found = {
        "hanmo pretrain --size micro": ["pretrain", *texts, "--size", "micro", *steps],
        "hanmo pretrain --size small": ["pretrain", *texts, "--size", "small", *steps],
        "hanmo pretrain --objective masked": ["pretrain", *texts, "--size", "mini", "--objective", "masked", *steps],
        "hanmo pretrain --architecture lstm": ["pretrain", *texts, "--architecture", "lstm", "--size", "small", *steps],
    }
    words = " ".join(Path(path).read_text(encoding="utf-8")[:200_000] for path in texts).split()
    pieces = [" ".join(words[at : at + 60]) for at in range(0, min(len(words), 6000), 60)]
    labelled, chats = folder / "labelled.jsonl", folder / "chats.jsonl"
    with labelled.open("w", encoding="utf-8") as stream:
        for number, piece in enumerate(pieces):
            stream.write(json.dumps({"text": piece, "label": "odd" if number % 2 else "even"}) + "\n")
    with chats.open("w", encoding="utf-8") as stream:
        for piece in pieces:
            stream.write(json.dumps({"instruction": "Go on:", "output": piece}) + "\n")
    if encoder:
        given = ["finetune", str(labelled), "--task", "classification", "--base", encoder, *steps]
        found["hanmo finetune --task classification"] = given
    if decoder:
        given = ["finetune", str(chats), "--task", "instructions", "--base", decoder, "--batch-size", "4", *steps]
        found["hanmo finetune --lora"] = [*given, "--lora"]
        found["hanmo finetune, all weights"] = given
    return found


def measure_command(arguments: list[str]) -> dict[str, Any]:
    """Run a command in this process; the estimate is read from what it tells."""
    from hanmo.cli.main import main as run

    told = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(told):
        code = run([*arguments, "--out", f"{folder}/run"])
    found = re.search(r"memory\s+([\d.]+) ([kMGT]?B)(?: of [^(]*\((.*)\))?", told.getvalue())
    if code or found is None:
        return {"error": told.getvalue()[-800:]}
    size = float(found[1]) * UNITS[found[2]]
    return {"estimate": size, "peak": peak(), "parts": {"": found[3] or ""}}


def child(request: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """One measurement in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(request)],
        capture_output=True,
        text=True,
        env={**os.environ, "HANMO_LANG": "en", "NO_COLOR": "1", **environment},
        check=False,
    )
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else {"error": done.stderr[-800:]}


def show(name: str, result: dict[str, Any], *, parts: bool) -> None:
    """One row."""
    if "error" in result:
        print(f"{name:44}failed: {result['error']}")
        return
    ratio = result["peak"] / result["estimate"]
    mark = "" if abs(ratio - 1) <= NEAR else "  <-- off"
    print(f"{name:44}{result['estimate'] / 1e6:10,.0f}{result['peak'] / 1e6:10,.0f}{ratio:9.2f}{mark}", flush=True)
    if parts:
        print("    " + ", ".join(f"{key} {value}" for key, value in result["parts"].items()))


def main() -> None:
    """Measure all rows and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--texts", nargs="*", default=[], help="texts for the whole commands")
    parser.add_argument("--encoder", help="folder of an encoder to fine-tune")
    parser.add_argument("--decoder", help="folder of a decoder to fine-tune")
    parser.add_argument("--parts", action="store_true", help="show what the estimates are made of")
    options = parser.parse_args()
    if options.child:
        request = json.loads(options.child)
        result = measure(request[1]) if request[0] == "case" else measure_command(request[1:])
        print(json.dumps(result))
        return
    import torch

    import hanmo

    print("$ python benchmarks/memory.py " + " ".join(sys.argv[1:]))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
          f"hanmo {hanmo.__version__}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}")  # fmt: skip
    print(f"{'':44}{'told, MB':>10}{'peak, MB':>10}{'ratio':>9}")
    for name in CASES:
        if options.only in name:
            environment = {"HANMO_NATIVE": "0"} if "without native" in name else {}
            show(name, child(["case", name], environment), parts=options.parts)
    if options.texts:
        with tempfile.TemporaryDirectory() as folder:
            given = (options.encoder, options.decoder)
            for name, arguments in commands(options.texts, *given, Path(folder)).items():
                if options.only in name:
                    show(name, child(["command", *arguments], {}), parts=options.parts)


if __name__ == "__main__":
    main()
