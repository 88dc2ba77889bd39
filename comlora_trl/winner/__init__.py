"""What an exported winner's folder carries besides PEFT's files, and what it tells.

Training writes it and evaluation reads it, so it lies below both; nothing here imports torch.
"""
