"""The versioned store: sealed folders never change, damage is named, nothing that is needed is collected."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge import files, members, snapshots
from streammerge.errors import ConfigError, Damaged
from streammerge.members import Member, Members
from streammerge.snapshots import Snapshot, Store

NOBODY = 65534


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    made = Store(tmp_path / "store")
    made.create()
    return made


def sealed(store: Store, version: int = 0, content: str = "weights", **facts: Any) -> Snapshot:
    """Build and seal a small candidate."""
    building = snapshots.begin(store, version)
    (building / "model" / "tokenizer").mkdir()
    for name in ("model/model.safetensors", "model/tokenizer/vocab.txt", "state/sum-00001.safetensors"):
        (building / name).write_text(f"{content} of {name}")
    (building / "model" / "empty.txt").touch()
    manifest = {"version": version, "parent": None, "fine_tunes": Members(), **facts}
    return snapshots.seal(store, building, manifest, {})


def accepted(store: Store, version: int = 0, content: str = "weights") -> Snapshot:
    """Seal and accept a small version."""
    return snapshots.accept(store, sealed(store, version, content))


def opened(path: Path) -> Path:
    """Make a sealed file and its folder writable again, as an intruder or a bad disk would not have to."""
    path.parent.chmod(0o755)
    if path.exists():
        path.chmod(0o644)
    return path


# --------------------------------------------------------------------------------------------------- sealing


def test_a_folder_never_has_another_mode(tmp_path: Path) -> None:
    """A folder that a kill left under its temporary name is gone on from, with the mode that it must have."""
    made = Store(tmp_path / "store")
    left = tmp_path / "store" / ".inbox.tmp"
    left.mkdir(parents=True, mode=0o755)
    made.create()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made.root.iterdir()}
    assert modes == {"snapshots": 0o755, "inbox": 0o700, "candidates": 0o700}


def test_a_sealed_folder_is_read_only(store: Store) -> None:
    """Every folder of a sealed version is 0555 and every file 0444, as candidate and once accepted."""
    snapshot = sealed(store)
    for step in ("sealed", "accepted"):
        if step == "accepted":
            snapshot = snapshots.accept(store, snapshot)
        for path in (snapshot.path, *snapshot.path.rglob("*")):
            assert stat.S_IMODE(path.stat().st_mode) == (0o555 if path.is_dir() else 0o444), path


def test_the_digest_is_the_manifests(store: Store) -> None:
    """A snapshot's digest is the sha256 of manifest.json and stands in its folder's name."""
    snapshot = sealed(store, 42, parent="p", fine_tunes=Members([Member("s", "n", "r", "d", 1.0)]))
    content = (snapshot.path / "manifest.json").read_bytes()
    assert snapshot.digest == hashlib.sha256(content).hexdigest()
    assert snapshot.path.name == f"000042-{snapshot.digest[:12]}"
    assert snapshot.path.parent == store.candidates
    assert (snapshot.version, snapshot.parent, snapshot.digests) == (42, "p", ["d"])
    assert snapshots.read(snapshot.path) == snapshot


def test_the_manifest_lists_every_file(store: Store) -> None:
    """manifest.json is canonical JSON with size and hash of every other file, and holds no time."""
    snapshot = sealed(store)
    content = (snapshot.path / "manifest.json").read_bytes()
    listed = json.loads(content)["files"]
    found = [p for p in snapshot.path.rglob("*") if p.is_file() and p.name != "manifest.json"]
    assert set(listed) == {p.relative_to(snapshot.path).as_posix() for p in found}
    for path in found:
        facts = listed[path.relative_to(snapshot.path).as_posix()]
        whole = path.read_bytes()
        assert facts == {"sha256": hashlib.sha256(whole).hexdigest(), "bytes": len(whole)}
    assert content == files.canonical_json(json.loads(content))


TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["},\n  {", "},  {", "é\n", '"'])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
ROWS = st.lists(st.dictionaries(TEXT, PLAIN))


@given(
    st.recursive(PLAIN, lambda part: st.lists(part) | st.dictionaries(TEXT, part) | ROWS, max_leaves=20),
    st.integers(1, 3),
)
def test_a_manifest_is_written_as_the_json_library_writes_it(value: object, depth: int) -> None:
    """Sorted keys and an indent of one, to the byte, whatever stands in the strings."""
    for nested in (
        value,
        {"a": [value] * depth},
        [{"b": value}, {}] * depth,
        [{"c": 1}] * (files.PIECES + 1),
    ):
        text = json.dumps(nested, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        assert files.canonical_json(nested) == f"{text}\n".encode()


@given(st.lists(st.tuples(TEXT, TEXT, TEXT, TEXT, st.floats(allow_nan=False, allow_infinity=False))))
def test_a_member_is_written_as_the_object_that_it_is_read_from(listed: list[Any]) -> None:
    """In a manifest, and alone; what is read again is the same."""
    found = [Member(*fields) for fields in listed]
    objects = [member._asdict() for member in found]
    whole = files.canonical_json({"fine_tunes": objects})
    assert whole == files.canonical_json({"fine_tunes": Members(found)})
    assert members.parse(whole) == {"fine_tunes": Members(found)}


@pytest.mark.parametrize("value", ['{"a": 1}', "[1]", "null", "7"])
@pytest.mark.parametrize("field", ["source", "weight"])
def test_a_manifest_that_lists_something_else_is_damaged(store: Store, field: str, value: str) -> None:
    """Whatever was written into it: it is named, and is no crash."""
    snapshot = accepted(store)
    listed = {**dict.fromkeys(Member._fields, "x"), "weight": 1.0, field: json.loads(value)}
    opened(snapshot.path / "manifest.json").write_text(json.dumps({"version": 0, "fine_tunes": [listed]}))
    with pytest.raises(Damaged, match=r"manifest\.json (cannot be read|is not the one that was sealed)"):
        snapshots.read(snapshot.path)


@pytest.mark.parametrize(
    "found",
    [{"fine_tunes": [None]}, {"fine_tunes": [], "x": dict.fromkeys(Member._fields)}, {"fine_tunes": {}}],
)
def test_only_the_list_of_fine_tunes_holds_some(found: dict[str, Any]) -> None:
    """A manifest that lists nothing known, or has a fine-tune elsewhere, is none."""
    with pytest.raises(ValueError, match="lists something else than fine-tunes"):
        members.parse(json.dumps(found).encode())


def test_the_same_content_has_the_same_digest(store: Store) -> None:
    """Sealing the same files with the same facts twice gives the same digest; one byte more another."""
    one = sealed(store)
    files.remove_tree(one.path)
    again = sealed(store)
    files.remove_tree(again.path)
    assert again.digest == one.digest
    assert sealed(store, content="other weights").digest != one.digest


def test_what_a_kill_left_behind_is_built_anew(store: Store) -> None:
    """A building folder that a kill left, even one already read-only, is removed and never counts."""
    for name in (".building-000003", ".building-000004"):
        (store.candidates / name / "model").mkdir(parents=True)
        (store.candidates / name / "model" / "half").write_text("half")
        files.protect(store.candidates / name)
    (store.root / ".current.tmp").symlink_to("nowhere")
    building = snapshots.begin(store, 3)
    assert not (building / "model" / "half").exists()
    assert snapshots.folders(store.candidates) == []
    assert set(snapshots.remove_unfinished(store)) == {".building-000003", ".building-000004"}
    assert list(store.candidates.iterdir()) == []
    assert not (store.root / ".current.tmp").is_symlink()


def test_accepting_moves_the_folder(store: Store) -> None:
    """An accepted version is in snapshots/ under the same name and no longer a candidate."""
    candidate = sealed(store, 7)
    snapshot = snapshots.accept(store, candidate)
    assert snapshot.path == store.snapshots / candidate.path.name
    assert not candidate.path.exists()
    assert snapshots.by_version(store, 7) == snapshot.path
    snapshots.check_hashes(snapshots.read(snapshot.path))


def test_current_points_into_snapshots_by_a_relative_link(store: Store) -> None:
    """`current` is a relative link that is swapped whole; before the first promotion there is none."""
    assert snapshots.current(store) is None
    for version in (0, 1):
        snapshot = accepted(store, version)
        snapshots.switch(store, snapshot)
        assert os.readlink(store.current) == f"snapshots/{snapshot.path.name}"  # noqa: PTH115 -- as it is written
        assert snapshots.current(store) == snapshot.path
        assert store.current.resolve() == snapshot.path.resolve()
    with pytest.raises(AssertionError):
        snapshots.switch(store, sealed(store, 2))


def test_an_unprivileged_user_seals_and_accepts(tmp_path: Path) -> None:
    """A user who is not root seals, accepts, promotes and removes, though all that is sealed is read-only."""
    script = textwrap.dedent(
        """
        import os, pathlib, sys
        from streammerge import files, members, snapshots
        os.chdir(sys.argv[1])
        if os.getuid() == 0:
            os.setgid(int(sys.argv[2]))
            os.setuid(int(sys.argv[2]))
        store = snapshots.Store(pathlib.Path("store"))
        store.create()
        for version in (0, 1):
            building = snapshots.begin(store, version)
            (building / "model" / "w").write_text("w")
            manifest = {"version": version, "parent": None, "fine_tunes": members.Members()}
            sealed = snapshots.seal(store, building, manifest, {})
            try:
                (sealed.path / "model" / "w").write_text("changed")
            except PermissionError:
                pass
            else:
                sys.exit("a sealed file could be written")
            snapshot = snapshots.accept(store, sealed)
            snapshots.switch(store, snapshot)
            snapshots.check_hashes(snapshots.read(snapshot.path))
        files.remove_tree(snapshots.by_version(store, 0))
        snapshots.begin(store, 2)
        snapshots.remove_unfinished(store)
        print(sorted(p.name[:6] for p in store.snapshots.iterdir()), os.getuid())
        """
    )
    place = tmp_path / "home"
    place.mkdir()
    if os.getuid() == 0:
        os.chown(place, NOBODY, NOBODY)
    ended = subprocess.run(
        [sys.executable, "-c", script, str(place), str(NOBODY)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(snapshots.__file__).parents[1],
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["['000001']", str(NOBODY if os.getuid() == 0 else os.getuid())]


# ---------------------------------------------------------------------------------------------------- damage

PLACES = (
    "model/model.safetensors",
    "model/tokenizer/vocab.txt",
    "state/sum-00001.safetensors",
)


@pytest.mark.parametrize("name", PLACES)
def test_a_flipped_bit_is_named(name: str, store: Store) -> None:
    """One bit of one file is found by the hashes, and the file is named; sizes alone do not see it."""
    snapshot = accepted(store)
    path = opened(snapshot.path / name)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    snapshots.check_sizes(snapshot)
    with pytest.raises(Damaged, match=Path(name).name) as caught:
        snapshots.check_hashes(snapshot)
    assert str(path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", [*PLACES, "model/empty.txt"])
@pytest.mark.parametrize("harm", ["missing", "longer", "folder"])
def test_a_file_of_another_size_is_named(name: str, harm: str, store: Store) -> None:
    """A file that is missing, longer, or a folder now, is found without reading contents, and named."""
    snapshot = accepted(store)
    path = opened(snapshot.path / name)
    if harm == "longer":
        path.write_bytes(path.read_bytes() + b"!")
    else:
        path.unlink()
    if harm == "folder":
        path.mkdir()
    with pytest.raises(Damaged) as caught:
        snapshots.check_sizes(snapshot)
    assert str(path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "name", ["extra.txt", "model/extra.safetensors", "state/new/deep.txt", "model/.hidden"]
)
def test_a_file_that_was_not_sealed_is_named(name: str, store: Store) -> None:
    """What was put into a sealed folder later is found and named."""
    snapshot = accepted(store)
    path = snapshot.path / name
    for folder in (snapshot.path, snapshot.model, snapshot.state):
        folder.chmod(0o755)
    path.parent.mkdir(exist_ok=True)
    path.write_text("extra")
    with pytest.raises(Damaged) as caught:
        snapshots.check_sizes(snapshot)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    "harm", ["edited", "missing", "empty", "not-json", "list", "renamed", "other-number"]
)
def test_an_edited_manifest_is_damage(harm: str, store: Store) -> None:
    """A manifest that does not hash to its folder's name, or none, is damage that names the folder."""
    snapshot = accepted(store, 5)
    path, folder = opened(snapshot.path / "manifest.json"), snapshot.path
    if harm == "edited":
        path.write_bytes(path.read_bytes().replace(b'"version": 5', b'"version":  5'))
    elif harm == "missing":
        path.unlink()
    elif harm in ("renamed", "other-number"):
        number, digest = snapshot.path.name.split("-")
        folder = store.snapshots / (f"{number}-{digest[::-1]}" if harm == "renamed" else f"000006-{digest}")
        snapshot.path.rename(folder)
    else:
        path.write_bytes({"empty": b"", "not-json": b"\xff{", "list": b"[]"}[harm])
    with pytest.raises(Damaged) as caught:
        snapshots.read(folder)
    assert folder.name in caught.value.message
    assert caught.value.hint


