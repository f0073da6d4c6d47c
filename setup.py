"""Package layout only (metadata is in pyproject.toml): `kernels/` at the top installs as `fastcompat.kernels`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("src"), "fastcompat.kernels"],
    package_dir={"": "src", "fastcompat.kernels": "kernels"},
    package_data={"fastcompat": ["py.typed", "demo/base-model/*"]},
)
