"""Kustomize and Helm make the same, and what values say is in the pods."""

import json
import re

import yaml

from making import CHART, KUBERNETES, by_name, composed, container_of, example, helm, kustomize, made_by, of_readme, pod_of
from making import workloads
from monitoring import check_scraped
from schemas import OLD_VERSIONS, VERSIONS, check_valid


def neutral(objects):
    """Without what tells the two apart: Helm's own labels and checksum, kustomize's hashes in the names of ConfigMaps."""
    text = json.dumps(objects)
    for name in {it["metadata"]["name"] for it in objects if it["kind"] == "ConfigMap"}:
        text = text.replace(f'"{name}"', '"%s"' % re.sub("-[2456789bcdfghkmt]{10}$", "", name))
    for it in (objects := json.loads(text)):
        for label in ("helm.sh/chart", "app.kubernetes.io/managed-by"):
            it["metadata"].get("labels", {}).pop(label, None)
        if it["metadata"].get("labels") == {}:
            del it["metadata"]["labels"]
    for it in workloads(objects):
        it["spec"]["template"]["metadata"]["annotations"].pop("checksum/config", None)
    return by_name(objects)


def check_same(ours, theirs, what):
    ours, theirs = neutral(ours), neutral(theirs)
    assert ours.keys() == theirs.keys(), f"{what}: not in both: {sorted(ours.keys() ^ theirs.keys())}"
    for name, one in ours.items():
        other = theirs[name]
        assert one == other, f"{what}: {name} differs:\n{yaml.dump(one)}\n--- helm\n{yaml.dump(other)}"


def pools():
    affinity = lambda role: {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "baton/role", "operator": "In", "values": [role]}]}]}}}
    return {it: {"role": it, "replicas": 2, "pod": {"affinity": affinity(it)}} for it in ("prefill", "decode")}


ELSEWHERE = ["etcd-0.example:2379", "etcd-1.example:2379"]
# What each component is among the values.
SAME = {
    "autoscaling": {"autoscaling": {"enabled": True}},
    "controller-scaling": {"controllerScaling": {"enabled": True}},
    "role-pools": {"server": {"pools": pools()}},
    "model-init": {"model": {"init": {"image": "baton-model"}}},
    "prometheus": {"prometheus": {"enabled": True}},
}
# What it is among the examples of values.
EXAMPLES = {
    "ascend": ["ascend"],
    "ascend-a3": ["ascend", "ascend-a3"],
    "client-certificates": ["client-certificates"],
    "rdma": ["rdma"],
}
ONE = {"mode": "singleNode"}


