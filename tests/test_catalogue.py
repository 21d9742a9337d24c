"""The preference pairs: counts, splits, length balance and the safety of their texts."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import astuple

import pytest
from conftest import ROOT

from liteguard.embedded import catalogue
from liteguard.embedded.catalogue import PreferencePair, length_statistic, preference_pairs
from liteguard.evaluation import held_out

SPLITS = {"train", "validation", "test"}
HELD_OUT_AREAS = {"monitoring_evasion", "harming_others"}
TRAINED_AREAS = {
    "dosing_misuse",
    "forgery",
    "privacy",
    "discrimination",
    "misinformation",
    "fraud",
    "unlicensed_practice",
    "self_harm",
    "coercion",
    "professional_conduct",
}

# Someone or some place that can help. Every wanted refusal must name one.
WAY_ON = re.compile(
    r"\b(pharmacist|doctor|crisis line|emergency number|poison centre|records office|surgery"
    r"|patient-records office|privacy officer|regulator|ethics board|equality adviser|appeals"
    r"|social worker|compliance officer|fraud hotline|licensed clinic|nurse advice line"
    r"|urgent care centre|public health|licensing office|police|medical review officer"
    r"|prescriber|manager|occupational health)",
    re.IGNORECASE,
)

# What a usable instruction would need: an amount, a unit or a rhythm.
AMOUNT = re.compile(
    r"\d|\b(mg|ml|mcg|micrograms?|milligrams?|grams?|kilograms?|kg|litres?|millilitres?"
    r"|tablets?|capsules?|spoons?|teaspoons?|tablespoons?|ounces?|units|hourly|twice a day"
    r"|times a day|per day|percent)\b|%",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def pairs() -> list[PreferencePair]:
    return preference_pairs(seed=0)


def of_kind(pairs: list[PreferencePair], *kinds: str) -> list[PreferencePair]:
    return [pair for pair in pairs if pair.kind in kinds]


def normalised(prompt: str) -> str:
    """A prompt without case and punctuation: lower-case copies are the same prompt."""
    return re.sub(r"[^a-z0-9 ]", "", prompt.lower())


def opening_stems() -> list[str]:
    """The part of every refusal opening that stands before the task."""
    texts = catalogue.load_catalogue()
    openings = texts["openings"] + texts["gentle_openings"]
    return [opening.split("{task}")[0].strip() for opening in openings]


def test_counts(pairs: list[PreferencePair]) -> None:
    harmful = of_kind(pairs, "harmful")
    ordinary, borderline = of_kind(pairs, "ordinary"), of_kind(pairs, "borderline")
    assert len(harmful) >= 2500
    assert len(ordinary) + len(borderline) >= len(harmful)
    tested = [sum(pair.split == "test" for pair in kind) for kind in (ordinary, borderline)]
    assert 0.8 < tested[0] / tested[1] < 1.25
    assert {pair.area for pair in harmful} == TRAINED_AREAS | HELD_OUT_AREAS
    assert min(Counter(pair.area for pair in harmful).values()) >= 200
    for kind in (ordinary, borderline):
        assert len({pair.wording for pair in kind}) >= 110
    assert {pair.split for pair in pairs} == SPLITS


def test_the_same_seed_gives_the_same_pairs_and_another_seed_others(
    pairs: list[PreferencePair],
) -> None:
    assert [astuple(p) for p in preference_pairs(seed=0)] == [astuple(p) for p in pairs]
    other = preference_pairs(seed=1)
    assert [p.prompt for p in other] != [p.prompt for p in pairs]
    # What is held out must not depend on the seed.
    assert {(p.wording, p.split) for p in other} == {(p.wording, p.split) for p in pairs}


def test_no_prompt_comes_twice(pairs: list[PreferencePair]) -> None:
    repeated = [p for p, n in Counter(normalised(p.prompt) for p in pairs).items() if n > 1]
    assert not repeated


def test_a_wording_is_in_one_split_only(pairs: list[PreferencePair]) -> None:
    splits = defaultdict(set)
    for pair in pairs:
        splits[pair.wording].add(pair.split)
    assert not {wording: s for wording, s in splits.items() if len(s) > 1}


def test_what_was_added_later_moves_no_test_row(
    pairs: list[PreferencePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = catalogue._parsed
    added = {"train": set(), "validation": set()}
    for split, texts in parsed(catalogue.MORE).items():
        for name, area in texts["areas"].items():
            added[split] |= {f"{name}/{stem['id']}" for stem in area["stems"]}
        for kind in ("ordinary", "borderline"):
            groups = texts.get(kind, [])
            added[split] |= {f"{kind}/{q['id']}" for g in groups for q in g["questions"]}
        found = {pair.split for pair in pairs if pair.wording in added[split]}
        assert len(added[split]) >= 40 and found == {split}
    monkeypatch.setattr(
        catalogue, "_parsed", lambda path: parsed(path) if path == catalogue.CATALOGUE else {}
    )
    catalogue.load_catalogue.cache_clear()
    try:
        before = preference_pairs(seed=0)
    finally:
        catalogue.load_catalogue.cache_clear()
    assert not {pair.wording for pair in before} & (added["train"] | added["validation"])
    tested = {astuple(pair) for pair in before if pair.split == "test"}
    assert tested == {astuple(pair) for pair in pairs if pair.split == "test"}


def test_held_out_areas_are_test_only_and_every_other_area_holds_out_wordings(
    pairs: list[PreferencePair],
) -> None:
    splits = defaultdict(set)
    for pair in of_kind(pairs, "harmful"):
        splits[pair.area].add(pair.split)
    assert {area for area, s in splits.items() if s == {"test"}} == HELD_OUT_AREAS
    assert all(splits[area] == SPLITS for area in TRAINED_AREAS)


def test_texts_of_held_out_areas_do_not_reach_training(pairs: list[PreferencePair]) -> None:
    areas = catalogue.load_catalogue()["areas"]
    # A sentence is the area's own only if no trained area has it too.
    shared = {s for area in TRAINED_AREAS for s in areas[area]["reasons"] + areas[area]["ways"]}
    own = {s for area in HELD_OUT_AREAS for s in areas[area]["reasons"] + areas[area]["ways"]}
    train = [pair for pair in pairs if pair.split == "train"]
    leaks = [s for s in own - shared if any(s in p.chosen + p.rejected for p in train)]
    assert not leaks


def test_length_says_nothing(pairs: list[PreferencePair]) -> None:
    for split in (*SPLITS, None):
        statistic = length_statistic([p for p in pairs if split in (p.split, None)])
        for group, measures in statistic.items():
            for name, values in measures.items():
                where = (split, group, name, values)
                assert abs(values["relative_difference"]) < 0.05, where
                assert abs(values["correlation"]) < 0.05, where


def test_length_statistic_sees_a_difference() -> None:
    def pair(chosen: str, rejected: str) -> PreferencePair:
        return PreferencePair("p", chosen, rejected, "ordinary", "a", "w", "train")

    words = length_statistic([pair("a b c", "a"), pair("a b", "a b")])["all"]["words"]
    assert words["chosen"] == 2.5 and words["rejected"] == 1.5
    assert words["relative_difference"] == pytest.approx(2 / 3, abs=1e-4)
    # Lengths 3, 2, 1, 2: standard deviation sqrt(1/2), so r = 1 / (2 sqrt(1/2)).
    assert words["correlation"] == pytest.approx(0.5**0.5, abs=1e-4)


def test_answers_have_a_proper_length(pairs: list[PreferencePair]) -> None:
    for pair in pairs:
        assert 25 <= len(pair.chosen.split()) <= 60, pair.chosen


def test_wanted_refusals_open_with_a_refusal_and_name_a_way_on(
    pairs: list[PreferencePair],
) -> None:
    stems = tuple(opening_stems())
    assert 8 <= len(set(stems)) <= 12
    for pair in of_kind(pairs, "harmful"):
        assert pair.chosen.startswith(stems), pair.chosen
        assert WAY_ON.search(pair.chosen), pair.chosen
        if pair.area == "self_harm":
            assert "crisis line" in pair.chosen, pair.chosen


def test_harmless_questions_are_answered_and_their_rejection_is_a_refusal(
    pairs: list[PreferencePair],
) -> None:
    stems = opening_stems()
    for pair in of_kind(pairs, "ordinary", "borderline"):
        assert not [stem for stem in stems if stem.lower() in pair.chosen.lower()], pair.chosen
        assert pair.rejected.startswith(tuple(stems)), pair.rejected


def test_rejected_answers_to_harmful_requests_hold_nothing_usable(
    pairs: list[PreferencePair],
) -> None:
    stems = tuple(opening_stems())
    for pair in of_kind(pairs, "harmful"):
        assert not AMOUNT.search(pair.rejected), pair.rejected
        assert not pair.rejected.startswith(stems), pair.rejected


def test_harmful_requests_name_no_amounts(pairs: list[PreferencePair]) -> None:
    for pair in of_kind(pairs, "harmful"):
        assert not AMOUNT.search(pair.prompt), pair.prompt


def test_form_and_wrapper_are_no_cue(pairs: list[PreferencePair]) -> None:
    """Questions, lower case and each wrapper are about as common on both sides."""
    texts = catalogue.load_catalogue()
    harmful = of_kind(pairs, "harmful")
    harmless = of_kind(pairs, "ordinary", "borderline")

    def shares(test) -> tuple[float, float]:
        return tuple(sum(map(test, side)) / len(side) for side in (harmful, harmless))

    for test in (lambda p: "?" in p.prompt, lambda p: p.prompt == p.prompt.lower()):
        left, right = shares(test)
        assert abs(left - right) < 0.08, (left, right)
    for wrapper in texts["prefixes"] + texts["suffixes"]:
        key = normalised(wrapper["text"])
        left, right = shares(lambda p, key=key: key in normalised(p.prompt))
        assert left > 0 and abs(left - right) < 0.02, (wrapper["text"], left, right)


@pytest.mark.parametrize("verb", ["write", "draft", "plan", "make", "give", "show", "design"])
def test_a_task_in_the_imperative_is_no_cue(pairs: list[PreferencePair], verb: str) -> None:
    """Of the training prompts with a sentence that begins so, a third at least is harmless.

    "Draft ..." and "Plan ..." once stood nearly always before something harmful, and a running plan
    for beginners was refused.
    """
    begins = re.compile(rf"(?:^|[.!?:,] ){verb}\b", re.IGNORECASE)
    kinds = Counter(p.kind for p in pairs if p.split == "train" and begins.search(p.prompt))
    harmless = kinds["ordinary"] + kinds["borderline"]
    assert kinds["harmful"] >= 20 and harmless / kinds.total() > 1 / 3, kinds


PROFESSIONAL_FORMS = {
    "how can somebody": r"how can an? \w+",
    "what are ways": r"what are ways",
    "can you": r"can you",
    "write": r"write",
    "create": r"create",
    "design": r"design",
    "recommend": r"recommend",
    "draft": r"draft",
}


@pytest.mark.parametrize("form", PROFESSIONAL_FORMS.values(), ids=PROFESSIONAL_FORMS)
def test_the_form_of_professional_requests_is_no_cue(
    pairs: list[PreferencePair], form: str
) -> None:
    """In training, questions about doctors, insurers or studies read alike on both sides."""
    asked = [p for p in pairs if p.split == "train" and p.area.startswith("professional_")]
    begins = re.compile(rf"\b{form}\b", re.IGNORECASE)
    kinds = Counter(p.kind for p in asked if begins.search(p.prompt))
    harmless = kinds["ordinary"] + kinds["borderline"]
    assert kinds.total() >= 30 and 1 / 3 < harmless / kinds.total() < 2 / 3, kinds


@pytest.mark.parametrize("side", ["harmful", "harmless"])
def test_words_of_the_trade_stand_on_both_sides(pairs: list[PreferencePair], side: str) -> None:
    """Whom or what a professional request is about does not say whether it is harmful."""
    asked = [p for p in pairs if p.area.startswith("professional_") and p.split == "train"]
    prompts = [p.prompt.lower() for p in asked if (p.kind == "harmful") == (side == "harmful")]
    words = (
        *("nurse", "doctor", "surgeon", "midwife", "hospital", "clinic", "insurer", "company"),
        *("researcher", "trial", "consent", "records", "second opinion", "complain", "emergency"),
        *("evidence", "colleague", "regulator", "without", "hide", "refuse", "money", "mistake"),
    )
    for word in words:
        assert sum(word in prompt for prompt in prompts) >= 3, word


@pytest.mark.parametrize(
    ("name", "harmful_rows", "ordinary_rows", "borderline_rows"),
    [("requests.jsonl", 150, 90, 90), ("requests_blind.jsonl", 110, 79, 79)],
)
def test_requests_of_another_hand_are_not_trained_on(
    name: str, harmful_rows: int, ordinary_rows: int, borderline_rows: int
) -> None:
    """Three kinds, nothing usable, and no wording of the catalogue."""
    lines = (ROOT / "benchmarks" / name).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert Counter(row["kind"] for row in rows) == {
        "harmful": harmful_rows,
        "ordinary": ordinary_rows,
        "borderline": borderline_rows,
    }
    # They are older than the area of professional conduct.
    areas = TRAINED_AREAS - {"professional_conduct"} | HELD_OUT_AREAS
    assert {r["area"] for r in rows if r["kind"] == "harmful"} == areas
    prompts = [normalised(row["prompt"]) for row in rows]
    assert len(set(prompts)) == len(prompts)
    # They have no answers, so "tablets" tells nobody anything; a number would.
    harmful = " ".join(row["prompt"] for row in rows if row["kind"] == "harmful")
    assert not re.search(r"\d|\b(mg|ml|mcg|grams?)\b", harmful, re.IGNORECASE)
    texts = catalogue.load_catalogue()
    entries = [stem for area in texts["areas"].values() for stem in area["stems"]]
    for kind in ("ordinary", "borderline"):
        entries += [q for group in texts[kind] for q in group["questions"]]
    asked = [ask for e in entries for ask in [*e["asks"], *filter(None, [e.get("request")])]]
    known = [set(normalised(ask).split()) for ask in asked]
    for prompt in prompts:
        words = set(prompt.split())
        nearest = max(len(words & other) / len(words | other) for other in known)
        assert nearest < 0.6, prompt


def test_keywords_stand_on_both_sides(pairs: list[PreferencePair]) -> None:
    harmful = " ".join(p.prompt.lower() for p in of_kind(pairs, "harmful"))
    harmless = " ".join(p.prompt.lower() for p in of_kind(pairs, "ordinary", "borderline"))
    words = (
        *("prescription", "records", "dose", "overdose", "insurer", "hide", "fake", "consent"),
        *("secret", "poison", "trial", "drug", "suicide", "doctor", "without", "pharmacist"),
    )
    for word in words:
        assert word in harmful and word in harmless, word


def test_no_slot_is_left_open_and_articles_agree(pairs: list[PreferencePair]) -> None:
    wrong = re.compile(
        r"[{}]|  |\b(a|the|my|your|an) (a|an|the|my|your)\b|\ba [aeio][a-z]", re.IGNORECASE
    )
    for pair in pairs:
        for text in (pair.prompt, pair.chosen, pair.rejected):
            assert not wrong.search(text), text


def test_catalogue_is_small_and_its_ids_are_unique() -> None:
    both = (catalogue.CATALOGUE, catalogue.MORE)
    # To be moved on purpose, when wordings are added: last for professional conduct.
    assert sum(path.stat().st_size for path in both) <= 535_000
    texts = catalogue.load_catalogue()
    for kind in ("ordinary", "borderline"):
        ids = [q["id"] for group in texts[kind] for q in group["questions"]]
        assert len(ids) == len(set(ids))
    for name, area in texts["areas"].items():
        ids = [stem["id"] for stem in area["stems"]]
        assert len(ids) == len(set(ids)) >= 12, name
        assert all(WAY_ON.search(way) for way in area["ways"]), name


def test_every_area_of_harm_is_in_one_of_the_guides() -> None:
    mapped = [area for areas in held_out.GUIDE_AREAS.values() for area in areas]
    assert sorted(mapped) == sorted(catalogue.load_catalogue()["areas"])
    assert len(held_out.GUIDE_AREAS) == 5
    guide = {"misinformation", "harmful advice", "privacy", "discrimination", "fraud"}
    assert set(held_out.GUIDE_AREAS) == guide
