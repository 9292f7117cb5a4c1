"""From images to batches: the order of an epoch, loader processes, slots of shared memory."""
