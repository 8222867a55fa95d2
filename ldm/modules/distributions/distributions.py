"""The Gaussian that an autoencoder's encoder predicts."""

import torch


class DiagonalGaussianDistribution:
    """A normal distribution per latent value, from moments [b, 2c, h, w]: the mean, then the log-variance.

    Log-variances are clamped to [-30, 20], as in the original.
    """

    def __init__(self, moments: torch.Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> torch.Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Mean + std * noise, both [b, c, h, w].

        Without `noise` it is drawn from torch's global CPU generator, as the original does on any device.
        """
        if noise is None:
            noise = torch.randn(self.mean.shape)
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> torch.Tensor:
        return self.mean

    def kl(self) -> torch.Tensor:
        """KL divergence to the standard normal in nats, [b] (Kingma & Welling 2013, appendix B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))
