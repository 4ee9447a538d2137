"""How each kind of structure is pruned."""
