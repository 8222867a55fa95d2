"""PLMSSampler as the original's notebooks call it."""

from ldm.models.diffusion.ddim import DDIMSampler


class PLMSSampler(DDIMSampler):
    """DDIMSampler's calls with the PLMS update; eta must be 0."""

    name = "plms"
