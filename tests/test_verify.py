"""The proof of a bundle: each step is broken on purpose, and must be named."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, fail, succeed

from liteguard.config import RECIPES, Config, VerifySection, build, read_yaml
from liteguard.errors import UserError, WorkError
from liteguard.export import (
    measured,
    merge,
    possible,
    quantization,
    silence,
    tflite,
    tokenizer,
    verify,
)
from liteguard.export.bundle import write_litertlm, write_task
from liteguard.prompts import Prompt
from liteguard.runtime.bundle import Bundle
from liteguard.runtime.container import tflite_model
from liteguard.runtime.streaming import StreamedBundle
from liteguard.runtime.workers import BundleWorkers


@pytest.fixture(scope="module")
def parts(pipeline, tmp_path_factory) -> dict:
    """What the tiny bundle was made of: config, samples, merged model, TFLite, tokenizer."""
    work = tmp_path_factory.mktemp("parts")
    record = json.loads((pipeline / "liteguard_tiny.task.json").read_text())
    config = Config.model_validate(record["config"])
    merged = work / "merged"
    final = pipeline / "final_checkpoint"
    merge.merge_adapter(Path(config.model.path), final, merged, config.prompt)
    report = tokenizer.build_sentencepiece(merged, work / "tokenizer.model")
    task = pipeline / "liteguard_tiny.task"
    (work / "model.tflite").write_bytes(bytes(tflite_model(task)))
    return {
        "record": record,
        "config": config,
        "samples": measured.collect_samples(
            config, pipeline / record["data_dir"], own_tokenizer(merged)
        ),
        "merged": merged,
        "data": pipeline / record["data_dir"],
        "tflite": work / "model.tflite",
        "tokenizer": work / "tokenizer.model",
        "replaced": report.replaced,
        "silence": silence.Silence.of(report, merged),
        "work": work,
    }


def own_tokenizer(merged: Path):
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(merged / "tokenizer.json"))


def prove(parts: dict, task: Path) -> dict:
    return verify.verify_bundle(
        task,
        parts["merged"],
        parts["config"],
        parts["samples"],
        replaced=parts["replaced"],
        silence=parts["silence"],
        work=parts["work"],
        recipe="int8",
        say=lambda line: None,
    )


def make(parts: dict, path: Path, **changed) -> Path:
    """The tiny bundle again, with one part changed."""
    chosen = {"tflite": parts["tflite"], "tokenizer": parts["tokenizer"]} | changed
    prompt = chosen.get("prompt", parts["config"].prompt)
    write_task(chosen["tflite"], chosen["tokenizer"], prompt, path)
    return path


def test_the_pipelines_bundles_were_proven(pipeline, parts):
    """--verify full: both containers, the float model and the 8-bit one."""
    record = parts["record"]
    steps = [step["step"] for step in record["verify"]["steps"]]
    assert steps == [
        *["opens", "stop tokens", "prompt", "conversation", "empty message", "system message"],
        "second message",
        *["opens", "stop tokens", "prompt", "conversation", "empty message"],
        "tokenizer",
        "text survives",
        *["prompt lengths", "too long a message", "fills its cache"],
        *(
            f"{name}{label}"
            for label in (" of float TFLite", "")
            for name in (
                *("perplexity", "clean text", "greedy agreement", "stops", "refusals"),
                *("drawn answers", "drawn refusals"),
            )
        ),
        "speed",
    ]
    assert all(step["passed"] for step in record["verify"]["steps"])
    assert abs(record["verify"]["float"]["perplexity_change"]) < 1e-3
    assert record["verify"]["float"]["agree_16"] == 1
    assert record["verify"]["speed"]["decode_tok_s"] > 0
    log = json.loads((pipeline / "logs.json").read_text())["compress"]
    assert "greedy agreement" in log and "tolerance" in log
    for name in ("liteguard_tiny.task", "liteguard_tiny.litertlm"):
        assert (pipeline / f"{name}.json").is_file() and (pipeline / name).is_file()


def test_deploy_json_says_what_an_app_needs(pipeline, parts):
    from liteguard.checkpoints import sha256_file

    facts = json.loads((pipeline / "liteguard_tiny.deploy.json").read_text())
    for name, entry in facts["bundles"].items():
        assert entry["sha256"] == sha256_file(pipeline / name)
        assert entry["bytes"] == (pipeline / name).stat().st_size
    assert len(facts["bundles"]) == 2
    assert facts["context_length"] == facts["conversation_tokens"] == 128
    assert facts["prefill_lengths"] == [1, 8, 64], "of [64] in the YAML"
    assert facts["runtime_cache_bytes"] > 100_000
    assert facts["base_model"] == "test/tiny-phi" and "licence" in facts
    prompt = Prompt(**facts["prompt"])
    assert facts["prompt_example"] == prompt.render_question("QUESTION")
    assert list(facts["stop_tokens"]) == prompt.stop_tokens
    assert facts["proof"] and facts["sampler"]["top_k"] == 1


def test_the_gallery_is_told_of_the_litertlm(pipeline):
    entry = json.loads((pipeline / "liteguard_tiny.gallery.json").read_text())["models"][0]
    assert entry["modelFile"] == "liteguard_tiny.litertlm"
    assert entry["sizeInBytes"] == (pipeline / "liteguard_tiny.litertlm").stat().st_size
    assert entry["defaultConfig"]["maxTokens"] == 128 and entry["defaultConfig"]["topK"] == 1


def test_where_no_task_can_be_made_the_litertlm_is(pipeline, monkeypatch, capsys):
    monkeypatch.chdir(pipeline)
    why = possible.Possible("the prompt has other ids in SentencePiece", "", "")
    monkeypatch.setattr(possible, "possible", lambda *_: why)
    main = runpy.run_path(str(ROOT / "compress_model.py"))["main"]
    command = ["compress_model.py", "--input", "final_checkpoint", "--output", "z.task"]
    monkeypatch.setattr("sys.argv", [*command, "--dry_run"])
    main()
    printed = capsys.readouterr().out
    assert "and write z.litertlm; proof" in printed
    assert "bundles: .litertlm only; no .task can be made: the prompt has other ids" in printed
    monkeypatch.setattr("sys.argv", [*command, "--only", "task", "--dry_run"])
    with pytest.raises(UserError, match="no .task can be made: the prompt has other ids"):
        main()


def test_both_containers_hold_the_same_model_but_for_what_a_task_cannot_show(
    pipeline, parts, tmp_path
):
    task, other = (
        bytes(tflite_model(pipeline / f"liteguard_tiny.{end}")) for end in ("task", "litertlm")
    )
    (tmp_path / "model.tflite").write_bytes(other)
    assert task != other and task[4:8] == b"TFL3"
    assert bytes(parts["silence"].copy_of(tmp_path / "model.tflite")) == task
    count = len(parts["silence"].factors)
    assert 0 < sum(a != b for a, b in zip(task, other, strict=True)) <= 4 * count
    assert parts["record"]["silence"] == {"silenced": count, "method": "bias"}


@pytest.mark.parametrize("end", ["task", "litertlm"])
def test_the_reference_is_silenced_where_its_bundle_is(end, pipeline, parts, monkeypatch):
    given = []

    def reference(*arguments):
        given.append(arguments[-1])
        raise WorkError("seen")

    monkeypatch.setattr(verify, "Reference", reference)
    with pytest.raises(WorkError, match="seen"):
        prove(parts, pipeline / f"liteguard_tiny.{end}")
    assert given == [parts["silence"] if end == "task" else None]


def test_a_silenced_reference_is_not_reused_for_one_that_is_not(parts, tmp_path):
    samples = measured.Samples([("Instruct: ", "What is it?")], [], [], [], 4)
    # Every token of the text is silenced.
    loud = parts["silence"]
    quiet = silence.Silence(dict.fromkeys(range(loud.rows), 0.01), loud.rows, loud.bias)
    arguments = parts["merged"], parts["config"].prompt, samples, tmp_path / "kept.jsonl"
    found = [
        measured.Reference(*arguments, silenced).measured(1).scores
        for silenced in (None, quiet, None)
    ]
    assert found[0] == found[2] != found[1]


def test_a_litertlm_is_evaluated_like_a_task(pipeline, tmp_path):
    succeed(
        ROOT / "evaluate_model.py",
        "--bundle",
        "liteguard_tiny.litertlm",
        "--output",
        tmp_path / "evaluation",
        cwd=pipeline,
    )
    one = json.loads((tmp_path / "evaluation/bundle.json").read_text())
    two = json.loads((pipeline / "evaluation/bundle.json").read_text())
    # Its model gives some probability to the tokens that the .task's never writes.
    assert two["perplexity"] < one["perplexity"] < 1.1 * two["perplexity"]


def test_options_of_one_question_are_scored_as_if_alone(pipeline):
    """The context's keys and values are kept between options, and nothing of an option is."""
    from liteguard.runtime.bundle import Bundle

    context, options = "Instruct: What is it?\nOutput:\n", [" a disease of the skin", " the eye"]
    path = pipeline / "liteguard_tiny.task"
    with Bundle(path) as bundle:
        together = [bundle.score(context, option) for option in [*options, options[0]]]
        other = bundle.score("Instruct: Who?\nOutput:\n", options[0])
        together.append(bundle.score(context, options[1]))
    alone = []
    for option in options:
        with Bundle(path) as bundle:
            alone.append(bundle.score(context, option))
    assert together == [alone[0], alone[1], alone[0], alone[1]]
    assert other != alone[0]


