"""The Gaussian that an autoencoder's encoder predicts."""

import math
from collections.abc import Sequence

import torch


class DiagonalGaussianDistribution:
    """A normal distribution per latent value, from parameters [b, 2c, h, w]: the mean, then the log-variance.

    Log-variances are clamped to [-30, 20], as in the original. A `deterministic` one has variance 0: its
    samples are its mean, and its divergences count as 0.
    """

    def __init__(self, parameters: torch.Tensor, deterministic: bool = False):
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> torch.Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> torch.Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else self.logvar.exp()

    def sample(self, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Mean + std * noise, both [b, c, h, w].

        Without `noise` it is drawn from torch's global CPU generator, as the original does on any device.
        """
        if noise is None:
            noise = torch.randn(self.mean.shape)
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> torch.Tensor:
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> torch.Tensor:
        """KL divergence to `other`, by default the standard normal, in nats, [b].

        Kingma & Welling 2013, https://arxiv.org/abs/1312.6114, appendix B.
        """
        if self.deterministic:
            return torch.zeros(1)
        mean, var, logvar = (0.0, 1.0, 0.0) if other is None else (other.mean, other.var, other.logvar)
        terms = ((self.mean - mean).square() + self.var) / var - 1.0 - self.logvar + logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))

    def nll(self, sample: torch.Tensor, dims: Sequence[int] = (1, 2, 3)) -> torch.Tensor:
        """Negative log-likelihood in nats of a sample [b, c, h, w], summed over `dims`."""
        if self.deterministic:
            return torch.zeros(1)
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.sum(dim=tuple(dims))
