"""The hub of `streammerge dev-hub`, spoken to by the real huggingface_hub client."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import httpx
import models
import pytest
from daemons import DEADLINE_SECONDS, STREAMMERGE, environment, free_port, until
from documents import by_word, first_words, section
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from streammerge.devhub import DevHub, Rule
from streammerge.devhub.faults import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from huggingface_hub.hf_api import ModelInfo

CARD = "---\nbase_model: team/base\nlicense: mit\ntags: [streammerge]\n---\n# A model\n"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")  # huggingface_hub 2.4, uploading by LFS
WEIGHTS = bytes(range(256)) * 400
CARDS: tuple[tuple[Mapping[str, str], set[str]], ...] = (  # files, and tags that they give
    ({"README.md": CARD}, {"base_model:finetune:team/base", "license:mit", "streammerge"}),
    (
        {"README.md": "---\nbase_model: [a/x, b/y]\nbase_model_relation: merge\n---\n"},
        {"base_model:a/x", "base_model:merge:a/x", "base_model:merge:b/y"},
    ),
    (
        {"README.md": "---\nbase_model: a/x\n---\n", "adapter_config.json": "{}"},
        {"base_model:adapter:a/x"},
    ),
    ({"adapter_config.json": '{"base_model_name_or_path": "a/x"}'}, {"base_model:adapter:a/x"}),
    ({"adapter_config.json": "[" * 9000, "README.md": "---\na: &a [*a]\n---\n"}, set()),
    ({"README.md": "---\n" + "[" * 9000 + "\n---\n"}, set()),
    ({"README.md": "---\n- 1\n---\n"}, set()),
    ({"README.md": "---\n2020-01-01: .nan\ntags: [3, x]\n---\n"}, {"x"}),
)
RESOLVE = "GET /team/one/resolve/"


@pytest.fixture(autouse=True)
def plain_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client uploads without Xet and shows no token of this machine's."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[DevHub]:
    """A hub with one model."""
    with DevHub(tmp_path / "hub") as running:
        running.publish("team/one", {"README.md": CARD, "model.safetensors": WEIGHTS})
        yield running


@pytest.fixture
def api(hub: DevHub) -> HfApi:
    """The real client, pointed at the hub."""
    return HfApi(endpoint=hub.url, token=False)


def fetch(hub: DevHub, folder: Path, name: str = "model.safetensors", **how: Any) -> bytes:
    """Download a file of the one model by the real client, into a cache of its own."""
    how = {"revision": "main", "token": False, **how}
    path = hf_hub_download("team/one", name, endpoint=hub.url, cache_dir=folder, **how)
    with open(path, "rb") as file:  # noqa: PTH123 -- a plain string comes back
        return file.read()


def post(hub: DevHub, path: str, given: Mapping[str, Any], code: int = 200) -> Any:
    """Speak to the addresses below /_dev/."""
    answer = httpx.post(f"{hub.url}/_dev/{path}", json=given)
    assert answer.status_code == code, answer.text
    return answer.json()


# ------------------------------------------------------------------------------------------------ uploads


def test_an_uploaded_folder_comes_back_byte_for_byte(hub: DevHub, api: HfApi, tmp_path: Path) -> None:
    """What upload_folder sends is what snapshot_download brings, by branch, tag and commit."""
    folder = tmp_path / "model"
    models.make_base(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "deep/er").mkdir(parents=True)
    (folder / "deep/er/empty.txt").touch()
    assert api.create_repo("team/two").repo_id == "team/two"
    done = api.upload_folder(repo_id="team/two", folder_path=folder, commit_message="first")
    api.create_tag("team/two", tag="v1")
    found = [
        snapshot_download("team/two", revision=rev, endpoint=hub.url, cache_dir=tmp_path / name, token=False)
        for name, rev in (("a", "main"), ("b", "v1"), ("c", done.oid))
    ]
    sent = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for place in map(type(tmp_path), found):
        came = {
            str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()
        }
        assert came.pop(".gitattributes")
        assert came == sent
    assert hub.count("^PUT /_lfs/") == 1
    assert api.upload_folder(repo_id="team/two", folder_path=folder).oid == done.oid, "nothing had changed"


def test_repositories_are_made_once_and_deleted(api: HfApi) -> None:
    """A second create is 409, which exist_ok accepts; what is deleted is not found any more."""
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("team/one")
    assert api.create_repo("team/one", exist_ok=True).repo_id == "team/one"
    assert api.create_repo("alone").repo_id == "dev/alone"
    with pytest.raises(BadRequestError):
        api.create_repo("team/data", repo_type="dataset")
    api.delete_repo("team/one")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("team/one")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("team/one")


def test_a_commit_on_an_outrun_parent_is_refused(api: HfApi) -> None:
    """parent_commit is compare-and-swap: 412 unless it is the head."""
    before = api.model_info("team/one").sha
    add = [CommitOperationAdd("note.txt", b"1")]
    first = api.create_commit("team/one", add, commit_message="one", parent_commit=before)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(
            "team/one", [CommitOperationAdd("note.txt", b"2")], commit_message="two", parent_commit=before
        )
    assert api.model_info("team/one").sha == first.oid


def test_files_and_folders_are_deleted(hub: DevHub, api: HfApi) -> None:
    """A commit can take away what is there, and nothing else."""
    hub.publish("team/one", {"a/b.txt": "b", "a/c/d.txt": "d", "e.txt": "e"})
    gone = [CommitOperationDelete("a/"), CommitOperationDelete("e.txt")]
    api.create_commit("team/one", gone, commit_message="tidy")
    assert api.list_repo_files("team/one") == [".gitattributes", "README.md", "model.safetensors"]
    with pytest.raises(RemoteEntryNotFoundError):
        api.delete_file("e.txt", "team/one")


def test_commits_at_the_same_time_wait_for_one_another(hub: DevHub, api: HfApi) -> None:
    """None of many concurrent uploads is lost, and the history is one line."""

    def upload(number: int) -> None:
        api.upload_file(path_or_fileobj=b"x", path_in_repo=f"{number}.txt", repo_id="team/one")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(upload, range(12)))
    assert {f"{number}.txt" for number in range(12)} <= set(api.list_repo_files("team/one"))
    assert len(api.list_repo_commits("team/one")) == 2 + 12


def test_a_path_that_leads_elsewhere_is_refused(hub: DevHub) -> None:
    """No commit names what could become another place on somebody's disk."""
    for path in ("../out.txt", "/etc/passwd", "a//b", ".git/config", "a\\b"):
        line = {"key": "file", "value": {"path": path, "content": "", "encoding": "base64"}}
        answer = httpx.post(f"{hub.url}/api/models/team/one/commit/main", content=json.dumps(line))
        assert (answer.status_code, answer.json()["error"]) == (400, f"Invalid path in repo: {path!r}")


