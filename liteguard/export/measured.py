"""What the merged model and a bundle give on the same held-out rows, for the proof to compare.

The two are never in memory together: what the merged model gives is computed once and kept in a
file, then its memory is given back, then the bundle runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import checkpoints, datasets, machine, metrics
from liteguard.config import Config, VerifySection
from liteguard.errors import UserError
from liteguard.export.silence import Silence
from liteguard.prompts import Prompt
from liteguard.runtime import BundleWorkers

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Whether a request is refused shows in the first words; what follows only blurs the verdict.
REQUEST_TOKENS = 24
# First tokens of an answer that are compared one by one.
AGREEMENT_TOKENS = 16
# Pairs to score at most: with 8-bit weights the change is known to a quarter of a per cent after
# 20 to 200 of them.
MOST_PAIRS = 800


@dataclasses.dataclass(frozen=True)
class Samples:
    """Rows that both sides are measured on; held-out ones first."""

    pairs: list[tuple[str, str]]  # (context, target) to score, as many as needed from the first on
    questions: list[str]
    requests: list[str]  # harmful, ordinary and borderline ones
    texts: list[str]  # for the tokenizers only: many
    limit: int  # tokens of an answer

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one model gives on the samples."""

    scores: list[tuple[float, int]]  # natural-log likelihood of a pair's target, its tokens
    answers: list[dict[str, Any]]  # text, tokens, stopped; questions, then requests

    @property
    def perplexity(self) -> float:
        likelihoods, tokens = zip(*self.scores, strict=True)
        return metrics.perplexity(sum(likelihoods), sum(tokens))


