"""The generated messages of ``grpc.health.v1``; ``proto/grpc/health`` is their source."""
