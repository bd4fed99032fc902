"""The C++ extension; everything else about the package stands in pyproject.toml."""

import sys

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

SOURCES = [
    *("bindings", "builder", "cast", "decoder", "image_values", "layout", "memory"),
    *("raw_fields", "resample", "strided_copy", "wire"),
]
FLAGS = ["/O2", "/W3"] if sys.platform == "win32" else ["-O3", "-Wall", "-Wextra"]

setup(
    package_dir={"": "server"},
    ext_modules=[
        Pybind11Extension(
            "layertap._core",
            [f"csrc/{name}.cpp" for name in SOURCES],
            depends=[
                f"csrc/{name}.h"
                for name in [
                    *SOURCES[1:],
                    "dtype",
                    "float_bits",
                    "python_buffer",
                    "shape",
                    "stream_copy",
                    "transpose",
                ]
            ],
            cxx_std=17,
            extra_compile_args=FLAGS,
            # Without a compiler the install goes on, with layertap._pure in the extension's place.
            optional=True,
        )
    ],
)
