"""A Hub repository as a target: the real client, in the process that uploads, against the hub of dev-hub."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import models
import pytest
import yaml
from daemons import SOURCE, Site, until
from huggingface_hub import constants

from streammerge import configfile, files, snapshots
from streammerge.card import card
from streammerge.config import Config
from streammerge.config.targets import HubTarget
from streammerge.devhub import DevHub
from streammerge.errors import ConfigError, Stopped, TryAgain
from streammerge.members import Member, Members
from streammerge.targets import Told, open_target
from streammerge.targets.hub import HubRepository, publish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from streammerge.devhub.storage import Commit, Repository

REPO = "team/merged"
SHA = "4fa1c2d9e08b7f6a5d3c4b2a190807f6e5d4c3b2"
FOLDED = Members([Member("lineage", "org/one", SHA, "d" * 64, 1.0)])
TOKEN = "hf_thistokenmaywrite"
TOLD = "streammerge_notifications_total"
COMMIT, TAG, PUT = r"POST /api/models/.*/commit/", r"POST /api/models/.*/tag/", "PUT /_lfs/"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")  # huggingface_hub 2.4, uploading by LFS


@pytest.fixture(autouse=True)
def plain_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads from this process know no Xet and no token of this machine, like the target's own."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    for name in ("HF_TOKEN", "HF_HOME", "HF_ENDPOINT", "HF_HUB_DISABLE_XET", "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[DevHub]:
    """An empty hub."""
    with DevHub(tmp_path / "hub") as running:
        yield running


class Place:
    """A store with versions in it, and a target that they are told to."""

    def __init__(self, folder: Path, hub: DevHub) -> None:
        self.store = snapshots.Store(folder / "store")
        self.store.create()
        self.hub = hub

    def seal(self, number: int, weights: bytes = b"", **more: bytes) -> Told:
        """Seal and accept a version; `more` are further files, "__" standing for a dot."""
        building = snapshots.begin(self.store, number)
        facts = {"version": number, "method": "opcm", "knobs": {"alpha": 0.5}, "finalize": {"scale": 1.0},
                 "fine_tunes": FOLDED, "parent": None, "base": {"digest": "b", "name": "base"}}  # fmt: skip
        given = {
            "model.safetensors": weights or b"weights of version %d" % number * 100,
            "config.json": b'{"model_type": "llama"}',
            "tokenizer/vocab.txt": b"a\nb\n",
            "streammerge.json": files.canonical_json(facts),
            "README.md": b"the store's own card\n",
            **{name.replace("__", "."): content for name, content in more.items()},
        }
        for name, content in given.items():
            (building / "model" / name).parent.mkdir(exist_ok=True)
            (building / "model" / name).write_bytes(content)
        (building / "state" / "sum.safetensors").write_bytes(b"state")
        sealed = snapshots.accept(self.store, snapshots.seal(self.store, building, facts, {}))
        return Told(number, sealed.digest, sealed.path, f"1-{sealed.digest[:12]}", "fold")

    def target(self, beat: Callable[[], None] = lambda: None, **keys: Any) -> HubRepository:
        """Open the target."""
        facts = {"type": "hub", "name": "hub", "repo": REPO, "endpoint": self.hub.url, **keys}
        source = {"type": "hub", "name": "lineage", "repos": ["org/one"], "first_run": "ignore"}
        config = Config.model_validate(
            {
                "base": "hf://org/base@main", "store": str(self.store.root), "targets": [facts],
                "sources": [{**source, "endpoint": self.hub.url}],
            }
        )  # fmt: skip
        found = open_target(config.targets[0], config, beat)
        assert isinstance(found, HubRepository)
        return found

    def publish(self, told: Told, **keys: Any) -> None:
        """Do in this process what telling has a process of its own do."""
        publish(self.target(**keys).job(told))

    # What is on the hub

    @property
    def repository(self) -> Repository:
        """The repository as the hub has it."""
        return self.hub.store.get(REPO)

    @property
    def head(self) -> Commit:
        """The last commit of main."""
        return self.repository.find("main")

    def titles(self) -> list[str]:
        """What the commits of main say, the hub's first one left out, oldest first."""
        titles = [commit.title for commit in self.repository.history(self.head)]
        return titles[-2::-1]

    def content(self, path: str, revision: str = "main") -> bytes:
        """A file at a revision."""
        return self.hub.store.blob(self.repository.find(revision).files[path].sha256).read_bytes()

    def shows(self, told: Told, revision: str = "main") -> bool:
        """Whether a revision has every byte of a version, and a card."""
        model = told.snapshot / "model"
        names = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
        there = set(self.repository.find(revision).files) - {".gitattributes"}
        same = all(
            self.content(name, revision) == (model / name).read_bytes() for name in names - {"README.md"}
        )
        return names == there and same

    def tags(self) -> dict[str, str]:
        """Name of each tag, and its commit."""
        return dict(self.repository.tags)


