"""The Open Inference Protocol: the same engine, for clients of Triton, KServe and MLServer."""
