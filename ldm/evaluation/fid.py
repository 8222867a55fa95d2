"""The Fréchet distance of two sets of image features; with Inception's features it is the FID.

Heusel et al., GANs Trained by a Two Time-Scale Update Rule, 2017 (arXiv 1706.08500).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm.errors import FieldError, InputError
from ldm.weights.files import exists, user_file

if TYPE_CHECKING:
    import torch

    from ldm.scenes.detector import Detector

Features = Callable[[Sequence[np.ndarray]], np.ndarray]  # images uint8 [h, w, 3] -> float64 [n, d]
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
WHERE_INCEPTION = (
    f"give {INCEPTION_FILE} of torch-fidelity (github.com/toshas/torch-fidelity/releases/tag/v0.2.0)"
)
DIMENSIONS = {"64": 64, "192": 192, "768": 768, "2048": 2048}  # of Inception's layers
INSTALL = 'pip install -e ".[evaluation]"'


@dataclass(frozen=True)
class Statistics:
    """Mean [d] and covariance [d, d] of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Statistics:
        """Of features [n, d], n > 1; the covariance is the unbiased one."""
        features = np.asarray(features, np.float64)
        return cls(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))


class FrechetDistance:
    """Fréchet distances of sets of features to one reference, whose root is taken once."""

    def __init__(self, reference: Statistics):
        self.reference = reference
        values, vectors = np.linalg.eigh(reference.covariance)
        self._root = (vectors * np.sqrt(values.clip(0))) @ vectors.T

    def __call__(self, features: np.ndarray) -> tuple[float, np.ndarray]:
        """The distance of features [n, d], and the influence of each image on it, float64 [n].

        |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2). An image's influence is the derivative of that by
        the image's weight: to first order the distance of another sample of the same images, each taken w
        times, is the distance plus the mean of w times influence.
        """
        here = Statistics.of(features)
        distance, spectrum = self._distance(here)
        return distance, self._influences(np.asarray(features, np.float64) - here.mean, here, *spectrum)

    def of_statistics(self, other: Statistics) -> float:
        return self._distance(other)[0]

    def _distance(self, other: Statistics) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
        # C1 C2 has the eigenvalues of this symmetric matrix, which no rounding makes complex
        values, vectors = np.linalg.eigh(self._root @ other.covariance @ self._root)
        roots = np.sqrt(values.clip(0))
        gap = other.mean - self.reference.mean
        traces = np.trace(self.reference.covariance) + np.trace(other.covariance)
        return float(gap @ gap + traces - 2 * roots.sum()), (roots, vectors)

    def _influences(
        self, z: np.ndarray, here: Statistics, roots: np.ndarray, vectors: np.ndarray
    ) -> np.ndarray:
        """Of centred features z [n, d]; directions without variance have none."""
        inverse = np.zeros_like(roots)
        np.divide(1, roots, out=inverse, where=roots > 1e-7 * max(roots.max(), 1e-300))
        of_root = np.square(z @ (self._root @ vectors)) @ inverse - roots.sum()
        of_covariance = np.square(z).sum(1) - np.trace(here.covariance)
        return 2 * z @ (here.mean - self.reference.mean) + of_covariance - of_root


def frechet_distance(one: Statistics, other: Statistics) -> float:
    return FrechetDistance(one).of_statistics(other)


def check_inception(path: str | Path) -> None:
    """FieldError, naming `inception`, if a file is missing or holds no network that FID is defined by, or if
    torch-fidelity is not installed. Only the file's header is read."""
    from importlib.util import find_spec

    from ldm.weights.header import read_header

    path = Path(path)
    if not exists(path):
        raise FieldError("{inception} {path} is not there: {expected}", path=path, expected=WHERE_INCEPTION)
    try:
        header = read_header(path)
        shape = getattr(header.tensors.get("fc.weight"), "shape", None)
        known = "Mixed_7c.branch_pool.conv.weight" in header.tensors
    except InputError:
        header, shape, known = None, None, False
    if header is None or not header.is_pickle or not known or tuple(shape or ()) != (1008, 2048):
        other = " (it is torchvision's, which was trained anew)" if shape and shape[0] == 1000 else ""
        raise FieldError(
            "{inception} {path} is not the Inception-v3 that FID is defined by{other}: {expected}",
            path=path,
            other=other,
            expected=WHERE_INCEPTION,
        )
    if find_spec("torch_fidelity") is None:
        raise InputError(f"FID needs torch-fidelity: {INSTALL}")


class Inception:
    """Features of the Inception-v3 network that FID is defined by, from a local file, by torch-fidelity."""

    def __init__(self, path: str | Path, device: torch.device, layer: str = "2048"):
        check_inception(path)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", [layer], feature_extractor_weights_path=str(path)
            )
        except (RuntimeError, OSError, ValueError, zipfile.BadZipFile) as error:
            why = str(error).splitlines()[0]
            raise FieldError(
                "{inception} {path}: {why}; {expected}", path=path, why=why, expected=WHERE_INCEPTION
            ) from error
        self.network, self.device, self.dimensions = network.to(device), device, DIMENSIONS[layer]

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Images uint8 [h, w, 3] of one size -> float64 [n, d]."""
        import torch

        from ldm.pipeline.device import arithmetic

        with torch.inference_mode(), arithmetic(self.device):
            x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self.device)
            (features,) = self.network(x)
        return features.double().cpu().numpy()


class DetectorFeatures:
    """The last hidden layer of the scenes' detector, 128 numbers for an image."""

    dimensions = 128

    def __init__(self, detector: Detector):
        self.detector = detector

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Images uint8 [h, w, 3] of one size -> float64 [n, 128]."""
        import torch
        from torch.nn.functional import interpolate

        from ldm.images.pixels import to_float
        from ldm.scenes.detector import SIZE

        with torch.inference_mode():
            x = interpolate(to_float(images), (SIZE, SIZE), mode="area")
            return self.detector.layers[:-1](x).double().numpy()


def save_statistics(path: Path, statistics: Statistics, digest: str = "") -> None:
    """Write mean and covariance as `mu` and `sigma`, as other programs for FID do; whole or not at all.

    `digest` says what they are of, for `kept_statistics`.
    """
    from ldm.training.files import whole

    with whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, mu=statistics.mean, sigma=statistics.covariance, digest=digest)


def kept_statistics(path: Path, digest: str) -> Statistics | None:
    """The statistics of a file that was saved with this digest; None if there is no such file."""
    try:
        with np.load(path) as file:
            if str(file["digest"]) == digest:
                return Statistics(file["mu"], file["sigma"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile):
        pass
    return None


def load_statistics(path: str | Path, dimensions: int) -> Statistics:
    """Statistics in the form that FID programs save: `mu` [d] and `sigma` [d, d]. FieldError names
    `reference`."""
    expected = (
        f"give a folder of images, or an .npz with mu [{dimensions}] and sigma [{dimensions}, {dimensions}]"
    )

    def refused(why: str) -> FieldError:
        return FieldError("{reference} {path} {why}: {expected}", path=path, why=why, expected=expected)

    try:
        with user_file(path), np.load(path) as file:
            if not isinstance(file, np.lib.npyio.NpzFile) or not {"mu", "sigma"} <= set(file.files):
                raise refused("has no mu and sigma")
            mean, covariance = (np.asarray(file[name], np.float64) for name in ("mu", "sigma"))
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise refused("is no .npz of numbers") from error
    if mean.shape != (dimensions,) or covariance.shape != (dimensions, dimensions):
        raise refused(f"has mu {list(mean.shape)} and sigma {list(covariance.shape)}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise refused("has values that are not finite")
    return Statistics(mean, covariance)
