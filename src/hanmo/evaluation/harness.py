"""EleutherAI's lm-evaluation-harness on Hanmo's models: ``lm_eval --model hanmo --model_args pretrained=NAME``.

What is asked of a model here (which tokens are context and which continuation, what an empty context stands for, on
which side a long text is cut) follows the harness's own model ``hf`` to the letter, so that the log-likelihood of every
document is the same for the same weights; who computes them is Hanmo's engine.

The harness finds this class by the entry point ``lm_eval.models`` (its releases after 0.4.13) or, where it reads none,
by :mod:`hanmo.evaluation.harness_name`. ``python -m hanmo.evaluation.harness`` is ``lm_eval`` with this model known to
it in any case.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from hanmo.errors import DataError, HanmoError, ModelError, UsageError, missing_package, nearest
from hanmo.evaluation.continuations import score_continuations
from hanmo.evaluation.harness_name import NAME
from hanmo.inference.language_model import LanguageModel
from hanmo.inference.loading import find, load
from hanmo.inference.sampling import MAX_STOP_LENGTH, MAX_STOPS
from hanmo.inference.settings import ENGINES, PRECISIONS
from hanmo.models.checkpoints.huggingface import expects_bos, read_object
from hanmo.models.checkpoints.weights import known_ids
from hanmo.models.device import choose_device
from hanmo.models.transformer import Transformer
from hanmo.text.chat import render_text
from hanmo.text.wrapping import wrapping_of

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise missing_package("lm_eval", "harness", "lm-evaluation-harness") from error

BATCH = 8
DTYPES = {"auto": None, "float32": "fp32", "float16": "fp16", **{name: name for name in PRECISIONS}}
MARK = "\ue000the message goes on\ue000 "  # what comes after it in a rendered conversation is cut
FLOATS = {"fp32": "float32", "fp16": "float16"}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")
NEUTRAL: dict[str, tuple[Any, ...]] = {"num_beams": (1,), "num_return_sequences": (1,), "use_cache": (True, False)}
ARGUMENTS = (
    "pretrained",
    "dtype",
    "batch",
    "device",
    "engine",
    "kv_cache",
    "max_length",
    "max_gen_toks",
    "add_bos_token",
    "prefix_token_id",
    "seed",
    "offline",
)


@register_model(NAME)
class HanmoLM(TemplateLM):  # type: ignore[misc] # the harness has no types
    """A model of Hanmo's as the harness sees it.

    Args:
        pretrained: what :func:`hanmo.load` takes: a folder, a run, a GGUF file, a name of the catalog.
        dtype: the weights: fp32 (or float32), fp16 (float16); on a CPU also int8, int4; auto: as they are stored, and
            float32 on a CPU where they are stored as floats.
        batch: how many contexts are read, or texts are written, at the same time; ``--batch_size`` says the same.
        device: auto, cpu, cuda, cuda:1, mps.
        engine: auto, native or torch.
        kv_cache: fp32, fp16 or int8; the native engine's.
        max_length: tokens that the model is given at most; default: its context.
        max_gen_toks: tokens that are written where a task does not say.
        add_bos_token: whether BOS (else what a text begins after) stands before every text; default: as the tokenizer's
            files say, which is what ``hf`` does.
        prefix_token_id: what stands before a text without context; default: BOS, else EOS.
        seed: of what is sampled.
        offline: never use the network.
        model: a model that is loaded already, instead of ``pretrained``; in Python.

    Raises:
        UsageError: an argument that is not known, or a value that it cannot have.
        ModelError: nothing of that name, or a model that gives no likelihoods: one that reads texts, or a remote one.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        dtype: str = "auto",
        batch: int | str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,  # noqa: ARG002 - the harness gives it; nothing here finds a size out
        device: str = "auto",
        engine: str = "auto",
        kv_cache: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 1234,
        offline: bool = False,
        trust_remote_code: bool = False,  # noqa: ARG002 - the harness's, for data sets; no model here brings code
        model: LanguageModel | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise refused(f"there is no model argument '{name}'", nearest(name, ARGUMENTS), f"没有模型参数 '{name}'")
        self.batch_size = whole(batch if batch is not None else batch_size, "batch", BATCH)
        self.prefix: list[int] = []
        self.suffix: list[int] = []
        if model is None:
            model = check(load_model(pretrained, dtype, device, engine, kv_cache, offline))
            self.prefix, self.suffix = follow_files(model, str(pretrained), offline)
        self.model = check(model)
        self.tokenizer = self.model.tokenizer
        self.name = str(pretrained or self.model.name)
        if add_bos_token is not None:
            start = self.model.start_id
            self.prefix = [start] if add_bos_token and start is not None else []
        self.custom_prefix_token_id = None if prefix_token_id is None else whole(prefix_token_id, "prefix_token_id", 0)
        self.max_length = min(
            whole(max_length, "max_length", self.model.context_length, least=2), self.model.context_length
        )
        self.max_gen_toks = whole(max_gen_toks, "max_gen_toks", 256)
        self.seed = whole(seed, "seed", 0, least=0)
        self._device = self.model.device

    # What a text is to the model -------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ends = (self.tokenizer.eos_id, *sorted(self.model.eos_ids), self.tokenizer.bos_id)
        return self.known(next((id for id in ends if id is not None), None))

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        candidates = (self.custom_prefix_token_id, self.tokenizer.bos_id, self.tokenizer.eos_id)
        return self.known(next((id for id in candidates if id is not None), None))

    def known(self, id: int | None) -> int:
        """A token that the vocabulary has.

        Raises:
            UsageError: it has none.
        """
        if id is None or not 0 <= id < self.tokenizer.vocab_size:
            raise refused(
                "the model has no token that a text begins after" if id is None else f"there is no token {id}",
                f"give one that stands before a text without context: prefix_token_id=0 to "
                f"{self.tokenizer.vocab_size - 1}",
                f"请用 prefix_token_id 指定空上文之前的词元（0 到 {self.tokenizer.vocab_size - 1}）",
            )
        return id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text. Control tokens written in it are control tokens: rendered conversations come this way."""
        ids = self.tokenizer.encode(string, special=True)
        if add_special_tokens is None:
            start = self.tokenizer.decode([self.prefix_token_id], skip_special=False)
            add_special_tokens = not (start and string.startswith(start))
        return [*self.prefix, *ids, *self.suffix] if add_special_tokens else ids

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of prompts: those of another tokenizer or template are others."""
        return f"hanmo__{Path(self.name).name}__{self.tokenizer.fingerprint[:12]}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without a generation prompt the last message is left open, to be continued.

        Raises:
            ModelError: the model has no chat template.
            DataError: the template refuses the conversation.
        """
        messages = [{key: message[key] for key in ("role", "content")} for message in chat_history]
        if not add_generation_prompt:
            messages[-1]["content"] += MARK
        try:
            text = render_text(self.tokenizer, messages, add_generation_prompt=add_generation_prompt)
        except DataError:  # some templates know no system
            rest = [message for message in messages if message["role"] != "system"]
            if not rest or len(rest) == len(messages):
                raise
            text = render_text(self.tokenizer, rest, add_generation_prompt=add_generation_prompt)
        before, mark, after = text.rpartition(MARK.strip())
        if add_generation_prompt or not mark:
            return text
        return before if after.startswith(" ") else before.rstrip()  # this template trims its messages

    # What the harness asks -------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether it is what the model would have written."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = score_continuations(self.model, pairs, max_length=self.max_length, batch=self.batch_size)
        for score in tqdm(scores, "Running loglikelihood requests", len(pairs), disable=disable_tqdm):
            answers[score.place] = answer = (score.logprob, score.greedy)
            if requests[score.place][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[score.place][0], answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts; long ones in windows, each token predicted once."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts until a stop string, the end of the text, or so many tokens."""
        texts = [""] * len(requests)
        seen: Counter[str] = Counter()
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            context, options = request.args
            seen[f"{options}{context}"] += 1  # a request that comes again is to be drawn anew
            groups.setdefault(f"{seen[f'{options}{context}']} {options}", []).append(number)
        with tqdm(desc="Running generate_until requests", total=len(requests), disable=disable_tqdm) as bar:
            for group, numbers in groups.items():
                write = Writing(self, requests[numbers[0]].args[1], self.seed + int(group.split()[0]) - 1)
                encoded = {number: self.tok_encode(requests[number].args[0])[-write.room :] for number in numbers}
                numbers.sort(key=lambda number: -len(encoded[number]))
                for start in range(0, len(numbers), self.batch_size):
                    part = numbers[start : start + self.batch_size]
                    for number, text in zip(part, write([encoded[number] for number in part]), strict=True):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                        bar.update()
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return {"model_name": self.name, "model_engine": self.model.describe()}


