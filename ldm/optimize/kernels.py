"""Which of several kernels is fast on this machine: measured once, then remembered.

It depends on the processor's maker and generation, and on torch. One library's matrix products, for instance,
take twice another's time on one maker's processors and the same time on the other's.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.cache import cache_folder

MARGIN = 0.97  # the part of the time so far that a further kernel must stay below
ROUNDS = 2  # readings of each kernel at least, after one that warms it up
ENOUGH = 0.05  # seconds for further rounds: a call of a millisecond is seldom at its best in the first ones


def fingerprint_of_layers(network: nn.Module) -> str:
    """What a network computes besides the values of its weights, in 16 letters.

    The number of heads, for one, shows in no layer's text and no weight's shape, and an option such as --tome
    puts functions of its own in the place of layers'.
    """
    facts: list[object] = []
    for name, layer in network.named_modules():
        facts += [name, type(layer).__qualname__]
        for key, value in vars(layer).items():
            if type(value) in (bool, int, float, str, tuple):
                facts += [key, value]
            elif hasattr(value, "__qualname__"):
                facts += [key, value.__qualname__]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def processor() -> str:
    """The processor's name, family and vector instructions, as far as the system says.

    In a virtual machine the name may be the maker's alone.
    """
    facts: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    if "model name" not in facts:
        import platform

        return platform.processor() or platform.machine()
    vectors = re.findall(r"\b(?:avx2|avx512\w*|amx\w*)", facts.get("flags", ""))
    digest = hashlib.sha256(" ".join(vectors).encode()).hexdigest()[:8]  # they are up to twenty
    model = f"family {facts.get('cpu family')}, model {facts.get('model')}"
    return f"{facts['model name']}, {model}, vectors {digest}"


def fastest(kernels: Mapping[str, Callable[[], Any]]) -> str:
    """The name of the kernel that takes the least time; the first ones are preferred."""
    times = dict.fromkeys(kernels, float("inf"))
    for call in kernels.values():
        call()
    began, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - began < ENOUGH:
        rounds += 1
        for name, call in kernels.items():
            start = time.perf_counter()
            call()
            times[name] = min(times[name], time.perf_counter() - start)
    best, *others = times
    for name in others:
        if times[name] < MARGIN * times[best]:
            best = name
    return best


def choose(work: str, names: Sequence[str], kernels: Callable[[], Mapping[str, Callable[[], Any]]]) -> str:
    """Which of `names` is the fastest kernel for `work`, measured if this machine has not measured it before.

    `kernels` gives a call of each by name, and is only called where they are measured. Choices are kept in
    the user's cache folder, by processor, torch and number of threads: the same command gives the same bits
    again. Processes that start together wait for the first. Where nothing can be kept nothing is measured,
    and the first kernel is used.
    """
    from filelock import FileLock

    machine = f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    try:
        file = cache_folder() / "kernels.json"
        known = read_choices(file)
        if known.get(machine, {}).get(work) not in names:
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(file.with_suffix(".lock"), fallback_to_soft=False):
                known = read_choices(file)
                mine = known.setdefault(machine, {})
                if mine.get(work) not in names:
                    mine[work] = fastest(kernels())
                    unfinished = file.with_suffix(".part")
                    unfinished.write_text(json.dumps(known, indent=1) + "\n")
                    unfinished.replace(file)
        return known[machine][work]
    except (OSError, RuntimeError):
        return names[0]


def read_choices(file: Path) -> dict[str, dict[str, str]]:
    """What has been measured: {machine: {work: kernel}}. Nothing where the file is missing or damaged."""
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    sound = isinstance(known, dict) and all(isinstance(choices, dict) for choices in known.values())
    return known if sound else {}
