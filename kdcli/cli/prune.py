"""Heads, neurons, layers, features and tokens are cut out; weights only become zero, which saves no time."""

EXAMPLES = """
kdcli prune out/student --structure heads+neurons --sparsity 0.5 -o out/pruned
kdcli prune out/model --structure vocab+layers+heads+neurons --set keep_layers=5 --budget 0.5 --epochs 1
kdcli prune out/student --target-speedup 1.6 -o out/pruned
kdcli distill --teacher minilm --student tiny | kdcli prune - --budget 0.6
"""
