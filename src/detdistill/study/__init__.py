"""Studies: the same student with and without distillation, and the report about it."""
