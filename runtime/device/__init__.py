"""Devices: memory, streams and events behind one small protocol."""
