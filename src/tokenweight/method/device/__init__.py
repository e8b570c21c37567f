"""What the loss leaves to the device: products of 16-bit matrices into float32, and how much is held at a time."""
