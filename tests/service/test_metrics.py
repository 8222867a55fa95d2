from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from ldm.service.metrics import Metrics
from ldm.service.moderation import Moderation

ENGINE = SimpleNamespace(
    queue_length=3,
    running=2,
    seconds_per_image=None,
    loaded_models=("a", "b"),
    counters={"images": 7, "jobs_failed": 1},
)


def values(metrics: Metrics) -> dict[tuple, float]:
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def metrics() -> Metrics:
    async def ask(what: str, content: object) -> None:
        return None

    return Metrics(ENGINE, Moderation(ask))


def test_the_engines_figures_are_those_of_the_moment() -> None:
    found = metrics()
    assert values(found)["sd_waiting_images",] == 3
    assert values(found)["sd_images_total",] == 7
    assert values(found)["sd_jobs_failed_total",] == 1
    assert values(found)["sd_loaded_models",] == 2
    assert ("sd_seconds_per_image",) not in values(found)
    assert values(found)["sd_moderation_total", "prompt", "refused"] == 0


def test_requests_are_counted_by_route_and_status() -> None:
    found = metrics()
    found.count("POST", "/generate", 200, 0.3)
    found.count("POST", "/generate", 200, 40.0)
    found.count("GET", "other", 404, 0.001)
    seen = values(found)
    assert seen["sd_http_requests_total", "/generate", "200", "POST"] == 2
    assert seen["sd_http_requests_total", "404", "GET", "other"] == 1
    assert seen["sd_http_request_seconds_bucket", "/generate", "1.0"] == 1
    assert seen["sd_http_request_seconds_count", "/generate"] == 2


def test_two_services_in_one_process_count_apart() -> None:
    one, other = metrics(), metrics()
    one.count("GET", "/models", 200, 0.1)
    assert ("sd_http_requests_total", "/models", "200", "GET") not in values(other)
