"""Checks that refuse nonsense before it costs anything: settings, arguments, ranks, processes."""
