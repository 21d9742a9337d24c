"""Stage directories: complete or not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, STAGE_RECORD

from liteguard import checkpoints, machine
from liteguard.errors import UserError, WorkError
from liteguard.prompts import Prompt
from liteguard.records import BundleRecord, StageRecord


def make(tmp_path, text="weights"):
    output = tmp_path / "out"
    work = checkpoints.open_work(output, {"stage": "domain", "rate": 1})
    (work / "adapter_model.safetensors").write_text(text)
    (work / "trainer").mkdir()
    return output, work


def test_published_directory_is_complete_and_clean(tmp_path):
    output, work = make(tmp_path)
    checkpoints.publish(work, output, STAGE_RECORD, ["adapter_model.safetensors"])
    assert not work.exists()
    assert {p.name for p in output.iterdir()} == {"adapter_model.safetensors", "stage.json"}
    assert checkpoints.read_stage(output, "domain").inputs["rate"] == 1
    assert checkpoints.open_work(output, {"stage": "domain", "rate": 1}) is None


def test_a_missing_file_publishes_nothing(tmp_path):
    output, work = make(tmp_path)
    with pytest.raises(WorkError):
        checkpoints.publish(work, output, {"stage": "domain"}, ["curves.png"])
    assert not output.exists()


def test_other_inputs_are_named(tmp_path):
    output, work = make(tmp_path)
    checkpoints.publish(work, output, {"stage": "domain"}, ["adapter_model.safetensors"])
    with pytest.raises(UserError, match="rate: 1 -> 2"):
        checkpoints.open_work(output, {"stage": "domain", "rate": 2})
    assert checkpoints.open_work(output, {"stage": "domain", "rate": 2}, overwrite=True)


def test_overwriting_keeps_the_old_result_until_the_new_one_is_whole(tmp_path):
    output, work = make(tmp_path, "old")
    checkpoints.publish(work, output, {"stage": "domain"}, ["adapter_model.safetensors"])
    work = checkpoints.open_work(output, {"stage": "domain", "rate": 2}, overwrite=True)
    assert (output / "adapter_model.safetensors").read_text() == "old"
    (work / "adapter_model.safetensors").write_text("new")
    checkpoints.publish(work, output, {"stage": "domain"}, ["adapter_model.safetensors"])
    assert (output / "adapter_model.safetensors").read_text() == "new"


def test_overwriting_goes_on_where_a_kill_left_it(tmp_path):
    """The command with --overwrite is the one that an interrupted run is resumed with."""
    output, work = make(tmp_path, "old")
    checkpoints.publish(work, output, {"stage": "domain"}, ["adapter_model.safetensors"])
    changed = {"stage": "domain", "rate": 2}
    work = checkpoints.open_work(output, changed, overwrite=True)
    (work / "trainer").mkdir()
    assert (checkpoints.open_work(output, changed, overwrite=True) / "trainer").is_dir()
    changed["rate"] = 3
    assert not (checkpoints.open_work(output, changed, overwrite=True) / "trainer").exists()


def test_work_of_unknown_inputs_is_not_resumed(tmp_path):
    """A kill while it was being deleted can leave a trainer's checkpoint without inputs.json."""
    output, work = make(tmp_path)
    left = work / "left"
    left.mkdir()
    (work / checkpoints.INPUTS).unlink()
    assert checkpoints.open_work(output, {"stage": "domain"}) == work and not left.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_only_what_the_same_command_made_is_replaced(tmp_path, monkeypatch, overwrite):
    """Someone's directory, another stage, a file, a link, the directory one is in: all refused."""
    monkeypatch.chdir(tmp_path)
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    (tmp_path / "a.txt").write_text("mine")
    (tmp_path / "link").symlink_to(foreign)
    made, work = make(tmp_path)
    checkpoints.publish(work, made, {"stage": "domain"}, ["adapter_model.safetensors"])
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    places = ("thesis", "link", "a.txt", "a.txt/new", ".", "..", "", str(tmp_path), "../", "/")
    for place in places:
        with pytest.raises(UserError, match="left as it is"):
            checkpoints.open_work(Path(place), {"stage": "domain"}, overwrite)
    odd = ('{"files": {}, "inputs": "x"}', '{"files": {}, "inputs": [1]}', "[" * 100_000)
    for record in ("{", "{}", '{"files": {}}', "[]", '{"files": 5, "inputs": {"a": 1}}', *odd):
        (foreign / "stage.json").write_text(record)
        with pytest.raises(UserError, match="not written by LiteGuard"):
            checkpoints.open_work(foreign, {"stage": "domain"}, overwrite)
    (foreign / "stage.json").unlink()
    for record in ("stage.json", "manifest.json"):
        os.mkfifo(foreign / record)  # opening it would wait for a writer
        with pytest.raises(UserError, match="not written by LiteGuard"):
            checkpoints.open_work(foreign, {"stage": "domain"}, overwrite, record)
        (foreign / record).unlink()
    for inputs, record in (({"stage": "safety"}, "stage.json"), ({}, "manifest.json")):
        with pytest.raises(UserError, match="not by this command"):
            checkpoints.open_work(made, inputs, overwrite, record)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_pipe_in_the_place_of_a_lock_is_refused(tmp_path):
    os.mkfifo(tmp_path / ".out.lock")
    with pytest.raises(UserError, match=r"\.out\.lock is a directory, a pipe or a device"):
        checkpoints.open_work(tmp_path / "out", {"stage": "domain"})
    with pytest.raises(UserError, match="a pipe"), machine.one_at_a_time(tmp_path / ".out.lock"):
        pass


