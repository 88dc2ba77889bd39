"""The conditions of a figure, read from lm_eval's result file and this package's record in it.

The record is that of [`comlora_trl.evaluation.harness`]; files of other origin contain less, and
unknown conditions are left out.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comlora_trl.data.convai2 import VALIDATION_ROWS
from comlora_trl.data.keywords import COMMONSENSE_TASKS
from comlora_trl.data.mmlu import SUBJECT_ROWS
from comlora_trl.evaluation.metrics import DEFAULT_MODEL

# Tasks in lm_eval, and the sizes of the paper's test sets
COMMONSENSE = {name.lower().replace("-", "_"): task.test_rows for name, task in COMMONSENSE_TASKS.items()}
# The paper's conditions; a difference becomes a remark
_USUAL = {"prompt": "comlora", "decoding": "greedy, 32 tokens"}


@dataclass
class Measure:
    """The figures of one task of one run.

    Attributes:
        table: the paper's table that has it.
        task: lm_eval's name of the task, without a protocol's suffix.
        values: column to figure in percent.
        shared: conditions that a whole run has in common (prompt, decoding, ...), by name; the unknown are left out.
        own: the task's own (rows, data, BERTScore's model).
        remarks: differences from the paper's conditions.
    """

    table: str
    task: str
    values: dict[str, float]
    shared: dict[str, str] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def short(sha256: str | None) -> str:
    """A hash's first digits."""
    return sha256[:8] if sha256 else "unknown"


def _record(content: dict[str, Any], task: str) -> dict[str, Any]:
    config = (content.get("configs") or {}).get(task) or {}
    return (config.get("metadata") or {}).get("comlora") or {}


def _leaves(task: str, groups: dict[str, list[str]]) -> list[str]:
    return [leaf for child in groups[task] for leaf in _leaves(child, groups)] if groups.get(task) else [task]


def leaf_records(content: dict[str, Any], task: str) -> list[dict[str, Any]]:
    """Our records of a task, or of all tasks of a group."""
    leaves = _leaves(task, content.get("group_subtasks") or {})
    return [record for leaf in leaves if (record := _record(content, leaf))]


def describe_conditions(content: dict[str, Any], task: str) -> str:
    """A recorded task's conditions in words: "600 of 600 rows, prompt comlora, greedy, 32 tokens"."""
    records, leaves = leaf_records(content, task), _leaves(task, content.get("group_subtasks") or {})
    rows, expected = (sum(record[name] for record in records) for name in ("rows", "expected_rows"))
    shared = _shared(content, leaves[0], records[0])
    parts = [f"{rows:,} of {expected:,} rows", *(f"{k} {v}" for k, v in shared.items() if k != "decoding")]
    parts += [shared["decoding"]] if "decoding" in shared else []
    if model := records[0].get("bertscore_model"):
        parts.append(f"BERTScore by {model}")
    return ", ".join(parts)


def add_conditions(measure: Measure, content: dict[str, Any], task: str) -> Measure:
    leaves = _leaves(task, content.get("group_subtasks") or {})
    records = leaf_records(content, task)
    measure.shared = _shared(content, leaves[0], records[0] if records else {})
    measure.remarks = [f"{name} {measure.shared[name]}" for name, usual in _USUAL.items() if _differs(measure, name)]
    measure.remarks += [f"{name} {value}" for name, value in measure.shared.items() if name not in _USUAL]
    if cache := (content.get("config") or {}).get("use_cache"):
        measure.remarks.append(f"with answers from --use_cache {cache}, which does not know one model from another")
    samples = content.get("n-samples") or {}
    counts = [samples[leaf]["effective"] for leaf in leaves if leaf in samples]
    expected = sum(record["expected_rows"] for record in records) or _expected(measure.task, leaves)
    limit = (content.get("config") or {}).get("limit")
    if counts:
        measure.own["rows"] = f"{sum(counts):,} of {expected:,}"
        measure.remarks += [f"on {measure.own['rows']} rows"] if sum(counts) != expected else []
    elif limit:
        measure.own["rows"] = f"--limit {limit:g}"
        measure.remarks.append(f"with --limit {limit:g}")
    if records:
        hashes = " ".join(record["data_sha256"] for record in records)
        measure.own["data"] = short(records[0]["data_sha256"] if len(records) == 1 else _sha256(hashes))
    if versions := {str((content.get("versions") or {}).get(leaf)) for leaf in leaves} - {"None"}:
        measure.own["version"] = "/".join(sorted(versions))
    if measure.table == "4":
        _add_bertscore(measure, content, task, records)
    return measure


def _differs(measure: Measure, name: str) -> bool:
    return measure.shared.get(name, _USUAL[name]) != _USUAL[name]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _expected(task: str, leaves: list[str]) -> int:
    """Rows of the public test set."""
    if task == "comlora_convai2":
        return VALIDATION_ROWS
    if task == "comlora_mmlu":
        return sum(SUBJECT_ROWS.values())
    subjects = (leaf.removeprefix("comlora_mmlu_") for leaf in leaves)
    return COMMONSENSE.get(task.removeprefix("comlora_")) or sum(SUBJECT_ROWS.get(subject, 0) for subject in subjects)


def _shared(content: dict[str, Any], leaf: str, record: dict[str, Any]) -> dict[str, str]:
    config = (content.get("configs") or {}).get(leaf) or {}
    shared = {}
    if record.get("prompt"):
        shared["prompt"] = record["prompt"]
    kwargs = record.get("decoding") or config.get("generation_kwargs")
    if kwargs:
        shared["decoding"] = describe_decoding(kwargs)
    if record.get("protocol", "comlora") != "comlora":
        shared["protocol"] = record["protocol"]
    if chat := record.get("chat_template_sha256") or content.get("chat_template_sha"):
        shared["chat template"] = short(chat)
    if instruction := content.get("system_instruction_sha"):
        shared["system instruction"] = short(instruction)
    if shots := (content.get("n-shot") or {}).get(leaf):
        shared["few-shot examples"] = str(shots)
    return shared


def describe_decoding(kwargs: dict[str, Any]) -> str:
    """Generation settings in words: "greedy, 32 tokens", "4 beams, 32 tokens", "sampling (temperature 0.1), ..."."""
    rest = {key: value for key, value in kwargs.items() if key != "until" and value is not None}
    sampling, beams, tokens = rest.pop("do_sample", False), rest.pop("num_beams", 1), rest.pop("max_gen_toks", None)
    kinds = {key: rest.pop(key) for key in ("temperature", "top_p", "top_k") if key in rest}
    parts = [f"sampling ({', '.join(f'{k} {v:g}' for k, v in kinds.items())})" if kinds else "sampling"] * sampling
    parts += [f"{beams} beams"] if beams > 1 else []
    parts = parts or ["greedy"]
    parts += [f"{key} {value}" for key, value in sorted(rest.items())]
    return ", ".join([*parts, f"{tokens} tokens"] if tokens else parts)


def _add_bertscore(measure: Measure, content: dict[str, Any], task: str, records: list[dict[str, Any]]) -> None:
    model = str(content["results"][task].get("bertscore_model,none", DEFAULT_MODEL))
    layers = records[0].get("bertscore_layers") if records else None
    measure.own["BERTScore"] = f"{model}, layer {layers}" if layers else model
    if Path(model).name != DEFAULT_MODEL:
        measure.remarks.append(f"with BERTScore by {measure.own['BERTScore']} instead of {DEFAULT_MODEL}")
