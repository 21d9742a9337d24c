"""What lies in a bundle's file: the model in a `.task` or `.litertlm`, and its unpacked weights."""

from __future__ import annotations

import contextlib
import glob
import mmap
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from liteguard import shown
from liteguard.errors import UserError, first_line
from liteguard.machine import is_alive

TASK_MODEL = "TF_LITE_PREFILL_DECODE"


def tflite_model(bundle: Path) -> memoryview:
    """The TFLite model inside a `.task` or `.litertlm`, mapped into memory.

    Raises:
        UserError: not a bundle of these kinds, or without a prefill and decode model.
    """
    bundle = Path(bundle)
    start: int | None = None
    size: int | None = None
    if bundle.suffix == ".litertlm":
        start, size = _litertlm_section(bundle)
    else:
        try:
            with zipfile.ZipFile(bundle) as archive:
                member = archive.getinfo(TASK_MODEL)
                if member.compress_type == zipfile.ZIP_STORED:
                    with bundle.open("rb") as file:
                        # 30 bytes, the name and an extra field stand before the content.
                        file.seek(member.header_offset + 26)
                        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
                    start, size = member.header_offset + 30 + name + extra, member.file_size
        except (zipfile.BadZipFile, KeyError, NotImplementedError, ValueError) as error:
            raise UserError(f"{bundle} is not a .task file: {error}") from error
    if start is None or size is None:
        raise UserError(f"{bundle} holds no uncompressed prefill and decode model")
    if size < 0 or start + size > bundle.stat().st_size:
        raise UserError(f"{bundle} is cut short: its model reaches beyond the end of the file")
    with bundle.open("rb") as handle:
        content = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    return memoryview(content)[start : start + size]


def lengths(bundle: Path) -> tuple[int, list[int]]:
    """(tokens of the KV cache, prefill lengths in order) of the model in a bundle.

    Raises UserError as `tflite_model`.
    """
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(tflite_model(bundle), 0)
    room, prefills = 0, []
    for number in range(model.SignatureDefsLength()):
        signature = model.SignatureDefs(number)
        kind, _, length = signature.SignatureKey().decode().partition("_")
        if kind == "prefill" and length.isdigit():
            prefills.append(int(length))
        for place in range(signature.InputsLength() if kind == "decode" else 0):
            if signature.Inputs(place).Name() == b"mask":
                graph = model.Subgraphs(signature.SubgraphIndex())
                room = int(graph.Tensors(signature.Inputs(place).TensorIndex()).ShapeAsNumpy()[-1])
    return room, sorted(prefills)


def _litertlm_section(bundle: Path) -> tuple[int | None, int | None]:
    """(offset, size) of the prefill and decode model in a `.litertlm`, None where there is none."""
    from litert_lm_builder import litertlm_core
    from litert_lm_builder import litertlm_header_schema_py_generated as schema

    with bundle.open("rb") as handle:
        start = handle.read(litertlm_core.HEADER_BEGIN_BYTE_OFFSET)
        if not start.startswith(b"LITERTLM"):
            raise UserError(f"{bundle} is not a .litertlm file")
        handle.seek(litertlm_core.HEADER_END_LOCATION_BYTE_OFFSET)
        end = int.from_bytes(handle.read(8), "little")
        handle.seek(litertlm_core.HEADER_BEGIN_BYTE_OFFSET)
        header = handle.read(max(0, min(end, bundle.stat().st_size) - handle.tell()))
    try:
        objects = schema.LiteRTLMMetaData.GetRootAs(header, 0).SectionMetadata()
        for index in range(objects.ObjectsLength()):
            section = objects.Objects(index)
            if section.DataType() == schema.AnySectionDataType.TFLiteModel:
                return section.BeginOffset(), section.EndOffset() - section.BeginOffset()
    except (struct.error, IndexError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{bundle} has a damaged header ({first_line(error)})") from error
    return None, None


def unpacked_size(stored: float, recipe: str) -> float:
    """Bytes of weights that take `stored` bytes in a recipe's file, as the runtime unpacks them:
    of those in 4 and 8 bits as many, unless they are multiplied in float32."""
    return stored * {"int8_weight_only": 4, "fp16": 2}.get(recipe, 1)


def require_disk(bundle: Path, recipe: str, scores: bool = True) -> None:
    """Raise UserError where the disk has no room for what `unpacked_weights` will hold.

    `scores`: whether texts are scored, too: that reads a copy of the model (`scorer.Scorer`).
    """
    size, place = bundle.stat().st_size, _place(bundle)
    needed, free = unpacked_size(size, recipe) + scores * size, shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{bundle.name} is unpacked in {place}: about {shown.size(needed)} of disk, "
            f"and {shown.size(free)} is free.\nFree some space, or copy the bundle and its record "
            "to a disk that has it."
        )


def _place(bundle: Path) -> Path:
    """Where weights are unpacked: beside the bundle, where that can be written to."""
    return bundle.parent if os.access(bundle.parent, os.W_OK) else Path(tempfile.gettempdir())


@contextlib.contextmanager
def unpacked_weights(bundle: Path) -> Iterator[Path]:
    """A folder for the weights of a bundle as this processor reads them; removed at the end.

    LiteRT keeps them in a file that all signatures and processes map. Without it each signature
    holds its own copy: Phi-2 with 8 bits and three prefill lengths took 13.4 GB instead of 3.8, and
    20 seconds to open instead of 7. It lies beside the bundle, where its space was planned for, or
    in the system's temporary folder where that cannot be written to.
    """
    place = _place(bundle)
    prefix, suffix = f".{bundle.name}.", ".unpacked"
    for left in place.glob(f"{glob.escape(prefix)}*{suffix}"):
        process = left.name.removeprefix(prefix).split("-")[0]
        if process.isdigit() and not is_alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", suffix=suffix, dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
