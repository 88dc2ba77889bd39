"""A competition without a Trainer: [`Competition`] in a plain PyTorch loop is the trainer, step by step."""

import pytest
import torch
from conftest import difference, make_lora, make_model, parameters
from peft import PeftModel
from trl.trainer.utils import add_fused_lm_head

from comlora_trl.competition import CompetitionSettings, ValidationTally
from comlora_trl.competition.rungs import parse_rungs
from comlora_trl.competition.selector import SelectorSettings
from comlora_trl.training.averages import WeightAverages
from comlora_trl.training.competition import Competition
from comlora_trl.training.model import ComLoRAModel

RATES = (5e-3, 1e-2, 2e-2)
CASES = {
    "selector": ({"comlora_k": 3}, {"k": 3}),
    "tournament": (
        {"comlora_k": 3, "comlora_branch_learning_rates": list(RATES), "comlora_rungs": "0.5:2,0.75:1"}
        | {"comlora_selector": False, "comlora_rows": "shared"},
        {"k": 3, "independent": True, "rates": RATES, "rungs": parse_rungs("0.5:2,0.75:1", 3), "rows": "shared"}
        | {"winner_by": "validation_loss"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_plain_loop_is_the_trainer(name, train, tmp_path):
    options, settings = CASES[name]
    trainer = train(start=False, lr_scheduler_type="constant", weight_decay=0.0, **options)
    steps, original = [], trainer.data_collator

    def record(examples):
        batch = original(examples)
        if trainer.model.training:
            steps.append(dict(batch))
        return batch

    trainer.data_collator = record
    validation = [original([trainer.eval_dataset[index] for index in range(13)])]
    trainer.train()

    # ---- The loop of the page "use it in your own loop" ----
    base = make_model().double()
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    torch.manual_seed(trainer.args.seed)
    selector = SelectorSettings() if name == "selector" else None
    model = ComLoRAModel(base, make_lora(), settings["k"], selector).train()
    competition = Competition(model, CompetitionSettings(**settings, seed=trainer.args.seed))
    groups = [
        {"params": model.branch_parameters(branch), "lr": rate}
        for branch, rate in enumerate(competition.settings.rates or [trainer.args.learning_rate] * model.k)
    ]
    groups += [{"params": model.selector_parameters(), "lr": trainer.args.learning_rate}] if selector else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def run(batch, rows):
        return model(branch_pass=rows, fused_lm_head=True, use_cache=False, **batch)

    @torch.no_grad()
    def measure() -> ValidationTally:
        model.eval()
        tally = ValidationTally.empty(model.k)
        for batch in validation:
            output = run(batch, competition.branch_pass())
            tally.add(output.nll, output.correct, output.tokens, output.scores, len(batch["input_ids"]))
        model.train()
        return tally

    averages = WeightAverages(model, horizon=0.25)

    def measure_averages() -> ValidationTally:
        with averages.in_place(model):
            return measure()

    competition.begin(total_steps=len(steps))
    for batch in steps:
        plan = competition.plan_step([batch])
        output = run(batch, competition.rows_of(batch))
        loss = -output.log_probs.sum() / plan.tokens
        competition.combine(loss, output).backward()
        competition.end_step(max_norm=trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        averages.update(competition.state.living, competition.step)
        if competition.reach_rung(measure_averages, averages.horizon) is not None:
            competition.drop_retired()
    competition.select(measure)

    own = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert difference(own, parameters(trainer)) < 1e-9
    ours, theirs = competition.state, trainer.competition.state
    assert (ours.wins, ours.retired, ours.row_passes) == (theirs.wins, theirs.retired, theirs.row_passes)
    for own, rung in zip(ours.rungs, theirs.rungs, strict=True):
        living = [(a, b) for a, b in zip(own["validation_nll"], rung["validation_nll"], strict=True) if a is not None]
        assert own["average"] == rung["average"] and all(a == pytest.approx(b, abs=1e-6) for a, b in living)
    for figure in ("validation_nll", "scores"):
        pairs = zip(ours.selection[figure] or [], theirs.selection[figure] or [], strict=True)
        assert all(a == b or a == pytest.approx(b, abs=1e-6) for a, b in pairs)
    assert ours.leader == theirs.leader

    model.snapshot(ours.leader).save(tmp_path)  # the winner, an ordinary PEFT adapter
    ids = torch.arange(3, 21).view(2, 9)
    plain = PeftModel.from_pretrained(make_model().double(), tmp_path).eval()
    torch.testing.assert_close(plain(input_ids=ids).logits, model.eval()(input_ids=ids).logits, rtol=0, atol=1e-6)
