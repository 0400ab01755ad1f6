"""Publishing a run: one commit per repository, retried where the client does not, and never half visible.

Before a commit is tried again, the repository is looked at: what is there already is not sent a second time. So a
publication that was killed or lost its connection is repaired by running it again, and one that is whole changes
nothing.
"""

import contextlib
import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoFile,
    constants,
    set_client_factory,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http, validate_repo_id

from .card import read_record, round_tag
from .errors import DecafError
from .publication import Files, read, repositories
from .recipe import HubSection

T = TypeVar("T")

TRIES = 5
BUSY = (408, 409, 412, 425, 429, 500, 502, 503, 504)  # answers after which a second try can succeed
TIMEOUT = httpx2.Timeout(60.0, connect=15.0)  # the client has none of its own for these calls
LONGEST_WAIT = 300.0  # seconds, however long the server asks
OURS = ("README.md", "adapter_config.json", "adapter_model.safetensors")


class PublishingError(DecafError):
    """The Hub did not take a publication; the run folder is as it was."""


def publish(run: Path, hub: HubSection, *, message: str | None = None, token: str | None = None) -> list[str]:
    """Publish a run folder as `hub` says and return the addresses, the consensus' first.

    Raises `DecafError` before anything is sent for what must not leave, `PublishingError` for what the Hub refuses or
    cannot do; both are one line.
    """
    assert hub.repo_id is not None
    token = token.strip() if token is not None else None
    api = HfApi(token=token)
    with _timeouts():
        try:
            hub = hub.model_copy(update={"repo_id": _full_name(api, hub.repo_id)})
            record = read_record(run)
            wanted, tag = repositories(record, hub, token), round_tag(record)
            addresses = [_ready(api, name, hub.private) for name in wanted]  # all of them before anything is sent
            for name, files in wanted.items():
                _publish_one(api, name, files, tag, message or f"Adapters of {tag}")
            if hub.layout == "per-agent":
                addresses.append(_collect(api, hub, list(wanted)))
        except OfflineModeIsEnabled:
            raise PublishingError("HF_HUB_OFFLINE is set, so nothing can be published; unset it") from None
    return addresses[::-1]


def publish_command(run: Path, hub: HubSection) -> str:
    """The command that publishes a run folder later."""
    words = ["decaf", "publish", str(run), "--repo-id", hub.repo_id]
    words += ["--layout", hub.layout] if hub.layout != "single" else []
    words += [] if hub.private else ["--public"]
    words += ["--base-model-id", hub.base_model_id] if hub.base_model_id else []
    return shlex.join(words)


def local_folder(run_or_repo: str) -> Path:
    """The run folder itself, or the download of the repository that the name stands for. Raises `DecafError`."""
    path = Path(run_or_repo)
    if path.is_dir():
        return path
    if path.exists():
        raise DecafError(f"{run_or_repo!r} is a file; give the run folder that it is in")
    user, slash, _ = run_or_repo.partition("/")
    if slash and (user in ("", ".", "..", "~") or Path(user).is_dir()):  # a path, which the Hub need not be asked for
        raise DecafError(f"no run folder {run_or_repo!r}; give a run folder that is there, or a repository USER/NAME")
    try:
        validate_repo_id(run_or_repo)
        return Path(_patiently(f"downloading {run_or_repo}", lambda: snapshot_download(run_or_repo)))
    except HFValidationError:
        raise DecafError(f"{run_or_repo!r} is neither a run folder nor a repository USER/NAME") from None
    except OfflineModeIsEnabled:
        raise DecafError(f"no run folder {run_or_repo!r}, and HF_HUB_OFFLINE is set") from None
    except PublishingError as error:
        raise DecafError(f"{run_or_repo!r} is no folder here, and as a repository of the Hub: {error}") from None


def check_destination(hub: HubSection) -> None:
    """Raise `DecafError` before the training for what would keep a run from being published after it."""
    _check_name(hub.repo_id)
    if constants.HF_HUB_OFFLINE:
        raise DecafError(
            f"hub.repo_id is {hub.repo_id!r}, but HF_HUB_OFFLINE keeps this machine from the Hub; unset it, or leave "
            "hub.repo_id out and publish later (decaf publish)"
        )


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise DecafError(f"repo_id {repo_id!r}: {' '.join(str(error).split())}") from None


def _full_name(api: HfApi, repo_id: str) -> str:
    _check_name(repo_id)
    if "/" in repo_id:
        return repo_id
    return f"{_patiently('asking who you are', lambda: api.whoami()['name'])}/{repo_id}"


