"""Writes and reads the files that an exported winner has in addition to PEFT's own.

Training writes these files and evaluation reads them. The modules here do not import torch.
"""
