"""Anatomy (UBERON) as texts, questions and answers, and the abstracts of PubMedQA as texts."""

from __future__ import annotations

import functools
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from liteguard.embedded import anatomy, public_benchmarks
from liteguard.embedded.questions import MAX_ANSWER_WORDS, Fact, asked
from liteguard.rows import Row
from liteguard.text import match_key, normalise, pick, sentences, upper_first
from liteguard.wheels import fetch_wheel, read_member

if TYPE_CHECKING:
    from liteguard.config import SourceSection

UBERON_MEMBER = "cellxgene_ontology_guide/data/UBERON-ontology-v2024-03-22.json.gz"


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
            f"{upper_first(structure.label)}. {upper_first(structure.definition)}",
            sentences,
            f"In anatomy, {anatomy.lower_first(sentences)}",
        ]
        if structure.part_of and "part of" not in sentences:
            options.append(f"{sentences} {upper_first(name)} is part of {structure.part_of}.")
        if structure.synonyms:
            other = anatomy.definite(structure.synonyms[0])
            options.append(f"{sentences} {upper_first(name)} is also called {other}.")
        yield {"text": pick(options, "uberon", name), "entity": structure.entity}


def pubmedqa_text(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """Abstracts of PubMedQA's machine-made questions, without the answers, three renderings.

    92.6 % of those answers are yes, so they teach nothing; the abstracts are medical prose. The
    labelled questions of PubMedQA are a test set and no part of this.
    """
    for item in public_benchmarks.load("pubmedqa_artificial", cache_dir):
        question = re.sub(r" +([:;,?])", r"\1", upper_first(item.question))
        options = [
            item.context,
            f"{question} {item.context}",
            f"A study asked: {question} {item.context}",
        ]
        yield {"text": pick(options, "pubmedqa", question), "entity": match_key(question)}


def uberon_questions(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """What a structure of the body is, which larger one it is part of, what kind it is."""
    return asked(source, _uberon_facts(cache_dir))


def _uberon_facts(cache_dir: Path) -> Iterator[Fact]:
    for structure in _uberon(cache_dir):
        name, entity = structure.name, structure.entity
        yield "anatomy", name, sentences(structure.sentences, MAX_ANSWER_WORDS), entity
        if structure.part_of:
            answer = f"{upper_first(name)} is part of {structure.part_of}."
            yield "anatomy: whole", name, answer, entity
        if structure.kind:
            yield "anatomy: kind", name, f"{upper_first(name)} is {structure.kind}.", entity
