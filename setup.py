"""Adds the DeepSpeed JSONs in ds_configs/ to the package, as dsclip/ds_configs; all else is in setup.cfg."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dsclip", "dsclip.*"]), "dsclip.ds_configs"],
    package_dir={"dsclip.ds_configs": "ds_configs"},
)
