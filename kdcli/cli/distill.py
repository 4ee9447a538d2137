"""A teacher without a head for the task is fine-tuned on the data first; the result is cached."""

EXAMPLES = """
kdcli distill --teacher minilm --student tiny --data reviews/ -o out/student
kdcli distill --teacher minilm --student 3x192 --method response --method hidden --layer-map uniform
kdcli distill --teacher minilm --student static --labels 1000 --control
"""
