"""The competition as a TRL trainer: `config`, `trainer`, and what happens before, during and after training."""
