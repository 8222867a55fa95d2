"""The training images nearest to a sample, and whether one is so near that the sample is a copy of it.

As in Somepalli et al. 2022 (https://arxiv.org/abs/2212.03860) images are compared by the cosine similarity
of features. From which similarity on a sample is a copy is found from images that are known to be none.
"""

import hashlib
import io
import json
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ldm.errors import FieldError, InputError
from ldm.images.pixels import to_float
from ldm.log import notice
from ldm.pipeline.device import arithmetic
from ldm.training.data.example import DamagedExample, Source
from ldm.training.data.sources import examples_named
from ldm.training.files import whole
from ldm.weights.files import exists

BATCH = 128  # images whose features are computed together
ROWS = 16_384  # of an index that are compared at once: 8 MB of 128 features in float32
QUERIES = 1024  # images that are compared with them at once
READERS = 4  # threads that read images
SIDE = 8  # pixels: the side of the small images of `Pixels`
TOLERANCE = 1e-6  # of a similarity: what rounding leaves of the 1 of an exact copy


class Features(Protocol):
    """Makes vectors of images, whose cosine similarity says how like the images are."""

    name: str  # with a hash of the weights, if there are any: vectors of another name are not comparable
    size: int  # numbers in a vector

    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        """Images uint8 [h, w, 3] of any sizes -> float32 [n, size]."""
        ...


class Pixels:
    """The image at 8x8 pixels, without its mean: finds copies, also brighter or noisier ones, and no more.

    An image of one grey all over is zeros.
    """

    name, size = f"pixels-{SIDE}", 3 * SIDE**2

    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        small = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
        x = to_float([np.asarray(image) for image in small]).flatten(1)
        even = (x == x[:, :1]).all(1, keepdim=True)  # of which the mean's rounding would be left
        return (x - x.mean(1, keepdim=True)).masked_fill(even, 0.0)


class Scenes:
    """The activations before the last layer of the bundled detector: solids, colours, and where they are."""

    size = 128

    def __init__(self, path: Path, device: torch.device):
        from ldm.scenes.detector import load_detector

        self.detector, self.device = load_detector(path).to(device), device
        self.name = f"detector-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"

    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        from ldm.scenes.detector import SIZE

        even = [
            image if image.shape[:2] == (SIZE, SIZE) else np.asarray(_resized(image, SIZE))
            for image in images
        ]
        with torch.inference_mode(), arithmetic(self.device):
            return self.detector.layers[:-1](to_float(even).to(self.device)).float()


class Clip:
    """Image embeddings of a CLIP model in a local folder of transformers' layout."""

    def __init__(self, folder: str, device: torch.device):
        from ldm.evaluation.clip_score import ClipScore, folder_hash

        self.clip = ClipScore(folder, device)
        self.size = self.clip.model.config.projection_dim
        self.name = f"clip-{folder_hash(folder)}"

    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        clip = self.clip
        with torch.inference_mode(), arithmetic(clip.device):
            pixels = clip.processor(images=list(images), return_tensors="pt")["pixel_values"].to(clip.device)
            pooled = clip.model.vision_model(pixel_values=pixels).pooler_output
            return clip.model.visual_projection(pooled).float()


def _resized(image: np.ndarray, side: int) -> Image.Image:
    return Image.fromarray(image).resize((side, side), Image.Resampling.BOX)


def vectors(images: Iterable[np.ndarray], features: Features) -> Tensor:
    """The features of images, each vector of length 1 (or of zeros): float32 [n, size].

    No more of the images than a batch are held at a time.
    """
    remaining, parts = iter(images), [torch.zeros(0, features.size)]
    while batch := list(islice(remaining, BATCH)):
        parts.append(features(batch).cpu())
    return F.normalize(torch.cat(parts), dim=1)


def is_copy(similarity: np.ndarray, threshold: float) -> np.ndarray:
    """Whether similarities, one or an array of them, are those of copies: bool."""
    return similarity >= threshold - TOLERANCE


