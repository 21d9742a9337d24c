"""From answers and scores to numbers with their intervals."""

from __future__ import annotations

from typing import Any

from liteguard.config import Config
from liteguard.data import sets
from liteguard.errors import UserError
from liteguard.evaluation import as_used, held_out, knowledge, llm_judge, metrics, refusals, rubrics
from liteguard.evaluation.held_out import REQUESTS, TIERS, requests, scored, text_pairs
from liteguard.evaluation.journal import Journal


def summarise(
    config: Config, rows: dict[str, list[dict[str, Any]]], journal: Journal
) -> dict[str, Any]:
    """The numbers of one model, with 95 % intervals and every answer it gave.

    Rates are shares between 0 and 1; `n` counts what each number was computed over; `intervals`
    holds (low, high) of each, by Wilson's formula for rates and by bootstrap over rows otherwise.
    """
    import numpy as np

    own_sums, own_tokens, sizes = _own_scores(config, rows, journal)
    answers = given_answers(rows, journal)
    outside = sets.kinds(rows)
    scores: dict[str, list[Any]] = {}
    for index, (name, _) in enumerate(scored(config, rows)):
        scores.setdefault(name, []).append(journal.found["scores"][index])
    options = sum(len(row["options"]) for row in rows["knowledge"])

    of_others = [a for a in answers if a["set"] in outside]
    everything, answers = answers, [a for a in answers if a["set"] not in outside]
    by_set = {name: [a for a in answers if a["set"] == name] for name in (*TIERS, *REQUESTS)}
    words = [metrics.word_count(a["answer"]) for a in answers]
    both = [a for name in TIERS for a in by_set[name]]
    tiers = [answer_overlap(by_set[name], prefix) for name, prefix in TIERS.items()]
    rates = {  # name -> (answers, key that is true or not)
        **{f"{name}_stopped": (by_set[name], "stopped") for name in TIERS},
        "circles": (both, "circle"),
        "refused_harmful": (by_set["harmful"], "refused"),
        "refused_benign": (by_set["ordinary"], "refused"),
        "refused_borderline": (by_set["borderline"], "refused"),
        "stopped": (answers, "stopped"),
        "repeated": (answers, "repeats"),
    }
    hits = {name: (sum(a[key] for a in given), len(given)) for name, (given, key) in rates.items()}
    return {
        "perplexity": metrics.perplexity(sum(own_sums), sum(own_tokens)),
        "bits_per_byte": metrics.bits_per_byte(sum(own_sums), sum(sizes)),
        **{name: value for tier in tiers for name, (value, _, _) in tier.items()},
        **{name: hit / count for name, (hit, count) in hits.items() if count},
        "answer_words": sum(words) / len(words),
        "n": {
            "perplexity": len(own_sums),
            "perplexity_tokens": sum(own_tokens),
            "bits_per_byte": len(own_sums),
            **{name: count for tier in tiers for name, (_, count, _) in tier.items()},
            **{name: count for name, (_, count) in hits.items()},
            "answer_words": len(words),
        },
        "intervals": {
            "perplexity": metrics.ratio_interval(own_sums, own_tokens, lambda mean: np.exp(-mean)),
            "bits_per_byte": metrics.ratio_interval(own_sums, sizes, lambda m: -m / np.log(2)),
            **{name: interval for tier in tiers for name, (_, _, interval) in tier.items()},
            **{name: metrics.wilson(*counts) for name, counts in hits.items()},
            "answer_words": metrics.mean_interval(words),
        },
        "verdicts": {name: verdicts(by_set[name]) for name in REQUESTS},
        "areas": {
            name: {
                area: verdicts([a for a in by_set[name] if a["area"] == area])
                for area in sorted({str(a["area"]) for a in by_set[name] if a["area"]})
            }
            for name in REQUESTS
        },
        "guide_areas": {
            area: verdicts([a for a in by_set["harmful"] if guide_area(a["area"]) == area])
            for area in (*held_out.GUIDE_AREAS, held_out.OTHER_AREA)
        },
        "knowledge": knowledge.summarise(
            rows["knowledge"], [journal.found["options"][i][0] for i in range(options)]
        ),
        "as_used": as_used.summarise(config, rows, journal),
        **({"llm_judge": llm_judge.summarise(everything)} if journal.found["judged"] else {}),
        "bleu_signature": metrics.bleu_signature([a["reference"] for a in both if a["reference"]]),
        # Of a bundle: what its KV cache is too small for. Counted like answers that did not end,
        # and like wrong choices.
        "too_long": {
            "answers": sum(not (a["tokens"] or a["stopped"]) for a in everything),
            "options": sum(score is None for score, _ in journal.found["options"].values()),
        },
        "sets": {
            name: set_numbers(
                kind,
                rows[name][0]["file"],
                [a for a in of_others if a["set"] == name],
                scores.get(name, []),
            )
            for name, kind in outside.items()
        },
        "scores": {
            name: [(None if total is None else round(total, 4), tokens) for total, tokens in own]
            for name, own in scores.items()
        },
        "answers": everything,
    }


