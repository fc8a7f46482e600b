"""`EdjeReranker` for LanceDB: the rows of a search, in the order of their images.

In process, as LanceDB itself is. A row names its image in a column; pictures that the store lacks
rank last with a score of 0.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from lancedb.rerankers import Reranker as LanceReranker

from ...reranker import Reranker


class EdjeReranker(LanceReranker):
    """Reranks vector, full-text and hybrid results; the reranker stays the caller's."""

    def __init__(self, reranker: Reranker, column: str = "id", return_score: str = "relevance"):
        """`column`: holds the images' ids; `return_score`: `relevance`, or `all` scores kept."""
        super().__init__(return_score)
        self._reranker, self._column = reranker, column

    def rerank_hybrid(
        self, query: str, vector_results: pa.Table, fts_results: pa.Table
    ) -> pa.Table:
        """Rerank what either search found."""
        merge = self._merge_and_keep_scores if self.score == "all" else self.merge_results
        return self._keep_relevance_score(self._ranked(query, merge(vector_results, fts_results)))

    def rerank_vector(self, query: str, vector_results: pa.Table) -> pa.Table:
        """Rerank what a vector search found."""
        return self._keep_relevance_score(self._ranked(query, vector_results))

    def rerank_fts(self, query: str, fts_results: pa.Table) -> pa.Table:
        """Rerank what a full-text search found."""
        return self._keep_relevance_score(self._ranked(query, fts_results))

    def _ranked(self, query: str, rows: pa.Table) -> pa.Table:
        if not len(rows):
            return self._handle_empty_results(rows)
        ids = rows[self._column].to_pylist()
        logits = np.full(len(rows), -np.inf, np.float32)
        for hit in self._reranker.rank(query, ids, missing="skip").hits:
            logits[hit.index] = hit.score
        order = np.argsort(-logits, kind="stable")
        with np.errstate(over="ignore"):  # exp(inf): a score of 0
            scores = 1.0 / (1.0 + np.exp(-logits[order].astype(np.float64)))
        return rows.take(order).append_column("_relevance_score", pa.array(scores, pa.float32()))
