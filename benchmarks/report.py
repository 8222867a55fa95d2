"""Results: rows of a table, facts about the machine that they were measured on, and their files."""

import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ldm.weights.loading import ROOT

RESULTS = ROOT / "benchmarks/results"


@dataclass
class Row:
    """One line of the table."""

    what: str
    target: str
    measured: str
    met: bool | None = None  # None: there is nothing to meet, or it could not be measured
    values: dict[str, Any] = field(default_factory=dict)  # every single reading, in seconds and bytes


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on; nothing that says whose machine it is."""
    gpu = None
    if device != "cpu":
        import torch

        gpu = torch.cuda.get_device_name(device)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "GPU": gpu,
        "CPU": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "load average before": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch": package_version("torch"),
        **{name: package_version(name) for name in ("diffusers", "openvino", "stable-diffusion-cpp-python")},
    }


def processor() -> str:
    """The processor's name with what its name leaves open: a virtual machine's may be "AMD EPYC" alone."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.machine()
    facts = dict(re.findall(r"^([^:\n]*\S)\s*:[ \t]*(.*)$", cpuinfo.read_text().partition("\n\n")[0], re.M))
    model = [f"{key.removeprefix('cpu ')} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
    sets = facts.get("flags", facts.get("Features", "")).split()
    known = [*model, *(name for name in wanted if name in sets)]
    return f"{facts.get('model name', platform.machine())} ({', '.join(known)})"


def commit() -> str | None:
    """The commit that is measured, with a + where files were changed since."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=7", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def markdown(facts: dict[str, Any], rows: list[Row]) -> str:
    """The results as a table under one line of facts about the machine."""
    lines = [", ".join(f"{name} {value}" for name, value in facts.items() if value is not None), ""]
    lines += ["| what | target | measured |", "|---|---|---|"]
    for row in rows:
        missed = " **(missed)**" if row.met is False else ""
        lines.append(f"| {row.what} | {row.target} | {row.measured}{missed} |")
    return "\n".join(lines) + "\n"


def write_results(name: str, facts: dict[str, Any], parts: dict[str, list[Row]]) -> str:
    """The table of all parts, after writing it and every reading to `benchmarks/results`."""
    table = markdown(facts, [row for rows in parts.values() for row in rows])
    record = {
        "machine": facts,
        "parts": {part: [asdict(row) for row in rows] for part, rows in parts.items()},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    (RESULTS / f"{name}.md").write_text(table)
    return table
