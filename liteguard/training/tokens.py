"""Tokenized rows, kept in the cache, and what is supervised in them.

A corpus is tokenized once, however often training starts: the arrays are named by the content of
the rows, the tokenizer, the prompt and the length limit, and mapped into memory from there.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from liteguard import checkpoints, distributed, models, writing
from liteguard.config import Config, SafetySection
from liteguard.errors import UserError
from liteguard.progress import Progress
from liteguard.prompts import Prompt, Turn
from liteguard.rows import balanced, check_split, check_system_texts, load_split, read_manifest

if TYPE_CHECKING:
    import numpy as np

ARRAYS = ("ids", "starts", "ends", "prompts", "hidden", "cut", "soft")
# What a row lost to the length limit: nothing, its oldest exchanges, the beginning of its question.
WHOLE, SHORTER, BEHEADED = range(3)
# To be raised by whoever changes which ids or targets a row has: cached ones are made again.
TOKENS_VERSION = 2
# Of the rows, so many may lose the beginning of their question, or have no room for their answer.
MOST_LOST = 0.01
ABOUT = "about.json"  # beside them in the cache: what they are of, and their fingerprints


@dataclass(frozen=True)
class TokenRows:
    """Tokenized examples: row i is `ids[starts[i]:ends[i]]`, its first `prompts[i]` ids a prompt.

    ids: uint32, shape (tokens,); starts, ends, prompts: int64, shape (rows,). hidden: bool, shape
    (tokens,), ids after the prompt that are no targets either, as the later questions of a
    conversation; empty where there are none. cut: uint8, shape (rows,), as WHOLE; or empty. soft:
    bool, shape (rows,), whether targets are the base's distributions (teacher.py); or empty.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    prompts: np.ndarray
    hidden: np.ndarray | tuple[()] = ()
    cut: np.ndarray | tuple[()] = ()
    soft: np.ndarray | tuple[()] = ()

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

        found = self.lengths - np.maximum(self.prompts, 1)
        if len(self.hidden):
            spans = zip(self.starts, self.ends, strict=True)
            hidden = (np.count_nonzero(self.hidden[start:end]) for start, end in spans)
            found = found - np.fromiter(hidden, np.int64, len(self))
        return found

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels) of one row, both int64; labels are -100 on all that is no target."""
        import numpy as np

        own = slice(self.starts[index], self.ends[index])
        ids = np.asarray(self.ids[own], np.int64)
        labels = ids.copy()
        labels[: self.prompts[index]] = -100
        if len(self.hidden):
            labels[np.asarray(self.hidden[own])] = -100
        return ids, labels

    def pick(self, rows: Any) -> TokenRows:
        """Some of the rows: a slice, or an array as numpy takes it."""
        import numpy as np

        names = [name for name in (*ARRAYS[1:4], "cut", "soft") if len(getattr(self, name))]
        return replace(self, **{name: np.asarray(getattr(self, name))[rows] for name in names})

    def first(self, count: int) -> TokenRows:
        """The first `count` rows."""
        return self.pick(slice(count))


class Tokenized(NamedTuple):
    """One row: its ids, how many of them are the prompt, and of the others which are no targets
    (one flag per id of the row, or none), what the length limit took, as WHOLE, and whether its
    targets are the base's distributions."""

    ids: list[int]
    prompt: int
    hidden: list[bool] | tuple[()] = ()
    cut: int = WHOLE
    soft: bool = False


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

    def tokenize(rows: list[dict]) -> Iterator[Tokenized]:
        texts = [prompt.render_document(row["text"]) for row in rows]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            if not prompt.bos_token:
                yield Tokenized(ids, 0)
                continue
            yield Tokenized(ids[:size], 1)
            for start in range(size, len(ids), size - 2):
                yield Tokenized([ids[0], *ids[start - 1 : start + size - 2]], 2)

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
    """The first `limit` conversations of a split; only answers and end tokens are targets.

    A conversation is one row: every answer in it is a target but those that it lists as
    `untrained`. One that is longer than `instruction.max_length` loses its oldest exchanges, then
    the beginning of its last question, never the end of its answer. A row with `opening_tokens`
    stops after so many tokens of its answer, and nothing claims that it ends there; nor where the
    answer of an `open_ended` row does. More than 1 % of rows without the beginning of their
    question, or without room for their answer, is an error.
    """
    prompt = config.prompt
    length = min(config.instruction.max_length, config.model.context_length)

    def tokenize(rows: list[dict]) -> Iterator[Tokenized]:
        check_system_texts(rows, prompt)
        # A question is tokenized apart from its answer, as the device sees it.
        texts = [prompt.segments(_turns(row), row.get("system")) for row in rows]
        for row, own in zip(rows, texts, strict=True):
            if row.get("open_ended"):
                own[-1] = row["completion"]  # without its end token
        flat = tokenizer(list(itertools.chain(*texts)), add_special_tokens=False)["input_ids"]
        pieces = iter(flat)
        for row, own in zip(rows, texts, strict=True):
            yield _fitted(tokenizer, prompt, row, [next(pieces) for _ in own], length)

    settings = {"prompt": prompt.model_dump(), "max_length": length, "limit": limit}
    name = f"instruction/{split}.jsonl"
    found = _cached(tokenizer, data_dir, name, config, tokenize, settings, limit)
    return _with_targets(
        found,
        f"instruction {split}",
        f"an answer longer than instruction.max_length = {length} tokens. Raise it or shorten the "
        "answers",
        f"instruction.max_length = {length} tokens",
    )


