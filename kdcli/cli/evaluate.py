"""Without --baseline a model is compared with the first one in its own lineage."""

EXAMPLES = """
kdcli evaluate out/int8 --baseline out/teacher --max-drop 0.01 --min-speedup 2
kdcli evaluate out/student out/pruned out/int8 --html compare.html
"""
