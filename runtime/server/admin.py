"""What only the operator may ask, on a port of its own."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from .host import Host
from .metrics import CONTENT_TYPE


def make_admin_app(host: Host) -> FastAPI:
    """Return the app of the admin port."""
    app = FastAPI(title="edje admin", docs_url=None, redoc_url=None)

    @app.post("/reload")
    def reload() -> Response:
        """Open engine and store anew; answers once the new service has taken over."""
        try:
            host.reload()
        except Exception as error:
            why = str(error) or type(error).__name__
            return JSONResponse({"reloaded": False, "error": why}, 500)
        return JSONResponse({"reloaded": True, "generation": host.generation})

    @app.get("/state")
    def state() -> dict[str, Any]:
        """Return what is served, and how much waits."""
        service = host.service
        assert service is not None
        load = service.load()
        return {
            **host.state(),
            **host.settings.places,
            "num_requests": load.num_requests,
            "num_pairs": load.num_pairs,
            "pairs_per_s": round(load.pairs_per_s, 1),
            "wait_s": round(load.wait_s, 3),
        }

    @app.get("/metrics")
    def metrics() -> Response:
        """Return the counters, for operators who keep them off the public port."""
        return Response(host.metrics.text(), media_type=CONTENT_TYPE)

    return app
