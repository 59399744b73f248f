"""vpdeploy's command line for tests: in this process, in a fresh one, and in forks that a signal or a full disk stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from vpdeploy import cli

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.toml"
# Two epochs a stage, so that there is a state between them to go on from; one benchmark setting.
SMOKE = (
    "fit.epochs=2",
    "search.epochs=2",
    "tune.epochs=2",
    "data.limit_train=200",
    "data.limit_test=60",
    "bench.seconds=0.01",
    "bench.batches=[1]",
    "bench.threads=[1]",
    'compare.arms=["dense", "pruned"]',
)
PLAIN = {"COLUMNS": "160", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Done:
    """How a command ended: exit status (minus the signal that killed it), stdout, stderr."""

    status: int
    out: str
    err: str


def settings(values: Sequence[str]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def smoke(run: Path, *more: str) -> list[str]:
    """The quickstart recipe in smoke size."""
    return ["run", str(QUICKSTART), "-o", str(run), *settings(SMOKE), *more]


def here(capsys: pytest.CaptureFixture[str], *arguments: object) -> Done:
    """In this process, through the program's own entry point."""
    before, sys.argv = sys.argv, ["vpdeploy", *map(str, arguments)]
    capsys.readouterr()
    try:
        cli.main()
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    finally:
        sys.argv = before
    said = capsys.readouterr()
    return Done(status, said.out, said.err)


def fresh(*arguments: object, code: str | None = None) -> Done:
    """In a new Python: the program, or ``code`` with ``arguments``."""
    program = ["-m", "vpdeploy"] if code is None else ["-c", code]
    done = subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **PLAIN},
        capture_output=True,
        text=True,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """The folder of a finished smoke run, made by the real command, and what that said. Copy it before changing it."""
    # One for all workers of pytest-xdist, which share out whole files of tests.
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    folder.mkdir(exist_ok=True)
    run, said = folder / "run", folder / "said.json"
    with FileLock(folder / "lock"):
        if not said.exists():
            said.write_text(json.dumps(asdict(fresh(*smoke(run)))))
    done = Done(**json.loads(said.read_text()))
    assert done.status == 0, done.err
    return run, done


class Forks:
    """One Python that has imported everything already; each command runs in a fork of it."""

    def __init__(self, server: subprocess.Popen[str], folder: Path):
        self.server, self.folder = server, folder

    def __call__(self, *arguments: object, at: str = "", nth: int = 1, what: str = "") -> Done:
        """``what`` happens to the process when it puts the ``nth`` file whose path ends in ``at`` into place: "kill
        before" and "interrupt after" are signals, "full" is a disk without space.
        """
        assert self.server.stdin and self.server.stdout
        order = {"arguments": [*map(str, arguments)], "at": at, "nth": nth, "what": what, "folder": str(self.folder)}
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        status = int(self.server.stdout.readline())
        return Done(status, *((self.folder / name).read_text() for name in ("out", "err")))


@contextmanager
def forks(folder: Path) -> Iterator[Forks]:
    script = Path(__file__).with_name("fork_server.py")
    with subprocess.Popen(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={**os.environ, **PLAIN},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            yield Forks(server, folder)
        finally:
            assert server.stdin
            server.stdin.close()  # the end of its orders
