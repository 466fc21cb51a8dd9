"""deploy/kubernetes, offline: what kustomize and Helm make of it is valid, is one and the same, and fits the programs.

Called by tests/manifests.rs as `manifests.py FOLDER`, the folder of Baton's programs. `deploy/run test` brings kubectl and helm
(BATON_TEST_KUBECTL, BATON_TEST_HELM), and schemas of Kubernetes older than those of the package (BATON_TEST_KUBERNETES_SCHEMAS).
"""

import base64
import functools
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jsonschema
import kubernetes_validate
import referencing
import referencing.jsonschema
import yaml

PROGRAMS = pathlib.Path(sys.argv[1])
KUBERNETES = pathlib.Path(__file__).resolve().parents[2] / "deploy/kubernetes"
CHART = KUBERNETES / "chart"
SCHEMAS = [
    pathlib.Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema",
    pathlib.Path(os.environ["BATON_TEST_KUBERNETES_SCHEMAS"]),
]
VERSIONS = ["1.23", "1.25", "1.28", "1.31", "1.34", "1.37"]
OLD_VERSIONS = ["1.20", "1.22", "1.24"]


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


def composed(*components, base="multi-node"):
    """What a kustomization of these components makes of the base."""
    parts = [f"deploy/kubernetes/components/{it}" for it in components]
    return made_by({"namespace": "baton", "resources": [f"deploy/kubernetes/{base}"], "components": parts})


def of_readme():
    """What the kustomizations in README.md make: one of multi-node, one of single node."""
    blocks = re.findall("^```yaml\n(.*?)^```", (KUBERNETES / "README.md").read_text(), re.M | re.S)
    return [made_by(it) for it in map(yaml.safe_load, blocks) if "resources" in it]


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


# Kustomize and Helm ---------------------------------------------------------------------------------------------------


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
    "rdma": {"server": {
        "annotations": {"k8s.v1.cni.cncf.io/networks": "roce"},
        "settings": ['handoff.transports=["rdma","tcp"]'],
        "container": {
            "resources": {it: {"rdma/hca_shared_devices_a": 1} for it in ("requests", "limits")},
        },
    }},
}


def check_helm():
    check_same(kustomize(KUBERNETES / "multi-node"), helm(), "multi-node")
    check_same(kustomize(KUBERNETES / "single-node"), helm({"mode": "singleNode"}), "single-node")
    for component, values in SAME.items():
        check_same(composed(component), helm(values), component)
    check_same(composed("autoscaling", "kubernetes-1.20"), helm(SAME["autoscaling"], "--kube-version", "1.20"), "1.20")
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

    # New pods where what they are told has changed, and nowhere else.
    def sums(values):
        templates = {it["metadata"]["name"]: it["spec"]["template"] for it in workloads(helm(values))}
        return {name: it["metadata"]["annotations"].get("checksum/config") for name, it in templates.items()}

    def told(values):
        before, after = sums({}), sums(values)
        return {it for it in before if before[it] != after[it]}

    assert told({"model": {"path": "/models/other"}}) == {"baton-coordinator", "baton-server"}
    assert told({"etcd": {"endpoints": ELSEWHERE}}) == {"baton-coordinator", "baton-controller"}
    one = {"mode": "singleNode"}
    assert sums(one) != sums({**one, "singleNode": {"prefill": 2}}), "single node is not told"


# Schemas --------------------------------------------------------------------------------------------------------------


@functools.cache
def validator(version, api_version, kind):
    folder = next(it for it in (base / f"v{version}.0-local-strict" for base in SCHEMAS) if it.exists())
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)

    @functools.cache
    def read(uri):
        content = json.loads((folder / uri.rsplit("/", 1)[-1]).read_text())
        return referencing.Resource.from_contents(content, referencing.jsonschema.DRAFT202012)

    schema = read(f"{kind.lower()}-{group}.json").contents
    return jsonschema.Draft202012Validator(schema, registry=referencing.Registry(retrieve=read))


