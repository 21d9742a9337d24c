"""Hugging Face tokenizer -> SentencePiece model with the same token ids.

The `.task` format takes only SentencePiece. Training a new SentencePiece model gives ids that
have nothing to do with the embedding rows, so the model is *written* instead: piece i is token i,
its score is minus its merge rank, and nothing is prefixed or trimmed. A base that has SentencePiece
of its own (`tokenizer.model`: TinyLlama, Gemma, Phi-3) keeps it: sentencepiece_native.py. What a
tokenizer normalises (NFC, for Qwen) is left out: texts in other forms are rare, and how many have
other ids is measured, before training (possible.py) and in the proof.

Three things that byte-level BPE has and SentencePiece has not, and what is done about each:

- Tokens that are incomplete UTF-8 (GPT-2 spells some curly quotes with two of them) cannot be
  pieces. They get a placeholder that no text can match and that the report lists, so that the
  bundle's model can be made unable to write them (`silence.Silence`). Single bytes are pieces, so
  any text can be read, but a stray one in an answer is shown as U+FFFD: they are silenced too.
- Characters that such tokens spell are replaced before tokenization where a plain equivalent
  exists (`PLAIN`), by a character map inside the model. Training text must be cleaned with the
  same map (`plain_text`).
- The regular expression that splits text before merging. Runs of newlines are where it matters:
  "a\\n\\nb" is two tokens, though a token "\\n\\n" exists. Such pieces are marked UNUSED, which
  SentencePiece splits again after merging.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liteguard import writing
from liteguard.errors import UserError, WorkError
from liteguard.export import sentencepiece_native
from liteguard.export.sentencepiece_native import GUARD, PLACEHOLDER_MARK, charsmap
from liteguard.text import PLAIN

__all__ = ["GUARD", "PLACEHOLDER_MARK", "TokenizerReport", "build_sentencepiece", "plain_text"]


@dataclasses.dataclass(frozen=True)
class TokenizerReport:
    """What became of every token; the lists hold token ids."""

    tokens: int  # ids the original tokenizer has
    rows: int  # rows of the embedding, at least `tokens`
    pieces: int  # pieces of the SentencePiece model, at least `rows`
    incomplete: list[int]  # incomplete UTF-8, or no token at all: placeholders
    single_bytes: list[int]  # one non-ASCII byte: BYTE pieces, read but never written
    duplicates: list[int]  # same text as an added token: placeholders
    split: list[int]  # whitespace that never stands alone inside a text: UNUSED
    missing_bytes: list[int]  # byte values that the original tokenizer drops silently
    replaced: dict[str, str]  # characters replaced before tokenization
    normalizer: str = ""  # what the original does to text before, and this model does not
    native: bool = False  # the base's own SentencePiece model

    @property
    def silenced(self) -> list[int]:
        """Ids that a model must never write and that no prompt holds: placeholders, spare rows."""
        return sorted({*self.incomplete, *self.duplicates, *range(self.tokens, self.rows)})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, for `stage.json`."""
        return dataclasses.asdict(self)


def bytes_to_unicode() -> dict[int, str]:
    """Byte value -> the printable character that stands for it in a byte-level vocabulary.

    Source: GPT-2's `encoder.py` (Radford et al. 2019).
    """
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in kept}
    moved = (byte for byte in range(256) if byte not in table)
    return table | {byte: chr(256 + index) for index, byte in enumerate(moved)}


def _read_bpe(tokenizer_dir: Path) -> dict[str, Any]:
    """tokenizer.json as a dict, after checking that it is a byte-level BPE."""
    path = Path(tokenizer_dir) / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"no tokenizer.json in {tokenizer_dir}. A fast tokenizer is needed: load it with "
            "AutoTokenizer and save it with save_pretrained first."
        )
    data = json.loads(path.read_text(encoding="utf-8"))
    steps = json.dumps([data.get("pre_tokenizer"), data.get("decoder")])
    if data["model"].get("type") != "BPE" or '"ByteLevel"' not in steps:
        raise UserError(
            f"{path}: model type {data['model'].get('type')!r} is not a byte-level BPE. Only "
            "byte-level BPE tokenizers (GPT-2, Phi, SmolLM2, Llama 3, Qwen families) can be "
            "written as SentencePiece with unchanged ids; others need the base's own "
            "tokenizer.model, and there is none."
        )
    for token in data.get("added_tokens", []):
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise UserError(
                f"{path}: added token {token['content']!r} strips its neighbours (lstrip, rstrip "
                "or single_word), which SentencePiece cannot do. Set these flags to false."
            )
    return data


def _embedding_rows(tokenizer_dir: Path) -> int:
    """vocab_size of config.json beside the tokenizer, 0 where there is none."""
    path = Path(tokenizer_dir) / "config.json"
    if not path.exists():
        return 0
    found = json.loads(path.read_text(encoding="utf-8"))
    return found.get("vocab_size") or found.get("text_config", {}).get("vocab_size", 0)


