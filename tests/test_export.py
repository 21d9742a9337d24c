"""Tokenizer conversion, merging and the checks around conversion; no model is converted here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from liteguard import checkpoints, machine
from liteguard.errors import UserError, WorkError
from liteguard.export import bundle, merge, silence, tflite, tokenizer
from liteguard.prompts import Prompt

PROMPT = Prompt(
    system="You are a careful medical assistant.",
    system_prefix="<|im_start|>system\n",
    system_suffix="<|im_end|>\n",
    user_prefix="<|im_start|>user\n",
    user_suffix="<|im_end|>\n",
    model_prefix="<|im_start|>assistant\n",
    end_token="<|im_end|>",
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
SENTENCES = [
    "The patient takes 500 mg of paracetamol twice a day; the doctor said it's safe.",
    "β-blockers slow the heart. 5 µg is 0.005 mg. 37 °C is normal, and ≥ 38 °C is a fever.",
    "Sjögren's syndrome, Ménière's disease and Guillain–Barré syndrome are named after people.",
    "Iron → haemoglobin → oxygen. Don't stop treatment.\nAsk a doctor first.",
]
# What a phone may send: symbols, scripts and emoji that the tiny vocabulary never saw.
DEVICE_TEXTS = [
    "β µ ° ≥ → é",
    "37 °C and 5 µg, β-blockers ≥ 2",
    "漢字 and かな",
    "🙂 feels well",
    "",
    " leading and trailing ",
    "one\n\ntwo\n\nthree",
    "tab\there",
    "nul\x00inside",
    "Ménière's disease → vertigo",
    PROMPT.render_question("What is asthma?"),
    PROMPT.render_conversation(
        [("What is asthma?", "A disease.\n\nSee a doctor."), ("Why?", None)]
    ),
]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE trained here, with special tokens and one token of incomplete UTF-8."""
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # "\n\n" at the end of a text is what makes a token of it, as in real vocabularies; symbols on
    # their own make their bytes merge first, as much text does.
    symbols = [char for char in "βµ°≥→é–öè" for _ in range(300)]
    bpe.train_from_iterator([*SENTENCES * 30, *["end.\n\n"] * 200, *symbols], trainer)
    data = json.loads(bpe.to_str())
    # E2 80, the first two bytes of all curly quotes: GPT-2 has such a token, and so do Phi and
    # SmolLM2. It goes first, so that it always merges.
    vocabulary = data["model"]["vocab"]
    left, right = "\u00e2", "\u0122"  # bytes E2 and 80, as the byte-level alphabet writes them
    assert tokenizer.bytes_to_unicode()[0x80] == right
    if left + right not in vocabulary:
        vocabulary[left + right] = max(vocabulary.values()) + 1
        data["model"]["merges"].insert(0, [left, right])
    (folder / "raw.json").write_text(json.dumps(data))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_file(str(folder / "raw.json")),
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
    )
    fast.save_pretrained(folder)
    (folder / "raw.json").unlink()
    return folder


@pytest.fixture(scope="module")
def device(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    """(SentencePiece processor, report, path) of the converted tokenizer."""
    import sentencepiece

    path = tmp_path_factory.mktemp("spm") / "tokenizer.spm"
    report = tokenizer.build_sentencepiece(tokenizer_dir, path)
    return sentencepiece.SentencePieceProcessor(model_file=str(path)), report, path


@pytest.fixture(scope="module")
def original(tokenizer_dir: Path):
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))


@pytest.mark.parametrize("text", [*SENTENCES, *DEVICE_TEXTS], ids=repr)
def test_device_ids_equal_the_original(text: str, device, original) -> None:
    processor, report, _ = device
    plain = tokenizer.plain_text(text, report.replaced)
    ids = processor.encode(text)
    assert ids == original.encode(plain, add_special_tokens=False).ids
    assert processor.decode(ids) == plain
    assert max(ids, default=0) < report.tokens, "ids beyond the embedding would read anything"


@pytest.mark.parametrize("text", ["👩\u200d⚕️", "a\u2070b", "5 \u2030"], ids=ascii)
def test_text_that_needs_incomplete_tokens_survives_as_bytes(text, device, original) -> None:
    processor, report, _ = device
    plain = tokenizer.plain_text(text, report.replaced)
    assert processor.decode(processor.encode(text)) == plain