def test_options_of_one_question_go_to_one_process(pipeline, monkeypatch):
    """Its context is computed once, however many processes there are; numbers stay in their place,
    and what does not fit is left out."""
    from liteguard.runtime.workers import BundleWorkers

    calls: list[tuple[str, int]] = []
    given = BundleWorkers._map

    def counted(self, method, asked):
        calls.extend((method, len(call[-1])) for call in asked if method != "tokenize_all")
        return given(self, method, asked)

    monkeypatch.setattr(BundleWorkers, "_map", counted)
    one, two = "Instruct: What is it?\nOutput:\n", "Instruct: Who is it?\nOutput:\n"
    pairs = [(one, " a disease"), (one, " the eye " * 400), (one, " the skin"), (two, " a disease")]
    workers = BundleWorkers(pipeline / "liteguard_tiny.task", workers=2, threads=1)
    found = dict(workers.score(pairs, room=64))
    assert calls == [("score_all", 2), ("score_all", 1)]
    assert found[1] == (None, 0) and sorted(found) == [0, 1, 2, 3]
    alone = [dict(workers.score([pair], room=64))[0] for pair in pairs]
    assert [found[i] for i in range(4)] == alone
    assert alone[0] != alone[3]


def test_an_untouched_bundle_passes(parts, tmp_path):
    result = prove(parts, make(parts, tmp_path / "good.task"))
    assert result["tokenizer"]["identical"] == 1
    assert abs(result["bundle"]["perplexity_change"]) < 0.01


