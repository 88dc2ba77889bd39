"""The model card (`README.md`) of a winner, made from its records and from lm_eval's results.

The commands in the card can be copied: they work from the directory that contains the adapter's folder, or with the
adapter's hub id.
"""

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from comlora_trl.data.prompts import PROMPT_TEMPLATES
from comlora_trl.demo import DEMO_BASE, resolve_base
from comlora_trl.winner.folder import Adapter, tasks_for, vllm_rank
from comlora_trl.winner.table import averaged_remark, competition_table

CARD_FILE = "README.md"
_TAGS = ("comlora", "lora")
_SFT_TAGS = ("trl", "sft")  # of a record that names no tags
_HUB_NAMES = {"commonsense_170k": "commonsense_170k (LLM-Adapters)", "mmlu": "cais/mmlu"}
_QUESTION = "If you had a time machine, would you go to the past or to the future?"
_CITATION = """## Citation

```bibtex
@inproceedings{comlora2025,
    title        = {{ComLoRA: A Competitive Learning Approach for Enhancing LoRA}},
    booktitle    = {The Thirteenth International Conference on Learning Representations},
    year         = 2025,
}
```"""


@dataclass(frozen=True)
class Score:
    """The results of one task.

    Attributes:
        task: the task's name.
        metrics: the figures by name, in percent.
        conditions: how the task was run, as text.
    """

    task: str
    metrics: dict[str, float]
    conditions: str


def write_card(folder: str | Path, scores: Sequence[Score] = (), place: str | None = None) -> Path:
    """Writes the card of an adapter's folder and replaces an existing card.

    Args:
        folder: the adapter's folder.
        scores: the results of exactly these weights.
        place: the folder's final name, if the folder is renamed later; None for its present name.

    Returns:
        the path of the card.
    """
    path = Path(folder) / CARD_FILE
    path.write_text(card(Adapter.read(Path(folder)), place or Path(folder).resolve().name, scores), encoding="utf-8")
    return path


def card(
    adapter: Adapter,
    place: str,
    scores: Sequence[Score] = (),
    title: str | None = None,
    tags: Iterable[str] = (),
) -> str:
    """The text of a model card.

    Args:
        adapter: the adapter's records.
        place: the name of the adapter's folder, or its hub id.
        scores: the results of exactly these weights.
        title: the heading; None for the method's name.
        tags: additional tags for the hub.
    """
    method = adapter.method or "adapter"
    metadata = _metadata(adapter, method, scores, tags)
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n",
        f"# {title or method}\n\n{_summary(adapter, method)}",
        _competition(adapter),
        _scores(scores),
        _use(adapter, place),
        _settings(adapter),
        _CITATION,
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _metadata(adapter: Adapter, method: str, scores: Sequence[Score], tags: Iterable[str]) -> dict[str, Any]:
    """The card's YAML metadata. A base model without a hub id is left out, because the hub would reject the card."""
    data: dict[str, Any] = {}
    if _is_hub_id(adapter.base):
        data["base_model"] = adapter.base
    kind = "text-classification" if adapter.is_classifier else "text-generation"
    tags = list(dict.fromkeys((*_TAGS, *(adapter.record.get("tags") or _SFT_TAGS), *tags)))
    data |= {"library_name": "peft", "pipeline_tag": kind, "tags": tags}
    if _is_hub_id(adapter.record.get("data") or ""):
        data["datasets"] = [adapter.record["data"]]
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


def _summary(adapter: Adapter, method: str) -> str:
    base = f"`{adapter.base}`" if adapter.base else "a model without a name"
    if Path(adapter.base).is_absolute():
        base = f"the model in the folder {base}"
    revision = f", revision `{adapter.revision}`" if adapter.revision else ""
    lines = [f"{method}: an ordinary PEFT LoRA adapter of rank {adapter.config.get('r')} on {base}{revision}."]
    if adapter.base == DEMO_BASE:
        lines.append("That base is the small model inside the package `comlora-trl`.")
    if data := adapter.record.get("data"):
        lines.append(f"Trained on {_HUB_NAMES.get(data, f'`{data}`')}.")
    if template := adapter.record.get("prompt_template"):
        lines.append(f"Its prompts are those of the template `{template}` (`comlora_trl.data.build_prompt`).")
    return " ".join(lines)


def _competition(adapter: Adapter) -> str:
    summary = adapter.competition
    branches = summary.get("branches") or []
    if len(branches) < 2 or all(branch.get("validation_nll") is None for branch in branches):
        return ""
    headings, rows = competition_table(summary, adapter.branch)
    right = len(headings) - 2
    lines = [_row(heading.replace("\n", " ") for heading in headings), _row(["---", *["---:"] * right, "---"])]
    lines += [_row(row) for row in rows]
    examples = summary.get("validation_examples")
    measured = f", {examples} validation examples" if examples else ""
    head = f"## The competition\n\n{len(rows)} branches{measured}:\n\n"
    remark = averaged_remark(summary)
    lines += [] if remark is None else ["", f"{remark}."]
    return "\n\n".join([head + "\n".join(lines), *(f"![The competition]({name})" for name in adapter.pictures)])


