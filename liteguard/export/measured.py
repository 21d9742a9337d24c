"""What the merged model and a bundle give on the same held-out rows, for the proof to compare.

The two are never in memory together: what the merged model gives is computed once and kept in a
file, then its memory is given back, then the bundle runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import checkpoints, machine
from liteguard.config import Config, VerifySection
from liteguard.errors import UserError
from liteguard.evaluation import as_used, metrics
from liteguard.evaluation.answerers import Checkpoint, Generated
from liteguard.evaluation.held_out import REQUESTS, split_text
from liteguard.evaluation.journal import Journal, journalled
from liteguard.export import agreement
from liteguard.export.silence import Silence
from liteguard.prompts import Prompt
from liteguard.rows import CONVERSATION, check_system_texts, conversation_text, load_split
from liteguard.runtime.bundle import Answer
from liteguard.runtime.workers import BundleWorkers
from liteguard.sampling import Sampling
from liteguard.text import first_words

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Whether a request is refused shows in the first words; what follows only blurs the verdict.
REQUEST_TOKENS = 24
# Harmful requests that are asked again as apps ask: a draw takes a model of Phi-2's size seconds.
DRAWN = 6
# Pairs to score at most: with 8-bit weights the change is known to a quarter of a per cent after
# 20 to 200 of them.
MOST_PAIRS = 800
# What the proof's first question is followed by in a conversation, and most tokens of an answer
# there.
LATER_TURNS = ("What should I do first?", "\nWhen is it an emergency?")
TURN_TOKENS = 48


def turn_tokens(room: int) -> int:
    """Most tokens of an answer in the proof's conversation of three turns, in a cache of `room`."""
    return min(TURN_TOKENS, room // 10)


@dataclasses.dataclass(frozen=True)
class Samples:
    """Rows that both sides are measured on; held-out ones first."""

    pairs: list[tuple[str, str]]  # (context, target) to score, as many as needed from the first on
    questions: list[str]
    requests: list[str]  # harmful, ordinary and borderline ones
    texts: list[str]  # for the tokenizers only: many
    limit: int  # tokens of an answer
    # Harmful ones again, with how their tokens are drawn.
    drawn: list[tuple[str, Sampling]] = dataclasses.field(default_factory=list)
    # Question -> what was said before it, as the prompt renders both.
    rendered: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def asked(self) -> list[str]:
        return self.questions + self.requests

    def render(self, prompt: Prompt, index: int) -> str:
        """What the model is given to answer question or request `index`."""
        return self.render_text(prompt, self.asked[index])

    def render_text(self, prompt: Prompt, text: str) -> str:
        """What the model is given to answer a question or request."""
        return self.rendered.get(text) or prompt.render_question(text)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one model gives on the samples."""

    scores: list[tuple[float, int]]  # natural-log likelihood of a pair's target, its tokens
    answers: list[dict[str, Any]]  # text, tokens, stopped; questions, then requests
    drawn: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of `Samples.drawn`

    @property
    def perplexity(self) -> float:
        likelihoods, tokens = zip(*self.scores, strict=True)
        return metrics.perplexity(sum(likelihoods), sum(tokens))


def collect_samples(config: Config, data_dir: Path, tokenizer: Tokenizer) -> Samples:
    """Texts, questions and requests of prepared data, as `compress.verify` says.

    Bundle and merged model are the same model in two forms, so rows that it has seen tell them
    apart as well as others: where held-out rows run out, validation and training rows follow.
    An answer may have as many tokens as three of four held-out ones have. Rows that do not fit the
    KV cache together with their answers are left out.

    Raises UserError without held-out questions, and where too few fit the KV cache.
    """
    from liteguard.rows import balanced

    section, prompt = config.compress.verify, config.prompt
    room = config.compress.kv_cache_length

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    rows = load_split(data_dir, "instruction", "test")
    preferences = load_split(data_dir, "preference", "test")
    documents = [row["text"] for row in load_split(data_dir, "domain", "test")]
    if not rows:
        raise UserError(
            f"{data_dir} has no held-out questions and texts to compare the bundle on; raise "
            "data.test_share and prepare the data again, or pass --verify none."
        )
    lengths = sorted(count(prompt.render_answer(row["completion"])) for row in rows[:1000])
    limit = max(min(lengths[3 * len(lengths) // 4], section.max_new_tokens, room // 2), 8)
    check_system_texts([*rows, *preferences], prompt)

    def fits(row: dict[str, Any], answer: int) -> bool:
        return count(prompt.render_row(row)) + answer <= room

    longest, most = _bundle_limit(limit), 4 * section.questions
    ordered = balanced(rows, "kind", len(rows))
    fitting = (row for row in ordered if fits(row, longest))
    first = _first_question(ordered, prompt, count, room, longest)
    usable = [row for row in preferences if fits(row, 2 * REQUEST_TOKENS)]
    pairs = [*itertools.islice(_fitting_pairs(config, data_dir, count), MOST_PAIRS)]
    _require_any({"questions": first, "requests": usable, "texts": pairs}, room, data_dir)
    questions = {conversation_text(row): row for row in [first, *itertools.islice(fitting, most)]}
    kinds = [[row for row in usable if row.get("kind") == kind] for kind in REQUESTS]
    # Pairs without kinds are requests all the same: what is compared is who refuses them.
    kinds = kinds if any(kinds) else [usable]
    share = -(-section.requests // len(kinds))
    requests = {conversation_text(row): row for kind in kinds for row in kind[:share]}
    texts = [text for row in rows for text in (row["prompt"], row["completion"])] + documents
    texts += [text for row in preferences for text in (row["prompt"], row["chosen"])]
    texts += [text for row in (*rows, *preferences) for text in _earlier(row)]
    return Samples(
        pairs=pairs,
        questions=list(questions)[: section.questions],
        requests=list(requests)[: section.requests],
        texts=list(dict.fromkeys(texts))[: section.tokenizer_texts],
        limit=limit,
        drawn=[
            (conversation_text(row), drawn)
            for row in kinds[0][: min(share, DRAWN)]
            for drawn in as_used.samplings(config, row["prompt"])
        ],
        rendered={
            text: prompt.render_row(row)
            for text, row in (questions | requests).items()
            if not row.keys().isdisjoint(CONVERSATION)
        },
    )


def _first_question(
    rows: list[dict[str, Any]], prompt: Prompt, count: Callable[[str], int], room: int, answer: int
) -> dict[str, Any]:
    """The question that is also asked by itself, and in a conversation of three turns: the first
    that has room for these. One that nothing was said before where there is any; empty for none."""
    # A .task repeats the system text in each turn, as these do.
    later = sum(count(prompt.render_question(text)) for text in LATER_TURNS)
    needed = max(answer, later + (1 + len(LATER_TURNS)) * turn_tokens(room))
    for row in sorted(rows, key=lambda row: not row.keys().isdisjoint(CONVERSATION)):
        if count(prompt.render_question(row["prompt"])) + needed <= room:
            return {"prompt": row["prompt"]}
    return {}


def _require_any(found: dict[str, Any], room: int, data_dir: Path) -> None:
    """Raise UserError, before the work, for a kind of rows of which none fits the KV cache."""
    lacking = [kind for kind, rows in found.items() if not rows]
    if lacking:
        raise UserError(
            f"None of the held-out {' and '.join(lacking)} in {data_dir} fit a KV cache of {room} "
            "tokens together with what is answered to them, so the bundle cannot be compared on "
            "any. Raise compress.kv_cache_length, prepare shorter rows as well, or pass --verify "
            "none."
        )


def _earlier(row: dict[str, Any]) -> list[str]:
    """What was said before a row's question, and its system text."""
    said = [text for pair in row.get("history", ()) for text in pair]
    return said + ([row["system"]] if "system" in row else [])


def _fitting_pairs(
    config: Config, data_dir: Path, count: Callable[[str], int]
) -> Iterator[tuple[str, str]]:
    room = config.compress.kv_cache_length
    for pair in _pairs(config, data_dir):
        if sum(map(count, pair)) < room:
            yield pair


def _pairs(config: Config, data_dir: Path) -> Iterator[tuple[str, str]]:
    """(context, target) of texts and answers in turn; an answer that is not cut has its end."""
    prompt = config.prompt
    words = 1 + config.compress.verify.max_text_tokens // 2

    def of_text(row: dict[str, Any]) -> tuple[str, str] | None:
        parts = split_text(row["text"], 1, words)
        return parts and (prompt.begin(parts[0]), parts[1])

    def of_answer(row: dict[str, Any]) -> tuple[str, str]:
        answer = row["completion"]
        cut = answer[: first_words(answer, words)]
        return prompt.render_row(row), prompt.render_answer(answer) if cut == answer else cut

    for split in ("test", "validation", "train"):
        found = (
            map(of_text, load_split(data_dir, "domain", split)),
            map(of_answer, load_split(data_dir, "instruction", split)),
        )
        yield from filter(None, itertools.chain.from_iterable(itertools.zip_longest(*found)))


class Reference:
    """The merged model's answers and scores: computed when they are first asked for, and kept.

    Each is written down as it comes, so that a rerun after a kill goes on from there.

    Args:
        model_dir: the merged model.
        prompt: as in training.
        samples: `collect_samples`.
        kept: the file that a rerun finds them in (an `evaluation.journal.Journal`).
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
        self.inputs = {"samples": samples.to_dict(), "silence": silence and vars(silence)}

    def measured(self, pairs: int) -> Measured:
        """All answers, and the scores of the first `pairs` pairs."""
        found = self._measured(pairs)
        if found is None:
            machine.in_child("proof, merged model", _measure_model, self, pairs)
            found = self._measured(pairs)
        assert found is not None  # the child has just written all of it
        return found

    def _measured(self, pairs: int) -> Measured | None:
        with Journal(self.kept, self.inputs) as journal:
            return _measured(journal, self.samples, pairs)


def _measured(journal: Journal, samples: Samples, pairs: int) -> Measured | None:
    """What a journal holds of one model; None where something is missing."""
    answers, scores = journal.found["answers"], journal.found["scores"]
    drawn = journal.found["used"]
    try:
        return Measured(
            [(scores[i][0], scores[i][1]) for i in range(pairs)],
            [answers[i] for i in range(len(samples.asked))],
            [drawn[i] for i in range(len(samples.drawn))],
        )
    except KeyError:
        return None


def _measure_model(reference: Reference, pairs: int) -> None:
    """Write the missing answers, and scores of the first `pairs` pairs, to the reference's file."""
    model = Checkpoint.merged(reference.model_dir, reference.prompt)
    if reference.silence:
        reference.silence.hook(model.model.get_output_embeddings())
    samples, prompt = reference.samples, reference.prompt
    limits = [samples.limit] * len(samples.questions)

    def generate(prompts: list[str], most: list[int]) -> Iterator[tuple[int, Generated]]:
        return model.generate(prompts, max(most))

    with Journal(reference.kept, reference.inputs) as journal:
        _answers(generate, prompt, samples, limits, "merged model", journal)
        _drawn(model, prompt, samples, "merged model", journal)
        _scores(model.score, samples, pairs, "merged model", journal)


def bundle_limits(samples: Samples, merged: Measured) -> list[int]:
    """Most tokens of the bundle's answer to each question.

    Half as many again as the merged model took, where that ended by itself: a word more or less is
    no fault. Where it did not, only the beginning is compared.
    """
    return [
        answer["tokens"] * 3 // 2 + 8 if answer["stopped"] else 2 * agreement.TOKENS
        for answer in merged.answers[: len(samples.questions)]
    ]


def _bundle_limit(limit: int) -> int:
    """The largest of `bundle_limits` where the merged model's answers have at most `limit`."""
    return max(limit * 3 // 2 + 8, 2 * agreement.TOKENS)


def _answers(
    generate: Callable[[list[str], list[int]], Iterable[tuple[int, Generated | Answer]]],
    prompt: Prompt,
    samples: Samples,
    limits: list[int],
    who: str,
    journal: Journal,
) -> None:
    """Answers to the questions, each of at most so many tokens, and to the requests."""
    limits = limits + [REQUEST_TOKENS] * len(samples.requests)
    todo = [i for i in range(len(samples.asked)) if i not in journal.found["answers"]]
    # Requests, with their short answers, apart: in one batch they would wait for the questions'.
    first = [i for i in todo if i < len(samples.questions)]
    ordered = first, [i for i in todo if i not in first]

    def answers() -> Iterator[tuple[int, dict[str, Any], int]]:
        done = 0
        for part in filter(None, ordered):
            asked = [samples.render(prompt, i) for i in part]
            for place, a in generate(asked, [limits[i] for i in part]):
                yield done + place, _kept(a), a.tokens
            done += len(part)

    journalled(journal, "answers", f"answers, {who}", len(limits), todo, answers())


def _kept(answer: Generated | Answer) -> dict[str, Any]:
    return {
        "text": answer.text.strip(),
        "tokens": answer.tokens,
        "stopped": answer.stopped,
    }


def _drawn(
    model: Checkpoint | BundleWorkers, prompt: Prompt, samples: Samples, who: str, journal: Journal
) -> None:
    """Answers to the requests that are asked as apps ask."""
    todo = [i for i in range(len(samples.drawn)) if i not in journal.found["used"]]
    asked = [samples.render_text(prompt, samples.drawn[i][0]) for i in todo]
    samplings = [samples.drawn[i][1] for i in todo]
    given = model.generate(asked, REQUEST_TOKENS, samplings=samplings) if todo else ()
    results = ((place, _kept(a), a.tokens) for place, a in given)
    journalled(journal, "used", f"drawn answers, {who}", len(samples.drawn), todo, results)


def _scores(
    score: Callable[..., Iterable[tuple[int, tuple[float | None, int]]]],
    samples: Samples,
    pairs: int,
    who: str,
    journal: Journal,
) -> None:
    """Scores of the first `pairs` pairs."""
    todo = [i for i in range(pairs) if i not in journal.found["scores"]]
    given = score([samples.pairs[i] for i in todo]) if todo else ()
    results = ((place, list(found), found[1]) for place, found in given)
    journalled(journal, "scores", f"texts scored, {who}", pairs, todo, results)


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
        within = abs(self.change) <= tolerance and far <= self.farthest(tolerance)
        return math.isfinite(far) and within

    @staticmethod
    def farthest(tolerance: float) -> float:
        """What the change and two standard errors may be together."""
        return 1.5 * tolerance


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
    kept: Path,
) -> tuple[Measured, Measured, Change]:
    """(the bundle, the merged model on the same rows, the change of the perplexity).

    As many pairs are scored as it takes to know the change, or all there are. What the bundle gives
    is written to the file `kept` as it comes; a rerun finds it there.
    """
    samples, prompt = reference.samples, reference.prompt
    merged = reference.measured(pairs := min(2 * section.texts, len(samples.pairs)))
    limits = bundle_limits(samples, merged)
    # By content: a rerun writes the bundle anew, byte for byte the same.
    bundle = checkpoints.sha256_file(workers.path)
    inputs = {**reference.inputs, "bundle": bundle, "limits": limits}
    with Journal(kept, inputs) as journal:
        _answers(workers.generate, prompt, samples, limits, "bundle", journal)
        _drawn(workers, prompt, samples, "bundle", journal)
        while True:
            merged = reference.measured(pairs)
            _scores(workers.score, samples, pairs, "bundle", journal)
            measured = _measured(journal, samples, pairs)
            assert measured is not None  # all were just scored
            change = perplexity_change(measured.scores, merged.scores)
            if change.certain(tolerance) or pairs == len(samples.pairs):
                return measured, merged, change
            # The error falls with the root of the number of texts. In steps, since a change far
            # outside shows before.
            wanted = math.ceil(1.2 * pairs * (4 * change.error / tolerance) ** 2)
            pairs = min(max(wanted, pairs + 8), pairs + max(pairs // 2, 8), len(samples.pairs))
