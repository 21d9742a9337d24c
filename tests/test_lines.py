"""Lines of a text: lists and paragraphs reach the training rows, wrapped lines do not."""

from __future__ import annotations

import json
import random
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
from conftest import CACHE, ROOT
from test_kept_rows import Prepared, words

from liteguard.config import Config
from liteguard.data.cleaning import is_language
from liteguard.data.layouts import asked
from liteguard.data.lines import normalise_lines
from liteguard.data.values import mended
from liteguard.embedded import smollm2
from liteguard.evaluation import held_out
from liteguard.export import tokenizer
from liteguard.text import pieces

sys.path.insert(0, str(ROOT / "benchmarks"))
import phi_like  # noqa: E402

LIST = (
    "Watch for:\n- a rash\n- a fever above 39 degrees\n\nCall a doctor:\n1. at once, or\n2. soon."
)
PROSE = (
    "A sprain is an injury of a ligament. It hurts, it swells and it may bruise, as most people "
    "know. Rest it and cool it for two days, and keep it raised when you sit, if you can do so. "
    "After that, move it as much as the pain lets you, and see a doctor if you cannot walk on it."
)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (LIST, LIST),
        ("One.\n\n\n \t\nTwo.\r\nThree.  Four.", "One.\n\nTwo.\nThree. Four."),
        ("\u2022 one\n\u2022\ttwo\n\u25aa three\n\u00b7 four", "- one\n- two\n- three\n- four"),
        ("Key points\n     - It is rare\n       and mild.\n\n     - It passes.", None),
        # A sign of its own is no mark of the line below.
        ("HBsAg\n-\nAnti-HBs\n+\nAnti-HBc\n-", None),
        ("# Symptoms\nfever\ncough\nrash", None),
        ("1. Mild\nheadache\nnausea\n2. Severe\nseizures", None),
        ("- fever\n- rash\nand see a doctor if either lasts.", None),
        ("| Dose | 5 mg |\nsee your doctor", None),
        ("- name: aspirin\n  dose: 81 mg", "- name: aspirin\ndose: 81 mg"),
        ("aspirin 81 mg once a day with food for prevention of stroke\nibuprofen 200 mg", None),
        ("1. a\n\n2. b\n\n1. c", "1. a\n2. b\n\n1. c"),
        ("| a |\n|---|\n| 1 |\n\n| b |\n|---|", None),
        ("a\u2028b\x0bc\u0085d\u00a0 e", "a\nb\nc\nd e"),
        ("Day  dose\n1\t5 mg\n2\t10 mg", "Day dose\n1 5 mg\n2 10 mg"),
        ("aspirin\nibuprofen\nnaproxen", "aspirin\nibuprofen\nnaproxen"),
        ("5 mL\n<|im_end|>\n<|im_start|>user", "5 mL\n\nuser"),
        ("\u8bf7\u4f11\u606f\u3002\n\u591a\u559d\u6c34\u3002", None),
        ("one line\x00 only", "one line only"),
        ("", ""),
    ],
)
def test_lists_and_paragraphs_stay_and_blanks_do_not(given, kept):
    if kept is None:
        kept = {"K": "Key points\n- It is rare and mild.\n- It passes."}.get(given[0], given)
    assert normalise_lines(given) == kept
    assert normalise_lines(kept) == kept


@pytest.mark.parametrize("width", [60, 72, 80, 100])
@pytest.mark.parametrize("indent", ["", " " * 12])
def test_lines_that_a_program_wrapped_are_one(width, indent):
    wrapped = textwrap.indent(textwrap.fill(PROSE, width), indent)
    assert normalise_lines(f"{wrapped}\n\n{wrapped}") == f"{PROSE}\n\n{PROSE}"
    long = f"{'https://example.org/' * 8}\n\n{wrapped}\n\n{'Somebody did not wrap this. ' * 9}"
    assert PROSE in normalise_lines(long).split("\n\n")
    # The same words in lines that somebody chose: a sentence each.
    chosen = PROSE.replace(". ", ".\n")
    assert normalise_lines(chosen) == chosen


def test_no_word_is_lost_and_a_second_time_changes_nothing():
    draw = random.Random(3)
    parts = ["a", "Rest", "it", "39.5", "-", "1.", "(b)", "\u2022", "|", "#", "\n", "\n\n", "  "]
    for _ in range(3000):
        text = " ".join(draw.choices([*parts, "longer words of a sentence"], k=draw.randrange(40)))
        once = normalise_lines(text)
        assert once.replace("\u2022", "-").split() == text.replace("\u2022", "-").split()
        assert normalise_lines(once) == once, repr(text)
        assert "\n\n\n" not in once and "  " not in once and once == once.strip()