def test_a_store_of_another_format_is_not_read(store: Store) -> None:
    """store.json of another release is a configuration error; one that cannot be read is damage."""
    assert not Store(store.root).exists
    store.settings.write_text(json.dumps({"format": snapshots.FORMAT}))
    assert Store(store.root).exists
    assert store.read_settings() == {"format": snapshots.FORMAT}
    store.settings.write_text(json.dumps({"format": snapshots.FORMAT + 1}))
    with pytest.raises(ConfigError, match="format"):
        store.read_settings()
    for content in ("", "{", "\0"):
        store.settings.write_text(content)
        with pytest.raises(Damaged):
            store.read_settings()


# ---------------------------------------------------------------------------------------------------- listing


def test_versions_are_listed_by_number(store: Store) -> None:
    """Folders are ordered by number, also beyond six digits; what is named otherwise is passed over."""
    for name in ("1000000-", "000010-", "000009-", "999999-"):
        (store.snapshots / (name + "a" * 12)).mkdir()
    for name in (".building-000001", "lost+found", "000011-short", "000012-" + "Z" * 12):
        (store.snapshots / name).mkdir()
    assert [int(p.name.split("-")[0]) for p in snapshots.folders(store.snapshots)] == [
        9,
        10,
        999_999,
        1_000_000,
    ]
    assert snapshots.by_version(store, 10) == store.snapshots / ("000010-" + "a" * 12)
    assert snapshots.by_version(store, 11) is None
    assert snapshots.folders(store.root / "nowhere") == []


