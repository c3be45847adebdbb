"""Uploads to the Hugging Face hub: one call, and errors that say what to do next.

huggingface_hub retries what may pass and does not send again what the hub has already, so an
interrupted upload is finished by repeating it. Tokens go to the hub and appear nowhere else.
"""

from __future__ import annotations

import glob
import json
import shlex
from pathlib import Path
from typing import Any

from .errors import HubError, OutputError
from .output_rules import PLAN_FILE
from .utils import logger

WEIGHTS = (".safetensors", ".bin", ".index.json")  # what transformers would load


def push_to_hub(
    folder: str | Path, repo_id: str, *, private: bool = True, token: str | None = None
) -> str:
    """Upload an output folder of llm_pruner to a model repository on the hub.

    Creates the repository if need be; an existing one keeps its visibility. One commit, unless the
    folder has hundreds of files, adds the new files and deletes weights of an earlier upload, which
    could be loaded in their place; other files stay. Files that the hub has already are skipped,
    so the same call finishes an interrupted upload.

    Args:
        folder: a finished output; it is only read.
        repo_id: ``user/name`` or ``organization/name``.
        private: whether a new repository is private.
        token: a token with write access; None for that of ``HF_TOKEN`` or ``hf auth login``.

    Returns:
        The repository's URL.

    Raises:
        OutputError: the folder is no finished output; nothing was sent.
        HubError: the upload failed; the message says why and what to do.
    """
    path = Path(folder).expanduser()
    if not (path / PLAN_FILE).is_file():
        raise OutputError(
            f"{str(path)!r} has no {PLAN_FILE}, so it is no finished output of llm_pruner: give "
            "the folder that was written with --output."
        )
    message = "Upload a model pruned by llm_pruner"
    hint = how_to_repeat(path, repo_id, private=private)
    return upload(path, repo_id, "model", message, private=private, token=token, hint=hint)


def how_to_repeat(folder: str | Path, repo_id: str, *, private: bool = True) -> str:
    """Where the result is, and the command that repeats the upload."""
    more = "" if private else ", private=False"
    call = f"push_to_hub({json.dumps(str(folder))}, {json.dumps(repo_id)}{more})"
    command = shlex.join(["python", "-c", f"from llm_pruner import push_to_hub; {call}"])
    return f"The result is in {str(folder)!r}. To repeat the upload alone: {command}"


def check_upload(repo_id: str, repo_type: str = "model", token: str | None = None) -> str:
    """Check what can be checked without the hub; returns the token to upload with.

    Raises:
        HubError: the id is not valid, there is no token, or the hub is switched off.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    secret = (token or "").strip()
    try:
        validate_repo_id(repo_id)
        secret = secret or get_token() or ""
        if not secret:
            raise LocalTokenNotFoundError("No token was found.")
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set.")
    except failures() as error:
        raise _explained(error, f"{repo_type} {repo_id!r}", secret) from None
    return secret


def upload(
    folder: Path,
    repo_id: str,
    repo_type: str,
    message: str,
    *,
    private: bool,
    token: str | None,
    hint: str = "",
) -> str:
    """Commit a folder to a repository, which is created if need be; returns its URL.

    Args:
        repo_type: ``model`` or ``dataset``.
        hint: what an error message ends with.

    Raises:
        HubError: the upload failed; the message says why and what to do.
    """
    from huggingface_hub import HfApi

    secret = check_upload(repo_id, repo_type, token)
    api = HfApi(token=secret)
    try:
        url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        repo: Any = api.repo_info(url.repo_id, repo_type=repo_type)
        if private and not repo.private:
            logger.warning("%s already exists and stays public.", url)
        names = [entry.rfilename for entry in repo.siblings or () if repo_type == "model"]
        stale = [name for name in names if "/" not in name and name.endswith(WEIGHTS)]
        api.upload_folder(
            repo_id=url.repo_id,
            repo_type=repo_type,
            folder_path=folder,
            commit_message=message,
            delete_patterns=[glob.escape(name) for name in stale],  # what is uploaded anew stays
        )
    except failures() as error:  # no traceback: it could show the token
        raise _explained(error, f"{repo_type} {repo_id!r}", secret, hint) from None
    return str(url)


def http_error() -> type[Exception]:
    """Base of the transport errors of huggingface_hub, some of which are not OSError."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or httpx2

    error: type[Exception] = httpx.HTTPError
    return error


def failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when something cannot be sent."""
    return (OSError, ValueError, RuntimeError, LookupError, http_error())


def _explained(error: Exception, what: str, secret: str, hint: str = "") -> HubError:
    """What went wrong on the way to the hub, and what to do; without the token."""
    cause: BaseException = error  # the hub's answer, or what kept it from answering
    while not isinstance(cause, http_error()) and cause.__cause__ is not None:
        cause = cause.__cause__
    links = [error] if cause is error else [error, cause]
    reasons = [f"{type(link).__name__}: {' '.join(str(link).split())}" for link in links]
    reason = " ".join(reasons).replace(secret or "\0", "***")[:600]
    return HubError(f"Cannot upload to {what}: {reason} {_advice(cause)} {hint}".strip())


def _advice(error: BaseException) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "The repository is gated: request access on its page, or choose another."
    if isinstance(error, errors.HFValidationError):
        return "A repository id is 'organisation/name', of letters, digits, '-', '_' and '.'."
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        return "Log in with 'hf auth login', set HF_TOKEN, or pass a token with write access to it."
    if status is None:
        return "Check the network and HF_HUB_OFFLINE, then retry."
    if status == 404:
        return "Give 'name' or 'organisation/name', and check that the token may write there."
    if status in (409, 412):
        return "The repository is being changed by somebody else: retry when they are done."
    if status == 429 or status >= 500:
        return "The hub is busy or down: retry in a few minutes."
    return "The hub does not accept it: change what it names, then retry."
