"""Dockerfile, compose.yaml and deploy/: what they promise, and that their commands are taken."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import script

from ldm.cli.parser import serve_parser
from ldm.fields import settings_of
from ldm.service.options import ServiceOptions

ROOT = Path(__file__).parents[2]
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
KUBERNETES = {one["kind"]: one for one in yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text())}
POD = KUBERNETES["Deployment"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
SLURM = ROOT / "deploy/slurm.sh"


def lines_of(instruction: str, last_stage: bool = False) -> list[str]:
    text = DOCKERFILE.rpartition("\nFROM ")[2] if last_stage else DOCKERFILE
    return re.findall(rf"^{instruction} (.*)$", text, re.M)


def entrypoint() -> list[str]:
    return yaml.safe_load(lines_of("ENTRYPOINT")[0])


def service_options(*more: str) -> ServiceOptions:
    """The options of the container's command with these behind it, as serve.py reads them."""
    python, path, *argv = [*entrypoint(), *more]
    assert (python, path) == ("python", "scripts/serve.py")
    given = vars(serve_parser().parse_args(argv))
    return ServiceOptions(**{name: given[name] for name in settings_of(ServiceOptions) if name in given})


def test_the_container_runs_the_service() -> None:
    options = service_options()
    assert options.host == "0.0.0.0"
    assert options.token_file == "/run/secrets/tokens"
    assert lines_of("EXPOSE") == [str(options.port)]


def test_the_container_is_not_root_and_says_how_it_is() -> None:
    (user,) = lines_of("USER", last_stage=True)
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
    (check,) = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", DOCKERFILE, re.M)
    assert f"http://127.0.0.1:{service_options().port}/health" in check
    compile(yaml.safe_load(check)[2], "health check", "exec")
    assert lines_of("STOPSIGNAL") == ["SIGTERM"]


def test_what_is_copied_is_there_and_nothing_else_reaches_the_build() -> None:
    """The list of what may be sent to the builder begins with nothing at all."""
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {line[1:] for line in rules if line.startswith("!")}
    copied = [shlex.split(line)[:-1] for line in lines_of("COPY") if not line.startswith("--from")]
    sources = {Path(name) for names in copied for name in names}
    assert {path.parts[0] for path in sources} == allowed
    for path in sources:
        assert (ROOT / path).exists(), path
    assert not lines_of("ADD")
    assert not re.search(r"ARG .*(TOKEN|KEY|SECRET|PASSWORD)", DOCKERFILE, re.I)


def test_the_device_is_a_build_argument() -> None:
    assert "ARG DEVICE=cpu" in DOCKERFILE
    for name, service in COMPOSE["services"].items():
        assert service["build"]["args"]["DEVICE"] == name
        assert service["profiles"] == [name]
    assert "cpu | cuda) " in DOCKERFILE
    reserved = COMPOSE["services"]["cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert reserved == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_compose_services_are_confined(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["tmpfs"]
    assert service["secrets"] == ["tokens"]
    assert set(COMPOSE["secrets"]) == {"tokens"}
    assert "/health" in service["healthcheck"]["test"][-1]
    assert all(port.startswith("127.0.0.1:") and port.endswith(":8000") for port in service["ports"])
    assert not service.get("privileged")
    options = service_options(*service["command"])
    assert int(service["stop_grace_period"].removesuffix("s")) > options.drain
    volumes = dict(volume.split(":")[:2] for volume in service["volumes"][:2])
    assert set(volumes) == set(COMPOSE["volumes"])
    assert options.keep in volumes.values()
    assert all(f" {folder}" in DOCKERFILE for folder in volumes.values())  # made there, for the user
    assert service["volumes"][2].endswith(":/app/models:ro")
    assert lines_of("WORKDIR", last_stage=True) == ["/app"]


def test_a_pod_has_a_gpu_and_a_read_only_root() -> None:
    assert KUBERNETES["Deployment"]["spec"]["replicas"] > 1
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == "1"
    context = CONTAINER["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert POD["securityContext"]["runAsNonRoot"] is True
    user = POD["securityContext"]["runAsUser"]
    assert lines_of("USER", last_stage=True) == [f"{user}:{POD['securityContext']['runAsGroup']}"]
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in POD["volumes"]}
    assert str(Path(service_options().token_file).parent) == mounts["tokens"]
    assert {"/tmp", "/cache"} <= set(mounts.values())


def test_a_pod_has_time_to_drain() -> None:
    options = service_options(*CONTAINER["args"])
    seconds = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] > seconds + options.drain


