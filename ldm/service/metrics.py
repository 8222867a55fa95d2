"""Figures of the service for Prometheus, in a registry of its own: several services may run in a process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from ldm.service.engine import Engine
    from ldm.service.moderation import Moderation

SECONDS = (0.01, 0.05, 0.25, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # bounds of the histogram's classes
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts requests by route and status, never by what clients write, and shows the engine's figures."""

    def __init__(self, engine: Engine, moderation: Moderation):
        self.registry = CollectorRegistry(auto_describe=False)
        self.requests = Counter(
            "sd_http_requests", "HTTP requests", ("method", "route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "sd_http_request_seconds",
            "Seconds from the request to the end of its answer",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Figures(engine, moderation))

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request that has been answered."""
        self.requests.labels(method, route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All figures, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Figures:
    """What engine and moderation know at the moment of the question."""

    def __init__(self, engine: Engine, moderation: Moderation):
        self.engine, self.moderation = engine, moderation

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        engine = self.engine
        for name, help, value in (
            ("sd_waiting_images", "Images that wait", engine.queue_length),
            ("sd_running_images", "Images that are sampled now", engine.running),
            ("sd_seconds_per_image", "Seconds that an image took, of late", engine.seconds_per_image),
            ("sd_loaded_models", "Models in memory", len(engine.loaded_models)),
        ):
            if value is not None:
                yield GaugeMetricFamily(name, help, value=value)
        for name, value in engine.counters.items():
            help = f"{name.replace('_', ' ').capitalize()} since the start"
            yield CounterMetricFamily(f"sd_{name}", help, value=value)
        verdicts = self.moderation.counts
        yield _labelled("sd_moderation", "Verdicts of moderation", ("what", "outcome"), verdicts)


def _labelled(
    name: str, help: str, labels: tuple[str, ...], values: Mapping[Any, float]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help, labels=labels)
    for key, value in values.items():
        family.add_metric((key,) if isinstance(key, str) else key, value)
    return family
