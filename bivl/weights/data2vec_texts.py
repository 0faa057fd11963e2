"""data2vec 1.0 on texts, as fairseq and Hugging Face store it: which of them a file is, and the
config that it becomes."""

import dataclasses
import re

from bivl.core.errors import UserError
from bivl.weights import data2vec_tables as tables
from bivl.weights import plan as plans
from bivl.weights import vocabularies
from bivl.weights.plan import NO_HEAD, Plan
from bivl.weights.rules import Rule, under


def text_plan(weights, folder, names, head: str, table, eps: float, version: str = "1") -> Plan:
    """The plan of a text model of data2vec 1.0 or 2.0.

    names: of the tokens' table, the positions' table and, with `@` for its number, the first map of
    a block's MLP. head: the classifier's last map, or "".
    """
    tokens, positions, fc1 = names
    vocabulary, width = plans.shape(weights, tokens, 2)
    mlp, _ = plans.shape(weights, fc1.replace("@", "0"), 2)
    blocks = re.escape(fc1).replace("@", r"(\d+)") + "$"
    changes, unknown = plans.encoder_sizes(weights, blocks, width, mlp)
    length = plans.shape(weights, positions, 2)[0] - 2
    found, notes = vocabularies.tokens(folder, vocabulary)
    changes |= {"text.length": length, "model.eps": eps} | found
    if head:
        classes = plans.shape(weights, head, 2)[0]
        changes |= {"num_classes": classes, "text.input_length": length, "label_scale": 1.0}
        config = f"finetune/glue.py:version={version}"
        return Plan(config, changes, table, {}, unknown, notes=notes)
    changes |= plans.pretraining(changes["model.depth"], 10 if version == "1" else 24)
    config = f"pretrain/data2vec{version.strip('1')}_text.py"
    return Plan(config, changes, table, {}, unknown, notes=notes)


def classifiers(weights) -> str:
    """What stands before the maps of fairseq's one classifier, "" where there is none."""
    pattern = re.compile(r"((?:model\.)?classification_heads\.[\w-]+\.)out_proj\.weight")
    found = [match[1] for match in map(pattern.fullmatch, weights.tensors) if match]
    if len(found) > 1:
        raise UserError(
            f"the file has {len(found)} classifiers, {found[0]}* first; give one of them"
        )
    return found[0] if found else ""


def _sentences(weights) -> tuple[str, str]:
    """(what stands before, `encoder` or `decoder`) of fairseq's text models."""
    for encoder in ("encoder", "decoder"):
        start = plans.prefix(weights, f"{encoder}.sentence_encoder.embed_tokens.weight")
        if start is not None:
            return start, encoder
    return "", ""


def is_fairseq(weights, asked: bool) -> bool:
    """fairseq's, RoBERTa included, which is the same model: pre-trained, or with a classifier in
    either wrapper."""
    start, encoder = _sentences(weights)
    return encoder != "" and start in ("", "model.")


def fairseq(weights, folder) -> Plan:
    """fairseq `examples/data2vec/models/data2vec_text.py`."""
    start, encoder = _sentences(weights)
    s = f"{start}{encoder}.sentence_encoder."
    has = weights.tensors.__contains__
    normed = "emb_layer_norm" if has(f"{s}emb_layer_norm.weight") else "layernorm_embedding"
    table = under(start, tables.fairseq_text(encoder, normed))
    heads = classifiers(weights)
    if heads:
        dropped = Rule(f"{start}{encoder}.regression_head.*", drop="the model is fine-tuned")
        table = (dropped, *table, *tables.text_head(heads))
    names = (f"{s}embed_tokens.weight", f"{s}embed_positions.weight", f"{s}layers.@.fc1.weight")
    head = f"{heads}out_proj.weight" if heads else ""
    plan = text_plan(weights, folder, names, head, table, 1e-5)
    if heads:
        return plan
    old = f"{start}{encoder}.lm_head"
    ends = (f"{start}{encoder}.regression_head", old)
    two, one = (any(has(f"{end}.{i}.weight") for end in ends) for i in (2, 0))
    fresh = {} if two else {"head": NO_HEAD}
    if one and not two:
        raise UserError("the regression head has one layer; only two, as published, are supported")
    ema = f"{start}{encoder}._ema."
    teacher = (
        *under(ema, tables.split_blocks("layers.", tables.FAIRSEQ)),
        Rule(f"{ema}*", drop="the teacher's are the student's"),
    )
    return dataclasses.replace(plan, fresh=fresh, teacher=teacher)


def huggingface(weights, folder) -> Plan:
    """transformers' Data2VecTextModel and what stands on it."""
    wanted = {"hidden_act": "gelu", "pad_token_id": 1, "is_decoder": False}
    plans.require(weights.config, wanted | {"add_cross_attention": False})
    start = plans.prefix(weights, "embeddings.word_embeddings.weight") or ""
    types = f"{start}embeddings.token_type_embeddings.weight"
    rows = plans.shape(weights, types, 2)[0] if types in weights.tensors else 1
    table = under(start, tables.huggingface_text(rows)) + (tables.TEXT_HEADS if start else ())
    words, places = (f"{start}embeddings.{n}_embeddings.weight" for n in ("word", "position"))
    names = (words, places, f"{start}encoder.layer.@.intermediate.dense.weight")
    head = "classifier.out_proj.weight"
    head = head if head in weights.tensors else ""
    eps = weights.config.get("layer_norm_eps", 1e-12 if "model_type" in weights.config else 1e-5)
    plan = text_plan(weights, folder, names, head, table, eps)
    return plan if head else dataclasses.replace(plan, fresh={"head": NO_HEAD})
