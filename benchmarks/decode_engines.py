"""The engines that `decode.py` compares, each behind the same two functions: write texts, and give logits.

An engine is made inside a process of its own from a folder of files (:func:`decode.make_files`):

    stored.gguf      the model as the catalog gives it (Q4_1), if there is one
    f16.gguf, Q8_0.gguf, Q4_1.gguf, Q4_0.gguf, Q4_K_M.gguf
                     what `hanmo export` and llama.cpp's own quantiser made of it
    transformers     a folder in float32
    ctranslate2, onnxruntime-int4, onnxruntime-int8, openvino-Q8_0, openvino-Q4_1
                     what their own converters made of these, where they are installed

All write greedily and go on after an end-of-sequence token.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

CONTEXT = 1024  # positions of a text at most
PIECE = 512  # tokens of a prompt that llama.cpp reads at once

KEPT: list[Any] = []  # functions that a library calls: they must not be forgotten

Prompts = Sequence[Sequence[int]]
Seen = Callable[[Sequence[int]], Any]  # is told, step by step, the number of the text of every new token


class Engine(Protocol):
    """What is measured.

    Attributes:
        version: of the package, for people.
        weight_bytes: memory of the weights.
        cache_bytes: memory of the keys and values of one position.
    """

    version: str
    weight_bytes: int
    cache_bytes: int

    def write(self, prompts: Prompts, count: int, seen: Seen) -> None:
        """Continue prompts of one length by ``count`` tokens each."""
        ...

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """What follows each token of a text, ``[T, V]``."""
        ...


class Hanmo:
    """Through its public interface. Guesses (speculation) are off unless asked for: no peer makes any."""

    def __init__(
        self, path: Path, *, precision: str | None = None, engine: str = "native", guess: bool = False
    ) -> None:
        import hanmo
        from hanmo.models.transformer import Transformer

        self.model = hanmo.load(path, precision=precision, engine=engine, device="cpu", offline=True)
        if not guess:
            self.model.engine.new_guesser = None
        network = self.model.model
        if isinstance(network, Transformer):
            config, numbers = network.config, list(network.parameters())
            self.weight_bytes = sum(number.numel() * number.element_size() for number in numbers)
            self.cache_bytes = config.num_layers * config.num_kv_heads * config.head_dim * 2 * 4
        else:
            from hanmo.inference.native.decoder import PAGE

            self.weight_bytes = network.decoder.weight_bytes
            self.cache_bytes = network.decoder.page_bytes // PAGE
        self.version = f"hanmo {importlib.metadata.version('hanmo')}: {self.model.describe()}"

    def write(self, prompts: Prompts, count: int, seen: Seen) -> None:
        from hanmo.inference.sampling import Sampling

        if len(prompts) == 1:
            chunks = self.model.stream(prompts[0], max_new_tokens=count, ignore_eos=True)
        else:  # what generate does, but seen step by step
            sampling, engine = Sampling(max_new_tokens=count, ignore_eos=True), self.model.engine
            requests = [engine.submit(ids, sampling, room=count, index=i) for i, ids in enumerate(prompts)]
            chunks = engine.chunks(requests)
        for chunk in chunks:
            seen([chunk.index] * len(chunk.ids))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        import torch

        from hanmo.inference.networks import Piece

        network = self.model.network
        text, _ = network.open(ids, 1, None)
        with self.model.engine.alone(), torch.inference_mode():
            logits: NDArray[np.float32] = network.read([Piece(text, ids, wanted=len(ids))]).float().numpy().copy()
        text.release()
        return logits


class Transformers:
    """transformers in float32: its own cache and attention, in a plain loop, which is faster than its `generate`."""

    def __init__(self, path: Path) -> None:
        import torch
        import transformers

        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        config = self.model.config
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self.weight_bytes = sum(weight.numel() * weight.element_size() for weight in self.model.parameters())
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache_bytes = config.num_hidden_layers * config.num_key_value_heads * head * 2 * 4

    def write(self, prompts: Prompts, count: int, seen: Seen) -> None:
        import torch

        with torch.inference_mode():
            ids_BT, cache = torch.tensor(prompts), None
            for _ in range(count):
                out = self.model(ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids_BT = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
                ids_BT.tolist()
                seen(range(len(prompts)))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            logits: NDArray[np.float32] = self.model(torch.tensor([ids])).logits[0].float().numpy()
        return logits


class LlamaCpp:
    """llama.cpp through the functions of its own interface: flash attention off to write, its own choice to read."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.c: Any = llama_cpp.llama_cpp
        self.threads = threads
        silence_llama()
        parameters = self.c.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = self.c.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.version = f"llama.cpp of llama-cpp-python {llama_cpp.__version__}"
        self.vocabulary = int(self.c.llama_vocab_n_tokens(self.c.llama_model_get_vocab(self.model)))
        self.weight_bytes = int(self.c.llama_model_size(self.model))
        heads, width = self.c.llama_model_n_head(self.model), self.c.llama_model_n_embd(self.model)
        head_size = width // heads
        self.cache_bytes = (
            self.c.llama_model_n_layer(self.model) * self.c.llama_model_n_head_kv(self.model) * head_size * 4
        )
        self.contexts: dict[tuple[int, bool], Any] = {}
        self.batch = self.c.llama_batch_init(CONTEXT, 0, 1)

    def context(self, texts: int, reading: bool) -> Any:
        """An empty cache for so many texts, and the memory to compute in."""
        if (texts, reading) not in self.contexts:
            parameters = self.c.llama_context_default_params()
            parameters.n_ctx, parameters.n_seq_max = CONTEXT * texts, texts
            parameters.n_batch = parameters.n_ubatch = PIECE
            parameters.n_threads = parameters.n_threads_batch = self.threads
            automatic, off = self.c.LLAMA_FLASH_ATTN_TYPE_AUTO, self.c.LLAMA_FLASH_ATTN_TYPE_DISABLED
            parameters.flash_attn_type = automatic if reading else off
            self.contexts[texts, reading] = self.c.llama_init_from_model(self.model, parameters)
        context = self.contexts[texts, reading]
        self.c.llama_memory_clear(self.c.llama_get_memory(context), False)
        return context

    def read(self, context: Any, rows: Sequence[tuple[int, int, int, bool]]) -> list[NDArray[np.float32]]:
        """Read tokens, each with its position, its text, and whether its logits are wanted."""
        batch, wanted = self.batch, []
        batch.n_tokens = len(rows)
        for i, (id, position, text, want) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = id, position, 1, text
            batch.logits[i] = want
            if want:
                wanted.append(i)
        if code := self.c.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode: {code}")
        places = [self.c.llama_get_logits_ith(context, i) for i in wanted]
        return [np.ctypeslib.as_array(place, (self.vocabulary,)) for place in places]

    def write(self, prompts: Prompts, count: int, seen: Seen) -> None:
        context, last = self.context(len(prompts), count == 1), []
        for text, ids in enumerate(prompts):
            for start in range(0, len(ids), PIECE):
                part = ids[start : start + PIECE]
                rows = [(id, start + i, text, start + i == len(ids) - 1) for i, id in enumerate(part)]
                logits = self.read(context, rows)
            last.append(int(logits[0].argmax()))
            seen([text])
        for step in range(count - 1):
            rows = [(id, len(prompts[text]) + step, text, True) for text, id in enumerate(last)]
            last = [int(logits_V.argmax()) for logits_V in self.read(context, rows)]
            seen(range(len(prompts)))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        context = self.context(1, False)
        return np.stack(self.read(context, [(id, i, 0, True) for i, id in enumerate(ids)]))


