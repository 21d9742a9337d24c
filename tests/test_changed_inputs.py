"""What was changed since it was made is refused or made again; pipes are never waited for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, STAGE_RECORD

from liteguard import checkpoints, hub, model_files, models, records, writing
from liteguard.config import SourceSection, build
from liteguard.data import preparation
from liteguard.data.files import local_files
from liteguard.errors import UserError
from liteguard.evaluation import comparison, results
from liteguard.evaluation.journal import Journal
from liteguard.prompts import Prompt
from liteguard.rows import load_split
from liteguard.training import tokens
from liteguard.training.stage import _follow_earlier_run, last_checkpoint, plan


@pytest.fixture
def data(tmp_path):
    """Prepared texts of one split, with their manifest."""
    place = tmp_path / "data"
    (place / "domain").mkdir(parents=True)
    rows = "".join(json.dumps({"text": f"The heart number {n}."}) + "\n" for n in range(3))
    (place / "domain/train.jsonl").write_text(rows)
    digest = checkpoints.sha256_file(place / "domain/train.jsonl")
    manifest = {"model_type": "tiny", "files": {"domain/train.jsonl": digest}}
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place


@pytest.fixture
def tokenized(data, tmp_path):
    """A function that gives the tokens of `data`, from the cache if they are there."""
    tokenizer = SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: "t"))
    config = build([("test", {"data": {"cache_dir": str(tmp_path / "cache")}})])
    calls = []

    def tokenize(rows):
        calls.append(len(rows))
        return [tokens.Tokenized([*row["text"].encode()], 0) for row in rows]

    def found():
        calls.clear()
        rows = tokens._cached(tokenizer, data, "domain/train.jsonl", config, tokenize, {})
        return np.array(rows.ids), bool(calls)

    return found


def test_rows_that_were_edited_are_refused_while_their_tokens_are_cached(data, tokenized):
    assert tokenized()[1] and not tokenized()[1], "the second time from the cache"
    file = data / "domain/train.jsonl"
    file.write_bytes(file.read_bytes().replace(b"heart", b"HEART"))
    with pytest.raises(UserError, match="was changed after it was prepared"):
        tokenized()
    with pytest.raises(UserError, match="was changed after it was prepared"):
        load_split(data, "domain", "train")
    file.unlink()
    with pytest.raises(UserError, match="is missing from the prepared data"):
        tokenized()


@pytest.mark.parametrize("name", ["ids.npy", "ends.npy", "about.json"])
def test_cached_tokens_that_were_edited_are_made_again(tmp_path, tokenized, name):
    wanted, _ = tokenized()
    file = next((tmp_path / "cache/tokens").glob(f"*/{name}"))
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)
    again, made = tokenized()
    assert made and (again == wanted).all()


def base(directory: Path, **values) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "config.json").write_text(json.dumps({"layer_norm_eps": 1e-5, **values}))
    return directory


def test_another_configuration_is_another_base_model(tmp_path):
    """Rotation, norms and heads are in config.json; who wrote it is not looked at."""
    same, other = base(tmp_path / "a", transformers_version="1"), base(tmp_path / "b", eps=0.5)
    identity = models.base_identity(str(same), None)
    base(tmp_path / "a", transformers_version="2", dtype="float16")
    assert models.base_identity(str(same), None) == identity
    changed = models.base_identity(str(other), None)
    assert changed != identity and changed.partition("+")[0] == identity.partition("+")[0]
    record = records.StageRecord(**STAGE_RECORD | {"base_identity": identity}, inputs={}, files={})
    checkpoints.require_same(tmp_path, record, Prompt(), identity, "a/base")
    with pytest.raises(UserError, match=r"another config\.json than it has now"):
        checkpoints.require_same(tmp_path, record, Prompt(), changed, "a/base")
    # A checkpoint of version 0.1 has the weights' hash alone.
    older = record.model_copy(update={"base_identity": identity.partition("+")[0]})
    checkpoints.require_same(tmp_path, older, Prompt(), changed, "a/base")
    assert not checkpoints.describe_changes({"base": older.base_identity}, {"base": changed})
    assert checkpoints.describe_changes({"base": identity}, {"base": changed})


@pytest.mark.parametrize("name", ["r", "lora_alpha", "use_rslora"])
def test_an_adapter_of_another_strength_is_refused(tmp_path, name):
    """Its configuration was edited, and its sha256 with it."""
    output = tmp_path / "out"
    work = checkpoints.open_work(output, {"stage": "domain"})
    (work / "adapter_model.safetensors").write_text("x")
    (work / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16}')
    files = ["adapter_model.safetensors", "adapter_config.json"]
    checkpoints.publish(work, output, {**STAGE_RECORD, "lora": {"r": 8, "lora_alpha": 16}}, files)
    assert checkpoints.read_stage(output).lora == {"r": 8, "lora_alpha": 16}
    config = output / "adapter_config.json"
    config.write_text(json.dumps({"r": 8, "lora_alpha": 16, name: 16_000}))
    record = json.loads((output / "stage.json").read_text())
    record["files"][config.name] = checkpoints.sha256_file(config)
    (output / "stage.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"{name}: (\d+|False) -> 16000"):
        checkpoints.read_stage(output)
    config.write_text("[]")
    record["files"][config.name] = checkpoints.sha256_file(config)
    (output / "stage.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="no JSON object"):
        checkpoints.read_stage(output)


def test_a_trainers_checkpoint_is_resumed_only_with_the_best_one(tmp_path):
    """Else the last step's adapter would be published under the best one's loss."""

    def save(step: int, best: int) -> Path:
        path = tmp_path / f"trainer/checkpoint-{step}"
        path.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (path / name).write_text("{}")
        named = str(tmp_path / f"elsewhere/checkpoint-{best}")
        (path / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": named}))
        return path

    first, second, third = save(1, 1), save(2, 2), save(3, 2)
    assert last_checkpoint(tmp_path) == third
    # Moved since: the trainer takes the path as it stands, and where it is none knows no best step.
    state = json.loads((third / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(second)
    (second / "adapter_model.safetensors").unlink()
    assert last_checkpoint(tmp_path) == first
    (third / "trainer_state.json").write_text("{")
    (second / "trainer_state.json").write_text('{"best_model_checkpoint": 2}')
    assert last_checkpoint(tmp_path) == first and not third.exists() and not second.exists()


ODD = [5, [1], [], {"a": 1}, True]


@pytest.mark.parametrize(
    "wrong",
    [{name: odd} for name in ("hub", "revision", "commit") for odd in ODD]
    + [{"hub": None}, {"hub": ""}, {"commit": None}],
)
def test_commits_of_a_damaged_record_are_not_followed(tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(hub, "_COMMITS", {})
    source = {"hub": "a/b", "revision": "main", "commit": "c" * 40}
    names = {"hub": "base_model", "revision": "base_asked", "commit": "base"}
    stage = {**STAGE_RECORD, "files": {}}

    def follow(source: dict) -> dict:
        hub._COMMITS.clear()
        checkpoints.write_json(tmp_path / "manifest.json", {"inputs": {"a": 1, "b": source}})
        inputs = {names[key]: value for key, value in source.items()}
        checkpoints.write_json(tmp_path / "stage.json", {**stage, "inputs": inputs})
        preparation.follow_earlier_run(tmp_path)
        _follow_earlier_run(tmp_path, overwrite=False)
        return hub._COMMITS

    assert {known.kind for known in follow(source)} == {"dataset", "model"}
    assert not follow(source | wrong)
    assert {known.revision for known in follow({**source, "revision": None})} == {None}
    del source["revision"]
    assert {known.revision for known in follow(source)} == {None}
    for inputs in ([], "x", None):
        hub._COMMITS.clear()
        checkpoints.write_json(tmp_path / "manifest.json", {"inputs": inputs})
        preparation.follow_earlier_run(tmp_path)
        assert not hub._COMMITS


def test_an_output_that_cannot_be_made_is_refused_by_a_dry_run_too(tmp_path, monkeypatch):
    """All of what a dry run looks at is in `plan`, which begins with the output."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    monkeypatch.setattr(models, "hub_model", lambda config: pytest.fail("looked further"))
    for name, said in (("link", "a symbolic link"), ("thesis", "not written by LiteGuard")):
        for stage, parent in (("domain", None), ("safety", tmp_path / "parent")):
            with pytest.raises(UserError, match=said):
                plan(stage, build([]), tmp_path / name, tmp_path / "data", parent)