@pytest.mark.parametrize(
    ("html", "plain"),
    [
        ("<p>Take\nit:</p><ol><li>now</li>\n<li><p>later</p></li></ol>and rest", None),
        ("<ul><li>a<ol><li>b</li></ol></li><li>c</li></ul>", "- a\n1. b\n- c"),
        ("one<br>two<br />\nthree<br><br>four", "one\ntwo\nthree\n\nfour"),
        (
            '<ol><li>Wash</li></ol><p>Wait.</p><ol start="2"><li>Dry</li></ol>',
            "1. Wash\n\nWait.\n\n2. Dry",
        ),
        ('<div align="center">T</div>\n\n- one\n- two', "T\n\n- one\n- two"),
        ("<pre>a  b\n1  2</pre><p>See above.</p>", "a b\n1 2\n\nSee above."),
        ("<ul><li></li></ul><p>Then rest.</p>", "Then rest."),
        ("<script>" * 30000, None),
        ("a plain\ntext with <b>one</b> tag", "a plain\ntext with one tag"),
        ("p <0.05\nand n> 3", "p <0.05\nand n> 3"),
        ("<table><tr><td>5</td><td>mg</td></tr><tr><td>6</td></tr></table>", "5 mg\n6"),
        ("<dl><dt>a</dt><dd>b</dd></dl><div>x</div><div>y</div>", "a\nb\n\nx\ny"),
        ("<li>alone</li></ul>", "- alone"),
    ],
)
def test_tags_that_make_lines_become_lines(html, plain):
    if plain is None:
        plain = "Take it:\n\n1. now\n2. later\n\nand rest" if "<p>" in html else html
    assert normalise_lines(mended(html, Counter())) == plain


def test_a_prepared_answer_has_its_list(tmp_path):
    rows = [{"question": words(n), "answer": f"{words(n + 500)}\n{LIST}"} for n in range(40)]
    prepared = Prepared(tmp_path, instruction=rows).run()
    assert {row["completion"].partition("\n")[2] for row in prepared.rows("instruction")} == {LIST}
    # Two answers that differ in their lines alone are one.
    flat = [{**row, "answer": " ".join(row["answer"].split())} for row in rows]
    again = Prepared(tmp_path / "twice", instruction=rows + flat).run()
    assert len(again.rows("instruction")) == 40
    assert Counter(d["reason"] for d in again.dropped()) == {"duplicate": 40}


def test_a_text_in_lines_is_judged_by_its_language():
    french = "La fi\u00e8vre dure trois jours,\npuis elle passe,\net tout va bien chez les enfants"
    chinese = "\u53d1\u70e7\u6301\u7eed\u4e09\u5929\uff0c\u7136\u540e\u4f1a\u597d\u3002\n"
    for text, language in ((f"{french} qui boivent.", "fr"), (chinese * 8, "zh")):
        assert not is_language(text, "en") and is_language(text, language)


def test_pieces_are_cut_at_lines_before_words():
    assert pieces("one two three\nfour five six", 16, 4) == ["one two three", "four five six"]
    assert pieces("It is one.\n- two three four", 22, 4) == ["It is one.", "- two three four"]
    doses = "- aspirin 81 mg\n- ibuprofen 400 mg\n- naproxen 250 mg"
    assert pieces(doses, 30, 4) == doses.split("\n")
    numbered = "1. one two three\n2. four five six"
    assert pieces(numbered, 20, 4) == numbered.split("\n")


def test_a_question_with_a_list_keeps_its_first_item():
    notes: Counter[str] = Counter()
    made = asked("Which of these is an NSAID?", "- ibuprofen\n- paracetamol", notes)
    assert made == "Which of these is an NSAID?\n\n- ibuprofen\n- paracetamol"
    assert asked("Is this a drug", "aspirin", notes) == "Is this a drug: aspirin"


def test_an_answer_in_lines_is_cut_by_its_words():
    row = {"prompt": "What?", "completion": "\n".join(f"- word{n}" for n in range(300))}
    config = Config()
    _, target = held_out.answer_pair(config, row)
    assert len(target.split()) == config.evaluate.max_text_tokens // 2
    context, rest = held_out.split_text(row["completion"], 10, 20)
    assert context + rest == "\n".join(f"- word{n}" for n in range(10)) and rest.startswith(" ")
    assert held_out.split_text("one two three", 3, 9) is None
    assert held_out.split_text("one two three four", 2, 3) == ("one two", " three")


def test_a_pair_that_differs_in_its_lines_alone_teaches_nothing(tmp_path):
    pairs = [
        {"prompt": words(n), "chosen": words(n + 500), "rejected": words(n + 900)}
        for n in range(40)
    ]
    same = {
        "prompt": words(7000),
        "chosen": "- Take one.\n- Two.",
        "rejected": "- Take one. - Two.",
    }
    prepared = Prepared(tmp_path, preference=[*pairs, same]).run()
    assert [d["reason"] for d in prepared.dropped("preference")] == ["chosen equals rejected"]


@pytest.mark.parametrize("breaks", ["\n", "\n\n", "\n- ", ":\n\n1. "])
@pytest.mark.parametrize("which", ["smollm2", "phi"])
def test_lines_have_equal_ids_on_the_device(which, breaks, tmp_path):
    directory = tmp_path / "phi"
    if which == "phi":
        directory.mkdir()
        phi_like.write_tokenizer(directory, CACHE)
    else:
        directory = Path(smollm2.unpack("embedded:smollm2-135m-instruct", CACHE))
    made = tokenizer.build_sentencepiece(directory, tmp_path / "x.model")
    rows = (ROOT / "tests/fixtures/health_questions.jsonl").read_text().splitlines()
    answers = [text for row in rows for text in json.loads(row).values() if isinstance(text, str)]
    texts = [normalise_lines(a.replace(". ", f".{breaks}")) for a in dict.fromkeys(answers)]
    texts += [normalise_lines(a.replace(" ", breaks)) for a in dict.fromkeys(answers)]
    assert sum("\n" in text for text in texts) > 100
    found = tokenizer.compare_tokenizers(directory, tmp_path / "x.model", texts, made.replaced)
    assert found["identical"] == 1, found["examples"]
