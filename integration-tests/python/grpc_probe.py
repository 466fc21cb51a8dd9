"""What a stranger with standard gRPC tools sees: health by grpc.health.v1, and services by reflection.

Called by tests/services.rs as `grpc_probe.py ADDRESS SERVICE...`; fails unless the process is SERVING and lists every
SERVICE.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

address, expected = sys.argv[1], sys.argv[2:]
with grpc.insecure_channel(address) as channel:
    status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True).status
    assert status == health_pb2.HealthCheckResponse.SERVING, status
    database = ProtoReflectionDescriptorDatabase(channel)
    listed = database.get_services()
    missing = [service for service in expected if service not in listed]
    assert not missing, f"{missing} not among {listed}"
    for service in expected:
        # The descriptor itself, not just its name.
        described = database.FindFileContainingSymbol(service).service
        assert any(entry.name == service.rsplit(".", 1)[1] and entry.method for entry in described), service
