"""What people said, in SQLite: every label is one transaction, and none is ever changed or removed.

The newest label of a labeller on a pair counts; undo appends a row that takes it back. A label is
on disk (WAL, synchronous=FULL) before anybody is told that it is saved.
"""

import datetime
import hashlib
import json
import os
import sqlite3
import statistics
import time
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

LEASE_S = 600.0
"""For how long a pair on somebody's screen is kept from others once it has enough labels coming."""

SCHEMA = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")

NEXT = """
SELECT p.id FROM pair p WHERE p.position IS NOT NULL
AND NOT EXISTS (SELECT 1 FROM current c
    WHERE c.pair = p.id AND c.labeller = :me AND NOT c.adjudicates)
AND NOT EXISTS (SELECT 1 FROM lease l WHERE l.pair = p.id AND l.labeller = :me AND l.tab <> :tab)
AND (EXISTS (SELECT 1 FROM lease l WHERE l.pair = p.id AND l.labeller = :me) OR :overlap > (
    SELECT count(*) FROM current c
    WHERE c.pair = p.id AND c.labeller <> :me AND NOT c.adjudicates AND c.choice <> 'skip'
) + (
    SELECT count(DISTINCT l.labeller) FROM lease l WHERE l.pair = p.id AND l.labeller <> :me))
"""

DISAGREED = """
SELECT p.* FROM pair p JOIN current c ON c.pair = p.id AND NOT c.adjudicates AND c.choice <> 'skip'
WHERE NOT EXISTS (SELECT 1 FROM current d WHERE d.pair = p.id AND d.adjudicates)
GROUP BY p.id HAVING count(DISTINCT replace(c.choice, 'bad', 'tie')) > 1 ORDER BY p.position
"""


DONE = "SELECT count(*) AS n FROM current WHERE labeller = ? AND NOT adjudicates"

LEFT = """
SELECT count(*) AS n FROM pair p WHERE position IS NOT NULL
AND NOT EXISTS (SELECT 1 FROM current c
    WHERE c.pair = p.id AND c.labeller = ? AND NOT c.adjudicates)
AND (SELECT count(*) FROM current c WHERE c.pair = p.id AND NOT c.adjudicates
    AND c.labeller <> ? AND c.choice <> 'skip') < ?
"""


class Conflict(ValueError):
    """What was sent no longer fits what is stored; nothing was written."""


def pair_id(row: dict) -> str:
    """The row's id and a hash of what is compared: another text is another pair."""
    text = json.dumps([row["prompt"], row["response_a"], row["response_b"]], sort_keys=True)
    return f"{row['id']}#{hashlib.sha256(text.encode()).hexdigest()[:12]}"


