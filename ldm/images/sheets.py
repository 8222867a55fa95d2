"""A contact sheet: images in a table, with what varies written along its sides."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 128  # pixels, at least: smaller images are magnified by a whole number
GAP, FONT_SIZE, LINES = 4, 13, 3
INK, PAPER = (20, 20, 20), (255, 255, 255)


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    columns: Sequence[str],
    labels: Sequence[str],
    title: str,
    notes: Sequence[Sequence[str]] | None = None,
) -> np.ndarray:
    """Images, uint8 [h, w, 3] of one size, row by row, as one image, uint8 [H, W, 3].

    `columns` stand over the columns, `labels` before the rows and `title` above all; long ones are wrapped
    and cut to three lines. Each of `notes` stands under its image, in one line. Letters that Pillow's own
    font lacks, such as Chinese ones, are drawn as boxes.
    """
    font = ImageFont.load_default(FONT_SIZE)
    height, width = rows[0][0].shape[:2]
    zoom = math.ceil(CELL / min(height, width, CELL))
    height, width = height * zoom, width * zoom

    letters = max(1, int(width / font.getlength("n")))
    heads = [_fit(text, letters) for text in columns]
    sides = [_fit(text, letters) for text in labels]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def extent(text: str) -> tuple[int, int]:
        *_, right, bottom = pen.multiline_textbbox((0, 0), text, font)
        return math.ceil(right), math.ceil(bottom)

    left = max(extent(text)[0] for text in sides) + 2 * GAP
    table_width = left + len(columns) * (width + GAP)
    title = _fit(title, int(max(table_width, 300) / font.getlength("n")))
    title_height = extent(title)[1] + 2 * GAP
    top = title_height + max(extent(text)[1] for text in heads) + 2 * GAP
    below = 0 if notes is None else FONT_SIZE + GAP
    total = table_width, top + len(labels) * (height + below + GAP)
    sheet = Image.new("RGB", (max(total[0], extent(title)[0] + 2 * GAP), total[1]), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.multiline_text((GAP, GAP), title, INK, font)
    for i, text in enumerate(heads):
        x = left + i * (width + GAP) + width / 2
        pen.multiline_text((x, top - GAP), text, INK, font, anchor="md", align="center")
    for j, (text, images) in enumerate(zip(sides, rows, strict=True)):
        y = top + j * (height + below + GAP)
        pen.multiline_text((left - GAP, y + height / 2), text, INK, font, anchor="rm", align="right")
        for i, image in enumerate(images):
            cell = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            x = left + i * (width + GAP)
            sheet.paste(cell, (x, y))
            if notes is not None:
                pen.text((x + width / 2, y + height), notes[j][i], INK, font, anchor="ma")
    return np.asarray(sheet)


def _fit(text: str, letters: int) -> str:
    return "\n".join(textwrap.wrap(text, letters, max_lines=LINES, placeholder=" …")) or " "
