"""data2vec 1.0: the layouts in which its models are stored."""

from bivl.weights import data2vec_export
from bivl.weights import data2vec_images as images
from bivl.weights import data2vec_speech as speech
from bivl.weights import data2vec_texts as texts
from bivl.weights import plan as plans
from bivl.weights.plan import Layout


def is_huggingface(kind: str):
    """-> `recognise` of Hugging Face's Data2Vec of a kind: by its config, else by the names."""
    ending = {
        "vision": "embeddings.patch_embeddings.projection.weight",
        "text": "embeddings.word_embeddings.weight",
        "audio": "feature_projection.projection.weight",
    }[kind]

    def recognise(weights, asked: bool) -> bool:
        start = plans.prefix(weights, ending)
        if start is None or "model_type" in weights.config:
            return weights.config.get("model_type") == f"data2vec-{kind}"
        return start == f"data2vec_{kind}." or (asked and start == "")

    return recognise


FAMILIES = {
    "data2vec": {
        "image": Layout(images.is_beit, images.beit),
        "fairseq image": Layout(images.is_port, images.port),
        "fairseq text": Layout(texts.is_fairseq, texts.fairseq),
        "fairseq audio": Layout(speech.is_fairseq, speech.fairseq),
        "huggingface image": Layout(is_huggingface("vision"), images.huggingface),
        "huggingface text": Layout(is_huggingface("text"), texts.huggingface),
        "huggingface audio": Layout(is_huggingface("audio"), speech.huggingface),
    }
}
# What our models are elsewhere: functions (config, shapes by path, Origin) -> Export or None.
EXPORTS = {"huggingface": data2vec_export.HUGGINGFACE}
