"""The public trainers: TRL's SFT, DPO, KTO and reward trainers with competing branches."""
