"""The wordings in which facts are asked for and answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from liteguard.rows import Row
from liteguard.text import pick, unit

if TYPE_CHECKING:
    from liteguard.config import SourceSection

# Four phrasings of each kind of question; which comes first for a disease is drawn by its name.
QUESTIONS = {
    "definition": [
        "What is {name}?",
        "Can you explain what {name} is?",
        "Please describe {name} in plain words.",
        "My relative was told about {name}. What does that mean?",
    ],
    "features": [
        "What are the main features of {name}?",
        "How does {name} show itself?",
        "Which signs and symptoms go with {name}?",
        "What happens to people with {name}?",
    ],
    "synonyms": [
        "What other names are used for {name}?",
        "Is {name} known by another name?",
        "Which synonyms does {name} have?",
        "What else is {name} called?",
    ],
    "category": [
        "What kind of condition is {name}?",
        "To which group of diseases does {name} belong?",
        "How is {name} classified?",
        "Is {name} a form of another disease?",
    ],
    "inheritance": [
        "How is {name} inherited?",
        "What is the inheritance pattern of {name}?",
        "Does {name} run in families, and how?",
        "How is {name} passed on from parents to children?",
    ],
    "anatomy": [
        "What is {name}?",
        "Can you explain what {name} is?",
        "I read about {name}. What is that?",
        "How would you describe {name}?",
    ],
    "anatomy: whole": [
        "Which larger structure is {name} part of?",
        "Where does {name} belong in the body?",
        "Of which larger structure is {name} a part?",
        "What is {name} a part of?",
    ],
    "anatomy: kind": [
        "What kind of structure is {name}?",
        "What type of body part is {name}?",
        "How do anatomists classify {name}?",
        "Is {name} a bone, a muscle, a vessel or something else?",
    ],
}
# What `phrasings` and `kinds` of a source may be used with: dataset -> kinds of its rows.
ASKED_KINDS = {
    "mondo_questions": ("definition", "synonyms", "category"),
    "uniprot_questions": ("definition", "features", "inheritance"),
    "uberon_questions": ("anatomy",),
}
# Whole sentences up to about so many words: a small model keeps short answers right more often.
MAX_ANSWER_WORDS = 30
Fact = tuple[str, str, str, str]  # key of QUESTIONS, name asked about, answer, entity


def asked(source: SourceSection, facts: Iterable[Fact]) -> Iterator[Row]:
    """Questions and answers for facts: `source.phrasings` of each, as many as `source.kinds` allows.

    Where a kind has more rows than allowed, every fact is asked once before any is asked twice.
    """
    rows = []
    for kind, name, answer, entity in facts:
        options = QUESTIONS[kind]
        first = options.index(pick(options, kind, name))
        for turn in range(source.phrasings):
            row = {
                "prompt": options[(first + turn) % len(options)].format(name=name),
                "completion": answer,
                "kind": kind.split(":")[0],
                "entity": entity,
            }
            rows.append((turn, row))
    if source.kinds:
        allowed = dict(source.kinds)
        kept = set()
        for number in sorted(
            range(len(rows)), key=lambda n: (rows[n][0], unit(f"kinds\x1f{rows[n][1]['prompt']}"))
        ):
            kind = rows[number][1]["kind"]
            if allowed.get(kind, 0) > 0:
                allowed[kind] -= 1
                kept.add(number)
        rows = [row for number, row in enumerate(rows) if number in kept]
    for _, row in rows:
        yield row
