"""Uploads to the Hugging Face hub: in one commit, tried again where that helps, and checked.

What the hub has already is not sent again, so an upload that was interrupted is finished by
calling it anew. Tokens are sent to the hub and shown nowhere.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from .atomic_output import PLAN_FILE
from .errors import HubError, LLMPrunerError, OutputError
from .utils import logger

T = TypeVar("T")
TIMEOUT = 6 * 3600.0  # seconds for a whole upload
SILENCE = 120.0  # seconds after which a hub that sends and takes nothing is given up
WAITS = (1.0, 4.0, 16.0)  # seconds before each of the next tries
PHASES = ("connect", "read", "write", "pool")  # of a request, each with a time limit of its own
TRANSIENT = {408, 409, 412, 429, 500, 502, 503, 504}
WEIGHTS = (".safetensors", ".bin", ".index.json")  # what transformers would load


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    timeout: float = TIMEOUT,
) -> str:
    """Upload an output folder of llm_pruner to a model repository on the hub, in one commit.

    The repository is created if need be; one that exists keeps its visibility. Files that it has
    already are not sent again, so the same call finishes an upload that was interrupted. Weights
    of an earlier upload that the folder does not have are removed, as they might be loaded in
    place of the new ones; other files stay. Afterwards the sizes and hashes on the hub are
    compared with the folder's.

    Args:
        folder: a finished output; it is read only.
        repo_id: ``user/name`` or ``organization/name``.
        private: whether a new repository is for its owner alone.
        token: a token with write access; None for that of ``HF_TOKEN`` or ``hf auth login``.
        timeout: seconds after which no further request is begun.

    Returns:
        The repository's URL.

    Raises:
        OutputError: the folder is no finished output; nothing was sent.
        HubError: the upload cannot be done, or came out wrong; the message says what to do.
    """
    path = Path(folder).expanduser()
    return upload(
        _files(path),
        repo_id,
        "model",
        message="Upload a model pruned by llm_pruner",
        private=private,
        token=token,
        timeout=timeout,
        hint=how_to_repeat(path, repo_id, private=private),
    )


def how_to_repeat(folder: str | Path, repo_id: str, *, private: bool = True) -> str:
    """Where the result is, and the command that uploads it, for people."""
    more = "" if private else ", private=False"
    call = f"push_to_hub({json.dumps(str(folder))}, {json.dumps(repo_id)}{more})"
    command = shlex.join(["python", "-c", f"from llm_pruner import push_to_hub; {call}"])
    return f"The result is in {str(folder)!r}. To repeat the upload alone: {command}"


def _files(folder: Path) -> dict[str, Path]:
    """Files of a finished output by their names on the hub."""
    if not (folder / PLAN_FILE).is_file():
        raise OutputError(
            f"{str(folder)!r} has no {PLAN_FILE}, so it is no finished output of llm_pruner: give "
            "the folder that was written with --output."
        )
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path for name, path in names.items() if not name.startswith(".git/")}


def check_upload(repo_id: str, repo_type: str = "model", token: str | None = None) -> str:
    """The token to upload with; the hub is not asked.

    Raises:
        HubError: the id cannot be one, there is no token, or the hub may not be reached.
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
    files: Mapping[str, Path | bytes],
    repo_id: str,
    repo_type: str,
    *,
    message: str,
    private: bool,
    token: str | None,
    timeout: float = TIMEOUT,
    hint: str = "",
) -> str:
    """Commit files to a repository that is created if need be; returns its URL.

    Args:
        files: by name in the repository, where they are or what is in them.
        repo_type: ``model`` or ``dataset``.
        message: of the commit.
        hint: what an error's message ends with.

    Raises:
        HubError: see `push_to_hub`.
    """
    from huggingface_hub import HfApi

    secret = check_upload(repo_id, repo_type, token)
    api = HfApi(token=secret)
    end = time.monotonic() + timeout
    try:
        with _limits(end):
            place: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type}
            url = _patiently(lambda: api.create_repo(**place, private=private, exist_ok=True), end)
            place["repo_id"] = url.repo_id
            there = _patiently(lambda: api.repo_info(**place), end)
            if private and not there.private:
                logger.warning("%s exists already and is public: it stays so.", url)
            revision = _patiently(lambda: _commit(api, files, place, message), end)
            _patiently(lambda: _check(api, files, place, revision), end)
    except failures() as error:
        secret_told = any(secret in str(link) for link in _chain(error))
        told = _explained(error, f"{repo_type} {repo_id!r}", secret, hint)
        raise told from None if secret_told else error  # a traceback would show it
    return str(url)


def _commit(
    api: Any, files: Mapping[str, Path | bytes], place: Mapping[str, Any], message: str
) -> str:
    """Commit what the repository does not have; returns the commit's hash.

    Done twice, it commits once: files that are there already are left out.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    now = api.repo_info(**place)
    there = [entry.rfilename for entry in now.siblings or ()]
    weights = [name for name in there if "/" not in name and name.endswith(WEIGHTS)]
    stale = [name for name in weights if name not in files and place["repo_type"] == "model"]
    adds = [CommitOperationAdd(path_in_repo=n, path_or_fileobj=f) for n, f in files.items()]
    commit = api.create_commit(
        operations=[*adds, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
        commit_message=message,
        parent_commit=now.sha,  # refused if somebody else has changed the repository
        **place,
    )
    return str(commit.oid)


def _check(
    api: Any, files: Mapping[str, Path | bytes], place: Mapping[str, Any], revision: str
) -> None:
    """Compare what a commit has with what was sent.

    Raises:
        HubError: a file is missing, or has another size or hash.
    """
    info = api.repo_info(**place, revision=revision, files_metadata=True)
    there = {entry.rfilename: entry for entry in info.siblings or ()}
    wrong = [n for n, content in files.items() if n not in there or not _same(content, there[n])]
    if wrong:
        raise HubError(
            f"{len(wrong)} of {len(files)} files on the hub are not those that were sent, such as "
            f"{wrong[0]!r}: they were changed meanwhile, or are ignored by a .gitignore. Upload "
            "again."
        )


def _same(content: Path | bytes, entry: Any) -> bool:
    """Whether a file is that of an entry: by SHA-256 where the hub has it, else by git's hash."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if entry.size != size:
        return False
    digest = hashlib.sha256() if entry.lfs else hashlib.sha1(f"blob {size}\0".encode())
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return bool(digest.hexdigest() == (entry.lfs.sha256 if entry.lfs else entry.blob_id))


