"""Train the shipped models again from the data: `python data/train_models.py [name ...]`, all of them by default.

One thread, one seed (0), no network; the last weights are kept, so that nothing is chosen by looking at held-out data. They are
rounded to fp16, measured *after* that rounding, and written to `data/models` with their checksum; `measured.json` takes the
numbers and the CPU seconds.
The digits models see images moved by at most one pixel, so that a thousand examples are enough.
"""

import hashlib
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lib import datasets, models

SEED = 0
STEPS = {"digits_mlp": 1500, "digits_cnn": 600, "digits_vit": 1500, "shakespeare_lm": 2800}
BATCH = {"digits_mlp": 128, "digits_cnn": 128, "digits_vit": 64, "shakespeare_lm": 16}
LR = {"digits_mlp": 3e-3, "digits_cnn": 3e-3, "digits_vit": 2e-3, "shakespeare_lm": 4e-3}
DECAY = {"digits_mlp": 0.05, "digits_cnn": 0.05, "digits_vit": 0.05, "shakespeare_lm": 0.1}


def schedule(step, steps):
    """Linear warm-up over the first 5 % of the steps, then half a cosine down to 2 % of the peak."""
    warm = steps // 20
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def moved(x, generator):
    """Each image of [n, 1, 8, 8] shifted by -1, 0 or 1 pixels in both directions, zeros coming in."""
    n = len(x)
    dy, dx = torch.randint(0, 3, (2, n, 1, 1), generator=generator)
    at = torch.arange(8)
    padded = F.pad(x, (1, 1, 1, 1))[:, 0]                          # [n, 10, 10]
    return padded[torch.arange(n)[:, None, None], at[:, None] + dy, at + dx][:, None]


def batches(name, generator):
    """An endless stream of (input, target) for `name`."""
    if name == "shakespeare_lm":
        while True:
            yield models.lm_batch("train", BATCH[name], generator)
    x, y = models.digits_tensors("train")
    while True:
        pick = torch.randint(len(x), (BATCH[name],), generator=generator)
        yield moved(x[pick], generator), y[pick]


@torch.no_grad()
def validation_loss(name, model):
    if name == "shakespeare_lm":
        return models.lm_score(model)["bits_per_char"]
    x, y = models.digits_tensors("valid")
    return F.cross_entropy(model(x), y).item()


def train(name):
    generator = torch.Generator().manual_seed(SEED)
    model = models.build(name, generator)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    opt = torch.optim.AdamW([{"params": decayed, "weight_decay": DECAY[name]}, {"params": plain, "weight_decay": 0.0}], lr=LR[name], betas=(0.9, 0.98))
    stream, steps = batches(name, generator), STEPS[name]
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = LR[name] * schedule(step, steps)
        x, y = next(stream)
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if (step + 1) % (steps // 10) == 0:
            print(f"{name}: step {step + 1}, training loss {loss.item():.3f}, validation {validation_loss(name, model):.4f}", flush=True)
    state = {k: v.half() for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.float() for k, v in state.items()})
    return model.eval(), state


def write_checksums():
    files = sorted(p for p in models.FOLDER.iterdir() if p.suffix == ".safetensors" or p.name == "bpe512.json")
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in files]
    (models.FOLDER / "checksums.txt").write_text("".join(lines))


def main(names):
    unknown = set(names) - set(models.CLASSES)
    if unknown:
        sys.exit(f"no model called {', '.join(sorted(unknown))}; there are {', '.join(models.CLASSES)}")
    torch.set_num_threads(1)
    models.FOLDER.mkdir(exist_ok=True)
    record = models.FOLDER / "measured.json"
    for name in names or models.CLASSES:
        start = time.process_time()
        if name == "shakespeare_lm":
            merges = models.BPE.train(datasets.shakespeare("train")).merges
            (models.FOLDER / "bpe512.json").write_text(json.dumps(merges, separators=(",", ":")))
            write_checksums()
        model, state = train(name)
        file = models.FOLDER / f"{name}.safetensors"
        save_file(state, file, metadata={"made by": "data/train_models.py", "seed": str(SEED)})
        file.chmod(0o644)                                          # safetensors makes it private
        write_checksums()
        measured = models.lm_score(model) if name == "shakespeare_lm" else {"test_accuracy": models.digits_accuracy(model)}
        measured["parameters"] = sum(p.numel() for p in model.parameters())
        measured["cpu_seconds"] = round(time.process_time() - start)
        rows = json.loads(record.read_text()) if record.exists() else {}
        rows[name] = measured
        record.write_text(json.dumps({k: rows[k] for k in models.CLASSES if k in rows}, indent=2) + "\n")
        print(name, measured, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
