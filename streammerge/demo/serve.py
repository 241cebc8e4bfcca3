"""A small real server of the demo's model: `python -m streammerge.demo.serve PORT EXAM MODEL`.

It answers what a version makes of digits, and exchanges its weights in place when it is told to, by SGLang's
protocol. A version is one object that never changes; a request takes it once, and answers from it whatever
happens meanwhile. So a switch interrupts no request, and no answer is of two versions.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import uvicorn
from safetensors import SafetensorError
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch.nn.functional import linear

from streammerge.demo import digits

if TYPE_CHECKING:
    from starlette.requests import Request

    from streammerge.demo.digits import Exam, Model

HOST = "127.0.0.1"
MOST_IMAGES = 10_000  # in one request


@dataclass(frozen=True)
class Version:
    """What is served: weights, and what they are called."""

    label: str
    folder: str
    weights: Model


class Server:
    """The version that is served now, and what may be asked of it."""

    def __init__(self, exam: Exam, folder: Path) -> None:
        """`folder` is the model that it is launched with."""
        self.exam = exam
        self._now = Version("default", str(folder), _load(folder, exam))
        self._loading = asyncio.Lock()

    def app(self) -> Starlette:
        """Lay the answers on their addresses."""
        return Starlette(
            routes=[
                Route("/predict", self.predict, methods=["POST"]),
                Route("/model_info", self.model_info),
                Route("/update_weights_from_disk", self.update, methods=["POST"]),
            ]
        )

    async def predict(self, request: Request) -> Response:
        """Answer {"images": [row, …], "task": …}: one answer an image, the scores, and by which version."""
        version = self._now
        try:
            asked = await request.json()
            head = self.exam.heads[asked.get("task", digits.SKILL)]
            rows = _rows(asked["images"])
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as exc:
            return JSONResponse({"error": f"{type(exc).__name__}: {exc}"}, status_code=400)
        scores = await asyncio.to_thread(answer, version.weights, self.exam.images[rows], head)
        said = {"label": version.label, "answers": scores.argmax(-1).tolist(), "scores": scores.tolist()}
        return JSONResponse(said)

    async def model_info(self, _request: Request) -> Response:
        """Say what is served, as SGLang says it."""
        version = self._now
        return JSONResponse(
            {"model_path": version.folder, "weight_version": version.label, "is_generation": False}
        )

    async def update(self, request: Request) -> Response:
        """Load a folder beside what is served, then serve it; one that is no model changes nothing."""
        try:
            asked = await request.json()
            folder, label = str(asked["model_path"]), str(asked.get("weight_version") or "default")
            async with self._loading:
                weights = await asyncio.to_thread(_load, Path(folder), self.exam)
                self._now = Version(label, folder, weights)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as exc:
            return _updated(success=False, message=f"{type(exc).__name__}: {exc}")
        return _updated(success=True, message=f"serving {label}")


def _rows(asked: object) -> torch.Tensor:
    """Check which images are asked about, [n] int64."""
    rows = torch.tensor(asked, dtype=torch.int64)
    if rows.ndim != 1 or not 0 < len(rows) <= MOST_IMAGES or rows.min() < 0 or rows.max() >= digits.IMAGES:
        raise ValueError(f"images are 1 to {MOST_IMAGES:,} numbers from 0 to {digits.IMAGES - 1}")
    return rows


@torch.inference_mode()
def answer(weights: Model, images: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """What a version makes of images: one score for each possible answer, [n, answers]."""
    return linear(digits.features(weights, images), head)


def _load(folder: Path, exam: Exam) -> Model:
    """Read weights, and let them answer once: what does not fit is found before it is served."""
    weights = digits.load_model(folder)
    answer(weights, exam.images[:1], exam.heads[digits.SKILL])
    return weights


def _updated(*, success: bool, message: str) -> Response:
    content = {"success": success, "message": message, "num_paused_requests": 0}
    return JSONResponse(content, status_code=200 if success else 400)


def main(port: str, exam: str, folder: str) -> None:
    """Serve until SIGTERM."""
    torch.set_num_threads(1)
    server = Server(digits.load_exam(Path(exam)), Path(folder))
    uvicorn.run(server.app(), host=HOST, port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
