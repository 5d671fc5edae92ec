"""The process that runs a program which nobody has read: it locks itself in, then runs the program, and reports.

``sandbox.py`` starts this file as a script (``python -I -B jail.py SETTINGS``), never imports it. It uses the standard
library alone. The program comes on the standard input, after one line with a secret word; the report goes to a pipe.

On Linux there are three processes: the outer one (known to Hanmo), the first process of a new PID namespace, whose end
makes the kernel kill whatever the program left behind, and the program itself. Each protection is tried by itself,
and those in force are reported; none is assumed. Sources: the manual pages namespaces(7), landlock(7), seccomp(2),
capabilities(7), prctl(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import signal
import struct
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LINUX = sys.platform.startswith("linux")
NEW_NS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446
SET_PDEATHSIG, SET_KEEPCAPS, SET_SECCOMP, SET_NO_NEW_PRIVS = 1, 8, 22, 38
READ_EVERYWHERE = 1 << 2  # CAP_DAC_READ_SEARCH
# What a program may not ask the kernel for: (x86_64, aarch64) numbers of socket, io_uring_setup, open_by_handle_at,
# ptrace, setsid, setpgid, unshare, setns, mount, umount2, bpf, keyctl, add_key, perf_event_open, userfaultfd,
# process_vm_readv, process_vm_writev.
FORBIDDEN_CALLS = {
    "x86_64": (41, 425, 304, 101, 112, 109, 272, 308, 165, 166, 321, 250, 248, 298, 323, 310, 311),
    "aarch64": (198, 425, 265, 117, 157, 154, 97, 268, 40, 39, 280, 219, 217, 241, 282, 270, 271),
}
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CAPSET_CALLS = {"x86_64": 126, "aarch64": 91}
MESSAGE_LIMIT = 4000  # characters of the error that is reported


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def call(number: int, *values: Any) -> int:
    """A system call by its number; pointers and numbers as ctypes takes them."""
    plain = [ctypes.c_long(value) if isinstance(value, int) else value for value in values]
    return int(libc().syscall(ctypes.c_long(number), *plain))


def prctl(option: int, *values: Any) -> bool:
    full = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in (*values, 0, 0, 0, 0)[:4]]
    return bool(libc().prctl(option, *full) == 0)


def separate(settings: dict[str, Any]) -> set[str]:
    """Leave the namespaces of the system: no network, own processes, a small file system of its own to write to."""
    shared = NEW_NS | NEW_IPC | NEW_PID | NEW_NET
    user, group = os.getuid(), os.getgid()
    if libc().unshare(shared) != 0:
        if libc().unshare(NEW_USER | shared) != 0:
            return set()
        with contextlib.suppress(OSError):
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        with contextlib.suppress(OSError):
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    found = {"processes: namespace", "network: namespace"}
    read_only_and_private = struct.pack("QQQQ", 1, 0, 1 << 18, 0)
    if call(MOUNT_SETATTR, -100, b"/", 0x8000, read_only_and_private, len(read_only_and_private)) == 0:
        found.add("files: read-only mounts")
    elif libc().mount(None, b"/", None, ctypes.c_ulong(0x4000 | 1 << 18), None) != 0:
        return found
    folder = os.fsencode(settings["folder"])
    size = f"size={settings['disk']},nr_inodes=4096,mode=0777".encode()
    if libc().mount(b"tmpfs", folder, b"tmpfs", ctypes.c_ulong(2 | 4), size) == 0:  # no set-user-id, no devices
        found.add("disk: own file system")
    elif "files: read-only mounts" in found:  # the folder would be read-only as well: give it back
        writable = struct.pack("QQQQ", 0, 1, 0, 0)
        libc().mount(folder, folder, None, ctypes.c_ulong(0x1000), None)
        call(MOUNT_SETATTR, -100, folder, 0, writable, len(writable))
    return found


def become_nobody(settings: dict[str, Any], landlock: bool) -> set[str]:
    """As root: become a user that exists nowhere else, so that limits bind and no file belongs to it.

    Where Python itself lies in a folder that only root may enter, the right to read (which Landlock then narrows to
    Python's own folders) is kept; without Landlock the process stays root, but loses every privilege.
    """
    if os.getuid() != 0:
        return drop_privileges(0)
    hidden = hidden_from_others(sysconfig.get_path("stdlib"))
    if hidden and not landlock:
        return drop_privileges(0)
    prctl(SET_KEEPCAPS, 1)
    for user in (0x70000000 + os.getpid(), 65534):
        try:
            os.chown(settings["folder"], user, user)
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        except OSError:
            continue
        return {"user: nobody"} | drop_privileges(READ_EVERYWHERE if hidden else 0)
    return drop_privileges(0)


def hidden_from_others(path: str) -> bool:
    """Whether a folder on the way to ``path`` (links followed) is closed to other users."""
    steps = [Path(path).resolve(), Path(path).absolute()]
    return any(not folder.stat().st_mode & 1 for step in steps for folder in (step, *step.parents))


def drop_privileges(kept: int) -> set[str]:
    number = CAPSET_CALLS.get(platform.machine())
    if number is None:
        return set()
    header = struct.pack("Ii", 0x20080522, 0)
    data = struct.pack("6I", kept, kept, 0, 0, 0, 0)
    return {"privileges: none"} if call(number, header, data) == 0 else set()


def landlock_version() -> int:
    return max(0, call(LANDLOCK_CREATE, None, 0, 1)) if LINUX else 0


def confine_files(settings: dict[str, Any]) -> set[str]:
    """With Landlock: read Python's own files and the system's libraries, write to the folder, nothing else."""
    version = landlock_version()
    if version == 0:
        return set()
    kinds = 13 + (version >= 2) + (version >= 3) + (2 if version >= 5 else 0)
    every = (1 << min(kinds, 16)) - 1
    connections = 3 if version >= 4 else 0
    scope = 3 if version >= 6 else 0
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = call(LANDLOCK_CREATE, struct.pack("QQQ", every, connections, scope), size, 0)
    if rules < 0:
        return set()
    reading, file_reading = 1 | 4 | 8, 1 | 4  # execute, read a file, list a folder
    paths = dict.fromkeys(readable_folders(), reading)
    paths |= {Path("/dev/null"): file_reading | 2, Path("/dev/urandom"): file_reading, Path("/dev/zero"): file_reading}
    paths[Path(settings["folder"])] = every
    for path, rights in paths.items():
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = rights if path.is_dir() else rights & (1 | 2 | 4)
            call(LANDLOCK_ADD, rules, 1, struct.pack("=Qi", allowed & every, handle), 0)
            os.close(handle)
    done = call(LANDLOCK_RESTRICT, rules, 0) == 0
    os.close(rules)
    return {"files: landlock"} if done else set()


def readable_folders() -> list[Path]:
    own = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    own += [sys.base_prefix + "/lib", "/usr/lib", "/usr/lib64", "/lib", "/lib64"]
    own += ["/etc/ld.so.cache", "/usr/share/zoneinfo"]
    return [Path(path).resolve() for path in own if Path(path).exists()]


def forbid_calls() -> set[str]:
    """With seccomp: sockets of every kind, leaving the process group, and what only an attacker needs."""
    machine = platform.machine()
    if machine not in ARCHITECTURES or sys.maxsize < 2**32:
        return set()
    numbers = FORBIDDEN_CALLS[machine]
    load, equal, greater, give = 0x20, 0x15, 0x35, 0x06
    kill, refuse, allow = 0x80000000, 0x00050000 | 1, 0x7FFF0000
    code = [(load, 0, 0, 4), (equal, 1, 0, ARCHITECTURES[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
    code += [(greater, 0, 1, 0x40000000), (give, 0, 0, kill)]  # the x32 calls of x86_64
    for place, number in enumerate(numbers):
        code.append((equal, len(numbers) - place, 0, number))
    code += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    packed = b"".join(struct.pack("HBBI", *step) for step in code)
    text = ctypes.create_string_buffer(packed, len(packed))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(text))
    return {"network: sockets refused", "group: kept"} if prctl(SET_SECCOMP, 2, program) else set()


def limit(settings: dict[str, Any], found: set[str]) -> set[str]:
    """The limits of the kernel for this process and those it starts."""
    import resource

    wanted = {
        "RLIMIT_CPU": (settings["cpu"], settings["cpu"] + 1),
        "RLIMIT_AS": (settings["memory"], settings["memory"]),
        "RLIMIT_FSIZE": (settings["disk"], settings["disk"]),
        "RLIMIT_NOFILE": (settings["files"], settings["files"]),
        "RLIMIT_CORE": (0, 0),
    }
    own = 3 if "processes: namespace" in found else 1  # of ours, which count as well
    if "processes: namespace" in found or "user: nobody" in found:  # else all of the user's processes would count
        wanted["RLIMIT_NPROC"] = (settings["processes"] + own, settings["processes"] + own)
    done = set()
    for name, values in wanted.items():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            resource.setrlimit(getattr(resource, name), values)
            done.add(f"limit: {name.removeprefix('RLIMIT_').lower()}")
    return done


def block_sockets() -> set[str]:
    """The fall-back without the kernel's help: Python's own sockets raise PermissionError (ctypes goes round it)."""
    import _socket
    import socket

    def refuse(*_values: object, **_named: object) -> None:
        raise PermissionError("the sandbox has no network")

    for module in (socket, _socket):
        for name in ("socket", "create_connection", "create_server", "socketpair", "fromfd", "SocketType"):
            if hasattr(module, name):
                setattr(module, name, refuse)
    return {"network: Python's sockets blocked"}


def die_with_parent() -> None:
    """Whoever kills the parent, this process goes as well (to be asked for anew after a change of user or a fork)."""
    prctl(SET_PDEATHSIG, int(signal.SIGKILL))


def lock_in(settings: dict[str, Any]) -> set[str]:
    """Every protection that this system has; returns in the process that is to run the program."""
    found: set[str] = set()
    if LINUX:
        found |= separate(settings)
        found |= become_nobody(settings, landlock_version() > 0)
        die_with_parent()
        if "processes: namespace" in found:
            move_in()
        found |= limit(settings, found)
        prctl(SET_NO_NEW_PRIVS, 1)
        found |= confine_files(settings) | forbid_calls()
    else:
        found |= limit(settings, found)
    if not found & {"network: namespace", "network: sockets refused"}:
        found |= block_sockets()
    return found


def move_in() -> None:
    """Fork twice into the new PID namespace: its first process, and the one that is to run the program.

    The old processes wait for the new one and end as it ended.
    """
    for _ in range(2):
        child = os.fork()
        if child == 0:
            die_with_parent()
            continue
        os.close(REPORT)
        while True:
            ended, status = os.wait()
            if ended == child:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)


def last_line(error: BaseException) -> str:
    """The error with the line of the program it came from."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {type(error).__name__}: {error.msg}"
    lines = [step.lineno for step in traceback.extract_tb(error.__traceback__) if step.filename == "<program>"]
    text = "".join(traceback.format_exception_only(type(error), error)).strip()
    text = text.encode("utf-8", "backslashreplace").decode()
    return (f"line {lines[-1]}: " if lines and lines[-1] else "") + text


def attempt(program: str) -> tuple[str, str]:
    """Run the program to its end.

    Returns:
        The outcome (passed, failed, memory, not compiled) and a message.
    """
    try:
        code = compile(program, "<program>", "exec", dont_inherit=True)
    except BaseException as error:  # nested too deep for the compiler is an error of the program as well
        return "not compiled", last_line(error)
    space: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        exec(code, space)
    except MemoryError:
        return "memory", "the memory limit was reached"
    except SystemExit:
        return "failed", "the program ended itself before its last line"
    except BaseException as error:
        return "failed", last_line(error)
    return "passed", ""


REPORT = 2  # the file number of the report's pipe, set by main


def send(report: Callable[[bytes], object], **values: object) -> None:
    report(json.dumps(values).encode() + b"\n")


def main() -> None:
    global REPORT
    settings = json.loads(sys.argv[1])
    word, _, program = sys.stdin.buffer.read().partition(b"\n")
    secret, REPORT = word.decode(), settings["report"]
    sys.argv[1:] = []
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    if nothing:
        os.close(nothing)
    found = lock_in(settings)
    os.chdir(settings["folder"])
    pipe, write = REPORT, os.write
    send(lambda data: write(pipe, data), protections=sorted(found), secret=secret)
    outcome, message = attempt(program.decode())
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    send(lambda data: write(pipe, data), outcome=outcome, message=message[:MESSAGE_LIMIT], secret=secret)
    os._exit(0)


if __name__ == "__main__":
    main()
