"""Repositories of a Hugging Face Hub as a source: every repository is a fine-tune, every commit a revision.

A poll asks for the latest changes and walks them down to where the last one ended; only commits that are new
are asked about. What counts as new is the content of the files that a fold reads: editing a README is no
news. A repository that vanished, or asks for consent, is in a state; it is not an error of the source.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import math
import operator
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from streammerge import credentials, headers, methods
from streammerge.config.sources import Since
from streammerge.errors import RateLimited, Refused, Stopped, TryAgain, Withheld
from streammerge.hub import LARGEST_PAGE, ROUTE, Hub
from streammerge.hubfacts import Repo, is_repo_id
from streammerge.sources import Look, Sighting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from streammerge.config import Config
    from streammerge.config.sources import HubSource
    from streammerge.hubfacts import File
    from streammerge.sources import Known

OVERLAP_SECONDS = 900.0  # a listing may show a change later than its time: so far back it is read again
SMALL_PAGE = 100  # repositories asked for at once by a look at what changed lately
RECHECK_SECONDS = 3600.0  # what is gated, disabled or gone
SOON_SECONDS = 5.0
FAILURES_IN_A_ROW = 3  # so many, and it is the Hub that fails, not the repository
PREVIEWED = 50
TOO_OLD = "its weights are older than first_run wants them"
FIRST = "first"  # among the ends of listings, which have a colon in their names
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
        sidecar: str = "",
        most_bytes: float = math.inf,
    ) -> None:
        """`base_models` stand in where the configuration names none; `clock` gives seconds since 1970.

        A repository with more than `most_bytes` of files that are needed is refused, and not fetched.
        """
        self._sidecar = sidecar
        self._most_bytes = most_bytes
        self.name = config.name
        self.config = config
        self.base_models = config.base_models or base_models
        self._beat, self._clock = beat, clock
        token = credentials.read(config.token_file, credential="hf-token", variable="HF_TOKEN")
        self.hub = Hub(endpoint=config.endpoint, token=token, timeout=config.timeout, beat=beat)
        self._recheck_at: dict[str, float] = {}
        self._mentioned: set[str] = set()
        self._lock = threading.Lock()

    # Looking

    def look(self, known: Mapping[str, Known], mark: str) -> Look:
        """Read the listings down to where the last look ended, and ask about what is new there.

        What is seen before the Hub fails is kept; the listings are then read from the same place again.
        """
        with self._lock:
            mentioned, self._mentioned = self._mentioned, set()
        try:
            return self._look(known, _Mark.read(mark), mentioned)
        except BaseException:
            with self._lock:
                self._mentioned |= mentioned
            raise

    def _look(self, known: Mapping[str, Known], mark: _Mark, mentioned: set[str]) -> Look:
        due = {*mentioned, *mark.failed, *self._due_again(known)}
        listed, ends = self._listed(mark, known, due | {*self.config.repos})
        if not mark.ends and self.config.first_run == "ignore":
            # By the Hub's own clock: ours may be another.
            there = [repo.last_modified for repo in listed.values() if repo]
            ends[FIRST] = max([*there, *self._last_changes(self.config.repos)], default=0.0)
            mark = _Mark({FIRST: ends[FIRST]})
        listed |= dict.fromkeys(sorted({*self.config.repos, *due} - listed.keys()))
        listed = dict(sorted(listed.items(), key=lambda item: item[1].last_modified if item[1] else math.inf))
        seen: list[Sighting] = []
        gone, failed = set(), []
        in_a_row = 0
        for name, listing in listed.items():
            try:
                sighting = self._see(name, listing, known.get(name), self._floor(ends), is_due=name in due)
            except Withheld as exc:
                if name in known and known[name].revision:
                    gone.add(name)
                else:
                    seen.append(self._withheld(name, listing, exc))
                self._recheck_at[name] = self._clock() + RECHECK_SECONDS
                log.info("hub.withheld", source=self.name, repo=name, reason=exc.reason)
            except Stopped:
                raise
            except TryAgain as exc:
                failed.append(name)
                in_a_row += 1
                log.warning("hub.repository_failed", source=self.name, repo=name, error=exc.message)
                if isinstance(exc, RateLimited) or in_a_row == FAILURES_IN_A_ROW:
                    return self._cut_short(exc, seen, gone, mark, mentioned)
            else:
                in_a_row = 0
                seen += [sighting] if sighting else []
        again_at = self._clock() + SOON_SECONDS if failed else 0.0
        return Look(seen, gone=frozenset(gone), mark=str(_Mark(ends, tuple(failed))), again_at=again_at)

    def _cut_short(
        self, why: TryAgain, seen: list[Sighting], gone: set[str], mark: _Mark, mentioned: set[str]
    ) -> Look:
        """Keep what was seen before the Hub failed, and the mark; raises where nothing was."""
        if not seen and not gone:
            raise why
        with self._lock:
            self._mentioned |= mentioned
        wait = why.seconds if isinstance(why, RateLimited) else SOON_SECONDS
        return Look(seen, gone=frozenset(gone), mark=str(mark), again_at=self._clock() + wait)

    def _floor(self, ends: Mapping[str, float]) -> float:
        """Weights that did not change after this are not wanted."""
        first_run = self.config.first_run
        return first_run.timestamp if isinstance(first_run, Since) else ends.get(FIRST, 0.0)

    def _last_changes(self, repos: Sequence[str]) -> Iterator[float]:
        for name in repos:
            with suppress(Withheld):
                yield self.hub.repo(name).last_modified

    def _listed(
        self, mark: _Mark, known: Mapping[str, Known], wanted: set[str]
    ) -> tuple[dict[str, Repo | None], dict[str, float]]:
        """Read every listing down to its mark; gives what is news or wanted, and where each ends now.

        An end is never in our future: one wrong date there would hide all that is published before it.
        """
        listed: dict[str, Repo | None] = {}
        ends = dict(mark.ends)
        for key, query in self._queries():
            for page in self._changed(query, mark.ends.get(key)):
                latest = max((repo.last_modified for repo in page), default=0.0)
                ends[key] = max(ends.get(key, 0.0), min(latest, self._clock()))
                for repo in sorted(page, key=operator.attrgetter("id")):  # as `known` likes to be asked
                    if repo.id in wanted or not _is_same(repo, known.get(repo.id)):
                        listed.setdefault(repo.id, repo)
            ends.setdefault(key, 0.0)
        return listed, ends

    def _queries(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Give every listing to be read, with a name to remember its end by."""
        for base in self.base_models:
            for relation in self.config.relations:
                yield f"{relation}:{base}", {"filter": f"base_model:{relation}:{base}"}
        for author in self.config.authors:
            yield f"author:{author}", {"author": author}

    def _changed(self, query: dict[str, str], end: float | None) -> Iterator[list[Repo]]:
        """Walk one listing page by page, latest change first, to where the last look ended."""
        oldest, at_once = (0.0, LARGEST_PAGE) if end is None else (end - OVERLAP_SECONDS, SMALL_PAGE)
        for page in self.hub.pages(query, at_once):
            changed = list(itertools.takewhile(lambda repo: repo.last_modified >= oldest, page))
            yield changed
            if len(changed) < len(page):
                return

    def _due_again(self, known: Mapping[str, Known]) -> list[str]:
        """List repositories that could not be had and may be had by now."""
        open_ones = [name for name, facts in known.items() if not facts.revision]
        return [name for name in open_ones if self._recheck_at.get(name, 0.0) <= self._clock()]

    def _see(
        self, name: str, listing: Repo | None, known: Known | None, floor: float, *, is_due: bool
    ) -> Sighting | None:
        """Judge one repository, asked about only if its commit is new; None where there is nothing to say."""
        commit = known.fingerprint.partition(" ")[0] if known else ""
        if listing and _is_same(listing, known) and not is_due:
            return None
        if listing and (rule := next(self._rules(listing), None)):
            return self._excluded(listing, *rule)
        if listing and listing.last_modified <= floor:
            return self._excluded(listing, "first_run", TOO_OLD)
        repo = self.hub.repo(name)
        if repo.sha == commit and known and known.revision:
            return None
        if rule := next(self._rules(repo, is_listed=listing is not None), None):
            return self._excluded(repo, *rule)
        return self._describe(repo, known, floor)

    def _describe(self, repo: Repo, known: Known | None, floor: float) -> Sighting:
        """Say what a commit that is new holds."""
        needed = needed_files(repo, self._sidecar)
        content = hashlib.sha256(repr([(f.path, f.identity) for f in needed]).encode()).hexdigest()
        fingerprint, published = f"{repo.sha} {content}", repo.last_modified
        if known and known.revision and content == known.fingerprint.partition(" ")[2]:
            # Another commit with the same weights: the fine-tune keeps the revision it is known by.
            return Sighting(repo.id, known.revision, published, fingerprint=fingerprint, is_dated=True)
        if repo.created_at <= floor and needed:
            published = self.hub.changed_at(repo.id, repo.sha, [f.path for f in needed]) or published
            if published <= floor:
                return self._excluded(repo, "first_run", TOO_OLD)
        waiting, is_withheld = self._waiting_for(repo, needed)
        if waiting:
            until = self._recheck_at[repo.id] = self._clock() + RECHECK_SECONDS
            return Sighting(
                repo.id, "", published, waiting_for=waiting, is_withheld=is_withheld, until=until,
                fingerprint=f"{repo.sha} ", is_dated=True,
            )  # fmt: skip
        refused, why = self._refusal(repo, needed)
        if refused:  # by what another commit may put right, be it the README alone
            fingerprint = f"{repo.sha} "
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
        size = sum(file.size for file in needed_files(repo, self._sidecar))
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

    def _withheld(self, name: str, listing: Repo | None, why: Withheld) -> Sighting:
        """Say that a repository is not given out, and what can be done about it."""
        now = self._clock()
        return Sighting(
            name, "", listing.last_modified if listing else now, waiting_for=f"{why.message}; {why.hint}",
            is_withheld=True, until=now + RECHECK_SECONDS, is_dated=True,
            fingerprint=f"{listing.sha} " if listing else "",
        )  # fmt: skip

    def _waiting_for(self, repo: Repo, needed: Sequence[File]) -> tuple[str, bool]:
        """Say why a repository cannot be had yet, "" if it can; and whether somebody keeps it back."""
        if repo.is_disabled:
            return "the Hub has disabled it", True
        if not any(f.path.endswith(".safetensors") for f in needed) and not _pickles(repo):
            return "it holds no weights yet", False
        if repo.is_gated and needed and not self.hub.may_read(repo.id, repo.sha, needed[-1].path):
            token = "" if self.hub.has_token else "; no token is given (token_file, or HF_TOKEN)"
            return f"it is gated: ask for access at {self.hub.endpoint}/{repo.id}{token}", True
        return "", False

    def _refusal(self, repo: Repo, needed: Sequence[File]) -> tuple[str, str]:
        """Give the reason to refuse a repository without fetching it, and its facts."""
        if any(file.path == headers.MARK for file in needed):
            return "own-merge", f"it holds {headers.MARK}: it is a merge made by streammerge"
        if not any(file.path.endswith(".safetensors") for file in needed):
            return "pickle-only", f"it has no safetensors, only {', '.join(_pickles(repo)[:4])}"
        if (size := sum(file.size for file in needed)) > self._most_bytes:
            return (
                "oversized",
                f"it has {size:,} bytes, a fine-tune of this base {self._most_bytes:,} at most",
            )
        named = {tag.rpartition(":")[2] for tag in repo.tags if tag.startswith("base_model:")}
        if named and self.base_models and not named & set(self.base_models):
            return "wrong-base", f"it says that its base is {min(named)}, not {self.base_models[0]}"
        return "", ""

    def preview(self) -> list[Sighting]:
        """List the latest of what every query gives, with the rule or state that keeps any of it out."""
        found: dict[str, Repo] = {}
        for _, query in self._queries():
            for page in self.hub.pages(query):
                found |= {repo.id: repo for repo in page[:PREVIEWED]}
                break
        missing = []
        for name in self.config.repos:
            try:
                found.setdefault(name, self.hub.repo(name))
            except Withheld as exc:
                missing.append(self._withheld(name, None, exc))
        latest = sorted(found.values(), key=lambda repo: -repo.last_modified)[:PREVIEWED]
        return missing + [
            self._excluded(repo, *rule) if (rule := next(self._rules(repo), None))
            else Sighting(repo.id, repo.sha, repo.last_modified)
            for repo in latest
        ]  # fmt: skip

    # Fetching

    def fetch(self, name: str, revision: str, into: Path, room: Callable[[int], None]) -> None:
        """Bring the files a fold reads at that commit, each proven by its hash; goes on where it was cut."""
        repo = self.hub.repo(name, revision)
        needed = needed_files(repo, self._sidecar)
        room(sum(file.size for file in needed))
        try:
            for file in needed:
                self.hub.download(name, revision, file, into / file.path)
        except Refused:
            if self.hub.repo(name, revision).files == repo.files:
                raise
            # It was the hash declared that came here damaged.
            raise TryAgain(f"{name} is declared in two ways", hint=ROUTE) from None

    def absence(self, name: str, revision: str, digest: str) -> str:
        """Ask the Hub whether that commit is there and its files are given to this token."""
        del digest  # a commit never changes
        try:
            needed = needed_files(self.hub.repo(name, revision), self._sidecar)
        except Withheld as exc:
            return f"{exc.reason} at source {self.name}: {exc.message}"
        if not needed or not self.hub.may_read(name, revision, needed[-1].path):
            return f"source {self.name} does not give its files to this token any more"
        return ""

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


