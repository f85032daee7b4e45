"""Noise, time, target and loss, each apart from the others."""
