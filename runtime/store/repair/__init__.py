"""Verifying a whole store, and mending what is known twice."""
