"""What is applied at render to any method's result. Stateless: it may change at any time.

`scale` multiplies the merged delta: 1.0 is the method's own length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Tensor


class Finalize(BaseModel):
    """The knobs of `finalize:` in the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: float = Field(default=1.0, gt=0.0, le=100.0, description="multiplies the merged delta")


def apply(delta: Tensor, finalize: Finalize) -> Tensor:
    """Finish one weight's rendered delta, any shape, float32."""
    return delta if finalize.scale == 1.0 else delta * finalize.scale
