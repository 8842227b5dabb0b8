"""From recordings and texts on the disk to padded batches."""
