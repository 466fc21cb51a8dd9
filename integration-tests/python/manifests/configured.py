"""What the programs say of the configuration that they would have in the pods, and of the files that it names."""

import math
import os
import pathlib
import re
import tempfile

from making import KUBERNETES, PROGRAMS, by_name, container_of, output, pod_of, ports_of, run, workloads

GIB = 2**30
FIELDS = {"status.podIP": "10.1.2.3", "metadata.name": "baton-pod-5d4f7-x2x9z", "metadata.uid": "6c1b2f9e-1a2b"}


def processors(container):
    """How many are requested, as resourceFieldRef says it: rounded up."""
    text = container["resources"]["requests"]["cpu"]
    return math.ceil(float(text.removesuffix("m")) / (1000 if text.endswith("m") else 1))


def environment(objects, container):
    values = {}
    for it in container.get("env", []):
        of = it.get("valueFrom", {})
        if "configMapKeyRef" in of:
            name, key = of["configMapKeyRef"]["name"], of["configMapKeyRef"]["key"]
            values[it["name"]] = by_name(objects)["ConfigMap", name]["data"][key]
        elif of:
            asked = str(processors(container)) if "requests.cpu" in str(of) else FIELDS[of["fieldRef"]["fieldPath"]]
            values[it["name"]] = asked
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


def files_of(objects, workload, secrets):
    """What the pod is given by ConfigMaps and Secrets: {path: (whose it is, text)}, no text where it need not be there."""
    volumes, files = {it["name"]: it for it in pod_of(workload)["volumes"]}, {}
    for mount in container_of(workload)["volumeMounts"]:
        assert "subPath" not in mount, f"{mount}: what is mounted so is never renewed"
        volume = volumes.get(mount["name"], {})
        alone = [{kind: volume[kind]} for kind in ("configMap", "secret") if kind in volume]
        for source in volume.get("projected", {}).get("sources", alone):
            ((kind, of),) = source.items()
            name = of.get("name") or of["secretName"]
            held = secrets.get(name, {}) if kind == "secret" else by_name(objects).get(("ConfigMap", name), {}).get("data", {})
            for item in of.get("items") or [{"key": key, "path": key} for key in held]:
                assert of.get("optional") or item["key"] in held, f"{kind} {name} has no {item['key']}"
                files[f"{mount['mountPath']}/{item['path']}"] = name, held.get(item["key"])
    return files


def check_files(printed, files, name):
    """Every file that a configuration names is one that the pod is given, if it is in one of the folders of those."""
    folders = {path.rsplit("/", 1)[0] + "/" for path in files} | {"/etc/"}
    for path in re.findall(r'"(/[^"]*)"', printed):
        assert path in files or not any(path.startswith(it) for it in folders), f"{name}: no file is at {path}"


def checked(objects, workload, secrets):
    """What the pod's program says of the configuration that it would have, with its files in their places."""
    container, files = container_of(workload), files_of(objects, workload, secrets)
    values = environment(objects, container)
    with tempfile.TemporaryDirectory() as folder:
        moved = lambda text: re.sub(r"(^|[\"'= ])(/etc/)", rf"\1{folder}\2", text, flags=re.M)
        for path, (_, text) in files.items():
            if text is not None:
                (there := pathlib.Path(folder + path)).parent.mkdir(parents=True, exist_ok=True)
                there.write_text(moved(text))
        arguments = [moved(expanded(it, values)) for it in container["args"]]
        done = run(PROGRAMS / f"baton-{container['name']}", *arguments, "--check-config", env={**os.environ, **values})
        done.stdout = done.stdout.replace(folder + "/", "/")
    check_files(done.stdout, files, workload["metadata"]["name"])
    return done


def check_log(config, files, name):
    """What the log tells can be changed while the process runs, and nobody has to say anything of it before."""
    assert files.get(config["process.log.level_file"]) == ("baton-log", None), f"{name}: {config['process.log.level_file']!r}"


# What a component alone says.
UNLESS_SAID = {"controller": {"ascend.ranktable_file": ""}, "coordinator": {"https.client_ca_file": ""}, "server": {}}


def check_no_device():
    """NPUs are reserved for nothing as long as servers compute on the CPU alone, and README.md says so as long."""
    done = run(PROGRAMS / "baton-server", "--set=runtime.device=npu", "--model=/models/m", "--check-config")
    nothing = "there is no device to choose" in done.stderr
    (row,) = re.findall(r"^\| `ascend` \|.*", (KUBERNETES / "README.md").read_text(), re.M)
    assert nothing == ("nothing computes on them yet" in row), (done.stderr, row)


# Of what resources are for, README.md's example, Qwen3-8B: bytes of its weights in bf16, of a token, and tokens of its context.
WEIGHTS, TOKEN, CONTEXT = 16e9, 2 * 36 * 8 * 128 * 2, 40960


def number_of_bytes(text):
    number, unit = re.fullmatch(r"(\d+)([KMG]i)", text).groups()
    return int(number) * 2 ** {"Ki": 10, "Mi": 20, "Gi": 30}[unit]


