"""GG-EZ: merge a global model with its region-tuned copies."""

__version__ = "0.1.0"
