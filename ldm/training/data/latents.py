"""Latents of a source's images: encoded once, kept in files, and mapped into memory from there."""

import bisect
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm.errors import InputError
from ldm.log import notice
from ldm.models.diffusion.ddpm import LatentDepth2ImageDiffusion, LatentDiffusion
from ldm.training.data.config import DataConfig
from ldm.training.data.example import Source
from ldm.training.data.loader import Batch, Batches, Pixels, _unchanged, worker_count
from ldm.training.data.masks import random_masks
from ldm.training.data.sources import write_whole
from ldm.training.families import concat_channels, has_channels
from ldm.training.files import write_tensors
from ldm.training.random import row_generator

PART = 512  # examples of a file
_PIXELS = 2**18  # that are encoded at a time
_FORMAT = 1  # raised whenever the same dependencies give other files


class Latents:
    """Cached latents, in place of a source: the loader takes either.

    They are the means and standard deviations of the first stage's posteriors, float16, unscaled. What was
    damaged when they were made is not among them; `left_out` says why.
    """

    in_memory = True  # as far as the loader is concerned: there is nothing to decode

    def __init__(self, data: DataConfig, files: list[Path], groups: list[int]):
        """The parts of a cache, and to which bucket each of them belongs."""
        self.data, self.files = data, files
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.left_out: dict[str, str] = {}
        self.starts: list[int] = []  # number of the first example of each part
        members: dict[int, list[np.ndarray]] = {}
        for file, group in zip(files, groups, strict=True):
            with safe_open(file, "pt") as part:
                about = part.metadata()
            examples = json.loads(about["examples"])
            self.left_out |= json.loads(about["damaged"])
            self.starts.append(len(self.keys))
            self.keys += [key for key, _ in examples]
            self.captions += [caption for _, caption in examples]
            members.setdefault(group, []).append(np.arange(self.starts[-1], len(self.keys)))
        self.groups = [group for parts in members.values() if len(group := np.concatenate(parts))]
        if not self.keys:
            raise InputError(f"data: all {len(self.left_out):,} examples are damaged")
        self._mapped: dict[int, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}  # every process maps the files itself

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, index: int) -> str:
        return self.keys[index]

    def caption(self, index: int) -> str:
        return self.captions[index]

    def load(self, index: int, group: int, generator: torch.Generator) -> dict[str, Any]:
        """An example, or a random part of it with `patch`.

        "caption"; "mean" and "std" float32 [c, h, w]; "concat" [c', h, w], the UNet's further channels, and
        "control" [3, H, W] in 0 … 1, where there are any.
        """
        flip, left, top = torch.rand(3, generator=generator).tolist()
        values = self._values(index, int(flip < self.data.flip))
        if side := self.data.patch * values["mean"].shape[-1] // self.data.size:
            room = values["mean"].shape[-1] - side + 1
            values = {
                name: _part(x, values["mean"].shape[-1], side, int(top * room), int(left * room))
                for name, x in values.items()
            }
        return {"caption": self.captions[index], **{name: _floats(name, x) for name, x in values.items()}}

    def first(self, count: int) -> dict[str, Tensor]:
        """`load`'s tensors of up to `count` examples of the first bucket, upright and whole, [n, …]."""
        rows = [self._values(int(index), 0) for index in self.groups[0][:count]]
        return {name: torch.stack([_floats(name, row[name]) for row in rows]) for name in rows[0]}

    def _values(self, index: int, view: int) -> dict[str, Tensor]:
        number = bisect.bisect_right(self.starts, index) - 1
        if number not in self._mapped:
            self._mapped[number] = load_file(self.files[number])
        row = index - self.starts[number]
        return {name: x[row, min(view, x.shape[1] - 1)] for name, x in self._mapped[number].items()}


def cached(data: DataConfig, source: Source, model: LatentDiffusion, folder: Path) -> Latents:
    """The latents of a source, from the files below `folder`, or encoded now, on the model's device.

    They depend on the source's fingerprint, the first stage's weights, sizes, buckets and everything else in
    `dependencies`: with other ones, they are made anew beside the old. Each file is written whole or not at
    all, so that a run that was killed goes on where it was; processes of one run share the work. InputError
    if they cannot be written, or if no example can be read.
    """
    needs = dependencies(data, source, model)
    digest = hashlib.sha256(json.dumps(needs, sort_keys=True).encode()).hexdigest()
    own = Path(data.cache or folder) / f"latents-{digest[:16]}"
    about = own / "about.json"
    if not _same(about, needs):
        _notice_change(own.parent, needs)
        write_whole(about, lambda file: file.write(json.dumps(needs, indent=1).encode()))
    pixels = Pixels(replace(data, flip=0.0, patch=0), source, folder)
    pieces = [
        (group, members[start : start + PART])
        for group, members in enumerate(pixels.groups)
        for start in range(0, len(members), PART)
    ]
    files = [own / f"part-{number:05}.safetensors" for number in range(len(pieces))]
    for file in files:
        _drop_torn(file)
    done = sum(len(members) for file, (_, members) in zip(files, pieces, strict=True) if file.exists())
    with tqdm(desc="encoding images", total=len(pixels), initial=done, disable=done == len(pixels)) as bar:
        for timeout in (0, -1):  # first what nobody is at, then what others have not finished
            for file, (group, members) in zip(files, pieces, strict=True):
                if file.exists():
                    continue
                lock = FileLock(file.with_suffix(".lock"), fallback_to_soft=False)
                try:
                    lock.acquire(timeout=timeout)
                except Timeout:
                    continue
                except (OSError, NotImplementedError):  # a folder that takes no locks: each encodes it
                    pass
                try:
                    if not file.exists():
                        _encode(data, pixels, model, group, members, file, bar)
                finally:
                    lock.release()
    for file in files:
        file.with_suffix(".lock").unlink(missing_ok=True)
    latents = Latents(data, files, [group for group, _ in pieces])
    latents.left_out = pixels.left_out | latents.left_out
    return latents


