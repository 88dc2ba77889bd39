"""A worker of a [`Pool`]: takes jobs from its standard input, and answers each with a line."""

import json
import os
import sys
from collections.abc import Callable

from studies.common.pool import Job


def work(prepare: Callable[[], Callable[[Job], Job]]) -> None:
    """Works until standard input ends. All that is printed besides the answers goes to standard error.

    Args:
        prepare: makes what a worker keeps from job to job, and returns what does a job.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what trainers print
    run = prepare()
    for line in sys.stdin:
        try:
            result = run(json.loads(line))
        except Exception as error:  # one arm's failure must not end the study; it is reported as such
            result = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(result) + "\n")
        answers.flush()
