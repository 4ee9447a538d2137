"""Layers that would grow stay as they are."""

EXAMPLES = """
kdcli lowrank out/pruned --budget 0.6 -o out/lowrank
kdcli lowrank out/pruned --energy 0.95 --exclude "*.layer.0.*" --epochs 1
kdcli lowrank out/pruned --max-drop 0.01 --include embeddings -o out/lowrank
"""
