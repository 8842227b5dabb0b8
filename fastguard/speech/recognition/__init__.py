"""From a checkpoint and recordings to text, times and error rates."""
