"""deploy/kubernetes, offline: what kustomize and Helm make of it is valid, is one and the same, and fits the programs.

Called by tests/manifests.rs as `manifests FOLDER`, the folder of Baton's programs. `deploy/run test` brings kubectl, helm and
promtool (BATON_TEST_KUBECTL, BATON_TEST_HELM, BATON_TEST_PROMTOOL), and schemas of Kubernetes older than those of the package
(BATON_TEST_KUBERNETES_SCHEMAS).
"""

import pathlib
import re
import tempfile

from certificates import check_certificates, check_hosts, check_renewed, clients_authority, made_secrets
from configured import check_cache_said, check_configured, check_no_device, check_single_node, files_of
from making import KUBERNETES, by_name, composed, container_of, kustomize, made_by, of_readme, pod_of, told, workloads
from monitoring import check_adapter, check_alerts, check_dashboards, check_linked, check_scraped, check_scraped_without_operator
from references import MULTI_NODE, SINGLE_NODE, check_network, check_references, check_ways_out, unrestricted
from same import check_clients, check_helm, check_policies, check_readme, check_refused, check_values
from schemas import OLD_VERSIONS, SINCE, VERSIONS, check_valid

RANKTABLE, CLIENTS = "/etc/ascend/global_ranktable.json", "/etc/clients/ca.crt"
# What a component adds to configurations.
SAYS = {
    "ascend": {"controller": {"ascend.ranktable_file": RANKTABLE}},
    "ascend-a3": {"controller": {"ascend.ranktable_file": RANKTABLE}},
    "overlay ascend": {"controller": {"ascend.ranktable_file": RANKTABLE}},
    "client-certificates": {"coordinator": {"https.client_ca_file": CLIENTS}},
}
# How many NPUs a server has, and on which nodes: Atlas 800I A2, Atlas 800I A3.
NPUS = {"ascend": (8, "module-910b-8"), "ascend-a3": (16, "module-a3-16"), "overlay ascend": (8, "module-910b-8")}


def check_npus(objects, count, kind):
    """Servers have as many, on nodes of that kind, and nobody else has any; a new pod waits for those of an old one."""
    for it in workloads(objects):
        name, resources = it["metadata"]["name"], container_of(it)["resources"]
        asked = {resources[of].get("huawei.com/Ascend910") for of in ("requests", "limits")}
        if container_of(it)["name"] not in ("baton", "server"):
            assert asked == {None}, name
            continue
        assert asked == {count}, (name, asked)
        assert pod_of(it)["nodeSelector"] == {"accelerator": "huawei-Ascend910", "accelerator-type": kind}, name
        strategy = it["spec"]["strategy"]
        assert strategy.get("type") == "Recreate" or strategy["rollingUpdate"]["maxSurge"] == 0, (name, strategy)


def check_given(name, objects, secrets):
    """The files that a component's configuration names are those of its own ConfigMap or Secret."""
    given = {path: of for it in workloads(objects) for path, of in files_of(objects, it, secrets).items()}
    if name in NPUS:
        # By it the controller finds servers by their addresses, and those of a single node are on loopback.
        wanted = None if ("Deployment", "baton") in by_name(objects) else ("baton-ranktable", None)
        assert given.get(RANKTABLE) == wanted, (name, given.get(RANKTABLE))
        check_npus(objects, *NPUS[name])
    if name == "client-certificates":
        assert given[CLIENTS] == ("baton-clients-ca", secrets["baton-clients-ca"]["ca.crt"]), given[CLIENTS]


def check_alone(secrets):
    """`ascend-a3` has `ascend` already: beside it, it would be there twice, and README.md says so."""
    (row,) = re.findall(r"^\| `ascend-a3` \|.*", (KUBERNETES / "README.md").read_text(), re.M)
    try:
        check_references(composed("ascend", "ascend-a3"), secrets)
    except AssertionError as error:
        assert "twice" in str(error) and "In place of `ascend`" in row, (error, row)