def open_source(part: HubSource, config: Config, beat: Callable[[], None]) -> HubRepositories:
    """Make the source."""
    sidecar, most = methods.sidecar(config.method), headers.most_bytes(config.base_path)
    return HubRepositories(part, config.base_models, beat, sidecar=sidecar, most_bytes=most)


def needed_files(repo: Repo, sidecar: str) -> list[File]:
    """The files of the repository's own folder that a fold reads, weights last."""
    wanted = [file for file in repo.files if "/" not in file.path and headers.is_needed(file.path, sidecar)]
    return sorted(wanted, key=lambda file: (file.path.endswith(".safetensors"), file.path))


def _is_same(repo: Repo, known: Known | None) -> bool:
    """Whether a repository is listed at the commit that was seen before."""
    return known is not None and repo.sha != "" and repo.sha == known.fingerprint.partition(" ")[0]


def _pickles(repo: Repo) -> list[str]:
    return [file.path for file in repo.files if headers.PICKLES.match(file.path)]


@dataclass(frozen=True)
class _Mark:
    """Where the last look ended, written as JSON.

    ends    by listing, the latest change read; FIRST: what was there at the first look, if it is not wanted
    failed  repositories read in a listing and still to be asked about
    """

    ends: Mapping[str, float] = field(default_factory=dict)
    failed: tuple[str, ...] = ()

    @classmethod
    def read(cls, mark: str) -> _Mark:
        """Read what `str` wrote; nothing before the first look."""
        found = json.loads(mark or "{}")
        return cls(found.get("ends", {}), tuple(found.get("failed", ())))

    def __str__(self) -> str:
        return json.dumps({"ends": self.ends, "failed": self.failed})
