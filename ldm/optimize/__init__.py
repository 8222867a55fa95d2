"""Speed and memory, applied from outside to a built model: one idea per file."""