def test_pipes_are_not_read(tmp_path):
    """Opening one would wait for somebody to write to it."""
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    for read in (
        lambda: records.read(records.Result, pipe),
        lambda: results.reuse(pipe, {}),
        lambda: comparison.read_results([str(pipe)], tmp_path),
        lambda: checkpoints.sha256_file(pipe),
        lambda: Journal(pipe, {}),
        lambda: local_files(SourceSection(dataset="plain_text", path=str(pipe))),
        lambda: writing.write_text(pipe, "x"),
        lambda: writing.write_text(Path("/dev/null"), "x"),
    ):
        with pytest.raises(UserError, match=r"pipe or a device|a link, a pipe|There is no result"):
            read()
    assert checkpoints.read_dict(pipe) is None
    place = base(tmp_path / "base")
    os.mkfifo(place / "tokenizer.json")
    with pytest.raises(UserError, match="a model is made of files"):
        model_files.check_base(place, False)


def test_names_that_are_too_long_are_found_before_the_work(tmp_path):
    for size in (241, 250, 255):
        with pytest.raises(UserError, match=f"a name of {size} bytes"):
            checkpoints.open_work(tmp_path / ("é" + "x" * (size - 2)), {"stage": "domain"})
    assert checkpoints.open_work(tmp_path / ("x" * 240), {"stage": "domain"})
    assert not [path for path in tmp_path.iterdir() if len(path.name) > 255]


def test_a_mount_point_is_no_output():
    for place in ("/proc", "/"):
        assert writing.is_mount(Path(place))
    assert not writing.is_mount(ROOT / "docs")
    with pytest.raises(UserError, match="is a mount point"):
        checkpoints.check_output(Path("/proc"), {})


STARTS_A_CHILD = """
import subprocess, sys, time
code = "from liteguard import machine; machine.die_with_parent(); print(1, flush=True); "
child = subprocess.Popen([sys.executable, "-c", code + "import time; time.sleep(60)"], stdout=-1)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_program_that_a_killed_one_has_started_ends():
    parent = subprocess.Popen(
        [sys.executable, "-c", STARTS_A_CHILD], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    state = Path(f"/proc/{child}/stat")
    for _ in range(200):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("it goes on without its parent")
