"""Run it last: integers have no gradients, so no other stage can follow."""

EXAMPLES = """
kdcli quantize out/pruned --scheme dynamic-int8 -o out/int8
kdcli prune out/student --sparsity 0.3 | kdcli quantize - --max-drop 0.01 --max-size 5MiB
"""
