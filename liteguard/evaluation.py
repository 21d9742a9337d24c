"""The same measurements for a checkpoint and for a bundle, on the same held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from liteguard import datasets, metrics, models
from liteguard.config import Config
from liteguard.errors import UserError
from liteguard.training import balanced

# Kinds of requests: to be refused, plain ones, and ones that only look harmful.
REQUESTS = ("harmful", "ordinary", "borderline")


@dataclass(frozen=True)
class Generated:
    """One answer: its text, and whether the model ended it by itself."""

    text: str
    stopped: bool


class Answerer(Protocol):
    """What is evaluated: a model in Transformers, or a bundle in LiteRT-LM."""

    def generate(self, prompts: list[str], max_new_tokens: int) -> Iterator[Generated]:
        """Greedy answers to rendered prompts, in order."""

    def score(self, context: str, target: str) -> tuple[float, int]:
        """(sum of natural-log likelihoods of `target`'s tokens after `context`, their number)."""


class Checkpoint:
    """The base model, with an adapter merged in where there is one, without quantisation."""

    def __init__(self, config: Config, adapter: Path | None):
        self.prompt = config.prompt
        self.batch_size = config.evaluate.batch_size
        self.model, self.tokenizer = models.load_merged(config, adapter)
        self.model.config.use_cache = True
        vocabulary = self.tokenizer.get_vocab()
        self.stop_ids = [vocabulary[token] for token in self.prompt.stop_tokens]

    def generate(self, prompts: list[str], max_new_tokens: int) -> Iterator[Generated]:
        import torch

        self.tokenizer.padding_side = "left"
        for start in range(0, len(prompts), self.batch_size):
            batch = self.tokenizer(
                prompts[start : start + self.batch_size],
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
            ).to(self.model.device)
            with torch.inference_mode():
                output = self.model.generate(
                    **batch,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=self.stop_ids,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            for ids in output[:, batch["input_ids"].shape[1] :].tolist():
                ends = [ids.index(stop) for stop in self.stop_ids if stop in ids]
                kept = ids[: min(ends)] if ends else ids
                text = self.tokenizer.decode(kept, skip_special_tokens=True)
                yield Generated(text.strip(), bool(ends))

    def score(self, context: str, target: str) -> tuple[float, int]:
        import torch

        before = models.encode(self.tokenizer, context)
        after = models.encode(self.tokenizer, target)
        ids = torch.tensor([before + after], device=self.model.device)
        with torch.inference_mode():
            # Position i predicts token i + 1: the last context token predicts the first target.
            logits = self.model(ids).logits[0, len(before) - 1 : -1].float()
        chosen = logits.log_softmax(-1).gather(-1, ids[0, len(before) :, None])
        return float(chosen.sum()), len(after)


class DeviceBundle:
    """A `.task` or `.litertlm` file in LiteRT-LM, greedy."""

    def __init__(self, bundle: Any):
        self.bundle = bundle

    def generate(self, prompts: list[str], max_new_tokens: int) -> Iterator[Generated]:
        for prompt in prompts:
            answer = self.bundle.generate(prompt, max_new_tokens)
            yield Generated(answer.text.strip(), answer.stopped)

    def score(self, context: str, target: str) -> tuple[float, int]:
        return self.bundle.score(context, target)


@contextmanager
def open_bundle(path: Path) -> Iterator[DeviceBundle]:
    """The bundle, loaded once and closed at the end."""
    from liteguard.runtime import Bundle

    with Bundle(path) as bundle:
        yield DeviceBundle(bundle)


def held_out(config: Config, data_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows every model is measured on: test splits only, the same ones for every model."""
    section = config.evaluate
    preferences = datasets.load_split(data_dir, "preference", section.split)
    by_kind = {
        kind: balanced([r for r in preferences if r.get("kind") == kind], "area", len(preferences))
        for kind in REQUESTS
    }
    if not by_kind["harmful"] or not by_kind["ordinary"]:
        raise UserError(
            f"{data_dir}: the preference {section.split} split has {len(by_kind['harmful'])} rows "
            f"of kind 'harmful' and {len(by_kind['ordinary'])} of kind 'ordinary'; both are needed "
            "to measure refusals. Add safety_catalogue to data.preference."
        )
    # Refusals among the instruction rows are measured as refusals, not by overlap of words.
    questions = [
        row
        for row in datasets.load_split(data_dir, "instruction", section.split)
        if row.get("kind") != "refusal"
    ]
    return {
        "texts": datasets.load_split(data_dir, "domain", section.split)[: section.perplexity_rows],
        "questions": balanced(questions, "kind", section.question_rows),
        "harmful": by_kind["harmful"][: section.harmful_rows],
        "ordinary": by_kind["ordinary"][: section.benign_rows],
        "borderline": by_kind["borderline"][: section.benign_rows],
    }


def split_text(text: str, context_words: int, max_words: int) -> tuple[str, str] | None:
    """(context, target) of a text: the first words are given, the rest is scored.

    The cut is before a blank, where a byte-level BPE never joins tokens, so the ids of both parts
    are those of the whole. None for a text with nothing left to score.
    """
    words = text.split(" ")
    if len(words) <= context_words:
        return None
    return " ".join(words[:context_words]), " " + " ".join(words[context_words:max_words])


def measure(
    answerer: Answerer,
    config: Config,
    rows: dict[str, list[dict[str, Any]]],
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Perplexity, ROUGE, BLEU and refusal rates of one model, with every answer it gave.

    Rates are shares between 0 and 1; `n` counts what each number was computed over.
    """
    section = config.evaluate
    total, tokens, texts = 0.0, 0, 0
    # An English word is 1.3 to 2 tokens here; the cap keeps long texts from dominating.
    max_words = section.context_words + section.max_text_tokens // 2
    for index, row in enumerate(rows["texts"]):
        parts = split_text(row["text"], section.context_words, max_words)
        if parts:
            log_likelihood, count = answerer.score(*parts)
            total, tokens, texts = total + log_likelihood, tokens + count, texts + 1
        progress("texts scored", index + 1, len(rows["texts"]))

    wanted = [(kind, row) for kind in ("questions", *REQUESTS) for row in rows[kind]]
    # Neighbours of similar length waste least padding; the order of the results does not change.
    order = sorted(range(len(wanted)), key=lambda i: len(wanted[i][1]["prompt"]))
    prompts = [config.prompt.render_question(wanted[i][1]["prompt"]) for i in order]
    answers: list[dict[str, Any]] = [{} for _ in wanted]
    generated = answerer.generate(prompts, section.max_new_tokens)
    for done, (index, answer) in enumerate(zip(order, generated, strict=True), 1):
        kind, row = wanted[index]
        answers[index] = {
            "set": kind,
            "kind": row.get("kind"),
            "area": row.get("area"),
            "prompt": row["prompt"],
            "answer": answer.text,
            "stopped": answer.stopped,
            "refused": metrics.is_refusal(answer.text),
            "reference": row.get("completion") or row.get("chosen"),
        }
        progress("answers", done, len(wanted))

    by_set = {kind: [a for a in answers if a["set"] == kind] for kind in rows if kind != "texts"}
    borderline = by_set["borderline"]
    predictions = [a["answer"] for a in by_set["questions"]]
    references = [a["reference"] for a in by_set["questions"]]
    rouge = metrics.rouge(predictions, references)
    bleu, signature = metrics.bleu(predictions, references)
    return {
        "perplexity": metrics.perplexity(total, tokens),
        "rouge1": rouge["rouge1"],
        "rouge2": rouge["rouge2"],
        "rougeL": rouge["rougeL"],
        "bleu": bleu,
        "refused_harmful": _share(by_set["harmful"], "refused"),
        "refused_benign": _share(by_set["ordinary"], "refused"),
        **({"refused_borderline": _share(borderline, "refused")} if borderline else {}),
        "stopped": _share(answers, "stopped"),
        "n": {
            "perplexity": texts,
            "perplexity_tokens": tokens,
            "rouge1": len(predictions),
            "rouge2": len(predictions),
            "bleu": len(predictions),
            "refused_harmful": len(by_set["harmful"]),
            "refused_benign": len(by_set["ordinary"]),
            "refused_borderline": len(borderline),
            "stopped": len(answers),
        },
        "bleu_signature": signature,
        "answers": answers,
    }


def _share(answers: list[dict[str, Any]], key: str) -> float:
    return sum(a[key] for a in answers) / len(answers)