def test_a_wrong_stop_token_is_named(parts, tmp_path):
    # Another token of this vocabulary; everything else as in training.
    wrong = parts["config"].prompt.model_copy(
        update={"end_token": "<|pad|>", "document_end_token": "<|pad|>", "pad_token": "<|none|>"}
    )
    task = make(parts, tmp_path / "stop.task", prompt=wrong)
    with pytest.raises(WorkError, match="step 'stop tokens' left"):
        prove(parts, task)


def test_a_shuffled_vocabulary_is_named(parts, tmp_path):
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto.FromString(parts["tokenizer"].read_bytes())
    normal = [i for i, piece in enumerate(model.pieces) if piece.type == piece.NORMAL]
    # Two pieces that texts hold, "e" and "t", exchange their ids.
    one, two = (next(i for i in normal if model.pieces[i].piece == char) for char in "et")
    model.pieces[one].piece, model.pieces[two].piece = "t", "e"
    (tmp_path / "shuffled.model").write_bytes(model.SerializeToString())
    task = make(parts, tmp_path / "vocabulary.task", tokenizer=tmp_path / "shuffled.model")
    with pytest.raises(WorkError, match="step 'tokenizer' left"):
        prove(parts, task)


def test_a_swapped_prompt_is_named(parts, tmp_path):
    other = parts["config"].prompt.model_copy(update={"user_prefix": "Question: "})
    task = make(parts, tmp_path / "prompt.task", prompt=other)
    with pytest.raises(WorkError, match="step 'prompt' left.*Question"):
        prove(parts, task)


def test_a_zeroed_layer_is_named(parts, tmp_path):
    """All weights of one matrix become zero: the file opens, tokenizes and answers."""
    content = bytearray(parts["tflite"].read_bytes())
    start, size = largest_ffn_buffer(parts["tflite"])
    content[start : start + size] = bytes(size)
    (tmp_path / "zero.tflite").write_bytes(content)
    task = make(parts, tmp_path / "zero.task", tflite=tmp_path / "zero.tflite")
    with pytest.raises(WorkError, match="step 'perplexity' left"):
        prove(parts, task)


def largest_ffn_buffer(file: Path) -> tuple[int, int]:
    """(offset, bytes) of the second layer's up projection, 128 x 64, in the file."""
    model, _ = quantization._open(file)
    graph = model.Subgraphs(0)
    found = [
        model.Buffers(graph.Tensors(i).Buffer())
        for i in range(graph.TensorsLength())
        if graph.Tensors(i).ShapeLength() == 2
        and graph.Tensors(i).ShapeAsNumpy().tolist() == [128, 64]
    ]
    buffer = max(found, key=lambda b: b.Offset() or b.DataLength())
    if buffer.Offset() > 1:
        return buffer.Offset(), buffer.Size()
    data = buffer.DataAsNumpy().tobytes()
    return file.read_bytes().index(data), len(data)


def test_a_file_that_is_no_bundle_does_not_open(parts, tmp_path):
    (tmp_path / "broken.task").write_bytes(b"PK not a bundle" * 100)
    with pytest.raises(WorkError, match="step 'opens' left"):
        prove(parts, tmp_path / "broken.task")


def given(*texts: str, stopped: bool = True, score: float = -10.0) -> measured.Measured:
    """What a model gives: one question, then requests; one text of five tokens."""
    answers = [{"text": text, "tokens": 9, "stopped": stopped} for text in texts]
    return measured.Measured([(score, 5)], answers)


