"""Bringing a saved model to the hub: refused early where that cannot work, and nothing is lost where it fails."""

from __future__ import annotations

import shlex
from pathlib import Path

from fasp_lightning.errors import FaspError, FaspOSError, as_refusal, one_line

WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]
"""Files of an earlier upload that would be read beside, or instead of, those of this one."""


def check_hub(repository: str | None, private: bool | None = None) -> None:
    """Refuse, before anything is spent, an upload that cannot work; asks the hub who the user is.

    Args:
        repository: Id of the repository, ``None`` for no upload.
        private: Whether it shall be private.

    Raises:
        FaspError: If that is no id, or no token is known here.
        FaspOSError: If the hub cannot be reached, or does not take the token.
    """
    if repository is None:
        if private is not None:
            raise FaspError(f"private is for push_to_hub alone, got {private} without it; name the repository there")
        return
    from huggingface_hub import HfApi, get_token, is_offline_mode
    from huggingface_hub.utils import validate_repo_id

    reason = "push_to_hub must be the id of a repository, such as 'me/model'"
    with as_refusal(lambda error: FaspError(f"{reason}, got {repository!r}: {one_line(error)}")):
        validate_repo_id(repository)
    if is_offline_mode():
        raise FaspError("push_to_hub must be None where HF_HUB_OFFLINE is set; unset that, or leave it out")
    if get_token() is None:
        raise FaspError("push_to_hub needs a token that may write, got none; run `hf auth login`, or set HF_TOKEN")

    with as_refusal(lambda error: FaspOSError(f"the hub does not take an upload to {repository!r}: {one_line(error)}")):
        HfApi().whoami()


def upload(folder: Path, repository: str, private: bool | None = None) -> str:
    """Make the repository if there is none, and upload a folder to it, in one commit.

    What an upload that was interrupted has brought to the hub is not sent again by the next one.

    Args:
        folder: The folder.
        repository: Id of the repository.
        private: Whether to make it private; ``None`` is the user's default, and one that is there stays as it is.

    Returns:
        Its address.

    Raises:
        FaspOSError: If it fails; the message names the command that goes on.
    """
    from huggingface_hub import HfApi

    command = f"hf upload {repository} {shlex.quote(str(folder))} ." + (" --private" if private else "")

    def refusal(error: Exception) -> FaspOSError:
        return FaspOSError(
            f"the model is saved in {str(folder)!r}, but not uploaded to {repository!r}: {one_line(error)}; "
            f"`{command}` does that, and sends no weights again that have arrived"
        )

    with as_refusal(refusal):
        made = HfApi().create_repo(repository, private=private, exist_ok=True)
        HfApi().upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message="Model pruned with fasp_lightning",
            delete_patterns=WEIGHTS,
        )
    return str(made.url)
