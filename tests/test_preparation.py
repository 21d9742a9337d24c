"""Cleaning, duplicates, decontamination, the cache of sources, interruption: on our own files."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from conftest import CACHE, ROOT, code_digest, fail, succeed

from liteguard.config import DataSection, SourceSection, build
from liteguard.data import (
    cleaning,
    near_duplicates,
    near_questions,
    overlap,
    preparation,
    shards,
    splits,
)
from liteguard.data.overlap import distinctive, windows, word_numbers
from liteguard.data.shards import Cleaner, _file_hashes, clean_source
from liteguard.rows import FIELDS, SPLITS, load_split
from liteguard.text import match_key, text_key

ANSWER = "Rest, drink enough water, and see a doctor if it does not get better within {} days."


POOL = """the patient has a fever and pain in the chest after a long walk with cough blood pressure
heart lung liver kidney skin rash child night morning week doctor nurse clinic test result sugar
salt water food sleep weight height sudden slow left right upper lower mild severe"""


def sentence(generator: random.Random, words: int) -> str:
    pool = POOL.split()
    return " ".join(generator.choice(pool) for _ in range(words)).capitalize() + "."


@pytest.fixture
def project(tmp_path):
    """A YAML over three jsonl files of our own, and a function that runs prepare_datasets.py."""
    generator = random.Random(0)
    files = {
        "texts": [{"text": sentence(generator, 40)} for _ in range(400)],
        "pairs": [
            {"prompt": sentence(generator, 20), "completion": ANSWER.format(n)} for n in range(400)
        ],
        "preferences": [
            {
                "prompt": sentence(generator, 12),
                "chosen": ANSWER.format(n),
                "rejected": sentence(generator, 15),
                "kind": "ordinary",
            }
            for n in range(200)
        ],
    }
    project = Project(tmp_path, files)
    project.save()
    return project


class Project:
    def __init__(self, directory: Path, files: dict[str, list[dict]]) -> None:
        self.directory, self.files = directory, files
        self.data: dict = {
            "cache_dir": str(directory / "cache"),
            "domain": [{"dataset": "plain_text", "path": str(directory / "texts.jsonl")}],
            "instruction": [
                {"dataset": "prompt_completion", "path": str(directory / "pairs.jsonl")}
            ],
            "preference": [{"dataset": "preference", "path": str(directory / "preferences.jsonl")}],
            "test_share": 0.15,
            "validation_share": 0.1,
        }

    def save(self) -> None:
        for name, rows in self.files.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (self.directory / f"{name}.jsonl").write_text(text)
        values = {"extends": str(ROOT / "configs/phi-2.yaml"), "data": self.data}
        (self.directory / "test.yaml").write_text(yaml.safe_dump(values))

    def command(self, output: str, *flags: str) -> list[str]:
        script = str(ROOT / "prepare_datasets.py")
        return [script, "--config", str(self.directory / "test.yaml"), "--output", output, *flags]

    def run(self, output: str = "out", *flags: str) -> str:
        return succeed(*self.command(output, *flags), cwd=self.directory)

    def rows(self, part: str, split: str, output: str = "out") -> list[dict]:
        return load_split(self.directory / output, part, split)

    def dropped(self, output: str = "out") -> list[dict]:
        lines = (self.directory / output / "dropped.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def reasons(self, wanted: str, output: str = "out") -> list[str]:
        """Why the rows whose text contains `wanted` were dropped."""
        return [d["reason"] for d in self.dropped(output) if wanted in json.dumps(d["row"])]


def test_every_row_is_written_or_dropped_with_a_reason(project):
    project.files["pairs"] += [
        {"prompt": "", "completion": ANSWER.format(1)},
        {"prompt": "?!", "completion": ANSWER.format(1)},
        {"prompt": "What now?", "completion": "B"},
        {"prompt": "And then?", "completion": "x" * 30_000},
        {
            "prompt": "Et maintenant ?",
            "completion": "Il faut se reposer, boire assez d'eau et consulter un m\u00e9decin si "
            "la douleur ne passe pas apr\u00e8s quelques jours.",
        },
        project.files["pairs"][0],
    ]
    project.save()
    screen = project.run()
    found = json.loads((project.directory / "out/manifest.json").read_text())
    entry = next(s for s in found["sources"] if s["part"] == "instruction")
    assert entry["dropped"] == {
        "empty": 2,
        "too short": 1,
        "too long": 1,
        "not en": 1,
        "duplicate": 1,
    }
    assert entry["rows_read"] == 406 and entry["rows_kept"] == 400
    for part in FIELDS:
        kept = sum(len(project.rows(part, split)) for split in SPLITS)
        own = [d for d in project.dropped() if d["part"] == part]
        read = next(s["rows_read"] for s in found["sources"] if s["part"] == part)
        assert kept + len(own) == read
    assert "1 not en" in screen and "prompt_completion" in screen
    notice = (project.directory / "out/NOTICE.md").read_text()
    digest = hashlib.sha256((project.directory / "pairs.jsonl").read_bytes()).hexdigest()
    assert f"pairs.jsonl: sha256 {digest}" in notice and "licence: not stated" in notice


def test_bad_input_of_every_kind_is_counted_in_one_run(project):
    """What a crawl brings, through the script: a counted drop each, never a traceback."""
    project.data["domain"][0] |= {"max_broken": 0.05}
    project.data["preference"][0] |= {"max_broken": 0.05}
    project.files["texts"].append({"text": "A zero\x00 byte inside of a word and of this text."})
    project.files["preferences"].append({"prompt": "Why?", "chosen": None, "rejected": "No idea."})
    project.save()
    with (project.directory / "texts.jsonl").open("ab") as file:
        file.write(b'{"text": "' + b"long " * 2_100_000 + b'"}\n')
        file.write(b'{"text": "caf\xe9 is not in UTF-8 here"}\n')
        file.write(b'{"text": "cut off in the mid')
    screen = project.run()
    reasons = {
        entry["part"]: entry["dropped"]
        for entry in json.loads((project.directory / "out/manifest.json").read_text())["sources"]
    }
    expected = {"line longer than 10 MB": 1, "not UTF-8": 1, "not JSON": 1}
    assert reasons["domain"] == expected and reasons["preference"] == {"missing or not text": 1}
    for reason in (*expected, "missing or not text"):
        assert f"1 {reason}" in screen
    kept = [r["text"] for s in SPLITS for r in project.rows("domain", s)]
    assert "A zero byte inside of a word and of this text." in kept and len(kept) == 401
    places = [d["row"].get("place", "") for d in project.dropped() if d["part"] == "domain"]
    assert [place.rsplit(" ", 1)[1] for place in places] == ["402", "403", "404"]
    del project.data["domain"][0]["max_broken"]
    del project.data["preference"][0]["max_broken"]
    project.files["preferences"][:5] = [{"prompt": "Why?", "chosen": "It", "rejected": None}] * 5
    project.save()
    message = fail(2, *project.command("other"), cwd=project.directory)
    assert "preferences.jsonl: 6 of 201 rows are broken" in message
    assert "line 1: missing or not text: rejected is None" in message
    assert "    max_broken: " in message


def test_weights_and_limits_shape_the_mixture_and_the_notice_names_local_copies(project):
    """A capped source has no more rows than that; the others come in the weights' proportions."""
    generator = random.Random(8)
    project.files["more"] = [
        {"prompt": sentence(generator, 20), "completion": ANSWER.format(n)} for n in range(900)
    ]
    first = project.data["instruction"][0]
    second = {**first, "path": str(project.directory / "more.jsonl"), "limit": 300, "weight": 3}
    project.data["instruction"] = [{**first, "weight": 1}, second]
    project.data["domain"][0] |= {"hub": "someone/books", "licence": "CC BY 4.0"}
    project.save()
    project.run()
    notice = (project.directory / "out/NOTICE.md").read_text()
    path = project.data["domain"][0]["path"]
    assert f"- source: {path} (read in place of someone/books on the model hub)" in notice
    assert "- licence: CC BY 4.0" in notice and "licence: not stated: see the source" in notice
    entries = json.loads((project.directory / "out/manifest.json").read_text())["sources"]
    kept = {e["path"]: e["rows_kept"] for e in entries if e["part"] == "instruction"}
    assert kept == {first["path"]: 400, second["path"]: 300}
    own = {row["prompt"] for row in project.files["pairs"]}
    train = [row["prompt"] in own for row in project.rows("instruction", "train")]
    # Until the smaller, heavier source runs out: three in four are its rows.
    assert 25 < sum(train[:160]) < 55 and sum(train) > 280 and all(train[-60:])