REFUSAL = "I can't help with that. Please call a doctor."
SAMPLES = measured.Samples([("a", " b")], ["q"], ["r"] * 10, [], 16)
REST = ["Rest well."] * 10


def test_a_change_passes_by_its_size_and_not_for_lack_of_text():
    """1.5 % is 1.5 % however few texts there are; 0.5 % of few texts may be anything."""

    def change(losses: list[float]) -> measured.Change:
        merged = [(-20.0, 12)] * len(losses)
        return measured.perplexity_change([(-20.0 - loss, 12) for loss in losses], merged)

    tokens = 12 * 40
    spread = [1.0, -1.0] * 20
    exact = [0.015 * 12] * 40
    assert not change(exact).passes(0.01) and change(exact).certain(0.01)
    assert change([0.005 * 12] * 40).passes(0.01)
    noisy = [0.005 * 12 + 0.5 * sign for sign in spread]
    found = change(noisy)
    assert found.error == pytest.approx(0.5 * 40**0.5 / tokens, rel=0.02)
    assert not found.passes(0.01) and not found.certain(0.01), "two errors reach 1.8 %"
    few = [0.015 * 12 + 0.5 * sign for sign in spread]
    assert not change(few).passes(0.01), "two standard errors do not come on top"
    assert change([5.0 + 0.1 * sign for sign in spread]).certain(0.01), "far outside: stop"
    broken = change([float("nan")] * 3)
    assert broken.certain(0.01) and not broken.passes(0.01)


def test_text_is_scored_until_the_change_is_known(tmp_path):
    """The first pairs differ much, so more are asked for; both sides score the same ones."""
    samples = measured.Samples([("a", str(i)) for i in range(400)], ["q"], [], [], 16)
    asked: list[int] = []
    (tmp_path / "x.task").write_bytes(b"a bundle")

    class Workers:
        path = tmp_path / "x.task"

        def score(self, pairs):
            asked.append(len(pairs))
            numbers = [int(target) for _, target in pairs]
            lost = [(0.4 if n < 16 else 0.05) * (-1) ** n for n in numbers]
            return [(place, (-20.0 - value, 12)) for place, value in enumerate(lost)]

        def generate(self, prompts, limits):
            assert limits == [32], "the merged model did not end: only the beginning"
            return [(i, bundle_answer) for i in range(len(prompts))]

    class Known(measured.Reference):
        def measured(self, pairs):
            answers = [{"text": "x", "tokens": 16, "stopped": False}]
            return measured.Measured([(-20.0, 12)] * pairs, answers)

    from liteguard.runtime.bundle import Answer

    bundle_answer = Answer("x", 3, True, 0.0)
    reference = Known(tmp_path, Prompt(), samples, tmp_path / "merged.jsonl")
    kept = tmp_path / "bundle.jsonl"
    _, _, change = measured.measure_bundle(Workers(), reference, VerifySection(), 0.01, kept)
    assert asked[0] == 16 and len(asked) > 1 and sum(asked) < 400
    assert change.error <= 0.0025 and change.pairs == sum(asked)
    # A rerun, as after a kill, asks for nothing again but what a crash cut off.
    kept.write_bytes(kept.read_bytes()[:-5])
    # It writes the bundle anew, with the same bytes.
    (tmp_path / "x.task").write_bytes(b"a bundle")
    os.utime(tmp_path / "x.task", (1, 1))
    before, Workers.generate = len(asked), None
    _, _, again = measured.measure_bundle(Workers(), reference, VerifySection(), 0.01, kept)
    assert again == change and asked[before:] == [1]


@pytest.mark.parametrize(
    ("answers", "named"),
    [
        (given("Rest.", *REST), None),
        (given("Rust.", *REST), None),  # which the bundle likes hardly better
        (given("", *REST), "clean text"),
        (given(f"Rest{tokenizer.PLACEHOLDER_MARK}", *REST), "clean text"),
        (given("Drink.", *REST), "greedy agreement"),
        (given("Rest.", *REST[1:], REFUSAL), None),
        (given("Rest.", *REST[2:], REFUSAL, REFUSAL), "refusals"),
        (given("Rest.", *REST, score=-10.2), "perplexity"),
        (given("Rest.", *REST, score=float("nan")), "perplexity"),
    ],
)
def test_what_leaves_its_tolerance_is_named(answers, named, tmp_path):
    table = verify.Table(tmp_path / "x.task", say=lambda line: None)
    merged = given("Rest.", *REST)
    lost = merged.scores[0][0] - answers.scores[0][0]

    def behind(parted):
        """ "Rest." after "R": "e" instead of "u" is as good, "R" instead of "D" is not."""
        ((number, begun, token),) = parted
        assert number == 0 and begun == [ord(char) for char in "Rest."[: len(begun)]]
        return [{ord("e"): 0.9, ord("R"): 1.1}[token]]

    def run() -> dict:
        return verify.compare(
            answers,
            merged,
            measured.Change(lost / 5, 0.0, 1, 5),
            SAMPLES,
            ["<|end|>"],
            lambda text: [ord(char) for char in text],
            behind,
            table,
            VerifySection(agreement=1.0),
            tolerance=0.01,
        )

    if named is None:
        found = run()
        assert found["agree"] == 1 and found["agree_16"] == (answers.answers[0]["text"] == "Rest.")
    else:
        with pytest.raises(WorkError, match=f"step '{named}' left"):
            run()
        assert [row["step"] for row in table.rows if not row["passed"]] == [named]