def test_an_upload_must_be_what_it_was_announced_as(hub: DevHub) -> None:
    """Other content than the hash says is refused and not kept, and so is an address of one's own making."""
    oid = hashlib.sha256(b"right").hexdigest()
    asked = {"operation": "upload", "objects": [{"oid": oid, "size": 5}]}
    given = httpx.post(f"{hub.url}/team/one.git/info/lfs/objects/batch", json=asked).json()
    href = given["objects"][0]["actions"]["upload"]["href"]
    assert [httpx.put(href, content=body).status_code for body in (b"wrong", b"rig", b"right!")] == [400] * 3
    assert httpx.put(href[:-1] + ("0" if href[-1] != "0" else "1"), content=b"right").status_code == 403
    assert not hub.store.blob(oid).exists()
    assert httpx.put(href, content=b"right").status_code == 200
    assert hub.store.blob(oid).read_bytes() == b"right"


# ------------------------------------------------------------------------------- what is said of a model


def test_files_are_described_as_git_and_lfs_name_them(api: HfApi) -> None:
    """Sizes, blob ids and SHA-256 are those that git computes and LFS writes into a pointer."""
    found = api.model_info("team/one", files_metadata=True)
    sizes = {file.rfilename: file.size for file in found.siblings or []}
    assert sizes["model.safetensors"] == len(WEIGHTS)
    by_name = {file.rfilename: file for file in found.siblings or []}
    lfs = by_name["model.safetensors"].lfs
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(WEIGHTS)}\n"
    assert lfs is not None
    assert (lfs.sha256, lfs.size, lfs.pointer_size) == (sha256, len(WEIGHTS), len(pointer))
    for name, content in (("model.safetensors", pointer), ("README.md", CARD)):
        blob = f"blob {len(content)}\0{content}".encode()
        assert by_name[name].blob_id == hashlib.sha1(blob).hexdigest()
    assert by_name["README.md"].lfs is None


