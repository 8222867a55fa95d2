"""What a run costs: energy and CO2 by the formula of the Machine Learning Impact calculator.

CO2 = power of the hardware x hours x CO2 of a kilowatt-hour where it comes from (Lacoste et al. 2019,
https://arxiv.org/abs/1910.09700). Imports no torch.
"""

from __future__ import annotations

import difflib
import logging
import math
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import FieldError, ValueFieldError

if TYPE_CHECKING:
    import torch

# Watts of one device, by a pattern of the name that torch gives it. Most are of the calculator's table
# (https://github.com/mlco2/impact/blob/master/data/gpus.csv), the newer ones of their makers' data sheets.
GPUS = (
    ("B200", 1000),
    ("H200|H100.*HBM3", 700),
    ("H100", 350),
    ("A100.*SXM", 400),
    ("A100", 250),
    ("L40S", 350),
    ("A40$|A6000|6000 Ada|L40", 300),
    ("V100.*SXM2-16", 250),
    ("V100", 300),
    ("A30$", 165),
    ("A10", 150),
    ("A4000", 140),
    ("L4$", 72),
    ("T4$", 70),
    ("P100|P40|M40|TITAN X|Titan V", 250),
    ("Titan RTX", 280),
    ("K80", 300),
    ("K40", 245),
    ("5090", 575),
    ("4090", 450),
    ("4080|3080$", 320),
    ("4070 Ti", 285),
    ("4070", 200),
    ("3090|3080 Ti", 350),
    ("3070", 220),
    ("4060 Ti", 160),
    ("4060", 115),
    ("3060 Ti", 200),
    ("3060", 170),
    ("2080 Ti|1080 Ti", 250),
    ("2080", 215),
    ("1080", 180),
    ("MI300X", 750),
    ("MI250X", 560),
    ("MI250", 500),
    ("MI210", 300),
)
UNKNOWN_GPU = 250
# Watts of a core: thermal design power by the number of cores, of these or of a usual processor of the name.
CPUS = (
    ("EPYC 9654", 360 / 96),
    ("EPYC 7763", 280 / 64),
    ("EPYC", 280 / 64),
    ("Xeon.*Platinum 8[45]", 350 / 56),
    ("Xeon.*Gold 5220", 125 / 18),
    ("Xeon.*Gold", 150 / 20),
    ("Xeon.*E5-2699", 145 / 18),
    ("Xeon.*E5-2630", 85 / 10),
    ("Xeon", 150 / 20),
    ("Ryzen 9 7950X", 170 / 16),
    ("Ryzen", 105 / 16),
    (r"Core.*i\d", 125 / 16),
)
UNKNOWN_CORE = 10.0
# kg of CO2 equivalents per kWh. The world's is the IEA's for 2018 (Global Energy & CO2 Status Report 2019),
# the others are the calculator's of 2019 (https://github.com/mlco2/impact/blob/master/data/impact.csv).
REGIONS = {
    "world": 0.475,
    "australia": 0.802,
    "belgium": 0.267,
    "brazil": 0.205,
    "canada-ontario": 0.0693,
    "canada-quebec": 0.020,
    "china": 0.680,
    "finland": 0.211,
    "france": 0.105,
    "germany": 0.615,
    "hong-kong": 0.702,
    "india": 0.920,
    "ireland": 0.617,
    "japan": 0.516,
    "netherlands": 0.569,
    "singapore": 0.419,
    "south-africa": 1.009,
    "south-korea": 0.517,
    "sweden": 0.047,
    "switzerland": 0.016,
    "taiwan": 0.557,
    "united-kingdom": 0.623,
    "us-central": 0.5663,
    "us-east": 0.3678,
    "us-northwest": 0.2976,
    "us-south": 0.4604,
    "us-west": 0.2406,
}
MOST_CO2 = 2.0  # kg per kWh: no grid has more, so that larger numbers are grams
LEAST_POWER = 0.1  # watts
ESTIMATED, MEASURED = "estimated", "measured"


@dataclass(frozen=True)
class Costs:
    """Energy and CO2 of some work."""

    hours: float
    watts: float  # of all devices together, on average where they were measured
    factor: float  # kg of CO2 equivalents per kWh
    how: str = ESTIMATED

    @property
    def kwh(self) -> float:
        return self.hours * self.watts / 1000

    @property
    def co2_kg(self) -> float:
        return self.kwh * self.factor

    def record(self) -> dict[str, Any]:
        """The figures by name, for a JSON file."""
        return {
            "hours": rounded(self.hours),
            "watts": rounded(self.watts),
            "kwh": rounded(self.kwh),
            "kg_co2_per_kwh": self.factor,
            "co2_kg": rounded(self.co2_kg),
            "energy": self.how,
        }

    def __str__(self) -> str:
        """As a user reads it: 21 Wh and 9.8 g CO2 (estimated)."""
        return f"{energy(self.kwh)} and {mass(self.co2_kg)} CO2 ({self.how})"


