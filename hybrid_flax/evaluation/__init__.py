"""Accuracy on sets beside the validation split: layouts, metrics, tables, comparisons."""
