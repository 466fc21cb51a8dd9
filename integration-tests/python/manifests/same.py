"""Kustomize and Helm make the same, and what values say is in the pods."""

import json
import os
import re

import yaml

from configured import check_configured, check_single_node
from making import CHART, KUBERNETES, PROGRAMS, blocks_of_readme, by_name, composed, container_of, example, helm, kustomize
from making import indented_of_readme, made_by, of_readme, output, pod_of, told_all, workloads
from monitoring import check_scraped
from references import unrestricted
from schemas import OLD_VERSIONS, VERSIONS, check_valid, faults, fields_of


def app_version():
    return yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]


def neutral(objects):
    """Without what tells the two apart: Helm's own labels, checksum and tags, kustomize's hashes in the names of ConfigMaps."""
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
        container_of(it)["image"] = container_of(it)["image"].removesuffix(f":{app_version()}")
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
    "client-certificates": {"clientCertificates": {"enabled": True}},
}
# What it is among the examples of values.
EXAMPLES = {
    "ascend": ["ascend"],
    "ascend-a3": ["ascend", "ascend-a3"],
    "rdma": ["rdma"],
}
ONE = {"mode": "singleNode"}
HTTPS = {**ONE, "singleNode": {"https": "baton-https"}}


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
    (https,) = [it for it in of_readme() if "single-node" in str(it["resources"])]
    check_same(made_by(https), helm(HTTPS), "single-node, https")
    ours = made_by({**https, "components": ["deploy/kubernetes/components/client-certificates"]})
    check_same(ours, helm({**HTTPS, **SAME["client-certificates"]}), "single-node, client-certificates")
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
    refused += [{"clientCertificates": it} for it in ({"enable": True}, {"enabled": True, "secret": ""}, {"enabled": "true"})]
    refused += [{"singleNode": {"https": True}}, {"server": {"pools": {"all": {}}}}]
    refused += [{"etcd": {"enabled": False, "endpoints": [it]}} for it in ("::1:2379", "http://a:2379", "[a:2379", "[x]:2379")]
    policies = {"dnsPorts": []}, {"ingress": {"client": []}}, {"egress": {"server": [{"port": 1}]}}
    refused += [{"networkPolicies": it} for it in policies]
    for bad in refused:
        assert refusal(bad), f"the chart takes {bad}"


def check_refused():
    """What would do nothing, or contradicts itself, is refused by its name, and so is a field that Kubernetes does not know."""
    both = {"min": 4, "max": 3, "enabled": True}
    pools = {"pools": {"a": {"role": "mixed"}}}
    said = {
        "certManager.enabled": {**ONE, "certManager": {"enabled": True}},
        "autoscaling.enabled": {**ONE, **SAME["autoscaling"]},
        "controllerScaling.enabled": {**ONE, **SAME["controller-scaling"]},
        "coordinator.replicas": {**ONE, "coordinator": {"replicas": 2}},
        "server.pools": {**ONE, "server": pools},
        "etcd.endpoints": {**ONE, "etcd": {"enabled": False, "endpoints": ELSEWHERE}},
        "networkPolicies.ingress.server": {**ONE, "networkPolicies": {"ingress": {"server": []}}},
        "networkPolicies.egress.singleNode": {"networkPolicies": {"egress": {"singleNode": []}}},
        "singleNode.prefill, singleNode.decode": {"singleNode": {"prefill": 2, "decode": 0}},
        "singleNode.https": {"singleNode": {"https": "baton-https"}},
        "autoscaling.min: 4": {"autoscaling": both},
        "controllerScaling.min: 4": {"controllerScaling": both},
        "coordinator.replicas: autoscaling": {**SAME["autoscaling"], "coordinator": {"replicas": 3}},
        "server.replicas: controllerScaling": {**SAME["controller-scaling"], "server": {"replicas": 3}},
        "leave out server.pools": {**SAME["controller-scaling"], "server": pools},
        "model.init.image": {"model": {"init": {"args": ["fetch"]}}},
        "model.volume": {"model": {"init": {"image": "a"}, "volume": {"emptyDir": {}}}},
    }
    for name, values in said.items():
        why = refusal(values)
        assert why and name in why, (name, why)
    # Of pods of the other mode anything may be said.
    of_pods = {"settings": ["a=b"], "pod": {"priority": 1}, "container": {"tty": True}, "annotations": {"a": "b"}}
    assert helm({"singleNode": of_pods}) == helm()
    assert helm({**ONE, "server": of_pods, "etcd": {**of_pods, "image": "a"}}) == helm(ONE)

    known = json.loads((CHART / "values.schema.json").read_text())["$defs"]
    for what, kind in (("pod", "podspec"), ("container", "container")):
        names, fields = [*known[what]["properties"]], set()
        for version in {*OLD_VERSIONS, *VERSIONS}:
            fields |= fields_of(kind, version)
        assert names == sorted(fields), (what, fields ^ {*names})
    for kind in ("controller", "coordinator", "server", "etcd", "singleNode"):
        for what, typo in (("pod", "toleration"), ("container", "resource")):
            why = refusal({kind: {what: {typo: {}}}})
            assert why and f"at '/{kind}/{what}'" in why and f"'{typo}' not allowed" in why, why
    pool = {"role": "mixed", "pod": {"node": {}}}
    for values in ({"server": {"pools": {"a": pool}}}, {"model": {"init": {"image": "a", "arg": []}}}):
        assert refusal(values), values