class Writing:
    """How the texts of one task are written.

    Args:
        options: the task's ``generation_kwargs``.
        seed: of what is sampled.

    Raises:
        UsageError: an option that is not known, or more tokens than the context has.
    """

    def __init__(self, lm: HanmoLM, options: dict[str, Any], seed: int) -> None:
        self.lm = lm
        given = dict(normalize_gen_kwargs(options, lm.max_gen_toks))
        limit, sample, until = (given.pop(name) for name in ("max_gen_toks", "do_sample", "until"))
        for name in [name for name in given if name in NEUTRAL and given[name] in NEUTRAL[name]]:
            del given[name]
        for name in given:
            if name not in SAMPLING:
                raise refused(
                    f"the generation option '{name}={given[name]}' is not known",
                    nearest(name, ("until", "max_gen_toks", "do_sample", *SAMPLING)),
                    f"未知的生成选项 '{name}={given[name]}'",
                )
        end = lm.tokenizer.decode([lm.eot_token_id], skip_special=False)
        self.until: list[str] = [text for text in handle_stop_sequences(until, end) if text]
        self.room = lm.max_length - limit
        if self.room < 1:
            raise refused(
                f"{limit} tokens are to be written; the model is given at most {lm.max_length}, the context included",
                f"a smaller max_gen_toks, below {lm.max_length}",
                f"要生成 {limit} 个词元，而模型最多容纳 {lm.max_length} 个（含上文）；请减小 max_gen_toks",
            )
        drawn = {"temperature": 1.0, **given} if sample else {"temperature": 0.0}
        special = lm.tokenizer.special_tokens
        self.ends = {special[text] for text in self.until if text in special}
        stops = [text for text in self.until if text not in special and len(text) <= MAX_STOP_LENGTH][:MAX_STOPS]
        self.options = {**drawn, "stop": stops, "max_new_tokens": limit, "seed": seed}

    def __call__(self, prompts: list[list[int]]) -> Iterable[str]:
        """What follows each prompt."""
        for completion in self.lm.model.generate(prompts, **self.options):
            ids = completion.ids
            ids = ids[: next((place for place, id in enumerate(ids) if id in self.ends), len(ids))]
            yield postprocess_generated_text(self.lm.tokenizer.decode(ids), self.until, None)


