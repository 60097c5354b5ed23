"""What pyproject.toml cannot say: all packages of tetdist, and configs/ as one of them."""

from setuptools import find_packages, setup

CONFIGS = {"tetdist.configs": "configs", "tetdist.configs.studies": "configs/studies"}

setup(
    packages=[*find_packages(include=["tetdist*"]), *CONFIGS],
    package_dir=CONFIGS,
    py_modules=["tetdist_command"],
    package_data={
        "tetdist": ["pretrained/*/*"],
        "tetdist.nn.fast.kernels": ["*.cpp", "*.h"],
        "tetdist.apps.reports": ["published_curves.yaml"],
        "tetdist.apps.weights": ["published.yaml"],
        "tetdist.configs": ["*.yaml", "studies/*.yaml"],
    },
)
