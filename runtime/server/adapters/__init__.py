"""Rerankers for other libraries, in this process on a `Reranker`: import the module of yours.

`lancedb`, `haystack` and `langchain` each need the library that they are named after. Who would
rather ask an `edje serve` needs none of them: the libraries' own Cohere clients speak to it.
"""
