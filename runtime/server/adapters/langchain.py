"""`EdjeCompressor` for LangChain: a document compressor that ranks documents by their images.

In process: over HTTP, `CohereRerank(base_url=...)` of langchain-cohere already speaks to `edje
serve`. A document names its image in `metadata`, or is nothing but its id. Documents whose image
the store lacks or could not read are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict

from ...reranker import Reranker


class EdjeCompressor(BaseDocumentCompressor):
    """Keeps the best documents of a retriever; the reranker stays the caller's.

    Attributes:
        reranker: an open one; safe to share between chains and threads.
        top_n: how many documents to keep; None: all.
        metadata_field: holds the image's id; None: `page_content` is the id.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    reranker: Reranker
    top_n: int | None = 10
    metadata_field: str | None = None

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Return the best, best first; `relevance_score` in the metadata is the logit's sigmoid."""
        if not documents:
            return []
        ids = [self._id(document) for document in documents]
        result = self.reranker.rank(query, ids, top_k=self.top_n, missing="skip")
        ranked = ((documents[hit.index], _sigmoid(hit.score)) for hit in result.hits)
        return [_with(document, relevance_score=score) for document, score in ranked]

    def _id(self, document: Document) -> str:
        if self.metadata_field is None:
            return str(document.page_content)
        return str(document.metadata.get(self.metadata_field, ""))


def _with(document: Document, **metadata: Any) -> Document:
    """Return a copy: the retriever's own documents are left as they are."""
    copied: Document = document.model_copy(update={"metadata": {**document.metadata, **metadata}})
    return copied


def _sigmoid(logit: float) -> float:
    """Never overflows: exp is only taken of what is not positive."""
    return 1.0 / (1.0 + exp(-logit)) if logit >= 0 else exp(logit) / (1.0 + exp(logit))
