"""What is true in the data stays there: on small files in the layout of consumer health questions.

Our own sentences, with the traps of such files: one sentence about many diseases, several answers
to a question, diseases under several names, signs that say all, short and long rows.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, fail

from liteguard import checkpoints, registry
from liteguard.config import build, parse_setting, read_yaml
from liteguard.data import entities, preparation
from liteguard.errors import UserError
from liteguard.evaluation import comparison, held_out
from liteguard.rows import FIELDS, SPLITS
from liteguard.text import match_key, pieces, text_key

Row = dict[str, str]
RECESSIVE = (
    "It is inherited in an autosomal recessive pattern, which means that both copies of the gene "
    "have a change in every cell. The parents each carry one changed copy, but as a rule they show "
    "no signs of the condition themselves and learn of it by the birth of a child."
)
DOMINANT = (
    "It is inherited in an autosomal dominant pattern, which means that one changed copy of the "
    "gene in every cell is enough. Often one parent has the condition, and in other families the "
    "change is a new one and nobody had any signs of it before the birth of a child."
)


def disease_names(count: int) -> list[str]:
    generator = random.Random(1)
    return [f"{''.join(generator.choices('bcdfgaeiou', k=9))} disease" for _ in range(count)]


def words(seed: int, count: int = 12) -> str:
    pool = "heart lung liver kidney skin bone pain fever cough rash child adult nurse drug dose"
    text = " ".join(random.Random(seed).choices([*pool.split(), "the", "of", "and"], k=count))
    return f"{text.capitalize()} number{seed}."


def inheritance(name: str, answer: str) -> Row:
    """A row as in files of question, answer and focus; the answers differ in nothing."""
    return {"question": f"Is {name} inherited?", "answer": answer, "focus": name}


class Prepared:
    """`preparation.prepare` over files of our own, in this process."""

    def __init__(self, directory: Path, **files: list[Row]) -> None:
        self.directory = directory
        self.values: dict[str, object] = {}  # of other sections
        directory.mkdir(exist_ok=True)
        files.setdefault("domain", [{"text": words(n, 20)} for n in range(90)])
        files.setdefault(
            "instruction", [{"prompt": words(n), "completion": words(n + 500)} for n in range(90)]
        )
        files.setdefault(
            "preference",
            [
                {"prompt": words(n + 2000), "chosen": words(n + 3000), "rejected": words(n + 4000)}
                | {"kind": "harmful" if n % 2 else "ordinary"}
                for n in range(90)
            ],
        )
        self.data = {"cache_dir": str(directory / "cache"), "language": None}
        self.data |= {"test_share": 0.2, "validation_share": 0.1}
        for part, rows in files.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (directory / f"{part}.jsonl").write_text(text)
            self.data[part] = [{"dataset": "auto", "path": str(directory / f"{part}.jsonl")}]
        if "question" in files["instruction"][0]:
            columns = {"prompt": "question", "completion": "answer"}
            if "focus" in files["instruction"][0]:
                columns["entity"] = "focus"
            self.data["instruction"][0] |= {"columns": columns, "dataset": "prompt_completion"}

    def run(self, **data: object) -> Prepared:
        values = {"model_type": "own", "data": self.data | data, **self.values}
        self.config = build([("test", values)])
        self.config.evaluate.knowledge_rows = 0
        preparation.check_sources(self.config)
        self.output = self.directory / f"out{len(list(self.directory.glob('out*')))}"
        inputs = preparation.plan(self.config)
        work = checkpoints.open_work(self.output, inputs, record="manifest.json")
        assert work
        self.manifest = preparation.prepare(self.config, work)
        files = [*self.manifest["counts"], "dropped.jsonl", "NOTICE.md"]
        checkpoints.publish(work, self.output, self.manifest, files, "manifest.json")
        return self

    def rows(self, part: str, *splits: str) -> list[dict]:
        return [
            json.loads(line) | {"in": split}
            for split in splits or SPLITS
            for line in (self.output / part / f"{split}.jsonl").read_text().split("\n")[:-1]
        ]

    def dropped(self, part: str = "instruction") -> list[dict]:
        lines = (self.output / "dropped.jsonl").read_text().split("\n")[:-1]
        return [entry for entry in map(json.loads, lines) if entry["part"] == part]


# --- near duplicates ------------------------------------------------------------------------------
def test_one_sentence_about_many_diseases_is_a_fact_of_each(tmp_path):
    names = disease_names(150)
    rows = [inheritance(n, DOMINANT if i % 3 else RECESSIVE) for i, n in enumerate(names)]
    symptoms = [
        {
            "question": f"What are the symptoms of {name}?",
            "answer": f"The signs of {name} are those below. Not everybody has all of them, they "
            "may come at any age, and a doctor has to say what they are due to: fever and cough.",
            "focus": name,
        }
        for name in names
    ]
    prepared = Prepared(tmp_path, instruction=rows + symptoms).run()
    assert not prepared.dropped()
    kept = Counter(row["completion"] for row in prepared.rows("instruction"))
    assert kept[RECESSIVE] == 50 and kept[DOMINANT] == 100


def test_pairs_that_are_near_in_both_sides_are_dropped_and_others_not(tmp_path):
    name = disease_names(1)[0]
    asked = f"How is the {name} passed on in the families of the patients that have it?"
    short = f"What dose of the syrup against {name} for a child of 5 years in the night?"
    planted = {
        "first": (asked, RECESSIVE),
        "near in both": (asked.replace("patients", "the patients"), f"{RECESSIVE} Ask a doctor."),
        "other answer": (asked, DOMINANT),
        "other question": (asked.replace("passed on", "treated"), RECESSIVE + " See."),
        "a dose": (short, DOMINANT + " So."),
        "another number": (short.replace("5", "8"), DOMINANT + " So is it."),
    }
    rows = [{"question": q, "answer": a, "focus": name} for q, a in planted.values()]
    others = [{"question": words(n), "answer": words(n + 99), "focus": str(n)} for n in range(90)]
    prepared = Prepared(tmp_path, instruction=rows + others).run()
    found = [(d["reason"], d["row"]["prompt"]) for d in prepared.dropped()]
    assert found == [("near duplicate", planted["near in both"][0])]


def test_one_word_or_sign_of_a_long_question_is_a_fact(tmp_path):
    case = (
        "A {}-year-old patient comes to the clinic because of chest pain that began two hours ago "
        "while climbing stairs. He has had high blood pressure for ten years and takes a tablet "
        "every day. His pulse is 88 per minute and the examination shows nothing else of note. His "
        "potassium is {} 5.5 and he asks whether he may take {} with this. What do you tell him?"
    )
    answer = (
        "No. Stop it and see your doctor today, who has to look at your heart and your kidneys."
    )
    drugs = ["ibuprofen", "naproxen", "diclofenac", "amiloride", "heparin", "digoxin"]
    rows = [{"prompt": case.format(55, s, d), "completion": answer} for d in drugs for s in "<>"]
    rows.append({"prompt": case.format(55, "<", "ibuprofen tablets"), "completion": answer})
    others = [{"prompt": words(n), "completion": words(n + 500)} for n in range(60)]
    prepared = Prepared(tmp_path, instruction=others + rows).run(question_similarity=None)
    lost = [d["row"]["prompt"] for d in prepared.dropped() if d["reason"] == "near duplicate"]
    assert lost == [rows[-1]["prompt"]]


def test_answers_that_differ_in_a_number_or_in_yes_and_no_are_two(tmp_path):
    dose = (
        "{}The usual dose for an adult is {} mg twice a day with a meal. Patients with disease of "
        "the kidneys need less of it, and children under twelve years should not take it at all. "
        "Common side effects are nausea, headache, dizziness and a dry mouth, which go away."
    )
    asked = "May I take this when I am pregnant, and how much of it?"
    said = [("", 5), ("", 50), ("No. ", 5), ("Yes. ", 5)]
    rows = [{"prompt": asked, "completion": dose.format(*values)} for values in said]
    rows.append({"prompt": asked, "completion": rows[0]["completion"] + " Ask a doctor."})
    pairs = [{"prompt": asked, "chosen": r["completion"], "rejected": words(7, 9)} for r in rows]
    pairs.append(pairs[0] | {"rejected": f"Not {words(7, 9)}"})
    others = [{"prompt": words(n), "completion": words(n + 500)} for n in range(60)]
    more = [{"prompt": words(n), "chosen": words(n + 9), "rejected": words(n)} for n in range(60)]
    prepared = Prepared(tmp_path, instruction=others + rows, preference=more + pairs)
    prepared.run(question_similarity=None)
    for part, learnt in (("instruction", "completion"), ("preference", "chosen")):
        near = [d["row"] for d in prepared.dropped(part) if d["reason"] == "near duplicate"]
        assert [row[learnt] for row in near] == [rows[-1]["completion"]]


def test_pairs_with_another_rejected_answer_are_kept(tmp_path):
    rows = [
        {"prompt": f"Is it {words(n // 3 + 5000)}", "chosen": words(n // 3 + 6000, 30)}
        | {"rejected": words(n + 7000, 30)}
        for n in range(240)
    ]
    prepared = Prepared(tmp_path, preference=rows).run(question_similarity=None)
    assert len(prepared.rows("preference")) == 240 and not prepared.dropped("preference")


def test_a_pair_and_its_opposite_are_no_near_duplicates(tmp_path):
    """Raters who do not agree: the first one would have won without a word."""
    rows = []
    for n in range(60):
        asked, one, other = f"Is it {words(n + 5000)}", words(n + 6000, 30), words(n + 7000, 30)
        rows.append({"prompt": asked, "chosen": one, "rejected": other})
        rows.append({"prompt": asked, "chosen": other, "rejected": one})
    prepared = Prepared(tmp_path, preference=rows).run(question_similarity=None)
    assert len(prepared.rows("preference")) == 120 and not prepared.dropped("preference")


# --- several answers ------------------------------------------------------------------------------
def several(count: int = 100) -> list[Row]:
    return [
        {"question": f"What helps against ailment{n}?", "answer": words(900 + 3 * n + k, 9 + 5 * k)}
        for n in range(count)
        for k in (1, 2, 0)
    ]


def test_several_answers_to_a_question_stay_together(tmp_path):
    rows = several()
    prepared = Prepared(tmp_path, instruction=[*rows, rows[0]]).run(question_similarity=None)
    assert [d["reason"] for d in prepared.dropped()] == ["duplicate"]
    where: dict[str, set[str]] = {}
    for row in prepared.rows("instruction"):
        where.setdefault(row["prompt"], set()).add(row["in"])
    assert all(len(splits) == 1 for splits in where.values())
    for rule, longest in (("first", 14), ("longest", 19)):
        chosen = prepared.run(question_similarity=None, several_answers=rule)
        kept = chosen.rows("instruction")
        assert len(kept) == 100 and {len(r["completion"].split()) for r in kept} == {longest + 1}
        reasons = Counter(d["reason"] for d in chosen.dropped())
        assert reasons == {f"not the {rule} answer to its question": 200, "duplicate": 1}


def test_a_question_about_two_diseases_is_not_on_two_sides(tmp_path):
    names = disease_names(120)
    rows = [
        {"question": f"What about case {n % 40}?", "answer": words(n, 15), "focus": name}
        for n, name in enumerate(names)
    ]
    prepared = Prepared(tmp_path, instruction=rows).run(question_similarity=None)
    where: dict[str, set[str]] = {}
    for row in prepared.rows("instruction"):
        where.setdefault(row["prompt"], set()).add(row["in"])
    assert all(len(splits) == 1 for splits in where.values())
    reasons = Counter(d["reason"] for d in prepared.dropped())
    assert set(reasons) == {f"its question is in the {s} split" for s in ("test", "validation")}


# --- what rows are about --------------------------------------------------------------------------
@pytest.fixture
def table(monkeypatch):
    """A table of 80 diseases with two names each, in place of the embedded one."""
    names = disease_names(80)
    known = {name: name for name in names} | {f"morbus {name}": name for name in names}
    monkeypatch.setattr(preparation, "known_names", lambda *_: {"table": "1"})
    monkeypatch.setattr(registry, "ENTITIES", [("table",), lambda cache_dir: known])
    return names


def check_unseen(prepared: Prepared, subject: dict[str, str]) -> Counter:
    """Test questions by tier; no "unseen" one may be about a disease of a training row."""
    trained = {subject[r["text"]] for r in prepared.rows("domain", "train")}
    trained |= {subject[r["prompt"]] for r in prepared.rows("instruction", "train", "validation")}
    tested = prepared.rows("instruction", "test")
    for row in tested:
        if row["tier"] == "unseen":
            assert subject[row["prompt"]] not in trained, row
    return Counter(row["tier"] for row in tested)


@pytest.mark.parametrize("named", [True, False])
def test_unseen_is_true_under_any_name(tmp_path, table, named, capsys):
    subject, texts, questions = {}, [], []
    for n, name in enumerate(table):
        text = f"{name.capitalize()} is a condition of the {words(n, 15)}"
        texts.append({"text": text, "entity": name} if named else {"text": text})
        subject[text] = name
        for form in ("What is {}?", "Who gets {} and when?"):
            other = f"Morbus {name}"
            row = {"question": form.format(other), "answer": words(n + len(form), 20)}
            questions.append(row | {"focus": other} if named else row)
            subject[row["question"]] = name
    prepared = Prepared(tmp_path, domain=texts, instruction=questions).run(
        seen_test_share=0.2, near_duplicate_threshold=None, question_similarity=None
    )
    found = check_unseen(prepared, subject)
    assert found["unseen"] > 10 and found["seen"] > 10 and not found["held-out wording"]
    rows = prepared.rows("instruction") + prepared.rows("domain")
    assert {row["entity"] for row in rows} == set(table)
    said = (
        "160 rows name no entity; what 160 of them are about was found" in capsys.readouterr().out
    )
    assert said != named


def test_names_in_other_sources_are_found_and_the_rest_is_called_by_its_name(tmp_path, capsys):
    names = disease_names(100)
    texts = [{"text": f"About {n}: {words(i, 20)}", "entity": n} for i, n in enumerate(names[:50])]
    rows = [{"question": f"What is {n}?", "answer": words(i)} for i, n in enumerate(names)]
    prepared = Prepared(tmp_path, domain=texts, instruction=rows).run()
    subject = {text["text"]: text["entity"] for text in texts}
    subject |= {row["question"]: name for row, name in zip(rows, names, strict=True)}
    found = check_unseen(prepared, subject)
    assert found["unseen"] and found["held-out wording"]
    for row in prepared.rows("instruction", "test"):
        assert (row["tier"] == "held-out wording") == (subject[row["prompt"]] in names[50:])
    screen = capsys.readouterr().out
    assert "100 rows name no entity; what 50 of them are about was found by 50 known" in screen
    assert "WARNING: instruction: of " in screen and "in a column: entity" in screen
    counts = prepared.manifest["counts"]["instruction/test.jsonl"]["tiers"]
    assert counts == {tier: found[tier] for tier in ("unseen", "seen", "held-out wording")}
    # The evaluation keeps them apart, and its tables name them.
    sets = held_out.held_out(prepared.config, prepared.output)
    assert {row["tier"] for row in sets["questions"]} == {"unseen"}
    assert len(sets["wording_questions"]) == found["held-out wording"]
    result = {"wording_rouge1": 0.5, "n": {"wording_rouge1": 3}}
    assert "ROUGE-1 held-out wording" in comparison.metrics_table({"own": result})
    titles = {key: title for key, title, *_ in comparison.METRICS}
    assert titles["wording_rouge1"] == "ROUGE-1, held-out wording"


def test_rows_of_a_sources_own_splits_are_called_unseen_only_where_they_are(tmp_path, capsys):
    names = disease_names(60)
    form = {"train": "How is {} treated?", "test": "What are the signs of {}?"}
    form["validation"] = "Who gets {} and when?"
    rows = [
        {"prompt": text.format(name), "completion": words(n + 60 * k, 15), "split": split}
        for n, name in enumerate(names)
        for k, (split, text) in enumerate(form.items())
        if split != "train" or n < 40
    ]
    prepared = Prepared(tmp_path / "no names", instruction=rows).run(
        question_similarity=None, validation_share=0.4
    )
    for split in ("test", "validation"):
        assert {row["tier"] for row in prepared.rows("instruction", split)} == {"held-out wording"}
    assert "WARNING: instruction: of 60 of the 60 test rows" in capsys.readouterr().out
    prepared.config.evaluate.split = "validation"
    assert len(held_out.held_out(prepared.config, prepared.output)["wording_questions"]) == 60
    texts = [{"text": f"About {n}: {words(i, 20)}", "entity": n} for i, n in enumerate(names)]
    named = [row | {"entity": next(n for n in names if n in row["prompt"])} for row in rows]
    for directory, files in (
        ("names in texts", {"domain": texts, "instruction": rows}),
        ("names in a column", {"instruction": named}),
    ):
        prepared = Prepared(tmp_path / directory, **files)
        prepared.run(question_similarity=None, near_duplicate_threshold=None)
        trained = {row["entity"] for row in prepared.rows("domain", "train")} | set(names[:40])
        for split in ("test", "validation"):
            found = prepared.rows("instruction", split)
            assert len(found) == 60, "a row was moved out of its split"
            for row in found:
                assert (row["tier"] == "unseen") == (row["entity"] not in trained), row
            assert {row["tier"] for row in found} == {"seen", "unseen"}


def test_what_another_sources_own_split_trains_on_is_seen(tmp_path):
    names = disease_names(120)
    own = [
        {"prompt": f"How is {n} treated?", "completion": words(i, 15), "entity": n}
        | {"split": "train" if i < 60 else "test" if i % 2 else "validation"}
        for i, n in enumerate(names[:70])
    ]
    rows = [
        {"prompt": f"What are the signs of {n}?", "completion": words(i + 300, 15), "entity": n}
        for i, n in enumerate(names)
    ]
    prepared = Prepared(tmp_path, instruction=rows)
    text = "".join(json.dumps(row) + "\n" for row in own)
    (tmp_path / "own.jsonl").write_text(text)
    prepared.data["instruction"] += [{"dataset": "auto", "path": str(tmp_path / "own.jsonl")}]
    prepared.run(question_similarity=None, near_duplicate_threshold=None)
    trained = {row["entity"] for row in prepared.rows("instruction", "train")}
    assert set(names[:60]) <= trained
    for row in prepared.rows("instruction", "test"):
        assert row["tier"] == ("seen" if row["entity"] in trained else "unseen"), row
    counts = prepared.manifest["counts"]["instruction/test.jsonl"]["tiers"]
    assert counts["seen"] > 3 and counts["unseen"] > 3


def test_a_word_that_many_questions_share_is_no_subject(tmp_path):
    rows = [{"question": f"Why does disorder {words(n)}", "answer": words(n)} for n in range(250)]
    rows[0]["focus"] = "disorder"
    for row in rows[1:]:
        row["focus"] = ""
    prepared = Prepared(tmp_path, instruction=rows).run()
    assert sum(row["entity"] == "disorder" for row in prepared.rows("instruction")) == 1


def test_disease_names_are_taken_from_the_cache_and_never_downloaded_for(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *a, **k: pytest.fail("a download"))
    wheels = registry.ENTITIES[0]
    assert entities.known_names(tmp_path, []) == {}
    assert set(entities.known_names(tmp_path, wheels)) == set(wheels)
    assert entities.names_file(tmp_path, {}, {}) is None
    monkeypatch.setattr(entities, "cached_wheel", lambda name, cache: Path(name))
    assert set(entities.known_names(tmp_path, [])) == set(wheels)


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("is acute heart failure due to gout", "acute heart failure"),
        ("is it gout or heart pain", "gout"),
        ("is it flu or a heart", None),  # three letters are no name
    ],
)
def test_the_longest_name_in_a_question_is_what_it_is_about(question, found):
    known = ("heart failure", "acute heart failure", "gout", "flu")
    assert entities.Names(dict(zip(known, known, strict=True))).find(question.split()) == found


# --- equality -------------------------------------------------------------------------------------
DIFFERENT = [
    ("Potassium > 5", "Potassium < 5"),
    ("Rh+ mother", "Rh- mother"),
    ("a change of -5", "a change of 5"),
    ("5 % of it", "5 of it"),
    ("take 2.5 mg", "take 2 5 mg"),
    ("\u00b1 5", "5"),
    ("5 \u00b5g", "5 g"),
    ("38 \u00b0", "38"),
    ("1/2", "12"),
    ("K \u2265 5", "K > 5"),
    ("\u0915\u093f", "\u0915\u0941"),  # Devanagari: the vowel is a mark
    ("\u8840\u94be\uff1e5", "\u8840\u94be\uff1c5"),  # full-width > and <
    ("Rh\uff0b\u306e", "Rh\uff0d\u306e"),
    ("potassium \u2a7e 5", "potassium \u2a7d 5"),
    ("potassium \u2267 5", "potassium \u2266 5"),
    ("K \u226b 5", "K \u226a 5"),
    ("HBsAg (-)", "HBsAg"),
    ("HBsAg (+)", "HBsAg (-)"),
    ("Is he Rh (D) -?", "Is he Rh (D)?"),
    ("\u2640 of 45", "\u2642 of 45"),
    ("Na\u207a", "Na\u207b"),
    ("Ca\u00b2\u207a", "Ca\u00b2\u207b"),
    ("10\u2079 cells", "109 cells"),
    ("grade \u2192 3", "grade \u2190 3"),
    ("T \u25b2", "T \u25bc"),
    ("pressure \u2b06", "pressure \u2b07"),
    ("CK \u00d7 10", "CK \u00f7 10"),
    ("G \u2248 5", "G \u2260 5"),
    ("p \u226e 5", "p \u226f 5"),
    ("pain \u2795", "pain \u2796"),
    ("~ 5", "5"),
]
EQUAL = [
    ("K>5", "k > 5."),
    ("K >= 5", "K \u2265 5"),
    ("5%", "5 %"),
    ("beta-blocker and/or", "Beta blocker, and or"),
    ("Sj\u00f6gren's", "sj\u00f6gren s"),
    ("That is it. 5 are.", "That is it 5 are"),
    ("K\uff1e\uff15 \uff05", "k > 5%"),  # full-width
    ("K \u2a7e 5", "K >= 5"),
    ("10\u2079 cells", "10^9 cells"),
    ("\u00bd", "1/2"),
    ("Asthma - a disease", "Asthma, a disease"),
    ("- one - two", "One, two"),
]


def test_keys_hold_what_a_text_says():
    for one, other in DIFFERENT:
        assert text_key(one) != text_key(other), (one, other)
    for one, other in EQUAL:
        assert text_key(one) == text_key(other), (one, other)
    assert text_key("\u53d1\u70e7 38.5\u3002") == "\u53d1 \u70e7 38\u00b75"
    assert text_key("\u0e44\u0e17\u0e22").count(" ") == 2
    # Names are equal in every spelling, as before.
    assert (
        match_key("15q13.3 (Rh+)") == "15q13 3 rh" and match_key("\u0915\u093f") == "\u0915\u093f"
    )


def test_questions_that_differ_in_a_sign_are_two(tmp_path):
    rows = [
        {"question": form.format(n), "answer": words(n + 77 * k)}
        for n in range(60)
        for k, form in enumerate(
            ("What means potassium > {}?", "What means potassium < {}?", "Rh+ {}?", "Rh- {}?")
        )
    ]
    rows += [
        {"question": f"\u8840\u94be{sign}{n}mmol/L\uff1f", "answer": words(7)}
        for n in range(3, 33)
        for sign in "\uff1e\uff1c"
    ]
    same = [{"question": "what means potassium >7", "answer": rows[28]["answer"].upper()}]
    prepared = Prepared(tmp_path, instruction=rows + same).run(
        near_duplicate_threshold=None, question_similarity=None
    )
    assert [d["reason"] for d in prepared.dropped()] == ["duplicate"]


def test_an_exam_without_blanks_is_kept_apart(tmp_path):
    asked = "\u60a3\u8005\u7537\u6027{}\u5c81\u53cd\u590d\u54b3\u55fd\u54b3\u75f0{}\u5e74"
    exam = tmp_path / "exam.jsonl"
    exam.write_text("".join(json.dumps({"question": asked.format(n, n)}) + "\n" for n in range(20)))
    rows = [
        {"question": f"\u8bf7\u4f5c\u7b54{asked.format(n, n)}\u8bf4\u660e", "answer": words(n)}
        for n in range(40)
    ]
    others = [{"question": words(n + 50), "answer": words(n + 150)} for n in range(60)]
    prepared = Prepared(tmp_path, instruction=rows + others).run(decontaminate=[str(exam)])
    left = [r["prompt"] for r in prepared.rows("instruction") if "\u60a3" in r["prompt"]]
    assert not {row["question"] for row in rows[:20]} & set(left)
    reasons = [d["reason"] for d in prepared.dropped() if "\u60a3" in d["row"]["prompt"]]
    assert reasons.count(f"overlaps {exam}") == 20


# --- short and long -------------------------------------------------------------------------------
def test_short_answers_are_kept_and_long_texts_cut(tmp_path):
    rows = [{"question": f"Which drug {words(n)}", "answer": f"E: drug{n}"} for n in range(90)]
    rows += [{"question": "Which letter is it now?", "answer": "E"}]
    long = [" ".join(words(50 * n + k, 15) for k in range(12)) for n in range(60)]
    texts = [{"text": text} for text in [*long, "Short."]]
    prepared = Prepared(tmp_path, domain=texts, instruction=rows).run(max_characters=400)
    assert len(prepared.rows("instruction")) == 90
    assert [d["reason"] for d in prepared.dropped() + prepared.dropped("domain")] == [
        "too short"
    ] * 2
    where: dict[str, set[str]] = {}
    found = prepared.rows("domain")
    assert all(20 <= len(row["text"]) <= 400 and row["text"].endswith(".") for row in found)
    for row in found:
        where.setdefault(row["entity"], set()).add(row["in"])
    assert len(where) == 60 and all(len(splits) == 1 for splits in where.values())
    assert max(map(len, where)) < 100, "a piece does not carry the whole text as its entity"
    parts = Counter(s for row in found for s in row["text"].rstrip(".").split(". "))
    assert parts == Counter(s for text in long for s in text.rstrip(".").split(". "))
    entry = next(e for e in prepared.manifest["sources"] if e["part"] == "domain")
    assert entry["rows_read"] + entry["rows_added"] == entry["rows_kept"] + 1


@pytest.mark.parametrize("limit", [7, 20, 33])
def test_pieces_lose_nothing(limit):
    texts = ["One is here. Two is longer than that! Three?", "x" * 70, "\u4f60\u597d\u3002" * 30]
    for text in texts:
        found = pieces(text, limit, 5)
        assert "".join(found).replace(" ", "") == text.replace(" ", "")
        assert all(5 <= len(piece) <= limit for piece in found), found


def test_what_drops_all_rows_is_named_with_its_setting(tmp_path):
    rows = [{"question": words(n), "answer": "AB"[n % 2]} for n in range(90)]
    with pytest.raises(UserError, match="set by data.min_characters of texts, answer_min_char"):
        Prepared(tmp_path, instruction=rows).run()


def test_the_table_of_what_is_dropped_is_that_of_the_fixture(tmp_path):
    lines = (ROOT / "tests/fixtures/health_questions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    prepared = Prepared(tmp_path, instruction=rows).run(question_similarity=None)
    reasons = Counter(d["reason"] for d in prepared.dropped())
    table = (ROOT / "docs/data.md").read_text().split("<!-- keep -->")[1].split("<!-- /keep -->")[0]
    cells = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    told = {cell[1].rstrip("| "): int(cell[0]) for cell in cells}
    assert told.pop("read") == len(rows) and told.pop("kept") == len(prepared.rows("instruction"))
    assert told == reasons
    # What is true stays: all but copies, four answers with a word more, three of one letter.
    assert (
        len(prepared.rows("instruction")) == len({(r["question"], r["answer"]) for r in rows}) - 7
    )


# --- mistakes in YAML -----------------------------------------------------------------------------
def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("data: {seed: 1}\ndomain: {max_steps: 4}\ndata: {language: null}\n")
    with pytest.raises(UserError, match="'data' is there 2 times, in lines 1, 3"):
        read_yaml(path)
    path.write_text("data:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(UserError, match="'seed' is there 2 times, in lines 2, 3"):
        read_yaml(path)
    with pytest.raises(UserError, match="'seed' is there 2 times"):
        parse_setting("data={seed: 1, seed: 2}")
    path.write_text("a: &shared {seed: 1}\nb: {<<: *shared, seed: 2}\n")
    assert read_yaml(path)["b"] == {"seed": 2}, "a merge key is no repetition"


@pytest.mark.parametrize("parents", ["[one.yaml, two.yaml]", "{a: b}", "7", "true"])
def test_extends_names_one_file(tmp_path, parents):
    (tmp_path / "own.yaml").write_text(f"extends: {parents}\n")
    with pytest.raises(UserError, match="extends must be the name of another YAML file"):
        read_yaml(tmp_path / "own.yaml")


def test_no_mistake_deletes_the_data_of_other_models(tmp_path):
    other = tmp_path / "data/other/manifest.json"
    other.parent.mkdir(parents=True)
    other.write_text("precious")
    prepared = Prepared(tmp_path)
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"data": prepared.data}))
    script = (ROOT / "prepare_datasets.py", "--config", path)
    for flags in ((), ("--overwrite",)):
        assert "no model_type" in fail(2, *script, *flags, cwd=tmp_path)
    for place in ("data", ".", "own.yaml/x"):
        message = fail(2, *script, "--output", place, "--overwrite", cwd=tmp_path)
        assert "left as it is, with --overwrite too" in message
    assert other.read_text() == "precious" and set(FIELDS) <= {f.stem for f in tmp_path.iterdir()}
