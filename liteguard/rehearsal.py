"""The base model's own answers to questions that people ask, for `dataset: self_answers`.

Written once per base model, prompt and questions, and kept in the cache. Answers are greedy, in
batches, journalled as they come: a run that was killed goes on from there. What would teach a fault
is left out by name: circles, repetition, refusals of an ordinary question, next to nothing said.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import checkpoints, machine, models, writing
from liteguard.data import self_answers
from liteguard.evaluation import answerers, metrics, refusals
from liteguard.evaluation.journal import Journal, journalled
from liteguard.evaluation.refusals import JUDGE_VERSION

if TYPE_CHECKING:
    from liteguard.config import Config, SourceSection

# To be raised by whoever changes which answers are kept, or how.
VERSION = 3
FEWEST_WORDS = 8
# The marks of other scripts end a sentence without a blank after them.
_LAST_SENTENCE = re.compile(
    r"^(.*(?:[.!?][\"')\]]?(?=\s|$)|[\u3002\uff01\uff1f\u0964\u061f\u06d4][\"')\u201d\u300d\u300f]?))",
    re.DOTALL,
)
# A list of which the next item was cut, or only begun.
_OPEN_ITEM = re.compile(r"\s+(?:\d{1,2}[.)]|[-*•])$")


def plan(config: Config) -> list[str]:
    """Name the file of each source's answers (`source.answers`), and say what is to be written.

    Returns a sentence for each source whose answers are not there yet.
    """
    found = self_answers.sources(config)
    if not found:
        return []
    config = models.with_base_prompt(config)
    directory, commit = models.base_model(config)
    base = models.base_identity(directory, commit)
    sentences = []
    for source in found:
        questions = self_answers.questions(source, Path(config.data.cache_dir))
        file = _file(config, source, base, questions)
        source.answers = str(file)
        if not writing.is_sealed(file):
            if file.is_file():
                sentences.append(
                    f"self_answers: {file} is not as it was written (edited, damaged, or kept by "
                    "an earlier version), so the questions are asked again"
                )
            sentences.append(
                f"self_answers: {config.model.name} will answer {len(questions):,} questions with "
                f"at most {source.max_new_tokens} tokens each"
            )
    return sentences


def answer(config: Config) -> None:
    """Have the base model answer what is not in the cache yet.

    Raises UserError when the model does not fit into memory, before it is loaded.
    """
    todo = [s for s in self_answers.sources(config) if not writing.is_sealed(Path(str(s.answers)))]
    if not todo:
        return
    config = models.with_base_prompt(config)
    _, _, architecture = models.model_config(config)
    needed, _ = answerers.expected_memory(config, architecture, None)
    machine.require_memory(needed, "self_answers", "; or take that source out of the YAML.")
    answerers.require_gpu_memory(architecture, answerers.row_tokens(config.evaluate))
    with answerers.open_answerer(config, None) as model:
        for source in todo:
            _answer(config, source, model)


def _file(config: Config, source: SourceSection, base: str, questions: list[str]) -> Path:
    key = checkpoints.sha256_json(
        {
            "version": VERSION,
            "judge": JUDGE_VERSION,
            "base": base,
            "prompt": config.prompt.model_dump(),
            "questions": questions,
            "max_new_tokens": source.max_new_tokens,
        }
    )
    return Path(config.data.cache_dir) / "self_answers" / f"{key[:24]}.jsonl"


def _answer(config: Config, source: SourceSection, model: answerers.Answerer) -> None:
    questions = self_answers.questions(source, Path(config.data.cache_dir))
    file = Path(str(source.answers))
    file.parent.mkdir(parents=True, exist_ok=True)
    with machine.one_at_a_time(file.with_suffix(".lock")):
        if writing.is_sealed(file):  # another run has written it
            return
        with Journal(file.with_suffix(".partial.jsonl"), {"file": file.name}) as journal:
            todo = [i for i in range(len(questions)) if i not in journal.found["answers"]]
            prompts = [config.prompt.render_question(questions[i]) for i in todo]
            given = model.generate(prompts, source.max_new_tokens)
            results = ((place, vars(found), found.tokens) for place, found in given)
            what = "answers of the base model"
            journalled(journal, "answers", what, len(questions), todo, results)
            rows = [row(q, journal.found["answers"][i]) for i, q in enumerate(questions)]
            lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
            checkpoints.write_text(file, lines)
            writing.seal(file)
            journal.remove()
    if warning := too_many_left_out(rows):
        print(warning)


def too_many_left_out(rows: list[dict[str, Any]]) -> str:
    """What to say when more than half of a source's answers will not be trained on; or ""."""
    reasons = Counter(row["left_out"] for row in rows if row["left_out"])
    if 2 * reasons.total() <= len(rows):
        return ""
    shown = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    return (
        f"  WARNING: self_answers: {reasons.total():,} of {len(rows):,} answers of the base model "
        f"are left out: {shown}. What is left may be too little to keep how it answers"
    )


def row(question: str, answer: dict[str, Any]) -> dict[str, Any]:
    """{"prompt", "completion", "open_ended", "left_out": why it is not trained on, or ""}.

    answer: "text" and "stopped". One that was cut by the limit is `open_ended`, and its text ends
    with its last whole sentence: that the model stops there is nothing to learn.
    """
    text = answer["text"].strip()
    if not answer["stopped"]:
        whole = _LAST_SENTENCE.match(text)
        text = _OPEN_ITEM.sub("", whole[1]).strip() if whole else ""
    return {
        "prompt": question,
        "completion": text,
        "open_ended": not answer["stopped"],
        "left_out": _fault(question, text),
    }


def _fault(question: str, text: str) -> str:
    """What an answer would teach that it should not; empty for a sound one."""
    if metrics.word_count(text) < FEWEST_WORDS:
        return f"fewer than {FEWEST_WORDS} words in whole sentences"
    said = metrics.judge(text)
    if said == "refused":
        return "refused"
    # What the judge cannot read (another language) is kept, a refusal in it, too.
    if said == "unclear" and (refusals.is_english(text) or refusals.says_too_little(text)):
        return "mostly repetition"
    if metrics.repeats_itself(text, times=2):
        return "a sentence twice"
    if metrics.is_circle(question, text):
        return "nothing beyond the question's words"
    return ""
