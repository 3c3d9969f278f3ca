"""Ready recipes: each file says what it is for and which command runs it."""
