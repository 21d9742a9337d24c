"""Evaluation arithmetic against plain computations on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ORGANS, ROOT, diseases, fail, succeed

from liteguard.config import build, read_yaml
from liteguard.evaluation.answerers import Checkpoint, Generated


@pytest.fixture(scope="module")
def checkpoint(tiny_phi):
    values = {"model": {"path": str(tiny_phi)}, "evaluate": {"batch_size": 3}}
    return Checkpoint(build([("phi", read_yaml(ROOT / "configs/phi-2.yaml")), ("t", values)]), None)


def test_score_is_the_sum_of_log_likelihoods(checkpoint):
    import torch

    ids = checkpoint.tokenizer("The heart affects", return_tensors="pt")["input_ids"]
    context = checkpoint.tokenizer("The")["input_ids"]
    others = [("The", " skin"), ("The heart", " affects the lung and brings pain."), ("The", " x")]
    pairs = [*others, ("The", " heart affects")]
    scores = dict(checkpoint.score(pairs))
    assert sorted(scores) == [0, 1, 2, 3]
    total, count = scores[3]
    with torch.no_grad():
        log_probabilities = checkpoint.model(ids).logits[0].log_softmax(-1)
    expected = sum(
        log_probabilities[i - 1, ids[0, i]].item() for i in range(len(context), ids.shape[1])
    )
    assert total == pytest.approx(expected, rel=1e-4) and count == ids.shape[1] - len(context)


def test_one_thread_and_several_lanes(checkpoint, monkeypatch):
    """OMP_NUM_THREADS=1 on two cores: half a thread each is one."""
    import torch

    pairs = [("The", " skin"), ("The heart", " affects the lung and brings pain." * 3)]
    expected = dict(checkpoint.score(pairs))
    threads = torch.get_num_threads()
    monkeypatch.setattr(checkpoint, "lanes", 2)
    torch.set_num_threads(1)
    try:
        found = dict(checkpoint.score(pairs))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    for index, (total, count) in expected.items():
        assert found[index] == (pytest.approx(total, rel=1e-4), count)


def plain_answer(checkpoint, prompt, limit):
    """Transformers' own greedy generation of one prompt."""
    import torch

    ids = torch.tensor([checkpoint.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    output = checkpoint.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=checkpoint.stop_ids,
        pad_token_id=checkpoint.tokenizer.pad_token_id,
    )[0, ids.shape[1] :].tolist()
    stopped = output[-1] in checkpoint.stop_ids
    text = checkpoint.tokenizer.decode(output, skip_special_tokens=True).strip()
    return Generated(text, len(output), stopped)


def test_batched_answers_equal_single_ones(checkpoint, monkeypatch):
    questions = [
        "What is the heart pain disease a?",
        "What is the x?",
        "What is the skin rash disease b?",
        "Why?",
    ]
    prompts = [checkpoint.prompt.render_question(q) for q in questions]
    batched = dict(checkpoint.generate(prompts, 40))
    assert sorted(batched) == [0, 1, 2, 3]
    for index, prompt in enumerate(prompts):
        assert batched[index] == plain_answer(checkpoint, prompt, 40)
    assert any(answer.stopped for answer in batched.values())
    assert len({answer.tokens for answer in batched.values()}) > 1, "rows end at different steps"
    assert all("<|" not in answer.text for answer in batched.values())
    monkeypatch.setattr(checkpoint, "row_tokens", 1)
    assert dict(checkpoint.generate(prompts, 40)) == batched, "room for one row at a time"


def test_refusal_benchmark_ranks_by_the_first_token(pipeline, tmp_path):
    """The printed rates agree with greedy first tokens computed here."""
    import torch

    from liteguard import checkpoints, merged, models
    from liteguard.config import validate
    from liteguard.rows import load_split

    printed = succeed(ROOT / "benchmarks/bench_refusal.py", "final_checkpoint", cwd=pipeline)
    cells = printed.splitlines()[-1].split()
    record = checkpoints.read_stage(pipeline / "final_checkpoint")
    own = validate(record.config, "test")
    model, tokenizer = merged.load_merged(own, pipeline / "final_checkpoint")
    starts = {models.encode(tokenizer, word)[0] for word in ("I", "Sorry")}
    rows = load_split(pipeline / record.data_dir, "preference", "validation")
    refused = []
    for row in [r for r in rows if r["kind"] == "harmful"][:180]:
        ids = models.encode(tokenizer, own.prompt.render_question(row["prompt"]))
        with torch.no_grad():
            refused.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()) in starts)
    assert cells[0] == "final_checkpoint" and 0 <= float(cells[1]) <= 1
    at_5, at_10 = (int(cell.rstrip("%")) for cell in cells[2:4])
    assert at_5 <= at_10, "a stricter line refuses no more"
    assert cells[5] == f"{sum(refused) / len(refused):.0%}"

    # The same rows as a file of requests: the same line, whatever their order.
    kinds = {"harmful": 180, "ordinary": 90, "borderline": 90}
    asked = [
        {"kind": kind, "prompt": row["prompt"]}
        for kind, count in kinds.items()
        for row in [r for r in rows if r["kind"] == kind][:count]
    ]
    lines = [json.dumps(row) for row in reversed(asked)]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines), encoding="utf-8")
    flag = ("--requests", tmp_path / "requests.jsonl")
    again = succeed(ROOT / "benchmarks/bench_refusal.py", "final_checkpoint", *flag, cwd=pipeline)
    assert again.splitlines()[-1].split() == cells