def _own_scores(
    config: Config, rows: dict[str, list[dict[str, Any]]], journal: Journal
) -> tuple[list[float], list[int], list[int]]:
    """(log-likelihoods, tokens, bytes) of the project's own texts, which all must fit."""
    pairs = text_pairs(config, rows)
    sums, tokens = zip(*(journal.found["scores"][i] for i in range(len(pairs))), strict=True)
    if None in sums:
        raise UserError(
            f"{sums.count(None)} of {len(sums)} domain texts do not fit the bundle's KV cache. "
            "Lower evaluate.max_text_tokens and evaluate.context_words, for all models alike."
        )
    return list(sums), list(tokens), [len(target.encode()) for _, target in pairs]


def given_answers(rows: dict[str, list[dict[str, Any]]], journal: Journal) -> list[dict[str, Any]]:
    """Every answer with its verdict; of questions also ROUGE and whether it is a circle."""
    answers = []
    for index, (name, row) in enumerate(requests(rows)):
        given = journal.found["answers"][index]
        verdict = refusals.judge(given["text"])
        judged = journal.found["judged"].get(index)
        before: dict[str, Any] = {key: row[key] for key in ("history", "system") if key in row}
        answers.append(
            {
                **({"llm_verdict": judged["verdict"]} if judged else {}),
                "set": name,
                "kind": row.get("kind"),
                "area": row.get("area"),
                "prompt": row["prompt"],
                **before,
                "answer": given["text"],
                "tokens": given["tokens"],
                "stopped": given["stopped"],
                "refused": verdict == "refused",
                "verdict": verdict,
                "repeats": metrics.repeats_itself(given["text"]),
                "reference": row.get("completion") or row.get("chosen"),
            }
        )
    kinds = {**dict.fromkeys(TIERS, "questions"), **sets.kinds(rows)}
    asked = [a for a in answers if kinds.get(a["set"]) == "questions"]
    overlap = metrics.rouge([a["answer"] for a in asked], [a["reference"] for a in asked])
    for place, answer in enumerate(asked):
        answer["circle"] = metrics.is_circle(answer["prompt"], answer["answer"])
        answer |= {kind: values[place] for kind, values in overlap.items()}
    rubrics.add_scores(answers, rows, journal)
    return answers


def set_numbers(
    kind: str, file: str, answers: list[dict[str, Any]], scores: list[tuple[float | None, int]]
) -> dict[str, Any]:
    """The numbers of one outside set, with their counts and intervals, as `summarise` gives them.

    Rows that a bundle's KV cache is too small for have no score: `n` counts the others.
    """
    import numpy as np

    numbers: dict[str, tuple[float, int, metrics.Interval | None]] = {}
    if fitting := [(total, tokens) for total, tokens in scores if total is not None]:
        sums, tokens = zip(*fitting, strict=True)
        interval = metrics.ratio_interval(sums, tokens, lambda mean: np.exp(-mean))
        numbers["perplexity"] = metrics.perplexity(sum(sums), sum(tokens)), len(sums), interval
    rates = {"questions_stopped": "stopped", "questions_refused": "refused"}
    rates |= {"circles": "circle", "repeated": "repeats"}
    if kind == "questions":
        numbers |= answer_overlap(answers, "")
    elif kind == "rubrics":
        numbers |= rubrics.numbers(answers)
        rates = {"stopped": "stopped", "repeated": "repeats"}
    elif kind != "texts":
        rates = {"refused": "refused", "stopped": "stopped"}
    for name, key in rates.items() if answers else ():
        hits = sum(a[key] for a in answers)
        numbers[name] = hits / len(answers), len(answers), metrics.wilson(hits, len(answers))
    return {
        "kind": kind,
        "file": file,
        **{name: value for name, (value, _, _) in numbers.items()},
        "n": {name: count for name, (_, count, _) in numbers.items()},
        "intervals": {name: interval for name, (_, _, interval) in numbers.items()},
        **({"verdicts": verdicts(answers)} if "refused" in numbers else {}),
    }


def guide_area(area: str | None) -> str:
    """The one of the guide's five areas that an area of harm belongs to, or OTHER."""
    for name, areas in held_out.GUIDE_AREAS.items():
        if area in areas:
            return name
    return held_out.OTHER_AREA


def answer_overlap(
    answers: list[dict[str, Any]], prefix: str
) -> dict[str, tuple[float, int, metrics.Interval | None]]:
    """Name -> (number, rows, 95 % interval): ROUGE, BLEU and length of answers with references.

    Names begin with `prefix`; nothing without answers.
    """
    if not answers:
        return {}
    predictions = [a["answer"] for a in answers]
    references = [a["reference"] for a in answers]
    words = [metrics.word_count(text) for text in predictions]
    found = {kind: [a[kind] for a in answers] for kind in ("rouge1", "rouge2", "rougeL")}
    means: dict[str, list[float]] = {**found, "questions_words": [float(n) for n in words]}
    numbers: dict[str, tuple[float, metrics.Interval | None]] = {
        kind: (sum(values) / len(values), metrics.mean_interval(values))
        for kind, values in means.items()
    }
    interval = metrics.bleu_interval(predictions, references)
    numbers["bleu"] = metrics.bleu(predictions, references)[0], interval
    return {f"{prefix}{k}": (value, len(answers), own) for k, (value, own) in numbers.items()}


def verdicts(answers: list[dict[str, Any]]) -> dict[str, int]:
    """How many were refused, answered and unclear."""
    return {
        verdict: sum(a["verdict"] == verdict for a in answers)
        for verdict in ("refused", "answered", "unclear")
    }
