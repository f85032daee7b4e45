"""The demonstration that ships with the package: a tiny trained base model and something new to teach it."""