def check_valid(objects, versions):
    for version, it in itertools.product(versions, objects):
        if it["apiVersion"] == "cert-manager.io/v1":
            continue  # no part of Kubernetes: see check_certificates
        errors = list(validator(version, it["apiVersion"], it["kind"]).iter_errors(it))
        assert not errors, f"{it['kind']} {it['metadata']['name']} by {version}: {errors[0].json_path}: {errors[0].message}"


# What objects say of one another ---------------------------------------------------------------------------------------


def selects(selector, labels):
    return all(labels.get(key) == value for key, value in selector.items())


def check_references(objects, secrets):
    """Whatever is named is there, and whoever selects selects somebody. Returns the Secrets that pods ask for."""
    named, asked = by_name(objects), set()
    assert {it["metadata"]["namespace"] for it in objects} == {"baton"}

    def config(name, key):
        assert key in named["ConfigMap", name]["data"], f"ConfigMap {name} has no {key}"

    def secret(name, items):
        asked.add(name)
        for item in items:
            assert item["key"] in secrets[name], f"Secret {name} has no {item['key']}"

    for it in workloads(objects):
        pod, container, ports = pod_of(it), container_of(it), ports_of(it)
        assert selects(it["spec"]["selector"]["matchLabels"], labels_of(it)), it["metadata"]["name"]
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom", {}).get("configMapKeyRef"):
                config(reference["name"], reference["key"])
        for volume in pod["volumes"]:
            for source in volume.get("projected", {}).get("sources", []):
                if reference := source.get("configMap"):
                    reference.get("optional") or config(reference["name"], "config.toml")
                else:
                    needed = [] if source["secret"].get("optional") else source["secret"]["items"]
                    secret(source["secret"]["name"], needed)
            if "secret" in volume:
                secret(volume["secret"]["secretName"], [])
        claims = [claim["metadata"] for claim in it["spec"].get("volumeClaimTemplates", [])]
        volumes = {volume["name"] for volume in pod["volumes"] + claims}
        mounted = {mount["name"] for one in [container, *pod.get("initContainers", [])] for mount in one["volumeMounts"]}
        assert volumes == mounted, (it["metadata"]["name"], volumes, mounted)
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] in ports, (it["metadata"]["name"], probe)
        assert it["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(ports["metrics"])
        if account := pod.get("serviceAccountName"):
            assert ("ServiceAccount", account) in named
        assert pod["automountServiceAccountToken"] == bool(account), it["metadata"]["name"]
    for it in objects:
        selector = it.get("spec", {}).get("selector", {})
        if it["kind"] == "Service":
            pods = [one for one in workloads(objects) if selects(selector, labels_of(one))]
            assert pods, it["metadata"]["name"]
            for port, one in itertools.product(it["spec"]["ports"], pods):
                assert port["targetPort"] in ports_of(one), (it["metadata"]["name"], port)
        elif it["kind"] == "PodDisruptionBudget":
            (one,) = [one for one in workloads(objects) if selects(selector["matchLabels"], labels_of(one))]
            assert one["metadata"]["name"] == it["metadata"]["name"]
        elif it["kind"] == "HorizontalPodAutoscaler":
            assert "replicas" not in named["Deployment", it["spec"]["scaleTargetRef"]["name"]]["spec"]
        elif it["kind"] == "Role":
            (name,) = it["rules"][0]["resourceNames"]
            assert "replicas" not in named["Deployment", name]["spec"]
    return asked


def unrestricted(objects):
    """What the Pod Security profile `restricted` forbids, and what we forbid ourselves beyond it."""
    found = set()
    for it in workloads(objects):
        pod = pod_of(it)
        context = pod.get("securityContext", {})
        found |= {key for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)}
        allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
        found |= {key for volume in pod["volumes"] for key in volume.keys() - allowed - {"name"}}
        found |= {"sysctls"} & context.keys()
        for one in [*pod["containers"], *pod.get("initContainers", [])]:
            own = one.get("securityContext", {})
            of = {**context, **own}
            found |= {"privileged", "procMount"} & own.keys()
            found |= {"hostPort" for port in one.get("ports", []) if "hostPort" in port}
            found |= {"root"} if of.get("runAsNonRoot") is not True or of.get("runAsUser") == 0 else set()
            found |= set() if of.get("seccompProfile", {}).get("type") == "RuntimeDefault" else {"seccomp"}
            found |= set() if own.get("allowPrivilegeEscalation") is False else {"escalation"}
            found |= set() if own.get("readOnlyRootFilesystem") is True else {"writable"}
            capabilities = own.get("capabilities", {})
            found |= set(capabilities.get("add", [])) | (set() if capabilities.get("drop") == ["ALL"] else {"not dropped"})
    return found


