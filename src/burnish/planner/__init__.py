"""What a run will take before it runs: memory and time from an abstract trace, and the settings that fit."""
