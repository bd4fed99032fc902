"""The descriptor pool that all of our generated messages are registered in.

A pool of our own, not protobuf's default one: that is shared by the whole process, where another
package that carries the Open Inference Protocol (tritonclient, kserve) registers messages of the
same names from other files, and protobuf refuses whichever comes second.
"""

from google.protobuf.descriptor_pool import DescriptorPool

__all__ = ["POOL"]

POOL = DescriptorPool()
