"""Packages of the distribution; everything else is in pyproject.toml.

Only ``m3bsr`` is installed: ``datasets/`` is no package, and would shadow the Hugging Face ``datasets`` if it were.
"""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["m3bsr", "m3bsr.*"]))
