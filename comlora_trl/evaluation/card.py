"""A winner's model card (`README.md`), written from the files beside it and, once scored, lm_eval's results.

Every command in it works as it stands beside the adapter's folder. Nothing here imports torch.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from comlora_trl.demo import DEMO_BASE, resolve_base
from comlora_trl.evaluation.adapters import COMPETITION_FILE, TRAINING_FILE, method_of, read_json, tasks_for, vllm_rank

if TYPE_CHECKING:
    from comlora_trl.evaluation.scores import Score

CARD_FILE = "README.md"
# Pictures that the training may leave in the folder
PICTURES = ("competition.png", "competition.svg")
_HUB_NAMES = {"commonsense_170k": "commonsense_170k (LLM-Adapters)", "mmlu": "cais/mmlu"}


def write_card(folder: str | Path, scores: "Sequence[Score]" = ()) -> Path:
    """Writes the card of an adapter's folder, in the place of one that is there.

    Args:
        folder: the adapter's folder.
        scores: what was measured of exactly these weights.

    Returns:
        the card's path.
    """
    folder = Path(folder)
    record = read_json(folder / TRAINING_FILE)
    config = read_json(folder / "adapter_config.json")
    competition = read_json(folder / COMPETITION_FILE)
    method = method_of(folder) or "adapter"
    base = (record.get("base") or {}).get("name") or config.get("base_model_name_or_path") or ""
    metadata = yaml.safe_dump(_metadata(record, base, method, scores), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{metadata}---\n",
        f"# {method}\n\n{_summary(record, config, base)}",
        _competition(folder, competition),
        _scores(scores),
        _use(record, config, base),
        _settings(record, config),
    ]
    path = folder / CARD_FILE
    path.write_text("\n\n".join(part.strip() for part in parts if part) + "\n", encoding="utf-8")
    return path


def _metadata(record: dict[str, Any], base: str, method: str, scores: "Sequence[Score]") -> dict[str, Any]:
    """The card's YAML head, as the hub reads it. A base that is no hub id is left out, for the hub refuses it."""
    data: dict[str, Any] = {}
    if _is_hub_id(base):
        data["base_model"] = base
    data |= {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["comlora", "lora", "trl", "sft"]}
    if _is_hub_id(record.get("data") or ""):
        data["datasets"] = [record["data"]]
    if scores:
        results = [
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": score.task, "type": score.task},
                "metrics": [{"type": name, "value": value, "name": name} for name, value in score.metrics.items()],
            }
            for score in scores
        ]
        data["model-index"] = [{"name": method, "results": results}]
    return data


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and name != DEMO_BASE


def _summary(record: dict[str, Any], config: dict[str, Any], base: str) -> str:
    revision = (record.get("base") or {}).get("revision")
    lines = [f"An ordinary PEFT LoRA adapter of rank {config.get('r')} on `{base}`"]
    lines[0] += f", revision `{revision}`." if revision else "."
    if base == DEMO_BASE:
        lines.append("That base is the small model inside the package `comlora-trl`.")
    if data := record.get("data"):
        lines.append(f"Trained on {_HUB_NAMES.get(data, f'`{data}`')}.")
    if template := record.get("prompt_template"):
        lines.append(f"Its prompts are those of the template `{template}` (`comlora_trl.data.build_prompt`).")
    return " ".join(lines)


def _competition(folder: Path, competition: dict[str, Any]) -> str:
    branches = competition.get("branches") or []
    if len(branches) < 2:
        return ""
    lines = ["| branch | validation NLL | score | share of wins | |", "| --- | ---: | ---: | ---: | --- |"]
    for branch in branches:
        remark = "winner" if branch["branch"] == competition.get("winner") else ""
        if branch.get("disqualified_at_step") is not None:
            remark = f"disqualified at step {branch['disqualified_at_step']}"
        if branch["branch"] == competition.get("exported_branch", competition.get("winner")):
            remark += " (this adapter)" if remark != "winner" else ", this adapter"
        nll, score, wins = (branch.get(name) for name in ("validation_nll", "score", "share_of_wins"))
        cells = [_number(nll, ".4f"), _number(score, ".2f"), _number(wins, ".0%")]
        lines.append(f"| {branch['branch']} | {' | '.join(cells)} | {remark.strip()} |")
    pictures = [f"![The competition]({name})" for name in PICTURES if (folder / name).is_file()]
    examples = competition.get("validation_examples")
    head = f"## The competition\n\n{len(branches)} branches, {examples} validation examples:\n\n"
    return "\n\n".join([head + "\n".join(lines), *pictures])


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _scores(scores: "Sequence[Score]") -> str:
    if not scores:
        return ""
    lines = ["## Scores", "", "| task | | conditions |", "| --- | --- | --- |"]
    for score in scores:
        metrics = ", ".join(f"{name} {value:.2f}" for name, value in score.metrics.items())
        lines.append(f"| `{score.task}` | {metrics} | {score.conditions} |")
    return "\n".join(lines)


def _use(record: dict[str, Any], config: dict[str, Any], base: str) -> str:
    revision = (record.get("base") or {}).get("revision")
    pinned = f', revision="{revision}"' if revision else ""
    if base == DEMO_BASE:
        imports, named = "from comlora_trl.demo import demo_model_path\n", "demo_model_path()"
        shell_base = "\"$(python -c 'from comlora_trl.demo import demo_model_path; print(demo_model_path())')\""
    else:
        imports, named, shell_base = "", json.dumps(resolve_base(base)), resolve_base(base)
    rank = vllm_rank(config) if "r" in config else 16
    tasks = ",".join(tasks_for(record.get("data")))
    return f"""## Use

From the folder that contains `winner/` (or whatever this folder is called now):

```python
{imports}from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("winner")
base = AutoModelForCausalLM.from_pretrained({named}{pinned})
model = PeftModel.from_pretrained(base, "winner")
```

Merged into the base model: `model.merge_and_unload().save_pretrained("merged")`. Served with vLLM:

```bash
vllm serve {shell_base} --enable-lora --max-lora-rank {rank} --lora-modules winner=winner
```

Scored with lm-evaluation-harness, where comlora-trl is installed (`pip install "comlora-trl[eval]"`):

```bash
lm_eval --model hf --model_args peft=winner/ --tasks {tasks} --batch_size 32 --output_path results
comlora-tables results --card winner/
```"""


def _settings(record: dict[str, Any], config: dict[str, Any]) -> str:
    rows = {"rank": config.get("r"), "lora_alpha": config.get("lora_alpha")}
    rows["target_modules"] = ", ".join(sorted(config.get("target_modules") or []))
    rows |= {"seed": record.get("seed")} | (record.get("settings") or {})
    lines = ["## Settings", "", "| | |", "| --- | --- |"]
    lines += [f"| `{name}` | {value} |" for name, value in rows.items() if value not in (None, "")]
    return "\n".join(lines)
