"""Adapters: small trainable weights beside frozen ones. Which modules get one, and what it computes."""
