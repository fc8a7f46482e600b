"""Run a command in a network namespace of its own: nothing gets out, and whatever tried is counted.

    python no_network.py COUNT_FILE COMMAND...

The kernel counts in every namespace how often something, a C++ thread or a grandchild included,
asked for a way to an address and there was none. A look-up of a name asks, too.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000


def why_not() -> str | None:
    """Return why this system gives no such namespace, None where it does."""
    script = [sys.executable, __file__, os.devnull, "true"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"no network namespace here: {done.stderr.strip()}"


def run(command: list[str], count_file: Path, env: dict[str, str]) -> int:
    """Run `command` without a network; return how often it asked for one.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    script = [sys.executable, __file__, str(count_file), *command]
    subprocess.run(script, env=env, check=True, capture_output=True, cwd=count_file.parent)
    return int(count_file.read_text())


def enter_namespace() -> None:
    """Leave the system's network; without root's rights by a user namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) and libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        sys.exit(f"unshare: {os.strerror(ctypes.get_errno())}")


def count_attempts() -> int:
    """Return how often this namespace had no route to an address, IPv4 and IPv6."""
    names, values = (
        line.split()[1:]
        for line in Path("/proc/self/net/snmp").read_text().splitlines()
        if line.startswith("Ip:")
    )
    attempts = int(dict(zip(names, values, strict=True))["OutNoRoutes"])
    version_6 = Path("/proc/self/net/snmp6")
    if version_6.exists():
        facts = dict(line.split() for line in version_6.read_text().splitlines())
        attempts += int(facts["Ip6OutNoRoutes"])
    return attempts


if __name__ == "__main__":
    enter_namespace()
    before = count_attempts()
    code = subprocess.run(sys.argv[2:], check=False).returncode
    Path(sys.argv[1]).write_text(str(count_attempts() - before))
    sys.exit(code)