@pytest.mark.parametrize(("error", "passes"), [(0.0025, True), (0.007, True), (0.0076, False)])
def test_the_row_of_the_perplexity_says_what_is_allowed(error, passes, tmp_path):
    table = verify.Table(tmp_path / "x.task", say=lambda line: None)
    both = given("Rest.", *REST)
    parts = both, both, measured.Change(0.0, error, 9, 45), SAMPLES, ["<|end|>"]
    with contextlib.nullcontext() if passes else pytest.raises(WorkError, match="prepare more"):
        verify.compare(*parts, list, None, table, VerifySection(), tolerance=0.01)
    assert table.rows[0]["passed"] is passes
    assert table.rows[0]["tolerance"].endswith("+- 1.0%, with 2 s.e. 1.5%")


@pytest.mark.parametrize(
    ("merged", "own", "passes"),
    [
        (10, 10, True),
        (10, 8, True),
        (10, 7, False),
        (2, 1, True),
        (2, 0, False),
        (1, 0, True),
        (0, 0, True),
    ],
)
def test_the_bundle_ends_the_answers_that_the_model_ends(merged, own, passes, tmp_path):
    """Long answers are no fault: only those count that the merged model itself ends."""
    said: list[str] = []
    table = verify.Table(tmp_path / "x.task", say=said.append)
    pairs = [({"stopped": i < own}, {"stopped": i < merged}) for i in range(12)]
    run = (pairs, 64, table, VerifySection(), "")
    if passes:
        assert verify.check_stops(*run)["stopped_merged"] == merged
    else:
        with pytest.raises(WorkError, match="step 'stops' left"):
            verify.check_stops(*run)
    assert any("itself ends" in line for line in said) is (merged < 6 and passes)


