"""Worker processes that share one GPU: each trains one run of the study at a time."""

import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

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

    Args:
        command: starts a worker, which answers each line, a job as JSON, with a line.
        results: the file that lines are added to; the workers' own output goes to `study.log` beside it.
        about: is added to every line.
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
        self.log = (results.parent / "study.log").open("a")
        self.workers = [self._start() for _ in range(workers)]
        self.waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.lock, self.failed = threading.Lock(), 0

    def run(self, jobs: Sequence[Job]) -> int:
        """Trains all, and ends the workers; returns how many runs failed."""
        for job in jobs:
            self.waiting.put(job)
        self.bar = tqdm(total=len(jobs), desc="runs", mininterval=5)
        threads = [threading.Thread(target=self._work, args=(worker,)) for worker in list(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(None if self.deadline is None else self._left() + self.grace)
        for worker in self.workers:  # only those that outlasted the deadline still run
            worker.kill()
        for thread in threads:
            thread.join()
        self.bar.close()
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
            self._keep(job, json.loads(line or '{"error": "its worker died; see study.log"}'))
            if not line and self._left():
                worker = self._start()
                self.workers.append(worker)
        worker.stdin.close()
        worker.wait()

    def _next(self) -> Job | None:
        try:
            return self.waiting.get_nowait() if self._left() else None
        except queue.Empty:
            return None

    def _keep(self, job: Job, result: dict[str, Any]) -> None:
        with self.lock:
            self.bar.update()
            if "error" in result:
                self.failed += 1
                self.bar.write(f"{job['arm']}, {job['size']} rows, seed {job['seed']}: {result['error']}")
                return
            with self.results.open("a") as file:
                file.write(json.dumps({**result, **self.about}) + "\n")