def check_helm():
    check_same(kustomize(KUBERNETES / "multi-node"), helm(), "multi-node")
    check_same(kustomize(KUBERNETES / "single-node"), helm(ONE), "single-node")
    for component, values in SAME.items():
        check_same(composed(component), helm(values), component)
    for component, names in EXAMPLES.items():
        check_same(composed(component), helm({}, *example(*names)), component)
    for component in ("ascend", "ascend-a3"):
        ours = composed(component, base="single-node")
        check_same(ours, helm(ONE, *example(*EXAMPLES[component])), f"single-node, {component}")
    for component in ("model-init", "prometheus"):
        check_same(composed(component, base="single-node"), helm({**ONE, **SAME[component]}), f"single-node, {component}")
    # Its Service keeps port 80 by Helm.
    (https,) = [it for it in of_readme() if "single-node" in str(it["resources"])]
    ours = made_by({**https, "components": ["deploy/kubernetes/components/client-certificates"]})
    parts = [[it for it in one if it["kind"] != "Service"] for one in (ours, helm(ONE, *example("client-certificates")))]
    check_same(*parts, "single-node, client-certificates")
    known = {it.name for it in (CHART / "examples").iterdir()}
    assert known == {f"{it}.yaml" for names in EXAMPLES.values() for it in names}, known
    check_same(composed("autoscaling", "kubernetes-1.20"), helm(SAME["autoscaling"], "--kube-version", "1.20"), "1.20")
    for version in [OLD_VERSIONS[0], *VERSIONS]:
        everything = {**SAME["autoscaling"], **SAME["prometheus"], "certManager": {"enabled": True}}
        check_valid(helm(everything, "--kube-version", version), [version], since={})
    certified = {"certManager": {"enabled": True}}
    check_same(composed("cert-manager", "cert-manager-etcd"), helm(certified), "cert-manager")
    elsewhere = {"etcd": {"enabled": False, "endpoints": ELSEWHERE}}
    for components, values in ((["existing-etcd"], {}), (["existing-etcd", "cert-manager"], certified)):
        ours = composed(*components)
        (shared,) = [it for it in ours if it["metadata"]["name"].startswith("baton-") and "etcd-endpoints" in it.get("data", {})]
        shared["data"]["etcd-endpoints"] = ",".join(ELSEWHERE)
        check_same(ours, helm({**elsewhere, **values}), components)
    version = re.search('^version = "(.*)"', (KUBERNETES / "../../Cargo.toml").read_text(), re.M)[1]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == version, chart
    # What the schema does not know is refused.
    refused = [{"modes": "singleNode"}, {"mode": "many"}, {"server": {"replica": 1}}, {"etcd": {"enabled": False}}]
    refused += [{"model": {"path": "/m"}}, {"model": {"volume": {"nfs": {}, "hostPath": {}}}}]
    refused += [{"server": {"strategy": it}} for it in ({"maxSurge": 0}, {"type": "Recreate", "rollingUpdate": {"maxSurge": 0}})]
    for bad in [*refused, {"server": {"pools": {"all": {}}}}]:
        try:
            helm(bad)
        except AssertionError:
            continue
        raise AssertionError(f"the chart takes {bad}")


def made(values, name):
    (found,) = [it for it in workloads(helm(values)) if it["metadata"]["name"] == f"baton-{name}"]
    return found


def named(entries, key="name"):
    found = {it[key]: it for it in entries}
    assert len(found) == len(entries), f"two of one {key}: {entries}"
    return found


