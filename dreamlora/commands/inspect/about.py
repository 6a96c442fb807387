"""What a file's header says, in words: ModelSpec's entries, kohya's ``ss_`` and our own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from dreamlora.reading import json_of

_VERSION = "dreamlora.version"
_SAID: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("title", ("modelspec.title", "ss_output_name")),
    ("author", ("modelspec.author",)),
    ("description", ("modelspec.description",)),
    ("license", ("modelspec.license",)),
    ("date", ("modelspec.date",)),
    ("for", ("modelspec.architecture", "ss_base_model_version")),
    ("base model", ("dreamlora.base_model", "ss_sd_model_name")),
    ("hash of the base model", ("ss_new_sd_model_hash", "ss_sd_model_hash")),
    ("predicts", ("modelspec.prediction_type",)),
    ("trigger", ("modelspec.trigger_phrase",)),
    ("token", ("token",)),
    ("resolution", ("modelspec.resolution", "ss_resolution")),
    ("written by", (_VERSION, "software", "modelspec.implementation")),
    ("network", ("ss_network_module",)),
    ("network's arguments", ("ss_network_args",)),
    ("rank and alpha of most layers", ("ss_network_dim",)),
    ("images", ("ss_num_train_images",)),
    ("steps", ("dreamlora.step", "ss_steps")),
    ("epochs", ("ss_epoch", "ss_num_epochs")),
    ("batch", ("ss_total_batch_size", "ss_batch_size_per_device")),
    ("learning rate", ("ss_learning_rate",)),
    ("of the denoiser", ("ss_unet_lr",)),
    ("of text encoders", ("ss_text_encoder_lr",)),
    ("units of the learning rates", ("dreamlora.lora_units",)),
    ("optimizer", ("ss_optimizer", "dreamlora.optimizer")),
    ("schedule", ("ss_lr_scheduler",)),
    ("start", ("dreamlora.init",)),
    ("precision", ("ss_mixed_precision",)),
    ("precision of the base model's weights", ("dreamlora.base_precision",)),
    ("precision of the text encoders' weights", ("dreamlora.text_encoder_precision",)),
    ("seed", ("ss_seed",)),
    ("merged from", ("modelspec.merged_from",)),
    ("comment", ("ss_training_comment",)),
)
"""Labels, and entries: the first that is there counts."""
_NOTHING = ("", "None", "null", "[]", "{}")
_TAGS = 12
"""That are shown."""
_FREQUENCIES = "ss_tag_frequency"
_TAG_BYTES = 2**22


def about(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a header says, by label; what it says nothing of is left out."""
    found = {}
    for label, keys in _SAID:
        value = next((metadata[key] for key in keys if metadata.get(key, "") not in _NOTHING), None)
        if value is None:
            continue
        alpha = metadata.get("ss_network_alpha", "")
        found[label] = f"{value}, {alpha}" if keys == ("ss_network_dim",) and alpha not in _NOTHING else value
    if metadata.get(_VERSION, "") not in _NOTHING:
        found["written by"] = f"dreamlora {metadata[_VERSION]}"
    tags = ", ".join(f"{tag} ({count})" for tag, count in _tags(metadata.get(_FREQUENCIES, "")).most_common(_TAGS))
    return found | ({"most frequent tags": tags} if tags else {})


def _tags(text: str) -> Counter[str]:
    """How often each was seen in all data sets; nothing of what is not as kohya writes it."""
    counts: Counter[str] = Counter()
    try:
        content = json_of(text) if text and len(text) <= _TAG_BYTES else {}
    except ValueError:
        return counts
    for tag, count in _pairs(content):
        counts[tag] += count
    return counts


def _pairs(content: object) -> Iterator[tuple[str, int]]:
    for tags in content.values() if isinstance(content, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int) and not isinstance(count, bool):
                yield tag.strip(), count