@given(
    versions=st.sets(st.integers(0, 40), max_size=12),
    keep=st.integers(0, 12),
    wanted=st.sets(st.integers(0, 40), max_size=4),
)
def test_nothing_that_must_stay_is_collectable(
    tmp_path_factory: pytest.TempPathFactory, versions: set[int], keep: int, wanted: set[int]
) -> None:
    """Collectable is every version but the newest `keep` and those named; oldest first, and nothing else."""
    store = Store(tmp_path_factory.mktemp("store"))
    store.create()
    paths = {v: store.snapshots / snapshots.folder_name(v, f"{v:064d}"[::-1]) for v in versions}
    for path in paths.values():
        path.mkdir()
    always, numbers = [paths[v] for v in wanted & versions if v % 2], {v for v in wanted if v % 2 == 0}
    newest = sorted(versions, reverse=True)[:keep]
    expected = [paths[v] for v in sorted(versions) if v not in newest and v not in wanted]
    assert snapshots.collectable(store, keep=keep, keep_always=always, versions=numbers) == expected


def test_a_version_can_be_removed_twice(store: Store) -> None:
    """A removed version is gone; removing it once more, as after a kill, is no error."""
    snapshot = accepted(store)
    files.remove_tree(snapshot.path)
    assert list(store.snapshots.iterdir()) == []
    files.remove_tree(snapshot.path)


def test_what_goes_while_it_is_read_was_read(store: Store) -> None:
    """A version whose folder is removed right after its manifest was read is no bug, and not remembered."""
    snapshot = accepted(store)
    manifest = opened(snapshot.path / "manifest.json")
    content = manifest.read_bytes()
    manifest.unlink()
    os.mkfifo(manifest)

    def write_and_remove() -> None:
        with manifest.open("wb") as pipe:
            pipe.write(content)
            manifest.unlink()

    remover = threading.Thread(target=write_and_remove)
    remover.start()
    assert snapshots.read(snapshot.path).digest == snapshot.digest
    remover.join()
    with pytest.raises(Damaged):
        snapshots.read(snapshot.path)
