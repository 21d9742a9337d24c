"""Layouts and files as people have them: nothing is trained on wrongly, or left out in silence."""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from conftest import ROOT, run_script
from test_readers import collect, jsonl, read, texts, write

from liteguard.config import SourceSection, build
from liteguard.data import conversations, exams, formats, values
from liteguard.data.readers import Broken, LeftOut, Tally
from liteguard.errors import UserError

DEFAULTS = {"kind": "question", "entity": None}


def loaded(path: Path, dataset: str, **options) -> tuple[list, Counter]:
    """(rows, notes) of a local file."""
    found = formats.formatted(SourceSection(dataset=dataset, path=str(path), **options), Path())
    return list(found), found.notes


def one(path: Path, dataset: str, row: dict, **options) -> tuple:
    """What becomes of a single row, and the notes about it."""
    (found,), notes = loaded(jsonl(path / "one.jsonl", [row]), dataset, **options)
    return found, notes


def said(*turns: str, **extra) -> list[dict]:
    """Messages 'user: text', 'assistant: text'."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


def pair(n: int, **extra) -> dict:
    answer = f"Ailment number {n} is treated with remedy {n * 7} and with a lot of rest."
    return {"prompt": f"What helps against ailment {n}?", "completion": answer, **extra}


# --- alpaca: each row by itself -------------------------------------------------------------------


def test_an_alpaca_file_sorted_by_task_keeps_the_task_of_every_row(tmp_path):
    """The first rows all have one role sentence; what they are says nothing of later ones."""
    role = "If you are a doctor, please answer the medical questions based on the patient's "
    rows = [
        {"instruction": f"{role}description.", "input": f"Is it flu, case {n}?", "output": "Maybe."}
        for n in range(300)
    ]
    rows += [
        {"instruction": "True or false?", "input": f"Flu is virus {n}.", "output": "True."}
        for n in range(300)
    ]
    found, notes = loaded(jsonl(tmp_path / "x.jsonl", rows), "alpaca")
    assert found[0]["prompt"] == "Is it flu, case 0?"
    assert [row["prompt"] for row in found[300:302]] == [
        "True or false? Flu is virus 0.",
        "True or false? Flu is virus 1.",
    ]
    assert notes["rows asked by instruction and input together"] == 300
    assert notes["rows asked by their input: the instruction only says who answers"] == 300


@pytest.mark.parametrize(
    ("instruction", "is_role"),
    [
        ("Answer this question truthfully", True),
        ("You are a helpful medical assistant.", True),
        ("As an experienced cardiologist, answer the following question:", True),
        ("Given your background as a doctor, please provide your insight in addressing the medical "
         "questions based on the patient's account.", True),
        ("Answer the question with yes or no.", False),
        ("You are a translator.", False),
        ("As a list of bullets", False),
        ("You are a doctor. Answer in one word.", False),
        ("Summarise the note", False),
    ],
)  # fmt: skip
def test_only_an_instruction_that_says_who_answers_is_left_out(tmp_path, instruction, is_role):
    row = {"instruction": instruction, "input": "Fever since Monday.", "output": "Rest."}
    found, _ = one(tmp_path, "alpaca", row)
    assert (found["prompt"] == "Fever since Monday.") == is_role
    assert found["prompt"].startswith(instruction) != is_role


def test_three_alpaca_tasks_on_one_text_are_three_rows(tmp_path):
    tasks = ("Summarise the note.", "List the drugs.", "Rewrite for the patient.")
    rows = [{"instruction": t, "input": "Fever, drug 3.", "output": "So be it."} for t in tasks]
    found, _ = loaded(jsonl(tmp_path / "x.jsonl", rows), "alpaca")
    assert [row["prompt"] for row in found] == [f"{task} Fever, drug 3." for task in tasks]


def test_alpaca_tasks_on_one_text_are_all_kept_on_one_side(tmp_path):
    """Else those in training would be dropped for sharing their words with those in test."""
    tasks = ("Summarise the note.", "List the drugs.", "Rewrite for the patient.")
    rows = [
        {
            "instruction": t,
            "input": f"Note {n}: fever.",
            "output": f"{t} A fever, as note {n} says.",
        }
        for n in range(60)
        for t in tasks
    ]
    path = jsonl(tmp_path / "x.jsonl", rows)
    splits, (entry,) = collect("instruction", {"dataset": "alpaca", "path": str(path)})
    assert entry["rows_kept"] == 180 and len(splits["test"]) % 3 == 0
    for found in splits.values():
        counts = Counter(row["prompt"].split("Note ")[1] for row in found)
        assert set(counts.values()) == {3} and not any("about" in row for row in found)


def test_an_alpaca_row_keeps_its_history_and_its_system_text(tmp_path):
    row = {"instruction": "And now?", "input": "", "output": "Twice a day.", "system": "Be brief."}
    history = [["How much?", "One."]]
    found, notes = one(tmp_path, "alpaca", {**row, "history": history})
    assert found["history"] == history and found["system"] == "Be brief."
    assert notes == {formats.CONVERSATIONS: 1, conversations.SYSTEM: 1}
    found, notes = one(tmp_path, "alpaca", {**row, "history": []})
    assert found["prompt"] == "And now?" and "history" not in found
    found, _ = one(tmp_path, "alpaca", {**row, "history": [["How much?"]]})
    assert isinstance(found, Broken) and found.reason == "history is no list of [question, answer]"


# --- conversations --------------------------------------------------------------------------------


def test_user_messages_in_a_row_are_one_question(tmp_path):
    turns = said("user: I am allergic.", "user: What for my throat?", "assistant: A macrolide.")
    found, notes = one(tmp_path, "messages", {"messages": turns})
    assert found["prompt"] == "I am allergic.\nWhat for my throat?"
    assert notes == {"rows with several user turns in a row, taken as one": 1}


CALL = {"role": "assistant", "content": "Let me look.", "tool_calls": [{"id": "1"}]}
LEFT_OUT = [
    ([*said("user: Dose?"), CALL, *said("tool: {}", "assistant: 3 mg.")], "an answer by tools"),
    (said("user: Dose?", "assistant: Let me look.", "tool: 3"), "an answer by tools"),
    (
        said("user: Dose?", "function_call: {}", "observation: 3", "gpt: 3 mg."),
        "an answer by tools",
    ),
    (
        [*said("user: Dose?"), {"role": "assistant", "content": "Much.", "weight": 0}],
        "an answer with weight 0: not for training",
    ),
    (
        [*said("user: Dose?"), {"role": "assistant", "content": "Much.", "train": False}],
        "an answer with weight 0: not for training",
    ),
    (said("assistant: Any drugs?", "user: Two.", "assistant: Which?"), "begins with the assistant"),
    (
        [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            *said("assistant: A rash."),
        ],
        "a message with image_url: only text is used",
    ),
]


@pytest.mark.parametrize(("turns", "reason"), LEFT_OUT)
@pytest.mark.parametrize("dataset", ["messages", "sharegpt"])
def test_what_cannot_be_rendered_is_left_out_by_name(tmp_path, dataset, turns, reason):
    column = {"messages": "messages", "sharegpt": "conversations"}[dataset]
    found, _ = one(tmp_path, dataset, {column: turns})
    assert isinstance(found, LeftOut) and found.reason.startswith(reason), found


def test_left_out_rows_are_counted_and_are_no_broken_ones(tmp_path):
    rows = [{"messages": turns} for turns, _ in LEFT_OUT]
    rows += [
        {"messages": said(f"user: What helps against {n}?", f"assistant: {pair(n)['completion']}")}
        for n in range(60)
    ]
    path = jsonl(tmp_path / "x.jsonl", rows)
    _, (entry,) = collect("instruction", {"dataset": "messages", "path": str(path)})
    assert entry["dropped"]["an answer by tools: cannot be rendered"] == 3
    assert sum(entry["dropped"].values()) >= len(LEFT_OUT) and entry["rows_kept"] > 50
    source = SourceSection(dataset="messages", path=str(path))
    tally = Tally(formats.formatted(source, tmp_path), source)
    assert len(list(tally)) == len(rows) and tally.broken == 0
    tally.check()


def test_an_unknown_role_is_broken_and_unknown_keys_are_named(tmp_path):
    found, _ = one(tmp_path, "messages", {"messages": said("user: A?", "narrator: B.")})
    assert isinstance(found, Broken) and found.reason == "unknown role 'narrator'"
    turns = said("user: What is flu?", "assistant: An infection.")
    turns[0] |= {"name": "Ann", "weight": None}
    turns[1] |= {"weight": 1, "reasoning": "", "audio": None}
    found, notes = one(tmp_path, "messages", {"messages": turns})
    assert found["completion"] == "An infection."
    assert notes == {"messages with a key 'name', which is not used": 1}


def test_content_parts_json_text_and_columns_of_messages_are_read(tmp_path):
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "flu?"}]
    turns = [{"role": "user", "content": parts}, *said("assistant: An infection.")]
    found, _ = one(tmp_path, "messages", {"messages": turns})
    assert found["prompt"] == "What is\nflu?"
    turns = said("human: What is flu?", "gpt: An infection.")
    turns = [{"from": turn["role"], "value": turn["content"]} for turn in turns]
    columns = {key: [turn[key] for turn in turns] for key in ("from", "value")}
    for value in (turns, json.dumps(turns), columns):
        found, _ = one(tmp_path, "sharegpt", {"conversations": value})
        assert found == {"prompt": "What is flu?", "completion": "An infection.", **DEFAULTS}


def test_sharegpt_with_tools_and_a_system_column_says_so(tmp_path):
    row = {"conversations": said("human: Hi?", "gpt: Hello."), "system": "Be kind.", "tools": "[1]"}
    found, notes = one(tmp_path, "sharegpt", row)
    assert found["prompt"] == "Hi?" and notes == {
        conversations.SYSTEM: 1,
        conversations.TOOLS: 1,
    }


def test_a_given_completion_is_trained_on_and_what_came_before_is_context(tmp_path):
    earlier = said("user: What is flu?", "assistant: An infection.", "user: And a cold?")
    row = {"prompt": earlier, "completion": said("assistant: A milder one.")}
    for completion in (row["completion"], "A milder one."):
        found, _ = one(tmp_path, "prompt_completion", {**row, "completion": completion})
        assert (found["prompt"], found["completion"]) == ("And a cold?", "A milder one.")
        assert found["history"] == [["What is flu?", "An infection."]]
        assert found["untrained"] == [0]
    row["prompt"] = earlier[:1]
    found, _ = one(tmp_path, "prompt_completion", row)
    assert found["completion"] == "A milder one." and "history" not in found
    row["prompt"] = earlier[:2]
    assert one(tmp_path, "prompt_completion", row)[0].reason == "the last message is not the user's"


# --- preferences ----------------------------------------------------------------------------------

YES, NO = "An infection with a virus.", "No idea at all."


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": said("user: What is flu?", f"assistant: {YES}"),
         "rejected": said("user: What is flu?", f"assistant: {NO}")},
        {"instruction": "You are a nurse.", "input": "What is flu?", "chosen": YES, "rejected": NO},
        {"instruction": "What is flu?", "input": "", "chosen": YES, "rejected": NO},
        {"conversations": said("human: What is flu?"), "chosen": {"from": "gpt", "value": YES},
         "rejected": {"from": "gpt", "value": NO}},
        {"chosen": f"\n\nHuman: What is flu?\n\nAssistant: {YES}",
         "rejected": f"\n\nHuman: What is flu?\n\nAssistant: {NO}"},
        {"prompt": "What is flu?", "chosen": said("user: What is flu?", f"assistant: {YES}"),
         "rejected": said("user: What is flu?", f"assistant: {NO}")},
    ],
)  # fmt: skip
def test_every_layout_of_pairs_is_read_and_recognised(tmp_path, row):
    path = jsonl(tmp_path / "x.jsonl", [row])
    assert formats.recognise(SourceSection(dataset="auto", path=str(path)), "preference")
    ((found,), notes) = loaded(path, "preference")
    assert (found["prompt"], found["chosen"], found["rejected"]) == ("What is flu?", YES, NO)
    assert not any("column" in what for what in notes), notes


def test_a_pair_keeps_its_context(tmp_path):
    earlier = said("user: What is flu?", f"assistant: {YES}", "user: And a cold?")
    before = f"\n\nHuman: What is flu?\n\nAssistant: {YES}\n\nHuman: And a cold?\n\nAssistant: "
    whole = {"chosen": earlier + said("assistant: A."), "rejected": earlier + said("assistant: B.")}
    for row in (
        {"prompt": earlier, "chosen": "A.", "rejected": "B."},
        {"prompt": earlier, **whole},
        {"prompt": "And a cold?", **whole},
        {"prompt": "What is flu?", **whole},
        whole,
        {"chosen": f"{before}A.", "rejected": f"{before}B."},
    ):
        found, _ = one(tmp_path, "preference", row)
        assert found["history"] == [["What is flu?", YES]]
        assert (found["prompt"], found["chosen"], found["rejected"]) == ("And a cold?", "A.", "B.")


@pytest.mark.parametrize("asked", [{"instruction": "May I take it?"}, {"prompt": "May I take it?"}])
def test_a_pair_keeps_its_history(tmp_path, asked):
    history = [["I am allergic to penicillin.", "Noted."]]
    row = asked | {"history": history, "chosen": "No, not this one.", "rejected": "Yes."}
    found, notes = one(tmp_path, "preference", row)
    assert found["history"] == history and found["prompt"] == "May I take it?"
    assert not any("not used" in note for note in notes)
    found, _ = one(tmp_path, "preference", row | {"history": "He is allergic."})
    assert isinstance(found, Broken)


def test_a_conversation_beside_an_instruction_is_named(tmp_path):
    row = {"instruction": "May I?", "chosen": "No.", "rejected": "Yes."}
    row["conversations"] = said("user: I am allergic.", "assistant: Noted.")
    _, notes = one(tmp_path, "preference", row)
    assert notes["rows with a column 'conversations', which is not used"] == 1


def test_a_weight_of_0_inside_of_content_is_obeyed(tmp_path):
    answer = [{"type": "text", "text": "Drink it all.", "weight": 0}]
    messages = [*said("user: What now?"), {"role": "assistant", "content": answer}]
    found, _ = one(tmp_path, "messages", {"messages": messages})
    assert isinstance(found, LeftOut) and "weight 0" in found.reason


def test_pairs_that_are_no_answers_to_one_question_are_left_out(tmp_path):
    asked = said("user: What is flu?")
    other = [*asked, *said(f"assistant: {NO}", "user: And a cold?", "assistant: B.")]
    whole = [*asked, *said(f"assistant: {YES}", "user: And a cold?", "assistant: A.")]
    unwanted = [*asked, {"role": "assistant", "content": YES, "weight": 0}]
    for row, reason in (
        ({"chosen": whole, "rejected": other}, "chosen and rejected part before"),
        ({"prompt": "What is mumps?", "chosen": whole, "rejected": whole}, "the prompt is not the"),
        ({"chosen": unwanted, "rejected": [*asked, *said("assistant: B.")]}, "an answer with weig"),
        ({"prompt": [*asked, CALL, *said("tool: 3", "user: So?")], "chosen": YES, "rejected": NO},
         "an answer by tools"),
    ):  # fmt: skip
        found, _ = one(tmp_path, "preference", row)
        assert isinstance(found, LeftOut) and found.reason.startswith(reason), found


# --- not for training -----------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", [(False, True), (0, 1), ("False", "True"), ("0", "1")])
def test_kto_rows_with_a_false_label_are_not_trained_on(tmp_path, spelling):
    rows = [pair(n, label=spelling[n % 2]) for n in range(80)]
    path = jsonl(tmp_path / "x.jsonl", rows)
    splits, (entry,) = collect("instruction", {"dataset": "prompt_completion", "path": str(path)})
    assert entry["dropped"][f"label is {spelling[0]}: not for training"] == 40
    kept = {row["prompt"] for rows in splits.values() for row in rows}
    assert kept and kept <= {row["prompt"] for row in rows[1::2]}


def test_flags_are_obeyed_and_labels_that_say_something_else_are_named(tmp_path):
    found, _ = one(tmp_path, "prompt_completion", pair(1, weight=0))
    assert isinstance(found, LeftOut) and found.reason == "weight is 0: not for training"
    found, _ = one(tmp_path, "plain_text", {"text": "A text.", "train": "no"})
    assert isinstance(found, LeftOut)
    # The class of a text is no flag.
    found, notes = one(tmp_path, "plain_text", {"text": "A text.", "label": 0})
    assert found["text"] == "A text."
    assert notes == {"rows with a column 'label', which is not used": 1}
    found, notes = one(tmp_path, "prompt_completion", pair(1, label="flu", weight=0.3))
    assert found["prompt"] == pair(1)["prompt"] and len(notes) == 2


@pytest.mark.parametrize(
    ("column", "yes", "no"),
    [
        ("train", "t", "f"),
        ("Trainable", True, False),
        ("train", "on", "OFF"),
        ("Label", True, False),
        ("label", "good", "Bad"),
        ("label", 1, -1),
        ("weight", 0.5, -1.5),
        ("loss", "y", "n"),
    ],
)
def test_every_spelling_of_not_for_training_is_obeyed(tmp_path, column, yes, no):
    rows = [pair(n, **{column: (no, yes)[n % 2]}) for n in range(6)]
    found, _ = loaded(jsonl(tmp_path / "x.jsonl", rows), "prompt_completion")
    assert [isinstance(row, LeftOut) for row in found] == [True, False] * 3
    assert found[0].reason == f"{column} is {no}: not for training"


def test_a_flag_that_is_neither_yes_nor_no_is_refused(tmp_path):
    with pytest.raises(UserError, match="the column 'Train' holds 'maybe', which is neither yes"):
        one(tmp_path, "prompt_completion", pair(1, Train="maybe"))
    rows = [pair(n, label=("mine", "theirs")[n % 2]) for n in range(6)]
    path = jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(UserError, match="'label' holds 'mine' and 'theirs', and does not say"):
        loaded(path, "prompt_completion")
    # What the message proposes works; of more values it is a class, 0 and 1 among them as well.
    found, _ = loaded(path, "prompt_completion", columns={"kind": "label"})
    assert [row["kind"] for row in found] == ["mine", "theirs"] * 3
    rows = [pair(n, label=n % 3) for n in range(6)]
    found, notes = loaded(jsonl(tmp_path / "x.jsonl", rows), "prompt_completion")
    assert len(found) == 6 and not any(isinstance(row, Broken) for row in found)
    assert notes == {"rows with a column 'label', which is not used": 6}


def test_what_is_inside_of_a_column_is_obeyed_or_named(tmp_path):
    row = {"data": {"q": "What helps?", "a": {"text": "Rest."}, "label": False, "id": 7}}
    options = {"columns": {"prompt": "data.q", "completion": "data.a.text"}}
    found, notes = one(tmp_path, "prompt_completion", row, **options)
    assert found.reason == "data.label is False: not for training"
    assert notes == {"rows with a column 'data.id', which is not used": 1}
    row["data"] |= {"label": True, "split": "test"}
    found, _ = one(tmp_path, "prompt_completion", row, **options)
    assert (found["prompt"], found["completion"], found["split"]) == (
        "What helps?",
        "Rest.",
        "test",
    )


def test_columns_that_are_not_used_are_on_the_screen_and_in_the_manifest(tmp_path, capsys):
    rows = [pair(n, id=n, source="web" if n % 2 else None) for n in range(80)]
    path = jsonl(tmp_path / "x.jsonl", rows)
    _, (entry,) = collect("instruction", {"dataset": "prompt_completion", "path": str(path)})
    assert entry["notes"] == {
        "rows with a column 'id', which is not used": 80,
        "rows with a column 'source', which is not used": 40,
    }


# --- the source's own splits ----------------------------------------------------------------------


def exam_row(n: int, **extra) -> dict:
    answer = f"The first sign of disorder {n} is symptom {n * 3}, which comes early."
    return {"prompt": f"Exam: first sign of disorder {n}?", "completion": answer, **extra}


def where(splits: dict, word: str) -> dict[str, int]:
    return {
        name: count
        for name, rows in splits.items()
        if (count := sum(row["prompt"].startswith(word) for row in rows))
    }


def own_splits(path: Path, **options) -> dict:
    entry = {"dataset": "prompt_completion", "path": str(path), **options}
    plain = {"near_duplicate_threshold": None, "question_similarity": None}
    return collect("instruction", entry, **plain)[0]


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("train/a.jsonl", "test/a.jsonl"),
        ("medqa_train.jsonl", "medqa_test.jsonl"),
        ("train.jsonl", "eval.jsonl"),
        ("trainset.jsonl", "testset.jsonl"),
        ("train.jsonl", "holdout.jsonl"),
        ("train.jsonl", "medqa_held-out.jsonl"),
    ],
)
def test_files_of_a_test_split_are_never_trained_on(tmp_path, names):
    jsonl(tmp_path / "med" / names[0], [pair(n) for n in range(120)])
    jsonl(tmp_path / "med" / names[1], [exam_row(n) for n in range(60)])
    splits = own_splits(tmp_path / "med")
    assert where(splits, "Exam") == {"test": 60}
    # It has no validation split of its own, so some of its training rows are held out for that.
    kept = where(splits, "What")
    assert kept["train"] > 70 and kept["validation"] > 5 and "test" not in kept
    assert where(own_splits(tmp_path / "med", split="train"), "Exam") == {}
    with pytest.raises(UserError, match="no file of the split 'validation'"):
        read(tmp_path / "med", "prompt_completion", split="validation")


def test_all_three_own_splits_stay_as_they_are(tmp_path):
    for name, start in (("train", 0), ("dev", 100), ("test", 200)):
        jsonl(tmp_path / f"{name}.jsonl", [pair(n) for n in range(start, start + 40)])
    splits = own_splits(tmp_path)
    for name, start in (("train", 0), ("validation", 100), ("test", 200)):
        expected = {pair(n)["prompt"] for n in range(start, start + 40)}
        assert {row["prompt"] for row in splits[name]} == expected


def test_a_file_named_test_is_a_test_split_even_alone_and_a_part_of_a_name_is_not(tmp_path):
    (found,) = read(jsonl(tmp_path / "test.jsonl", [pair(1)]), "prompt_completion")
    assert found["split"] == "test"
    for name in ("blood_test.jsonl", "latest.jsonl", "training.jsonl"):
        (found,) = read(jsonl(tmp_path / "x" / name, [pair(1)]), "prompt_completion")
        assert "split" not in found


@pytest.mark.parametrize("other", ["medqa.jsonl", "medqa_train.jsonl", "more.jsonl"])
def test_a_test_file_beside_others_is_never_trained_on(tmp_path, other):
    jsonl(tmp_path / "d" / other, [pair(n) for n in range(60)])
    exam = jsonl(tmp_path / "d/medqa_test.jsonl", [exam_row(n) for n in range(60)])
    assert where(own_splits(tmp_path / "d"), "Exam") == {"test": 60}
    # As two sources, too, where the names go together.
    alone = [row.get("split") for row in read(exam, "prompt_completion")]
    assert set(alone) == ({None} if other == "more.jsonl" else {"test"})
    if other != "medqa_train.jsonl":
        with pytest.raises(UserError, match="no file of the split 'train'"):
            own_splits(tmp_path / "d", split="train")


@pytest.mark.parametrize("column", ["Split", "subset", "fold", "Partition"])
def test_splits_in_columns_of_other_names_are_honoured(tmp_path, column):
    rows = [pair(n, **{column: "Train"}) for n in range(60)]
    rows += [exam_row(n, **{column: "test"}) for n in range(20)]
    path = jsonl(tmp_path / "x.jsonl", rows)
    assert where(own_splits(path), "Exam") == {"test": 20}
    assert where(own_splits(path, split="train"), "Exam") == {}
    if column != "Split":
        _, notes = one(tmp_path, "prompt_completion", pair(1, **{column: "cardiology"}))
        assert notes == {f"rows with a column {column!r}, which is not used": 1}


def test_a_train_split_that_nothing_names_is_refused(tmp_path):
    with pytest.raises(UserError, match="split 'train' was asked for, but no name"):
        read(jsonl(tmp_path / "x.jsonl", [pair(1)]), "prompt_completion", split="train")


def test_a_split_column_is_honoured(tmp_path):
    rows = [pair(n, split=("train", "Training")[n % 2]) for n in range(120)]
    rows += [exam_row(n, split="test") for n in range(60)]
    rows += [{"prompt": f"Dev {n}?", "completion": pair(n)["completion"], "split": "dev"}
             for n in range(20)]  # fmt: skip
    path = jsonl(tmp_path / "x.jsonl", rows)
    splits = own_splits(path)
    assert where(splits, "Exam") == {"test": 60} and where(splits, "Dev") == {"validation": 20}
    assert where(splits, "What") == {"train": 120}
    splits = own_splits(path, split="train")
    assert where(splits, "Exam") == {} and sum(where(splits, "What").values()) == 120
    found, _ = one(tmp_path, "prompt_completion", pair(1, split="fold 3"))
    assert isinstance(found, Broken) and found.reason == "unknown split 'fold 3'"
    with pytest.raises(UserError, match="no column 'split' says which"):
        one(tmp_path, "prompt_completion", pair(1), split="test")


def test_a_split_that_only_held_out_rows_name_is_honoured(tmp_path):
    """As sparse JSON says it, or the second file of a folder."""
    rows, held_out = [pair(n) for n in range(60)], [exam_row(n, split="test") for n in range(20)]
    splits = own_splits(jsonl(tmp_path / "x.jsonl", [*rows, *held_out]))
    assert where(splits, "Exam") == {"test": 20}
    for name, own in (("a", rows), ("b", held_out)):
        lines = [",".join(own[0]), *(",".join(map(json.dumps, row.values())) for row in own)]
        write(tmp_path / f"d/{name}.csv", "\n".join(lines))
    assert where(own_splits(tmp_path / "d"), "Exam") == {"test": 20}


def test_config_name_is_a_folder_of_a_local_directory(tmp_path):
    jsonl(tmp_path / "d/icliniq/a.jsonl", [pair(1)])
    jsonl(tmp_path / "d/chat/a.jsonl", [pair(2)])
    (found,) = read(tmp_path / "d", "prompt_completion", config_name="chat")
    assert found["prompt"] == pair(2)["prompt"]
    with pytest.raises(UserError, match="no folder or file of the configuration 'all'; found chat"):
        read(tmp_path / "d", "prompt_completion", config_name="all")


def test_a_dataset_saved_to_disk_is_read_with_its_splits(tmp_path, monkeypatch):
    import datasets

    made = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list([pair(n) for n in range(3)]),
            "test": datasets.Dataset.from_list([exam_row(7)]),
        }
    )
    made.save_to_disk(tmp_path / "saved")
    found = read(tmp_path / "saved", "prompt_completion")
    assert [(row["prompt"], row.get("split")) for row in found] == [
        (exam_row(7)["prompt"], "test"),
        *((pair(n)["prompt"], "train or validation") for n in range(3)),
    ]


# --- missing values -------------------------------------------------------------------------------


def test_missing_values_are_no_disease_and_no_text(tmp_path):
    spellings = ["NaN", "nan", "None", "null", "", "N/A", "NaT", "<NA>", "#N/A", "-", None]
    spellings += ["#NULL!", "#VALUE!", "<nil>", "<missing>", "N / A", "n. a.", "NA_character_"]
    rows = [pair(n, entity=spelling) for n, spelling in enumerate(spellings)]
    lines = [json.dumps(row) for row in rows] + [
        json.dumps(pair(99)).replace("}", ', "entity": NaN}')
    ]
    found = read(write(tmp_path / "x.jsonl", "\n".join(lines)), "prompt_completion")
    assert [row["entity"] for row in found] == [None] * 19
    row = {"instruction": "What is flu?", "input": "nan", "output": "An infection."}
    assert one(tmp_path, "alpaca", row)[0]["prompt"] == "What is flu?"
    found, _ = one(tmp_path, "prompt_completion", {"prompt": "What is flu?", "completion": "NaN"})
    assert isinstance(found, Broken) and found.reason == "missing or not text"
    found, _ = one(tmp_path, "prompt_completion", {"prompt": "Which drug?", "completion": "None"})
    assert found["completion"] == "None"


# --- encodings, tables, kinds of files ------------------------------------------------------------

RUSSIAN = "При болезни помогает покой, а также тёплое питьё."
CHINESE = "维生素参与人体代谢，缺乏时会引起症状，应当均衡饮食，多吃蔬菜水果。"
GERMAN = "Gegen Rückenschmerzen helfen Wärme und Bewegung, für Übelkeit gibt es Tee."


@pytest.mark.parametrize(
    ("text", "encoding", "name"),
    [(RUSSIAN, "cp1251", "cp1251"), (CHINESE, "gbk", "gb18030"), (GERMAN, "latin-1", "cp1252")],
)
def test_the_encoding_of_a_file_is_recognised_and_the_line_to_write_works(
    tmp_path, text, encoding, name
):
    rows = [json.dumps({"text": f"{text} {n}"}, ensure_ascii=False) for n in range(60)]
    path = write(tmp_path / "x.jsonl", "\n".join(rows).encode(encoding))
    with pytest.raises(UserError) as error:
        collect("domain", {"dataset": "plain_text", "path": str(path)}, language=None)
    assert f"    encoding: {name}" in str(error.value) and text[:12] in str(error.value)
    with pytest.raises(UserError, match=f"encoding: {name}"):
        formats.recognise(SourceSection(dataset="auto", path=str(path)), "domain")
    assert texts(path, encoding=name)[59] == f"{text} 59"


def test_utf_16_is_read_and_another_encoding_must_exist(tmp_path):
    for encoding in ("utf-16", "utf-16-le"):
        rows = [json.dumps({"text": f"{GERMAN} {n}"}, ensure_ascii=False) for n in range(9)]
        path = write(tmp_path / f"{encoding}.jsonl", "\n".join(rows).encode(encoding))
        assert texts(path) == [f"{GERMAN} {n}" for n in range(9)]
    with pytest.raises(ValueError, match="unknown encoding 'cp12'"):
        SourceSection(dataset="auto", path="x", encoding="cp12")


def test_a_few_bad_lines_of_a_utf_8_file_are_not_taken_for_an_encoding(tmp_path):
    lines = [json.dumps({"text": GERMAN}, ensure_ascii=False).encode() for _ in range(50)]
    lines[7] = '{"text": "caf\xe9"}'.encode("latin-1")
    path = write(tmp_path / "x.jsonl", b"\n".join(lines))
    with pytest.raises(UserError, match="is UTF-8, but for these rows"):
        collect("domain", {"dataset": "plain_text", "path": str(path)})


@pytest.mark.parametrize(
    "head", ["question;answer", "sep=;\r\nquestion;answer", "question;answer;;"]
)
def test_tables_as_excel_writes_them(tmp_path, head):
    lines = f'\ufeff{head}\r\n"What, then?";"Rest; and tea."\r\nWhy?;"Because, so."\r\n'
    path = write(tmp_path / "x.csv", lines)
    columns = {"prompt": "question", "completion": "answer"}
    found = read(path, "prompt_completion", columns=columns)
    assert [row["prompt"] for row in found] == ["What, then?", "Why?"]
    assert found[0]["completion"] == "Rest; and tea."
    with pytest.raises(UserError, match=r"cells separated by ';'\), line . the columns|separated"):
        formats.recognise(SourceSection(dataset="auto", path=str(path)), "instruction")


def test_columns_without_a_name_are_no_columns_until_they_hold_something(tmp_path):
    path = write(tmp_path / "x.csv", "prompt,completion,,\nWhy?,Because it is so.,,\nHow?,So.,,7\n")
    found, notes = loaded(path, "prompt_completion")
    assert [row["prompt"] for row in found] == ["Why?", "How?"]
    assert notes == {"rows with a column '(column 4)', which is not used": 1}


def test_zst_and_ndjson_files_are_read(tmp_path):
    path = tmp_path / "x.ndjson.zst"
    with (
        pyarrow.OSFile(str(path), "wb") as file,
        pyarrow.CompressedOutputStream(file, "zstd") as out,
    ):
        out.write(b'{"text": "One."}\n{"text": "Two."}\n')
    assert texts(path) == ["One.", "Two."]
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(UserError, match=r"x\.ndjson\.zst: cannot be read"):
        texts(path)


def spreadsheet(path: Path, rows: str, shared: str = "") -> Path:
    """The parts of an .xlsx file that matter."""
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    sheets = '<sheet name="A" r:id="rId1"/><sheet name="B" r:id="rId2"/>'
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "xl/workbook.xml",
            f'<workbook {main} xmlns:r="{office}"><sheets>{sheets}</sheets></workbook>',
        )
        archive.writestr(
            "xl/_rels/workbook.xml.rels",
            '<R><Relationship Id="rId1" Target="worksheets/sheet1.xml"/></R>',
        )
        archive.writestr("xl/sharedStrings.xml", f"<sst {main}>{shared}</sst>")
        archive.writestr(
            "xl/worksheets/sheet1.xml",
            f"<worksheet {main}><sheetData>{rows}</sheetData></worksheet>",
        )
    return path


def test_a_spreadsheet_is_read_from_its_first_sheet(tmp_path, capsys):
    rows = (
        '<row r="1"><c r="A1" t="s"><v>0</v></c><c r="C1" t="s"><v>1</v></c></row>'
        '<row r="3"><c r="A3" t="inlineStr"><is><t>What?</t></is></c>'
        '<c r="C3" t="s"><v>2</v></c></row>'
        '<row r="4"><c r="A4"><v>7</v></c><c r="C4" t="e"><v>#N/A</v></c></row>'
    )
    shared = "<si><t>prompt</t></si><si><t>completion</t></si>"
    shared += "<si><r><t>So </t></r><r><t>it is.</t></r></si>"
    path = spreadsheet(tmp_path / "x.xlsx", rows, shared)
    good, bad = read(path, "prompt_completion")
    assert (good["prompt"], good["completion"]) == ("What?", "So it is.")
    assert bad.place == f"{path}, row 4" and bad.reason == "missing or not text"
    assert "only the first sheet is read, not 'B'" in capsys.readouterr().out
    write(tmp_path / "y.xlsx", "not a zip file")
    with pytest.raises(UserError, match="save it in the spreadsheet program as CSV UTF-8"):
        read(tmp_path / "y.xlsx", "prompt_completion")


def test_a_spreadsheets_numbers_are_those_that_it_shows(tmp_path):
    rows = (
        '<row r="1"><c r="A1" t="inlineStr"><is><t>prompt</t></is></c>'
        '<c r="B1" t="inlineStr"><is><t>completion</t></is></c></row>'
        '<row r="2"><c r="A2" t="inlineStr"><is><t>How much?_x000D_Say.</t></is></c>'
        '<c r="B2"><v>4.0999999999999996</v></c></row>'
        '<row r="3"><c r="A3" t="inlineStr"><is><t>How many?</t></is></c>'
        '<c r="B3"><v>12345678901234</v></c></row>'
    )
    one, two = read(spreadsheet(tmp_path / "x.xlsx", rows), "prompt_completion")
    assert one["prompt"].split() == ["How", "much?", "Say."] and one["completion"] == "4.1"
    assert two["completion"] == "12345678901234"


def test_a_prompt_is_cut_off_an_answer_that_repeats_it_not_one_that_begins_alike(tmp_path):
    def pairs(prompt: str, chosen: str, rejected: str) -> tuple[str, str]:
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        found, _ = one(tmp_path, "preference", row)
        return found["chosen"].strip(), found["rejected"].strip()

    asked = "What helps against a cold?"
    assert pairs(asked, f"{asked} Rest.", f"{asked} Nothing.") == ("Rest.", "Nothing.")
    for prompt, *answers in (
        ("Hypertension", "Hypertension is raised pressure.", "Hypertension is no matter."),
        ("Hi", "Hi! How can I help?", "His pulse is fine."),
    ):
        assert pairs(prompt, *answers) == tuple(answers)


def test_a_prompt_may_be_a_dialogue_of_texts(tmp_path):
    """As some collections of preferences have it, up to where the answers begin."""
    prompt = (
        "\n\nHuman: What is flu?\n\nAssistant: An infection.\n\nHuman: Is it bad?\n\nAssistant:"
    )
    row = {
        "prompt": prompt,
        "chosen": "Mostly not, but see a doctor.",
        "rejected": "Never mind it.",
    }
    found, _ = one(tmp_path, "preference", row)
    assert found["prompt"] == "Is it bad?" and found["chosen"].startswith("Mostly not")
    assert found["history"] == [["What is flu?", "An infection."]]
    row = {"prompt": prompt, "completion": "Mostly not."}
    found, _ = one(tmp_path, "prompt_completion", row)
    assert (found["prompt"], found["completion"]) == ("Is it bad?", "Mostly not.")


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_wrong_decoding_is_mended_in_every_script(encoding):
    texts = ["Η γρίπη είναι λοίμωξη", "糖尿病是一种慢性病", "příznaky onemocnění", "ağrı ve ateş"]
    texts += [
        "הכאב",
        "ألم في الصدر",
        "मधुमेह",
        "당뇨병",
        "őssejt",
        "😀 ok",
        "中文。",
        "x “quoted” – y",
    ]
    seen = 0
    for text in texts:
        try:
            wrong = text.encode().decode(encoding)
        except UnicodeDecodeError:  # one of the five bytes that Windows-1252 does not have
            continue
        seen += 1
        assert values.mended(wrong, Counter()) == text
    assert seen >= 6


def test_names_are_mended_as_texts_are(tmp_path):
    names = ["Crohn&#39;s disease", "SjÃ¶gren syndrome", "<b>Asthma</b>"]
    found = [one(tmp_path, "prompt_completion", pair(1, entity=n))[0]["entity"] for n in names]
    assert found == ["Crohn's disease", "Sjögren syndrome", "Asthma"]


def test_what_map_leaves_in_a_saved_folder_is_not_read(tmp_path):
    for name in ("data-00000-of-00001", "cache-1f2e3d4c5b6a7988"):
        table = pyarrow.Table.from_pylist([pair(n) for n in range(4)])
        with (
            pyarrow.OSFile(str(write(tmp_path / f"d/{name}.arrow", "")), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    write(tmp_path / "d/state.json", json.dumps(state))
    assert len(read(tmp_path / "d", "prompt_completion")) == 4


def test_columns_may_name_what_is_inside(tmp_path):
    row = {"data": {"answers": [{"text": "An infection."}], "q": "What is flu?"}, "id": 1}
    columns = {"prompt": "data.q", "completion": "data.answers.0.text"}
    found, notes = one(tmp_path, "prompt_completion", row, columns=columns)
    assert found == {"prompt": "What is flu?", "completion": "An infection.", **DEFAULTS}
    assert notes == {"rows with a column 'id', which is not used": 1}
    path = jsonl(tmp_path / "y.jsonl", [row])
    named = SourceSection(dataset="auto", path=str(path), columns=columns)
    assert formats.recognise(named, "instruction") == "prompt_completion"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<p>Take <b>two</b>.<br/>Then&nbsp;rest &amp; drink.</p>", "Take two. Then rest & drink."),
        ("p <0.05 and n> 3, x <y> z, <a, b>", "p <0.05 and n> 3, x <y> z, <a, b>"),
        ("5 &lt; 6 &amp;lt; 7, AT&T; a&b", "5 < 6 < 7, AT&T; a&b"),
        ("10<sup>9</sup>/L of H<sub>2</sub>O", "10^9/L of H2O"),
        ('See <a href="x">this</a><script>f(1 < 2)</script>.', "See this ."),
        ("cafÃ© for the patientâ€™s heart: 38 Â°C", "café for the patient’s heart: 38 °C"),
        ("Ð“Ñ€Ð¸Ð¿Ð¿ is flu", "Грипп is flu"),
        ("groß… spaß” à… «É» touché…” CAFÉ» Å. É–É", None),
        ("pain â†’ rest if K â‰¥ 5", "pain → rest if K ≥ 5"),
        ("café, naïve, grâce à\u00a0«\u00a0eux\u00a0», Ångström", None),
        ("in\u00adfection\u200b of\u200e the lung\ufeff", "infection of the lung"),
        ("می\u200cخواهم", None),
    ],
)
def test_html_wrong_decoding_and_invisible_characters_are_mended(text, expected):
    notes: Counter[str] = Counter()
    found = " ".join(values.mended(text, notes).split())
    expected = " ".join(text.split()) if expected is None else expected
    assert found == expected and bool(notes) == (found != " ".join(text.split()))


def test_what_cannot_be_mended_is_counted(tmp_path):
    found, notes = one(tmp_path, "plain_text", {"text": "A caf\ufffd and a rest."})
    assert found["text"] == "A caf\ufffd and a rest."
    assert notes == {"texts with U+FFFD where characters were lost before": 1}


# --- exams ----------------------------------------------------------------------------------------


def asked_of(path: Path) -> tuple[list[str], dict[str, str]]:
    data = {"decontaminate": [str(path)]}
    report: dict[str, str] = {}
    config = build([("test", {"model_type": "test", "data": data})])
    return [text for _, text in exams.evaluation_texts(config, report)], report


def test_an_exam_says_how_many_questions_it_has_and_where(tmp_path):
    rows = [{"id": n, "question": f"Which is sign {n}?", "A": "x"} for n in range(99)]
    path = jsonl(tmp_path / "exam.jsonl", rows)
    found, report = asked_of(path)
    assert len(found) == 99
    assert report == {str(path): "99 questions in 'question'; the first: 'Which is sign 0?'"}
    rows = [{"messages": said("system: Be brief.", "user: Which?", "assistant: That.")}]
    rows += [{"question": {"stem": "Which one?", "choices": []}}]
    found, report = asked_of(jsonl(tmp_path / "other.jsonl", rows))
    assert found == ["Which?", "Which one?"]
    assert "1 questions in 'messages', 1 questions in 'question'" in str(report)


def test_an_exam_without_questions_is_refused(tmp_path):
    for rows, expected in (
        ([{"frage": "Was ist es?"}] * 9, r"no question in .*exam\.jsonl.*found 'frage'"),
        ([{"question": None}] * 9, "no question in"),
        ([{"question": "Which?"}] * 9 + [{"question": "N/A"}], "1 of 10 rows"),
    ):
        path = jsonl(tmp_path / "exam.jsonl", rows)
        with pytest.raises(UserError, match=f"(?s){expected}"):
            asked_of(path)
    rows = [{"question": f"Which is sign {n}?"} for n in range(200)] + [{"question": ""}]
    found, report = asked_of(jsonl(tmp_path / "exam.jsonl", rows))
    assert len(found) == 200 and "1 rows without one" in str(report)


def test_a_text_file_of_an_exam_has_a_question_a_line_or_a_paragraph(tmp_path):
    lines = "".join(f"What is sign {n}?\n" for n in range(120))
    assert len(asked_of(write(tmp_path / "exam.txt", "\n" + lines + "\n"))[0]) == 120
    paragraphs = "".join(f"What is sign {n}?\nA yes\nB no\n\n" for n in range(120))
    found, _ = asked_of(write(tmp_path / "exam.txt", paragraphs))
    assert len(found) == 120 and found[0] == "What is sign 0?\nA yes\nB no"


# --- files that the system refuses ----------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_not_said_to_be_unwritable(tmp_path, monkeypatch):
    from liteguard.data import shards

    path = jsonl(tmp_path / "x.jsonl", [pair(1)])

    def refuse(file):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(shards.checkpoints, "sha256_file", refuse)
    with pytest.raises(UserError, match=r"x\.jsonl: cannot be read \(Permission denied\)"):
        shards.file_hashes(SourceSection(dataset="auto", path=str(path)))


def test_every_error_of_the_system_is_one_message(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from liteguard import cli\n"
        "cli.run(lambda: open(sys.argv[2]))\n"
    )
    script = write(tmp_path / "x.py", code)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, expected in (
        ("none", "No such file"),
        ("loop", "Too many levels"),
        (".", "Is a dir"),
    ):
        result = run_script(script, ROOT, tmp_path / name, env={**os.environ})
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert expected in result.stderr and "Free space" not in result.stderr


def test_a_split_that_no_file_can_have_is_refused_with_the_configuration(tmp_path):
    values = {"dataset": "auto", "path": str(tmp_path), "split": "holdout"}
    with pytest.raises(UserError, match=r"split 'holdout' of a local path: allowed are all, train"):
        build([("test", {"model_type": "test", "data": {"domain": [values]}})])
