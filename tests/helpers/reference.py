"""Stage-wise training written as the paper's equations, layer by layer: what the engine must equal."""

import functools

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map


def plain_transport(x, y, mask=None, norm="relative"):
    """1/B sum_b c_b ||y_b - x_b||^2 over the tokens that count."""
    kept = torch.ones(x.shape[0], *[1] * (x.dim() - 1)) if mask is None else mask.unsqueeze(-1).float()
    r, x = (y.float() - x.float()) * kept, x.float().detach() * kept
    count = kept.expand_as(x).flatten(1).sum(1)
    c = {"sum": torch.ones_like(count), "mean": 1 / count, "relative": 1 / x.square().flatten(1).sum(1)}[norm]
    return (r.square().flatten(1).sum(1) * c).mean()


def next_token_loss(logits, labels):
    """Mean of -log p(label of token n + 1 | tokens up to n); -100 is no label."""
    return token_loss(logits[:, :-1], labels[:, 1:])


def token_loss(logits, labels):
    return cross_entropy(logits[labels != -100], labels[labels != -100])


def train_step(model, name, partition, heads, batch, weights, norm="relative", criterion=cross_entropy):
    """For k = 1 .. K: min over (T_k, F_k) of L(F_k(z_k)) + w_k sum_m ||r_m||^2, z_k = T_k(z_{k-1}); fills .grad."""
    z, layer, tail = PARTS[name](model, batch)
    mask, losses = batch.get("attention_mask"), []
    for k, stage in enumerate(partition.stages):
        z = z.detach() if k > 0 else z
        term = 0.0
        for m in stage:
            x, z = layer(m, z)
            term = term + plain_transport(x, z, mask, norm)
        read = z
        for m in heads.layers:
            _, read = layer(m, read)
        if k == partition.num_stages - 1:
            logits = tail(z)
        else:  # the model's own head is one for all
            logits = tail(read) if heads.kind == "own" else heads.heads[k](read, mask)
        loss = criterion(logits, batch["labels"]) + weights[k] * term
        loss.backward()
        losses.append(loss.item())
    return losses


def block_step(model, name, partition, stage, batch, weight, criterion=cross_entropy):
    """min over T_k of L(F(T_K(.. T_k(z_{k-1})))) + w sum_m ||r_m||^2 with all else fixed; fills all of .grad."""
    z, layer, tail = PARTS[name](model, batch)
    term = 0.0
    for k, names in enumerate(partition.stages):
        z = z.detach() if k == stage and k > 0 else z
        for m in names:
            x, z = layer(m, z)
            term = term + (plain_transport(x, z, batch.get("attention_mask")) if k == stage else 0.0)
    loss = criterion(tail(z), batch["labels"]) + weight * term
    loss.backward()
    return loss.item()


def named(model, layer):
    return model.get_submodule(layer) if isinstance(layer, str) else layer


def vit(model, batch):
    def layer(name, z):
        return z, named(model, name)(z)

    return model.vit.embeddings(batch["pixel_values"]), layer, lambda z: model.classifier(model.vit.layernorm(z)[:, 0])


def bert(model, batch):
    blocked = (1.0 - batch["attention_mask"][:, None, None, :].float()) * torch.finfo(torch.float32).min

    def layer(name, z):
        return z, named(model, name)(z, blocked)

    tail = model.cls if hasattr(model, "cls") else model.classifier
    pooler = model.bert.pooler or (lambda z: z)
    return model.bert.embeddings(batch["input_ids"]), layer, lambda z: tail(pooler(z))


def swin(model, batch):
    z, size = model.swin.embeddings(batch["pixel_values"])
    sizes = [tuple(side >> i for side in size) for i in range(3)]

    def layer(name, z):
        i, block = int(name.split(".")[3]), name.split(".")[5]
        if i > 0 and block == "0":  # the change of resolution before it
            z = model.swin.encoder.layers[i - 1].downsample(z, sizes[i - 1])
        return z, model.get_submodule(name)(z, sizes[i])[0]

    return z, layer, lambda z: model.classifier(model.swin.layernorm(z).mean(1))