def check_policies():
    """By Helm NetworkPolicies let out to wherever etcd and names are, and in whom values say."""
    def rules(values, name, way):
        return by_name(helm(values))["NetworkPolicy", name]["spec"][way]

    # Etcd by its ports, also as the component's comment has it.
    at = lambda *endpoints: {"etcd": {"enabled": False, "endpoints": [*endpoints]}}
    text = (KUBERNETES / "components/existing-etcd/kustomization.yaml").read_text()
    told = yaml.safe_load("\n".join(re.findall(r"^#   ?(.*)", text[text.index("#   patches:"):text.index("apiVersion")], re.M)))
    patched = by_name(composed("existing-etcd", **told))
    for name in ("baton-controller", "baton-coordinator"):
        let_out = lambda values: [[port["port"] for port in it["ports"]] for it in rules(values, name, "egress") if "to" not in it]
        assert let_out(at("etcd.example:12379", "10.0.0.1:2379", "[fd00::1]:12379")) == [[12379, 2379], [53, 53]]
        theirs = rules(at("etcd.example:12379"), name, "egress")
        assert patched["NetworkPolicy", name]["spec"]["egress"] == theirs, theirs
    for endpoints, written in ((["[fd00::1]:2379", "a:1"], "[fd00::1]:2379,a:1"), (["a:1", "b:2"], "a:1,b:2")):
        shared = by_name(helm(at(*endpoints)))["ConfigMap", "baton"]["data"]["etcd-endpoints"]
        assert shared == written, shared
        env = {**os.environ, "BATON_CONTROLLER__STORE__ETCD__ENDPOINTS": shared}
        printed = output(PROGRAMS / "baton-controller", "--set=store.kind=etcd", "--check-config", env=env)
        assert re.findall(r'"([^"]+:\d+)",$', printed, re.M) == endpoints, printed

    # Whoever watches is elsewhere, and so are names.
    for base in ({}, ONE):
        plain, moved = helm(base), helm({**base, "networkPolicies": {"monitoringNamespace": "watching", "dnsPorts": [5353]}})
        only = lambda objects: [it for it in objects if it["kind"] == "NetworkPolicy"]
        wanted = json.dumps(only(plain)).replace('"monitoring"', '"watching"').replace(": 53,", ": 5353,")
        assert json.loads(wanted) == only(moved) and wanted != json.dumps(only(plain)), only(moved)
        none = helm({**base, "networkPolicies": {"enabled": False}})
        assert none == [it for it in plain if it["kind"] != "NetworkPolicy"]

    # More rules are beside ours, of that kind of pod alone. That of values.yaml is one.
    (said,) = re.findall(r"^  # (\{controller: \[\{from.*)", (CHART / "values.yaml").read_text(), re.M)
    more = {"networkPolicies": {"ingress": yaml.safe_load(said), "egress": {"server": [{"ports": [{"port": 8443}]}]}}}
    objects, plain = helm(more), by_name(helm())
    check_valid(objects, VERSIONS)
    for it in (it["metadata"]["name"] for it in objects if it["kind"] == "NetworkPolicy"):
        kind = it.removeprefix("baton-")
        for way in ("ingress", "egress"):
            wanted = plain["NetworkPolicy", it]["spec"][way] + more["networkPolicies"][way].get(kind, [])
            assert rules(more, it, way) == wanted, (it, way)
    one = [{"from": [{"podSelector": {}}]}]
    assert rules({**ONE, "networkPolicies": {"ingress": {"singleNode": one}}}, "baton", "ingress")[-1:] == one


