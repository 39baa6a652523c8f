"""The network, ResNet50 with a classifier head, its weights, and Grad-CAM."""
