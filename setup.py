"""The native kernel of the views; everything else about the package is in pyproject.toml.

Optional: where it cannot be built (no C compiler), the package installs without it and uses OpenCV and Pillow.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "mocov3.data.views.native._views",
            ["mocov3/data/views/native/views.c"],
            # no contraction: the same pixels on every processor; no trapping or errno: loops become vector instructions
            extra_compile_args=["-std=gnu11", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"],
            optional=True,
        )
    ]
)