def refusal(values):
    """Why the chart does not take them, None if it does."""
    try:
        helm(values)
    except AssertionError as error:
        return str(error)


def check_clients(secrets):
    """By Helm, too, no client is let in without a certificate that has to have one, whatever else the values say."""
    wanted = {"clientCertificates": {"enabled": True}}
    for undone in ([], ["limits.max_queued=7"], ["https.client_ca_file="], ["https.client_ca_file=/etc/elsewhere.crt"]):
        more = {"volumes": [{"name": "clients-ca", "emptyDir": {}}, {"name": "more", "emptyDir": {}}]} if undone else {}
        mounts = {"volumeMounts": [{"name": "more", "mountPath": it} for it in ("/etc/clients", "/more")]} if undone else {}
        objects = helm({**wanted, "coordinator": {"settings": undone, "pod": more, "container": mounts}})
        expected = {"https.client_ca_file": "/etc/clients/ca.crt"}
        expected |= {"limits.max_queued": "7"} if "limits.max_queued=7" in undone else {}
        check_configured(objects, secrets, {"coordinator": expected})
        single = {"https": "baton-https", "settings": [f"coordinator.{it}" for it in undone], "pod": more, "container": mounts}
        objects += (one := helm({**ONE, **wanted, "singleNode": single}))
        check_single_node(one, secrets, {"coordinator": expected}, https="/etc/https")
        for it in workloads(objects):
            if container_of(it)["name"] not in ("coordinator", "baton"):
                continue
            volumes, mounted = named(pod_of(it)["volumes"]), named(container_of(it)["volumeMounts"], "mountPath")
            assert volumes[mounted["/etc/clients"]["name"]]["secret"]["secretName"] == "baton-clients-ca", volumes
    # Also where arguments are replaced.
    for name, values in (("baton-coordinator", {"coordinator": {"container": {"args": ["--mine"]}}}),
                         ("baton", {**ONE, "singleNode": {"https": "a", "container": {"args": ["--mine"]}}})):
        first, *rest = container_of(by_name(helm({**wanted, **values}))["Deployment", name])["args"]
        assert first == "--mine" and any(it.endswith("https.client_ca_file=/etc/clients/ca.crt") for it in rest), rest
    other = made({"clientCertificates": {"enabled": True, "secret": "mine"}}, "coordinator")
    assert named(pod_of(other)["volumes"])["clients-ca"]["secret"]["secretName"] == "mine"
    why = refusal({**ONE, **wanted})
    assert why and "singleNode.https" in why, f"a single node without HTTPS: {why}"


