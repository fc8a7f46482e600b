"""Bundles become engines: one asked for, the fastest faithful one, and a cache of those built."""
