"""To a GPU and back beside the computing: pinned memory and streams of their own; on a CPU nothing happens.

One lane belongs to one thread. What comes out of a lane is there: whoever gets it may compute with it at
once, on the device's default stream, where all computing is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Lane:
    """Brings values to a device, in the thread that read them."""

    def __init__(self, device: torch.device) -> None:
        """A lane to the CPU leads nowhere."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, values: Tensor) -> Tensor:
        """Give the values on the device."""
        if self._stream is None:
            return values.to(self._device)
        with torch.cuda.stream(self._stream):
            there = values.pin_memory().to(self._device, non_blocking=True)
        self._stream.synchronize()
        there.record_stream(torch.cuda.default_stream(self._device))
        return there


def homeward(values: Tensor) -> Callable[[], Tensor]:
    """Mark what was computed so far; what is given brings the values to the CPU, called in any thread."""
    if values.device.type != "cuda":
        return values.cpu
    computed = torch.cuda.Event()
    computed.record(torch.cuda.default_stream(values.device))

    def bring() -> Tensor:
        stream = torch.cuda.Stream(values.device)
        stream.wait_event(computed)
        with torch.cuda.stream(stream):
            there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            there.copy_(values, non_blocking=True)
        stream.synchronize()
        return there

    return bring
