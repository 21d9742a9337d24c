"""Runs whose libraries are imported already end, print and write as those of a fresh process."""

from __future__ import annotations

import os
import re
import signal

import pytest
import warm
from conftest import ROOT, run_script


@pytest.mark.parametrize(
    ("setting", "code"), [("data.seed=3", 0), ("data.seed=x", 2), ("data.cache_dir=a_file", 2)]
)
def test_a_warm_run_is_what_a_fresh_one_is(tiny_config, tmp_path, setting, code):
    command = (ROOT / "prepare_datasets.py", "--config", tiny_config, "--output", "data", "--set")
    found = []
    for fresh in (True, False):
        place = tmp_path / str(fresh)
        place.mkdir()
        (place / "a_file").touch()
        done = run_script(*command, setting, cwd=place, fresh=fresh)
        written = [path.read_bytes() for path in sorted((place / "data").rglob("*.jsonl"))]
        assert not [path for path in place.iterdir() if path.name.endswith(".lock")]
        # Seconds and numbers of processes differ.
        said = [re.sub(r"\d+(\.\d+)?", "N", text) for text in (done.stdout, done.stderr)]
        found.append((done.returncode, said, written))
    assert found[0] == found[1] and found[0][0] == code, found


ENDS = {
    "raise ValueError('a fault')": (1, "ValueError: a fault"),
    "raise SystemExit('said')": (1, "said"),
    "os.kill(os.getpid(), 9)": (-signal.SIGKILL, ""),
    "atexit.register(print, 'at exit', file=sys.stderr)": (0, "at exit"),
    "threading.Thread(target=lambda: (time.sleep(0.2), os.write(2, b'after'))).start()": (
        0,
        "after",
    ),
    "import torch; torch.manual_seed(1); assert torch.rand(1); os.write(2, b'torch')": (0, "torch"),
}


@pytest.mark.parametrize("code", ENDS)
def test_every_end_of_a_process(tmp_path, code):
    script = tmp_path / "script.py"
    script.write_text(f"import atexit, os, sys, threading, time\n{code}\n")
    done = run_script(script, cwd=tmp_path, fresh=False)
    wanted, said = ENDS[code]
    assert (done.returncode, done.stdout) == (wanted, "") and said in done.stderr


def test_what_would_be_imported_otherwise_is_started_afresh(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('torch' in sys.modules)\n")
    assert run_script(script, cwd=tmp_path, fresh=False).stdout == "True\n"
    assert run_script(script, cwd=tmp_path).stdout == "False\n"
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "OMP_NUM_THREADS"):
        own = {**os.environ, name: "3"}
        assert run_script(script, cwd=tmp_path, fresh=False, env=own).stdout == "False\n"
    assert warm.Warm.suits(warm._all[0], {**os.environ, "JUDGE_KEY": "3"})
