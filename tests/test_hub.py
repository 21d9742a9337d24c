"""Base model and data sets from a hub: a small one on 127.0.0.1 and the real hub client."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import warm
from conftest import ROOT, fail, succeed
from stub_hub import TOKEN, StubHub
from test_pipeline import kill_at, record

MODEL = "microsoft/phi-2"
TEXTBOOKS = "Medilora/us_medical_license_exam_textbooks_en"
QUESTIONS = "lavita/medical-qa-datasets"
MORE_QUESTIONS = "Malikeh1375/medical-question-answering-datasets"
PAIRS = "Julian2002/Medical-ChatBot-DPO"

# What makes the guide's commands small: rows, steps, lengths.
SMALL = {
    "model.quantization": "none",
    "data.decontaminate": "[]",
    "data.preference.1.limit": 300,
    "data.test_share": 0.2,
    "data.validation_share": 0.1,
    **{
        f"{stage}.{key}": value
        for stage in ("domain", "instruction", "safety")
        for key, value in {
            "max_steps": 4,
            "batch_size": 2,
            "gradient_accumulation": 1,
            "max_length": 512,
            "eval_steps": 2,
            "save_steps": 2,
            "max_eval_rows": 4,
            "logging_steps": 1,
        }.items()
    },
    "compress.prefill_lengths": "[64]",
    "compress.kv_cache_length": 128,
    "compress.verify.level": "none",
    "evaluate.perplexity_rows": 2,
    "evaluate.question_rows": 2,
    "evaluate.harmful_rows": 2,
    "evaluate.benign_rows": 2,
    "evaluate.knowledge_rows": 0,
    "evaluate.max_new_tokens": 8,
}
SETTINGS = [f for name, value in SMALL.items() for f in ("--set", f"{name}={value}")]


def parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def data_sets(sources: Path) -> dict[str, dict[str, bytes]]:
    """The four data sets of configs/phi-2.yaml with made-up rows, in the layouts that they have."""

    def read(name: str) -> list[dict]:
        return [json.loads(line) for line in (sources / name).read_text().splitlines()]

    texts = [row["body"] for row in read("domain.jsonl")]
    role = "If you are a doctor, please answer the medical questions."
    questions = [
        {"instruction": role, "input": row["prompt"], "output": row["completion"]}
        for row in read("questions.jsonl")
    ]
    pairs = [
        {k: row[k] for k in ("prompt", "chosen", "rejected")} for row in read("preferences.jsonl")
    ]
    card = """---
license: mit
configs:
- config_name: all-processed
  data_files:
  - split: train
    path: {path}
