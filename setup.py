"""Package layout and the C++ extension (metadata is in pyproject.toml).

`kernels/` at the top installs as `fastcompat.kernels`; `csrc/` becomes `fastcompat._native`, built without torch.
Without a C++ compiler the package installs without the extension, and the torch path serves.
"""

import os
from pathlib import Path

from setuptools import find_packages, setup

try:
    from pybind11.setup_helpers import Pybind11Extension, build_ext
except ImportError:  # built without isolation on a machine that has no pybind11
    native = []
    commands = {}
else:
    # Products and sums round where the source says so, on every compiler: equal bits depend on it.
    flags = (
        ["-O3", "-ffp-contract=off", *os.environ.get("FASTCOMPAT_CXXFLAGS", "").split()] if os.name == "posix" else []
    )
    native = [
        Pybind11Extension(
            "fastcompat._native",
            sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            cxx_std=17,
            extra_compile_args=flags,
            libraries=["dl", "pthread"] if os.name == "posix" and os.uname().sysname == "Linux" else [],
            # FASTCOMPAT_NATIVE=required: without it there is no wheel.
            optional=os.environ.get("FASTCOMPAT_NATIVE") != "required",
        )
    ]
    commands = {"build_ext": build_ext}

setup(
    packages=[*find_packages("src"), "fastcompat.kernels"],
    package_dir={"": "src", "fastcompat.kernels": "kernels"},
    package_data={
        "fastcompat": [
            "py.typed",
            *("demo/base-model/*", "demo/reward-model/*"),
            *("decisions/validation/paper/*.csv", "decisions/validation/paper/README.md"),
            *("report/*.jinja", "report/*.css", "report/*.js"),
        ]
    },
    ext_modules=native,
    cmdclass=commands,
)
