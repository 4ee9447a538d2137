"""Options of ``kdcli quantize``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kdcli import registry
from kdcli.options import Flag, choice
from kdcli.request import Dense

SCHEMES: tuple[str, ...] = (*registry.names("quantize"), "auto")
"""What ``--scheme`` may be: the files of ``stages/quantize/schemes``, and the choice among them."""

EMBEDDINGS: tuple[str, ...] = ("int8", "int4", "fp16", "fp32")


class QuantizeOptions(Dense):
    """``kdcli quantize``."""

    scheme: Annotated[str, choice("scheme", lambda: SCHEMES)] = Field(
        default="dynamic-int8", description="Number format of weights and activations."
    )
    calibration: Annotated[str | None, Flag(metavar="NAME")] = Field(
        default=None, description="How activation ranges are chosen."
    )
    calibration_samples: Annotated[int, Flag(metavar="N")] = Field(
        default=128, ge=1, description="Rows to calibrate on."
    )
    keep_fp32: Annotated[tuple[str, ...], Flag(metavar="PATTERN")] = Field(
        default=(), description="Leave layers that match this glob in fp32; repeatable."
    )
    embeddings: Annotated[str | None, choice("embedding format", lambda: EMBEDDINGS)] = Field(
        default=None,
        description="Format of the embedding tables: int8, int4, fp16 or fp32; by default the scheme's own.",
    )
    sensitivity: bool = Field(
        default=False,
        description="Measure what each layer loses when it alone is quantised, and when it is kept.",
    )
    epochs: Annotated[int, Flag(metavar="N")] = Field(
        default=0, ge=0, description="Passes of quantisation-aware training."
    )
