"""What Prometheus is told: whom to scrape, when to raise an alarm, and what the autoscaler wants to know."""

import json
import os
import pathlib
import re
import tempfile

import yaml

from making import KUBERNETES, commands_of_readme, container_of, labels_of, output, ports_of, run, told_all, workloads
from references import selects
from schemas import VERSIONS, check_strict, check_valid


def scraped(monitor, workload):
    """Where each pod is scraped: its ports, as many as the Prometheus operator asks for, and the job that they are taken for."""
    spec, labels, found = monitor["spec"], labels_of(workload), []
    if not selects(spec["selector"]["matchLabels"], labels):
        return found, None
    for endpoint in spec["podMetricsEndpoints"]:
        if (port := ports_of(workload).get(endpoint["port"])) is None:
            continue
        address = f"10.1.2.3:{port}"
        for rule in endpoint.get("relabelings", []):
            assert rule["sourceLabels"] == [rule["targetLabel"]] == ["__address__"], rule
            if match := re.fullmatch(rule["regex"], address):
                address = match.expand(re.sub(r"\$(\d)", r"\\\1", rule["replacement"]))
        found.append(int(address.removeprefix("10.1.2.3:")))
    return found, labels[spec["jobLabel"]]


def metrics_ports(objects, workload):
    ports = ports_of(workload)
    if "controller" not in ports:
        return [ports["metrics"]]
    (told,) = [one["data"] for one in objects if "prefill" in one.get("data", {})]
    servers = int(told["prefill"]) + int(told["decode"])
    return [ports["metrics"], *range(ports["controller"], ports["controller"] + 1 + servers)]


def check_scraped(objects):
    """Every port that has metrics is scraped once, by a job that the alerts ask for."""
    (monitor,) = [it for it in objects if it["kind"] == "PodMonitor"]
    jobs = set(re.findall(r'job=~"([^"]*)"', (KUBERNETES / "../alerts/baton.rules.yaml").read_text()))
    assert jobs
    for it in workloads(objects):
        name, expected = it["metadata"]["name"], metrics_ports(objects, it)
        found, job = scraped(monitor, it)
        assert found == expected, f"{name} is scraped at {found}, and has metrics at {expected}"
        assert all(re.fullmatch(one, job) for one in jobs), f"no alert asks for the job {job}"


def check_scraped_without_operator(*deployed):
    """By prometheus-scrape.yaml, as Prometheus itself understands it, every port that has metrics is scraped once, and no other."""
    config = yaml.safe_load((KUBERNETES / "prometheus-scrape.yaml").read_text())
    ports = {1: [{"name": "mine", "containerPort": 1}], 2: [{"name": "metrics", "containerPort": 2}]}
    strangers = [(f"10.9.9.{number}", {"app.kubernetes.io/name": "mine"}, "Running", of) for number, of in ports.items()]
    pods, expected = strangers, set()
    for number, objects in enumerate(deployed):
        for at, it in enumerate(workloads(objects)):
            for last, phase in enumerate(("Running", "Succeeded")):
                pods.append((f"10.{number}.{at}.{last}", labels_of(it), phase, container_of(it)["ports"]))
            job = labels_of(it)["app.kubernetes.io/name"]
            expected |= {(job, f"10.{number}.{at}.0:{port}") for port in metrics_ports(objects, it)}
    meta = lambda key: "__meta_kubernetes_pod_" + re.sub(r"\W", "_", key)
    targets = [{"targets": [f"{address}:{port['containerPort']}"], "labels": {
        **{meta(f"label_{key}"): value for key, value in labels.items()}, meta("phase"): phase, meta("name"): "pod",
        meta("container_port_name"): port["name"], "__meta_kubernetes_namespace": "baton",
    }} for address, labels, phase, ports in pods for port in ports]
    # Debian's promtool is built without Kubernetes: what that would find is given to it.
    for it in config["scrape_configs"]:
        assert it.pop("kubernetes_sd_configs") == [{"role": "pod"}], it["job_name"]
        it["static_configs"] = targets
    found = []
    with tempfile.TemporaryDirectory() as folder:
        (file := pathlib.Path(folder) / "prometheus.json").write_text(json.dumps(config))
        output(os.environ["BATON_TEST_PROMTOOL"], "check", "config", file)
        for it in config["scrape_configs"]:
            command = ["check", "service-discovery", "--timeout=2s", file, it["job_name"]]
            kept = [one["labels"] for one in json.loads(output(os.environ["BATON_TEST_PROMTOOL"], *command)) if one["labels"]]
            assert all(one["namespace"] == "baton" and one["pod"] == "pod" for one in kept), kept
            found += [(one["job"], one["instance"]) for one in kept]
    assert len({*found}) == len(found) and {*found} == expected, sorted({*found} ^ expected)
    assert "(prometheus-scrape.yaml)" in (KUBERNETES / "README.md").read_text(), "README.md does not lead to it"


