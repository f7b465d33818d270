"""Four small networks that every page can load, take apart, squeeze, or train again from nothing.

    digits_mlp       64-128-64-10, ReLU                                 x [n, 1, 8, 8] -> logits [n, 10]
    digits_cnn       three 3x3 convolutions, mean over the image        x [n, 1, 8, 8] -> logits [n, 10]
    digits_vit       patches of 2x2 pixels, d = 64, 4 layers            x [n, 1, 8, 8] -> logits [n, 10]
    shakespeare_lm   decoder, d = 128, 4 layers, RMSNorm, SwiGLU, RoPE, tied embedding
                                                                        tokens [n, t]  -> logits [n, t, 512]

`load(name)` gives the trained network (fp32, eval mode) from `data/models`, after its SHA-256 has been checked: the file is
safetensors in fp16, and no pickle is ever read. `build(name, generator)`, or the function of that name, gives the same architecture
with fresh weights drawn from `generator` alone; the global random state is neither read nor moved.

In shape comments: n images or sequences, t tokens, d width, h heads, e = d / h, v the vocabulary.
"""

import copy
import hashlib
import json
import math
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lib import datasets

FOLDER = Path(__file__).resolve().parent.parent / "data" / "models"
CONTEXT = 128                                                      # tokens in a training or test window of the language model


# ------------------------------------------------------------------------------------------------ the networks

class DigitsMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 10)

    def forward(self, x):                                          # [n, 1, 8, 8]
        x = F.relu(self.fc1(x.flatten(1)))                         # [n, 128]
        x = F.relu(self.fc2(x))                                    # [n, 64]
        return self.fc3(x)                                         # [n, 10]


class DigitsCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):                                          # [n, 1, 8, 8]
        x = F.relu(self.conv1(x))                                  # [n, 32, 8, 8]
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)                 # [n, 64, 4, 4]
        x = F.relu(self.conv3(x)).mean((2, 3))                     # [n, 64]
        return self.fc(x)                                          # [n, 10]


def rope_table(t, e):
    """Cosines and sines of the angles m * 10000^(-2i/e), for positions m < t and pairs i < e/2: two tensors [t, e/2]."""
    angle = torch.arange(t)[:, None] * 10000.0 ** (-torch.arange(0, e, 2) / e)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i+e/2}) by its position's angle, so that <rotate(q)_m, rotate(k)_n> depends on m - n alone."""
    a, b = x.chunk(2, dim=-1)                                      # [n, h, t, e/2] each
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    def __init__(self, d, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, x, rope=None):                               # [n, t, d]
        n, t, d = x.shape
        q, k, v = (w(x).view(n, t, self.heads, -1).transpose(1, 2) for w in (self.wq, self.wk, self.wv))    # [n, h, t, e]
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)                                  # [n, h, t, e]
        return self.wo(y.transpose(1, 2).reshape(n, t, d))         # [n, t, d]


