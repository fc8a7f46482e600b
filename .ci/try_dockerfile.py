"""Execute a Dockerfile's steps in order without docker, then run what came out as a container.

Each stage is a folder that begins as a copy of BASE; steps run there with `bwrap`. The last stage
is started as an orchestrator would: read-only root, a user of its own, process 1 of its own
namespace, no network but loopback. It is asked, checked by HEALTHCHECK and ended with SIGTERM while
a request is in flight. Prints seconds and sizes; exit 1 where something is not as it should be.

Needs root, Linux, bubblewrap, debootstrap (once, to make BASE) and a package registry. What it
cannot show: the published base image and the layers' cache.

Usage: python .ci/try_dockerfile.py DOCKERFILE ENGINE STORE --folder NEW [--base BASE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
# What a build reads of this machine: names, certificates, and where pip finds packages.
OF_THE_MACHINE = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs", "/etc/pip.conf", "/etc/xdg")
START_S = 60.0
NUM_REQUESTS = 12
ASKING = """
import json, threading, time, urllib.request as u
ids, answered = {ids}, []
def ask():
    body = json.dumps(dict(query="a large red circle", documents=ids)).encode()
    answer = json.load(u.urlopen(u.Request("http://127.0.0.1:8000/v2/rerank", body)))
    answered.append(len(answer["results"]) == len(ids))
threads = [threading.Thread(target=ask) for _ in range({number})]
for each in threads: each.start()
time.sleep(0.3)
print("sent", flush=True)
for each in threads: each.join()
print(sum(answered))
"""


@dataclass
class Stage:
    """One stage: where it lies, and what its steps have set."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)
    args: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0"
    stop_signal: str = "SIGTERM"
    health: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Yield (name, arguments) of each instruction; continued lines joined, comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name.upper(), rest.strip()


def ignored(patterns: Sequence[str], path: str) -> bool:
    """Whether .dockerignore keeps a file out: the last pattern that meets it or a parent counts."""
    parts = path.split("/")
    parents = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    out = False
    for pattern in patterns:
        bare = pattern.lstrip("!").rstrip("/")
        written = re.escape(bare).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(written, parent) for parent in parents):
            out = not pattern.startswith("!")
    return out


def context_files(root: Path) -> list[str]:
    """Return what the build may see, as .dockerignore says."""
    lines = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in (".git", ".venv", ".mypy", ".cache")]
        for name in names:
            path = (Path(folder) / name).relative_to(root).as_posix()
            if not ignored(patterns, path):
                found.append(path)
    return sorted(found)


