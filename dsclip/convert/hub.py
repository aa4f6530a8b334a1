"""The HuggingFace hub: folders that go there, through huggingface_hub, which reads HF_TOKEN, HF_ENDPOINT and HF_HOME."""

from __future__ import annotations

from pathlib import Path

from dsclip.errors import UserError


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


def push_folder(folder: Path, repository: str) -> str:
    """Uploads the folder's files in one go and returns the repository's address; one that isn't there is made, and private.

    Raises UserError when the hub can't be reached or refuses; the folder stays as it is.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise _not_pushed(
            folder, repository, "there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN"
        )
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