class Index:
    """The features of a training set in a file, of which only the rows in use are in memory.

    The file is a safetensors file with the tensor `features`, float16 [images, size], of vectors of length 1;
    a damaged image has NaN. InputError for a file of something else.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                self.facts = file.metadata() or {}
                self.count, self.size = file.get_slice("features").get_shape()
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"{path} is not an index of features: {error}") from error

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The number of the first row, and the rows of a block, float32 [rows, size]."""
        with safe_open(self.path, "pt") as file:
            rows = file.get_slice("features")
            for start in range(0, self.count, ROWS):
                yield start, _of_length_one(rows[start : start + ROWS])

    @cached_property
    def readable(self) -> np.ndarray:
        """The numbers of the rows whose images could be read, int64 [n]."""
        kept = [start + (~rows[:, 0].isnan()).nonzero()[:, 0].numpy() for start, rows in self.blocks()]
        return np.concatenate([np.zeros(0, np.int64), *kept])

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """These rows, float32 [n, size]."""
        with safe_open(self.path, "pt") as file:
            rows = file.get_slice("features")
            return _of_length_one(torch.cat([rows[n : n + 1] for n in numbers]))


def _of_length_one(rows: Tensor) -> Tensor:
    """Rows of an index in float32, again of length 1, which float16 keeps to three digits only."""
    return F.normalize(rows.float(), dim=1)


def facts_of(source: Source, features: Features) -> dict[str, str]:
    """What an index depends on."""
    return {"features": features.name, "training set": source.fingerprint, "images": str(len(source))}


def open_index(path: Path, source: Source, features: Features, given: bool) -> Index:
    """The index in a file, which is made if there is none.

    A file of something else that the user has not `given`, but the cache folder has, is made anew; else it
    is an InputError, as is a training set of which no image can be read.
    """
    index = _found_index(path, source, features, given)
    if index is None:
        make_index(path, source, features)
        index = Index(path)
    if not len(index.readable):
        raise InputError(f"no training image could be compared: none of {index.count:,} can be read")
    return index


def _found_index(path: Path, source: Source, features: Features, given: bool) -> Index | None:
    wanted = facts_of(source, features)
    if exists(path):
        try:
            index = Index(path)
            if index.facts == wanted:
                return index
            names = [name for name in wanted if index.facts.get(name) != wanted[name]]
            found = ", ".join(f"{name} {_short(index.facts.get(name))}" for name in names)
            why = (
                f"{path} is of another kind ({found}; wanted: {', '.join(_short(wanted[n]) for n in names)})"
            )
        except InputError as error:
            why = str(error)
        if given:
            raise FieldError("{index} {why}; name another file, and it is made there", why=why)
        notice(f"{why}: it is made anew")
    return None


def _short(value: str | None) -> str:
    return "nothing" if value is None else value if len(value) <= 24 else f"{value[:12]}…"


