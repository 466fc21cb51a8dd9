"""The Secrets that `deploy/kubernetes/secrets` makes, and those that cert-manager issues."""

import base64
import pathlib
import re
import tempfile

import yaml

from making import KUBERNETES, composed, output, run, told
from references import check_references
from schemas import VERSIONS, check_valid


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


def check_renewed():
    """What is to be renewed has been made in the folder before; if any of it has not, nothing is made or printed."""
    def renewed(folder, *what):
        return run(KUBERNETES / "secrets", "--renew", *what, "--folder", folder)

    def refused(folder, missing, *what):
        before = {it: it.read_bytes() for it in pathlib.Path(folder).rglob("*") if it.is_file()}
        there, done = pathlib.Path(folder).exists(), renewed(folder, *what)
        assert done.returncode == 1 and done.stdout == "", (what, done.stdout)
        assert f"there is no {missing} in {folder}: --folder " in done.stderr, (what, done.stderr)
        after = {it: it.read_bytes() for it in pathlib.Path(folder).rglob("*") if it.is_file()}
        assert after == before and pathlib.Path(folder).exists() == there, f"{what}: {after.keys() - before.keys()}"

    with tempfile.TemporaryDirectory() as folder:
        other = f"{folder}/other"
        missing = {"tls": "ca.key", "https": "ca.key", "etcd": "etcd/ca.key", "handoff": "handoff", "api-keys": "keys.toml"}
        for what, file in missing.items():
            refused(other, file, what)
        refused(other, "ca.key")
        first = made_secrets(folder, "tls", "https")
        refused(folder, "etcd/ca.key")
        refused(folder, "handoff", "tls", "handoff")
        then = decoded_all(output(KUBERNETES / "secrets", "--renew", "tls", "https", "--folder", folder))
        assert then.keys() == first.keys()
        for name, of in then.items():
            assert of["ca.crt"] == first[name]["ca.crt"] and of["tls.crt"] != first[name]["tls.crt"], name
        # Nor is another authority made when a certificate lacks a host.
        (pathlib.Path(folder) / "ca.key").unlink()
        done = run(KUBERNETES / "secrets", "--host", "a.example", "https", "--folder", folder)
        assert done.returncode == 1 and f"no ca.key in {folder}" in done.stderr, done.stderr


def decoded(data):
    return {key: base64.b64decode(value).decode() for key, value in data.items()}


def made_secrets(folder, *arguments):
    printed = output(KUBERNETES / "secrets", *arguments, "--folder", folder)
    assert printed == output(KUBERNETES / "secrets", *arguments, "--folder", folder), "made anew"
    return decoded_all(printed)


def decoded_all(printed):
    objects = list(yaml.safe_load_all(printed))
    check_valid(objects, VERSIONS)
    return {it["metadata"]["name"]: decoded(it["data"]) for it in objects}


def clients_authority():
    """The Secret that `client-certificates` asks for, made as README.md says, and a certificate of its own."""
    with tempfile.TemporaryDirectory() as folder:
        told("deploy/certificates authority", folder)
        told("deploy/certificates issue client", folder)
        secret = told("kubectl create secret generic baton-clients-ca", folder)
        (certificate,) = (pathlib.Path(folder) / "clients").glob("client*.crt")
        output("openssl", "verify", "-CAfile", pathlib.Path(folder) / "clients/ca.crt", certificate)
    return {secret["metadata"]["name"]: decoded(secret["data"])}


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