def factor_of(region: str) -> float:
    """kg of CO2 equivalents per kWh: of a region by name, or the number itself. ValueFieldError."""
    try:
        factor = float(region)
    except ValueError:
        name = re.sub(r"[\s_]+", "-", region.strip().lower())
        if name in REGIONS:
            return REGIONS[name]
        near = difflib.get_close_matches(name, REGIONS, 3, 0.5)
        near += [known for known in REGIONS if name and name in known.split("-") and known not in near]
        nearest = f"the nearest are {', '.join(near)}; " if near else ""
        why = f"{region!r} is not known; {nearest}give kg of CO2 per kWh, or one of {', '.join(REGIONS)}"
        raise ValueFieldError("region", why) from None
    if not 0 <= factor <= MOST_CO2:
        grams = f"; {factor:g} g are {factor / 1000:g}" if factor > MOST_CO2 and math.isfinite(factor) else ""
        why = f"{region} is not a number of kg of CO2 per kWh in range: 0 … {MOST_CO2:g}{grams}"
        raise ValueFieldError("region", why)
    return factor


def device_name(device: torch.device) -> str:
    """The name of the GPU or processor: "NVIDIA A100-PCIE-40GB", "AMD EPYC 7763 64-Core Processor"."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return cpu_name()


def cpu_name() -> str:
    """The processor's name; that of its architecture where the system does not say more."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return found[1].strip() if found else platform.processor() or platform.machine()


def power_of(name: str, cores: int | None = None) -> float:
    """Watts of a device by its name; of a processor with `cores` at work, its share of the design power."""
    table, unknown = (GPUS, UNKNOWN_GPU) if cores is None else (CPUS, UNKNOWN_CORE)
    watts = next((watts for pattern, watts in table if re.search(pattern, name, re.I)), unknown)
    return watts * (1 if cores is None else cores)


def device_power(device: torch.device) -> float:
    """Watts of a device, or of the cores that torch computes on."""
    import torch

    return power_of(device_name(device), None if device.type == "cuda" else torch.get_num_threads())


class Meter:
    """The costs of the work from its making on, on `devices` devices such as this process's.

    `power` are the watts of one device, by default what is known of it, and `region` is a name or a factor.
    `energy` says how they come about: "estimated" by the formula; "measured" by codecarbon, with a FieldError
    where that is not installed or cannot measure on this machine; "auto" is measured where it can be.
    """

    def __init__(
        self,
        device: torch.device,
        devices: int = 1,
        *,
        power: float | None = None,
        region: str = "world",
        energy: str = ESTIMATED,
        nodes: int = 1,
    ):
        self.watts = devices * (device_power(device) if power is None else power)
        self.factor = factor_of(region)
        self.gpu = device.type == "cuda"
        self._start, self._tracker = time.perf_counter(), None
        why = None if energy == ESTIMATED else why_not_measured(self.gpu, nodes)
        if energy == MEASURED and why:
            raise FieldError("{energy} measured: {why}", why=why)
        if energy != ESTIMATED and why is None:
            self._tracker = codecarbon_tracker()
            self._tracker.start()

    @property
    def seconds(self) -> float:
        """Since the beginning of the work."""
        return time.perf_counter() - self._start

    def costs(self) -> Costs:
        """The costs until now, by the formula."""
        return Costs(self.seconds / 3600, self.watts, self.factor)

    def stop(self) -> Costs:
        """The costs until now, measured if they are."""
        costs = self.costs()
        if self._tracker is None:
            return costs
        tracker, self._tracker = self._tracker, None
        tracker.stop()
        found = tracker.final_emissions_data
        kwh = found.gpu_energy if self.gpu else found.cpu_energy
        return Costs(costs.hours, 1000 * kwh / costs.hours, self.factor, MEASURED)


def why_not_measured(gpu: bool, nodes: int = 1) -> str | None:
    """Why codecarbon cannot measure what a GPU or the processor takes; None if it can."""
    try:
        from codecarbon.core import cpu
        from codecarbon.core import gpu as gpus
        from codecarbon.core.powermetrics import is_powermetrics_available
    except ImportError:
        return 'codecarbon is not installed: pip install -e ".[training]"'
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    if nodes > 1:
        return f"each of {nodes} machines would have to be"
    if gpu:
        return None if gpus.is_gpu_details_available() else "the driver says nothing about the GPU's power"
    if cpu.is_rapl_available() or is_powermetrics_available():
        return None
    return "this machine has no counter of its processor's energy (RAPL) that may be read"


def codecarbon_tracker() -> Any:
    """A tracker that writes no file and asks no server; CO2 is computed here, so its country is any."""
    from codecarbon import OfflineEmissionsTracker

    return OfflineEmissionsTracker(
        country_iso_code="USA", output_methods=[], log_level="critical", allow_multiple_runs=True
    )


def rounded(number: float, digits: int = 4) -> float:
    """A number with so many significant digits."""
    return float(f"{number:.{digits}g}")


def significant(number: float) -> str:
    """Two significant digits, without an exponent: "0.0021", "11,000"."""
    if not number:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(abs(number))))
    return f"{number:,.{min(digits, 9)}f}"


def energy(kwh: float) -> str:
    """An energy in kWh or Wh: 37,500 kWh, 21 Wh."""
    return f"{significant(kwh)} kWh" if kwh >= 1 else f"{significant(1000 * kwh)} Wh"


def mass(kg: float) -> str:
    """A mass in kg or g: 11,250 kg, 9.8 g, 0.020 g."""
    return f"{significant(kg)} kg" if kg >= 1 else f"{significant(1000 * kg)} g"


def duration(seconds: float) -> str:
    """A time as a user reads it: 3 h 12 min, 1 min 30 s, 12 s, 0.8 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