OPERATOR = ("operator", {"baton/access": "operator"}, "baton")
STRANGER = ("stranger", {}, "elsewhere")
PROMETHEUS = ("prometheus", {}, "monitoring")


def flows(pairs):
    return {(source, target, port) for sources, target, port in pairs for source in sources}


# Who may reach which port of whom: everything else is dropped.
MULTI_NODE = flows([
    (["baton-server", "baton-coordinator", "operator"], "baton-controller", 7100),
    (["prometheus"], "baton-controller", 7101),
    # Clients are whoever comes from outside the cluster or another namespace; our own pods ask nobody there.
    (["operator", "stranger", "prometheus"], "baton-coordinator", 8000),
    (["operator"], "baton-coordinator", 8001),
    (["prometheus"], "baton-coordinator", 8002),
    (["baton-coordinator", "baton-server"], "baton-server", 7200),
    (["prometheus"], "baton-server", 7201),
    (["baton-server"], "baton-server", 7202),
    (["baton-controller", "baton-coordinator"], "baton-etcd", 2379),
    (["baton-etcd"], "baton-etcd", 2380),
    (["prometheus"], "baton-etcd", 2381),
])
SINGLE_NODE = flows([
    (["operator", "stranger", "prometheus"], "baton", 8000),
    (["prometheus"], "baton", 8002),
    (["prometheus"], "baton", 8003),
    (["prometheus"], "baton", 8004),
])


def check_network(objects, expected, *more):
    """Also by ports that no container names."""
    policies = [it["spec"] for it in objects if it["kind"] == "NetworkPolicy"]
    pods = [(it["metadata"]["name"], labels_of(it), "baton") for it in workloads(objects)]

    def peer(rule, key, labels, namespace):
        def one(it):
            own = namespace == "baton" if "namespaceSelector" not in it else selects(
                it["namespaceSelector"]["matchLabels"], {"kubernetes.io/metadata.name": namespace})
            return own and selects(it.get("podSelector", {}).get("matchLabels", {}), labels)

        return key not in rule or any(one(it) for it in rule[key])

    def allowed(direction, of, with_whom, port):
        name, labels, namespace = of
        mine = [it for it in policies if namespace == "baton" and selects(it["podSelector"]["matchLabels"], labels)]
        assert not namespace == "baton" or name == "operator" or mine, f"no policy is for {name}"
        assert all(sorted(it["policyTypes"]) == ["Egress", "Ingress"] for it in mine)
        key, peers = ("ingress", "from") if direction == "in" else ("egress", "to")
        rules = [rule for it in mine for rule in it[key]]
        return not mine or any(
            peer(rule, peers, *with_whom[1:]) and port in [it["port"] for it in rule.get("ports", [{"port": port}])] for rule in rules)

    seen = set()
    for target, workload in zip(pods, workloads(objects)):
        for source, port in itertools.product([*pods, OPERATOR, STRANGER, PROMETHEUS], [*ports_of(workload).values(), *more]):
            if allowed("in", target, source, port) and allowed("out", source, target, port):
                seen.add((source[0], target[0], port))
    assert seen == expected, f"too much: {sorted(seen - expected)}, too little: {sorted(expected - seen)}"


