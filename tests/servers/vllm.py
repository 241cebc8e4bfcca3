"""A server that speaks vLLM's protocol in development mode, as release 0.33.0 has it: the routes of
vllm/entrypoints/rl/online/api_router.py, of rpc and cache in vllm/entrypoints/serve/dev, /health of
serve/instrumentator; a worker's error becomes 500 as in serve/exception_handling.

As there, the label is kept beside the weights and knows nothing of them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse, Response

from servers import ModelServer

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.requests import Request

    from servers import View


class VllmServer(ModelServer):
    """One `vllm serve` with VLLM_SERVER_DEV_MODE=1."""

    def __init__(self, launch: Path, *, port: int | None = None, dev_mode: bool = True) -> None:
        """Without `dev_mode` it has only what users may ask."""
        super().__init__(launch, port=port)
        self.dev_mode = dev_mode
        self.is_healthy = True

    def begin(self) -> None:
        super().begin()
        self.weight_version, self.paused = "default", ""
        self.cache: dict[str, str] = {}
        self.in_flight = 0

    @property
    def label(self) -> str:
        return self.weight_version

    def routes(self) -> dict[tuple[str, str], View]:
        public: dict[tuple[str, str], View] = {
            ("GET", "/health"): self._health,
            ("POST", "/v1/completions"): self._complete,
        }
        if not self.dev_mode:
            return public
        return public | {
            ("POST", "/pause"): self._pause,
            ("POST", "/resume"): self._resume,
            ("GET", "/is_paused"): self._is_paused,
            ("POST", "/collective_rpc"): self._call,
            ("POST", "/reset_prefix_cache"): self._reset,
            ("POST", "/update_weight_version"): self._set_label,
            ("GET", "/weight_info"): self._info,
        }

    async def _health(self, request: Request) -> Response:
        return Response(status_code=200 if self.is_healthy else 503)

    async def _pause(self, request: Request) -> Response:
        mode = request.query_params.get("mode", "abort")
        if mode not in ("abort", "wait", "keep"):
            return JSONResponse({"error": f"mode {mode}"}, status_code=400)
        self.paused = mode
        while mode == "wait" and self.in_flight:  # noqa: ASYNC110 -- a test can wait so
            await asyncio.sleep(0.01)
        if mode != "keep" and request.query_params.get("clear_cache", "true") == "true":
            self.cache = {}
        return JSONResponse({"status": "paused"})

    async def _resume(self, request: Request) -> Response:
        self.paused = ""
        return JSONResponse({"status": "resumed"})

    async def _is_paused(self, request: Request) -> Response:
        return JSONResponse({"is_paused": bool(self.paused)})

    async def _call(self, request: Request) -> Response:
        body = await request.json()
        assert set(body) <= {"method", "args", "kwargs", "timeout"}, body
        assert body["method"] == "reload_weights", body
        assert set(body["kwargs"]) <= {"weights_path", "is_checkpoint_format"}, body
        folder = body["kwargs"]["weights_path"]
        found = await self.take(folder)
        if isinstance(found, str):
            error = {"message": found, "type": "InternalServerError", "param": None, "code": 500}
            return JSONResponse({"error": error}, status_code=500)
        return JSONResponse({"results": [None]})

    async def _reset(self, request: Request) -> Response:
        is_free = not self.in_flight or request.query_params.get("reset_running_requests") == "true"
        if is_free:
            self.cache = {}
        return JSONResponse({"success": is_free})

    async def _set_label(self, request: Request) -> Response:
        label = (await request.json())["new_version"]
        if self.fault_with(f"{label}/model") == "other":
            label = "another-version"
        self.weight_version = label
        return JSONResponse({"success": True, "new_version": label})

    async def _info(self, request: Request) -> Response:
        return JSONResponse({"weight_version": self.weight_version})

    async def _complete(self, request: Request) -> Response:
        if self.paused in ("wait", "abort"):
            error = {"message": "paused", "type": "ServiceUnavailableError", "param": None, "code": 503}
            return JSONResponse({"error": error}, status_code=503)
        while self.paused:  # noqa: ASYNC110 -- a test can wait so
            await asyncio.sleep(0.01)
        self.in_flight += 1
        try:
            body = await request.json()
            await asyncio.sleep(float(body.get("seconds", 0)))
            text = self.cache.setdefault(body["prompt"], self.weights.label)
        finally:
            self.in_flight -= 1
        choice = {"index": 0, "text": text, "finish_reason": "stop"}
        return JSONResponse({"object": "text_completion", "choices": [choice]})
