"""The files of an inspection: what a model's routers did with text of several domains, typed, read and written whole.

    FOLDER/inspection.json   facts, domains, numbers per layer, token strings; the checksum of the arrays
    FOLDER/arrays.npz        everything per expert: numpy arrays, no pickle
    FOLDER/state/            only while an inspection runs, or after it was stopped

docs/measures.md defines every number. Imports no torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from ..errors import DataError
from .codec import Rules, decode
from .files import output_errors, write_whole

__all__ = [
    "ARRAYS_NAME",
    "INSPECTION_NAME",
    "SCHEMA",
    "Arrays",
    "DomainText",
    "Inspection",
    "InspectionFacts",
    "Layer",
    "Pair",
    "is_inspection",
    "read_inspection",
    "write_inspection",
]  # fmt: skip

INSPECTION_NAME, ARRAYS_NAME = "inspection.json", "arrays.npz"
KIND, SCHEMA = "equipoise inspection", 1
RULES = Rules(unknown_fields=True)
HIGH = 2.0  # times the frequency of uniform routing: from there on an expert is one of a domain's frequent ones


@dataclass(frozen=True)
class InspectionFacts:
    """What was inspected, and how."""

    model: str  # as the user named it
    family: str  # transformers' model_type, or "equipoise"
    data: str
    against: str | None  # the second checkpoint, of router saturation
    device: str
    dtype: str
    created: str  # ISO 8601, UTC
    seconds: float  # wall time of the passes, all parts
    sequence_length: int  # S: tokens of a window that are measured
    micro_batch: int  # B: windows of one domain that make a micro-batch
    equal_windows: int  # windows of every domain that enter what compares domains
    tracked_ids: int  # most frequent token ids that were counted per expert
    tracked_share: float  # of all tokens, that these ids are
    seed: int
    versions: dict[str, str] = field(default_factory=dict)
    biases: str | None = None  # where expert biases were from that the choices were made with and the weights lack
    step: int | None = None  # of training, that the weights are from; None where nothing said it, and in older records


@dataclass(frozen=True)
class DomainText:
    """One domain's text."""

    name: str
    tokens: int
    windows: int


@dataclass(frozen=True)
class Pair:
    """Two experts that are alike."""

    first: int
    second: int
    similarity: float


@dataclass(frozen=True)
class Layer:
    """The numbers of one layer's router. None: not defined (one domain, no second checkpoint, unknown weights)."""

    name: str  # of the router's module
    router: str  # its class
    num_experts: int
    top_k: int
    gate: str
    maxvio_sequence: float  # mean over windows, domains weighing the same
    maxvio_micro_batch: float
    maxvio_global: float  # of equally many tokens of every domain
    noise_sequence: float  # what uniformly random routing shows, same scopes, same numbers of tokens
    noise_micro_batch: float
    noise_global: float
    dead: list[int]  # experts without a single choice
    idle: list[int]  # experts with less than a tenth of the mean load, the dead among them
    information: float | None  # I(expert; domain) in nats, plug-in estimate at equal token counts
    information_corrected: float | None  # minus its bias, estimated from how windows of one domain differ
    information_shuffled: float | None  # mean with domain labels permuted over the windows: the control
    information_shuffled_high: float | None  # the highest of these
    entropy_token: float  # mean over tokens of the entropy of the gate probabilities, nats
    entropy_mean: float  # entropy of the mean gate probabilities, nats; ln E at most
    topk_score: float  # mean over domains of the gate probability that the chosen experts have together
    id_share: float  # of a token id's choices, those that go to its K usual experts; mean over tokens
    id_share_chance: float  # the same if ids did not matter: the load of the K busiest experts
    alike_weights: list[Pair] = field(default_factory=list)  # cosine of the experts' weights, highest first
    alike_routing: list[Pair] = field(default_factory=list)  # correlation of gate probabilities, highest first
    saturation: float | None = None  # overlap of the chosen experts with those of the other checkpoint
    saturation_chance: float | None = None  # the same if the two chose independently, each with its load


