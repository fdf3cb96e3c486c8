"""What balancing a training configuration will really do, in words. No torch in these files, and nothing is run.

document.py, shell.py   files and launch lines as names and values      recognition.py   which engine they are for
engines/                one reader for each engine                      diagnosis.py     the words that all answer in
families.py, layers.py  models of transformers                          published.py     models by name
keys.py                 names that nobody reads                         options.py       what the user says beside
remedies.py             what to write                                   text.py          80 columns, and JSON
ours.py                 what the file asks equipoise for
"""

from __future__ import annotations

from collections.abc import Sequence

from .diagnosis import Diagnosis
from .document import read_document
from .engines import ENGINES
from .options import Options
from .ours import policies_of
from .recognition import recognize
from .text import headline, render, to_json

__all__ = ["ENGINES", "Diagnosis", "Options", "diagnose", "headline", "render", "to_json"]


def diagnose(inputs: Sequence[str], options: Options | None = None) -> Diagnosis:
    """What the configuration, folder or launch line in ``inputs`` will do.

    Raises DataError for what cannot be read, ConfigError for what is no configuration, of no engine, or of a dense
    model.

    >>> case = diagnose("torchrun --nproc_per_node 8 pretrain_gpt.py --num-experts 8 --num-layers 4 "
    ...                 "--moe-aux-loss-coeff 1e-2 --micro-batch-size 2 --global-batch-size 64".split())
    >>> next(iter(headline(case)))
    "A loss balances each rank's micro-batch: your Balance BSZ is 2, of 64 in a step."
    """
    options = options or Options()
    document = read_document(inputs)
    case = ENGINES[recognize(document, options)].examine(document, options)
    case.ours = policies_of(document)
    return case
