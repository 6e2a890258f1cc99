"""Contextual features: for every patch position, a softmax over the images of a context set (method.md, section 1)."""
