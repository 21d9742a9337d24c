"""Proof that a bundle answers like the model it was made from, before anyone ships it.

The chain is merged 16-bit model -> (float32 TFLite) -> quantised bundle in the runtime that phones
have. Each step is measured on the same held-out texts, questions and requests, has a tolerance in
the YAML (`compress.verify`), and is named when it leaves it: a wrong stop token, another
vocabulary, a prompt that differs from training and a damaged layer all look alike from outside.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from liteguard import datasets, metrics
from liteguard.config import Config, VerifySection
from liteguard.errors import UserError, WorkError
from liteguard.export import tokenizer
from liteguard.export.silence import Silence
from liteguard.export.tokenizer import GUARD, PLACEHOLDER_MARK
from liteguard.prompts import Prompt
from liteguard.runtime import Bundle, BundleWorkers

# Characters that stand for bytes in a byte-level vocabulary: space, newline, tab, return.
_RAW_BYTE_CHARACTERS = "\u0120\u010a\u0109\u010d"
_REPLACEMENT = "\ufffd"
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


# Whether a request is refused shows in the first words; what follows only blurs the verdict.
REQUEST_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Samples:
    """Held-out rows that both sides are measured on."""

    pairs: list[tuple[str, str]]  # (context, target) to score
    questions: list[str]
    requests: list[str]  # harmful, ordinary and borderline ones
    texts: list[str]  # for the tokenizers only: many

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one model gives on the samples."""

    likelihoods: list[float]  # natural-log likelihood of each pair's target
    tokens: int  # of all targets
    answers: list[dict[str, Any]]  # text, tokens, stopped; questions, then requests

    @property
    def perplexity(self) -> float:
        return metrics.perplexity(sum(self.likelihoods), self.tokens)


class Table:
    """The checks in order; prints each line as it is known and stops at the first that fails."""

    def __init__(self, bundle: Path, say: Callable[[str], None] = print) -> None:
        self.bundle, self.say = bundle, say
        self.rows: list[dict[str, Any]] = []
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
            raise WorkError(
                f"{self.bundle.name}: step '{step}' left its tolerance: {measured} (allowed: "
                f"{tolerance}){': ' + why if why else ''}.\nThe bundle was not given its name. "
                "Tolerances: compress.verify in the YAML; --verify none leaves the proof out."
            )


