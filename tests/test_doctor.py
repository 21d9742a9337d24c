"""doctor.py: faked drivers, cards, limits, hubs and packages, and what is said of each."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

from liteguard import doctor, doctor_gpu, doctor_hub, doctor_packages, limits
from liteguard.training import stage

GB = 10**9
CARD = {"name": "A100", "capability": [8, 0], "free": 79 * GB, "total": 80 * GB}
TORCH = {"version": "2.13.0", "cuda": "13.0", "hip": None, "available": True, "devices": [CARD]}
TORCH |= {"cpu_bfloat16": True, "said": []}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nowhere/token")


def torch_lines(monkeypatch, torch, driver, card=True) -> list[doctor.Finding]:
    monkeypatch.setattr(doctor_gpu, "probe_torch", lambda: torch)
    monkeypatch.setattr(doctor_gpu, "find_driver", lambda: driver)
    monkeypatch.setattr(doctor_gpu, "card_is_there", lambda: card)
    return [*doctor.torch_and_gpu()]


NO_GPU = {"available": False, "devices": []}
NEW, OLD = doctor_gpu.Driver((13, 0), "580.65"), doctor_gpu.Driver((12, 4), "550.54.15")


@pytest.mark.parametrize(
    ("torch", "driver", "state", "said", "remedy"),
    [
        ({}, NEW, "ok", "CUDA 13.0 build; driver 580.65 (CUDA 13.0)", ""),
        # Today's silent case: PyPI's torch is CUDA 13, the driver knows 12.
        (NO_GPU, OLD, "missing", "driver 550.54.15 (CUDA 12.4) is older", "580 or newer for CUDA"),
        (NO_GPU | {"cuda": None}, OLD, "missing", "is the CPU build", "built for CUDA 12"),
        (NO_GPU | {"said": ["broken"]}, NEW, "missing", "finds no GPU, though", "nvidia-smi"),
        (NO_GPU, None, "missing", "no driver of it", "--gpus all"),
    ],
)
def test_the_build_of_torch_is_held_against_the_driver(
    monkeypatch, torch, driver, state, said, remedy
):
    first = torch_lines(monkeypatch, TORCH | torch, driver)[0]
    assert first.state == state and said in str(first) and remedy in first.remedy
    assert (first.remedy == "") == (state == "ok") and "\n" not in str(first)


def test_without_a_card_the_cpu_is_no_failure(monkeypatch):
    torch = TORCH | NO_GPU | {"cuda": None, "cpu_bfloat16": False}
    first, second = torch_lines(monkeypatch, torch, None, card=False)
    assert first.state == "ok" and "training on the CPU" in first.found
    assert second.state == "note" and "float32" in second.found and second.remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    first, *_ = torch_lines(monkeypatch, TORCH | NO_GPU, NEW)
    assert first.state == "note" and "CUDA_VISIBLE_DEVICES" in first.found


def test_every_gpu_has_a_line_with_its_memory_and_bfloat16(monkeypatch):
    old = {"name": "T4", "capability": [7, 5], "free": 15 * GB, "total": 16 * GB}
    busy = CARD | {"free": 10 * GB}
    lines = torch_lines(monkeypatch, TORCH | {"devices": [CARD, old, busy]}, NEW)
    assert [line.what for line in lines[1:]] == ["GPU 0", "GPU 1", "GPU 2", "several GPUs"]
    assert [line.state for line in lines[1:]] == ["ok", "note", "note", "note"]
    assert "79.0 of 80.0 GB free, bfloat16" in lines[1].found
    assert "no bfloat16" in lines[2].found and "nvidia-smi" in lines[3].remedy


# As builds of torch have them: the newest kind with PTX, or kinds of a family and of one GPU.
BUILT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("capability", "built_for", "lacks"),
    [
        ([8, 0], BUILT, ""),
        ([8, 9], BUILT, ""),  # by sm_86
        ([6, 1], BUILT, "an older CUDA"),
        ([7, 0], BUILT, "an older CUDA"),
        ([12, 0], BUILT[:4], "a newer CUDA"),
        ([12, 0], ["sm_90", "compute_90"], ""),
        ([8, 0], ["sm_90", "compute_90"], "an older CUDA"),
        ([9, 0], ["sm_90a"], ""),
        ([10, 3], ["sm_100a", "compute_100a"], "a newer CUDA"),
        ([10, 3], ["sm_100f"], ""),
        ([12, 0], ["compute_100f"], "a newer CUDA"),
        ([9, 0], ["gfx90a", "gfx942"], ""),
        ([9, 0], [], ""),
    ],
)
def test_a_gpu_that_torch_has_no_code_for_is_missing(monkeypatch, capability, built_for, lacks):
    """torch finds it and counts its memory; the first product ends the run."""
    card = CARD | {"capability": capability}
    lines = torch_lines(monkeypatch, TORCH | {"devices": [card], "built_for": built_for}, NEW)
    assert lines[0].state == "ok"
    assert (lines[1].state == "missing") == bool(lacks) and lacks in lines[1].remedy
    if lacks:
        assert f"sm_{capability[0]}{capability[1]}" in lines[1].found


def test_a_stage_says_that_its_gpu_cannot_compute(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: BUILT)
    stage.check_gpus("domain")
    assert "no code for a GPU of kind sm_61" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (8, 9))
    stage.check_gpus("domain")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("named", ["7", "GPU-of-another-machine"])
def test_a_card_that_is_asked_for_and_not_there_is_named(monkeypatch, named):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    first = torch_lines(monkeypatch, TORCH | NO_GPU, NEW)[0]
    assert first.state == "missing" and f"CUDA_VISIBLE_DEVICES='{named}' names no" in first.found
    assert "nvidia-smi -L" in first.remedy
    # What is wrong for every card comes first.
    assert "is older" in torch_lines(monkeypatch, TORCH | NO_GPU, OLD)[0].found


def test_torch_that_cannot_be_imported(monkeypatch):
    first, second = torch_lines(monkeypatch, {"error": "ImportError: libcudart.so.13"}, NEW)
    assert first.state == "missing" and "libcudart" in first.found
    assert "requirements-train.txt" in first.remedy and "580.65" in second.found


def test_a_probe_that_fails_says_why():
    assert "No such file" in doctor_gpu.probe_torch("/nowhere/python")["error"]


def test_a_stage_says_that_it_trains_without_the_gpu(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor_gpu, "find_driver", lambda: OLD)
    stage.check_gpus("domain")
    said = capsys.readouterr().out
    assert "CUDA 13.0" in said and "550.54.15" in said and "doctor.py" in said
    monkeypatch.setattr(doctor_gpu, "find_driver", lambda: None)
    monkeypatch.setattr(doctor_gpu, "card_is_there", lambda: False)
    stage.check_gpus("domain")
    assert capsys.readouterr().out == ""


def test_a_card_is_seen_without_its_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_gpu, "PCI", tmp_path)
    for name, vendor, kind in (("a", "0x8086", "0x030000"), ("b", "0x10de", "0x040300")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor)
        (tmp_path / name / "class").write_text(kind)
    assert not doctor_gpu.card_is_there()  # another maker's, and NVIDIA's sound
    (tmp_path / "b/class").write_text("0x030200\n")
    assert doctor_gpu.card_is_there()


@pytest.mark.parametrize(
    ("free", "group", "state", "remedy"),
    [
        (20, None, "ok", ""),
        (9, None, "note", "Phi-2 takes 13.8 GB: close programs"),
        (2, None, "missing", "add swap"),
        (2, 4, "missing", "raise the container's limit"),
    ],
)
def test_memory_is_what_the_container_allows(monkeypatch, free, group, state, remedy):
    monkeypatch.setattr(limits, "total_memory", lambda: 32 * GB)
    monkeypatch.setattr(limits, "available_memory", lambda: free * GB)
    groups = [(group * GB, GB)] if group else []
    monkeypatch.setattr(limits, "group_memory", lambda: groups)
    _, line = doctor.memory()
    assert line.state == state and remedy in line.remedy
    assert ("limit of 4.0 GB" in line.found) == bool(group)


def test_disk_and_cache(monkeypatch, tmp_path):
    free = {"now": 100}
    usage = doctor.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda _: type(usage)(*usage[:2], free["now"] * GB)
    )
    assert [each.state for each in doctor.disk(tmp_path, tmp_path / "no")] == ["ok", "ok"]
    (tmp_path / "a.whl").write_bytes(b"x" * 1000)
    free["now"] = 10
    first, second = doctor.disk(tmp_path, tmp_path)
    assert first.state == "note" and "1 packages" in second.found
    free["now"] = 1
    assert next(iter(doctor.disk(tmp_path, tmp_path))).state == "missing"

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    line = [*doctor.disk(tmp_path, tmp_path)][1]
    assert line.state == "missing" and "data.cache_dir" in line.remedy


# --- the hub --------------------------------------------------------------------------------------
@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine; `answers` maps a path to its status, `asked` what came."""
    answers, asked = {"/api/models": 200, "/api/whoami-v2": 200}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(answers[self.path])
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(doctor_hub, "endpoint", lambda: f"http://127.0.0.1:{server.server_port}")
    yield answers, asked
    server.shutdown()