@pytest.mark.parametrize(
    "line, told",
    [
        ('{"kind": "harmful"}', "line 2: not a request"),
        ('{"kind": "rude", "prompt": "Hello"}', "harmful, ordinary, borderline"),
        ('{"kind": "ordinary", "prompt": "Hello"}', "no harmful request"),
    ],
)
def test_refusal_benchmark_names_a_bad_line_of_requests(tmp_path, line, told):
    path = tmp_path / "requests.jsonl"
    path.write_text('{"kind": "borderline", "prompt": "Hello"}\n' + line, encoding="utf-8")
    assert told in fail(2, ROOT / "benchmarks/bench_refusal.py", "none", "--requests", path)
    missing = tmp_path / "none.jsonl"
    assert "no such file" in fail(
        2, ROOT / "benchmarks/bench_refusal.py", "none", "--requests", missing
    )


def test_a_rate_ten_times_too_high_gets_do_not_ship(pipeline, tiny_config, tmp_path):
    """The base answers questions about diseases of all organs. Stage 2 on those of three leaves it
    able to, and at ten times the rate it does not: the verdict says so on rows of other hands."""

    def written(name: str, rows: list[dict]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    trained = [row for row in diseases() if row["entity"].split()[0] in ORGANS[:3]]
    asked = [row for row in diseases() if row not in trained][::7]
    keys = ("prompt", "completion", "entity")
    source = written("trained.jsonl", [{key: row[key] for key in keys} for row in trained])
    flags = ("--sets", f"asked={written('asked.jsonl', asked)}:questions")
    data = tmp_path / "data"
    given = ("--config", tiny_config, "--set", f"data.instruction.0.path={source}")
    succeed(ROOT / "prepare_datasets.py", *given, "--output", data, cwd=pipeline)

    def judged(rate: float) -> tuple[str, list[str]]:
        """(verdict, what stands against it of the questions) after stages 2 and 3."""
        folder = tmp_path / str(rate)
        steps = [f"instruction.{name}=18" for name in ("max_steps", "eval_steps", "save_steps")]
        stages = {
            "instruction": ("domain_checkpoint", [f"instruction.learning_rate={rate}", *steps]),
            "safety": (folder / "instruction", []),
        }
        for stage, (parent, settings) in stages.items():
            command = ["--checkpoint", parent, "--data", data, "--output", folder / stage]
            for setting in settings:
                command += ["--set", setting]
            succeed(ROOT / f"train_{stage}.py", *command, cwd=pipeline)
        command = ["--base", "--checkpoint", folder / "safety", "--data", data, *flags]
        command += ["--set", "evaluate.question_rows=40", "--output", folder]
        succeed(ROOT / "evaluate_model.py", *command, cwd=pipeline)
        compare = ("--output", folder, "--compare", "base", "final")
        said = succeed(ROOT / "evaluate_model.py", *compare, cwd=pipeline)
        lines = said[said.index("Verdict:") :].splitlines()
        measures = ("  no  asked: perplexity", "  no  asked: ROUGE-1")
        return lines[0], [line for line in lines if line.startswith(measures)]

    assert judged(5e-3)[1] == []
    verdict, against = judged(5e-2)
    assert verdict.startswith("Verdict: DO NOT SHIP") and len(against) == 2


def test_bundle_scores_what_the_checkpoint_scores(pipeline):
    """Teacher-forced through the TFLite model, prefill and decode; no trace of earlier texts."""
    from liteguard import checkpoints
    from liteguard.config import validate
    from liteguard.runtime.bundle import Bundle

    record = checkpoints.read_stage(pipeline / "final_checkpoint")
    own = validate(record.config, "test")
    reference = Checkpoint(own, pipeline / "final_checkpoint")
    pairs = [
        ("The", " heart affects the lung and brings pain."),
        ("The heart affects the lung and brings pain. " * 9 + "The", " skin affects it."),
    ]
    with Bundle(pipeline / "liteguard_tiny.task") as bundle:
        scores = [bundle.score(*pair) for pair in pairs]
        assert [bundle.score(*pair) for pair in reversed(pairs)] == scores[::-1]
        assert len(bundle.tokenize(pairs[1][0])) > 64, "longer than one prefill"
    expectations = dict(reference.score(pairs))
    for index, (pair, (total, count)) in enumerate(zip(pairs, scores, strict=True)):
        expected, tokens = expectations[index]
        assert count == tokens
        assert total == pytest.approx(expected, rel=0.02), pair
