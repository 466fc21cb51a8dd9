"""What is made is valid, and names no field that there is not."""

import copy
import functools
import importlib
import itertools
import json
import os
import pathlib
import re

import jsonschema
import kubernetes_validate
import referencing
import referencing.jsonschema

SCHEMAS = [
    pathlib.Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema",
    pathlib.Path(os.environ["BATON_TEST_KUBERNETES_SCHEMAS"]),
]
VERSIONS = ["1.21", "1.22", "1.23", "1.25", "1.28", "1.31", "1.34", "1.37"]
# Of what the component `kubernetes-1.20` makes.
OLD_VERSIONS = ["1.20", "1.22", "1.24"]
# What an earlier API server does not know, as README.md says.
SINCE = {("autoscaling/v2", "HorizontalPodAutoscaler"): "1.23"}
# What is no part of Kubernetes, and the package that knows it.
CUSTOM = {"cert-manager.io/v1": "cert_manager", "monitoring.coreos.com/v1": "prometheus_operator"}


@functools.cache
def validator(version, api_version, kind):
    folder = next(it for it in (base / f"v{version}.0-local-strict" for base in SCHEMAS) if it.exists())
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)

    @functools.cache
    def read(uri):
        content = json.loads((folder / uri.rsplit("/", 1)[-1]).read_text())
        return referencing.Resource.from_contents(content, referencing.jsonschema.DRAFT202012)

    name = f"{kind.lower()}-{group}.json"
    assert (folder / name).exists(), f"{version} knows no {kind} of {api_version}"
    schema = read(name).contents
    return jsonschema.Draft202012Validator(schema, registry=referencing.Registry(retrieve=read))


def strict(schema):
    """The schema, changed so that an object has no fields but those that it names."""
    if isinstance(schema, dict) and "properties" in schema:
        schema.setdefault("additionalProperties", False)
    for it in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        strict(it)
    return schema


@functools.cache
def custom_validator(api_version, kind):
    model = getattr(importlib.import_module(f"cloudcoil.models.{CUSTOM[api_version]}.v1"), kind)
    return jsonschema.Draft202012Validator(strict(model.model_json_schema(by_alias=True)))


def fields_of(kind, version):
    """The names of the fields of what is a part of objects, `podspec` or `container`."""
    folder = next(it for it in (base / f"v{version}.0-local-strict" for base in SCHEMAS) if it.exists())
    schema = json.loads((folder / f"{kind}-v1.json").read_text())
    if "$ref" in schema:
        file, _, way = schema["$ref"].partition("#/")
        schema = functools.reduce(dict.get, way.split("/"), json.loads((folder / file.rsplit("/", 1)[-1]).read_text()))
    return schema["properties"].keys()


def number(version):
    return [int(it) for it in version.split(".")]


def faults(it, version):
    of = custom_validator if it["apiVersion"] in CUSTOM else functools.partial(validator, version)
    return list(of(it["apiVersion"], it["kind"]).iter_errors(it))


def check_valid(objects, versions, since=SINCE):
    for version, it in itertools.product(versions, objects):
        if it["apiVersion"] in CUSTOM and version != versions[0]:
            continue  # has a version of its own
        if number(version) < number(since.get((it["apiVersion"], it["kind"]), version)):
            continue
        if error := jsonschema.exceptions.best_match(faults(it, version)):
            raise AssertionError(f"{it['kind']} {it['metadata']['name']} by {version}: {error.json_path}: {error.message}")


FREE = {"labels", "annotations", "matchLabels"}


def places(it):
    """The object and all those in it that have fields of fixed names."""
    if isinstance(it, dict):
        yield it
        for key, one in it.items():
            yield from places(one) if key not in FREE else ()
    elif isinstance(it, list):
        for one in it:
            yield from places(one)


def check_strict(objects):
    """No place in objects that are no part of Kubernetes has room for an unknown field."""
    kinds = {it["kind"]: it for it in objects if it["apiVersion"] in CUSTOM}
    for it in map(copy.deepcopy, kinds.values()):
        assert not faults(it, VERSIONS[-1])
        for place in places(it):
            place["unknown"] = "field"
            assert faults(it, VERSIONS[-1]), f"{it['kind']} may have any field in {place}"
            del place["unknown"]
    return kinds.keys()
