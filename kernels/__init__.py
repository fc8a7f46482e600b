"""Device code: kernel sources, their ahead-of-time build, launchers and references."""