def test_what_needs_all_sources_at_once_holds_a_small_part_of_them(project, monkeypatch):
    """Signatures and windows stay in files: 600 bytes of hashes a row must not be in memory."""
    import tracemalloc

    def peak(rows: int) -> tuple[int, int]:
        texts = [{"text": sentence(random.Random(n), 150)} for n in range(rows)]
        project.files["texts"] = texts
        _file_hashes.cache_clear()
        project.save()
        values = yaml.safe_load((project.directory / "test.yaml").read_text())
        config = build([("test", {"data": values["data"], "model_type": "test"})])
        config.data.test_share = config.data.validation_share = 0.01
        with Cleaner() as cleaner:
            shards = {
                part: [
                    clean_source(cleaning.Rules(part, s, config.data), cleaner, str)
                    for s in getattr(config.data, part)
                ]
                for part in FIELDS
            }
        tracemalloc.start()
        parts = [splits.Part.join(part, found) for part, found in shards.items()]
        for part in parts:
            splits.drop_duplicates(part, 0.85)
        splits.drop_overlaps(parts, None, 0.75)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        files = ("digest.bin", "ngrams.bin", "rows.jsonl")
        return found, sum((shards["domain"][0].directory / f).stat().st_size for f in files)

    monkeypatch.setattr(overlap, "_FILTER", 1 << 12)
    monkeypatch.setattr(near_questions, "_BUCKETS", 1 << 12)
    monkeypatch.setattr(near_duplicates, "BLOCK", 256)
    monkeypatch.setattr(overlap, "_PIECE", 1 << 14)
    small, large = peak(2_000), peak(6_000)
    growth = (large[0] - small[0]) / (large[1] - small[1])
    assert growth < 0.1, growth


def test_planted_copies_of_evaluation_questions_are_dropped(project):
    generator = random.Random(9)
    long, short, local = sentence(generator, 30), "Which drug thins blood?", sentence(generator, 25)
    evaluation = project.directory / "exam.jsonl"
    evaluation.write_text("".join(json.dumps({"question": q}) + "\n" for q in (long, short, local)))
    words = long.rstrip(".").split()
    near = " ".join(["Please", "tell", "me:", *words[4:24], "or", "not?"])
    project.files["pairs"] += [
        {"prompt": long, "completion": ANSWER.format(401)},
        {"prompt": near, "completion": ANSWER.format(402)},
        {"prompt": "which drug THINS blood", "completion": ANSWER.format(403)},
        {"prompt": "Twelve: " + " ".join(words[:12]), "completion": ANSWER.format(404)},
    ]
    project.files["texts"] += [{"text": f"An exam asked this. {local} Nobody knew the answer."}]
    project.data["decontaminate"] = [str(evaluation)]
    project.save()
    project.run()
    overlap = f"overlaps {evaluation}"
    for day in (401, 402, 403):
        assert project.reasons(f"{day} days") == [overlap]
    assert project.reasons(local[:40]) == [overlap]
    assert project.reasons("404 days") == [], "twelve words in common are allowed"
    manifest = json.loads((project.directory / "out/manifest.json").read_text())
    assert manifest["decontaminated_against"] == [str(evaluation), "the test split"]


def test_a_planted_question_of_a_public_benchmark_is_dropped(project):
    from liteguard.embedded import public_benchmarks

    cache = CACHE.resolve()
    questions = [q.question for q in public_benchmarks.load("medqa", cache)]
    question = max(questions, key=len)
    words = question.split()
    project.data |= {"decontaminate": ["medqa"], "cache_dir": str(cache)}
    project.files["pairs"] += [
        {"prompt": question, "completion": ANSWER.format(701)},
        {"prompt": " ".join(words[5:40]) + " and so on?", "completion": ANSWER.format(702)},
    ]
    project.files["texts"].append({"text": f"From a book of exams. {' '.join(words[:50])}"})
    project.save()
    project.run()
    for wanted in ("701 days", "702 days", "From a book of exams"):
        assert project.reasons(wanted) == ["overlaps medqa"]


