"""Write the API page: every public name of the package, from its docstring.

Usage: python .ci/api_docs.py [OUT], `build/docs` by default
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pdoc

# The packages whose `__all__` is public.
FACES = (
    *("edje", "edje.engines", "edje.runtime.store", "edje.runtime.indexing"),
    "edje.runtime.server",
)


def main(out: Path) -> None:
    """Write the pages into the folder `out`."""
    for name in FACES:
        face = import_module(name)
        for public in face.__all__:
            getattr(face, public)  # pdoc sees what was imported, these wait until asked for
    pdoc.render.configure(docformat="google", include_undocumented=False, show_source=False)
    without_modules = (spec for name in FACES for spec in (name, f"!{name}\\..+"))
    pdoc.pdoc(*without_modules, output_directory=out)
    print(f"the API page is {out / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build/docs"))
