"""The shared models: what is shipped is what was trained, and the parts do what their names say."""

import json
import math
import shutil

import pytest
import torch

from lib import datasets, models

MEASURED = json.loads((models.FOLDER / "measured.json").read_text())
DIGITS = ("digits_mlp", "digits_cnn", "digits_vit")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- what is shipped

@pytest.mark.parametrize("name", DIGITS)
def test_accuracy_is_the_one_stated(name):
    """Weights are fixed, so only the order of float32 sums differs between machines: it can move an image whose two best logits are
    within 1e-4. Count those images; each may change sides."""
    model = models.load(name)
    x, y = models.digits_tensors("test")
    with torch.no_grad():
        top = model(x).topk(2).values
    close = int((top[:, 0] - top[:, 1] < 1e-4).sum())
    assert abs(models.digits_accuracy(model) - MEASURED[name]["test_accuracy"]) <= close / len(y) + 1e-12
    assert close <= 1                                              # else the tolerance would be no test


def test_perplexity_is_the_one_stated():
    """Logits agree between machines to about 1e-5 (float32 sums over 384 products in four layers), and the mean loss moves no more
    than the worst logit does: 1e-4 nats of loss is ten times that."""
    score, stated = models.lm_score(models.load("shakespeare_lm")), MEASURED["shakespeare_lm"]
    assert abs(math.log(score["perplexity"] / stated["perplexity"])) < 1e-4
    assert abs(score["bits_per_char"] / stated["bits_per_char"] - 1) < 1e-4


def test_score_is_the_cross_entropy_written_out():
    model, tokens = models.load("shakespeare_lm"), models.lm_tokens("valid")
    windows = [tokens[s:s + models.CONTEXT] for s in (0, len(tokens) - models.CONTEXT)]
    nats, chars = 0.0, 0
    with torch.no_grad():
        for w in windows:
            logp = model(w[None])[0].log_softmax(-1)
            nats -= sum(logp[i, w[i + 1]].item() for i in range(len(w) - 1))
            chars += len(models.tokenizer().decode(w[1:]))
    score = models.lm_score(model, windows=2)
    assert score["bits_per_char"] == pytest.approx(nats / math.log(2) / chars, rel=1e-5)      # float32 sums of 127 terms
    assert score["perplexity"] == pytest.approx(math.exp(nats / (2 * 127)), rel=1e-5)


@pytest.mark.parametrize("name", models.CLASSES)
def test_parameters_are_counted_and_stored_as_halves(name):
    model = models.load(name)
    n = sum(p.numel() for p in model.parameters())
    assert n == MEASURED[name]["parameters"]
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(p, p.half().float()) for p in model.parameters())
    assert 2 * n < (models.FOLDER / f"{name}.safetensors").stat().st_size < 2 * n + 8000       # fp16 and a header


def test_parameter_counts_by_hand():
    mlp = 64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10
    cnn = 9 * 32 + 32 + 9 * 32 * 64 + 64 + 9 * 64 * 64 + 64 + 64 * 10 + 10
    lm = 512 * 128 + 4 * (4 * 128 * 128 + 3 * 128 * 384 + 2 * 128) + 128
    assert [MEASURED[n]["parameters"] for n in ("digits_mlp", "digits_cnn", "shakespeare_lm")] == [mlp, cnn, lm]


def test_data_folder_is_small():
    assert sum(p.stat().st_size for p in datasets.DATA.rglob("*") if p.is_file()) <= 8 * 2**20


# ---------------------------------------------------------------- a file that was touched is refused

@pytest.fixture
def copy(tmp_path):
    for file in ("digits_mlp.safetensors", "bpe512.json", "checksums.txt"):
        shutil.copy(models.FOLDER / file, tmp_path)
    return tmp_path


def test_untouched_copy_loads(copy):
    ours, theirs = models.load("digits_mlp", copy).state_dict(), models.load("digits_mlp").state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("where", [0, 100, -1])
def test_one_flipped_bit_is_refused_and_never_parsed(copy, where, monkeypatch):
    import safetensors.torch

    def never(*_):
        raise AssertionError("the file was parsed before its checksum was known to be right")

    monkeypatch.setattr(safetensors.torch, "load", never)
    file = copy / "digits_mlp.safetensors"
    blob = bytearray(file.read_bytes())
    blob[where] ^= 1
    file.write_bytes(blob)
    with pytest.raises(ValueError, match="corrupted and was not loaded: its SHA-256 is [0-9a-f]{64}"):
        models.load("digits_mlp", copy)


