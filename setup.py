"""Build of FuseMesh: maps the floors of the tree onto one package and compiles the CPU engine.

Metadata lives in pyproject.toml. This file holds only what needs code: the mapping of the top-level folders to
``fusemesh.kernels``, ``fusemesh.hybrid`` and ``fusemesh.csrc``, and the build of the C++ engine as a plain shared
library (see csrc/). Without a C++ compiler the package still installs; ``fusemesh doctor`` says what is lost.
"""

from setuptools import find_packages, setup

FLOORS = {"fusemesh.kernels": "kernels", "fusemesh.hybrid": "hybrid"}

packages = ["fusemesh", *(f"fusemesh.{name}" for name in find_packages("src/fusemesh")), "fusemesh.csrc"]
for package, folder in FLOORS.items():
    packages += [package, *(f"{package}.{name}" for name in find_packages(folder))]

setup(
    packages=packages,
    package_dir={"fusemesh": "src/fusemesh", "fusemesh.csrc": "csrc", **FLOORS},
    package_data={"fusemesh": ["py.typed"], "fusemesh.csrc": ["*.cpp", "*.h", "*.so"]},
)
