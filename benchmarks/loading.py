"""From a model folder to the first token: seconds and peak memory, beside `transformers`.

    python benchmarks/loading.py [MODEL]

MODEL is a name or folder that Hanmo loads (default: SmolLM2-135M-Instruct from the catalog). It is stored once as
float32 and once as bfloat16 safetensors. Every row is a fresh process whose imports are done before the clock starts;
memory is the peak of the resident set above what the process had after its imports. The first run of a row warms the
disk cache and is thrown away; the median of three more is shown.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HANMO = """
import hanmo, torch
from hanmo.inference.loading import load
import hanmo.models.checkpoints.huggingface, hanmo.inference.engine, jinja2
def run(folder):
    model = load(folder, device="cpu")
    return model.generate([[1, 504, 253]], max_new_tokens=1, ignore_eos=True)[0].ids
"""
PEER = """
import torch, transformers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
def run(folder):
    PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[1, 504, 253]])
    return model.generate(ids, max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 3:].tolist()
"""
CLOCK = """
import json, resource, sys, time
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = resident(), time.perf_counter()
ids = run(sys.argv[1])
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "bytes": peak() - before, "ids": ids}))
"""


def measure(code: str, folder: Path) -> dict[str, float]:
    """Median of three runs in fresh processes, after one that warms the disk cache."""
    runs = []
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, "-c", code + CLOCK, str(folder)], capture_output=True, text=True, check=True
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    kept = runs[1:]
    return {
        "seconds": statistics.median(run["seconds"] for run in kept),
        "bytes": statistics.median(run["bytes"] for run in kept),
        "first": kept[0]["ids"][0],
    }


def main() -> None:
    """Store the model in both precisions, measure, print."""
    import torch
    import transformers

    import hanmo
    from hanmo.models.checkpoints.save import save_folder

    model = hanmo.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct", device="cpu")
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, hanmo {hanmo.__version__}, "
          f"transformers {transformers.__version__}")  # fmt: skip
    print(f"{'':28}{'weights':>10}{'seconds':>10}{'peak':>10}{'peak/fp32 weights':>20}{'first token':>13}")
    with tempfile.TemporaryDirectory() as scratch:
        fp32 = sum(parameter.numel() for parameter in model.model.parameters()) * 4
        for dtype in (torch.float32, torch.bfloat16):
            folder = Path(scratch) / str(dtype)
            save_folder(folder, model.model.to(dtype), model.tokenizer, provenance={})
            stored = (folder / "model.safetensors").stat().st_size
            for name, code in (("hanmo", HANMO), ("transformers", PEER)):
                row = measure(code, folder)
                label = f"{name}, {str(dtype).removeprefix('torch.')}"
                print(f"{label:28}{stored / 1e6:>8.0f}MB{row['seconds']:>9.2f}s{row['bytes'] / 1e6:>8.0f}MB"
                      f"{row['bytes'] / fp32:>19.2f}x{row['first']:>13}")  # fmt: skip


if __name__ == "__main__":
    main()
