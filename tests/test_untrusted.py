"""A checkpoint, a bundle, a data set or a result from somebody else is input, not instruction."""

from __future__ import annotations

import io
import json
import shutil
from argparse import Namespace

import pytest
from conftest import STAGE_RECORD, run_script

from liteguard import checkpoints, cli, models, shown
from liteguard import config as config_layers
from liteguard.errors import LiteGuardError, UserError
from liteguard.evaluation import contamination, plots, report, verdict
from liteguard.records import Manifest, StageRecord
from liteguard.rows import read_manifest
from liteguard.runtime.container import tflite_model

RECORD = {**STAGE_RECORD, "inputs": {}, "files": {}}
JUDGE = {"url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "AWS_SECRET_ACCESS_KEY"}
SET = {"name": "a", "path": "/etc/passwd", "kind": "texts"}
NASTY = "<img src=x onerror=f()> [go](javascript:f()) | *b* `c` $x_1$\n\n# Title \x1b]0;owned\x07"


def flags(*settings):
    return Namespace(config=None, settings=[*settings])


# --- what a record may say ------------------------------------------------------------------------
def test_a_record_names_no_service_no_place_and_gives_no_permission(capsys):
    theirs = {
        "model": {"name": "a/base", "trust_remote_code": True, "compute_dtype": "float32"},
        "data": {"cache_dir": "/somewhere/else", "seed": 3},
        "evaluate": {"llm_judge": JUDGE, "question_rows": 5, "sets": [SET]},
        "compress": {"python": "/somewhere/python"},
        **{stage: {"report_to": ["wandb"], "seed": 4} for stage in ("domain", "instruction")},
    }
    parent = StageRecord(**{**RECORD, "config": theirs})
    measuring = flags()
    measuring.sets = []  # as evaluate_model.py has it
    config = cli.resolve_config(measuring, parent=parent)
    assert config.evaluate.llm_judge is None and not config.model.trust_remote_code
    assert config.data.cache_dir == ".cache" and config.compress.python is None
    assert config.evaluate.sets == [] and config.domain.report_to == []
    assert (config.instruction.report_to, config.instruction.seed) == ([], 4)
    # What describes the artifact is taken.
    assert (config.data.seed, config.evaluate.question_rows) == (3, 5)
    assert (config.model.name, config.model.compute_dtype) == ("a/base", "float32")
    told = capsys.readouterr().out
    left = "data.cache_dir, evaluate.llm_judge, evaluate.sets, model.trust_remote_code"
    assert f"{left}, compress.python, instruction.report_to (" in told
    assert "domain.report_to" not in told, "the stage is trained"
    assert "--set" in told and "AWS" not in told
    cli.resolve_config(flags(), parent=parent)
    assert "evaluate.sets" not in capsys.readouterr().out, "no set is measured here"
    mine = flags("model.trust_remote_code=true", "data.cache_dir=mine")
    config = cli.resolve_config(mine, parent=parent)
    assert config.model.trust_remote_code and config.data.cache_dir == "mine"


def test_every_setting_that_names_a_place_or_a_service_is_the_users_own():
    """A new one has to be added to OWN, or this fails."""
    words = ("url", "env", "trust", "_dir", "token_file", "api", "endpoint", "python")
    words += ("report_to", "sets", "file", "folder", "output", "command")
    found = [n for n in config_layers.valid_names() if any(w in n.split(".")[-1] for w in words)]
    own = config_layers.OWN
    assert found and not [n for n in found if n not in own and n.rsplit(".", 1)[0] not in own]


def test_an_ordinary_record_is_followed_without_a_word(capsys):
    config = config_layers.Config()
    cli.resolve_config(flags(), parent=StageRecord(**{**RECORD, "config": config.model_dump()}))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["../../up", "a/b", "a b", "..", "x" * 65, "a\n", ".hidden"])
