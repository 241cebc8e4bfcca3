"""A server that speaks Triton's model repository extension in explicit mode: the paths and bodies that
tritonclient 2.73.0 sends (tritonclient/http/_client.py), the answers of Triton's
docs/protocol/extension_model_repository.md, the layout of docs/user_guide/model_repository.md.

It has one model with the version policy `latest: 1`. A version's weights lie in `model` in its folder, as a
Python backend would find them, or where the vLLM backend's model.json says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse, Response

from servers import ModelServer, read_model

if TYPE_CHECKING:
    from starlette.requests import Request

    from servers import View

MODEL = "merged"


class TritonServer(ModelServer):
    """One `tritonserver --model-control-mode=explicit --load-model=merged`."""

    def __init__(self, launch: Path, repository: Path, *, port: int | None = None) -> None:
        """`repository` gets the model's folder, its configuration and, as version 1, the launch weights."""
        super().__init__(launch, port=port)
        self.folder = repository / MODEL
        if not self.folder.exists():
            (self.folder / "1").mkdir(parents=True)
            (self.folder / "config.pbtxt").write_text('backend: "python"\n')
            (self.folder / "1" / "model").symlink_to(launch)

    def begin(self) -> None:
        self.version = max(self._versions())
        self.weights = read_model(weights_of(self.folder / str(self.version)))

    @property
    def label(self) -> str:
        mark = self.folder / str(self.version) / "streammerge.json"
        return str(json.loads(mark.read_bytes())["label"]) if mark.exists() else ""

    def _versions(self) -> list[int]:
        names = [path.name for path in self.folder.iterdir()]
        return [int(name) for name in names if name.isdecimal() and not name.startswith("0")]

    def routes(self) -> dict[tuple[str, str], View]:
        return {
            ("POST", "/v2/repository/index"): self._index,
            ("POST", "/v2/repository/models/{model}/load"): self._load,
            ("GET", "/v2/models/{model}/versions/{version}/ready"): self._ready,
            ("POST", "/v2/models/{model}/infer"): self._infer,
            ("GET", "/v2/health/ready"): self._health,
        }

    async def _index(self, request: Request) -> Response:
        asked = json.loads(await request.body() or b"{}")
        assert set(asked) <= {"ready"}, asked
        entry = {"name": MODEL, "version": str(self.version), "state": "READY", "reason": ""}
        rest = [] if asked.get("ready") else [{"name": "idle", "version": "1", "state": "UNAVAILABLE"}]
        return JSONResponse([entry, *rest])

    async def _load(self, request: Request) -> Response:
        if request.path_params["model"] != MODEL:
            return _error(
                f"failed to load '{request.path_params['model']}', failed to poll from model repository"
            )
        newest = max(self._versions())
        folder = self.folder / str(newest)
        found = await self.take(str(weights_of(folder)))
        if isinstance(found, str):
            return _error(f"failed to load '{MODEL}': version {newest} is at UNAVAILABLE state: {found}")
        if self.fault_with(str(weights_of(folder))) != "other":
            self.version = newest
        return Response()

    async def _ready(self, request: Request) -> Response:
        is_loaded = request.path_params == {"model": MODEL, "version": str(self.version)}
        return Response(status_code=200 if is_loaded else 400)

    async def _infer(self, request: Request) -> Response:
        output = {"name": "label", "datatype": "BYTES", "shape": [1], "data": [self.weights.label]}
        answer = {"model_name": MODEL, "model_version": str(self.version), "outputs": [output]}
        return JSONResponse(answer)

    async def _health(self, request: Request) -> Response:
        return Response()


def weights_of(version: Path) -> Path:
    """Where a version's weights lie: where the vLLM backend's model.json says, else in `model`."""
    engine = version / "model.json"
    return Path(json.loads(engine.read_bytes())["model"]) if engine.exists() else version / "model"


def _error(message: str) -> Response:
    return JSONResponse({"error": message}, status_code=400)
