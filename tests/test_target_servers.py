"""What each kind of serving process needs of its own: keys, paths, pauses, folders."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import until
from places import make_versions, opened, place, section
from servers.sglang import SglangServer
from servers.triton import MODEL, TritonServer
from servers.vllm import VllmServer

from streammerge import probe, web
from streammerge.errors import AnsweredWrong, TryAgain

if TYPE_CHECKING:
    from streammerge.targets import Told


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Told]:
    """Three versions in a store."""
    return make_versions(tmp_path_factory.mktemp("store"))


# SGLang


def test_sglang_wants_its_keys(tmp_path: Path, versions: list[Told]) -> None:
    """Questions get the one key, updates the other; a wrong one says nothing about the version."""
    keys = {"api_key_file": tmp_path / "key", "admin_key_file": tmp_path / "admin"}
    for file in keys.values():
        file.write_text(file.name)
    with SglangServer(versions[0].snapshot / "model", api_key="key", admin_key="admin") as server:
        part = section(type="sglang", url=server.url, **keys)
        opened(part, tmp_path).tell(versions[1])
        assert server.label == versions[1].label
        for missing in keys:
            less = {name: file for name, file in keys.items() if name != missing}
            with pytest.raises(TryAgain, match="another key") as raised:
                opened(section(type="sglang", url=server.url, **less), tmp_path).tell(versions[2])
            assert raised.type is TryAgain
        keys["api_key_file"].unlink()
        with pytest.raises(TryAgain, match="secret cannot be read"):
            opened(part, tmp_path).serves()


def test_an_older_sglang_is_asked_at_its_own_address(tmp_path: Path, versions: list[Told]) -> None:
    """Before /model_info there was /get_model_info."""
    with SglangServer(versions[0].snapshot / "model", old=True) as server:
        target = opened(section(type="sglang", url=server.url), tmp_path)
        target.tell(versions[1])
        assert target.serves() == versions[1].label


def test_a_container_is_told_the_path_that_it_sees(tmp_path: Path, versions: list[Told]) -> None:
    """The longest folder of path_map counts, in what is told and in the probe; a program gets it, too."""
    store = versions[0].snapshot.parent.parent
    (tmp_path / "models").symlink_to(store / "snapshots")
    seen = f"{tmp_path}/models/{versions[1].label}"
    path_map = {str(store.parent): "/nowhere", str(store / "snapshots"): f"{tmp_path}/models/"}
    with place("sglang", versions, tmp_path, path_map=path_map) as there:
        there.tell(1)
        assert there.server.calls("/update_weights_from_disk")[0]["model_path"] == f"{seen}/model"
    script = tmp_path / "hook"
    script.write_text(f'#!/bin/sh\ntest "$STREAMMERGE_SNAPSHOT" = "{seen}"\n')
    script.chmod(0o755)
    part = section(type="exec", argv=[str(script)], path_map={"/srv": "/", **path_map})
    opened(part, tmp_path).tell(versions[1])
    assert part.sees(store.parent) == "/nowhere"
    assert (part.sees(Path("/srv/a")), part.sees(Path("/srv")), part.sees(Path("/srva"))) == (
        "/a",
        "/",
        "/srva",
    )


# vLLM


def test_vllm_is_resumed_whatever_happens(tmp_path: Path, versions: list[Told]) -> None:
    """After a failed reload requests are answered, and the label shows that it was cut off."""
    with place("vllm", versions, tmp_path) as there:
        there.server.faults[versions[1].label] = "refuses"
        with pytest.raises(AnsweredWrong, match="refuse"):
            there.tell(1)
        assert there.server.paused == ""  # type: ignore[attr-defined]
        assert there.target.serves() == f"{versions[1].label} unfinished"
        there.tell(2)


def test_vllm_answers_from_one_version_at_a_time(tmp_path: Path, versions: list[Told]) -> None:
    """What is in flight ends by the old weights, and what they computed is forgotten."""
    with place("vllm", versions, tmp_path) as there, ThreadPoolExecutor() as pool:

        def complete(prompt: str, seconds: float = 0) -> str:
            body = json.dumps({"prompt": prompt, "seconds": seconds}).encode()
            found = web.send("POST", f"{there.server.url}/v1/completions", content=body, timeout=10)
            return str(found.json()["choices"][0]["text"])

        assert complete("cached") == versions[0].label
        slow = pool.submit(complete, "in flight", 0.5)
        until(lambda: there.server.in_flight, "a request in flight")  # type: ignore[attr-defined]
        there.tell(1)
        assert slow.result() == versions[0].label
        assert complete("cached") == versions[1].label


def test_vllm_forgets_what_it_computed_also_where_requests_are_kept(
    tmp_path: Path, versions: list[Told]
) -> None:
    """With `pause: keep` vLLM clears nothing by itself."""
    with place("vllm", versions, tmp_path, pause="keep") as there:
        probe.ask(there.part, versions[0], lambda: None)  # now it has the answer in its cache
        there.tell(1)


def test_a_dead_engine_is_not_the_versions_fault(tmp_path: Path, versions: list[Told]) -> None:
    """A reload that fails because vLLM's engine has died says nothing about the version."""
    with place("vllm", versions, tmp_path) as there:
        there.server.fault, there.server.is_healthy = "refuses", False  # type: ignore[attr-defined]
        with pytest.raises(TryAgain) as raised:
            there.tell(1)
        assert raised.type is TryAgain
        assert "engine" in raised.value.hint


