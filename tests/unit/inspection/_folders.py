"""Text of three domains, a tokenizer for it, and what real models choose for it, read without equipoise."""

from __future__ import annotations

import json
import random

import torch

from integrations.hf._cases import quiet

__all__ = ["WORDS", "hooked", "windows_of", "write_text", "write_tokenizer"]

WORDS = {
    "letters": "a b c d e f g h i j k l m n",
    "digits": "0 1 2 3 4 5 6 7 8 9",
    "signs": "+ - * / = ( ) [ ] ; : < > &",
}
RARE = "x y"  # three times in all
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", *" ".join([*WORDS.values(), RARE]).split()]


def write_text(path, *, documents: int = 40, words: int = 60, uneven: bool = True) -> None:
    """JSON lines; the second domain has a sixth of the documents."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(documents):
            for place, (domain, known) in enumerate(WORDS.items()):
                if not (uneven and place == 1 and number % 6):
                    text = " ".join(rng.choices(known.split(), k=words)) + f" {RARE}" * (number == 0)
                    file.write(json.dumps({"text": text, "domain": domain}) + "\n")


def write_tokenizer(folder) -> None:
    """A word for every id of the tiny models: 0 pad, 1 begin, 2 end, 3 unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def hooked(folder, windows):
    """Logits and choices of all tokens, read from the model by means of its own: what each family's code chooses."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    with quiet():
        config = AutoConfig.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder).eval()
        AutoTokenizer.from_pretrained(folder)
    kind = config.model_type
    names = {"qwen3_moe": "Qwen3MoeTopKRouter", "deepseek_v3": "DeepseekV3TopkRouter", "dbrx": "DbrxRouter",
             "switch_transformers": "SwitchTransformersTop1Router"}  # fmt: skip
    routers = [m for m in model.modules() if type(m).__name__ == names[kind]]
    got: dict[int, object] = {}
    hooks = [m.register_forward_hook(lambda _m, _a, out, i=i: got.update({i: out})) for i, m in enumerate(routers)]
    tokens = []
    for domain, rows in enumerate(windows):
        for window, ids in enumerate(rows):
            given = torch.tensor(ids).unsqueeze(0)
            with torch.no_grad():
                model(input_ids=given, **({"decoder_input_ids": given} if kind == "switch_transformers" else {}))
            parts = [take(kind, model, got[i]) for i in range(len(routers))]
            tokens += [
                {
                    "domain": domain, "window": window, "position": t, "id": ids[t],
                    "logits": [logits[t] for logits, _, _ in parts], "choices": [ids[t] for _, ids, _ in parts],
                    "gate": [gate for _, _, gate in parts],
                }
                for t in range(len(ids))
            ]  # fmt: skip
    for hook in hooks:
        hook.remove()
    return tokens


def take(kind, model, output):
    """(logits by token, choices by token, gate)"""
    if kind == "dbrx":
        block = model.blocks[0].ffn
        return output.tolist(), block.route_tokens_to_experts(output)[1].tolist(), "softmax"
    if kind == "switch_transformers":  # the most probable expert, before capacity
        logits = output[2].reshape(-1, output[2].shape[-1])
        return logits.tolist(), [[row.index(max(row))] for row in logits.tolist()], "softmax"
    logits, _, ids = output
    return logits.tolist(), ids.tolist(), "softmax" if kind == "qwen3_moe" else "sigmoid"


def windows_of(text, length):
    """Ids by domain, from the tokenizer's words: the file's documents one after the other, each with its end."""
    stream: dict[str, list[int]] = {}
    for line in text.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        stream.setdefault(row["domain"], []).extend([VOCABULARY.index(w) for w in row["text"].split()] + [2])
    return [[ids[i : i + length] for i in range(0, len(ids) - length + 1, length)] for _, ids in sorted(stream.items())]
