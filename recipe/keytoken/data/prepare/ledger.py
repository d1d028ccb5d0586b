"""The books of a preparation: where every row of the source went.

Every row ends in exactly one place: the dataset, the quarantine, the list of copies, or the rows dropped
because a test set holds them. A sum that does not come out is an error.
"""

from collections import Counter
from dataclasses import dataclass, field

from keytoken.data.prepare.overlap import Overlap
from keytoken.data.prepare.rows import Entry
from keytoken.data.prepare.samples import RowProblem, Sample
from keytoken.data.prepare.sources import SourceRow


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row that was set aside: what it is called, and why."""

    row: int
    place: str
    id: str
    path: str
    reason: str
    detail: str


@dataclass(slots=True)
class Ledger:
    """Where every row of the source went.

    Attributes:
        num_read: Rows read.
        quarantined: Rows set aside.
        copies: Rows dropped because an earlier one says the same: their place and that of the other.
        overlaps: What rows have in common with test sets.
        num_overlapping: Rows dropped for it.
        entries: Rows of the dataset.
        notes: What was inferred or removed, by how many rows.
    """

    num_read: int = 0
    quarantined: list[Quarantined] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    num_overlapping: int = 0
    entries: list[Entry] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def refuse(self, row: SourceRow | Sample, problem: RowProblem, media: str = "", row_id: str = "") -> None:
        """Set a row aside."""
        if isinstance(row, Sample):
            media, row_id = row.media, row.item_id
        self.quarantined.append(
            Quarantined(row.number, row.place, row_id, media, problem.reason, problem.detail)
        )

    def close(self) -> None:
        """Check the sum and put the lists into the order of the source."""
        parts = (len(self.entries), len(self.quarantined), len(self.copies), self.num_overlapping)
        if sum(parts) != self.num_read:
            raise AssertionError(f"{self.num_read} rows read, but {parts} went somewhere")
        self.quarantined.sort(key=lambda entry: entry.row)
