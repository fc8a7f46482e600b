"""How the tiny model in `demo/model` was made: scenes in, official-layout weights out."""
