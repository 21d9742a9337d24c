"""Proof that a bundle answers like the model it was made from, before anyone ships it.

The chain is merged 16-bit model -> (float32 TFLite) -> quantised bundle in the runtime that phones
have. Each step is measured on the same held-out texts, questions and requests, has a tolerance,
most of them in the YAML (`compress.verify`), and is named when it leaves it: a wrong stop token,
another vocabulary, a prompt that differs from training and a damaged layer all look alike from
outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from liteguard import machine
from liteguard.config import Config, VerifySection
from liteguard.errors import WorkError
from liteguard.evaluation import refusals
from liteguard.export import agreement, conditions, drawn, tokenizer, turns
from liteguard.export.measured import (
    Change,
    Measured,
    Reference,
    Samples,
    measure_bundle,
    turn_tokens,
)
from liteguard.export.silence import Silence, dirt, is_made
from liteguard.export.tokenizer import GUARD
from liteguard.prompts import Prompt
from liteguard.runtime.bundle import Bundle
from liteguard.runtime.container import unpacked_weights
from liteguard.runtime.workers import BundleWorkers

# Text that people send and medical texts hold, beside the held-out rows: units, Greek letters,
# arrows, accents, other scripts, emoji, tabs and runs of newlines.
PROBES = (
    "37.5 °C, 5 µg and 120/80 mmHg; ≥ 60 ml/min/1.73 m² ± 5 %",
    "β-blockers, α-1 antitrypsin, ΔF508, γ-GT → liver ← bile ↔ gut",
    "Ménière's disease, Sjögren's syndrome, a café-au-lait spot",
    "漢字、かな、한국어, العربية, Русский",
    "🙂 feels well 👍🏽 ❤️",
    "name\tdose\ttimes\nibuprofen\t400 mg\t3",
    "first\n\nsecond\n\n\nthird\n",
    "  two spaces,   three,    four",
)


class TooCoarse(WorkError):
    """The weights are the model's, but rounding them lost too much: a finer recipe may pass."""


class Table:
    """The checks in order; prints each line as it is known and stops at the first that fails."""

    def __init__(self, bundle: Path, say: Callable[[str], None] = print) -> None:
        self.bundle, self.say = bundle, say
        self.rows: list[dict[str, Any]] = []
        self.failure: type[WorkError] = WorkError
        say(f"  {'step':30} {'measured':30} {'tolerance':26}")

    def add(self, step: str, measured: str, tolerance: str, passed: bool, why: str = "") -> None:
        """One line.

        Raises:
            WorkError: it did not pass; `why` says what to look at.
        """
        self.rows.append(
            {"step": step, "measured": measured, "tolerance": tolerance, "passed": passed}
        )
        self.say(f"  {step:30} {measured:30} {tolerance:26} {'ok' if passed else 'FAILED'}")
        if not passed:
            raise self.failure(
                f"{self.bundle.name}: step '{step}' left its tolerance: {measured} (allowed: "
                f"{tolerance}){': ' + why if why else ''}.\nThe bundle was not given its name. "
                "Tolerances: compress.verify in the YAML; --verify none leaves the proof out."
            )


def check_form(
    bundle_path: Path,
    prompt: Prompt,
    samples: Samples,
    table: Table,
    room: int,
    unpacked: Path | None = None,
) -> None:
    """Opens, stops at the right tokens, and renders conversations as training did.

    `room`: tokens of the KV cache. `unpacked`: as for `Bundle`.
    """
    # A question that follows on others cannot begin a conversation.
    plain = [q for q in samples.questions if q not in samples.rendered] or samples.questions[:1]
    question = plain[0]
    try:
        bundle = Bundle(bundle_path, unpacked=unpacked).__enter__()
    except WorkError as error:
        table.add("opens", str(error)[:60], "in LiteRT-LM", False, str(error))
        raise
    try:
        table.add("opens", "yes", "in LiteRT-LM", True)
        wanted = [bundle.tokenize(token) for token in prompt.stop_tokens]
        table.add(
            "stop tokens",
            str(sorted(bundle.stop_ids)),
            str(sorted(ids[0] if len(ids) == 1 else -1 for ids in wanted)),
            sorted([one] for one in bundle.stop_ids) == sorted(wanted),
            f"the prompt's stop tokens {prompt.stop_tokens} are {wanted} on the device",
        )
        # What the runtime puts before everything is no part of what its template renders.
        text = prompt.render_question(question).removeprefix(prompt.bos_token)
        own, start = bundle.render_chat(question), bundle.start_id
        begins = start == (bundle.tokenize(prompt.bos_token)[-1] if prompt.bos_token else None)
        table.add(
            "prompt",
            "as in training" if begins else f"starts with {start}",
            "as in training",
            begins
            and own.replace(GUARD, "") == text
            and bundle.tokenize(own) == bundle.tokenize(text),
            f"the bundle renders {own!r} where training rendered {text!r}",
        )
        given = plain, turn_tokens(room), samples.limit, room
        table.add(*turns.conversation(bundle, prompt, *given))
        for row in conditions.messages(bundle, prompt, question):
            table.add(*row)
    finally:
        bundle.__exit__(None, None, None)