def _ready(api: HfApi, repo_id: str, private: bool) -> str:
    """Make a repository if it is missing; its address. Raises `PublishingError` for one that is not ours to fill."""
    url = _patiently(f"creating {repo_id}", lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    there = _patiently(f"reading {repo_id}", lambda: api.repo_info(repo_id))
    if bool(there.private) != private:
        found, way = ("private", "without --public") if there.private else ("public", "with --public")
        raise PublishingError(f"{repo_id} exists and is {found}; publish {way} or choose another repository")
    names = {file.rfilename for file in there.siblings or []} - {".gitattributes", "README.md"}
    if names and "run/summary.json" not in names:
        raise PublishingError(
            f"{repo_id} holds other files ({min(names)}) and no earlier publication; choose another repository"
        )
    return str(url)


def _publish_one(api: HfApi, repo_id: str, files: Files, tag: str, message: str) -> None:
    """Bring one repository to its files in one commit, if anything differs, then set the tag."""
    commit = _commit(api, repo_id, files, message)
    if _differences(files, _tree(api, repo_id, commit)):
        raise PublishingError(f"{repo_id}: what the Hub holds differs from the run; publish again")
    _patiently(
        f"tagging {repo_id}; the files are there, the tag {tag} is not", lambda: _tag(api, repo_id, tag, commit)
    )


def _commit(api: HfApi, repo_id: str, files: Files, message: str) -> str:
    """Bring a repository to `files` in one commit, none if it is there already; its commit hash.

    A commit on top of another head than the one compared with is refused by the Hub (parent_commit), and a commit
    whose answer was lost is found by the next look: in both cases the loop compares again.
    """

    def attempt() -> str:
        head = api.repo_info(repo_id).sha
        changes = _differences(files, _tree(api, repo_id, head))
        if not changes:
            return head
        operations = [
            CommitOperationDelete(path_in_repo=name)
            if name not in files
            else CommitOperationAdd(path_in_repo=name, path_or_fileobj=_source(files[name]))
            for name in changes
        ]
        return api.create_commit(repo_id, operations, commit_message=message, parent_commit=head).oid

    return _patiently(f"committing to {repo_id}", attempt)


def _tree(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _differences(files: Files, there: dict[str, RepoFile]) -> list[str]:
    """Paths that a commit must add or change, and those of an earlier publication that it must delete."""
    changed = [name for name, content in files.items() if name not in there or not _same(content, there[name])]
    ours = [name for name in there if name in OURS or name.startswith(("agents/", "run/"))]
    return changed + [name for name in ours if name not in files]


def _same(content: bytes | Path, there: RepoFile) -> bool:
    data = read(content)
    if there.lfs is not None:
        return hashlib.sha256(data).hexdigest() == there.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == there.blob_id  # git's name of a file


def _source(content: bytes | Path) -> bytes | str:
    return content if isinstance(content, bytes) else str(content)


def _tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    """Point the tag at the commit; a run trained anew moves the tag of its round."""
    targets = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if targets.get(tag) == commit:
        return
    if tag in targets:
        with contextlib.suppress(RevisionNotFoundError):
            api.delete_tag(repo_id, tag=tag)
    api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True)


def _collect(api: HfApi, hub: HubSection, repo_ids: list[str]) -> str:
    """Tie the repositories of one run together; the collection's address."""
    user, _, name = hub.repo_id.partition("/")
    what = f"making the collection of {hub.repo_id}; the repositories are there"
    collection = _patiently(
        what, lambda: api.create_collection(name, namespace=user, private=hub.private, exists_ok=True)
    )
    for repo_id in repo_ids:
        _patiently(
            what, lambda repo_id=repo_id: api.add_collection_item(collection.slug, repo_id, "model", exists_ok=True)
        )
    return collection.url


def _patiently(what: str, work: Callable[[], T]) -> T:
    """Call the Hub, again after what a second try can mend. Raises `PublishingError` with one line saying why not."""
    for attempt in range(TRIES):
        try:
            return work()
        except OfflineModeIsEnabled:
            raise
        except LocalEntryNotFoundError as error:  # nothing in the cache, and nobody to ask
            if constants.HF_HUB_OFFLINE:
                raise OfflineModeIsEnabled(str(error)) from error
            raise PublishingError(f"{what} failed: {_why(error, None)}") from error
        except LocalTokenNotFoundError:
            raise PublishingError(f"{what} failed: no access token; log in with `hf auth login`") from None
        except (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:
            status, wait = _status(error), _asked_to_wait(error)
            if (status is not None and status not in BUSY) or attempt == TRIES - 1:
                raise PublishingError(f"{what} failed: {_why(error, status)}") from error
            time.sleep(min(2.0**attempt if wait is None else wait, LONGEST_WAIT))
        except ValueError as error:  # the Hub's own check of the card
            raise PublishingError(f"{what} failed: {' '.join(str(error).split())}") from error
    raise AssertionError("unreachable")


def _response(error: BaseException) -> Any:
    """The HTTP answer behind an error; the client wraps those of uploads in a RuntimeError."""
    for candidate in (error, error.__cause__):
        answer = getattr(candidate, "response", None)
        if answer is not None:
            return answer
    return None


def _status(error: BaseException) -> int | None:
    answer = _response(error)
    return None if answer is None else answer.status_code


def _asked_to_wait(error: BaseException) -> float | None:
    answer = _response(error)
    try:
        seconds = float(answer.headers["Retry-After"])
    except (AttributeError, KeyError, ValueError):
        return None
    return seconds if 0 <= seconds < math.inf else None


def _why(error: BaseException, status: int | None) -> str:
    if status == 401 or (
        isinstance(error, RepositoryNotFoundError) and not error.response.request.headers.get("authorization")
    ):
        return "no valid access token; log in with `hf auth login`"
    if status == 403:
        return "the access token may not write there; use a token with write access to that name"
    if isinstance(error, RepositoryNotFoundError):
        return "the repository is not there, or the access token may not see it"
    if isinstance(error, httpx2.TimeoutException):
        return "the Hub did not answer in time"
    cause = error.__cause__  # the client says what of an upload in one error and why in its cause
    words = f"{error} {cause}" if isinstance(error, RuntimeError) and cause is not None else str(error)
    return " ".join(words.split())[:300] or type(error).__name__


@contextlib.contextmanager
def _timeouts() -> Iterator[None]:
    before = _http._GLOBAL_CLIENT_FACTORY  # huggingface_hub 2.4 has no public way to ask for it

    def factory() -> httpx2.Client:
        client = before()
        client.timeout = TIMEOUT
        return client

    set_client_factory(factory)
    try:
        yield
    finally:
        set_client_factory(before)
