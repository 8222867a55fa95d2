"""DPMSolverSampler as the original's notebooks call it."""

from ldm.models.diffusion.ddim import DDIMSampler


class DPMSolverSampler(DDIMSampler):
    """DDIMSampler's calls with the DPM-Solver++ (2M) update; eta is ignored, as in the original."""

    name = "dpmpp_2m"
