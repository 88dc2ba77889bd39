"""Evaluation with lm-evaluation-harness: the tasks' code, the hook that makes lm_eval find them, tables."""
