"""The study's figures on made-up results, and one tiny run from data to result line."""

import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "studies" / "small_world"
sys.path[:0] = [str(FOLDER), str(FOLDER.parents[1])]

import study_arms  # noqa: E402
import study_derived  # noqa: E402
import study_questions  # noqa: E402
import study_report  # noqa: E402

from studies.common import pool as study_pool  # noqa: E402

_SPEC = importlib.util.spec_from_file_location("small_world_run", FOLDER / "run.py")  # other studies have a run.py too
study = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(study)

JOINT = study_arms.joint_runs()[0]


def row(arm: str, seed: int, *branches: tuple[float, float, float], watched: dict | None = None) -> dict:
    """A result line; a branch is (nll, accuracy, test), a watched step (nll, accuracy) of each branch."""
    figures = {
        str(number): {"nll": nll, "accuracy": accuracy, "test": test, "tasks": {"boolq": test}}
        for number, (nll, accuracy, test) in enumerate(branches)
    }
    seen = {
        step: dict(zip(("nll", "accuracy"), map(list, zip(*v, strict=True)), strict=True))
        for step, v in (watched or {}).items()
    }
    about = {"commit": "abc", "machine": "CPU", "workers": 1, "row_passes": study_arms.UNIT, "seconds": 2.0}
    return {"arm": arm, "size": "640", "seed": seed, "winner": 0, "branches": figures, "watched": seen, **about}


def joint_row(seed: int, *figures: tuple[float, float, float]) -> dict:
    """A line of the first joint run, whose figures beyond the given ones are the worst, the same at every rung."""
    figures = (*figures, *[(9.0, 0.0, 0.0)] * (JOINT.k - len(figures)))
    seen = [(nll, accuracy) for nll, accuracy, _ in figures]
    return row(JOINT.name, seed, *figures, watched={str(step): seen for step in JOINT.watched_steps})


def test_arms_have_names_of_their_own_and_what_is_derived_names_fields_that_are_measured_at_its_rungs() -> None:
    arms, derived = study_arms.all_arms(), study_derived.derived_arms()
    names = [arm.name for arm in [*arms, *derived]]
    assert len(names) == len(set(names)) and set(study_arms.TIMED) <= set(names)
    for arm in derived:
        assert arm.joint in arms
        assert {rung.step(arm.joint.steps) for rung in arm.own_rungs} <= set(arm.joint.watched_steps)


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
    figures = [(0.4, 0.5, 0.30), (0.2, 0.6, 0.50), (0.3, 0.9, 0.70), (0.5, 0.1, 0.10)]
    arms = study_report.arms_by_seed([joint_row(seed, *figures) for seed in (0, 1)], "640")
    assert [arms["grid of 4 by nll"][seed]["test"] for seed in (0, 1)] == [0.5, 0.5]
    assert arms["grid of 4 by accuracy"][0] == {
        "test": 0.7,
        "rate": study_arms.RATES[2],
        "row_passes": 4 * study_arms.UNIT,
        "seconds": None,
    }
    guess = arms["LoRA r4, rate guessed among the four"][0]
    assert guess["test"] == pytest.approx(0.4) and guess["row_passes"] == study_arms.UNIT
    assert arms[f"LoRA r4 {study_arms.RATES[3]:g}"][1]["test"] == 0.1


def test_an_all_rows_tournament_retires_by_the_figures_at_its_rungs() -> None:
    end = [(0.4, 0.5, 0.1), (0.1, 0.5, 0.2), (0.3, 0.5, 0.3), (0.2, 0.5, 0.4)]
    line = joint_row(0, *end)
    early, late = (line["watched"][str(JOINT.watched_steps[place])]["nll"] for place in (0, 1))
    early[:4], late[:4] = [0.2, 0.9, 0.8, 0.1], [0.3, 0.0, 0.0, 0.4]  # 0 and 3 go on, then 0
    arms = study_report.arms_by_seed([line], "640")
    tournament = arms[study_arms.tournament_name(4, study_arms.EARLY, "all", "nll")][0]
    assert tournament["test"] == 0.1 and tournament["row_passes"] == pytest.approx(1.45 * study_arms.UNIT)
    assert arms["grid of 4 by nll"][0]["test"] == 0.2
    del line["branches"]["0"]  # diverged after the rungs
    early[0] = None  # and here before them
    arms = study_report.arms_by_seed([line], "640")
    assert arms[study_arms.tournament_name(4, study_arms.EARLY, "all", "nll")][0]["test"] == 0.3


def test_every_question_names_arms_and_best_rates_are_those_of_the_best_mean() -> None:
    names = {arm.name for arm in [*study_arms.all_arms(), *study_derived.derived_arms()]} | set(
        study_questions.FAMILIES
    )
    assert all({arm, baseline} <= names for _, arm, baseline in study_questions.questions())
    figures = [(0.4, 0.5, 0.30), (0.2, 0.6, 0.50), (0.3, 0.9, 0.70), (0.5, 0.1, 0.10)]
    results = [joint_row(seed, *figures) for seed in (0, 1)]
    best = study_questions.with_best_rates(study_report.arms_by_seed(results, "640"))["LoRA r4 at its best rate"]
    assert [row["test"] for row in best.values()] == [0.7, 0.7]
    line = (
        "| a grid against a guess | grid of 4 by accuracy | LoRA r4, rate guessed among the four | +30.0 ± 0.0 (2) |"
    )
    assert line in study_questions.comparisons(results, ["640"])


