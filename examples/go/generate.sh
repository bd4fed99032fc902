#!/bin/sh
# Writes the messages and the stubs into layertap/v1/. The plugins are built at go.mod's versions;
# protoc is the one in PATH.
set -eu
messages=$(go tool -n protoc-gen-go)
stubs=$(go tool -n protoc-gen-go-grpc)
exec protoc -I ../../proto --plugin="$messages" --plugin="$stubs" \
  --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative \
  layertap/v1/tensor.proto layertap/v1/catalogue.proto layertap/v1/feature_service.proto
