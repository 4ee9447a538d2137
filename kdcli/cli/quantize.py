"""The last stage of a pipeline: integers have no gradients for another one to follow."""

EXAMPLES = """
kdcli quantize out/pruned --scheme dynamic-int8 -o out/int8
kdcli prune out/student --sparsity 0.3 | kdcli quantize - --max-drop 0.01 --max-size 5MiB
"""
