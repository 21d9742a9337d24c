"""Configuration: shipped YAMLs, the guide's values, problems reported at once."""

from __future__ import annotations

import pytest
from conftest import ROOT, fail

from liteguard import config
from liteguard.cli import parser, resolve_config
from liteguard.config import OTHER_NAMES, CompressSection, find_config, valid_names
from liteguard.errors import UserError

SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


def load(path, *settings):
    args = parser("").parse_args(["--config", str(path), *(f"--set={s}" for s in settings)])
    return resolve_config(args)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_yaml_loads(path):
    from liteguard.data.preparation import check_sources

    loaded = load(path)
    check_sources(loaded)
    assert loaded.model.licence


def test_shipped_files_have_the_same_sections_in_the_same_order():
    import yaml

    full = [p for p in SHIPPED if "extends" not in p.read_text()]
    orders = {p.name: list(yaml.safe_load(p.read_text())) for p in full}
    assert len(full) >= 3 and len({tuple(o) for o in orders.values()}) == 1, orders


@pytest.mark.parametrize(
    ("lengths", "ladder"),
    [
        ([64], [1, 8, 64]),
        ([64, 256, 1024], [1, 8, 64, 256, 1024]),
        ([1024], [1, 8, 64, 1024]),
        ([32, 4], [1, 4, 32]),
        ([1, 16], [1, 16]),
    ],
)
def test_prefill_lengths_go_down_to_one(lengths, ladder):
    """With [64] a conversation ends at 67 of 128 tokens."""
    section = CompressSection(prefill_lengths=lengths)
    assert section.ladder == ladder and section.prefill_lengths == lengths


@pytest.mark.parametrize("name", ["phi-2", "phi-1_5"])
def test_phi_defaults_are_the_guides(name):
    c = load(ROOT / "configs" / f"{name}.yaml")
    d = c.domain
    assert (d.lora_rank, d.lora_alpha, d.lora_dropout, d.lora_bias) == (32, 32, 0.0, "none")
    assert d.lora_targets == "all" and d.learning_rate == 2e-4 and d.max_steps == 1000
    assert c.instruction.learning_rate == 1e-5 and c.instruction.max_steps == 1000
    assert c.instruction.batch_size == 4 and c.instruction.gradient_accumulation > 1
    assert c.safety.beta == 0.1 and c.safety.batch_size == 2 and c.safety.max_steps == 200
    assert c.model.context_length == 2048 and c.model.quantization == "nf4"
    assert {c.domain.eval_steps, c.instruction.eval_steps, c.safety.eval_steps} == {100}
    assert c.domain.early_stopping_patience > 0
    assert max(c.compress.prefill_lengths) == 1024 and c.compress.kv_cache_length == 1280
    hubs = {
        s.hub for part in ("domain", "instruction", "preference") for s in getattr(c.data, part)
    }
    assert {
        "Medilora/us_medical_license_exam_textbooks_en",
        "lavita/medical-qa-datasets",
        "Malikeh1375/medical-question-answering-datasets",
        "Julian2002/Medical-ChatBot-DPO",
    } <= hubs


def test_8gb_keeps_the_effective_batch():
    small, large = load(ROOT / "configs/phi-2_8gb.yaml"), load(ROOT / "configs/phi-2.yaml")
    for stage in ("domain", "instruction", "safety"):
        a, b = getattr(small, stage), getattr(large, stage)
        assert a.batch_size == 1 and a.gradient_checkpointing
        assert a.batch_size * a.gradient_accumulation == b.batch_size * b.gradient_accumulation