def collect_samples(config: Config, data_dir: Path, tokenizer: Tokenizer) -> Samples:
    """Texts, questions and requests of prepared data, as `compress.verify` says.

    Bundle and merged model are the same model in two forms, so rows that it has seen tell them
    apart as well as others: where held-out rows run out, validation and training rows follow.
    An answer may have as many tokens as three of four held-out ones have.

    Raises UserError without held-out questions.
    """
    from liteguard.evaluation import REQUESTS
    from liteguard.training import balanced

    section, prompt = config.compress.verify, config.prompt
    room = config.compress.kv_cache_length

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    rows = datasets.load_split(data_dir, "instruction", "test")
    preferences = datasets.load_split(data_dir, "preference", "test")
    documents = [row["text"] for row in datasets.load_split(data_dir, "domain", "test")]
    if not rows:
        raise UserError(
            f"{data_dir} has no held-out questions and texts to compare the bundle on; raise "
            "data.test_share and prepare the data again, or pass --verify none."
        )
    lengths = sorted(count(prompt.render_answer(row["completion"])) for row in rows[:1000])
    limit = min(lengths[3 * len(lengths) // 4], section.max_new_tokens, room // 2)
    # The prompt, the answer and half as much again must fit the cache.
    asked = [
        row["prompt"]
        for row in balanced(rows, "kind", 4 * section.questions)
        if count(prompt.render_question(row["prompt"])) + 2 * limit <= room
    ]
    kinds = [[r["prompt"] for r in preferences if r.get("kind") == kind] for kind in REQUESTS]
    share = -(-section.requests // len(REQUESTS))
    requests = [text for kind in kinds for text in dict.fromkeys(kind[:share])]
    texts = [text for row in rows for text in (row["prompt"], row["completion"])] + documents
    texts += [text for row in preferences for text in (row["prompt"], row["chosen"])]
    return Samples(
        pairs=[
            pair
            for pair in itertools.islice(_pairs(config, data_dir), MOST_PAIRS)
            if count(pair[0]) + count(pair[1]) < room
        ],
        questions=(asked or [rows[0]["prompt"]])[: section.questions],
        requests=requests[: section.requests],
        texts=list(dict.fromkeys(texts))[: section.tokenizer_texts],
        limit=max(limit, 8),
    )


def _pairs(config: Config, data_dir: Path) -> Iterator[tuple[str, str]]:
    """(context, target) of texts and answers in turn; an answer that is not cut has its end."""
    from liteguard.evaluation import split_text

    prompt = config.prompt
    words = 1 + config.compress.verify.max_text_tokens // 2

    def of_text(row: dict[str, Any]) -> tuple[str, str] | None:
        return split_text(row["text"], 1, words)

    def of_answer(row: dict[str, Any]) -> tuple[str, str]:
        cut = row["completion"].split(" ")[:words]
        whole = " ".join(cut) == row["completion"]
        target = prompt.render_answer(row["completion"]) if whole else " ".join(cut)
        return prompt.render_question(row["prompt"]), target

    for split in ("test", "validation", "train"):
        found = (
            map(of_text, datasets.load_split(data_dir, "domain", split)),
            map(of_answer, datasets.load_split(data_dir, "instruction", split)),
        )
        yield from filter(None, itertools.chain.from_iterable(itertools.zip_longest(*found)))


class Reference:
    """The merged model's answers and scores: computed when they are first asked for, and kept.

    Args:
        model_dir: the merged model.
        prompt: as in training.
        samples: `collect_samples`.
        kept: the file that a rerun finds them in.
        silence: tokens that the bundle cannot write; the merged model then does not either.
    """

    def __init__(
        self,
        model_dir: Path,
        prompt: Prompt,
        samples: Samples,
        kept: Path,
        silence: Silence | None = None,
    ) -> None:
        self.model_dir, self.prompt, self.samples, self.kept = model_dir, prompt, samples, kept
        self.silence = silence
        silenced = silence and dataclasses.asdict(silence)
        self.inputs = json.loads(json.dumps([samples.to_dict(), silenced]))
        self._answers: list[dict[str, Any]] | None = None
        self._scores: list[tuple[float, int]] = []
        try:
            found = json.loads(kept.read_text(encoding="utf-8"))
            if found["inputs"] == self.inputs:
                self._answers = found["answers"]
                self._scores = [(value, tokens) for value, tokens in found["scores"]]
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def measured(self, pairs: int) -> Measured:
        """All answers, and the scores of the first `pairs` pairs."""
        if self._answers is None or len(self._scores) < pairs:
            self._compute(pairs)
        assert self._answers is not None
        return Measured(self._scores[:pairs], self._answers)

    def _compute(self, pairs: int) -> None:
        missing = self.samples.pairs[len(self._scores) : pairs]
        asked = self.samples if self._answers is None else None
        answers, scores = machine.in_child(
            "proof, merged model",
            _measure_model,
            self.model_dir,
            self.prompt,
            asked,
            missing,
            self.silence,
        )
        self._answers = self._answers or answers
        self._scores += scores
        facts = {"inputs": self.inputs, "answers": self._answers, "scores": self._scores}
        checkpoints.write_json(self.kept, facts)


def _measure_model(
    model_dir: Path,
    prompt: Prompt,
    samples: Samples | None,
    pairs: list[tuple[str, str]],
    silence: Silence | None,
) -> tuple[list[dict[str, Any]] | None, list[tuple[float, int]]]:
    """(answers to `samples`, scores of `pairs`) of a merged model, in a process of its own."""
    from liteguard.evaluation import Checkpoint

    model = Checkpoint.merged(model_dir, prompt)
    if silence:
        silence.hook(model.model.get_output_embeddings())
    answers = _answers(model.generate, prompt, samples, samples.limit) if samples else None
    found = dict(model.score(pairs))
    return answers, [found[i] for i in range(len(pairs))]


def bundle_limits(samples: Samples, merged: Measured) -> list[int]:
    """Most tokens of the bundle's answer to each question.

    Half as many again as the merged model took, where that ended by itself: a word more or less is
    no fault. Where it did not, only the beginning is compared.
    """
    return [
        answer["tokens"] * 3 // 2 + 8 if answer["stopped"] else 2 * AGREEMENT_TOKENS
        for answer in merged.answers[: len(samples.questions)]
    ]


def _answers(
    generate: Any, prompt: Prompt, samples: Samples, limits: int | Sequence[int]
) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    for texts, most in ((samples.questions, limits), (samples.requests, REQUEST_TOKENS)):
        given = dict(generate([prompt.render_question(text) for text in texts], most))
        answers += [
            {"text": a.text.strip(), "tokens": a.tokens, "stopped": a.stopped}
            for a in map(given.__getitem__, range(len(texts)))
        ]
    return answers


@dataclasses.dataclass(frozen=True)
class Change:
    """How the perplexity of a bundle differs from the merged model's, as a share of it."""

    change: float
    error: float  # one standard error of `change`, over texts
    pairs: int
    tokens: int

    def certain(self, tolerance: float) -> bool:
        """Whether more text can be spared: known to a quarter of the tolerance, or far outside."""
        far = abs(self.change) > tolerance + 3 * self.error
        return self.error <= tolerance / 4 or far or not math.isfinite(self.change)

    def passes(self, tolerance: float) -> bool:
        """Within the tolerance, and not for lack of text: with a standard error of a quarter of it
        both conditions say the same; with a larger one the second asks for more."""
        far = abs(self.change) + 2 * self.error
        return math.isfinite(far) and abs(self.change) <= tolerance and far <= 1.5 * tolerance


def perplexity_change(
    measured: Sequence[tuple[float, int]], merged: Sequence[tuple[float, int]]
) -> Change:
    """exp(lost log-likelihood a token) - 1, over the pairs that both have scored; NaN where a model
    gave something that is no number."""
    lost = [a - b for (a, _), (b, _) in zip(merged, measured, strict=True)]
    tokens = sum(count for _, count in merged)
    if not all(map(math.isfinite, lost)):
        return Change(math.nan, math.nan, len(lost), tokens)
    error = math.sqrt(len(lost)) * statistics.stdev(lost) / tokens if len(lost) > 1 else math.inf
    return Change(math.expm1(sum(lost) / tokens), error, len(lost), tokens)


def measure_bundle(
    workers: BundleWorkers,
    reference: Reference,
    section: VerifySection,
    tolerance: float,
) -> tuple[Measured, Measured, Change]:
    """(the bundle, the merged model on the same rows, the change of the perplexity).

    As many pairs are scored as it takes to know the change, or all there are.
    """
    samples, prompt = reference.samples, reference.prompt
    merged = reference.measured(pairs := min(2 * section.texts, len(samples.pairs)))
    limits = bundle_limits(samples, merged)
    answers = _answers(workers.generate, prompt, samples, limits)
    scores: list[tuple[float, int]] = []
    while True:
        merged = reference.measured(pairs)
        new = dict(workers.score(samples.pairs[len(scores) : pairs]))
        scores += [new[i] for i in range(len(new))]
        change = perplexity_change(scores, merged.scores)
        if change.certain(tolerance) or pairs == len(samples.pairs):
            return Measured(scores, answers), merged, change
        # The error falls with the root of the number of texts.
        wanted = math.ceil(1.2 * pairs * (4 * change.error / tolerance) ** 2)
        pairs = min(max(wanted, pairs + 8), 4 * pairs, len(samples.pairs))
