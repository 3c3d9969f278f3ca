"""What is measured, how, and the committed results: the modules behind `ggez-merge bench`."""
