"""What can run on this machine and why not: one line for each thing, and what to do about it.

    python doctor.py
    python doctor.py --only train
    python doctor.py --offline
    python doctor.py --compress_python /opt/converter/bin/python

Looks at Python, torch's build against the GPU's driver, bfloat16, memory (a container's limit,
too), disk, the model hub and its token, every package of the requirements, what the converter is
called by, and the cache. Nothing is downloaded, changed or sent but two small requests to the hub;
a token is never shown. It needs nothing installed. Lines begin with ok, note (it works; worth
knowing) or missing (a script will not run, or not as it should), and end with the remedy.

Exit code 0: all that is needed can run; 1: something is missing. No hub is no failure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from liteguard import doctor


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        choices=("train", "all"),
        default="all",
        help="train: what preparing, training and measuring checkpoints need; default: all",
    )
    parser.add_argument(
        "--compress_python", metavar="PATH", help="the converter's environment (compress.python)"
    )
    parser.add_argument("--cache", metavar="DIR", default=".cache", help="data.cache_dir")
    parser.add_argument("--offline", action="store_true", help="do not ask the hub")
    parser.add_argument(
        "--timeout", metavar="S", type=float, default=3.0, help="seconds that the hub has to answer"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    doctor.as_environment()
    findings = []
    for finding in doctor.examine(
        args.only, args.compress_python, Path(args.cache), args.offline, args.timeout
    ):
        print(finding, flush=True)
        findings.append(finding)
    print(f"\n{doctor.verdict(findings)}")
    return int(any(finding.state == "missing" for finding in findings))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
