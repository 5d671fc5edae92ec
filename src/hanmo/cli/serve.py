"""``hanmo serve``: the OpenAI API and a page for a model, on this machine."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hanmo.errors import UsageError, missing_package
from hanmo.inference.settings import WriterSettings
from hanmo.language import pick
from hanmo.settings import CommonSettings, argument, notice, option

if TYPE_CHECKING:
    from hanmo.inference.language_model import LanguageModel

HELP = "serve a model on this machine: OpenAI API and a page in the browser"
HELP_ZH = "在本机提供模型服务：OpenAI 接口和网页"


@dataclass
class ServeSettings(CommonSettings, WriterSettings):
    """Settings of ``hanmo serve``."""

    model: str = argument(
        "a model folder, a GGUF file or a name from the catalog",
        zh="模型文件夹、GGUF 文件或目录中的名称",
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

    def load() -> LanguageModel:
        from hanmo.inference.loading import load_language_model

        model: LanguageModel = load_language_model(
            settings.model, **settings.engine_options(), offline=settings.offline
        )
        notice(f"{name}: {model.describe()}")
        return model

    def announce(address: str) -> None:
        if settings.json:
            print(json.dumps({"url": address, "model": name}, ensure_ascii=False), flush=True)
        else:
            notice(pick(f"{name} answers at {address}", f"{name} 已就绪：{address}"))
            notice(pick(f"OpenAI API: {address}/v1    stop: Ctrl-C", f"OpenAI 接口：{address}/v1    停止：Ctrl-C"))

    serve(load, name, settings.port, announce)
    notice(pick("stopped", "已停止"))