class Build:
    """Walks through a Dockerfile; `stages[-1]` is what came out."""

    def __init__(self, folder: Path, base: Path, context: Path, shared: Sequence[str]):
        self.folder, self.base, self.context, self.shared = folder, base, context, shared
        self.stages: list[Stage] = []
        self.names: dict[str, Stage] = {}
        self.global_args: dict[str, str] = {}
        self.seconds: list[tuple[str, float]] = []

    def run(self, text: str) -> Stage:
        """Execute every instruction; return the last stage."""
        for name, rest in instructions(text):
            began = time.monotonic()
            getattr(self, f"do_{name.lower()}")(rest)
            took = time.monotonic() - began
            self.seconds.append((f"{name} {' '.join(rest.split())}", took))
            print(f"{took:7.1f} s  {name} {' '.join(rest.split())[:88]}", flush=True)
        return self.stages[-1]

    def do_arg(self, rest: str) -> None:
        name, _, value = rest.partition("=")
        (self.stages[-1].args if self.stages else self.global_args)[name] = value

    def do_from(self, rest: str) -> None:
        words = rest.split()
        stage = Stage(self.folder / f"stage-{len(self.stages)}")
        subprocess.run(["cp", "-a", str(self.base), str(stage.root)], check=True)
        self.stages.append(stage)
        if len(words) == 3:
            self.names[words[2]] = stage

    def do_env(self, rest: str) -> None:
        stage = self.stages[-1]
        stage.env.update(pair.split("=", 1) for pair in rest.split())

    def do_workdir(self, rest: str) -> None:
        self.stages[-1].workdir = rest
        (self.stages[-1].root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def do_user(self, rest: str) -> None:
        self.stages[-1].user = rest

    def do_copy(self, rest: str) -> None:
        *sources, target = rest.split()
        stage = self.stages[-1]
        if sources[0].startswith("--from="):
            other = self.names[sources.pop(0).removeprefix("--from=")]
            for source in sources:
                to = stage.root / target.lstrip("/")
                to.parent.mkdir(parents=True, exist_ok=True)
                source_path = other.root / source.lstrip("/")
                subprocess.run(["cp", "-a", "-T", str(source_path), str(to)], check=True)
            return
        within = stage.root / stage.workdir.lstrip("/")
        for path in context_files(self.context):
            if sources == ["."] or path in sources:
                (within / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.context / path, within / path)

    def do_run(self, rest: str) -> None:
        stage = self.stages[-1]
        shared = [word for path in self.shared for word in ("--ro-bind-try", path, path)]
        pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        command = ["bwrap", "--bind", str(stage.root), "/", "--dev", "/dev", "--proc", "/proc"]
        command += [*shared, "--chdir", stage.workdir, "--clearenv"]
        env = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root", **pip}
        for name, value in {**env, **stage.args, **stage.env}.items():
            command += ["--setenv", name, value]
        subprocess.run([*command, "/bin/sh", "-c", rest], check=True, stdout=subprocess.DEVNULL)

    def do_expose(self, rest: str) -> None:
        assert rest.isdigit(), rest

    def do_stopsignal(self, rest: str) -> None:
        self.stages[-1].stop_signal = rest

    def do_healthcheck(self, rest: str) -> None:
        self.stages[-1].health = json.loads(rest.partition("CMD")[2])

    def do_entrypoint(self, rest: str) -> None:
        self.stages[-1].entrypoint = json.loads(rest)

    def do_cmd(self, rest: str) -> None:
        self.stages[-1].command = json.loads(rest)


class Container:
    """The last stage, running."""

    def __init__(self, stage: Stage, engine: Path, store: Path):
        self.stage = stage
        for mounted in ("engine", "store"):
            (stage.root / mounted).mkdir(exist_ok=True)
        command = ["bwrap", "--ro-bind", str(stage.root), "/", "--dev", "/dev", "--proc", "/proc"]
        command += ["--tmpfs", "/tmp", "--ro-bind", str(engine), "/engine"]
        command += ["--ro-bind", str(store), "/store", "--unshare-pid", "--as-pid-1"]
        command += ["--unshare-net", "--unshare-ipc", "--chdir", stage.workdir, "--clearenv"]
        for name, value in stage.env.items():
            command += ["--setenv", name, value]
        drop = ["setpriv", f"--reuid={stage.user}", f"--regid={stage.user}", "--clear-groups"]
        drop += ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
        self.process = subprocess.Popen(
            [*command, *drop, *stage.entrypoint, *stage.command],
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        """The number that this machine gives the container's process 1."""
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while not task.read_text():
            assert self.process.poll() is None, "the container did not start"
            time.sleep(0.01)
        return int(task.read_text().split()[0])

    def execute(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as `docker exec` does."""
        user = self.stage.user
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--net", "--pid", "--root"]
        enter += [f"--wd=/proc/{self.pid}/cwd", f"--setuid={user}", f"--setgid={user}"]
        return subprocess.run(
            [*enter, *command], capture_output=True, text=True, env=dict(self.stage.env)
        )

    def start_requests(self) -> subprocess.Popen[str]:
        """Ask from inside, `NUM_REQUESTS` at once, for all images; print how many were answered."""
        ids = self.execute(["edje", "store", "ids", "/store"]).stdout.split("\n")
        program = ASKING.format(number=NUM_REQUESTS, ids=[each for each in ids if each])
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--net", "--pid", "--root"]
        return subprocess.Popen(
            [*enter, "python", "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(self.stage.env),
        )


def size_mb(path: Path) -> float:
    """Return what a folder takes on disk, in 1e6 bytes."""
    shown = subprocess.run(["du", "-sb", str(path)], capture_output=True, text=True, check=True)
    return int(shown.stdout.split()[0]) / 1e6


def make_base(base: Path) -> None:
    """Make what stands for a slim Python image: Debian's smallest, with its own Python."""
    include = "--include=python3,python3-venv,ca-certificates"
    subprocess.run(
        ["debootstrap", "--variant=minbase", include, SUITE, str(base), MIRROR], check=True
    )


def check(stage: Stage, engine: Path, store: Path) -> list[str]:
    """Run the image as a container; return what is wrong."""
    faults = []
    compilers = [name for name in ("gcc", "cc", "g++", "pip") if _has(stage.root, name)]
    if compilers:
        faults.append(f"the image holds {', '.join(compilers)}")
    began = time.monotonic()
    container = Container(stage, engine, store)
    try:
        while container.process.poll() is None and time.monotonic() - began < START_S:
            time.sleep(0.1)
            if container.execute(stage.health).returncode == 0:
                break
        else:
            return [*faults, "it does not become healthy"]
        print(f"{time.monotonic() - began:7.1f} s  until HEALTHCHECK passes")
        written = container.execute(["touch", "/opt/edje/written"])
        if written.returncode == 0:
            faults.append("the root can be written to")
        status = Path(f"/proc/{container.pid}/status").read_text()
        memory = re.search(r"VmHWM:\s+(\d+)", status)
        print(f"{int(memory[1]) / 1e3 if memory else 0:7.0f} MB resident at most")
        asked = container.start_requests()
        assert asked.stdout is not None
        asked.stdout.readline()  # all are sent
        if asked.poll() is not None:
            faults.append("the requests ended before the signal")
        began = time.monotonic()
        os.kill(container.pid, getattr(signal, stage.stop_signal))
        answer, error = asked.communicate(timeout=120)
        print(f"{time.monotonic() - began:7.1f} s  from {stage.stop_signal} to the last answer")
        code = container.process.wait(timeout=120)
        print(f"{time.monotonic() - began:7.1f} s  from {stage.stop_signal} to exit code {code}")
        if answer.strip() != str(NUM_REQUESTS):
            faults.append(f"of {NUM_REQUESTS} requests these were served: {answer}{error[-300:]}")
        if code:
            faults.append(f"it exits with {code}")
    finally:
        container.process.kill()
        assert container.process.stderr is not None
        print(container.process.stderr.read().rstrip())
    return faults


def _has(root: Path, name: str) -> bool:
    folders = ("usr/local/bin", "usr/bin", "bin", "opt/edje/bin")
    return any((root / folder / name).exists() for folder in folders)


def main() -> int:
    """Build, run, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("engine", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="must not exist")
    parser.add_argument("--base", type=Path, help="made by debootstrap where it does not exist")
    parser.add_argument(
        "--bind", action="append", default=[], help="a folder that pip's configuration names"
    )
    parser.add_argument("--build-only", action="store_true", help="start nothing")
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    base = given.base or given.folder / "base"
    if not base.exists():
        make_base(base)
    python = base / "usr/local/bin/python"
    if not python.exists():
        python.symlink_to("/usr/bin/python3")
    build = Build(given.folder, base, HOME, [*OF_THE_MACHINE, *given.bind])
    stage = build.run(given.dockerfile.read_text(encoding="utf-8"))
    print(f"{sum(took for _, took in build.seconds):7.1f} s  in all")
    print(f"{size_mb(stage.root / 'opt/edje'):7.0f} MB /opt/edje, {size_mb(base):.0f} MB base")
    if given.build_only:
        return 0
    faults = check(stage, given.engine.resolve(), given.store.resolve())
    for fault in faults:
        print(f"FAULT: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
