"""Models without their weights, and what two of them make together."""
