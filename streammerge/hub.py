"""The one door to huggingface_hub: what a Hub says, in bounded time, and its files, proven by their hashes.

The client's own paths are left where they would harm a daemon: listings that sleep in the caller's thread, a
stale cached copy taken for a new one, files that are believed by their size. Here every request has a wall
clock, what is transient is tried again a few times and then raised as TryAgain, a file is taken at a commit,
straight to where it is wanted, and hashed on the way. Knows nothing of fine-tunes or stores.
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import os
import random
import time
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

# Before the client is imported, which reads them once. No pages of ours are sent anywhere, nothing is drawn.
for _name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_UPDATE_CHECK"):
    os.environ.setdefault(_name, "1")
if os.environ.get("HF_ENDPOINT", "").rstrip("/") not in ("", "https://huggingface.co"):
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # other servers than the Hub itself have no Xet

import httpx2
import structlog
from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, parse_ratelimit_headers

from streammerge import __version__
from streammerge.errors import RateLimited, Refused, Stopped, TryAgain, Withheld
from streammerge.hubfacts import Repo, read_repo, read_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from huggingface_hub import HfApi

    from streammerge.hubfacts import File

MAX_JSON_BYTES = 64 << 20
LARGEST_PAGE = 1000  # repositories; the Hub gives no more at once
MAX_PAGES = 1000
CHUNK_BYTES = 1 << 20
ATTEMPTS = 4
SAME_WRONG_CONTENT = 3  # so often in a row, and it is the place that has it wrong, not the way here
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 3600.0  # that a 429 may ask for
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
STALL_BYTES = 64 << 10  # less than this in STALL_TIMEOUTS time-outs is a stalled download
STALL_TIMEOUTS = 6
UPLOAD_SILENCE_SECONDS = 300.0  # of a server that is being sent files, or that makes a commit of them
ERROR_HEADERS = ("x-error-code", "x-error-message")

log = structlog.get_logger()


class Declined(TryAgain):
    """The Hub says no in a way that asking once more does not change: a wrong token, a wrong address."""


NOT_AT_ONCE = (RateLimited, Withheld, Stopped, Declined)


class Hub:
    """One Hub, as one token sees it."""

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        timeout: float = 10.0,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """`timeout` seconds for a connection or the next bytes; a whole answer may take six times that.

        `beat` is called between chunks and tries and may raise errors.Stopped.
        """
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.has_token = token is not None
        self.timeout = timeout
        self._quiet_until = 0.0  # on time.monotonic's clock
        self._token = token
        self._beat = beat

    @cached_property
    def _headers(self) -> dict[str, str]:
        token = self._token or False  # False: not the one that lies in somebody's home either
        return build_hf_headers(token=token, library_name="streammerge", library_version=__version__)

    # What there is

    def pages(self, query: Mapping[str, str], at_once: int = LARGEST_PAGE) -> Iterator[list[Repo]]:
        """Walk a listing of models, latest change first, a page at a time: `filter`, `author`, ..."""
        wanted = ("sha", "lastModified", "createdAt", "tags", "gated", "private", "disabled")
        url: str = f"{self.endpoint}/api/models"
        params: list[tuple[str, str]] | None = [
            *query.items(),
            ("sort", "lastModified"),
            ("limit", str(at_once)),
            *(("expand", field) for field in wanted),
        ]
        for _ in range(MAX_PAGES):
            found, links = self._json("GET", url, params=params, each=read_repo)
            if not isinstance(found, list):
                raise _nonsense(url)
            yield [repo for repo in found if isinstance(repo, Repo)]
            following = links.get("next", {}).get("url", "")
            if following and not following.startswith(self.endpoint + "/"):
                raise _nonsense(url)
            if not following:
                return
            url, params = following, None
        raise TryAgain(f"{self.endpoint}: a listing of {MAX_PAGES:,} pages does not end", hint=ROUTE)

    def repo(self, repo: str, revision: str = "main") -> Repo:
        """Ask for one repository at a branch, tag or commit, with its files; Withheld if it is gone."""
        url = f"{self.endpoint}/api/models/{quote(repo)}/revision/{quote(revision, safe='')}"
        found, _ = self._json("GET", url, params=[("blobs", "true")])
        result = read_repo(found)
        if result is None or not result.sha:
            raise _nonsense(url)
        return result

    def changed_at(self, repo: str, commit: str, paths: list[str]) -> float:
        """When any of these files last changed, seconds since 1970; 0.0 where the Hub does not say."""
        url = f"{self.endpoint}/api/models/{quote(repo)}/paths-info/{quote(commit, safe='')}"
        found, _ = self._json("POST", url, body={"paths": paths, "expand": True})
        dates = [
            read_seconds(item["lastCommit"].get("date"))
            for item in found if isinstance(item, dict) and isinstance(item.get("lastCommit"), dict)
        ] if isinstance(found, list) else []  # fmt: skip
        return max(dates, default=0.0)

    def may_read(self, repo: str, commit: str, path: str) -> bool:
        """Whether this token gets the files of a gated repository."""
        try:
            with self._answer("HEAD", self._address(repo, commit, path)):
                return True
        except Withheld:
            return False

    # Files

    def download(self, repo: str, commit: str, file: File, target: Path) -> None:
        """Bring one file to `target`, fsynced and proven; what is there of it already is gone on from.

        Raises Refused where the Hub itself holds another content than it declares, TryAgain or Withheld.
        """
        wrong: list[str] = []
        for attempt in range(ATTEMPTS + SAME_WRONG_CONTENT):
            try:
                found = self._bring(repo, commit, file, target)
            except TryAgain as exc:
                if isinstance(exc, NOT_AT_ONCE) or attempt >= ATTEMPTS - 1:
                    raise
                self._pause(attempt)
                continue
            if found == file.identity:
                return
            target.unlink()
            wrong.append(found)
            log.warning("hub.corrupt_download", repo=repo, file=file.path, declared=file.identity, got=found)
            if wrong.count(found) == SAME_WRONG_CONTENT:
                raise Refused(
                    "corrupted",
                    f"{file.path} of {repo} is declared as {file.identity[:12]} and is {found[:12]}",
                    hint="upload the file again",
                )
        raise TryAgain(f"{file.path} of {repo} arrives damaged, each time in another way", hint=ROUTE)

    def _bring(self, repo: str, commit: str, file: File, target: Path) -> str:
        """Download from where `target` ends; gives the hash of the whole."""
        running = hashlib.sha256() if file.sha256 else hashlib.sha1(usedforsecurity=False)
        if not file.sha256:
            running.update(f"blob {file.size}\0".encode())
        with target.open("a+b") as written:
            written.seek(0)
            while chunk := written.read(CHUNK_BYTES):
                running.update(chunk)
                self._beat()
            done = written.tell()
            if done < file.size:
                headers = {"range": f"bytes={done}-"} if done else {}
                with self._answer("GET", self._address(repo, commit, file.path), headers=headers) as answer:
                    if done and answer.status_code != httpx2.codes.PARTIAL_CONTENT:
                        written.truncate(0)
                        raise TryAgain(f"the Hub does not go on with {file.path}", hint=ROUTE)
                    for chunk in self._chunks(answer):
                        done += len(chunk)
                        if done > file.size:
                            written.truncate(0)
                            raise TryAgain(f"{file.path} is longer than the Hub says", hint=ROUTE)
                        written.write(chunk)
                        running.update(chunk)
            written.flush()
            os.fsync(written.fileno())
        if done < file.size:
            raise TryAgain(f"{file.path} ended after {done:,} of {file.size:,} bytes", hint=ROUTE)
        return running.hexdigest()

    def _chunks(self, answer: httpx2.Response) -> Iterator[bytes]:
        """Give the body as it comes; raises TryAgain where it stalls."""
        since, count = time.monotonic(), 0
        for chunk in answer.iter_raw():
            yield chunk
            self._beat()
            count += len(chunk)
            if time.monotonic() - since > STALL_TIMEOUTS * self.timeout:
                if count < STALL_BYTES:
                    raise TryAgain(f"a download from {self.endpoint} stalled", hint=ROUTE)
                since, count = time.monotonic(), 0

    def _address(self, repo: str, commit: str, path: str) -> str:
        return f"{self.endpoint}/{quote(repo)}/resolve/{quote(commit, safe='')}/{quote(path)}"

    # Publishing: with the client's own paths, which may wait without end; for a process that can be ended

    def make(self, repo: str, branch: str, *, private: bool | None) -> None:
        """Make a repository and a branch; what is there already is left as it is."""
        with self._writing(repo):
            self._api.create_repo(repo, private=private, exist_ok=True)
            if branch != constants.DEFAULT_REVISION:
                self._api.create_branch(repo, branch=branch, exist_ok=True)

    def commit(
        self, repo: str, branch: str, parent: str, changes: Mapping[str, Path | bytes | None], message: str,
        hashes: Mapping[str, str],
    ) -> str:  # fmt: skip
        """Change files of a branch that still ends at `parent`, all by one commit; gives that commit.

        changes  path -> a file here or its content; None where it goes
        hashes   path -> sha256 that what was sent must have, else nothing is committed
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        added = [CommitOperationAdd(path, new) for path, new in sorted(changes.items()) if new is not None]
        gone = [CommitOperationDelete(path, is_folder=False) for path, new in changes.items() if new is None]
        with self._writing(repo):
            self._api.preupload_lfs_files(repo, added, revision=branch, free_memory=False)
            for file in added:
                if hashes.get(file.path_in_repo) not in (None, file.upload_info.sha256.hex()):
                    raise TryAgain(
                        f"{file.path_in_repo} is not what was sealed; nothing was published",
                        hint="`streammerge verify` says what is damaged",
                    )
            made = self._api.create_commit(
                repo, [*added, *gone], commit_message=message, revision=branch, parent_commit=parent
            )
        return str(made.oid)

    def tag(self, repo: str, name: str, commit: str) -> None:
        """Name a commit; a tag that is there already stays where it is."""
        with self._writing(repo):
            self._api.create_tag(repo, tag=name, revision=commit, exist_ok=True)

    @cached_property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(
            endpoint=self.endpoint,
            token=self._token or False,
            library_name="streammerge",
            library_version=__version__,
        )

    @contextmanager
    def _writing(self, repo: str) -> Iterator[None]:
        """Turn what the client raises into what is done about it."""
        try:
            yield
        except (HfHubHTTPError, httpx2.HTTPError, RuntimeError) as exc:
            raise self._not_written(repo, exc) from exc

    def _not_written(self, repo: str, error: Exception) -> TryAgain:
        cause: BaseException | None = error  # the client wraps what ends an upload into a RuntimeError
        while cause and not isinstance(cause, (HfHubHTTPError, httpx2.HTTPError)):
            cause = cause.__cause__
        if not isinstance(cause, HfHubHTTPError):
            text = str(cause or error) or type(cause or error).__name__
            return TryAgain(f"{self.endpoint} cannot be reached: {text}", hint=ROUTE)
        answer = cause.response
        if answer.status_code == httpx2.codes.PRECONDITION_FAILED:
            return TryAgain(f"somebody else changed {repo} meanwhile", hint=UPON_THAT)
        if answer.status_code == httpx2.codes.TOO_MANY_REQUESTS:
            return RateLimited(_asked_wait(answer))
        if answer.status_code in (401, 403) or isinstance(cause, RepositoryNotFoundError):
            shown = "with this token" if self.has_token else "without a token"
            return TryAgain(f"{repo} may not be changed {shown}: {_reason(answer)}", hint=NO_WRITE)
        return TryAgain(f"{answer.request.url} answers {answer.status_code}: {_reason(answer)}", hint=ROUTE)

    # Requests

    def _json(
        self,
        method: str,
        url: str,
        *,
        params: list[tuple[str, str]] | None = None,
        body: dict[str, Any] | None = None,
        each: Callable[[dict[str, Any]], object] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Ask for JSON, a few times where that may help; gives it, of bounded size, and the links.

        each  makes of every object in it, as it is read, what is wanted of it
        """
        for attempt in range(ATTEMPTS):
            try:
                return self._ask(method, url, params, body, each)
            except TryAgain as exc:
                if isinstance(exc, NOT_AT_ONCE) or attempt == ATTEMPTS - 1:
                    raise
                self._pause(attempt)
        raise AssertionError  # the last attempt returns or raises

    def _ask(
        self,
        method: str,
        url: str,
        params: list[tuple[str, str]] | None,
        body: dict[str, Any] | None,
        each: Callable[[dict[str, Any]], object] | None,
    ) -> tuple[Any, dict[str, Any]]:
        with self._answer(method, url, params=params, body=body) as answer:
            content, deadline = bytearray(), time.monotonic() + STALL_TIMEOUTS * self.timeout
            for chunk in answer.iter_bytes():
                content += chunk
                self._beat()
                if len(content) > MAX_JSON_BYTES or time.monotonic() > deadline:
                    raise TryAgain(f"{url}: the answer is too long or takes too long", hint=ROUTE)
            links = {key: dict(link) for key, link in answer.links.items() if key}
        try:
            return json.loads(content, object_hook=each), links
        except (ValueError, RecursionError) as exc:
            raise _nonsense(url) from exc

    @contextmanager
    def _answer(
        self,
        method: str,
        url: str,
        *,
        params: list[tuple[str, str]] | None = None,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Iterator[httpx2.Response]:
        """Send one request; gives the answer once its head is good, else raises what this program knows.

        After a 429 none is sent until it may be.
        """
        self._beat()
        if (left := self._quiet_until - time.monotonic()) > 0:
            raise RateLimited(left)
        plain = {**self._headers, "accept-encoding": "identity", **(headers or {})}
        try:
            with get_session().stream(
                method,
                url,
                params=tuple(params or ()) or None,
                json=body,
                headers=plain,
                timeout=self.timeout,
            ) as answer:
                if answer.is_error:
                    _raise_for(answer, url, has_token=self.has_token)
                yield answer
        except RateLimited as exc:
            self._quiet_until = time.monotonic() + exc.seconds
            raise
        except (httpx2.RequestError, httpx2.StreamError, httpx2.InvalidURL) as exc:
            kind = type(exc).__name__
            raise TryAgain(f"{self.endpoint} cannot be reached: {str(exc) or kind}", hint=ROUTE) from exc

    def _pause(self, attempt: int) -> None:
        """Wait a little longer each time, never all clients at once."""
        seconds = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**attempt, self.timeout)
        until = time.monotonic() + seconds * random.uniform(0.5, 1.0)  # noqa: S311 -- no secret
        while (left := until - time.monotonic()) > 0:
            self._beat()
            time.sleep(min(left, 0.2))


ROUTE = "it is tried again by itself; check the network, and HF_ENDPOINT if you set it"


def _raise_for(answer: httpx2.Response, url: str, *, has_token: bool) -> None:
    """Turn an error of the Hub into what is done about it; its head says all, its body may be anything."""
    told = {key: answer.headers[key] for key in ERROR_HEADERS if key in answer.headers}
    try:
        hf_raise_for_status(httpx2.Response(answer.status_code, headers=told, request=answer.request))
    except GatedRepoError as exc:
        raise Withheld("gated", "its owner gives it only to those who asked", hint=ASK) from exc
    except DisabledRepoError as exc:
        raise Withheld("disabled", "the Hub has disabled it", hint="nothing can be done here") from exc
    except RepositoryNotFoundError as exc:
        seen = "is not there any more" if has_token else "is not there, or private and no token is given"
        raise Withheld("gone", f"the repository {seen}", hint=NO_ACCESS) from exc
    except (RevisionNotFoundError, RemoteEntryNotFoundError) as exc:
        raise Withheld("moved", "this commit or file is not there any more", hint=LOOK_AGAIN) from exc
    except HfHubHTTPError as exc:
        status = answer.status_code
        if status == httpx2.codes.TOO_MANY_REQUESTS:
            raise RateLimited(_asked_wait(answer)) from exc
        if status in TRANSIENT or status >= httpx2.codes.INTERNAL_SERVER_ERROR:
            raise TryAgain(f"{url} answers {status}", hint=ROUTE) from exc
        hint = NO_ACCESS if status in (401, 403) else ROUTE
        raise Declined(f"{url} answers {status}: {_reason(answer)}", hint=hint) from exc


ASK = "ask for access on its page with the account whose token is used; it is looked at again every hour"
NO_ACCESS = (
    "give a token that may read it: `token_file` of the source, the systemd credential hf-token, or HF_TOKEN"
)
NO_WRITE = (
    "give a token that may write there: `token_file` of the target, the systemd credential hf-token, "
    "or HF_TOKEN"
)
UPON_THAT = "it is tried again by itself, upon that change"
LOOK_AGAIN = "its branch is looked at again"


def _reason(answer: httpx2.Response) -> str:
    return str(answer.headers.get("x-error-message") or answer.reason_phrase)[:200]


def _asked_wait(answer: httpx2.Response) -> float:
    """How long a 429 asks to wait: Retry-After as seconds or date, or RateLimit's reset; else a minute."""
    given = answer.headers.get("retry-after", "")
    if given.isascii() and given.isdigit():
        seconds = float(given)
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(given).timestamp() - time.time()
        except (TypeError, ValueError):
            limit = parse_ratelimit_headers(answer.headers)
            seconds = float(limit.reset_in_seconds) if limit else 60.0
    return min(max(0.0, seconds), LONGEST_WAIT_SECONDS)


def _nonsense(url: str) -> TryAgain:
    return TryAgain(f"{url}: the answer is not what a Hub says", hint=ROUTE)


def end_silence() -> None:
    """Have the client, in the whole of this process, give up on a server that says nothing any more."""
    from huggingface_hub import set_client_factory

    set_client_factory(lambda: httpx2.Client(follow_redirects=True, timeout=UPLOAD_SILENCE_SECONDS))


def blob_id(content: bytes) -> str:
    """Give the git object id of a file that lies in git itself."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
