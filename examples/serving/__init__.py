"""Parts of serve.py, each with one task."""
