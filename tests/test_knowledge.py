"""Multiple choice by log-likelihood: choices, baselines, and the model's part in it."""

from __future__ import annotations

import pytest
from conftest import CACHE, ROOT

from liteguard.config import build, read_yaml
from liteguard.embedded import public_benchmarks
from liteguard.evaluation import knowledge
from liteguard.evaluation.answerers import Checkpoint


def row(name: str, question: str, options: list[str], answer: int, context: str = "") -> dict:
    return {
        "set": name,
        "identifier": question,
        "prompt": question,
        "context": context,
        "options": options,
        "answer": answer,
    }


ROWS = [
    row("medmcqa", "What thins blood?", ["Warfarin", "Iron", "Salt"], 0),
    row("medmcqa", "Which organ filters blood?", ["The kidney filters blood", "Skin"], 1),
    row("pubmedqa", "Does it help?", ["yes", "no", "maybe"], 2, "It was tried. Nobody knows."),
]


def test_pairs_are_lm_evals():
    assert knowledge.pairs(ROWS)[:2] == [
        ("Question: What thins blood?\nAnswer:", " Warfarin"),
        ("Question: What thins blood?\nAnswer:", " Iron"),
    ]
    abstract = "Abstract: It was tried. Nobody knows.\nQuestion: Does it help?\nAnswer:"
    assert knowledge.pairs(ROWS)[-1] == (abstract, " maybe")


def test_literal_scores_give_literal_numbers():
    # Per byte: -8/8 = -1, -6/4 = -1.5, -2/4 = -0.5 | -24/24 = -1, -8/4 = -2 | by the sum alone.
    scores = [-8.0, -6.0, -2.0, -24.0, -8.0, -3.0, -1.0, -2.0]
    assert knowledge.choices(ROWS, scores) == [2, 0, 1]
    better = [-3.0, -6.0, -3.0, -24.0, -3.0, -3.0, -2.0, -1.0]
    assert knowledge.choices(ROWS, better) == [0, 1, 2]
    # An option that was too long for a bundle: the row has no choice, the others keep theirs.
    assert knowledge.choices(ROWS, [None, *better[1:]]) == [None, 1, 2]
    lost = {"set": "medmcqa", "identifier": "x:3", "prompt": "", "options": [], "unparsed": "why"}
    found = knowledge.summarise(
        [*ROWS[:2], lost, ROWS[2]], [-3.0, *better[1:4], -12.0, *scores[5:]]
    )
    own = found["medmcqa"]
    assert own["accuracy"] == pytest.approx(1 / 3) and own["n"] == 3 and own["unparsed"] == 1
    assert own["interval"] == pytest.approx((0.0615, 0.7923), abs=1e-4)
    assert own["chance"] == pytest.approx((1 / 3 + 1 / 2) / 3)
    assert own["majority"] == pytest.approx(1 / 3)
    # "The kidney filters blood" shares two words with its question and is wrong; in the first
    # question no option shares any, so one of three is drawn.
    assert own["overlap"] == pytest.approx((1 / 3 + 0) / 3)
    assert own["choices"] == [
        ["What thins blood?", 0, 0],
        [ROWS[1]["prompt"], 0, 1],
        ["x:3", None, None],
    ]
    assert found["pubmedqa"]["accuracy"] == 0 and found["pubmedqa"]["n"] == 1
    twice = row("medqa", "Which?", ["A drug", "A drug", "Rest"], 1)
    assert knowledge.summarise([twice], [-1.0, -1.0, -9.0])["medqa"]["repeated_options"] == 1


def test_rows_are_a_fixed_sample_and_unreadable_ones_are_in_it(monkeypatch):
    few, more = knowledge.rows(CACHE, 5), knowledge.rows(CACHE, 9)
    assert len(few) == 20 and len(more) == 36 and knowledge.rows(CACHE, 0) == []
    for name in public_benchmarks.MULTIPLE_CHOICE:
        own = [r for r in more if r["set"] == name]
        assert [r for r in few if r["set"] == name] == own[:5]
    assert len(knowledge.rows(CACHE, None)) == 1273 + 4183 + 500 + 1089
    parse = public_benchmarks._parse

    def broken(name, benchmark, identifier, found):
        if identifier == few[0]["identifier"]:
            raise ValueError("no options")
        return parse(name, benchmark, identifier, found)

    monkeypatch.setattr(public_benchmarks, "_parse", broken)
    again = knowledge.rows(CACHE, 5)
    assert [r["identifier"] for r in again] == [r["identifier"] for r in few]
    assert "no options" in again[0]["unparsed"] and again[0]["options"] == []


