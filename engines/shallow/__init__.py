"""The joint encoder's first layers as an engine of their own: to rule out what cannot win."""
