"""Reading records: plans carried out by a few threads, every record verified."""