@pytest.fixture
def place(tmp_path: Path, hub: DevHub) -> Place:
    """A store and a target."""
    return Place(tmp_path, hub)


def tag_of(told: Told) -> str:
    """The name of a version's tag."""
    return f"v{told.version:06d}-{told.digest[:12]}"


# ----------------------------------------------------------------------------------------- what is published


def test_a_version_is_published_whole_and_leaves_nothing_behind(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first telling makes the repository, one commit of every byte, card and tag; no cache stays."""
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    told = place.seal(1)
    place.target(private=True).tell(told)
    assert place.titles() == [f"Version 1 ({told.digest[:12]})"]
    assert place.shows(told)
    assert place.repository.private
    assert place.tags() == {tag_of(told): place.head.id}
    assert place.hub.count(PUT) == 1
    assert not list(home.iterdir())
    assert not list(scratch.iterdir())
    _, front, text = place.content("README.md").decode().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "org/base", "base_model_relation": "merge", "library_name": "transformers",
        "tags": ["merge", "streammerge"],
    }  # fmt: skip
    link = f"[`org/one`]({place.hub.url}/org/one/tree/{SHA})"
    assert f"| 1 | {link} | `lineage` | `{SHA}` | `{'d' * 12}` |" in text


def test_versions_follow_one_another_forwards_and_back(place: Place) -> None:
    """Each promotion is one commit, a rollback too; tellings again add nothing; tags stay where they were."""
    one, two = place.seal(1, more__json=b"{}"), place.seal(2)
    place.publish(one)
    place.publish(two)
    assert place.shows(two)  # so more.json, which only the first version has, is gone
    first, second = (place.tags()[tag_of(told)] for told in (one, two))
    place.publish(two)
    place.publish(one)
    place.publish(one)
    assert [title.split()[1] for title in place.titles()] == ["1", "2", "1"]
    assert place.shows(one)
    assert place.shows(two, tag_of(two))
    assert place.tags() == {tag_of(one): first, tag_of(two): second}
    assert place.head.id not in (first, second)


def test_what_people_add_stays_and_other_weights_go(place: Place) -> None:
    """A licence and an edited card are left alone; weights that a loader would take instead are removed."""
    one = place.seal(1)
    place.publish(one)
    place.hub.publish(REPO, {"LICENSE": "mine", "README.md": "edited"})
    place.publish(one)
    assert place.content("README.md") == b"edited"
    assert len(place.titles()) == 2
    place.hub.publish(REPO, {"model-00001-of-00002.safetensors": b"old", "images/plot.bin": b"mine"})
    place.publish(one)
    assert set(place.head.files) >= {"LICENSE", "images/plot.bin"}
    assert "model-00001-of-00002.safetensors" not in place.head.files


def test_another_model_is_never_overwritten(place: Place) -> None:
    """A repository with weights and without our mark is refused, and stays as it is."""
    before = place.hub.publish(REPO, {"model.safetensors": b"somebody's work"})
    with pytest.raises(TryAgain, match=r"no streammerge\.json") as caught:
        place.publish(place.seal(1))
    assert "repository of its own" in caught.value.hint
    assert place.head.id == before


def test_another_branch_is_made(place: Place) -> None:
    """With `branch`, main stays as it was."""
    told = place.seal(1)
    place.publish(told, branch="merged")
    assert place.shows(told, "merged")
    assert set(place.head.files) == {".gitattributes"}


def test_damaged_files_are_not_published(place: Place) -> None:
    """Where a file is not what was sealed, no commit is made, whether it goes by LFS or not."""
    for name in ("model.safetensors", "config.json"):
        told = place.seal(1 if name == "config.json" else 2)
        (told.snapshot / "model" / name).chmod(0o644)
        (told.snapshot / "model" / name).write_bytes(b"{} " * 9)
        with pytest.raises(TryAgain, match=f"{name} is not what was sealed"):
            place.publish(told)
    assert not place.titles()


# ------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("match", "kind"), [(COMMIT, "500"), (COMMIT, "429"), (COMMIT, "cut"), (TAG, "500"), (PUT, "500")]
)
def test_a_failure_in_the_middle_costs_no_second_commit(place: Place, match: str, kind: Any) -> None:
    """Whatever fails, done or not done by the hub, the next telling ends with one commit and one tag."""
    told = place.seal(1)
    place.hub.fault(match, kind, count=1)
    if match == PUT:  # the client itself tries again
        place.publish(told)
    else:
        with pytest.raises(TryAgain) as caught:
            place.publish(told)
        assert caught.value.hint
    place.publish(told)
    assert len(place.titles()) == 1
    assert place.shows(told)
    assert place.tags() == {tag_of(told): place.head.id}


def test_a_kill_between_commit_and_tag_is_made_good(place: Place) -> None:
    """A stop ends the process that uploads at once, also one that waits; the next telling only tags."""
    place.hub.fault(TAG, "hang", count=1, seconds=600)

    def stop_at_the_tag() -> None:
        if place.hub.count(TAG):
            raise Stopped("a stop was asked for")

    told = place.seal(1)
    with pytest.raises(Stopped):
        place.target(stop_at_the_tag).tell(told)
    assert len(place.titles()) == 1
    assert not place.tags()
    place.publish(told)
    assert len(place.titles()) == 1
    assert place.tags() == {tag_of(told): place.head.id}


def test_an_upload_that_hangs_ends_with_its_time(place: Place) -> None:
    """A hub that says nothing costs no more than the target's timeout."""
    place.hub.fault("", "hang", seconds=600)
    with pytest.raises(TryAgain, match="did not end within 1 s"):
        place.target(timeout="1s").tell(place.seal(1))


def test_a_push_in_between_is_built_upon(place: Place) -> None:
    """A commit that somebody else made since the branch was read is not undone; the telling begins anew."""
    one, two = place.seal(1), place.seal(2)
    place.publish(one)
    place.hub.fault(COMMIT, "hang", count=1, seconds=2)
    before = place.hub.count(COMMIT)
    pushed: list[str] = []

    def push_meanwhile() -> None:
        if not pushed and place.hub.count(COMMIT) > before:
            pushed.append(place.hub.publish(REPO, {"NOTES.md": "theirs"}, message="theirs"))

    with pytest.raises(TryAgain, match="somebody else changed") as caught:
        place.target(push_meanwhile).tell(two)
    assert "upon that change" in caught.value.hint
    place.publish(two)
    assert [title.split()[0] for title in place.titles()] == ["Version", "theirs", "Version"]
    assert place.content("NOTES.md") == b"theirs"


def test_who_may_not_write_is_told_how(tmp_path: Path) -> None:
    """No token, a wrong one and a missing file say so, with what to do; a right one works, from a file."""
    file = tmp_path / "token"
    with DevHub(tmp_path / "hub", token=TOKEN) as hub:
        place = Place(tmp_path, hub)
        told = place.seal(1)
        with pytest.raises(TryAgain, match="may not be changed without a token") as caught:
            place.publish(told)
        assert "token_file" in caught.value.hint
        with pytest.raises(TryAgain, match="cannot be read"):
            place.publish(told, token_file=str(file))
        file.write_text("hf_wrong\n")
        file.chmod(0o600)
        with pytest.raises(TryAgain) as caught:
            place.publish(told, token_file=str(file))
        assert "may write there" in caught.value.hint
        assert "hf_wrong" not in str(caught.value)
        file.write_text(TOKEN)
        place.target(token_file=str(file)).tell(told)
        assert place.shows(told)


def test_a_hub_that_is_away_is_tried_again(place: Place) -> None:
    """A refused connection is no bug of ours."""
    place.hub.stop()
    with pytest.raises(TryAgain, match="cannot be reached"):
        place.publish(place.seal(1))


# --------------------------------------------------------------------------------------- card, configuration


@pytest.mark.parametrize(
    "name",
    [
        "a|b",
        "`](http://x)`",
        "x\n---\nbase_model: evil",
        "<script>",
        "\u202e",
        "\\`",
        "",
        "../../x",
        "a/b](c",
    ],
)
def test_a_strangers_name_stays_a_name(name: str) -> None:
    """Nothing in a name, source or revision ends its code span, its table row or the front matter."""
    member = Member(source=name, name=name, revision=name, digest="d" * 64, weight=1.0)
    manifest = {"version": 1, "method": "opcm", "knobs": {}, "finalize": {}, "fine_tunes": [member]}
    text = "".join(card(manifest, base_model='x"\n---\nlicense: evil', hubs={name: "http://hub"}))
    _, front, rest = text.split("---\n", 2)
    assert yaml.safe_load(front).keys() == {"base_model", "base_model_relation", "tags"}
    row = rest.splitlines()[-1]
    assert row.startswith("| 1 | `")
    assert Counter(row)["|"] == 6
    assert Counter(row)["`"] == 8
    assert "](" not in "".join(row.split("`")[0::2])
    assert not {"\n", "\r", "\u202e"} & set(row)


def test_the_sections_keys_are_checked(tmp_path: Path) -> None:
    """A wrong key names the nearest one of this type; token_file is taken against the file."""
    models.make_base(tmp_path / "base")
    path = tmp_path / "streammerge.yaml"

    def load(**target: Any) -> Config:
        keys = {"base": "./base", "store": "./store", "targets": [{"name": "t", "type": "hub", **target}]}
        path.write_text(yaml.safe_dump(keys))
        return configfile.load(path)[0]

    (target,) = load(repo=REPO, token_file="./token").targets
    assert isinstance(target, HubTarget)
    assert target.token_file == tmp_path / "token"
    for wrong, words in (
        ({"repo": REPO, "branches": "x"}, "did you mean targets.0.branch?"),
        ({"repo": "merged"}, "targets.0.repo"),
        ({"repo": REPO, "argv": ["x"]}, "targets.0.argv"),
        ({}, "targets.0.repo: is missing"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(**wrong)
        assert words in str(caught.value)


def test_a_job_fits_into_a_pipe(place: Place) -> None:
    """What the process is given does not grow with the number of fine-tunes."""
    target = place.target(token_file=None)
    job = replace(target.job(place.seal(1)), token="x" * 4096)
    assert len(json.dumps(asdict(job))) < 1 << 14
    assert "xxx" not in repr(job)


# ------------------------------------------------------------------------------------------- with the daemon


def test_what_the_daemon_publishes_never_comes_back(tmp_path: Path, hub: DevHub) -> None:
    """A source that lists the target's own repository folds the others and refuses that one as own-merge."""
    site = Site(tmp_path / "site")
    staged = tmp_path / "one"
    models.make_fine_tune(staged, site.base, seed=1)
    hub.publish("team/one", {path.name: path for path in staged.iterdir()})
    source = {
        "name": "theirs", "type": "hub", "authors": ["team"], "first_run": "fold", "poll": "1s",
        "endpoint": hub.url,
    }  # fmt: skip
    target = {"name": "public", "type": "hub", "repo": REPO, "endpoint": hub.url}
    site.configure(sources=[SOURCE, source], targets=[target])
    with site.daemon() as daemon:
        daemon.until_state({"team/one": "folded", REPO: "refused"})
        assert daemon.rows()[REPO]["reason"] == "own-merge"
        versions = site.versions()
        daemon.look_again(2, "theirs")
        assert site.versions() == versions
        assert site.served == ["team/one"]
        until(
            lambda: daemon.metric(TOLD, target="public", result="ok") == len(versions), "both are published"
        )
    assert "public  confirmed" in site.run("targets", "test").stdout
    names = [
        commit.title.split()[1] for commit in hub.store.get(REPO).history(hub.store.get(REPO).find("main"))
    ]
    assert names == [*map(str, reversed(versions)), "commit"]
    site.configure(targets=[{**target, "token_file": "./not-there"}])
    failed = site.run("targets", "test", code=75)
    assert "cannot be read" in failed.stdout
    assert "hint: " in failed.stdout
