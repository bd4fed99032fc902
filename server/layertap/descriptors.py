"""The descriptor pool in which all of layertap's generated messages are registered.

We don't use protobuf's default pool, because the whole process shares it. Other packages with the
Open Inference Protocol (tritonclient, kserve) register messages with the same names there from
other files, and protobuf rejects the second registration.
"""

from google.protobuf.descriptor_pool import DescriptorPool

__all__ = ["POOL"]

POOL = DescriptorPool()
