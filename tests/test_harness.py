"""A bundle in the lm-evaluation-harness: likelihoods and answers are the bundle's own."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
from conftest import fail

from liteguard.errors import UserError
from liteguard.runtime.bundle import Bundle

PROMPT = "Instruct: What is the heart pain disease a?\nOutput:\n"


@pytest.fixture(scope="module", autouse=True)
def environment():
    """The harness sets variables when it is imported, and warm.py's processes have others."""
    before = {**os.environ}
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def path(pipeline):
    return pipeline / "liteguard_tiny.litertlm"


@pytest.fixture(scope="module")
def model(path):
    from liteguard.runtime.harness import BundleLM

    return BundleLM(str(path))


def asked(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


def test_likelihoods_are_the_bundles_own(model, path):
    with Bundle(path) as device:
        answer = device.generate(PROMPT, 4).text
        other = " zebra"
        ids = {text: device.tokenize(text) for text in (PROMPT.rstrip(), "\n" + answer, other)}
        wanted = [
            device.score(PROMPT.rstrip(), "\n" + answer)[0],
            device.score(PROMPT.rstrip(), other)[0],
        ]
        alone = device.score("<|endoftext|>", "The heart")[0]
    found = model.loglikelihood(
        asked((PROMPT, answer), (PROMPT.rstrip(), other), ("", "The heart"))
    )
    assert [likelihood for likelihood, _ in found] == pytest.approx([*wanted, alone], abs=1e-3)
    assert not found[1][1] and ids
    # What the bundle answers is what it finds likeliest, after the blanks that stood before it.
    (_, greedy), *_ = model._follow(
        [(model.workers.tokenize([PROMPT])[0], model.workers.tokenize([answer])[0])]
    )
    assert greedy


def test_a_model_with_a_bos_has_it_before_every_context(model, monkeypatch):
    """Without it, likelihoods of a Gemma are those of another model, and its bundle refuses."""
    end = "<|endoftext|>"
    monkeypatch.setattr(model, "prompt", model.prompt.model_copy(update={"bos_token": end}))
    ids = model.workers.tokenize(["The heart", "The heart hurts."])
    bos = model.workers.tokenize([end])[0]
    wanted = model._follow([(bos + ids[0], ids[1][len(ids[0]) :])])
    for context in ("The heart", f"{end}The heart"):
        assert model.loglikelihood(asked((context, " hurts."))) == wanted
    given = []
    monkeypatch.setattr(model.workers, "generate", lambda prompts, *_: given.extend(prompts) or ())
    model.generate_until(asked(("Why?", {})))
    assert given == [f"{end}Why?"]


def test_a_context_that_is_too_long_loses_its_beginning(model):
    long = "The heart affects the lung and brings pain. " * 80
    ((cut, _),) = model.loglikelihood(asked((long, "Rest.")))
    ids = model.workers.tokenize([long.rstrip(), long + "Rest."])
    targets = ids[1][len(ids[0]) :]
    assert len(ids[0]) > model.room
    ((own, _),) = model._follow([(ids[0][-(model.room - len(targets)) :], targets)])
    assert cut == pytest.approx(own, abs=1e-6)
    with pytest.raises(UserError, match="does not fit the bundle's KV cache"):
        model.loglikelihood(asked(("a", long)))


def scripted(bos: str, room: int = 10):
    """A model whose tokens are characters, and the pairs that its workers are given."""
    from liteguard.prompts import Prompt
    from liteguard.runtime.harness import BundleLM

    given = []

    def follow(pairs):
        given.extend(pairs)
        return ((n, (-1.0 * len(targets), True)) for n, (_, targets) in enumerate(pairs))

    def tokenize(texts):
        return [[ord(char) for char in text] for text in texts]

    model = BundleLM.__new__(BundleLM)
    model.workers = SimpleNamespace(follow=follow, tokenize=tokenize)
    model.prompt, model.room = Prompt(bos_token=bos, end_token="$"), room
    model.start = [ord(bos or "$")]
    return model, given


@pytest.mark.parametrize(("bos", "kept"), [("^", "^cdefghi"), ("", "bcdefghi")])
def test_a_context_that_is_cut_keeps_its_bos(capsys, bos, kept):
    model, given = scripted(bos)
    model.loglikelihood(asked(("abcdefghi", "xy"), ("ab", "xy"), ("ab", "123456789")))
    texts = ["".join(map(chr, context)) for context, _ in given]
    assert texts[:2] == [kept, f"{bos}ab"]
    assert texts[2] == (bos or "b"), "one place is left"
    assert "2 of 3 contexts lose their beginning" in capsys.readouterr().out


@pytest.mark.parametrize("bos", ["^", ""])
def test_every_window_of_a_text_begins_with_the_bos(bos):
    model, given = scripted(bos)
    text = "abcdefghijklmnopqrstuvwxyz"
    assert model.loglikelihood_rolling(asked((text,))) == [-26.0]
    contexts = ["".join(map(chr, context)) for context, _ in given]
    assert contexts[0] == (bos or "$") and len(contexts) > 2
    assert all(context.startswith(bos) and context != bos for context in contexts[1:])
    assert "".join(chr(t) for _, targets in given for t in targets) == text
    assert all(len(context) + len(targets) <= model.room for context, targets in given)


def test_a_whole_text_is_scored_in_pieces(model, monkeypatch):
    text = "The heart affects the lung and brings pain."
    (whole,) = model.loglikelihood_rolling(asked((text,)))
    ids = model.workers.tokenize([text])[0]
    ((wanted, _),) = model._follow([(model.start, ids)])
    assert whole == pytest.approx(wanted, abs=1e-3)
    monkeypatch.setattr(model, "room", len(ids) // 2 + 2)
    (pieces,) = model.loglikelihood_rolling(asked((text,)))
    assert pieces < 0 and pieces != pytest.approx(whole, abs=1e-3), "one piece"


def test_answers_end_where_a_task_says(model):
    (plain,) = model.generate_until(asked((PROMPT, {"until": [], "max_gen_toks": 12})))
    word = plain.split()[1]
    (cut,) = model.generate_until(asked((PROMPT, {"until": [word], "max_gen_toks": 12})))
    assert cut == plain.split(word)[0] and word not in cut
    with pytest.raises(UserError, match="take do_sample out"):
        model.generate_until(asked((PROMPT, {"do_sample": True, "temperature": 0.7})))


def test_a_task_of_the_harness_runs(model, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [{"q": "What is the heart?", "options": ["an organ", "a zebra"], "gold": 0}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}\\nAnswer:"\ndoc_to_choice: options\ndoc_to_target: gold\n'
        "metric_list: [{metric: acc}]\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=["own"], task_manager=manager)
    assert found["results"]["own"]["acc,none"] in (0.0, 1.0)


def test_a_missing_bundle_is_named():
    message = fail(2, "-m", "liteguard.runtime.harness", "--bundle", "none.task", "--tasks", "x")
    assert "none.task" in message
