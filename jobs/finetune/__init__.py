"""Fine-tuning: labels to train with, augmented and mixed images, the loss of their classes, and their accuracy."""