def test_refs_and_history(hub: DevHub, api: HfApi) -> None:
    """Tags, branches, commits and who touched a file last are as they were made."""
    first = api.model_info("team/one").sha
    second = hub.publish("team/one", {"README.md": CARD + "more\n"}, message="Say more\n\nin two lines")
    api.create_tag("team/one", tag="v1", revision=first)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("team/one", tag="v1")
    api.create_tag("team/one", tag="v1", exist_ok=True)
    api.create_branch("team/one", branch="try/out", revision="v1")
    refs = api.list_repo_refs("team/one")
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "try/out": first}
    commits = api.list_repo_commits("team/one")
    assert [commit.title for commit in commits] == ["Say more", "Upload", "initial commit"]
    assert commits[0].message == "in two lines"
    assert all(newer.created_at > older.created_at for newer, older in pairwise(commits))
    for found in (
        api.list_repo_tree("team/one", recursive=True, expand=True),
        api.get_paths_info("team/one", ["README.md", "model.safetensors", "absent"], expand=True),
    ):
        touched: dict[str, Any] = {entry.path: entry.last_commit for entry in found}
        assert "absent" not in touched
        assert (touched["README.md"].oid, touched["README.md"].title) == (second, "Say more")
        assert touched["model.safetensors"].oid == first
    api.delete_tag("team/one", tag="v1")
    api.delete_branch("team/one", branch="try/out")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag("team/one", tag="v1")


def test_what_is_missing_is_told_apart(hub: DevHub, api: HfApi, tmp_path: Path) -> None:
    """The client raises one class for a missing repository, another for a revision, another for a file."""
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("team/none")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("team/one", revision="none")
    with pytest.raises(RevisionNotFoundError):
        fetch(hub, tmp_path, revision="0" * 40)
    with pytest.raises(RemoteEntryNotFoundError):
        fetch(hub, tmp_path, "none.txt")
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("team/one", "none"))


def test_tags_derive_from_the_card(hub: DevHub, api: HfApi) -> None:
    """Relations to base models come from the card, else from the adapter; a hostile card gives none."""
    for number, (files, expected) in enumerate(CARDS):
        hub.publish(f"team/carded-{number}", files)
        tags = set(api.model_info(f"team/carded-{number}").tags or [])
        assert expected <= tags, files
        assert bool(expected) == bool(tags), files


def test_listing_filters_sorts_and_pages(tmp_path: Path) -> None:
    """Every model is listed once, the newest first, by pages; filters must all hold."""
    with DevHub(tmp_path / "hub", page_size=2) as hub:
        api = HfApi(endpoint=hub.url, token=False)
        for org, number in product(("red", "blue"), range(3)):
            hub.publish(f"{org}/model-{number}", {"README.md": CARD})
        hub.publish("red/model-0", {"note.txt": "newest now"})
        hub.publish("blue/other", {"README.md": "---\nbase_model: team/elsewhere\n---\n"})

        def ids(**how: Any) -> list[str]:
            return [found.id for found in api.list_models(sort="last_modified", **how)]

        of_base = ids(filter="base_model:finetune:team/base")
        assert of_base == [
            "red/model-0", "blue/model-2", "blue/model-1", "blue/model-0", "red/model-2", "red/model-1"
        ]  # fmt: skip
        assert hub.count("^GET /api/models$") == 3
        assert ids(filter=["base_model:team/base", "license:apache-2.0"]) == []
        assert ids(author="red", search="MODEL-1") == ["red/model-1"]
        assert ids(limit=3) == ["blue/other", *of_base[:2]]
        (found,) = api.list_models(search="blue/other", expand=["sha", "lastModified", "gated", "disabled"])
        assert (found.sha, found.gated, found.disabled) == (
            hub.store.get(found.id).branches["main"],
            False,
            False,
        )
        assert (found.tags, found.private) == (None, None), "only what was asked for"
        (plain,) = api.list_models(search="blue/other")
        (full,) = api.list_models(search="blue/other", full=True)
        assert (plain.sha, full.sha) == (None, found.sha)


