"""Labels of supervised records: checked on the host, where the record can still be named."""

import numpy as np

from bivl.core.errors import UserError


def number(value):
    """A label or id as a batch holds it: int32, or float32 where it has a fraction."""
    return np.float32(value) if isinstance(value, float) else np.int32(value)


def target(record, num_classes: int):
    """The record's class number as int32, or for num_classes=1 (regression) its value as float32.

    Raises UserError where the record has none, or where it is no class.
    """
    if "label" not in record:
        raise UserError(
            "the data has no label; set config.data.fields.label to the feature that holds it "
            f"(a record has {sorted(record)})"
        )
    label = record["label"]
    if num_classes == 1:
        if not np.isfinite(label):
            raise UserError(f"record {record.get('id', '?')} has the label {label}; leave it out")
        return np.float32(label)
    if not (0 <= label < num_classes and label == int(label)):
        raise UserError(
            f"record {record.get('id', '?')} has the label {label}, but config.num_classes="
            f"{num_classes}; correct it (1 is regression), or leave unlabelled records out"
        )
    return np.int32(label)
