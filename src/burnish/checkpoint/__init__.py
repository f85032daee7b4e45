"""Checkpoints that survive a crash: verification, retention, space."""
