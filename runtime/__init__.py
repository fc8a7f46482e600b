"""The online path: token store, text, batches, device, pipeline, reranker, command line."""
