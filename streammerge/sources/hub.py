"""Repositories of a Hugging Face Hub as a source: every repository is a fine-tune, every commit a revision.

A poll asks for the latest changes and walks them down to where the last one ended; only commits that are new
are asked about. What counts as new is the content of the files that a fold reads: editing a README is no
news. A repository that vanished, or asks for consent, is in a state; it is not an error of the source.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import threading
import time
from typing import TYPE_CHECKING

import structlog

from streammerge import credentials, headers
from streammerge.config import Since
from streammerge.errors import Stopped, TryAgain, Withheld
from streammerge.hub import Hub, RateLimited, Repo, is_repo_id
from streammerge.sources import Look, Sighting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from streammerge.config import HubSource
    from streammerge.hub import File
    from streammerge.sources import Known

OVERLAP_SECONDS = 900.0  # a listing may show a change later than its time: so far back it is read again
RECHECK_SECONDS = 3600.0  # what is gated, disabled or gone
SOON_SECONDS = 5.0
PREVIEWED = 50
OWN_MARK = "streammerge.json"
OWN_TAG = "streammerge"
NOT_FINE_TUNES = ("merge", "quantized")

log = structlog.get_logger()


class HubRepositories:
    """One configured choice of repositories."""

    is_remote = True

    def __init__(
        self,
        config: HubSource,
        base_models: tuple[str, ...],
        beat: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`base_models` stand in where the configuration names none; `clock` gives seconds since 1970."""
        self.name = config.name
        self.config = config
        self.base_models = config.base_models or base_models
        self._beat, self._clock = beat, clock
        token = credentials.read(config.token_file, credential="hf-token", variable="HF_TOKEN")
        self.hub = Hub(endpoint=config.endpoint, token=token, timeout=config.timeout, beat=beat)
        self._quiet_until = 0.0
        self._recheck_at: dict[str, float] = {}
        self._mentioned: set[str] = set()
        self._lock = threading.Lock()

    # Looking

    def look(self, known: Mapping[str, Known], mark: str) -> Look:
        """Read the listings down to where the last look ended, and ask about what is new there."""
        now = self._clock()
        if now < self._quiet_until:
            raise RateLimited(self._quiet_until - now)
        try:
            return self._look(known, _read_mark(mark), now)
        except RateLimited as exc:
            self._quiet_until = now + exc.seconds
            raise

    def _look(self, known: Mapping[str, Known], marks: dict[str, float], now: float) -> Look:
        with self._lock:
            mentioned, self._mentioned = self._mentioned, set()
        try:
            listed, ends = self._listed(marks, now)
            listed |= {
                name: None
                for name in (*self.config.repos, *mentioned, *self._due_again(known, now))
                if name not in listed
            }
            if not marks and self.config.first_run == "ignore":
                ends["first"], listed = max(ends.values(), default=now), {}
            seen: list[Sighting] = []
            gone, failed = set(), set()
            for name, listing in listed.items():
                try:
                    sighting = self._see(name, listing, known.get(name), marks.get("first", 0.0))
                except Withheld as exc:
                    self._recheck_at[name] = now + RECHECK_SECONDS
                    gone.add(name)
                    log.info("hub.withheld", source=self.name, repo=name, reason=exc.reason)
                except (RateLimited, Stopped):
                    raise
                except TryAgain as exc:
                    failed.add(name)
                    log.warning("hub.repository_failed", source=self.name, repo=name, error=exc.message)
                else:
                    seen += [sighting] if sighting else []
        except TryAgain:
            self._remember(mentioned)
            raise
        if not failed:
            return Look(seen, frozenset(gone), json.dumps(ends))
        # The listing is read from the same place again; what was seen meanwhile is recognised by its commit.
        self._remember(mentioned & failed)
        return Look(seen, frozenset(gone), json.dumps(marks), now + SOON_SECONDS)

    def _remember(self, names: set[str]) -> None:
        with self._lock:
            self._mentioned |= names

    def _listed(self, marks: dict[str, float], now: float) -> tuple[dict[str, Repo | None], dict[str, float]]:
        """Read every listing down to its mark; gives what is there, and the new marks."""
        listed: dict[str, Repo | None] = {}
        ends = dict(marks)
        for key, query in self._queries():
            ends.setdefault(key, now if self.config.first_run == "ignore" else 0.0)
            for repo in self._changed(query, marks.get(key)):
                listed.setdefault(repo.id, repo)
                ends[key] = max(ends[key], repo.last_modified)
        return listed, ends

    def _queries(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Give every listing to be read, with a name to remember its end by."""
        for base in self.base_models:
            for relation in self.config.relations:
                yield f"{relation}:{base}", {"filter": f"base_model:{relation}:{base}"}
        for author in self.config.authors:
            yield f"author:{author}", {"author": author}

    def _changed(self, query: dict[str, str], end: float | None) -> Iterator[Repo]:
        """Walk one listing, latest change first, to where the last look ended."""
        oldest = 0.0 if end is None else end - OVERLAP_SECONDS
        if end is None and isinstance(self.config.first_run, Since):
            oldest = self.config.first_run.timestamp
        for page in self.hub.pages(**query):
            for repo in page:
                if repo.last_modified < oldest:
                    return
                yield repo
                if end is None and self.config.first_run == "ignore":
                    return  # what was there before is not wanted: the latest change is all there is to know

    def _due_again(self, known: Mapping[str, Known], now: float) -> list[str]:
        """List repositories that could not be had and may be had by now."""
        open_ones = [name for name, facts in known.items() if not facts.revision]
        return [name for name in open_ones if self._recheck_at.get(name, 0.0) <= now and is_repo_id(name)]

    def _see(
        self, name: str, listing: Repo | None, known: Known | None, first_look_at: float
    ) -> Sighting | None:
        """Judge one repository, asked about only if its commit is new; None where there is nothing to say."""
        commit = known.fingerprint.partition(" ")[0] if known and known.revision else ""
        if listing and listing.sha and listing.sha == commit:
            return None
        if listing and (rule := next(self._rules(listing), None)):
            return self._excluded(listing, *rule)
        repo = self.hub.repo(name)
        if repo.sha == commit:
            return None
        if rule := next(self._rules(repo, is_listed=listing is not None), None):
            return self._excluded(repo, *rule)
        return self._describe(repo, known, first_look_at)

    def _describe(self, repo: Repo, known: Known | None, first_look_at: float) -> Sighting:
        """Say what a commit that is new holds."""
        needed = needed_files(repo)
        content = hashlib.sha256(repr([(f.path, f.identity) for f in needed]).encode()).hexdigest()
        fingerprint, published = f"{repo.sha} {content}", repo.last_modified
        if known and known.revision and content == known.fingerprint.partition(" ")[2]:
            # Another commit with the same weights: the fine-tune keeps the revision it is known by.
            return Sighting(repo.id, known.revision, published, fingerprint=fingerprint, is_dated=True)
        if first_look_at and repo.created_at <= first_look_at:
            published = self.hub.changed_at(repo.id, repo.sha, [f.path for f in needed]) or published
            if published <= first_look_at:
                return self._excluded(repo, "first_run", "it was there before the first look")
        waiting = self._waiting_for(repo, needed)
        if waiting:
            until = self._recheck_at[repo.id] = self._clock() + RECHECK_SECONDS
            return Sighting(repo.id, "", published, waiting_for=waiting, until=until, is_dated=True)
        refused, why = self._refusal(repo, needed)
        return Sighting(
            repo.id, repo.sha, published, refused=refused, waiting_for=why, fingerprint=fingerprint,
            is_dated=True, not_before=published + self.config.min_age if self.config.min_age else 0.0,
        )  # fmt: skip

    def _rules(self, repo: Repo, *, is_listed: bool = True) -> Iterator[tuple[str, str]]:
        """Name every rule of the configuration that leaves a repository out, with its facts."""
        part, tags = self.config, set(repo.tags)
        if not any(fnmatch.fnmatchcase(repo.id, glob) for glob in part.names):
            yield "names", f"no glob of names matches {repo.id}"
        if glob := next((glob for glob in part.ignore if fnmatch.fnmatchcase(repo.id, glob)), ""):
            yield "ignore", f"ignore has {glob}"
        if not is_listed and not self._is_wanted(repo):
            yield "lineage", "it is neither of the base's descendants nor of the authors and repos wanted"
        if missing := [tag for tag in part.tags if tag not in tags]:
            yield "tags", f"it does not have the tag {missing[0]}"
        if unwanted := [tag for tag in part.without_tags if tag in tags]:
            yield "without_tags", f"it has the tag {unwanted[0]}"
        said = [r for r in NOT_FINE_TUNES if any(tag.startswith(f"base_model:{r}:") for tag in tags)]
        if said and OWN_TAG not in tags:
            yield "relation", f"it says that it is a {said[0]} model, not a fine-tune"
        if repo.is_gated and part.gated == "ignore":
            yield "gated", "it asks for consent, and gated is ignore"
        if repo.is_private and part.private == "ignore":
            yield "private", "it is private, and private is ignore"
        size = sum(file.size for file in needed_files(repo))
        if part.max_bytes is not None and size > part.max_bytes:
            yield "max_bytes", f"it has {size:,} bytes of weights, max_bytes is {part.max_bytes:,}"

    def _is_wanted(self, repo: Repo) -> bool:
        """Whether a repository that no listing gave is one of those configured."""
        lineage = {f"base_model:{r}:{base}" for r in self.config.relations for base in self.base_models}
        owner = repo.id.partition("/")[0]
        return repo.id in self.config.repos or owner in self.config.authors or bool(lineage & set(repo.tags))

    @staticmethod
    def _excluded(repo: Repo, rule: str, why: str) -> Sighting:
        return Sighting(
            repo.id, repo.sha, repo.last_modified, excluded=rule, waiting_for=why, is_dated=True,
            fingerprint=f"{repo.sha} ",
        )  # fmt: skip

    def _waiting_for(self, repo: Repo, needed: Sequence[File]) -> str:
        """Say why a repository cannot be had yet, "" if it can."""
        if repo.is_disabled:
            return "the Hub has disabled it"
        if not any(f.path.endswith(".safetensors") for f in needed) and not _pickles(repo):
            return "it holds no weights yet"
        if repo.is_gated and needed and not self.hub.may_read(repo.id, repo.sha, needed[-1].path):
            token = "" if self.hub.has_token else "; no token is given (token_file, or HF_TOKEN)"
            return f"it is gated: ask for access at {self.hub.endpoint}/{repo.id}{token}"
        return ""

    def _refusal(self, repo: Repo, needed: Sequence[File]) -> tuple[str, str]:
        """Give the reason to refuse a repository without fetching it, and its facts."""
        if any(file.path == OWN_MARK for file in needed):
            return "own-merge", f"it holds {OWN_MARK}: it is a merge made by streammerge"
        if not any(file.path.endswith(".safetensors") for file in needed):
            return "pickle-only", f"it has no safetensors, only {', '.join(_pickles(repo)[:4])}"
        named = {tag.rpartition(":")[2] for tag in repo.tags if tag.startswith("base_model:")}
        if named and self.base_models and not named & set(self.base_models):
            return "wrong-base", f"it says that its base is {min(named)}, not {self.base_models[0]}"
        return "", ""

    def preview(self) -> list[Sighting]:
        """List the latest of what every query gives, with the rule or state that keeps any of it out."""
        found: dict[str, Repo] = {}
        for _, query in self._queries():
            for page in self.hub.pages(**query):
                found |= {repo.id: repo for repo in page[:PREVIEWED]}
                break
        for name in self.config.repos:
            try:
                found.setdefault(name, self.hub.repo(name))
            except Withheld as exc:
                found[name] = Repo(name, "", 0.0, tags=(), is_disabled=True)
                log.warning("hub.withheld", repo=name, reason=exc.reason, hint=exc.hint)
        latest = sorted(found.values(), key=lambda repo: -repo.last_modified)[:PREVIEWED]
        return [
            self._excluded(repo, *rule) if (rule := next(self._rules(repo), None))
            else Sighting(repo.id, repo.sha, repo.last_modified, waiting_for="" if repo.sha else "not there")
            for repo in latest
        ]  # fmt: skip

    # Fetching

    def fetch(self, name: str, revision: str, into: Path) -> None:
        """Bring the files a fold reads at that commit, each proven by its hash; goes on where it was cut."""
        repo = self.hub.repo(name, revision)
        for file in needed_files(repo):
            self.hub.download(name, revision, file, into / file.path)

    def watch(self, hint: Callable[[], None]) -> Callable[[], None]:
        """A Hub tells by webhook, which comes in at the daemon's own port."""
        del hint
        return lambda: None

    def mention(self, name: str) -> bool:
        """Look at `name` at the next look, if it can be one of this source's."""
        if not is_repo_id(name) or not any(fnmatch.fnmatchcase(name, glob) for glob in self.config.names):
            return False
        with self._lock:
            self._mentioned.add(name)
        return True


def open_source(config: HubSource, base_models: tuple[str, ...], beat: Callable[[], None]) -> HubRepositories:
    """Make the source."""
    return HubRepositories(config, base_models, beat)


def needed_files(repo: Repo) -> list[File]:
    """The files of the repository's own folder that a fold reads, weights last."""
    wanted = [file for file in repo.files if "/" not in file.path and headers.is_needed(file.path)]
    return sorted(wanted, key=lambda file: (file.path.endswith(".safetensors"), file.path))


def _pickles(repo: Repo) -> list[str]:
    return [file.path for file in repo.files if headers.PICKLES.match(file.path)]


def _read_mark(mark: str) -> dict[str, float]:
    """Read where each listing was ended; {} before the first look."""
    try:
        found = json.loads(mark or "{}")
        return {str(key): float(value) for key, value in found.items()}
    except (ValueError, AttributeError, TypeError):
        return {}