def collect_samples(config: Config, data_dir: Path) -> Samples:
    """Held-out texts, questions and requests of prepared data, as `compress.verify` says."""
    from liteguard.evaluation import REQUESTS, split_text
    from liteguard.training import balanced

    section, prompt = config.compress.verify, config.prompt
    documents = [row["text"] for row in datasets.load_split(data_dir, "domain", "test")]
    rows = datasets.load_split(data_dir, "instruction", "test")
    preferences = datasets.load_split(data_dir, "preference", "test")
    words = 1 + section.max_text_tokens // 2
    pairs = [p for text in documents[: section.texts] if (p := split_text(text, 1, words))]
    asked = balanced(rows, "kind", max(section.questions, section.texts))
    for row in asked[: section.texts]:
        target = " ".join(row["completion"].split(" ")[:words])
        pairs.append((prompt.render_question(row["prompt"]), target))
    kinds = [[r["prompt"] for r in preferences if r.get("kind") == kind] for kind in REQUESTS]
    share = -(-section.requests // len(REQUESTS))
    requests = [text for kind in kinds for text in dict.fromkeys(kind[:share])]
    texts = [text for row in rows for text in (row["prompt"], row["completion"])] + documents
    texts += [text for row in preferences for text in (row["prompt"], row["chosen"])]
    texts = list(dict.fromkeys(texts))[: section.tokenizer_texts]
    if not asked or not pairs:
        raise UserError(
            f"{data_dir} has no held-out questions and texts to compare the bundle on; raise "
            "data.test_share and prepare the data again, or pass --verify none."
        )
    return Samples(
        pairs,
        [row["prompt"] for row in asked[: section.questions]],
        requests[: section.requests],
        texts,
    )


def measure_model(
    model_dir: Path, prompt: Prompt, samples: Samples, limit: int, silence: Silence | None = None
) -> Measured:
    """The merged model in Transformers, in float32; with `silence` as a `.task` answers."""
    from liteguard.evaluation import Checkpoint, release_memory

    model = Checkpoint.merged(model_dir, prompt)
    if silence:
        silence.hook(model.model.get_output_embeddings())
    try:
        return _measure(model.score, model.generate, prompt, samples, limit)
    finally:
        del model
        release_memory()


def measure_bundle(bundle: Path, prompt: Prompt, samples: Samples, limit: int) -> Measured:
    """A bundle in LiteRT-LM (texts are scored through its TFLite model: see `Bundle.score`)."""
    workers = BundleWorkers(bundle, workers=1)
    return _measure(workers.score, workers.generate, prompt, samples, limit)


def _measure(score: Any, generate: Any, prompt: Prompt, samples: Samples, limit: int) -> Measured:
    scores = dict(score(samples.pairs))
    answers: list[dict[str, Any]] = []
    for texts, most in ((samples.questions, limit), (samples.requests, REQUEST_TOKENS)):
        given = dict(generate([prompt.render_question(text) for text in texts], most))
        answers += [
            {"text": a.text.strip(), "tokens": a.tokens, "stopped": a.stopped}
            for a in map(given.__getitem__, range(len(texts)))
        ]
    return Measured(
        [scores[i][0] for i in range(len(samples.pairs))],
        sum(count for _, count in scores.values()),
        answers,
    )


def reference(
    model_dir: Path,
    prompt: Prompt,
    samples: Samples,
    limit: int,
    kept: Path,
    silence: Silence | None = None,
) -> Measured:
    """`measure_model`, kept in the file `kept` so that a rerun need not repeat it."""
    silenced = silence and dataclasses.asdict(silence)
    inputs = json.loads(json.dumps([samples.to_dict(), limit, silenced]))
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["inputs"] == inputs:
            return Measured(**found["measured"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    measured = measure_model(model_dir, prompt, samples, limit, silence)
    facts = {"inputs": inputs, "measured": dataclasses.asdict(measured)}
    kept.write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
    return measured


def check_form(
    bundle_path: Path, prompt: Prompt, question: str, table: Table, turn_tokens: int = 48
) -> None:
    """Opens, stops at the right tokens, and renders conversations as training did.

    `turn_tokens`: most tokens of an answer in the conversation of three turns.
    """
    try:
        bundle = Bundle(bundle_path).__enter__()
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
        text, own = prompt.render_question(question), bundle.render_chat(question)
        table.add(
            "prompt",
            "as in training" if bundle.start_id is None else f"starts with {bundle.start_id}",
            "as in training",
            bundle.start_id is None
            and own.replace(GUARD, "") == text
            and bundle.tokenize(own) == bundle.tokenize(text),
            f"the bundle renders {own!r} where training rendered {text!r}",
        )
        turns = _three_turns(bundle, prompt, question, turn_tokens)
        same = sum(chat == raw for chat, raw in turns)
        where = next((f"{c!r} instead of {r!r}" for c, r in turns if c != r), "")
        table.add(
            "conversation", f"{same} of {len(turns)} turns equal", "all", same == len(turns), where
        )
    finally:
        bundle.__exit__(None, None, None)


def _three_turns(
    bundle: Bundle, prompt: Prompt, question: str, limit: int
) -> list[tuple[str, str]]:
    """(answer in the bundle's own conversation, answer to the prompt as training renders it).

    Fewer than three after an answer that the limit cut: the device then goes on without the end
    token that training has there.
    """
    # A .task loses what stands between two turns, and repeats the system text (see bundle.py).
    task = bundle.path.suffix == ".task"
    rendered = prompt.model_copy(update={"turn_separator": ""}) if task else prompt
    asked = [question, "What should I do first?", "\nWhen is it an emergency?"]
    answers = bundle.converse(asked, limit)
    pairs: list[tuple[str, str]] = []
    for turn, text in enumerate(asked):
        history = list(zip(asked[:turn], answers, strict=False))
        alone = bundle.generate(rendered.render_conversation([*history, (text, None)]), limit)
        pairs.append((answers[turn].strip(), alone.text.strip()))
        if not alone.stopped or (task and prompt.system):
            # Cut by different counts: compare what both surely have.
            chat, raw = pairs[-1]
            short = min(len(chat), len(raw)) * 3 // 4
            pairs[-1] = (chat[:short], raw[:short])
            break
    return pairs


def check_tokenizer(
    bundle_path: Path,
    model_dir: Path,
    replaced: dict[str, str],
    samples: Samples,
    table: Table,
    section: VerifySection,
) -> dict[str, Any]:
    """Token ids on the device against the model's own tokenizer, over many texts.

    Characters that the device replaces by plain ones (`tokenizer.PLAIN`) are replaced on both
    sides: preparation does so with training text.
    """
    import tokenizers

    original = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    special = [token.content for token in original.get_added_tokens_decoder().values()]
    texts = [*samples.texts, *special]
    with Bundle(bundle_path) as bundle:
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
    samples: Samples,
    special: Sequence[str],
    tokenize: Callable[[str], list[int]],
    table: Table,
    section: VerifySection,
    *,
    perplexity_change: float,
    label: str = "",
) -> dict[str, Any]:
    """The checks of one step of the chain against the merged model, in order of their causes."""
    lost = [a - b for a, b in zip(merged.likelihoods, measured.likelihoods, strict=True)]
    change = math.exp(sum(lost) / merged.tokens) - 1
    # A few hundred tokens tell a change of a per cent only so well: texts differ in it.
    error = math.sqrt(len(lost)) * statistics.stdev(lost) / merged.tokens if len(lost) > 1 else 0.0
    table.add(
        f"perplexity{label}",
        f"{merged.perplexity * (1 + change):.3f} ({change:+.2%} +- {error:.2%})",
        f"{merged.perplexity:.3f} +- {perplexity_change:.1%} + 2 s.e.",
        math.isfinite(change) and abs(change) <= perplexity_change + 2 * error,
        "the weights are not those of the merged model, or lost too much when they were rounded",
    )
    dirt = next((d for a in measured.answers if (d := _dirt(a["text"], special))), None)
    empty = sum(not a["text"] for a in measured.answers)
    table.add(
        f"clean text{label}",
        dirt or (f"{empty} empty answers" if empty else f"{len(measured.answers)} answers"),
        "no placeholder, none empty",
        dirt is None and not empty,
    )
    count = len(samples.questions)
    pairs = list(zip(measured.answers, merged.answers, strict=True))
    prefixes = [_common(tokenize(a["text"]), tokenize(b["text"])) for a, b in pairs[:count]]
    agree = sum(same >= min(16, size) for same, size in prefixes)
    mean = sum(same for same, _ in prefixes) / max(1, count)
    table.add(
        f"greedy agreement{label}",
        f"{agree} of {count}; mean {mean:.1f} tokens",
        f">= {section.agreement:.0%} on 16 tokens",
        agree >= section.agreement * count,
        "the answers are other ones from the first words on",
    )
    stopped = [
        sum(a["stopped"] for a in side[:count]) for side in (measured.answers, merged.answers)
    ]
    table.add(
        f"stops{label}",
        f"{stopped[0]} of {count} (merged: {stopped[1]})",
        f">= {section.stopped:.0%}",
        stopped[0] >= section.stopped * count,
        "answers do not end by themselves: the end token was not learned, or is never written",
    )
    verdicts = [
        [metrics.judge(a["text"]) == "refused" for a in side[count:]]
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
    return {
        "perplexity": merged.perplexity * (1 + change),
        "perplexity_merged": merged.perplexity,
        "perplexity_change": change,
        "perplexity_change_error": error,
        "tokens": merged.tokens,
        "agree_16": agree / max(1, count),
        "mean_common_prefix": mean,
        "stopped": stopped[0] / max(1, count),
        "stopped_merged": stopped[1] / max(1, count),
        "refused": sum(verdicts[0]) / max(1, len(samples.requests)),
        "refused_merged": sum(verdicts[1]) / max(1, len(samples.requests)),
        "refusal_flips": flips,
        "answers": [
            {"prompt": prompt, **answer, "merged": other["text"]}
            for prompt, (answer, other) in zip(
                samples.questions + samples.requests, pairs, strict=True
            )
        ],
    }


def speed(bundle: Path, prompt: Prompt, question: str, table: Table) -> dict[str, Any]:
    """Tokens/s, time to the first token and peak memory of a process that runs the bundle."""
    workers = BundleWorkers(bundle, workers=1)
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


def _common(one: list[int], other: list[int]) -> tuple[int, int]:
    """(length of the common beginning, length of the longer list)."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return (min(len(one), len(other)) if same is None else same), max(len(one), len(other))


def _dirt(text: str, special: Sequence[str]) -> str | None:
    """What is in an answer that nobody should see, or None."""
    if PLACEHOLDER_MARK in text or GUARD in text:
        return "a placeholder piece (a token that is incomplete UTF-8 was not silenced)"
    if _REPLACEMENT in text:
        return "U+FFFD (bytes that are no valid UTF-8)"
    raw = [char for char in _RAW_BYTE_CHARACTERS if char in text]
    if raw:
        return f"raw byte-level characters {' '.join(raw)} (the tokenizer was not decoded)"
    shown = [token for token in special if token in text]
    if shown:
        return f"special-token text {', '.join(shown)}"
    return None


def verify_bundle(
    bundle: Path,
    model_dir: Path,
    config: Config,
    samples: Samples,
    *,
    replaced: dict[str, str],
    work: Path,
    silence: Silence | None = None,
    float_bundle: Path | None = None,
    also: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Every check of `compress.verify`, in the order in which causes show.

    Args:
        bundle: the quantised bundle.
        model_dir: the merged model that it was made from.
        config: prompt, recipe, tolerances.
        samples: held-out rows (`collect_samples`).
        replaced: characters that the device's tokenizer replaces (`TokenizerReport.replaced`).
        work: where the merged model's answers are kept.
        silence: what a `.task` cannot write; the merged model then does not write it either.
        float_bundle: the same model before quantisation, for level "full".
        also: the second container of the same model; its form is checked, not its weights.
        say: receives the table's lines.

    Returns:
        ``steps`` (the table), ``tokenizer``, ``float`` (full only), ``bundle``, ``speed``.

    Raises:
        WorkError: names the first step that left its tolerance.
    """
    import tokenizers

    section, prompt = config.compress.verify, config.prompt
    table = Table(bundle, say)
    original = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))

    def ids(text: str) -> list[int]:
        return original.encode(text, add_special_tokens=False).ids

    question = samples.questions[0]
    for path in filter(None, (bundle, also)):
        if also:
            say(f"  {path.name}")
        # Three questions and answers must fit the cache.
        check_form(path, prompt, question, table, min(48, config.compress.kv_cache_length // 10))
    result: dict[str, Any] = {"level": section.level}
    # A .litertlm has the original tokenizer.json and replaces nothing.
    plain = replaced if bundle.suffix == ".task" else {}
    result["tokenizer"] = check_tokenizer(bundle, model_dir, plain, samples, table, section)
    limit = section.max_new_tokens
    silence = silence if bundle.suffix == ".task" else None
    merged = reference(model_dir, prompt, samples, limit, work / "merged_answers.json", silence)
    special = [*dict.fromkeys([*prompt.stop_tokens, prompt.pad_token])]
    common = (merged, samples, special, ids, table, section)
    if float_bundle is not None:
        measured = measure_bundle(float_bundle, prompt, samples, limit)
        result["float"] = compare(
            measured, *common, perplexity_change=0.002, label=" of float TFLite"
        )
    measured = measure_bundle(bundle, prompt, samples, limit)
    result["bundle"] = compare(
        measured, *common, perplexity_change=section.perplexity_limit(config.compress.quantize)
    )
    result["speed"] = speed(bundle, prompt, question, table)
    return {**result, "steps": table.rows}