def load_model(
    pretrained: str | None, dtype: str, device: str, engine: str, kv_cache: str | None, offline: bool
) -> Any:
    """The model that the arguments name.

    Raises:
        UsageError: none is named, or a value that an argument cannot have.
        ModelError: as :func:`hanmo.load`; and a remote model.
    """
    if not pretrained:
        raise refused("no model is named", "--model_args pretrained=NAME", "没有指定模型：--model_args pretrained=名称")
    if str(pretrained).lower().startswith("openai:"):
        raise ModelError(
            "a remote model gives no likelihoods of given texts",
            where=str(pretrained),
            fix="the harness has models of its own for servers: --model local-completions",
            zh="远程模型不给出指定文本的似然。请使用评测框架自带的 --model local-completions",
        )
    if str(dtype) not in DTYPES:
        raise refused(f"there is no dtype '{dtype}'", nearest(str(dtype), DTYPES), f"没有数据类型 '{dtype}'")
    if engine not in ENGINES:
        raise refused(f"there is no engine '{engine}'", nearest(engine, ENGINES), f"没有引擎 '{engine}'")
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        device = "auto"  # the harness asks for the first GPU where nobody names a device
    place: dict[str, Any] = {"device": device, "engine": engine, "kv_cache": kv_cache, "offline": bool(offline)}
    precision = DTYPES[str(dtype)]
    if precision is None or choose_device(device).type == "cpu":
        return load(str(pretrained), precision=precision, **place)
    return converted(check(load(str(pretrained), **place)), precision)


