"""What objects say of one another: who names, selects and reaches whom."""

import itertools

from making import by_name, container_of, labels_of, pod_of, ports_of, workloads


def selects(selector, labels):
    return all(labels.get(key) == value for key, value in selector.items())


def assert_unlike(names, workload):
    assert len({*names}) == len(names), f"{workload['metadata']['name']} has one of these twice: {names}"


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
                secret(volume["secret"]["secretName"], volume["secret"].get("items", []))
        claims = [claim["metadata"] for claim in it["spec"].get("volumeClaimTemplates", [])]
        volumes = {volume["name"] for volume in pod["volumes"] + claims}
        assert_unlike([volume["name"] for volume in pod["volumes"] + claims], it)
        assert_unlike([mount["mountPath"] for mount in container["volumeMounts"]], it)
        assert_unlike(container["args"], it)
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
