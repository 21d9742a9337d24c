"""Tokenized rows, kept in the cache, and what is supervised in them.

A corpus is tokenized once, however often training starts: the arrays are named by the content of
the rows, the tokenizer, the prompt and the length limit, and mapped into memory from there.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import checkpoints, distributed, models
from liteguard.config import Config, SafetySection
from liteguard.errors import UserError
from liteguard.rows import balanced, load_split, read_manifest

if TYPE_CHECKING:
    import numpy as np

ARRAYS = ("ids", "starts", "ends", "prompts")


@dataclass(frozen=True)
class TokenRows:
    """Tokenized examples: row i is `ids[starts[i]:ends[i]]`, its first `prompts[i]` ids a prompt.

    ids: uint32, shape (tokens,); starts, ends, prompts: int64, shape (rows,).
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    prompts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return self.ends - self.starts

    @property
    def supervised(self) -> np.ndarray:
        """Supervised tokens of each row: all but its prompt and but its first token, which nothing
        predicts."""
        import numpy as np

        return self.lengths - np.maximum(self.prompts, 1)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels) of one row, both int64; labels are -100 on the prompt."""
        import numpy as np

        ids = np.asarray(self.ids[self.starts[index] : self.ends[index]], np.int64)
        labels = ids.copy()
        labels[: self.prompts[index]] = -100
        return ids, labels

    def first(self, count: int) -> TokenRows:
        """The first `count` rows."""
        return TokenRows(self.ids, self.starts[:count], self.ends[:count], self.prompts[:count])


@distributed.main_first
def documents(tokenizer: Any, data_dir: Path, split: str, config: Config) -> TokenRows:
    """The domain texts of a split, each ended by the document end, in pieces of `max_length`.

    A piece begins with the last token of the one before it, so that every token but the first of a
    text is a target exactly once. A BOS of the prompt stands before every piece: models that need
    one need it wherever they begin to read. Raises UserError when there is no text.
    """
    import numpy as np

    prompt = config.prompt
    size = min(config.domain.max_length, config.model.context_length)

    def tokenize(rows: list[dict]) -> Iterator[tuple[list[int], int]]:
        texts = [prompt.render_document(row["text"]) for row in rows]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            if not prompt.bos_token:
                yield ids, 0
                continue
            yield ids[:size], 1
            for start in range(size, len(ids), size - 2):
                yield [ids[0], *ids[start - 1 : start + size - 2]], 2

    settings: dict[str, Any] = {"end": prompt.document_end_token}
    if prompt.bos_token:
        settings |= {"bos": prompt.bos_token, "max_length": size}
    whole = _cached(tokenizer, data_dir, f"domain/{split}.jsonl", config, tokenize, settings)
    if prompt.bos_token:
        return _with_targets(whole, f"domain {split}")
    pieces = np.maximum(-(-(whole.lengths - 1) // (size - 1)), 1)
    source = np.repeat(np.arange(len(whole)), pieces)
    number = np.arange(len(source)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = whole.starts[source] + number * (size - 1)
    ends = np.minimum(starts + size, whole.ends[source])
    found = TokenRows(whole.ids, starts, ends, np.zeros(len(starts), np.int64))
    return _with_targets(found, f"domain {split}")


@distributed.main_first
def answers(
    tokenizer: Any, data_dir: Path, split: str, config: Config, limit: int | None = None
) -> TokenRows:
    """The first `limit` questions and answers of a split; only answer and end token are targets.

    A pair that is longer than `instruction.max_length` loses the beginning of its question, never
    the end of its answer. A row with `opening_tokens` stops after so many tokens of its answer, and
    nothing claims that it ends there. More than 1 % of rows without room for their answer is an
    error.
    """
    prompt = config.prompt
    length = min(config.instruction.max_length, config.model.context_length)
    first = 1 if prompt.bos_token else 0  # token of a question that is never cut

    def tokenize(rows: list[dict]) -> Iterator[tuple[list[int], int]]:
        # A question is tokenized apart from its answer, as the device sees it.
        before, after = (
            tokenizer(texts, add_special_tokens=False)["input_ids"]
            for texts in (
                [prompt.render_question(row["prompt"]) for row in rows],
                [prompt.render_answer(row["completion"]) for row in rows],
            )
        )
        for row, question, answer in zip(rows, before, after, strict=True):
            answer = answer[: row.get("opening_tokens")]
            if (over := len(question) + len(answer) - length) > 0:
                question = question[:first] + question[first + over :]
            # An answer that leaves no room for a single token of its question is dropped below.
            fits = len(answer) + first < length
            yield (question + answer, len(question)) if fits else ([], 0)

    settings = {"prompt": prompt.model_dump(), "max_length": length, "limit": limit}
    name = f"instruction/{split}.jsonl"
    found = _cached(tokenizer, data_dir, name, config, tokenize, settings, limit)
    return _with_targets(
        found,
        f"instruction {split}",
        f"an answer longer than instruction.max_length = {length} tokens. Raise it or shorten the "
        "answers",
    )


def _with_targets(rows: TokenRows, name: str, cause: str = "no token to train on") -> TokenRows:
    """`rows` less those without a supervised token; more than 1 % of them is an error."""
    import numpy as np

    usable = rows.supervised > 0
    lost = len(rows) - int(usable.sum())
    if not len(rows) or lost > 0.01 * len(rows):
        raise UserError(
            f"{lost} of {len(rows)} {name} rows have {cause}."
            if len(rows)
            else f"The {name} split has no rows. Prepare more data (prepare_datasets.py)."
        )
    if lost:
        print(f"{name}: {lost} of {len(rows)} rows dropped ({cause})")
    return TokenRows(
        rows.ids, *(np.asarray(a)[usable] for a in (rows.starts, rows.ends, rows.prompts))
    )


def _cached(
    tokenizer: Any,
    data_dir: Path,
    name: str,
    config: Config,
    tokenize: Any,
    settings: dict[str, Any],
    limit: int | None = None,
) -> TokenRows:
    """The rows of one file through `tokenize`, from the cache if they have been there before."""
    import numpy as np
    from tqdm import tqdm

    key = checkpoints.sha256_json(
        {
            "rows": read_manifest(data_dir)["files"].get(name),
            "name": name,
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
            **settings,
        }
    )
    directory = Path(config.data.cache_dir) / "tokens" / key[:32]
    if not directory.is_dir():
        part, split = name.removesuffix(".jsonl").split("/")
        rows = load_split(data_dir, part, split)[:limit]
        ids, lengths, prompts = [], [], []
        with tqdm(total=len(rows), desc=f"tokenizing {part}", unit=" rows", disable=None) as bar:
            for start in range(0, len(rows), 1_000):
                found = list(tokenize(rows[start : start + 1_000]))
                flat = itertools.chain.from_iterable(row for row, _ in found)
                ids.append(np.fromiter(flat, np.uint32))
                lengths += [len(row) for row, _ in found]
                prompts += [count for _, count in found]
                bar.update(len(found))
        ends = np.cumsum(lengths, dtype=np.int64)
        arrays: dict[str, np.ndarray] = {
            "ids": np.concatenate(ids) if ids else np.zeros(0, np.uint32),
            "starts": ends - np.array(lengths, np.int64),
            "ends": ends,
            "prompts": np.array(prompts, np.int64),
        }
        # Two runs may make the same arrays at once: each in its own place, the first one stays.
        staging = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
        staging.mkdir(parents=True, exist_ok=True)
        for array, values in arrays.items():
            np.save(staging / f"{array}.npy", values)
        (staging / "about.json").write_text(json.dumps({"data": str(data_dir), "file": name}))
        try:
            staging.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
            shutil.rmtree(staging)
    return TokenRows(
        *(np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS)
    )


def kind_weights(section: SafetySection, rows: list[dict]) -> dict[str, float]:
    """The weight of each kind of pairs that `safety.kind_weights` means, given the train rows.

    It sets where stage 3 leaves the line between helping and refusing. Raises UserError for a kind
    that no pair is of.
    """
    kinds = Counter(str(row.get("kind")) for row in rows)
    if section.kind_weights == "prepared":
        return dict(kinds)
    unknown = {*section.kind_weights} - {*kinds}
    if unknown:
        raise UserError(
            f"safety.kind_weights names {', '.join(map(repr, sorted(unknown)))}, and no preference "
            f"pair is of that kind. Kinds in the data: {', '.join(sorted(map(str, kinds)))}"
        )
    return section.kind_weights


def render_preferences(
    tokenizer: Any,
    rows: list[dict],
    config: Config,
    part: str,
    limit: int,
    weights: dict[str, float],
    sources: dict[str, str],
) -> list[dict[str, str]]:
    """Up to `limit` pairs as rendered text (prompt, chosen, rejected), kinds taking turns by
    `weights`; prints the mixture.

    Pairs longer than `safety.max_length` are left out, because the trainer would cut the end of
    their answers; more than 1 % of them is an error. sources: see `datasets.source_titles`.
    """
    length = min(config.safety.max_length, config.model.context_length)
    prompt = config.prompt
    kept, used, lost = [], [], 0
    for row in balanced(rows, "kind", len(rows), weights):
        rendered = {
            "prompt": prompt.render_question(row["prompt"]),
            "chosen": prompt.render_answer(row["chosen"]),
            "rejected": prompt.render_answer(row["rejected"]),
        }
        ids = {key: len(models.encode(tokenizer, text)) for key, text in rendered.items()}
        if ids["prompt"] + max(ids["chosen"], ids["rejected"]) > length:
            lost += 1
            continue
        kept.append(rendered)
        used.append(row)
        if len(kept) == limit:
            break
    if lost > 0.01 * (lost + len(kept)):
        raise UserError(
            f"{lost} of {lost + len(kept)} {part} preference pairs are longer than "
            f"safety.max_length = {length} tokens. Raise it or shorten the answers."
        )
    print(f"{part} pairs: {mixture(used, rows, sources)}")
    return kept


def mixture(used: list[dict], rows: list[dict], sources: dict[str, str]) -> str:
    """Kinds and sources of the pairs that are `used`, and how many of its `rows` a source has.

    A kind that runs out leaves its turns to the others, so shares may not be those asked for.
    """
    kinds = Counter(str(row.get("kind")) for row in used)
    shares = ", ".join(f"{kind} {n:,} ({n / len(used):.0%})" for kind, n in kinds.most_common())
    taken, there = (
        Counter(sources.get(str(row.get("dataset")), "unknown") for row in some)
        for some in (used, rows)
    )
    origins = ", ".join(
        f"{name} {n / len(used):.0%} ({n:,} of its {there[name]:,})"
        for name, n in taken.most_common()
    )
    return f"{shares}; sources: {origins}"