@pytest.fixture(scope="module")
def checkpoint(tiny_phi):
    values = {"model": {"path": str(tiny_phi)}}
    return Checkpoint(build([("phi", read_yaml(ROOT / "configs/phi-2.yaml")), ("t", values)]), None)


def test_accuracy_on_a_benchmark_is_that_of_a_plain_loop(checkpoint):
    """Real questions, one forward pass per option and the arithmetic written out."""
    import torch

    rows = [r for r in knowledge.rows(CACHE, 6) if r["set"] in ("medmcqa", "pubmedqa")]
    pairs = knowledge.pairs(rows)
    scored = dict(checkpoint.score(pairs))
    expected = []
    for r in rows:
        values = []
        for option in r["options"]:
            asked = f"Question: {r['prompt']}\nAnswer:"
            asked = f"Abstract: {r['context']}\n{asked}" if r["context"] else asked
            context = checkpoint.tokenizer(asked)["input_ids"]
            target = checkpoint.tokenizer(f" {option}")["input_ids"]
            with torch.no_grad():
                logits = checkpoint.model(torch.tensor([context + target])).logits[0].double()
            total = 0.0
            for place, token in enumerate(target, len(context)):
                total += logits[place - 1].log_softmax(-1)[token].item()
            index = len(expected)
            assert scored[index][0] == pytest.approx(total, rel=1e-3, abs=1e-3)
            assert scored[index][1] == len(target)
            expected.append(total)
            values.append(total if r["context"] else total / len(option.encode("utf-8")))
        r["expected"] = max(range(len(values)), key=values.__getitem__)
    summary = knowledge.summarise(rows, [scored[i][0] for i in range(len(pairs))])
    for name in ("medmcqa", "pubmedqa"):
        own = [r for r in rows if r["set"] == name]
        hits = sum(r["expected"] == r["answer"] for r in own)
        assert summary[name]["accuracy"] == hits / len(own)


def test_a_context_is_computed_once_for_all_options(checkpoint, monkeypatch):
    question = "Question: " + "The heart affects the lung and brings pain. " * 5 + "\nAnswer:"
    pairs = [(question, f" {organ} pain disease") for organ in ("heart", "skin", "lung", "eye")]
    alone = [dict(checkpoint.score([pair]))[0] for pair in pairs]
    lengths = []
    forward = checkpoint.model.forward

    def counted(ids=None, **arguments):
        ids = arguments.pop("input_ids", ids)
        lengths.append(ids.numel())
        return forward(input_ids=ids, **arguments)

    monkeypatch.setattr(checkpoint.model, "forward", counted)
    together = dict(checkpoint.score(pairs))
    size = len(checkpoint.tokenizer(question)["input_ids"])
    assert lengths[0] == size and sum(lengths) < 2 * size
    for index, (total, count) in enumerate(alone):
        assert together[index][0] == pytest.approx(total, rel=1e-4) and together[index][1] == count


def test_a_planted_answer_wins(checkpoint):
    """What the model says by itself is chosen over the same words in another order, wherever it
    stands."""
    question = "What is the heart pain disease a?"
    prompt = f"Question: {question}\nAnswer:"
    said = dict(checkpoint.generate([prompt], 24))[0].text
    words = said.split()
    assert len(set(words)) > 4
    wrong = [" ".join(words[::-1]), " ".join(sorted(words)), "Zebra quiz"]
    for place in range(4):
        options = [*wrong[:place], said, *wrong[place:]]
        found = row("medqa", question, options, place)
        scores = dict(checkpoint.score(knowledge.pairs([found])))
        summary = knowledge.summarise([found], [scores[i][0] for i in range(4)])
        assert summary["medqa"]["accuracy"] == 1
