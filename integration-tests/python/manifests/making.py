"""What kustomize and Helm make of deploy/kubernetes, and what is in it."""

import functools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap

import yaml

PROGRAMS = pathlib.Path(sys.argv[1])
KUBERNETES = pathlib.Path(__file__).resolve().parents[3] / "deploy/kubernetes"
CHART = KUBERNETES / "chart"


def run(*command, **options):
    return subprocess.run([str(it) for it in command], capture_output=True, text=True, timeout=120, **options)


def output(*command, **options):
    done = run(*command, **options)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def kustomize(folder):
    return list(yaml.safe_load_all(output(os.environ["BATON_TEST_KUBECTL"], "kustomize", folder)))


def made_by(kustomization):
    """What a kustomization makes that names what it takes as seen from the top of the repository."""
    with tempfile.TemporaryDirectory() as folder:
        there = lambda path: os.path.relpath(KUBERNETES / "../.." / path, os.path.realpath(folder))
        taken = {key: [there(it) for it in kustomization.get(key, [])] for key in ("resources", "components")}
        (pathlib.Path(folder) / "kustomization.yaml").write_text(json.dumps({**kustomization, **taken}))
        return kustomize(folder)


def composed(*components, base="multi-node", **more):
    """What a kustomization of these components makes of the base."""
    parts = [f"deploy/kubernetes/components/{it}" for it in components]
    return made_by({"namespace": "baton", "resources": [f"deploy/kubernetes/{base}"], "components": parts, **more})


def blocks_of_readme():
    return [yaml.safe_load(it) for it in re.findall("^```yaml\n(.*?)^```", (KUBERNETES / "README.md").read_text(), re.M | re.S)]


def indented_of_readme():
    """Those that belong to an entry of a list: values, and patches."""
    blocks = re.findall("^ +```yaml\n(.*?)^ +```", (KUBERNETES / "README.md").read_text(), re.M | re.S)
    return [yaml.safe_load(textwrap.dedent(it)) for it in blocks]


def of_readme():
    """The kustomizations in README.md: one of multi-node, one of single node with HTTPS."""
    return [it for it in blocks_of_readme() if "resources" in it]


@functools.cache
def commands_of_readme():
    """All commands in README.md, each on one line."""
    blocks = re.findall("^ *```sh\n(.*?)^ *```", (KUBERNETES / "README.md").read_text(), re.M | re.S)
    return [it.strip() for it in re.sub(r"(\\|\|)\n\s*", lambda found: found[1].strip("\\") + " ", "".join(blocks)).splitlines()]


def told_all(start):
    return [shlex.split(it, comments=True) for it in commands_of_readme() if it.startswith(start)]


def told(start, folder=None):
    """What the command in README.md that begins so prints; of one that makes an object, that object, which is made nowhere."""
    (line,) = [it.split(" | ")[0] for it in commands_of_readme() if it.startswith(start + " ")]
    program, *arguments = shlex.split(line, comments=True)
    if program == "kubectl":
        dry = [*arguments, "--dry-run=client", "-o", "json"]
        return json.loads(output(os.environ["BATON_TEST_KUBECTL"], *dry, cwd=folder))
    return output(KUBERNETES / "../.." / program, *arguments, cwd=folder)


def example(*names):
    """Values that the chart has as examples, as if each were given after the one before."""
    return [option for it in names for option in ("--values", CHART / f"examples/{it}.yaml")]


def helm(values={}, *options):
    command = [os.environ["BATON_TEST_HELM"], "template", "baton", CHART, "--namespace", "baton", "--values", "-", *options]
    return [it for it in yaml.safe_load_all(output(*command, input=json.dumps(values))) if it]


def by_name(objects):
    named = {(it["kind"], it["metadata"]["name"]): it for it in objects}
    assert len(named) == len(objects), "two objects of one kind have one name"
    return named


def workloads(objects):
    return [it for it in objects if it["kind"] in ("Deployment", "StatefulSet")]


def pod_of(workload):
    return workload["spec"]["template"]["spec"]


def labels_of(workload):
    return workload["spec"]["template"]["metadata"]["labels"]


def container_of(workload):
    (container,) = pod_of(workload)["containers"]
    return container


def ports_of(workload):
    return {it["name"]: it["containerPort"] for it in container_of(workload)["ports"]}
