"""Device-level parts of the loss: products into float32, chunk sizes, and host-device synchronization."""
