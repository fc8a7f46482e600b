"""`edje route`: one store over several servers; ids -> shards, scatter, merge."""