def _turns(row: dict, left_out: int = 0) -> list[Turn]:
    """The exchanges of an instruction row, without the oldest `left_out`."""
    earlier: list[Turn] = [(question, answer) for question, answer in row.get("history", ())]
    return [*earlier[left_out:], (row["prompt"], row["completion"])]


def _fitted(
    tokenizer: Any, prompt: Prompt, row: dict, pieces: list[list[int]], length: int
) -> Tokenized:
    """An instruction row in at most `length` ids; no id where its answer leaves no room.

    pieces: ids of its `Prompt.segments`.
    """
    pieces[-1] = pieces[-1][: row.get("opening_tokens")]
    exchanges, left_out = len(pieces) // 2, 0
    while sum(map(len, pieces)) > length and left_out < exchanges - 1:
        left_out += 1
        first, _ = prompt.segments(_turns(row, left_out)[:1], row.get("system"))
        pieces = [models.encode(tokenizer, first), *pieces[3:]]
    cut = SHORTER if left_out else WHOLE
    over = sum(map(len, pieces)) - length
    if over > 0:  # of one exchange, after all
        begin = 1 if prompt.bos_token else 0  # token that is never cut
        cut, pieces[0] = BEHEADED, pieces[0][:begin] + pieces[0][begin + over :]
        # An answer that leaves no room for a single token of its question is dropped.
        if len(pieces[0]) <= begin or sum(map(len, pieces)) > length:
            return Tokenized([], 0)
    ids, soft = list(itertools.chain(*pieces)), row.get("distill", False)
    if len(pieces) == 2:
        return Tokenized(ids, len(pieces[0]), (), cut, soft)
    context = {2 * (n - left_out) + 1 for n in row.get("untrained", ())}
    hidden = [
        n > 0 and (n % 2 == 0 or n in context) for n, piece in enumerate(pieces) for _ in piece
    ]
    return Tokenized(ids, len(pieces[0]), hidden, cut, soft)


