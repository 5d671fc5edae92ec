"""Records of supervised tasks: typed, validated, each knowing its file and line.

Example::

    from hanmo.data.tasks import Shares, read_records, split_records

    records = read_records("labelled", "sms.tsv")
    print(records.report.describe())
    split = split_records(records, Shares(validation=0.1, test=0.1), seed=0)
"""

from hanmo.data.splits import Shares
from hanmo.data.tasks.read import KINDS, Records, read_records
from hanmo.data.tasks.report import FileReport, RecordsReport
from hanmo.data.tasks.schemes import Scheme, detect_scheme, spans_of, to_iob2
from hanmo.data.tasks.splits import Split, SplitReport, check_labels, label_names, split_records
from hanmo.data.tasks.types import (
    Answer,
    Check,
    Dialogue,
    Labelled,
    Message,
    Pair,
    Preference,
    Problem,
    Prompted,
    Proposition,
    QuestionAnswer,
    Record,
    Similar,
    Tagged,
    Text,
)

__all__ = [
    "KINDS",
    "Answer",
    "Check",
    "Dialogue",
    "FileReport",
    "Labelled",
    "Message",
    "Pair",
    "Preference",
    "Problem",
    "Prompted",
    "Proposition",
    "QuestionAnswer",
    "Record",
    "Records",
    "RecordsReport",
    "Scheme",
    "Shares",
    "Similar",
    "Split",
    "SplitReport",
    "Tagged",
    "Text",
    "check_labels",
    "detect_scheme",
    "label_names",
    "read_records",
    "spans_of",
    "split_records",
    "to_iob2",
]
