"""The gRPC transport: gRPC's context becomes a Caller, and errors become gRPC's statuses."""