def check_values():
    """What values say is in the pods, and nothing else of them changes."""
    # Lists of named things: what is added is beside ours, in the place of ours if it has their name, in a pool, too.
    said = {
        "settings": ["runtime.kv_dtype=int8"],
        "container": {
            "env": [{"name": "BATON_LOG", "value": "debug"}, {"name": "MODEL", "value": "/models/mine"}],
            "volumeMounts": [{"name": "extra", "mountPath": "/extra"}, {"name": "models", "mountPath": "/models"}],
        },
        "pod": {
            "volumes": [{"name": "extra", "emptyDir": {}}, {"name": "cache", "emptyDir": {"sizeLimit": "1Gi"}}],
            "initContainers": [{"name": "more", "image": "more"}],
            "tolerations": [{"key": "npu", "operator": "Exists"}],
        },
    }
    pool = {"role": "prefill", "settings": ["limits.x=1"], "pod": {"tolerations": [{"key": "prefill", "operator": "Exists"}]}}
    brought = {"init": {"image": "fetcher", "volumeMounts": [{"name": "extra", "mountPath": "/extra"}]}}
    plain = made({}, "server")
    for values, name in ((said, "server"), ({**said, "pools": {"a": pool, "b": {"role": "mixed"}}}, "server-a")):
        it = made({"server": values, "model": brought}, name)
        ours, theirs = container_of(plain), container_of(it)
        env, old = named(theirs["env"]), named(ours["env"])
        assert env["BATON_LOG"] == said["container"]["env"][0] and env["MODEL"] == said["container"]["env"][1], env
        assert {key: env.get(key) for key in old if key != "MODEL"} == {key: old[key] for key in old if key != "MODEL"}, env
        assert ("BATON_SERVER__LABELS__ROLE" in env) == ("pools" in values), env
        mounts, old = named(theirs["volumeMounts"], "mountPath"), named(ours["volumeMounts"], "mountPath")
        assert mounts.keys() == {*old, "/extra"} and "readOnly" not in mounts["/models"], mounts
        volumes, old = named(pod_of(it)["volumes"]), named(pod_of(plain)["volumes"])
        assert volumes.keys() == {*old, "extra"} and volumes["etc"] == old["etc"], volumes
        assert volumes["cache"] == said["pod"]["volumes"][1] and "persistentVolumeClaim" not in volumes["models"], volumes
        init = named(pod_of(it)["initContainers"])
        assert init.keys() == {"model", "more"} and len(init["model"]["volumeMounts"]) == 2, init
        wanted = ["npu", "prefill"] if "pools" in values else ["npu"]
        assert [it["key"] for it in pod_of(it)["tolerations"]] == wanted, pod_of(it)["tolerations"]
        settings = said["settings"] + (pool["settings"] if "pools" in values else [])
        assert theirs["args"] == ours["args"] + [f"--set={it}" for it in settings], theirs["args"]
        check_valid([it], VERSIONS)

    # The model's volume is one, whatever it is.
    for volume in ({"nfs": {"server": "nfs.example", "path": "/models"}}, {"hostPath": {"path": "/srv/models"}}):
        for it in (made({"model": {"volume": volume}}, name) for name in ("coordinator", "server")):
            assert named(pod_of(it)["volumes"])["models"] == {"name": "models", **volume}, pod_of(it)["volumes"]
            check_valid([it], VERSIONS)

    # None is a number, too; each coordinator grants a part by the fewest that there are, unless the values say otherwise.
    for name in ("controller", "coordinator", "server"):
        assert made({name: {"replicas": 0}}, name)["spec"]["replicas"] == 0, name
    idle = {"replicas": 3, "pools": {"a": {"role": "mixed", "replicas": 0}}}
    assert made({"server": idle}, "server-a")["spec"]["replicas"] == 0
    parts = lambda values: [it.split("=")[2] for it in container_of(made(values, "coordinator"))["args"] if "coordinators=" in it]
    scaled = {"autoscaling": {"enabled": True, "min": 4}}
    assert parts({}) == [] and parts({"coordinator": {"replicas": 3}}) == ["3"] and parts(scaled) == ["4"], parts(scaled)
    assert parts({**scaled, "coordinator": {"settings": ["api_keys.coordinators=5"]}})[-1] == "5"

    # A strategy takes the place of ours, and a pool's that of all servers'.
    surge = lambda values, name: made({"server": values}, name)["spec"]["strategy"]
    none_to_spare, recreated = {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}, {"type": "Recreate"}
    of_pools = {"strategy": none_to_spare, "pools": {"a": {"role": "mixed"}, "b": {"role": "mixed", "strategy": recreated}}}
    assert surge({"strategy": recreated}, "server") == recreated
    for name, strategy in {"server-a": none_to_spare, "server-b": recreated}.items():
        assert surge(of_pools, name) == strategy, (name, surge(of_pools, name))

    # Each server of a single node is scraped, by whichever Prometheus asks for it.
    watched = {"prometheus": {"enabled": True, "labels": {"release": "monitoring"}}}
    for servers in ({"prefill": 3, "decode": 2}, {"prefill": 1, "decode": 0}):
        objects = helm({**ONE, **watched, "singleNode": servers})
        check_scraped(objects)
        (monitor,) = [it for it in objects if it["kind"] == "PodMonitor"]
        assert monitor["metadata"]["labels"]["release"] == "monitoring", monitor["metadata"]

    # New pods where what they are told has changed, and nowhere else.
    def sums(values):
        templates = {it["metadata"]["name"]: it["spec"]["template"] for it in workloads(helm(values))}
        return {name: it["metadata"]["annotations"].get("checksum/config") for name, it in templates.items()}

    def told(values):
        before, after = sums({}), sums(values)
        return {it for it in before if before[it] != after[it]}

    assert told({"model": {"path": "/models/other"}}) == {"baton-coordinator", "baton-server"}
    assert told({"etcd": {"endpoints": ELSEWHERE}}) == {"baton-coordinator", "baton-controller"}
    assert sums(ONE) != sums({**ONE, "singleNode": {"prefill": 2}}), "single node is not told"
