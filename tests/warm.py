"""A script's process without its start: one that has imported the libraries, forked for each run.

Torch, Transformers and TRL take seconds to import, and the tests start the scripts two hundred
times. `run` gives what `subprocess.run([python, script, ...])` gives: a process of its own with its
arguments, directory, environment, output and exit code. What it shares with the others is what
importing has made. So nothing is warm whose libraries would be told something else while they are
imported (`Warm.suits`), and what a fresh start shows is left to the fixtures `pipeline` and
`embedded` and to the runs that are killed: those are started as a user starts them.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from liteguard.machine import QUIET  # noqa: E402

SCRIPTS = {
    *(ROOT / f"train_{stage}.py" for stage in ("domain", "instruction", "safety")),
    *(ROOT / f"{name}.py" for name in ("prepare_datasets", "compress_model", "evaluate_model")),
    *(ROOT / f"{name}.py" for name in ("chat", "publish", "plan")),
}
# What libraries ask for while they are imported; a token is asked for at each request.
ASKED = ("ACCELERATE_", "CUDA_", "DATASETS_", "HF_", "HUGGING", "LD_", "MKL_", "OMP_", "PYTHON")
ASKED += ("TORCH", "TRANSFORMERS_", "USE_")
NOT_ASKED = {*QUIET, "HF_TOKEN"}
NO_HUB = "http://127.0.0.1:9"  # nobody listens there


class Warm:
    """The process that is forked, for scripts that ask this model hub, or none."""

    def __init__(self, endpoint: str = NO_HUB, home: Path | None = None) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="warm")
        self.hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home or self.folder.name)}
        self.any_home = home is None  # an empty one is as good as another
        self.environment = dict(os.environ)
        self.lock = threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=self.environment | self.hub,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        _all.append(self)

    def suits(self, environment: Mapping[str, str]) -> bool:
        """Whether libraries imported with this environment would be the same."""
        own: Mapping[str, str] = self.environment | self.hub
        if self.any_home:
            if environment.get("HF_ENDPOINT", NO_HUB) != NO_HUB:
                return False
            environment = {**environment, **self.hub}
        asked = {name for name in (*environment, *own) if name.startswith(ASKED)} - NOT_ASKED
        return all(environment.get(name) == own.get(name) for name in asked)

    def run(
        self, command: list[str], cwd: Path, environment: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess:
        """A script from its start to its end."""
        assert self.process.stdin and self.process.stdout
        logs = [Path(self.folder.name, name) for name in ("out", "err")]
        request = {"command": command, "cwd": str(cwd), "logs": [str(log) for log in logs]}
        request["environment"] = {**environment, **self.hub}
        with self.lock:
            for log in logs:  # those of the last run may be open in what it has left
                log.unlink(missing_ok=True)
                log.touch()
            watch = threading.Timer(timeout, self.kill)
            watch.start()
            try:
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
                code = self.process.stdout.readline()
            finally:
                watch.cancel()
            texts = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
        assert code, f"{command} did not end in {timeout} s\n{texts[0]}\n{texts[1]}"
        return subprocess.CompletedProcess([sys.executable, *command], int(code), *texts)

    def kill(self) -> None:
        """End it with all that runs in it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        _all.remove(self)
        self.kill()
        self.process.communicate()
        self.folder.cleanup()


_all: list[Warm] = []


@atexit.register
def end_all() -> None:
    for warm in [*_all]:
        warm.end()


def run(
    command: list[str], cwd: Path, timeout: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess | None:
    """A script in a warm process; None where none suits it."""
    environment = os.environ if env is None else env
    if not any(warm.any_home for warm in _all):
        Warm()
    for warm in _all:
        if warm.suits(environment):
            return warm.run(command, cwd, environment, timeout)
    return None


def be(request: dict, answers: int) -> NoReturn:
    """Be the script of a request, and end as the interpreter does.

    But for taking apart every module, which would take longer than most of the runs.
    """
    os.close(answers)
    for number, path in enumerate((os.devnull, *request["logs"])):
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    script = request["command"][0]
    sys.argv = request["command"]
    sys.path[0] = str(Path(script).parent)
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """Import everything, then fork for each line of standard input and answer with exit codes."""
    answers = os.dup(1)
    os.dup2(2, 1)  # libraries print while they are imported
    from benchmarks.tiny_world import import_everything

    import_everything(os.environ["HF_ENDPOINT"])
    threads = {file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")}
    # Arrow's allocator starts its own again; no other thread survives a fork.
    assert len(threads - {"jemalloc_bg_thd"}) == 1, threads
    atexit.unregister(end_all)
    gc.collect()
    gc.freeze()
    while line := sys.stdin.readline():
        child = os.fork()
        if not child:
            be(json.loads(line), answers)
        _, status = os.waitpid(child, 0)
        os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    serve()
