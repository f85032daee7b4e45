"""Optimizers, learning-rate schedules, moving averages, and their state in a checkpoint."""
