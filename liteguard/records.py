"""What travels between the scripts: a stage's record, a bundle's record, a result.

Each is one JSON file beside what it describes. A script reads it with `read`, which says what is
wrong with a file that is damaged or of another version, instead of failing where a key is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from liteguard.errors import UserError
from liteguard.prompts import Prompt

Read = TypeVar("Read", bound=BaseModel)


class Made(BaseModel):
    """What a stage and a bundle have in common: where it comes from."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    stage: str  # domain, instruction, safety or bundle
    base_model: str  # its id
    base_revision: str | None = None  # hub commit; None for a local or embedded base
    base_identity: str  # commit, or hash of the files: two equal bases have equal ones
    parent: str | None  # directory of the stage that it was made from
    parent_adapter_sha256: str | None = None
    data_dir: str
    prompt: Prompt
    config: dict[str, Any]  # the whole configuration, as `config.Config` dumps it
    inputs: dict[str, Any]  # what decides whether it can be reused; compared, never read as data
    files: dict[str, str]  # name -> sha256

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
    versions: dict[str, str] = {}
    wall_s: float = 0.0
    peak_rss_gb: float = 0.0  # GB of 10^9 bytes, as every *_gb
    peak_gpu_memory_gb: float = 0.0

    @property
    def adapter(self) -> str | None:
        """sha256 of the adapter's weights."""
        return self.files.get("adapter_model.safetensors")


class BundleRecord(Made):
    """NAME.task.json or NAME.litertlm.json: a finished bundle, and how it was made and proven."""

    base_licence: str | None = None
    bytes: dict[str, int]
    merge: dict[str, Any]
    tokenizer: dict[str, Any]
    silence: dict[str, Any] | None = None  # of a .task
    export: dict[str, Any]
    quantize: dict[str, Any]
    bundles: dict[str, dict[str, Any]]
    verify: dict[str, Any] | None = None  # None: compressed with --verify none
    tries: list[dict[str, str]] = []  # recipes that did not pass, and why
    timings_s: dict[str, float] = {}
    wall_s: float = 0.0
    peak_rss_gb: dict[str, float] = {}

    @property
    def cache_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self.export["kv_cache_length"]


class Contamination(BaseModel):
    """Held-out rows that stand in training data, and training data that could not be looked at."""

    model_config = ConfigDict(extra="allow")

    unchecked: list[str]


class Cost(BaseModel):
    """What measuring took: seconds, tokens, GB; see `evaluation.run.run_cost`."""

    model_config = ConfigDict(extra="allow")

    wall_s: float
    answer_s: dict[str, float]  # percentile -> seconds until an answer was complete


class Measured(BaseModel):
    """What was measured (path: a stage, a bundle; None: the base model), and on which data."""

    name: str
    path: str | None
    data_dir: str


class SetNumbers(BaseModel):
    """What one model gave on one outside set; its numbers by name are extra fields."""

    model_config = ConfigDict(extra="allow")

    kind: str
    file: str
    n: dict[str, int]
    intervals: dict[str, Any]


class Result(BaseModel):
    """evaluation/NAME.json: what one model gave on the held-out rows.

    Numbers by name (perplexity, rouge1, refused_harmful, ...) are extra fields: which there are
    depends on the rows. `n` counts what each was computed over, `intervals` holds 95 % of each.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    n: dict[str, int]
    intervals: dict[str, Any]
    verdicts: dict[str, dict[str, int]]
    areas: dict[str, dict[str, dict[str, int]]]
    guide_areas: dict[str, dict[str, int]]
    knowledge: dict[str, Any]
    too_long: dict[str, int]
    answers: list[dict[str, Any]]
    sets: dict[str, SetNumbers] = {}  # outside sets by name
    # Set -> [log-likelihood, tokens] of every row that was scored, to compare models row by row.
    scores: dict[str, list[tuple[float | None, int]]] = {}
    contamination: Contamination
    cost: Cost
    model: Measured
    limits: dict[str, Any] = {}  # of the verdict, as the YAML had them
    inputs: dict[str, Any]


def read(kind: type[Read], path: Path, advice: str = "") -> Read:
    """The record in a file.

    Raises UserError, naming the first field that is wrong, when it is no record of that kind.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        wrong = first_problem(error)
        raise UserError(f"{path} is damaged, or of another version ({wrong}).{advice}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}).{advice}") from None


def first_problem(error: ValueError) -> str:
    """The first thing that is wrong, in a line."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
