"""Preference pairs for LiteGuard: refuse what harms, answer what merely looks as if it might.

    python -m liteguard.embedded.catalogue            # counts and the length statistic, as JSON
    python -m liteguard.embedded.catalogue --show 20  # and twenty random pairs to read

The texts are in ``catalogue.yaml``, and in ``catalogue_more.yaml`` those that are never tested;
this module only puts them together. Every pair has a prompt,
a chosen and a rejected answer, and belongs to one of three kinds:

    harmful      chosen refuses and names a safe way on; rejected complies without any content
    ordinary     chosen answers a plain health question; rejected refuses it for no reason
    borderline   the same, for a question that looks harmful and is fine

Three rules keep a model from learning the wrong thing. Wrappers (politeness, a role, a pretext,
lower case) are drawn in the same way for all kinds. Unwarranted refusals use the same openings,
and for borderline questions the same reasons and ways on, as wanted ones. And of many possible
constructed answers the one that best matches its counterpart in length is taken.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

CATALOGUE = Path(__file__).with_name("catalogue.yaml")
MORE = Path(__file__).with_name("catalogue_more.yaml")
# Chosen so that there are about as many harmless pairs as harmful ones. The training stems of
# catalogue_more.yaml get fewer prompts each: new wordings teach more than new wrappers do
# (docs/experiments.md).
PROMPTS_PER_STEM = 20
PROMPTS_PER_ADDED_STEM = 13
PROMPTS_PER_QUESTION = 13
MIN_WORDS, MAX_WORDS = 25, 60
# Held out of training: stems within each trained area, and shares of the base questions.
TEST_STEMS, VALIDATION_STEMS = 2, 1
TEST_SHARE, VALIDATION_SHARE = 0.20, 0.08
# How often an answer's reason is a general one: those also stand in unwarranted refusals.
GENERAL_REASON_SHARE = 0.25
# With 100 draws the best candidate is within a word or two of its counterpart.
LENGTH_DRAWS = 100
LARGEST_DEBT = 5  # words; enough to even out a bias, too little to distort a single answer
# What is put round a request. Read off at even steps, so every stem and question gets the same mix.
_SHAPES = ["plain"] * 3 + ["prefix"] * 6 + ["suffix"] * 5 + ["both"] * 6
_LOWER_SHARE = 0.12  # lower case with punctuation; and as often again without
_SLOT = re.compile(r"\{(\w+)\}")
_TO_READER = {"my": "your", "me": "you", "mine": "yours", "I": "you"}


@dataclass(frozen=True)
class PreferencePair:
    """One prompt with a preferred and a dispreferred answer."""

    prompt: str
    chosen: str
    rejected: str
    kind: str  # 'harmful' | 'ordinary' | 'borderline'
    area: str  # harmful: the area of harm; otherwise the topic
    wording: str  # the stem or base question behind the prompt; one wording is in one split only
    split: str  # 'train' | 'validation' | 'test'


@lru_cache(maxsize=1)
def load_catalogue() -> dict[str, Any]:
    """Return the parsed ``catalogue.yaml`` with the texts of ``catalogue_more.yaml`` in it.

    Stems and questions of the latter have a ``split``. Shared between callers: not to be changed.
    """
    catalogue = _parsed(CATALOGUE)
    for split, more in _parsed(MORE).items():
        for name, area in more["areas"].items():
            catalogue["areas"][name]["stems"] += [
                {**stem, "split": split} for stem in area["stems"]
            ]
        for kind in ("ordinary", "borderline"):
            for group in more.get(kind, []):
                questions = [{**question, "split": split} for question in group["questions"]]
                catalogue[kind].append({**group, "questions": questions})
    return catalogue


def _parsed(path: Path) -> dict[str, Any]:
    """The content of one YAML file."""
    import yaml  # here, so that importing this module stays instant

    # The C loader reads the file about ten times faster; not every PyYAML build has it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)


def preference_pairs(seed: int = 0) -> list[PreferencePair]:
    """Return all pairs, shuffled; the same list for the same ``seed``, on any machine.

    ``seed`` changes wrappers, slot values and answers. Splits do not depend on it: they follow
    from the ids in the catalogue, so two seeds never disagree about what is held out.

    Raises ``ValueError`` if a stem or question has too few distinct prompts.
    """
    catalogue = load_catalogue()
    seen: set[str] = set()
    pairs = list(_harmful_pairs(catalogue, seed, seen))
    for kind in ("ordinary", "borderline"):
        pairs += _harmless_pairs(catalogue, kind, seed, seen)
    random.Random(f"{seed}:order").shuffle(pairs)
    return pairs


def length_statistic(pairs: Sequence[PreferencePair]) -> dict[str, dict[str, dict[str, float]]]:
    """Say how far length gives the chosen answer away.

    Returns ``{'all' or kind: {'words' or 'characters': {...}}}`` with the mean ``chosen`` and
    ``rejected`` length, their ``relative_difference`` (chosen minus rejected, over rejected) and
    ``correlation``, the point-biserial correlation of length with being chosen.
    """
    groups = {"all": list(pairs)}
    for pair in pairs:
        groups.setdefault(pair.kind, []).append(pair)
    measures: dict[str, Callable[[str], int]] = {
        "words": lambda text: len(text.split()),
        "characters": len,
    }
    return {
        group: {
            name: _compare([size(p.chosen) for p in members], [size(p.rejected) for p in members])
            for name, size in measures.items()
        }
        for group, members in groups.items()
    }


def _compare(chosen: list[int], rejected: list[int]) -> dict[str, float]:
    """Means, relative difference and point-biserial correlation of two equally long lists."""
    mean_chosen = sum(chosen) / len(chosen)
    mean_rejected = sum(rejected) / len(rejected)
    everything = chosen + rejected
    mean = sum(everything) / len(everything)
    deviation = (sum((x - mean) ** 2 for x in everything) / len(everything)) ** 0.5
    # Both groups are of one size, so sqrt(p q) in the usual formula is 1/2.
    correlation = (mean_chosen - mean_rejected) / (2 * deviation) if deviation else 0.0
    return {
        "chosen": round(mean_chosen, 3),
        "rejected": round(mean_rejected, 3),
        "relative_difference": round((mean_chosen - mean_rejected) / mean_rejected, 5),
        "correlation": round(correlation, 5),
    }


# --------------------------------------------------------------------------- the two sides
def _harmful_pairs(
    catalogue: dict[str, Any], seed: int, seen: set[str]
) -> Iterator[PreferencePair]:
    """Pairs whose chosen answer refuses."""
    balances = _balances()
    for name, area in catalogue["areas"].items():
        gentle = area["gentle"]
        openings = catalogue["gentle_openings" if gentle else "openings"]
        quiet = "quiet_" if area["quiet"] else ""
        # Self-harm keeps to its own reasons: a general one would sound cold there.
        general = None if gentle else catalogue["general_reasons"]
        slots = {**catalogue["slots"], **area["slots"]}
        splits = _stem_splits(name, area)
        for stem in area["stems"]:
            wording, split = f"{name}/{stem['id']}", splits[stem["id"]]
            rng = random.Random(f"{seed}:{wording}")
            added = stem.get("split") == "train"
            count = PROMPTS_PER_ADDED_STEM if added else PROMPTS_PER_STEM
            for prompt, values in _prompts(
                catalogue, rng, stem["asks"], slots, gentle, count, seen
            ):
                task = _fill(stem["task"], {k: _to_reader(v) for k, v in values.items()})
                chosen = _wanted_refusal(rng, task, openings, area, general)
                comply = partial(
                    _empty_compliance,
                    rng,
                    catalogue[f"{quiet}compliance_openings"],
                    catalogue[f"{quiet}compliance_fillers"],
                )
                rejected = balances[split].nearest(comply, task, chosen)
                yield PreferencePair(prompt, chosen, rejected, "harmful", name, wording, split)


def _harmless_pairs(
    catalogue: dict[str, Any], kind: str, seed: int, seen: set[str]
) -> Iterator[PreferencePair]:
    """Pairs whose chosen answer helps, and whose rejected answer refuses for no reason."""
    balances = _balances()
    splits = _question_splits(catalogue, kind)
    for group in catalogue[kind]:
        near = catalogue["areas"].get(group["near"])
        openings = catalogue["gentle_openings" if near and near["gentle"] else "openings"]
        reasons = catalogue["general_reasons"] + catalogue["unwarranted_reasons"]
        if near:
            # Twice over, so that the area's own reasons are drawn nearly as often as the others.
            reasons = reasons + near["reasons"] * 2
        ways = near["ways"] if near else catalogue["general_ways"]
        for question in group["questions"]:
            wording, split = f"{kind}/{question['id']}", splits[question["id"]]
            rng = random.Random(f"{seed}:{wording}")
            answer, gentle = question["answer"], question.get("gentle", False)
            refuse = partial(_unwarranted_refusal, rng, openings, reasons, ways)
            # Requests as often as questions, as in the harmful stems: form must not be a cue.
            asks = question["asks"] + [question["request"]] * len(question["asks"])
            for prompt, _ in _prompts(catalogue, rng, asks, {}, gentle, PROMPTS_PER_QUESTION, seen):
                rejected = balances[split].nearest(refuse, question["task"], answer)
                yield PreferencePair(prompt, answer, rejected, kind, group["topic"], wording, split)


def _wanted_refusal(
    rng: random.Random,
    task: str,
    openings: list[str],
    area: dict[str, Any],
    general: list[str] | None,
) -> str:
    """A refusal that names the task, a reason and the area's safe way on."""
    for _ in range(100):
        reasons = general if general and rng.random() < GENERAL_REASON_SHARE else area["reasons"]
        reason = rng.choice(reasons)
        text = _join(task, rng.choice(openings), reason, rng.choice(area["ways"]))
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            return text
    raise ValueError(f"no refusal of {MIN_WORDS} to {MAX_WORDS} words for {task!r}")