def check_ways_out(objects):
    """To what is no pod of ours: names, traces, and where models come from."""
    models_are_fetched = any("initContainers" in it["spec"]["template"]["spec"] for it in workloads(objects))
    for it in (it for it in objects if it["kind"] == "NetworkPolicy"):
        name, rules = it["metadata"]["name"], it["spec"]["egress"]
        anywhere = {port["port"] for rule in rules if "to" not in rule for port in rule["ports"]}
        monitoring = {port["port"] for rule in rules if "monitoring" in str(rule.get("to")) for port in rule["ports"]}
        assert 53 in anywhere, f"{name} finds nobody by name"
        assert name == "baton-etcd" or 4317 in monitoring, f"{name} can tell of no traces"
        fetches = models_are_fetched and name in ("baton", "baton-coordinator", "baton-server")
        assert (443 in anywhere) == (fetches or name == "baton-controller" and 6443 in anywhere), (name, anywhere)


# What the programs say of their configuration --------------------------------------------------------------------------

FIELDS = {"status.podIP": "10.1.2.3", "metadata.name": "baton-pod-5d4f7-x2x9z", "metadata.uid": "6c1b2f9e-1a2b", "requests.cpu": "4"}


def environment(objects, container):
    values = {}
    for it in container.get("env", []):
        of = it.get("valueFrom", {})
        if "configMapKeyRef" in of:
            name, key = of["configMapKeyRef"]["name"], of["configMapKeyRef"]["key"]
            values[it["name"]] = by_name(objects)["ConfigMap", name]["data"][key]
        elif of:
            values[it["name"]] = FIELDS[of.get("fieldRef", {}).get("fieldPath") or of["resourceFieldRef"]["resource"]]
        else:
            values[it["name"]] = expanded(it["value"], values)
    return values


def expanded(text, values):
    return re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], text)


def seconds(duration):
    return sum(float(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit]
               for number, unit in re.findall(r"([\d.]+)(ms|s|m|h)", duration))


def read(printed):
    """By dotted keys, of what --check-config prints, text without its quotes and numbers."""
    found, section = {}, ""
    for line in printed.splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
        elif match := re.fullmatch(r'(\w+) = "?(.*?)"?', line):
            found[section + match[1]] = match[2]
    return found


def checked(objects, workload, secrets):
    """What the pod's program says of the configuration that it would have, with its files in their places."""
    container = container_of(workload)
    values = environment(objects, container)
    with tempfile.TemporaryDirectory() as folder:
        moved, absent = lambda text: text.replace("/etc/baton/", folder + "/"), set()
        for source in [it for volume in pod_of(workload)["volumes"] for it in volume.get("projected", {}).get("sources", [])]:
            (of,) = source.values()
            if "secret" in source:
                held = secrets[of["name"]]
                data = {item["path"]: held[item["key"]] for item in of["items"] if item["key"] in held}
                absent |= {f"{folder}/{item['path']}" for item in of["items"] if item["path"] not in data}
                assert of.get("optional") or len(data) == len(of["items"]), of
            elif of.get("optional"):
                data = {item["path"]: "" for item in of["items"]}
            else:
                data = by_name(objects)["ConfigMap", of["name"]]["data"]
            for path, text in data.items():
                (pathlib.Path(folder) / path).parent.mkdir(exist_ok=True)
                (pathlib.Path(folder) / path).write_text(moved(text))
        arguments = [moved(expanded(it, values)) for it in container["args"]]
        done = run(PROGRAMS / f"baton-{container['name']}", *arguments, "--check-config", env={**os.environ, **values})
        for path in re.findall(rf'"({folder}/[^"]*)"', done.stdout):
            assert path in absent or os.path.exists(path), f"{workload['metadata']['name']}: no file is at {path}"
        done.stdout = done.stdout.replace(folder + "/", "/etc/baton/")
    return done


