"""``hanmo serve``: the OpenAI API and a page for a model, on this machine."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hanmo.errors import UsageError, missing_package
from hanmo.inference.settings import WriterSettings
from hanmo.language import pick
from hanmo.settings import CommonSettings, argument, notice, option

HELP = "serve a model on this machine: OpenAI API, tasks, and a page in the browser"
HELP_ZH = "在本机提供模型服务：OpenAI 接口、任务接口和网页"


@dataclass
class ServeSettings(CommonSettings, WriterSettings):
    """Settings of ``hanmo serve``."""

    model: str = argument(
        "a model of any kind: a run, a folder, a GGUF file or a name from the catalog",
        zh="任何种类的模型：训练结果、文件夹、GGUF 文件或目录中的名称",
        default="smollm2-135m-instruct",
    )
    port: int = option(8000, "port of 127.0.0.1; 0 takes a free one", zh="127.0.0.1 上的端口；0 为任一空闲端口")


def run(settings: ServeSettings) -> None:
    """Serve until SIGTERM or Ctrl-C. With ``--json`` the address is printed as soon as requests are answered.

    Raises:
        HanmoError: a package is missing, the port is in use, or the model cannot be loaded.
    """
    if settings.model.lower().startswith("openai:"):
        raise UsageError(
            "a remote model is served already",
            where="hanmo serve",
            fix=f"use it as it is:  hanmo chat {settings.model}",
            zh=f"远程模型已在别处提供服务，可直接使用：hanmo chat {settings.model}",
        )
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise missing_package(package, "serve", "hanmo serve")
    from hanmo.serving.server import serve

    name = Path(settings.model).resolve().name or "model"

    def load_model() -> Any:
        from hanmo.inference.loading import load

        model = load(settings.model, **settings.engine_options(), offline=settings.offline)
        refuse_vectors(model, settings.model)
        told = model.describe() if hasattr(model, "tokenizer") else ""  # others are described by what they were taught
        notice(f"{name}: {told if isinstance(told, str) and told else type(model).__name__}")
        return model

    def announce(address: str) -> None:
        if settings.json:
            print(json.dumps({"url": address, "model": name}, ensure_ascii=False), flush=True)
        else:
            notice(pick(f"{name} answers at {address}", f"{name} 已就绪：{address}"))
            notice(pick(f"OpenAI API: {address}/v1    stop: Ctrl-C", f"OpenAI 接口：{address}/v1    停止：Ctrl-C"))

    serve(load_model, name, settings.port, announce)
    notice(pick("stopped", "已停止"))


def refuse_vectors(model: Any, name: str) -> None:
    """Word vectors answer nothing over HTTP.

    Raises:
        UsageError: the model is of that kind.
    """
    from hanmo.models.embeddings import WordVectors

    if isinstance(model, WordVectors):
        raise UsageError(
            "word vectors neither write nor do a task, so there is nothing to serve",
            where=name,
            fix=f"hanmo vectors nearest {name} WORD; to serve: a model that writes, or one that was taught a task",
            zh="词向量既不生成文本，也不完成任务，无法提供服务；请使用能生成文本或学过任务的模型",
        )
