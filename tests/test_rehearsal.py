"""The base model's own answers as training rows: what is asked, kept, left out and gone on from."""

from __future__ import annotations

import contextlib
import json
import sys

import pytest
import yaml

import prepare_datasets
from liteguard import cli, rehearsal
from liteguard.config import SourceSection
from liteguard.data import self_answers
from liteguard.evaluation.answerers import Generated
from liteguard.text import text_key

SOUND = "Asthma is a long-term disease in which the airways are narrow and swollen."
LOOP = "It is a disease of the airways. It is a disease of the airways. It is one."
QUESTIONS = {
    "What is asthma?": (SOUND, True),
    "Is asthma serious?": (f"{SOUND} It can be treated. Attacks may", False),
    "what helps against a cough": ("Rest and tea help. Try these:\n1. Warm water.\n2.", False),
    "What is a loop?": (LOOP, True),
    "Who may know?": ("I'm sorry, but I can't help with questions about this.", True),
    "What is a headache?": ("A headache is a kind of headache that is called a headache.", True),
    "Why so short?": ("Because.", True),
    "Was it cut?": ("An answer that the limit cut before its first sentence had an", False),
}


class Model:
    """Answers by QUESTIONS; `after` answers it fails, as a killed process does."""

    def __init__(self, after: int = 99) -> None:
        self.asked: list[str] = []
        self.after = after

    def generate(self, prompts, max_new_tokens):
        for place, prompt in enumerate(prompts):
            if place == self.after:
                raise KeyboardInterrupt
            self.asked.append(prompt)
            question = next(q for q in QUESTIONS if q.lower() in prompt.lower())
            text, stopped = QUESTIONS[question]
            yield place, Generated(text, max_new_tokens, stopped)


@pytest.fixture
def project(tmp_path, tiny_config, monkeypatch):
    """(run prepare_datasets.py with a model in place of the base, its output)."""
    content = yaml.safe_load(tiny_config.read_text())
    file = tmp_path / "questions.jsonl"
    rows = [{"asked": question} for question in [*QUESTIONS, "what is ASTHMA"]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content["data"]["cache_dir"] = str(tmp_path / "cache")
    source = {"dataset": "self_answers", "path": str(file), "columns": {"prompt": "asked"}}
    content["data"]["instruction"].append(source)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    output = tmp_path / "data"

    def run(model: Model, *flags: str) -> None:
        @contextlib.contextmanager
        def opened(config, path):
            assert path is None  # the base, without an adapter
            yield model

        monkeypatch.setattr(rehearsal.answerers, "open_answerer", opened)
        command = ["--config", str(config), "--output", str(output), *flags]
        monkeypatch.setattr(sys, "argv", ["prepare_datasets.py", *command])
        prepare_datasets.main()

    return run, output, config


def prepared(output) -> dict[str, dict]:
    rows = {}
    for split in ("train", "validation", "test"):
        for line in (output / f"instruction/{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["kind"] == "rehearsal":
                assert split != "test", "a model is not measured against its own answers"
                rows[row["prompt"]] = row
    return rows


def test_sound_answers_are_trained_on_and_the_others_counted_by_name(project, capsys):
    run, output, _ = project
    model = Model()
    run(model)
    rows = prepared(output)
    assert {q: r["completion"] for q, r in rows.items()} == {
        "What is asthma?": SOUND,
        "Is asthma serious?": f"{SOUND} It can be treated.",
        "What helps against a cough": "Rest and tea help. Try these:\n1. Warm water.",
    }
    cut = {question for question, row in rows.items() if row.get("open_ended")}
    assert cut == {"Is asthma serious?", "What helps against a cough"}
    assert len(model.asked) == len(QUESTIONS), "each question once, in any spelling"
    prompt = model.asked[0]
    assert prompt.startswith("Instruct: ") and prompt.endswith("Output:\n")
    said = capsys.readouterr().out
    assert "will answer 8 questions with at most 96 tokens each" in said
    for reason in (
        "1 answers of the base model left out: refused",
        "1 answers of the base model left out: a sentence twice",
        "1 answers of the base model left out: nothing beyond the question's words",
        "2 answers of the base model left out: fewer than 8 words in whole sentences",
    ):
        assert reason in said


def test_answers_are_kept_and_an_interrupted_run_goes_on(project, capsys):
    run, output, config = project
    first, second, third = Model(after=3), Model(), Model()
    with pytest.raises(KeyboardInterrupt):
        run(first)
    assert not (output / "manifest.json").exists()
    run(second)
    assert len(first.asked) == 3 and len(second.asked) == len(QUESTIONS) - 3
    assert not set(first.asked) & set(second.asked)
    rows = prepared(output)
    capsys.readouterr()
    run(third)
    assert "reused" in capsys.readouterr().out
    run(third, "--overwrite")
    assert not third.asked and prepared(output) == rows
    # Another prompt, another length: other answers.
    run(third, "--overwrite", "--set", "data.instruction.1.max_new_tokens=32")
    assert len(third.asked) == len(QUESTIONS)


def test_edited_answers_are_asked_again(project, capsys):
    """They are hours of work: it is said. Training rows are never silently others."""
    run, output, config = project
    run(Model())
    rows = prepared(output)
    (file,) = (config.parent / "cache/self_answers").glob("*.jsonl")
    whole = file.read_text()
    for content in (whole.replace("airways", "kidneys"), whole[:100], ""):
        file.write_text(content)
        again = Model()
        capsys.readouterr()
        run(again, "--overwrite")
        assert f"{file} is not as it was written" in capsys.readouterr().out
        assert len(again.asked) == len(QUESTIONS)
        assert prepared(output) == rows and file.read_text() == whole


def test_a_dry_run_says_what_it_would_ask_and_asks_nothing(project, capsys):
    run, output, _ = project
    model = Model()
    run(model, "--dry_run")
    assert not model.asked and not output.exists()
    assert "will answer 8 questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {}}, "no column 'prompt'"),
        ({"path": None}, "needs 'questions:'"),
        ({"questions": ["medicationqa"]}, "one of the two"),
        ({"path": None, "questions": ["healthsearch"]}, "no question set 'healthsearch'"),
        ({"path": None, "questions": ["medqa"]}, "medqa is in data.decontaminate"),
    ],
)
def test_a_source_that_cannot_be_asked_is_named(project, change, message, capsys):
    run, _, config = project
    content = yaml.safe_load(config.read_text())
    content["data"]["instruction"][1] |= change
    content["data"]["decontaminate"] = ["medqa"]
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(cli.UserError) as error:
        run(Model())
    assert message in str(error.value)


