"""``hanmo finetune``: teach a base model a task, instructions or preferences."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from hanmo.cli.outcome import Outcome
from hanmo.cli.records import RecordSettings
from hanmo.cli.together import run_together, start_workers
from hanmo.data.settings import DataSettings
from hanmo.errors import UsageError
from hanmo.language import pick
from hanmo.progress import human_time
from hanmo.settings import CommonSettings, argument, flag, option
from hanmo.tasks.registry import training_of
from hanmo.training.settings import LoopSettings

HELP = "teach a base model a task, instructions or preferences"
HELP_ZH = "让基础模型学会一项任务、遵循指令或偏好"

TASKS = (
    "classification",
    "tagging",
    "semantic-roles",
    "question-answering",
    "seq2seq",
    "instructions",
    "preferences",
    "embeddings",
    "text",
)
RECORDS = tuple(task for task in TASKS if task != "text")  # tasks whose data are records
LORA_ONLY = ("rank", "alpha", "targets", "dora", "rslora", "lora_dropout")
NEW = "new"  # as a base: none
SIZES = {"tiny": (64, 2), "small": (192, 3), "medium": (256, 4), "base": (512, 6)}  # width, layers of either side
ONLY_FOR = {  # settings that only some tasks have
    "fields": RECORDS,
    "validation": RECORDS,
    "truncate": RECORDS,
    "text_field": ("text",),
    "half_width": ("text",),
    "simplify": ("text",),
    "dedup": ("text",),
    "test_share": ("text",),
    "split": ("text",),
    "label_separator": ("classification",),
    "relabel": ("tagging",),
    "min_score": ("embeddings",),
    "multi_label": ("classification",),
    "balanced": ("classification",),
    "crf": ("tagging", "semantic-roles"),
    "last_turn": ("instructions",),
    "unpacked": ("instructions",),
    "preference_loss": ("preferences",),
    "beta": ("preferences",),
    "group": ("embeddings",),
    "temperature": ("embeddings",),
    "smoothing": ("seq2seq",),
    "both_ways": ("seq2seq",),
    "vocab_size": ("seq2seq",),
    "size": ("seq2seq",),
    "dropout": ("seq2seq",),
    "teacher": ("classification", "instructions", "seq2seq"),
}


@dataclass
class FinetuneSettings(CommonSettings, RecordSettings, DataSettings, LoopSettings):
    """Settings of ``hanmo finetune``."""

    paths: list[str] = argument(
        "files of records: jsonl, json, csv, tsv, CoNLL, SQuAD and others; for --task text any texts",
        zh="数据文件：jsonl、json、csv、tsv、CoNLL、SQuAD 等；--task text 时为任意文本",
        many=True,
        flag="data",
    )
    task: str = option(
        "instructions",
        "what to learn; text: to go on with pretraining on plain texts. Tasks of hanmo evaluate are understood, too: "
        "sentiment, ner, qa, translation and others",
        zh="任务；text 表示用纯文本继续预训练。也可用 hanmo evaluate 的任务名：sentiment、ner、qa、translation 等",
        choices=TASKS,
        aliases=training_of,
    )
    base: str = option(
        "",
        "model to begin with: a folder, a run, or a name of hanmo models; seq2seq: new begins with none; "
        "classification: logistic, svm, naive-bayes, nb-logistic, lstm and tagging: crf, bilstm-crf need none",
        zh="基础模型：文件夹、运行目录或 hanmo models 中的名称；seq2seq 可用 new 从零训练；"
        "分类可用 logistic、svm、naive-bayes、nb-logistic、lstm，标注可用 crf、bilstm-crf，均无需已有模型",
    )
    validation: str | None = option(
        None,
        "records to validate on; default: a tenth of the data, chosen by content",
        zh="验证数据；默认按内容取十分之一",
        metavar="FILE",
    )
    validation_share: float | None = option(
        None,
        "share of the data kept for validation; default: 0.1 of records; of texts 0.01, more where there is little",
        zh="验证所用数据的比例；默认：记录 0.1，文本 0.01（语料小则更大）",
        metavar="SHARE",
    )
    min_score: float | None = option(
        None,
        "embeddings: from which score of similarity on two texts belong together",
        zh="向量：相似度达到多少才算互相匹配",
        metavar="SCORE",
    )
    truncate: bool = option(
        False, "cut records that are longer than the context (they are counted)", zh="截断超长记录（会计数）"
    )
    lora: bool = option(
        False, "train low-rank adapters instead of all weights", zh="训练低秩适配器（LoRA）而非全部权重"
    )
    rank: int | None = option(None, "rank of the adapters; default 16", zh="适配器的秩；默认 16")
    alpha: float = option(32.0, "the change is multiplied by alpha / rank", zh="变化量乘以 alpha / rank")
    targets: list[str] = option(
        [],
        "layers with adapters: attention, mlp or a name such as q_proj; may be repeated; default: all linear layers",
        zh="加适配器的层：attention、mlp 或 q_proj 等名称；可重复给出；默认所有线性层",
    )
    lora_dropout: float = option(0.0, "dropout before the adapters", zh="适配器输入的 dropout")
    rslora: bool = option(False, "divide alpha by the square root of the rank", zh="alpha 除以秩的平方根（rsLoRA）")
    dora: bool = option(False, "learn the length of every row as well", zh="同时学习每行的长度（DoRA）")
    last_layers: int | None = option(
        None, "train only so many of the last layers and the head", zh="只训练最后若干层与任务头", metavar="N"
    )
    multi_label: bool = option(False, "classification: any number of labels can hold", zh="分类：可同时有多个标签")
    balanced: bool = option(False, "classification: rare labels weigh more", zh="分类：稀有标签权重更大")
    crf: bool = option(
        False, "tagging, roles: score whole sequences of tags", zh="标注与语义角色：用 CRF 给整个标签序列打分"
    )
    last_turn: bool = option(
        False, "instructions: learn only the last answer of a dialogue", zh="指令：只学每段对话的最后一个回答"
    )
    unpacked: bool = option(False, "instructions: one dialogue per row", zh="指令：每行只放一段对话")
    preference_loss: str = option(
        "dpo",
        "preferences: the loss; dpo compares with the base model, orpo and simpo need no comparison",
        zh="偏好：损失函数；dpo 与基础模型比较，orpo 与 simpo 不需要",
        choices=("dpo", "orpo", "simpo"),
    )
    beta: float | None = option(
        None,
        "preferences: how strongly answers are driven apart; default 0.1, of simpo 2",
        zh="偏好：拉开两个回答的强度；默认 0.1，simpo 为 2",
    )
    group: int = option(32, "embeddings: records that are negatives of each other", zh="向量：互为负例的记录数")
    temperature: float = option(0.05, "embeddings: by which cosines are divided", zh="向量：余弦除以的温度")
    smoothing: float | None = option(
        None,
        "seq2seq: label smoothing; default 0, with --base new 0.1",
        zh="序列到序列：标签平滑；默认 0，--base new 时为 0.1",
    )
    both_ways: bool = option(
        False,
        "seq2seq: learn to translate Chinese pairs in both directions with one model",
        zh="序列到序列：一个模型同时学习中外互译两个方向",
    )
    vocab_size: int = option(8000, "seq2seq with --base new: tokens of its vocabulary", zh="从零训练时的词表大小")
    size: str = option(
        "small",
        "seq2seq with --base new: width and layers of the network, 192 and 3 + 3 for small",
        zh="从零训练时网络的宽度与层数；small 为 192 宽、3 + 3 层",
        choices=tuple(SIZES),
    )
    dropout: float | None = option(
        None,
        "seq2seq with --base new: share of features left out; default 0.3 for few pairs, 0.1 for many",
        zh="从零训练时的 dropout 比例；句对较少时默认 0.3，较多时 0.1",
    )
    teacher: str | None = option(
        None, "also learn from this larger model (distillation)", zh="同时向更大的模型学习（蒸馏）", metavar="MODEL"
    )
    teacher_share: float = option(0.5, "share of the teacher in the loss", zh="蒸馏损失的占比")
    out: str | None = option(
        None, "folder of the run; default: runs/<name of the data>", zh="输出目录；默认 runs/<数据名>"
    )
    overwrite: bool = option(False, "start anew where the folder holds an earlier run", zh="目录中已有运行时重新开始")

    baseline: bool = option(
        True,
        "leave out what the result is compared with: a linear classifier, a CRF, or the base before the training",
        zh="不计算对照基线（线性分类器、CRF，或训练前的基础模型）",
    )
    seed: int = option(0, "seed of everything random: split, weights, data order", zh="一切随机过程的种子")

    def check(self) -> None:
        """Raise UsageError for values that cannot work, before any file is read."""
        from hanmo.cli.learners import check_learner, is_learner

        super().check()
        self.check_loop()
        if not self.base:
            raise UsageError(
                "--base is missing",
                why="fine-tuning begins with a model",
                fix="hanmo finetune data.jsonl --task instructions --base smollm2-135m-instruct",
                zh="缺少 --base：微调需要一个基础模型，例如 --base smollm2-135m-instruct",
            )
        self.check_new()
        if not self.paths:
            raise UsageError("there are no data", fix="give a file, e.g. data.jsonl", zh="没有数据：请给出文件")
        usual = {item: getattr(FinetuneSettings(), item) for item in (*LORA_ONLY, *ONLY_FOR)}
        for name in LORA_ONLY:
            if not self.lora and getattr(self, name) != usual[name]:
                raise UsageError(
                    f"{flag(name)} belongs to --lora",
                    fix="add --lora, or leave it out",
                    zh=f"{flag(name)} 需与 --lora 合用",
                )
        for name, tasks in ONLY_FOR.items():
            if self.task not in tasks and getattr(self, name) != usual[name]:
                raise UsageError(
                    f"{flag(name)} means nothing for --task {self.task}",
                    fix=f"it is for {', '.join(tasks)}",
                    zh=f"{flag(name)} 对 --task {self.task} 不起作用，只用于 {'、'.join(tasks)}",
                )
        if self.shard:
            raise UsageError(
                "--shard is for hanmo pretrain",
                why="a base model is read whole by every process",
                fix="leave it out; --lora needs little memory",
                zh="--shard 只用于 hanmo pretrain；微调请改用 --lora 节省内存",
            )
        if self.lora and self.last_layers is not None:
            raise UsageError(
                "--lora and --last-layers are two answers to one question",
                fix="give only one of them",
                zh="--lora 与 --last-layers 只能给一个",
            )
        if self.label_separator is not None and not self.multi_label:
            raise UsageError(
                "--label-separator belongs to --multi-label",
                why="without it every text has exactly one label",
                fix="add --multi-label",
                zh="--label-separator 需与 --multi-label 合用，否则每条文本只有一个标签",
            )
        if self.validation is not None and self.validation_share is not None:
            raise UsageError(
                "--validation and --validation-share are two answers to one question",
                fix="give only one of them",
                zh="--validation 与 --validation-share 只能给一个",
            )
        if self.validation_share is not None and not self.validation_share:
            raise UsageError(
                "--validation-share 0 leaves nothing to validate on",
                why="the weights that predict the validation data best are kept",
                fix="give a share such as 0.1, or a file with --validation",
                zh="--validation-share 不能为 0：训练依据验证数据保留最好的权重。"
                "请给 0.1 等比例，或用 --validation 给出文件",
            )
        if is_learner(self):
            check_learner(self)
        self.field_names()
        self.new_names()

    def check_new(self) -> None:
        """Raise UsageError for what a model without weights cannot do."""
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UsageError(
                "--dropout is a share from 0 to below 1", fix="leave it out", zh="--dropout 应在 0 到 1 之间（不含 1）"
            )
        usual = FinetuneSettings()
        if self.base != NEW:
            given = next(
                (name for name in ("vocab_size", "size", "dropout") if getattr(self, name) != getattr(usual, name)),
                None,
            )
            if given and self.task == "seq2seq":
                raise UsageError(
                    f"{flag(given)} belongs to --base new",
                    why="a base that is read has its vocabulary and its size",
                    fix="leave it out",
                    zh=f"{flag(given)} 只与 --base new 合用；已有的基础模型自带词表与大小",
                )
        elif self.task != "seq2seq" or self.lora or self.last_layers is not None:
            raise UsageError(
                "--base new is for --task seq2seq, with all weights trained",
                why="adapters and heads need a network that knows something already",
                fix="hanmo pretrain makes a language model from texts; hanmo models lists bases",
                zh="--base new 只用于 --task seq2seq 且训练全部权重；从文本训练语言模型请用 hanmo pretrain",
            )


def run(settings: FinetuneSettings) -> Outcome:
    """Train and tell how it ended."""
    from hanmo.cli.learners import is_learner, teach
    from hanmo.cli.scores import CAN_ALREADY
    from hanmo.cli.tuning import tune
    from hanmo.evaluation.task_baselines import Score, describe_scores, verdict

    settings.check()
    if is_learner(settings):
        return teach(settings)
    start_workers(settings)
    with run_together(settings.paths, settings) as (folder, processes, device):
        tuned = tune(folder, settings, processes, device)
    result = tuned.result
    data = {
        "run": str(folder),
        "model": str(tuned.model_folder),
        "adapter": None if tuned.adapter_folder is None else str(tuned.adapter_folder),
        "report": str(folder / "report.html"),
        **asdict(result),
    }
    data["baselines"] = [score.as_dict() for score in tuned.scores]
    this = Score(pick("this model", "本模型"), result.measures)
    table = describe_scores([*tuned.scores, this])
    if sentence := verdict(tuned.scores, result.measures, of_base=settings.task in CAN_ALREADY):
        table += "\n" + sentence
    where = pick(f"model:  {tuned.model_folder}", f"模型：{tuned.model_folder}")
    if tuned.adapter_folder is not None:
        where += "\n" + pick(f"adapter: {tuned.adapter_folder}", f"适配器：{tuned.adapter_folder}")
    text = pick(
        f"on the validation data, after {result.steps:,} steps in {human_time(result.seconds)}:\n{table}\n{where}",
        f"验证结果（共 {result.steps:,} 步，用时 {human_time(result.seconds)}）：\n{table}\n{where}",
    )
    return Outcome(data, text)
