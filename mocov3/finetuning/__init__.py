"""Fine-tuning on one rank: the order of pictures, mixing, the model and its optimizer, a step, the loop, its files."""
