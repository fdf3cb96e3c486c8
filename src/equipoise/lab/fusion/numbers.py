"""What one evaluation says, as plain numbers by name: for claims and for comparisons alike.

A loss is of inference, which sees no token to come; a chosen loss is that of experts that choose from a batch, as in
training, and see tokens to come; a gap is the first less the second.
"""

from __future__ import annotations

import math
from statistics import fmean

import torch

from ...functional.metrics import maxvio
from ...storage.run_record import Evaluation
from .strategies import MODALITIES

__all__ = ["MEASURES", "numbers_of"]

MEASURES = {
    **{f"loss {name}": f"nats per {name} token" for name in MODALITIES},
    **{f"chosen loss {name}": f"nats per {name} token" for name in MODALITIES},
    **{f"gap {name}": f"nats per {name} token" for name in MODALITIES},
    **{f"accuracy {name}": f"share of ({name} token, expert) pairs that auxiliary routers say right"
       for name in MODALITIES},
    **{f"precision {name}": "of the pairs they let compute, share that experts would choose" for name in MODALITIES},
    **{f"recall {name}": "of the pairs that experts would choose, share they let compute" for name in MODALITIES},
    **{f"experts {name}": f"experts per {name} token, causal" for name in MODALITIES},
    **{f"maxvio {name}": f"of {name} tokens over the experts open to them" for name in MODALITIES},
    "information": "nats between expert and modality",
}  # fmt: skip


def numbers_of(found: Evaluation, open_to: tuple[range, range]) -> dict[str, float]:
    """The measures of an evaluation; loads are means over layers. NaN where no expert chooses.

    Args:
        open_to: the experts that each modality may meet, of `Strategy.open_to`.
    """
    counts_DLE, numbers = torch.tensor(found.counts), {}
    for at, (name, experts) in enumerate(zip(MODALITIES, open_to, strict=True)):
        said = found.choices
        chosen = said.get(f"loss {name}", math.nan)
        numbers |= {
            f"loss {name}": found.loss[name],
            f"chosen loss {name}": chosen,
            f"gap {name}": found.loss[name] - chosen,
            **{f"{what} {name}": said.get(f"{what} {name}", math.nan) for what in ("accuracy", "precision", "recall")},
            f"experts {name}": said.get(f"experts {name}", math.nan),
            f"maxvio {name}": float(maxvio(counts_DLE[at][:, experts.start : experts.stop]).mean()),
        }
    numbers["information"] = fmean(found.mutual_information)
    return {name: numbers[name] for name in MEASURES}
