"""The scores of one adapter's weights, from lm_eval's result files, for its card."""

import math
from pathlib import Path
from typing import Any

from comlora_trl.evaluation.adapters import adapter_folder
from comlora_trl.evaluation.conditions import describe_conditions, leaf_records
from comlora_trl.evaluation.results import load_results
from comlora_trl.winner.card import Score, write_card
from comlora_trl.winner.folder import weights_sha256


def put_on_card(adapter: str, arguments: list[str]) -> tuple[Path, list[Score]]:
    """Writes the scores of an adapter's weights on its card.

    Args:
        adapter: its folder.
        arguments: result files of lm_eval, folders with them, or patterns.

    Returns:
        the card and its scores.

    Raises:
        ValueError: there is no such adapter, or no result is of its weights.
    """
    folder = adapter_folder(adapter.rstrip("/") if Path(adapter).is_dir() else adapter)
    scores = scores_of(weights_sha256(folder), arguments)
    if not scores:
        raise ValueError(
            f"{adapter}: none of the results is of its weights; score it (lm_eval ... --model_args peft={adapter} "
            "--output_path results), and name the folder with the results"
        )
    return write_card(folder, scores), scores


def scores_of(sha256: str | None, arguments: list[str]) -> list[Score]:
    """The newest score of each of our tasks under each set of conditions, of the adapter with these weights."""
    found: dict[tuple[str, str], Score] = {}
    for content, _, _ in load_results(arguments):
        for task, values in content["results"].items():
            records = leaf_records(content, task)
            if not task.startswith("comlora_") or not records:
                continue
            if any((record.get("adapter") or {}).get("sha256") != sha256 for record in records):
                continue
            grouped = any(task in children for children in (content.get("group_subtasks") or {}).values())
            if grouped and task.startswith("comlora_mmlu_") and task not in content["group_subtasks"]:
                continue  # 57 subjects would hide the rest
            if metrics := _metrics(values):
                score = Score(task, metrics, describe_conditions(content, task))
                found[task, score.conditions] = score
    return list(found.values())


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    metrics = {}
    for key, value in values.items():
        name = key.split(",")[0]
        if "," in key and not name.endswith("_stderr") and isinstance(value, int | float) and math.isfinite(value):
            metrics[name] = round(100 * value if name == "acc" else value, 2)
    return metrics
