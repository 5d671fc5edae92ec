"""``hanmo vectors``: word vectors from texts: train, look up, solve analogies, score, convert."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.outcome import Outcome
from hanmo.cli.road import prepare_corpus
from hanmo.data.settings import DataSettings
from hanmo.errors import UsageError, nearest
from hanmo.folder import make_folder, read_manifest
from hanmo.language import pick
from hanmo.progress import Progress, human_count
from hanmo.settings import CommonSettings, argument, flag, option

if TYPE_CHECKING:
    from hanmo.data.corpus import Corpus
    from hanmo.evaluation.vectors import AnalogyReport, SimilarityReport
    from hanmo.models.embeddings import WordVectors

HELP = "word vectors: train them on texts, find neighbours and analogies, score, convert"
HELP_ZH = "词向量：在文本上训练，查近邻与类比，评分，转换格式"
METHODS = ("skipgram", "cbow", "fasttext", "glove")
BINARY_SUFFIXES = (".bin", ".bin.gz")
TEXT_SUFFIXES = (".txt", ".txt.gz", ".vec", ".vec.gz")


@dataclass
class VectorsSettings(CommonSettings, DataSettings):
    """Settings of ``hanmo vectors``."""

    action: str = argument(
        "train TEXTS..., nearest MODEL WORDS..., analogy MODEL A B C, score MODEL FILES... or convert MODEL OUT",
        zh="train 文本...、nearest 模型 词...、analogy 模型 甲 乙 丙、score 模型 文件... 或 convert 模型 输出",
    )
    items: list[str] = argument(
        "what the action is about; a MODEL is a folder that train wrote, or a word2vec or GloVe file",
        zh="该动作的对象；“模型”为 train 写出的文件夹，或 word2vec、GloVe 文件",
        many=True,
    )
    method: str = option("skipgram", "how vectors are learnt", zh="训练方法", choices=METHODS)
    out: str = option("runs/vectors", "folder of the trained vectors", zh="存放训练结果的文件夹")
    size: int = option(100, "numbers in a vector", zh="向量维数")
    window: int | None = option(
        None,
        "largest distance between a word and its context; default: 5, glove 10",
        zh="上下文窗口；默认 5，glove 为 10",
    )
    min_count: int = option(5, "leave out words that occur less often", zh="忽略出现次数更少的词")
    epochs: int | None = option(
        None, "passes over the text; default: more for less text", zh="训练轮数；文本越少默认越多"
    )
    number: int = option(10, "how many words to show", zh="显示多少个词", short="-n")

    def check(self) -> None:
        """Raise UsageError for values that cannot work, before any file is read."""
        super().check()
        for name in ("size", "window", "min_count", "epochs", "number"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(
                    f"{flag(name)} is {value}, and must be 1 or more", zh=f"{flag(name)} 为 {value}，至少应为 1"
                )


class SegmentedCorpus:
    """The training split as lists of words: cut once, kept in a file, read again in every pass."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def write(cls, corpus: Corpus, path: Path) -> SegmentedCorpus:
        """Cut the texts into words; a word never holds whitespace, so lines and spaces can separate them."""
        from hanmo.models.embeddings import words_of

        total = corpus.num_bytes("train")
        with Progress(pick("words", "分词"), total, "bytes") as bar, path.open("w", encoding="utf-8") as stream:
            done = 0
            for text, _ in corpus.pieces("train"):
                stream.write(" ".join(words_of(text)) + "\n")
                done += len(text.encode("utf-8"))
                bar.update(done)
        return cls(path)

    def __iter__(self) -> Iterator[list[str]]:
        with self.path.open(encoding="utf-8", newline="\n") as stream:
            for line in stream:
                yield line.split()


def run(settings: VectorsSettings) -> Outcome:
    """Do what the action says."""
    actions = {"train": train, "nearest": find_nearest, "analogy": analogy, "score": score, "convert": convert}
    if settings.action not in actions:
        fix = nearest(settings.action, actions)
        raise UsageError(
            f"unknown action '{settings.action}'",
            where="hanmo vectors",
            fix=fix,
            zh=f"未知动作 '{settings.action}'，{fix}",
        )
    settings.check()
    return actions[settings.action](settings)


def open_model(settings: VectorsSettings, usage: str, least: int, most: int | None = None) -> WordVectors:
    """The model that an action names first, where the number of arguments after it is right.

    Raises:
        UsageError: too few or too many arguments.
    """
    given = len(settings.items) - 1
    if given < least or (most is not None and given > most):
        example = f"hanmo vectors {settings.action} {usage}"
        raise UsageError(
            f"'{settings.action}' takes {usage}", where="hanmo vectors", fix=example, zh=f"用法：{example}"
        )
    from hanmo.models.embeddings import open_vectors

    return open_vectors(settings.items[0])


