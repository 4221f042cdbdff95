"""The manifests, the image and the batch script fit together, and fit what the package does.

`scripts/check_manifests.py` holds the manifests against KubeRay's own schemas.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import latentcache
from latentcache.engine.run import GRACE_S

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "infra" / "kuberay"
DOCKERFILE = (ROOT / "infra/docker/Dockerfile").read_text()
SBATCH = ROOT / "infra/slurm/latentcache.sbatch"
README = (ROOT / "infra/README.md").read_text()


def read(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERAY / name).read_text()))


MANIFESTS = [tree for path in KUBERAY.glob("*job.yaml") for tree in read(path.name)]
MANIFESTS += read("account.yaml")
(RAY_JOB,) = read("rayjob.yaml")
(RAY_CRON_JOB,) = read("raycronjob.yaml")
CLUSTER = RAY_JOB["spec"]["rayClusterSpec"]
HEAD = CLUSTER["headGroupSpec"]["template"]["spec"]
(WORKERS,) = CLUSTER["workerGroupSpecs"]
WORKER = WORKERS["template"]["spec"]


def nodes_of(tree: Any) -> list[dict[str, Any]]:
    """Every mapping in a manifest."""
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    actual = [node for child in children for node in nodes_of(child)]
    return [tree, *actual] if isinstance(tree, dict) else actual


def named(kind: str) -> set[str]:
    return {tree["metadata"].get("name") for tree in MANIFESTS if tree["kind"] == kind}


def constraint(package: str) -> str:
    actual = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert actual
    return actual[1]


def test_the_cron_job_and_the_job_have_the_same_spec():
    assert RAY_CRON_JOB["spec"]["jobTemplate"] == RAY_JOB["spec"]
    (cron,) = [tree for tree in read("cronjob.yaml") if tree["kind"] == "CronJob"]
    assert cron["spec"]["schedule"] == RAY_CRON_JOB["spec"]["schedule"]
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert "--from-file=infra/kuberay/rayjob.yaml" in README
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["create", "--filename=/etc/latentcache/rayjob.yaml"]
    assert "generateName" in RAY_JOB["metadata"]  # or tomorrow's would be refused


def test_the_scheduler_role_may_only_create_ray_jobs():
    (role,) = [tree for tree in MANIFESTS if tree["kind"] == "Role"]
    rule = {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}
    assert role["rules"] == [rule]


def test_manifests_reference_only_existing_objects():
    nodes = [node for tree in MANIFESTS for node in nodes_of(tree)]
    accounts = {node["serviceAccountName"] for node in nodes if "serviceAccountName" in node}
    assert accounts == named("ServiceAccount")
    (binding,) = [tree for tree in MANIFESTS if tree["kind"] == "RoleBinding"]
    assert {binding["roleRef"]["name"]} == named("Role")
    assert {subject["name"] for subject in binding["subjects"]} <= named("ServiceAccount")
    for kind, key in (("configmap", "configMap"), ("secret generic", "secretRef")):
        for name in {node[key]["name"] for node in nodes if key in node}:
            assert f"kubectl create {kind} {name} " in README


def test_manifests_contain_no_secrets():
    nodes = [node for tree in MANIFESTS for node in nodes_of(tree)]
    entries = [node for node in nodes if node.keys() == {"name", "value"}]
    assert entries
    for entry in entries:
        assert not re.search("KEY|SECRET|TOKEN|PASSWORD", entry["name"]), entry


def test_the_config_matches_the_resources_of_the_workers():
    compute = latentcache.load_config(KUBERAY / "config.yaml").compute
    (worker,) = WORKER["containers"]
    limits = worker["resources"]["limits"]
    assert limits == worker["resources"]["requests"]
    assert compute.num_gpus == WORKERS["maxReplicas"] * int(limits["nvidia.com/gpu"])
    assert compute.decode_threads == int(limits["cpu"])
    assert (WORKERS["minReplicas"], CLUSTER["enableInTreeAutoscaling"]) == (0, True)
    assert compute.wait_for_gpus_s  # as there is none to begin with
    assert compute.on_busy == "skip"
    (mount,) = HEAD["containers"][0]["volumeMounts"]
    assert shlex.split(RAY_JOB["spec"]["entrypoint"])[2] == f"{mount['mountPath']}/config.yaml"


def test_all_pods_use_one_image_and_no_root():
    images = {spec["containers"][0]["image"] for spec in (HEAD, WORKER)}
    assert images == {f"registry.example.com/latentcache:{latentcache.__version__}"}
    assert images.pop() in README
    assert CLUSTER["rayVersion"] == constraint("ray")
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    assert f"--uid {user} " in DOCKERFILE
    for spec in (HEAD, WORKER):
        assert spec["securityContext"]["runAsUser"] == int(user) > 0
        assert spec["securityContext"]["runAsNonRoot"]
        (container,) = spec["containers"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert re.search(r"^ARG BASE=\S+:\d+\.\d+\.\d+-base-ubuntu\d+\.\d+$", DOCKERFILE, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) == {"${BASE}"}
    assert "--constraint constraints.txt" in DOCKERFILE


def test_the_build_context_has_every_copied_file():
    ignored = (ROOT / "infra/docker/Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)


def test_grace_periods_exceed_the_time_of_a_stop():
    environment = {entry["name"]: entry.get("value") for entry in HEAD["containers"][0]["env"]}
    wait_s = int(environment["RAY_JOB_STOP_WAIT_TIME_S"])
    assert GRACE_S < wait_s < HEAD["terminationGracePeriodSeconds"]
    actual = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", SBATCH.read_text(), re.MULTILINE)
    assert actual
    assert int(actual[1]) > GRACE_S
    assert f"RAY_JOB_STOP_WAIT_TIME_S={wait_s}" in README
    assert f"get {GRACE_S:.0f} s" in README


def test_ray_auth_is_explicit_wherever_ray_starts():
    assert CLUSTER["authOptions"]["mode"] == "token"
    assert "export RAY_AUTH_MODE=token\n" in SBATCH.read_text()


@pytest.mark.parametrize("path", ["infra/slurm/latentcache.sbatch", "scripts/try_slurm.sh"])
def test_shell_scripts_parse(path: str):
    subprocess.run(["bash", "-n", ROOT / path], check=True)


def test_every_path_in_the_infra_readme_exists():
    for path in re.findall(r"\b(?:infra|pipelines|configs)/[\w./-]*\w", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / "infra" / path).exists(), path