def test_a_token_is_named_and_never_shown(hub, monkeypatch):
    answers, asked = hub
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    lines = [*doctor.hub(False, 3)]
    assert [line.state for line in lines] == ["ok", "ok"]
    assert "from HF_TOKEN, accepted" in lines[1].found
    assert asked == [("/api/models", None), ("/api/whoami-v2", "Bearer hf_secret")]
    answers["/api/whoami-v2"] = 401
    line = [*doctor.hub(False, 3)][1]
    assert line.state == "missing" and "refused" in line.found and "hf auth login" in line.remedy
    answers["/api/whoami-v2"] = 302  # another address does not get it
    lines += [line, *doctor.hub(False, 3)]
    assert not any("secret" in str(line) for line in lines)
    assert not any(path == "/elsewhere" for path, _ in asked)


def test_the_hub_is_asked_through_the_proxy(hub, monkeypatch):
    """The machine itself may reach nothing else. A proxy that refuses is no answer of a hub."""
    answers, asked = hub
    proxy = doctor_hub.endpoint()
    monkeypatch.setattr(doctor_hub, "endpoint", lambda: "http://hub.invalid")
    answers |= {f"http://hub.invalid{path}": code for path, code in [*answers.items()]}
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert [line.state for line in doctor.hub(False, 3)] == ["ok", "ok"]
    assert asked[-1] == ("http://hub.invalid/api/whoami-v2", "Bearer hf_secret")
    monkeypatch.setattr(doctor_hub, "endpoint", lambda: "https://hub.invalid")
    first, _ = doctor.hub(False, 3)
    assert first.state == "note" and "cannot be reached (Tunnel" in first.found


