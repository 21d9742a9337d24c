"""The prompt object: one text in training, in the chat template and in the loss mask."""

from __future__ import annotations

import hashlib
import json

import pytest
from conftest import ROOT

from liteguard import models
from liteguard.config import build, read_yaml
from liteguard.errors import UserError
from liteguard.training import tokens

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


def prepared(directory, part: str, rows: list[dict], split: str = "train"):
    """A data directory with one split of one part, which holds `rows`."""
    (directory / part).mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / f"{part}/{split}.jsonl").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    manifest = {"model_type": "phi2", "files": {f"{part}/{split}.jsonl": digest}}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def answers(tokenizer, tmp_path, rows, prompt=None, **section):
    """(ids, labels) of instruction rows, as lists."""
    cache = {"cache_dir": str(tmp_path / "cache")}
    own = {"prompt": prompt.model_dump()} if prompt else {}
    c = config("phi-2.yaml", data=cache, instruction=section, **own)
    found = tokens.answers(tokenizer, prepared(tmp_path, "instruction", rows), "train", c)
    return [tuple(array.tolist() for array in found.row(i)) for i in range(len(found))]


ORGAN = {"prompt": "What is the heart?", "completion": "It is an organ."}


def test_mask_token_by_token(tokenizer, tmp_path):
    [(ids, labels)] = answers(tokenizer, tmp_path, [ORGAN])
    supervised = [i for i, label in zip(ids, labels, strict=True) if label != -100]
    hidden = [i for i, label in zip(ids, labels, strict=True) if label == -100]
    assert tokenizer.decode(supervised) == "It is an organ.<|endoftext|>"
    assert tokenizer.decode(hidden) == "Instruct: What is the heart?\nOutput:\n"
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))


def test_truncation_cuts_the_question_never_the_end_token(tokenizer, tmp_path):
    long = {**ORGAN, "prompt": "word " * 200}
    # Of more than one row in a hundred it is an error, see test_conversations.py.
    ids, labels = answers(tokenizer, tmp_path, [*[ORGAN] * 99, long], max_length=30)[-1]
    assert len(ids) == 30 and labels[0] == -100
    assert labels[-1] == tokenizer.eos_token_id == ids[-1]
    assert tokenizer.decode(ids).endswith("Output:\nIt is an organ.<|endoftext|>")


def test_rows_without_room_for_their_answer_are_counted(tokenizer, tmp_path, capsys):
    far_too_long = {"prompt": "short", "completion": "word " * 200}
    rows = [ORGAN] * 199 + [far_too_long]
    assert len(answers(tokenizer, tmp_path, rows, max_length=30)) == 199
    assert "1 of 200 rows dropped" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"10 of 100 .* answer longer than instruction.max_length"):
        answers(tokenizer, tmp_path, [ORGAN] * 90 + [far_too_long] * 10, max_length=30)


def test_an_opening_is_cut_and_has_no_end_token(tokenizer, tmp_path):
    whole, opening = answers(tokenizer, tmp_path, [ORGAN, {**ORGAN, "opening_tokens": 3}])
    supervised = [label for label in opening[1] if label != -100]
    assert len(supervised) == 3 and tokenizer.eos_token_id not in supervised
    count = len(opening[0])
    assert opening[0] == whole[0][:count] and opening[1] == whole[1][:count]
    assert count == len(whole[0]) - sum(x != -100 for x in whole[1]) + 3


def test_where_a_cut_answer_ends_is_not_learnt(tokenizer, tmp_path):
    whole, cut = answers(tokenizer, tmp_path, [ORGAN, {**ORGAN, "open_ended": True}])
    assert whole[0][-1] == tokenizer.eos_token_id
    assert cut[0] == whole[0][:-1] and cut[1] == whole[1][:-1]


def test_pad_takes_a_spare_row_and_is_not_eos(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) <= 640
    assert tokenizer("a")["input_ids"] == models.encode(tokenizer, "a"), "a BOS was added"


def test_no_spare_row_is_an_error(tiny_phi):
    from transformers import AutoTokenizer

    rows = len(AutoTokenizer.from_pretrained(tiny_phi))
    with pytest.raises(UserError, match="no spare row"):
        models.load_tokenizer(str(tiny_phi), config("phi-2.yaml").prompt, rows)


def test_documents_are_ended_and_every_token_is_a_target_once(tokenizer, tmp_path):
    c = config("phi-2.yaml", domain={"max_length": 16}, data={"cache_dir": str(tmp_path / "cache")})
    rows = [{"text": "The heart affects the lung and brings pain." + " 1" * n} for n in range(20)]
    directory = prepared(tmp_path / "data", "domain", rows)
    found = tokens.documents(tokenizer, directory, "train", c)
    pieces = [found.row(i)[0].tolist() for i in range(len(found))]
    assert max(map(len, pieces)) <= 16 and len(pieces) > 20
    assert all(found.row(i)[1].tolist() == pieces[i] for i in range(len(pieces)))
    whole = [models.encode(tokenizer, row["text"] + "<|endoftext|>") for row in rows]
    # The first token of a piece has nothing before it; it is the last one of the piece before.
    targets = [token for piece in pieces for token in piece[1:]]
    assert targets == [token for text in whole for token in text[1:]]
    assert found.supervised.sum() == len(targets)
    assert targets.count(tokenizer.eos_token_id) == 20
    # The second time it comes from the cache; texts that were changed or are gone do not.
    again = tokens.documents(tokenizer, directory, "train", c)
    assert [again.row(i)[0].tolist() for i in range(len(again))] == pieces
    manifest = {"model_type": "phi2", "files": {"domain/train.jsonl": "0" * 64}}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="changed after it was prepared"):
        tokens.documents(tokenizer, directory, "train", c)
    (directory / "domain/train.jsonl").unlink()
    with pytest.raises(UserError, match="missing from the prepared data"):
        tokens.documents(tokenizer, directory, "train", c)
