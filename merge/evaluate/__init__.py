"""Tasks of a recipe, measured on a live model or by a program."""