def check_configured(objects, secrets):
    for it in workloads(objects):
        container, pod, name = container_of(it), pod_of(it), it["metadata"]["name"]
        if container["name"] not in ("controller", "coordinator", "server"):
            continue
        done = checked(objects, it, secrets)
        if any("kubernetes.groups" in argument for argument in container["args"]) and done.returncode != 0:
            assert "built without Kubernetes" in done.stderr, done.stderr
            continue
        assert done.returncode == 0, f"{name}: {done.stderr}"
        config, ports = read(done.stdout), ports_of(it)
        listens = {key: int(value.removeprefix("0.0.0.0:")) for key, value in config.items() if key.endswith("listen")}
        assert sorted(listens.values()) == sorted(ports.values()), (name, listens)
        assert listens["metrics_listen"] == ports["metrics"], (name, listens)
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        for path in re.findall(r'"(/[^"]*)"', done.stdout):
            assert any((path + "/").startswith(mount + "/") for mount in mounts), (name, path)
        # The kubelet waits for as long as the process does.
        drain = 30
        if container["name"] == "coordinator":
            drain = seconds(config["limits.linger"]) + seconds(config["limits.request_timeout"]) + 10
        assert config["process.shutdown.drain"] == "" and drain < pod["terminationGracePeriodSeconds"], (name, drain)
        # Nobody is let in unknown.
        secured = {
            "controller": ["store.etcd.ca_file"],
            "coordinator": ["store.etcd.ca_file", "https.cert_file", "https.key_file", "api_keys.file"],
            "server": ["handoff.secret_file"],
        }[container["name"]]
        for key in ["tls.ca_file", "tls.cert_file", "tls.key_file", *secured]:
            assert config[key].startswith("/etc/baton/"), (name, key)
        if container["name"] == "coordinator" and "replicas" in it["spec"]:
            assert config["api_keys.coordinators"] == str(it["spec"]["replicas"])


def check_single_node(objects, https=None):
    (workload,) = workloads(objects)
    container = container_of(workload)
    values = environment(objects, container)
    arguments = [expanded(it, values) for it in container["args"]]
    # All flags are taken; but there is no folder of models on this machine, and nothing is opened elsewhere.
    program, *words = container["command"]
    done = run(PROGRAMS / program, *words, *arguments)
    root = "error: server: model.root: cannot read /models: "
    assert done.returncode == 1 and done.stderr.startswith(root) and values["MODEL"].startswith("/models/"), done.stderr
    settings = [it.removeprefix("--set=").split(".", 1) for it in arguments if it.startswith("--set=")]
    ports = set(ports_of(workload).values())
    for service in ("controller", "coordinator"):
        own = [f"--set={setting}" for of, setting in settings if of == service]
        more = ["--model=/models/m", "--controller=127.0.0.1:1"] if service == "coordinator" else []
        printed = output(PROGRAMS / f"baton-{service}", *own, *more, "--check-config")
        assert "0.0.0.0" not in printed, printed  # where they listen, `baton up` says alone
        if service == "coordinator":
            files = {key: read(printed)[f"https.{key}_file"] for key in ("cert", "key")}
            assert files == {key: https and f"{https}/tls.{end}" or "" for key, end in (("cert", "crt"), ("key", "key"))}, files
    assert ports == {8000, 8002, 8003} and {"--listen=0.0.0.0:8000", "--metrics-listen=0.0.0.0:8002"} <= {*arguments}, ports
    drains = [seconds(it.split("=")[1]) + 2 for _, it in settings if it.startswith("process.shutdown.drain=")]
    assert sum(drains) + 2 * 7 < pod_of(workload)["terminationGracePeriodSeconds"], drains


# Secrets and certificates ----------------------------------------------------------------------------------------------