def test_differences_are_paired_by_seed() -> None:
    results = [joint_row(seed, *[(0.1, 0.5, 0.1 * seed)] * 4) for seed in (1, 2, 3)]
    results += [row("other", seed, (0.1, 0.5, 0.1 * seed + 0.02)) for seed in (2, 3, 4)]
    line = next(line for line in study_report.table(results, "640").splitlines() if line.startswith("| other"))
    assert "+2.0 ± 0.0" in line and "| 3 | 1.00 |" in line


def test_finished_runs_are_not_run_again_and_a_dead_worker_costs_one_run(tmp_path: Path) -> None:
    arm, results = study_arms.BASE, tmp_path / "results.jsonl"
    results.write_text(json.dumps({"arm": arm.name, "size": "640", "seed": 1}) + "\n")
    jobs = study.missing_jobs([arm], ["640"], 4, results)
    assert [job["seed"] for job in jobs] == [0, 2, 3]
    # A worker that dies of seed 2
    answer = "import json, sys\nfor line in sys.stdin:\n    job = json.loads(line)\n    assert job['seed'] != 2\n"
    command = [sys.executable, "-c", answer + "    print(line.strip(), flush=True)"]
    assert study_pool.Pool(command, results, {"commit": "abc"}, workers=1).run(study.supplier(jobs)) == 1
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["seed"], line.get("commit")) for line in lines] == [(1, None), (0, "abc"), (3, "abc")]


def test_runs_of_another_precision_are_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(joint_row(0, (0.4, 0.5, 0.3)) | {"precision": "bf16"}) + "\n")
    monkeypatch.setattr(sys, "argv", ["run.py", "--results", str(results), "--arms", "base", "--seeds", "1"])
    with pytest.raises(SystemExit, match="has runs in bf16, and arms are compared in one precision: add --bf16, or"):
        study.main()


def test_a_run_that_outlasts_the_deadline_is_lost(tmp_path: Path) -> None:
    command, jobs = [sys.executable, "-c", "import time; time.sleep(60)"], [{"arm": "a", "size": "640", "seed": 0}] * 3
    begin = time.monotonic()
    pool = study_pool.Pool(command, tmp_path / "r.jsonl", {}, workers=2, deadline=begin + 0.5, grace=0.5)
    assert pool.run(study.supplier(jobs)) == 2 and time.monotonic() - begin < 20


def test_processes_share_the_gpu_as_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_pool, "MPS", "no-such-program")
    with study_pool.shared_gpu() as environment:
        assert environment == {}


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of a few rows of another world."""
    from demo_facts import shuffled_world
    from make_demo_data import make_splits

    path = tmp_path_factory.mktemp("study") / "data.json"
    path.write_text(json.dumps(make_splits(4, 2, 2, 0, shuffled_world(0))))
    return str(path)


def run(arm: study_arms.Arm, data: str) -> dict:
    from study_run import run

    return json.loads(json.dumps(run({"arm": arm.name, "size": "640", "seed": 0, "data": data}, {arm.name: arm})))


@pytest.mark.slow
def test_a_tournament_read_off_a_field_is_the_tournament(tiny_data: str) -> None:
    rates, small = (1e-4, 1e-1, 1e-3), {"rows": 2, "steps": 4}
    joint = study_arms.Arm("joint", study_arms.with_rates(rates), watch=(0.25, 0.5), **small)
    result = run(joint, tiny_data)
    assert set(result["branches"]) == {"0", "1", "2"} and result["row_passes"] == 3 * 2 * 4
    derived = study_derived.Derived("derived", joint, (0, 1, 2), "nll", "0.25:2,0.5:1")
    trained = study_arms.tournament("0.25:2,0.5:1", "all", rates, **small)
    real = run(trained, tiny_data)
    assert real["winner"] == derived.chosen(result) and derived.row_passes == trained.row_passes
    read, own = result["branches"][str(real["winner"])], real["branches"][str(real["winner"])]
    assert read["nll"] == pytest.approx(own["nll"], abs=1e-5) and read["tasks"] == own["tasks"]


@pytest.mark.slow
def test_one_forward_tells_what_greedy_decoding_would_write(tiny_data: str, tmp_path: Path) -> None:
    import study_run

    data, arm = (
        study_run.load_rows(tiny_data),
        study_arms.Arm("two", study_arms.with_rates([1e-3, 1e-2]), rows=4, steps=6),
    )
    trainer, _ = study_run.train(arm, 0, data, str(tmp_path))
    figures, model = study_run.test_accuracy(trainer, data), trainer.comlora_model
    for branch in range(2):
        model.set_adapter(f"branch_{branch}")
        right = []
        for example in data.test:
            prompt = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label < 0]
            written = model.generate(input_ids=study_run.torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
            right.append(written[0].tolist() == example["input_ids"])
        assert sum(figures[branch].values()) / len(figures[branch]) == pytest.approx(sum(right) / len(right))
