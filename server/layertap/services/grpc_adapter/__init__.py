"""The gRPC transport: makes a Caller from gRPC's context, and gRPC statuses from errors."""
