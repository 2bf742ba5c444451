"""`python -m pyronat` is the command `pyronat`."""

from pyronat.cli import run

run()
