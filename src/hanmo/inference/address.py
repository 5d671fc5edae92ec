"""Where a request may go, and with which key.

The rules, each with a test:

- ``https`` anywhere; plain ``http`` only to this machine and to private networks, because key and texts would travel
  readable (``allow_http`` or ``HANMO_ALLOW_HTTP=1`` allows it). Offline: this machine only.
- ``OPENAI_API_KEY`` goes to the public API and to the address in ``OPENAI_BASE_URL``; every other address gets
  ``HANMO_API_KEY``, so that a name in someone's recipe cannot collect the key of another service.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from typing import TYPE_CHECKING, Any

from hanmo.catalog import is_offline
from hanmo.errors import NetworkError, UsageError, missing_package
from hanmo.language import pick

if TYPE_CHECKING:
    import httpx

PREFIX = "openai:"
PUBLIC_API = "https://api.openai.com/v1"


def parse_name(name: str) -> tuple[str, str]:
    """The model's id and the address of its endpoint.

    Raises:
        UsageError: no id, or an address without ``http(s)://``, which might otherwise be taken for a part of the id.

    >>> parse_name("openai:org/chat@20240620@https://example.com/v1")
    ('org/chat@20240620', 'https://example.com/v1')
    """
    match = re.fullmatch(r"openai:(?P<id>\S+?)(?:@(?P<address>https?://.*))?", name, re.IGNORECASE)
    rest = match["id"].rpartition("@")[2] if match and "@" in match["id"] and match["address"] is None else ""
    if match is None or re.search(r"[:/]|\.[a-z]|^localhost$|^\d+\.\d+\.\d+\.\d+$", rest, re.IGNORECASE):
        raise UsageError(
            "the name of a remote model is openai:MODEL or openai:MODEL@http(s)://ADDRESS",
            where=PREFIX,
            fix="for example  openai:gpt-4o  or  openai:qwen3@http://127.0.0.1:8000/v1",
            zh="远程模型的名称应为 openai:模型 或 openai:模型@http(s)://地址，例如 openai:qwen3@http://127.0.0.1:8000/v1",
        )
    return match["id"], match["address"] or os.environ.get("OPENAI_BASE_URL") or PUBLIC_API


def is_loopback(host: str) -> bool:
    """Whether a host is this machine.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("::1"), is_loopback("127.0.0.1.example.com")
    (True, True, True, False)
    """
    host = host.lower().rstrip(".")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def is_private(host: str) -> bool:
    """Whether a host is this machine or belongs to a private network, by its address or its kind of name.

    >>> is_private("192.168.1.5"), is_private("gpu-box"), is_private("gpu.local"), is_private("example.com")
    (True, True, True, False)
    >>> is_private("134744072"), is_private("0x08080808")  # 8.8.8.8 as some systems also read it
    (False, False)
    """
    if is_loopback(host):
        return True
    host = host.lower().rstrip(".")
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return address.is_private or address.is_link_local
    if re.fullmatch(r"[a-z][a-z0-9_-]*", host):  # a name without a dot: the local network's, or a container's
        return True
    return host.endswith((".local", ".lan", ".internal", ".home.arpa"))


def check_address(base_url: str, *, offline: bool, allow_http: bool) -> httpx.URL:
    """The address of an endpoint, where requests may go to it.

    Returns:
        the URL without a final slash; one without a path gets ``/v1``.

    Raises:
        UsageError: not a plain http(s) address, or unencrypted across the internet.
        NetworkError: offline, and the endpoint is another machine.
        ResourceError: httpx is not installed.
    """
    library = import_httpx()
    try:
        url = library.URL(base_url)
    except (library.InvalidURL, TypeError, ValueError):
        url = library.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
        raise UsageError(  # does not repeat the address: people have put keys there
            "the address of an endpoint is http(s)://HOST[:PORT]/PATH, without user name, password, query or fragment",
            where=url.host or f"{PREFIX}MODEL@ADDRESS",
            fix="for example  openai:gpt-4o@https://api.openai.com/v1 ; the key belongs into OPENAI_API_KEY",
            zh="接口地址应为 http(s)://主机[:端口]/路径，不含用户名、密码或查询参数；密钥请放在 OPENAI_API_KEY 中",
        )
    if is_offline(offline) and not is_loopback(url.host):
        raise NetworkError(
            "the endpoint is on another machine, and the network is not to be used",
            where=url.host,
            fix="run without --offline (and without HANMO_OFFLINE), or serve a model here:  hanmo serve",
            zh="接口在另一台机器上，而当前为离线模式。请去掉 --offline（和 HANMO_OFFLINE），或在本机运行 hanmo serve",
        )
    allowed = allow_http or os.environ.get("HANMO_ALLOW_HTTP", "") == "1"
    if url.scheme == "http" and not is_private(url.host) and not allowed:
        raise UsageError(
            "plain http is used only for this machine and private networks",
            where=url.host,
            why="everybody on the way could read the key and the texts",
            fix="use https://, or set HANMO_ALLOW_HTTP=1 if you accept that",
            zh="明文 http 只用于本机和私有网络：途经的任何人都能读到密钥和文本。请改用 https://，"
            "若确实接受，请设 HANMO_ALLOW_HTTP=1",
        )
    address: httpx.URL = url.copy_with(path=url.path.rstrip("/") or "/v1")
    return address


def find_key(url: httpx.URL) -> str | None:
    """The key for an address, from the environment (see the top of this file), or None."""
    httpx = import_httpx()
    own = [httpx.URL(PUBLIC_API).netloc]
    with contextlib.suppress(httpx.InvalidURL):
        own.append(httpx.URL(os.environ.get("OPENAI_BASE_URL", "")).netloc)
    other = os.environ.get("HANMO_API_KEY")
    return os.environ.get("OPENAI_API_KEY") or other if url.netloc in own else other


def check_key(key: str | None) -> str | None:
    """A key that can stand in a header; the message of the error does not show it.

    Raises:
        UsageError: it has characters that no key has.
    """
    key = (key or "").strip()
    if re.fullmatch(r"[\x21-\x7e]*", key):
        return key or None
    raise UsageError(
        "the key has spaces, line breaks or characters outside ASCII",
        where="OPENAI_API_KEY or HANMO_API_KEY",
        fix="copy the key again, without anything around it",
        zh="密钥中有空格、换行或非 ASCII 字符，请重新复制密钥",
    )


def import_httpx() -> Any:
    """The package ``httpx``, which only remote models need.

    Raises:
        ResourceError: it is not installed.
    """
    try:
        import httpx
    except ImportError:
        raise missing_package("httpx", "remote", pick("a remote model", "远程模型")) from None
    return httpx