class SwiGLU(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.gate, self.up = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False)
        self.down = nn.Linear(hidden, d, bias=False)

    def forward(self, x):                                          # [n, t, d]
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GeluMLP(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x):                                          # [n, t, d]
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm residual block: attention, then the feed-forward net."""

    def __init__(self, norm, d, heads, causal, mlp):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm(d), Attention(d, heads, causal), norm(d), mlp

    def forward(self, x, rope=None):                               # [n, t, d]
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class DigitsViT(nn.Module):
    def __init__(self, d=64, layers=4, heads=4):
        super().__init__()
        self.patch = nn.Linear(4, d)
        self.position = nn.Parameter(torch.empty(16, d))
        self.blocks = nn.ModuleList(Block(nn.LayerNorm, d, heads, False, GeluMLP(d, 4 * d)) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x):                                          # [n, 1, 8, 8]
        x = F.unfold(x, 2, stride=2).transpose(1, 2)               # [n, 16, 4], the 2x2 patches row by row
        x = self.patch(x) + self.position                          # [n, 16, d]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))                     # [n, 10]


class ShakespeareLM(nn.Module):
    def __init__(self, d=128, layers=4, heads=4, hidden=384, vocab=512):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)                        # also the output matrix
        self.blocks = nn.ModuleList(Block(nn.RMSNorm, d, heads, True, SwiGLU(d, hidden)) for _ in range(layers))
        self.norm = nn.RMSNorm(d)

    def forward(self, tokens):                                     # [n, t], int64
        x = self.embed(tokens)                                     # [n, t, d]
        rope = rope_table(tokens.shape[1], x.shape[-1] // self.blocks[0].attn.heads)
        for block in self.blocks:
            x = block(x, rope)
        return F.linear(self.norm(x), self.embed.weight)           # [n, t, v]


# ------------------------------------------------------------------------------------------------ fresh and trained

CLASSES = {"digits_mlp": DigitsMLP, "digits_cnn": DigitsCNN, "digits_vit": DigitsViT, "shakespeare_lm": ShakespeareLM}


def build(name, generator):
    """The architecture `name` with weights drawn from `generator`: matrices N(0, g / fan_in) with g = 2 before a ReLU and 1 in the
    transformers, embeddings N(0, 0.02^2), biases 0, norm gains 1."""
    if name not in CLASSES:
        raise ValueError(f"name: no model called {name!r}; there are {', '.join(CLASSES)}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, was {type(generator).__name__}")
    with torch.device("meta"):                                     # no storage, and so no draw from the global generator
        model = CLASSES[name]()
    model = model.to_empty(device="cpu")
    gain = 2.0 if name in ("digits_mlp", "digits_cnn") else 1.0
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key in ("embed.weight", "position"):
                p.normal_(0.0, 0.02, generator=generator)
            elif p.dim() > 1:
                p.normal_(0.0, math.sqrt(gain / p[0].numel()), generator=generator)
            else:
                p.fill_(0.0 if key.endswith("bias") else 1.0)
    return model


def digits_mlp(generator):
    return build("digits_mlp", generator)


def digits_cnn(generator):
    return build("digits_cnn", generator)


def digits_vit(generator):
    return build("digits_vit", generator)


def shakespeare_lm(generator):
    return build("shakespeare_lm", generator)


def verified(file, folder=FOLDER):
    """The bytes of `folder/file` if their SHA-256 is the one in `folder/checksums.txt`; ValueError otherwise."""
    folder = Path(folder)
    sums = dict(reversed(line.split()) for line in (folder / "checksums.txt").read_text().splitlines())
    if file not in sums:
        raise ValueError(f"{file} has no line in {folder / 'checksums.txt'}: refused")
    blob = (folder / file).read_bytes()
    found = hashlib.sha256(blob).hexdigest()
    if found != sums[file]:
        raise ValueError(f"{folder / file} is corrupted and was not loaded: its SHA-256 is {found}, checksums.txt says {sums[file]}")
    return blob


def load(name, folder=FOLDER):
    """The trained network `name`: fp32, eval mode, a new object at each call. Refuses a file that fails its checksum."""
    from safetensors.torch import load as parse

    model = build(name, torch.Generator().manual_seed(0))          # names checked here; every weight is overwritten below
    state = parse(verified(f"{name}.safetensors", folder))
    model.load_state_dict({k: v.float() for k, v in state.items()}, strict=True)
    return model.eval()


# ------------------------------------------------------------------------------------------------ text to tokens

class BPE:
    """Byte-pair encoding: start from single characters, join the pairs of `merges` in order, never across the pieces of PIECES."""

    PIECES = re.compile(r" ?[A-Za-z']+| ?[^A-Za-z'\s]+|\s+")
    ALPHABET = "\n" + "".join(map(chr, range(32, 127)))            # newline and printable ASCII: 96 symbols

    def __init__(self, merges):
        self.merges = [tuple(m) for m in merges]
        self.rank = {pair: i for i, pair in enumerate(self.merges)}
        self.symbols = list(self.ALPHABET) + [a + b for a, b in self.merges]
        self.ids = {s: i for i, s in enumerate(self.symbols)}
        self.cache = {}

    @classmethod
    def train(cls, text, vocab=512):
        """Learn merges greedily: join the most frequent neighbouring pair (ties: the alphabetically first), until `vocab` symbols."""
        words = {tuple(w): c for w, c in Counter(cls.PIECES.findall(text)).items()}
        merges = []
        while len(cls.ALPHABET) + len(merges) < vocab:
            pairs = Counter()
            for w, c in words.items():
                for pair in zip(w, w[1:]):
                    pairs[pair] += c
            best = min(pairs, key=lambda p: (-pairs[p], p))
            merges.append(best)
            words = {cls._join(w, best): c for w, c in words.items()}
        return cls(merges)

    @staticmethod
    def _join(w, pair):
        out, i = [], 0
        while i < len(w):
            hit = w[i:i + 2] == pair
            out.append(w[i] + w[i + 1] if hit else w[i])
            i += 1 + hit
        return tuple(out)

    def encode(self, text):
        """Text -> list of token ids. A character outside ALPHABET raises ValueError."""
        bad = set(text) - set(self.ALPHABET)
        if bad:
            raise ValueError(f"text: {sorted(bad)[0]!r} is not in the tokenizer's alphabet (printable ASCII and newline)")
        out = []
        for piece in self.PIECES.findall(text):
            if piece not in self.cache:
                w = tuple(piece)
                while pairs := [p for p in zip(w, w[1:]) if p in self.rank]:
                    w = self._join(w, min(pairs, key=self.rank.get))
                self.cache[piece] = [self.ids[s] for s in w]
            out += self.cache[piece]
        return out

    def decode(self, ids):
        return "".join(self.symbols[int(i)] for i in ids)


@lru_cache
def tokenizer():
    """The tokenizer of `shakespeare_lm`: 96 characters and 416 merges."""
    return BPE(json.loads(verified("bpe512.json")))


@lru_cache
def lm_tokens(split):
    """All tokens of the "train" or "valid" plays, int64 [N]; shared, so do not write into it."""
    return torch.tensor(tokenizer().encode(datasets.shakespeare(split)))


def lm_batch(split, n, generator, t=CONTEXT):
    """`n` random windows: inputs and the tokens that follow them, each [n, t]."""
    tokens = lm_tokens(split)
    start = torch.randint(len(tokens) - t, (n, 1), generator=generator)
    at = start + torch.arange(t + 1)
    return tokens[at[:, :-1]], tokens[at[:, 1:]]


# ------------------------------------------------------------------------------------------------ measuring

def digits_tensors(split):
    """Images [n, 1, 8, 8] and labels [n] of a split of the digits, as tensors."""
    x, y = datasets.digits(split)
    return torch.from_numpy(x)[:, None], torch.from_numpy(y)


@torch.no_grad()
def digits_accuracy(model, split="test"):
    """Fraction of a split's digits that `model` names rightly."""
    x, y = digits_tensors(split)
    return (model(x).argmax(1) == y).double().mean().item()


