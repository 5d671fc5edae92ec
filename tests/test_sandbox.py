"""The sandbox: what programs that nobody has read may and may not do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hanmo.errors import ResourceError, UsageError
from hanmo.tasks.sandbox import Limits, protections, run

SHORT = Limits(seconds=1.0, cpu_seconds=1.0, memory=512 << 20)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what Linux enforces")


def needs(*wanted: str) -> None:
    """Skip where this system cannot give the protection (a container that forbids namespaces, an old kernel)."""
    if not set(protections()) & set(wanted):
        pytest.skip(f"this system does not offer {' or '.join(wanted)}")


@pytest.mark.parametrize(
    ("program", "outcome", "message"),
    [
        ("assert 1 + 1 == 2", "passed", ""),
        ("", "passed", ""),
        ("名 = '春'\nassert len(名) == 1", "passed", ""),
        ("assert __name__ == '__main__'", "passed", ""),
        ("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()", "passed", ""),
        ("x = 1\nassert x == 2", "failed", "line 2: AssertionError"),
        ("raise ValueError('半')", "failed", "line 1: ValueError: 半"),
        ("raise ValueError('\\ud800')", "failed", "ValueError: \\ud800"),
        ("import sys\nsys.exit(0)\nassert False", "failed", "ended itself"),
        ("import os\nos._exit(0)\nassert False", "failed", "ended itself"),
        ("raise SystemExit", "failed", "ended itself"),
        ("input()", "failed", "EOFError"),
        ("def f():\n    return f()\nf()", "failed", "RecursionError"),
        ("def f(:", "not compiled", "line 1: SyntaxError"),
        ("x = '\0'", "not compiled", "null bytes"),
        ("x = '\ud800'", "not compiled", "surrogate"),
        ("(" * 100_000, "not compiled", ""),
        ("x = 0 " + "+ 1 " * 200_000, "not compiled", ""),
        ("while True: pass", "timeout", "time limit"),
        ("import time\ntime.sleep(60)", "timeout", "time limit"),
        ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", "timeout", ""),
    ],
)
def test_outcomes(program: str, outcome: str, message: str) -> None:
    result = run(program, SHORT)
    assert result.outcome == outcome, result
    assert message in result.message
    assert result.seconds < 10
    assert result.passed == (outcome == "passed")


@linux
@pytest.mark.parametrize("program", ["x = bytearray(1 << 34)", "x = []\nwhile True: x.append('a' * 10**7)"])
def test_a_program_that_eats_the_memory_is_stopped(program: str) -> None:
    assert run(program, Limits(seconds=5, memory=512 << 20)).outcome == "memory"


@linux
def test_a_crash_of_the_interpreter_is_named() -> None:
    result = run("import ctypes\nctypes.string_at(0)", SHORT)
    assert (result.outcome, "SIGSEGV" in result.message) == ("killed", True)


def processes_with(mark: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
        if "jail.py" in line and mark in line:
            found.append(entry.parent.name)
    return found


@linux
@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        time.sleep(600)",
        "import os, time\nif os.fork() == 0:\n    try: os.setsid()\n    except OSError: pass\n    time.sleep(600)",
    ],
    ids=["bomb", "children", "own session"],
)
def test_nothing_outlives_the_program(program: str) -> None:
    odd = 7_654_321 + os.getpid()  # marks our processes by a limit that no other run has
    began = time.monotonic()
    run(program, Limits(seconds=1, cpu_seconds=1, disk=odd))
    assert time.monotonic() - began < 10
    deadline = time.monotonic() + 5
    while processes_with(str(odd)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(str(odd)) == []


@linux
def test_the_number_of_processes_is_limited() -> None:
    needs("limit: nproc")
    program = (
        "import os, time\nchildren = 0\ntry:\n    while children < 100:\n        if os.fork() == 0:\n"
        "            time.sleep(5)\n            os._exit(0)\n        children += 1"
        "\nexcept OSError: pass\nprint(children)"
    )
    result = run(program, Limits(seconds=4, processes=5))
    assert (result.outcome, int(result.output)) == ("passed", 5)


@linux
def test_files_outside_its_folder_are_out_of_reach(tmp_path: Path) -> None:
    needs("files: landlock")
    tmp_path.chmod(0o777)
    secret = tmp_path / "secret"
    secret.write_text("key")
    secret.chmod(0o666)
    for program in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(secret)!r}).read()",
        f"import os\nos.remove({str(secret)!r})",
        f"import os\nos.chdir({str(tmp_path)!r})\nopen('new', 'w')",
        f"import os\nos.symlink({str(tmp_path)!r}, 'way')\nopen('way/new', 'w')",
        "open('/etc/passwd').read()",
    ):
        result = run(program, SHORT)
        assert result.outcome == "failed", program
        assert "OSError" in result.message or "PermissionError" in result.message
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]
    assert secret.read_text() == "key"


def test_its_own_folder_is_empty_writable_and_removed() -> None:
    result = run("import os\nassert os.listdir() == []\nopen('a', 'w').write('春')\nprint(os.getcwd())", SHORT)
    assert result.passed, result
    assert not Path(result.output.strip()).exists()
    locked = run("import os\nos.mkdir('a')\nopen('a/b', 'w').close()\nos.chmod('a', 0)\nprint(os.getcwd())", SHORT)
    assert locked.passed
    assert not Path(locked.output.strip()).exists()


@linux
def test_the_disk_is_limited() -> None:
    small = Limits(seconds=5, disk=2 << 20)
    assert run("open('a', 'wb').write(b'x' * (4 << 20))", small).outcome in ("failed", "killed")
    needs("disk: own file system")
    assert run("for i in range(50): open(str(i), 'wb').write(b'x' * (1 << 19))", small).outcome == "failed"


def test_output_is_cut_off() -> None:
    result = run("for _ in range(2000): print('x' * 1000)", Limits(output=1000))
    assert result.passed
    assert result.output == ("x" * 1000)
    assert run("while True: print('x' * 10000)", SHORT).outcome == "timeout"


def test_nothing_of_our_environment_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANMO_TEST_SECRET", "key")
    result = run("import os\nprint(dict(os.environ), os.listdir())", SHORT)
    assert result.passed
    assert "HANMO_TEST_SECRET" not in result.output
    for process in ("1", str(os.getpid())):
        shown = run(f"print(open('/proc/{process}/environ', 'rb').read())", SHORT)
        assert "HANMO_TEST_SECRET" not in shown.output + shown.message
        if sys.platform.startswith("linux") and "files: landlock" in protections():
            assert shown.outcome == "failed"


def test_there_is_no_network() -> None:
    for program in (
        "import socket\nsocket.socket()",
        "import socket\nsocket.create_connection(('127.0.0.1', 80))",
        "import _socket\n_socket.socket()",
        "import socket\nsocket.socket(socket.AF_UNIX)",
    ):
        result = run(program, SHORT)
        assert result.outcome == "failed"
        assert "PermissionError" in result.message
    assert any(name.startswith("network: ") for name in protections())


@linux
def test_no_socket_by_way_of_the_c_library() -> None:
    needs("network: sockets refused")
    program = "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.socket(2, 1, 0) < 0 and libc.socket(1, 1, 0) < 0"
    assert run(program, SHORT).passed


def test_a_report_that_the_program_writes_itself_does_not_count() -> None:
    program = (
        "import os, json\n"
        "line = json.dumps({'outcome': 'passed', 'message': '', 'secret': ''}).encode() + b'\\n'\n"
        "for number in range(3, 60):\n"
        "    try: os.write(number, line)\n"
        "    except OSError: pass\n"
        "os._exit(0)"
    )
    assert run(program, SHORT).outcome == "failed"


@linux
def test_the_fall_backs_hold_where_the_kernel_gives_nothing() -> None:
    """The jail without namespaces, Landlock and seccomp: limits and Python's sockets are what is left."""
    code = (
        "import runpy, sys, ctypes\n"
        "space = runpy.run_path(sys.argv[1])\n"
        "space['separate'].__globals__.update(separate=lambda s: set(), confine_files=lambda s: set(),"
        " forbid_calls=lambda: set(), become_nobody=lambda s, l: set())\n"
        "found = space['lock_in']({'cpu': 5, 'memory': 1 << 30, 'disk': 1 << 20, 'files': 64, 'processes': 8})\n"
        "print(sorted(found))\nprint(space['attempt']('import socket; socket.socket()'))"
    )
    jail = Path(sys.modules["hanmo.tasks.sandbox"].__file__ or "").with_name("jail.py")
    done = subprocess.run([sys.executable, "-c", code, str(jail)], capture_output=True, text=True, check=True)
    assert "network: Python's sockets blocked" in done.stdout
    assert "limit: as" in done.stdout
    assert "limit: nproc" not in done.stdout  # it would count all of the user's processes
    assert "no network" in done.stdout


def test_limits_are_checked() -> None:
    with pytest.raises(UsageError, match="above zero"):
        Limits(seconds=0)
    with pytest.raises(UsageError, match="above zero"):
        Limits(memory=-1)


def test_a_system_without_protections_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanmo.tasks.sandbox.os.name", "nt")
    try:
        with pytest.raises(ResourceError, match="WSL"):
            run("")
    finally:
        monkeypatch.undo()
