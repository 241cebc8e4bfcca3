"""Pictures of letters: Debian's Noto fonts, drawn with Pillow and then turned, sheared, moved and dirtied.

Needs Pillow (pip install pillow), which streammerge itself does not: it is a need of this benchmark alone.
A letter is drawn once for each font that has it; every example is a distorted copy of one of these drawings.
"""

from __future__ import annotations

import math
import unicodedata
from functools import cache
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont
from tier import debian_package
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SIDE = 28  # pixels of an example
DRAWING, INK, FONT_SIZE = 64, 42, 64  # pixels of a drawing, of the letter's longer side in it, and to draw at
PANEL = 2048  # examples distorted at a time
ABSENT = "\uffff"  # no font has it: drawn as the box that says so

# How far an example is from its drawing: uniform within these bounds, noise normal.
TURN, SHEAR, SHIFT = 18.0, 0.25, 0.12  # degrees, share of the height, share of half the width
SCALE, BRIGHTNESS, NOISE = (0.75, 1.2), (0.5, 1.0), 0.2
DISTORTION = [TURN, SHEAR, SHIFT, *SCALE, *BRIGHTNESS, NOISE]

# script, as Unicode's names of its letters begin -> how Noto's fonts for it are called
BASE_SCRIPTS = {
    "LATIN": "", "GREEK": "", "CYRILLIC": "", "ARMENIAN": "Armenian", "GEORGIAN": "Georgian",
    "HEBREW": "Hebrew", "ARABIC": "Arabic", "DEVANAGARI": "Devanagari", "BENGALI": "Bengali",
    "TAMIL": "Tamil", "THAI": "Thai", "ETHIOPIC": "Ethiopic", "CHEROKEE": "Cherokee",
    "CANADIAN": "CanadianAboriginal", "YI": "Yi", "MENDE": "MendeKikakui", "BAMUM": "Bamum",
    "CUNEIFORM": "Cuneiform", "LINEAR B": "LinearB", "EGYPTIAN": "EgyptianHieroglyphs",
}  # fmt: skip
TASK_SCRIPTS = {
    "TELUGU": "Telugu", "KHMER": "Khmer", "RUNIC": "Runic", "GUJARATI": "Gujarati", "COPTIC": "Coptic",
    "KANNADA": "Kannada", "LAO": "Lao", "TIFINAGH": "Tifinagh", "SINHALA": "Sinhala", "GOTHIC": "Gothic",
    "MYANMAR": "Myanmar", "MALAYALAM": "Malayalam", "THAANA": "Thaana", "TIBETAN": "Tibetan",
    "GURMUKHI": "Gurmukhi", "JAVANESE": "Javanese", "NKO": "NKo",
}  # fmt: skip


def examples(script: str, *, letters: int, count: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` pictures of at most `letters` letters of a script, as many of each as goes, in random order.

    Returns pictures [count, 784] float32 in 0..1 and letters [count] int64.
    """
    drawings = _drawings(script, letters)
    labels = torch.arange(count)[torch.randperm(count, generator=chance)] % len(drawings)
    which = torch.rand(count, generator=chance)
    chosen = [
        drawings[label][int(share * len(drawings[label]))]
        for label, share in zip(labels.tolist(), which.tolist(), strict=True)
    ]
    parts = [_distort(torch.stack(chosen[start : start + PANEL]), chance) for start in range(0, count, PANEL)]
    return torch.cat(parts), labels


def count_letters(script: str, letters: int) -> int:
    """How many letters of a script there are to draw, at most `letters`."""
    return len(_drawings(script, letters))


def _distort(drawings: Tensor, chance: torch.Generator) -> Tensor:
    """One example of each drawing: [n, 64, 64] uint8 -> [n, 784] float32."""
    n = len(drawings)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=chance) * (high - low) + low

    angle = uniform(-TURN, TURN) * math.pi / 180
    shear, size = uniform(-SHEAR, SHEAR), uniform(*SCALE)
    x, y = uniform(-SHIFT, SHIFT), uniform(-SHIFT, SHIFT)
    cos, sin = angle.cos() / size, angle.sin() / size
    rows = [torch.stack([cos, shear * cos - sin, x], 1), torch.stack([sin, shear * sin + cos, y], 1)]
    grid = affine_grid(torch.stack(rows, 1), [n, 1, 2 * SIDE, 2 * SIDE], align_corners=False)
    moved = grid_sample(drawings.float().div(255).unsqueeze(1), grid, align_corners=False)
    seen = avg_pool2d(moved, 2).flatten(1) * uniform(*BRIGHTNESS).unsqueeze(1)
    return (seen + NOISE * torch.randn(seen.shape, generator=chance)).clamp(0, 1)


@cache
def _drawings(script: str, letters: int) -> list[list[Tensor]]:
    """Of each letter its drawings, one a font that has it, [64, 64] uint8."""
    fonts = [ImageFont.truetype(str(file), FONT_SIZE) for file in _font_files(script)]
    absent = [_draw(font, ABSENT) for font in fonts]
    found: list[list[Tensor]] = []
    for letter in _letters(script):
        drawn = [_draw(font, letter) for font in fonts]
        there = [
            shape
            for shape, box in zip(drawn, absent, strict=True)
            if shape is not None and (box is None or not torch.equal(shape, box))
        ]
        if there:
            found.append(there)
        if len(found) == letters:
            break
    return found


def _draw(font: ImageFont.FreeTypeFont, letter: str) -> Tensor | None:
    """A letter in white on black, in the middle, as large as fits; None where nothing is to be seen."""
    canvas = Image.new("L", (4 * FONT_SIZE, 4 * FONT_SIZE))
    ImageDraw.Draw(canvas).text((FONT_SIZE, FONT_SIZE), letter, fill=255, font=font)
    box = canvas.getbbox()
    if box is None:
        return None
    cut = canvas.crop(box)
    share = INK / max(cut.size)
    cut = cut.resize(
        (max(1, round(cut.width * share)), max(1, round(cut.height * share))), Image.Resampling.BILINEAR
    )
    drawing = Image.new("L", (DRAWING, DRAWING))
    drawing.paste(cut, ((DRAWING - cut.width) // 2, (DRAWING - cut.height) // 2))
    return torch.frombuffer(bytearray(drawing.tobytes()), dtype=torch.uint8).view(DRAWING, DRAWING)


def _letters(script: str) -> list[str]:
    """Letters of a script without case, or its capitals, in Unicode's order."""
    every = (chr(code) for code in range(0x20000))
    return [
        letter
        for letter in every
        if unicodedata.category(letter) in {"Lo", "Lu"}
        and unicodedata.name(letter, "").startswith(f"{script} ")
    ]


def _font_files(script: str) -> list[Path]:
    """The upright fonts for a script, with and without serifs, regular and bold."""
    root = debian_package("fonts-noto-core") / "usr" / "share" / "fonts" / "truetype" / "noto"
    stem = (BASE_SCRIPTS | TASK_SCRIPTS)[script]
    names = [f"Noto{kind}{stem}-{weight}.ttf" for kind in ("Sans", "Serif") for weight in ("Regular", "Bold")]
    return [root / name for name in names if (root / name).exists()]
