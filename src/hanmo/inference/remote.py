"""A remote model: any endpoint that answers OpenAI's API, with the contract of a language model.

``openai:MODEL@ADDRESS`` names one, ``openai:MODEL`` one at ``OPENAI_BASE_URL`` (else at the public API). An address
without a path gets ``/v1``. The environment:

====================  ================================================================================================
``OPENAI_API_KEY``    the key for the public API and for ``OPENAI_BASE_URL``
``HANMO_API_KEY``     the key for all other addresses
``OPENAI_BASE_URL``   the address of names that have none
``HANMO_PRICES``      of a million prompt and a million completion tokens, such as ``2.5,10``; else the cost is unknown
``HANMO_ALLOW_HTTP``  1 allows unencrypted requests across the internet
``HANMO_OFFLINE``     1 refuses every endpoint that is not on this machine
====================  ================================================================================================

A text prompt is continued by ``/completions`` where the model has it, else it is the one message of a chat; which of
the two is found out by the first call. Nothing is left out silently: an option that the API does not have is sent only
to servers that are known to take it, and is otherwise refused by its name.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast

from hanmo.errors import ModelError, UsageError, nearest
from hanmo.inference.accounting import Prices, Usage, known_prices
from hanmo.inference.address import parse_name
from hanmo.inference.endpoint import Endpoint, Problem
from hanmo.inference.engine import Chunk
from hanmo.inference.language_model import Completion, Prompt, is_prompt
from hanmo.inference.queries import (
    EXTENSIONS,
    TAKES_EXTENSIONS,
    RemoteSampling,
    as_message,
    chat_query,
    check_messages,
    check_prompt,
    option_fields,
    sampling_of,
    text_query,
)
from hanmo.inference.replies import Streamed, TokenLogprob, choices_of, completion_of, logprobs_of, token_counts
from hanmo.inference.sampling import whole_number

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Route = Literal["auto", "completions", "chat"]
COMPLETIONS, CHAT = "completions", "chat/completions"


class RemoteModel:
    """A model behind an endpoint.

    Args:
        name: as above.
        offline: refuse every endpoint that is not on this machine.
        endpoint: "completions", "chat", or "auto" to find out which of them continues a text.
        context_length: for endpoints that do not tell it.
        prices: of a million prompt and completion tokens; by default ``HANMO_PRICES``, else the cost is unknown.
        max_parallel: requests at a time when several prompts are given.
        extensions: the options beyond the API that the endpoint takes (see ``EXTENSIONS``); by default those of a
            server that says in its model list what it is.
        connection: settings of :class:`~hanmo.inference.endpoint.Endpoint`: ``key``, ``timeout``, ``deadline``,
            ``max_retries``, ``allow_http``...

    Raises:
        UsageError, NetworkError, ResourceError: the name, the address, the key or the prices cannot be used. Nothing
            is sent before the first call.

    >>> model = RemoteModel("openai:qwen3@http://127.0.0.1:8000/v1")                       # doctest: +SKIP
    >>> model.chat([{"role": "user", "content": "你好"}], max_new_tokens=50)[0].text         # doctest: +SKIP
    """

    def __init__(
        self,
        name: str,
        *,
        offline: bool = False,
        endpoint: Route = "auto",
        context_length: int | None = None,
        prices: Prices | None = None,
        max_parallel: int = 4,
        extensions: Collection[str] | None = None,
        **connection: Any,
    ) -> None:
        self.model_id, address = parse_name(name)
        self.name = name
        if endpoint not in ("auto", "completions", "chat"):
            raise UsageError(
                f"endpoint cannot be {endpoint!r}",
                fix="give auto, completions or chat",
                zh=f"endpoint 不能是 {endpoint!r}，可用：auto、completions、chat",
            )
        for option in extensions or ():
            if option not in EXTENSIONS:
                fix = nearest(option, EXTENSIONS)
                raise UsageError(
                    f"'{option}' is not an option beyond the API", fix=fix, zh=f"'{option}' 不是可扩展的选项，{fix}"
                )
        whole_number("max_parallel", max_parallel, 1, 256)
        self.usage = Usage(known_prices(prices))
        self.http = Endpoint(address, self.usage, offline=offline, **connection)
        self.route: Route = endpoint
        self.max_parallel = max_parallel
        self._context_length = context_length
        self._extensions = extensions
        self._cards: list[dict[str, Any]] | None = None
        self._limit = "max_tokens"  # newer models of the public API want max_completion_tokens
        self._stream_usage = True  # whether the server knows stream_options

    def __repr__(self) -> str:
        return f"RemoteModel({self.name!r})"

    # What the endpoint tells -----------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> NoReturn:
        """A remote model has none.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "a remote model has no tokenizer here: texts are split where the model runs",
            where=self.name,
            fix="use generate, stream, chat or logprobs with texts; what needs token ids needs a local model",
            zh="远程模型在本机没有分词器：文本在模型所在处切分。请直接传入文本；需要词元编号的功能请使用本地模型",
        )

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer together: as the endpoint says, else as set, else None."""
        card = self.card()
        meta = card.get("meta")  # llama.cpp
        told = [card.get("context_length"), card.get("max_model_len")]
        told += [meta.get("n_ctx"), meta.get("n_ctx_train")] if isinstance(meta, dict) else []
        return next((length for length in told if type(length) is int and length > 0), self._context_length)

    @property
    def is_chat(self) -> bool:
        """Whether it answers conversations; a base model only continues texts. True unless something says no."""
        return self.route == "chat" or (self.route == "auto" and self.card().get("chat") is not False)

    def card(self) -> dict[str, Any]:
        """What the endpoint's model list says about the model; empty where it says nothing.

        Raises:
            NetworkError: the endpoint cannot be reached.
        """
        return next((card for card in self._model_list() if card.get("id") == self.model_id), {})

    def _model_list(self) -> list[dict[str, Any]]:
        """The endpoint's model list; an endpoint that has none has an empty one."""
        if self._cards is None:
            try:
                data = self.http.get("models").get("data")
                self._cards = [card for card in data if isinstance(card, dict)] if isinstance(data, list) else []
            except Problem as problem:
                if problem.retry:
                    raise problem.as_error(self.name) from None
                self._cards = []
        return self._cards

    def describe(self) -> str:
        """The name and what its use has cost so far, in one line."""
        return f"{self.name}: {self.usage.describe()}"

    # Writing ---------------------------------------------------------------------------------------------------------

    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[Completion]:
        """Continue one or many prompts, ``max_parallel`` at a time.

        Args:
            prompts: a text, a list of ids (for ``/completions`` only), or a list of these.
            options: the fields of :class:`~hanmo.inference.queries.RemoteSampling`.

        Returns:
            ``n`` completions per prompt (:class:`~hanmo.inference.replies.RemoteCompletion`), in the order of the
            prompts. Their ``ids`` are empty: an endpoint gives none.

        Raises:
            UsageError: a bad option, one that the endpoint does not take, or a request that it refuses.
            NetworkError, ModelError: no answer, or one that cannot be used.
        """
        sampling = sampling_of(options)
        one = isinstance(prompts, str) or (is_prompt(prompts) and len(prompts) > 0)  # an empty list holds no prompts
        items = [cast(Prompt, prompts)] if one else list(cast(Sequence[Prompt], prompts))
        for item in items:
            check_prompt(item)
        common = self._common(sampling)

        def work(index: int) -> list[Completion]:
            return self._continue(items[index], index, sampling, common)

        with self._plainly():
            answers = [work(0)] if items else []  # finds out the route
            answers += in_parallel(work, range(1, len(items)), self.max_parallel)
        return [completion for answer in answers for completion in answer]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Chunk]:
        """Continue one prompt as its text arrives; the chunks have no ids.

        Options are checked at once, the request begins with the first step of the iterator, and closing it ends the
        request. The last chunk of each choice comes when the stream is complete.

        Raises:
            UsageError, NetworkError, ModelError: as :meth:`generate`; also a stream that breaks off.
        """
        check_prompt(prompt)
        sampling = stream_sampling(options)
        return self._stream_prompt(prompt, sampling, self._common(sampling))

    def chat(self, messages: list[dict[str, str]], **options: Any) -> list[Completion]:
        """Answer a conversation of ``{"role": ..., "content": ...}`` messages; otherwise as :meth:`generate`."""
        sampling = sampling_of(options)
        body = {**self._common(sampling), **chat_query(check_messages(messages), sampling, self._limit)}
        with self._plainly():
            return self._answer(CHAT, body, 0, sampling)

    def stream_chat(self, messages: list[dict[str, str]], **options: Any) -> Iterator[Chunk]:
        """Answer a conversation as the answer arrives; otherwise as :meth:`stream`."""
        sampling = stream_sampling(options)
        body = {**self._common(sampling), **chat_query(check_messages(messages), sampling, self._limit)}
        return self._told(self._chunks(CHAT, body, sampling))

    def _continue(
        self, prompt: Prompt, index: int, sampling: RemoteSampling, common: dict[str, Any]
    ) -> list[Completion]:
        """All choices of one prompt, by the route that the model has."""
        if self.route != "chat":
            try:
                answer = self._answer(COMPLETIONS, {**common, **text_query(prompt, sampling)}, index, sampling)
                self.route = "completions"
                return answer
            except Problem as problem:
                if self.route == "completions" or not problem.wants_chat:
                    raise
        body = {**common, **chat_query(as_message(prompt, self.name), sampling, self._limit)}
        answer = self._answer(CHAT, body, index, sampling)
        self.route = "chat"
        return answer

    def _stream_prompt(self, prompt: Prompt, sampling: RemoteSampling, common: dict[str, Any]) -> Iterator[Chunk]:
        with self._plainly():
            if self.route != "chat":
                try:
                    for chunk in self._chunks(COMPLETIONS, {**common, **text_query(prompt, sampling)}, sampling):
                        self.route = "completions"
                        yield chunk
                    return
                except Problem as problem:
                    if self.route == "completions" or not problem.wants_chat:
                        raise
            body = {**common, **chat_query(as_message(prompt, self.name), sampling, self._limit)}
            for chunk in self._chunks(CHAT, body, sampling):
                self.route = "chat"
                yield chunk

    # Requests --------------------------------------------------------------------------------------------------------

    def _common(self, sampling: RemoteSampling) -> dict[str, Any]:
        """The fields of a request that both routes have."""
        return {"model": self.model_id, **option_fields(sampling, self._known_extensions, self.name)}

    def _known_extensions(self) -> Collection[str]:
        if self._extensions is None:
            self._extensions = TAKES_EXTENSIONS.get(str(self.card().get("owned_by")), frozenset())
        return self._extensions

    def _answer(self, path: str, body: dict[str, Any], index: int, sampling: RemoteSampling) -> list[Completion]:
        """Send a request and read its choices."""
        with self._timed():
            while True:
                try:
                    reply = self.http.post(path, body)
                    break
                except Problem as problem:
                    if not self._adapt(body, problem):
                        raise
        prompt_tokens = self._count(reply)
        choices = choices_of(reply, sampling.n)
        scored = sampling.logprobs is not None
        return [completion_of(choice, prompt_tokens, index, number, scored) for number, choice in enumerate(choices)]

    def _chunks(self, path: str, body: dict[str, Any], sampling: RemoteSampling) -> Iterator[Chunk]:
        """Send a request for a stream and read it to its end."""
        body["stream"] = True
        if self._stream_usage:
            body["stream_options"] = {"include_usage": True}
        reader = Streamed(sampling.n)
        prompt_tokens = 0
        try:
            with self._timed():
                while True:
                    try:
                        yield from reader.read(self.http.events(path, body))
                        break
                    except Problem as problem:
                        if reader.begun or not self._adapt(body, problem):
                            raise
        finally:  # what was written before a stream was stopped has to be paid for
            if reader.begun:
                prompt_tokens = self._count({"usage": reader.usage})
        yield from reader.last_chunks(prompt_tokens)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = self.http.clock()
        try:
            yield
        finally:
            self.usage.add(requests=1, seconds=self.http.clock() - start)

    def _count(self, reply: dict[str, Any]) -> int:
        """Add the tokens of an answer to the account and return those of its prompt (0 where it does not say)."""
        counts = token_counts(reply)
        if counts is None:
            self.usage.add(uncounted=1)
            return 0
        self.usage.add(prompt_tokens=counts[0], completion_tokens=counts[1])
        return counts[0]

    def _adapt(self, body: dict[str, Any], problem: Problem) -> bool:
        """Change a request to what the server says it wants instead, and remember that; False if it says nothing."""
        if "max_tokens" in body and "messages" in body and problem.mentions("max_completion_tokens"):
            self._limit = "max_completion_tokens"
            body[self._limit] = body.pop("max_tokens")
            return True
        if "stream_options" in body and problem.mentions("stream_options"):
            self._stream_usage = False
            del body["stream_options"]
            return True
        return False

    @contextlib.contextmanager
    def _plainly(self) -> Iterator[None]:
        """Turn problems into errors for users; an unknown model gets the nearest name that the endpoint has."""
        try:
            yield
        except Problem as problem:
            error = problem.as_error(self.name)
            if problem.status == 404:
                with contextlib.suppress(Exception):  # a hint is not worth another error
                    names = [str(card.get("id"))[:80] for card in self._model_list()]
                    if names and self.model_id not in names:
                        error.fix = nearest(self.model_id, names)
            raise error from None

    def _told(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        with self._plainly():
            yield from chunks

    # Scoring ---------------------------------------------------------------------------------------------------------

    def logprobs(self, ids: str | Sequence[int]) -> Tensor:
        """Log-probability of each token of a text given those before it, where the endpoint offers that.

        Args:
            ids: a text, or token ids of the remote model.

        Returns:
            float32 ``[T]`` in nats for the T tokens the endpoint splits the text into; the first is NaN where the
            endpoint reads nothing before it.

        Raises:
            ModelError: the endpoint gives no log-probabilities of a given text (most chat services do not).
        """
        import torch

        values = [token.logprob for token in self.score_text(ids)]
        return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32)

    def score_text(self, text: str | Sequence[int]) -> list[TokenLogprob]:
        """The tokens of a text with their log-probabilities; arguments and errors as :meth:`logprobs`."""
        check_prompt(text)
        prompt = text if isinstance(text, str) else [int(id) for id in text]
        body = {"model": self.model_id, "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0}
        if self.route == "chat":
            raise self._no_scores("it answers messages only")
        with self._plainly(), self._timed():
            try:
                try:
                    reply = self.http.post(COMPLETIONS, body)
                except Problem as problem:
                    if not problem.mentions("max_tokens"):  # some servers write at least one token
                        raise
                    reply = self.http.post(COMPLETIONS, {**body, "max_tokens": 1})
            except Problem as problem:
                if problem.mentions("echo") or problem.mentions("logprobs") or problem.wants_chat:
                    raise self._no_scores(problem.message) from None
                raise
            self._count(reply)
            choice = choices_of(reply, 1)[0]
            tokens = logprobs_of(choice)
        if tokens is None:
            raise self._no_scores("its answer has none")
        if isinstance(prompt, str):
            if not str(choice.get("text")).startswith(prompt):
                raise self._no_scores("its answer does not repeat the text")
            return [token for token in tokens if token.offset is None or token.offset < len(prompt)]
        if len(tokens) < len(prompt):
            raise self._no_scores("its answer does not repeat the tokens")
        return tokens[: len(prompt)]

    def _no_scores(self, why: str) -> ModelError:
        return ModelError(
            "the endpoint gives no log-probabilities of a given text",
            where=self.name,
            why=why,
            fix="generate(..., logprobs=5) gives those of new tokens where offered; hanmo serve and vLLM score texts",
            zh=f"该接口不提供给定文本的对数概率（{why}）。可试 generate(..., logprobs=5) 获取新词元的对数概率；"
            "hanmo serve 与 vLLM 支持文本评分",
        )


def stream_sampling(options: dict[str, Any]) -> RemoteSampling:
    """Checked settings of a stream, which gives no log-probabilities."""
    sampling = sampling_of(options)
    if sampling.logprobs is not None:
        raise UsageError(
            "log-probabilities are not given in a stream",
            fix="use generate or chat",
            zh="流式输出不提供对数概率，请用 generate 或 chat",
        )
    return sampling


def in_parallel(work: Callable[[int], T], numbers: Sequence[int], workers: int) -> list[T]:
    """``[work(number) for number in numbers]``, several at a time.

    After an error, or Ctrl-C, nothing more is begun and nobody waits for requests that are on their way; an executor
    would keep the process alive for them.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, T | None, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()
    for number in numbers:
        todo.put(number)

    def run() -> None:
        with contextlib.suppress(queue.Empty):
            while not stopped.is_set():
                number = todo.get_nowait()
                try:
                    done.put((number, work(number), None))
                except BaseException as error:
                    done.put((number, None, error))

    for place in range(min(workers, len(numbers))):
        threading.Thread(target=run, name=f"hanmo-remote-{place}", daemon=True).start()
    results: dict[int, T] = {}
    try:
        for _ in numbers:
            number, result, error = done.get()
            if error is not None:
                raise error
            results[number] = cast(T, result)
    finally:
        stopped.set()
    return [results[number] for number in numbers]


def connect(name: str, *, offline: bool = False, **settings: Any) -> RemoteModel:
    """The remote model of a name that begins with ``openai:``; settings and errors as :class:`RemoteModel`."""
    return RemoteModel(name, offline=offline, **settings)
