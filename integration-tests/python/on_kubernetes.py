"""The deployment on Kubernetes: applied, ready, asked through its Service, and rolled out anew under load without a failed request.

`on_kubernetes.py FOLDER PROGRAMS`, as the command of `deploy/kubernetes/cluster run FOLDER`; `deploy/run test-kubernetes` calls it.
PROGRAMS is the folder of Baton's. Needs BATON_TEST_KUBECTL, BATON_TEST_HELM and BATON_TEST_MODEL, a GGUF. With BATON_TEST_EARLIER_BUILD,
a folder of an earlier build's programs, that is what Helm's upgrade begins with. Prints what it saw, the load as JSON.
"""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import ssl
import subprocess
import sys
import time

import httpx2 as httpx
import openai
import yaml

FOLDER, PROGRAMS = map(pathlib.Path, sys.argv[1:])
ROOT = pathlib.Path(__file__).resolve().parents[2]
KUBECTL, HELM = os.environ["BATON_TEST_KUBECTL"], os.environ["BATON_TEST_HELM"]
MODEL = pathlib.Path(os.environ["BATON_TEST_MODEL"])
EARLIER = os.environ.get("BATON_TEST_EARLIER_BUILD")
# As whom images run.
USER = 65532
# Seconds: what pods may take to be ready, and to end, of which this kubelet may hear a minute late; and what changed Secrets may
# take to be in pods, and to be seen there.
READY_WITHIN, GONE_WITHIN, RENEWED_WITHIN = 300, 180, 240
MEMBERS = 3
SERVICES = [f"baton-{it}" for it in ["controller", "coordinator", "server"]]
DEPLOYMENTS = [f"deployment/{it}" for it in SERVICES]


def run(*command, timeout=120, **options):
    done = subprocess.run([str(it) for it in command], capture_output=True, text=True, timeout=timeout, **options)
    assert done.returncode == 0, f"{command} has failed: {done.stdout}{done.stderr}"
    return done.stdout


def kubectl(*arguments, **options):
    return run(KUBECTL, *arguments, **options)


def got(namespace, kind):
    return json.loads(kubectl("get", "-n", namespace, kind, "-o", "json"))["items"]


def ctr(*arguments):
    return run("ctr", "--address", FOLDER / "containerd.sock", "--namespace", "k8s.io", *arguments)


def apply(*documents):
    kubectl("apply", "-f", "-", input=yaml.safe_dump_all(documents))


