"""One reader for each engine: what its configuration makes of balancing.

transformers.py  a model's config.json        trainer.py   what trainers do with the loss of transformers
trl.py           TRL                          axolotl.py, llamafactory.py, swift.py   front-ends
megatron.py      Megatron-LM's arguments      bridge.py    what Megatron-Bridge imports
verl.py          RL on either                 torchtitan.py
"""

from __future__ import annotations

from types import ModuleType

from . import axolotl, bridge, llamafactory, megatron, swift, torchtitan, transformers, trl, verl

__all__ = ["ENGINES"]

# A reader is a module with NAME, MARKERS (names that speak for it), KNOWN and examine(document, options).
ENGINES: dict[str, ModuleType] = {
    "axolotl": axolotl,
    "llamafactory": llamafactory,
    "megatron": megatron,
    "megatron-bridge": bridge,
    "ms-swift": swift,
    "torchtitan": torchtitan,
    "transformers": transformers,
    "trl": trl,
    "verl": verl,
}