@contextmanager
def _limits(end: float) -> Iterator[None]:
    """Inside the block huggingface_hub waits for no silent hub, and begins nothing after `end`.

    By itself it has no time limit, and waits as long as a hub asks it to. The client that all
    threads share is made anew before and after.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    usual = _http._GLOBAL_CLIENT_FACTORY

    def on_request(request: Any) -> None:
        request.extensions["timeout"] = dict.fromkeys(PHASES, SILENCE)
        if time.monotonic() > end:
            raise TimeoutError("The time for the upload is over.")

    def on_response(response: Any) -> None:
        wait = _wanted_wait(response)
        if wait and time.monotonic() + wait > end:
            raise TimeoutError(f"The hub is busy and asks to wait {wait:.0f} seconds.")

    def limited() -> Any:
        client = usual()
        hooks = client.event_hooks
        hooks["request"].append(on_request)
        hooks["response"].append(on_response)
        client.event_hooks = hooks
        return client

    set_client_factory(limited)
    try:
        yield
    finally:
        set_client_factory(usual)


def _patiently(call: Callable[[], T], end: float) -> T:
    """What `call` returns, tried again after failures that pass, until `end`."""
    waits = iter(WAITS)
    while True:
        try:
            return call()
        except failures() as error:
            pause, response = next(waits, None), getattr(_origin(error), "response", None)
            if pause is None or not _passes(error):
                raise
            if response is not None:
                pause = max(pause, _wanted_wait(response))
            if time.monotonic() + pause > end:
                raise
            logger.info("The hub stumbles (%s): next try in %g s.", _status(error), pause)
        time.sleep(pause)


def _wanted_wait(response: Any) -> float:
    """Seconds that the hub asks to wait; 0 if it does not.

    ``Retry-After: 30``, or, where too much was asked for, ``RateLimit: "api";r=0;t=30``.
    """
    value = str(response.headers.get("Retry-After", "")).strip()
    limit = re.search(r"\br=0\s*;\s*t=(\d+)", response.headers.get("RateLimit", ""))
    if response.status_code == 429 and limit:
        return float(limit[1])
    return float(value) if value.isdecimal() else 0.0


def http_error() -> type[Exception]:
    """The base of the transport errors of huggingface_hub, which are not all OSError."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or httpx2

    error: type[Exception] = httpx.HTTPError
    return error


def failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when something cannot be sent."""
    return (OSError, ValueError, RuntimeError, LookupError, http_error())


def _chain(error: BaseException) -> list[BaseException]:
    """The error, and those that it was raised from."""
    return [error, *(_chain(error.__cause__) if error.__cause__ is not None else [])]


def _origin(error: BaseException) -> BaseException:
    """The answer of the hub, or what kept it from answering, that an error goes back to."""
    for link in _chain(error):
        if hasattr(link, "response") or isinstance(link, http_error()):
            return link
    return _chain(error)[-1]


def _status(error: Exception) -> Any:
    """The status of the hub's answer, or the name of the error if there was none."""
    origin = _origin(error)
    return getattr(getattr(origin, "response", None), "status_code", type(origin).__name__)


def _passes(error: Exception) -> bool:
    """Whether trying again may help: the hub is busy or down, or the connection broke."""
    origin = _origin(error)
    if hasattr(origin, "response"):
        return _status(error) in TRANSIENT
    return isinstance(origin, (http_error(), json.JSONDecodeError))  # a page of a proxy


def _explained(error: Exception, what: str, secret: str, hint: str = "") -> HubError:
    """What went wrong on the way to the hub and what to do."""
    if isinstance(error, LLMPrunerError):
        return HubError(f"Upload to {what}: {error} {hint}".strip())
    origin = _origin(error)
    links = [error] if origin is error else [error, origin]
    reasons = [f"{type(link).__name__}: {' '.join(str(link).split())}" for link in links]
    if secret:
        reasons = [reason.replace(secret, "***") for reason in reasons]
    reason = " ".join(reason[:300] for reason in reasons)
    return HubError(f"Cannot upload to {what}: {reason} {_advice(error)} {hint}".strip())


def _advice(error: Exception) -> str:
    from huggingface_hub import errors

    status = _status(error)
    if isinstance(_origin(error), errors.GatedRepoError):
        return "The repository is gated: ask for access on its page, or choose another."
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        return "Log in with 'hf auth login', set HF_TOKEN, or pass a token with write access to it."
    if status == 404:
        return "Give 'name' or 'organisation/name', and check that the token may write there."
    if status in (409, 412):
        return "Somebody else is changing the repository: retry when they are done."
    if status == 429 or (isinstance(status, int) and status >= 500):
        return "The hub is busy or down: retry in a few minutes."
    if isinstance(error, errors.HFValidationError):
        return "A repository id is 'organisation/name', of letters, digits, '-', '_' and '.'."
    if isinstance(status, int):
        return "The hub does not accept it: change what it names, then retry."
    return "Check the network and HF_HUB_OFFLINE, then retry."
