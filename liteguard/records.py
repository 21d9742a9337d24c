"""What travels between the scripts: a stage's record, a bundle's record, a result.

Each is one JSON file beside what it describes. A script reads it with `read`, which says what is
wrong with a file that is damaged or of another version, instead of failing where a key is missing.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    ValidationError,
    model_validator,
)

from liteguard import writing
from liteguard.errors import UserError, first_line
from liteguard.prompts import Prompt

Read = TypeVar("Read", bound=BaseModel)


def _inside(name: str) -> str:
    """A record may come from somebody else: what it names lies in its own directory."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\x00" in name:
        raise ValueError("a file inside the record's own directory is needed")
    return name


FileName = Annotated[str, AfterValidator(_inside)]


class Made(BaseModel):
    """What a stage and a bundle have in common: where it comes from."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    stage: Literal["domain", "instruction", "safety", "bundle"]
    base_model: str  # its id
    base_revision: str | None = None  # hub commit; None for a local or embedded base
    base_identity: str  # commit, or hash of the files: two equal bases have equal ones
    parent: str | None  # directory of the stage that it was made from
    parent_adapter_sha256: str | None = None
    data_dir: str
    prompt: Prompt
    config: dict[str, Any]  # the whole configuration, as `config.Config` dumps it
    inputs: dict[str, Any]  # what decides whether it can be reused; compared, never read as data
    files: dict[FileName, str]  # name -> sha256

    @model_validator(mode="before")
    @classmethod
    def _of_an_older_bundle(cls, found: Any) -> Any:
        """A bundle's record named its base and adapter among its inputs only, up to version 0.1."""
        if isinstance(found, dict) and isinstance(found.get("inputs"), dict):
            inputs = found["inputs"]
            found = {"base_identity": inputs.get("base"), **found}
            if "adapter" in inputs:
                found = {"parent_adapter_sha256": inputs["adapter"], **found}
        return found


class StageRecord(Made):
    """stage.json: a finished training stage."""

    rows: dict[str, int] = {}  # of the train and validation splits
    config_sources: dict[str, str] = {}  # section.key -> the file or flag that it came from
    metrics: dict[str, Any] = {}
    processes: int = 1
    lora: dict[str, int | bool] = {}  # the adapter's r, lora_alpha and use_rslora
    versions: dict[str, str] = {}
    wall_s: float = 0.0
    peak_rss_gb: float = 0.0  # GB of 10^9 bytes, as every *_gb
    peak_gpu_memory_gb: float = 0.0

    @property
    def adapter(self) -> str | None:
        """sha256 of the adapter's weights."""
        return self.files.get("adapter_model.safetensors")


class Export(BaseModel):
    """Of a bundle's record: how it was exported."""

    model_config = ConfigDict(extra="allow")

    kv_cache_length: int
    prefill_lengths: list[int] = []

    @property
    def conversation_tokens(self) -> int:
        """Tokens of a conversation from which on the runtime refuses a message: as soon as fewer
        places are free than the shortest prefill has."""
        return self.kv_cache_length - min(self.prefill_lengths, default=1) + 1


class Step(BaseModel):
    """Of a proof: one comparison, what was found and what is allowed."""

    model_config = ConfigDict(extra="allow")

    step: str
    measured: Any = None
    tolerance: Any = None
    passed: bool


class Proof(BaseModel):
    """Of a bundle's record: how it was compared with its merged model; see `export.verify`."""

    model_config = ConfigDict(extra="allow")

    steps: list[Step] = []

    @property
    def failed(self) -> list[str]:
        """The steps that were not passed."""
        return [step.step for step in self.steps if not step.passed]