def check_said():
    """README.md names the versions that all of this is checked by, and how the log's level is changed."""
    level = told("kubectl create configmap baton-log")
    assert level["metadata"]["name"] == "baton-log" and level["data"].keys() == {"level"}, level
    text = (KUBERNETES / "README.md").read_text()
    said = {
        r"Kubernetes (1\.\d+) or later": [VERSIONS[0]],
        r"schemas of Kubernetes (1\.\d+) to (1\.\d+)": [(OLD_VERSIONS[0], VERSIONS[-1])],
        r"API server of (1\.\d+) to (1\.\d+)": [(OLD_VERSIONS[0], OLD_VERSIONS[-1])],
        r"\| `autoscaling` \|.*from (1\.\d+) on": [*SINCE.values()],
    }
    for pattern, versions in said.items():
        found = re.findall(pattern, text)
        assert found == versions, f"README.md says {found}, and checked is {versions}"


def check_all_single_node(secrets):
    """The components that are for a single node, too. Returns what they make."""
    _, https = of_readme()
    made = {it: composed(it, base="single-node") for it in ("ascend", "ascend-a3", "model-init", "prometheus")}
    made["client-certificates"] = made_by({**https, "components": ["deploy/kubernetes/components/client-certificates"]})
    for name, objects in made.items():
        clients = name == "client-certificates"
        check_single_node(objects, secrets, SAYS[name] if clients else {}, https="/etc/https" if clients else None)
        check_given(name, objects, secrets)
    check_scraped(made["prometheus"])
    return {f"single-node, {name}": objects for name, objects in made.items()}


def main():
    multi, single = kustomize(KUBERNETES / "multi-node"), kustomize(KUBERNETES / "single-node")
    with tempfile.TemporaryDirectory() as folder:
        secrets = made_secrets(folder)
        (key,) = [(pathlib.Path(folder) / "api-key").read_text()]
        assert key.startswith("sk-baton-") and key not in str(secrets)
    with tempfile.TemporaryDirectory() as folder:
        of_single = made_secrets(folder, "api-keys")

    check_said()
    check_cache_said(multi, single)
    check_helm()
    check_values()
    check_policies()
    check_refused()
    check_hosts()
    check_renewed()
    check_no_device()
    check_certificates(secrets)
    assert check_references(multi, secrets) == secrets.keys()
    assert check_references(single, of_single) == of_single.keys()
    check_network(multi, MULTI_NODE)
    check_network(single, SINGLE_NODE, 8004)
    check_single_node(single, of_single)
    multi_of_readme, single_of_readme = map(made_by, of_readme())
    assert check_references(single_of_readme, secrets) == {"baton-api-keys", "baton-https"}
    check_single_node(single_of_readme, secrets, https="/etc/https")

    # Each component alone, and all kustomizations there are.
    secrets |= clients_authority()
    check_alone(secrets)
    check_clients(secrets)
    check_readme(secrets)
    old = composed("role-pools", "autoscaling", "kubernetes-1.20")
    everything = {it.name: composed(it.name) for it in (KUBERNETES / "components").iterdir()}
    everything |= {f"overlay {it.name}": kustomize(it) for it in (KUBERNETES / "overlays").iterdir()}
    everything |= {"multi-node": multi, "single-node": single, "old": old}
    everything |= {"README": multi_of_readme, "single-node by README": single_of_readme}
    everything |= check_all_single_node(secrets)
    for name, objects in everything.items():
        check_references(objects, secrets)
        issued = {it["spec"]["secretName"] for it in objects if it["kind"] == "Certificate"}
        if ("StatefulSet", "baton-etcd") not in by_name(objects):
            assert not any("etcd" in it for it in issued), f"{name}: of somebody else's etcd: {issued}"
        if "single" not in name:
            check_configured(objects, secrets, SAYS.get(name, {}))
            check_given(name, objects, secrets)
        check_valid(objects, OLD_VERSIONS if name == "old" or "kubernetes-1.20" in name else VERSIONS)
        assert unrestricted(objects) == set(), (name, unrestricted(objects))
        check_ways_out(objects)
    assert len(everything) > 20
    check_scraped(everything["prometheus"])
    check_alerts([*everything["cert-manager"], *everything["prometheus"]])
    check_adapter(everything["autoscaling"])
    check_scraped_without_operator(multi, single)
    check_linked()
    check_dashboards()


if __name__ == "__main__":
    main()
