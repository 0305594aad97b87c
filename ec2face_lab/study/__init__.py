"""Experiments of the paper: pictures, scores, tables, figures and the report."""