def test_report_accounts_for_every_token(device, original) -> None:
    processor, report, _ = device
    assert report.incomplete, "the fixture has a token of incomplete UTF-8"
    for index in report.incomplete:
        assert tokenizer.PLACEHOLDER_MARK in processor.id_to_piece(index)
    assert set(report.incomplete) <= set(report.silenced)
    # Whatever is not silenced is whole text: an answer cannot show U+FFFD.
    never = {*report.silenced, *report.single_bytes}
    assert len(report.single_bytes) > 50
    for index in set(range(report.tokens)) - never:
        assert "\ufffd" not in original.decode([index], skip_special_tokens=False), index
    assert processor.get_piece_size() == report.pieces >= report.rows >= report.tokens
    json.dumps(report.to_dict())


def test_curly_quotes_become_plain_and_are_reported(device, original, tokenizer_dir) -> None:
    processor, report, path = device
    assert report.replaced["\u2019"] == "'"
    assert processor.encode("it\u2019s") == original.encode("it's").ids
    texts = ["it\u2019s", "it's safe"]
    found = tokenizer.compare_tokenizers(tokenizer_dir, path, texts, report.replaced)
    assert found["texts"] == 2 and found["identical"] == 1
    # Text that preparation did not clean differs, and is explained.
    found = tokenizer.compare_tokenizers(tokenizer_dir, path, texts, {})
    assert found["identical"] == 0.5 and found["causes"] == {"incomplete_utf8": 1}


def test_guard_character_is_not_seen_by_the_model(device) -> None:
    processor, _, _ = device
    assert processor.encode(f"asthma?{tokenizer.GUARD}\nOutput") == processor.encode(
        "asthma?\nOutput"
    )


def test_embedding_rows_without_a_token_are_padded_and_silenced(tokenizer_dir, tmp_path) -> None:
    import sentencepiece

    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 1024}))
    report = tokenizer.build_sentencepiece(tmp_path, tmp_path / "padded.spm")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "padded.spm"))
    assert report.rows == 1024 and processor.is_unused(1023)
    assert set(range(report.tokens, 1024)) <= set(report.silenced)


def test_numbers_that_are_no_token_are_silenced(tokenizer_dir, tmp_path) -> None:
    """As some vocabularies have them between their tokens and the added ones."""
    data = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    top = max([token["id"] for token in data["added_tokens"]] + [*data["model"]["vocab"].values()])
    more = {**data["added_tokens"][-1], "id": top + 4, "content": "<|later|>"}
    data["added_tokens"].append(more)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": top + 5}))
    report = tokenizer.build_sentencepiece(tmp_path, tmp_path / "holes.spm")
    assert {top + 1, top + 2, top + 3} <= {*report.silenced} and top + 4 not in report.silenced


def test_other_tokenizers_are_refused(tmp_path) -> None:
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="byte-level BPE"):
        tokenizer.build_sentencepiece(tmp_path, tmp_path / "out.spm")


# --- merge ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phi_base(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Phi in float16 with the tokenizer of this file."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("phi")
    fast = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        vocab_size=len(fast) + 24,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.PhiForCausalLM(config).half().save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def _adapter(base: Path, folder: Path, *, trained: bool) -> Path:
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    )
    if trained:
        torch.manual_seed(1)
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.05)
    model.save_pretrained(folder)
    return folder


def test_merged_model_computes_what_base_and_adapter_compute(phi_base, tmp_path) -> None:
    import peft
    import torch
    import transformers

    adapter = _adapter(phi_base, tmp_path / "adapter", trained=True)
    result = merge.merge_adapter(phi_base, adapter, tmp_path / "merged", PROMPT)
    assert result["changed_tensors"] == 12 and result["dtype"] == "float16"

    load = transformers.AutoModelForCausalLM.from_pretrained
    ids = torch.tensor([[5, 60, 200, 300, 7]])
    with torch.no_grad():
        base = load(phi_base, dtype=torch.float32)
        plain = base(ids).logits
        expected = peft.PeftModel.from_pretrained(base, adapter)(ids).logits
        merged = load(tmp_path / "merged", dtype=torch.float32)(ids).logits
    assert (expected - plain).abs().max() > 0.05, "the adapter must matter for this to test it"
    assert torch.allclose(merged, expected, atol=5e-3)

    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0] and generation["pad_token_id"] == 3
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    question = [{"role": "user", "content": "What is asthma?"}]
    assert fast.apply_chat_template(
        question, add_generation_prompt=True, tokenize=False
    ) == PROMPT.render_question("What is asthma?")
    assert not list(tmp_path.glob(".*partial")), "nothing half-written stays behind"


