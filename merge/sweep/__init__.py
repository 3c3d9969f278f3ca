"""The sweep: many candidates of one recipe, their scores, and the one that deserves to be shipped."""
