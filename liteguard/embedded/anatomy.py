"""UBERON's anatomy terms as readable English: which are about people, and their texts mended.

The ontology covers all animals and its definitions were written for curators: fragments without a
verb, database marks, citations in parentheses. What cannot be mended by rule is left out: a few
thousand good texts teach more than twice as many odd ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from liteguard.text import upper_first


@dataclass(frozen=True)
class Structure:
    """An anatomical structure; `name` has its article ("the hard palate")."""

    label: str
    name: str
    definition: str  # "A hard plate ..." or, when `is_sentence`, "The hard palate is ..."
    is_sentence: bool
    synonyms: tuple[str, ...]
    part_of: str | None  # with article
    kind: str | None  # with article: "a paired organ"
    entity: str

    @property
    def sentences(self) -> str:
        """The definition as full sentences about the name."""
        if self.is_sentence:
            return self.definition
        return f"{upper_first(self.name)} is {lower_first(self.definition)}"


def _any_of(words: str) -> re.Pattern[str]:
    """A pattern for any of some whole words; "_" stands for a blank."""
    alternatives = "|".join(word.replace("_", " ") for word in words.split())
    return re.compile(rf"\b(?:{alternatives})\b", re.IGNORECASE)


# Number ranges of the ontology's own terms and of its human ones; the others came from the
# anatomies of fish, amphibians and insects.
_HUMAN_IDS = re.compile(r"UBERON:[08]")
_NONHUMAN = _any_of(
    r"""teleosts? (?:zebra|jelly|star|hag)?fish(?:es)? shark elasmobranch\w* cyprin\w+ carp salmon
    lamprey agnath\w* cyclostom\w+ amphibi\w+ anura\w* frogs? toads? tadpole salamander\w*
    xenopus urodel\w+ reptil\w+ snakes? lizards? crocod\w+ turtles? squamates? dinosaur\w*
    \w*birds? avian aves chicks? chickens? fowl feathers? wings? beak eggs? shell monotrem\w+
    marsupial\w* rodents? rats? mouse mice murine hamsters? rabbits? cats? feline felid\w*
    dogs? carnivor\w+ herbivor\w+ horses? equine equid\w* cattle bovi\w+ cows? ruminant\w*
    rumen rumina\w* reticulorumen omasum abomasum sheep ovine goats? pigs? porcine swine
    ferrets? mustela whales? cetacea\w* dolphins? elephants? bats? monkeys? macaques? macaca
    apes? baboons? lemurs? chimpanzees? insects? insecta arthropods? arthropoda drosophila
    fly flies bees? spiders? arachnid\w* crustacea\w* mollus\w+ cephalopod\w* nematod\w+
    \w*worms? annelid\w* echinoderm\w* sponges? coelenterat\w+ tunicat\w+ ascidian\w* larva\w*
    pupa\w* imaginal instar invertebrates? tetrapod\w* actinopteryg\w+ sarcopteryg\w+
    amniot(?:a|es?) anamniot\w+ gnathostom\w+ chordat\w+ metazoa\w* bilateria\w* therian?s?
    eutherian?s? quadruped\w* hoof hooves hoofed ungulat\w+ claws? paws? antlers? fins?
    gills? lepidotrich\w* scales? scutes? carapac\w+ plastron swim barbels? lateral_line
    neuromasts? cloaca\w* proboscis vibriss\w+ whiskers? electric venoms? honey silk baculum
    baubellum os_penis snout muzzle udder brood animals? species taxa taxon clades? primates
    homolog\w+ extinct tails? vomeronasal pronephr\w+ nictitating tapetum bursal fabricius
    hemipen\w+ craniates? trunk_taste lensed dewlap comb sensu stages?
    amphiox\w+ opisthosom\w+ urode\w+ tube_magnum pelage autotomy parabronch\w+
    pharyngeal_(?:bones?|apophys\w+) supratemporal gizzard proventricul\w* syrinx plumage
    archistriat\w+ arcopall\w+ spirac\w+ syncerebrum"""
)
# Curators' words, and parts of limbs under names that only they use.
_JARGON = _any_of(
    r"""autopod\w* zeugopod\w* stylopod\w* acropod\w* metapod\w* digitopod\w* mesopod\w* manus pes
    pedal manual pre-cartilage condensation element rhombomeres? somites? sublaminar field
    plus collection_of cluster_of set_of zone_of multi-tissue
    anatomical_(?:entity|system|cluster|group) organism mesenchyme presumptive future
    primordium placodes? anlage ontolog\w+ terms? class(?:es)? defined definitions? disjoint
    grouping subclass\w* editor\w* note counter-examples? examples? wikipedia brain_?info
    neuronames http\w* see refers? et_al swanson paxinos brodmann ding allen atlas fma zfa
    nlx obsolete missing unknown unclear question\w* synonym\w* textbooks? authors?
    literature hypothesi\w+ considered figure fig etc"""
)
# Ancestors that settle that a term is not about people, or not about a structure at all. Limbs are
# exempt: the ontology has arms under "paired limb/fin".
_FOREIGN_ANCESTORS = _any_of(
    "insect arthropod fin feather gill tail swim_bladder wing rumen larval? egg shell venom scale "
    "life_cycle stage baculum homology"
)
_CLEAR_PARENTHESES = re.compile(
    r"\((?!free|adapted|modified|from|according|when|if)[a-z][a-z ,-]{2,40}\)"
)
_MARKS = re.compile(r"[\[\]{}<>|/=*&_\"#~:;()]|\.\.|\b\d{4}\b|\b(?:vs|cf|i\.e|e\.g)\b")
# What points back to a sentence before it, or is no sentence of its own.
_LOOSE = re.compile(
    r"(?:This|These|They|Those|Each|Most|Some|Thus|Also|However|But|And|Or|In|As such)\b"
)
_VOWEL_SOUND = re.compile(
    r"(?!u(?:ni|re|ri|ro|te|ti|[-st]e|s[ue]|-)|eu|one\b|ua|ub)[aeiou]|hour", re.IGNORECASE
)
_SINGULAR_S = re.compile(
    r"(?:ss|us|is|as|os|ys|pons|lens|dens|mons|glans|pars|[cs]eps|stapes|facies|ascendens)$"
)
_FINITE = _any_of(
    """is are was has have lies runs arises forms contains consists connects extends carries
    supplies drains receives separates covers lines passes begins collects serves allows
    produces provides makes comprises includes joins attaches originates"""
)
# A verb before any relative clause: "The frontal crest of the frontal bone ends below ...".
_MAIN_VERB = re.compile(
    r"(?:(?!\b(?:that|which|where|whose|who|when|what)\b).)* "
    r"(?:is|are|lies|ends|begins|runs|arise)\b"
)
_HEAD_END = re.compile(
    r"[,;:.]|(?:^| )"
    + _any_of(
        """that which who whose where when with without of in on at by to for from between within
    into through along around near under over above below beneath behind across surrounding
    covering lining connecting containing forming located found situated lying composed
    consisting formed made bounded derived extending joining running supplying attached
    adjacent posterior_to anterior_to lateral_to medial_to dorsal_to ventral_to inferior_to
    superior_to is are and or"""
    ).pattern
)
_CLAUSE = _any_of("that which where in and or from with to at on by as is has \\w+ing between")
_PLACE = (
    r"(?:(?:part|portion|region|area|division|subdivision|segment|section|layer|lobe|branch|wall|"
    r"surface|end|component|side|floor|roof|border|cavity)s? of|"
    r"(?:located|found|situated|embedded|contained) (?:in|within|inside)|\bwithin|\binside|\bin)"
)
_SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=[A-Z])")


def lower_first(text: str) -> str:
    """`text` with its first letter in lower case, unless it begins with an acronym."""
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def indefinite(noun: str) -> str:
    """`noun` with "a" or "an", by its sound."""
    return f"{'an' if _VOWEL_SOUND.match(noun) else 'a'} {noun}"


def definite(label: str) -> str:
    """A label as it stands in a sentence: "mucosa of lip" -> "the mucosa of the lip".

    Numbered labels ("thoracic vertebra 3") and names of people take no article.
    """
    pieces = re.split(r" of (?:the |an? )?", label)
    return " of ".join(
        piece if re.search(r"(?:^[A-Z]|[ ]?\d[a-z]?|\b[A-Z]+)$|^[A-Z]", piece) else f"the {piece}"
        for piece in pieces
    )


def is_plural(label: str) -> bool:
    """Whether the head noun of a label looks like a plural."""
    head = label.split(" of ")[0].split(" ")[-1]
    return bool(
        (head.endswith("s") and not _SINGULAR_S.search(head))
        or re.search(r"(?:ae|nuclei|ganglia|bronchi|villi|rami|tubuli|fibrae|musculi)$", head)
    )


def _parentheses(text: str) -> str:
    """Without citations and notes in parentheses; short plain glosses stay."""
    text = re.sub(r"\( ?([^()]*?) ?\)", r"(\1)", text)
    return re.sub(
        r" ?(\([^()]*\))",
        lambda match: f" {match[1]}" if _CLEAR_PARENTHESES.fullmatch(match[1]) else "",
        text,
    )


def _human(text: str) -> str:
    """With the names that limbs and sides have in people."""
    text = text.replace("side of organism", "side of the body")
    return text.replace("hindlimb", "lower limb").replace("forelimb", "upper limb")


def _articles(text: str) -> str:
    """With "a" and "an" as the next word sounds ("a artery", "an muscle" are in the source)."""
    return re.sub(
        r"\b([Aa])n? (?=([a-z]+))",
        lambda match: f"{match[1]}{'n' if _VOWEL_SOUND.match(match[2]) else ''} ",
        text,
    )


def clean(text: str) -> str:
    """A definition without database marks; empty when its first sentence is of no use.

    It ends before the first sentence that has curators' words, other animals or odd characters:
    what comes after may refer to it.
    """
    text = re.sub(r"\s*\[[^\]]*\]", "", _human(text))
    text = text.replace("in all vertebrate, and most invertebrate, animals", "in all vertebrates")
    text = re.sub(r"^Any (?!of )", "A ", text)
    text = re.sub(r"\b((?:fe)?male) (?:animal|organism)\b", r"\1", text)
    text = re.sub(r"\b[Aa]n? the\b", "the", text)
    text = re.sub(r"(\d)(and|or)\b", r"\1 \2", text)
    text = re.sub(r"\.(?:nn)?(?=[A-Z][a-z])", ". ", text)  # "areas.nnThis"
    text = re.sub(r" +([.,;])", r"\1", " ".join(_parentheses(text).split()))
    text = _articles(re.sub(r"\b([a-z]+) \1\b", r"\1", text, flags=re.IGNORECASE))
    kept: list[str] = []
    for sentence in _SENTENCE_END.split(text):
        odd = (
            _NONHUMAN.search(sentence)
            or _JARGON.search(sentence)
            or _MARKS.search(_CLEAR_PARENTHESES.sub("", sentence))
        )
        loose = kept and (_LOOSE.match(sentence) or not _FINITE.search(sentence))
        if odd or loose or len(" ".join(kept).split()) > 60:
            break
        kept.append(sentence)
    result = " ".join(kept)
    return result if not result or result.endswith((".", "!", "?")) else f"{result}."


def head(definition: str) -> str:
    """The noun phrase that a definition begins with: "A paired organ of ..." -> "paired organ"."""
    phrase = re.sub(r"^(?:An?|The|Any|One) ", "", definition)
    end = _HEAD_END.search(phrase)
    return lower_first(phrase[: end.start()] if end else phrase.rstrip("."))


def structures(terms: Mapping[str, Mapping[str, Any]]) -> list[Structure]:
    """The usable structures of the ontology, in its order.

    `terms`: UBERON id -> label, description, synonyms, deprecated, ancestors (id -> distance), as
    in the package's JSON. Ancestors hold both kinds and wholes, so that a relation is only taken
    when the definition says which of the two it is.
    """
    labels = {key: _human(term.get("label") or "") for key, term in terms.items()}
    candidates = {}
    for key, term in terms.items():
        label, text = labels[key], term.get("description") or ""
        if term.get("deprecated") or not _HUMAN_IDS.match(key) or not text:
            continue
        above = {labels[k] for k in term.get("ancestors", {}) if labels.get(k)}
        if (
            re.search(r"[^A-Za-z0-9 '-]| or | and ", label)
            or _NONHUMAN.search(label)
            or _JARGON.search(label)
            or is_plural(label)
            or any(_FOREIGN_ANCESTORS.search(n) for n in above if "limb" not in n)
        ):
            continue
        definition = clean(text)
        if len(definition.split()) >= 5:
            candidates[key] = (label, definition, above)

    # A bare noun phrase gets an article when other definitions use its noun with one.
    counted = Counter(
        head(d).split(" ")[-1] for _, d, _ in candidates.values() if re.match(r"An? ", d)
    )
    groups = _entities({k: (c[0], terms[k].get("synonyms", [])) for k, c in candidates.items()})
    found, seen = [], set()
    for key, (label, definition, above) in candidates.items():
        name = definite(label)
        shaped = _shape(label, definition, counted)
        # "An epithelium that is part of a saccule" says nothing about the epithelium of saccule.
        if shaped is None or shaped[0] in seen or _words(shaped[0]) <= _words(label):
            continue
        # Some definitions were copied from the other side and not changed.
        sides = {"left", "right"}
        if (own := sides & _words(label)) and sides & _words(shaped[0]) == sides - own:
            continue
        seen.add(shaped[0])
        text, is_sentence = shaped
        found.append(
            Structure(
                label=label,
                name=name,
                definition=text,
                is_sentence=is_sentence,
                synonyms=_clean_synonyms(label, terms[key].get("synonyms", [])),
                part_of=_part_of(label, text, above),
                kind=None if is_sentence else _kind(label, text, above),
                entity=groups[key],
            )
        )
    return found


def _shape(label: str, definition: str, counted: Counter[str]) -> tuple[str, bool] | None:
    """(definition, whether it is a sentence about the label), or None when it is neither."""
    bare = re.sub(r"^(?:The|An?) ", "", definition)
    if bare.lower().startswith(label.lower()):
        rest = bare[len(label) :].lstrip()
        own = _FINITE.match(rest)
        return (f"{upper_first(definite(label))} {rest}", True) if own else None
    first = definition.split(" ", 1)[0]
    if re.match(r"(?:The|An?) .{3,60} that is part of an? ", definition):
        whole = re.match(r"(.*? part of )an? (.*)\.$", definition)
        if whole and "." not in whole.group(2) and " and " not in whole.group(2):
            return f"{whole.group(1)}{definite(whole.group(2))}.", False
    one = re.match(r"(?:Any|One) of the (.*)", definition)
    if one and not _MAIN_VERB.match(_SENTENCE_END.split(definition)[0]):
        return f"One of the {one[1]}", False
    opening = head(definition)
    # A sentence about something else, or two run together.
    if (
        not opening
        or _FINITE.search(opening)
        or _MAIN_VERB.match(_SENTENCE_END.split(definition)[0])
    ):
        return None
    if first in ("A", "An", "The"):
        return (definition, False) if not is_plural(opening) else None
    noun = opening.split(" ")[-1]
    if counted[noun] >= 3 and not re.search(r"(?:ing|ed)$", noun):
        return upper_first(indefinite(lower_first(definition))), False
    return None


_EMPTY_WORDS = {"a", "an", "the", "of", "that", "is", "part", "which", "in", "and", "portion"}


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower())) - _EMPTY_WORDS


def _part_of(label: str, definition: str, above: set[str]) -> str | None:
    """The whole that the definition names and the ontology has above the structure."""
    first = _SENTENCE_END.split(definition)[0]
    stated = re.match(r".* that is part of (?:the |an? )?([^,;()]*)(?: \([^()]*\))?\.$", first)
    if stated:
        plain = not _CLAUSE.search(stated[1]) and not _words(stated[1]) <= _words(label)
        return definite(stated[1]) if plain else None
    after = r"(?=[.,;]| (?:that|which|and|between|where|with)\b)"
    named = [
        whole
        for whole in above
        if whole in first
        and not _words(whole) <= _words(label)
        and not whole.endswith("tissue")
        and whole not in ("body", "organ", "trunk")
        and "/" not in whole
        and not _JARGON.search(whole)
        and not _NONHUMAN.search(whole)
        and re.search(rf"{_PLACE} (?:the |an? )?{re.escape(whole)}{after}", first)
    ]
    # The longest is the most exact: "wall of stomach" before "stomach".
    return definite(max(named, key=lambda n: (len(n), n))) if named else None


def _kind(label: str, definition: str, above: set[str]) -> str | None:
    """What the definition calls the structure, when the ontology has that above it."""
    if not re.match(r"An? ", definition):
        return None
    opening = head(definition)
    known = any(f" {opening}".endswith(f" {name}") for name in above)
    # From the label's own words and from "an organ subunit" nothing is learned.
    vague = {"anatomical", "structure", "organ", "tissue", "subunit", "region", "element"}
    if not known or _words(opening) <= _words(label) | vague:
        return None
    return indefinite(opening)


def _clean_synonyms(label: str, synonyms: list[str]) -> tuple[str, ...]:
    """Synonyms that are plain names of two words or more, other than the label reordered."""
    return tuple(
        s
        for s in sorted(synonyms, key=lambda s: (len(s), s))
        if re.fullmatch(r"[A-Za-z][a-z' -]{5,40}", s)
        and " " in s
        and not is_plural(s)
        and not _NONHUMAN.search(s)
        and not _JARGON.search(s)
        and not _words(s) >= _words(label)
        and not _words(s) <= _words(label)
        and not re.search(r"\b(?:tree|proper)$|\b(\w+) \1\b", s)
    )


def _entities(named: Mapping[str, tuple[str, list[str]]]) -> dict[str, str]:
    """id -> entity: left and right, numbered ones and names that share a synonym are one."""

    def family(label: str) -> str:
        key = re.sub(r"[^a-z0-9]+", " ", label.lower()).strip()
        key = re.sub(
            r"\b(?:left|right|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|"
            r"eleventh|twelfth|\d+[a-z]?|[ivx]+)\b",
            "",
            key,
        )
        return " ".join(key.split()) or label

    parent: dict[str, str] = {}

    def find(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for label, synonyms in named.values():
        for synonym in synonyms:
            # Acronyms are shared by unrelated structures.
            if " " in family(synonym):
                one, other = sorted((find(family(label)), find(family(synonym))))
                parent[other] = one
    return {key: find(family(label)) for key, (label, _) in named.items()}
