"""Whether the image, the compose files and the Kubernetes manifest fit the box.  Nothing is built
here: tests/containers/run does that."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import yaml

from pinaivu_box.cli.main import COMMANDS
from pinaivu_box.config import ENVIRONMENT, Config
from pinaivu_box.server.endpoints import ENDPOINTS
from tests.support.in_process_command import run_command
from tests.support.process_box import Box

BUILD = Path(__file__).parent.parent / "build"
HOME, CACHE = "/var/lib/pinaivu", "/var/cache/pinaivu"
PORT = Config().server.port
PEERING_PORT = Config().peering.port
SETTINGS = {*ENVIRONMENT, "PINAIVU_HOME"}


def instructions() -> list[tuple[str, str]]:
    """Those of the Dockerfile, in order, without comments and line breaks."""
    text = re.sub(r"^\s*#.*\n", "", (BUILD / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", "").splitlines()
    pairs = (line.partition(" ") for line in lines if line.strip())
    return [(name, value.strip()) for name, _, value in pairs]


def the(name: str) -> str:
    """The one instruction of that name."""
    (value,) = [value for each, value in instructions() if each == name]
    return value


def variables() -> dict[str, str]:
    values = [value for name, value in instructions() if name == "ENV"]
    return dict(pair.split("=") for value in values for pair in value.split())


def compose(*names: str) -> list[dict[str, Any]]:
    return [yaml.safe_load((BUILD / name).read_text())["services"]["pinaivu"] for name in names]


def manifest(kind: str) -> dict[str, Any]:
    documents = yaml.safe_load_all((BUILD / "kubernetes.yaml").read_text())
    (found,) = [each for each in documents if each["kind"] == kind]
    return dict(found)


def pod() -> dict[str, Any]:
    return dict(manifest("StatefulSet")["spec"]["template"]["spec"])


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    return dict(only)


# -- the image -----------------------------------------------------------------------------------


def test_the_image_starts_the_box_as_a_user_with_a_home() -> None:
    assert json.loads(the("ENTRYPOINT")) == ["tini", "--", "pinaivu"]
    assert json.loads(the("CMD")) == ["serve"] and "serve" in COMMANDS
    user, group = the("USER").split(":")
    assert int(user) > 0 and int(group) > 0
    (added,) = [value for name, value in instructions() if name == "RUN" and "useradd" in value]
    assert f"--uid {user} " in added and f"--home-dir {HOME} " in added
    assert the("VOLUME") == the("WORKDIR") == HOME
    assert signal.Signals[the("STOPSIGNAL")] is signal.SIGTERM
    assert variables()["PINAIVU_HOME"] == HOME and variables()["PINAIVU_HOST"] == "0.0.0.0"
    ours = {name for name in variables() if name.startswith("PINAIVU_")}
    assert ours <= SETTINGS
    assert the("EXPOSE").split() == [f"{PORT}/tcp", f"{PEERING_PORT}/udp"]


def test_the_image_has_the_executable_that_build_binary_makes() -> None:
    arguments = [value for name, value in instructions() if name == "ARG"]
    assert "EXECUTABLE=pinaivu" in arguments
    tasks = (BUILD / "tasks.py").read_text()
    assert 'name = f"pinaivu-{choice.kind}" if choice.kind else "pinaivu"' in tasks
    (cuda,) = compose("compose.cuda.yaml")
    assert cuda["build"]["args"]["EXECUTABLE"] == "pinaivu-cuda"


def test_the_program_is_unpacked_when_the_image_is_built() -> None:
    """As the user that runs it: what another has unpacked is not used."""
    names = [name for name, _ in instructions()]
    unpacks = instructions().index(("RUN", '["pinaivu", "--version"]'))
    assert names.index("USER") < unpacks and names.index("ENV") < unpacks
    # What is below a volume when it is declared would not be in one that is mounted there.
    assert variables()["XDG_CACHE_HOME"] == CACHE and not CACHE.startswith(HOME)
    assert re.search(rf"install -d -m 0700 -o pinaivu .*{CACHE}", instructions()[2][1])


def test_the_image_is_healthy_when_the_box_answers(tmp_path: Path) -> None:
    command = json.loads(the("HEALTHCHECK").partition("CMD ")[2])
    assert command == ["pinaivu", "ps"]
    box = Box(tmp_path / "home").start()
    try:
        assert run_command("ps", home=box.home).returncode == 0
        box.kill()
        assert run_command("ps", home=box.home, check=False).returncode == 1
    finally:
        box.end()


# -- compose -------------------------------------------------------------------------------------


def test_compose_builds_that_image_and_gives_it_time_to_drain() -> None:
    (box,) = compose("compose.yaml")
    context = (BUILD / box["build"]["context"]).resolve()
    assert context == BUILD.parent / "dist"
    assert (context / box["build"]["dockerfile"]).resolve() == BUILD / "Dockerfile"
    assert int(box["stop_grace_period"].removesuffix("s")) > Config().server.drain_seconds
    assert box["ports"] == [f"{PORT}:{PORT}"]
    assert [volume.split(":")[1] for volume in box["volumes"]] == [HOME]
    assert set(box["environment"]) <= SETTINGS
    assert box["read_only"]  # it runs from the image


def test_compose_with_a_gpu_only_adds_to_that() -> None:
    plain, cuda = compose("compose.yaml", "compose.cuda.yaml")
    assert cuda.keys() - plain.keys() == {"deploy"}
    # The backend for GPUs is unpacked when it is first needed.
    assert [volume.split(":")[1] for volume in cuda["volumes"]] == [CACHE]
    (device,) = cuda["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


# -- Kubernetes ----------------------------------------------------------------------------------


def test_the_probes_are_endpoints_that_need_no_key() -> None:
    public = {endpoint.path for endpoint in ENDPOINTS if endpoint.access == "public"}
    probes = {name: container()[name]["httpGet"]["path"] for name in container() if "Probe" in name}
    # Starting and alive: it answers.  Ready: it can serve.  tests/test_crash.py drains one.
    assert probes == {
        "startupProbe": "/health",
        "readinessProbe": "/readyz",
        "livenessProbe": "/health",
    }
    assert set(probes.values()) <= public
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports == {"api": PORT}
    assert all(container()[name]["httpGet"]["port"] == "api" for name in probes)


def test_the_pod_fits_the_image() -> None:
    user, group = map(int, the("USER").split(":"))
    security = pod()["securityContext"]
    assert (security["runAsUser"], security["runAsGroup"]) == (user, group)
    assert security["fsGroup"] == group and security["runAsNonRoot"]
    assert pod()["terminationGracePeriodSeconds"] > Config().server.drain_seconds
    assert container()["args"] == ["serve"]
    variables = {entry["name"]: entry["value"] for entry in container()["env"]}
    assert set(variables) <= SETTINGS
    # The root of a volume belongs to root, and a home has to be the user's own.
    mounts = {mount["mountPath"]: mount["name"] for mount in container()["volumeMounts"]}
    assert variables["PINAIVU_HOME"].startswith(f"{HOME}/") and HOME in mounts
    (claim,) = manifest("StatefulSet")["spec"]["volumeClaimTemplates"]
    assert mounts[HOME] == claim["metadata"]["name"]
    assert container()["securityContext"]["readOnlyRootFilesystem"]  # it runs from the image


def test_the_service_of_the_pod_sets_none_of_our_settings() -> None:
    """Kubernetes puts the address of a service `pinaivu` into PINAIVU_PORT, unless it is told not
    to."""
    service = manifest("Service")
    assert f"{service['metadata']['name'].upper()}_PORT" in ENVIRONMENT
    assert pod()["enableServiceLinks"] is False
    labels = manifest("StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
