"""The app as a factory, for HTTP servers that want an import path: granian, hypercorn, uvicorn.

`edje serve` does more: grace before its end, reload on SIGHUP, an exit code when the engine dies.
"""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import RequestError
from .app import make_app
from .bodies import Receive
from .front import App, Scope, Send
from .host import Host
from .logs import JsonLog
from .settings import Settings


def app() -> App:
    """Open EDJE_ENGINE over EDJE_STORE and return what serves them; closed with the lifespan.

    EDJE_API_KEYS: bearer keys, separated by commas. One worker: each opens an engine of its own.

    Raises:
        RequestError: a variable is not set.
        EdjeError: engine or store cannot be opened.
    """
    names = ("EDJE_ENGINE", "EDJE_STORE")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise RequestError(f"{' and '.join(missing)} must name a folder, got nothing")
    engine, store = (Path(os.environ[name]) for name in names)
    keys = [key for key in os.environ.get("EDJE_API_KEYS", "").split(",") if key]
    host = Host(Settings(engine, store, keys=keys), JsonLog())
    served = make_app(host)

    async def with_end(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await served(scope, receive, send)
            return
        while True:
            what = (await receive())["type"]
            if what == "lifespan.shutdown":
                host.close()
                host.log.close()
            await send({"type": f"{what}.complete"})
            if what == "lifespan.shutdown":
                return

    return with_end