def test_short_held_out_questions_are_found_with_other_words_in_them(project):
    """Of 8 and 9 words, so that no window is left whole; another drug is another question."""
    exam = project.directory / "exam.jsonl"
    exam.write_text('{"question": "Which tumour marker rises in hepatoblastoma of infants?"}\n')
    project.data["decontaminate"] = [str(exam)]
    planted = {
        901: "Which tumour marker usually rises in hepatoblastoma of infants?",
        902: "In infants, which tumour marker of hepatoblastoma rises?",
        903: "Which tumour marker rises with hepatoblastoma of infants?",
        904: "Which tumour marker rises in neuroblastoma of schoolchildren?",
        905: "Which hormone rises in the blood of infants?",
    }
    # One that would be a test row: an evaluation set is kept out of every split.
    shares = DataSection(**{key: project.data[key] for key in ("test_share", "validation_share")})
    spellings = (planted[903].replace("with", "with " + "the " * n) for n in range(1, 99))
    planted[906] = next(
        prompt for prompt in spellings if cleaning.draw_split(match_key(prompt), shares) == "test"
    )
    project.files["pairs"] += [
        {"prompt": prompt, "completion": ANSWER.format(day)} for day, prompt in planted.items()
    ]
    project.save()
    project.run()
    for day in (901, 902, 903, 906):
        assert project.reasons(f"{day} days") == [f"resembles a question of {exam}"]
    for day in (904, 905):
        assert project.reasons(f"{day} days") == [], planted[day]
    project.data["question_similarity"] = None
    project.save()
    project.run("off")
    assert project.reasons("902 days", "off") == []


def test_near_copies_of_short_test_questions_leave_training(project):
    generator = random.Random(4)
    for n, row in enumerate(project.files["pairs"]):
        row["prompt"] = f"What helps against {sentence(generator, 4)[:-1].lower()} number{n}?"
    project.save()
    project.run("before")
    asked = [row["prompt"] for row in project.rows("instruction", "test", "before")]
    kept = len(project.rows("instruction", "train", "before"))
    project.files["pairs"] += [
        {"prompt": f"So w{question[1:]}", "completion": sentence(generator, 25)}
        for question in asked
    ]
    project.save()
    project.run("after")
    planted = [d for d in project.dropped("after") if "So w" in d["row"]["prompt"]]
    reasons = [d["reason"] for d in planted]
    assert reasons.count("resembles a question of the test split") > 0.7 * len(asked)
    trained = [row["prompt"] for row in project.rows("instruction", "train", "after")]
    assert not any(prompt.startswith("So w") for prompt in trained)
    assert len(trained) == kept


def with_entities(project) -> None:
    """300 diseases with a text, two questions and a preference each; 60 more without a text."""
    generator = random.Random(6)
    names = [f"morbus {''.join(generator.choices('bcdfgaeiou', k=9))}" for _ in range(360)]
    project.files["texts"] = [
        {"text": f"{name} means that {sentence(generator, 30)}", "entity": name}
        for name in names[:300]
    ]
    asked = ("What is {} and {}", "How does one treat {} when {}")
    project.files["pairs"] = [
        {
            "prompt": form.format(name, sentence(generator, 14).lower()),
            "completion": ANSWER.format(n),
            "entity": name.upper(),
        }
        for n, name in enumerate(names)
        for form in asked
    ]
    project.files["preferences"] = [
        {
            "prompt": f"Tell me about {name}: {sentence(generator, 8)}",
            "chosen": ANSWER.format(n),
            "rejected": sentence(generator, 15),
            "kind": "ordinary",
            "entity": name,
        }
        for n, name in enumerate(names)
    ]
    project.data |= {"seen_test_share": 0.2}


def test_questions_of_seen_and_of_unseen_entities_are_two_tiers(project):
    with_entities(project)
    # No entity: held out by its wording. With a split of its own: no tier.
    generator = random.Random(7)
    project.files["loose"] = [
        {"prompt": sentence(generator, 20), "completion": ANSWER.format(n)} for n in range(200)
    ]
    loose = {"dataset": "prompt_completion", "path": str(project.directory / "loose.jsonl")}
    project.data["instruction"].append(loose)
    project.data["preference"].append(
        {"dataset": "safety_catalogue", "limit": 300, "keep_near_duplicates": True}
    )
    project.save()
    project.run()
    rows = {(part, split): project.rows(part, split) for part in FIELDS for split in SPLITS}
    entities = {place: {row["entity"] for row in found} for place, found in rows.items()}
    tiers = {
        part: {
            tier: [row for row in rows[part, "test"] if row.get("tier") == tier]
            for tier in ("seen", "unseen", "held-out wording", None)
        }
        for part in FIELDS
    }
    trained = [place for place in rows if place[1] != "test"]
    validation = [rows[part, "validation"] for part in ("instruction", "preference")]
    for part in ("instruction", "preference"):
        seen = {row["entity"] for row in tiers[part]["seen"]}
        unseen = {row["entity"] for row in tiers[part]["unseen"]}
        assert len(seen) > 30 and len(unseen) > 30
        assert seen <= entities["domain", "train"]
        for place in trained:
            assert not entities[place] & (unseen if place[0] == "domain" else seen | unseen), place
        # Without a text the disease is nowhere in training, whatever was drawn for it.
        assert unseen - entities["domain", "test"]
    assert not any("tier" in row for place in trained for row in rows[place] if place[1] == "train")
    # Rows of the validation split have one as well: `evaluate.split` may name it.
    assert not any("tier" in row for row in rows["domain", "validation"])
    for found in validation:
        of_own = {row.get("tier") for row in found if row["dataset"] != "safety_catalogue"}
        assert "unseen" in of_own and of_own <= {"unseen", "held-out wording"}
    assert not any("tier" in row for row in rows["domain", "test"])
    untiered = {row["dataset"] for part in tiers for row in tiers[part][None]}
    assert untiered == {"plain_text", "safety_catalogue"}
    assert len(tiers["instruction"]["held-out wording"]) == sum(
        cleaning.draw_split(row["entity"], DataSection(test_share=0.15)) == "test"
        for split in SPLITS
        for row in rows["instruction", split]
        if not row["entity"].startswith("morbus")
    )
    counts = json.loads((project.directory / "out/manifest.json").read_text())["counts"]
    for part in ("instruction", "preference"):
        assert counts[f"{part}/test.jsonl"]["tiers"] == {
            tier: len(tiers[part][tier]) for tier in ("unseen", "seen", "held-out wording")
        }
    assert "tiers" not in counts["domain/test.jsonl"]
    # The other two splits' entities are those of before.
    project.data["seen_test_share"] = 0
    project.save()
    project.run("none")
    for split in ("validation", "test"):
        before = {row["entity"] for row in project.rows("domain", split, "none")}
        assert before == entities["domain", split]
    asked = {row["prompt"] for row in project.rows("instruction", "test", "none")}
    assert asked < {row["prompt"] for row in rows["instruction", "test"]}
    assert not any(row.get("tier") == "seen" for row in project.rows("preference", "test", "none"))


