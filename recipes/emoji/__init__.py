"""A really trained pair of small image-text models, and the evaluation that shows what merging them does."""