def make_index(path: Path, source: Source, features: Features) -> None:
    """Write the features of all of a source's images, batch by batch."""
    header = json.dumps(
        {
            "__metadata__": facts_of(source, features),
            "features": {
                "dtype": "F16",
                "shape": [len(source), features.size],
                "data_offsets": [0, 2 * len(source) * features.size],
            },
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    damaged: list[str] = []
    no_row = torch.full((features.size,), torch.nan)
    with whole(path) as unfinished, open(unfinished, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for images in read_batches(source, damaged):
            there = [image for image in images if image is not None]
            found = iter(vectors(there, features) if there else ())
            rows = [no_row if image is None else next(found) for image in images]
            file.write(torch.stack(rows).half().numpy().tobytes())
    if damaged:
        notice(f"{len(damaged):,} training images cannot be read and are left out: {examples_named(damaged)}")


def read_batches(source: Source, damaged: list[str]) -> Iterator[list[np.ndarray | None]]:
    """All images of a source in order; None for one that cannot be read, whose key comes into `damaged`."""

    def read(i: int) -> np.ndarray | None:
        try:
            return source[i].image
        except DamagedExample as error:
            damaged.append(error.key)
            return None

    numbers = iter(range(len(source)))
    with ThreadPoolExecutor(READERS) as pool, tqdm(total=len(source), desc="features", unit="image") as bar:
        while part := list(islice(numbers, BATCH)):
            images = list(pool.map(read, part))
            yield images
            bar.update(len(images))


def nearest(
    index: Index, queries: Tensor, count: int, without: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest rows of vectors [n, size], and how near they are.

    Returns cosine similarities float32 [n, count], falling, and the rows' numbers int64 [n, count]; -1 and -1
    where the index has fewer rows. Zeros, which have no direction, are alike (1) and like nothing else (0).
    `without` has for each vector a row that does not count: its own.
    """
    found = [
        _nearest(index, part, count, None if without is None else without[start : start + QUERIES])
        for start, part in (
            (start, queries[start : start + QUERIES]) for start in range(0, len(queries), QUERIES)
        )
    ]
    similarity, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    return similarity.cpu().numpy(), rows.cpu().numpy()


def _nearest(
    index: Index, queries: Tensor, count: int, without: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    best = torch.full((len(queries), count), -1.0, device=queries.device)
    rows = torch.full((len(queries), count), -1, device=queries.device)
    own = None if without is None else torch.tensor(without, device=queries.device)[:, None]
    for start, block in index.blocks():
        similarity = queries @ block.to(queries.device).T
        numbers = torch.arange(start, start + len(block), device=queries.device).expand_as(similarity)
        block = block.to(queries.device)
        left_out = block[:, 0].isnan().expand_as(similarity)  # damaged images
        similarity = similarity.masked_fill((queries == 0).all(1)[:, None] & (block == 0).all(1), 1.0)
        if own is not None:
            left_out = left_out | (numbers == own)
        similarity = similarity.masked_fill(left_out, -torch.inf)
        best, order = torch.cat([best, similarity], 1).topk(count, 1)
        rows = torch.cat([rows, numbers], 1).gather(1, order)
    return best, rows


@dataclass(frozen=True)
class Calibration:
    """From which similarity on a sample counts as a copy."""

    threshold: float
    false_positives: float  # share of images that are no copies, and would count as such
    images: int  # that it was found from
    of: str  # what these are
    median: float  # similarity to the nearest training image
    highest: float

    def __str__(self) -> str:
        return (
            f"threshold {self.threshold:.4f}: {100 * self.false_positives:g} % of {self.images:,} {self.of} "
            f"are as near to a training image (median {self.median:.4f}, highest {self.highest:.4f})"
        )


def calibrate(
    index: Index,
    features: Features,
    held_out: Source | None,
    false_positives: float,
    count: int,
    seed: int,
) -> Calibration:
    """The threshold that `false_positives` of `count` images exceed which are no copies of training images.

    These are held-out ones or, without any, training images compared with all others of the set: that is
    right as far as the set has no duplicates itself. InputError where there are too few.
    """
    rng = np.random.default_rng(seed)
    if held_out is None:
        numbers = np.sort(rng.choice(index.count, min(count, index.count), replace=False)).tolist()
        queries, own, of = index.rows(numbers), numbers, "training images, compared with all others,"
        whole_ones = ~queries[:, 0].isnan()
        queries, own = queries[whole_ones], [n for n, kept in zip(numbers, whole_ones, strict=True) if kept]
    else:
        numbers = np.sort(rng.choice(len(held_out), min(count, len(held_out)), replace=False)).tolist()
        queries = vectors(_readable(held_out, numbers), features)
        own, of = None, "held-out images"
    if len(queries) < 2 or (own is not None and index.count < 2):
        raise InputError("a threshold takes two images at least: give one with --threshold")
    similarity, _ = nearest(index, queries, 1, own)
    similarity = similarity[:, 0]
    return Calibration(
        float(np.quantile(similarity, 1 - false_positives)),
        false_positives,
        len(queries),
        of,
        float(np.median(similarity)),
        float(similarity.max()),
    )


def _readable(source: Source, numbers: Iterable[int]) -> Iterator[np.ndarray]:
    """These images of a source, but for damaged ones, which a notice names."""
    for number in numbers:
        try:
            yield source[number].image
        except DamagedExample as error:
            notice(f"left out: {error}")


# Planted copies


def _jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "JPEG", quality=50)
    return np.asarray(Image.open(data))


def _crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    top, left = (int(rng.integers(side - int(0.9 * side) + 1)) for side in (height, width))
    part = image[top : top + int(0.9 * height), left : left + int(0.9 * width)]
    return np.asarray(Image.fromarray(part).resize((width, height), Image.Resampling.BICUBIC))


def _brightness(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(image * rng.choice([0.8, 1.2]) + 0.5, 0, 255).astype(np.uint8)


def _noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(image + rng.normal(0, 10, image.shape) + 0.5, 0, 255).astype(np.uint8)


ALTERATIONS: Mapping[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "exact": lambda image, rng: image,
    "JPEG of quality 50": _jpeg,
    "crop to 90 % of the side": _crop,
    "brightness 80 % or 120 %": _brightness,
    "noise of 10 levels": _noise,
}


@dataclass(frozen=True)
class Planted:
    """A copy of a training image, exact or altered, that is put among samples."""

    row: int
    alteration: str
    image: np.ndarray


def plant(source: Source, index: Index, count: int, seed: int) -> list[Planted]:
    """`count` training images, chosen by the seed, each of them with every alteration.

    They are of those that could be read when the index was made; what cannot be read any more is left out.
    """
    rng = np.random.default_rng(seed)
    rows = rng.choice(index.readable, min(count, len(index.readable)), replace=False).tolist()
    images: dict[int, np.ndarray] = {}
    for row in rows:
        try:
            images[row] = source[row].image
        except DamagedExample as error:
            notice(f"left out: {error}")
    return [
        Planted(row, name, alter(image, rng))
        for name, alter in ALTERATIONS.items()
        for row, image in images.items()
    ]


def found_again(
    planted: Sequence[Planted], rows: np.ndarray, similarity: np.ndarray, threshold: float, false: int
) -> dict[str, Any]:
    """Recall and precision of planted copies, whose nearest rows [n] and similarities [n] are given.

    A copy is found if it is flagged and its nearest training image is its original. `false` is the number of
    samples that were flagged and are no planted copies.
    """
    right, of = Counter(), Counter(each.alteration for each in planted)
    flagged = 0
    for each, row, near in zip(planted, rows, similarity, strict=True):
        flagged += is_copy(near, threshold)
        right[each.alteration] += is_copy(near, threshold) and row == each.row
    hits = right.total()
    return {
        "recall": {name: right[name] / of[name] for name in of},
        "recall of all": hits / len(planted),
        "precision": float(hits / max(1, flagged + false)),
        "samples flagged": false,
    }


class Report:
    """What was found for samples: their names, similarities [n, count] and rows [n, count]."""

    def __init__(
        self,
        names: Sequence[str],
        similarity: np.ndarray,
        rows: np.ndarray,
        source: Source,
        threshold: float,
    ):
        self.names, self.similarity, self.rows = names, similarity, rows
        self.source, self.threshold = source, threshold

    @cached_property
    def flagged(self) -> np.ndarray:
        """Whether each sample is as near to a training image as a copy, bool [n]."""
        return is_copy(self.similarity[:, 0], self.threshold)

    def lines(self) -> Iterator[dict[str, Any]]:
        """A line for each sample and rank, for a CSV file."""
        for name, similarity, rows, flagged in zip(
            self.names, self.similarity, self.rows, self.flagged, strict=True
        ):
            for rank, (near, row) in enumerate(zip(similarity, rows, strict=True), 1):
                if row >= 0:
                    yield {
                        "sample": name,
                        "rank": rank,
                        "similarity": round(float(near), 5),
                        "training image": self.source.key(int(row)),
                        "number": int(row),
                        "flagged": bool(flagged and is_copy(near, self.threshold)),
                    }

    def sheet(self, read: Callable[[int], np.ndarray], most: int, side: int = 128) -> np.ndarray:
        """The samples nearest to a training image, `most` of them, each beside its nearest ones: uint8.

        `read` gives the image of a sample, uint8 [h, w, 3], by its number.
        """
        from ldm.images.sheets import contact_sheet

        order = np.argsort(-self.similarity[:, 0], kind="stable")[:most]
        rows, notes = [], []
        for i in order:
            found = [int(row) for row in self.rows[i] if row >= 0]
            cells = [read(i), *(self.source[row].image for row in found)]
            blank = self.rows.shape[1] - len(found)
            rows.append(
                [np.asarray(_fitted(cell, side)) for cell in cells]
                + [np.full((side, side, 3), 255, np.uint8)] * blank
            )
            notes.append(
                ["copy?" if self.flagged[i] else "", *(f"{near:.4f}" for near in self.similarity[i])]
            )
        columns = ["sample", *(f"nearest {rank}" for rank in range(1, self.rows.shape[1] + 1))]
        title = f"nearest training images; from {self.threshold:.4f} on a sample counts as a copy"
        return contact_sheet(rows, columns, [Path(self.names[i]).name for i in order], title, notes)


def _fitted(image: np.ndarray, side: int) -> Image.Image:
    """The whole image in a square of `side` pixels, magnified without smoothing."""
    shown = Image.fromarray(image)
    scale = side / max(shown.size)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    small = shown.resize(tuple(max(1, round(scale * n)) for n in shown.size), how)
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return square
