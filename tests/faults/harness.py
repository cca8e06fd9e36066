"""Faults and trials: a forked child does one action, and a fault meets it at a chosen file event.

The libraries are imported once, by the process that forks. faults.c sees what Rust and C++ write. Where no C compiler
is, Python's audit hooks stand in for it. They see every open and rename, and no single write.
"""
import contextlib
import ctypes
import errno
import hashlib
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).parent
BYTES, ROOM, NAME = 1, 2, 4                                     # kinds of events, as in faults.c
COUNT, KILL, HALF_KILL, FAIL, FULL, STOP = range(6)             # what happens at the chosen event, as in faults.c
TOO_LONG_S = 120                                                # a trial that takes longer hangs


@dataclass(frozen=True)
class Fault:
    """What happens at event number `at` (from 1) below `folder`, of the events of `kinds`.

    KILL: SIGKILL before the event. HALF_KILL: SIGKILL when half of a write is done. FAIL: the call fails once, with
    errno `number`. FULL: half of a write is done, and every call after it fails. STOP: SIGSTOP before the event.
    """
    folder: Path
    action: int = COUNT
    at: int = 0
    kinds: int = BYTES | ROOM | NAME
    number: int = errno.ENOSPC


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    kind: "done", "line" (what a user sees is one line), "traceback", "killed" or "hangs". text: the line or the error.
    value: what the action returned. printed: what it printed. events: a line for each event that was seen.
    """
    kind: str
    text: str = ""
    value: object = None
    printed: str = ""
    events: tuple[str, ...] = ()


# --- below Python ---------------------------------------------------------------------------------------------------

def restart_below_library(scratch: Path) -> None:
    """Starts this process again with faults.c below it. Where it cannot be compiled, it goes on as it is."""
    if "LOTA_FAULTS" in os.environ:
        return
    library = scratch / "faults.so"
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        os.environ["LOTA_FAULTS"] = ""
        return
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, HERE / "faults.c", "-ldl"], check=True)
    os.execve(sys.executable, [sys.executable, *sys.argv],
              {**os.environ, "LOTA_FAULTS": str(library), "LD_PRELOAD": str(library)})


def below_python() -> bool:
    """Whether faults.c is below this process."""
    return bool(os.environ.get("LOTA_FAULTS"))


def arm(fault: Fault, log: int) -> None:
    """The fault waits in this process from now on. log: a file descriptor that gets a line for each event."""
    if below_python():
        library = ctypes.CDLL(os.environ["LOTA_FAULTS"])
        library.faults_arm(os.fsencode(fault.folder), fault.action, fault.kinds, ctypes.c_long(fault.at), fault.number,
                           log)
    else:
        sys.addaudithook(AuditedFault(fault, log))


class AuditedFault:
    """The stand-in for faults.c: an audit hook that does the same, at the events that Python tells of."""

    def __init__(self, fault: Fault, log: int):
        self.fault, self.log, self.seen = fault, log, 0

    def __call__(self, event: str, arguments: tuple) -> None:
        fault = self.fault
        kind = NAME if event in ("os.rename", "os.remove", "os.rmdir") else ROOM if event in ("open", "os.mkdir") else 0
        if not kind & fault.kinds or not isinstance(arguments[0], str | bytes | os.PathLike) or (
                event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            return
        path = Path(os.fsdecode(arguments[0]))
        if not path.is_relative_to(fault.folder):
            return
        self.seen += 1
        os.write(self.log, f"{event} {path}\n".encode())
        if self.seen == fault.at or (self.seen > fault.at and fault.action == FULL):
            if fault.action in (KILL, HALF_KILL, STOP):
                os.kill(os.getpid(), signal.SIGSTOP if fault.action == STOP else signal.SIGKILL)
            elif fault.action in (FAIL, FULL):
                raise OSError(fault.number, os.strerror(fault.number), str(path))


# --- trials ---------------------------------------------------------------------------------------------------------

def outcome_of(action: Callable[[], object]) -> Outcome:
    """Does the action in this process, and ends as LoTA.run_script() would."""
    from LoTA import explain
    try:
        return Outcome("done", value=action())
    except BaseException as error:
        line = "stopped" if isinstance(error, KeyboardInterrupt) else explain(error)
        one = line is not None and len(line.splitlines()) == 1
        return Outcome("line", line) if one else Outcome("traceback", f"{type(error).__name__}: {error}"[:500])


class Trial:
    """A forked child that does `action`, and meets `fault`. scratch: a folder for its output."""

    def __init__(self, action: Callable[[], object], fault: Fault | None, scratch: Path):
        self.log, self.output = open(scratch / "events", "w+b"), scratch / "output"
        self.reads, writes = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            self._child(action, fault, writes)
        os.close(writes)

    def _child(self, action: Callable, fault: Fault | None, writes: int) -> None:
        """Never returns."""
        with open(self.output, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if fault:
            arm(fault, self.log.fileno())
        outcome = outcome_of(action)
        if fault and below_python():
            arm(replace(fault, action=COUNT), -1)
        try:
            sys.stdout.flush()
            with open(writes, "wb") as pipe:
                pipe.write(pickle.dumps(outcome))
        finally:
            os._exit(0)

    def stopped(self) -> bool:
        """Waits until the child has stopped at its event (True) or has ended (False)."""
        while True:
            found = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            return found.si_code == os.CLD_STOPPED

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def outcome(self) -> Outcome:
        """Waits for the end."""
        content, until, hangs = b"", time.time() + TOO_LONG_S, False
        while True:
            ready, _, _ = select.select([self.reads], [], [], max(0, until - time.time()))
            if not ready:
                hangs = True
                os.kill(self.pid, signal.SIGKILL)
            chunk = os.read(self.reads, 1 << 20)
            if not chunk:
                break
            content += chunk
        os.close(self.reads)
        _, status = os.waitpid(self.pid, 0)
        with contextlib.closing(self.log) as log:
            log.seek(0)
            events = tuple(log.read().decode().splitlines())
        if hangs:
            return Outcome("hangs", events=events)
        if os.WIFSIGNALED(status):
            killed = os.WTERMSIG(status) == signal.SIGKILL
            return Outcome("killed" if killed else "traceback", f"signal {os.WTERMSIG(status)}", events=events)
        return replace(pickle.loads(content), events=events, printed=self.output.read_text(errors="replace"))


def snapshot(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, str] | None:
    """{path: SHA-256} of all files below a folder, hidden ones too; None where there is no folder."""
    if not folder.exists():
        return None
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in leave_out}
