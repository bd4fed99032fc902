#!/bin/sh
# Writes the messages and the stubs into layertapv1/. The plugins are built at go.mod's versions;
# protoc is the one in PATH.
set -eu
module=layertap.example/client
files="layertap/v1/tensor.proto layertap/v1/catalogue.proto layertap/v1/feature_service.proto"

# The .proto files name no language's package, so Go's is told here, for each of them.
set -- --go_opt=module=$module --go-grpc_opt=module=$module
for file in $files; do
  set -- "$@" --go_opt="M$file=$module/layertapv1" --go-grpc_opt="M$file=$module/layertapv1"
done
messages=$(go tool -n protoc-gen-go)
stubs=$(go tool -n protoc-gen-go-grpc)
exec protoc -I ../../proto --plugin="$messages" --plugin="$stubs" --go_out=. --go-grpc_out=. \
  "$@" $files
