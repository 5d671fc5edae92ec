"""Train tokenizers: byte-level BPE, single characters, and the words of a word-level corpus.

Every BPE and character tokenizer trained here has the same control tokens at the same ids:

==  ==================  ==============================================================
id  token               use
==  ==================  ==============================================================
0   ``<|endoftext|>``   ends a document; BOS and EOS of base models
1   ``<|pad|>``         padding, never the same as EOS
2   ``<|im_start|>``    begins a chat message
3   ``<|im_end|>``      ends a chat message
4   ``<|unk|>``         an unseen character (character tokenizer only)
==  ==================  ==============================================================

In a BPE vocabulary the 256 bytes follow (id 4 + byte), so no text is ever unknown; then the merges in their order.

A word tokenizer keeps the conventions of its corpora instead: ``<eos>`` (id 0) ends a sentence, ``<unk>`` is a word
like any other and stands for those that are not in the vocabulary. The words follow, the most frequent first.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from hanmo.errors import DataError, UsageError
from hanmo.language import pick
from hanmo.progress import Progress
from hanmo.settings import notice
from hanmo.text.fast import CHARACTER_OF_BYTE, CHARACTER_PIECES, merge_pairs
from hanmo.text.tokenizer import WORD_SPACES, Tokenizer, require_utf8

END_OF_TEXT, PAD, IM_START, IM_END, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>"
END_OF_SENTENCE, UNKNOWN_WORD = "<eos>", "<unk>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, IM_START, IM_END)
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256

# Text is cut into pieces by this pattern, and merges never cross a piece. It has no look-ahead and only bounded
# repetition, so both regex engines that run it (Oniguruma in `tokenizers`, Rust's automaton in `tiktoken`) need linear
# time on any input and agree on every cut. Each choice:
#
# - Han: at most four characters. Chinese has no spaces, so an unbounded run would glue whole clauses into pieces, and
#   merges would learn phrases of one book. Measured on the four novels of zh-novels (every tenth 5,000 characters held
#   out; characters per token, bits per character of a unigram and of an interpolated bigram model over the tokens):
#       longest piece           1                     2                     3                     4
#       vocabulary  4,096       1.04  9.13  6.95      1.14  8.93  6.96      1.14  8.88  6.96      1.17  8.77  6.90
#       vocabulary 16,384       1.05  9.07  6.95      1.34  8.41  6.83      1.33  8.35  6.87      1.39  8.10  6.77
#   Four is best in every column, the cuts by position in the run hurt least, and it covers the four-character idiom.
# - Other letters: up to 24 with their marks and one leading space, as in GPT-2; a longer run is no word, and larger
#   bounds slow the automaton down.
# - One digit per piece: numbers of any length have one reading, which arithmetic needs.
# - Newlines and indentation are pieces of their own, apart from each other and from the word that follows: a prompt
#   that ends in a newline or in half an indentation then looks as it did in training.
PIECES = "|".join(
    [
        r"'(?:[sdmt]|ll|ve|re)",
        r" ?[\p{L}\p{M}&&[^\p{Han}]]{1,24}",
        r"\p{Han}{1,4}",
        r"\p{N}",
        r" ?[^\s\p{L}\p{M}\p{N}]{1,16}",
        r"[\r\n]{1,16}",
        "[ \\t\u3000]{1,32}",
        r"[\s\S]",
    ]
)
LONGEST_TOKEN = 32  # bytes; more would only memorise rulers of dashes and other boiler-plate
SAMPLE_BYTES = 32_000_000  # merges hardly change with more text
CUT_CHARACTERS = 100_000  # a document is handed over in parts: the library holds 256 of them at a time


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    max_bytes: int = SAMPLE_BYTES,
    max_token_length: int = LONGEST_TOKEN,
    min_frequency: int = 2,
    chat_template: str | None = None,
) -> Tokenizer:
    """Train a byte-level BPE tokenizer.

    Args:
        texts: documents, streamed. Let the first ``max_bytes`` be a fair sample of the corpus.
        vocab_size: ids in all: 4 control tokens, 256 bytes, and merges. A corpus that cannot give so many merges gives
            a smaller vocabulary, and a notice says so.
        max_bytes: stop reading after so many bytes of UTF-8.
        max_token_length: no token is longer, in bytes.
        min_frequency: a pair must occur so often to be merged.
        chat_template: kept with the tokenizer.

    Returns:
        A tokenizer that ``tiktoken`` and ``tokenizers`` encode alike.

    Raises:
        UsageError: ``vocab_size`` has no room for the bytes and control tokens.
        DataError: there is no text, or it has a lone surrogate.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"a vocabulary of {vocab_size} is too small",
            why=f"it must hold 256 bytes and {len(SPECIAL_TOKENS)} control tokens, so that no text is unknown",
            fix=f"choose {SMALLEST_VOCABULARY} or more, for example 4096",
            zh=f"词表大小 {vocab_size} 太小：256 个字节和控制符至少要 {SMALLEST_VOCABULARY}，例如 4096",
        )
    trainer = trainers.BpeTrainer(
        # A few to spare: ordered_vocabulary may leave some out.
        vocab_size=vocab_size - len(SPECIAL_TOKENS) + (64 if vocab_size > SMALLEST_VOCABULARY else 0),
        min_frequency=min_frequency,
        max_token_length=max_token_length,
        initial_alphabet=list(CHARACTER_OF_BYTE.values()),
        show_progress=False,
    )
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    learner.decoder = decoders.ByteLevel()
    with Progress(pick("training the tokenizer", "训练分词器"), unit="bytes") as progress:
        learner.train_from_iterator(sample(texts, max_bytes, progress), trainer)
    definition = json.loads(learner.to_str())
    tokens, merges = ordered_vocabulary(definition["model"], vocab_size - SMALLEST_VOCABULARY)
    vocabulary = [*SPECIAL_TOKENS, *CHARACTER_OF_BYTE.values(), *tokens]
    definition["model"].update(vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges)
    definition["added_tokens"] = [control_token(index, token) for index, token in enumerate(SPECIAL_TOKENS)]
    if len(vocabulary) < vocab_size:
        notice(
            pick(
                f"the vocabulary has {len(vocabulary)} tokens, not {vocab_size}: this text gives no more pairs that "
                f"occur {min_frequency} times",
                f"词表只有 {len(vocabulary)} 个词元（不足 {vocab_size}）：语料中再没有出现 {min_frequency} 次的组合",
            )
        )
    return finish(definition, chat_template)


