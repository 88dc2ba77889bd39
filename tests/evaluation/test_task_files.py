"""The task files: READMEs in the harness's form, versions, stop strings."""

import re

import pytest
from environments import run

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

from comlora_trl.data.files import tasks_folder  # noqa: E402
from comlora_trl.evaluation.stopping import RESPONSE_MARK  # noqa: E402

FOLDERS = sorted(path.parent.name for path in tasks_folder().glob("*/*.yaml"))
# The headings of lm_eval's own template for new tasks
HEADINGS = ["### Paper", "### Citation", "### Groups, Tags, and Tasks", "#### Tasks", "### Checklist", "### Changelog"]


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=str(tasks_folder()), include_defaults=False)


@pytest.mark.parametrize("folder", sorted(set(FOLDERS)))
def test_readmes_have_the_harness_form(folder):
    text = (tasks_folder() / folder / "README.md").read_text()
    places = [text.find(f"\n{heading}\n") for heading in HEADINGS]
    assert places == sorted(places) and places[0] > 0, dict(zip(HEADINGS, places, strict=True))
    assert re.search(r"\* 1\.0: first version", text.split("### Changelog")[1])


def test_every_task_has_a_version_and_its_readme_tells_of_it(manager):
    assert len(manager.all_tasks) == 3 * (8 + 1) + 57 + 5 + 2 + 1
    for name in manager.all_tasks:
        entry = manager.task_index[name]
        changelog = (entry.yaml_path.parent / "README.md").read_text().split("### Changelog")[1]
        assert f" {entry.cfg['metadata']['version']}:" in changelog, name


def test_every_task_is_stopped_row_by_row(manager):
    """The stop string that makes the answers independent of the batch size."""
    for name in manager.all_subtasks:
        assert RESPONSE_MARK in manager.task_index[name].cfg["generation_kwargs"]["until"][0], name


@pytest.mark.slow
def test_validate_finds_every_task(manager, tmp_path):
    names = ",".join(manager.all_tasks)
    result = run(["-m", "comlora_trl.cli.eval", "validate", "--tasks", names], tmp_path)
    assert "All tasks found and valid" in result.stdout, result.stderr[-2000:]
