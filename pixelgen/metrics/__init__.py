"""Measures of generated images: the distribution metrics of the ImageNet papers and GenEval."""