def causal_mask(batch):
    """0 where a token sees another, else the least number, `[B, 1, N, N]`."""
    tokens = batch["input_ids"].shape[1]
    seen = torch.tril(torch.ones(tokens, tokens))[None] * batch["attention_mask"][:, None, :]
    return (1.0 - seen[:, None]) * torch.finfo(torch.float32).min


def llama(model, batch):
    z = model.model.embed_tokens(batch["input_ids"])
    rotary = model.model.rotary_emb(z, torch.arange(z.shape[1])[None])

    def layer(name, z):
        return z, named(model, name)(z, attention_mask=causal_mask(batch), position_embeddings=rotary)

    return z, layer, lambda z: model.lm_head(model.model.norm(z))


def gpt2(model, batch):
    trunk, ids = model.transformer, batch["input_ids"]

    def layer(name, z):
        return z, first(named(model, name)(z, attention_mask=causal_mask(batch)))

    return trunk.wte(ids) + trunk.wpe.weight[: ids.shape[1]], layer, lambda z: trunk.ln_f(z) @ trunk.wte.weight.T


PARTS = {"vit": vit, "bert": bert, "bert-tokens": bert, "bert-mlm": bert, "swin": swin}
PARTS |= {"llama": llama, "qwen2": llama, "gpt2": gpt2}


def gradients(*modules: nn.Module) -> dict[str, torch.Tensor | None]:
    """All gradients by name, which are then cleared."""
    found = {f"{i}.{n}": p.grad for i, module in enumerate(modules) for n, p in module.named_parameters()}
    for module in modules:
        module.zero_grad(set_to_none=True)
    return found


def detached_step(model, partition, heads, batch, weights):
    """
    The same for any model, in one backward pass: each stage's end hands on a copy without graph, and all losses add up.

    Returns the K losses and the names of parameters of earlier layers that the last loss still reaches: none, if cuts
    cut all there is.
    """
    ends, losses, terms, hooks = dict(zip(partition.boundaries, range(partition.num_stages), strict=True)), [], [], []
    into = {}  # of a convolution of a sequence of single modules: what it gets

    def after(name, module, args, kwargs, output):
        x, y = first(args or tuple(kwargs.values())), first(output)
        mask = batch.get("attention_mask")
        mask = mask if mask is not None and y.dim() == 3 and mask.shape == y.shape[:2] else None
        if isinstance(module, nn.Conv2d):
            into["x"] = x
        elif isinstance(module, nn.ReLU):  # ends what the convolution, its norm and itself make of that
            x, module = into.pop("x"), None
        if x.shape == y.shape and not isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            terms.append(plain_transport(x, y, mask))
        stage = ends.get(name)
        if stage is None:
            return None
        losses.append(weights[stage] * sum(terms))
        terms.clear()
        if stage == partition.num_stages - 1:
            return None
        losses[-1] = losses[-1] + cross_entropy(heads(stage, y, mask).float(), batch["labels"])
        return tree_map(lambda value: value.detach() if torch.is_tensor(value) else value, output)

    for name in partition.layers:
        hook = functools.partial(after, name)
        hooks.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True, prepend=True))
    last = model(**batch).loss
    for hook in hooks:
        hook.remove()
    losses[-1] = losses[-1] + last
    before = {f"{n}.{p}": q for n in partition.stages[0] for p, q in model.get_submodule(n).named_parameters()}
    before = {name: parameter for name, parameter in before.items() if parameter.requires_grad}
    reached = torch.autograd.grad(losses[-1], before.values(), allow_unused=True, retain_graph=True)
    torch.stack(losses).sum().backward()
    return [loss.item() for loss in losses], [n for n, g in zip(before, reached, strict=True) if g is not None]


def first(value):
    while isinstance(value, tuple | list):
        value = value[0]
    return value