- config_name: another
  data_files:
  - split: train
    path: another/*
---
Made-up rows.
"""
    wrong = [{"instruction": role, "input": "From another configuration?", "output": "Yes, it is."}]
    table = io.BytesIO()
    pyarrow.csv.write_csv(pyarrow.Table.from_pylist(questions[200:]), table)
    return {
        TEXTBOOKS: {
            "README.md": b"---\nlicense: mit\n---\nMade-up texts.\n",
            "Anatomy_Basics.txt": "\n".join(texts[:200]).encode(),
            "Physiology_Basics.txt": "\n".join(texts[200:]).encode(),
        },
        QUESTIONS: {
            "README.md": card.format(path="all-processed/train-*").encode(),
            "all-processed/train-00000-of-00002-aa.parquet": parquet(questions[:100]),
            "all-processed/train-00001-of-00002-bb.parquet": parquet(questions[100:200]),
            "another/train-00000-of-00001-cc.parquet": parquet(wrong),
        },
        MORE_QUESTIONS: {
            "README.md": card.format(path="all-processed.csv").encode(),
            "all-processed.csv": table.getvalue(),
            "another/train.csv": b"instruction,input,output\na,b,c\n",
        },
        PAIRS: {"README.md": b"Made-up pairs.\n", "train.jsonl": lines(pairs)},
    }


@pytest.fixture(scope="module")
def contents(tiny_phi, tiny_data) -> dict[tuple[str, str], dict[str, bytes]]:
    """(kind, name) -> files of the Phi path's base model and data sets."""
    model = {file.name: file.read_bytes() for file in tiny_phi.iterdir()}
    # What a repository has beside, and nobody needs here.
    model |= {"pytorch_model.bin": b"pickled", "consolidated.safetensors": b"twice"}
    model |= {"onnx/config.json": b"{}", "modeling_phi.py": b"raise SystemExit(9)"}
    sets = {("datasets", name): files for name, files in data_sets(tiny_data).items()}
    return {("models", MODEL): model, **sets}


def fill(server: StubHub, contents: dict[tuple[str, str], dict[str, bytes]]) -> StubHub:
    server.reset()
    for (kind, name), files in contents.items():
        server.add(kind, name, files)
    return server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of every `hub`, with one warm process: its home is a link to that of each run."""
    found, link = StubHub(), tmp_path_factory.mktemp("homes") / "home"
    process = warm.Warm(found.url, link)
    HOMES[found] = link
    yield found
    process.end()
    found.close()


@pytest.fixture
def hub(server, contents):
    """A hub of a test's own, to switch faults on."""
    return fill(server, contents)


HOMES: dict[StubHub, Path] = {}


def environment(hub: StubHub, home: Path, **more: str) -> dict[str, str]:
    """A user's environment with this hub and an own cache, and no settings of the machine's."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSF"))}
    if hub in HOMES and "HF_HUB_OFFLINE" not in more:
        HOMES[hub].unlink(missing_ok=True)
        HOMES[hub].symlink_to(home, target_is_directory=True)
        home = HOMES[hub]
    return {**clean, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), **more}


def next_command(printed: str) -> list[str]:
    """The command that a script says to run next."""
    (line,) = [s for s in printed.splitlines() if s.startswith("next: python ")]
    script, *arguments = shlex.split(line.removeprefix("next: python "))
    return [str(ROOT / script), *arguments]


@pytest.fixture(scope="module")
def guide(contents, tmp_path_factory):
    """The guide's six commands, each the one that the step before said; only `--set` is added.

    Stage 1 is killed after its first checkpoint, and then everything upstream changes.
    """
    work = tmp_path_factory.mktemp("guide")
    hub = fill(StubHub(), contents)
    env = environment(hub, work / "hf")
    process = warm.Warm(hub.url, work / "hf")
    start = [str(ROOT / "prepare_datasets.py"), "--model_type", "phi2", *SETTINGS]
    logs = {"data": succeed(*start, cwd=work, env=env)}
    command = [*next_command(logs["data"]), "--rank", "8", *SETTINGS]
    kill_at("domain 3/4", command, work, env)
    assert (work / ".domain_checkpoint.partial/trainer/checkpoint-2").is_dir()
    commits = {name: repo.main for (_, name), repo in hub.repos.items()}
    other = contents["models", MODEL]["config.json"].replace(b"gelu_new", b"relu")
    for repo in hub.repos.values():
        repo.commit({"config.json": other, "new.txt": b"New.\n"})
    before = len(hub.log)
    for step in ("domain", "instruction", "safety", "bundle", "evaluation", "comparison"):
        logs[step] = succeed(*command, cwd=work, env=env)
        if step != "comparison":
            command = next_command(logs[step])
    yield SimpleNamespace(
        work=work, hub=hub, env=env, logs=logs, commits=commits, before=before, start=start
    )
    process.end()
    hub.close()


def test_the_guide_runs_from_the_hub_and_its_next_lines_lead_through_it(guide):
    assert "resuming from checkpoint-2" in guide.logs["domain"]
    assert (guide.work / "liteguard_phi2.task").is_file()
    assert (guide.work / "evaluation/report.html").is_file()
    assert "Bundle" in guide.logs["comparison"]
    assert not any("%|" in printed for printed in guide.logs.values())


def test_a_new_commit_upstream_changes_nothing(guide):
    commit = guide.commits[MODEL]
    for name in ("domain_checkpoint", "instruction_checkpoint", "final_checkpoint"):
        found = record(guide.work / name)
        assert found["base_revision"] == commit
        assert found["base_identity"] == found["inputs"]["base"] == f"commit:{commit}"
        adapter = json.loads((guide.work / name / "adapter_config.json").read_text())
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == (MODEL, commit)
    bundle = json.loads((guide.work / "liteguard_phi2.task.json").read_text())
    assert bundle["base_revision"] == commit and bundle["inputs"]["base"] == f"commit:{commit}"
    # One question about main; nothing at all was asked after the resumed stage 1 began.
    asked = [r.path for r in guide.hub.log if r.path == f"/api/models/{MODEL}"]
    assert len(asked) == 1
    assert guide.hub.log[guide.before :] == []
    (snapshot,) = (guide.work / "hf/hub/models--microsoft--phi-2/snapshots").iterdir()
    assert snapshot.name == commit
    wanted = {"config.json", "generation_config.json", "model.safetensors"}
    assert {f.name for f in snapshot.iterdir()} == wanted | {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_data_sets_come_in_their_layouts_at_one_commit(guide):
    manifest = json.loads((guide.work / "data/phi2/manifest.json").read_text())
    read = {e["hub"]: (e["revision"], e["rows_read"]) for e in manifest["sources"] if e["hub"]}
    rows = {TEXTBOOKS: 400, QUESTIONS: 200, MORE_QUESTIONS: 200, PAIRS: 800}
    assert read == {name: (guide.commits[name], count) for name, count in rows.items()}
    texts = "".join(f.read_text() for f in (guide.work / "data/phi2").rglob("*.jsonl"))
    assert "another configuration" not in texts
    # Run again, it reuses them, although there is something newer.
    assert "reused" in succeed(*guide.start, cwd=guide.work, env=guide.env)
    assert guide.hub.log[guide.before :] == []


def test_everything_goes_on_offline_with_a_full_cache(guide, tmp_path):
    env = {**guide.env, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    # Nothing recorded here says which commit main is: the cache does.
    shown = succeed(*MEASURE, cwd=guide.work, env=env)
    assert f"{MODEL}: commit {guide.commits[MODEL]}" in shown and "would measure: base" in shown
    # Rows that were cleaned before are there without the hub.
    anew = succeed(*guide.start, "--output", tmp_path / "data", cwd=guide.work, env=env)
    assert anew.count("(from the cache)") == 5


def test_a_later_command_uses_the_recorded_commit_or_refuses_another(guide, tmp_path):
    # The flag finds the YAML again, and the commit is still that of the checkpoint.
    measure = [*MEASURE, "--checkpoint", "final_checkpoint"]
    shown = succeed(*measure, cwd=guide.work, env=guide.env)
    assert "would measure: base, final" in shown and "commit" not in shown
    other = guide.hub.repos["models", MODEL].main
    named = ["--set", f"model.revision={other}"]
    message = fail(2, *measure, *named, cwd=guide.work, env={**guide.env, "HF_HOME": str(tmp_path)})
    assert "final_checkpoint was trained on another base model" in message


# --- one command, one message ---------------------------------------------------------------------

PREPARE = [str(ROOT / "prepare_datasets.py"), "--model_type", "phi2", *SETTINGS]
PREPARE += ["--set", f"data.preference=[{{dataset: preference, hub: {PAIRS}}}]"]
MEASURE = [str(ROOT / "evaluate_model.py"), "--base", "--model_type", "phi2", "--dry_run"]
MEASURE += ["--set", "evaluate.knowledge_rows=0"]
# The client's waits between retries add up to minutes; here they take no time.
NO_WAITS = """
import os, runpy, sys, time
sleep = time.sleep
for module in [*sys.modules.values()]:  # some have it under a name of their own
    for name, value in [*getattr(module, "__dict__", {}).items()]:
        if value is sleep and module.__name__ != "__main__":
            setattr(module, name, lambda seconds: None)
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def refused(code: int, hub: StubHub, home: Path, *command: str, **more: str) -> str:
    """The one message of a command that must fail."""
    env = environment(hub, home, **more)
    driver = home / "no_waits.py"
    driver.write_text(NO_WAITS)
    message = fail(code, driver, *command, cwd=home, env=env, fresh=False)
    assert message.count("error: ") == 1 and TOKEN not in message
    return message.partition("error: ")[2]


def test_a_repository_that_may_not_be_read(hub, tmp_path):
    repo, train = hub.repos["models", MODEL], [str(ROOT / "train_domain.py"), "--model", MODEL]
    repo.private = True
    message = refused(2, hub, tmp_path, *train)
    assert "or it is private. No token was sent." in message and "HF_TOKEN" in message
    wrong = "hf_another_made_up_token"
    message = refused(2, hub, tmp_path, *train, HF_TOKEN=wrong)
    assert "The token that was sent" in message and wrong not in message
    del hub.repos["models", MODEL]
    message = refused(2, hub, tmp_path, *train, HF_TOKEN=TOKEN)
    assert f"'{MODEL}' is not on {hub.url}" in message and "Check the name" in message


def test_nothing_large_is_downloaded_before_the_data_are_there(hub, tmp_path):
    message = refused(2, hub, tmp_path, str(ROOT / "train_domain.py"), "--model", MODEL)
    assert "No prepared data in data/phi2" in message and "prepare_datasets.py" in message
    assert not any("/resolve/" in r.path for r in hub.log)


def test_a_gated_model_names_the_page_where_access_is_given(hub, tmp_path):
    hub.repos["models", MODEL].gated = True
    message = refused(2, hub, tmp_path, *MEASURE)
    assert "is gated" in message and f"{hub.url}/{MODEL}" in message and "No token" in message


def test_with_a_token_a_private_gated_model_and_data_set_come(guide, hub, tmp_path):
    for repo in hub.repos.values():
        repo.private = repo.gated = True
    env = environment(hub, tmp_path, HF_TOKEN=TOKEN)
    shown = succeed(*MEASURE, "--data", guide.work / "data/phi2", cwd=tmp_path, env=env)
    shown += succeed(*PREPARE, cwd=tmp_path, env=env)
    assert "downloading" in shown and "would measure" in shown and "400 usable" in shown
    assert TOKEN not in shown and all(r.authorized for r in hub.log)


def test_a_revision_is_resolved_to_its_commit(guide, hub, tmp_path):
    repo = hub.repos["models", MODEL]
    repo.tags["v1"] = repo.main
    repo.commit({"config.json": b"{}"})
    command = [*MEASURE, "--data", str(guide.work / "data/phi2"), "--set"]
    shown = succeed(*command, "model.revision=v1", cwd=tmp_path, env=environment(hub, tmp_path))
    assert f"{MODEL}: commit {repo.tags['v1']}" in shown
    message = refused(2, hub, tmp_path, *command, "model.revision=v9")
    assert "has no revision 'v9'" in message and "Allowed: a branch, a tag or a commit" in message


@pytest.mark.parametrize(("status", "said"), [(429, "too many requests (429)"), (503, "failure")])
def test_a_hub_in_trouble_is_not_the_users_mistake(hub, tmp_path, status, said):
    hub.status = status
    message = refused(1, hub, tmp_path, *MEASURE)
    assert said in message and "Run the same command again" in message


def test_a_broken_download_goes_on_with_what_is_there(guide, hub, tmp_path):
    command = [*MEASURE, "--data", str(guide.work / "data/phi2")]
    hub.broken = {"model.safetensors"}
    message = refused(1, hub, tmp_path, *command)
    assert "The download of the base model" in message and "broke off" in message
    assert "Run the same command again" in message
    # Without the hub, what is there is not taken for a whole model.
    message = refused(2, hub, tmp_path, *command, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in message and "not whole" in message
    hub.broken = set()
    before = len(hub.log)
    succeed(*command, cwd=tmp_path, env=environment(hub, tmp_path))
    fetched = [r.path.rsplit("/", 1)[1] for r in hub.log[before:] if "/resolve/" in r.path]
    assert set(fetched) == {"model.safetensors"}


def test_pickled_weights_are_refused_before_they_are_downloaded(hub, tmp_path):
    (commit,) = hub.repos["models", MODEL].commits.values()
    for name in [name for name in commit if name.endswith(".safetensors")]:
        del commit[name]
    message = refused(2, hub, tmp_path, *MEASURE)
    assert "holds no .safetensors file, only pytorch_model.bin" in message
    assert "model.revision=" in message and "model.path=" in message
    assert not any("/resolve/" in r.path for r in hub.log)
    commit.pop("config.json")
    assert "has no config.json" in refused(2, hub, tmp_path, *MEASURE)


def test_offline_with_an_empty_cache_says_so(hub, tmp_path):
    for command in (MEASURE, PREPARE):
        message = refused(2, hub, tmp_path, *command, HF_HUB_OFFLINE="1")
        assert "HF_HUB_OFFLINE is set" in message and str(tmp_path / "hub") in message
        assert "without HF_HUB_OFFLINE" in message and "--model_type smollm2" in message
    assert hub.log == []


def test_a_cache_that_another_program_filled_is_enough_offline(guide, hub, tmp_path):
    """An older client keeps no list of files; a part of sharded weights is found missing anyway."""
    shutil.copytree(guide.work / "hf", tmp_path / "hf", symlinks=True)
    cache = tmp_path / "hf/hub/models--microsoft--phi-2"
    shutil.rmtree(cache / "trees")
    snapshot = cache / "snapshots" / guide.commits[MODEL]
    env = environment(hub, tmp_path / "hf", HF_HUB_OFFLINE="1")
    succeed(*MEASURE, "--data", guide.work / "data/phi2", cwd=tmp_path, env=env)
    index = {"weight_map": {"lm_head.bias": "model-00002-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(2, hub, tmp_path / "hf", *MEASURE, HF_HUB_OFFLINE="1")
    assert "is incomplete" in message and "model-00002-of-00002.safetensors" in message
    assert hub.log == []


def test_a_data_set_that_cannot_be_read(hub, tmp_path):
    repo = hub.repos["datasets", TEXTBOOKS]
    repo.gated = True
    message = refused(2, hub, tmp_path, *PREPARE)
    assert f"the dataset '{TEXTBOOKS}' is gated" in message
    assert f"{hub.url}/datasets/{TEXTBOOKS}" in message
    repo.private = True
    # A dry run finds it out as well.
    assert "or it is private" in refused(2, hub, tmp_path, *PREPARE, "--dry_run")
    repo.private = repo.gated = False
    command = [*PREPARE, "--set", "data.domain.0.revision=v9"]
    assert "has no revision 'v9'" in refused(2, hub, tmp_path, *command)
    command = [*PREPARE, "--set", "data.instruction.0.config_name=all"]
    message = refused(2, hub, tmp_path, *command)
    assert "config_name 'all'" in message and "all-processed" in message
    hub.status = 429
    assert "too many requests" in refused(1, hub, tmp_path, *PREPARE)


def test_a_data_set_that_breaks_off_is_read_again_from_its_beginning(hub, tmp_path):
    hub.broken = {"train.jsonl"}
    message = refused(1, hub, tmp_path, *PREPARE)
    assert f"The reading of the dataset '{PAIRS}' broke off" in message
    assert not (tmp_path / "data/phi2").exists()
    hub.broken = set()
    shown = succeed(*PREPARE, cwd=tmp_path, env=environment(hub, tmp_path))
    assert shown.count("(from the cache)") == 3 and "800 rows read" in shown


def test_weights_in_their_makers_own_layout_are_no_base_model():
    """They end in .safetensors, and would be left out of the download: nothing to load after it."""
    from liteguard import hub
    from liteguard.errors import UserError

    repository = hub.Repository("model", "a/model")
    own = ["config.json", "consolidated.safetensors"]
    with pytest.raises(UserError, match="only in its maker's own layout"):
        hub._check_model_files(repository, own)
    hub._check_model_files(repository, [*own, "model.safetensors"])
    with pytest.raises(UserError, match="holds no .safetensors file"):
        hub._check_model_files(repository, ["config.json", "pytorch_model.bin"])


# --- sets that measure ----------------------------------------------------------------------------
SETS = """
import json, sys
from pathlib import Path
from liteguard import checkpoints
from liteguard.config import validate
from liteguard.data import exams, preparation, sets

own = {"name": "asked", "hub": "someone/asked", "split": "test", "kind": "questions"}
config = validate({"evaluate": {"sets": [own]}}, "test")
data = Path("data")
preparation.follow_earlier_run(data)
rows = sets.outside(config)["asked"]
report = {}
texts = [text for _, text in exams.evaluation_texts(config, report)]
assert [row["prompt"] for row in rows][0] in texts
found = exams.evaluation_inputs(config), sets.fingerprint(config), sets.hub_commits(config)
if not data.exists():
    data.mkdir()
    inputs = {"commit of asked": found[2]["asked"]}  # as preparation.plan has it
    checkpoints.write_json(data / "manifest.json", {"inputs": inputs})
print(json.dumps([sorted(row["prompt"] for row in rows), rows[0]["file"], report, *found]))
"""


def test_a_set_of_the_hub_is_kept_apart_and_measured_at_one_commit(tmp_path):
    hub = StubHub()
    rows = [{"question": f"What is sign {n}?", "answer": f"It is no {n}."} for n in range(3)]
    files = {"data/train.jsonl": lines(rows[:1]), "data/test.jsonl": lines(rows[1:])}
    repo = hub.add("datasets", "someone/asked", {"README.md": b"Made up.\n", **files})
    (tmp_path / "read.py").write_text(SETS)

    def read() -> list:
        env = environment(hub, tmp_path / "hf", PYTHONPATH=str(ROOT))
        return json.loads(succeed("read.py", cwd=tmp_path, env=env, fresh=True).splitlines()[-1])

    prompts, file, report, inputs, fingerprint, commits = first = read()
    assert prompts == ["What is sign 1?", "What is sign 2?"] and file == "someone/asked"
    assert report == {"evaluate.sets asked": "2 rows of someone/asked"}
    assert commits["asked"]["commit"] == fingerprint["asked"]["commit"] == repo.main
    repo.commit({"data/test.jsonl": lines([{"question": "Another?", "answer": "Yes, another."}])})
    assert read() == first, "the data remember what was kept apart"
    shutil.rmtree(tmp_path / "data")
    prompts, _, _, other, *_ = read()
    assert prompts == ["Another?"] and other != inputs
    hub.close()