def test_a_model_type_is_a_plain_name(name):
    """It becomes part of file names: data/<model_type>, liteguard_<model_type>.task."""
    with pytest.raises(UserError, match="model_type"):
        config_layers.build([("test", {"model_type": name})])


@pytest.mark.parametrize("name", ["../other/x", "/etc/passwd", "a/../../b", "", "..", "a\\..\\b"])
def test_names_in_a_record_stay_in_its_directory(tmp_path, name):
    for kind, whole in ((StageRecord, RECORD), (Manifest, manifest())):
        with pytest.raises(ValueError, match="inside the record's own directory"):
            kind.model_validate({**whole, "files": {name: "00"}})
    (tmp_path / "manifest.json").write_text(json.dumps(manifest() | {"files": {name: "00"}}))
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(tmp_path)


def manifest():
    counts = {"domain/train.jsonl": {"rows": 1, "words": 2}}
    return {"model_type": "x", "files": {}, "counts": counts, "sources": []}


def test_a_stage_is_one_of_those_there_are():
    """It becomes the name of a result: evaluation/<stage>.json."""
    with pytest.raises(ValueError, match="stage"):
        StageRecord(**{**RECORD, "stage": "../../x"})


def test_a_record_that_is_its_own_parent_ends(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(manifest()))
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "adapter_model.safetensors").write_bytes(b"x")
    digest = checkpoints.sha256_file(stage / "adapter_model.safetensors")
    own = {"parent": str(stage), "parent_adapter_sha256": digest, "data_dir": str(tmp_path)}
    record = {**RECORD, **own, "files": {"adapter_model.safetensors": digest}}
    (stage / "stage.json").write_text(json.dumps(record))
    _, unchecked = contamination.training_data(tmp_path, StageRecord(**record))
    assert f"what {stage} was trained on" in unchecked


