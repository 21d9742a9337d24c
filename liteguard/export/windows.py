"""Windows of attention that no conversation on a device is long enough to reach.

A token looks back no further than the KV cache. A window at least as long as the cache (Phi-3-mini:
2,047 tokens) therefore changes nothing there, and the converter, which has no mask for a window in
all layers, may read a configuration without it. Training and evaluation keep the model's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liteguard import writing

# The converter has a mask for this family's window.
_MASKED = ("mistral",)


def everywhere(settings: Mapping[str, Any]) -> int:
    """Tokens that all layers of a config.json look back, where the converter has no mask for it; 0
    without such a window."""
    if settings.get("model_type") in _MASKED or settings.get("layer_types"):
        return 0
    return settings.get("sliding_window") or 0


def without_unreachable(model_dir: Path, folder: Path, room: int) -> Path:
    """A model's directory for the converter: `model_dir`, or, where its window is not reached
    within `room` tokens, a new `folder` of links with a config.json that has none."""
    settings = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    if not room <= everywhere(settings):
        return model_dir
    folder.mkdir()
    for path in model_dir.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    writing.write_json(folder / "config.json", {**settings, "sliding_window": None})
    return folder
