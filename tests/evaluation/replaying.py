"""A model that answers what it is told, run through lm_eval on our tasks."""

from unittest.mock import patch

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from comlora_trl.data.files import tasks_folder


def manager_of(metadata):
    """Our tasks alone: indexing all of lm_eval's takes seconds."""
    return TaskManager(include_path=str(tasks_folder()), include_defaults=False, metadata=metadata)


class Replay(LM):
    """Answers with what it is told, by prompt."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.seen = answer, []

    def generate_until(self, requests, disable_tqdm=False):
        self.seen += [request.args for request in requests]
        return [self.answer(request.doc) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def evaluate(answer, names, data_dir, settings=None, model=None, **metadata):
    """(results, model) of `simple_evaluate` with these settings; the metadata is that of `--metadata`."""
    model = model or Replay(answer)
    metadata = {"comlora_data_dir": str(data_dir), **metadata}
    # its information on the machine takes a second
    with patch("lm_eval.evaluator.add_env_info"), patch("lm_eval.evaluator.get_git_commit_hash"):
        result = lm_eval.simple_evaluate(
            model=model, tasks=names, task_manager=manager_of(metadata), bootstrap_iters=0, **(settings or {})
        )
    return result, model