# --- safetensors, and no code ---------------------------------------------------------------------
def test_a_stage_without_safetensors_is_refused(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    files = {"adapter_model.bin": checkpoints.sha256_file(tmp_path / "adapter_model.bin")}
    (tmp_path / "stage.json").write_text(json.dumps({**RECORD, "files": files}))
    with pytest.raises(UserError, match="Pickled weights can run code"):
        checkpoints.read_stage(tmp_path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a base model's folder with a tokenizer, a LoRA adapter's folder): untrained, tiny."""
    import peft
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

    base, adapter = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    shape = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**shape, num_attention_heads=2, max_position_embeddings=4096))
    model.save_pretrained(base)
    core = Tokenizer(BPE({"a": 0, "<|endoftext|>": 1}, []))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>").save_pretrained(base)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["fc1", "q_proj"])
    peft.get_peft_model(model, lora).save_pretrained(adapter)
    return base, adapter


@pytest.fixture
def base(folders, tmp_path):
    return shutil.copytree(folders[0], tmp_path / "base")


@pytest.fixture
def adapter(folders, tmp_path):
    return shutil.copytree(folders[1], tmp_path / "adapter")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def open_base(base, **model):
    settings = {"name": "x/y", "path": str(base), **model}
    return models.model_config(config_layers.build([("test", {"model": settings})]))


def test_a_whole_base_and_its_adapter_are_opened(base, adapter):
    assert open_base(base)[2].model_type == "phi"
    opened = models.open_adapter(models.load_weights(base), adapter)
    assert opened.peft_config["default"].r == 2


CODE = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"auto_map": CODE, "model_type": "evil"}),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "EvilTok"},
        ),
    ],
)
def test_code_beside_a_model_is_refused_before_anything_asks(base, file, values, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    (base / "evil.py").write_text("raise SystemExit('ran')")
    change(base / file, **values)
    with pytest.raises(UserError, match="--set model.trust_remote_code=true") as error:
        open_base(base)
    assert file in str(error.value)


def test_a_known_architecture_is_loaded_without_the_code_beside_it(base):
    """Many models of the hub carry code from before transformers knew them."""
    (base / "evil.py").write_text("raise SystemExit('ran')")
    change(base / "config.json", auto_map=CODE)
    assert type(open_base(base)[2]).__module__.startswith("transformers.")
    assert type(models.load_weights(base)).__name__ == "PhiForCausalLM"


@pytest.mark.parametrize(
    "file", ["pytorch_model.bin", "../model.safetensors", "/x/model.safetensors", 5]
)
def test_an_index_names_safetensors_beside_it(base, file):
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match="must be .safetensors files beside it"):
        open_base(base)


def test_a_base_with_an_adapter_in_it_would_load_another_model(base, adapter):
    shutil.copy(adapter / "adapter_config.json", base)
    with pytest.raises(UserError, match="names another model"):
        open_base(base)


def spoil(adapter, how):
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    if how == "half":
        tensors = dict([*tensors.items()][::2])
    elif how == "renamed":
        tensors = {f"x{name}": value for name, value in tensors.items()}
    elif how == "not finite":
        tensors = {name: value * float("nan") for name, value in tensors.items()}
    save_file(tensors, path)
    if how == "pickled":
        path.rename(adapter / "adapter_model.bin")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "module":
        change(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil")
    elif how == "kind":
        change(adapter / "adapter_config.json", peft_type="IA3")
    elif how == "shape":
        change(adapter / "adapter_config.json", r=4)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("half", "they differ in"),
        ("renamed", "they differ in"),
        ("not finite", "is not finite"),
        ("pickled", "can run code when they are opened"),
        ("cut", "does not fit this base model, or cannot be read"),
        ("module", "sets 'megatron_config'"),
        ("kind", "a LoRA adapter is needed, not 'IA3'"),
        ("shape", "does not fit this base model"),
    ],
)
def test_an_adapter_is_whole_and_no_more_than_an_adapter(folders, adapter, how, said):
    """PEFT opens most of these with a warning at most."""
    spoil(adapter, how)
    model = models.load_weights(folders[0])
    with pytest.raises(LiteGuardError, match=said):
        models.open_adapter(model, adapter)


@pytest.mark.parametrize("name", ["x.task", "x.litertlm"])
@pytest.mark.parametrize("content", [b"", b"LITERTLM", b"LITERTLM" + b"\xff" * 100, b"PK\x05\x06"])
def test_a_file_that_is_no_bundle(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a|damaged header|holds no|cut short"):
        tflite_model(path)


# --- texts of others ------------------------------------------------------------------------------
def test_a_terminal_gets_no_escape_sequences():
    assert shown.visible("a\x1b[31mb\x9b\r\u202ec\ud800") == "a\\x1b[31mb\\x9b\\r\\u202ec\\ud800"
    assert shown.visible("tab\tline\nå 中 -") == "tab\tline\nå 中 -"


PRINTS = """
import sys
from pathlib import Path
from tqdm import tqdm
from liteguard import cli, machine
from liteguard.chat import terminal
from liteguard.config import SourceSection
from liteguard.data import files
from liteguard.training import tokens

def main():
    esc = chr(27)
    files.files_and_splits(SourceSection(dataset="auto", path=sys.argv[1]))
    rows = [{"kind": f"kind{esc}[2J", "dataset": "a"}]
    print(tokens.mixture(rows, rows, {"a": f"source{esc}[1A"}))
    print(f"LoRA on layer{esc}]0;owned{chr(7)} x2")
    sys.stdout.writelines([f"area{esc}[31m", chr(10)])
    terminal._say(f"name{esc}[8m", "1")
    for _ in tqdm(range(2), file=sys.stdout, desc=f"bar{esc}[2J", ascii=True):
        pass
    machine.in_child("a", print, f"child{esc}[2J")

if __name__ == "__main__":
    cli.run(main)
"""


def test_nothing_of_others_acts_on_a_terminal_whatever_prints_it(tmp_path):
    """Names of files, kinds, sources, layers and models, in this process and in its children."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / ".file\x1b[2J").write_text("a")
    done = run_script("-c", PRINTS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "\x07" not in done.stdout
    for said in ("file", "kind", "source", "layer", "area", "name", "bar", "child"):
        assert f"{said}\\x1b" in done.stdout, said


def test_codes_of_bars_and_names_in_bold_stay_what_they_are():
    sink = io.StringIO()
    screen = shown.screen(sink)
    for own in ("\r", "\n\n", "\x1b[A\x1b[A", "\x1b[1m", "\x1b[0m"):
        assert screen.write(own) == len(own)
    assert sink.getvalue() == "\r\n\n\x1b[A\x1b[A\x1b[1m\x1b[0m"
    assert screen.getvalue() == sink.getvalue() and not screen.isatty()
    print("\rbar\x1b[A", "a\rb", end="", file=screen)
    assert sink.getvalue().endswith("\rbar\\x1b[A a\\rb")


def test_the_first_sequence_of_a_stage_is_shown_escaped(capsys, monkeypatch):
    from types import SimpleNamespace

    from liteguard.training import feed

    def none(*_):
        raise UserError("no formula")

    monkeypatch.setattr(feed.memory_estimate, "estimate", none)
    section = SimpleNamespace(max_steps=1)
    stage = SimpleNamespace(name="domain", section=section, output="o", config=0, architecture=0)
    feed.describe(stage, f"a row {NASTY}", "rows", 1, 1.0, 1, False)
    printed = capsys.readouterr().out
    assert "a row" in printed and "\\x1b]0;owned\\x07" in printed and "\x1b" not in printed


def test_markdown_says_what_a_text_says_and_does_nothing_else():
    line = shown.markdown(NASTY)
    assert "\n" not in line and "<img" not in line and "](" not in line and "\x1b" not in line
    assert "\\|" in line and "\\# Title" in line and "&lt;img" in line
    assert shown.markdown("- a list") == "\\- a list"
    assert shown.markdown("microsoft/phi-2 (2.7 B), 75 %") == "microsoft/phi-2 (2.7 B), 75 %"


def test_the_model_card_escapes_whatever_it_is_given(monkeypatch):
    area = {NASTY: {"refused": 1, "answered": 0, "unclear": 0}}
    facts = {
        "base_model": NASTY,
        "base_licence": NASTY,
        "labels": {"final": NASTY},
        "stages": {},
        "markdown": "| a | b |",
        "verdict": object(),
        "verdict_markdown": verdict.verdict_markdown(
            verdict.Verdict(NASTY, True, reasons=[verdict.Reason(True, NASTY)])
        ),
        "final_label": NASTY,
        "final": {"areas": {"harmful": area}, "n": {"refused_harmful": 1, "refused_benign": 1}},
        "manifest": {"counts": {NASTY: {"rows": 1, "words": 1}}},
        "licences": [NASTY],
        "versions": {NASTY: NASTY},
    }
    card = report.render("model_card_template.md", facts)
    assert "| a | b |" in card and card.count("&lt;img") == 12
    assert "<img" not in card and "](" not in card and "\x1b" not in card
    assert "\n# Title" not in card


def test_the_name_of_a_result_in_a_plot_is_no_formula():
    name = plots.name_of(r"$\frac{$" + NASTY)
    assert "\n" not in name and "\x1b" not in name and name.count("$") == name.count(r"\$")
    assert plots.name_of("final") == "Final"
    results = {r"$\frac{": {"cost": {"answer_s": dict.fromkeys("abcde", 1.0)}}}
    assert plots.latency_plot(results).startswith("data:image/png")


# --- keys and passwords ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("key", "value", "secret"),
    [
        ("url", "http://me:SECRET4@127.0.0.1:9/v1", "SECRET4"),
        ("url", "http://SECRET4@127.0.0.1:9/v1", "SECRET4"),
        ("url", "http://127.0.0.1:9/v1?api_key=SECRET4", "SECRET4"),
        ("url", "http://127.0.0.1:9/v1?SECRET4", "SECRET4"),
        ("url", "http://127.0.0.1:9/v1#SECRET4", "SECRET4"),
        ("model", "sk-proj-SECRET4", "SECRET4"),
        ("api_key_env", "sk-SECRET5", "SECRET5"),
        ("api_key_env", "sk_secret6", "secret6"),
        ("api_key", "SECRET7", "SECRET7"),
    ],
)
def test_a_key_in_the_wrong_place_is_refused_and_not_repeated(key, value, secret):
    with pytest.raises(UserError, match="llm_judge") as error:
        config_layers.build([("test", {"evaluate": {"llm_judge": {**JUDGE, key: value}}})])
    assert secret not in str(error.value)
    with pytest.raises(UserError) as error:
        config_layers.build([("test", {"evaluate": {"llm_judge": secret}})])
    assert secret not in str(error.value)


SECRETS = (
    *("https://me:SECRET9@h.example/x", "https://h.example/v1?v=1&api_key=SECRET9"),
    *("sk-SECRET9", "hf_SECRET9aBcDeFgHiJkL", "AIzaSECRET9_aBcDeFgHiJkL"),
)


@pytest.mark.parametrize("secret", SECRETS)
def test_no_setting_takes_a_secret(secret, capsys):
    """Each of them is printed, recorded in stage.json and sent to trackers."""
    names = [n for n in config_layers.valid_names() if n.split(".")[0] != "prompt"]
    names += [f"data.domain.0.{key}" for key in config_layers.SourceSection.model_fields]
    names += [f"evaluate.sets.0.{key}" for key in config_layers.SetSection.model_fields]
    names += ["safety.kind_weights.harmful", "data.domain.0.columns.prompt", "data.decontaminate.0"]
    base = {
        "data": {"domain": [{"dataset": "auto"}], "decontaminate": ["medqa"]},
        "evaluate": {"sets": [{"name": "a", "path": "b", "kind": "texts"}], "llm_judge": JUDGE},
    }
    for name in names:
        layers = [("test", base), config_layers.parse_setting(f"{name}={secret}")]
        with pytest.raises(UserError) as error:
            config_layers.build(layers)
        assert "SECRET9" not in str(error.value), name
        assert name.removesuffix(".0") in str(error.value)


def test_texts_that_only_look_like_a_secret_are_taken():
    ordinary = ["hf_datasets", "me/sk-learn-2024", "sk-learn-data", "a@b.example", "AIza", "x?y=1"]
    for text in ordinary:
        assert config_layers.build([("test", {"data": {"cache_dir": text}})])
        assert shown.message(text) == text


def test_the_printed_settings_hide_a_password_and_show_escapes(capsys):
    config = config_layers.build([("a\x1b.yaml", {"safety": {"kind_weights": {"a\x1b[1m": 2}}})])
    section = config.model.model_copy(update={"path": SECRETS[0]})  # of a record, say
    cli.print_config(config.model_copy(update={"model": section}), "model", "safety")
    printed = capsys.readouterr().out
    assert "https://***@h.example/x" in printed and "SECRET9" not in printed
    assert "kind_weights.a\\x1b[1m" in printed and "\x1b" not in printed


def test_printed_entries_of_a_list_have_what_was_set(capsys):
    sets = [{"name": "nih", "path": "nih.csv", "kind": "questions", "rows": 60}]
    cli.print_config(config_layers.build([("a.yaml", {"evaluate": {"sets": sets}})]), "evaluate")
    assert f"{sets} " in capsys.readouterr().out


def test_messages_hide_the_password_of_a_url():
    for secret in SECRETS:
        assert "SECRET9" not in shown.message(f"{secret} {'x' * 3000}")
        assert "SECRET9" not in shown.message("x" * 955 + f" {secret}" + "x" * 3000)
    text = shown.message("https://me:SECRET8@hub.example/x has a failure (http://a@b/)")
    assert text == "https://***@hub.example/x has a failure (http://***@b/)"