def _piece_bytes(data: dict[str, Any]) -> dict[int, bytes]:
    """Token id -> the bytes it stands for, for all ordinary (not added) tokens."""
    to_byte = {char: byte for byte, char in bytes_to_unicode().items()}
    try:
        return {
            index: bytes(to_byte[char] for char in token)
            for token, index in data["model"]["vocab"].items()
            if token not in {added["content"] for added in data.get("added_tokens", [])}
        }
    except KeyError as error:
        raise UserError(
            f"the vocabulary has a token with the character {error.args[0]!r}, which no "
            "byte-level vocabulary has"
        ) from None


def _decodes(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _replacements(tokenizer: Any, incomplete: set[int], missing: set[int]) -> dict[str, str]:
    """Characters to replace: those of PLAIN spelled with incomplete tokens, and dropped ones."""
    chosen = {}
    for char, plain in PLAIN.items():
        if incomplete.intersection(tokenizer.encode(char, add_special_tokens=False).ids):
            chosen[char] = plain
    # The original tokenizer has no token for these and drops them; so must this one, because a
    # byte piece outside the embedding would read foreign memory.
    chosen.update({chr(byte): "" for byte in missing if byte < 0x80})
    return chosen


def _never_alone(tokenizer: Any, texts: dict[int, str]) -> list[int]:
    """Ids of whitespace with newlines that the original never produces between two words."""
    found = []
    for index, text in texts.items():
        if len(text) > 1 and text.isspace() and ("\n" in text or "\r" in text):
            ids = tokenizer.encode(f"a{text}a", add_special_tokens=False).ids
            if index not in ids:
                found.append(index)
    return found


def build_sentencepiece(
    tokenizer_dir: Path, output: Path, *, replace: bool = True, native: Path | None = None
) -> TokenizerReport:
    """Write a SentencePiece model whose piece i is token i of the tokenizer in `tokenizer_dir`.

    Args:
        tokenizer_dir: directory with tokenizer.json (byte-level BPE); if it also has config.json,
            rows of the embedding beyond the last token are filled with UNUSED pieces.
        output: the file to write (`.spm` or `.model`).
        replace: replace typographic characters that the vocabulary cannot spell with whole
            pieces by plain ones (see `PLAIN`), inside the model.
        native: the base's own SentencePiece model; used where it holds the same tokens.

    Raises:
        UserError: not a byte-level BPE, or an added token that SentencePiece cannot express.
        WorkError: the model that was written cannot be opened, or an added token is not one piece.
    """
    import sentencepiece
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2 as proto

    tokenizer_dir, output = Path(tokenizer_dir), Path(output)
    if native and (own := sentencepiece_native.read(native, tokenizer_dir)):
        found = sentencepiece_native.write(
            own, tokenizer_dir, output, _embedding_rows(tokenizer_dir)
        )
        return TokenizerReport(**found)
    data = _read_bpe(tokenizer_dir)
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    added = {token["id"]: token["content"] for token in data.get("added_tokens", [])}
    raw = {index: value for index, value in _piece_bytes(data).items() if index not in added}
    tokens = max([*added, *raw]) + 1
    rows = max(tokens, _embedding_rows(tokenizer_dir))

    rank: dict[str, int] = {}
    for number, merge in enumerate(data["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, number)
    score = {
        index: -float(rank[token] + 1)
        for token, index in data["model"]["vocab"].items()
        if token in rank
    }

    byte_of = {i: v[0] for i, v in raw.items() if len(v) == 1 and (v[0] >= 0x80 or v[0] == 0)}
    missing = {*range(256)} - {value[0] for value in raw.values() if len(value) == 1}
    texts = {i: t for i, v in raw.items() if i not in byte_of and (t := _decodes(v)) is not None}
    holes = {*range(tokens)} - {*raw, *added}
    incomplete = sorted((set(raw) - set(byte_of) - set(texts)) | holes)
    taken = set(added.values())
    duplicates = sorted(index for index, text in texts.items() if text in taken)
    split = _never_alone(tokenizer, texts)
    replaced = _replacements(tokenizer, set(incomplete), missing) if replace else {}

    model = proto.ModelProto()
    kinds = proto.ModelProto.SentencePiece

    def add(piece: str, kind: int, value: float = 0.0) -> None:
        model.pieces.add(piece=piece, score=value, type=kind)

    for index in range(rows):
        if index in added:
            # USER_DEFINED and not CONTROL: the prompt is text, and a control piece never matches.
            add(added[index], kinds.USER_DEFINED)
        elif index in byte_of:
            add(f"<0x{byte_of[index]:02X}>", kinds.BYTE)
        elif index in texts and index not in duplicates:
            # A token that no merge makes (and is more than one character) is never in text.
            reachable = index in score or len(texts[index]) == 1
            kind = kinds.NORMAL if reachable and index not in split else kinds.UNUSED
            add(texts[index], kind, score.get(index, 0.0))
        else:
            add(f"{PLACEHOLDER_MARK}{index}{PLACEHOLDER_MARK}", kinds.UNUSED)
    # byte_fallback wants all 256 byte pieces. ASCII characters are ordinary pieces above, and
    # bytes that the vocabulary lacks are no part of valid text, so these ids never occur.
    present = set(byte_of.values())
    for byte in range(256):
        if byte not in present:
            add(f"<0x{byte:02X}>", kinds.BYTE)
    add(f"{PLACEHOLDER_MARK}unknown{PLACEHOLDER_MARK}", kinds.UNKNOWN)

    spec = model.trainer_spec
    spec.model_type = proto.TrainerSpec.BPE
    spec.vocab_size = len(model.pieces)
    spec.byte_fallback = True
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = len(model.pieces) - 1, -1, -1, -1
    spec.unk_piece = model.pieces[-1].piece
    normalizer = model.normalizer_spec
    normalizer.name = "user_defined"
    normalizer.precompiled_charsmap = charsmap({**replaced, GUARD: ""})
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = False
    output.parent.mkdir(parents=True, exist_ok=True)
    writing.write_bytes(output, model.SerializeToString())

    report = TokenizerReport(
        tokens=tokens,
        rows=rows,
        pieces=len(model.pieces),
        incomplete=incomplete,
        single_bytes=sorted(byte_of),
        duplicates=duplicates,
        split=split,
        missing_bytes=sorted(missing),
        replaced=replaced,
        normalizer=(data.get("normalizer") or {}).get("type", ""),
    )
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(output))
    except Exception as error:
        raise WorkError(f"{output} was written but cannot be opened: {error}") from error
    for index, content in added.items():
        if processor.encode(content) != [index]:
            raise WorkError(
                f"added token {content!r} (id {index}) becomes {processor.encode(content)} in "
                f"{output}"
            )
    return report


def original(tokenizer_dir: Path) -> TokenizerReport:
    """The report of a tokenizer that is taken as it is: every token is read and written."""
    data = json.loads((Path(tokenizer_dir) / "tokenizer.json").read_text(encoding="utf-8"))
    added = [token["id"] for token in data.get("added_tokens", [])]
    tokens = max(len(data["model"].get("vocab", ())), *(index + 1 for index in added), 0)
    rows = max(tokens, _embedding_rows(tokenizer_dir))
    return TokenizerReport(tokens, rows, 0, [], [], [], [], [], {})


def plain_text(text: str, replaced: dict[str, str]) -> str:
    """`text` with the characters replaced that the device replaces (`TokenizerReport.replaced`)."""
    return text.translate({ord(char): plain for char, plain in replaced.items()})


def compare_tokenizers(
    tokenizer_dir: Path, sp_model: Path, texts: Sequence[str], replaced: dict[str, str]
) -> dict[str, Any]:
    """`compare_ids` of a SentencePiece model file, on texts made plain as preparation does."""
    import sentencepiece
    import tokenizers

    original = tokenizers.Tokenizer.from_file(str(Path(tokenizer_dir) / "tokenizer.json"))
    device = sentencepiece.SentencePieceProcessor(model_file=str(sp_model))
    plain = [plain_text(text, replaced) for text in texts]
    return compare_ids(original, device.encode(plain), plain)


def compare_ids(
    original: Any, device_ids: Sequence[Sequence[int]], texts: Sequence[str], *, examples: int = 5
) -> dict[str, Any]:
    """Share of texts with the same ids on the device, and why the others differ.

    Args:
        original: the model's own tokenizer (`tokenizers.Tokenizer`).
        device_ids: what the device makes of each text.
        texts: the texts.
        examples: how many differences to show.

    Returns:
        ``texts`` (count), ``identical`` (share, 0 to 1), ``causes`` (cause -> texts, by the first
        difference) and ``examples`` (cause, the text around the difference, both spellings).
        Causes: ``incomplete_utf8`` (the original spells a character with a token that is a part of
        one), ``whitespace`` (runs of blanks), ``merge_order`` (anything else: SentencePiece joins
        any two pieces whose sum is a piece, the original only the pairs on its list).
    """
    causes: Counter[str] = Counter()
    shown: list[dict[str, Any]] = []
    for text, device in zip(texts, device_ids, strict=True):
        ours, theirs = list(device), original.encode(text, add_special_tokens=False).ids
        if ours == theirs:
            continue
        pairs = enumerate(zip(ours, theirs, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        mine, other = ours[at : at + 4], theirs[at : at + 4]
        pieces = [original.decode([i], skip_special_tokens=False) for i in other]
        joined = "".join(pieces[:2])
        if any("\ufffd" in piece for piece in pieces):
            cause = "incomplete_utf8"
        elif any(char.isspace() for char in joined.lstrip(" ")) or joined[:2].isspace():
            cause = "whitespace"
        else:
            cause = "merge_order"
        causes[cause] += 1
        if len(shown) < examples:
            around = original.decode(theirs[max(0, at - 3) : at + 4], skip_special_tokens=False)
            shown.append({"cause": cause, "around": around, "device": mine, "original": other})
    return {
        "texts": len(texts),
        "identical": 1 - causes.total() / max(1, len(texts)),
        "causes": dict(causes.most_common()),
        "examples": shown,
    }