def _empty_compliance(rng: random.Random, openings: list[str], fillers: list[str]) -> list[str]:
    """Willing words about the task with nothing in them, as sentences to be filled in."""
    return [rng.choice(openings), *rng.sample(fillers, rng.randint(2, 5))]


def _unwarranted_refusal(
    rng: random.Random, openings: list[str], reasons: list[str], ways: list[str]
) -> list[str]:
    """A refusal like a wanted one; longer answers need a second reason or way to match."""
    return [
        rng.choice(openings),
        *dict.fromkeys(rng.sample(reasons, rng.randint(1, 2))),  # the list may repeat a reason
        *rng.sample(ways, rng.randint(1, 2)),
    ]


# --------------------------------------------------------------------------- splits
def _ranked(ids: Sequence[str], salt: str) -> list[str]:
    """``ids`` in an order that looks random and never changes."""
    return sorted(ids, key=lambda i: hashlib.sha256(f"{salt}/{i}".encode()).hexdigest())


def _stem_splits(name: str, area: dict[str, Any]) -> dict[str, str]:
    """Split of each stem of one area; an area that is held out is test throughout."""
    if area["held_out"]:
        return {stem["id"]: "test" for stem in area["stems"]}
    ids = _ranked([stem["id"] for stem in area["stems"] if "split" not in stem], name)
    return _fixed_splits(area["stems"]) | _deal(ids, TEST_STEMS, VALIDATION_STEMS)


