"""Transformers that torch computes, on any device, in the engine's form: the reference for every other form.

Each text has a slot of the key/value cache, its first token in column 0. Texts that read about as many tokens are read
together, padded on the right: what is computed for padding is never seen, since a query sees only the columns up to its
own place, and is overwritten by the tokens that come to stand there. (Matrix products of different heights round
differently in the last bits; nothing else tells a text in company from a text alone.)

Letters in names: B texts, T new tokens, S columns, M tokens of all texts, L tokens whose logits are wanted, D hidden
size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hanmo.errors import UsageError
from hanmo.inference.graphs import Graphs
from hanmo.inference.networks import LOGIT_VALUES, SCORE_TOKENS, Piece
from hanmo.language import pick
from hanmo.models.adapters.attach import set_active
from hanmo.models.adapters.files import load_adapter
from hanmo.models.cache import CachePool, KVCache, Memory
from hanmo.models.cost import kv_cache_bytes
from hanmo.models.transformer import Block, Transformer
from hanmo.settings import notice

PREFILL_TOKENS = 2048  # tokens of a text that pass the network at once: bounds the memory of activations and masks
CACHE_BYTES = 1 << 30  # keys and values of all texts, unless a single text needs more
FEW = 16  # tokens; texts that read at most so many are read together, whatever it pads
COLUMNS = 64  # slots grow by so many columns


class SlotText:
    """A text with a slot of its network's cache.

    Attributes:
        ids: the tokens it has read.
        reach: tokens it will come to at least, where LongRoPE must know.
        memory: what the encoder made of the text's source.
        source: by layer: keys and values of these states.
    """

    def __init__(self, network: DecoderNetwork, slot: int, columns: int, adapter: str | None) -> None:
        self.network, self.slot, self.columns, self.adapter = network, slot, columns, adapter
        self.ids: list[int] = []
        self.reach = 0
        self.memory: Memory | None = None
        self.source: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        return len(self.ids)

    def fork(self) -> SlotText:
        pool = self.network.pool
        text = SlotText(self.network, pool.take(self.columns), self.columns, self.adapter)
        pool.copy(self.slot, text.slot, self.length)
        text.ids, text.reach, text.memory, text.source = [*self.ids], self.reach, self.memory, self.source
        return text

    def trim(self, length: int) -> None:
        del self.ids[length:]

    def release(self) -> None:
        self.network.pool.taken.discard(self.slot)


class DecoderNetwork:
    """A transformer decoder."""

    piece = PREFILL_TOKENS
    keeps = 4

    def __init__(self, model: Transformer) -> None:
        self.model = model.eval()
        self.vocab_size = model.config.vocab_size
        self.context_length = model.config.max_position_embeddings
        self.pool = CachePool(model.config, model.output_weight.dtype, model.output_weight.device)
        scaling = model.config.rope_scaling or {}
        self.switch: int | None = None  # positions after which LongRoPE takes its other factors
        if "long_factor" in scaling:
            self.switch = scaling["original_max_position_embeddings"]
        self.trims = self.switch is None
        self.active: str | None = None  # adapter
        self.graphs = Graphs(model, self.pool, record=True) if self.device.type == "cuda" else None

    @property
    def device(self) -> torch.device:
        return self.model.output_weight.device

    def describe(self) -> str:
        return f"torch on {self.device}, {str(self.model.output_weight.dtype).removeprefix('torch.')}"

    def room(self, prompt: int) -> int:
        return self.context_length - prompt

    def fits(self, lengths: Sequence[int]) -> bool:
        columns = max(lengths) + COLUMNS
        return len(lengths) * kv_cache_bytes(self.model.config, columns, self.pool.keys.element_size()) <= CACHE_BYTES

    def add_adapter(self, folder: Path, name: str) -> None:
        """Read an adapter folder; :func:`hanmo.models.adapters.files.load_adapter` tells what can be wrong with it."""
        load_adapter(folder, self.model, name)
        self.graphs = None  # they hold the network as it was
        set_active(self.model, {})
        self.active = None

    def open(self, prompt: Sequence[int], room: int, adapter: str | None) -> tuple[SlotText, list[int]]:
        columns = -(-(len(prompt) + room) // COLUMNS) * COLUMNS
        text = SlotText(self, self.pool.take(columns), columns, adapter)
        text.reach = len(prompt)
        return text, list(prompt)

    def read(self, pieces: Sequence[Piece]) -> Tensor:
        """Pieces of about the same length, with the same adapter, are read together."""
        logits: dict[int, Tensor] = {}
        for adapter in dict.fromkeys(piece.text.adapter for piece in pieces):
            self.use(adapter)
            numbers = [number for number, piece in enumerate(pieces) if piece.text.adapter == adapter]
            for group in alike([len(pieces[number].ids) for number in numbers]):
                together = [numbers[place] for place in group]
                logits |= dict(zip(together, self.read_together([pieces[n] for n in together]), strict=True))
        return torch.cat([logits[number] for number in range(len(pieces))])

    def read_together(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Pieces that make one padded batch: the wanted logits of each."""
        texts: list[SlotText] = [piece.text for piece in pieces]
        news = [list(piece.ids) for piece in pieces]
        for row, text in enumerate(texts):
            if (
                self.switch
                and text.length
                and max(text.length, text.reach) <= self.switch < text.length + len(news[row])
            ):
                news[row] = text.ids + news[row]  # all was rotated by the other factors: it is read again
                text.ids = []
        starts, longest = [text.length for text in texts], max(map(len, news))
        if max(starts) + longest > self.pool.keys.size(3):  # padding may stand beyond the last column
            self.pool.resize(self.pool.keys.size(1), -(-(max(starts) + longest) // COLUMNS) * COLUMNS)
        single = longest == 1 and all(piece.wanted == 1 for piece in pieces)
        if single and self.graphs is not None and self.switch is None and not texts[0].source:
            hidden_BD = self.recorded([ids[0] for ids in news], [text.slot for text in texts], starts)
            if hidden_BD is not None:
                for text, ids in zip(texts, news, strict=True):
                    text.ids += ids
                return list(torch.split(self.model.logits(hidden_BD), 1))
        view = self.pool.view([text.slot for text in texts], starts, longest)
        memory = self.sources(texts, view)
        if self.switch:
            reaches = [
                [max(text.reach, start + len(ids))] for text, start, ids in zip(texts, starts, news, strict=True)
            ]
            view.reach_B1 = torch.tensor(reaches, device=self.device)
        ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in news], device=self.device)
        places_T = torch.arange(longest, device=self.device)
        positions_BT = view.places_BT if view.places_BT is not None else places_T.unsqueeze(0) + starts[0]
        positions_BT = positions_BT.clamp(max=self.context_length - 1)  # of padding
        hidden_BTD = self.model.hidden(ids_BT, cache=view, positions_BT=positions_BT, memory=memory)
        ends = [len(ids) for ids in news]
        wanted = [hidden_BTD[row, ends[row] - piece.wanted : ends[row]] for row, piece in enumerate(pieces)]
        for text, ids in zip(texts, news, strict=True):
            text.ids += ids
        return list(torch.split(self.model.logits(torch.cat(wanted)), [piece.wanted for piece in pieces]))

    def recorded(self, ids: list[int], slots: list[int], starts: list[int]) -> Tensor | None:
        """One token of each text by a recorded step; None where steps cannot be recorded."""
        assert self.graphs is not None
        try:
            return self.graphs.run(ids, slots, starts)
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            notice(
                pick(
                    f"CUDA graphs cannot be used here, which makes writing slower: {str(error).splitlines()[0]}",
                    f"此处无法使用 CUDA 图，生成会变慢：{str(error).splitlines()[0]}",
                )
            )
            self.graphs = None
            return None

    def sources(self, texts: Sequence[SlotText], view: KVCache) -> Memory | None:  # noqa: ARG002 - those of a decoder
        """What the texts attend to beside themselves."""
        return None

    def use(self, adapter: str | None) -> None:
        """Compute with this adapter from here on."""
        if adapter != self.active:
            set_active(self.model, {} if adapter is None else {adapter: 1.0})
            self.active = adapter

    def score(self, ids_BT: Tensor) -> Tensor:
        """Neither all activations nor all logits are held at once."""
        self.use(None)
        B, T = ids_BT.shape
        scores_M, rows = torch.empty(B * (T - 1)), max(1, SCORE_TOKENS // T)
        for row in range(0, B, rows):
            part_BT = ids_BT[row : row + rows].to(self.device)
            hidden_MD = self.states(part_BT[:, :-1]).flatten(0, 1)
            first = row * (T - 1)
            scores_M[first : first + len(hidden_MD)] = token_scores(self.model, hidden_MD, part_BT[:, 1:].flatten())
        return scores_M.view(B, T - 1)

    def states(self, ids_BT: Tensor) -> Tensor:
        """Hidden states; long rows that need a mask are read in pieces, so that it never holds all pairs of tokens."""
        config, (B, T), weight = self.model.config, ids_BT.shape, self.model.output_weight
        slides = any(config.slides(layer) for layer in range(config.num_layers)) and (config.sliding_window or 0) < T
        if T <= PREFILL_TOKENS or not (slides or config.attention_softcap):
            return self.model.hidden(ids_BT)
        cache = KVCache(config, B, T, weight.dtype, weight.device)
        cache.reach_B1 = torch.full((B, 1), T, device=weight.device)
        pieces = [self.model.hidden(piece_BT, cache=cache) for piece_BT in torch.split(ids_BT, PREFILL_TOKENS, dim=1)]
        return torch.cat(pieces, dim=1)


def alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Groups of the places of similar lengths: little is padded, and a batch is at most one long piece of tokens.

    >>> list(alike([1, 500, 1, 3, 490]))
    [[0, 2, 3], [4, 1]]
    """
    group: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        longest = lengths[number]
        real = sum(lengths[other] for other in group) + longest
        padded = longest * (len(group) + 1)
        if group and longest > FEW and (padded > 1.25 * real or padded > PREFILL_TOKENS):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def token_scores(model: Transformer, hidden_MD: Tensor, targets_M: Tensor) -> Tensor:
    """Log-probabilities of tokens from the hidden states before them, some logits at a time."""
    tokens = max(1, LOGIT_VALUES // model.config.vocab_size)
    pieces = zip(torch.split(hidden_MD, tokens), torch.split(targets_M, tokens), strict=True)
    return torch.cat([-F.cross_entropy(model.logits(x), y, reduction="none") for x, y in pieces]).cpu()


class SourceNetwork(DecoderNetwork):
    """An encoder-decoder: the prompt is the source, and the answer is written from ``start_ids`` on."""

    def __init__(self, model: Transformer, start_ids: Sequence[int]) -> None:
        super().__init__(model)
        assert model.config.encoder is not None
        self.start_ids, self.source_length = list(start_ids), model.config.encoder.max_position_embeddings
        self.trims = False  # texts that begin alike have other sources
        self.joined: tuple[list[SlotText], dict[int, tuple[Tensor, Tensor]], Memory] | None = None

    def room(self, prompt: int) -> int:
        if prompt > self.source_length:
            return 0
        return self.context_length - len(self.start_ids)

    def open(self, prompt: Sequence[int], room: int, adapter: str | None) -> tuple[SlotText, list[int]]:
        """Reads the source."""
        text, ids = super().open(self.start_ids, room, adapter)
        self.use(adapter)
        text.memory = self.model.encode(torch.tensor([list(prompt)], device=self.device))
        for layer, block in enumerate(self.model.model.layers):
            assert isinstance(block, Block)
            text.source[layer] = block.cross_attn.keys_values(text.memory.states_BSD)
        return text, ids

    def sources(self, texts: Sequence[SlotText], view: KVCache) -> Memory | None:
        """The sources side by side, padded on the right; they stay as long as the company does."""
        if len(texts) == 1:
            view.source = texts[0].source
            return texts[0].memory
        if self.joined is None or self.joined[0] != list(texts):
            lengths = [text.memory.states_BSD.size(1) for text in texts if text.memory is not None]
            found = {
                layer: (
                    joined([text.source[layer][0] for text in texts]),
                    joined([text.source[layer][1] for text in texts]),
                )
                for layer in texts[0].source
            }
            states_BSD = joined([text.memory.states_BSD for text in texts if text.memory is not None])
            mask_BS = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
            self.joined = (list(texts), found, Memory(states_BSD, None if mask_BS.all() else mask_BS.to(self.device)))
        view.source = self.joined[1]
        return self.joined[2]

    def score(self, ids_BT: Tensor) -> Tensor:  # noqa: ARG002 - the protocol's
        raise UsageError(
            "an encoder-decoder scores an answer to a source, not a text by itself",
            fix="use answer_logprobs(source, answer)",
            zh="编码器—解码器模型只能对“原文→答案”评分，请使用 answer_logprobs(source, answer)",
        )

    @torch.inference_mode()
    def answer_logprobs(self, source: Sequence[int], answer: Sequence[int]) -> Tensor:
        """Log-probability of each token of an answer to a source, in nats, float32 ``[T]``."""
        if not answer:
            return torch.empty(0)
        memory = self.model.encode(torch.tensor([list(source)], device=self.device))
        answer_T = torch.tensor(list(answer), device=self.device)
        before_1T = torch.cat((answer_T.new_tensor(self.start_ids), answer_T[:-1])).unsqueeze(0)
        hidden_TD = self.model.hidden(before_1T, memory=memory)[0, len(self.start_ids) - 1 :]
        return token_scores(self.model, hidden_TD, answer_T)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors ``[1, S, ...]`` of different lengths as one, filled up with zeros on the right."""
    longest = max(part.size(1) for part in parts)
    out = parts[0].new_zeros((len(parts), longest, *parts[0].shape[2:]))
    for row, part in enumerate(parts):
        out[row, : part.size(1)] = part[0]
    return out