def converted(model: LanguageModel, precision: str) -> LanguageModel:
    """A model on an accelerator with its weights as floats of another size.

    Raises:
        UsageError: weights of 8 or 4 bits, which only CPUs compute; or a network that torch does not hold.
    """
    if precision not in FLOATS or not isinstance(model.model, Transformer):
        raise refused(
            f"dtype={precision} cannot be had on {model.device}",
            "leave dtype out, or device=cpu",
            f"{model.device} 上不能使用 dtype={precision}。请去掉 dtype，或使用 device=cpu",
        )
    return LanguageModel(
        model.model.to(getattr(torch, FLOATS[precision])),
        model.tokenizer,
        name=model.name,
        eos_ids=sorted(model.eos_ids),
        prompt_prefix=model.prompt_prefix,
        forbidden_ids=model.forbidden_ids,
    )


def check(model: Any) -> LanguageModel:
    """A model that gives the likelihood of a text.

    Raises:
        ModelError: an encoder, an encoder-decoder, word vectors, a linear model and so on.
    """
    if not isinstance(model, LanguageModel) or model.reads_source:
        raise ModelError(
            f"a {type(model).__name__} gives no likelihood of a text",
            where=str(getattr(model, "name", "")),
            why="the harness asks how probable a text is, from left to right; encoders and encoder-decoders cannot say",
            fix="give a decoder, a recurrent model or an n-gram model; encoders are scored by hanmo evaluate",
            zh="该模型不能给出文本从左到右的似然。请使用解码器、循环网络或 n 元模型；编码器请用 hanmo evaluate 评测",
        )
    return model


def follow_files(model: LanguageModel, name: str, offline: bool) -> tuple[list[int], list[int]]:
    """Let a text end at the tokens that the model's files name and at no others, as ``transformers`` does.

    Returns:
        the control tokens that the tokenizer's files put before and after a text.
    """
    path, tokenizer = find(name, offline=offline), model.tokenizer
    if not path.is_dir():  # a GGUF file says which token comes first, and which one ends a text
        return model.prompt_prefix, []
    told: dict[str, Any] = {}
    for file in (path / "config.json", path / "generation_config.json"):
        told |= {key: value for key, value in (read_object(file) if file.exists() else {}).items() if value is not None}
    ends = {*known_ids(told.get("eos_token_id"), model.network.vocab_size, str(path)), tokenizer.eos_id} - {None}
    if ends:
        model.eos_ids = model.engine.vocabulary.ends = frozenset(id for id in ends if id is not None)
    before = (
        [tokenizer.bos_id] if tokenizer.bos_id is not None and expects_bos(path, tokenizer, tokenizer.bos_id) else []
    )
    return before, wrapping_of(tokenizer, causal=True).suffix


def whole(value: Any, name: str, default: int, *, least: int = 1) -> int:
    """A whole number as ``--model_args`` has it; None and "auto" are the default.

    Raises:
        UsageError: something else, or less than it can be.
    """
    if value is None or str(value).startswith("auto"):
        return default
    if isinstance(value, bool) or not str(value).isdigit() or int(value) < least:
        raise refused(
            f"{name} is a whole number from {least} on, not '{value}'",
            f"for example {name}={max(least, default)}",
            f"{name} 应为不小于 {least} 的整数，而不是 '{value}'",
        )
    return int(value)


def refused(what: str, fix: str, zh: str) -> UsageError:
    """The error for an argument."""
    return UsageError(what, where="lm_eval --model hanmo", fix=fix, zh=zh)


def main() -> None:
    """``lm_eval``, with this model known to it; an error of ours is told without a traceback."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except HanmoError as error:
        print(f"hanmo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
