"""Who teaches whom, and when: one module a strategy, each with ``run(context, plan) -> Applied``."""
