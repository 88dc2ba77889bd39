"""The files of an exported winner besides PEFT's own: writes and reads them.

Training writes them and evaluation reads them. Nothing here imports torch.
"""
