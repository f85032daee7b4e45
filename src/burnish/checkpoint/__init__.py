"""Checkpoints that survive a crash: atomic files and folders, verification, retention, space.

Nothing is imported here: `burnish.checkpoint.atomic` must stay usable without torch.
"""
