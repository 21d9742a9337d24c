"""The upload to a model hub: one commit, read back and compared before anybody else can see it.

Every request goes through huggingface_hub, with the token of HF_TOKEN or `hf auth login`, which is
never printed. A new repository is private until what the hub has equals what is here.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from liteguard import checkpoints, shown
from liteguard.errors import LiteGuardError, UserError, WorkError, first_line

Result = TypeVar("Result")
_AGAIN = "Run the same command again: what is there already is not sent twice."


class Hub:
    """One repository to publish to. Raises UserError without a token, or with one it refuses."""

    def __init__(self, repository: str) -> None:
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.utils import disable_progress_bars

        check_name(repository)
        self.repository = repository
        self.endpoint = shown.without_passwords(constants.ENDPOINT)
        if constants.HF_HUB_OFFLINE:
            raise UserError("HF_HUB_OFFLINE is set: nothing can be published. Unset it.")
        if not get_token():
            raise UserError(
                f"{self.endpoint} takes files from known accounts only, and there is no token. "
                "Give one that may write, with HF_TOKEN or `hf auth login`."
            )
        if not sys.stderr.isatty():
            disable_progress_bars()
        self.api = HfApi()
        self.account = str(self._try(self.api.whoami)["name"])

    def prepare(self, private: bool) -> tuple[bool, bool]:
        """Make the repository, private, unless it is there.

        Returns whether it was made, and whether it is private.

        Raises UserError where `private` is asked for and a public one is there.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = self.api.repo_info(self.repository)
        except RepositoryNotFoundError:
            self._try(self.api.create_repo, self.repository, private=True)
            return True, True
        except Exception as error:  # noqa: BLE001 - the hub client raises many unrelated classes
            raise self._failure(error) from None
        if private and not info.private:
            raise UserError(
                f"{self.repository} is there and public. Choose another name, or make it private "
                f"on {self.endpoint}/{self.repository}/settings, then run the same command again."
            )
        return False, bool(info.private)

    def send(self, files: Mapping[str, Path], message: str) -> str:
        """Upload files in one commit; returns its 40 digits."""
        from huggingface_hub import CommitOperationAdd

        added = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        made = self._try(self.api.create_commit, self.repository, added, commit_message=message)
        return str(made.oid)

    def check(self, files: Mapping[str, Path], commit: str) -> None:
        """Raise WorkError unless the sha256 of every file at a commit is that of the file here.

        The hub knows the sha256 of large files, which it computed; small ones are read back.
        """
        there = self._try(self.api.get_paths_info, self.repository, [*files], revision=commit)
        large = {entry.path: entry.lfs.sha256 for entry in there if getattr(entry, "lfs", None)}
        differing = []
        with tempfile.TemporaryDirectory() as folder:
            for name, path in files.items():
                remote = large.get(name)
                if remote is None and any(entry.path == name for entry in there):
                    at = {"revision": commit, "local_dir": folder}
                    got = self._try(self.api.hf_hub_download, self.repository, name, **at)
                    remote = checkpoints.sha256_file(Path(got))
                if remote != checkpoints.sha256_file(path):
                    differing.append(f"{name} ({'missing' if remote is None else remote[:12]})")
        if differing:
            raise WorkError(
                f"{self.repository} at {commit[:12]} is not what is here: {', '.join(differing)}.\n"
                f"Do not use that commit. {_AGAIN}"
            )

    def open_to_all(self) -> None:
        """Make the repository public."""
        self._try(self.api.update_repo_settings, self.repository, private=False)

    def _try(self, call: Callable[..., Result], *positional: Any, **named: Any) -> Result:
        try:
            return call(*positional, **named)
        except Exception as error:  # noqa: BLE001
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> LiteGuardError:
        """The one message for a request that failed; an error of the disk is raised as it is."""
        from huggingface_hub import get_token

        if isinstance(error, OSError) and error.errno:
            raise error
        status = getattr(getattr(error, "response", None), "status_code", None)
        detail = f"{type(error).__name__}: {first_line(error)}"
        if token := get_token():
            detail = detail.replace(token, "***")
        what = f"{self.endpoint}/{self.repository}"
        if status in (401, 403, 404):
            return UserError(
                f"{what} may not be written (HTTP {status}). Give a token that may write for "
                f"{self.repository.split('/')[0]}, with HF_TOKEN or `hf auth login`."
            )
        if status == 429 or (status and status >= 500):
            return WorkError(f"{what}: the hub has a failure ({detail}).\nWait. {_AGAIN}")
        return WorkError(f"The upload to {what} broke off ({detail}).\n{_AGAIN}")


def check_name(repository: str) -> None:
    """Raise UserError unless it is OWNER/NAME, as a hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--to {repository}: {first_line(error)}") from None
    if not re.fullmatch(r"[^/]+/[^/]+", repository):
        raise UserError(f"--to {repository}: OWNER/NAME is needed, e.g. --to me/liteguard-phi2")


def listing(files: Mapping[str, Path]) -> str:
    """What would go up: size, the sha256's first digits, name."""
    lines = []
    for name, path in files.items():
        size = path.stat().st_size
        shown = f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size:,} bytes"
        lines.append(f"  {shown:>14}  {checkpoints.sha256_file(path)[:12]}  {name}")
    return "\n".join(lines)