def check_readme(secrets):
    """What README.md tells operators to do does what it says."""
    # No release goes back to what the chart says.
    upgrades = told_all("helm upgrade")
    assert upgrades
    for words in upgrades:
        assert {"--reuse-values", "-f"} & {*words}, f"forgets values: {words}"
        helm({}, *[word for at, it in enumerate(words) if it == "--set" for word in ("--set", words[at + 1])])

    # Images are where they are pushed.
    ((_, *words),) = told_all("deploy/images/build")
    tag, prefix = words[words.index("--tag") + 1], words[words.index("--push") + 1]
    (images,) = [it for it in blocks_of_readme() if "images" in it and "resources" not in it]
    services = {"controller", "coordinator", "server", "etcd"}
    (multi,) = [it for it in of_readme() if "multi-node" in str(it["resources"])]
    for objects in (helm(images), made_by(multi)):
        of = {container_of(it)["image"] for it in workloads(objects)}
        assert of == {f"{prefix}/baton-{it}:{tag}" for it in services}, of
    assert container_of(workloads(helm({**images, **ONE}))[0])["image"] == f"{prefix}/baton:{tag}"
    # None is never the latest, and etcd's is another only if it is named.
    for values, other in (({}, app_version()), ({"tag": "2"}, "2"), ({"tag": "2", "prefix": "a/"}, "2")):
        for etcd in ("", "b/etcd:3.5"):
            of = {container_of(it)["image"] for it in workloads(helm({"images": values, "etcd": {"image": etcd}}))}
            wanted = {f"{values.get('prefix', '')}baton-{it}:{other}" for it in services}
            assert of == {etcd if etcd and "etcd" in it else it for it in wanted}, of

    # Clients ask at the port that is forwarded to the entry's.
    urls = [re.search(r"(https?)://localhost:(\d+)/", it[-1]).groups() for it in told_all("curl") if "localhost" in it[-1]]
    forwarded = [it[it.index("service/baton") + 1].split(":") for it in told_all("kubectl port-forward") if "service/baton" in it]
    entries = [by_name(kustomize(KUBERNETES / it))["Service", "baton"]["spec"]["ports"] for it in ("single-node", "multi-node")]
    said = [[(scheme, int(there))] for (scheme, asked), (here, there) in zip(urls, forwarded, strict=True) if asked == here]
    assert said == [[(it["name"], it["port"]) for it in ports] for ports in entries], said
    waited = [it[-3] if "--timeout" in it else it[-1] for it in told_all("kubectl rollout status")]
    assert waited == ["deployment/baton", "deployment/baton-coordinator"], waited

    # Each service sends traces to where it may.
    (traces,) = [it for it in blocks_of_readme() if it.keys() == {"patches"}]
    (endpoint,) = re.findall(r"process\.otlp\.endpoint=(http://[\w.]+\.monitoring:4317)", str(traces))
    expected = {it: {"process.otlp.endpoint": endpoint} for it in ("controller", "coordinator", "server")}
    for objects in (composed(**traces), composed("role-pools", **traces)):
        check_configured(objects, secrets, expected)
    single = {"settings": [f"{it}.process.otlp.endpoint={endpoint}" for it in expected]}
    check_single_node(helm({**ONE, "singleNode": single}), secrets, expected)

    # Values fit together: longer contexts fit the memory, and longer drains the grace period. Broken pods may go at once.
    contexts, drains, budgets = [it for it in indented_of_readme() if it.keys() & {"server", "coordinator", "patches"}]
    check_configured(helm(contexts), secrets, {"server": {"runtime.kv_cache_bytes": "34359738368"}})
    check_configured(helm(drains), secrets, {"coordinator": {"limits.linger": "30s"}})
    patched = [it for it in composed(**budgets) if it["kind"] == "PodDisruptionBudget"]
    assert [it["spec"]["unhealthyPodEvictionPolicy"] for it in patched] == ["AlwaysAllow"] * 4, patched
    check_valid(patched, ["1.28", VERSIONS[-1]])
    assert all(faults(it, "1.25") for it in patched)


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

    # The model's volume is one, whatever it is. That of values.yaml is one that the profile allows.
    (volume,) = re.findall(r"Whatever a pod can mount, as in (\{.*?\}\});", (CHART / "values.yaml").read_text())
    for it in (helm({"model": {"volume": yaml.safe_load(volume)}}), helm({**ONE, "model": {"volume": yaml.safe_load(volume)}})):
        assert unrestricted(it) == set() and str(yaml.safe_load(volume))[1:-1] in str(it), unrestricted(it)
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
