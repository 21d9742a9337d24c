"""Whole conversations, from files to targets: every answer is learnt from, what was said never."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext

import pytest
from test_kept_rows import Prepared, words
from test_layouts import CALL, one, said
from test_prompts import answers, config, prepared
from test_readers import jsonl
from test_sets import read as read_set

from liteguard import models
from liteguard.data import conversations, formats
from liteguard.data.readers import LeftOut
from liteguard.errors import UserError
from liteguard.evaluation import held_out, run, summary
from liteguard.evaluation.answerers import Generated
from liteguard.evaluation.contamination import contamination
from liteguard.evaluation.journal import Journal
from liteguard.export import measured
from liteguard.prompts import Prompt
from liteguard.rows import load_split, questions
from liteguard.training import tokens

SLOT = Prompt(system_prefix="System: ", system_suffix="\n")
TURNS = [
    ("What is the heart?", "It is an organ."),
    ("Is it a muscle?", "Yes, a hollow one."),
    ("And the lung?", "It is not: the lung has none."),
]
ROW = {"prompt": TURNS[2][0], "completion": TURNS[2][1], "history": [list(t) for t in TURNS[:2]]}
SAID = [
    {"role": role, "content": text}
    for turn in TURNS
    for role, text in zip(("user", "assistant"), turn, strict=True)
]


@pytest.fixture(scope="module")
def tokenizer(tiny_phi):
    return models.load_tokenizer(str(tiny_phi), Prompt(), 640)


# --- from messages to rows ------------------------------------------------------------------------


def test_messages_are_one_row_with_all_their_turns(tmp_path):
    found, notes = one(tmp_path, "messages", {"messages": said("system: Be brief.") + SAID})
    assert {name: found[name] for name in ROW} == ROW
    assert found["system"] == "Be brief." and "untrained" not in found
    assert notes == {formats.CONVERSATIONS: 1, conversations.SYSTEM: 1}
    row = {"conversations": SAID, "system": "Be brief."}
    assert one(tmp_path, "sharegpt", row)[0] == found
    # Said twice it is one text; two texts are both kept.
    both = {"messages": said("system: Be brief.") + SAID, "system": "Be brief."}
    assert one(tmp_path, "messages", both)[0] == found
    both["system"] = "Be kind."
    assert one(tmp_path, "messages", both)[0]["system"] == "Be kind.\nBe brief."


def test_an_answer_with_weight_0_is_context_and_never_learnt_from(tmp_path):
    turns = [dict(turn) for turn in SAID]
    turns[1]["weight"] = 0
    found, notes = one(tmp_path, "messages", {"messages": turns})
    assert found["untrained"] == [0] and found["history"] == ROW["history"]
    assert notes["rows with earlier answers that are context and not learnt from"] == 1
    # A conversation ends with its last answer that is learnt from.
    turns[5]["weight"] = 0
    found, _ = one(tmp_path, "messages", {"messages": turns})
    assert (found["prompt"], found["history"]) == (TURNS[1][0], [list(TURNS[0])])
    for turn in turns[1::2]:
        turn["weight"] = 0
    found, _ = one(tmp_path, "messages", {"messages": turns})
    assert isinstance(found, LeftOut) and found.reason.startswith("an answer with weight 0")


@pytest.mark.parametrize(
    ("rest", "note"),
    [
        ([*said("user: Dose?"), CALL, *said("tool: 3", "assistant: 3 mg.")], "an answer by tools"),
        (
            said("system: Now be rude.", "user: A?", "assistant: B."),
            "a system turn after the first",
        ),
        (
            said("user: A?", "system: Now be rude.", "assistant: B."),
            "a system turn after the first",
        ),
    ],
)
def test_a_conversation_is_used_up_to_what_cannot_be_rendered(tmp_path, rest, note):
    found, notes = one(tmp_path, "messages", {"messages": SAID[:4] + rest})
    assert (found["prompt"], found["completion"]) == TURNS[1] and len(found["history"]) == 1
    assert any(text.startswith(f"rows that are used up to {note}") for text in notes), notes


def test_a_last_question_without_an_answer_is_left_out_by_name(tmp_path):
    found, notes = one(tmp_path, "messages", {"messages": SAID[:5]})
    assert found["prompt"] == TURNS[1][0]
    assert notes["rows that end with a question, which is left out"] == 1


def test_a_system_text_is_kept_where_the_prompt_has_a_place_for_it(tmp_path):
    rows = [{"messages": said("system: Be brief.", f"user: {words(n)}", f"assistant: {words(n+9)}")}
            for n in range(90)]  # fmt: skip
    made = Prepared(tmp_path, instruction=rows).run()
    assert not any("system" in row for row in made.rows("instruction"))
    notes = [entry["notes"] for entry in made.manifest["sources"] if entry["part"] == "instruction"]
    assert notes == [{conversations.NO_SLOT: 90}]
    made.values = {"prompt": {"system_prefix": "System: ", "system_suffix": "\n"}}
    found = made.run().rows("instruction")
    assert found and all(row["system"] == "Be brief." for row in found)
    # Training with a prompt without a place for it would lose it in silence.
    with pytest.raises(UserError, match="no place for it"):
        held_out.held_out(config("phi-2.yaml", evaluate={"knowledge_rows": 0}), made.output)


# --- one text and one mask ------------------------------------------------------------------------


def spans(text: str, answers: list[str], end: str) -> list[tuple[int, int]]:
    """Where the answers with their end tokens are in a text, found by looking for them."""
    found, begin = [], 0
    for answer in answers:
        begin = text.index(answer + end, begin)
        found.append((begin, begin + len(answer + end)))
        begin += len(answer + end)
    return found


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("untrained", [[], [0], [1], [0, 1]])
def test_three_turns_token_by_token(tokenizer, tmp_path, system, untrained):
    row = {**ROW, "untrained": untrained} | ({"system": system} if system else {})
    [(ids, labels)] = answers(tokenizer, tmp_path, [row], SLOT)
    text = SLOT.render_conversation(TURNS, system)
    assert text.startswith("System: Be brief.\nInstruct: " if system else "Instruct: ")
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert ids == whole["input_ids"]
    learnt = [answer for n, (_, answer) in enumerate(TURNS) if n not in untrained]
    wanted = spans(text, learnt, SLOT.end_token)
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        begin, end = whole["offset_mapping"][place]
        inside = any(first <= begin and end <= last for first, last in wanted)
        assert label == (token if inside else -100), (place, tokenizer.decode(token))
    assert labels.count(tokenizer.eos_token_id) == len(learnt)
    # Of the first question nothing is a target, though the mask of later turns is another one.
    assert labels[0] == -100


@pytest.mark.parametrize("prompt", [SLOT, Prompt()])
def test_the_chat_template_gives_the_tokens_of_training(tokenizer, tmp_path, prompt):
    tokenizer.chat_template = prompt.chat_template()
    system = [{"role": "system", "content": "Be brief."}]
    own = "Be brief." if prompt.has_system_slot else None
    whole = prompt.render_conversation(TURNS, "Be brief.")
    assert tokenizer.apply_chat_template(system + SAID, tokenize=False) == whole
    assert ("Be brief." in whole) == prompt.has_system_slot
    asked = tokenizer.apply_chat_template(
        SAID[:5], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert asked == models.encode(tokenizer, prompt.render_row(ROW))
    # What a device is given turn by turn, and what it wrote, one after the other.
    pieces = [models.encode(tokenizer, text) for text in prompt.segments(TURNS, own)]
    assert sum(pieces, []) == models.encode(tokenizer, whole)


def test_a_conversation_of_one_exchange_is_rendered_as_before():
    for prompt in (SLOT, Prompt(system="You help."), config("smollm2-135m.yaml").prompt):
        assert prompt.segments([("Q", "A")]) == [
            prompt.render_question("Q"),
            f"A{prompt.end_token}",
        ]
        assert prompt.render_row({"prompt": "Q"}) == (
            f"{prompt.system_block}{prompt.user_prefix}Q{prompt.user_suffix}{prompt.model_prefix}"
        )


def test_counts_of_targets_are_those_of_the_labels(tokenizer, tmp_path):
    rows = [{"prompt": "What is it?", "completion": "An organ."}, ROW, {**ROW, "untrained": [1]}]
    cache = {"cache_dir": str(tmp_path / "cache")}
    settings = config("phi-2.yaml", data=cache)
    directory = prepared(tmp_path, "instruction", rows)
    for _ in range(2):  # the second time from the cache
        found = tokens.answers(tokenizer, directory, "train", settings)
        labels = [found.row(n)[1] for n in range(3)]
        assert found.supervised.tolist() == [int((own != -100).sum()) for own in labels]
        assert found.first(2).supervised.tolist() == found.supervised.tolist()[:2]


# --- lengths --------------------------------------------------------------------------------------


def test_a_long_conversation_loses_its_oldest_exchanges_and_says_so(tokenizer, tmp_path, capsys):
    [(whole, _)] = answers(tokenizer, tmp_path / "a", [ROW])
    [(ids, labels)] = answers(tokenizer, tmp_path / "b", [ROW], max_length=len(whole) - 1)
    assert tokenizer.decode(ids) == Prompt().render_conversation(TURNS[1:])
    assert labels.count(tokenizer.eos_token_id) == 2
    assert "1 of 1 rows lose old exchanges" in capsys.readouterr().out
    long = {**ROW, "history": [["What is it? " * 9, "An organ."], *ROW["history"]]}
    long["untrained"] = [0, 2]
    [(ids, labels)] = answers(tokenizer, tmp_path / "c", [long], max_length=len(whole))
    assert ids == whole
    shown = tokenizer.decode([label for label in labels if label != -100])
    assert shown == "".join(f"{TURNS[n][1]}<|endoftext|>" for n in (0, 2))


def test_questions_without_their_beginning_are_counted_and_refused(tokenizer, tmp_path, capsys):
    rows = [{"prompt": "What is it?", "completion": "An organ."}] * 199
    long = {"prompt": "word " * 200, "completion": "An organ."}
    assert len(answers(tokenizer, tmp_path, [*rows, long], max_length=40)) == 200
    assert "1 of 200 rows lose the beginning of their question" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"(?s)3 of 200 .* beginning of their question.*max_charac"):
        answers(tokenizer, tmp_path, [*rows[2:], long, long, long], max_length=40)


def test_pairs_are_rendered_with_their_history(tokenizer, capsys):
    pair = {"prompt": TURNS[2][0], "chosen": "Yes.", "rejected": "No.", "kind": "ordinary"}
    row = pair | {"history": ROW["history"], "system": "Be brief."}

    def rendered(length: int) -> dict:
        settings = config("phi-2.yaml", prompt=SLOT.model_dump(), safety={"max_length": length})
        (made,) = tokens.render_preferences(tokenizer, [row], settings, "train", 1, {}, {})
        return made

    whole = SLOT.render_conversation([*TURNS[:2], (TURNS[2][0], None)], "Be brief.")
    assert rendered(500) == {
        "prompt": whole, "chosen": "Yes.<|endoftext|>", "rejected": "No.<|endoftext|>"
    }  # fmt: skip
    assert "lose old" not in capsys.readouterr().out
    room = len(models.encode(tokenizer, whole + "Yes.<|endoftext|>"))
    shorter = SLOT.render_conversation([TURNS[1], (TURNS[2][0], None)], "Be brief.")
    assert rendered(room - 1)["prompt"] == shorter
    assert "1 of 1 pairs lose old exchanges" in capsys.readouterr().out


# --- splits, copies, leaks ------------------------------------------------------------------------


def talk(*numbers: int) -> dict:
    """A conversation about made-up things, a question and an answer for each number."""
    turns = [text for n in numbers for text in (f"user: {words(n)}?", f"assistant: {words(n + 1)}")]
    return {"messages": said(*turns)}


def talks(*extra: dict) -> list[dict]:
    return [*(talk(n * 10, n * 10 + 5000) for n in range(1, 90)), *extra]


def test_a_conversation_is_in_one_split_and_copies_are_found_by_all_turns(tmp_path):
    same_opening = [talk(10, 77_000 + 10 * n) for n in range(7)]
    again = {"messages": talk(20, 5020)["messages"]}
    made = Prepared(tmp_path, instruction=talks(*same_opening, again)).run()
    rows = made.rows("instruction")
    assert [d["reason"] for d in made.dropped()].count("duplicate") == 1
    # Conversations that open with the same question are no copies, and are in the same split.
    opening = [row for row in rows if row["history"][0][0] == f"{words(10)}?"]
    assert len(opening) == 8 and len({row["in"] for row in opening}) == 1
    counted = [made.manifest["counts"][f"instruction/{s}.jsonl"] for s in ("train", "test")]
    assert all(entry["conversations"] == entry["rows"] for entry in counted)
    for split in ("train", "validation", "test"):
        assert load_split(made.output, "instruction", split)


def test_greetings_do_not_keep_conversations_together(tmp_path):
    rows = [
        {"messages": [*said("user: Hello doctor!", "assistant: Hello."), *talk(n * 10)["messages"]]}
        for n in range(1, 120)
    ]
    found = Counter(
        row["in"] for row in Prepared(tmp_path, instruction=rows).run().rows("instruction")
    )
    assert all(found[split] > 5 for split in ("train", "validation", "test")), found


@pytest.mark.parametrize("turn", ["first", "last", "inside"])
def test_a_test_question_in_any_turn_is_kept_out_of_training(tmp_path, turn):
    """The held-out questions are rows of one exchange; a conversation asks each of them again."""
    long = [f"{words(n)}?" for n in range(120)]
    short = [f"Is sign {words(n, 2)} bad?" for n in range(60)]
    singles, again = [], []
    for n, question in enumerate([*long, *(short if turn != "inside" else [])]):
        singles.append({"messages": said(f"user: {question}", f"assistant: {words(n + 700)}")})
        asked = f"Say this, please: {question} Thank you." if turn == "inside" else question
        two = said(f"user: {asked}", f"assistant: {words(n + 9000)}")
        rest = talk(n + 40_000)["messages"]
        again.append({"messages": rest + two if turn == "last" else two + rest})
    made = Prepared(tmp_path, instruction=singles + again).run(question_similarity=None)
    held = {row["prompt"] for row in made.rows("instruction", "test") if "history" not in row}
    assert held & set(long) and (turn == "inside" or held & set(short))
    trained = made.rows("instruction", "train")
    turns = [text for row in trained for text in questions(row)]
    assert not [text for text in turns if any(question in text for question in held)]
    assert any("history" in row for row in trained)


def test_an_exam_question_in_an_early_turn_is_found(tmp_path):
    exam = [{"question": "Which is it?"}, {"question": f"{words(70_000)} {words(70_001)}?"}]
    path = jsonl(tmp_path / "exam.jsonl", exam)
    asking = [
        {
            "messages": [
                *said(f"user: {q['question']}", "assistant: So."),
                *talk(n + 60_000)["messages"],
            ]
        }
        for n, q in enumerate(exam)
    ]
    made = Prepared(tmp_path, instruction=talks(*asking)).run(decontaminate=[str(path)])
    assert [d["reason"] for d in made.dropped()].count(f"overlaps {path}") == 2


def test_a_near_paraphrase_of_an_exam_question_in_an_early_turn_is_found(tmp_path):
    exam = [{"question": "Which drug relieves zorbitis of the left quandle fastest?"}]
    path = jsonl(tmp_path / "exam.jsonl", exam)
    near = said(
        "user: Which drug relieves zorbitis of the right quandle fastest?", "assistant: So."
    )
    made = Prepared(
        tmp_path, instruction=talks({"messages": [*near, *talk(60_000, 61_000)["messages"]]})
    )
    made.run(decontaminate=[str(path)], question_similarity=0.6)
    assert [d["reason"] for d in made.dropped()].count(f"resembles a question of {path}") == 1


def test_what_is_too_long_or_in_another_language_is_seen_in_any_turn(tmp_path):
    german = (
        "Die Leber ist ein Organ, und sie liegt im rechten Oberbauch unter dem Zwerchfell. " * 2
    )
    english = "It is an organ of the body, and it lies in the upper part of the belly on the right."
    end = ("user: So?", f"assistant: {english}")
    rows = [
        {"messages": said("user: What is it?", f"assistant: {german}", *end)},
        {"messages": said(f"user: {'Why? ' * 900}", "assistant: So.", *end)},
        {"messages": said("user: ...", "assistant: So.", *end)},
    ]
    made = Prepared(tmp_path, instruction=talks(*rows)).run(language="en", max_characters=3000)
    lost = Counter(d["reason"] for d in made.dropped())
    assert (lost["not en"] >= 1, lost["too long"], lost["empty"]) == (True, 1, 1)


# --- prepared rows are checked --------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"history": []},
        {"history": [["Q"]]},
        {"history": [["Q", None]]},
        {"history": [["Q", ""]]},
        {"history": [["Q", "A"]], "untrained": [1]},
        {"history": [["Q", "A"]], "untrained": [True]},
        {"untrained": [0]},
        {"system": ""},
        {"system": None},
    ],
)
def test_a_prepared_row_with_a_wrong_history_is_refused(tmp_path, wrong):
    prepared(tmp_path, "instruction", [{"prompt": "Q", "completion": "A", **wrong}])
    with pytest.raises(UserError, match=r"train\.jsonl, line 1: .*Prepare it again"):
        load_split(tmp_path, "instruction", "train")


# --- evaluation -----------------------------------------------------------------------------------


def test_the_last_question_is_asked_and_scored_after_its_history():
    settings = config("phi-2.yaml", prompt=SLOT.model_dump())
    row = {**ROW, "system": "Be brief."}
    context, target = held_out.answer_pair(settings, row)
    assert context + target == SLOT.render_conversation(TURNS, "Be brief.")
    assert target == f"{TURNS[2][1]}<|endoftext|>"


def test_a_held_out_question_is_looked_for_in_every_turn_of_the_training_data(tmp_path):
    for part in ("domain", "instruction", "preference"):
        prepared(tmp_path, part, [{}])
    asked = "What is the heart?"
    rows = {
        "domain": [{"text": "A text."}],
        "instruction": [ROW],
        "preference": [{"prompt": "Why?", "chosen": "A.", "rejected": "B."}],
    }
    manifest = {"model_type": "x", "files": {}}
    for part, own in rows.items():
        prepared(tmp_path, part, own)
        manifest["files"] |= json.loads((tmp_path / "manifest.json").read_text())["files"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    held = {"questions": [{"prompt": asked}, {"prompt": "And the liver?"}], "talks": [dict(ROW)]}
    found = contamination(held, held, [tmp_path])
    assert found["by_set"] == {"questions": 1, "talks": 1}
    held = {"talks": [{**ROW, "prompt": "Another last question?"}]}
    assert contamination(held, held, [tmp_path])["found"] == 0


def test_a_bundle_is_proven_on_rows_with_a_history(tokenizer, tmp_path):
    """Those rows are generated and scored after their history; the first one has none."""
    texts = [{"text": f"A text of some words about {words(n)}"} for n in range(4)]
    pair = {"prompt": "Why?", "chosen": "A.", "rejected": "B.", "kind": "harmful"}
    rows = {
        "domain": texts,
        "instruction": [ROW, {"prompt": "What is it?", "completion": "An organ."}],
        "preference": [{**pair, "history": ROW["history"]}],
    }
    everything = {}
    for part, own in rows.items():
        for split in ("test", "validation", "train"):
            prepared(tmp_path, part, own, split)
            everything |= json.loads((tmp_path / "manifest.json").read_text())["files"]
    manifest = {"model_type": "x", "files": everything}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    settings = config("phi-2.yaml", prompt=SLOT.model_dump())
    samples = measured.collect_samples(settings, tmp_path, tokenizer.backend_tokenizer)
    whole = SLOT.render_row(ROW)
    shown = [samples.render(SLOT, n) for n in range(len(samples.asked))]
    asked_why = SLOT.render_question("Why?", ROW["history"])
    assert shown == [SLOT.render_question("What is it?"), whole, asked_why]
    assert (whole, f"{ROW['completion']}<|endoftext|>") in samples.pairs
    assert {TURNS[0][0], TURNS[1][1]} <= set(samples.texts)


class Recorder:
    """An answerer that keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def generate(self, prompts, max_new_tokens, samplings=None):
        self.given += prompts
        return ((n, Generated("It is.", 3, True)) for n in range(len(prompts)))

    def peak_rss_gb(self) -> float:
        return 0.1


def test_answers_are_generated_after_the_history(tmp_path):
    settings = config("phi-2.yaml", prompt=SLOT.model_dump())
    row = {**ROW, "system": "Be brief.", "kind": "question"}
    rows = {name: [] for name in ("texts", "knowledge", *held_out.TIERS, *held_out.REQUESTS)}
    rows["questions"] = [row]
    model = Recorder()
    with Journal(tmp_path / "x.jsonl", {}) as journal:
        run.collect(lambda: nullcontext(model), settings, rows, journal)
        (answer,) = summary.given_answers(rows, journal)
    assert model.given == [SLOT.render_conversation([*TURNS[:2], (TURNS[2][0], None)], "Be brief.")]
    assert (answer["history"], answer["system"]) == (ROW["history"], "Be brief.")


def test_an_outside_set_of_conversations_is_measured_on_their_last_turn(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"messages": said("system: Be brief.") + SAID}])
    found = read_set(path, "questions")["x"][0]
    assert {name: found[name] for name in ROW} == ROW and "system" not in found
    found = read_set(jsonl(path, [{"messages": SAID[:5]}]), "ordinary")["x"][0]
    assert (found["prompt"], found["history"]) == (ROW["prompt"], ROW["history"])
    assert "completion" not in found