def test_questions_of_seen_entities_are_kept_apart_like_other_test_rows(project):
    with_entities(project)
    project.save()
    project.run("before")
    seen = [r for r in project.rows("instruction", "test", "before") if r.get("tier") == "seen"]
    trained = project.rows("instruction", "train", "before")
    by_words = sorted(seen, key=lambda row: len(row["prompt"].split()))
    prompts = [row["prompt"] for row in by_words if row["prompt"].startswith("How does")][:3]
    window, near, exact = prompts
    planted = {
        801: " ".join(["I", "wonder:", *window.split()[2:16], "or", "not"]),
        802: f"So h{near[1:-1]}, please?",
        803: exact.lower(),
    }
    project.files["pairs"] += [
        {"prompt": prompt, "completion": ANSWER.format(day), "entity": trained[0]["entity"]}
        for day, prompt in planted.items()
    ]
    project.files["texts"].append(
        {"text": f"Somebody asked this. {window} There was no answer.", "entity": "morbus"}
    )
    project.save()
    project.run("after")
    assert project.reasons("801 days", "after") == ["overlaps the test split"]
    assert project.reasons("Somebody asked", "after") == ["overlaps the test split"]
    assert project.reasons("802 days", "after")[0].endswith("the test split")
    assert project.reasons("803 days", "after") == ["its question is in the test split"]
    kept = project.rows("instruction", "train", "after")
    assert {row["prompt"] for row in kept} == {row["prompt"] for row in trained}


@pytest.mark.parametrize("similarity", [0.5, 0.75, 0.9, 1.0])
def test_near_questions_are_those_of_an_exhaustive_comparison(similarity):
    generator = random.Random(5)
    pool = [f"w{int(generator.paretovariate(0.6)) % 3000}" for _ in range(20_000)]
    questions = [generator.choices(pool, k=generator.randint(1, 30)) for _ in range(900)]
    for n in range(300, 600):  # near copies, most of them within the bounds
        words = list(questions[n - 300])
        words[generator.randrange(len(words))] = generator.choice(pool)
        questions[n] = words
    held, rows = questions[:300], questions[300:]

    def joined(lists):
        flat = word_numbers([word for words in lists for word in words])
        return flat, np.array([len(words) for words in lists], np.int64)

    seen = near_questions.count_words([joined(questions)[0]])
    labels = np.arange(len(held)) // 3
    index = near_questions.HeldOut(*joined(held), labels, seen, len(questions), similarity)
    weights = {
        word: index.weights[near_questions._bucket(word_numbers([word]))[0]] for word in set(pool)
    }

    def alike(one: set, other: set) -> bool:
        common, every = (sum(map(weights.get, s)) for s in (one & other, one | other))
        return common >= similarity * every - 1e-9

    usable = [
        (label, set(words))
        for label, words in zip(labels, held, strict=True)
        if near_questions.MIN_WORDS <= len(words) <= near_questions.MAX_WORDS
    ]
    expected = [
        min((label + 1 for label, own in usable if alike(own, set(words))), default=0)
        for words in rows
    ]
    found = index.find(*joined(rows))
    assert found.tolist() == expected and 30 < np.count_nonzero(found) < 600
    # A question that hundreds of held-out ones look like is how they are phrased.
    phrase = [["how", "are", "you", "today"]] * (near_questions.MAX_SHARED + 1)
    labels = np.zeros(len(phrase), np.int64)
    for number, expected in ((len(phrase) - 1, 1), (len(phrase), 0)):
        held = joined(phrase[:number])
        common = near_questions.HeldOut(*held, labels[:number], seen, 1_000, similarity)
        assert common.find(*joined(phrase[:1])).tolist() == [expected]
    none = near_questions.HeldOut(*joined([]), labels[:0], seen, 1, similarity)
    assert none.find(*joined(rows)).tolist() == [0] * len(rows)


def test_abstracts_that_hold_the_answers_of_pubmedqa_are_dropped(project):
    from liteguard.embedded import public_benchmarks

    cache = CACHE.resolve()
    abstracts = [q.context for q in public_benchmarks.load("pubmedqa", cache)]
    project.data |= {"decontaminate": ["pubmedqa"], "cache_dir": str(cache)}
    project.files["texts"] += [
        {"text": f"From a journal. {' '.join(text.split()[20:80])}"} for text in abstracts[:5]
    ]
    project.save()
    project.run()
    assert project.reasons("From a journal") == ["overlaps pubmedqa"] * 5


def test_training_rows_that_repeat_a_test_question_are_dropped(project):
    project.run("before")
    question = project.rows("instruction", "test", "before")[0]["prompt"]
    text = project.rows("domain", "test", "before")[0]["text"]
    words = question.rstrip(".").split()
    # Found by another wording of the answer's end, so they are rows of their own.
    # Few enough that the words do not look like a set phrase of the test split.
    for number in range(6):
        changed = f"Tell me {number}: {' '.join(words[:16])} and what else"
        project.files["pairs"].append(
            {"prompt": changed, "completion": ANSWER.format(1_000 + number)}
        )
    generator = random.Random(3)
    copied = " ".join(text.split()[5:20])
    project.files["texts"] += [
        {"text": f"Planted. {sentence(generator, 30)} {copied} {sentence(generator, 30)}"}
        for _ in range(6)
    ]
    project.save()
    project.run("after")
    leaked = [r for r in project.rows("instruction", "train", "after") if words[0] in r["prompt"]]
    assert not [r for r in leaked if " ".join(words[:13]) in r["prompt"]]
    assert project.reasons("and what else", "after").count("overlaps the test split") > 2
    assert project.reasons("Planted.", "after").count("overlaps the test split") > 2
    assert not [r for r in project.rows("domain", "train", "after") if "Planted" in r["text"]]


@pytest.mark.parametrize("length", [8, 25])
def test_a_question_that_stands_five_times_in_a_set_is_no_set_phrase(project, length):
    """One row an answer, as some sets have them: the question is looked for all the same."""
    question = " ".join(f"word{n}" for n in range(length))
    exam = project.directory / "exam.jsonl"
    exam.write_text(f"{json.dumps({'question': f'{question}?'})}\n" * 5)
    planted = f"Please tell me, {question}, or what?"
    project.files["pairs"].append({"prompt": planted, "completion": ANSWER.format(801)})
    project.data["decontaminate"] = [str(exam)]
    project.save()
    project.run()
    assert project.reasons("801 days") == [f"overlaps {exam}"]


