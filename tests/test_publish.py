"""publish.py against a hub on 127.0.0.1: what goes up, what must not, and what is read back."""

from __future__ import annotations

import json
import os
import runpy
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from stub_hub import TOKEN, StubHub

from liteguard import checkpoints, cli, machine
from liteguard.config import Config
from liteguard.errors import UserError, WorkError
from liteguard.evaluation import card
from liteguard.publishing import package, upload
from liteguard.records import BundleRecord, StageRecord

NAME = "me/tiny"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stub, as huggingface_hub's endpoint in this process."""
    from huggingface_hub import constants

    found = StubHub()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    template = f"{found.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield found
    found.close()


def files_in(folder: Path) -> dict[str, Path]:
    """Something to upload: a small file and a large one."""
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return {name: folder / name for name in ("README.md", "model.safetensors")}


def publish(hub: StubHub, files: dict[str, Path], private: bool = False) -> str:
    """As publish.py does it; returns the commit."""
    own = upload.Hub(NAME)
    made, _ = own.prepare(private)
    commit = own.send(files, "a test")
    own.check(files, commit)
    if made and not private:
        own.open_to_all()
    return commit


# --- the upload -----------------------------------------------------------------------------------
def test_one_commit_that_is_private_until_it_was_read_back(hub, tmp_path):
    commit = publish(hub, files_in(tmp_path))
    repo = hub.repos["models", NAME]
    there = repo.commits[commit]
    assert there["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    assert there["README.md"].startswith(b"---\nlicense: mit")
    assert not repo.private and len(repo.commits) == 2
    paths = [request.path for request in hub.log]
    place = {
        key: next(n for n, p in enumerate(paths) if key in p) for key in ("commit/main", "sett")
    }
    read = max(n for n, path in enumerate(paths) if "paths-info" in path or "/resolve/" in path)
    assert place["commit/main"] < read < place["sett"], "public before it was read back"
    # The bytes of a large file go to an address that the hub gave: no token is sent there.
    assert [r.path for r in hub.log if not r.authorized and NAME in r.path] == []
    # Again: nothing has changed, so nothing is sent.
    assert publish(hub, files_in(tmp_path)) == commit and len(repo.commits) == 2


def test_a_private_repository_stays_private(hub, tmp_path):
    publish(hub, files_in(tmp_path), private=True)
    assert hub.repos["models", NAME].private
    publish(hub, files_in(tmp_path))  # without --private: one that was there is left as it is
    assert hub.repos["models", NAME].private
    # The script says so: an upload that broke off may have left it.
    assert upload.Hub(NAME).prepare(False) == (False, True)
    hub.repos["models", NAME].private = False
    with pytest.raises(UserError, match="is there and public"):
        publish(hub, files_in(tmp_path), private=True)


@pytest.mark.parametrize("name", ["README.md", "model.safetensors"])
def test_what_arrived_differently_is_never_shown(hub, tmp_path, name):
    hub.alters.add(name)
    with pytest.raises(WorkError, match=f"is not what is here: {name}"):
        publish(hub, files_in(tmp_path))
    assert hub.repos["models", NAME].private


@pytest.mark.parametrize(
    ("refuses", "kind", "says"),
    [
        ({"commit/main": 403}, UserError, "may not be written .HTTP 403.. Give a token"),
        ({"create": 500}, WorkError, "the hub has a failure"),
        ({"objects/": 400}, WorkError, "broke off"),
        ({"whoami": 401}, UserError, "HTTP 401"),
    ],
)
def test_a_hub_that_refuses(hub, tmp_path, refuses, kind, says):
    hub.refuses = refuses
    with pytest.raises(kind, match=says) as raised:
        publish(hub, files_in(tmp_path))
    assert TOKEN not in str(raised.value)
    assert ("models", NAME) not in hub.repos or hub.repos["models", NAME].private


def test_no_token_and_no_name(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="there is no token"):
        upload.Hub(NAME)
    for name in ("tiny", "a/b/c", "me/ti ny", "me/.."):
        with pytest.raises(UserError, match="--to"):
            upload.check_name(name)
    assert not hub.log


# --- the card -------------------------------------------------------------------------------------
def facts_of(**more) -> dict:
    final = {
        "perplexity": 20.5,
        "rouge1": 0.5411111,
        "refused_harmful": 0.86,
        "n": {"perplexity": 36, "rouge1": 32, "refused_harmful": 36},
        "sets": {"my set: <b>": {"kind": "harmful", "refused": 0.5, "n": {"refused": 10}}},
        "knowledge": {"medqa": {"accuracy": 0.25, "n": 40}},
    }
    facts = {"base_licence": "MIT", "base_model": "microsoft/phi-2", "manifest": None}
    return {**facts, "final": final, **more}


def test_metadata_are_what_a_hub_reads():
    text = card.front_matter(facts_of(), "bundle", "tiny")
    data = yaml.safe_load(text.strip().strip("-"))
    assert (data["license"], data["base_model"]) == ("mit", "microsoft/phi-2")
    assert (data["library_name"], data["pipeline_tag"]) == ("litert-lm", "text-generation")
    assert data["base_model_relation"] == "quantized"
    index = data["model-index"][0]
    assert index["name"] == "tiny"
    of_others, own, knowledge = index["results"]  # rows of other hands first
    assert {m["type"]: m["value"] for m in own["metrics"]}["rouge"] == 0.5411
    assert of_others["dataset"] == {"name": "my set: &lt;b&gt; (harmful)", "type": "my-set-b"}
    assert knowledge["metrics"][0]["name"].endswith("40 questions")
    tagged = card.front_matter(facts_of(), "bundle", "a<img src=x onerror=f()>")
    assert "<" not in tagged and "a&lt;img" in tagged
    # The hub's own client reads it the same way.
    from huggingface_hub import ModelCard

    read = ModelCard(text + "# A model").data
    assert {r.metric_type for r in read.eval_results} >= {"perplexity", "rouge", "refusal_rate"}
    nowhere = yaml.safe_load(
        card.front_matter(
            facts_of(base_model="my model", base_licence="Own terms 1"), "adapter", "t"
        )
        .strip()
        .strip("-")
    )
    assert "base_model" not in nowhere and nowhere["library_name"] == "peft"
    assert (nowhere["license"], nowhere["license_name"]) == ("other", "own-terms-1")
    for name in ROOT.glob("configs/*.yaml"):  # each shipped one is in the hub's list
        own = (
            yaml.safe_load(name.read_text(encoding="utf-8")).get("model", {}).get("licence", "MIT")
        )
        assert card.licence(own)["license"] in card.LICENCES, name
    assert card.licence("Apache License 2.0") == {"license": "apache-2.0"}
    assert card.hub_name("embedded:smollm2-135m-instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    with pytest.raises(UserError, match="is no number"):
        broken = facts_of()
        broken["final"]["perplexity"] = float("nan")
        card.front_matter(broken, "bundle", "tiny")


def test_a_stub_hub_accepts_the_card_and_refuses_another(hub):
    from huggingface_hub import ModelCard

    ModelCard(card.front_matter(facts_of(), "bundle", "tiny") + "# A model").validate()
    with pytest.raises(ValueError, match="license"):
        ModelCard("---\nlicense: mine\n---\n# A model").validate()


# --- what goes up ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def proven(pipeline) -> Path:
    """The pipeline's directory, as the current one."""
    before = Path.cwd()
    os.chdir(pipeline)
    yield pipeline
    os.chdir(before)


def package_of(kind: str, work: Path) -> dict[str, Path]:
    source = package.proven(Path("liteguard_tiny.task"), kind)
    facts = package.measured(source, Path("evaluation"))
    args = cli.parser("").parse_args([])
    config = cli.resolve_config(args, parent=source.stage_record or source.record)
    text = package.readme(source, facts, NAME)
    return package.collect(source, config, text, work, repository=NAME)


def test_a_bundle_goes_up_with_card_and_proof(proven, hub, tmp_path):
    files = package_of("bundle", tmp_path)
    wanted = {"README.md", "liteguard_tiny.task", "liteguard_tiny.task.json"}
    assert {*files} == wanted | {f"liteguard_tiny.{told}.json" for told in ("deploy", "gallery")}
    entry = json.loads(files["liteguard_tiny.gallery.json"].read_text())["models"][0]
    assert (entry["modelId"], entry["modelFile"]) == (NAME, "liteguard_tiny.task")
    assert "localModelFilePathOverride" not in entry, "it is fetched from there"
    text = files["README.md"].read_text()
    assert text.startswith("---\nlanguage: en\nlicense: mit\nbase_model: test/tiny-phi\n")
    assert "| perplexity |" in text.split("## Proof")[1] and "Not medical" not in text[:3]
    publish(hub, files)
    tree = hub.repos["models", NAME].commits[hub.repos["models", NAME].main]
    # Whoever fetches it can use it, and learns nothing of this machine.
    for name, content in tree.items():
        (tmp_path / name).write_bytes(content)
        if not name.endswith(".task"):
            assert str(proven).encode() not in content and b"/tiny_phi" not in content, name
    read = checkpoints.read_bundle(tmp_path / "liteguard_tiny.task")
    assert isinstance(read, BundleRecord) and read.verify.steps[0].passed


def test_an_adapter_goes_up_as_a_stage_that_can_be_read(proven, tmp_path):
    files = package_of("adapter", tmp_path)
    stage = tmp_path / "stage"
    stage.mkdir()
    for name, path in files.items():
        shutil.copy(path, stage / name)
        assert b"/tiny_phi" not in path.read_bytes(), name
    read = checkpoints.read_stage(stage, "safety")
    assert isinstance(read, StageRecord)
    settings = json.loads((stage / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "test/tiny-phi"
    assert json.loads((stage / "proof.json").read_text())["verify"]["steps"]
    assert "library_name: peft" in (stage / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"verify": None}, "has no proof"),
        ({"verify": {"steps": []}}, "has no steps"),
        ({"verify": {"steps": [{"step": "answers", "passed": False}]}}, "its proof: answers"),
        ({"files": {"liteguard_tiny.task": "0"}}, "is not the file that"),
        ({"parent_adapter_sha256": "0"}, "is not what .* was made from"),
    ],
)
def test_what_is_not_proven_never_goes_up(proven, tmp_path, change, says):
    bundle = tmp_path / "liteguard_tiny.task"
    bundle.symlink_to(proven / "liteguard_tiny.task")
    record = json.loads((proven / "liteguard_tiny.task.json").read_text())
    checkpoints.write_json(tmp_path / "liteguard_tiny.task.json", record | change)
    with pytest.raises(UserError, match=says):
        package.proven(bundle, "adapter")


def test_what_was_not_measured_never_goes_up(proven, tmp_path):
    source = package.proven(Path("liteguard_tiny.task"), "bundle")
    with pytest.raises(UserError, match="(?s)there is no result .* --bundle liteguard_tiny.task"):
        package.measured(source, tmp_path)
    result = json.loads((proven / "evaluation/bundle.json").read_text())
    result["inputs"]["model"] = {"liteguard_tiny.task": "0"}
    checkpoints.write_json(tmp_path / "bundle.json", result)
    with pytest.raises(UserError, match="is of other files"):
        package.measured(source, tmp_path)


def test_paths_of_this_machine_become_names():
    kept = {"path": "/home/me/data/x.jsonl", "hub": "owner/name", "n": 1, "text": "a / b"}
    assert package.without_places([kept]) == [{**kept, "path": "x.jsonl"}]
    folders = ["/home/me/clinic/", "../clinic/", "~/clinic", "C:\\me\\clinic\\"]
    assert package.without_places(folders) == ["clinic"] * 4
    assert package.without_places({"prompt": {"user_prefix": "/ask me"}})["prompt"] == {
        "user_prefix": "/ask me"
    }


def test_records_are_handed_out_without_rows_and_folders(tmp_path):
    """Only the bundle itself may have learned of them."""
    sources = ("clinic/oncology/jane.csv", "file:///home/me/clinic/x.csv", "./clinic/y.csv")
    config = {
        "data": {
            "domain": [{"dataset": "auto", "path": path} for path in sources],
            "preference": [{"dataset": "auto", "hub": "owner/name"}],
            "decontaminate": ["clinic/exam.jsonl", "medqa"],
        },
        "evaluate": {"sets": [{"name": "a", "path": "clinic/b.csv", "kind": "texts"}]},
    }
    rows = [{"prompt": "Does Jane have a rash?", "text": "Yes, Jane has.", "merged": "Jane? No."}]
    measured = {"agree": 0.9, "answers": rows}
    made = {
        **{"base_model": "a/base", "base_identity": "commit:1", "data_dir": "clinic/data/x"},
        **{"parent": "clinic/final", "prompt": {}, "inputs": {}, "config": config},
    }
    record = BundleRecord(
        **{**made, "stage": "bundle", "files": {"x.task": "0"}, "bytes": {"x.task": 3}},
        **{"merge": {}, "tokenizer": {}, "export": {"kv_cache_length": 1280}, "bundles": {}},
        quantize={"recipe": "int8"},
        verify={"steps": [], "float": measured, "bundle": measured},
    )
    stage = StageRecord(
        **{**made, "stage": "safety", "files": {}},
        config_sources={"domain.max_steps": "clinic/oncology/mine.yaml", "safety.beta": "--set"},
    )
    checkpoints.write_json(tmp_path / "adapter_config.json", {})
    work = tmp_path / "work"
    work.mkdir()
    for kind in ("bundle", "adapter"):
        source = package.Source(tmp_path / "x.task", record, kind, tmp_path, stage)
        files = package.collect(source, Config(), "the card", work, repository=NAME)
        for name, path in files.items():
            if work in path.parents:
                text = path.read_text()
                assert "Jane" not in text and "clinic" not in text, name
                assert "oncology" not in text and "file:" not in text, name
    kept = json.loads((work / "x.task.json").read_text())
    data = kept["config"]["data"]
    assert [row["path"] for row in data["domain"]] == ["jane.csv", "x.csv", "y.csv"]
    assert data["preference"][0]["hub"] == "owner/name"
    assert data["decontaminate"] == ["exam.jsonl", "medqa"]
    assert kept["verify"]["bundle"] == {"agree": 0.9} and kept["base_model"] == "a/base"
    assert record.to_dict()["verify"]["bundle"]["answers"] == rows, "the record here keeps them"
    assert json.loads((work / "stage.json").read_text())["config_sources"]["safety.beta"] == "--set"


def test_a_card_shows_no_place_and_no_row(proven, tmp_path):
    """Of data that are gone, or of a leak, the comparison here names both."""
    source = package.proven(Path("liteguard_tiny.task"), "bundle")
    row = "Does our patient Jane have a rash?"
    gone = [
        "/home/me/my clinic/data/instruction/train.jsonl (instruction stage)",
        "what an earlier my clinic/domain_checkpoint was trained on",
    ]
    for name in ("base", "bundle"):
        result = json.loads((proven / f"evaluation/{name}.json").read_text())
        leaks = {"found": 1, "measured": 1, "examples": [["questions", row]], "unchecked": gone}
        result["contamination"] |= leaks
        checkpoints.write_json(tmp_path / f"{name}.json", result)
    facts = package.measured(source, tmp_path)
    text = package.readme(source, facts, NAME)
    assert "my clinic" not in text and "/home" not in text and "Jane" not in text
    assert "train.jsonl (instruction stage)" in text and "1 of" in text
    assert "what an earlier domain" in text


def test_the_script_publishes_a_merged_model(proven, hub, monkeypatch, capsys):
    """Its list first, then the upload, in this process: torch is imported once."""
    monkeypatch.setattr(machine, "in_child", lambda step, work, *parts: work(*parts))
    script = runpy.run_path(str(ROOT / "publish.py"), run_name="publish")["main"]
    words = ["publish.py", "liteguard_tiny.task", "--to", NAME, "--what", "merged"]
    monkeypatch.setattr("sys.argv", [*words, "--dry_run"])
    script()
    out = capsys.readouterr().out
    assert "license: mit" in out and "would go up to me/tiny" in out and not hub.log
    monkeypatch.setattr("sys.argv", words)
    script()
    out = capsys.readouterr().out
    assert f"published by me: {hub.url}/me/tiny" in out and TOKEN not in out
    tree = hub.repos["models", NAME].commits[hub.repos["models", NAME].main]
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {*tree}
    assert "library_name: transformers" in tree["README.md"].decode()
    assert not [*proven.glob(".publish.*")], "left behind"
    monkeypatch.setattr("sys.argv", ["publish.py", "final_checkpoint", "--to", NAME])
    with pytest.raises(UserError, match="name a bundle"):
        script()