def _row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _scores(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    lines = ["## Scores", "", _row(["task", "", "conditions"]), "| --- | --- | --- |"]
    for score in scores:
        metrics = ", ".join(f"{name} {value:.2f}" for name, value in score.metrics.items())
        lines.append(_row([f"`{score.task}`", metrics, score.conditions]))
    return "\n".join(lines)


def _use(adapter: Adapter, place: str) -> str:
    on_the_hub = "/" in place
    where = (
        "" if on_the_hub else f"From the folder that contains `{place}/` (or whatever this folder is called now):\n\n"
    )
    parts = [
        f"## Use\n\n{where}```python\n{_loading(adapter, place)}\n\n{_asking(adapter)}\n```",
        "Merged into the base model:\n\n```python\nmerged = model.merge_and_unload()\n"
        'merged.save_pretrained("merged")\ntokenizer.save_pretrained("merged")\n```',
    ]
    if adapter.is_classifier:
        return parts[0]
    if not adapter.base:
        return "\n\n".join([*parts, "To serve or score it, name the base model's folder, which is not recorded."])
    base, name = shlex.quote(resolve_base(adapter.base)), shlex.quote(place.split("/")[-1])
    if adapter.base == DEMO_BASE:
        base = "\"$(python -c 'from comlora_trl.demo import demo_model_path; print(demo_model_path())')\""
    revision = f" --revision {adapter.revision}" if adapter.revision else ""
    rank = vllm_rank(adapter.config) if "r" in adapter.config else 16
    serving = f"vllm serve {base}{revision} --enable-lora --max-lora-rank {rank} --lora-modules"
    scored = shlex.quote(place if on_the_hub else f"{place}/")
    tasks = ",".join(tasks_for(adapter.record.get("data")))
    scoring = f"lm_eval --model hf --model_args peft={scored} --tasks {tasks} --batch_size 32 --output_path results"
    on_card = "" if on_the_hub else f"\ncomlora-tables results --card {scored}"
    parts += [
        f"Served with vLLM:\n\n```bash\n{serving} {name}={shlex.quote(place)}\n```",
        'Scored with lm-evaluation-harness, where comlora-trl is installed (`pip install "comlora-trl[eval]"`):\n\n'
        f"```bash\n{scoring}{on_card}\n```",
    ]
    return "\n\n".join(parts)


def _loading(adapter: Adapter, place: str) -> str:
    if not adapter.base:
        lines = ["from peft import PeftModel", "from transformers import AutoTokenizer", ""]
        base = "base_model"
        lines += [f"# {base}: the model that the adapter was trained on"]
    else:
        kind = "AutoModelForSequenceClassification" if adapter.is_classifier else "AutoModelForCausalLM"
        lines = ["from peft import PeftModel", f"from transformers import {kind}, AutoTokenizer", ""]
        named, base = json.dumps(resolve_base(adapter.base)), "base"
        if adapter.base == DEMO_BASE:
            lines, named = ["from comlora_trl.demo import demo_model_path", *lines], "demo_model_path()"
        pinned = f', revision="{adapter.revision}"' if adapter.revision else ""
        labels = ", num_labels=1" if adapter.is_classifier else ""
        lines += [f"base = {kind}.from_pretrained({named}{pinned}{labels})"]
    lines += [f"model = PeftModel.from_pretrained({base}, {json.dumps(place)})"]
    return "\n".join([*lines, f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(place)})"])


def _asking(adapter: Adapter) -> str:
    """Code that asks the model a question in the form of the training prompts, or scores a text by a reward model."""
    if adapter.is_classifier:
        return 'inputs = tokenizer("the prompt and the answer", return_tensors="pt")\nprint(model(**inputs).logits)'
    template = adapter.record.get("prompt_template")
    if adapter.chats and template is None:
        asking = [f'messages = [{{"role": "user", "content": "{_QUESTION}"}}]']
        asking += ['options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}']
        asking += ["inputs = tokenizer.apply_chat_template(messages, **options)"]
    else:
        prompt = PROMPT_TEMPLATES[template or "plain"].replace("{instruction}", _QUESTION)
        asking = [f"prompt = {json.dumps(prompt)}", 'inputs = tokenizer(prompt, return_tensors="pt")']
    asking += ['output = model.generate(inputs["input_ids"], max_new_tokens=128)']
    return "\n".join([*asking, "print(tokenizer.decode(output[0], skip_special_tokens=True))"])


def _settings(adapter: Adapter) -> str:
    rows = {"rank": adapter.config.get("r"), "lora_alpha": adapter.config.get("lora_alpha")}
    targets = adapter.config.get("target_modules") or []
    rows["target_modules"] = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    rows |= {"seed": adapter.record.get("seed")} | (adapter.record.get("settings") or {})
    lines = ["## Settings", "", "| | |", "| --- | --- |"]
    lines += [_row([f"`{name}`", value]) for name, value in rows.items() if value not in (None, "")]
    if versions := adapter.record.get("versions"):
        lines += ["", f"Made with {', '.join(f'{name} {version}' for name, version in versions.items())}."]
    return "\n".join(lines)