@dataclass(frozen=True)
class Arrays:
    """Everything per expert. D domains, L layers, E experts (the most of any layer; missing ones are 0 or -1), J tokens
    per expert, C tokens of context, N passages, S their tokens, K choices (the most of any layer).
    """

    counts_DLE: np.ndarray  # int64, choices, all tokens
    equal_counts_DLE: np.ndarray  # int64, of `equal_windows` windows of each domain
    topk_score_DL: np.ndarray  # float64
    entropy_DL: np.ndarray  # float64, mean over tokens, nats
    probs_DLE: np.ndarray  # float64, mean gate probability
    maxvio_sequence_DL: np.ndarray  # float64
    maxvio_micro_batch_DL: np.ndarray  # float64
    coactivation_LEE: np.ndarray  # int64, tokens that chose both; on the diagonal, the load
    weight_similarity_LEE: np.ndarray  # float32 cosine, nan where the experts' weights are not known
    routing_similarity_LEE: np.ndarray  # float32 correlation of gate probabilities
    top_ids_LEJ: np.ndarray  # int32 token ids that give an expert most of its load, -1 for none
    top_id_counts_LEJ: np.ndarray  # int64, choices of that expert by that id
    top_id_seen_LEJ: np.ndarray  # int64, tokens of that id
    examples_LEJC: (
        np.ndarray
    )  # int32 token ids around a token that chose the expert, which is in the middle; -1 outside
    example_domain_LEJ: np.ndarray  # int16, -1 for none
    passage_ids_NS: np.ndarray  # int32, token ids of the text sample
    passage_domain_N: np.ndarray  # int16
    passage_experts_NSLK: np.ndarray  # int16, in the order of weight, -1 for none
    saturation_DL: np.ndarray  # float64, nan without a second checkpoint


@dataclass(frozen=True)
class Inspection:
    """Everything that an inspection found."""

    facts: InspectionFacts
    domains: list[DomainText]
    layers: list[Layer]
    strings: dict[int, str]  # of every token id in the arrays
    arrays: Arrays
    problems: list[str] = field(default_factory=list)  # what was left out, and why

    def frequency_DLE(self) -> np.ndarray:
        """Share of a domain's tokens that chose an expert; uniform: K / E (arXiv 2501.11873, figure 1b)."""
        top_k_L = np.array([layer.top_k for layer in self.layers], float)
        total_DL1 = self.arrays.counts_DLE.sum(-1, keepdims=True)
        return self.arrays.counts_DLE * top_k_L[:, None] / np.maximum(total_DL1, 1)

    def high_DLE(self, times: float = HIGH) -> np.ndarray:
        """bool: experts that a domain chooses at least ``times`` as often as uniform routing would."""
        uniform_L1 = np.array([[layer.top_k / layer.num_experts] for layer in self.layers])
        return self.frequency_DLE() >= times * uniform_L1

    def shared_LDD(self, times: float = HIGH) -> np.ndarray:
        """int64: frequent experts that two domains share; on the diagonal, how many one has (figure 4b)."""
        high_LDE = self.high_DLE(times).transpose(1, 0, 2).astype(np.int64)
        return high_LDE @ high_LDE.transpose(0, 2, 1)

    def exclusive_DLE(self, times: float = HIGH) -> np.ndarray:
        """bool: frequent experts of this domain and of no other."""
        high_DLE = self.high_DLE(times)
        return high_DLE & (high_DLE.sum(0, keepdims=True) == 1)

    def lift_LEE(self) -> np.ndarray:
        """Co-activation over its expectation: 1 where two experts meet as their loads predict; nan for itself.

        Expected is proportional to the product of the loads, with the same sum over all pairs as observed.
        """
        pairs_LEE = self.arrays.coactivation_LEE.astype(float)
        load_LE = np.diagonal(pairs_LEE, axis1=1, axis2=2)
        product_LEE = load_LE[:, :, None] * load_LE[:, None, :]
        off_EE = ~np.eye(pairs_LEE.shape[-1], dtype=bool)
        seen_L = (pairs_LEE * off_EE).sum((1, 2))
        scale_L = seen_L / np.maximum((product_LEE * off_EE).sum((1, 2)), 1)
        expected_LEE = product_LEE * scale_L[:, None, None]
        return np.where(off_EE & (expected_LEE > 0), pairs_LEE / np.maximum(expected_LEE, 1e-30), np.nan)


