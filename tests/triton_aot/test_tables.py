"""No configuration is shipped that no test compiles."""

from __future__ import annotations

from launches import matrix, recorded

from patchgen_fast.triton import attention, attention_backward, attention_decode, patches
from patchgen_fast.triton.configs import asking

TABLES = (
    attention.SHORT,
    attention.STREAM,
    attention_backward.SHORT_BACKWARD,
    attention_backward.KV_BACKWARD,
    attention_backward.Q_BACKWARD,
    attention_backward.MASK_GRAD,
    attention_decode.DECODE,
    patches.PATCHES,
)


def test_every_row_of_every_table_is_compiled_for_a_chip_that_it_names() -> None:
    with asking() as asked:
        for source, capability in matrix():
            recorded(source, capability)
    assert {table.name for table, _ in asked} == {table.name for table in TABLES}
    compiled = {
        (table.name, next(row for row in table.rows if row.holds(*question)))
        for table, question in asked
    }
    left_out = [
        f"{table.name}: {row}"
        for table in TABLES
        for row in table.rows
        if row.config is not None and (table.name, row) not in compiled
    ]
    assert not left_out
