"""Time to quality on tinyshakespeare, character level: loss on the whole validation part after a training budget.

    python benchmarks/speedrun.py ../shared/data/tinyshakespeare/input.txt --budgets 15s 180s
    python benchmarks/speedrun.py ../shared/data/tinyshakespeare/input.txt --chinese ../shared/data/zh-novels

Runs nanoGPT's recipe for a CPU (4 layers, width 128, context 64, 2,000 steps of 12 sequences), written anew here, and
then `hanmo pretrain` as a user would (character tokenizer; the first 90 % of the characters train, the last 10 % are
validated), one after the other on the same machine, and prints hardware, versions, settings and results. With
--chinese also `hanmo build` on Chinese texts, whose report compares bits per byte with the 5-gram model.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hanmo.cli.doctor import processor
from hanmo.training.plan import measure_matrix_rate

LAYERS, WIDTH, HEADS, CONTEXT, BATCH, STEPS = 4, 128, 4, 64, 12, 2000  # nanoGPT's recipe for a CPU
RATE, LOWEST, WARMUP = 1e-3, 1e-4, 100


def nano_gpt(path: str) -> tuple[float, float]:
    """nanoGPT's recipe: seconds of training and loss on the whole validation part."""
    import torch.nn.functional as F
    from torch import nn

    text = Path(path).read_text(encoding="utf-8")
    number = {character: index for index, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([number[character] for character in text])
    cut = int(0.9 * len(ids))
    train, held_out = ids[:cut], ids[cut:]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

        def forward(self, x: Any) -> Any:
            rows, length, _ = x.shape
            heads = (part.view(rows, length, HEADS, -1).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, 2))
            y = F.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(x.shape))
            return x + self.down(F.gelu(self.up(self.second(x))))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(len(number), WIDTH), nn.Embedding(CONTEXT, WIDTH)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH, bias=False)
            for name, parameter in self.named_parameters():
                if parameter.dim() > 1:
                    deep = name.endswith(("out.weight", "down.weight"))
                    nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if deep else 0.02)

        def forward(self, x: Any, y: Any) -> Any:
            x = self.tokens(x) + self.places(torch.arange(x.size(1)))
            for block in self.blocks:
                x = block(x)
            return F.cross_entropy((self.norm(x) @ self.tokens.weight.t()).flatten(0, 1), y.flatten())

    torch.manual_seed(1337)
    model = Network()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": matrices, "weight_decay": 0.1}]
    groups += [{"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99), fused=True)
    start = time.perf_counter()
    for step in range(STEPS):
        fall = 0.5 * (1 + math.cos(math.pi * max(0, step - WARMUP) / (STEPS - WARMUP)))
        rate = RATE * (step + 1) / WARMUP if step < WARMUP else LOWEST + fall * (RATE - LOWEST)
        for group in optimizer.param_groups:
            group["lr"] = rate
        at = torch.randint(len(train) - CONTEXT - 1, (BATCH,))
        x = torch.stack([train[i : i + CONTEXT] for i in at.tolist()])
        y = torch.stack([train[i + 1 : i + CONTEXT + 1] for i in at.tolist()])
        loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    count = (len(held_out) - 1) // CONTEXT
    x, y = held_out[: count * CONTEXT].view(count, CONTEXT), held_out[1 : count * CONTEXT + 1].view(count, CONTEXT)
    with torch.no_grad():
        pieces = [(len(a), float(model(a, b))) for a, b in zip(x.split(128), y.split(128), strict=True)]
    return seconds, sum(rows * value for rows, value in pieces) / count


def hanmo(path: str, budget: str, extra: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `hanmo pretrain` reports, and its settings."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hanmo", "pretrain", path, "--tokenizer", "char"]
        command += ["--split", "tail", "--validation-share", "0.1", "--test-share", "0"]
        command += ["--budget", budget, "--out", str(Path(folder) / "run"), "--json", *extra]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        settings = json.loads((Path(folder) / "run" / "settings.json").read_text())["settings"]
        return json.loads(done.stdout), settings


def chinese(path: str, budget: str) -> dict[str, Any]:
    """The evaluation of `hanmo build` on Chinese texts."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hanmo", "build", path, "--budget", budget, "--json"]
        command += ["--out", str(Path(folder) / "run")]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        result: dict[str, Any] = json.loads(done.stdout)
        return result


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="tinyshakespeare's input.txt")
    parser.add_argument("--budgets", nargs="+", default=["15s", "180s"])
    parser.add_argument("--chinese", help="a folder of Chinese texts")
    parser.add_argument("--no-peer", action="store_true", help="leave nanoGPT's recipe out")
    parser.add_argument("--flags", default="", help="further flags for hanmo pretrain, in one string")
    given = parser.parse_args()
    rate = measure_matrix_rate(torch.device("cpu")) / 1e9
    print(f"{processor()}; {torch.get_num_threads()} threads; {rate:.0f} GFLOP/s in float32 products")
    print(f"Python {platform.python_version()}, torch {torch.__version__}", flush=True)
    if not given.no_peer:
        seconds, loss = nano_gpt(given.text)
        print(f"nanoGPT's recipe for a CPU: loss {loss:.4f} after {seconds:.1f} s of training", flush=True)
    for budget in given.budgets:
        result, settings = hanmo(given.text, budget, shlex.split(given.flags))
        keys = ("size", "context", "batch_size", "learning_rate", "weight_decay", "seed")
        print(
            f"hanmo, {budget}: loss {result['validation_loss']:.4f} after {result['seconds']:.1f} s, evaluations "
            f"included; {result['steps']} steps, {result['tokens'] / 1e6:.2f} M tokens, "
            f"{result['tokens_per_second']:,.0f} tok/s (" + ", ".join(f"{key} {settings[key]}" for key in keys) + ")",
            flush=True,
        )
    if given.chinese:
        built = chinese(given.chinese, given.budgets[-1])
        for row in built["evaluation"]["rows"]:
            print(f"{given.chinese}: {row}")
        print(built["evaluation"].get("verdict") or built["evaluation"].get("comparison"))


if __name__ == "__main__":
    main()
