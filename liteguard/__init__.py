"""LiteGuard: from a small language model to a medical assistant on a phone."""

import sys
from types import TracebackType

__version__ = "0.1.0"


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while libraries are being imported: a line, no traceback; later, cli.run says it."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _end
