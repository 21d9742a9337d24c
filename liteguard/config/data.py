"""What may be set of the base model and of the data; what every section has in common."""

from __future__ import annotations

import codecs
import contextlib
import math
import re
from typing import Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from liteguard import shown

LARGEST = 10**12  # no number here can be meant to be larger
_DIGITS = re.compile(r"\s*[-+]?[0-9_]{14,}\s*")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes true for 1, and any number of digits."""
        wanted = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (wanted, *get_args(wanted)):
            raise ValueError(
                "a value is needed, not true or false (YAML reads yes, no, on and off as these)"
            )
        number = value
        if isinstance(value, str) and str not in (wanted, *get_args(wanted)):
            # YAML leaves a long number, and 1e300, as text, which pydantic reads as a number.
            with contextlib.suppress(ValueError):
                number = LARGEST + 1 if _DIGITS.fullmatch(value) else float(value)
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if is_number and math.isfinite(number) and abs(number) > LARGEST:
            raise ValueError(f"larger than {LARGEST:.0e}, which cannot be meant")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _holds_no_secret(cls, value: Any, info: ValidationInfo) -> Any:
        """Values are printed, recorded and sent to trackers. The message does not repeat them."""
        wanted = cls.model_fields[info.field_name or ""].annotation
        texts = value if isinstance(value, list) else [value]
        is_mapping = any(get_origin(kind) is dict for kind in (wanted, *get_args(wanted)))
        if isinstance(value, dict) and is_mapping:
            texts = [*value, *value.values()]
        if any(isinstance(text, str) and shown.without_passwords(text) != text for text in texts):
            raise PydanticCustomError(
                "secret",
                "a key, or a URL with a password or a key in it, and values are printed and "
                "recorded. Put it into an environment variable: HF_TOKEN for the hub, for a judge "
                "the one that api_key_env names",
            )
        return value


class ModelSection(Section):
    name: str = Field("microsoft/phi-2", description="Hub id, or embedded:NAME.")
    path: str | None = Field(None, description="Local directory to use instead of the hub.")
    revision: str | None = Field(None, description="Hub revision (commit, tag or branch).")
    licence: str = Field(
        "", description="Of the base model; goes to the model card and deploy.json."
    )
    quantization: Literal["nf4", "none"] = Field(
        "nf4", description="Storage of the frozen base while training (NF4 + double quantisation)."
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: bfloat16 where the hardware multiplies it, else float32 (float16 on a "
        "GPU without bf16 units, if the model stays in its range; Phi does not).",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="By its name in transformers (attn_implementation)."
    )
    context_length: int = Field(2048, ge=16, description="Longest sequence in tokens.")
    trust_remote_code: bool = Field(
        False, description="Run code that comes with the base model's repository."
    )


def check_split_of_files(split: str | None) -> None:
    """Raise ValueError unless files' names can say it: a hub data set may name others."""
    allowed = (None, "all", "train", "validation", "test")
    if split not in allowed:
        raise ValueError(f"split {split!r} of a local path: allowed are {', '.join(allowed[1:])}")


