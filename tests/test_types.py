"""What a type checker sees of the package: the public names, and no others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import edje

ROOT = Path(__file__).parent.parent

SNIPPET = """
import edje
from edje import Reranker, StoppedError, TokenStore

def stopped(error: StoppedError) -> tuple[int, int]:
    return error.num_scored, error.num_asked

def opened(path: str) -> TokenStore:
    return TokenStore.open(path)

edje.Rerankr
from edje import TokenStor
opened(3)
"""


def test_a_misspelt_name_is_an_error_to_a_type_checker_and_a_right_one_is_not(
    tmp_path: Path,
) -> None:
    """The package stands in for its modules' types: mypy reads them, and no library, anew."""
    (tmp_path / "snippet.py").write_text(SNIPPET, encoding="utf-8")
    (tmp_path / "edje").symlink_to(ROOT)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    command += ["--ignore-missing-imports", "--no-incremental", "snippet.py"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = [line for line in shown.stdout.splitlines() if line.startswith("snippet.py:")]
    assert len(found) == 3, shown.stdout + shown.stderr
    assert 'has no attribute "Rerankr"' in found[0]
    assert 'has no attribute "TokenStor"' in found[1]
    assert 'incompatible type "int"' in found[2]


def test_every_public_name_is_typed_where_it_is_handed_out() -> None:
    source = (ROOT / "__init__.py").read_text(encoding="utf-8")
    typed = source.partition("if TYPE_CHECKING:")[2].partition("__version__")[0]
    assert [name for name in edje.__all__ if name != "__version__" and name not in typed] == []