def _question_splits(catalogue: dict[str, Any], kind: str) -> dict[str, str]:
    """Split of each base question of one kind."""
    questions = [question for group in catalogue[kind] for question in group["questions"]]
    ids = _ranked([q["id"] for q in questions if "split" not in q], kind)
    dealt = _deal(ids, round(TEST_SHARE * len(ids)), round(VALIDATION_SHARE * len(ids)))
    return _fixed_splits(questions) | dealt


def _fixed_splits(entries: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Split of the stems or questions that name theirs."""
    return {entry["id"]: entry["split"] for entry in entries if "split" in entry}


def _deal(ids: list[str], test: int, validation: int) -> dict[str, str]:
    """The first ``test`` ids are test, the next ``validation`` validation, the rest train."""
    names = ["test"] * test + ["validation"] * validation
    return dict(zip(ids, names + ["train"] * (len(ids) - len(names)), strict=True))


# --------------------------------------------------------------------------- text
def _prompts(
    catalogue: dict[str, Any],
    rng: random.Random,
    asks: list[str],
    slots: dict[str, list[str]],
    gentle: bool,
    count: int,
    seen: set[str],
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ``count`` new prompts with the slot values in them.

    ``seen`` holds prompts without case and punctuation, so that no two differ in those alone.
    """
    prefixes = [w for w in catalogue["prefixes"] if w["gentle"] or not gentle]
    suffixes = [w for w in catalogue["suffixes"] if w["gentle"] or not gentle]
    for index in range(count):
        shape = _SHAPES[index * len(_SHAPES) // count]
        for attempt in range(400):
            if attempt == 100 and shape == "plain":
                shape = "prefix"  # a stem without slots has only two plain prompts
            values = {name: rng.choice(options) for name, options in slots.items()}
            text = _fill(rng.choice(asks), values)
            before = rng.choice(prefixes) if shape in ("prefix", "both") else None
            # Two roles or pretexts in one prompt contradict each other.
            ends = [w for w in suffixes if not before or "tone" in (w["sort"], before["sort"])]
            after = rng.choice(ends) if shape in ("suffix", "both") else None
            text = " ".join(
                part for part in (before and before["text"], text, after and after["text"]) if part
            )
            key = re.sub(r"[^a-z0-9 ]", "", text.lower())
            if key not in seen:
                break
        else:
            raise ValueError(f"too few distinct prompts from {asks[0]!r}: got {index} of {count}")
        seen.add(key)
        style = rng.random()
        if style < 2 * _LOWER_SHARE:
            text = text.lower()
        if style < _LOWER_SHARE:
            text = re.sub(r"[.,?!:;]", "", text)
        yield text, values


def _fill(text: str, values: dict[str, str]) -> str:
    """Put ``values`` into the slots of ``text`` and start every sentence with a capital."""
    filled = _SLOT.sub(lambda match: values[match.group(1)], text)
    return re.sub(r"((?<=[.?!] ))[a-z]", lambda m: m.group().upper(), _capital(filled, text))


def _capital(filled: str, text: str) -> str:
    """Capitalise ``filled`` if ``text`` is a sentence of its own, not a phrase inside one."""
    return filled[0].upper() + filled[1:] if text[-1] in ".?!" else filled


def _to_reader(value: str) -> str:
    """Turn the asker's words round for the answer: 'my mother' becomes 'your mother'."""
    return re.sub(r"\b(my|me|mine|I)\b", lambda m: _TO_READER[m.group()], value)


def _join(task: str, *parts: str) -> str:
    """One answer from its sentences, with ``{task}`` filled in."""
    return " ".join(part.replace("{task}", task) for part in parts)


class _LengthBalance:
    """Picks answers as long as their counterparts, and makes up for what is left over.

    The nearest candidate alone leaves a bias: ours have slightly shorter words than the written
    answers, so nearly every rejected text would be a word longer and a few characters shorter.
    """

    def __init__(self) -> None:
        self.words = 0  # rejected minus chosen so far, within LARGEST_DEBT
        self.characters = 0

    def nearest(self, draw: Callable[[], list[str]], task: str, target: str) -> str:
        """Of many drawn answers about ``task``, the one that best fits ``target`` and the balance.

        Drawn are sentences that stand in many answers: each is filled in and counted once.
        """
        words = self.words - len(target.split())
        characters = self.characters - len(target)
        sizes: dict[str, tuple[int, int]] = {}  # of a sentence with the space behind it

        def distance(parts: list[str]) -> int:
            word_count, length = words, characters - 1
            for part in parts:
                if part not in sizes:
                    text = _join(task, part)
                    sizes[part] = len(text.split()), len(text) + 1
                more, longer = sizes[part]
                word_count += more
                length += longer
            # A word is about six characters with its space, so the two weigh the same.
            return 6 * abs(word_count) + abs(length)

        best = _join(task, *min((draw() for _ in range(LENGTH_DRAWS)), key=distance))
        self.words = _clip(words + len(best.split()), LARGEST_DEBT)
        self.characters = _clip(characters + len(best), 6 * LARGEST_DEBT)
        return best


def _balances() -> dict[str, _LengthBalance]:
    """One balance for each split, so that length says nothing within any of them either."""
    return {split: _LengthBalance() for split in ("train", "validation", "test")}


def _clip(value: int, bound: int) -> int:
    """``value`` within plus or minus ``bound``."""
    return max(-bound, min(bound, value))


# --------------------------------------------------------------------------- command line
def main() -> None:
    """Print the counts and the length statistic, and some pairs if asked to."""
    parser = argparse.ArgumentParser(description="Show the preference pairs.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="how many random pairs to print")
    args = parser.parse_args()
    pairs = preference_pairs(args.seed)
    counts = Counter(f"{p.kind} {p.split}" for p in pairs)
    report = {"pairs": dict(sorted(counts.items())), "length": length_statistic(pairs)}
    print(json.dumps(report, indent=2))
    for pair in pairs[: args.show]:
        print(json.dumps(asdict(pair), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