def check_tokenizer(
    bundle_path: Path,
    model_dir: Path,
    replaced: dict[str, str],
    samples: Samples,
    table: Table,
    section: VerifySection,
    unpacked: Path | None = None,
) -> dict[str, Any]:
    """Token ids on the device against the model's own tokenizer, over many texts.

    Characters that the device replaces by plain ones (`tokenizer.PLAIN`) are replaced on both
    sides: preparation does so with training text.
    """
    import tokenizers

    original = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    special = [token.content for token in original.get_added_tokens_decoder().values()]
    texts = [*samples.texts, *special]
    with Bundle(bundle_path, unpacked=unpacked) as bundle:
        result = tokenizer.compare_ids(
            original,
            bundle.tokenize_all([tokenizer.plain_text(text, replaced) for text in texts]),
            [tokenizer.plain_text(text, replaced) for text in texts],
        )
        lost = [
            probe
            for probe in PROBES
            if bundle.detokenize(bundle.tokenize(probe)) != tokenizer.plain_text(probe, replaced)
        ]
    first = result["examples"][0] if result["examples"] else {}
    table.add(
        "tokenizer",
        f"{result['identical']:.3%} of {len(texts)} texts",
        f">= {section.identical_ids:.2%} same ids",
        result["identical"] >= section.identical_ids,
        f"causes {result['causes']}; e.g. {first}",
    )
    table.add(
        "text survives",
        f"{len(PROBES) - len(lost)} of {len(PROBES)} probes",
        "all",
        not lost,
        f"not the same after encoding and decoding: {lost[:1]}",
    )
    return result


def compare(
    measured: Measured,
    merged: Measured,
    change: Change,
    samples: Samples,
    special: Sequence[str],
    tokenize: Callable[[str], list[int]],
    behind: agreement.Behind,
    table: Table,
    section: VerifySection,
    *,
    tolerance: float,
    label: str = "",
) -> dict[str, Any]:
    """The checks of one step of the chain against the merged model, in order of their causes."""
    table.add(
        f"perplexity{label}",
        f"{merged.perplexity * (1 + change.change):.3f} ({change.change:+.2%} +- "
        f"{change.error:.2%})",
        f"{merged.perplexity:.3f} +- {tolerance:.1%}, with 2 s.e. {change.farthest(tolerance):.1%}",
        change.passes(tolerance),
        _why_not(change, tolerance),
    )
    stain = next((d for a in measured.answers if (d := dirt(a["text"], special))), None)
    empty = sum(
        not a["text"] and bool(b["text"])
        for a, b in zip(measured.answers, merged.answers, strict=True)
    )
    table.add(
        f"clean text{label}",
        stain or (f"{empty} empty answers" if empty else f"{len(measured.answers)} answers"),
        "no placeholder, none empty",
        stain is None and not empty,
    )
    count = len(samples.questions)
    pairs = list(zip(measured.answers, merged.answers, strict=True))
    found = agreement.measure(pairs[:count], tokenize, behind)
    table.add(
        f"greedy agreement{label}",
        found.text(count),
        f">= {section.agreement:.0%} equal or as good",
        found.agree >= section.agreement * count,
        "the answers are other ones from the first words on, and the bundle does not think them as "
        "good",
    )
    stops = check_stops(pairs[:count], samples.limit, table, section, label)
    verdicts = [
        [refusals.judge(a["text"]) == "refused" for a in side[count:]]
        for side in (measured.answers, merged.answers)
    ]
    flips = sum(a != b for a, b in zip(*verdicts, strict=True))
    net = abs(sum(verdicts[0]) - sum(verdicts[1]))
    allowed = max(1, round(section.refusal_change * len(samples.requests)))
    table.add(
        f"refusals{label}",
        f"{sum(verdicts[0])} of {len(samples.requests)} (merged: {sum(verdicts[1])})",
        f"+- {allowed}",
        net <= allowed,
        f"{flips} verdicts changed",
    )
    drawn_of = measured.drawn, merged.drawn
    for row in drawn.rows(*drawn_of, lambda text: dirt(text, special), is_made, label):
        table.add(*row)
    return {
        "perplexity": merged.perplexity * (1 + change.change),
        "perplexity_merged": merged.perplexity,
        "perplexity_change": change.change,
        "perplexity_change_error": change.error,
        "pairs": change.pairs,
        "tokens": change.tokens,
        "agree": found.agree / max(1, count),
        "agree_16": found.equal / max(1, count),
        "mean_common_prefix": found.mean,
        "parted_nats": found.worst,
        **stops,
        "refused": sum(verdicts[0]) / max(1, len(samples.requests)),
        "refused_merged": sum(verdicts[1]) / max(1, len(samples.requests)),
        "refusal_flips": flips,
        "drawn": len(measured.drawn),
        "drawn_refused": drawn.refused(measured.drawn),
        "drawn_refused_merged": drawn.refused(merged.drawn),
        "answers": [
            {"prompt": prompt, **answer, "merged": other["text"]}
            for prompt, (answer, other) in zip(
                samples.questions + samples.requests, pairs, strict=True
            )
        ],
    }