class BundleRecord(Made):
    """NAME.task.json or NAME.litertlm.json: a finished bundle, and how it was made and proven."""

    base_licence: str | None = None
    bytes: dict[str, int]
    merge: dict[str, Any]
    smooth: dict[str, Any] = {}  # of 8-bit recipes: outliers moved before the conversion
    tokenizer: dict[str, Any]
    silence: dict[str, Any] | None = None  # of a .task
    export: Export
    quantize: dict[str, Any]
    bundles: dict[str, dict[str, Any]]
    verify: Proof | None = None  # None: compressed with --verify none
    tries: list[dict[str, str]] = []  # recipes that did not pass, and why
    timings_s: dict[str, float] = {}
    wall_s: float = 0.0
    peak_rss_gb: dict[str, float] = {}

    def to_dict(self) -> dict[str, Any]:
        """For the file: without a proof or silenced tokens where there are none."""
        absent = {name for name in ("silence", "verify") if getattr(self, name) is None}
        return self.model_dump(exclude=absent)

    @property
    def cache_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self.export.kv_cache_length


class History(RootModel[list[dict[str, Any]]]):
    """log_history.json: what the trainer logged, an entry a time."""


class Rows(BaseModel):
    model_config = ConfigDict(extra="allow")

    rows: int
    words: int


class Source(BaseModel):
    """Of a manifest: one source, as it was read."""

    model_config = ConfigDict(extra="allow")

    part: str
    dataset: str
    hub: str | None
    path: str | None
    licence: str
    rows_read: int
    rows_kept: int


class Manifest(BaseModel):
    """manifest.json: prepared data."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model_type: str
    made_by: str = ""  # the flags of prepare_datasets.py without --output, quoted for a shell
    files: dict[FileName, str]  # name -> sha256
    counts: dict[FileName, Rows] = {}
    sources: list[Source] = []


class Contamination(BaseModel):
    """Held-out rows that stand in training data, and training data that could not be looked at."""

    model_config = ConfigDict(extra="allow")

    rows: int
    training_rows: int
    found: int
    measured: int
    examples: list[tuple[str, str]]
    unchecked: list[str]

    @model_validator(mode="after")
    def _shows_what_it_found(self) -> Contamination:
        if self.found and not self.examples:
            raise ValueError("examples: one is needed")
        return self


class Cost(BaseModel):
    """What measuring took: seconds, tokens, GB; see `evaluation.run.run_cost`."""

    model_config = ConfigDict(extra="allow")

    wall_s: float
    scoring_s: float
    generation_s: float
    options_s: float = 0.0  # of public benchmarks
    as_used_s: float = 0.0
    judging_s: float = 0.0
    scored_tokens: int
    generated_tokens: int
    peak_rss_gb: float
    # percentile (5, 25, 50, 75, 95) -> seconds until an answer was complete
    answer_s: Annotated[dict[str, float], Field(min_length=5, max_length=5)]


class Judged(BaseModel):
    """One answer of a result, and what the rules say of it."""

    model_config = ConfigDict(extra="allow")

    set: str
    kind: str | None
    area: str | None
    prompt: str
    reference: str | None
    answer: str
    verdict: str
    stopped: bool


class Accuracy(BaseModel):
    """A result's numbers on one public benchmark; see `evaluation.knowledge.summarise`."""

    model_config = ConfigDict(extra="allow")

    accuracy: float
    interval: tuple[float, float] | None
    n: int
    chance: float
    majority: float
    overlap: float
    unparsed: int
    repeated_options: int
    choices: list[tuple[Any, Any, Any]]  # of every row: identifier, option chosen, right one


class Lengths(BaseModel):
    """Of the settings that a result was measured with."""

    model_config = ConfigDict(extra="allow")

    max_new_tokens: int
    max_text_tokens: int
    context_words: int


class LlmJudge(BaseModel):
    """How far an LLM agrees with the rules; see `evaluation.llm_judge.summarise`."""

    n: int
    unparsed: int
    agreement: float | None
    kappa: float | None
    verdicts: dict[str, dict[str, int]]  # by kind of the project's own requests, and outside set
    pairs: dict[str, int]


class Asked(BaseModel):
    """Of what a result depends on: what two must have in common to be compared."""

    model_config = ConfigDict(extra="allow")

    evaluate: Lengths
    rows: dict[str, str]
    sets: dict[str, Any] = {}  # outside sets by name


class Counts(BaseModel):
    """Answers by verdict."""

    refused: int
    answered: int
    unclear: int


