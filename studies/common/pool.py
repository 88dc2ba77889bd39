"""Worker processes that share one GPU: each does one job of a study at a time."""

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[2])
MPS = "nvidia-cuda-mps-control"
Job = dict[str, Any]


@contextmanager
def shared_gpu() -> Iterator[dict[str, str]]:
    """NVIDIA's Multi-Process Service, without which processes take turns on the GPU; nothing where it is missing.

    The daemon lives in a temporary folder of its own and changes none of the GPU's settings.

    Yields:
        the environment of the processes that are to use it; empty if there is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = {f"CUDA_MPS_{name}_DIRECTORY": f"{folder}/{name}" for name in ("PIPE", "LOG")}
        for place in places.values():
            Path(place).mkdir()
        environment = {**os.environ, **places}
        try:
            subprocess.run([MPS, "-d"], env=environment, check=True, timeout=20, capture_output=True)
        except (OSError, subprocess.SubprocessError):
            yield {}
            return
        try:
            works = [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda').item()"]
            served = subprocess.run(works, env=environment, timeout=60, capture_output=True).returncode == 0
            yield places if served else {}
        finally:
            subprocess.run([MPS], input=b"quit -t 1\n", env=environment, timeout=20, capture_output=True)


class Pool:
    """Workers, each fed by a thread; they start at once, and results are written as they come.

    A supplier is asked for each job when a worker is free, so that what comes next may follow from results that are
    there already. Where it has none while others still run, the worker waits for their results and asks again.

    Args:
        command: starts a worker, which answers each line, a job as JSON, with a line: the result, or {"error"}.
        results: the file that lines are added to; the workers' own output goes to `workers.log` beside it.
        about: is added to every line.
        workers: how many.
        deadline: of `time.monotonic()`; from then on no job is given out, and after `grace` seconds more those that
            still run are lost.
        environment: of the workers, besides this process's.
    """

    def __init__(
        self, command: Sequence[str], results: Path, about: Mapping[str, Any], workers: int,
        deadline: float | None = None, grace: float = 60.0, environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.command, self.results, self.about = list(command), results, about
        self.deadline, self.grace = deadline, grace
        self.environment = {**os.environ, **(environment or {})}
        paths = [ROOT, self.environment.get("PYTHONPATH")]  # workers import the studies
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        results.parent.mkdir(parents=True, exist_ok=True)
        self.log = (results.parent / "workers.log").open("a")
        self.workers = [self._start() for _ in range(workers)]
        self.changed = threading.Condition()
        self.running = self.done = self.failed = 0
        self.begin = time.monotonic()

    def run(self, supply: Callable[[], Job | None]) -> int:
        """Does what the supplier gives until it gives no more, and ends the workers; returns how many jobs failed."""
        self.supply = supply
        threads = [threading.Thread(target=self._work, args=(worker,)) for worker in list(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(None if self.deadline is None else self._left() + self.grace)
        for worker in self.workers:  # only those that outlasted the deadline still run
            worker.kill()
        for thread in threads:
            thread.join()
        self.log.close()
        return self.failed

    def _start(self) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        return subprocess.Popen(self.command, text=True, env=self.environment, **pipes)

    def _left(self) -> float:
        return math.inf if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def _work(self, worker: subprocess.Popen) -> None:
        while job := self._next():
            try:
                worker.stdin.write(json.dumps(job) + "\n")
                worker.stdin.flush()
                line = worker.stdout.readline()
            except BrokenPipeError:
                line = ""
            self._keep(job, json.loads(line or '{"error": "its worker died; see workers.log"}'))
            if not line and self._left():
                worker = self._start()
                self.workers.append(worker)
        worker.stdin.close()
        worker.wait()

    def _next(self) -> Job | None:
        with self.changed:
            while self._left():
                job = self.supply()
                if job is not None:
                    self.running += 1
                    return job
                if not self.running:
                    break
                self.changed.wait(timeout=min(self._left(), 60.0))
            return None

    def _keep(self, job: Job, result: dict[str, Any]) -> None:
        with self.changed:
            self.running -= 1
            title = f"[{time.monotonic() - self.begin:4.0f} s] {job['arm']}, seed {job['seed']}"
            if "error" in result:
                self.failed += 1
                print(f"{title}: {result['error']}", flush=True)
            else:
                self.done += 1
                print(f"{title}: {result.get('seconds', 0):.0f} s", flush=True)
                with self.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**result, **self.about}) + "\n")
            self.changed.notify_all()
