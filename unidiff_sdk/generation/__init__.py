"""Generation: from prompts to images, without PyTorch."""
