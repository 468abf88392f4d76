"""The 8x8 handwritten digits as a TensorFlow Datasets builder."""
