"""What pyproject.toml cannot say: all packages of tetdist, with its weights and configs/."""

from setuptools import find_namespace_packages, find_packages, setup

CONFIGS = {"tetdist.configs": "configs", "tetdist.configs.studies": "configs/studies"}

WEIGHTS = find_namespace_packages(include=["tetdist.pretrained*"])

setup(
    packages=[*find_packages(include=["tetdist*"]), *WEIGHTS, *CONFIGS],
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
