"""The server's app: FastAPI for what is asked seldom, the front for what is asked always."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from ... import __version__
from ...errors import EdjeError
from . import kserve
from .docs import HEADERS as docs_headers
from .docs import docs_page
from .front import OPEN_PATHS, App, Front
from .host import Host
from .identity import MEDIA_TYPE, SCORER_HEADER
from .metrics import CONTENT_TYPE
from .openapi import complete, refused
from .pages import add_page
from .refusals import Fault, Refusal, refusal_of

TITLE = "edje"
SUMMARY = "Reranks images of a token store for text queries."


def make_app(host: Host) -> App:
    """Return the ASGI app that serves `host`."""
    app = FastAPI(title=TITLE, summary=SUMMARY, version=__version__, docs_url=None, redoc_url=None)
    _add_health(app, host)
    _add_models(app, host)
    _add_kserve(app, host)
    _add_ids(app, host)
    add_page(app, host)
    _add_refusals(app)

    @app.get("/metrics", tags=["operations"], response_class=Response)
    def metrics() -> Response:
        """Return the counters, as Prometheus reads them."""
        return Response(host.metrics.text(), media_type=CONTENT_TYPE)

    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            settings = host.settings
            app.openapi_schema = complete(
                made(), settings.model, needs_key=bool(settings.keys), open_paths=OPEN_PATHS
            )
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    def docs() -> Response:
        return HTMLResponse(docs_page(app.openapi()), headers=docs_headers)

    return Front(host, app)


def _add_refusals(app: FastAPI) -> None:
    """Answer what cannot be served in the one body that all clients read."""

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> Response:
        refusal = Refusal(error.status_code, str(error.detail), reason="http")
        body = refusal.body("kserve" if kserve.is_kserve(request.url.path) else "none")
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        faults = [Fault(tuple(one["loc"][1:]), one["msg"]) for one in error.errors()]
        named = "; ".join(f"{'.'.join(map(str, f.where))}: {f.message}" for f in faults)
        return JSONResponse(Refusal(422, named, faults).body(), 422)

    @app.exception_handler(Refusal)
    @app.exception_handler(EdjeError)
    async def failed(_: Request, error: Exception) -> Response:
        refusal = refusal_of(error)
        return JSONResponse(refusal.body(), refusal.status, headers=dict(refusal.headers))


def _add_health(app: FastAPI, host: Host) -> None:
    """Add what an orchestrator asks."""

    async def live() -> dict[str, bool]:
        """Say that the event loop runs."""
        return {"live": True}

    async def ready() -> Response:
        """Say whether a known pair was scored lately, and right; 503 where not."""
        return JSONResponse(host.state(), 200 if host.ready else 503)

    refused_ready: Any = {503: {"description": "Not ready; `why` says of what."}}
    for path in ("/livez", "/ping", "/v2/health/live"):
        app.add_api_route(path, live, methods=["GET"], tags=["operations"])
    for path in ("/readyz", "/health", "/healthz", "/v2/health/ready"):
        app.add_api_route(
            path, ready, methods=["GET"], tags=["operations"], responses=refused_ready
        )


def _add_models(app: FastAPI, host: Host) -> None:
    """Add what clients ask about the model."""
    name = host.settings.model

    @app.get("/v1/models", tags=["models"])
    @app.get("/models", tags=["models"], include_in_schema=False)
    async def models() -> dict[str, Any]:
        """List the one model, as OpenAI's and NVIDIA's clients ask for it."""
        model = {"id": name, "object": "model", "created": 0, "owned_by": TITLE}
        return {"object": "list", "data": [model]}

    @app.get("/info", tags=["models"])
    async def info() -> dict[str, Any]:
        """Say what runs and how its scores are to be read; TEI's fields are among them."""
        service = host.service
        assert service is not None
        return {
            "model_id": name,
            "model_type": {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
            "version": __version__,
            "score_type": "sigmoid",
            "scores": "sigmoid in 0 to 1 of a float32 logit, which ranks; raw_scores gives logits",
            **service.facts(),
            "max_client_batch_size": None,
            "unknown_ids": service.options.unknown,
            "generation": host.generation,
        }


def _add_ids(app: FastAPI, host: Host) -> None:
    """Add what a router asks, to learn which ids are here."""

    @app.get(
        "/ids/digests",
        tags=["route"],
        response_class=Response,
        responses={
            200: {"content": {MEDIA_TYPE: {}}},
            304: {"description": "As the `If-None-Match` of the request has it."},
            **refused(_404="This server has no store itself: ask the shards."),
        },
    )
    def digests(request: Request) -> Response:
        """Return the sorted xxh3-128 digests of all ids, the low 8 bytes of each, little-endian.

        The ETag changes with the ids and with the scorer; with `If-None-Match` it costs nothing.
        """
        service = host.service
        identity = None if service is None else service.identity()
        if identity is None:
            raise HTTPException(404, "there is no store here: ask the shards")
        headers = {"etag": f'"{identity.tag}"', SCORER_HEADER: identity.scorer}
        if identity.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(identity.to_bytes(), media_type=MEDIA_TYPE, headers=headers)


def _add_kserve(app: FastAPI, host: Host) -> None:
    """Add what clients of KServe's protocol ask about the model."""
    name = host.settings.model
    no_such_model = refused(_404="There is no model of this name.")
    not_ready: Any = {503: {"description": "Not ready."}, **no_such_model}

    @app.get("/v2", tags=["kserve"])
    async def server() -> dict[str, Any]:
        """Say what server this is, as KServe asks."""
        return {"name": TITLE, "version": __version__, "extensions": ["binary_tensor_data"]}

    @app.get("/v2/models/{model}", tags=["kserve"], responses=no_such_model)
    @app.get("/v2/models/{model}/versions/1", tags=["kserve"], include_in_schema=False)
    async def metadata(model: str) -> dict[str, Any]:
        """Describe the model's tensors, as KServe asks."""
        _check(model)
        tensors = {"inputs": kserve.INPUTS, "outputs": kserve.OUTPUTS}
        return {"name": name, "versions": ["1"], "platform": TITLE, **tensors}

    @app.get("/v2/models/{model}/ready", tags=["kserve"], responses=not_ready)
    @app.get("/v2/models/{model}/versions/1/ready", tags=["kserve"], include_in_schema=False)
    async def model_ready(model: str) -> Response:
        """Say whether the model is ready, as KServe asks."""
        _check(model)
        return JSONResponse(host.state(), 200 if host.ready else 503)

    @app.get("/v2/models/{model}/config", tags=["kserve"], responses=no_such_model)
    async def config(model: str) -> dict[str, Any]:
        """Describe the model as Triton's clients ask for it."""
        _check(model)
        return {"name": name, "platform": TITLE, "max_batch_size": 0, "backend": TITLE}

    def _check(model: str) -> None:
        if model != name:
            raise HTTPException(404, f"there is no model {model[:80]!r} here, but {name!r}")
