"""What a trained teacher and a trained student disagree on, as the distillation papers measure it.

`run` shows every image to both models; each of `conflict`, `ranks`, `imitation` and `similarity`
measures one paper's argument. Their arithmetic is in `statistics` and in pure functions beside
them; what is drawn is in `charts`, `maps` and `report`.
"""
