"""The network: a backbone with a classifier head, its weights, and Grad-CAM."""
