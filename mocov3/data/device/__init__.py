"""What is done to a batch on the device: pixels to floats, colours of views, strips of tokens. Needs torch."""