MERGE = """
import sys
from pathlib import Path
from liteguard.export import merge
from liteguard.prompts import Prompt
adapter, output, prompt, commit = sys.argv[1:]
prompt = Prompt.model_validate_json(prompt)
merge.merge_adapter("team/tiny", Path(adapter), Path(output), prompt, commit)
"""


def test_the_pinned_revision_is_merged(phi_base, tmp_path) -> None:
    """A hub id with two commits in the local cache: the adapter belongs to the older one."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "hub" / "models--team--tiny"
    commits = {"0" * 40: 0.0, "1" * 40: 1.0}
    for commit, shift in commits.items():
        shutil.copytree(phi_base, folder / "snapshots" / commit)
        file = folder / "snapshots" / commit / "model.safetensors"
        weights = load_file(file)
        weights["lm_head.bias"] = weights["lm_head.bias"] + shift
        save_file(weights, file, metadata={"format": "pt"})
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1" * 40)
    adapter = _adapter(phi_base, tmp_path / "adapter", trained=True)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    biases = []
    for number, commit in enumerate(commits):
        output = tmp_path / f"merged{number}"
        command = [sys.executable, "-c", MERGE, adapter, output, PROMPT.model_dump_json(), commit]
        subprocess.run(command, env=environment, cwd=ROOT, check=True)
        biases.append(load_file(output / "model.safetensors")["lm_head.bias"].float())
    torch.testing.assert_close(
        biases[1] - biases[0], torch.ones_like(biases[0]), rtol=1e-3, atol=1e-3
    )


def test_an_adapter_that_changes_nothing_is_an_error(phi_base, tmp_path) -> None:
    adapter = _adapter(phi_base, tmp_path / "adapter", trained=False)
    with pytest.raises(WorkError, match="changed no weight"):
        merge.merge_adapter(phi_base, adapter, tmp_path / "merged", PROMPT)
    assert not (tmp_path / "merged").exists()


def test_a_missing_stop_token_is_an_error(phi_base, tmp_path) -> None:
    prompt = PROMPT.model_copy(update={"end_token": "<|end_of_answer|>"})
    with pytest.raises(UserError, match="end_of_answer"):
        merge.merge_adapter(phi_base, None, tmp_path / "merged", prompt)


# --- bundle, conversion, verification ------------------------------------------------------------


def test_bundle_refuses_a_stop_token_that_is_not_one_piece(device, tmp_path) -> None:
    model = tmp_path / "model.tflite"
    model.write_bytes(b"not read")
    prompt = PROMPT.model_copy(update={"end_token": "<|end_of_answer|>"})
    with pytest.raises(UserError, match="never stop"):
        bundle.write_task(model, device[2], prompt, tmp_path / "out.task")
    assert not (tmp_path / "out.task").exists()


def test_the_same_inputs_give_the_same_bytes(device, tokenizer_dir, tmp_path, monkeypatch) -> None:
    model = tmp_path / "model.tflite"
    model.write_bytes(b"TFL3" * 9)
    made = []
    for clock in (10**9, 2 * 10**9):
        monkeypatch.setattr(time, "time", lambda now=clock: now)
        task, other = tmp_path / f"{clock}.task", tmp_path / f"{clock}.litertlm"
        bundle.write_task(model, device[2], PROMPT, task)
        bundle.write_litertlm(model, tokenizer_dir, PROMPT, other, 128)
        made.append((task.read_bytes(), other.read_bytes()))
    assert made[0][0] == made[1][0]
    assert made[0][1] == made[1][1]


def test_a_litertlm_is_greedy_and_ends_at_its_cache_unasked(tokenizer_dir, tmp_path) -> None:
    """An app that sets no sampler gets the proof's. The type GREEDY fails in the runtime."""
    from litert_lm_builder.runtime.proto import llm_metadata_pb2

    (tmp_path / "model.tflite").write_bytes(b"TFL3" * 9)
    output = tmp_path / "x.litertlm"
    bundle.write_litertlm(tmp_path / "model.tflite", tokenizer_dir, PROMPT, output, 128)
    wanted = llm_metadata_pb2.LlmMetadata(max_num_tokens=128)
    wanted.sampler_params.type, wanted.sampler_params.k = 2, 1
    wanted.sampler_params.p = wanted.sampler_params.temperature = 1.0
    assert wanted.SerializeToString() in output.read_bytes()


