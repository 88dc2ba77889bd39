"""The competition of one run, and everything that TRL's trainers need to run it: before, during and after training."""