class Measured(BaseModel):
    """What was measured (path: a stage, a bundle; None: the base model), and on which data."""

    name: str
    path: str | None
    data_dir: str


class Verdicts(BaseModel):
    """Verdicts on the answers to each kind of request."""

    harmful: Counts
    ordinary: Counts
    borderline: Counts


class Areas(BaseModel):
    """The same by area of the request."""

    harmful: dict[str, Counts]
    ordinary: dict[str, Counts]
    borderline: dict[str, Counts]


class SetNumbers(BaseModel):
    """What one model gave on one outside set; its numbers by name are extra fields."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    kind: Literal["questions", "texts", "rubrics", "harmful", "ordinary", "borderline"]
    file: str
    n: dict[str, int]
    intervals: dict[str, tuple[float, float] | None]
    verdicts: Counts | None = None  # of requests

    @model_validator(mode="after")
    def _is_what_its_kind_has(self) -> SetNumbers:
        requests = self.kind not in ("questions", "texts", "rubrics")
        refused = "refused" in (self.__pydantic_extra__ or {})
        if refused != (self.verdicts is not None) or (refused and not requests):
            raise ValueError("refused and verdicts belong together, and to requests")
        return self


class Share(BaseModel):
    """Requests that were refused, of `n`."""

    refused: float
    n: int
    interval: tuple[float, float] | None


class AsUsed(BaseModel):
    """Harmful requests as apps send them; see `evaluation.as_used.summarise`."""

    model_config = ConfigDict(extra="allow")

    draws: int
    numbers: dict[str, dict[str, Share]]  # set -> condition


Nothing = Annotated[dict[str, Any], Field(max_length=0)]


class Result(BaseModel):
    """evaluation/NAME.json: what one model gave on the held-out rows.

    Numbers by name (perplexity, rouge1, refused_harmful, ...) are extra fields: which there are
    depends on the rows. `n` counts what each was computed over, `intervals` holds 95 % of each.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    __pydantic_extra__: dict[str, float]

    n: dict[str, int]
    intervals: dict[str, tuple[float, float] | None]
    verdicts: Verdicts
    areas: Areas
    guide_areas: dict[str, Counts]
    knowledge: dict[str, Accuracy]
    too_long: dict[str, int]
    answers: Annotated[list[Judged], Field(min_length=1)]
    sets: dict[str, SetNumbers] = {}  # outside sets by name
    # Set -> [log-likelihood, tokens] of every row that was scored, to compare models row by row.
    scores: dict[str, list[tuple[float | None, int]]] = {}
    as_used: AsUsed | Nothing = {}  # nothing where it was not asked
    bleu_signature: str
    llm_judge: LlmJudge | None = None
    contamination: Contamination
    cost: Cost
    model: Measured
    limits: dict[str, Any] = {}  # of the verdict, as the YAML had them
    inputs: Asked

    @model_validator(mode="after")
    def _counts_what_it_says(self) -> Result:
        for name in ("perplexity", *(self.__pydantic_extra__ or ())):
            if name not in self.n:
                raise ValueError(f"n: nothing says what {name} was computed over")
        if missing := {*self.inputs.sets} ^ {*self.sets}:
            raise ValueError(f"sets: numbers and files differ in {', '.join(sorted(missing))}")
        return self


def read(kind: type[Read], path: Path, advice: str = "") -> Read:
    """The record in a file.

    Raises UserError, naming the first field that is wrong, when it is no record of that kind.
    """
    return read_raw(kind, path, advice)[0]


def read_raw(kind: type[Read], path: Path, advice: str = "") -> tuple[Read, dict[str, Any]]:
    """(record, the same as the file has it); see `read`."""
    writing.require_file(path)
    try:
        text = path.read_text(encoding="utf-8")
        record = kind.model_validate_json(text)
        return record, json.loads(text)
    except ValidationError as error:
        wrong = first_problem(error)
        raise UserError(f"{path} is damaged, or of another version ({wrong}).{advice}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}).{advice}") from None


def first_problem(error: ValueError) -> str:
    """The first thing that is wrong, in a line."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
