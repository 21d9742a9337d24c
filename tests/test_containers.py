"""The two containers of a bundle: their bytes, what they say of themselves, what an app is told."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from mediapipe_bytes import MEMBERS

from liteguard.errors import UserError
from liteguard.export import apps, bundle, outputs, task_format
from liteguard.export.tokenizer import GUARD
from liteguard.prompts import Prompt
from liteguard.records import BundleRecord, Export, Proof
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


def test_both_containers_are_made_unless_one_is_asked_for():
    def names(*asked: str) -> list[str]:
        return [str(path) for path in outputs.containers(Path(asked[0]), *asked[1:])]

    assert names("a/x.task") == ["a/x.task", "a/x.litertlm"]
    assert names("x.litertlm") == ["x.litertlm", "x.task"], "what is named is proven whole"
    assert names("x.litertlm", "litertlm") == ["x.litertlm"]
    for wrong in (("x.bin",), ("x.task", "litertlm")):
        with pytest.raises(UserError, match="--output"):
            names(*wrong)


def record_of(*files: str, **more) -> BundleRecord:
    found = {
        "base_model": "a/base",
        "base_licence": "MIT",
        "files": dict.fromkeys(files, "0"),
        "bytes": {name: 10 + len(name) for name in files},
        "export": Export(kv_cache_length=1280, prefill_lengths=[1, 8, 64]),
        "quantize": {"recipe": "int8"},
        "bundles": {name: {"prompt_tokens": 5, "stop_tokens": {"<|end|>": 2}} for name in files},
        "prompt": Prompt(),
        "tokenizer": {"replaced": {}},
        "verify": Proof.model_validate({"runtime_cache_bytes": 216, "steps": []}),
    }
    return BundleRecord.model_construct(**(found | more))


def test_an_app_is_promised_what_a_conversation_can_hold():
    """LiteRT-LM refuses a message once fewer places are free than the shortest prefill has."""
    facts = apps.deployment(record_of("x.task", "x.litertlm"))
    assert facts["conversation_tokens"] == facts["context_length"] == 1280
    assert facts["runtime_cache_bytes"] == 216
    assert "1280 tokens" in facts["notes"]["end_of_cache"]
    older = Export(kv_cache_length=1280, prefill_lengths=[64, 256])
    assert apps.deployment(record_of("x.task", export=older))["conversation_tokens"] == 1217
    # What is said of system messages and of restored histories is about a .task.
    assert {"system_message", "restored_history"} <= {*facts["notes"]}
    assert "end token after each old answer" in facts["notes"]["restored_history"]
    other = apps.deployment(record_of("x.litertlm"))["notes"]
    assert not {"system_message", "restored_history"} & {*other}


def test_the_gallery_gets_one_greedy_model():
    entry = apps.gallery(record_of("x.task", "x.litertlm"))["models"][0]
    assert (entry["name"], entry["modelFile"], entry["sizeInBytes"]) == ("x", "x.litertlm", 20)
    assert entry["localModelFilePathOverride"] == "/data/local/tmp/x.litertlm"
    assert entry["defaultConfig"] == {
        "topK": 1,
        "topP": 1.0,
        "temperature": 0.0,
        "maxTokens": 1280,
        "accelerators": "cpu",
    }
    assert entry["taskTypes"] == ["llm_chat", "llm_prompt_lab"]
    assert apps.gallery(record_of("x.task"))["models"][0]["modelFile"] == "x.task"
    fetched = apps.gallery(record_of("x.task", "x.litertlm"), "x.task", "me/x")["models"][0]
    assert (fetched["modelFile"], fetched["modelId"]) == ("x.task", "me/x")
    assert "localModelFilePathOverride" not in fetched
