"""Task files for lm-evaluation-harness (0.4.13); their code is in comlora_trl.evaluation."""