def dependencies(data: DataConfig, source: Source, model: LatentDiffusion) -> dict[str, Any]:
    """Everything that the latents depend on, by name."""
    found = {
        "format": _FORMAT,
        "source": source.fingerprint,
        "first stage": fingerprint(model.first_stage_model),
        "precision": "float32",
        "model": type(model).__name__,
        "size": data.size,
        "buckets": data.bucket_step if data.buckets else 0,
        "crop": data.crop,
        "mirrored images": data.flip > 0,
        "masks": str(random_masks(data.masks)),
    }
    if isinstance(model, LatentDepth2ImageDiffusion) and hasattr(model, "depth_model"):
        found["depth estimator"] = fingerprint(model.depth_model)
    return found


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of all names, shapes and values of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def _encode(
    data: DataConfig,
    pixels: Pixels,
    model: LatentDiffusion,
    group: int,
    members: np.ndarray,
    file: Path,
    bar: tqdm,
) -> None:
    """Write a part: the examples `members` of a bucket."""
    width, height = pixels.sizes[group]
    count = max(1, _PIXELS // (width * height))
    places = [
        (0, members[start : start + count], members[start : start + count], group)
        for start in range(0, len(members), count)
    ]
    examples, damaged, parts = [], {}, {}
    workers = worker_count(pixels, data) if len(places) > 1 else 0
    batches = DataLoader(
        Batches(pixels, seed=0, replace=False),
        batch_size=None,
        sampler=places,
        num_workers=workers,
        collate_fn=_unchanged,
    )
    for batch, (_, rows, *_) in zip(batches, places, strict=True):
        damaged |= batch["damaged"]
        if batch["index"]:
            examples += [
                (pixels.key(index), caption)
                for index, caption in zip(batch["index"], batch["caption"], strict=True)
            ]
            views = list(_views(batch, data.flip > 0))
            encoded = [_encoded(model, view, batch["row"].tolist()) for view in views]
            for name in encoded[0]:
                both = torch.stack([view[name] for view in encoded], dim=1)
                parts.setdefault(name, []).append(both)
        bar.update(len(rows))
    tensors = {name: torch.cat(each) for name, each in parts.items()}
    about = {"examples": json.dumps(examples), "damaged": json.dumps(damaged)}
    write_tensors(tensors, file, about)


def _views(batch: Batch, both: bool) -> Iterator[dict[str, Tensor]]:
    """Image and maps of a batch, and the same mirrored."""
    upright = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.ndim == 4}
    yield upright
    if both:
        yield {name: x.flip(-1) for name, x in upright.items()}


def _encoded(model: LatentDiffusion, view: dict[str, Tensor], numbers: list[int]) -> dict[str, Tensor]:
    """What a part keeps of images and their maps, on the CPU."""
    x = view["image"].to(model.device, memory_format=torch.channels_last)
    # It is done once, and bfloat16 would be off by more than the posterior's standard deviation.
    with torch.autocast(x.device.type, enabled=False):
        posterior = model.encode_first_stage(x)
        found = {"mean": posterior.mean, "std": posterior.std}
        if has_channels(model):

            def normal(*shape: int) -> Tensor:
                generators = [row_generator(0, 0, number, "concat") for number in numbers]
                return torch.stack([torch.randn(*shape, generator=one) for one in generators])

            maps = {name: each.to(x.device) for name, each in view.items() if name != "image"}
            found["concat"] = concat_channels(model, x, maps, tuple(posterior.mean.shape[-2:]), normal)
    found = {name: each.half().cpu().contiguous() for name, each in found.items()}
    if "control" in view:
        found["control"] = (255 * view["control"]).round().byte()
    return found


def _part(x: Tensor, width: int, side: int, top: int, left: int) -> Tensor:
    """A square of `side` of `width` columns; x may be larger than that by a whole factor."""
    factor = x.shape[-1] // width
    rows, columns = (slice(start * factor, (start + side) * factor) for start in (top, left))
    return x[..., rows, columns]


def _floats(name: str, x: Tensor) -> Tensor:
    return x.float() / 255.0 if name == "control" else x.float()


def _drop_torn(file: Path) -> None:
    """Remove a part that cannot be opened, so that it is made again."""
    if not file.exists():
        return
    try:
        with safe_open(file, "pt") as part:
            part.metadata()["examples"]
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        notice(f"{file} cannot be used ({error}): its images are encoded again")
        file.unlink(missing_ok=True)  # another process may have removed it


def _same(about: Path, needs: dict[str, Any]) -> bool:
    """Whether the file is there, and whole."""
    try:
        return json.loads(about.read_text()) == needs
    except (OSError, ValueError):
        return False


def _notice_change(folder: Path, needs: dict[str, Any]) -> None:
    """Say why the last latents of the same source cannot be used."""
    for about in sorted(folder.glob("latents-*/about.json"), key=lambda path: -path.stat().st_mtime_ns):
        try:
            found = dict(json.loads(about.read_text()))
        except (OSError, ValueError, TypeError):
            notice(f"{about} cannot be read: it is passed over")
            continue
        other = [name for name in {**needs, **found} if needs.get(name) != found.get(name)]
        if "source" not in other:
            others = ", ".join(other)
            notice(f"the latents in {about.parent} have another {others}: encoding the images again")
            return