def test_truncated_file_is_refused(copy):
    file = copy / "digits_mlp.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match="corrupted"):
        models.load("digits_mlp", copy)


def test_a_file_without_a_checksum_is_refused(copy):
    (copy / "checksums.txt").write_text("")
    with pytest.raises(ValueError, match="has no line in"):
        models.load("digits_mlp", copy)


def test_corrupted_tokenizer_is_refused(copy):
    (copy / "bpe512.json").write_text("[]")
    with pytest.raises(ValueError, match="bpe512.json is corrupted"):
        models.verified("bpe512.json", copy)


@pytest.mark.parametrize("call", [models.load, lambda name: models.build(name, seeded())])
def test_unknown_model_lists_the_known_ones(call):
    with pytest.raises(ValueError, match="no model called 'resnet'; there are digits_mlp, digits_cnn, digits_vit, shakespeare_lm"):
        call("resnet")


def test_build_wants_a_generator():
    with pytest.raises(TypeError, match="generator must be a torch.Generator, was int"):
        models.build("digits_mlp", 0)


# ---------------------------------------------------------------- fresh weights come from the generator alone

@pytest.mark.parametrize("name", models.CLASSES)
def test_build_is_repeatable_and_leaves_the_global_state_alone(name):
    before = torch.random.get_rng_state()
    a, b, c = (models.build(name, seeded(s)).state_dict() for s in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a[k], b[k]) and torch.isfinite(a[k]).all() for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_named_builders_are_build():
    for name in models.CLASSES:
        one, two = getattr(models, name)(seeded(1)), models.build(name, seeded(1))
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


@pytest.mark.parametrize("name", models.CLASSES)
def test_an_untrained_network_is_near_chance(name):
    """Logits of order one: the loss lies within a nat of log(classes)."""
    model = models.build(name, seeded())
    x, y = models.lm_batch("valid", 4, seeded()) if name == "shakespeare_lm" else models.digits_tensors("valid")
    with torch.no_grad():
        logits = model(x)
    assert logits.shape == (*y.shape, 512 if name == "shakespeare_lm" else 10)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten()).item()
    assert abs(loss - math.log(logits.shape[-1])) < 1.5


# ---------------------------------------------------------------- the language model's parts

def test_rope_depends_on_the_distance_alone():
    q, k = torch.randn(2, 32, dtype=torch.float64, generator=seeded())
    cos, sin = (t.double() for t in models.rope_table(60, 32))
    q, k = models.rotate(q.expand(60, 32), cos, sin), models.rotate(k.expand(60, 32), cos, sin)
    scores = q @ k.T                                               # [60, 60]: one vector at every position
    for distance in (-40, -7, 0, 1, 30):
        diagonal = scores.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-4         # angles are float32: error 60 * 6e-8 times norms of about 32
    assert (scores.diagonal(7)[0] - scores.diagonal(1)[0]).abs() > 1e-2


def test_rope_keeps_lengths():
    x = torch.randn(2, 3, 50, 16, dtype=torch.float64, generator=seeded())
    y = models.rotate(x, *(t.double() for t in models.rope_table(50, 16)))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)     # cos^2 + sin^2 = 1 to float32
    torch.testing.assert_close(y[:, :, 0], x[:, :, 0])             # position 0 is not turned


def test_the_future_does_not_reach_the_past():
    model = models.load("shakespeare_lm")
    x, _ = models.lm_batch("valid", 2, seeded(), t=40)
    changed = x.clone()
    changed[:, 25:] = (changed[:, 25:] + 17) % 512
    with torch.no_grad():
        a, b = model(x), model(changed)
    torch.testing.assert_close(a[:, :25], b[:, :25], rtol=0, atol=1e-5)
    assert (a[:, 25:] - b[:, 25:]).abs().max() > 1


def test_the_past_does_reach_the_present():
    model = models.load("shakespeare_lm")
    x, _ = models.lm_batch("valid", 2, seeded(), t=40)
    changed = x.clone()
    changed[:, 0] = (changed[:, 0] + 17) % 512
    with torch.no_grad():
        assert (model(x)[:, -1] - model(changed)[:, -1]).abs().max() > 1e-4