def sample(texts: Iterable[str], max_bytes: int, progress: Progress) -> Iterator[str]:
    """Yield texts in parts until ``max_bytes`` of UTF-8 have passed.

    Raises:
        DataError: there is no text, or it has a lone surrogate.
    """
    done = 0
    for part in cut(texts):
        if done >= max_bytes:
            break
        yield part
        done += len(part.encode())
        progress.update(done)
    if not done:
        raise no_text()
    progress.last = -math.inf  # the reader is done, and the rest takes seconds: say so at once
    progress.update(done, pick("learning merges", "学习合并规则"))


def cut(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts in parts of at most :data:`CUT_CHARACTERS`."""
    for index, text in enumerate(texts):
        require_utf8(text, where=f"text {index}")
        for at in range(0, len(text), CUT_CHARACTERS):
            yield text[at : at + CUT_CHARACTERS]


def no_text() -> DataError:
    """The error for an empty corpus."""
    return DataError(
        "there is no text to train a tokenizer on",
        fix="give texts that are not empty",
        zh="没有可用来训练分词器的文本",
    )


def ordered_vocabulary(model: dict[str, Any], limit: int) -> tuple[list[str], list[list[str]]]:
    """The learned tokens in order, each with the one merge that makes it.

    The trainer may find the same token twice, from different pairs. Here a token keeps the pair in which its own bytes
    end when they are merged by the tokens before it; a token whose bytes never come to two parts is left out. This
    makes every token sound in the sense of :mod:`hanmo.text.fast`, so both libraries encode alike.
    """
    ranks: dict[str, int] = {}
    merges: list[list[str]] = []
    for pair in merge_pairs(model):
        token = "".join(pair)
        if len(merges) == limit:
            break
        if token not in ranks:
            parts = merge(token, ranks)
            if len(parts) == 2:
                ranks[token] = len(merges)
                merges.append(parts)
    return list(ranks), merges


def merge(token: str, ranks: dict[str, int]) -> list[str]:
    """Byte-pair encoding by definition: join the neighbours whose concatenation ranks lowest, the leftmost first."""
    parts = list(token)
    while True:
        candidates = [(ranks.get(a + b, -1), at) for at, (a, b) in enumerate(itertools.pairwise(parts))]
        known = [candidate for candidate in candidates if candidate[0] >= 0]
        if not known:
            return parts
        at = min(known)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def train_char(
    texts: Iterable[str], *, min_count: int = 1, max_characters: int | None = None, chat_template: str | None = None
) -> Tokenizer:
    """Make a tokenizer with one id per character, in order of code point after the control tokens.

    Args:
        texts: documents, streamed; all are read.
        min_count: a rarer character becomes ``<|unk|>``. For Chinese, 2 or 5 drops a long tail of rare characters.
        max_characters: keep at most so many, the most frequent ones.
        chat_template: kept with the tokenizer.

    Raises:
        DataError: there is no text, or it has a lone surrogate.
    """
    counts = np.zeros(0x110000, dtype=np.int64)
    for index, text in enumerate(texts):
        require_utf8(text, where=f"text {index}")
        points, found = np.unique(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), return_counts=True)
        counts[points] += found
    characters = np.flatnonzero(counts >= max(1, min_count))
    if not counts.any():
        raise no_text()
    if max_characters is not None and len(characters) > max_characters:
        frequent = np.argsort(-counts[characters], kind="stable")[:max_characters]
        characters = np.sort(characters[frequent])
    control = (*SPECIAL_TOKENS, UNKNOWN)
    vocabulary = [*control, *(chr(point) for point in characters)]
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [control_token(index, token) for index, token in enumerate(control)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": CHARACTER_PIECES},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},  # without it, decoding would put spaces between the characters
        "model": {
            "type": "WordLevel",
            "vocab": {token: index for index, token in enumerate(vocabulary)},
            "unk_token": UNKNOWN,
        },
    }
    return finish(definition, chat_template)


SPACES = re.compile(WORD_SPACES)


def split_words(line: str) -> list[str]:
    """The words of a line: what stands between ASCII white space and ideographic spaces.

    >>> split_words(" 我们 都 是\u3000<unk> ")
    ['我们', '都', '是', '<unk>']
    """
    return [word for word in SPACES.split(line) if word]


def train_words(sentences: Iterable[Iterable[str]], *, vocab_size: int | None = None) -> Tokenizer:
    """Make a tokenizer with one id per word, split at spaces.

    Args:
        sentences: the words of each line of the training text, streamed; all are read.
        vocab_size: keep the most frequent words, ``<eos>`` and ``<unk>`` included; every other one becomes ``<unk>``.
            Without it all words are kept, and ``<unk>`` is known only if the text has it.

    Raises:
        DataError: there are no words.
        UsageError: ``vocab_size`` has no room for a word.

    >>> tokenizer = train_words([["we", "<unk>", "tea"], ["we", "drink"]])
    >>> tokenizer.decode(tokenizer.encode("we drink milk"))
    'we drink <unk>'
    """
    counts: Counter[str] = Counter()
    for words in sentences:
        counts.update(words)
    if not counts:
        raise no_text()
    if vocab_size is not None and vocab_size < 3:
        raise UsageError(
            f"a vocabulary of {vocab_size} has no room for {END_OF_SENTENCE}, {UNKNOWN_WORD} and a word",
            fix="choose 3 or more, for example 10000",
            zh=f"词表大小 {vocab_size} 太小：至少为 3，例如 10000",
        )
    counts.pop(END_OF_SENTENCE, None)
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    if vocab_size is not None and len(ordered) > vocab_size - 1:
        kept = [word for word in ordered if word != UNKNOWN_WORD][: vocab_size - 2]
        counts[UNKNOWN_WORD] = sum(counts.values()) - sum(counts[word] for word in kept)
        ordered = sorted([*kept, UNKNOWN_WORD], key=lambda word: (-counts[word], word))
    return words_tokenizer([END_OF_SENTENCE, *ordered], start=END_OF_SENTENCE, end=END_OF_SENTENCE)


def words_tokenizer(
    words: Sequence[str], *, start: str = "<s>", end: str = "</s>", unknown: str = UNKNOWN_WORD
) -> Tokenizer:
    """A tokenizer of known words, split at spaces; the id of a word is its place.

    Args:
        words: all different; by default with the special words of ARPA files.
        start, end: the words that stand for the beginning and the end of a sentence and are never read from a text.
        unknown: what every other word becomes, if it is one of the words; else there is none.

    >>> words_tokenizer(["</s>", "茶", "tea", "<s>"]).encode("tea 茶")
    [2, 1]
    """
    vocabulary = {word: index for index, word in enumerate(words)}
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [control_token(index, word) for word, index in vocabulary.items() if word in (start, end)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": WORD_SPACES},
            "behavior": "Removed",
            "invert": False,
        },
        "post_processor": None,
        "decoder": None,  # words are joined by spaces
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": unknown if unknown in vocabulary else ""},
    }
    text = json.dumps(definition, ensure_ascii=False, indent=1) + "\n"
    return Tokenizer(text, bos_token=start, eos_token=end)


def control_token(index: int, content: str) -> dict[str, Any]:
    """The entry of a control token in ``tokenizer.json``."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content, **flags}


def finish(definition: dict[str, Any], chat_template: str | None) -> Tokenizer:
    """The tokenizer of a definition made here."""
    text = json.dumps(definition, ensure_ascii=False, indent=1) + "\n"
    return Tokenizer(text, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PAD, chat_template=chat_template)