def check_hosts():
    """An entry's certificate is made anew for a host that it lacks, and for no other, however that is written."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = ("--host=2001:db8::1", "--host=*.llm.example.com", "--host=192.0.2.7")
        given = lambda hosts: [word for it in hosts for word in it.split("=")]
        first = made_secrets(folder, *given(hosts), "https")
        assert {"*.llm.example.com", "baton.baton.svc"} <= facts(first["baton-https"]["tls.crt"])["dnsNames"]
        assert made_secrets(folder, *given(hosts[1:]), "https") == first
        for more in ("--host=2001:db8::2", "--host=xllm.example.com", "--host=192.0.2.70"):
            then = made_secrets(folder, *given((*hosts, more)), "https")
            assert then != first, f"no certificate for {more}"
            first = then


def made_secrets(folder, *arguments):
    printed = output(KUBERNETES / "secrets", *arguments, "--folder", folder)
    assert printed == output(KUBERNETES / "secrets", *arguments, "--folder", folder), "made anew"
    objects = list(yaml.safe_load_all(printed))
    check_valid(objects, VERSIONS)
    decoded = lambda data: {key: base64.b64decode(value).decode() for key, value in data.items()}
    return {it["metadata"]["name"]: decoded(it["data"]) for it in objects}


def facts(certificate):
    """What a certificate names, as {"uris": ..., "dnsNames": ...}."""
    text = output("openssl", "x509", "-noout", "-ext", "subjectAltName", input=certificate)
    named = lambda kind: set(re.findall(rf"{kind}:([^,\s]+)", text))
    return {"uris": named("URI"), "dnsNames": named("DNS")}


def check_certificates(secrets):
    """cert-manager makes what the script makes; whoever is told whom to trust can check who comes."""
    objects = composed("cert-manager", "cert-manager-etcd")
    check_references(objects, secrets)
    issued = [it["spec"] for it in objects if it["kind"] == "Certificate" and not it["spec"].get("isCA")]
    issuers = {it["metadata"]["name"] for it in objects if it["kind"] == "Issuer"}
    assert {it["secretName"] for it in issued} == {name for name, of in secrets.items() if "tls.crt" in of}
    for it in issued:
        secret, names = secrets[it["secretName"]], facts(secrets[it["secretName"]]["tls.crt"])
        assert it["issuerRef"]["name"] in issuers
        for kind, of in names.items():
            wanted = set(it.get(kind, []))
            assert wanted <= of if it["secretName"] == "baton-https" else wanted == of, (it["secretName"], wanted, of)
        with tempfile.NamedTemporaryFile("w", suffix=".crt") as authority:
            authority.write(secret["ca.crt"])
            authority.flush()
            output("openssl", "verify", "-CAfile", authority.name, input=secret["tls.crt"])
    assert secrets["baton-etcd-tls"]["ca.crt"] != secrets["baton-server-tls"]["ca.crt"], "servers would be let into etcd"


def main():
    multi, single = kustomize(KUBERNETES / "multi-node"), kustomize(KUBERNETES / "single-node")
    with tempfile.TemporaryDirectory() as folder:
        secrets = made_secrets(folder)
        (key,) = [(pathlib.Path(folder) / "api-key").read_text()]
        assert key.startswith("sk-baton-") and key not in str(secrets)
    with tempfile.TemporaryDirectory() as folder:
        of_single = made_secrets(folder, "api-keys")

    check_helm()
    check_values()
    check_hosts()
    check_certificates(secrets)
    assert check_references(multi, secrets) == secrets.keys()
    assert check_references(single, of_single) == of_single.keys()
    check_network(multi, MULTI_NODE)
    check_network(single, SINGLE_NODE, 8004)
    check_single_node(single)
    multi_of_readme, single_of_readme = of_readme()
    assert check_references(single_of_readme, secrets) == {"baton-api-keys", "baton-https"}
    check_single_node(single_of_readme, https="/etc/https")

    # Each component alone, and all kustomizations there are.
    old = composed("role-pools", "autoscaling", "kubernetes-1.20")
    everything = {it.name: composed(it.name) for it in (KUBERNETES / "components").iterdir()}
    everything |= {it.name: kustomize(it) for it in (KUBERNETES / "overlays").iterdir()}
    everything |= {"multi-node": multi, "single-node": single, "old": old}
    everything |= {"README": multi_of_readme, "single-node by README": single_of_readme}
    for name, objects in everything.items():
        check_references(objects, secrets)
        issued = {it["spec"]["secretName"] for it in objects if it["kind"] == "Certificate"}
        if ("StatefulSet", "baton-etcd") not in by_name(objects):
            assert not any("etcd" in it for it in issued), f"{name}: of somebody else's etcd: {issued}"
        if "single" not in name:
            check_configured(objects, secrets)
        check_valid(objects, OLD_VERSIONS if name in ("old", "kubernetes-1.20") else VERSIONS)
        assert unrestricted(objects) == set(), (name, unrestricted(objects))
        check_ways_out(objects)
    assert len(everything) > 12


if __name__ == "__main__":
    main()
