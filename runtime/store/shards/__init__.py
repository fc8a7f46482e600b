"""A store's records as safetensors shards, and back."""