def test_unknown_keys_are_all_reported_with_the_nearest_name(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "domain: {learnin_rate: 1.0e-4, max_steps: 0}\nsaftey: {beta: 0.1}\n"
        "data: {domain: [{dataset: plain_text, colums: {}}]}\n"
    )
    with pytest.raises(UserError) as caught:
        load(path)
    text = str(caught.value)
    assert "4 problems" in text
    assert "domain.learnin_rate: unknown key; did you mean 'learning_rate'?" in text
    assert "saftey: unknown key; did you mean 'safety'?" in text
    assert "did you mean 'columns'?" in text and "domain.max_steps" in text


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("domain.lr", "did you mean 'learning_rate'?"),
        ("safety.epochs", "did you mean 'max_steps'?"),
        ("instruction.bs", "did you mean 'batch_size'?"),
        ("domain.r", "did you mean 'lora_rank'?"),
        ("compress.prefill_seq_lens", "did you mean 'prefill_lengths'?"),
        ("beta", "did you mean 'safety.beta'?"),
        ("domain.beta", "did you mean 'safety.beta'?"),
        ("data.domain.0.name", "did you mean 'config_name'?"),
        ("compress.zzz", "valid here: quantize, size_gb, calibrate"),
        ("evaluate.llm_judge.modle", "did you mean 'model'?"),
        ("evaluate.llm_judge.zzz", "valid here: url, model, api_key_env"),
        ("lr", "did you mean 'domain.learning_rate' or 'instruction.learning_rate' or 'safety.lea"),
        ("rank", "did you mean 'domain.lora_rank'?"),
        ("bs", "did you mean 'domain.batch_size' or"),
        ("epochs", "did you mean 'domain.max_steps' or"),
        ("instruction.rank", "did you mean 'domain.lora_rank'?"),
        ("domain.LR", "did you mean 'learning_rate'?"),
        ("domain.max-steps", "did you mean 'max_steps'?"),
        ("Domain", "did you mean 'domain'?"),
        ("compress.recipe", "did you mean 'quantize'?"),
        ("sft", "did you mean 'instruction'?"),
        ("dpo", "did you mean 'safety'?"),
        ("stage1", "did you mean 'domain'?"),
        ("train", "did you mean 'domain' or 'instruction' or 'safety'?"),
        ("safety.loss_type", "did you mean 'preference_loss'?"),
        ("safety.dpo_beta", "did you mean 'beta'?"),
    ],
)
def test_an_unknown_key_is_answered_with_its_own_sections_keys(key, hint):
    with pytest.raises(UserError) as caught:
        load(ROOT / "configs/phi-2.yaml", f"{key}=3")
    assert f"{key}: unknown key; {hint}" in str(caught.value)


