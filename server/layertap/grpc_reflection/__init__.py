"""The generated messages of gRPC's reflection; ``proto/grpc/reflection`` is their source."""
