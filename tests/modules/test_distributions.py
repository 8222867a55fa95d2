"""The first stage's posterior against torch's normal distributions."""

import torch
from networks import random_tensors
from torch.distributions import Normal, kl_divergence

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


def test_posterior_divergence_is_that_of_normals():
    (moments,) = random_tensors((3, 8, 5, 2))
    posterior = DiagonalGaussianDistribution(moments)
    mean, logvar = moments.chunk(2, dim=1)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.kl(), expected)
    assert DiagonalGaussianDistribution(torch.zeros(2, 8, 5, 2)).kl().tolist() == [0, 0]


def test_posterior_samples():
    moments, noise = random_tensors((3, 8, 5, 2), (3, 4, 5, 2))
    posterior = DiagonalGaussianDistribution(moments)
    mean, logvar = moments.chunk(2, dim=1)
    assert torch.equal(posterior.mode(), mean)
    torch.testing.assert_close(posterior.sample(noise), mean + (0.5 * logvar).exp() * noise)
    torch.manual_seed(3)
    drawn = posterior.sample()
    assert torch.equal(drawn, posterior.sample(torch.randn(3, 4, 5, 2, generator=torch.manual_seed(3))))


def test_posterior_log_variances_are_clamped():
    logvar = torch.tensor([-1e9, -31.0, 0.0, 21.0, 1e9]).reshape(1, 1, 1, 5)
    posterior = DiagonalGaussianDistribution(torch.cat([torch.zeros_like(logvar), logvar], dim=1))
    assert posterior.logvar.flatten().tolist() == [-30, -30, 0, 20, 20]
    assert posterior.sample(torch.ones(1, 1, 1, 5)).isfinite().all()


def test_divergence_to_another_and_likelihood_are_those_of_normals():
    first, second, sample = random_tensors((3, 8, 5, 2), (3, 8, 5, 2), (3, 4, 5, 2))
    ours = DiagonalGaussianDistribution(first), DiagonalGaussianDistribution(second)
    theirs = [Normal(d.mean, d.std) for d in ours]
    torch.testing.assert_close(ours[0].kl(ours[1]), kl_divergence(*theirs).sum(dim=(1, 2, 3)))
    expected = -theirs[0].log_prob(sample)
    torch.testing.assert_close(ours[0].nll(sample), expected.sum(dim=(1, 2, 3)))
    torch.testing.assert_close(ours[0].nll(sample, dims=[1]), expected.sum(dim=1))
    assert ours[0].parameters is first
    torch.testing.assert_close(ours[0].var, ours[0].std.square())


def test_a_deterministic_posterior():
    (moments,) = random_tensors((3, 8, 5, 2))
    posterior = DiagonalGaussianDistribution(moments, deterministic=True)
    assert posterior.deterministic
    assert torch.equal(posterior.sample(), posterior.mean)
    assert not posterior.std.any()
    assert not posterior.var.any()
    assert posterior.kl().tolist() == posterior.nll(posterior.mean).tolist() == [0]
