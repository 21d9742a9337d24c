"""The two containers of a bundle: their bytes, what they say of themselves, what an app is told."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT
from mediapipe_bytes import MEMBERS

from liteguard.export import bundle, task_format
from liteguard.export.tokenizer import GUARD
from liteguard.prompts import Prompt
from liteguard.runtime.container import tflite_model

MEDIAPIPE = json.loads((ROOT / "tests/fixtures/mediapipe_bytes.json").read_text())


@pytest.mark.parametrize("case", MEDIAPIPE["cases"], ids=lambda case: case["user"][0][:8])
def test_metadata_is_what_mediapipe_writes(case):
    found = task_format.metadata(case["stop_tokens"], case["user"], case["model"])
    assert found.hex() == case["metadata"]


def test_a_task_is_the_zip_file_that_mediapipe_writes(tmp_path):
    task_format.write(tmp_path / "x.task", MEMBERS)
    assert (tmp_path / "x.task").read_bytes().hex() == MEDIAPIPE["zip"]


@pytest.mark.skipif(not importlib.util.find_spec("mediapipe"), reason="mediapipe is not installed")
def test_the_kept_bytes_are_those_of_the_mediapipe_that_is_installed():
    script = ROOT / "tests/mediapipe_bytes.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout) == MEDIAPIPE


def test_every_content_of_a_task_is_aligned(tmp_path, monkeypatch):
    """Also that of a member whose size needs 64 bits."""
    for limit in (zipfile.ZIP64_LIMIT, 4):
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
        for length in range(1, 9):
            path = tmp_path / f"{limit}_{length}.task"
            members = {"A": b"a" * length, **MEMBERS, "TOKENIZER_MODEL": b"b" * length}
            task_format.write(path, members)
            content = path.read_bytes()
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None
                for member in archive.infolist():
                    assert archive.read(member) == members[member.filename]
                    extra = content[member.header_offset + 28]
                    start = member.header_offset + 30 + len(member.filename) + extra
                    assert start % 4 == 0, (limit, length, member.filename)
            assert bytes(tflite_model(path)) == MEMBERS["TF_LITE_PREFILL_DECODE"]


def test_a_prompts_metadata_has_its_stops_and_guards_its_newlines():
    prompt = Prompt(system="Be kind.", end_token="<|end|>", pad_token="<|pad|>")
    found = bundle.task_metadata(prompt)
    for text in ["<|end|>", "<|endoftext|>", "Be kind.Instruct: "]:
        assert text.encode() in found
    assert f"{GUARD}\n".encode() in found, "the runtime strips an unguarded newline"