def is_inspection(folder: str | Path) -> bool:
    """Whether a folder holds a finished inspection."""
    return (Path(folder) / INSPECTION_NAME).is_file()


def write_inspection(folder: str | Path, inspection: Inspection) -> Path:
    """Writes both files, the one with the checksum last; returns its path. Raises OutputError for a full disk."""
    folder = Path(folder)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{f.name: getattr(inspection.arrays, f.name) for f in fields(Arrays)})  # type: ignore
    head = {
        "kind": KIND,
        "schema": SCHEMA,
        "arrays_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "facts": asdict(inspection.facts),
        "domains": [asdict(domain) for domain in inspection.domains],
        "layers": [asdict(layer) for layer in inspection.layers],
        "problems": inspection.problems,
        "strings": {str(key): value for key, value in inspection.strings.items()},
    }
    with output_errors(f"the inspection into {folder}", "free disk space, or choose another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ARRAYS_NAME, buffer.getvalue())
        text = json.dumps(head, ensure_ascii=False, allow_nan=False, indent=1)
        write_whole(folder / INSPECTION_NAME, text.encode("utf-8", "surrogatepass"))
    return folder / INSPECTION_NAME


def read_inspection(folder: str | Path) -> Inspection:
    """The inspection in a folder. Raises DataError for one that is missing, damaged, unfinished, or of a newer version.

    >>> read_inspection("no/such/folder")
    Traceback (most recent call last):
    equipoise.errors.DataError: expected an inspection in no/such/folder
      got: no inspection.json
      do:  make one with `equipoise inspect MODEL --out no/such/folder`
    """
    path = Path(folder) / INSPECTION_NAME
    if not path.is_file():
        stopped = (Path(folder) / "state").is_dir()
        raise DataError(
            expected=f"an inspection in {folder}",
            got="one that is not finished" if stopped else f"no {INSPECTION_NAME}",
            do="the same `equipoise inspect` again goes on with it"
            if stopped
            else f"make one with `equipoise inspect MODEL --out {folder}`",
        )
    try:
        head = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
        if head["kind"] != KIND:
            raise _damaged(path, f"a file of another kind ({str(head['kind'])[:40]!r})")
        if head["schema"] > SCHEMA:
            raise _damaged(path, f"schema {head['schema']}, newer than this version reads ({SCHEMA})")
        content = (path.parent / ARRAYS_NAME).read_bytes()
        if hashlib.sha256(content).hexdigest() != head["arrays_sha256"]:
            raise _damaged(path, f"{ARRAYS_NAME} does not have the checksum stated here")
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = Arrays(**{f.name: stored[f.name] for f in fields(Arrays)})
        return Inspection(
            facts=decode(InspectionFacts, head["facts"], RULES, "facts"),
            domains=[decode(DomainText, one, RULES, f"domains[{i}]") for i, one in enumerate(head["domains"])],
            layers=[decode(Layer, one, RULES, f"layers[{i}]") for i, one in enumerate(head["layers"])],
            strings={int(key): str(value) for key, value in head["strings"].items()},
            arrays=arrays,
            problems=[str(problem) for problem in head["problems"]],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise _damaged(path, f"{type(error).__name__}: {str(error)[:100]}") from None


def _damaged(path: Path, got: str) -> DataError:
    return DataError(expected=f"an inspection at {path}", got=got, do="inspect the model again, with --overwrite")