def test_an_exam_is_read_as_training_rows_are(project):
    """Tags and entities are no words; bytes that are no UTF-8 would be lost ones."""
    exam = project.directory / "exam.csv"
    exam.write_text("question\n<p>What is Crohn&#39;s disease of the gut?</p>\n")
    planted = "Tell me: what is Crohn's disease of the gut, please?"
    project.files["pairs"].append({"prompt": planted, "completion": ANSWER.format(801)})
    project.data["decontaminate"] = [str(exam)]
    project.save()
    project.run()
    assert project.reasons("801 days") == [f"overlaps {exam}"]
    exam.write_bytes("question\nWhat is M\u00e9ni\u00e8re's disease of the ear?\n".encode("cp1252"))
    message = fail(2, *project.command("other"), cwd=project.directory)
    assert "exam.csv, line 2: not UTF-8" in message
    packed = project.directory / "exam.txt.gz"
    packed.write_bytes(gzip.compress(b"What is flu of the lung?\n" * 900)[:-12])
    project.data["decontaminate"] = [str(packed)]
    project.save()
    assert "is damaged" in fail(2, *project.command("third"), cwd=project.directory)


def test_a_test_question_with_five_answers_is_no_set_phrase(project):
    """Nor is the prompt of five test pairs: training rows with its words in them are left out."""
    question = " ".join(f"word{n}" for n in range(16))
    project.files["pairs"] += [
        {"prompt": f"{question}?", "completion": ANSWER.format(800 + n), "split": "test"}
        for n in range(5)
    ]
    planted = f"Please tell me, {question}, or what else is there to be said about all of it?"
    project.files["pairs"].append({"prompt": planted, "completion": ANSWER.format(901)})
    project.data["near_duplicate_threshold"] = None
    project.save()
    project.run()
    assert project.reasons("901 days") == ["overlaps the test split"]
    held = [row for row in project.rows("instruction", "test") if question in row["prompt"]]
    assert len(held) == 5


def test_a_phrase_that_many_rows_share_takes_none_of_them(project):
    """A lead-in of 17 words says nothing about a test row that has it too."""
    lead = " ".join(f"lead{n}" for n in range(17))
    for row in project.files["pairs"]:
        row["prompt"] = f"{lead} {row['prompt']}"
    project.save()
    project.run()
    assert "overlaps the test split" not in [d["reason"] for d in project.dropped()]
    assert len(project.rows("instruction", "train")) > 250


def test_what_is_left_beside_a_set_phrase_is_exactly_a_texts_own_words():
    texts = []
    for number in range(6):
        words = [f"lead{n}" for n in range(17)] + [f"own{number}x{n}" for n in range(14)]
        texts.append(windows(word_numbers(words), 13))
    found, origin = distinctive(texts, 13)
    # 19 windows a text; the last two hold none of the 17 words of the lead-in.
    assert sorted(found.tolist()) == sorted(h for text in texts for h in text[17:].tolist())
    assert sorted(origin.tolist()) == sorted(list(range(6)) * 2)


def test_short_questions_are_found_inside_longer_texts_and_in_any_unicode_form(project):
    exam = project.directory / "exam.jsonl"
    rows = ["Which drug thins the blood of patients?", "Who is Sjo\u0308gren?", "What is flu?"]
    exam.write_text("".join(json.dumps({"question": q}) + "\n" for q in rows))
    project.data["decontaminate"] = [str(exam)]
    project.files["pairs"] += [
        {"prompt": f"Question: {rows[0]} A. aspirin B. iron", "completion": ANSWER.format(801)},
        {"prompt": "Who is Sj\u00f6gren?", "completion": ANSWER.format(802)},
        {"prompt": "Tell me what is flu, please?", "completion": ANSWER.format(803)},
    ]
    project.save()
    project.run()
    overlap = f"overlaps {exam}"
    assert project.reasons("801 days") == [overlap] and project.reasons("802 days") == [overlap]
    assert project.reasons("803 days") == [], "three words are no question of their own"
    exam.write_text("")
    project.save()
    message = fail(2, *project.command("empty"), cwd=project.directory)
    assert "no question in" in message and "exam.jsonl" in message


def test_one_file_may_be_two_sources(project):
    for row in project.files["texts"]:
        row["other"] = "Otherwise " + row["text"][:90]
    first = project.data["domain"][0]
    project.data["domain"].append({**first, "columns": {"text": "other"}})
    project.save()
    assert project.run().count("400 usable") == 3
    assert any(r["text"].startswith("Otherwise") for r in project.rows("domain", "train"))


def test_no_empty_answer_is_chosen_and_a_disease_is_one_in_any_spelling(project):
    project.files["preferences"] += [
        {"prompt": "Is it bad?", "chosen": "?!", "rejected": ANSWER.format(1), "kind": "ordinary"},
        {"prompt": "Is it?", "chosen": ANSWER.format(2), "rejected": "No.", "kind": "a\u2028b"},
    ]
    for n, row in enumerate(project.files["texts"]):
        row["entity"] = ("Disease " if n % 2 else "disease ") + str(n // 2)
    project.save()
    project.run()
    assert project.reasons("?!") == ["empty"]
    kept = [r for s in SPLITS for r in project.rows("preference", s)]
    assert [r["kind"] for r in kept if r["prompt"] == "Is it?"] == ["a b"]
    where = {}
    for split in SPLITS:
        for row in project.rows("domain", split):
            assert where.setdefault(row["entity"].lower(), split) == split


def alike(digests: np.ndarray, threshold: float) -> near_duplicates.Alike:
    return lambda a, b: near_duplicates.similarity(digests[a], digests[b]) >= threshold


def test_rows_are_not_dropped_through_a_chain_of_dropped_ones():
    words = [f"w{n}" for n in range(60)]
    texts = []
    for step in range(15):
        words[4 * step : 4 * step + 2] = [f"x{step}a", f"x{step}b"]
        texts.append(" ".join(words))
    shingles = [windows(word_numbers(t.split()), 3) for t in texts]
    digests = near_duplicates.digests(
        np.concatenate(shingles), np.array([len(s) for s in shingles])
    )
    original = near_duplicates.near_duplicates(digests, alike(digests, 0.7))
    kept = np.flatnonzero(original < 0)
    assert 2 <= len(kept) < 15
    for row in np.flatnonzero(original >= 0):
        assert original[original[row]] < 0
        assert (digests[row] == digests[original[row]]).mean() >= 0.7


def test_workers_end_when_the_main_process_is_killed(tmp_path):
    code = (
        "import time\nfrom liteguard.data import shards as p, cleaning as c\n"
        "from liteguard.config import DataSection, SourceSection\n"
        "def rows():\n    for n in range(10**9):\n        yield {'text': f'one more {n}'}\n"
        "if __name__ == '__main__':\n"
        "    rules = c.Rules('domain', SourceSection(dataset='plain_text'), DataSection())\n"
        "    for _ in p.Cleaner().run(rules, rows()):\n        print('chunk', flush=True)\n"
    )
    script = tmp_path / "main.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment
    )
    process.stdout.readline()
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_near_copies_are_dropped_and_the_most_held_out_is_kept(project):
    project.run("before")
    held_out = project.rows("domain", "test", "before")[0]["text"]
    trained = project.rows("domain", "train", "before")[0]["text"]
    copies = [f"{text[:-1]} {word}." for text in (held_out, trained) for word in ("today", "soon")]
    project.files["texts"] = [{"text": c} for c in copies] + project.files["texts"]
    project.save()
    project.run("after")
    texts = {s: [r["text"] for r in project.rows("domain", s, "after")] for s in SPLITS}
    everything = sum(texts.values(), [])
    for stem in (held_out[:-1], trained[:-1]):
        assert len([t for t in everything if t.startswith(stem)]) == 1
    assert [t for t in texts["test"] if t.startswith(held_out[:-1])]
    assert [d["reason"] for d in project.dropped("after")].count("near duplicate") == 4
    project.data["domain"][0]["keep_near_duplicates"] = True
    project.save()
    project.run("kept")
    assert "near duplicate" not in [d["reason"] for d in project.dropped("kept")]