class Store:
    """The database of one labelling project; used from one thread.

    Args:
        path: of the file, made with access for its owner alone.
        seed: of which answer stands left; kept in the file, so that a restart changes no side.
    """

    def __init__(self, path: Path, seed: int = 42):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        self.db = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
        self.db.row_factory = sqlite3.Row
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            self.db.execute(f"PRAGMA {pragma}")
        self.db.executescript(SCHEMA)
        self.db.execute("INSERT OR IGNORE INTO meta VALUES ('seed', ?)", (str(seed),))
        self.seed = self._one("SELECT value FROM meta WHERE key = 'seed'")["value"]

    @contextmanager
    def _transaction(self):
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    def _one(self, sql: str, *values) -> sqlite3.Row | None:
        return self.db.execute(sql, values).fetchone()

    def load(self, rows: Iterable[dict]) -> int:
        """Queue these pairs in their order; others keep their labels and are not shown again."""
        with self._transaction():
            self.db.execute("UPDATE pair SET position = NULL")
            count = 0
            for count, row in enumerate(rows, 1):
                self.db.execute(
                    "INSERT INTO pair VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE "
                    "SET position = excluded.position, row = excluded.row",
                    (pair_id(row), count, json.dumps(row)),
                )
        return count

    def pair(self, pair: str) -> dict:
        """The row of one pair; Conflict when there is none."""
        found = self._one("SELECT row FROM pair WHERE id = ?", pair)
        if found is None:
            raise Conflict("This pair does not exist.")
        return json.loads(found["row"])

    def pairs(self) -> dict[str, dict]:
        """Every pair that is queued or labelled, in order."""
        rows = self.db.execute("SELECT id, row FROM pair ORDER BY position IS NULL, position, id")
        return {row["id"]: json.loads(row["row"]) for row in rows}

    def left(self, pair: str, labeller: str) -> str:
        """Which answer this labeller sees on the left: drawn from the seed, the same each time."""
        digest = hashlib.sha256(f"{self.seed}\0{pair}\0{labeller}".encode()).digest()
        return "ab"[digest[0] & 1]

    def version(self, pair: str, labeller: str, adjudicates: bool = False) -> int:
        """Number of the labeller's newest row on this pair, 0 without one."""
        found = self._one(
            "SELECT max(seq) AS seq FROM label WHERE pair = ? AND labeller = ? AND adjudicates = ?",
            pair, labeller, adjudicates,
        )  # fmt: skip
        return found["seq"] or 0

    def assign(self, labeller: str, tab: str, overlap: int = 1) -> str | None:
        """Lease the next pair to this labeller's tab; the same one again until it is labelled.

        Passed over are pairs that he has labelled or has open in another tab, and those that
        `overlap` others have labelled or are looking at.
        """
        with self._transaction():
            self.db.execute("DELETE FROM lease WHERE until < ?", (time.time(),))
            values = {"me": labeller, "tab": tab, "overlap": overlap}
            mine = "AND p.id = (SELECT pair FROM lease WHERE labeller = :me AND tab = :tab)"
            found = (
                self.db.execute(f"{NEXT} {mine}", values).fetchone()
                or self.db.execute(f"{NEXT} ORDER BY p.position LIMIT 1", values).fetchone()
            )
            if found is None:
                return None
            self._lease(found["id"], labeller, tab)
        return found["id"]

    def _lease(self, pair: str, labeller: str, tab: str) -> None:
        self.db.execute(
            "REPLACE INTO lease VALUES (?, ?, ?, ?)", (pair, labeller, tab, time.time() + LEASE_S)
        )

    def disagreed(self) -> list[str]:
        """Pairs whose labellers disagree and that nobody has settled."""
        return [row["id"] for row in self.db.execute(DISAGREED)]

    def label(
        self,
        request: str,
        pair: str,
        labeller: str,
        choice: str,
        *,
        version: int,
        left: str,
        seconds: float = 0.0,
        comment: str = "",
        informed: bool = False,
        adjudicates: bool = False,
    ) -> None:
        """Append one label; it is on disk when this returns.

        Args:
            request: an id that the page made up: sent twice, it is one label.
            version: what `version` said when the page was made.
            left: the answer that stood on the left of that page.
            informed: whether the page showed a verdict or score of this pair with the last label;
                one that `see` recorded counts as well.
        Raises:
            Conflict: the labeller has labelled this pair since, in another tab.
        """
        with self._transaction():
            before = self._one("SELECT * FROM label WHERE request = ?", request)
            wanted = (pair, labeller, choice)
            if before is not None:
                if (before["pair"], before["labeller"], before["choice"]) == wanted:
                    return
                raise Conflict("This request id was used for another label.")
            self.pair(pair)
            if left != self.left(pair, labeller):
                raise Conflict("The page is out of date. Reload it.")
            if version != self.version(pair, labeller, adjudicates):
                raise Conflict("You labelled this pair in another tab; that label stands.")
            seen = "SELECT 1 FROM verdict_seen WHERE pair = ? AND labeller = ?"
            self._append(
                "label",
                request=request,
                pair=pair,
                labeller=labeller,
                adjudicates=adjudicates,
                choice=choice,
                shown_left=left,
                informed=informed or self._one(seen, pair, labeller) is not None,
                seconds=seconds,
                comment=comment,
            )
            self.db.execute("DELETE FROM lease WHERE pair = ? AND labeller = ?", (pair, labeller))

    def see(self, pair: str, labeller: str) -> None:
        """Record that the tests of this pair's prompt were run for the labeller, while writing."""
        self.db.execute("INSERT OR IGNORE INTO verdict_seen VALUES (?, ?)", (pair, labeller))

    def _append(self, table: str, **row) -> None:
        row["at"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        names, values = ", ".join(row), ", ".join(f":{name}" for name in row)
        self.db.execute(f"INSERT INTO {table} ({names}) VALUES ({values})", row)

    def undo(self, request: str, labeller: str, tab: str) -> str | None:
        """Take the labeller's newest label back and open its pair in this tab; None without one."""
        with self._transaction():
            done = self._one("SELECT pair FROM label WHERE request = ?", request)
            if done is not None:
                return done["pair"]
            newest = "SELECT * FROM current WHERE labeller = ? ORDER BY seq DESC LIMIT 1"
            last = self._one(newest, labeller)
            if last is None:
                return None
            row = {k: last[k] for k in last.keys() if k != "seq"}
            row |= {"request": request, "choice": "undo", "seconds": 0.0, "comment": ""}
            self._append("label", **row)
            if not last["adjudicates"]:
                self._lease(last["pair"], labeller, tab)
        return last["pair"]

    def labels(self) -> list[dict]:
        """The labels that count, one for each pair, labeller and role, oldest first."""
        return [dict(row) for row in self.db.execute("SELECT * FROM current ORDER BY seq")]

    def history(self, table: str = "label") -> list[dict]:
        """Every row ever written, undone ones too."""
        return [dict(row) for row in self.db.execute(f"SELECT * FROM {table} ORDER BY seq")]

    def progress(self, labeller: str, overlap: int) -> dict:
        """Labels done by one labeller, pairs left for him, and seconds per label (median of 20)."""
        recent = "SELECT seconds FROM current WHERE labeller = ? ORDER BY seq DESC LIMIT 20"
        seconds = [row["seconds"] for row in self.db.execute(recent, (labeller,))]
        return {
            "done": self._one(DONE, labeller)["n"],
            "left": self._one(LEFT, labeller, labeller, overlap)["n"],
            "seconds": statistics.median_high(seconds) if seconds else None,
        }

    def next_to_write(self, labeller: str) -> str | None:
        """The next pair of a prompt that this labeller has written no demonstration for."""
        pairs = self.pairs()
        asked = {pair: json.dumps(row["prompt"], sort_keys=True) for pair, row in pairs.items()}
        mine = "SELECT DISTINCT pair FROM demonstration WHERE labeller = ?"
        written = {asked[row["pair"]] for row in self.db.execute(mine, (labeller,))}
        return next((pair for pair, prompt in asked.items() if prompt not in written), None)

    def demonstrate(self, request: str, pair: str, labeller: str, **fields) -> None:
        """Append one demonstration; on disk when this returns, and once however often it is sent.

        Args:
            fields: started_from ("nothing", "a" or "b"), completion, verdict, seconds.
        """
        with self._transaction():
            self.pair(pair)
            if self._one("SELECT 1 FROM demonstration WHERE request = ?", request) is None:
                self._append(
                    "demonstration", request=request, pair=pair, labeller=labeller, **fields
                )

    def close(self) -> None:
        self.db.close()