def train(settings: VectorsSettings) -> Outcome:
    """Read, clean and cut the texts, learn vectors, save."""
    from hanmo.models.embedding_training import require_packages
    from hanmo.models.embeddings import WordVectors

    out = Path(settings.out)
    if out.is_dir() and any(out.iterdir()) and read_manifest(out).get("model_type") != "vectors":
        raise UsageError(
            "this folder holds something else than word vectors; it would be lost",
            where=str(out),
            fix="choose an empty or new folder with --out",
            zh="这个文件夹里有其他内容，写入会覆盖它们。请用 --out 另选一个空文件夹",
        )
    require_packages(settings.method)
    corpus = prepare_corpus(settings.items, settings, out.parent / f"{out.name}-data")
    make_folder(out.parent)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.words-") as folder:
        vectors = WordVectors.train(
            SegmentedCorpus.write(corpus, Path(folder) / "words.txt"),
            settings.method,
            size=settings.size,
            window=settings.window,
            min_count=settings.min_count,
            epochs=settings.epochs,
            seed=settings.seed,
            progress=not os.environ.get("HANMO_QUIET"),
        )
    vectors.training["data"] = corpus.fingerprint
    vectors.save(out)
    training = vectors.training
    seconds = training["seconds_training"]
    text = pick(
        f"{len(vectors):,} words of {vectors.size} dimensions, learnt from {human_count(training['words'])} words by "
        f"{vectors.method} in {seconds:.1f} s\nvectors: {out}",
        f"用 {vectors.method} 从 {human_count(training['words'])} 词中学得 {len(vectors):,} 个 {vectors.size} 维"
        f"词向量，用时 {seconds:.1f} 秒\n词向量：{out}",
    )
    return Outcome({"folder": str(out), **vectors.config()}, text)


def table(found: list[tuple[str, float]]) -> str:
    """Words with their scores, one on a line."""
    return "\n".join(f"  {value:6.3f}  {word}" for word, value in found)


def find_nearest(settings: VectorsSettings) -> Outcome:
    """The neighbours of one or several words."""
    vectors = open_model(settings, "MODEL WORDS...", 1)
    found = {word: vectors.nearest(word, settings.number) for word in settings.items[1:]}
    return Outcome({"nearest": found}, "\n".join(f"{word}\n{table(words)}" for word, words in found.items()))


def analogy(settings: VectorsSettings) -> Outcome:
    """What is to C as B is to A."""
    vectors = open_model(settings, "MODEL A B C", 3, 3)
    a, b, c = settings.items[1:]
    found = vectors.analogy(a, b, c, settings.number)
    return Outcome({"analogy": found}, f"{a} : {b} = {c} : ?\n{table(found)}")


def score(settings: VectorsSettings) -> Outcome:
    """Analogies and similarity judgements; the kind of a file is told from its content."""
    from hanmo.evaluation.vectors import evaluate_analogies, evaluate_similarity, is_analogies

    vectors = open_model(settings, "MODEL FILES...", 1)
    reports: list[dict[str, Any]] = []
    texts = []
    for path in settings.items[1:]:
        if is_analogies(path):
            analogies = evaluate_analogies(vectors, path)
            reports.append(analogies.to_dict())
            texts.append(describe_analogies(analogies))
        else:
            similarity = evaluate_similarity(vectors, path)
            reports.append(similarity.to_dict())
            texts.append(describe_similarity(similarity))
    return Outcome({"scores": reports}, "\n".join(texts))


def describe_analogies(report: AnalogyReport) -> str:
    """Accuracy of each section and in all."""
    lines = [
        f"{Path(report.path).name}: "
        + pick(
            "analogies; right of the known questions, right of all", "类比；占词表内题目的正确率，占全部题目的正确率"
        )
    ]
    for part in [*report.sections, report.total]:
        known = "    -" if part.accuracy is None else f"{part.accuracy:6.1%}"
        counts = pick(
            f"{part.right} of {part.known} known of {part.questions}",
            f"{part.right} 对 / {part.known} 在词表内 / 共 {part.questions}",
        )
        lines.append(f"  {known:>6}  {part.accuracy_of_all:6.1%}  {part.name}  ({counts})")
    return "\n".join(lines)


def describe_similarity(report: SimilarityReport) -> str:
    """The correlation with its interval and coverage."""
    name = Path(report.path).name
    pairs = pick(f"{report.covered} of {report.pairs} pairs", f"{report.pairs} 对中的 {report.covered} 对")
    if report.spearman is None:
        return f"{name}: " + pick(f"too few pairs for a correlation ({pairs})", f"词对太少，无法计算相关（{pairs}）")
    interval = f"  [{report.interval}]" if report.interval else ""
    return f"{name}: Spearman {report.spearman:.3f}{interval}  ({pairs})"


def convert(settings: VectorsSettings) -> Outcome:
    """Write the vectors in another format: the name of the output says which."""
    vectors = open_model(settings, "MODEL OUT", 1, 1)
    target = Path(settings.items[1])
    name = target.name.lower()
    if name.endswith(BINARY_SUFFIXES):
        vectors.save_word2vec(target, binary=True)
    elif name.endswith(TEXT_SUFFIXES):
        vectors.save_word2vec(target)
    elif target.suffix:
        fix = "name it .bin (binary), .txt or .vec (text), these with .gz, or a folder without a dot"
        raise UsageError(
            f"'{target.suffix}' is no format of word vectors",
            where=str(target),
            fix=fix,
            zh=f"'{target.suffix}' 不是词向量格式：用 .bin（二进制）、.txt/.vec（文本），可加 .gz；无后缀则存文件夹",
        )
    elif target.exists():
        raise UsageError(
            "the output is already there", where=str(target), fix="choose a new name", zh="输出已存在，请换一个名字"
        )
    else:
        vectors.save(target)
    words = pick(f"{len(vectors):,} words", f"{len(vectors):,} 个词")
    return Outcome({"path": str(target), "words": len(vectors)}, f"{words}: {target}")
