"""vpdeploy: structured pruning of vision models, from a trained network to a verified ONNX file."""
