"""What the loss leaves to the device: products into float32, how much is held at a time, and when the host waits."""
