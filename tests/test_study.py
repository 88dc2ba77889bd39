"""The study's figures on made-up results, and one tiny run from data to result line."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import study  # noqa: E402
import study_arms  # noqa: E402
import study_report  # noqa: E402


def row(arm: str, seed: int, *branches: tuple[float, float, float], winner: int = 0) -> dict:
    """A result line; a branch is (nll, accuracy, test)."""
    figures = {
        str(number): {"nll": nll, "accuracy": accuracy, "test": test, "tasks": {"boolq": test}}
        for number, (nll, accuracy, test) in enumerate(branches)
    }
    about = {"commit": "abc", "machine": "CPU", "workers": 1}
    return {"arm": arm, "size": "640", "seed": seed, "winner": winner, "branches": figures} | {
        "row_passes": study_arms.UNIT,
        "seconds": 2.0,
        **about,
    }


def test_arms_have_names_of_their_own_and_choices_name_arms() -> None:
    names = [arm.name for arm in study_arms.all_arms()]
    assert len(names) == len(set(names))
    assert {arm for choice in study_arms.choices() for arm in choice.arms} <= set(names)


@pytest.mark.parametrize(
    ("rungs", "sharing", "steps", "units"),
    [("0.1:2,0.25:1", "shared", 400, 1.0), ("0.1:2,0.25:1", "all", 400, 1.45), ("0.25:2,0.5:1", "all", 400, 2.0)],
)
def test_a_tournament_costs_what_its_branches_see(rungs: str, sharing: str, steps: int, units: float) -> None:
    arm = study_arms.tournament(rungs, sharing, steps=steps)
    assert arm.row_passes == pytest.approx(units * arm.rows * steps)


def test_interval_is_students() -> None:
    mean, half = study_report.interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and half == pytest.approx(3.182 * math.sqrt(5 / 3) / 2)
    assert math.isnan(study_report.interval([1.0])[1])


def test_a_grid_is_chosen_by_validation_and_costs_all_its_runs() -> None:
    names = [study_arms.lora(rate).name for rate in study_arms.RATES]
    figures = [(0.4, 0.5, 0.30), (0.2, 0.6, 0.50), (0.3, 0.9, 0.70), (0.5, 0.1, 0.10)]
    results = [row(name, seed, one) for seed in (0, 1) for name, one in zip(names, figures, strict=True)]
    arms = study_report.arms_by_seed(results + [row(names[0], 2, figures[0])], "640")
    assert [arms["grid of 4 by nll"][seed]["test"] for seed in (0, 1)] == [0.5, 0.5]
    assert arms["grid of 4 by accuracy"][0]["test"] == 0.7
    assert arms["grid of 4 by nll"][0]["row_passes"] == 4 * study_arms.UNIT
    assert 2 not in arms["grid of 4 by nll"] and len(arms[names[0]]) == 3


def test_differences_are_paired_by_seed() -> None:
    names = [study_arms.lora(rate).name for rate in study_arms.RATES]
    results = [row(name, seed, (0.1, 0.5, 0.1 * seed)) for seed in (1, 2, 3) for name in names]
    results += [row("other", seed, (0.1, 0.5, 0.1 * seed + 0.02)) for seed in (2, 3, 4)]
    line = next(line for line in study_report.table(results, "640").splitlines() if line.startswith("| other"))
    assert "+2.0 ± 0.0" in line and "| 3 | 1.00 | 2 |" in line


def test_finished_runs_are_not_run_again_and_a_dead_worker_costs_one_run(
    tmp_path: Path,
) -> None:
    arm, results = study_arms.lora(1e-3), tmp_path / "results.jsonl"
    results.write_text(json.dumps({"arm": arm.name, "size": "640", "seed": 1}) + "\n")
    jobs = study.missing_jobs([arm], ["640"], 4, results)
    assert [job["seed"] for job in jobs] == [0, 2, 3]
    arguments = argparse.Namespace(results=results, seconds=None, tuned=1e-3, workers=1)
    pool = study.Pool(jobs, arguments, {"commit": "abc"})
    # A worker that dies of seed 2
    answer = "import json, sys\nfor line in sys.stdin:\n    job = json.loads(line)\n    assert job['seed'] != 2\n"
    pool.command = [sys.executable, "-c", answer + "    print(line.strip(), flush=True)"]
    assert pool.run() == 1
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["seed"], line.get("commit")) for line in lines] == [(1, None), (0, "abc"), (3, "abc")]


@pytest.mark.slow
def test_a_tiny_run_gives_a_result_line(tmp_path: Path) -> None:
    from make_demo_data import make_splits
    from study_run import run

    data = tmp_path / "data.json"
    data.write_text(json.dumps(make_splits(4, 2, 2, seed=0)))
    arm = study_arms.Arm("tiny", {**study_arms.same_rate(1e-3, k=2).fields}, steps=2)
    result = run({"arm": "tiny", "size": "640", "seed": 0, "data": str(data)}, {"tiny": arm})
    assert set(result["branches"]) == {"0", "1"} and result["row_passes"] == 2 * 2 * study_arms.ROWS
    assert all(math.isfinite(branch["nll"]) and 0 <= branch["test"] <= 1 for branch in result["branches"].values())
    json.dumps(result)
