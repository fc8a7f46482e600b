"""Engines: a model bundle made ready for one backend, behind one contract."""
