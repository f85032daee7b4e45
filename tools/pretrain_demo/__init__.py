"""How the demonstration's base model is made: a tiny FLUX pipeline for an endless picture world."""
