"""The answers do not depend on the batch size, greedy or with beams."""

import random

import pytest
import torch
from conftest import exhaustive, make_model, make_tokenizer

pytest.importorskip("lm_eval")

import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from comlora_trl.data.files import tasks_folder  # noqa: E402
from comlora_trl.evaluation.stopping import RESPONSE_MARK, install_row_stopping  # noqa: E402


def generate(prompts, batch_size, beams, until):
    install_row_stopping()
    model = make_model().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # random weights are nearly indifferent between tokens; this decides them
    options = {"until": until, "do_sample": False, "max_gen_toks": 24, "num_beams": beams}
    requests = [
        Instance("generate_until", {}, (prompt, dict(options, until=list(until))), index)
        for index, prompt in enumerate(prompts)
    ]
    return HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=batch_size).generate_until(requests, True)


@pytest.fixture(scope="module")
def prompts():
    draw = random.Random(0)
    return ["".join(draw.choice("abcdefgh ") for _ in range(draw.randint(3, 60))) for _ in range(200)]


@pytest.mark.slow
@pytest.mark.parametrize("beams", [*exhaustive(1), 4])
def test_answers_do_not_depend_on_the_batch_size(prompts, beams):
    """ "U" is a frequent character of this model, so that most rows meet the stop string, each at its own time."""
    until = ["U", RESPONSE_MARK]
    single, batched = (generate(prompts, size, beams, until) for size in (1, 32))
    assert single == batched
    assert len(set(single)) > 50 and sum(len(text) < 24 for text in single) > 20


@pytest.mark.slow
def test_lm_evals_own_check_does_depend_on_it(prompts):
    """Why the check is there: when this fails, lm_eval has mended it, and it can go."""
    single, batched = (generate(prompts, size, 4, ["U"]) for size in (1, 32))
    assert single != batched


@pytest.mark.slow
@pytest.mark.parametrize("beams", [*exhaustive(1), 4])
def test_nor_do_they_through_a_task(beams):
    """With lm_eval's own check 43 of the 100 answers differ with 4 beams. "F" is a frequent character here."""
    manager = TaskManager(include_path=str(tasks_folder()), include_defaults=False, metadata={})
    answers = []
    for size in (1, 32):
        model = make_model(max_position_embeddings=1024, initializer_range=0.2).eval()
        result = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=size),
            tasks=["comlora_demo"],
            task_manager=manager,
            limit=100,
            gen_kwargs={"num_beams": beams, "until": [RESPONSE_MARK, "F"]},
            bootstrap_iters=0,
        )
        answers.append([sample["resps"][0][0] for sample in result["samples"]["comlora_demo"]])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 50 and len(set(map(len, answers[0]))) > 10
