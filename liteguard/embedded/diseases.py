"""Diseases as texts, questions and answers: the MONDO ontology and UniProt's descriptions."""

from __future__ import annotations

import functools
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard.embedded.questions import MAX_ANSWER_WORDS, Fact, asked
from liteguard.rows import Row
from liteguard.text import listed, match_key, normalise, pick, sentences, upper_first
from liteguard.wheels import fetch_wheel, read_member

if TYPE_CHECKING:
    from liteguard.config import SourceSection

MONDO_MEMBER = "cellxgene_ontology_guide/data/MONDO-ontology-v2024-05-08.json.gz"
UNIPROT_MEMBER = "trytond/modules/health_genetics_uniprot/data/protein_diseases.xml"

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
        return f"{upper_first(name)} is {first.lower()} {definition.split(' ', 1)[1]}"
    if match_key(name).split(" ")[0] in match_key(definition[: len(name) + 30]):
        return definition
    if _BARE_NOUN.match(definition):
        return f"{upper_first(name)} is {definition[:1].lower()}{definition[1:]}"
    return (
        f"{upper_first(name)}: {definition[:1].lower()}{definition[1:]}"
        if (definition[1:2].islower() and definition[:1].isupper())
        else f"{upper_first(name)}: {definition}"
    )


@functools.lru_cache(maxsize=2)
def mondo(cache_dir: Path) -> dict[str, dict[str, Any]]:
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
def uniprot(cache_dir: Path) -> list[dict[str, str]]:
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
def entities(cache_dir: Path) -> dict[str, str]:
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

    for disease in mondo(cache_dir).values():
        key = match_key(disease["name"])
        join(key, _family(disease["name"]))
        for synonym in disease["synonyms"]:
            if " " in match_key(synonym):
                join(key, match_key(synonym))
    for disease in uniprot(cache_dir):
        join(match_key(disease["name"]), _family(disease["name"]))
    return {key: find(key) for key in parent}


def entity_of(name: str, cache_dir: Path) -> str:
    """The entity that a disease name belongs to."""
    key = match_key(name)
    return entities(cache_dir).get(key, _family(name))


_TEMPLATE_DEFINITION = re.compile(r"^An?y? .* in which the cause of the disease is ", re.IGNORECASE)
_KIND_OF = r" is (?:an?|the) (?:[\w-]+ ){0,2}(?:form|type|subtype|variant)s? of "
_KIND_AND_MORE = re.compile(rf"{_KIND_OF}[^,.]*, (an? .+)")
_KIND_ALONE = re.compile(_KIND_OF)


def _beyond_its_kind(sentence: str) -> str:
    """'X 2 is a form of X, a disorder ...' as 'X 2 is a disorder ...'; empty where no more is said.

    A third of UniProt's descriptions begin so, and a small model makes "X is a form of X." of them.
    """
    said = _KIND_AND_MORE.sub(r" is \1", sentence, count=1)
    return "" if _KIND_ALONE.search(said) else said


# "Skin neoplasm is a neoplasm that involves the skin." tells nobody anything.
_FILLER = """a affecting affects an any arises arising from in involves involving is it
its located of or s that the this to which with"""


def _adds_words(name: str, text: str) -> bool:
    """Whether a definition, synonym or group has a word of its own, beyond the disease's name."""
    return not set(match_key(text).split()) <= {*match_key(name).split(), *_FILLER.split()}


def mondo_text(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """MONDO definitions as short paragraphs, three renderings."""
    for disease in mondo(cache_dir).values():
        if not disease["definition"] or _TEMPLATE_DEFINITION.match(disease["definition"]):
            continue
        name, definition = disease["name"], disease["definition"].rstrip(".")
        synonyms = disease["synonyms"][:2]
        sentence = _definition_sentence(name, definition)
        options = [f"{upper_first(name)}. {upper_first(definition)}.", f"{sentence}."]
        if synonyms:
            options.append(f"{sentence}. It is also called {' or '.join(synonyms)}.")
        if disease["parents"]:
            options.append(f"{sentence}. It belongs to the group {disease['parents'][0]}.")
        yield {"text": pick(options, "mondo", name), "entity": entity_of(name, cache_dir)}


def uniprot_text(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """UniProt disease descriptions as short paragraphs."""
    for disease in uniprot(cache_dir):
        name, text = disease["name"], disease["description"]
        options = [f"{upper_first(name)}. {text}", _definition_sentence(name, text)]
        if disease["acronym"]:
            options.append(f"{upper_first(name)} ({disease['acronym']}). {text}")
        yield {"text": pick(options, "uniprot", name), "entity": entity_of(name, cache_dir)}


def mondo_questions(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """Definition, synonym and category questions about MONDO diseases."""
    return asked(source, _mondo_facts(cache_dir))


def _mondo_facts(cache_dir: Path) -> Iterator[Fact]:
    for disease in mondo(cache_dir).values():
        name, definition = disease["name"], disease["definition"]
        entity = entity_of(name, cache_dir)
        if not definition or _TEMPLATE_DEFINITION.match(definition):
            continue
        told = _beyond_its_kind(_definition_sentence(name, definition))
        told = told if _adds_words(name, told) else ""
        answers = {"definition": sentences(told, MAX_ANSWER_WORDS)} if told else {}
        # One question of the two shorter kinds for every disease, so that the kinds balance.
        kind = pick(["synonyms", "category"], "kind", name)
        synonyms = [s for s in disease["synonyms"] if " " in s and _adds_words(name, s)][:3]
        groups = [parent for parent in disease["parents"] if _adds_words(name, parent)]
        if kind == "synonyms" and synonyms:
            answers["synonyms"] = f"{upper_first(name)} is also known as {listed(synonyms)}."
        elif kind == "category" and groups:
            answers["category"] = f"{upper_first(name)} is a form of {groups[0]}."
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
    return asked(source, _uniprot_facts(cache_dir))


def _uniprot_facts(cache_dir: Path) -> Iterator[Fact]:
    for disease in uniprot(cache_dir):
        name, text = disease["name"], disease["description"]
        entity = entity_of(name, cache_dir)
        sentence = _definition_sentence(name, text)
        kind = (
            "features"
            if _FEATURES.search(text) and pick(["features", "definition"], name) == "features"
            else "definition"
        )
        if told := _beyond_its_kind(sentence):
            yield kind, name, sentences(told, MAX_ANSWER_WORDS), entity
        patterns = set(_INHERITANCE.findall(text))
        if len(patterns) == 1:
            pattern = patterns.pop()
            article = "an" if pattern[0] in "aX" else "a"
            answer = f"{upper_first(name)} is inherited in {article} {pattern} pattern."
            yield "inheritance", name, answer, entity
