"""Tokens kept close to the engine: which, where, and how a batch finds them."""
