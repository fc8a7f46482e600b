"""The command line; `main` runs it."""

from .app import main as main
