"""Result files as lm_eval writes them, and what `comlora-tables` reads in them."""

import json
from pathlib import Path

from comlora_trl.evaluation.conditions import COMMONSENSE
from comlora_trl.evaluation.tables import build_tables, read_runs
from comlora_trl.evaluation.tables_render import Row


def write_adapter(folder: Path, rank: int = 8, k: int | None = None, base: str = "base", **competition: object) -> str:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "base_model_name_or_path": base}))
    if k:
        (folder / "competition.json").write_text(json.dumps({"k": k, "winner": 0, **competition}))
    return str(folder)


def write_results(folder: Path, model: str, results: dict, day: int = 1, **more: object) -> Path:
    """One result file in lm_eval 0.4.13's form."""
    content = {
        "results": {task: {"alias": task, **values} for task, values in results.items()},
        "group_subtasks": {},
        "config": {"model": "hf", "model_args": {"peft": model, "pretrained": "base"}, "limit": None},
        "date": float(day),
        "model_name": model,
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"results_2026-01-{day:02d}T10-00-00.123456.json"
    file.write_text(json.dumps(content))
    return file


def commonsense(accuracy: float, without: tuple[str, ...] = ()) -> dict:
    """The eight tasks' accuracies, each a hundredth above the last."""
    tasks = [task for task in COMMONSENSE if task not in without]
    return {
        f"comlora_{task}": {"acc,none": accuracy + 0.01 * i, "acc_stderr,none": 0.5} for i, task in enumerate(tasks)
    }


def measured(arguments: list[object], number: str = "3") -> dict[str, Row]:
    (table,) = build_tables(read_runs([str(argument) for argument in arguments]), [number])
    return {row.method: row for row in table.rows if row.source != "paper"}


def notes(arguments: list[object], number: str = "3") -> str:
    (table,) = build_tables(read_runs([str(argument) for argument in arguments]), [number])
    return "\n".join(table.notes)


def record(sha: str, method: str = "ComLoRA K=2 r=8", **changes: object) -> dict:
    """What a result records of itself, see `comlora_trl.evaluation.harness`."""
    adapter = {"sha256": sha * 8, "method": method, "base": "base", "seed": 0, "settings": {"learning_rate": 1e-4}}
    adapter |= changes.pop("adapter", {})
    decoding = {"do_sample": False, "max_gen_toks": 32}
    usual = {"rows": 3270, "expected_rows": 3270, "data_sha256": "d" * 64, "prompt": "comlora"}
    return {**usual, "chat_template_sha256": None, "decoding": decoding, "adapter": adapter, **changes}


def write_recorded(folder: Path, day: int, accuracy: float, sha: str, task: str = "boolq", **changes: object) -> None:
    entry = record(sha, **changes)
    configs = {f"comlora_{task}": {"metadata": {"comlora": entry}}}
    samples = {f"comlora_{task}": {"original": 3270, "effective": entry["rows"]}}
    more = {"configs": configs, "n-samples": samples}
    write_results(folder, "winner/", {f"comlora_{task}": {"acc,none": accuracy}}, day=day, **more)
