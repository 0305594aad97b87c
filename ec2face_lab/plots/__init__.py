"""Figures and tables: how results are plotted, rendered and saved."""
