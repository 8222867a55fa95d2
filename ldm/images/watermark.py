"""The invisible watermark, read back.

The mark (`dwtDct` of the invisible-watermark package, with its default strength) is one bit in each block of
8 x 8 pixels: in the U channel, averaged over 2 x 2 pixels, the block's largest value is moved to 1/4 (a zero)
or 3/4 (a one) of an interval of 36. The message is written over and over, from the top left, row by row.

About one block in five reads wrongly even from a PNG file, because colours wrap or are rounded and another
value of the block may become its largest; the package's own reader returns what is left, as in
"StafleDifvusionV1". So a message is not compared with what it reads but with the evidence of all blocks: the
average of each of its bits over the picture is correlated with the message. The evidence is of two kinds:
where in its interval a value lies, which is exact but which JPEG destroys, and how high it lies among its
neighbours, which is weak but which survives JPEG.

A known message is found if that correlation is more than 5.5 standard errors from none (Fisher's z): for bits
that were independent 2 in 10^8 of the eight comparisons of a picture. In 7,360 comparisons without a mark the
standard deviation was 1.0 (SDXL's message: 1.2) and the most 4.0. At 512 x 512 pixels every mark was found in
PNG files and in our JPEG files of quality 95, at 256 x 256 more than nine of ten; a JPEG file with half the
colour resolution, other programs' default, loses many.

A message that nobody told us is found by its period, the number of bytes at which the evidence repeats
itself, and is believed if it is printable and its bits fall into two clear groups. The reading is a likely
one: of PNG files half (256 x 256) to three in four (512 x 512) come out right, one in ten with a wrong
letter, the others not at all. A message that is named (`expected`) is found as surely as a published one, if
it has four bytes or more.

Resizing, rotating, and cropping anywhere but at the bottom remove the mark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

PUBLISHED = {
    "StableDiffusionV1": "CompVis, v1",
    "SDV2": "Stability AI, v2",
    "StableDiffusionV1-Inpainting": "Runway, v1 inpainting",
}
SDXL = "SDXL"  # stands for 48 bits that are no text, of Stability AI's and diffusers' SDXL
SDXL_BITS = 0b101100111110110010010000011110111011000110011110
MIN_PIXELS = 256 * 256  # of pictures with a mark
CERTAIN = 5.5  # standard errors
MAX_LENGTH = 64  # bytes of a message that nobody told us
INTERVAL = 36.0


def read_watermark(image: np.ndarray, expected: Iterable[str] = ()) -> str | None:
    """The message in a picture, uint8 [H, W, 3]: a published one, an `expected` one, or any other text.

    None if there is no mark, or none that can be read: the module's
    docstring says how sure that is.
    """
    height, width = image.shape[:2]
    if height * width < MIN_PIXELS:
        return None
    messages = {text: _bits(text) for text in (*PUBLISHED, *expected) if text}
    messages[SDXL] = np.array([int(bit) for bit in f"{SDXL_BITS:048b}"])
    # Our writer and the original's mark whole numbers, SDXL's floating-point ones: zero lies elsewhere.
    values, sdxl_values = block_values(image, 128.0), block_values(image, 0.5)
    certainty = {
        text: max(_certainty(y, bits) for y in _evidence(sdxl_values if text == SDXL else values))
        for text, bits in messages.items()
        if len(bits) <= len(values)
    }
    found = max(certainty, key=certainty.get)
    return found if certainty[found] > CERTAIN else _read_text(_evidence(values)[0])


def block_values(image: np.ndarray, centre: float) -> np.ndarray:
    """The value of each block of 8 x 8 pixels, [n], that carries a bit; `centre` is U's zero."""
    height, width = (side // 8 * 8 for side in image.shape[:2])
    red, green, blue = np.moveaxis(image[:height, :width].astype(np.float32), -1, 0)
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    whole = centre == 128.0  # OpenCV rounds both
    u = 0.492 * (blue - (y.round() if whole else y)) + centre
    u = u.round().clip(0, 255) if whole else u
    haar = u.reshape(height // 2, 2, width // 2, 2).sum(axis=(1, 3)) / 2
    blocks = haar.reshape(height // 8, 4, width // 8, 4).swapaxes(1, 2).reshape(-1, 16)
    return np.abs(blocks[:, 1:]).max(axis=1).astype(float)  # the first is never chosen


def _evidence(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much each block looks like a one rather than a zero: by its place in an interval, by its height."""
    around = np.array([1.0, 1.0, 0.0, 1.0, 1.0])
    mean = np.convolve(values, around, "same") / np.convolve(np.ones_like(values), around, "same")
    return -np.sin(2 * np.pi * values / INTERVAL), (values - mean).clip(-20, 20)


def _bits(text: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(text.encode("utf-8"), np.uint8))


def _sums(evidence: np.ndarray, period: int) -> tuple[np.ndarray, np.ndarray]:
    """The sum over the blocks that hold each of `period` bits, and their number."""
    bit = np.arange(len(evidence)) % period
    return np.bincount(bit, evidence, period), np.bincount(bit, minlength=period)


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / scale if scale > 1e-6 else 0.0


def _certainty(evidence: np.ndarray, bits: np.ndarray) -> float:
    """Fisher's z of the correlation of a message with the evidence for its bits, in standard errors.

    What all bytes have in common is taken out first: texts are alike in that, and any would be found in any.
    """
    sums, counts = _sums(evidence, len(bits))
    seen, said = (x.reshape(-1, 8) for x in (sums / counts, bits.astype(float)))
    correlation = _correlation((seen - seen.mean(axis=0)).ravel(), (said - said.mean(axis=0)).ravel())
    return math.atanh(min(correlation, 1 - 1e-9)) * math.sqrt(max(len(bits) - 8 - 3, 1))


def _read_text(evidence: np.ndarray) -> str | None:
    """The text of unknown length that repeats itself in the evidence."""
    evidence = evidence - evidence.mean()
    if evidence.std() < 1e-6:
        return None
    evidence = evidence / evidence.std()

    def likeness(period: int) -> tuple[float, float]:
        """The mean product of two blocks with the same bit, and its standard error if there is no mark."""
        sums, counts = _sums(evidence, period)
        pairs = ((counts**2).sum() - len(evidence)) / 2
        return ((sums**2).sum() - len(evidence)) / 2 / pairs, 1 / math.sqrt(pairs)

    longest = min(MAX_LENGTH, len(evidence) // 16)  # each bit at least twice
    like = {length: likeness(8 * length) for length in range(1, longest + 1)}
    for length, (own, error) in like.items():
        multiples = [like[n] for n in range(2 * length, longest + 1, length)]
        if own < max(0.1, 20 * error) or any(more - 4 * e > own for more, e in multiples):
            continue
        if max(likeness(8 * length - 1)[0], likeness(8 * length + 1)[0]) > 0.6 * own:
            continue  # stripes in the picture, not bits
        sums, counts = _sums(evidence, 8 * length)
        bits = _two_groups(sums / counts)
        if _correlation(sums / counts, bits.astype(float)) < 0.93:
            continue
        text = np.packbits(bits).tobytes().decode("utf-8", "replace")
        if text.isprintable() and "\ufffd" not in text and text not in (text * 2)[1:-1]:
            return text
    return None


def _two_groups(x: np.ndarray) -> np.ndarray:
    """Which numbers belong to the upper of two groups: k-means in one dimension."""
    middle = (x.max() + x.min()) / 2
    for _ in range(8):
        upper = x > middle
        if upper.all() or not upper.any():
            break
        middle = (x[upper].mean() + x[~upper].mean()) / 2
    return x > middle
