"""The HuggingFace hub: models that come from there and folders that go there.

All through huggingface_hub, which reads HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE and keeps what it loaded.
"""

from __future__ import annotations

import json
from pathlib import Path

from dsclip.convert import openclip
from dsclip.errors import UserError

# What says what a model is: configuration, preprocessing, tokenizer. No pickle, no code.
DESCRIBING = ["*.json", "*.txt", "*.model"]
INDEX = "model.safetensors.index.json"


def local_path(model: str | Path, *, weights: bool) -> Path:
    """Where a model lies on this machine: a path as it is; `hf:NAME` and `openclip:NAME`, with or without `@REVISION`, after loading.

    hf: a repository in transformers' layout; openclip: in OpenCLIP's, also beside the other. weights: whether they are
    loaded too. Raises UserError for names that the hub doesn't have, and where it can't be reached and nothing is kept.
    """
    layout = layout_on_hub(model)
    if layout is None:
        return Path(model)
    repository, _, revision = str(model).partition(":")[2].partition("@")
    check_repository(repository)
    wanted = "config.json" if layout == "hf" else openclip.CONFIG
    folder = _loaded(repository, revision, DESCRIBING)
    if not (folder / wanted).is_file():
        raise UserError(f"{model}: the repository has no {wanted}; write hf:NAME or openclip:NAME, as its files are")
    if weights and layout == "hf":
        index = json.loads((folder / INDEX).read_text(encoding="utf-8")) if (folder / INDEX).is_file() else {}
        _loaded(repository, revision, sorted(set(index.get("weight_map", {}).values())) or ["model.safetensors"])
    elif weights:
        for file in openclip.WEIGHT_FILES:
            if (_loaded(repository, revision, [file]) / file).is_file():
                return folder / file
    return folder


def layout_on_hub(model: str | Path) -> str | None:
    """`hf` or `openclip` for a model on the hub, None for a path."""
    layout, colon, _ = str(model).partition(":")
    return layout if colon and layout in ("hf", "openclip") else None


def _loaded(repository: str, revision: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises its own, those of its HTTP client and plain ones
        raise UserError(f"{repository} can't be loaded from the hub: {first_line(error)}") from error


def check_repository(name: str) -> None:
    """Raises UserError for what can't be a repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{name} is no name of a repository on the hub, such as NAME/MODEL: {first_line(error)}"
        ) from error


def check_token(repository: str) -> None:
    """Raises UserError when this machine has no token for the hub, without which nothing can be pushed."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(
            f"--push {repository}: there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN"
        )


def push_folder(folder: Path, repository: str) -> str:
    """Uploads the folder's files in one go and returns the repository's address; one that isn't there is made, and private.

    Needs a token, see `check_token`. Raises UserError when the hub can't be reached or refuses; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = str(api.create_repo(repository, private=True, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Converted by dsclip")
    except Exception as error:  # the hub's client raises its own, those of its HTTP client and plain ones
        raise _not_pushed(folder, repository, first_line(error)) from error
    return address


def _not_pushed(folder: Path, repository: str, reason: str) -> UserError:
    return UserError(
        f"{folder} is written and was not pushed to {repository}: {reason}. Push it later with: hf upload {repository} {folder}"
    )


def first_line(error: Exception) -> str:
    """What an exception says, in a line without its last full stop; of a hub's answer, its own words and the status."""
    if said := getattr(error, "server_message", None):
        return f"{' '.join(str(said).split()).rstrip('.')} (HTTP {error.response.status_code})"  # type: ignore[attr-defined]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
