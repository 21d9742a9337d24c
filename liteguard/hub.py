"""Repositories of a model hub: which commit, which files, and what to say when it does not work.

Every request goes through huggingface_hub, so its own settings hold: a token from HF_TOKEN or
`hf auth login`, HF_HOME (where downloads are kept), HF_HUB_OFFLINE, HF_ENDPOINT (another hub).
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from liteguard import shown
from liteguard.errors import LiteGuardError, UserError, WorkError, first_line
from liteguard.progress import ticking

# Some repositories have all weights twice, or only once, in their maker's own layout.
_MAKERS_OWN = "consolidated"
# What a model needs beside its weights: configuration, tokenizer, chat template.
_MODEL_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True)
class Repository:
    """A model or data set of the hub, and the branch, tag or commit asked for (None: its main)."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str | None = None

    def __post_init__(self) -> None:
        folder = Path(self.name)
        if self.kind == "dataset" and folder.is_dir() and not folder.is_absolute():
            # The datasets library would read that, whatever the revision, and call it the hub's.
            raise UserError(
                f"hub: {self.name} is also the name of a folder here. Write `path:` to read that, "
                "or run from another directory."
            )

    def __str__(self) -> str:
        return f"the {'base model' if self.kind == 'model' else 'dataset'} {self.name!r}"


# What this run knows: asked for once, or recorded by the work that it continues.
_COMMITS: dict[Repository, str] = {}


def remember(repository: Repository, commit: str | None) -> None:
    """Take a commit that earlier work resolved: a new one upstream then changes nothing."""
    if commit:
        _COMMITS[repository] = commit


def follow(kind: Literal["model", "dataset"], name: Any, revision: Any, commit: Any) -> None:
    """`remember` what a record says, which may be damaged: nothing where one of them is no text."""
    texts = isinstance(name, str) and isinstance(revision, str | None) and isinstance(commit, str)
    if texts and name:
        remember(Repository(kind, name, revision), commit)


def commit(repository: Repository) -> str:
    """The commit (40 hex digits) that the revision stands for; it is resolved once.

    When the hub is out of reach: what it stood for when this machine last asked. Raises UserError
    when that is not known, and for everything else that `failure` explains.
    """
    if repository in _COMMITS:
        return _COMMITS[repository]
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # of small files; a model's are shown
    name, kind = repository.name, repository.kind
    try:
        found = HfApi().resolve_revision(name, repo_type=kind, revision=repository.revision)
    except Exception as error:  # noqa: BLE001 - the hub client raises many unrelated classes
        raise failure(repository, error) from None
    print(f"{kind} {name}: commit {found.resolved}")
    remember(repository, found.resolved)
    return found.resolved


def model_directory(repository: Repository, commit: str, trust_remote_code: bool = False) -> Path:
    """Directory with a model's files at a commit, downloaded unless the cache has them.

    Only safetensors and text files of the top folder are taken; code only if it is trusted.
    """
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    repository = replace(repository, revision=commit)
    try:
        sizes = _listing(repository, commit)
    except Exception as error:  # noqa: BLE001
        raise failure(repository, error) from None
    _check_model_files(repository, [*sizes])
    kinds = (*_MODEL_FILES, ".py") if trust_remote_code else _MODEL_FILES
    wanted = [f for f in sizes if f.endswith(kinds) and not f.startswith(_MAKERS_OWN)]
    missing = [
        file
        for file in wanted
        if not isinstance(try_to_load_from_cache(repository.name, file, revision=commit), str)
    ]
    if missing and not constants.HF_HUB_OFFLINE:
        size = shown.size(sum(sizes[file] for file in missing))
        print(f"downloading {repository.name}: {size} into {constants.HF_HUB_CACHE}")
    bars = missing and sys.stderr.isatty()
    (enable_progress_bars if bars else disable_progress_bars)()
    try:
        with contextlib.nullcontext() if bars else ticking(f"downloading {repository.name}"):
            found = snapshot_download(repository.name, revision=commit, allow_patterns=wanted)
    except Exception as error:  # noqa: BLE001
        raise failure(repository, error, "The download of") from None
    _check_shards(repository, Path(found))
    return Path(found)


def _listing(repository: Repository, commit: str) -> dict[str, int]:
    """File name -> bytes of the top folder at a commit; from the cache where that knows it."""
    from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    name = repository.name
    try:
        entries = get_cached_repo_tree(name, revision=commit)
    except CachedRepoTreeNotFoundError:
        if constants.HF_HUB_OFFLINE:  # a cache that another program filled
            folder = Path(snapshot_download(name, revision=commit, local_files_only=True))
            return {file.name: file.stat().st_size for file in folder.iterdir()}
        entries = HfApi().list_repo_tree(name, revision=commit)
    sizes = {entry.path: getattr(entry, "size", None) for entry in entries}
    # Folders have no size.
    return {path: size for path, size in sizes.items() if size is not None and "/" not in path}


def _check_model_files(repository: Repository, files: list[str]) -> None:
    """Raise UserError for a repository that cannot be a base model, before it is downloaded."""
    if "config.json" not in files:
        raise UserError(
            f"{repository} has no config.json, so it is not a transformers model (an adapter, or a "
            f"GGUF file?). It has: {', '.join(sorted(files)[:10])}\n"
            "Name the original model's repository."
        )
    found = [file for file in files if file.endswith(".safetensors")]
    if found and all(file.startswith(_MAKERS_OWN) for file in found):
        raise UserError(
            f"{repository} has its weights only in its maker's own layout ({found[0]}), which "
            "transformers does not read.\nName the repository with the converted model (its name "
            "often ends in -hf), or a converted copy on this machine: --set "
            "model.path=/path/to/the/model"
        )
    if not found:
        weights = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5"))]
        raise UserError(
            f"{repository} holds no .safetensors file, only {', '.join(weights) or 'no weights'}: "
            "pickled weights can run code when they are opened, so they are not loaded.\n"
            "Ways on:\n"
            "  - a revision that has them, if its owner or the hub has converted it: "
            "--set model.revision=refs/pr/NUMBER\n"
            "  - a converted copy on this machine: --set model.path=/path/to/the/model"
        )


