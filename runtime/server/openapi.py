"""What FastAPI cannot know of the OpenAPI document: hot routes, which read raw bodies; refusals."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_TEXT = {"type": "string"}
_COUNT = {"type": ["integer", "null"], "minimum": 0, "description": "Null and 0 are all."}
_FLAG = {"type": ["boolean", "null"]}
_QUERY = {"type": "string", "pattern": r"\S", "examples": ["a dog in the snow"]}
_USAGE = {
    "type": "object",
    "properties": {"prompt_tokens": {"type": "integer"}, "total_tokens": {"type": "integer"}},
}
_MODEL = {"type": ["string", "null"], "description": "Any name; the answer says it again."}


def _object(required: str = "", **properties: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        made["required"] = required.split()
    return made


def _list(item: Mapping[str, Any], *, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": item, **({"minItems": least} if least else {})}


_DOCUMENT = {
    "description": "The id of a stored image.",
    "anyOf": [
        _TEXT,
        _object("id", id=_TEXT),
        _object("text", text=_TEXT),
        _object("image", image=_TEXT),
    ],
}
_DOCUMENTS = _list(_DOCUMENT, least=1)
_IDS = _list(_TEXT, least=1)

_ERROR = _object(
    "message detail error error_type",
    message=_TEXT,
    title=_TEXT,
    detail={
        "description": "At 422 a list of all faults but in Voyage's dialect; else a sentence.",
        "oneOf": [_list(_object("loc msg type", loc=_list({}), msg=_TEXT, type=_TEXT)), _TEXT],
    },
    error={"description": "An object; a sentence at 401, and for TEI, KServe and Voyage."},
    error_type=_TEXT,
)
_ERROR_BODY = {"content": {"application/json": {"schema": _ERROR}}}
NO_KEY = "No API key, or one that is not known."
_STATUSES = {
    "400": "The body is no JSON.",
    "401": NO_KEY,
    "408": "The body did not come.",
    "413": "The body is too large.",
    "422": "A field cannot be used, or the store lacks an id; all faults are named.",
    "429": "Too much waits; `Retry-After` says for how long.",
    "500": "The engine or the store failed.",
    "503": "The server is ending; another takes the request.",
    "504": "The deadline passed.",
}
_RERANK = _object(
    "query documents",
    query=_QUERY,
    documents=_DOCUMENTS,
    top_n=_COUNT,
    top_k=_COUNT,
    raw_scores=_FLAG,
    return_documents=_FLAG,
    model=_MODEL,
)
_TEI = _object(
    "query texts", query=_QUERY, texts=_IDS, raw_scores=_FLAG, return_text=_FLAG, top_n=_COUNT
)
_RESULT = _object("index relevance_score", index={"type": "integer"}, relevance_score={})
_RERANKED = _object(
    "",
    id=_TEXT,
    object=_TEXT,
    created={"type": "integer"},
    model=_TEXT,
    results=_list(_RESULT),
    data=_list(_RESULT),
    usage=_USAGE,
    meta={"type": "object"},
    score_type={"enum": ["sigmoid", "logit"]},
    errors=_list(_object("index id message", index={"type": "integer"}, id=_TEXT, message=_TEXT)),
)
_TEI_RANKED = _list(_object("index score", index={"type": "integer"}, score={}, text=_TEXT))
_NVIDIA = _object(
    "query passages",
    query=_object("text", text=_QUERY),
    passages=_list(_object("text", text=_TEXT), least=1),
    top_n=_COUNT,
    model=_MODEL,
)
_NVIDIA_RANKED = _object(
    "rankings", rankings=_list(_object("index logit", index={"type": "integer"}, logit={}))
)
_SCORE = _object(
    "text_1 text_2",
    text_1=_QUERY,
    text_2={"anyOf": [_TEXT, _DOCUMENTS]},
    use_activation=_FLAG,
    model=_MODEL,
)
_SCORED = _object("data", data=_list(_object("index score", index={"type": "integer"}, score={})))
_TENSOR = _object(
    "name datatype shape",
    name=_TEXT,
    datatype={"enum": ["BYTES", "INT64", "FP32"]},
    shape=_list({"type": "integer", "minimum": 0}),
    data=_list({}),
    parameters={"type": "object"},
)
_INFER = _object("inputs", id=_TEXT, inputs=_list(_TENSOR), outputs=_list({"type": "object"}))
_INFERRED = _object("outputs", id=_TEXT, model_name=_TEXT, outputs=_list(_TENSOR))


def refused(**statuses: str) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route: what it refuses, as `_404="why"`."""
    return {name[1:]: {"description": why, **_ERROR_BODY} for name, why in statuses.items()}


def complete(
    document: dict[str, Any], model: str, *, needs_key: bool, open_paths: Collection[str]
) -> dict[str, Any]:
    """Add the hot routes, and that a key is needed where it is.

    Args:
        document: FastAPI's.
        model: KServe's name of the model.
        open_paths: that need no key.
    """
    paths = document["paths"] = {**hot_paths(model), **document["paths"]}
    for operation in (each for methods in paths.values() for each in methods.values()):
        if "422" in operation["responses"]:  # FastAPI tells another body than ours
            operation["responses"]["422"] = {"description": _STATUSES["422"], **_ERROR_BODY}
    if needs_key:
        schemes = {"bearer": {"type": "http", "scheme": "bearer"}}
        document.setdefault("components", {})["securitySchemes"] = schemes
        for path in paths.keys() - set(open_paths):
            for operation in paths[path].values():
                operation["security"] = [{"bearer": []}]
                operation["responses"]["401"] = {"description": NO_KEY, **_ERROR_BODY}
    return document


def hot_paths(model: str) -> dict[str, Any]:
    """Return the OpenAPI paths of the hot routes; `model`: KServe's name of it."""
    rerank = _post(
        "Rank stored images for a query: Cohere, Jina, vLLM, Infinity, Voyage; TEI by `texts`.",
        {"anyOf": [_RERANK, _TEI]},
        {"anyOf": [_RERANKED, _TEI_RANKED]},
    )
    ranking = _post("Rank as NVIDIA's retrieval NIM does: raw logits.", _NVIDIA, _NVIDIA_RANKED)
    score = _post("Score as vLLM does: in the order sent.", _SCORE, _SCORED)
    infer = _post(
        "Score as KServe's protocol 2 does; binary tensors for many candidates.", _INFER, _INFERRED
    )
    retrieval = {**ranking, "parameters": [_path_parameter("model")]}
    return {
        **{path: {"post": rerank} for path in ("/rerank", "/v1/rerank", "/v2/rerank")},
        **{path: {"post": score} for path in ("/score", "/v1/score")},
        **{path: {"post": ranking} for path in ("/ranking", "/v1/ranking")},
        "/v1/retrieval/{model}/reranking": {"post": retrieval},
        f"/v2/models/{model}/infer": {"post": infer},
    }


def _post(what: str, request: Mapping[str, Any], response: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "summary": what,
        "tags": ["rerank"],
        "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
        "responses": {
            "200": {
                "description": "The ranking.",
                "content": {"application/json": {"schema": response}},
            },
            **{code: {"description": why, **_ERROR_BODY} for code, why in _STATUSES.items()},
        },
    }


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": _TEXT}
