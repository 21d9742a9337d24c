"""One measurement of a model on all sets, and what it cost."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from liteguard import machine
from liteguard.config import Config
from liteguard.data import sets
from liteguard.evaluation import as_used, knowledge, llm_judge, rubrics
from liteguard.evaluation.answerers import Answerer, open_answerer
from liteguard.evaluation.held_out import REQUESTS, requests, scored
from liteguard.evaluation.journal import Journal, journalled
from liteguard.evaluation.summary import summarise
from liteguard.machine import release_memory
from liteguard.progress import ticking
from liteguard.rows import conversation_text
from liteguard.sampling import GREEDY, Sampling


def journal_of(output: Path, label: str, inputs: dict[str, Any]) -> Journal:
    """Where the answers and scores of a model are kept until its result is complete.

    Raises UserError when another process is measuring it into the same directory.
    """
    machine.claim(output / f".{label}.lock", f"{output / label}.json")
    return Journal(_journal(output, label), inputs)


def drop_journal(output: Path, label: str, inputs: dict[str, Any]) -> None:
    """Delete what `journal_of` kept, where a kill has left it beside the finished result."""
    Journal.drop(_journal(output, label), inputs)


def _journal(output: Path, label: str) -> Path:
    return output / f"{label}.partial.jsonl"


def measure(
    config: Config,
    path: Path | None,
    rows: dict[str, list[dict[str, Any]]],
    journal: Journal,
) -> dict[str, Any]:
    """The numbers of a stage, a bundle or (None) the base model on `rows`, and their cost."""
    collect(partial(open_answerer, config, path), config, rows, journal)
    ask_judge(config, rows, journal)
    rubrics.ask(config, rows, journal)
    return {**summarise(config, rows, journal), "cost": run_cost(journal)}


def questions(
    config: Config, rows: dict[str, list[dict[str, Any]]]
) -> dict[str, list[tuple[str, Sampling]]]:
    """Part of the journal -> (rendered prompt, how its answer is drawn) of all that is asked."""
    return {
        "answers": [(config.prompt.render_row(row), GREEDY) for _, row in requests(rows)],
        "used": [(use.rendered, use.sampling) for use in as_used.uses(config, rows)],
    }


def longest_row(
    config: Config, rows: dict[str, list[dict[str, Any]]], count: Callable[[str], int]
) -> int:
    """Tokens of the longest question with its answer, or with all its options beside each other.

    `count`: tokens of a text.
    """
    asked = {text for part in questions(config, rows).values() for text, _ in part}
    options = knowledge.pairs(rows["knowledge"], config.prompt.bos_token)
    together = [
        len(group) * (count(context) + max(map(count, group)))
        for context, own in itertools.groupby(options, key=itemgetter(0))
        if (group := [target for _, target in own])
    ]
    answers = [count(text) + config.evaluate.max_new_tokens for text in asked]
    return max([*answers, *together], default=0)


def collect(
    open_model: Callable[[], AbstractContextManager[Answerer]],
    config: Config,
    rows: dict[str, list[dict[str, Any]]],
    journal: Journal,
) -> None:
    """Score the texts and options and answer the questions that the journal does not have yet."""
    pairs = {
        "scores": [pair for _, pair in scored(config, rows)],
        "options": knowledge.pairs(rows["knowledge"], config.prompt.bos_token),
    }
    asked = questions(config, rows)
    totals = {part: len(found) for part, found in pairs.items()}
    totals |= {part: len(found) for part, found in asked.items()}
    todo = {
        part: [i for i in range(total) if i not in journal.found[part]]
        for part, total in totals.items()
    }
    known = {part: totals[part] - len(missing) for part, missing in todo.items()}
    if any(known.values()):
        options = f", {known['options']} of {totals['options']} options" if pairs["options"] else ""
        answered, wanted = (sum(counts[part] for part in asked) for counts in (known, totals))
        print(
            f"  continuing: {known['scores']} of {totals['scores']} texts{options} and "
            f"{answered} of {wanted} answers are in {journal.path}"
        )
    if not any(todo.values()):
        return
    release_memory()
    begin = time.monotonic()
    with contextlib.ExitStack() as opened:
        with ticking("loading the model"):
            model = opened.enter_context(open_model())
        journal.add_run(time.monotonic() - begin)
        for part, what in (("scores", "texts scored"), ("options", "options scored")):
            if todo[part]:
                results = model.score([pairs[part][i] for i in todo[part]])
                scores = ((place, list(score), score[1]) for place, score in results)
                journalled(journal, part, what, totals[part], todo[part], scores)
                journal.add_run(peak_rss_gb=model.peak_rss_gb())
        for part, what in (("answers", "answers"), ("used", "requests as in use")):
            if todo[part]:
                prompts, samplings = zip(*(asked[part][i] for i in todo[part]), strict=True)
                given = model.generate(prompts, config.evaluate.max_new_tokens, samplings)
                answers = ((place, vars(answer), answer.tokens) for place, answer in given)
                journalled(journal, part, what, totals[part], todo[part], answers)
                journal.add_run(peak_rss_gb=model.peak_rss_gb())


def run_cost(journal: Journal) -> dict[str, Any]:
    """What measuring a model took, over all runs of a journal.

    Seconds and tokens of loading, scoring texts ("scoring_s", "scored_tokens") and options,
    answering ("generation_s", "generated_tokens"; "as_used_s"), and judging; "wall_s" is their sum.
    Results that were not journaled before a run was killed are not in it. "peak_rss_gb" is the
    largest of the runs', GB of 10^9 bytes. "answer_s": {percentile: seconds until an answer was
    complete}.
    """
    import numpy as np

    found, seconds = journal.found, journal.seconds
    parts = {"runs": "loading_s", "scores": "scoring_s", "options": "options_s"}
    parts |= {"answers": "generation_s", "used": "as_used_s", "judged": "judging_s"}
    answers = [answer["seconds"] for answer in found["answers"].values()]
    return {
        **{name: round(seconds[part], 3) for part, name in parts.items()},
        **({"rubrics_s": round(seconds["rubrics"], 3)} if found["rubrics"] else {}),
        "scored_tokens": sum(tokens for _, tokens in found["scores"].values()),
        "option_tokens": sum(tokens for _, tokens in found["options"].values()),
        "generated_tokens": sum(answer["tokens"] for answer in found["answers"].values()),
        "wall_s": round(sum(seconds.values()), 2),
        "peak_rss_gb": max(run.get("peak_rss_gb", 0.0) for run in found["runs"].values()),
        "answer_s": {
            # Microseconds: a tiny model's answer takes less than half a millisecond.
            str(percentile): round(float(np.percentile(answers, percentile)), 6)
            for percentile in (5, 25, 50, 75, 95)
        },
    }


def ask_judge(config: Config, rows: dict[str, list[dict[str, Any]]], journal: Journal) -> None:
    """Have the LLM of `evaluate.llm_judge` judge every answer to a request that it has not yet.

    The project's own requests and those of outside sets.
    """
    section = config.evaluate.llm_judge
    if section is None:
        return
    kinds = sets.kinds(rows)
    judged = {
        index: conversation_text(row)
        for index, (name, row) in enumerate(requests(rows))
        if kinds.get(name, name) in REQUESTS
    }
    asked = {i: text for i, text in judged.items() if i not in journal.found["judged"]}
    judge = llm_judge.Judge(section)
    todo = [(prompt, journal.found["answers"][index]["text"]) for index, prompt in asked.items()]
    given = judge.ask(todo, accepted=bool(journal.found["judged"]))
    replies = ((place, vars(reply), reply.tokens) for place, reply in given)
    journalled(journal, "judged", "answers judged", len(judged), list(asked), replies)