class SourceSection(Section):
    """One source of rows: a dataset function by name, and where its rows are."""

    dataset: str = Field(
        description="A layout (docs/data.md), an embedded data set, or auto: by the first row's "
        "columns."
    )
    hub: str | None = Field(None, description="Hub dataset id.")
    config_name: str | None = Field(
        None, description="Configuration of a hub dataset, or its folder in a local directory."
    )
    revision: str | None = None
    split: str | None = Field(
        None,
        description="Which of the source's own splits is read: train, validation, test, or all; "
        "a hub dataset may name others, and several with '+'. Default: train of a hub dataset, all "
        "of local files. Rows of its own test and validation splits are never trained on.",
    )
    path: str | None = Field(None, description="Local file or directory, instead of the hub.")
    text_unit: Literal["paragraph", "line"] = Field(
        "paragraph", description="What is one text in a local .txt file (blank lines separate)."
    )
    encoding: str | None = Field(
        None, description="Of local text files, e.g. cp1251; default: UTF-8, or UTF-16."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Our column name -> the source's column name; 'data.answer.text' is inside.",
    )
    limit: int | None = Field(
        None, ge=1, description="Keep at most this many rows; of each split that a hub dataset has."
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="Relative sampling weight within the part, until a source runs out; set for "
        "all sources of a part or for none.",
    )
    opening_tokens: int | None = Field(
        None,
        ge=1,
        description="Train on this many first tokens of an answer only (instruction rows).",
    )
    opening_share: float = Field(
        1.0, gt=0, le=1, description="Share of the rows that opening_tokens applies to."
    )
    open_ended: bool = Field(
        False,
        description="Answers may go on where the rows' end: stage 2 learns no end from them.",
    )
    distill: bool = Field(
        False,
        description="Stage 2 learns what the base model expects at each token of the answers, and "
        "not their words: how it answered is kept, and not sharpened (docs/training.md).",
    )
    phrasings: int = Field(
        1,
        ge=1,
        le=4,
        description="Differently phrased questions for each fact (mondo_questions and the like).",
    )
    kinds: dict[str, PositiveInt] = Field(
        default_factory=dict,
        description="Kind of question -> rows at most; kinds not named are left out. Empty: all. "
        "Balances a mixture, e.g. {definition: 2000, category: 4000, synonyms: 4000}.",
    )
    questions: list[str] = Field(
        default_factory=list,
        description="Question sets that the base model answers itself (self_answers), e.g. "
        "[healthsearchqa, medicationqa]; or path or hub, with a column prompt.",
    )
    max_new_tokens: int = Field(
        96, ge=8, description="Longest answer of self_answers, in tokens; cut at a sentence's end."
    )
    keep_near_duplicates: bool = Field(
        False, description="For rows that were varied on purpose (the safety catalogue)."
    )
    max_broken: float = Field(
        0.01, ge=0, le=1, description="Share of rows that may be broken; more is an error."
    )
    licence: str = ""
    # The file of a self_answers source's answers, once it is known (liteguard/rehearsal.py).
    _answers: str | None = PrivateAttr(None)

    @property
    def answers(self) -> str | None:
        return self._answers

    @answers.setter
    def answers(self, file: str) -> None:
        self._answers = file

    @field_validator("encoding")
    @classmethod
    def _is_an_encoding(cls, name: str | None) -> str | None:
        if name is None:
            return None
        try:
            "".encode(name)
        except LookupError:
            raise ValueError(
                f"unknown encoding {name!r}. Common: cp1252, cp1251, gb18030, utf-16, latin-1"
            ) from None
        return codecs.lookup(name).name

    @model_validator(mode="after")
    def _splits_of_files_are_ours(self) -> SourceSection:
        if self.path:
            check_split_of_files(self.split)
        return self


class DataSection(Section):
    seed: int = Field(0, description="Of the split and of the order of the rows.")
    validation_share: float = Field(
        0.03, gt=0, lt=0.5, description="Share of the entities (diseases) for validation."
    )
    test_share: float = Field(0.07, gt=0, lt=0.5, description="Share of the entities for tests.")
    seen_test_share: float = Field(
        0.03,
        ge=0,
        lt=0.5,
        description="Share of entities whose texts are trained on while all their questions go to "
        "the test split (tier 1, seen); 0: none.",
    )
    min_characters: int = Field(20, ge=1, description="Shorter domain texts are dropped.")
    answer_min_characters: int = Field(
        2, ge=1, description='Shorter answers are dropped: "No" is one, a bare "A" is not.'
    )
    max_characters: int = Field(
        20_000,
        ge=100,
        description="Longer domain texts are cut in pieces at the ends of sentences; longer "
        "questions with their answers are dropped.",
    )
    language: str | None = Field(
        "en",
        pattern="^[a-z]{2,3}$",
        description="Drop texts and answers in other languages (ISO 639-1); null keeps all.",
    )
    near_duplicate_threshold: float | None = Field(
        0.85,
        gt=0,
        le=1,
        description="Drop texts whose words (in threes) are so similar (Jaccard), and answers that "
        "are so similar to one of as similar a question (its words, rare ones counting more); null "
        "keeps them.",
    )
    several_answers: Literal["all", "first", "longest"] = Field(
        "all",
        description="Which answers to one question are kept, of those that differ. All of them are "
        "in one split.",
    )
    question_similarity: float | None = Field(
        0.75,
        gt=0,
        le=1,
        description="Drop rows whose question is so similar (Jaccard of its words, rare ones "
        "counting more) to one of an evaluation set or of the test split; null keeps them.",
    )
    decontaminate: list[str] = Field(
        default_factory=list,
        description="Evaluation sets to keep out: names of public benchmarks, or local files.",
    )
    cache_dir: str = Field(
        ".cache", description="Downloads, cleaned sources, the unpacked base model."
    )
    domain: list[SourceSection] = Field(
        default_factory=list, description="Texts, for stage 1 (at least one source)."
    )
    instruction: list[SourceSection] = Field(
        default_factory=list, description="Questions and answers, for stage 2."
    )
    preference: list[SourceSection] = Field(
        default_factory=list, description="Pairs of a better and a worse answer, for stage 3."
    )

    @model_validator(mode="after")
    def _some_length_is_kept(self) -> DataSection:
        if self.min_characters > self.max_characters:
            raise ValueError(
                f"min_characters {self.min_characters} is more than max_characters "
                f"{self.max_characters}: every row would be dropped"
            )
        return self