def test_questions_are_limited_by_their_text_not_their_order(project, tmp_path):
    _, _, config = project
    content = yaml.safe_load(config.read_text())["data"]["instruction"][1]
    source = SourceSection(**content, limit=3)
    drawn = self_answers.questions(source, tmp_path)
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    again = self_answers.questions(source, tmp_path)
    assert len(drawn) == 3 and [text_key(q) for q in drawn] == [text_key(q) for q in again]


@pytest.mark.parametrize(
    ("question", "answer", "left_out"),
    [
        (
            "Что такое астма?",
            "Астма — это хроническое заболевание дыхательных путей, при котором бронхи сужаются.",
            "",
        ),
        ("什么是哮喘？", "哮喘是一种慢性气道疾病，患者的气道会变窄和肿胀，引起咳嗽。", ""),
        ("ぜんそくとは？", "喘息は気道が慢性的に炎症を起こし、狭くなって咳が出る病気です。", ""),
        ("¿Qué es el asma?", "El asma es una enfermedad crónica de las vías respiratorias.", ""),
        ("什么是哮喘？", "一种病。", "fewer than 8 words in whole sentences"),
        ("糖尿病是什么？", "糖尿病就是糖尿病了。", "nothing beyond the question's words"),
        ("Что это?", "да да да да да да да да да да да.", "mostly repetition"),
        ("什么是哮喘？", "这是一种病。这是一种病。不要担心。", "a sentence twice"),
    ],
)
def test_answers_in_other_languages_are_kept_by_the_same_rules(question, answer, left_out):
    assert rehearsal.row(question, {"text": answer, "stopped": True})["left_out"] == left_out
    # A cut answer ends with its last whole sentence, which no blank follows in some scripts.
    blank = "" if answer.endswith("。") else " "
    cut = rehearsal.row(question, {"text": f"{answer}{blank}Foo bar", "stopped": False})
    assert cut["completion"] == answer


def test_it_is_said_when_most_answers_are_left_out():
    few = [{"left_out": ""}] * 2 + [{"left_out": "refused"}] * 2
    assert rehearsal.too_many_left_out(few) == ""
    said = rehearsal.too_many_left_out([*few, {"left_out": "mostly repetition"}])
    assert "3 of 5 answers" in said and "2 refused, 1 mostly repetition" in said
