"""The class of this package's tasks in lm_eval: makes the prompt, and records the conditions of every figure.

A subclass of lm_eval's own [`ConfigurableTask`], named by `class:` in the task files, so it also works
without the hook (`--include_path`). The record is in a result's `configs`, under metadata's `comlora`:

- `rows`, `expected_rows`: rows scored, and rows of the whole public test set;
- `data_sha256`: of all the data's rows (instruction, output, answer) in their order;
- `prompt`, `chat_template_sha256` (None without one), `decoding`, `fewshot`, `protocol`;
- `adapter`: see [`comlora_trl.evaluation.adapters.describe`].
"""

import hashlib
import json
import os
import sys
from typing import Any

from lm_eval.api.task import ConfigurableTask

from comlora_trl.data import convai2, mmlu
from comlora_trl.data.errors import DataError
from comlora_trl.data.keywords import COMMONSENSE_TASKS
from comlora_trl.data.prompts import CHAT_TEMPLATE, DEFAULT_TEMPLATE, build_prompt, check_template
from comlora_trl.evaluation.adapters import adapter_folder, describe, recorded_prompt
from comlora_trl.evaluation.stopping import install_row_stopping

_said: set[str] = set()
# (rows, expected rows) by family, of tasks whose requests are built and whose row counts are not printed yet
_pending: dict[str, list[tuple[int, int]]] = {}


