"""Whether the image, the compose files and the Kubernetes manifest fit the box.  Nothing is built
here: tests/containers/run does that."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from pinaivu_box.cli.main import COMMANDS
from pinaivu_box.config import ENVIRONMENT, Config
from pinaivu_box.server.endpoints import ENDPOINTS
from tests.support.process_box import environment

BUILD = Path(__file__).parent.parent / "build"
HOME = "/var/lib/pinaivu"
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
    assert f"--uid {user} " in the("RUN") and f"--home-dir {HOME} " in the("RUN")
    assert the("VOLUME") == the("WORKDIR") == HOME
    assert signal.Signals[the("STOPSIGNAL")] is signal.SIGTERM
    variables = dict(
        pair.split("=") for name, value in instructions() if name == "ENV" for pair in value.split()
    )
    assert variables["PINAIVU_HOME"] == HOME and variables["PINAIVU_HOST"] == "0.0.0.0"
    ours = {name for name in variables if name.startswith("PINAIVU_")}
    assert ours <= SETTINGS
    assert the("EXPOSE").split() == [f"{PORT}/tcp", f"{PEERING_PORT}/udp"]


def test_the_image_has_the_executable_that_build_binary_makes() -> None:
    arguments = [value for name, value in instructions() if name == "ARG"]
    assert "EXECUTABLE=pinaivu" in arguments
    tasks = (BUILD / "tasks.py").read_text()
    assert 'name = f"pinaivu-{choice.kind}" if choice.kind else "pinaivu"' in tasks
    (cuda,) = compose("compose.cuda.yaml")
    assert cuda["build"]["args"]["EXECUTABLE"] == "pinaivu-cuda"


@contextmanager
def answering(status: bytes) -> Iterator[int]:
    """A port that answers one request with that first line."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                asked = b""
                while b"\r\n\r\n" not in asked:
                    asked += connection.recv(4096)
                connection.sendall(status)

        thread = threading.Thread(target=answer)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def healthy(port: int, tmp_path: Path) -> bool:
    """Whether the image's check finds a box at that port healthy; `pinaivu` fails there."""
    command = json.loads(the("HEALTHCHECK").partition("CMD ")[2])
    (tmp_path / "pinaivu").write_text('#!/bin/sh\n[ "$1" = ps ]\n')
    (tmp_path / "pinaivu").chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    env = environment(PINAIVU_PORT=str(port), PATH=path)
    return subprocess.run(command, env=env, capture_output=True, timeout=60).returncode == 0


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_image_is_healthy_when_the_box_is_ready(tmp_path: Path) -> None:
    assert "ps" in COMMANDS
    cases = {
        b"HTTP/1.1 200 \r\n\r\n": True,
        b"HTTP/1.1 503 \r\n\r\n": False,
        b"\x15\x03\x01\x00\x02\x02\x46": True,  # TLS: 'pinaivu ps' decides
    }
    for line, expected in cases.items():
        with answering(line) as port:
            assert healthy(port, tmp_path) is expected, line
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    assert not healthy(free, tmp_path)


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
    assert box["read_only"] and any("exec" in mount for mount in box["tmpfs"])


def test_compose_with_a_gpu_only_adds_to_that() -> None:
    plain, cuda = compose("compose.yaml", "compose.cuda.yaml")
    assert cuda.keys() - plain.keys() == {"deploy"}
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
    assert mounts["/tmp"] in {volume["name"] for volume in pod()["volumes"]}


def test_the_service_of_the_pod_sets_none_of_our_settings() -> None:
    """Kubernetes puts the address of a service `pinaivu` into PINAIVU_PORT, unless it is told not
    to."""
    service = manifest("Service")
    assert f"{service['metadata']['name'].upper()}_PORT" in ENVIRONMENT
    assert pod()["enableServiceLinks"] is False
    labels = manifest("StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
