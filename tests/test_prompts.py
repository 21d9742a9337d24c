"""The prompt object: one text in training, in the chat template and in the loss mask."""

from __future__ import annotations

import hashlib
import json

import pytest
from conftest import ROOT

from liteguard import models, training
from liteguard.config import build, read_yaml
from liteguard.errors import UserError

YAMLS = ["phi-2.yaml", "smollm2-135m.yaml"]


def config(name, **over):
    return build([(name, read_yaml(ROOT / "configs" / name)), ("test", over)])


@pytest.fixture(scope="module")
def tokenizer(tiny_phi):
    return models.load_tokenizer(str(tiny_phi), config("phi-2.yaml").prompt, 640)


@pytest.mark.parametrize("name", YAMLS)
def test_chat_template_renders_what_training_sees(name):
    from jinja2 import Environment

    prompt = config(name).prompt
    template = Environment().from_string(prompt.chat_template())
    turns = [("What is asthma?", "A disease of the airways."), ("Is it serious?", None)]
    messages = [
        {"role": "user", "content": "What is asthma?"},
        {"role": "assistant", "content": "A disease of the airways."},
        {"role": "user", "content": "Is it serious?"},
    ]
    assert template.render(
        messages=messages, add_generation_prompt=True
    ) == prompt.render_conversation(turns)
    one = template.render(messages=messages[:1], add_generation_prompt=True)
    assert one == prompt.render_question("What is asthma?")


def test_mask_token_by_token(tokenizer):
    c = config("phi-2.yaml")
    row = training.tokenize_pair(tokenizer, c, "What is the heart?", "It is an organ.", 64)
    supervised = [
        i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100
    ]
    hidden = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    assert tokenizer.decode(supervised) == "It is an organ.<|endoftext|>"
    assert tokenizer.decode(hidden) == "Instruct: What is the heart?\nOutput:\n"
    assert all(label in (-100, i) for i, label in zip(row["input_ids"], row["labels"], strict=True))


def test_truncation_cuts_the_question_never_the_end_token(tokenizer):
    c = config("phi-2.yaml")
    row = training.tokenize_pair(tokenizer, c, "word " * 200, "It is an organ.", 30)
    assert len(row["input_ids"]) == 30
    assert row["labels"][-1] == tokenizer.eos_token_id == row["input_ids"][-1]
    assert training.tokenize_pair(tokenizer, c, "short", "word " * 200, 30) is None


def test_an_opening_is_cut_and_has_no_end_token(tokenizer):
    c = config("phi-2.yaml")
    whole, opening = (
        training.tokenize_answers(
            tokenizer,
            [{"prompt": "What is the heart?", "completion": "It is an organ.", **extra}],
            c,
            "train",
        )[0]
        for extra in ({}, {"opening_tokens": 3})
    )
    count = len(opening["input_ids"])
    supervised = [label for label in opening["labels"] if label != -100]
    assert len(supervised) == 3 and tokenizer.eos_token_id not in supervised
    assert opening["input_ids"] == whole["input_ids"][:count]
    assert opening["labels"] == whole["labels"][:count]
    assert count == len(whole["input_ids"]) - sum(x != -100 for x in whole["labels"]) + 3


def test_pad_takes_a_spare_row_and_is_not_eos(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) <= 640
    assert tokenizer("a")["input_ids"] == models.encode(tokenizer, "a"), "a BOS was added"


def test_steps_keep_their_rows_and_waste_less_padding():
    rows = [{"input_ids": [0] * (1 + (7 * n) % 40)} for n in range(50)]
    section = config("phi-2.yaml", instruction={"batch_size": 2, "gradient_accumulation": 4})
    ordered = training.order_by_length(rows, section.instruction)

    def lengths(found):
        return [len(r["input_ids"]) for r in found]

    def padding(found):
        pairs = [lengths(found)[i : i + 2] for i in range(0, len(found), 2)]
        return sum(max(p) * len(p) - sum(p) for p in pairs)

    for start in range(0, 50, 8):
        same = slice(start, start + 8)
        assert sorted(lengths(ordered[same])) == sorted(lengths(rows[same]))
    assert padding(ordered) < 0.6 * padding(rows)


def test_no_spare_row_is_an_error(tiny_phi):
    from transformers import AutoTokenizer

    rows = len(AutoTokenizer.from_pretrained(tiny_phi))
    with pytest.raises(UserError, match="no spare row"):
        models.load_tokenizer(str(tiny_phi), config("phi-2.yaml").prompt, rows)


def test_packed_documents_are_ended_and_fully_supervised(tokenizer, tmp_path):
    c = config("phi-2.yaml", domain={"max_length": 16}, data={"cache_dir": str(tmp_path / "cache")})
    rows = [{"text": f"The heart affects the lung and brings pain {n}."} for n in range(20)]
    directory = tmp_path / "data"
    (directory / "domain").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "domain/train.jsonl").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    manifest = {"model_type": "phi2", "files": {"domain/train.jsonl": digest}}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    stream = training.token_stream(tokenizer, directory, "train", c)
    plain = [i for r in rows for i in models.encode(tokenizer, r["text"] + "<|endoftext|>")]
    assert stream.tolist() == plain and plain.count(tokenizer.eos_token_id) == 20
    packed = training.packed_dataset(training.document_blocks(stream, c))
    assert all(len(b["input_ids"]) == 16 and b["labels"] == b["input_ids"] for b in packed)
    assert sum(packed["input_ids"], []) == plain[: len(packed) * 16]
    # The second time it comes from the cache; other texts or another end are not mixed up with it.
    (directory / "domain/train.jsonl").unlink()
    assert training.token_stream(tokenizer, directory, "train", c).tolist() == plain
    (directory / "manifest.json").write_text(
        json.dumps({**manifest, "files": {"domain/train.jsonl": "0" * 64}})
    )
    with pytest.raises(UserError, match="missing from the prepared data"):
        training.token_stream(tokenizer, directory, "train", c)


def test_padding_in_a_batch_is_masked_and_the_end_is_not(tokenizer):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    c = config("phi-2.yaml")
    rows = [
        training.tokenize_pair(tokenizer, c, "a", answer, 64) for answer in ("b", "b b b b b b")
    ]
    batch = DataCollatorForLanguageModeling(tokenizer.pad_token_id)(rows)
    for ids, labels, source in zip(batch["input_ids"], batch["labels"], rows, strict=True):
        length = len(source["input_ids"])
        assert labels[length:].eq(-100).all() and ids[length:].eq(tokenizer.pad_token_id).all()
        assert labels[length - 1] == tokenizer.eos_token_id