# ------------------------------------------------------------------------------------- who may see what


def test_private_gated_and_disabled(tmp_path: Path) -> None:
    """Each has the client raise its own class; the token opens the first two."""
    with DevHub(tmp_path / "hub", token="secret") as hub:
        anybody, owner = (HfApi(endpoint=hub.url, token=token) for token in (False, "secret"))
        owner.create_repo("team/one", private=True)
        owner.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors", repo_id="team/one")
        with pytest.raises(RepositoryNotFoundError):
            anybody.model_info("team/one")
        assert (list(anybody.list_models()), len(list(owner.list_models()))) == ([], 1)
        assert owner.whoami()["name"] == "dev"
        owner.update_repo_settings("team/one", private=False, gated="manual")
        assert anybody.model_info("team/one").gated == "manual"
        with pytest.raises(GatedRepoError):
            fetch(hub, tmp_path / "cache")
        assert fetch(hub, tmp_path / "cache", token="secret") == WEIGHTS
        with pytest.raises(HfHubHTTPError, match="401"):
            anybody.delete_repo("team/one")
        with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
            HfApi(endpoint=hub.url, token="wrong").model_info("team/one")
        hub.mark("team/one", disabled=True, gated=False)
        with pytest.raises(DisabledRepoError):
            owner.model_info("team/one")
        with pytest.raises(LocalEntryNotFoundError) as caught:
            fetch(hub, tmp_path / "other")
        assert isinstance(caught.value.__cause__, DisabledRepoError)
        assert [found.disabled for found in anybody.list_models(expand=["disabled"])] == [True]


def test_tests_in_other_processes_mark_move_and_squash(hub: DevHub, api: HfApi) -> None:
    """POST /_dev/repos/R does what the Python object does, and refuses what it does not know."""
    first = api.model_info("team/one").sha
    second = hub.publish("team/one", {"note.txt": "1"})
    assert post(hub, "repos/team/one", {"gated": "auto", "move": first})["sha"] == first
    assert api.model_info("team/one").gated == "auto"
    assert api.model_info("team/one", revision=second).sha == second, "left behind, but there"
    squashed = post(hub, "repos/team/one", {"squash": True})["sha"]
    assert [commit.commit_id for commit in api.list_repo_commits("team/one")] == [squashed]
    for gone in (first, second):
        with pytest.raises(RevisionNotFoundError):
            api.model_info("team/one", revision=gone)
    post(hub, "repos/team/one", {"gated": "maybe"}, 400)
    post(hub, "repos/team/one", {"colour": "red"}, 400)
    post(hub, "repos/team/none", {}, 404)
    api.super_squash_history("team/one")
    assert api.model_info("team/one").sha != squashed


def test_everything_survives_a_restart(hub: DevHub, api: HfApi, tmp_path: Path) -> None:
    """A second server on the folder says the same, and what it does next is later."""
    hub.mark("team/one", gated="manual", private=True)
    api.create_tag("team/one", tag="v1")
    before = httpx.get(f"{hub.url}/api/models/team/one?blobs=true").json()
    refs = api.list_repo_refs("team/one")
    hub.stop()
    with DevHub(tmp_path / "hub", clock=lambda: 0.0) as again:
        assert httpx.get(f"{again.url}/api/models/team/one?blobs=true").json() == before
        other = HfApi(endpoint=again.url, token=False)
        assert other.list_repo_refs("team/one") == refs
        again.publish("team/one", {"note.txt": "1"})
        newer, older = other.list_repo_commits("team/one")[:2]
        assert newer.created_at > older.created_at


