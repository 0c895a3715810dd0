"""examples/deploy: files that other programs read. Each is checked by its own program where that is installed, and against this project."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from qwen_export import __version__
from qwen_export.commands.serve import command
from tests.support.source_tree import ROOT, TREES
from tests.test_packaging import PROJECT

DEPLOY = ROOT / "examples" / "deploy"
UNITS = ("qwen-export.service", "qwen-export.socket")


def kubernetes() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))


def container() -> dict[str, Any]:
    (deployment,) = (document for document in kubernetes() if document["kind"] == "Deployment")
    return deployment["spec"]["template"]["spec"]["containers"][0]


def instructions() -> list[str]:
    """Of the Containerfile, one a line."""
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def entrypoint() -> list[str]:
    (line,) = (line for line in instructions() if line.startswith("ENTRYPOINT"))
    return yaml.safe_load(line.removeprefix("ENTRYPOINT"))


def exec_start() -> list[str]:
    text = (DEPLOY / UNITS[0]).read_text(encoding="utf-8")
    (words,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    return words.split()


# Against the command


@pytest.mark.parametrize("words", [exec_start(), entrypoint(), [*entrypoint(), *container()["args"]]], ids=["systemd", "container", "pod"])
def test_the_options_are_those_of_serve(words: list[str], tmp_path: Path) -> None:
    assert Path(words[0]).name == "qwen-export" and words[1] == "serve"
    keys = tmp_path / "keys"
    keys.write_text("a\n")
    given = [str(keys) if word.endswith("/keys") else word for word in words[2:]]
    context = command.make_context("serve", given)
    assert isinstance(context, click.Context) and context.params["bundle"] in (Path("/srv/qwen/bundle"), Path("/bundle"))


def test_waiting_is_longer_than_draining() -> None:
    drain = float(container()["args"][container()["args"].index("--drain") + 1])
    pod = next(document for document in kubernetes() if document["kind"] == "Deployment")["spec"]["template"]["spec"]
    wait = float(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > drain + wait
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", (DEPLOY / UNITS[0]).read_text(), re.MULTILINE)
    assert float(stop) > float(exec_start()[exec_start().index("--drain") + 1])


def test_the_pod_is_the_image_of_this_version_and_its_port() -> None:
    words = entrypoint()
    assert container()["image"].endswith(f":{__version__}")
    assert container()["ports"][0]["containerPort"] == int(words[words.index("--port") + 1])
    assert {mount["mountPath"] for mount in container()["volumeMounts"]} >= {words[2], "/tmp", "/keys"}


def test_the_image_is_built_of_what_packages_are_built_of() -> None:
    copied = {word for line in instructions() if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]}
    assert copied == {*PROJECT, *TREES}


def test_ray_finds_its_application() -> None:
    config = yaml.safe_load((DEPLOY / "ray_serve.yaml").read_text(encoding="utf-8"))
    (application,) = config["applications"]
    module, _, function = application["import_path"].partition(":")
    source = (DEPLOY / f"{module}.py").read_text(encoding="utf-8")
    assert f"def {function}(options: " in source
    assert all(f"    {name}: " in source for name in application["args"])
    assert config["http_options"]["host"] == "127.0.0.1"


# By their own programs


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_takes_the_units_and_finds_them_tight(tmp_path: Path) -> None:
    for name in UNITS:
        text = (DEPLOY / name).read_text(encoding="utf-8").replace("/opt/qwen-export/bin/qwen-export", sys.executable)
        (tmp_path / name).write_text(text)
    shutil.copytree(DEPLOY / "qwen-export.service.d", tmp_path / "qwen-export.service.d")
    verified = subprocess.run(["systemd-analyze", "verify", *UNITS], cwd=tmp_path, capture_output=True, text=True)
    assert verified.returncode == 0 and not verified.stderr, verified.stderr
    # 0 is best and 10 worst; the units of a distribution are between 5 and 9.
    (tmp_path / "qwen-export.service.d" / "gpu.conf").unlink()
    words = ["systemd-analyze", "security", "--offline=true", "--threshold=15", UNITS[0]]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True).returncode == 0


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint")
def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(["hadolint", str(DEPLOY / "Containerfile")], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout


@pytest.mark.skipif(importlib.util.find_spec("kubernetes_validate") is None, reason="no kubernetes-validate")
def test_kubernetes_knows_every_field() -> None:
    import kubernetes_validate

    for document in kubernetes():
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