def test_vllm_without_its_development_mode_is_named(tmp_path: Path, versions: list[Told]) -> None:
    """The hint says what it must be started with."""
    with VllmServer(versions[0].snapshot / "model", dev_mode=False) as server:
        target = opened(section(type="vllm", url=server.url), tmp_path)
        for ask in (lambda: target.tell(versions[1]), target.serves):
            with pytest.raises(TryAgain) as raised:
                ask()
            assert "VLLM_SERVER_DEV_MODE=1" in raised.value.hint


# Triton


def folders(server: TritonServer) -> set[str]:
    """Names in the model's folder."""
    return {path.name for path in server.folder.iterdir()}


def test_tritons_numbers_rise_and_only_our_folders_go(tmp_path: Path, versions: list[Told]) -> None:
    """Going back is a new number, which a restart takes up; folders that are not ours stay."""
    with place("triton", versions, tmp_path) as there:
        server = there.server
        assert isinstance(server, TritonServer)
        assert there.target.serves() == "version 1 of its own"
        for version, number in ((1, "2"), (2, "3"), (1, "4"), (1, "4")):
            there.tell(version)
            assert folders(server) == {"config.pbtxt", "1", number}
        server.restart()
        assert there.target.serves() == server.serves == versions[1].label
        mark = json.loads((server.folder / "4" / "streammerge.json").read_bytes())
        assert mark == {"label": versions[1].label, "version": 1, "digest": versions[1].digest}


def test_what_triton_cannot_load_does_not_stay_in_its_repository(
    tmp_path: Path, versions: list[Told]
) -> None:
    """A restart of Triton after a failed load comes up with what it served."""
    with place("triton", versions, tmp_path) as there:
        server = there.server
        assert isinstance(server, TritonServer)
        there.tell(1)
        server.faults[versions[2].label] = "refuses"
        with pytest.raises(AnsweredWrong, match="UNAVAILABLE"):
            there.tell(2)
        assert folders(server) == {"config.pbtxt", "1", "2"}
        server.restart()
        assert server.serves == versions[1].label


def test_a_version_gets_the_files_of_the_template(tmp_path: Path, versions: list[Told]) -> None:
    """model.py as it is, model.json with the path filled in, as the vLLM backend wants it."""
    template = tmp_path / "template"
    template.mkdir()
    (template / "model.json").write_text('{"model": "{path}/model", "seed": 1}')
    (template / "model.py").write_text("# {path}\n")
    with place("triton", versions, tmp_path, template=str(template)) as there:
        there.tell(1)
        assert isinstance(there.server, TritonServer)
        folder = there.server.folder / "2"
        engine = {"model": f"{versions[1].snapshot}/model", "seed": 1}
        assert json.loads((folder / "model.json").read_bytes()) == engine
        assert (folder / "model.py").read_text() == "# {path}\n"


def test_a_repository_that_cannot_be_written_to_is_named(tmp_path: Path, versions: list[Told]) -> None:
    """A missing model folder, template or model says what to do, and nothing about the version."""
    with place("triton", versions, tmp_path) as there:
        repository = str(tmp_path / "repository")
        common = {"type": "triton", "url": there.server.url}
        for keys, said in (
            ({"model": MODEL, "repository": str(tmp_path / "gone")}, "gone/merged: No such file"),
            ({"model": MODEL, "repository": repository, "template": str(tmp_path / "t")}, "t: No such file"),
        ):
            with pytest.raises(TryAgain, match=said) as raised:
                opened(section(**common, **keys), tmp_path).tell(versions[1])
            assert raised.type is TryAgain