# ------------------------------------------------------------------------------------------------ faults


def seconds_of(work: Any) -> float:
    """Time a call."""
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def test_too_many_requests(hub: DevHub, api: HfApi) -> None:
    """Both styles of header are understood: the client waits as long as it is told, and asks again."""
    for style in ("ratelimit", "retry-after"):
        hub.faults.add(Rule("^GET /api/models$", "429", count=1, seconds=0, style=style))
        assert [found.id for found in api.list_models()] == ["team/one"]
        hub.fault("/api/models/team/one", "429", count=1, seconds=7, style=style)
        with pytest.raises(HfHubHTTPError) as caught:
            api.model_info("team/one")
        told = caught.value.response.headers
        assert told.get("retry-after") == "7" or told["ratelimit"] == '"api";r=0;t=7'
    faults = [seen.fault for seen in hub.requests("^GET /api/models")]
    assert faults == ["429", "", "429"] * 2


def test_an_internal_error(hub: DevHub, api: HfApi) -> None:
    """`after` lets requests pass first, `count` ends the fault, `clear` as well."""
    hub.fault("/api/models/team/one$", "500", after=1, count=1)
    api.model_info("team/one")
    with pytest.raises(HfHubHTTPError, match="500"):
        api.model_info("team/one")
    api.model_info("team/one")
    hub.fault("", "500")
    hub.faults.clear()
    api.model_info("team/one")


