"""What this machine has free, and work in a process of its own that may be killed for memory."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TextIO

from liteguard import limits, shown, writing
from liteguard.errors import UserError, WorkError


def release_memory() -> None:
    """Give back what the last model took; glibc would keep it for a next one."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


# Libraries that print banners or reach out when imported; set before any of them is.
QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",  # TensorFlow announces it
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "BITSANDBYTES_NOWELCOME": "1",
    "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1",
    "GLOG_minloglevel": "3",
}


# What libraries warned of in this process, and how often: for a log (cli.run), not the screen.
heard: Counter[str] = Counter()
_OF_LIBRARIES = (FutureWarning, UserWarning, DeprecationWarning)


def quiet_libraries() -> None:
    """Keep notes of optional parts, and warnings that only a programmer can act on, off the screen.

    The warnings are kept in `heard`.
    """
    # In a log file, a bar is a line of thousands of characters.
    bars = {} if sys.stderr.isatty() else {"TQDM_DISABLE": "1"}
    os.environ.update({k: v for k, v in (QUIET | bars).items() if k not in os.environ})
    for category in _OF_LIBRARIES:
        warnings.filterwarnings("default", category=category)
    show = warnings.showwarning

    def hear(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, _OF_LIBRARIES):
            heard[f"{category.__name__}: {message} ({filename}:{lineno})"] += 1
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = hear
    for name in (
        "torchao",
        "torch.utils._pytree",
        "bitsandbytes",
        "httpx2",
        "huggingface_hub.repocard",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def one_at_a_time(lock: Path, told: bool = True) -> Iterator[None]:
    """One process after the other, so that what the first one makes is there for the others.

    The system drops the lock of a process that is killed; the file stays. Where a file system knows
    no locks nothing is held. Raises UserError for a pipe in its place, which cannot be locked.

    told: who has to wait says so, and for whom; it may be for hours.
    """
    writing.require_file(lock)
    with _open_lock(lock) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if told:
                print(f"waiting for {shown.visible(_owner(handle))}: it holds {lock}", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass
        _sign(handle)
        yield


def _open_lock(lock: Path) -> IO[str]:
    # No link is followed: the file that it names would be emptied.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    return os.fdopen(os.open(lock, flags, 0o644), "r+", encoding="utf-8", errors="replace")


def _owner(handle: IO[str]) -> str:
    return handle.read(200).strip() or "another process"


def _sign(handle: IO[str]) -> None:
    handle.seek(0)
    handle.truncate()
    handle.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}")
    handle.flush()


# Lock files that this process holds.
_claims: dict[Path, IO[str]] = {}


def claim(lock: Path, what: str) -> None:
    """Hold a lock file until `release`, or until this process ends, however it ends.

    Raises UserError, naming who holds it, when another process does: two commands would write
    `what` at once. Where a file system knows no locks nothing is held.
    """
    if lock in _claims:
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    writing.require_file(lock)
    while True:
        handle = _open_lock(lock)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(handle)
            handle.close()
            raise UserError(
                f"{what} is being made by {owner}. Wait for it or stop it, or choose another "
                "--output."
            ) from None
        except OSError:
            handle.close()
            return
        # Its last owner may have deleted it between our opening and our lock.
        with suppress(FileNotFoundError):
            if lock.stat().st_ino == os.fstat(handle.fileno()).st_ino:
                break
        handle.close()
    _sign(handle)
    _claims[lock] = handle
    atexit.register(release, lock)


def release(lock: Path) -> None:
    """Give up a `claim`, if it is held."""
    if handle := _claims.pop(lock, None):
        lock.unlink(missing_ok=True)
        handle.close()


def available_memory() -> int | None:
    """Bytes that a new process can use (free, cache and swap, within the control group's limit).

    None where the system does not say (not Linux).
    """
    return limits.available_memory()


def require_memory(needed: int, what: str, advice: str) -> None:
    """Raise UserError, with both numbers, where less than `needed` bytes are free.

    `what` begins the sentence, `advice` ends it: what lowers the need.
    """
    free = available_memory()
    if free is not None and free < needed:
        raise UserError(
            f"{what} needs about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB is free. "
            f"Close other programs, add swap, or use a larger machine{advice}"
        )


def peak_rss_gb() -> float:
    """Peak resident memory of this process in GB (10^9 bytes).

    Linux's own count of this program: `getrusage` would go on with the peak of the process that
    started it.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) * 1024 / 1e9, 3)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(limits.peak_memory(usage) / 1e9, 3)


def require_disk(directory: Path, needed: float) -> None:
    """`check_disk` of so many bytes before the work: UserError."""
    try:
        check_disk(directory, needed / 1e9)
    except WorkError as error:
        raise UserError(str(error)) from None


def check_disk(directory: Path, needed_gb: float) -> None:
    """Raise WorkError when the file system of `directory` has less than `needed_gb` free."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free / 1e9
    if free < needed_gb:
        raise WorkError(
            f"{existing} has {free:.1f} GB free; about {needed_gb:.1f} GB are needed. "
            "Free some space or choose another --output, then run the same command again."
        )


@contextlib.contextmanager
def freed_blocks_given_back() -> Iterator[None]:
    """While a model is loaded, give every freed block of a megabyte and more back to the system.

    glibc keeps blocks below 32 MB for the next that fits. Loading Phi-2 in NF4 frees a float32
    matrix of 26 MB for each that it keeps a small one of, so the holes do not fit any more and
    stay: between 0.7 and 4.5 GB, differently in each run. Afterwards glibc's own upper limit holds:
    a training step would pay for new pages otherwise.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # another C library
        yield
        return
    mmap_threshold = -3  # M_MMAP_THRESHOLD in malloc.h
    libc.mallopt(mmap_threshold, 1 << 20)
    try:
        yield
    finally:
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.malloc_trim(0)


def in_child(step: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a process of its own, whose memory is given back as a whole.

    Function, arguments and result must be picklable. An exception of the function is raised here.

    Raises WorkError, with the name of the step, when the process is killed: by the kernel, most
    often, because memory ran out.
    """
    # Forking a process whose libraries run threads can deadlock.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_start_child) as pool:
        try:
            with starting_children():
                future = pool.submit(function, *arguments)
            return future.result()
        except BrokenProcessPool:
            raise WorkError(
                f"step '{step}' was killed, most often because memory ran out. Close other "
                "programs or add swap, and run the same command again: finished steps are kept."
            ) from None


def _start_child() -> None:
    quiet_libraries()
    sys.stdout = shown.screen(sys.stdout)
    end_with_parent()


@contextlib.contextmanager
def starting_children() -> Iterator[None]:
    """Processes that are started here do not hear Ctrl-C, from their first moment on.

    It reaches the whole group. A child that hears it while it imports its libraries prints a
    traceback; the parent is the one that ends the others.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change what a signal does
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_with_parent() -> None:
    """Let a worker process end with its parent, which a killed parent cannot ask for."""

    def follow() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    # Ctrl-C reaches the whole group; the parent ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()


def die_with_parent() -> None:
    """Let this process, a program of its own, be killed when the one that started it ends.

    A killed parent cannot stop what it has started: a conversion would go on for minutes, and write
    into a directory that the next run works in.
    """
    parent = os.getppid()
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG in linux/prctl.h
    if os.getppid() != parent:  # it has ended before that
        os._exit(1)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hides what C++ code prints: LiteRT warns of every accelerator that a machine lacks.

    Failures still arrive as exceptions.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@functools.cache
def quiet_stderr_at_exit() -> None:
    """The same for what C++ code prints when the process has ended and tears it down."""

    def end() -> None:
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    # Registered once LiteRT is in use, so after what has to say something at the end.
    atexit.register(end)


def gpu_memory_gb() -> float:
    import torch

    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose behaviour the results depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
