"""No configuration is shipped that no test compiles."""

from __future__ import annotations

from launches import SOURCES, matrix, recorded

from patchgen_fast.triton import attention_configs, patches
from patchgen_fast.triton.configs import asking

TABLES = (
    attention_configs.SHORT,
    attention_configs.STREAM,
    attention_configs.DECODE,
    attention_configs.SHORT_BACKWARD,
    attention_configs.KV_BACKWARD,
    attention_configs.Q_BACKWARD,
    attention_configs.MASK_GRAD,
    patches.PATCHES,
)


def rows_asked(questions: list[tuple[str, int]]) -> set[tuple]:
    """(table, row, chip) of every answer that the launches of these sources are given."""
    with asking() as asked:
        for source, capability in questions:
            recorded(source, capability)
    assert {table.name for table, _ in asked} == {table.name for table in TABLES}
    return {
        (table.name, next(row for row in table.rows if row.holds(*question)), question.chip)
        for table, question in asked
    }


def test_every_row_of_every_table_is_compiled_for_a_chip_that_it_names() -> None:
    compiled = {(table, row) for table, row, _ in rows_asked(matrix())}
    left_out = [
        f"{table.name}: {row}"
        for table in TABLES
        for row in table.rows
        if row.config is not None and (table.name, row) not in compiled
    ]
    assert not left_out


def test_what_is_compiled_for_one_chip_only_asks_no_row_of_its_own() -> None:
    """For all chips but sm_86 and sm_89, which are given the largest."""
    chips = (80, 90, 100, 120)
    everything = [(source, chip) for chip in chips for source in SOURCES]
    chosen = [question for question in matrix() if question[1] in chips]
    assert rows_asked(chosen) == rows_asked(everything)