def test_conversion_refuses_what_cannot_work(phi_base, tmp_path, monkeypatch) -> None:
    merge.merge_adapter(phi_base, None, tmp_path / "merged", PROMPT)

    def convert(**changes: object) -> None:
        settings = {"prefill_lengths": [32], "kv_cache_length": 128, "progress": None} | changes
        tflite.export(tmp_path / "merged", tmp_path / "out.tflite", **settings)

    with pytest.raises(UserError, match="must exceed"):
        convert(prefill_lengths=[128])
    with pytest.raises(UserError, match="max_position_embeddings"):
        convert(kv_cache_length=4096)
    monkeypatch.setattr(machine, "available_memory", lambda: 10**9)
    with pytest.raises(UserError, match="needs about .* GB of memory"):
        convert()
    monkeypatch.setattr(machine, "available_memory", lambda: 10**12)
    monkeypatch.setattr(tflite.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match="10 MB of disk"):
        tflite.require_resources(10**9, "v2", tmp_path, 10**7)
    (tmp_path / "merged" / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match="eos_token_id"):
        convert()


def test_disk_counts_what_a_rerun_finds_and_what_a_recipe_unpacks(tmp_path) -> None:
    output = tmp_path / "x.task"
    assert checkpoints.left_over(output) == 0
    work = checkpoints.work_directory(output) / "merged"
    work.mkdir(parents=True)
    (work / "model.safetensors").write_bytes(b"x" * 1_000_000)
    assert 1_000_000 <= checkpoints.left_over(output) < 1_010_000
    # Unpacked to float32 twice, for LiteRT-LM and for the scores.
    assert tflite.bundle_disk(100, "int8_weight_only") - tflite.bundle_disk(100, "int8") == 600
    # The second container is a file of its own.
    one, two = (tflite.whole_disk(100, "v2", "int8", containers) for containers in (1, 2))
    assert two - one == 100


def test_a_killed_conversion_is_reported_as_out_of_memory(phi_base, tmp_path, monkeypatch) -> None:
    merge.merge_adapter(phi_base, None, tmp_path / "merged", PROMPT)
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho half way\nkill -9 $$\n")
    fake.chmod(0o755)
    monkeypatch.setattr(tflite.sys, "executable", str(fake))
    with pytest.raises(WorkError, match="out of memory") as caught:
        tflite.export(
            tmp_path / "merged",
            tmp_path / "out.tflite",
            prefill_lengths=[32],
            kv_cache_length=128,
            check_resources=False,
            progress=None,
        )
    log = tmp_path / "out.tflite.log"
    assert str(log) in str(caught.value) and log.read_text() == "half way\n"
    assert not (tmp_path / "out.tflite").exists()
    assert not (tmp_path / ".out.tflite.work").exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Rest and drink water.", None),
        ("Sjögren's syndrome, 5 µg ≥ 2 → 漢字 🙂", None),
        (f"Rest{tokenizer.PLACEHOLDER_MARK}447{tokenizer.PLACEHOLDER_MARK}", "placeholder"),
        ("Rest\ufffd", "U+FFFD"),
        ("Rest\u0120and\u010awater", "byte-level"),
        ("Rest<|im_end|>", "special-token"),
    ],
)
def test_dirt_in_answers_is_found(text: str, found: str | None) -> None:
    result = silence.dirt(text, PROMPT.stop_tokens)
    assert result is None if found is None else found in result
