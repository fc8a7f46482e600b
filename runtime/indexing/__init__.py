"""Images -> image encoder -> token store: sources, decoders, the flow between, many machines."""
