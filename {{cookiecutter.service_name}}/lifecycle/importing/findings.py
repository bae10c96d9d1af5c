"""Which columns a person should look at: a hint of leakage, an id, or data about people."""

import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lifecycle.importing.steps import say
from lifecycle.tables import Table

MANY_ROWS = 20  # in fewer, all values of a column differ by chance
LABEL_LIKE = re.compile(r"(?i)^(y|label|class|target|outcome|ground_?truth|prediction|y_.*)$")
PERSONAL = re.compile(
    r"(?i)(^|[^a-z])(e-?mail|(first|last|full|sur)_?name|name|phone|mobile|ssn|social_?security|passport|iban"
    r"|birth(day|date)?|dob|street|address|postcode|zip|ip(_?address)?|nationality|religion|ethnicity|race"
    r"|gender|sex)($|[^a-z])"
)
PERSONAL_TEXT = r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}|\+?[0-9][0-9 ()/-]{8,}[0-9]"


def point_out(table: Table, names: list[str], target: str, rows: Any) -> None:
    """Say which columns look like a label, an id, or data about people; `rows` is the sample."""
    unused = [name for name in table.columns if name not in (*names, target)]
    if unused:
        say(f"not used by the model: {', '.join(unused)}")
    for name in names:
        values = rows.column(name)
        present = values.drop_null()
        distinct = len(present) >= MANY_ROWS and pc.count_distinct(present).as_py() == len(present)
        if LABEL_LIKE.match(name) or one_to_one(values, rows.column(target)):
            say(f"look at {name!r}: it tells the target; will it be known when a prediction is wanted?")
        if distinct and table.columns[name].dtype in ("string", "int64"):
            say(f"look at {name!r}: every row has another value, like an id")
        text = pa.types.is_string(values.type)
        if PERSONAL.search(name) or (
            text and pc.any(pc.match_substring_regex(present, PERSONAL_TEXT)).as_py()
        ):
            say(f"look at {name!r}: it may be about people; golden.jsonl and predict.py hold real rows")


def one_to_one(values: Any, target: Any) -> bool:
    """Whether each value goes with one value of the target and the other way round."""
    if pa.types.is_floating(values.type) or pa.types.is_floating(target.type):
        return bool(values.type == target.type and values.equals(target))
    pairs = len(pa.table({"one": values, "other": target}).group_by(["one", "other"]).aggregate([]))
    count = pc.count_distinct(values).as_py()
    return bool(1 < count == pairs == pc.count_distinct(target).as_py())