def memory(workload, of="limits", what="memory"):
    return number_of_bytes(container_of(workload)["resources"][of][what])


def logs(workload):
    return sum(number_of_bytes(it["emptyDir"]["sizeLimit"]) for it in pod_of(workload)["volumes"] if it["name"] == "run")


def check_memory(workload, config, servers=1):
    """The KV cache of each server holds the longest request, and finds room beside the weights, which are there once."""
    cache, name = int(config["runtime.kv_cache_bytes"]), workload["metadata"]["name"]
    assert cache >= CONTEXT * TOKEN, f"{name}: {cache / TOKEN:.0f} tokens"
    assert servers * cache + WEIGHTS < memory(workload), f"{name}: {servers} * {cache} and {WEIGHTS:.0f}"
    # Weights are packed in four fifths, and what was read of the files can go again. The packed ones lie on the node's disk.
    assert servers * cache + 0.8 * WEIGHTS < memory(workload, "requests"), name
    assert 0.8 * WEIGHTS + logs(workload) < memory(workload, "requests", "ephemeral-storage"), name
    assert "ephemeral-storage" not in container_of(workload)["resources"]["limits"], name


def check_cache_said(multi, single):
    """README.md says what it takes a token, and how many each KV cache holds."""
    caches = re.findall(r"kv_cache_bytes ?= ?(\d+)", f"{by_name(multi)} {by_name(single)}")
    several, one = [int(it) for it in caches]
    said = [f"2 * 36 * 8 * 128 * 2 = {TOKEN:,} bytes"]
    said += [f"{several // GIB} GiB for each server, of single node {one // GIB} GiB for each"]
    said += [f"{several // GIB} GiB hold {several // TOKEN:,} tokens", f"{one // GIB} GiB {one // TOKEN:,}, ", f"({CONTEXT:,})"]
    text = " ".join((KUBERNETES / "README.md").read_text().split())
    for it in said:
        assert it in text, f"README.md does not say {it!r}"


def check_expected(service, config, expected):
    for key, value in {**UNLESS_SAID[service], **expected.get(service, {})}.items():
        assert config[key] == value, (service, key, config[key])


def check_configured(objects, secrets, expected={}):
    """Each service's configuration fits its pod, and holds what is expected of it: {service: {key: value}}."""
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
        check_log(config, files_of(objects, it, secrets), name)
        check_expected(container["name"], config, expected)
        # As many threads as processors are asked for: a node may have a hundred.
        assert config["process.worker_threads"] == str(processors(container)), name
        if container["name"] == "server":
            assert config["runtime.threads"] == str(processors(container)), name
            check_memory(it, config)
        listens = {key: int(value.removeprefix("*:")) for key, value in config.items() if key.endswith("listen")}
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


def check_single_node(objects, secrets, expected={}, https=None):
    """Each service's configuration holds what is expected of it, and the files of HTTPS lie there, if anywhere."""
    (workload,) = workloads(objects)
    container, files = container_of(workload), files_of(objects, workload, secrets)
    values = environment(objects, container)
    arguments = [expanded(it, values) for it in container["args"]]
    # All flags are taken; but there is no folder of models on this machine, and nothing is opened elsewhere.
    program, *words = container["command"]
    done = run(PROGRAMS / program, *words, *arguments)
    root = "error: server: model.root: cannot read /models: "
    assert done.returncode == 1 and done.stderr.startswith(root) and values["MODEL"].startswith("/models/"), done.stderr
    settings = [it.removeprefix("--set=").split(".", 1) for it in arguments if it.startswith("--set=")]
    ports = set(ports_of(workload).values())
    where = {"controller": [], "coordinator": ["--controller=127.0.0.1:1"], "server": ["--controller=127.0.0.1:1"]}
    for service, more in where.items():
        own = [f"--set={setting}" for of, setting in settings if of == service]
        more = more if service == "controller" else [*more, "--model=/models/m"]
        printed = output(PROGRAMS / f"baton-{service}", *own, *more, "--check-config")
        assert '"*:' not in printed, printed  # where they listen, `baton up` says alone
        config = read(printed)
        check_files(printed, files, service)
        check_log(config, files, service)
        check_expected(service, config, expected)
        if service == "server":
            check_memory(workload, config, int(values["PREFILL"]) + int(values["DECODE"]))
        if service == "coordinator":
            served_by = {key: config[f"https.{key}_file"] for key in ("cert", "key")}
            ends = {"cert": "crt", "key": "key"}
            assert served_by == {key: https and f"{https}/tls.{end}" or "" for key, end in ends.items()}, served_by
    assert ports == {8000, 8002, 8003} and {"--listen=*:8000", "--metrics-listen=*:8002"} <= {*arguments}, ports
    drains = [seconds(it.split("=")[1]) + 2 for _, it in settings if it.startswith("process.shutdown.drain=")]
    assert sum(drains) + 2 * 7 < pod_of(workload)["terminationGracePeriodSeconds"], drains