def test_other_names_and_optimizers_are_real():
    from transformers.training_args import OptimizerNames

    keys = {name.rsplit(".", 1)[-1] for name in valid_names()}
    assert set(OTHER_NAMES) <= keys
    assert not {other for names in OTHER_NAMES.values() for other in names} & keys
    assert set(config.OPTIMIZERS) <= {member.value for member in OptimizerNames}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "compress.quantize=intt8",
            "unknown recipe 'intt8'. Allowed, one or several separated by commas:\n    auto",
        ),
        ("compress.prefill_lengths=[64, 2048]", "kv_cache_length 1280 must exceed the longest"),
        ("compress.prefill_lengths=[0]", "compress.prefill_lengths.0: Input should be greater"),
        ("domain.optimizer=adamm", "domain.optimizer: Input should be 'adamw_torch'"),
        ("domain.use_dora=true", "domain.use_dora: not offered: DoRA keeps the length"),
        ("safety.torch_compile=true", "safety.torch_compile: not offered: packed micro-batches"),
        ("domain.use_liger_kernel=true", "domain.use_liger_kernel: not offered: TRL has dep"),
        ("safety.neftune_noise_alpha=5", "not offered: the noise is for learning answers: set ins"),
        ("safety.preference_loss=simpo", "simpo is not offered: it has no reference model"),
        ("safety.preference_loss=aot", "aot is not offered: it compares a pair with the others"),
        ("safety.preference_loss=apo", "apo_zero, where chosen answers are better"),
        ("safety.preference_loss=sigmod", "safety.preference_loss: Input should be 'sigmoid'"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_when_it_is_read(setting, said):
    """Not after hours of training."""
    with pytest.raises(UserError) as caught:
        load(ROOT / "configs/phi-2.yaml", setting)
    assert said in str(caught.value)


def test_flags_win_and_say_so():
    args = parser("").parse_args(
        ["--config", str(ROOT / "configs/phi-2.yaml"), "--set", "domain.max_steps=7"]
    )
    c = resolve_config(args, {"--rank": ("domain.lora_rank", 16)})
    assert c.domain.lora_rank == 16 and c.domain.max_steps == 7
    assert c.sources["domain.lora_rank"] == "--rank"
    assert c.sources["domain.max_steps"] == "--set"
    assert c.sources["domain.learning_rate"].endswith("phi-2.yaml")


def test_settings_read_numbers_and_list_entries():
    c = load(ROOT / "configs/phi-2.yaml", "domain.learning_rate=3e-4", "data.domain.0.path=a.jsonl")
    assert c.domain.learning_rate == 3e-4
    assert c.data.domain[0].path == "a.jsonl" and c.data.domain[0].hub


def test_pad_must_differ_from_the_end_token():
    with pytest.raises(UserError, match="must differ"):
        load(ROOT / "configs/phi-2.yaml", "prompt.pad_token=<|endoftext|>")


def test_model_and_model_type_find_the_yaml():
    assert find_config(model="microsoft/phi-2").name == "phi-2.yaml"
    assert find_config(model_type="phi1_5").name == "phi-1_5.yaml"
    with pytest.raises(UserError, match="Did you mean 'phi2'"):
        find_config(model_type="phi3")


def test_unknown_base_model_and_unreachable_hub(tmp_path):
    message = fail(2, ROOT / "train_domain.py", "--model", "someone/unknown", cwd=tmp_path)
    assert "No shipped configuration" in message and "microsoft/phi-2" in message
    # An address that nobody answers stands for a machine without a hub.
    import os

    offline = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    for command in (
        ["prepare_datasets.py", "--model_type", "phi2"],
        ["train_domain.py", "--model", "microsoft/phi-2", "--rank", "32"],
    ):
        message = fail(2, ROOT / command[0], *command[1:], cwd=tmp_path, env=offline)
        assert "Could not reach" in message
        assert "model.path=" in message and "--model_type smollm2" in message
        assert not list(tmp_path.glob("data/phi2/*"))


def test_license_may_be_spelled_as_the_field_spells_it(tmp_path):
    parent, child = tmp_path / "parent.yaml", tmp_path / "child.yaml"
    sources = "data: {{domain: [{{dataset: auto, path: x{}}}]}}\n".format
    parent.write_text("model: {name: a/b, licence: mit}\n" + sources(""))
    child.write_text(
        "extends: parent.yaml\nmodel: {license: apache-2.0}\n" + sources(", license: cc0")
    )
    found = load(child)
    assert (found.model.licence, found.data.domain[0].licence) == ("apache-2.0", "cc0")
    assert load(child, "model.license=bsd").model.licence == "bsd"
    child.write_text("model: {name: a/b, license: mit, licence: cc0}\n")
    with pytest.raises(UserError, match="'mit'.*'cc0'.* give one of them"):
        load(child)
    child.write_text("model: {name: a/b}\n" + sources(", columns: {text: b, license: c}"))
    assert load(child).data.domain[0].columns == {"text": "b", "license": "c"}
    weights = load(child, "safety.kind_weights={license: 2, licence: 1}").safety.kind_weights
    assert weights == {"license": 2, "licence": 1}


def test_keys_of_the_users_own_are_known_as_such():
    from liteguard.config import layers

    sections = [config.Config, config.SourceSection, config.SetSection]
    sections += [config.SafetySection, config.InstructionSection, config.DomainSection]
    sections += [config.EvaluateSection, config.CompressSection, config.DataSection]
    found = {
        name
        for section in sections
        for name, field in section.model_fields.items()
        if "dict[" in str(field.annotation)
    }
    assert found == {*layers.OF_THE_USER}


def test_an_empty_mapping_takes_the_place_of_the_earlier_one(tmp_path):
    yaml = ROOT / "configs/smollm2-135m.yaml"
    assert load(yaml).safety.kind_weights
    emptied = load(yaml, "safety.kind_weights={}")
    assert emptied.safety.kind_weights == {}
    assert emptied.sources["safety.kind_weights"] == "--set"
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: {yaml}\nsafety: {{kind_weights: {{}}}}\ninstruction: {{}}\n")
    assert load(own).safety.kind_weights == {}
    assert load(own).instruction == load(yaml).instruction, "a section is not emptied"


def test_a_circle_of_extends_is_seen_whatever_the_paths_look_like(tmp_path):
    (tmp_path / "own").mkdir()
    path = tmp_path / "own/a.yaml"
    path.write_text("extends: ../own/a.yaml\n")
    with pytest.raises(UserError, match="runs in a circle"):
        load(path)