def test_the_runtime_is_given_what_training_renders_of_a_conversation(parts, tmp_path):
    """History and system text as an app hands them over; every id is counted in the cache."""
    slot = {"system_prefix": "System: ", "system_suffix": "\n"}
    prompt = parts["config"].prompt.model_copy(update=slot)
    path = tmp_path / "own.litertlm"
    write_litertlm(parts["tflite"], parts["merged"], prompt, path, 128)
    history = [["What is the heart?", "It is an organ."], ["Is it a muscle?", "Yes."]]
    row = {"prompt": "And the lung?", "history": history, "system": "Be brief."}
    messages = [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    with Bundle(path) as device:
        given = prompt.render_row(row)
        with device._engine.create_conversation(
            messages=messages, system_message=row["system"], sampler_config=device._greedy
        ) as conversation:
            assert conversation.render_message_to_string(row["prompt"]) == given
            answer = conversation.send_message(row["prompt"]).to_json()["content"][0]["text"]
            tokens = conversation.token_count
        # What training tokenizes piece by piece, the device reads as a whole.
        turns = [*map(tuple, history), (row["prompt"], None)]
        ids = [i for piece in prompt.segments(turns, "Be brief.") for i in device.tokenize(piece)]
        assert ids == device.tokenize(given)
        assert ids == own_tokenizer(parts["merged"]).encode(given, add_special_tokens=False).ids
        assert tokens == len(ids) + len(device.tokenize(answer)) + 1  # and the end token


def test_a_system_message_is_for_the_litertlm_alone(pipeline):
    """As deploy.json says. Phi's prompt has no place for one, and leaves it out."""
    rendered = {}
    for end in ("task", "litertlm"):
        with Bundle(pipeline / f"liteguard_tiny.{end}") as device:
            rendered[end] = [device.render_chat("Hi", said) for said in (None, "Be brief.")]
    assert rendered["litertlm"][0] == rendered["litertlm"][1]
    assert rendered["task"][1] == "Be brief." + rendered["task"][0]


def test_without_temperature_every_sampler_is_greedy(pipeline, monkeypatch):
    """AI Edge Gallery's form allows no top-k below 5: docs/phone.md says to set temperature 0."""
    import litert_lm

    prompt = "Instruct: What is the heart pain disease a?\nOutput:\n"
    with StreamedBundle(pipeline / "liteguard_tiny.litertlm") as device:
        greedy = "".join(device.stream(prompt, 24))
        for seed in range(3):
            sampler = litert_lm.SamplerConfig(top_k=64, top_p=0.95, temperature=0.0, seed=seed)
            monkeypatch.setattr(device, "_sampler", lambda sampling, given=sampler: given)
            assert "".join(device.stream(prompt, 24)) == greedy


def test_limits_follow_the_merged_models_own_answers():
    merged = measured.Measured(
        [], [{"tokens": 40, "stopped": True}, {"tokens": 200, "stopped": False}]
    )
    samples = measured.Samples([], ["q", "r"], [], [], 200)
    assert measured.bundle_limits(samples, merged) == [68, 32]


def test_the_limit_comes_from_held_out_answers(parts, pipeline):
    """Three of four held-out answers fit it, as the model's own tokenizer counts."""
    from liteguard.rows import load_split

    tokenizer_ = own_tokenizer(parts["merged"])
    rows = load_split(pipeline / "data/tiny", "instruction", "test")
    prompt = parts["config"].prompt
    counts = [len(tokenizer_.encode(prompt.render_answer(r["completion"])).ids) for r in rows]
    limit, size = parts["samples"].limit, len(counts)
    assert sum(n < limit for n in counts) <= 0.75 * size < sum(n <= limit for n in counts), (
        limit,
        sorted(counts),
    )


def test_requests_are_drawn_as_the_settings_say(parts):
    """Three times each, each with a seed of its own; the record of a bundle has what came of it."""
    samples = parts["samples"]
    section = parts["config"].evaluate.as_used
    texts = [text for text, _ in samples.drawn]
    assert len(texts) == section.draws * len(set(texts)) and set(texts) <= set(samples.requests)
    assert len(set(texts)) == min(measured.DRAWN, -(-len(samples.requests) // 3))
    assert len({sampling.seed for _, sampling in samples.drawn}) == len(texts)
    assert {sampling.top_k for _, sampling in samples.drawn} == {section.top_k}
    found = parts["record"]["verify"]
    steps = [step["step"] for step in found["steps"]]
    assert "drawn answers" in steps and "drawn refusals" in steps
    assert found["bundle"]["drawn"] == len(texts)


def test_auto_tries_the_next_recipe_and_reports_all(tmp_path):
    from liteguard.export.outputs import Steps

    asked: list[str] = []

    def attempt(recipe: str) -> dict:
        asked.append(recipe)
        if recipe in ("a", "b"):
            raise verify.TooCoarse(f"{recipe} lost too much")
        return {"quantize": {"recipe": recipe}}

    found = Steps(tmp_path).first_that_passes(attempt, ("a", "b", "c", "d"), {"texts": 8})
    assert asked == ["a", "b", "c"] and found["quantize"] == {"recipe": "c"}
    assert [entry["recipe"] for entry in found["tries"]] == ["a", "b"]
    # Killed in c and run again: what failed is known, unless the tolerances are others.
    asked.clear()
    assert Steps(tmp_path).first_that_passes(attempt, ("a", "b", "c"), {"texts": 8}) == found
    assert asked == ["c"]
    asked.clear()
    with pytest.raises(WorkError, match="(?s)a: a lost too much.*b: b lost too much"):
        Steps(tmp_path).first_that_passes(attempt, ("a", "b"), {"texts": 9})
    assert asked == ["a", "b"]

    def broken(recipe: str) -> dict:
        raise WorkError("another stop token")

    with pytest.raises(WorkError, match="^another stop token"):
        Steps(tmp_path).first_that_passes(broken, ("c", "d"), {"texts": 9})


def test_a_proof_that_failed_is_made_again_with_other_rows(monkeypatch, tmp_path):
    """Its message says "prepare more data": whoever does so at the same path must get a new one."""
    from liteguard.export import outputs
    from liteguard.export.conversion import Conversion

    asked: list[str] = []

    def attempt(recipe: str) -> dict:
        asked.append(recipe)
        raise verify.TooCoarse("the 4 texts that there are do not tell more exactly")

    def convert(**rows) -> None:
        own, samples = samples_of(monkeypatch, **{**PLAIN, **rows})
        parts = own, tmp_path, "base", None, 1, "v2", ["int8", "fp16"], []
        settings = Conversion(*parts, samples, work).proof
        with pytest.raises(WorkError, match="the 4 texts"):
            outputs.Steps(work).first_that_passes(attempt, ["int8", "fp16"], settings)

    work = outputs.start_work(tmp_path / "x.task", {"base": "b"})
    convert()
    convert()
    assert asked == ["int8", "fp16"]
    convert(domain=PLAIN["domain"] * 2)
    assert asked == ["int8", "fp16"] * 2
    assert outputs.start_work(tmp_path / "x.task", {"base": "b"}, overwrite=True) == work
    convert(domain=PLAIN["domain"] * 2)
    assert asked == ["int8", "fp16"] * 3


def test_a_bundle_that_fails_its_proof_gets_no_name(pipeline, tmp_path):
    """A tolerance that nothing meets: exit code 1, the step's name, and the work is kept."""
    command = (
        ROOT / "compress_model.py",
        "--input",
        pipeline / "final_checkpoint",
        "--output",
        tmp_path / "x.task",
        "--only",
        "task",
    )
    impossible = ("--quantize", "int8", "--set", "compress.verify.perplexity_change=1e-9")
    message = fail(1, *command, *impossible, cwd=pipeline)
    assert "step 'perplexity' left its tolerance" in message and "--verify none" in message
    assert not (tmp_path / "x.task").exists()
    # Other tolerances change no file: only the proof is repeated.
    log = succeed(*command, "--quantize", "int8", "--verify", "none", cwd=pipeline)
    assert "export ..." not in log and "merge ..." not in log and "wrote" in log
    assert "verify" not in json.loads((tmp_path / "x.task.json").read_text())


def test_a_dry_run_makes_no_directory(pipeline, tmp_path):
    output = tmp_path / "new" / "x.task"
    command = (ROOT / "compress_model.py", "--input", "final_checkpoint", "--output", output)
    assert "nothing written" in succeed(*command, "--dry_run", cwd=pipeline)
    assert not output.parent.exists()


def test_bad_names_are_users_mistakes(pipeline):
    command = (ROOT / "compress_model.py", "--input", "final_checkpoint", "--dry_run")
    both = fail(2, *command, "--only", "task", "--also", cwd=pipeline)
    assert "argument --also: not allowed with argument --only" in both
    assert "must end in .task or .litertlm" in fail(2, *command, "--output", "x.bin", cwd=pipeline)
    message = fail(2, *command, "--output", "y.task", "--quantize", "int3", cwd=pipeline)
    assert "unknown recipe 'int3'" in message and "int4_block32" in message
    assert "quick" in fail(2, *command, "--output", "y.task", "--verify", "some", cwd=pipeline)
    message = fail(2, *command, "--set", "compress.kv_cache_length=4096", cwd=pipeline)
    assert "longer than model.context_length 2048: compress.kv_cache_length 4096" in message
    longer = ("--set", "model.context_length=4096", "--set", "compress.kv_cache_length=4096")
    message = fail(2, *command, *longer, cwd=pipeline)
    assert "context_length 4096 is more than this base model can read: 2048" in message


# Recipes


@pytest.fixture(scope="module")
def exact(parts) -> Path:
    """The tiny model as float32 TFLite with two prefill lengths."""
    file = parts["work"] / "float.tflite"
    tflite.export(
        parts["merged"], file, prefill_lengths=[16, 64], kv_cache_length=128, progress=None
    )
    return file


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "int4_block64"])
def test_recipes(recipe, parts, exact, tmp_path):
    """Each weight has the bits that the recipe says, none is stored twice, and it still answers.

    (A model whose layers are 64 wide has one block of 64 a row; the others are told apart.)
    """
    file = tmp_path / "model.tflite"
    found = tflite.quantize(exact, file, recipe, parts["merged"], progress=None)
    if recipe in quantization.BLOCKS:
        assert quantization.unusable_scales(file) == 0
    layers = quantization.linear_layers(
        exact, json.loads((parts["merged"] / "config.json").read_text())
    )
    # Layers of q, k, v, dense and fc1, fc2: two in decode, one in each prefill, whose last layer
    # only fills the cache and which has no output layer.
    assert len(layers["ffn"]) == len(layers["ffn_down"]) == 2 + 1 + 1
    assert len(layers["output"]) == 1
    assert len(layers["attention"]) == 4 * 2 + 2 * (4 + 2)
    ffn, attention, rest = quantization.BITS[recipe]
    bits = 2 * 2 * 64 * 128 * ffn + 2 * 4 * 64 * 64 * attention + 2 * 640 * 64 * rest
    # Scales (8-bit: 12 bytes a row; 4-bit: 2 bytes a block and a table) and short constants.
    assert bits // 8 <= found["weight_bytes"] < bits // 8 + 60_000, found
    task = make(parts, tmp_path / "x.task", tflite=file)
    kept = exact.with_name("merged.jsonl")  # one for all recipes
    reference = measured.Reference(parts["merged"], parts["config"].prompt, parts["samples"], kept)
    workers = BundleWorkers(task, workers=1)
    section = parts["config"].compress.verify
    found = measured.measure_bundle(workers, reference, section, 0.1, tmp_path / "bundle.jsonl")
    change = abs(found[2].change)
    assert change < {"none": 1e-3, "fp16": 1e-3}.get(recipe, 0.3 if ffn == 4 else 0.02), change


def test_weights_stored_twice_are_an_error(parts, tmp_path):
    found = quantization.check_stored_once(parts["tflite"], parts["record"]["export"]["matrices"])
    assert found["repeated_bytes"] == 0
    with pytest.raises(WorkError, match="once for each signature"):
        quantization.check_stored_once(parts["tflite"], int(found["weights"] / 1.48))


def test_equal_quantisation_parameters_are_stored_once(parts, exact, tmp_path, monkeypatch):
    """Three signatures share each weight; its scales must not be written three times."""
    from ai_edge_litert import schema_py_generated as schema

    monkeypatch.setattr(schema.QuantizationParametersT, "Pack", schema.QuantizationParametersT.Pack)
    architecture = json.loads((parts["merged"] / "config.json").read_text())
    sizes = []
    for share in (True, False):
        if not share:
            monkeypatch.undo()
            monkeypatch.setattr(quantization, "_share_quantization_parameters", lambda: None)
        quantization.quantize(exact, tmp_path / "q.tflite", "int8", architecture)
        sizes.append((tmp_path / "q.tflite").stat().st_size)
    rows = 2 * (4 * 64 + 128 + 64) + 2 * 640
    assert sizes[1] - sizes[0] > 12 * rows


def test_requests_without_a_kind_are_compared_all_the_same(parts, monkeypatch):
    """A user's own pairs; "refusals 0 of 0" would be a check that nothing passes through."""
    original = measured.load_split

    def nameless(*arguments):
        return [{**row, "kind": "unknown"} for row in original(*arguments)]

    monkeypatch.setattr(measured, "load_split", nameless)
    samples = measured.collect_samples(
        parts["config"], parts["data"], own_tokenizer(parts["merged"])
    )
    assert samples.requests and samples.drawn


class Words:
    """A tokenizer whose tokens are words."""

    @staticmethod
    def encode(text: str, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(ids=text.split())


def samples_of(monkeypatch, **parts: list[dict]) -> tuple[Config, measured.Samples]:
    """What the proof of Phi's settings takes of these rows, a word counting as a token."""
    own = build([("phi", read_yaml(ROOT / "configs/phi-2.yaml"))])
    assert own.compress.kv_cache_length == 1280
    monkeypatch.setattr(measured, "load_split", lambda _, part, split: parts[part])
    return own, measured.collect_samples(own, Path("data"), Words())


PLAIN = {
    "instruction": [{"prompt": f"What is {n}?", "completion": "word " * 60} for n in range(40)],
    "preference": [{"prompt": f"Harm {n}", "chosen": "no", "rejected": "yes"} for n in range(40)],
    "domain": [{"text": "one two three four five six"}],
}


def test_rows_that_do_not_fit_the_cache_are_left_out(monkeypatch):
    """One long prompt would end the proof after all the work, and again in each run after it."""
    long = "context " * 1500
    asked = [{"prompt": f"{long}{n}", "completion": "yes"} for n in range(3)]
    asked += [{"prompt": "context " * 1270, "completion": "yes"}]
    # Room for an answer, but not for three turns.
    asked += [{"prompt": "context " * 1130, "completion": "yes"}]
    harm = [{**PLAIN["preference"][0], "prompt": f"{long} harm"}, *PLAIN["preference"]]
    rows = {**PLAIN, "instruction": asked + PLAIN["instruction"], "preference": harm}
    own, samples = samples_of(monkeypatch, **rows)
    limits = [measured._bundle_limit(samples.limit)] * len(samples.questions)
    limits += [measured.REQUEST_TOKENS] * len(samples.requests)
    for place, most in enumerate(limits):
        assert len(samples.render(own.prompt, place).split()) + most < 1280, place
    assert samples.drawn and len(samples.questions) == own.compress.verify.questions
    for text, _ in samples.drawn:
        words = samples.render_text(own.prompt, text).split()
        assert len(words) + measured.REQUEST_TOKENS < 1280
    assert samples.questions[0] == "What is 0?" and len(samples.questions[1].split()) == 1130


@pytest.mark.parametrize(
    ("part", "named"), [("instruction", "questions"), ("preference", "requests")]
)
def test_where_no_row_fits_the_cache_the_setting_is_named(part, named, monkeypatch):
    long = [{**row, "prompt": "context " * 1270} for row in PLAIN[part]]
    with pytest.raises(UserError, match=f"None of the held-out {named} .*kv_cache_length"):
        samples_of(monkeypatch, **{**PLAIN, part: long})


def test_no_held_out_rows_is_a_users_mistake(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "load_split", lambda *_: [])
    with pytest.raises(UserError, match="no held-out questions"):
        measured.collect_samples(parts["config"], tmp_path, own_tokenizer(parts["merged"]))