def test_offline_is_no_failure(monkeypatch):
    monkeypatch.setattr(doctor_hub, "endpoint", lambda: "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    lines = [*doctor.hub(False, 1), *doctor.hub(True, 1)]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines += doctor.hub(False, 1)
    assert {line.state for line in lines} == {"note", "ok"}
    assert "cannot be reached" in lines[0].found and "model.path" in lines[0].remedy
    assert "--offline" in lines[2].found and "HF_HUB_OFFLINE" in lines[4].found


# --- packages -------------------------------------------------------------------------------------
def test_every_requirement_has_an_import_that_is_tried():
    names = {name for file in doctor_packages.FILES for name in doctor_packages.requirements(file)}
    assert len(names) > 25
    assert set(doctor_packages.IMPORTS) <= names
    from importlib.util import find_spec

    for name in names:
        module = doctor_packages.statement(name).split()[1].split(".")[0]
        assert find_spec(module), f"{name}: {doctor_packages.statement(name)}"


def test_a_broken_a_wrong_and_a_missing_package(monkeypatch):
    wanted = {"PyYAML": "==6.0.3", "tqdm": "==0.1", "rensa": "==0.5.0", "not-there": "==1"}
    monkeypatch.setattr(doctor_packages, "requirements", lambda name: wanted)
    monkeypatch.setitem(doctor_packages.IMPORTS, "rensa", "raise ImportError('libgomp.so.1')")
    found = {line.what: line for line in doctor.packages("train")}
    assert found["import PyYAML"].state == "ok"
    assert found["import tqdm"].state == "note" and "tested is 0.1" in found["import tqdm"].found
    assert "ImportError: libgomp.so.1" in found["import rensa"].found
    assert found["import rensa"].state == found["import not-there"].state == "missing"
    assert "requirements-train.txt" in found["import not-there"].remedy


def test_a_statement_that_ends_its_process_is_named_and_the_rest_is_tried():
    statements = {"a": "import json", "b": "import os; os.abort()", "c": "import nothing_at_all"}
    found = doctor_packages.try_all(statements | {"d": "print('noise')"})
    assert found["a"] is None and found["d"] is None
    assert "signal 6" in found["b"] and "ModuleNotFoundError" in found["c"]
    slow = doctor_packages.try_all({"e": "import time; time.sleep(60)"}, seconds=1)
    assert "not finished" in slow["e"]
    assert "cannot be run" in doctor_packages.try_all({"g": "pass"}, "/nowhere/python")["g"]


def test_a_local_label_makes_no_other_version():
    assert doctor_packages.is_wanted("2.13.0+cpu", "==2.13.0")
    assert not doctor_packages.is_wanted("2.12.0", "==2.13.0")
    assert doctor_packages.is_wanted("2.24.0.dev1", ">=2.23.0.dev20261026")


def test_the_converters_entry_points(monkeypatch):
    monkeypatch.setattr(
        doctor_packages,
        "ENTRY_POINTS",
        {"export": "import json", "converter v2": "import no_tf", "quantiser": "import no_aeq"},
    )
    found = {line.what: line for line in doctor.converter()}
    assert found["converter: export"].state == "ok"
    assert found["converter: converter v2"].state == "note"
    assert found["converter: quantiser"].state == "missing"


# --- the script -----------------------------------------------------------------------------------
def run(*flags: str, block: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """doctor.py in a process where the modules `block` cannot be imported, without torch's probe
    and the packages' imports."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['doctor.py', *{flags!r}]\n"
        f"sys.modules.update(dict.fromkeys({block!r}))\n"
        "from liteguard import doctor_gpu, doctor_packages\n"
        f"doctor_gpu.probe_torch = lambda: {TORCH!r}\n"
        "doctor_gpu.find_driver = lambda: doctor_gpu.Driver((13, 0))\n"
        "doctor_packages.try_all = lambda s, *a, **k: dict.fromkeys(s)\n"
        "runpy.run_path('doctor.py', run_name='__main__')"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment
    )


def test_the_script_needs_nothing_installed_and_exits_with_0(tmp_path):
    blocked = ("pydantic", "yaml", "torch", "transformers", "numpy", "huggingface_hub")
    done = run("--cache", str(tmp_path), block=blocked)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.split()[0] in ("ok", "note") for line in lines[:-2])
    assert lines[-1].startswith("all that is needed can run")
    assert any("import tf-nightly" in line for line in lines)
    trained = run("--only", "train").stdout
    assert "import trl" in trained and "tf-nightly" not in trained and "converter" not in trained


def test_the_script_exits_with_1_and_names_what_is_missing(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    done = run("--only", "train", "--cache", str(file))
    assert done.returncode == 1
    assert f"missing: {file}" in done.stdout.splitlines()[-1]


def test_the_record_of_versions_is_read_in_another_environment():
    other = sys.executable.replace("/bin/", "/bin/./")
    found = doctor_packages._versions(["PyYAML", "not-there"], other)
    assert found == {"PyYAML": "6.0.3", "not-there": None}
    # A path that is wrong is said by the lines of the packages, not by a traceback.
    for wrong in ("/no/such/python", "/bin/false"):
        assert doctor_packages._versions(["PyYAML"], wrong) == {"PyYAML": None}
