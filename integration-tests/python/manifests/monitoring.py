"""What Prometheus is told: whom to scrape, when to raise an alarm, and what the autoscaler wants to know."""

import json
import os
import pathlib
import re
import tempfile

import yaml

from making import KUBERNETES, labels_of, output, ports_of, workloads
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


def check_scraped(objects):
    """Every port that has metrics is scraped once, by a job that the alerts ask for."""
    (monitor,) = [it for it in objects if it["kind"] == "PodMonitor"]
    jobs = set(re.findall(r'job=~"([^"]*)"', (KUBERNETES / "../alerts/baton.rules.yaml").read_text()))
    assert jobs
    for it in workloads(objects):
        name, ports = it["metadata"]["name"], ports_of(it)
        expected = [ports["metrics"]]
        if "controller" in ports:
            (told,) = [one["data"] for one in objects if "prefill" in one.get("data", {})]
            servers = int(told["prefill"]) + int(told["decode"])
            expected += range(ports["controller"], ports["controller"] + 1 + servers)
        found, job = scraped(monitor, it)
        assert found == expected, f"{name} is scraped at {found}, and has metrics at {expected}"
        assert all(re.fullmatch(one, job) for one in jobs), f"no alert asks for the job {job}"


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
