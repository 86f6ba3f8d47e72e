"""From a catalog on disk to training batches."""