def _say(text: str) -> None:
    """One line on stderr, once, from one process."""
    if text not in _said and os.environ.get("RANK", "0") == "0" and sys.stderr is not None:
        _said.add(text)
        print(f"comlora-trl: {text}", file=sys.stderr)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class InstructionTask(ConfigurableTask):
    """A task whose documents are {instruction, output, answer}, and whose prompt is a template around the instruction.

    The template is the one that `--metadata` names, else the one that the adapter was trained under, else, under a
    chat template, the bare instruction, else ours.

    Args:
        config: the task file's content with the run's metadata.

    Raises:
        DataError: the data is missing or not as expected, or the prompt template is unknown.
    """

    family = "comlora"

    def __init__(self, config: dict[str, Any]) -> None:
        install_row_stopping()
        metadata = config.get("metadata") or {}
        self._chat: str | None = None
        self._adapter = metadata.get("peft") or metadata.get("lora_local_path")
        self._named = metadata.get("comlora_prompt")
        self._recorded = recorded_prompt(self._adapter) if self._adapter else None
        if self._named or self._recorded:
            try:
                check_template(self._named or self._recorded)
            except ValueError as error:
                raise DataError(str(error)) from error
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        self._rows = len(self.eval_docs)
        self._data_sha256 = _digest(self.eval_docs.to_list())
        self._about_adapter: dict[str, Any] | None = None

    @property
    def template(self) -> str:
        """The name of the prompt template."""
        return self._named or self._recorded or (CHAT_TEMPLATE if self._chat else DEFAULT_TEMPLATE)

    def expected_rows(self) -> int:
        """Rows of the whole public test set."""
        return self._rows

    def check_requirements(self) -> None:
        """Raises a DataError if the metrics lack something; otherwise it would fail only after generation."""

    def doc_to_text(self, doc: dict[str, Any], doc_to_text: Any = None) -> str:
        """The prompt."""
        return build_prompt(doc["instruction"], self.template)

    def set_config(self, key: str, value: Any, update: bool = False) -> None:
        """As lm_eval's; few-shot examples are refused."""
        if key == "num_fewshot":
            self.refuse_fewshot(value)
        super().set_config(key, value, update)

    def refuse_fewshot(self, number: int | None) -> None:
        """Raises a DataError for more than 0 examples."""
        if number:
            raise DataError(
                f"{self.task_name} takes no few-shot examples, got num_fewshot={number}: its instruction stands alone "
                "as in training; leave --num_fewshot out"
            )

    def override_metric(self, metric_name: str) -> None:
        """As lm_eval's (`--predict_only`): nothing is scored, so nothing is required."""
        self.check_requirements = lambda: None
        super().override_metric(metric_name)

    def build_all_requests(
        self,
        *,
        limit: int | None = None,
        samples: list[int] | None = None,
        rank: int = 0,
        cache_requests: bool = False,
        apply_chat_template: bool = False,
        chat_template: Any = None,
        tokenizer_name: str = "",
        **kwargs: Any,
    ) -> None:
        """As lm_eval's. `--cache_requests` keeps requests of other data, prompts or decoding apart."""
        self.check_requirements()
        self._chat = _digest(chat_template([{"role": "user", "content": "x"}])) if apply_chat_template else None
        self._about_adapter = self._describe_adapter()
        self._tell_prompt()
        scored = len(samples) if samples else min(limit or self._rows, self._rows)
        self._scored = scored
        if rank == 0:
            _pending.setdefault(self.family, []).append((scored, self.expected_rows()))
        if cache_requests:
            # lm_eval's key contains only the task's name
            identity = [self._data_sha256, self.template, self._chat, self.config.generation_kwargs, samples]
            tokenizer_name = f"{tokenizer_name}-{_digest(identity)}"
        super().build_all_requests(
            limit=limit,
            samples=samples,
            rank=rank,
            cache_requests=cache_requests,
            apply_chat_template=apply_chat_template,
            chat_template=chat_template,
            tokenizer_name=tokenizer_name,
            **kwargs,
        )

    def process_results(self, doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
        """As lm_eval's; the first one tells how many rows were scored."""
        _tell_rows()
        return super().process_results(doc, results)

    def dump_config(self) -> dict[str, Any]:
        """As lm_eval's, with the record."""
        config = super().dump_config()
        return {**config, "metadata": {**(config.get("metadata") or {}), "comlora": self._record()}}

    def _record(self) -> dict[str, Any]:
        kwargs = self.config.generation_kwargs or {}
        return {
            "rows": getattr(self, "_scored", self._rows),
            "expected_rows": self.expected_rows(),
            "data_sha256": self._data_sha256,
            "prompt": self.template,
            "chat_template_sha256": self._chat,
            "decoding": {key: value for key, value in sorted(kwargs.items()) if key != "until"},
            "fewshot": self.config.num_fewshot or 0,
            "protocol": (self.config.metadata or {}).get("protocol", "comlora"),
            "adapter": self._about_adapter,
        }

    def _describe_adapter(self) -> dict[str, Any] | None:
        if not self._adapter:
            return None
        try:
            return {"name": self._adapter} | describe(adapter_folder(self._adapter))
        except ValueError:
            return {"name": self._adapter}

    def _tell_prompt(self) -> None:
        if self._recorded and self._named and self._named != self._recorded:
            _say(f"{self._adapter} was trained under the prompt {self._recorded}, and is scored under {self._named}")
        elif self._recorded and self._recorded != DEFAULT_TEMPLATE:
            _say(f"prompt {self._recorded}, under which {self._adapter} was trained")
        elif self._chat and not self._named and not self._recorded:
            _say("under a chat template the instruction stands alone in the user's turn (prompt plain)")


class CommonsenseTask(InstructionTask):
    """One of the eight commonsense tasks."""

    @property
    def family(self) -> str:
        return self.task_name

    def expected_rows(self) -> int:
        return COMMONSENSE_TASKS[self.config.dataset_kwargs["comlora_source"]].test_rows


class MMLUTask(InstructionTask):
    """One subject of MMLU."""

    family = "comlora_mmlu"

    def expected_rows(self) -> int:
        return mmlu.SUBJECT_ROWS[self.config.dataset_kwargs["comlora_source"]]


class Convai2Task(InstructionTask):
    """CONVAI2, whose metrics need WordNet and BERTScore's model."""

    family = "comlora_convai2"

    def expected_rows(self) -> int:
        return convai2.VALIDATION_ROWS

    def check_requirements(self) -> None:
        from comlora_trl.evaluation.metrics import check_requirements

        try:
            check_requirements()
        except (RuntimeError, ValueError) as error:
            raise DataError(str(error)) from error

    def _record(self) -> dict[str, Any]:
        from comlora_trl.evaluation.metrics import bertscore_layers, bertscore_model_name

        try:
            layers = bertscore_layers()
        except (ImportError, ValueError):  # `--predict_only` needs neither
            layers = None
        return super()._record() | {"bertscore_model": bertscore_model_name(), "bertscore_layers": layers}


class DemoTask(InstructionTask):
    """The bundled test set."""

    family = "comlora_demo"


def check_tasks(manager: Any, names: list[str], predict_only: bool, num_fewshot: int | None) -> None:
    """Loads our tasks' data and what their metrics need, before a model is loaded.

    Raises:
        DataError: something is missing or not as expected.
    """
    for task in manager.load(names)["tasks"].values():
        if isinstance(task, InstructionTask):
            task.refuse_fewshot(num_fewshot)
            if not predict_only:
                task.check_requirements()


def _tell_rows() -> None:
    if not _pending:
        return
    parts = []
    for family, counts in _pending.items():
        rows, expected = (sum(column) for column in zip(*counts, strict=True))
        tasks = f" ({len(counts)} tasks)" if len(counts) > 1 else ""
        parts.append(f"{family}{tasks} {rows:,} of {expected:,}")
    _pending.clear()
    _said.discard(line := f"rows scored: {', '.join(parts)}")
    _say(line)
