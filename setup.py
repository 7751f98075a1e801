"""Build of the distribution. Everything is declared in pyproject.toml; there are no compiled extensions yet."""

from setuptools import setup

setup()