def test_estimated_similarity_agrees_with_the_exact_one():
    generator = random.Random(1)
    texts, pairs = [], []
    for _ in range(300):
        words = sentence(generator, 60).split()
        other = list(words)
        for _ in range(generator.randrange(12)):
            other[generator.randrange(len(other))] = f"x{generator.randrange(10_000)}"
        pairs.append((len(texts), len(texts) + 1))
        texts += [" ".join(words), " ".join(other)]
    numbers = [word_numbers(match_key(t).split()) for t in texts]
    shingles = [windows(n, near_duplicates.SHINGLE_WORDS) for n in numbers]
    digests = near_duplicates.digests(
        np.concatenate(shingles), np.array([len(s) for s in shingles])
    )
    found = near_duplicates.near_duplicates(digests, alike(digests, 0.8)) >= 0
    for first, second in pairs:
        a, b = (set(shingles[i].tolist()) for i in (first, second))
        exact = len(a & b) / len(a | b)
        assert not found[first]
        if abs(exact - 0.8) > 0.12:
            assert found[second] == (exact > 0.8), exact
    assert 30 < found.sum() < 270


def test_window_hashes_are_of_words_in_order():
    numbers = word_numbers(["a", "b", "c", "d", "b", "c", "d", "a"])
    found = windows(numbers, 3)
    assert found[1] == found[4] and len(set(found.tolist())) == 5
    assert len(windows(numbers, 9)) == 0
    again = subprocess.run(
        [
            sys.executable,
            "-c",
            "from liteguard.data.words import windows, word_numbers\n"
            "print(windows(word_numbers(list('abc')), 3)[0])",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert int(again.stdout) == found[0]


ENGLISH = [
    "Perihilar intrahepatic cholangiocarcinoma is a cancer of the bile ducts in the liver itself.",
    "15q13.3 microdeletion syndrome is a disorder of the growth of the brain and of the body.",
    "Fieber",
]
FOREIGN = [
    "Die zystische Fibrose ist eine Erbkrankheit der Lunge, die schon bei Kindern auftreten kann.",
    "La fibrosis qu\u00edstica es un trastorno que afecta a los pulmones y a todo el cuerpo.",
    "\u56ca\u6027\u7ea4\u7ef4\u5316\u662f\u4e00\u79cd\u9057\u4f20\u6027\u75be\u75c5" * 9,
]


@pytest.mark.parametrize(
    ("text", "is_english"), [*((t, True) for t in ENGLISH), *((t, False) for t in FOREIGN)]
)
def test_other_languages_are_told_from_long_medical_words(text, is_english):
    assert cleaning.is_language(text, "en") == is_english


def test_texts_in_other_scripts_have_keys_of_their_own():
    assert match_key("\u53d1\u70e7") != match_key("\u54b3\u55fd") != ""
    assert match_key("Sj\u00f6gren's  Syndrome!") == "sj\u00f6gren s syndrome"


def test_the_number_of_workers_does_not_change_the_rows(monkeypatch):
    rows = [{"text": sentence(random.Random(n), 30)} for n in range(50)]
    rules = cleaning.Rules("domain", SourceSection(dataset="plain_text"), DataSection())
    monkeypatch.setattr(shards, "CHUNK_ROWS", 7)
    with Cleaner() as cleaner:
        many = list(cleaner.run(rules, rows))
    whole = cleaning.clean(rules, rows)
    assert len(many) == 8 and [line for c in many for line in c.lines] == whole.lines
    for name in cleaning.ARRAYS:
        joined = np.concatenate([c.arrays[name] for c in many])
        assert np.array_equal(joined, whole.arrays[name]), name


def test_only_the_changed_source_is_cleaned_again(project):
    project.run("one")
    assert project.run("two").count("from the cache") == 3
    project.files["texts"].append({"text": "A new text about the heart and how it beats at night."})
    project.save()
    message = fail(2, *project.command("one"), cwd=project.directory)
    assert "made from other inputs" in message and "data.domain.0" in message
    screen = project.run("one", "--overwrite")
    assert screen.count("from the cache") == 2 and "401 rows read" in screen
    old = (project.directory / "two/instruction/train.jsonl").read_bytes()
    assert (project.directory / "one/instruction/train.jsonl").read_bytes() == old
    started = time.monotonic()
    assert "reused" in project.run("one") and time.monotonic() - started < 60


def test_a_changed_file_in_a_directory_is_noticed(project):
    folder = project.directory / "folder"
    folder.mkdir()
    (project.directory / "texts.jsonl").rename(folder / "a.jsonl")
    project.data["domain"][0]["path"] = str(folder)
    del project.files["texts"]
    project.save()
    project.run()
    (folder / "b.jsonl").write_text('{"text": "One more text about the liver, in another file."}\n')
    assert "data.domain.0" in fail(2, *project.command("out"), cwd=project.directory)


def test_kill_9_at_any_point_leaves_nothing_that_looks_finished(project):
    """Killed at several moments, from the first source to the last file; then the run goes on."""
    project.run("whole")
    expected = {
        p.relative_to(project.directory / "whole"): p.read_bytes()
        for p in (project.directory / "whole").rglob("*")
        if p.is_file()
    }
    marks = ["a source", "plain_text", "prompt_completion", "preference ", "a part"]
    for number, mark in enumerate(marks):
        project.data["cache_dir"] = str(project.directory / f"cache{number}")
        project.save()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, *project.command("killed")],
            cwd=project.directory,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        half_written = {
            "a source": (project.directory / f"cache{number}" / "sources", ".*.partial/rows.jsonl"),
            "a part": (project.directory / ".killed.partial", "domain/*.jsonl"),
        }
        if mark in half_written:
            work, pattern = half_written[mark]
            while not list(work.glob(pattern)) and process.poll() is None:
                time.sleep(0.001)
        else:
            for line in process.stdout:
                if mark in line and "rows read" in line:
                    break
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (project.directory / "killed").exists(), "finished too soon to be killed"
        project.run("killed")
        for name, content in expected.items():
            if name.name != "manifest.json":
                assert (project.directory / "killed" / name).read_bytes() == content, (mark, name)
        project.run("killed")
        subprocess.run(["rm", "-rf", str(project.directory / "killed")], check=True)


def test_a_damaged_cache_is_not_used(project):
    project.run("one")
    cut = next((project.directory / "cache/sources").glob("domain-*/rows.jsonl"))
    cut.write_bytes(cut.read_bytes()[:-100])
    edited = next((project.directory / "cache/sources").glob("instruction-*/order.bin"))
    content = bytearray(edited.read_bytes())
    content[7] ^= 1  # the size stays
    edited.write_bytes(content)
    assert project.run("two").count("from the cache") == 1
    for part in ("domain", "instruction"):
        first, second = (project.directory / n / f"{part}/train.jsonl" for n in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()


def test_the_line_that_an_error_proposes_is_what_the_next_run_needs(project):
    """Copied from the message into the YAML as it stands; no --overwrite after a failed run."""
    project.files["pairs"] = [
        {"question": row["prompt"], "Answer": row["completion"]} for row in project.files["pairs"]
    ]
    del project.data["preference"][0]["dataset"]
    project.data["preference"][0] |= {"dataset": "auto"}
    project.save()
    message = fail(2, *project.command("out"), cwd=project.directory)
    assert "pairs.jsonl, line 1: dataset 'prompt_completion' needs a column 'prompt'" in message
    line = message.split("in this source's entry:\n")[1].splitlines()[0]
    assert line.strip() == "columns: {prompt: question, completion: Answer}"
    project.data["instruction"][0] |= yaml.safe_load(line)
    project.files["preferences"][7]["rejected"] = None
    project.files["preferences"][8]["chosen"] = 8
    project.files["preferences"][9]["chosen"] = 9
    project.save()
    message = fail(2, *project.command("out"), cwd=project.directory)
    line = message.split("to go on without them:\n")[1].splitlines()[0]
    assert yaml.safe_load(line) == {"max_broken": 0.02}
    project.data["preference"][0] |= yaml.safe_load(line)
    project.save()
    assert "recognised as preference" in project.run()


def test_a_failed_run_says_what_to_change(project):
    (project.directory / "x.csv").write_text("question;answer\nWhat is it?;That is what it is.\n")
    entry = project.data["instruction"][0]
    for dataset in ("prompt_completion", "auto"):
        entry |= {"path": str(project.directory / "x.csv"), "dataset": dataset}
        project.save()
        message = fail(2, *project.command("out"), cwd=project.directory)
        assert "x.csv (cells separated by ';'), line 2" in message
        assert "columns: {prompt: question, completion: answer}" in message
    del entry["path"]
    entry["dataset"] = "alpaka"
    project.data["domain"] += [{"dataset": "plain_text"}, {"dataset": "preference", "path": "."}]
    project.save()
    message = fail(2, *project.command("out"), cwd=project.directory)
    assert "data.domain: 'plain_text' needs 'path:'" in message
    assert "data.domain: 'preference' makes preference rows, for data.preference" in message
    assert "data.instruction: unknown dataset 'alpaka'; did you mean 'alpaca'?" in message
    project.data["domain"] = project.data["domain"][:1]
    entry |= {"dataset": "plain_text", "path": str(project.directory / "pairs.jsonl")}
    project.files["texts"] = [{"text": "Short."}] * 30 + project.files["texts"][:1]
    project.data["instruction"] = [
        {"dataset": "prompt_completion", "path": str(project.directory / "pairs.jsonl")}
    ]
    project.save()
    message = fail(2, *project.command("out"), cwd=project.directory)
    assert "data.domain: not enough usable rows" in message and "dropped: 30 too short" in message
    assert "What is dropped is set by data.min_characters of texts" in message


def test_unknown_evaluation_set_is_a_clear_error(project):
    project.data["decontaminate"] = ["medqq"]
    project.save()
    message = fail(2, *project.command("out"), cwd=project.directory)
    assert "'medqq'" in message and "medqa" in message


def test_report_counts_tokens_and_draws_lengths(tiny_config, tmp_path):
    output = tmp_path / "data"
    screen = succeed(
        ROOT / "prepare_datasets.py",
        *("--config", tiny_config, "--output", output, "--report"),
        cwd=tmp_path,
    )
    report = json.loads((output / "report.json").read_text())
    assert report["instruction"]["tokens"] > report["instruction"]["rows"] > 10
    assert report["instruction"]["share_cut"] == 0 and "longer than 96" in screen
    # Rows of the histogram on the screen: shares that add up, in the report as counts.
    for part in FIELDS:
        assert sum(report[part]["histogram"].values()) == report[part]["rows"]
        row = next(
            line
            for line in screen.splitlines()
            if line.startswith(part) and "%" in line and "longer" not in line
        )
        shares = [float(cell.rstrip("%")) for cell in row.split()[1:]]
        assert len(shares) == 8 and abs(sum(shares) - 100) < 0.5
        assert shares[-1] == 0 and report[part]["longest"] <= 2048
    answers = report["preference"]["answers"]
    assert answers["all"]["pairs"] == answers["harmful"]["pairs"] + answers["ordinary"]["pairs"]
    assert "correlation" in screen and abs(answers["harmful"]["correlation"]) <= 1
    assert (output / "lengths.png").read_bytes().startswith(b"\x89PNG")
    # The report lies beside the data and is not part of them.
    assert "reused" in succeed(
        ROOT / "prepare_datasets.py", "--config", tiny_config, "--output", output, cwd=tmp_path
    )


def _random_sources(generator: random.Random, directory: Path) -> dict:
    """The `data` section of a YAML over files of random rows: copies, near copies, rubbish."""
    names = [f"disease {n}" for n in range(generator.randint(8, 40))]
    pool = [sentence(generator, generator.randint(4, 30)) for _ in range(60)]

    def text() -> str:
        words = generator.choice(pool).split()
        for _ in range(generator.choice([0, 0, 1, 3, 30])):
            words[generator.randrange(len(words))] = f"x{generator.randrange(999)}"
        return generator.choice([" ", "\n", "\u00a0 "]).join(words)

    def row(part: str) -> dict:
        made: dict = {field: text() for field in FIELDS[part]}
        if generator.random() < 0.7:
            name = generator.choice(names)
            made["entity"] = generator.choice([name, name.upper(), f"{name}!"])
        if generator.random() < 0.1:
            made[generator.choice(list(made))] = generator.choice([None, 7, "", "?!", "\x00", "ok"])
        return made

    formats = {"domain": "plain_text", "instruction": "prompt_completion"}
    data: dict = {"test_share": 0.25, "validation_share": 0.25, "max_characters": 200}
    data["near_duplicate_threshold"] = generator.choice([None, 0.5, 0.85])
    data["question_similarity"] = generator.choice([None, 0.6, 0.8])
    data["seed"] = generator.randrange(5)
    for part in FIELDS:
        data[part] = []
        weighted = generator.random() < 0.5
        for number in range(generator.randint(1, 3)):
            path = directory / f"{part}{number}.jsonl"
            rows = [row(part) for _ in range(generator.randint(60, 150))]
            lines = [json.dumps(r) if generator.random() < 0.97 else "{bad" for r in rows]
            path.write_text("\n".join(lines))
            source = {"dataset": formats.get(part, part), "path": str(path), "max_broken": 0.5}
            source["keep_near_duplicates"] = generator.random() < 0.3
            source["limit"] = generator.choice([None, None, 50])
            source["weight"] = generator.randint(1, 9) if weighted else None
            data[part].append(source)
    exam = directory / "exam.jsonl"
    exam.write_text("".join(json.dumps({"question": text()}) + "\n" for _ in range(5)))
    data["decontaminate"] = [str(exam)]
    data["seen_test_share"] = generator.choice([0.0, 0.2])
    return data


@pytest.mark.parametrize("seed", range(8))
def test_random_mixtures_are_split_and_counted_without_a_leak(seed, tmp_path, capsys):
    data = _random_sources(random.Random(seed), tmp_path)
    contents, manifests = [], []
    for name in ("one", "two"):
        values = {"model_type": "test", "data": {**data, "cache_dir": str(tmp_path / name / "c")}}
        work = tmp_path / name / "work"
        work.mkdir(parents=True)
        manifests.append(preparation.prepare(build([("test", values)]), work))
        files = sorted(path for path in work.rglob("*") if path.is_file())
        contents.append({str(path.relative_to(work)): path.read_bytes() for path in files})
    assert contents[0] == contents[1] and manifests[0] == manifests[1]

    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in contents[0][name].split(b"\n")[:-1]]

    found = {(part, split): lines(f"{part}/{split}.jsonl") for part in FIELDS for split in SPLITS}
    # Texts and questions about an entity are on one side, but for those of tier 1.
    where: dict[str, str] = {}
    asked_of: dict[str, str] = {}
    trained = {row["entity"] for row in found["domain", "train"]}
    tiers: Counter[str | None] = Counter()
    for (part, split), rows in found.items():
        for row in rows:
            entity, tier = match_key(row["entity"]), row.get("tier")
            tiers[tier] += 1
            named = tier in ("seen", "unseen")
            assert (tier == "seen") == (named and row["entity"] in trained)
            if tier != "seen":
                assert where.setdefault(entity, split) == split
            if part != "domain":
                assert asked_of.setdefault(entity, split) == split
    assert tiers["unseen"] and (tiers["seen"] > 0) == (data["seen_test_share"] > 0)
    asked: dict[tuple[str, str], list[str]] = {
        key: [text_key(row[FIELDS[key[0]][0]]) for row in rows] for key, rows in found.items()
    }
    for part, fields in FIELDS.items():
        everything = [
            tuple(text_key(row[f]) for f in fields)
            for split in SPLITS
            for row in found[part, split]
        ]
        assert len(set(everything)) == len(everything)
        # Several answers to a question are in one split.
        apart = [set(asked[part, split]) for split in SPLITS]
        assert sum(map(len, apart)) == len(set().union(*apart))
    # A question may be asked in two parts, but not on two sides of the test split.
    questions = {
        split: set(asked["instruction", split]) | set(asked["preference", split])
        for split in SPLITS
    }
    assert not questions["test"] & (questions["train"] | questions["validation"])

    reasons: dict[str, int] = {}
    for entry in manifests[0]["sources"]:
        rows_in = entry["rows_read"] + entry["rows_added"]
        assert rows_in == entry["rows_kept"] + sum(entry["dropped"].values())
        for reason, count in entry["dropped"].items():
            key = f"{entry['part']} {reason}"
            reasons[key] = reasons.get(key, 0) + count
    counted: dict[str, int] = {}
    for entry in lines("dropped.jsonl"):
        key = f"{entry['part']} {entry['reason']}"
        counted[key] = counted.get(key, 0) + 1
    assert counted == reasons and len(reasons) > 8
    for (part, split), rows in found.items():
        counts = manifests[0]["counts"][f"{part}/{split}.jsonl"]
        assert counts["rows"] == len(rows)
        assert counts["entities"] == len({row["entity"] for row in rows})
    kept = sum(entry["rows_kept"] for entry in manifests[0]["sources"])
    assert kept == sum(map(len, found.values()))


def test_the_version_of_rows_is_raised_with_the_code_that_makes_them():
    package = Path(shards.__file__).parents[1]
    files = [package / "text.py", *package.glob("embedded/*"), *package.glob("data/*.py")]
    named = [file for file in files if file.suffix in (".py", ".yaml")]
    digest = code_digest(f for f in named if f.name not in ("lengths.py", "__init__.py"))
    known = json.loads((Path(__file__).parent / "fixtures/rows_version.json").read_text())
    now = {"version": shards.ROWS_VERSION, "code": digest}
    assert known == now, (
        "The code that makes rows was changed. When the same input may now give other rows, raise "
        f"ROWS_VERSION in liteguard/data/shards.py. Then write {json.dumps(now)} to "
        "tests/fixtures/rows_version.json."
    )