@torch.no_grad()
def lm_score(model, windows=64):
    """Bits per character and perplexity per token on `windows` windows of CONTEXT tokens, evenly spread over The Winter's Tale
    (the first begins at token 0, the last ends with the play). Every token but a window's first is predicted, from that window only."""
    tokens = lm_tokens("valid")
    start = torch.linspace(0, len(tokens) - CONTEXT, windows).long()
    x = tokens[start[:, None] + torch.arange(CONTEXT)]             # [windows, CONTEXT]
    nats = F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="sum").item()
    chars = len(tokenizer().decode(x[:, 1:].flatten()))
    return {"bits_per_char": nats / math.log(2) / chars, "perplexity": math.exp(nats / x[:, 1:].numel())}


@torch.no_grad()
def with_attention(model, attend):
    """A copy of a transformer (the ViT or the language model) whose attention is `attend(layer, q, k, v)` -> [n, heads, t, e].

    q, k, v: [n, heads, t, e]; q and k come rotated by position where the model rotates them. layer: 0, 1, ... from the input on."""
    model = copy.deepcopy(model)
    for layer, block in enumerate(model.blocks):
        def forward(x, rope=None, a=block.attn, layer=layer):
            q, k, v = (w(x).unflatten(-1, (a.heads, -1)).transpose(1, 2) for w in (a.wq, a.wk, a.wv))
            if rope is not None:
                q, k = rotate(q, *rope), rotate(k, *rope)
            return a.wo(attend(layer, q, k, v).transpose(1, 2).flatten(2))
        block.attn.forward = forward
    return model


def layer_inputs(model, x):
    """What enters each linear and convolution layer when `model` sees `x`: {layer name: tensor}."""
    seen, hooks = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            hooks.append(layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach())))
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