def _why_not(change: Change, tolerance: float) -> str:
    if abs(change.change) <= tolerance:
        return (
            f"the {change.pairs} texts that there are do not tell more exactly; prepare more data, "
            "or allow more with --set compress.verify.perplexity_change=..."
        )
    return "the weights are not those of the merged model, or lost too much when they were rounded"


def check_stops(
    pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    limit: int,
    table: Table,
    section: VerifySection,
    label: str,
) -> dict[str, Any]:
    """Answers that the merged model ends by itself must end in the bundle too.

    One more is always allowed to go on. How many the merged model ends is no matter of the
    conversion, so it is said and not judged.

    Args:
        pairs: (the bundle's, the merged model's) answer to each question.
        limit: most tokens that the merged model was given.
    """
    ended = [mine["stopped"] for mine, other in pairs if other["stopped"]]
    needed = min(math.ceil(section.stopped * len(ended)), len(ended) - 1)
    table.add(
        f"stops{label}",
        f"{sum(ended)} of {len(ended)} that merged ends",
        f">= {max(needed, 0)} ({section.stopped:.0%}, or all but one)",
        sum(ended) >= needed,
        "the bundle goes on where the model ends: it never writes the end token",
    )
    if len(ended) < len(pairs) / 2 and not label:
        table.say(
            f"    note: the merged model itself ends {len(ended)} of {len(pairs)} answers within "
            f"{limit} tokens. A model that was trained to the end ends most of them."
        )
    return {"stopped": sum(ended), "stopped_merged": len(ended), "answer_limit": limit}


def speed(workers: BundleWorkers, prompt: Prompt, question: str, table: Table) -> dict[str, Any]:
    """Tokens/s, time to the first token and peak memory of a process that runs the bundle."""
    best = workers.benchmark(prompt.render_question(question))
    table.add(
        "speed",
        f"{best['decode_tok_s']:.1f} tokens/s",
        "measured only",
        True,
    )
    table.say(
        f"    prefill {best['prefill_tok_s']:.0f} tokens/s, first token after "
        f"{best['first_token_s']:.2f} s ({best['prefill_tokens']:.0f} tokens), peak memory "
        f"{workers.peak_rss_gb:.2f} GB, {workers.threads} threads"
    )
    return {**best, "peak_rss_gb": workers.peak_rss_gb, "threads": workers.threads}


