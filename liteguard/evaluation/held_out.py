"""Which rows are asked, scored and judged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from liteguard.config import Config
from liteguard.data import sets
from liteguard.errors import UserError
from liteguard.evaluation import knowledge, refusals
from liteguard.rows import balanced, check_system_texts, load_split
from liteguard.text import first_words, is_unspaced

# The guide's five areas and the catalogue's areas of harm in each.
GUIDE_AREAS = {
    "misinformation": ("misinformation",),
    "harmful advice": (
        "dosing_misuse",
        "unlicensed_practice",
        "self_harm",
        "coercion",
        "harming_others",
        "professional_conduct",
    ),
    "privacy": ("privacy",),
    "discrimination": ("discrimination",),
    "fraud": ("fraud", "forgery", "monitoring_evasion"),
}
_LOOKED_AT = 50  # requests of a set whose language is looked at
OTHER_AREA = "other harmful"  # areas of a user's own requests
# Kinds of requests: to be refused, plain ones, and ones that only look harmful.
REQUESTS = ("harmful", "ordinary", "borderline")
# Sets of questions with reference answers, and what the names of their numbers begin with.
TIERS = {"questions": "", "seen_questions": "seen_", "wording_questions": "wording_"}
# A row's tier -> its set; the project's own rows that are about no disease have no tier.
_SETS = {"seen": "seen_questions", "held-out wording": "wording_questions"}


def held_out(
    config: Config, data_dir: Path, everything: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """The rows every model is measured on: test splits only, the same ones for every model.

    "questions" are tier 2: no stage saw anything about their disease. "seen_questions" are tier 1:
    texts about the disease were trained on, no question about it was (where a source brings its own
    splits, other questions may have been). "wording_questions": nobody knows what they are about,
    so other questions about it may have been trained on; only their wording was held out.

    "knowledge" are tier 3: questions of public benchmarks. The sets of `evaluate.sets` come last,
    each under its name.

    A conversation is asked its last question, after all that was said before.

    `everything`: all rows of the split, instead of as many as the `evaluate` section says; among
    the ordinary requests then are those about diseases of tier 1, too.
    """
    section = config.evaluate
    wanted = None if everything and section.knowledge_rows else section.knowledge_rows
    benchmarks = {"knowledge": knowledge.rows(Path(config.data.cache_dir), wanted)}
    others = sets.outside(config, everything)
    preferences = load_split(data_dir, "preference", section.split)
    if not everything:
        preferences = [row for row in preferences if row.get("tier") != "seen"]
    by_kind = {
        kind: balanced([r for r in preferences if r.get("kind") == kind], "area", len(preferences))
        for kind in REQUESTS
    }
    if not by_kind["harmful"] or not by_kind["ordinary"]:
        raise UserError(
            f"{data_dir}: the preference {section.split} split has {len(by_kind['harmful'])} rows "
            f"of kind 'harmful' and {len(by_kind['ordinary'])} of kind 'ordinary'; both are needed "
            "to measure refusals. Add safety_catalogue to data.preference."
        )
    # Refusals among the instruction rows are measured as refusals, not by overlap of words.
    questions: dict[str, list[dict[str, Any]]] = {name: [] for name in TIERS}
    for row in load_split(data_dir, "instruction", section.split):
        if row.get("kind") != "refusal":
            questions[_SETS.get(str(row.get("tier")), "questions")].append(row)
    asked = [row for own in (*questions.values(), *by_kind.values()) for row in own]
    check_system_texts(asked, config.prompt)
    texts = load_split(data_dir, "domain", section.split)
    if everything:
        return {
            "texts": texts,
            **questions,
            **by_kind,
            **benchmarks,
            **others,
        }
    seen_rows = section.seen_question_rows
    seen_rows = section.question_rows if seen_rows is None else seen_rows
    return {
        "texts": texts[: section.perplexity_rows],
        **{
            name: balanced(own, "kind", seen_rows if "seen" in name else section.question_rows)
            for name, own in questions.items()
        },
        "harmful": by_kind["harmful"][: section.harmful_rows],
        "ordinary": by_kind["ordinary"][: section.benign_rows],
        "borderline": by_kind["borderline"][: section.benign_rows],
        **benchmarks,
        **others,
    }


# Characters in which a blank to cut at is looked for.
FURTHER = 80
_PUNCTUATION = re.compile(r"[^\w\s](?=\w)")


def split_text(text: str, context_words: int, max_words: int) -> tuple[str, str] | None:
    """(context, target) of a text: the first words are given, the rest is scored.

    The cut is before a blank, where a byte-level BPE never joins tokens, so the ids of both parts
    are those of the whole. In a script without blanks two characters stand for a word, and the cut
    is behind a punctuation mark, which letters do not join either. None for a text with nothing
    left to score.
    """
    if is_unspaced(text):
        mark = _PUNCTUATION.search(text, 2 * context_words)
        return (text[: mark.end()], text[mark.end() :][: 2 * max_words]) if mark else None
    cut = first_words(text, context_words)
    if cut < len(text) and text[cut] != " ":  # a line break may be one token with the mark before
        blank = text.find(" ", cut, cut + FURTHER)
        cut = blank if blank > 0 else cut
    end = max(first_words(text, max_words), cut)
    return (text[:cut], text[cut:end]) if text[cut:].strip() else None


def text_pairs(config: Config, rows: dict[str, list[dict[str, Any]]]) -> list[tuple[str, str]]:
    """(context, target) of every domain text that has something to score."""
    return _text_pairs(config, rows["texts"])


def scored(
    config: Config, rows: dict[str, list[dict[str, Any]]]
) -> list[tuple[str, tuple[str, str]]]:
    """(set, (context, target)) of everything whose likelihood is measured.

    Domain texts first, then the texts and the reference answers of outside sets.
    """
    found = [("texts", pair) for pair in text_pairs(config, rows)]
    for name, kind in sets.kinds(rows).items():
        if kind == "texts":
            found += [(name, pair) for pair in _text_pairs(config, rows[name])]
        elif kind == "questions":
            found += [(name, answer_pair(config, row)) for row in rows[name]]
    return found


def answer_pair(config: Config, row: dict[str, Any]) -> tuple[str, str]:
    """(question as it is asked, after its history, reference answer): cut as texts are; a whole
    one has its end."""
    answer = row["completion"]
    kept = answer[: first_words(answer, config.evaluate.max_text_tokens // 2)]
    target = config.prompt.render_answer(answer) if kept == answer else kept
    return config.prompt.render_row(row), target


def _text_pairs(config: Config, texts: list[dict[str, Any]]) -> list[tuple[str, str]]:
    section = config.evaluate
    # An English word is 1.3 to 2 tokens here; the cap keeps long texts from dominating.
    max_words = section.context_words + section.max_text_tokens // 2
    parts = (split_text(row["text"], section.context_words, max_words) for row in texts)
    return [(config.prompt.begin(before), target) for before, target in filter(None, parts)]


def language_note(config: Config, rows: dict[str, list[dict[str, Any]]]) -> str:
    """What to say of sets whose requests are not English, which the rules cannot judge; or ""."""
    kinds = sets.kinds(rows)
    found = []
    for name, own in rows.items():
        asked = [row["prompt"] for row in own[:_LOOKED_AT] if kinds.get(name, name) in REQUESTS]
        if 2 * sum(not refusals.is_english(prompt) for prompt in asked) > len(asked):
            found.append(name)
    if not found:
        return ""
    judge = "the second judge's verdicts stand beside the rules'"
    if config.evaluate.llm_judge is None:
        judge = "name a second judge that reads it: evaluate.llm_judge (docs/evaluation.md)"
    return (
        f"NOTE: requests of {', '.join(found)} are not in English, and the rules for refusals are: "
        f"an answer in another language is 'unclear', neither refused nor answered; {judge}"
    )


def requests(rows: dict[str, list[dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """(set, row) of everything that is answered: the project's own rows, then outside sets."""
    asked = [name for name, kind in sets.kinds(rows).items() if kind != "texts"]
    return [(name, row) for name in (*TIERS, *REQUESTS, *asked) for row in rows[name]]
