"""A server that speaks SGLang's protocol, as release 0.5.23 has it: the routes of
sglang/srt/entrypoints/http_server.py, the fields of `UpdateWeightFromDiskReqInput` in
sglang/srt/managers/io_struct.py, the keys as sglang/srt/utils/auth.py decides about them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.responses import JSONResponse, Response

from servers import ModelServer

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.requests import Request

    from servers import View


class UpdateWeightFromDisk(BaseModel):
    """What /update_weights_from_disk takes."""

    model_config = ConfigDict(extra="forbid")

    model_path: str
    load_format: str | None = None
    abort_all_requests: bool = False
    weight_version: str | None = None
    is_async: bool = False
    torch_empty_cache: bool = False
    keep_pause: bool = False
    recapture_cuda_graph: bool = False
    token_step: int = 0
    flush_cache: bool = True
    manifest: dict[str, Any] | None = None


class SglangServer(ModelServer):
    """One `python -m sglang.launch_server`."""

    def __init__(
        self,
        launch: Path,
        *,
        port: int | None = None,
        api_key: str = "",
        admin_key: str = "",
        old: bool = False,
    ) -> None:
        """`old`: from before /model_info, which had another name then."""
        super().__init__(launch, port=port)
        self.api_key, self.admin_key, self.old = api_key, admin_key, old
        self.cache: dict[str, str] = {}

    def begin(self) -> None:
        super().begin()
        self.model_path, self.weight_version = str(self.launch), "default"
        self.cache = {}

    @property
    def label(self) -> str:
        return self.weight_version

    def routes(self) -> dict[tuple[str, str], View]:
        info = "/get_model_info" if self.old else "/model_info"
        return {
            ("GET", info): self._info,
            ("POST", "/update_weights_from_disk"): self._update,
            ("POST", "/generate"): self._generate,
            ("GET", "/health"): self._health,
        }

    async def _info(self, request: Request) -> Response:
        if not self._allows(request, self.api_key):
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        return JSONResponse(
            {
                "model_path": self.model_path,
                "served_model_name": str(self.launch),
                "tokenizer_path": str(self.launch),
                "is_generation": True,
                "weight_version": self.weight_version,
                "load_format": "auto",
            }
        )

    async def _update(self, request: Request) -> Response:
        if not self._allows(request, self.admin_key or self.api_key):
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        try:
            asked = UpdateWeightFromDisk.model_validate_json(await request.body())
        except ValidationError as exc:
            return JSONResponse({"error": {"message": str(exc)}}, status_code=400)
        found = await self.take(asked.model_path)
        if isinstance(found, str):
            message = f"Failed to update weights: {found}.\nRolling back to original weights."
            return JSONResponse(
                {"success": False, "message": message, "num_paused_requests": 0}, status_code=400
            )
        self.model_path = asked.model_path
        if asked.flush_cache:
            self.cache = {}
        if asked.weight_version is not None:
            is_other = self.fault_with(asked.model_path) == "other"
            self.weight_version = "another-version" if is_other else asked.weight_version
        message = "Succeeded to update model weights."
        return JSONResponse({"success": True, "message": message, "num_paused_requests": 0})

    async def _generate(self, request: Request) -> Response:
        if not self._allows(request, self.api_key):
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        text = self.cache.setdefault((await request.json())["text"], self.weights.label)
        return JSONResponse({"text": text, "meta_info": {"weight_version": self.weight_version}})

    async def _health(self, request: Request) -> Response:
        return Response()

    @staticmethod
    def _allows(request: Request, key: str) -> bool:
        return not key or request.headers.get("authorization") == f"Bearer {key}"