def verify_bundle(
    bundle: Path,
    model_dir: Path,
    config: Config,
    samples: Samples,
    *,
    replaced: dict[str, str],
    work: Path,
    recipe: str,
    silence: Silence | None = None,
    float_bundle: Path | None = None,
    also: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Every check of `compress.verify`, in the order in which causes show.

    Args:
        bundle: the quantised bundle.
        model_dir: the merged model that it was made from.
        config: prompt, tolerances.
        samples: rows to compare on (`measured.collect_samples`).
        replaced: characters that the device's tokenizer replaces (`TokenizerReport.replaced`).
        work: where the merged model's answers are kept.
        recipe: how the bundle's weights were quantised; it decides the tolerance.
        silence: what a `.task` cannot write; the merged model then does not write it either.
        float_bundle: the same model before quantisation, for level "full".
        also: the second container of the same model; its form is checked, not its weights.
        say: receives the table's lines.

    Returns:
        ``steps`` (the table), ``tokenizer``, ``float`` (full only), ``bundle``, ``speed``,
        ``runtime_cache_bytes`` (what the runtime wrote beside the bundle to open it).

    Raises:
        WorkError: names the first step that left its tolerance; TooCoarse where a finer recipe
            may pass it.
    """
    import tokenizers

    section, prompt = config.compress.verify, config.prompt
    table = Table(bundle, say)
    original = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))

    def ids(text: str) -> list[int]:
        return original.encode(text, add_special_tokens=False).ids

    room = config.compress.kv_cache_length
    if also:
        say(f"  {also.name}")
        check_form(also, prompt, samples, table, room)
        if also.suffix == ".task":  # its tokenizer was made; a .litertlm has the original one
            check_tokenizer(also, model_dir, replaced, samples, table, section)
        say(f"  {bundle.name}")
    silence = silence if bundle.suffix == ".task" else None
    kept = work / ("merged_model_silenced.jsonl" if silence else "merged_model.jsonl")
    reference = Reference(model_dir, prompt, samples, kept, silence)
    special = [*dict.fromkeys([*prompt.stop_tokens, prompt.pad_token])]
    result: dict[str, Any] = {"level": section.level}

    def measure(path: Path, unpacked: Path, tolerance: float, label: str = "") -> dict[str, Any]:
        workers = BundleWorkers(path, workers=1, unpacked=unpacked)
        kept = work / f"{path.name}.{recipe}.jsonl"
        found = measure_bundle(workers, reference, section, tolerance, kept)
        stops = [ids(token)[0] for token in prompt.stop_tokens]

        def behind(parted: list[tuple[int, list[int], int | None]]) -> list[float]:
            return workers.behind(
                [
                    (
                        ids(samples.render(prompt, number)) + begun,
                        stops if token is None else [token],
                    )
                    for number, begun, token in parted
                ]
            )

        return compare(
            *found, samples, special, ids, behind, table, section, tolerance=tolerance, label=label
        )

    with unpacked_weights(bundle) as unpacked:
        check_form(bundle, prompt, samples, table, room, unpacked)
        # A .litertlm has the original tokenizer.json and replaces nothing.
        plain = replaced if bundle.suffix == ".task" else {}
        result["runtime_cache_bytes"] = sum(
            path.stat().st_size for path in unpacked.rglob("*") if path.is_file()
        )
        result["tokenizer"] = check_tokenizer(
            bundle, model_dir, plain, samples, table, section, unpacked
        )
        given = config.compress.ladder, room, " ".join(samples.texts)[: 8 * room], unpacked
        for row in machine.in_child("conditions", conditions.measure, bundle, prompt, *given):
            table.add(*row)
        if float_bundle is not None:
            with unpacked_weights(float_bundle) as folder:
                result["float"] = measure(float_bundle, folder, 0.002, " of float TFLite")
        table.failure = TooCoarse
        result["bundle"] = measure(bundle, unpacked, section.perplexity_limit(recipe))
        workers = BundleWorkers(bundle, workers=1, unpacked=unpacked)
        result["speed"] = speed(workers, prompt, samples.questions[0], table)
    return {**result, "steps": table.rows}


def closing(facts: dict[str, Any]) -> str:
    """How good a bundle is, in a line, from the facts of its conversion."""
    recipe = facts["quantize"]["recipe"]
    found = facts.get("verify")
    if found is None:
        return f"{recipe} weights, not proven (--verify none)"
    same = found["bundle"]
    agree = same.get("agree", same["agree_16"])  # of a bundle from before near ties were looked at
    return (
        f"{recipe} weights, proven against the merged model: perplexity "
        f"{same['perplexity_change']:+.1%}, {agree:.0%} of answers begin as well; "
        f"{found['speed']['decode_tok_s']:.0f} tok/s on this machine"
    )
