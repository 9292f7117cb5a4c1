"""Fine-tuning on one rank: the order of images, mixing, the model and its optimizer, a step, the loop, its files."""
