"""What models are trained on: sources of captioned images, and the batches that a training step is given."""

from ldm.training.data.example import DamagedExample, Example, Source

__all__ = ["DamagedExample", "Example", "Source"]