def check_linked():
    """The alerts lead to where RUNBOOK.md is said to be, and labels that are none are refused by name."""
    alerts = lambda *words: run(KUBERNETES / "alerts", *words)
    annotations = lambda printed: [one["annotations"] for it in yaml.safe_load(printed)["spec"]["groups"] for one in it["rules"]]
    (told,) = [words[1:words.index("|")] for words in told_all("deploy/kubernetes/alerts")]
    url = told[told.index("--runbooks") + 1]
    plain, linked = (annotations(output(KUBERNETES / "alerts", *words)) for words in ([], ["--runbooks", f"{url}/"]))
    assert linked == [{"summary": it["summary"], "runbook_url": f"{url}/{it['runbook']}"} for it in plain]
    assert annotations(output(KUBERNETES / "alerts", *told)) == linked
    labels = yaml.safe_load(output(KUBERNETES / "alerts", "example.com/team=llm", "of=", "a=1.b_c-d"))["metadata"]["labels"]
    assert labels == {"app.kubernetes.io/part-of": "baton", "example.com/team": "llm", "of": "", "a": "1.b_c-d"}, labels
    for name in ('a"b', "a b", "a\nb", "a'", "a:", "é", "", "a/b/c", "a" * 64):
        done = alerts(f"{name}=1")
        error = f"`{name}` cannot be a label's name"
        assert done.returncode == 1 and not done.stdout and error in done.stderr, (name, done.stderr)
    for value in ('a"b', "a b", "a\nb: c", "\\", "a.", "a" * 64):
        done = alerts(f"release={value}")
        error = f"`{value}` cannot be a label's value"
        assert done.returncode == 1 and not done.stdout and error in done.stderr, (value, done.stderr)
    for words in (["--runbooks"], ["--runbooks", "a"], ["--runbooks", 'https://a/"'], ["--runbooks", "https://a/ b"], ["--more"]):
        done = alerts(*words)
        assert done.returncode == 1 and not done.stdout and words[0] in done.stderr, (words, done.stderr)


def check_dashboards():
    """Those of deploy/dashboards, in a ConfigMap by which Grafana finds them."""
    (first, second, third) = [it.split(" ") for it in next(
        it for it in commands_of_readme() if it.startswith("kubectl create configmap baton-dashboards")).split(" | ")]
    kubectl = os.environ["BATON_TEST_KUBECTL"]
    made = output(kubectl, *first[1:], cwd=KUBERNETES / "../..")
    made = yaml.safe_load(output(kubectl, *second[1:], input=made))
    assert third == ["kubectl", "apply", "-f", "-"]
    assert made["metadata"]["labels"] == {"grafana_dashboard": "1"} and made["metadata"]["namespace"] == "monitoring"
    assert made["data"] == {it.name: it.read_text() for it in (KUBERNETES / "../dashboards").iterdir()}
    check_valid([{**made, "metadata": {**made["metadata"], "creationTimestamp": "2026-01-01T00:00:00Z"}}], VERSIONS)


def check_alerts(objects):
    """The alerts are those of deploy/alerts; of every object that is no part of Kubernetes an unknown field would be found."""
    rules = yaml.safe_load(output(KUBERNETES / "alerts", "release=1"))
    check_valid([rules], VERSIONS)
    same = rules["spec"] == yaml.safe_load((KUBERNETES / "../alerts/baton.rules.yaml").read_text())
    assert same, "these are other alerts"
    assert rules["metadata"]["labels"] == {"app.kubernetes.io/part-of": "baton", "release": "1"}
    assert check_strict([*objects, rules]) == {"Certificate", "Issuer", "PodMonitor", "PrometheusRule"}


def check_adapter(objects):
    """The Prometheus adapter knows what the autoscaler asks for. That coordinators show it is seen by prometheus.rs, which sees
    whatever dashboards ask for."""
    (autoscaler,) = [it for it in objects if it["kind"] == "HorizontalPodAutoscaler"]
    asked = {it["pods"]["metric"]["name"] for it in autoscaler["spec"]["metrics"] if it["type"] == "Pods"}
    rules = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    names = {re.match(r"\w+", it["seriesQuery"])[0] for it in rules}
    assert names == asked, f"the adapter knows {names}, and is asked for {asked}"
    boards = "".join(it.read_text() for it in (KUBERNETES / "../dashboards").iterdir())
    assert names <= set(re.findall(r"\w+", boards)), f"no dashboard asks for {names}"
    for it in rules:
        # The operator gives these labels to whatever a pod shows.
        labels = set(re.findall(r'(\w+)!=""', it["seriesQuery"]))
        assert labels == it["resources"]["overrides"].keys() == {"namespace", "pod"}, it
        query = it["metricsQuery"]
        for key, value in {"Series": "a", "LabelMatchers": 'pod=~"a|b"', "GroupBy": "pod"}.items():
            assert f"<<.{key}>>" in query, query
            query = query.replace(f"<<.{key}>>", value)
        with tempfile.TemporaryDirectory() as folder:
            rule = {"groups": [{"name": "a", "rules": [{"record": "a", "expr": query}]}]}
            (file := pathlib.Path(folder) / "rules.json").write_text(json.dumps(rule))
            output(os.environ["BATON_TEST_PROMTOOL"], "check", "rules", file)
    assert "(prometheus-adapter.yaml)" in (KUBERNETES / "README.md").read_text(), "README.md does not lead to it"
