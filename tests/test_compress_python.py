"""`compress.python`: the converter in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_requirements import pins

from liteguard import config
from liteguard.config import layers
from liteguard.errors import UserError
from liteguard.export import quantization, tflite


def environment(folder, modules: dict[str, str], body: str = "") -> str:
    """A Python with these packages (name -> file inside it); `body` runs in place of -m."""
    for name, inside in modules.items():
        file = folder / "site" / name / inside
        file.parent.mkdir(parents=True)
        (folder / "site" / name / "__init__.py").write_text("")
        file.write_text("def convert_mlir_bytecode(): pass\n" if name == "tensorflow" else "")
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\nif [ "$1" = -m ]; then\n{body or "exit 1"}\nexit 0\nfi\n'
        f'PYTHONPATH={folder / "site"} exec {os.path.realpath(sys.executable)} -S "$@"\n'
    )
    python.chmod(0o755)
    return str(python)


CONVERT = "lite/python/convert.py"


def test_the_converter_is_looked_for_in_the_named_environment(tmp_path):
    both = environment(tmp_path / "a", {"tensorflow": CONVERT, "litert_torch": "x.py"})
    assert tflite.choose_converter("auto", both) == "v2"
    old = environment(tmp_path / "b", {"tensorflow": "lite/other.py", "litert_torch": "x.py"})
    assert tflite.choose_converter("auto", old) == "v1"
    with pytest.raises(UserError, match="convert_mlir_bytecode"):
        tflite.choose_converter("v2", old)
    none = environment(tmp_path / "c", {"tensorflow": CONVERT})
    for python in (none, "/nowhere/python"):
        with pytest.raises(UserError, match="(?s)compress.python.*requirements-conv") as told:
            tflite.choose_converter("auto", python)
        assert python in str(told.value) and "Traceback" not in str(told.value)


def test_the_named_python_does_the_work(tmp_path, monkeypatch):
    """Both tasks, with the arguments that this one would get, and its files taken from it."""
    write = (
        f'printf "%s" "$3" > {tmp_path}/asked\n'
        f"folder=$({sys.executable} -c 'import json, sys; "
        'print(json.loads(sys.argv[1])["output_dir"])\' "$3")\n'
        'printf made > "$folder/model.tflite"\n'
        'printf \'{"file": "model.tflite", "peak_memory_bytes": 7}\' > "$folder/result.json"'
    )
    python = environment(tmp_path, {"tensorflow": CONVERT, "litert_torch": "x.py"}, write)
    monkeypatch.setattr(quantization, "custom_operators", lambda path: set())
    monkeypatch.setattr(quantization, "check_stored_once", lambda *_: {})
    monkeypatch.setattr(tflite, "_check", lambda *_: None)
    monkeypatch.setattr(tflite, "count_parameters", lambda _: (10, 8))
    (tmp_path / "config.json").write_text("{}")
    out = tmp_path / "out.tflite"
    named = {"python": python, "progress": None}
    found = tflite.export(tmp_path, out, check_resources=False, **named)
    assert found["converter"] == "v2" and found["peak_memory_bytes"] == 7
    asked = json.loads((tmp_path / "asked").read_text())
    assert asked["task"] == "export" and asked["use_v2"] and out.read_text() == "made"
    tflite.quantize(out, tmp_path / "small.tflite", "int8", tmp_path, **named)
    assert json.loads((tmp_path / "asked").read_text())["recipe"] == "int8"


def test_the_converters_set_stands_alone():
    """The child imports nothing that requirements-convert.txt does not bring."""
    brought = {"transformers", "torch", "safetensors", "numpy", "pydantic", "yaml", "google"}
    others = ("peft", "trl", "datasets", "bitsandbytes", "accelerate", "gguf", "rensa", "scipy")
    others += ("matplotlib", "mediapipe", "litert_lm", "sentencepiece", "requests", "tqdm")
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({others!r}))\n"
        "import liteguard.export.tflite, liteguard.export.quantization\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules if '_' != m[0]}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    third = {*done.stdout.split()} - {*sys.stdlib_module_names} - {*others}
    wanted = {name.lower().replace("pyyaml", "yaml") for name in pins("requirements-convert.txt")}
    known = brought | {name.replace("-", "_") for name in wanted} | {"liteguard"}
    known |= {
        "cython_runtime",
        "annotated_types",
        "typing_extensions",
        "typing_inspection",
        "pydantic_core",
    }
    assert third <= known, third - known


def test_a_record_never_names_the_interpreter():
    kept, left = layers.of_a_record({"compress": {"python": "/theirs/python"}})
    assert kept == {"compress": {}} and left == ["compress.python"]
    assert config.Config().compress.python is None
