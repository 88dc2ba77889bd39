"""The trainers that users meet: TRL's, with competing branches; each has one loss."""