def test_a_cut_download_is_resumed(hub: DevHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The body ends half-way; the client asks for the rest with Range and gets the whole."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", len(WEIGHTS) // 10)  # it keeps whole chunks only
    hub.fault(RESOLVE, "cut", count=1)
    assert fetch(hub, tmp_path) == WEIGHTS
    first, second = hub.requests(RESOLVE)
    assert (first.status, first.sent_bytes, first.fault) == (200, len(WEIGHTS) // 2, "cut")
    assert (second.status, second.range) == (206, f"bytes={len(WEIGHTS) // 2}-")


def test_ranges(hub: DevHub) -> None:
    """A part is 206 and says which; a part beyond the end is 416."""
    url = f"{hub.url}/team/one/resolve/main/model.safetensors"
    part = httpx.get(url, headers={"Range": "bytes=1000-1009"})
    assert (part.status_code, part.content) == (206, WEIGHTS[1000:1010])
    assert part.headers["content-range"] == f"bytes 1000-1009/{len(WEIGHTS)}"
    assert httpx.get(url, headers={"Range": f"bytes={len(WEIGHTS)}-"}).status_code == 416
    head = httpx.head(url).headers
    assert head["etag"] == head["x-linked-etag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    assert head["x-linked-size"] == head["content-length"] == str(len(WEIGHTS))
    assert (head["x-repo-commit"], head["accept-ranges"]) == (
        hub.store.get("team/one").find("main").id,
        "bytes",
    )


def test_a_flipped_bit_is_the_only_difference(hub: DevHub, tmp_path: Path) -> None:
    """The client takes the file: right size, one bit wrong."""
    hub.fault(RESOLVE, "flip", count=1)
    came = fetch(hub, tmp_path)
    assert len(came) == len(WEIGHTS)
    assert sum((a ^ b).bit_count() for a, b in zip(came, WEIGHTS, strict=True)) == 1


def test_hanging_and_slow_answers_take_their_time(hub: DevHub, tmp_path: Path) -> None:
    """`hang` says nothing for a while, `slow` lets the body drip; both give the right answer in the end."""
    url = f"{hub.url}/api/models/team/one"
    hub.fault("^GET /api/models/", "hang", count=2, seconds=0.3)
    assert seconds_of(lambda: httpx.get(url).raise_for_status()) >= 0.3
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(url, timeout=0.1)
    hub.fault(RESOLVE, "slow", count=1, seconds=0.4)
    assert seconds_of(lambda: fetch(hub, tmp_path)) >= 0.4


def test_a_stopped_hub_refuses_and_comes_back_at_the_same_address(hub: DevHub, api: HfApi) -> None:
    """`stop` ends what hangs as well, and `start` serves the same port again."""
    hub.fault("^GET /api/models/", "hang", count=1, seconds=60)
    with httpx.stream("GET", f"{hub.url}/healthz") as answer:
        assert answer.status_code == 404
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{hub.url}/api/models/team/one", timeout=0.1)
    assert seconds_of(hub.stop) < 3
    with pytest.raises(httpx.ConnectError):
        httpx.get(hub.url)
    hub.start()
    assert api.model_info("team/one").id == "team/one"


def test_chance_is_seeded(tmp_path: Path) -> None:
    """The same seed and the same requests give the same faults; about as many as were asked for."""

    def faults(seed: int) -> list[str]:
        hub = DevHub(tmp_path / str(seed), seed=seed)
        hub.fault("", "500", probability=0.3)
        with hub, httpx.Client(base_url=hub.url) as client:
            for _ in range(60):
                client.get("/api/models")
        return [seen.fault for seen in hub.requests()]

    first = faults(1)
    assert first == faults(1) != faults(2)
    assert 8 <= first.count("500") <= 28


def test_faults_and_counts_over_http(hub: DevHub) -> None:
    """POST /_dev/faults sets rules and refuses impossible ones; /_dev/requests counts all but itself."""
    post(hub, "faults", {"rules": [{"match": "^GET /api", "kind": kind} for kind in KINDS]})
    assert [rule["kind"] for rule in httpx.get(f"{hub.url}/_dev/faults").json()] == list(KINDS)
    for wrong in (
        {"match": "("},
        {"match": "x", "kind": "fire"},
        {"match": "x", "kind": "500", "count": "many"},
        {"match": "x", "kind": "500", "colour": 1},
        {"match": "x", "kind": "429", "style": "loud"},
    ):
        post(hub, "faults", wrong, 400)
    assert httpx.delete(f"{hub.url}/_dev/faults").json() == []
    httpx.get(f"{hub.url}/api/models?limit=1")
    counted = httpx.get(f"{hub.url}/_dev/requests", params={"match": "^GET /api/models"}).json()
    assert (counted["count"], counted["requests"][0]["query"]) == (1, "limit=1")
    assert httpx.delete(f"{hub.url}/_dev/requests").json()["count"] == 0


def test_every_fault_is_documented() -> None:
    """docs/dev-hub.md has each kind of fault, and each key of a rule with its default."""
    text = section("dev-hub.md", "Making it fail")
    assert first_words(text, "kind") == list(KINDS)
    rows = by_word(text, "key")
    assert set(rows) == {field.name for field in fields(Rule)}
    defaults = {field.name: field.default for field in fields(Rule) if field.default is not MISSING}
    for name, default in defaults.items():
        assert rows[name][1].strip("`") == ("always" if default is None else str(default)), name


# ----------------------------------------------------------------------------------------------- command


def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    """`streammerge dev-hub` says how to use it, serves, and ends well on SIGTERM."""
    port = free_port()
    line = [*STREAMMERGE, "dev-hub", "--folder", str(tmp_path / "hub"), "--listen", f"127.0.0.1:{port}"]
    log = tmp_path / "said.log"
    with log.open("wb") as said:
        process = subprocess.Popen(line, env=environment({"PYTHONUNBUFFERED": "1"}), stdout=said, stderr=said)
    try:
        until(lambda: process.poll() is not None or "Ctrl-C" in log.read_text(), "serving")
        assert f"export HF_ENDPOINT=http://127.0.0.1:{port}\n" in log.read_text()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/models", timeout=10) as answer:
            found: list[ModelInfo] = json.load(answer)
        assert found == []
        taken = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False)
        assert taken.returncode == 2
        assert "--listen" in taken.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
    wrong = subprocess.run(
        [*line[:-1], "nowhere"], env=environment(), capture_output=True, text=True, check=False
    )
    assert (wrong.returncode, "hint:" in wrong.stderr) == (2, True)