def log(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def until(what, holds, within):
    """Waits until it holds; for how long it did not."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < within, f"in vain: {what}"
        time.sleep(0.5)
    return time.monotonic() - begun


# What is put into the cluster ----------------------------------------------------------------------------------------


def bring_images():
    images = FOLDER / "images"
    builds = [("test", PROGRAMS, [])]
    if EARLIER:
        builds.append(("earlier", EARLIER, ["controller", "coordinator", "server"]))
    for tag, programs, which in builds:
        run(ROOT / "deploy/images/build", "--out", images, "--tag", tag, "--programs", programs, *which, timeout=600)
        for image in sorted(images.iterdir()):
            ctr("images", "import", image)
        shutil.rmtree(images)


def volume(name, namespace, claim, mode):
    """A folder of this machine, for this claim and no other."""
    folder = FOLDER / "volumes" / name
    folder.mkdir(parents=True)
    os.chown(folder, USER, USER)
    apply({
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name},
        "spec": {
            "accessModes": [mode], "capacity": {"storage": "8Gi"}, "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": {"path": str(folder)}, "claimRef": {"namespace": namespace, "name": claim},
        },
    })
    return folder


def bring_volumes(namespace):
    """Those of etcd."""
    for member in range(MEMBERS):
        volume(f"{namespace}-etcd-{member}", namespace, f"data-baton-etcd-{member}", "ReadWriteOnce")


def bring_model(namespace):
    folder = volume(f"models-{namespace}", namespace, "baton-models", "ReadOnlyMany")
    shutil.copy(MODEL, folder / "model.gguf")
    (folder / "model.gguf").chmod(0o444)
    apply({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "baton-models", "namespace": namespace},
        "spec": {"accessModes": ["ReadOnlyMany"], "resources": {"requests": {"storage": "1Gi"}}},
    })


def bring_secrets(namespace, *what):
    """Returns the authority of the entry, if it has one, and the API key."""
    folder = FOLDER / f"certificates-{namespace}"
    made = run(ROOT / "deploy/kubernetes/secrets", "--namespace", namespace, "--folder", folder, *what)
    kubectl("apply", "-f", "-", input=made)
    return folder / "ca.crt", (folder / "api-key").read_text()


def smaller(kind, name, cpu, memory, *settings):
    """What a model of a hundredth of the size asks for; and what is set, as arguments."""
    patch = [
        {"op": "replace", "path": "/spec/template/spec/containers/0/resources",
         "value": {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": "1Gi"}}},
    ]
    patch += [{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": f"--set={it}"} for it in settings]
    return {"target": {"kind": kind, "name": name}, "patch": json.dumps(patch)}


def kustomize(namespace, base, images, *patches, components=()):
    """Applies deploy/kubernetes/BASE, with these components and patches."""
    folder = FOLDER / f"kustomization-{namespace}"
    folder.mkdir(exist_ok=True)
    there = lambda path: os.path.relpath(ROOT / "deploy/kubernetes" / path, folder.resolve())
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({
        "namespace": namespace,
        "resources": [there(base)],
        "components": [there(f"components/{it}") for it in [*components, "kubernetes-1.20"]],
        "images": [{"name": name, "newTag": "test"} for name in images],
        "configMapGenerator": [{"name": "baton", "behavior": "merge", "literals": ["model=/models/model.gguf"]}],
        "patches": list(patches),
    }))
    kubectl("apply", "-k", folder)


# What becomes of it --------------------------------------------------------------------------------------------------


def rolled_out(namespace, workload):
    """Waits until all its pods are new and ready, and the old ones gone."""
    kubectl("rollout", "status", "-n", namespace, workload, f"--timeout={READY_WITHIN}s", timeout=READY_WITHIN + 30)
    ended = lambda: not any("deletionTimestamp" in pod["metadata"] for pod in pods_of(namespace, workload.split("/")[1]))
    until(f"the pods of before {workload} was rolled out end", ended, GONE_WITHIN)


def pods_of(namespace, app):
    return [pod for pod in got(namespace, "pods") if pod["metadata"]["labels"]["app.kubernetes.io/name"] == app]


def all_ready(namespace, count):
    """Whether there are as many pods, each of them ready."""
    pods = got(namespace, "pods")
    ready = lambda pod: any(it["type"] == "Ready" and it["status"] == "True" for it in pod["status"].get("conditions", []))
    return len(pods) == count and all(map(ready, pods))


def restarts(namespace):
    return {pod["metadata"]["name"]: it["restartCount"]
            for pod in got(namespace, "pods") for it in pod["status"].get("containerStatuses", []) if it["restartCount"]}


def until_logged(namespace, pods, level):
    """Waits until each pod's log says that this is what it tells from now on. That is said whatever it tells."""
    left = set(pods)

    def said(pod):
        lines = kubectl("logs", "-n", namespace, pod, "--since=10m").splitlines()
        changes = [json.loads(line) for line in lines if "the log's level has changed" in line]
        return bool(changes) and changes[-1]["now"] == level

    def all_have():
        left.difference_update([pod for pod in left if said(pod)])
        return not left

    until(f"the level {level} in every log", all_have, RENEWED_WITHIN)


def kill(namespace, app):
    """Kills the process of one pod, as a crash would; its name."""
    pod = pods_of(namespace, app)[0]
    ctr("tasks", "kill", "--signal", "SIGKILL", pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://"))
    return pod["metadata"]["name"]


class Load:
    """load.py, which tells what became of its requests since it was last asked."""

    def __init__(self, *arguments):
        command = [sys.executable, pathlib.Path(__file__).with_name("load.py"), *arguments]
        self.process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "loading\n", "no load"

    def told(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self):
        told, _ = self.process.communicate(timeout=300)
        return json.loads(told)

    @contextlib.contextmanager
    def during(self, what, seen):
        """Keeps what the load tells of the meantime, and of a few seconds after it."""
        begun = time.monotonic()
        yield
        took = time.monotonic() - begun
        time.sleep(3)
        seen[what] = {"took_s": took, **self.told()}
        log(f"{what}: {rounded(seen[what])}")


def shown(host, authority):
    """The certificate that one connection is shown."""
    context = ssl.create_default_context(cafile=authority)
    with socket.create_connection((host, 443), timeout=10) as plain, context.wrap_socket(plain, server_hostname=host) as connection:
        return connection.getpeercert(binary_form=True)


def client_of(url, key, **options):
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, http_client=httpx.Client(trust_env=False, **options))


def rounded(told):
    return json.dumps({key: round(value, 1) if isinstance(value, float) else value for key, value in told.items()})


def ask(client, model, **more):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": "How does bread rise?"}], **more)


# The two deployments ----------------------------------------------------------------------------------------------------


def apply_multi_node(namespace, *settings, components=()):
    """These settings are the controller's."""
    kustomize(
        namespace, "multi-node", ["baton-controller", "baton-coordinator", "baton-server", "baton-etcd"],
        smaller("StatefulSet", "baton-etcd", "250m", "64Mi"),
        smaller("Deployment", "baton-controller", "100m", "64Mi", *settings),
        # Prompts are short: decode would compute them, and nothing be handed over.
        smaller("Deployment", "baton-coordinator", "100m", "128Mi", "placement.local_prefill_tokens=0"),
        smaller("Deployment", "baton-server", "100m", "256Mi", "runtime.kv_cache_bytes=67108864"),
        components=components,
    )


def multi_node():
    namespace = "baton"
    kubectl("create", "namespace", namespace)
    bring_model(namespace)
    bring_volumes(namespace)
    authority, key = bring_secrets(namespace)
    begun = time.monotonic()
    apply_multi_node(namespace)
    until("all pods of several nodes are ready", lambda: all_ready(namespace, 11), READY_WITHIN)
    log(f"several nodes: 11 pods are ready after {time.monotonic() - begun:.1f} s; restarted: {restarts(namespace)}")

    host = f"baton.{namespace}.svc.cluster.local"
    url = f"https://{host}/v1"
    client = client_of(url, key, verify=str(authority))
    model = client.models.list().data[0].id
    said = ask(client, model, max_tokens=24, temperature=0).choices[0].message.content
    log(f"the Service answers: {said!r}")
    assert said
    refused = httpx.get(f"{url}/models", verify=str(authority), trust_env=False)
    assert refused.status_code == 401, f"without an API key: {refused.status_code}"

    for member in range(MEMBERS):
        kubectl("exec", "-n", namespace, f"baton-etcd-{member}", "--", "etcdctl", "endpoint", "health")
        kubectl("exec", "-n", namespace, f"baton-etcd-{member}", "--", "etcdctl", "alarm", "list")

    load, seen = Load(url, model, authority, key), {}
    with load.during("nothing", seen):
        time.sleep(20)
    for workload in [*DEPLOYMENTS, "statefulset/baton-etcd"]:
        with load.during(f"rollout of {workload}", seen):
            kubectl("rollout", "restart", "-n", namespace, workload)
            rolled_out(namespace, workload)
    with load.during("rollout of all Deployments at once", seen):
        kubectl("rollout", "restart", "-n", namespace, *DEPLOYMENTS)
        for workload in DEPLOYMENTS:
            rolled_out(namespace, workload)
    with load.during("renewal of certificates and handoff secret", seen):
        bring_secrets(namespace, "--renew", "tls", "https", "handoff")
        new = ssl.PEM_cert_to_DER_cert((FOLDER / f"certificates-{namespace}/host-https.crt").read_text())
        # Of several connections some go to each coordinator.
        until("the new certificate is shown", lambda: all(shown(host, authority) == new for _ in range(10)), RENEWED_WITHIN)
    with load.during("another level of the log, and back", seen):
        services = [pod["metadata"]["name"] for app in SERVICES for pod in pods_of(namespace, app)]
        kubectl("create", "configmap", "baton-log", "-n", namespace, "--from-literal=level=warn")
        until_logged(namespace, services, "warn")
        kubectl("delete", "configmap", "baton-log", "-n", namespace)
        until_logged(namespace, services, "info")
    with load.during("scaling by the controller", seen):
        # As README.md has it: else `replicas`, which is left out from now on, would be 1 for a moment.
        edit = os.environ | {"KUBE_EDITOR": "sed -i /replicas:/d"}
        kubectl("apply", "edit-last-applied", "-n", namespace, "deployment/baton-server", env=edit)
        for count in [5, 3]:
            scaled = f'kubernetes.groups.default={{deployment="baton-server",min={count},max={count}}}'
            hurried = ["kubernetes.every=2s", "kubernetes.stabilisation=15s"]
            apply_multi_node(namespace, scaled, *hurried, components=["controller-scaling"])
            rolled_out(namespace, "deployment/baton-controller")
            until(f"there are {count} servers", lambda: all_ready(namespace, 7 + count), READY_WITHIN)
            log(f"the controller has scaled to {count} servers")
    rolled, count = restarts(namespace), 7 + 3
    for app in ["baton-server", "baton-coordinator", "baton-controller", "baton-etcd"]:
        with load.during(f"death of a {app}", seen):
            killed = kill(namespace, app)
            until(f"{killed} is started again", lambda: killed in restarts(namespace) and all_ready(namespace, count), READY_WITHIN)
    seen["end"] = load.end()
    log(f"end: {rounded(seen['end'])}")

    for what, told in seen.items():
        assert told["failed"] == [] and told["wrong"] == [], f"{what}: {told}"
    # Nobody who asked while something was rolled out had to ask twice, but for whom a death cut off.
    asked_again = {what: told["again"] for what, told in seen.items() if told["again"] and not what.startswith("death")}
    assert asked_again == {}, asked_again
    assert seen["end"]["ended"] == 6, seen["end"]
    assert rolled == {}, f"these were started again without having been killed: {rolled}"
    log(f"several nodes: {sum(told['requests'] for told in seen.values())} requests, none failed")
    kubectl("delete", "namespace", namespace, "--wait=false")
    until("the pods of several nodes are gone", lambda: not got(namespace, "pods"), GONE_WITHIN)


def single_node():
    namespace = "single"
    kubectl("create", "namespace", namespace)
    bring_model(namespace)
    _, key = bring_secrets(namespace, "api-keys")
    begun = time.monotonic()
    kustomize(
        namespace, "single-node", ["baton"],
        smaller("Deployment", "baton", "500m", "512Mi", "server.runtime.kv_cache_bytes=67108864"),
    )
    until("a single node is ready", lambda: all_ready(namespace, 1), READY_WITHIN)
    log(f"a single node: its pod is ready after {time.monotonic() - begun:.1f} s")

    url = f"http://baton.{namespace}.svc.cluster.local/v1"
    client = client_of(url, key)
    model = client.models.list().data[0].id
    said = ask(client, model, max_tokens=24, temperature=0).choices[0].message.content
    assert said

    # What is being answered when it is rolled out is answered; the next one is served once the next pod is ready.
    stream = ask(client, model, max_tokens=96, stream=True, extra_body={"ignore_eos": True})
    pieces = [next(iter(stream))]
    kubectl("rollout", "restart", "-n", namespace, "deployment/baton")
    begun = time.monotonic()
    pieces += list(stream)
    assert pieces[-1].choices[0].finish_reason == "length", pieces[-1]
    rolled_out(namespace, "deployment/baton")
    took = time.monotonic() - begun
    assert ask(client, model, max_tokens=24, temperature=0).choices[0].message.content == said
    assert restarts(namespace) == {}
    log(f"a single node: the answer in progress was ended, and the next pod was ready after {took:.1f} s")


def by_helm():
    namespace, values = "by-helm", FOLDER / "values.yaml"
    kubectl("create", "namespace", namespace)
    bring_model(namespace)
    _, key = bring_secrets(namespace, "api-keys")
    values.write_text(yaml.safe_dump({
        "mode": "singleNode",
        "images": {"tag": "test"},
        "model": {"path": "/models/model.gguf"},
        "singleNode": {
            "settings": ["server.runtime.kv_cache_bytes=67108864"],
            "container": {"resources": {
                "requests": {"cpu": "500m", "memory": "512Mi", "ephemeral-storage": "64Mi"}, "limits": {"memory": "1Gi"},
            }},
        },
    }))
    chart = ["baton", ROOT / "deploy/kubernetes/chart", "--namespace", namespace, "--values", values, "--wait"]
    begun = time.monotonic()
    run(HELM, "install", *chart, timeout=READY_WITHIN)
    client = client_of(f"http://baton.{namespace}.svc.cluster.local/v1", key)
    model = client.models.list().data[0].id
    said = ask(client, model, max_tokens=24, temperature=0).choices[0].message.content
    assert said
    log(f"by Helm: a single node has answered after {time.monotonic() - begun:.1f} s")
    begun = time.monotonic()
    run(HELM, "upgrade", *chart, "--set", "singleNode.decode=2", timeout=READY_WITHIN)
    rolled_out(namespace, "deployment/baton")
    assert ask(client, model, max_tokens=24, temperature=0).choices[0].message.content == said
    log(f"by Helm: upgraded to two decode servers, and has answered after {time.monotonic() - begun:.1f} s")
    run(HELM, "uninstall", "baton", "--namespace", namespace)
    until("nothing is left of it", lambda: not any(got(namespace, "pods,deployments,services,networkpolicies")), GONE_WITHIN)


def upgraded_by_helm():
    """Several nodes, of an earlier build if there is one, and all three services replaced at once, as `helm upgrade` does it."""
    namespace, values = "upgraded", FOLDER / "upgraded.yaml"
    kubectl("create", "namespace", namespace)
    bring_model(namespace)
    bring_volumes(namespace)
    authority, key = bring_secrets(namespace)
    asks = lambda cpu, memory: {"resources": {
        "requests": {"cpu": cpu, "memory": memory, "ephemeral-storage": "64Mi"}, "limits": {"memory": "1Gi"},
    }}
    values.write_text(yaml.safe_dump({
        "images": {"tag": "earlier" if EARLIER else "test"},
        "model": {"path": "/models/model.gguf"},
        "controller": {"container": asks("100m", "64Mi")},
        "coordinator": {"container": asks("100m", "128Mi")},
        "server": {"container": asks("100m", "256Mi"), "settings": ["runtime.kv_cache_bytes=67108864"]},
        "etcd": {"image": "baton-etcd:test", "container": asks("100m", "64Mi")},
    }))
    chart = ["baton", ROOT / "deploy/kubernetes/chart", "--namespace", namespace, "--values", values]
    run(HELM, "install", *chart)
    until("all pods of Helm's several nodes are ready", lambda: all_ready(namespace, 11), READY_WITHIN)
    url = f"https://baton.{namespace}.svc.cluster.local/v1"
    model = client_of(url, key, verify=str(authority)).models.list().data[0].id
    load, seen = Load(url, model, authority, key), {}
    with load.during("helm upgrade to this build" if EARLIER else "helm upgrade", seen):
        # A setting of each, so that all pods are made anew where the image is the same.
        again = [f"--set={it}.annotations.again=yes" for it in ["controller", "coordinator", "server"]]
        run(HELM, "upgrade", *chart, "--set", "images.tag=test", *again)
        for workload in DEPLOYMENTS:
            rolled_out(namespace, workload)
    seen["end"] = load.end()
    for what, told in seen.items():
        assert (told["failed"], told["wrong"], told["again"]) == ([], [], 0), f"{what}: {told}"
    assert seen["end"]["ended"] == 6 and restarts(namespace) == {}, f"{seen['end']} {restarts(namespace)}"
    run(HELM, "uninstall", "baton", "--namespace", namespace)
    until("the pods of Helm's several nodes are gone", lambda: not got(namespace, "pods"), GONE_WITHIN)


def main():
    begun = time.monotonic()
    until("the node is ready", lambda: any(
        it["type"] == "Ready" and it["status"] == "True" for node in got("default", "nodes") for it in node["status"]["conditions"]
    ), READY_WITHIN)
    bring_images()
    log(f"the node is ready and has the images after {time.monotonic() - begun:.1f} s")
    multi_node()
    single_node()
    by_helm()
    upgraded_by_helm()


try:
    main()
except BaseException:
    for namespace in ["baton", "single", "by-helm", "upgraded"]:
        for arguments in [["get", "pods", "-o", "wide"], ["get", "events", "--sort-by=.lastTimestamp"]]:
            subprocess.run([KUBECTL, *arguments, "-n", namespace], timeout=60)
    logs = sorted(pathlib.Path("/var/log/pods").glob("*/*/*.log"))
    for path in logs:
        print(f"== {path}", *path.read_text(errors="replace").splitlines()[-30:], sep="\n")
    raise