def silence_llama() -> None:
    """Drop llama.cpp's messages."""
    import llama_cpp.llama_cpp as c

    KEPT.append(c.llama_log_callback(lambda *_: None))
    c.llama_log_set(KEPT[-1], ctypes.c_void_p(0))


def quantise_llama(source: Path, target: Path, kind: str) -> None:
    """Bring a GGUF file to another type with llama.cpp's own quantiser."""
    import llama_cpp.llama_cpp as c

    silence_llama()
    parameters = c.llama_model_quantize_default_params()
    parameters.ftype = getattr(c, f"LLAMA_FTYPE_MOSTLY_{kind}")
    unfinished = target.with_suffix(".part")
    if code := c.llama_model_quantize(str(source).encode(), str(unfinished).encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp does not quantise {source} to {kind}: {code}")
    unfinished.rename(target)


class CTranslate2:
    """CTranslate2 in int8."""

    def __init__(self, path: Path, threads: int) -> None:
        import ctranslate2

        self.generator = ctranslate2.Generator(str(path), compute_type="int8", intra_threads=threads)
        tokenizer = json.loads((path / "tokenizer.json").read_text())
        self.names = {id: name for name, id in tokenizer["model"]["vocab"].items()}
        self.names |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
        self.version = f"CTranslate2 {ctranslate2.__version__}"
        self.weight_bytes = (path / "model.bin").stat().st_size
        self.cache_bytes = cache_of(path.parent / "transformers", 4)

    def tokens(self, prompts: Prompts) -> list[list[str]]:
        return [[self.names[id] for id in ids] for ids in prompts]

    def write(self, prompts: Prompts, count: int, seen: Seen) -> None:
        self.generator.generate_batch(
            self.tokens(prompts),
            **{"max_length": count, "min_length": count, "beam_size": 1, "sampling_topk": 1},
            include_prompt_in_result=False,
            end_token=[],
            callback=lambda step: bool(seen([step.batch_id])),
        )

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        out = self.generator.forward_batch(self.tokens([ids]), return_log_probs=False)
        return np.array(out, dtype=np.float32)[0]


class OnnxRuntime:
    """onnxruntime-genai, from a folder of its model builder."""

    def __init__(self, path: Path) -> None:
        import onnxruntime_genai

        self.package: Any = onnxruntime_genai
        self.model = onnxruntime_genai.Model(str(path))
        self.version = f"onnxruntime-genai {onnxruntime_genai.__version__}"
        self.weight_bytes = sum(file.stat().st_size for file in path.glob("model.onnx*"))
        self.cache_bytes = cache_of(path.parent / "transformers", 4)

    def begin(self, prompts: Prompts, count: int) -> Any:
        """A generator that has read the prompts."""
        parameters, length = self.package.GeneratorParams(self.model), len(prompts[0]) + count
        parameters.set_search_options(max_length=length, min_length=length, batch_size=len(prompts), do_sample=False)
        generator = self.package.Generator(self.model, parameters)
        generator.append_tokens(np.array(prompts, np.int32))
        return generator

    def write(self, prompts: Prompts, count: int, seen: Seen) -> None:
        generator = self.begin(prompts, count)
        for _ in range(count):
            generator.generate_next_token()
            generator.get_next_tokens()
            seen(range(len(prompts)))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return np.array(self.begin([ids], 1).get_output("logits"), dtype=np.float32)[0]


class OpenVino:
    """OpenVINO GenAI, from a folder that it made of a GGUF file; several texts and logits through OpenVINO itself."""

    def __init__(self, path: Path, threads: int) -> None:
        import openvino
        import openvino_genai

        self.openvino, self.genai, self.path = openvino, openvino_genai, path
        self.settings = {"INFERENCE_NUM_THREADS": threads}
        self.pipeline: Any = openvino_genai.LLMPipeline(str(path), "CPU", **self.settings)
        self.version = f"OpenVINO GenAI {openvino_genai.__version__}"
        self.weight_bytes = (path / "openvino_model.bin").stat().st_size
        self.cache_bytes = cache_of(path.parent / "transformers", 1)  # its default: 8 bits
        self.request: Any = None

    def run(self, ids_BT: NDArray[np.int64], before: int) -> NDArray[np.float32]:
        """Logits of tokens that follow ``before`` others, ``[B, T, V]``."""
        if self.request is None:
            network = self.openvino.Core().compile_model(self.path / "openvino_model.xml", "CPU", self.settings)
            self.request = network.create_infer_request()
        B, T = ids_BT.shape
        if before == 0:
            self.request.reset_state()
        inputs = {
            "input_ids": ids_BT,
            "attention_mask": np.ones((B, before + T), np.int64),
            "position_ids": np.arange(before, before + T)[None].repeat(B, 0),
            "beam_idx": np.arange(B, dtype=np.int32),
        }
        return next(iter(self.request.infer(inputs).values()))

    def write(self, prompts: Prompts, count: int, seen: Seen) -> None:
        if len(prompts) > 1:
            ids_BT, before = np.array(prompts, np.int64), 0
            for _ in range(count):
                chosen_B = self.run(ids_BT, before)[:, -1].argmax(-1)
                before += ids_BT.shape[1]
                ids_BT = chosen_B[:, None]
                seen(range(len(prompts)))
            return
        running = self.genai.StreamingStatus.RUNNING

        class Listener(self.genai.StreamerBase):  # type: ignore[name-defined,misc]
            def write(self, tokens: Any) -> Any:
                seen([0] * np.size(tokens))
                return running

            def end(self) -> None:
                pass

        settings = self.genai.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos, settings.do_sample = count, True, False
        self.pipeline.generate(self.openvino.Tensor(np.array(prompts, np.int64)), settings, Listener())

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return self.run(np.array([ids], np.int64), 0)[0].copy()


def cache_of(folder: Path, number_bytes: int) -> int:
    """Memory of the keys and values of one position, by a configuration of transformers."""
    config = json.loads((folder / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(config["num_hidden_layers"] * config["num_key_value_heads"] * head * 2 * number_bytes)


def int8_of_hanmo(files: Path) -> Engine:
    """The stored weights rounded to 8 bits; else llama.cpp's own Q8_0 file."""
    stored = files / "stored.gguf"
    return Hanmo(stored, precision="int8") if stored.exists() else Hanmo(files / "Q8_0.gguf")


def as_stored(files: Path) -> Path:
    """The Q4_1 file that Hanmo and llama.cpp both read."""
    stored = files / "stored.gguf"
    return stored if stored.exists() else files / "Q4_1.gguf"


ENGINES: dict[str, Callable[[Path, int], Engine]] = {
    "Hanmo Q4_1": lambda files, _: Hanmo(as_stored(files)),
    "llama.cpp Q4_1": lambda files, threads: LlamaCpp(as_stored(files), threads),  # beside what it is compared with
    "Hanmo int8": lambda files, _: int8_of_hanmo(files),
    "llama.cpp Q8_0": lambda files, threads: LlamaCpp(files / "Q8_0.gguf", threads),
    "Hanmo Q4_1, guesses": lambda files, _: Hanmo(as_stored(files), guess=True),
    "Hanmo fp32": lambda files, _: Hanmo(files / "transformers"),
    "Hanmo torch": lambda files, _: Hanmo(files / "transformers", engine="torch"),
    "llama.cpp Q4_0": lambda files, threads: LlamaCpp(files / "Q4_0.gguf", threads),
    "llama.cpp Q4_K_M": lambda files, threads: LlamaCpp(files / "Q4_K_M.gguf", threads),
    "transformers": lambda files, _: Transformers(files / "transformers"),
    "CTranslate2 int8": lambda files, threads: CTranslate2(files / "ctranslate2", threads),
    "onnxruntime int4": lambda files, _: OnnxRuntime(files / "onnxruntime-int4"),
    "onnxruntime int8": lambda files, _: OnnxRuntime(files / "onnxruntime-int8"),
    "OpenVINO Q8_0": lambda files, threads: OpenVino(files / "openvino-Q8_0", threads),
    "OpenVINO Q4_1": lambda files, threads: OpenVino(files / "openvino-Q4_1", threads),
}
NEEDS = {  # packages by the first word of an engine's name
    "llama.cpp": "llama_cpp",
    "transformers": "transformers",
    "CTranslate2": "ctranslate2",
    "onnxruntime": "onnxruntime_genai",
    "OpenVINO": "openvino_genai",
}
