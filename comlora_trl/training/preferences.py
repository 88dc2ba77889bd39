"""[`CompetingPreferences`]: the code that TRL's preference trainers share when their branches compete.

The loss is TRL's. It is called once for each living branch, on the branch's view of one pass over all branches. A line
of a batch is a pair of completions, or one completion with everything that belongs to it. If rows are shared, a line
goes to one branch as a whole.

TRL's loss is a mean over the lines of a micro-batch. Here, a branch's loss is the mean over its lines in the whole
optimizer step, so each micro-batch of each process is weighted by its number of lines.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from trl.trainer.utils import disable_dropout_in_model

from comlora_trl import compat
from comlora_trl.branches.views import BranchView, BranchViews, branch_losses
from comlora_trl.competition.rungs import dealt_to
from comlora_trl.training.arguments import settle_arguments
from comlora_trl.training.attach import Attachment
from comlora_trl.training.competition import Counted
from comlora_trl.training.config import IndependentConfig
from comlora_trl.training.data_checks import check_precomputed, check_preferences, check_prepared
from comlora_trl.training.evaluation import Measured
from comlora_trl.training.hold_out import hold_out
from comlora_trl.training.model import BranchPass, ComLoRAModel
from comlora_trl.training.own_loss import OwnLosses, UndecidedView
from comlora_trl.training.trainer import CompetingTrainer

# TRL's names for the adapter that it trains, and for the frozen copy of it that serves as the reference
_DEFAULT, REFERENCE = "default", "ref"


class _Alone:
    """A stand-in for an accelerator whose gather methods return only this process's values."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def gather(self, tensor: Any) -> Any:
        return tensor

    def gather_for_metrics(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


class PreferenceLosses(OwnLosses):
    """Computes TRL's or a user's loss for each branch of a preference trainer."""

    def per_view(
        self,
        compute_loss: Callable,
        model: Any,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The sum of the living branches' losses, each computed on the branch's view."""
        trainer, competition = self.trainer, self.competition
        plan, place = competition.plan, competition.plan.used
        owners, _ = competition.deal_of(inputs)
        inputs = trainer.with_reference(inputs)
        seen, outputs, metrics = compat.train_tokens(trainer), [], {}
        lines = {branch: trainer.count(inputs).lines for branch in competition.state.living}
        if owners is not None:
            lines = {branch: owners.count(branch) for branch in competition.state.living}

        def loss_of(view: BranchView) -> Tensor:
            branch = view.branch
            if owners is None:
                compat.set_train_tokens(trainer, seen)  # TRL counts the batch for each branch
            given = {"return_outputs": True} if return_outputs and not outputs else {}
            with trainer.as_branch(branch) as found:
                loss = compute_loss(view, view.inputs, **given, num_items_in_batch=num_items_in_batch)
            metrics[branch] = found
            if given:
                loss, output = loss
                outputs.append(output)
            items = plan.tokens if owners is None else plan.branch_tokens[branch]
            return loss * (lines[branch] * competition.processes / items)

        views = partial(trainer.views, model, inputs, owners=owners)
        lonely = owners is not None and not self._everywhere(place)
        with trainer.alone(lonely):
            losses, passes = branch_losses(
                views, competition.state.living, loss_of, competition.model, competition.chunk
            )
        self._keep(metrics, lines, seen, lonely)
        loss = competition.combine_branches(losses, inputs, owners, None, passes)
        return (loss, outputs[0]) if return_outputs else loss

    def _everywhere(self, place: int) -> bool:
        """Whether TRL may gather values from all processes in each branch's loss of a micro-batch.

        Each process must have lines of the same branches. If TRL gathers a value for each line, each process must also
        have the same number of lines of each branch.
        """
        competition, processes = self.competition, self.competition.processes
        if processes == 1:
            return True
        plan, living = competition.plan, competition.state.living
        first = sum(plan.lines[: place * processes])
        found = []
        for count in plan.lines[place * processes : (place + 1) * processes]:
            branches = Counter(dealt_to(first + line, competition.step, living) for line in range(count))
            found.append(branches if self.trainer.gathers_lines else branches.keys())
            first += count
        return all(branches == found[0] for branches in found)

    def _keep(self, metrics: dict[int, dict], lines: dict[int, int], seen: int, lonely: bool) -> None:
        """Adds the leader's metrics to those of the run, and the `branch_metric` of each branch."""
        trainer, leader = self.trainer, self.competition.state.leader
        if lonely:
            metrics, tokens = _over_processes(metrics, lines, compat.train_tokens(trainer) - seen)
            compat.set_train_tokens(trainer, seen + tokens)
        kept, (own, metric) = compat.train_metrics(trainer), trainer.branch_metric
        for name, values in metrics.get(leader, {}).items():
            kept[name] += values
        for branch, found in metrics.items():
            if values := found.get(metric):  # TRL takes the mean of every list
                kept[f"comlora/{own}_{branch}"] += values
        kept["num_tokens"] = [compat.train_tokens(trainer)]


def _over_processes(metrics: dict[int, dict], lines: dict[int, int], tokens: int) -> tuple[dict[int, dict], int]:
    """Merges each branch's metrics over all processes, as means weighted by its lines; and sums the tokens."""
    extremes = {"min_reward": min, "max_reward": max}
    entries = gather_object([({branch: (found, lines[branch]) for branch, found in metrics.items()}, tokens)])
    merged: dict[int, dict[str, list[float]]] = {}
    for branch in sorted({branch for own, _ in entries for branch in own}):
        parts = [own[branch] for own, _ in entries if branch in own]
        names = dict.fromkeys(name for found, _ in parts for name in found)
        merged[branch] = {}
        for name in names:
            having = [(found[name], count) for found, count in parts if found.get(name)]
            total = sum(count for _, count in having)
            mean = sum(sum(v) / len(v) * count for v, count in having) / total
            merged[branch][name] = [extremes[name](v[-1] for v, _ in having) if name in extremes else mean]
    return merged, sum(own for _, own in entries)


def check_default_adapter(model: PeftModel) -> None:
    """Checks the name of the adapter to start from. TRL copies the adapter as the reference, and finds it by its name.

    Raises:
        ValueError: if the model has other adapters than the one with TRL's default name.
    """
    if list(model.peft_config) != [_DEFAULT]:
        raise ValueError(
            f"the model has the adapters {', '.join(model.peft_config)}, and TRL takes the one called {_DEFAULT!r} as "
            f"the reference: load it with PeftModel.from_pretrained(..., adapter_name={_DEFAULT!r}) alone, or pass a "
            "ref_model."
        )


def check_reference(model: Any) -> None:
    """Checks that TRL can compute log-probabilities with a `ref_model`.

    Raises:
        TypeError, ValueError: if it can't.
    """
    if isinstance(model, str):
        raise TypeError(
            f"ref_model={model!r} is a name, and TRL takes a loaded model: give "
            "AutoModelForCausalLM.from_pretrained(...) of it."
        )
    if isinstance(model, PeftModel):
        raise ValueError(
            "ref_model is a PeftModel, whose log-probabilities TRL can't compute: give ref_model.merge_and_unload()."
        )


class CompetingPreferences(CompetingTrainer):
    """The first base class of a competing preference trainer, before TRL's trainer.

    Attributes:
        stacked: number of rows of the model's batch that belong to one line.
        classifier: whether the model is a classifier, of whose head each branch trains a copy.
        gathers_lines: whether TRL's loss gathers a value for each line from all processes.
        has_reference: whether the loss compares the model with a reference model.
        branch_metric: a metric that is logged for every branch: its name in the log, and TRL's name.
        columns: the sets of columns, one of which TRL needs.
    """

    _losses_kind = PreferenceLosses
    stacked = 2
    classifier = False
    has_reference = True
    gathers_lines = True
    branch_metric = ("reward_accuracy", "rewards/accuracies")
    columns: Sequence[Sequence[str]] = (("chosen", "rejected"),)

    @contextmanager
    def preparing(
        self,
        model: str | PreTrainedModel,
        args: TrainingArguments | None,
        config: type[IndependentConfig],
        train_dataset: Dataset | IterableDataset | None,
        eval_dataset: Any,
        optimizers: tuple[Any, Any],
        peft_config: PeftConfig | None,
        processing_class: Any,
        quantization_config: Any,
        ref_model: Any = None,
    ) -> Iterator[dict[str, Any]]:
        """The context of TRL's `__init__`: checks the arguments before it, and attaches the branches after it.

        Yields:
            the arguments for TRL's `__init__`.
        """
        args = settle_arguments(args, config, model, self._name, train_dataset, optimizers[0])
        check_preferences(train_dataset, eval_dataset, self.columns)
        check_reference(ref_model)
        if isinstance(model, ComLoRAModel):
            raise ValueError(
                "the model has competing branches already, and TRL's preference trainers take one adapter: give the "
                "exported winner's folder, or model.merge_and_unload(), instead."
            )
        if getattr(args, "precompute_ref_log_probs", False) and args.world_size > 1:
            check_precomputed(train_dataset, eval_dataset, args.world_size)
        train_dataset, eval_dataset = hold_out(train_dataset, eval_dataset, args)
        attachment = Attachment(
            model, peft_config, args, processing_class, quantization_config, classifier=self.classifier
        )
        if self.has_reference and ref_model is None and isinstance(attachment.given, PeftModel):
            check_default_adapter(attachment.given)
        with attachment.building() as given:
            yield given | {"args": args, "train_dataset": train_dataset, "eval_dataset": eval_dataset}
        check_prepared(self.train_dataset, self.eval_dataset, args.max_length)
        self.compete(attachment)

    def compete(self, attachment: Attachment) -> None:
        """Adds the branches to the model that TRL built. The adapter that TRL keeps as the reference is kept."""
        reference = None
        if REFERENCE in getattr(self.model, "peft_config", {}):
            weights = get_peft_model_state_dict(self.model, adapter_name=REFERENCE, save_embedding_layers=False)
            reference = {name: value.detach().clone() for name, value in weights.items()}
            self.model.delete_adapter(REFERENCE)
        super().compete(attachment)
        if reference is not None and not getattr(self, "precompute_ref_logps", False):
            self.comlora_model.add_reference(REFERENCE, reference)
        self.loss_is_scaled_for_ga = True  # the loss is already normalised over the whole step
        self._leave_out_dropout()

    def begin_competition(self) -> None:
        """Begins a competition, or goes on with that of the checkpoint."""
        super().begin_competition()
        self._leave_out_dropout()  # of branches that were restored

    def _trained_settings(self) -> dict[str, Any]:
        """The settings of optimizer and schedule that differ from the arguments, and the settings of the loss."""
        names = ("loss_type", "beta")
        return super()._trained_settings() | {n: getattr(self.args, n) for n in names if hasattr(self.args, n)}

    def _leave_out_dropout(self) -> None:
        if self.args.disable_dropout:
            disable_dropout_in_model(self.comlora_model)

    @classmethod
    def count(cls, batch: dict[str, Any]) -> Counted:
        """Counts the lines (pairs) of a batch. The loss is a mean over lines."""
        lines = batch["input_ids"].size(0) // cls.stacked
        return Counted(lines, torch.ones(lines, dtype=torch.long, device=batch["input_ids"].device))

    def made_of(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors that TRL's loss derives from a batch and passes to the model."""
        return {"labels": inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)}

    def with_reference(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A copy of a batch, with the reference's log-probabilities if the loss needs them."""
        return dict(inputs)

    def views(
        self, model: Any, inputs: dict[str, Any], branches: Sequence[int], owners: Sequence[int] | None = None
    ) -> BranchViews:
        """The views of some branches on a batch."""
        made = self.made_of(inputs)
        return BranchViews(
            self.comlora_model, branches, inputs, wrapped=model, owners=owners, stacked=self.stacked, made=made
        )

    @contextmanager
    def as_branch(self, branch: int) -> Iterator[dict[str, list[float]]]:
        """Within the block, TRL's loss uses a branch's settings, and its metrics are collected separately.

        Yields:
            the metrics, which TRL fills in.
        """
        mode = "train" if self.model.training else "eval"
        kept, self._metrics[mode] = self._metrics[mode], defaultdict(list)
        found = self._metrics[mode]
        try:
            with self.settings_of_branch(branch):
                yield found
        finally:
            self._metrics[mode] = kept
        found.pop("num_tokens", None)

    @contextmanager
    def settings_of_branch(self, branch: int) -> Iterator[None]:
        """Within the block, TRL's loss uses a branch's settings. Here all branches have the same."""
        yield

    @contextmanager
    def alone(self, wanted: bool = True) -> Iterator[None]:
        """Within the block TRL's loss gathers nothing from other processes."""
        accelerator = self.accelerator
        if wanted:
            self.accelerator = _Alone(accelerator)
        try:
            yield
        finally:
            self.accelerator = accelerator

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None):
        """The sum of TRL's losses of the living branches.

        In evaluation mode, the result is TRL's loss of the leader. With a branch's view as the model, it is TRL's loss
        of that branch. Outside a training step, the batch counts as a whole optimizer step, and the run's figures do
        not change.
        """
        own = super().compute_loss
        if type(model) is UndecidedView:
            model = model.views.wrapped
        if isinstance(model, BranchView):
            return own(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            with self.settings_of_branch(self.competition.state.leader):
                return own(model, inputs, return_outputs, num_items_in_batch)
        if self._in_step:
            return self.own_losses.per_view(own, model, inputs, return_outputs, num_items_in_batch)
        restore = self.own_losses.kept_logs()
        try:
            with self.competition.own_step(inputs) as items:
                return self.own_losses.per_view(own, model, inputs, return_outputs, items)
        finally:
            restore()

    _competing_loss = compute_loss

    def trls_loss(self, view: BranchView, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss of a branch's view."""
        return super().compute_loss(view, inputs)

    def measure_batch(self, model: Any, inputs: dict[str, Any], rows: BranchPass, count: int) -> Measured:
        """TRL's loss and reward accuracy of every living branch, times the lines of the batch."""
        return self.measure_branches(model, inputs, rows, lambda view: self.trls_loss(view, view.inputs))

    def measure_branches(
        self, model: Any, inputs: dict[str, Any], rows: BranchPass, loss_of: Callable[[BranchView], Tensor]
    ) -> Measured:
        """A loss of every living branch and, if TRL has it, its reward accuracy, times the lines of the batch."""
        inputs, count = self.with_reference(inputs), self.count(inputs).lines
        device, chunk = inputs["input_ids"].device, rows.chunk or len(rows.living)
        losses = torch.zeros(self.args.comlora_k, 1, dtype=torch.float64, device=device)
        correct = torch.zeros_like(losses)
        with self.alone():
            for first in range(0, len(rows.living), chunk):
                for view in self.views(model, inputs, rows.living[first : first + chunk]):
                    with self.as_branch(view.branch) as metrics:
                        losses[view.branch] = loss_of(view) * count
                    if self.branch_metric[0] == "reward_accuracy":
                        # TRL's mean is a rounded float32 number; whole numbers of pairs keep equal branches equal
                        correct[view.branch] = round(metrics[self.branch_metric[1]][-1] * count)
        return Measured(losses, correct, torch.tensor([count], device=device))


class ReferenceOnce(CompetingPreferences):
    """[`CompetingPreferences`] with a loss that has a reference and a β.

    TRL's method computes the reference's log-probabilities once for all branches. They are added to the batch, where
    TRL's loss reads precomputed log-probabilities. Those of validation batches are kept for the next selection of the
    same training.
    """

    _references: dict[str, dict[str, Tensor]] | None = None

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Runs the Trainer's evaluation. TRL precomputes the reference of a given data set, if it does so in training.

        Raises:
            ValueError: if several processes can't do this.
        """
        if self.precompute_ref_logps and self.args.world_size > 1 and not isinstance(eval_dataset, str):
            check_precomputed(None, eval_dataset, self.args.world_size)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def reference_of(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The reference's log-probabilities of a batch, by TRL's names for them in a batch."""
        raise NotImplementedError

    def with_reference(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch with the reference's log-probabilities."""
        if self.precompute_ref_logps:
            return dict(inputs)
        if not self.keeps_references:
            return {**inputs, **self.reference_of(inputs)}
        kept, key = self._references, fingerprint(inputs)
        if kept is None:
            kept = self._references = {}
        if key not in kept:
            kept[key] = self.reference_of(inputs)
        return {**inputs, **kept[key]}

    @property
    def keeps_references(self) -> bool:
        """Whether the reference gives the same log-probabilities in each validation, and may be left out in one.

        With several processes, one that leaves it out while others do not could make these wait for ever.
        """
        alone = self.accelerator.distributed_type == DistributedType.NO
        return alone and self.is_in_train and not self.model.training and not self.args.sync_ref_model

    def begin_competition(self) -> None:
        """As in the base class."""
        self._references = None
        super().begin_competition()

    def finish_competition(self) -> None:
        """As in the base class. The kept log-probabilities are freed."""
        super().finish_competition()
        self._references = None

    @contextmanager
    def settings_of_branch(self, branch: int) -> Iterator[None]:
        """Within the block, TRL's loss uses the branch's β."""
        kept, self.beta = self.beta, self.args.branch_betas[branch]
        try:
            yield
        finally:
            self.beta = kept

    @contextmanager
    def as_branch(self, branch: int) -> Iterator[dict[str, list[float]]]:
        """As in the base class. TRL's loss also reads the reference's log-probabilities from the batch."""
        kept, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            with super().as_branch(branch) as found:
                yield found
        finally:
            self.precompute_ref_logps = kept


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """A hash of a batch's tensors, by which equal batches are found."""
    found = hashlib.sha256()
    for name, value in sorted(inputs.items()):
        if isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