def _check_shards(repository: Repository, directory: Path) -> None:
    """Raise UserError when the weights' index names files that are not there."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        named = {name for name in named if isinstance(name, str)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # model_files.check_base says what is wrong with it
    missing = sorted(file for file in named if not (directory / file).is_file())
    if missing:
        raise UserError(
            f"{repository} is incomplete in {directory}: {', '.join(missing)} not there.\n"
            "Run the same command once without HF_HUB_OFFLINE; if that does not help, the "
            "repository itself lacks them."
        )


# --- what to say ----------------------------------------------------------------------------------
_WAYS_ON = {
    "model": "  - a local copy of the model: --set model.path=/path/to/the/model\n",
    "dataset": "  - a local copy of the data: set 'path:' of this source in the YAML to a file or "
    "directory\n    (a base model can be local too: --set model.path=/path/to/the/model)\n",
}
_AGAIN = "Run the same command again: what is complete is kept."


def failure(repository: Repository, error: Exception, doing: str | None = None) -> LiteGuardError:
    """The one message for a request of the hub client that failed.

    A UserError for what the user can put right; a WorkError for a hub in trouble, and for a
    connection that was lost while `doing` something ("The download of"). An error of the disk is
    raised as it is.
    """
    from huggingface_hub import constants, errors

    if isinstance(error, OSError) and error.errno:
        raise error
    causes = [*_causes(error)]
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    detail = f"{type(root).__name__}: {first_line(root)}"
    status = next(
        (e.response.status_code for e in causes if isinstance(e, errors.HfHubHTTPError)), None
    )
    known = _denied(repository, causes, status) or _without_rows(repository, error)
    if known:
        return UserError(known)
    ways = "Ways on:\n" + _WAYS_ON[repository.kind]
    ways += "  - the embedded default, which needs no hub: --model_type smollm2"
    if constants.HF_HUB_OFFLINE:
        return UserError(
            f"HF_HUB_OFFLINE is set, and {repository} is not (or not whole) in the cache "
            f"{constants.HF_HUB_CACHE}.\n"
            f"Run the same command once without HF_HUB_OFFLINE, or:\n{ways}"
        )
    if status == 429:
        return WorkError(
            f"{constants.ENDPOINT} refuses {repository} for now: too many requests (429).\n"
            f"Wait some minutes. {_AGAIN} A token (HF_TOKEN or `hf auth login`) allows more."
        )
    if status and status >= 500:
        return WorkError(f"{constants.ENDPOINT} has a failure ({detail}).\nWait. {_AGAIN}")
    if doing:
        return WorkError(f"{doing} {repository} broke off ({detail}).\n{_AGAIN}")
    return UserError(f"Could not reach {repository} on the model hub ({detail}).\n{ways}")


def _without_rows(repository: Repository, error: Exception) -> str | None:
    """What to say of a dataset that is a script, or has no files of a kind that can be read."""
    told = first_line(error)
    if "scripts are no longer supported" not in told and (
        type(error).__name__ not in ("DataFilesNotFoundError", "EmptyDatasetError")
    ):
        return None
    return (
        f"{repository} has no rows that can be read without running code of its own ({told[:300]})."
        "\nMost such datasets were converted: write `revision: refs/convert/parquet` in this "
        "source's entry in the YAML, or load its files and write `path:` instead of `hub:`."
    )


def _denied(repository: Repository, causes: list[BaseException], status: int | None) -> str | None:
    """What to say when the hub answered that there is no such thing, or not for this user."""
    from huggingface_hub import constants, errors, get_token

    def caused_by(kind: type[BaseException]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    page = f"{constants.ENDPOINT}/{'datasets/' * (repository.kind == 'dataset')}{repository.name}"
    log_in = "Give a token of an account that may, with HF_TOKEN or `hf auth login`."
    sent = "The token that was sent may not read it." if get_token() else "No token was sent."
    if caused_by(errors.HFValidationError):
        return f"{repository} is not the name of a repository: OWNER/NAME ({causes[0]})."
    # The datasets library keeps no cause; that the repository is there was seen before.
    gated = any(type(cause).__name__ == "DatasetNotFoundError" for cause in causes)
    if gated or caused_by(errors.GatedRepoError):
        return (
            f"{repository} is gated: its owner gives access to those who ask for it. {sent}\n"
            f"Accept the terms on {page}, then run the same command again.\n{log_in}"
        )
    if caused_by(errors.RevisionNotFoundError):
        return (
            f"{repository} has no revision {repository.revision!r}. Allowed: a branch, a tag or a "
            f"commit (40 hex digits) of {page}\nCorrect `revision`, or leave it out for the newest."
        )
    if caused_by(errors.RepositoryNotFoundError):
        return (
            f"{repository} is not on {constants.ENDPOINT}, or it is private. {sent}\n"
            f"Check the name. If it is private: {log_in}"
        )
    if status in (401, 403):
        return f"{page} may not be read (HTTP {status}). {sent}\n{log_in}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it came from, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