def test_attention_against_the_formula():
    d, heads, t = 16, 2, 6
    layer = models.Attention(d, heads, causal=True)
    for i, p in enumerate(layer.parameters()):
        torch.nn.init.normal_(p, generator=seeded(i))
    x = torch.randn(1, t, d, generator=seeded(9))
    rope = models.rope_table(t, d // heads)
    out = []
    with torch.no_grad():
        for h in range(heads):
            q, k, v = ((x[0] @ w.weight.T)[:, h * 8:h * 8 + 8] for w in (layer.wq, layer.wk, layer.wv))
            q, k = models.rotate(q, *rope), models.rotate(k, *rope)
            s = (q @ k.T / math.sqrt(8)).masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
            out.append(s.softmax(-1) @ v)
        torch.testing.assert_close(layer(x, rope)[0], torch.cat(out, 1) @ layer.wo.weight.T, rtol=1e-4, atol=1e-4)   # float32 sums of 16


def test_vit_patches_are_two_by_two():
    seen = models.layer_inputs(models.load("digits_vit"), torch.arange(64.0).view(1, 1, 8, 8))
    assert seen["patch"].shape == (1, 16, 4) and seen["patch"][0, 5].tolist() == [18, 19, 26, 27]


# ---------------------------------------------------------------- the tokenizer

def test_bpe_gives_back_the_text():
    bpe = models.tokenizer()
    assert len(bpe.symbols) == len(set(bpe.symbols)) == 512
    text = datasets.shakespeare("valid")
    assert bpe.decode(bpe.encode(text)) == text
    for odd in ("", " ", "\n\n\n  x ", "''--'", "".join(bpe.ALPHABET), "a  b   c\n d"):
        assert bpe.decode(bpe.encode(odd)) == odd


def test_bpe_training_against_a_count_by_hand():
    """'aaab ab' has the pieces 'aaab' and ' ab': the pair (a, a) and the pair (a, b) both occur twice, and (a, a) is alphabetically first."""
    bpe = models.BPE.train("aaab ab", vocab=98)
    assert bpe.merges == [("a", "a"), ("a", "b")]
    assert [bpe.symbols[i] for i in bpe.encode("aaab ab")] == ["aa", "ab", " ", "ab"]


def test_bpe_compresses_and_ids_fit():
    tokens = models.lm_tokens("valid")
    assert tokens.min() >= 0 and tokens.max() < 512
    assert len(datasets.shakespeare("valid")) / len(tokens) > 2


@pytest.mark.parametrize("text", ["caf\u00e9", "tab\there"])
def test_bpe_names_the_character_it_does_not_know(text):
    with pytest.raises(ValueError, match="is not in the tokenizer's alphabet"):
        models.tokenizer().encode(text)


# ---------------------------------------------------------------- helpers

def test_batches_are_windows_and_their_next_tokens():
    x, y = models.lm_batch("train", 3, seeded(), t=20)
    again, _ = models.lm_batch("train", 3, seeded(), t=20)
    assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(x, again) and x.shape == (3, 20)
    text = models.tokenizer().decode(x[0])
    assert text in datasets.shakespeare("train")


def test_layer_inputs_are_what_the_layers_see():
    model = models.load("digits_mlp")
    x, _ = models.digits_tensors("valid")
    seen = models.layer_inputs(model, x[:5])
    assert list(seen) == ["fc1", "fc2", "fc3"]
    assert torch.equal(seen["fc1"], x[:5].flatten(1))
    assert torch.equal(seen["fc2"], torch.relu(model.fc1(seen["fc1"])).detach())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["shakespeare_lm", "digits_vit"])
def test_with_attention_is_the_model_when_the_attention_is_its_own(name):
    model, seen = models.load(name), []
    x = models.lm_batch("valid", 2, torch.Generator().manual_seed(0), 20)[0] if name == "shakespeare_lm" else models.digits_tensors("test")[0][:3]

    def attend(layer, q, k, v):
        seen.append((layer, tuple(q.shape)))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=name == "shakespeare_lm")

    with torch.no_grad():
        assert torch.equal(models.with_attention(model, attend)(x), model(x))
        assert [layer for layer, _ in seen] == [0, 1, 2, 3] and len({shape for _, shape in seen}) == 1 and seen[0][1][:2] == (len(x), 4)
        zero = models.with_attention(model, lambda layer, q, k, v: torch.zeros_like(v))
        assert not torch.allclose(zero(x), model(x)) and torch.equal(model(x), models.load(name)(x)), "the model itself is left alone"
