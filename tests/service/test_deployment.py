"""Dockerfile, compose.yaml, Kubernetes: what they promise, and that their commands are taken."""

import os
import re
import shlex
import socket
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from ldm.cli.parser import serve_parser
from ldm.fields import settings_of
from ldm.service.engine import LAST_LAYER
from ldm.service.options import ServiceOptions
from ldm.service.server import FETCH_SECONDS, LAST_ANSWERS

ROOT = Path(__file__).parents[2]
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
IGNORE = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
KUBERNETES = {one["kind"]: one for one in yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text())}
POD = KUBERNETES["Deployment"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
LAST_SECONDS = FETCH_SECONDS + LAST_ANSWERS + LAST_LAYER  # which an end may take beside its --drain


def lines_of(instruction: str, last_stage: bool = False) -> list[str]:
    text = DOCKERFILE.rpartition("\nFROM ")[2] if last_stage else DOCKERFILE
    return re.findall(rf"^{instruction} (.*)$", text, re.M)


def stage(name: str) -> str:
    """The instructions of the stage FROM … AS `name`."""
    return DOCKERFILE.partition(f" AS {name}\n")[2].partition("\nFROM ")[0]


def reaches_the_build(path: str) -> bool:
    """The last rule of .dockerignore that fits the path or a folder of it decides."""
    parts, sent = path.split("/"), True
    for rule in IGNORE:
        pattern = rule.removeprefix("!")
        if pattern.startswith("**/"):
            fits = any(fnmatch(part, pattern[3:]) for part in parts)
        else:
            wanted = pattern.split("/")
            fits = len(wanted) <= len(parts) and all(map(fnmatch, parts, wanted))
        if fits:
            sent = rule.startswith("!")
    return sent


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


def test_the_memory_of_decoded_images_is_given_back() -> None:
    """Each of the threads that decode them kept an arena of its own, many GB in all."""
    assert "MALLOC_ARENA_MAX=2" in DOCKERFILE


def test_what_is_copied_is_there_and_nothing_else_reaches_the_build() -> None:
    """The list of what may be sent to the builder begins with nothing at all."""
    assert IGNORE[0] == "*"
    allowed = {Path(rule[1:]).parts[0] for rule in IGNORE if rule.startswith("!")}
    copied = [shlex.split(line)[:-1] for line in lines_of("COPY") if not line.startswith("--from")]
    sources = {Path(name) for names in copied for name in names}
    assert {path.parts[0] for path in sources} == allowed
    for path in sources:
        assert (ROOT / path).exists(), path
    assert not lines_of("ADD")
    assert not re.search(r"ARG .*(TOKEN|KEY|SECRET|PASSWORD)", DOCKERFILE, re.I)


def test_own_weights_stay_outside_of_the_image() -> None:
    """models/v1-5.safetensors, the documentation's example of a mounted file, was copied into the image."""
    bundled = [str(path.relative_to(ROOT)) for path in ROOT.glob("models/scenes-*/model.safetensors")]
    assert len(bundled) > 1
    assert all(map(reaches_the_build, [*bundled, "ldm/service/app.py", "scripts/serve.py", "setup.py"]))
    own = [
        "v1-5.safetensors",
        "ldm/stable-diffusion-v1/model.ckpt",
        "safety-checker/model.safetensors",
        "mine/a",
    ]
    others = [*(f"models/{name}" for name in own), "tokens", ".env", ".git/config", "ldm/__pycache__/app.pyc"]
    assert not any(map(reaches_the_build, others))


def test_the_device_is_a_build_argument() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["build"]["args"]["DEVICE"] == name
        assert service["profiles"] == [name]
    reserved = COMPOSE["services"]["cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert reserved == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]


def test_another_device_is_refused_before_anything_is_installed(tmp_path: Path) -> None:
    """The folder that the commands are looked for in is empty: it must not come to one. It came to `venv`."""
    assert "ARG DEVICE=cpu\n" in stage("system")
    first = lines_of("RUN")[0]
    env = {"PATH": str(tmp_path), "DEVICE": "tpu"}
    done = subprocess.run(["/bin/sh", "-c", first], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "--build-arg DEVICE=tpu: give cpu or cuda\n"
    known = re.search(r"case \"\$DEVICE\" in (.*?)\)", first)
    assert known
    assert known[1].split(" | ") == list(COMPOSE["services"])


def test_the_packages_are_the_same_for_each_device() -> None:
    """A build for the other device installed 6 GB once more, as the argument was one of that stage, too."""
    assert "pip install" in stage("packages")
    assert "DEVICE" not in stage("packages")


def test_the_toolkit_is_installed_where_it_lies() -> None:
    """It was uninstalled, and doctor.py advised people to install it in a file system that is read-only."""
    (folder,) = re.findall(r"^WORKDIR (.*)$", stage("packages"), re.M)
    assert [folder] == lines_of("WORKDIR", last_stage=True)
    assert '--editable ".[service,provenance]"' in stage("packages")
    assert "pip uninstall" not in DOCKERFILE


def test_files_that_only_their_owner_may_read_are_opened_to_the_user(tmp_path: Path) -> None:
    """COPY keeps modes: of a checkout under umask 077 the container's user could read nothing."""
    hidden, program = tmp_path / "folder" / "hidden.py", tmp_path / "program"
    hidden.parent.mkdir()
    for path, mode in ((hidden, 0o600), (program, 0o700), (hidden.parent, 0o700)):
        path.touch()
        path.chmod(mode)
    (opened,) = re.findall(r"find \. .*?\+(?= &&)", lines_of("RUN", last_stage=True)[-1])
    assert subprocess.run(["/bin/sh", "-c", opened], cwd=tmp_path).returncode == 0
    modes = [path.stat().st_mode & 0o777 for path in (hidden, program, hidden.parent)]
    assert modes == [0o644, 0o755, 0o755]


def test_a_line_of_the_log_is_one_write() -> None:
    """PYTHONUNBUFFERED made two of it: two requests were seen on one line of a container's log."""
    words = [word.partition("=") for line in lines_of("ENV", last_stage=True) for word in shlex.split(line)]
    python = {name: value for name, _, value in words if name.startswith("PYTHON")}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    code = "from ldm.service.logs import JsonLog; JsonLog().write('request')"
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # a message is a write
    with reader, writer:
        command = [sys.executable, "-c", code]
        assert subprocess.run(command, cwd=ROOT, env={**env, **python}, stderr=writer).returncode == 0
        reader.settimeout(10)
        assert reader.recv(65_536).endswith(b"}\n")


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_compose_services_are_confined(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["tmpfs"]
    assert service["secrets"] == ["tokens"]
    assert set(COMPOSE["secrets"]) == {"tokens"}
    assert "healthcheck" not in service  # the Dockerfile's; Podman breaks one of compose at its spaces
    assert all(port.startswith("127.0.0.1:") and port.endswith(":8000") for port in service["ports"])
    assert not service.get("privileged")
    options = service_options(*service["command"])
    assert int(service["stop_grace_period"].removesuffix("s")) > options.drain + LAST_SECONDS
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
    assert POD["terminationGracePeriodSeconds"] > seconds + options.drain + LAST_SECONDS


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