def test_a_damaged_output_of_ours_is_named_and_may_be_replaced(tmp_path):
    output, work = make(tmp_path)
    checkpoints.publish(work, output, {"stage": "domain"}, ["adapter_model.safetensors"])
    (output / "adapter_model.safetensors").write_text("cut")
    with pytest.raises(UserError, match="damaged"):
        checkpoints.open_work(output, {"stage": "domain", "rate": 1})
    assert checkpoints.open_work(output, {"stage": "domain", "rate": 1}, overwrite=True)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    checkpoints.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        checkpoints.write_json(path, {("a", 1): 2})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"files": ["adapter_model.safetensors"]}, "files: Input should be an object"),
        ({"base_identity": None}, "base_identity: Input should be a valid string"),
        ({"prompt": {"user_prefix": 3}}, "prompt.user_prefix: Input should be a valid string"),
        ({"config": "x"}, "config: Input should be an object"),
    ],
)
def test_a_record_of_another_shape_is_named_by_its_first_wrong_field(tmp_path, wrong, said):
    output, work = make(tmp_path)
    checkpoints.publish(work, output, STAGE_RECORD, ["adapter_model.safetensors"])
    path = output / checkpoints.RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(UserError) as error:
        checkpoints.read_stage(output, "domain")
    assert f"{path} is damaged" in str(error.value) and said in str(error.value)
    assert "python train_domain.py" in str(error.value), "the way on"
    for text in ("[]", "null", '"x"', "{", ""):
        path.write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            checkpoints.read_stage(output, "domain")


def test_a_bundles_record_of_the_first_version_still_names_its_base_and_adapter():
    old = {
        **{key: value for key, value in STAGE_RECORD.items() if key != "base_identity"},
        "stage": "bundle",
        "inputs": {"base": "commit:1", "adapter": "ab", "compress.kv_cache_length": 64},
        "files": {"x.task": "00"},
        "bytes": {"x.task": 1},
        "merge": {},
        "tokenizer": {},
        "export": {"kv_cache_length": 64},
        "quantize": {},
        "bundles": {},
    }
    record = BundleRecord.model_validate(old)
    assert (record.base_identity, record.parent_adapter_sha256) == ("commit:1", "ab")
    assert record.cache_length == 64


def test_another_base_or_prompt_is_refused_with_both_named(tmp_path):
    record = StageRecord(**STAGE_RECORD, inputs={}, files={})
    checkpoints.require_same(tmp_path, record, Prompt(), "commit:1", "a/base")
    checkpoints.require_same(tmp_path, record, Prompt())
    with pytest.raises(
        UserError, match=r"another base model \(a/base, commit:1.*\(b/base, commit:2"
    ):
        checkpoints.require_same(tmp_path, record, Prompt(), "commit:2", "b/base")
    with pytest.raises(UserError, match="user_prefix: 'Instruct: ' -> 'Q: '"):
        checkpoints.require_same(tmp_path, record, Prompt(user_prefix="Q: "))


HOLDING = """
import sys, time
from pathlib import Path
from liteguard import checkpoints, machine
checkpoints.open_work(Path(sys.argv[1]), {"stage": "domain"})
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_do_not_make_one_output(tmp_path):
    """The second is told who does; what a killed one held is free."""
    output = tmp_path / "out"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(output)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError) as error:
            checkpoints.open_work(output, {"stage": "domain"})
        assert f"{output} is being made by process {first.pid} on " in str(error.value)
        assert checkpoints.open_work(tmp_path / "another", {"stage": "domain"})
    finally:
        first.kill()
        first.wait()
    work = checkpoints.open_work(output, {"stage": "domain"})
    (work / "adapter_model.safetensors").write_text("x")
    checkpoints.publish(work, output, STAGE_RECORD, ["adapter_model.safetensors"])
    assert not (tmp_path / ".out.lock").exists(), "nothing is left beside a finished output"


def test_links_in_the_place_of_work_and_lock_are_not_followed(tmp_path):
    """Somebody may have planted them: what they lead to is neither emptied nor deleted."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("mine")
    (tmp_path / ".out.partial").symlink_to(victim)
    with pytest.raises(UserError, match=r"\.out\.partial is a symbolic link"):
        checkpoints.open_work(tmp_path / "out", {"stage": "domain"})
    (tmp_path / ".file.partial").write_text("mine")
    with pytest.raises(UserError, match=r"\.file\.partial is a file"):
        checkpoints.open_work(tmp_path / "file", {"stage": "domain"})
    assert (tmp_path / ".file.partial").read_text() == "mine"
    (tmp_path / ".other.lock").symlink_to(victim / "thesis.txt")
    with pytest.raises(OSError, match="symbolic link"):
        checkpoints.open_work(tmp_path / "other", {"stage": "domain"})
    assert (victim / "thesis.txt").read_text() == "mine"
    assert [path.name for path in victim.iterdir()] == ["thesis.txt"]


def test_who_waits_says_for_whom(tmp_path, capsys):
    lock, entered = tmp_path / "x.lock", threading.Event()

    def second() -> None:
        with machine.one_at_a_time(lock):
            entered.set()

    with machine.one_at_a_time(lock):
        thread = threading.Thread(target=second)
        thread.start()
        said, begin = "", time.monotonic()
        while "\n" not in said and time.monotonic() - begin < 20:
            time.sleep(0.01)
            said += capsys.readouterr().out
        assert not entered.is_set()
    thread.join(20)
    assert entered.is_set()
    assert said.startswith(f"waiting for process {os.getpid()} on ") and f"holds {lock}\n" in said


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "x.lock").symlink_to("victim")
    with pytest.raises(OSError, match="symbolic link"), machine.one_at_a_time(tmp_path / "x.lock"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"
