"""Whether bundles can be made of a base model with a prompt, asked before anything is trained.

From the configuration, the tokenizer and the prompt alone: no weights are read, nothing is
converted. The tokenizer of a `.task` is made and compared on prepared texts, as the proof will do.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from liteguard import base_tokenizers, checkpoints, distributed, writing
from liteguard.config import Config
from liteguard.errors import LiteGuardError, UserError
from liteguard.export import quantization, shapes, tflite, tokenizer
from liteguard.prompts import Prompt
from liteguard.rows import FIELDS, iterate_split, read_manifest

# To be raised by whoever changes what can be made, or how it is said: answers are kept.
VERSION = 4
TEXTS = 300  # rows of each part whose ids are compared
ROOM = 512  # characters of a text
ENDINGS = (".task", ".litertlm")


@dataclass(frozen=True)
class Possible:
    """Why a container cannot be made; empty where it can. What was compared, in words."""

    task: str
    litertlm: str
    compared: str
    unknown: str = ""  # what was never converted, where nothing is known against it

    def why_not(self, ending: str) -> str:
        """The reason against `.task` or `.litertlm`, or an empty string."""
        return self.task if ending == ".task" else self.litertlm

    def __str__(self) -> str:
        if self.task and self.litertlm:
            why = self.task if self.task == self.litertlm else f"{self.task}; and {self.litertlm}"
            return f"bundles: neither .task nor .litertlm can be made: {why}"
        doubt = (
            f"not known whether it converts ({self.unknown} never tried)" if self.unknown else ""
        )
        if not (self.task or self.litertlm):
            can = f"{doubt}; its tokenizer fits .task and .litertlm" if doubt else ""
            return f"bundles: {can or '.task and .litertlm can be made'} ({self.compared})"
        made, other = ENDINGS if self.litertlm else reversed(ENDINGS)
        found = f"bundles: {made} only; no {other} can be made: {self.why_not(other)}"
        return f"{found}; {doubt}" if doubt else found


class Planned(Protocol):
    """A training stage, as far as it matters here."""

    config: Config
    architecture: Any
    base_directory: str
    data_dir: Path
    parent: Path | None


def require(stage: Planned, own: Any) -> Possible:
    """What `possible` finds, said on the screen, and whether the prompt is the base's own.

    Raises UserError where neither container can be made of what stage 1 is going to train, or none
    as small as `compress.size_gb`, unless `compress.required` is off.
    """
    config = stage.config
    if config.compress.required:
        quantization.recipes_for(config.compress, stage.architecture)
    parts = config, stage.architecture, own, stage.base_directory, stage.data_dir
    found = possible(*parts)
    if found.task and found.litertlm and not stage.parent and config.compress.required:
        raise UserError(
            f"{found}. Nothing was trained. For a model that stays on a computer: "
            "--set compress.required=false"
        )
    print(found)
    if said := base_tokenizers.beside_template(getattr(own, "base_chats", []), config.prompt):
        print(said)
    return found


@distributed.main_first
def possible(
    config: Config, architecture: Any, own: Any, base: str | Path, data_dir: Path
) -> Possible:
    """What can be made of a base model.

    Args:
        config: prompt, `compress`, and where the answer is kept (`data.cache_dir`).
        architecture: the base's transformers config.
        own: its tokenizer, with the prompt's tokens (`models.load_tokenizer`).
        base: its directory, for a SentencePiece model of its own.
        data_dir: prepared data, for texts to compare on.
    """
    section = config.compress
    converter = tflite.choose_converter(section.converter, section.python)
    if shape := shapes.wrong(architecture, converter, section.kv_cache_length):
        return Possible(shape, shape, "")
    texts, questions = sample(data_dir)
    core = own.backend_tokenizer.to_str()
    rows = architecture.get_text_config().vocab_size
    native = Path(base) / "tokenizer.model"
    key = checkpoints.sha256_json(
        {
            "version": VERSION,
            "tokenizer": core,
            "rows": rows,
            "native": checkpoints.sha256_file(native) if native.is_file() else None,
            "prompt": config.prompt.model_dump(),
            "texts": [texts, questions],
            "identical": config.compress.verify.identical_ids,
        }
    )
    kept = Path(config.data.cache_dir) / "bundles" / f"{key[:32]}.json"
    unknown = shapes.not_known(architecture)
    if writing.is_sealed(kept):
        return Possible(**json.loads(kept.read_text(encoding="utf-8")) | {"unknown": unknown})
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "tokenizer.json").write_text(core, encoding="utf-8")
        (work / "config.json").write_text(json.dumps({"vocab_size": rows}))
        identical = config.compress.verify.identical_ids
        task, compared = as_task(work, native, config.prompt, texts, questions, identical)
    found = Possible(task, as_litertlm(own, config.prompt), compared, unknown)
    kept.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(kept, asdict(found), shared=True)
    writing.seal(kept)
    return found


def as_task(
    folder: Path,
    native: Path,
    prompt: Prompt,
    texts: list[str],
    questions: list[str],
    identical: float,
) -> tuple[str, str]:
    """(why no `.task` can be made, what was compared) of tokenizer.json and config.json in a
    folder."""
    import sentencepiece
    import tokenizers

    made = folder / "made.model"
    try:
        report = tokenizer.build_sentencepiece(folder, made, native=native)
    except LiteGuardError as error:
        return str(error).splitlines()[0].replace(f"{folder}/", "the base's "), ""
    device = sentencepiece.SentencePieceProcessor(model_file=str(made))
    original = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for token in filter(None, (*prompt.stop_tokens, prompt.bos_token)):
        if device.piece_to_id(token) != original.token_to_id(token):
            return f"the prompt's token {token!r} is no piece of its SentencePiece model", ""
    found = tokenizer.compare_tokenizers(folder, made, texts, report.replaced)
    equal = round(found["identical"] * found["texts"])
    compared = f"{equal:,} of {found['texts']:,} texts have equal ids"
    what = f"; the original normalises text ({report.normalizer})" if report.normalizer else ""
    if _surely_more(found["texts"] - equal, found["texts"] * (1 - identical)):
        return f"only {compared} in SentencePiece (causes {found['causes']}){what}", compared
    for question in questions[:20] or ["What is asthma?"]:
        # The runtime puts the BOS before everything by itself.
        asked = tokenizer.plain_text(prompt.render_question(question), report.replaced)
        wanted = original.encode(asked, add_special_tokens=False).ids
        given = device.encode(asked.removeprefix(prompt.bos_token))
        if wanted[bool(prompt.bos_token) :] != given:
            around = next(
                (i for i, (a, b) in enumerate(zip(wanted[1:], given, strict=False)) if a != b), 0
            )
            text = original.decode(wanted[max(around - 2, 0) : around + 4], False)
            return (
                f"the prompt has other ids in SentencePiece than in training, near {text!r}; a "
                ".litertlm has the original tokenizer",
                compared,
            )
    return "", compared


def _surely_more(seen: int, expected: float) -> bool:
    """Whether so many differing texts are no accident where `expected` are allowed: less than 1 in
    20 samples would have as many (Poisson). What is near the limit is for the proof to decide."""
    fewer = sum(expected**k / math.factorial(k) for k in range(min(seen, 100)))
    return seen > 0 and 1 - math.exp(-expected) * fewer < 0.05


def as_litertlm(own: Any, prompt: Prompt) -> str:
    """Why no `.litertlm` can be made with a tokenizer, or an empty string."""
    missing = [t for t in prompt.stop_tokens if own.backend_tokenizer.token_to_id(t) is None]
    if missing:
        return f"{', '.join(missing)} is no token of the tokenizer"
    # The runtime encodes what follows the BOS by itself.
    asked = prompt.render_question("What is asthma?")
    begin = prompt.bos_token if asked.startswith(prompt.bos_token) else ""
    parts = [
        own.backend_tokenizer.encode(t, add_special_tokens=False).ids
        for t in (asked, begin, asked.removeprefix(begin))
    ]
    if parts[0] != parts[1] + parts[2]:
        return (
            f"after {begin} a text has other ids in training than by itself, as the runtime "
            "encodes it (a SentencePiece model that begins a text with a blank)"
        )
    return ""


def sample(data_dir: Path) -> tuple[list[str], list[str]]:
    """(texts, questions) of the prepared validation rows: the first of each part that there is.

    Both are empty without prepared data. Raises UserError for rows that were changed since.
    """
    texts: list[str] = []
    questions: list[str] = []
    files = read_manifest(data_dir)["files"] if (data_dir / "manifest.json").exists() else {}
    for part, fields in FIELDS.items():
        if f"{part}/validation.jsonl" not in files:
            continue
        for row in itertools.islice(iterate_split(data_dir, part, "validation"), TEXTS):
            texts += [row[field][:ROOM].rstrip() for field in fields]
            questions += [row["prompt"][:ROOM].rstrip()] if part == "instruction" else []
    return list(dict.fromkeys(texts)), questions