def _with_targets(
    rows: TokenRows, name: str, cause: str = "no token to train on", limit: str = ""
) -> TokenRows:
    """`rows` less those without a supervised token; more than 1 % of them is an error.

    So are more than 1 % that lost the beginning of their question to `limit`; fewer are said.
    """
    import numpy as np

    usable = rows.supervised > 0
    lost = len(rows) - int(usable.sum())
    if not len(rows) or lost > MOST_LOST * len(rows):
        raise UserError(
            f"{lost} of {len(rows)} {name} rows have {cause}."
            if len(rows)
            else f"The {name} split has no rows. Prepare more data (prepare_datasets.py)."
        )
    if lost:
        print(f"{name}: {lost} of {len(rows)} rows dropped ({cause})")
    beheaded, shorter = (int((np.asarray(rows.cut) == kind).sum()) for kind in (BEHEADED, SHORTER))
    if beheaded > MOST_LOST * len(rows):
        raise UserError(
            f"{beheaded} of {len(rows)} {name} rows would lose the beginning of their question: "
            f"they are longer than {limit}. Raise it, or leave long rows out: set "
            "data.max_characters and prepare the data again."
        )
    for count, what in ((beheaded, "the beginning of their question"), (shorter, "old exchanges")):
        if count:
            print(f"{name}: {count} of {len(rows)} rows lose {what}: longer than {limit}")
    return rows if not lost else rows.pick(usable)


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

    key = checkpoints.sha256_json(
        {
            "rows": read_manifest(data_dir)["files"].get(name),
            "name": name,
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
            "arrays": ARRAYS,
            "version": TOKENS_VERSION,
            **settings,
        }
    )
    directory = Path(config.data.cache_dir) / "tokens" / key[:32]
    part, split = name.removesuffix(".jsonl").split("/")
    kept = checkpoints.read_dict(directory / ABOUT)
    if kept is not None and writing.is_whole(directory, kept.get("fingerprints")):
        check_split(data_dir, part, split)  # the rows may have been edited since
    else:
        rows = load_split(data_dir, part, split)[:limit]
        ids, hidden, lengths, prompts, cut, soft = [], [], [], [], [], []
        progress = Progress(f"tokenizing {part}", len(rows), unit="rows", quiet=True)
        with contextlib.closing(progress):
            for start in range(0, len(rows), 1_000):
                found = list(tokenize(rows[start : start + 1_000]))
                ids.append(np.fromiter(itertools.chain(*(row.ids for row in found)), np.uint32))
                unseen = (row.hidden or itertools.repeat(False, len(row.ids)) for row in found)
                hidden.append(np.fromiter(itertools.chain(*unseen), bool))
                lengths += [len(row.ids) for row in found]
                prompts += [row.prompt for row in found]
                cut += [row.cut for row in found]
                soft += [row.soft for row in found]
                progress.add(count=len(found))
        ends = np.cumsum(lengths, dtype=np.int64)
        flags = np.concatenate([np.zeros(0, bool), *hidden])
        arrays: dict[str, np.ndarray] = {
            "ids": np.concatenate([np.zeros(0, np.uint32), *ids]),
            "starts": ends - np.array(lengths, np.int64),
            "ends": ends,
            "prompts": np.array(prompts, np.int64),
            "hidden": flags if flags.any() else flags[:0],
            "cut": np.array(cut, np.uint8),
            "soft": np.array(soft, bool),
        }
        directory.parent.mkdir(parents=True, exist_ok=True)
        with writing.replacing(directory, shared=True) as staging:
            staging.mkdir()
            for array, values in arrays.items():
                np.save(staging / f"{array}.npy", values)
            prints = writing.fingerprints(staging)
            about = {"data": str(data_dir), "file": name, "fingerprints": prints}
            checkpoints.write_json(staging / ABOUT, about)
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

    What was said before is part of the prompt; the oldest exchanges go where it is too long. Pairs
    that are longer than `safety.max_length` even so are left out, because the trainer would cut the
    end of their answers; more than 1 % of them is an error. sources: see `datasets.source_titles`.
    """
    length = min(config.safety.max_length, config.model.context_length)
    prompt = config.prompt
    check_system_texts(rows, prompt)
    kept, used, lost, shorter = [], [], 0, 0
    for row in balanced(rows, "kind", len(rows), weights):
        rendered = {
            "prompt": prompt.render_row(row),
            "chosen": prompt.render_answer(row["chosen"]),
            "rejected": prompt.render_answer(row["rejected"]),
        }
        ids = {key: len(models.encode(tokenizer, text)) for key, text in rendered.items()}
        room = length - max(ids["chosen"], ids["rejected"])
        history = row.get("history", [])
        while ids["prompt"] > room and history:
            history = history[1:]
            rendered["prompt"] = prompt.render_question(row["prompt"], history, row.get("system"))
            ids["prompt"] = len(models.encode(tokenizer, rendered["prompt"]))
        if ids["prompt"] > room:
            lost += 1
            continue
        shorter += len(history) < len(row.get("history", []))
        kept.append(rendered)
        used.append(row)
        if len(kept) == limit:
            break
    if lost > 0.01 * (lost + len(kept)):
        raise UserError(
            f"{lost} of {lost + len(kept)} {part} preference pairs are longer than "
            f"safety.max_length = {length} tokens. Raise it or shorten the answers."
        )
    if shorter:
        print(
            f"{part}: {shorter} of {len(kept)} pairs lose old exchanges: longer than "
            f"safety.max_length = {length} tokens"
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
