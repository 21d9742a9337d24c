"""LiteGuard: from a small language model to a medical assistant on a phone."""

import importlib
import sys
import warnings
from types import ModuleType, TracebackType

__version__ = "0.1.0"

if sys.platform == "win32":
    # Before the first import that Windows does not have.
    print(
        "error: LiteGuard does not run on Windows itself: the converter and the bundle's runtime "
        "have no Windows build, and file locks, signals and child processes are used as Unix has "
        "them.\nUse WSL 2 (wsl --install), clone the repository inside it, and follow "
        "docs/getting-started.md there.",
        file=sys.stderr,
    )
    raise SystemExit(2)

# Modules that moved into folders; their old names go with the next release.
_MOVED = {
    **dict.fromkeys(("cleaning", "datasets", "near_questions", "preparation"), "data"),
    **dict.fromkeys(("knowledge", "llm_judge", "metrics", "report"), "evaluation"),
    **dict.fromkeys(("packing", "tokens", "tracking", "validation"), "training"),
    **dict.fromkeys(("anatomy", "catalogue", "public_benchmarks"), "embedded"),
}


def __getattr__(name: str) -> ModuleType:
    """`liteguard.metrics` for `liteguard.evaluation.metrics`, and so on."""
    if name not in _MOVED:
        raise AttributeError(f"module 'liteguard' has no attribute {name!r}")
    new = f"liteguard.{_MOVED[name]}.{name}"
    warnings.warn(f"liteguard.{name} is {new} now", DeprecationWarning, stacklevel=2)
    return importlib.import_module(new)


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while libraries are being imported: a line, no traceback; later, cli.run says it."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _end
