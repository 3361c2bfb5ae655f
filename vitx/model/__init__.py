"""The Vision Transformer: configuration, tensor functions, layers, the model and its cost."""
