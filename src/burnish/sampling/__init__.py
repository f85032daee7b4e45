"""Drawing pictures: one sampler for every family, grids, numbered outputs, prompt files."""
