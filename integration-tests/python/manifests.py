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


def composed(*components, base="multi-node"):
    """What a kustomization of these components makes of the base."""
    with tempfile.TemporaryDirectory() as folder:
        there = lambda path: os.path.relpath(KUBERNETES / path, os.path.realpath(folder))
        parts = [there(f"components/{it}") for it in components]
        kustomization = {"namespace": "baton", "resources": [there(base)], "components": parts}
        (pathlib.Path(folder) / "kustomization.yaml").write_text(json.dumps(kustomization))
        return kustomize(folder)


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
    "cert-manager": {"certManager": {"enabled": True}},
    "autoscaling": {"autoscaling": {"enabled": True}},
    "controller-scaling": {"controllerScaling": {"enabled": True}},
    "role-pools": {"server": {"pools": pools()}},
    "model-init": {"model": {"init": {"image": "baton-model"}}},
    "rdma": {"server": {
        "annotations": {"k8s.v1.cni.cncf.io/networks": "roce"},
        "settings": ['handoff.transports=["rdma","tcp"]'],
        "container": {
            "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
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
    elsewhere = helm({"etcd": {"enabled": False, "endpoints": ELSEWHERE}})
    ours = composed("existing-etcd")
    (shared,) = [it for it in ours if it["metadata"]["name"].startswith("baton-") and "etcd-endpoints" in it.get("data", {})]
    shared["data"]["etcd-endpoints"] = ",".join(ELSEWHERE)
    check_same(ours, elsewhere, "existing-etcd")
    version = re.search('^version = "(.*)"', (KUBERNETES / "../../Cargo.toml").read_text(), re.M)[1]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == version, chart
    # What a pod is told alike makes new pods when it changes, and what the schema does not know is refused.
    sums = lambda objects: {labels_of(it)["app.kubernetes.io/name"]: it["spec"]["template"]["metadata"]["annotations"]
                            ["checksum/config"] for it in workloads(objects)}
    before, after = sums(helm()), sums(helm({"model": {"path": "/models/other"}}))
    assert all(before[it] != after[it] for it in before), (before, after)
    refused = [{"modes": "singleNode"}, {"mode": "many"}, {"server": {"replica": 1}}, {"etcd": {"enabled": False}}]
    for bad in [*refused, {"model": {"path": "/m"}}, {"server": {"pools": {"all": {}}}}]:
        try:
            helm(bad)
        except AssertionError:
            continue
        raise AssertionError(f"the chart takes {bad}")


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
                    secret(source["secret"]["name"], source["secret"]["items"])
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
    (["prometheus"], "baton", 7101),
])


def check_network(objects, expected):
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
            peer(rule, peers, *with_whom[1:]) and port in [it["port"] for it in rule["ports"]] for rule in rules)

    seen = set()
    for target, workload in zip(pods, workloads(objects)):
        for source, port in itertools.product([*pods, OPERATOR, STRANGER, PROMETHEUS], ports_of(workload).values()):
            if allowed("in", target, source, port) and allowed("out", source, target, port):
                seen.add((source[0], target[0], port))
    assert seen == expected, f"too much: {sorted(seen - expected)}, too little: {sorted(expected - seen)}"


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
        moved = lambda text: text.replace("/etc/baton/", folder + "/")
        for source in [it for volume in pod_of(workload)["volumes"] for it in volume.get("projected", {}).get("sources", [])]:
            (of,) = source.values()
            if "secret" in source:
                data = {item["path"]: secrets[of["name"]][item["key"]] for item in of["items"]}
            elif of.get("optional"):
                data = {item["path"]: "" for item in of["items"]}
            else:
                data = by_name(objects)["ConfigMap", of["name"]]["data"]
            for path, text in data.items():
                (pathlib.Path(folder) / path).parent.mkdir(exist_ok=True)
                (pathlib.Path(folder) / path).write_text(moved(text))
        arguments = [moved(expanded(it, values)) for it in container["args"]]
        done = run(PROGRAMS / container["image"], *arguments, "--check-config", env={**os.environ, **values})
        for path in re.findall(rf'"({folder}/[^"]*)"', done.stdout):
            assert os.path.exists(path), f"{workload['metadata']['name']}: no file is at {path}"
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
            assert any(path.startswith(mount + "/") for mount in mounts), (name, path)
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


def check_single_node(objects):
    (workload,) = workloads(objects)
    container = container_of(workload)
    values = environment(objects, container)
    arguments = [expanded(it, values) for it in container["args"]]
    # All flags are taken; the model is not on this machine.
    program, *words = container["command"]
    done = run(PROGRAMS / program, *words, *arguments)
    assert done.returncode == 1 and values["MODEL"] in done.stderr, (done.returncode, done.stderr)
    settings = [it.removeprefix("--set=").split(".", 1) for it in arguments if it.startswith("--set=")]
    ports = set(ports_of(workload).values())
    for service in ("controller", "coordinator"):
        own = [f"--set={setting}" for of, setting in settings if of == service]
        more = ["--model=/models/m", "--controller=127.0.0.1:1"] if service == "coordinator" else []
        printed = output(PROGRAMS / f"baton-{service}", *own, *more, "--check-config")
        ports -= {int(it) for it in re.findall(r'"0\.0\.0\.0:(\d+)"', printed)}
    assert ports == {8000} and "--listen=0.0.0.0:8000" in arguments, ports
    drains = [seconds(it.split("=")[1]) + 2 for _, it in settings if it.startswith("process.shutdown.drain=")]
    assert sum(drains) + 2 * 7 < pod_of(workload)["terminationGracePeriodSeconds"], drains


# Secrets and certificates ----------------------------------------------------------------------------------------------


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
    objects = composed("cert-manager")
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
    check_certificates(secrets)
    assert check_references(multi, secrets) == secrets.keys()
    assert check_references(single, of_single) == of_single.keys()
    check_network(multi, MULTI_NODE)
    check_network(single, SINGLE_NODE)
    check_single_node(single)

    # Each component alone, and all kustomizations there are.
    old = composed("role-pools", "autoscaling", "kubernetes-1.20")
    everything = {it.name: composed(it.name) for it in (KUBERNETES / "components").iterdir()}
    everything |= {it.name: kustomize(it) for it in (KUBERNETES / "overlays").iterdir()}
    everything |= {"multi-node": multi, "single-node": single, "old": old}
    for name, objects in everything.items():
        check_references(objects, secrets)
        if "single" not in name:
            check_configured(objects, secrets)
        check_valid(objects, OLD_VERSIONS if name in ("old", "kubernetes-1.20") else VERSIONS)
        expected = {"IPC_LOCK"} if name in ("rdma", "ascend") and unrestricted(objects) else set()
        assert unrestricted(objects) == expected, (name, unrestricted(objects))
    assert unrestricted(everything["rdma"]) == {"IPC_LOCK"}
    assert len(everything) > 12


if __name__ == "__main__":
    main()
