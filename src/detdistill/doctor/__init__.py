"""The check before the hours are spent: installation, data, teacher, methods, one step, recipe.

Each file checks one thing and says what it found as `Finding`s; `run` puts them in order. Nothing
here is trained for longer than a few steps, on a copy, and nothing is written.
"""