def test_probes_ask_routes_that_need_no_token() -> None:
    from ldm.service.guards import OPEN

    probes = {name: CONTAINER[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/health",
        "liveness": "/health",
        "readiness": "/ready",
    }
    assert {probe["path"] for probe in probes.values()} <= set(OPEN)
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == service_options().port
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert KUBERNETES["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]


def test_pods_follow_the_length_of_the_queue() -> None:
    """The metric is one that /metrics has."""
    spec = KUBERNETES["HorizontalPodAutoscaler"]["spec"]
    assert spec["scaleTargetRef"]["name"] == KUBERNETES["Deployment"]["metadata"]["name"]
    (metric,) = spec["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert f'"{name}"' in (ROOT / "ldm/service/metrics.py").read_text()
    (endpoint,) = KUBERNETES["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["path"] == "/metrics"
    assert endpoint["authorization"]["credentials"]["key"]


def test_the_network_policy_is_of_these_pods_and_lets_nothing_out() -> None:
    policy, labels = KUBERNETES["NetworkPolicy"]["spec"], KUBERNETES["Deployment"]["spec"]["selector"]
    assert policy["podSelector"] == labels == KUBERNETES["PodDisruptionBudget"]["spec"]["selector"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []


# SLURM: srun and scontrol are replaced by scripts that write down how they were called


def slurm(folder: Path, srun: str) -> tuple[dict[str, str], Path]:
    """The environment of a job with these stand-ins, and the file of their calls."""
    calls = folder / "calls"
    scripts = {"srun": srun, "scontrol": "", "python": ""}
    (folder / "bin").mkdir()
    for name, text in scripts.items():
        path = folder / "bin" / name
        path.write_text(f'#!/bin/bash\nfor word in {name} "$@"; do echo "$word"; done >> {calls}\n{text}\n')
        path.chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "TOOLKIT": str(folder), "SLURM_JOB_ID": "17"}, calls


def test_the_job_is_a_run_that_is_resumed(tmp_path: Path) -> None:
    env, calls = slurm(tmp_path, "")
    done = subprocess.run(["bash", SLURM, "prompts with a space.csv", "out", "--steps", "30"], env=env)
    assert done.returncode == 0
    words = calls.read_text().splitlines()
    start = words.index("scripts/batch_score.py")
    scoring = script("batch_score").parse(words[start + 1 :])
    assert scoring.args.input == ["prompts with a space.csv"]
    assert scoring.run.resume
    assert (scoring.run.outdir, scoring.settings) == ("out", {"steps": 30})
    assert "--gpus-per-task=1" in words[:start]


def test_a_job_that_fails_says_so(tmp_path: Path) -> None:
    env, _ = slurm(tmp_path, "exit 3")
    assert subprocess.run(["bash", SLURM, "a.csv", "out"], env=env).returncode == 3
    assert subprocess.run(["bash", SLURM, "a.csv"], env=env, capture_output=True).returncode == 2


@pytest.mark.parametrize(
    ("sent", "code", "requeued"), [(signal.SIGUSR1, 0, True), (signal.SIGTERM, 130, False)]
)
def test_a_job_that_is_to_end_leaves_the_rest_to_the_next(
    sent: int, code: int, requeued: bool, tmp_path: Path
) -> None:
    """The step ends with what it has in hand; the job is queued again, on preemption by SLURM itself."""
    ready, ended = tmp_path / "ready", tmp_path / "ended"
    srun = f"trap 'kill %1; touch {ended}; exit 130' TERM\nsleep 60 & touch {ready}; wait"
    env, calls = slurm(tmp_path, srun)
    with subprocess.Popen(["bash", SLURM, "a.csv", "out"], env=env) as job:
        while not ready.exists():
            assert job.poll() is None
            time.sleep(0.01)
        job.send_signal(sent)
        assert job.wait(30) == code
    assert ended.exists()
    assert (calls.read_text().splitlines()[-3:] == ["scontrol", "requeue", "17"]) is requeued


def test_the_job_asks_for_a_gpu_a_task_and_to_be_queued_again() -> None:
    asked: dict[str, Any] = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SLURM.read_text(), re.M))
    assert asked["gpus-per-task"] == "1"
    assert "requeue" in asked
    assert asked["signal"].startswith("B:USR1@")
    assert subprocess.run(["bash", "-n", SLURM]).returncode == 0
