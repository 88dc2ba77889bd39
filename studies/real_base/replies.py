"""Greedy replies of the chief arms, scored by lm_eval's task `comlora_convai2` (BLEU, METEOR, ROUGE-L, BERTScore).

METEOR needs NLTK's WordNet (NLTK_DATA), BERTScore its model (COMLORA_BERTSCORE_MODEL): see the task's description.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from studies.real_base import base, report
from studies.real_base.worker import kept_folder

METRICS = ("bleu", "meteor", "rouge_l", "bertscore_precision", "bertscore_recall", "bertscore_f1", "average")


def score_replies(arguments: argparse.Namespace, about: Mapping[str, Any]) -> None:
    """Scores what has no line in replies.jsonl yet; each adapter is a line as soon as it is done.

    Args:
        arguments: of the command.
        about: is added to every line: commit, versions, machine.
    """
    # Beside results_gemma3.jsonl it is replies_gemma3.jsonl
    own = stem.removeprefix("results") if (stem := arguments.results.stem).startswith("results_") else ""
    file = arguments.results.parent / f"replies{own}.jsonl"
    results = report.read_results(arguments.results)
    best = arguments.best or next((row["best"] for row in reversed(results) if row.get("best")), None)
    if best is None:
        sys.exit(f"error: {arguments.results} has no run after the grid, so it has no arm to score: train first")
    done = {(row["arm"], row["seed"], row["limit"]) for row in report.read_results(file)}
    asked = [{"arm": "base", "seed": 0, "title": None}, *report.adapters_to_score(results, arguments.rates, best)]
    jobs = [job for job in asked if (job["arm"], job["seed"], arguments.replies) not in done]
    kept = [job for job in jobs if not job["title"] or kept_folder(arguments.adapters, job["title"]).is_dir()]
    if lost := [f"{job['arm']}, seed {job['seed']}" for job in jobs if job not in kept]:
        print(f"left out, for {arguments.adapters} has no adapter of them: {'; '.join(lost)}")
    with tempfile.TemporaryDirectory() as folder:
        model = base.export(arguments.base, (arguments.work or Path(folder)) / "base")
        with ThreadPoolExecutor(arguments.workers) as pool:
            for job, metrics in pool.map(lambda one: (one, evaluate(one, model, arguments)), kept):
                line = {**job, "limit": arguments.replies, "metrics": metrics, **about}
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(line) + "\n")
                print(f"{job['arm']}, seed {job['seed']}: {json.dumps(metrics)}", flush=True)


def evaluate(job: dict[str, Any], model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One adapter's metrics, times 100.

    Raises:
        RuntimeError: lm_eval failed; its last lines.
    """
    kind = "bfloat16" if arguments.bf16 else "float32"
    given = f"pretrained={model},dtype={kind}"
    if job["title"]:
        given += f",peft={kept_folder(arguments.adapters, job['title'])}"
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "comlora_trl.cli.eval", "--model", "hf", "--tasks", "comlora_convai2"]
        command += ["--model_args", given, "--limit", str(arguments.replies), "--batch_size", "128"]
        environment = {**os.environ, "COMLORA_DATA_DIR": str(arguments.data.absolute().parent)}
        done = subprocess.run([*command, "--output_path", output], env=environment, capture_output=True, text=True)
        files = sorted(Path(output).rglob("results_*.json"))
        if done.returncode or not files:
            raise RuntimeError(f"lm_eval failed for {job['arm']}, seed {job['seed']}: {done.stderr[-800:]}")
        own = json.loads(files[-1].read_text())["results"]["comlora_convai2"]
    return {name: own[f"{name},none"] for name in METRICS} | {"bertscore_model": own["bertscore_model,none"]}
